"""What one .pt file says about attention, as small arrays per row: mass on regions, its uniform share, entropy.

Formulas: docs/METHODS.md, "Queries and regions". Pads count in nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from command_line import UserError
from scipy.special import entr
from style_rows import StyleRows, twin_region

from attention.reference_format import TokenRegions

Fields = dict[str, np.ndarray]  # every array has the rows of one file on its first axis

QUERIES = ("last", "mean")  # the last prompt token; the mean over all prompt tokens
REGIONS = ("context", "instruction", "task", "edited", "first")
EDITED = REGIONS.index("edited")
ENTROPY_QUERIES = ("last", "mean", "edited")
SPAN_NAMES = {"mean": "all"}  # our query → its name among the file's regions


def fields_reader(
    rows: StyleRows,
    layers: list[int],
    compared: str | None = None,
    tokenizer: str | None = None,
    without_first: bool = True,
) -> Callable[[dict[str, Any], Path], Fields]:
    """`attention_fields` for the files of a style, as a function of (content, path).

    layers: those that every file must have. compared: in the clean form, the style whose words are `edited`.
    tokenizer: finds the regions of files without any.
    """
    edited, reference = edited_region(rows, compared), regions_finder(rows, compared, tokenizer)

    def read(content: dict[str, Any], path: Path) -> Fields:
        fields = attention_fields(content, path, edited, reference, without_first)
        if (found := layers_of(content)) != layers:
            raise UserError(
                f"{path}: attention of layers {_listed(found)}, but of {_listed(layers)} in the files before; run "
                "stage 2 with the same --raw_layers for all"
            )
        return fields

    return read


def edited_region(rows: StyleRows, compared: str | None = None) -> str | None:
    """Name of the edited region in a style's files; in the clean form, of the words that `compared` will change."""
    if rows.style != rows.run.clean_style:
        return "edited"
    return None if compared is None else twin_region("edited", compared)


def regions_finder(rows: StyleRows, compared: str | None, tokenizer: str | None) -> TokenRegions | None:
    """What finds the regions of files in the reference format; None without a tokenizer."""
    return TokenRegions(tokenizer, rows.run, rows.style, compared) if tokenizer else None


def attention_fields(
    content: dict[str, Any],
    path: Path,
    edited: str | None,
    reference: TokenRegions | None = None,
    without_first: bool = False,
) -> Fields:
    """Arrays with the B rows of a file on their first axis.

    edited: the file's name for the edited region, None for none. without_first: a row whose edited words hold the first
    token counts as one without edited words.
    mass [B,L,H,Q,R] float32; whole [B,L,H,Q]: mass on all tokens, below 1 if a sink in the softmax takes a part;
    uniform [B,L,Q,R]: the mass that even attention would give, NaN in layers of which it is not known what a query
    sees; tokens [B,R]; holds_first [B,R]: 1 if the region holds the first token, else 0; entropy [B,L,H,3] of the last
    token, the mean query and the edited words, NaN where unknown; has_edited [B] bool: without, mass, uniform share and
    entropy of `edited` are NaN. Another empty region has mass 0.
    Raises UserError if the file holds no attention, or no regions and there is no tokenizer to find them with.
    """
    names, mask, real = regions_of(content, path, reference)
    wanted = [edited if name == "edited" else name for name in REGIONS]
    keys = np.zeros((*mask.shape[:2], len(REGIONS)), dtype=bool)  # a region that the file lacks is empty
    for column, name in enumerate(wanted):
        if name in names:
            keys[..., column] = mask[..., names.index(name)]
    if "first" not in names:
        keys[..., REGIONS.index("first")] = _first_token(real)
    if "span_mass" not in content and not content.get("attentions"):
        raise UserError(f"{path}: holds neither span_mass nor attentions; run stage 2 with attention capture")
    windows = _windows(content, layers_of(content))
    uniform = {window: uniform_mass(keys, real, window) for window in {*windows}}
    holds_first = (keys & _first_token(real)[..., None]).any(axis=1).astype(np.float32)
    fields = {"tokens": keys.sum(axis=1), "holds_first": holds_first}
    fields["uniform"] = np.stack([uniform[window] for window in windows], axis=1)
    if "span_mass" in content:
        queries = [names.index(SPAN_NAMES.get(query, query)) for query in QUERIES]
        span_mass = content["span_mass"][:, :, :, queries]
        fields["mass"], fields["whole"] = _select(span_mass, names, wanted), _select(span_mass, names, ["all"])[..., 0]
        entropy = content.get("attention_entropy")
        if entropy is None:
            fields["entropy"] = np.full((*fields["mass"].shape[:3], len(ENTROPY_QUERIES)), np.nan, dtype=np.float32)
        else:
            columns = [edited if query == "edited" else SPAN_NAMES.get(query, query) for query in ENTROPY_QUERIES]
            fields["entropy"] = _select(entropy, names, columns)
    else:
        keys = np.concatenate([keys, real[..., None]], axis=-1)
        mass, fields["entropy"] = _from_maps(content["attentions"], keys, real, windows)
        fields["mass"], fields["whole"] = mass[..., :-1], mass[..., -1]
    for key in ("mass", "whole", "entropy"):  # what overflowed is missing, not infinite
        fields[key][np.isinf(fields[key])] = np.nan
    fields["has_edited"] = fields["tokens"][:, EDITED] > 0
    if without_first:
        fields["has_edited"] &= fields["holds_first"][:, EDITED] == 0
    for key, column in (("mass", EDITED), ("uniform", EDITED), ("entropy", ENTROPY_QUERIES.index("edited"))):
        fields[key][~fields["has_edited"], ..., column] = np.nan
    return fields


def layers_of(content: dict[str, Any]) -> list[int]:
    """Numbers of the layers that `attention_fields` returns: all, or those with a raw map."""
    if "span_mass" in content:
        return list(range(content["span_mass"].shape[0]))
    return sorted(layer_number(name) for name in content.get("attentions", {}))


def _listed(layers: list[int]) -> str:
    return " ".join(map(str, layers)) if len(layers) < 8 else f"{layers[0]} to {layers[-1]}"


def regions_of(
    content: dict[str, Any], path: Path, reference: TokenRegions | None = None
) -> tuple[list[str], np.ndarray, np.ndarray]:
    """(region names, region mask [B,S,R] bool, real tokens [B,S] bool) of a file."""
    if "region_mask" in content:
        return list(content["regions"]), content["region_mask"].numpy(), content["attention_mask"].bool().numpy()
    if reference is None:
        raise UserError(f"{path}: has no region_mask; give --tokenizer NAME, so that regions are found from its tokens")
    return reference.find(content, path)


def uniform_mass(keys: np.ndarray, real: np.ndarray, window: int = 0) -> np.ndarray:
    """Mass [B,Q,R] that uniform causal attention gives to the regions keys [B,S,R]; real [B,S] marks the tokens.

    window: how many keys a query may see, itself among them; 0: all before it; below 0: not known, all NaN.
    """
    if window < 0:
        return np.full((len(keys), len(QUERIES), keys.shape[-1]), np.nan)
    shares = _seen(keys, window) / np.maximum(_seen(real, window), 1)[..., None]  # [B,S,R]
    return _query_weights(real) @ shares


def _seen(tokens: np.ndarray, window: int) -> np.ndarray:
    """How many of `tokens` [B,S,...] each place sees: those up to it, of the last `window` places where that is set."""
    count = tokens.cumsum(axis=1)
    if 0 < window < tokens.shape[1]:
        count[:, window:] = count[:, window:] - count[:, :-window]
    return count


def _windows(content: dict[str, Any], layers: list[int]) -> list[int]:
    """The attention window of each layer; 0, all keys, if a file does not say."""
    known = content.get("attention_windows") or []
    return [known[layer] if layer < len(known) else 0 for layer in layers]


# --- from span_mass


def _select(values: torch.Tensor, names: list[str], wanted: Sequence[str | None]) -> np.ndarray:
    """The columns `wanted` of the last axis of values [L,B,...], float32 [B,L,...]; NaN for a region the file lacks."""
    have = [place for place, name in enumerate(wanted) if name in names]
    picked = values[..., [names.index(str(wanted[place])) for place in have]].float().numpy()
    found = np.full((*picked.shape[:-1], len(wanted)), np.nan, dtype=np.float32)
    found[..., have] = picked
    return found.swapaxes(0, 1)


# --- from raw maps


def _from_maps(
    maps: dict[str, torch.Tensor], keys: np.ndarray, real: np.ndarray, windows: list[int]
) -> tuple[np.ndarray, np.ndarray]:
    masses, entropies = [], []
    for name, window in zip(sorted(maps, key=layer_number), windows, strict=True):
        attention = maps[name].float().numpy()  # one layer in memory at a time
        attention = np.where(real[:, None, :, None], attention, 0)  # a pad's row may be NaN, and 0 x NaN is NaN
        masses.append(map_mass(attention, keys, real))
        entropies.append(map_entropy(attention, keys[..., EDITED], real, window))
    return np.stack(masses, axis=1), np.stack(entropies, axis=1)


def map_mass(attention: np.ndarray, keys: np.ndarray, real: np.ndarray) -> np.ndarray:
    """Mass [B,H,Q,R] of one layer's maps [B,H,S,S] on the regions keys [B,S,R]."""
    weights = _query_weights(real).astype(np.float32)  # [B,Q,S]
    queried = np.einsum("bqs,bhst->bhqt", weights, attention, optimize=True)
    return np.einsum("bhqt,btr->bhqr", queried, keys.astype(np.float32)).astype(np.float32)


def map_entropy(attention: np.ndarray, edited: np.ndarray, real: np.ndarray, window: int = 0) -> np.ndarray:
    """Normalised entropy [B,H,3] of one layer's maps [B,H,S,S] for the last token, the mean query, the edited words.

    Mean over the queries of H(attention, as shares of its sum) / log(number of keys that the query may see); a query
    that sees one key only is left out. window: see `uniform_mass`.
    """
    if window < 0:
        return np.full((*attention.shape[:2], len(ENTROPY_QUERIES)), np.nan, dtype=np.float32)
    seen = _seen(real, window)
    counted = real & (seen > 1)
    allowed = real[:, None, None, :] & counted[:, None, :, None]
    attention = np.where(allowed, attention, 0.0)
    # Shares of what reaches the keys: a sink in the softmax takes the rest.
    shares = attention / np.maximum(attention.sum(axis=-1, keepdims=True), np.finfo(np.float32).tiny)
    entropy = entr(shares).sum(axis=-1)  # [B,H,S]
    entropy = entropy / np.log(np.maximum(seen, 2))[:, None]
    last = _last_token(real)
    chosen = np.stack([last & counted, counted, edited.astype(bool) & counted], axis=-1).astype(np.float32)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.einsum("bhs,bsq->bhq", entropy, chosen) / chosen.sum(axis=1)[:, None]


def _query_weights(real: np.ndarray) -> np.ndarray:
    return np.stack([_last_token(real), real / real.sum(axis=1, keepdims=True)], axis=1)


# --- tokens


def _first_token(real: np.ndarray) -> np.ndarray:
    return real & (real.cumsum(axis=1) == 1)


def _last_token(real: np.ndarray) -> np.ndarray:
    return real & (real.cumsum(axis=1) == real.sum(axis=1, keepdims=True))


def layer_number(name: str) -> int:
    """5 of `layer_5`."""
    return int(str(name).rpartition("_")[2])
