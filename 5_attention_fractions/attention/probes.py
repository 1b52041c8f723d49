"""Linear probes by layer and region: which items each target has, their folds, and the fits (docs/METHODS.md)."""

from __future__ import annotations

import argparse
import warnings
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from command_line import UserError
from load_json import TYPO_STYLES
from paired_stats import benjamini_hochberg
from run_store import Run, open_run
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from style_names import MATCHED, SPLIT_STYLE, is_again, is_control, source_style
from style_rows import (
    StyleRows,
    clean_and_styles,
    control_of,
    like_control,
    paired_rows,
    twin_region,
    warn_missing_controls,
)
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from attention.answer_flips import Answers
from attention.grouped_auc import Auc, fold_auc, macro_auc

ALL_TYPOS, ALL_STYLES = "all_typos", "all_styles"
ANSWER_REGION = "last"
TOKEN_COUNT_C = 1.0  # three features need no strong penalty
SMALL_FEATURES = 4_000_000  # below this many numbers, threads only wait for each other
MIN_CLUSTERS = 4  # of each class: below this a grouped fold says nothing

Source = tuple[str, str]  # (style, region in that style's files)


@dataclass
class States:
    """The styles of a run and the rows that are probed; one layer's states are read at a time."""

    run: Run
    clean: str
    tables: dict[str, StyleRows]
    rows: list[int]

    def common(self, style: str) -> list[int]:
        """Rows that the clean form and `style` both have, with different texts."""
        return paired_rows(self.tables[style], self.tables[self.clean], self.rows).changed

    def pooled(self, *sources: Source) -> bool:
        """Whether the files hold the pooled states of all these regions."""
        return all(region in self.tables[style].regions() for style, region in sources)

    def known(self, source: Source, rows: list[int]) -> set[int]:
        """Those of `rows` whose region is not empty and whose states are finite, at every layer."""
        table, region = self.tables[source[0]], source[1]
        good = np.ones(len(rows), dtype=bool)
        for layer in range(self.layers()):
            good &= np.isfinite(table.field("hidden_pooled", rows, region, layer)).all(axis=1)
        if region.startswith("edited"):  # an edited word on the first token has the sink's state
            good &= ~table.holds_first(rows, region)
        return {row for row, use in zip(rows, good, strict=True) if use}

    def layers(self) -> int:
        """L + 1."""
        return int(self.tables[self.clean].first_content()["hidden_pooled"].shape[0])

    def counts(self, items: Items) -> np.ndarray:
        """[n, 3]: tokens of the region, tokens of the prompt, position of the region's first token."""
        return np.concatenate([self.tables[style].token_counts(rows, region) for (style, region), rows in items.parts])

    def features(self, items: Items, layer: int) -> np.ndarray:
        """[n, D] float32 states of the items at one layer."""
        return np.concatenate(
            [self.tables[style].field("hidden_pooled", rows, region, layer) for (style, region), rows in items.parts]
        )


@dataclass
class Items:
    """The items of one probe: `parts` [(source, rows)] in order, and for each item what is known about it."""

    target: str
    style: str
    region: str
    parts: list[tuple[Source, list[int]]] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    twins: list[str] = field(default_factory=list)  # labels are shuffled among the items of one such name

    def add(self, source: Source, rows: Sequence[int], labels: int | Sequence[int], twins: Sequence[str]) -> None:
        """Add items: rows of one source, their labels (one number for all, or each its own) and twin names."""
        self.parts.append((source, list(rows)))
        self.labels += [labels] * len(rows) if isinstance(labels, int) else list(labels)
        self.rows += rows
        self.twins += twins


def open_states(args: argparse.Namespace) -> States:
    """The run, opened and checked; the rows to probe. Raises UserError if it holds nothing to probe."""
    run = open_run(args.run_dir)
    clean, found = clean_and_styles(run, args.styles)
    styles = [style for style in found if not is_again(style)]  # nothing is to be told apart
    if args.folds < 2:
        raise UserError(f"--folds {args.folds}: at least 2 are needed")
    tables = {style: StyleRows(run, style, args.max_samples) for style in (clean, *styles)}
    if missing := [style for style, table in tables.items() if not table.has("hidden_pooled")]:
        raise UserError(f"{run.styles[missing[0]]}: no hidden_pooled in its files; run stage 2 again with pooling on")
    pooled = set(tables[clean].regions()) | {"edited"}
    if unknown := [region for region in args.regions if region not in pooled]:
        raise UserError(f"--regions {unknown[0]}: not pooled in this run; it has {', '.join(sorted(pooled))}")
    warn_missing_controls(run, styles)
    rows = tables[clean].indices
    chosen = np.random.default_rng(args.seed).permutation(len(rows))[: args.max_rows]
    states = States(run, clean, tables, [rows[place] for place in sorted(chosen)])
    if wrong := [layer for layer in args.layers or [] if not 0 <= layer < states.layers()]:
        raise UserError(f"--layers {wrong[0]}: the run has layers 0 to {states.layers() - 1}")
    return states


# --- items of each target


def typo_items(states: States, styles: Sequence[str], region: str, name: str) -> Items:
    """The clean form (0) against `styles` (1), with one clean twin for each."""
    items = Items("typo", name, region)
    for style in styles:
        source, twin = (style, region), (states.clean, twin_region(region, style))
        if not states.pooled(source, twin):
            continue
        rows = states.common(style)
        rows = sorted(states.known(source, rows) & states.known(twin, rows))
        pair = [f"{style} {row}" for row in rows]
        items.add(twin, rows, 0, pair)
        items.add(source, rows, 1, pair)
    return items


def control_items(states: States, styles: Sequence[str], region: str) -> Items:
    """The controls of the typo styles (0) against these (1), on the rows that the controls match."""
    items = Items("typo_vs_control", ALL_TYPOS, region)
    shared: set[int] = set()  # rows of `split`, which may be the control of several styles
    for style in styles:
        control = control_of(states.run, style)
        if control is None or not states.pooled((style, region), (control, region)):
            continue
        if control == SPLIT_STYLE and region == "edited":  # a probe would read the invisible character
            continue
        rows = like_control(states.tables[style], states.tables[control], states.common(style), None)
        rows = sorted(states.known((style, region), rows) & states.known((control, region), rows))
        twins = [str(row) if control == SPLIT_STYLE else f"{style} {row}" for row in rows]
        items.add((style, region), rows, 1, twins)
        if control == SPLIT_STYLE:
            shared |= set(rows)
        else:
            items.add((control, region), rows, 0, twins)
    if shared:
        items.add((SPLIT_STYLE, region), sorted(shared), 0, [str(row) for row in sorted(shared)])
    return items


def style_items(states: States, styles: Sequence[str], region: str) -> Items:
    """Which of `styles` an item is; labels are positions in the list."""
    items = Items("style", ALL_STYLES, region)
    for number, style in enumerate(styles):
        if states.pooled((style, region)):
            rows = sorted(states.known((style, region), states.common(style)))
            items.add((style, region), rows, number, [str(row) for row in rows])
    return items


def answer_items(states: States, target: str, style: str, answers: Answers) -> Items:
    """Whether the answer to the style's prompt is wrong (1): `wrong` among the rows evaluated, `flipped` among
    those that the style changes and whose clean answer is right."""
    items, source = Items(target, style, ANSWER_REGION), (style, ANSWER_REGION)
    if states.pooled(source):
        if target == "flipped":
            rows = sorted(states.known(source, states.common(style)))
            wrong = answers.flips(style, states.clean, np.array(rows, dtype=np.int64))
        else:
            rows = [row for row in states.rows if row in states.tables[style] and (style, row) in answers]
            rows = sorted(states.known(source, rows))
            wrong = np.array([1 - answers.right(style, row) for row in rows])
        known = [(row, int(label)) for row, label in zip(rows, wrong, strict=True) if not np.isnan(label)]
        items.add(source, [row for row, _ in known], [label for _, label in known], [style] * len(known))
    return items


def all_items(states: States, args: argparse.Namespace, answers: Answers | None) -> Iterator[Items]:
    """The items of every probe that was asked for."""
    styles = [style for style in states.tables if style != states.clean]
    own_control = {style for style in styles if f"{MATCHED}{style}" in states.run.styles}
    typos = [style for style in styles if style in (args.typo_styles or {*TYPO_STYLES, *own_control})]
    for region in args.regions:
        if "typo" in args.targets:
            yield from (typo_items(states, [style], region, style) for style in styles)
            yield typo_items(states, typos, region, ALL_TYPOS)
        if "typo_vs_control" in args.targets:
            yield control_items(states, typos, region)
        if "style" in args.targets:
            yield style_items(states, [style for style in styles if source_style(style) == style], region)
    for target, own in (("wrong", [states.clean, *styles]), ("flipped", styles)):
        if answers is not None and target in args.targets:
            yield from (answer_items(states, target, style, answers) for style in own if not is_control(style))


# --- probing


@dataclass
class Probe:
    """One probe at every layer: its items as arrays, folds [n] that are the same in every layer."""

    items: Items
    labels: np.ndarray
    clusters: np.ndarray
    twins: np.ndarray
    folds: np.ndarray
    token_count: Auc  # of a probe that sees numbers of tokens alone


def why_not(items: Items, states: States) -> str:
    """Why these items cannot be probed, in a few words; "" if they can."""
    labels, templates = np.array(items.labels), np.array([states.run.template(row) for row in items.rows])
    if not items.labels:
        return {
            "typo": "no row whose clean form and style both have states of the region",
            "typo_vs_control": "no typo style has a control here; run stage 2 with --prompt_keys split@<style>",
            "style": "no style has states of the region",
        }.get(items.target, "no answer of the style is scored, or its states are not there")
    if (classes := len(np.unique(labels))) < 2:
        return "there is one style only" if items.target == "style" else "the answers are all right, or all wrong"
    if min(len(np.unique(templates[labels == kind])) for kind in np.unique(labels)) < MIN_CLUSTERS:
        return f"fewer than {MIN_CLUSTERS} templates in one of the {classes} classes"
    return ""


def not_probed(items: list[Items], states: States) -> list[str]:
    """One line for each reason why something is not probed: what, and why."""
    reasons: dict[str, dict[str, list[str]]] = {}
    for one in items:
        if reason := why_not(one, states):
            reasons.setdefault(reason, {}).setdefault(f"{one.target} at {one.region}", []).append(one.style)
    pooled = (ALL_TYPOS, ALL_STYLES)
    named = {
        reason: [f"{what} ({', '.join(styles)})" if {*styles} - {*pooled} else what for what, styles in places.items()]
        for reason, places in reasons.items()
    }
    return [f"not probed: {'; '.join(places)}: {reason}" for reason, places in named.items()]


def plan_probe(items: Items, states: States, folds: int, seed: int) -> Probe | None:
    """Cut the items into folds; None for items that cannot be probed (`why_not`)."""
    if why_not(items, states):
        return None
    kinds, labels = np.unique(items.labels, return_inverse=True)
    _, clusters = np.unique([states.run.template(row) for row in items.rows], return_inverse=True)
    _, twins = np.unique(items.twins, return_inverse=True)
    count = min(folds, *(len(np.unique(clusters[labels == kind])) for kind in range(len(kinds))))
    splitter = StratifiedGroupKFold(count, shuffle=True, random_state=seed)
    numbers = np.empty(len(labels), dtype=int)
    for number, (_, test) in enumerate(splitter.split(np.zeros((len(labels), 1)), labels, clusters)):
        numbers[test] = number
    token_count, _ = probe_auc(states.counts(items).astype(np.float32), labels, numbers, clusters, TOKEN_COUNT_C)
    return Probe(items, labels, clusters, twins, numbers, token_count)


def shuffled_within(labels: np.ndarray, groups: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The labels, each group's exchanged at random among its own items."""
    shuffled = labels.copy()
    target = np.argsort(groups, kind="stable")
    source = np.lexsort((rng.random(len(labels)), groups))  # same groups in the same order, items mixed inside
    shuffled[target] = labels[source]
    return shuffled


def probe_auc(
    features: np.ndarray,
    labels: np.ndarray,
    folds: np.ndarray,
    clusters: np.ndarray,
    C: float = 0.01,  # scikit-learn's own name
    max_iter: int = 300,
) -> tuple[Auc, bool]:
    """(AUC of the out-of-fold scores, whether every fit converged); features [n, D], the rest [n]."""
    kinds = int(labels.max()) + 1
    scores = np.zeros((len(labels), kinds))
    threads = 1 if features.size < SMALL_FEATURES else None
    with warnings.catch_warnings(record=True) as caught, threadpool_limits(threads):
        warnings.simplefilter("always", ConvergenceWarning)
        for fold in np.unique(folds):
            train, test = folds != fold, folds == fold
            model = make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=max_iter))
            model.fit(features[train], labels[train])
            if kinds == 2:
                scores[test, 1] = model.decision_function(features[test])
            else:
                scores[np.ix_(test, model.classes_)] = model.predict_proba(features[test])
    converged = not any(issubclass(one.category, ConvergenceWarning) for one in caught)
    found = (
        fold_auc(labels, scores[:, 1], folds, clusters) if kinds == 2 else macro_auc(labels, scores, folds, clusters)
    )
    return found, converged


def probe_line(probe: Probe, states: States, layer: int, args: argparse.Namespace) -> dict[str, Any]:
    """One line of the table: the probe at one layer, and the same with shuffled labels."""
    items = probe.items
    features = states.features(items, layer)
    seed = zlib.crc32(f"{items.target} {items.style} {items.region}".encode("utf-8", "backslashreplace"))
    rng = np.random.default_rng([args.seed, layer, seed])  # each probe its own shuffle, or all of them move together
    mixed = shuffled_within(probe.labels, probe.twins, rng)
    own, converged = probe_auc(features, probe.labels, probe.folds, probe.clusters, args.C, args.max_iter)
    shuffled, _ = probe_auc(features, mixed, probe.folds, probe.clusters, args.C, args.max_iter)
    line: dict[str, Any] = {"style": items.style, "layer": layer, "region": items.region, "target": items.target}
    line |= {"n": len(probe.labels), "n_positive": int((probe.labels == 1).sum()) if items.target != "style" else ""}
    line |= {"n_clusters": len(np.unique(probe.clusters)), "n_classes": int(probe.labels.max()) + 1}
    line |= {"n_folds": int(probe.folds.max()) + 1, "converged": int(converged), "auc": own.auc}
    line |= {"ci_low": own.ci_low, "ci_high": own.ci_high, "p": own.p}
    for name, found in (("shuffled", shuffled), ("token_count", probe.token_count)):
        line |= {f"{name}_auc": found.auc, f"{name}_ci_low": found.ci_low, f"{name}_ci_high": found.ci_high}
    return line


def fit_all(probes: list[Probe], states: States, args: argparse.Namespace) -> pd.DataFrame:
    """Every probe at every layer, with p values adjusted over the lines of a target."""
    layers = list(range(states.layers())) if args.layers is None else args.layers
    lines = [probe_line(probe, states, layer, args) for layer in tqdm(layers, desc="layer") for probe in probes]
    table = pd.DataFrame(lines)
    adjusted = table.groupby("target")["p"].transform(benjamini_hochberg)
    table.insert(int(table.columns.get_indexer(["p"])[0]) + 1, "p_adjusted", adjusted)
    return table
