"""The facts of facts.json: sentences that end right before their answer, with typos in their subject alone."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from command_line import UserError
from load_json import read_text

from typos.variants import make_variants, shuffled

DOSES = ("typo@1", "typo@2", "typo@3")
FACT_STYLES = ("main", "swap", "missing", "repeated", *DOSES, "polite", "urgent", "rude")
MAY_LACK = frozenset({"typo@3"})  # a short subject has no three edits
Fact = tuple[str, str, list[str]]  # relation, subject, accepted answers


def read_facts(path: Path) -> tuple[dict[str, str], list[Fact]]:
    """(sentence of each relation with {} for the subject, facts) of the tables. Raises UserError for a faulty table."""
    try:
        tables = tomllib.loads(read_text(path, "tables of facts"))
        columns = tables["countries"]["columns"].split()
        facts = list(_country_facts(columns, tables["countries"]["table"]))
        facts += [(relation, *pair) for relation, table in tables["facts"].items() for pair in _lines(table)]
        sentences: dict[str, str] = tables["sentences"]
    except (tomllib.TOMLDecodeError, KeyError, ValueError) as error:
        raise UserError(f"{path}: not a table of facts: {error}; see 0_data/fact_tables.toml for the form") from None
    if lacking := sorted({fact[0] for fact in facts} - sentences.keys()):
        raise UserError(f"{path}: [sentences] lacks {', '.join(lacking)}")
    return sentences, facts


def _country_facts(columns: list[str], table: str) -> Iterator[Fact]:
    for line in table.strip().splitlines():
        subject, cells = line.split(": ", 1)
        for relation, cell in zip(columns, cells.split(" | "), strict=True):
            if cell.strip() != "-":
                yield relation, subject, cell.strip().split(" / ")


def _lines(table: str) -> Iterator[tuple[str, list[str]]]:
    for line in table.strip().splitlines():
        subject, answers = line.split(": ", 1)
        yield subject, answers.split(" / ")


def make_rows(
    sentences: dict[str, str], facts: list[Fact], seed: int = 0
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[Fact]]:
    """(rows in all styles in random order, edit log, facts left out because a style is impossible)."""
    rows: list[dict[str, Any]] = []
    log: list[dict[str, Any]] = []
    left_out: list[Fact] = []
    for relation, subject, answers in shuffled(Random(seed), facts):
        clean = {
            "element_index": len(rows) + 1,
            "normal": sentences[relation].format(subject),
            "answer": answers if len(answers) > 1 else answers[0],
            "task": subject,
            "_template": subject,
            "_relation": relation,
        }
        (row,), edits, _ = make_variants([clean], FACT_STYLES, seed=seed, where="subject")
        if any(style not in row and style not in MAY_LACK for style in FACT_STYLES):
            left_out.append((relation, subject, answers))
            continue
        log += [{**edit, "original_index": len(rows)} for edit in edits]
        rows.append(row)
    return rows, log, left_out
