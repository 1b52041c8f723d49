"""One edit of one word: a letter replaced, left out or added, or two neighbours swapped.

One edit has an optimal string alignment distance of 1 (rapidfuzz).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import lru_cache

from rapidfuzz.distance import OSA

from typos.words import (
    KNOWN_WORD_ZIPF,
    OFFENSIVE_WORDS,
    PROTECTED_WORDS,
    WORD_LISTS,
    Word,
    are_homophones,
    word_frequencies,
    word_set,
    zipf,
)

TYPO_OPERATIONS = ("substitution", "transposition", "deletion", "doubling")
CLEAR_WORD_ZIPF = 4.0  # what `real_word` makes: above 3 wordfreq lists many names and slips too
SHORTEST_FUNCTION_WORD = 3
_NAMES_AND_SHORT_FORMS = word_set(WORD_LISTS["names_and_short_forms"])
_SAME_WORD = word_set(WORD_LISTS["same_word"])
_KEY_ROWS = {
    "qwerty": ("qwertyuiop", "asdfghjkl", "zxcvbnm"),
    "qwertz": ("qwertzuiop", "asdfghjkl", "yxcvbnm"),
    "azerty": ("azertyuiop", "qsdfghjklm", "wxcvbn"),
    "dvorak": ("',.pyfgcrl", "aoeuidhtns", ";qjkxbmwvz"),
}
KEYBOARDS = tuple(_KEY_ROWS)


@dataclass(frozen=True)
class Edit:
    """Replace `text[start:end]` of the clean prompt by `after`; `word` is the clean word that it hits, if any."""

    start: int
    end: int
    after: str
    operation: str
    word: Word | None = None


@lru_cache
def key_neighbours(keyboard: str) -> dict[str, str]:
    """Letter -> the letters on keys that touch its key; rows lie 0, 1/4 and 3/4 of a key to the right."""
    places = {
        key: (column + offset, row)
        for row, (keys, offset) in enumerate(zip(_KEY_ROWS[keyboard], (0.0, 0.25, 0.75), strict=True))
        for column, key in enumerate(keys)
        if key.isalpha()
    }
    return {
        key: "".join(sorted(o for o in places if o != key and math.dist(places[key], places[o]) < 1.3))
        for key in places
    }


def typo_options(word: str, operation: str, keyboard: str = "qwerty") -> list[tuple[int, str]]:
    """Every way to apply one operation to `word` (ASCII letters): (position of the first changed letter, result).

    The first letter stays, as in most real typos.
    """
    w = word.lower()
    inner = range(1, len(w))
    if operation == "substitution":
        options = [(i, w[:i] + near + w[i + 1 :]) for i in inner for near in key_neighbours(keyboard)[w[i]]]
    elif operation == "transposition":
        options = [(i, w[:i] + w[i + 1] + w[i] + w[i + 2 :]) for i in inner[:-1] if w[i] != w[i + 1]]
    elif operation == "deletion":
        options = [(i, w[:i] + w[i + 1 :]) for i in inner if w[i] != w[i - 1]]
    else:
        options = [(i + 1, w[: i + 1] + w[i:]) for i in inner if w[i] not in w[i - 1] + w[i + 1 : i + 2]]
    return [(i, word[0] + after[1:]) for i, after in options]


def one_edit_away(word: str) -> set[str]:
    """All strings of the letters a-z at optimal string alignment distance 1 from `word`."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    cuts = [(word[:i], word[i:]) for i in range(len(word) + 1)]
    away = {left + right[1:] for left, right in cuts if right}
    away |= {left + right[1] + right[0] + right[2:] for left, right in cuts if len(right) > 1}
    away |= {left + c + right[1:] for left, right in cuts if right for c in letters}
    away |= {left + c + right for left, right in cuts for c in letters}
    away.discard(word)
    return away


@lru_cache(maxsize=65536)
def is_clear_typo(clean: str, typo: str) -> bool:
    """True where readers know no word `typo`, and the likeliest word one edit away from it is `clean` (lower case)."""
    if zipf(typo) >= KNOWN_WORD_ZIPF or typo in OFFENSIVE_WORDS:
        return False
    frequencies = word_frequencies()
    expected = frequencies.get(clean, 0.0)
    return all(frequencies.get(other, 0.0) <= expected for other in one_edit_away(typo))


@lru_cache(maxsize=65536)
def real_word_options(word: str) -> list[str]:
    """Other real words one edit away from `word` (lower case), without its own forms, homophones and insults."""
    return sorted(
        other
        for other in one_edit_away(word)
        if len(other) >= SHORTEST_FUNCTION_WORD
        and zipf(other) >= CLEAR_WORD_ZIPF
        and other not in OFFENSIVE_WORDS | PROTECTED_WORDS | _NAMES_AND_SHORT_FORMS
        and not are_homophones(word, other)
        and not _is_same_word(word, other)
    )


def _is_same_word(a: str, b: str) -> bool:
    """True where two words look like forms of one: the same but for an ending, or for British and American spelling."""
    stems = [{re.sub(rf"{ending}$", "", word) for ending in _ENDINGS} for word in (a, b)]
    return bool(stems[0] & stems[1]) or _american(a) == _american(b) or f"{min(a, b)}/{max(a, b)}" in _SAME_WORD


_ENDINGS = ("", "s", "es", "d", "ed", "r", "er", "n", "en", "y", "ly", "e", "ing", "t")


def _american(word: str) -> str:
    return word.replace("our", "or").replace("is", "iz").replace("ys", "yz").replace("re", "er").replace("ll", "l")


def first_difference(before: str, after: str) -> int:
    pairs = zip(before, after, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(before), len(after)))


def in_case_of(word: str, lower: str) -> str:
    return lower[0].upper() + lower[1:] if word[0].isupper() else lower


def operation_of(before: str, after: str) -> str | None:
    """The one operation that turns `before` into `after`; None where they are not exactly one edit apart.

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
