"""Responses that were made elsewhere (vLLM, an API, lm-evaluation-harness), read from files and put beside the prompts.

A file is JSON Lines, a JSON list or a CSV. A row has the `response`, the row of the prompt file as `original_index`
(from 0) or `element_index`, and may have `style`, `sample`, `finish_reason` and the `prompt`. Rows with `doc_id` and
`resps` are those that lm-evaluation-harness writes with --log_samples. A row that cannot be used is counted and named,
never fatal. docs/DATA_FORMAT.md describes the formats.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from command_line import UserError, did_you_mean, one_line
from load_json import (
    PromptFile,
    UnreadLine,
    json_type,
    parse_lines,
    read_content,
    read_prompt_file,
    surrogate_problem,
    without_nulls,
)
from logger import get_logger
from run_store import Run, open_run
from stamps import note_read
from style_names import controlled_style, source_style

# What a file may say of why a response ended; anything else is `given`.
REASONS = {"length": "length", "stop": "stop", "eos": "eos", "eos_token": "eos"}
WHOLE = re.compile(r"-?\d{1,18}(\.0)?")
KINDS = ("malformed", "of unknown rows", "double")
SHOWN_ROWS = 5
log = get_logger()


@dataclass(frozen=True)
class GivenResponse:
    """One response. `finish_reason`: length, stop or eos if the file says so, else given."""

    text: str
    finish_reason: str = "given"


@dataclass(frozen=True)
class RowProblem:
    """Why a row of a file is not used. `kind`: one of KINDS."""

    kind: str
    where: str
    reason: str


class _BadRow(Exception):
    def __init__(self, kind: str, reason: str, place: tuple[str, int] | None = None) -> None:
        super().__init__(reason)
        self.kind, self.reason, self.place = kind, reason, place


@dataclass
class GivenResponses:
    """The responses of files: `texts[style][original_index][sample]`. `rows`: of the files; `repeated`: those that
    lm-evaluation-harness wrote once more for another filter."""

    source: str
    sha256: str
    texts: dict[str, dict[int, dict[int, GivenResponse]]] = field(default_factory=dict)
    problems: list[RowProblem] = field(default_factory=list)
    rows: int = 0
    repeated: int = 0
    _why: dict[tuple[str, int], str] = field(default_factory=dict)

    @property
    def has_samples(self) -> bool:
        """Whether a prompt has several responses."""
        return any(len(samples) > 1 for rows in self.texts.values() for samples in rows.values())

    def of(self, style: str, index: int) -> list[GivenResponse]:
        """The responses to one prompt, by sample; [] if there is none."""
        samples = self.texts.get(style, {}).get(index, {})
        return [samples[number] for number in sorted(samples)]

    def add(self, style: str, index: int, sample: int, response: GivenResponse) -> bool:
        """Add a response; False if that sample is there already."""
        samples = self.texts.setdefault(style, {}).setdefault(index, {})
        return samples.setdefault(sample, response) is response

    def why_missing(self, style: str, index: int) -> str:
        """Why a prompt has no response."""
        return self._why.get((style, index), f"no response in {self.source}")

    def refuse(self, problem: RowProblem, place: tuple[str, int] | None = None) -> None:
        """Keep why a row is not used; `place`: the style and original index that it is of, if known."""
        self.problems.append(problem)
        if place is not None:
            self._why.setdefault(place, f"{self.source} {problem.where}: {problem.reason}")

    def report(self) -> None:
        """Warn in one line which rows are not used; details with --verbose."""
        if not self.problems:
            return
        counts = Counter(one.kind for one in self.problems)
        first = {kind: next(one for one in self.problems if one.kind == kind) for kind in KINDS if counts[kind]}
        kinds = [f"{counts[kind]} {kind} ({one.where}: {one.reason})" for kind, one in first.items()]
        log.warning(f"{self.source}: {len(self.problems)} of {self.rows} rows are not used: {', '.join(kinds)}")
        for one in self.problems:
            log.debug(f"{one.where}: {one.reason}")


def missing_text(missing: dict[str, list[int]], source: str) -> str:
    """`no response in F for 3 prompts of swap (rows 4, 9, 12)` of the rows without one, by style."""
    parts = []
    for style, indices in missing.items():
        if indices:
            rows = ", ".join(str(index + 1) for index in indices[:SHOWN_ROWS])
            more = ", …" if len(indices) > SHOWN_ROWS else ""
            parts.append(f"{len(indices)} prompts of {style} (rows {rows}{more})")
    return f"{source}: no response for {', '.join(parts)}" if parts else ""


# --- reading


def read_responses(files: Sequence[str], prompts: PromptFile, only_style: str | None = None) -> GivenResponses:
    """The responses of files to the prompts of a prompt file; what is not used is in `problems`.

    files: paths; `swap=FILE` says that rows without a style are of `swap`, else they are of `only_style`. Raises
    UserError for a file that cannot be read or holds no row with a response.
    """
    named = [_named_file(name, only_style) for name in files]
    contents = [read_content(path, "a file of responses", "surrogateescape") for _, path in named]
    digest = hashlib.sha256(b"".join(hashlib.sha256(content).digest() for content, _ in contents))
    found = GivenResponses(" ".join(path.name for _, path in named), digest.hexdigest())
    reader = _RowReader(prompts)
    for (style, path), (_, text) in zip(named, contents, strict=True):
        note_read(path)
        for number, row in enumerate(_rows_of(path, text), 1):
            where = f"{path.name} row {number}" if len(named) > 1 else f"row {number}"
            found.rows += 1
            try:
                if not isinstance(row, dict):
                    raise _BadRow("malformed", _not_a_row(row))
                if reader.is_repeated(path, row):
                    found.repeated += 1
                    continue
                own, index, responses = reader.read(without_nulls(row), style)
                doubles = [sample for sample, one in responses.items() if not found.add(own, index, sample, one)]
                if doubles:
                    raise _BadRow("double", f"row {index + 1} of {own} has a response already; the first is used")
            except _BadRow as bad:
                found.refuse(RowProblem(bad.kind, where, one_line(bad.reason, 200)), bad.place)
    if not found.texts:
        first = f" ({found.problems[0].where}: {found.problems[0].reason})" if found.problems else ""
        raise UserError(f"{found.source}: none of its {found.rows} rows has a response to a prompt here{first}")
    return found


def _named_file(name: str, only_style: str | None) -> tuple[str | None, Path]:
    style, sign, path = name.partition("=")
    return (style, Path(path)) if sign and not Path(name).exists() else (only_style, Path(name))


def _rows_of(path: Path, text: str) -> Iterator[Any]:
    """The rows of a file, whatever they hold. Raises UserError if the file as a whole holds none."""
    start = text.lstrip()[:1]
    if start not in ("{", "["):
        header = next(csv.reader(io.StringIO(text, newline="")), [])
        if "response" in header:
            yield from _csv_rows(text)
            return
    try:
        rows = json.loads(text) if start == "[" else None
    except (ValueError, RecursionError):
        rows = None
    rows = rows if isinstance(rows, list) else parse_lines(text)
    if not any(isinstance(row, dict) for row in rows):
        kinds = "JSON Lines, a JSON list or a CSV with a column `response`"
        raise UserError(f"{path}: holds no rows; give {kinds}")
    yield from rows


def _csv_rows(text: str) -> Iterator[Any]:
    csv.field_size_limit(sys.maxsize)
    lines = csv.DictReader(io.StringIO(text, newline=""))
    while True:
        try:
            row: Any = next(lines, None)
        except csv.Error as error:
            row = UnreadLine("")
            row.reason = str(error)
        if row is None:
            return
        if isinstance(row, dict) and None in row:
            row = UnreadLine("")
            row.reason = "it has more cells than the header"
        # An empty id or style is none; an empty response is a response.
        yield {k: v for k, v in row.items() if v or k == "response"} if isinstance(row, dict) else row


def _not_a_row(row: Any) -> str:
    return f"cannot be read: {row.reason}" if isinstance(row, UnreadLine) else f"is a JSON {json_type(row)}, no object"


class _RowReader:
    """Reads one row at a time: which prompt it answers, and its responses."""

    def __init__(self, prompts: PromptFile) -> None:
        self.prompts = prompts
        self._filters: dict[Path, Any] = {}
        self._good: dict[str, dict[int, str]] = {}
        self._by_id: dict[str, list[int]] = {}
        for index, row in enumerate(prompts.rows):
            if isinstance(row, dict):
                self._by_id.setdefault(str(prompts.element_index(index)), []).append(index)

    def is_repeated(self, path: Path, row: dict[str, Any]) -> bool:
        """Whether lm-evaluation-harness has written this row for another filter of the same responses."""
        if "doc_id" not in row or not isinstance(row.get("filter"), str):
            return False
        return bool(self._filters.setdefault(path, row["filter"]) != row["filter"])

    def read(self, row: dict[str, Any], style: str | None) -> tuple[str, int, dict[int, GivenResponse]]:
        """(style, original index, responses by sample) of a row. Raises _BadRow."""
        # 1. Which prompt?
        harness = "resps" in row and "response" not in row
        style = row.get("style", style)
        if not isinstance(style, str):
            raise _BadRow("malformed", "names no style; add a key `style`, or give the file as STYLE=FILE")
        index = self._index(row, harness)
        prompt = self._prompt(style, index)
        place = (style, index)
        if prompt is not None and not _is_of(row, prompt):
            raise _BadRow("of unknown rows", f"was made for another prompt than row {index + 1} of {style}", place)

        # 2. Its responses.
        sample = _whole(row.get("sample", 0))
        if sample is None or sample < 0:
            raise _BadRow("malformed", "its sample is no whole number from 0", place)
        texts = _harness_texts(row["resps"]) if harness else [row.get("response")]
        for text in texts or [None]:
            if not isinstance(text, str):
                what = "has no response" if text is None else f"its response is a JSON {json_type(text)}, no string"
                raise _BadRow("malformed", "has no generated text (a log-likelihood task?)" if harness else what, place)
            if problem := surrogate_problem(text):
                raise _BadRow("malformed", f"its response {problem}", place)
        reason = row.get("finish_reason")
        reason = REASONS.get(reason, "given") if isinstance(reason, str) else "given"
        return style, index, {sample + place: GivenResponse(str(text), reason) for place, text in enumerate(texts)}

    def _index(self, row: dict[str, Any], harness: bool) -> int:
        ids, named = [], []
        doc = row.get("doc")
        element = row.get("element_index", doc.get("element_index") if harness and isinstance(doc, dict) else None)
        if element is not None:
            rows = self._by_id.get(str(element), []) if isinstance(element, str | int) else []
            if len(rows) != 1:
                count = "two rows" if rows else "no row"
                raise _BadRow("of unknown rows", f"{count} of the prompt file has the element_index {element!r}")
            ids.append(rows[0])
        # Of the harness, the place of a document in its data set: only if the row does not say more.
        name = "original_index" if "original_index" in row else "doc_id" if harness and not ids else None
        if name is not None:
            number = _whole(row.get(name))
            if number is None:
                raise _BadRow("malformed", f"its {name} is no whole number")
            if not 0 <= number < len(self.prompts.rows):
                raise _BadRow("of unknown rows", f"there is no row {number + 1} in the prompt file ({name} {number})")
            ids.append(number)
            named.append(name)
        if not ids:
            raise _BadRow("malformed", "names no row; add original_index (from 0) or element_index")
        if len(set(ids)) > 1:
            raise _BadRow("of unknown rows", f"its {named[0]} and its element_index are two rows of the prompt file")
        return ids[0]

    def _prompt(self, style: str, index: int) -> str | None:
        """The text of a prompt; None if only stage 2 can make it. Raises _BadRow if there is none."""
        key = source_style(style)
        if key not in self.prompts.style_counts:
            near = did_you_mean(style, self.prompts.style_counts)
            raise _BadRow("of unknown rows", f"the prompt file has no style {style!r}{near}")
        if key not in self._good:
            self._good[key] = dict(self.prompts.prompts(key))
        if index not in self._good[key]:
            raise _BadRow("of unknown rows", f"row {index + 1} of the prompt file has no prompt of {style}")
        return None if controlled_style(style) else self._good[key][index]


def _whole(value: Any) -> int | None:
    """A whole number, also as a text or a float; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    text = str(value).strip()
    return int(text.removesuffix(".0")) if WHOLE.fullmatch(text) else None


def _harness_texts(resps: Any) -> list[Any]:
    """The texts of lm-evaluation-harness' `resps`: one request, its repeats."""
    requests = resps if isinstance(resps, list) else []
    return requests[0] if len(requests) == 1 and isinstance(requests[0], list) else []


def _is_of(row: dict[str, Any], prompt: str) -> bool:
    """Whether the prompt that a row says it answers, if it says one, holds this prompt."""
    waiting = [row.get("prompt", row.get("arguments"))]
    has_text = False
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            if prompt.strip() in value:
                return True
            has_text = True
            if value[:1] in ("[", "{"):  # the messages of a chat, as the harness has them
                with suppress(ValueError, RecursionError):
                    waiting.append(json.loads(value))
        elif isinstance(value, dict | list):
            waiting += value.values() if isinstance(value, dict) else value
    return not has_text


# --- as a run, for analyses that need no model


@dataclass(frozen=True)
class GivenRun(Run):
    """Responses as the run of stage 2 that scorers read; `contents`: what its one .pt file of each style would hold."""

    contents: dict[Path, dict[str, Any]] = field(default_factory=dict)
    own_settings: dict[str, Any] = field(default_factory=dict)

    def files(self, style: str) -> list[Path]:
        """One name a style; nothing is on disk."""
        return [self.styles[style]]

    def load(self, path: Path) -> dict[str, Any]:
        """The content of the style with that name."""
        return self.contents[path]

    def settings(self, style: str) -> dict[str, Any]:
        """What is known of how the responses were made."""
        return {"settings": self.own_settings}


def open_responses(
    files: Sequence[str], prompt_file: Path, only_style: str | None = None, chat: bool = False
) -> GivenRun:
    """Responses and their prompt file as a run. chat: a chat answered, so that all lines of a response count.

    Logs which rows are not used, and which prompts have no response. Raises UserError as `read_responses` does.
    """
    prompts = read_prompt_file(prompt_file)
    if only_style is None and len(prompts.style_counts) == 1:
        only_style = next(iter(prompts.style_counts))
    given = read_responses(files, prompts, only_style)
    given.report()
    path = Path(files[0]) if Path(files[0]).exists() else Path(files[0].partition("=")[2])
    order = [*prompts.style_counts]
    names = sorted(given.texts, key=lambda one: (order.index(source_style(one)), one != source_style(one), one))
    planned = {style: [index for index, _ in prompts.prompts(source_style(style))] for style in names}
    missing = {style: [i for i in planned[style] if i not in given.texts[style]] for style in names}
    if text := missing_text({style: some for style, some in missing.items() if not controlled_style(style)}, path.name):
        log.warning(f"{text}; the results are of the others")
    known = {"apply_chat_template": chat, "prompt_file": str(prompts.path), "prompt_sha256": prompts.sha256}
    folders = {style: path / style for style in names}
    contents = {folders[style]: _content(prompts, given, style) for style in names}
    run = GivenRun(path, path.stem, folders, only_file=path, contents=contents, own_settings=known)
    vars(run)["prompt_rows"] = prompts.rows  # fills the cached property
    return run


def _content(prompts: PromptFile, given: GivenResponses, style: str) -> dict[str, Any]:
    key, indices = source_style(style), sorted(given.texts[style])
    several = [given.of(style, index) for index in indices]
    texts = [None if controlled_style(style) else prompts.rows[index][key] for index in indices]
    content = {
        "style": style,
        "original_indices": indices,
        "element_index": [prompts.element_index(index) for index in indices],
        "prompts": texts,
        "responses": [samples[0].text for samples in several],
        "finish_reasons": [samples[0].finish_reason for samples in several],
        "final_predictions": [f"{text or ''}{one[0].text}" for text, one in zip(texts, several, strict=True)],
    }
    if given.has_samples:
        content["response_samples"] = [[one.text for one in samples] for samples in several]
    return content


def add_responses_flags(group: argparse._ArgumentGroup) -> None:
    """The flags with which a scorer reads a file of responses in place of a run."""
    files = "responses made elsewhere, in place of --run_dir: JSON Lines, CSV, or samples of lm-evaluation-harness; "
    group.add_argument("--responses_file", nargs="+", help=files + "STYLE=FILE if its rows name no style")
    group.add_argument("--chat", action="store_true", help="with --responses_file: a chat's answers, all lines count")


def run_of(args: argparse.Namespace, only_style: str | None = None) -> Run:
    """The run in --run_dir, or the responses in --responses_file to the prompts in --prompt_file."""
    if (args.run_dir is None) == (args.responses_file is None):
        raise UserError("give --run_dir, or --responses_file with --prompt_file")
    if args.run_dir is not None:
        return open_run(args.run_dir)
    if args.prompt_file is None:
        raise UserError("--responses_file: needs --prompt_file, the prompts that were answered")
    return open_responses(args.responses_file, args.prompt_file, only_style, args.chat)
