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
from dataclasses import dataclass
from pathlib import Path

from command_line import UnknownFlag, UserError, make_parser, run_main
from file_output import gigabytes
from logger import get_logger
from run_pipeline import ROOT, Step, jobs_of, parse_step, report_step, script_module, steps_of
from run_pipeline import parse_args as parse_pipeline_args
from run_status import read_styles
from stamps import is_done

STAGES = ("0", "2", "3", "4", "5", "report")
EMBEDDED_MODELS = ("models/SmolLM2-135M-Instruct", "models/all-MiniLM-L6-v2")
Site = dict[str, list[str]]  # name in site.env → its values


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
    def place(self) -> Path:
        """The folder that it writes into; with the script's name it identifies a job in the queue."""
        return self.step.place.resolve()

    @property
    def settings(self) -> dict[str, str]:
        """The `#SBATCH --name=value` lines of the job file."""
        return dict(re.findall(r"^#SBATCH --([\w-]+)=(.*)$", self.slurm_file.read_text(encoding="utf-8"), re.M))


# --- the plan


def plan(args: argparse.Namespace, stages: Sequence[str]) -> list[Planned]:
    """All steps in order. A step without its capture has nothing to read; without another it does what it can."""
    planned: list[Planned] = []

    def add(step: Step, needs: Sequence[int], done: bool) -> None:
        well = tuple(n for n in needs if planned[n].step.name == "capture" and not args.keep_going)
        if any(planned[n].state == "missing" for n in needs):
            done = False
        chosen = ("report" if step.name == "report" else step.script[0]) in stages
        state = ("done" if done else "missing") if chosen else "left out"
        planned.append(Planned(step, well, tuple(n for n in needs if n not in well), state))

    jobs = jobs_of(args)
    for job in jobs:
        numbers: dict[str, int] = {}
        for step in steps_of(job, args):
            if step.name == "capture":
                done = is_done(step.script, step.arguments, (0, 1)) and is_complete(job.output, args.keep_going)
            else:
                done = is_done(step.script, step.arguments)
            numbers[step.name] = len(planned)
            add(step, [numbers[name] for name in step.after if name in numbers], done)
    report = report_step(jobs, args)
    add(report, range(len(planned)), is_done(report.script, report.arguments))
    return planned


def is_complete(output: Path, failed_too: bool) -> bool:
    """Whether every prompt of a run folder is done (`failed_too`: or has failed)."""
    try:
        styles = read_styles(output)
    except UserError:
        return False
    return all(style.missing == 0 and (failed_too or style.failed == 0) for style in styles)


def models_of(planned: Sequence[Planned], args: argparse.Namespace) -> list[tuple[str, str]]:
    """(model, revision or "") that the missing steps will load."""
    local = ROOT / "models" / "all-MiniLM-L6-v2"
    embedding = args.embedding_model or (str(local) if local.is_dir() else "sentence-transformers/all-MiniLM-L6-v2")
    studied = (args.model_name, args.stage2.revision or "")
    needed = {"capture": studied, "layers": studied, "similarity": (embedding, "")}
    needed["reward scores"] = (args.reward_model or "", "")
    missing = [item.step.name for item in planned if item.state == "missing"]
    return list(dict.fromkeys(needed[name] for name in missing if name in needed))


def bytes_to_write(planned: Sequence[Planned]) -> dict[int, int]:
    """Bytes that each stage 2 still has to write, by its number; without those whose model is not on this machine."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # a plan does not wait for a hub
    get_logger().setLevel("ERROR")  # the job says all this when it runs
    found = {}
    for number, item in enumerate(planned):
        if item.step.name == "capture" and item.state == "missing":
            stage2 = script_module(item.step.script)
            try:
                found[number] = stage2.bytes_to_write(stage2.parse_args(item.step.arguments))
            except (UserError, ImportError):
                continue
    return found


# --- the jobs


def sbatch_words(item: Planned, ids: dict[int, str], site: Site, shards: int) -> list[str]:
    """Arguments of sbatch for a step. ids: the job of each step that is waited for; the last option of a name wins."""

    def value(name: str, place: int = 0) -> str:
        return next(iter(site.get(name, [])[place:]), "")

    name, stage = item.step.stem, int(item.step.script[0])
    words = ["--parsable", f"--job-name={name}", f"--comment={item.place}", "--kill-on-invalid-dep=yes"]
    words.append(f"--output={Path('logs').resolve()}/{name}_%A_%a.out")
    words += [f"--{option}={value(option.upper())}" for option in ("account", "qos") if value(option.upper())]
    words += site.get("SBATCH_OPTIONS", [])
    partition = value("PARTITION")
    if "gres" in item.settings:
        partition = value("GPU_PARTITION") or partition
        gres = (value("CAPTURE_GRES") if item.step.name == "capture" else "") or value("GPU_GRES")
        # A site's own option for GPUs replaces the job file's.
        words += ["--gres=none", gres] if gres.startswith("--") else [f"--gres={gres}"] if gres else []
        words += site.get("GPU_OPTIONS", [])
    words += [f"--time={limit}"] if (limit := value("STAGE_TIME", stage)) else []
    words += [f"--mem={memory}"] if (memory := value("STAGE_MEM", stage)) else []
    words += [f"--partition={partition}"] if partition else []
    words += [f"--array=0-{shards - 1}"] if item.step.name == "capture" else []
    waits = []
    for kind, numbers in (("afterok", item.after), ("afterany", item.after_any)):
        known = [ids[number] for number in numbers if number in ids]
        waits += [":".join([kind, *known])] if known else []
    return words + ([f"--dependency={','.join(waits)}"] if waits else [])


def jobs_in_queue(planned: Sequence[Planned], site: Site) -> dict[int, str]:
    """The Slurm job of each step that is in the queue, by the step's number."""
    lines = [line.rstrip(" ").split("|", 2) for line in "".join(site.get("QUEUE", [])).splitlines() if "|" in line]
    known = {(name, comment): job for job, name, comment in lines}
    keys = {number: (item.step.stem, str(item.place)) for number, item in enumerate(planned)}
    return {number: known[key] for number, key in keys.items() if key in known and planned[number].state != "done"}


def shell_lines(planned: Sequence[Planned], site: Site, args: argparse.Namespace) -> Iterator[str]:
    """What to do with each step: `fetch`, `job`, `check`, `watch` call submit.sh's functions."""
    if not args.test_only:
        for model, revision in models_of(planned, args.pipeline):
            make = model in EMBEDDED_MODELS and not Path(model).is_dir()
            options = ["--models_dir", "models"] if make else ["--model_name", model]
            yield shlex.join(["fetch", model, *options, *(["--revision", revision] if revision else [])])
    queued = jobs_in_queue(planned, site)
    ids = {} if args.test_only else dict(queued)  # a dependency needs a job's number, which nothing has yet
    for number, item in enumerate(planned):
        name = item.step.stem
        if number in queued:
            yield f"ids[{number}]={queued[number]}"
            yield shlex.join(["echo", f"in the queue: {queued[number]}  {name}  {item.place}"])
        elif item.state == "done":
            yield shlex.join(["echo", f"done before: {name}  {item.place}"])
        elif item.state == "missing":
            words = sbatch_words(item, ids, site, args.shards)
            command = [*words, str(item.slurm_file), *item.step.arguments]
            quoted = [f'"{word}"' if word.startswith("--dependency=") else shlex.quote(word) for word in command]
            if args.test_only:
                yield " ".join(["check", name, *quoted])
                continue
            yield " ".join(["job", str(number), name, shlex.quote(str(item.place)), *quoted])
            ids[number] = f"${{ids[{number}]}}"
    for item in planned:
        if ids and item.step.name == "capture":
            yield shlex.join(["watch", str(item.place)])


def table_lines(planned: Sequence[Planned], site: Site, args: argparse.Namespace) -> Iterator[str]:
    """A dry run: one line for each job that would be submitted, and the sum of their GPU-hours."""
    form = "{:<6} {:<22} {:>6} {:>12} {:>8} {:>10} {:>10}  {}"
    yield form.format("job", "script", "tasks", "time limit", "memory", "GPU-hours", "disk", "waits for")
    sizes, queued, hours = bytes_to_write(planned), jobs_in_queue(planned, site), []
    ids = dict(queued)
    for number, item in enumerate(planned):
        name = item.step.stem
        if number in queued:
            yield f"in the queue: {queued[number]}  {name}  {item.place}"
        elif item.state == "done":
            yield f"done before: {name}  {item.place}"
        elif item.state == "missing":
            words = sbatch_words(item, ids, site, args.shards)
            ids[number] = f"JOB{number}"
            given = item.settings | {flag: text for flag, _, text in (word[2:].partition("=") for word in words)}
            tasks = args.shards if item.step.name == "capture" else 1
            if gpus := given.get("gpus-per-node", given.get("gres")):
                count = gpus.rpartition(":")[2]
                hours.append(tasks * (int(count) if count.isdigit() else 1) * hours_of(given["time"]))
            used = f"{hours[-1]:.1f}" if gpus else "-"
            size = gigabytes(sizes[number]) if number in sizes else ""
            waits = given.get("dependency", "-")
            waits = waits if len(waits) <= 50 else f"{waits[:47]}..."
            yield form.format(ids[number], name, tasks, given["time"], given["mem"], used, size, waits)
            if args.verbose:
                yield f"    {ids[number]}: {shlex.join(['sbatch', *words, str(item.slurm_file), *item.step.arguments])}"
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
    parser.add_argument("--shards", type=int, default=1, help="array tasks of stage 2")
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
    for stage in args.stages or ["''"]:
        if stage not in STAGES:
            raise UserError(f"--stages: there is no stage {stage}; choose among {', '.join(STAGES)}")
    if args.shards < 1:
        raise UserError(f"--shards {args.shards}: give a whole number from 1 up")
    if not words[cut + 1 :]:
        raise UserError(
            "no arguments for the pipeline; give them after --: -- --model_name … --prompt_file … --run_name …"
        )
    args.pipeline = parse_pipeline_args(words[cut + 1 :])
    return args


def read_site(text: str) -> Site:
    """What submit.sh sends: for each name in site.env the number of its values and these, each with a NUL byte."""
    fields = iter(text.split("\0")[:-1])
    return {name: [next(fields) for _ in range(int(next(fields)))] for name in fields}


def main(argv: Sequence[str] | None = None) -> int:
    """Print the plan, after every script has read the arguments it will get."""
    args = parse_args(argv)
    site = read_site(sys.stdin.read()) if args.site else {}
    planned = plan(args.pipeline, args.stages)
    for item in planned:
        if item.state == "missing":
            parse_step(item.step.script, item.step.arguments)
    print("\n".join((table_lines if args.dry_run else shell_lines)(planned, site, args)))
    return 0


if __name__ == "__main__":
    run_main(main)
