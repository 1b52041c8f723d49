"""Read prompt files: a JSON list of objects whose text values are prompts, one style a key.

Reserved keys hold no prompt: `element_index`, `answer`, `task` and every key that starts with `_`. The clean form
of a row stands under `normal` (or `instruction`). Files come from many hands: a bad row or value never stops a
run, it comes back in `PromptFile.problems`, by its row number, for the caller to count and tell.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from command_line import UserError, did_you_mean

CLEAN_KEYS = ("normal", "instruction")
RESERVED_KEYS = frozenset({"element_index", "answer", "task"})


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
    """A prompt file in memory: its rows as they stand in the file, and what is wrong with some of them."""

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

    def element_index(self, original_index: int) -> int:
        """The row's own id; its position + 1 where it names none."""
        return int(self.rows[original_index].get("element_index", original_index + 1))

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


def read_prompt_file(file_path: str | Path) -> PromptFile:
    """Read and check a prompt file. Raises UserError (one line) where the file as a whole cannot be used."""
    path = Path(file_path)
    content, rows = _read_list(path)
    counts = _style_counts(rows)
    if not counts:
        raise UserError(f'{path}: no row holds a prompt; expected objects such as {{"normal": "2 + 2 ="}}')
    problems = [problem for index, row in enumerate(rows) for problem in _row_problems(index, row, counts)]
    return PromptFile(path, hashlib.sha256(content).hexdigest(), content, rows, counts, problems)


def load_json_prompts(file_path: str | Path, prompt_key: str, max_samples: int | None = None) -> list[tuple[int, str]]:
    """(original index, text) of the prompts under `prompt_key`, among the first `max_samples` rows of the file."""
    return read_prompt_file(file_path).prompts(prompt_key, max_samples)


def styles_of(file_path: str | Path) -> dict[str, int]:
    """Every style of a prompt file with its number of prompts, the clean form first."""
    return read_prompt_file(file_path).style_counts


# ---


def _read_list(path: Path) -> tuple[bytes, list[Any]]:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give the path of a prompt file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if not content.strip():
        raise UserError(f"{path}: the file is empty; expected a JSON list of objects")
    try:
        value = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 (byte {error.start}); save the file as UTF-8") from None
    except RecursionError:
        raise UserError(f"{path}: nested too deeply; expected a flat JSON list of objects") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    except ValueError as error:  # a number of more digits than Python converts
        raise UserError(f"{path}: not usable JSON: {error}") from None
    if not isinstance(value, list):
        raise UserError(f"{path}: holds a JSON {_json_type(value)}; expected a list of objects, one a row")
    if not value:
        raise UserError(f"{path}: the list is empty; expected at least one object with a prompt")
    return content, value


def _style_counts(rows: list[Any]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for row in rows:
        if isinstance(row, dict):
            counts.update(key for key, value in row.items() if is_style_key(key) and isinstance(value, str))
    order = [key for key in CLEAN_KEYS if key in counts] + [key for key in counts if key not in CLEAN_KEYS]
    return {key: counts[key] for key in order}


def _row_problems(index: int, row: Any, styles: dict[str, int]) -> list[Problem]:
    if not isinstance(row, dict):
        return [Problem(index, None, f'is a JSON {_json_type(row)}, not an object; make it {{"normal": …}}')]
    own_id = row.get("element_index", index + 1)
    if isinstance(own_id, bool) or not isinstance(own_id, int) or abs(own_id) >= 2**63:
        return [
            Problem(
                index,
                None,
                f"element_index is {_json_type(own_id)}, not a whole number; correct or remove it",
            )
        ]
    found = [Problem(index, key, reason) for key in styles if key in row and (reason := _text_problem(row[key]))]
    if not any(key in row for key in styles):
        found.append(Problem(index, None, "holds no prompt under any of the file's keys; add one or remove the row"))
    return found


def _text_problem(value: Any) -> str | None:
    if not isinstance(value, str):
        return f"is a JSON {_json_type(value)}, not a string; quote it or remove it"
    if not value.strip():
        return "is an empty prompt; fill it or remove it"
    if any("\ud800" <= character <= "\udfff" for character in value):
        return "holds half of a surrogate pair, which no tokenizer reads; correct the character"
    return None


def _json_type(value: Any) -> str:
    if value is None:
        return "null"
    names = {bool: "boolean", int: "number", float: "number", str: "string", list: "list", dict: "object"}
    return names[type(value)]
