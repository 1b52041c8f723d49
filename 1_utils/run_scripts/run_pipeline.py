"""Run stages 0 to 5 on one or more prompt files and write the report: each script as a user would call it, echoed.

Reads   prompt files (0_data/*.json)
Writes  outputs/<run_name>/<file>/    .pt files of stage 2, for each prompt file
        results/<run_name>/<file>/    findings of stage 0; CSVs and plots of stages 3 to 5
        results/<run_name>/report.html

    python 1_utils/run_scripts/run_pipeline.py --model_name google/gemma-2-9b-it --prompt_file 0_data/maths.json \\
        --styles normal swap three --max_samples 200 --run_name gemma

A step that fails stops the run with its own message and exit code. The same command again goes on from there: stage 2
keeps what it has, and a step whose arguments, inputs and code are the same as when it last succeeded is not run again.
Flags after `--` go to stage 2 as they are: `-- --apply_chat_template --neurons`. A second call with the same run_name
and another prompt file (and other flags, where it needs them) adds that file to the report.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "1_utils" / "run_scripts"))

from build_report import headline_rows, headline_table
from command_line import UserError, make_parser, run_main
from file_output import write_json
from load_json import PromptFile, read_prompt_file
from run_store import open_run, row_indices

ROOT = Path(__file__).resolve().parents[2]
CHECK_SCRIPT = "0_data/run_scripts/check_prompts.py"
STAMP = ".pipeline.json"
EXIT_SOME_FAILED = 1
DEFAULT_MODEL = "google/gemma-2-9b-it"
REWARD_EXAMPLE = "OpenAssistant/reward-model-deberta-v3-large-v2"


@dataclass(frozen=True)
class Step:
    """One call of a stage's script. `results` is the folder that it writes into; None: the script resumes by itself."""

    name: str
    script: str
    arguments: tuple[str, ...]
    reads: tuple[Path, ...] = ()
    results: Path | None = None

    @property
    def command(self) -> list[str]:
        """The command line that runs this step."""
        return [sys.executable, str(ROOT / self.script), *self.arguments]


@dataclass(frozen=True)
class Job:
    """One prompt file and where its outputs and results go."""

    prompts: PromptFile
    output: Path
    results: Path


# --- what is to be done


def jobs_of(args: argparse.Namespace) -> list[Job]:
    """One job for each prompt file. Raises UserError for a file that cannot be used, or two of one name."""
    files = [read_prompt_file(path) for path in args.prompt_file]
    names = [file.path.stem for file in files]
    if len(set(names)) < len(names):
        raise UserError(f"--prompt_file: two of {', '.join(names)} have one name; rename a file, or run them apart")
    output, results = args.output_dir / args.run_name, args.results_dir / args.run_name
    return [Job(file, output / name, results / name) for file, name in zip(files, names, strict=True)]


def steps_of(job: Job, args: argparse.Namespace) -> list[Step]:
    """The steps for one prompt file, in order."""
    folders = ("--run_dir", str(job.output), "--results_dir", str(job.results))
    items = job.results / "maths_items.csv"
    scored = ("--maths_items", str(items)) if has_answers(job.prompts) else ()
    stage_4, stage_5 = "4_semantics_eval/run_scripts", "5_attention_fractions/run_scripts"
    calls: list[tuple[str, str, tuple[str, ...]]] = []
    if scored:
        calls.append(("accuracy", "3_maths_eval/run_scripts/evaluate_predictions.py", ()))
    embedding = ("--embedding_model", args.embedding_model) if args.embedding_model else ()
    calls.append(("similarity", f"{stage_4}/compare_responses.py", embedding))
    if args.reward_model:
        calls.append(("reward scores", f"{stage_4}/score_scripts.py", ("--rm_name", args.reward_model)))
    calls.append(("attention fractions", f"{stage_5}/dirs_eval.py", ()))
    calls.append(("heads", f"{stage_5}/head_sensitivity.py", scored))
    lens = ("--model_name", args.model_name, "--lens_rows", str(args.lens_rows)) if args.lens_rows else ()
    calls.append(("layers", f"{stage_5}/activation_diffs.py", lens))
    if "--neurons" in args.stage2_flags:
        calls.append(("neurons", f"{stage_5}/neuron_sensitivity.py", ()))
    layers = ("--layers", *map(str, args.probe_layers)) if args.probe_layers else ()
    calls.append(("probes", f"{stage_5}/probe_layers.py", (*scored, *layers)))
    steps = [
        Step(
            name, script, (*folders, *extra), (job.output, items) if str(items) in extra else (job.output,), job.results
        )
        for name, script, extra in calls
    ]
    return [capture_step(job, args), *steps]


def has_answers(prompts: PromptFile) -> bool:
    """True where a row of the file holds a gold answer."""
    return any(isinstance(row, dict) and "answer" in row for row in prompts.rows)


def check_step(job: Job) -> Step:
    """Stage 0: tell what in the prompt file would bias a comparison. It warns, it does not stop."""
    findings = job.results / "prompt_findings.csv"
    arguments = ("--prompt_file", str(job.prompts.path), "--output_csv", str(findings))
    return Step("prompts", CHECK_SCRIPT, arguments, (job.prompts.path,), job.results)


def capture_step(job: Job, args: argparse.Namespace) -> Step:
    """Stage 2 for one prompt file. It resumes by itself, so it is always called."""
    arguments = ["--model_name", args.model_name, "--prompt_file", str(job.prompts.path)]
    arguments += ["--prompt_keys", *args.styles, "--output_dir", str(job.output)]
    arguments += ["--max_samples", str(args.max_samples)] if args.max_samples is not None else []
    if args.few_shot_file is not None:
        arguments += ["--few_shot_file", str(args.few_shot_file)]
        if "--stop_strings" not in args.stage2_flags:
            arguments += ["--stop_strings", "\\n"]  # an answer to a few-shot prompt ends with its line
    return Step("capture", "2_inference/run_scripts/attn_act_logi.py", (*arguments, *args.stage2_flags))


def report_step(jobs: Sequence[Job], args: argparse.Namespace) -> Step:
    """The report over the jobs and the prompt files of earlier calls with the same run_name."""
    folder = args.results_dir / args.run_name
    outputs = runs_in(args.output_dir / args.run_name)
    outputs += [job.output for job in jobs if job.output not in outputs]
    results = [folder / output.name for output in outputs]
    arguments = ["--run_dir", *map(str, outputs), "--results_dir", *map(str, results)]
    arguments += ["--report", str(folder / "report.html")]
    return Step("report", "1_utils/run_scripts/build_report.py", tuple(arguments), (*outputs, *results), folder)


def runs_in(folder: Path) -> list[Path]:
    """The runs of stage 2 in a folder, in the order in which they were begun."""
    begun = {copy.parent: copy.stat().st_mtime for copy in folder.glob("*/prompts.json")}
    return sorted(begun, key=lambda path: (begun[path], path.name))


# --- doing it


def run_step(step: Step, number: str) -> int:
    """Run a step unless it is done; returns its exit code. Its output goes where this script's goes."""
    state = None if step.results is None else state_of(step)
    if step.results is not None and is_done(step, state):
        say(f"[{number}] {step.name}: done before")
        return 0
    say(f"[{number}] {step.name}\n    $ {printable(step)}")
    before = {} if step.results is None else files_in(step.results)
    start, used = time.monotonic(), core_seconds()
    code = subprocess.run(step.command).returncode
    if code == 0 and step.results is not None:
        after = files_in(step.results)
        wrote = {name: mark for name, mark in after.items() if before.get(name) != mark}
        remember(step, {"state": state, "wrote": wrote})
    if code == 0:
        say(f"    {time.monotonic() - start:.0f} s, {core_seconds() - used:.0f} s of a core")
    return code


def core_seconds() -> float:
    """Seconds of a core that the steps so far have used."""
    times = os.times()
    return times.children_user + times.children_system


def tolerable(step: Step, code: int, keep_going: bool) -> bool:
    """True where the next step makes sense although this one found fault; says so."""
    if code == EXIT_SOME_FAILED and step.script == CHECK_SCRIPT:
        say("    findings above; going on, for stage 2 leaves out what it cannot use")
        return True
    if code == EXIT_SOME_FAILED and step.results is None and keep_going:
        say("    some prompts failed (see failures.csv); going on without them")
        return True
    return False


def printable(step: Step) -> str:
    """The command as a reader can paste it."""
    return shlex.join(["python", step.script, *step.arguments])


def say(text: str) -> None:
    """Print at once, so that lines stay in order with those of the steps."""
    print(text, flush=True)


def state_of(step: Step) -> dict[str, Any]:
    """What a step's outcome depends on: arguments, the files it reads, its code."""
    return {
        "arguments": list(step.arguments),
        "reads": {str(folder): files_in(folder) for folder in step.reads},
        "code": code_of(step),
    }


def files_in(folder: Path) -> dict[str, list[int]]:
    """Name → [size, time of change] of the files under a folder, or of one file; hidden ones (stamps, locks) aside."""
    found = {}
    for path in [folder] if folder.is_file() else sorted(folder.rglob("*")):
        if path.is_file() and not path.name.startswith("."):
            status = path.stat()
            found[str(path.relative_to(folder))] = [status.st_size, status.st_mtime_ns]
    return found


def code_of(step: Step) -> str:
    """Hash over the scripts of the step's folder and the shared helpers."""
    digest = hashlib.sha256()
    for folder in sorted({(ROOT / step.script).parent, ROOT / "1_utils" / "run_scripts"}):
        for path in sorted(folder.glob("*.py")) + sorted(folder.glob("*.html")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def is_done(step: Step, state: dict[str, Any] | None) -> bool:
    """True where the step succeeded with this very state, and all that it wrote is still there, unchanged."""
    assert step.results is not None
    known = stamps_in(step.results).get(step.script)
    if not known or known["state"] != state:
        return False
    there = files_in(step.results)
    return all(there.get(name) == mark for name, mark in known["wrote"].items())


def remember(step: Step, stamp: dict[str, Any]) -> None:
    """Note that the step succeeded."""
    assert step.results is not None
    write_json(step.results / STAMP, stamps_in(step.results) | {step.script: stamp}, indent=None)


def stamps_in(folder: Path) -> dict[str, Any]:
    """The notes of earlier runs, by script; empty where there are none or they cannot be read."""
    try:
        stamps = json.loads((folder / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stamps if isinstance(stamps, dict) else {}


# --- what came out


def print_headline(args: argparse.Namespace) -> None:
    """A table for each prompt file: accuracy, difference, similarity, attention, each with its interval."""
    results = args.results_dir / args.run_name
    for output in runs_in(args.output_dir / args.run_name):
        run = open_run(output)
        counts = {style: sum(1 for _ in row_indices(run, style)) for style in run.styles}
        columns, lines = headline_table(headline_rows(counts, results / output.name))
        widths = [max(len(line[i]) for line in [columns, *lines]) for i in range(len(columns))]
        say(f"\n{output.name}")
        for line in [columns, *lines]:
            cells = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
            say("  ".join([line[0].ljust(widths[0]), *cells[1:]]))
    say("\n[…]: 95 % intervals; difference: to the clean form, paired by row and clustered by template")
    if not args.reward_model:
        say(f"reward scoring was skipped: add --reward_model {REWARD_EXAMPLE} (fetched from the hub) or a local folder")
    say(f"report: {results / 'report.html'}")


# --- script


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    words = list(sys.argv[1:] if argv is None else argv)
    cut = words.index("--") if "--" in words else len(words)
    parser = make_parser(__doc__)
    data = parser.add_argument_group("prompts")
    data.add_argument("--prompt_file", type=Path, nargs="+", required=True, help="JSON lists of objects")
    data.add_argument("--styles", nargs="+", default=["all"], help="styles to run (the clean form among them)")
    data.add_argument("--max_samples", type=int, help="first rows of each file; default: all")
    data.add_argument("--few_shot_file", type=Path, help="text before every prompt; answers then end with their line")
    models = parser.add_argument_group("models (hub ids or local folders)")
    models.add_argument("--model_name", default=DEFAULT_MODEL, help="the causal language model to study")
    models.add_argument("--embedding_model", help="for similarity; default: all-MiniLM-L6-v2, here or on the hub")
    models.add_argument("--reward_model", help=f"for reward scores, such as {REWARD_EXAMPLE}; default: none, skipped")
    depth = parser.add_argument_group("how much of the slow analyses")
    depth.add_argument("--lens_rows", type=int, default=100, help="first rows that the logit lens reads; 0: no lens")
    depth.add_argument("--probe_layers", type=int, nargs="+", help="layers that are probed; default: all")
    places = parser.add_argument_group("places")
    places.add_argument("--run_name", required=True, help="name of the folders below")
    places.add_argument("--output_dir", type=Path, default=Path("outputs"), help="where .pt files go")
    places.add_argument("--results_dir", type=Path, default=Path("results"), help="where CSVs, plots and report go")
    parser.add_argument("--keep_going", action="store_true", help="go on where some prompts failed in stage 2")
    args = parser.parse_args(words[:cut])
    args.stage2_flags = words[cut + 1 :]
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the steps that are not done; print the closing table."""
    args = parse_args(argv)
    jobs = jobs_of(args)
    steps = [*(step for job in jobs for step in (check_step(job), *steps_of(job, args))), report_step(jobs, args)]
    start = time.monotonic()
    for number, step in enumerate(steps, start=1):
        code = run_step(step, f"{number}/{len(steps)}")
        if code != 0 and not tolerable(step, code, args.keep_going):
            say(f"stopped: {step.script} ended with exit code {code} (its message is above); the same command goes on")
            return code if code > 0 else 128 - code  # killed by a signal: as a shell tells it
    print_headline(args)
    say(f"{len(steps)} steps in {time.monotonic() - start:.0f} s")
    return 0


if __name__ == "__main__":
    run_main(main)
