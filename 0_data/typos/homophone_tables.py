"""Which words sound the same, from the CMU Pronouncing Dictionary: what make_homophones.py writes.

Two words are homophones if their first-listed pronunciations agree in every phoneme and stress, both are in the word
list in lower case (so no name and no British spelling), both have a Zipf frequency of at least 2.5, and neither is a
heteronym or left out by hand (word_lists.toml).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from load_json import read_text

from typos.languages import WORD_LISTS, word_set, zipf
from typos.words import OFFENSIVE_WORDS

LOWEST_ZIPF = 2.5
_CONTRACTIONS = word_set(WORD_LISTS["homophones"]["contractions"])
_LEFT_OUT = word_set(WORD_LISTS["homophones"]["left_out"])
Table = dict[str, list[str]]


def read_pronunciations(path: str | Path) -> dict[str, list[str]]:
    """Word -> its pronunciations (ARPAbet with stress digits), the first-listed first."""
    found: dict[str, list[str]] = defaultdict(list)
    for line in read_text(path, "a pronouncing dictionary").splitlines():
        word, _, phonemes = line.partition("#")[0].strip().partition(" ")
        found[re.sub(r"\(\d+\)$", "", word)].append(phonemes.strip())
    return dict(found)


def usable_words(pronunciations: Iterable[str], american: set[str]) -> list[str]:
    """Words of the pronouncing dictionary that are frequent enough and American English."""
    return [
        word
        for word in pronunciations
        if (word in _CONTRACTIONS or (word.isascii() and word.isalpha() and len(word) > 1))
        and zipf(word) >= LOWEST_ZIPF
        and word not in _LEFT_OUT | OFFENSIVE_WORDS
        and word in american
    ]


def homophone_tables(pronunciations: dict[str, list[str]], words: Iterable[str]) -> tuple[Table, Table]:
    """(word -> sure homophones, word -> words that share some other pronunciation), all in alphabetical order."""
    words = sorted(set(words))
    sure = _same_sound({word: pronunciations[word][:1] for word in words if not is_heteronym(pronunciations[word])})
    some = _same_sound({word: pronunciations[word] for word in words})
    rest = {word: [other for other in others if other not in sure.get(word, ())] for word, others in some.items()}
    return sure, {word: others for word, others in rest.items() if others}


def is_heteronym(pronunciations: list[str]) -> bool:
    """True where the stressed pronunciations differ in the vowel of the main stress, or in a last S or Z."""
    stressed = [p for p in pronunciations if "1" in p]
    return len({(re.findall(r"\w+1", p)[0], p[-2:] if p[-2:] in (" S", " Z") else "") for p in stressed}) > 1


def _same_sound(pronunciations: dict[str, list[str]]) -> Table:
    by_sound: dict[str, set[str]] = defaultdict(set)
    for word, sounds in pronunciations.items():
        for sound in sounds:
            by_sound[sound].add(word)
    alike = {
        word: set().union(*(by_sound[sound] for sound in pronunciations[word])) - {word} for word in pronunciations
    }
    return {word: sorted(others) for word, others in sorted(alike.items()) if others}
