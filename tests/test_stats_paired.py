"""paired_stats: against scipy, statsmodels and written-out matrices; calibrated under the null; never a fake p."""

from __future__ import annotations

import itertools
import math
import tracemalloc

import numpy as np
import pandas as pd
import pytest
from paired_stats import (
    benjamini_hochberg,
    clustered_mean,
    clustered_ratio,
    deal,
    design_effect,
    exact_mcnemar,
    holm,
    jackknife_df,
    minimum_detectable_effect,
    paired_difference,
    paired_summary,
    sign_flip_test,
    wilson_interval,
)
from scipy import stats
from statsmodels.stats.multitest import multipletests

DATA_SETS = 2000


# --------------------------------------------------------------------------- one estimate against other software


def test_rows_without_clusters_are_the_paired_t_test():
    rng = np.random.default_rng(1)
    clean, variant = rng.normal(size=40), rng.normal(0.3, 1.5, size=40)
    ours = paired_difference(variant, clean)
    theirs = stats.ttest_rel(variant, clean)
    interval = theirs.confidence_interval(0.95)
    assert ours[:6] == pytest.approx(
        (np.mean(variant - clean), stats.sem(variant - clean), *interval, theirs.statistic, theirs.pvalue)
    )
    assert (ours.df, ours.n, ours.n_clusters) == (pytest.approx(39), 40, 40)


def test_equal_clusters_are_statsmodels_cluster_robust_regression():
    from statsmodels.regression.linear_model import OLS

    rng = np.random.default_rng(2)
    labels = np.repeat(np.arange(12), 7)
    values = rng.normal(size=12)[labels] + rng.normal(size=84)
    order = rng.permutation(84)
    ours = clustered_mean(values[order], labels[order])
    fit = OLS(values, np.ones(84)).fit(cov_type="cluster", cov_kwds={"groups": labels}, use_t=True)
    assert ours.standard_error == pytest.approx(fit.bse[0])
    assert ours.p == pytest.approx(fit.pvalues[0])
    assert (ours.ci_low, ours.ci_high) == pytest.approx(fit.conf_int()[0])


def test_unequal_clusters_are_the_jackknife_with_satterthwaite_degrees_of_freedom():
    rng = np.random.default_rng(3)
    sizes = [1, 2, 2, 5, 9, 14]
    labels = np.repeat(np.arange(len(sizes)), sizes)
    values = rng.normal(size=len(sizes))[labels] + rng.normal(size=len(labels))
    error, df = _jackknife_by_hand(values, labels)
    ours = clustered_mean(values, [f"template {label}" for label in labels])
    assert ours.standard_error == pytest.approx(error)
    assert ours.df == pytest.approx(df)
    assert ours.p == pytest.approx(2 * stats.t.sf(abs(values.mean()) / error, df))


def _jackknife_by_hand(values, labels):
    """Leave each cluster out in turn; Satterthwaite df of that quadratic form for independent rows."""
    names = np.unique(labels)
    rows = [(labels != name) / (labels != name).sum() - 1 / len(values) for name in names]
    form = np.array(rows)  # [C, n]: mean without the cluster - mean
    variance = (len(names) - 1) / len(names) * np.sum((form @ values) ** 2)
    inner = form @ form.T
    return math.sqrt(variance), np.trace(inner) ** 2 / np.sum(inner**2)


def test_cells_and_single_columns_agree():
    rng = np.random.default_rng(4)
    values = rng.normal(size=(60, 3, 4)).astype(np.float32)
    values[5, 1, 2] = values[17, 0, 0] = np.nan
    values[:, 2, 3] = np.nan
    labels = rng.integers(0, 9, size=60).tolist()
    whole = clustered_mean(values, labels)
    for cell in itertools.product(range(3), range(4)):
        column = values[(slice(None), *cell)]
        known = ~np.isnan(column)
        alone = clustered_mean(column[known], [label for label, use in zip(labels, known, strict=True) if use])
        np.testing.assert_allclose([field[cell] for field in whole], alone, rtol=1e-9)


def test_clusters_are_never_pooled():
    rng = np.random.default_rng(5)
    labels = [f"addition_{i // 2}" for i in range(6000)]
    values = rng.normal(size=(6000, 2)).astype(np.float32)
    order = rng.permutation(6000)
    found = clustered_mean(values[order], [labels[i] for i in order])
    assert (found.n_clusters == 3000).all()
    for ours, theirs in zip(found, clustered_mean(values.astype(np.float64), labels), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_memory_is_that_of_the_values_and_a_few_blocks():
    values = np.ones((2000, 6000), dtype=np.float32) * np.arange(2000)[:, None]  # 48 MB
    tracemalloc.start()
    assert (clustered_mean(values, [f"t{i}" for i in range(2000)]).n_clusters == 2000).all()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 250e6  # blocks of 16 MB, however many cells there are


# --- halves and groups of templates


LABELS = [f"{kind}_{number}" for kind in ("addition", "division") for number in range(146)]


def test_every_seed_has_its_own_halves():
    """292 labels of one pattern: a checksum, which is linear, gave 8 different splits for 3,000 seeds."""
    splits = np.array(
        [[halves[label] for label in LABELS] for seed in range(3000) if (halves := deal(LABELS, 2, seed))]
    )
    assert len(np.unique(splits, axis=0)) == 3000
    assert (splits.sum(axis=1) == 146).all()
    r = np.corrcoef(splits[:600])[np.triu_indices(600, 1)]
    assert abs(r.mean()) < 5 * 291**-0.5 / len(r) ** 0.5
    assert r.std() == pytest.approx(291**-0.5, rel=0.02)  # that of independent random halves
    assert abs(r).max() < 0.45
    # No label and no pair of labels sits in one half more often than by chance.
    assert abs(splits.mean(axis=0) - 0.5).max() < 0.05
    together = np.corrcoef(splits.T)[np.triu_indices(292, 1)]
    assert abs(together).max() < 0.12


def test_groups_are_even_and_do_not_depend_on_the_order_of_the_labels():
    groups = deal(LABELS, 32)
    assert set(np.bincount(list(groups.values()))) <= {9, 10}
    assert groups == deal([*reversed(LABELS), *LABELS], 32)
    assert len(set(deal(LABELS, 1000).values())) == len(LABELS)


# --------------------------------------------------------------------------- calibration


def _sizes(kind: str, clusters: int) -> np.ndarray:
    rng = np.random.default_rng(6)
    if kind == "equal":
        return np.full(clusters, 8)
    return 1 + rng.poisson(rng.gamma(1.0, 10, size=clusters))  # 1 to about 45 rows


def _relabelled_answers(sizes: np.ndarray, data_sets: int, seed: int, shift: float = 0.0):
    """Right/wrong answers to two exchangeable versions: a template is hard or easy, and favours one of the two."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(sizes)), sizes)
    ease = rng.uniform(0.15, 0.85, size=(len(sizes), data_sets))
    favour = rng.uniform(-0.15, 0.15, size=ease.shape)
    first = rng.random((len(labels), data_sets)) < (ease - favour)[labels]
    second = rng.random((len(labels), data_sets)) < (ease + favour + shift)[labels]
    return labels, second.astype(float) - first


# 2,000 data sets know a rate of 5 % to half a point; 16,000 know it to 0.17, so a wrong test cannot pass by luck.
BLOCKS = range(8)


@pytest.mark.parametrize("kind", ["equal", "unequal"])
@pytest.mark.parametrize("clusters", [40, 60])
def test_false_positives_and_coverage_of_answers_under_the_null(kind, clusters):
    sizes = _sizes(kind, clusters)
    estimates = [clustered_mean(difference, labels) for labels, difference in map(_null(sizes), BLOCKS)]
    _check_calibration(estimates, truth=0.0)


@pytest.mark.parametrize("kind", ["equal", "unequal"])
def test_false_positives_and_coverage_of_scores_under_the_null(kind):
    estimates, naive = [], []
    for block in BLOCKS:
        rng = np.random.default_rng(100 + block)
        sizes = _sizes(kind, 50)
        labels = np.repeat(np.arange(50), sizes)
        noise = rng.laplace(size=(len(labels), DATA_SETS))
        difference = rng.normal(size=(50, DATA_SETS))[labels] + noise
        estimates.append(clustered_mean(difference, labels))
        naive.append((stats.ttest_1samp(difference, 0).pvalue < 0.05).mean())
    _check_calibration(estimates, truth=0.0)
    assert np.mean(naive) > 0.2  # the clusters matter: without them the same data reject far too often


def test_intervals_cover_a_true_difference():
    sizes = _sizes("unequal", 50)
    estimates = [clustered_mean(d, labels) for labels, d in map(_null(sizes, shift=-0.1), BLOCKS)]
    covered = [(e.ci_low <= -0.1) & (e.ci_high >= -0.1) for e in estimates]
    assert 0.94 <= np.mean(covered) <= 0.96


def _null(sizes: np.ndarray, shift: float = 0.0):
    return lambda block: _relabelled_answers(sizes, DATA_SETS, seed=100 + block, shift=shift)


def _check_calibration(estimates: list, truth: float) -> None:
    rejected = np.mean([estimate.p < 0.05 for estimate in estimates])
    covered = np.mean([(estimate.ci_low <= truth) & (estimate.ci_high >= truth) for estimate in estimates])
    assert 0.04 <= rejected <= 0.06
    assert 0.94 <= covered <= 0.96


def test_sign_flips_hold_their_level():
    labels, difference = _relabelled_answers(_sizes("unequal", 40), DATA_SETS, seed=10)
    p_values = [sign_flip_test(column, labels, n_resamples=199, seed=i) for i, column in enumerate(difference.T)]
    assert 0.04 <= (np.array(p_values) <= 0.05).mean() <= 0.06


def test_the_minimum_detectable_effect_is_found_in_80_percent():
    rng = np.random.default_rng(12)
    labels = np.repeat(np.arange(50), 6)
    noise = rng.normal(size=(50, DATA_SETS))[labels] + rng.normal(size=(300, DATA_SETS))
    true_error = math.sqrt((1 + 1 / 6) / 50)
    effect = minimum_detectable_effect(true_error, 49)
    assert 0.78 <= (clustered_mean(noise + effect, labels).p < 0.05).mean() <= 0.82


# --------------------------------------------------------------------------- other tests and corrections


def test_exact_mcnemar_is_the_binomial_test_on_the_discordant_pairs():
    rng = np.random.default_rng(13)
    for _ in range(50):
        clean, variant = rng.random(40) < 0.6, rng.random(40) < 0.4
        ours = exact_mcnemar(clean, variant)
        assert (ours.right_to_wrong, ours.wrong_to_right) == ((clean & ~variant).sum(), (~clean & variant).sum())
        expected = stats.binomtest(ours.right_to_wrong, ours.right_to_wrong + ours.wrong_to_right).pvalue
        assert ours.p == pytest.approx(expected)
    assert exact_mcnemar([True, False], [True, False]) == (1.0, 0, 0, 2)


def test_sign_flips_enumerate_all_flips_of_whole_clusters():
    rng = np.random.default_rng(14)
    labels = np.repeat(np.arange(8), [1, 2, 3, 4, 1, 2, 3, 4])
    difference = rng.normal(0.4, 1, size=20)
    sums = np.bincount(labels, weights=difference)
    flips = np.array(list(itertools.product([-1, 1], repeat=8))) @ sums
    expected = (np.abs(flips) >= abs(sums.sum()) - 1e-9).mean()
    assert sign_flip_test(difference, labels) == pytest.approx(expected)


def test_corrections_follow_their_definitions_and_skip_nan():
    p = np.array([[0.01, 0.04], [np.nan, 0.03]])
    np.testing.assert_allclose(holm(p), [[0.03, 0.06], [np.nan, 0.06]])
    np.testing.assert_allclose(benjamini_hochberg(p), [[0.03, 0.04], [np.nan, 0.04]])
    assert np.isnan(holm([np.nan, np.nan])).all()
    assert holm([]).size == 0
    many = np.random.default_rng(15).random(500) ** 2
    np.testing.assert_allclose(benjamini_hochberg(many), multipletests(many, method="fdr_bh")[1])


def test_wilson_interval_solves_its_equation():
    z = stats.norm.ppf(0.975)
    for successes, n in [(0, 12), (7, 12), (12, 12), (580, 1000)]:
        for bound in wilson_interval(successes, n):
            assert (successes / n - bound) ** 2 == pytest.approx(z**2 * bound * (1 - bound) / n, abs=1e-12)
    assert wilson_interval(7, 12, design_effect=4) == pytest.approx(wilson_interval(1.75, 3))
    assert np.isnan(wilson_interval(0, 0)).all()


def test_design_effect_is_one_plus_rho_times_size_minus_one():
    rng = np.random.default_rng(16)
    right = np.repeat(rng.random(4000) < 0.5, 5)  # whole templates right or wrong: rho = 1, five rows each
    assert design_effect(right, np.repeat(np.arange(4000), 5)) == pytest.approx(5, rel=0.05)
    assert design_effect(rng.random(500) < 0.5) == 1
    assert design_effect(np.ones(10), np.repeat([0, 1], 5)) == 1


def test_minimum_detectable_effect_solves_the_noncentral_t_equation():
    for df, comparisons in [(1, 1), (3, 1), (23.6, 1), (59, 12), (999, 1)]:
        shift = minimum_detectable_effect(2.0, df, comparisons=comparisons) / 2.0
        limit = stats.t.isf(0.025 / comparisons, df)
        power = stats.nct.sf(limit, df, shift) + stats.nct.cdf(-limit, df, shift)
        assert power == pytest.approx(0.8, abs=1e-3), (df, comparisons)
    assert math.isnan(minimum_detectable_effect(math.nan, 9))
    # For these the solver finds the effect below 0.
    assert all(minimum_detectable_effect(1.0, 80, comparisons=count) > 0 for count in (3, 5))


# --------------------------------------------------------------------------- nothing to estimate


@pytest.mark.parametrize(
    ("values", "clusters", "mean"),
    [
        ([], [], math.nan),
        ([0.5], ["a"], 0.5),
        ([0.5, 1.5, 2.5], ["a", "a", "a"], 1.5),
        ([0.0] * 30, None, 0.0),
        ([0.1] * 30, None, 0.1),  # sums of 0.1 are not exact: rounding must not pass as variation
        ([0.1] * 30, list(range(10)) * 3, 0.1),
        ([1.0, -1.0, 1.0, -1.0], ["a", "a", "b", "b"], 0.0),
        ([math.nan, math.nan], ["a", "b"], math.nan),
        ([math.nan, 2.0], ["a", "b"], 2.0),
    ],
)
def test_what_cannot_be_estimated_is_nan_never_a_p_value(values, clusters, mean):
    estimate = clustered_mean(values, clusters)
    assert estimate.mean == pytest.approx(mean, nan_ok=True)
    assert np.isnan(estimate[1:7]).all()
    assert estimate.n == np.isfinite(values).sum()
    assert math.isnan(minimum_detectable_effect(estimate.standard_error, estimate.df))
    cells = clustered_mean(np.array(values, dtype=float).reshape(-1, 1, 1).repeat(2, axis=1), clusters)
    assert np.isnan(cells.p).all()
    assert cells.p.shape == (2, 1)


def test_no_rows_in_the_other_tests():
    assert math.isnan(exact_mcnemar([], []).p)
    assert math.isnan(sign_flip_test([], []))
    assert math.isnan(sign_flip_test([1.0, 2.0], ["a", "a"]))
    assert math.isnan(sign_flip_test([0.0, 0.0, 0.0]))
    assert np.isnan(clustered_mean(np.zeros((0, 2, 3))).p).all()


def test_a_row_without_a_template_is_its_own_cluster():
    rng = np.random.default_rng(17)
    values = rng.normal(size=12)
    assert clustered_mean(values, [None, float("nan")] * 6) == clustered_mean(values)
    assert sign_flip_test(values, [None] * 12) == sign_flip_test(values)


def test_wrong_shapes_and_infinities_are_refused():
    with pytest.raises(ValueError, match="3 rows but 2"):
        clustered_mean([1, 2, 3], ["a", "b"])
    with pytest.raises(ValueError, match="not the same rows"):
        paired_difference([1, 2, 3], [1, 2])
    with pytest.raises(ValueError, match="infinite"):
        clustered_mean([1.0, math.inf])


# --------------------------------------------------------------------------- the summary table


def _items(seed: int = 18, rows: int = 60) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    template = rng.integers(0, 15, size=rows)
    parts = []
    for style, shift in [("main", -0.4), ("normal", 0.0), ("polite", 0.0)]:
        part = pd.DataFrame({"style": style, "original_index": np.arange(rows), "template": template})
        part["prompt"] = [f"{style} {row}" for row in range(rows)]
        part["score"] = rng.normal(shift, 1, size=rows) + template / 10
        part["right"] = rng.random(rows) < 0.6 + shift / 2
        parts.append(part)
    return pd.concat(parts, ignore_index=True)


def test_summary_rows_are_the_single_estimates():
    items = _items()
    items.loc[(items["style"] == "polite") & (items["original_index"] < 10), "prompt"] = [
        f"normal {row}" for row in range(10)
    ]
    items.loc[(items["style"] == "main") & (items["original_index"] == 20), "score"] = np.nan
    items = items[~((items["style"] == "main") & (items["original_index"] == 30))].sample(frac=1, random_state=0)
    table = paired_summary(items, "score", cluster="template").set_index("style")
    assert table.index[0] == "normal"
    assert table.loc["polite", ["n", "n_paired", "n_identical"]].tolist() == [60, 50, 10]
    assert table.loc["main", ["n", "n_missing", "n_paired", "n_identical"]].tolist() == [58, 1, 58, 0]
    wide = items.pivot(index="original_index", columns="style", values="score")
    kept = wide.index >= 10
    template = items[items["style"] == "normal"].set_index("original_index")["template"].loc[wide.index]
    expected = paired_difference(wide["polite"][kept], wide["normal"][kept], template[kept])
    columns = ["difference", "difference_ci_low", "difference_ci_high", "p", "n_clusters"]
    assert table.loc["polite", columns].tolist() == pytest.approx(
        [expected.mean, expected.ci_low, expected.ci_high, expected.p, expected.n_clusters]
    )
    own = clustered_mean(wide["main"].dropna(), template[wide["main"].notna()])
    assert table.loc["main", ["estimate", "ci_low", "ci_high"]].tolist() == pytest.approx(
        [own.mean, own.ci_low, own.ci_high]
    )
    assert table["p_adjusted"].tolist() == pytest.approx(holm(table["p"]).tolist(), nan_ok=True)
    assert table.loc["normal", ["difference", "p", "p_adjusted"]].isna().all()


def test_controls_and_repairs_are_no_tests_among_the_styles():
    """The styles' adjusted p values are the same with and without controls, repairs and the noise floor in a run."""
    items, rng = _items(), np.random.default_rng(2)
    added = ["split@main", "neutral@polite", "split", "repaired@main", "normal@again"]
    clean = items[items["style"] == "normal"]
    more = [clean.assign(style=style, score=rng.normal(0.2, 1, len(clean)), prompt=style) for style in added]
    alone = paired_summary(items, "score", cluster="template").set_index("style")
    table = paired_summary(pd.concat([items, *more]), "score", cluster="template").set_index("style")
    pd.testing.assert_series_equal(table.loc[alone.index, "p_adjusted"], alone["p_adjusted"])
    assert table.loc["normal@again", ["p", "p_adjusted"]].isna().tolist() == [False, True]
    others = added[:-1]
    assert table.loc[others, "p_adjusted"].tolist() == pytest.approx(holm(table.loc[others, "p"]).tolist())


def test_summary_averages_samples_and_takes_clusters_from_a_mapping():
    items = _items()
    noisy = pd.concat([items.assign(score=items["score"] + shift, sample=shift) for shift in (-1.0, 0.0, 1.0)])
    mapping = items[items["style"] == "normal"].set_index("original_index")["template"].to_dict()
    pd.testing.assert_frame_equal(
        paired_summary(noisy, "score", cluster=mapping), paired_summary(items, "score", cluster="template")
    )


def test_summary_of_several_measures_and_of_proportions():
    table = paired_summary(_items(), ["score", "right"], cluster="template", interval="wilson")
    assert table["measure"].tolist() == ["score"] * 3 + ["right"] * 3
    right = table[table["measure"] == "right"].set_index("style")
    for style, line in right.iterrows():
        successes = _items().loc[_items()["style"] == style, "right"].sum()
        assert (line["ci_low"], line["ci_high"]) == pytest.approx(wilson_interval(successes, 60))


def test_summary_without_a_baseline_or_without_rows_has_no_differences():
    items = _items()
    alone = paired_summary(items[items["style"] == "main"], "score")
    assert alone["n"].tolist() == [60]
    assert alone[["difference", "p", "p_adjusted"]].isna().all().all()
    single = paired_summary(items[items["original_index"] == 3], "score")
    assert single["p"].isna().all()
    assert single["n_paired"].tolist() == [0, 1, 1]
    assert len(paired_summary(items.iloc[:0], "score")) == 0


# --- ratios of sums


def test_a_ratio_over_equal_denominators_is_the_mean():
    values = np.random.default_rng(1).uniform(size=(30, 3, 2))
    ratio, mean = clustered_ratio(values, np.ones((30, 1, 1))), clustered_mean(values)
    assert ratio.mean == pytest.approx(mean.mean)
    assert ratio.ci_low == pytest.approx(mean.ci_low)
    assert (ratio.n == 30).all()


def test_a_ratio_leaves_out_one_cluster_at_a_time():
    top, bottom, clusters = np.array([1.0, 2, 6, np.nan]), np.array([2.0, 2, 4, 9]), ["a", "a", "b", "b"]
    found = clustered_ratio(top, bottom, clusters)
    without = np.array([6 / 4, 3 / 4])  # the last row is not known
    assert found.mean == 9 / 8
    assert found.standard_error == pytest.approx(np.sqrt(1 / 2 * ((without - 9 / 8) ** 2).sum()))
    assert (found.n, found.n_clusters, found.df) == (3, 2, 1)
    assert np.isnan(clustered_ratio(top[:2], bottom[:2], clusters[:2]).ci_low)


def test_the_interval_of_a_ratio_holds_in_19_of_20_runs():
    rng = np.random.default_rng(2)
    inside = 0
    for _ in range(1000):
        bottom = np.repeat(rng.gamma(1.0, 1.0, 40), 2)
        found = clustered_ratio(bottom * rng.normal(0.5, 0.4, 80), bottom, np.repeat(np.arange(40), 2))
        inside += found.ci_low <= 0.5 <= found.ci_high
    assert 0.92 < inside / 1000 < 0.97


@pytest.mark.parametrize("left", [0.03, 0.1, 1.0, 3.0])
def test_the_interval_of_a_share_of_something_positive_holds_where_few_rows_make_it(left):
    """Rows whose effect and what is left of it are lognormal: the plain jackknife's interval holds less often."""
    rng = np.random.default_rng(3)
    before = rng.lognormal(0, 1.0, (100, 1500))
    after = before * left * rng.lognormal(-0.32, 0.8, before.shape)
    found = clustered_ratio(after, before, log=True)
    inside = (found.ci_low <= left) & (left <= found.ci_high)
    plain = clustered_ratio(after, before)
    half = stats.t.ppf(0.975, 99) * plain.standard_error
    assert 0.92 < inside.mean() < 0.97
    assert (abs(plain.mean - left) <= half).mean() < inside.mean() - 0.01
    assert (found.ci_low > 0).all()
    assert found.mean == pytest.approx(plain.mean)
    assert found.t == pytest.approx(np.log(found.mean) / (found.standard_error / found.mean))


def test_a_jackknife_has_few_degrees_of_freedom_if_few_clusters_make_its_variance():
    even = np.resize([1.0, -1.0], 40)
    assert jackknife_df(even) == 39
    one = np.zeros(40)
    one[3] = 1.0
    assert 2 < jackknife_df(one) < 2.2
    both = np.stack([even, np.where(np.arange(40) < 20, one, 5.0)], axis=1)
    present = np.stack([np.full(40, True), np.arange(40) < 20], axis=1)
    assert jackknife_df(both, present) == pytest.approx([39, jackknife_df(one[:20])])


def test_a_ratio_of_nothing_left_has_no_interval():
    before = np.array([1.0, 2.0, 3.0])
    found = clustered_ratio(np.zeros(3), before, log=True)
    assert found.mean == 0
    assert np.isnan([found.ci_low, found.ci_high, found.df, found.p]).all()
    one_row = clustered_ratio(np.array([0.0, 0.5, 0.0]), before, log=True)  # without that row nothing is left
    assert np.isnan([one_row.ci_low, one_row.p]).all()


def test_no_interval_leaves_the_range_of_what_is_measured():
    items = pd.DataFrame(
        [
            {"style": style, "original_index": row, "prompt": style, "correct": float(style == "normal" and row != 1)}
            for style in ("normal", "swap", "same")
            for row in range(3)
        ]
    )
    items.loc[items["style"] == "same", "correct"] = [1.0, 0.0, 1.0]
    table = paired_summary(items, "correct", ranges={"correct": (0, 1)}).set_index("style")
    assert table.loc["swap", "difference_ci_low"] == -1
    assert table.loc["same", ["ci_low", "ci_high"]].tolist() == [0, 1]
    assert table.loc["swap", "difference_ci_high"] == pytest.approx(-2 / 3 + 4.3027 / 3, abs=1e-3)
    assert table.loc["same", "difference"] == 0
    assert np.isnan(table.loc["same", "difference_ci_low"])
    free = paired_summary(items, "correct").set_index("style")
    assert free.loc["swap", "difference_ci_low"] < -2
    assert free.loc["same", "ci_high"] > 2
    columns = ["estimate", "difference", "p"]
    pd.testing.assert_frame_equal(free[columns], table[columns])
