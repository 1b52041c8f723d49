"""Typo neurons and typo heads: a planted unit is found and confirmed, chance and fragmentation are not."""

from __future__ import annotations

import neuron_sensitivity as ns
import numpy as np
import pandas as pd
import pytest
import torch
from attention import neurons
from command_line import UserError
from paired_stats import clustered_mean, deal
from run_store import load_pt, open_run, save_pt
from scipy import stats
from synthetic_run import prompt_rows, with_first_word_typo, write_run

LAYERS, NEURONS, HEADS = 3, 40, 4


@pytest.fixture(autouse=True)
def no_pictures(request, monkeypatch):
    if "picture" not in request.node.name:
        monkeypatch.setattr(neurons, "plot_units", lambda *_: None)


def noise(seed_parts, *shape):
    generator = torch.Generator().manual_seed(hash(seed_parts) % 2**31)
    return torch.randn(*shape, generator=generator)


def unit_change(plant=None, seed=0, scale=None):
    """Replaces neurons and entropies by noise that knows no style; `plant(row, style)` adds an effect."""

    def change(row, style, index):
        key = sum(map(ord, style)) * 1000 + index + 1_000_003 * seed
        row["mlp_pooled"] = noise(key, *row["mlp_pooled"].shape).half()
        row["attention_entropy"] = (0.5 + 0.05 * noise(key + 1, *row["attention_entropy"].shape)).half()
        if scale is not None:
            row["mlp_pooled"] *= scale
        if plant is not None:
            plant(row, style)

    return change


def run_of(folder, plant=None, rows=60, styles=("swap", "split"), seed=0, templates=20, scale=None):
    prompts = prompt_rows(rows, styles, templates=templates)
    return write_run(
        folder / "run", prompts, layers=LAYERS, heads=HEADS, neurons=NEURONS, raw_layers=(), rows_per_file=16,
        change=unit_change(plant, seed, scale),
    )  # fmt: skip


def study(run, folder, *more):
    flags = ["--neuron_share", "0.05", "--head_share", "0.1", "--random_sets", "200", *more]
    assert ns.main(["--run_dir", str(run), "--results_dir", str(folder), *flags]) == 0
    read = {name: pd.read_csv(folder / f"{name}.csv") for name in ("neuron_sensitivity", "typo_heads")}
    return read | {"summary": pd.read_csv(folder / "neuron_sensitivity_summary.csv").set_index(["style", "unit"])}


def plant_typo(row, style):
    """Neuron 7 of layer 1 fires on the typo word, head 2 of layer 0 narrows; fragmentation moves neuron 3, head 1."""
    if style in ("swap", "split"):
        row["mlp_pooled"][1, 3:, 3] += 4  # pooled regions from the fourth on are the edited ones
        row["attention_entropy"][0, 1] -= 0.3
    if style == "swap":
        row["mlp_pooled"][1, 3:, 7] += 4
        row["attention_entropy"][0, 2] -= 0.3


def test_planted_units_come_first_and_fragmentation_does_not(tmp_path):
    found = study(run_of(tmp_path, plant_typo), tmp_path)
    table, heads = found["neuron_sensitivity"], found["typo_heads"]
    assert table.loc[0, ["layer", "neuron", "confirmed"]].tolist() == [1, 7, 1]
    assert heads.loc[0, ["layer", "head", "confirmed"]].tolist() == [0, 2, 1]
    moved = table.query("layer == 1 and neuron == 3")
    assert moved.empty or not moved["confirmed"].any()
    assert not heads.query("head == 1 and layer == 0")["confirmed"].any()
    # mean of the two regions `edited` (+4) and `last` (0)
    assert table.loc[0, "difference_to_clean"] == pytest.approx(2, abs=0.5)
    assert table.loc[0, "difference_to_control"] == pytest.approx(2, abs=0.5)
    summary = found["summary"].loc[("swap", "neuron")]
    assert summary["p"] < 0.01
    assert summary["delta"] > summary["random_high"]
    assert summary["control"] == "split"


def test_gates_are_a_quantity_of_their_own(tmp_path):
    def plant(row, style):
        plant_typo(row, style)
        row["gate_pooled"] = row["mlp_pooled"].roll(1, -1)  # neuron 8 has the gate that reacts

    found = study(run_of(tmp_path, plant), tmp_path)
    gates = pd.read_csv(tmp_path / "gate_sensitivity.csv")
    for table, neuron, quantity in ((found["neuron_sensitivity"], 7, "down_proj input"), (gates, 8, "act_fn output")):
        assert table.loc[0, ["layer", "neuron", "quantity"]].tolist() == [1, neuron, quantity]
    assert {*found["summary"].loc["swap"].index} == {"neuron", "gate", "head"}


def test_a_style_whose_edited_words_are_not_pooled_has_heads_only(tmp_path):
    run = run_of(tmp_path, plant_typo, styles=("swap", "split", "missing"))
    for path in [
        *run.glob("normal/*.pt"),
        *run.glob("missing/*.pt"),
    ]:  # as --pool_regions last edited:swap edited:split
        content = load_pt(path)
        names = content["pooled_regions"]
        keep = [place for place, name in enumerate(names) if name in ("last", "edited:swap", "edited:split")]
        content["pooled_regions"] = [names[place] for place in keep]
        save_pt(path, content | {key: content[key][:, :, keep] for key in ("hidden_pooled", "mlp_pooled")})
    found = study(run, tmp_path)
    assert set(found["summary"].index) == {("swap", "neuron"), ("swap", "head"), ("missing", "head")}
    assert found["neuron_sensitivity"].loc[0, ["layer", "neuron"]].tolist() == [1, 7]


def test_without_the_control_fragmentation_passes_and_the_table_says_so(tmp_path):
    run = run_of(tmp_path, plant_typo)
    for path in (run / "split").glob("*"):
        path.unlink()
    (run / "split").rmdir()
    found = study(run, tmp_path)
    assert {(1, 3), (1, 7)} <= set(
        map(tuple, found["neuron_sensitivity"].query("confirmed == 1")[["layer", "neuron"]].values)
    )
    assert set(found["summary"]["control"]) == {"none"}
    assert found["neuron_sensitivity"]["difference_to_control"].isna().all()


def test_planted_null_shows_no_excess_more_often_than_it_may(tmp_path):
    """Neurons that move together and differ in scale, but know no style: the set's p must keep its level."""
    hits = confirmed = 0
    scale = torch.linspace(0.2, 4, NEURONS)
    common = torch.linspace(-1, 1, NEURONS)

    def shared(row, style):
        row["mlp_pooled"] += row["mlp_pooled"][..., :1] * 3 * common  # one direction that all neurons share

    runs = 24
    for seed in range(runs):
        folder = tmp_path / str(seed)
        run = open_run(run_of(folder, shared, rows=40, seed=seed, templates=0, scale=scale))
        args = ns.parse_args(["--run_dir", str(run.path), "--neuron_share", "0.05", "--random_sets", "50"])
        one, _ = neurons.open_studies(run, args)
        table, line = neurons.study_style(one, "swap")
        hits += line["p"] < 0.05
        confirmed += table["confirmed"].any()
    # 24 runs at a true rate of 5 % have more than 4 hits in 1 % of cases
    assert hits <= stats.binom.ppf(0.99, runs, 0.05)
    assert confirmed <= stats.binom.ppf(0.99, runs, 0.05)


@pytest.mark.parametrize("score", ["delta", "effect_size"])
def test_scores_equal_the_definition_row_by_row(tmp_path, score):
    run = run_of(tmp_path, plant_typo, rows=24, templates=8)
    table = study(run, tmp_path, "--score", score)["neuron_sensitivity"]
    halves = deal([f"template_{i}" for i in range(8)], 2, 0)
    sums = {half: {name: [] for name in ("typo", "clean", "split")} for half in (0, 1)}
    for start in (0, 16):
        contents = {
            s: torch.load(next((run / s).glob(f"activations_{start:05d}*")), weights_only=True)
            for s in ("normal", "swap", "split")
        }
        for position, index in enumerate(contents["normal"]["original_indices"]):
            half = halves[f"template_{index % 8}"]
            for name, style, region in (
                ("typo", "swap", "edited"),
                ("clean", "normal", "edited:swap"),
                ("split", "split", "edited"),
            ):
                content = contents[style]
                columns = [content["pooled_regions"].index(one) for one in (region, "last")]
                sums[half][name].append(content["mlp_pooled"][:, position, columns].float().mean(1).numpy())
    for half, column in ((0, "delta_find"), (1, "delta")):
        mean = {name: np.mean(values, axis=0) for name, values in sums[half].items()}
        delta = mean["typo"] - np.maximum(mean["clean"], mean["split"])
        if score == "effect_size":
            rows = {name: np.array(values) for name, values in sums[half].items()}
            spreads = {name: (rows["typo"] - rows[name]).std(axis=0, ddof=1) for name in ("clean", "split")}
            delta /= np.where(mean["split"] > mean["clean"], spreads["split"], spreads["clean"])
        np.testing.assert_allclose(table[column], delta[table["layer"], table["neuron"]], atol=1e-5)
        if half == 0:
            best = np.argsort(-delta, axis=None)[: len(table)]
            assert list(zip(table["layer"], table["neuron"], strict=True)) == [divmod(int(b), NEURONS) for b in best]
    assert table["n"].iloc[0] == len(sums[1]["typo"])


def test_rows_whose_typo_is_on_the_first_token_are_left_out(tmp_path):
    prompts = with_first_word_typo(prompt_rows(30, ["swap", "split"]), range(0, 30, 3), ["swap", "split"])
    run = write_run(tmp_path / "run", prompts, neurons=NEURONS, raw_layers=(), change=unit_change())
    for first_token, rows in (("excluded", 20), ("included", 30)):
        table = study(run, tmp_path, "--first_token", first_token)["neuron_sensitivity"]
        assert set(table["n_find"] + table["n"]) == {rows}


def test_random_sets_have_as_many_units_in_each_layer_and_none_found():
    delta = np.zeros((3, 10))
    delta[0], delta[1], delta[2] = 1, 10, 100
    found = np.array([[0, 0], [0, 1], [1, 5]])
    delta[0, :2] = delta[1, 5] = 1e6  # a found unit among the random ones would show
    means = neurons.random_set_means(delta, found, 50, seed=0)
    np.testing.assert_allclose(means, (1 + 1 + 10) / 3)


def test_larger_p_counts_and_a_fall_is_no_rise():
    rng = np.random.default_rng(0)
    values = rng.standard_normal((30, 3, 2)) + np.array([[[2.0, 0.0], [2.0, 2.0], [-2.0, -2.0]]])
    p = neurons.one_sided(clustered_mean(values))
    expected = stats.ttest_1samp(values, 0, axis=0, alternative="greater").pvalue.max(axis=-1)
    np.testing.assert_allclose(p, expected, rtol=1e-9)
    assert p[0] > 0.01
    assert p[1] < 1e-6
    assert p[2] > 0.99


def test_picture_shows_style_by_layer_with_counts(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(neurons, "save_figure", lambda path, figure: drawn.update({path.name: figure}))
    study(run_of(tmp_path, plant_typo), tmp_path)
    panels = [axes for axes in drawn["neuron_sensitivity.png"].axes if axes.images]
    assert panels[0].images[0].get_array()[0].tolist()[1] >= 1
    assert panels[0].get_yticklabels()[0].get_text().startswith("swap (")
    assert "layer" in panels[0].get_xlabel()


def test_user_errors_are_one_line(tmp_path):
    run = write_run(tmp_path / "run", prompt_rows(8, ["split"]), neurons=4)
    with pytest.raises(UserError, match="typo style"):
        ns.main(["--run_dir", str(run), "--results_dir", str(tmp_path)])
    few = write_run(tmp_path / "few", prompt_rows(2, ["swap"]), neurons=4)
    with pytest.raises(UserError, match="too few rows"):
        ns.main(["--run_dir", str(few), "--results_dir", str(tmp_path)])
    with pytest.raises(UserError, match="share between 0 and 1"):
        ns.main(["--run_dir", str(few), "--results_dir", str(tmp_path), "--neuron_share", "3"])
