"""One stamp says that a step is done: what a script was called with, what it read and wrote, and the code it ran.

`run_main` writes it for every script into the folder that the script's arguments name: `.done.<script>.json`.
run_pipeline.py, cluster_plan.py and run_status.py read it.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FILE_FLAGS = ("--report", "--output_csv")  # name a file in the folder where the stamp goes
FOLDER_FLAGS = ("--output_dir", "--results_dir")  # name that folder itself
INTO_THE_RUN = ("patch_activations",)  # write into their --run_dir
INPUTS = ("run_dir", "prompt_file", "few_shot_file", "maths_items", "edits_csv")
MODELS = ("model_name", "rm_name", "embedding_model")
NO_STEPS = ("run_pipeline", "cluster_plan")  # they run the steps
Files = dict[str, list[int]]  # name → [size, time of change]

_read: dict[Path, Files] = {}
_written: set[Path] = set()


def note_read(path: str | Path) -> None:
    """Note that the script reads this file or folder (or would, if it were there), as it is now."""
    _read.setdefault(Path(os.path.abspath(path)), files_in(Path(path)))


def note_written(path: str | Path) -> None:
    """Note that the script has written this file."""
    _written.add(Path(os.path.abspath(path)))


def begin(arguments: Sequence[str]) -> None:
    """Note the inputs that a script's arguments name, before it runs: one that changes meanwhile is a new input."""
    _read.clear()
    _written.clear()
    flags = by_flag(arguments)
    if place_of(arguments, sys.argv[0]) is not None:
        for path in (path for name in (*INPUTS, *MODELS) for path in flags.get(f"--{name}", [])):
            if os.path.exists(path):
                note_read(path)


def finish(arguments: Sequence[str], exit_code: int) -> None:
    """Write the stamp of the script that has just returned `exit_code`: 0, or 1 if it did all, some with failures."""
    script, folder = Path(sys.argv[0]).resolve(), place_of(arguments, sys.argv[0])
    if folder is None or not folder.is_dir() or script.stem in NO_STEPS or exit_code not in (0, 1):
        return
    loaded = {Path(file) for module in list(sys.modules.values()) if (file := getattr(module, "__file__", None))}
    inside = {path.relative_to(ROOT) for path in loaded if path.is_relative_to(ROOT)}
    code = [os.path.relpath(script, ROOT), *(str(path) for path in inside if path.parts[0][0].isdigit())]
    stamp = {
        "arguments": by_flag(arguments),
        "reads": {os.path.relpath(path, folder): _digest(path, files, _written) for path, files in _read.items()},
        "code": {name: _sha(ROOT / name) for name in code},
        "wrote": {os.path.relpath(path, folder): mark[""] for path in _written if (mark := files_in(path))},
        "exit_code": exit_code,
    }
    path = stamp_path(folder, script)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    with suppress(OSError):  # a full disk: the results are there, and without a stamp the step runs again
        temporary.write_text(json.dumps(stamp), encoding="utf-8")
        temporary.replace(path)


def is_done(script: str | Path, arguments: Sequence[str], exit_codes: Collection[int] = (0,)) -> bool:
    """Whether the script last returned one of `exit_codes` with these arguments, and since then nothing that it read,
    wrote or ran has changed. The order of flags and of a flag's values does not matter."""
    if (folder := place_of(arguments, script)) is None or not (stamp := read_stamp(folder, script)):
        return False
    same = stamp["exit_code"] in exit_codes and stamp["arguments"] == by_flag(arguments)
    return same and is_current(stamp, folder)


def is_current(stamp: dict[str, Any], folder: Path) -> bool:
    """Whether all that the step read, wrote and ran is unchanged."""
    wrote, code = ({Path(os.path.abspath(folder / name)): mark for name, mark in stamp["wrote"].items()}, stamp["code"])
    reads = {Path(os.path.abspath(folder / name)): digest for name, digest in stamp["reads"].items()}
    return (
        all(files_in(path).get("") == mark for path, mark in wrote.items())
        and all(_sha(ROOT / name) == known for name, known in code.items())
        and all(_digest(path, files_in(path), wrote) == digest for path, digest in reads.items())
    )


def read_stamp(folder: Path, script: str | Path) -> dict[str, Any]:
    """The stamp of a script in a folder; empty if there is none or it is damaged."""
    try:
        stamp = json.loads(stamp_path(folder, script).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    keys = {"arguments", "reads", "code", "wrote", "exit_code"}
    return stamp if isinstance(stamp, dict) and stamp.keys() >= keys else {}


def stamp_path(folder: Path, script: str | Path) -> Path:
    """Where the stamp of a script is."""
    return folder / f".done.{Path(script).stem}.json"


def place_of(arguments: Sequence[str], script: str | Path) -> Path | None:
    """The folder that a script's arguments say it writes into; None if they name none."""
    flags = by_flag(arguments)
    files = [Path(name).parent for flag in FILE_FLAGS for name in flags.get(flag, [])]
    folders = (*FOLDER_FLAGS, *(["--run_dir"] if Path(script).stem in INTO_THE_RUN else []))
    return next(iter([*files, *(Path(name) for flag in folders for name in flags.get(flag, []))]), None)


def by_flag(arguments: Sequence[str]) -> dict[str, list[str]]:
    """The values of each flag, sorted; of a flag that is given twice the last ones, as argparse takes them."""
    found: dict[str, list[str]] = {"": []}
    flag = ""
    for word in arguments:
        if word.startswith("--"):
            flag, _, value = word.partition("=")
            found[flag] = [value] if "=" in word else []
        else:
            found[flag] = sorted([*found[flag], word])
    for flag in ("--verbose", "--shard"):  # neither changes what is done in the end
        found.pop(flag, None)
    return found


def files_in(path: Path) -> Files:
    """Size and time of change of each file under a folder, by name, or of one file ("": its own); {} if nothing is
    there. Hidden files (stamps, locks) are left out. So are patches, because few scripts read them and a run may get
    them later: the path `<run>/patches_*` stands for all of a run."""
    found: Files = {}
    folder, pattern, others = (path.parent, path.name, ".") if "*" in path.name else (path, "*", (".", "patches"))
    for file in [path] if path.is_file() else folder.rglob(pattern):
        with suppress(FileNotFoundError):  # removed meanwhile
            if file == path or (not file.name.startswith(others) and file.is_file()):
                status = file.stat()
                found["" if file == path else str(file.relative_to(folder))] = [status.st_size, status.st_mtime_ns]
    return found


def _digest(path: Path, files: Files, own: Collection[Path]) -> str:
    """Hash of files under `path`, without the script's own."""
    foreign = sorted((name, mark) for name, mark in files.items() if not name or path / name not in own)
    return hashlib.sha256(json.dumps(foreign).encode()).hexdigest()[:16]


def _sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.is_file() else ""
