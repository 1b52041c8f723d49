"""Pictures of measures by layer: one line per style with its 95 % interval, its control in the same colour, dashed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import pandas as pd
from file_output import save_figure
from matplotlib.ticker import MaxNLocator
from style_names import SPLIT_STYLE, controlled_style, is_control

MANY_STYLES = 6
NOTES = {"real_word": "real_word (another word)"}
POOLED = ("all_typos", "all_styles")  # all styles in one probe: black and unbroken
MEASURE_LABELS = {
    "cosine_centred": "cosine to the clean state\n(layer median subtracted)",
    "cosine": "cosine to the clean state",
    "relative_l2": "relative L2 distance\n|style − clean| / |clean|",
    "cka": "linear CKA with the clean states\n(debiased, over items)",
    "own_nearest": "share of words nearest to\ntheir own clean twin",
    "lens_kl": "KL of the next token,\nclean || style (nats)",
    "lens_top1_probability_change": "change in the probability of\nthe clean run's first token",
}
REGION_LABELS = {"edited": "edited word", "task": "task", "last": "last token", "instruction": "instruction"}
DEPTH_LABELS = {
    "recovery_depth": "nearest to its own clean twin from layer …",
    "half_recovery_depth": "half of the lost cosine regained from layer …",
}


def style_colours(styles: list[str]) -> dict[str, Any]:
    """A colour per style, the same in every picture of a run; `split@swap` has that of `swap`, `split` is black."""
    pairs = mpl.colormaps["tab20"](range(20))  # dark and light by turns: first all the dark ones
    palette = [*pairs[0::2], *pairs[1::2]]
    names = {style: controlled_style(style) or style for style in styles if style != SPLIT_STYLE}
    own = {name: palette[i % len(palette)] for i, name in enumerate(dict.fromkeys(names.values()))}
    return {SPLIT_STYLE: "black"} | {style: own[name] for style, name in names.items()}


def draw_curves(axes: Any, table: pd.DataFrame, colours: dict[str, Any], columns: tuple[str, str, str]) -> None:
    """One line per style of `table` (columns style, layer and the three named: value, low, high) on `axes`.

    With more than MANY_STYLES styles only pooled ones get their interval drawn, or none could be read.
    """
    many = sum(not is_control(style) for style in table["style"].unique()) > MANY_STYLES
    value, low, high = columns
    for style, part in table.groupby("style", sort=False):
        part = part.dropna(subset=[value]).sort_values("layer")
        # Layers that lie apart (raw ones alone) are marked, or the line would say more than is known.
        marker = "o" if (part["layer"].diff() > 1).any() or len(part) == 1 else ""
        control, thick = is_control(style), style in (SPLIT_STYLE, *POOLED)
        look = {"color": colours[style], "linewidth": 2.2 if thick else 1.4, "zorder": 3 if thick else 2}
        line = "--" if control else "-"
        axes.plot(part["layer"], part[value], linestyle=line, marker=marker, markersize=4, label=style, **look)
        if style in POOLED or not many:
            axes.fill_between(part["layer"], part[low], part[high], color=colours[style], alpha=0.12, linewidth=0)


def count_label(n: pd.Series) -> str:
    """`n = 98`, or `n = 80–98` where the styles differ."""
    if n.empty:
        return "n = 0"
    return f"n = {n.min():.0f}" if n.min() == n.max() else f"n = {n.min():.0f}–{n.max():.0f}"


def layer_axis(axes: Any, label: str = "layer (0 = embeddings)") -> None:
    """Whole layers on the x axis, and a light grid."""
    axes.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True))
    axes.set_xlabel(label)
    axes.grid(alpha=0.25)
    axes.margins(x=0.01)


def shared_legend(figure: Any, axes: Any) -> None:
    """One legend for all panels, to the right of them."""
    handles: dict[str, Any] = {}
    for one in axes:
        for handle, label in zip(*one.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if handles:
        names = [f"{label} (control)" if is_control(label) else NOTES.get(label, label) for label in handles]
        figure.legend(handles.values(), names, loc="outside right center", frameon=False)


def panels(rows: int, columns: int, width: float, height: float, **shared: Any) -> tuple[Any, Any]:
    """A figure, and its axes [rows, columns] of this size in inches."""
    size = (width * columns + 0.5, height * rows + 0.4)
    return plt.subplots(rows, columns, figsize=size, squeeze=False, sharex=True, layout="constrained", **shared)


# --- activation_diffs.py

DISTANCES = ("cosine_centred", "relative_l2", "cka")
DISTANCES_TITLE = "Residual stream: each style against its clean twin (mean; band: 95 % clustered interval)"
LENS = ("lens_kl", "lens_top1_probability_change")
LENS_TITLE = "Logit lens: what each layer would say next, style against clean form"


def plot_measures(curves: pd.DataFrame, wanted: Sequence[str], title: str, path: str | Path) -> None:
    """Panels of the `wanted` measures (rows) by region (columns) from activation_diffs.csv; nothing without one."""
    measures = [name for name in wanted if (curves["measure"] == name).any()]
    shown = curves[curves["measure"].isin(measures)]
    regions = [region for region in REGION_LABELS if (shown["region"] == region).any()]
    regions += [region for region in shown["region"].unique() if region not in regions]
    if not measures:
        return
    figure, grid = panels(len(measures), len(regions), 4.6, 3.0)
    colours = style_colours(list(curves["style"].unique()))
    for i, measure in enumerate(measures):
        for j, region in enumerate(regions):
            part = shown[(shown["measure"] == measure) & (shown["region"] == region)]
            draw_curves(grid[i, j], part, colours, ("estimate", "ci_low", "ci_high"))
            layer_axis(grid[i, j], "layer (0 = embeddings)" if i == len(measures) - 1 else "")
            grid[i, j].set_title(f"{REGION_LABELS.get(region, region)}, {count_label(part['n'])}", fontsize=10)
        grid[i, 0].set_ylabel(MEASURE_LABELS[measure])
    figure.suptitle(title)
    shared_legend(figure, grid.flat)
    save_figure(path, figure)


def plot_recovery(curves: pd.DataFrame, summary: pd.DataFrame, path: str | Path) -> None:
    """Share of edited words nearest to their own twin by layer, and the two recovery depths by style."""
    nearest = curves[curves["measure"] == "own_nearest"]
    if nearest.empty:
        return
    count = nearest["style"].nunique()
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, max(4.5, 0.4 * count + 1.5)), layout="constrained")
    colours = style_colours(list(curves["style"].unique()))
    draw_curves(left, nearest, colours, ("estimate", "ci_low", "ci_high"))
    layer_axis(left)
    left.set_ylim(-0.02, 1.02)
    left.set_ylabel(MEASURE_LABELS["own_nearest"])
    left.set_title(f"Edited word, against other words' clean states, {count_label(nearest['n'])}", fontsize=10)
    _depth_panel(right, summary, int(nearest["layer"].max()))
    shared_legend(figure, [left])
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower right", ncols=2, fontsize=9, frameon=False)
    save_figure(path, figure)


def _depth_panel(axes: Any, summary: pd.DataFrame, last_layer: int) -> None:
    """Mean depth with interval (dot) and median (bar) per style; how many never got there."""
    styles = [
        s for s in summary["style"].unique() if (summary["measure"].isin(DEPTH_LABELS) & (summary["style"] == s)).any()
    ]
    markers = {"recovery_depth": ("o", -0.14, "tab:blue"), "half_recovery_depth": ("s", 0.14, "tab:orange")}
    for measure, (marker, shift, colour) in markers.items():
        part = summary[summary["measure"] == measure].set_index("style")
        for position, style in enumerate(s for s in styles if s in part.index):
            line, y = part.loc[style], styles.index(style) + shift
            bars = [[max(0, line["estimate"] - line["ci_low"])], [max(0, line["ci_high"] - line["estimate"])]]
            label = DEPTH_LABELS[measure] if position == 0 else None
            axes.errorbar(
                [line["estimate"]], [y], xerr=bars, fmt=marker, color=colour, capsize=2, markersize=5, label=label
            )
            axes.plot([line["median"]], [y], "|", color=colour, markersize=13)
            never = f"{line['n_censored']:.0f}/{line['n']:.0f}"
            axes.annotate(never, (1.01, y), xycoords=("axes fraction", "data"), va="center", fontsize=7, color=colour)
    axes.set_yticks(range(len(styles)), [f"{s} (control)" if is_control(s) else NOTES.get(s, s) for s in styles])
    axes.invert_yaxis()
    axes.set_xlim(-0.5, last_layer + 1.5)
    axes.axvline(last_layer + 1, color="grey", linewidth=0.8, linestyle=":")
    layer_axis(axes, f"layer (dotted, {last_layer + 1}: never); dot: mean and 95 % interval, bar: median")
    axes.set_title("Recovery depth of the edited word (right: never / n)", fontsize=10)


# --- probe_layers.py

TARGET_LABELS = {
    "typo": "clean form or style?",
    "typo_vs_control": "typo or only other tokens?",
    "style": "which style?",
    "wrong": "will the answer be wrong?",
    "flipped": "right when clean: wrong now?",
}


def plot_probes(table: pd.DataFrame, path: str | Path) -> None:
    """AUC by layer: a panel per target and region, one line per style, shuffled labels in grey."""
    targets = [target for target in TARGET_LABELS if (table["target"] == target).any()]
    regions = list(table["region"].unique())
    figure, grid = panels(len(targets), len(regions), 5.4, 3.1, sharey=True)
    colours = style_colours([style for style in table["style"].unique() if style not in POOLED])
    colours |= dict.fromkeys(POOLED, "black")
    for i, target in enumerate(targets):
        for j, region in enumerate(regions):
            part = table[(table["target"] == target) & (table["region"] == region)]
            _probe_panel(grid[i, j], part, colours)
            title = f"{TARGET_LABELS[target]} {REGION_LABELS.get(region, region)}, {count_label(part['n'])}"
            grid[i, j].set_title(title, fontsize=10)
        grid[i, 0].set_ylabel("out-of-fold AUC")
    for axes in grid[-1]:
        axes.set_xlabel("layer (0 = embeddings)")
    figure.suptitle("Linear probes by layer (band: 95 % clustered interval), folds grouped by template")
    shared_legend(figure, grid.flat)
    save_figure(path, figure)


def _probe_panel(axes: Any, part: pd.DataFrame, colours: dict[str, Any]) -> None:
    if part.empty:
        axes.text(0.5, 0.5, "not probed", ha="center", va="center", transform=axes.transAxes, color="grey")
        return
    _draw_shuffled(axes, part)
    _draw_token_counts(axes, part, colours)
    draw_curves(axes, part, colours, ("auc", "ci_low", "ci_high"))
    axes.axhline(0.5, color="black", linewidth=0.8, linestyle=":")
    layer_axis(axes, "")
    ticks, last = axes.get_xticks(), part["layer"].max()  # the room to the right is the diamonds', no layer
    axes.set_xticks([tick for tick in ticks if 0 <= tick <= last])


def _draw_token_counts(axes: Any, part: pd.DataFrame, colours: dict[str, Any]) -> None:
    """Diamonds right of the curves: what the numbers of tokens alone tell about each style."""
    last = part["layer"].max()
    for position, row in enumerate(part.dropna(subset=["token_count_auc"]).drop_duplicates("style").itertuples()):
        label = "token counts alone (open: of a control)" if position == 0 else None
        place = last + (0.02 + 0.012 * position) * max(1, last)
        look = {"color": colours[row.style], "markersize": 4, "clip_on": False, "label": label}
        face = "white" if is_control(row.style) else None
        axes.plot([place], [row.token_count_auc], "D", markerfacecolor=face, **look)


def _draw_shuffled(axes: Any, part: pd.DataFrame) -> None:
    """The AUC with shuffled labels, in grey."""
    look: dict[str, Any] = {"color": "grey", "linewidth": 0.8, "linestyle": "--", "zorder": 1}
    for position, (_, own) in enumerate(part.groupby("style", sort=False)):
        own = own.sort_values("layer")
        axes.plot(own["layer"], own["shuffled_auc"], label="shuffled labels" if position == 0 else None, **look)
    # One band around all intervals: a band for each style would add up to black.
    ends = part.groupby("layer").agg(low=("shuffled_ci_low", "min"), high=("shuffled_ci_high", "max"))
    axes.fill_between(ends.index, ends["low"], ends["high"], color="grey", alpha=0.15, lw=0)
