"""Which layers and heads react to a typo, how strongly, how surely, and whether that goes with wrong answers.

Reads   outputs/<run>/<style>/activations_*.pt; the maths_items.csv of stage 3, where it is
Writes  head_sensitivity.csv, layer_sensitivity.csv    every style x head (x layer) x measure, ranked by |t|
        head_overlap.csv                               do styles share their heads, and do halves of the data, by
                                                       the difference to the clean form and to the control (baseline)
        head_answer_flips.csv, layer_answer_flips.csv  with maths_items.csv: does the change go with a flipped answer
        head_sensitivity.png, head_sensitivity_<style>.png, head_overlap.png; with controls *_vs_split.png

    python 5_attention_fractions/run_scripts/head_sensitivity.py --run_dir outputs/demo/maths \\
        --results_dir results/demo/maths

Each row gives difference = style - clean form, on rows that have both and whose texts differ. A typo is cut into more
tokens, and that alone moves most heads. difference_vs_split is style - control, where the run has one (`control`):
    split@<style>   the clean text, its edited words cut into as many tokens as in the style; rows in which that cannot
                    be had are left out (n_vs_split are used)
    split           else: the clean word, cut by an invisible character; rows in which both touch the same words and
                    these differ by at most --split_tokens tokens. The character is a token too: no perfect control
On SmolLM2 the mean task fraction of 248 of 270 heads changes from the clean form to `swap`, and that of 53 from
`split@swap` (200 prompts of maths.json, adjusted p < 0.05). A model rarely reads words so cut: what it makes of that is
in the control, not in the typo. A layer is the mean over its heads. Measures (`last`: of the last prompt token; `mean`:
of the mean over all prompt tokens):

task_fraction_last, _mean    attention mass on the task
edited_mass_last, _mean      mass on the edited words; in the clean form on the same words before the edit
edited_log2_mass_last, _mean   its logarithm: a difference of 1 is twice the mass; less than 1e-5 counts as 1e-5, so
                             that a head that gives both forms less shows no change. Few rows carry the mean mass, those
                             whose edited word is among the last: of samples of 60 rows of a real run, less than 90 %
                             had its true change in their 95 % interval in 91 of 270 heads, and in 2 for the logarithm
edited_density_last, _mean   that mass over what even attention would give. Not free of the number of tokens: a word
                             that is cut into more of them gains mass, but less than even attention would
first_mass_last              mass on the first token, the usual sink
entropy_last, _mean, _edited entropy of attention / log(visible keys), 0 to 1; `edited`: of the edited words' queries;
                             where stage 2 ran with --entropy
            The edited_ measures and entropy_edited leave out rows whose edited words hold the first token
            (`--first_token excluded`): it is the sink of most models, next to which the word itself is nothing. In a
            layer with a sliding window they leave out the rows whose edited words the query cannot see.
jsd_last, jsd_mean           Jensen-Shannon divergence (bits) of a query's attention in the two forms, tokens aligned
                             around the edit; only layers with raw maps. A distance, never below 0: no test but
                             against the control: is the style farther from the clean form than the control is?
                             jsd_mean is the mean over the queries after the first edit. None where the edit changes
                             the tokens beside it, as a word put before the first one mostly does (polite, urgent),
                             or no token follows it

effect_size is Cohen's d_z, the mean difference over the standard deviation of the differences. Standard errors are
clustered by template; p_adjusted is Benjamini-Hochberg's over the heads (layers) of one style and measure. rank goes by
the change from the clean form, rank_vs_split by that from the control. The flips correlate the change with the answer
turning wrong (point-biserial r), on rows whose clean answer is right; baseline: the change from the clean form, or from
the control. Their p is that of a rank-sum test, clustered (answer_flips.py).
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / place) for place in ("", "../1_utils/run_scripts")]

from attention.activation_rows import add_first_token
from command_line import UserError, make_parser, run_main
from logger import get_logger
from token_spans import matched_style

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from attention.answer_flips import Answers, FlipMoments
    from attention.head_overlap import GroupSums
    from attention.paired_rows import Batch, Extract
    from paired_stats import RowValues
    from run_store import Run

MEASURES = (
    "task_fraction_last", "task_fraction_mean", "edited_mass_last", "edited_mass_mean", "edited_log2_mass_last",
    "edited_log2_mass_mean", "edited_density_last", "edited_density_mean", "first_mass_last", "entropy_last",
    "entropy_mean", "entropy_edited",
)  # fmt: skip
DISTANCES = ("jsd_last", "jsd_mean")
PANELS = ("edited_log2_mass_last", "edited_mass_last", "task_fraction_last", "entropy_last", "first_mass_last")
LEAST_MASS = 1e-5  # the logarithm of less is that of this; float16 masses are known to 6e-8
CLEAN, CONTROL = "clean form", "control"
ALPHA = 0.05


# --- values of one file


def sensitivity_values(fields: Batch, without_first: bool = True) -> np.ndarray:
    """The MEASURES [B,L,H,M] of a file's rows (`attention_fields`); NaN where a row has no edited word.

    without_first: what is measured at edited words is NaN too where they hold the first token.
    """
    import numpy as np
    from attention.attention_fields import QUERIES, REGIONS

    mass, uniform, entropy = fields["mass"], fields["uniform"], fields["entropy"]
    task, edited, first = (REGIONS.index(name) for name in ("task", "edited", "first"))
    last, mean = QUERIES.index("last"), QUERIES.index("mean")
    even = uniform[:, :, None, :, edited]
    on_edited = np.where(even == 0, np.nan, mass[..., edited])  # no mass where the word is out of a window's reach
    with np.errstate(divide="ignore", invalid="ignore"):
        density = on_edited / even
    logarithm = np.log2(np.maximum(on_edited, LEAST_MASS))
    columns = [
        mass[..., last, task], mass[..., mean, task], on_edited[..., last], on_edited[..., mean],
        logarithm[..., last], logarithm[..., mean], density[..., last], density[..., mean], mass[..., last, first],
        entropy[..., 0], entropy[..., 1], entropy[..., 2],
    ]  # fmt: skip
    values = np.stack(columns, axis=-1)
    if without_first:
        on_first = fields["holds_first"][:, edited] > 0
        for column in (place for place, name in enumerate(MEASURES) if "edited" in name):
            values[on_first, ..., column] = np.nan
    return values


def with_layers(values: np.ndarray) -> np.ndarray:
    """[B,L,H,M] → [B, L*H + L, M]: the heads, then the mean over each layer's heads."""
    import numpy as np

    rows, layers, heads, width = values.shape
    return np.concatenate([values.reshape(rows, layers * heads, width), values.mean(axis=2)], axis=1)


# --- one style


@dataclass
class StyleEffect:
    """The pairs of one style; cells are [L*H + L, M], the heads and then the layers."""

    style: str
    layers: list[int]
    heads: int
    measures: tuple[str, ...]
    difference: RowValues
    variant: RowValues
    groups: GroupSums
    flips: FlipMoments | None = None
    pairs: int = 0
    identical: int = 0
    unpaired: int = 0
    squares: Any = field(default=0.0)
    control: str | None = None  # what the differences are to, where not to the clean form; distances may be below 0
    tables: tuple[pd.DataFrame, pd.DataFrame] | None = None

    @property
    def to_clean(self) -> bool:
        """Whether the differences are to the clean form."""
        return self.control is None

    @classmethod
    def empty(
        cls,
        style: str,
        layers: list[int],
        heads: int,
        measures: tuple[str, ...],
        templates: Collection[str],
        with_flips: bool = False,
    ) -> StyleEffect:
        """No pairs yet; `templates`: all clusters of the run."""
        from attention.answer_flips import FlipMoments
        from attention.head_overlap import GroupSums
        from paired_stats import RowValues

        flips = FlipMoments(templates) if with_flips else None
        difference, variant = (RowValues((len(layers) * (heads + 1), len(measures))) for _ in range(2))
        return cls(style, layers, heads, measures, difference, variant, GroupSums(templates), flips)

    def add(
        self, variant: np.ndarray, clean: np.ndarray, clusters: list[str], flipped: np.ndarray | None = None
    ) -> None:
        """Add P pairs: measures [P,L,H,M] of both forms, cluster labels, and flips [P] (1, 0, or NaN: no part)."""
        import numpy as np

        change = with_layers(variant.astype(np.float64) - clean)
        self.pairs += len(change)
        self.difference.add(change.astype(np.float32), clusters)
        self.variant.add(np.where(np.isnan(change), np.nan, with_layers(variant)).astype(np.float32), clusters)
        self.groups.add(change[:, : len(self.layers) * self.heads], clusters)
        self.squares = self.squares + np.nansum(change**2, axis=0)
        if self.flips is not None and flipped is not None:
            self.flips.add(change, flipped, clusters)

    def finish(self) -> tuple[pd.DataFrame, pd.DataFrame] | None:
        """Fill `tables` and let the rows go, which are most of the memory; returns the tables of flips, if any."""
        flips, self.tables = flip_tables(self), sensitivity_tables(self)
        self.difference = self.variant = self.flips = None  # type: ignore[assignment]
        return flips


def style_effect(
    run: Run,
    style: str,
    baseline: str,
    max_samples: int | None = None,
    answers: Answers | None = None,
    tokenizer: str | None = None,
    without_first: bool = True,
    split_tokens: int | None = None,
) -> StyleEffect | None:
    """Read a style and its baseline side by side, once; None where no row can be paired.

    baseline: the clean form, or a control; then only rows in which both edit the same words count, and with
    split_tokens only those in which these differ by at most so many tokens (in none, for `split@<style>`).
    """
    from attention.activation_rows import same_words, templates_of, token_limit
    from attention.paired_rows import RowWindow, paired_batches, read_rows, take_rows

    info: dict[str, Any] = {}
    to_clean = baseline == run.clean_style
    variants = read_rows(run, style, _extractor(run, style, None, tokenizer, info), max_samples)
    others = read_rows(run, baseline, _extractor(run, baseline, style, tokenizer, {}), max_samples)
    cleans = None
    if not to_clean and run.clean_style is not None:
        cleans = RowWindow(read_rows(run, run.clean_style, _map_extractor(run, style, tokenizer), max_samples))
    effect: StyleEffect | None = None
    templates = templates_of(run)
    identical = unpaired = 0
    for pair in paired_batches(variants, others):
        identical, unpaired = identical + pair.identical, unpaired + pair.unpaired
        if not len(pair.paired):
            continue
        variant, other = pair.variant, pair.clean
        if not to_clean:
            keep = same_words(run, style, baseline, variant["original_index"])
            keep &= _near_tokens(variant, other, token_limit(baseline, split_tokens))
            variant, other = take_rows(variant, keep), take_rows(other, keep)
        indices = variant["original_index"]
        if not len(indices):
            continue
        clean_maps = None if cleans is None else cleans.take(indices)
        values, measures = _pair_values(variant, other, style, info["layers"], without_first, clean_maps)
        if effect is None:
            shape = info["layers"], values[0].shape[2], measures
            effect = StyleEffect.empty(style, *shape, templates, answers is not None)
            effect.control = None if to_clean else baseline
        if measures != effect.measures:
            rows = f"rows {indices[0]} to {indices[-1]}"
            raise UserError(
                f"{run.path}: raw attention maps for some files of {style!r} only, not for {rows}; see --raw_layers"
            )
        flipped = None if answers is None else answers.flips(style, str(run.clean_style), indices)
        effect.add(*values, [run.template(int(i)) for i in indices], flipped)
    if effect is not None:
        effect.identical, effect.unpaired = identical, unpaired
    return effect


def _near_tokens(variant: Batch, other: Batch, most: int | None) -> np.ndarray:
    """Mask [P] of the pairs whose edited words differ by at most `most` tokens; None: all."""
    import numpy as np
    from attention.attention_fields import REGIONS

    column = REGIONS.index("edited")
    difference = np.abs(variant["tokens"][:, column] - other["tokens"][:, column])
    return np.ones(len(difference), dtype=bool) if most is None else difference <= most


def _pair_values(
    variant: Batch,
    baseline: Batch,
    style: str,
    layers: list[int],
    without_first: bool,
    cleans: tuple[np.ndarray, Batch] | None = None,
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[str, ...]]:
    """((measures of both forms [P,L,H,M]), their names); with raw maps the distances are among them.

    The distances are those to the clean form: to the baseline itself, or where that is a control, to `cleans`
    (positions of the pairs that have a clean form, these).
    """
    import numpy as np

    own, other = sensitivity_values(variant, without_first), sensitivity_values(baseline, without_first)
    if own.shape != other.shape:
        raise UserError(
            f"style {style!r} has {own.shape[1]} layers x {own.shape[2]} heads, its clean run {other.shape[1]} x "
            f"{other.shape[2]}; run both with one model and the same --raw_layers"
        )
    clean = baseline if cleans is None or not len(cleans[0]) else cleans[1]
    if not all("maps" in one for one in (variant, baseline, clean)):
        return (own, other), MEASURES
    far = _distance(variant, cleans or (np.arange(len(own)), baseline), layers)
    # A clean form is at no distance from itself, so the difference is the distance.
    near = far * 0 if cleans is None else _distance(baseline, cleans, layers)
    return (np.concatenate([own, far], axis=-1), np.concatenate([other, near], axis=-1)), MEASURES + DISTANCES


def _distance(form: Batch, cleans: tuple[np.ndarray, Batch], layers: list[int]) -> np.ndarray:
    """The DISTANCES [P,L,H,2] of a form to the clean one; NaN for a row without."""
    import numpy as np
    from attention.aligned_maps import aligned_divergence

    found, clean = cleans
    heads = next(iter(form["maps"][0].maps.values())).shape[0]
    values = np.full((len(form["maps"]), len(layers), heads, len(DISTANCES)), np.nan, dtype=np.float32)
    if len(found):
        values[found] = aligned_divergence(form["maps"][found], clean["maps"], layers)
    return values


def _extractor(run: Run, style: str, compared: str | None, tokenizer: str | None, info: dict[str, Any]) -> Extract:
    """What is read of each file, the raw maps too where there are any; `info` takes the layers."""
    from attention.aligned_maps import row_maps
    from attention.attention_fields import attention_fields, edited_region, layers_of
    from attention.reference_format import TokenRegions

    reference = TokenRegions(tokenizer, run, style, compared) if tokenizer else None
    edited = edited_region(style, run.clean_style, compared)

    def extract(content: dict[str, Any], path: Path) -> Batch:
        info["layers"] = layers_of(content, path, info.get("layers"))
        fields = attention_fields(content, path, edited, reference)
        if content.get("attentions"):
            fields["maps"] = row_maps(content, path, edited, reference)
        return fields

    return extract


def _map_extractor(run: Run, compared: str, tokenizer: str | None) -> Extract:
    """The raw maps of the clean form, where there are any."""
    from attention.aligned_maps import row_maps
    from attention.attention_fields import edited_region
    from attention.reference_format import TokenRegions

    clean = str(run.clean_style)
    reference = TokenRegions(tokenizer, run, clean, compared) if tokenizer else None

    def extract(content: dict[str, Any], path: Path) -> Batch:
        edited = edited_region(clean, clean, compared)
        return {"maps": row_maps(content, path, edited, reference)} if content.get("attentions") else {}

    return extract


# --- tables


def sensitivity_tables(effect: StyleEffect) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(heads, layers): one row per cell and measure, ranked by |t| within its measure (a distance by its mean)."""
    import numpy as np

    difference, variant = effect.difference.finish(), effect.variant.finish()
    with np.errstate(invalid="ignore", divide="ignore"):
        spread = np.sqrt(np.maximum(effect.squares - difference.n * difference.mean**2, 0) / (difference.n - 1))
        size = np.where(np.isnan(difference.standard_error), np.nan, difference.mean / spread)
    columns = {
        "n": difference.n, "n_identical": np.full(size.shape, effect.identical),
        "n_unpaired": np.full(size.shape, effect.unpaired), "n_clusters": difference.n_clusters,
        "clean": variant.mean - difference.mean, "estimate": variant.mean, "ci_low": variant.ci_low,
        "ci_high": variant.ci_high, "difference": difference.mean, "difference_ci_low": difference.ci_low,
        "difference_ci_high": difference.ci_high, "standard_error": difference.standard_error, "effect_size": size,
        "t": difference.t, "p": difference.p,
    }  # fmt: skip
    for name in ("effect_size", "t", "p"):
        untested = [effect.to_clean and measure in DISTANCES for measure in effect.measures]
        columns[name] = np.where(untested, np.nan, columns[name])
    order = np.abs(columns["t"])
    for column, measure in enumerate(effect.measures):
        if measure in DISTANCES and effect.to_clean:
            order[:, column] = difference.mean[:, column]
    return _split_levels(effect, columns, order)


def with_controls(table: pd.DataFrame, own: dict[str, pd.DataFrame], names: dict[str, str]) -> pd.DataFrame:
    """The table with each style's difference to its control beside that to the clean form.

    own: the differences to the control by style (a style none of whose rows is matched is not there); names: controls.
    """
    import pandas as pd

    keys = [key for key in ("style", "layer", "head", "measure") if key in table]
    columns = [
        "rank", "n", "difference", "difference_ci_low", "difference_ci_high", "standard_error", "effect_size", "t", "p",
        "p_adjusted",
    ]  # fmt: skip
    parts = [part[keys + columns] for part in own.values()]
    beside = pd.concat([table.loc[:0, keys + columns].iloc[:0], *parts], ignore_index=True)
    beside = beside.rename(columns={column: f"{column}_vs_split" for column in columns})
    return table.assign(control=table["style"].map(names)).merge(beside, "left", keys)


def flip_tables(effect: StyleEffect) -> tuple[pd.DataFrame, pd.DataFrame] | None:
    """(heads, layers): correlation of each cell's change with the flip, ranked by |r|; None where nothing is known."""
    import numpy as np

    found = effect.flips.finish() if effect.flips is not None else None
    if found is None:
        return None
    columns = {
        "n": found.n, "n_flipped": found.n_flipped, "point_biserial_r": found.r, "ci_low": found.ci_low,
        "ci_high": found.ci_high, "change_if_flipped": found.change_if_flipped,
        "change_if_still_right": found.change_if_kept, "p": found.p,
    }  # fmt: skip
    heads, layers = _split_levels(effect, columns, np.abs(found.r))
    for table in (heads, layers):
        table.insert(table.columns.get_loc("measure"), "baseline", CLEAN if effect.to_clean else CONTROL)
        table["control"] = effect.control
    return heads, layers


def _split_levels(
    effect: StyleEffect, columns: dict[str, np.ndarray], order: np.ndarray
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Tables of the heads and of the layers from arrays [L*H + L, M], each ranked by falling `order`."""
    import numpy as np

    heads = len(effect.layers) * effect.heads
    layer = np.repeat(effect.layers, effect.heads)
    head = np.tile(np.arange(effect.heads), len(effect.layers))
    return (
        _ranked(effect, {"layer": layer, "head": head}, columns, order, slice(0, heads)),
        _ranked(effect, {"layer": np.array(effect.layers)}, columns, order, slice(heads, None)),
    )


def _ranked(
    effect: StyleEffect,
    places: dict[str, np.ndarray],
    columns: dict[str, np.ndarray],
    order: np.ndarray,
    rows: slice,
) -> pd.DataFrame:
    import numpy as np
    import pandas as pd
    from paired_stats import benjamini_hochberg

    tables = []
    for column, measure in enumerate(effect.measures):
        values = {name: array[rows, column] for name, array in columns.items()}
        table = pd.DataFrame({"style": effect.style, **places, "measure": measure, "rank": 0, **values})
        table["p_adjusted"] = benjamini_hochberg(table["p"].to_numpy())
        table = table.iloc[np.argsort(-order[rows, column], kind="stable")]
        ranks = pd.Series(np.arange(1, len(table) + 1), index=table.index, dtype="Int64")
        table["rank"] = ranks.where(~np.isnan(order[rows, column][table.index]))  # blank where nothing can be ranked
        tables.append(table[table["n"] > 0])
    return pd.concat(tables, ignore_index=True)


def overlap_table(effects: Sequence[StyleEffect], seed: int = 0, baseline: str = CLEAN) -> pd.DataFrame:
    """Agreement of the heads' ranking between styles, and of each style with itself, for every measure.

    baseline: what the effects are differences to, the clean form or the styles' controls.
    """
    import numpy as np
    import pandas as pd
    from attention.head_overlap import cross_half

    rows = []
    for measure in (name for name in effects[0].measures if name not in DISTANCES):
        sums = np.stack([_measure_groups(effect, effect.groups.sums, measure) for effect in effects])
        counts = np.stack([_measure_groups(effect, effect.groups.counts, measure) for effect in effects])
        found = cross_half(sums, counts, seed)
        reliability = np.diag(found.spearman)
        for a, b in itertools.combinations_with_replacement(range(len(effects)), 2):
            r = float(found.spearman[a, b])
            noise = np.sqrt(reliability[a] * reliability[b]) if min(reliability[a], reliability[b]) > 0 else np.nan
            rows.append({
                "style": effects[a].style, "other_style": effects[b].style, "baseline": baseline,
                "measure": measure,
                "n": _rows_used(effects[a], measure), "n_other": _rows_used(effects[b], measure),
                "n_template_groups": found.groups,
                "cross_half_spearman": r, "ci_low": found.ci_low[a, b], "ci_high": found.ci_high[a, b],
                "reliability_of_all_rows": 2 * r / (1 + r) if a == b else np.nan,
                "spearman_without_noise": np.nan if a == b else r / noise,
                "top_heads": found.top_count, "top_overlap": found.top_overlap[a, b],
                "top_overlap_by_chance": found.top_count / found.heads if found.heads else np.nan,
            })  # fmt: skip
    return pd.DataFrame(rows)


def _rows_used(effect: StyleEffect, measure: str) -> int:
    return int(_measure_groups(effect, effect.groups.counts, measure).sum(axis=0).max())


def _measure_groups(effect: StyleEffect, groups: np.ndarray, measure: str) -> np.ndarray:
    return groups[..., effect.measures.index(measure)]


# --- pictures

LABELS = {
    "log2_mass": "change in log2 of attention mass (1\u00a0=\u00a0doubled)",
    "mass": "change in attention mass (0 to 1)",
    "density": "change in density (1 = even attention)",
    "fraction": "change in attention fraction (0 to 1)",
    "entropy": "change in normalised entropy (0 to 1)",
}


def save_pictures(
    effects: Sequence[StyleEffect], heads: pd.DataFrame, overlap: pd.DataFrame, folder: Path, measure: str
) -> list[Path]:
    """The heatmaps: all styles on one measure, against the clean form and against their controls; each style on the
    first four PANELS it has; the overlap matrices."""
    from attention.heatmaps import file_word, save_layer_head_grid

    dots = f"dots: adjusted p < {ALPHA}"
    # A style that only adds words (polite) has no clean twin of them, so some measures do not exist for it.
    counts = heads[heads["measure"] == measure].groupby("style")["n"].max()
    having = [effect for effect in effects if effect.style in counts]
    if not having:
        raise UserError(f"--measure {measure}: no row of these styles has it; choose another, see head_sensitivity.csv")
    panels = [_panel(heads, effect, measure, f"{effect.style} (n = {counts[effect.style]} pairs)") for effect in having]
    paths = [folder / "head_sensitivity.png"]
    title = f"{measure}: style minus clean form, by layer and head; {dots}"
    save_layer_head_grid(paths[0], panels, _label(measure), title, effects[0].layers)
    for effect in effects:
        known = set(heads.loc[heads["style"] == effect.style, "measure"])
        shown = [name for name in PANELS if name in known][:4]
        own = heads[heads["style"] == effect.style].groupby("measure")["n"].max()
        panels = [_panel(heads, effect, name, f"{name}, n = {own[name]}\n{_label(name)}") for name in shown]
        if not panels:
            continue
        paths.append(folder / f"head_sensitivity_{file_word(effect.style)}.png")
        title = f"{effect.style} minus clean form (n: pairs); {dots}"
        save_layer_head_grid(paths[-1], panels, "", title, effect.layers, shared_scale=False)
    paths += _save_against_controls(having, heads, folder, measure)
    names = [effect.style for effect in having]
    for (baseline, part), end in zip(overlap.groupby("baseline", sort=False), ("", "_vs_split"), strict=False):
        if among := [name for name in names if name in {*part["style"]}]:
            paths.append(folder / f"head_overlap{end}.png")
            _save_overlap(paths[-1], part[part["measure"] == measure], among, measure, str(baseline))
    return paths


def _save_against_controls(
    effects: Sequence[StyleEffect], heads: pd.DataFrame, folder: Path, measure: str
) -> list[Path]:
    """Heatmap of style minus control; none where no style has one.

    Where some have a control of as many tokens, only these: next to what an invisible character does (`split`) one
    would see nothing of a typo.
    """
    from attention.heatmaps import save_layer_head_grid

    rows = _with_equal_tokens(heads[(heads["measure"] == measure) & heads["difference_vs_split"].notna()])
    matched = rows.groupby("style")[["n_vs_split", "control"]].max()
    panels = []
    for effect in (effect for effect in effects if effect.style in matched.index):
        count, control = matched.loc[effect.style]
        note = f"{effect.style} minus {control} (n = {count:.0f} pairs)"
        panels.append(_panel(heads, effect, measure, note, "difference_vs_split", "p_adjusted_vs_split"))
    if not panels:
        return []
    path = folder / "head_sensitivity_vs_split.png"
    title = f"{measure}: style minus control, by layer and head; dots: adjusted p < {ALPHA}"
    save_layer_head_grid(path, panels, _label(measure), title, effects[0].layers)
    return [path]


def _with_equal_tokens(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows whose control is a `split@<style>`, where there are any; else all."""
    equal = rows["control"].map(matched_style, na_action="ignore").notna()
    return rows[equal] if equal.any() else rows


def _save_overlap(path: Path, overlap: pd.DataFrame, names: list[str], measure: str, baseline: str) -> None:
    import numpy as np
    from attention.heatmaps import save_style_matrix

    matrix = np.full((len(names), len(names)), np.nan)
    pairs = overlap[overlap["style"].isin(names) & overlap["other_style"].isin(names)]
    for row in pairs.itertuples():
        a, b = names.index(str(row.style)), names.index(str(row.other_style))
        matrix[a, b] = matrix[b, a] = row.cross_half_spearman
    least, most = (end(pairs[["n", "n_other"]].to_numpy()) for end in (np.min, np.max))
    count = f"{least} to {most}" if least < most else f"{most}"
    title = (
        f"Do the styles share their heads? {measure}, style minus {baseline}\n"
        f"(diagonal: split-half reliability; n = {count} pairs)"
    )
    save_style_matrix(path, matrix, names, "rank correlation over heads", title)


def save_flip_pictures(effects: Sequence[StyleEffect], flips: pd.DataFrame, folder: Path, measure: str) -> list[Path]:
    """Heatmaps of the correlation of each head's change with a flipped answer, for the changes from the clean form and
    from the control; none where too few answers flip."""
    from attention.heatmaps import save_layer_head_grid

    paths = []
    for baseline, end in ((CLEAN, ""), (CONTROL, "_vs_split")):
        table = flips[(flips["baseline"] == baseline) & (flips["measure"] == measure)]
        table = _with_equal_tokens(table)
        panels = []
        for effect in effects:
            counts = table[table["style"] == effect.style]
            if counts["point_biserial_r"].notna().any():
                against = f" minus {counts['control'].iloc[0]}" if baseline == CONTROL else ""
                note = f"{effect.style}{against} (n = {counts['n'].max()}, {counts['n_flipped'].max()} flipped)"
                panels.append(_panel(table, effect, measure, note, "point_biserial_r"))
        if panels:
            paths.append(folder / f"head_answer_flips{end}.png")
            title = (
                f"Does the change in {measure} from the {baseline} go with a wrong answer?\ndots: adjusted p < {ALPHA}"
            )
            save_layer_head_grid(paths[-1], panels, "point-biserial r", title, effects[0].layers)
    return paths


def _panel(
    table: pd.DataFrame,
    effect: StyleEffect,
    measure: str,
    title: str,
    column: str = "difference",
    adjusted: str = "p_adjusted",
) -> tuple[str, np.ndarray, np.ndarray]:
    import numpy as np

    values = np.full((len(effect.layers), effect.heads), np.nan)
    marked = np.zeros(values.shape, dtype=bool)
    rows = table[(table["style"] == effect.style) & (table["measure"] == measure)]
    place = rows["layer"].map({layer: i for i, layer in enumerate(effect.layers)}).to_numpy(), rows["head"].to_numpy()
    values[place] = rows[column]
    marked[place] = rows[adjusted] < ALPHA
    return title, values, marked


def _label(measure: str) -> str:
    return next(label for word, label in LABELS.items() if word in measure)


# --- script


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__)
    data = parser.add_argument_group("data")
    data.add_argument("--run_dir", type=Path, required=True, help="run folder of stage 2")
    data.add_argument("--results_dir", type=Path, help="folder for the tables; default: results/<run name>")
    data.add_argument("--styles", nargs="+", help="styles to compare with the clean form; default: all")
    data.add_argument("--max_samples", type=int, help="rows of the prompt file to use")
    data.add_argument("--maths_items", type=Path, help="for the flips; default: maths_items.csv in results_dir")
    data.add_argument("--tokenizer", help="model name or folder; only for files that hold no region_mask")
    add_first_token(data)
    data.add_argument(
        "--split_tokens", type=int, default=1, help="most tokens by which a typo and `split` may differ; -1: any"
    )
    shown = parser.add_argument_group("pictures and splits")
    shown.add_argument("--measure", choices=MEASURES, help="shown for all styles; default: the log2 mass")
    shown.add_argument("--seed", type=int, default=0, help="of the random halves")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the tables and the pictures; tell the heads that react most."""
    args = parse_args(argv)
    from attention.activation_rows import clean_and_styles, control_of
    from attention.answer_flips import open_answers
    from run_store import open_run, warn_unfinished

    run = open_run(args.run_dir)
    clean, styles = clean_and_styles(run, args.styles, with_controls=False)
    warn_unfinished(run, args.styles, args.max_samples)
    folder = args.results_dir or Path("results") / run.name
    answers = open_answers(args.maths_items, folder)
    effects, controls, flips = [], {}, []
    without_first = args.first_token == "excluded"
    for style in styles:
        effect = style_effect(run, style, clean, args.max_samples, answers, args.tokenizer, without_first)
        if effect is None:
            continue
        effects.append(effect)
        against = None
        if control := control_of(run, style):
            limit = args.split_tokens if args.split_tokens >= 0 else None
            against = style_effect(run, style, control, args.max_samples, answers, args.tokenizer, without_first, limit)
            controls[style] = control, against
        for one in (effect, against):
            if one is not None and (found := one.finish()) is not None:
                flips.append(found)
    if not effects:
        raise UserError(f"{run.path}: no style has a row of the clean form with another text; nothing to compare")
    tell_undefined(effects)
    paths, heads = write_results(effects, controls, flips, folder, args)
    for line in top_lines(heads, args.measure or _first_panel(heads)):
        get_logger().info(line)
    pictures = sum(path.suffix == ".png" for path in paths)
    more = f"{len(paths) - pictures - 1} more tables and {pictures} pictures"
    get_logger().info(f"wrote {folder}/head_sensitivity.csv, {more}")
    for path in paths:
        get_logger().debug(str(path))
    return 0


def top_lines(heads: pd.DataFrame, measure: str) -> list[str]:
    """The result in words: the five heads of each style whose `measure` differs most, to the control if it has one.

    Where some styles have a control of as many tokens (`split@<style>`), only these.
    """
    rows = heads[heads["measure"] == measure]
    against = _with_equal_tokens(rows[rows["difference_vs_split"].notna()])
    end = "_vs_split" if len(against) else ""
    lines = [f"heads (layer.head) in which {measure} differs most; * adjusted p < {ALPHA}"]
    for style, part in (against if end else rows).groupby("style", sort=False):
        told = [
            f"{row['layer']}.{row['head']} {row[f'difference{end}']:+.2g} [{row[f'difference_ci_low{end}']:.2g}, "
            f"{row[f'difference_ci_high{end}']:.2g}]" + ("*" if row[f"p_adjusted{end}"] < ALPHA else "")
            for _, row in part.nsmallest(5, f"rank{end}").iterrows()
        ]
        other = part["control"].iloc[0] if end else CLEAN
        lines.append(f"{style} minus {other} (n = {part[f'n{end}'].max():.0f}): {', '.join(told)}")
    return lines


def tell_undefined(effects: Sequence[StyleEffect]) -> None:
    """Say in the log of which styles no pair has a divergence, though there are raw maps."""
    without = []
    for effect in effects:
        counts = [_rows_used(effect, measure) for measure in effect.measures if measure in DISTANCES]
        if counts and not any(counts):
            without.append(effect.style)
    if without:
        get_logger().info(
            f"no {' or '.join(DISTANCES)} for {' '.join(without)}: the edit changes how the words beside it are "
            "cut into tokens, so that these cannot be aligned, or no token follows it"
        )


def write_results(
    effects: list[StyleEffect],
    controls: dict[str, tuple[str, StyleEffect | None]],
    flips: list[tuple[pd.DataFrame, pd.DataFrame]],
    folder: Path,
    args: argparse.Namespace,
) -> tuple[list[Path], pd.DataFrame]:
    """Write the CSVs and pictures; returns (their paths, the table of heads). controls: a style's control and its
    differences to that."""
    import pandas as pd
    from file_output import write_csv

    names = ("head_sensitivity", "layer_sensitivity")
    tables = {}
    for position, name in enumerate(names):
        tables[name] = pd.concat([effect.tables[position] for effect in effects if effect.tables], ignore_index=True)
        known = {style: effect.tables for style, (_, effect) in controls.items() if effect}
        own = {style: both[position] for style, both in known.items() if both}
        tables[name] = with_controls(tables[name], own, {style: control for style, (control, _) in controls.items()})
    matched = [(control, effect) for control, effect in controls.values() if effect]
    equal = [effect for control, effect in matched if matched_style(control)]
    against = equal or [effect for _, effect in matched]  # as in the picture
    parts = [(effects, CLEAN), (against, CONTROL)]
    tables["head_overlap"] = pd.concat(
        [overlap_table(some, args.seed, baseline) for some, baseline in parts if some], ignore_index=True
    )
    for position, name in enumerate(("head_answer_flips", "layer_answer_flips") if flips else ()):
        tables[name] = pd.concat([pair[position] for pair in flips], ignore_index=True)
    paths = [folder / f"{name}.csv" for name in tables]
    for path, table in zip(paths, tables.values(), strict=True):
        write_csv(path, table)
    measure = args.measure or _first_panel(tables["head_sensitivity"])
    paths += save_pictures(effects, tables["head_sensitivity"], tables["head_overlap"], folder, measure)
    if flips:
        paths += save_flip_pictures(effects, tables["head_answer_flips"], folder, measure)
    return paths, tables["head_sensitivity"]


def _first_panel(heads: pd.DataFrame) -> str:
    """The first of PANELS that some style has: where styles only add words, nothing edited has a clean twin."""
    return next((name for name in PANELS if (heads["measure"] == name).any()), PANELS[0])


if __name__ == "__main__":
    run_main(main)
