"""Read the number that a model answered out of its response, and compare it with the gold answer.

Reads   a response (the newly generated text alone), and the prompt where it is known
Writes  nothing; as a script it prints what it read as one line of JSON

    python 3_maths_eval/run_scripts/parse_predictions.py "The answer is 97, the total of 4 and 93." --gold 97

Thinking text (`<think>…</think>`, `[THINK]`, channel marks) is removed first. Thinking that never ends gives no value.
What follows an answer is cut at the first new turn (`Q:`, `Problem 2:`, a chat marker, the prompt again). Then:

    boxed       \\boxed{…}          The last marked answer decides. If it is not a number (a radical, an interval, a
    marker      #### …             list, a time, an expression), the response has no value.
    answer_is   `the answer is …`, `Answer: …`, `A: …`, `… is the answer`, `答案是…`, `Ответ: …`; a `final answer` is
                overruled by a plain one only after a correction (`wait`, `sorry`, `I made a mistake`)
    completion  the response opens with the value: `97.`, `8 apples`, or the prompt's own sum carried out. If the prompt
                breaks off (`8 + 6 =`), this rule comes before answer_is: `14 ⏎⏎ The answer is 12` is 14
    conclusion  a closing sentence with So, Therefore, Thus … and one number, behind the last equation
    equals      right of the last finished `=` (also `equals`, `gives`)
    sole        the only number that is left
    last        the last of several: status `ambiguous`

Operands of an expression (`7 * 0 =`, `9 times 400`, `the sum of 2 and 3`), terms (`2x`, `5√2`), list numbers
(`2. Multiply`), labels (`Step 3`), ordinals, dates, times and words copied from the prompt are not answers. So an echo
of the prompt has no value. Every step takes time linear in the text. Nothing is evaluated.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / place) for place in ("", "../1_utils/run_scripts")]

from command_line import make_parser, run_main
from maths.numerals import Number, digits_for_words, find_numbers, plain_text, words_of

MIN_DECIMALS = 2  # a response rounded to fewer decimals than this must be exact
MIN_SIGNIFICANT = 2


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
MARKED_RULES = ("boxed", "marker", "answer_is", "completion")


class PercentGold(Fraction):
    """A gold answer written with a per cent sign: 28 % has the value 7/25."""


def _word_set(words: str) -> frozenset[str]:
    return frozenset(words.split())


# --- public


def parse_prediction_text(text: str | None, prompt: str | None = None) -> ParsedAnswer:
    """The answer in `text`, a response without its prompt.

    prompt: the text that the model was asked to continue or answer, so that an echo of it can be told; optional.
    """
    text = without_thinking(text or "", prompt or "")
    if not text.strip():
        return NOTHING
    plain_prompt = plain_text(prompt).strip() if prompt else ""
    plain = _without_echo(plain_text(text), plain_prompt)
    quick = _first_line_completion(plain, plain_prompt)
    if quick is not None:
        return quick
    for cut, is_turn in _run_on_places(plain, plain_prompt):
        parsed = _first_rule(plain[:cut], plain_prompt)
        if parsed.rule in MARKED_RULES or (is_turn and parsed.value is not None):
            return parsed
    return _first_rule(plain, plain_prompt)


def answer_phrase(text: str, prompt: str = "") -> str:
    """What a response gives as its answer, as written, for answers that are expressions; '' if it gives none."""
    text = without_thinking(text, prompt)
    for cut, is_turn in _run_on_places(text, prompt):
        if is_turn or _ANNOUNCES.search(text, 0, cut):
            text = text[:cut]
            break
    boxes, cues = _box_run(text), list(_ANNOUNCES.finditer(text))
    if boxes and (not cues or cues[-1].start() <= boxes[-1][1]):
        return ", ".join(inner.strip() for _, _, inner in boxes)
    if cues:
        text = text[cues[-1].end() :].lstrip("*_: \n")
    elif len(text.strip()) > 80 or "\n" in text.strip():
        segments = _SEGMENT.findall(text)
        text = segments[-1] if segments else ""
    line = re.split(r"\.\s|\.?\Z|\n|, (?:which|because|since)\b| because\b", text.strip(), maxsplit=1)[0]
    return line.strip(" *_")


_ANNOUNCES = re.compile(
    r"####|(?:\A|\n)[*_ ]{0,4}A(?:ns)?[*_]{0,2}:"
    r"|\b(?:answer|result|solution)s?\b[^.\n:=$]{0,60}?(?:\b(?:is|are)\b:?|[:=])",
    re.IGNORECASE,
)
_SEGMENT = re.compile(r"\$[^$\n]{1,200}\$|\\[(\[].{1,200}?\\[)\]]")


def matches_gold(parsed: ParsedAnswer, gold: Fraction) -> bool:
    """True where the parsed value is the gold value.

    Exact as fractions. A decimal shown with d >= 2 decimals and 2 or more significant digits also matches where gold
    rounded to d decimals (half up or half even) equals it: 0.67 is 2/3, 13.33 is 40/3, but 13 or 0.7 are not. With
    three dots the digits may be cut off instead of rounded. 10 % matches 1/10 and 10, and 10 matches a gold of 10 %.
    """
    if isinstance(gold, PercentGold) and not parsed.percent:
        return matches_gold(parsed, Fraction(gold)) or matches_gold(parsed, Fraction(gold) * 100)
    if parsed.value is None:
        return False
    if parsed.value == gold or (parsed.percent and parsed.value * 100 == gold):
        return True
    if parsed.percent or parsed.decimals is None or parsed.decimals < MIN_DECIMALS:
        return False
    if parsed.significant < MIN_SIGNIFICANT:
        return False
    size, shown = abs(gold) * 10**parsed.decimals, abs(parsed.value) * 10**parsed.decimals
    if (gold < 0) != (parsed.value < 0):
        return False
    half_up = (2 * size + 1) // 2
    return shown in (half_up, round(size)) or (parsed.ellipsis and shown == size // 1)


def gold_value(answer: Any, clean_prompt: str | None = None) -> Fraction | None:
    """The gold answer as a number: from `answer` (a number or text; `#### 18` too), else from the clean prompt's own
    arithmetic (`12 * 7 =`, `the sum of 2 and 3`). None if neither holds one. A PercentGold for `28%`."""
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        return Fraction(str(answer)) if abs(answer) < float("inf") else None
    if not isinstance(answer, str) or not answer.strip():
        return arithmetic_value(clean_prompt) if clean_prompt else None
    text = gold_text(answer)
    parsed = _phrase(digits_for_words(plain_text(text)), "")
    if parsed is None and (len(text) > 60 or len(_LONG_WORDS.findall(text)) > 2):
        parsed = parse_prediction_text(text)
    if parsed is None or parsed.value is None:
        return None
    return PercentGold(parsed.value) if parsed.percent else parsed.value


_LONG_WORDS = re.compile(r"(?<!\\)\b[A-Za-z]{3,}")


def gold_text(answer: str) -> str:
    """What a gold answer in words gives as the answer: all of it, or what follows its last ####."""
    return answer.rpartition("####")[2].strip() or answer.strip()


class Gold(NamedTuple):
    """A gold answer: a number, or an expression that is not one; both None if it is neither. `text`: as written."""

    number: Fraction | None
    expression: str | None
    text: str | None

    @property
    def readable(self) -> bool:
        return self.number is not None or self.expression is not None


def read_gold(answer: Any, clean_prompt: str | None = None) -> Gold:
    """The gold answer of a row of a prompt file, see `gold_value`."""
    number = gold_value(answer, clean_prompt)
    text = gold_text(answer) if isinstance(answer, str) and answer.strip() else None
    if number is not None or text is None:
        return Gold(number, None, text)
    from maths.maths_symbolic import expression_of_gold

    return Gold(None, expression_of_gold(text), text)


def judge(response: str | None, prompt: str | None, gold: Gold) -> tuple[ParsedAnswer, bool | None]:
    """What a response answers, and whether that is right; None without a readable gold answer.

    An expression has the rule `symbolic` and no value; it may also be the answer to a gold number (`5!` for 120).
    """
    parsed = parse_prediction_text(response, prompt)
    if gold.number is not None and (parsed.value is not None or parsed.rule not in MARKED_RULES):
        return parsed, matches_gold(parsed, gold.number)
    wanted = gold.expression or gold.text or number_text(gold.number)
    if wanted is None or not gold.readable:
        return parsed, None
    from maths.maths_symbolic import answer_expression, same_expression

    answer = answer_expression(response, prompt)
    if answer is None:
        return parsed._replace(value=None, status="none"), False
    return ParsedAnswer(None, "symbolic", "parsed", answer), same_expression(wanted, answer)


def number_text(value: Fraction | None) -> str | None:
    """A number as people write it: 12, 0.75; 1/3 where no decimal is exact."""
    if value is None or value.denominator == 1:
        return None if value is None else str(value.numerator)
    scale = next((d for d in range(1, 13) if 10**d % value.denominator == 0), None)
    if scale is None:
        return f"{value.numerator}/{value.denominator}"
    digits = str(abs(value.numerator) * 10**scale // value.denominator).rjust(scale + 1, "0")
    return f"{'-' if value < 0 else ''}{digits[:-scale]}.{digits[-scale:]}"


@lru_cache(maxsize=4096)
def arithmetic_value(prompt: str) -> Fraction | None:
    """The value of the last sum in a prompt, by the usual precedence; None where there is none or it has brackets."""
    text = plain_text(prompt)
    marks = _marks(text)
    chain: list[Mark] = []
    operators: list[str] = []
    for mark in marks:
        if mark.joined and chain:
            operators.append(mark.joined)
        else:
            chain, operators = [], []
        chain.append(mark)
    last = marks[-1].number if marks else None
    if len(chain) == 1 and last is not None and last.fraction and re.match(r"\s*=", text[last.end :]):
        return last.value
    return _calculate([mark.number.value for mark in chain], operators) if operators else None


def _calculate(values: list[Fraction], operators: list[str]) -> Fraction | None:
    terms, signs = [values[0]], []
    for operator, value in zip(operators, values[1:], strict=True):
        if operator == "*":
            terms[-1] *= value
        elif operator == "/":
            if value == 0:
                return None
            terms[-1] /= value
        elif operator in "+-":
            terms.append(value)
            signs.append(1 if operator == "+" else -1)
        else:
            return None
    return terms[0] + sum(sign * term for sign, term in zip(signs, terms[1:], strict=True))


# --- the numbers in their context


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


_UNITS = r"(?:[ ]?[A-Za-z%°]{1,15}(?:[ ][A-Za-z]{1,15}){0,2})?"
_OPERATORS = {
    "plus": "+", "added to": "+", "and adding": "+", "increased by": "+", "increase by": "+", "minus": "-", "less": "-",
    "subtracted by": "-", "decreased by": "-", "reduced by": "-", "take away": "-", "times": "*", "multiplied by": "*",
    "multiply by": "*", "x": "*", "X": "*", "×": "*", "·": "*", "*": "*", "divided by": "/", "over": "/", "÷": "/",
    "/": "/", ":": "?", "+": "+", "-": "-", "^": "?", "subtracted from": "?", "goes into": "?", "mod": "?",
}  # fmt: skip
_OPERATOR_WORDS = "|".join(word for word in _OPERATORS if len(word) > 1)
_OPERATOR = re.compile(
    rf"[\s$)}}\]\"']{{0,4}}{_UNITS}[\s$)}}\]\"']{{0,4}}(?:(?P<sign>[-+*/×÷·^])|(?P<times>(?<![A-Za-z])[xX](?![A-Za-z]))"
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
_EQUALS_HEAD = re.compile(rf"[\s$)}}\]]{{0,4}}{_UNITS}[\s$)}}\]]{{0,4}}(?:=|≈)")
_HANGING_OPERATOR = re.compile(
    r"\s{0,3}(?:[-*×÷·+/^]|x(?![A-Za-z]))\s{0,3}(?:\Z|[=?])|\s{0,3}[*×÷·+^]\s{0,3}[A-Za-z(√π\\]"
)
_LEFT_OPERATOR = re.compile(r"[A-Za-z)\]?]\s{0,2}[*×÷·+/^]\s{0,2}[$(]?$|(?:sqrt ?\{?|√ ?)$")
_LABEL = re.compile(
    r"\b(?:step|question|problem|example|exercise|equation|figure|table|chapter|option|method|case|page)s?\s?#?\Z|(?<!#)#\Z",
    re.IGNORECASE,
)
_LIST_DOT = re.compile(r"[.)]\*{0,2}[ ]{1,3}[A-Za-z*$\\(]")


_FUNCTIONS = (
    r"\\(?:log|ln|lg|exp|sin|cos|tan|cot|sec|csc|arc[a-z]+|[dtc]?frac|binom|sum|prod|int|lim|gcd|lcm|max|min|in|p?mod"
    r"|alpha|beta|gamma|delta|theta|phi|lambda|mu|sigma|omega|rho|lfloor|lceil|sqrt)(?![a-z])"
)
_TERM_AFTER = re.compile(
    rf"[ ]?(?:[π√∞±∪∩]|{_FUNCTIONS})|(?:[abceinpqrtuvwyzYZ]|ab|xy|xyz)(?!\w)|[xX](?!\w|[ ]?\d)|[ ]?\*?[ ]?(?:pi|sqrt)\b"
    r"|\s?[<>≤≥≠][ ]?=?[ ]?(?:[-+]?\d|[A-Za-z]\b(?!>))|[ ]:[ ]?\d|\)?[ ]?\^|\((?=[^()\n]{0,20}[A-Za-z+*/^-])|\}[ ]?\{"
    r"|![ ]?[-+*/=$})]|[ ]?,[ ]?[-+]?∞|[ ](?:remainder|R|out[ ]of|to[ ]the[ ]power[ ]of)[ ]?\d"
)
_TERM_BEFORE = re.compile(
    rf"(?:[√π±∪∩≤≥≠][ ]?[({{]?|{_FUNCTIONS}(?:_\{{?\w{{1,4}}\}}?)?[ ]?[({{]?"
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


_EQUALS_SIGNS = re.compile(r"[=≈≅→⇒]|->")
_EQUALS_WORDS = _word_set("equal equals give gives yield yields make makes result results become becomes comes")
_OPERATOR_SIGNS = re.compile(r"[-+*/×÷·^√?%]")
_PAIR_WORDS = (
    "sum total add adding put putting combine combining product multiply multiplying difference quotient divide "
    "dividing division subtract subtracting between sqrt"
)
_JOINING_WORDS = frozenset(" ".join([*_OPERATORS, _PAIR_WORDS]).lower().split(" "))


def _marks(text: str, open_prompt: bool = False) -> list[Mark]:
    """Every number of a plain text with its part in the sentence. open_prompt: the text goes on with a sentence."""
    marks = [Mark(number) for number in find_numbers(text)]
    if not marks:
        return marks
    words = words_of(text)
    equals = not words.isdisjoint(_EQUALS_WORDS) or _EQUALS_SIGNS.search(text) is not None
    operators = not words.isdisjoint(_JOINING_WORDS) or _OPERATOR_SIGNS.search(text) is not None
    previous: Mark | None = None
    for mark in marks:
        begin = previous.number.end if previous else 0
        start, end = mark.number.start, mark.number.end
        before, after = text[max(begin, start - 60) : start], text[end : end + 60]
        if operators:
            if previous is not None and (joined := _joins(text, previous.number, start)):
                mark.joined = joined
                mark.operand = previous.operand = True
            if _HANGING_OPERATOR.match(after) or _LEFT_OPERATOR.search(before[-12:]):
                mark.operand = True
        if equals:
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


# --- echoes and run-on text


def _without_echo(text: str, prompt: str) -> str:
    """`text` without copies of the prompt at its start, also where the copy mends or makes a few typos."""
    for _ in range(3):
        head = text.lstrip(" \n\"'>*:")
        if len(prompt) < 4 or not head:
            return text
        if head[: len(prompt)].lower() == prompt.lower():
            text = head[len(prompt) :]
            continue
        cut = _similar_head(head, prompt)
        if not cut:
            return text
        text = head[cut:]
    return text


def _similar_head(text: str, prompt: str, least: float = 90.0) -> int:
    """Where a near copy of `prompt` at the start of `text` ends; 0 where there is none."""
    from rapidfuzz import fuzz

    if len(prompt) > 4000 or len(prompt) < 16 or fuzz.ratio(text[:16].lower(), prompt[:16].lower()) < 60:
        return 0
    # An answer that stands before a copy of the prompt is no part of the copy.
    if text[0].isdigit() != prompt[0].isdigit():
        return 0
    wanted, low = prompt.lower(), max(1, len(prompt) - 12)
    ends = [m.end() for m in re.finditer(r"\S+", text[: len(prompt) + 12]) if m.end() >= low]
    if not ends or fuzz.ratio(text[: ends[0]].lower(), wanted) < least - 10:
        return 0
    score, end = max((fuzz.ratio(text[:end].lower(), wanted), end) for end in ends)
    return end if score >= least else 0


_THOUGHT = r"[\w:]{0,16}(?:think|thought|reason|reflection|scratchpad|analysis|monologue|cot)\w{0,12}"
_THINKING_TAG = re.compile(
    rf"(?P<close></{_THOUGHT}>|\[/think(?:ing)?\]|<\|/think\|>|<\|end_(?:of_)?think(?:ing)?\|>|<\|end_of_thought\|>"
    rf"|◁/think▷|<channel\|>|<unused95>)|<{_THOUGHT}(?: [^<>]{{0,40}})?>|\[think(?:ing)?\]|<\|think\|>"
    r"|<\|(?:start|begin)_(?:of_)?think(?:ing)?\|>|<\|begin_of_thought\|>|◁think▷|<\|channel>|<unused94>",
    re.IGNORECASE,
)
_FINAL_CHANNEL = re.compile(r"<\|channel\|>final\b[^<>]{0,40}<\|message\|>|(?:\A|(?<=[^\w\s]))assistantfinal(?=\S)")
_ANALYSIS = re.compile(r"\s*(?:(?:<\|start\|>)?assistant)?(?:<\|channel\|>(?:analysis|commentary)|analysis(?=[A-Z]))")
_ANSWER_TAG = re.compile(r"<answer>|\[ANSWER\]")


def without_thinking(text: str, prompt: str = "") -> str:
    """`text` without thinking text, whose opening may be the prompt's end; empty if the thinking never ends."""
    channels = list(_FINAL_CHANNEL.finditer(text))
    if channels:
        return text[channels[-1].end() :]
    if _ANALYSIS.match(text):
        return ""
    opened = [match for match in _THINKING_TAG.finditer(prompt[-200:]) if not prompt[-200:][match.end() :].strip()]
    thinking = bool(opened) and not opened[-1]["close"]
    kept: list[str] = []
    start = 0
    for tag in _THINKING_TAG.finditer(text) if thinking or "<" in text or "[" in text or "◁" in text else ():
        if tag["close"]:
            kept = kept if thinking else []  # opened in the prompt: all before belongs to it
            thinking = False
        elif not thinking:
            kept.append(text[start : tag.start()])
            thinking = True
        start = tag.end()
    return "" if thinking else _ANSWER_TAG.sub("\nAnswer: ", " ".join([*kept, text[start:]]))


_TURN = re.compile(
    r"(?P<turn><\|[\w ]{1,30}\|>|</?s>|<eos>|<pad>|<(?:start|end)_of_turn>|\[/?INST\]"
    r"|(?:\A|\n)[ ]{0,4}(?:#{1,4} ?|\*\*)?(?:Q|Question|User|Human)(?: ?#?\d{1,4})?(?:\*\*)? ?[:.)]"
    r"|\n\s{0,9}\n[ ]{0,4}(?:#{1,4} ?|\*\*)?(?:Problem|Exercise|Example) ?#?\d{1,4}(?:\*\*)? ?[:.)])"
    r"|(?:\A|\n)[ ]{0,4}(?:#{1,4} ?|\*\*)?(?:Problem|Exercise|Example|Student|Instruction|Input|Prompt|Task)"
    r"(?: ?#?\d{1,4})?(?:\*\*)? ?[:.)]"
    r"|\n[ ]{0,4}(?:What(?: is|'s)|How (?:many|much)|Calculate|Solve|Compute)\b[^\n\d]{0,80}\d"
    r"|\b(?:\d{1,3}|one|some|a few) more (?:examples?|problems?|questions?|exercises?)\b"
    r"|\b(?:another|next) (?:example|problem|question|exercise)\b",
    re.IGNORECASE,
)
_TURN_WORDS = _word_set(
    "q question questions problem problems exercise exercises example examples user human student instruction input "
    "prompt task inst s eos pad turn what how calculate solve compute"
)


def _run_on_places(text: str, prompt: str) -> list[tuple[int, bool]]:
    """Where another turn or problem may begin, from left to right, at most five. True: surely another turn; False:
    words that a solution may use too, so that only a marked answer before them is final."""
    places: list[tuple[int, bool]] = []
    if "<|" in text or not _TURN_WORDS.isdisjoint(words_of(text)):
        for match in _TURN.finditer(text):
            if match.start() > 0:
                places.append((match.start(), match["turn"] is not None))
            if len(places) == 4:
                break
    if len(prompt) >= 12:
        # The prompt again, perhaps with other numbers; its first words alone also begin the sentences of a solution.
        start = re.escape(re.sub(r"\d+", "0", prompt[:60])).replace("0", r"\d{1,20}")
        again = re.search(rf"\n\s{{0,9}}{start}", text)
        places += [(again.start(), False)] if again and again.start() > 0 else []
    return sorted(places)


# --- the rules, in their order


@dataclass(slots=True)
class _Reading:
    text: str
    marks: list[Mark]
    prompt: str


def _first_rule(text: str, prompt: str) -> ParsedAnswer:
    if not text.strip():
        return NOTHING
    text = digits_for_words(text)
    reading = _Reading(text, _marks(text, _is_open(prompt)), prompt)
    marked = _last_marked(reading)
    completes = _is_open(prompt) and not _CORRECTION.search(text)
    if completes and (marked is None or marked.rule == "answer_is"):
        marked = _completion(reading) or marked
    if marked is not None:
        return marked
    for rule in (_completion, _conclusion, _equals, _sole_or_last):
        parsed = rule(reading)
        if parsed is not None:
            return parsed
    return NOTHING


def _first_line_completion(text: str, prompt: str) -> ParsedAnswer | None:
    """The completion rule on the first line alone, which is all it looks at: most responses need no more."""
    if not _is_open(prompt) or "boxed" in text or "fbox" in text or "####" in text or _CORRECTION.search(text):
        return None
    line = text.lstrip().partition("\n")[0]
    if not line[:40].strip() or len(line) > 400 or not re.match(r"[^A-Za-z]{0,6}[\d.]", line) or "1." in line[:6]:
        return None
    parsed = _completion(_Reading(line, _marks(line, True), prompt))
    return parsed if parsed is not None and parsed.value is not None else None


_CORRECTION = re.compile(
    r"\b(?:wait|oops|sorry|correction|correcting|corrected|mistake|mistaken|apologi[sz]e|my bad|re-?check(?:ing)?"
    r"|hold on|scratch that|(?:is|was|that's) wrong|incorrect|instead)\b",
    re.IGNORECASE,
)


def _is_open(prompt: str) -> bool:
    """True for a prompt that breaks off, to be completed: `6 - 5 =`, `… the answer is`; not after `A:`."""
    return prompt[-1:] not in ("", ".", "?", "!", ":", ">")


def _found(text: str, number: Number, rule: str, status: str = "parsed") -> ParsedAnswer:
    return ParsedAnswer(
        value=number.value,
        rule=rule,
        status=status,
        text=text[number.start : number.end].strip(),
        percent=number.percent,
        decimals=number.decimals,
        significant=number.significant,
        ellipsis=number.ellipsis,
    )


def _unreadable(rule: str, text: str) -> ParsedAnswer:
    """An answer that is given, but is not a number."""
    return ParsedAnswer(None, rule, "none", text.strip()[:80])


def _last_marked(reading: _Reading) -> ParsedAnswer | None:
    """The last answer that is marked as one: boxed, behind ####, or announced in words."""
    found = [*_markers(reading), *_announcements(reading)]
    if boxes := _boxes(reading):
        start, end, parsed = boxes
        found = [entry for entry in found if not start <= entry[0] < end] + [(start, False, parsed)]
    if not found:
        return None
    found.sort(key=lambda entry: entry[0])
    finals = [entry for entry in found if entry[1]]
    last = found[-1]
    if finals and last[2].rule == "answer_is" and not _CORRECTION.search(reading.text, finals[-1][0], last[0]):
        last = finals[-1]
    return _corrected(reading, last[0]) or last[2]


_TAKES_BACK = re.compile(
    r"\b(?:wait|oops|hold on|scratch that|correction|no)[,:!]| no wait|\bI (?:made|forgot|missed|meant)\b"
    r"|\bmy mistake\b|[.!?\n]\s{0,3}(?:actually|wait|oops|hold on)\b",
    re.IGNORECASE,
)
_SAYS = re.compile(r"(?:\b(?:is|be|been|it's|meant|to|get|no)|[:=])[\s$*]{0,4}\Z", re.IGNORECASE)


def _corrected(reading: _Reading, start: int) -> ParsedAnswer | None:
    """The value that takes an answer back (`… is 12. Wait, it is 13.`); unreadable if it is not clear which."""
    place = _TAKES_BACK.search(reading.text, start)
    behind = [mark for mark in reading.marks if place and mark.number.start > place.start() and mark.free]
    said = [mark for mark in behind if mark.right_side] or [
        mark for mark in behind if _SAYS.search(reading.text[max(0, mark.number.start - 16) : mark.number.start])
    ]
    if said:
        return _found(reading.text, said[-1].number, "answer_is")
    return _unreadable("answer_is", reading.text[behind[0].number.start :]) if behind else None


_BOX = re.compile(r"\\(?:boxed|fbox) ?")
_BOX_GAP = re.compile(r"[\s$,;]{0,9}(?:and|or|\{ ?(?:and|or) ?\})?[\s$]{0,4}")


def _box_run(text: str) -> list[tuple[int, int, str]]:
    """(start, end, content) of the last box that has content, and of those that it follows as in `3, 5 and 7`."""
    spans: list[tuple[int, int, str]] = []
    for match in list(_BOX.finditer(text))[-8:]:
        if text[match.end() : match.end() + 1] == "{":
            inner = _in_braces(text, match.end())
            spans.append((match.start(), match.end() + len(inner) + 2, inner))
        else:
            inner = text[match.end() : match.end() + 40].partition("\n")[0].rstrip(" .$")
            spans.append((match.start(), match.end() + len(inner), inner))
    spans = [span for span in spans if span[2].strip()]
    first = len(spans) - 1
    while first > 0 and _BOX_GAP.fullmatch(text[spans[first - 1][1] : spans[first][0]]):
        first -= 1
    return spans[max(first, 0) :]


def _boxes(reading: _Reading) -> tuple[int, int, ParsedAnswer] | None:
    spans = _box_run(reading.text)
    if not spans:
        return None
    start, end = spans[0][0], spans[-1][1]
    answers = {_phrase(inner, reading.prompt) for _, _, inner in spans}
    if len({answer and answer.value for answer in answers}) == 1 and (answer := answers.pop()) is not None:
        return start, end, answer._replace(rule="boxed")
    return start, end, _unreadable("boxed", reading.text[start:end])


_SEVERAL = re.compile(r"[,;]|\b(?:or|and)\b")
_ALGEBRA = re.compile(r"[A-Za-z)] ?[-+*/^] ?[\d(]|\d ?[-+*/] ?[A-Za-z(\\]")
_UNIT_POWER = re.compile(r"\b(?:[a-z]?m|ft|in|yd|mi|units?|inch(?:es)?|feet)\^[23]\b")
_CALL = re.compile(r"\b[a-z]\([-\d, ]{1,20}\)")


def _phrase(text: str, prompt: str) -> ParsedAnswer | None:
    """The number that a short text such as `12 apples`, `x = 5` or `7 + 5 = 12` gives; None if it is not one number."""
    marks = _marks(text)
    if not marks or re.search(r"[±□∪∩≤≥≠]|\d!\s*\Z|[∞π√]\W*\Z", text) or re.search(r"\d:\d", text):
        return None
    free = [mark for mark in marks if mark.free]
    right = [mark for mark in free if mark.right_side]
    if right:
        several = len({mark.number.value for mark in right}) > 1 and bool(_SEVERAL.search(text))
        left = _CALL.sub("", text[: right[-1].number.start])
        several |= bool(re.search(r"(?<![A-Za-z\\])[a-z](?![A-Za-z])", left) and re.search(r"\d|[-+*/^|]", left))
        chosen = right[-1] if right[-1] is marks[-1] and not several else None
    else:
        whole = len(free) == len(marks) and len({mark.number.value for mark in free}) == 1
        chosen = free[-1] if whole and not _ALGEBRA.search(_UNIT_POWER.sub("", text)) else None
    if chosen is None or _restates(chosen.number, prompt):
        return None
    return _found(text, chosen.number, "phrase")


def _in_braces(text: str, opened: int, limit: int = 300) -> str:
    depth = 0
    for position in range(opened, min(len(text), opened + limit)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[opened + 1 : position]
    return text[opened + 1 : opened + limit]


_AFTER_MARKER = re.compile(r"####[\s$:*]{0,8}")
_Marked = tuple[int, bool, ParsedAnswer]  # where it stands, whether it is called final, what it is


def _markers(reading: _Reading) -> Iterator[_Marked]:
    text = reading.text
    for match in _AFTER_MARKER.finditer(text):  # a heading (#### Step 1) announces no number
        line_end = text.find("\n", match.end())
        line_end = len(text) if line_end < 0 else line_end
        line = text[match.end() : min(line_end, match.end() + 80)]
        announced = _announced(reading, match.end(), match.end() + len(line)) if not _HEADING.match(line) else None
        if announced is not None:
            number = announced.number
            yield (
                announced.start,
                False,
                _unreadable("marker", line) if number is None else _found(text, number, "marker"),
            )
        elif line.strip() and not re.search(r"\d", line) and not text[line_end:].strip():
            yield match.start(), False, _unreadable("marker", line)


_HEADING = re.compile(r"(?!x\b)[A-Za-z]")
_OPENING = re.compile(r"[\s:=*_\"'$(\[{~≈>.-]*\Z")
_BARE_END = re.compile(
    r"[\"'*_)\]$}]{0,4}(?:\s*\Z|[ ]*\n|[ ]*[.!;:?,](?=[\s\"'*)$}]|\Z)|[ ]*\(|[ ]-+[ ][a-z]"
    r"|[ ](?:because|since|which|so)\b|[ ]is[ ](?:the|your|our|what|how)\b)"
)
_UNIT_END = re.compile(
    r"(?:[ ]?(?:[^\W\d_]|[°%/'€-]){1,20})(?:[ ](?:[^\W\d_]|[°%/'-]){1,20}){0,3}[ ]?(?P<stop>[.!;,]|\n|\Z)"
)
_STILL_TO_COME = re.compile(r"=|answer|therefore|\bso\b|####", re.IGNORECASE)
_LIST_GAP = re.compile(
    r"(?:[ ]?[,;][ ]?(?:or[ ]|and[ ])?|(?:[ ][A-Za-z]{1,15})?[ ](?:or|and|to|&)[ ])(?:[a-z][ ]?=[ ]?)?"
)


def _completion(reading: _Reading) -> ParsedAnswer | None:
    """The response opens with the value, or with the prompt's own sum and its value."""
    if not reading.marks or not _OPENING.match(reading.text[: reading.marks[0].number.start]):
        return None
    first = reading.marks[0]
    if first.operand:
        return _own_sum(reading)
    if first.term:
        return _unreadable("completion", reading.text)
    if first.aside or first.left_side or _restates(first.number, reading.prompt):
        return None
    if _listed(reading, 0):
        return ParsedAnswer(None, "completion", "ambiguous", reading.text.strip()[:80])
    rest = reading.text[first.number.end :]
    if not _BARE_END.match(rest) and not _ends_after_unit(rest):
        return None
    return _found(reading.text, first.number, "completion")


def _ends_after_unit(rest: str) -> bool:
    """`8 apples.`: a unit, then nothing more about it in this paragraph."""
    match = _UNIT_END.match(rest)
    if match is None:
        return False
    paragraph = rest[match.end() :].partition("\n")[0] if match["stop"] in ".!;," and match["stop"] else ""
    return not _STILL_TO_COME.search(paragraph[:400]) and not (match["stop"] == "," and re.search(r"\d", paragraph))


def _listed(reading: _Reading, position: int) -> bool:
    """`12, 13`, `2, 3 and 5` or `8 or 9`: several answers, none of them chosen."""
    marks, last = reading.marks, position
    while last + 1 < len(marks) and last < position + 20 and marks[last + 1].free and not marks[last + 1].left_side:
        if not _LIST_GAP.fullmatch(reading.text[marks[last].number.end : marks[last + 1].number.start]):
            break
        last += 1
    rest = reading.text[marks[last].number.end : marks[last].number.end + 100]
    if last == position or not (_BARE_END.match(rest) or _UNIT_END.match(rest)):
        return False
    return len({mark.number.value for mark in marks[position : last + 1]}) > 1


def _own_sum(reading: _Reading) -> ParsedAnswer | None:
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
    return None if _restates(last.number, reading.prompt) else _found(reading.text, last.number, "completion")


# "answer" in other languages; the second group is written without spaces around it
_OTHER_CUES = (
    "réponse|reponse|résultat|respuesta|resultado|resposta|risposta|risultato|antwort|lösung|ergebnis|antwoord|svar|svaret"
    "|vastaus|odpowied[źz]|wynik|odpověď|odpoveď|válasz|răspuns|răspunsul|cevap|yanıt|jawaban|jawabannya|đáp án|đáp số"
    "|kết quả|jibu|jawabu|ответ|відповідь|отговор|одговор|απάντηση|תשובה|الجواب|الإجابة|النتيجة|جواب|پاسخ|उत्तर|উত্তর"
)
_JOINED_CUES = "答案|答え|答(?=:)|结果|結果|정답|답|คำตอบ|సమాధానం"
_OTHER_IS = (
    r"\b(?:est|ist|es|é|è|jest|to|är|er|on|adalah|là|ni|הוא|היא|هو|هي|होगा|है|হল|হলো|είναι|است)\b"
    r"|[:=→—]|是|为|為|は|은|는|คือ"
)
_CUE = re.compile(
    r"(?P<final>\bfinal )?(?:\b(?:answers?|result|solutions?)\b"
    rf"|(?P<other>\b(?:{_OTHER_CUES})\b|(?:{_JOINED_CUES}))"
    r"|(?:\A|\n)[*#_ ]{0,4}(?P<label>A|Ans|(?P<weak>Output|Total))(?=[*_ ]{0,3}:))",
    re.IGNORECASE,
)
_IS = re.compile(r"\b(?:is|was|are|be|equals|becomes)\b|[:=→]|comes to", re.IGNORECASE)
_IS_ELSEWHERE = re.compile(_OTHER_IS, re.IGNORECASE)
_INSTRUCTION = re.compile(
    r"\b(?:express|giv|writ|round|check|verify|simplify|submit|stat|report|format|enter|provid|convert"
    r"|find|comput|calculat|determin|obtain|solv)(?:e|es|ing)?"
    r" (?:(?:the|your|our|my|this|that) )?\Z",
    re.IGNORECASE,
)
_IS_THE_ANSWER = re.compile(
    r"[\"'*_)\]$}]{0,3}(?:,? (?:which|that|this))? (?:is|was) (?:indeed )?(?:the|your|my|our)"
    r" (?:[a-z]{1,12} )?(?:answer|result|solution)\b",
    re.IGNORECASE,
)
_CUE_WORDS = _word_set(
    "answer answers result solution solutions a ans output total respuesta resultado resposta risposta risultato "
    "antwort ergebnis antwoord svar svaret vastaus wynik cevap jawaban jawabannya jibu jawabu reponse"
)
_NEGATION = re.compile(r"\b(?:not|never|no longer|isn't|wasn't)\b", re.IGNORECASE)
CUE_WINDOW = 200


_GROUPED = re.compile(r"\D*[1-9]\d{0,2}\.\d{3}")


def _announcements(reading: _Reading) -> Iterator[_Marked]:
    """`The answer is …`, `A: …`, `… is the answer`; `Total: …` only if it comes last and nothing else is marked."""
    text, found = reading.text, False
    if _CUE_WORDS.isdisjoint(words_of(text)) and text.isascii():
        return
    weak: _Marked | None = None
    cues = list(_CUE.finditer(text))
    for position, cue in enumerate(cues):
        stop = cues[position + 1].start() if position + 1 < len(cues) else len(text)
        announced = _after_cue(reading, cue, min(stop, cue.end() + CUE_WINDOW))
        if announced is not None:
            number = announced.number
            answer = _unreadable("answer_is", text[announced.start : announced.start + 80])
            if number is not None:
                answer = _found(text, number, "answer_is")
                if cue["other"] and number.decimals == 3 and _GROUPED.fullmatch(answer.text):  # 1.250 is not 1 1/4
                    answer = answer._replace(value=number.value * 1000, decimals=0)
            entry = (announced.start, cue["final"] is not None, answer)
            if cue["weak"]:
                weak = entry
            else:
                found = True
                yield entry
    for mark in reading.marks:
        if mark.free and not _mark_restates(reading, mark) and _IS_THE_ANSWER.match(text, mark.number.end):
            found = True
            yield mark.number.start, False, _found(text, mark.number, "answer_is")
    if weak and not found and not any(mark.right_side and mark.number.start > weak[0] for mark in reading.marks):
        yield weak


def _after_cue(reading: _Reading, cue: re.Match[str], stop: int) -> _Announced | None:
    """The value announced by one `answer`: behind the first `is` or `:` of its sentence that a value follows."""
    text = reading.text
    if _INSTRUCTION.search(text[max(0, cue.start() - 24) : cue.start()]):
        return None
    for verb in (_IS_ELSEWHERE if cue["other"] else _IS).finditer(text, cue.end(), stop):
        between = text[cue.end() : verb.start()]
        if re.search(r"[.!?]\s|\n\s*\n", between) or _NEGATION.search(between):
            return None
        announced = _announced(reading, verb.end(), stop)
        if announced is not None:
            return announced
        if cue["label"] or verb.group()[:1] == ":":
            return None
    return None


_PLAIN_WORDS = re.compile(r"[^\d\n.!?;=]{0,60}\Z")
_DETOUR = re.compile(
    r"\A to |\b(?:less|more|greater|smaller|fewer|higher|lower|than|because|since|between|reasonable|correct|rounded"
    r"|nearest|multiple|divisible|within|least|most|form|sense|consistent|closer?|step|first|if|when|for|cannot)\b",
    re.IGNORECASE,
)
_SYMBOLIC = re.compile(
    rf"[\s*_:$(\"'`~≈=\[{{>-]{{0,12}}(?:[√π±∞□]|{_FUNCTIONS}|[A-Za-z] ?(?:[<>≤≥∈^]|\\in\b)|[a-z] ?[-+*/^] ?[\da-z(]\b)"
)
_NO_NUMBER = re.compile(
    r"[\s*_:$\"'\[{]{0,9}(?:none|undefined|impossible|unknown|infinit[ey]|infinity|indeterminate|DNE"
    r"|no\b(?! more| less)|yes\b|cannot|can't)(?![^.\n]{0,60}\d)",
    re.IGNORECASE,
)
_VARIABLE = re.compile(r"\d[a-z]\b ?[-+*/=]")
_BOUND = re.compile(
    r"[\s*$]{0,4}(?:(?<![-=])[<>≤≥]|(?:between|at (?:least|most)"
    r"|(?:less|more|greater|fewer|higher|lower|smaller) than)\b)"
    r"[^\d\n.]{0,12}\d"
)
_DIRECT_DIGIT = re.compile(r"[\s*_:$(\"'`~≈=\[{>+-]{0,12}\d")


class _Announced(NamedTuple):
    """Where an announced value begins, and the number; None if it is not a number."""

    start: int
    number: Number | None


_GOES_ON = re.compile(
    r"[\s)\]}$,]{0,3}(?:(?:which|that|it|and it)\s+)?(?:is|equals|gives|makes|comes to)\s", re.IGNORECASE
)


def _announced(reading: _Reading, start: int, stop: int) -> _Announced | None:
    """The value that begins at `start`: a number, or what the expression there is said to equal."""
    marks = reading.marks
    position = _first_from(marks, start)
    if _BOUND.match(reading.text, start, stop):
        return _Announced(start, None)
    if _SYMBOLIC.match(reading.text, start, stop) or _NO_NUMBER.match(reading.text, start, stop):
        return _Announced(start, _end_of_equation(reading, position, stop))
    begins = _DIRECT_DIGIT.match(reading.text, start, stop)
    if position == len(marks) or marks[position].number.start >= stop:
        return _Announced(start, None) if begins else None
    first = marks[position]
    if begins and first.number.start >= begins.end():
        return _Announced(start, None)  # 2:00
    gap = reading.text[start : first.number.start]
    direct = not gap.strip(" \n*_$:(\"'`~≈=[{>")
    if not direct and (not _PLAIN_WORDS.match(gap) or _NEGATION.search(gap) or _DETOUR.search(gap)):
        return None
    if not first.aside and _listed(reading, position):
        return _Announced(first.number.start, None)
    if first.aside or (not direct and _others_in_sentence(reading, position)):
        return None
    last = position
    while last + 1 < len(marks) and marks[last + 1].joined:
        last += 1
    while last + 1 < len(marks) and _continues(reading.text, marks[last], marks[last + 1]):
        last += 1
        while last + 1 < len(marks) and marks[last + 1].joined:
            last += 1
    chosen = marks[last]
    if chosen.operand and not first.operand:
        chosen = first  # 12 = 7 + 5
    if chosen.term or _VARIABLE.search(reading.text, first.number.start, chosen.number.start):
        return _Announced(first.number.start, None)
    if not chosen.free or _mark_restates(reading, chosen):
        return None
    return _Announced(first.number.start, chosen.number)


def _end_of_equation(reading: _Reading, position: int, stop: int) -> Number | None:
    """12 in `the answer is √144 = 12`."""
    inside = [mark for mark in reading.marks[position : position + 20] if mark.number.start < stop]
    line = [mark for mark in inside if "\n" not in reading.text[inside[0].number.start : mark.number.end]]
    return line[-1].number if line and line[-1].right_side and line[-1].free else None


def _continues(text: str, mark: Mark, following: Mark) -> bool:
    gap = text[mark.number.end : following.number.start]
    if len(gap) > 60 or "\n" in gap:
        return False
    if following.right_side and re.fullmatch(
        rf"[\s$)}}\]]{{0,4}}{_UNITS}[\s$)}}\]]{{0,4}}(?:=|≈|equals).{{0,20}}", gap
    ):
        return True
    return mark.operand and _GOES_ON.match(gap) is not None


def _others_in_sentence(reading: _Reading, position: int) -> bool:
    """True where another free number stands in the rest of the sentence (`the answer is that 5 of the 12 …`)."""
    mark = reading.marks[position]
    if position + 1 == len(reading.marks) or mark.operand:
        return False
    gap = reading.text[mark.number.end : reading.marks[position + 1].number.start]
    return len(gap) < 100 and not re.search(r"[.!?\n]", gap)


def _first_from(marks: list[Mark], start: int) -> int:
    return bisect_right(marks, start, key=lambda mark: mark.number.end)


_CONCLUDES = re.compile(
    r"(?:\A|[.!?:]\s{1,3}|\n\s{0,3})(?:\*\*)?"
    r"(?:So|Therefore|Thus|Hence|Finally|In total|Altogether|In conclusion)\b,? "
)


def _conclusion(reading: _Reading) -> ParsedAnswer | None:
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
    return None if _copied(reading, behind[0]) else _found(reading.text, behind[0].number, "conclusion")


def _equals(reading: _Reading) -> ParsedAnswer | None:
    values = [
        mark
        for mark in reading.marks
        if mark.right_side and (mark.free or mark.term) and not _restates(mark.number, reading.prompt)
    ]
    if not values:
        return _reversed_sum(reading)
    last = values[-1].number
    if values[-1].term:
        return _unreadable("equals", reading.text[last.start :])
    # A text cut off inside its last number: take the whole number that the same text gave before.
    if last.end == len(reading.text.rstrip()) and len(values) > 1:
        before, cut = (reading.text[n.start : n.end] for n in (values[-2].number, last))
        if before != cut and before.startswith(cut):
            last = values[-2].number
    return _found(reading.text, last, "equals")


def _reversed_sum(reading: _Reading) -> ParsedAnswer | None:
    """`12 = 7 + 5`: the value stands on the left."""
    for mark, following in pairwise(reading.marks):
        if mark.free and mark.left_side and following.operand and following.right_side:
            return None if _restates(mark.number, reading.prompt) else _found(reading.text, mark.number, "equals")
    return None


def _sole_or_last(reading: _Reading) -> ParsedAnswer | None:
    free = [mark for mark in reading.marks if mark.free and not mark.left_side]
    if not free and len(reading.marks) == 1:
        # `1. The first …` with no other number: the 1 may open a list or be the answer.
        free = [mark for mark in reading.marks if mark.aside and not mark.operand and mark.number.start < 3]
    free = [mark for mark in free if not _copied(reading, mark) and not _restates(mark.number, reading.prompt)]
    if not free:
        return None
    if len({mark.number.value for mark in free}) == 1:
        return _found(reading.text, free[-1].number, "sole")
    if sorted(mark.number.value for mark in free) == sorted(n.value for n in find_numbers(reading.prompt)):
        return None  # the problem told again
    return _found(reading.text, free[-1].number, "last", "ambiguous")


# --- numbers that only repeat the prompt


def _mark_restates(reading: _Reading, mark: Mark) -> bool:
    return _restates(mark.number, reading.prompt)


def _restates(number: Number, prompt: str) -> bool:
    """697/2 after `697 ÷ 2 =` is the question, not its answer."""
    if number.power is not None:
        return any(mark.power == number.power for mark in find_numbers(prompt[:20_000]))
    return number.fraction is not None and number.fraction in _prompt_divisions(prompt)


@lru_cache(maxsize=256)
def _prompt_divisions(prompt: str) -> frozenset[tuple[int, int]]:
    marks = _marks(prompt)
    pairs = {mark.number.fraction for mark in marks if mark.number.fraction}
    for first, second in pairwise(marks):
        one, other = first.number.value, second.number.value
        if second.joined in ("/", "?") and one.denominator == other.denominator == 1:
            pairs.add((int(one), int(other)))
    return frozenset(pairs)


_WORDS = re.compile(r"[^\W_]+")


def _copied(reading: _Reading, mark: Mark) -> bool:
    """True where the number stands in the prompt too, behind the same three words (one of them may differ)."""
    if not reading.prompt:
        return False
    contexts = _prompt_contexts(reading.prompt).get(str(mark.number.value), ())
    start = mark.number.start
    words = [word.lower() for word in _WORDS.findall(reading.text[max(0, start - 60) : start])][-3:]
    if len(words) < 3:
        return False
    return any(sum(a == b for a, b in zip(words, context, strict=True)) >= 2 for context in contexts)


@lru_cache(maxsize=256)
def _prompt_contexts(prompt: str) -> dict[str, list[list[str]]]:
    contexts: dict[str, list[list[str]]] = {}
    for number in find_numbers(prompt[:20_000]):
        words = [word.lower() for word in _WORDS.findall(prompt[max(0, number.start - 60) : number.start])][-3:]
        if len(words) == 3:
            contexts.setdefault(str(number.value), []).append(words)
    return contexts


# --- script


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__)
    parser.add_argument("response", help="the response's text; - reads it from standard input")
    parser.add_argument("--prompt", help="the prompt that it answers, so that an echo is known as one")
    parser.add_argument("--gold", help="the right answer, to compare with")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Print what a response answers."""
    args = parse_args(argv)
    response = sys.stdin.read() if args.response == "-" else args.response
    gold = read_gold(args.gold, args.prompt)
    parsed, right = judge(response, args.prompt, gold)
    line: dict[str, Any] = {"value": None if parsed.value is None else str(parsed.value)}
    line |= {"rule": parsed.rule, "status": parsed.status, "text": parsed.text}
    if right is not None:
        line |= {"gold": gold.expression or str(gold.number), "right": right}
    print(json.dumps(line, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    run_main(main)
