"""Activation patching: a recipient's forward pass in which some states are those of a donor prompt.

A batch is [donor, recipient, patched, patched …] of one prompt pair, all forced to write the donor's response. A
patched row is the recipient's, and at its sites, layers and tokens it copies row 0 while the batch runs. So a row that
copies everything is the donor bit by bit, and each row's baseline has gone through the same kernels as itself.

What need not be computed again is not. One pass of the unpatched pair gives the keys and values of the tokens before a
batch's first patched one, and the states at its first patched layer. Each row joins its batch at its own first patched
layer, as a copy of the recipient's row.

| site | what is replaced | unit |
| --- | --- | --- |
| resid_pre | residual stream at a layer's input | |
| attn_out, mlp_out | what the attention or MLP module returns | |
| z | output of a head before the output projection | query head |
| v | value vectors of a token, as every query reads them | key-value head |
| pattern | attention probabilities of a token's query, between softmax and values | query head |
| mlp_post | input of the MLP's last linear map (activation, times the gate's partner) | neuron |
"""

from __future__ import annotations

import inspect
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask

from capture.decode import new_cache
from capture.recorder import (
    RENAMED,
    AttentionCall,
    Recorder,
    attention_module,
    down_projection,
    explicit_attention,
    find_layers,
    install_attention,
    mlp_module,
    visible_keys,
)

SITES = ("resid_pre", "attn_out", "mlp_out", "z", "pattern", "v", "mlp_post")
FORCED = ("readout", "all")  # groups that hold the forced tokens besides tokens of the prompt
LIVE = ("own", "recipient", "random", "zero")  # donors that need no recorded states
OnState = Callable[[int, str, int, torch.Tensor], "torch.Tensor | None"]  # (branch, site, layer, state [B, tokens, …])


@dataclass(frozen=True)
class Patch:
    """States of a donor at one site of one layer, for the tokens of a group; `units`: only these heads or neurons.

    donor: `own` (row 0), `recipient` (no change), `random` (the recipient's state and a random direction as long as the
    donor's difference from it, for each token and head), `zero`, or the name of recorded `States`.
    """

    site: str
    layer: int
    positions: str
    units: tuple[int, ...] | None = None
    donor: str = "own"


@dataclass(frozen=True)
class Pair:
    """Token ids of a donor and a recipient, the response that both are forced to write, and groups of prompt tokens.

    groups: {name: positions in the recipient}. key: the row's number, on which random directions depend. answers:
    further continuations, whose log-probabilities are wanted.
    """

    key: int
    donor: list[int]
    recipient: list[int]
    response: list[int]
    groups: dict[str, list[int]]
    answers: list[list[int]] = field(default_factory=list)

    @property
    def shared(self) -> int:
        """Tokens that both begin with, the last prompt token never among them."""
        pairs = zip(self.donor[:-1], self.recipient[:-1], strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))

    @property
    def length(self) -> int:
        """Tokens of the recipient that are fed, with the response."""
        return len(self.recipient) + len(self.response) - 1

    @property
    def branches(self) -> list[list[int]]:
        """What is fed after the prompt: the response, then each answer that is not read off along the response."""
        return [self.response[:-1], *(ids[:-1] for ids in self.answers if not self.along_response(ids))]

    def along_response(self, answer: list[int]) -> bool:
        """Whether the logits of the response say how likely an answer is."""
        return len(answer) <= len(self.response) and answer[:-1] == self.response[: len(answer) - 1]


@dataclass
class States:
    """Recorded states of a prompt {(branch, site, layer): [tokens, …]}, and {group: positions in it}.

    They replace those of a recipient's group token by token; forced tokens follow those of the prompt. Without groups
    each is one state for every token.
    """

    groups: dict[str, list[int]]
    length: int  # of the prompt
    values: dict[tuple[int, str, int], torch.Tensor] = field(default_factory=dict)

    def keep(self, branch: int, site: str, layer: int, state: torch.Tensor) -> None:
        """As `Patcher.on_state`: the first row."""
        self.values[branch, site, layer] = state[0].detach().clone()

    def at(self, branch: int, patch: Patch, wanted: list[int]) -> torch.Tensor:
        """[tokens, …] for these places in the group."""
        if not self.groups:
            mean = self.values[0, patch.site, patch.layer]
            return mean.expand(len(wanted), *mean.shape)
        own = self.groups[patch.positions]
        begin = self.length if branch and patch.site != "v" else 0
        places = [own[i] if i < len(own) else self.length + i - len(own) for i in wanted]
        return self.values[branch, patch.site, patch.layer][[place - begin for place in places]]


class Patcher:
    """Runs patched batches on one model; `close` gives it back. `attend` makes it a pass of the recorder's attention.

    stored: recorded donors by name; with one named `own`, row 0 of a batch is not the donor. on_state: sees (and may
    replace) every state of the hooked sites. shared_text: tokens that all prompts begin with, read once. seed: of
    random directions.
    """

    recorder = None

    def __init__(self, model: Any, seed: int = 0):
        self.model, self.seed = model.requires_grad_(False), seed
        _, self.layers = find_layers(model)
        self.base = install_attention(model)
        self.device = model.get_input_embeddings().weight.device
        self.stored: dict[str, States] = {}
        self.on_state: OnState | None = None
        self._accepts = set(inspect.signature(model.forward).parameters)
        self._hooked: set[str] = set()
        self._handles = [one.register_forward_hook(partial(self._on_layer, i)) for i, one in enumerate(self.layers)]
        self._as_tuple = [False] * len(self.layers)
        self.shared_text: list[int] = []
        self._prefixes: dict[tuple[int, ...], Any] = {}  # of the shared text, and the last other one
        self._patches: dict[tuple[str, int], list[tuple[int, Patch]]] = {}
        self._pair = Pair(0, [], [], [], {})
        self._joins: Counter[int] = Counter()  # layer: how many rows are computed from there on
        self._entry: torch.Tensor | None = None  # states of the unpatched pair at the first of these layers
        self._rows = self._begin = self._branch = self._first = 0
        self.hook(["resid_pre"])

    def close(self) -> None:
        """Take the hooks off and give the model its own attention back."""
        for handle in self._handles:
            handle.remove()
        if self.base in RENAMED:
            self.model.set_attn_implementation(self.base)

    def hook(self, sites: Sequence[str]) -> None:
        """Reach these sites too. Raises UserError if the model lacks one."""
        finders: dict[str, Callable[[torch.nn.Module], torch.nn.Module]] = {
            "attn_out": attention_module,
            "mlp_out": mlp_module,
            "mlp_post": down_projection,
        }
        for site in sorted({*sites} - self._hooked):
            for i, layer in enumerate(self.layers):
                if site in ("resid_pre", "mlp_post"):
                    module, hook = finders.get(site, lambda one: one)(layer), partial(self._on_input, site, i)
                    self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
                elif site in finders:
                    hook = partial(self._on_output, site, i)
                    self._handles.append(finders[site](layer).register_forward_hook(hook))
            self._hooked.add(site)

    # --- inside a forward pass

    def _on_layer(self, layer: int, _module: Any, _args: Any, output: Any) -> None:
        self._as_tuple[layer] = isinstance(output, tuple)

    def _on_input(self, site: str, layer: int, _module: Any, args: Any, kwargs: Any) -> Any:
        if Recorder.active is not self or (site == "resid_pre" and layer < self._first):
            return None
        state = args[0] if args else kwargs["hidden_states"]
        if site == "resid_pre" and layer in self._joins:
            if layer == self._first:
                state = state[:2] if self._entry is None else self._entry.to(state.device)
            state = torch.cat([state, state[1:2].expand(self._joins[layer], -1, -1)])
            self._rows = len(state)
        state = self._edited(site, layer, state)
        args = tuple(map(self._of_rows, args))
        kwargs = {name: self._of_rows(value) for name, value in kwargs.items()}
        return ((state, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": state})

    def _of_rows(self, value: Any) -> Any:
        """A mask, which is made for all rows of the batch, for those that have joined it."""
        is_mask = isinstance(value, BlockMask) or (isinstance(value, torch.Tensor) and value.dim() == 4)
        return value[: self._rows] if is_mask else value

    def _on_output(self, site: str, layer: int, _module: Any, _args: Any, output: Any) -> Any:
        if Recorder.active is not self:
            return None
        state = self._edited(site, layer, output[0] if isinstance(output, tuple) else output)
        return (state, *output[1:]) if isinstance(output, tuple) else state

    def attend(self, call: AttentionCall) -> tuple[torch.Tensor, None]:
        """The layer's attention with its patches of `v`, `pattern` and `z`."""
        layer, queries = call.module.layer_idx, call.q.shape[2]
        if call.kwargs.get("scaling") is None:
            call.kwargs["scaling"] = call.q.shape[-1] ** -0.5
        call.v = self._edited("v", layer, call.v.transpose(1, 2)).transpose(1, 2)
        if ("pattern", layer) in self._patches:

            def edit(probs: torch.Tensor) -> torch.Tensor:
                return self._edited("pattern", layer, probs.transpose(1, 2)).transpose(1, 2)

            call.mask = visible_keys(call, self.base, slice(0, queries)) if self.base != "eager" else call.mask
            output = explicit_attention(call, self.base, edit)[0].contiguous()
        else:
            output = call.run()[0]
        return self._edited("z", layer, output), None

    def _edited(self, site: str, layer: int, state: torch.Tensor) -> torch.Tensor:
        """`state` [B, tokens, …] with the patches of its site."""
        shape, patches = state.shape, self._patches.get((site, layer), ())
        state = state.reshape(self._rows, -1, shape[-1]) if len(shape) == 2 else state  # some MLPs see tokens in a row
        if self.on_state is not None and site in self._hooked:
            changed = self.on_state(self._branch, site, layer, state)
            state = state if changed is None else changed
        state = state.clone() if patches else state
        for row, patch in patches:
            at, wanted = self._places(patch.positions, 0 if site == "v" else self._begin, state.shape[1])
            if not at:
                continue
            new = self._source(patch, state, at, wanted)
            if patch.units is None:
                state[row, at] = new
            else:
                units = torch.tensor(patch.units, device=state.device)
                state[row, torch.tensor(at, device=state.device)[:, None], units] = new[:, units]
        return state.reshape(shape)

    def _places(self, group: str, begin: int, count: int) -> tuple[list[int], list[int]]:
        """Where a group's tokens are among `count` tokens from position `begin` on, and their places in the group."""
        own, length = self._pair.groups[group], len(self._pair.recipient)
        pairs = [(position, i) for i, position in enumerate(own) if begin <= position < begin + count]
        if group in FORCED:
            forced = range(max(begin, length), begin + count)
            pairs += [(position, len(own) + position - length) for position in forced]
        return [position - begin for position, _ in pairs], [i for _, i in pairs]

    def _source(self, patch: Patch, state: torch.Tensor, at: list[int], wanted: list[int]) -> torch.Tensor:
        """What a patch puts in, [tokens, …]."""
        if patch.donor == "zero":
            return torch.zeros_like(state[1, at])
        if patch.donor not in LIVE:
            return self.stored[patch.donor].at(self._branch, patch, wanted).to(state)
        if patch.donor == "recipient":
            return state[1, at]
        stored = self.stored.get("own")
        own = state[0, at] if stored is None else stored.at(self._branch, patch, wanted).to(state)
        if patch.donor == "own":
            return own
        before = state[1, at].float()
        seed = zlib.crc32(f"{self.seed}/{self._pair.key}/{patch.site}/{patch.layer}/{self._branch}".encode())
        noise = torch.randn(before.shape, generator=torch.Generator().manual_seed(seed)).to(before)
        if patch.site == "pattern":  # over the keys that the query sees
            shares = noise.masked_fill(before == 0, -torch.inf).softmax(-1)
            return (shares.nan_to_num() * before.sum(-1, keepdim=True)).to(state)
        length = (own.float() - before).norm(dim=-1, keepdim=True)
        return torch.where(length > 0, before + length * F.normalize(noise, dim=-1), before).to(state)

    @contextmanager
    def _active(self) -> Iterator[None]:
        """While inside, layers before `_first` hand on what they are given, and the recorder's attention is ours."""
        passed = self.layers[: self._first]
        before = [layer.__dict__.get("forward") for layer in passed]  # accelerate keeps its own there
        Recorder.active = self
        try:
            for i, layer in enumerate(passed):
                layer.forward = partial(_hand_on, self._as_tuple[i])
            yield
        finally:
            Recorder.active = None
            for layer, forward in zip(passed, before, strict=True):
                del layer.forward
                if forward is not None:
                    layer.forward = forward

    def _forward(self, ids: torch.Tensor, cache: Any, keep: int) -> torch.Tensor:
        """Logits [B, keep, V] of the last positions of ids [B, n] behind the cache."""
        self._rows, self._begin = ids.shape[0], cache.get_seq_length()
        total = self._begin + ids.shape[1]
        inputs: dict[str, Any] = {"input_ids": ids, "past_key_values": cache, "use_cache": True}
        inputs["attention_mask"] = torch.ones(len(ids), total, dtype=torch.long, device=self.device)
        if "position_ids" in self._accepts:
            inputs["position_ids"] = torch.arange(self._begin, total, device=self.device)[None]  # of however many rows
        if "logits_to_keep" in self._accepts:
            inputs["logits_to_keep"] = torch.arange(ids.shape[1] - keep, ids.shape[1], device=self.device)
        with self._active():
            return self.model(**inputs).logits[:, -keep:]

    # --- a sweep

    @torch.no_grad()
    def run(
        self, pair: Pair, rows: Sequence[tuple[Patch, ...]], batch_size: int, start: int | None = None
    ) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor]]:
        """Batches of (which rows, logits [2 + rows, T, V] at the response, log-probabilities [2 + rows, A] of answers).

        The first two of a batch are the donor and the recipient (twice the recipient, if the donor's prompt is of
        another length), the others the recipient with the patches of each of `rows`, in an order that saves work.
        start: position from which every row is computed; default: the first token that its patches change.
        """
        # 1. What all rows share: the keys, values and layers' inputs of the unpatched pair.
        self.hook([patch.site for row in rows for patch in row])
        starts = [_first_token(pair, row) if start is None else start for row in rows]
        begin = min([pair.shared if start is None else start, *starts])
        donor = pair.donor if len(pair.donor) == len(pair.recipient) else pair.recipient
        known = self.prefix(pair.recipient[:begin])
        entries: dict[tuple[int, int], torch.Tensor] = {}

        def keep_entry(branch: int, site: str, layer: int, state: torch.Tensor) -> None:
            if site == "resid_pre":
                entries[branch, layer] = state[:2].clone()

        # 2. The batches: rows that begin at near tokens together, then by layer. The first one may be such a pass, too.
        order = sorted(range(len(rows)), key=lambda k: (starts[k], _first_layer(rows[k])))
        for some in _batches(order, starts, len(pair.recipient) + len(pair.response), batch_size):
            some, first = sorted(some, key=lambda k: _first_layer(rows[k])), starts[some[0]]
            batch, prompts = [rows[k] for k in some], [donor[first:], pair.recipient[first:]]
            is_whole = first == begin and _first_layer(batch[0]) == 0
            if not entries and not is_whole:
                self.sweep(pair, [donor[begin:], pair.recipient[begin:]], known, on_state=keep_entry)
            cache = _cache_of(known, first, batch)
            if entries:
                states = {key: state if key[0] else state[:, first - begin :] for key, state in entries.items()}
                logits, answers = self.sweep(pair, prompts, cache, batch, states)
            else:
                logits, answers = self.sweep(pair, prompts, cache, batch, on_state=keep_entry)
                known = _cache_of(cache, len(pair.recipient), ())
            yield some, logits, answers

    @torch.no_grad()
    def record(self, pair: Pair, sites: Sequence[str]) -> tuple[States, torch.Tensor, torch.Tensor]:
        """States of the recipient's prompt alone, its logits [1, T, V] and answers [1, A]."""
        self.hook(sites)
        found = States(pair.groups, len(pair.recipient))
        logits, answers = self.sweep(pair, [pair.recipient], new_cache(len(self.layers)), on_state=found.keep)
        return found, logits, answers

    @torch.no_grad()
    def respond(
        self, ids: list[int], longest: int, ends: frozenset[int], stopped: Callable[[list[int]], bool]
    ) -> list[int]:
        """Greedy response of at most `longest` tokens, the one that ends it included."""
        text = self._text_of(ids)
        cache, fed = self.prefix(text, 1), ids[len(text) :]
        response: list[int] = []
        while len(response) < longest and not (response and (response[-1] in ends or stopped(response))):
            logits = self.plain([fed], cache, 1)
            fed = [int(logits[0, -1].argmax())]
            response += fed
        return response

    @torch.no_grad()
    def prefix(self, ids: list[int], rows: int = 2) -> Any:
        """A new cache of rows that begin with these tokens; what the last one was made of is kept."""
        key = tuple(ids)
        if ids and key not in self._prefixes:
            text = self._text_of(ids)
            cache = self.prefix(text, 1)
            self.plain([ids[len(text) :]], cache, 1)
            self._prefixes = {one: kept for one, kept in self._prefixes.items() if one == tuple(self.shared_text)}
            self._prefixes[key] = cache
        return new_cache(len(self.layers), self._prefixes.get(key), rows)

    def _text_of(self, ids: list[int]) -> list[int]:
        """The shared text, if these tokens are that and more."""
        text = self.shared_text
        return text if len(ids) > len(text) and ids[: len(text)] == text else []

    def plain(self, ids: list[list[int]], cache: Any, keep: int, on_state: OnState | None = None) -> torch.Tensor:
        """Logits [B, keep, V] of the last positions of a batch [B, n] behind the cache, without patches."""
        self._pair, self._patches, self._joins = Pair(0, [], [], [], {}), {}, Counter()
        self._entry, self._first, self._branch, self.on_state = None, 0, 0, on_state
        return self._forward(torch.tensor(ids, device=self.device), cache, keep)

    def sweep(
        self,
        pair: Pair,
        prompts: list[list[int]],
        cache: Any,
        rows: Sequence[tuple[Patch, ...]] = (),
        entries: dict[tuple[int, int], torch.Tensor] | None = None,
        on_state: OnState | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One batch: `prompts` (of equal length, behind the cache) and a patched copy of the last for each of `rows`.

        rows: those with lower first layers before the others; each is computed from its first patched layer on.
        entries: inputs of the layers for `prompts` {(branch, layer): [prompts, tokens, D]}; with them `prompts` are
        computed from the first row's layer on. Without them, a row (if there is one) must be patched at layer 0.
        """
        # 1. The patches by site and layer, and which row joins where.
        self._pair, self.on_state, self._patches = pair, on_state, {}
        for place, row in enumerate(rows, len(prompts)):
            for patch in row:
                self._patches.setdefault((patch.site, patch.layer), []).append((place, patch))
        self._joins = Counter(map(_first_layer, rows))
        self._first = min(self._joins, default=0) if entries else 0
        copies = [*prompts, *[prompts[-1]] * len(rows)]

        # 2. The prompt and the response; then further answers behind the prompt.
        found: list[torch.Tensor] = []
        for branch, tail in enumerate(pair.branches):
            if branch:
                self._cut(cache, len(pair.recipient), self._first)
            self._branch, self._entry = branch, entries[branch, self._first] if entries else None
            ids = [ids + tail for ids in copies] if branch == 0 else [tail] * len(copies)
            keep = len(pair.response) if branch == 0 else len(tail)
            found.append(self._forward(torch.tensor(ids, device=self.device), cache, keep))
        return found[0], _answer_logprobs(pair, found)

    def _cut(self, cache: Any, length: int, first: int) -> None:
        """Leave the prompt alone in the cache. Layers that are passed over only need its length."""
        for i, layer in enumerate(cache.layers):
            if i < first:
                blank = cache.layers[first].keys[:, :1, :1, :1].expand(-1, 1, length, 1)
                layer.replace(blank, blank)
            elif layer.is_initialized:
                layer.replace(layer.keys[:, :, :length], layer.values[:, :, :length])


def _first_layer(row: tuple[Patch, ...]) -> int:
    return min(patch.layer for patch in row)


def _first_token(pair: Pair, row: tuple[Patch, ...]) -> int:
    """The first position that a row's patches change; at the latest the prompt's last token, whose logits are read."""
    last = len(pair.recipient) - 1
    starts = [min(pair.groups[patch.positions], default=last) for patch in row]
    after_shared = all(patch.donor in ("own", "recipient", "random") for patch in row)  # before it, these do nothing
    return min(last, max(min(starts), pair.shared if after_shared else 0))


def _batches(order: Sequence[int], starts: Sequence[int], end: int, size: int) -> Iterator[list[int]]:
    """Rows in this order, at most `size` together. A batch computes all tokens from its first row's start to the end.

    So rows that start later begin a batch, if that costs less: there the donor and the recipient are computed again.
    """
    alike = Counter(starts)
    some: list[int] = []
    for k in order:
        first = starts[some[0]] if some else starts[k]
        wasted = min(size - len(some), alike[starts[k]]) * (starts[k] - first)
        if some and (len(some) == size or (starts[k] > starts[some[-1]] and wasted > 2 * (end - starts[k]))):
            yield some
            some = []
        some = [*some, k]
    if some:
        yield some


def _cache_of(known: Any, length: int, rows: Sequence[tuple[Patch, ...]]) -> Any:
    """The first keys and values of `known` (donor, recipient) for a batch: the recipient's also for the rows that each
    layer computes."""
    cache, firsts = new_cache(len(known.layers)), [_first_layer(row) for row in rows]
    for i, (layer, given) in enumerate(zip(cache.layers, known.layers, strict=True)):
        if given.is_initialized and length:
            own = [0, 1] + [1] * sum(first <= i for first in firsts)
            layer.replace(given.keys[own, :, :length], given.values[own, :, :length])
    return cache


def _hand_on(as_tuple: bool, hidden_states: torch.Tensor, *_: Any, **__: Any) -> Any:
    """The forward of a layer that is passed over."""
    return (hidden_states,) if as_tuple else hidden_states


def _answer_logprobs(pair: Pair, logits: list[torch.Tensor]) -> torch.Tensor:
    """Log-probabilities [B, A] of the accepted answers, from the logits of the response and of each further branch."""
    found, further = [], iter(logits[1:])
    for ids in pair.answers:
        own = logits[0][:, : len(ids)]
        if not pair.along_response(ids):
            own = torch.cat([logits[0][:, :1], next(further)], dim=1)
        wanted = torch.tensor(ids, device=own.device).expand(len(own), -1)
        found.append(own.float().log_softmax(-1).gather(2, wanted[..., None]).sum((1, 2)))
    return torch.stack(found, 1) if found else logits[0].new_empty(len(logits[0]), 0, dtype=torch.float32)
