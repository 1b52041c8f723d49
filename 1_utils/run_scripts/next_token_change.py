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

    next_token_kl     the least KL(clean || style) in nats that the logits leave possible (`_least_rest`): a lower bound
                      of the full KL, and equal to it if k is the vocabulary
    log10_next_token_kl   its logarithm, a KL below LEAST_KL taken as that
    kl_mass_clean, kl_mass_style   probability of the tokens that are in both top-k
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
    rank = np.where(shared[:, 0], place[:, 0] + 1, q.shape[1] + 1).astype(float)
    kl = np.maximum(terms + _least_rest(np.where(shared, 0, p), 1 - mass_p, 1 - mass_q, q.min(axis=1)), 0)
    return {
        "next_token_kl": kl,
        "log10_next_token_kl": np.log10(np.maximum(kl, LEAST_KL)),
        "kl_mass_clean": np.minimum(mass_p, 1),
        "kl_mass_style": np.minimum(mass_q, 1),
        "clean_top1_rank": rank,
        "top1_kept": (rank == 1).astype(float),
    }


def _least_rest(own: np.ndarray, rest_p: np.ndarray, rest_q: np.ndarray, cap: np.ndarray) -> np.ndarray:
    """[n] the least part of the KL of the tokens that are not in both top-k, of probabilities rest_p, rest_q [n].

    own [n, k]: clean probabilities of those in the clean top-k alone (0: none). Under the style each has at most `cap`
    [n], the least of its top-k. The least divergence gives all tokens t times their clean probability, or else the cap.
    """
    p = -np.sort(-own, axis=1)
    above = np.cumsum(np.pad(p, ((0, 0), (1, 0))), axis=1)  # probability of the j likeliest, j from 0 to k
    count = np.arange(above.shape[1])
    rest_p, rest_q = np.clip(rest_p, 0, 1)[:, None], np.clip(rest_q, ROUNDING, 1)[:, None]
    t = np.maximum(rest_q - count * cap[:, None], ROUNDING) / np.maximum(rest_p - above, ROUNDING)
    capped = (t * np.pad(p, ((0, 0), (0, 1))) <= cap[:, None]).argmax(axis=1)[:, None]  # how many have the cap
    t, above = np.take_along_axis(t, capped, axis=1), np.take_along_axis(above, capped, axis=1)
    of_capped = np.where(count[:-1] < capped, p * np.log(np.maximum(p, ROUNDING) / cap[:, None]), 0).sum(axis=1)
    left = (rest_p - above)[:, 0]
    return of_capped - np.where(left > ROUNDING, left * np.log(t[:, 0]), 0)


def _places(wanted: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """[n, k] position of each wanted id [n, k] among the ids [n, m] of its row; -1 if it is not there."""
    order = np.argsort(ids, axis=1)
    # Row by row in one sorted list: every row's ids lie above those of the row before.
    shift = np.arange(len(ids))[:, None] * (max(ids.max(initial=0), wanted.max(initial=0)) + 1)
    ordered = (np.take_along_axis(ids, order, axis=1) + shift).ravel()
    found = np.searchsorted(ordered, wanted + shift)
    there = ordered[np.minimum(found, len(ordered) - 1)] == wanted + shift
    return np.where(there, order.ravel()[np.minimum(found, len(ordered) - 1)], -1)
