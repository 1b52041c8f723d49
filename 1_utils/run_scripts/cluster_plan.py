"""Plan the cluster jobs for submit.sh: the steps of run_pipeline.py for the same arguments that are not done yet.

Reads   prompt files, run folders and stamps of steps (.done.<script>.json); with --site what submit.sh sends
Writes  nothing; prints shell lines for submit.sh to run, or with --dry_run a table of the jobs

    python 1_utils/run_scripts/cluster_plan.py --dry_run -- --model_name google/gemma-2-9b-it \\
        --prompt_file 0_data/maths.json --run_name gemma

A step is done if it last succeeded with the same arguments, inputs, outputs and code, and the steps it waits for are
done. For stage 2 also no prompt may be missing or failed (with --keep_going: missing).
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from command_line import UnknownFlag, UserError, make_parser, run_main
from file_output import gigabytes
from logger import get_logger
from run_pipeline import CAPTURE, ROOT, TEXT_ENGINE, Step, jobs_of, parse_step, report_step, script_module, steps_of
from run_pipeline import parse_args as parse_pipeline_args
from run_status import read_styles, unpatched
from stamps import MODELS, by_flag, is_done

STAGES = ("0", "2", "3", "4", "5", "report")
SHARED_OUT = ("capture", "patches")  # steps that run as several array tasks
EMBEDDED_MODELS = ("models/SmolLM2-135M-Instruct", "models/all-MiniLM-L6-v2")
Site = dict[str, list[str]]  # name in site.env → its values that are not empty


@dataclass(frozen=True)
class Planned:
    """A step, the numbers of the steps that must end well before it (`after`) or must end (`after_any`), and its
    state: `done`, `missing`, or `left out` by --stages."""

    step: Step
    after: tuple[int, ...]
    after_any: tuple[int, ...]
    state: str

    @property
    def slurm_file(self) -> Path:
        """The job file beside the script."""
        return ROOT / Path(self.step.script).parents[1] / "hpc" / f"{self.step.stem}.slurm"

    @property
    def place(self) -> str:
        """The folder that it writes into; with the script's name it identifies a job in the queue."""
        return str(self.step.place.resolve())

    def settings(self) -> dict[str, str]:
        """The `#SBATCH --name=value` lines of the job file."""
        return dict(re.findall(r"^#SBATCH --([\w-]+)=(.*)$", self.slurm_file.read_text(encoding="utf-8"), re.M))


def plan(args: argparse.Namespace, stages: Sequence[str]) -> list[Planned]:
    """All steps in order. A step without its capture has nothing to read; without another it does what it can."""
    planned: list[Planned] = []
    jobs = jobs_of(args)
    chains = [(job.output, steps_of(job, args)) for job in jobs]
    for output, steps in [*chains, (None, [report_step(jobs, args)])]:
        numbers = {step.name: len(planned) + place for place, step in enumerate(steps)}
        for step in steps:
            needs = [numbers[name] for name in step.after if name in numbers] if output else range(len(planned))
            well = tuple(n for n in needs if planned[n].step.name in ("text", "capture") and not args.keep_going)
            done = is_done(step.script, step.arguments, (0, 1) if step.name in SHARED_OUT else (0,))
            if step.name == "capture" and done and output:
                done = is_complete(output, args.keep_going)
            if step.name == "patches" and done and output:
                done = not unpatched(output, args.keep_going)
            done = done and not any(planned[n].state == "missing" for n in needs)
            state = "done" if done else "missing"
            if ("report" if step.name == "report" else step.script[0]) not in stages:
                state = "left out"
            planned.append(Planned(step, well, tuple(n for n in needs if n not in well), state))
    return planned


def is_complete(output: Path, failed_too: bool) -> bool:
    """Whether every prompt of a run folder is done (`failed_too`: or has failed)."""
    try:
        return all(style.missing == 0 and (failed_too or style.failed == 0) for style in read_styles(output))
    except UserError:
        return False


def models_of(planned: Sequence[Planned], args: argparse.Namespace) -> list[tuple[str, str]]:
    """(model, revision or "") that the missing steps will load."""
    local = ROOT / "models" / "all-MiniLM-L6-v2"
    default = str(local) if local.is_dir() else "sentence-transformers/all-MiniLM-L6-v2"
    found = []
    for item in planned:
        if item.state == "missing":
            flags = by_flag(item.step.arguments)
            if item.step.name == "similarity":
                flags.setdefault("--embedding_model", [default])
            found += [model for name in MODELS for model in flags.get(f"--{name}", [])]
    return [(model, args.stage2.revision or "" if model == args.model_name else "") for model in dict.fromkeys(found)]


# --- the jobs


def sbatch_words(item: Planned, ids: dict[int, str], site: Site, shards: int) -> list[str]:
    """Arguments of sbatch for a step. ids: the job of each step that is waited for; the last option of a name wins."""

    def value(name: str) -> str:
        return next(iter(site.get(name, [])), "")

    name, stage, capture = item.step.stem, item.step.script[0], item.step.name in SHARED_OUT
    words = ["--parsable", f"--job-name={name}", f"--comment={item.place}", "--kill-on-invalid-dep=yes"]
    words.append(f"--output={Path('logs').resolve()}/{name}_%A_%a.out")
    limits = [
        ("time", value(f"STAGE_TIME{stage}")),
        ("mem", value(f"STAGE_MEM{stage}")),
        ("partition", value("PARTITION")),
    ]
    words += [f"--{option}={value(option.upper())}" for option in ("account", "qos") if value(option.upper())]
    words += site.get("SBATCH_OPTIONS", [])
    if "gres" in item.settings():
        gres = (value("CAPTURE_GRES") if capture or item.step.name == "text" else "") or value("GPU_GRES")
        # A site's own option for GPUs replaces the job file's.
        words += ["--gres=none", gres] if gres.startswith("--") else [f"--gres={gres}"] if gres else []
        words += site.get("GPU_OPTIONS", [])
        limits.append(("partition", value("GPU_PARTITION")))
    words += [f"--{option}={text}" for option, text in limits if text]
    words += [f"--array=0-{shards - 1}"] if capture else []
    waits = []
    for kind, numbers in (("afterok", item.after), ("afterany", item.after_any)):
        known = [ids[number] for number in numbers if number in ids]
        waits += [":".join([kind, *known])] if known else []
    return words + ([f"--dependency={','.join(waits)}"] if waits else [])


def jobs_of_plan(
    planned: Sequence[Planned], site: Site, args: argparse.Namespace
) -> Iterator[tuple[int, str, list[str]]]:
    """(number, what is said of it, words of sbatch) of each step: words if it is to be submitted, else a text.

    A job that others wait for is JOB<number>, or its own number if it is in the queue already.
    """
    queue = (line.rstrip(" ").split("|", 2) for line in site.get("QUEUE", []) if line.count("|") > 1)
    known = {(name, place): job for job, name, place in queue}
    ids: dict[int, str] = {}
    for number, item in enumerate(planned):
        name = item.step.stem
        queued = known.get((name, item.place)) if item.state != "done" else None
        if queued:
            ids[number] = queued
            yield number, f"in the queue: {queued}  {name}  {item.place}", []
        elif item.state == "done":
            yield number, f"done before: {name}  {item.place}", []
        elif item.state == "missing":
            # Slurm checks no dependency on what has no number yet.
            words = sbatch_words(item, {} if args.test_only else ids, site, args.shards)
            ids[number] = f"JOB{number}"
            yield number, "", [*words, str(item.slurm_file), *item.step.arguments]


def shell_lines(planned: Sequence[Planned], site: Site, args: argparse.Namespace) -> Iterator[str]:
    """Calls of submit.sh's functions `fetch` and `job`; `ids` and `run`, which it shows at the end."""
    yield f"run={shlex.quote(str((args.pipeline.output_dir / args.pipeline.run_name).resolve()))}"
    for model, revision in models_of(planned, args.pipeline):
        make = model in EMBEDDED_MODELS and not Path(model).is_dir()
        options = ["--models_dir", "models"] if make else ["--model_name", model]
        yield shlex.join(["fetch", model, *options, *(["--revision", revision] if revision else [])])
    for number, text, words in jobs_of_plan(planned, site, args):
        item = planned[number]
        if text:
            yield shlex.join(["echo", text])
            yield f"ids[{number}]={text.split()[3]}" if item.state != "done" else ""
            continue
        line = shlex.join(["job", str(number), item.step.stem, item.place, *words])
        yield re.sub(r" --dependency=\S*", lambda found: re.sub(r"JOB(\d+)", r"${ids[\1]}", found[0]), line, count=1)


def table_lines(planned: Sequence[Planned], site: Site, args: argparse.Namespace) -> Iterator[str]:
    """A dry run: one line for each job that would be submitted, and the sum of their GPU-hours."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # a plan does not wait for a hub
    get_logger().setLevel("ERROR")  # the job says all this when it runs
    form, hours = "{:<6} {:<22} {:>6} {:>12} {:>8} {:>10} {:>10}  {}", []
    yield form.format("job", "script", "tasks", "time limit", "memory", "GPU-hours", "disk", "waits for")
    for number, text, words in jobs_of_plan(planned, site, args):
        if text:
            yield text
            continue
        item, size, used = planned[number], "", "-"
        options = [word[2:].partition("=") for word in words[: words.index(str(item.slurm_file))]]
        given = item.settings() | {flag: value for flag, _, value in options}
        tasks = args.shards if item.step.name in SHARED_OUT else 1
        if gpus := given.get("gpus-per-node", given.get("gres")):
            count = gpus.rpartition(":")[2]
            hours.append(tasks * (int(count) if count.isdigit() else 1) * hours_of(given["time"]))
            used = f"{hours[-1]:.1f}"
        if item.step.name == "capture":
            with suppress(UserError, ImportError):  # its model is not on this machine
                size = gigabytes(script_module(CAPTURE).bytes_to_write(parse_step(CAPTURE, item.step.arguments)))
        waits = given.get("dependency", "-")
        waits = waits if len(waits) <= 50 else f"{waits[:47]}..."
        yield form.format(f"JOB{number}", item.step.stem, tasks, given["time"], given["mem"], used, size, waits)
        if args.verbose:
            yield f"    JOB{number}: {shlex.join(['sbatch', *words])}"
    yield ""
    if hours:
        yield f"at most {sum(hours):g} GPU-hours: what all jobs use that run into their time limits"
    yield "nothing was submitted; --verbose shows the commands"


def hours_of(limit: str) -> float:
    """Hours of a time limit as Slurm writes it: minutes, minutes:seconds, h:m:s, days-h:m:s."""
    days, dash, rest = limit.rpartition("-")
    parts = [float(part) for part in rest.split(":")]
    if not dash and len(parts) < 3:
        parts = [0.0, *parts]
    return 24 * float(days or 0) + sum(part / 60**place for place, part in enumerate(parts))


# --- script


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line of submit.sh; `pipeline`: what follows `--`, as run_pipeline.py reads it."""
    words = list(sys.argv[1:] if argv is None else argv)
    cut = words.index("--") if "--" in words else len(words)
    parser = make_parser(__doc__)
    parser.add_argument("--stages", default="2,3,4,5,report", help=f"of {','.join(STAGES)}")
    parser.add_argument("--shards", type=int, default=1, help="array tasks of each script of stage 2")
    parser.add_argument("--text_engine", choices=["vllm"], help=TEXT_ENGINE)
    parser.add_argument("--dry_run", "--dry-run", action="store_true", help="print a table of the jobs")
    parser.add_argument("--test_only", "--test-only", action="store_true", help="print what lets Slurm check the jobs")
    parser.add_argument("--site", action="store_true", help="read site.env and the queue from standard input")
    try:
        args = parser.parse_args(words[:cut])
    except UnknownFlag as error:
        raise UserError(
            f"{error.flag}: there is no such flag before --; the pipeline's arguments come after it"
        ) from None
    args.stages = [stage.strip() for stage in args.stages.split(",") if stage.strip()]
    if unknown := [stage for stage in args.stages or ["''"] if stage not in STAGES]:
        raise UserError(f"--stages: there is no stage {unknown[0]}; choose among {', '.join(STAGES)}")
    if args.shards < 1:
        raise UserError(f"--shards {args.shards}: give a whole number from 1 up")
    if not words[cut + 1 :]:
        raise UserError(
            "no arguments for the pipeline; give them after --: -- --model_name … --prompt_file … --run_name …"
        )
    own = ["--text_engine", args.text_engine] if args.text_engine else []
    args.pipeline = parse_pipeline_args([*own, *words[cut + 1 :]])
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Print the plan, after every script has read the arguments it will get."""
    args = parse_args(argv)
    site: Site = {}
    for line in sys.stdin if args.site else ():
        name, _, value = line.rstrip("\n").partition("=")
        site.setdefault(name, []).extend([value] if value else [])
    planned = plan(args.pipeline, args.stages)
    for item in planned:
        if item.state == "missing":
            parse_step(item.step.script, item.step.arguments)
    print("\n".join((table_lines if args.dry_run else shell_lines)(planned, site, args)))
    return 0


if __name__ == "__main__":
    run_main(main)
