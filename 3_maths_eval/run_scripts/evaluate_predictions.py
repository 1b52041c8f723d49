"""Score a run's answers to maths prompts, and say what each prompt style changed and how sure that is.

Reads   outputs/<run>/<style>/activations_*.pt (or one style's folder, or one .pt file; the reference format too),
        the prompt file (the run's own copy, or --prompt_file) for the gold answers, and its edit log where there is one
Writes  results/<run>/maths_items.csv        one line per answer: gold, value, rule, status, correct
        results/<run>/maths_summary.csv      per style: accuracy, paired difference to normal, intervals, p values
        results/<run>/maths_flips.csv        answers that turned from right to wrong or back, with both texts
        results/<run>/maths_breakdown.csv    the same by operation, digits, number of edits, token change
        results/<run>/maths_accuracy.png, maths_flips.png, maths_by_edits.png

    python 3_maths_eval/run_scripts/evaluate_predictions.py --run_dir outputs/demo/maths \\
        --results_dir results/demo/maths

The gold answer is the row's `answer`, else the clean prompt's own arithmetic (`12 * 7 =`). Expressions (`2\\sqrt{3}`,
intervals, sets, matrices) are compared by Math-Verify: rule `symbolic`. An answer that cannot be read counts as wrong.
Rows without a readable gold answer are left out of n, and counted; if there is none, stage 3 is skipped.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / place) for place in ("", "../1_utils/run_scripts")]

from command_line import UserError, make_parser, one_line, run_main
from file_output import read_csv, write_csv
from load_json import CLEAN_KEYS, read_prompt_file
from logger import get_logger
from maths.accuracy_tables import accuracy_by_edits, break_down, detectable_differences, find_flips, summarise
from maths.own_scores import with_own_scores
from parse_predictions import Gold, gold_value, judge, number_text, read_gold
from read_predictions import Prediction, predictions_of
from run_store import Run, open_run, row_count, warn_unfinished

if TYPE_CHECKING:
    import pandas as pd

UNREAD = "prompt_not_found"  # status of a response that cannot be told from its prompt
MANY_EDITS = 4
ITEM_COLUMNS = (
    "style", "original_index", "element_index", "sample", "template", "operation", "digits", "result", "edits",
    "token_change", "gold", "value", "rule", "status", "correct", "identical", "cut_off", "prompt", "response",
)  # fmt: skip


class NoReadableGold(UserError):
    """All gold answers are words: nothing is wrong, and there is nothing to score."""


@dataclass(frozen=True)
class Evaluation:
    """The tables of one run, as they are written, and the style that the others are compared with."""

    items: pd.DataFrame
    summary: pd.DataFrame
    flips: pd.DataFrame
    breakdown: pd.DataFrame
    by_edits: pd.DataFrame
    baseline: str
    name: str


# --- public


def evaluate_run(
    run_dir: str | Path,
    prompt_file: str | Path | None = None,
    edits_csv: str | Path | None = None,
    styles: Sequence[str] | None = None,
    style: str | None = None,
    maths_items: str | Path | None = None,
) -> Evaluation:
    """Score a run folder, one style's folder or one .pt file, and compare its styles.

    maths_items: a table of the user's own scores (see own_scores.py), which stands for stage 3's.
    prompt_file: where the run keeps no copy (reference format), or to override it. style: the name of the single style
    in run_dir, where its folder does not carry it. Raises UserError for what is not there and if no row has a gold
    answer, NoReadableGold if all gold answers are words.
    """
    run = open_prompts(open_run(run_dir), prompt_file, style)
    items = score_items(run, _edit_log(run, edits_csv), styles, maths_items)
    warn_unfinished(run, styles)
    baseline = run.clean_style or CLEAN_KEYS[0]
    _report_items(items, baseline)
    detectable = detectable_differences(items, baseline)
    _report_power(detectable, baseline)
    return Evaluation(
        items=items,
        summary=summarise(items, baseline, detectable),
        flips=find_flips(items, baseline),
        breakdown=break_down(items, baseline),
        by_edits=accuracy_by_edits(items, baseline),
        baseline=baseline,
        name=run.name,
    )


def write_evaluation(evaluation: Evaluation, results_dir: str | Path) -> None:
    """Write the CSVs and figures of an evaluation into `results_dir`."""
    from maths.accuracy_plots import plot_accuracy, plot_edits, plot_flips

    folder = Path(results_dir)
    write_csv(folder / "maths_items.csv", evaluation.items.drop(columns="prompt"))
    write_csv(folder / "maths_summary.csv", evaluation.summary)
    write_csv(folder / "maths_flips.csv", evaluation.flips)
    write_csv(folder / "maths_breakdown.csv", evaluation.breakdown)
    title = f"Accuracy by prompt style: {evaluation.name}"
    plot_accuracy(evaluation.summary, folder / "maths_accuracy.png", evaluation.baseline, title)
    if evaluation.summary["right_to_wrong"].notna().any():
        plot_flips(evaluation.summary, folder / "maths_flips.png", evaluation.baseline, f"Flips: {evaluation.name}")
    if len(evaluation.by_edits) > 1:
        plot_edits(evaluation.by_edits, folder / "maths_by_edits.png", f"Accuracy by edits: {evaluation.name}")


# --- the prompts behind the responses


def open_prompts(run: Run, prompt_file: str | Path | None, style: str | None) -> Run:
    """The run with its style named and its rows from `prompt_file`, where these are given."""
    if style is not None:
        if len(run.styles) != 1:
            raise UserError(f"{run.path}: --style names a single style, this run has {', '.join(run.styles)}; drop it")
        run = replace(run, styles={style: next(iter(run.styles.values()))})
    if prompt_file is not None:
        rows = read_prompt_file(prompt_file).rows
        vars(run)["rows"] = rows  # fills the cached property, so that run.row() reads this file
    return run


def has_gold(rows: Sequence[Any]) -> bool:
    """Whether any row of a prompt file has a gold answer that can be read. Without one there is nothing to score."""
    from maths.maths_symbolic import is_expression

    return any(
        gold_value(row.get("answer"), _clean_text(row)) is not None or is_expression(str(row.get("answer") or ""))
        for row in rows
        if isinstance(row, dict)
    )


def _clean_text(row: dict[str, Any]) -> str | None:
    return next((row[key] for key in CLEAN_KEYS if isinstance(row.get(key), str)), None)


@dataclass(frozen=True)
class _Row:
    """What all styles of a row share."""

    clean: str | None
    gold: Gold
    template: str | None
    operation: Any
    digits: Any
    result: Any


def _row_facts(run: Run, index: int, clean: str | None) -> _Row:
    row = run.row(index)
    clean = _clean_text(row) or clean
    template = row.get("_template")
    kinds = [None if row.get(key) is None else str(row[key]) for key in ("_operation", "_digits", "_result")]
    gold = read_gold(row.get("answer"), clean)
    return _Row(clean, gold, None if template is None else str(template), *kinds)


def _edit_log(run: Run, edits_csv: str | Path | None) -> dict[tuple[str, int], int] | None:
    """(style, original index) → number of edits; the log beside the prompt file unless one is named."""
    path = Path(edits_csv) if edits_csv is not None else _log_beside_prompts(run)
    if path is None:
        return None
    hint = "give the *_edits.csv of make_variants.py, or drop --edits_csv"
    log = read_csv(path, ["style", "original_index"], hint)
    return {(str(style), int(index)): int(n) for (style, index), n in log.value_counts().items()}


def _log_beside_prompts(run: Run) -> Path | None:
    for style in run.styles:
        settings = run.settings(style).get("settings", {})
        if settings.get("prompt_file"):
            prompts = Path(settings["prompt_file"])
            log = prompts.with_name(f"{prompts.stem}_edits.csv")
            return log if log.is_file() and _same_prompts(prompts, settings.get("prompt_sha256")) else None
    return None


def _same_prompts(path: Path, sha256: str | None) -> bool:
    """The log belongs to the prompt file as it was when the run was made, not to a later one of the same name."""
    import hashlib

    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256


# --- the items


def score_items(
    run: Run,
    edits: dict[tuple[str, int], int] | None,
    styles: Sequence[str] | None = None,
    maths_items: str | Path | None = None,
) -> pd.DataFrame:
    """maths_items.csv: one line per response, in the order of styles and rows; columns ITEM_COLUMNS."""
    import pandas as pd

    columns: dict[str, list[Any]] = {name: [] for name in ITEM_COLUMNS}
    facts: dict[int, _Row] = {}
    clean_tokens: dict[int, int] = {}
    for style in run.chosen(styles):
        is_clean = style == run.clean_style
        for prediction, tokens, cut_off in _responses(run, style):
            index = prediction.original_index
            if index not in facts:
                facts[index] = _row_facts(run, index, prediction.prompt if is_clean else None)
            if is_clean and tokens is not None:
                clean_tokens[index] = tokens
            line = _item(prediction, facts[index], is_clean) | {
                "edits": _edits_label(edits, style, index, is_clean),
                "token_change": None if is_clean else _change_label(tokens, clean_tokens.get(index)),
                "cut_off": cut_off,
            }
            for name in ITEM_COLUMNS:
                columns[name].append(line[name])
    items = pd.DataFrame(columns)
    if maths_items is not None:
        return with_own_scores(items, Path(maths_items))
    _check_golds(facts, run)
    return items


def _check_golds(facts: dict[int, _Row], run: Run) -> None:
    """Say how many rows have no gold answer that can be read; raise if none has one."""
    words = {index: row.gold.text for index, row in facts.items() if row.gold.text and not row.gold.readable}
    readable = sum(row.gold.readable for row in facts.values())
    example = f"row {min(words) + 1}: {one_line(str(words[min(words)]), 60)!r}" if words else ""
    if words and not readable:
        raise NoReadableGold(f"{run.path}: stage 3 is skipped: no gold answer is a number or an expression ({example})")
    if not readable:
        raise UserError(
            f"{run.path}: no row has a gold answer; give --prompt_file with `answer` (or clean sums such as `12 * 7 =`)"
        )
    if readable < len(facts):
        reason = f"the gold answer of {len(words)} is neither a number nor an expression ({example})" if words else ""
        without = len(facts) - readable - len(words)
        reason += f"{', ' if words else ''}{without} have none" if without else ""
        get_logger("evaluate_predictions").warning(f"{readable} of {len(facts)} rows are scored: {reason}")


def _responses(run: Run, style: str) -> Iterator[tuple[Prediction, int | None, bool | None]]:
    """(prediction, prompt tokens, cut off at the token limit?) of every response of a style."""
    for _, content in run.batches(style):
        mask = content.get("attention_mask")
        tokens = None if mask is None else dict(enumerate(mask.sum(dim=1).tolist()))
        reasons = content.get("finish_reasons")
        places = {int(i): n for n, i in enumerate(content.get("original_indices", range(row_count(content))))}
        for prediction in predictions_of(content, style, run):
            place = places[prediction.original_index]
            reason = reasons[place] if reasons and prediction.sample == 0 else None  # kept for the first sample
            yield prediction, tokens[place] if tokens else None, None if reason is None else reason == "length"


def _item(prediction: Prediction, row: _Row, is_clean: bool) -> dict[str, Any]:
    unread = prediction.response is None
    parsed, correct = judge(prediction.response, prediction.prompt, row.gold)
    return {
        "style": prediction.style,
        "original_index": prediction.original_index,
        "element_index": prediction.element_index,
        "sample": prediction.sample,
        "template": row.template,
        "operation": row.operation,
        "digits": row.digits,
        "result": row.result,
        "gold": number_text(row.gold.number) or row.gold.expression,
        "value": parsed.text if parsed.rule == "symbolic" else number_text(parsed.value),
        "rule": parsed.rule,
        "status": UNREAD if unread else parsed.status,
        "correct": None if unread else correct,
        "identical": not is_clean and row.clean is not None and prediction.prompt == row.clean,
        "prompt": prediction.prompt,
        "response": prediction.response,
    }


def _edits_label(edits: dict[tuple[str, int], int] | None, style: str, index: int, is_clean: bool) -> str | None:
    count = None if edits is None or is_clean else edits.get((style, index))
    if count is None:
        return None
    return str(count) if count < MANY_EDITS else f"{MANY_EDITS} or more"


def _change_label(tokens: int | None, clean: int | None) -> str | None:
    if tokens is None or clean is None:
        return None
    change = tokens - clean
    if change < 0:
        return "fewer"
    return f"+{change}" if 0 < change < 3 else ("0" if change == 0 else "+3 or more")


# --- what is said


def _report_items(items: pd.DataFrame, baseline: str) -> None:
    logger = get_logger("evaluate_predictions")
    statuses = Counter(items["status"])
    told = ", ".join(f"{count} {status}" for status, count in statuses.most_common())
    logger.debug(f"{len(items)} responses in {items['style'].nunique()} styles: {told}")
    if statuses[UNREAD]:
        logger.warning(
            f"{statuses[UNREAD]} responses are not scored: their prompt is not in the decoded text; "
            "give --prompt_file (and --style, where the folder's name is not the style's)"
        )
    if baseline not in set(items["style"]):
        logger.warning(f"no {baseline} style in this run: accuracies are given, but no differences")


def _report_power(detectable: pd.DataFrame, baseline: str) -> None:
    logger = get_logger("evaluate_predictions")
    for line in detectable[detectable["n_paired"] > 0].itertuples():
        logger.debug(
            f"{line.style}: {line.n_paired} pairs in {line.n_clusters} clusters; smallest difference to {baseline} "
            f"that could be detected (80 % power): {line.minimum_detectable_difference:.3f} alone, "
            f"{line.minimum_detectable_difference_adjusted:.3f} among all styles"
        )
    known = detectable["minimum_detectable_difference_adjusted"].dropna()
    if len(known):
        told = " to ".join(dict.fromkeys(f"{value:.3f}" for value in (known.min(), known.max())))
        logger.info(f"smallest difference to {baseline} that could be detected (80 % power, all styles tested): {told}")


def _report_summary(summary: pd.DataFrame) -> None:
    logger = get_logger("evaluate_predictions")
    for line in summary[summary["n"] > 0].itertuples():
        text = f"{line.style}: {line.estimate:.3f} right [{line.ci_low:.3f}, {line.ci_high:.3f}], n = {line.n}"
        if line.p == line.p:
            text += (
                f"; difference {line.difference:+.3f} [{line.difference_ci_low:.3f}, {line.difference_ci_high:.3f}]"
                f", p = {line.p:.3g}, adjusted {line.p_adjusted:.3g}"
            )
        elif line.difference == line.difference:
            text += f"; difference {line.difference:+.3f}, no interval: too few rows, or none differs"
        logger.info(text)


# --- script


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__)
    data = parser.add_argument_group("data")
    data.add_argument("--run_dir", type=Path, required=True, help="run folder, style folder or .pt file")
    data.add_argument("--results_dir", type=Path, help="default: results/<run name>")
    data.add_argument("--styles", nargs="+", help="styles to score; default: all (the clean one always)")
    data.add_argument("--style", help="name of the only style in --run_dir, where its folder does not say it")
    gold = parser.add_argument_group("gold answers")
    gold.add_argument("--prompt_file", type=Path, help="prompt file; default: the copy in the run folder")
    gold.add_argument("--maths_items", type=Path, help="your own scores instead: a CSV with style, original_index, "
                      "correct (1 or 0), and where it has them sample and response")  # fmt: skip
    gold.add_argument(
        "--edits_csv", type=Path, help="edit log; default: <prompt file>_edits.csv where it is still there"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Score a run and write its tables and figures."""
    args = parse_args(argv)
    try:
        evaluation = evaluate_run(
            args.run_dir, args.prompt_file, args.edits_csv, args.styles, args.style, args.maths_items
        )
    except NoReadableGold as skipped:
        get_logger("evaluate_predictions").warning(str(skipped))
        return 0
    folder = args.results_dir or Path("results") / evaluation.name
    write_evaluation(evaluation, folder)
    _report_summary(evaluation.summary)
    get_logger("evaluate_predictions").info(f"wrote {folder}/maths_*.csv and .png")
    return 0 if evaluation.items["correct"].notna().any() else 1


if __name__ == "__main__":
    run_main(main)
