"""Score a run's answers against gold answers that are numbers or expressions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accuracy_sections import accuracy_section
from answer_files import SUMMARY_FILES
from command_line import UserError, one_line
from decomposition import write_decomposition
from gold_words import accepted_texts, has_words
from logger import get_logger
from read_predictions import Prediction
from repair_effect import write_repair_effect
from report_section import write_section
from robustness import write_robustness
from run_store import Run
from scored_answers import Evaluation, evaluate_items, report_summary, run_to_score, score_items, write_evaluation

from maths.gold import Gold, judge, number_text, read_gold
from maths.own_scores import with_own_scores


class NoReadableGold(UserError):
    """All gold answers are words: nothing is wrong, and there is nothing to score."""


def evaluate_run(
    run: Run | str | Path,
    prompt_file: str | Path | None = None,
    edits_csv: str | Path | None = None,
    styles: Sequence[str] | None = None,
    style: str | None = None,
    maths_items: str | Path | None = None,
) -> Evaluation:
    """Score a run (or the run folder, style's folder or .pt file at a path), and compare its styles.

    prompt_file, style: see `run_to_score`. maths_items: a table of the user's own scores to use instead of stage 3's
    (own_scores.py). Raises UserError for missing files and if no row has a gold answer, NoReadableGold if all gold
    answers are words.
    """
    run = run_to_score(run, prompt_file, style)
    scorer = NumberScorer()
    items = score_items(run, scorer, edits_csv, styles)
    if maths_items is None or items.empty:
        _check_golds(run, scorer.golds)
    if maths_items is not None:
        items = with_own_scores(items, Path(maths_items))
    return evaluate_items(run, items)


def write_maths(run: Run, evaluation: Evaluation, folder: Path, own_scores: bool = False) -> None:
    """Write and log the tables and figures of stage 3. own_scores: the user scored the answers in words, too."""
    write_evaluation(evaluation, folder, "maths")
    report_summary(evaluation.summary)
    # Over both stages' answers: match_answers.py makes it anew.
    (folder / SUMMARY_FILES[0]).unlink(missing_ok=True)
    if whole := own_scores or not has_words(run.prompt_rows):
        write_decomposition(run, evaluation.items, evaluation.clean_style, folder)
        write_robustness(run, evaluation.items, evaluation.clean_style, folder)
        write_repair_effect(evaluation.items, evaluation.clean_style, folder)
    else:
        others = "decomposition.csv, repair_summary.csv and robustness_summary.csv"
        get_logger().info(f"{others} are written by match_answers.py, over the answers in words too")
    write_section(folder, accuracy_section("maths", whole))


class NumberScorer:
    """Scores an answer against the number or expression of its row; `golds`: those of the rows so far."""

    def __init__(self) -> None:
        self.golds: dict[int, Gold] = {}

    def __call__(self, prediction: Prediction, row: dict[str, Any], clean_prompt: str | None) -> dict[str, Any]:
        """The columns of maths_items.csv that are about the answer."""
        index = prediction.original_index
        if index not in self.golds:
            self.golds[index] = read_gold(row.get("answer"), clean_prompt)
        gold = self.golds[index]
        parsed, correct = judge(prediction.response, prediction.prompt, gold)
        return {
            "gold": number_text(gold.number) or gold.expression,
            "value": parsed.text if parsed.rule == "symbolic" else number_text(parsed.value),
            "rule": parsed.rule,
            "status": parsed.status,
            "correct": correct,
        }


def _check_golds(run: Run, golds: dict[int, Gold]) -> None:
    """Warn how many rows have no readable gold answer; raise if none has one."""
    unread = {index: gold.text for index, gold in golds.items() if gold.text and not gold.readable}
    words = [index for index in unread if accepted_texts(run.row(index).get("answer"))]
    odd = [index for index in unread if index not in words]
    readable = sum(gold.readable for gold in golds.values())
    if unread and not readable:
        by_words = "; match_answers.py scores answers in words" if words else ""
        raise NoReadableGold(
            f"{run.path}: stage 3 is skipped: no gold answer is a number or an expression "
            f"({_example(unread)}){by_words}"
        )
    if not readable:
        raise UserError(
            f"{run.path}: no row has a gold answer; give --prompt_file with `answer` (or clean sums such as `12 * 7 =`)"
        )
    reasons = [f"{len(words)} have an answer in words, which match_answers.py scores"] if words else []
    if odd:
        reasons.append(
            f"the gold answer of {len(odd)} is neither a number nor an expression "
            f"({_example({index: unread[index] for index in odd})}): write it as a list if it is words"
        )
    if without := len(golds) - readable - len(unread):
        reasons.append(f"{without} have none")
    if reasons:
        get_logger().warning(f"{readable} of {len(golds)} rows are scored: {', '.join(reasons)}")


def _example(texts: dict[int, str]) -> str:
    return f"row {min(texts) + 1}: {one_line(str(texts[min(texts)]), 60)!r}"
