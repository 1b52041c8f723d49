"""Answers in words: what a response answers, and whether that is one of the accepted texts of its row.

Three measures, from strict to lenient: `exact_match` (the answer is an accepted text and no more), `starts_with` (it
begins with one, whole words) and `contains` (it has one somewhere). docs/METHODS.md has the rules.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from accuracy_sections import accuracy_section
from accuracy_tables import read_items, summarise
from answer_files import SUMMARY_FILES, item_files
from command_line import UserError
from decomposition import write_decomposition
from file_output import write_csv
from gold_words import accepted_texts
from logger import get_logger
from read_predictions import Prediction
from repair_effect import write_repair_effect
from report_section import write_section
from robustness import write_robustness
from run_on import run_on_places, without_echo
from run_store import Run
from scored_answers import Evaluation, evaluate_items, report_summary, run_to_score, score_items, write_evaluation
from thinking_text import without_thinking

from semantics.text_tokens import tokens_of

MEASURES = ("exact_match", "starts_with", "contains")
LETTERS = "ABCDEFGHIJ"
MAX_VALUE = 80  # characters of a wrong answer that are kept
_ARTICLES = ("a", "an", "the")
_IN_WORDS = "'’.-"  # signs that belong to a word (U.S., l'eau, twenty-one): left out, they do not divide it
_ACCENT = re.compile("(?<!и)\u0306|[\u0300-\u0305\u0307-\u036f]")  # й is no accented и
_LEAD_IN = re.compile(
    r"\A[\s\"'*_]*(?:(?:so|thus|therefore),? )?(?:the )?(?:correct |right |final |best )?"
    r"(?:answer|option|choice)(?: is(?!\w)[\s:]*|\s?:\s*)",
    re.IGNORECASE,
)
_OPTION = re.compile(r"(?<![^\W_])\(?(?P<letter>[A-J])[).:\]]\s")
_OPENING = r"\A[\s\"'*_(\[]*"
_ONLY_LETTER = re.compile(rf"{_OPENING}(?P<letter>[A-Ja-j])[\s\"'*_)\].:,;!]*\Z")
_MARKED_LETTER = re.compile(rf"{_OPENING}(?P<letter>[A-Ja-j])[*_]*[).:\],;]")
_FIRST_LETTER = re.compile(rf"{_OPENING}(?P<letter>[A-J])\s")
_ANY_LETTER = re.compile(r"(?<!\w)(?:(?P<letter>[B-HJ])(?!\w)|[(\[*](?P<marked>[AI])[)\]*])")


class Matched(NamedTuple):
    """What an answer was found to be: the three measures, the answer as it is compared, and how it was found."""

    exact_match: bool
    starts_with: bool
    contains: bool
    value: str | None
    rule: str


def evaluate_answers(
    run: Run | str | Path,
    prompt_file: str | Path | None = None,
    edits_csv: str | Path | None = None,
    styles: Sequence[str] | None = None,
    style: str | None = None,
    measure: str = "starts_with",
) -> Evaluation:
    """Score the answers in words of a run, and compare its styles; `measure` decides what is correct.

    prompt_file, style: see `run_to_score`. Raises UserError if no row has an answer in words.
    """
    run = run_to_score(run, prompt_file, style)
    scorer = WordScorer(run, measure)
    items = score_items(run, scorer, edits_csv, styles)
    if items.empty:
        raise UserError(
            f"{run.path}: no row has an `answer` in words; numbers and expressions are scored by "
            "evaluate_predictions.py, and a number that is to be matched as a word is written as a list"
        )
    scored, others = items["original_index"].nunique(), scorer.without_words
    if numbers := [index for index in others if run.row(index).get("answer") not in (None, "")]:
        get_logger().warning(
            f"{scored} of {scored + len(others)} rows are scored: the answers of {len(numbers)} are numbers or "
            "expressions, which evaluate_predictions.py scores"
        )
    return evaluate_items(run, items)


def write_answers(run: Run, evaluation: Evaluation, folder: Path) -> None:
    """Write and log the tables and figures; with stage 3's items in the folder, those over both stages' answers too."""
    write_evaluation(evaluation, folder, "answers")
    report_summary(evaluation.summary)
    items, whole = evaluation.items, folder / SUMMARY_FILES[0]
    if len(files := item_files(folder)) > 1:
        items = read_items(files)
        write_csv(whole, summarise(items, evaluation.clean_style))
    else:
        whole.unlink(missing_ok=True)  # of a run with answers that stage 3 scored
    write_decomposition(run, items, evaluation.clean_style, folder)
    write_robustness(run, items, evaluation.clean_style, folder)
    write_repair_effect(items, evaluation.clean_style, folder)
    write_section(folder, accuracy_section("answers", whole=True))


class WordScorer:
    """Scores an answer against the accepted texts of its row; `without_words`: rows that have none."""

    def __init__(self, run: Run, measure: str) -> None:
        self.measure = measure
        self.without_words: set[int] = set()
        self._first_line = {style: is_completion(run, style) for style in run.styles}

    def __call__(self, prediction: Prediction, row: dict[str, Any], clean_prompt: str | None) -> dict[str, Any] | None:
        """The columns of answers_items.csv that are about the answer; None if the row has no answer in words."""
        accepted = accepted_texts(row.get("answer"))
        if not accepted:
            self.without_words.add(prediction.original_index)
            return None
        prompts = [text for text in (prediction.prompt, clean_prompt) if text]
        answer = answer_text(prediction.response or "", prompts, self._first_line[prediction.style])
        options = options_of(clean_prompt or prediction.prompt or "")
        is_choice = len(accepted) == 1 and accepted[0] in options
        found = match_letter(answer, accepted[0], options) if is_choice else match_words(answer, accepted)
        return {
            "gold": accepted[0],
            "value": found.value,
            "rule": found.rule,
            "status": "none" if found.value is None else "parsed",
            "correct": getattr(found, self.measure),
            **{name: getattr(found, name) for name in MEASURES},
        }


def is_completion(run: Run, style: str) -> bool:
    """Whether only the first line of a response is the answer: it follows few-shot text, or has no chat template."""
    settings = run.settings(style).get("settings", {})
    return not settings.get("apply_chat_template") or bool(settings.get("few_shot_text"))


# --- what is the answer


def answer_text(response: str, prompts: Sequence[str], first_line: bool) -> str:
    """The part of a response that is its answer.

    Thinking, a copy of one of the `prompts` before the answer, another turn after it and a lead-in (`The answer is`)
    are left out. first_line: and all after the first line that is not empty.
    """
    first = prompts[0] if prompts else ""
    text = without_thinking(response, first)
    for prompt in prompts:
        text = without_echo(text, prompt.strip())
    turns = (place for place, is_turn in run_on_places(text, first) if is_turn)
    text = text[: next(turns, None)].strip()
    if first_line:
        text = text.partition("\n")[0]
    lead = _LEAD_IN.match(text)
    return text[lead.end() if lead else 0 :].strip()


def normalised(text: str) -> str:
    """SQuAD's normalisation (Rajpurkar et al. 2016): small letters, no punctuation, no English articles, single spaces.

    Beyond it: Unicode's form NFC, accents left out, and punctuation between two letters that is not part of a word
    (`Paris/France`, `Paris—the`) is a space. Articles stay where there is nothing else.
    """
    text = unicodedata.normalize("NFC", text).casefold()
    text = unicodedata.normalize("NFC", _ACCENT.sub("", unicodedata.normalize("NFD", text)))
    kept = []
    for place, sign in enumerate(text):
        kind = unicodedata.category(sign)
        if kind[0] == "P" or sign in string.punctuation:
            divides = sign not in _IN_WORDS and text[place - 1 : place].isalpha() and text[place + 1 :][:1].isalpha()
            kept.append(" " if divides else "")
        elif kind != "Cf":
            kept.append(sign)
    words = "".join(kept).split()
    return " ".join([word for word in words if word not in _ARTICLES] or words)


@lru_cache(maxsize=65536)
def compared_words(text: str) -> tuple[str, ...]:
    """The words of a text as they are compared; a single sign in scripts without spaces between words."""
    return tuple(tokens_of(normalised(text)))


# --- is it right


def match_words(answer: str, accepted: Sequence[str]) -> Matched:
    """Compare an answer with the accepted texts, whole words.

    `value` is the first accepted text if the answer begins with any of them, so that two ways of saying it are the
    same value; else the normalised answer.
    """
    own = compared_words(answer)
    golds = [gold for text in accepted if (gold := compared_words(text))]
    exact, starts = own in golds, any(own[: len(gold)] == gold for gold in golds)
    contains = any(_has(own, gold) for gold in golds)
    value = accepted[0] if starts else normalised(answer)[:MAX_VALUE] or None
    rule = "exact_match" if exact else "starts_with" if starts else "contains" if contains else "none"
    return Matched(exact, starts, contains, value, rule)


def _has(words: Sequence[str], part: Sequence[str]) -> bool:
    return any(words[place : place + len(part)] == part for place in range(len(words) - len(part) + 1))


@lru_cache(maxsize=65536)
def options_of(prompt: str) -> dict[str, str]:
    """{letter: text} of the options in a prompt: `A) Paris B) Rome`, `(A) …`, `A. …`, in one line or several.

    Empty with fewer than two, or if they do not begin with A.
    """
    marks: list[re.Match[str]] = []
    for mark in _OPTION.finditer(prompt):
        if mark["letter"] == LETTERS[len(marks) : len(marks) + 1]:
            marks.append(mark)
    if len(marks) < 2:
        return {}
    ends = [*(mark.start() for mark in marks[1:]), len(prompt)]
    texts = [prompt[mark.end() : end].strip().partition("\n")[0] for mark, end in zip(marks, ends, strict=True)]
    return {mark["letter"]: text.strip(" ,;.") for mark, text in zip(marks, texts, strict=True)}


def match_letter(answer: str, gold: str, options: dict[str, str]) -> Matched:
    """Compare an answer with the letter of the right option.

    exact_match: the letter alone. starts_with: it begins with the letter (`B)`, `B Paris`) or with the option's text.
    contains: it has the letter or the option's text somewhere.
    """
    chosen = chosen_letter(answer, options)
    letters = {mark["letter"] or mark["marked"] for mark in _ANY_LETTER.finditer(answer)}
    text = compared_words(options[gold])
    starts = chosen == gold
    exact = starts and _ONLY_LETTER.match(answer) is not None
    contains = starts or gold in letters or (bool(text) and _has(compared_words(answer), text))
    return Matched(exact, starts, contains, chosen, "none" if chosen is None else "letter")


def chosen_letter(answer: str, options: dict[str, str]) -> str | None:
    """The letter of the option that an answer begins with, by its letter or its text; None if it begins with none."""
    for pattern in (_ONLY_LETTER, _MARKED_LETTER):
        if (found := pattern.match(answer)) and (letter := found["letter"].upper()) in options:
            return letter
    texts = {letter: words for letter, text in options.items() if (words := compared_words(text))}
    own = compared_words(answer)
    if found := _FIRST_LETTER.match(answer):  # `B Paris` names B; `A city in …` and `I think …` do not name A and I
        text, rest = texts.get(found["letter"], ()), compared_words(answer[found.end() :])
        if text and rest[: len(text)] == text:
            return found["letter"]
    begun = [letter for letter, words in texts.items() if own[: len(words)] == words]
    return max(begun, key=lambda letter: len(texts[letter]), default=None)
