"""Find the number that a response gives as its answer, by the first rule that applies.

boxed, marker, answer_is   marked_answers.py: the last marked answer decides, even if it is not a number
completion                 the response opens with the value; before answer_is if the prompt breaks off (`8 + 6 =`)
conclusion                 a closing sentence with So, Therefore, Thus … and one number
equals                     right of the last finished `=`
sole, last                 the only number left, or the last of several (status `ambiguous`)
"""

from __future__ import annotations

import re
from itertools import pairwise

from run_on import run_on_places, without_echo
from thinking_text import without_thinking

from maths.marked_answers import BARE_END, CORRECTION, UNIT_END, last_marked_answer, listed
from maths.numerals import digits_for_words, find_numbers, plain_text
from maths.reading import NOTHING, ParsedAnswer, Reading, mark_numbers, unreadable

MARKED_RULES = ("boxed", "marker", "answer_is", "completion")


def parse_prediction_text(text: str | None, prompt: str | None = None) -> ParsedAnswer:
    """The answer in `text`, a response without its prompt.

    prompt: the text that the model was asked to continue or answer, so that an echo of it can be told; optional.
    """
    text = without_thinking(text or "", prompt or "")
    if not text.strip():
        return NOTHING
    plain_prompt = plain_text(prompt).strip() if prompt else ""
    plain = without_echo(plain_text(text), plain_prompt)
    for cut, is_turn in run_on_places(plain, plain_prompt):
        parsed = _first_rule(plain[:cut], plain_prompt)
        if parsed.rule in MARKED_RULES or (is_turn and parsed.value is not None):
            return parsed
    return _first_rule(plain, plain_prompt)


def _first_rule(text: str, prompt: str) -> ParsedAnswer:
    if not text.strip():
        return NOTHING
    text = digits_for_words(text)
    reading = Reading(text, mark_numbers(text, _is_open(prompt)), prompt)
    marked = last_marked_answer(reading)
    completes = _is_open(prompt) and not CORRECTION.search(text)
    if completes and (marked is None or marked.rule == "answer_is"):
        line, more, _ = text.lstrip().partition("\n")
        whole = not more or line.startswith("1.")  # 1. may begin a list
        marked = _completion(reading if whole else Reading(line, mark_numbers(line, True), prompt)) or marked
    if marked is not None:
        return marked
    for rule in (_completion, _conclusion, _equals, _sole_or_last):
        parsed = rule(reading)
        if parsed is not None:
            return parsed
    return NOTHING


def _is_open(prompt: str) -> bool:
    """True for a prompt that breaks off, to be completed: `6 - 5 =`, `… the answer is`; not after `A:`."""
    return prompt[-1:] not in ("", ".", "?", "!", ":", ">")


_OPENING = re.compile(r"[\s:=*_\"'$(\[{~≈>.-]*\Z")
_ANOTHER_SUM = re.compile(r" and \d+ ?[-+*/×÷] ?\d+ ?=")  # `10 and 6 * 2 = 12` after `5 * 2 =`
_STILL_TO_COME = re.compile(r"=|answer|therefore|\bso\b|####", re.IGNORECASE)


def _completion(reading: Reading) -> ParsedAnswer | None:
    """The response opens with the value, or with the prompt's own sum and its value."""
    if not reading.marks or not _OPENING.match(reading.text[: reading.marks[0].number.start]):
        return None
    first = reading.marks[0]
    if first.operand:
        return _own_sum(reading)
    if first.term:
        return unreadable("completion", reading.text)
    if first.aside or first.left_side or reading.restates(first.number):
        return None
    if listed(reading, 0):
        return ParsedAnswer(None, "completion", "ambiguous", reading.text.strip()[:80])
    rest = reading.text[first.number.end :]
    another = reading.prompt.endswith("=") and _ANOTHER_SUM.match(rest)
    if not another and not BARE_END.match(rest) and not _ends_after_unit(rest):
        return None
    return reading.found(first.number, "completion")


def _ends_after_unit(rest: str) -> bool:
    """`8 apples.`: a unit, then nothing more about it in this paragraph."""
    match = UNIT_END.match(rest)
    if match is None:
        return False
    paragraph = rest[match.end() :].partition("\n")[0] if match["stop"] in ".!;," and match["stop"] else ""
    return not _STILL_TO_COME.search(paragraph[:400]) and not (match["stop"] == "," and re.search(r"\d", paragraph))


def _own_sum(reading: Reading) -> ParsedAnswer | None:
    """`67 + 527 = 600 - 6 = 594` as the first line, where 67 and 527 are all the numbers of the prompt."""
    wanted = sorted(number.value for number in find_numbers(reading.prompt))
    count = 1
    while count < len(reading.marks) and reading.marks[count].joined:
        count += 1
    if not wanted or sorted(mark.number.value for mark in reading.marks[:count]) != wanted:
        return None
    line_end = reading.text.find("\n", reading.marks[0].number.start)
    line_end = len(reading.text) if line_end < 0 else line_end
    in_line = [mark for mark in reading.marks if mark.number.end <= line_end]
    ends = [position for position, mark in enumerate(in_line) if mark.right_side and mark.free]
    if not ends:
        return None
    last = in_line[ends[0]]
    # The sentence must be nothing but the chain of equations.
    chain = reading.text[reading.marks[0].number.start : last.number.start]
    if re.search(r"[A-Za-z]{3,}|[.!?]\s", chain) or not re.match(
        r"[^\d\n=]{0,40}(?:[.!;,]\s|[.!]?\s*(?:\n|\Z))", reading.text[last.number.end :]
    ):
        return None
    return None if reading.restates(last.number) else reading.found(last.number, "completion")


_CONCLUDES = re.compile(
    r"(?:\A|[.!?:]\s{1,3}|\n\s{0,3})(?:\*\*)?"
    r"(?:So|Therefore|Thus|Hence|Finally|In total|Altogether|In conclusion)\b,? "
)


def _conclusion(reading: Reading) -> ParsedAnswer | None:
    """A closing `So …` sentence with one number, behind the last equation and at the end of the numbers."""
    last_sum = max((m.number.end for m in reading.marks if m.operand or m.left_side or m.right_side), default=0)
    cue = None
    for match in _CONCLUDES.finditer(reading.text, max(0, last_sum - 1)):
        cue = match
    if cue is None:
        return None
    behind = [mark for mark in reading.marks if mark.number.start >= cue.end()]
    rest = reading.text[cue.end() :]
    if len(behind) != 1 or not behind[0].free or not re.search(r"[.!]\s|[.!]\Z|\n", rest) or len(rest) > 300:
        return None
    return None if reading.copies(behind[0]) else reading.found(behind[0].number, "conclusion")


def _equals(reading: Reading) -> ParsedAnswer | None:
    values = [
        mark
        for mark in reading.marks
        if mark.right_side and (mark.free or mark.term) and not reading.restates(mark.number)
    ]
    if not values:
        return _reversed_sum(reading)
    last = values[-1].number
    if values[-1].term:
        return unreadable("equals", reading.text[last.start :])
    # A text cut off inside its last number: take the whole number that the same text gave before.
    if last.end == len(reading.text.rstrip()) and len(values) > 1:
        before, cut = (reading.text[n.start : n.end] for n in (values[-2].number, last))
        if before != cut and before.startswith(cut):
            last = values[-2].number
    return reading.found(last, "equals")


def _reversed_sum(reading: Reading) -> ParsedAnswer | None:
    """`12 = 7 + 5`: the value stands on the left."""
    for mark, following in pairwise(reading.marks):
        if mark.free and mark.left_side and following.operand and following.right_side:
            return None if reading.restates(mark.number) else reading.found(mark.number, "equals")
    return None


def _sole_or_last(reading: Reading) -> ParsedAnswer | None:
    free = [mark for mark in reading.marks if mark.free and not mark.left_side]
    if not free and len(reading.marks) == 1:
        # `1. The first …` with no other number: the 1 may open a list or be the answer.
        free = [mark for mark in reading.marks if mark.aside and not mark.operand and mark.number.start < 3]
    free = [mark for mark in free if not reading.copies(mark) and not reading.restates(mark.number)]
    if not free:
        return None
    if len({mark.number.value for mark in free}) == 1:
        return reading.found(free[-1].number, "sole")
    if sorted(mark.number.value for mark in free) == sorted(n.value for n in find_numbers(reading.prompt)):
        return None  # the problem told again
    return reading.found(free[-1].number, "last", "ambiguous")
