"""What a run found, in sentences. Each is made from one table of the results folder by one rule of RULES.

A rule gives its claim if the table supports it, else what could have been detected, else nothing. What each rule asks
for: docs/METHODS.md, "Findings".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from answer_files import SUMMARY_FILES, first_there
from file_output import read_csv
from paired_stats import minimum_detectable_effect
from style_names import is_variant, matched_style, neutral_style

ALPHA = 0.05
SHOWN_HEADS = 3
HEAD_MEASURE = "edited_log2_mass_last"

Numbers = dict[str, Any]


@dataclass(frozen=True)
class Finding:
    """A sentence, the table that it is made from, the number of prompts, and whether it claims an effect."""

    text: str
    source: str
    n: int
    is_claim: bool


class Rule(NamedTuple):
    """A rule: the files whose first present one is its table; `numbers` of its sentence, with `holds` and `n`."""

    sources: Sequence[str]
    numbers: Callable[[pd.DataFrame, Path], Numbers | None]
    claim: str
    otherwise: str = ""


def findings(results: Path) -> list[Finding]:
    """The sentences on a results folder, in the order of RULES; none of a table that is missing."""
    found = []
    for rule in RULES:
        path = first_there(results, tuple(rule.sources))
        table = _table(path)
        numbers = None if table is None else rule.numbers(table, results)
        if numbers is not None and (template := rule.claim if numbers["holds"] else rule.otherwise):
            found.append(Finding(template.format(**numbers), path.name, int(numbers["n"]), bool(numbers["holds"])))
    return found


# --- rules: the numbers of a sentence from its table; None if the table has nothing for it


def accuracy_numbers(table: pd.DataFrame, _: Path) -> Numbers | None:
    """The style with the largest fall in accuracy; it holds if that is clear of 0 after Holm over the styles."""
    styles = _compared(table)
    if styles.empty:
        return None
    worst = styles.loc[styles["difference"].idxmin()]
    clean = table[table["difference"].isna()]
    fell = styles[(styles["p_adjusted"] < ALPHA) & (styles["difference"] < 0)]
    limits = styles["minimum_detectable_difference_adjusted"].dropna()
    others = [str(style) for style in fell["style"] if style != worst["style"]]
    return {
        "holds": worst["style"] in set(fell["style"]),
        "style": worst["style"],
        "n": worst["n_paired"],
        "right": _percent(worst["estimate"]),
        "clean": _percent(clean["estimate"].iloc[0]) if len(clean) else "?",
        "points": _points(worst, "difference"),
        "p": _p(worst["p_adjusted"]),
        "styles": _count(len(styles), "style"),
        "others": f" It also falls with {_join(others)}." if others else "",
        "limits": ""
        if limits.empty
        else f" A change of {_range(100 * limits)} points would have been found (80 % power).",
    }


def part_numbers(is_control: Callable[[str], str | None]) -> Callable[[pd.DataFrame, Path], Numbers | None]:
    """The two parts of the change in accuracy with the worst style of those with such a control; it holds if the change
    is clear of 0 after Holm."""

    def numbers(table: pd.DataFrame, results: Path) -> Numbers | None:
        line = _line_of(table[table["measure"] == "accuracy"], results, "total_p_adjusted", is_control)
        if line is None:
            return None
        texts = {"share": ""}
        for part in ("fragmentation", "spelling"):
            sure = line[f"{part}_p_adjusted"] < ALPHA
            texts[part] = _points(line, part) + ("" if sure else ", not clear of 0")
        if not math.isnan(line["fragmentation_share_ci_low"]):
            low, share, high = (_percent(line[f"fragmentation_share{end}"], "") for end in ("_ci_low", "", "_ci_high"))
            texts["share"] = f" The first part is {share} % [{low}, {high}] of the change."
        holds = line["total_p_adjusted"] < ALPHA
        return {"holds": holds, "total": _points(line, "total"), **_names(line), **texts}

    return numbers


def slope_numbers(table: pd.DataFrame, _: Path) -> Numbers | None:
    """The change of accuracy per edit over at least two doses; it holds if that is clear of 0."""
    lines = table[(table["measure"] == "accuracy_slope") & (table["forms"].str.count(",") > 1)]
    if lines.empty:
        return None
    line = lines.iloc[0]
    return {
        "holds": line["p"] < ALPHA,
        "n": int(line["n"]),
        "forms": line["forms"],
        "points": _points(line, "estimate", "ci_low", "ci_high"),
        "p": _p(line["p"]).removeprefix("adjusted "),
        "limit": f"{100 * line['minimum_detectable_difference']:.1f}",
    }


def recovery_numbers(table: pd.DataFrame, results: Path) -> Numbers | None:
    """How much later than its control the worst style's word is recovered; it holds if clear of 0 after Holm."""
    of_depth = table[table["measure"] == "recovery_depth"]
    line = _line_of(of_depth, results, "p_adjusted")
    if line is None:
        return None
    counts = of_depth.set_index("style")
    control = counts.loc[line["control"]] if line["control"] in counts.index else None
    later = line["difference_to_control"] > 0
    return {
        "holds": line["p_adjusted"] < ALPHA,
        **_names(line, "n_with_control"),
        "recovered": f"{line['n'] - line['n_censored']:.0f} of {line['n']:.0f}",
        "of_control": ""
        if control is None
        else f", those of {line['control']} in {control['n'] - control['n_censored']:.0f} of {control['n']:.0f}",
        "layers": _number(line, "difference_to_control", 1, "difference_ci_low", "difference_ci_high", not later),
        "when": "later" if later else "earlier",
        "p": _p(line["p_adjusted"]),
    }


def peak_numbers(table: pd.DataFrame, results: Path) -> Numbers | None:
    """The layer at which the worst style's words are most often nearest to their clean twin; it holds if that differs
    from the control after Benjamini-Hochberg over styles and layers."""
    lines = table[(table["measure"] == "own_nearest") & (table["region"] == "edited")]
    lines = lines[lines["p_adjusted"].notna() & lines["control"].map(matched_style, na_action="ignore").notna()]
    if lines.empty:
        return None
    own = lines[lines["style"] == _preferred(lines, results, "p_adjusted")]
    line = own.loc[own["estimate"].idxmax()]
    fewer = line["difference_to_control"] < 0
    return {
        "holds": line["p_adjusted"] < ALPHA,
        **_names(line, "n_with_control"),
        "layer": int(line["layer"]),
        "share": _percent(line["estimate"]),
        "interval": f"[{_percent(line['ci_low'], '')}, {_percent(line['ci_high'], '')}]",
        "points": _points(line, "difference_to_control", "difference_ci_low", "difference_ci_high", fewer),
        "than": "fewer" if fewer else "more",
    }


def head_numbers(table: pd.DataFrame, results: Path) -> Numbers | None:
    """The heads whose attention to the edited words differs most surely from the control; it holds if one does after
    Benjamini-Hochberg over the heads and Bonferroni over the styles, and the ranking repeats on other prompts."""
    lines = table[(table["measure"] == HEAD_MEASURE) & table["p_adjusted_vs_control"].notna()]
    lines = lines[lines["control"].map(matched_style, na_action="ignore").notna()]
    if lines.empty:
        return None
    styles = lines["style"].nunique()
    own = lines[lines["style"] == _preferred(lines, results, "p_adjusted_vs_control")].sort_values("rank_vs_control")
    sure = own[own["p_adjusted_vs_control"] * styles < ALPHA]
    overlap = _table(results / "head_overlap.csv")
    halves = None
    if overlap is not None:
        same = (overlap["style"] == own["style"].iloc[0]) & (overlap["other_style"] == overlap["style"])
        same &= (overlap["measure"] == HEAD_MEASURE) & (overlap["reference_form"] == "control")
        halves = overlap[same].iloc[0] if same.any() else None
    repeats = halves is not None and halves["ci_low"] > 0
    n = int(own["n_vs_control"].max())
    limit = minimum_detectable_effect(own["standard_error_vs_control"].median(), n - 1, comparisons=len(own))
    named = [
        f"{head['layer']:.0f}.{head['head']:.0f} (×{_factor(head['difference_vs_control'])} "
        f"[{_factor(head['difference_ci_low_vs_control'])}, {_factor(head['difference_ci_high_vs_control'])}])"
        for _, head in sure.head(SHOWN_HEADS).iterrows()
    ]
    return {
        "holds": bool(len(sure)) and repeats,
        **_names(own.iloc[0], "n_vs_control"),
        "n": n,
        "count": f"{len(sure)} of {len(own)}",
        "heads": _join(named),
        "halves": "" if halves is None else _number(halves, "cross_half_spearman", 2),
        "limit": _factor(limit),
    }


def unit_numbers(unit: str) -> Callable[[pd.DataFrame, Path], Numbers | None]:
    """Units found on one half of the prompts that work harder on the worst style than on the clean word and the
    control; it holds if the set does on the other half after Holm, and some unit is confirmed there."""

    def numbers(table: pd.DataFrame, results: Path) -> Numbers | None:
        line = _line_of(table[table["unit"] == unit], results, "p_adjusted")
        if line is None:
            return None
        holds = line["p_adjusted"] < ALPHA and line["n_confirmed"] > 0
        counts = {"found": f"{line['n_found']:.0f}", "confirmed": f"{line['n_confirmed']:.0f}"}
        return {"holds": holds, **_names(line), **counts, "p": _p(line["p_adjusted"])}

    return numbers


PARTS = (
    "The change with {{style}}, {{total}} points on the prompts that have the control, has two parts: "
    "{{fragmentation}} points come {first}, {{spelling}} points {second} (n = {{n}}).{{share}}"
)
CHOSEN = (
    "Chosen on one half of the prompts, {{found}} {unit} for {{style}} than for the clean word and for {{control}}. "
    "On the other half {{confirmed}} of them are confirmed (n = {{n}}, {{p}})."
)
RULES = (
    Rule(
        SUMMARY_FILES,
        accuracy_numbers,
        "Of {styles}, {style} costs most: {right} of the answers are right, with the clean prompt {clean}. That is a "
        "change of {points} points (n = {n}, {p}).{others}",
        "None of {styles} lowers the accuracy detectably. The lowest change is {points} points, with {style} (n = {n}, "
        "{p}).{limits}",
    ),
    Rule(
        ("decomposition.csv",),
        part_numbers(matched_style),
        PARTS.format(
            first="from more tokens ({control}, the clean words in as many tokens)", second="from the letters"
        ),
    ),
    Rule(
        ("decomposition.csv",),
        part_numbers(neutral_style),
        PARTS.format(first="from the length ({control}, neutral sentences of as many tokens)", second="from the tone"),
    ),
    Rule(
        ("robustness_summary.csv",),
        slope_numbers,
        "Each one-letter edit changes the accuracy by {points} points on average ({forms}; n = {n}, {p}).",
        "The accuracy shows no slope over the number of edits ({forms}; n = {n}, {p}). A change of {limit} points per "
        "edit would have been found (80 % power).",
    ),
    Rule(
        ("activation_diffs_summary.csv",),
        recovery_numbers,
        "The words mistyped by {style} are recovered, which means that their state is the nearest to their own clean "
        "state, in {recovered} prompts{of_control}. That is {layers} layers {when} than with the control (n = {n}, "
        "{p}; a word that is never recovered counts as one layer beyond the last).",
    ),
    Rule(
        ("activation_diffs.csv",),
        peak_numbers,
        "The words mistyped by {style} are nearest to their own clean state most often at layer {layer}: in {share} "
        "{interval} of the prompts, {points} points {than} than with {control} (n = {n}).",
    ),
    Rule(
        ("head_sensitivity.csv",),
        head_numbers,
        "In {count} heads the last token's attention to the words mistyped by {style} differs from that in {control} "
        "(n = {n}). The surest (layer.head): {heads}. The ranking of the heads repeats on the other half of the "
        "prompts: rank correlation {halves}.",
        "No head can be named whose attention to the words mistyped by {style} differs from that in {control} and "
        "repeats on other prompts (n = {n}). In a typical head a change by the factor {limit} would have been found "
        "(80 % power).",
    ),
    Rule(("neuron_sensitivity_summary.csv",), unit_numbers("neuron"), CHOSEN.format(unit="neurons are more active")),
    Rule(
        ("neuron_sensitivity_summary.csv",),
        unit_numbers("head"),
        CHOSEN.format(unit="heads focus their attention more"),
    ),
)


# --- lines and styles


def _table(path: Path) -> pd.DataFrame | None:
    """A table; None if it is missing or has no rows."""
    table = read_csv(path) if path.is_file() and path.stat().st_size else None
    return None if table is None or table.empty else table


def _compared(table: pd.DataFrame) -> pd.DataFrame:
    """The lines of ways to write the prompt that are compared with the clean form; no controls, no repairs."""
    return table[table["difference"].notna() & table["style"].map(lambda style: is_variant(style, None))]


def _preferred(lines: pd.DataFrame, results: Path, p: str) -> str:
    """The style whose accuracy falls most, if these lines have it; else that of the smallest p."""
    summary = _table(first_there(results, SUMMARY_FILES))
    order = [] if summary is None else _compared(summary).sort_values("difference")["style"].tolist()
    return next((style for style in order if style in set(lines["style"])), str(lines.loc[lines[p].idxmin(), "style"]))


def _line_of(
    table: pd.DataFrame, results: Path, p: str, is_control: Callable[[str], str | None] = matched_style
) -> pd.Series | None:
    """The line of the preferred style among those with such a control; None if there is none."""
    lines = table[table["control"].map(is_control, na_action="ignore").notna() & table[p].notna()]
    return None if lines.empty else lines[lines["style"] == _preferred(lines, results, p)].iloc[0]


def _names(line: pd.Series, n: str = "n") -> Numbers:
    return {"style": line["style"], "control": line["control"], "n": int(line[n])}


# --- numbers as text


def _percent(value: float, sign: str = " %") -> str:
    return f"{100 * value:.0f}{sign}"


def _p(value: float) -> str:
    if math.isnan(value):
        return "no p, because nothing varied"
    return "adjusted p < 0.001" if value < 0.001 else f"adjusted p = {value:.3f}"


def _factor(log2: float) -> str:
    return f"{2**log2:.2f}"


def _range(values: pd.Series) -> str:
    low, high = values.min(), values.max()
    return f"{low:.1f}" if f"{low:.1f}" == f"{high:.1f}" else f"{low:.1f} to {high:.1f}"


def _join(words: Sequence[str]) -> str:
    return ", ".join(words[:-1]) + (" and " if len(words) > 1 else "") + words[-1] if words else ""


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"


def _number(
    line: pd.Series, name: str, digits: int, low: str = "ci_low", high: str = "ci_high", negated: bool = False
) -> str:
    """`4.7 [2.9, 6.6]`; with `negated` of the opposite number."""
    ends = sorted(-line[end] if negated else line[end] for end in (low, high))
    value = -line[name] if negated else line[name]
    texts = [f"{number:.{digits}f}".replace("-", "\u2212") for number in (value, *ends)]
    return texts[0] if any(math.isnan(end) for end in ends) else f"{texts[0]} [{texts[1]}, {texts[2]}]"


def _points(line: pd.Series, name: str, low: str = "", high: str = "", negated: bool = False) -> str:
    """A share's change and interval in points of a hundred."""
    low, high = low or f"{name}_ci_low", high or f"{name}_ci_high"
    scaled = pd.Series({key: 100 * float(line[key]) for key in (name, low, high)})
    return _number(scaled, name, 0, low, high, negated)
