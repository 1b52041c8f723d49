"""robustness_summary.csv: each measure against values worked out by hand, planted truths, and coverage of intervals."""

from __future__ import annotations

import math

import evaluate_predictions
import numpy as np
import pandas as pd
import pytest
import robustness
import statsmodels.formula.api as smf
import torch
from file_output import read_csv
from robustness import glmm_shares, maximum_interval, robustness_summary, write_robustness
from run_store import open_run
from statsmodels.stats.anova import anova_lm
from synthetic_run import prompt_rows, with_controls, write_run


def items_of(correct: dict[str, list], values: dict[str, list] | None = None, **columns) -> pd.DataFrame:
    """Scored answers of {style: one cell a row}; a cell None: this row lacks the style."""
    lines = []
    for style, cells in correct.items():
        for row, cell in enumerate(cells):
            if cell is not None:
                value = values[style][row] if values else f"{style} {row}"
                lines.append({"style": style, "original_index": row, "sample": 0, "correct": cell, "value": value})
    table = pd.DataFrame(lines).assign(template=None, identical=False, response="said")
    return table.assign(**{name: table["original_index"].map(dict(enumerate(of))) for name, of in columns.items()})


def measures_of(items: pd.DataFrame, style: str = "all") -> pd.DataFrame:
    table = robustness_summary(items, "normal")
    return table[table["style"] == style].set_index("measure")


# Rows x forms, and what each answered: row 1 is wrong in the same words twice, row 2 three times, twice in the same.
CORRECT = {"normal": [1, 1, 0, 1], "swap": [1, 0, 0, 1], "typo@1": [0, 0, 0, 1]}
ANSWERS = {"normal": ["7", "4", "1", "9"], "swap": ["7", "5", "1", "9"], "typo@1": ["8", "5", "2", "9"]}


def test_values_worked_out_by_hand():
    found = measures_of(items_of(CORRECT, ANSWERS))["estimate"]
    # Right: normal 3 of 4, swap 2, typo@1 1.
    assert found["worst_accuracy"] == 1 / 4
    assert found["best_accuracy"] == 3 / 4
    assert found["spread"] == 3 / 4 - 1 / 4
    # |differences| of the pairs normal-swap, normal-typo@1, swap-typo@1: 0 1 1, 1 1 0, 0 0 0, 0 0 0.
    assert found["pss"] == pytest.approx((2 / 3 + 2 / 3 + 0 + 0) / 4)
    # Pairs with one answer: 7 7 8: 1 of 3; 4 5 5: 1 of 3; 1 1 2: 1 of 3; 9 9 9: 3 of 3.
    assert found["consistency_rate"] == pytest.approx((1 / 3 + 1 / 3 + 1 / 3 + 1) / 4)
    # 1 - 2/3 and 1 - 1/3.
    assert found["pdr"] == pytest.approx((1 / 3 + 2 / 3) / 2)
    # Sum 6 of 12 cells: correction 36/12 = 3. Total 6 - 3 = 3. Rows (2² + 1² + 0² + 3²)/3 - 3 = 5/3. Forms
    # (3² + 2² + 1²)/4 - 3 = 1/2. Residual 3 - 5/3 - 1/2 = 5/6. Mean squares 5/9, 1/4, 5/36. Components: row
    # (5/9 - 5/36)/3 = 5/36, form (1/4 - 5/36)/4 = 1/36, residual 5/36. Sum 11/36.
    assert found["variance_share_row"] == pytest.approx(5 / 11)
    assert found["variance_share_style"] == pytest.approx(1 / 11)
    assert found["variance_share_residual"] == pytest.approx(5 / 11)
    # typo@1 - normal: -1, -1, 0, 0 for one edit.
    assert found["accuracy_slope"] == -1 / 2


def test_each_style_has_its_performance_drop_rate_and_says_its_forms():
    table = robustness_summary(items_of(CORRECT, ANSWERS), "normal")
    drops = table[table["measure"] == "pdr"].set_index("style")
    assert drops["estimate"].to_dict() == pytest.approx({"all": 1 / 2, "swap": 1 / 3, "typo@1": 2 / 3})
    assert drops.loc["swap", "forms"] == "normal, swap"
    whole = table[table["style"] == "all"].set_index("measure")["forms"]
    assert whole["worst_accuracy"] == "typo@1"
    assert whole["best_accuracy"] == "normal"
    assert whole["pss"] == "normal, swap, typo@1"
    assert (table["n"] == 4).all()


def test_forms_that_change_nothing():
    forms, answers = ("normal", "swap", "polite"), [str(row) for row in range(60)]
    found = measures_of(items_of(dict.fromkeys(forms, [1, 0, 1] * 20), dict.fromkeys(forms, answers)))
    expected = {"spread": 0, "pss": 0, "pdr": 0, "consistency_rate": 1, "variance_share_row": 1}
    for measure, value in expected.items():
        assert tuple(found.loc[measure, ["estimate", "ci_low", "ci_high"]]) == (value, value, value), measure
    assert math.isnan(found.loc["spread", "p"])


def test_controls_repairs_and_the_clean_form_again_are_no_forms():
    names = ("split@swap", "neutral@polite", "repaired@swap", "normal@again", "split")
    others = {name: [0, 0, 0, 0] for name in names}
    pd.testing.assert_frame_equal(
        robustness_summary(items_of(CORRECT, ANSWERS), "normal"),
        robustness_summary(items_of(CORRECT | others, ANSWERS | others), "normal"),
    )
    assert robustness_summary(items_of({"normal": [1, 0], **others}), "normal").empty
    assert robustness_summary(items_of({"swap": [1, 0], "main": [1, 1]}), "normal").empty


def test_rows_need_all_forms():
    lacking = {style: [*cells, 1, 1] for style, cells in CORRECT.items()}
    lacking["swap"][4] = None
    items = items_of(lacking, {style: [*cells, "0", "0"] for style, cells in ANSWERS.items()})
    items.loc[(items["style"] == "swap") & (items["original_index"] == 5), "identical"] = True
    found = measures_of(items)
    assert found.loc["pss", ["n", "n_clusters"]].tolist() == [4, 4]
    assert found.loc["pss", "estimate"] == pytest.approx(1 / 3)
    assert found.loc["accuracy_slope", "n"] == 6  # needs no swap


def test_no_row_with_all_forms_gives_no_line():
    items = items_of({"normal": [1, 1], "typo@1": [0, 1]})
    assert robustness_summary(items.assign(identical=items["style"] != "normal"), "normal").empty


def test_answers_agree_that_are_both_right_or_the_same_unread_text():
    values = {"normal": ["it is paris", None, None], "swap": ["Paris", None, None]}
    items = items_of({"normal": [1, 0, 0], "swap": [1, 0, 0]}, values)
    items.loc[(items["style"] == "swap") & (items["original_index"] == 2), "response"] = "something else"
    assert measures_of(items).loc["consistency_rate", "estimate"] == pytest.approx(2 / 3)


def test_samples_are_averaged_within_their_row():
    first = items_of({"normal": [1, 1], "swap": [1, 0]}, {"normal": ["a", "b"], "swap": ["a", "c"]})
    second = items_of({"normal": [1, 1], "swap": [0, 0]}, {"normal": ["a", "b"], "swap": ["d", "b"]})
    found = measures_of(pd.concat([first, second.assign(sample=1)]))["estimate"]
    assert found["pss"] == pytest.approx((1 / 2 + 1) / 2)  # |1 - 1/2|, |1 - 0|
    assert found["consistency_rate"] == pytest.approx((1 / 2 + 1 / 2) / 2)
    assert "glmm_share_row" not in found  # scores of 1/2 are not yes or no


def test_variance_shares_are_those_of_the_analysis_of_variance():
    cells = np.random.default_rng(3).integers(0, 2, (30, 5)).astype(float)
    cells[:, 0] = 1
    cells[:9] = np.maximum(cells[:9], cells[:9, 1:2])
    forms = ["normal", *"abcd"]
    found = measures_of(items_of(dict(zip(forms, cells.T.tolist(), strict=True))))["estimate"]
    long = pd.DataFrame(cells, columns=forms).melt(ignore_index=False).reset_index(names="row")
    squares = anova_lm(smf.ols("value ~ C(row) + C(variable)", long).fit())["mean_sq"]
    residual = squares["Residual"]
    parts = np.array([(squares["C(row)"] - residual) / 5, (squares["C(variable)"] - residual) / 30, residual])
    names = [f"variance_share_{name}" for name in ("row", "style", "residual")]
    assert found[names].to_numpy() == pytest.approx(parts / parts.sum())


def test_slope_is_exact_on_a_line_and_that_of_a_regression_with_row_effects():
    line = {f"typo@{k}": [start - 0.1 * k for start in (0.9, 0.7, 1.0)] for k in (1, 2, 4)}
    found = measures_of(items_of({"normal": [0.9, 0.7, 1.0], **line})).loc["accuracy_slope"]
    assert found["estimate"] == pytest.approx(-0.1)
    assert found["forms"] == "normal, typo@1, typo@2, typo@4"
    cells = np.random.default_rng(5).integers(0, 2, (40, 4)).astype(float)
    names = ["normal", "typo@1", "typo@2", "typo@4"]
    items = items_of(dict(zip(names, cells.T.tolist(), strict=True)), template=[str(row // 2) for row in range(40)])
    own = measures_of(items).loc["accuracy_slope"]
    long = items.assign(edits=items["style"].map(dict(zip(names, (0, 1, 2, 4), strict=True))))
    fit = smf.ols("correct ~ edits + C(original_index)", long).fit()
    assert own["estimate"] == pytest.approx(fit.params["edits"])
    assert own["n_clusters"] == 20
    # 80 % power needs about 2.9 standard errors at 19 degrees of freedom.
    error = (own["ci_high"] - own["ci_low"]) / (2 * 2.093)
    assert own["minimum_detectable_difference"] == pytest.approx(2.96 * error, rel=0.02)


def test_slope_of_the_answers_log_probability():
    items = items_of({"normal": [1, 0, 1], "typo@1": [0, 0, 1], "typo@3": [0, 0, 1]})
    edits = items["style"].map({"normal": 0, "typo@1": 1, "typo@3": 3})
    items["answer_logprob"] = -1.0 - items["original_index"] - 0.5 * edits
    found = measures_of(items)
    assert found.loc["answer_logprob_slope", "estimate"] == pytest.approx(-0.5)
    items.loc[(items["style"] == "typo@3") & (items["original_index"] == 0), "answer_logprob"] = None
    assert measures_of(items).loc[["answer_logprob_slope", "accuracy_slope"], "n"].tolist() == [2, 3]


# log P of a row's tokens after their own prompt, of the clean response after the style's prompt, and of the style's
# response after the clean prompt.
CLEAN = [-1.0, -1.0]
SWAP = [([-1.0, -1.0, -2.0], -3.0, -6.0), (CLEAN, -2.0, -2.0), ([-1.0], -4.0, -1.5), ([-1.0, -2.0], -2.0, -2.0)]


def test_posix_by_hand(tmp_path):
    def change(row: dict, style: str, index: int) -> None:
        own, clean_here, under_clean = SWAP[index] if style == "swap" else (CLEAN, -2.0, -2.0)
        row |= {"response_ids": torch.zeros(len(own), dtype=torch.long), "response_logprobs": torch.tensor(own)}
        row["response_token_counts"] = len(own)
        if style != "normal":
            row |= {"normal_response_logprob": clean_here, "normal_response_token_count": 2}
            row["response_logprob_under_normal"] = under_clean

    run = open_run(write_run(tmp_path / "run", prompt_rows(4, ["swap", "main"]), rows_per_file=2, change=change))
    table = robustness_summary(items_of({key: [1, 0, 1, 1] for key in ("normal", "swap", "main")}), "normal", run)
    posix = table[table["measure"] == "posix"].set_index("style")
    # |log P(y|x') - log P(y|x)| / 2 tokens and |log P(y'|x) - log P(y'|x')| / tokens of y', halved:
    # (|-3 + 2|/2 + |-6 + 4|/3)/2, (0 + 0)/2, (|-4 + 2|/2 + |-1.5 + 1|/1)/2, (0 + |-2 + 3|/2)/2.
    by_hand = (7 / 12 + 0 + 3 / 4 + 1 / 4) / 4
    assert posix["estimate"].to_dict() == pytest.approx({"all": by_hand / 2, "swap": by_hand, "main": 0})
    assert posix.loc["main", ["ci_low", "ci_high"]].tolist() == [0, 0]
    assert posix.loc["swap", "ci_low"] < by_hand < posix.loc["swap", "ci_high"]
    assert posix["forms"].to_dict() == {"all": "normal, swap, main", "swap": "normal, swap", "main": "normal, main"}
    assert (posix["n"] == 4).all()
    without = open_run(write_run(tmp_path / "without", prompt_rows(4, ["swap", "main"])))
    items = items_of({key: [1, 0, 1, 1] for key in ("normal", "swap", "main")})
    assert "posix" not in set(robustness_summary(items, "normal", without)["measure"])


def test_glmm_finds_planted_shares():
    rng = np.random.default_rng(2)
    logit = rng.normal(0, 2, (200, 1)) + np.linspace(-2, 2, 6)
    found = glmm_shares((rng.random((200, 6)) < 1 / (1 + np.exp(-logit))).astype(float))
    form = np.linspace(-2, 2, 6).var(ddof=1)
    total = 4 + form + math.pi**2 / 3
    assert found == pytest.approx(
        {"row": 4 / total, "style": form / total, "residual": math.pi**2 / 3 / total}, abs=0.07
    )
    assert glmm_shares(np.ones((5, 2))) == {}


def test_draws_take_whole_clusters():
    """Rows that are copies of each other say no more than one of them."""
    rng = np.random.default_rng(7)
    one = {style: rng.integers(0, 2, 40).tolist() for style in ("normal", "swap")}
    copied = {style: np.repeat(cells, 5).tolist() for style, cells in one.items()}
    alone = measures_of(items_of(one))
    together = measures_of(items_of(copied, template=np.repeat(np.arange(40), 5).astype(str)))
    columns = ["estimate", "ci_low", "ci_high"]
    for measure in ("pss", "pdr", "consistency_rate", "spread"):
        assert together.loc[measure, columns].tolist() == pytest.approx(alone.loc[measure, columns].tolist()), measure
    assert together.loc["pss", ["n", "n_clusters"]].tolist() == [200, 40]


def test_one_cluster_has_no_interval():
    found = measures_of(items_of(CORRECT, ANSWERS, template=["t"] * 4))
    assert found["ci_low"].isna().all()
    assert found["estimate"].notna().all()


def test_drop_rate_is_undefined_if_the_clean_form_is_never_right():
    drops = measures_of(items_of({"normal": [0, 0, 0], "swap": [1, 0, 0]})).loc["pdr"]
    assert math.isnan(drops["estimate"])
    assert math.isnan(drops["ci_low"])


def test_stage_3_writes_it_and_removes_it(tmp_path):
    rows = with_controls(prompt_rows(16, ["swap", "typo@1"], templates=8), "swap", lambda _, word, other: word)
    run = write_run(tmp_path / "run", rows)
    assert evaluate_predictions.main(["--run_dir", str(run), "--results_dir", str(tmp_path)]) == 0
    table = read_csv(tmp_path / "robustness_summary.csv")
    summary = read_csv(tmp_path / "maths_summary.csv").set_index("style")["estimate"]
    lines = table[table["style"] == "all"].set_index("measure")
    assert lines.loc["spread", "forms"] == "normal, swap, typo@1"
    forms = summary[["normal", "swap", "typo@1"]]
    assert lines.loc["spread", "estimate"] == pytest.approx(forms.max() - forms.min())
    items = read_csv(tmp_path / "maths_items.csv")
    write_robustness(open_run(run), items[items["style"] == "normal"], "normal", tmp_path)
    assert not (tmp_path / "robustness_summary.csv").exists()


def test_interval_of_a_maximum_holds_where_all_values_are_equal():
    rng = np.random.default_rng(0)
    covered, rejected = 0, 0
    for _ in range(200):
        means = rng.normal(0, 1, 6)
        low, high, p = maximum_interval(means, means + rng.normal(0, 1, (400, 6)))
        covered += low <= 0 <= high
        rejected += p < 0.05
    assert covered >= 186
    assert rejected <= 20


@pytest.mark.stress
@pytest.mark.parametrize("logits", [(0.5, 0.5, 0.5, 0.5), (1.0, 0.0, -1.0, -2.0)])
def test_intervals_hold_the_truth(logits, monkeypatch):
    """50 clusters of two rows, four forms; answers are one of three."""
    monkeypatch.setattr(robustness, "DRAWS", 500)
    rng = np.random.default_rng(1)

    def draw(clusters: int) -> pd.DataFrame:
        ability = np.repeat(rng.normal(0, 1.5, clusters), 2)[:, None]
        right = (rng.random((2 * clusters, 4)) < 1 / (1 + np.exp(-(np.array(logits) + ability)))).astype(float)
        wrong = rng.integers(0, 3, right.shape)
        forms = ("normal", "a", "b", "c")
        values = {form: [f"{w}" if r else f"no {w}" for r, w in zip(right[:, j], wrong[:, j], strict=True)]
                  for j, form in enumerate(forms)}  # fmt: skip
        template = [str(row // 2) for row in range(2 * clusters)]
        cells = {form: right[:, j].tolist() for j, form in enumerate(forms)}
        return items_of(cells, values, template=template)

    monkeypatch.setattr(robustness, "glmm_shares", lambda _: {})
    truth = measures_of(draw(40_000))["estimate"]
    hits = dict.fromkeys(truth.index, 0)
    for _ in range(200):
        found = measures_of(draw(50))
        for name in hits:
            low, high = found.loc[name, ["ci_low", "ci_high"]]
            hits[name] += low - 1e-3 <= truth[name] <= high + 1e-3
    print(hits)
    assert all(count > 178 for count in hits.values()), hits
