"""Write one self-contained HTML report: what was found, tables, plots, settings, and prompts side by side.

Reads   run folders of stage 2 (outputs/<run>) and what stages 3 to 5 wrote for them (results/<run>/*.section.json and
        the CSVs and pictures that these name); what is not there is left out
Writes  report.html: plots embedded, nothing loaded from elsewhere; all text of models and files is escaped

    python 1_utils/run_scripts/build_report.py --run_dir outputs/demo/maths --results_dir results/demo/maths
"""

from __future__ import annotations

import argparse
import base64
import difflib
import io
import json
import random
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from answer_files import item_files
from command_line import UserError, make_parser, one_line, run_main
from file_output import write_text
from logger import get_logger
from PIL import Image
from read_predictions import Prediction, iter_predictions
from report_section import findings_of, read_sections
from report_tables import Table, overview, read_table, rows_of, visible, whiskers, worst_first
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
from style_names import MATCHED, NEUTRAL, is_again, is_variant, matched_style, meaning_of

TEMPLATE = "report_template.html"
COLOURS = 256  # of a picture
CANDIDATES = 20  # rows from which the prompt at the top is chosen


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
        prompts = word_difference(before.prompt or "", with_cuts(after.prompt or "", style))
        answers = word_difference(*(answer_of(x) for x in (before, after)))
        judged = [verdicts.get(key, "") for key in ((clean, row), (style, row))]
        examples.append(Example(style, after.element_index, why, *prompts, *answers, *judged))
    return examples


def with_cuts(prompt: str, style: str) -> str:
    """The prompt with a bar where a control cuts words: a soft hyphen in the file, which the model did not see."""
    return prompt.replace("\u00ad", "|") if matched_style(style) else prompt


def forms_of_one_prompt(
    run: Run, indices: dict[str, list[int]], order: Sequence[str], verdicts: dict[tuple[str, int], str]
) -> list[Example]:
    """One prompt in the worst style and in its control, to show at the top what their names mean.

    Of the first rows that have all forms, one that the style turns from right to wrong if there is one, and whose
    control differs from the clean prompt.
    """
    clean = run.clean_style or ""
    variants = [style for style in [*order, *indices] if style in indices and is_variant(style, clean)]
    if clean not in indices or not variants:
        return []
    worst = variants[0]
    shown = [worst, *(name for name in (MATCHED + worst, NEUTRAL + worst) if name in indices)]
    rows = sorted(set(indices[clean]).intersection(*(indices[style] for style in shown)))
    rows.sort(key=lambda row: (verdicts.get((clean, row), ""), verdicts.get((worst, row), "")) != ("right", "wrong"))
    found = read_examples(run, [(style, row, "") for row in rows[:CANDIDATES] for style in shown], clean, verdicts)
    groups = [found[place : place + len(shown)] for place in range(0, len(found), len(shown))]
    differs = (group for group in groups if all(any(new for _, new in one.style_prompt) for one in group))
    return next(differs, groups[0] if groups else [])


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
class Picture:
    """An embedded picture; label: the styles that it shows, if it is one of several."""

    name: str
    label: str
    data: str


@dataclass(frozen=True)
class Pictures:
    """Pictures of one kind: one, or several of which the reader picks one."""

    caption: str
    folded: bool
    several: list[Picture]


@dataclass
class Heading:
    """What comes under one heading. more: names of pictures that stay in the results folder."""

    title: str
    pictures: list[Pictures]
    more: list[str]
    tables: list[Table]


def headings_of(sections: Sequence[dict[str, Any]], results: Path, order: Sequence[str]) -> list[Heading]:
    """The sections under their headings; pictures that none of them names come last. order: of the styles."""
    found: dict[str, Heading] = {}
    named: set[str] = set()
    for section in sections:
        heading = found.setdefault(section["title"], Heading(section["title"], [], [], []))
        for plots in section["plots"]:
            files = {name: styles for name, styles in plots["files"].items() if (results / name).is_file()}
            named |= files.keys()
            if plots["left_out"]:
                heading.more += files
            elif files:
                ranks = {style: place for place, style in enumerate(order)}
                first = {
                    name: min((ranks.get(one, 99) for one in styles), default=99) for name, styles in files.items()
                }
                ordered = sorted(files, key=lambda name: first[name])
                several = [embedded(results / name, ", ".join(files[name])) for name in ordered]
                heading.pictures.append(Pictures(plots["caption"], plots["folded"], several))
        heading.tables += [table for one in section["tables"] if (table := rows_of(results, one)) is not None]
    if rest := [path for path in sorted(results.glob("*.png")) if path.name not in named and path.name[0] != "."]:
        found["Further plots"] = Heading(
            "Further plots", [Pictures("", False, [embedded(path)]) for path in rest], [], []
        )
    return [one for one in found.values() if one.pictures or one.more or one.tables]


# --- the page


def run_context(run: Run, results: Path, examples: int, seed: int) -> dict[str, Any]:
    """All that the template needs to know about one run."""
    indices = {style: list(row_indices(run, style)) for style in run.styles}
    sections, order = read_sections(results), worst_first(results)
    headlines = [one for section in sections for one in section["headlines"]]
    table = overview({style: len(numbers) for style, numbers in indices.items()}, headlines, results)
    drawn, reach = whiskers(table.changes)
    clean = run.clean_style
    verdicts = verdicts_in(results)
    chosen = pick_examples(indices, clean, verdicts, examples, seed) if clean else []
    headings = headings_of(sections, results, list(dict.fromkeys([*order, *indices])))
    findings = findings_of(sections, order)
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
        "forms": forms_of_one_prompt(run, indices, order, verdicts),
        "meanings": [(style, meaning) for style in indices if (meaning := meaning_of(style))],
        "findings": [found for found in findings if not found[0].aside],
        "asides": [found for found in findings if found[0].aside],
        "numbered": any("layer" in one.text for one, _ in findings),
        "overview": table,
        "drawn": drawn,
        "reach": f"{100 * reach:.0f}",
        "headings": headings,
        "examples": read_examples(run, chosen, clean or "", verdicts),
        "drawn_changed": sum(why == CHANGED for *_, why in chosen),
        "settings": settings_of(run),
        "environments": environments_of(run),
        "few_shot": few_shot_paragraphs(run),
    }


def made_with(run: Run) -> str:
    """Model, revision and dtype of the run in a few words."""
    settings = {name: value.strip('"') for name, value in settings_of(run)}
    revision, files = settings.get("revision", "None"), settings.get("model_fingerprint", "unknown")
    pinned = f"revision {revision}" if revision != "None" else f"fingerprint of its files {files}"
    return f"{settings.get('model_name', 'unknown')}, {pinned}, {settings.get('dtype', 'dtype unknown')}"


def embedded(path: Path, label: str = "") -> Picture:
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
    return Picture(path.name, label, base64.b64encode(data.getvalue()).decode("ascii"))


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


def few_shot_paragraphs(run: Run) -> int:
    """How many paragraphs of few-shot text every prompt follows."""
    text = run.settings(str(run.clean_style)).get("settings", {}).get("few_shot_text") or ""
    return len([part for part in text.split("\n\n") if part.strip()])


def captured_on(run: Run) -> str:
    """Day on which the newest .pt file of the run was written."""
    newest = max((path.stat().st_mtime for style in run.styles for path in run.files(style)), default=0.0)
    return time.strftime("%Y-%m-%d", time.localtime(newest))


def build_report(runs: Sequence[tuple[Run, Path]], report: Path, examples: int = 10, seed: int = 0) -> Path:
    """Write the report of (run, its results folder) pairs to `report`, and return that path."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from report_viewer import viewer_of

    loader = FileSystemLoader(Path(__file__).resolve().parent)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters["slug"] = lambda text: re.sub(r"\W+", "-", text.lower()).strip("-")
    environment.filters["tight"] = lambda text: re.sub(r" (?=%)|(?<=\b[np]) (?=[=<])|(?<=[=<]) (?=\d)", "\u00a0", text)
    page = environment.get_template(TEMPLATE).render(
        title=report.resolve().parent.name,
        runs=[
            {"id": f"run-{place}", **run_context(run, results, examples, seed)}
            for place, (run, results) in enumerate(runs, start=1)
        ],
        today=time.strftime("%Y-%m-%d"),
        seed=seed,
        viewer=viewer_of([(run, results, verdicts_in(results)) for run, results in runs]),
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
