"""Score the answers of a run against gold answers: one line per answer, then tables and figures.

A stage says how one answer is scored. Pairing, edits, lengths, statistics and files are the same for all.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from accuracy_plots import plot_accuracy, plot_edits, plot_flips
from accuracy_tables import accuracy_by_edits, break_down, detectable_differences, find_flips, summarise
from command_line import UserError
from file_output import read_csv, write_csv
from load_json import CLEAN_KEYS, read_prompt_file
from logger import get_logger
from read_predictions import Prediction, predictions_of
from run_store import Run, open_run
from style_names import is_again
from style_rows import clean_prompt

UNREAD = "prompt_not_found"  # status of a response that cannot be told from its prompt
MANY_EDITS = 4

# (prediction, row of the prompt file, clean prompt) -> gold, value, rule, status, correct and columns of the stage's
# own; None: the row is another stage's.
Score = Callable[[Prediction, dict[str, Any], str | None], dict[str, Any] | None]


@dataclass(frozen=True)
class Evaluation:
    """The tables of one run, as they are written, and the style that the others are compared with."""

    items: pd.DataFrame
    summary: pd.DataFrame
    flips: pd.DataFrame
    breakdown: pd.DataFrame
    by_edits: pd.DataFrame
    clean_style: str
    name: str


def run_to_score(run: Run | str | Path, prompt_file: str | Path | None = None, style: str | None = None) -> Run:
    """The run at a path, with the prompt file and the name of its single style that the user gives.

    prompt_file: if the run keeps no copy (reference format), or to override it. style: the name of a single style,
    if its folder does not carry it.
    """
    run = run if isinstance(run, Run) else open_run(run)
    if style is not None:
        if len(run.styles) != 1:
            raise UserError(f"{run.path}: --style names a single style, this run has {', '.join(run.styles)}; drop it")
        run = replace(run, styles={style: next(iter(run.styles.values()))})
    if prompt_file is not None:
        # Fills the cached property, so that run.row() reads this file.
        vars(run)["prompt_rows"] = read_prompt_file(prompt_file).rows
    return run


def evaluate_items(run: Run, items: pd.DataFrame) -> Evaluation:
    """Compare the styles of a run by its scored answers."""
    clean = run.clean_style or CLEAN_KEYS[0]
    _report_items(items, clean)
    detectable = detectable_differences(items, clean)
    _report_power(detectable, clean)
    summary, flips = summarise(items, clean, detectable), find_flips(items, clean)
    return Evaluation(items, summary, flips, break_down(items, clean), accuracy_by_edits(items, clean), clean, run.name)


def write_evaluation(evaluation: Evaluation, folder: Path, kind: str) -> None:
    """Write the CSVs and figures of an evaluation into `folder`. kind: their names begin with it, maths or answers."""
    clean, name, summary = evaluation.clean_style, evaluation.name, evaluation.summary
    write_csv(folder / f"{kind}_items.csv", evaluation.items.drop(columns="prompt"))
    write_csv(folder / f"{kind}_summary.csv", summary)
    write_csv(folder / f"{kind}_flips.csv", evaluation.flips)
    write_csv(folder / f"{kind}_breakdown.csv", evaluation.breakdown)
    plot_accuracy(summary, folder / f"{kind}_accuracy.png", clean, f"Accuracy by prompt style: {name}")
    if summary["right_to_wrong"].notna().any():
        plot_flips(summary, folder / f"{kind}_flips.png", clean, f"Flips: {name}")
    if len(evaluation.by_edits) > 1:
        plot_edits(evaluation.by_edits, folder / f"{kind}_by_edits.png", f"Accuracy by edits: {name}")


# --- the items


def score_items(
    run: Run, score: Score, edits_csv: str | Path | None = None, styles: Sequence[str] | None = None
) -> pd.DataFrame:
    """One line per response that `score` scores, in the order of styles and rows.

    edits_csv: the log of the edits; default: the one beside the prompt file, if that file is unchanged.
    """
    edits = _edit_counts(run, edits_csv)
    lines: list[dict[str, Any]] = []
    clean_prompts: dict[int, str | None] = {}
    clean_tokens: dict[int, int | None] = {}
    for style in run.chosen(styles):
        is_clean = style == run.clean_style
        for prediction, tokens, cut_off, logprobs in _responses(run, style):
            index, row = prediction.original_index, run.row(prediction.original_index)
            if index not in clean_prompts:
                clean_prompts[index] = clean_prompt(run, index) or (prediction.prompt if is_clean else None)
            if is_clean:
                clean_tokens[index] = tokens
            scored = score(prediction, row, clean_prompts[index])
            if scored is None:
                continue
            if prediction.response is None:
                scored |= {"status": UNREAD, "correct": None}
            kinds = {name: row.get(f"_{name}") for name in ("template", "operation", "digits", "result")}
            same = not is_clean and clean_prompts[index] is not None and prediction.prompt == clean_prompts[index]
            same &= not is_again(style)  # its prompts are all those of the clean form
            lines.append(
                {
                    "style": style,
                    "original_index": index,
                    "element_index": prediction.element_index,
                    "sample": prediction.sample,
                    **{name: None if kind is None else str(kind) for name, kind in kinds.items()},
                    "edits": None if is_clean or edits is None else _edits_label(edits[style, index]),
                    "token_change": None if is_clean else _change_label(tokens, clean_tokens.get(index)),
                    **scored,
                    **logprobs,
                    "identical": same,
                    "cut_off": cut_off,
                    "prompt": prediction.prompt,
                    "response": prediction.response,
                }
            )
    return pd.DataFrame(lines)


def _responses(run: Run, style: str) -> Iterator[tuple[Prediction, int | None, bool | None, dict[str, float]]]:
    """(prediction, prompt tokens, cut off at the token limit?, see `answer_logprobs`) of every response of a style."""
    for _, content in run.batches(style):
        mask = content.get("attention_mask")
        places = {index: place for place, index in enumerate(content["original_indices"])}
        tokens = [None] * len(places) if mask is None else mask.sum(dim=1).tolist()
        reasons = content.get("finish_reasons")
        logprobs = answer_logprobs(content)
        for prediction in predictions_of(content, style, run):
            place = places[prediction.original_index]
            reason = reasons[place] if reasons and prediction.sample == 0 else None  # kept for the first sample
            cut_off = None if reason in (None, "given") else reason == "length"
            yield prediction, tokens[place], cut_off, {name: values[place] for name, values in logprobs.items()}


def answer_logprobs(content: dict[str, Any]) -> dict[str, np.ndarray]:
    """Of each row of a .pt file [B], NaN without an accepted answer; {} if the run has no --answer_logprobs.

    answer_logprob             log probability of the likeliest accepted answer
    answer_logprob_per_token   the largest mean over an accepted answer's tokens
    """
    if "answer_logprobs" not in content:
        return {}
    sums, counts = content["answer_logprobs"].double().numpy(), content["answer_token_counts"].numpy()
    values = {"answer_logprob": sums, "answer_logprob_per_token": sums / np.maximum(counts, 1)}
    return {name: np.fmax.reduce(several, axis=1, initial=np.nan) for name, several in values.items()}


def _edit_counts(run: Run, edits_csv: str | Path | None) -> Counter[tuple[str, int]] | None:
    """Edits of each (style, original index) in the edit log: the one named, else the one beside the prompt file."""
    path = Path(edits_csv) if edits_csv is not None else _log_beside_prompts(run)
    if path is None:
        return None
    hint = "give the *_edits.csv of make_variants.py, or drop --edits_csv"
    log = read_csv(path, ["style", "original_index"], hint)
    return Counter(zip(log["style"], log["original_index"], strict=True))


def _log_beside_prompts(run: Run) -> Path | None:
    """The edit log of the run's prompt file, if that file is still as it was when the run was made."""
    for record in map(run.settings, run.styles):
        known = record.get("settings", {}).get("prompt_sha256")
        for place in record.get("environments", []):
            prompts = Path(place.get("prompt_file", ""))
            log = prompts.with_name(f"{prompts.stem}_edits.csv") if prompts.name else prompts
            if log.is_file() and prompts.is_file() and hashlib.sha256(prompts.read_bytes()).hexdigest() == known:
                return log
    return None


def _edits_label(count: int) -> str | None:
    return None if not count else str(count) if count < MANY_EDITS else f"{MANY_EDITS} or more"


def _change_label(tokens: int | None, clean: int | None) -> str | None:
    if tokens is None or clean is None:
        return None
    change = tokens - clean
    return "fewer" if change < 0 else "0" if change == 0 else f"+{change}" if change < 3 else "+3 or more"


# --- messages


def _report_items(items: pd.DataFrame, clean: str) -> None:
    statuses = Counter(items["status"])
    counts = ", ".join(f"{count} {status}" for status, count in statuses.most_common())
    get_logger().debug(f"{len(items)} responses in {items['style'].nunique()} styles: {counts}")
    if statuses[UNREAD]:
        get_logger().warning(
            f"{statuses[UNREAD]} responses are not scored: their prompt is not in the decoded text; "
            "give --prompt_file (and --style, where the folder's name is not the style's)"
        )
    if clean not in set(items["style"]):
        get_logger().warning(f"no {clean} style in this run: accuracies are given, but no differences")


def _report_power(detectable: pd.DataFrame, clean: str) -> None:
    for line in detectable[detectable["n_paired"] > 0].itertuples():
        get_logger().debug(
            f"{line.style}: {line.n_paired} pairs in {line.n_clusters} clusters; smallest difference to {clean} "
            f"that could be detected: {line.minimum_detectable_difference_adjusted:.3f}"
        )
    known = detectable["minimum_detectable_difference_adjusted"].dropna()
    if len(known):
        limits = " to ".join(dict.fromkeys(f"{value:.3f}" for value in (known.min(), known.max())))
        get_logger().info(
            f"smallest difference to {clean} that could be detected (80 % power, by the adjusted p): {limits}"
        )


def report_summary(summary: pd.DataFrame) -> None:
    """Log one line per style."""
    for line in summary[summary["n"] > 0].itertuples():
        text = f"{line.style}: {line.estimate:.3f} right [{line.ci_low:.3f}, {line.ci_high:.3f}], n = {line.n}"
        if line.p == line.p:
            text += (
                f"; difference {line.difference:+.3f} [{line.difference_ci_low:.3f}, {line.difference_ci_high:.3f}]"
                f", p = {line.p:.3g}, adjusted {line.p_adjusted:.3g}"
            )
        elif line.difference == line.difference:
            text += f"; difference {line.difference:+.3f}, no interval: too few rows, or none differs"
        get_logger().info(text)
