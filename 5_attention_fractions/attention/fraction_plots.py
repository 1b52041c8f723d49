"""The box plots of dirs_eval.py: attention on the instruction and on the task, one box of prompts a style or layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from file_output import save_figure

from attention.attention_fields import REGIONS
from attention.heatmaps import file_word
from attention.region_fractions import CELLS, StyleFractions, uniform_share_of

FILE_NAMES = {"instruction": "frac_prompt", "task": "frac_task"}  # the file names of the original pipeline


def save_boxplots(results: Sequence[StyleFractions], folder: Path, query: str, sink: str) -> list[Path]:
    """The box plots over rows: by style, and for each style by layer; a plot of a region no prompt has is removed."""
    paths = []
    note = {"last": "last token", "mean": "mean query"}[query] + f", first token {sink}"
    for region, name in FILE_NAMES.items():
        path, cell = folder / f"boxplot_{name}.png", CELLS.index((query, sink, region, "fraction"))
        having = [one for one in results if one.tokens[REGIONS.index(region)] > 0]
        if not having:  # no prompt has the region: its fraction is 0 by definition
            path.unlink(missing_ok=True)
            continue
        boxes = [box_of(one.by_layer[:, -1, cell]) for one in having]
        labels = [f"{one.style}\nn={len(one.by_layer)}" for one in having]
        even = [float(uniform_share_of(one.uniform, query, sink, region).mean()) for one in having]
        _save_boxes(path, boxes, labels, even, f"Attention on the {region} ({note})", "style", region)
        paths.append(path)
    cell = CELLS.index((query, sink, "instruction", "fraction"))
    for one in results:
        path = folder / f"boxplot_perlayer_frac_prompt_{file_word(one.style)}.png"
        if not one.tokens[REGIONS.index("instruction")] > 0:
            path.unlink(missing_ok=True)
            continue
        boxes = [box_of(one.by_layer[:, layer, cell]) for layer in range(len(one.layers))]
        title = f"Attention on the instruction by layer: {one.style} ({note}, n = {len(one.by_layer)} prompts)"
        even = uniform_share_of(one.uniform, query, sink, "instruction").tolist()
        _save_boxes(path, boxes, [str(layer) for layer in one.layers], even, title, "layer", "instruction")
        paths.append(path)
    return paths


def box_of(values: np.ndarray) -> dict[str, Any]:
    """matplotlib `bxp` statistics of values [n]: quartiles, whiskers at 5 % and 95 %; NaN is left out."""
    known = values[~np.isnan(values)]
    at = np.quantile(known, (0.05, 0.25, 0.5, 0.75, 0.95)).tolist() if len(known) else [float("nan")] * 5
    return {**dict(zip(("whislo", "q1", "med", "q3", "whishi"), at, strict=True)), "fliers": []}


def _save_boxes(
    path: Path, boxes: list[dict[str, Any]], labels: list[str], even: list[float], title: str, xlabel: str, region: str
) -> None:
    figure, axes = plt.subplots(figsize=(max(5.0, 1.6 + (0.75 if xlabel == "style" else 0.32) * len(boxes)), 4))
    axes.bxp(boxes, showfliers=False, medianprops={"color": "C0", "linewidth": 1.5}, widths=0.6)
    label = "mean share of tokens (even attention)"
    axes.plot(range(1, len(boxes) + 1), even, linestyle="none", marker="D", markersize=4, color="C1", label=label)
    axes.plot([], [], color="black", label="box: quartiles; whiskers: 5 % to 95 % of prompts")
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
    axes.set_xticks(range(1, len(boxes) + 1), labels, fontsize=8)
    axes.set(xlabel=xlabel, ylabel=f"fraction of attention on the {region}\n(mean over heads, 0 to 1)")
    axes.set_title(title, fontsize=10)
    figure.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.03), ncols=2, frameon=False)
    save_figure(path, figure)
