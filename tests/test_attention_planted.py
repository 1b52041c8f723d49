"""Planted truth for the head ranking: a head that looks at typos only comes first, and noise stays quiet."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from attention.answer_flips import Answers, flip_association, rank_test
from attention.head_overlap import GROUPS, cross_half, group_sums
from attention.heads import MEASURES, SHOWN, Comparison, compare, overlap_table
from command_line import UserError
from file_output import read_csv
from head_sensitivity import main
from paired_stats import benjamini_hochberg, deal
from run_store import open_run
from scipy import stats
from synthetic_run import prompt_rows, write_run

LAYER, HEAD = 2, 1


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    """head_sensitivity.csv of a run in which head (2, 1) attends to the edited word only when it is a typo."""

    def look_at_typos(scores: torch.Tensor, style: str, index: int, regions: dict[str, torch.Tensor]) -> None:
        if style in ("swap", "missing"):
            scores[LAYER, HEAD][:, regions["edited"]] += 3.0

    folder = tmp_path_factory.mktemp("planted")
    rows = prompt_rows(60, ["swap", "missing", "polite"], templates=20)
    write_run(folder / "run", rows, rows_per_file=16, layers=4, heads=3, scores=look_at_typos)
    assert main(["--run_dir", str(folder / "run"), "--results_dir", str(folder / "out"), "--all_measures"]) == 0
    return pd.read_csv(folder / "out" / "head_sensitivity.csv")


@pytest.mark.parametrize("style", ["swap", "missing"])
@pytest.mark.parametrize(
    "measure", ["edited_mass_last", "edited_mass_mean", "edited_log2_mass_last", "edited_density_last"]
)
def test_the_planted_head_is_ranked_first(planted: pd.DataFrame, style: str, measure: str) -> None:
    rows = planted[(planted["style"] == style) & (planted["measure"] == measure)].sort_values("rank")
    first = rows.iloc[0]
    assert (first["layer"], first["head"]) == (LAYER, HEAD)
    assert first["difference"] > 0
    assert first["p_adjusted"] < 1e-6


def test_a_head_that_reacts_to_another_style_is_not_blamed(planted: pd.DataFrame) -> None:
    rows = planted[(planted["style"] == "polite") & (planted["measure"] == "edited_mass_last")]
    own = rows[(rows["layer"] == LAYER) & (rows["head"] == HEAD)].iloc[0]
    typo = planted[(planted["style"] == "swap") & (planted["measure"] == "edited_mass_last") & (planted["rank"] == 1)]
    assert abs(own["difference"]) < 0.1 * typo.iloc[0]["difference"]


def comparison(values: np.ndarray, clusters: list[str], style: str = "swap", control: str | None = None) -> Comparison:
    """A style that is `values` [n,L,H] (of every measure, or [n,L,H,M]) away from its reference form."""
    if values.ndim == 3:
        values = np.repeat(values[..., None], len(MEASURES), axis=-1)
    return compare(style, [*range(values.shape[1])], values, values, clusters, deal(clusters, GROUPS), control=control)


@pytest.mark.parametrize("tails", ["normal", "heavy"])
def test_under_a_null_at_most_five_percent_of_runs_name_a_head(tails: str) -> None:
    # Each measure is one simulated run: 6 layers x 8 heads, 40 templates of 1 to 5 rows that share their fate.
    runs, layers, heads = 36 * len(MEASURES), 6, 8
    rng = np.random.default_rng(3)
    sizes = rng.integers(1, 6, 40)
    clusters = [f"t{c}" for c, size in enumerate(sizes) for _ in range(size)]
    shape = (layers, heads, runs)
    draw = (lambda *s: rng.standard_normal(s)) if tails == "normal" else (lambda *s: rng.standard_t(5, s))
    values = []
    for size in sizes:
        shared = draw(1, *shape) + draw(1, layers, 1, runs)  # heads of a layer err together
        values.append(shared + draw(int(size), *shape))
    named = 0
    for part in np.split(np.concatenate(values), 36, axis=-1):
        found = comparison(part, clusters, "null", "split@null").tables["head"]
        assert set(found["n"]) == {len(clusters)}
        named += (found.groupby("measure")["p_adjusted"].min() < 0.05).sum()
    # About 500 runs at a true 5 %: 37 or more happen once in 100 tries.
    assert named <= stats.binom.ppf(0.99, runs, 0.05)


def test_effect_size_rank_and_adjustment_of_a_planted_effect() -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal((80, 5, 6))
    values[:, 3, 4] += 0.9
    tables = comparison(values, [f"t{i // 2}" for i in range(80)]).tables
    found, layers = (table[table["measure"] == "edited_mass_last"] for table in tables.values())
    assert (found.iloc[0]["layer"], found.iloc[0]["head"]) == (3, 4)
    assert found.iloc[0]["p_adjusted"] < 1e-6
    assert found.iloc[0]["p"] < 1e-4 * found.iloc[1]["p"]
    tested = stats.false_discovery_control(found["p"])
    np.testing.assert_allclose(found["p_adjusted"], tested)
    assert layers.iloc[0]["layer"] == 3
    expected = values[:, 3, 4].mean() / values[:, 3, 4].std(ddof=1)
    assert found.iloc[0]["effect_size"] == pytest.approx(expected)


# --- overlap and reliability


def _overlap(styles: list[np.ndarray]):
    """The overlap of styles with changes [n,K], each row a template of its own."""
    labels = [f"t{i}" for i in range(len(styles[0]))]
    groups = deal(labels, GROUPS)
    parts = [group_sums(values, np.array([groups[label] for label in labels]), GROUPS) for values in styles]
    return cross_half(np.stack([sums for sums, _ in parts]), np.stack([counts for _, counts in parts]))


def test_reliability_is_high_for_a_fact_and_none_for_noise() -> None:
    rng = np.random.default_rng(1)
    truth = rng.standard_normal(120)
    fact, noise = truth + rng.standard_normal((200, 120)) * 3, rng.standard_normal((200, 120))
    found = _overlap([fact, noise])
    # Spearman of two half means: signal 1, noise 9 / 100 a half, so Pearson is 1 / 1.09.
    assert found.spearman[0, 0] == pytest.approx(6 / math.pi * math.asin(1 / 1.09 / 2), abs=0.06)
    assert found.ci_low[0, 0] > 0.8
    assert abs(found.spearman[1, 1]) < 0.2
    assert found.ci_low[1, 1] < 0 < found.ci_high[1, 1]
    assert found.top_overlap[0, 0] > 3 * found.top_overlap[1, 1]


def test_a_head_without_rows_leaves_the_others_ranked_and_a_style_without_any_takes_nothing_along() -> None:
    rng = np.random.default_rng(5)
    values = rng.standard_normal((2, 80, 20)) + 2 * rng.standard_normal(20)
    lacking, empty = values.copy(), np.full((80, 20), np.nan)
    lacking[0, :, [3, 7]] = np.nan
    found, expected = _overlap([*lacking, empty]), _overlap([*np.delete(values, [3, 7], axis=2)])
    np.testing.assert_allclose(found.spearman[:2, :2], expected.spearman)
    np.testing.assert_allclose(found.top_overlap[:2, :2], expected.top_overlap)
    assert (found.heads, expected.heads) == (18, 18)
    assert np.isfinite(found.ci_low[:2, :2]).all()
    assert np.isnan(found.spearman[2]).all()


def test_two_noisy_styles_that_share_their_clean_rows_do_not_seem_to_agree() -> None:
    rng = np.random.default_rng(2)
    overlaps, naive = [], []
    for _ in range(20):
        clean = rng.standard_normal((96, 60))
        styles = [rng.standard_normal((96, 60)) - clean for _ in range(2)]
        overlaps.append(_overlap(styles).spearman[0, 1])
        naive.append(stats.spearmanr(styles[0].mean(0), styles[1].mean(0)).statistic)
    assert np.mean(naive) > 0.35  # the trap: the common clean rows alone
    assert abs(np.mean(overlaps)) < 0.1


def test_overlap_table_names_both_styles_and_stays_empty_with_few_templates() -> None:
    rng = np.random.default_rng(4)
    clusters = [f"t{i % 3}" for i in range(30)]
    table = overlap_table([comparison(rng.standard_normal((30, 2, 4)), clusters, name) for name in ("swap", "missing")])
    assert set(zip(table["style"], table["other_style"], strict=True)) == {
        ("swap", "swap"), ("swap", "missing"), ("missing", "missing")
    }  # fmt: skip
    assert table["cross_half_spearman"].isna().all()


# --- flips


def association(change: np.ndarray, flip: np.ndarray, clusters: list[str] | None = None) -> dict[str, np.ndarray]:
    return flip_association(change, flip, clusters or [f"t{i}" for i in range(len(change))])


def test_point_biserial_equals_scipy() -> None:
    rng = np.random.default_rng(5)
    change, flip = rng.standard_normal((90, 3, 2)), (rng.random(90) < 0.3).astype(float)
    change[:, 1, 0] += flip
    change[4, 2, 1] = np.nan
    found = association(change, flip)
    for cell in np.ndindex(3, 2):
        known = ~np.isnan(change[(slice(None), *cell)])
        expected = stats.pointbiserialr(flip[known], change[(slice(None), *cell)][known])
        assert found["point_biserial_r"][cell] == pytest.approx(expected.statistic, abs=1e-9)
        interval = stats.pearsonr(flip[known], change[(slice(None), *cell)][known]).confidence_interval()
        assert found["ci_low"][cell] == pytest.approx(interval.low, abs=0.08)
        assert found["ci_high"][cell] == pytest.approx(interval.high, abs=0.08)
    assert found["change_if_flipped"][1, 0] == pytest.approx(change[flip == 1, 1, 0].mean())
    assert found["change_if_still_right"][1, 0] == pytest.approx(change[flip == 0, 1, 0].mean())


def test_flips_keep_their_error_rate_with_clustered_rows() -> None:
    # Change and flip both depend on the template, but not on each other: rows alone would look certain.
    rng = np.random.default_rng(6)
    clusters = [f"t{i // 5}" for i in range(300)]
    flip = np.repeat(rng.random(60) < 0.3, 5).astype(float)
    change = np.repeat(rng.standard_normal((60, 800)), 5, axis=0) + 0.3 * rng.standard_normal((300, 800))
    found = association(change, flip, clusters)
    assert (found["p"] < 0.05).mean() < 0.085
    assert (stats.pearsonr(np.repeat(flip[:, None], 800, axis=1), change, axis=0).pvalue < 0.05).mean() > 0.2


@pytest.mark.parametrize(("rows", "flipped"), [(40, 5), (60, 15), (200, 30)])
def test_under_a_null_at_most_five_percent_of_runs_tie_a_head_to_wrong_answers(rows: int, flipped: int) -> None:
    # 200 runs of 270 heads, rows of one template alike: what counts is p far out in the tail.
    runs, rng = 200, np.random.default_rng(8)
    template = rng.integers(0, 30, rows)
    change = rng.standard_normal((rows, runs * 270)) + 0.5 * rng.standard_normal((30, runs * 270))[template]
    flip = np.zeros(rows)
    flip[rng.permutation(rows)[:flipped]] = 1
    found = association(change, flip, [f"t{one}" for one in template])
    adjusted = [benjamini_hochberg(p) for p in found["p"].reshape(runs, 270)]
    assert sum(p.min() < 0.05 for p in adjusted) <= stats.binom.ppf(0.99, runs, 0.05)


@pytest.mark.parametrize("templates", [60, 1000])
@pytest.mark.parametrize("shape", ["lognormal", "mostly zero"])
def test_skewed_changes_name_no_more_heads_under_a_null(shape: str, templates: int) -> None:
    # A t test of the covariance names a head in four to nine of ten such runs.
    runs, rows, rng = 40, 1000, np.random.default_rng(9)
    change = rng.standard_normal((rows, runs * 270))
    change = np.exp(2 * change) if shape == "lognormal" else np.where(change > 1.5, change, 0)
    flip = np.zeros(rows)
    flip[rng.permutation(rows)[:100]] = 1
    p = rank_test(change, flip, [f"t{one}" for one in rng.integers(0, templates, rows)])
    adjusted = [benjamini_hochberg(p) for p in p.reshape(runs, 270)]
    assert sum(p.min() < 0.05 for p in adjusted) <= stats.binom.ppf(0.99, runs, 0.05)


def test_rank_test_is_wilcoxons_with_rows_of_their_own() -> None:
    rng = np.random.default_rng(10)
    change, flip = rng.standard_normal((300, 40)), (rng.random(300) < 0.3).astype(float)
    change += np.linspace(0, 0.5, 40) * flip[:, None]
    change[:, ::4] = change[:, ::4].round()  # ties
    change[rng.random(change.shape) < 0.05] = np.nan
    found = rank_test(change, flip, [f"t{i}" for i in range(300)])
    for cell in range(40):
        sides = [values[~np.isnan(values)] for values in (change[flip == 1, cell], change[flip == 0, cell])]
        expected = stats.mannwhitneyu(*sides, method="asymptotic", use_continuity=False).pvalue
        own, theirs = stats.norm.isf(found[cell] / 2), stats.norm.isf(expected / 2)
        assert 0.85 * theirs - 0.1 <= own <= theirs + 0.05  # the larger of two p: never surer than Wilcoxon's


def test_a_head_whose_reaction_goes_with_wrong_answers_is_named(tmp_path) -> None:
    rng = np.random.default_rng(7)
    wrong = rng.random(80) < 0.4

    def look_when_wrong(scores: torch.Tensor, style: str, index: int, regions: dict[str, torch.Tensor]) -> None:
        if style == "swap" and wrong[index]:
            scores[0, 2][:, regions["edited"]] += 2.0

    run = write_run(
        tmp_path / "run", prompt_rows(80, ["swap"], templates=40), rows_per_file=32, layers=2, heads=3,
        raw_layers=(), scores=look_when_wrong,
    )  # fmt: skip
    items = [("normal", i, True) for i in range(80)] + [("swap", i, not wrong[i]) for i in range(80)]
    items[5] = ("normal", 5, False)  # wrong before the typo: no flip, and left out
    pd.DataFrame(items, columns=["style", "original_index", "correct"]).to_csv(tmp_path / "items.csv", index=False)
    out = tmp_path / "out"
    command = ["--run_dir", str(run), "--results_dir", str(out), "--maths_items", str(tmp_path / "items.csv")]
    assert main(command) == 0
    drawn = pd.read_csv(out / "head_answer_flips.csv")
    assert set(drawn["measure"]) == {"edited_log2_mass_last"}
    assert set(pd.read_csv(out / "head_sensitivity.csv")["measure"]) == {*SHOWN}
    assert main([*command, "--all_measures"]) == 0
    found = pd.read_csv(out / "head_answer_flips.csv")
    best = found[(found["measure"] == "edited_mass_last") & (found["rank"] == 1)].iloc[0]
    assert (best["layer"], best["head"]) == (0, 2)
    assert best["p_adjusted"] < 1e-6
    assert best["ci_low"] > 0.5
    assert (best["n"], best["n_flipped"]) == (79, wrong.sum() - wrong[5])
    assert best["change_if_flipped"] > best["change_if_still_right"]
    assert (out / "head_answer_flips_swap.png").stat().st_size > 10_000
    assert json.loads((run / "prompts.json").read_text())[0]["_template"] == open_run(run).template(0)


@pytest.mark.parametrize("style", ["None", "NA", "null", "nan", "7"])
def test_a_style_may_have_any_name(tmp_path: Path, style: str) -> None:
    """A style that pandas would read as missing keeps its flips, its tables and its edits."""
    run = write_run(tmp_path / "run", prompt_rows(24, [style]), raw_layers=())
    items = [("normal", i, True) for i in range(24)] + [(style, i, i % 2 == 0) for i in range(24)]
    pd.DataFrame(items, columns=["style", "original_index", "correct"]).to_csv(tmp_path / "items.csv", index=False)
    answers = Answers(tmp_path / "items.csv")
    assert answers.flips(style, "normal", np.array([0, 1, 2])).tolist() == [0, 1, 0]
    command = ["--run_dir", str(run), "--results_dir", str(tmp_path), "--maths_items", str(tmp_path / "items.csv")]
    assert main(command) == 0
    for name in ("head_sensitivity", "head_answer_flips"):
        assert set(read_csv(tmp_path / f"{name}.csv")["style"]) == {style}


def test_a_verdict_that_is_neither_right_nor_wrong_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "items.csv"
    path.write_text("style,original_index,correct\nnormal,0, TRUE \nnormal,1,0\nnormal,2,\n")
    answers = Answers(path)
    assert [answers.right("normal", index) for index in (0, 1)] == [1, 0]
    assert math.isnan(answers.right("normal", 2))
    path.write_text("style,original_index,correct\nnormal,0,yes\nnormal,1,True\nnormal,2,no\n")
    with pytest.raises(UserError, match="correct is 'yes' in 2 lines; write True, False, or nothing"):
        Answers(path)
