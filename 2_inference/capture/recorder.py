"""Everything that touches a model's inside: what is recorded while the model reads a prompt, without a second pass.

A `Recorder` puts its own function in front of the model's attention and hooks on its layers. `_Pass` collects what one
forward pass leaves, `rows_of` makes the fields of a .pt file's rows of it. The mass needs no [S, S] map: with M [S, R]
the one-hot regions of the keys, softmax(QKᵀ)·[V | M] is the layer's output and each query's exact mass on each region.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from command_line import UserError
from load_model import scaled_logits
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_mask
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

RAW_LAYERS = (0, 5, 10, 15)  # the default, as in the reference pipeline
# Regions that tokens of a prefix shared by all prompts can lie in; the rest of a prompt never touches them there.
PREFIX_REGIONS = ("all", "context", "first")
FLASH_HEAD_SIZE = 256  # the widest head of the fused kernels
MAP_ELEMENTS = 1 << 27  # an explicit attention map is made for as many queries at a time as fit into this
CACHE_ELEMENTS = 1 << 20  # and on a CPU into this, which its caches hold
TINY = torch.finfo(torch.float32).tiny
RENAMED = ("sdpa", "eager")  # kinds that get a name of their own for the recording function
MLP_NAMES = ("mlp", "feed_forward", "block_sparse_moe", "moe", "ffn")
ACTIVATIONS = ("act_fn", "act", "activation_fn", "activation", "act_func")
DOWN_PROJECTIONS = ("down_proj", "c_proj", "dense_4h_to_h", "fc2", "fc_out", "w2", "wo")


@dataclass(frozen=True)
class CaptureOptions:
    """What is recorded. `raw_layers` index like Hugging Face's `hidden_states` and `attentions`; `pooled_dtype` is that
    of the averaged states, None the model's."""

    raw_layers: tuple[int, ...] = RAW_LAYERS
    topk_logits: int = 10
    topk_positions: str = "last"
    neurons: bool = False
    gates: bool | None = None
    entropy: bool = False
    pooled_dtype: str | None = None


def chosen_raw_layers(wanted: Sequence[str] | None, layers: int) -> tuple[int, ...]:
    """Layer numbers of `--raw_layers` for a model of so many layers; RAW_LAYERS (default) as far as it has them."""
    if wanted is None or [*wanted] == [str(number) for number in RAW_LAYERS]:
        return tuple(number for number in RAW_LAYERS if number < layers)
    return () if [*wanted] == ["none"] else chosen_layers(wanted, layers, "--raw_layers")


def chosen_layers(wanted: Sequence[str], last_layer: int, flag: str) -> tuple[int, ...]:
    """Layer numbers from the words after a flag: numbers, ranges (0-5), -1 (the last), all."""
    numbers: set[int] = set()
    for text in wanted:
        found = re.fullmatch(r"(-?\d+)(?:-(\d+))?", f"0-{last_layer}" if text == "all" else text)
        if found is None:
            raise UserError(f"{flag} {text}: give layer numbers, ranges (0-5), -1 for the last, all, or none")
        first = int(found[1]) + (last_layer + 1 if found[1].startswith("-") else 0)
        last = int(found[2] or first)
        if not 0 <= first <= last <= last_layer:
            raise UserError(f"{flag} {text}: the model has layers 0 to {last_layer}; choose among these")
        numbers |= {*range(first, last + 1)}
    return tuple(sorted(numbers))


@dataclass
class AttentionCall:
    """A call of a layer's attention function. q [B,H,S,D], k and v [B,Hkv,Sk,D], the mask as the kernel takes it."""

    function: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    module: Any
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: Any
    kwargs: dict[str, Any]

    def run(self, **changes: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Output [B,S,H,D], and the map of eager attention; `changes` replace tensors of the call."""
        call = replace(self, **changes) if changes else self
        return call.function(call.module, call.q, call.k, call.v, call.mask, **call.kwargs)


@dataclass
class Capture:
    """What one forward pass over [B, S] tokens leaves, on the CPU once `copies` are whole.

    `sums` over the queries (tokens) of each region, not yet divided by their number, float32: mass [L,B,H,Q,R], hidden
    [L+1,B,P,D] and, if asked for, entropy [L,B,H,Q], neurons and gates [L,B,P,F]. Raw states {layer: [B,S,D]}, raw maps
    {layer: [B,H,S,Sk]}; logits of the recorded positions as top-k and logsumexp.
    """

    num_queries: int
    sums: dict[str, torch.Tensor]
    states: dict[int, torch.Tensor]
    maps: dict[int, torch.Tensor]
    copies: HostCopies
    topk: tuple[torch.Tensor, ...] | None = None


class HostCopies:
    """Copies of a pass's results to the CPU; from a GPU, on a stream of their own while the GPU goes on."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    @property
    def pending(self) -> bool:
        """Whether `wait` must be called before the copies are read."""
        return bool(self._streams)

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` on the CPU, whole after `wait`."""
        return self.stack([tensor])[0] if tensor.is_cuda else tensor.cpu()

    def stack(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        """Tensors of one shape, on any devices, stacked on the CPU; whole after `wait`."""
        if not any(tensor.is_cuda for tensor in tensors):
            return torch.stack([tensor.cpu() for tensor in tensors])
        stacked = torch.empty((len(tensors), *tensors[0].shape), dtype=tensors[0].dtype, pin_memory=True)
        for place, tensor in zip(stacked, tensors, strict=True):
            if tensor.device not in self._streams:
                self._streams[tensor.device] = torch.cuda.Stream(tensor.device)
            stream = self._streams[tensor.device]
            stream.wait_stream(torch.cuda.current_stream(tensor.device))
            with torch.cuda.stream(stream):
                place.copy_(tensor, non_blocking=True)
            tensor.record_stream(stream)  # or its memory would be given to others before it is read
        return stacked

    def wait(self) -> None:
        """Until all copies are whole."""
        for stream in self._streams.values():
            stream.synchronize()
        self._streams = {}


class Recorder:
    """Hooks on one model whose attention is `sdpa`, `eager`, `flex_attention` or a flash attention.

    Only one recorder may record at a time, for the attention function is the process's own: `active` is its pass.
    """

    active: Any = None  # has `recorder` and `attend(call)`: a `_Pass`, or a pass of another kind

    def __init__(self, model: Any, options: CaptureOptions):
        self.model, self.options = model, options
        self.backbone, self.layers = find_layers(model)
        self.num_layers = len(self.layers)
        self.base_attention = install_attention(model)

        def on_layer(layer: int, _module: Any, args: Any, kwargs: Any) -> None:
            if (current := self._current()) is not None:
                current.add_state(layer, args[0] if args else kwargs["hidden_states"])

        def on_mlp(layer: int, _module: Any, args: Any) -> None:
            if (current := self._current()) is not None:
                current.add_neurons("neurons", layer, args[0])

        def on_activation(layer: int, _module: Any, _args: Any, output: Any) -> None:
            if (current := self._current()) is not None:
                current.add_neurons("gates", layer, output)

        def on_backbone(_module: Any, _args: Any, output: Any) -> None:
            if (current := self._current()) is not None:
                last = output[0] if isinstance(output, tuple) else output.last_hidden_state
                current.add_state(self.num_layers, last)

        self._handles = [self.backbone.register_forward_hook(on_backbone)]
        for i, layer in enumerate(self.layers):
            self._handles.append(layer.register_forward_pre_hook(partial(on_layer, i), with_kwargs=True))
            if options.neurons:
                self._handles.append(down_projection(layer).register_forward_pre_hook(partial(on_mlp, i)))
            if options.gates:
                self._handles.append(activation_function(layer).register_forward_hook(partial(on_activation, i)))

    def _current(self) -> _Pass | None:
        return Recorder.active if Recorder.active is not None and Recorder.active.recorder is self else None

    def close(self) -> None:
        """Take the hooks off and give the model its own attention back."""
        for handle in self._handles:
            handle.remove()
        if self.base_attention in RENAMED:
            self.model.set_attn_implementation(self.base_attention)

    @contextmanager
    def recording(self, regions: torch.Tensor, pooled: list[int], num_queries: int) -> Iterator[_Pass]:
        """Record the next forward pass.

        `regions` [B, Sk, R] bool over the keys (pads in none); the pass's queries are the last `num_queries` of them.
        `pooled` are the columns whose tokens' states are averaged. The result is `pass.finish()` after the forward.
        """
        Recorder.active = _Pass(self, regions, pooled, num_queries)
        try:
            yield Recorder.active
        finally:
            Recorder.active = None


class _Pass:
    """What one forward pass leaves behind."""

    def __init__(self, recorder: Recorder, regions: torch.Tensor, pooled: list[int], num_queries: int):
        self.recorder, self.options = recorder, recorder.options
        self.num_queries = num_queries
        self.keys = regions.float()  # [B, Sk, R]
        self.queries = self.keys[:, -num_queries:].transpose(1, 2).contiguous()  # [B, Q, S]
        self.pools = self.queries[:, pooled]  # [B, P, S]
        self._moved: dict[tuple[int, torch.device, torch.dtype], torch.Tensor] = {}
        names = ("mass", "hidden", "entropy", "neurons", "gates")
        self.sums: dict[str, dict[int, torch.Tensor]] = {name: {} for name in names}
        self.states: dict[int, torch.Tensor] = {}
        self.maps: dict[int, torch.Tensor] = {}
        self.last_state: torch.Tensor | None = None

    def on(self, tensor: torch.Tensor, like: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """`tensor` on the device of `like` (layers may lie on several), moved once a pass."""
        key = (id(tensor), like.device, dtype)
        if key not in self._moved:
            self._moved[key] = tensor.to(like.device, dtype)
        return self._moved[key]

    def add_state(self, layer: int, state: torch.Tensor) -> None:
        if state.dim() != 3 or state.shape[1] != self.num_queries:
            raise cannot_capture(f"the states of layer {layer} are {[*state.shape]} for {self.num_queries} tokens")
        self.sums["hidden"][layer] = torch.bmm(self.on(self.pools, state), state.float())
        if layer in self.options.raw_layers:
            self.states[layer] = state.detach()
        if layer == self.recorder.num_layers:
            self.last_state = state.detach()

    def add_neurons(self, name: str, layer: int, activation: torch.Tensor) -> None:
        activation = activation.reshape(self.pools.shape[0], self.num_queries, -1)
        self.sums[name][layer] = torch.bmm(self.on(self.pools, activation), activation.float())

    def attend(self, call: AttentionCall) -> tuple[torch.Tensor, None]:
        """The layer's attention output; the mass of its queries on the regions is kept."""
        layer, q, k = call.module.layer_idx, call.q, call.k
        keys, regions = self.keys.shape[1:]
        if q.dim() != 4 or q.shape[2] != self.num_queries or k.shape[2] != keys:
            raise cannot_capture(f"layer {layer} attends from {[*q.shape]} to {[*k.shape]} over {keys} tokens")
        if layer in self.sums["mass"]:
            raise cannot_capture(f"layer {layer} attends more than once")
        if call.kwargs.get("scaling") is None:
            call.kwargs["scaling"] = q.shape[-1] ** -0.5  # before the heads are widened
        wants_map = layer in self.options.raw_layers and layer < self.recorder.num_layers
        if wants_map or self.options.entropy or self.recorder.base_attention == "eager":
            output, mass = self._by_map(call, keep_map=wants_map)
        else:
            output, mass = self._by_values(call)
        batch, queries, heads, _ = mass.shape
        sums = torch.bmm(self.on(self.queries, mass), mass.float().reshape(batch, queries, heads * regions))
        self.sums["mass"][layer] = sums.view(batch, -1, heads, regions).transpose(1, 2)
        return output, None

    def _by_values(self, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
        """Output [B,S,H,D] and mass [B,S,H,R]: the regions are extra value dimensions of the fused kernel."""
        q, v = call.q, call.v
        regions = self.on(self.keys, v, v.dtype)[:, None].expand(-1, v.shape[1], -1, -1)  # [B, Hkv, Sk, R]
        size, count = v.shape[-1], regions.shape[-1]
        width = -(-max(q.shape[-1], size + count) // 8) * 8
        if width > FLASH_HEAD_SIZE >= max(q.shape[-1], size) and count <= size:
            return call.run()[0], call.run(v=F.pad(regions, (0, size - count)))[0][..., :count]
        wide = torch.cat([v, regions, v.new_zeros(*v.shape[:-1], width - size - count)], dim=-1)
        fill = (0, width - q.shape[-1])
        both, _ = call.run(q=F.pad(q, fill), k=F.pad(call.k, fill), v=wide)  # [B, S, H, width]
        return both[..., :size].contiguous(), both[..., size : size + count]

    def _by_map(self, call: AttentionCall, keep_map: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """As `_by_values`, by explicit maps of a block of queries at a time: raw layers, entropy, eager models.

        Only the keys that a block's queries may see are multiplied: half of them for a causal model.
        """
        q, k, v = call.q, call.k, call.v
        batch, heads, queries, _ = q.shape
        keys, size = k.shape[2], v.shape[-1]
        eager = self.recorder.base_attention == "eager"
        regions = self.on(self.keys, v, v.dtype)[:, None].expand(-1, v.shape[1], -1, -1)
        ones = v.new_ones(*v.shape[:-1], 1)
        wide = torch.cat([v, regions, ones], dim=-1)  # one product gives the output, the mass, and the sum of the mass
        whole = q.new_empty(batch, queries, heads, wide.shape[-1])
        kept = q.new_zeros(batch, heads, queries, keys) if keep_map else None
        entropy = q.new_empty(batch, heads, queries, dtype=torch.float32) if self.options.entropy else None
        step = max(16, (MAP_ELEMENTS if eager or q.is_cuda else CACHE_ELEMENTS) // (batch * heads * keys))
        for start in range(0, queries, step):
            block = slice(start, min(start + step, queries))
            seen = visible_keys(call, self.recorder.base_attention, block)
            visible = slice(0, keys)
            if seen is not None and not eager and len(places := _allowed(seen).flatten(0, -2).any(0).nonzero()):
                visible = slice(int(places[0]), int(places[-1]) + 1)
            seen = None if seen is None else seen[..., visible]
            part = replace(call, q=q[:, :, block], k=k[:, :, visible], v=wide[:, :, visible], mask=seen)
            whole[:, block], probs = part.run() if eager else explicit_attention(part, self.recorder.base_attention)
            shares = probs
            if call.kwargs.get("s_aux", call.kwargs.get("sinks")) is not None:
                # Some eager functions take out the sink's share after the softmax: shares of what reaches the keys.
                shares = probs.float() / probs.float().sum(-1, keepdim=True).clamp(min=TINY)
                probs = shares * whole[:, block, :, -1:].transpose(1, 2)
            if entropy is not None:
                # H / log(number of keys the query may see); 0 if that is one key (not counted).
                count = torch.tensor(keys, device=q.device) if seen is None else _allowed(seen).sum(-1)
                relative = torch.special.entr(shares.float()).sum(-1) / count.clamp(min=2).float().log()
                entropy[:, :, block] = relative.where(count > 1, 0.0)
            if kept is not None:
                kept[:, :, block, visible] = probs
        if entropy is not None:
            weights = self.on(self.queries, q)[:, None]  # [B, 1, Q, S]
            self.sums["entropy"][call.module.layer_idx] = (weights @ entropy[..., None])[..., 0]
        if kept is not None:
            self.maps[call.module.layer_idx] = kept
        return whole[..., :size].contiguous(), whole[..., size:-1]

    def finish(self) -> Capture:
        """What the pass leaves. Raises UserError if some layer did not take part, or the layers differ in size."""
        if missing := {*range(self.recorder.num_layers)} - self.sums["mass"].keys():
            raise cannot_capture(f"layer {min(missing)} does not use transformers' attention interface")
        for name, parts in self.sums.items():
            if parts and len(parts) != self.recorder.num_layers + (name == "hidden"):
                raise cannot_capture(f"only {len(parts)} of its layers give their {name}")
        for name in ("neurons", "gates"):
            if len({one.shape[-1] for one in self.sums[name].values()}) > 1:
                raise UserError(f"--{name}: the MLPs of this model's layers differ in size; run without it")
        for what, name, axis in (("hidden size", "hidden", -1), ("number of heads", "mass", 1)):
            if len(sizes := {tensor.shape[axis] for tensor in self.sums[name].values()}) > 1:
                raise cannot_capture(f"the {what} differs between layers: {', '.join(map(str, sorted(sizes)))}")
        copies = HostCopies()
        in_order = {name: [parts[layer] for layer in sorted(parts)] for name, parts in self.sums.items() if parts}
        sums = {name: copies.stack(parts) for name, parts in in_order.items()}
        states, maps = ({i: copies.copy(one) for i, one in raw.items()} for raw in (self.states, self.maps))
        return Capture(self.num_queries, sums, states, maps, copies)


def explicit_attention(
    call: AttentionCall, base: str, edit: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [B,S,H,D] and probabilities [B,H,S,Sk]; grouped heads share their keys, which are not repeated.

    base: name of the attention whose mask and kind of softmax this is. edit: changes the probabilities before they are
    multiplied with the values. The call has its `scaling`, and as its mask what `visible_keys` returns.
    """
    q, mask = call.q, call.mask
    batch, heads, queries, size = q.shape
    groups = call.k.shape[1]
    grouped = (q * call.kwargs["scaling"]).reshape(batch, groups, -1, size)  # [B, Hkv, Hq / Hkv * S, D]
    scores = (grouped @ call.k.transpose(2, 3)).view(batch, heads, queries, -1)
    softcap, sinks = call.kwargs.get("softcap"), call.kwargs.get("s_aux")
    if base == "sdpa":
        softcap = sinks = None  # SDPA knows neither
    if call.kwargs.get("position_bias") is not None:
        raise UserError(
            "raw layers and entropy of attention with a position bias need --attn_implementation eager; "
            "or run with --raw_layers none and without --entropy"
        )
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        floor = torch.finfo(scores.dtype).min
        scores = scores.masked_fill_(~mask, floor) if mask.dtype == torch.bool else scores.add_(mask)
    if sinks is not None:  # learned logits that take a share of the attention to nowhere
        scores = torch.cat([scores, sinks.to(scores.dtype).view(1, -1, 1, 1).expand(batch, -1, queries, 1)], dim=-1)
    probs = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    if sinks is not None:
        probs = probs[..., :-1]
    if edit is not None:
        probs = edit(probs)
    output = (probs.view(batch, groups, -1, probs.shape[-1]) @ call.v).view(batch, heads, queries, -1)
    return output.transpose(1, 2), probs


def visible_keys(call: AttentionCall, base: str, block: slice) -> torch.Tensor | None:
    """What the block's queries may see, [B or 1, 1 or H, S, Sk], bool or additive; None: all of them.

    SDPA and eager come with it or with None, flash with the keys that are no pads [B, Sk], flex with a BlockMask.
    """
    q, mask, window = call.q, call.mask, call.kwargs.get("sliding_window")
    queries, keys = q.shape[2], call.k.shape[2]
    if hasattr(mask, "mask_mod"):

        def shifted(b: Any, h: Any, row: Any, column: Any) -> Any:
            return mask.mask_mod(b, h, row + block.start, column)

        return create_mask(shifted, q.shape[0], 1, block.stop - block.start, keys, device=q.device)
    if mask is not None and mask.dim() == 4:
        return mask[:, :, block, :keys] if mask.shape[2] > 1 else mask[..., :keys]
    if (queries == 1 and mask is None) or base == "eager":
        return None
    flash = base not in ("sdpa", "flex_attention")
    rows = torch.arange(block.start, block.stop, device=q.device)[:, None] + keys - queries
    columns = torch.arange(keys, device=q.device)
    if mask is None:
        mask = torch.ones(1, keys, dtype=torch.bool, device=q.device)
    seen = mask[:, None, None, :keys].bool() & (columns <= rows)
    if flash and window is not None:  # pads are taken out before the window is laid
        place = mask.long().cumsum(-1)
        seen = seen & (place[:, None, rows] - place[:, None, None] < window)
    return seen


def cannot_capture(what: str) -> UserError:
    """The error for a model of another kind."""
    return UserError(f"this model's attention cannot be captured: {what}; choose another model")


def _allowed(mask: torch.Tensor) -> torch.Tensor:
    """A bool or additive mask as bool: which keys a query may see."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


# --- from sums to rows of a file


class PassRows:
    """The rows of one forward pass (see `rows_of`): made at once, or, if copies from a GPU are under way, when the
    first row is asked for, which the thread that writes the file does."""

    def __init__(self, make: Callable[[], list[dict[str, Any]]], copies: list[HostCopies]):
        self._make, self._copies = make, copies
        if not any(one.pending for one in copies):
            self.rows  # noqa: B018 (made now)

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """The captured fields of each row."""
        for one in self._copies:
            one.wait()
        rows = self._make()
        del self._make  # and with it the sums of the pass
        return rows


@torch.inference_mode()
def rows_of(
    capture: Capture,
    masks: list[torch.Tensor],
    names: list[str],
    pooled: list[str],
    dtype: torch.dtype,
    prefix: Capture | None = None,
) -> list[dict[str, Any]]:
    """Per-row fields of a .pt file from a forward pass over the prompts' tokens after a shared prefix.

    `masks` hold each prompt's regions [S, R], prefix included; `names` are the R regions, `pooled` those whose states
    are averaged. `prefix` is the pass over the prefix alone (its regions are PREFIX_REGIONS). Means over an empty
    region are NaN. Pooled states come back in `dtype`. Raises UserError if they are too large for it.
    """
    places = [names.index(name) for name in pooled]
    if prefix is not None:
        into = torch.tensor([names.index(name) for name in PREFIX_REGIONS])
        capture.sums["mass"][:, :, :, into[:, None], into[None]] += prefix.sums["mass"]
        if "entropy" in capture.sums:
            capture.sums["entropy"][..., into] += prefix.sums["entropy"]
        for key in {"hidden", "neurons", "gates"} & capture.sums.keys():
            for place, name in enumerate(pooled):
                if name in PREFIX_REGIONS:
                    capture.sums[key][:, :, place] += prefix.sums[key][:, :, PREFIX_REGIONS.index(name)]
    counts = torch.stack([mask.sum(0) for mask in masks]).float()  # [B, R]
    first = torch.stack([mask[0] for mask in masks]).float()
    counts[counts == 0] = float("nan")
    of_pooled = counts[:, places]
    mass = (capture.sums["mass"] / counts[None, :, None, :, None]).half()
    states = capture.sums["hidden"] / of_pooled[None, :, :, None]
    hidden = states.to(dtype)
    if (hidden.isinf() & states.isfinite()).any():
        largest = f"{torch.finfo(dtype).max:.0f}, the largest number of {dtype}"
        raise UserError(f"the states of a prompt are above {largest}; use --pooled_dtype bfloat16")
    rows = []
    for b, mask in enumerate(masks):
        row: dict[str, Any] = {"region_mask": mask, "span_mass": mass[:, b], "hidden_pooled": hidden[:, b]}
        for key, field in (("neurons", "mlp_pooled"), ("gates", "gate_pooled")):
            if key in capture.sums:
                row[field] = (capture.sums[key][:, b] / of_pooled[b, :, None]).half()
        if "entropy" in capture.sums:
            seen_more = counts[b] - first[b]  # the first token sees one key: its entropy says nothing
            means = capture.sums["entropy"][:, b] / seen_more.where(seen_more > 0, torch.nan)
            row["attention_entropy"] = means.half()
        rows.append(row | _raw_fields(capture, prefix, b, len(mask)))
    return rows


def _raw_fields(capture: Capture, prefix: Capture | None, b: int, length: int) -> dict[str, Any]:
    """Raw states, maps and logits of row b's own tokens, behind those of the prefix."""
    shared = prefix.num_queries if prefix else 0
    own = length - shared

    def joined(before: torch.Tensor | None, after: torch.Tensor) -> torch.Tensor:
        return after[b, -own:] if before is None else torch.cat([before[0], after[b, -own:]])

    fields: dict[str, Any] = {}
    if capture.states:
        before = prefix.states if prefix else {}
        fields["hidden_states"] = {f"layer_{i}": joined(before.get(i), one) for i, one in capture.states.items()}
    if capture.maps:
        fields["attentions"] = {}
        for layer, maps in capture.maps.items():
            probs = maps[b, :, -own:, maps.shape[-1] - own :]  # a view: nothing is copied until the file is written
            if prefix:
                above = F.pad(prefix.maps[layer][0], (0, own))
                probs = torch.cat([above, torch.cat([maps[b, :, -own:, :shared], probs], dim=2)], dim=1)
            fields["attentions"][f"layer_{layer}"] = probs
    if capture.topk is not None:
        earlier = prefix.topk if prefix and prefix.topk is not None else (None, None, None)
        for name, one, value in zip(("topk_vals", "topk_indices", "logsumexp"), earlier, capture.topk, strict=True):
            fields[name] = joined(one, value)
    return fields


# --- logits


def top_logits(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, ...]:
    """Top-k values, indices and logsumexp of logits [..., V], float32 and int64 on the CPU."""
    logits = logits.float()
    values, indices = logits.topk(min(k, logits.shape[-1]), dim=-1)
    return values.cpu(), indices.cpu(), logits.logsumexp(-1).cpu()


def all_position_logits(
    model: Any, states: torch.Tensor, last_logits: torch.Tensor, k: int
) -> tuple[torch.Tensor, ...]:
    """Top-k, indices and logsumexp at every position of `states` [B,S,D], a few positions' logits in memory at a time.

    Raises UserError if the model does more to its logits than head, scale and softcap: that is seen at the last
    position, whose logits the model has computed itself.
    """
    head, config = model.get_output_embeddings(), model.config.get_text_config(decoder=True)
    step = max(1, (1 << 26) // (states.shape[0] * last_logits.shape[-1]))
    parts = []
    for some in states.split(step, dim=1):
        logits = scaled_logits(config, head(some.to(head.weight.device)))
        parts.append(top_logits(logits, k))
    own, expected = logits[:, -1].float(), last_logits.to(logits.device).float()
    if not torch.allclose(own, expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max())):
        raise UserError(f"{type(model).__name__} computes its logits in a way of its own; use --topk_positions last")
    return tuple(torch.cat(part, dim=1) for part in zip(*parts, strict=True))


# --- finding the parts of a model


def find_layers(model: Any) -> tuple[torch.nn.Module, list[torch.nn.Module]]:
    """The module whose output is the last hidden state, and its decoder layers in order."""
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    for backbone in (decoder, model.base_model, *model.modules()):
        for child in backbone.children() if backbone is not None else ():
            if isinstance(child, torch.nn.ModuleList) and len(child) == count:
                return backbone, list(child)
    raise UserError(f"{type(model).__name__} keeps its layers where they cannot be found; choose another model")


def attention_windows(config: Any) -> list[int]:
    """How many keys a query may see in each of the L layers, itself among them; 0: all before it, -1: not known."""
    config = config.get_text_config(decoder=True)
    slides = getattr(config, "use_sliding_window", None) is not False
    window = int((getattr(config, "sliding_window", None) if slides else None) or 0)
    known = {"full_attention": 0, "sliding_attention": window}
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return [known.get(kind, -1) for kind in kinds]


def down_projection(layer: torch.nn.Module) -> torch.nn.Module:
    """The MLP's last linear map, whose input are the neuron activations (after the activation function, and gated)."""
    return _module_of_mlp(layer, DOWN_PROJECTIONS, "MLP", "--neurons")


def activation_function(layer: torch.nn.Module) -> torch.nn.Module:
    """The MLP's activation function, whose output is the gate of a gated MLP, and else the neurons themselves."""
    return _module_of_mlp(layer, ACTIVATIONS, "activation function", "--gates")


def _module_of_mlp(layer: torch.nn.Module, names: Sequence[str], what: str, flag: str) -> torch.nn.Module:
    """The one module of a layer outside its attention that has one of these names. Raises UserError if there is none,
    or more than one, as in a mixture of experts."""
    modules = dict(layer.named_modules())
    found = [name for name in modules if name.rsplit(".", 1)[-1] in names and "attn" not in name]
    found = [name for name in found if "attention" not in name]
    if len(found) != 1 or any("expert" in name for name in modules):
        raise UserError(f"no single {what} in {type(layer).__name__} (a mixture of experts?); run without {flag}")
    return modules[found[0]]


def attention_module(layer: torch.nn.Module) -> torch.nn.Module:
    """The attention of a decoder layer, its output projection included."""
    found = [module for _, module in layer.named_children() if hasattr(module, "layer_idx")]
    if len(found) != 1:
        raise UserError(f"no single attention module in {type(layer).__name__}; choose another site than attn_out")
    return found[0]


def mlp_module(layer: torch.nn.Module) -> torch.nn.Module:
    """The MLP or mixture of experts of a decoder layer; if it has no module of its own, its last linear map."""
    children = dict(layer.named_children())
    return next((children[name] for name in MLP_NAMES if name in children), None) or down_projection(layer)


def install_attention(model: Any) -> str:
    """Put the recording function in front of the model's attention; returns the name of the attention it has.

    SDPA and eager get a name of their own, under which the mask must be registered too, or it is silently None. Flash
    and flex keep their name, by which transformers chooses kernels; outside a recording the function only passes on.
    """
    base = str(model.config.get_text_config(decoder=True)._attn_implementation or "eager")
    if base in RENAMED:
        name = "error_interp_over_" + base.replace("sdpa", "fused")  # a name with "sdpa" in it is refused by Gemma 2
        AttentionInterface.register(name, _recording_attention(base))
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
        model.set_attn_implementation(name)
    elif ("flash" in base or base == "flex_attention") and base in ALL_ATTENTION_FUNCTIONS:
        present = ALL_ATTENTION_FUNCTIONS[base]
        if not hasattr(present, "records"):
            ALL_ATTENTION_FUNCTIONS[base] = _recording_attention(base, present)
    else:
        raise UserError(
            f"attention {base!r} cannot be captured; use --attn_implementation sdpa, flash_attention_2, flex_attention "
            "or eager"
        )
    return base


def _recording_attention(base: str, function: Callable[..., Any] | None = None) -> Callable[..., Any]:
    def attention(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> Any:
        if base == "eager":
            kernel = sys.modules[type(module).__module__].eager_attention_forward
        else:
            kernel = function or ALL_ATTENTION_FUNCTIONS[base]
        if base in RENAMED or Recorder.active is not None:
            kwargs.pop("output_attentions", None)
        call = AttentionCall(kernel, module, query, key, value, attention_mask, kwargs)
        return call.run() if Recorder.active is None else Recorder.active.attend(call)

    attention.records = base  # type: ignore[attr-defined]
    return attention
