"""Recovery of a mistyped word: from which layer on is its state that of the word that was meant?

The state of the edited words is compared with its own clean twin and with the clean states of other words, which the
same style edits in other rows (docs/METHODS.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from run_store import Run
from style_rows import StyleRows, twin_region
from torch.nn.functional import cosine_similarity, normalize

MIN_REFERENCES = 2
STAY_LAYERS = 3  # one layer alone may be chance
OVERSAMPLE = 3  # rows read for each reference word wanted, since words repeat


@dataclass
class Centre:
    """Median clean state [L+1,D] of a region, and the median of the states' norms [L+1]."""

    state: torch.Tensor
    norm: torch.Tensor

    @classmethod
    def of(cls, states: np.ndarray) -> Centre:
        """The centre of states [n, L+1, D]. A median: one state with a massive activation would be the whole mean."""
        tensor = torch.from_numpy(states)
        return cls(tensor.nanmedian(0).values, tensor.norm(dim=-1).nanmedian(0).values)


@dataclass
class ReferenceWords:
    """Clean states of M other words: `directions` [M,L+1,D] unit vectors from their centre."""

    centre: Centre
    directions: torch.Tensor
    rows: list[int]
    templates: list[str]
    words: list[tuple[int, ...]]

    def others(self, rows: list[int], templates: list[str], words: list[tuple[int, ...]]) -> torch.Tensor:
        """[n, M] bool: which references are other words of other rows and templates."""
        slots = {word: place for place, word in enumerate(self.words)}
        own = np.array([slots.get(word, -1) for word in words])
        different = np.asarray(rows)[:, None] != np.asarray(self.rows)
        different &= np.asarray(templates)[:, None] != np.asarray(self.templates)
        different &= own[:, None] != np.arange(len(self.words))
        return torch.from_numpy(different)


def reference_rows(clean: StyleRows, count: int, seed: int) -> list[int]:
    """Rows to look for reference words in, ascending: a random sample that depends on the seed alone."""
    order = np.random.default_rng(seed).permutation(len(clean.indices))[: count * OVERSAMPLE]
    return [clean.indices[place] for place in sorted(order)]


def reference_words(
    run: Run, clean: StyleRows, style: str, rows: list[int], count: int, without_first: bool = True
) -> ReferenceWords | None:
    """Up to `count` different words that `style` edits among `rows`; None if there are fewer than two.

    without_first: words that hold the first token of the sequence, an attention sink, are passed over.
    """
    region = twin_region("edited", style)
    words: dict[tuple[int, ...], int] = {}
    for row, on_first in zip(rows, clean.holds_first(rows, region), strict=True):
        if on_first and without_first:
            continue
        if (tokens := clean.region_tokens(row, region)) and tokens not in words and len(words) < count:
            words[tokens] = row
    if len(words) < MIN_REFERENCES or region not in clean.regions():
        return None
    by_row = sorted((row, tokens) for tokens, row in words.items())
    chosen = [row for row, _ in by_row]
    states = clean.field("hidden_pooled", chosen, region)
    centre = Centre.of(states)
    directions = normalize(torch.from_numpy(states) - centre.state, dim=-1).half()
    return ReferenceWords(centre, directions, chosen, clean.clusters(chosen), [tokens for _, tokens in by_row])


def nearness(
    clean: torch.Tensor, style: torch.Tensor, references: ReferenceWords, others: torch.Tensor, layers: slice
) -> dict[str, torch.Tensor]:
    """Is the edited word nearer to its own clean twin than to other words? clean, style [n,k,D] of k layers.

    `own_nearest` [n,k]: 1 if no other word is as near. Its chance is more than 1 / (M + 1): the others stand in
    other prompts, and words of one prompt are alike. `own_nearer_share` [n,k]: share of the others [n,M] that are less
    near. NaN if a row has fewer than two others, or no state.
    """
    centre = references.centre.state[layers]
    centred = style - centre
    own = cosine_similarity(clean - centre, centred, dim=-1)
    directions = references.directions[:, layers].float()
    similarity = torch.einsum("nkd,mkd->nkm", normalize(centred, dim=-1), directions)
    beaten = ((own[..., None] > similarity) & others[:, None]).sum(-1)
    count = others.sum(-1)[:, None]
    found = {"own_nearest": (beaten == count).float(), "own_nearer_share": beaten / count}
    missing = (count < MIN_REFERENCES) | own.isnan()
    return {name: values.masked_fill(missing, torch.nan) for name, values in found.items()}


def first_lasting_layer(holds: np.ndarray, stay: int) -> np.ndarray:
    """First layer [n] of `stay` layers in a row in which `holds` [n, layers] is true; `layers` if there is none."""
    stay = min(stay, holds.shape[1])
    opens = np.asarray(np.lib.stride_tricks.sliding_window_view(holds, stay, axis=1).all(axis=-1))
    return np.where(opens.any(axis=1), opens.argmax(axis=1), holds.shape[1])


def recovery_depth(own_nearest: np.ndarray, stay: int = STAY_LAYERS) -> np.ndarray:
    """First layer from which the word is nearest to its own clean twin for `stay` layers, [n] of own_nearest [n, L+1].

    L + 1: never (censored); NaN: not known. It need not last to the end: late states turn to the next token.
    """
    depth = first_lasting_layer(own_nearest == 1, stay).astype(float)
    depth[np.isnan(own_nearest).any(axis=1)] = np.nan
    return depth


def half_recovery_depth(cosine: np.ndarray, stay: int = STAY_LAYERS) -> np.ndarray:
    """First layer from which the cosine to the clean twin [n, L+1] has regained half of its greatest loss, for `stay`.

    The loss at a layer is 1 - cosine; layers before the greatest loss do not count. L + 1: never (censored); NaN if
    a layer is unknown or nothing was lost.
    """
    lowest = cosine.min(axis=1, keepdims=True)
    later = np.arange(cosine.shape[1]) >= cosine.argmin(axis=1)[:, None]
    depth = first_lasting_layer(later & (cosine >= (1 + lowest) / 2), stay).astype(float)
    depth[np.isnan(cosine).any(axis=1) | (lowest[:, 0] > 1 - 1e-6)] = np.nan
    return depth
