"""Timing of capture beside other ways to get the same, in turn: single batches of random tokens, or a whole job."""

from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import io
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import attn_act_logi
import pandas as pd
import torch
import transformers
from command_line import EXIT_INTERRUPTED, UserError
from file_output import write_csv, write_json
from load_json import load_json_prompts
from load_model import default_device, load_model, load_tokenizer
from read_predictions import iter_predictions
from token_spans import BASE_REGIONS

from capture.batching import BatchLimit
from capture.cpu_speed import keep_heap
from capture.decode import GenerationOptions, Generator, Prompt
from capture.job import EXIT_STOPPED, run_command
from capture.patch_job import groups_of
from capture.patch_measures import measures
from capture.patch_screen import attribution
from capture.patching import Pair, Patch, Patcher
from capture.prompts import DEFAULT_POOLED, read_few_shot
from capture.recorder import RAW_LAYERS, CaptureOptions, Recorder, chosen_raw_layers, find_layers

# Shapes of well-known models, so that a timing needs no download: the numbers of their config.json.
WIDTHS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
SHAPE = (*WIDTHS, "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings")
KNOWN_SHAPES = {
    "google/gemma-2-9b-it": ("gemma2", 256000, 3584, 14336, 42, 16, 8, 256, 8192),
    "meta-llama/Llama-3.1-8B-Instruct": ("llama", 128256, 4096, 14336, 32, 32, 8, 128, 131072),
    "Qwen/Qwen3-8B": ("qwen3", 151936, 4096, 12288, 36, 32, 8, 128, 40960),
}
OWN_SETTINGS = {"gemma2": {"sliding_window": 4096, "query_pre_attn_scalar": 256}}
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
LOOP_ROWS = 16  # of the plain generate loop
Way = Callable[[torch.Tensor], int]  # takes ids [B, S], returns the bytes captured


def run(args: argparse.Namespace, command: list[str]) -> int:
    """Load or make the model, time, print and write the table; returns the exit code."""
    transformers.logging.set_verbosity_error()
    if args.random_weights:
        model, tokenizer = random_model(args.random_weights, args.dtype, args.device_map), None
    else:
        model, tokenizer = load_model(args.model_name, args.dtype, args.device_map)
    if args.suite == "patching":
        rows, stopped = bench_patching(args, model)
    else:
        rows, stopped = bench_job(args, model, tokenizer) if args.prompt_file else bench_batches(args, model)
    where = torch.cuda.get_device_name() if model.device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    title, table = f"{args.model_name or args.random_weights}, {model.dtype}, {where}", pd.DataFrame(rows)
    print(title)
    if rows:
        print(table.to_string(index=False, float_format=lambda value: f"{value:.3f}"))
        if args.csv:
            write_csv(args.csv, table)
        if args.json:
            table["raw_layers"] = " ".join(args.raw_layers or map(str, RAW_LAYERS))
            shown = shlex.join(["python", "2_inference/run_scripts/bench_capture.py", *command])
            write_json(args.json, {"what": title, "commands": [shown], "rows": table.to_dict("records")})
    if stopped:
        end = "stopped: these are the finished rounds" if rows else "stopped before a round was finished"
        print(end, file=sys.stderr, flush=True)
    return EXIT_INTERRUPTED if stopped else 0


def random_model(name: str, dtype: str, device_map: str | None) -> Any:
    """A model of the shape of `name` with random weights. Raises UserError for an unknown shape."""
    if name in KNOWN_SHAPES:
        family, *sizes = KNOWN_SHAPES[name]
        shape = dict(zip(SHAPE, sizes, strict=True)) | OWN_SETTINGS.get(str(family), {})
        config = transformers.AutoConfig.for_model(family, **shape)
    elif (Path(name) / "config.json").is_file():
        config = transformers.AutoConfig.from_pretrained(name)
    else:
        known = ", ".join(KNOWN_SHAPES)
        raise UserError(f"--random_weights {name}: choose one of {known}, or a folder with config.json")
    kind = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
    with torch.device(default_device(device_map)):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=kind)
    model.generation_config.pad_token_id = 0
    return model.eval()


# --- ways to generate and to capture


def plain_generate(model: Any, args: argparse.Namespace) -> Way:
    """`generate()` alone."""
    options = {**GREEDY, "max_new_tokens": args.max_new_tokens}

    def run(ids: torch.Tensor) -> int:
        model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        return 0

    return run


def ours(model: Any, args: argparse.Namespace) -> Way:
    """This stage's capture and decoding, every layer; with the raw layers asked for."""
    recorder = Recorder(model, CaptureOptions(raw_layers=raw_layers_of(model, args)))
    generation = GenerationOptions(max_new_tokens=args.max_new_tokens)
    # Token ids in, nothing decoded.
    no_tokenizer = SimpleNamespace(pad_token_id=0, added_tokens_decoder={}, decode=lambda *_, **__: "")
    generator = Generator(model, no_tokenizer, recorder, generation, BatchLimit(1 << 20))
    generator.set_regions([*BASE_REGIONS, "edited"], [*DEFAULT_POOLED, "edited"])

    def run(ids: torch.Tensor) -> int:
        # Plausible regions: a quarter context, a half instruction with an edited word, a quarter task.
        length, position = ids.shape[1], torch.arange(ids.shape[1])
        quarter = max(1, length // 4)
        context, task = position < quarter, position >= length - quarter
        edited = (position == length // 2) | (position == length // 2 + 1)
        columns = (position >= 0, position == length - 1, context, ~context & ~task, task, position == 0, edited)
        prompts = [Prompt(row, tokens, torch.stack(columns, dim=1)) for row, tokens in enumerate(ids.tolist())]
        return sum(tensor_bytes(result.fields) for result in generator.run([prompts]))

    return run


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


# --- patching


def bench_patching(args: argparse.Namespace, model: Any) -> tuple[list[dict[str, Any]], bool]:
    """Patches of a pair of random prompts that differ in two tokens: a third or a fifth of all tokens is behind these.

    `share`: seconds of a way over those of as many plain forward passes of the whole prompt with all its logits, the
    median of the rounds; of `attribution` also over those of `heads`.
    """
    patcher, rows, stopped = Patcher(model), [], False
    count, config = len(patcher.layers), model.config.get_text_config(decoder=True)
    heads = [(Patch("z", i, "all", (head,)),) for i in range(count) for head in range(config.num_attention_heads)]
    names = ("edited", "edited_last", "after", "readout")
    groups = [(Patch("resid_pre", i, name),) for i in range(count) for name in names]
    for length, part in ((length, part) for length in args.lengths for part in (3, 5)):
        chance, computed = torch.Generator().manual_seed(length), (length + args.max_new_tokens - 1) // part
        first = length + args.max_new_tokens - 1 - computed
        donor, recipient, response = torch.randint(10, config.vocab_size - 10, (3, length), generator=chance).tolist()
        donor = recipient[:first] + donor[first : first + 2] + recipient[first + 2 :]
        edited = [first <= place < first + 2 for place in range(length)]
        pair = Pair(0, donor, recipient, response[: args.max_new_tokens], groups_of(edited))
        plain = torch.tensor([recipient + pair.response[:-1]], device=model.device)

        def forwards(plain: torch.Tensor = plain) -> None:
            with torch.no_grad():
                for _ in range(count):
                    model(plain, use_cache=False)

        def sweep(cells: Sequence[tuple[Patch, ...]], pair: Pair = pair) -> None:
            for _, logits, _ in patcher.run(pair, cells, args.batch_size):
                measures(logits, logits[0], logits[1], pair.response)

        calls: dict[str, Callable[[], Any]] = {
            "forward": forwards,
            "groups": partial(sweep, groups),
            "heads": partial(sweep, heads),
            "attribution": partial(attribution, patcher, pair, ["z", "mlp_out", "mlp_post"]),
        }
        label = f"{length} tokens and {args.max_new_tokens - 1} of a response, the last {computed} computed"
        seconds, peaks, _, stopped = time_in_turn(calls, args.repeats, model.device.type, label)
        patches = {"forward": count, "groups": len(groups), "heads": len(heads), "attribution": len(heads)}
        for name, spent in seconds.items():
            pairs = zip(spent, seconds["forward"], seconds["heads"], strict=True)
            shares = [(own / of * count / patches[name], own / exact) for own, of, exact in pairs]
            share, of_heads = (statistics.median(values) for values in zip(*shares, strict=True))
            row = {"prompt_tokens": length, "computed": computed, "way": name, "patches": patches[name]}
            row |= {"seconds": statistics.median(spent), "share": share, "share_of_heads": of_heads}
            rows.append(row | {"peak_MB": peaks[name], "rounds": len(spent)})
        if stopped:
            break
    patcher.close()
    return rows, stopped


# --- a whole job


def bench_job(args: argparse.Namespace, model: Any, tokenizer: Any) -> tuple[list[dict[str, Any]], bool]:
    """A plain `generate()` loop in file order against this stage as a user calls it, in turn; texts are compared."""
    few_shot = read_few_shot(args.few_shot_file)
    texts = [few_shot + text for _, text in load_json_prompts(args.prompt_file, args.prompt_key, args.max_samples)]
    calls = {
        "generate loop, batch 16": partial(generate_loop, args, model, tokenizer, texts),
        "ours, capture included": partial(our_job, args, model),
    }
    label = f"{len(texts)} prompts"
    seconds, _, responses, stopped = time_in_turn(calls, args.repeats, model.device.type, label, warm_up=False)
    equal = sum(a == b for a, b in zip(*responses.values(), strict=True)) if len(responses) == 2 else None
    return [{"prompts": len(texts), "texts_equal": equal} | row for row in ratio_rows(seconds)], stopped


def generate_loop(args: argparse.Namespace, model: Any, tokenizer: Any, texts: list[str]) -> list[str]:
    """Responses by `generate()`, 16 prompts at a time in file order."""
    responses = []
    options = {"max_new_tokens": args.max_new_tokens, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    if args.stop_strings:
        options |= {"stop_strings": args.stop_strings, "tokenizer": tokenizer}
    for start in range(0, len(texts), LOOP_ROWS):
        batch = tokenizer(texts[start : start + LOOP_ROWS], return_tensors="pt", padding=True).to(model.device)
        out = model.generate(**batch, **options)
        for text in tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True):
            ends = [text.find(stop) for stop in args.stop_strings if stop in text]
            responses.append(text[: min(ends)] if ends else text)
    return responses


def our_job(args: argparse.Namespace, model: Any) -> list[str]:
    """This stage's whole command with the model that is loaded already; returns the responses."""
    shared = ("model_name", "prompt_file", "max_new_tokens", "max_samples", "dtype", "few_shot_file")
    given = {name: getattr(args, name) for name in shared} | {"prompt_keys": args.prompt_key}
    command = [word for name, value in given.items() if value is not None for word in (f"--{name}", str(value))]
    if args.stop_strings:
        command += ["--stop_strings", *args.stop_strings]
    with tempfile.TemporaryDirectory(dir=args.output_dir) as folder:
        own = attn_act_logi.parse_args([*command, "--output_dir", folder])
        with contextlib.redirect_stderr(io.StringIO()):
            if run_command(own, model) == EXIT_STOPPED:
                raise KeyboardInterrupt
        return [prediction.response or "" for prediction in iter_predictions(Path(folder))]
