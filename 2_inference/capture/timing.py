"""Ways to generate and to capture, and what each costs: seconds and memory, in turn in one process."""

from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from command_line import UserError
from load_model import load_tokenizer
from token_spans import BASE_REGIONS

from capture.batching import BatchLimit
from capture.cpu_speed import keep_heap
from capture.decode import GenerationOptions, Generator, Prompt
from capture.prompts import DEFAULT_POOLED
from capture.recorder import CaptureOptions, Recorder, chosen_raw_layers, find_layers

GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
REGION_NAMES, POOLED = [*BASE_REGIONS, "edited"], [*DEFAULT_POOLED, "edited"]
Way = Callable[[torch.Tensor], int]  # takes ids [B, S], returns the bytes captured


def plain_generate(model: Any, args: argparse.Namespace) -> Way:
    """`generate()` alone."""
    options = {**GREEDY, "max_new_tokens": args.max_new_tokens}

    def run(ids: torch.Tensor) -> int:
        model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        return 0

    return run


def ours(model: Any, args: argparse.Namespace) -> Way:
    """This stage's capture and decoding, every layer; with the raw layers asked for."""
    generator = recording_generator(model, CaptureOptions(raw_layers=raw_layers_of(model, args)), args.max_new_tokens)

    def run(ids: torch.Tensor) -> int:
        return sum(tensor_bytes(result.fields) for result in generator.run([example_prompts(ids)]))

    return run


def recording_generator(model: Any, options: CaptureOptions, max_new_tokens: int) -> Generator:
    """This stage's capture and decoding: token ids in, nothing decoded."""
    no_tokenizer = SimpleNamespace(pad_token_id=0, added_tokens_decoder={}, decode=lambda *_, **__: "")
    generation = GenerationOptions(max_new_tokens=max_new_tokens)
    generator = Generator(model, no_tokenizer, Recorder(model, options), generation, BatchLimit(1 << 20))
    generator.set_regions(REGION_NAMES, POOLED)
    return generator


def example_prompts(ids: torch.Tensor) -> list[Prompt]:
    """Prompts [B, S] with plausible regions: a quarter context, a half instruction with two edited tokens, a quarter
    task."""
    length, position = ids.shape[1], torch.arange(ids.shape[1])
    quarter = max(1, length // 4)
    context, task = position < quarter, position >= length - quarter
    edited = (position == length // 2) | (position == length // 2 + 1)
    columns = (position >= 0, position == length - 1, context, ~context & ~task, task, position == 0, edited)
    return [Prompt(row, tokens, torch.stack(columns, dim=1)) for row, tokens in enumerate(ids.tolist())]


def raw_layers_of(model: Any, args: argparse.Namespace) -> tuple[int, ...]:
    """The layers of `--raw_layers`."""
    return chosen_raw_layers(args.raw_layers, model.config.get_text_config(decoder=True).num_hidden_layers)


def two_pass(model: Any, args: argparse.Namespace) -> Way:
    """The ordinary way: `generate()`, then a second forward pass with eager attention for states, maps and logits."""
    generate = plain_generate(model, args)
    config, layers = model.config.get_text_config(decoder=True), raw_layers_of(model, args)

    def run(ids: torch.Tensor) -> int:
        generate(ids)
        before = config._attn_implementation
        model.set_attn_implementation("eager")
        with torch.inference_mode():
            out = model(ids, output_hidden_states=True, output_attentions=True)
        model.set_attn_implementation(before)
        kept = {f"h{i}": out.hidden_states[i].cpu() for i in layers}
        kept |= {f"a{i}": out.attentions[i].cpu() for i in layers if i < config.num_hidden_layers}
        values = out.logits.topk(10, dim=-1)
        return tensor_bytes(kept | {"v": values.values.cpu(), "i": values.indices.cpu()})

    return run


def with_nnsight(model: Any, args: argparse.Namespace) -> Way:
    """nnsight, one pass: hidden states of the raw layers saved while tracing inside generate; no attention maps."""
    import nnsight.modeling.transformers

    if not args.model_name:
        raise ImportError("it needs the tokenizer of --model_name")
    model = copy.deepcopy(model)  # as it wraps every module
    traced = nnsight.modeling.transformers.TransformersModel(
        model, tokenizer=load_tokenizer(args.model_name), task="text-generation"
    )
    _, blocks = find_layers(model)
    layers = [layer for layer in raw_layers_of(model, args) if layer < len(blocks)]
    backbone = next(name for name, module in model.named_modules() if module is blocks[0]).split(".")[:-1]
    options = {**GREEDY, "max_new_tokens": args.max_new_tokens}

    def run(ids: torch.Tensor) -> int:
        envoys = traced
        for part in backbone:
            envoys = getattr(envoys, part)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with torch.inference_mode(), traced.generate(inputs, **options):
            states: Any = nnsight.save([])
            for layer in layers:
                states.append(envoys[layer].output)
        states = [state[0] if isinstance(state, tuple) else state for state in states]
        return tensor_bytes({str(layer): state.cpu() for layer, state in zip(layers, states, strict=True)})

    return run


def with_transformer_lens(model: Any, args: argparse.Namespace) -> Way:
    """TransformerLens (3 and later): its own generate, then run_with_cache of the raw layers' inputs and patterns."""
    from transformer_lens.model_bridge import TransformerBridge

    if not args.model_name:
        raise ImportError("it needs the tokenizer of --model_name")
    # A copy, as it takes modules apart and switches to eager attention.
    lens = TransformerBridge.boot_transformers(args.model_name, hf_model=copy.deepcopy(model), dtype=model.dtype)
    layers = raw_layers_of(model, args)
    wanted = [f"blocks.{layer}.hook_resid_pre" for layer in layers]
    wanted += [f"blocks.{layer}.attn.hook_pattern" for layer in layers if layer < lens.cfg.n_layers]

    def run(ids: torch.Tensor) -> int:
        with torch.inference_mode():
            lens.generate(ids, max_new_tokens=args.max_new_tokens, do_sample=False, stop_at_eos=False, verbose=False)
            _, cache = lens.run_with_cache(ids, names_filter=wanted)
        return tensor_bytes(dict(cache))

    return run


WAYS: dict[str, Callable[[Any, argparse.Namespace], Way]] = {
    "generate": plain_generate,
    "ours": ours,
    "two_pass": two_pass,
    "nnsight": with_nnsight,
    "transformer_lens": with_transformer_lens,
}


def tensor_bytes(value: Any) -> int:
    """Bytes of all tensors in a nested dict."""
    if isinstance(value, dict):
        return sum(tensor_bytes(inner) for inner in value.values())
    return value.nbytes if isinstance(value, torch.Tensor) else 0


def bench_batches(args: argparse.Namespace, model: Any) -> tuple[list[dict[str, Any]], bool]:
    """Single batches of random tokens: every way in turn, round by round; ratios are medians of the rounds' ratios."""
    ways: dict[str, Way] = {}
    for name in args.ways or WAYS:
        if name not in WAYS:
            raise UserError(f"--ways {name}: choose among {', '.join(WAYS)}")
        try:
            ways[name] = WAYS[name](model, args)
        except ImportError as error:
            print(f"{name}: left out ({error})", file=sys.stderr)
    if args.raw_layers != ["none"]:  # as the stage does; every way gains by it
        keep_heap(model.device)
    rows, stopped = [], False
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    for length in args.lengths:
        batch = max(1, min(args.batch_size, args.max_tokens // length))
        ids = torch.randint(10, vocabulary - 10, (batch, length), generator=torch.Generator().manual_seed(length))
        calls = {name: partial(way, ids.to(model.device)) for name, way in ways.items()}
        label = f"{batch} x {length} tokens"
        seconds, peaks, captured, stopped = time_in_turn(calls, args.repeats, model.device.type, label)
        for row in ratio_rows(seconds):
            row |= {"new_tokens_per_s": batch * args.max_new_tokens / row["seconds"], "peak_MB": peaks[row["way"]]}
            row["captured_bytes_per_prompt"] = captured[row["way"]] // batch
            rows.append({"prompt_tokens": length, "rows": batch} | row)
        if stopped:
            break
    return rows, stopped


# --- timing


def time_in_turn(
    calls: Mapping[str, Callable[[], Any]], rounds: int, device: str, label: str, warm_up: bool = True
) -> tuple[dict[str, list[float]], dict[str, float], dict[str, Any], bool]:
    """Seconds of every finished round, peak MB and first result of each call, and whether a signal stopped it.

    Each is called once before the timed rounds, and once more before that as a warm-up: what is made once and stays is
    not part of a peak.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    peaks: dict[str, float] = {}
    results: dict[str, Any] = {}
    stopped = False
    try:
        for name, call in calls.items():
            if warm_up:
                call()
            with contextlib.suppress(OSError, AttributeError, TypeError):  # glibc only
                ctypes.CDLL(None).malloc_trim(0)  # one way's freed memory would hide another's peak
            spent, peaks[name], results[name] = timed(call, device)
            print(f"{label}, {name}: {spent:.2f} s before the timed rounds", file=sys.stderr, flush=True)
        for number in range(rounds):
            order = list(calls)[:: 1 if number % 2 else -1]
            spent_by = {name: timed(calls[name], device)[0] for name in order}
            for name, spent in spent_by.items():
                seconds[name].append(spent)
            shown = ", ".join(f"{name} {spent_by[name]:.2f} s" for name in calls)
            print(f"{label}, round {number + 1} of {rounds}: {shown}", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        stopped = True
    return {name: spent for name, spent in seconds.items() if spent}, peaks, results, stopped


def timed(run: Callable[[], Any], device: str) -> tuple[float, float, Any]:
    """Seconds, peak memory in MB above what was held before (GPU memory, or the process's own), and the result."""
    on_gpu = device == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError):  # VmHWM begins anew; if the system refuses that, peaks are too high
            Path("/proc/self/clear_refs").write_text("5")
    held = torch.cuda.memory_allocated() if on_gpu else status_kb("VmRSS") * 1024
    start = time.perf_counter()
    result = run()
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() if on_gpu else status_kb("VmHWM") * 1024
    return seconds, max(0.0, peak - held) / 1e6, result


def status_kb(key: str) -> int:
    """A number of /proc/self/status in kB; 0 on systems without it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith(key + ":"):
                return int(line.split()[1])
    return 0


def ratio_rows(seconds: dict[str, list[float]]) -> list[dict[str, Any]]:
    """For each way the median of its rounds' ratios to `generate()` (or to the first way), and its median seconds."""
    base = seconds.get("generate") or next(iter(seconds.values()), [])
    rows = []
    for name, spent in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(spent, base, strict=True))
        rows.append(
            {"way": name, "ratio_to_generate": ratio, "seconds": statistics.median(spent), "rounds": len(spent)}
        )
    return rows
