"""Which heads, MLPs and neurons to patch: attribution for all of them in one backward pass, and sets of the best.

Attribution patching (Nanda 2023; Syed, Rager & Conmy 2023, arXiv 2310.10348): with a the state of a unit, an estimate
of what patching it restores is −(a_donor − a_recipient) · ∂KL(donor ‖ recipient)/∂a, summed over tokens. With several
steps the gradient is the mean over inputs between the recipient's and the donor's embeddings (Hanna, Pezzelle &
Belinkov 2024, arXiv 2403.17806).
"""

from __future__ import annotations

import random
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from command_line import UserError
from file_output import read_csv

from capture.decode import new_cache
from capture.patch_measures import Cell
from capture.patching import Pair, Patch, Patcher

SIZES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)  # of sets of the best units
TOKENS_AT_ONCE = 1024  # of prompts and responses whose gradients are taken together
RANDOM_SETS = 3  # for each set: as many units of the same layers
Unit = tuple[int, int]  # layer, head or neuron (0 for a whole MLP)


def attribution(
    patcher: Patcher, pairs: Sequence[Pair], sites: Sequence[str], steps: int = 1
) -> list[dict[str, torch.Tensor]]:
    """Estimated nats that each unit restores, pair by pair: z [L, H], mlp_out [L], mlp_post [L, F], float32 on the CPU.

    Pairs that share about as many tokens are read together, as reading the weights is what takes the time.
    """
    patcher.hook(sites)
    order = sorted(range(len(pairs)), key=lambda k: (pairs[k].shared, len(pairs[k].recipient)))
    found: dict[int, dict[str, torch.Tensor]] = {}
    while order:
        count = 1
        while count < len(order) and (count + 1) * max(pairs[k].length for k in order[: count + 1]) <= TOKENS_AT_ONCE:
            count += 1
        some, order = order[:count], order[count:]
        found |= zip(some, _attribution([pairs[k] for k in some], patcher, sites, steps), strict=True)
    return [found[k] for k in range(len(pairs))]


@torch.no_grad()
def _attribution(
    pairs: Sequence[Pair], patcher: Patcher, sites: Sequence[str], steps: int
) -> Iterator[dict[str, torch.Tensor]]:
    """`attribution` of pairs that fit into one batch."""
    # 1. What donors and recipients share, and the rest of both, padded on the right: no token looks there.
    shared = min(pair.shared for pair in pairs)
    text = patcher.shared_text[:shared]
    behind = patcher.prefix(text, len(pairs))
    if len(text) < shared:
        patcher.plain([pair.recipient[len(text) : shared] for pair in pairs], behind, 1)
    longest = max(pair.length for pair in pairs)
    tails = [pair.response[:-1] + [0] * (longest - pair.length) for pair in pairs]
    donors = [pair.donor[shared:] + tail for pair, tail in zip(pairs, tails, strict=True)]
    recipients = [pair.recipient[shared:] + tail for pair, tail in zip(pairs, tails, strict=True)]
    keep = longest - min(len(pair.recipient) for pair in pairs) + 1
    first = [keep - longest + len(pair.recipient) - 1 for pair in pairs]  # of the response, in what is kept
    places = [(row, at + t) for row, at in enumerate(first) for t in range(len(pairs[row].response))]
    rows, columns = zip(*places, strict=True)

    # 2. The states of the donors and, for several steps, of the recipients.
    ends: list[torch.Tensor] = []  # embeddings, the donors' first
    followed: dict[tuple[str, int], torch.Tensor] = {}
    share = 0.0  # of the way from the recipient to the donor

    def follow(_branch: int, site: str, layer: int, state: torch.Tensor) -> torch.Tensor | None:
        if site in sites:
            followed[site, layer] = state
        if (site, layer) != ("resid_pre", 0):
            return None
        if torch.is_grad_enabled():
            return torch.lerp(state, ends[0], share).requires_grad_()
        ends.append(state)
        return None

    def log_shares(ids: list[list[int]]) -> torch.Tensor:  # [forced tokens of all pairs, V]
        cache = new_cache(len(patcher.layers), behind, len(pairs))
        return patcher.plain(ids, cache, keep, follow)[rows, columns].float().log_softmax(-1)

    donor = log_shares(donors)
    theirs, own = dict(followed), {}
    if steps > 1:
        log_shares(recipients)
        own = dict(followed)

    # 3. The gradient of the divergence at each step.
    total: dict[tuple[str, int], torch.Tensor] = {}
    for step in range(steps):
        share = (step + 0.5) / steps if steps > 1 else 0.0
        with torch.enable_grad():
            nats = (donor.exp() * (donor - log_shares(recipients))).sum()
            gradients = torch.autograd.grad(nats, list(followed.values()))
        for (at, state), gradient in zip(followed.items(), gradients, strict=True):
            total[at] = total.get(at, 0.0) + gradient.float() / steps
            own.setdefault(at, state.detach())

    # 4. Times the difference, summed over tokens (and the width of a head or MLP).
    axes = {"z": (1, 3), "mlp_out": (1, 2), "mlp_post": (1,)}
    found: dict[str, torch.Tensor] = {}
    for site in sites:
        by_layer = [(site, layer) for layer in range(len(patcher.layers))]
        scores = [((own[at].float() - theirs[at].float()) * total[at]).sum(axes[site]).cpu() for at in by_layer]
        found[site] = torch.stack(scores, 1)
    return ({site: scores[row] for site, scores in found.items()} for row in range(len(pairs)))


def ranked(scores: torch.Tensor, layers: Sequence[int]) -> list[Unit]:
    """Units of scores [L, units] in these layers, the largest absolute score first."""
    masked = torch.full_like(scores, -1.0)
    masked[list(layers)] = scores[list(layers)].abs()
    order = masked.flatten().argsort(descending=True, stable=True)[: len(layers) * scores.shape[1]]
    return [divmod(int(place), scores.shape[1]) for place in order]


def is_choosing(template: str, seed: int) -> bool:
    """Whether a template is of the first half, if no screen deals the templates; it does not depend on the others."""
    return bool(zlib.crc32(f"{seed}/{template}".encode()) & 1)


@dataclass(frozen=True)
class UnitSet:
    """Units of one site that are patched together."""

    name: str
    site: str
    units: list[Unit]

    def cell(self, direction: str, donor: str) -> Cell:
        """The set as a cell, for all tokens."""
        by_layer: dict[int, list[int]] = {}
        for layer, unit in self.units:
            by_layer.setdefault(layer, []).append(unit)
        patches = tuple(
            Patch(self.site, layer, "all", tuple(sorted(units)), donor) for layer, units in sorted(by_layer.items())
        )
        layer = next(iter(by_layer)) if len(by_layer) == 1 else -1
        return Cell(direction, self.site, "all", layer, donor=donor, set_name=self.name, patches=patches)

    def random_twins(self, counts: Sequence[int], seed: int) -> list[UnitSet]:
        """Random sets of as many units in the same layers; counts: units of each layer."""
        twins = []
        for number in range(1, RANDOM_SETS + 1):
            chance = random.Random(f"{seed}/{self.site}/{self.name}/{number}")
            many = sorted(Counter(layer for layer, _ in self.units).items())
            units = [(layer, unit) for layer, some in many for unit in chance.sample(range(counts[layer]), some)]
            twins.append(UnitSet(f"{self.name}_random_{number}", self.site, units))
        return twins


def best_sets(site: str, order: Sequence[Unit]) -> list[UnitSet]:
    """The best 1, 2, 5 … units by attribution, and all."""
    sizes = [size for size in SIZES if size < len(order)] + ([len(order)] if len(order) <= SIZES[-1] else [])
    return [UnitSet(f"attribution_top_{size}", site, [*order[:size]]) for size in sizes]


def csv_sets(path: Path, style: str) -> list[UnitSet]:
    """Sets of a table with the columns layer and head or neuron, and perhaps style and set (else one set, `csv`)."""
    table = read_csv(path, hint="give a table with the columns layer and head or neuron")
    kinds = [name for name in ("head", "neuron") if name in table]
    if len(kinds) != 1 or "layer" not in table:
        raise UserError(f"{path}: needs the columns layer and head or neuron; add them")
    table = table[table["style"] == style] if "style" in table else table
    if table.empty:
        raise UserError(f"{path}: names no {kinds[0]} for {style}; add some, or leave it out")
    for column in ("layer", kinds[0]):
        if table[column].dtype.kind not in "iu":
            raise UserError(f"{path}: its column {column} must hold a whole number in every line")
    names = table["set"].astype(str) if "set" in table else ["csv"] * len(table)
    for name in names:
        if re.fullmatch(r"attribution_top_.*|.*_random_\d+|all .*", name):
            raise UserError(f"{path}: the set {name!r} has a name that this script gives to its own sets; rename it")
    found: dict[str, list[Unit]] = {}
    for name, layer, number in zip(names, table["layer"], table[kinds[0]], strict=True):
        if (int(layer), int(number)) not in found.setdefault(name, []):
            found[name].append((int(layer), int(number)))
    return [UnitSet(name, "z" if kinds[0] == "head" else "mlp_post", units) for name, units in found.items()]


def check_units(sets: Sequence[UnitSet], counts: dict[str, list[int]], path: Path) -> None:
    """Raises UserError if a set of a table has a unit that the model lacks. counts: {site: units of each layer}, of the
    sites that are known."""
    for one in (one for one in sets if one.site in counts):
        kind, many = "head" if one.site == "z" else "neuron", counts[one.site]
        for layer, unit in one.units:
            if not 0 <= layer < len(many):
                raise UserError(f"{path}: layer {layer}: the model has layers 0 to {len(many) - 1}; choose among these")
            if not 0 <= unit < many[layer]:
                raise UserError(f"{path}: {kind} {unit}: layer {layer} has {kind}s 0 to {many[layer] - 1}")
