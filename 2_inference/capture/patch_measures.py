"""What patched logits say, what is patched in a run (its cells), and the proof that patching does what it says."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from command_line import UserError

from capture.patching import Pair, Patch, Patcher

WHOLE_SITES = ("resid_pre", "attn_out", "mlp_out")  # patched for groups of tokens; the others by head or neuron
HEAD_SITES = ("z", "pattern", "v")
MEASURES = ("nats", "nats_first", "sld", "restored", "answer_logprob")
# Largest difference of logits, in their standard deviations, that counts as none: float32, half precision.
SAME, SAME_HALF = 1e-3, 0.1
MOVED = 1e-6  # a random patch must move the logits by more, and by ten times what a patch of their own states does


# --- measures


def measures(
    logits: torch.Tensor,
    donor: torch.Tensor,
    recipient: torch.Tensor,
    response: list[int],
    dtype: torch.dtype = torch.float32,
) -> dict[str, torch.Tensor]:
    """How near rows [N, T, V] are to a donor [T, V], from the recipient [T, V], along a response of T tokens: each [N].

    nats       sum over the tokens of KL(donor ‖ row), in nats; `nats_first`: of the first token alone
    sld        sum of logit(a) - logit(b): a is the token whose d·ln(d/r) is largest, b the one of r·ln(r/d) (the signed
               logit difference of the tokens that tell donor d and recipient r apart)
    restored   whether every forced token is the row's likeliest: greedy decoding would write the donor's response
    """
    d, r = (one.to(dtype).log_softmax(-1) for one in (donor, recipient))
    up, down = (_largest(p.exp() * (p - q))[:, None] for p, q in ((d, r), (r, d)))
    shares, wanted = d.exp(), torch.tensor(response, device=logits.device)
    found: dict[str, list[torch.Tensor]] = {name: [] for name in MEASURES[:4]}
    for row in logits:  # one at a time: a vocabulary is large
        x = row.to(dtype).log_softmax(-1)
        nats = (d - x).mul_(shares).sum(-1)
        found["nats"].append(nats.sum())
        found["nats_first"].append(nats[0])
        found["sld"].append((x.gather(-1, up) - x.gather(-1, down)).sum())
        found["restored"].append((_largest(row) == wanted).all())
    return {name: torch.stack(values).cpu() for name, values in found.items()}


def _largest(values: torch.Tensor) -> torch.Tensor:
    """argmax over the last axis. On a CPU NumPy's, which takes a twentieth of the time of torch's."""
    return torch.from_numpy(values.float().numpy().argmax(-1)) if values.device.type == "cpu" else values.argmax(-1)


# --- cells


@dataclass(frozen=True)
class Cell:
    """One column of a file: a single site, layer (and head), or a named set of units; `patches` is what is done."""

    direction: str
    site: str
    positions: str
    layer: int
    head: int = -1
    donor: str = "own"
    set_name: str = ""
    patches: tuple[Patch, ...] = ()

    @property
    def row(self) -> tuple[Patch, ...]:
        """The patches of this cell."""
        return self.patches or (
            Patch(self.site, self.layer, self.positions, None if self.head < 0 else (self.head,), self.donor),
        )


def all_cells(
    direction: str,
    sites: Sequence[str],
    positions: Sequence[str],
    layers: Sequence[int],
    controls: Sequence[str],
    heads: dict[str, list[int]],
) -> list[Cell]:
    """Whole sites for groups of tokens, and their controls; every head alone, and all heads of all layers at once.

    Controls are other donors for the edited tokens (or the last of them). Heads and neurons are patched for all tokens.
    heads: how many each layer has, by site.
    """
    # 1. Whole sites.
    cells: list[Cell] = []
    for site, layer in ((site, layer) for site in sites if site not in HEAD_SITES for layer in layers):
        groups = positions if site in WHOLE_SITES else ("all",)
        cells += [Cell(direction, site, group, layer) for group in groups]
        edited = next((name for name in ("edited", "edited_last") if name in groups), None)
        cells += [Cell(direction, site, edited, layer, donor=donor) for donor in controls if edited]
    # 2. Heads, one by one and together; values and patterns are all that an attention layer does.
    by_head = [site for site in sites if site in HEAD_SITES]
    for site, layer in ((site, layer) for site in by_head for layer in layers):
        cells += [Cell(direction, site, "all", layer, head) for head in range(heads[site][layer])]
    for group in [(site,) for site in by_head] + [("pattern", "v")] * ({"pattern", "v"} <= {*by_head}):
        patches = tuple(Patch(site, layer, "all") for site in group for layer in layers)
        cells.append(Cell(direction, group[0], "all", -1, set_name=f"all {' + '.join(group)}", patches=patches))
    return cells


def in_order(cells: Iterable[Cell]) -> list[Cell]:
    """Cells by their first patched layer, so that a batch passes over as many layers as it can."""
    return sorted(cells, key=lambda cell: min(patch.layer for patch in cell.row))


# --- proof


def prove(patcher: Patcher, pair: Pair, sites: Sequence[str], batch_size: int, twins: bool = True) -> dict[str, float]:
    """What must hold for one prompt, as largest differences of logits in their standard deviations.

    Raises UserError if something does not hold. `plain`: the unpatched pair against the model's own forward pass, root
    mean square, as these are other kernels.
    `self`: patches of the recipient's own states. For `twins`, which differ in the edited tokens alone, also `all`:
    every token's residual stream makes the donor; `edited_0`: so do the edited tokens at layer 0; `after_0`,
    `readout_0`: no other token does anything there; nor do, at any layer, `before`: tokens before the edit.
    `random:<site>`: how far a random patch moves the logits.
    """
    # 1. The rows of the proof.
    middle = len(patcher.layers) // 2
    anywhere = "all" if twins else "readout"
    rows = {f"random:{site}": Patch(site, middle, anywhere, donor="random") for site in sites}
    rows |= {f"self:{site}": Patch(site, middle, anywhere, donor="recipient") for site in sites}
    if twins:
        at_layer = {"all": middle, "edited": 0, "after": 0, "readout": 0, "before": middle}
        rows |= {f"twin:{name}": Patch("resid_pre", layer, name) for name, layer in at_layer.items()}
    start = max(0, pair.shared - len(pair.groups["before"]))
    names = [*rows]
    batches = list(patcher.run(pair, [(rows[name],) for name in names], batch_size, start))

    # 2. How far each is from what it should be.
    found: dict[str, float] = {}
    scale = float(batches[0][1][1].float().std())
    for where, logits, _ in batches:
        donor, recipient = logits[0], logits[1]
        for name, row in zip([names[k] for k in where], logits[2:], strict=True):
            expected = donor if name in ("twin:all", "twin:edited") else recipient
            found[name] = float((row.float() - expected.float()).abs().max()) / scale
    plain = [_plain(patcher, ids, pair.response) for ids in (pair.donor, pair.recipient)]
    gaps = [float((a.float() - b.float()).square().mean().sqrt()) for a, b in zip(plain, batches[0][1], strict=False)]
    figures = {
        "plain": max(gaps if twins else gaps[1:]) / scale,
        "self": max(found[f"self:{site}"] for site in sites),
        **(
            {"all": found["twin:all"], "edited_0": found["twin:edited"], "after_0": found["twin:after"]}
            if twins
            else {}
        ),
        **({"readout_0": found["twin:readout"], "before": found["twin:before"]} if twins else {}),
        **{name: value for name, value in found.items() if name.startswith("random:")},
    }

    # 3. Is it near enough?
    same = SAME if patcher.model.dtype in (torch.float32, torch.float64) else SAME_HALF
    for name, value in figures.items():
        moves = name.startswith("random:")
        if not (value > max(MOVED, 10 * figures["self"]) if moves else value <= same):
            what = "does not move the logits" if moves else f"is {value:.2g} standard deviations of the logits off"
            raise UserError(f"this model cannot be patched: the proof {name!r} {what}; choose another model or site")
    return figures


def _plain(patcher: Patcher, ids: list[int], response: list[int]) -> torch.Tensor:
    """Logits [T, V] at the response, from a forward pass of the whole prompt without any of our code."""
    whole = torch.tensor([ids + response[:-1]], device=patcher.device)
    with torch.no_grad():
        return patcher.model(whole, use_cache=False).logits[0, len(ids) - 1 :]
