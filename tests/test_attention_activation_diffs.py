"""Residual-stream distances, CKA, recovery depth, next-token change and the logit lens of stage 5."""

from __future__ import annotations

import itertools
import re

import activation_diffs
import numpy as np
import pandas as pd
import pytest
import torch
from attention import activations, layer_curves
from attention.logit_lens import LogitLens, find_final_norm
from attention.state_measures import (
    clustered_cka,
    first_lasting_layer,
    half_recovery_depth,
    item_contributions,
    recovery_depth,
)
from command_line import UserError
from matplotlib import pyplot
from next_token_change import next_token_change
from paired_stats import paired_difference
from plot_style import MOST_LINES, label_ends, panels
from scipy.special import log_softmax
from scipy.stats import entropy
from synthetic_run import prompt_rows, with_first_word_typo, write_run

STYLES = ["swap", "main", "split"]


@pytest.fixture(autouse=True)
def no_pictures(request, monkeypatch):
    """Pictures cost seconds: they are drawn in the one test that looks at them."""
    if "pictures" not in request.node.name:
        monkeypatch.setattr(layer_curves, "save_diffs", lambda *_: None)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("diffs")
    rows = prompt_rows(26, STYLES, templates=9)
    rows[3]["swap"] = rows[3]["normal"]  # equal to the clean text
    del rows[5]["main"]
    run = write_run(folder / "run", rows, layers=4, heads=2, hidden=12, rows_per_file=7, skip=lambda s, i: i == 8)
    assert activation_diffs.main(["--run_dir", str(run), "--results_dir", str(folder / "results")]) == 0
    return run, folder / "results"


def states_of(run, style, index, region):
    """[L+1, D] read from the files without the code under test."""
    for path in sorted((run / style).glob("*.pt")):
        content = torch.load(path, weights_only=True)
        if index in content["original_indices"]:
            column = content["pooled_regions"].index(region)
            return content["hidden_pooled"][:, content["original_indices"].index(index), column].double().numpy()
    return None


def test_distances_equal_the_formulas_on_every_pair(results):
    run, folder = results
    table = pd.read_csv(folder / "activation_diffs.csv")
    cosines, lengths = [], []
    for index in range(26):
        if index in (5, 8):
            continue
        clean, style = states_of(run, "normal", index, "edited:main"), states_of(run, "main", index, "edited")
        norms = np.linalg.norm(clean, axis=1)
        cosines.append((clean * style).sum(1) / norms / np.linalg.norm(style, axis=1))
        lengths.append(np.linalg.norm(style - clean, axis=1) / norms)
    for measure, expected in (("cosine", cosines), ("relative_l2", lengths)):
        mine = table[table["measure"] == measure].query("style == 'main' and region == 'edited'").sort_values("layer")
        np.testing.assert_allclose(mine["estimate"], np.mean(expected, axis=0), atol=1e-5)
        assert set(mine["n"]) == {24}


def test_identical_texts_and_missing_rows_are_left_out_and_counted(results):
    _, folder = results
    summary = (
        pd.read_csv(folder / "activation_diffs_summary.csv").query("measure == 'next_token_kl'").set_index("style")
    )
    items = pd.read_csv(folder / "activation_diffs_items.csv")
    assert dict(summary["n"]) == {"swap": 24, "main": 24, "split": 25}
    for style, part in items.groupby("style"):
        ordered = np.sort(part["next_token_kl"])
        assert summary.loc[style, "median"] == pytest.approx(ordered[(len(ordered) - 1) // 2])
        logs = pd.read_csv(folder / "activation_diffs_summary.csv").query("measure == 'log10_next_token_kl'")
        mean = logs.set_index("style").loc[style, "estimate"]
        assert mean == pytest.approx(np.log10(np.maximum(part["next_token_kl"], 1e-6)).mean(), abs=1e-4)
    assert dict(summary["n_identical"]) == {"swap": 1, "main": 0, "split": 0}
    assert 3 not in set(items.query("style == 'swap'")["original_index"])
    assert 8 not in set(items["original_index"])
    assert list(items["element_index"]) == [index + 1 for index in items["original_index"]]


def test_difference_to_control_is_the_clustered_paired_difference_on_the_same_words(results, tmp_path):
    run, _ = results
    tables = {}
    for most in (-1, 1):
        command = ["--run_dir", str(run), "--results_dir", str(tmp_path), "--split_tokens", str(most)]
        assert activation_diffs.main(command) == 0
        tables[most] = pd.read_csv(tmp_path / "activation_diffs.csv")
    table = tables[-1]
    near = tables[1].query("region == 'edited' and measure == 'relative_l2'").groupby("style")["n_with_control"].max()
    every = table.query("region == 'edited' and measure == 'relative_l2'").groupby("style")["n_with_control"].max()
    assert near["swap"] < every["swap"] == 24
    assert every["main"] < 15  # the rows in which it happens to edit the word that `split` cuts
    rows = [index for index in range(26) if index not in (3, 8)]
    values = {}
    for style in ("swap", "split"):
        pairs = [(states_of(run, "normal", i, f"edited:{style}"), states_of(run, style, i, "edited")) for i in rows]
        values[style] = np.array([np.linalg.norm(b - a, axis=1) / np.linalg.norm(a, axis=1) for a, b in pairs])
    expected = paired_difference(values["swap"], values["split"], [f"template_{i % 9}" for i in rows])
    mine = table.query("style == 'swap' and region == 'edited' and measure == 'relative_l2'").sort_values("layer")
    np.testing.assert_allclose(mine["difference_to_control"], expected.mean, atol=1e-6)
    np.testing.assert_allclose(mine["p"], expected.p, rtol=1e-3)


def test_batch_size_of_the_files_changes_nothing(tmp_path):
    tables = []
    for per_file in (3, 50):
        run = write_run(tmp_path / f"run{per_file}", prompt_rows(14, STYLES), rows_per_file=per_file, layers=3)
        activation_diffs.main(["--run_dir", str(run), "--results_dir", str(tmp_path / f"out{per_file}")])
        tables.append(pd.read_csv(tmp_path / f"out{per_file}" / "activation_diffs.csv"))
    pd.testing.assert_frame_equal(tables[0], tables[1], rtol=1e-4, atol=1e-5)


def test_without_split_the_comparison_is_empty_not_made_up(tmp_path, capsys):
    run = write_run(tmp_path / "run", prompt_rows(10, ["swap"]), layers=2)
    activation_diffs.main(["--run_dir", str(run), "--results_dir", str(tmp_path)])
    table = pd.read_csv(tmp_path / "activation_diffs.csv")
    assert table["difference_to_control"].isna().all()
    assert table["p"].isna().all()
    assert "without a control" in capsys.readouterr().err


def test_pictures_are_drawn_at_42_layers_with_their_labels(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run", prompt_rows(12, STYLES), layers=42, heads=1, raw_layers=())
    drawn = {}
    monkeypatch.setattr(layer_curves, "save_figure", lambda path, figure: drawn.update({path.name: figure}))
    activation_diffs.main(["--run_dir", str(run), "--results_dir", str(tmp_path)])
    kinds = {name.rpartition("_")[0] if "+" in name else name.removesuffix(".png") for name in drawn}
    assert kinds == {"activation_diffs", "activation_diffs_more", "typo_recovery", "recovery_depth"}
    for name, figure in drawn.items():
        for axes in (axes for axes in figure.axes if axes.lines and name != "recovery_depth.png"):
            assert len(axes.lines) <= MOST_LINES
            labelled = {text.get_text() for text in axes.texts}
            assert labelled == {line.get_label() for line in axes.lines}  # at their ends, so that no legend is needed
            assert re.search(r"n = (\d+–)?\d+ prompts", axes.get_title("left"))
            assert "layer" in axes.get_xlabel()
    (first,) = [name for name in drawn if name.startswith("typo_recovery_swap+main")]
    assert drawn[first].axes[0].lines[0].get_xdata().tolist() == list(range(43))


def test_names_at_the_ends_of_lines_do_not_overlap():
    figure, (axes,) = panels(1, 1, 3.0)
    axes.set_ylim(0, 1)
    label_ends(
        axes, [(value, f"line {i}", "black") for i, value in enumerate((0.5, 0.51, 0.5, 0.99, 1.0, float("nan")))]
    )
    figure.draw_without_rendering()
    boxes = sorted((text.get_window_extent() for text in axes.texts), key=lambda box: box.y0)
    assert len(boxes) == 5
    assert all(below.y1 <= above.y0 + 1 for below, above in itertools.pairwise(boxes))
    pyplot.close(figure)


# --- recovery


def plant_recovery(layer_of):
    """Edited words of a variant are noise up to a layer, from there the clean twin's state plus a little noise."""
    directions = torch.randn(40, 32, generator=torch.Generator().manual_seed(0))

    def change(row, style, index):
        generator = torch.Generator().manual_seed(index)
        names = ["last", "instruction", "task"]
        pooled = row["hidden_pooled"]
        for column in range(len(names), pooled.shape[1]):
            own = directions[index].expand(pooled.shape[0], -1) + 5  # 5: the part that all states share
            if style != "normal":
                own = own.clone()
                own[: layer_of[style]] = torch.randn(layer_of[style], 32, generator=generator) + 5
            pooled[:, column] = own + 0.05 * torch.randn(pooled.shape[0], 32, generator=generator)

    return change


def test_planted_recovery_is_found_at_its_layer_against_the_control(tmp_path):
    # every row edits a word of its own, so that there are enough other words
    rows = [{"normal": f"alpha word{chr(97 + i % 26)}x{i} end", "answer": "1"} for i in range(40)]
    for i, row in enumerate(rows):
        row["swap"] = row["normal"].replace(f"x{i}", f"y{i}")
        row["split"] = row["normal"].replace("word", "wo\u00adrd")
    run = write_run(tmp_path / "run", rows, layers=8, hidden=32, change=plant_recovery({"swap": 6, "split": 2}))
    activation_diffs.main(["--run_dir", str(run), "--results_dir", str(tmp_path)])
    items = pd.read_csv(tmp_path / "activation_diffs_items.csv")
    summary = pd.read_csv(tmp_path / "activation_diffs_summary.csv").set_index(["style", "measure"])
    for style, layer in (("swap", 6), ("split", 2)):
        own = items[items["style"] == style]
        assert (own["recovery_depth"] == layer).mean() > 0.9
        assert (own["half_recovery_depth"] == layer).mean() > 0.9
        assert summary.loc[(style, "recovery_depth"), "median"] == layer
    line = summary.loc[("swap", "recovery_depth")]
    assert line["difference_to_control"] == pytest.approx(4, abs=0.4)
    assert line["p_adjusted"] < 1e-6
    nearest = pd.read_csv(tmp_path / "activation_diffs.csv").query("style == 'swap' and measure == 'own_nearest'")
    before = nearest[nearest["layer"] < 6]["estimate"].mean()
    assert before < 0.1  # chance is 1 / (other words + 1)
    shares = pd.read_csv(tmp_path / "activation_diffs.csv").query("style == 'swap' and measure == 'own_nearer_share'")
    assert shares[shares["layer"] < 6]["estimate"].mean() == pytest.approx(0.5, abs=0.1)


def test_never_recovered_words_are_counted_not_dropped(tmp_path):
    rows = [{"normal": f"alpha word{chr(97 + i % 26)}x{i} end", "swap": f"alpha wrod{i} end"} for i in range(20)]
    run = write_run(tmp_path / "run", rows, layers=4, hidden=32, change=plant_recovery({"swap": 5}))
    activation_diffs.main(["--run_dir", str(run), "--results_dir", str(tmp_path)])
    line = pd.read_csv(tmp_path / "activation_diffs_summary.csv").set_index("measure").loc["recovery_depth"]
    assert line["n"] == 20
    assert line["n_censored"] >= 18
    assert line["median"] == 5


def test_depths_of_hand_made_curves():
    holds = np.array([[0, 1, 0, 1, 1, 1, 0], [1, 1, 0, 0, 0, 1, 1], [1] * 7], dtype=bool)
    assert first_lasting_layer(holds, 3).tolist() == [3, 7, 0]
    assert recovery_depth(np.where(holds, 1.0, 0.0), 1).tolist() == [1, 0, 0]
    nearest = holds.astype(float)
    nearest[1, 2] = np.nan
    assert np.isnan(recovery_depth(nearest)[1])
    # greatest loss 0.8 at layer 1, half regained at cosine 0.6; the high start before the loss does not count
    curve = np.array([[0.9, 0.2, 0.5, 0.61, 0.7, 0.8]])
    assert half_recovery_depth(curve).tolist() == [3]
    assert half_recovery_depth(np.array([[0.9, 0.8, 0.2, 0.3, 0.3, 0.3]])).tolist() == [6]
    assert np.isnan(half_recovery_depth(np.ones((1, 6)))[0])


# --- the attention sink


def test_words_on_the_first_token_are_left_out_and_their_states_are_in_no_centre(tmp_path):
    on_first = [2, 7, 11, 20]

    def change(row, style, index):
        if index in on_first:
            row["hidden_pooled"][2:, 3:] += 1e4  # after last, instruction, task: the edited words

    tables = {}
    for name, chosen in (("sink", on_first), ("plain", [])):
        rows = with_first_word_typo(prompt_rows(24, ["swap", "split"]), on_first, ["swap", "split"])
        if not chosen:  # the run without those rows
            for index in on_first:
                del rows[index]["swap"], rows[index]["split"]
        run = write_run(tmp_path / name, rows, layers=4, hidden=12, change=change, raw_layers=())
        for first_token in ("excluded", "included"):
            command = ["--run_dir", str(run), "--results_dir", str(tmp_path / "out"), "--first_token", first_token]
            activation_diffs.main([*command, "--reference_words", "100"])
            table = pd.read_csv(tmp_path / "out" / "activation_diffs.csv")
            tables[name, first_token] = table.set_index(["style", "region", "measure", "layer"])["estimate"]
            counts = table.query("region == 'edited' and measure in ['cosine', 'own_nearest']")["n"]
            assert set(counts) == {24 if (name, first_token) == ("sink", "included") else 20}
    edited = tables["plain", "excluded"].xs("edited", level="region", drop_level=False)
    pd.testing.assert_series_equal(tables["sink", "excluded"][edited.index], edited, rtol=1e-4)
    nearest = [tables["sink", kind]["swap", "edited", "own_nearest", 3] for kind in ("included", "excluded")]
    assert nearest[0] * 24 == pytest.approx(nearest[1] * 20 + 4, abs=1.01)  # such a word always looks recovered


def test_one_massive_state_does_not_make_all_words_look_alike(tmp_path):
    def change(row, style, index):
        if index == 8:  # one of the reference words
            row["hidden_pooled"][2:] += 1e4

    curves = []
    for planted in (change, None):
        run = write_run(
            tmp_path / f"run{planted is None}", prompt_rows(30, ["swap"]), layers=3, hidden=12, change=planted
        )
        activation_diffs.main(["--run_dir", str(run), "--results_dir", str(tmp_path / "out")])
        items = pd.read_csv(tmp_path / "out" / "activation_diffs.csv")
        cosine = items.query("region == 'edited' and measure == 'cosine_centred' and layer >= 2")["estimate"]
        curves.append(cosine.to_numpy())
    np.testing.assert_allclose(curves[0], curves[1], atol=0.08)  # one row of 30 has another cosine


def test_an_item_with_a_massive_activation_is_not_the_whole_cka(tmp_path):
    def change(row, style, index):
        if index == 8 and style == "normal":
            row["hidden_pooled"][2] *= 500

    cka, counts = [], []
    for planted in (change, None):
        folder = tmp_path / f"run{planted is None}"
        run = write_run(folder, prompt_rows(30, ["swap"]), layers=3, hidden=12, change=planted)
        activation_diffs.main(["--run_dir", str(run), "--results_dir", str(tmp_path / "out")])
        table = pd.read_csv(tmp_path / "out" / "activation_diffs.csv").query("measure == 'cka' and region == 'edited'")
        cka.append(table["estimate"].to_numpy())
        counts.append(set(table["n"]))
    np.testing.assert_allclose(cka[0], cka[1], atol=0.05)
    assert counts == [{29}, {30}]


def test_a_token_that_ends_every_prompt_has_no_centred_cosine_at_the_embeddings(tmp_path):
    run = write_run(tmp_path / "run", prompt_rows(20, ["swap"]), layers=3, hidden=12)
    activation_diffs.main(["--run_dir", str(run), "--results_dir", str(tmp_path)])
    table = pd.read_csv(tmp_path / "activation_diffs.csv").query("measure == 'cosine_centred' and region == 'last'")
    assert table["layer"].tolist() == [1, 2, 3]
    assert table["estimate"].gt(0.5).all()


# --- CKA


def dense_unbiased_hsic(k, l):  # noqa: E741
    """Song et al. 2012, equation 5, straight from the text."""
    n = len(k)
    k, l = k - np.diag(np.diag(k)), l - np.diag(np.diag(l))  # noqa: E741
    one = np.ones(n)
    trace = np.trace(k @ l)
    return (trace + (one @ k @ one) * (one @ l @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (one @ k @ l @ one)) / (
        n * (n - 3)
    )


def test_cka_equals_the_published_formula():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((30, 50)) + 3, rng.standard_normal((30, 40))
    y[:, :20] += x[:, :20]
    expected = [dense_unbiased_hsic(a @ a.T, b @ b.T) for a, b in ((x, y), (x, x), (y, y))]
    parts = item_contributions(torch.tensor(x), torch.tensor(y))
    np.testing.assert_allclose(parts.mean(0), expected, rtol=1e-6)
    found = clustered_cka(x, y, [str(i) for i in range(30)])
    assert found[0] == pytest.approx(expected[0] / np.sqrt(expected[1] * expected[2]), rel=1e-6)


def test_cka_is_near_zero_for_unrelated_states_even_with_more_dimensions_than_items():
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((2, 192, 500))
    value, low, high, n, _ = clustered_cka(x, y, [str(i) for i in range(192)])
    assert abs(value) < 0.05
    assert low < 0 < high
    assert n == 192


def test_cka_leaves_out_an_item_that_overflowed():
    first, second = np.random.default_rng(0).standard_normal((2, 20, 6))
    labels = [str(item) for item in range(20)]
    without = clustered_cka(first[1:], second[1:], labels[1:])
    second[0, 0] = np.inf
    assert clustered_cka(first, second, labels) == without
    assert clustered_cka(first[:4], second[:4], labels[:4]) is None  # three items are too few


def test_cka_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(2)
    mix = rng.standard_normal((6, 8))

    def sample(templates):
        centre = np.repeat(rng.standard_normal((templates, 6)), 4, axis=0)
        z = centre + 0.5 * rng.standard_normal((templates * 4, 6))
        x, y = z @ mix + 0.5 * rng.standard_normal((len(z), 8)), z @ mix + rng.standard_normal((len(z), 8))
        return x, y, np.repeat(np.arange(templates), 4).astype(str)

    target, hits = clustered_cka(*sample(750))[0], 0
    for _ in range(150):
        _, low, high, _, _ = clustered_cka(*sample(50))
        hits += low <= target <= high
    assert 0.88 <= hits / 150 <= 0.99


# --- next token


def logits_of(values, indices, logsumexp):
    """What `last_logits` reads of a file."""
    return {"topk_vals": values.numpy(), "topk_indices": indices.numpy(), "logsumexp": logsumexp.numpy()}


def test_next_token_kl_is_exact_with_the_whole_vocabulary_and_a_lower_bound_without():
    rng = np.random.default_rng(0)
    clean = rng.standard_normal((9, 60)) * 3
    logits = torch.tensor(np.stack([clean, clean + 0.7 * rng.standard_normal((9, 60))]))  # as near as a typo's
    full = [np.exp(log_softmax(side.numpy(), axis=-1)) for side in logits]
    exact = entropy(full[0], full[1], axis=-1)

    def sides(k):
        return [logits_of(*side.topk(k), side.logsumexp(-1)) for side in logits]

    np.testing.assert_allclose(next_token_change(*sides(60))["next_token_kl"], exact, rtol=1e-5)
    bounds = [next_token_change(*sides(k)) for k in (3, 10, 30)]
    for bound in bounds:
        assert (bound["next_token_kl"] <= exact + 1e-9).all()
        assert (bound["kl_mass_clean"] <= 1).all()
    assert bounds[2]["next_token_kl"].mean() > 0.9 * exact.mean()


def test_next_token_kl_is_the_least_that_the_logits_leave_possible():
    probabilities = np.random.default_rng(2).dirichlet(np.full(12, 0.3), size=(2, 30))
    clean, style = (
        logits_of(*torch.tensor(np.log(side)).topk(3), torch.zeros(30, dtype=torch.float64)) for side in probabilities
    )
    found = next_token_change(clean, style)["next_token_kl"]
    for row, (p, q) in enumerate(zip(*probabilities, strict=True)):
        known, likeliest = (list(side["topk_indices"][row]) for side in (style, clean))
        shared, own = [i for i in likeliest if i in known], [i for i in likeliest if i not in known]
        cap, rest = q[known].min(), 1 - q[shared].sum()
        grids = np.meshgrid(*[np.linspace(1e-4, 1, 60) * cap] * len(own))  # style's probabilities of the clean ones
        left = rest - sum(grids, np.zeros(()))
        terms = [p[i] * np.log(p[i] / grid) for i, grid in zip(own, grids, strict=True)]
        other = 1 - p[likeliest].sum()
        parts = np.where(left > 0, other * np.log(other / np.maximum(left, 1e-9)), np.inf) + sum(terms, np.zeros(()))
        expected = parts.min() + (p[shared] * np.log(p[shared] / q[shared])).sum()
        assert found[row] == pytest.approx(max(0, expected), abs=0.02)
        assert found[row] <= max(0, expected) + 1e-5


def test_next_token_kl_of_other_tokens_is_far_from_0():
    """A clean first token that the style's top-k lacks is as likely as its last one at most."""
    clean = logits_of(torch.log(torch.tensor([[0.9, 0.05]])), torch.tensor([[1, 2]]), torch.zeros(1))
    style = logits_of(torch.log(torch.tensor([[0.9, 0.01]])), torch.tensor([[3, 4]]), torch.zeros(1))
    expected = 0.9 * np.log(0.9 / 0.01) + 0.05 * np.log(0.05 / 0.01) + 0.05 * np.log(0.05 / 0.98)
    assert next_token_change(clean, style)["next_token_kl"] == pytest.approx([expected], rel=1e-5)


def test_rank_of_the_clean_first_token_and_its_censoring():
    values = torch.tensor([[3.0, 2.0, 1.0]]).expand(3, -1)
    sums = torch.full((3,), 3.5)
    clean = logits_of(values, torch.tensor([[7, 8, 9]] * 3), sums)
    style = logits_of(values, torch.tensor([[7, 1, 2], [4, 5, 7], [1, 2, 3]]), sums)
    change = next_token_change(clean, style)
    assert change["clean_top1_rank"].tolist() == [1, 3, 4]  # 4: beyond the top 3
    assert change["top1_kept"].tolist() == [1, 0, 0]
    same = next_token_change(clean, clean)
    np.testing.assert_allclose(same["next_token_kl"], 0, atol=1e-12)


# --- logit lens


@pytest.fixture(scope="module")
def tiny_models():
    from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, GPTNeoXConfig, LlamaConfig

    size = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 24}
    size |= {"num_hidden_layers": 3, "num_attention_heads": 2}
    torch.manual_seed(0)
    configs = [
        LlamaConfig(**size, num_key_value_heads=1),
        GPT2Config(vocab_size=60, n_embd=16, n_layer=3, n_head=2, n_positions=32),
        GPTNeoXConfig(**size),
        Gemma2Config(**size, num_key_value_heads=1, head_dim=8, final_logit_softcapping=5.0),
    ]
    return [AutoModelForCausalLM.from_config(config).eval() for config in configs]


def test_lens_with_norm_and_head_gives_the_models_own_logits(tiny_models):
    for model in tiny_models:
        caught = []
        norm = find_final_norm(model)
        hook = norm.register_forward_hook(lambda _m, args, _o, caught=caught: caught.append(args[0]))
        with torch.no_grad():
            out = model(torch.arange(12).reshape(2, 6) + 3, output_hidden_states=True)
        hook.remove()
        lens = LogitLens(norm, model)
        torch.testing.assert_close(lens.logits(caught[0], normed=False), out.logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(lens.logits(out.hidden_states[-1], normed=True), out.logits, rtol=1e-4, atol=1e-5)
        top = out.logits[:, -1].topk(4)
        states, top = out.hidden_states[-1].numpy(), [part.numpy() for part in top]
        lens.check(states[:, -1], *top)
        with pytest.raises(UserError, match="model that made the run"):
            lens.check(states[:, 0] * 2 + 1, *top)


def test_lens_measures_equal_scipy(tiny_models):
    lens = LogitLens(find_final_norm(tiny_models[0]), tiny_models[0])
    clean, style = torch.randn(2, 4, 5, 16)
    first = np.array([1, 2, 3, 4, 5])
    found = lens.change(*(side.transpose(0, 1).contiguous().numpy() for side in (clean, style)), first)
    for layer in range(4):
        p, q = (lens.logits(s[layer], normed=layer == 3).softmax(-1).double().numpy() for s in (clean, style))
        np.testing.assert_allclose(found["lens_kl"][:, layer], entropy(p, q, axis=-1), rtol=1e-3, atol=1e-6)
        picked = q[np.arange(5), first]
        np.testing.assert_allclose(found["lens_top1_probability"][:, layer], picked, rtol=1e-4)
        for name, side in (("lens_token_clean", p), ("lens_token", q)):
            assert found[name][:, layer].tolist() == side.argmax(-1).tolist()


def without_pooled_last(folder):
    """Rewrite a run's files as `--pool_regions instruction task edited` would have left them."""
    for path in folder.glob("*/*.pt"):
        content = torch.load(path, weights_only=True)
        keep = [i for i, name in enumerate(content["pooled_regions"]) if name != "last"]
        content["pooled_regions"] = [content["pooled_regions"][i] for i in keep]
        content["hidden_pooled"] = content["hidden_pooled"][:, :, keep]
        torch.save(content, path)


@pytest.mark.parametrize("raw_layers", [(0, 2, 4), (1, 2)])
def test_a_region_that_is_not_pooled_and_its_lens_come_from_the_raw_layers(
    tmp_path, monkeypatch, raw_layers, tiny_llama_of_synthetic_runs, capsys
):
    rows = prompt_rows(14, STYLES, templates=6)
    run = write_run(tmp_path / "run", rows, layers=4, hidden=12, raw_layers=(0,))
    for path in run.glob("*/*.pt"):  # the synthetic maps end before layer L: its states are added by hand
        content = torch.load(path, weights_only=True)
        content["attentions"] = {}
        content["hidden_states"] = {f"layer_{i}": states_at(content, i) for i in raw_layers}
        torch.save(content, path)
    model = tiny_llama_of_synthetic_runs(layers=4, hidden=12)
    lens = LogitLens(find_final_norm(model), model)
    monkeypatch.setattr(activations, "open_lens", lambda *_: lens)
    tables = []
    for name in ("pooled", "raw"):
        command = ["--run_dir", str(run), "--results_dir", str(tmp_path / name), "--model_name", "tiny"]
        assert activation_diffs.main([*command, "--lens_rows", "9"]) == 0
        tables.append(pd.read_csv(tmp_path / name / "activation_diffs.csv").query("region == 'last'"))
        told = capsys.readouterr().err
        assert ("cannot be checked" in told) == (name == "raw" and 4 not in raw_layers)
        without_pooled_last(run)
    pooled, raw = tables
    assert set(raw["layer"]) == set(raw_layers)
    assert {"cosine", "cka", "lens_kl", "lens_top1_probability_change"} <= set(raw["measure"])
    items = pd.read_csv(tmp_path / "raw" / "logit_lens_items.csv")
    assert set(items["layer"]) == set(raw_layers)
    assert items.groupby("style")["original_index"].nunique()["normal"] == 9
    assert not items.duplicated(["style", "original_index", "layer"]).any()
    curve = items[items["style"] == STYLES[0]].groupby("layer")["clean_top1_probability"].mean()
    average = raw[(raw["measure"] == "lens_top1_probability") & (raw["style"] == STYLES[0])].set_index("layer")
    np.testing.assert_allclose(curve, average["estimate"], rtol=1e-4, atol=1e-6)
    assert set(raw.loc[raw["measure"] == "lens_kl", "n"]) == {9}
    same = pooled[pooled["layer"].isin(raw_layers)].reset_index(drop=True).drop(columns="p_adjusted")
    pd.testing.assert_frame_equal(raw.reset_index(drop=True).drop(columns="p_adjusted"), same, rtol=1e-4, atol=1e-6)


def states_at(content, layer):
    """[B,S,D] whose last token has the pooled state of `last`; the other tokens are noise."""
    batch, length = content["input_ids"].shape
    column = content["pooled_regions"].index("last")
    states = torch.randn(batch, length, content["hidden_pooled"].shape[-1])
    states[:, -1] = content["hidden_pooled"][layer, :, column]
    return states


@pytest.fixture
def tiny_llama_of_synthetic_runs():
    """A model whose head is the one of `write_run`, so that the lens agrees with the run's logits."""
    from synthetic_run import VOCABULARY, Size, _weights
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(layers, hidden):
        size = {"num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": 8}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, num_attention_heads=2, **size))
        model.lm_head.weight.data = _weights(Size(layers=layers, hidden=hidden, raw_layers=(0,)), 0)["embedding"]
        return model.eval()

    return make


def test_the_lens_refuses_what_it_cannot_read(tmp_path, monkeypatch, tiny_llama_of_synthetic_runs):
    def lens_of(model):
        monkeypatch.setattr(activations, "open_lens", lambda *_: LogitLens(find_final_norm(model), model))

    run = write_run(tmp_path / "run", prompt_rows(8, ["swap"]), layers=3, hidden=12, raw_layers=())
    command = ["--run_dir", str(run), "--results_dir", str(tmp_path), "--model_name", "tiny"]
    lens_of(tiny_llama_of_synthetic_runs(layers=2, hidden=12))
    with pytest.raises(UserError, match="2 layers of hidden size 12, the run 3 of 12"):
        activation_diffs.main(command)
    lens_of(tiny_llama_of_synthetic_runs(layers=3, hidden=8))
    with pytest.raises(UserError, match="name the model that made the run"):
        activation_diffs.main(command)
    without_pooled_last(run)
    with pytest.raises(UserError, match="last token"):
        activation_diffs.main(command)


# --- errors


def test_a_style_whose_states_all_overflowed_has_no_lines(tmp_path):
    def overflow(row, style, index):
        if style == "swap":
            row["hidden_pooled"].fill_(torch.inf)

    run = write_run(tmp_path / "run", prompt_rows(8, ["swap"]), change=overflow)
    assert activation_diffs.main(["--run_dir", str(run), "--results_dir", str(tmp_path)]) == 0
    assert pd.read_csv(tmp_path / "activation_diffs.csv").empty


def test_user_errors_are_one_line(tmp_path):
    run = write_run(tmp_path / "run", prompt_rows(6, ["swap"]))
    with pytest.raises(UserError, match="no style 'wrong'"):
        activation_diffs.main(["--run_dir", str(run), "--results_dir", str(tmp_path), "--styles", "wrong"])
    with pytest.raises(UserError, match="neither pooled nor raw"):
        activation_diffs.main(["--run_dir", str(run), "--results_dir", str(tmp_path), "--regions", "nowhere"])
    with pytest.raises(UserError, match="clean form"):
        activation_diffs.main(["--run_dir", str(run / "swap"), "--results_dir", str(tmp_path)])
    with pytest.raises(UserError, match="no rows to read"):
        activation_diffs.main(["--run_dir", str(run), "--results_dir", str(tmp_path), "--max_samples", "0"])
