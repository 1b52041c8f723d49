"""Generate a causal language model's answers to a prompt file, and capture what happens inside while it reads.

Reads   a prompt file (JSON list of objects, one style a key)
Writes  <output_dir>/activations_*.pt and run.json; with several styles <output_dir>/<style>/…; failures.csv for
        prompts that could not be run. The same command goes on where it stopped.

    python 2_inference/run_scripts/attn_act_logi.py --model_name google/gemma-2-9b-it \\
        --prompt_file 0_data/polite_prompts.json --output_dir outputs/polite_run

Exit code: 0 all is done, 1 some prompts failed (see failures.csv), 2 wrong usage or no disk, 75 stopped by a signal.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / place) for place in ("", "../1_utils/run_scripts")]

from command_line import UserError, make_parser, one_line, run_main
from file_output import atomic_path, gigabytes, remove_leftovers
from load_json import PromptFile, read_prompt_file, style_problem
from logger import get_logger
from run_store import (
    SCHEMA_VERSION,
    begin_run,
    differences,
    load_pt,
    locked,
    planned_ends,
    read_json_file,
    record_failures,
    unpack_rows,
)
from token_spans import MATCHED, matched_style

if TYPE_CHECKING:
    from capture.batching import RowCost
    from capture.model_check import Batching
    from capture.progress import Progress
    from capture.prompts import PromptReader, StylePrompts

DEFAULT_RAW_LAYERS = ("0", "5", "10", "15")
EXIT_STOPPED = 75
log = get_logger("attn_act_logi")


# --- arguments


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__)
    _add_model_flags(parser)
    _add_generation_flags(parser)
    _add_capture_flags(parser)
    _add_run_flags(parser)
    args = parser.parse_args(argv)
    _check(args)
    return args


def _add_model_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--model_name", required=True, help="hub id or local folder of a causal language model")
    group.add_argument("--revision", help="branch, tag or commit on the hub")
    group.add_argument("--dtype", default="auto", help="auto, float32, bfloat16, float16 (auto on a CPU: float32)")
    group.add_argument("--device_map", help="auto: spread over all GPUs; cpu, cuda:1 …: that device")
    group.add_argument(
        "--attn_implementation",
        help="sdpa (with its own flash kernels), flash_attention_2 (or 3, 4), flex_attention, eager; default: what "
        "transformers chooses for the model",
    )
    group.add_argument("--trust_remote_code", action="store_true", help="run code from the model's repository")
    prompts = parser.add_argument_group("prompts")
    prompts.add_argument("--prompt_file", type=Path, required=True, help="JSON list of objects")
    prompts.add_argument("--prompt_keys", nargs="+", help="styles to run, or all; default: the file's only one. And "
                         "split@<style>: the clean form, its words cut into as many tokens as that style's typos are, "
                         "the control that tells a typo from more tokens")  # fmt: skip
    prompts.add_argument("--max_samples", type=int, help="run the first rows of the file only")
    prompts.add_argument("--few_shot_file", type=Path, help="text put before every prompt, as it is")
    prompts.add_argument("--apply_chat_template", action="store_true", help="as a user's turn in the model's template")
    prompts.add_argument("--system_prompt", help="system turn, with --apply_chat_template")
    prompts.add_argument("--task_regex", help="where the task is in a prompt (its group 1); default: after the colon")


def _add_generation_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("generation")
    group.add_argument("--max_new_tokens", type=int, default=64, help="longest response")
    group.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    group.add_argument("--top_p", type=float, default=1.0, help="nucleus, when sampling")
    group.add_argument("--top_k", type=int, default=0, help="0: all tokens, when sampling")
    group.add_argument("--repetition_penalty", type=float, default=1.0, help="1 is none")
    group.add_argument("--num_samples", type=int, default=1, help="responses of each prompt, when sampling")
    group.add_argument("--seed", type=int, default=0, help="random numbers depend on it, the row, the sample, the step")
    group.add_argument("--stop_strings", nargs="+", default=[], help=r"a response ends before these (\n: line end)")
    group.add_argument("--response_logprobs", action="store_true", help="log-probabilities of the responses' tokens")


def _add_capture_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("capture")
    group.add_argument("--raw_layers", nargs="+", default=DEFAULT_RAW_LAYERS, help="layers kept raw, counted as in "
                       "hidden_states (0: embeddings): numbers, ranges (0-5), -1 (the last), all, or none")  # fmt: skip
    group.add_argument("--topk_logits", type=int, default=10, help="next-token logits kept")
    group.add_argument("--topk_positions", choices=("last", "all"), default="last", help="of the prompt")
    group.add_argument("--neurons", action="store_true", help="MLP activations averaged over regions")
    group.add_argument("--entropy", action="store_true", help="attention entropy of every head (needs full maps)")
    group.add_argument("--pool_regions", nargs="+", help="regions whose states are averaged; default: last instruction "
                       "task and the edited ones")  # fmt: skip


def _add_run_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("run")
    group.add_argument("--output_dir", type=Path, required=True, help="run folder")
    group.add_argument("--batch_size", default="auto", help="rows in a batch, or auto: what memory takes")
    group.add_argument("--shard", help="i/n: this process's share, i from 0; default: SLURM array, accelerate")
    group.add_argument("--overwrite", action="store_true", help="remove what an earlier run wrote there")
    group.add_argument("--force", action="store_true", help="run although the disk seems too small")
    group.add_argument("--no_prefix_reuse", action="store_true", help="read the shared prefix with every prompt again")


def _check(args: argparse.Namespace) -> None:
    for name, least in (
        ("max_new_tokens", 0),
        ("top_k", 0),
        ("num_samples", 1),
        ("topk_logits", 1),
        ("temperature", 0.0),
    ):
        if not getattr(args, name) >= least:  # nan, too
            raise UserError(f"--{name} {getattr(args, name)}: must be at least {least}")
    if args.max_samples is not None and args.max_samples < 1:
        raise UserError(f"--max_samples {args.max_samples}: must be at least 1")
    if args.num_samples > 1 and args.temperature == 0:
        raise UserError("--num_samples: greedy samples are all the same; add --temperature 0.7, say")
    if args.system_prompt and not args.apply_chat_template:
        raise UserError("--system_prompt: goes with --apply_chat_template")
    if args.batch_size != "auto" and not (args.batch_size.isdigit() and int(args.batch_size) > 0):
        raise UserError(f"--batch_size {args.batch_size}: give a number or auto")
    if not 0 < args.top_p <= 1 or args.repetition_penalty <= 0:
        raise UserError("--top_p must lie in (0, 1], --repetition_penalty above 0")
    args.stop_strings = [text.replace("\\n", "\n").replace("\\t", "\t") for text in args.stop_strings]
    if "" in args.stop_strings:
        raise UserError("--stop_strings: an empty string would end every response at once; leave it out")
    args.shard = shard_of(args.shard, os.environ)
    if args.overwrite and args.shard[1] > 1:
        raise UserError("--overwrite: one shard would remove another's files; clear the folder before the shards start")


def shard_of(text: str | None, environment: Any) -> tuple[int, int]:
    """(i, n) of this process: from `--shard`, else from a SLURM array times the processes of `accelerate launch`."""
    if text is not None:
        parts = text.split("/")
        if len(parts) != 2 or not all(part.isdigit() for part in parts) or not int(parts[0]) < int(parts[1]):
            raise UserError(f"--shard {text}: write i/n with i from 0 to n-1, for example 0/4")
        return int(parts[0]), int(parts[1])
    tasks = int(environment.get("SLURM_ARRAY_TASK_COUNT", 1))
    task = int(environment.get("SLURM_ARRAY_TASK_ID", 0)) - int(environment.get("SLURM_ARRAY_TASK_MIN", 0))
    step = int(environment.get("SLURM_ARRAY_TASK_STEP", 1))
    ranks, rank = int(environment.get("WORLD_SIZE", 1)), int(environment.get("RANK", 0))
    task = task // step if tasks > 1 else 0
    if task >= tasks:
        raise UserError("this SLURM array has gaps, so its tasks do not tell the shards apart; give each --shard i/n")
    return task * ranks + rank, tasks * ranks


def raw_layers(wanted: Sequence[str], layers: int) -> tuple[int, ...]:
    """Layer numbers of `--raw_layers`; the default ones are cut to what the model has."""
    if list(wanted) == ["none"]:
        return ()
    if tuple(wanted) == DEFAULT_RAW_LAYERS:
        return tuple(number for number in map(int, wanted) if number < layers)
    numbers: set[int] = set()
    for text in wanted:
        found = re.fullmatch(r"(-?\d+)(?:-(\d+))?", f"0-{layers}" if text == "all" else text)
        if found is None:
            raise UserError(f"--raw_layers {text}: give layer numbers, ranges (0-5), -1 for the last, all, or none")
        first = int(found[1]) + (layers + 1 if found[1].startswith("-") else 0)
        last = int(found[2] or first)
        if not 0 <= first <= last <= layers:
            raise UserError(f"--raw_layers {text}: the model has layers 0 to {layers}; choose among these")
        numbers |= {*range(first, last + 1)}
    return tuple(sorted(numbers))


def chosen_styles(prompts: PromptFile, keys: Sequence[str] | None) -> list[str]:
    """Styles to run, the clean form first. Raises UserError where the choice is not clear or not there."""
    available = list(prompts.style_counts)
    if keys is None:
        if len(available) > 1:
            have = ", ".join(f"{style} ({count})" for style, count in prompts.style_counts.items())
            raise UserError(f"{prompts.path}: holds several styles: {have}; choose with --prompt_keys, or all")
        return available
    for key in keys:
        typo = matched_style(key)
        if typo is not None and (prompts.clean_key is None or typo == prompts.clean_key):
            raise UserError(f"--prompt_keys {key}: a control needs a clean form and another style; leave it out")
        if key != "all":
            prompts.prompts(typo or key, 0)  # raises for a key nobody has
    styles = [style for style in available if style in keys or "all" in keys]
    for style in styles:
        if reason := style_problem(style):
            raise UserError(f"{prompts.path}: the key {style!r} cannot name a folder; rename it ({reason})")
    return styles + [f"{MATCHED}{style}" for style in available if f"{MATCHED}{style}" in keys]


# --- settings of a run


def model_settings(args: argparse.Namespace, config: Any) -> dict[str, Any]:
    """What of the model decides the numbers."""
    from load_model import model_fingerprint, resolve_dtype

    folder = Path(args.model_name)
    return {
        "model_name": folder.resolve().name
        if folder.is_dir()
        else args.model_name,  # the fingerprint tells folders apart
        "revision": args.revision,
        "model_fingerprint": model_fingerprint(args.model_name, config),
        "dtype": resolve_dtype(args.dtype, config, args.device_map),
        "attn_implementation": args.attn_implementation,
        "trust_remote_code": args.trust_remote_code,
    }


def run_settings(
    args: argparse.Namespace, prompts: PromptFile, style: StylePrompts, model: dict[str, Any], rows: int
) -> dict[str, Any]:
    """`settings` of run.json: all that decides the content of the files, and nothing else."""
    generation = ("max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "num_samples", "seed",
                  "stop_strings", "response_logprobs")  # fmt: skip
    capture = ("raw_layers", "topk_logits", "topk_positions", "neurons", "entropy")
    return {
        "schema_version": SCHEMA_VERSION,
        "style": style.style,
        **model,
        "prompt_sha256": prompts.sha256,
        "max_samples": rows,
        "few_shot_text": args.few_shot,
        "apply_chat_template": args.apply_chat_template,
        "system_prompt": args.system_prompt,
        "chat_template_text": args.template_text,
        "task_regex": args.task_regex,
        "generation": {name: getattr(args, name) for name in generation},
        "capture": {name: getattr(args, name) for name in capture} | {"pooled_regions": style.pooled},
        "regions": style.names,
    }


def environment(args: argparse.Namespace, model: Any) -> dict[str, Any]:
    """Where a run took place: versions, device, threads, commit. Recorded, not compared."""
    import subprocess

    import torch
    import transformers

    here = Path(__file__).resolve().parent
    commit = None
    with contextlib.suppress(OSError):  # no git here
        command = ["git", "-C", str(here), "rev-parse", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    on_gpu = model.device.type == "cuda"
    return {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name(model.device) if on_gpu else model.device.type,
        "threads": torch.get_num_threads(),
        "attention": model.config.get_text_config(decoder=True)._attn_implementation,
        "git_commit": commit or None,
        "prompt_file": str(args.prompt_file),
    }


# --- the work of one process


@dataclass
class StyleJob:
    """What is left to do of one style: its files of this shard that are not whole yet."""

    style: StylePrompts
    folder: Path
    settings: dict[str, Any]
    cost: RowCost
    ends: list[int]  # see `planned_ends`
    layout: list[range]  # of all files
    files: list[range]
    kept: set[int]  # positions whose rows incomplete files already hold
    windows: list[int]  # the layers' attention windows

    def path(self, positions: range) -> Path:
        """Name of a file."""
        return self.folder / f"activations_{positions.start:05d}_{positions.stop:05d}.pt"

    @property
    def missing(self) -> int:
        """Prompts still to run."""
        return sum(len(positions) for positions in self.files) - len(self.kept)


def plan_style(args: argparse.Namespace, reader: PromptReader, style_name: str, config: Any, model: dict[str, Any],
               nested: bool) -> StyleJob:  # fmt: skip
    """Tokenise a style, lay out its files, and find out which of this shard are done."""
    import torch
    from capture.batching import row_cost
    from capture.recorder import attention_windows

    folder = args.output_dir / style_name if nested else args.output_dir
    wanted = min(args.max_samples or len(reader.file.rows), len(reader.file.rows))
    ends = [wanted] if args.overwrite else planned_ends(folder, reader.file.rows, wanted)
    if wanted < ends[-1]:
        log.warning(f"{folder}: this run has {ends[-1]} samples and goes on with these, not with {wanted}")
    style = reader.style(style_name, ends[-1])
    if style.unmatched:
        log.info(
            f"{style_name}: {style.unmatched} of {style.unmatched + len(style.texts)} prompts are left out: the words "
            "of their clean form cannot be cut into as many tokens as the typo has"
        )
    tell_control_tokens(style)
    itemsize = getattr(torch, model["dtype"]).itemsize
    cost = row_cost(config, capture_options(args), len(style.names), len(style.pooled), itemsize)
    index, count = args.shard
    # Each style begins with another shard, else the only file of every small style fell to shard 0.
    first = [*reader.file.style_counts].index(matched_style(style_name) or style_name) + bool(matched_style(style_name))
    layout = plan_layout(style, cost, ends)
    files = [positions for i, positions in enumerate(layout, first) if i % count == index]
    settings = run_settings(args, reader.file, style, model, ends[-1])
    return StyleJob(style, folder, settings, cost, ends, layout, files, set(), attention_windows(config))


def plan_layout(style: StylePrompts, cost: RowCost, ends: list[int]) -> list[range]:
    """The positions of each file: a run that grew keeps the files it had, and its new rows lie in new ones."""
    from capture.batching import plan_files

    files, start = [], 0
    for end in ends:
        stop = sum(index < end for index, _ in style.texts)
        files += [range(start + p.start, start + p.stop) for p in plan_files(style.lengths[start:stop], cost)]
        start = stop
    return files


def tell_control_tokens(style: StylePrompts) -> None:
    """Warn where prompts hold control tokens: they were read as text, or could not be."""
    for as_text, fate in ((True, "they are read as plain text"), (False, "this tokenizer has no plain text for them")):
        found = [(index, name) for index, names in style.controls.items() for name in names if names[name] is as_text]
        if found:
            names = " ".join(sorted({name for _, name in found}))
            count, first = len({index for index, _ in found}), found[0][0] + 1
            log.warning(
                f"{style.style}: {count} prompts (the first in row {first}) hold the control tokens {names}; {fate}"
            )


def find_done(job: StyleJob) -> None:
    """Leave in `job` only files that are not whole; rows of incomplete files are kept, damaged files run again."""
    left = []
    for positions in job.files:
        expected = {job.style.texts[position][0]: position for position in positions}
        path = job.path(positions)
        if path.is_file():
            try:
                content = load_pt(path)
                indices = content["original_indices"]
                if indices == list(expected):
                    continue
                job.kept |= {expected[index] for index in indices}
            except (UserError, KeyError) as error:
                log.warning(f"{error}; it is run again")
        left.append(positions)
    job.files = left


def capture_options(args: argparse.Namespace) -> Any:
    """CaptureOptions of the command line."""
    from capture.recorder import CaptureOptions

    return CaptureOptions(tuple(args.raw_layers), args.topk_logits, args.topk_positions, args.neurons, args.entropy)


def generation_options(args: argparse.Namespace, model: Any, tokenizer: Any) -> Any:
    """GenerationOptions of the command line; end-of-text tokens as the model's generation config names them."""
    from capture.decode import GenerationOptions

    named = model.generation_config.eos_token_id if model.generation_config else None
    named = tokenizer.eos_token_id if named is None else named
    ends = named if isinstance(named, list) else [named]
    return GenerationOptions(
        args.max_new_tokens, args.temperature, args.top_p, args.top_k, args.repetition_penalty, args.seed,
        args.num_samples, tuple(args.stop_strings), frozenset(i for i in ends if i is not None), args.response_logprobs,
    )  # fmt: skip


def preflight(jobs: list[StyleJob], output_dir: Path, force: bool) -> int:
    """Bytes that will be written. Raises UserError where the disk cannot hold them, unless forced."""
    from capture.batching import file_bytes

    wanted = sum(file_bytes(positions, job.style.lengths, job.cost) for job in jobs for positions in job.files)
    free = shutil.disk_usage(next(p for p in (output_dir, *output_dir.resolve().parents) if p.exists())).free
    if wanted:
        log.info(f"about {gigabytes(wanted)} will be written to {output_dir} ({gigabytes(free)} free)")
    if wanted > free and not force:
        raise UserError(
            f"{output_dir}: the run needs about {gigabytes(wanted)}, the disk has {gigabytes(free)} free; free space, "
            "use --raw_layers none, or --force"
        )
    return wanted


# --- running


class Stop:
    """Set by a signal: what is being read or decoded is finished and kept, nothing new is begun."""

    def __init__(self) -> None:
        self.asked = False
        self.previous = {}
        for number in (signal.SIGTERM, signal.SIGUSR1):
            self.previous[number] = signal.signal(number, self._ask)

    def _ask(self, *_: Any) -> None:
        self.asked = True
        log.warning("stopping: prompts under way are finished and kept; the same command goes on from there")

    def restore(self) -> None:
        """Give the signals back."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)


def run_style(
    job: StyleJob, reader: PromptReader, generator: Any, writer: Any, progress: Progress, stop: Stop, forced: Any
) -> None:
    """Run what is missing of one style and hand its files to the writer."""
    positions_of = {job.style.texts[p][0]: p for positions in job.files for p in positions}
    file_of = {p: positions for positions in job.files for p in positions}
    done: dict[range, dict[int, dict[str, Any] | None]] = {positions: {} for positions in job.files}
    tried: list[int] = []
    for position in job.kept:
        done[file_of[position]][position] = None  # read when its file is completed
    failed: dict[int, tuple[int | str, str]] = {}
    generator.set_regions(job.style.names, job.style.pooled)
    for result in generator.run(prompt_windows(job, reader, stop, forced)):
        position = positions_of[result.prompt.key]
        tried.append(result.prompt.key)
        positions = file_of[position]
        if result.error is None:
            done[positions][position] = result_row(result, job, reader, position, generator, forced is not None)
        else:
            failed[result.prompt.key] = (reader.file.element_index(result.prompt.key), result.error)
            done[positions][position] = {}
        progress.finished([response.finish_reason for response in result.responses])
        if len(done[positions]) == len(positions):
            write_file(job, positions, done.pop(positions), reader, writer)
    for positions, rows in done.items():  # only after a stop: what is there of unfinished files
        if len(rows) > sum(p in job.kept for p in positions):
            write_file(job, positions, rows, reader, writer)
    record_failures(job.folder, job.style.style, tried, failed)


def prompt_windows(job: StyleJob, reader: PromptReader, stop: Stop, forced: Any) -> Iterator[list[Any]]:
    """Windows of prompts, longest first."""
    from capture.batching import windows_of

    for files in windows_of(job.files, job.style.lengths, job.cost):
        if stop.asked:
            return
        positions = [p for positions in files for p in positions if p not in job.kept]
        positions.sort(key=lambda p: -job.style.lengths[p])
        responses = forced(job, positions) if forced else {}
        yield [reader.prompt(job.style, p, responses.get(p)) for p in positions]


def write_file(
    job: StyleJob, positions: range, rows: dict[int, dict[str, Any] | None], reader: PromptReader, writer: Any
) -> None:
    """Hand a file's rows, in the prompt file's order, to the writer; a file without rows is not made."""
    if any(row is None for row in rows.values()):
        earlier = {row["original_index"]: row for row in unpack_rows(load_pt(job.path(positions)))}
        rows = {p: earlier[job.style.texts[p][0]] if row is None else row for p, row in rows.items()}
    good = [row for _, row in sorted(rows.items()) if row]
    if good:
        shared = {
            "style": job.style.style,
            "regions": job.style.names,
            "pooled_regions": job.style.pooled,
            "topk_positions": job.settings["capture"]["topk_positions"],
            "attention_windows": job.windows,
        }
        writer.write(job.path(positions), good, shared, reader.tokenizer.pad_token_id)


def result_row(
    result: Any, job: StyleJob, reader: PromptReader, position: int, generator: Any, has_normal: bool
) -> dict[str, Any]:
    """One row of a .pt file; the captured fields join it when the file is written."""
    import torch
    from capture.background_writer import CAPTURED

    index, text = job.style.texts[position]
    first = result.responses[0]
    ids = result.prompt.input_ids
    row = {
        "original_index": index,
        "element_index": reader.file.element_index(index),
        "prompt": text,
        "response": first.text,
        "final_prediction": whole_text(reader.tokenizer, ids, first),
        "finish_reason": first.finish_reason,
        "response_token_count": len(first.ids),
        "input_ids": torch.tensor(ids),
        "attention_mask": torch.ones(len(ids), dtype=torch.bool),
        CAPTURED: result,
    }
    if generator.options.num_samples > 1:
        row["response_samples"] = [response.text for response in result.responses]
    if generator.options.response_logprobs:
        row["response_ids"] = torch.tensor(first.ids, dtype=torch.long)
        row["response_logprobs"] = torch.tensor(first.logprobs)
        if has_normal:  # NaN where this row has no normal response
            row["normal_response_logprob"] = float("nan") if result.forced_logprob is None else result.forced_logprob
            row["normal_response_token_count"] = len(result.prompt.forced_ids or ())
    return row


def whole_text(tokenizer: Any, ids: list[int], response: Any) -> str:
    """Prompt and response decoded together; what follows a stop string is cut off as in the response."""
    text = str(tokenizer.decode(ids + response.ids, skip_special_tokens=True))
    if response.finish_reason == "stop":
        full = str(tokenizer.decode(response.ids, skip_special_tokens=True))
        text = text[: len(text) - (len(full) - len(response.text))]
    return text


def normal_responses(normal: StyleJob, reader: PromptReader, generator: Any) -> Any:
    """For each row of a style: the token ids of the clean prompt's response, from disk where they are, else made."""
    position_of = {index: p for p, (index, _) in enumerate(normal.style.texts)}
    paths = {positions: normal.path(positions) for positions in normal.layout}
    known: dict[int, list[int]] = {}

    def look_up(job: StyleJob, positions: list[int]) -> dict[int, list[int]]:
        wanted = {job.style.texts[p][0]: p for p in positions if job.style.texts[p][0] in position_of}
        near = {index for index in wanted if index not in known}
        for files, path in paths.items():
            if not path.is_file() or not near & {normal.style.texts[p][0] for p in files}:
                continue
            try:
                content = load_pt(path)
            except UserError:
                continue  # being repaired: made anew below
            hits = [i for i, index in enumerate(content["original_indices"]) if index in wanted]
            for i in hits:
                ids = content["response_ids"][i]
                known[content["original_indices"][i]] = ids[ids >= 0].tolist()
        missing = [reader.prompt(normal.style, position_of[index]) for index in wanted if index not in known]
        if missing:
            spare = generator.twin(normal.style.names, normal.style.pooled)
            known.update(
                {result.prompt.key: result.responses[0].ids for result in spare.run([missing]) if not result.error}
            )
        found = {wanted[index]: known[index] for index in wanted if index in known}
        known.clear()
        return found

    return look_up


def run_jobs(
    args: argparse.Namespace, jobs: list[StyleJob], reader: PromptReader, model: Any, batching: Batching
) -> bool:
    """Run all styles with one loaded model. Returns whether a signal stopped the run."""
    from capture.background_writer import BackgroundWriter
    from capture.batching import batch_limit
    from capture.decode import Generator
    from capture.progress import Progress
    from capture.recorder import Recorder

    recorder = Recorder(model, capture_options(args))
    batch_size = "1" if batching.rows == "alone" else args.batch_size
    limit = batch_limit(
        batch_size, model, jobs[0].cost, args.num_samples, args.max_new_tokens, batching.rows == "equal"
    )
    generator = Generator(model, reader.tokenizer, recorder, generation_options(args, model, reader.tokenizer), limit)
    writer, stop = BackgroundWriter(), Stop()
    generator.stop = stop
    clean = next((job for job in jobs if job.style.style == reader.file.clean_key), None)
    forced = normal_responses(clean, reader, generator) if args.response_logprobs and clean else None
    try:
        generator.set_prefix(reader.shared_prefix() if batching.prefix else [])
        prefix = len(generator.prefix.ids) if generator.prefix else 0
        lengths = [job.style.lengths[p] - prefix for job in jobs for one in job.files for p in one if p not in job.kept]
        progress = Progress(len(lengths), sum(lengths), args.num_samples, args.max_new_tokens)
        generator.progress = progress
        with contextlib.closing(progress):
            for job in jobs:
                progress.style = job.style.style
                run_style(job, reader, generator, writer, progress, stop, forced if job is not clean else None)
                if stop.asked:
                    break
    finally:
        recorder.close()
        stop.restore()
        writer.close()
    if generator.prefill_tokens:
        log.debug(f"read {generator.prefill_tokens:,} tokens for prompts of {generator.prompt_tokens:,} tokens in all")
    return stop.asked


def checked_batching(args: argparse.Namespace, jobs: list[StyleJob], reader: PromptReader, model: Any) -> Batching:
    """How prompts may share a batch (see `check_model`). Raises UserError where the model cannot be captured."""
    from capture.model_check import Batching, check_model, positions_follow_the_longest_row

    first = next(job for job in jobs if job.style.texts)
    lengths = first.style.lengths
    other = next((p for p, length in enumerate(lengths) if length != lengths[0]), 0)
    longest = max(max(job.style.lengths, default=0) for job in jobs) + args.max_new_tokens
    uneven = positions_follow_the_longest_row(model.config, longest)
    rows = "alone" if args.batch_size == "1" else "equal" if uneven else "padded"
    prefix = not args.no_prefix_reuse and not uneven and prefix_is_usable(reader, model.config, longest)
    ids = [reader.prompt(first.style, position).input_ids for position in (0, other)]
    wanted = Batching(rows, prefix)
    found = check_model(model, reader.tokenizer, capture_options(args), ids, wanted, args.max_new_tokens)
    if rows != "alone" and (uneven or found.rows != rows):
        how = "only prompts of equal length share a batch" if found.rows == "equal" else "prompts are run one by one"
        log.info(f"in a padded batch this model's numbers would be others: {how}")
    return found


def prefix_is_usable(reader: PromptReader, config: Any, longest: int) -> bool:
    """Whether a shared prefix may be read once: no sliding window is shorter than the longest text.

    A padded prompt has its padding between the prefix and its own tokens, so a window would reach less far.
    """
    from capture.recorder import attention_windows

    reaches = all(window == 0 or 2 * longest <= window for window in attention_windows(config))
    return reaches and bool(reader.shared_prefix())


def main(argv: Sequence[str] | None = None) -> int:
    """Plan, load the model, run, tell what is missing."""
    args = parse_args(argv)
    prompts = read_prompt_file(args.prompt_file)
    styles = chosen_styles(prompts, args.prompt_keys)
    for number, problem in enumerate(prompts.problems):
        (log.warning if number < 3 else log.debug)(f"{prompts.path}: {problem}")
    if len(prompts.problems) > 3:
        log.warning(f"{prompts.path}: {len(prompts.problems)} such problems in all; --verbose lists them")
    jobs, reader = plan_jobs(args, prompts, styles)
    todo = [job for job in jobs if job.files]
    with locked(args.output_dir):  # a folder that cannot be written is told now, not after an hour
        pass
    preflight(todo, args.output_dir, args.force)
    stopped = False
    if todo:
        stopped = load_and_run(args, jobs, reader)
        if not stopped:
            count = sum(job.missing for job in todo)
            log.info(
                f"{args.output_dir}: {count} prompts run, in the styles {' '.join(job.style.style for job in todo)}"
            )
    else:
        begin_all(args, jobs, None, prompts)
        log.info(f"{args.output_dir}: nothing to do, all prompts that can be run are done")
    failed = report_failures(jobs)
    return EXIT_STOPPED if stopped else failed  # a stopped run is not over, whatever failed so far


def plan_jobs(args: argparse.Namespace, prompts: PromptFile, styles: list[str]) -> tuple[list[StyleJob], PromptReader]:
    """The jobs of all styles, from config and tokenizer alone (no weights yet)."""
    from capture.batching import attention_layers
    from capture.prompts import PromptReader, Rendering, longest_prompt, read_few_shot
    from load_model import load_config, load_tokenizer
    from token_spans import template_text

    config = load_config(args.model_name, args.revision, args.trust_remote_code)
    tokenizer = load_tokenizer(args.model_name, args.revision, args.trust_remote_code)
    args.raw_layers = raw_layers(args.raw_layers, attention_layers(config))
    args.few_shot = read_few_shot(args.few_shot_file)
    rendering = Rendering(args.few_shot, args.apply_chat_template, args.system_prompt, args.task_regex)
    args.template_text = template_text(tokenizer, args.system_prompt) if args.apply_chat_template else None
    room = longest_prompt(config, args.max_new_tokens)
    reader = PromptReader(prompts, tokenizer, rendering, room, args.pool_regions)
    model = model_settings(args, config)
    nested = args.prompt_keys is not None
    jobs = [plan_style(args, reader, style, config, model, nested) for style in styles]
    for job in jobs:
        if not args.overwrite:
            check_same_run(job, prompts)
            find_done(job)
    if nested:
        check_siblings(args.output_dir, jobs, prompts)
    return jobs, reader


def check_same_run(job: StyleJob, prompts: PromptFile) -> None:
    """Refuse, before anything is loaded, a folder of another run."""
    if (job.folder / "run.json").is_file():
        begin_run(job.folder, job.settings, None, ends=job.ends, rows=prompts.rows)


def check_siblings(output_dir: Path, jobs: list[StyleJob], prompts: PromptFile) -> None:
    """Refuse a run folder whose other styles were made by another model, prompt file or settings."""
    own = {job.folder for job in jobs}
    wanted = _of_all_styles(json.loads(json.dumps(jobs[0].settings)))
    for path in sorted(output_dir.glob("*/run.json")):
        if path.parent in own:
            continue
        known = _of_all_styles(read_json_file(path).get("settings", {}))
        if found := differences(known, wanted):
            raise UserError(
                f"{path.parent}: a style of another run ({'; '.join(found)}); styles of one run are compared, "
                "so use its settings or another --output_dir"
            )
        rows, own_rows = planned_ends(path.parent, prompts.rows, 0)[-1], jobs[0].ends[-1]
        if rows != own_rows:
            log.warning(
                f"{path.parent.name} has {rows} samples, not {own_rows}: styles are compared on the rows that both have"
            )


def _of_all_styles(settings: dict[str, Any]) -> dict[str, Any]:
    capture = {key: value for key, value in settings.get("capture", {}).items() if key != "pooled_regions"}
    return {key: value for key, value in settings.items() if key not in ("style", "regions")} | {"capture": capture}


def load_and_run(args: argparse.Namespace, jobs: list[StyleJob], reader: PromptReader) -> bool:
    """Load the model and run what is missing."""
    from capture.cpu_speed import keep_heap, onednn_linears
    from load_model import load_model

    model, _ = load_model(
        args.model_name, args.dtype, args.device_map, args.revision, args.trust_remote_code, args.attn_implementation
    )
    kept = bool(args.raw_layers) and keep_heap(model.device)
    with onednn_linears(model) as linears:
        batching = checked_batching(args, jobs, reader, model)
        where = environment(args, model) | {"heap_kept": kept, "onednn_linears": linears, "batches": batching.rows}
        begin_all(args, jobs, where, reader.file)
        return run_jobs(args, jobs, reader, model, batching)


def begin_all(
    args: argparse.Namespace, jobs: list[StyleJob], where: dict[str, Any] | None, prompts: PromptFile
) -> None:
    """Write prompts.json and every style's run.json, or find them the same."""
    for job in jobs:
        begin_run(job.folder, job.settings, where or {}, args.overwrite, job.ends, prompts.rows, len(job.style.texts))
        record_failures(job.folder, job.style.style, job.style.failures, job.style.failures)
        for positions in job.files:
            remove_leftovers(job.path(positions))
    copy = args.output_dir / "prompts.json"
    with locked(args.output_dir):
        remove_leftovers(copy)
        if not copy.is_file() or copy.read_bytes() != prompts.content:
            with atomic_path(copy) as temporary:
                temporary.write_bytes(prompts.content)


def report_failures(jobs: list[StyleJob]) -> int:
    """1 where prompts of any style failed, else 0; says where to look, and which ones are tried again."""
    from run_store import read_failures

    failed = False
    for job in jobs:
        lines = read_failures(job.folder)
        never = [lines[index] for index in sorted(lines) if index in job.style.failures]
        again, where = len(lines) - len(never), job.folder / "failures.csv"
        if never:
            first = f"the first: {one_line(never[0][-1], 200)}"
            log.warning(
                f"{job.style.style}: {len(never)} prompts cannot be run with these settings ({first}); see {where}"
            )
        if again:
            log.warning(
                f"{job.style.style}: {again} prompts were not run; the same command tries them again; see {where}"
            )
        failed = failed or bool(lines)
    return int(failed)


if __name__ == "__main__":
    run_main(main)
