"""Gold answers: read one, and compare a response with it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Any, NamedTuple

from load_json import CLEAN_KEYS

from maths.answer_rules import MARKED_RULES, parse_prediction_text
from maths.marked_answers import value_of_phrase
from maths.maths_symbolic import answer_expression, expression_of_gold, is_expression, same_expression
from maths.numerals import digits_for_words, plain_text
from maths.reading import Mark, ParsedAnswer, mark_numbers

MIN_DECIMALS = 2  # a response rounded to fewer decimals than this must be exact
MIN_SIGNIFICANT = 2


class PercentGold(Fraction):
    """A gold answer written with a per cent sign: 28 % has the value 7/25."""


def matches_gold(parsed: ParsedAnswer, gold: Fraction) -> bool:
    """True if the parsed value is the gold value.

    Exact as fractions. A decimal shown with d >= 2 decimals and 2 or more significant digits also matches if gold
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
    if isinstance(answer, list):  # accepted texts: words
        return None
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        return Fraction(str(answer)) if abs(answer) < float("inf") else None
    if not isinstance(answer, str) or not answer.strip():
        return arithmetic_value(clean_prompt) if clean_prompt else None
    text = gold_text(answer)
    parsed = value_of_phrase(digits_for_words(plain_text(text)), "")
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
    if isinstance(answer, list):
        return Gold(None, None, next((text for text in answer if isinstance(text, str)), None))
    number = gold_value(answer, clean_prompt)
    text = gold_text(answer) if isinstance(answer, str) and answer.strip() else None
    if number is not None or text is None:
        return Gold(number, None, text)
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
    answer = answer_expression(response, prompt)
    if answer is None:
        return parsed._replace(value=None, status="none"), False
    return ParsedAnswer(None, "symbolic", "parsed", answer), same_expression(wanted, answer)


def number_text(value: Fraction | None) -> str | None:
    """A number as people write it: 12, 0.75, or 1/3 if no decimal is exact."""
    if value is None or value.denominator == 1:
        return None if value is None else str(value.numerator)
    scale = next((d for d in range(1, 13) if 10**d % value.denominator == 0), None)
    if scale is None:
        return f"{value.numerator}/{value.denominator}"
    digits = str(abs(value.numerator) * 10**scale // value.denominator).rjust(scale + 1, "0")
    return f"{'-' if value < 0 else ''}{digits[:-scale]}.{digits[-scale:]}"


def has_gold(rows: Sequence[Any]) -> bool:
    """Whether any row of a prompt file has a gold answer that can be read. Without one there is nothing to score."""
    return any(
        gold_value(row.get("answer"), clean_text(row)) is not None or _is_expression(row.get("answer"))
        for row in rows
        if isinstance(row, dict)
    )


def _is_expression(answer: Any) -> bool:
    return isinstance(answer, str) and is_expression(answer)


def clean_text(row: dict[str, Any]) -> str | None:
    """The clean form of a row of a prompt file; None if it has none."""
    return next((row[key] for key in CLEAN_KEYS if isinstance(row.get(key), str)), None)


@lru_cache(maxsize=4096)
def arithmetic_value(prompt: str) -> Fraction | None:
    """The value of the last sum in a prompt, by the usual precedence; None if there is none or it has brackets."""
    text = plain_text(prompt)
    marks = mark_numbers(text)
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
