"""AUC of out-of-fold scores with a clustered interval."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import stats
from scipy.stats import rankdata


class Auc(NamedTuple):
    """AUC, its 95 % interval, and p of the one-sided test of AUC > 0.5 (NaN where it cannot be had).

    One-sided, for a probe that is worse than chance knows nothing: held-out folds lean that way when rows are few.
    """

    auc: float
    ci_low: float
    ci_high: float
    p: float


def fold_auc(labels: np.ndarray, scores: np.ndarray, folds: np.ndarray, clusters: np.ndarray) -> Auc:
    """AUC over the pairs (positive, negative) of the same fold; labels [n] of 0 and 1, ties count half.

    Pairs across folds are left out: each fold's probe has its own zero, and under the null scores of different folds
    would make the AUC fall below 0.5. The standard error is that of clustered ROC data (Obuchowski 1997: DeLong's
    placement values, from the AUC over all folds, summed within clusters; a cluster lies in one fold), enlarged as in
    `cross_validation_factor`; t has one degree of freedom less than the rarer class has clusters. The interval is on
    the logit scale, and p from the same scale, so that the two agree. With every pair in the right order there is no
    variance: then the lower end is the exact binomial one, a cluster of the rarer class being one trial (fewer, by the
    same factor).
    """
    auc, influence = placement_influence(labels, scores, folds)
    if np.isnan(auc):
        return Auc(*[float("nan")] * 4)
    _, slots = np.unique(clusters, return_inverse=True)
    totals = np.bincount(slots, weights=influence)
    least = _least_clusters(labels, clusters)
    if least < 2:
        return Auc(auc, float("nan"), float("nan"), float("nan"))
    factor = cross_validation_factor(folds)
    error = float(np.sqrt(factor * least / (least - 1) * (totals**2).sum()))
    if error == 0 and 0 < auc < 1:  # nothing but ties: no variance to go by
        return Auc(auc, float("nan"), float("nan"), float("nan"))
    if error == 0 or min(auc, 1 - auc) < 1e-9:
        trials = max(1, int(least / factor))
        exact = stats.binomtest(trials if auc > 0.5 else 0, trials).proportion_ci()
        p = 0.5**trials if auc > 0.5 else 1.0
        return Auc(auc, float(exact.low), float(exact.high), p)
    logit, spread = np.log(auc / (1 - auc)), error / (auc * (1 - auc))
    quantile = stats.t.ppf(0.975, least - 1)
    low, high = (float(1 / (1 + np.exp(-(logit + side * quantile * spread)))) for side in (-1, 1))
    return Auc(auc, low, high, float(stats.t.sf(logit / spread, least - 1)))


def macro_auc(labels: np.ndarray, scores: np.ndarray, folds: np.ndarray, clusters: np.ndarray) -> Auc:
    """Mean over classes of the one-against-rest `fold_auc`; labels [n] of 0 … K-1, scores [n, K]."""
    parts = [placement_influence(labels == k, scores[:, k], folds) for k in range(scores.shape[1])]
    auc = float(np.mean([value for value, _ in parts]))
    _, slots = np.unique(clusters, return_inverse=True)
    totals = np.bincount(slots, weights=np.mean([influence for _, influence in parts], axis=0))
    least = _least_clusters(labels, clusters)
    if least < 2 or np.isnan(auc):
        return Auc(auc, float("nan"), float("nan"), float("nan"))
    error = float(np.sqrt(cross_validation_factor(folds) * least / (least - 1) * (totals**2).sum()))
    half = stats.t.ppf(0.975, least - 1) * error
    p = float(stats.t.sf((auc - 0.5) / error, least - 1)) if error > 0 else float("nan")
    return Auc(auc, max(0.0, auc - half), min(1.0, auc + half), p)


def _least_clusters(labels: np.ndarray, clusters: np.ndarray) -> int:
    """Clusters of the class that has the fewest: a few positives among many negatives are few observations."""
    return min(len(np.unique(clusters[labels == kind])) for kind in np.unique(labels))


def cross_validation_factor(folds: np.ndarray) -> float:
    """How much larger the variance is than the test items alone make it: 1 + k / (k - 1) with k folds.

    The folds' probes share most of their training rows, so their errors go together (Nadeau and Bengio 2003, whose
    correction this is). With permuted answers and real states (300 prompts, SmolLM2, layer 20) a test at 0.05 called
    noise a finding in 3 to 5 % of 150 draws, without the correction in 12 to 13 %.
    """
    count = len(np.unique(folds))
    return 1 + count / (count - 1) if count > 1 else 1.0


def placement_influence(labels: np.ndarray, scores: np.ndarray, folds: np.ndarray) -> tuple[float, np.ndarray]:
    """(AUC over within-fold pairs, what each item's sampling adds to its error [n]); NaN without a pair."""
    labels = np.asarray(labels, dtype=bool)
    influence, parts = np.zeros(len(labels)), []
    for fold in np.unique(folds):
        here = np.flatnonzero(folds == fold)
        positive, negative = here[labels[here]], here[~labels[here]]
        if not len(positive) or not len(negative):
            continue
        ranks = rankdata(scores[np.concatenate([positive, negative])])
        split = len(positive)
        above = (ranks[:split] - rankdata(scores[positive])) / len(negative)  # share of negatives below each positive
        below = 1 - (ranks[split:] - rankdata(scores[negative])) / len(positive)
        parts.append((positive, negative, above, below))
    if not parts:
        return float("nan"), influence
    pairs = sum(len(positive) * len(negative) for positive, negative, _, _ in parts)
    auc = sum(len(negative) * float(above.sum()) for _, negative, above, _ in parts) / pairs
    for positive, negative, above, below in parts:
        # From the AUC over all folds: from the fold's own, a positive that is alone in its fold would have no error.
        influence[positive] = len(negative) * (above - auc) / pairs
        influence[negative] = len(positive) * (below - auc) / pairs
    return auc, influence
