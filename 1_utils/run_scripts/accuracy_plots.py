"""Figures of scored answers: accuracy with intervals, flipped answers, accuracy by number of edits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
from command_line import one_line
from file_output import save_figure
from matplotlib.figure import Figure
from plot_style import BLACK, CLEAN_COLOUR, OTHER_COLOUR, PALE, STYLE_COLOUR, WIDTH


def plot_accuracy(summary: pd.DataFrame, path: Path, baseline: str, title: str) -> None:
    """Left: accuracy of each style with its Wilson interval. Right: paired difference to the clean form with the
    clustered interval; the grey band is what n could not detect with 80 % power after correction for the styles."""
    height = 1.9 + 0.36 * len(summary)
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for position, line in enumerate(summary.itertuples()):
        colour = CLEAN_COLOUR if line.style == baseline else STYLE_COLOUR
        _interval(left, line.estimate, line.ci_low, line.ci_high, position, colour)
        if line.style != baseline and line.difference == line.difference:
            limit = line.minimum_detectable_difference_adjusted
            if limit == limit:
                right.barh(position, 2 * limit, left=-limit, height=0.8, color=PALE, zorder=0)
            _interval(right, line.difference, line.difference_ci_low, line.difference_ci_high, position, colour)
    labels = [f"{_plain(line.style)} (n = {line.n})" for line in summary.itertuples()]
    left.set_yticks(range(len(summary)), labels)
    left.invert_yaxis()
    left.set_xlim(-0.02, 1.02)
    left.set_xlabel("share of right answers (95 % Wilson interval)")
    right.axvline(0, color=BLACK, linewidth=0.8)
    right.locator_params(axis="x", nbins=6)
    right.set_xlabel(
        f"difference to {baseline}, same rows (95 % interval)\ngrey: too small to detect (80 % power, adjusted p)"
    )
    for axes in (left, right):
        axes.grid(axis="x")
    figure.suptitle(_plain(title), x=0.01, ha="left")
    save_figure(path, figure)


def plot_flips(summary: pd.DataFrame, path: Path, baseline: str, title: str) -> None:
    """How many answers each style turned from right to wrong (to the left) and from wrong to right (to the right)."""
    table = summary[(summary["style"] != baseline) & summary["right_to_wrong"].notna()]
    figure = Figure(figsize=(7.5, 1.9 + 0.36 * len(table)), layout="constrained")
    axes = figure.subplots()
    widest = max([1.0, *table["right_to_wrong"], *table["wrong_to_right"]])
    for position, line in enumerate(table.itertuples()):
        for count, side, colour in ((line.right_to_wrong, -1, OTHER_COLOUR), (line.wrong_to_right, 1, STYLE_COLOUR)):
            axes.barh(position, side * count, color=colour, height=0.7)
            end, shift = (side * count, position), (3 * side, 0)
            name = "left" if side > 0 else "right"
            axes.annotate(f"{count:.0f}", end, shift, textcoords="offset points", ha=name, va="center", fontsize=8)
    axes.set_yticks(range(len(table)), [f"{_plain(line.style)} (n = {line.n_paired})" for line in table.itertuples()])
    axes.invert_yaxis()
    axes.axvline(0, color=BLACK, linewidth=0.8)
    axes.set_xlim(-1.15 * widest, 1.15 * widest)
    axes.xaxis.set_major_formatter(lambda value, _: f"{abs(value):g}")
    axes.set_xlabel(f"answers, compared with {baseline}:   right → wrong   |   wrong → right")
    axes.set_title(_plain(title))
    save_figure(path, figure)


def plot_edits(table: pd.DataFrame, path: Path, title: str) -> None:
    """Accuracy against the number of edits, with clustered intervals; 0 edits are the clean prompts of these rows."""
    figure = Figure(figsize=(5.6, 3.9), layout="constrained")
    axes = figure.subplots()
    positions = list(range(len(table)))
    axes.plot(positions, table["estimate"], color=STYLE_COLOUR, linewidth=1, zorder=1)
    for position, line in zip(positions, table.itertuples(), strict=True):
        colour = CLEAN_COLOUR if line.edits == "0" else STYLE_COLOUR
        _interval(axes, line.estimate, line.ci_low, line.ci_high, position, colour, upright=True)
    axes.set_xticks(positions, [f"{line.edits}\nn = {line.n}" for line in table.itertuples()])
    axes.set_xlim(-0.4, len(table) - 0.6)
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel("edits in the prompt (0: the clean form of the same rows)")
    axes.set_ylabel("share of right answers (95 % interval)")
    axes.grid(axis="y")
    axes.set_title(_plain(title))
    save_figure(path, figure)


def _interval(
    axes: Any, value: float, low: float, high: float, position: float, colour: str, upright: bool = False
) -> None:
    """A point with its interval; a point alone where the interval is unknown."""
    if value != value:
        return
    errors = [[max(0.0, value - low)], [max(0.0, high - value)]] if low == low else None
    style = {"fmt": "o", "color": colour, "markersize": 4.5, "capsize": 3}
    if upright:
        axes.errorbar([position], [value], yerr=errors, **style)
    else:
        axes.errorbar([value], [position], xerr=errors, **style)


def _plain(text: str) -> str:
    """`text` for a figure: a $ begins no formula."""
    return one_line(text, 80).replace("$", r"\$")
