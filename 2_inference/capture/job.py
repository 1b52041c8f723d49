"""One command of stage 2: plan its files, load the model, run what is missing, write the files, report failures."""

from __future__ import annotations

import argparse
import json
import math
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

import torch
import transformers
from command_line import UserError, one_line
from file_output import atomic_path, gigabytes, remove_leftovers
from given_responses import GivenResponses, missing_text, read_responses
from load_json import PromptFile, chosen_styles, read_prompt_file
from load_model import load_config, load_model, load_tokenizer, model_fingerprint, resolve_dtype
from logger import get_logger
from pt_fields import SCHEMA_VERSION, pack_rows, unpack_rows
from run_store import (
    begin_run,
    differences,
    load_pt,
    locked,
    planned_ends,
    read_failures,
    read_json_file,
    record_failures,
    save_pt,
)
from stamps import note_written
from style_names import is_again, matched_style, source_style
from token_spans import template_text

from capture.batching import RowCost, attention_layers, batch_limit, file_bytes, plan_files, row_cost, windows_of
from capture.cpu_speed import keep_heap
from capture.decode import GenerationOptions, Generator, Prompt, Response, Result
from capture.model_check import Batching, check_model, positions_follow_the_longest_row
from capture.progress import Progress
from capture.prompts import PromptReader, Rendering, StylePrompts, longest_prompt, read_few_shot
from capture.recorder import CaptureOptions, Recorder, attention_windows, chosen_raw_layers
from capture.server_text import RESPONSES, ask_server, stored_responses
from capture.text_engine import running_server

EXIT_STOPPED = 75
SAMPLING_FLAGS = ("temperature", "top_p", "top_k", "repetition_penalty", "num_samples", "seed")
GENERATION_FLAGS = ("max_new_tokens", *SAMPLING_FLAGS, "stop_strings", "response_logprobs")
LOGPROB_FLAGS = ("answer_logprobs", "cross_logprobs")
CAPTURE_FLAGS = ("raw_layers", "topk_logits", "topk_positions", "neurons", "gates", "entropy", "pooled_dtype")
SHOWN_PROBLEMS = 3  # of a prompt file; --verbose shows all
log = get_logger("attn_act_logi")


def run_command(args: argparse.Namespace, model: Any = None) -> int:
    """Do what the command line asks for, with `model` if one is loaded already; returns the exit code."""
    jobs, reader = plan_jobs(args)
    if (args.base_url or args.stored_text) and any(job.files for job in jobs) and server_text(args, jobs, reader):
        return EXIT_STOPPED
    if args.stored_text and reader.given and not reader.given.texts:
        raise UserError(f"{args.output_dir}: --stored_text: there is no {RESPONSES}; serve_responses.py writes it")
    if reader.given:
        hold_back(args, jobs, reader, reader.given)
    todo = [job for job in jobs if job.files]
    with locked(args.output_dir):  # a folder that cannot be written is reported now, not after an hour
        pass
    size = bytes_left(jobs)
    free = shutil.disk_usage(next(p for p in (args.output_dir, *args.output_dir.resolve().parents) if p.exists())).free
    if size:
        log.info(f"about {gigabytes(size)} will be written to {args.output_dir} ({gigabytes(free)} free)")
    if size > free and not args.force:
        raise UserError(
            f"{args.output_dir}: the run needs about {gigabytes(size)}, the disk has {gigabytes(free)} free; "
            "free space, use --raw_layers none, or --force"
        )
    if not todo:
        begin_jobs(args, jobs, {}, reader.file)
        log.info(f"{args.output_dir}: nothing to do, all prompts that can be run are done")
        return report_failures(jobs)

    if model is None:
        options = (args.dtype, args.device_map, args.revision, args.trust_remote_code, args.attn_implementation)
        model, _ = load_model(args.model_name, *options)
    kept = bool(args.raw_layers) and keep_heap(model.device)
    batching = checked_batching(args, jobs, reader, model)
    begin_jobs(args, jobs, environment(args, model) | {"heap_kept": kept, "batches": batching.rows}, reader.file)
    stopped = run_jobs(args, jobs, reader, model, batching)
    if not stopped:
        names = " ".join(job.style.style for job in todo)
        missing = sum(len(job.left(positions)) for job in todo for positions in job.files)
        log.info(f"{args.output_dir}: {missing} prompts run, in the styles {names}")
    failed = report_failures(jobs)
    return EXIT_STOPPED if stopped else failed  # a stopped run is not over, whatever failed so far


def store_text(args: argparse.Namespace, command: str, start_limit: float) -> int:
    """Store a server's responses and capture nothing; returns the exit code.

    Without --base_url, `command` starts the server, which must answer within `start_limit` seconds.
    """
    jobs, reader = plan_jobs(args)
    values = {"model": args.model_name, "revision": args.revision or "main", "dtype": jobs[0].settings["dtype"]}
    values["gpus"] = str(torch.cuda.device_count() or 1)
    own = partial(running_server, command, values, args.output_dir / "server.log", start_limit)
    if server_text(args, jobs, reader, None if args.base_url else own):
        return EXIT_STOPPED
    assert reader.given is not None
    hold_back(args, jobs, reader, reader.given)
    begin_jobs(args, jobs, {}, reader.file)  # writes failures.csv
    for job in jobs:
        note_written(job.folder / RESPONSES)
    return int(any(job.held for job in jobs))


def server_text(
    args: argparse.Namespace,
    jobs: list[StyleJob],
    reader: PromptReader,
    server: Callable[[Event], AbstractContextManager[str]] | None = None,
) -> bool:
    """Put a server's responses into `reader.given`: those that are stored and, if there is a server, the missing ones.

    server: starts one in a context, which gives its address; used only if a response is missing. Its event says that a
    signal has stopped the run. Returns whether one has.
    """
    begin_jobs(args, jobs, {}, reader.file)  # refuses other settings before anything is asked
    args.overwrite = False
    store = stored_responses(args, jobs, reader)
    with stopped_by_signals(stop := Event()), ExitStack() as stack:
        if store.missing and server:
            args.base_url = stack.enter_context(server(stop))
        if store.missing and args.base_url:
            ask_server(args, reader, store, stop)
    reader.given = store.given(args.base_url or RESPONSES)
    return stop.is_set()


# --- plan


@dataclass
class StyleJob:
    """One style: all its files, and those of this shard that are not whole yet."""

    style: StylePrompts
    folder: Path
    settings: dict[str, Any]
    cost: RowCost
    ends: list[int]  # see `planned_ends`
    layout: list[range]  # positions of all files
    files: list[range]
    windows: list[int]  # the layers' attention windows
    kept: set[int] = field(default_factory=set)  # positions whose rows incomplete files already hold
    held: dict[int, str] = field(default_factory=dict)  # positions without a response from elsewhere, and why

    def left(self, positions: range) -> list[int]:
        """Those of a file's positions that are to be run."""
        return [p for p in positions if p not in self.kept and p not in self.held]

    def path(self, positions: range) -> Path:
        """Name of a file."""
        return self.folder / f"activations_{positions.start:05d}_{positions.stop:05d}.pt"


def plan_jobs(args: argparse.Namespace) -> tuple[list[StyleJob], PromptReader]:
    """The jobs of all styles, from config and tokenizer alone (no weights yet). Resolves `args.raw_layers`.

    Raises UserError if a folder holds another run.
    """
    # 1. The prompt file.
    prompts = read_prompt_file(args.prompt_file)
    styles = chosen_styles(prompts, args.prompt_keys)
    if args.cross_logprobs and prompts.clean_key not in styles:
        raise UserError(f"--cross_logprobs: needs the clean form; name {prompts.clean_key or 'it'} in --prompt_keys")
    for number, problem in enumerate(prompts.problems):
        (log.warning if number < SHOWN_PROBLEMS else log.debug)(f"{prompts.path}: {problem}")
    if len(prompts.problems) > SHOWN_PROBLEMS:
        log.warning(f"{prompts.path}: {len(prompts.problems)} such problems in all; --verbose lists them")

    # 2. `settings` of run.json that all styles share: all that decides the content of the files, and nothing else.
    config = load_config(args.model_name, args.revision, args.trust_remote_code)
    tokenizer = load_tokenizer(args.model_name, args.revision, args.trust_remote_code)
    args.raw_layers = chosen_raw_layers(args.raw_layers, attention_layers(config))
    few_shot, chat = read_few_shot(args.few_shot_file), args.apply_chat_template
    rendering = Rendering(few_shot, chat, args.system_prompt, args.task_regex)
    longest, room = longest_prompt(config, args.max_new_tokens), args.max_new_tokens if args.answer_logprobs else None
    reader = PromptReader(prompts, tokenizer, rendering, longest, args.pool_regions, room)
    reader.scores_given = args.response_logprobs
    if args.responses_file:
        reader.given = read_responses(args.responses_file, prompts, styles[0] if len(styles) == 1 else None)
        reader.given.report()
    folder = Path(args.model_name)
    settings = {
        "schema_version": SCHEMA_VERSION,
        # The fingerprint separates folders of one name.
        "model_name": folder.resolve().name if folder.is_dir() else args.model_name,
        "revision": args.revision,
        "model_fingerprint": model_fingerprint(args.model_name, config),
        "dtype": resolve_dtype(args.dtype, config, args.device_map),
        "attn_implementation": args.attn_implementation,
        "trust_remote_code": args.trust_remote_code,
        "prompt_sha256": prompts.sha256,
        "few_shot_text": few_shot,
        "apply_chat_template": chat,
        "system_prompt": args.system_prompt,
        "chat_template_text": template_text(tokenizer, args.system_prompt) if chat else None,
        "task_regex": args.task_regex,
        "generation": {name: getattr(args, name) for name in (*GENERATION_FLAGS, *LOGPROB_FLAGS)},
        "capture": {name: getattr(args, name) for name in CAPTURE_FLAGS},
    }
    if args.base_url or args.stored_text:
        settings["generation"] |= {"text": "server", "server_model": args.server_model}
    if reader.given:
        settings["generation"] |= dict.fromkeys(("max_new_tokens", *SAMPLING_FLAGS)) | {"text": "responses_file"}
        settings["responses_sha256"] = reader.given.sha256

    # 3. Every style, and what is there of it.
    jobs = [plan_style(args, reader, style, config, settings) for style in styles]
    for job in jobs if not args.overwrite else ():
        if (job.folder / "run.json").is_file():
            begin_run(job.folder, job.settings, None, ends=job.ends, rows=prompts.rows)
        find_done(job, reader.given)
    if args.prompt_keys is not None:
        check_other_styles(args.output_dir, jobs, prompts)
    return jobs, reader


def plan_style(
    args: argparse.Namespace, reader: PromptReader, name: str, config: Any, settings: dict[str, Any]
) -> StyleJob:
    """Tokenise a style and lay out its files; this shard has every n-th of them."""
    # 1. Its prompts, and warnings about them.
    folder = args.output_dir / name if args.prompt_keys is not None else args.output_dir
    wanted = min(args.max_samples or len(reader.file.rows), len(reader.file.rows))
    ends = [wanted] if args.overwrite else planned_ends(folder, reader.file.rows, wanted)
    if wanted < ends[-1]:
        log.warning(f"{folder}: this run has {ends[-1]} samples and goes on with these, not with {wanted}")
    style = reader.style(name, ends[-1])
    if style.unmatched:
        count = f"{style.unmatched} of {style.unmatched + len(style.texts)}"
        why = "no neutral sentence has as many tokens as what the style adds, or it adds nothing around the clean form"
        if matched_style(name):
            why = "the words of their clean form cannot be cut into as many tokens as the typo has"
        log.info(f"{name}: {count} prompts are left out: {why}")
    for as_text, fate in ((True, "they are read as plain text"), (False, "this tokenizer has no plain text for them")):
        found = [(index, token) for index, seen in style.controls.items() for token in seen if seen[token] is as_text]
        if found:
            tokens = " ".join(sorted({token for _, token in found}))
            count = f"{len({index for index, _ in found})} prompts (the first in row {found[0][0] + 1})"
            log.warning(f"{name}: {count} hold the control tokens {tokens}; {fate}")

    # 2. Its files.
    itemsize = getattr(torch, settings["dtype"]).itemsize
    cost = row_cost(config, capture_options(args), len(style.names), len(style.pooled), itemsize)
    layout, start = [], 0
    for end in ends:  # a run that grew keeps the files it had; its new rows are in new ones
        stop = sum(index < end for index, _ in style.texts)
        layout += [range(start + p.start, start + p.stop) for p in plan_files(style.lengths[start:stop], cost)]
        start = stop
    index, count = args.shard
    # Each style begins with another shard, else the only file of every small style fell to shard 0.
    first = [*reader.file.style_counts].index(source_style(name)) + (source_style(name) != name)
    files = [positions for i, positions in enumerate(layout, first) if i % count == index]
    own = {"style": name, "max_samples": ends[-1], "regions": style.names}
    own["capture"] = settings["capture"] | {"pooled_regions": style.pooled}
    return StyleJob(style, folder, settings | own, cost, ends, layout, files, attention_windows(config))


def find_done(job: StyleJob, given: GivenResponses | None = None) -> None:
    """Leave in `job` only files that are not whole; rows of incomplete files are kept, damaged files run again.

    Raises UserError if a row is there with another response than it is `given` now.
    """
    left = []
    for positions in job.files:
        expected = {job.style.texts[position][0]: position for position in positions}
        path = job.path(positions)
        if path.is_file():
            try:
                content = load_pt(path)
                indices = content["original_indices"]
                if given:
                    check_responses(job, content, given)
                if indices == list(expected):
                    continue
                job.kept |= {expected[index] for index in indices}
            except OtherResponses as error:
                raise UserError(str(error)) from None
            except (UserError, KeyError) as error:
                log.warning(f"{error}; it is run again")
        left.append(positions)
    job.files = left


class OtherResponses(Exception):
    """A file holds other responses than those that are given now."""


def check_responses(job: StyleJob, content: dict[str, Any], given: GivenResponses) -> None:
    """Raise OtherResponses if a row of a .pt file has another response than it is given now."""
    for index, text in zip(content["original_indices"], content["responses"], strict=True):
        now = given.of(job.style.style, index)
        if now and now[0].text != text:
            texts = f"row {index + 1}: {one_line(text, 40)!r} there, {one_line(now[0].text, 40)!r} now"
            raise OtherResponses(
                f"{job.folder}: holds a run of other responses ({texts}); use its --responses_file, another "
                "--output_dir, or --overwrite"
            )


def hold_back(args: argparse.Namespace, jobs: list[StyleJob], reader: PromptReader, given: GivenResponses) -> None:
    """Find the prompts that cannot be run for want of a response, and warn about them; they are in `held`."""
    # 1. Those without one.
    longest: dict[int, int] = {}
    for job in jobs:
        name = job.style.style
        for p in (p for positions in job.files for p in job.left(positions)):
            if not given.of(name, index := job.style.texts[p][0]):
                job.held[p] = given.why_missing(name, index)
        for index, _ in job.style.texts if args.response_logprobs else ():
            count = len(reader.response_ids(name, index) or ())
            longest[index] = max(longest.get(index, 0), count)
            job.style.longest_answer = max(job.style.longest_answer, count)
    missing = {job.style.style: [job.style.texts[p][0] for p in job.held] for job in jobs}
    if text := missing_text(missing, given.source):
        log.warning(f"{text}; failures.csv in {args.output_dir} has them")

    # 2. Those that leave no room for the row's responses, where these are scored.
    context = reader.max_length + args.max_new_tokens
    for job in jobs:
        for p in (p for positions in job.files for p in job.left(positions)):
            prompt, response = job.style.lengths[p], longest.get(job.style.texts[p][0], 0)
            if prompt + response > context:
                tokens = f"has {prompt} tokens, and a response of the row {response}"
                job.held[p] = f"{tokens}; with --response_logprobs this model has room for {context} together"

        # 3. A file without anything else to run is as whole as it can be.
        job.files = [positions for positions in job.files if job.left(positions)]


def check_other_styles(output_dir: Path, jobs: list[StyleJob], prompts: PromptFile) -> None:
    """Refuse a run folder whose other styles were made by another model, prompt file or settings."""

    def shared(settings: dict[str, Any]) -> dict[str, Any]:
        capture = {key: value for key, value in settings.get("capture", {}).items() if key != "pooled_regions"}
        return {key: value for key, value in settings.items() if key not in ("style", "regions")} | {"capture": capture}

    own, rows = json.loads(json.dumps(shared(jobs[0].settings))), jobs[0].ends[-1]
    for path in sorted(output_dir.glob("*/run.json")):
        if path.parent in {job.folder for job in jobs}:
            continue
        if found := differences(shared(read_json_file(path).get("settings", {})), own):
            raise UserError(
                f"{path.parent}: a style of another run ({'; '.join(found)}); styles of one run are compared, "
                "so use its settings or another --output_dir"
            )
        if (other := planned_ends(path.parent, prompts.rows, 0)[-1]) != rows:
            both = "styles are compared on the rows that both have"
            log.warning(f"{path.parent.name} has {other} samples, not {rows}: {both}")


def bytes_left(jobs: list[StyleJob]) -> int:
    """Estimated size of the files that are not whole yet."""
    return sum(file_bytes(positions, job.style.lengths, job.cost) for job in jobs for positions in job.files)


# --- begin


def capture_options(args: argparse.Namespace) -> CaptureOptions:
    """CaptureOptions of the command line."""
    return CaptureOptions(**{name: getattr(args, name) for name in CAPTURE_FLAGS})


def checked_batching(args: argparse.Namespace, jobs: list[StyleJob], reader: PromptReader, model: Any) -> Batching:
    """How prompts may share a batch (see `check_model`). Raises UserError if the model cannot be captured."""
    first = next(job for job in jobs if job.style.texts)
    lengths = first.style.lengths
    other = next((p for p, length in enumerate(lengths) if length != lengths[0]), 0)
    longest = max(max(job.style.lengths, default=0) for job in jobs) + longest_continuation(args, jobs)
    uneven = positions_follow_the_longest_row(model.config, longest)
    rows = "alone" if args.batch_size == "1" else "equal" if uneven else "padded"
    # A padded prompt has its padding between a shared prefix and its own tokens, so a window would reach less far.
    reaches = all(window == 0 or 2 * longest <= window for window in attention_windows(model.config))
    prefix = not args.no_prefix_reuse and not uneven and reaches and bool(reader.shared_prefix())
    ids = [reader.prompt(first.style, position).input_ids for position in (0, other)]
    wanted = Batching(rows, prefix)
    steps = 0 if reader.given else args.max_new_tokens
    found = check_model(model, reader.tokenizer, capture_options(args), ids, wanted, steps)
    if rows != "alone" and (uneven or found.rows != rows):
        how = "only prompts of equal length share a batch" if found.rows == "equal" else "prompts are run one by one"
        log.info(f"in a padded batch this model's numbers would be others: {how}")
    return found


def longest_continuation(args: argparse.Namespace, jobs: list[StyleJob]) -> int:
    """Most tokens that may be generated or scored after a prompt."""
    return max(args.max_new_tokens, *(job.style.longest_answer for job in jobs))


def environment(args: argparse.Namespace, model: Any) -> dict[str, Any]:
    """Where a run took place: versions, device, threads, commit. Recorded, not compared."""
    commit = None
    with suppress(OSError):  # git is not installed
        command = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "HEAD"]
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
    } | {name: value for name in ("responses_file", "base_url") if (value := getattr(args, name))}


def begin_jobs(args: argparse.Namespace, jobs: list[StyleJob], where: dict[str, Any], prompts: PromptFile) -> None:
    """Write prompts.json and every style's run.json, or find them the same."""
    for job in jobs:
        begin_run(job.folder, job.settings, where, args.overwrite, job.ends, prompts.rows, len(job.style.texts))
        failures = job.style.failures | {
            job.style.texts[p][0]: (prompts.element_index(job.style.texts[p][0]), why) for p, why in job.held.items()
        }
        record_failures(job.folder, job.style.style, failures, failures)
        for positions in job.files:
            remove_leftovers(job.path(positions))
    copy = args.output_dir / "prompts.json"
    with locked(args.output_dir):
        remove_leftovers(copy)
        if not copy.is_file() or copy.read_bytes() != prompts.content:
            with atomic_path(copy) as temporary:
                temporary.write_bytes(prompts.content)


# --- run


class FileWriter:
    """Packs and writes files in a thread of its own while the model works; two at most are under way.

    An error there is raised by the next `write`, or by `close`.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="writer")
        self._files: list[Future[None]] = []

    def write(
        self, path: Path, rows: Sequence[tuple[dict[str, Any], Result | None]], shared: dict[str, Any], pad: int
    ) -> None:
        """Write one file of (row, its result, whose captured fields may still be on their way from a GPU)."""

        def write_now() -> None:
            whole = [row if result is None else row | result.fields for row, result in rows]
            save_pt(path, pack_rows(whole, shared, pad))

        while self._files and (len(self._files) > 1 or self._files[0].done()):
            self._files.pop(0).result()
        self._files.append(self._pool.submit(write_now))

    def close(self) -> None:
        """Wait until all is written."""
        self._pool.shutdown()
        for file in self._files:
            file.result()


@contextmanager
def stopped_by_signals(stop: Event) -> Iterator[None]:
    """While inside, SIGTERM and SIGUSR1 set `stop`: what is under way is finished and kept, nothing new is begun."""

    def ask(*_: Any) -> None:
        stop.set()
        log.warning("stopping: prompts under way are finished and kept; the same command goes on from there")

    previous = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def run_jobs(
    args: argparse.Namespace, jobs: list[StyleJob], reader: PromptReader, model: Any, batching: Batching
) -> bool:
    """Run all styles with one loaded model. Returns whether a signal stopped the run."""
    ends = end_tokens(model, reader.tokenizer)
    options = GenerationOptions(**{name: getattr(args, name) for name in GENERATION_FLAGS}, eos_token_ids=ends)
    if reader.given:
        options = replace(options, max_new_tokens=0, num_samples=1)
    batch_size = "1" if batching.rows == "alone" else args.batch_size
    rows = {"samples": options.num_samples, "new_tokens": longest_continuation(args, jobs)}
    rows["equal_lengths"] = batching.rows == "equal"
    limit = batch_limit(batch_size, model, jobs[0].cost, **rows)
    with ExitStack() as stack:
        writer = stack.enter_context(closing(FileWriter()))
        recorder = stack.enter_context(closing(Recorder(model, capture_options(args))))
        generator = Generator(model, reader.tokenizer, recorder, options, limit)
        stack.enter_context(stopped_by_signals(generator.stop))
        clean = next((job for job in jobs if job.style.style == reader.file.clean_key), None)
        normal = NormalForm(clean, reader, generator) if args.response_logprobs and clean else None
        generator.set_prefix(reader.shared_prefix() if batching.prefix else [])
        prefix = len(generator.prefix.ids) if generator.prefix else 0
        lengths = [job.style.lengths[p] - prefix for job in jobs for one in job.files for p in job.left(one)]
        progress = Progress(len(lengths), sum(lengths), options.num_samples, options.max_new_tokens)
        generator.progress = stack.enter_context(closing(progress))
        for job in jobs:
            progress.style = job.style.style
            generator.limit = limit.half() if is_again(job.style.style) else limit
            run_style(job, reader, generator, writer, normal if job is not clean else None, args.cross_logprobs)
            if generator.stop.is_set():
                break
    log.debug(f"read {generator.prefill_tokens:,} tokens for prompts of {generator.prompt_tokens:,} tokens in all")
    return generator.stop.is_set()


def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens that end a response: the model's own, else the tokenizer's."""
    ends = model.generation_config.eos_token_id if model.generation_config else None
    ends = tokenizer.eos_token_id if ends is None else ends
    return frozenset(i for i in (ends if isinstance(ends, list) else [ends]) if i is not None)


Rows = dict[int, tuple[dict[str, Any], Result]]  # finished prompts by their position


def run_style(
    job: StyleJob,
    reader: PromptReader,
    generator: Generator,
    writer: FileWriter,
    normal: NormalForm | None,
    cross: bool,
) -> None:
    """Run what is missing of one style and hand its files to the writer, each when its last prompt is done.

    normal: the clean form, if its responses are to be scored after this style's prompts; cross: and this style's
    responses after the clean form's prompts.
    """
    position_of = {job.style.texts[p][0]: p for positions in job.files for p in positions}
    file_of = {p: positions for positions in job.files for p in positions}
    missing = {positions: len(job.left(positions)) for positions in job.files}
    done: dict[range, Rows] = {positions: {} for positions in job.files}
    tried: list[int] = []
    failed: dict[int, tuple[int | str, str]] = {}

    def windows() -> Iterator[list[Prompt]]:
        for files in windows_of(job.files, job.style.lengths, job.cost):
            if generator.stop.is_set():
                return
            positions = [p for positions in files for p in job.left(positions)]
            # The clean form again meets other neighbours: the shortest first.
            positions.sort(key=lambda p: -job.style.lengths[p], reverse=is_again(job.style.style))
            responses = normal.responses(job, positions) if normal else {}
            yield [reader.prompt(job.style, p, responses.get(p)) for p in positions]

    def finish(positions: range, rows: Rows) -> None:
        if normal and cross:
            for result in normal.scored(
                {row["original_index"]: row["response_ids"].tolist() for row, _ in rows.values()}
            ):
                position = position_of[result.prompt.key]
                if result.error is None:
                    rows[position][0]["response_logprob_under_normal"] = sum(result.forced_logprobs["style"][0])
                else:
                    failed[result.prompt.key] = (reader.file.element_index(result.prompt.key), result.error)
                    del rows[position]
        write_file(job, positions, rows, reader, writer)

    generator.set_regions(job.style.names, job.style.pooled)
    for result in generator.run(windows()):
        key = result.prompt.key
        positions = file_of[position_of[key]]
        tried.append(key)
        if result.error is None:
            row = result_row(result, job.style, position_of[key], reader, generator, normal is not None)
            if normal and cross:
                row["response_logprob_under_normal"] = math.nan  # the row may have no clean form
            done[positions][position_of[key]] = row, result
        else:
            failed[key] = (reader.file.element_index(key), result.error)
        generator.progress.finished([response.finish_reason for response in result.responses])
        missing[positions] -= 1
        if not missing[positions]:
            finish(positions, done.pop(positions))
    for positions, rows in done.items():  # only after a stop: what there is of unfinished files
        finish(positions, rows)
    record_failures(job.folder, job.style.style, tried, failed)


def write_file(job: StyleJob, positions: range, rows: Rows, reader: PromptReader, writer: FileWriter) -> None:
    """Hand a file's new rows, and those that it already holds, to the writer in the prompt file's order."""
    if not rows:
        return
    earlier = {}
    if not job.kept.isdisjoint(positions):
        earlier = {row["original_index"]: row for row in unpack_rows(load_pt(job.path(positions)))}
    old = {p: (earlier[job.style.texts[p][0]], None) for p in positions if p in job.kept}
    shared = {
        "style": job.style.style,
        "regions": job.style.names,
        "pooled_regions": job.style.pooled,
        "topk_positions": job.settings["capture"]["topk_positions"],
        "attention_windows": job.windows,
    }
    whole = [row for _, row in sorted((old | rows).items())]
    writer.write(job.path(positions), whole, shared, reader.tokenizer.pad_token_id)


def result_row(
    result: Result, style: StylePrompts, position: int, reader: PromptReader, generator: Generator, has_normal: bool
) -> dict[str, Any]:
    """One row of a .pt file; the captured fields join it when the file is written."""
    (index, text), ids, first = style.texts[position], result.prompt.input_ids, result.responses[0]
    given = reader.given.of(style.style, index) if reader.given else []
    if given:
        logprobs = (result.forced_logprobs.get("response") or [[]])[0]
        own = result.prompt.response_ids or []
        first = Response(result.prompt, 0, own, logprobs, given[0].text, given[0].finish_reason)
    row: dict[str, Any] = {
        "original_index": index,
        "element_index": reader.file.element_index(index),
        "prompt": text,
        "response": first.text,
        "final_prediction": whole_text(reader.tokenizer, ids, first, bool(given)),
        "finish_reason": first.finish_reason,
        "response_token_count": len(first.ids),
        "input_ids": torch.tensor(ids),
        "attention_mask": torch.ones(len(ids), dtype=torch.bool),
    }
    if generator.options.num_samples > 1:
        row["response_samples"] = [response.text for response in result.responses]
    elif reader.given and reader.given.has_samples:
        row["response_samples"] = [response.text for response in given]
    if generator.options.response_logprobs:
        row["response_ids"] = torch.tensor(first.ids, dtype=torch.long)
        row["response_logprobs"] = torch.tensor(first.logprobs)
        if has_normal:  # NaN if this row has no normal response
            row["normal_response_logprob"] = next(map(sum, result.forced_logprobs["normal"]), math.nan)
            row["normal_response_token_count"] = sum(map(len, result.prompt.forced["normal"]))
    if reader.answer_room is not None:
        row["answer_logprobs"] = torch.tensor([float(sum(one)) for one in result.forced_logprobs["answers"]])
        row["answer_token_counts"] = torch.tensor([*map(len, result.prompt.forced["answers"])], dtype=torch.long)
    return row


def whole_text(tokenizer: Any, ids: list[int], response: Response, given: bool = False) -> str:
    """Prompt and response decoded together; what follows a stop string is cut off as in the response.

    given: the response was made elsewhere, and follows the decoded prompt as it is.
    """
    if given:
        return str(tokenizer.decode(ids, skip_special_tokens=True)) + response.text
    text = str(tokenizer.decode(ids + response.ids, skip_special_tokens=True))
    if response.finish_reason == "stop":
        full = str(tokenizer.decode(response.ids, skip_special_tokens=True))
        text = text[: len(text) - (len(full) - len(response.text))]
    return text


class NormalForm:
    """The clean form: its responses, for other styles' prompts, and the responses to them after its own prompts."""

    def __init__(self, job: StyleJob, reader: PromptReader, generator: Generator):
        self.job, self.reader, self.generator = job, reader, generator
        self._position_of = {index: p for p, (index, _) in enumerate(job.style.texts)}

    def responses(self, job: StyleJob, positions: list[int]) -> dict[int, list[int]]:
        """Token ids of the clean form's responses by positions of another style; read from disk, else generated."""
        wanted = {job.style.texts[p][0]: p for p in positions if job.style.texts[p][0] in self._position_of}
        if self.reader.given:
            found = ((p, self.reader.response_ids(self.job.style.style, index)) for index, p in wanted.items())
            return {p: ids for p, ids in found if ids is not None}
        known: dict[int, list[int]] = {}
        for file in self.job.layout:
            rows = {self.job.style.texts[p][0] for p in file}
            if not self.job.path(file).is_file() or not wanted.keys() & rows:
                continue
            with suppress(UserError):  # of a damaged file; its responses are generated below
                content = load_pt(self.job.path(file))
                ids_of = zip(content["original_indices"], content["response_ids"], strict=True)
                known |= {index: ids[ids >= 0].tolist() for index, ids in ids_of if index in wanted}
        if missing := [self._prompt(index, {}) for index in wanted if index not in known]:
            results = self.generator.twin(self.job.style.names, self.job.style.pooled).run([missing])
            known |= {result.prompt.key: result.responses[0].ids for result in results if not result.error}
        return {wanted[index]: ids for index, ids in known.items()}

    def scored(self, responses: dict[int, list[int]]) -> Iterator[Result]:
        """Log-probabilities (`forced_logprobs["style"]`) of responses [token ids], by row, after the clean prompts."""
        rows = sorted(responses.keys() & self._position_of, key=lambda index: -self._length(index))
        return self.generator.scorer().run([[self._prompt(index, {"style": [responses[index]]}) for index in rows]])

    def _length(self, index: int) -> int:
        return self.job.style.lengths[self._position_of[index]]

    def _prompt(self, index: int, forced: dict[str, list[list[int]]]) -> Prompt:
        return replace(self.reader.prompt(self.job.style, self._position_of[index]), forced=forced)


# --- end


def report_failures(jobs: list[StyleJob]) -> int:
    """1 if prompts of any style failed, else 0; warns where to look, and which ones are tried again."""
    failed = False
    for job in jobs:
        lines, name, where = read_failures(job.folder), job.style.style, job.folder / "failures.csv"
        never = [lines[index] for index in sorted(lines) if index in job.style.failures]
        if never:
            why = f"cannot be run with these settings (the first: {one_line(never[0][-1], 200)})"
            log.warning(f"{name}: {len(never)} prompts {why}; see {where}")
        held = len(lines.keys() & {job.style.texts[p][0] for p in job.held})
        if again := len(lines) - len(never) - held:
            log.warning(f"{name}: {again} prompts were not run; the same command tries them again; see {where}")
        failed = failed or bool(lines)
    return int(failed)
