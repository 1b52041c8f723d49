"""Arithmetic problems in many wordings, each in every typo and tone style: the rows of 0_data/maths.json.

`make_rows` is the entry. The rows are ordered by difficulty: first 300 rows with one-digit numbers, then 350 whose
larger number has two digits, then 350 with three.
"""

from __future__ import annotations

import csv
import io
import itertools
import operator
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

from command_line import UserError
from load_json import STYLES, read_text

from typos.variants import make_variants, shuffled

Row = dict[str, Any]

OPERATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "addition": operator.add,
    "subtraction": operator.sub,
    "multiplication": operator.mul,
    "division": operator.truediv,
}
SIGNS = {"addition": "+", "subtraction": "-", "multiplication": "×*", "division": "÷/"}
# Digits of the larger number -> how many rows with each kind of result.
COUNTS: dict[int, dict[tuple[str, str], int]] = {
    digits: {
        ("addition", "whole"): whole,
        ("subtraction", "whole"): whole - signed,
        ("subtraction", "negative"): signed,
        ("multiplication", "whole"): whole,
        ("division", "whole"): exact,
        ("division", "fraction"): fraction,
    }
    for digits, whole, signed, exact, fraction in ((1, 90, 30, 8, 22), (2, 90, 30, 50, 30), (3, 90, 30, 50, 30))
}
POOL = 60  # numbers per operand from which one group of problems is drawn


@dataclass(frozen=True)
class Wording:
    """One row of the wordings file: `{x}` stands for the expression, or `[…]` marks the task with {a} {s} {b}."""

    template: str
    operation: str
    results: str
    text: str


@dataclass(frozen=True)
class Problem:
    operation: str
    a: int
    b: int

    @property
    def value(self) -> Fraction:
        return OPERATIONS[self.operation](Fraction(self.a), self.b)

    @property
    def result(self) -> str:
        """Kind of the result: `negative`, `fraction` or `whole` (zero or more)."""
        if self.value < 0:
            return "negative"
        return "whole" if self.value.denominator == 1 else "fraction"


FEW_SHOT = frozenset(  # few_shot_maths.txt gives these away, so they must not be asked
    Problem(*problem)
    for problem in (
        *(("addition", 5, 6), ("addition", 6, 5), ("subtraction", 3, 7)),
        *(("multiplication", 4, 3), ("multiplication", 3, 4)),
    )
)


def read_wordings(path: Path) -> list[Wording]:
    """Read and check the wordings; raises UserError with the line that is wrong."""
    lines = io.StringIO(read_text(path, "a CSV file of wordings"), newline="")
    try:
        rows = [Wording(*row) for row in itertools.islice(csv.reader(lines), 1, None)]
    except (TypeError, csv.Error) as error:
        raise UserError(f"{path}: {error}; each line needs template, operation, results, wording") from None
    for line, row in enumerate(rows, start=2):
        known = row.operation in (*OPERATIONS, "any") and row.results in ("whole", "any")
        if not known or not re.fullmatch(r"\w*\d\d", row.template) or not _WORDING.fullmatch(row.text):
            raise UserError(
                f"{path} line {line}: needs template_NN, a known operation and results, one {{x}} or [task]"
            )
    return rows


_WORDING = re.compile(r"[^\[\]{}]*(\{x\}|\[([^\[\]{}]|\{[abs]\})+\])[^\[\]{}]*")


def make_rows(wordings: Sequence[Wording], seed: int) -> tuple[list[Row], list[Row]]:
    """(rows with all their styles, edit log) in file order, the easiest first."""
    rng = random.Random(f"maths {seed}")
    wordings = shuffled(rng, list(wordings))
    used: dict[str, list[Problem]] = {wording.template: [] for wording in wordings}
    rows: list[Row] = []
    log: list[Row] = []
    for digits, counts in COUNTS.items():
        problems = [
            problem
            for (operation, result), count in counts.items()
            for problem in itertools.islice(draw_problems(operation, result, digits, rng), count)
        ]
        for problem in shuffled(rng, problems):
            # The least used wording that fits, was not used for the problem, and can take every style.
            for wording in sorted(wordings, key=lambda wording: len(used[wording.template])):
                fits = wording.operation in (problem.operation, "any") and wording.results in (problem.result, "any")
                if not fits or problem in used[wording.template]:
                    continue
                (row,), edits, _ = make_variants([_clean_row(len(rows) + 1, problem, wording, digits)], seed=seed)
                if len({row[key] for key in ("normal", *STYLES) if key in row}) == 1 + len(STYLES):
                    break
            else:
                raise UserError(f"no wording for {problem} can take every style; add wordings with more words")
            used[wording.template].append(problem)
            log += [{**edit, "original_index": len(rows)} for edit in edits]
            rows.append(row)
    return rows, log


def draw_problems(operation: str, result: str, digits: int, rng: random.Random) -> Iterator[Problem]:
    """Problems without end, none twice before all of a random pool were used; every number is 2 or more."""
    larger = range(2 if digits == 1 else 10 ** (digits - 1), 10**digits)
    largest_other = {"addition": 999, "subtraction": 999, "multiplication": 12, "division": 20}[operation]
    smaller = range(2, min(larger[-1], largest_other) + 1)
    pairs = itertools.product(*(shuffled(rng, list(numbers))[:POOL] for numbers in (larger, smaller)))
    pool = {Problem(operation, *pair) for a, b in pairs if a >= b for pair in ((a, b), (b, a))}
    fitting = [p for p in pool if p.result == result and _is_fair(p)]
    return itertools.cycle(shuffled(rng, sorted(fitting, key=lambda p: (p.a, p.b))))


def _is_fair(problem: Problem) -> bool:
    """No zero results, no quotient of one, none with more than three decimals, and nothing of the few-shot text."""
    if problem in FEW_SHOT:
        return False
    if problem.operation == "division":
        return problem.value != 1 and (problem.value * 1000).denominator == 1
    return problem.value != 0


def _clean_row(element_index: int, problem: Problem, wording: Wording, digits: int) -> Row:
    signs = SIGNS[problem.operation]
    sign = signs[int(wording.template[-2:]) % len(signs)]  # a wording keeps one notation: × or *, ÷ or /
    fields = {"a": problem.a, "b": problem.b, "s": sign, "x": f"[{problem.a} {sign} {problem.b} =]"}
    before, task, after = re.split(r"[\[\]]", wording.text.format(**fields))
    exact = (Decimal(problem.value.numerator) / Decimal(problem.value.denominator)).normalize()  # 7/2 -> 3.5
    return {
        "element_index": element_index,
        "normal": before + task + after,
        "answer": f"{exact:f}",
        "task": task,
        "_template": wording.template,
        "_operation": problem.operation,
        "_digits": digits,
        "_result": problem.result,
    }
