"""Typo neurons and typo heads: found on one half of the templates, confirmed on the other (docs/METHODS.md).

Arrays of unit values are [n, k, U]: rows, k layers at a time, U units of a layer (neurons or heads).
"""

from __future__ import annotations

import argparse
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from command_line import UserError
from file_output import save_figure
from logger import get_logger
from matplotlib.ticker import MaxNLocator
from paired_stats import Estimate, benjamini_hochberg, clustered_mean, deal, holm_over_styles
from plot_style import COUNTS, WIDTH
from run_store import Run
from scipy import stats
from style_names import is_again, is_control
from style_rows import (
    StyleRows,
    clean_and_styles,
    control_of,
    like_control,
    paired_rows,
    templates_of,
    twin_region,
    warn_missing_controls,
)

from attention.layer_curves import count_label
from attention.state_measures import layer_slices

NEURON, GATE, HEAD = "neuron", "gate", "head"  # a gate is the same neuron, read before it is multiplied
FIELDS = {NEURON: "mlp_pooled", GATE: "gate_pooled", HEAD: "attention_entropy"}
FLAGS = {NEURON: "--neurons", GATE: "--gates", HEAD: "--entropy"}
QUANTITIES = {NEURON: "down_proj input", GATE: "act_fn output", HEAD: "1 - entropy"}
FILES = {NEURON: "neuron_sensitivity.csv", GATE: "gate_sensitivity.csv", HEAD: "typo_heads.csv"}
ALPHA = 0.05
NO_SPREAD = 1e-6  # a spread below this share of the mean is rounding
FIND, CONFIRM = 0, 1


@dataclass
class Study:
    """One kind of unit in one run; `regions`: pooled regions of a neuron's score, query region of a head's."""

    run: Run
    args: argparse.Namespace
    unit: str
    share: float  # of all units that is taken
    regions: list[str]
    clean: StyleRows
    styles: dict[str, StyleRows]
    halves: dict[str, int]  # of each template, see `deal`

    def compared(self, style: str) -> list[StyleRows]:
        """The tables whose values a style's score compares: the style, the clean form, its control if it has one."""
        control = self.styles.get(str(control_of(self.run, style)))
        return [self.styles[style], self.clean] + ([] if control is None else [control])

    def half(self, rows: list[int]) -> np.ndarray:
        """[n] FIND or CONFIRM of each row."""
        return np.array([self.halves[self.run.template(row)] for row in rows], dtype=int)


def open_studies(run: Run, args: argparse.Namespace) -> list[Study]:
    """The kinds of units that the run has. Raises UserError if it has none, or no typo style."""
    clean_style, found = clean_and_styles(run, args.styles)
    styles = [style for style in found if not is_again(style)]  # it edits no word
    if all(is_control(style) for style in styles):
        raise UserError(f"{run.path}: only controls are there beside the clean form; run stage 2 with a typo style too")
    warn_missing_controls(run, styles)
    clean = StyleRows(run, clean_style, args.max_samples)
    tables = {style: StyleRows(run, style, args.max_samples) for style in styles}
    halves = deal(templates_of(run), 2, args.seed)
    studies = []
    for unit, share, regions in (
        (NEURON, args.neuron_share, args.neuron_regions),
        (GATE, args.neuron_share, args.neuron_regions),
        (HEAD, args.head_share, [args.head_region]),
    ):
        if not 0 < share < 1:
            raise UserError(f"--{'head' if unit == HEAD else 'neuron'}_share {share}: give a share between 0 and 1")
        if all(table.has(FIELDS[unit]) for table in (clean, *tables.values())):
            studies.append(Study(run, args, unit, share, list(regions), clean, tables, halves))
        elif unit != GATE:
            get_logger().warning(f"no {unit}s: the run holds no {FIELDS[unit]} (stage 2 with {FLAGS[unit]})")
    if not studies:
        raise UserError(f"{run.path}: no {' or '.join(FIELDS.values())}; run stage 2 again with --neurons")
    return studies


def find_units(run: Run, studies: list[Study]) -> tuple[dict[str, pd.DataFrame], pd.DataFrame]:
    """({unit: table of the found ones}, one line per style and unit). Raises UserError if every style is too small."""
    tables: dict[str, pd.DataFrame] = {}
    lines, too_few = [], []
    for study in studies:
        done = {style: study_style(study, style) for style in study.styles if not is_control(style)}
        too_few += [style for style, one in done.items() if one is None and style not in too_few]
        if found := [one for one in done.values() if one is not None]:
            tables[study.unit] = pd.concat([table for table, _ in found], ignore_index=True)
            lines += [line for _, line in found]
    if not lines:
        raise UserError(f"{run.path}: too few rows in every style; run stage 2 on more prompts")
    if too_few:
        get_logger().warning(
            f"no typo neurons or heads are searched for {', '.join(too_few)}: each half of a style's rows (if it has a "
            "control, of those that the control matches) needs two templates with states of its edited words"
        )
    summary = pd.DataFrame(lines)
    summary["p_adjusted"] = pd.concat([holm_over_styles(part) for _, part in summary.groupby("unit")])
    return tables, summary


def study_style(study: Study, style: str) -> tuple[pd.DataFrame, dict[str, Any]] | None:
    """(table of the found units, summary line) of a style; None if a half of its rows has fewer than two templates, or
    the style's edited words are not pooled."""
    if any(twin_region(name, style) not in study.clean.regions(FIELDS[study.unit]) for name in study.regions):
        return None
    halves = half_means(study, style, compared_rows(study, style))
    if any(len({study.run.template(row) for row in rows}) < 2 for rows in halves.rows):
        return None
    found = top_units(halves.delta[FIND], study.share)
    changes = found_changes(study, style, halves.rows[CONFIRM], found)
    clusters = study.clean.clusters(halves.rows[CONFIRM])
    units = clustered_mean(changes, clusters)
    excess = clustered_mean(excess_over_layers(changes, halves.layer_changes, halves.delta.shape[2], found), clusters)
    table = _unit_table(study, style, halves, found, units)
    return table, _summary_line(study, style, halves, found, excess, table)


# --- values of units


def compared_rows(study: Study, style: str) -> list[int]:
    """Rows that the style changes, that its control matches, and whose edited words are not on the first token."""
    own, clean, *controls = study.compared(style)
    rows = paired_rows(own, clean).changed
    for control in controls:
        rows = like_control(own, control, rows, None)
    if study.args.first_token == "excluded" and "edited" in study.regions and rows:
        on_first = clean.holds_first(rows, twin_region("edited", style))
        for table in (own, *controls):
            on_first |= table.holds_first(rows, "edited")
        rows = [row for row, on in zip(rows, on_first, strict=True) if not on]
    return rows


def unit_values(study: Study, table: StyleRows, rows: list[int], style: str, layers: slice) -> np.ndarray:
    """[n, k, U] activations of neurons, or 1 - normalised entropy of heads; `style`: whose edited words are meant."""
    names = [twin_region(region, style) if table is study.clean else region for region in study.regions]
    values = table.field(FIELDS[study.unit], rows, names[0], layers)
    for name in names[1:]:
        values += table.field(FIELDS[study.unit], rows, name, layers)
    values /= len(names)
    return 1 - values if study.unit == HEAD else values


@dataclass
class HalfMeans:
    """What both halves of a style's rows say about every unit."""

    rows: list[list[int]]  # of each half: those in which every compared prompt has a value for every unit
    means: np.ndarray  # [2 halves, style clean (control), L, U]
    delta: np.ndarray  # [2 halves, L, U] the score
    layer_changes: np.ndarray  # [n confirming rows, L, clean (control)] sum over a layer's units of style - it


def half_means(study: Study, style: str, rows: list[int]) -> HalfMeans:
    """Read all units of some rows, a few layers at a time, and average them over each half.

    The score is style - max(clean, control) of the means; an effect size is that over the standard deviation of the
    rows' change from the larger of the two, 0 without variance.
    """
    tables = study.compared(style)
    shape = study.clean.first_content()[FIELDS[study.unit]].shape
    count, width = int(shape[0]), int(shape[2] if study.unit == HEAD else shape[-1])
    parts: list[tuple[np.ndarray, ...]] = []
    todo = list(layer_slices(len(rows), width, count))
    while len(parts) < len(todo):
        values = [unit_values(study, table, rows, style, todo[len(parts)]) for table in tables]
        missing = np.any([~np.isfinite(part).all(axis=(1, 2)) for part in values], axis=0)
        if missing.any():  # such rows count in no layer: begin again without them
            rows, parts = [row for row, out in zip(rows, missing, strict=True) if not out], []
            continue
        of_row = study.half(rows)
        halves = [np.flatnonzero(of_row == half) for half in (FIND, CONFIRM)]
        with np.errstate(invalid="ignore", divide="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a half without rows: NaN, and the style is passed over
            means = np.array([[part[half].mean(axis=0, dtype=np.float64) for part in values] for half in halves])
            delta = means[:, 0] - means[:, 1:].max(axis=1)
            changes = [values[0] - part for part in values[1:]]
            if study.args.score == "effect_size":
                spreads = np.array(
                    [[change[half].std(axis=0, ddof=1, dtype=np.float64) for change in changes] for half in halves]
                )
                larger = means[:, 1:].argmax(axis=1)[:, None]  # clean if both are equal
                spread = np.take_along_axis(spreads, larger, axis=1)[:, 0]
                delta = np.divide(delta, spread, out=np.zeros_like(delta), where=spread > NO_SPREAD * np.abs(delta))
        sums = [change[halves[CONFIRM]].sum(axis=2, dtype=np.float64) for change in changes]
        parts.append((means, delta, np.stack(sums, axis=-1)))
    arrays = (np.concatenate(one, axis=axis) for one, axis in zip(zip(*parts, strict=True), (2, 1, 1), strict=True))
    by_half = [[rows[place] for place in half] for half in halves]
    return HalfMeans(by_half, *arrays)


# --- finding and confirming


def top_units(delta: np.ndarray, share: float) -> np.ndarray:
    """[k, 2] (layer, unit) of the best `share` of all units by delta [L,U], best first; at least one."""
    count = max(1, round(share * delta.size))
    best = np.argsort(-delta, axis=None, kind="stable")[:count]
    return np.stack(np.unravel_index(best, delta.shape), axis=1)


def found_changes(study: Study, style: str, rows: list[int], found: np.ndarray) -> np.ndarray:
    """[n, k, clean (control)] of the found units: the style's values less those of the clean form and the control."""
    layers, units = found.T

    def values(table: StyleRows) -> np.ndarray:
        whole = np.zeros((len(rows), len(found)), dtype=np.float32)
        for layer in np.unique(layers):
            here = layers == layer
            whole[:, here] = unit_values(study, table, rows, style, slice(layer, layer + 1))[:, 0, units[here]]
        return whole

    own, *others = (values(table) for table in study.compared(style))
    return np.stack([own - other for other in others], axis=-1)


def excess_over_layers(changes: np.ndarray, layer_changes: np.ndarray, width: int, found: np.ndarray) -> np.ndarray:
    """[n, clean (control)]: mean change of the found units less the mean change of their layers' other units.

    changes [n, k, .] of the found units, layer_changes [n, L, .] sums over all `width` units of a layer. Layers are
    weighted as in the set.
    """
    total = np.zeros((len(changes), changes.shape[2]))
    for layer, count in zip(*np.unique(found[:, 0], return_counts=True), strict=True):
        mine = changes[:, found[:, 0] == layer].sum(axis=1, dtype=np.float64)
        if others := width - count:
            total += mine - count * (layer_changes[:, layer] - mine) / others
    return total / len(found)


def random_set_means(delta: np.ndarray, found: np.ndarray, draws: int, seed: int) -> np.ndarray:
    """Mean delta [draws] of random sets with as many units in each layer as `found`, none of them found."""
    rng = np.random.default_rng(seed)
    totals, count = np.zeros(draws), 0
    for layer in np.unique(found[:, 0]):
        own = found[found[:, 0] == layer, 1]
        others = np.delete(delta[layer], own)
        take = min(len(own), len(others))
        count += take
        if take:
            totals += [rng.choice(others, take, replace=False, shuffle=False).sum() for _ in range(draws)]
    return totals / count if count else np.full(draws, np.nan)


def one_sided(estimate: Estimate) -> np.ndarray:
    """p of `the change is positive` against the clean form and the control (last axis): the larger one."""
    p = np.where(estimate.t > 0, estimate.p / 2, 1 - estimate.p / 2)
    known = ~np.isnan(p)
    return np.where(known.any(axis=-1), np.where(known, p, -np.inf).max(axis=-1), np.nan)


# --- tables


def _unit_table(study: Study, style: str, halves: HalfMeans, found: np.ndarray, units: Estimate) -> pd.DataFrame:
    """One line per found unit, best first; units: estimates [k, clean (control)] of its change."""
    at = (found[:, 0], found[:, 1])
    means = dict(zip(("style", "clean", "control"), halves.means[CONFIRM], strict=False))
    table = pd.DataFrame(
        {
            "style": style,
            "layer": found[:, 0],
            "head" if study.unit == HEAD else "neuron": found[:, 1],
            "quantity": QUANTITIES[study.unit],
            "score": study.args.score,
            "rank": np.arange(1, len(found) + 1),
            "n_find": len(halves.rows[FIND]),
            "n": units.n[:, 0],
            "n_clusters": units.n_clusters[:, 0],
            "delta_find": halves.delta[FIND][at],
            "delta": halves.delta[CONFIRM][at],
            **{f"mean_{name}": means[name][at] if name in means else np.nan for name in ("style", "clean", "control")},
            **_with_intervals("difference_to", units),
            "p": one_sided(units),
        }
    )
    table["p_adjusted"] = benjamini_hochberg(table["p"])
    table["confirmed"] = (table["p_adjusted"] <= ALPHA).astype(int)
    return table


def _with_intervals(name: str, found: Estimate) -> dict[str, Any]:
    """Columns <name>_clean and <name>_control with their intervals, of estimates [..., clean (control)]."""
    columns: dict[str, Any] = {}
    for place, reference in enumerate(("clean", "control")):
        one = Estimate(*(field[..., place] if place < field.shape[-1] else np.nan for field in found))
        columns |= one.columns(f"{name}_{reference}", f"{name}_{reference}_ci")
    return columns


def _summary_line(
    study: Study, style: str, halves: HalfMeans, found: np.ndarray, excess: Estimate, table: pd.DataFrame
) -> dict[str, Any]:
    """The found set as a whole; excess: estimates [clean (control)] of its excess over its layers."""
    find, confirm = halves.delta
    random = random_set_means(confirm, found, study.args.random_sets, study.args.seed)
    again = {tuple(unit) for unit in top_units(confirm, len(found) / confirm.size).tolist()}
    return {
        "style": style,
        "unit": study.unit,
        "quantity": QUANTITIES[study.unit],
        "control": control_of(study.run, style) or "none",
        "score": study.args.score,
        "n_find": len(halves.rows[FIND]),
        "n": len(halves.rows[CONFIRM]),
        "n_clusters": excess.n_clusters[0],
        "n_units": find.size,
        "n_found": len(found),
        "n_confirmed": int(table["confirmed"].sum()),
        "delta_find": float(table["delta_find"].mean()),
        "delta": float(table["delta"].mean()),
        "random_delta": random.mean(),
        "random_low": np.quantile(random, 0.025),
        "random_high": np.quantile(random, 0.975),
        **_with_intervals("excess_over", excess),
        "p": float(one_sided(excess)),
        "found_again_share": sum(tuple(unit) in again for unit in found.tolist()) / len(found),
        "found_again_by_chance": len(found) / find.size,
        "split_half_rank_correlation": stats.spearmanr(find.ravel(), confirm.ravel()).statistic,
    }


def plot_units(tables: dict[str, pd.DataFrame], summary: pd.DataFrame, layers: int, path: Path) -> None:
    """Confirmed units by style and layer, a panel for each kind."""
    searched = {unit: list(summary.loc[summary["unit"] == unit, "style"]) for unit in tables}
    heights = [0.34 * len(styles) + 1.3 for styles in searched.values()]
    figure, grid = plt.subplots(
        len(tables), 1, figsize=(WIDTH, sum(heights)), squeeze=False, layout="constrained", height_ratios=heights
    )
    for axes, (unit, table) in zip(grid[:, 0], tables.items(), strict=True):
        styles = searched[unit]
        counts = np.zeros((len(styles), layers), dtype=int)
        good = table[table["confirmed"] == 1]
        np.add.at(counts, ([styles.index(style) for style in good["style"]], good["layer"].to_numpy()), 1)
        image = axes.imshow(counts, aspect="auto", cmap=COUNTS, vmin=0, vmax=max(1, counts.max()))
        lines = summary[summary["unit"] == unit].set_index("style")
        labels = [
            f"{style} ({good_ones:.0f} of {count:.0f})"
            for style, good_ones, count in zip(styles, lines["n_confirmed"], lines["n_found"], strict=True)
        ]
        axes.set_yticks(range(len(styles)), labels)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=15, integer=True))
        axes.set_xlabel(f"layer ({count_label(lines['n'])} confirming prompts a style)")
        axes.set_title(
            f"Typo {unit}s by {summary['score'].iloc[0]}, confirmed on the other half of the prompts (of those found)"
        )
        figure.colorbar(image, ax=axes, label=f"confirmed {unit}s", ticks=MaxNLocator(nbins=5, integer=True), pad=0.01)
    save_figure(path, figure)
