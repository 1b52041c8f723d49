"""Which layers and heads react to a style, how strongly and how surely: the work of head_sensitivity.py.

The chain: `attention_fields` of a file → `head_values`, one column for each of MEASURES → whole arrays of a style, its
clean form and its control → `compare` → tables. A new measure is one line in MEASURES.
What the measures and columns are: docs/METHODS.md, "head_sensitivity.py".
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from command_line import UserError, did_you_mean
from logger import get_logger
from paired_stats import benjamini_hochberg, clustered_mean, deal
from run_store import Run
from style_names import controlled_style
from style_rows import StyleRows, clean_and_styles, control_of, like_control, paired_rows, templates_of

from attention.aligned_maps import aligned_divergence, row_maps
from attention.answer_flips import Answers, flip_association
from attention.attention_fields import (
    EDITED,
    ENTROPY_QUERIES,
    QUERIES,
    REGIONS,
    Fields,
    edited_region,
    fields_reader,
    layers_of,
    regions_finder,
)
from attention.head_overlap import GROUPS, cross_half, group_sums

LEAST_MASS = 1e-5  # the logarithm of less is that of this; float16 masses are known to 6e-8
CLEAN, CONTROL = "clean form", "control"  # values of the column reference_form
LEVELS = ("head", "layer")
ALPHA = 0.05
MAP_ROWS = 256  # rows whose raw maps are compared at once

# --- measures: functions of the `attention_fields` of B rows, each [B,L,H]


Function = Callable[[Fields], np.ndarray]


def mass_on(query: str, region: str) -> Function:
    """Attention mass of a query on a region."""
    return lambda fields: fields["mass"][..., QUERIES.index(query), REGIONS.index(region)]


def on_edited(query: str, change: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Function:
    """`change` of the mass on the edited words and of even attention's; NaN if the layer's window misses them."""
    place = QUERIES.index(query)

    def values(fields: Fields) -> np.ndarray:
        mass, even = fields["mass"][..., place, EDITED], fields["uniform"][:, :, None, place, EDITED]
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(even == 0, np.nan, change(mass, even))

    return values


def entropy_of(query: str) -> Function:
    """Normalised entropy of a query's attention."""
    return lambda fields: fields["entropy"][..., ENTROPY_QUERIES.index(query)]


@dataclass(frozen=True)
class Measure:
    """What is measured of a head: the function of a file's fields, its unit, the colour bar's label, and a caption.

    function: None for a divergence from the clean form, which takes both forms; it is never below 0, so only its
    difference to the control's is tested.
    """

    function: Function | None
    unit: str
    label: str
    caption: str

    @property
    def range(self) -> tuple[float, float]:
        """The least and the largest value that a prompt can have."""
        return RANGES[self.unit]

    @property
    def scale(self) -> str:
        """What the colours of a picture of the change say."""
        return f"change in {self.label} ({self.unit})"


def _mass(mass: np.ndarray, even: np.ndarray) -> np.ndarray:
    return mass


def _log2_mass(mass: np.ndarray, even: np.ndarray) -> np.ndarray:
    return np.log2(np.maximum(mass, LEAST_MASS))


_SHARE, _LOG2, _EVEN, _EDITED = "0 to 1", "1\u00a0=\u00a0doubled", "1 = even attention", "on the edited words"
RANGES = {_SHARE: (0, 1), _LOG2: (np.log2(LEAST_MASS), 0), _EVEN: (0, np.inf), "bits": (0, 1)}
_MASS, _LOG2_MASS = "attention mass", "log2 of attention mass"
MEASURES = {
    "task_fraction_last": Measure(mass_on("last", "task"), _SHARE, "attention fraction", "last token on the task"),
    "task_fraction_mean": Measure(mass_on("mean", "task"), _SHARE, "attention fraction", "mean query on the task"),
    "edited_mass_last": Measure(on_edited("last", _mass), _SHARE, _MASS, f"last token {_EDITED}"),
    "edited_mass_mean": Measure(on_edited("mean", _mass), _SHARE, _MASS, f"mean query {_EDITED}"),
    "edited_log2_mass_last": Measure(on_edited("last", _log2_mass), _LOG2, _LOG2_MASS, f"last token {_EDITED}"),
    "edited_log2_mass_mean": Measure(on_edited("mean", _log2_mass), _LOG2, _LOG2_MASS, f"mean query {_EDITED}"),
    "edited_density_last": Measure(on_edited("last", np.divide), _EVEN, "density", f"last token {_EDITED}"),
    "edited_density_mean": Measure(on_edited("mean", np.divide), _EVEN, "density", f"mean query {_EDITED}"),
    "first_mass_last": Measure(mass_on("last", "first"), _SHARE, _MASS, "last token on the first one"),
    "entropy_last": Measure(entropy_of("last"), _SHARE, "normalised entropy", "attention of the last token"),
    "entropy_mean": Measure(entropy_of("mean"), _SHARE, "normalised entropy", "attention of the mean query"),
    "entropy_edited": Measure(entropy_of("edited"), _SHARE, "normalised entropy", "attention of the edited words"),
    "jsd_last": Measure(None, "bits", "divergence from the clean form", "attention of the last token"),
    "jsd_mean": Measure(None, "bits", "divergence from the clean form", "mean over the queries after the edit"),
}
DIVERGENCES = [name for name, measure in MEASURES.items() if measure.function is None]
SHOWN = ("edited_log2_mass_last", "edited_mass_last", "task_fraction_last", "entropy_last", "first_mass_last")


def head_values(fields: Fields) -> np.ndarray:
    """The MEASURES [B,L,H,M] of a file's rows as float32; NaN if a row has no edited word, and for the divergences."""
    missing = np.full(fields["mass"].shape[:3], np.nan)
    columns = [missing if measure.function is None else measure.function(fields) for measure in MEASURES.values()]
    return np.stack(columns, axis=-1).astype(np.float32)


def check_measure(name: str | None) -> None:
    """Raises UserError for a measure that is not known."""
    if name is not None and name not in MEASURES:
        near = did_you_mean(name, MEASURES)
        raise UserError(f"--measure {name}: there is no such measure; it may be {', '.join(MEASURES)}{near}")


# --- one style


@dataclass(frozen=True)
class Comparison:
    """The change of every head from a reference form (the clean form, or the control) to a style.

    tables: of "head" and of "layer"; flips: the same, None if nothing is known of the answers. group_sums,
    group_counts [G, L*H, M]: sums and numbers of the changes in GROUPS groups of templates.
    """

    style: str
    reference: str
    control: str | None
    layers: list[int]
    tables: dict[str, pd.DataFrame]
    flips: dict[str, pd.DataFrame] | None
    group_sums: np.ndarray
    group_counts: np.ndarray

    @property
    def heads(self) -> int:
        """Heads of a layer."""
        return self.group_sums.shape[1] // len(self.layers)

    def rows_used(self, measure: str) -> int:
        """Most rows that any head has of a measure."""
        return int(self.group_counts[..., [*MEASURES].index(measure)].sum(axis=0).max())


def compare_styles(
    run: Run, args: argparse.Namespace, answers: Answers | None = None
) -> tuple[list[Comparison], list[Comparison], dict[str, str]]:
    """(styles against the clean form, styles against their controls, {style: its control}); see `compare_style`.

    Raises UserError if the run lacks one, or has no clean form.
    """
    groups = deal(templates_of(run), GROUPS)
    to_clean, to_control, controls = [], [], {}
    for style in clean_and_styles(run, args.styles, with_controls=False)[1]:
        own, against = compare_style(run, style, groups, args, answers)
        if own is None:
            continue
        to_clean.append(own)
        to_control += [] if against is None else [against]
        if control := control_of(run, style):
            controls[style] = control
    return to_clean, to_control, controls


def compare_style(
    run: Run, style: str, groups: dict[str, int], args: argparse.Namespace, answers: Answers | None = None
) -> tuple[Comparison | None, Comparison | None]:
    """A style against its clean form, and against its control; None for one of which no row can be paired.

    groups: see `compare`.
    """
    own = StyleRows(run, style, args.max_samples, max_open=2)
    clean = StyleRows(run, str(run.clean_style), args.max_samples, max_open=2)
    pairs = paired_rows(own, clean)
    if not pairs.changed:
        return None, None
    layers = layers_of(own.first_content())
    values = _read(own, own.indices, clean, style, layers, args)

    def against(other: StyleRows, rows: list[int], **more: Any) -> Comparison:
        own_values = values[np.searchsorted(own.indices, rows)]
        reference = _read(other, rows, clean, style, layers, args)
        change = np.subtract(own_values, reference, out=reference)
        own_values[np.isnan(change)] = np.nan
        flipped = None if answers is None else answers.flips(style, clean.style, np.array(rows))
        return compare(style, layers, own_values, change, own.clusters(rows), groups, flipped, **more)

    counts = {"n_identical": len(pairs.identical), "n_unpaired": len(pairs.unpaired)}
    to_clean = against(clean, pairs.changed, **counts)
    name = control_of(run, style)
    if name is None or not own.has("region_mask"):  # without, its tokens cannot be counted
        return to_clean, None
    control = StyleRows(run, name, args.max_samples, max_open=2)
    most = args.split_tokens if args.split_tokens >= 0 else None
    rows = like_control(own, control, paired_rows(own, control).changed, most)
    return to_clean, against(control, rows, control=name) if rows else None


def _read(
    form: StyleRows, rows: Sequence[int], clean: StyleRows, style: str, layers: list[int], args: argparse.Namespace
) -> np.ndarray:
    """MEASURES [n,L,H,M] of a form of the rows.

    style: whose words are the edited ones. The divergences are those from the clean form, NaN without raw maps.
    """
    read = fields_reader(form, layers, style, args.tokenizer, args.first_token == "excluded")

    values = form.extract(lambda content, path: {"values": head_values(read(content, path))}, rows)["values"]
    divergences = [place for place, measure in enumerate(MEASURES.values()) if measure.function is None]
    if form is clean:
        values[..., divergences] = 0
    elif form.has("attentions") and clean.has("attentions"):
        tokens = [(edited_region(one, style), regions_finder(one, style, args.tokenizer)) for one in (form, clean)]
        maps = [lambda content, path, own=own: {"maps": row_maps(content, path, *own)} for own in tokens]
        both = [place for place, index in enumerate(rows) if index in clean]
        for start in range(0, len(both), MAP_ROWS):
            block = both[start : start + MAP_ROWS]
            indices = [rows[place] for place in block]
            own, twin = (one.extract(read, indices)["maps"] for one, read in zip((form, clean), maps, strict=True))
            divergence = aligned_divergence(own, twin, layers, values.shape[2])
            for column, place in enumerate(divergences):
                values[block, ..., place] = divergence[..., column]
    return values


def compare(
    style: str,
    layers: list[int],
    values: np.ndarray,
    change: np.ndarray,
    clusters: Sequence[str],
    groups: dict[str, int],
    flipped: np.ndarray | None = None,
    control: str | None = None,
    n_identical: int = 0,
    n_unpaired: int = 0,
) -> Comparison:
    """Tables of the change [n,L,H,M] of n rows from a reference form to a style, with the style's own values.

    groups: template → its group of the overlap. flipped [n]: see `Answers.flips`. control: the reference form, None for
    the clean one.
    """
    tables, flips = {}, {}
    counts = {"n_identical": n_identical, "n_unpaired": n_unpaired}
    # A divergence from the clean form is never below 0.
    untested = np.array([control is None and measure.function is None for measure in MEASURES.values()])
    heads, reference = change.shape[2], CONTROL if control else CLEAN
    places = {
        "head": {"layer": np.repeat(layers, heads), "head": np.tile(np.arange(heads), len(layers))},
        "layer": {"layer": np.array(layers)},
    }
    use = np.zeros(len(change), dtype=bool)
    if flipped is not None:
        use = ~np.isnan(flipped) & ~np.isnan(change).all(axis=(1, 2, 3))
    for level, place in places.items():
        if level == "head":
            own, moved = (array.reshape(len(array), -1, len(MEASURES)) for array in (values, change))
        else:
            own, moved = (array.mean(axis=2, dtype=np.float64) for array in (values, change))
        columns = sensitivity_columns(own, moved, clusters, counts, untested)
        order = np.where(untested, columns["difference"], np.abs(columns["t"]))
        tables[level] = _ranked(style, place, columns, order)
        if flipped is not None and use.any():
            among = [label for label, used in zip(clusters, use, strict=True) if used]
            parts = [flip_association(moved[use, :, m], flipped[use], among) for m in range(len(MEASURES))]
            columns = {name: np.stack([part[name] for part in parts], axis=-1) for name in parts[0]}
            table = _ranked(style, place, columns, np.abs(columns["point_biserial_r"]))
            table.insert(table.columns.get_loc("measure"), "reference_form", reference)
            flips[level] = table.assign(control=control)
    known = dict(groups)
    codes = np.array([known.setdefault(label, len(known) % GROUPS) for label in clusters], dtype=int)
    sums, rows = group_sums(change.reshape(len(change), -1, len(MEASURES)), codes, GROUPS)
    return Comparison(style, reference, control, layers, tables, flips or None, sums, rows)


# --- tables


CONTROL_COLUMNS = [
    *("rank", "n", "difference", "difference_ci_low", "difference_ci_high", "standard_error", "effect_size", "t", "p"),
    "p_adjusted",
]


def sensitivity_columns(
    values: np.ndarray, change: np.ndarray, clusters: Sequence[str], counts: dict[str, int], untested: np.ndarray
) -> dict[str, Any]:
    """{column: [K,M]} of values and changes [n,K,M]; effect_size is Cohen's d_z. untested [M]: see `Measure`."""
    low, most = np.transpose([measure.range for measure in MEASURES.values()])
    estimate = clustered_mean(values, clusters).within(low, most)
    difference = clustered_mean(change, clusters).within(low - most, most - low)
    with np.errstate(invalid="ignore", divide="ignore"):
        squares = np.nansum(np.square(change, dtype=np.float64), axis=0)
        spread = np.sqrt(np.maximum(squares - difference.n * difference.mean**2, 0) / (difference.n - 1))
        size = np.where(np.isnan(difference.standard_error), np.nan, difference.mean / spread)
    return {
        "n": difference.n,
        **counts,
        "n_clusters": difference.n_clusters,
        "clean": estimate.mean - difference.mean,
        **estimate.columns("estimate", "ci"),
        **difference.columns("difference", "difference_ci"),
        "standard_error": difference.standard_error,
        "effect_size": np.where(untested, np.nan, size),
        "t": np.where(untested, np.nan, difference.t),
        "p": np.where(untested, np.nan, difference.p),
    }


def _ranked(style: str, places: dict[str, np.ndarray], columns: dict[str, Any], order: np.ndarray) -> pd.DataFrame:
    """One row per place and measure, ranked within each measure by falling `order` [K,M]; no empty ones."""
    tables = []
    for column, measure in enumerate(MEASURES):
        values = {name: array[:, column] if np.ndim(array) else array for name, array in columns.items()}
        table = pd.DataFrame({"style": style, **places, "measure": measure, "rank": 0, **values})
        table["p_adjusted"] = benjamini_hochberg(table["p"].to_numpy())
        table = table.iloc[np.argsort(-order[:, column], kind="stable")]
        ranks = pd.Series(np.arange(1, len(table) + 1), index=table.index, dtype="Int64")
        table["rank"] = ranks.where(~np.isnan(order[:, column][table.index]))  # blank if nothing can be ranked
        tables.append(table[table["n"] > 0])
    return pd.concat(tables, ignore_index=True)


def all_tables(
    to_clean: Sequence[Comparison], to_control: Sequence[Comparison], controls: dict[str, str], seed: int
) -> dict[str, pd.DataFrame]:
    """{name of the CSV: table} of a run. controls: style → its control, if the run has one.

    Beside the changes from the clean form are those from the control: `*_vs_control`, blank without rows.
    """
    tables = {}
    for level in LEVELS:
        table = pd.concat([one.tables[level] for one in to_clean], ignore_index=True)
        keys = [key for key in ("style", "layer", "head", "measure") if key in table]
        parts = [one.tables[level][[*keys, *CONTROL_COLUMNS]] for one in to_control]
        beside = pd.concat([table[[*keys, *CONTROL_COLUMNS]].iloc[:0], *parts], ignore_index=True)
        beside = beside.rename(columns={column: f"{column}_vs_control" for column in CONTROL_COLUMNS})
        table = table.assign(control=table["style"].map(controls)).merge(beside, "left", keys)
        tables[f"{level}_sensitivity"] = table
    # As in the picture: if some styles have a control of as many tokens, only these.
    equal = [one for one in to_control if controlled_style(str(one.control))] or to_control
    overlaps = [overlap_table(some, seed) for some in (to_clean, equal) if some]
    tables["head_overlap"] = pd.concat(overlaps, ignore_index=True)
    order = {one.style: place for place, one in enumerate(to_clean)}
    both = sorted([*to_clean, *to_control], key=lambda one: order[one.style])  # stable: the clean form first
    flips = [one.flips for one in both if one.flips]
    for level in LEVELS if flips else ():
        tables[f"{level}_answer_flips"] = pd.concat([one[level] for one in flips], ignore_index=True)
    return tables


def overlap_table(comparisons: Sequence[Comparison], seed: int = 0) -> pd.DataFrame:
    """Agreement of the heads' ranking between styles, and of each style with itself, for every measure."""
    rows = []
    for column, measure in ((place, name) for place, name in enumerate(MEASURES) if name not in DIVERGENCES):
        sums = np.stack([one.group_sums[..., column] for one in comparisons])
        counts = np.stack([one.group_counts[..., column] for one in comparisons])
        found = cross_half(sums, counts, seed)
        reliability = np.diag(found.spearman)
        for a, b in itertools.combinations_with_replacement(range(len(comparisons)), 2):
            r = float(found.spearman[a, b])
            noise = np.sqrt(reliability[a] * reliability[b]) if min(reliability[a], reliability[b]) > 0 else np.nan
            rows.append(
                {
                    "style": comparisons[a].style,
                    "other_style": comparisons[b].style,
                    "reference_form": comparisons[a].reference,
                    "measure": measure,
                    "n": comparisons[a].rows_used(measure),
                    "n_other": comparisons[b].rows_used(measure),
                    "n_template_groups": found.groups,
                    "cross_half_spearman": r,
                    "ci_low": found.ci_low[a, b],
                    "ci_high": found.ci_high[a, b],
                    "reliability_of_all_rows": 2 * r / (1 + r) if a == b else np.nan,
                    "spearman_without_noise": np.nan if a == b else r / noise,
                    "top_heads": found.top_count,
                    "top_overlap": found.top_overlap[a, b],
                    "top_overlap_by_chance": found.top_count / found.heads if found.heads else np.nan,
                }
            )
    return pd.DataFrame(rows)


# --- what is said of them


def first_shown(heads: pd.DataFrame) -> str:
    """The first of SHOWN that some style has: if styles only add words, nothing edited has a clean twin."""
    return next((name for name in SHOWN if (heads["measure"] == name).any()), SHOWN[0])


def with_short_tests(table: pd.DataFrame) -> pd.DataFrame:
    """The table with t, p values and effect sizes to four significant digits: a fourteenth of a large file."""
    names = [name for name in table if name.removesuffix("_vs_control") in ("t", "p", "p_adjusted", "effect_size")]
    return table.assign(**{name: table[name].map(lambda value: float(f"{value:.4g}")) for name in names})


def drawn_rows(table: pd.DataFrame, name: str, measure: str) -> pd.DataFrame:
    """The rows of the measures that the pictures show: of flips `measure` alone, else SHOWN and the divergences too."""
    kept = {measure} if name.endswith("_answer_flips") else {measure, *SHOWN, *DIVERGENCES}
    return table[table["measure"].isin(kept)]


def with_equal_tokens(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows whose control has as many tokens as the style (stage 2 made it), if there are any; else all.

    Next to what an invisible character does (`split`) one would see nothing of a typo.
    """
    equal = rows["control"].map(controlled_style, na_action="ignore").notna()
    return rows[equal] if equal.any() else rows


def top_lines(heads: pd.DataFrame, measure: str) -> list[str]:
    """The result in words: the five heads of each style that differ most, from its control if it has one."""
    rows = heads[heads["measure"] == measure]
    against = with_equal_tokens(rows[rows["difference_vs_control"].notna()])
    end = "_vs_control" if len(against) else ""
    lines = [f"heads (layer.head) in which {measure} differs most; * adjusted p < {ALPHA}"]
    for style, part in (against if end else rows).groupby("style", sort=False):
        shown = [
            f"{row['layer']}.{row['head']} {row[f'difference{end}']:+.2g} [{row[f'difference_ci_low{end}']:.2g}, "
            f"{row[f'difference_ci_high{end}']:.2g}]" + ("*" if row[f"p_adjusted{end}"] < ALPHA else "")
            for _, row in part.nsmallest(5, f"rank{end}").iterrows()
        ]
        other = part["control"].iloc[0] if end else CLEAN
        lines.append(f"{style} minus {other} (n = {part[f'n{end}'].max():.0f}): {', '.join(shown)}")
    return lines


def log_missing_divergence(run: Run, comparisons: Sequence[Comparison]) -> None:
    """Log for which styles with raw maps no pair has a divergence."""
    without = [one.style for one in comparisons if not any(one.rows_used(name) for name in DIVERGENCES)]
    if without := [style for style in without if run.load(run.files(style)[0]).get("attentions")]:
        get_logger().info(
            f"no {' or '.join(DIVERGENCES)} for {' '.join(without)}: the edit changes how the words beside it are cut "
            "into tokens, so they cannot be aligned, or no token follows it"
        )
