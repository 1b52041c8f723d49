"""What would bias a comparison of styles in a prompt file: `check_rows` finds it, `fix_rows` removes what is safe.

Styles of the user's own and `other` are held to less: no_op and duplicates, and the former to changed_numbers too.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from command_line import UserError
from load_json import (
    CLEAN_KEYS,
    RESERVED_KEYS,
    STYLES,
    UnreadLine,
    id_problem,
    is_style_key,
    json_type,
    parse_rows,
    read_text,
    style_problem,
    surrogate_problem,
)
from style_names import dose_of, repaired_style, source_style

from typos.languages import LANGUAGE_KEY, language_problem
from typos.style_rules import verify_repair, verify_variant
from typos.words import osa_distance

KNOWN_STYLES = (*CLEAN_KEYS, *STYLES, "other")
# All other kinds of finding are errors: they bias a comparison.
WARNINGS = {
    *("missing_style", "no_op_unicode", "looks_like_data", "mixed_ids"),
    *("request_changed", "task_split", "control_character"),
}
FEWEST_FOR_LABELS = 8  # rows: fewer may share a text by chance
DEEPEST = 50  # levels of lists and objects; a prompt file needs three
Row = dict[str, Any]
Problem = tuple[str, str, str, str]  # of one row: kind, detail, key, fix
FINDING_COLUMNS = ["style", "original_index", "element_index", "severity", "kind", "detail", "fix"]


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong. `original_index` (from 0) is None for the file as a whole, `fix` empty for none.

    `fix` is `drop row`, `drop variant`, `keep one` or `rename to KEY`.
    """

    kind: str
    detail: str
    original_index: int | None = None
    element_index: Any = None
    style: str = ""
    fix: str = ""

    @property
    def severity(self) -> str:
        return "warning" if self.kind in WARNINGS else "error"


class JsonObject(dict[str, Any]):
    """A JSON object that remembers which keys stood in it more than once, and whether with the same value."""

    repeated: dict[str, bool]

    def __init__(self, pairs: list[tuple[str, Any]]):
        super().__init__(pairs)
        counts = Counter(key for key, _ in pairs)
        self.repeated = {
            key: isinstance(self[key], str | int | float)
            and all((type(value), value) == (type(self[key]), self[key]) for other, value in pairs if other == key)
            for key, count in counts.items()
            if count > 1
        }


def read_rows(prompt_file: str | Path) -> list[Any]:
    """The rows of a prompt file, whatever is wrong inside them. UserError if it is no JSON list at all."""
    path = Path(prompt_file)
    rows = parse_rows(read_text(path, "a prompt file"), path, JsonObject)
    if _is_deeper(rows, DEEPEST):
        raise UserError(f"{path}: nested deeper than {DEEPEST} levels; expected a flat list of objects")
    return rows


def with_language(rows: list[Any], code: str | None) -> list[Any]:
    """The rows, those without a `_language` now with `code`, if one is given. Raises UserError for an unknown one."""
    if code and (reason := language_problem(code)):
        raise UserError(f"--language {reason}")
    for row in rows:
        if code and isinstance(row, dict) and row.get(LANGUAGE_KEY) is None:
            row[LANGUAGE_KEY] = code
    return rows


def _is_deeper(value: list[Any] | dict[str, Any], levels: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value
    deeper = levels == 1 or any(_is_deeper(item, levels - 1) for item in inner if isinstance(item, list | dict))
    return bool(value) and deeper


# --- checks


def check_rows(rows: list[Any], intensity: int = 1, styles: Sequence[str] = ()) -> list[Finding]:
    """Everything that is wrong with the rows of a prompt file, in row order, then the file as a whole.

    `intensity` is the number of edits that the styles were made with. `styles` are those that will be run, which
    every row should have; the file's others are not looked at (default, or `all`: all that any row has).
    """
    wanted = [source_style(style) for style in styles if "all" not in styles]
    wanted += [base for base in map(repaired_style, list(wanted)) if base and base not in wanted]
    meant = _meant_keys(rows)
    rows = [_considered(row, wanted, meant) for row in rows]
    objects = {index: row for index, row in enumerate(rows) if isinstance(row, dict)}
    ids = {index: _id_of(row, index) for index, row in objects.items()}
    data = _data_columns(objects.values(), meant)
    has_clean = any(_clean_key(row) for row in objects.values())
    findings = [] if has_clean else [Finding("no_clean_prompt", "no row has `normal` or `instruction` to compare with")]
    for index, row in enumerate(rows):
        for kind, detail, key, fix in _row_problems(row, meant, data, has_clean, intensity):
            findings.append(Finding(kind, detail, index, ids.get(index), key, "" if kind in WARNINGS else fix))
    findings += _duplicate_rows(objects, ids)
    findings.sort(key=lambda finding: finding.original_index or 0)
    findings += [Finding("bad_key", reason, style=key) for key, reason in _bad_keys(objects.values(), meant).items()]
    findings += [Finding("looks_like_data", reason, style=key) for key, reason in data.items()]
    counts = Counter(key for row in objects.values() for key in row if is_style_key(key) and key not in {*meant, *data})
    for style in wanted or [key for key in counts if key not in CLEAN_KEYS]:
        if lacking := len(objects) - counts[style]:
            findings.append(Finding("missing_style", f"{lacking} of {len(objects)} rows lack it", style=style))
    texts = sum(isinstance(own_id, str) for own_id in ids.values())
    if 0 < texts < len(ids):
        detail = f"{texts} of {len(ids)} ids are texts, the others numbers"
        findings.append(Finding("mixed_ids", detail, style="element_index"))
    return findings


def _considered(row: Any, wanted: Sequence[str], meant: dict[str, str]) -> Any:
    """The row without what is null, and without the styles that are not wanted (none named: all are)."""
    if not isinstance(row, dict):
        return row
    kept = JsonObject([])
    for key, value in row.items():
        chosen = not wanted or not _is_variant(key) or key in wanted or meant.get(key) in (*wanted, *RESERVED_KEYS)
        if chosen and value is not None:
            kept[key] = value
    kept.repeated = {key: same for key, same in getattr(row, "repeated", {}).items() if key in kept}
    return kept


# --- keys


def _bad_keys(objects: Iterable[Row], meant: dict[str, str]) -> dict[str, str]:
    """Style key -> why it can have no folder of its own."""
    keys = dict.fromkeys(key for row in objects for key in row if is_style_key(key))
    found, first = {}, dict[str, str]()
    for key in keys:
        other = first.setdefault(key.casefold(), key)
        if key not in meant and (reason := style_problem(key)):
            found[key] = f"{_shown(key)} cannot name a folder: {reason}; rename it, or begin it with _ if it is data"
        elif key not in meant and other != key:
            found[key] = f"differs from {_shown(other)} in case alone: one folder on macOS and Windows; rename it"
    return found


_DATA_KINDS = {
    "numbers": re.compile(r"[-+−]?[$€£¥]?\d[\d.,:]*\s?[%€$£¥]?|\d{1,4}([-/.])\d{1,2}\1\d{1,4}"),
    "addresses": re.compile(r"(?:https?|ftp|file)://\S+|www\.\S+|\S+@\S+\.\w+"),
    "ids": re.compile(r"(?=\S*\d)(?=\S*[A-Za-z])[\w.:/#-]+"),
}


def _data_columns(objects: Iterable[Row], meant: dict[str, str]) -> dict[str, str]:
    """Key of the user's own -> what its texts seem to be instead of prompts."""
    texts: dict[str, list[str]] = {}
    clean = []
    for row in objects:
        clean += [str(row[key]) for key in [_clean_key(row)] if key]
        for key, value in row.items():
            own = is_style_key(key) and key not in KNOWN_STYLES and key not in meant
            if own and isinstance(value, str | int | float) and not isinstance(value, bool):
                texts.setdefault(key, []).append(str(value).strip())
    kinds = {key: _data_kind(values) for key, values in texts.items()}
    return {
        key: f"holds {kind}, not prompts; begin its name with _ to keep it as data"
        for key, kind in kinds.items()
        if kind and kind != _data_kind(clean)  # prompts may be as short
    }


def _data_kind(values: list[str]) -> str | None:
    for kind, pattern in _DATA_KINDS.items():
        if sum(pattern.fullmatch(value) is not None for value in values) >= 0.9 * len(values):
            return kind
    distinct = set(values)
    few = len(values) >= FEWEST_FOR_LABELS and len(distinct) <= max(2, len(values) // 10)
    return "a few labels" if few and max(len(value.split()) for value in distinct) <= 3 else None


def _meant_keys(rows: list[Any]) -> dict[str, str]:
    """Key -> the key that was meant, for every key that is a slip for a known one or for a far more frequent one."""
    counts = Counter(key for row in rows if isinstance(row, dict) for key in row if not key.startswith("_"))
    known = [*KNOWN_STYLES, *RESERVED_KEYS]
    meant = {}
    for key, count in counts.items():
        frequent = [other for other, number in counts.items() if number >= 20 * count] if len(counts) < 200 else []
        if key not in known and (target := _slip_for(key, [*known, *frequent])):
            meant[key] = target
    return meant


def _slip_for(key: str, targets: list[str]) -> str | None:
    """The target that `key` is a slip for: the same but for marks and case, the same letters, or a few edits away."""

    def rank(target: str) -> int:
        bare, other = (re.sub(r"[\W_]+", "", name).lower() for name in (key, target))
        if bare and bare == other:
            return 1
        if any(character.isdigit() for character in key):
            return 0  # main_2, v3: names, not slips
        distance = osa_distance(bare, other, limit=2)
        if sorted(bare) == sorted(other) and distance <= 2:
            return 2  # tow, homynom
        return 3 if min(len(bare), len(target)) >= 4 and distance <= (1 if len(target) < 8 else 2) else 0

    return min((target for target in targets if rank(target)), key=rank, default=None)


# --- one row


def _row_problems(
    row: Any, meant: dict[str, str], data: dict[str, str], has_clean: bool, intensity: int
) -> Iterator[Problem]:
    """What is wrong with one row: its keys, its values, its variants beside the clean prompt and each other."""
    if isinstance(row, UnreadLine):
        yield "not_json", f"the line is not JSON: {row.reason}", "", "drop row"
        return
    if not isinstance(row, dict):
        yield "wrong_type", f"the row is a JSON {json_type(row)}, not an object", "", "drop row"
        return
    for key, same in getattr(row, "repeated", {}).items():
        detail = f"the key {_shown(key)} is there twice, {'with the same value' if same else 'with two values'}"
        yield "duplicate_key", detail, key, "keep one" if same else _drop(key)
    for key in row:
        if key in meant:
            fix = f"rename to {meant[key]}" if meant[key] not in row else ""
            yield "misspelled_key", f"the key {_shown(key)} is probably {meant[key]!r}", key, fix
    checked = {key: value for key, value in row.items() if key not in meant and key not in data}
    yield from _value_problems(checked)
    if has_clean:
        yield from _variant_problems(checked, intensity)
    first: dict[str, str] = {}
    for style, text in row.items():
        # A dose may draw the very edit of a style with one edit; repairs are often alike.
        free = dose_of(style) is not None or repaired_style(style) is not None or style in data
        variant = _is_variant(style) and _is_prompt(text) and not free
        if variant and (other := first.setdefault(text, style)) != style:
            yield "duplicate_variant", f"equals {_shown(other)}", style, "drop variant"


def _value_problems(row: Row) -> Iterator[Problem]:
    if reason := id_problem(row.get("element_index", 0)):
        yield "wrong_type", f"element_index {reason}", "element_index", ""
    answer = row.get("answer", "")
    finite = not isinstance(answer, float) or math.isfinite(answer)
    if isinstance(answer, list):
        if not answer or not all(isinstance(text, str) and text.strip() for text in answer):
            yield "wrong_type", "answer is a list, but not of texts that are not empty", "answer", ""
    elif isinstance(answer, bool) or not isinstance(answer, str | int | float) or not finite:
        yield "wrong_type", f"answer is a JSON {json_type(answer)}, not a string or a finite number", "answer", ""
    if LANGUAGE_KEY in row and (reason := language_problem(row[LANGUAGE_KEY])):
        yield "wrong_type", f"{LANGUAGE_KEY}: {reason}", LANGUAGE_KEY, ""
    if "task" in row and not isinstance(row["task"], str):
        yield "wrong_type", f"task is a JSON {json_type(row['task'])}, not a string", "task", ""
    for key, value in row.items():
        if not is_style_key(key):
            continue
        if not isinstance(value, str):
            yield "wrong_type", f"the prompt is a JSON {json_type(value)}, not a string", key, _drop(key)
        elif not value.strip():
            yield "empty_prompt", "the prompt is empty", key, _drop(key)
        elif reason := surrogate_problem(value):
            yield "surrogate", reason, key, _drop(key)
        elif control := re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", value):
            yield "control_character", f"U+{ord(control[0]):04X} at character {control.start()}", key, ""


def _variant_problems(row: Row, intensity: int) -> Iterator[Problem]:
    clean_key = _clean_key(row)
    if clean_key is None:
        yield "no_clean_prompt", "no `normal` or `instruction` to compare with", "", "drop row"
        return
    clean, task = row[clean_key], row.get("task")
    if not _is_prompt(clean):
        return
    for key, text in row.items():
        known = key == clean_key or (key in STYLES and row.get("_where") != "subject")
        if isinstance(task, str) and known and isinstance(text, str) and task not in text:
            fix = "" if key == clean_key else "drop variant"
            yield "task_not_in_prompt", "the row's task is not in it word for word", key, fix
    for style, text in row.items():
        if not (_is_variant(style) and _is_prompt(text)):
            continue
        if (base := repaired_style(style)) is None:
            faults = verify_variant(clean, text, style, row, intensity)
        elif _is_prompt(row.get(base)):
            faults = verify_repair(row[base], text, row)
        else:
            faults = [("no_base_style", f"the row has no usable {_shown(base)}, which it would be the repair of")]
        for kind, detail in faults:
            yield kind, detail, style, "drop variant"


def _duplicate_rows(objects: dict[int, Row], ids: dict[int, Any]) -> Iterator[Finding]:
    first_id: dict[str, int] = {}
    first_prompt: dict[str, int] = {}
    for index, row in objects.items():
        if (first := first_id.setdefault(str(ids[index]), index)) != index:  # 5 and "5" are one in a table
            yield Finding("duplicate_id", f"row {first + 1} has this id too", index, ids[index], "element_index")
        key = _clean_key(row)
        if key and _is_prompt(row[key]) and (first := first_prompt.setdefault(row[key], index)) != index:
            fix = "drop row" if {**objects[first], "element_index": 0} == {**row, "element_index": 0} else ""
            yield Finding("duplicate_prompt", f"row {first + 1} has the same clean prompt", index, ids[index], key, fix)


def _drop(key: str) -> str:
    """The fix for a key that has to go: the variant, or the row with its clean prompt, answer …"""
    return "drop variant" if _is_variant(key) else "drop row"


def _clean_key(row: Row) -> str | None:
    return next((key for key in CLEAN_KEYS if key in row), None)


def _id_of(row: Row, index: int) -> Any:
    own_id = row.get("element_index", index + 1)
    return own_id if id_problem(own_id) is None else _shown(own_id)


def _is_variant(key: str) -> bool:
    return is_style_key(key) and key not in CLEAN_KEYS


def _is_prompt(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _shown(value: Any) -> str:
    return repr(value)[:60]


# --- fixes


def fix_rows(rows: list[Any], intensity: int = 1) -> tuple[list[Any], Counter[str]]:
    """(rows without what can be dropped or renamed safely, number of each fix); the given rows are left as they are.

    A renamed key is checked under its new name, so the rounds go on until nothing is left to fix. Rows that had no id
    of their own keep their old position + 1 as `element_index`, so that a dropped row renumbers nobody.
    """
    fixed = [_considered(row, (), {}) for row in rows]
    done = Counter({"rows dropped": 0, "variants dropped": 0, "keys renamed": 0})
    while fixes := [finding for finding in check_rows(fixed, intensity) if finding.fix]:
        dropped = {finding.original_index for finding in fixes if finding.fix == "drop row"}
        fixes = [finding for finding in fixes if finding.original_index not in dropped]
        drops = {(f.original_index, f.style) for f in fixes if f.fix == "drop variant"}
        names = {(f.original_index, f.style): f.fix.removeprefix("rename to ") for f in fixes if "rename to" in f.fix}
        done.update({"rows dropped": len(dropped), "variants dropped": len(drops)})
        kept = []
        for index, row in enumerate(fixed):
            if index in dropped:
                continue
            if isinstance(row, dict):
                new_row: dict[Any, Any] = {}
                for key, value in row.items():
                    new_key = names.get((index, key), key)
                    if (index, key) not in drops:
                        new_key = key if new_key in new_row else new_key  # two slips for one key: the second stays
                        done["keys renamed"] += new_key != key
                        new_row[new_key] = value
                if dropped:
                    new_row.setdefault("element_index", index + 1)
                row = new_row
            kept.append(row)
        fixed = kept
    return fixed, done


# --- report


def findings_table(findings: list[Finding]) -> pd.DataFrame:
    """All findings as a table, in the order in which they were found."""
    lines = [{**asdict(finding), "severity": finding.severity} for finding in findings]
    return pd.DataFrame(lines, columns=FINDING_COLUMNS, dtype=object)


def summary_text(rows: list[Any], findings: list[Finding]) -> str:
    """A table with one line for each kind of finding and style, with its first example."""
    if not findings:
        return f"{len(rows)} rows: no finding"
    groups: dict[tuple[str, str, str], list[Finding]] = {}
    for finding in findings:
        groups.setdefault((finding.severity, finding.kind, finding.style), []).append(finding)
    lines = [f"{'severity':9}{'kind':22}{'key':18}{'n':>7}  first"]
    for (severity, kind, style), found in sorted(groups.items(), key=lambda group: (group[0][0], -len(group[1]))):
        where = "" if found[0].original_index is None else f"row {found[0].original_index + 1}: "
        lines.append(f"{severity:9}{kind:22}{_plain(style):18}{len(found):>7}  {_plain(where + found[0].detail, 110)}")
    errors = sum(finding.severity == "error" for finding in findings)
    return "\n".join([*lines, f"{len(rows)} rows: {errors} errors, {len(findings) - errors} warnings"])


def _plain(text: str, limit: int = 17) -> str:
    """`text` as a terminal can show it, on one line."""
    shown = "".join(c if c.isprintable() else "?" for c in text.encode("utf-8", "replace").decode())
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"
