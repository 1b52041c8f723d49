"""The files of a run, in one place: folders, run.json, activations_*.pt, failures.csv.

    outputs/<run>/prompts.json                           exact copy of the prompt file
    outputs/<run>/<style>/run.json                       what made the files beside it
    outputs/<run>/<style>/activations_00000_00064.pt     rows 0 to 63 of the style, in the prompt file's order
    outputs/<run>/<style>/failures.csv                   prompts that could not be run, with the reason

A run of a single style has prompts.json, run.json and the .pt files in one folder. A .pt file is read with
`weights_only=True` and nothing else, so no file can run code. Readers hold one file at a time (memory-mapped).
"""

from __future__ import annotations

import csv
import fcntl
import hashlib
import json
import pickle
import re
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from command_line import UserError, did_you_mean, one_line
from file_output import atomic_path, make_folder, read_csv, remove_leftovers, write_json
from load_json import CLEAN_KEYS, RowId, parse_rows, read_prompt_file, read_text
from logger import get_logger
from pt_fields import AXES, RUN_AXES, axis_sizes
from style_names import source_style

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from style_rows import StyleRows

PT_NAME = re.compile(r"activations_(\d+)_(\d+)\.pt")
# May change while a run grows: `planned_ends` decides, and of responses from elsewhere those that are there.
GROWING = frozenset({"max_samples", "prompt_sha256", "responses_sha256"})
TEXT_SETTINGS = ("model_name", "revision", "prompt_sha256", "few_shot_text", "chat_template_text", "system_prompt")
FAILURE_COLUMNS = ("style", "original_index", "element_index", "reason")


# --- reading a run


@dataclass(frozen=True)
class Run:
    """A run on disk. `styles` maps each style to the folder of its .pt files, the clean form first.

    run = open_run("outputs/demo/facts")
    table = run.rows("swap")                  # prompt, clean_prompt, response, clean_response …
    mass = run.field("span_mass", "swap")     # [rows, layers, heads, query regions, key regions]
    axes = run.axes("span_mass", "swap")
    last, edited = axes["query region"].index("last"), axes["key region"].index("edited")
    print(mass[:, :, :, last, edited].mean(axis=(0, 2)))  # attention of the last token to the typo, by layer
    print(run.frame("head_sensitivity").head())
    """

    path: Path
    name: str
    styles: dict[str, Path]
    only_file: Path | None = None
    _sizes: dict[str, tuple[int, Path]] = field(default_factory=dict, compare=False, repr=False)
    _style_rows: dict[str, StyleRows] = field(default_factory=dict, compare=False, repr=False)

    def chosen(self, styles: Sequence[str] | None = None) -> list[str]:
        """The clean form and the styles asked for (default: all), in the run's order. UserError for one it lacks."""
        for style in styles or ():
            if style not in self.styles:
                near = did_you_mean(style, self.styles)
                raise UserError(f"{self.path}: has no style {style!r}; it has {', '.join(self.styles)}{near}")
        return [name for name in self.styles if not styles or name in styles or name == self.clean_style]

    @property
    def clean_style(self) -> str | None:
        """`normal`, else `instruction`, else None where the run has no clean form."""
        return next((key for key in CLEAN_KEYS if key in self.styles), None)

    @cached_property
    def prompt_rows(self) -> list[Any]:
        """The rows of the prompt file, by original index; empty if the run keeps no copy (reference format)."""
        for folder in (self.path, self.path.parent):
            if (copy := folder / "prompts.json").is_file():
                return parse_rows(read_text(copy, "the run's copy of its prompt file"), copy)
        return []

    def row(self, original_index: int) -> dict[str, Any]:
        """Row `original_index` of the prompt file; an empty dict where it is not known."""
        if 0 <= original_index < len(self.prompt_rows) and isinstance(self.prompt_rows[original_index], dict):
            return self.prompt_rows[original_index]
        return {}

    def template(self, original_index: int) -> str:
        """Cluster of a row for clustered errors: its `_template`; if that is not there or null, the row itself."""
        template = self.row(original_index).get("_template")
        return f"row {original_index}" if template is None else str(template)

    def settings(self, style: str) -> dict[str, Any]:
        """run.json of a style; empty for reference-format folders."""
        path = self.styles[style] / "run.json"
        return read_json_file(path) if path.is_file() else {}

    def files(self, style: str) -> list[Path]:
        """The .pt files of a style in row order."""
        return [self.only_file] if self.only_file else pt_files(self.styles[style])

    def batches(self, style: str) -> Iterator[tuple[Path, dict[str, Any]]]:
        """(path, content) of each .pt file of a style, one in memory at a time."""
        for path in self.files(style):
            yield path, self.load(path)

    def load(self, path: Path) -> dict[str, Any]:
        """`load_pt`, with its model's sizes checked against those of the files read before: one run, one model."""
        content = _read_pt(path)
        for axis, (size, _) in axis_sizes(content, path).items():
            known, first = self._sizes.setdefault(axis, (size, path)) if axis in RUN_AXES else (size, path)
            if size != known:
                raise UserError(
                    f"{path}: {size} {AXES[axis][1]}, but {known} in {first.parent.name}/{first.name}; all files of "
                    "a run must be of one model and captured alike: run stage 2 again into a new folder"
                )
        return content

    # --- in a notebook

    def rows(self, style: str) -> pd.DataFrame:
        """One line per row of a style, in the order of `field`, beside its clean form.

        Columns: original_index, element_index, prompt, clean_prompt, response, clean_response (missing if unknown),
        identical (the prompt equals the clean prompt), cluster (for clustered standard errors). Of several samples the
        first. Raises UserError for a style that the run lacks.
        """
        return self.style_rows(style).table(self.style_rows(self.clean_style) if self.clean_style else None)

    def field(self, key: str, style: str, region: str | None = None, layers: slice | int = slice(None)) -> np.ndarray:
        """A field of the .pt files for all rows of a style: one array [n, ...], line by line as in `rows`.

        `axes` names its axes. 16-bit floats come as float32. region, layers: only these (see StyleRows.field); a raw
        field (hidden_states, attentions) needs one layer. Raises UserError if the run lacks what is asked for.
        """
        return self.style_rows(style).field(key, None, region, layers)

    def axes(self, key: str, style: str) -> dict[str, list[Any]]:
        """{name of an axis: what its places are} of `field(key, style)`, in the order of its axes.

        span_mass: row (original indices), layer, head, query region, key region (names).
        """
        return self.style_rows(style).axes(key)

    def frame(self, name: str, results_dir: str | Path | None = None) -> pd.DataFrame:
        """A table of stages 3 to 5, as `head_sensitivity` for head_sensitivity.csv.

        results_dir: where it is, if not in the folder of `results` that the run has in `outputs`. Raises UserError if
        there is no such table.
        """
        folder = results_of(self) if results_dir is None else Path(results_dir)
        known = [path.stem for path in sorted(folder.glob("*.csv"))]
        near = did_you_mean(name, known) or (f"; it has {', '.join(known)}" if known else "")
        return read_csv(folder / f"{name.removesuffix('.csv')}.csv", hint=f"run its stage, or give results_dir{near}")

    def style_rows(self, style: str) -> StyleRows:
        """The rows of a style by original index; its files stay open."""
        from style_rows import StyleRows

        if style not in self._style_rows:
            self._style_rows[style] = StyleRows(self, style)
        return self._style_rows[style]


def open_run(path: str | Path) -> Run:
    """Open a run folder, a single style's folder, or one .pt file. Raises UserError where there is none."""
    path = Path(path)
    if path.is_file():
        return Run(path.parent, path.parent.name, {_style_of(path.parent): path.parent}, only_file=path)
    if not path.is_dir():
        raise UserError(f"{path}: no such run folder{near_folder(path)}; give the --output_dir of stage 2")
    given, path = path, path.resolve()
    if pt_files(path) or (path / "run.json").is_file():
        return Run(path, path.name, {_style_of(path): path})
    folders = [child for child in sorted(path.iterdir()) if child.is_dir() and not child.name.startswith(".")]
    found = {_style_of(child): child for child in folders if pt_files(child)}
    if not found:
        deeper = {
            file.parent.parent for levels in ("*/*", "*/*/*") for file in given.glob(f"{levels}/activations_*.pt")
        }
        if deeper:
            raise UserError(f"{given}: is no run but a folder of runs; give {' or '.join(map(str, sorted(deeper)))}")
        raise UserError(f"{given}: holds no activations_*.pt, nor do its folders; run stage 2 with this --output_dir")
    return Run(path, path.name, {style: found[style] for style in sort_styles(found, path)})


def near_folder(path: Path) -> str:
    """`; did you mean <a folder beside it>?` for a folder that is not there, where one has nearly this name."""
    beside = [str(folder) for folder in path.parent.iterdir() if folder.is_dir()] if path.parent.is_dir() else []
    return did_you_mean(str(path), beside)


def results_of(run: Run) -> Path:
    """Where the results of a run are: in `results` beside its `outputs` (as the pipeline has it), or results/<run>."""
    parts = run.path.parts
    if "outputs" in parts:
        at = len(parts) - 1 - parts[::-1].index("outputs")
        if (twin := Path(*parts[:at], "results", *parts[at + 1 :])).is_dir():
            return twin
    return Path("results") / run.name


def outdated(run: Run, results: Path) -> str:
    """Which tables were written before the newest .pt file of the run: "3 of 12 tables (a.csv, …)"; "" if none was."""
    newest = max((path.stat().st_mtime for style in run.styles for path in run.files(style)), default=0.0)
    tables = [path for path in sorted(results.glob("*.csv")) if path.name != "prompt_findings.csv"]
    old = [path.name for path in tables if path.stat().st_mtime < newest]
    more = ", …" if len(old) > 3 else ""
    return f"{len(old)} of {len(tables)} tables ({', '.join(old[:3])}{more})" if old else ""


def sort_styles(styles: Iterable[str], run_path: Path) -> list[str]:
    """Clean form first, then the order of the prompt file where known, then by name."""
    order = {key: position - len(CLEAN_KEYS) for position, key in enumerate(CLEAN_KEYS)}
    copy = run_path / "prompts.json"
    if copy.is_file():
        for row in parse_rows(read_text(copy, "the run's copy of its prompt file"), copy):
            for key in row if isinstance(row, dict) else ():
                order.setdefault(key, len(order))
    names = {style: source_style(style) for style in styles}  # a control follows its style
    place = {style: order.get(name, len(order)) for style, name in names.items()}
    return sorted(names, key=lambda style: (place[style], names[style], style != names[style], style))


def pt_files(folder: Path) -> list[Path]:
    """The activations_*.pt of a folder in row order."""
    found = [(match, child) for child in folder.iterdir() if (match := PT_NAME.fullmatch(child.name))]
    return [child for _, child in sorted(found, key=lambda item: tuple(map(int, item[0].groups())))]


def load_pt(path: str | Path, mmap: bool = True) -> dict[str, Any]:
    """Content of a .pt file, tensors memory-mapped.

    UserError for a truncated file, one with code in it, or one whose fields disagree.
    """
    content = _read_pt(path, mmap)
    axis_sizes(content, Path(path))
    return content


def _read_pt(path: str | Path, mmap: bool = True) -> dict[str, Any]:
    torch = _torch()
    path = Path(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and zipfile.is_zipfile(path))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give an activations_*.pt of stage 2") from None
    except pickle.UnpicklingError as error:
        if "Unsupported" in str(error) or "GLOBAL" in str(error):
            raise UserError(f"{path}: refused, for it holds more than tensors and text (nothing was run)") from None
        raise UserError(f"{path}: not a readable .pt file; delete it and run stage 2 again") from None
    except (RuntimeError, EOFError, ValueError, OSError, zipfile.BadZipFile) as error:
        why = one_line(str(error), 100)
        raise UserError(f"{path}: truncated or damaged ({why}); delete it and run stage 2 again") from None
    if not isinstance(content, dict) or not ({"original_indices", "final_predictions"} & content.keys()):
        raise UserError(f"{path}: not a file of stage 2: it has no original_indices; see the README's data format")
    if "original_indices" not in content and isinstance(content["final_predictions"], list):
        match = PT_NAME.fullmatch(path.name)  # the reference format numbers its rows by the file's name alone
        start = int(match.group(1)) if match else 0
        content["original_indices"] = list(range(start, start + len(content["final_predictions"])))
    elif isinstance(content.get("original_indices"), torch.Tensor):
        content["original_indices"] = content["original_indices"].tolist()
    return content


def _torch() -> Any:
    import torch  # takes seconds, which --help does without

    return torch


def read_json_file(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a run. Raises UserError where it is damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: cannot be read ({one_line(str(error), 100)}); delete it and run stage 2 again"
        ) from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: is no JSON object; delete it and run stage 2 again")
    return value


def row_indices(run: Run, style: str) -> Iterator[int]:
    """Positions in the prompt file of a style's rows, one .pt file in memory at a time."""
    for _, content in run.batches(style):
        yield from content["original_indices"]


def planned_prompts(folder: Path, style: str, max_samples: int | None = None) -> int | None:
    """Prompts that stage 2 was asked to run into a style's folder, of the first `max_samples` rows of the prompt file.

    None if that is not known: a folder in the reference format, or a control of which only the first rows are wanted.
    """
    path = folder / "run.json"
    known = read_json_file(path) if path.is_file() else {}
    if max_samples is None and "planned_prompts" in known:
        return int(known["planned_prompts"])
    copy = next((found for place in (folder, folder.parent) if (found := place / "prompts.json").is_file()), None)
    if copy is None or not known or style not in (prompts := read_prompt_file(copy)).style_counts:
        return None
    limits = [limit for limit in (max_samples, known.get("settings", {}).get("max_samples")) if limit is not None]
    return len(prompts.prompts(style, min(limits, default=None)))


def unfinished(run: Run, styles: Sequence[str] | None = None, max_samples: int | None = None) -> str:
    """Which styles of a run lack prompts: "4 of 160 prompts of normal, swap"; "" if none does.

    styles, max_samples: as given to an analysis; the clean form and the controls of these styles count, too.
    """
    if run.only_file:
        return ""
    begun = {_style_of(path.parent): path.parent for path in sorted(run.path.glob("*/run.json"))}
    found: dict[tuple[int, int], list[str]] = {}
    for style, folder in {**run.styles, **begun}.items():
        if styles is not None and not {style, source_style(style)} & {*styles, run.clean_style}:
            continue
        planned = planned_prompts(folder, style, max_samples)
        there = set(row_indices(run, style)) if style in run.styles else set()
        count = sum(max_samples is None or index < max_samples for index in there)
        if planned is not None and count < planned:
            found.setdefault((count, planned), []).append(style)
    return "; ".join(f"{count} of {most} prompts of {', '.join(names)}" for (count, most), names in found.items())


def warn_unfinished(run: Run, styles: Sequence[str] | None = None, max_samples: int | None = None) -> str:
    """One warning if stage 2 has not run all prompts that an analysis reads; returns what `unfinished` says."""
    if missing := unfinished(run, styles, max_samples):
        get_logger().warning(
            f"{run.path}: this run holds only {missing}; the results are of these. The same command of stage 2 runs "
            "the rest; failures.csv there names prompts that failed"
        )
    return missing


def _style_of(folder: Path) -> str:
    settings = folder / "run.json"
    if settings.is_file():
        return str(read_json_file(settings).get("settings", {}).get("style", folder.name))
    return folder.name


# --- writing a run


def planned_ends(folder: Path, rows: Sequence[Any], wanted: int) -> list[int]:
    """How many of the prompt file's rows a style's run covered each time it was begun or grew, `wanted` the last.

    A run never shrinks: where it has more rows than `wanted`, these are the last. Raises UserError where the rows that
    it has are not the first ones of `rows`.
    """
    path = folder / "run.json"
    known = read_json_file(path) if path.is_file() else {}
    ends = list(known.get("row_ends", []))
    if ends and rows_digest(rows[: ends[-1]]) != known.get("rows_sha256"):
        raise UserError(
            f"{folder}: holds a run of other prompts (its {ends[-1]} rows are not the first of this prompt file); "
            "add rows at the end only, choose another --output_dir, or --overwrite"
        )
    return ends if ends and wanted <= ends[-1] else [*ends, wanted]


def rows_digest(rows: Sequence[Any]) -> str:
    """Hash of rows of a prompt file."""
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def begin_run(
    folder: Path,
    settings: dict[str, Any],
    environment: dict[str, Any] | None,
    overwrite: bool = False,
    ends: Sequence[int] = (),
    rows: Sequence[Any] = (),
    planned: int | None = None,
) -> None:
    """Write run.json, or check that the one there has the same settings. Raises UserError naming the difference.

    `settings` decide the numbers and must agree, those of GROWING apart; `environment` (versions, device) is recorded,
    a new one is appended (None: only check). `ends` is what `planned_ends` returned for the prompt file's `rows`;
    `planned`: how many of the style's prompts can be run.
    """
    path = folder / "run.json"
    settings = json.loads(json.dumps(settings))  # as they will be read back
    record = {"settings": settings, "row_ends": [*ends], "rows_sha256": rows_digest(rows[: ends[-1]]) if ends else None}
    count = {} if planned is None else {"planned_prompts": planned}
    with locked(folder):
        for name in ("run.json", "failures.csv", "prompts.json"):
            remove_leftovers(folder / name)
        if overwrite:
            keep_responses(folder, settings)
            clear_run(folder)
        if not path.is_file():
            if pt_files(folder):
                raise UserError(
                    f"{folder}: holds .pt files of an unknown run; choose another --output_dir or --overwrite"
                )
            write_json(path, {**record, **count, "environments": [environment] if environment else []})
            return
        known = read_json_file(path)
        if found := differences(known.get("settings", {}), settings):
            raise UserError(
                f"{folder}: holds a run with other settings ({'; '.join(found)}); "
                "use these settings, another --output_dir, or --overwrite"
            )
        before = known.get("row_ends", [])
        if before[: len(ends)] != [*ends][: len(before)]:
            raise UserError(f"{folder}: another process has made this run larger meanwhile; give the command again")
        new = {**known, **(record if len(ends) > len(before) else {}), **count}
        if environment and environment not in known.get("environments", []):
            new["environments"] = [*known.get("environments", []), environment]
        if new != known and environment is not None:
            write_json(path, new)


def clear_run(folder: Path) -> None:
    """Remove what an earlier run wrote into `folder`, apart from a server's responses, and nothing else."""
    for path in [*pt_files(folder), *(folder / name for name in ("run.json", "failures.csv"))]:
        path.unlink(missing_ok=True)


def keep_responses(folder: Path, settings: dict[str, Any]) -> None:
    """Rename the responses of a server, which may have been paid for, if they are not those that `settings` ask for."""
    path = folder / "responses.jsonl"
    known: dict[str, Any] = {}
    with suppress(UserError):  # there is no run.json, or it is damaged
        known = read_json_file(folder / "run.json").get("settings", {})
    if not path.is_file() or text_settings(known) == text_settings(settings):
        return
    names = (folder / f"responses_before_{number}.jsonl" for number in count(1))
    kept = next(name for name in names if not name.exists())
    path.rename(kept)
    get_logger().warning(f"{path} was made with other settings; it is {kept.name} now")


def text_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Those of run.json's settings that decide what a server answers."""
    generation = {key: one for key, one in settings.get("generation", {}).items() if not key.endswith("_logprobs")}
    return {key: settings.get(key) for key in TEXT_SETTINGS} | {"generation": generation}


def save_pt(path: Path, content: dict[str, Any]) -> None:
    """Write a .pt file whole or not at all."""
    with atomic_path(path) as temporary:
        try:
            _torch().save(content, temporary)
        except RuntimeError as error:  # torch reports a full disk as a RuntimeError of its zip writer
            raise OSError(0, one_line(str(error), 120)) from error


def record_failures(
    folder: Path, style: str, tried: Iterable[int], failed: dict[int, tuple[RowId, str]], name: str = "failures.csv"
) -> int:
    """Bring a list of failures up to date for the rows `tried`; `failed`: original index → (element_index, reason).

    Rows that were not tried keep their line; the file goes when none is left. Returns the number of lines now there.
    """
    path = folder / name
    with locked(folder):
        lines = {index: line for index, line in read_failures(folder, name).items() if index not in set(tried)}
        lines |= {index: (style, index, element, one_line(reason)) for index, (element, reason) in failed.items()}
        if not lines:
            path.unlink(missing_ok=True)
        else:
            with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as handle:
                csv.writer(handle).writerows([FAILURE_COLUMNS, *(lines[index] for index in sorted(lines))])
    return len(lines)


def read_failures(folder: Path, name: str = "failures.csv") -> dict[int, tuple[Any, ...]]:
    """Lines of failures.csv by original index; empty where there is no such file."""
    path = folder / name
    if not path.is_file():
        return {}
    with open(path, newline="", encoding="utf-8") as handle:
        lines = [line for line in csv.reader(handle) if len(line) == len(FAILURE_COLUMNS)]
        return {int(line[1]): tuple(line) for line in lines if line[1].isdigit()}


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock: several processes (shards) may write run.json and failures.csv of one style."""
    try:
        make_folder(folder)
        handle = open(folder / ".lock", "w")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise UserError(f"cannot write in {folder}: {error.strerror}; choose another --output_dir") from None
    with handle:
        with suppress(OSError):  # a file system without locks (some Lustre mounts): go on without
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def fingerprint(paths: Iterable[Path]) -> str:
    """Short hash over names and sizes of files, and over the content of the small ones."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        if path.stat().st_size < 1 << 20:
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def differences(known: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """`generation.seed: 0 there, 1 now` of each setting that is not the same, those of GROWING apart."""
    left, right = _flat(known), _flat(wanted)
    keys = sorted(key for key in left.keys() | right.keys() if left.get(key) != right.get(key) and key not in GROWING)
    return [f"{key}: {' there, '.join(_unlike(str(left.get(key)), str(right.get(key))))} now" for key in keys]


def _flat(settings: dict[str, Any], before: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{before}{key}.") if isinstance(value, dict) else {before + key: value}
    return flat


def _unlike(left: str, right: str) -> tuple[str, str]:
    """The two texts on one line each, long ones from shortly before the place where they differ."""
    if max(len(left), len(right)) > 80:
        pairs = enumerate(zip(left, right, strict=False))
        start = max(0, next((i for i, (a, b) in pairs if a != b), min(len(left), len(right))) - 20)
        left, right = (("…" if start else "") + text[start:] for text in (left, right))
    return one_line(left, 80), one_line(right, 80)
