"""Languages: letters, keyboard layout, word frequencies, function words, number words.

The tables are in 0_data/word_lists.toml. Frequencies are those of wordfreq's largest list of a language (Speer 2022).
"""

from __future__ import annotations

import math
import re
import tomllib
import unicodedata
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from command_line import UserError
from wordfreq import get_frequency_dict

DATA = Path(__file__).resolve().parents[1]
WORD_LISTS: dict[str, Any] = tomllib.loads((DATA / "word_lists.toml").read_text(encoding="utf-8"))
LANGUAGE_KEY = "_language"  # of a row; without it the row is English
ENGLISH_STYLES = frozenset({"grammar", "homonym", "real_word", "polite", "urgent", "rude"})
OWN_LETTERS = 0.25  # share of a text's letters that its language has, at least
REAL_WORD_ZIPF = 3.0
MARKS = "\u0300-\u036f"  # accents that follow their letter in Unicode's form NFD
LETTERS = rf"(?:[^\W\d_][{MARKS}]*)+"
# The three rows of letters from the top, then the row of digits if letters are on it.
KEYBOARDS = {
    "qwerty": ("qwertyuiop", "asdfghjkl", "zxcvbnm"),
    "qwertz": ("qwertzuiopü", "asdfghjklöä", "yxcvbnm", "1234567890ß"),
    "azerty": ("azertyuiop", "qsdfghjklmù", "wxcvbn", "&é\"'(-è_çà"),
    "dvorak": ("',.pyfgcrl", "aoeuidhtns", ";qjkxbmwvz"),
    "spanish": ("qwertyuiop", "asdfghjklñ", "zxcvbnm"),
    "portuguese": ("qwertyuiop", "asdfghjklç", "zxcvbnm"),
    "italian": ("qwertyuiopè", "asdfghjklòàù", "zxcvbnm", "1234567890'ì"),
    "jcuken": ("йцукенгшщзхъ", "фывапролджэ", "ячсмитьбю"),
    "greek": (";ςερτυθιοπ", "ασδφγηξκλ", "ζχψωβνμ"),
}
_ROW_PLACES = ((0.0, 0), (0.25, 1), (0.75, 2), (-0.5, -1))  # of a row's first key: keys to the right, rows down


def word_set(text: str) -> frozenset[str]:
    """The white-space separated words of `text`."""
    return frozenset(text.split())


def folded(text: str) -> str:
    """`text` as wordfreq lists it: form NFC, no capitals, `ss` for ß, σ for ς."""
    return unicodedata.normalize("NFC", text).casefold()


@dataclass(frozen=True, eq=False)
class Language:
    """A language and its tables; `keyboard` is empty if its script puts no spaces between words."""

    code: str
    name: str
    keyboard: str = ""
    more_letters: str = ""  # letters without a key of their own
    before_word: str = ""  # regular expression of what may be before a word in its piece: ¿, l'
    capital_nouns: bool = False
    function_words: str = ""
    number_words: str = ""  # * stands for any letters
    arithmetic_words: str = ""

    @cached_property
    def alphabet(self) -> frozenset[str]:
        """The small letters of the words that may be edited."""
        keys = {key for row in KEYBOARDS.get(self.keyboard, ()) for key in row if key.isalpha()}
        return frozenset({*keys, *self.more_letters})

    @cached_property
    def small_words(self) -> frozenset[str]:
        """The function words, which carry little of the content."""
        return word_set(self.function_words)

    @cached_property
    def frequencies(self) -> dict[str, float]:
        """Word -> share of all words (read on the first call, 0.2 s); empty without spaces between words."""
        return dict(get_frequency_dict(self.code, wordlist="best")) if self.keyboard else {}

    def is_number_word(self, word: str) -> bool:
        """True for a number in one word, such as `twelve`."""
        return _is_one_of(self.number_words, folded(word))

    def is_arithmetic_word(self, word: str) -> bool:
        """True for a word that decides a calculation, such as `minus`."""
        return _is_one_of(self.arithmetic_words, folded(word))

    def lacks(self, style: str, text: str = "") -> str | None:
        """Why `style` cannot be made of `text` in this language; None if it can."""
        if style in ENGLISH_STYLES and self.code != "en":
            return "it is made in English alone"
        if not self.keyboard:
            return f"{self.name} is written without spaces between words"
        letters = [sign for sign in folded(text) if sign.isalpha()]
        if sum(sign in self.alphabet for sign in letters) < OWN_LETTERS * len(letters):
            return f"it is not in the letters of {self.name}; name its language in {LANGUAGE_KEY} or with --language"
        return None


@lru_cache(maxsize=65536)
def _is_one_of(words: str, word: str) -> bool:
    return _pattern(words).fullmatch(word) is not None


@lru_cache
def _pattern(words: str) -> re.Pattern[str]:
    return re.compile("|".join(re.escape(folded(word)).replace(r"\*", r"\w*") for word in words.split()) or "(?!)")


def _languages() -> dict[str, Language]:
    lists = {name: WORD_LISTS[name] for name in ("function_words", "number_words", "arithmetic_words")}
    found = {"en": Language("en", "English", "qwerty", **lists)}
    found |= {code: Language(code, **table) for code, table in WORD_LISTS["languages"].items()}
    return found | {code: Language(code, name) for code, name in WORD_LISTS["languages_without_spaces"].items()}


LANGUAGES = _languages()
ENGLISH = LANGUAGES["en"]


def language_of(row: dict[str, Any] | None) -> Language:
    """The language that a row's `_language` names; English if it names none that is known."""
    code = (row or {}).get(LANGUAGE_KEY)
    return LANGUAGES.get(code, ENGLISH) if isinstance(code, str) else ENGLISH


def language_problem(code: Any) -> str | None:
    """Why `code` names no language; None if it does."""
    if isinstance(code, str) and code in LANGUAGES:
        return None
    return f"{repr(code)[:40]} is no known language; choose from {', '.join(sorted(LANGUAGES))}"


def zipf(word: str, language: Language = ENGLISH) -> float:
    """Zipf frequency of one word: log10 of its count per billion words, to 2 decimals; 0.0 if it is unknown."""
    share = language.frequencies.get(folded(word), 0.0)
    return round(math.log10(share) + 9, 2) if share > 0 else 0.0


def is_real_word(word: str, language: Language = ENGLISH) -> bool:
    """True for a word that readers know: Zipf frequency >= 3."""
    return zipf(word, language) >= REAL_WORD_ZIPF


@lru_cache
def key_neighbours(keyboard: str, language: Language = ENGLISH) -> dict[str, str]:
    """Letter of the language -> the letters on keys that touch its key.

    The rows of letters begin 0, 1/4 and 3/4 of a key to the right, the row of digits half a key to the left.
    """
    places = {
        key: (column + right, down)
        for keys, (right, down) in zip(KEYBOARDS[keyboard], _ROW_PLACES, strict=False)
        for column, key in enumerate(keys)
        if key in language.alphabet
    }
    return {
        key: "".join(sorted(o for o in places if o != key and math.dist(places[key], places[o]) < 1.3))
        for key in places
    }


def chosen_keyboard(keyboard: str | None, language: Language) -> str:
    """`keyboard`, or the language's own without one. Raises UserError if it has none of the language's letters."""
    if keyboard and language.keyboard and not key_neighbours(keyboard, language):
        raise UserError(f"--keyboard {keyboard}: has no letters of {language.name}; leave the flag out")
    return keyboard or language.keyboard
