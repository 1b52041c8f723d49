"""The pictures of head_sensitivity.py: a map of layers and heads for each style, and the overlap of the styles."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from command_line import UserError
from file_output import file_word, save_figure
from matplotlib.axes import Axes
from matplotlib.image import AxesImage
from plot_style import AROUND_ZERO, BLACK, WIDTH, remove_pictures
from style_names import is_control

from attention.heads import ALPHA, CLEAN, CONTROL, MEASURES, Comparison, with_equal_tokens

Panel = tuple[str, np.ndarray, np.ndarray | None]  # title, values [L,H], marked [L,H] bool
NAMED = 3  # heads whose numbers are written above a map
LABEL_WIDTH = 0.05  # of a map, at least between two numbers
ENDS = {CLEAN: "", CONTROL: "_vs_control"}  # of the names of columns and files
DOTS = f"dots: adjusted p < {ALPHA}"


def save_pictures(
    comparisons: Sequence[Comparison], tables: dict[str, pd.DataFrame], folder: Path, measure: str
) -> list[Path]:
    """One map of layers and heads for each style: against its control if it has one, else against the clean form; the
    same of flipped answers; and how far the styles share their heads. Returns their paths."""
    heads = tables["head_sensitivity"]
    having = [one for one in comparisons if ((heads["style"] == one.style) & (heads["measure"] == measure)).any()]
    if not having:
        raise UserError(f"--measure {measure}: no row of these styles has it; choose another, see head_sensitivity.csv")
    for name in ("head_sensitivity", "head_answer_flips"):
        remove_pictures(folder, f"{name}_*.png")
    matched = with_equal_tokens(heads[(heads["measure"] == measure) & heads["difference_vs_control"].notna()])
    paths = []
    for one in (one for one in having if not is_control(one.style)):
        paths.append(folder / f"head_sensitivity_{file_word(one.style)}.png")
        _save_map(paths[-1], heads, one, measure, one.style in {*matched["style"]})
    for reference, part in tables["head_overlap"].groupby("reference_form", sort=False):
        if among := [one.style for one in having if one.style in {*part["style"]}]:
            paths.append(folder / f"head_overlap{ENDS[str(reference)]}.png")
            _save_overlap(paths[-1], part[part["measure"] == measure], among, measure, str(reference))
    if "head_answer_flips" in tables:
        paths += _save_flips(comparisons, tables["head_answer_flips"], folder, measure)
    return paths


def _save_map(path: Path, heads: pd.DataFrame, one: Comparison, measure: str, controlled: bool) -> None:
    """The change of every head of a style, with the numbers of the surest heads."""
    end = ENDS[CONTROL] if controlled else ""
    own = heads[(heads["style"] == one.style) & (heads["measure"] == measure)]
    other = own["control"].iloc[0] if controlled else "clean form"
    title = f"{one.style} minus {other}, n = {own[f'n{end}'].max():.0f} pairs; {DOTS}"
    panel = _panel(heads, one, measure, title, f"difference{end}", f"p_adjusted{end}")
    places = {layer: place for place, layer in enumerate(one.layers)}
    sure = own[own[f"p_adjusted{end}"] < ALPHA].nsmallest(NAMED, f"rank{end}")
    named = [(places[layer], head) for layer, head in zip(sure["layer"], sure["head"], strict=True)]
    label = f"{MEASURES[measure].caption}: {MEASURES[measure].scale}"
    save_layer_head_grid(path, [panel], label, "", one.layers, named)


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
    """Maps of the correlation of each head's change with a flipped answer; none of a style with too few flips."""
    paths = []
    for one in (one for one in comparisons if not is_control(one.style)):
        own = flips[(flips["style"] == one.style) & (flips["measure"] == measure) & flips["point_biserial_r"].notna()]
        rows = with_equal_tokens(own[own["reference_form"] == CONTROL])
        rows = own[own["reference_form"] == CLEAN] if rows.empty else rows
        if rows.empty:
            continue
        other = rows["control"].iloc[0] if rows["reference_form"].iloc[0] == CONTROL else CLEAN
        title = f"{one.style} minus {other}, n = {rows['n'].max()}, {rows['n_flipped'].max()} flipped; {DOTS}"
        paths.append(folder / f"head_answer_flips_{file_word(one.style)}.png")
        panel = _panel(rows, one, measure, title, "point_biserial_r")
        save_layer_head_grid(paths[-1], [panel], "point-biserial r", "", one.layers)
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
    look: dict[str, Any] = {"aspect": "auto", "origin": "lower", "interpolation": "nearest"}
    image = axes.imshow(np.ma.masked_invalid(values.T), cmap=AROUND_ZERO, vmin=-limit, vmax=limit, **look)
    if marked is not None and marked.any():
        layer, head = np.nonzero(marked)
        size = float(np.clip(400 / max(values.shape), 3, 12))
        axes.scatter(layer, head, s=size, c=BLACK, edgecolors="white", linewidths=0.5)
    step = max(1, int(np.ceil(len(numbers) / 16)))
    axes.set_xticks(range(0, len(numbers), step), [str(number) for number in numbers[::step]])
    axes.set_yticks(range(0, values.shape[1], max(1, int(np.ceil(values.shape[1] / 16)))))
    axes.set(xlabel="layer", ylabel="head")
    axes.set_title(title)
    return image


def save_layer_head_grid(
    path: Path,
    panels: Sequence[Panel],
    label: str,
    title: str,
    layers: Sequence[int] | None = None,
    named: Sequence[tuple[int, int]] = (),
) -> None:
    """Save one heatmap per panel (title, values [L,H], marked [L,H] bool or None) below each other, in one scale.

    label: what the colours say, with the unit. named: (place of the layer, head) of cells that get their numbers.
    """
    cells = panels[0][1].shape
    height = float(np.clip(0.26 * cells[1], 1.6, 8))
    figure, grid = plt.subplots(
        len(panels), 1, figsize=(WIDTH, (height + 0.8) * len(panels) + 0.3), squeeze=False, layout="constrained"
    )
    everything = np.concatenate([values.ravel() for _, values, _ in panels])
    limit = symmetric_limit(everything)
    numbers = list(range(cells[0])) if layers is None else list(layers)
    for axes, (name, values, marked) in zip(grid[:, 0], panels, strict=True):
        image = draw_layer_head(axes, values, limit, marked, layers, name)
        at = -1.0
        for place, head in sorted(named):  # above the map, so that no cell is hidden, and a line to the cell
            at = max(at + LABEL_WIDTH, (place + 0.5) / cells[0])
            axes.annotate(
                f"{numbers[place]}.{head}",
                (place, head),
                (at, 1.02),
                textcoords="axes fraction",
                ha="center",
                fontsize=9,
                arrowprops={"arrowstyle": "-", "linewidth": 0.7, "shrinkB": 0},
            )
        if named:
            axes.set_title(name, pad=20)
            axes.plot(*zip(*named, strict=True), "s", ms=8, mfc="none", mec=BLACK, mew=1.2)
    wrapped = textwrap.fill(label, max(14, int(9 * height)))
    figure.colorbar(
        image, ax=grid[:, 0], label=wrapped, extend=_extend(everything), pad=0.01, aspect=height * len(panels) / 0.22
    )
    if title:
        figure.suptitle(textwrap.fill(title, 100), x=0.01, ha="left")
    save_figure(path, figure)


def _extend(values: np.ndarray) -> str:
    """Which ends of a colour bar get an arrow: those beyond which a value lies."""
    limit = symmetric_limit(values)
    return ("neither", "min", "max", "both")[int((values < -limit).any()) + 2 * int((values > limit).any())]


def save_style_matrix(path: Path, values: np.ndarray, styles: Sequence[str], label: str, title: str) -> None:
    """Save a style × style matrix of correlations [n,n] with its numbers in the cells."""
    size = 1.8 + 0.62 * len(styles)
    figure, axes = plt.subplots(figsize=(size + 1.4, size), layout="constrained")
    image = axes.imshow(np.ma.masked_invalid(values), cmap=AROUND_ZERO, vmin=-1, vmax=1)
    for row, column in np.argwhere(np.isfinite(values)):
        value = values[row, column]
        colour = "white" if abs(value) > 0.65 else "black"
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color=colour)
    axes.set_xticks(range(len(styles)), styles, rotation=45, ha="right")
    axes.set_yticks(range(len(styles)), styles)
    axes.set(xlabel="style, other half of the prompts", ylabel="style, one half of the prompts")
    figure.colorbar(image, ax=axes, label=label, shrink=0.8)
    axes.set_title(title, fontsize=11)
    save_figure(path, figure)
