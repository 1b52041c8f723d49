"""Numbers and tables of the report as text: intervals, p values, rows of a CSV, and the table over all styles."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from answer_files import SUMMARY_FILES, first_there
from file_output import read_csv
from report_section import Headline, TableOf
from style_names import is_variant

if TYPE_CHECKING:
    import pandas as pd

MAX_TEXT = 700  # characters of a prompt or answer that are shown
INVISIBLE = {"\u00ad": "\u2027", "\u200b": "\u2027", "\u200c": "\u2027", "\u200d": "\u2027", "\ufeff": "\u2027"}
MAX_ROWS = 120  # of a table
DASH = "–"
PLAIN = {  # name in a file → in the tables
    "n_clusters": "groups",
    "n_paired": "n compared",
    "n_identical": "n same text",
    "n_censored": "n never reached",
    "n_other_words": "n other words",
    "minimum_detectable_difference": "could be detected",
    "minimum_detectable_difference_adjusted": "could be detected",
    "p_mcnemar": "p (McNemar)",
    "p_adjusted": "p (adjusted)",
    "auc": "AUC",
    "spread": "spread (FormatSpread)",
    "pss": "sensitivity, pss (ProSA)",
    "consistency_rate": "consistency rate (SCORE)",
    "pdr": "performance drop, pdr (PromptBench)",
    "posix": "sensitivity (POSIX)",
    "next_token_kl": "KL of the next token",
    "log10_next_token_kl": "log10 of the KL of the next token",
    "kl_mass_clean": "probability in the top-k, clean",
    "kl_mass_style": "probability in the top-k, style",
    "clean_top1_rank": "rank of the clean run's first token",
    "top1_kept": "first token is the clean run's",
    "recovery_depth": "layer of recovery",
    "half_recovery_depth": "layer of half recovery",
    "answer_logprob": "log probability of the answer",
}


# --- numbers with their uncertainty


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval; NaN if there is none."""

    estimate: float
    low: float = math.nan
    high: float = math.nan

    @property
    def known(self) -> bool:
        """True if there is an estimate."""
        return not math.isnan(self.estimate)

    def text(self, percent: bool = False, signed: bool = False) -> str:
        """`58.3 [45.7, 69.9]`, in percent or with a sign if asked for; a dash if unknown."""
        if not self.known:
            return DASH
        digits = 1 if percent else self.digits
        numbers = [_decimal(value, digits, percent, signed) for value in (self.estimate, self.low, self.high)]
        if math.isnan(self.low) or math.isnan(self.high):
            return f"{numbers[0]} [{DASH}]"
        return f"{numbers[0]} [{numbers[1]}, {numbers[2]}]"

    @property
    def digits(self) -> int:
        """Decimals that show the interval's width with two digits; 3 to 6."""
        width = self.high - self.low
        return min(6, max(3, 1 - math.floor(math.log10(width)))) if width > 0 else 3


def _decimal(value: float, digits: int, percent: bool, signed: bool) -> str:
    text = f"{100 * value if percent else value:+.{digits}f}"
    if float(text) == 0:
        text = text.replace("-", "+")
    return (text if signed else text.removeprefix("+")).replace("-", "\u2212")


def format_cell(column: str, value: Any) -> str:
    """A table cell as text: p values, whole numbers, three significant digits, a dash for nothing."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return DASH
    if isinstance(value, bool) or not isinstance(value, int | float):
        return visible(str(value))
    if re.search(r"(^|_)p(_|$)", column):
        return "< 0.001" if value < 0.001 else f"{value:.3f}"
    if float(value).is_integer():
        text = f"{int(value):,}" if column.startswith("n") else f"{int(value)}"
    else:
        text = f"{value:.3g}"
    return text.replace("-", "\u2212")


# --- tables


@dataclass(frozen=True)
class Table:
    """A table ready to print: `columns` and rows of text; `total` rows are in the file that it is `of`.

    names: of the columns in that file.
    """

    of: TableOf
    names: list[str]
    columns: list[str]
    rows: list[list[str]]
    total: int


def read_table(path: Path) -> pd.DataFrame | None:
    """A CSV of stages 3 to 5; None if it is missing or empty. Raises UserError if it is damaged."""
    if not path.is_file() or not path.stat().st_size:
        return None
    return read_csv(path, hint="delete it and run its stage again")


def to_table(frame: pd.DataFrame, wanted: TableOf, total: int | None = None) -> Table:
    """The chosen columns (default: all) as text, each estimate merged with its interval into one cell."""
    shown = merge_intervals(frame.head(MAX_ROWS), wanted.intervals)
    names = [name for name in dict.fromkeys(wanted.columns) if name in shown.columns] or list(shown.columns)
    cells = {name: [format_cell(name, value) for value in shown[name]] for name in names}
    names = [name for name in names if set(cells[name]) - {DASH}]  # a column that says nothing goes
    if "measure" in names:
        cells["measure"] = [plain(text) for text in cells["measure"]]
    rows = [list(line) for line in zip(*(cells[name] for name in names), strict=True)]
    return Table(wanted, names, [plain(name) for name in names], rows, total or len(frame))


def plain(name: str) -> str:
    """A name of a file's column or measure in words."""
    return PLAIN.get(name, name.replace("_", " "))


def merge_intervals(frame: pd.DataFrame, intervals: Sequence[Sequence[str]] = ()) -> pd.DataFrame:
    """Replace `x`, `x_ci_low`, `x_ci_high` by one text column `x`. intervals: (x, low, high) of other names."""
    merged = frame.copy()
    named = {"estimate": ("ci_low", "ci_high")} | {name: (low, high) for name, low, high in intervals}
    for name in frame.columns:
        low, high = named.get(name, (f"{name}_ci_low", f"{name}_ci_high"))
        if {low, high} <= set(merged.columns):
            numbers = zip(frame[name], frame[low], frame[high], strict=True)
            signed = "difference" in name or "change" in name
            merged[name] = [Interval(*map(float, three)).text(signed=signed) for three in numbers]
            merged = merged.drop(columns=[low, high])
    return merged


def visible(text: str) -> str:
    """`text` with characters that nobody sees (soft hyphen, zero width) shown as a dot, and cut where very long."""
    shown = "".join(INVISIBLE.get(letter, letter) for letter in text)
    return shown if len(shown) <= MAX_TEXT else shown[:MAX_TEXT] + " […]"


def rows_of(results: Path, wanted: TableOf) -> Table | None:
    """The rows of a CSV that a section asks for; None if there are none."""
    frame = read_table(results / wanted.source)
    if frame is None:
        return None
    total = len(frame)
    if {"n", "estimate"} <= {*frame.columns}:
        frame = frame[(frame["n"] > 0) | frame["estimate"].notna()]  # the clean form beside itself says nothing
    for column, value in wanted.only:
        frame = frame[frame[column] == value] if column in frame.columns else frame
    if wanted.by is not None:
        if wanted.by not in frame.columns:
            return None
        places = {style: place for place, style in enumerate(frame["style"].unique())}
        frame = frame.dropna(subset=[wanted.by]).sort_values(wanted.by, kind="stable")
        frame = frame.sort_values("style", key=lambda styles: styles.map(places), kind="stable")
    if wanted.prefer is not None and wanted.prefer[0] in frame.columns:
        liked = frame[wanted.prefer[0]].astype(str).str.startswith(tuple(wanted.prefer[1]))
        frame = frame[liked] if liked.any() else frame
    if wanted.per_style is not None and "style" in frame.columns:
        frame = frame.groupby("style", sort=False).head(wanted.per_style)
    return to_table(frame, wanted, total) if len(frame) else None


# --- the table over all styles (it closes the pipeline, too)


@dataclass(frozen=True)
class Overview:
    """One line a style: `columns` and `lines` of text, `notes` on the columns, the first change with its interval."""

    columns: list[str]
    lines: list[list[str]]
    notes: list[str]
    changes: list[Interval]


def overview(counts: Mapping[str, int], headlines: Sequence[Headline], results: Path) -> Overview:
    """The table over the styles of a run; columns that say nothing are left out. counts: style → number of prompts."""
    found = [(one, _by_style(results, one)) for one in headlines]
    numbers = [(one, [_interval(rows.get(style, {}), one) for style in counts]) for one, rows in found]
    known = [(one, column) for one, column in numbers if any(number.known for number in column)]
    texts = [[_headline_text(number, one) for number in column] for one, column in known]
    return Overview(
        ["style", "n", *(one.title for one, _ in known)],
        [list(line) for line in zip(map(visible, counts), map(str, counts.values()), *texts, strict=True)],
        ["n: prompts run", *(one.note for one, _ in known if one.note)],
        next((column for one, column in known if one.look == "points"), []),
    )


def _by_style(results: Path, column: Headline) -> dict[str, dict[str, Any]]:
    """The first row of each style, by the style's name."""
    frame = read_table(first_there(results, tuple(column.sources)))
    if frame is None or "style" not in frame.columns:
        return {}
    for name, value in column.only:
        frame = frame[frame[name] == value] if name in frame.columns else frame
    return {str(row["style"]): row for row in reversed(frame.to_dict("records"))}


def _interval(row: Mapping[str, Any], column: Headline) -> Interval:
    values = (row.get(name, math.nan) for name in (column.column, column.low, column.high))
    return Interval(*(float(value) if isinstance(value, int | float) else math.nan for value in values))


def _headline_text(number: Interval, column: Headline) -> str:
    if not column.low:
        nothing = column.look == "n" and number.estimate == 0  # the clean form is compared with nothing
        return DASH if nothing else format_cell(column.look, number.estimate)
    return number.text(percent=column.look in ("percent", "points"), signed=column.look == "points")


def worst_first(results: Path) -> list[str]:
    """The styles whose accuracy is known, the one with the largest fall first."""
    summary = read_table(first_there(results, SUMMARY_FILES))
    return [] if summary is None else compared(summary).sort_values("difference")["style"].tolist()


def compared(summary: pd.DataFrame) -> pd.DataFrame:
    """The lines of ways to write the prompt that are compared with the clean form; no controls, no repairs."""
    return summary[summary["difference"].notna() & summary["style"].map(lambda style: is_variant(style, None))]


@dataclass(frozen=True)
class Whisker:
    """Where an interval lies in a drawing of 0 to 100 wide, 0 in the middle."""

    low: float
    middle: float
    high: float


def whiskers(numbers: Sequence[Interval]) -> tuple[list[Whisker | None], float]:
    """(a drawing of each interval, the number at its right edge); None if there is no interval."""
    drawn = [one for one in numbers if not math.isnan(one.low)]
    reach = max((abs(end) for one in drawn for end in (one.low, one.high)), default=0.0) or 1.0
    scale = 48 / reach
    return [
        Whisker(*(50 + scale * value for value in (one.low, one.estimate, one.high))) if one in drawn else None
        for one in numbers
    ], reach
