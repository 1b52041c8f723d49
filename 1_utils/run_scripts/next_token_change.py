"""How far a style moves the next-token distribution, from top-k logits and the logsumexp over the whole vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

LEAST_KL = 1e-6  # nats; what float32 logits leave of it below is rounding
ROUNDING = 1e-6  # probability mass below this outside the shared tokens is rounding of the logsumexp


def last_logits(content: dict[str, Any], path: Path) -> dict[str, np.ndarray]:
    """topk_vals [B,k], topk_indices [B,k] and logsumexp [B] at the last prompt token of a .pt file's rows."""
    return {
        "topk_vals": content["topk_vals"][:, -1].float().numpy(),
        "topk_indices": content["topk_indices"][:, -1].numpy(),
        "logsumexp": content["logsumexp"][:, -1].float().numpy(),
    }


def next_token_change(clean: dict[str, np.ndarray], style: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Change at the last prompt token of n rows; each side is `last_logits` of them. Every value is [n]:

    next_token_kl     KL(clean || style) in nats with all tokens that are not in both top-k lumped into one: an exact
                      lower bound of the full KL, and equal to it if k is the vocabulary
    log10_next_token_kl   its logarithm, a KL below LEAST_KL taken as that
    kl_mass_clean, kl_mass_style   probability of the tokens that are not lumped
    clean_top1_rank   rank of the clean run's first token under the style, from 1; k + 1: beyond the top-k (censored)
    top1_kept         1 if that rank is 1
    """
    p, q = (np.exp(side["topk_vals"].astype(np.float64) - side["logsumexp"][:, None]) for side in (clean, style))
    place = _places(clean["topk_indices"], style["topk_indices"])
    shared = place >= 0
    q_of_p = np.where(shared, np.take_along_axis(q, np.maximum(place, 0), axis=1), np.nan)
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(shared & (p > 0), p * np.log(p / q_of_p), 0.0).sum(-1)
    mass_p, mass_q = np.where(shared, p, 0).sum(-1), np.where(shared, q_of_p, 0).sum(-1)
    rest_p, rest_q = np.clip(1 - mass_p, 0, 1), np.clip(1 - mass_q, ROUNDING, 1)
    lumped = np.where(rest_p > ROUNDING, rest_p * np.log(np.maximum(rest_p, ROUNDING) / rest_q), 0.0)
    rank = np.where(shared[:, 0], place[:, 0] + 1, q.shape[1] + 1).astype(float)
    kl = np.maximum(terms + lumped, 0)
    return {
        "next_token_kl": kl,
        "log10_next_token_kl": np.log10(np.maximum(kl, LEAST_KL)),
        "kl_mass_clean": np.minimum(mass_p, 1),
        "kl_mass_style": np.minimum(mass_q, 1),
        "clean_top1_rank": rank,
        "top1_kept": (rank == 1).astype(float),
    }


def _places(wanted: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """[n, k] position of each wanted id [n, k] among the ids [n, m] of its row; -1 if it is not there."""
    order = np.argsort(ids, axis=1)
    # Row by row in one sorted list: every row's ids lie above those of the row before.
    shift = np.arange(len(ids))[:, None] * (max(ids.max(initial=0), wanted.max(initial=0)) + 1)
    ordered = (np.take_along_axis(ids, order, axis=1) + shift).ravel()
    found = np.searchsorted(ordered, wanted + shift)
    there = ordered[np.minimum(found, len(ordered) - 1)] == wanted + shift
    return np.where(there, order.ravel()[np.minimum(found, len(ordered) - 1)], -1)
