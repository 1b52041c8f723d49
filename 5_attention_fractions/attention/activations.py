"""How far a style moves the residual stream from its clean twin, and where a mistyped word is recovered.

What every measure means: docs/METHODS.md, section activation_diffs.py. Arrays have their rows first: [n, L+1] for a
measure by layer (0 = embeddings, L = after the final norm), [n] for a number per row.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from command_line import UserError
from logger import get_logger
from next_token_change import last_logits, next_token_change
from paired_stats import Estimate, benjamini_hochberg, clustered_mean, holm_over_styles
from run_store import Run, open_run
from style_names import controlled_style, is_again, is_control, source_style
from style_rows import (
    StyleRows,
    clean_and_styles,
    control_of,
    like_control,
    paired_rows,
    twin_region,
    warn_missing_controls,
)

from attention.logit_lens import LogitLens, open_lens
from attention.state_measures import (
    Centre,
    ReferenceWords,
    clustered_cka,
    half_recovery_depth,
    layer_slices,
    nearness,
    recovery_depth,
    reference_rows,
    reference_words,
    state_distances,
)

MASSIVE = 4  # longer than so many median norms: a massive activation; nothing else came near it on real text
REGIONS = ("edited", "task", "last")
RANGES = {  # of the measures that have one
    **dict.fromkeys(("own_nearest", "own_nearer_share", "top1_kept", "kl_mass_clean", "kl_mass_style"), (0, 1)),
    **dict.fromkeys(("cosine", "cosine_centred", "lens_top1_probability_change"), (-1, 1)),
    **dict.fromkeys(("relative_l2", "lens_kl", "next_token_kl"), (0, np.inf)),
    "lens_top1_probability": (0, 1),
}
LENS_MEASURES = ("lens_kl", "lens_top1_probability", "lens_top1_probability_change")
REACHED = {  # a number per row that may be beyond what can be seen, and the column that says whether it is not
    "recovery_depth": "recovered",
    "half_recovery_depth": "half_recovered",
    "clean_top1_rank": "clean_top1_in_topk",
}
ITEM_COLUMNS = [
    *("style", "original_index", "element_index", "edited_tokens_clean", "edited_tokens", "recovery_depth"),
    *("recovered", "half_recovery_depth", "half_recovered", "next_token_kl", "kl_mass_clean", "kl_mass_style"),
    *("clean_top1_rank", "clean_top1_in_topk", "top1_kept"),
]

_NO_CHANGE = Estimate._make([np.nan] * 7 + [0] * 2)
_NOTHING = pd.DataFrame(columns=["style", "region", "measure"])  # estimates of no style

Key = tuple[str, str]  # (region, measure); region "" for a number per row


@dataclass
class Comparison:
    """A run whose styles are compared with its clean form, and the options of the script."""

    run: Run
    args: argparse.Namespace
    clean: StyleRows
    styles: dict[str, StyleRows]
    regions: list[str]
    words: dict[str, ReferenceWords | None]  # of each style
    centres: dict[str, Centre]  # of each region
    cka_rows: set[int]
    lens: LogitLens | None = None

    @property
    def without_first(self) -> bool:
        """Whether rows whose region holds the first token are left out of that region."""
        return bool(self.args.first_token == "excluded")

    def beyond(self, style: str, measure: str) -> float:
        """The number that means `never` (a depth beyond the last layer) or `below the top-k` (a rank)."""
        if measure == "clean_top1_rank":
            return float(self.styles[style].first_content()["topk_vals"].shape[-1] + 1)
        return float(self.styles[style].layer_count()) if measure in REACHED else np.inf


@dataclass
class StyleValues:
    """What is kept of one style: the measures of its n rows, and no states."""

    rows: list[int]
    identical: list[int]  # rows whose text is the clean one
    values: dict[Key, np.ndarray] = field(default_factory=dict)  # float32 [n, L+1] by layer, else [n]
    cka_rows: dict[str, list[int]] = field(default_factory=dict)  # of each region
    on_first: dict[str, int] = field(default_factory=dict)  # rows left out of each region
    lens: pd.DataFrame | None = None  # `lens_lines` of its first rows
    other_words: float = math.nan  # that an edited word is compared with, median over the rows


# --- opening the run


def open_comparison(args: argparse.Namespace) -> Comparison:
    """The run, opened and checked. Raises UserError if it holds nothing to compare."""
    run = open_run(args.run_dir)
    clean_style, styles = clean_and_styles(run, args.styles)
    clean = StyleRows(run, clean_style, args.max_samples)
    if not clean.indices:
        raise UserError(f"{run.path}: no rows to read; raise --max_samples or run stage 2")
    regions = _regions(clean, args.regions)
    if args.reference_words < 2:
        raise UserError(f"--reference_words {args.reference_words}: at least 2 are needed")
    if args.stay_layers < 1:
        raise UserError(f"--stay_layers {args.stay_layers}: at least 1")
    tables = {style: StyleRows(run, style, args.max_samples) for style in styles}
    rows = reference_rows(clean, args.reference_words, args.seed)
    order = np.random.default_rng(args.seed).permutation(len(clean.indices))[: args.cka_items]
    study = Comparison(run, args, clean, tables, regions, {}, {}, {clean.indices[place] for place in order})
    for style in styles:
        study.words[style] = reference_words(run, clean, style, rows, args.reference_words, study.without_first)
    for region in set(regions) & set(clean.state_regions()):
        on_first = clean.holds_first(rows, region) & study.without_first
        # If all are on the first token, none counts, and it does not matter what their centre is.
        centre_rows = [row for row, on in zip(rows, on_first, strict=True) if not on] or rows
        study.centres[region] = Centre.of(clean.states(centre_rows[: args.reference_words], region))
    warn_missing_controls(run, styles)
    without = [style for style, found in study.words.items() if found is None]
    if without and "edited" in regions:
        get_logger().warning(
            f"no recovery depth of {', '.join(without)}: they edit fewer than two words of the clean prompts"
        )
    counts = [f"{style} {len(found.rows)}" for style, found in study.words.items() if found]
    get_logger().debug(f"other words to compare with: {', '.join(counts) or 'none'}")
    if args.model_name:
        study.lens = _checked_lens(study)
    return study


def _regions(clean: StyleRows, wanted: Sequence[str] | None) -> list[str]:
    """The regions asked for, or those of REGIONS that the run has. UserError for one whose states it does not hold."""
    have = clean.state_regions()
    known = {*have, "edited"} if any(name.startswith("edited") for name in have) else {*have}
    if missing := [region for region in wanted or [] if region not in known]:
        raise UserError(f"--regions {missing[0]}: neither pooled nor raw in this run; it has {', '.join(have)}")
    regions = list(wanted) if wanted else [region for region in REGIONS if region in known]
    if not regions:
        raise UserError(
            f"{clean.run.path}: no states of {', '.join(REGIONS)}; it has {', '.join(have) or 'none'}: "
            "name some with --regions, or run stage 2 with others in --pool_regions"
        )
    for region in regions:
        if region in have and len(layers := clean.state_layers(region)) < clean.layer_count():
            get_logger().debug(f"{region}: not pooled, so only the raw layers {' '.join(map(str, layers))} are known")
    return regions


def _checked_lens(study: Comparison) -> LogitLens:
    """The lens of --model_name. Raises UserError if the run holds too little for it, or another model made the run."""
    clean, args = study.clean, study.args
    if "last" not in clean.state_regions() or not clean.has("topk_vals"):
        raise UserError(
            "--model_name: the logit lens needs the states of the last token and the run's topk_vals; run stage 2 "
            "with `last` among --pool_regions or with --raw_layers, and with --topk_logits"
        )
    lens = open_lens(args.model_name, args.dtype, args.device_map)
    rows = clean.indices[: min(8, args.lens_rows)]
    states = clean.states(rows, "last")
    lens.check_size(states.shape[1] - 1, states.shape[2])
    if clean.state_layers("last")[-1] == lens.layer_count:
        logits = clean.extract(last_logits, rows)
        lens.check(states[:, -1], logits["topk_vals"], logits["topk_indices"])
    else:
        made_by = study.run.settings(clean.style).get("settings", {}).get("model_name", "an unknown model")
        get_logger().warning(
            f"the run does not hold its last layer, so --model_name {args.model_name} cannot be checked against its "
            f"logits; the run was made by {made_by}"
        )
    return lens


# --- the measures of one style


def measure_styles(study: Comparison) -> dict[str, StyleValues]:
    """Every measure of every style, the controls first."""
    order = sorted(study.styles, key=lambda style: not is_control(style))
    measured = {style: style_values(study, style) for style in order}
    for style, own in measured.items():
        if own.identical and source_style(style) == style:
            get_logger().debug(f"{style}: left out {len(own.identical)} rows that are equal to the clean text")
        for region, count in own.on_first.items():
            if count:
                note = f"{style} {region}: left out {count} rows on the first token (else --first_token included)"
                get_logger().debug(note)
    return measured


def style_values(study: Comparison, style: str) -> StyleValues:
    """Every measure of a style's rows against their clean twins.

    A state that overflowed its 16-bit dtype has no distance: missing, not infinite.
    """
    own, pairs = study.styles[style], paired_rows(study.styles[style], study.clean)
    # If a typo has as many tokens as the word, the clean word is its own control; the clean form again changes no text.
    made = source_style(style) != style
    found = StyleValues(pairs.rows if made else pairs.changed, pairs.identical)
    if not found.rows:
        return found
    for region in study.regions:
        if region in own.state_regions() and twin_region(region, style) in study.clean.state_regions():
            _add_state_measures(study, style, region, found)
    values, rows, stay = found.values, found.rows, study.args.stay_layers
    first = {*study.clean.indices[: study.args.lens_rows]}
    if study.lens is not None and (lens_rows := [row for row in rows if row in first]):
        clean, other = (table.states(lens_rows, "last") for table in (study.clean, own))
        top1 = study.clean.extract(last_logits, lens_rows)["topk_indices"][:, 0]
        change = study.lens.change(clean, other, top1)
        found.lens = lens_lines(study.clean.style, style, lens_rows, change)
        for name in LENS_MEASURES:
            values["last", name] = np.full((len(rows), other.shape[1]), np.nan, dtype=np.float32)
            values["last", name][np.isin(rows, lens_rows)] = change[name]
    if ("edited", "own_nearest") in values:
        cosine = values["edited", "cosine_centred"].astype(np.float64)
        values["", "recovery_depth"] = recovery_depth(values["edited", "own_nearest"], stay)
        values["", "half_recovery_depth"] = half_recovery_depth(cosine, stay)
    if study.clean.has("topk_vals") and own.has("topk_vals"):
        next_token = next_token_change(*(table.extract(last_logits, rows) for table in (study.clean, own)))
        values |= {("", name): numbers for name, numbers in next_token.items()}
        # If a control is the clean prompt itself there is no change to take the logarithm of.
        if not is_again(style):
            values["", "log10_next_token_kl"][np.isin(rows, found.identical)] = np.nan
    for numbers in values.values():
        numbers[np.isinf(numbers)] = np.nan
    return found


def _add_state_measures(study: Comparison, style: str, region: str, found: StyleValues) -> None:
    """Add the measures [n, L+1] of a region's states, and the rows of its CKA."""
    own, rows, twin = study.styles[style], found.rows, twin_region(region, style)
    on_first = np.zeros(len(rows), dtype=bool)
    if study.without_first:
        on_first = study.clean.holds_first(rows, twin) | own.holds_first(rows, region)
    words = study.words[style] if region == "edited" else None
    centre = words.centre if words else study.centres.get(region)
    if words:
        tokens = [study.clean.region_tokens(row, twin) for row in rows]
        others = words.others(rows, own.clusters(rows), tokens)
        found.other_words = int(others.sum(-1).median())
    massive = np.zeros(len(rows), dtype=bool)
    width = study.clean.states(rows[:1], twin, study.clean.state_layers(twin)[0]).shape[-1]
    for layers in layer_slices(len(rows), width, own.layer_count()):
        clean, other = (
            torch.from_numpy(table.states(rows, name, layers)) for table, name in ((study.clean, twin), (own, region))
        )
        clean[on_first] = other[on_first] = torch.nan
        measures = state_distances(clean, other, centre.state[layers] if centre else None)
        if words:
            measures |= nearness(clean, other, words, others, layers)
        if centre:
            limit = MASSIVE * centre.norm[layers]
            massive |= ((clean.norm(dim=-1) > limit) | (other.norm(dim=-1) > limit)).any(1).numpy()
        for name, tensor in measures.items():
            whole = np.full((len(rows), own.layer_count()), np.nan, dtype=np.float32)
            found.values.setdefault((region, name), whole)[:, layers] = tensor.numpy()
    left_out = massive | on_first
    found.cka_rows[region] = [row for row, out in zip(rows, left_out, strict=True) if row in study.cka_rows and not out]
    found.on_first[region] = int(on_first.sum())


# --- tables


def all_tables(study: Comparison, measured: dict[str, StyleValues]) -> dict[str, pd.DataFrame]:
    """{name of the CSV: table} of the styles' measures."""
    found = [table for style in measured for table in _estimates(study, measured, style)]
    estimates = pd.concat(found or [_NOTHING], ignore_index=True)
    return {
        "activation_diffs": curve_table(study, measured, estimates),
        "activation_diffs_summary": summary_table(study, measured, estimates),
        "activation_diffs_items": item_table(study, measured),
        "logit_lens_items": lens_table(measured),
    }


def curve_table(study: Comparison, measured: dict[str, StyleValues], estimates: pd.DataFrame) -> pd.DataFrame:
    """One line per style, layer, region and measure: the columns of activation_diffs.csv."""
    cka = [_cka_lines(study, style, *place) for style, own in measured.items() for place in own.cka_rows.items()]
    tables = [table for table in (estimates[estimates["region"] != ""], *cka) if len(table)]
    table = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame({"n": []})
    table = table[table["n"] > 0].reset_index(drop=True)
    if table.empty:
        return pd.DataFrame(columns=["style", "layer", "region", "measure"])
    table["p_adjusted"] = np.nan
    for _, part in table[~table["style"].map(is_control)].groupby(["region", "measure"]):
        table.loc[part.index, "p_adjusted"] = benjamini_hochberg(part["p"])
    return _finished(study, table, ["style", "layer", "region", "measure"])


def summary_table(study: Comparison, measured: dict[str, StyleValues], estimates: pd.DataFrame) -> pd.DataFrame:
    """One line per style and number per row (depths, KL, rank): the columns of activation_diffs_summary.csv."""
    table = estimates[estimates["region"] == ""].drop(columns=["layer", "region", "n_other_words"], errors="ignore")
    if table.empty:
        return pd.DataFrame(columns=["style", "measure"])
    keys = list(zip(table["style"], table["measure"], strict=True))
    known = [values[~np.isnan(values)] for style, name in keys for values in (measured[style].values["", name],)]
    table["median"] = [np.quantile(values, 0.5, method="lower") if len(values) else np.nan for values in known]
    table["n_censored"] = [int((values >= study.beyond(*key)).sum()) for key, values in zip(keys, known, strict=True)]
    table["n_identical"] = [len(measured[style].identical) for style, _ in keys]
    table["p_adjusted"] = np.nan
    for _, part in table[~table["style"].map(is_control)].groupby("measure"):
        table.loc[part.index, "p_adjusted"] = holm_over_styles(part)
    return _finished(study, table, ["style", "measure", "n", "n_censored", "n_identical", "n_clusters", "median"])


def _finished(study: Comparison, table: pd.DataFrame, front: list[str]) -> pd.DataFrame:
    """The table with its first columns in place, its controls named, and its styles in the order of the run."""
    controls = [control_of(study.run, style) for style in table["style"]]
    table.insert(int(table.columns.get_indexer(["n_with_control"])[0]), "control", controls)
    place = {style: number for number, style in enumerate(study.styles)}
    table = table[front + [column for column in table.columns if column not in front]]
    return table.sort_values("style", key=lambda column: column.map(place), kind="stable").reset_index(drop=True)


def _estimates(study: Comparison, measured: dict[str, StyleValues], style: str) -> list[pd.DataFrame]:
    """A table for each measure of a style, a line by layer (region "" and layer 0 for a number per row): its mean, and
    its difference to the style's control.

    The control counts on the rows in which both edit the same words into (nearly) as many tokens.
    """
    own, table, control = measured[style], study.styles[style], control_of(study.run, style)
    other, alike = measured.get(str(control)), []
    if other is not None:
        most = study.args.split_tokens if study.args.split_tokens >= 0 else None
        shared = sorted({*own.rows} & {*other.rows})
        alike = like_control(table, study.styles[str(control)], shared, most)
        mine, theirs = (np.searchsorted(one.rows, alike) for one in (own, other))
    tables = []
    for (region, measure), values in own.values.items():
        change, base = _NO_CHANGE, np.array(np.nan)
        if alike and other is not None and (region, measure) in other.values:
            base = other.values[region, measure][theirs]
            change = clustered_mean(values[mine] - base, table.clusters(alike))
            base = clustered_mean(np.where(np.isnan(values[mine]), np.nan, base)).mean
        least, most = RANGES.get(measure, (-np.inf, np.inf))
        change = change.within(least - most, most - least)
        estimate = clustered_mean(values, table.clusters(own.rows)).within(least, most)
        columns = {
            "style": style,
            "region": region,
            "measure": measure,
            "n": estimate.n,
            "n_clusters": estimate.n_clusters,
            **estimate.columns("estimate", "ci"),
            "n_with_control": change.n,
            "control_estimate": base,
            **change.columns("difference_to_control", "difference_ci"),
            "p": change.p,
            "layer": np.arange(np.size(estimate.mean)),
            "n_other_words": own.other_words if measure.startswith("own_near") else np.nan,
        }
        tables.append(pd.DataFrame(columns, index=range(np.size(estimate.mean))))
    return tables


def _cka_lines(study: Comparison, style: str, region: str, rows: list[int]) -> pd.DataFrame:
    """CKA of all these rows at once, layer by layer."""
    twin, table, lines = twin_region(region, style), study.styles[style], []
    for layer in sorted({*study.clean.state_layers(twin)} & {*table.state_layers(region)}) if rows else ():
        clean, other = study.clean.states(rows, twin, layer), table.states(rows, region, layer)
        if found := clustered_cka(clean, other, table.clusters(rows)):
            value, low, high, n, clusters = found
            line = {"style": style, "region": region, "measure": "cka", "layer": layer, "p": np.nan, "n": n}
            lines.append(line | {"n_clusters": clusters, "estimate": value, "ci_low": low, "ci_high": min(high, 1)})
    return pd.DataFrame(lines)


def item_table(study: Comparison, measured: dict[str, StyleValues]) -> pd.DataFrame:
    """One line per row and style: the columns of activation_diffs_items.csv."""
    tables = []
    for style, own in measured.items():
        twin, rows = twin_region("edited", style), own.rows
        columns: dict[str, Any] = {"style": style, "original_index": rows}
        columns["element_index"] = study.styles[style].texts(rows, "element_index")
        columns["edited_tokens_clean"] = study.clean.token_counts(rows, twin)[:, 0]
        columns["edited_tokens"] = study.styles[style].token_counts(rows, "edited")[:, 0]
        table = pd.DataFrame(columns | {name: numbers for (region, name), numbers in own.values.items() if not region})
        for name, flag in REACHED.items():
            if name in table:
                reached = table[name] < study.beyond(style, name)
                table[flag] = reached.astype("Int64").where(table[name].notna())
                if name != "clean_top1_rank":
                    table[name] = table[name].where(reached)
        tables.append(table)
    return pd.concat([table for table in tables if len(table)] or tables).reindex(columns=ITEM_COLUMNS)


def lens_lines(clean: str, style: str, rows: list[int], change: dict[str, np.ndarray]) -> pd.DataFrame:
    """One line per row and layer of a style and of its clean form: what `LogitLens.change` [n, L+1] says of them."""
    probability, token = change["lens_top1_probability"], change["lens_token"]
    sides = [(clean, probability - change["lens_top1_probability_change"], change["lens_token_clean"])]
    sides.append((style, probability, token))
    row, layer = np.repeat(rows, token.shape[1]), np.tile(np.arange(token.shape[1]), len(rows))
    tables = [
        pd.DataFrame(
            {
                "style": name,
                "original_index": row,
                "layer": layer,
                "clean_top1_probability": p.ravel().round(6),
                "token": ids.ravel(),
            }
        )
        for name, p, ids in sides
    ]
    return pd.concat(tables).dropna().astype({"token": int})


def lens_table(measured: dict[str, StyleValues]) -> pd.DataFrame:
    """The lines of all styles, those of the clean form once: the columns of logit_lens_items.csv."""
    tables = [own.lens for own in measured.values() if own.lens is not None]
    if not tables:
        return pd.DataFrame()
    return pd.concat(tables).drop_duplicates(["style", "original_index", "layer"])


def recovery_lines(summary: pd.DataFrame) -> list[str]:
    """The result in words: from which layer on a mistyped word is recovered, against its control if it has one.

    If some styles have a control of as many tokens, only these.
    """
    rows = summary[summary["measure"] == "recovery_depth"] if len(summary) else summary
    rows = rows[~rows["style"].map(is_control)] if len(rows) else rows
    if not len(rows):
        return ["recovery depth: not known for any style"]
    matched = rows[rows["control"].map(controlled_style, na_action="ignore").notna() & (rows["n_with_control"] > 0)]
    lines = []
    for row in (matched if len(matched) else rows).itertuples():
        line = f"{row.style}: words recovered from layer {row.estimate:.1f} on [{row.ci_low:.1f}, {row.ci_high:.1f}]"
        line += f", n = {row.n}"
        if row.n_with_control:
            line += f"; {row.difference_to_control:+.1f} layers to {row.control} "
            line += f"[{row.difference_ci_low:+.1f}, {row.difference_ci_high:+.1f}], n = {row.n_with_control}"
        lines.append(line)
    return lines
