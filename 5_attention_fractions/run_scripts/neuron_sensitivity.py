"""Typo neurons and typo heads: units that work harder on a typo than on the clean word, however it is cut into tokens.

The score is that of Tsuji et al. (2025, arXiv 2502.19669):

    delta = mean(style) - max(mean(clean), mean(split))

where split is the clean word in as many tokens as the typo has, so that a unit that merely reacts to more tokens scores
nothing: the style `split@<style>` of the run, or for want of it `split`, which cuts words by an invisible character, in
another number of tokens (rows in which it cuts other words are left out). The summary's `control` says which. delta is
in units of activation, so that it favours layers whose activations are large; `--score effect_size` divides it by the
standard deviation, over the rows, of the change from the larger of the two. On SmolLM2 (200 prompts, swap) 71 of the
best 230 neurons by delta are in layer 29, the last, and most others after 20; by effect size most are in 13 to 21.
Neuron: the mean MLP activation (after the activation function) over the edited words and the last prompt token, from
which the answer is written (`--neuron_regions`; each region's mean counts once, so that a word of many tokens does not
outweigh the answer's). Head: S = mean over the queries of `--head_region` of 1 - H(attention) / log(visible keys). The
best 0.5 % of the neurons and 1.5 % of the heads are taken. Where `edited` is a region of the score, rows whose edited
words hold the first token of the sequence, the attention sink of most models, are left out (`--first_token excluded`).

What is best among thousands is partly luck. So units are found on one half of the rows (whole templates) and
confirmed on the other: there each found unit is tested against clean and against split (one-sided clustered t tests,
the larger p counts; BH over the found units), and the set as a whole against random sets of the same size with as many
units in each layer (random_low to random_high: 95 % of them) and, row by row, against the mean of its layers (excess, p
of the set; Holm over styles). Units move together, random sets do not: what the set proves is in p, not in its place
among them. A run without a control has `none` there, and its units may be units of more tokens. That these units do
something, only an ablation can show.

Reads   outputs/<run>/<style>/activations_*.pt (mlp_pooled: stage 2 with --neurons; attention_entropy)
Writes  results/<run>/neuron_sensitivity.csv   style, layer, neuron: the found neurons, best first
        results/<run>/typo_heads.csv           style, layer, head: the found heads
        results/<run>/neuron_sensitivity_summary.csv   style, unit: the sets
        results/<run>/neuron_sensitivity.png   confirmed units by style and layer

    python 5_attention_fractions/run_scripts/neuron_sensitivity.py --run_dir outputs/demo/maths
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / place) for place in ("", "../1_utils/run_scripts")]

import numpy as np
from attention.activation_rows import (
    StyleRows,
    add_first_token,
    blocks,
    changed_rows,
    clean_and_styles,
    control_of,
    is_control,
    like_control,
    tell_controls,
    templates_of,
    twin_region,
)
from command_line import UserError, make_parser, run_main
from file_output import write_csv
from logger import get_logger
from run_store import Run, open_run, warn_unfinished

if TYPE_CHECKING:
    import pandas as pd

NEURON, HEAD = "neuron", "head"
FIELDS = {NEURON: "mlp_pooled", HEAD: "attention_entropy"}
FLAGS = {NEURON: "--neurons", HEAD: "--entropy"}
BLOCK_NUMBERS = 20_000_000  # rows x units handled at once: 80 MB an array
ALPHA = 0.05
NO_SPREAD = 1e-6  # a spread below this share of the mean is rounding
FIND, CONFIRM = 0, 1
DELTA, EFFECT_SIZE = "delta", "effect_size"


@dataclass
class Study:
    """One kind of unit in one run; `regions`: pooled regions of a neuron's score, query region of a head's."""

    run: Run
    unit: str
    clean: StyleRows
    styles: dict[str, StyleRows]
    regions: list[str]
    halves: dict[str, int]  # of each template, see `deal`
    seed: int = 0
    without_first: bool = True  # rows whose edited words hold the first token, an attention sink, count in nothing
    score: str = DELTA

    def control(self, style: str) -> StyleRows | None:
        """The rows of a style's control, where the run has one."""
        return self.styles.get(str(control_of(self.run, style)))

    def block_size(self) -> int:
        """Rows that are handled at once."""
        shape = self.clean.first_content()[FIELDS[self.unit]].shape
        return max(1, min(64, BLOCK_NUMBERS // (shape[0] * (shape[-1] if self.unit == NEURON else shape[2]))))


@dataclass
class HalfSums:
    """Sums [2 halves, L, U] over the rows that all compared prompts have, and their number in each half."""

    style: Any = 0.0
    clean: Any = 0.0
    split: Any = 0.0
    over_clean: Any = 0.0  # squares of style - clean, for the effect size alone
    over_split: Any = 0.0
    n: np.ndarray = field(default_factory=lambda: np.zeros(2, dtype=int))
    templates: tuple[set[str], set[str]] = field(default_factory=lambda: (set(), set()))

    def delta(self, half: int, with_split: bool, score: str = DELTA) -> np.ndarray:
        """The score of every unit [L,U] on one half of the rows; an effect size without variance is 0."""
        n = self.n[half]
        style, clean = self.style[half] / n, self.clean[half] / n
        split = self.split[half] / n if with_split else clean
        change = style - np.maximum(clean, split)
        if score == DELTA:
            return change
        squares = self.over_clean[half]
        if with_split:
            squares = np.where(split > clean, self.over_split[half], squares)
        spread = np.sqrt(np.maximum(squares - n * change**2, 0) / (n - 1))
        return np.divide(change, spread, out=np.zeros_like(change), where=spread > NO_SPREAD * np.abs(change))


# --- values of units


def unit_values(study: Study, table: StyleRows, rows: list[int], style: str) -> np.ndarray:
    """[b, L, U] activations of neurons, or 1 - normalised entropy of heads; `style`: whose edited words are meant."""
    parts = []
    for region in study.regions:
        name = twin_region(region, style) if table is study.clean else region
        values = table.gather(FIELDS[study.unit], rows, name).transpose(0, 1).numpy()  # [b, L, U]
        parts.append(values if study.unit == NEURON else 1 - values)
    return np.mean(parts, axis=0) if len(parts) > 1 else parts[0]


def triples(study: Study, style: str) -> Iterator[tuple[list[int], np.ndarray, np.ndarray, np.ndarray | None]]:
    """(rows, style, clean, split values [b, L, U]) block by block; only rows that all of them have, changed, with a
    state for every region. split is None where the run has no such style."""
    own, control = study.styles[style], study.control(style)
    for block in blocks(study.clean.indices, study.block_size()):
        rows = changed_rows(study.clean, own, block)
        if control is not None:
            rows = like_control(own, control, rows, None)
        if study.without_first:
            rows = _off_first_token(study, style, rows)
        if not rows:
            continue
        values = [unit_values(study, own, rows, style), unit_values(study, study.clean, rows, style)]
        if control is not None:
            values.append(unit_values(study, control, rows, style))
        known = ~np.any([np.isnan(part).any(axis=(1, 2)) for part in values], axis=0)
        kept = [row for row, use in zip(rows, known, strict=True) if use]
        values = [part[known] for part in values]
        if kept:
            yield kept, values[0], values[1], values[2] if control is not None else None


def _off_first_token(study: Study, style: str, rows: list[int]) -> list[int]:
    """Those of `rows` whose edited words hold the first token in none of the compared prompts."""
    if "edited" not in study.regions or not rows:
        return rows
    on_first = np.array(study.styles[style].holds_first(rows, "edited"), dtype=bool)
    on_first |= study.clean.holds_first(rows, twin_region("edited", style))
    if (control := study.control(style)) is not None:
        on_first |= control.holds_first(rows, "edited")
    return [row for row, on in zip(rows, on_first, strict=True) if not on]


def sum_halves(study: Study, style: str) -> HalfSums:
    """One pass: the sums of every unit in both halves; templates go whole into one half."""
    sums = HalfSums()
    for rows, style_values, clean_values, split_values in triples(study, style):
        labels = [study.run.template(row) for row in rows]
        halves = np.array([study.halves[label] for label in labels])
        for label, half in zip(labels, halves.tolist(), strict=True):
            sums.templates[half].add(label)
        weights = np.stack([halves == FIND, halves == CONFIRM]).astype(np.float64)
        sums.n += weights.sum(axis=1).astype(int)
        sums.style = sums.style + np.einsum("hb,blu->hlu", weights, style_values)
        sums.clean = sums.clean + np.einsum("hb,blu->hlu", weights, clean_values)
        if split_values is not None:
            sums.split = sums.split + np.einsum("hb,blu->hlu", weights, split_values)
        if study.score == EFFECT_SIZE:
            squares = (style_values - clean_values).astype(np.float64) ** 2
            sums.over_clean = sums.over_clean + np.einsum("hb,blu->hlu", weights, squares)
            if split_values is not None:
                squares = (style_values - split_values).astype(np.float64) ** 2
                sums.over_split = sums.over_split + np.einsum("hb,blu->hlu", weights, squares)
    return sums


# --- finding and confirming


def top_units(delta: np.ndarray, share: float) -> np.ndarray:
    """[k, 2] (layer, unit) of the best `share` of all units by delta [L,U], best first; at least one."""
    count = max(1, round(share * delta.size))
    best = np.argsort(-delta, axis=None, kind="stable")[:count]
    return np.stack(np.unravel_index(best, delta.shape), axis=1)


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


def confirm(study: Study, style: str, found: np.ndarray) -> tuple[Any, Any]:
    """Clustered estimates on the confirming half: of each found unit's change [k, 2], and of the set's excess [2].

    The last axis: against clean, against split (NaN without the control). The set's excess is, row by row, the mean
    change of its units less the mean change of all other units of the same layers, weighted by layer as the set is.
    """
    from paired_stats import RowValues

    units, sets = RowValues((len(found), 2)), RowValues((2,))
    for rows, style_values, clean_values, split_values in triples(study, style):
        labels = [study.run.template(row) for row in rows]
        half = np.array([study.halves[label] == CONFIRM for label in labels])
        if not half.any():
            continue
        chosen = [label for label, use in zip(labels, half, strict=True) if use]
        own = style_values[half]
        floors = [clean_values, split_values if split_values is not None else np.full_like(clean_values, np.nan)]
        changes = [own - floor[half] for floor in floors]
        units.add(np.stack([change[:, found[:, 0], found[:, 1]] for change in changes], axis=-1), chosen)
        sets.add(np.stack([_excess(change, found) for change in changes], axis=-1), chosen)
    return units.finish(), sets.finish()


def _excess(change: np.ndarray, found: np.ndarray) -> np.ndarray:
    """[b]: mean of change [b,L,U] over the found units less that of the other units of their layers."""
    layers, counts = np.unique(found[:, 0], return_counts=True)
    total = np.zeros(len(change))
    for layer, count in zip(layers, counts, strict=True):
        mine = change[:, layer, found[found[:, 0] == layer, 1]].sum(axis=1, dtype=np.float64)
        others = change.shape[2] - count
        if others:
            total += mine - count * (change[:, layer].sum(axis=1, dtype=np.float64) - mine) / others
    return total / len(found)


def one_sided(estimate: Any) -> np.ndarray:
    """p of `the change is positive` against every control at hand: the larger one (last axis), NaN without any."""
    p = np.where(estimate.t > 0, estimate.p / 2, 1 - estimate.p / 2)
    known = ~np.isnan(p)
    return np.where(known.any(axis=-1), np.where(known, p, -np.inf).max(axis=-1), np.nan)


# --- tables


def study_style(study: Study, style: str, share: float, draws: int) -> tuple[pd.DataFrame, dict[str, Any]] | None:
    """(table of the found units, summary line) of a style; None, with a line in the log, where rows are too few."""
    sums = sum_halves(study, style)
    if min(len(templates) for templates in sums.templates) < 2:
        get_logger().warning(
            f"no {study.unit}s for {style}: a half of its rows has fewer than two templates (if the run has a control, "
            "only the rows that it matches count)"
        )
        return None
    with_split = study.control(style) is not None
    deltas = [sums.delta(half, with_split, study.score) for half in (FIND, CONFIRM)]
    found = top_units(deltas[FIND], share)
    units, sets = confirm(study, style, found)
    table = _unit_table(study, style, sums, deltas, found, units)
    return table, _summary_line(study, style, sums, deltas, found, sets, table, draws)


def _unit_table(
    study: Study, style: str, sums: HalfSums, deltas: list[np.ndarray], found: np.ndarray, units: Any
) -> pd.DataFrame:
    import pandas as pd
    from paired_stats import benjamini_hochberg

    at = (found[:, 0], found[:, 1])
    table = pd.DataFrame({"style": style, "layer": found[:, 0], study.unit: found[:, 1]})
    table["score"], table["rank"] = study.score, np.arange(1, len(found) + 1)
    table["n_find"], table["n"], table["n_clusters"] = sums.n[FIND], units.n[:, 0], units.n_clusters[:, 0]
    table["delta_find"], table["delta"] = deltas[FIND][at], deltas[CONFIRM][at]
    for name, total in (("style", sums.style), ("clean", sums.clean), ("split", sums.split)):
        table[f"mean_{name}"] = (total[CONFIRM] / sums.n[CONFIRM])[at] if np.ndim(total) else np.nan
    for column, name in enumerate(("clean", "split")):
        table[f"difference_to_{name}"] = units.mean[:, column]
        table[f"difference_to_{name}_ci_low"] = units.ci_low[:, column]
        table[f"difference_to_{name}_ci_high"] = units.ci_high[:, column]
    table["p"] = one_sided(units)
    table["p_adjusted"] = benjamini_hochberg(table["p"])
    table["confirmed"] = (table["p_adjusted"] <= ALPHA).astype(int)
    return table


def _summary_line(
    study: Study,
    style: str,
    sums: HalfSums,
    deltas: list[np.ndarray],
    found: np.ndarray,
    sets: Any,
    table: pd.DataFrame,
    draws: int,
) -> dict[str, Any]:
    from scipy import stats

    own = float(deltas[CONFIRM][found[:, 0], found[:, 1]].mean())
    random = random_set_means(deltas[CONFIRM], found, draws, study.seed)
    again = {tuple(unit) for unit in top_units(deltas[CONFIRM], len(found) / deltas[CONFIRM].size).tolist()}
    line: dict[str, Any] = {"style": style, "unit": study.unit}
    line |= {"control": control_of(study.run, style) or "none", "score": study.score, "n_find": sums.n[FIND]}
    line |= {"n": sums.n[CONFIRM], "n_clusters": sets.n_clusters[0], "n_units": deltas[FIND].size}
    line |= {"n_found": len(found), "n_confirmed": int(table["confirmed"].sum())}
    line |= {"delta_find": float(table["delta_find"].mean()), "delta": own}
    line |= {"random_delta": random.mean(), "random_low": np.quantile(random, 0.025)}
    line |= {"random_high": np.quantile(random, 0.975)}
    for column, name in enumerate(("clean", "split")):
        line[f"excess_over_{name}"] = sets.mean[column]
        line[f"excess_over_{name}_ci_low"], line[f"excess_over_{name}_ci_high"] = (
            sets.ci_low[column],
            sets.ci_high[column],
        )
    line |= {"p": float(one_sided(sets))}
    line |= {"found_again_share": sum(tuple(unit) in again for unit in found.tolist()) / len(found)}
    line |= {"found_again_by_chance": len(found) / deltas[FIND].size}
    line["split_half_rank_correlation"] = stats.spearmanr(deltas[FIND].ravel(), deltas[CONFIRM].ravel()).statistic
    return line


# --- script


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__)
    data = parser.add_argument_group("data")
    data.add_argument("--run_dir", type=Path, required=True, help="run folder of stage 2")
    data.add_argument("--results_dir", type=Path, help="where to write; default: results/<run name>")
    data.add_argument("--styles", nargs="+", help="styles to study; default: all")
    data.add_argument("--max_samples", type=int, help="first rows of the prompt file only")
    score = parser.add_argument_group("score")
    score.add_argument(
        "--score", choices=(DELTA, EFFECT_SIZE), default=DELTA, help="as published, or over the spread between rows"
    )
    score.add_argument("--neuron_regions", nargs="+", default=["edited", "last"], help="pooled regions of the score")
    score.add_argument("--head_region", default="all", help="query region of the heads' score")
    add_first_token(score)
    score.add_argument("--neuron_share", type=float, default=0.005, help="share of the neurons that is taken")
    score.add_argument("--head_share", type=float, default=0.015, help="share of the heads that is taken")
    score.add_argument("--random_sets", type=int, default=1000, help="random sets to compare with")
    score.add_argument("--seed", type=int, default=0, help="of the halves and the random sets")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Find and confirm typo neurons and typo heads; write the tables and the picture."""
    import pandas as pd
    from paired_stats import holm

    args = parse_args(argv)
    run = open_run(args.run_dir)
    folder = args.results_dir or Path("results") / run.name
    tables: dict[str, pd.DataFrame] = {}
    lines: list[dict[str, Any]] = []
    for study, share in open_studies(run, args):
        done = [study_style(study, style, share, args.random_sets) for style in study.styles if not is_control(style)]
        found = [one for one in done if one is not None]
        if found:
            tables[study.unit] = pd.concat([table for table, _ in found], ignore_index=True)
            lines += [line for _, line in found]
    if not lines:
        raise UserError(f"{run.path}: too few rows in every style; run stage 2 on more prompts")
    summary = pd.DataFrame(lines)
    summary["p_adjusted"] = summary.groupby("unit")["p"].transform(holm)
    for unit, name in ((NEURON, "neuron_sensitivity.csv"), (HEAD, "typo_heads.csv")):
        if unit in tables:
            write_csv(folder / name, tables[unit])
    write_csv(folder / "neuron_sensitivity_summary.csv", summary)
    _plot(tables, summary, _layer_count(run), folder / "neuron_sensitivity.png")
    get_logger().info(f"wrote {folder}/neuron_sensitivity_summary.csv and .png, {' and '.join(tables)} tables")
    return 0


def open_studies(run: Run, args: argparse.Namespace) -> list[tuple[Study, float]]:
    """The kinds of units that the run has, each with the share to take. Raises UserError where it has none."""
    clean_style, styles = clean_and_styles(run, args.styles)
    warn_unfinished(run, args.styles, args.max_samples)
    if all(is_control(style) for style in styles):
        raise UserError(f"{run.path}: only controls are there beside the clean form; run stage 2 with a typo style too")
    tell_controls(run, styles)
    clean = StyleRows(run, clean_style, args.max_samples)
    tables = {style: StyleRows(run, style, args.max_samples) for style in styles}
    from paired_stats import deal

    halves = deal(templates_of(run), 2, args.seed)
    studies = []
    for unit, regions, share in (
        (NEURON, list(args.neuron_regions), args.neuron_share),
        (HEAD, [args.head_region], args.head_share),
    ):
        if not 0 < share < 1:
            raise UserError(f"--{unit}_share {share}: give a share between 0 and 1")
        if all(table.has(FIELDS[unit]) for table in (clean, *tables.values())):
            first = args.first_token == "excluded"
            studies.append((Study(run, unit, clean, tables, regions, halves, args.seed, first, args.score), share))
        else:
            get_logger().warning(f"no {unit}s: the run holds no {FIELDS[unit]} (stage 2 with {FLAGS[unit]})")
    if not studies:
        raise UserError(f"{run.path}: neither mlp_pooled nor attention_entropy; run stage 2 again with --neurons")
    return studies


def _layer_count(run: Run) -> int:
    content = StyleRows(run, next(iter(run.styles))).first_content()
    return int(next(content[key].shape[0] for key in FIELDS.values() if key in content))


def _plot(tables: dict[str, pd.DataFrame], summary: pd.DataFrame, layers: int, path: Path) -> None:
    """Confirmed units by style and layer, a panel for each kind."""
    import matplotlib.pyplot as plt
    from attention.layer_curves import count_label
    from file_output import save_figure
    from matplotlib.ticker import MaxNLocator

    styles = list(summary["style"].unique())
    size = (max(6.0, 0.17 * layers + 3) * len(tables), 0.32 * len(styles) + 1.8)
    figure, panels = plt.subplots(1, len(tables), figsize=size, squeeze=False, layout="constrained")
    for axes, (unit, table) in zip(panels[0], tables.items(), strict=True):
        counts = np.zeros((len(styles), layers), dtype=int)
        good = table[table["confirmed"] == 1]
        np.add.at(counts, ([styles.index(style) for style in good["style"]], good["layer"].to_numpy()), 1)
        image = axes.imshow(counts, aspect="auto", cmap="Blues", vmin=0, vmax=max(1, counts.max()))
        lines = summary[summary["unit"] == unit].set_index("style").reindex(styles)
        labels = [
            f"{style} (too few rows)" if np.isnan(count) else f"{style} ({good_ones:.0f} of {count:.0f})"
            for style, good_ones, count in zip(styles, lines["n_confirmed"], lines["n_found"], strict=True)
        ]
        axes.set_yticks(range(len(styles)), labels)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=15, integer=True))
        axes.set_xlabel(f"layer ({count_label(lines['n'].dropna())} confirming prompts a style)")
        axes.set_title(
            f"Typo {unit}s by {summary['score'].iloc[0]}, confirmed on held-out templates (of those found)", fontsize=10
        )
        figure.colorbar(image, ax=axes, label=f"confirmed {unit}s", ticks=MaxNLocator(integer=True), pad=0.01)
    save_figure(path, figure)


if __name__ == "__main__":
    run_main(main)
