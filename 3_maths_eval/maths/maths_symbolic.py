"""Compare answers that are expressions (radicals, π, intervals, tuples, sets, matrices, equations) through Math-Verify.

Math-Verify reads LaTeX with a grammar of its own; its other reader, which hands text to Python, is not used. It times
itself out with SIGALRM, which needs a main thread and cannot stop a huge power. So all of it runs in one process of its
own, with its memory limited, which is ended after SECONDS.
"""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import re
import resource
import signal
from contextlib import suppress
from functools import lru_cache
from multiprocessing.pool import Pool

from command_line import UserError
from run_on import word_set

from maths.marked_answers import answer_phrase
from maths.numerals import plain_text

SECONDS = 10.0  # for one comparison
START_SECONDS = 120.0  # for the start of the process, which imports sympy
MEMORY_BYTES = 4 * 2**30
MAX_LENGTH = 300

_COMMAND = re.compile(r"\\[A-Za-z]+")
_WORD = re.compile(r"[^\W\d_]{3,}")
_KNOWN_WORDS = word_set("sqrt sin cos tan cot sec csc log exp and arcsin arccos arctan infinity inf")
_MATHS = re.compile(r"\d|[=<>≤≥+^√π∞]|\\(?:frac|sqrt|pi|infty|begin|emptyset|le|ge|in)\b")
_NO_EXPRESSION = re.compile(
    r"\d ?:\d\d|\d ?[ap]\.?m\b|\d[/.]\d+[/.]\d|\d{4}-\d\d|\d(?:st|nd|rd|th)\b|['\"]|\A[A-Z]{1,6}-?\d[\w-]*\Z",
    re.IGNORECASE,
)
_SEGMENT = re.compile(r"\$([^$\n]{1,200})\$")
_EQUATION = re.compile(r"\d ?[a-z]\b|(?<![A-Za-z\\])[A-Za-z] ?[-+*/^|]|[-+*/^|] ?[A-Za-z]\b")
_UNIT = re.compile(r"(?: (?!and\b|or\b)[A-Za-z]{2,15}){1,3}\Z")
_TEXT = re.compile(r"\\(?:text|mbox|mathrm|textbf) ?\{([^{}]*)\}")
_SIGNS = (
    r"π=\pi ∞=\infty ≤=\le ≥=\ge ≠=\ne ∈=\in ∪=\cup ∩=\cap ±=\pm ×=\cdot ·=\cdot −=- –=- °=^{\circ} $= \(= \)= \[= \]="
)
_SYMBOLS = dict(pair.split("=") for pair in _SIGNS.split()) | {"<=": r"\le", ">=": r"\ge", "**": "^"}
_RAISED = {**{c: str(i) for i, c in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")}, "⁻": "-"}


def is_expression(text: str) -> bool:
    """True for a text that is written in the signs of mathematics; not for words, times, dates and labels (`B2`)."""
    bare = _COMMAND.sub(" ", _TEXT.sub(lambda match: match[1], text))
    words = {word.lower() for word in _WORD.findall(re.sub(r"\{[a-z]*matrix\}|\{(?:cases|array)\}", "", bare))}
    return (
        len(text) <= MAX_LENGTH
        and _MATHS.search(text) is not None
        and words <= _KNOWN_WORDS
        and _NO_EXPRESSION.search(text.strip()) is None
    )


def answer_expression(response: str | None, prompt: str | None = None) -> str | None:
    """The expression that a response answers, as written; None if there is none or the prompt has the same one."""
    phrase = answer_phrase(response or "", prompt or "")
    phrase = _UNIT.sub("", phrase)
    if not is_expression(phrase) and (segments := _SEGMENT.findall(phrase)):
        phrase = segments[-1]  # $9\pi$ square cm
    if not phrase or not is_expression(phrase) or (prompt and _squeezed(phrase) in _squeezed(prompt)):
        return None
    return phrase


def expression_of_gold(text: str) -> str | None:
    """A gold answer's text, if it is an expression that Math-Verify can read; else None."""
    return text if text and is_expression(text) and _ask(text, None) else None


def same_expression(gold: str, answer: str) -> bool:
    """True if both are the same by Math-Verify. False too if the comparison takes longer than SECONDS."""
    if _squeezed(gold) == _squeezed(answer):
        return True
    left, equals, _ = answer.rpartition("=")
    if (equals and "=" not in gold and _EQUATION.search(left)) or (":" in answer and ":" not in gold):
        return False  # 2x + 3y = 5 is not 5, 3:2 is not 1.5
    return _ask(gold, answer)


def _squeezed(text: str) -> str:
    return re.sub(r"\s|\\(?:left|right)(?![a-z])|\.\Z", "", plain_text(text).replace("$", ""))


def _latex(text: str) -> str:
    """`text` in the LaTeX that Math-Verify reads."""
    text = _TEXT.sub(lambda match: f" {match[1].strip()} " if match[1].strip() in ("and", "or") else " ", text)
    for sign, command in _SYMBOLS.items():
        text = text.replace(sign, f"{command} " if command[:1] == "\\" else command)
    text = re.sub(f"[{''.join(_RAISED)}]+", lambda match: f"^{{{''.join(_RAISED[c] for c in match[0])}}}", text)
    text = re.sub(r"√ ?(?:\(([^()]{1,60})\)|\{([^{}]{1,60})\}|(\w+))", r"\\sqrt{\1\2\3}", text)
    text = re.sub(r"\^ ?(?:\(([^()]{1,40})\)|(-?\d+))", r"^{\1\2}", text)
    text = re.sub(r"(?<![A-Za-z\\])pi\b", r"\\pi ", text)
    text = re.sub(r"(?<![A-Za-z\\])(?:infinity|inf)\b", r"\\infty ", text)
    return re.sub(r",? (?:and|or) ", ", ", text).strip(" .")


# --- the process


_pool: Pool | None = None


@lru_cache(maxsize=65536)
def _ask(gold: str, answer: str | None) -> bool:
    """Whether Math-Verify reads `gold` (answer None), or takes both for the same."""
    global _pool
    try:
        if _pool is None:
            _pool = multiprocessing.get_context("spawn").Pool(1, initializer=_limit)
            atexit.register(_end)
            _pool.apply_async(_compare, ("1", "1")).get(START_SECONDS)
        return _pool.apply_async(_compare, (_latex(gold), None if answer is None else _latex(answer))).get(SECONDS)
    except multiprocessing.TimeoutError:
        _end()
    except ImportError as error:
        raise UserError(
            f"{error}: gold answers that are expressions need it; pip install -r requirements.txt"
        ) from None
    return False


def _end() -> None:
    global _pool
    if _pool is not None:
        _pool.terminate()
    _pool = None


def _limit() -> None:
    """Runs in the process: limited memory, where the system can limit it; Ctrl-C is the parent's."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))


def _compare(gold: str, answer: str | None) -> bool:
    """Runs in the process, in its main thread."""
    from math_verify import LatexExtractionConfig, parse, verify

    logging.disable(logging.CRITICAL)
    try:
        read = [
            parse(f"${text}$", extraction_config=[LatexExtractionConfig()], fallback_mode="no_fallback")
            for text in (gold, answer)
            if text is not None
        ]
        return bool(read[0]) and (
            answer is None or (bool(read[1]) and bool(verify(read[0], read[1], allow_set_relation_comp=True)))
        )
    except (Exception, MemoryError):
        return False
