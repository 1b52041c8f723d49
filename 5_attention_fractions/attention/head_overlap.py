"""Do styles share their heads, and does the ranking of heads repeat itself on other rows?

One style's effect comes from one half of the templates and the other's from the other half, so that no row is shared.
A style with itself, so compared, is its split-half reliability. Why: docs/METHODS.md, "Overlap".
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import stats

GROUPS = 32  # templates are dealt into so many groups, alike for every style
SPLITS = 24
MIN_GROUPS = 8
TOP_SHARE = 0.05


def group_sums(values: np.ndarray, codes: np.ndarray, groups: int) -> tuple[np.ndarray, np.ndarray]:
    """(sums, numbers) [G, *cells] of the values [n, *cells] in each group, codes [n] their groups; NaN is left out."""
    sums, counts = np.zeros((2, groups, *values.shape[1:]))
    order = np.argsort(codes, kind="stable")
    present, starts = np.unique(codes[order], return_index=True)
    if len(present):
        known = ~np.isnan(values)
        sums[present] = np.add.reduceat(np.where(known, values, 0)[order], starts, axis=0, dtype=np.float64)
        counts[present] = np.add.reduceat(known[order], starts, axis=0, dtype=np.float64)
    return sums, counts


@dataclass(frozen=True)
class Overlap:
    """Agreement of styles a and b across halves, arrays [n,n] over the styles; the diagonal is split-half reliability.

    spearman: mean over random splits of the rank correlation of the heads' mean differences; ci_low, ci_high: its
    95 % jackknife interval over groups of templates. top_overlap: share of the TOP_SHARE heads with the largest
    |mean difference| in one half that are among those of the other half.
    """

    spearman: np.ndarray
    ci_low: np.ndarray
    ci_high: np.ndarray
    top_overlap: np.ndarray
    top_count: int
    groups: int
    heads: int  # that are ranked


def cross_half(sums: np.ndarray, counts: np.ndarray, seed: int = 0) -> Overlap:
    """Overlap of n styles from their group sums [n,G,K] and row counts [n,G,K] over K heads.

    A head without a row in some half (its layer's window does not reach the word) is left out for all styles; a style
    without any such head is NaN. All NaN with fewer than MIN_GROUPS groups of templates or three heads.
    """
    styles, _, heads = sums.shape
    used = np.flatnonzero(counts.max(axis=(0, 2)) > 0)
    halves = []
    if len(used) >= MIN_GROUPS:
        for weights in _half_weights(len(used), seed):
            total, n = (np.einsum("tg,agk->tak", weights, part[:, used], optimize=True) for part in (sums, counts))
            with np.errstate(invalid="ignore", divide="ignore"):
                halves.append(total / n)  # mean differences [splits * (G+1), n, K]
        known = np.isfinite(halves[0]).all(axis=0) & np.isfinite(halves[1]).all(axis=0)  # [n,K]
        ranked = known[known.any(axis=1)].all(axis=0)
        halves, heads = [half[..., ranked] for half in halves], int(ranked.sum())
    top = max(1, round(TOP_SHARE * heads))
    nothing = np.full((styles, styles), np.nan)
    if not halves or heads < 3:
        return Overlap(nothing, nothing, nothing, nothing, top, len(used), heads)
    one, other = (_standardised_ranks(half) for half in halves)  # [splits * (G+1), n, K]
    r = np.einsum("tak,tbk->tab", one, other, optimize=True)
    r = ((r + r.swapaxes(1, 2)) / 2).reshape(SPLITS, len(used) + 1, styles, styles).mean(axis=0)
    z = np.arctanh(np.clip(r, -1 + 1e-12, 1 - 1e-12))
    deleted, count = z[1:], len(used)
    error = np.sqrt((count - 1) / count * ((deleted - deleted.mean(axis=0)) ** 2).sum(axis=0))
    half_width = stats.t.ppf(0.975, count - 1) * error
    whole = [half.reshape(SPLITS, count + 1, styles, heads)[:, 0] for half in halves]
    return Overlap(
        r[0],
        np.tanh(z[0] - half_width),
        np.tanh(z[0] + half_width),
        _top_overlap(whole[0], whole[1], top),
        top,
        len(used),
        heads,
    )


def _half_weights(groups: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """0/1 weights [SPLITS * (G+1), G] of the groups in the two halves: all of them, then each one left out."""
    rng = np.random.default_rng(seed)
    left = np.zeros((SPLITS, groups))
    for split in left:
        split[rng.permutation(groups)[: groups // 2]] = 1
    keep = np.concatenate([np.ones((1, groups)), 1 - np.eye(groups)])
    halves = [(half[:, None] * keep).reshape(-1, groups) for half in (left, 1 - left)]
    return halves[0], halves[1]


def _standardised_ranks(values: np.ndarray) -> np.ndarray:
    """Ranks over the last axis (ties share theirs), centred and of length 1, so that a dot product is Spearman's r."""
    ranks = stats.rankdata(values, axis=-1, nan_policy="propagate")
    ranks = ranks - ranks.mean(axis=-1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        return ranks / np.linalg.norm(ranks, axis=-1, keepdims=True)


def _top_overlap(one: np.ndarray, other: np.ndarray, top: int) -> np.ndarray:
    """Mean share [n,n] of the `top` heads of one half [SPLITS,n,K] that are among those of the other."""
    among = []
    for half in (one, other):
        best = np.argpartition(-np.abs(np.nan_to_num(half)), top - 1, axis=-1)[..., :top]
        among.append(np.zeros(half.shape))
        np.put_along_axis(among[-1], best, 1.0, axis=-1)
    share = np.einsum("sak,sbk->ab", among[0], among[1], optimize=True) / (top * len(one))
    share = (share + share.T) / 2
    known = np.isfinite(one).all(axis=(0, 2)) & np.isfinite(other).all(axis=(0, 2))
    return np.where(known[:, None] & known, share, np.nan)
