"""Datasets of the field as prompt files: read line by line, made into rows, bad lines named.

Reading (`read_jsonl`, `read_table`) yields (line number, record or BadLine); `rows_of` makes rows of the records, and
`write_prompt_file` writes them one by one. Memory does not grow with the dataset, but for quora by some 200 bytes a
question (ids alone).
"""

from __future__ import annotations

import ast
import csv
import itertools
import json
import re
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from decimal import Decimal
from pathlib import Path
from typing import Any, NoReturn, TextIO

from command_line import UserError, one_line
from file_output import atomic_path
from load_json import surrogate_problem
from logger import get_logger
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

QUORA_COLUMNS = ("id", "qid1", "qid2", "question1", "question2", "is_duplicate")
PAWS_COLUMNS = ("id", "sentence1", "sentence2", "label")
LONGEST_LINE = 10_000_000  # characters
LONGEST_RECORD = 100  # physical lines that a quoted CSV field may span
LINES_NAMED = 10

Record = dict[str, Any]
Row = dict[str, Any]


class BadLine(Exception):
    """One record cannot be used; its text says why."""


# --- records: (line number, record or what is wrong with it)


def read_lines(path: Path) -> Iterator[tuple[int, str | BadLine]]:
    """(line number from 1, line without its end) of a UTF-8 file."""
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
            for number in itertools.count(1):
                line = file.readline(LONGEST_LINE)
                if not line:
                    return
                if len(line) == LONGEST_LINE and not line.endswith("\n"):
                    while (part := file.readline(LONGEST_LINE)) and not part.endswith("\n"):
                        pass
                    yield number, BadLine(f"longer than {LONGEST_LINE:,} characters")
                elif re.search("[\udc80-\udcff]", line):
                    yield number, BadLine("not UTF-8")
                else:
                    yield number, line.rstrip("\r\n")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check --input_file") from error


def read_jsonl(path: Path) -> Iterator[tuple[int, Record | BadLine]]:
    """The object on each line; numbers keep their digits as they are written. A JSON list gives its items, numbered."""
    values = _json_values(path)
    for number, value in values:
        yield number, value if isinstance(value, dict | BadLine) else BadLine("not a JSON object")


def _json_values(path: Path) -> Iterator[tuple[int, Any]]:
    is_first = True
    for number, line in read_lines(path):
        if isinstance(line, BadLine):
            yield number, line
        elif line.strip():
            value = _parse_json(line)
            if is_first and line.lstrip().startswith("["):  # the whole file may be one list
                whole = _parse_json(path.read_text(encoding="utf-8-sig", errors="surrogateescape"))
                if isinstance(whole, list):
                    yield from enumerate(whole, start=1)
                    return
                if isinstance(value, BadLine):
                    reason = "correct it, or write one object a line"
                    raise UserError(f"{path}: begins as a JSON list and is {whole}; {reason}")
            yield number, value
        is_first = is_first and not isinstance(line, BadLine) and not line.strip()


def _parse_json(text: str) -> Any:
    """The value, or the BadLine that says what is wrong."""
    try:
        return json.loads(text, parse_float=Decimal, parse_constant=_refuse_constant)
    except (ValueError, RecursionError, ArithmeticError) as error:
        return BadLine(f"not JSON: {one_line(str(error), 80)}")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def read_table(
    path: Path, delimiter: str, needed: Sequence[str], quoting: bool = True
) -> Iterator[tuple[int, Record | BadLine]]:
    """The records of a CSV or TSV file with a header that has the `needed` columns (UserError if it has not).

    A field may be quoted, and then span lines. A mark that is never closed costs its own line, not those that
    follow. In TSV, often written without quoting, text with a stray mark is taken as it is written if its line has
    all fields.
    """
    csv.field_size_limit(LONGEST_LINE)
    lines = read_lines(path)
    _, line = next(lines, (0, ""))
    header = [] if isinstance(line, BadLine) else _parse_quoted(line, delimiter) or line.split(delimiter)
    while header and not header[-1].strip():
        header.pop()
    if missing := [name for name in needed if name not in header]:
        have = one_line(", ".join(header), 200) or "none"
        raise UserError(f"{path}: no column {missing[0]!r} in the header ({have}); check --format and the column names")
    if twice := [name for name in needed if header.count(name) > 1]:
        raise UserError(f"{path}: the header has the column {twice[0]!r} more than once; rename the others")
    ahead: deque[tuple[int, str | BadLine]] = deque()  # lines read in search of a quote's end, to be read again
    while (numbered := ahead.popleft() if ahead else next(lines, None)) is not None:
        number, line = numbered
        if isinstance(line, BadLine):
            yield number, line
            continue
        fields = _read_fields(line, ahead, lines, delimiter, len(header)) if quoting else line.split(delimiter)
        if fields is None:
            yield number, BadLine("quotation marks that do not match")
        elif not any(field.strip() for field in fields):
            continue  # an empty line, or a row of a spreadsheet with nothing in it
        elif _fits(fields, len(header)):
            yield number, dict(zip(header, fields, strict=False))
        else:
            yield number, BadLine(f"{len(fields)} fields where the header has {len(header)}")


def _fits(fields: list[str], width: int) -> bool:
    """True for as many fields as the header has; surplus ones may be empty, as spreadsheets write them."""
    return len(fields) >= width and not any(field.strip() for field in fields[width:])


def _read_fields(
    line: str,
    ahead: deque[tuple[int, str | BadLine]],
    lines: Iterator[tuple[int, str | BadLine]],
    delimiter: str,
    width: int,
) -> list[str] | None:
    """The fields of the record that starts with `line`; takes the lines that it spans from `ahead` and `lines`."""
    fields = _parse_quoted(line, delimiter)
    if fields is not None:
        return fields
    raw = line.split(delimiter)
    # An odd mark at the start of a field may open a text that goes on in the next line; a .tsv may hold bare ones, too.
    opened = [field[:1] == '"' and field.count('"') % 2 == 1 for field in raw]
    bare = raw if delimiter == "\t" and len(raw) == width and not opened[-1] else None
    if bare and not any(opened):
        return bare
    for taken in range(1, LONGEST_RECORD):
        if len(ahead) < taken:
            ahead.extend(itertools.islice(lines, 1))
        following = ahead[taken - 1][1] if len(ahead) >= taken else None
        if not isinstance(following, str) or len(line) + len(following) > LONGEST_LINE:
            break
        line += "\n" + following
        fields = _parse_quoted(line, delimiter) if '"' in following else None
        if fields is not None and _fits(fields, width):
            for _ in range(taken):
                ahead.popleft()
            return fields
    return bare


def _parse_quoted(line: str, delimiter: str) -> list[str] | None:
    """Fields of one record by the rules of CSV; None where a quoted field does not end or goes on after its end."""
    try:
        return next(csv.reader([line], delimiter=delimiter, strict=True), [])
    except csv.Error:
        return None


# --- rows


def _text(record: Record, column: str) -> str:
    """The text under `column`; BadLine where there is none that a tokenizer could read."""
    if column not in record:
        raise BadLine(f"no {column}")
    text = record[column]
    if not isinstance(text, str):
        raise BadLine(f"{column} is not a text")
    if not text.strip():
        raise BadLine(f"{column} is empty")
    if reason := surrogate_problem(text):
        raise BadLine(f"{column} {reason}")
    return text.strip()


def gsm8k_row(record: Record) -> Row:
    """Question and gold answer: a plain number without thousands separators and dollar sign, else the text as it is."""
    _, mark, gold = _text(record, "answer").rpartition("####")
    if not mark:
        raise BadLine("no #### in the answer")
    gold = _gold(gold.strip())
    plain = gold.replace("$", "").replace(",", "").strip()
    if not re.search(r"\d|\\[a-zA-Z]|[π√∞]", gold):
        raise BadLine("what follows #### is not a number")
    return {"normal": _text(record, "question"), "answer": plain if _PLAIN_NUMBER.fullmatch(plain) else gold}


_PLAIN_NUMBER = re.compile(r"-?\d+(\.\d+)?", re.ASCII)
_NO_ANSWER = re.compile(
    r"none|null|nil|nan|n\.?/?a\.?|no answer|not (?:available|applicable)|tbd|[-–—]+", re.IGNORECASE
)


def _gold(text: str) -> str:
    """The gold answer; BadLine for a text that says there is none."""
    if text and _NO_ANSWER.fullmatch(text.rstrip(".")):
        raise BadLine(f"the answer is {text!r}: there is no gold")
    return text


def quora_row(record: Record) -> Row:
    """A pair of questions; `_template` is filled in by `cluster_rows`."""
    pair = _pair(record, "question1", "question2", "is_duplicate")
    return {**pair, "_id": record["id"], "_template": (_text(record, "qid1"), _text(record, "qid2"))}


def paws_row(record: Record, instruction: str) -> Row:
    """A pair of sentences, each as the task of `instruction`."""
    record = {key: _without_literal(text) for key, text in record.items()}
    pair = _pair(record, "sentence1", "sentence2", "label")
    style = "other" if pair["_label"] else "negative"
    return {
        "normal": f"{instruction} {pair['normal']}",
        style: f"{instruction} {pair[style]}",
        "_id": record["id"],
        "_label": pair["_label"],
    }


def _without_literal(text: str) -> str:
    """The text inside a Python byte literal, as which some copies of PAWS hold their sentences; others as they are."""
    if not re.fullmatch(r"b(['\"]).*\1", text.strip(), re.DOTALL):
        return text
    try:
        literal = ast.literal_eval(text.strip())
        return literal.decode() if isinstance(literal, bytes) else text
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def _pair(record: Record, first: str, second: str, label_column: str) -> Row:
    label = record[label_column].strip()
    if label not in ("0", "1"):
        raise BadLine(f"{label_column} is neither 0 nor 1")
    one, two = _text(record, first), _text(record, second)
    if "NS" in (one, two):  # PAWS-X has it for a sentence that was not translated
        raise BadLine("a text is the placeholder NS")
    if one == two:
        raise BadLine("both texts are the same")
    return {"normal": one, ("other" if label == "1" else "negative"): two, "_label": int(label)}


def table_row(record: Record, prompt_column: str, answer_column: str | None, template_column: str | None) -> Row:
    """A row of the user's own columns."""
    row = {"normal": _text(record, prompt_column)}
    for key, column in (("answer", answer_column), ("_template", template_column)):
        if column:
            value = record.get(column)
            number = isinstance(value, int | Decimal) and not isinstance(value, bool)
            text = str(value) if number else _text(record, column)
            row[key] = _gold(text) if key == "answer" else text
    return row


def cluster_rows(read: Callable[[], Iterable[tuple[int, Row | BadLine]]]) -> Iterator[tuple[int, Row | BadLine]]:
    """Name the cluster of each pair: the connected component, over all good pairs, that its two questions lie in.

    `read` gives the rows and is called twice, since the last pair may join clusters of the first.
    """
    ids: dict[str, int] = {}
    ends = array("q")
    for _, row in read():
        if not isinstance(row, BadLine):
            ends.extend(ids.setdefault(question, len(ids)) for question in row["_template"])
    pairs = (array("b", [1]) * (len(ends) // 2), (ends[::2], ends[1::2]))
    _, labels = connected_components(coo_array(pairs, shape=(len(ids), len(ids))), directed=False)
    first: dict[int, str] = {}
    for question, label in zip(ids, labels, strict=True):
        first.setdefault(label, question)
    for number, row in read():
        if not isinstance(row, BadLine):
            row["_template"] = f"cluster_{first[labels[ids[row['_template'][0]]]]}"
        yield number, row


# --- one dataset to one file


def rows_of(
    path: Path,
    data_format: str,
    max_samples: int | None = None,
    instruction: str = "",
    columns: tuple[str, str | None, str | None] = ("prompt", None, None),
) -> Iterator[tuple[int, Row | BadLine]]:
    """(line number, row or what is wrong) of a dataset; stops after `max_samples` good rows.

    `data_format` is gsm8k, quora, paws, csv, tsv or jsonl. `instruction` goes before the sentences of paws. `columns`
    (prompt, answer, template) name those of csv, tsv and jsonl.
    """
    if data_format == "gsm8k":
        return _convert(read_jsonl(path), gsm8k_row, max_samples)
    if data_format == "quora":
        return cluster_rows(lambda: _convert(read_table(path, "\t", QUORA_COLUMNS), quora_row, max_samples))
    if data_format == "paws":
        records = read_table(path, "\t", PAWS_COLUMNS, quoting=False)
        return _convert(records, lambda record: paws_row(record, instruction), max_samples)
    if data_format == "jsonl":
        records = read_jsonl(path)
    else:
        delimiter = "\t" if data_format == "tsv" else ","
        records = read_table(path, delimiter, [column for column in columns if column])
    return _convert(records, lambda record: table_row(record, *columns), max_samples)


def _convert(
    records: Iterable[tuple[int, Record | BadLine]], to_row: Callable[[Record], Row], max_samples: int | None
) -> Iterator[tuple[int, Row | BadLine]]:
    """Rows with their element_index, until `max_samples` good ones were made."""
    made = 0
    for index, (number, record) in enumerate(records, start=1):
        if made == max_samples:
            return
        try:
            if isinstance(record, BadLine):
                raise record
            yield number, {"element_index": index, **to_row(record)}
            made += 1
        except BadLine as problem:
            yield number, problem


def write_prompt_file(output: Path, rows: Iterable[tuple[int, Row | BadLine]]) -> tuple[int, int]:
    """Write the rows one by one, and the bad lines beside them; (rows, bad lines). UserError where no row is good."""
    made, bad = 0, 0
    first_reason = "it has no records"
    with ExitStack() as stack:
        file = _open_whole(stack, output)
        for number, row in rows:
            if not isinstance(row, BadLine):
                file.write((",\n" if made else "[\n") + json.dumps(row, ensure_ascii=False))
                made += 1
                continue
            if not bad:
                first_reason = f"line {number}: {row}"
                bad_lines = csv.writer(_open_whole(stack, bad_lines_path(output)), lineterminator="\n")
                bad_lines.writerow(["line", "reason"])
            bad_lines.writerow([number, row])
            bad += 1
            if bad <= LINES_NAMED:
                get_logger("adapt_dataset").warning(f"line {number}: {row}")
        if not made:
            raise UserError(f"no usable record in the dataset ({first_reason}); check --format and the column names")
        file.write("\n]\n")
    if not bad:
        bad_lines_path(output).unlink(missing_ok=True)  # of an earlier run
    return made, bad


def _open_whole(stack: ExitStack, path: Path) -> TextIO:
    """A text file that appears under `path` when the stack is left without an error."""
    temporary = stack.enter_context(atomic_path(path))
    return stack.enter_context(open(temporary, "w", encoding="utf-8", errors="backslashreplace", newline="\n"))


def bad_lines_path(output: Path) -> Path:
    """Where the bad lines of a prompt file are listed."""
    return output.with_name(f"{output.stem}_bad_lines.csv")
