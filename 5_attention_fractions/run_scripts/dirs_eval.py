"""Where attention goes: the fraction on the instruction, the task, the edited words, per style, layer and head.

Reads   outputs/<run>/<style>/activations_*.pt (span_mass, or raw maps; the reference format with --tokenizer)
Writes  attention_fractions.csv                every region, query and measure; model, layers and heads
        prompt_task_fraction_aggregate.csv, _perlayer.csv, _perhead.csv    frac_prompt and frac_task, one row a cell
        boxplot_frac_prompt.png, boxplot_frac_task.png, boxplot_perlayer_frac_prompt_<style>.png

    python 5_attention_fractions/run_scripts/dirs_eval.py --run_dir outputs/demo/maths --results_dir results/demo/maths

fraction  attention mass on a region, 0 to 1; context, instruction and task are disjoint, and sum to 1
baseline  the fraction if each query spread its attention evenly over the tokens it may see: the share of tokens. In a
          layer with a sliding window, of those in the window; files that do not tell it are taken to have none. A
          layer that sees in another way has no baseline and no density, and the model has none then
density   fraction / baseline per row: 1 is even attention, 2 is twice the mass per token; missing where the region is
          empty or out of the window's reach (then the fraction is 0; the density has an n of its own, and beside it
          in attention_fractions.csv the baseline of those rows)
query     `last`, the last prompt token, or `mean`, the mean over all prompt tokens
sink      `excluded`: the first token, a usual attention sink, is taken out of the region and of the whole,
          (mass(R) - mass(first, where it lies in R)) / (mass(all) - mass(first)); missing where under 1 % is left. A
          framing that is put before a prompt takes the sink with it: on SmolLM2 the task's fraction falls by 0.29 from
          `normal` to `polite` with the first token, and by 0.17 without it (the last token's, 210 prompts of
          instructions.json)

If a model has a sink of its own in the softmax (gpt-oss), its keys get 1 minus what that takes: `included` fractions
sum to that, and even attention to the keys has that density; `excluded` fractions sum to 1. A row whose edited words
hold the first token is missing from `edited`, for their attention would be the sink's (`--first_token`).

A style's difference is to the clean form on the same rows, rows whose text equals the clean one left out
(n_identical); `edited` is compared with the same words in the clean form. Intervals and p values are clustered by
template; p_adjusted is Holm's over styles for the model, Benjamini-Hochberg's over layers, and over layers x heads.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / place) for place in ("", "../1_utils/run_scripts")]

from attention.activation_rows import add_first_token
from command_line import UserError, make_parser, run_main
from logger import get_logger

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from attention.paired_rows import Batch, Extract
    from matplotlib.axes import Axes
    from paired_stats import RowValues
    from run_store import Run

QUERIES = ("last", "mean")
SINK = ("included", "excluded")
REGIONS = ("context", "instruction", "task", "edited", "first")
MEASURES = ("fraction", "density")
_ALL_CELLS = list(itertools.product(QUERIES, SINK, REGIONS, MEASURES))
CELLS = [cell for cell in _ALL_CELLS if cell[1:3] != ("excluded", "first")]  # the last axis of `fraction_cells`
OLD_NAMES = {"instruction": "frac_prompt", "task": "frac_task"}
MIN_OFF_FIRST = 0.01  # below this the float16 mass off the first token is mostly rounding


# --- values of one file


def fraction_cells(fields: Batch) -> np.ndarray:
    """Fractions and densities [B,L,H,K] of a file's rows, K in the order of CELLS; see the top for the formulas."""
    import numpy as np

    holds = fields["holds_first"]
    fraction = _with_and_without_first(fields["mass"], holds[:, None, None, None], fields["whole"])  # [B,L,H,Q,2,R]
    baseline = baseline_of(fields)[:, :, None]
    fraction[..., REGIONS.index("edited")][_no_edit(fields)] = np.nan
    with np.errstate(divide="ignore", invalid="ignore"):
        density = np.where(baseline > 0, fraction / baseline, np.nan)
    both = np.stack([fraction, density], axis=-1).reshape(*fraction.shape[:3], len(_ALL_CELLS))
    return both[..., [_ALL_CELLS.index(cell) for cell in CELLS]]


def baseline_of(fields: Batch) -> np.ndarray:
    """The fractions [B,L,Q,2,R] that even attention would give, first token included and excluded; NaN as those are."""
    import numpy as np

    baseline = _with_and_without_first(fields["uniform"], fields["holds_first"][:, None, None])
    baseline[..., REGIONS.index("edited")][_no_edit(fields)] = np.nan
    return baseline


def _no_edit(fields: Batch) -> np.ndarray:
    """Rows [B] without an edited word, or (unless they are kept) whose edited words hold the first token."""
    column = REGIONS.index("edited")
    on_first = (fields["holds_first"][:, column] > 0) & ("first_token_kept" not in fields)
    return (fields["tokens"][:, column] == 0) | on_first


def _with_and_without_first(mass: np.ndarray, holds_first: np.ndarray, whole: np.ndarray | float = 1.0) -> np.ndarray:
    """Mass [...,Q,R] with and without the first token, [...,Q,2,R]; whole [...,Q]: the mass of all tokens."""
    import numpy as np

    column = REGIONS.index("first")
    first = mass[..., column : column + 1]
    left = np.asarray(whole)[..., None] - first
    with np.errstate(divide="ignore", invalid="ignore"):
        without = np.where(left >= MIN_OFF_FIRST, (mass - holds_first * first) / left, np.nan)
    without[..., column] = np.nan
    return np.stack([mass, without], axis=-2)


def all_levels(values: np.ndarray) -> np.ndarray:
    """[B,L,H,K] → [B, L*H + L + 1, K]: the heads, the mean over each layer's heads, the mean over all."""
    import numpy as np

    rows, layers, heads, cells = values.shape
    known = ~np.isnan(values)
    total, count = np.where(known, values, 0).sum(axis=2), known.sum(axis=2)
    with np.errstate(invalid="ignore"):
        by_layer = total / count
        by_model = total.sum(axis=1, keepdims=True) / count.sum(axis=1, keepdims=True)
    return np.concatenate([values.reshape(rows, layers * heads, cells), by_layer, by_model], axis=1)


# --- one style


@dataclass
class StyleSums:
    """The rows of one style; cells are [L*H + L + 1, K], see `all_levels`."""

    style: str
    estimate: RowValues | None = None
    difference: RowValues | None = None
    heads: int = 0
    layers: list[int] = field(default_factory=list)
    identical: int = 0
    unpaired: int = 0
    rows: int = 0
    baseline: list[np.ndarray] = field(default_factory=list)  # share of the visible tokens [b,L,Q,2,R]
    tokens: list[np.ndarray] = field(default_factory=list)  # [b,R]
    boxes: list[np.ndarray] = field(default_factory=list)  # [b,L+1,2] of what the box plots show

    def add(self, batch: Batch, clusters: list[str], boxes: list[int]) -> np.ndarray:
        """Add the rows of a file; returns their cells [B,L,H,K]."""
        import numpy as np
        from paired_stats import RowValues

        cells = fraction_cells(batch)
        levels = all_levels(cells)
        if self.estimate is None or self.difference is None:
            self.estimate, self.difference = (RowValues(levels.shape[1:]) for _ in range(2))
        self.estimate.add(levels.astype(np.float32), clusters)
        self.heads = cells.shape[2]
        self.rows += len(levels)
        self.baseline.append(baseline_of(batch).astype(np.float32))
        tokens = batch["tokens"].astype(float)
        tokens[_no_edit(batch), REGIONS.index("edited")] = float("nan")
        self.tokens.append(tokens)
        self.boxes.append(levels[:, cells.shape[1] * cells.shape[2] :, boxes])
        return cells


def box_of(values: np.ndarray) -> dict[str, Any]:
    """matplotlib `bxp` statistics of values [n]: quartiles, whiskers at 5 % and 95 %; NaN is left out."""
    import numpy as np

    known = values[~np.isnan(values)]
    at = np.quantile(known, (0.05, 0.25, 0.5, 0.75, 0.95)).tolist() if len(known) else [float("nan")] * 5
    return {**dict(zip(("whislo", "q1", "med", "q3", "whishi"), at, strict=True)), "fliers": []}


@dataclass(frozen=True)
class StyleReport:
    """What is kept of a style: its table, and what the box plots need."""

    style: str
    rows: int
    layers: list[int]
    baseline: np.ndarray
    tokens: np.ndarray  # [R]: mean number of tokens in each region
    boxes: np.ndarray  # [n,L+1,2]: fractions on the instruction and the task of each row, by layer and of the model
    table: pd.DataFrame

    def baseline_of(self, args: argparse.Namespace, region: str) -> np.ndarray:
        """Share of the visible tokens [L] that a region has, as the plots show it."""
        return _of_cell(self.baseline, args.query, args.sink, region)


def style_report(run: Run, style: str, args: argparse.Namespace) -> StyleReport | None:
    """The table and box plots' numbers of one style; None where it has no rows."""
    import numpy as np

    sums = style_sums(run, style, args)
    if not sums.rows:
        return None
    baseline, tokens = (_mean_rows(np.concatenate(parts)) for parts in (sums.baseline, sums.tokens))
    boxes = np.concatenate(sums.boxes)
    return StyleReport(style, sums.rows, sums.layers, baseline, tokens, boxes, style_table(sums))


def style_sums(run: Run, style: str, args: argparse.Namespace) -> StyleSums:
    """Read a style, and the clean run beside it, once. Raises UserError where a file holds no attention."""
    from attention.paired_rows import paired_batches, read_rows

    clean = run.clean_style
    result = StyleSums(style)
    boxes = [CELLS.index((args.query, args.sink, region, "fraction")) for region in OLD_NAMES]
    rows = read_rows(run, style, _extractor(run, style, None, args, result), args.max_samples)
    if style == clean or clean is None:
        for batch in rows:
            result.add(batch, [run.template(int(i)) for i in batch["original_index"]], boxes)
        return result
    clean_rows = read_rows(run, clean, _extractor(run, clean, style, args), args.max_samples)
    for pair in paired_batches(rows, clean_rows):
        labels = [run.template(int(i)) for i in pair.rows["original_index"]]
        cells = result.add(pair.rows, labels, boxes)
        result.identical += pair.identical
        result.unpaired += pair.unpaired
        if len(pair.paired) and result.difference is not None:
            _check_same_heads(cells, pair.clean["mass"], style)
            change = cells[pair.paired] - fraction_cells(pair.clean)
            result.difference.add(all_levels(change).astype("float32"), [labels[i] for i in pair.paired])
    return result


def _extractor(
    run: Run, style: str, compared: str | None, args: argparse.Namespace, result: StyleSums | None = None
) -> Extract:
    from attention.attention_fields import attention_fields, edited_region, layers_of
    from attention.reference_format import TokenRegions

    reference = TokenRegions(args.tokenizer, run, style, compared) if args.tokenizer else None
    edited = edited_region(style, run.clean_style, compared)

    def extract(content: dict[str, Any], path: Path) -> Batch:
        if result is not None:
            result.layers = layers_of(content, path, result.layers)
        fields = attention_fields(content, path, edited, reference)
        kept = {"first_token_kept": fields["tokens"][:, 0]} if args.first_token == "included" else {}
        return fields | kept

    return extract


def _check_same_heads(variant: np.ndarray, clean: np.ndarray, style: str) -> None:
    if variant.shape[1:3] != clean.shape[1:3]:
        raise UserError(
            f"style {style!r} has {variant.shape[1]} layers x {variant.shape[2]} heads, its clean run "
            f"{clean.shape[1]} x {clean.shape[2]}; run both with one model and the same --raw_layers"
        )


# --- tables


def style_table(sums: StyleSums) -> pd.DataFrame:
    """Every cell of a style: one row per level, layer, head, query, sink, region, measure; no empty ones."""
    import numpy as np

    assert sums.estimate is not None
    assert sums.difference is not None
    estimate, difference = sums.estimate.finish(), sums.difference.finish()
    places = _level_rows(sums.layers, sums.heads)
    frame = places.loc[places.index.repeat(len(CELLS))].reset_index(drop=True)
    frame.insert(0, "style", sums.style)
    for name, column in zip(("query", "sink", "region", "measure"), zip(*CELLS, strict=True), strict=True):
        frame[name] = np.tile(np.array(column, dtype=object), len(places))
    tokens, baseline = _mean_rows(np.concatenate(sums.tokens)), np.concatenate(sums.baseline)
    frame["tokens"] = np.tile([tokens[REGIONS.index(cell[2])] for cell in CELLS], len(places))
    means = {"fraction": _mean_rows(baseline), "density": _mean_rows(np.where(baseline > 0, baseline, np.nan))}
    by_layer = np.stack([_of_cell(means[cell[3]], *cell[:3]) for cell in CELLS], axis=-1)  # [L,K]
    levels = [by_layer.repeat(sums.heads, axis=0), by_layer, by_layer.mean(axis=0, keepdims=True)]
    frame["baseline"] = np.concatenate(levels).ravel()
    columns = {
        "n": estimate.n, "estimate": estimate.mean, "ci_low": estimate.ci_low, "ci_high": estimate.ci_high,
        "n_paired": difference.n, "n_identical": sums.identical, "n_unpaired": sums.unpaired,
        "n_clusters": estimate.n_clusters, "difference": difference.mean, "difference_ci_low": difference.ci_low,
        "difference_ci_high": difference.ci_high, "p": difference.p,
        "p_adjusted": adjusted_by_level(difference.p, len(sums.layers) * sums.heads),
    }  # fmt: skip
    for name, values in columns.items():
        frame[name] = values if isinstance(values, int) else values.ravel()
    partly = (frame["level"] == "model") & (frame["measure"] == "density") & frame["baseline"].isna()
    return frame[(frame["n"] > 0) & ~partly].reset_index(drop=True)


def _mean_rows(values: np.ndarray) -> np.ndarray:
    """Mean over the rows [n, ...] that have a value; NaN if none has."""
    import numpy as np

    known = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(known, values, 0).sum(axis=0, dtype=np.float64) / known.sum(axis=0)


def _of_cell(baseline: np.ndarray, query: str, sink: str, region: str) -> np.ndarray:
    """The baseline [L] of one kind of fraction."""
    return baseline[:, QUERIES.index(query), SINK.index(sink), REGIONS.index(region)]


def adjusted_by_level(p: np.ndarray, heads: int) -> np.ndarray:
    """Benjamini-Hochberg over the heads' p values p[:heads], and over the layers', cell by cell; p is [levels, K]."""
    import numpy as np
    from paired_stats import benjamini_hochberg

    adjusted = np.full(p.shape, np.nan)
    for cell in range(p.shape[1]):
        adjusted[:heads, cell] = benjamini_hochberg(p[:heads, cell])
        adjusted[heads:-1, cell] = benjamini_hochberg(p[heads:-1, cell])
    return adjusted


def holm_over_styles(table: pd.DataFrame) -> pd.DataFrame:
    """The table with p_adjusted of the model's rows: Holm over the styles, for each kind of row."""
    import gc

    from paired_stats import holm

    gc.freeze()  # statsmodels collects garbage at each Holm: a quarter of a second with all libraries loaded
    model = table[table["level"] == "model"]
    for _, rows in model.groupby(["query", "sink", "region", "measure"], sort=False):
        table.loc[rows.index, "p_adjusted"] = holm(rows["p"].to_numpy())
    return table


def old_table(table: pd.DataFrame, level: str, query: str, sink: str) -> pd.DataFrame:
    """One row per style (and layer, and head) with frac_prompt, frac_task and what belongs to them.

    frac_prompt is the fraction on `instruction`, frac_task on `task`; each with its interval, baseline, density and
    paired difference. frac_context, frac_edited and frac_first are means alone.
    """
    keys = ["style", *{"model": [], "layer": ["layer"], "head": ["layer", "head"]}[level]]
    chosen = table[(table["level"] == level) & (table["query"] == query) & (table["sink"] == sink)]
    cells = {pair: rows.set_index(keys) for pair, rows in chosen.groupby(["region", "measure"], sort=False)}
    if ("task", "fraction") not in cells:
        raise UserError("no row has a finite attention on the task; run stage 2 with another --dtype")
    task = cells["task", "fraction"]
    out = task[["query", "sink", "n", "n_paired", "n_identical", "n_clusters"]].copy()
    for region, name in OLD_NAMES.items():
        rows = cells[region, "fraction"]
        out[name] = rows["estimate"]
        for column in ("ci_low", "ci_high", "baseline"):
            out[f"{name}_{column}"] = rows[column]
        density = cells.get((region, "density"))
        out[f"{name}_density"] = float("nan") if density is None else density["estimate"]
        out[f"{name}_density_n"] = 0 if density is None else density["n"]
        for column in ("difference", "difference_ci_low", "difference_ci_high", "p", "p_adjusted"):
            out[f"{name}_{column}"] = rows[column]
    for region in ("context", "edited", "first"):
        out[f"frac_{region}"] = cells[region, "fraction"]["estimate"] if (region, "fraction") in cells else float("nan")
    return out.reset_index()


def _level_rows(layers: list[int], heads: int) -> pd.DataFrame:
    """layer, head and level of each entry of `all_levels`; blank where a level has none."""
    import pandas as pd

    head_rows = [(layer, head, "head") for layer in layers for head in range(heads)]
    rows = [*head_rows, *((layer, None, "layer") for layer in layers), (None, None, "model")]
    frame = pd.DataFrame(rows, columns=["layer", "head", "level"])
    return frame.astype({"layer": "Int64", "head": "Int64"})


# --- pictures


def save_boxplots(results: list[StyleReport], folder: Path, args: argparse.Namespace) -> list[Path]:
    """The box plots over rows: by style, and for each style by layer."""
    from attention.heatmaps import file_word

    paths = []
    note = {"last": "last token", "mean": "mean query"}[args.query] + f", first token {args.sink}"
    for column, (region, name) in enumerate(OLD_NAMES.items()):
        having = [one for one in results if one.tokens[REGIONS.index(region)] > 0]
        if not having:  # no prompt has the region: its fraction is 0 by definition
            (folder / f"boxplot_{name}.png").unlink(missing_ok=True)
            continue
        boxes = [box_of(one.boxes[:, -1, column]) for one in having]
        labels = [f"{one.style}\nn={one.rows}" for one in having]
        base = [float(one.baseline_of(args, region).mean()) for one in having]
        paths.append(folder / f"boxplot_{name}.png")
        _save_boxes(paths[-1], boxes, labels, base, f"Attention on the {region} ({note})", "style", region)
    for one in results:
        path = folder / f"boxplot_perlayer_frac_prompt_{file_word(one.style)}.png"
        if not one.tokens[REGIONS.index("instruction")] > 0:
            path.unlink(missing_ok=True)
            continue
        boxes = [box_of(one.boxes[:, layer, 0]) for layer in range(len(one.layers))]
        title = f"Attention on the instruction by layer: {one.style} ({note}, n = {one.rows} prompts)"
        base = one.baseline_of(args, "instruction").tolist()
        _save_boxes(path, boxes, [str(layer) for layer in one.layers], base, title, "layer", "instruction")
        paths.append(path)
    return paths


def _save_boxes(
    path: Path, boxes: list[dict[str, Any]], labels: list[str], base: list[float], title: str, xlabel: str, region: str
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from file_output import save_figure

    figure, axes = plt.subplots(figsize=(max(5.0, 1.6 + (0.75 if xlabel == "style" else 0.32) * len(boxes)), 4))
    _draw_boxes(axes, boxes, base)
    axes.set_xticks(range(1, len(boxes) + 1), labels, fontsize=8)
    axes.set(xlabel=xlabel, ylabel=f"fraction of attention on the {region}\n(mean over heads, 0 to 1)")
    axes.set_title(title, fontsize=10)
    figure.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.03), ncols=2, frameon=False)
    save_figure(path, figure)


def _draw_boxes(axes: Axes, boxes: list[dict[str, Any]], base: list[float]) -> None:
    axes.bxp(boxes, showfliers=False, medianprops={"color": "C0", "linewidth": 1.5}, widths=0.6)
    places = range(1, len(boxes) + 1)
    label = "mean share of tokens (baseline)"
    axes.plot(places, base, linestyle="none", marker="D", markersize=4, color="C1", label=label)
    axes.plot([], [], color="black", label="box: quartiles; whiskers: 5 % to 95 % of prompts")
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)


# --- script


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__)
    data = parser.add_argument_group("data")
    data.add_argument("--run_dir", type=Path, required=True, help="run folder, style folder or .pt file of stage 2")
    data.add_argument("--results_dir", type=Path, help="folder for the tables; default: results/<run name>")
    data.add_argument("--styles", nargs="+", help="styles to compare with the clean form; default: all")
    data.add_argument("--max_samples", type=int, help="rows of the prompt file to use")
    data.add_argument("--tokenizer", help="model name or folder; only for files that hold no region_mask")
    add_first_token(data)
    shown = parser.add_argument_group("what the prompt_task_fraction_* files and the box plots show")
    shown.add_argument("--query", choices=QUERIES, default="last", help="whose attention")
    shown.add_argument("--sink", choices=SINK, default="included", help="with or without the first token's mass")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the tables and the plots."""
    args = parse_args(argv)
    from run_store import open_run, warn_unfinished

    run = open_run(args.run_dir)
    folder = args.results_dir or Path("results") / run.name
    warn_unfinished(run, args.styles, args.max_samples)
    results = [found for style in run.chosen(args.styles) if (found := style_report(run, style, args))]
    if not results:
        raise UserError(f"{run.path}: no rows to read; raise --max_samples or run stage 2")
    tables, pictures = write_tables(results, folder, args), save_boxplots(results, folder, args)
    get_logger().info(f"wrote {tables[0]}, {len(tables) - 1} tables prompt_task_fraction_*, {len(pictures)} box plots")
    return 0


def write_tables(results: list[StyleReport], folder: Path, args: argparse.Namespace) -> list[Path]:
    """Write the four CSVs; returns their paths."""
    import pandas as pd
    from file_output import write_csv

    table = holm_over_styles(pd.concat([result.table for result in results], ignore_index=True))
    paths = [folder / "attention_fractions.csv"]
    write_csv(paths[0], table)
    for level, word in (("model", "aggregate"), ("layer", "perlayer"), ("head", "perhead")):
        paths.append(folder / f"prompt_task_fraction_{word}.csv")
        write_csv(paths[-1], old_table(table, level, args.query, args.sink))
    return paths


if __name__ == "__main__":
    run_main(main)
