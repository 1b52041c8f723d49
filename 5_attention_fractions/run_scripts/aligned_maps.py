"""Jensen-Shannon divergence between the attention of a clean prompt and its typo form, token by aligned token."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from attention_fields import layer_number, regions_of

if TYPE_CHECKING:
    import torch
    from reference_format import TokenRegions


@dataclass(frozen=True)
class RowMaps:
    """One prompt without pads: token ids [S], which are edited [S] bool, and how to read a layer's map [H,S,S]."""

    ids: np.ndarray
    edited: np.ndarray
    real: np.ndarray
    maps: dict[int, torch.Tensor]  # views [H,S,S] into the memory-mapped file, pads included

    def map(self, layer: int) -> np.ndarray:
        """Attention [H,S,S] of one layer, float32, pads cut out."""
        return self.maps[layer].float().numpy()[:, self.real][:, :, self.real]


def row_maps(
    content: dict[str, Any], path: Path, edited: str | None, reference: TokenRegions | None = None
) -> np.ndarray:
    """A RowMaps for each of the B rows of a file, as an object array [B]."""
    names, mask, real = regions_of(content, path, reference)
    ids, column = content["input_ids"].numpy(), names.index(edited) if edited in names else None
    rows = np.empty(len(ids), dtype=object)
    for position, keep in enumerate(real):
        inside = np.zeros(int(keep.sum()), dtype=bool) if column is None else mask[position, keep, column]
        maps = {layer_number(name): tensor[position] for name, tensor in content["attentions"].items()}
        rows[position] = RowMaps(ids[position, keep], inside, keep, maps)
    return rows


def aligned_divergence(variants: np.ndarray, cleans: np.ndarray, layers: list[int]) -> np.ndarray:
    """Jensen-Shannon divergence in bits [P, L, H, 2] of P pairs of RowMaps: of the last token, and the mean.

    Unedited tokens are matched one to one; all edited tokens between two of them are one key, so that a word cut
    into more tokens does not count as change. The mean is over all unedited queries. NaN in layers without a raw map,
    and for pairs whose unedited tokens differ (then the typo has changed how its neighbours are tokenised).
    """
    heads = next(iter(cleans[0].maps.values())).shape[0]
    divergence = np.full((len(variants), len(layers), heads, 2), np.nan, dtype=np.float32)
    for pair, (variant, clean) in enumerate(zip(variants, cleans, strict=True)):
        if not np.array_equal(variant.ids[~variant.edited], clean.ids[~clean.edited]) or clean.edited.all():
            continue
        shared = [layer for layer in layers if layer in variant.maps and layer in clean.maps]
        for layer in shared:
            of_queries = _divergence(_on_slots(variant, layer), _on_slots(clean, layer))  # [H,U]
            last = of_queries[:, -1] if not (variant.edited[-1] or clean.edited[-1]) else np.nan
            divergence[pair, layers.index(layer), :, 0] = last
            divergence[pair, layers.index(layer), :, 1] = of_queries.mean(axis=1)
    return divergence


def _on_slots(row: RowMaps, layer: int) -> np.ndarray:
    """Attention [H,U,2U+1] of the U unedited queries on the unedited tokens and the gaps before, between, after."""
    kept = ~row.edited
    before = kept.cumsum() - kept
    slot = np.where(kept, 2 * before + 1, 2 * before)
    onehot = np.zeros((len(slot), 2 * int(kept.sum()) + 1), dtype=np.float32)
    onehot[np.arange(len(slot)), slot] = 1
    return row.map(layer)[:, kept] @ onehot


def _divergence(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    from scipy.special import entr

    both = entr((one + other) / 2).sum(axis=-1) - (entr(one) + entr(other)).sum(axis=-1) / 2
    return np.maximum(both, 0) / np.log(2)
