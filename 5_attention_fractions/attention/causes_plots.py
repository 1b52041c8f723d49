"""Pictures of causal_effects.py: R by layer for each group of positions, and R of every head."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from file_output import save_figure

from attention.head_plots import save_layer_head_grid
from attention.layer_curves import layer_axis

LINES = {  # positions → (label, colour, dash); colours of Okabe and Ito, told apart by colour-blind readers
    "edited": ("edited tokens", "#0072B2", "-"),
    "edited_last": ("last edited token", "#56B4E9", "--"),
    "after": ("tokens after them", "#E69F00", "-"),
    "readout": ("last prompt token", "#D55E00", "-"),
}
CONTROL_LINE = ("edited, another item's donor", "#999999", ":")
ALPHA = 0.05


def save_pictures(layers: pd.DataFrame, heads: pd.DataFrame, folder: Path) -> list[str]:
    """Save patching_layers.png and patching_heads.png, as far as there is something to show; return their names."""
    names = []
    residual = layers[(layers["site"] == "resid_pre") & (layers["donor"] == "own")]
    if residual["layer"].nunique() > 1:
        names.append("patching_layers.png")
        _save_layers(layers[layers["site"] == "resid_pre"], folder / names[-1])
    panels = []
    for keys, part in heads[heads["donor"] == "own"].groupby(["style", "source", "site", "direction"], sort=False):
        shape = int(part["layer"].max()) + 1, int(part["head"].max()) + 1
        if part["site"].iloc[0] == "mlp_post" or len(part) < 2:
            continue
        values, marked = np.full(shape, np.nan), np.zeros(shape, dtype=bool)
        place = part["layer"].to_numpy(), part["head"].to_numpy()
        values[place] = part["R"]
        same = np.sign(part["R_first_half"]) == np.sign(part["R_second_half"])
        marked[place] = (part["p_adjusted"] < ALPHA) & same
        panels.append((f"{' '.join(map(str, keys))}, n = {part['n'].max()}", values, marked))
    if panels:
        names.append("patching_heads.png")
        title = (
            "What patching one head restores (R); dots: adjusted p < 0.05, same sign in both halves of the templates"
        )
        save_layer_head_grid(folder / names[-1], panels, "R", title)
    return names


def _save_layers(table: pd.DataFrame, path: Path) -> None:
    """One panel per style, source and direction: R by layer with its 95 % interval."""
    groups = list(table.groupby(["style", "source", "direction"], sort=False))
    figure, grid = plt.subplots(
        len(groups), 1, figsize=(9.5, 3.6 * len(groups)), squeeze=False, sharex=True, layout="constrained"
    )
    for axes, (keys, part) in zip(grid[:, 0], groups, strict=True):
        own, other = part[part["donor"] == "own"], part[part["donor"] == "other"]
        curves = [(own[own["positions"] == name], *look) for name, look in LINES.items()]
        for curve, label, colour, dash in [*curves, (other[other["positions"] == "edited"], *CONTROL_LINE)]:
            if curve.empty:
                continue
            curve = curve.sort_values("layer")
            axes.plot(curve["layer"], curve["R"], dash, color=colour, label=label)
            axes.fill_between(curve["layer"], curve["R_ci_low"], curve["R_ci_high"], color=colour, alpha=0.12, lw=0)
        if (layer := own["hand_over_layer"].dropna()).size:
            axes.axvline(layer.iloc[0], color="black", linewidth=0.8, linestyle=":")
            axes.annotate(f" hand-over {layer.iloc[0]:.1f}", (layer.iloc[0], 1.0), fontsize=8, va="bottom")
        axes.set(ylim=(-1.05, 1.1), ylabel="R: share of the effect restored")
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_title(
            f"{' '.join(map(str, keys))}: residual stream before the layer, n = {own['n'].max()}", fontsize=10
        )
        layer_axis(axes, "layer")
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8, frameon=False)
    save_figure(path, figure)
