"""Does a change go with the answer flipping from right to wrong? Point-biserial correlation with a clustered rank test.

Why a rank test, and how often it errs: docs/METHODS.md, "Flips".
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from accuracy_tables import read_items
from answer_files import item_files
from command_line import UserError
from paired_stats import cluster_codes
from scipy import stats

from attention.head_overlap import group_sums

MIN_FLIPS = 5  # fewer flips (or fewer kept answers) say nothing about a correlation


class Answers:
    """Which answers are right, from maths_items.csv, answers_items.csv or both; of several samples, at least half.

    `correct` is True or False (1 or 0), empty for an answer that was not evaluated. UserError for anything else.
    """

    def __init__(self, *paths: Path) -> None:
        table = read_items(paths, ["style", "original_index", "correct"])
        words = {"true": 1.0, "false": 0.0, "1": 1.0, "0": 0.0, "1.0": 1.0, "0.0": 0.0}
        known = table["correct"].astype(str).str.strip().str.lower().map(words)
        if len(odd := table.loc[table["correct"].notna() & known.isna(), "correct"]):
            names = " and ".join(map(str, paths))
            raise UserError(f"{names}: correct is {odd.iloc[0]!r} in {len(odd)} lines; write True, False, or nothing")
        table["correct"] = known
        share = table.dropna(subset=["correct"]).groupby(["style", "original_index"])["correct"].mean()
        self._right = {(str(style), int(row)): float(value >= 0.5) for (style, row), value in share.items()}

    def __contains__(self, item: object) -> bool:
        return item in self._right

    def right(self, style: str, index: int) -> float:
        """1 or 0, NaN if the answer was not evaluated."""
        return self._right.get((style, index), np.nan)

    def flips(self, style: str, clean_style: str, indices: np.ndarray) -> np.ndarray:
        """[n]: 1 if the clean answer is right and the style's wrong, 0 if both are right, else NaN."""
        clean = np.array([self.right(clean_style, int(i)) for i in indices])
        own = np.array([self.right(style, int(i)) for i in indices])
        return np.where(clean == 1, 1 - own, np.nan)


def open_answers(path: Path | None, folder: Path) -> Answers | None:
    """The table that was asked for, else the results folder's own; None if there is neither."""
    files = item_files(folder) if path is None else [path]
    return Answers(*files) if files else None


def flip_association(change: np.ndarray, flipped: np.ndarray, clusters: Sequence[str]) -> dict[str, np.ndarray]:
    """{column: [*cells]}: point-biserial r of changes [n, *cells] and flips [n] (0 or 1), its interval and test, and
    the mean change on either side; NaN changes are left out.

    The interval is Student's t on Fisher's z = artanh(r), its standard error from leaving out one cluster at a time.
    p: see `rank_test`. NaN with fewer than MIN_FLIPS flips or kept answers, or if the change does not vary.
    """
    codes = cluster_codes(len(change), clusters)
    count = int(codes.max(initial=-1)) + 1
    flips = np.broadcast_to(flipped.reshape(-1, *[1] * (change.ndim - 1)), change.shape).astype(np.float64)
    known = ~np.isnan(change)
    values = np.where(known, change, 0).astype(np.float64)
    flips = np.where(known, flips, 0)
    parts = np.stack([known, flips, values, values**2, values * flips], axis=1)
    moments, _ = group_sums(parts, codes, count)  # [C, 5, *cells]: n, flips, change, change squared, change x flip
    total = moments.sum(axis=0)
    n, flips, change_sum, _, product = total
    z = np.arctanh(_correlation(total))
    with np.errstate(divide="ignore", invalid="ignore"):
        z = np.where((flips >= MIN_FLIPS) & (n - flips >= MIN_FLIPS), z, np.nan)
        left_out = np.arctanh(_correlation((total - moments).swapaxes(0, 1)))
        error = np.sqrt((count - 1) / count * ((left_out - left_out.mean(axis=0)) ** 2).sum(axis=0))
        half = stats.t.ppf(0.975, count - 1) * error if count > 1 else np.full_like(z, np.nan)
        sides = {
            "change_if_flipped": product / flips,
            "change_if_still_right": (change_sum - product) / (n - flips),
        }
    return {
        "n": n.astype(int),
        "n_flipped": np.rint(flips).astype(int),
        "point_biserial_r": np.tanh(z),
        "ci_low": np.tanh(z - half),
        "ci_high": np.tanh(z + half),
        **sides,
        "p": np.where(np.isnan(z), np.nan, rank_test(change, flipped, clusters)),
    }


def rank_test(change: np.ndarray, flipped: np.ndarray, clusters: Sequence[str]) -> np.ndarray:
    """Two-sided p [*cells] of Wilcoxon's rank-sum test of changes [n, *cells] against flips [n] (0 or 1).

    Two standard errors, and the larger p counts: that of the clusters' shares of the statistic (a t test: rows of a
    template may be alike), and that of all orders of the rows (Pearson type III with the exact variance and skewness of
    the permutations: changes may be mostly ties, and then the clusters' own spread says too little). NaN if the change
    or the flip does not vary.
    """
    flips = flipped.reshape(-1, *[1] * (change.ndim - 1))
    known = ~np.isnan(change)
    n = known.sum(axis=0)
    ranks = stats.rankdata(np.where(known, change, np.inf), axis=0)  # the unknown come last and are left out
    codes = cluster_codes(len(change), clusters)
    with np.errstate(divide="ignore", invalid="ignore"):
        rank = np.where(known, (2 * ranks - n - 1) / n, 0.0)  # centred, from -1 to 1
        flip = np.where(known, flips - np.where(known, flips, 0).sum(axis=0) / n, 0.0)
        variance = (rank**2).sum(axis=0) * (flip**2).sum(axis=0) / (n - 1)
        third = (rank**3).sum(axis=0) * (flip**3).sum(axis=0) * n / ((n - 1) * (n - 2))
        sums, counts = group_sums(np.where(known, rank * flip, np.nan), codes, int(codes.max(initial=-1)) + 1)
        total, groups = sums.sum(axis=0), (counts > 0).sum(axis=0)
        spread = np.maximum((sums**2).sum(axis=0) - total**2 / groups, 0) * groups / (groups - 1)
        clustered = 2 * stats.t.sf(np.abs(total) / np.sqrt(spread), groups - 1)
        skew, z = third / variance**1.5, total / np.sqrt(variance)
        one_side = np.minimum(stats.pearson3.sf(z, skew), stats.pearson3.cdf(z, skew))
    return np.maximum(clustered, np.minimum(1, 2 * one_side))


def _correlation(moments: np.ndarray) -> np.ndarray:
    """Pearson's r from the moments [5, ...]; NaN if either side does not vary."""
    n, flips, change, square, product = moments
    with np.errstate(divide="ignore", invalid="ignore"):
        spread = square / n - (change / n) ** 2
        spread = np.where(spread > 1e-12 * np.maximum(square / n, 1e-30), spread, np.nan)
        share = flips / n
        r = (product / n - change / n * share) / np.sqrt(spread * share * (1 - share))
        return np.where(np.isfinite(r), np.clip(r, -1 + 1e-12, 1 - 1e-12), np.nan)
