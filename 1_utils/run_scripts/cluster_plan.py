"""What submit.sh has to submit: the steps of run_pipeline.py for the same arguments, and which of them are done.

Reads   prompt files, run folders, and the notes that jobs and run_pipeline.py leave there (.done.*, .pipeline.json)
Writes  nothing; prints a table, or with --fields what submit.sh reads (fields that end in a NUL byte)

    python 1_utils/run_scripts/cluster_plan.py --stages 2,3,4,5,report -- --model_name google/gemma-2-9b-it \\
        --prompt_file 0_data/maths.json --run_name gemma

A step is done when a job or run_pipeline.py ran it with success and the same arguments, after everything that it reads
and the code that it runs were last changed, and the steps that it waits for are done. Stage 2 is done when it has ended
with the same arguments and no prompt is missing or failed (with --keep_going: none is missing).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from command_line import UserError, make_parser, run_main
from file_output import gigabytes
from logger import get_logger
from run_pipeline import Job, Step, check_step, jobs_of, report_step, script_module, state_of, steps_of
from run_pipeline import is_done as is_stamped
from run_pipeline import parse_args as parse_pipeline_args
from run_status import read_styles

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("0", "2", "3", "4", "5", "report")
DEFAULT_STAGES = "2,3,4,5,report"
CAPTURE, ACCURACY, CHECK = "attn_act_logi", "evaluate_predictions", "check_prompts"


@dataclass(frozen=True)
class Planned:
    """A step, the numbers of the steps that it waits for, and what becomes of it.

    `after` must end well, `after_any` must end: the step takes what they have left. `done` is False for a step that is
    to be submitted; one that is not `chosen` is waited for if it is in the queue.
    """

    step: Step
    after: tuple[int, ...]
    after_any: tuple[int, ...]
    done: bool
    chosen: bool

    @property
    def state(self) -> str:
        """`done`, `missing`, or `left out` by --stages."""
        return ("done" if self.done else "missing") if self.chosen else "left out"

    @property
    def stem(self) -> str:
        """Name of the script, of its .slurm file and of the job."""
        return stem_of(self.step)

    @property
    def slurm_file(self) -> Path:
        """The job file beside the script."""
        return ROOT / Path(self.step.script).parents[1] / "hpc" / f"{self.stem}.slurm"

    @property
    def folder(self) -> Path:
        """The folder that tells this job from one of the same name for another run: where it writes."""
        return place_of(self.step).resolve()


def stem_of(step: Step) -> str:
    """Name of the step's script."""
    return Path(step.script).stem


# --- the chain


def plan(args: argparse.Namespace, stages: Sequence[str]) -> list[Planned]:
    """All steps in order, each after the steps that make what it reads."""
    jobs = jobs_of(args)
    planned: list[Planned] = []
    captures: list[int] = []
    for job in jobs:
        first = len(planned)
        chain = [check_step(job, args), *steps_of(job, args)]
        for step in chain:
            numbers = [first + i for i, earlier in enumerate(chain) if feeds(earlier, step, job)]
            # Without its stage 2 a step has nothing to read; what a check or stage 3 would add, it can do without.
            needed = [n for n in numbers if n in captures and not args.keep_going]
            done = is_done(step, job, args.keep_going) and not any_missing(planned, numbers)
            if stem_of(step) == CAPTURE:
                captures.append(len(planned))
            planned.append(planned_step(step, needed, numbers, done, stages))
    report, everything = report_step(jobs, args), range(len(planned))
    done = has_ended_well(report) and not any_missing(planned, everything)
    return [*planned, planned_step(report, [] if args.keep_going else captures, everything, done, stages)]


def planned_step(
    step: Step, needed: Sequence[int], numbers: Sequence[int], done: bool, stages: Sequence[str]
) -> Planned:
    """A step that waits for the steps `numbers`, of which the `needed` ones must end well."""
    rest = tuple(number for number in numbers if number not in needed)
    return Planned(step, tuple(needed), rest, done, stage_of(step) in stages)


def any_missing(planned: Sequence[Planned], numbers: Sequence[int]) -> bool:
    """Whether one of these steps is to be submitted."""
    return any(planned[number].state == "missing" for number in numbers)


def stage_of(step: Step) -> str:
    """The number of the step's folder; `report` for the shared one."""
    return "report" if step.script.startswith("1_utils/") else step.script[0]


def feeds(earlier: Step, later: Step, job: Job) -> bool:
    """Whether `later` needs what `earlier` of the same prompt file makes."""
    if later is earlier:
        return False
    stem, waiting = stem_of(earlier), stem_of(later)
    if waiting == CHECK:
        return False
    if waiting == CAPTURE:
        return stem == CHECK
    if stem == ACCURACY:
        return job.results / "maths_items.csv" in later.reads
    return stem == CAPTURE


# --- what is done


def is_done(step: Step, job: Job, keep_going: bool) -> bool:
    """Whether a step need not be submitted."""
    if stem_of(step) != CAPTURE:
        return has_ended_well(step)
    return note_is_of(step) and is_complete(job.output, keep_going)


def is_complete(output: Path, failed_too: bool) -> bool:
    """Whether every prompt of a run folder is done (`failed_too`: or has failed)."""
    try:
        styles = read_styles(output)
    except UserError:
        return False
    return bool(styles) and all(style.missing == 0 and (failed_too or style.failed == 0) for style in styles)


def has_ended_well(step: Step) -> bool:
    """Whether a job or the pipeline ran the step with these arguments, after all that it reads and runs was last
    changed, and its files are there."""
    if step.results is not None and is_stamped(step, state_of(step)):
        return True
    if not note_is_of(step) or not all(path.is_file() for path in files_of(step)):
        return False
    written = note_of(step).stat().st_mtime_ns
    code = [(ROOT / step.script).parent, ROOT / "1_utils" / "run_scripts"]
    changed = [newest(folder, "*.py") for folder in code] + [newest(path, "*") for path in step.reads]
    return max(changed) <= written


def files_of(step: Step) -> list[Path]:
    """The files that came into the step's folder while it ran, and the report."""
    note = note_of(step).with_name(f".wrote.{stem_of(step)}")
    names = note.read_text(encoding="utf-8").splitlines() if note.is_file() else []
    report = step.arguments[step.arguments.index("--report") + 1 :][:1] if "--report" in step.arguments else ()
    return [*(place_of(step) / name for name in names), *map(Path, report)]


def note_is_of(step: Step) -> bool:
    """Whether a job of this step has ended with these arguments (exit code 0; stage 2 also with 1, some failed).

    The order of words is left out: a report names its runs in the order in which they were begun.
    """
    try:
        words = note_of(step).read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    return sorted(words) == sorted("\n".join(step.arguments).splitlines())


def note_of(step: Step) -> Path:
    """The file that stage.sh writes when a job has ended; for stage 2 run_pipeline.py writes it, too."""
    return place_of(step) / f".done.{stem_of(step)}"


def place_of(step: Step) -> Path:
    """Where stage.sh leaves its notes: --output_dir, the (first) --results_dir, or the folder of --output_csv."""
    for flag in ("--output_dir", "--results_dir"):
        if flag in step.arguments:
            return Path(step.arguments[step.arguments.index(flag) + 1])
    return Path(step.arguments[step.arguments.index("--output_csv") + 1]).parent


def newest(path: Path, pattern: str) -> int:
    """Time of the last change (ns) of a file, or of any file under a folder; hidden ones and reports left out."""
    files = [path] if path.is_file() else [p for p in path.rglob(pattern) if p.is_file()]
    times = [p.stat().st_mtime_ns for p in files if not p.name.startswith(".") and p.name != "report.html"]
    return max(times, default=0)


# --- models


def models_of(planned: Sequence[Planned], args: argparse.Namespace) -> list[tuple[str, str]]:
    """(model, revision or "") that the steps that are not done will load."""
    revision = args.stage2.revision or ""
    needed = {CAPTURE: (args.model_name, revision), "activation_diffs": (args.model_name, revision)}
    needed |= {"compare_responses": (embedding_model(args.embedding_model), "")}
    needed |= {"score_scripts": (args.reward_model or "", "")}
    found = [needed[item.stem] for item in planned if item.stem in needed and item.state == "missing"]
    return list(dict.fromkeys(found))


def embedding_model(name: str | None) -> str:
    """The model that compare_responses.py will load: the one named, else the checkout's own, else the hub's."""
    local = ROOT / "models" / "all-MiniLM-L6-v2"
    return name or (str(local) if local.is_dir() else "sentence-transformers/all-MiniLM-L6-v2")


# --- disk


def bytes_to_write(planned: Sequence[Planned]) -> dict[int, int]:
    """Bytes that each stage 2 has still to write, by its number; without those whose model is not on this machine."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # a plan does not wait for a hub
    get_logger().setLevel("ERROR")  # the job says all this when it runs
    found = {}
    for number, item in enumerate(planned):
        if item.stem == CAPTURE and item.state == "missing":
            stage2 = script_module(item.step.script)
            own = stage2.parse_args(item.step.arguments)
            own.force = True
            try:
                prompts = stage2.read_prompt_file(own.prompt_file)
                jobs, _ = stage2.plan_jobs(own, prompts, stage2.chosen_styles(prompts, own.prompt_keys))
                found[number] = stage2.preflight([job for job in jobs if job.files], own.output_dir, True)
            except (UserError, ImportError):
                continue
    return found


# --- script


def print_table(planned: Sequence[Planned]) -> None:
    """One line a step."""
    for number, item in enumerate(planned):
        waits = [*item.after, *item.after_any]
        after = f"after {' '.join(map(str, sorted(waits)))}" if waits else ""
        print(f"{number:>3}  {item.state:8} {item.stem:22} {item.folder}  {after}")


def print_fields(planned: Sequence[Planned], models: Sequence[tuple[str, str]], sizes: dict[int, int]) -> None:
    """Print what submit.sh reads; each field ends in a NUL byte.

    For each model: `model`, name, revision. For each step: `step`, stem, .slurm file, folder, state, what it will write
    (may be empty), numbers of the steps that must end well before, of those that must end, number of its arguments, and
    these.
    """
    fields: list[str] = []
    for name, revision in models:
        fields += ["model", name, revision]
    for number, item in enumerate(planned):
        size = gigabytes(sizes[number]) if number in sizes else ""
        after, after_any = (" ".join(map(str, numbers)) for numbers in (item.after, item.after_any))
        arguments = item.step.arguments
        fields += ["step", item.stem, str(item.slurm_file), str(item.folder), item.state, size, after, after_any]
        fields += [str(len(arguments)), *arguments]
    sys.stdout.write("".join(f"{field}\0" for field in fields))


def chosen_stages(text: str) -> list[str]:
    """Stages of a comma-separated list. Raises UserError for one that there is not."""
    stages = [stage.strip() for stage in text.split(",") if stage.strip()]
    for stage in stages:
        if stage not in STAGES:
            raise UserError(f"--stages {text}: there is no stage {stage}; choose among {', '.join(STAGES)}")
    if not stages:
        raise UserError(f"--stages: give at least one of {', '.join(STAGES)}")
    return stages


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; what follows the first `--` is run_pipeline.py's."""
    words = list(sys.argv[1:] if argv is None else argv)
    cut = words.index("--") if "--" in words else len(words)
    parser = make_parser(__doc__)
    parser.add_argument("--stages", default=DEFAULT_STAGES, help=f"of {','.join(STAGES)}")
    parser.add_argument("--fields", action="store_true", help="for submit.sh")
    parser.add_argument("--sizes", action="store_true", help="with what stage 2 will write, if its model is here")
    args = parser.parse_args(words[:cut])
    args.pipeline = words[cut + 1 :]
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Print the plan."""
    args = parse_args(argv)
    stages = chosen_stages(args.stages)
    pipeline = parse_pipeline_args(args.pipeline)
    planned = plan(pipeline, stages)
    if args.fields:
        print_fields(planned, models_of(planned, pipeline), bytes_to_write(planned) if args.sizes else {})
    else:
        print_table(planned)
    return 0


if __name__ == "__main__":
    run_main(main)
