"""How far a run of stage 2 is: per style done, failed and missing prompts; rate, time left, disk; which log to read.

Reads   outputs/<run>/ with one or several prompt files' folders: run.json, prompts.json, .pt files, failures.csv, and
        the notes that cluster jobs leave there (.job.<script>.<task>)
Writes  nothing; prints a table, or JSON with --json

    python 1_utils/run_scripts/run_status.py --run_dir outputs/demo

The rate counts the prompts written since the run was last started, in its last hour at most; the time left is at that
rate. Exit code: 0 everything is done, 1 prompts are missing or failed, 2 there is no such run.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import cache
from pathlib import Path

from command_line import UserError, make_parser, run_main
from file_output import gigabytes
from load_json import PromptFile, read_prompt_file
from run_store import (
    load_pt,
    near_folder,
    open_run,
    planned_prompts,
    pt_files,
    read_failures,
    read_json_file,
    results_of,
    sort_styles,
)  # fmt: skip
from stamps import is_current, read_stamp
from token_spans import matched_style

RATE_SPAN = 3600.0  # seconds
ENDED = "ended without a word (cancelled, out of time, or its node failed)"


@dataclass(frozen=True)
class StyleStatus:
    """One style of a run. `written`: (time, prompts) of each .pt file; `started`: when run.json was last written."""

    folder: str
    style: str
    done: int
    failed: int
    missing: int
    damaged: int
    bytes: int
    started: float
    written: tuple[tuple[float, int], ...]


@dataclass(frozen=True)
class JobNote:
    """The last that a cluster job said of itself."""

    script: str
    task: str
    state: str
    time: float
    log: str


@dataclass(frozen=True)
class Progress:
    """A run as a whole. `rate` in prompts per second and `seconds_left` are None where they cannot be told."""

    done: int
    failed: int
    missing: int
    bytes: int
    bytes_left: int
    bytes_free: int
    rate: float | None
    seconds_left: float | None
    last_written: float | None


# --- what is on disk


def read_styles(run_dir: Path) -> list[StyleStatus]:
    """Every style under a run folder, a style folder, or a folder of several runs. Raises UserError where none is."""
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: no such folder{near_folder(run_dir)}; give the --output_dir of stage 2")
    found = sorted(path.parent for depth in ("", "*/", "*/*/") for path in run_dir.glob(f"{depth}run.json"))
    if not found:
        raise UserError(f"{run_dir}: no run has begun there (no run.json); is it the --output_dir of stage 2?")
    runs = dict.fromkeys(folder.parent for folder in found)
    order = {run: sort_styles([folder.name for folder in found if folder.parent == run], run) for run in runs}
    return [read_style(run / name) for run in runs for name in order[run]]


def read_style(folder: Path) -> StyleStatus:
    """Count a style's prompts: those in .pt files, those in failures.csv, and the rest of what was asked for."""
    settings = read_json_file(folder / "run.json").get("settings", {})
    style = str(settings.get("style", folder.name))
    rows: set[int] = set()
    written, damaged = [], 0
    files = pt_files(folder)
    for path in files:
        try:
            indices = load_pt(path)["original_indices"]
        except (UserError, KeyError):
            damaged += 1
            continue
        rows.update(indices)
        written.append((path.stat().st_mtime, len(indices)))
    failed = set(read_failures(folder)) - rows
    if matched_style(style):  # which rows a control has only its tokenizer knows
        missing = max(0, (planned_prompts(folder, style) or 0) - len(rows | failed))
    else:
        missing = len(wanted_rows(folder, style, settings.get("max_samples")) - rows - failed)
    return StyleStatus(
        folder=str(folder),
        style=style,
        done=len(rows),
        failed=len(failed),
        missing=missing,
        damaged=damaged,
        bytes=sum(path.stat().st_size for path in files),
        started=(folder / "run.json").stat().st_mtime,
        written=tuple(written),
    )


def wanted_rows(folder: Path, style: str, max_samples: int | None) -> set[int]:
    """Original indices that a style was asked to run, those that turned out to be no prompts included."""
    copy = next((path for path in (folder / "prompts.json", folder.parent / "prompts.json") if path.is_file()), None)
    if copy is None:
        raise UserError(
            f"{folder}: no prompts.json beside or above it; stage 2 with the same arguments writes it again"
        )
    prompts = prompt_file(copy)
    good = {index for index, _ in prompts.prompts(style, max_samples)}
    return good | {problem.original_index for problem in prompts.problems_of(style, max_samples)}


@cache
def prompt_file(path: Path) -> PromptFile:
    """A prompt file, read once for all styles."""
    return read_prompt_file(path)


def read_notes(run_dir: Path) -> list[JobNote]:
    """What cluster jobs noted in these folders; Slurm is asked about those that have not noted their end."""
    notes = []
    for path in sorted(path for depth in ("", "*/", "*/*/") for path in run_dir.glob(f"{depth}.job.*")):
        try:
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            values = dict(line.split("=", 1) for line in lines if "=" in line)
            script = path.name.removeprefix(".job.").rsplit(".", 1)[0]
            notes.append(JobNote(script, values["task"], values["state"], float(values["time"]), values["log"]))
        except (OSError, KeyError, ValueError):  # being written just now
            continue
    return [mended(note) for note in notes]


def mended(note: JobNote) -> JobNote:
    """The note, with the state that Slurm tells where the job itself has not noted its end."""
    if note.state != "running" and "put back" not in note.state:
        return note
    state = slurm_state(note.task)
    if state is None:
        return note
    if state == "":
        return JobNote(note.script, note.task, ENDED, note.time, note.log)
    said = state if note.state == "running" else f"{note.state}; now {state}"
    return JobNote(note.script, note.task, said, note.time, note.log)


def slurm_state(task: str) -> str | None:
    """`running`, `pending` … of an array task; "" where it has ended; None where Slurm cannot be asked."""
    try:
        command = ["squeue", "--noheader", "--jobs", task, "--format", "%T"]
        asked = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if asked.returncode != 0:
        return "" if "Invalid job id" in asked.stderr else None
    return asked.stdout.split()[0].lower() if asked.stdout.split() else ""


def analyses_of(styles: Sequence[StyleStatus]) -> dict[str, bool]:
    """Each stamped analysis of these runs, as `<results folder>: <script>`, and whether it is up to date: all that it
    read, wrote and ran is unchanged."""
    folders = [Path(style.folder) for style in styles if style.done]
    found = {}
    for run in dict.fromkeys(f if (f / "prompts.json").is_file() else f.parent for f in folders):
        results = results_of(open_run(run))
        for path in sorted(results.glob(".done.*.json")):
            script = path.name.split(".")[2]
            if stamp := read_stamp(results, script):
                found[f"{results}: {script}"] = is_current(stamp, results)
    return found


# --- sums


def progress_of(styles: Sequence[StyleStatus], run_dir: Path) -> Progress:
    """The run as a whole."""
    done, missing = sum(style.done for style in styles), sum(style.missing for style in styles)
    size = sum(style.bytes for style in styles)
    written = [item for style in styles for item in style.written]
    rate = rate_of(written, [style.started for style in styles])
    return Progress(
        done=done,
        failed=sum(style.failed for style in styles),
        missing=missing,
        bytes=size,
        bytes_left=round(size / done * missing) if done else 0,
        bytes_free=shutil.disk_usage(run_dir).free,
        rate=rate,
        seconds_left=missing / rate if rate else None,
        last_written=max((moment for moment, _ in written), default=None),
    )


def rate_of(written: Sequence[tuple[float, int]], starts: Sequence[float]) -> float | None:
    """Prompts per second from the last start, or the last hour of work, to the newest file. None without a file since.

    `written`: (time, prompts) of each file. Files come in bursts, so the clock starts with the work, not with a file.
    """
    if not written:
        return None
    last = max(moment for moment, _ in written)
    start = max([last - RATE_SPAN, *(moment for moment in starts if moment < last)])
    prompts = sum(count for moment, count in written if moment > start)
    if start == last - RATE_SPAN and not any(moment < last for moment in starts):
        return None  # nothing says when the work began
    return prompts / (last - start)


# --- printing


def status_lines(styles: Sequence[StyleStatus], notes: Sequence[JobNote], run_dir: Path, now: float) -> list[str]:
    """The table, the sums and what to read next."""
    lines = style_table(styles)
    total = progress_of(styles, run_dir)
    lines.append("")
    if total.last_written is not None:
        lines.append(f"last file written {span(now - total.last_written)} ago")
    if total.rate:
        lines.append(f"rate {total.rate * 60:,.1f} prompts a minute")
    if total.missing and total.seconds_left is not None:
        lines.append(f"time left at this rate {span(total.seconds_left)}")
    left = f", about {gigabytes(total.bytes_left)} to come" if total.missing and total.done else ""
    lines.append(f"disk {gigabytes(total.bytes)}{left}, {gigabytes(total.bytes_free)} free")
    lines += [f"damaged .pt files in {style.folder}: stage 2 runs them again" for style in styles if style.damaged]
    lines += [f"why prompts failed: {Path(style.folder) / 'failures.csv'}" for style in styles if style.failed]
    return lines + note_lines(notes)


def style_table(styles: Sequence[StyleStatus]) -> list[str]:
    """Rows: styles and their sum. Folders are named where there are several."""
    several = len({Path(style.folder).parent for style in styles}) > 1
    rows: list[tuple[str, ...]] = [("style", "done", "failed", "missing", "size")]
    for style in styles:
        name = f"{Path(style.folder).parent.name}/{style.style}" if several else style.style
        rows.append((name, str(style.done), str(style.failed), str(style.missing), gigabytes(style.bytes)))
    sums = [str(sum(getattr(style, key) for style in styles)) for key in ("done", "failed", "missing")]
    rows.append(("all", *sums, gigabytes(sum(style.bytes for style in styles))))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]


def note_lines(notes: Iterable[JobNote]) -> list[str]:
    """One line for each cluster job that has not ended well, the logs to read."""
    return [
        f"job {note.task} ({note.script}): {note.state} since {datetime.fromtimestamp(note.time):%F %T}; log {note.log}"
        for note in notes
        if note.state != "done"
    ]


def analysis_lines(analyses: dict[str, bool]) -> list[str]:
    """How many analyses are up to date, and which are not."""
    if not analyses:
        return []
    old = [
        f"run again, its inputs, outputs or code have changed: {name}"
        for name, current in analyses.items()
        if not current
    ]
    return [f"analyses: {sum(analyses.values())} of {len(analyses)} up to date", *old]


def span(seconds: float) -> str:
    """A time span as people say it."""
    seconds = max(0, round(seconds))
    if seconds < 120:
        return f"{seconds} s"
    if seconds < 7200:
        return f"{seconds // 60} min"
    return f"{seconds // 3600} h {seconds % 3600 // 60} min"


# --- script


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--run_dir", type=Path, help="run folder of stage 2, or a folder of several")
    parser.add_argument("folder", nargs="?", type=Path, help="the same, without the flag")
    parser.add_argument("--json", action="store_true", help="everything as one JSON object")
    args = parser.parse_args(argv)
    args.run_dir = args.run_dir or args.folder
    if args.run_dir is None:
        raise UserError("--run_dir: give the run folder of stage 2, or a folder of several")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Print the status."""
    args = parse_args(argv)
    notes = read_notes(args.run_dir) if args.run_dir.is_dir() else []
    try:
        styles = read_styles(args.run_dir)
    except UserError as error:
        if not notes:
            raise
        raise UserError(f"{error}; {'; '.join(note_lines(notes)) or 'its jobs are done'}") from None
    progress, analyses = progress_of(styles, args.run_dir), analyses_of(styles)
    if args.json:
        lists = {
            "styles": [asdict(style) for style in styles],
            "jobs": [asdict(note) for note in notes],
            "analyses": analyses,
        }
        print(json.dumps(asdict(progress) | lists, ensure_ascii=False, indent=2))
    else:
        print("\n".join([*status_lines(styles, notes, args.run_dir, time.time()), *analysis_lines(analyses)]))
    return int(progress.missing + progress.failed > 0)


if __name__ == "__main__":
    run_main(main)
