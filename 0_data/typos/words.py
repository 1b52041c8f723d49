"""Words and one edit of them: the lists, homophones, which words can be edited, and every possible typo.

A word is a run of letters of its language with white space or punctuation around it. Words with digits, hyphens,
apostrophes or other marks inside are never edited. A letter and its accent are one letter, also in Unicode's form NFD.
One typo has an optimal string alignment distance of 1 (rapidfuzz).
"""

from __future__ import annotations

import json
import re
import unicodedata
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from rapidfuzz.distance import OSA, Prefix

from typos.languages import DATA, ENGLISH, LETTERS, WORD_LISTS, Language, folded, key_neighbours, word_set, zipf

FUNCTION_WORDS = word_set(WORD_LISTS["function_words"])
NUMBER_WORDS = word_set(WORD_LISTS["number_words"])
ARITHMETIC_WORDS = word_set(WORD_LISTS["arithmetic_words"])
UNITS = word_set(WORD_LISTS["units"])
PROTECTED_WORDS = NUMBER_WORDS | ARITHMETIC_WORDS | UNITS
INSTRUCTION_VERBS = word_set(WORD_LISTS["instruction_verbs"])
OFFENSIVE_WORDS = word_set(WORD_LISTS["offensive_words"])

CLEAR_WORD_ZIPF = 4.0  # what `real_word` makes: above 3 wordfreq lists many names and slips too
KNOWN_WORD_ZIPF = 2.0  # rarer than this: no sure spelling to depart from, and no word that a typo could make
SHORTEST_CONTENT_WORD = 4
SHORTEST_FUNCTION_WORD = 3


def words_in(text: str) -> list[str]:
    """The words of any text: letters, with apostrophes inside."""
    return re.findall(r"[^\W\d_]+(?:['’][^\W\d_]+)*", composed(text))


def letter_runs(text: str) -> list[str]:
    """The runs of letters of any text: `don't` is two."""
    return re.findall(r"[^\W\d_]+", composed(text))


def composed(text: str) -> str:
    """`text` in Unicode's form NFC: a letter and its accent are one character."""
    return unicodedata.normalize("NFC", text)


Form = Literal["NFC", "NFD"]


def form_of(text: str) -> Form:
    """Unicode's form of a text: NFD if it is in it and not in NFC."""
    return "NFD" if composed(text) != text and unicodedata.is_normalized("NFD", text) else "NFC"


# --- words of a prompt


@dataclass(frozen=True)
class Word:
    """A word that could be edited. `index` counts the text's white-space separated pieces from 0."""

    index: int
    start: int
    end: int
    text: str  # in form NFC
    starts_sentence: bool  # or follows a colon
    shows_name: bool  # a capital that no sentence's beginning explains
    language: Language = ENGLISH
    form: Form = "NFC"  # of the prompt

    @property
    def lower(self) -> str:
        return self.text.lower()

    @property
    def is_small(self) -> bool:
        """True for a function word."""
        return self.lower in self.language.small_words

    def written(self, text: str) -> str:
        """`text` in the prompt's form, NFC or NFD."""
        return unicodedata.normalize(self.form, text)


PIECE = re.compile(r"\S+")
# A full stop after these ends no sentence: titles, places, Latin short forms, initials (J.), letters with stops (e.g.).
_ABBREVIATION = re.compile(
    r"\W*(?:(?:mr|mrs|ms|mx|dr|drs|prof|st|sr|jr|rev|fr|hon|messrs|gen|col|lt|sgt|capt|cmdr|cpl|maj|adm|gov|sen|rep|pres|"
    r"supt|insp|mt|ft|ave|blvd|rd|dept|univ|inc|ltd|corp|bros|vs|etc|cf|al|approx|ca|fig|figs|eq|vol|pp|ed|eds|est|"
    r"jan|feb|apr|aug|sept|oct|nov|dec)\.|(?!I\.)(?:[a-z]\.)+|ph\.d\.)\W*",
    re.IGNORECASE,
)
_STOP = re.compile(r"[.!?…][\"”’'»)\]*]*$")


def ends_sentence(piece: str) -> bool:
    """True for a white-space separated piece that ends in a full stop, ? or ! (in quotes or brackets, too)."""
    return _STOP.search(piece) is not None and _ABBREVIATION.fullmatch(piece) is None


@lru_cache
def _core(language: Language) -> re.Pattern[str]:
    before = f"(?:{language.before_word})?" if language.before_word else ""
    return re.compile(rf"[(\[\"'“‘«*]*{before}({LETTERS})[)\]\"'”’»*.,;:!?…]*")


def plain_words(text: str, language: Language = ENGLISH) -> list[Word]:
    """The words of `text` that are letters of the language, lower or title case, with punctuation around at most."""
    found = []
    of_text = form_of(text)
    new_sentence, after_colon = True, False
    for index, piece in enumerate(PIECE.finditer(text)):
        core = None if _ABBREVIATION.fullmatch(piece[0]) else _core(language).fullmatch(piece[0])
        if core and (form := _form_of(core[1], of_text, language)):
            word = composed(core[1])
            # A single letter is a word as a, A or I alone; `A)` and `b,` name an option or a variable.
            if (word.islower() or word.istitle()) and (len(word) > 1 or piece[0] in ("a", "A", "I")):
                name = word[0].isupper() and not new_sentence and not language.capital_nouns
                start, starts = piece.start() + core.start(1), new_sentence or after_colon
                found.append(Word(index, start, start + len(core[1]), word, starts, name, language, form))
        new_sentence, after_colon = ends_sentence(piece[0]), piece[0][-1] in ":："
    return found


def _form_of(raw: str, of_text: Form, language: Language) -> Form | None:
    """Unicode's form of a word in letters of the language, that of the text if it has both; None for other letters or a
    mixture."""
    if not language.alphabet.issuperset(composed(raw).lower()):
        return None
    forms: tuple[Form, ...] = (of_text, "NFC", "NFD")
    return next((form for form in forms if unicodedata.is_normalized(form, raw)), None)


def by_importance(words: list[Word]) -> list[Word]:
    """Content words (known, four letters or more), each once: the rarest first, then the longer, then the earlier.

    Names (a capital inside a sentence, or after a colon, an initial or an abbreviation) come last, because their
    spelling is the least sure.
    """
    names = {word.lower for word in words if word.shows_name}
    first: dict[str, Word] = {}
    for word in words:
        long = len(word.text) >= SHORTEST_CONTENT_WORD and not word.is_small
        if long and zipf(word.text, word.language) >= KNOWN_WORD_ZIPF:
            first.setdefault(word.lower, word)
    return sorted(first.values(), key=lambda w: (w.lower in names, zipf(w.text, w.language), -len(w.text), w.start))


# --- homophones


@lru_cache(maxsize=1)
def _homophone_tables() -> dict[str, dict[str, str]]:
    return json.loads((DATA / "homophones.json").read_text(encoding="utf-8"))


def homophones(word: str) -> list[str]:
    """Words of another spelling and the same pronunciation as `word` (0_data/homophones.json), whatever its case."""
    return _homophone_tables()["homophones"].get(word.lower(), "").split()


def are_homophones(before: str, after: str) -> bool:
    """True for two spellings that sound the same in at least one pronunciation of theirs, whatever their case."""
    sometimes = _homophone_tables()["sometimes"].get(before.lower(), "").split()
    return after.lower() in [*homophones(before), *sometimes]


# --- one edit


@dataclass(frozen=True)
class Edit:
    """Replace `text[start:end]` of the clean prompt by `after`; `word` is the clean word that it hits, if any."""

    start: int
    end: int
    after: str
    operation: str
    word: Word | None = None


TYPO_OPERATIONS = ("substitution", "transposition", "deletion", "doubling")


def typo_options(word: str, operation: str, keyboard: str = "qwerty", language: Language = ENGLISH) -> list[str]:
    """Every result of one operation on `word` (letters of the language, form NFC).

    The first letter stays, as in most real typos. A letter without a key of its own (á in Spanish) is not replaced.
    """
    w = word.lower()
    inner = range(1, len(w))
    if operation == "substitution":
        near = key_neighbours(keyboard, language)
        options = [w[:i] + key + w[i + 1 :] for i in inner for key in near.get(w[i], "")]
    elif operation == "transposition":
        options = [w[:i] + w[i + 1] + w[i] + w[i + 2 :] for i in inner[:-1] if w[i] != w[i + 1]]
    elif operation == "deletion":
        options = [w[:i] + w[i + 1 :] for i in inner if w[i] != w[i - 1]]
    else:
        options = [w[: i + 1] + w[i:] for i in inner if w[i] not in w[i - 1] + w[i + 1 : i + 2]]
    return [word[0] + typo[1:] for typo in options]


def one_edit_away(word: str, language: Language = ENGLISH) -> set[str]:
    """All strings of the language's letters at optimal string alignment distance 1 from `word` (folded)."""
    letters = {letter for letter in language.alphabet if folded(letter) == letter}  # not ß, ς
    cuts = [(word[:i], word[i:]) for i in range(len(word) + 1)]
    away = {left + right[1:] for left, right in cuts if right}
    away |= {left + right[1] + right[0] + right[2:] for left, right in cuts if len(right) > 1}
    away |= {left + c + right[1:] for left, right in cuts if right for c in letters}
    away |= {left + c + right for left, right in cuts for c in letters}
    return away - {word}


@lru_cache(maxsize=65536)
def is_clear_typo(clean: str, typo: str, language: Language = ENGLISH) -> bool:
    """True if readers know no word `typo`, and the likeliest word one edit away from it is `clean` (lower case)."""
    if is_known(typo, language):
        return False
    frequencies = language.frequencies
    expected = frequencies.get(folded(clean), 0.0)
    return all(frequencies.get(other, 0.0) <= expected for other in one_edit_away(folded(typo), language))


def is_known(word: str, language: Language = ENGLISH) -> bool:
    """True for what no typo may become: a word that some readers know (Zipf frequency >= 2), or an insult."""
    return zipf(word, language) >= KNOWN_WORD_ZIPF or word.lower() in OFFENSIVE_WORDS


_NOT_MADE = OFFENSIVE_WORDS | PROTECTED_WORDS | word_set(WORD_LISTS["names_and_short_forms"])
_SAME_WORD = word_set(WORD_LISTS["same_word"])
_ENDINGS = ("", "s", "es", "d", "ed", "r", "er", "n", "en", "y", "ly", "e", "ing", "t")


@lru_cache(maxsize=65536)
def real_word_options(word: str) -> list[str]:
    """Other real words one edit away from `word` (lower case), without its own forms, homophones and insults."""
    return sorted(
        other
        for other in one_edit_away(word)
        if len(other) >= SHORTEST_FUNCTION_WORD
        and zipf(other) >= CLEAR_WORD_ZIPF
        and other not in _NOT_MADE
        and not are_homophones(word, other)
        and not _is_same_word(word, other)
    )


def _is_same_word(a: str, b: str) -> bool:
    """True if two words look like forms of one: the same but for an ending, or for British and American spelling."""
    stems = [{word.removesuffix(ending) for ending in _ENDINGS} for word in (a, b)]
    return bool(stems[0] & stems[1]) or _american(a) == _american(b) or f"{min(a, b)}/{max(a, b)}" in _SAME_WORD


def _american(word: str) -> str:
    return word.replace("our", "or").replace("is", "iz").replace("ys", "yz").replace("re", "er").replace("ll", "l")


def first_difference(before: str, after: str) -> int:
    """How many characters two texts share at their start."""
    return int(Prefix.similarity(before, after))


def in_case_of(word: str, lower: str) -> str:
    """`lower` with a capital if `word` has one."""
    return lower[0].upper() + lower[1:] if word[0].isupper() else lower


def operation_of(before: str, after: str) -> str | None:
    """The one operation that turns `before` into `after`; None if they are not exactly one edit apart.

    Letter case counts as no edit: two words that differ in it alone give None.
    """
    a, b = composed(before).lower(), composed(after).lower()
    if a == b or abs(len(a) - len(b)) > 1 or osa_distance(before, after) != 1:
        return None
    i = first_difference(a, b)
    if len(a) == len(b):
        return "substitution" if a[i + 1 :] == b[i + 1 :] else "transposition"
    if len(a) > len(b):
        return "deletion"
    return "doubling" if i > 0 and b[i] == b[i - 1] else "insertion"


def osa_distance(before: str, after: str, limit: int = 9) -> int:
    """Optimal string alignment distance of the NFC forms; `limit` + 1 if it is larger than `limit`."""
    return int(OSA.distance(composed(before), composed(after), score_cutoff=limit))
