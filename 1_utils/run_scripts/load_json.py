"""Read prompt files: objects whose text values are prompts, one style a key.

The file is a JSON list of the objects, or JSON Lines: one object a line. What it holds decides, not its name. A value
null means that the row lacks the key. Reserved keys hold no prompt: `element_index`, `answer`, `task` and every key
that starts with `_`. The clean form of a row has the key `normal` (or `instruction`). A bad row or value never
stops a run: `PromptFile.problems` reports it by its row number.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from command_line import UserError, did_you_mean, one_line
from style_names import MEANINGS, REPAIRED, controlled_style, is_again, repaired_style, reserved_name, source_style

CLEAN_KEYS = ("normal", "instruction")
TYPO_STYLES = ("main", "swap", "missing", "repeated", "two", "three", "grammar", "punctuation", "homonym")
STYLES = tuple(MEANINGS)  # what make_variants.py makes
RESERVED_KEYS = frozenset({"element_index", "answer", "task"})
RUN_NAMES = frozenset({"all", "prompts.json", "run.json", "failures.csv"})  # taken in a run folder and its flags
LONGEST_STYLE = 200  # bytes: a folder's name has at most 255
RowId = int | str


class UnreadLine(str):
    """A line of a JSON Lines file that is no JSON, as it is there; `reason` says what is wrong."""

    reason = ""


@dataclass(frozen=True)
class Problem:
    """What is wrong with one row (`style` None: with the row as a whole). `original_index` counts from 0."""

    original_index: int
    style: str | None
    reason: str

    def __str__(self) -> str:
        where = f"row {self.original_index + 1}" + (f", key {self.style!r}" if self.style else "")
        return f"{where}: {self.reason}"


@dataclass
class PromptFile:
    """A prompt file in memory: its rows as they are in the file, and what is wrong with some of them."""

    path: Path
    sha256: str
    content: bytes
    rows: list[Any]
    style_counts: dict[str, int]
    problems: list[Problem] = field(default_factory=list)

    @property
    def clean_key(self) -> str | None:
        """The key of the clean form: `normal`, else `instruction`, else None."""
        return next((key for key in CLEAN_KEYS if key in self.style_counts), None)

    def element_index(self, original_index: int) -> RowId:
        """The row's own id, a whole number or a text; its position + 1 if it names none."""
        own_id: RowId = self.rows[original_index].get("element_index", original_index + 1)
        return own_id

    def prompts(self, style: str, max_samples: int | None = None) -> list[tuple[int, str]]:
        """(original index, text) of every good prompt of `style` among the first `max_samples` rows.

        Rows, not prompts, are counted, so that all styles keep the same rows. Raises UserError for an unknown style.
        """
        if style not in self.style_counts:
            have = ", ".join(f"{key} ({count})" for key, count in self.style_counts.items()) or "none"
            near = did_you_mean(style, self.style_counts)
            raise UserError(f"{self.path}: no row has the key {style!r}{near}; prompt keys there: {have}")
        bad = {(p.original_index, p.style) for p in self.problems}
        chosen = self.rows if max_samples is None else self.rows[:max_samples]
        return [
            (index, row[style])
            for index, row in enumerate(chosen)
            if isinstance(row, dict) and style in row and not {(index, style), (index, None)} & bad
        ]

    def problems_of(self, style: str, max_samples: int | None = None) -> list[Problem]:
        """The problems that cost `style` a prompt, among the first `max_samples` rows."""
        limit = len(self.rows) if max_samples is None else max_samples
        return [p for p in self.problems if p.style in (None, style) and p.original_index < limit]


def is_style_key(key: str) -> bool:
    """True for a key whose text values are prompts."""
    return key not in RESERVED_KEYS and not key.startswith("_")


def style_problem(style: str) -> str | None:
    """Why a key cannot be a style, which has a folder of its name; None if it can."""
    if not style.strip() or style != style.strip():
        return "it is blank or begins or ends with a blank"
    if Path(style).name != style or "\\" in style:
        return "it holds a slash"
    if style.startswith("."):
        return "it begins with a dot"
    if reserved := reserved_name(style):
        return f"{reserved} is kept for what stage 2 makes of a style"
    if style.startswith(REPAIRED) and not is_style_key(repaired_style(style) or "_"):
        return f"{REPAIRED} is to be followed by the name of a style"
    if style.lower() in RUN_NAMES:
        return "the pipeline uses this name itself"
    if not style.isprintable():
        return "it holds a character that cannot be shown"
    return f"it is longer than {LONGEST_STYLE} bytes" if len(style.encode()) > LONGEST_STYLE else None


def surrogate_problem(text: str) -> str | None:
    """Why no tokenizer reads `text`: it holds half of a surrogate pair; None if it holds none."""
    half = any("\ud800" <= character <= "\udfff" for character in text)
    return "holds half of a surrogate pair, which no tokenizer reads" if half else None


def read_text(path: str | Path, what: str) -> str:
    """Text of a UTF-8 file without its byte order mark; `what` names the kind of file in the error, "a prompt file"."""
    return read_content(path, what)[1]


def read_content(path: str | Path, what: str, errors: str = "strict") -> tuple[bytes, str]:
    """(bytes, text) of a UTF-8 file. UserError: no such file, a folder, no permission, or another encoding.

    errors: as in bytes.decode.
    """
    try:
        content = Path(path).read_bytes()
        return content, content.decode("utf-8-sig", errors)
    except FileNotFoundError:
        reason = f"no such file; give the path of {what}"
    except IsADirectoryError:
        reason = f"is a folder; give the path of {what}"
    except PermissionError:
        reason = "no permission to read it; change its rights or give another file"
    except UnicodeDecodeError as error:
        reason = f"not UTF-8 (byte {error.start}); save the file as UTF-8"
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = f"cannot be read: {getattr(error, 'strerror', None) or error}"
    raise UserError(f"{path}: {reason}")


def parse_rows(text: str, path: Path, pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None) -> list[Any]:
    """The rows of a prompt file's text, whatever is wrong inside them; a line that is no JSON is an `UnreadLine`.

    pairs_hook: as in json.loads; without it, values null are left out. Raises UserError for a file without rows.
    """
    if not text.strip():
        raise UserError(f"{path}: the file is empty; expected a JSON list of objects, or one object a line")
    try:
        value = json.loads(text, object_pairs_hook=pairs_hook)
    except RecursionError:
        raise UserError(f"{path}: nested too deeply; expected a flat list of objects") from None
    except json.JSONDecodeError as error:
        value = [] if text.lstrip().startswith("[") else parse_lines(text, pairs_hook)
        if not any(isinstance(row, dict) for row in value):
            raise UserError(f"{path}: not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    except ValueError as error:  # a number of more digits than Python converts
        raise UserError(f"{path}: not usable JSON: {error}") from None
    rows = [value] if isinstance(value, dict) else value
    if not isinstance(rows, list):
        raise UserError(f"{path}: holds a JSON {json_type(rows)}; expected a list of objects, or one object a line")
    if not rows:
        raise UserError(f"{path}: the list is empty; expected at least one object with a prompt")
    return rows if pairs_hook else [without_nulls(row) for row in rows]


def parse_lines(text: str, pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None) -> list[Any]:
    """The value of each line that is not blank; a line that is no JSON is an `UnreadLine`."""
    rows: list[Any] = []
    for line in text.split("\n"):
        if line.strip():
            try:
                rows.append(json.loads(line, object_pairs_hook=pairs_hook))
            except (ValueError, RecursionError) as error:
                rows.append(UnreadLine(line))
                rows[-1].reason = one_line(str(error), 80)
    return rows


def without_nulls(row: Any) -> Any:
    """The row without the keys whose value is null; anything else than an object as it is."""
    if not isinstance(row, dict) or None not in row.values():
        return row
    return {key: value for key, value in row.items() if value is not None}


def id_problem(own_id: Any) -> str | None:
    """Why a value cannot be a row's id; None for a whole number of 64 bits or a text."""
    if isinstance(own_id, int) and not isinstance(own_id, bool):
        return None if abs(own_id) < 2**63 else "is a number of more than 64 bits"
    if isinstance(own_id, str):
        return None if text_problem(own_id) is None else "is a text that is empty or no valid Unicode"
    return f"is a JSON {json_type(own_id)}, not a whole number or a text"


def read_prompt_file(file_path: str | Path) -> PromptFile:
    """Read and check a prompt file. Raises UserError (one line) where the file as a whole cannot be used."""
    path = Path(file_path)
    content, text = read_content(path, "a prompt file")
    rows = parse_rows(text, path)
    counts = _style_counts(rows)
    if not counts:
        raise UserError(f'{path}: no row holds a prompt; expected objects such as {{"normal": "2 + 2 ="}}')
    problems = [problem for index, row in enumerate(rows) for problem in _row_problems(index, row, counts)]
    return PromptFile(path, hashlib.sha256(content).hexdigest(), content, rows, counts, problems)


def chosen_styles(prompts: PromptFile, keys: Sequence[str] | None) -> list[str]:
    """The styles of `--prompt_keys`, the clean form first, controls last; without keys the file's only style.

    Raises UserError if the choice is ambiguous or names a style that the file lacks.
    """
    available = list(prompts.style_counts)
    if keys is None:
        if len(available) > 1:
            have = ", ".join(f"{style} ({count})" for style, count in prompts.style_counts.items())
            raise UserError(f"{prompts.path}: holds several styles: {have}; choose with --prompt_keys, or all")
        return available
    for key in keys:
        if controlled_style(key) and (prompts.clean_key is None or source_style(key) == prompts.clean_key):
            raise UserError(f"--prompt_keys {key}: a control needs a clean form and another style; leave it out")
        if is_again(key) and source_style(key) != prompts.clean_key:
            raise UserError(
                f"--prompt_keys {key}: only the clean form ({prompts.clean_key}) is run again; leave it out"
            )
        if key != "all":
            prompts.prompts(source_style(key), 0)  # raises for a key nobody has
    styles = [style for style in available if style in keys or "all" in keys]
    for style in styles:
        if reason := style_problem(style):
            raise UserError(f"{prompts.path}: the key {style!r} cannot name a folder; rename it ({reason})")
    return styles + [key for style in available for key in dict.fromkeys(keys) if key != style == source_style(key)]


def load_json_prompts(file_path: str | Path, prompt_key: str, max_samples: int | None = None) -> list[tuple[int, str]]:
    """(original index, text) of the prompts under `prompt_key`, among the first `max_samples` rows of the file."""
    return read_prompt_file(file_path).prompts(prompt_key, max_samples)


# ---


def _style_counts(rows: list[Any]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for row in rows:
        if isinstance(row, dict):
            counts.update(key for key, value in row.items() if is_style_key(key) and isinstance(value, str))
    order = [key for key in CLEAN_KEYS if key in counts] + [key for key in counts if key not in CLEAN_KEYS]
    return {key: counts[key] for key in order}


def _row_problems(index: int, row: Any, styles: dict[str, int]) -> list[Problem]:
    if isinstance(row, UnreadLine):
        return [Problem(index, None, f"is not JSON: {row.reason}; correct or remove the line")]
    if not isinstance(row, dict):
        return [Problem(index, None, f'is a JSON {json_type(row)}, not an object; make it {{"normal": …}}')]
    if reason := id_problem(row.get("element_index", index + 1)):
        return [Problem(index, None, f"element_index {reason}; correct or remove it")]
    found = [Problem(index, key, reason) for key in styles if key in row and (reason := text_problem(row[key]))]
    if not any(key in row for key in styles):
        found.append(Problem(index, None, "holds no prompt under any of the file's keys; add one or remove the row"))
    return found


def text_problem(value: Any) -> str | None:
    """Why a value cannot be a prompt, and what to do; None if it can."""
    if not isinstance(value, str):
        return f"is a JSON {json_type(value)}, not a string; quote it or remove it"
    if not value.strip():
        return "is an empty prompt; fill it or remove it"
    reason = surrogate_problem(value)
    return f"{reason}; correct the character" if reason else None


def json_type(value: Any) -> str:
    """What JSON calls a value: null, boolean, number, string, list or object."""
    if value is None:
        return "null"
    names = {bool: "boolean", int: "number", float: "number", str: "string", list: "list", dict: "object"}
    return next(name for kind, name in names.items() if isinstance(value, kind))  # a boolean is an int, too
