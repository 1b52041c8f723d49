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
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from build_report import headline_rows, headline_table
from command_line import EXIT_INTERRUPTED, EXIT_USER_ERROR, UnknownFlag, UserError, make_parser, run_main
from load_json import PromptFile, chosen_styles, read_prompt_file
from run_store import open_run, outdated, row_indices, unfinished
from stamps import is_done, place_of, read_stamp
from token_spans import matched_style

ROOT = Path(__file__).resolve().parents[2]
CAPTURE_SCRIPT = "2_inference/run_scripts/attn_act_logi.py"
ACCURACY_SCRIPT = "3_maths_eval/run_scripts/evaluate_predictions.py"
EXIT_SOME_FAILED = 1
EXIT_STOPPED = 75  # stage 2 was stopped by a signal
FROM_PIPELINE = {  # what stage 2 gets from this script, and the flag that decides it here
    **{
        f"--{name}": f"--{name}" for name in ("model_name", "prompt_file", "max_samples", "few_shot_file", "output_dir")
    },
    "--prompt_keys": "--styles",
}
BAR = re.compile(r"\[\d+:\d\d[<,]")  # part of every line of a progress bar
SECONDS_BETWEEN_BARS = 60  # in a log
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
        place = place_of(self.arguments)
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


def jobs_of(args: argparse.Namespace) -> list[Job]:
    """One job for each prompt file. Raises UserError if a file cannot be used, or two have one name."""
    files = [read_prompt_file(path) for path in args.prompt_file]
    names = [file.path.stem for file in files]
    if len(set(names)) < len(names):
        raise UserError(f"--prompt_file: two of {', '.join(names)} have one name; rename a file, or run them apart")
    for file in files:
        chosen_styles(file, args.styles)
    if args.maths_items is not None and len(files) > 1:
        raise UserError("--maths_items holds the scores of one prompt file; run the files one by one")
    if args.maths_items is not None and not args.maths_items.is_file():
        raise UserError(
            f"--maths_items {args.maths_items}: no such file; give a CSV with style, original_index, correct"
        )
    output, results = args.output_dir / args.run_name, args.results_dir / args.run_name
    return [Job(file, output / name, results / name) for file, name in zip(files, names, strict=True)]


def script_module(script: str) -> Any:
    """A stage's script as a module, to use its own parser and checks before it runs."""
    site.addsitedir(str((ROOT / script).parent))
    return importlib.import_module(Path(script).stem)


def steps_of(job: Job, args: argparse.Namespace) -> list[Step]:
    """The steps for one prompt file, in order."""
    # Stage 0 warns of what would bias a comparison; it stops nothing.
    check = ["--prompt_file", str(job.prompts.path), "--output_csv", str(job.results / "prompt_findings.csv")]
    if "all" not in args.styles and (styles := [style for style in args.styles if not matched_style(style)]):
        check += ["--styles", *styles]
    capture = ["--model_name", args.model_name, "--prompt_file", str(job.prompts.path)]
    capture += ["--prompt_keys", *args.styles, "--output_dir", str(job.output)]
    capture += ["--max_samples", str(args.max_samples)] if args.max_samples is not None else []
    if args.few_shot_file is not None:
        capture += ["--few_shot_file", str(args.few_shot_file)]
        if not args.stage2.stop_strings:
            capture += ["--stop_strings", "\\n"]  # an answer to a few-shot prompt ends with its line
    steps = [
        Step("prompts", "0_data/run_scripts/check_prompts.py", tuple(check)),
        Step("capture", CAPTURE_SCRIPT, (*capture, *args.stage2_flags), ("prompts",)),
    ]

    def add(name: str, script: str, *more: str, after: tuple[str, ...] = ("capture",)) -> None:
        folders = ("--run_dir", str(job.output), "--results_dir", str(job.results))
        steps.append(Step(name, script, (*folders, *more), after))

    stage_4, stage_5 = "4_semantics_eval/run_scripts", "5_attention_fractions/run_scripts"
    if args.maths_items is not None:
        add("accuracy", ACCURACY_SCRIPT, "--maths_items", str(args.maths_items))
    elif has_gold(job.prompts, args.max_samples):
        add("accuracy", ACCURACY_SCRIPT)
    embedding = ("--embedding_model", args.embedding_model) if args.embedding_model else ()
    add("similarity", f"{stage_4}/compare_responses.py", *embedding)
    if args.reward_model:
        add("reward scores", f"{stage_4}/score_scripts.py", "--rm_name", args.reward_model)
    add("attention fractions", f"{stage_5}/dirs_eval.py")
    add("heads", f"{stage_5}/head_sensitivity.py", after=("capture", "accuracy"))
    lens = ("--model_name", args.model_name, "--lens_rows", str(args.lens_rows)) if args.lens_rows else ()
    add("layers", f"{stage_5}/activation_diffs.py", *lens)
    if args.stage2.neurons:
        add("neurons", f"{stage_5}/neuron_sensitivity.py")
    layers = ("--layers", *map(str, args.probe_layers)) if args.probe_layers else ()
    add("probes", f"{stage_5}/probe_layers.py", *layers, after=("capture", "accuracy"))
    return steps


def has_gold(prompts: PromptFile, max_samples: int | None) -> bool:
    """Whether stage 3 can score any row: its `answer` is a number or an expression."""
    rows = [row for row in prompts.rows[:max_samples] if isinstance(row, dict) and row.get("answer") not in (None, "")]
    return bool(rows) and bool(script_module(ACCURACY_SCRIPT).has_gold(rows))


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


# --- doing it


def run_all(jobs: Sequence[Job], args: argparse.Namespace) -> list[tuple[Step, int]]:
    """Run the steps that are not done; return those that failed with their exit codes.

    The first failure ends it. With args.keep_going, all steps run except those of a job without captured prompts.
    """
    chains = [steps_of(job, args) for job in jobs]
    total, number = sum(map(len, chains)) + 1, 0
    failed: list[tuple[Step, int]] = []
    known: set[str] = set()
    for job, chain in zip(jobs, chains, strict=True):
        say(f"{job.prompts.path}: captured into {job.output}, results in {job.results}")
        if not any(step.name == "accuracy" for step in chain):
            say("accuracy is left out: no `answer` is a number or an expression (your own scores: --maths_items)")
        for place, step in enumerate(chain, start=1):
            code = run_step(step, f"{number + place}/{total}", args.verbose, known)
            if code == 0 or (code == EXIT_SOME_FAILED and step.name == "prompts"):
                continue
            failed.append((step, code))
            if not args.keep_going or code in (EXIT_STOPPED, EXIT_INTERRUPTED):
                return failed
            if step.name == "capture" and not any(job.output.glob("**/activations_*.pt")):
                say(f"    no prompt of {job.prompts.path} was captured: its other steps are left out")
                break
        number += len(chain)
    if any(job.output.is_dir() for job in jobs):
        report = report_step(jobs, args)
        code = run_step(report, f"{total}/{total}", args.verbose, known)
        failed += [(report, code)] if code else []
    return failed


def run_step(step: Step, number: str, verbose: bool, known: set[str]) -> int:
    """Run a step unless it is done; return its exit code. One line says what it wrote, further ones its warnings.

    verbose: the command and all that it prints. known: warnings that have been shown; this step's are added.
    """
    # Stage 2 resumes by itself: it alone knows which prompts are left.
    if step.name != "capture" and is_done(step.script, step.arguments):
        say(f"[{number}] {step.name}: done before")
        return 0
    start, used = time.monotonic(), core_seconds()
    code, lines = run_command(step, f"[{number}] {step.name}", verbose)
    times = f"{time.monotonic() - start:.0f} s" + (f", {core_seconds() - used:.0f} s of a core" if verbose else "")
    shown = [line for line in dict.fromkeys(lines) if line.startswith(("warning: ", "error: ")) and line not in known]
    known.update(shown)
    if step.name == "prompts" and lines and code in (0, EXIT_SOME_FAILED):
        outcome = f"{lines[-1]}, prompt_findings.csv"
    elif code == 0:
        outcome = summary_of(read_stamp(step.place, step.script).get("wrote", {}))
    else:
        outcome = f"failed with exit code {code}"
        shown = shown if code == EXIT_USER_ERROR or not lines else lines[-40:]
    say(f": {outcome} ({times})" if not verbose else f"    {outcome} ({times})")
    for line in shown:
        say(f"    {line}")
    if code not in (0, EXIT_USER_ERROR) and not verbose and step.name != "prompts":
        say(f"    the command was: {step}")
    return code


def run_command(step: Step, title: str, verbose: bool) -> tuple[int, list[str]]:
    """(exit code, lines that the step printed); its progress bar is shown as it moves, or each minute in a log."""
    command = [sys.executable, str(ROOT / step.script), *step.arguments]
    if verbose:
        say(f"{title}\n    $ {step}")
        return subprocess.run([*command, "--verbose"]).returncode, []
    print(title, end="", flush=True)
    lines, shown, broken = [], time.monotonic(), False
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        try:
            for text, whole in pieces_of(process):
                if whole and text.strip() and not BAR.search(text):
                    lines.append(text)
                elif BAR.search(text) and sys.stdout.isatty():
                    print(f"\r\033[K{title}: {text}", end="", flush=True)
                elif BAR.search(text) and time.monotonic() - shown > SECONDS_BETWEEN_BARS:
                    say(("" if broken else "\n") + f"    {text}")
                    shown, broken = time.monotonic(), True
        except KeyboardInterrupt:
            process.wait()  # it has the same signal, and keeps what it has
            raise
    print(title if broken else f"\r\033[K{title}" if sys.stdout.isatty() else "", end="", flush=True)
    return process.returncode, lines


def pieces_of(process: subprocess.Popen[bytes]) -> Iterator[tuple[str, bool]]:
    """What a process prints, piece by piece: (text, True) for a whole line, (text, False) for a bar in progress."""
    assert process.stdout is not None
    rest = b""
    while chunk := os.read(process.stdout.fileno(), 1 << 16):
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            yield line.rstrip(b"\r").rpartition(b"\r")[2].decode(errors="replace"), True
        if bar := rest.rpartition(b"\r")[2]:
            yield bar.decode(errors="replace"), False
    yield rest.rpartition(b"\r")[2].decode(errors="replace"), True


def summary_of(wrote: Sequence[str] | dict[str, Any]) -> str:
    """`a.csv, b.csv and 5 more`; only the number of .pt files."""
    if captured := sum(name.endswith(".pt") for name in wrote):
        return f"{captured} .pt files"
    ordered = sorted(wrote, key=lambda name: (not name.endswith(".csv"), name))
    more = f" and {len(ordered) - 2} more" if len(ordered) > 2 else ""
    return ", ".join(ordered[:2]) + more if ordered else "nothing new"


def core_seconds() -> float:
    """Seconds of a core that the steps so far have used."""
    times = os.times()
    return times.children_user + times.children_system


def say(text: str) -> None:
    """Print at once, so that lines stay in order with those of the steps."""
    print(text, flush=True)


def print_headline(args: argparse.Namespace) -> None:
    """A table for each prompt file: accuracy, difference, similarity, attention, each with its interval."""
    results = args.results_dir / args.run_name
    for output in runs_in(args.output_dir / args.run_name):
        try:
            run = open_run(output)
        except UserError as error:
            say(f"\n{output.name}: no table ({error})")
            continue
        counts = {style: sum(1 for _ in row_indices(run, style)) for style in run.styles}
        columns, lines = headline_table(headline_rows(counts, results / output.name))
        widths = [max(len(line[i]) for line in [columns, *lines]) for i in range(len(columns))]
        say(f"\n{output.name}")
        for line in [columns, *lines]:
            cells = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
            say("  ".join([line[0].ljust(widths[0]), *cells[1:]]))
        if missing := unfinished(run):
            say(f"warning: this run holds only {missing}; the same command runs the rest")
        if old := outdated(run, results / output.name):
            say(f"warning: analyses are older than the run: {old}; run stages 3 to 5 again")
    say("\n[…]: 95 % intervals; difference: to the clean form, paired by row and clustered by template")
    if not args.reward_model:
        say(f"reward scoring was skipped: add --reward_model {REWARD_EXAMPLE} (fetched from the hub) or a local folder")
    say(f"report: {results / 'report.html'}")


# --- script


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. `stage2`: what stage 2's own parser makes of the flags after `--`."""
    words = list(sys.argv[1:] if argv is None else argv)
    cut = words.index("--") if "--" in words else len(words)
    parser = make_parser(__doc__)
    data = parser.add_argument_group("prompts")
    data.add_argument("--prompt_file", type=Path, nargs="+", required=True, help="JSON lists of objects")
    data.add_argument("--styles", nargs="+", default=["all"], help="styles to run (the clean form among them)")
    data.add_argument("--max_samples", type=int, help="first rows of each file; default: all")
    data.add_argument("--few_shot_file", type=Path, help="text before every prompt; answers then end with their line")
    own = "your own scores of the answers, instead of stage 3's: a CSV with style, original_index, correct "
    data.add_argument("--maths_items", type=Path, help=f"{own}(and element_index, sample, response)")
    models = parser.add_argument_group("models (hub ids or local folders)")
    models.add_argument("--model_name", default="google/gemma-2-9b-it", help="the causal language model to study")
    models.add_argument("--embedding_model", help="for similarity; default: all-MiniLM-L6-v2, here or on the hub")
    models.add_argument("--reward_model", help=f"for reward scores, such as {REWARD_EXAMPLE}; default: none, skipped")
    depth = parser.add_argument_group("how much of the slow analyses")
    depth.add_argument("--lens_rows", type=int, default=100, help="first rows that the logit lens reads; 0: no lens")
    depth.add_argument("--probe_layers", type=int, nargs="+", help="layers that are probed; default: all")
    places = parser.add_argument_group("places")
    places.add_argument("--run_name", required=True, help="name of the folders below")
    places.add_argument("--output_dir", type=Path, default=Path("outputs"), help="where .pt files go")
    places.add_argument("--results_dir", type=Path, default=Path("results"), help="where CSVs, plots and report go")
    parser.add_argument("--keep_going", action="store_true", help="run the other steps and files although one failed")
    try:
        args = parser.parse_args(words[:cut])
    except UnknownFlag as error:
        if is_flag_of_stage_2(error.flag):
            raise UserError(
                f"{error.flag}: is a flag of stage 2; these come last, after --: … -- {error.flag} …"
            ) from None
        raise
    args.stage2_flags = words[cut + 1 :]
    args.stage2 = parse_stage_2(args.stage2_flags)
    return args


def parse_stage_2(flags: Sequence[str]) -> argparse.Namespace:
    """The flags after `--` as stage 2's own parser reads them. Raises UserError for one that it refuses."""
    for flag in (word.partition("=")[0] for word in flags):
        if flag in FROM_PIPELINE:
            raise UserError(f"{flag} after --: give {FROM_PIPELINE[flag]} before it, for the other stages need it too")
    needed = ("--model_name", "m", "--prompt_file", "f", "--output_dir", "d", "--prompt_keys", "all")
    try:
        return parse_step(CAPTURE_SCRIPT, [*needed, *flags])
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


def is_flag_of_stage_2(flag: str) -> bool:
    """Whether stage 2 has this flag."""
    try:
        parse_stage_2([flag])
    except UnknownFlag:
        return False
    except UserError:  # a value is missing
        pass
    return True


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
    print_headline(args)
    say(f"finished in {time.monotonic() - start:.0f} s")
    for step, code in failed:
        say(f"failed: {step} (exit code {code})")
    return EXIT_SOME_FAILED if failed else 0


if __name__ == "__main__":
    run_main(main)
