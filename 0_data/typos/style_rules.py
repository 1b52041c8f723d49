"""What each style allows: `verify_variant` says what is wrong with a variant of a clean prompt.

The generator keeps only what passes, and the checker and the rephrasing script hold texts from elsewhere to the same.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from load_json import STYLES
from rapidfuzz.distance import Levenshtein
from token_spans import LABEL_COLON

from typos.edits import operation_of
from typos.protection import has_two_numbers, protected_texts
from typos.words import FUNCTION_WORDS, NUMBER_WORDS, are_homophones, is_real_word, words_in, zipf

FRAMING_STYLES = ("polite", "urgent")
FIXED_COUNTS = {"two": 2, "three": 3}
# The one kind of edit that the style's name promises.
OPERATIONS = {"main": "substitution", "swap": "transposition", "missing": "deletion", "repeated": "doubling"}
SOFT_HYPHEN = "\u00ad"


@dataclass(frozen=True)
class Fault:
    """Why a variant is not what its style says. `kind` is one of the linter's kinds of finding."""

    kind: str
    detail: str


def verify_variant(
    clean: str, variant: str, style: str, row: dict[str, Any] | None = None, intensity: int = 1
) -> list[Fault]:
    """What is wrong with `variant` as the form of `clean` in `style`; empty where nothing is.

    `row` gives `task` and `answer`, `intensity` the number of edits (`two`, `three` and the framings have their own).
    A style of the user's own is held to two rules: it differs from the clean text, and keeps its digits and operators.
    `other` (a free rewording) has to differ only.
    """
    if clean == variant:
        return [Fault("no_op", "equals the clean text")]
    if unicodedata.normalize("NFC", clean) == unicodedata.normalize("NFC", variant):
        return [Fault("no_op_unicode", "differs from the clean text in Unicode normalisation alone")]
    if style == "other":
        return []
    if style not in STYLES:
        return _number_faults(clean, variant)
    faults = _number_faults(clean, variant)
    if not faults and style not in FRAMING_STYLES:
        faults = _protected_faults(clean, variant, row)
    return faults + _STYLE_CHECKS[style](clean, variant, style, FIXED_COUNTS.get(style, intensity))


def _number_faults(clean: str, variant: str) -> list[Fault]:
    before, after = (_NUMBERS_AND_OPERATORS.findall(text) for text in (clean, variant))
    if before == after:
        return []
    lost, gained = _first_change(before, after)
    return [Fault("changed_numbers", f"digits or operators differ: {lost[:40]!r} became {gained[:40]!r}")]


def _first_change(before: list[str], after: list[str]) -> tuple[str, str]:
    return next((a or "nothing", b or "nothing") for a, b in zip_longest(before, after, fillvalue="") if a != b)


_NUMBERS_AND_OPERATORS = re.compile(
    r"\d+(?:[.,]\d+)*|[+×÷=*/^%<>≤≥±√−]|(?<=[\d\s)])-(?=[\d\s(])|(?<!\w)-(?=\d)"
    r"|(?<=\d)[xX](?=\d)|(?<=\d )[xX](?= \d)"
)


def _protected_faults(clean: str, variant: str, row: dict[str, Any] | None) -> list[Fault]:
    before, after = protected_texts(clean, row), protected_texts(variant, row, clean)
    if before == after and clean.count(":") == variant.count(":"):
        return []
    lost, gained = _first_change(before, after) if before != after else ("':'", "another number of colons")
    return [Fault("changed_protected", f"protected text differs: {lost[:40]!r} became {gained[:40]!r}")]


def changed_words(clean: str, variant: str) -> list[tuple[str, str]] | None:
    """Pairs of white-space separated pieces that differ; None where the white space differs as well."""
    if re.findall(r"\s+", clean) != re.findall(r"\s+", variant):
        return None
    left, right = clean.split(), variant.split()
    if len(left) != len(right):
        return None
    return [(a, b) for a, b in zip(left, right, strict=True) if a != b]


_OUTER = re.compile(r"[\W_]+")


def changed_parts(before: str, after: str) -> list[tuple[str, str]]:
    """The parts (between hyphens, apostrophes, other marks) in which two pieces differ; in doubt the pieces."""
    left, right = _OUTER.split(before), _OUTER.split(after)
    if len(left) != len(right) or _OUTER.findall(before) != _OUTER.findall(after):
        return [(before, after)]
    return [(a, b) for a, b in zip(left, right, strict=True) if a != b]


def _check_typos(clean: str, variant: str, style: str, count: int) -> list[Fault]:
    pairs = changed_words(clean, variant)
    if pairs is None:
        return [Fault("edit_count", "words were added, left out or re-spaced")]
    faults = []
    if len(pairs) != count:
        faults.append(Fault("edit_count", f"{len(pairs)} words differ, {style} means {count}"))
    for before, after in pairs:
        faults += _check_typo(before, after, style)
    return faults


def _check_typo(before: str, after: str, style: str) -> Iterator[Fault]:
    operation = operation_of(before, after)
    shown = f"{before[:40]!r} -> {after[:40]!r}"
    if operation is None:
        yield Fault("wrong_edit", f"not one edit apart: {shown}")
        return
    if operation != OPERATIONS.get(style, operation):
        yield Fault("wrong_edit", f"{operation}, but {style} means {OPERATIONS[style]}: {shown}")
    for old, new in changed_parts(before, after):
        if style == "real_word":
            if not is_real_word(new) or new.lower() == old.lower():
                yield Fault("wrong_edit", f"no real word: {shown}")
        elif is_real_word(new):
            yield Fault("accidental_real_word", f"{shown}, Zipf {zipf(new)}")
        if style == "noise_words" and old.lower() not in FUNCTION_WORDS:
            yield Fault("wrong_edit", f"edits a content word: {shown}")


def _check_homonyms(clean: str, variant: str, style: str, count: int) -> list[Fault]:
    pairs = changed_words(clean, variant)
    if pairs is None:
        return [Fault("edit_count", "words were added, left out or re-spaced")]
    parts = [part for pair in pairs for part in _homonym_parts(*pair)]
    faults = [Fault("false_homophone", f"{a[:40]!r} -> {b[:40]!r}") for a, b in parts if not are_homophones(a, b)]
    if len(pairs) != count:
        faults.append(Fault("edit_count", f"{len(pairs)} words differ, {style} means {count}"))
    return faults


def _homonym_parts(before: str, after: str) -> list[tuple[str, str]]:
    """Like changed_parts, with an apostrophe inside a word taken as a letter (its, it's)."""
    left, right = words_in(before), words_in(after)
    if len(left) != len(right):
        return [(before, after)]
    return [(a.replace("’", "'"), b.replace("’", "'")) for a, b in zip(left, right, strict=True) if a != b]


def _check_grammar(clean: str, variant: str, style: str, count: int) -> list[Fault]:
    changed = int(Levenshtein.distance(clean.split(), variant.split(), score_cutoff=count))
    if changed == count:
        return []
    many = "more" if changed > count else str(changed)
    return [Fault("edit_count", f"{many} words differ, {style} means {count}")]


def _check_punctuation(clean: str, variant: str, style: str, count: int) -> list[Fault]:
    if re.sub(r"[\W_]+", "", clean) != re.sub(r"[\W_]+", "", variant):
        return [Fault("wrong_edit", "letters or digits differ, not only marks and spaces")]
    changed = int(Levenshtein.distance(clean, variant, score_cutoff=count))
    faults = []
    if changed != count:
        many = "more" if changed > count else str(changed)
        faults.append(Fault("edit_count", f"{many} marks or spaces differ, {style} means {count}"))
    old = {word.lower() for word in re.findall(r"[^\W\d_]+", clean)}
    joined = [word for word in dict.fromkeys(re.findall(r"[^\W\d_]+", variant)) if word.lower() not in old]
    faults += [Fault("accidental_real_word", f"{w[:40]!r}, Zipf {zipf(w)}") for w in joined if is_real_word(w)]
    return faults


def _check_framing(clean: str, variant: str, style: str, _: int) -> list[Fault]:
    at = variant.find(clean.strip())
    if at < 0 or not clean.strip():
        reworded = Fault("request_changed", f"{style} does not keep the request word for word")
        # In arithmetic, number words and the names of operations count as digits do; more may be added.
        before, after = ([w for w in re.findall("[a-z]+", text.lower()) if w in _SAID] for text in (clean, variant))
        left = iter(after)
        lost = next((word for word in before if word not in left), None) if has_two_numbers(clean) else None
        said = [Fault("changed_numbers", f"number words differ: {lost!r} is not where it was")] if lost else []
        return [reworded, *said]
    added = variant[:at] + variant[at + len(clean.strip()) :]
    if not added.strip():
        return [Fault("no_op", "differs from the clean text in white space alone")]
    if LABEL_COLON.split(clean.rstrip(), 1)[1:] != LABEL_COLON.split(variant.rstrip(), 1)[1:]:
        return [Fault("task_split", "the text after the colon that splits off the task is no longer the same")]
    return []


_SAID = NUMBER_WORDS | {"plus", "minus", "times", "multiplied", "divided"}


def _check_split(clean: str, variant: str, style: str, count: int) -> list[Fault]:
    if clean.replace(SOFT_HYPHEN, "") != variant.replace(SOFT_HYPHEN, ""):
        return [Fault("wrong_edit", "more than soft hyphens differ")]
    added = variant.count(SOFT_HYPHEN) - clean.count(SOFT_HYPHEN)
    return [] if added == count else [Fault("edit_count", f"{added} soft hyphens added, {style} means {count}")]


_STYLE_CHECKS: dict[str, Callable[[str, str, str, int], list[Fault]]] = {
    **dict.fromkeys((*OPERATIONS, *FIXED_COUNTS, "noise_words", "real_word"), _check_typos),
    "grammar": _check_grammar,
    "punctuation": _check_punctuation,
    "homonym": _check_homonyms,
    "split": _check_split,
    **dict.fromkeys(FRAMING_STYLES, _check_framing),
}
