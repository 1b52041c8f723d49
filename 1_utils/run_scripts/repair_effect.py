"""Does correcting the prompt first give the accuracy back? The clean form, the style, and the style after repair.

harm = style - clean        regained = repaired - style        remaining = repaired - clean = harm + regained
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd
from accuracy_tables import row_scores
from decomposition import part_columns, scores_of_forms, share_interval, with_holm, with_interval
from file_output import write_or_remove
from logger import get_logger
from paired_stats import cluster_codes, clustered_mean
from style_names import REPAIRED

PARTS = ("harm", "regained", "remaining")


def write_repair_effect(items: pd.DataFrame, clean_style: str, folder: Path) -> None:
    """Write and log repair_summary.csv if a style and its repair have scored answers."""
    table = repair_effect(items, clean_style)
    if not write_or_remove(folder / "repair_summary.csv", table):
        return
    for line in table.itertuples():
        texts = [with_interval(line, part, "+.3f") for part in PARTS]
        if not math.isnan(line.regained_share):
            texts.append(with_interval(line, "regained_share", ".2f"))
        get_logger().info(f"{line.style}, corrected: {', '.join(texts)}, n = {line.n}")


def repair_effect(items: pd.DataFrame, clean_style: str) -> pd.DataFrame:
    """repair_summary.csv: one line per style with a `repaired@<style>`; p values adjusted over the styles (Holm).

    items: scored answers. All differences are over the same rows: those with all three forms, without those whose style
    is the clean prompt. regained_share = -regained / harm; NaN if the interval of the harm holds 0.
    """
    scores = row_scores(items)
    styles = [style for style in dict.fromkeys(items["style"]) if style != clean_style]
    lines = [_line(scores, style, clean_style) for style in styles]
    table = pd.DataFrame([line for line in lines if line is not None and line["n"]])
    return table if table.empty else with_holm(table, PARTS)


def _line(scores: pd.DataFrame, style: str, clean_style: str) -> dict[str, Any] | None:
    if (forms := scores_of_forms(scores, (clean_style, f"{REPAIRED}{style}", style))) is None:
        return None
    values, clusters, n_of_style = forms
    differences = values[:, [2, 1, 1]] - values[:, [0, 2, 0]]  # harm, regained, remaining
    found = clustered_mean(differences, clusters)
    share = low = high = math.nan
    if found.ci_low[0] > 0 or found.ci_high[0] < 0:  # else a share of nothing
        share = -found.mean[1] / found.mean[0]
        low, high = share_interval(-differences[:, 1], differences[:, 0], clusters)
    names = ("clean_mean", "repaired_mean", "style_mean")
    return {
        "style": style,
        "measure": "accuracy",
        "n": len(values),
        "n_without_repair": n_of_style - len(values),
        "n_clusters": int(cluster_codes(len(values), clusters).max(initial=-1)) + 1,
        **(dict(zip(names, values.mean(axis=0), strict=True)) if len(values) else {}),
        **part_columns(PARTS, found),
        "regained_share": share,
        "regained_share_ci_low": low,
        "regained_share_ci_high": high,
    }
