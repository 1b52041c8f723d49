"""Words: the lists, frequencies, homophones, and which words of a prompt can be edited.

A word is a run of ASCII letters with white space or punctuation around it. Words with digits, hyphens, apostrophes or
other marks inside are never edited. Frequencies are those of wordfreq's English list (Speer 2022).
"""

from __future__ import annotations

import json
import math
import re
import tomllib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from wordfreq import get_frequency_dict

DATA = Path(__file__).resolve().parents[1]
WORD_LISTS: dict[str, Any] = tomllib.loads((DATA / "word_lists.toml").read_text(encoding="utf-8"))


def word_set(text: str) -> frozenset[str]:
    """The white-space separated words of `text`."""
    return frozenset(text.split())


def pairs(text: str) -> dict[str, str]:
    """The white-space separated `key/value` pairs of `text`."""
    return dict(pair.split("/") for pair in text.split())


FUNCTION_WORDS = word_set(WORD_LISTS["function_words"])
NUMBER_WORDS = word_set(WORD_LISTS["number_words"])
ARITHMETIC_WORDS = word_set(WORD_LISTS["arithmetic_words"])
UNITS = word_set(WORD_LISTS["units"])
PROTECTED_WORDS = NUMBER_WORDS | ARITHMETIC_WORDS | UNITS
INSTRUCTION_VERBS = word_set(WORD_LISTS["instruction_verbs"])
OFFENSIVE_WORDS = word_set(WORD_LISTS["offensive_words"])

REAL_WORD_ZIPF = 3.0
KNOWN_WORD_ZIPF = 2.0  # rarer than this: no sure spelling to depart from, and no word that a typo could make
SHORTEST_CONTENT_WORD = 4


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
    return _ANY_WORD.findall(text)


_ANY_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")


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
def _homophone_tables() -> dict[str, dict[str, list[str]]]:
    tables = json.loads((DATA / "homophones.json").read_text(encoding="utf-8"))
    return {
        name: {word: others.split() for word, others in tables[name].items()} for name in ("homophones", "sometimes")
    }


def homophones(word: str) -> list[str]:
    """Words of another spelling and the same pronunciation as `word` (0_data/homophones.json), whatever its case."""
    return _homophone_tables()["homophones"].get(word.lower(), [])


def are_homophones(before: str, after: str) -> bool:
    """True for two spellings that sound the same in at least one pronunciation of theirs, whatever their case."""
    sometimes = _homophone_tables()["sometimes"].get(before.lower(), [])
    return after.lower() in [*homophones(before), *sometimes]
