"""Protected text: what no edit may touch.

Digits, number words, operators, units after a number, URLs, code, formulas, quoted text, `{placeholders}`, labels such
as `Answer:`, the row's `task` and its `answer`. In a prompt about arithmetic (`is_arithmetic`), also the words that
decide the calculation (plus, from, halve, mean …) and every unit. A label is one to three words, the first with a
capital, that begin a line or a sentence and end in a colon. An instruction (`Calculate:`) is not a label. In languages
other than English, units are not listed: the word after a number is protected instead.
"""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_left
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import regex
from token_spans import around_task

from typos.languages import ENGLISH, LETTERS, MARKS, WORD_LISTS, Language, language_of, word_set
from typos.words import (
    ARITHMETIC_WORDS,
    FUNCTION_WORDS,
    INSTRUCTION_VERBS,
    NUMBER_WORDS,
    PIECE,
    UNITS,
    words_in,
)

Span = tuple[int, int]  # characters, end exclusive

_SURE_ARITHMETIC_WORDS = word_set(WORD_LISTS["sure_arithmetic_words"])
_VAGUE_NUMBERS = word_set(WORD_LISTS["vague_numbers"])
_SURE_UNITS = frozenset(unit for unit in UNITS - {"am", "pm"} if len(unit) > 1)  # units even without a number before
_ARITHMETIC = ARITHMETIC_WORDS | _SURE_UNITS
_NO_LABEL = INSTRUCTION_VERBS | FUNCTION_WORDS | word_set("following next dear")


def _any_of(words: frozenset[str]) -> str:
    return "(?:" + "|".join(sorted(words, key=lambda word: (-len(word), word))) + ")"


_NUMBER = r"(?<![\d.,])[-−+]?[($€£¥]?\d[\d.,]*+[)%]?"
_OPERATOR = r"[-+*/×÷·=^−–xX]"
_START, _END = r"(?<![\w\u00ad])", r"(?![\w\u00ad])"  # of a word; a soft hyphen splits none
_NUMBER_WORD = _any_of(NUMBER_WORDS)
_PATTERNS = {
    "code": re.compile(
        r"```.*?(?:```|\Z)|^ {0,3}~~~.*?(?:^ {0,3}~~~|\Z)|``[^\n]{1,300}?''|``[^\n]+?``|`[^`\n]+`|^(?: {4}|\t)[^\n]*",
        re.DOTALL | re.MULTILINE,
    ),
    "element": re.compile(
        r"<(q|blockquote|code|pre|kbd|samp|tt|var|math|svg)\b[^<>]*>.{0,5000}?</\1\s*>", re.DOTALL | re.IGNORECASE
    ),
    # The rule of Pandoc: no space inside the dollar signs, no digit after the second, so $5 and $6 are no formula.
    "formula": re.compile(
        r"\$\$.+?\$\$|(?<![\w$\\])\$(?=[^\s$])[^$\n]*?(?<=[^\s$\\])\$(?![\w$])|\\\(.{1,2000}?\\\)|\\\[.{1,2000}?\\\]|"
        r"\\begin\{(\w+\*?)\}.{0,5000}?\\end\{\1\}",
        re.DOTALL,
    ),
    # One pattern for all marks, since the closing mark of one language is the opening mark of another.
    "quote": re.compile(
        r"\"[^\"]*\"|\"[^\n]*|“[^”]*”|„[^“”„]*[“”]|«[^»]*»|»[^«]*«|‹[^›]*›|›[^‹]*‹|「[^」]*」|『[^』]*』|《[^》]*》|〈[^〉]*〉|"
        r"〝[^〞〟]*[〞〟]|＂[^＂]*＂|‚[^‘’‚\n]*[‘’]|‘[^\n]{1,300}?’(?!\w)|(?<![\w'])'[^\n]{1,300}?'(?!\w)|”[^”\n]*”"
    ),
    # Where marks do not pair up, the pairs are taken in the other way too: an opening mark before, a closing one after.
    "paired": re.compile(r"(?<!\w)([\"`])(?=\S)[^\"`\n]*(?<=\S)\1(?!\w)"),
    "placeholder": re.compile(r"\{[^{}\n]*\}|\[[^\[\]\n]*\]|<(?!\s)[^<>\n]*>"),
    "expression": re.compile(rf"{_NUMBER}(?:\s{{0,9}}{_OPERATOR}\s{{0,9}}[-−+]?[($€£¥]?\d[\d.,]*+[)%]?)++"),
    "unit": re.compile(rf"(?:(?<=\d)|(?<=\d[\s-])|{_START}{_NUMBER_WORD}[\s-]){_any_of(UNITS)}{_END}", re.IGNORECASE),
}
_LABEL = regex.compile(
    rf"{_START}(?i:answer|question|q|a|input|output|context|note|example|options?|choices?|text|passage|task|"
    r"instructions?|response|solution|result|problem|final)[^\S\n]{0,3}[:：]"
    r"|(?:^[^\S\n]{0,9}|(?<=[.!?…][^\S\n]))"
    r"(?P<name>\p{Lu}[\w\p{M}'’/-]{0,30}(?: (?:[\p{Lu}\d][\w\p{M}'’/-]{0,20}|\([^()\n]{1,20}\))){0,2}"
    r"(?: \p{Ll}[\w\p{M}'’/-]{2,20})?|user|assistant|system|human)[^\S\n]{0,3}(?::(?=\s|\Z)|：)",
    regex.MULTILINE,
)
_TOKEN = re.compile(rf"{_START}{LETTERS}(?![\w\u00ad{MARKS}])")
_MEAN_AS_VERB = re.compile(
    r"\b(?:to|does|do|did|would|will|can|could|may|might|not|i|you|we|they|it|this|that|which|what|by)\s+(means?)\b",
    re.IGNORECASE,
)
_MARKED = re.compile(
    r"[\d@#\\_=|~^<>{}\[\]&*$€£¥₹%°+×÷·−±√∑∫≤≥≠²³¹¼½¾⁰-₟⅐-\u218f①-⓿]|\(\)|\w\(|[^\W\d_]\.[^\W\d_]|\w/\w|::|://|->"
)
_BARE_OPERATOR = re.compile(r"[-–—/]+")
_DIGITS = re.compile(r"\d[\d.,]*+")
# A number with its sign, currency, fraction and unit: -3, .5, €5, 3/4, 25%, 12., 5 apples.
_NUMERIC_ANSWER = re.compile(
    r"[-+−]?\s?[$€£¥₹]?\s?[-−]?(?:\d[\d,]*+(?:\.\d*)?|\.\d+)(?:\s?/\s?\d+)?\s?[%€$£¥]?(?:\s?[^\W\d_]{1,20}){0,3}\.?"
)


# --- is it about arithmetic?


def is_arithmetic(text: str, row: dict[str, Any] | None = None) -> bool:
    """True if numbers decide: the row's `answer` is a number, or the text holds two numbers (digits or words), or one
    number and a word that names a calculation (halve, squared, median …). In other languages one number is enough."""
    answer = row.get("answer") if row else None
    if isinstance(answer, str):
        numeric = _NUMERIC_ANSWER.fullmatch(answer.strip()) is not None
    else:
        numeric = isinstance(answer, int | float) and not isinstance(answer, bool)
    language = language_of(row)
    numbers = len(_numbers(text, language))
    if numeric or numbers >= 2 or language is not ENGLISH:
        return numeric or numbers > 0
    words = {match[0].lower() for match in _TOKEN.finditer(text)}
    number = _DIGITS.search(text) is not None or not words.isdisjoint(NUMBER_WORDS - _VAGUE_NUMBERS)
    return number and not words.isdisjoint(_SURE_ARITHMETIC_WORDS)


def has_two_numbers(text: str, language: Language = ENGLISH) -> bool:
    """True for two numbers or more, in digits or words."""
    return len(_numbers(text, language)) >= 2


def _numbers(text: str, language: Language) -> list[Span]:
    return [*_number_words(text, language), *(match.span() for match in _DIGITS.finditer(text))]


def _number_words(text: str, language: Language) -> list[Span]:
    """Spans of numbers in words; words with a hyphen or one space between them (twenty-one) are one number."""
    spans: list[Span] = []
    for match in _TOKEN.finditer(text):
        if language.is_number_word(match[0]):
            joined = spans and text[spans[-1][1] : match.start()] in ("-", " ", "\n", "\u2011")
            start = spans.pop()[0] if joined else match.start()
            spans.append((start, match.end()))
    return spans


# --- what is protected


def protected_texts(text: str, row: dict[str, Any] | None = None, clean: str | None = None) -> list[str]:
    """The protected parts themselves, in order. An edit is safe only if this list stays as it is."""
    return [text[start:end] for start, end in protected_spans(text, row, clean)]


def protected_spans(text: str, row: dict[str, Any] | None = None, clean: str | None = None) -> list[Span]:
    """Character spans of `text` that no edit may touch, in order, disjoint; `row` gives `task` and `answer`.

    `clean`: the clean form that `text` is a variant of. Its labels alone are labels then: an instruction that was
    misspelt (`Calcualte:`) has not become one. If the row's `_where` is `subject`, all but its task is protected.
    """
    if (row or {}).get("_where") == "subject":
        original = text if clean is None else clean
        before, after = map(len, around_task(original, str((row or {}).get("task") or "").strip()) or (original, ""))
        return [span for span in ((0, before), (max(before, len(text) - after), len(text))) if span[0] < span[1]]
    task, answer = (row.get(key) if row else None for key in ("task", "answer"))
    answers = answer if isinstance(answer, list) else [answer]
    task, *answers = (value.strip() if isinstance(value, str) else "" for value in (task, *answers))
    labels = None if clean is None else frozenset(clean[start:end] for start, end in _labels(clean))
    return list(_protected_spans(text, task, tuple(answers), is_arithmetic(text, row), labels, language_of(row)))


@lru_cache(maxsize=32)  # the clean prompt is asked for again with every style
def _protected_spans(
    text: str,
    task: str,
    answers: tuple[str, ...],
    arithmetic: bool,
    labels: frozenset[str] | None,
    language: Language,
) -> tuple[Span, ...]:
    spans = [match.span() for pattern in _PATTERNS.values() for match in pattern.finditer(text)]
    spans += [(start, end) for start, end in _labels(text) if labels is None or text[start:end] in labels]
    for piece in PIECE.finditer(text):  # with a digit, an operator or a sign of code; its last punctuation is free
        if _MARKED.search(piece[0]) or _BARE_OPERATOR.fullmatch(piece[0]):
            spans.append((piece.start(), piece.start() + max(1, len(piece[0].rstrip(".,;:!?")))))
    spans += _number_words(text, language)
    if language is not ENGLISH:
        ends = {end for _, end in _numbers(text, language)}
        for match in _TOKEN.finditer(text):
            start = match.start()
            unit = start in ends or (start - 1 in ends and text[start - 1] in " \n\t-\u00a0\u202f")
            if unit or (arithmetic and language.is_arithmetic_word(match[0])):
                spans.append(match.span())
    elif arithmetic:
        verbs = {match.start(1) for match in _MEAN_AS_VERB.finditer(text)}
        tokens = (match for match in _TOKEN.finditer(text) if match[0].lower() in _ARITHMETIC)
        spans += [match.span() for match in tokens if match.start() not in verbs]
    if task:
        spans += [match.span() for match in re.finditer(re.escape(task), text)]
    forms = {unicodedata.normalize(form, answer) for form in ("NFC", "NFD") for answer in answers if answer}
    for answer in forms.union(filter(None, answers)):
        spans += [match.span() for match in re.finditer(rf"(?<!\w){re.escape(answer)}(?!\w)", text, re.IGNORECASE)]
    merged: list[Span] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        elif end > start:
            merged.append((start, end))
    return tuple(merged)


def _labels(text: str) -> Iterator[Span]:
    for match in _LABEL.finditer(text):
        words = [word.lower() for word in words_in(match["name"] or "")]
        if match["name"] is None or not (words[:1] and _NO_LABEL.intersection((words[0], words[-1]))):
            yield (match.start() if match["name"] is None else match.start("name")), match.end()


def touches(spans: list[Span], start: int, end: int) -> bool:
    """True if [start, end) overlaps any of the `spans`, which are in order and disjoint."""
    before_end = bisect_left(spans, (end, end))
    return before_end > 0 and spans[before_end - 1][1] > start
