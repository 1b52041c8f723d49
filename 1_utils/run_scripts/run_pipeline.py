"""Run stages 0 to 5 on one or more prompt files and write the report: each script as a user would call it.

Reads   prompt files (0_data/*.json)
Writes  outputs/<run_name>/<file>/ (.pt files of stage 2) and results/<run_name>/<file>/ (findings, CSVs, plots) for
        each prompt file; results/<run_name>/report.html over all prompt files of this run_name

    python 1_utils/run_scripts/run_pipeline.py --model_name google/gemma-2-9b-it --prompt_file 0_data/maths.json \\
        --styles normal swap three --max_samples 200 --run_name gemma

A step that fails stops the run with its exit code. The same command again goes on from there: a step runs again only
if its arguments, inputs, outputs or code have changed since it last succeeded. Flags after `--` go to stage 2:
`-- --apply_chat_template --neurons`.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import shlex
import site
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

from command_line import EXIT_INTERRUPTED, EXIT_USER_ERROR, UnknownFlag, UserError, aligned, make_parser, run_main
from gold_words import has_words
from load_json import PromptFile, chosen_styles, read_prompt_file
from report_section import findings_of, read_sections
from report_tables import overview, worst_first
from run_status import unpatched
from run_store import open_run, outdated, row_indices, unfinished
from stamps import ROOT, files_in, is_done, place_of, read_stamp
from style_names import controlled_style, source_style
from warm_python import FreshPython, WarmPython

EXIT_SOME_FAILED = 1
EXIT_STOPPED = 75  # stage 2 was stopped by a signal
BAR = re.compile(r"\[\d+:\d\d[<,]")  # part of every line of a progress bar
say = partial(print, flush=True)  # lines stay in order with those of the steps
SECONDS_BETWEEN_BARS = 60  # in a log
TEXT_ENGINE = "what writes the responses before stage 2 captures; default: stage 2 itself"
REWARD_EXAMPLE = "OpenAssistant/reward-model-deberta-v3-large-v2"


@dataclass(frozen=True)
class Step:
    """One call of a stage's script. `after`: names of the steps of the same prompt file that make what it reads."""

    name: str
    script: str
    arguments: tuple[str, ...]
    after: tuple[str, ...] = ()

    @property
    def stem(self) -> str:
        """Name of the script without `.py`."""
        return Path(self.script).stem

    @property
    def place(self) -> Path:
        """The folder that the step writes into."""
        place = place_of(self.arguments, self.script)
        assert place is not None, self.script
        return place

    def __str__(self) -> str:
        """The command as a reader can paste it."""
        return shlex.join(["python", self.script, *self.arguments])


@dataclass(frozen=True)
class Job:
    """One prompt file and where its outputs and results go."""

    prompts: PromptFile
    output: Path
    results: Path


# --- what is to be done


def given(flag: str, value: Any) -> list[str]:
    """A flag with its value or values; nothing if there is none."""
    return [] if value in (None, "", []) else [flag, *map(str, value if isinstance(value, list) else [value])]


def check_flags(job: Job, args: argparse.Namespace) -> list[str]:
    """Stage 0 warns of what would bias a comparison; it stops nothing."""
    styles = [] if "all" in args.styles else [style for style in args.styles if source_style(style) == style]
    files = ["--prompt_file", str(job.prompts.path), "--output_csv", str(job.results / "prompt_findings.csv")]
    return files + given("--styles", styles)


def stage_2_flags(job: Job, args: argparse.Namespace) -> list[str]:
    """Stage 2: an answer to a few-shot prompt ends with its line, unless the user says where."""
    flags = ["--model_name", args.model_name, "--prompt_file", str(job.prompts.path), "--prompt_keys", *args.styles]
    flags += ["--output_dir", str(job.output), *given("--max_samples", args.max_samples)]
    flags += given("--few_shot_file", args.few_shot_file)
    line_end = ["--stop_strings", "\\n"] if args.few_shot_file and not args.stage2.stop_strings else []
    return flags + line_end + args.stage2_flags


def text_flags(job: Job, args: argparse.Namespace) -> list[str] | None:
    """A server writes the responses if the user says so."""
    return ["--", *stage_2_flags(job, args)] if args.text_engine else None


def capture_flags(job: Job, args: argparse.Namespace) -> list[str]:
    """What captures generates, too, unless a server has."""
    return stage_2_flags(job, args) + ["--stored_text"] * bool(args.text_engine)


def accuracy_flags(job: Job, args: argparse.Namespace) -> list[str] | None:
    """Stage 3 needs the user's own scores, or a row whose `answer` is a number or an expression."""
    if args.maths_items is not None:
        return ["--maths_items", str(args.maths_items)]
    rows = [row for row in job.prompts.rows[: args.max_samples] if isinstance(row, dict)]
    rows = [row for row in rows if row.get("answer") not in (None, "")]
    return [] if rows and script_module(MATHS).has_gold(rows) else None


def answers_flags(job: Job, args: argparse.Namespace) -> list[str] | None:
    """Answers in words are scored if there are some, and not by the user."""
    return [] if args.maths_items is None and has_words(job.prompts.rows[: args.max_samples]) else None


def scorers_flags(job: Job, args: argparse.Namespace) -> list[str] | None:
    """Without right and wrong answers there is nothing to compare similarity and rewards with."""
    return [] if accuracy_flags(job, args) is not None or answers_flags(job, args) is not None else None


def lens_flags(_: Job, args: argparse.Namespace) -> list[str]:
    """The logit lens needs the model."""
    return ["--model_name", args.model_name, "--lens_rows", str(args.lens_rows)] if args.lens_rows else []


def patch_flags(_: Job, args: argparse.Namespace) -> list[str] | None:
    """Patching needs the model, and what stage 2 was told of it."""
    if not args.patch:
        return None
    flags = ["--model_name", args.model_name, "--styles", *args.patch, *given("--max_samples", args.max_samples)]
    flags += given("--device_map", args.stage2.device_map)
    return flags + ["--trust_remote_code"] * args.stage2.trust_remote_code + shlex.split(args.patch_flags)


def neurons_flags(_: Job, args: argparse.Namespace) -> list[str] | None:
    """Neurons are studied if stage 2 keeps them, in one quantity or the other."""
    return [] if args.stage2.neurons or args.stage2.gates else None


def causes_flags(_: Job, args: argparse.Namespace) -> list[str] | None:
    """Causes of all styles that were patched, in earlier calls too."""
    return [] if args.patch else None


CAPTURE = "2_inference/run_scripts/attn_act_logi.py"
SERVE = "2_inference/run_scripts/serve_responses.py"
PATCH = "2_inference/run_scripts/patch_activations.py"
STAGE_4, STAGE_5 = "4_semantics_eval/run_scripts", "5_attention_fractions/run_scripts"
SHARED = ("capture", "patches")  # steps that several processes can share, each with its --shard
SCORED = ("capture", "accuracy", "answers")  # what the analyses of right and wrong answers wait for
MATHS = "3_maths_eval/run_scripts/evaluate_predictions.py"


class Entry(NamedTuple):
    """A step that every prompt file gets. `flags`: its own, None if it is left out; `after`: as in Step."""

    name: str
    script: str
    flags: Callable[[Job, Any], list[str] | None] = lambda *_: []
    after: tuple[str, ...] = ("capture",)


# In order. Scripts of stages 3 to 5 get --run_dir and --results_dir, too; patches --run_dir. The job on a cluster is
# hpc/<script>.slurm.
STEPS = (
    Entry("prompts", "0_data/run_scripts/check_prompts.py", check_flags, after=()),
    Entry("text", SERVE, text_flags, after=("prompts",)),
    Entry("capture", CAPTURE, capture_flags, after=("prompts", "text")),
    Entry("patches", PATCH, patch_flags),
    Entry("layers", f"{STAGE_5}/activation_diffs.py", lens_flags),  # takes longest, so it begins first
    Entry("accuracy", MATHS, accuracy_flags),
    Entry("answers", f"{STAGE_4}/match_answers.py", answers_flags, ("capture", "accuracy")),
    Entry("similarity", f"{STAGE_4}/compare_responses.py", lambda _, a: given("--embedding_model", a.embedding_model)),
    Entry("reward scores", f"{STAGE_4}/score_scripts.py", lambda _, a: given("--rm_name", a.reward_model) or None),
    Entry("scorers", f"{STAGE_4}/compare_scorers.py", scorers_flags, (*SCORED, "similarity", "reward scores")),
    Entry("attention fractions", f"{STAGE_5}/dirs_eval.py"),
    Entry("heads", f"{STAGE_5}/head_sensitivity.py", after=SCORED),
    Entry("neurons", f"{STAGE_5}/neuron_sensitivity.py", neurons_flags),
    Entry("probes", f"{STAGE_5}/probe_layers.py", lambda _, a: given("--layers", a.probe_layers), SCORED),
    Entry("causes", f"{STAGE_5}/causal_effects.py", causes_flags, ("capture", "patches", "heads", "neurons")),
)

COMPARISONS = ("similarity", "scorers", "heads", "layers", "neurons", "probes")  # of styles with the clean form


def has_clean_form_alone(job: Job, args: argparse.Namespace) -> bool:
    """Whether the run has no style to compare with the clean form."""
    return chosen_styles(job.prompts, args.styles) == [job.prompts.clean_key]


def steps_of(job: Job, args: argparse.Namespace) -> list[Step]:
    """The steps for one prompt file, in order."""
    steps = []
    alone = has_clean_form_alone(job, args)
    for name, script, own, after in STEPS:
        if not (alone and name in COMPARISONS) and (flags := own(job, args)) is not None:
            folders = ["--run_dir", str(job.output)] if script[0] > "2" or script == PATCH else []
            folders += ["--results_dir", str(job.results)] if script[0] > "2" else []
            steps.append(Step(name, script, (*folders, *flags), after))
    return steps


def report_step(jobs: Sequence[Job], args: argparse.Namespace) -> Step:
    """The report over the jobs and the prompt files of earlier calls with the same run_name."""
    folder = args.results_dir / args.run_name
    outputs = list(dict.fromkeys([*runs_in(args.output_dir / args.run_name), *(job.output for job in jobs)]))
    arguments = ["--run_dir", *map(str, outputs), "--results_dir", *(str(folder / path.name) for path in outputs)]
    return Step("report", "1_utils/run_scripts/build_report.py", (*arguments, "--report", str(folder / "report.html")))


def runs_in(folder: Path) -> list[Path]:
    """The runs of stage 2 in a folder, in the order in which they were begun."""
    copies = sorted(folder.glob("*/prompts.json"), key=lambda path: (path.stat().st_mtime, path))
    return [copy.parent for copy in copies]


def jobs_of(args: argparse.Namespace) -> list[Job]:
    """One job for each prompt file. Raises UserError if a file cannot be used, or two have one name."""
    files = [read_prompt_file(path) for path in args.prompt_file]
    names = [file.path.stem for file in files]
    if len(set(names)) < len(names):
        raise UserError(f"--prompt_file: two of {', '.join(names)} have one name; rename a file, or run them apart")
    for file in files:
        styles = chosen_styles(file, args.styles)
        for style in args.patch:
            if style == file.clean_key or style not in styles or controlled_style(style):
                can = [name for name in styles if name != file.clean_key and source_style(name) == name]
                why = f"{file.path} is not run in such a style; choose among {', '.join(can)}"
                raise UserError(f"--patch {style}: {why}")
    if (own := args.maths_items) is not None and len(files) > 1:
        raise UserError("--maths_items holds the scores of one prompt file; run the files one by one")
    if own is not None and not own.is_file():
        raise UserError(f"--maths_items {own}: no such file; give a CSV with style, original_index, correct")
    output, results = args.output_dir / args.run_name, args.results_dir / args.run_name
    return [Job(file, output / name, results / name) for file, name in zip(files, names, strict=True)]


# --- doing it


def run_all(jobs: Sequence[Job], args: argparse.Namespace) -> list[tuple[Step, int]]:
    """Run the steps that are not done; return those that failed with their exit codes.

    The first failure ends it. With args.keep_going, all steps run except those of a job without captured prompts.
    """
    chains = [steps_of(job, args) for job in jobs]
    total, number = sum(map(len, chains)) + (not args.no_report), 0
    failed: list[tuple[Step, int]] = []
    known: set[str] = set()
    for job, chain in zip(jobs, chains, strict=True):
        say(f"{job.prompts.path}: captured into {job.output}, results in {job.results}")
        if not any(step.name in ("accuracy", "answers") for step in chain):
            say("accuracy is left out: no row has an `answer` that can be scored (your own scores: --maths_items)")
        if has_clean_form_alone(job, args):
            left_out = ", ".join(COMPARISONS)
            say(f"{left_out} are left out: they compare styles with the clean form, which is run alone")
        numbered = [(step, f"{place}/{total}") for place, step in enumerate(chain, start=number + 1)]
        number += len(chain)
        # Steps that put prompts through the model have the machine for themselves; then come the analyses.
        places = [place for place, step in enumerate(chain, start=1) if step.name in SHARED]
        for part in (slice(0, places[0]), slice(places[0], places[-1]), slice(places[-1], None)):
            failed += run_steps(numbered[part], args, known, args.workers if part.stop is None else 1)
            if must_stop(failed, args):
                return failed
            if any(step in chain for step, _ in failed) and not any(job.output.glob("**/activations_*.pt")):
                say(f"    no prompt of {job.prompts.path} was captured: its other steps are left out")
                break
    if not args.no_report and any(job.output.is_dir() for job in jobs):
        failed += run_steps([(report_step(jobs, args), f"{total}/{total}")], args, known, workers=1)
    return failed


def must_stop(failed: Sequence[tuple[Step, int]], args: argparse.Namespace) -> bool:
    """Whether no further step may start."""
    return any(not args.keep_going or code in (EXIT_STOPPED, EXIT_INTERRUPTED) for _, code in failed)


def run_steps(
    steps: Sequence[tuple[Step, str]], args: argparse.Namespace, known: set[str], workers: int
) -> list[tuple[Step, int]]:
    """Run steps, up to `workers` at a time, each after those that make what it reads; return the failed ones."""
    failed: list[tuple[Step, int]] = []
    begun: dict[str, Future[None]] = {}
    own = threading.local()

    def python_of(step: Step, side_by_side: int) -> FreshPython:
        """Of this thread; processes that run side by side share the cores."""
        environment = dict(os.environ)
        if side_by_side > 1:
            environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // side_by_side)))
        if step.script[0] < "3" or sys.platform != "linux":
            return FreshPython(environment)
        if not hasattr(own, "python"):
            own.python = stack.enter_context(closing(WarmPython(environment)))
        return cast(WarmPython, own.python)

    def run_in_turn(step: Step, number: str) -> None:
        wait(begun[name] for name in step.after if name in begun)  # they began earlier, so this ends
        if not must_stop(failed, args):
            code = run_step(step, number, args, known, python_of, workers)
            if code and not (code == EXIT_SOME_FAILED and step.name == "prompts"):
                failed.append((step, code))

    with ExitStack() as stack, ThreadPoolExecutor(workers) as pool:
        for step, number in steps:
            begun[step.name] = pool.submit(run_in_turn, step, number)
        try:
            for future in begun.values():
                future.result()
        except KeyboardInterrupt:
            pool.shutdown(wait=True, cancel_futures=True)  # the steps have the same signal, and keep what they have
            raise
    return failed


def run_step(
    step: Step,
    number: str,
    args: argparse.Namespace,
    known: set[str],
    python_of: Callable[[Step, int], FreshPython],
    workers: int = 1,
) -> int:
    """Run a step unless it is done; return its exit code. One line says what it wrote, further ones its warnings.

    args.verbose: the command and all that it prints; args.shards: processes that share a step of stage 2. known:
    warnings that have been shown; this step's are added. python_of: gives a Python for a step, if so many processes
    run side by side. workers: how many steps run at a time.
    """
    title, start = f"[{number}] {step.name}", time.monotonic()
    # Stage 2 resumes by itself: it alone knows which prompts are left. Shards stamp patches, each for its share.
    done = step.name != "capture" and is_done(step.script, step.arguments)
    if done and not (step.name == "patches" and unpatched(step.place)):
        say(f"{title}: done before")
        return 0
    before = model_files(step.place)
    code, lines = run_shares(step, title, args, python_of, workers)
    shown = [line for line in dict.fromkeys(lines) if line.startswith(("warning: ", "error: ")) and line not in known]
    known.update(shown)
    if step.name == "prompts" and lines and code in (0, EXIT_SOME_FAILED):
        outcome = f"{lines[-1]}, prompt_findings.csv"
    elif code == 0 and step.name in SHARED:  # each share's stamp takes the place of the one before
        new = [name for name, mark in model_files(step.place).items() if before.get(name) != mark]
        outcome = f"{len(new)} .pt files" if new else "nothing new"
    elif code == 0:
        outcome = summary_of(read_stamp(step.place, step.script).get("wrote", {}))
    else:
        outcome = f"failed with exit code {code}"
        shown = shown if code == EXIT_USER_ERROR or not lines else lines[-40:]
    told = [
        f"{'    ' if args.verbose else ': '}{outcome} ({time.monotonic() - start:.0f} s)",
        *(f"    {x}" for x in shown),
    ]
    if code not in (0, EXIT_USER_ERROR) and not args.verbose and step.name != "prompts":
        told.append(f"    the command was: {step}")
    say("\n".join([(title if workers > 1 and not args.verbose else "") + told[0], *told[1:]]))
    return code


def run_shares(
    step: Step, title: str, args: argparse.Namespace, python_of: Callable[[Step, int], FreshPython], workers: int
) -> tuple[int, list[str]]:
    """(exit code, lines that the step printed), of all processes that share it."""
    count = args.shards if step.name in SHARED else 1
    if args.verbose:
        say(f"{title}\n    $ {step}")
        words = [sys.executable, str(ROOT / step.script), *step.arguments, "--verbose"]
        return subprocess.run(words).returncode, []
    pythons = [python_of(step, workers * count) for _ in range(count)]
    shares = [["--shard", f"{place}/{count}"] if count > 1 else [] for place in range(count)]
    with ThreadPoolExecutor(count) as pool:
        # The first one's progress is shown; the others go as fast.
        printed = pool.map(partial(run_command, step, title), pythons, shares, [workers == 1, *[False] * (count - 1)])
        lines = [line for several in printed for line in several]
    return max((python.code for python in pythons), key=abs), lines


def run_command(step: Step, title: str, python: FreshPython, share: list[str], shown: bool) -> list[str]:
    """The lines that the step printed; if `shown`, its bar is, as it moves, or each minute in a log."""
    if shown:
        print(title, end="", flush=True)
    lines, last, terminal, broken = [], time.monotonic(), sys.stdout.isatty(), False
    for line in map(str.rstrip, python.run([str(ROOT / step.script), *step.arguments, *share])):
        if not BAR.search(line):
            lines += [line] if line else []
        elif shown and terminal:
            print(f"\r\033[K{title}: {line}", end="", flush=True)
        elif shown and time.monotonic() - last > SECONDS_BETWEEN_BARS:
            say(("" if broken else "\n") + f"    {line}")
            last, broken = time.monotonic(), True
    if shown:
        print(title if broken else f"\r\033[K{title}" if terminal else "", end="", flush=True)
    return lines


def model_files(folder: Path) -> dict[str, list[int]]:
    """Size and time of change of each .pt file of a run."""
    files = files_in(folder) | files_in(folder / "patches_*")
    return {name: mark for name, mark in files.items() if name.endswith(".pt")}


def summary_of(wrote: Sequence[str] | dict[str, Any]) -> str:
    """`a.csv, b.csv and 5 more`."""
    ordered = sorted(wrote, key=lambda name: (not name.endswith(".csv"), name))
    more = f" and {len(ordered) - 2} more" if len(ordered) > 2 else ""
    return ", ".join(ordered[:2]) + more if ordered else "nothing new"


def print_headline(args: argparse.Namespace) -> None:
    """For each prompt file a table and what was found; the first file comes last, for a terminal shows the end."""
    results = args.results_dir / args.run_name
    for output in reversed(runs_in(args.output_dir / args.run_name)):
        try:
            run = open_run(output)
        except UserError as error:
            say(f"\n{output.name}: no table ({error})")
            continue
        counts = {style: sum(1 for _ in row_indices(run, style)) for style in run.styles}
        sections = read_sections(results / output.name)
        table = overview(counts, [one for section in sections for one in section["headlines"]], results / output.name)
        say("\n".join([f"\n{output.name}", *aligned([table.columns, *table.lines])]))
        question = ""
        for finding, _ in findings_of(sections, worst_first(results / output.name)):
            if finding.aside:
                continue
            if finding.question not in ("", question):
                say(finding.question)
            question = finding.question
            say(textwrap.fill(finding.text, 118, initial_indent="- ", subsequent_indent="  "))
        if missing := unfinished(run):
            say(f"warning: this run holds only {missing}; the same command runs the rest")
        if old := outdated(run, results / output.name):
            say(f"warning: analyses are older than the run: {old}; run stages 3 to 5 again")
    say("\n[…]: 95 % intervals; difference: to the clean form, paired by row, the rows of one `_template` as one group")
    if not args.reward_model:
        say(f"reward scoring was skipped: add --reward_model {REWARD_EXAMPLE} (fetched from the hub) or a local folder")
    say(f"report: {results / 'report.html'}")


# --- script


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. `stage2`: what stage 2's own parser makes of the flags after `--`."""
    words = list(sys.argv[1:] if argv is None else argv)
    cut = words.index("--") if "--" in words else len(words)
    parser = make_parser(__doc__)
    flag = parser.add_argument_group("prompts").add_argument
    flag("--prompt_file", type=Path, nargs="+", required=True, help="JSON lists of objects")
    flag("--styles", nargs="+", default=["all"], help="styles to run (the clean form among them)")
    flag("--max_samples", type=int, help="first rows of each file; default: all")
    flag("--few_shot_file", type=Path, help="text before every prompt; answers then end with their line")
    own = "your own scores of the answers, instead of stage 3's: a CSV with style, original_index, correct "
    flag("--maths_items", type=Path, help=f"{own}(and element_index, sample, response)")
    flag = parser.add_argument_group("models (hub ids or local folders)").add_argument
    flag("--model_name", default="google/gemma-2-9b-it", help="the causal language model to study")
    flag("--embedding_model", help="for similarity; default: all-MiniLM-L6-v2, here or on the hub")
    flag("--text_engine", choices=["vllm"], help=TEXT_ENGINE)
    flag("--reward_model", help=f"for reward scores, such as {REWARD_EXAMPLE}; default: none, skipped")
    flag = parser.add_argument_group("how much of the slow analyses").add_argument
    flag("--lens_rows", type=int, default=100, help="first rows that the logit lens reads; 0: no lens")
    flag("--probe_layers", type=int, nargs="+", help="layers that are probed; default: all")
    flag("--workers", type=int, default=1, help="analyses that run side by side and share the cores")
    flag("--shards", type=int, default=1, help="processes that share stage 2; each loads the model")
    flag("--patch", nargs="+", default=[], help="typo styles whose causes are found by patching; default: none")
    own = "flags of patch_activations.py in one word: '--layers 0 6 12 --screen attribution'"
    flag("--patch_flags", default="", help=own)
    flag = parser.add_argument_group("places").add_argument
    flag("--run_name", required=True, help="name of the folders below")
    flag("--output_dir", type=Path, default=Path("outputs"), help="where .pt files go")
    flag("--results_dir", type=Path, default=Path("results"), help="where CSVs, plots and report go")
    own = "end without report and closing table; a later call with this run_name makes them for all files"
    parser.add_argument("--no_report", action="store_true", help=own)
    parser.add_argument("--keep_going", action="store_true", help="run the other steps and files although one failed")
    try:
        args = parser.parse_args(words[:cut])
    except UnknownFlag as error:
        try:
            parse_stage_2([error.flag])
        except UnknownFlag:
            raise error from None
        except UserError:  # a value is missing
            pass
        raise UserError(f"{error.flag}: is a flag of stage 2; these come last, after --: … -- {error.flag} …") from None
    for name in ("workers", "shards"):
        if (count := getattr(args, name)) < 1:
            raise UserError(f"--{name} {count}: must be at least 1")
    if args.verbose:  # what several processes print would be mixed
        args.workers = args.shards = 1
    args.stage2_flags = words[cut + 1 :]
    args.stage2 = parse_stage_2(args.stage2_flags + ["--stored_text"] * bool(args.text_engine))
    check_patch_flags(args)
    return args


def check_patch_flags(args: argparse.Namespace) -> None:
    """Raises UserError for `--patch_flags` that patch_activations.py refuses, or that the pipeline gives itself."""
    if args.patch_flags and not args.patch:
        raise UserError("--patch_flags: nothing is patched; name styles, too: --patch swap")
    try:
        words = shlex.split(args.patch_flags)
        for flag in {"--run_dir", "--styles", "--model_name"} & {word.partition("=")[0] for word in words}:
            raise UserError(f"{flag}: the pipeline gives it")
        parse_step(PATCH, ["--run_dir", "d", "--styles", "s", *words])
    except (UserError, ValueError) as error:
        raise UserError(f"--patch_flags: {error}") from None


def parse_stage_2(flags: Sequence[str]) -> argparse.Namespace:
    """The flags after `--` as stage 2's own parser reads them. Raises UserError for one that it refuses."""
    needed = {"--model_name": "m", "--prompt_file": "f", "--output_dir": "d", "--prompt_keys": "all"}
    for flag in (word.partition("=")[0] for word in flags):
        if flag in (*needed, "--max_samples", "--few_shot_file"):
            own = "--styles" if flag == "--prompt_keys" else flag
            raise UserError(f"{flag} after --: give {own} before it, for the other stages need it too")
    try:
        return parse_step(CAPTURE, [*(word for pair in needed.items() for word in pair), *flags])
    except UserError as error:
        error.args = (f"after --: {error}",)
        raise


def parse_step(script: str, arguments: Sequence[str]) -> argparse.Namespace:
    """What a script's own parser makes of its arguments. Raises UserError for those that it refuses."""
    program, sys.argv[0] = sys.argv[0], script  # what its messages name
    try:
        parsed: argparse.Namespace = script_module(script).parse_args(arguments)
    finally:
        sys.argv[0] = program
    return parsed


def script_module(script: str) -> Any:
    """A stage's script as a module, to use its own parser and checks before it runs."""
    site.addsitedir(str((ROOT / script).parent))
    return importlib.import_module(Path(script).stem)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the steps that are not done; print the closing table."""
    args = parse_args(argv)
    jobs = jobs_of(args)
    start = time.monotonic()
    failed = run_all(jobs, args)
    if failed and (not args.keep_going or failed[-1][1] in (EXIT_STOPPED, EXIT_INTERRUPTED)):
        step, code = failed[-1]
        again = "" if code == EXIT_USER_ERROR else "; the same command goes on from here"
        say(f"stopped: {step.name} failed{again}")
        return code if code > 0 else 128 - code  # killed by a signal: as a shell reports it
    if not args.no_report:
        print_headline(args)
    say(f"finished in {time.monotonic() - start:.0f} s")
    for step, code in failed:
        say(f"failed: {step} (exit code {code})")
    return EXIT_SOME_FAILED if failed else 0


if __name__ == "__main__":
    run_main(main)
