"""Generation that wastes nothing: a shared prefix is read once, finished rows leave the batch, waiting ones join it.

`Generator.run` takes prompts and yields each one's captures and responses as they are done, in any order. What a
prompt yields does not depend on its neighbours: rows are padded and masked, positions are the row's own, and random
numbers are a function of (seed, row, sample, step, token), not of the batch.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from command_line import one_line
from token_spans import control_tokens
from transformers import (
    Cache,
    DynamicLayer,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from capture.recorder import PREFIX_REGIONS, Capture, PassRows, Recorder, all_position_logits, rows_of, top_logits

SPARE_POSITIONS = 32  # a cache layer grows by this many positions at a time
LEAVE_TOGETHER = 0.25  # share of the rows that must be finished before they leave the batch
LOGITS_AT_ONCE = 1 << 26  # of forced tokens
TAIL_TOKENS = 24  # a stop string is looked for in the text of this many last tokens, and its own length more


@dataclass(frozen=True)
class Prompt:
    """One prompt to run. `key` tells rows apart and is the same in every style: random numbers depend on it.

    `forced` holds continuations whose log-probabilities after this prompt are wanted, in lists with a name each.
    `response_ids`: the tokens of a response that was made elsewhere.
    """

    key: int
    input_ids: list[int]
    region_mask: torch.Tensor  # [S, R] bool
    forced: Mapping[str, list[list[int]]] = field(default_factory=dict)
    response_ids: list[int] | None = None


@dataclass(frozen=True)
class GenerationOptions:
    """How responses are made. Temperature 0 is greedy."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 0
    num_samples: int = 1
    stop_strings: tuple[str, ...] = ()
    eos_token_ids: frozenset[int] = frozenset()
    response_logprobs: bool = False


@dataclass
class Response:
    """A response under way or done. `finish_reason`: eos, stop or length; given: it was made elsewhere."""

    prompt: Prompt
    sample: int
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text: str = ""
    finish_reason: str = ""


@dataclass
class Result:
    """All that one prompt yields: a row of the pass that read it, and responses; `error` says why there are none."""

    prompt: Prompt
    rows: PassRows | None = None
    row: int = 0
    responses: list[Response] = field(default_factory=list)
    forced_logprobs: dict[str, list[list[float]]] = field(default_factory=dict)  # as `forced`: of each token
    error: str | None = None

    @property
    def fields(self) -> dict[str, Any]:
        """The captured fields; waits while they are still being copied from a GPU."""
        return self.rows.rows[self.row] if self.rows else {}


# --- a cache whose rows can leave and join


class GrowingLayer(DynamicLayer):
    """Keys and values of a layer in a buffer with spare room: a step copies one position and not all of them."""

    buffers: list[torch.Tensor] | None = None

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Append [B, H, n, D] keys and values; returns all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        old = self.get_seq_length()
        new = old + key_states.shape[-2]
        added = (key_states, value_states)
        if self.buffers is None or self.buffers[0].shape[-2] < new:
            self.buffers = [one.new_empty(*one.shape[:2], new + SPARE_POSITIONS, one.shape[-1]) for one in added]
            held: Any = (self.keys, self.values) if old else ()
            for buffer, kept in zip(self.buffers, held, strict=False):
                buffer[:, :, :old] = kept
        for buffer, one in zip(self.buffers, added, strict=True):
            buffer[:, :, old:new] = one
        self.keys, self.values = (buffer[:, :, :new] for buffer in self.buffers)
        return self.keys, self.values

    def replace(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Hold these keys and values instead."""
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self.keys, self.values, self.buffers = keys, values, None


def new_cache(layers: int, source: Any = None, batch: int = 1) -> Any:
    """An empty cache, or one of `batch` rows that begins with those of `source`, or its single one (not copied)."""
    cache: Any = Cache(layers=[GrowingLayer() for _ in range(layers)])
    for layer, given in zip(cache.layers, source.layers if source else (), strict=False):
        if given.is_initialized:
            layer.replace(given.keys.expand(batch, -1, -1, -1), given.values.expand(batch, -1, -1, -1))
    return cache


def _filled(cache: Any) -> list[Any]:
    return [layer for layer in cache.layers if layer.is_initialized]  # some models' last layers read another's keys


def select_rows(cache: Any, rows: torch.Tensor, drop: int = 0, repeats: int = 1) -> None:
    """Keep these rows, each `repeats` times, without their first `drop` positions."""
    for layer in _filled(cache):
        index = rows.to(layer.keys.device).repeat_interleave(repeats)
        layer.replace(layer.keys[:, :, drop:].index_select(0, index), layer.values[:, :, drop:].index_select(0, index))


def join_rows(cache: Any, other: Any) -> None:
    """Add the rows of `other` below those of `cache`; the shorter ones get masked positions on the left."""
    length = max(cache.get_seq_length(), other.get_seq_length())

    def stacked(above: torch.Tensor, below: torch.Tensor) -> torch.Tensor:
        joined = above.new_zeros(above.shape[0] + below.shape[0], above.shape[1], length, above.shape[-1])
        joined[: above.shape[0], :, length - above.shape[2] :] = above
        joined[above.shape[0] :, :, length - below.shape[2] :] = below
        return joined

    for layer, added in zip(_filled(cache), _filled(other), strict=True):
        layer.replace(stacked(layer.keys, added.keys), stacked(layer.values, added.values))


# --- choosing tokens


def uniform_noise(seeds: torch.Tensor, size: int) -> torch.Tensor:
    """Uniform numbers in (0, 1), [B, size] float32 of 23 bits: a hash of (seeds[b], column), the same on every device.

    Two rounds of the 64-bit finaliser of SplitMix64 (Steele, Lea & Flood 2014), in arithmetic modulo 2^64.
    """
    x = seeds[:, None] + torch.arange(size, device=seeds.device) * -7046029254386353131  # the golden gamma
    for _ in range(2):
        x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
        x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
        x = x ^ ((x >> 31) & 0x1FFFFFFFF)
    return (((x >> 41) & 0x7FFFFF).float() + 0.5) / (1 << 23)  # 24 bits would round up to 1.0


def noise_seed(seed: int, key: int, sample: int, step: int) -> int:
    """64-bit seed of one step of one response, as a signed integer. The style has no part in it: the same random
    numbers meet every style of a row, so that their difference is not sampling noise (common random numbers)."""
    digest = hashlib.blake2b(f"{seed}/{key}/{sample}/{step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def choose_tokens(
    options: GenerationOptions, logits: torch.Tensor, responses: list[Response]
) -> tuple[list[int], list[float]]:
    """Next tokens of responses under way, greedy or by Gumbel-max sampling, from logits [B, V].

    Returns token ids and, if wanted, their log-probabilities (of the model, before temperature).
    """
    logits = scores = logits.float()
    if options.repetition_penalty != 1.0:  # row by row, for a pad among the ids would be penalised too
        penalise = RepetitionPenaltyLogitsProcessor(options.repetition_penalty)
        seen = [torch.tensor([r.prompt.input_ids + r.ids], device=logits.device) for r in responses]
        scores = torch.cat([penalise(ids, logits[b : b + 1]) for b, ids in enumerate(seen)])
    if options.temperature > 0:
        warpers: list[Any] = [TemperatureLogitsWarper(options.temperature)]
        warpers += [TopKLogitsWarper(options.top_k)] if options.top_k > 0 else []
        warpers += [TopPLogitsWarper(options.top_p)] if options.top_p < 1.0 else []
        for warp in warpers:
            scores = warp(torch.empty(0, dtype=torch.long), scores)  # none of them looks at the ids
        seeds = [noise_seed(options.seed, r.prompt.key, r.sample, len(r.ids)) for r in responses]
        noise = uniform_noise(torch.tensor(seeds, dtype=torch.int64, device=logits.device), logits.shape[1])
        scores = scores - (-noise.log()).log()  # argmax(logits + Gumbel noise) is a draw from softmax(logits)
    tokens = scores.argmax(dim=-1)
    logprobs: list[float] = []
    if options.response_logprobs:
        logprobs = (logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(-1)).tolist()
    return tokens.tolist(), logprobs


# --- the generator


@dataclass
class _Active:
    """The rows being decoded: their cache, which of its positions are real [B, S], and the tokens to feed next."""

    responses: list[Response]
    cache: Any
    mask: torch.Tensor
    next_ids: list[int]

    @property
    def running(self) -> list[int]:
        """Rows whose response is not finished."""
        return [b for b, response in enumerate(self.responses) if not response.finish_reason]

    def without_finished(self) -> _Active:
        """Without the rows of finished responses, and without positions that are padding in every row that stays."""
        staying = self.running
        if len(staying) == len(self.responses):
            return self
        rows = torch.tensor(staying, device=self.mask.device)
        mask = self.mask[rows]
        drop = int(mask.any(0).to(torch.uint8).argmax())
        select_rows(self.cache, rows, drop)
        responses, next_ids = [self.responses[b] for b in staying], [self.next_ids[b] for b in staying]
        return _Active(responses, self.cache, mask[:, drop:], next_ids)

    def joined(self, other: _Active) -> _Active:
        """Both sets of rows in one."""
        above = self.without_finished()
        join_rows(above.cache, other.cache)
        length = max(above.mask.shape[1], other.mask.shape[1])
        masks = [torch.nn.functional.pad(one.mask, (length - one.mask.shape[1], 0)) for one in (above, other)]
        responses, next_ids = above.responses + other.responses, above.next_ids + other.next_ids
        return _Active(responses, above.cache, torch.cat(masks), next_ids)


@dataclass(frozen=True)
class _Prefix:
    ids: list[int]
    cache: Any
    capture: Capture


class Generator:
    """Runs prompts through a model with its `Recorder`. Options of the style: `names` of regions, those `pooled`.

    `stop` is set when nothing new is to be begun, `progress` is given what is read and decoded (see `Progress`).
    """

    def __init__(self, model: Any, tokenizer: Any, recorder: Recorder, options: GenerationOptions, batch_limit: Any):
        self.model, self.tokenizer, self.recorder, self.options = model, tokenizer, recorder, options
        self.limit = batch_limit
        self.control_tokens = control_tokens(tokenizer)
        self.device = model.get_input_embeddings().weight.device
        self.accepts = set(inspect.signature(model.forward).parameters)
        self.prefix: _Prefix | None = None
        self.prefill_tokens = self.prompt_tokens = 0
        self.crowded = False  # one prompt more did not fit beside those that are decoded
        self.captures = True
        self.progress: Any = None
        self.stop = threading.Event()

    def twin(self, names: list[str], pooled: list[str]) -> Generator:
        """Another generator on the same model and prefix, for regions of its own."""
        other = Generator(self.model, self.tokenizer, self.recorder, self.options, self.limit)
        other.prefix = self.prefix
        other.set_regions(names, pooled)
        return other

    def scorer(self) -> Generator:
        """Another generator on the same model and prefix that captures and generates nothing: results have
        `forced_logprobs` alone."""
        other = self.twin([], [])
        other.options, other.captures = replace(self.options, max_new_tokens=0, num_samples=1), False
        return other

    def set_regions(self, names: list[str], pooled: list[str]) -> None:
        """The regions of the prompts to come (they differ between styles)."""
        self.names, self.pooled = names, pooled

    @torch.inference_mode()
    def set_prefix(self, ids: list[int]) -> None:
        """Read the tokens that all prompts begin with; the prompts to come are read from there on. [] for none."""
        self.prefix = None
        if not ids:
            return
        regions = torch.ones(1, len(ids), len(PREFIX_REGIONS), dtype=torch.bool)
        regions[:, 1:, PREFIX_REGIONS.index("first")] = False
        cache = new_cache(self.recorder.num_layers)
        mask = torch.ones(1, len(ids), dtype=torch.bool, device=self.device)
        with self.recorder.recording(regions, list(range(len(PREFIX_REGIONS))), len(ids)) as recorded:
            logits = self._forward(torch.tensor([ids], device=self.device), mask, cache)[:, -1]
        capture = recorded.finish()
        capture.topk = self._topk(recorded, logits) if self.recorder.options.topk_positions == "all" else None
        self.prefix = _Prefix(ids, cache, capture)
        self.prefill_tokens += len(ids)

    @torch.inference_mode()
    def run(self, windows: Iterable[list[Prompt]]) -> Iterator[Result]:
        """Results in the order in which they are done. A prompt that cannot run alone comes back with its error.

        A window is a list of prompts, best of similar length side by side; the next one is asked for when the last
        prompt of one has been read, so that its rows fill the batch that is still being decoded.
        """
        source = iter(windows)
        waiting: deque[Prompt] = deque()
        under_way: dict[int, Result] = {}
        active: _Active | None = None
        while True:
            # 1. What is left to do?
            if self.stop.is_set():
                waiting.clear()
            elif not waiting:
                waiting.extend(next(source, ()))
            if not waiting and active is None:
                return
            running = [active.responses[b] for b in active.running] if active else []
            self.crowded = self.crowded and bool(running)
            group: list[Prompt] = []
            began = time.perf_counter()
            try:
                with memory_errors():
                    # 2. Read prompts if there is room for them, else decode a step.
                    if waiting and not self.crowded and self.limit.may_join(len(running), len(waiting)):
                        group = self.limit.next_group(waiting, len(running))
                        read_before = self.prefill_tokens
                        results, started = self._prefill(group)
                        under_way |= {id(result.prompt): result for result in results}
                        group = []
                        active = active.joined(started) if active and started else active or started
                        if self.progress:
                            tokens = self.prefill_tokens - read_before
                            self.progress.read(
                                tokens, len(started.responses) if started else 0, time.perf_counter() - began
                            )
                    elif active:
                        active = self._step(active)
                        if self.progress:
                            lengths = [len(response.ids) for response in running if not response.finish_reason]
                            self.progress.stepped(len(running), lengths, time.perf_counter() - began)
            except OutOfMemory as error:
                # 3. Memory is short: a group that was not read is made smaller, or waits until the others are done;
                # otherwise all prompts under way begin again, in smaller batches. What is alone fails.
                if not group:
                    active = None
                    group = [result.prompt for result in under_way.values() if not _is_done(result)]
                    for prompt in group:
                        under_way.pop(id(prompt))
                    running = []
                if len(group) == 1 and not running:
                    yield Result(group[0], error=str(error))
                else:
                    self.crowded = len(group) == 1
                    if not self.crowded:
                        self.limit.shrink(len(group))
                    waiting.extendleft(reversed(group))
            for key in [key for key, result in under_way.items() if _is_done(result)]:
                yield under_way.pop(key)

    # --- reading prompts

    def _prefill(self, group: list[Prompt]) -> tuple[list[Result], _Active | None]:
        """Read prompts in one pass, capture it, and begin their responses."""
        # 1. Pad them on the left, behind the shared prefix.
        shared = len(self.prefix.ids) if self.prefix else 0
        own = [prompt.input_ids[shared:] for prompt in group]
        width = max(len(ids) for ids in own)
        pad = min(self.tokenizer.pad_token_id or 0, self.model.get_input_embeddings().num_embeddings - 1)
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in own], device=self.device)
        mask = torch.tensor([[True] * shared + [False] * (width - len(row)) + [True] * len(row) for row in own])
        cache = new_cache(self.recorder.num_layers, self.prefix.cache if self.prefix else None, len(group))

        # 2. The pass, and the rows of what it leaves.
        if self.captures:
            logits, rows = self._captured(group, ids, mask, cache)
        else:
            logits, rows = self._forward(ids, mask.to(self.device), cache)[:, -1], None
        mask = mask.to(self.device)
        self.prefill_tokens += sum(map(len, own))
        self.prompt_tokens += sum(len(prompt.input_ids) for prompt in group)

        # 3. The responses.
        samples = self.options.num_samples
        forced = self._forced_logprobs(group, logits, cache, mask)
        results = [
            Result(prompt, rows, b, [Response(prompt, sample) for sample in range(samples)], forced[b])
            for b, prompt in enumerate(group)
        ]
        responses = [response for result in results for response in result.responses]
        if self.options.max_new_tokens == 0:
            for response in responses:
                response.finish_reason = "length"
            return results, None
        if samples > 1:
            select_rows(cache, torch.arange(len(group)), repeats=samples)
            mask, logits = mask.repeat_interleave(samples, 0), logits.repeat_interleave(samples, 0)
        return results, self._advance(_Active(responses, cache, mask, []), logits)

    def _captured(
        self, group: list[Prompt], ids: torch.Tensor, mask: torch.Tensor, cache: Any
    ) -> tuple[torch.Tensor, PassRows]:
        """The pass over the prompts' own tokens [B, S] while it is recorded: last logits [B, V] and the rows."""
        regions = torch.zeros(*mask.shape, len(self.names), dtype=torch.bool)
        for b, prompt in enumerate(group):
            regions[b][mask[b]] = prompt.region_mask
        columns = [self.names.index(name) for name in self.pooled]
        with self.recorder.recording(regions, columns, ids.shape[1]) as recorded:
            logits = self._forward(ids, mask.to(self.device), cache)[:, -1]
        capture = recorded.finish()
        capture.topk = self._topk(recorded, logits)
        passes = [capture] + ([self.prefix.capture] if self.prefix else [])
        masks = [prompt.region_mask for prompt in group]
        half = self.recorder.options.pooled_dtype
        dtype = getattr(torch, half) if half else self.model.dtype
        make = partial(rows_of, capture, masks, self.names, self.pooled, dtype, *passes[1:])
        return logits, PassRows(make, [one.copies for one in passes])

    def _topk(self, recorded: Any, logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
        k = self.recorder.options.topk_logits
        if self.recorder.options.topk_positions == "all":
            return all_position_logits(self.model, recorded.last_state, logits, k)
        return top_logits(logits[:, None], k)

    def _forced_logprobs(
        self, group: list[Prompt], logits: torch.Tensor, cache: Any, mask: torch.Tensor
    ) -> list[dict[str, list[list[float]]]]:
        """Log-probabilities of the tokens of each prompt's `forced` continuations; the cache is left as it was.

        Teacher forcing: each token is predicted from the tokens before it. Continuations of similar length share a
        batch, of as many rows as were read, padded on the right.
        """
        found: list[dict[str, list[list[float]]]]
        found = [{name: [[] for _ in several] for name, several in prompt.forced.items()} for prompt in group]
        waiting = [
            (len(ids), b, name, place, ids)
            for b, prompt in enumerate(group)
            for name, several in prompt.forced.items()
            for place, ids in enumerate(several)
            if ids
        ]
        waiting.sort(key=lambda one: one[0])
        first = logits.float().log_softmax(-1) if waiting else logits
        while waiting:
            some = [one for one in waiting[: len(group)] if not self.limit.equal_lengths or one[0] == waiting[0][0]]
            del waiting[: len(some)]
            width, rows = some[-1][0], torch.tensor([one[1] for one in some], device=self.device)
            ids = torch.tensor([one[-1] + [0] * (width - one[0]) for one in some], device=self.device)
            parts = [first[rows, ids[:, 0]][:, None]]
            if width > 1:
                fork = new_cache(self.recorder.num_layers, cache, len(group))
                select_rows(fork, rows)
                seen, step = mask[rows], max(1, LOGITS_AT_ONCE // (len(some) * first.shape[-1]))
                for fed, wanted in zip(ids[:, :-1].split(step, 1), ids[:, 1:].split(step, 1), strict=True):
                    seen = torch.cat([seen, seen.new_ones(fed.shape)], dim=1)
                    later = self._forward(fed, seen, fork, keep=fed.shape[1]).float().log_softmax(-1)
                    parts.append(later.gather(2, wanted[..., None])[..., 0])
            logprobs = torch.cat(parts, dim=1).cpu()
            for row, (length, b, name, place, _) in zip(logprobs, some, strict=True):
                found[b][name][place] = row[:length].tolist()
        return found

    # --- decoding

    def _forward(self, ids: torch.Tensor, mask: torch.Tensor, cache: Any, keep: int = 1) -> torch.Tensor:
        """Logits of the last `keep` positions, [B, keep, V]."""
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask.long(), "past_key_values": cache}
        if "position_ids" in self.accepts:
            inputs["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        if "logits_to_keep" in self.accepts:
            # Given a number, some models leave the other positions out of their last layers.
            inputs["logits_to_keep"] = torch.arange(ids.shape[1] - keep, ids.shape[1]) if ids.shape[1] > 1 else keep
        return self.model(**inputs, use_cache=True).logits[:, -keep:]

    def _step(self, active: _Active) -> _Active | None:
        ids = torch.tensor(active.next_ids, device=self.device)[:, None]
        active.mask = torch.cat([active.mask, active.mask.new_ones(len(active.responses), 1)], dim=1)
        advanced = self._advance(active, self._forward(ids, active.mask, active.cache)[:, -1])
        self.limit.grow()
        return advanced

    def _advance(self, active: _Active, logits: torch.Tensor) -> _Active | None:
        """Give each response its next token; rows of finished ones leave once they are many enough."""
        active.next_ids, logprobs = choose_tokens(self.options, logits, active.responses)
        for b in active.running:
            response = active.responses[b]
            response.ids.append(active.next_ids[b])
            response.logprobs += logprobs[b : b + 1]
            response.finish_reason = self._finish_reason(response)
        finished = len(active.responses) - len(active.running)
        if finished == len(active.responses):
            return None
        # Leaving copies the cache of the rows that stay: worth it for a quarter of the rows, not for each.
        return active.without_finished() if finished >= LEAVE_TOGETHER * len(active.responses) else active

    def _finish_reason(self, response: Response) -> str:
        reason = ""
        if response.ids[-1] in self.options.eos_token_ids:
            reason = "eos"
        elif self.options.stop_strings and self._stopped(response):
            return "stop"
        elif len(response.ids) >= self.options.max_new_tokens:
            reason = "length"
        if reason:
            response.text = self._decode(response.ids)
        return reason

    def _stopped(self, response: Response) -> bool:
        stops = self.options.stop_strings
        tail = response.ids[-TAIL_TOKENS - max(map(len, stops)) :]
        # A stop string may be, or hold, or be part of a control token; only the text with these shows it.
        for skip in (True, False) if self.control_tokens.keys() & set(tail) else (True,):
            if not any(stop in self._decode(tail, skip) for stop in stops):
                continue
            text = self._decode(response.ids, skip)
            if ends := [text.find(stop) for stop in stops if stop in text]:
                for token in () if skip else self.control_tokens.values():
                    text = text.replace(token, "\0" * len(token))  # a stop string may begin inside one
                response.text = text[: min(ends)].replace("\0", "")
                return True
        return False

    def _decode(self, ids: list[int], skip: bool = True) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=skip))


def _is_done(result: Result) -> bool:
    return all(response.finish_reason for response in result.responses)


class OutOfMemory(Exception):
    """Its text is the reason for failures.csv."""


@contextlib.contextmanager
def memory_errors() -> Iterator[None]:
    """Turn the several ways in which memory runs out into one."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        signs = ("allocate memory", "out of memory", "ALLOC_FAILED")
        short = isinstance(error, torch.OutOfMemoryError | MemoryError) or any(sign in str(error) for sign in signs)
        if not short:
            raise
        why = one_line(str(error) or type(error).__name__, 200)
        raise OutOfMemory(f"out of memory even alone: {why}") from None
    finally:
        if sys.exc_info()[0] is not None and torch.cuda.is_available():
            torch.cuda.empty_cache()
