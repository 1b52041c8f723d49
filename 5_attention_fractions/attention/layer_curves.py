"""Pictures of measures by layer: a few styles at once with 95 % intervals, controls dashed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from file_output import file_word, save_figure
from matplotlib.ticker import MaxNLocator
from plot_style import BLACK, COLOURS, GREY, MOST_LINES, label_ends, panels, remove_pictures
from report_tables import worst_first
from style_names import controlled_style, is_control

NOTES = {"real_word": "real_word (another word)"}
POOLED = ("all_typos", "all_styles")  # all styles in one probe: black and thick
AT_ONCE = 3  # styles in a picture, each with its control
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


def style_groups(table: pd.DataFrame, order: Sequence[str]) -> list[list[str]]:
    """The styles of `table`, AT_ONCE together, each before its control if that is there; those in `order` first."""
    present = [str(style) for style in table["style"].unique()]
    own = {str(controlled_style(style)): style for style in present if is_control(style)}
    if "control" in table:
        own |= dict(table.dropna(subset=["control"]).groupby("style")["control"].first())
    styles = [style for style in order if style in present]
    styles += [style for style in present if style not in styles and not is_control(style)]
    groups = [styles[start : start + AT_ONCE] for start in range(0, len(styles), AT_ONCE)]
    return [list(dict.fromkeys(name for style in group for name in (style, own.get(style, style)))) for group in groups]


def group_file(folder: Path, name: str, group: Sequence[str]) -> Path:
    """The picture of these styles: `<name>_<style>+<style>.png`, controls not named."""
    words = "+".join(file_word(style) for style in group if not is_control(style))
    return folder / f"{name}_{words}.png"


def line_looks(group: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colour and dash of each line: a control has the colour of the style before it and is dashed."""
    looks: dict[str, dict[str, Any]] = {}
    colours = iter(COLOURS)
    for style in group:
        if style in POOLED:
            looks[style] = {"color": BLACK, "linewidth": 2.4, "zorder": 3}
        elif controlled_style(style) in looks:
            looks[style] = looks[str(controlled_style(style))] | {"linestyle": "--"}
        else:
            looks[style] = {"color": next(colours), "linewidth": 1.8} | (
                {"linestyle": "--"} if is_control(style) else {}
            )
    return looks


def draw_curves(
    axes: Any, table: pd.DataFrame, group: Sequence[str], columns: tuple[str, str, str], bands: int = MOST_LINES
) -> list[Any]:
    """One line per style of the group (columns style, layer and the three named: value, low, high), the first `bands`
    of them with their interval.

    Returns (last y, name, colour) of each line.
    """
    value, low, high = columns
    ends: list[Any] = []
    for style, look in line_looks(group).items():
        part = table[table["style"] == style].dropna(subset=[value]).sort_values("layer")
        if part.empty:
            continue
        # Layers that lie apart (raw ones alone) are marked, or the line would say more than is known.
        marker = "o" if (part["layer"].diff() > 1).any() or len(part) == 1 else ""
        axes.plot(part["layer"], part[value], marker=marker, markersize=4, label=style, **look)
        if len(ends) < bands:
            axes.fill_between(part["layer"], part[low], part[high], color=look["color"], alpha=0.12, linewidth=0)
        ends.append((part[value].iloc[-1], NOTES.get(style, style), look["color"]))
    return ends


def count_label(n: pd.Series) -> str:
    """`n = 98`, or `n = 80–98` where the styles differ."""
    if n.empty:
        return "n = 0"
    return f"n = {n.min():.0f}" if n.min() == n.max() else f"n = {n.min():.0f}–{n.max():.0f}"


def layer_axis(axes: Any, label: str = "layer (0 = embeddings)") -> None:
    """Whole layers on the x axis, and a light grid."""
    axes.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True))
    axes.set_xlabel(label)
    axes.grid()
    axes.margins(x=0.01)


# --- activation_diffs.py

DISTANCES, MORE_DISTANCES = ("cosine_centred",), ("relative_l2", "cka")
LENS = ("lens_kl", "lens_top1_probability_change")


def save_diffs(curves: pd.DataFrame, summary: pd.DataFrame, folder: Path) -> None:
    """All pictures of activation_diffs.py: AT_ONCE styles a picture, those whose accuracy falls most first."""
    order = worst_first(folder)
    names = {"activation_diffs": DISTANCES, "activation_diffs_more": MORE_DISTANCES, "logit_lens": LENS}
    for name in (*names, "typo_recovery"):
        remove_pictures(folder, f"{name}_*.png")
    nearest = curves[curves["measure"] == "own_nearest"]
    shown = {name: curves[curves["measure"].isin(measures)] for name, measures in names.items()}
    for group in style_groups(curves, order):
        for name, table in {**shown, "typo_recovery": nearest}.items():
            if present := [style for style in group if style in {*table["style"]}]:
                _plot_measures(table, group, group_file(folder, name, present))
    if not nearest.empty:
        _plot_depths(summary, int(nearest["layer"].max()), folder / "recovery_depth.png")


def _plot_measures(table: pd.DataFrame, group: Sequence[str], path: Path) -> None:
    """A panel for each measure and region of these styles."""
    table = table[table["style"].isin(group)]
    regions = [region for region in REGION_LABELS if (table["region"] == region).any()]
    regions += [region for region in table["region"].unique() if region not in regions]
    wanted = [(measure, region) for measure in MEASURE_LABELS for region in regions]
    parts = [((m, r), part) for m, r in wanted if len(part := table[(table["measure"] == m) & (table["region"] == r)])]
    figure, grid = panels(len(parts), 2, 3.2)
    for axes, ((measure, region), part) in zip(grid, parts, strict=True):
        ends = draw_curves(axes, part, group, ("estimate", "ci_low", "ci_high"))
        layer_axis(axes)
        if measure == "own_nearest":
            axes.set_ylim(-0.02, min(1.02, max(0.5, 1.1 * axes.get_ylim()[1])))
        axes.set_title(f"{REGION_LABELS.get(region, region)}, {count_label(part['n'])} prompts")
        axes.set_ylabel(MEASURE_LABELS[measure])
        label_ends(axes, ends)
    save_figure(path, figure)


def _plot_depths(summary: pd.DataFrame, last_layer: int, path: Path) -> None:
    """Mean depth with interval (dot) and median (bar) per style; how many never got there."""
    shown = summary[summary["measure"].isin(DEPTH_LABELS)]
    styles = list(shown["style"].unique())
    figure, (axes,) = panels(1, 1, 1.5 + 0.34 * len(styles))
    markers = {"recovery_depth": ("o", -0.15, COLOURS[0]), "half_recovery_depth": ("s", 0.15, COLOURS[1])}
    for measure, (marker, shift, colour) in markers.items():
        for position, line in enumerate(shown[shown["measure"] == measure].to_dict("records")):
            y = styles.index(line["style"]) + shift
            bars = [[max(0, line["estimate"] - line["ci_low"])], [max(0, line["ci_high"] - line["estimate"])]]
            look = {"color": colour, "label": DEPTH_LABELS[measure] if position == 0 else None}
            axes.errorbar([line["estimate"]], [y], xerr=bars, fmt=marker, capsize=2, markersize=5, **look)
            axes.plot([line["median"]], [y], "|", color=colour, markersize=12)
            never = f"never: {line['n_censored']:.0f} of {line['n']:.0f}"
            axes.annotate(never, (1.01, y), xycoords=("axes fraction", "data"), va="center", fontsize=8, color=colour)
    axes.set_yticks(range(len(styles)), [f"{s} (control)" if is_control(s) else NOTES.get(s, s) for s in styles])
    axes.set_ylim(len(styles) - 0.4, -0.6)
    axes.set_xlim(-0.5, last_layer + 1.5)
    axes.axvline(last_layer + 1, color=GREY, linewidth=0.8, linestyle=":")
    layer_axis(axes, f"layer (dotted, {last_layer + 1}: never); dot: mean and 95 % interval, bar: median")
    axes.set_title("Recovery depth of the edited word")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left", ncols=2, fontsize=9)
    save_figure(path, figure)


WORD_LINES = {  # form, as it begins the names of columns → (label, colour, dash)
    "": ("typo", COLOURS[1], "-"),
    "control_": ("clean word, as many tokens", COLOURS[0], "--"),
    "clean_": ("clean word", BLACK, ":"),
}


def plot_words(table: pd.DataFrame, path: str | Path) -> None:
    """Log probability of the meant word's first token by layer: a panel per style, a line for each form of the word."""
    groups = list(table.groupby("style", sort=False))
    figure, grid = panels(len(groups), 3, 3.2, sharey=True)
    for axes, (style, part) in zip(grid, groups, strict=True):
        for form, (label, colour, dash) in WORD_LINES.items():
            ends = part[f"{form}logprob_ci_low"], part[f"{form}logprob_ci_high"]
            if part[f"{form}logprob"].notna().any():
                axes.plot(part["layer"], part[f"{form}logprob"], dash, color=colour, label=label)
                axes.fill_between(part["layer"], *ends, color=colour, alpha=0.12, linewidth=0)
        axes.set_title(f"{style}, {count_label(part['n'])}")
        layer_axis(axes)
    grid[0].set_ylabel("log probability (nats)")
    grid[0].legend(fontsize=8)
    figure.suptitle("Logit lens at the edited word's last token: first token of the meant word")
    save_figure(path, figure)


# --- probe_layers.py

TARGET_LABELS = {
    "typo": "clean form or style?",
    "typo_vs_control": "typo or only other tokens?",
    "style": "which style?",
    "wrong": "will the answer be wrong?",
    "flipped": "right when clean: wrong now?",
}


def save_probes(table: pd.DataFrame, folder: Path) -> None:
    """AUC by layer: a picture per target, a panel per region; all styles pooled, then the styles that are told apart
    best, MOST_LINES in all; shuffled labels in grey."""
    remove_pictures(folder, "probe_layers_*.png")
    for target in [target for target in TARGET_LABELS if (table["target"] == target).any()]:
        own = table[table["target"] == target]
        best = own.groupby("style")["auc"].max().sort_values(ascending=False).index
        shown = sorted(best, key=lambda style: style not in POOLED)[: MOST_LINES - 1]
        regions = list(own["region"].unique())
        figure, grid = panels(len(regions), 2, 3.4, sharey=True)
        for axes, region in zip(grid, regions, strict=True):
            part = own[own["region"] == region]
            _probe_panel(axes, part, shown)
            axes.set_title(f"{REGION_LABELS.get(region, region)}, {count_label(part['n'])} prompts")
        grid[0].set_ylabel("out-of-fold AUC (0.5: chance)")
        figure.suptitle(f"Linear probe: {TARGET_LABELS[target]}", x=0.01, ha="left")
        save_figure(folder / f"probe_layers_{target}.png", figure)


def _probe_panel(axes: Any, part: pd.DataFrame, shown: Sequence[str]) -> None:
    own = part.sort_values("layer").drop_duplicates(["layer"], keep="first")
    low, high = (part.groupby("layer")[name].agg(end) for name, end in _SHUFFLED_ENDS)
    # One band around all intervals: a band for each style would add up to black.
    axes.fill_between(low.index, low, high, color=GREY, alpha=0.18, lw=0)
    ends = draw_curves(axes, part, shown, ("auc", "ci_low", "ci_high"), bands=1)
    axes.axhline(0.5, color=BLACK, linewidth=0.8, linestyle=":")
    layer_axis(axes)
    for style, look in line_looks(shown).items():  # what the numbers of tokens alone tell
        counts = part[part["style"] == style]["token_count_auc"].dropna()
        if len(counts):
            axes.plot([own["layer"].max()], [counts.iloc[0]], "D", markersize=5, clip_on=False, color=look["color"])
    axes.set_ylim(min(0.3, axes.get_ylim()[0]), 1.02)
    label_ends(axes, [*ends, (float((low.iloc[-1] + high.iloc[-1]) / 2), "shuffled labels", GREY)])


_SHUFFLED_ENDS = (("shuffled_ci_low", "min"), ("shuffled_ci_high", "max"))
