"""What each style allows: `verify_variant` says what is wrong with a variant of a clean prompt.

The generator keeps only what passes, and the checker and the rephrasing script hold texts from elsewhere to the same.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile, zip_longest
from typing import Any

from load_json import STYLES
from rapidfuzz.distance import Levenshtein
from style_names import dose_of
from token_spans import LABEL_COLON, Span, aligned_words

from typos.languages import ENGLISH, LANGUAGE_KEY, Language, is_real_word, language_of, zipf
from typos.protection import has_two_numbers, protected_spans, protected_texts
from typos.words import are_homophones, composed, letter_runs, operation_of, osa_distance, words_in

Fault = tuple[str, str]  # one of the linter's kinds of finding, and the detail
FRAMING_STYLES = ("polite", "urgent", "rude")
FIXED_COUNTS = {"two": 2, "three": 3, "polite": 1, "urgent": 1, "rude": 1}  # edits, whatever --intensity says
# The one kind of edit that the style's name promises.
OPERATIONS = {"main": "substitution", "swap": "transposition", "missing": "deletion", "repeated": "doubling"}
SOFT_HYPHEN = "\u00ad"


def verify_variant(
    clean: str, variant: str, style: str, row: dict[str, Any] | None = None, intensity: int = 1
) -> list[Fault]:
    """What is wrong with `variant` as the form of `clean` in `style`; empty if nothing is.

    `row` gives `task`, `answer` and `_language`, `intensity` the number of edits (FIXED_COUNTS has some styles').
    A style of the user's own is held to two rules: it differs from the clean text, and keeps its digits and operators.
    `other` (a free rewording) has to differ only.
    """
    if clean == variant:
        return [("no_op", "equals the clean text")]
    if unicodedata.normalize("NFC", clean) == unicodedata.normalize("NFC", variant):
        return [("no_op_unicode", "differs from the clean text in Unicode normalisation alone")]
    if style == "other":
        return []
    faults = []
    before, after = (_NUMBERS_AND_OPERATORS.findall(text) for text in (clean, variant))
    if before != after:
        faults.append(("changed_numbers", f"digits or operators differ: {_first_change(before, after)}"))
    if style not in STYLES and dose_of(style) is None:
        return faults
    if not faults and style not in FRAMING_STYLES:
        before, after = protected_texts(clean, row), protected_texts(variant, row, clean)
        if before != after:
            faults.append(("changed_protected", f"protected text differs: {_first_change(before, after)}"))
        elif clean.count(":") != variant.count(":"):
            faults.append(("changed_protected", "protected text differs: \"':'\" became 'another number of colons'"))
    if (dose := dose_of(style)) is not None:
        return [*faults, *_check_dose(clean, variant, style, dose, language_of(row))]
    count = FIXED_COUNTS.get(style, intensity)
    return [*faults, *_STYLE_CHECKS[style](clean, variant, style, count, language_of(row))]


def spans_to_keep(text: str, row: dict[str, Any]) -> list[Span]:
    """Spans of a style's `text` that no repair may touch, found in this text alone, without the clean form.

    They are the protected ones; `_where` does not count, because it says where the typos are. Nor does a task that is
    not in the text as it is.
    """
    task, known = row.get("task"), {key: row.get(key) for key in ("answer", LANGUAGE_KEY)}
    if isinstance(task, str) and row.get("_where") != "subject" and re.search(rf"(?<!\w){re.escape(task)}(?!\w)", text):
        known["task"] = task
    return protected_spans(text, known)


def verify_repair(text: str, repaired: str, row: dict[str, Any]) -> list[Fault]:
    """What is wrong with `repaired` as the repair of the style's `text`; empty if nothing is.

    Numbers, operators and protected text stay, no word follows the prompt's last one, and the other words differ by at
    most three letters each.
    """
    before, after = (_NUMBERS_AND_OPERATORS.findall(one) for one in (text, repaired))
    if before != after:
        return [("changed_numbers", f"digits or operators differ from the style: {_first_change(before, after)}")]
    position = 0
    for start, end in spans_to_keep(text, row):
        if (found := repaired.find(text[start:end], position)) < 0:
            return [("changed_protected", f"protected text of the style is not kept: {text[start:end][:40]!r}")]
        position = found + end - start
    aligned = aligned_words(text, repaired)
    limit = 3 * sum(edited for *_, edited in aligned)
    old, new = (_letters(one) for one in (text, repaired))
    ends = [twin for own, twin, _ in takewhile(lambda pair: pair[0] is None, reversed(aligned)) if twin]
    if (added := _letters(repaired[ends[-1][0] :]) if ends else "") and not old.endswith(added):
        return [("wrong_edit", f"words follow the end of the prompt: {repaired[ends[-1][0] :][:40]!r}")]
    if osa_distance(old, new, limit=limit) > limit:
        return [("wrong_edit", "more than three letters for each changed word differ from the style")]
    return []


def _letters(text: str) -> str:
    return re.sub(r"[\W_]+", "", text)


_NUMBERS_AND_OPERATORS = re.compile(
    r"\d+(?:[.,]\d+)*|[+×÷=*/^%<>≤≥±√−]|(?<=[\d\s)])-(?=[\d\s(])|(?<!\w)-(?=\d)"
    r"|(?<=\d)[xX](?=\d)|(?<=\d )[xX](?= \d)"
)


def _first_change(before: list[str], after: list[str]) -> str:
    lost, gained = next((a or "nothing", b or "nothing") for a, b in zip_longest(before, after, fillvalue="") if a != b)
    return f"{lost[:40]!r} became {gained[:40]!r}"


# --- checks of one style: (clean, variant, style, number of edits, language) -> faults


def _check_words(clean: str, variant: str, style: str, count: int, language: Language) -> Iterator[Fault]:
    """Typos and homophones: as many words as meant differ, and each as the style says."""
    pairs = _changed_words(clean, variant)
    if pairs is None:
        yield "edit_count", "words were added, left out or re-spaced"
        return
    if len(pairs) != count:
        yield "edit_count", f"{len(pairs)} words differ, {style} means {count}"
    for before, after in pairs:
        if style == "homonym":
            yield from _homophone_faults(before, after)
        else:
            yield from _typo_faults(before, after, style, language)


def _changed_words(clean: str, variant: str) -> list[tuple[str, str]] | None:
    """Pairs of white-space separated pieces that differ, in form NFC; None if the white space differs, too."""
    left, right = clean.split(), variant.split()
    if len(left) != len(right) or re.findall(r"\s+", clean) != re.findall(r"\s+", variant):
        return None
    return [(composed(before), composed(after)) for before, after in zip(left, right, strict=True) if before != after]


def _check_dose(clean: str, variant: str, style: str, count: int, language: Language) -> Iterator[Fault]:
    """Exactly `count` one-letter edits in all, by optimal string alignment distance; no word became another word."""
    pairs = _changed_words(clean, variant)
    if pairs is None:
        yield "edit_count", "words were added, left out or re-spaced"
        return
    if (edits := sum(osa_distance(before, after, limit=count) for before, after in pairs)) != count:
        yield "edit_count", f"{edits if edits <= count else 'more'} one-letter edits, {style} means {count}"
    for before, after in pairs:
        if any(is_real_word(word, language) for word in set(letter_runs(after)).difference(letter_runs(before))):
            yield "accidental_real_word", f"{before[:40]!r} -> {after[:40]!r}"


def _typo_faults(before: str, after: str, style: str, language: Language) -> Iterator[Fault]:
    operation = operation_of(before, after)
    shown = f"{before[:40]!r} -> {after[:40]!r}"
    if operation is None:
        yield "wrong_edit", f"not one edit apart: {shown}"
        return
    if operation != OPERATIONS.get(style, operation):
        yield "wrong_edit", f"{operation}, but {style} means {OPERATIONS[style]}: {shown}"
    # The parts between hyphens, apostrophes and other marks; in doubt the whole.
    left, right = re.split(r"([\W_]+)", before), re.split(r"([\W_]+)", after)
    if len(left) != len(right) or left[1::2] != right[1::2]:
        left, right = [before], [after]
    for old, new in ((a, b) for a, b in zip(left, right, strict=True) if a != b):
        if style == "real_word":
            if not is_real_word(new, language) or new.lower() == old.lower():
                yield "wrong_edit", f"no real word: {shown}"
        elif is_real_word(new, language):
            yield "accidental_real_word", f"{shown}, Zipf {zipf(new, language)}"
        if style == "noise_words" and old.lower() not in language.small_words:
            yield "wrong_edit", f"edits a content word: {shown}"


def _homophone_faults(before: str, after: str) -> Iterator[Fault]:
    left, right = words_in(before), words_in(after)  # an apostrophe inside a word is a letter: its, it's
    parts = zip(left, right, strict=True) if len(left) == len(right) else [(before, after)]
    for a, b in ((a.replace("’", "'"), b.replace("’", "'")) for a, b in parts if a != b):
        if not are_homophones(a, b):
            yield "false_homophone", f"{a[:40]!r} -> {b[:40]!r}"


def _count_faults(before: Sequence[str], after: Sequence[str], style: str, count: int, what: str) -> Iterator[Fault]:
    changed = int(Levenshtein.distance(before, after, score_cutoff=count))
    if changed != count:
        yield "edit_count", f"{'more' if changed > count else changed} {what} differ, {style} means {count}"


def _check_grammar(clean: str, variant: str, style: str, count: int, _: Language) -> Iterator[Fault]:
    return _count_faults(clean.split(), variant.split(), style, count, "words")


def _check_punctuation(clean: str, variant: str, style: str, count: int, language: Language) -> Iterator[Fault]:
    if re.sub(r"[\W_]+", "", clean) != re.sub(r"[\W_]+", "", variant):
        yield "wrong_edit", "letters or digits differ, not only marks and spaces"
        return
    yield from _count_faults(clean, variant, style, count, "marks or spaces")
    old = {word.lower() for word in letter_runs(clean)}
    for word in dict.fromkeys(letter_runs(variant)):
        if word.lower() not in old and is_real_word(word, language):
            yield "accidental_real_word", f"{word[:40]!r}, Zipf {zipf(word, language)}"


def _check_framing(clean: str, variant: str, style: str, _: int, language: Language) -> Iterator[Fault]:
    before, request, after = variant.partition(clean.strip()) if clean.strip() else (variant, "", "")
    if not request:
        yield "request_changed", f"{style} does not keep the request word for word"
        if has_two_numbers(clean, language):  # number words, names of operations count as digits do; more may be added
            said, kept = ([w for w in letter_runs(text.lower()) if _is_said(w, language)] for text in (clean, variant))
            left = iter(kept)
            if lost := next((word for word in said if word not in left), None):
                yield "changed_numbers", f"number words differ: {lost!r} is not where it was"
    elif not (before + after).strip():
        yield "no_op", "differs from the clean text in white space alone"
    elif LABEL_COLON.split(clean.rstrip(), 1)[1:] != LABEL_COLON.split(variant.rstrip(), 1)[1:]:
        yield "task_split", "the text after the colon that splits off the task is no longer the same"


def _is_said(word: str, language: Language) -> bool:
    if language is ENGLISH:
        return language.is_number_word(word) or word in ("plus", "minus", "times", "multiplied", "divided")
    return language.is_number_word(word) or language.is_arithmetic_word(word)


def _check_split(clean: str, variant: str, style: str, count: int, _: Language) -> Iterator[Fault]:
    added = variant.count(SOFT_HYPHEN) - clean.count(SOFT_HYPHEN)
    if clean.replace(SOFT_HYPHEN, "") != variant.replace(SOFT_HYPHEN, ""):
        yield "wrong_edit", "more than soft hyphens differ"
    elif added != count:
        yield "edit_count", f"{added} soft hyphens added, {style} means {count}"


_STYLE_CHECKS: dict[str, Callable[[str, str, str, int, Language], Iterator[Fault]]] = {
    **dict.fromkeys(("main", "swap", "missing", "repeated", "two", "three", "noise_words", "real_word"), _check_words),
    "homonym": _check_words,
    "grammar": _check_grammar,
    "punctuation": _check_punctuation,
    "split": _check_split,
    **dict.fromkeys(FRAMING_STYLES, _check_framing),
}
