"""Paired, clustered comparison of prompt styles: intervals, tests, corrections and power.

Every style is compared with `normal` on the same rows: d = value(style) - value(normal). Rows made from
one template share their fate, so they form a cluster; a row without a template is a cluster of its own.

The standard error of a mean is that of the jackknife over clusters (CR3; MacKinnon, Nielsen and Webb 2023),
    SE = sqrt((C - 1) / C * sum_c (mean without cluster c - mean)^2),
and t has Satterthwaite's degrees of freedom for it (Bell and McCaffrey 2002; Hansen 2024). Where all C clusters
are of one size this is exactly sqrt(C / (C - 1) * sum_c (sum_{i in c} (d_i - mean))^2) / n with C - 1 degrees of
freedom, and where every row is its own cluster it is the ordinary paired t test. The correction matters where
sizes differ: with 50 clusters of 1 to 45 rows that simple formula rejected a true null in 5.4 to 6.5 % of simulated
data sets, the jackknife in 5.0 to 5.3 %. With about 10 clusters of very unequal size it rejected in 2.4 to 5.7 %: it
errs on the careful side. With one cluster there is no test.

What cannot be estimated (no rows, one cluster, differences that do not vary) is NaN, never a made-up p value.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

CONFIDENCE = 0.95
ALPHA = 0.05
POWER = 0.8
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


class McNemar(NamedTuple):
    """Discordant pairs and the exact two-sided p value."""

    p: float
    right_to_wrong: int
    wrong_to_right: int
    n: int


# --- means and differences


def clustered_mean(values: Any, clusters: Iterable[Hashable] | None = None, confidence: float = CONFIDENCE) -> Estimate:
    """Mean over rows with a cluster-robust interval, cell by cell.

    values: [n] or [n, *cells], e.g. differences per layer and head [n, L, H]; NaN = this row lacks this cell.
    clusters: n labels; None, or a label that is None or NaN, makes a row its own cluster.
    Returns floats for [n], else arrays [*cells]. ValueError where lengths differ or a value is infinite.
    """
    rows = RowValues(np.shape(values)[1:])
    rows.add(values, clusters)
    return rows.finish(confidence)


def paired_difference(
    variant: Any, clean: Any, clusters: Iterable[Hashable] | None = None, confidence: float = CONFIDENCE
) -> Estimate:
    """Clustered mean of variant - clean over the same rows; shapes as in `clustered_mean`."""
    variant, clean = np.asarray(variant, dtype=np.float64), np.asarray(clean, dtype=np.float64)
    if variant.shape != clean.shape:
        raise ValueError(f"variant has shape {variant.shape}, clean {clean.shape}: not the same rows")
    return clustered_mean(variant - clean, clusters, confidence)


class RowValues:
    """`clustered_mean` of rows that come in batches: memory is rows x cells x 4 bytes if the values are float32.

    cells: the shape of one row's values. Each template is a cluster of its own, however many there are.
    """

    def __init__(self, cells: Sequence[int]) -> None:
        self._cells = tuple(cells)
        self._batches: list[np.ndarray] = []  # [b, K] each
        self._labels: list[Hashable] = []

    def add(self, values: Any, clusters: Iterable[Hashable] | None = None) -> None:
        """Add rows: values [b, *cells] and their b cluster labels, as in `clustered_mean`."""
        array = np.asarray(values)
        array = array if array.dtype == np.float32 else array.astype(np.float64)
        if array.shape[1:] != self._cells:
            raise ValueError(f"values of shape {array.shape[1:]}, not {self._cells}")
        if np.isinf(array).any():
            raise ValueError("infinite value among the differences; drop or correct that row first")
        self._labels += _labels(len(array), clusters, len(self._labels))
        self._batches.append(array.reshape(len(array), math.prod(self._cells)))

    def blocks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """(cells of the flattened shape, their values [n, k] in float64), some cells at a time."""
        width, rows = math.prod(self._cells), len(self._labels)
        step = max(1, BLOCK_NUMBERS // max(1, rows))
        for start in range(0, width, step):
            block = slice(start, start + step)
            parts = [batch[:, block] for batch in self._batches]
            yield block, np.concatenate(parts, dtype=np.float64) if parts else np.zeros((0, min(step, width - start)))

    def finish(self, confidence: float = CONFIDENCE) -> Estimate:
        """Estimate over all rows so far: arrays [*cells], or floats if a row is one number."""
        codes = _codes(self._labels)
        order = np.argsort(codes, kind="stable")
        starts = np.flatnonzero(np.diff(codes[order], prepend=-1))
        parts = []
        for _, values in self.blocks():
            missing = np.isnan(values)
            ones = ~missing if missing.any() else np.ones((len(values), 1))
            values[missing] = 0
            sums, counts = (_group_sums(array, order, starts) for array in (values, ones))
            parts.append(_estimate(sums, counts, np.abs(values).sum(axis=0), confidence))
        joined = [np.concatenate(field).reshape(self._cells) for field in zip(*parts, strict=True)] if parts else []
        joined = joined or [np.zeros(self._cells)] * len(Estimate._fields)
        if not self._cells:
            numbers = [field.item() for field in joined]
            return Estimate._make([*numbers[:7], int(numbers[7]), int(numbers[8])])
        return Estimate._make([*joined[:7], joined[7].astype(int), joined[8].astype(int)])


def deal(labels: Iterable[str], groups: int, seed: int = 0) -> dict[str, int]:
    """Label -> its group of `groups`, as many labels in each (to one), dealt in the order of the labels' hashes.

    The same labels and seed give the same groups in every script; two seeds give unrelated ones.
    """

    def digest(label: str) -> bytes:
        return hashlib.sha256(f"{seed}/{label}".encode("utf-8", "backslashreplace")).digest()

    return {label: place % groups for place, label in enumerate(sorted(set(labels), key=digest))}


def _labels(count: int, clusters: Iterable[Hashable] | None, first_row: int = 0) -> list[Hashable]:
    """One label per row; rows without one get a label of their own."""
    labels: list[Any] = [None] * count if clusters is None else list(clusters)
    if len(labels) != count:
        raise ValueError(f"{count} rows but {len(labels)} cluster labels")
    if labels and getattr(getattr(clusters, "dtype", None), "kind", "O") in "iu":
        return labels
    # A NaN differs from itself; a tuple cannot clash with a template's name.
    return [("row", first_row + i) if label is None or label != label else label for i, label in enumerate(labels)]


def _codes(labels: Sequence[Hashable]) -> np.ndarray:
    """A number for each label, from 0 in the order of their first rows."""
    slots: dict[Hashable, int] = {}
    return np.array([slots.setdefault(label, len(slots)) for label in labels], dtype=np.intp)


def _group_sums(values: np.ndarray, order: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """[C, k] sums over the rows [n, k] of each cluster: `order` sorts rows by cluster, `starts` are its first ones."""
    return np.add.reduceat(values[order], starts, axis=0, dtype=np.float64) if len(starts) else values.astype(float)


def _estimate(sums: np.ndarray, counts: np.ndarray, absolute: np.ndarray, confidence: float) -> list[np.ndarray]:
    """The fields of Estimate for K cells: sums [C, K], rows in each cluster [C, 1 or K], absolute [K]."""
    from scipy import stats

    width = sums.shape[1]
    with np.errstate(divide="ignore", invalid="ignore"):
        n = counts.sum(axis=0)
        mean = sums.sum(axis=0) / n
        shift = (sums - counts * mean) / (n - counts)  # mean - mean without this cluster
        weight = counts / (n - counts)
        squares = (weight**2).sum(axis=0)
        df = weight.sum(axis=0) ** 2 / (squares + squares**2 - (weight**4).sum(axis=0))
        n_clusters = (counts > 0).sum(axis=0)
        error = np.sqrt((n_clusters - 1) / n_clusters * (shift**2).sum(axis=0))
        known = (n_clusters >= 2) & (error > ZERO_VARIANCE * absolute / n)
        error = np.where(known, error, np.nan)
        df = np.where(known, df, np.nan)
        t = mean / error
        half = stats.t.ppf((1 + confidence) / 2, df) * error
        p = 2 * stats.t.sf(np.abs(t), df)
    fields = [mean, error, mean - half, mean + half, t, p, df, n, n_clusters]
    return [np.broadcast_to(field, (width,)) for field in fields]


# --- tests that assume less


def exact_mcnemar(clean_right: Any, variant_right: Any) -> McNemar:
    """Exact McNemar test on paired right/wrong answers [n]; it takes rows as independent (no clusters).

    p is NaN without rows and 1 where no pair is discordant.
    """
    from statsmodels.stats.contingency_tables import mcnemar

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

    Under the null a template's `normal` and style labels may be exchanged. All 2^C flips where they are no
    more than n_resamples, else random ones. NaN with one cluster or where no cluster's sum differs from 0.
    """
    from scipy import stats

    sums, _ = _cluster_totals(differences, clusters)
    if len(sums) < 2 or not np.any(sums):
        return math.nan
    sums = sums[sums != 0]  # a sum of 0 is the same whichever way it is flipped
    if len(sums) == 1:
        return 1.0
    result = stats.permutation_test(
        (sums,), np.sum, permutation_type="samples", vectorized=True, n_resamples=n_resamples,
        batch=_batch(len(sums)), rng=np.random.default_rng(seed),
    )  # fmt: skip
    return float(result.pvalue)


def cluster_bootstrap(
    differences: Any,
    clusters: Iterable[Hashable] | None = None,
    n_resamples: int = 9999,
    confidence: float = CONFIDENCE,
    seed: int = 0,
    method: Literal["BCa", "percentile", "basic"] = "BCa",
) -> tuple[float, float]:
    """Bootstrap interval of the mean of differences [n], drawing whole clusters; NaN where undefined."""
    from scipy import stats

    sums, counts = _cluster_totals(differences, clusters)
    if len(sums) < 2 or np.ptp(sums / counts) <= ZERO_VARIANCE * np.abs(sums / counts).max():
        return math.nan, math.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a degenerate BCa interval is NaN, which says it already
        interval = stats.bootstrap(
            (sums, counts), _ratio, paired=True, vectorized=True, n_resamples=n_resamples,
            batch=_batch(len(sums)), confidence_level=confidence, method=method, rng=np.random.default_rng(seed),
        ).confidence_interval  # fmt: skip
    return float(interval.low), float(interval.high)


def _ratio(sums: np.ndarray, counts: np.ndarray, axis: int = -1) -> np.ndarray:
    return sums.sum(axis=axis) / counts.sum(axis=axis)


def _batch(n_clusters: int) -> int:
    return max(1, 2_000_000 // n_clusters)  # 16 MB of draws at a time


def _cluster_totals(values: Any, clusters: Iterable[Hashable] | None) -> tuple[np.ndarray, np.ndarray]:
    """Sum [C] and number of rows [C] of each cluster, NaN values left out."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise ValueError(f"differences must be [n], not of shape {array.shape}")
    known = ~np.isnan(array)
    labels = _labels(len(array), clusters)
    codes = _codes([label for label, use in zip(labels, known, strict=True) if use])
    if not len(codes):
        return np.zeros(0), np.zeros(0)
    return np.bincount(codes, weights=array[known]), np.bincount(codes).astype(float)


# --- many comparisons


def holm(p_values: Any) -> np.ndarray:
    """Holm-adjusted p values (statsmodels), same shape; NaN stays NaN and is no comparison."""
    from statsmodels.stats.multitest import multipletests

    return _adjusted(p_values, lambda known: multipletests(known, method="holm")[1])


def benjamini_hochberg(p_values: Any) -> np.ndarray:
    """Benjamini-Hochberg adjusted p values (false discovery rate, SciPy), same shape; NaN stays NaN."""
    from scipy.stats import false_discovery_control

    return _adjusted(p_values, false_discovery_control)


def _adjusted(p_values: Any, adjust: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    array = np.asarray(p_values, dtype=np.float64)
    adjusted = np.full(array.shape, np.nan)
    known = ~np.isnan(array)
    if known.any():
        adjusted[known] = adjust(array[known])
    return adjusted


# --- proportions and power


def wilson_interval(
    successes: float, n: float, confidence: float = CONFIDENCE, design_effect: float = 1.0
) -> tuple[float, float]:
    """Wilson interval of a proportion; a design effect above 1 shrinks n to n / design_effect."""
    from statsmodels.stats.proportion import proportion_confint

    if not n > 0:
        return math.nan, math.nan
    effective = n / max(1.0, design_effect)
    low, high = proportion_confint(successes * effective / n, effective, 1 - confidence, method="wilson")
    return float(low), float(high)


def design_effect(right: Any, clusters: Iterable[Hashable] | None = None) -> float:
    """Clustered variance of a proportion over its binomial variance, at least 1; 1 where neither can be had.

    right: [n] of 0 and 1 (or means of samples). 1 means that the rows carry n rows' worth of information.
    """
    estimate = clustered_mean(np.asarray(right, dtype=np.float64), clusters)
    binomial = estimate.mean * (1 - estimate.mean) / estimate.n if estimate.n else math.nan
    # Rows that are their own clusters leave the binomial interval as it is.
    if not binomial > 0 or math.isnan(estimate.standard_error) or estimate.n == estimate.n_clusters:
        return 1.0
    return max(1.0, estimate.standard_error**2 / binomial)


def minimum_detectable_effect(
    standard_error: Any, df: Any, alpha: float = ALPHA, power: float = POWER, comparisons: int = 1
) -> Any:
    """Smallest |true difference| that a two-sided t test at alpha / comparisons finds with this power.

    standard_error, df: of the paired difference (`Estimate`), scalars or arrays of one shape. Solves the
    noncentral t power equation (statsmodels TTestPower). NaN where the standard error or df is NaN.
    """
    from statsmodels.stats.power import TTestPower

    errors, freedom = np.broadcast_arrays(np.asarray(standard_error, float), np.asarray(df, float))
    factors = np.full(errors.shape, np.nan)
    for one_df in np.unique(freedom[~np.isnan(freedom)]):
        nobs = one_df + 1  # the power of n differences depends on n only through df and sqrt(n) * effect
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # no convergence at a df near 0: NaN below
            size = TTestPower().solve_power(nobs=nobs, alpha=alpha / comparisons, power=power)
        factors[freedom == one_df] = np.nan if size is None else np.ravel(size)[0] * math.sqrt(nobs)
    result = factors * errors
    return float(result) if result.ndim == 0 else result


# --- tables


def paired_summary(
    items: pd.DataFrame,
    value_columns: str | Sequence[str],
    style_column: str = "style",
    row_column: str = "original_index",
    cluster: str | Mapping[Any, Hashable] | None = None,
    baseline: str = "normal",
    interval: Literal["t", "wilson"] = "t",
    text_column: str = "prompt",
    adjust: bool = True,
) -> pd.DataFrame:
    """One row per style (and per value column): estimate, paired difference to `baseline`, test, power.

    items: long table, one line per style x row (x sample: samples are averaged within a row first). A NaN
    value is missing. cluster: a column of items, or a mapping row -> cluster; a row without one is its own.
    interval: of the estimate, `t` (clustered mean) or `wilson` (proportions, rows taken as independent).

    A row whose text in `text_column` equals the baseline's text of that row is counted in n_identical and left
    out of the paired difference (a boolean column `identical` does instead of the text). The baseline comes first;
    its difference is NaN. p is the clustered t test's, p_adjusted Holm's over the styles of one value column
    (adjust=False leaves it to the caller, for a wider family). minimum_detectable_difference: at 80 % power and alpha
    0.05. With a list of value columns a column `measure` follows the style.
    """
    import pandas as pd

    names = [value_columns] if isinstance(value_columns, str) else list(value_columns)
    frame = _with_identical(items, style_column, row_column, baseline, text_column)
    styles = [style for style in pd.unique(frame[style_column]) if style != baseline]
    if (frame[style_column] == baseline).any():
        styles.insert(0, baseline)
    tables = []
    for name in names:
        rows = _row_means(frame, name, style_column, row_column, cluster)
        lines = [_style_line(rows, style, baseline, interval) for style in styles]
        table = pd.DataFrame(lines, columns=["style", *_SUMMARY_COLUMNS])
        table = table.rename(columns={"style": style_column})
        table["p_adjusted"] = holm(table["p"]) if adjust else math.nan
        if not isinstance(value_columns, str):
            table.insert(1, "measure", name)
        tables.append(table)
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


_SUMMARY_COLUMNS = [
    "n", "n_missing", "n_paired", "n_identical", "n_clusters", "estimate", "ci_low", "ci_high", "difference",
    "difference_ci_low", "difference_ci_high", "minimum_detectable_difference", "p",
]  # fmt: skip


def mark_identical(
    items: pd.DataFrame,
    text_column: str = "prompt",
    style_column: str = "style",
    row_column: str = "original_index",
    baseline: str = "normal",
) -> pd.Series:
    """True for each item whose text equals the baseline's text of the same row; the baseline's are False."""
    clean = items[items[style_column] == baseline].drop_duplicates(row_column)
    clean = clean.set_index(row_column)[text_column]
    same = items[text_column] == items[row_column].map(clean)
    return same & (items[style_column] != baseline)


def _with_identical(
    items: pd.DataFrame, style_column: str, row_column: str, baseline: str, text_column: str
) -> pd.DataFrame:
    if "identical" in items.columns:
        return items
    if text_column in items.columns:
        return items.assign(identical=mark_identical(items, text_column, style_column, row_column, baseline))
    return items.assign(identical=False)


def _row_means(
    items: pd.DataFrame,
    value: str,
    style_column: str,
    row_column: str,
    cluster: str | Mapping[Any, Hashable] | None,
) -> pd.DataFrame:
    """One line per style x row: value (mean over samples), cluster, identical; indexed by (style, row)."""
    import pandas as pd

    rows = items[row_column]
    if cluster is None:
        labels = pd.Series([None] * len(items), index=items.index, dtype=object)
    elif isinstance(cluster, str):
        labels = items[cluster].astype(object)
    else:
        labels = rows.map(cluster).astype(object)
    # Numbers for labels, rows without one numbered on: quicker, and no label can clash with a row.
    codes, names = pd.factorize(labels)
    codes = np.where(codes >= 0, codes, len(names) + pd.factorize(rows)[0])
    lines = pd.DataFrame(
        {
            "style": items[style_column],
            "row": rows,
            "value": items[value].astype(float),
            "cluster": codes,
            "identical": items["identical"].astype(bool),
        }
    )
    return lines.groupby(["style", "row"], sort=False).agg(
        value=("value", "mean"), cluster=("cluster", "first"), identical=("identical", "first")
    )


def _style_line(rows: pd.DataFrame, style: str, baseline: str, interval: str) -> dict[str, Any]:
    own = rows.xs(style, level="style")
    known = own[own["value"].notna()]
    mean = clustered_mean(known["value"], known["cluster"])
    low, high = (mean.ci_low, mean.ci_high)
    if interval == "wilson":
        low, high = wilson_interval(known["value"].sum(), len(known))
    line = {
        "style": style,
        "n": len(known),
        "n_missing": len(own) - len(known),
        "n_paired": 0,
        "n_identical": int(own["identical"].sum()),
        "n_clusters": mean.n_clusters,
        "estimate": mean.mean,
        "ci_low": low,
        "ci_high": high,
    }
    return line | _difference_fields(rows, known, style, baseline)


def _difference_fields(rows: pd.DataFrame, known: pd.DataFrame, style: str, baseline: str) -> dict[str, Any]:
    absent = ["difference", "difference_ci_low", "difference_ci_high", "minimum_detectable_difference", "p"]
    if style == baseline or baseline not in rows.index.get_level_values("style"):
        return dict.fromkeys(absent, math.nan)
    clean = rows.xs(baseline, level="style")["value"].dropna().rename("clean")
    pairs = known[~known["identical"]].join(clean, how="inner")
    change = paired_difference(pairs["value"], pairs["clean"], pairs["cluster"])
    return {
        "n_paired": change.n,
        "n_clusters": change.n_clusters,
        "difference": change.mean,
        "difference_ci_low": change.ci_low,
        "difference_ci_high": change.ci_high,
        "minimum_detectable_difference": minimum_detectable_effect(change.standard_error, change.df),
        "p": change.p,
    }
