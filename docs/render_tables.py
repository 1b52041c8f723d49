"""Write the generated parts of the documentation: tables of measured figures, and the stages' lists of files.

Reads   docs/measured/*.json, the first sentence of every module; with --example or --causes the CSVs of the runs that
        docs/EXAMPLE.md describes; with --facts those of the demo's facts
Writes  what is between `<!-- table: NAME -->` and `<!-- /table -->` in README.md and docs/*.md, and between
        `<!-- files -->` and `<!-- /files -->` in a stage's README.md, the `<!-- fields -->` of a .pt file, the
        `<!-- styles -->` of make_variants.py; with --example docs/measured/example.json; with --causes causes.json;
        with --facts facts.json

    python docs/render_tables.py
    python docs/render_tables.py --example results/example/maths
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "1_utils" / "run_scripts"))

from file_output import read_csv
from pt_fields import fields_table
from style_names import MEANINGS

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
PLACE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- /table -->)", re.DOTALL)
FIELDS = re.compile(r"(<!-- fields -->\n).*?(<!-- /fields -->)", re.DOTALL)
STYLES = re.compile(r"(<!-- styles -->\n).*?(<!-- /styles -->)", re.DOTALL)
FILES = re.compile(r"(<!-- files -->\n).*?(<!-- /files -->)", re.DOTALL)
Record = dict[str, Any]


@dataclass(frozen=True)
class Layout:
    """How the records of a JSON file become a table: what names a row, a column and a cell."""

    corner: str
    row: Callable[[Record], str]
    column: Callable[[Record], str]
    cell: Callable[[Record], str]


WAYS = {
    "ours 0 5 10 15": "error_interp: all layers' attention mass and pooled states, top-k logits, 4 raw layers",
    "ours none": "error_interp with `--raw_layers none`",
    "two_pass 0 5 10 15": "two passes of transformers: `generate()`, then eager attention; 4 raw layers",
    "nnsight 0 5 10 15": "nnsight 0.8.1, tracing inside `generate()`: states of 4 layers, no attention",
    "transformer_lens 0 5 10 15": "TransformerLens 4.3.0: `generate`, then `run_with_cache`: states and patterns of "
    "4 layers",
    "generate none": "`generate()` alone",
}
JOBS = {
    "maths": "96 maths prompts after three shots, answers end at their line",
    "instructions": "48 instructions of 10 to 200 words, 48 new tokens",
}
PATCHING = {
    "forward": "plain forward passes of the whole prompt",
    "groups": "residual stream: 30 layers × 4 groups of tokens",
    "heads": "270 heads, one by one",
    "attribution": "attribution of all heads, MLPs and neurons ÷ the 270 heads",
    "attribution, own texts": "the same, if the prompts share no text",
}
EXAMPLE = {  # measure: (its line in the table, decimals)
    "accuracy": ("accuracy − `normal`, in points", 1),
    "heads_from_clean": ("heads of 270 whose attention to the edited words changes from `normal` (BH, 0.05)", 0),
    "heads_from_control": ("the same from the control", 0),
    "split_half": ("split-half rank correlation of those changes from the control", 2),
    "head_22_4": ("attention of head 22.4 to the typo ÷ to the control's words", 2),
    "next_token_kl": (
        "KL of the next token to `normal` ÷ the control's (geometric means of a lower bound, from 1,000 logits)",
        2,
    ),
    "recovery": ("layers by which the word is recovered later than the control's", 1),
}
FACTS = {  # part of the change in accuracy: its line in the table
    "total": "typo − clean, in points",
    "fragmentation": "of it by more tokens: control − clean",
    "spelling": "of it by the letters: typo − control",
}
CAUSES = {  # positions, donor: the column of the table
    ("edited", "own"): "edited tokens",
    ("edited_last", "own"): "the last of them",
    ("after", "own"): "other tokens after the first edit",
    ("readout", "own"): "last prompt token and response",
    ("edited", "other"): "edited tokens, from another prompt",
}


def number(record: Record, key: str = "value", decimals: int = 2) -> str:
    """`1.65 [1.44, 1.88]`, without the interval where the record has none."""
    ends = ", ".join(f"{record[end]:.{decimals}f}" for end in ("low", "high") if end in record)
    return (f"{record[key]:.{decimals}f}" + (f" [{ends}]" if ends else "")).replace("-", "−")


def _way(record: Record) -> str:
    return WAYS.get(f"{record['way']} {record['raw_layers']}") or str(record["way"])


def _batch(record: Record) -> str:
    return f"{record['rows']} × {record['prompt_tokens']:,} tokens"


LAYOUTS = {
    "capture_batches": Layout(
        "seconds ÷ `generate()` alone", _way, _batch, lambda record: number(record, "ratio_to_generate")
    ),
    "capture_memory": Layout(
        "peak memory above the model, MB", _way, _batch, lambda record: f"{record['peak_MB']:,.0f}"
    ),
    "capture_jobs": Layout(
        "job",
        lambda r: JOBS[r["job"]],
        lambda _: "÷ `generate()` loop",
        lambda r: number(r, "ratio_to_generate"),
    ),
    "gpu": Layout(  # of bench_capture.py --suite gpu
        "",
        lambda record: f"{record['part']}: {record['what']}",
        lambda record: str(record["measure"]),
        lambda record: "no room" if math.isnan(record["value"]) else f"{record['value']:.3g}",
    ),
    "patching": Layout(
        "seconds ÷ as many plain forward passes",
        lambda record: PATCHING[record["way"]],
        lambda record: f"the last {record['computed']} of 91 tokens",
        lambda r: number(r, "share_of_heads" if r["way"].startswith("attribution") else "share", 3),
    ),
    "facts": Layout(
        "facts",
        lambda record: FACTS[record["part"]],
        lambda record: f"`{record['style']}`",
        lambda record: number(record, decimals=0),
    ),
    "causes": Layout(
        "before layer",
        lambda record: str(record["layer"]),
        lambda record: CAUSES[record["positions"], record["donor"]],
        number,
    ),
    "facts_causes": Layout(
        "before layer",
        lambda record: str(record["layer"]),
        lambda record: CAUSES[record["positions"], record["donor"]],
        number,
    ),
    "example": Layout(
        "",
        lambda record: EXAMPLE[record["measure"]][0],
        lambda record: f"`{record['style']}`",
        lambda record: number(record, decimals=EXAMPLE[record["measure"]][1]),
    ),
}


def table(name: str) -> str:
    """The Markdown table of docs/measured/<name>.json."""
    return rendered(LAYOUTS[name], json.loads((DOCS / "measured" / f"{name}.json").read_text(encoding="utf-8"))["rows"])


def rendered(layout: Layout, records: Sequence[Record]) -> str:
    """The Markdown table of records."""
    columns = list(dict.fromkeys(layout.column(record) for record in records))
    cells: dict[str, dict[str, str]] = {}
    for record in records:
        cells.setdefault(layout.row(record), {})[layout.column(record)] = layout.cell(record)
    lines = [[layout.corner, *columns], ["---"] * (len(columns) + 1)]
    lines += [[row, *(found.get(column, "") for column in columns)] for row, found in cells.items()]
    return "".join(f"| {' | '.join(line)} |\n".replace("|  |", "| |") for line in lines)


def files(stage: Path) -> str:
    """The scripts of a stage and then its modules, each with the first sentence of its docstring."""
    lines: dict[bool, list[str]] = {True: [], False: []}
    for path in sorted(stage.glob("*/*.py")):
        text = path.read_text(encoding="utf-8")
        paragraph = " ".join((ast.get_docstring(ast.parse(text)) or "").partition("\n\n")[0].split())
        about = re.sub(r"(?<![.?!])$", ".", paragraph.partition(". ")[0])
        if path.name != "__init__.py":
            is_script = '__name__ == "__main__"' in text
            lines[is_script].append(f"- [{path.parent.name}/{path.name}]({path.parent.name}/{path.name}): {about}\n")
    return f"Scripts:\n\n{''.join(lines[True])}\nModules:\n\n{''.join(lines[False])}"


def filled(page: Path) -> str:
    """The text of a page with its generated parts as they should be."""
    text = PLACE.sub(lambda found: found[1] + table(found[2]) + found[3], page.read_text(encoding="utf-8"))
    text = FIELDS.sub(lambda found: found[1] + fields_table() + found[2], text)
    styles = "".join(f"| `{style}` | {meaning} |\n" for style, meaning in MEANINGS.items())
    text = STYLES.sub(lambda found: f"{found[1]}| style | what is changed |\n| --- | --- |\n{styles}{found[2]}", text)
    return FILES.sub(lambda found: found[1] + files(page.parent) + found[2], text)


def pages() -> list[Path]:
    """README.md, docs/*.md and the README.md of every stage."""
    return [ROOT / "README.md", *sorted(DOCS.glob("*.md")), *sorted(ROOT.glob("[0-9]_*/README.md"))]


def example_rows(results: Path, styles: Sequence[str] = ("swap", "missing", "three")) -> list[Record]:
    """The figures of the example, from the CSVs of its run."""
    import pandas as pd

    def read(name: str, **chosen: Any) -> pd.DataFrame:
        found = read_csv(results / f"{name}.csv", hint="run the command of docs/EXAMPLE.md")
        for column, value in chosen.items():
            found = found[found[column] == value]
        return found.set_index("style")

    accuracy = read("maths_summary")[["difference", "difference_ci_low", "difference_ci_high"]] * 100
    heads = read("head_sensitivity", measure="edited_log2_mass_last")
    halves = read("head_overlap", measure="edited_log2_mass_last", reference_form="control")
    against = ["difference_vs_control", "difference_ci_low_vs_control", "difference_ci_high_vs_control"]
    one_head = 2 ** heads[(heads["layer"] == 22) & (heads["head"] == 4)][against]
    shift = ["difference_to_control", "difference_ci_low", "difference_ci_high"]
    figures = {
        "accuracy": accuracy,
        "heads_from_clean": (heads["p_adjusted"] < 0.05).groupby(level=0).sum(),
        "heads_from_control": (heads["p_adjusted_vs_control"] < 0.05).groupby(level=0).sum(),
        "split_half": halves[halves["other_style"] == halves.index]["cross_half_spearman"],
        "head_22_4": one_head,
        "next_token_kl": 10 ** read("activation_diffs_summary", measure="log10_next_token_kl")[shift],
        "recovery": read("activation_diffs_summary", measure="recovery_depth")[shift],
    }
    rows = []
    for measure, found in figures.items():
        for style in styles:
            values = [round(float(value), 4) for value in pd.Series(found.loc[style]).to_list()]
            rows.append(
                {"measure": measure, "style": style} | dict(zip(("value", "low", "high"), values, strict=False))
            )
    return rows


def facts_rows(results: Path, styles: Sequence[str] = ("swap", "typo@1", "typo@2")) -> list[Record]:
    """The parts of the change in accuracy of the demo's facts, in points."""
    parts = read_csv(results / "decomposition.csv", hint="run `make run`").query("measure == 'accuracy'")
    lines = parts.set_index("style")
    return [
        {"part": part, "style": style}
        | {
            name: round(100 * float(lines.loc[style, f"{part}{column}"]), 2)
            for name, column in (("value", ""), ("low", "_ci_low"), ("high", "_ci_high"))
        }
        for part in FACTS
        for style in styles
    ]


def causes_rows(results: Path) -> list[Record]:
    """R of the residual stream by layer, positions and donor."""
    lines = read_csv(results / "patching_layers.csv", hint="run the commands of docs/EXAMPLE.md")
    lines = lines.query("site == 'resid_pre' and direction == 'denoising'").set_index(["layer", "positions", "donor"])
    found = lines[["R", "R_ci_low", "R_ci_high"]].set_axis(["value", "low", "high"], axis=1)
    return [
        {"layer": layer, "positions": positions, "donor": donor}
        | found.loc[(layer, positions, donor)].dropna().round(4).to_dict()  # no interval if it cannot be another number
        for layer in sorted({*found.index.get_level_values("layer")})
        for positions, donor in CAUSES
        if (layer, positions, donor) in found.index
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Take in the example's figures if asked to, then write every generated part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--example", type=Path, help="results folder of the example's run")
    parser.add_argument("--facts", type=Path, help="results folder of the demo's facts")
    parser.add_argument("--causes", type=Path, help="results folder of the example's patches")
    args = parser.parse_args(argv)
    taken_in = (
        ("example", args.example, example_rows),
        ("facts", args.facts, facts_rows),
        ("facts_causes", args.facts, causes_rows),
        ("causes", args.causes, causes_rows),
    )
    for name, results, rows in taken_in:
        if results:
            path = DOCS / "measured" / f"{name}.json"
            content = json.loads(path.read_text(encoding="utf-8")) | {"rows": rows(results)}
            path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    for page in pages():
        page.write_text(filled(page), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
