"""A response under reading: its text, its numbers, the prompt; and what it is found to answer."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

from maths.number_roles import Mark, mark_numbers
from maths.numerals import Number, find_numbers


class ParsedAnswer(NamedTuple):
    """What a response answers. status: `parsed`; `ambiguous` (several candidates: `value` is the last, or None where
    the response lists them); `none`. `percent`: written with a per cent sign, 10 % has the value 1/10. `decimals`:
    digits after the point, None for a fraction. `ellipsis`: written with three dots."""

    value: Fraction | None
    rule: str
    status: str
    text: str = ""
    percent: bool = False
    decimals: int | None = 0
    significant: int = 0
    ellipsis: bool = False


NOTHING = ParsedAnswer(None, "none", "none")


@dataclass(slots=True)
class Reading:
    """A plain text, its numbers with their part in the sentence, and the prompt that it answers."""

    text: str
    marks: list[Mark]
    prompt: str

    def found(self, number: Number, rule: str, status: str = "parsed") -> ParsedAnswer:
        """`number` as the answer."""
        text = self.text[number.start : number.end].strip()
        precision = (number.percent, number.decimals, number.significant, number.ellipsis)
        return ParsedAnswer(number.value, rule, status, text, *precision)

    def restates(self, number: Number) -> bool:
        """697/2 after `697 ÷ 2 =` is the question, not its answer."""
        if number.power is not None:
            return any(mark.power == number.power for mark in find_numbers(self.prompt[:20_000]))
        return number.fraction is not None and number.fraction in _divisions_of(self.prompt)

    def copies(self, mark: Mark) -> bool:
        """True if the number is in the prompt too, behind the same three words (one of them may differ)."""
        words = _words_before(self.text, mark.number.start)
        contexts = _contexts_of(self.prompt).get(mark.number.value, ()) if self.prompt and len(words) == 3 else ()
        return any(sum(a == b for a, b in zip(words, context, strict=True)) >= 2 for context in contexts)


def unreadable(rule: str, text: str) -> ParsedAnswer:
    """An answer that is given, but is not a number."""
    return ParsedAnswer(None, rule, "none", text.strip()[:80])


@lru_cache(maxsize=256)
def _divisions_of(prompt: str) -> frozenset[tuple[int, int]]:
    marks = mark_numbers(prompt)
    pairs = {mark.number.fraction for mark in marks if mark.number.fraction}
    for first, second in pairwise(marks):
        one, other = first.number.value, second.number.value
        if second.joined in ("/", "?") and one.denominator == other.denominator == 1:
            pairs.add((int(one), int(other)))
    return frozenset(pairs)


def _words_before(text: str, place: int) -> list[str]:
    return re.findall(r"[^\W_]+", text[max(0, place - 60) : place].lower())[-3:]


@lru_cache(maxsize=256)
def _contexts_of(prompt: str) -> dict[Fraction, list[list[str]]]:
    contexts: dict[Fraction, list[list[str]]] = {}
    for number in find_numbers(prompt[:20_000]):
        words = _words_before(prompt, number.start)
        if len(words) == 3:
            contexts.setdefault(number.value, []).append(words)
    return contexts
