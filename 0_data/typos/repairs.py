"""Prompts corrected before they are asked, by a spell checker or a model, and how many of their words that puts right.

A repair sees the style's text alone, never the clean text. Only the count compares with the clean text, afterwards.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import pandas as pd
import regex
from chat_client import ChatClient
from command_line import UserError
from load_json import TYPO_STYLES, PromptFile, text_problem
from rapidfuzz import process
from rapidfuzz.distance import DamerauLevenshtein
from spellchecker import SpellChecker
from style_names import REPAIRED, dose_of, repaired_style
from token_spans import Span, aligned_words

from typos.languages import LANGUAGES, language_of
from typos.protection import touches
from typos.rephrasing import Job, answer_jobs, messages_for
from typos.style_rules import spans_to_keep, verify_repair
from typos.variants import bad_row, clean_text
from typos.words import composed, form_of, in_case_of

WORD_LISTS = frozenset(SpellChecker.languages())  # codes of languages
LOG_COLUMNS = ["style", "original_index", "element_index", "clean_word", "typo", "repaired", "outcome"]
REQUEST = (
    "Correct the spelling mistakes of the prompt. Keep everything else as it is. If there is no mistake, repeat the "
    "prompt unchanged."
)
# Words of letters, with apostrophes inside, between white space, punctuation or symbols: the words of `words_of`.
_WORD = regex.compile(r"(?<![^\s\p{P}\p{S}])\p{L}[\p{L}\p{M}]*(?:['’]\p{L}[\p{L}\p{M}]*)*(?![^\s\p{P}\p{S}])")


def styles_to_repair(prompts: PromptFile, styles: Sequence[str] | None) -> list[str]:
    """The styles of `--styles`; default: the typo styles and doses of the file. UserError for one it lacks."""
    chosen = styles or [style for style in prompts.style_counts if style in TYPO_STYLES or dose_of(style) is not None]
    if not chosen:
        raise UserError(f"{prompts.path}: no row has a typo style; make them with make_variants.py, or name --styles")
    for style in chosen:
        if repaired_style(style) is not None:
            raise UserError(f"--styles {style}: it is repaired already; name the style that it was made from")
        prompts.prompts(style, 0)  # raises for a key that no row has
    return list(dict.fromkeys(chosen))


def to_repair(rows: Sequence[Any], styles: Sequence[str]) -> Iterator[tuple[int, dict[str, Any], str]]:
    """(original index, row, style) of every usable prompt."""
    for index, row in enumerate(rows):
        if bad_row(row) is None:
            yield from ((index, row, style) for style in styles if style in row and text_problem(row[style]) is None)


def without_repairs(rows: Sequence[Any], styles: Sequence[str]) -> list[Any]:
    """Copies of the rows without the `repaired@<style>` of `styles`."""
    old = {f"{REPAIRED}{style}" for style in styles}
    return [{k: v for k, v in row.items() if k not in old} if isinstance(row, dict) else row for row in rows]


# --- a spell checker


def repair_by_spelling(rows: Sequence[Any], styles: Sequence[str]) -> list[Any]:
    """Rows with `repaired@<style>` added for each style that they have; the given rows are left as they are.

    Each row is corrected in its own language. One whose language has no word list gets no repair.
    """
    rows_out = without_repairs(rows, styles)
    for index, row, style in to_repair(rows, styles):
        if (code := language_of(row).code) in WORD_LISTS:
            kept = spans_to_keep(row[style], row)
            rows_out[index][f"{REPAIRED}{style}"] = correct_words(row[style], kept, corrector(code))
    return rows_out


def without_word_list(rows: Sequence[Any], styles: Sequence[str]) -> Counter[str]:
    """{language: prompts that the spell checker cannot correct, because it has no word list of that language}."""
    languages = (language_of(row) for _, row, _ in to_repair(rows, styles))
    return Counter(language.name for language in languages if language.code not in WORD_LISTS)


def correct_words(text: str, kept: list[Span], correct: Callable[[str], str]) -> str:
    """`text` with `correct(word)` in the place of each word outside the spans `kept`, in Unicode's form of the text."""
    form = form_of(text)

    def replaced(match: regex.Match[str]) -> str:
        word = composed(match[0])
        corrected = word if touches(kept, *match.span()) else correct(word)
        return match[0] if corrected == word else unicodedata.normalize(form, corrected)

    return _WORD.sub(replaced, text)


@cache
def corrector(code: str) -> Callable[[str], str]:
    """A function that corrects one word of the language `code` and keeps its capital.

    A word stays if the list of the language has it, or lacks one of its letters. Another becomes the most frequent word
    of the list at distance 1, or else at distance 2 (pyspellchecker's rule, after Norvig: insertions, deletions,
    replacements, transpositions). One that differs in accents alone comes first. Without a candidate the word stays.
    Single letters and words with a capital after the first letter (NASA, iPhone) stay, as most spell checkers do.
    If the list lacks a word in ’s, or one that begins with an elision (l’eau), the rest of it is corrected.
    """
    spelling, elision = _Spelling(code), regex.compile(LANGUAGES[code].before_word or "(?!)")

    @cache
    def correct(word: str) -> str:
        known = word.lower().replace("’", "'")
        if known in spelling or not spelling.word_frequency.letters.issuperset(known):
            return word
        if elided := elision.match(word):
            return elided[0] + correct(word[elided.end() :])
        if len(word) == 1 or word[1:] != word[1:].lower():
            return word
        if known.endswith("'s") and len(known) > len("a's"):
            return correct(word[:-2]) + word[-2:]
        best = spelling.correction(known)
        if best is None or best == known:
            return word
        return in_case_of(word, best.replace("'", "’") if "’" in word else best)

    return correct


class _Spelling(SpellChecker):
    """pyspellchecker, with the words at distance 2 found by rapidfuzz (the same, in 0.1 s instead of 5 s).

    Candidates are in alphabetical order, so that of two words with one frequency the same is chosen in every run.
    """

    def __init__(self, language: str) -> None:
        super().__init__(language, distance=1)
        self._words = sorted(self.word_frequency.dictionary)

    def candidates(self, word: Any) -> Any:
        if (found := super().candidates(word)) is not None:
            return sorted(found)
        scorer = DamerauLevenshtein.distance
        near = process.extract(word, self._words, scorer=scorer, score_cutoff=2, limit=None)
        return sorted(known for known, *_ in near) or None


# --- a language model


def repair_jobs(rows: Sequence[Any], styles: Sequence[str]) -> list[Job]:
    """One job for each prompt to repair; what is protected is listed for the model."""
    jobs = []
    for index, row, style in to_repair(rows, styles):
        text = row[style]
        kept = [text[start:end] for start, end in spans_to_keep(text, row)]
        jobs.append(Job(index, row, f"{REPAIRED}{style}", text, messages_for(REQUEST, text, kept)))
    return jobs


def repair_by_model(
    rows: Sequence[Any], styles: Sequence[str], client: ChatClient, attempts: int, max_tokens: int
) -> tuple[list[Any], list[dict[str, Any]]]:
    """(rows with the accepted repairs, one log line an answer). A prompt without an accepted answer has no repair."""

    def reasons_of(job: Job, text: str) -> list[str]:
        if problem := text_problem(text):
            return [problem]
        return [f"{kind}: {detail}" for kind, detail in verify_repair(job.text, text, job.row)]

    rows_out = without_repairs(rows, styles)
    log = answer_jobs(repair_jobs(rows, styles), rows_out, client, attempts, max_tokens, reasons_of)
    return rows_out, log


# --- what it put right


def count_repairs(rows: Sequence[Any], styles: Sequence[str]) -> pd.DataFrame:
    """One line for each word that is wrong in a style or after its repair, beside the clean word.

    Words are aligned as for the region `edited`. outcome: `put_right`; `left` (wrong, not touched); `changed` (to
    another wrong word); `spoilt` (it was right). A word that was added has no clean word, one left out has no typo.
    """
    lines = []
    for index, row, style in to_repair(rows, styles):
        if (repaired := row.get(f"{REPAIRED}{style}")) is None:
            continue
        before, after = (_slots(clean_text(row), text) for text in (row[style], repaired))
        for place in sorted(before.keys() | after.keys()):
            (clean, typo, wrong), (_, now, still) = (
                before.get(place, ("", "", False)),
                after.get(place, ("", "", False)),
            )
            if wrong or still:
                outcome = "spoilt" if not wrong else "put_right" if not still else "left" if typo == now else "changed"
                own_id = row.get("element_index", index + 1)
                lines.append((style, index, own_id, clean, typo, now, outcome))
    return pd.DataFrame(lines, columns=LOG_COLUMNS)


def _slots(clean: str, text: str) -> dict[tuple[int, bool], tuple[str, str, bool]]:
    """{place: (clean word, word of `text`, do they differ?)}; (n, False) is clean word n, (n, True) what follows it."""
    slots: dict[tuple[int, bool], tuple[str, str, bool]] = {}
    added: dict[int, list[str]] = {}
    number = -1
    for own, twin, edited in aligned_words(clean, text):
        word = text[slice(*twin)] if twin else ""
        if own is not None:
            number += 1
            slots[number, False] = (clean[slice(*own)], word, edited)
        else:
            added.setdefault(number, []).append(word)
    return slots | {(place, True): ("", " ".join(words), True) for place, words in added.items()}


def summary_lines(rows: Sequence[Any], styles: Sequence[str], log: pd.DataFrame) -> list[str]:
    """One line for each style: prompts, words put right of those wrong, words spoilt, prompts that are clean again."""
    lines = []
    for style in styles:
        asked = [row for _, row, _ in to_repair(rows, [style])]
        repaired = [row for row in asked if f"{REPAIRED}{style}" in row]
        clean = sum(row[f"{REPAIRED}{style}"] == clean_text(row) for row in repaired)
        counts = Counter(log.loc[log["style"] == style, "outcome"])
        wrong = counts["put_right"] + counts["left"] + counts["changed"]
        lines.append(
            f"{style}: {counts['put_right']} of {wrong} wrong words put right, {counts['left']} left, "
            f"{counts['changed']} changed to another wrong word, {counts['spoilt']} right words spoilt; "
            f"{clean} of {len(repaired)} prompts are as the clean form"
            + (f"; {len(asked) - len(repaired)} more have no repair" if len(asked) > len(repaired) else "")
        )
    return lines
