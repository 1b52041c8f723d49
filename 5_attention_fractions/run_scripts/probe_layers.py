"""Linear probes by layer and region: is there a typo, which style is it, will the answer be wrong?

A probe is scikit-learn's logistic regression (L2, `--C`) on the mean state of a region, scaled inside the fold. Folds
keep a template's rows together, and with them every style of a row (StratifiedGroupKFold), so nothing can be known
from a twin. Targets:

    typo            the clean form against one style; and against all typo styles at once (style `all_typos`): those of
                    `--typo_styles`, by default a built-in list and every style that has a `split@<style>`
    typo_vs_split   all typo styles against their controls, the clean words only cut into other tokens: more than
                    fragmentation? The control of a style is `split@<style>`, cut into as many tokens, or else `split`
                    where it edits the same words (not at `edited`, where its invisible character would be read)
    style           which style it is, the clean form aside (mean one-against-rest AUC; style `all_styles`)
    wrong           will the answer to this prompt be wrong, a probe for each style but the controls, at the region
                    `last` alone; the line of the clean form shows how much of that is the problem and not the typo
    flipped         the same on the rows whose clean answer is right alone: will the typo turn it wrong?
                    (both from `--maths_items`, the table of stage 3; default: maths_items.csv in the results folder)

auc is that of the out-of-fold scores, over pairs of one fold, with a clustered 95 % interval that knows that the folds
share their training rows (grouped_auc.py; rough with fewer than 20 templates); p: one-sided, of auc > 0.5, BH-adjusted
over the lines of a target. control_auc is the same with shuffled labels: within each prompt and its twin (typo,
typo_vs_split: each pair keeps one of each), within a row (style), or among the prompts of the style (wrong, flipped).
Where the control is off 0.5, the probe's own number is worth nothing. baseline_auc is that of a probe which sees three
numbers instead of the state: the region's tokens, the prompt's tokens, and where the region begins. A typo is cut into
more tokens than its clean word, so that this can be near 1 at `edited`; a probe says more only above it.

Reads   outputs/<run>/<style>/activations_*.pt (hidden_pooled), maths_items.csv (style, original_index, correct)
Writes  results/<run>/probe_layers.csv   style, layer, region, target
        results/<run>/probe_layers.png

    python 5_attention_fractions/run_scripts/probe_layers.py --run_dir outputs/demo/maths
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / place) for place in ("", "../1_utils/run_scripts")]

import numpy as np
from attention.activation_rows import (
    SPLIT_STYLE,
    StyleRows,
    changed_rows,
    clean_and_styles,
    control_of,
    is_control,
    like_control,
    tell_controls,
    twin_region,
)
from attention.answer_flips import Answers, open_answers
from command_line import UserError, make_parser, run_main
from file_output import write_csv
from logger import get_logger
from run_store import Run, open_run, warn_unfinished
from token_spans import MATCHED, matched_style

if TYPE_CHECKING:
    import pandas as pd
    from attention.grouped_auc import Auc

TYPO_STYLES = ("main", "swap", "missing", "repeated", "two", "three", "grammar", "punctuation", "homonym")
TARGETS = ["typo", "typo_vs_split", "style", "wrong", "flipped"]
ALL_TYPOS, ALL_STYLES = "all_typos", "all_styles"
ANSWER_REGION = "last"
BASELINE_C = 1.0  # three features need no strong penalty
SMALL_FEATURES = 4_000_000  # below this many numbers, threads only wait for each other
MIN_CLUSTERS = 4  # of each class: below this a grouped fold says nothing

Source = tuple[str, str]  # (style, region in that style's files)


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


@dataclass
class States:
    """The styles of a run and the rows that are probed. Files stay memory-mapped; one layer is read at a time."""

    run: Run
    clean: str
    tables: dict[str, StyleRows]
    rows: list[int]

    def common(self, style: str) -> list[int]:
        """Rows that the clean form and `style` both have, with different texts."""
        return changed_rows(self.tables[self.clean], self.tables[style], self.rows)

    def known(self, source: Source, rows: list[int]) -> set[int]:
        """Those of `rows` whose region is not empty and whose states are finite, at every layer."""
        import torch

        if not rows:
            return set()
        good = torch.ones(len(rows), dtype=torch.bool)
        for layer in range(self.layers()):
            good &= self.tables[source[0]].gather("hidden_pooled", rows, source[1], layer).isfinite().all(-1)
        table, region = self.tables[source[0]], source[1]
        if region.startswith("edited"):  # an edited word on the first token has the sink's state
            good &= ~torch.tensor(table.holds_first(rows, region))
        return {row for row, use in zip(rows, good.tolist(), strict=True) if use}

    def layers(self) -> int:
        """L + 1."""
        return int(self.tables[self.clean].first_content()["hidden_pooled"].shape[0])

    def counts(self, items: Items) -> np.ndarray:
        """[n, 3]: tokens of the region, tokens of the prompt, position of the region's first token."""
        return np.concatenate([self.tables[style].token_counts(rows, region) for (style, region), rows in items.parts])

    def features(self, items: Items, layer: int) -> np.ndarray:
        """[n, D] float32 states of the items at one layer."""
        parts = [
            self.tables[style].gather("hidden_pooled", rows, region, layer).numpy()
            for (style, region), rows in items.parts
            if rows
        ]
        return np.concatenate(parts)


# --- items of each target


def typo_items(states: States, styles: Sequence[str], region: str, name: str) -> Items:
    """The clean form (0) against `styles` (1), with one clean twin for each."""
    items = Items("typo", name, region)
    for style in styles:
        source, twin = (style, region), (states.clean, twin_region(region, style))
        if not _pooled(states, source, twin):
            continue
        rows = states.common(style)
        rows = sorted(states.known(source, rows) & states.known(twin, rows))
        pair = [f"{style} {row}" for row in rows]
        items.add(twin, rows, 0, pair)
        items.add(source, rows, 1, pair)
    return items


def split_items(states: States, styles: Sequence[str], region: str) -> Items:
    """The controls of the typo styles (0) against these (1), on the rows that the controls match."""
    items = Items("typo_vs_split", ALL_TYPOS, region)
    shared: set[int] = set()  # rows of `split`, which may be the control of several styles
    for style in styles:
        control = control_of(states.run, style)
        if control is None or not _pooled(states, (style, region), (control, region)):
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
        if _pooled(states, (style, region)):
            rows = sorted(states.known((style, region), states.common(style)))
            items.add((style, region), rows, number, [str(row) for row in rows])
    return items


def wrong_items(states: States, style: str, answers: Answers) -> Items:
    """Whether the answer to the style's prompt is wrong (1); rows that were not evaluated are left out."""
    items, source = Items("wrong", style, ANSWER_REGION), (style, ANSWER_REGION)
    if _pooled(states, source):
        rows = [row for row in states.rows if row in states.tables[style] and (style, row) in answers]
        rows = sorted(states.known(source, rows))
        labels = [int(answers.right(style, row) == 0) for row in rows]
        items.add(source, rows, labels, [style] * len(rows))
    return items


def flipped_items(states: States, style: str, answers: Answers) -> Items:
    """Whether the answer is wrong (1), on the rows whose clean answer is right and whose text the style changes."""
    items, source = Items("flipped", style, ANSWER_REGION), (style, ANSWER_REGION)
    if _pooled(states, source):
        rows = sorted(states.known(source, states.common(style)))
        flips = answers.flips(style, states.clean, np.array(rows, dtype=np.int64))
        known = [(row, int(flip)) for row, flip in zip(rows, flips, strict=True) if not np.isnan(flip)]
        items.add(source, [row for row, _ in known], [flip for _, flip in known], [style] * len(known))
    return items


def _pooled(states: States, *sources: Source) -> bool:
    return all(region in states.tables[style].regions() for style, region in sources)


def all_items(states: States, args: argparse.Namespace, answers: Answers | None) -> Iterator[Items]:
    """The items of every probe that was asked for."""
    styles = [style for style in states.tables if style != states.clean]
    typos = [style for style in styles if _is_typo(states.run, style, args.typo_styles)]
    for region in args.regions:
        if "typo" in args.targets:
            yield from (typo_items(states, [style], region, style) for style in styles)
            yield typo_items(states, typos, region, ALL_TYPOS)
        if "typo_vs_split" in args.targets:
            yield split_items(states, typos, region)
        if "style" in args.targets:
            yield style_items(states, [style for style in styles if matched_style(style) is None], region)
    if answers is not None and "wrong" in args.targets:
        yield from (wrong_items(states, style, answers) for style in (states.clean, *styles) if not is_control(style))
    if answers is not None and "flipped" in args.targets:
        yield from (flipped_items(states, style, answers) for style in styles if not is_control(style))


def _is_typo(run: Run, style: str, chosen: Sequence[str] | None) -> bool:
    """Whether a style is a typo: one of those chosen, else one of TYPO_STYLES or one that has its own control."""
    return style in (chosen or TYPO_STYLES) or (chosen is None and f"{MATCHED}{style}" in run.styles)


# --- probing


@dataclass
class Probe:
    """One probe at every layer: its items as arrays, folds [n] that are the same in every layer."""

    items: Items
    labels: np.ndarray
    clusters: np.ndarray
    twins: np.ndarray
    folds: np.ndarray
    baseline: Auc | None = None


def why_not(items: Items, states: States) -> str:
    """Why these items cannot be probed, in a few words; "" if they can."""
    labels, templates = np.array(items.labels), np.array([states.run.template(row) for row in items.rows])
    if not items.labels:
        return {
            "typo": "no row whose clean form and style both have states of the region",
            "typo_vs_split": "no typo style has a control here; run stage 2 with --prompt_keys split@<style>",
            "style": "no style has states of the region",
        }.get(items.target, "no answer of the style is in maths_items.csv, or its states are not there")
    if (classes := len(np.unique(labels))) < 2:
        return "there is one style only" if items.target == "style" else "the answers are all right, or all wrong"
    if min(len(np.unique(templates[labels == kind])) for kind in np.unique(labels)) < MIN_CLUSTERS:
        return f"fewer than {MIN_CLUSTERS} templates in one of the {classes} classes"
    return ""


def plan_probe(items: Items, states: States, folds: int, seed: int) -> Probe | None:
    """Cut the items into folds; None for items that cannot be probed (`why_not`)."""
    from sklearn.model_selection import StratifiedGroupKFold

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
    baseline, _ = probe_auc(states.counts(items).astype(np.float32), labels, numbers, clusters, BASELINE_C)
    return Probe(items, labels, clusters, twins, numbers, baseline)


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
    from attention.grouped_auc import fold_auc, macro_auc
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits

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
    """One line of the table: the probe and its control at one layer."""
    features = states.features(probe.items, layer)
    name = zlib.crc32(
        f"{probe.items.target} {probe.items.style} {probe.items.region}".encode("utf-8", "backslashreplace")
    )
    rng = np.random.default_rng([args.seed, layer, name])  # each probe its own shuffle, or all controls move together
    shuffled = shuffled_within(probe.labels, probe.twins, rng)
    own, converged = probe_auc(features, probe.labels, probe.folds, probe.clusters, args.C, args.max_iter)
    control, _ = probe_auc(features, shuffled, probe.folds, probe.clusters, args.C, args.max_iter)
    items = probe.items
    line: dict[str, Any] = {"style": items.style, "layer": layer, "region": items.region, "target": items.target}
    line |= {"n": len(probe.labels), "n_positive": int((probe.labels == 1).sum()) if items.target != "style" else ""}
    line |= {"n_clusters": len(np.unique(probe.clusters)), "n_classes": int(probe.labels.max()) + 1}
    line |= {"n_folds": int(probe.folds.max()) + 1, "converged": int(converged), "auc": own.auc}
    line |= {"ci_low": own.ci_low, "ci_high": own.ci_high, "p": own.p, "control_auc": control.auc}
    line |= {"control_ci_low": control.ci_low, "control_ci_high": control.ci_high}
    base = probe.baseline
    return line | (
        {"baseline_auc": base.auc, "baseline_ci_low": base.ci_low, "baseline_ci_high": base.ci_high} if base else {}
    )


# --- script


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__)
    data = parser.add_argument_group("data")
    data.add_argument("--run_dir", type=Path, required=True, help="run folder of stage 2")
    data.add_argument("--results_dir", type=Path, help="where to write; default: results/<run name>")
    data.add_argument("--styles", nargs="+", help="styles to probe beside the clean form; default: all")
    data.add_argument("--max_samples", type=int, help="first rows of the prompt file only")
    data.add_argument("--max_rows", type=int, default=1000, help="rows to probe, at most (a random choice)")
    data.add_argument("--maths_items", type=Path, help="maths_items.csv of stage 3, for the targets wrong and flipped")
    probes = parser.add_argument_group("probes")
    probes.add_argument("--targets", nargs="+", choices=TARGETS, default=TARGETS, help="what to probe for")
    probes.add_argument("--typo_styles", nargs="+", metavar="STYLE", help="styles that count as typos; default: "
                        f"{' '.join(TYPO_STYLES)} and all with a split@<style>")  # fmt: skip
    probes.add_argument("--regions", nargs="+", default=["edited", "last"], help="pooled regions to probe")
    probes.add_argument("--layers", nargs="+", type=int, help="layers, 0 = embeddings; default: all")
    probes.add_argument("--folds", type=int, default=5, help="folds of the cross-validation")
    probes.add_argument("--C", type=float, default=0.01, help="inverse of the L2 penalty, on scaled features")
    probes.add_argument("--max_iter", type=int, default=300, help="iterations of the solver, at most")
    probes.add_argument("--seed", type=int, default=0, help="of the rows, the folds and the shuffled labels")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Fit the probes of a run layer by layer; write the table and the picture."""
    args = parse_args(argv)
    log, run = get_logger(), open_run(args.run_dir)
    folder = args.results_dir or Path("results") / run.name
    states = open_states(run, args)
    items = list(all_items(states, args, _answers(args, folder)))
    planned = [probe for one in items if (probe := plan_probe(one, states, args.folds, args.seed)) is not None]
    for line in not_probed(items, states):
        log.warning(line)
    if not planned:
        raise UserError(f"{run.path}: too few rows or templates for any probe; run stage 2 on more prompts")
    table = fit_all(planned, states, args)
    write_csv(folder / "probe_layers.csv", table)
    if stopped := int((table["converged"] == 0).sum()):
        log.warning(f"{stopped} probes stopped at --max_iter {args.max_iter}; see the column converged")
    from attention.layer_curves import plot_probes

    plot_probes(table, folder / "probe_layers.png")
    log.info(f"wrote {folder}/probe_layers.csv and .png")
    return 0


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


def fit_all(probes: list[Probe], states: States, args: argparse.Namespace) -> pd.DataFrame:
    """Every probe at every layer, with p values adjusted over the lines of a target."""
    import pandas as pd
    from paired_stats import benjamini_hochberg
    from tqdm import tqdm

    layers = list(range(states.layers())) if args.layers is None else args.layers
    if wrong := [layer for layer in layers if not 0 <= layer < states.layers()]:
        raise UserError(f"--layers {wrong[0]}: the run has layers 0 to {states.layers() - 1}")
    started = time.monotonic()
    lines = [probe_line(probe, states, layer, args) for layer in tqdm(layers, desc="layer") for probe in probes]
    table = pd.DataFrame(lines)
    adjusted = table.groupby("target")["p"].transform(benjamini_hochberg)
    table.insert(int(table.columns.get_indexer(["p"])[0]) + 1, "p_adjusted", adjusted)
    get_logger().debug(f"{len(lines)} probes with their controls in {time.monotonic() - started:.0f} s")
    return table


def open_states(run: Run, args: argparse.Namespace) -> States:
    """The run, opened and checked; the rows to probe. Raises UserError where it holds nothing to probe."""
    clean, styles = clean_and_styles(run, args.styles)
    warn_unfinished(run, args.styles, args.max_samples)
    if args.folds < 2:
        raise UserError(f"--folds {args.folds}: at least 2 are needed")
    tables = {style: StyleRows(run, style, args.max_samples, max_open=sys.maxsize) for style in (clean, *styles)}
    if missing := [style for style, table in tables.items() if not table.has("hidden_pooled")]:
        raise UserError(f"{run.styles[missing[0]]}: no hidden_pooled in its files; run stage 2 again with pooling on")
    pooled = set(tables[clean].regions()) | {"edited"}
    if unknown := [region for region in args.regions if region not in pooled]:
        raise UserError(f"--regions {unknown[0]}: not pooled in this run; it has {', '.join(sorted(pooled))}")
    tell_controls(run, styles)
    rows = tables[clean].indices
    chosen = np.random.default_rng(args.seed).permutation(len(rows))[: args.max_rows]
    return States(run, clean, tables, [rows[place] for place in sorted(chosen)])


def _answers(args: argparse.Namespace, folder: Path) -> Answers | None:
    if not {"wrong", "flipped"} & {*args.targets}:
        return None
    if (answers := open_answers(args.maths_items, folder)) is None:
        get_logger().info(
            f"no {folder}/maths_items.csv: without the targets wrong and flipped (run stage 3, or --maths_items)"
        )
    return answers


if __name__ == "__main__":
    run_main(main)
