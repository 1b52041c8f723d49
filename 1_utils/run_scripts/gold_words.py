"""The accepted answers of a row: words, which stage 4 scores, or a number or expression, which stage 3 scores."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

ONE_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
TEN_WORDS = "twenty thirty forty fifty sixty seventy eighty ninety"
BIG_WORDS = "hundred thousand lakh lakhs million crore crores billion trillion dozen dozens half quarter"
_COUNTING = re.compile(rf"\b(?:{'|'.join(f'{ONE_WORDS} {TEN_WORDS} {BIG_WORDS}'.split())})\b", re.IGNORECASE)
_SIGN = re.compile(r"[=<>≤≥+*/^√π∞∅\\$%#{}]")


def accepted_texts(answer: Any) -> list[str]:
    """The accepted texts of a row's `answer` if it is words, else none.

    A list of texts is words, whatever they are. A single text is words if it has no digit or numeral, no sign of
    mathematics and no number word (three, dozen, half). A text that has one is a number or an expression; where it is
    neither, it has to be written as a list.
    """
    if isinstance(answer, list):
        return [text.strip() for text in answer if isinstance(text, str) and text.strip()]
    if not isinstance(answer, str) or not answer.strip():
        return []
    number = any(sign.isnumeric() for sign in answer)
    return [] if number or _SIGN.search(answer) or _COUNTING.search(answer) else [answer.strip()]


def answer_texts(answer: Any) -> list[str]:
    """The texts of a row's accepted answers: words (see `accepted_texts`), else the number or expression as it stands.

    Of a text with GSM8K's mark `####`, what follows it.
    """
    if isinstance(answer, str | int | float) and not isinstance(answer, bool):
        text = str(answer).rpartition("####")[2].strip()
        return [text] if text else []
    return accepted_texts(answer)


def has_words(rows: Sequence[Any]) -> bool:
    """Whether any row of a prompt file has a gold answer in words."""
    return any(isinstance(row, dict) and bool(accepted_texts(row.get("answer"))) for row in rows)
