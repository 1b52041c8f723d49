"""Debiased linear CKA between two sets of states of the same items, with a clustered interval (docs/METHODS.md)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy import stats

MIN_ITEMS = 4  # the unbiased estimator needs four items


def clustered_cka(
    first: np.ndarray, second: np.ndarray, clusters: Sequence[str]
) -> tuple[float, float, float, int, int] | None:
    """(CKA, low and high of its 95 % interval, items, clusters) of states [n, D]; None with fewer than four items.

    Items whose states are not finite are left out. The interval is the delta method on the items' contributions to
    the three HSICs, summed within clusters; NaN with one cluster.
    """
    known = np.isfinite(first).all(axis=1) & np.isfinite(second).all(axis=1)
    if known.sum() < MIN_ITEMS:
        return None
    parts = item_contributions(torch.from_numpy(first[known]), torch.from_numpy(second[known]))
    names, slots = np.unique(np.asarray(clusters)[known], return_inverse=True)
    n, groups = len(parts), len(names)
    sums = np.zeros((groups, 3))
    np.add.at(sums, slots, parts)
    cross, own_first, own_second = sums.sum(axis=0) / n
    with np.errstate(invalid="ignore", divide="ignore"):
        scale = np.sqrt(own_first * own_second)
        cka = cross / scale
        # 2: an item enters HSIC's pairs from both sides.
        influence = 2 * (sums[:, 0] / scale - cka / 2 * (sums[:, 1] / own_first + sums[:, 2] / own_second))
    half = np.nan
    if groups > 1:
        half = stats.t.ppf(0.975, groups - 1) * np.sqrt((influence**2).sum() * groups / (groups - 1)) / n
    return cka, cka - half, cka + half, n, groups


def item_contributions(first: torch.Tensor, second: torch.Tensor) -> np.ndarray:
    """[n, 3]: what each item adds to HSIC(X,Y), HSIC(X,X), HSIC(Y,Y); their means over items are the HSICs."""
    x, y = _u_centred(first), _u_centred(second)
    return torch.stack([(a * b).sum(-1) / (len(x) - 3) for a, b in ((x, y), (x, x), (y, y))], dim=1).numpy()


def _u_centred(states: torch.Tensor) -> torch.Tensor:
    """U-centred Gram matrix [n, n] of states [n, D] (Szekely and Rizzo 2014)."""
    # The mean goes first: a Gram matrix of large common parts would lose the rest to rounding.
    states = states - states.mean(0)
    gram = (states @ states.T).double().fill_diagonal_(0)
    n = len(gram)
    rows = gram.sum(-1, keepdim=True) / (n - 2)
    return (gram + gram.sum() / ((n - 1) * (n - 2)) - rows - rows.T).fill_diagonal_(0)
