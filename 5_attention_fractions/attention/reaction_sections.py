"""What the report shows of stage 5: plots with a sentence each, tables with their columns, rules of sentences."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
from findings import (
    ALPHA,
    Numbers,
    Rule,
    detectable,
    estimate_text,
    factor,
    join,
    limit_text,
    percent,
    points,
    share_limit,
    share_text,
    table_of,
)
from paired_stats import minimum_detectable_effect
from report_section import Headline, Plots, Section, TableOf
from report_tables import Interval
from style_names import MADE_IN_STAGE_2, matched_style

from attention.neurons import FILES, HEAD

SHOWN_HEADS = 3
WHERE, WHICH_HEAD = "Is the word repaired inside, and where?", "Which head should I look at?"
READ_RANK = 10  # a word whose clean twin has a worse median rank in every layer is not read by the logit lens
HEAD_MEASURE = "edited_log2_mass_last"
SMALL = 0.01  # share of a unit's level below which its change is shown only to a reader who asks for more
REPEATS = 0.5  # rank correlation of the halves from which a ranking is said to repeat


def against_tokens(lines: pd.DataFrame, p: str) -> pd.DataFrame:
    """The lines of styles that have a p value and the control with the clean words in as many tokens."""
    return lines[lines["control"].map(matched_style, na_action="ignore").notna() & lines[p].notna()]


# --- dirs_eval.py


def fraction_section(query: str) -> Section:
    """The section of dirs_eval.py. query: whose attention, `last` or `mean`."""
    whose = {"last": "of the last prompt token's attention", "mean": "of the mean prompt token's attention"}[query]
    note = f"attention on task: share {whose}, mean over layers and heads"
    task = ("frac_task", "frac_task_ci_low", "frac_task_ci_high")
    return Section(
        name="attention_fractions",
        title="Where does attention go?",
        order=30,
        plots=(
            Plots(
                "boxplot_frac_task.png",
                "Share of the attention that lies on the task, mean over layers and heads, one box of prompts a style. "
                "The diamond is the share of the tokens that lie there, so a box to the right of it is more than even "
                "attention.",
            ),
            Plots("boxplot_frac_prompt.png", "The same for the instruction, the words around the task.", folded=True),
            Plots("boxplot_perlayer_*.png", "Attention on the instruction by layer, for one style.", left_out=True),
        ),
        tables=tuple(
            TableOf(
                "prompt_task_fraction_aggregate.csv",
                f"Attention on the {region}; uniform share: what even attention gives; density 1 is even attention",
                (
                    *("style", "n", name, f"{name}_uniform_share", f"{name}_density", f"{name}_difference"),
                    *(f"{name}_p", f"{name}_p_adjusted"),
                ),
            )
            for region, name in (("task", "frac_task"), ("instruction", "frac_instruction"))
        ),
        headlines=(Headline("attention on task", note, ("prompt_task_fraction_aggregate.csv",), *task),),
    )


# --- activation_diffs.py and probe_layers.py


def recovery_numbers(table: pd.DataFrame, _: Path) -> Iterator[Numbers]:
    """How much later than its control each style's word is recovered; it holds if clear of 0 after Holm."""
    of_depth = table[table["measure"] == "recovery_depth"]
    lines = against_tokens(of_depth, "p_adjusted")
    counts = of_depth.set_index("style")
    for _, line in lines.iterrows():
        control = counts.loc[line["control"]] if line["control"] in counts.index else None
        later = line["difference_to_control"] > 0
        limit = detectable(line, "n_with_control", len(lines))
        yield {
            "holds": line["p_adjusted"] < ALPHA,
            "style": line["style"],
            "control": line["control"],
            "n": line["n_with_control"],
            "recovered": f"{line['n'] - line['n_censored']:.0f} of {line['n']:.0f}",
            "of_control": ""
            if control is None
            else f", with {line['control']} in {control['n'] - control['n_censored']:.0f} of {control['n']:.0f}",
            "layers": estimate_text(
                line, "difference_to_control", 1, "difference_ci_low", "difference_ci_high", not later
            ),
            "when": "later" if later else "earlier",
            "p": line["p_adjusted"],
            "limit": limit_text(limit, "A difference of {} layers"),
        }


def peak_numbers(table: pd.DataFrame, _: Path) -> Iterator[Numbers]:
    """The layer at which each style's words are most often nearest to their clean twin; it holds if that differs from
    the control after Benjamini-Hochberg over styles and layers."""
    lines = table[(table["measure"] == "own_nearest") & (table["region"] == "edited")]
    for style, own in against_tokens(lines, "p_adjusted").groupby("style", sort=False):
        line = own.loc[own["estimate"].idxmax()]
        unclear = line["ci_low"] <= 0.5 <= line["ci_high"]
        fewer, last = line["difference_to_control"] < 0, own.loc[own["layer"].idxmax()]
        words = line.get("n_other_words", math.nan) + 1
        yield {
            "holds": line["p_adjusted"] < ALPHA,
            "style": style,
            "control": line["control"],
            "n": line["n_with_control"],
            "layers": own["layer"].nunique(),
            "chance": f" among {words:.0f} words (by chance at least {percent(1 / words)})" if words > 0 else "",
            "answer": "Not clear whether most are" if unclear else "Mostly" if line["estimate"] > 0.5 else "Mostly not",
            "layer": int(line["layer"]),
            "share": share_text(line, "estimate", "ci_low", "ci_high"),
            "last": percent(last["estimate"]),
            "points": points(line, "difference_to_control", "difference_ci_low", "difference_ci_high", fewer),
            "than": "fewer" if fewer else "more",
            "limit": share_limit(detectable(line, "n_with_control", len(lines)), line["control_estimate"]),
            "p": line["p_adjusted"],
        }


def readout_numbers(table: pd.DataFrame, _: Path) -> Iterator[Numbers]:
    """How well the logit lens reads the clean word from each style's mistyped one, at the layer where it reads the
    clean prompt's best; it holds if that differs from the control after Benjamini-Hochberg over styles and layers."""
    for style, own in against_tokens(table, "p_adjusted").groupby("style", sort=False):
        line = _best_read(own)
        if line["clean_rank_median"] > READ_RANK:
            continue
        less = line["difference_to_control"] < 0
        limit = detectable(line, "n_clusters", len(own))
        yield {
            "holds": line["p_adjusted"] < ALPHA,
            "style": style,
            "control": line["control"],
            "n": line["n"],
            "layer": int(line["layer"]),
            "rank": f"{line['rank_median']:.0f}",
            "control_rank": f"{line['control_rank_median']:.0f}",
            "clean_rank": f"{line['clean_rank_median']:.0f}",
            "nats": estimate_text(line, "difference_to_control", 2, "difference_ci_low", "difference_ci_high", less),
            "than": "lower" if less else "higher",
            "limit": limit_text(limit, "A difference of {} nats"),
            "p": line["p_adjusted"],
        }


def unread_numbers(table: pd.DataFrame, _: Path) -> Iterator[Numbers]:
    """If the logit lens reads of no style even the clean words, so that it says nothing of the mistyped."""
    by_style = against_tokens(table, "p_adjusted").groupby("style", sort=False)
    best = {style: _best_read(own) for style, own in by_style}
    if all(line["clean_rank_median"] > READ_RANK for line in best.values()):
        for style, line in best.items():
            yield {"holds": False, "style": style, "n": line["n"], "rank": f"{line['clean_rank_median']:,.0f}"}


def _best_read(lines: pd.DataFrame) -> pd.Series:
    """The line of the layer that reads the clean word best; not the embeddings, which read their own token."""
    lines = lines[lines["layer"] > 0] if (lines["layer"] > 0).any() else lines
    return lines.loc[lines["clean_rank_median"].idxmin()]


READ_OUT = (
    "The logit lens reads the clean word best at layer {layer}: there its median rank is {clean_rank} in the clean "
    "prompt, {control_rank} with {control} and {rank} with {style}. "
)
LAYERS = Section(
    name="activation_diffs",
    title="Which layers react, and where is the word recovered?",
    order=40,
    plots=(
        Plots(
            "typo_recovery_*.png",
            "Share of the mistyped words whose state is nearer to its own clean twin than to all other words, by "
            "layer. Dashed: the control. Bands: 95 % intervals.",
        ),
        Plots("activation_diffs_more_*.png", "The same by other distances.", left_out=True),
        Plots(
            "activation_diffs_*.png",
            "How near the residual stream is to its clean twin, by layer and place: 1 is the same direction.",
        ),
        Plots(
            "word_recovery*.png",
            "How likely the logit lens finds the clean word at the last token of the mistyped one, by layer, on the "
            "few prompts that allow the comparison (n above each panel).",
            folded=True,
        ),
        Plots(
            "recovery_depth.png",
            "The first layer at which a mistyped word is recovered, by style: there, and in the two layers after it, "
            "its state is nearest to its own clean state. A word that never is counts as one layer beyond the last.",
            folded=True,
        ),
        Plots(
            "logit_lens_*.png", "What each layer would say next (logit lens), against the clean prompt.", folded=True
        ),
    ),
    tables=(
        TableOf(
            "activation_diffs_summary.csv",
            "Recovery depth and next-token change by style, beside the control: the word in other tokens",
            (
                *("style", "measure", "n", "n_censored", "median", "estimate", "control", "control_estimate"),
                *("n_with_control", "difference_to_control", "p", "p_adjusted"),
            ),
            intervals=(("difference_to_control", "difference_ci_low", "difference_ci_high"),),
        ),
    ),
    rules=(
        Rule(
            "recovery layer",
            ("activation_diffs.csv",),
            peak_numbers,
            "{answer}: at layer {layer}, the best of {layers}, {share} of the words mistyped by {style} are nearest to "
            "their own clean state{chance}, {points} points {than} than with {control}; at the last layer {last} are "
            "(n = {n}, {adjusted_p}).",
            "{answer}: at layer {layer}, the best of {layers}, {share} of the words mistyped by {style} are nearest to "
            "their own clean state{chance}; at the last layer {last} are. The difference to {control} is not clear of "
            "0 (n = {n}, {adjusted_p}).{limit}",
            WHERE,
        ),
        Rule(
            "recovery",
            ("activation_diffs_summary.csv",),
            recovery_numbers,
            "The word mistyped by {style} comes back to its own clean state in {recovered} prompts{of_control}. That "
            "is {layers} layers {when} than with the control, if a word that never does counts as one layer beyond the "
            "last (n = {n}, {adjusted_p}).",
            "The word mistyped by {style} comes back to its own clean state in {recovered} prompts{of_control}. No "
            "difference in depth shows: {layers} layers {when} (n = {n}, {adjusted_p}).{limit}",
            WHERE,
            aside=True,
        ),
        Rule(
            "word read out",
            ("word_recovery.csv",),
            readout_numbers,
            READ_OUT + "Its log probability is {nats} nats {than} than with the control (n = {n}, {adjusted_p}).",
            READ_OUT + "Its log probability does not clearly differ from that with the control (n = {n}, "
            "{adjusted_p}).{limit}",
            WHERE,
            aside=True,
        ),
        Rule(
            "word not read out",
            ("word_recovery.csv",),
            unread_numbers,
            "",
            "The logit lens cannot tell: it does not read the words that {style} mistypes in the clean prompt either "
            "(median rank at the best layer: {rank}; n = {n}, those of the first prompts that allow the comparison).",
            WHERE,
            aside=True,
        ),
    ),
)
PROBES = Section(
    name="probe_layers",
    title=LAYERS.title,
    order=41,
    plots=(
        Plots("probe_layers_flipped.png", "Will the answer turn wrong?", left_out=True),
        Plots(
            "probe_layers_*.png",
            "How well a linear probe tells them apart, by layer. Band: 95 % interval of the first line. Grey: with "
            "shuffled labels. Diamonds: from the numbers of tokens alone.",
            folded=True,
        ),
    ),
    tables=(
        TableOf(
            "probe_layers.csv",
            "Is there a typo? AUC of a probe of the last token, all typo styles together; beside it the AUC with "
            "shuffled labels, and of token counts alone",
            ("style", "layer", "n", "n_clusters", "auc", "p_adjusted", "shuffled_auc", "token_count_auc"),
            (("style", "all_typos"), ("target", "typo"), ("region", "last")),
            intervals=(
                ("auc", "ci_low", "ci_high"),
                ("shuffled_auc", "shuffled_ci_low", "shuffled_ci_high"),
                ("token_count_auc", "token_count_ci_low", "token_count_ci_high"),
            ),
        ),
    ),
)


# --- head_sensitivity.py


def head_numbers(table: pd.DataFrame, folder: Path) -> Iterator[Numbers]:
    """The heads whose attention to the edited words differs most surely from the control; it holds if one does after
    Benjamini-Hochberg over the heads and Bonferroni over the styles, and the ranking repeats on other prompts."""
    lines = against_tokens(table[table["measure"] == HEAD_MEASURE], "p_adjusted_vs_control")
    overlap = table_of(folder / "head_overlap.csv")
    styles = lines["style"].nunique()
    for style, own in lines.groupby("style", sort=False):
        own = own.sort_values("rank_vs_control")
        sure = own[own["p_adjusted_vs_control"] * styles < ALPHA]
        halves = None
        if overlap is not None:
            same = (overlap["style"] == style) & (overlap["other_style"] == style)
            same &= (overlap["measure"] == HEAD_MEASURE) & (overlap["reference_form"] == "control")
            halves = overlap[same].iloc[0] if same.any() else None
        n = int(own["n_vs_control"].max())
        limit = minimum_detectable_effect(own["standard_error_vs_control"].median(), n - 1, comparisons=len(own))
        named = [
            (
                f"{head['layer']:.0f}.{head['head']:.0f}",
                f"{factor(head['difference_vs_control'])} "
                f"[{factor(head['difference_ci_low_vs_control'])}, {factor(head['difference_ci_high_vs_control'])}]",
            )
            for _, head in sure.head(SHOWN_HEADS).iterrows()
        ]
        others = join([f"{name} ({times} times)" for name, times in named[1:]])
        yield {
            "holds": bool(len(sure)) and halves is not None and halves["ci_low"] > 0,
            "style": style,
            "control": own["control"].iloc[0],
            "n": n,
            "count": f"{len(sure)} of {len(own)}",
            "head": named[0][0] if named else "",
            "times": named[0][1] if named else "",
            "others": f", next {others}" if others else "",
            "differ": "differs" if len(sure) == 1 else "differ",
            "halves": "" if halves is None else estimate_text(halves, "cross_half_spearman", 2),
            "repeats": "repeats"
            if halves is not None and halves["cross_half_spearman"] >= REPEATS
            else "repeats in part",
            "limit": factor(limit),
            "p": own["p_adjusted_vs_control"].min(),
        }


VS_CONTROL = (("difference_vs_control", "difference_ci_low_vs_control", "difference_ci_high_vs_control"),)
HEADS = Section(
    name="head_sensitivity",
    title="Which heads react?",
    order=50,
    plots=(
        Plots(
            "head_sensitivity_*.png",
            "Change in each head's attention to the edited words: from the control to the style if it has one, else "
            "from the clean form. The control has the clean words in as many tokens (split@…), or as many neutral "
            "words (neutral@…), so that what is left is the typo, or the tone. Named (layer.head): the three surest, "
            "those of the smallest p, which need not be the largest.",
        ),
        Plots(
            "head_answer_flips_*.png",
            "Heads whose change goes with an answer that turns from right to wrong.",
            folded=True,
        ),
        Plots(
            "head_overlap_vs_control.png",
            "Whether styles share their heads: rank correlation of the heads' changes from the controls between two "
            "halves of the data; the diagonal is the reliability of one style with itself.",
            folded=True,
        ),
        Plots("head_overlap.png", "The same for the changes from the clean form.", folded=True),
    ),
    tables=(
        TableOf(
            "head_sensitivity.csv",
            "The three heads of each style whose attention to the edited words changes most surely, in log2: 1 is "
            "twice as much (picked from the same data, so their effects look larger than they are)",
            (
                *("style", "layer", "head", "n", "difference", "effect_size", "p", "p_adjusted", "control"),
                *("n_vs_control", "difference_vs_control", "p_adjusted_vs_control"),
            ),
            (("measure", HEAD_MEASURE),),
            3,
            intervals=VS_CONTROL,
        ),
        TableOf(
            "head_sensitivity.csv",
            "The same, picked by the change from the control: what a typo does beyond costing tokens",
            (
                *("style", "control", "layer", "head", "n_vs_control", "difference_vs_control"),
                *("effect_size_vs_control", "p_vs_control", "p_adjusted_vs_control", "difference"),
            ),
            (("measure", HEAD_MEASURE),),
            3,
            "rank_vs_control",
            ("control", MADE_IN_STAGE_2),
            VS_CONTROL,
        ),
        TableOf(
            "head_sensitivity.csv",
            "The same for the entropy of attention, by the change from the clean form",
            ("style", "layer", "head", "n", "clean", "estimate", "difference", "effect_size", "p", "p_adjusted"),
            (("measure", "entropy_last"),),
            3,
        ),
    ),
    rules=(
        Rule(
            "heads",
            ("head_sensitivity.csv",),
            head_numbers,
            "Head {head} (layer.head) reacts most surely: the last token's attention to the words mistyped by {style} "
            "is {times} times that with {control} (picked among all heads on the same prompts, so likely overstated). "
            "In all, {count} heads that can be tested {differ}{others} (n = {n}). Their ranking {repeats} on other "
            "prompts: rank correlation {halves}. A head that reacts need not change the answer.",
            "None can be named: no head's attention to the words mistyped by {style} differs from that with {control} "
            "and repeats on other prompts (n = {n}). In a typical head a change by the factor {limit} would have been "
            "found (80 % power).",
            WHICH_HEAD,
        ),
    ),
)


# --- neuron_sensitivity.py


def unit_numbers(unit: str) -> Callable[[pd.DataFrame, Path], Iterator[Numbers]]:
    """Units found on one half of the prompts that work harder on a style than on the clean word and the control; it
    holds if the set does on the other half after Holm, and some unit is confirmed there."""

    def numbers(table: pd.DataFrame, folder: Path) -> Iterator[Numbers]:
        units = table_of(folder / FILES[unit])
        lines = against_tokens(table[table["unit"] == unit], "p_adjusted")
        counts = {line["style"]: f"{line['n_confirmed']:.0f} of {line['n_found']:.0f}" for _, line in lines.iterrows()}
        for _, line in lines.iterrows():
            others = join([f"{style} {count}" for style, count in counts.items() if style != line["style"]])
            best: Numbers = {}
            if units is not None:
                own = units[(units["style"] == line["style"]) & (units["confirmed"] == 1)].sort_values("rank")
                best = _unit_named(own.iloc[0], unit) if len(own) else {}
            yield {
                "holds": line["p_adjusted"] < ALPHA and bool(best),
                **best,
                **{name: line[name] for name in ("style", "control", "n")},
                "count": counts[line["style"]],
                "others": f" (of those chosen for other styles: {others})" if others else "",
                "p": line["p_adjusted"],
            }

    return numbers


def _unit_named(line: pd.Series, unit: str) -> Numbers:
    """A unit's name, and how far it is above the control on the half that confirms it; aside if that is SMALL."""
    name = f"{line['layer']}.{line['head' if unit == HEAD else 'neuron']}"
    more = Interval(*(float(line[f"difference_to_control{end}"]) for end in ("", "_ci_low", "_ci_high")))
    level = abs(line.get("mean_control", math.nan))
    part = abs(more.estimate) / level if level else math.nan
    size = f", {100 * part:.2g} % of its level there" if part == part else ""
    return {
        "name": name,
        "more": more.text(),
        "size": size,
        "head": name if unit == HEAD else "",
        "aside": part < SMALL,
    }


def _unit_rule(unit: str, measure: str, question: str, aside: bool = False) -> Rule:
    again = f"Chosen on one half of the prompts and confirmed on the other: {{count}} {unit}s{{others}} (n = {{n}}, "
    return Rule(
        f"{unit}s found again",
        ("neuron_sensitivity_summary.csv",),
        unit_numbers(unit),
        f"By {measure}, {unit} {{name}} (layer.{unit}): {{more}} more with {{style}} than with {{control}}{{size}}. "
        f"{again}"
        "{adjusted_p}). Only what rises is searched for.",
        f"By {measure}, none can be named for {{style}}. {again}the set as a whole: {{adjusted_p}}).",
        question,
        aside,
    )


UNITS = Section(
    name="neuron_sensitivity",
    title="Which neurons and heads react on other prompts, too?",
    order=60,
    plots=(Plots("neuron_sensitivity.png", "Typo neurons and heads found on one half and confirmed on the other."),),
    tables=(
        TableOf(
            "neuron_sensitivity_summary.csv",
            "Found and confirmed units by style; chance: random sets of the same size",
            (
                *("style", "unit", "quantity", "control", "score", "n", "n_units", "n_found", "n_confirmed", "delta"),
                *("random_low", "random_high", "excess_over_clean", "excess_over_control", "p", "p_adjusted"),
            ),
        ),
    ),
    rules=(
        _unit_rule("head", "how focused the attention is (1 − entropy, from 0 to 1)", WHICH_HEAD),
        _unit_rule("neuron", "activation (the input of down_proj)", "Which neurons react?"),
        _unit_rule("gate", "activation of the gate (the output of act_fn)", "Which neurons react?", aside=True),
    ),
)


# --- causal_effects.py


SOURCES = {"split": "control's", "normal": "clean"}  # donor of a patch → in a sentence
LATER = {"after": "the tokens after them", "readout": "the last prompt token"}  # positions → in a sentence


def hand_over_numbers(table: pd.DataFrame, _: Path) -> Iterator[Numbers]:
    """The layer at which the edited tokens hand the typo's effect over; it holds if its interval is known and the
    edited tokens' state restores a share clear of 0 at the last patched layer before it.

    Layer 0 is passed over if others were patched: what its tokens restore is 1 by construction.
    """
    own = table[(table["site"] == "resid_pre") & (table["positions"] == "edited") & (table["donor"] == "own")]
    own = own[own["direction"] == "denoising"]
    for (style, source), part in own.groupby(["style", "source"], sort=False):
        same = (table["style"] == style) & (table["source"] == source) & (table["site"] == "resid_pre")
        same &= table["direction"] == "denoising"
        part = part.sort_values("layer")
        part = part[part["layer"] > 0] if (part["layer"] > 0).any() else part
        before = part[part["layer"] <= part["hand_over_layer"]]
        line = before.iloc[-1] if len(before) else part.iloc[0]
        known = line["hand_over_layer"] == line["hand_over_layer"]
        after = part[part["layer"] > part["hand_over_layer"]]
        later = table[same & (table["donor"] == "own") & (table["layer"] == after["layer"].min())]
        later = later[later["positions"].isin(LATER)].sort_values("R")
        other = table[same & (table["donor"] == "other") & (table["layer"] == line["layer"])]
        other = other[other["positions"] == "edited"]
        yield {
            "holds": bool(line["R_ci_low"] > 0 and line["hand_over_ci_low"] == line["hand_over_ci_low"]),
            "style": style,
            "donor": SOURCES.get(source, source),
            "n": line["n"],
            "restored": share_text(line, "R"),
            "other": _other_text(other.iloc[0]) if len(other) else "",
            "later": LATER[later["positions"].iloc[-1]] if len(later) else "later tokens",
            "effect": f"{style}'s letters" if source == "split" else style,
            "at": int(line["layer"]),
            "between": f"between layers {line['layer']:.0f} and {after['layer'].iloc[0]:.0f} " if len(after) else "",
            "layer": estimate_text(line, "hand_over_layer", 1, "hand_over_ci_low", "hand_over_ci_high"),
            "crossing": "" if known else " At none of the patched layers does the effect pass to later tokens.",
            "p": line["p"],
        }


def _other_text(line: pd.Series) -> str:
    """What the state of another prompt's words does in the same place."""
    if line["R_ci_high"] < 0:
        return f"; that of another prompt's words makes it worse ({share_text(line, 'R')})"
    return f"; that of another prompt's words undoes {'none' if line['R'] < 0 else percent(line['R'])} of it"


def cause_numbers(table: pd.DataFrame, _: Path) -> Iterator[Numbers]:
    """The heads that restore the most; it holds if one is clear of 0 after Benjamini-Hochberg over the heads and
    restores in both halves of the prompts."""
    own = table[(table["donor"] == "own") & (table["direction"] == "denoising") & table["site"].isin(("z", "pattern"))]
    for (style, source, _site), part in own.groupby(["style", "source", "site"], sort=False):
        halves = part[["R_first_half", "R_second_half"]]
        both = (halves > 0).all(axis=1) | halves.isna().any(axis=1) & (part["R"] > 0)
        sure = part[(part["p_adjusted"] < ALPHA) & both].sort_values("R", ascending=False)
        named = [
            (f"{head['layer']:.0f}.{head['head']:.0f}", share_text(head, "R"))
            for _, head in sure.head(SHOWN_HEADS).iterrows()
        ]
        others = join([f"{name} ({share})" for name, share in named[1:]])
        yield {
            "holds": bool(len(sure)),
            "style": style,
            "source": source,
            "n": int(part["n"].max()),
            "count": f"{len(sure)} of {len(part)}",
            "undo": "undoes" if len(sure) == 1 else "undo",
            "total": len(part),
            "head": named[0][0] if named else "",
            "share": named[0][1] if named else "",
            "others": f", next {others}" if others else "",
            "limit": f"{100 * ((part['R_ci_high'] - part['R_ci_low']) / 2).median():.0f}",
            "p": part["p_adjusted"].min(),
        }


def units_one_at_a_time(unit: str, caption: str) -> TableOf:
    """The surest lines of patching_heads.csv or patching_neurons.csv; unit: head or neuron."""
    columns = (
        *("style", "source", "site", "direction", "donor", "layer", unit, "n", "R", "R_first_half", "R_second_half"),
        *("nats_restored", "p_adjusted", "R_control", "p_adjusted_vs_control"),
    )
    return TableOf(f"patching_{unit}s.csv", caption, columns, (("donor", "own"),), 5, "p")


CAUSES = Section(
    name="causal_effects",
    title="Which parts cause it?",
    order=70,
    plots=(
        Plots(
            "patching_layers.png",
            "R: the share of the typo's effect on the answer (the KL of the distributions of its tokens) that is "
            "undone if one place takes the state of the clean or control run. 1: all of it, 0: nothing, below 0: it "
            "gets worse.",
        ),
        Plots(
            "patching_heads.png",
            "R of each head alone; a dot marks an adjusted p below 0.05 and one sign in both halves of the prompts.",
        ),
        Plots("patching_*.png", "Patching, seen another way.", left_out=True),
    ),
    tables=(
        units_one_at_a_time("head", "Heads and units patched one at a time"),
        units_one_at_a_time("neuron", "Neurons patched one at a time"),
        TableOf("patching_sets.csv", "Sets of heads or units, beside random sets of the same layers"),
        TableOf("patching_reactions.csv", "Do the units that react also cause? Rank correlation over units"),
        TableOf(
            "patching_agreement.csv", "Do the two halves of the prompts agree, and does the screen agree with patching?"
        ),
    ),
    rules=(
        Rule(
            "hand-over",
            ("patching_layers.csv",),
            hand_over_numbers,
            "The effect of {effect} on the answer moves from the mistyped words to {later} {between}({layer} by "
            "interpolation between the patched layers). At layer {at} the {donor} state of these words undoes "
            "{restored} of it{other} (n = {n}).",
            "At layer {at} the {donor} state of the words mistyped by {style} undoes {restored} of the effect of "
            "{effect} on the answer{other} (n = {n}).{crossing}",
            WHERE,
        ),
        Rule(
            "heads that cause",
            ("patching_heads.csv",),
            cause_numbers,
            "Head {head} (layer.head): patched alone, it undoes {share} of the effect of {style} on the answer. In "
            "all, {count} heads {undo} a part{others} (n = {n}).",
            "None can be named: of {total} heads patched one at a time, none undoes a clear part of the effect of "
            "{style} (n = {n}). The 95 % interval of a typical head reaches {limit} points to either side.",
            "Which head changes the answer?",
        ),
    ),
)
