"""One look for all pictures: sizes, colours that colour-blind readers tell apart, labels at the ends of lines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

# Okabe and Ito's colours, without yellow, which is pale on white, and with blue and vermilion first.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
BLACK, GREY, PALE = "#1D2530", "#7F7F7F", "#E3E6EA"
STYLE_COLOUR, OTHER_COLOUR, CLEAN_COLOUR = COLOURS[0], COLOURS[1], GREY
AROUND_ZERO = mpl.colormaps["RdBu_r"].with_extremes(bad="0.8")  # blue: less, white: none, red: more, grey: unknown
COUNTS = "Blues"
WIDTH = 9.6  # inches of a picture as wide as the report's column
MOST_LINES = 6  # in one panel
mpl.rcParams.update(
    {
        "font.size": 10,
        "axes.titlesize": 11,
        "axes.titlelocation": "left",
        "axes.labelsize": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "grid.color": PALE,
        "legend.frameon": False,
        "figure.titlesize": 12,
    }
)


def panels(count: int, columns: int, height: float, **shared: Any) -> tuple[Any, list[Any]]:
    """A figure as wide as the page, and `count` axes in rows of at most `columns`, each row `height` inches."""
    columns = min(columns, count)
    rows = -(-count // columns)
    size = (WIDTH * (0.5 + 0.5 * (columns > 1)) + 1.6 * (columns == 1), height * rows + 0.3)
    figure, grid = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained", **shared)
    for unused in grid.ravel()[count:]:
        unused.set_axis_off()
    return figure, list(grid.ravel()[:count])


def label_ends(axes: Any, ends: Sequence[tuple[float, str, Any]]) -> None:
    """Write each line's name (last y, name, colour) right of the panel, moved up or down so that none overlaps.

    The limits of the y axis must be final.
    """
    low, high = axes.get_ylim()
    ends = sorted((end for end in ends if end[0] == end[0]), key=lambda end: end[0])
    places = [(y - low) / (high - low) for y, _, _ in ends]
    size = 0.9 * mpl.rcParams["font.size"]
    step = 1.3 * size / 72 / (axes.figure.get_figheight() * axes.get_position().height)
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + step)
    top = 1.0
    for i in reversed(range(len(places))):
        places[i] = min(places[i], top)
        top = places[i] - step
    for (_, name, colour), place in zip(ends, places, strict=True):
        where: dict[str, Any] = {"xycoords": "axes fraction", "xytext": (5, 0), "textcoords": "offset points"}
        axes.annotate(name, (1, place), color=colour, fontsize=size, va="center", **where)


def remove_pictures(folder: Path, pattern: str) -> None:
    """Remove the pictures that an earlier run made of other styles."""
    for path in folder.glob(pattern):
        path.unlink()
