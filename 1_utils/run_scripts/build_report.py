"""Write one self-contained HTML report: tables, plots, settings, and clean and typo prompts side by side.

Reads   run folders of stage 2 (outputs/<run>) and what stages 3 to 5 wrote for them (results/<run>/*.csv, *.png);
        what is not there is left out
Writes  report.html: plots embedded, no script, nothing loaded from elsewhere; all text of models and files is escaped

    python 1_utils/run_scripts/build_report.py --run_dir outputs/demo/maths --results_dir results/demo/maths
"""

from __future__ import annotations

import argparse
import base64
import difflib
import io
import json
import math
import random
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from answer_files import SUMMARY_FILES, first_there, item_files
from command_line import UserError, make_parser, one_line, run_main
from file_output import read_csv, write_text
from logger import get_logger
from PIL import Image
from read_predictions import Prediction, iter_predictions
from report_sections import SECTIONS, TableOf
from run_store import (
    Run,
    near_folder,
    open_run,
    outdated,
    read_failures,
    results_of,
    row_indices,
    warn_unfinished,
)
from stamps import note_read
from style_names import is_again

if TYPE_CHECKING:
    import pandas as pd

TEMPLATE = "report_template.html"
MAX_TEXT = 700  # characters of a prompt or answer that are shown
INVISIBLE = {"\u00ad": "\u2027", "\u200b": "\u2027", "\u200c": "\u2027", "\u200d": "\u2027", "\ufeff": "\u2027"}
MAX_ROWS = 120  # of a table
COLOURS = 256  # of a picture
DASH = "–"


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
    """A table ready to print: `columns` and rows of text; `total` rows are in the file `source`."""

    source: str
    columns: list[str]
    rows: list[list[str]]
    total: int


def read_table(path: Path) -> pd.DataFrame | None:
    """A CSV of stages 3 to 5; None if it is missing or empty. Raises UserError if it is damaged."""
    if not path.is_file() or not path.stat().st_size:
        return None
    return read_csv(path, hint="delete it and run its stage again")


def to_table(frame: pd.DataFrame, source: str, columns: Sequence[str] = (), total: int | None = None) -> Table:
    """The chosen columns (default: all) as text, each estimate merged with its interval into one cell."""
    shown = merge_intervals(frame.head(MAX_ROWS))
    names = [name for name in dict.fromkeys(columns) if name in shown.columns] or list(shown.columns)
    cells = {name: [format_cell(name, value) for value in shown[name]] for name in names}
    names = [name for name in names if set(cells[name]) - {DASH}]  # a column that says nothing goes
    rows = [list(line) for line in zip(*(cells[name] for name in names), strict=True)]
    return Table(source, [name.replace("_", " ") for name in names], rows, total or len(frame))


# Columns whose interval is not named after them.
INTERVALS = {
    "estimate": ("ci_low", "ci_high"),
    "auc": ("ci_low", "ci_high"),
    "shuffled_auc": ("shuffled_ci_low", "shuffled_ci_high"),
    "token_count_auc": ("token_count_ci_low", "token_count_ci_high"),
    "difference_to_control": ("difference_ci_low", "difference_ci_high"),
    "difference_vs_control": ("difference_ci_low_vs_control", "difference_ci_high_vs_control"),
}


def merge_intervals(frame: pd.DataFrame) -> pd.DataFrame:
    """Replace `x`, `x_ci_low`, `x_ci_high` (and the columns of INTERVALS) by one text column `x`."""
    merged = frame.copy()
    for name in frame.columns:
        low, high = INTERVALS.get(name, (f"{name}_ci_low", f"{name}_ci_high"))
        if {low, high} <= set(merged.columns):
            numbers = zip(frame[name], frame[low], frame[high], strict=True)
            signed = "difference" in name or "change" in name
            merged[name] = [Interval(*map(float, three)).text(signed=signed) for three in numbers]
            merged = merged.drop(columns=[low, high])
    return merged


# --- the table that opens the report (and closes the pipeline)


@dataclass(frozen=True)
class HeadlineRow:
    """One style: how often right, how that differs from the clean form, how near its answers, where attention goes."""

    style: str
    n: int
    accuracy: Interval
    difference: Interval
    p_adjusted: float
    similarity: Interval
    task_fraction: Interval

    def cells(self) -> list[str]:
        """The row as text, in the order of HEADLINE_COLUMNS."""
        return [
            visible(self.style),
            str(self.n),
            self.accuracy.text(percent=True),
            self.difference.text(percent=True, signed=True),
            format_cell("p_adjusted", self.p_adjusted),
            self.similarity.text(),
            self.task_fraction.text(),
        ]


HEADLINE_COLUMNS = ["style", "n", "accuracy, %", "difference, points", "p (Holm)", "similarity", "attention on task"]
NOTHING = Interval(math.nan)


def headline_rows(counts: dict[str, int], results: Path) -> list[HeadlineRow]:
    """A row for each style of a run (`counts`: style → number of prompts), from the summary CSVs in `results`."""
    accuracy = by_style(read_table(first_there(results, SUMMARY_FILES)))
    similarity = by_style(read_table(results / "similarity_summary.csv"), measure="similarity")
    attention = by_style(read_table(results / "prompt_task_fraction_aggregate.csv"))
    return [
        HeadlineRow(
            style=style,
            n=count,
            accuracy=interval_in(accuracy.get(style), "estimate"),
            difference=interval_in(accuracy.get(style), "difference"),
            p_adjusted=number_in(accuracy.get(style), "p_adjusted"),
            similarity=interval_in(similarity.get(style), "estimate"),
            task_fraction=interval_in(attention.get(style), "frac_task"),
        )
        for style, count in counts.items()
    ]


def headline_table(rows: Sequence[HeadlineRow]) -> tuple[list[str], list[list[str]]]:
    """(columns, lines of text) of the rows, columns that say nothing left out."""
    lines = [row.cells() for row in rows]
    keep = [i for i in range(len(HEADLINE_COLUMNS)) if any(line[i] != DASH for line in lines)]
    return [HEADLINE_COLUMNS[i] for i in keep], [[line[i] for i in keep] for line in lines]


def by_style(frame: pd.DataFrame | None, measure: str | None = None) -> dict[str, dict[str, Any]]:
    """The first row of each style (of this measure, where the table holds several), by the style's name."""
    if frame is None or "style" not in frame.columns:
        return {}
    if measure is not None and "measure" in frame.columns:
        frame = frame[frame["measure"] == measure]
    return {str(row["style"]): row for row in reversed(frame.to_dict("records"))}


def interval_in(row: dict[str, Any] | None, name: str) -> Interval:
    """An estimate with its interval from a summary row; NaN if it has none."""
    low, high = ("ci_low", "ci_high") if name == "estimate" else (f"{name}_ci_low", f"{name}_ci_high")
    return Interval(number_in(row, name), number_in(row, low), number_in(row, high))


def number_in(row: dict[str, Any] | None, name: str) -> float:
    """A number from a summary row; NaN if there is none."""
    value = (row or {}).get(name)
    return float(value) if isinstance(value, int | float) else math.nan


@dataclass(frozen=True)
class Whisker:
    """Where an interval lies in a drawing of 0 to 100 wide, 0 in the middle."""

    low: float
    middle: float
    high: float


def whiskers(rows: Sequence[HeadlineRow]) -> tuple[list[Whisker | None], float]:
    """(a drawing of each row's difference, the difference at its right edge); None if there is no interval."""
    drawn = [
        row.difference for row in rows if row.difference.text().endswith("]") and not math.isnan(row.difference.low)
    ]
    reach = max((abs(end) for one in drawn for end in (one.low, one.high)), default=0.0) or 1.0
    scale = 48 / reach
    return [
        Whisker(*(50 + scale * value for value in (row.difference.low, row.difference.estimate, row.difference.high)))
        if row.difference in drawn
        else None
        for row in rows
    ], reach


# --- prompts side by side

CHANGED, ANY = "drawn from the pairs whose verdict changed", "drawn at random from all pairs"
Segments = list[tuple[str, bool]]  # (text, does it differ)


@dataclass(frozen=True)
class Example:
    """A clean and a typo prompt with their answers, each cut into equal and different pieces."""

    style: str
    element_index: int | str
    why: str
    clean_prompt: Segments
    style_prompt: Segments
    clean_answer: Segments
    style_answer: Segments
    clean_verdict: str = ""
    style_verdict: str = ""


def visible(text: str) -> str:
    """`text` with characters that nobody sees (soft hyphen, zero width) shown as a dot, and cut where very long."""
    shown = "".join(INVISIBLE.get(letter, letter) for letter in text)
    return shown if len(shown) <= MAX_TEXT else shown[:MAX_TEXT] + " […]"


def word_difference(clean: str, other: str) -> tuple[Segments, Segments]:
    """Both texts cut into words, blanks and marks, joined to pieces that are equal or differ; joined they are whole."""
    a, b = (re.findall(r"\w+|\s+|[^\w\s]", visible(text)) for text in (clean, other))
    left: Segments = []
    right: Segments = []
    for kind, a0, a1, b0, b1 in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        for pieces, target in (("".join(a[a0:a1]), left), ("".join(b[b0:b1]), right)):
            if pieces:
                target.append((pieces, kind != "equal"))
    return left, right


def pick_examples(
    indices: dict[str, list[int]], clean: str, verdicts: dict[tuple[str, int], str], count: int, seed: int
) -> list[tuple[str, int, str]]:
    """(style, row, why) of `count` pairs: up to half whose verdict differs from the clean one's, the rest at random.

    indices: rows of each style. Both halves are drawn with `seed`, styles in turn, so a common style is not all.
    """
    clean_rows = set(indices.get(clean, []))
    others = [style for style in indices if style != clean and not is_again(style)]
    pairs = [(style, row) for style in others for row in indices[style] if row in clean_rows]
    changed = [pair for pair in pairs if (was := verdicts.get((clean, pair[1]))) and verdicts.get(pair, was) != was]
    generator = random.Random(seed)
    first = _in_turn(changed, generator)[: count // 2]
    rest = [pair for pair in _in_turn(pairs, generator) if pair not in set(first)]
    drawn = [(*pair, CHANGED) for pair in first]
    return drawn + [(*pair, ANY) for pair in rest[: count - len(first)]]


def _in_turn(pairs: list[tuple[str, int]], generator: random.Random) -> list[tuple[str, int]]:
    """The pairs in random order, a different style each time as long as there is one."""
    by_name: dict[str, list[tuple[str, int]]] = {}
    for pair in generator.sample(pairs, len(pairs)):
        by_name.setdefault(pair[0], []).append(pair)
    queues, ordered = list(by_name.values()), []
    while queues:
        ordered += [queue.pop() for queue in queues]
        queues = [queue for queue in queues if queue]
    return ordered


def read_examples(
    run: Run, chosen: Sequence[tuple[str, int, str]], clean: str, verdicts: dict[tuple[str, int], str]
) -> list[Example]:
    """The chosen pairs with their texts; one .pt file in memory at a time."""
    wanted = {(style, row) for style, row, _ in chosen} | {(clean, row) for _, row, _ in chosen}
    found: dict[tuple[str, int], Prediction] = {}
    for one in iter_predictions(run, [style for style in run.styles if any(style == pair[0] for pair in wanted)]):
        if (one.style, one.original_index) in wanted and one.sample == 0:
            found[one.style, one.original_index] = one
    examples = []
    for style, row, why in chosen:
        before, after = found[clean, row], found[style, row]
        prompts = word_difference(before.prompt or "", after.prompt or "")
        answers = word_difference(*(answer_of(x) for x in (before, after)))
        judged = [verdicts.get(key, "") for key in ((clean, row), (style, row))]
        examples.append(Example(style, after.element_index, why, *prompts, *answers, *judged))
    return examples


def answer_of(one: Prediction) -> str:
    """The response, blanks at its ends cut; prompt and response where a file of the reference format has but both."""
    return (one.final_prediction if one.response is None else one.response).strip()


def verdicts_in(results: Path) -> dict[tuple[str, int], str]:
    """(style, row) → right or wrong, from maths_items.csv and answers_items.csv; empty if there is none."""
    found: dict[tuple[str, int], str] = {}
    known = {"1": "right", "1.0": "right", "True": "right", "0": "wrong", "0.0": "wrong", "False": "wrong"}
    for path in item_files(results):
        items = read_table(path)
        if items is not None:
            first = items.drop_duplicates(["style", "original_index"])
            marks = zip(first["style"].astype(str), first["original_index"], first["correct"], strict=True)
            scored = {(style, int(row)): known[str(mark)] for style, row, mark in marks if str(mark) in known}
            found = scored | found
    return found


# --- plots and tables


@dataclass(frozen=True)
class Figure:
    """An embedded picture."""

    name: str
    caption: str
    data: str


# --- the page


def run_context(run: Run, results: Path, examples: int, seed: int) -> dict[str, Any]:
    """All that the template needs to know about one run."""
    indices = {style: list(row_indices(run, style)) for style in run.styles}
    rows = headline_rows({style: len(numbers) for style, numbers in indices.items()}, results)
    columns, lines = headline_table(rows)
    drawn, reach = whiskers(rows)
    clean = run.clean_style
    verdicts = verdicts_in(results)
    chosen = pick_examples(indices, clean, verdicts, examples, seed) if clean else []
    return {
        "name": run.name,
        "styles": len(indices),
        "rows": len({number for numbers in indices.values() for number in numbers}),
        "prompts": sum(len(numbers) for numbers in indices.values()),
        "failures": sum(len(read_failures(folder)) for folder in run.styles.values()),
        "unfinished": warn_unfinished(run),
        "outdated": outdated(run, results),
        "clean": clean,
        "made_with": made_with(run),
        "captured": captured_on(run),
        "headline_columns": columns,
        "headline": list(zip(lines, drawn, strict=True)),
        "headline_note": headline_note(columns, results),
        "drawn": any(drawn),
        "reach": f"{100 * reach:.0f}",
        "sections": sections_of(results),
        "examples": read_examples(run, chosen, clean or "", verdicts),
        "drawn_changed": sum(why == CHANGED for *_, why in chosen),
        "settings": settings_of(run),
        "environments": environments_of(run),
    }


def made_with(run: Run) -> str:
    """Model, revision and dtype of the run in a few words."""
    settings = {name: value.strip('"') for name, value in settings_of(run)}
    revision, files = settings.get("revision", "None"), settings.get("model_fingerprint", "unknown")
    pinned = f"revision {revision}" if revision != "None" else f"fingerprint of its files {files}"
    return f"{settings.get('model_name', 'unknown')}, {pinned}, {settings.get('dtype', 'dtype unknown')}"


def headline_note(columns: Sequence[str], results: Path) -> str:
    """What the columns of the opening table mean."""
    attention = read_table(results / "prompt_task_fraction_aggregate.csv")
    query = "" if attention is None or "query" not in attention.columns else str(attention["query"].iloc[0])
    whose = {"last": "of the last prompt token's attention", "mean": "of the mean prompt token's attention"}
    notes = {
        "n": "n: prompts run",
        "accuracy, %": "accuracy: answers that are right by the gold answer",
        "difference, points": "difference: to the clean form, on the rows that both have, clustered by template",
        "p (Holm)": "p: adjusted for the number of styles",
        "similarity": "similarity: cosine between the embeddings of the answer and of the clean answer",
        "attention on task": f"attention on task: share {whose.get(query, 'of attention')}, mean over layers and heads",
    }
    parts = [notes[name] for name in columns if name in notes]
    parts.append(f"[{DASH}]: no interval, because nothing varied")
    return "; ".join([*parts, *detectable(read_table(first_there(results, SUMMARY_FILES)))]) + "."


def detectable(summary: pd.DataFrame | None) -> list[str]:
    """The smallest accuracy difference that the run could have found, as a phrase; nothing if it is unknown."""
    name = "minimum_detectable_difference"
    if summary is None or name not in summary.columns or not summary[name].notna().any():
        return []
    low, high = (f"{100 * value:.1f}" for value in (summary[name].min(), summary[name].max()))
    return [
        f"accuracy differences below {low} to {high} points, depending on the style, are too small for this n to detect"
        " (80 % power)"
    ]


def sections_of(results: Path) -> list[dict[str, Any]]:
    """Every section that has a plot or a table in `results`; plots that no section names come last.

    `more`: names of pictures that stay in the results folder.
    """
    found: list[dict[str, Any]] = []
    used: set[Path] = set()
    for section in SECTIONS:
        figures: list[Figure] = []
        more: list[str] = []
        for plots in section.plots:
            for path in sorted(set(results.glob(plots.pattern)) - used):
                used.add(path)
                if plots.left_out:
                    more.append(path.name)
                else:
                    figures.append(embedded(path, plots.caption))
        tables = [(table, one.caption) for one in section.tables if (table := rows_of(results, one)) is not None]
        if figures or more or tables:
            found.append({"title": section.title, "figures": figures, "more": more, "tables": tables})
    if rest := [embedded(path, "") for path in sorted(set(results.glob("*.png")) - used)]:
        found.append({"title": "Further plots", "figures": rest, "more": [], "tables": []})
    return found


def rows_of(results: Path, wanted: TableOf) -> Table | None:
    """The rows of a CSV that a section asks for; None if there are none."""
    frame = read_table(results / wanted.source)
    if frame is None:
        return None
    total = len(frame)
    for column, value in wanted.only:
        frame = frame[frame[column] == value] if column in frame.columns else frame
    if wanted.by is not None:
        if wanted.by not in frame.columns:
            return None
        places = {style: place for place, style in enumerate(frame["style"].unique())}
        frame = frame.dropna(subset=[wanted.by]).sort_values(wanted.by, kind="stable")
        frame = frame.sort_values("style", key=lambda styles: styles.map(places), kind="stable")
    if wanted.prefer is not None and wanted.prefer[0] in frame.columns:
        liked = frame[wanted.prefer[0]].astype(str).str.startswith(wanted.prefer[1])
        frame = frame[liked] if liked.any() else frame
    if wanted.per_style is not None and "style" in frame.columns:
        frame = frame.groupby("style", sort=False).head(wanted.per_style)
    return to_table(frame, wanted.source, wanted.columns, total) if len(frame) else None


def embedded(path: Path, caption: str) -> Figure:
    """A picture as text inside the page: a PNG of COLOURS colours, a third of its file's size."""
    try:
        with Image.open(path) as picture:
            whole = picture.convert("RGBA")
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({one_line(str(error), 100)}); delete it and run its stage again"
        ) from None
    flat = Image.alpha_composite(Image.new("RGBA", whole.size, "white"), whole).convert("RGB")
    # The default method merges rare colours, and a colour bar loses its blues; MAXCOVERAGE tints the grey bands.
    reduced = flat.quantize(COLOURS, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    data = io.BytesIO()
    reduced.save(data, "PNG", optimize=True)
    return Figure(path.name, caption, base64.b64encode(data.getvalue()).decode("ascii"))


def settings_of(run: Run) -> list[tuple[str, str]]:
    """(name, value) of the settings that made the run; one that differs between styles is listed for each."""
    by_name: dict[str, dict[str, str]] = {}
    for style in run.styles:
        for name, value in _flat(run.settings(style).get("settings", {})):
            by_name.setdefault(name, {})[style] = value
    by_name.pop("style", None)
    return [(name, _joined(values)) for name, values in by_name.items()]


def _flat(settings: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value)
        else:
            yield name, json.dumps(value, ensure_ascii=False) if isinstance(value, str) else str(value)


def _joined(values: dict[str, str]) -> str:
    """`value`, or `value (most styles); other (style a, style b)`."""
    styles: dict[str, list[str]] = {}
    for style, value in values.items():
        styles.setdefault(value, []).append(style)
    ordered = sorted(styles, key=lambda value: -len(styles[value]))
    tails = [f"; for {', '.join(styles[value])}: {value}" for value in ordered[1:]]
    return ordered[0] + "".join(tails)


def environments_of(run: Run) -> list[str]:
    """What the run was made with (versions, device, commit), each different one once."""
    seen: dict[str, None] = {}
    for style in run.styles:
        for one in run.settings(style).get("environments", []):
            seen[", ".join(f"{name} {value}" for name, value in one.items())] = None
    return list(seen)


def captured_on(run: Run) -> str:
    """Day on which the newest .pt file of the run was written."""
    newest = max((path.stat().st_mtime for style in run.styles for path in run.files(style)), default=0.0)
    return time.strftime("%Y-%m-%d", time.localtime(newest))


def build_report(runs: Sequence[tuple[Run, Path]], report: Path, examples: int = 10, seed: int = 0) -> Path:
    """Write the report of (run, its results folder) pairs to `report`, and return that path."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(Path(__file__).resolve().parent)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    page = environment.get_template(TEMPLATE).render(
        title=report.resolve().parent.name,
        runs=[run_context(run, results, examples, seed) for run, results in runs],
        today=time.strftime("%Y-%m-%d"),
        seed=seed,
    )
    write_text(report, page)
    return report


# --- script


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--run_dir", type=Path, nargs="+", required=True, help="run folders of stage 2")
    parser.add_argument("--results_dir", type=Path, nargs="+", help="their results; default: results/<run>")
    parser.add_argument("--report", type=Path, help="default: report.html in the (first) results folder")
    parser.add_argument("--examples", type=int, default=10, help="pairs of prompts shown side by side, for each run")
    parser.add_argument("--seed", type=int, default=0, help="which pairs are drawn")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the report and print its path."""
    args = parse_args(argv)
    if args.examples < 0:
        raise UserError(f"--examples {args.examples}: must be at least 0")
    runs = runs_with_results(args.run_dir, args.results_dir)
    report = args.report or runs[0][1] / "report.html"
    note_read(Path(__file__).with_name(TEMPLATE))
    for run, results in runs:
        note_read(results)
        if old := outdated(run, results):
            get_logger().warning(f"{results}: {old} are older than the run: run stages 3 to 5 again")
    print(build_report(runs, report, args.examples, args.seed))
    return 0


def runs_with_results(paths: Sequence[Path], folders: Sequence[Path] | None) -> list[tuple[Run, Path]]:
    """Each run with its results folder. Among several, a run that has no .pt file is left out with a warning."""
    if folders and len(folders) != len(paths):
        raise UserError(f"{len(paths)} run folders but {len(folders)} results folders; give one for each run")
    found = []
    for number, path in enumerate(paths):
        try:
            run = open_run(path)
        except UserError as error:
            if len(paths) == 1:
                raise
            get_logger().warning(f"{error}; left out of the report")
            continue
        results = folders[number] if folders else results_of(run)
        if not results.is_dir():
            raise UserError(
                f"{results}: no such results folder{near_folder(results)}; give the --results_dir of stages 3 to 5"
            )
        found.append((run, results))
    if not found:
        raise UserError("no run holds a .pt file; run stage 2 first")
    return found


if __name__ == "__main__":
    run_main(main)
