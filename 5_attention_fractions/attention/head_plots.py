"""The pictures of head_sensitivity.py: heatmaps of layers and heads around zero, and the overlap of the styles."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from command_line import UserError
from file_output import file_word, save_figure
from matplotlib.axes import Axes
from matplotlib.image import AxesImage

from attention.heads import ALPHA, CLEAN, CONTROL, MEASURES, SHOWN, Comparison, with_equal_tokens

Panel = tuple[str, np.ndarray, np.ndarray | None]  # title, values [L,H], marked [L,H] bool
COLOURS = matplotlib.colormaps["RdBu_r"].with_extremes(bad="0.75")
BESIDE, BELOW = 0.65, 0.95  # inches between panels, for labels and titles
ENDS = {CLEAN: "", CONTROL: "_vs_control"}  # of the names of columns and files
DOTS = f"dots: adjusted p < {ALPHA}"


def save_pictures(
    comparisons: Sequence[Comparison], tables: dict[str, pd.DataFrame], folder: Path, measure: str
) -> list[Path]:
    """All pictures of one measure, and of each style the first four of SHOWN that it has; returns their paths."""
    heads = tables["head_sensitivity"]
    # A style that only adds words (polite) has no clean twin of them, so some measures do not exist for it.
    counts = heads[heads["measure"] == measure].groupby("style")["n"].max()
    having = [one for one in comparisons if one.style in counts]
    if not having:
        raise UserError(f"--measure {measure}: no row of these styles has it; choose another, see head_sensitivity.csv")
    panels = [_panel(heads, one, measure, f"{one.style} (n = {counts[one.style]} pairs)") for one in having]
    paths = [folder / "head_sensitivity.png"]
    title = f"{measure} ({MEASURES[measure].caption}): style minus clean form, by layer and head; {DOTS}"
    save_layer_head_grid(paths[0], panels, MEASURES[measure].scale, title, having[0].layers)
    for one in comparisons:
        own = heads[heads["style"] == one.style].groupby("measure")["n"].max()
        shown = [name for name in SHOWN if name in own][:4]
        panels = [_panel(heads, one, name, f"{name}, n = {own[name]}\n{MEASURES[name].scale}") for name in shown]
        if panels:
            paths.append(folder / f"head_sensitivity_{file_word(one.style)}.png")
            title = f"{one.style} minus clean form (n: pairs); {DOTS}"
            save_layer_head_grid(paths[-1], panels, "", title, one.layers, shared_scale=False)
    paths += _save_against_controls(having, heads, folder, measure)
    for reference, part in tables["head_overlap"].groupby("reference_form", sort=False):
        if among := [one.style for one in having if one.style in {*part["style"]}]:
            paths.append(folder / f"head_overlap{ENDS[str(reference)]}.png")
            _save_overlap(paths[-1], part[part["measure"] == measure], among, measure, str(reference))
    if "head_answer_flips" in tables:
        paths += _save_flips(comparisons, tables["head_answer_flips"], folder, measure)
    return paths


def _save_against_controls(
    comparisons: Sequence[Comparison], heads: pd.DataFrame, folder: Path, measure: str
) -> list[Path]:
    """Heatmap of style minus control; none if no style has one."""
    rows = with_equal_tokens(heads[(heads["measure"] == measure) & heads["difference_vs_control"].notna()])
    matched = rows.groupby("style")[["n_vs_control", "control"]].max()
    panels = []
    for one in (one for one in comparisons if one.style in matched.index):
        count, control = matched.loc[one.style]
        note = f"{one.style} minus {control} (n = {count:.0f} pairs)"
        panels.append(_panel(heads, one, measure, note, "difference_vs_control", "p_adjusted_vs_control"))
    if not panels:
        return []
    path = folder / "head_sensitivity_vs_control.png"
    title = f"{measure} ({MEASURES[measure].caption}): style minus control, by layer and head; {DOTS}"
    save_layer_head_grid(path, panels, MEASURES[measure].scale, title, comparisons[0].layers)
    return [path]


def _save_overlap(path: Path, overlap: pd.DataFrame, names: list[str], measure: str, reference: str) -> None:
    matrix = np.full((len(names), len(names)), np.nan)
    pairs = overlap[overlap["style"].isin(names) & overlap["other_style"].isin(names)]
    for row in pairs.itertuples():
        a, b = names.index(str(row.style)), names.index(str(row.other_style))
        matrix[a, b] = matrix[b, a] = row.cross_half_spearman
    least, most = (end(pairs[["n", "n_other"]].to_numpy()) for end in (np.min, np.max))
    count = f"{least} to {most}" if least < most else f"{most}"
    title = (
        f"Do the styles share their heads? {measure}, style minus {reference}\n"
        f"(diagonal: split-half reliability; n = {count} pairs)"
    )
    save_style_matrix(path, matrix, names, "rank correlation over heads", title)


def _save_flips(comparisons: Sequence[Comparison], flips: pd.DataFrame, folder: Path, measure: str) -> list[Path]:
    """Heatmaps of the correlation of each head's change with a flipped answer; none if too few answers flip."""
    paths = []
    for reference, end in ENDS.items():
        table = with_equal_tokens(flips[(flips["reference_form"] == reference) & (flips["measure"] == measure)])
        panels = []
        for one in comparisons:
            rows = table[table["style"] == one.style]
            if rows["point_biserial_r"].notna().any():
                against = f" minus {rows['control'].iloc[0]}" if reference == CONTROL else ""
                note = f"{one.style}{against} (n = {rows['n'].max()}, {rows['n_flipped'].max()} flipped)"
                panels.append(_panel(table, one, measure, note, "point_biserial_r"))
        if panels:
            paths.append(folder / f"head_answer_flips{end}.png")
            title = f"Does the change in {measure} from the {reference} go with a wrong answer?\n{DOTS}"
            save_layer_head_grid(paths[-1], panels, "point-biserial r", title, comparisons[0].layers)
    return paths


def _panel(
    table: pd.DataFrame,
    comparison: Comparison,
    measure: str,
    title: str,
    column: str = "difference",
    adjusted: str = "p_adjusted",
) -> Panel:
    values = np.full((len(comparison.layers), comparison.heads), np.nan)
    marked = np.zeros(values.shape, dtype=bool)
    rows = table[(table["style"] == comparison.style) & (table["measure"] == measure)]
    numbers = {layer: place for place, layer in enumerate(comparison.layers)}
    place = rows["layer"].map(numbers).to_numpy(), rows["head"].to_numpy()
    values[place] = rows[column]
    marked[place] = rows[adjusted] < ALPHA
    return title, values, marked


# --- heatmaps


def symmetric_limit(values: np.ndarray, percentile: float = 99.5) -> float:
    """Limit of a colour scale centred at zero: the percentile of |values|, so that one cell does not drown the rest."""
    known = np.abs(values[np.isfinite(values)])
    return float(np.percentile(known, percentile)) or float(known.max(initial=0)) or 1.0 if known.size else 1.0


def draw_layer_head(
    axes: Axes,
    values: np.ndarray,
    limit: float,
    marked: np.ndarray | None = None,
    layers: Sequence[int] | None = None,
    title: str = "",
) -> AxesImage:
    """Draw values [L,H] with layers to the right and heads upward; a dot in each `marked` cell [L,H] bool.

    Colours run from -limit to limit, zero is white; a cell without a value is grey.
    """
    numbers = list(range(values.shape[0])) if layers is None else list(layers)
    image = axes.imshow(
        np.ma.masked_invalid(values.T),
        cmap=COLOURS,
        vmin=-limit,
        vmax=limit,
        aspect="auto",
        origin="lower",
        interpolation="nearest",
    )
    if marked is not None and marked.any():
        layer, head = np.nonzero(marked)
        axes.scatter(layer, head, s=9, c="black", edgecolors="white", linewidths=0.5)
    step = max(1, int(np.ceil(len(numbers) / 15)))
    axes.set_xticks(range(0, len(numbers), step), [str(number) for number in numbers[::step]])
    axes.set_yticks(range(0, values.shape[1], max(1, int(np.ceil(values.shape[1] / 9)))))
    axes.set(xlabel="layer", ylabel="head")
    axes.set_title(title, fontsize=10)
    return image


def save_layer_head_grid(
    path: Path,
    panels: Sequence[Panel],
    label: str,
    title: str,
    layers: Sequence[int] | None = None,
    columns: int = 2,
    shared_scale: bool = True,
) -> None:
    """Save one heatmap per panel (title, values [L,H], marked [L,H] bool or None).

    label: what the colours say, with the unit. With shared_scale all panels have one colour scale, else each its own.
    """
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    panel_width, panel_height = np.clip(0.17 * np.array(panels[0][1].shape), (2.8, 1.3), (8, 6))
    width, height = columns * (panel_width + BESIDE) - BESIDE, rows * (panel_height + BELOW) - BELOW
    # Fixed places: matplotlib's own layout search takes most of the time of a figure with many panels.
    spaces = {"wspace": BESIDE / panel_width, "hspace": BELOW / panel_height}
    spaces |= {"left": 0, "right": 1, "bottom": 0, "top": 1}  # labels lie outside; the saved picture has them
    figure, grid = plt.subplots(rows, columns, figsize=(width, height), squeeze=False, gridspec_kw=spaces)
    for unused in grid.ravel()[len(panels) :]:
        unused.set_axis_off()
    everything = np.concatenate([values.ravel() for _, values, _ in panels])
    for axes, (name, values, marked) in zip(grid.ravel(), panels, strict=False):
        shown = everything if shared_scale else values
        image = draw_layer_head(axes, values, symmetric_limit(shown), marked, layers, name)
        if not shared_scale:
            figure.colorbar(image, ax=axes, extend=_extend(shown), pad=0.02)
    if shared_scale:
        tall = min(3.5, height)
        bar = figure.add_axes((1 + 0.2 / width, 1 - tall / height, 0.2 / width, tall / height))
        figure.colorbar(image, cax=bar, label=textwrap.fill(label, max(16, int(12 * tall))), extend=_extend(everything))
    wrapped = textwrap.fill(title, int(11 * max(width, 5)))
    figure.suptitle(wrapped, fontsize=12, x=0, ha="left", y=1 + 0.6 / height, va="bottom")
    save_figure(path, figure)


def _extend(values: np.ndarray) -> str:
    """Which ends of a colour bar get an arrow: those beyond which a value lies."""
    limit = symmetric_limit(values)
    return ("neither", "min", "max", "both")[int((values < -limit).any()) + 2 * int((values > limit).any())]


def save_style_matrix(path: Path, values: np.ndarray, styles: Sequence[str], label: str, title: str) -> None:
    """Save a style × style matrix of correlations [n,n] with its numbers in the cells."""
    size = 1.8 + 0.62 * len(styles)
    figure, axes = plt.subplots(figsize=(size + 1.4, size), layout="constrained")
    image = axes.imshow(np.ma.masked_invalid(values), cmap=COLOURS, vmin=-1, vmax=1)
    for row, column in np.argwhere(np.isfinite(values)):
        value = values[row, column]
        colour = "white" if abs(value) > 0.65 else "black"
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color=colour)
    axes.set_xticks(range(len(styles)), styles, rotation=45, ha="right")
    axes.set_yticks(range(len(styles)), styles)
    axes.set(xlabel="style, other half of the templates", ylabel="style, one half of the templates")
    figure.colorbar(image, ax=axes, label=label, shrink=0.8)
    axes.set_title(title, fontsize=11)
    save_figure(path, figure)
