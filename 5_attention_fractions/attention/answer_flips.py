"""Does a change go with the answer flipping from right to wrong? Point-biserial correlation, clustered, streaming.

The size is Pearson's r, its interval from leaving out clusters. The test is Wilcoxon's rank-sum test, for it must hold
far out in the tail, where the correction over heads looks, and for changes of any shape: a t test of the covariance
named a head in 44 to 90 % of runs without any effect where changes were lognormal (1,000 rows, 270 heads, 20 to 100
flips), this one in at most 3.5 % of any kind of run that was tried (normal, lognormal, Cauchy, t with 2 degrees of
freedom, mostly zero; clustered or not; 200 runs each).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from command_line import UserError
from file_output import read_csv
from stamps import note_read

from attention.head_overlap import GroupSums

BLOCK_ROWS = 1024  # changes are ranked within blocks of so many rows, so that memory stays flat
BLOCK_CELLS = 512  # cells that are ranked at once
GROUPS = 256  # more clusters than this are dealt into so many groups of whole ones: five moments of each are kept
MIN_FLIPS = 5  # fewer flips (or fewer kept answers) say nothing about a correlation


class Answers:
    """Which answers are right, from the maths_items.csv of stage 3; of several samples, at least half must be.

    `correct` is True or False (1 or 0), empty for an answer that was not evaluated. UserError for anything else.
    """

    def __init__(self, path: Path) -> None:
        columns = ["style", "original_index", "correct"]
        table = read_csv(path, columns, "run stage 3 (evaluate_predictions.py) first")
        words = {"true": 1.0, "false": 0.0, "1": 1.0, "0": 0.0, "1.0": 1.0, "0.0": 0.0}
        known = table["correct"].astype(str).str.strip().str.lower().map(words)
        if len(odd := table.loc[table["correct"].notna() & known.isna(), "correct"]):
            raise UserError(f"{path}: correct is {odd.iloc[0]!r} in {len(odd)} lines; write True, False, or nothing")
        table["correct"] = known
        share = table.dropna(subset=["correct"]).groupby(["style", "original_index"])["correct"].mean()
        self._right = {(str(style), int(row)): float(value >= 0.5) for (style, row), value in share.items()}

    def __contains__(self, item: object) -> bool:
        return item in self._right

    def right(self, style: str, index: int) -> float:
        """1 or 0, NaN where the answer was not evaluated."""
        return self._right.get((style, index), np.nan)

    def flips(self, style: str, clean_style: str, indices: np.ndarray) -> np.ndarray:
        """[n]: 1 where the clean answer is right and the style's wrong, 0 where both are right, else NaN."""
        clean = np.array([self.right(clean_style, int(i)) for i in indices])
        own = np.array([self.right(style, int(i)) for i in indices])
        return np.where(clean == 1, 1 - own, np.nan)


def open_answers(path: Path | None, folder: Path) -> Answers | None:
    """The table that was asked for, else the results folder's own; None where neither is there."""
    items = path or folder / "maths_items.csv"
    note_read(items)
    return Answers(items) if path or items.is_file() else None


@dataclass(frozen=True)
class Association:
    """Arrays over the cells: correlation of change and flip with its interval, and the mean change on either side."""

    n: np.ndarray
    n_flipped: np.ndarray
    r: np.ndarray
    ci_low: np.ndarray
    ci_high: np.ndarray
    p: np.ndarray
    change_if_flipped: np.ndarray
    change_if_kept: np.ndarray


class FlipMoments:
    """Running moments of change and flip, cell by cell, in at most GROUPS groups of whole clusters."""

    def __init__(self, templates: Iterable[str]) -> None:
        self._groups = GroupSums(templates, GROUPS)  # of [5, *cells]: n, flips, change, change squared, change x flip
        self._ranks = RankTest(templates)

    def add(self, change: np.ndarray, flipped: np.ndarray, clusters: Sequence[str]) -> None:
        """Add changes [b, *cells] and flips [b]; NaN in either is left out."""
        self._ranks.add(change, flipped, clusters)
        flip = np.broadcast_to(flipped.reshape(-1, *[1] * (change.ndim - 1)), change.shape)
        known = ~np.isnan(change) & ~np.isnan(flip)
        change, flip = np.where(known, change, 0.0), np.where(known, flip, 0.0)
        self._groups.add(np.stack([known, flip, change, change**2, change * flip], axis=1), clusters)

    def finish(self) -> Association | None:
        """Point-biserial r with its interval and test; None without rows.

        r is Pearson's correlation of the change and the flip (0 or 1). The interval is Student's t on Fisher's
        z = artanh(r), its standard error from leaving out one group of clusters at a time. p: see RankTest. NaN with
        fewer than MIN_FLIPS flips or kept answers, or where the change does not vary.
        """
        from scipy import stats

        if self._groups.sums is None:
            return None
        moments = self._groups.sums[self._groups.sums[:, 0].reshape(GROUPS, -1).any(axis=1)]
        if not len(moments):
            return None
        total = moments.sum(axis=0)
        count, (n, flips, change, _, product) = len(moments), total
        z = np.arctanh(_correlation(total))
        with np.errstate(divide="ignore", invalid="ignore"):
            z = np.where((flips >= MIN_FLIPS) & (n - flips >= MIN_FLIPS), z, np.nan)
            left_out = np.stack([np.arctanh(_correlation(total - one)) for one in moments])
            error = np.sqrt((count - 1) / count * ((left_out - left_out.mean(axis=0)) ** 2).sum(axis=0))
            half = stats.t.ppf(0.975, count - 1) * error if count > 1 else np.full_like(z, np.nan)
            sides = product / flips, (change - product) / (n - flips)
        p = np.where(np.isnan(z), np.nan, self._ranks.p())
        whole = n.astype(int), np.rint(flips).astype(int)
        return Association(*whole, np.tanh(z), np.tanh(z - half), np.tanh(z + half), p, *sides)


class RankTest:
    """Wilcoxon's rank-sum test of change against flip, cell by cell, in blocks of BLOCK_ROWS rows (van Elteren 1960).

    Two standard errors, and the larger p counts: that of the clusters' shares of the statistic (a t test: rows of a
    template may be alike), and that of all orders of the rows (Pearson type III with the exact variance and skewness of
    the permutations: changes may be mostly ties, and then the clusters' own spread says too little).
    """

    def __init__(self, templates: Iterable[str]) -> None:
        self._shares = GroupSums(templates, GROUPS)
        self._moments: np.ndarray | None = None  # [2, *cells]: variance and third moment over all orders, summed
        self._changes: list[np.ndarray] = []
        self._flips: list[float] = []
        self._clusters: list[str] = []

    def add(self, change: np.ndarray, flipped: np.ndarray, clusters: Sequence[str]) -> None:
        """Add changes [b, *cells] and flips [b]; a NaN flip takes no part, nor a NaN change in its cell."""
        for place in np.flatnonzero(~np.isnan(flipped)):
            self._changes.append(change[place].astype(np.float32))  # a copy: the batch is let go
            self._flips.append(float(flipped[place]))
            self._clusters.append(clusters[int(place)])
            if len(self._flips) == BLOCK_ROWS:
                self._rank_block()

    def p(self) -> np.ndarray:
        """Two-sided p [*cells]; NaN where the change or the flip does not vary. Ends the test."""
        from scipy import stats

        if self._flips:
            self._rank_block()
        if self._moments is None:
            return np.array(np.nan)
        total, groups = self._shares.sums.sum(axis=0), (self._shares.counts > 0).sum(axis=0)
        variance, third = self._moments
        with np.errstate(divide="ignore", invalid="ignore"):
            spread = np.maximum((self._shares.sums**2).sum(axis=0) - total**2 / groups, 0) * groups / (groups - 1)
            clustered = 2 * stats.t.sf(np.abs(total) / np.sqrt(spread), groups - 1)
            skew, z = third / variance**1.5, total / np.sqrt(variance)
            one_side = np.minimum(stats.pearson3.sf(z, skew), stats.pearson3.cdf(z, skew))
        return np.maximum(clustered, np.minimum(1, 2 * one_side))

    def _rank_block(self) -> None:
        changes, flips = np.stack(self._changes), np.array(self._flips)
        flat = changes.reshape(len(flips), -1)
        shares, moments = np.empty(flat.shape), np.empty((2, flat.shape[1]))
        for start in range(0, flat.shape[1], BLOCK_CELLS):
            part = slice(start, start + BLOCK_CELLS)
            shares[:, part], moments[:, part] = _ranked_shares(flat[:, part], flips)
        self._shares.add(shares.reshape(changes.shape), self._clusters)
        summed = moments.reshape(2, *changes.shape[1:])
        self._moments = summed if self._moments is None else self._moments + summed
        self._changes, self._flips, self._clusters = [], [], []


def _ranked_shares(change: np.ndarray, flips: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(each row's share [b, K] of the rank statistic, its variance and third moment [2, K] over all orders).

    Ranks are centred and scaled to -1 to 1, flips centred; a share is their product, NaN where the change [b, K] is.
    """
    from scipy import stats

    known = ~np.isnan(change)
    n = known.sum(axis=0)
    ranks = stats.rankdata(np.where(known, change, np.inf), axis=0)  # the unknown come last and are left out
    with np.errstate(divide="ignore", invalid="ignore"):
        rank = np.where(known, (2 * ranks - n - 1) / n, 0.0)
        flip = np.where(known, flips[:, None] - np.where(known, flips[:, None], 0).sum(axis=0) / n, 0.0)
        variance = (rank**2).sum(axis=0) * (flip**2).sum(axis=0) / (n - 1)
        third = (rank**3).sum(axis=0) * (flip**3).sum(axis=0) * n / ((n - 1) * (n - 2))
    moments = np.stack([np.where(n > 1, variance, 0.0), np.where(n > 2, third, 0.0)])
    return np.where(known, rank * flip, np.nan), moments


def _correlation(moments: np.ndarray) -> np.ndarray:
    """Pearson's r from the moments [5, *cells]; NaN where either side does not vary."""
    n, flips, change, square, product = moments
    with np.errstate(divide="ignore", invalid="ignore"):
        spread = square / n - (change / n) ** 2
        spread = np.where(spread > 1e-12 * np.maximum(square / n, 1e-30), spread, np.nan)
        share = flips / n
        r = (product / n - change / n * share) / np.sqrt(spread * share * (1 - share))
        return np.where(np.isfinite(r), np.clip(r, -1 + 1e-12, 1 - 1e-12), np.nan)
