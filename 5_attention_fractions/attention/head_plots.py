"""The pictures of head_sensitivity.py: heatmaps of layers and heads, and the overlap of the styles."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from command_line import UserError

from attention.heads import ALPHA, CLEAN, CONTROL, MEASURES, SHOWN, Comparison, with_equal_tokens
from attention.heatmaps import Panel, file_word, save_layer_head_grid, save_style_matrix

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
