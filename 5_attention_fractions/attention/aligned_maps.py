"""Jensen-Shannon divergence between the attention of a clean prompt and its typo form, token by aligned token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from attention.attention_fields import layer_number, regions_of
from attention.reference_format import TokenRegions


@dataclass(frozen=True)
class RowMaps:
    """One prompt without pads: token ids [S], which are edited [S] bool, and how to read a layer's map [H,S,S]."""

    ids: np.ndarray
    edited: np.ndarray
    real: np.ndarray
    maps: dict[int, torch.Tensor]  # views [H,S,S] into the memory-mapped file, pads included

    def on_shared_keys(self, gaps: np.ndarray, first: int) -> Callable[[int], np.ndarray]:
        """Layer → attention [H,Q,U+G] of the unedited queries from number `first` on.

        Keys are the U unedited tokens and, summed, the tokens in each of G gaps. A gap is named by how many unedited
        tokens stand before it; see `gaps`.
        """
        places = np.flatnonzero(self.real)
        kept = places[~self.edited]
        keys = np.concatenate([kept, places[self.edited]])
        cells = kept[first:, None] * len(self.real) + keys  # taken by one index: twice as quick as by two
        in_gap = (self.gaps()[:, None] == gaps).astype(np.float32)

        def read(layer: int) -> np.ndarray:
            attention = self.maps[layer].float().flatten(1).numpy().take(cells, axis=1)
            on_gaps = attention[..., len(kept) :] @ in_gap
            return np.concatenate([attention[..., : len(kept)], on_gaps], axis=-1)

        return read

    def gaps(self) -> np.ndarray:
        """The gap in which each edited token lies."""
        return (~self.edited).cumsum()[self.edited]


def row_maps(
    content: dict[str, Any], path: Path, edited: str | None, reference: TokenRegions | None = None
) -> np.ndarray:
    """A RowMaps for each of the B rows of a file, as an object array [B]; without any map if the file holds none."""
    names, mask, real = regions_of(content, path, reference)
    ids, column = content["input_ids"].numpy(), names.index(edited) if edited in names else None
    rows = np.empty(len(ids), dtype=object)
    for position, keep in enumerate(real):
        inside = np.zeros(int(keep.sum()), dtype=bool) if column is None else mask[position, keep, column]
        maps = {layer_number(name): tensor[position] for name, tensor in content.get("attentions", {}).items()}
        rows[position] = RowMaps(ids[position, keep], inside, keep, maps)
    return rows


def aligned_divergence(variants: np.ndarray, cleans: np.ndarray, layers: list[int], heads: int) -> np.ndarray:
    """Jensen-Shannon divergence in bits [P, L, H, 2] of P pairs of RowMaps: of the last token, and the mean.

    Unedited tokens are matched one to one; all edited tokens between two of them are one key. The mean is over the
    unedited queries after the first edit. NaN in layers without a raw map, if no such query is left, and for pairs
    whose unedited tokens differ.
    """
    divergence = np.full((len(variants), len(layers), heads, 2), np.nan, dtype=np.float32)
    for pair, (variant, clean) in enumerate(zip(variants, cleans, strict=True)):
        if not np.array_equal(variant.ids[~variant.edited], clean.ids[~clean.edited]):
            continue
        gaps = np.union1d(variant.gaps(), clean.gaps())
        after = int(gaps[0]) if gaps.size else 0
        if after == (~clean.edited).sum():
            continue
        own, other = variant.on_shared_keys(gaps, after), clean.on_shared_keys(gaps, after)
        last_kept = not (variant.edited[-1] or clean.edited[-1])
        for place, layer in enumerate(layers):
            if layer in variant.maps and layer in clean.maps:
                of_queries = _divergence(own(layer), other(layer))  # [H,Q]
                divergence[pair, place, :, 0] = of_queries[:, -1] if last_kept else np.nan
                divergence[pair, place, :, 1] = of_queries.mean(axis=1)
    return divergence


def _divergence(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    # Key by key before the sum: the entropies of whole rows are large next to their difference.
    terms = (_negative_entropy(one) + _negative_entropy(other)) / 2 - _negative_entropy((one + other) / 2)
    return np.maximum(terms.sum(axis=-1), 0) / np.log(2)


def _negative_entropy(p: np.ndarray) -> np.ndarray:
    """p log p, 0 at 0 (SciPy's `entr` does the same four times slower, without the vector units)."""
    return p * np.log(np.maximum(p, np.finfo(p.dtype).tiny))
