"""Pictures of layers and heads: heatmaps with a colour scale centred at zero, and matrices of styles."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from file_output import save_figure
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

DIVERGING = "RdBu_r"
Panel = tuple[str, np.ndarray, np.ndarray | None]  # title, values [L,H], marked [L,H] bool


def file_word(style: str) -> str:
    """A style's name as a part of a file name."""
    return re.sub(r"[^\w.-]", "_", style)


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
    colours = matplotlib.colormaps[DIVERGING].with_extremes(bad="0.75")
    image = axes.imshow(
        np.ma.masked_invalid(values.T),
        cmap=colours,
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
    figure, grid = _grid(len(panels), columns, panels[0][1].shape, shared_scale)
    everything = np.concatenate([values.ravel() for _, values, _ in panels])
    limit = symmetric_limit(everything)
    for axes, (name, values, marked) in zip(grid, panels, strict=True):
        own = limit if shared_scale else symmetric_limit(values)
        image = draw_layer_head(axes, values, own, marked, layers, name)
        if not shared_scale:
            figure.colorbar(image, ax=axes, extend=_extend(values, own), pad=0.02)
    if shared_scale:
        bar = _bar_axes(figure)
        wrapped = textwrap.fill(label, max(16, int(12 * bar.get_position().height * figure.get_figheight())))
        figure.colorbar(image, cax=bar, label=wrapped, extend=_extend(everything, limit))
    # Anchored at its foot: a title of several lines grows upward, and the saved picture with it.
    wrapped = textwrap.fill(title, int(11 * figure.get_figwidth()))
    figure.suptitle(wrapped, fontsize=12, x=0.01, ha="left", y=1 - 0.27 / figure.get_figheight(), va="bottom")
    save_figure(path, figure)


# Fixed margins in inches: matplotlib's own layout search takes most of the time of a figure with many panels.
LEFT, RIGHT, TOP, BOTTOM, BETWEEN, ABOVE = 0.6, 0.25, 0.35, 0.5, 0.65, 0.45
BAR = 1.15


def _grid(count: int, columns: int, shape: tuple[int, ...], with_bar: bool) -> tuple[Figure, list[Axes]]:
    """A figure with `count` axes for heatmaps of shape [L,H], row by row, and room for one colour bar at the right."""
    rows = -(-count // columns)
    width, height = _panel_size(shape)
    right = RIGHT + (BAR if with_bar else 0)
    whole_width = LEFT + columns * width + (columns - 1) * BETWEEN + right
    whole_height = TOP + rows * (height + ABOVE) + (rows - 1) * BOTTOM + BOTTOM
    figure, grid = plt.subplots(rows, columns, figsize=(whole_width, whole_height), squeeze=False)
    figure.subplots_adjust(
        left=LEFT / whole_width,
        right=1 - right / whole_width,
        bottom=BOTTOM / whole_height,
        top=1 - (TOP + ABOVE) / whole_height,
        wspace=BETWEEN / width,
        hspace=(BOTTOM + ABOVE) / height,
    )
    for axes in grid.ravel()[count:]:
        axes.set_axis_off()
    return figure, list(grid.ravel()[:count])


def _bar_axes(figure: Figure) -> Axes:
    width, height = figure.get_size_inches()
    tall = min(3.5, height - TOP - ABOVE - BOTTOM)
    return figure.add_axes((1 - (BAR + 0.05) / width, 1 - (TOP + ABOVE + tall) / height, 0.2 / width, tall / height))


def save_style_matrix(path: Path, values: np.ndarray, styles: Sequence[str], label: str, title: str) -> None:
    """Save a style × style matrix of correlations [n,n] with its numbers in the cells."""
    size = 1.8 + 0.62 * len(styles)
    figure, axes = plt.subplots(figsize=(size + 1.4, size), layout="constrained")
    colours = matplotlib.colormaps[DIVERGING].with_extremes(bad="0.75")
    image = axes.imshow(np.ma.masked_invalid(values), cmap=colours, vmin=-1, vmax=1)
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


def _panel_size(shape: tuple[int, ...]) -> tuple[float, float]:
    layers, heads = shape
    return float(np.clip(0.17 * layers, 2.8, 8)), float(np.clip(0.17 * heads, 1.3, 6))


def _extend(values: np.ndarray, limit: float) -> str:
    known = values[np.isfinite(values)]
    low, high = bool((known < -limit).any()), bool((known > limit).any())
    return {(True, True): "both", (True, False): "min", (False, True): "max", (False, False): "neither"}[low, high]
