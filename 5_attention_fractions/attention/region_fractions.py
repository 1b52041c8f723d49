"""Fractions of attention on regions and their density, by style, layer and head: the work of dirs_eval.py.

The chain: `attention_fields` of a file → `fraction_cells` → whole arrays of a style and its clean form → tables.
What fraction, density, uniform share and sink are: docs/METHODS.md, "dirs_eval.py".
"""

from __future__ import annotations

import argparse
import gc
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from command_line import UserError
from file_output import file_word, save_figure, write_csv
from matplotlib import pyplot as plt
from paired_stats import Estimate, benjamini_hochberg, clustered_mean, holm_over_styles
from plot_style import OTHER_COLOUR, STYLE_COLOUR, WIDTH
from run_store import Run
from style_rows import StyleRows, paired_rows

from attention.attention_fields import EDITED, QUERIES, REGIONS, Fields, fields_reader, layers_of

SINK = ("included", "excluded")
MEASURES = ("fraction", "density")
_ALL_CELLS = list(itertools.product(QUERIES, SINK, REGIONS, MEASURES))
CELLS = [cell for cell in _ALL_CELLS if cell[1:3] != ("excluded", "first")]  # the last axis of `fraction_cells`
FILE_NAMES = {"instruction": "frac_prompt", "task": "frac_task"}  # the file names of the original pipeline
SHOWN_REGIONS = {"instruction": "frac_instruction", "task": "frac_task"}  # of the prompt_task_fraction_* tables
MIN_OFF_FIRST = 0.01  # below this the float16 mass off the first token is mostly rounding
TABLES = {"model": "aggregate", "layer": "perlayer", "head": "perhead"}


# --- values of one file


def fraction_cells(fields: Fields) -> np.ndarray:
    """Fractions and densities [B,L,H,K] of a file's rows, K in the order of CELLS."""
    holds = fields["holds_first"][:, None, None, None]
    fraction = _with_and_without_first(fields["mass"], holds, fields["whole"])  # [B,L,H,Q,2,R]
    even = uniform_shares(fields)[:, :, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        density = np.where(even > 0, fraction / even, np.nan)
    both = np.stack([fraction, density], axis=-1).reshape(*fraction.shape[:3], len(_ALL_CELLS))
    return both[..., [_ALL_CELLS.index(cell) for cell in CELLS]]


def uniform_shares(fields: Fields) -> np.ndarray:
    """The fractions [B,L,Q,2,R] that even attention would give, first token included and excluded."""
    return _with_and_without_first(fields["uniform"], fields["holds_first"][:, None, None])


def _with_and_without_first(mass: np.ndarray, holds_first: np.ndarray, whole: np.ndarray | float = 1.0) -> np.ndarray:
    """Mass [...,Q,R] with and without the first token, [...,Q,2,R]; whole [...,Q]: the mass of all tokens."""
    column = REGIONS.index("first")
    first = mass[..., column : column + 1]
    left = np.asarray(whole)[..., None] - first
    with np.errstate(divide="ignore", invalid="ignore"):
        without = np.where(left >= MIN_OFF_FIRST, (mass - holds_first * first) / left, np.nan)
    without[..., column] = np.nan
    return np.stack([mass, without], axis=-2)


def all_levels(cells: np.ndarray) -> list[np.ndarray]:
    """[n,L,H,K] → the heads [n,L*H,K], the means over each layer's heads [n,L,K], the mean over all [n,1,K]."""
    known = ~np.isnan(cells)
    total, count = np.sum(cells, axis=2, where=known, dtype=np.float64), known.sum(axis=2)
    with np.errstate(invalid="ignore"):
        model = total.sum(axis=1, keepdims=True) / count.sum(axis=1, keepdims=True)
        return [cells.reshape(len(cells), cells.shape[1] * cells.shape[2], cells.shape[3]), total / count, model]


# --- one style


@dataclass(frozen=True)
class StyleFractions:
    """What is kept of a style: its table, and what the box plots need.

    uniform [L,Q,2,R]: mean share of even attention; tokens [R]: mean number of tokens; by_layer [n,L+1,K]: the CELLS of
    each row, by layer and of the model.
    """

    style: str
    layers: list[int]
    uniform: np.ndarray
    tokens: np.ndarray
    by_layer: np.ndarray
    table: pd.DataFrame


def style_fractions(run: Run, style: str, args: argparse.Namespace) -> StyleFractions | None:
    """Read a style and the clean form of its rows; None if it has no rows. Raises UserError without attention."""
    own = StyleRows(run, style, args.max_samples, max_open=2)
    if not own.indices:
        return None
    layers = layers_of(own.first_content())
    found = own.extract(_reader(own, layers, None, args))
    cells, clusters = found["cells"], own.clusters(own.indices)
    levels = all_levels(cells)
    most = [1 if cell[3] == "fraction" else np.inf for cell in CELLS]
    estimates = [clustered_mean(level, clusters).within(0, most) for level in levels]
    by_layer = np.concatenate(levels[1:], axis=1, dtype=np.float32)
    del levels
    change, clusters, counts = cells[:0], [], {"n_identical": 0, "n_unpaired": 0}
    if run.clean_style not in (None, style):
        clean = StyleRows(run, str(run.clean_style), args.max_samples, max_open=2)
        pairs = paired_rows(own, clean)
        counts = {"n_identical": len(pairs.identical), "n_unpaired": len(pairs.unpaired)}
        if pairs.changed:
            change = clean.extract(_reader(clean, layers, style, args), pairs.changed)["cells"]
            for row, place in enumerate(np.searchsorted(own.indices, pairs.changed)):
                change[row] = cells[place] - change[row]
            clusters = own.clusters(pairs.changed)
    changes = [clustered_mean(level, clusters) for level in all_levels(change)]
    table = _style_table(style, layers, cells.shape[2], found, estimates, changes, counts)
    return StyleFractions(style, layers, _mean_rows(found["uniform"]), _mean_rows(found["tokens"]), by_layer, table)


def _reader(
    rows: StyleRows, layers: list[int], compared: str | None, args: argparse.Namespace
) -> Callable[[dict[str, Any], Path], Fields]:
    """What is read of each file of a style; see `fields_reader`."""
    read = fields_reader(rows, layers, compared, args.tokenizer, args.first_token == "excluded")

    def extract(content: dict[str, Any], path: Path) -> Fields:
        fields = read(content, path)
        tokens = fields["tokens"].astype(np.float32)
        tokens[~fields["has_edited"], EDITED] = np.nan
        cells, uniform = fraction_cells(fields), uniform_shares(fields)
        return {"cells": cells.astype(np.float32), "uniform": uniform.astype(np.float32), "tokens": tokens}

    return extract


# --- tables


def _style_table(
    style: str,
    layers: list[int],
    heads: int,
    found: Fields,
    estimates: Sequence[Estimate],
    changes: Sequence[Estimate],
    counts: dict[str, int],
) -> pd.DataFrame:
    """Every cell of a style: one row per level, layer, head, query, sink, region, measure; no empty ones."""
    places: list[Any] = [(layer, head, "head") for layer in layers for head in range(heads)]
    places += [*((layer, None, "layer") for layer in layers), (None, None, "model")]
    frame = pd.DataFrame(places, columns=["layer", "head", "level"]).astype({"layer": "Int64", "head": "Int64"})
    frame = frame.loc[frame.index.repeat(len(CELLS))].reset_index(drop=True)
    frame.insert(0, "style", style)
    for name, column in zip(("query", "sink", "region", "measure"), zip(*CELLS, strict=True), strict=True):
        frame[name] = np.tile(np.array(column, dtype=object), len(places))
    tokens, uniform = _mean_rows(found["tokens"]), found["uniform"]
    frame["tokens"] = np.tile([tokens[REGIONS.index(cell[2])] for cell in CELLS], len(places))
    means = {"fraction": _mean_rows(uniform), "density": _mean_rows(np.where(uniform > 0, uniform, np.nan))}
    by_layer = np.stack([uniform_share_of(means[cell[3]], *cell[:3]) for cell in CELLS], axis=-1)  # [L,K]
    by_level = [by_layer.repeat(heads, axis=0), by_layer, by_layer.mean(axis=0, keepdims=True)]
    frame["uniform_share"] = np.concatenate(by_level).ravel()
    over_heads, over_layers = (np.transpose([benjamini_hochberg(p) for p in one.p.T]) for one in changes[:2])
    adjusted = np.concatenate([over_heads, over_layers, np.full((1, len(CELLS)), np.nan)])
    estimate, change = (
        Estimate(*(np.concatenate(field).ravel() for field in zip(*one, strict=True))) for one in (estimates, changes)
    )
    columns = {"n": estimate.n, **estimate.columns("estimate", "ci"), "n_paired": change.n, **counts}
    columns |= {"n_clusters": estimate.n_clusters, **change.columns("difference", "difference_ci")}
    frame = frame.assign(**columns, p=change.p, p_adjusted=adjusted.ravel())
    partly = (frame["level"] == "model") & (frame["measure"] == "density") & frame["uniform_share"].isna()
    return frame[(frame["n"] > 0) & ~partly].reset_index(drop=True)


def _mean_rows(values: np.ndarray) -> np.ndarray:
    """Mean over the rows [n, ...] that have a value; NaN if none has."""
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.sum(values, axis=0, where=known, dtype=np.float64) / known.sum(axis=0)


def uniform_share_of(uniform: np.ndarray, query: str, sink: str, region: str) -> np.ndarray:
    """The uniform share [L] of one kind of fraction, of [L,Q,2,R]."""
    return uniform[:, QUERIES.index(query), SINK.index(sink), REGIONS.index(region)]


def write_tables(
    results: Sequence[StyleFractions], folder: Path, query: str, sink: str, levels: Sequence[str]
) -> list[Path]:
    """Write attention_fractions.csv of these levels and the three tables of one query and sink; returns their paths.

    p_adjusted of the model's rows is Holm's over the styles (controls and repairs apart), for each kind of row.
    """
    table = pd.concat([result.table for result in results], ignore_index=True)
    gc.freeze()  # statsmodels collects garbage at each Holm: a quarter of a second with all libraries loaded
    model = table[table["level"] == "model"]
    for _, rows in model.groupby(["query", "sink", "region", "measure"], sort=False):
        table.loc[rows.index, "p_adjusted"] = holm_over_styles(rows)
    paths = [folder / "attention_fractions.csv"]
    write_csv(paths[0], table[table["level"].isin(levels)])
    for level, word in TABLES.items():
        paths.append(folder / f"prompt_task_fraction_{word}.csv")
        write_csv(paths[-1], wide_table(table, level, query, sink))
    return paths


def wide_table(table: pd.DataFrame, level: str, query: str, sink: str) -> pd.DataFrame:
    """One row per style (and layer, and head) with frac_instruction, frac_task and what belongs to them.

    Each has its interval, uniform share, density and paired difference; frac_context, frac_edited and frac_first are
    means alone. frac_prompt repeats frac_instruction under the original pipeline's name.
    """
    keys = ["style", *{"model": [], "layer": ["layer"], "head": ["layer", "head"]}[level]]
    chosen = table[(table["level"] == level) & (table["query"] == query) & (table["sink"] == sink)]
    cells = {pair: rows.set_index(keys) for pair, rows in chosen.groupby(["region", "measure"], sort=False)}
    if ("task", "fraction") not in cells:
        raise UserError("no row has a finite attention on the task; run stage 2 with another --dtype")
    out = cells["task", "fraction"][["query", "sink", "n", "n_paired", "n_identical", "n_clusters"]].copy()
    for region, name in SHOWN_REGIONS.items():
        rows = cells[region, "fraction"]
        out[name] = rows["estimate"]
        for column in ("ci_low", "ci_high", "uniform_share"):
            out[f"{name}_{column}"] = rows[column]
        density = cells.get((region, "density"))
        out[f"{name}_density"] = float("nan") if density is None else density["estimate"]
        out[f"{name}_density_n"] = 0 if density is None else density["n"]
        for column in ("difference", "difference_ci_low", "difference_ci_high", "p", "p_adjusted"):
            out[f"{name}_{column}"] = rows[column]
    for region in ("context", "edited", "first"):
        out[f"frac_{region}"] = cells[region, "fraction"]["estimate"] if (region, "fraction") in cells else float("nan")
    out["frac_prompt"] = out["frac_instruction"]
    return out.reset_index()


# --- box plots


def save_boxplots(results: Sequence[StyleFractions], folder: Path, query: str, sink: str) -> list[Path]:
    """The box plots over rows: by style, and for each style by layer; a plot of a region no prompt has is removed."""
    paths = []
    note = {"last": "last token", "mean": "mean query"}[query] + f", first token {sink}"
    for region, name in FILE_NAMES.items():
        path, cell = folder / f"boxplot_{name}.png", CELLS.index((query, sink, region, "fraction"))
        having = [one for one in results if one.tokens[REGIONS.index(region)] > 0]
        if not having:  # no prompt has the region: its fraction is 0 by definition
            path.unlink(missing_ok=True)
            continue
        boxes = [box_of(one.by_layer[:, -1, cell]) for one in having]
        labels = [f"{one.style} (n = {len(one.by_layer)})" for one in having]
        even = [float(uniform_share_of(one.uniform, query, sink, region).mean()) for one in having]
        _save_boxes(path, boxes, labels, even, f"Attention on the {region} ({note})", "style", region)
        paths.append(path)
    cell = CELLS.index((query, sink, "instruction", "fraction"))
    for one in results:
        path = folder / f"boxplot_perlayer_frac_prompt_{file_word(one.style)}.png"
        if not one.tokens[REGIONS.index("instruction")] > 0:
            path.unlink(missing_ok=True)
            continue
        boxes = [box_of(one.by_layer[:, layer, cell]) for layer in range(len(one.layers))]
        title = f"Attention on the instruction by layer: {one.style} ({note}, n = {len(one.by_layer)} prompts)"
        even = uniform_share_of(one.uniform, query, sink, "instruction").tolist()
        _save_boxes(path, boxes, [str(layer) for layer in one.layers], even, title, "layer", "instruction")
        paths.append(path)
    return paths


def box_of(values: np.ndarray) -> dict[str, Any]:
    """matplotlib `bxp` statistics of values [n]: quartiles, whiskers at 5 % and 95 %; NaN is left out."""
    known = values[~np.isnan(values)]
    at = np.quantile(known, (0.05, 0.25, 0.5, 0.75, 0.95)).tolist() if len(known) else [float("nan")] * 5
    return {**dict(zip(("whislo", "q1", "med", "q3", "whishi"), at, strict=True)), "fliers": []}


def _save_boxes(
    path: Path, boxes: list[dict[str, Any]], labels: list[str], even: list[float], title: str, what: str, region: str
) -> None:
    """Boxes of styles below each other, or of layers side by side."""
    places, upright = list(range(1, len(boxes) + 1)), what == "layer"
    figure, axes = plt.subplots(figsize=(WIDTH, 4 if upright else 1.6 + 0.34 * len(boxes)), layout="constrained")
    way: Any = "vertical" if upright else "horizontal"
    axes.bxp(boxes, showfliers=False, medianprops={"color": STYLE_COLOUR, "linewidth": 2}, widths=0.6, orientation=way)
    label = "mean share of tokens (even attention)"
    points = (places, even) if upright else (even, places)
    axes.plot(*points, linestyle="none", marker="D", markersize=5, color=OTHER_COLOUR, label=label)
    axes.plot([], [], color="black", label="box: quartiles; whiskers: 5 % to 95 % of prompts")
    share = f"share of attention on the {region} (mean over heads)"
    axes.grid(axis="y" if upright else "x")
    if upright:
        step = -(-len(places) // 22)
        axes.set_xticks(places[::step], labels[::step])
        axes.set(xlabel=what, ylabel=share)
    else:
        axes.set_yticks(places, labels)
        axes.invert_yaxis()
        axes.set_xlabel(share)
    axes.set_title(title)
    figure.legend(loc="outside lower left", ncols=2)
    save_figure(path, figure)
