"""How far a style moves the next-token distribution, from top-k logits and the logsumexp over the whole vocabulary."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

LEAST_KL = 1e-6  # nats; what float32 logits leave of it below is rounding
ROUNDING = 1e-6  # probability mass below this outside the shared tokens is rounding of the logsumexp


def next_token_change(
    clean: tuple[torch.Tensor, torch.Tensor, torch.Tensor], style: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
) -> dict[str, np.ndarray]:
    """Change at the last prompt token; each side (topk_vals [b,k], topk_indices [b,k], logsumexp [b]). All [b]:

    next_token_kl     KL(clean || style) in nats with all tokens that are not in both top-k lumped into one: an exact
                      lower bound of the full KL, and equal to it where k is the vocabulary
    log10_next_token_kl   its logarithm, a KL below LEAST_KL taken as that
    kl_mass_clean, kl_mass_style   probability of the tokens that are not lumped
    clean_top1_rank   rank of the clean run's first token under the style, from 1; k + 1: beyond the top-k (censored)
    top1_kept         1 where that rank is 1
    """
    (values_p, ids_p, sum_p), (values_q, ids_q, sum_q) = clean, style
    p = (values_p.double() - sum_p.double()[:, None]).exp().numpy()
    q = (values_q.double() - sum_q.double()[:, None]).exp().numpy()
    match = (ids_p[:, :, None] == ids_q[:, None, :]).numpy()  # [b, k, k]
    shared = match.any(-1)
    q_of_p = np.where(shared, (match * q[:, None, :]).sum(-1), np.nan)
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(shared & (p > 0), p * np.log(p / q_of_p), 0.0).sum(-1)
    mass_p, mass_q = np.where(shared, p, 0).sum(-1), np.where(shared, q_of_p, 0).sum(-1)
    rest_p, rest_q = np.clip(1 - mass_p, 0, 1), np.clip(1 - mass_q, ROUNDING, 1)
    lumped = np.where(rest_p > ROUNDING, rest_p * np.log(np.maximum(rest_p, ROUNDING) / rest_q), 0.0)
    first = match[:, 0]
    rank = np.where(first.any(-1), first.argmax(-1) + 1, ids_q.shape[1] + 1).astype(float)
    kl = np.maximum(terms + lumped, 0)
    return {
        "next_token_kl": kl,
        "log10_next_token_kl": np.log10(np.maximum(kl, LEAST_KL)),
        "kl_mass_clean": np.minimum(mass_p, 1),
        "kl_mass_style": np.minimum(mass_q, 1),
        "clean_top1_rank": rank,
        "top1_kept": (rank == 1).astype(float),
    }
