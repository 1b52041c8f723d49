"""What capture costs: ours, `generate()` alone, and other ways, batch by batch in turn, as ratios in one run.

Writes  a table to standard output and, with --csv, one row per way and prompt length

    python 2_inference/run_scripts/bench_capture.py --model_name models/SmolLM2-135M-Instruct --lengths 12 400
    python 2_inference/run_scripts/bench_capture.py --random_weights google/gemma-2-9b-it --batch_size 64
    python 2_inference/run_scripts/bench_capture.py --model_name models/SmolLM2-135M-Instruct \\
        --prompt_file 0_data/maths.json --few_shot_file 0_data/few_shot_maths.txt

The first form times single batches of random tokens. With --prompt_file it times a whole job instead: a plain
`generate()` loop in file order at batch 16 without capture, against this stage with its defaults, at equal text.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "1_utils" / "run_scripts"))

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
    from cpu_speed import onednn_linears

    generate = plain_generate(model, args)

    def run(ids: Any) -> int:
        with onednn_linears(model):
            return generate(ids)

    return run


def ours(model: Any, args: argparse.Namespace) -> Callable[[Any], int]:
    """This stage's capture and decoding, every layer; with the raw layers asked for."""
    from attn_act_logi import raw_layers
    from batching import BatchLimit
    from capture import CaptureOptions, Recorder
    from cpu_speed import onednn_linears
    from decoding import GenerationOptions, Generator

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
    from decoding import Prompt

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
    from capture import find_layers
    from load_model import load_tokenizer
    from nnsight import LanguageModel, save

    if not args.model_name:
        raise ImportError("it needs the tokenizer of --model_name")
    model = copy.deepcopy(model)  # as it wraps every module
    traced = LanguageModel(model, tokenizer=load_tokenizer(args.model_name))
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
    from cpu_speed import keep_heap

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
        rows += bench_length(args, ways, ids.to(model.device), model.device.type)
    return rows


def bench_length(
    args: argparse.Namespace, ways: dict[str, Callable[[Any], int]], ids: Any, device: str
) -> list[dict[str, Any]]:
    """All ways on one batch: a first round for the peaks, then the timed ones."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    peaks: dict[str, float] = {}
    captured: dict[str, int] = {}
    for way in ways.values():  # what is made once and stays is no part of a way's peak
        way(ids)
    for name, way in ways.items():
        give_back_heap()
        _, peaks[name], captured[name] = timed(partial(way, ids), device)
    for round_number in range(args.repeats):
        for name in list(ways) if round_number % 2 else list(reversed(ways)):
            seconds[name].append(timed(partial(ways[name], ids), device)[0])
    base = seconds.get("generate") or next(iter(seconds.values()))
    tokens = ids.shape[0] * args.max_new_tokens
    return [
        {
            "prompt_tokens": ids.shape[1], "rows": ids.shape[0], "way": name,
            "ratio_to_generate": statistics.median(a / b for a, b in zip(spent, base, strict=True)),
            "seconds": statistics.median(spent), "new_tokens_per_s": tokens / statistics.median(spent),
            "peak_MB": peaks[name], "captured_bytes_per_prompt": captured[name] // ids.shape[0],
        }
        for name, spent in seconds.items()
    ]  # fmt: skip


# --- a whole job


def bench_job(args: argparse.Namespace, model: Any, tokenizer: Any) -> list[dict[str, Any]]:
    """A plain `generate()` loop in file order against this stage as a user calls it, in turn; texts are compared."""
    import io
    import tempfile

    texts, device = job_texts(args), model.device.type
    seconds: dict[str, list[float]] = {"generate loop, batch 16": [], "ours, capture included": []}
    equal = 0
    for number in range(args.repeats):
        with tempfile.TemporaryDirectory(dir=args.output_dir) as folder, contextlib.redirect_stderr(io.StringIO()):
            plain, _, expected = timed(partial(generate_loop, args, model, tokenizer, texts), device)
            own, _, got = timed(partial(our_job, args, model, Path(folder)), device)
        seconds["generate loop, batch 16"].append(plain)
        seconds["ours, capture included"].append(own)
        equal = sum(a == b for a, b in zip(expected, got, strict=True))
        print(
            f"round {number + 1}: {plain:.1f} s and {own:.1f} s, {equal} of {len(texts)} texts equal", file=sys.stderr
        )
    base = seconds["generate loop, batch 16"]
    return [
        {
            "prompts": len(texts), "way": name, "seconds": statistics.median(spent), "texts_equal": equal,
            "ratio_to_generate": statistics.median(a / b for a, b in zip(spent, base, strict=True)),
        }
        for name, spent in seconds.items()
    ]  # fmt: skip


def job_texts(args: argparse.Namespace) -> list[str]:
    """The job's prompts with the few-shot text before them, in file order."""
    from load_json import load_json_prompts
    from prompt_reader import read_few_shot

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


def our_job(args: argparse.Namespace, model: Any, folder: Path) -> list[str]:
    """The stage's own `main`, with the model that is loaded already; returns the responses."""
    import attn_act_logi
    import load_model
    from read_predictions import iter_predictions

    command = ["--model_name", str(args.model_name), "--prompt_file", str(args.prompt_file),
               "--output_dir", str(folder),
               "--prompt_keys", args.prompt_key, "--max_new_tokens", str(args.max_new_tokens),
               "--max_samples", str(args.max_samples), "--dtype", args.dtype]  # fmt: skip
    if args.few_shot_file:
        command += ["--few_shot_file", str(args.few_shot_file)]
    if args.stop_strings:
        command += ["--stop_strings", *args.stop_strings]
    loading, load_model.load_model = load_model.load_model, lambda *_, **__: (model, None)
    try:
        attn_act_logi.main(command)
    finally:
        load_model.load_model = loading
    return [prediction.response or "" for prediction in iter_predictions(folder)]


# --- script


def main(argv: Sequence[str] | None = None) -> int:
    """Load or make the model, time, print."""
    args = parse_args(argv)
    args.stop_strings = [text.replace("\\n", "\n") for text in args.stop_strings]
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
    print(f"{args.model_name or args.random_weights}, {model.dtype}, {where}, {args.repeats} rounds")
    print(table.to_string(index=False, float_format=lambda value: f"{value:.3f}"))
    if args.csv:
        write_csv(args.csv, table)
    return 0


if __name__ == "__main__":
    run_main(main)
