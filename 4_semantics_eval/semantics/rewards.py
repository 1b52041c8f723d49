"""Score the responses of a run with a reward model: one line per response, aggregates, and a summary of the styles."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from command_line import UserError
from file_output import write_csv, write_json, write_text
from logger import get_logger
from paired_stats import paired_summary
from read_predictions import Prediction, iter_predictions
from report_section import write_section
from run_store import Run, open_run
from style_names import is_again
from style_rows import clean_prompt
from tqdm import tqdm

from semantics.answer_sections import REWARDS
from semantics.response_plots import plot_rewards
from semantics.responses import NO_RESPONSE, by_style, templates_of_rows
from semantics.reward_models import RewardModel, as_reward_model, load_reward_model

BATCHES_AT_ONCE = 32  # batches that are sorted by length together
COLUMNS = (
    *("style", "original_index", "element_index", "sample", "question", "response", "reward_score", "truncated"),
    *("score_against", "identical", "reward_model", "note"),
)


def score_run(run: Run, args: argparse.Namespace) -> int:
    """Score all styles of a run; 1 if a response could not be scored."""
    folder = args.results_dir or Path("results") / run.name
    rm = load_reward_model(
        args.rm_name, args.device, args.max_length, args.batch_size, args.dtype, args.revision, args.trust_remote_code
    )
    against = known_question(run, args.score_against)
    kept = []
    for style in args.styles or run.styles:
        lines = score_style(run, style, rm, against, args.batch_size, args.max_samples)
        write_scores(lines, folder / f"{style}_scores.csv", folder / f"{style}_aggregates", rm, against)
        names = ("style", "original_index", "reward_score", "truncated", "identical")
        kept.append(pd.DataFrame(lines, columns=list(names)))
    items = pd.concat(kept, ignore_index=True)
    table = summarise(items, run)
    table["reward_model"], table["score_against"] = rm.name, against
    write_csv(folder / "rewards_summary.csv", table)
    plot_rewards(items, table, folder / "rewards.png", rm.name)
    write_section(folder, REWARDS)

    columns = ["style", "n", "estimate", "ci_low", "ci_high", "difference", "p_adjusted", "n_truncated"]
    get_logger().debug(table[columns].to_string(index=False, float_format=lambda x: f"{x:.3f}"))
    if unscored := int(items["reward_score"].isna().sum()):
        get_logger().warning("%d responses are unscored; the column note says why", unscored)
    print(f"reward (raw logit): {by_style(table)}; wrote {folder / 'rewards_summary.csv'}")
    return 1 if unscored else 0


def score_predictions_and_save(
    pt_dir: str | Path,
    rm_pipeline: Any,
    raw_csv_path: str | Path,
    agg_base_path: str | Path,
    score_against: str = "clean",
    batch_size: int | None = None,
    max_samples: int | None = None,
) -> list[dict[str, Any]]:
    """Score every response under `pt_dir` (a style's folder, a run folder, or one .pt file).

    Writes raw scores to `raw_csv_path` and aggregates to `agg_base_path` + ".json" and ".txt". Returns the lines of
    the CSV as dicts, each with "reward_score" (NaN if a response could not be scored; `note` says why); an empty
    folder gives []. score_against: "clean" or "style". If no clean form is known it is the style's own prompt, which
    is logged and is in the column. Raises UserError for a missing folder or a damaged file.
    """
    rm, path = as_reward_model(rm_pipeline), Path(pt_dir)
    if score_against not in ("clean", "style"):
        raise UserError(f"score_against is {score_against!r}; choose clean or style")
    lines: list[dict[str, Any]] = []
    if path.is_dir() and not any(path.glob("activations_*.pt")) and not any(path.glob("*/activations_*.pt")):
        get_logger().warning("%s: nothing to score", pt_dir)
    else:
        run = open_run(path)
        against = known_question(run, score_against)
        for style in run.styles:
            lines += score_style(run, style, rm, against, batch_size, max_samples)
    write_scores(lines, raw_csv_path, agg_base_path, rm, score_against)
    return lines


def known_question(run: Run, score_against: str) -> str:
    """`score_against`, but "style" if the run knows no clean prompts."""
    rows = range(len(run.prompt_rows))
    known = run.clean_style is not None or any(clean_prompt(run, index) is not None for index in rows)
    if score_against == "clean" and not known:
        get_logger().warning("%s: no clean prompts are known; scoring against each style's own prompt", run.path)
        return "style"
    return score_against


def score_style(
    run: Run,
    style: str,
    rm: RewardModel,
    score_against: str,
    batch_size: int | None = None,
    max_samples: int | None = None,
) -> list[dict[str, Any]]:
    """The lines of <style>_scores.csv."""
    lines = [
        _line(run, one, rm.name, score_against)
        for one in iter_predictions(run, [style])
        if max_samples is None or one.original_index < max_samples
    ]
    ready = [line for line in lines if not line["note"]]
    size = batch_size or rm.batch_size
    with tqdm(total=len(ready), desc=style, unit="response", disable=None) as progress:
        for start in range(0, len(ready), size * BATCHES_AT_ONCE):
            chunk = ready[start : start + size * BATCHES_AT_ONCE]
            scores = rm([(line["question"], line["response"]) for line in chunk], size)
            for line, score in zip(chunk, scores, strict=True):
                line |= score._asdict()
            progress.update(len(chunk))
    return lines


def _line(run: Run, one: Prediction, reward_model: str, score_against: str) -> dict[str, Any]:
    clean = clean_prompt(run, one.original_index)
    if clean is None and one.style == run.clean_style:
        clean = one.prompt
    may_be_same = one.style != run.clean_style and not is_again(one.style)
    question = clean if score_against == "clean" else one.prompt
    note = ""
    if question is None:
        note = f"the {score_against} prompt of this row is not known"
    elif one.response is None:
        note = NO_RESPONSE
    return {
        "style": one.style,
        "original_index": one.original_index,
        "element_index": one.element_index,
        "sample": one.sample,
        "question": question,
        "response": one.response,
        "reward_score": math.nan,
        "truncated": False,
        "score_against": score_against,
        "identical": may_be_same and one.prompt is not None and one.prompt == clean,
        "reward_model": reward_model,
        "note": note,
    }


def write_scores(
    lines: Sequence[dict[str, Any]], csv_path: str | Path, agg_base_path: str | Path, rm: RewardModel, asked: str
) -> None:
    """Write the lines as CSV, and their aggregates as .json and .txt."""
    write_csv(csv_path, pd.DataFrame(lines, columns=list(COLUMNS)))
    scores = [line["reward_score"] for line in lines if not math.isnan(line["reward_score"])]
    content = {
        **aggregate(scores),
        "n_unscored": len(lines) - len(scores),
        "n_truncated": sum(line["truncated"] for line in lines),
        "n_empty_responses": sum(line["response"] is not None and not line["response"].strip() for line in lines),
        "score_against": ", ".join(sorted({line["score_against"] for line in lines})) or asked,
        **rm.settings,
    }
    write_json(f"{agg_base_path}.json", content)
    shown = {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in content.items()}
    write_text(f"{agg_base_path}.txt", "".join(f"{name:20} {value}\n" for name, value in shown.items()))


def aggregate(scores: Sequence[float]) -> dict[str, float | int | None]:
    """n, min, q1, median, q3, max, mean, standard_deviation (of the sample, n - 1); None where undefined."""
    names = ("min", "q1", "median", "q3", "max")
    if not len(scores):
        return {"n": 0, **dict.fromkeys((*names, "mean", "standard_deviation"))}
    values = np.asarray(scores, dtype=np.float64)
    quartiles = np.quantile(values, [0, 0.25, 0.5, 0.75, 1]).tolist()
    spread = float(values.std(ddof=1)) if len(values) > 1 else None
    return {
        "n": len(values),
        **dict(zip(names, quartiles, strict=True)),
        "mean": float(values.mean()),
        "standard_deviation": spread,
    }


def summarise(items: pd.DataFrame, run: Run) -> pd.DataFrame:
    """rewards_summary.csv: per style the mean score and the paired, clustered difference to the clean style.

    items: style, original_index, reward_score, truncated, identical. Samples are averaged within a row first.
    """
    clusters = templates_of_rows(run, items)
    table = paired_summary(items, "reward_score", cluster=clusters, baseline=run.clean_style or "normal")
    table["n_truncated"] = table["style"].map(items.groupby("style")["truncated"].sum())
    return table
