"""Measures of a style's residual stream beside its clean twin's: distances, recovery of a mistyped word, linear CKA.

Formulas: docs/METHODS.md, "activation_diffs.py".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from run_store import Run
from scipy import stats
from style_rows import StyleRows, twin_region
from torch.nn.functional import cosine_similarity, normalize

AT_CENTRE = 1e-4  # distance to the centre, as a share of the norm, that is nothing but rounding
BLOCK_NUMBERS = 4_000_000  # 16 MB an array of float32
MIN_ITEMS = 4  # the unbiased estimator of CKA needs four items
MIN_REFERENCES = 2
STAY_LAYERS = 3  # one layer alone may be chance
OVERSAMPLE = 3  # rows read for each reference word wanted, since words repeat


def layer_slices(rows: int, width: int, layers: int) -> Iterator[slice]:
    """Slices of all layers such that an array [rows, layers of the slice, width] has about BLOCK_NUMBERS numbers."""
    step = max(1, BLOCK_NUMBERS // max(1, rows * width))
    for start in range(0, layers, step):
        yield slice(start, min(start + step, layers))


def state_distances(clean: torch.Tensor, style: torch.Tensor, centre: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """cosine, cosine_centred (with a centre [k,D]) and relative_l2, each [n,k], of states [n,k,D] at k layers.

    relative_l2 is |style - clean| / |clean|; NaN if a state is, cosine_centred also if a state is the centre.
    """
    found = {"cosine": cosine_similarity(clean, style, dim=-1)}
    if centre is not None:
        one, other = clean - centre, style - centre
        # If all prompts end on one token its embedding is the centre: what is left has no direction.
        at_centre = (one.norm(dim=-1) < AT_CENTRE * clean.norm(dim=-1)) | (
            other.norm(dim=-1) < AT_CENTRE * style.norm(dim=-1)
        )
        found["cosine_centred"] = cosine_similarity(one, other, dim=-1).masked_fill(at_centre, torch.nan)
    found["relative_l2"] = (style - clean).norm(dim=-1) / clean.norm(dim=-1)
    return found


# --- recovery: from which layer on is the state of a mistyped word that of the word that was meant?


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


# --- debiased linear CKA


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
