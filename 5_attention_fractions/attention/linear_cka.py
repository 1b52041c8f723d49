"""Linear CKA between two sets of states of the same items, with a clustered interval.

Debiased linear CKA: HSIC by the unbiased estimator of Song et al. (2012), since with fewer items than dimensions the
plain one is near 1 for unrelated states. Over minibatches of items it is averaged before the ratio is taken (Nguyen,
Raghu and Kornblith 2021, arXiv 2010.15327); where few items carry most of the variance that differs from one batch of
all (SmolLM2, task, layer 5, `split`: 0.991 in batches of 64, 0.969 in one of 200), so give as many at once as you can.
The interval is the delta method on the items' contributions to the three HSICs, summed within clusters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

MIN_ITEMS = 4  # the unbiased estimator needs four items


class CkaSums:
    """Running CKA of every layer. `add` minibatches of states, then `finish`."""

    def __init__(self) -> None:
        self._parts: list[np.ndarray] = []  # [b, 3, layers]: contributions to HSIC(X,Y), (X,X), (Y,Y)
        self._labels: list[str] = []

    def add(self, first: torch.Tensor, second: torch.Tensor, clusters: Sequence[str]) -> None:
        """Add states [layers, b, D] of the same b items; those not finite are left out, fewer than four too."""
        known = (first.isfinite().all(-1) & second.isfinite().all(-1)).all(0)
        if int(known.sum()) < MIN_ITEMS:
            return
        self._labels += [label for label, use in zip(clusters, known.tolist(), strict=True) if use]
        self._parts.append(item_contributions(first[:, known], second[:, known]))

    def finish(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, int, int] | None:
        """(CKA, low, high of the 95 % interval, each [layers]; items; clusters), or None where there were none."""
        from scipy import stats

        if not self._parts:
            return None
        parts, (names, slots) = np.concatenate(self._parts), np.unique(self._labels, return_inverse=True)
        n, groups = len(parts), len(names)
        sums = np.zeros((groups, *parts.shape[1:]))
        np.add.at(sums, slots, parts)
        cross, own_first, own_second = sums.sum(0) / n
        with np.errstate(invalid="ignore", divide="ignore"):
            scale = np.sqrt(own_first * own_second)
            cka = cross / scale
            # 2: an item enters HSIC's pairs from both sides.
            influence = 2 * (sums[:, 0] / scale - cka / 2 * (sums[:, 1] / own_first + sums[:, 2] / own_second))
            error = (
                np.sqrt((influence**2).sum(0) * groups / (groups - 1)) / n if groups > 1 else np.full(len(cka), np.nan)
            )
        half = stats.t.ppf(0.975, groups - 1) * error if groups > 1 else error
        return cka, cka - half, cka + half, n, groups


def item_contributions(first: torch.Tensor, second: torch.Tensor) -> np.ndarray:
    """[b, 3, layers]: what each item gives to HSIC(X,Y), HSIC(X,X), HSIC(Y,Y); their means over items are the HSICs."""
    import torch

    x, y = _u_centred(first), _u_centred(second)
    n = x.shape[-1]
    return torch.stack([(a * b).sum(-1) / (n - 3) for a, b in ((x, y), (x, x), (y, y))]).permute(2, 0, 1).numpy()


def _u_centred(states: torch.Tensor) -> torch.Tensor:
    """U-centred Gram matrices [layers, b, b] of states [layers, b, D] (Szekely and Rizzo 2014)."""
    # The mean goes first: a Gram matrix of large common parts would lose the rest to rounding.
    states = states - states.mean(1, keepdim=True)
    gram = (states @ states.mT).double()
    n = gram.shape[-1]
    gram.diagonal(dim1=-2, dim2=-1).zero_()
    rows = gram.sum(-1, keepdim=True) / (n - 2)
    total = gram.sum((-1, -2), keepdim=True) / ((n - 1) * (n - 2))
    gram += total
    gram -= rows
    gram -= rows.mT
    gram.diagonal(dim1=-2, dim2=-1).zero_()
    return gram
