"""Linear probes: what they find, what they must not find, and how sure they are."""

from __future__ import annotations

import numpy as np
import pandas as pd
import probe_layers as pl
import pytest
import torch
from attention import layer_curves, probes
from attention.grouped_auc import cross_validation_factor, fold_auc, macro_auc
from command_line import UserError
from file_output import read_csv
from plot_style import MOST_LINES
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from synthetic_run import prompt_rows, with_controls, write_run

ROWS, TEMPLATES, WIDTH = 60, 20, 24


@pytest.fixture(autouse=True)
def no_pictures(request, monkeypatch):
    if "picture" not in request.node.name:
        monkeypatch.setattr(layer_curves, "save_probes", lambda *_: None)


def probe_run(folder, make, styles=("swap", "main", "split"), rows=ROWS, templates=TEMPLATES, **more):
    """A run whose pooled states [L+1, P, D] are `make(style, index, regions)`."""

    def change(row, style, index):
        others = [s for s in styles if s != style]
        edited = [f"edited:{s}" for s in (others if style != "normal" else styles)] if style == "normal" else ["edited"]
        row["hidden_pooled"] = make(style, index, ["last", "instruction", "task", *edited])

    prompts = prompt_rows(rows, styles, templates=templates)
    return write_run(folder / "run", prompts, layers=2, heads=1, hidden=WIDTH, raw_layers=(), change=change, **more)


def noise_states(style, index, regions, seed=0):
    key = seed * 1_000_003 + sum(map(ord, style)) * 5000 + index
    return torch.randn(3, len(regions), WIDTH, generator=torch.Generator().manual_seed(key))


def probe(run, folder, *more):
    assert pl.main(["--run_dir", str(run), "--results_dir", str(folder), *more]) == 0
    return pd.read_csv(folder / "probe_layers.csv")


# --- what is there is found


def test_planted_typo_direction_is_found_at_its_layer_and_region(tmp_path):
    def make(style, index, regions):
        states = noise_states(style, index, regions)
        if style in ("swap", "main"):
            states[1, regions.index("edited"), :4] += 2.5  # layer 1 only
            states[2, regions.index("last"), :4] += 2.5
        return states

    table = probe(probe_run(tmp_path, make), tmp_path, "--targets", "typo", "typo_vs_control")
    table = table.set_index(["target", "style", "region", "layer"])
    for style in ("swap", "main", "all_typos"):
        line = table.loc[("typo", style, "edited", 1)]
        assert line["auc"] > 0.95
        assert line["ci_low"] > 0.6  # every pair in order: the exact binomial end, over few clusters
        assert line["p_adjusted"] < 0.05
        assert line["shuffled_ci_low"] < 0.5 < line["shuffled_ci_high"]
        for layer, region in ((0, "edited"), (2, "edited"), (1, "last")):
            assert table.loc[("typo", style, region, layer), "p_adjusted"] > 0.01
    assert table.loc[("typo", "split", "edited", 1), "auc"] < 0.75
    assert table.loc[("typo_vs_control", "all_typos", "last", 2), "auc"] > 0.9
    assert ("typo_vs_control", "all_typos", "edited", 1) not in table.index
    # letters exchanged leave the number of tokens as it was; a cut does not
    baseline = table["token_count_auc"].xs(1, level="layer")
    assert baseline["typo", "swap", "edited"] == pytest.approx(0.5, abs=0.1)
    assert baseline["typo", "split", "edited"] > 0.8
    assert table.loc[("typo", "swap", "edited", 1), ["n", "n_positive", "n_clusters"]].tolist() == [120, 60, 20]


def test_which_style_and_wrong_answers_are_found(tmp_path):
    wrong = np.random.default_rng(0).random(ROWS) < 0.4

    def make(style, index, regions):
        states = noise_states(style, index, regions)
        if style != "normal":
            states[:, 3, ("swap", "main", "split").index(style)] += 3
        if wrong[index]:
            states[2, regions.index("last"), 5:8] += 2
        return states

    items = [
        {"style": style, "original_index": i, "correct": "False" if wrong[i] else "True", "other": "x,y"}
        for style in ("normal", "swap", "main", "split")
        for i in range(ROWS)
        if (style, i) != ("main", 4)
    ]
    items[0]["correct"] = ""  # not evaluated
    pd.DataFrame(items).to_csv(tmp_path / "maths_items.csv", index=False)
    flags = ["--targets", "style", "wrong", "--layers", "1", "2"]
    table = probe(probe_run(tmp_path, make), tmp_path, *flags).set_index(["target", "style", "region", "layer"])
    style_line = table.loc[("style", "all_styles", "edited", 1)]
    assert style_line["auc"] > 0.9
    assert style_line["n_classes"] == 3
    assert table.loc[("style", "all_styles", "last", 1), "auc"] == pytest.approx(0.5, abs=0.12)
    for style, n in (("normal", ROWS - 1), ("swap", ROWS), ("main", ROWS - 1)):
        line = table.loc[("wrong", style, "last", 2)]
        assert line["n"] == n
        assert line["auc"] > 0.85
        assert table.loc[("wrong", style, "last", 1), "auc"] == pytest.approx(0.5, abs=0.25)


def test_auc_is_that_of_scikit_learns_own_cross_validation(tmp_path):
    rng = np.random.default_rng(0)
    labels = np.tile([0, 1], 100)
    groups = np.repeat(np.arange(25), 8)
    features = (rng.standard_normal((200, 30)) * 40 + 7 + labels[:, None]).astype(np.float32)
    splits = list(StratifiedGroupKFold(5, shuffle=True, random_state=0).split(features, labels, groups))
    folds = np.empty(200, dtype=int)
    for number, (_, test) in enumerate(splits):
        folds[test] = number
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=300))
    expected = cross_val_score(model, features, labels, cv=splits, scoring="roc_auc")
    found, converged = probes.probe_auc(features, labels, folds, groups)
    assert found.auc == pytest.approx(expected.mean(), abs=1e-6)  # folds of equal size: 40 items, half of each label
    assert converged


# --- what is not there is not found


def row_memory(style, index, regions):
    """States that name the row (and its template), the same in every style: pairing is all there is to know."""
    states = noise_states("row", index, regions) * 0.7 + noise_states("template", index % TEMPLATES, regions)
    return states + 0.05 * noise_states(style, index, regions)


def naive_auc(features, labels):
    """Random folds, as they are commonly used: twins and templates on both sides."""
    model = LogisticRegression(C=0.01, max_iter=300)
    return cross_val_score(
        model, features, labels, cv=StratifiedKFold(5, shuffle=True, random_state=0), scoring="roc_auc"
    ).mean()


def test_a_label_that_leaks_through_pairing_scores_half_with_grouped_folds():
    """Every row four times with nearly the same states; the label is the template's own, at random."""
    leaky, honest = [], []
    for seed in range(5):
        rng = np.random.default_rng(seed)
        templates = np.tile(np.arange(ROWS) % TEMPLATES, 4)
        rows = np.tile(np.arange(ROWS), 4)
        features = rng.standard_normal((ROWS, 200))[rows] + rng.standard_normal((TEMPLATES, 200))[templates]
        features = (features + 0.05 * rng.standard_normal(features.shape)).astype(np.float32)
        labels = rng.permutation(np.arange(TEMPLATES) % 2)[templates]
        folds = np.empty(len(labels), dtype=int)
        for number, (_, test) in enumerate(
            StratifiedGroupKFold(5, shuffle=True, random_state=0).split(features, labels, templates)
        ):
            folds[test] = number
        leaky.append(naive_auc(features, labels))
        honest.append(probes.probe_auc(features, labels, folds, templates)[0].auc)
    assert min(leaky) > 0.99
    assert np.mean(honest) == pytest.approx(0.5, abs=3 * np.std(honest) / 2)
    assert abs(np.mean(honest) - 0.5) < 0.15


def test_the_script_itself_finds_nothing_in_pairing(tmp_path):
    """Wrong answers go by template, states name template and row: only twins and templates give the label away."""
    answers = np.random.default_rng(1).permutation(np.arange(TEMPLATES) % 2)
    items = [
        {"style": s, "original_index": i, "correct": answers[i % TEMPLATES]}
        for s in ("normal", "swap")
        for i in range(ROWS)
    ]
    pd.DataFrame(items).to_csv(tmp_path / "items.csv", index=False)
    run = probe_run(tmp_path, row_memory)
    table = probe(run, tmp_path, "--maths_items", str(tmp_path / "items.csv"), "--targets", "typo", "wrong")
    wrong = table.query("target == 'wrong'")
    assert len(wrong) == 6
    assert (wrong["ci_low"] < 0.5).all()
    assert (wrong["p_adjusted"] > 0.01).all()
    assert wrong["auc"].mean() == pytest.approx(0.5, abs=0.25)  # 20 templates are 20 answers: chance is wide
    typo = table.query("target == 'typo'")
    assert (typo["p_adjusted"] > 0.01).all()
    assert typo["auc"].mean() == pytest.approx(0.5, abs=0.06)


def test_a_label_that_leaks_through_length_scores_half(tmp_path):
    """Wrong answers are those of the long prompts. A mean over pads gives it away, the region means do not."""
    rows = prompt_rows(ROWS, ("swap",), templates=TEMPLATES)
    long = np.random.default_rng(2).random(ROWS) < 0.5
    for row, is_long in zip(rows, long, strict=True):
        for style in ("normal", "swap"):
            row[style] = ("please " * 12 if is_long else "") + row[style]
    generator = torch.Generator().manual_seed(0)

    def change(row, style, index):
        states = torch.randn(3, len(row["input_ids"]), WIDTH, generator=generator) + 1.0  # no token knows the length
        mask = row["region_mask"]
        names = ["all", "last", "context", "instruction", "task", "first"]
        width = row["hidden_pooled"].shape[1]
        edited = list(range(len(names), mask.shape[1]))
        columns = [1, 3, 4, *edited][:width]
        row["hidden_pooled"] = (
            torch.einsum("lsd,sp->lpd", states, mask[:, columns].float()) / mask[:, columns].sum(0)[:, None]
        )
        row["hidden_states"] = {"layer_0": states[0]}

    run = write_run(tmp_path / "run", rows, layers=2, heads=1, hidden=WIDTH, rows_per_file=ROWS, change=change)
    items = [
        {"style": s, "original_index": i, "correct": int(not long[i])} for s in ("normal", "swap") for i in range(ROWS)
    ]
    pd.DataFrame(items).to_csv(tmp_path / "maths_items.csv", index=False)
    table = probe(run, tmp_path, "--targets", "wrong", "--layers", "0", "1")
    content = torch.load(next((run / "normal").glob("*.pt")), weights_only=True)
    assert naive_auc(content["hidden_states"]["layer_0"].mean(1).numpy(), long.astype(int)) > 0.99
    assert table["auc"].mean() == pytest.approx(0.5, abs=0.12)
    assert (table["p_adjusted"] > 0.05).all()
    states = probes.open_states(pl.parse_args(["--run_dir", str(run)]))
    for region in ("instruction", "task"):  # the instruction is where the length is
        items = probes.Items("wrong", "normal", region)
        items.add(("normal", region), list(range(ROWS)), long.astype(int).tolist(), ["normal"] * ROWS)
        plan = probes.plan_probe(items, states, 5, 0)
        found, _ = probes.probe_auc(states.features(items, 1), plan.labels, plan.folds, plan.clusters)
        assert found.ci_low < 0.5
        assert found.auc < 0.7


@pytest.mark.parametrize("positives", [6, 40])
def test_p_under_the_null_keeps_its_level(positives):
    """The spread of a cross-validated AUC is wider than its test items say, and few positives are few observations."""
    small = wide = 0
    runs = 200
    for seed in range(runs):
        rng = np.random.default_rng(seed)
        labels = np.zeros(100, dtype=int)
        labels[rng.permutation(100)[:positives]] = 1
        features = (rng.standard_normal((100, 60)) / np.arange(1, 61)).astype(np.float32)
        folds = np.empty(100, dtype=int)
        for kind in (0, 1):
            folds[labels == kind] = rng.permutation((labels == kind).sum()) % 5
        found, _ = probes.probe_auc(features, labels, folds, np.arange(100))
        small += found.p < 0.05
        t = stats.t.isf(found.p, positives - 1) * np.sqrt(cross_validation_factor(folds))
        wide += stats.t.sf(t, positives - 1) < 0.05
    assert small <= stats.binom.ppf(0.99, runs, 0.05)
    if positives == 40:  # without the correction the level is not kept: it is needed
        assert wide > stats.binom.ppf(0.99, runs, 0.05)


# --- AUC and its interval


def test_auc_over_pairs_of_a_fold_equals_scikit_learn_and_mann_whitney():
    rng = np.random.default_rng(0)
    labels, folds = rng.integers(0, 2, 300), np.repeat(np.arange(3), 100)
    scores = np.round(rng.standard_normal(300) + labels + 5 * folds, 1)  # ties, and a zero of its own in each fold
    pairs = [(labels[folds == f].sum() * (1 - labels[folds == f]).sum()) for f in range(3)]
    by_fold = [roc_auc_score(labels[folds == f], scores[folds == f]) for f in range(3)]
    found = fold_auc(labels, scores, folds, np.arange(300))
    assert found.auc == pytest.approx(np.average(by_fold, weights=pairs), abs=1e-12)
    one = folds == 1
    u = stats.mannwhitneyu(scores[one & (labels == 1)], scores[one & (labels == 0)]).statistic
    assert fold_auc(labels[one], scores[one], folds[one], np.arange(100)).auc == pytest.approx(u / pairs[1], abs=1e-12)


def test_clustered_error_equals_the_cluster_bootstrap():
    rng = np.random.default_rng(1)
    clusters = np.repeat(np.arange(80), 6)
    effect = rng.standard_normal(80)[clusters]
    labels = (np.arange(480) // 6) % 2  # a cluster has one label, as a template's answers may
    scores = 0.8 * labels + effect + 0.7 * rng.standard_normal(480)
    folds = np.zeros(480, dtype=int)  # one fold: no correction for cross-validation
    found = fold_auc(labels, scores, folds, clusters)
    drawn = []
    for _ in range(600):
        rows = (rng.integers(0, 80, 80)[:, None] * 6 + np.arange(6)).ravel()
        drawn.append(roc_auc_score(labels[rows], scores[rows]))
    half = (found.ci_high - found.ci_low) / 2
    assert half == pytest.approx(1.96 * np.std(drawn), rel=0.12)
    assert half > 1.2 * (fold_auc(labels, scores, folds, np.arange(480)).ci_high - found.auc)  # clusters matter here


def test_p_and_interval_agree_with_few_groups():
    draw = np.random.default_rng(0)
    for _ in range(200):
        labels, clusters = np.tile([0, 1], 12), np.repeat(np.arange(12), 2)
        found = fold_auc(labels, draw.normal(size=24) + 2 * labels, clusters % 4, clusters)
        assert (found.p < 0.025) == (found.ci_low > 0.5)


def test_auc_at_its_ends():
    labels, folds, clusters = np.tile([0, 1], 20), np.repeat([0, 1], 20), np.repeat(np.arange(10), 4)
    best = fold_auc(labels, labels.astype(float), folds, clusters)
    assert best.auc == 1
    assert 0.2 < best.ci_low < 0.9
    assert best.ci_high == 1
    ties = fold_auc(labels, np.zeros(40), folds, clusters)
    assert ties.auc == 0.5
    assert np.isnan(ties.p)
    assert np.isnan(fold_auc(np.ones(40), labels.astype(float), folds, clusters).auc)


def test_macro_auc_is_the_mean_over_classes():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 200)
    scores = rng.random((200, 3)) + 0.3 * np.eye(3)[labels]
    expected = np.mean([roc_auc_score(labels == k, scores[:, k]) for k in range(3)])
    found = macro_auc(labels, scores, np.zeros(200), np.arange(200) // 4)
    assert found.auc == pytest.approx(expected)
    assert found.ci_low < expected < found.ci_high


# --- folds, controls, speed, errors


def test_folds_keep_templates_rows_and_twins_together(tmp_path):
    run = probe_run(tmp_path, noise_states)
    args = pl.parse_args(["--run_dir", str(run)])
    states = probes.open_states(args)
    for items in (one for one in probes.all_items(states, args, None) if one.labels):
        plan = probes.plan_probe(items, states, 5, 0)
        templates = np.array([row % TEMPLATES for row in items.rows])
        for template in range(TEMPLATES):
            assert len(set(plan.folds[templates == template])) == 1
        assert set(plan.folds) == set(range(5))
        assert states.features(items, 1).shape == (len(items.rows), WIDTH)


def test_shuffled_labels_stay_within_their_pair():
    labels, pairs = np.tile([0, 1], 500), np.repeat(np.arange(500), 2)
    shuffled = probes.shuffled_within(labels, pairs, np.random.default_rng(0))
    assert (shuffled.reshape(500, 2).sum(1) == 1).all()
    assert 0.4 < (shuffled == labels).mean() < 0.6
    mixed = np.random.default_rng(1).permutation(1000)
    again = probes.shuffled_within(labels[mixed], pairs[mixed], np.random.default_rng(0))
    assert (np.bincount(pairs[mixed], weights=again) == 1).all()


def test_empty_regions_and_overflowed_states_are_left_out(tmp_path):
    def make(style, index, regions):
        states = noise_states(style, index, regions)
        if index == 3 and style == "swap":
            states[:, regions.index("edited")] = float("nan")
        if index == 4:
            states[2, regions.index("last")] = float("inf")
        return states

    table = probe(probe_run(tmp_path, make), tmp_path, "--targets", "typo", "--styles", "swap")
    counts = table[table["style"] == "swap"].groupby("region")["n"].unique()
    assert counts["edited"].tolist() == [2 * (ROWS - 1)]
    assert counts["last"].tolist() == [2 * (ROWS - 1)]


def test_ten_thousand_items_of_3584_numbers_converge():
    rng = np.random.default_rng(0)
    labels, clusters = np.tile([0, 1], 5000), np.repeat(np.arange(500), 20)
    shared = rng.standard_normal((10_000, 40)).astype(np.float32) @ rng.standard_normal((40, 3584)).astype(np.float32)
    features = shared + rng.standard_normal((10_000, 3584)).astype(np.float32)
    features[:, 0] += labels
    found, converged = probes.probe_auc(features, labels, clusters % 5, clusters)
    assert converged
    assert found.auc > 0.6


def test_each_target_has_a_picture_with_a_panel_for_each_region(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(layer_curves, "save_figure", lambda path, figure: drawn.update({path.name: figure}))
    probe(probe_run(tmp_path, noise_states), tmp_path, "--layers", "0", "2")
    assert set(drawn) == {"probe_layers_typo.png", "probe_layers_typo_vs_control.png", "probe_layers_style.png"}
    for figure in drawn.values():
        for axes in figure.axes:
            assert "n = " in axes.get_title("left")
            names = [text.get_text() for text in axes.texts]
            assert "shuffled labels" in names
            assert len(names) <= MOST_LINES
    assert {"split", "all_typos"} <= {text.get_text() for text in drawn["probe_layers_typo.png"].axes[-1].texts}


def test_user_errors_are_one_line(tmp_path):
    run = probe_run(tmp_path, noise_states, rows=24)
    flags = ["--run_dir", str(run), "--results_dir", str(tmp_path)]
    (tmp_path / "bad.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="needs the columns"):
        pl.main([*flags, "--maths_items", str(tmp_path / "bad.csv")])
    with pytest.raises(UserError, match="run stage 3"):
        pl.main([*flags, "--maths_items", str(tmp_path / "none.csv")])
    with pytest.raises(UserError, match="layers 0 to 2"):
        pl.main([*flags, "--layers", "7"])
    with pytest.raises(UserError, match="not pooled"):
        pl.main([*flags, "--regions", "nowhere"])
    few = probe_run(tmp_path / "few", noise_states, rows=3)
    with pytest.raises(UserError, match="too few"):
        pl.main(["--run_dir", str(few), "--results_dir", str(tmp_path)])


def test_a_style_with_its_own_control_is_a_typo_style(tmp_path, capsys):
    """A user's style `t1` has a `split@t1`: it is probed against it; `t2` has none, and is no typo style."""
    cut = lambda index, word, typo: f"{word[:2]}\u00ad{word[2:]}"  # noqa: E731
    rows = with_controls(prompt_rows(24, ["t1", "t2"]), "t1", cut)
    run = write_run(tmp_path / "run", rows, layers=2, hidden=16, raw_layers=())
    command = ["--run_dir", str(run), "--results_dir", str(tmp_path), "--layers", "2", "--regions", "last"]
    assert pl.main([*command, "--targets", "typo", "typo_vs_control"]) == 0
    table = read_csv(tmp_path / "probe_layers.csv").set_index(["target", "style"])
    assert table.loc[("typo_vs_control", "all_typos"), "n_positive"] > 0
    assert table.loc[("typo", "all_typos"), "n_positive"] == 24
    assert {"t1", "t2", "split@t1"} <= set(table.loc["typo"].index)
    assert "not probed" not in capsys.readouterr().err
    assert pl.main([*command, "--targets", "typo", "--typo_styles", "t2"]) == 0
    assert read_csv(tmp_path / "probe_layers.csv").set_index("style").loc["all_typos", "n_positive"] == 24


def test_what_is_not_probed_is_one_line_for_each_reason(tmp_path, capsys):
    run = write_run(tmp_path / "run", prompt_rows(24, ["swap"]), layers=2, hidden=16, raw_layers=())
    items = [(style, i, True) for style in ("normal", "swap") for i in range(24)]
    pd.DataFrame(items, columns=["style", "original_index", "correct"]).to_csv(tmp_path / "maths_items.csv")
    assert pl.main(["--run_dir", str(run), "--results_dir", str(tmp_path), "--layers", "1"]) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "not probed" in line]
    assert len(told) == 3
    assert "typo_vs_control at edited; typo_vs_control at last: no typo style has a control" in told[0]
    assert "style at edited; style at last: there is one style only" in told[1]
    assert "wrong at last (normal, swap); flipped at last (swap): the answers are all right, or all wrong" in told[2]
