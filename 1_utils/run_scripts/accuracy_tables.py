"""Tables of scored answers: accuracy by style with paired statistics, flipped answers, accuracy by kind of problem."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from file_output import read_csv
from paired_stats import (
    clustered_mean,
    design_effect,
    exact_mcnemar,
    holm_over_styles,
    minimum_detectable_effect,
    paired_difference,
    paired_summary,
    sign_flip_test,
    wilson_interval,
)
from style_names import is_again, is_variant

ROW_FACTORS = ("operation", "digits", "result")  # the same in every style of a row
RESAMPLES = 4999
STYLE_FACTORS = ("edits", "token_change")  # of one style's prompt


def read_items(files: Sequence[Path], columns: Sequence[str] | None = None) -> pd.DataFrame:
    """One table of the scored answers in `files`: an answer that several of them score is taken from the first.

    columns: those that are read, style, original_index and correct among them; default: all.
    """
    tables = [read_csv(path, columns, "run stage 3 or match_answers.py first") for path in files]
    if len(tables) == 1:
        return tables[0]
    scored = [table[table["correct"].notna()].astype({"correct": object}) for table in tables]
    seen: set[tuple[str, int]] = set()
    kept = []
    for table in scored:
        rows = list(zip(table["style"], table["original_index"], strict=True))
        kept.append(table[[row not in seen for row in rows]])
        seen.update(rows)
    return pd.concat([table for table in kept if len(table)] or scored[:1], ignore_index=True)


def row_scores(items: pd.DataFrame) -> pd.DataFrame:
    """One line per style x row with a score: mean of `correct` over the samples, cluster, identical."""
    scored = items[items["correct"].notna()]
    lines = scored.assign(correct=scored["correct"].astype(float))
    grouped = lines.groupby(["style", "original_index"], sort=False, as_index=False)
    return grouped.agg(correct=("correct", "mean"), template=("template", "first"), identical=("identical", "first"))


def detectable_differences(items: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """What this n could detect, before any p value: style, n_paired, n_clusters, and the smallest true difference that
    a test at 0.05, and one at 0.05 / number of styles in its family (`holm_over_styles`), finds with 80 % power."""
    scores = row_scores(items)
    styles = [style for style in pd.unique(scores["style"]) if style != baseline]
    tested = [style for style in styles if not is_again(style)]
    lines = []
    for style in styles:
        pairs = _pairs(scores, style, baseline)
        change = paired_difference(pairs["correct"], pairs["clean"], pairs["template"])
        family = [other for other in tested if is_variant(other, baseline) == is_variant(style, baseline)]
        one, all_of_them = (
            minimum_detectable_effect(change.standard_error, change.df, comparisons=count)
            for count in (1, max(1, len(family)))
        )
        lines.append((style, change.n, change.n_clusters, one, all_of_them))
    columns = ["style", "n_paired", "n_clusters", "minimum_detectable_difference"]
    return pd.DataFrame(lines, columns=[*columns, "minimum_detectable_difference_adjusted"])


def summarise(items: pd.DataFrame, baseline: str, detectable: pd.DataFrame | None = None) -> pd.DataFrame:
    """*_summary.csv: accuracy of each style with its Wilson interval, the paired difference to `baseline`, tests.

    p and the difference's interval are the clustered t test's. p_mcnemar is the exact McNemar test, which takes rows
    as independent (NaN where a prompt has several samples); p_permutation flips whole templates. *_adjusted is
    `holm_over_styles`. ci_low_clustered, ci_high_clustered: Wilson on the effective sample size. answer_logprob_*, if
    the items have it: its mean, and its paired difference with the same test.
    """
    table = _summary(items, baseline)
    scores = row_scores(items)
    extra = [_style_extras(items, scores, style, baseline) for style in table["style"]]
    for column in extra[0] if extra else ():
        table[column] = [line[column] for line in extra]
    detectable = detectable_differences(items, baseline) if detectable is None else detectable
    limits = detectable.set_index("style")["minimum_detectable_difference_adjusted"]
    after = list(table.columns).index("minimum_detectable_difference") + 1
    table.insert(after, "minimum_detectable_difference_adjusted", table["style"].map(limits))
    table["p_mcnemar_adjusted"] = holm_over_styles(table, "p_mcnemar")
    if "answer_logprob" in items:
        logprobs = paired_summary(items, "answer_logprob", cluster="template", baseline=baseline).set_index("style")
        columns = ["estimate", "difference", "difference_ci_low", "difference_ci_high", "p", "p_adjusted"]
        added = logprobs[columns].rename(columns={"estimate": "mean"}).add_prefix("answer_logprob_")
        table = table.join(added, on="style")
    return table


def _summary(items: pd.DataFrame, baseline: str, adjust: bool = True) -> pd.DataFrame:
    return paired_summary(items, "correct", "template", baseline, "wilson", adjust, {"correct": (0, 1)})


def _style_extras(items: pd.DataFrame, scores: pd.DataFrame, style: str, baseline: str) -> dict[str, Any]:
    own = items[items["style"] == style]
    known = scores[scores["style"] == style]
    low, high = wilson_interval(
        known["correct"].sum(), len(known), design_effect=design_effect(known["correct"], known["template"])
    )
    line: dict[str, Any] = {
        "ci_low_clustered": low,
        "ci_high_clustered": high,
        "parse_rate": own["value"].notna().mean(),
        "ambiguous_rate": (own["status"] == "ambiguous").mean(),
        "cut_off_rate": own["cut_off"].astype(float).mean(),
        "right_to_wrong": math.nan,
        "wrong_to_right": math.nan,
        "p_mcnemar": math.nan,
        "p_permutation": math.nan,
    }
    if style != baseline:
        pairs = _pairs(scores, style, baseline)
        line["p_permutation"] = sign_flip_test(pairs["correct"] - pairs["clean"], pairs["template"], RESAMPLES)
        if pairs[["correct", "clean"]].isin([0.0, 1.0]).all(axis=None):
            test = exact_mcnemar(pairs["clean"] == 1, pairs["correct"] == 1)
            line |= {
                "p_mcnemar": test.p,
                "right_to_wrong": test.right_to_wrong,
                "wrong_to_right": test.wrong_to_right,
            }
    return line


def _pairs(scores: pd.DataFrame, style: str, baseline: str) -> pd.DataFrame:
    """The rows that have both the style and the clean form, identical prompts left out."""
    own = scores[(scores["style"] == style) & ~scores["identical"]]
    clean = scores[scores["style"] == baseline][["original_index", "correct"]]
    return own.merge(clean.rename(columns={"correct": "clean"}), on="original_index")


def find_flips(items: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """*_flips.csv: every answer that a style turned from right to wrong or back, with both texts (first sample)."""
    columns = ["prompt", "response", "value", "correct"]
    first = items[(items["sample"] == 0) & items["correct"].notna()]
    clean = first[first["style"] == baseline][["original_index", *columns]]
    clean = clean.rename(columns={name: f"clean_{name}" for name in columns})
    both = first[(first["style"] != baseline) & ~first["identical"].astype(bool)].merge(clean, on="original_index")
    both = both[both["correct"].astype(bool) != both["clean_correct"].astype(bool)]
    turned = both["correct"].astype(bool).map({True: "wrong_to_right", False: "right_to_wrong"})
    both = both.assign(flip=turned).sort_values(["style", "flip", "original_index"], kind="stable")
    keep = ["style", "original_index", "element_index", "flip", "gold", "clean_value", "value"]
    return both[[*keep, "clean_prompt", "prompt", "clean_response", "response"]].reset_index(drop=True)


def break_down(items: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """*_breakdown.csv: the summary within each level of each factor that the run knows.

    Factors of a row (operation, digits, result) take the baseline's line too. Factors of a style's prompt (edits: edits
    in the log; token_change: tokens more than the clean prompt) pair the items of a level with their clean rows.
    p_adjusted is `holm_over_styles` over the levels of one factor.
    """
    tables = []
    for factor in (*ROW_FACTORS, *STYLE_FACTORS):
        levels = sorted(items.loc[items["style"] != baseline, factor].dropna().unique(), key=_level_order)
        parts = []
        for level in levels if len(levels) > 1 else ():
            chosen = items[factor] == level
            if factor in STYLE_FACTORS:
                chosen |= items["style"] == baseline
            part = _summary(items[chosen], baseline, adjust=False)
            if factor in STYLE_FACTORS:
                part = part[part["style"] != baseline]
            part.insert(1, "factor", factor)
            part.insert(2, "level", str(level))
            parts.append(part)
        if parts:
            table = pd.concat(parts, ignore_index=True)
            table["p_adjusted"] = holm_over_styles(table)
            tables.append(table)
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=["style", "factor", "level"])


def _level_order(level: Any) -> tuple[int, float, str]:
    text = str(level)
    if text == "fewer":
        return 0, -math.inf, text
    number = text.removesuffix(" or more")
    return (0, float(number), "") if number.lstrip("+-").isdigit() else (1, 0.0, text)


def accuracy_by_edits(items: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """Accuracy by number of edits over all styles with a log; 0 is the clean form of the rows that were edited.

    Columns edits, n, estimate, ci_low, ci_high; rows (and templates) are clusters, since styles share them.
    """
    scored = items[items["correct"].notna()]
    edited = scored[scored["edits"].notna() & (scored["style"] != baseline) & ~scored["identical"]]
    clean = scored[(scored["style"] == baseline) & scored["original_index"].isin(edited["original_index"])]
    both = pd.concat([clean.assign(edits="0"), edited])
    lines = []
    for level in sorted(both["edits"].unique(), key=_level_order) if len(edited) else ():
        part = both[both["edits"] == level]
        clusters = part["template"].where(part["template"].notna(), "row " + part["original_index"].astype(str))
        estimate = clustered_mean(part["correct"].astype(float), clusters).within(0, 1)
        lines.append((level, estimate.n, estimate.mean, estimate.ci_low, estimate.ci_high))
    return pd.DataFrame(lines, columns=["edits", "n", "estimate", "ci_low", "ci_high"])
