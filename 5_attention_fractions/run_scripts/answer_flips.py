"""Does a change go with the answer flipping from right to wrong? Point-biserial correlation, clustered, streaming."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from command_line import UserError
from head_overlap import GroupSums

GROUPS = 256  # clusters above this are pooled, so that memory stays flat
MIN_FLIPS = 5  # fewer flips (or fewer kept answers) say nothing about a correlation


class Answers:
    """Which answers are right, from the maths_items.csv of stage 3; of several samples, at least half must be."""

    def __init__(self, path: Path) -> None:
        import pandas as pd

        needed = ["style", "original_index", "correct"]
        try:
            table = pd.read_csv(path, usecols=needed)
        except FileNotFoundError:
            raise UserError(f"{path}: no such file; run stage 3 (evaluate_predictions.py) first") from None
        except (ValueError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: needs the columns {', '.join(needed)} of stage 3 ({error})") from None
        words = {"true": 1.0, "false": 0.0, "1": 1.0, "0": 0.0, "1.0": 1.0, "0.0": 0.0}
        table["correct"] = table["correct"].astype(str).str.lower().map(words)
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
    if path is None and not (folder / "maths_items.csv").is_file():
        return None
    return Answers(path or folder / "maths_items.csv")


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

    def __init__(self) -> None:
        self._groups = GroupSums(GROUPS)  # of [5, *cells]: n, flips, change, change squared, change x flip

    def add(self, change: np.ndarray, flipped: np.ndarray, clusters: Sequence[str]) -> None:
        """Add changes [b, *cells] and flips [b]; NaN in either is left out."""
        flip = np.broadcast_to(flipped.reshape(-1, *[1] * (change.ndim - 1)), change.shape)
        known = ~np.isnan(change) & ~np.isnan(flip)
        change, flip = np.where(known, change, 0.0), np.where(known, flip, 0.0)
        self._groups.add(np.stack([known, flip, change, change**2, change * flip], axis=1), clusters)

    def finish(self) -> Association | None:
        """Point-biserial r with its interval and test; None without rows.

        r is Pearson's correlation of the change and the flip (0 or 1). The interval is Student's t on Fisher's
        z = artanh(r), its standard error from leaving out one group of clusters at a time. p is a t test of the groups'
        shares of the covariance against 0: errors under the null alone, so that it holds far out in the tail, where the
        correction over heads looks (a test on z named a head in 8 to 23 % of null runs). NaN with fewer than MIN_FLIPS
        flips or kept answers, or where the change does not vary.
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
        p = np.where(np.isnan(z), np.nan, _covariance_test(moments))
        whole = n.astype(int), np.rint(flips).astype(int)
        return Association(*whole, np.tanh(z), np.tanh(z - half), np.tanh(z + half), p, *sides)


def _covariance_test(moments: np.ndarray) -> np.ndarray:
    """Two-sided p [*cells] of a t test over the groups' shares of the covariance, from their moments [G, 5, *cells]."""
    from scipy import stats

    n, flips, change = moments[:, :3].sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        one, other = flips / n, change / n
        shares = moments[:, 4] - one * moments[:, 2] - other * moments[:, 1] + moments[:, 0] * one * other
        groups = (moments[:, 0] > 0).sum(axis=0)
        mean = shares.sum(axis=0) / groups
        error = np.sqrt(np.maximum((shares**2).sum(axis=0) / groups - mean**2, 0) / (groups - 1))
        return 2 * stats.t.sf(np.abs(mean / error), groups - 1)


def _correlation(moments: np.ndarray) -> np.ndarray:
    """Pearson's r from the moments [5, *cells]; NaN where either side does not vary."""
    n, flips, change, square, product = moments
    with np.errstate(divide="ignore", invalid="ignore"):
        spread = square / n - (change / n) ** 2
        spread = np.where(spread > 1e-12 * np.maximum(square / n, 1e-30), spread, np.nan)
        share = flips / n
        r = (product / n - change / n * share) / np.sqrt(spread * share * (1 - share))
        return np.where(np.isfinite(r), np.clip(r, -1 + 1e-12, 1 - 1e-12), np.nan)
