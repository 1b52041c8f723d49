"""What capture costs: ours, `generate()` alone, and other ways, batch by batch in turn, as ratios in one run.

Writes  a table to standard output and, with --csv, one row per way and prompt length

    python 2_inference/run_scripts/bench_capture.py --model_name models/SmolLM2-135M-Instruct --lengths 12 400
    python 2_inference/run_scripts/bench_capture.py --random_weights google/gemma-2-9b-it --batch_size 64
    python 2_inference/run_scripts/bench_capture.py --model_name models/SmolLM2-135M-Instruct \\
        --prompt_file 0_data/maths.json --few_shot_file 0_data/few_shot_maths.txt

The first form times single batches of random tokens. With --prompt_file it times a whole job instead: a plain
`generate()` loop in file order at batch 16 without capture, against this stage with its defaults, at equal text.
Every finished round is reported on standard error. Ctrl-C, SIGTERM or --time_limit end the run with a table of the
rounds that are finished (exit code 130).
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / place) for place in ("", "../1_utils/run_scripts")]

from command_line import UserError, make_parser, run_main

# Shapes of well-known models, so that a timing needs no download: the numbers of their config.json.
KNOWN_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "google/gemma-2-9b-it": (
        "gemma2",
        {
            "vocab_size": 256000, "hidden_size": 3584, "intermediate_size": 14336, "num_hidden_layers": 42,
            "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256, "sliding_window": 4096,
            "query_pre_attn_scalar": 256, "max_position_embeddings": 8192,
        },
    ),
    "meta-llama/Llama-3.1-8B-Instruct": (
        "llama",
        {
            "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 131072,
        },
    ),
    "Qwen/Qwen3-8B": (
        "qwen3",
        {
            "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960,
        },
    ),
}  # fmt: skip
EXIT_INTERRUPTED = 130  # as a shell reports Ctrl-C
REGION_NAMES = ["all", "last", "context", "instruction", "task", "first", "edited"]
POOLED = ["last", "instruction", "task", "edited"]


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__)
    model = parser.add_argument_group("model")
    model.add_argument("--model_name", help="hub id or local folder")
    model.add_argument(
        "--random_weights", help=f"shape of one of {', '.join(KNOWN_CONFIGS)}, or a folder's config.json"
    )
    model.add_argument("--dtype", default="auto", help="auto, float32, bfloat16, float16")
    model.add_argument("--device_map", help="auto, cpu, cuda:0 …")
    work = parser.add_argument_group("work")
    work.add_argument("--lengths", type=int, nargs="+", default=[12, 400, 2000], help="prompt lengths in tokens")
    work.add_argument("--batch_size", type=int, default=8, help="rows (fewer where a prompt is long: see --max_tokens)")
    work.add_argument("--max_tokens", type=int, default=4000, help="rows × prompt length of a batch at most")
    work.add_argument("--max_new_tokens", type=int, default=16, help="tokens generated for each row")
    work.add_argument("--repeats", type=int, default=7, help="rounds; the median ratio is told")
    work.add_argument("--raw_layers", nargs="+", default=["0", "5", "10", "15"], help="raw layers of ours, or none")
    work.add_argument("--ways", nargs="+", default=list(WAYS),
                      help="what is timed; those not installed are left out")  # fmt: skip
    job = parser.add_argument_group("a whole job")
    job.add_argument("--prompt_file", type=Path, help="time the job of this file instead of single batches")
    job.add_argument("--prompt_key", default="normal", help="its style")
    job.add_argument("--max_samples", type=int, default=96, help="prompts of it")
    job.add_argument("--few_shot_file", type=Path, help="text before every prompt")
    job.add_argument("--stop_strings", nargs="+", default=[], help="given to both sides")
    job.add_argument("--output_dir", type=Path, help="where ours writes; default: a temporary folder")
    parser.add_argument("--csv", type=Path, help="write the table here too")
    parser.add_argument("--time_limit", type=int, help="seconds until the run ends with what it has")
    args = parser.parse_args(argv)
    if (args.model_name is None) == (args.random_weights is None):
        raise UserError("give one of --model_name and --random_weights")
    return args


# --- models


def random_model(name: str, dtype: str, device_map: str | None) -> Any:
    """A model of the shape of `name` with random weights. Raises UserError for an unknown shape."""
    import torch
    from load_model import default_device
    from transformers import AutoConfig, AutoModelForCausalLM

    if name in KNOWN_CONFIGS:
        family, shape = KNOWN_CONFIGS[name]
        config = AutoConfig.for_model(family, **shape)
    elif (Path(name) / "config.json").is_file():
        config = AutoConfig.from_pretrained(name)
    else:
        raise UserError(
            f"--random_weights {name}: choose one of {', '.join(KNOWN_CONFIGS)}, or a folder with config.json"
        )
    kind = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
    with torch.device(default_device(device_map)):
        model = AutoModelForCausalLM.from_config(config, dtype=kind)
    model.generation_config.pad_token_id = 0
    return model.eval()


class _NoTokenizer:
    """Stands in where no text is needed: token ids in, nothing decoded."""

    pad_token_id = 0
    added_tokens_decoder: ClassVar[dict[int, Any]] = {}  # no control tokens

    def decode(self, *_: Any, **__: Any) -> str:
        """No text."""
        return ""


# --- ways to generate and to capture; each takes ids [B, S] and returns bytes captured


def plain_generate(model: Any, args: argparse.Namespace) -> Callable[[Any], int]:
    """`generate()` alone."""

    def run(ids: Any) -> int:
        import torch

        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=args.max_new_tokens, do_sample=False,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        return 0

    return run


def generate_onednn(model: Any, args: argparse.Namespace) -> Callable[[Any], int]:
    """`generate()` alone with the matrix products that ours uses on a CPU: the rest of the difference is capture."""
    from capture.cpu_speed import onednn_linears

    generate = plain_generate(model, args)

    def run(ids: Any) -> int:
        with onednn_linears(model):
            return generate(ids)

    return run


def ours(model: Any, args: argparse.Namespace) -> Callable[[Any], int]:
    """This stage's capture and decoding, every layer; with the raw layers asked for."""
    from attn_act_logi import raw_layers
    from capture.batching import BatchLimit
    from capture.cpu_speed import onednn_linears
    from capture.decode import GenerationOptions, Generator
    from capture.recorder import CaptureOptions, Recorder

    layers = raw_layers(args.raw_layers, model.config.get_text_config(decoder=True).num_hidden_layers)
    recorder = Recorder(model, CaptureOptions(raw_layers=layers))
    generation = GenerationOptions(max_new_tokens=args.max_new_tokens)
    generator = Generator(model, _NoTokenizer(), recorder, generation, BatchLimit(1 << 20))
    generator.set_regions(REGION_NAMES, POOLED)

    def run(ids: Any) -> int:
        with onednn_linears(model):
            results = generator.run([prompts_of(ids)])
            return sum(tensor_bytes(result.fields) for result in results)

    return run


def prompts_of(ids: Any) -> list[Any]:
    """Prompts with plausible regions: a quarter context, a half instruction with an edited word, a quarter task."""
    import torch
    from capture.decode import Prompt

    length = ids.shape[1]
    position = torch.arange(length)
    quarter = max(1, length // 4)
    context, task = position < quarter, position >= length - quarter
    edited = (position == length // 2) | (position == length // 2 + 1)
    columns = (position >= 0, position == length - 1, context, ~context & ~task, task, position == 0, edited)
    mask = torch.stack(columns, dim=1)
    return [Prompt(row, tokens, mask) for row, tokens in enumerate(ids.tolist())]


def two_pass(model: Any, args: argparse.Namespace) -> Callable[[Any], int]:
    """The ordinary way: `generate()`, then a second forward pass with eager attention for states, maps and logits."""
    from attn_act_logi import raw_layers

    generate = plain_generate(model, args)
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    layers = raw_layers(args.raw_layers, count)

    def run(ids: Any) -> int:
        import torch

        generate(ids)
        before = model.config.get_text_config(decoder=True)._attn_implementation
        model.set_attn_implementation("eager")
        with torch.inference_mode():
            out = model(ids, output_hidden_states=True, output_attentions=True)
        model.set_attn_implementation(before)
        kept = {f"h{i}": out.hidden_states[i].cpu() for i in layers}
        kept |= {f"a{i}": out.attentions[i].cpu() for i in layers if i < count}
        values = out.logits.topk(10, dim=-1)
        return tensor_bytes(kept) + tensor_bytes({"v": values.values.cpu(), "i": values.indices.cpu()})

    return run


def with_nnsight(model: Any, args: argparse.Namespace) -> Callable[[Any], int]:
    """nnsight, one pass: hidden states of the raw layers saved while tracing inside generate; no attention maps."""
    import copy

    from attn_act_logi import raw_layers
    from capture.recorder import find_layers
    from load_model import load_tokenizer
    from nnsight import save
    from nnsight.modeling.transformers import TransformersModel

    if not args.model_name:
        raise ImportError("it needs the tokenizer of --model_name")
    model = copy.deepcopy(model)  # as it wraps every module
    traced = TransformersModel(model, tokenizer=load_tokenizer(args.model_name), task="text-generation")
    _, blocks = find_layers(model)
    layers = [layer for layer in raw_layers(args.raw_layers, len(blocks)) if layer < len(blocks)]
    backbone = next(name for name, module in model.named_modules() if module is blocks[0]).split(".")[:-1]

    def run(ids: Any) -> int:
        import torch

        envoys = traced
        for part in backbone:
            envoys = getattr(envoys, part)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        options = {"max_new_tokens": args.max_new_tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        with torch.inference_mode(), traced.generate(inputs, **options):
            states: Any = save([])
            for layer in layers:
                states.append(envoys[layer].output)
        states = [state[0] if isinstance(state, tuple) else state for state in states]
        return tensor_bytes({str(layer): state.cpu() for layer, state in zip(layers, states, strict=True)})

    return run


def with_transformer_lens(model: Any, args: argparse.Namespace) -> Callable[[Any], int]:
    """TransformerLens (3 and later): its own generate, then run_with_cache of the raw layers' inputs and patterns."""
    import copy

    from attn_act_logi import raw_layers
    from transformer_lens.model_bridge import TransformerBridge

    if not args.model_name:
        raise ImportError("it needs the tokenizer of --model_name")
    # A copy, as it takes modules apart and switches to eager attention.
    lens = TransformerBridge.boot_transformers(args.model_name, hf_model=copy.deepcopy(model), dtype=model.dtype)
    layers = raw_layers(args.raw_layers, lens.cfg.n_layers)
    wanted = [f"blocks.{layer}.hook_resid_pre" for layer in layers]
    wanted += [f"blocks.{layer}.attn.hook_pattern" for layer in layers if layer < lens.cfg.n_layers]

    def run(ids: Any) -> int:
        import torch

        with torch.inference_mode():
            lens.generate(ids, max_new_tokens=args.max_new_tokens, do_sample=False, stop_at_eos=False, verbose=False)
            _, cache = lens.run_with_cache(ids, names_filter=wanted)
        return tensor_bytes(dict(cache))

    return run


WAYS: dict[str, Callable[[Any, argparse.Namespace], Callable[[Any], int]]] = {
    "generate": plain_generate,
    "generate_onednn": generate_onednn,
    "ours": ours,
    "two_pass": two_pass,
    "nnsight": with_nnsight,
    "transformer_lens": with_transformer_lens,
}


def tensor_bytes(value: Any) -> int:
    """Bytes of all tensors in a nested dict."""
    if isinstance(value, dict):
        return sum(tensor_bytes(inner) for inner in value.values())
    return value.numel() * value.element_size() if hasattr(value, "element_size") else 0


# --- timing


def timed(run: Callable[[], Any], device: str) -> tuple[float, float, Any]:
    """Seconds, peak memory in MB above what was held before (GPU memory, or the process's own), and the result."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    else:
        reset_peak()
        held = status_kb("VmRSS") * 1024
    start = time.perf_counter()
    result = run()
    if device == "cuda":
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = status_kb("VmHWM") * 1024
    return time.perf_counter() - start, max(0.0, peak - held) / 1e6, result


def give_back_heap() -> None:
    """Return freed memory to the system, so that one way's leavings do not hide another's peak (glibc only)."""
    import ctypes

    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def reset_peak() -> None:
    """Start the process's peak memory (VmHWM) anew; where the system does not allow it, peaks are too high."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def status_kb(key: str) -> int:
    """A number of /proc/self/status in kB; 0 where there is none."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(key + ":")), 0)


def bench_batches(args: argparse.Namespace, model: Any) -> list[dict[str, Any]]:
    """Single batches of random tokens: every way in turn, round by round; ratios are medians of the rounds' ratios."""
    import torch
    from capture.cpu_speed import keep_heap

    ways: dict[str, Callable[[Any], int]] = {}
    for name in args.ways:
        try:
            ways[name] = WAYS[name](model, args)
        except ImportError as error:
            print(f"{name}: left out ({error})", file=sys.stderr)
        except KeyError:
            raise UserError(f"--ways {name}: choose among {', '.join(WAYS)}") from None
    if args.raw_layers != ["none"]:  # as the stage does; every way gains by it
        keep_heap(model.device)
    rows = []
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    for length in args.lengths:
        batch = max(1, min(args.batch_size, args.max_tokens // length))
        ids = torch.randint(10, vocabulary - 10, (batch, length), generator=torch.Generator().manual_seed(length))
        calls = {name: partial(way, ids.to(model.device)) for name, way in ways.items()}
        seconds, peaks, captured = time_in_turn(args, calls, model.device.type, f"{batch} x {length} tokens")
        for name, spent in seconds.items():
            row = {"prompt_tokens": length, "rows": batch} | ratio_row(name, spent, seconds)
            row["new_tokens_per_s"] = batch * args.max_new_tokens / row["seconds"]
            rows.append(row | {"peak_MB": peaks[name], "captured_bytes_per_prompt": captured[name] // batch})
        if args.stopped:
            break
    return rows


def time_in_turn(
    args: argparse.Namespace, calls: Mapping[str, Callable[[], Any]], device: str, label: str, warm_up: bool = True
) -> tuple[dict[str, list[float]], dict[str, float], dict[str, Any]]:
    """Seconds of every finished round, peak MB and the first result of each call.

    Each is called once before the timed rounds, and once more before that as a warm-up: what is made once and stays is
    not part of a peak. After a stop (`args.stopped`) only finished rounds are returned.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    peaks: dict[str, float] = {}
    results: dict[str, Any] = {}
    try:
        for name, call in calls.items():
            if warm_up:
                call()
            give_back_heap()
            spent, peaks[name], results[name] = timed(call, device)
            progress(f"{label}, {name}: {spent:.2f} s before the timed rounds")
        for number in range(args.repeats):
            order = list(calls)[:: 1 if number % 2 else -1]
            spent_by = {name: timed(calls[name], device)[0] for name in order}
            for name, spent in spent_by.items():
                seconds[name].append(spent)
            shown = ", ".join(f"{name} {spent_by[name]:.2f} s" for name in calls)
            progress(f"{label}, round {number + 1} of {args.repeats}: {shown}")
    except KeyboardInterrupt:
        args.stopped = True
    return {name: spent for name, spent in seconds.items() if spent}, peaks, results


def ratio_row(name: str, spent: list[float], seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Median seconds of a way and the median of its rounds' ratios to `generate()` (or to the first way)."""
    base = seconds.get("generate") or next(iter(seconds.values()))
    ratio = statistics.median(a / b for a, b in zip(spent, base, strict=True))
    return {"way": name, "ratio_to_generate": ratio, "seconds": statistics.median(spent), "rounds": len(spent)}


def progress(text: str) -> None:
    """A line on standard error, at once."""
    print(text, file=sys.stderr, flush=True)


# --- a whole job


def bench_job(args: argparse.Namespace, model: Any, tokenizer: Any) -> list[dict[str, Any]]:
    """A plain `generate()` loop in file order against this stage as a user calls it, in turn; texts are compared."""
    texts = job_texts(args)
    calls = {
        "generate loop, batch 16": partial(generate_loop, args, model, tokenizer, texts),
        "ours, capture included": partial(our_job, args, model),
    }
    seconds, _, responses = time_in_turn(args, calls, model.device.type, f"{len(texts)} prompts", warm_up=False)
    equal = sum(a == b for a, b in zip(*responses.values(), strict=True)) if len(responses) == 2 else None
    shared = {"prompts": len(texts), "texts_equal": equal}
    return [shared | ratio_row(name, spent, seconds) for name, spent in seconds.items()]


def job_texts(args: argparse.Namespace) -> list[str]:
    """The job's prompts with the few-shot text before them, in file order."""
    from capture.prompts import read_few_shot
    from load_json import load_json_prompts

    few_shot = read_few_shot(args.few_shot_file)
    return [few_shot + text for _, text in load_json_prompts(args.prompt_file, args.prompt_key, args.max_samples)]


def generate_loop(args: argparse.Namespace, model: Any, tokenizer: Any, texts: list[str]) -> list[str]:
    """Responses by `generate()`, 16 prompts at a time in file order."""
    responses = []
    stops = {"stop_strings": args.stop_strings, "tokenizer": tokenizer} if args.stop_strings else {}
    for start in range(0, len(texts), 16):
        batch = tokenizer(texts[start : start + 16], return_tensors="pt", padding=True).to(model.device)
        out = model.generate(
            **batch, max_new_tokens=args.max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id, **stops
        )
        for text in tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True):
            ends = [text.find(stop) for stop in args.stop_strings if stop in text]
            responses.append(text[: min(ends)] if ends else text)
    return responses


def our_job(args: argparse.Namespace, model: Any) -> list[str]:
    """The stage's own `main`, with the model that is loaded already; returns the responses."""
    import io
    import tempfile

    import attn_act_logi
    import load_model
    from read_predictions import iter_predictions

    command = ["--model_name", str(args.model_name), "--prompt_file", str(args.prompt_file),
               "--prompt_keys", args.prompt_key, "--max_new_tokens", str(args.max_new_tokens),
               "--max_samples", str(args.max_samples), "--dtype", args.dtype]  # fmt: skip
    if args.few_shot_file:
        command += ["--few_shot_file", str(args.few_shot_file)]
    if args.stop_strings:
        command += ["--stop_strings", *args.stop_strings]
    loading, load_model.load_model = load_model.load_model, lambda *_, **__: (model, None)
    with tempfile.TemporaryDirectory(dir=args.output_dir) as folder:
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                code = attn_act_logi.main([*command, "--output_dir", folder])
        finally:
            load_model.load_model = loading
        if code == attn_act_logi.EXIT_STOPPED:
            raise KeyboardInterrupt
        return [prediction.response or "" for prediction in iter_predictions(Path(folder))]


# --- script


def main(argv: Sequence[str] | None = None) -> int:
    """Load or make the model, time, print."""
    args = parse_args(argv)
    args.stop_strings = [text.replace("\\n", "\n") for text in args.stop_strings]
    args.stopped = False
    for number in (signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, signal.default_int_handler)
    signal.alarm(args.time_limit or 0)
    import pandas as pd
    import torch
    import transformers
    from file_output import write_csv
    from load_model import load_model

    transformers.logging.set_verbosity_error()
    tokenizer = None
    if args.random_weights:
        model = random_model(args.random_weights, args.dtype, args.device_map)
    else:
        model, tokenizer = load_model(args.model_name, args.dtype, args.device_map)
    table = pd.DataFrame(bench_job(args, model, tokenizer) if args.prompt_file else bench_batches(args, model))
    where = torch.cuda.get_device_name() if model.device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{args.model_name or args.random_weights}, {model.dtype}, {where}")
    if not table.empty:
        print(table.to_string(index=False, float_format=lambda value: f"{value:.3f}"))
        if args.csv:
            write_csv(args.csv, table)
    if args.stopped:
        progress("stopped before a round was finished" if table.empty else "stopped: these are the finished rounds")
    return EXIT_INTERRUPTED if args.stopped else 0


if __name__ == "__main__":
    run_main(main)
