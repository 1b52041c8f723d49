"""Paired, clustered comparison of prompt styles on whole arrays: intervals, tests, corrections and power.

Every style is compared with the clean form on the same rows: d = value(style) - value(clean). Rows made from one
template form a cluster; a row without a template is a cluster of its own. Standard errors are the jackknife's over
clusters with Satterthwaite's degrees of freedom (formulas and calibration: docs/METHODS.md). A number that cannot be
estimated (no rows, one cluster, differences that do not vary) is NaN.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower
from statsmodels.stats.proportion import proportion_confint
from style_names import is_again, is_variant

CONFIDENCE = 0.95
BLOCK_NUMBERS = 2_000_000  # rows x cells handled at once: 16 MB an array
ZERO_VARIANCE = 1e-12  # a standard error below this share of the mean |value| is rounding, not variation


class Estimate(NamedTuple):
    """A mean, its clustered interval and two-sided t test against 0; floats, or arrays of one shape."""

    mean: Any
    standard_error: Any
    ci_low: Any
    ci_high: Any
    t: Any
    p: Any
    df: Any
    n: Any
    n_clusters: Any

    def columns(self, name: str, ends: str) -> dict[str, Any]:
        """The mean and its interval as columns of a table: `name`, `<ends>_low`, `<ends>_high`."""
        return {name: self.mean, f"{ends}_low": self.ci_low, f"{ends}_high": self.ci_high}

    def within(self, low: Any, high: Any) -> Estimate:
        """The same with its interval cut to the range of what is measured."""
        return self._replace(ci_low=np.clip(self.ci_low, low, high), ci_high=np.clip(self.ci_high, low, high))


class McNemar(NamedTuple):
    """Discordant pairs and the exact two-sided p value."""

    p: float
    right_to_wrong: int
    wrong_to_right: int
    n: int


# --- means and differences


def clustered_mean(values: Any, clusters: Iterable[Hashable] | None = None) -> Estimate:
    """Mean over rows with a cluster-robust 95 % interval, cell by cell.

    values: [n] or [n, *cells], e.g. differences per layer and head [n, L, H]; NaN: this row lacks this cell.
    clusters: n labels; None, or a label that is None or NaN, makes a row its own cluster.
    Returns floats for [n], else arrays [*cells]. ValueError if lengths differ or a value is infinite.
    """
    array = np.asarray(values)
    array = array if array.dtype == np.float32 else array.astype(np.float64)
    if np.isinf(array).any():
        raise ValueError("infinite value among the differences; drop or correct that row first")
    cells = array.shape[1:]
    flat = array.reshape(len(array), math.prod(cells))
    codes = cluster_codes(len(array), clusters)
    order = np.argsort(codes, kind="stable")
    starts = np.flatnonzero(np.diff(codes[order], prepend=-1))
    step = max(1, BLOCK_NUMBERS // max(1, len(flat)))
    blocks = [flat[:, start : start + step] for start in range(0, flat.shape[1], step)]
    parts = [_estimate(block[order].astype(np.float64), starts) for block in blocks]
    fields = [np.concatenate(field).reshape(cells) for field in zip(*parts, strict=True)] if parts else []
    fields = fields or [np.zeros(cells)] * len(Estimate._fields)
    if not cells:
        numbers = [field.item() for field in fields]
        return Estimate._make([*numbers[:7], int(numbers[7]), int(numbers[8])])
    return Estimate._make([*fields[:7], fields[7].astype(int), fields[8].astype(int)])


def _estimate(values: np.ndarray, starts: np.ndarray) -> list[np.ndarray]:
    """The fields of Estimate for K cells: values [n, K] sorted by cluster (overwritten), starts: first row of each."""
    missing = np.isnan(values)
    known = ~missing if missing.any() else np.ones((len(values), 1), dtype=bool)
    values[missing] = 0
    sums, counts = (
        np.add.reduceat(part, starts, axis=0, dtype=np.float64) if len(starts) else part.astype(np.float64)
        for part in (values, known)
    )  # [C, K], [C, 1 or K]
    with np.errstate(divide="ignore", invalid="ignore"):
        n = counts.sum(axis=0)
        mean = sums.sum(axis=0) / n
        shift = (sums - counts * mean) / (n - counts)  # mean - mean without this cluster
        weight = counts / (n - counts)
        squares = (weight**2).sum(axis=0)
        df = weight.sum(axis=0) ** 2 / (squares + squares**2 - (weight**4).sum(axis=0))
        n_clusters = (counts > 0).sum(axis=0)
        error = np.sqrt((n_clusters - 1) / n_clusters * (shift**2).sum(axis=0))
        estimable = (n_clusters >= 2) & (error > ZERO_VARIANCE * np.abs(values).sum(axis=0) / n)
        error = np.where(estimable, error, np.nan)
        df = np.where(estimable, df, np.nan)
        t = mean / error
        half = stats.t.ppf((1 + CONFIDENCE) / 2, df) * error
        p = 2 * stats.t.sf(np.abs(t), df)
    fields = [mean, error, mean - half, mean + half, t, p, df, n, n_clusters]
    return [np.broadcast_to(field, mean.shape) for field in fields]


def paired_difference(variant: Any, clean: Any, clusters: Iterable[Hashable] | None = None) -> Estimate:
    """Clustered mean of variant - clean over the same rows; shapes as in `clustered_mean`."""
    variant, clean = np.asarray(variant, dtype=np.float64), np.asarray(clean, dtype=np.float64)
    if variant.shape != clean.shape:
        raise ValueError(f"variant has shape {variant.shape}, clean {clean.shape}: not the same rows")
    return clustered_mean(variant - clean, clusters)


def clustered_ratio(top: Any, bottom: Any, clusters: Iterable[Hashable] | None = None, log: bool = False) -> Estimate:
    """Ratio of sums, sum(top) / sum(bottom) over rows, with a cluster jackknife interval, cell by cell.

    top: [n] or [n, *cells]; bottom: of the same shape, or one that broadcasts to it. A row counts if both are known.
    The standard error is sqrt((C - 1) / C * sum_c (ratio without cluster c - ratio)^2), with `jackknife_df` degrees of
    freedom. t tests the ratio against 0. log: for values that are never negative, the same of the ratio's logarithm;
    t then tests the ratio against 1. Returns floats for [n], else arrays [*cells]. NaN with one cluster.
    """
    top = np.asarray(top, dtype=np.float64)
    bottom = np.broadcast_to(np.asarray(bottom, dtype=np.float64), top.shape)
    known = ~np.isnan(top + bottom)
    codes = cluster_codes(len(top), clusters)
    order = np.argsort(codes, kind="stable")
    starts = np.flatnonzero(np.diff(codes[order], prepend=-1))
    if not len(starts):
        empty = np.full(top.shape[1:], math.nan)
        return Estimate._make([*[empty] * 7, *[np.zeros(top.shape[1:], dtype=int)] * 2])

    def sums(values: np.ndarray) -> np.ndarray:  # [C, *cells]
        return np.add.reduceat(np.where(known, values, 0.0)[order], starts, axis=0)

    above, below, counts = sums(top), sums(bottom), sums(np.ones(top.shape))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = above.sum(axis=0) / below.sum(axis=0)
        without = (above.sum(axis=0) - above) / (below.sum(axis=0) - below)
        centre, others = (np.log(ratio), np.log(without)) if log else (ratio, without)
        n_clusters = (counts > 0).sum(axis=0)
        shift = np.where(counts > 0, others - centre, 0.0)
        error = np.sqrt((n_clusters - 1) / n_clusters * (shift**2).sum(axis=0))
        varies = np.isfinite(error) & (error > ZERO_VARIANCE * (1.0 if log else np.abs(ratio)))
        error = np.where((n_clusters >= 2) & varies, error, math.nan)
        t, df = centre / error, np.where(np.isnan(error), math.nan, jackknife_df(shift, counts > 0))
        half = stats.t.ppf((1 + CONFIDENCE) / 2, df) * error
        ends = (centre - half, centre + half)
        low, high = map(np.exp, ends) if log else ends
        error = error * ratio if log else error
    fields = [ratio, error, low, high, t, 2 * stats.t.sf(np.abs(t), df), df, counts.sum(axis=0)]
    found = Estimate._make([*fields, n_clusters])
    if top.ndim > 1:
        return found._replace(n=found.n.astype(int))
    return Estimate._make([*(float(field) for field in fields[:7]), int(fields[7]), int(n_clusters)])


def jackknife_df(shift: np.ndarray, present: Any = True) -> np.ndarray:
    """Degrees of freedom of a jackknife's variance, min(C - 1, 2 C / (kurtosis - 1)): few if few clusters make it.

    shift: [C, *cells] what leaving a cluster out changes; present: whether a cell has the cluster. Satterthwaite's rule
    for the sum of their squares, whose relative variance is (kurtosis - 1) / C.
    """
    present = np.broadcast_to(present, shift.shape)
    count = present.sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        away = np.where(present, shift - np.where(present, shift, 0.0).sum(axis=0) / count, 0.0)
        kurtosis = count * (away**4).sum(axis=0) / (away**2).sum(axis=0) ** 2
        return np.fmin(count - 1, 2 * count / np.maximum(kurtosis - 1, 0))


def cluster_codes(count: int, clusters: Iterable[Hashable] | None) -> np.ndarray:
    """[n] number of each row's cluster, from 0 in the order of their first rows; a row without a label is its own."""
    labels: list[Any] = [None] * count if clusters is None else list(clusters)
    if len(labels) != count:
        raise ValueError(f"{count} rows but {len(labels)} cluster labels")
    codes, names = pd.factorize(np.fromiter(labels, dtype=object, count=count))
    lonely = codes < 0  # None and NaN
    codes[lonely] = len(names) + np.arange(lonely.sum())
    return codes


def deal(labels: Iterable[str], groups: int, seed: int = 0) -> dict[str, int]:
    """Label -> its group of `groups`, as many labels in each (to one), dealt in the order of the labels' hashes.

    The same labels and seed give the same groups in every script; two seeds give unrelated ones.
    """

    def digest(label: str) -> bytes:
        return hashlib.sha256(f"{seed}/{label}".encode("utf-8", "backslashreplace")).digest()

    return {label: place % groups for place, label in enumerate(sorted(set(labels), key=digest))}


# --- tests that assume less


def exact_mcnemar(clean_right: Any, variant_right: Any) -> McNemar:
    """Exact McNemar test on paired right/wrong answers [n]; it takes rows as independent (no clusters).

    p is NaN without rows and 1 if no pair is discordant.
    """
    clean, variant = np.asarray(clean_right, dtype=bool), np.asarray(variant_right, dtype=bool)
    if clean.shape != variant.shape:
        raise ValueError(f"clean has shape {clean.shape}, variant {variant.shape}: not the same rows")
    if not clean.size:
        return McNemar(math.nan, 0, 0, 0)
    lost, won = int((clean & ~variant).sum()), int((~clean & variant).sum())
    p = float(mcnemar([[0, lost], [won, 0]], exact=True).pvalue) if lost + won else 1.0
    return McNemar(p, lost, won, int(clean.size))


def sign_flip_test(
    differences: Any, clusters: Iterable[Hashable] | None = None, n_resamples: int = 9999, seed: int = 0
) -> float:
    """Two-sided p value of the paired permutation test on differences [n]: whole clusters change their sign.

    Under the null a template's clean and style labels may be exchanged. All 2^C flips if they are at most
    n_resamples, else random ones. NaN with one cluster or if every cluster's sum is 0.
    """
    array = np.asarray(differences, dtype=np.float64)
    codes = cluster_codes(len(array), clusters)
    known = ~np.isnan(array)
    sums = np.bincount(codes[known], weights=array[known])[np.unique(codes[known])]
    if len(sums) < 2 or not np.any(sums):
        return math.nan
    sums = sums[sums != 0]  # a sum of 0 is the same whichever way it is flipped
    if len(sums) == 1:
        return 1.0
    result = stats.permutation_test(
        (sums,),
        np.sum,
        permutation_type="samples",
        vectorized=True,
        n_resamples=n_resamples,
        batch=max(1, BLOCK_NUMBERS // len(sums)),
        rng=np.random.default_rng(seed),
    )
    return float(result.pvalue)


# --- many comparisons


def holm(p_values: Any) -> np.ndarray:
    """Holm-adjusted p values, same shape; NaN stays NaN and is no comparison."""
    return _adjusted(p_values, "holm")


def benjamini_hochberg(p_values: Any) -> np.ndarray:
    """Benjamini-Hochberg adjusted p values (false discovery rate), same shape; NaN stays NaN and is no comparison."""
    return _adjusted(p_values, "fdr_bh")


def _adjusted(p_values: Any, method: str) -> np.ndarray:
    adjusted = np.array(p_values, dtype=np.float64)
    known = ~np.isnan(adjusted)
    if known.any():
        adjusted[known] = multipletests(adjusted[known], method=method)[1]
    return adjusted


# --- proportions and power


def wilson_interval(successes: float, n: float, design_effect: float = 1.0) -> tuple[float, float]:
    """Wilson 95 % interval of a proportion; a design effect above 1 shrinks n to n / design_effect."""
    if not n > 0:
        return math.nan, math.nan
    effective = n / max(1.0, design_effect)
    low, high = proportion_confint(successes * effective / n, effective, 1 - CONFIDENCE, method="wilson")
    return float(low), float(high)


def design_effect(right: Any, clusters: Iterable[Hashable] | None = None) -> float:
    """Clustered variance of a proportion over its binomial variance, at least 1; 1 if either cannot be estimated.

    right: [n] of 0 and 1 (or means of samples). 1 means that the rows carry n rows' worth of information.
    """
    estimate = clustered_mean(np.asarray(right, dtype=np.float64), clusters)
    binomial = estimate.mean * (1 - estimate.mean) / estimate.n if estimate.n else math.nan
    # Rows that are their own clusters leave the binomial interval as it is.
    if not binomial > 0 or math.isnan(estimate.standard_error) or estimate.n == estimate.n_clusters:
        return 1.0
    return max(1.0, estimate.standard_error**2 / binomial)


def minimum_detectable_effect(standard_error: float, df: float, comparisons: int = 1) -> float:
    """Smallest |true difference| that a two-sided t test at alpha 0.05 / comparisons finds with 80 % power.

    standard_error, df: of the paired difference (`Estimate`). Solves the noncentral t power equation (statsmodels
    TTestPower). NaN if the standard error or df is NaN.
    """
    if math.isnan(standard_error) or math.isnan(df):
        return math.nan
    nobs = df + 1  # the power of n differences depends on n only through df and sqrt(n) * effect
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no convergence at a df near 0: NaN below
        size = TTestPower().solve_power(nobs=nobs, alpha=0.05 / comparisons, power=0.8)
    # The solver may find the negative effect of the same power.
    return math.nan if size is None else abs(float(np.ravel(size)[0])) * math.sqrt(nobs) * standard_error


# --- tables

_DIFFERENCE_COLUMNS = [
    "difference",
    "difference_ci_low",
    "difference_ci_high",
    "minimum_detectable_difference",
    "p",
]
_SUMMARY_COLUMNS = [
    *("n", "n_missing", "n_paired", "n_identical", "n_clusters", "estimate", "ci_low", "ci_high"),
    *_DIFFERENCE_COLUMNS,
]


def paired_summary(
    items: pd.DataFrame,
    value_columns: str | Sequence[str],
    cluster: str | Mapping[Any, Hashable] | None = None,
    baseline: str = "normal",
    interval: Literal["t", "wilson"] = "t",
    adjust: bool = True,
    ranges: Mapping[str, tuple[float, float]] | None = None,
) -> pd.DataFrame:
    """One row per style (and per value column): estimate, paired difference to `baseline`, test, power.

    items: long table with `style` and `original_index`, one line per style x row (x sample: samples are averaged
    within a row first). A NaN value is missing. cluster: a column of items, or a mapping row -> cluster.
    interval: of the estimate, `t` (clustered mean) or `wilson` (proportions, rows taken as independent).
    ranges: (least, most) of a value column, if it has a range: intervals are cut to it, those of differences to what a
    difference of two such numbers can be.

    A row whose `prompt` equals the baseline's prompt of that row is counted in n_identical and left out of the
    paired difference (a boolean column `identical` overrides the comparison). The baseline comes first; its
    difference is NaN. p is the clustered t test's, p_adjusted `holm_over_styles` of one value column (adjust=False
    leaves it to the caller, for a wider family). minimum_detectable_difference: at 80 % power and alpha 0.05. With a
    list of value columns a column `measure` follows the style.
    """
    names = [value_columns] if isinstance(value_columns, str) else list(value_columns)
    if "identical" not in items:
        items = items.assign(identical=_equal_to_baseline(items, baseline))
    styles = sorted(pd.unique(items["style"]), key=lambda style: style != baseline)
    tables = []
    for name in names:
        rows = _row_means(items, name, cluster)
        limits = (ranges or {}).get(name, (-math.inf, math.inf))
        lines = [_style_line(rows, style, baseline, interval, limits) for style in styles]
        table = pd.DataFrame(lines, columns=["style", *_SUMMARY_COLUMNS])
        table["p_adjusted"] = holm_over_styles(table) if adjust else math.nan
        if not isinstance(value_columns, str):
            table.insert(1, "measure", name)
        tables.append(table)
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def holm_over_styles(table: pd.DataFrame, column: str = "p") -> pd.Series:
    """Holm-adjusted p values of a table with a column `style`.

    The styles that are ways to write the prompt are one family. Controls and repairs are another one, so a run with
    more of them leaves the styles' p_adjusted as it is. The clean form again has none: it is no effect, but noise.
    """
    p = table[column].mask(table["style"].map(is_again).astype(bool))
    return p.groupby(table["style"].map(lambda style: is_variant(style, None))).transform(holm)


def _equal_to_baseline(items: pd.DataFrame, baseline: str) -> Any:
    """True for each item of another style whose prompt equals the baseline's prompt of the same row."""
    if "prompt" not in items:
        return False
    clean = items[items["style"] == baseline].drop_duplicates("original_index").set_index("original_index")["prompt"]
    return (items["prompt"] == items["original_index"].map(clean)) & (items["style"] != baseline)


def _row_means(items: pd.DataFrame, value: str, cluster: str | Mapping[Any, Hashable] | None) -> pd.DataFrame:
    """One line per style x row: value (mean over samples), cluster, identical; indexed by (style, row)."""
    rows = items["original_index"]
    if cluster is None:
        labels = pd.Series([None] * len(items), index=items.index, dtype=object)
    else:
        labels = (items[cluster] if isinstance(cluster, str) else rows.map(cluster)).astype(object)
    # Numbers for labels, rows without one numbered on: quicker, and no label can clash with a row.
    codes, names = pd.factorize(labels)
    codes = np.where(codes >= 0, codes, len(names) + pd.factorize(rows)[0])
    lines = items[["style"]].assign(
        row=rows, value=items[value].astype(float), cluster=codes, identical=items["identical"].astype(bool)
    )
    return lines.groupby(["style", "row"], sort=False).agg(
        value=("value", "mean"), cluster=("cluster", "first"), identical=("identical", "first")
    )


def _style_line(
    rows: pd.DataFrame, style: str, baseline: str, interval: str, limits: tuple[float, float]
) -> dict[str, Any]:
    own = rows.xs(style, level="style")
    known = own[own["value"].notna()]
    mean = clustered_mean(known["value"], known["cluster"]).within(*limits)
    if interval == "wilson":
        low, high = wilson_interval(known["value"].sum(), len(known))
        mean = mean._replace(ci_low=low, ci_high=high)
    return {
        "style": style,
        "n": len(known),
        "n_missing": len(own) - len(known),
        "n_paired": 0,
        "n_identical": int(own["identical"].sum()),
        "n_clusters": mean.n_clusters,
        **mean.columns("estimate", "ci"),
        **_difference_fields(rows, known, style, baseline, limits[1] - limits[0]),
    }


def _difference_fields(
    rows: pd.DataFrame, known: pd.DataFrame, style: str, baseline: str, most: float
) -> dict[str, Any]:
    if style == baseline or baseline not in rows.index.get_level_values("style"):
        return dict.fromkeys(_DIFFERENCE_COLUMNS, math.nan)
    clean = rows.xs(baseline, level="style")["value"].dropna().rename("clean")
    pairs = known[~known["identical"]].join(clean, how="inner")
    change = paired_difference(pairs["value"], pairs["clean"], pairs["cluster"]).within(-most, most)
    return {
        "n_paired": change.n,
        "n_clusters": change.n_clusters,
        **change.columns("difference", "difference_ci"),
        "minimum_detectable_difference": minimum_detectable_effect(change.standard_error, change.df),
        "p": change.p,
    }
