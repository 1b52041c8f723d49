"""The benchmarks of stage 2: single batches of random tokens, a whole job, patching, or all that a GPU is asked."""

from __future__ import annotations

import argparse
import contextlib
import io
import shlex
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import attn_act_logi
import pandas as pd
import torch
import transformers
from command_line import EXIT_INTERRUPTED, UserError
from file_output import write_csv, write_json
from load_json import load_json_prompts
from load_model import default_device, load_model
from read_predictions import iter_predictions

from capture.gpu_suite import bench_gpu
from capture.job import EXIT_STOPPED, run_command
from capture.patch_job import groups_of
from capture.patch_measures import measures
from capture.patch_screen import attribution
from capture.patching import Pair, Patch, Patcher
from capture.prompts import read_few_shot
from capture.recorder import RAW_LAYERS
from capture.timing import bench_batches, ratio_rows, time_in_turn

# Shapes of well-known models, so that a timing needs no download: the numbers of their config.json.
WIDTHS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
SHAPE = (*WIDTHS, "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings")
KNOWN_SHAPES = {
    "google/gemma-2-9b-it": ("gemma2", 256000, 3584, 14336, 42, 16, 8, 256, 8192),
    "meta-llama/Llama-3.1-8B-Instruct": ("llama", 128256, 4096, 14336, 32, 32, 8, 128, 131072),
    "Qwen/Qwen3-8B": ("qwen3", 151936, 4096, 12288, 36, 32, 8, 128, 40960),
}
OWN_SETTINGS = {"gemma2": {"sliding_window": 4096, "query_pre_attn_scalar": 256}}
LOOP_ROWS = 16  # of the plain generate loop
BENCH_PAIRS = 8  # whose attribution is computed together


def run(args: argparse.Namespace, command: list[str]) -> int:
    """Load or make the model, time, print and write the table; returns the exit code."""
    transformers.logging.set_verbosity_error()
    if args.random_weights:
        model, tokenizer = random_model(args.random_weights, args.dtype, args.device_map), None
    else:
        model, tokenizer = load_model(args.model_name, args.dtype, args.device_map)
    if args.suite == "gpu":
        rows, stopped = bench_gpu(args, model)
    elif args.suite == "patching":
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


# --- patching


def bench_patching(args: argparse.Namespace, model: Any) -> tuple[list[dict[str, Any]], bool]:
    """Patches of pairs of random prompts that differ in two tokens: a third or a fifth of all tokens is behind these.

    Seconds are those of one pair. `share`: over those of as many plain forward passes of the whole prompt with all its
    logits, the median of the rounds; of attribution also over those of `heads`. Attribution takes BENCH_PAIRS pairs at
    once: those before the edit are the same text for all (few-shot text, read once), or each pair's own.
    """
    patcher, rows, stopped = Patcher(model), [], False
    count, config = len(patcher.layers), model.config.get_text_config(decoder=True)
    heads = [(Patch("z", i, "all", (head,)),) for i in range(count) for head in range(config.num_attention_heads)]
    names = ("edited", "edited_last", "after", "readout")
    groups = [(Patch("resid_pre", i, name),) for i in range(count) for name in names]
    for length, part in ((length, part) for length in args.lengths for part in (3, 5)):
        total = length + args.max_new_tokens - 1
        computed = total // part
        alike, unlike = (
            random_pairs(config.vocab_size, length, total - computed, args.max_new_tokens, own) for own in (False, True)
        )
        pair = alike[0]
        plain = torch.tensor([pair.recipient + pair.response[:-1]], device=model.device)

        def forwards(plain: torch.Tensor = plain) -> None:
            with torch.no_grad():
                for _ in range(count):
                    model(plain, use_cache=False)

        def sweep(cells: Sequence[tuple[Patch, ...]], pair: Pair = pair) -> None:
            patcher.shared_text = pair.recipient[: pair.shared]
            for _, logits, _ in patcher.run(pair, cells, args.batch_size):
                measures(logits, logits[0], logits[1], pair.response)

        def attributed(pairs: list[Pair], shared: int) -> None:
            patcher.shared_text = pairs[0].recipient[:shared]
            attribution(patcher, pairs, ["z", "mlp_out", "mlp_post"])

        calls: dict[str, Callable[[], Any]] = {
            "forward": forwards,
            "groups": partial(sweep, groups),
            "heads": partial(sweep, heads),
            "attribution": partial(attributed, alike, pair.shared),
            "attribution, own texts": partial(attributed, unlike, 0),
        }
        label = f"{length} tokens and {args.max_new_tokens - 1} of a response, the last {computed} computed"
        seconds, peaks, _, stopped = time_in_turn(calls, args.repeats, model.device.type, label)
        for name, of_batches in seconds.items():
            spent = [one / BENCH_PAIRS for one in of_batches] if name.startswith("attribution") else of_batches
            patches = {"forward": count, "groups": len(groups)}.get(name, len(heads))
            pairs = zip(spent, seconds["forward"], seconds["heads"], strict=True)
            shares = [(own / of * count / patches, own / exact) for own, of, exact in pairs]
            share, of_heads = (statistics.median(values) for values in zip(*shares, strict=True))
            row = {"prompt_tokens": length, "computed": computed, "way": name, "patches": patches}
            row |= {"seconds": statistics.median(spent), "share": share, "share_of_heads": of_heads}
            rows.append(row | {"peak_MB": peaks[name], "rounds": len(spent)})
        if stopped:
            break
    patcher.close()
    return rows, stopped


def random_pairs(vocabulary: int, length: int, first: int, response: int, own: bool) -> list[Pair]:
    """BENCH_PAIRS pairs that differ in two tokens from `first` on; those before it are the same for all, or own."""
    chance = torch.Generator().manual_seed(length)
    groups = groups_of([first <= place < first + 2 for place in range(length)])
    pairs: list[Pair] = []
    for _ in range(BENCH_PAIRS):
        ids, new, forced = torch.randint(10, vocabulary - 10, (3, length), generator=chance).tolist()
        ids = ids if own or not pairs else pairs[0].recipient[:first] + ids[first:]
        donor = ids[:first] + new[first : first + 2] + ids[first + 2 :]
        pairs.append(Pair(0, donor, ids, forced[:response], groups))
    return pairs


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
