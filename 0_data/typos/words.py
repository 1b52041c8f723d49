"""Words and one edit of them: the lists, frequencies, homophones, which words can be edited, and every possible typo.

A word is a run of ASCII letters with white space or punctuation around it. Words with digits, hyphens, apostrophes or
other marks inside are never edited. Frequencies are those of wordfreq's English list (Speer 2022). One typo has an
optimal string alignment distance of 1 (rapidfuzz).
"""

from __future__ import annotations

import json
import math
import re
import tomllib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from string import ascii_lowercase
from typing import Any

from rapidfuzz.distance import OSA, Prefix
from wordfreq import get_frequency_dict

DATA = Path(__file__).resolve().parents[1]
WORD_LISTS: dict[str, Any] = tomllib.loads((DATA / "word_lists.toml").read_text(encoding="utf-8"))


def word_set(text: str) -> frozenset[str]:
    """The white-space separated words of `text`."""
    return frozenset(text.split())


FUNCTION_WORDS = word_set(WORD_LISTS["function_words"])
NUMBER_WORDS = word_set(WORD_LISTS["number_words"])
ARITHMETIC_WORDS = word_set(WORD_LISTS["arithmetic_words"])
UNITS = word_set(WORD_LISTS["units"])
PROTECTED_WORDS = NUMBER_WORDS | ARITHMETIC_WORDS | UNITS
INSTRUCTION_VERBS = word_set(WORD_LISTS["instruction_verbs"])
OFFENSIVE_WORDS = word_set(WORD_LISTS["offensive_words"])

CLEAR_WORD_ZIPF = 4.0  # what `real_word` makes: above 3 wordfreq lists many names and slips too
REAL_WORD_ZIPF = 3.0
KNOWN_WORD_ZIPF = 2.0  # rarer than this: no sure spelling to depart from, and no word that a typo could make
SHORTEST_CONTENT_WORD = 4
SHORTEST_FUNCTION_WORD = 3


@lru_cache(maxsize=1)
def word_frequencies() -> dict[str, float]:
    """Word -> share of all words, wordfreq's largest English list (read on the first call, 0.2 s)."""
    return dict(get_frequency_dict("en", wordlist="best"))


def zipf(word: str) -> float:
    """Zipf frequency of one word: log10 of its count per billion words, to 2 decimals; 0.0 if it is unknown."""
    share = word_frequencies().get(word.lower(), 0.0)
    return round(math.log10(share) + 9, 2) if share > 0 else 0.0


def is_real_word(word: str) -> bool:
    """True for a word that readers know: Zipf frequency >= 3."""
    return zipf(word) >= REAL_WORD_ZIPF


def words_in(text: str) -> list[str]:
    """The words of any text: letters, with apostrophes inside."""
    return re.findall(r"[^\W\d_]+(?:['’][^\W\d_]+)*", text)


# --- words of a prompt


@dataclass(frozen=True)
class Word:
    """A word that could be edited. `index` counts the text's white-space separated pieces from 0."""

    index: int
    start: int
    end: int
    text: str
    starts_sentence: bool  # or follows a colon
    shows_name: bool  # a capital that no sentence's beginning explains

    @property
    def lower(self) -> str:
        return self.text.lower()


PIECE = re.compile(r"\S+")
_CORE = re.compile(r"[(\[\"'“‘«*]*([A-Za-z]+)[)\]\"'”’»*.,;:!?…]*")
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


def plain_words(text: str) -> list[Word]:
    """The words of `text` that are plain ASCII letters in lower or title case, with punctuation around them at most."""
    found = []
    new_sentence, after_colon = True, False
    for index, piece in enumerate(PIECE.finditer(text)):
        core = None if _ABBREVIATION.fullmatch(piece[0]) else _CORE.fullmatch(piece[0])
        # A single letter is a word as a, A or I alone; `A)` and `b,` name an option or a variable.
        if core and (core[1].islower() or core[1].istitle()) and (len(core[1]) > 1 or piece[0] in ("a", "A", "I")):
            start = piece.start() + core.start(1)
            name = core[1][0].isupper() and not new_sentence
            found.append(Word(index, start, start + len(core[1]), core[1], new_sentence or after_colon, name))
        new_sentence, after_colon = ends_sentence(piece[0]), piece[0][-1] in ":："
    return found


def by_importance(words: list[Word]) -> list[Word]:
    """Content words (known, four letters or more), each once: the rarest first, then the longer, then the earlier.

    Names (a capital inside a sentence, or after a colon, an initial or an abbreviation) come last, because their
    spelling is the least sure.
    """
    names = {word.lower for word in words if word.shows_name}
    first: dict[str, Word] = {}
    for word in words:
        long = len(word.text) >= SHORTEST_CONTENT_WORD and word.lower not in FUNCTION_WORDS
        if long and zipf(word.text) >= KNOWN_WORD_ZIPF:
            first.setdefault(word.lower, word)
    return sorted(first.values(), key=lambda w: (w.lower in names, zipf(w.text), -len(w.text), w.start))


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
KEYBOARDS = {
    "qwerty": ("qwertyuiop", "asdfghjkl", "zxcvbnm"),
    "qwertz": ("qwertzuiop", "asdfghjkl", "yxcvbnm"),
    "azerty": ("azertyuiop", "qsdfghjklm", "wxcvbn"),
    "dvorak": ("',.pyfgcrl", "aoeuidhtns", ";qjkxbmwvz"),
}


@lru_cache
def key_neighbours(keyboard: str) -> dict[str, str]:
    """Letter -> the letters on keys that touch its key; rows lie 0, 1/4 and 3/4 of a key to the right."""
    places = {
        key: (column + offset, row)
        for row, (keys, offset) in enumerate(zip(KEYBOARDS[keyboard], (0.0, 0.25, 0.75), strict=True))
        for column, key in enumerate(keys)
        if key.isalpha()
    }
    return {
        key: "".join(sorted(o for o in places if o != key and math.dist(places[key], places[o]) < 1.3))
        for key in places
    }


def typo_options(word: str, operation: str, keyboard: str = "qwerty") -> list[str]:
    """Every result of one operation on `word` (ASCII letters). The first letter stays, as in most real typos."""
    w = word.lower()
    inner = range(1, len(w))
    if operation == "substitution":
        options = [w[:i] + near + w[i + 1 :] for i in inner for near in key_neighbours(keyboard)[w[i]]]
    elif operation == "transposition":
        options = [w[:i] + w[i + 1] + w[i] + w[i + 2 :] for i in inner[:-1] if w[i] != w[i + 1]]
    elif operation == "deletion":
        options = [w[:i] + w[i + 1 :] for i in inner if w[i] != w[i - 1]]
    else:
        options = [w[: i + 1] + w[i:] for i in inner if w[i] not in w[i - 1] + w[i + 1 : i + 2]]
    return [word[0] + typo[1:] for typo in options]


def one_edit_away(word: str) -> set[str]:
    """All strings of the letters a-z at optimal string alignment distance 1 from `word`."""
    cuts = [(word[:i], word[i:]) for i in range(len(word) + 1)]
    away = {left + right[1:] for left, right in cuts if right}
    away |= {left + right[1] + right[0] + right[2:] for left, right in cuts if len(right) > 1}
    away |= {left + c + right[1:] for left, right in cuts if right for c in ascii_lowercase}
    away |= {left + c + right for left, right in cuts for c in ascii_lowercase}
    return away - {word}


@lru_cache(maxsize=65536)
def is_clear_typo(clean: str, typo: str) -> bool:
    """True if readers know no word `typo`, and the likeliest word one edit away from it is `clean` (lower case)."""
    if zipf(typo) >= KNOWN_WORD_ZIPF or typo in OFFENSIVE_WORDS:
        return False
    frequencies = word_frequencies()
    expected = frequencies.get(clean, 0.0)
    return all(frequencies.get(other, 0.0) <= expected for other in one_edit_away(typo))


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
    a, b = before.lower(), after.lower()
    if a == b or abs(len(a) - len(b)) > 1 or osa_distance(before, after) != 1:
        return None
    i = first_difference(a, b)
    if len(a) == len(b):
        return "substitution" if a[i + 1 :] == b[i + 1 :] else "transposition"
    if len(a) > len(b):
        return "deletion"
    return "doubling" if i > 0 and b[i] == b[i - 1] else "insertion"


def osa_distance(before: str, after: str, limit: int = 9) -> int:
    """Optimal string alignment distance; `limit` + 1 if it is larger than `limit`."""
    return int(OSA.distance(before, after, score_cutoff=limit))
