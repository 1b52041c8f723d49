"""What the report shows of scored answers: is accuracy lower, how much of that is tokens, how robust are they."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
from answer_files import SUMMARY_FILES, first_there
from findings import (
    ALPHA,
    Numbers,
    Rule,
    join,
    limit_text,
    percent,
    points,
    share_text,
    table_of,
)
from report_section import Headline, Plots, Section, TableOf
from report_tables import compared
from style_names import MATCHED, NEUTRAL, is_again, matched_style, neutral_style

KINDS = {"maths": "", "answers": " in words"}


def accuracy_section(kind: str, whole: bool) -> Section:
    """The section of maths_*.csv or answers_*.csv. whole: with the tables over all scored answers and the sentences."""
    words = KINDS[kind]
    return Section(
        name=kind,
        title="Are the answers right?",
        order=10 + list(KINDS).index(kind),
        plots=(
            Plots(f"{kind}_accuracy.png", f"Share of right answers{words} by style, with 95 % intervals."),
            Plots(f"{kind}_flips.png", f"Answers{words} that turned from right to wrong, and back.", folded=True),
            Plots(f"{kind}_*.png", "Accuracy by the number of edits.", left_out=True),
        ),
        tables=(
            TableOf(
                f"{kind}_summary.csv",
                f"Accuracy of answers{words} by style, its difference to the clean form, and the smallest difference "
                "that this n could detect (80 % power, by the adjusted p)",
                SUMMARY,
            ),
            *(WHOLE_TABLES if whole else ()),
        ),
        headlines=HEADLINES if whole else (),
        rules=RULES if whole else (),
    )


SUMMARY = (
    *("style", "n", "n_paired", "n_identical", "n_clusters", "estimate", "difference"),
    *("minimum_detectable_difference_adjusted", "p", "p_mcnemar", "p_adjusted"),
)
PARTS = ("total", "fragmentation", "spelling", "spelling_p_adjusted", "fragmentation_share")
WHOLE_TABLES = (
    TableOf(
        "decomposition.csv",
        "How much of the change is fragmentation (control − clean form) and how much is spelling (style − control); of "
        "a tone (control neutral@…): how much is length, and how much is tone. The share is above 1 if the second part "
        "works against the first",
        ("style", "measure", "control", "n", "n_clusters", *PARTS),
    ),
    TableOf(
        "robustness_summary.csv",
        "How robust the answers are to the form of the prompt",
        ("style", "measure", "n", "n_clusters", "estimate", "p", "minimum_detectable_difference"),
    ),
    TableOf(
        "repair_summary.csv",
        "Does correcting the prompt first give the accuracy back? Regained: repaired − style; remaining: repaired − "
        "clean form",
        ("style", "n", "n_clusters", "harm", "regained", "regained_p_adjusted", "remaining", "regained_share"),
    ),
)
DIFFERENCE = (
    "n compared: rows that have both forms, and not the same text in both; difference: to the clean form, on these "
    "rows; rows of one group (`_template` of the prompt file; for facts the subject) count as one observation in its "
    "interval"
)
HEADLINES = (
    Headline(
        "accuracy, %",
        "accuracy: answers that are right by the gold answer",
        SUMMARY_FILES,
        *("estimate", "ci_low", "ci_high", "percent"),
    ),
    Headline("n compared", "", SUMMARY_FILES, "n_paired", look="n"),
    Headline(
        "difference, points",
        DIFFERENCE,
        SUMMARY_FILES,
        *("difference", "difference_ci_low", "difference_ci_high", "points"),
    ),
    Headline("p (Holm)", "p: adjusted for the number of styles", SUMMARY_FILES, "p_adjusted", look="p"),
)


# --- rules: the numbers of a sentence from its table


def accuracy_numbers(table: pd.DataFrame, _: Path) -> Iterator[Numbers]:
    """The style with the largest fall in accuracy; it holds if that is clear of 0 after Holm over the styles."""
    styles = compared(table)
    if styles.empty:
        return
    worst = styles.loc[styles["difference"].idxmin()]
    clean = table[table["difference"].isna()]
    clear = styles[styles["p_adjusted"] < ALPHA]
    names = {
        verb: [str(line["style"]) for _, line in clear.iterrows() if line["difference"] * sign > 0]
        for verb, sign in (("falls", -1), ("rises", 1))
    }
    holds = worst["style"] in names["falls"]
    others = {"falls": [style for style in names["falls"] if style != worst["style"]], "rises": names["rises"]}
    also = [f"{verb} with {join(several)}" for verb, several in others.items() if several]
    limit = 100 * worst["minimum_detectable_difference_adjusted"]
    most = 100 * max(clean["estimate"].iloc[0], 1 - clean["estimate"].iloc[0]) if len(clean) else 100
    yield {
        "holds": holds,
        "worst": worst["style"],
        "n": worst["n_paired"],
        "right": percent(worst["estimate"]),
        "clean": percent(clean["estimate"].iloc[0]) if len(clean) else "?",
        "points": points(worst, "difference"),
        "p": worst["p_adjusted"],
        "among": f", the worst of {len(styles)} styles (controls not counted)" if len(styles) > 1 else "",
        "others": f" Accuracy {'also ' if holds else ''}{join(also)}." if also else "",
        "limit": limit_text(
            limit, "A change of {} points", most, " With so few prompts no change would have been found."
        ),
    }


def uncontrolled_numbers(table: pd.DataFrame, _: Path) -> Iterator[Numbers]:
    """The style with the largest fall in accuracy, if that is clear of 0 and the run has no control of it."""
    for numbers in accuracy_numbers(table, _):
        worst = numbers["worst"]
        if numbers["holds"] and not {MATCHED + worst, NEUTRAL + worst} & {*table["style"]}:
            yield numbers | {"holds": False}


def part_numbers(is_control: Callable[[str], str | None]) -> Callable[[pd.DataFrame, Path], Iterator[Numbers]]:
    """The two parts of the change in accuracy with each style that has such a control; it holds if the change is clear
    of 0 after Holm over the styles."""

    def numbers(table: pd.DataFrame, _: Path) -> Iterator[Numbers]:
        of_accuracy = table[table["measure"] == "accuracy"]
        for _, line in of_accuracy[of_accuracy["control"].map(is_control, na_action="ignore").notna()].iterrows():
            texts = {"share": f"The change with {line['style']} has two parts"}
            for part in ("fragmentation", "spelling"):
                sure = line[f"{part}_p_adjusted"] < ALPHA
                texts[part] = points(line, part) + " points" + ("" if sure else " (not clear of 0)")
            if not math.isnan(line["fragmentation_share_ci_low"]):
                texts["share"] = f"{share_text(line, 'fragmentation_share')} of the change with {line['style']}"
            yield {
                "holds": line["total_p_adjusted"] < ALPHA,
                "style": line["style"],
                "control": line["control"],
                "n": int(line["n"]),
                "p": line["total_p_adjusted"],
                "total": points(line, "total"),
                **texts,
            }

    return numbers


def slope_numbers(table: pd.DataFrame, folder: Path) -> Iterator[Numbers]:
    """The change of accuracy per edit over at least two doses; it holds if that is clear of 0."""
    lines = table[(table["measure"] == "accuracy_slope") & (table["forms"].str.count(",") > 1)]
    summary = table_of(first_there(folder, SUMMARY_FILES))
    right = {} if summary is None else summary.set_index("style")["estimate"]
    for _, line in lines.head(1).iterrows():
        forms = [f"{form} {percent(right[form])}" if form in right else form for form in line["forms"].split(", ")]
        yield {
            "holds": line["p"] < ALPHA,
            "n": int(line["n"]),
            "forms": ", ".join(forms),
            "points": points(line, "estimate", "ci_low", "ci_high"),
            "p": line["p"],
            "limit": limit_text(100 * line["minimum_detectable_difference"], "A change of {} points per edit", 100),
        }


def noise_numbers(table: pd.DataFrame, _: Path) -> Iterator[Numbers]:
    """What the same clean prompts in other batches change: no effect, so that it claims nothing."""
    for _, line in table[table["style"].map(is_again) & table["difference"].notna()].head(1).iterrows():
        yield {
            "holds": False,
            "n": int(line["n_paired"]),
            "points": points(line, "difference"),
            "flips": f"{line['right_to_wrong'] + line['wrong_to_right']:.0f}",
        }


TWO_PARTS = (
    "{{share}}. Of {{total}} points, {{fragmentation}} come {first}, and {{spelling}} {second} (n = {{n}}, "
    "the rows that have the control)."
)
NO_PARTS = (
    "Not known, because the change with {style}, {total} points on the rows that have the control, is not clear of 0 "
    "(n = {n}, {adjusted_p})."
)
HARM, TOKENS = "Do the answers get worse?", "How much of it is tokenisation?"
RULES = (
    Rule(
        "harm",
        SUMMARY_FILES,
        accuracy_numbers,
        "Yes: with {worst}{among}, {right} of the answers are right instead of {clean}. That is a change of {points} "
        "points (n = {n}, {adjusted_p}).{others}",
        "Not detectably: with {worst}{among}, the accuracy changes by {points} points (n = {n}, {adjusted_p})."
        "{others}{limit}",
        HARM,
    ),
    Rule(
        "dose",
        ("robustness_summary.csv",),
        slope_numbers,
        "Each one-letter edit changes the accuracy by {points} points on average (right: {forms}; n = {n}, {p}).",
        "The accuracy shows no slope over the number of edits (right: {forms}; n = {n}, {p}).{limit}",
        HARM,
    ),
    Rule(
        "noise floor",
        SUMMARY_FILES,
        noise_numbers,
        "",
        "Numerical noise: the same clean prompts in other batches change {flips} of {n} verdicts ({points} points).",
        HARM,
    ),
    Rule(
        "parts",
        ("decomposition.csv",),
        part_numbers(matched_style),
        TWO_PARTS.format(
            first="from more tokens alone ({control}: the clean words in as many tokens)", second="from the letters"
        ),
        NO_PARTS,
        TOKENS,
    ),
    Rule(
        "no parts",
        SUMMARY_FILES,
        uncontrolled_numbers,
        "",
        "Not known, because the run has no control of {worst}: split@{worst} if it is a typo, neutral@{worst} if it is "
        "a tone.",
        TOKENS,
    ),
    Rule(
        "parts of a tone",
        ("decomposition.csv",),
        part_numbers(neutral_style),
        TWO_PARTS.format(
            first="from the length alone ({control}: neutral sentences of as many tokens)", second="from the tone"
        ),
        NO_PARTS,
        "How much of a tone's effect is its length?",
        aside=True,
    ),
)
