"""Sentences on what a run found. Each is made from one table of the results folder by one rule.

A rule gives its claim if the table supports it, else what could have been detected, else nothing. The stage that writes
a table has the rules for it (docs/METHODS.md, "Findings").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from answer_files import first_there
from file_output import read_csv
from paired_stats import minimum_detectable_effect
from report_section import Finding
from scipy import stats

ALPHA = 0.05

Numbers = dict[str, Any]


class Rule(NamedTuple):
    """A rule: the files whose first present one is its table; `numbers` of its sentences, one for each style that has
    some, each with `holds`, `n`, if of one style `style` and `p`, `head` if it names one, `aside` if it belongs into
    the fold; the wording if it holds and if not; the question of a reader that it answers; `aside` if only a reader
    who asks for more sees it."""

    name: str
    sources: Sequence[str]
    numbers: Callable[[pd.DataFrame, Path], Iterable[Numbers]]
    claim: str
    otherwise: str = ""
    question: str = ""
    aside: bool = False


def sentences(rules: Sequence[Rule], folder: Path) -> list[Finding]:
    """The sentences of the rules on the tables in a results folder; none on a table that is missing."""
    found = []
    for rule in rules:
        path = first_there(folder, tuple(rule.sources))
        table = table_of(path)
        for numbers in () if table is None else rule.numbers(table, folder):
            if template := rule.claim if numbers["holds"] else rule.otherwise:
                p, n = float(numbers.get("p", math.nan)), int(numbers["n"])
                words = {**numbers, "n": n, "p": p_text(p), "adjusted_p": p_text(p, "adjusted ")}
                found.append(
                    Finding(
                        rule.name,
                        template.format(**words),
                        path.name,
                        n,
                        bool(numbers["holds"]),
                        str(numbers.get("style", "")),
                        None if math.isnan(p) else p,
                        rule.question,
                        str(numbers.get("head", "")) if numbers["holds"] else "",
                        rule.aside or bool(numbers.get("aside", False)),
                    )
                )
    return found


def table_of(path: Path) -> pd.DataFrame | None:
    """A table; None if it is missing or has no rows."""
    table = read_csv(path) if path.is_file() and path.stat().st_size else None
    return None if table is None or table.empty else table


def detectable(line: pd.Series, n: str, comparisons: int = 1) -> float:
    """The smallest true difference to the control found with 80 % power, from its 95 % t interval and its number of
    rows or clusters."""
    df = float(line[n]) - 1
    if df < 1 or math.isnan(line["difference_ci_low"]):
        return math.nan
    middle = line["difference_to_control"]
    half = max(line["difference_ci_high"] - middle, middle - line["difference_ci_low"])  # one end may be cut to a range
    return minimum_detectable_effect(half / float(stats.t.ppf(0.975, df)), df, comparisons)


# --- numbers as text


def limit_text(value: float, text: str, most: float = math.inf, beyond: str = "") -> str:
    """` A change of 3.1 points would have been found (80 % power).` from `A change of {} points`.

    Empty if the value is unknown, `beyond` if it is more than there can be.
    """
    if value <= most:
        return f" {text.format(f'{value:.1f}')} would have been found (80 % power)."
    return beyond if value > most else ""


def share_limit(limit: float, control: float) -> str:
    """What difference of two shares would have been found, beside what there can be: from the control's share."""
    down, up = sorted((control, 1 - control))
    if limit > up:
        return " With so few rows no difference would have been found."
    if limit > down:
        return f" So few rows show only a difference of {100 * limit:.1f} points or more (80 % power)."
    return limit_text(100 * limit, "A difference of {} points")


def share_text(line: pd.Series, name: str, low: str = "", high: str = "") -> str:
    """`71 % [59, 84]`."""
    value, bracket, ends = points(line, name, low, high).partition(" [")
    return f"{value} %{bracket}{ends}"


def percent(value: float, sign: str = " %") -> str:
    """A share in percent without decimals."""
    return f"{100 * value:.0f}{sign}"


def p_text(value: float, kind: str = "") -> str:
    """`p = 0.012`, `adjusted p < 0.001`."""
    if math.isnan(value):
        return "no p, because nothing varied"
    return f"{kind}p < 0.001" if value < 0.001 else f"{kind}p = {value:.3f}"


def factor(log2: float) -> str:
    """A difference of logarithms as a factor."""
    return f"{2**log2:.2f}"


def join(words: Sequence[str]) -> str:
    """`a, b and c`."""
    return ", ".join(words[:-1]) + (" and " if len(words) > 1 else "") + words[-1] if words else ""


def estimate_text(
    line: pd.Series, name: str, digits: int, low: str = "ci_low", high: str = "ci_high", negated: bool = False
) -> str:
    """`4.7 [2.9, 6.6]`; with `negated` of the opposite number."""
    ends = sorted(-line[end] if negated else line[end] for end in (low, high))
    value = -line[name] if negated else line[name]
    texts = [f"{round(number, digits) + 0.0:.{digits}f}".replace("-", "\u2212") for number in (value, *ends)]
    return texts[0] if any(math.isnan(end) for end in ends) else f"{texts[0]} [{texts[1]}, {texts[2]}]"


def points(line: pd.Series, name: str, low: str = "", high: str = "", negated: bool = False) -> str:
    """A share's change and interval in points of a hundred."""
    low, high = low or f"{name}_ci_low", high or f"{name}_ci_high"
    scaled = pd.Series({key: 100 * float(line[key]) for key in (name, low, high)})
    return estimate_text(scaled, name, 0, low, high, negated)
