"""The sentences of a run: planted effects give them with the right numbers, a run without effects makes no claim."""

import itertools

import numpy as np
import pandas as pd
import pytest
from accuracy_sections import accuracy_section
from attention.reaction_sections import CAUSES, HEADS, LAYERS, UNITS
from command_line import UserError
from findings import share_limit
from report_section import findings_of, read_sections, write_section
from report_tables import worst_first

PARTS = ("total", "fragmentation", "spelling")
SECTIONS = (accuracy_section("answers", whole=True), LAYERS, HEADS, UNITS, CAUSES)


def findings(folder):
    """What the report says of a results folder, by the sections that the stages write into it."""
    for section in SECTIONS:
        write_section(folder, section)
    return [one for one, _ in findings_of(read_sections(folder), worst_first(folder))]


def with_interval(name, value, half, **names):
    low, high = names.get("low", f"{name}_ci_low"), names.get("high", f"{name}_ci_high")
    return {name: value, low: value - half, high: value + half}


def accuracy(style, difference, p, half=0.06):
    line = {"style": style, "n": 150, "n_paired": 150, "estimate": 0.55 + difference, "p_adjusted": p}
    return line | with_interval("difference", difference, half) | {"minimum_detectable_difference_adjusted": 0.1}


def part_line(style, p, share, prefix="split", **values):
    line = {"style": style, "measure": "accuracy", "control": f"{prefix}@{style}", "n": 149, "n_clusters": 112}
    for part in PARTS:
        line |= with_interval(part, values[part], 0.08) | {f"{part}_p_adjusted": p}
    return line | with_interval("fragmentation_share", share, 0.12)


def against_control(style, value, half, p, **more):
    line = {"style": style, "control": f"split@{style}", "n": 150, "n_with_control": 149, "p_adjusted": p}
    names = {"low": "difference_ci_low", "high": "difference_ci_high"}
    return line | with_interval("difference_to_control", value, half, **names) | more


def head_lines(style, changes, p):
    return [
        {"style": style, "layer": 7, "head": head, "measure": "edited_log2_mass_last", "control": f"split@{style}",
         "rank_vs_control": head + 1, "n_vs_control": 149, "standard_error_vs_control": 0.1,
         "p_adjusted_vs_control": p if change else 0.9}
        | with_interval("difference_vs_control", change, 0.5, low="difference_ci_low_vs_control",
                        high="difference_ci_high_vs_control")
        for head, change in enumerate(changes)
    ]  # fmt: skip


def write_run(folder, effect, repeats=True):
    """Tables of two typo styles, `typo@2` the worse, with effects or without; `split@…` and `polite` beside them."""
    p, share = (1e-9, 0.6) if effect else (0.4, np.nan)
    falls = (-0.5, -0.3) if effect else (-0.03, 0.02)
    tables = {
        "answers_summary": [
            {"style": "normal", "n": 150, "n_paired": 0, "estimate": 0.55, "p_adjusted": np.nan, "difference": np.nan},
            accuracy("swap", falls[1], p), accuracy("split@swap", -0.9, 1e-12), accuracy("typo@2", falls[0], p),
            accuracy("split@typo@2", -0.2, 1e-12),
            accuracy("polite", -0.01, 0.8),
        ],
        "decomposition": [
            part_line("swap", p, share, total=falls[1], fragmentation=-0.2, spelling=-0.1),
            part_line("typo@2", p, share, total=falls[0], fragmentation=-0.3, spelling=-0.2),
            part_line("polite", p, np.nan, "neutral", total=-0.11, fragmentation=-0.09, spelling=-0.02),
        ],
        "robustness_summary": [
            {"style": "all", "measure": "accuracy_slope", "forms": forms, "n": 148, "p": p,
             "minimum_detectable_difference": 0.031}
            | with_interval("estimate", falls[0] / 2, 0.04, low="ci_low", high="ci_high")
            for forms in ("normal, typo@1, typo@2", "normal, typo@1")
        ],
        "activation_diffs_summary": [
            against_control("swap", 9.0, 1.0, p, measure="recovery_depth", n_censored=100),
            against_control("typo@2", 4.7, 1.8, p, measure="recovery_depth", n_censored=126),
            {"style": "split@typo@2", "measure": "recovery_depth", "n": 149, "n_censored": 101},
        ],
        "activation_diffs": [
            against_control("typo@2", change, 0.07, p, measure="own_nearest", region="edited", layer=layer,
                            control_estimate=0.3, n_other_words=99)
            | with_interval("estimate", estimate, 0.06, low="ci_low", high="ci_high")
            for layer, estimate, change in ((6, 0.1, -0.2), (7, 0.15, -0.16), (8, 0.12, -0.1))
        ],
        "word_recovery": [
            against_control("typo@2", change, 0.5, p, layer=layer, n_clusters=60)
            | {"logprob": -rank, "rank_median": rank, "control_rank_median": 3, "clean_rank_median": clean}
            for layer, rank, change, clean in ((0, 9, -4.0, 1), (10, 10, -2.0, 5), (14, 12, -1.5, 2),
                                               (20, 900, -3.0, 9))
        ],
        "head_sensitivity": head_lines("swap", (2.0, 1.5), p) + head_lines("typo@2", (1.0, -1.0, 0.0), p),
        "head_overlap": [
            {"style": "typo@2", "other_style": "typo@2", "measure": "edited_log2_mass_last", "reference_form": form}
            | with_interval("cross_half_spearman", value, 0.1, low="ci_low", high="ci_high")
            for form, value in (("clean form", 0.95), ("control", 0.78 if repeats else 0.05))
        ],
        "neuron_sensitivity_summary": [
            {"style": style, "unit": unit, "control": f"split@{style}", "n": 74, "n_found": 230, "n_confirmed": 115,
             "p_adjusted": p}
            for style in ("swap", "typo@2") for unit in ("neuron", "head")
        ],
        **{
            name: [
                {"style": "typo@2", "layer": 9, unit: rank + 1, "rank": rank, "confirmed": int(rank > 1)}
                | with_interval("difference_to_control", 0.04 / rank, 0.004)
                for rank in (3, 2, 1)
            ]
            for name, unit in (("typo_heads", "head"), ("neuron_sensitivity", "neuron"))
        },
        "patching_layers": [
            {"style": "typo@2", "source": "split", "site": "resid_pre", "positions": positions, "donor": donor,
             "direction": "denoising", "layer": layer, "n": 40, "p": p,
             "hand_over_layer": 12.4 if effect else np.nan, "hand_over_ci_low": 10.0 if effect else np.nan,
             "hand_over_ci_high": 14.8 if effect else np.nan}
            | with_interval("R", (0.8 if effect else 0.02) if donor == "own" else other, 0.1)
            for positions in ("edited", "after", "readout")
            for donor, other in (("own", 0), ("other", -0.5 if effect else -0.02))
            for layer in (0, 10, 20)
        ],
        "patching_heads": [
            {"style": "typo@2", "source": "control", "site": "z", "donor": "own", "direction": "denoising", "layer": 9,
             "head": head, "n": 40, "p_adjusted": p, "R_first_half": 0.1, "R_second_half": other}
            | with_interval("R", value, 0.04)
            for head, value, other in ((0, 0.12, 0.1), (1, 0.2, -0.1), (2, -0.1, -0.1))
        ],
    }  # fmt: skip
    for name, lines in tables.items():
        pd.DataFrame(lines).to_csv(folder / f"{name}.csv", index=False)
    return folder


def test_planted_effects_are_told_with_their_numbers(tmp_path):
    found = findings(write_run(tmp_path, effect=True))
    assert [one.text for one in found] == [
        "Yes: with typo@2, the worst of 3 styles (controls not counted), 5 % of the answers are right instead of 55 %. "
        "That is a change of −50 [−56, −44] points (n = 150, adjusted p < 0.001). Accuracy also falls with swap.",
        "Each one-letter edit changes the accuracy by −25 [−29, −21] points on average (right: normal 55 %, typo@1, "
        "typo@2 5 %; n = 148, p < 0.001).",
        "60 % [48, 72] of the change with typo@2. Of −50 [−58, −42] points, −30 [−38, −22] points come from more "
        "tokens alone (split@typo@2: the clean words in as many tokens), and −20 [−28, −12] points from the "
        "letters (n = 149, the rows that have the control).",
        "The change with polite has two parts. Of −11 [−19, −3] points, −9 [−17, −1] points come from the length "
        "alone (neutral@polite: neutral sentences of as many tokens), and −2 [−10, 6] points from the tone (n = "
        "149, the rows that have the control).",
        "Mostly not: at layer 7, the best of 3, 15 % [9, 21] of the words mistyped by typo@2 are nearest to their "
        "own clean state among 100 words (by chance at least 1 %), 16 [9, 23] points fewer than with split@typo@2; at "
        "the last layer 12 % are (n = 149, adjusted p < 0.001).",
        "The word mistyped by typo@2 comes back to its own clean state in 24 of 150 prompts, with split@typo@2 in"
        " 48 of 149. That is 4.7 [2.9, 6.5] layers later than with the control, if a word that never does counts "
        "as one layer beyond the last (n = 149, adjusted p < 0.001).",
        "The logit lens reads the clean word best at layer 14: there its median rank is 2 in the clean prompt, 3 with "
        "split@typo@2 and 12 with typo@2. Its log probability is 1.50 [1.00, 2.00] nats lower than with the control"
        " (n = 150, adjusted p < 0.001).",
        "The effect of typo@2's letters on the answer moves from the mistyped words to the last prompt token between "
        "layers 10 and 20 (12.4 [10.0, 14.8] by interpolation between the patched layers). At layer 10 the control's "
        "state of these words undoes 80 % [70, 90] of it; that of another prompt's words makes it worse (−50 % "
        "[−60, −40]) (n = 40).",
        "Head 7.0 (layer.head) reacts most surely: the last token's attention to the words mistyped by typo@2 is "
        "2.00 [1.41, 2.83] times that with split@typo@2 (picked among all heads on the same prompts, so likely "
        "overstated). In all, 2 of 3 heads that can be tested differ, next 7.1 (0.50 [0.35, 0.71] "
        "times) (n = 149). Their ranking repeats on other prompts: rank correlation 0.78 [0.68, 0.88]. A head "
        "that reacts need not change the answer.",
        "By how focused the attention is (1 − entropy, from 0 to 1), head 9.3 (layer.head): 0.0200 [0.0160, 0.0240] "
        "more with typo@2 than with split@typo@2. Chosen on one half of the prompts and confirmed on the other: 115 of "
        "230 heads (of those chosen for other styles: swap 115 of 230) (n = 74, adjusted p < 0.001). Only what rises "
        "is searched for.",
        "By activation (the input of down_proj), neuron 9.3 (layer.neuron): 0.0200 [0.0160, 0.0240] more with typo@2 "
        "than with split@typo@2. Chosen on one half of the prompts and confirmed on the other: 115 of 230 neurons "
        "(of those chosen for other styles: swap 115 of 230) (n = 74, adjusted p < 0.001). Only what rises is searched "
        "for.",
        "Head 9.0 (layer.head): patched alone, it undoes 12 % [8, 16] of the effect of typo@2 on the answer. In "
        "all, 1 of 3 heads undoes a part (n = 40).",
    ]
    assert [one.n for one in found] == [150, 148, 149, 149, 149, 149, 150, 40, 149, 74, 74, 40]
    assert [one.source for one in found][:3] == ["answers_summary.csv", "robustness_summary.csv", "decomposition.csv"]
    assert all(one.is_claim for one in found)
    assert [one.head for one in found if one.head] == ["7.0", "9.3", "9.0"]


def test_without_an_effect_nothing_is_claimed(tmp_path):
    found = findings(write_run(tmp_path, effect=False))
    assert not any(one.is_claim or one.head for one in found)
    assert [one.text for one in found] == [
        "Not detectably: with typo@2, the worst of 3 styles (controls not counted), the accuracy changes by −3 [−9, 3] "
        "points (n = 150, adjusted p = 0.400). A change of 10.0 points would have been found (80 % power).",
        "The accuracy shows no slope over the number of edits (right: normal 55 %, typo@1, typo@2 52 %; n = 148, p = "
        "0.400). A change of 3.1 points per edit would have been found (80 % power).",
        "Not known, because the change with typo@2, −3 [−11, 5] points on the rows that have the control, is not "
        "clear of 0 (n = 149, adjusted p = 0.400).",
        "Not known, because the change with polite, −11 [−19, −3] points on the rows that have the control, is not "
        "clear of 0 (n = 149, adjusted p = 0.400).",
        "Mostly not: at layer 7, the best of 3, 15 % [9, 21] of the words mistyped by typo@2 are nearest to their "
        "own clean state among 100 words (by chance at least 1 %); at the last layer 12 % are. The difference to "
        "split@typo@2 is not clear of 0 (n = 149, adjusted p = 0.400). A difference of 11.6 points would have been "
        "found (80 % power).",
        "The word mistyped by typo@2 comes back to its own clean state in 24 of 150 prompts, with split@typo@2 in"
        " 48 of 149. No difference in depth shows: 4.7 [2.9, 6.5] layers later (n = 149, adjusted p = 0.400). A "
        "difference of 2.8 layers would have been found (80 % power).",
        "The logit lens reads the clean word best at layer 14: there its median rank is 2 in the clean prompt, 3 with "
        "split@typo@2 and 12 with typo@2. Its log probability does not clearly differ from that with the control "
        "(n = 150, adjusted p = 0.400). A difference of 0.9 nats would have been found (80 % power).",
        "At layer 10 the control's state of the words mistyped by typo@2 undoes 2 % [−8, 12] of the effect of "
        "typo@2's letters on the answer; that of another prompt's words undoes none of it (n = 40). At none of the "
        "patched layers does the effect pass to later tokens.",
        "None can be named: no head's attention to the words mistyped by typo@2 differs from that with "
        "split@typo@2 and repeats on other prompts (n = 149). In a typical head a change by the factor 1.25 would"
        " have been found (80 % power).",
        "By how focused the attention is (1 − entropy, from 0 to 1), none can be named for typo@2. Chosen on one half "
        "of the prompts and confirmed on the other: 115 of 230 heads (of those chosen for other styles: swap 115 of "
        "230) (n = 74, the set as a whole: adjusted p = 0.400).",
        "By activation (the input of down_proj), none can be named for typo@2. Chosen on one half of the prompts and "
        "confirmed on the other: 115 of 230 neurons (of those chosen for other styles: swap 115 of 230) (n = 74, the "
        "set as a whole: adjusted p = 0.400).",
        "None can be named: of 3 heads patched one at a time, none undoes a clear part of the effect of typo@2 (n"
        " = 40). The 95 % interval of a typical head reaches 4 points to either side.",
    ]


def test_a_lens_that_does_not_read_the_clean_word_says_nothing_of_the_mistyped(tmp_path):
    write_run(tmp_path, effect=True)
    table = pd.read_csv(tmp_path / "word_recovery.csv").assign(clean_rank_median=[1, 8000, 1234, 2000])
    table.to_csv(tmp_path / "word_recovery.csv", index=False)
    told = [one for one in findings(tmp_path) if "lens" in one.text]
    assert [one.text for one in told] == [
        "The logit lens cannot tell: it does not read the words that typo@2 mistypes in the clean prompt either "
        "(median rank at the best layer: 1,234; n = 150, those of the first prompts that allow the comparison)."
    ]
    assert not told[0].is_claim


@pytest.mark.parametrize(
    ("share", "told"), [(0.57, "Mostly: "), (0.55, "Not clear whether most are: "), (0.43, "Mostly not: ")]
)
def test_most_words_are_told_only_if_the_interval_says_so(tmp_path, share, told):
    line = against_control("swap", 0.1, 0.2, 0.3, measure="own_nearest", region="edited", layer=3, control_estimate=0.5)
    line |= with_interval("estimate", share, 0.06, low="ci_low", high="ci_high")
    pd.DataFrame([line]).to_csv(tmp_path / "activation_diffs.csv", index=False)
    assert [one.text[: len(told)] for one in findings(tmp_path)] == [told]


@pytest.mark.parametrize(
    ("limit", "told"),
    [
        (0.05, " A difference of 5.0 points would have been found (80 % power)."),
        (0.522, " So few rows show only a difference of 52.2 points or more (80 % power)."),
        (0.95, " With so few rows no difference would have been found."),
    ],
)
def test_a_difference_that_cannot_be_is_not_said_to_be_found(limit, told):
    assert share_limit(limit, 0.92) == told


def test_a_ranking_that_repeats_weakly_repeats_in_part(tmp_path):
    write_run(tmp_path, effect=True)
    table = pd.read_csv(tmp_path / "head_overlap.csv").assign(cross_half_spearman=0.31, ci_low=0.07, ci_high=0.51)
    table.to_csv(tmp_path / "head_overlap.csv", index=False)
    (text,) = [one.text for one in findings(tmp_path) if one.rule == "heads"]
    assert "Their ranking repeats in part on other prompts: rank correlation 0.31 [0.07, 0.51]." in text


def test_a_unit_whose_change_is_small_beside_its_level_goes_into_the_fold(tmp_path):
    write_run(tmp_path, effect=True)
    table = pd.read_csv(tmp_path / "typo_heads.csv").assign(mean_control=5.0)
    table.to_csv(tmp_path / "typo_heads.csv", index=False)
    small, usual = [one for one in findings(tmp_path) if one.rule in ("heads found again", "neurons found again")]
    assert "0.0200 [0.0160, 0.0240] more with typo@2 than with split@typo@2, 0.4 % of its level there." in small.text
    assert (small.aside, usual.aside) == (True, False)


def test_heads_whose_ranking_does_not_repeat_are_not_named(tmp_path):
    texts = [one.text for one in findings(write_run(tmp_path, effect=True, repeats=False))]
    assert any(text.startswith("None can be named: no head's attention") for text in texts)
    assert not any("7.0" in text for text in texts)


@pytest.mark.parametrize("gone", ["answers_summary", "head_overlap", "decomposition"])
def test_a_missing_table_takes_its_sentence_with_it(tmp_path, gone):
    write_run(tmp_path, effect=True)
    (tmp_path / f"{gone}.csv").unlink()
    found = findings(tmp_path)
    assert f"{gone}.csv" not in {one.source for one in found}
    if gone == "answers_summary":  # the style is then that of the smallest p, the first of equals
        assert found[1].text.startswith("60 % [48, 72] of the change with swap")


def test_nothing_varied(tmp_path):
    lines = [accuracy("normal", np.nan, np.nan), accuracy("swap", 0.0, np.nan, half=np.nan)]
    table = pd.DataFrame(lines).assign(estimate=0.5, minimum_detectable_difference_adjusted=np.nan)
    table.to_csv(tmp_path / "maths_summary.csv", index=False)
    assert [one.text for one in findings(tmp_path)] == [
        "Not detectably: with swap, the accuracy changes by 0 points (n = 150, no p, because nothing varied)."
    ]


QUESTIONS = [
    "Do the answers get worse?",
    "How much of it is tokenisation?",
    "How much of a tone's effect is its length?",
    "Is the word repaired inside, and where?",
    "Which head should I look at?",
    "Which neurons react?",
    "Which head changes the answer?",
]


@pytest.mark.parametrize("effect", [True, False])
def test_every_question_of_a_reader_is_answered_once_in_order(tmp_path, effect):
    asked = [one.question for one in findings(write_run(tmp_path, effect=effect))]
    assert [question for question, _ in itertools.groupby(asked)] == QUESTIONS


@pytest.mark.parametrize(
    ("limits", "told"),
    [
        ((0.2, 0.2), " A change of 20.0 points would have been found (80 % power)."),
        ((0.56, 0.56), " With so few prompts no change would have been found."),
    ],
)
def test_no_change_beyond_all_answers_is_said_to_be_found(tmp_path, limits, told):
    lines = [accuracy("normal", np.nan, np.nan), accuracy("swap", -0.1, 0.4), accuracy("polite", 0.0, 0.5)]
    lines[0]["estimate"] = 0.55
    for line, limit in zip(lines[1:], limits, strict=True):
        line["minimum_detectable_difference_adjusted"] = limit
    pd.DataFrame(lines).to_csv(tmp_path / "maths_summary.csv", index=False)
    (finding,) = findings(tmp_path)
    assert finding.text.endswith(f"(n = 150, adjusted p = 0.400).{told}")


def test_a_style_without_a_control_has_no_parts(tmp_path):
    pd.DataFrame([against_control("swap", 3.0, 1.0, 1e-9, measure="recovery_depth", n_censored=3)]).assign(
        control=np.nan
    ).to_csv(tmp_path / "activation_diffs_summary.csv", index=False)
    assert findings(tmp_path) == []
    (tmp_path / "head_sensitivity.csv").write_text("style,layer,head,measure\n")
    assert findings(tmp_path) == []
    assert findings(tmp_path / "nothing") == []


def test_the_noise_of_the_numbers_is_no_claim(tmp_path):
    again = accuracy("normal@again", 0.0067, np.nan) | {"right_to_wrong": 1, "wrong_to_right": 2}
    pd.DataFrame([accuracy("normal", np.nan, np.nan), accuracy("swap", -0.3, 1e-9), again]).to_csv(
        tmp_path / "maths_summary.csv", index=False
    )
    harm, noise, parts = findings(tmp_path)
    assert (harm.is_claim, noise.is_claim, parts.is_claim) == (True, False, False)
    assert parts.text.startswith("Not known, because the run has no control of swap: split@swap if it is a typo")
    assert noise.text == (
        "Numerical noise: the same clean prompts in other batches change 3 of 150 verdicts (1 [−5, 7] points)."
    )


def test_a_damaged_section_is_one_line(tmp_path):
    write_section(tmp_path, UNITS)
    path = tmp_path / "neuron_sensitivity.section.json"
    path.write_text(path.read_text().replace('"title"', '"titel"'))
    with pytest.raises(UserError, match=r"neuron_sensitivity\.section\.json: cannot be read"):
        read_sections(tmp_path)
