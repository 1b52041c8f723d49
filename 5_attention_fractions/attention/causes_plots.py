"""Pictures of causal_effects.py: R by layer and position, of every head and of sets; reaction against cause."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from file_output import save_figure
from plot_style import AROUND_ZERO, COLOURS, GREY, label_ends, panels

from attention.causes_compared import NEURON_MEASURES, OWN, causes_of, rank_correlation
from attention.head_plots import save_layer_head_grid
from attention.heads import SHOWN
from attention.layer_curves import layer_axis

if TYPE_CHECKING:
    from attention.causes import Patches

LINES = {  # positions → (label, colour, dash)
    "edited": ("edited tokens", COLOURS[0], "-"),
    "edited_last": ("last edited token", COLOURS[4], "--"),
    "after": ("tokens after them", COLOURS[5], "-"),
    "readout": ("last prompt token", COLOURS[1], "-"),
    "all": ("all from the first edit on", COLOURS[2], "-."),
}
TOKEN = "token_"  # begins the name of a single token, counted from the first edited one
CONTROLS = {"other": ("edited, another item's donor", GREY, ":"), "random": ("edited, random direction", GREY, "-.")}
MOST_LINES = 6
ALPHA = 0.05
NAMED = 3  # units of the largest effect, and of the largest reaction, that a scatter names


def save_pictures(patched: Sequence[Patches], layers: pd.DataFrame, heads: pd.DataFrame, folder: Path) -> list[str]:
    """Save patching_layers, patching_map and patching_heads.png, as far as there is something to show; their names."""
    names = []
    residual = layers[(layers["site"] == "resid_pre") & (layers["donor"] == OWN)]
    if residual["layer"].nunique() > 1:
        names.append("patching_map.png")
        _save_map(patched, residual, folder / names[-1])
        groups = layers[(layers["site"] == "resid_pre") & layers["positions"].isin(LINES)]
        if len(groups):
            names.append("patching_layers.png")
            _save_layers(groups, folder / names[-1])
    shown = []
    for keys, part in heads[heads["donor"] == OWN].groupby(["style", "source", "site", "direction"], sort=False):
        shape = int(part["layer"].max()) + 1, int(part["head"].max()) + 1
        if len(part) < 2:
            continue
        values, marked = np.full(shape, np.nan), np.zeros(shape, dtype=bool)
        place = part["layer"].to_numpy(), part["head"].to_numpy()
        values[place] = part["R"]
        same = np.sign(part["R_first_half"]) == np.sign(part["R_second_half"])
        marked[place] = (part["p_adjusted"] < ALPHA) & same
        shown.append((f"{' '.join(map(str, keys))}, n = {part['n'].max()}", values, marked))
    if shown:
        names.append("patching_heads.png")
        title = "What patching one head restores (R); dots: adjusted p < 0.05, same sign in both halves of the prompts"
        save_layer_head_grid(folder / names[-1], shown, "R", title)
    return names


def _save_layers(table: pd.DataFrame, path: Path) -> None:
    """One panel per style, source and direction: R by layer with its 95 % interval."""
    groups = list(table.groupby(["style", "source", "direction"], sort=False))
    figure, grid = panels(len(groups), 1, 3.6, sharex=True)
    for axes, ((style, source, direction), part) in zip(grid, groups, strict=True):
        ends = []
        own = part[part["donor"] == OWN]
        curves = [(own[own["positions"] == name], *look) for name, look in LINES.items()]
        edited = part[part["positions"] == "edited"]
        curves += [(edited[edited["donor"] == donor], *look) for donor, look in CONTROLS.items()]
        for curve, label, colour, dash in [one for one in curves if len(one[0])][:MOST_LINES]:
            curve = curve.sort_values("layer")
            axes.plot(curve["layer"], curve["R"], dash, color=colour)
            ends.append((curve["R"].iloc[-1], label, colour))
            band = (curve[end].fillna(curve["R"]) for end in ("R_ci_low", "R_ci_high"))  # missing: no other number
            axes.fill_between(curve["layer"], *band, color=colour, alpha=0.12, lw=0)
        if (layer := own["hand_over_layer"].dropna()).size:
            axes.axvline(layer.iloc[0], color="black", linewidth=0.8, linestyle=":")
            axes.annotate(f" hand-over {layer.iloc[0]:.1f}", (layer.iloc[0], 0.02), xycoords=("data", "axes fraction"))
        axes.set(ylim=(min(-1.05, 1.05 * part["R"].min()), 1.1), ylabel="R: share of the effect restored")
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_title(f"{style}, donor {source}, {direction}; state before the layer; n = {own['n'].max()}")
        layer_axis(axes, "layer")
        label_ends(axes, ends)
    save_figure(path, figure)


def _save_map(patched: Sequence[Patches], residual: pd.DataFrame, path: Path) -> None:
    """R by position and layer: of all rows, and of the row whose effect is nearest to the mean effect.

    Positions are groups of tokens and, if they were patched, single tokens: of all rows, those that half of them have.
    """
    groups = list(residual.groupby(["style", "source", "direction"], sort=False))
    of = {(one.style, one.source): one for one in patched}
    figure, grid = panels(2 * len(groups), 2, max(1.9, 0.8 + 0.17 * residual["positions"].nunique()))
    for axes, ((style, source, direction), part) in zip(zip(grid[::2], grid[1::2], strict=True), groups, strict=True):
        count = part.groupby("positions", sort=False)["n"].max()
        singly = sorted((name for name in count.index if name.startswith(TOKEN)), key=_number)
        positions = [name for name in LINES if name in count.index] + singly
        one, layers = of[style, source], sorted(part["layer"].unique())
        usual = [name for name in positions if count[name] >= count.max() / 2]
        cells = part.pivot(index="positions", columns="layer", values="R").loc[usual]
        _draw_map(axes[0], cells, f"{style} {source} {direction}: mean, n = {count.max()}")
        places = {
            name: one.where(site="resid_pre", positions=name, direction=direction, donor=OWN) for name in positions
        }
        before = np.nanmean(np.concatenate([one.whole("nats", place) for place in places.values()], axis=1), axis=1)
        row = int(np.nanargmin(np.abs(before - np.nanmean(before))))
        with np.errstate(divide="ignore", invalid="ignore"):
            shares = {
                name: pd.Series((one.gain("nats", place) / one.whole("nats", place))[row], one.cells["layer"][place])
                for name, place in places.items()
            }
        cells = pd.DataFrame(shares).T.reindex(columns=layers).dropna(how="all")
        title = f"row {one.rows[row] + 1} alone ({before[row]:.2f} nats)"
        image = _draw_map(axes[1], cells, title, one.tokens.get(one.rows[row], ()))
    figure.colorbar(image, ax=grid, label="R", extend="both", shrink=0.8)
    figure.suptitle("Share of the effect restored by the residual stream before a layer", fontsize=11)
    save_figure(path, figure)


def _number(positions: str) -> int:
    """Which token behind the first edited one `token_3` is."""
    return int(positions.removeprefix(TOKEN))


def _label(positions: str, tokens: Sequence[tuple[str, bool]]) -> str:
    """A group's name; of a single token `+3`, its text in quotes if known, and * if it is edited."""
    if positions in LINES:
        return LINES[positions][0]
    text, edited = tokens[_number(positions)] if tokens else ("", False)
    quoted = repr(text).replace("$", r"\$")  # two of them would be a formula
    return f"{quoted}{'*' * edited} +{_number(positions)}" if tokens else f"+{_number(positions)}"


def _draw_map(
    axes: plt.Axes, cells: pd.DataFrame, title: str, tokens: Sequence[tuple[str, bool]] = ()
) -> plt.cm.ScalarMappable:
    """Draw R [positions, layers], as in a table."""
    image = axes.imshow(cells.to_numpy(dtype=float), cmap=AROUND_ZERO, vmin=-1, vmax=1, aspect="auto")
    step = max(1, len(cells.columns) // 10)
    axes.set_xticks(range(0, len(cells.columns), step), cells.columns[::step])
    axes.set_yticks(range(len(cells)), [_label(name, tokens) for name in cells.index], fontsize=8)
    axes.set_xlabel("layer")
    axes.set_title(title, fontsize=9)
    return image


def save_units(
    units: pd.DataFrame, patched: Sequence[Patches], sets: pd.DataFrame, reactions: pd.DataFrame, folder: Path
) -> list[str]:
    """Save patching_reactions.png and patching_sets.png, as far as there is something to show; return their names."""
    shown = []
    for keys, cause, effects in causes_of(units, patched):
        own = reactions[(reactions["style"] == keys["style"]) & (reactions["site"] == keys["site"])]
        measure = next((name for name in (*SHOWN, *NEURON_MEASURES.values()) if name in {*own["measure"]}), None)
        reaction = own[own["measure"] == measure].set_index(["layer", "head"])["t_vs_control"]
        pairs = effects.to_frame("effect").join(reaction, how="inner").dropna().abs()
        if len(pairs) >= 5:
            shown.append((keys, cause, measure, pairs))
    names = []
    if shown:
        names.append("patching_reactions.png")
        _save_scatter(shown, folder / names[-1])
    grown = sets[sets["units"].notna() & sets["R"].notna()] if len(sets) else sets
    if len(grown) > 1:
        names.append("patching_sets.png")
        _save_sets(grown, folder / names[-1])
    return names


def _save_scatter(shown: Sequence[tuple[dict[str, str], str, str | None, pd.DataFrame]], path: Path) -> None:
    """A panel per family of units: how clearly a unit reacts (|t|), and what it causes."""
    figure, grid = panels(len(shown), 2, 3.6)
    for axes, (keys, cause, measure, pairs) in zip(grid, shown, strict=True):
        axes.scatter(pairs["t_vs_control"], pairs["effect"], s=9, color=COLOURS[0], alpha=0.5, lw=0, rasterized=True)
        strongest = pairs.nlargest(NAMED, "effect").index.union(pairs.nlargest(NAMED, "t_vs_control").index)
        for layer, unit in strongest:
            place = pairs.loc[(layer, unit)]
            axes.annotate(f"{layer}.{unit}", (place["t_vs_control"], place["effect"]), fontsize=7)
        found = rank_correlation(pairs["effect"], pairs["t_vs_control"])
        label = "|R| of patching it" if cause == "patched" else "|nats| by attribution"
        axes.set(xlabel=f"reaction: |t| against the control\n{measure}", ylabel=f"cause: {label}")
        interval = f"[{found['spearman_ci_low']:.2f}, {found['spearman_ci_high']:.2f}]"
        axes.set_title(
            f"{keys['style']} {keys['source']} {keys['site']} {keys['direction']}, {len(pairs)} units\n"
            f"rank correlation {found['spearman']:.2f} {interval}",
            fontsize=9,
        )
        axes.grid(alpha=0.25)
    figure.suptitle("Do the units that react also cause? (layer.unit)", fontsize=11)
    save_figure(path, figure)


def _save_sets(sets: pd.DataFrame, path: Path) -> None:
    """A panel per family of sets of growing size: R beside that of random sets of the same layers."""
    groups = list(sets.groupby(["style", "source", "site", "direction", "donor"], sort=False))
    figure, grid = panels(len(groups), 2, 3.2)
    for axes, (keys, part) in zip(grid, groups, strict=True):
        part = part.sort_values("units")
        axes.plot(part["units"], part["R"], "o-", color=COLOURS[0], markersize=3, label="best by attribution")
        axes.fill_between(part["units"], part["R_ci_low"], part["R_ci_high"], color=COLOURS[0], alpha=0.12, lw=0)
        axes.plot(part["units"], part["R_random"], "s--", color=GREY, markersize=3, label="random, same layers")
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set(xscale="log", xlabel="units patched together", ylabel="R: share of the effect restored")
        axes.set_title(f"{' '.join(map(str, keys))}, n = {part['n'].max()}", fontsize=9)
        axes.grid(alpha=0.25)
    grid[0].legend(fontsize=8)
    save_figure(path, figure)
