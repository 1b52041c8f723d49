"""A text under reading: its numbers, the part of each in its sentence (operand, side of an equation, …), its answer."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

from maths.numerals import Number, find_numbers


@dataclass(slots=True)
class Mark:
    """A number and its part in the sentence. `joined`: the operator that ties it to the number before ('' none).
    `term`: part of what is not a number, as 5 in 5√2, (5, ∞), x > 5, 5:2, May 5 and 5 feet 2 inches."""

    number: Number
    joined: str = ""
    operand: bool = False
    left_side: bool = False
    right_side: bool = False
    aside: bool = False
    term: bool = False

    @property
    def free(self) -> bool:
        """May be an answer."""
        return not (self.operand or self.aside or self.term)


UNITS = r"(?:[ ]?[A-Za-z%°]{1,15}(?:[ ][A-Za-z]{1,15}){0,2})?"
_OPERATOR_NAMES = {
    "+": "+|plus|added to|and adding|increased by|increase by",
    "-": "-|minus|less|subtracted by|decreased by|reduced by|take away",
    "*": "*|times|multiplied by|multiply by|x|×|·",
    "/": "/|divided by|over|÷",
    "?": "^|:|subtracted from|goes into|mod",  # not calculated
}
_OPERATORS = {name: sign for sign, names in _OPERATOR_NAMES.items() for name in names.split("|")}
_OPERATOR_WORDS = "|".join(word for word in _OPERATORS if len(word) > 1)
_OPERATOR = re.compile(
    rf"[\s$)}}\]\"']{{0,4}}{UNITS}[\s$)}}\]\"']{{0,4}}(?:(?P<sign>[-+*/×÷·^])|(?P<times>(?<![A-Za-z])[xX](?![A-Za-z]))"
    rf"|\b(?P<word>{_OPERATOR_WORDS})\b)(?P<open>[\s$({{\[\"']{{0,4}})",
    re.IGNORECASE,
)
_PAIR_GAP = re.compile(r"[^.\n\d]{0,12}\s(?:and|by|from|to|with|into|&)\s[^.\n\d]{0,6}")
_PAIR_VERB = re.compile(
    r"\b(?:(?P<sum>sum|total|add|adding|put|putting|combine|combining)|(?P<product>product|multiply|multiplying)"
    r"|(?P<difference>difference)|(?P<quotient>quotient)|divide|dividing|division|subtract|subtracting|between)"
    r"\b[^.\d\n]{0,25}$",
    re.IGNORECASE,
)
_PAIR_SIGNS = {"sum": "+", "product": "*", "difference": "-", "quotient": "/"}
_EQUALS_TAIL = re.compile(
    r"(?:(?P<sign>(?<![<>!])=|≈|≅|→|⇒|[-=]>)"
    r"|\b(?:equals?|equal to|gives?|yields?|makes?|results? in|becomes|comes to)(?: us| you| me)?)"
    r"[\s=>:$({\[\"']{0,6}(?:(?:about|approximately|exactly|roughly|just|only|around|nearly)\s)?[$({\[\"']{0,3}$",
    re.IGNORECASE,
)
_EQUALS_HEAD = re.compile(rf"[\s$)}}\]]{{0,4}}{UNITS}[\s$)}}\]]{{0,4}}(?:=|≈)")
_HANGING_OPERATOR = re.compile(
    r"\s{0,3}(?:[-*×÷·+/^]|x(?![A-Za-z]))\s{0,3}(?:\Z|[=?])|\s{0,3}[*×÷·+^]\s{0,3}[A-Za-z(√π\\]"
)
_LEFT_OPERATOR = re.compile(r"[A-Za-z)\]?]\s{0,2}[*×÷·+/^]\s{0,2}[$(]?$|(?:sqrt ?\{?|√ ?)$")
_LABEL = re.compile(
    r"\b(?:step|question|problem|example|exercise|equation|figure|table|chapter|option|method|case|page)s?\s?#?\Z|(?<!#)#\Z",
    re.IGNORECASE,
)
_LIST_DOT = re.compile(r"[.)]\*{0,2}[ ]{1,3}[A-Za-z*$\\(]")


FUNCTIONS = (
    r"\\(?:log|ln|lg|exp|sin|cos|tan|cot|sec|csc|arc[a-z]+|[dtc]?frac|binom|sum|prod|int|lim|gcd|lcm|max|min|in|p?mod"
    r"|alpha|beta|gamma|delta|theta|phi|lambda|mu|sigma|omega|rho|lfloor|lceil|sqrt)(?![a-z])"
)
_TERM_AFTER = re.compile(
    rf"[ ]?(?:[π√∞±∪∩]|{FUNCTIONS})|(?:[abceinpqrtuvwyzYZ]|ab|xy|xyz)(?!\w)|[xX](?!\w|[ ]?\d)|[ ]?\*?[ ]?(?:pi|sqrt)\b"
    r"|\s?[<>≤≥≠][ ]?=?[ ]?(?:[-+]?\d|[A-Za-z]\b(?!>))|[ ]:[ ]?\d|\)?[ ]?\^|\((?=[^()\n]{0,20}[A-Za-z+*/^-])|\}[ ]?\{"
    r"|![ ]?[-+*/=$})]|[ ]?,[ ]?[-+]?∞|[ ](?:remainder|R|out[ ]of|to[ ]the[ ]power[ ]of)[ ]?\d"
)
_TERM_BEFORE = re.compile(
    rf"(?:[√π±∪∩≤≥≠][ ]?[({{]?|{FUNCTIONS}(?:_\{{?\w{{1,4}}\}}?)?[ ]?[({{]?"
    r"|\b(?:log|ln|sin|cos|tan|sqrt|pi)[ ]?[(*]?|\}[ ]?\{|∞[ ]?,[ ]?|\d[ ](?:remainder|R)[ ]"
    r"|(?:(?<![<A-Za-z/|])[A-Za-z]|\d|\))[ ]?[<>]=?[ ]?|\d[ ]:[ ]?|[\^_][{(])[-+]?\Z"
)
_TUPLE_OPENS = re.compile(r"[(\[{][ $]?[-+]?\Z")
_TUPLE_GOES_ON = re.compile(r"[ ]?[,;][ ]?(?:[-+]?[ ]?[\d∞√π(\\□]|[a-z]\b)")
_TUPLE_GAP = re.compile(r"[ )]{0,3}[,;][ (+-]{0,3}")
_COMPOUND_UNITS = (
    "h|hrs?|hours?|m|mins?|minutes?|s|secs?|seconds?|days?|weeks?|months?|years?|feet|foot|ft|'|inch(?:es)?|in|yards?"
    "|met(?:er|re)s?|cm|km|miles?|pounds?|lbs?|ounces?|oz|stone|kg|grams?|g|dollars?|cents?|euros?|pence"
)
_COMPOUND_GAP = re.compile(rf"[ -]?(?P<unit>{_COMPOUND_UNITS}),?(?:[ ]and)?[ ]?")
_COMPOUND_END = re.compile(rf"[ -]?(?P<unit>{_COMPOUND_UNITS}|\")(?![A-Za-z])")
_MONTH = (
    "(?:Jan(?:uary)?|Feb(?:ruary)?|Mar(?:ch)?|Apr(?:il)?|May|June?|July?|Aug(?:ust)?|Sept?(?:ember)?|Oct(?:ober)?"
    r"|Nov(?:ember)?|Dec(?:ember)?)\b"
)
_DATE_BEFORE = re.compile(rf"\b{_MONTH}\.? (?:\d{{1,2}}(?:st|nd|rd|th)?,? )?\Z")
_DATE_AFTER = re.compile(rf" (?:of )?{_MONTH}")


def _is_term(text: str, mark: Mark, previous: Mark | None) -> bool:
    """True for a number that is part of an expression, a tuple, a compound or a date; `previous` may become one."""
    start, end = mark.number.start, mark.number.end
    before, after = text[max(0, start - 20) : start], text[end : end + 40]
    if previous is not None and start - previous.number.end < 12:
        gap = text[previous.number.end : start]
        if previous.term and _TUPLE_GAP.fullmatch(gap):
            return True
        between, behind = _COMPOUND_GAP.fullmatch(gap), _COMPOUND_END.match(after)
        if between and behind and between["unit"].rstrip("s") != behind["unit"].rstrip("s"):
            previous.term = True
            return True
    if _TERM_BEFORE.search(before) or (_TUPLE_OPENS.search(before) and _TUPLE_GOES_ON.match(after)):
        return True
    return _TERM_AFTER.match(after) is not None or bool(_DATE_BEFORE.search(before) or _DATE_AFTER.match(after))


def mark_numbers(text: str, open_prompt: bool = False) -> list[Mark]:
    """Every number of a plain text with its part in the sentence. open_prompt: the text goes on with a sentence."""
    marks = [Mark(number) for number in find_numbers(text)]
    previous: Mark | None = None
    for mark in marks:
        begin = previous.number.end if previous else 0
        start, end = mark.number.start, mark.number.end
        before, after = text[max(begin, start - 60) : start], text[end : end + 60]
        if previous is not None and (joined := _joins(text, previous.number, start)):
            mark.joined = joined
            mark.operand = previous.operand = True
        if _HANGING_OPERATOR.match(after) or _LEFT_OPERATOR.search(before[-12:]):
            mark.operand = True
        sign = _EQUALS_TAIL.search(before)
        mark.right_side = sign is not None and (sign["sign"] is not None or (previous and previous.operand) is True)
        mark.left_side = _EQUALS_HEAD.match(after) is not None
        mark.term = _is_term(text, mark, previous)
        mark.aside = _LABEL.search(before[-14:]) is not None or _is_list_number(text, mark.number, open_prompt)
        previous = mark
    return marks


def _joins(text: str, previous: Number, start: int) -> str:
    """The operator between two numbers: + - * /, or ? for one that is not calculated; '' for none."""
    begin = previous.end
    if start - begin > 60:
        return ""
    gap = text[begin:start]
    if (previous.percent or previous.fraction) and gap.strip(" $") in ("of", "of the"):
        return "*"
    operator = _OPERATOR.fullmatch(gap)
    if operator:
        bracket = "(" in gap or ")" in gap
        word = operator["sign"] or operator["times"] or operator["word"]
        return "?" if bracket else _OPERATORS[word.lower()]
    if _PAIR_GAP.fullmatch(gap) and (verb := _PAIR_VERB.search(text[max(0, previous.start - 60) : previous.start])):
        return _PAIR_SIGNS.get(verb.lastgroup or "", "?")
    return ""


def _is_list_number(text: str, number: Number, open_prompt: bool) -> bool:
    """True for the numbers of a list (1. 2. 3. at the start of lines, with text behind them)."""
    if text[number.end : number.end + 1] not in (".", ")") or number.decimals != 0 or not 1 <= number.value <= 60:
        return False
    line_start = text.rfind("\n", max(0, number.start - 8), number.start) + 1
    if text[line_start : number.start].strip(" (*#>") or not _LIST_DOT.match(text, number.end):
        return False
    if line_start == 0 and number.start > 7:
        return False
    if number.value == 1:
        # `1. Now …` behind `6 - 5 =` is the answer, unless the list goes on.
        return not (open_prompt and number.start < 3) or _list_item(text, 2, number.end)
    # Only 1 opens a list, so that a lone `36. Each box …` stays an answer.
    return _list_item(text, int(number.value) - 1, 0, number.start)


def _list_item(text: str, value: int, start: int, stop: int | None = None) -> bool:
    item = re.compile(rf"(?:\A|\n)[ (*#>]{{0,4}}{value}[.)]")
    return item.search(text, start, len(text) if stop is None else stop) is not None


# --- the answer


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
