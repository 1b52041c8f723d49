"""How far a run of stage 2 is: per style done, failed and missing prompts; rate, time left, disk; which log to read.

Reads   outputs/<run>/ with one or several prompt files' folders: run.json, prompts.json, .pt files, failures.csv, what
        cluster jobs note there (.job.<script>.<task>); the stamps of analyses in results/<run>/ (.done.<script>.json)
Writes  nothing; prints a table, or JSON with --json

    python 1_utils/run_scripts/run_status.py --run_dir outputs/demo

The rate counts the prompts written since the run was last started, in its last hour at most; the time left is at that
rate. Exit code: 0 everything is done, 1 prompts or patches are missing or failed, 2 there is no such run.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import run_store
from command_line import UserError, aligned, make_parser, run_main
from file_output import gigabytes
from load_json import read_prompt_file
from stamps import is_current, read_stamp
from style_names import source_style

RATE_SPAN = 3600.0  # seconds
ENDED = "ended without a word (cancelled, out of time, or its node failed)"
DEPTHS = ("", "*/", "*/*/")  # a style's folder, a run's, a folder of several runs
prompts_in = cache(read_prompt_file)  # read once for all styles


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
    patched: int = 0  # rows, of all sources
    patches_failed: int = 0
    patches_missing: int = 0


def read_styles(run_dir: Path) -> list[StyleStatus]:
    """Every style under a run folder, a style folder, or a folder of several runs. Raises UserError for none."""
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: no such folder{run_store.near_folder(run_dir)}; give the --output_dir of stage 2")
    found: dict[Path, list[str]] = {}
    for folder in sorted(path.parent for depth in DEPTHS for path in run_dir.glob(f"{depth}run.json")):
        found.setdefault(folder.parent, []).append(folder.name)
    if not found:
        raise UserError(f"{run_dir}: no run has begun there (no run.json); is it the --output_dir of stage 2?")
    return [read_style(run / name) for run, names in found.items() for name in run_store.sort_styles(names, run)]


def read_style(folder: Path) -> StyleStatus:
    """Count a style's prompts: those in .pt files, those in failures.csv, and the rest of what was asked for."""
    settings = run_store.read_json_file(folder / "run.json").get("settings", {})
    style = str(settings.get("style", folder.name))
    copy = next((copy for place in (folder, folder.parent) if (copy := place / "prompts.json").is_file()), None)
    if copy is None:
        raise UserError(f"{folder}: no prompts.json in or above it; stage 2 with the same arguments writes it again")
    rows: set[int] = set()
    written = []
    files = run_store.pt_files(folder)
    for path in files:
        with suppress(UserError, KeyError):  # damaged
            indices = run_store.load_pt(path)["original_indices"]
            rows.update(indices)
            written.append((path.stat().st_mtime, len(indices)))
    failed = set(run_store.read_failures(folder)) - rows
    if source_style(style) != style:  # which rows a control has only its tokenizer knows
        missing = (run_store.planned_prompts(folder, style) or 0) - len(rows | failed)
    else:  # those that are no prompts were asked for, too
        chosen, limit = prompts_in(copy), settings.get("max_samples")
        asked = {index for index, _ in chosen.prompts(style, limit)}
        missing = len((asked | {bad.original_index for bad in chosen.problems_of(style, limit)}) - rows - failed)
    return StyleStatus(
        folder=str(folder),
        style=style,
        done=len(rows),
        failed=len(failed),
        missing=max(0, missing),
        damaged=len(files) - len(written),
        bytes=sum(path.stat().st_size for path in files),
        started=(folder / "run.json").stat().st_mtime,
        written=tuple(written),
        **read_patches(folder),
    )


def read_patches(folder: Path) -> dict[str, int]:
    """How many rows of a style's folder are patched, have failed, are missing: of those that patches*.json plan."""
    found = dict.fromkeys(("patched", "patches_failed", "patches_missing"), 0)
    failures = set(run_store.read_failures(folder, "patches_failures.csv"))
    for record in folder.glob("patches*.json"):
        rows: set[int] = set()
        for path in folder.glob(f"{record.stem}_[0-9]*.pt"):
            with suppress(UserError):  # damaged
                rows.update(run_store.load_pt(path)["original_indices"])
        planned = int(run_store.read_json_file(record)["rows"])
        failed = min(len(failures - rows), planned - len(rows))
        for name, count in zip(found, (len(rows), failed, planned - len(rows) - failed), strict=True):
            found[name] += max(0, count)
    return found


def unpatched(run_dir: Path, failed_too: bool = False) -> int:
    """Rows whose patches are missing in a run, or (unless `failed_too`) failed."""
    counts = [read_patches(path.parent) for path in run_dir.glob("**/patches.json")]
    names = ("patches_missing",) if failed_too else ("patches_missing", "patches_failed")
    return sum(count[name] for count in counts for name in names)


def read_notes(run_dir: Path) -> list[dict[str, Any]]:
    """The last that cluster jobs noted in these folders: script, task, state, time, log.

    Slurm is asked about those that have not noted their end.
    """
    notes = []
    for path in sorted(path for depth in DEPTHS for path in run_dir.glob(f"{depth}.job.*")):
        try:
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            values = dict(line.split("=", 1) for line in lines if "=" in line)
            note: dict[str, Any] = {name: values[name] for name in ("task", "state", "time", "log")}
            note |= {"script": path.name.split(".")[2], "time": float(values["time"])}
        except (OSError, KeyError, ValueError):  # being written just now
            continue
        if note["state"] == "running" or "put back" in note["state"]:
            state = slurm_state(note["task"])
            if state and note["state"] != "running":
                state = f"{note['state']}; now {state}"
            note["state"] = note["state"] if state is None else state or ENDED
        notes.append(note)
    return notes


def slurm_state(task: str) -> str | None:
    """`running`, `pending` … of an array task; "" if it has ended; None if Slurm cannot be asked."""
    try:
        command = ["squeue", "--noheader", "--jobs", task, "--format", "%T"]
        asked = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if asked.returncode != 0:
        return "" if "Invalid job id" in asked.stderr else None
    return asked.stdout.split()[0].lower() if asked.stdout.split() else ""


def analyses_of(styles: Sequence[StyleStatus]) -> dict[str, bool]:
    """Each stamped analysis of these runs, as `<results folder>: <script>`, and whether all that it read, wrote and ran
    is unchanged."""
    folders = [Path(style.folder) for style in styles if style.done]
    found = {}
    for run in dict.fromkeys(f if (f / "prompts.json").is_file() else f.parent for f in folders):
        results = run_store.results_of(run_store.open_run(run))
        for path in sorted(results.glob(".done.*.json")):
            script = path.name.split(".")[2]
            if stamp := read_stamp(results, script):
                found[f"{results}: {script}"] = is_current(stamp, results)
    return found


def progress_of(styles: Sequence[StyleStatus], run_dir: Path) -> dict[str, Any]:
    """The run as a whole; rate (prompts per second) and seconds_left are None if they cannot be known."""
    done, failed, missing, size = (
        sum(getattr(style, name) for style in styles) for name in ("done", "failed", "missing", "bytes")
    )
    written = [item for style in styles for item in style.written]
    rate = rate_of(written, [style.started for style in styles])
    return {
        "done": done,
        "failed": failed,
        "missing": missing,
        "bytes": size,
        "bytes_left": round(size / done * missing) if done else 0,
        "bytes_free": shutil.disk_usage(run_dir).free,
        "rate": rate,
        "seconds_left": missing / rate if rate else None,
        "last_written": max((moment for moment, _ in written), default=None),
    }


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


def status_lines(
    styles: Sequence[StyleStatus], total: dict[str, Any], notes: Sequence[dict[str, Any]]
) -> Iterator[str]:
    """The table of styles, the sums and what to read next. The folder is named if there are several."""
    several = len({Path(style.folder).parent for style in styles}) > 1
    table: list[tuple[str, ...]] = [("style", "done", "failed", "missing", "size")]
    for style in styles:
        name = f"{Path(style.folder).parent.name}/{style.style}" if several else style.style
        table.append((name, str(style.done), str(style.failed), str(style.missing), gigabytes(style.bytes)))
    table.append(("all", *(str(total[key]) for key in ("done", "failed", "missing")), gigabytes(total["bytes"])))
    yield from [*aligned(table), ""]
    for style in styles:
        if counted := style.patched + style.patches_failed + style.patches_missing:
            failed = f", {style.patches_failed} failed" if style.patches_failed else ""
            yield f"patches of {style.style}: {style.patched} of {counted} rows{failed}"
    if total["last_written"] is not None:
        yield f"last file written {duration(time.time() - total['last_written'])} ago"
    if total["rate"]:
        yield f"rate {total['rate'] * 60:,.1f} prompts a minute"
    if total["missing"] and total["rate"]:
        yield f"time left at this rate {duration(total['seconds_left'])}"
    left = f", about {gigabytes(total['bytes_left'])} to come" if total["bytes_left"] else ""
    yield f"disk {gigabytes(total['bytes'])}{left}, {gigabytes(total['bytes_free'])} free"
    for style in styles:
        if style.damaged:
            yield f"damaged .pt files in {style.folder}: stage 2 runs them again"
        if style.failed:
            yield f"why prompts failed: {Path(style.folder) / 'failures.csv'}"
        if style.patches_failed:
            yield f"why patches failed: {Path(style.folder) / 'patches_failures.csv'}"
    yield from note_lines(notes)
    if analyses := total["analyses"]:
        yield f"analyses: {sum(analyses.values())} of {len(analyses)} up to date"
        for name in (name for name, current in analyses.items() if not current):
            yield f"run again, its inputs, outputs or code have changed: {name}"


def note_lines(notes: Sequence[dict[str, Any]]) -> list[str]:
    """One line for each cluster job that has not ended well, with the log to read."""
    form = "job {task} ({script}): {state} since {since:%F %T}; log {log}"
    unwell = [note for note in notes if note["state"] != "done"]
    return [form.format(**note, since=datetime.fromtimestamp(note["time"])) for note in unwell]


def duration(seconds: float) -> str:
    """A time span in seconds, minutes or hours."""
    seconds = max(0, round(seconds))
    if seconds < 120:
        return f"{seconds} s"
    return f"{seconds // 60} min" if seconds < 7200 else f"{seconds // 3600} h {seconds % 3600 // 60} min"


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
    total = progress_of(styles, args.run_dir) | {"analyses": analyses_of(styles)}
    if args.json:
        shown = total | {"styles": [asdict(style) for style in styles], "jobs": notes}
        print(json.dumps(shown, ensure_ascii=False, indent=2))
    else:
        print("\n".join(status_lines(styles, total, notes)))
    unpatched_rows = sum(style.patches_missing + style.patches_failed for style in styles)
    return int(total["missing"] + total["failed"] + unpatched_rows > 0)


if __name__ == "__main__":
    run_main(main)
