"""A stage's part of the report: `<name>.section.json` in the results folder, written by the script of the tables.

A stage declares a `Section` beside its plots; `write_section` writes it with the sentences that its rules make from the
tables. build_report.py and run_pipeline.py read these files and know no stage's columns.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from command_line import UserError, one_line
from file_output import file_word, write_json

if TYPE_CHECKING:
    from findings import Rule

ENDING = ".section.json"


@dataclass(frozen=True)
class Finding:
    """A sentence, its rule and table, the number of prompts, and whether it claims an effect.

    style, p: of a sentence about one style, so that a reader of several can choose; p None: unknown. question: that it
    answers; sentences of one question are shown together. head: `layer.head` that it names first, for the pair viewer.
    aside: shown if the reader opens it.
    """

    rule: str
    text: str
    source: str
    n: int
    is_claim: bool
    style: str = ""
    p: float | None = None
    question: str = ""
    head: str = ""
    aside: bool = False


@dataclass(frozen=True)
class Plots:
    """Pictures of one kind: those that match `pattern`. If it has a `*`, that is the picture's style, or several styles
    joined by `+`, and the reader picks a picture by them.

    folded: shown if the reader opens it. left_out: they stay in the results folder and are only named.
    """

    pattern: str
    caption: str
    folded: bool = False
    left_out: bool = False


@dataclass(frozen=True)
class TableOf:
    """Rows of a CSV: those where `only` holds, the first `per_style` of each style; `columns` empty: all.

    by: the column that says which are the first; a row without it is left out. prefer: (column, beginnings): only rows
    with such a value, if there are any. intervals: (column, low, high) of those that are not called <column>_ci_low.
    """

    source: str
    caption: str
    columns: Sequence[str] = ()
    only: Sequence[Sequence[str]] = ()
    per_style: int | None = None
    by: str | None = None
    prefer: Sequence[Any] | None = None
    intervals: Sequence[Sequence[str]] = ()


@dataclass(frozen=True)
class Headline:
    """A column of the table over all styles: an estimate with its interval from a CSV with one row a style.

    sources: the first of them that is there. column, low, high: in that file; low empty: a number without an interval.
    look: percent, points (percent with a sign), p, or empty. only: as in TableOf.
    """

    title: str
    note: str
    sources: Sequence[str]
    column: str
    low: str = ""
    high: str = ""
    look: str = ""
    only: Sequence[Sequence[str]] = ()


@dataclass(frozen=True)
class Section:
    """What a script's results are in the report. order: of the sections and their sentences; title: its heading.

    Sections of one title come under one heading.
    """

    name: str
    title: str
    order: int
    plots: Sequence[Plots] = ()
    tables: Sequence[TableOf] = ()
    headlines: Sequence[Headline] = ()
    rules: Sequence[Rule] = ()


def write_section(folder: Path, section: Section, styles: Iterable[str] = ()) -> None:
    """Write <name>.section.json: the files that are in `folder`, and the sentences on its tables.

    styles: of the run, so that a picture of one style is shown with the style's own name.
    """
    from findings import sentences  # with pandas: who reads sections need not wait for it

    names = {file_word(style): style for style in styles}
    plots: list[dict[str, Any]] = []
    for one in section.plots:
        before, star, after = one.pattern.partition("*")
        found = {}
        for path in sorted(folder.glob(one.pattern)):
            word = path.name[len(before) : len(path.name) - len(after)] if star else ""
            if not any(path.name in other["files"] for other in plots):
                found[path.name] = [names.get(part, part) for part in word.split("+") if part]
        plots.append({**asdict(one), "files": found})
    content = {
        "title": section.title,
        "order": section.order,
        "plots": plots,
        "tables": [asdict(one) for one in section.tables],
        "headlines": [asdict(one) for one in section.headlines],
        "findings": [asdict(one) for one in sentences(section.rules, folder)],
    }
    write_json(folder / f"{section.name}{ENDING}", content)


def read_sections(folder: Path) -> list[dict[str, Any]]:
    """The sections in a results folder, in their order. Raises UserError if one is damaged."""
    found = []
    for path in folder.glob(f"*{ENDING}"):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            found.append(
                {
                    "title": str(content["title"]),
                    "order": int(content["order"]),
                    "plots": content["plots"],
                    "tables": [TableOf(**one) for one in content["tables"]],
                    "headlines": [Headline(**one) for one in content["headlines"]],
                    "findings": [Finding(**one) for one in content["findings"]],
                }
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            text = one_line(str(error), 100)
            raise UserError(f"{path}: cannot be read ({text}); delete it and run its stage again") from None
    return sorted(found, key=lambda section: section["order"])


def findings_of(sections: Sequence[Mapping[str, Any]], order: Sequence[str]) -> list[tuple[Finding, str]]:
    """(sentence, heading of its section), one for each rule: of the first style in `order` that has one, else of that
    with the smallest p. Sentences that answer one question follow each other."""
    by_rule: dict[str, list[tuple[Finding, str]]] = {}
    for section in sections:
        for one in section["findings"]:
            by_rule.setdefault(one.rule, []).append((one, section["title"]))
    places = {style: place for place, style in enumerate(order)}

    def rank(found: tuple[Finding, str]) -> tuple[int, float]:
        one = found[0]
        return places.get(one.style, len(places)), 2.0 if one.p is None else one.p

    chosen = [min(several, key=rank) for several in by_rule.values()]
    questions = list(dict.fromkeys(one.question for one, _ in chosen))
    return sorted(chosen, key=lambda found: questions.index(found[0].question))
