"""The control `split@<style>` in stage 5: which rows are compared, with what, and that nothing else moves."""

from __future__ import annotations

from pathlib import Path

import activation_diffs
import head_sensitivity
import neuron_sensitivity
import numpy as np
import pandas as pd
import probe_layers
import pytest
from pt_fields import unpack_rows
from run_store import open_run
from scipy import stats
from style_names import is_control
from style_rows import clean_and_styles, control_of, like_control, twin_region
from synthetic_run import prompt_rows, with_controls, write_run

ROWS = 32
MATCHED = [index for index in range(ROWS) if index % 4 != 3]
IDENTICAL = [index for index in range(ROWS) if index % 4 == 2]


def control_rows(count: int = ROWS, templates: int = 16) -> list[dict]:
    """Of four rows two have a typo and a control of one more token than the clean word, one a typo of as many tokens,
    whose control is the clean prompt itself, and one a control of more tokens than its typo."""
    rows = prompt_rows(count, ["main", "split"], templates=templates)
    for index, row in enumerate(rows):
        row["swap"] = row["normal"].replace("carefully", "craefully" if index % 4 == 2 else "caarefully")
    cuts = {0: "c\u00adarefully", 1: "c\u00adarefully", 2: "carefully", 3: "c\u00ada\u00adrefully"}
    return with_controls(rows, "swap", lambda index, word, typo: cuts[index % 4])


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("controls") / "run"
    return write_run(folder, control_rows(), layers=3, heads=2, neurons=6, raw_layers=(1,))


@pytest.fixture(scope="module")
def results(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    arguments = ["--run_dir", str(run_dir), "--results_dir", str(folder)]
    probes = ["--targets", "typo", "typo_vs_control", "style", "--layers", "1"]
    shares = ["--neuron_share", "0.2", "--head_share", "0.2"]
    items = [
        (style, i, style != "swap" or i % 3 > 0) for style in ("normal", "split@swap", "swap") for i in range(ROWS)
    ]
    pd.DataFrame(items, columns=["style", "original_index", "correct"]).to_csv(folder / "maths_items.csv", index=False)
    assert head_sensitivity.main([*arguments, "--all_measures"]) == 0
    assert activation_diffs.main(arguments) == 0
    assert neuron_sensitivity.main([*arguments, *shares]) == 0
    assert probe_layers.main([*arguments, *probes]) == 0
    return folder


def rows_of(run_dir: Path, style: str) -> dict[int, dict]:
    run = open_run(run_dir)
    return {row["original_index"]: row for _, content in run.batches(style) for row in unpack_rows(content)}


def test_each_style_has_its_own_control_and_split_for_want_of_it(run_dir):
    run = open_run(run_dir)
    assert list(run.styles) == ["normal", "main", "split", "swap", "split@swap"]
    assert [control_of(run, style) for style in run.styles if style != "normal"] == ["split", None, "split@swap", None]
    assert [is_control(style) for style in run.styles] == [False, False, True, False, True]
    assert twin_region("edited", "split@swap") == "edited:swap"
    assert clean_and_styles(run, ["swap"]) == ("normal", ["swap", "split@swap"])
    assert clean_and_styles(run, ["main"]) == ("normal", ["main", "split"])


def test_rows_are_matched_by_their_number_of_tokens_alone(run_dir):
    from style_rows import StyleRows

    run = open_run(run_dir)
    own, control = StyleRows(run, "swap"), StyleRows(run, "split@swap")
    for limit in (None, 0, 1):
        assert like_control(own, control, range(ROWS), limit) == MATCHED
    assert like_control(own, control, [0, 3, ROWS + 5], None) == [0]


def test_heads_are_compared_with_the_matched_control(run_dir, results):
    table = pd.read_csv(results / "head_sensitivity.csv")
    swap = table[(table["style"] == "swap") & (table["measure"] == "task_fraction_last")]
    assert set(swap["control"]) == {"split@swap"}
    assert set(table[table["style"] == "main"]["control"]) == {"split"}
    assert table[table["style"].map(is_control)]["control"].isna().all()
    assert set(swap["n"]) == {ROWS}
    assert set(swap["n_vs_control"]) == {len(MATCHED)}
    own, control = rows_of(run_dir, "swap"), rows_of(run_dir, "split@swap")
    names = open_run(run_dir).load(next((run_dir / "swap").glob("*.pt")))["regions"]
    query, key = names.index("last"), names.index("task")
    change = np.mean(
        [(own[i]["span_mass"].float() - control[i]["span_mass"].float())[..., query, key].numpy() for i in MATCHED], 0
    )
    for row in swap.itertuples():
        assert row.difference_vs_control == pytest.approx(change[row.layer, row.head], abs=1e-6)
    by_t = swap.dropna(subset=["t_vs_control"]).sort_values("t_vs_control", key=abs, ascending=False)
    assert by_t["rank_vs_control"].tolist() == [1, 2, 3, 4, 5, 6]
    expected = swap["difference_vs_control"] / swap["standard_error_vs_control"]
    np.testing.assert_allclose(swap["t_vs_control"], expected, rtol=1e-3)  # four digits are written
    overlap = pd.read_csv(results / "head_overlap.csv")
    assert set(overlap[overlap["reference_form"] == "control"]["style"]) == {"swap"}  # `main` has but `split`
    # Of its own, the control differs from the clean form in the rows in which it is cut.
    control_lines = table[(table["style"] == "split@swap") & (table["measure"] == "task_fraction_last")]
    assert set(zip(control_lines["n"], control_lines["n_identical"], strict=True)) == {
        (ROWS - len(IDENTICAL), len(IDENTICAL))
    }


def test_divergence_from_the_clean_form_is_tested_against_that_of_the_control(run_dir, results):
    from attention.aligned_maps import aligned_divergence, row_maps
    from paired_stats import paired_difference

    run, maps = open_run(run_dir), {}
    for style, edited in (("normal", "edited:swap"), ("swap", "edited"), ("split@swap", "edited")):
        for path, content in run.batches(style):
            maps |= {
                (style, index): one
                for index, one in zip(content["original_indices"], row_maps(content, path, edited), strict=True)
            }
    far = {
        style: aligned_divergence(
            np.array([maps[style, i] for i in MATCHED], dtype=object),
            np.array([maps["normal", i] for i in MATCHED], dtype=object),
            [0, 1, 2],
            2,
        )[:, 1, :, 1]
        for style in ("swap", "split@swap")
    }
    assert np.array_equal(far["split@swap"][[MATCHED.index(i) for i in IDENTICAL]], np.zeros((len(IDENTICAL), 2)))
    expected = paired_difference(far["swap"], far["split@swap"], [run.template(i) for i in MATCHED])
    table = pd.read_csv(results / "head_sensitivity.csv")
    lines = table[(table["style"] == "swap") & (table["measure"] == "jsd_mean")].sort_values("head")
    assert lines["p"].isna().all()
    assert set(lines["layer"]) == {1}
    np.testing.assert_allclose(lines["difference_vs_control"], expected.mean, atol=1e-6)
    np.testing.assert_allclose(lines["p_vs_control"], expected.p, rtol=1e-3)


def test_a_file_without_a_row_of_the_control_is_passed_over(tmp_path):
    rows = control_rows(24)
    run = write_run(tmp_path / "run", rows, rows_per_file=8, layers=2, heads=2, raw_layers=(1,),
                    skip=lambda style, index: style == "split@swap" and 8 <= index < 16)  # fmt: skip
    assert len(list((run / "split@swap").glob("*.pt"))) == 2
    arguments = ["--run_dir", str(run), "--results_dir", str(tmp_path)]
    for script in (head_sensitivity, activation_diffs):
        assert script.main(arguments) == 0
    table = pd.read_csv(tmp_path / "head_sensitivity.csv")
    assert set(table[table["style"] == "swap"].query("measure == 'task_fraction_last'")["n_vs_control"]) == {12}


def test_flips_go_with_the_change_from_the_clean_form_and_from_the_control(run_dir, results):
    wrong = [index % 3 == 0 for index in range(ROWS)]
    table = pd.read_csv(results / "head_answer_flips.csv")
    lines = table[(table["style"] == "swap") & (table["measure"] == "task_fraction_last")]
    names = open_run(run_dir).load(next((run_dir / "swap").glob("*.pt")))["regions"]
    query, key = names.index("last"), names.index("task")  # of the base regions, the same in every style
    mass = {
        style: {i: row["span_mass"][..., query, key].float().numpy() for i, row in rows_of(run_dir, style).items()}
        for style in ("normal", "swap", "split@swap")
    }
    for form, other, rows in (("clean form", "normal", range(ROWS)), ("control", "split@swap", MATCHED)):
        found = lines[lines["reference_form"] == form]
        assert set(found["n"]) == {len(rows)}
        assert set(found["control"].fillna("")) == {"split@swap" if form == "control" else ""}
        assert set(found["n_flipped"]) == {sum(wrong[i] for i in rows)}
        change = [mass["swap"][i] - mass[other][i] for i in rows]
        for row in found.itertuples():
            expected = stats.pointbiserialr([wrong[i] for i in rows], [one[row.layer, row.head] for one in change])
            assert row.point_biserial_r == pytest.approx(expected.statistic, abs=1e-4)
    assert (results / "head_answer_flips_swap.png").is_file()


def test_states_are_compared_with_the_matched_control(run_dir, results):
    curves = pd.read_csv(results / "activation_diffs.csv")
    lines = curves.query("style == 'swap' and region == 'edited' and measure == 'relative_l2'").sort_values("layer")
    assert set(lines["control"]) == {"split@swap"}
    assert set(lines["n_with_control"]) == {len(MATCHED)}
    clean, own, control = (rows_of(run_dir, style) for style in ("normal", "swap", "split@swap"))
    pooled = {
        style: open_run(run_dir).load(next((run_dir / style).glob("*.pt")))["pooled_regions"]
        for style in ("normal", "swap")
    }
    twin, edited = pooled["normal"].index("edited:swap"), pooled["swap"].index("edited")
    found = {"swap": [], "split@swap": []}
    for index in MATCHED:
        before = clean[index]["hidden_pooled"][:, twin].numpy()
        for style, rows in (("swap", own), ("split@swap", control)):
            after = rows[index]["hidden_pooled"][:, edited].numpy()
            found[style].append(np.linalg.norm(after - before, axis=1) / np.linalg.norm(before, axis=1))
    difference = np.mean(np.array(found["swap"]) - np.array(found["split@swap"]), axis=0)
    np.testing.assert_allclose(lines["difference_to_control"], difference, atol=1e-5)
    np.testing.assert_allclose(lines["control_estimate"], np.mean(found["split@swap"], axis=0), atol=1e-5)
    assert np.array(found["split@swap"])[[MATCHED.index(i) for i in IDENTICAL]].max() == 0
    summary = pd.read_csv(results / "activation_diffs_summary.csv").set_index(["style", "measure"])
    # A control's own lines hold the rows that needed no cut, at distance 0.
    assert summary.loc[("split@swap", "next_token_kl"), ["n", "n_identical"]].tolist() == [ROWS, 8]
    assert summary.loc[("split@swap", "log10_next_token_kl"), "n"] == ROWS - 8
    assert summary.loc[("swap", "next_token_kl"), "n_with_control"] == len(MATCHED)
    # A control that is the clean prompt itself has a KL of 0 and no logarithm of it.
    assert summary.loc[("swap", "log10_next_token_kl"), "n_with_control"] == len(MATCHED) - len(IDENTICAL)
    items = pd.read_csv(results / "activation_diffs_items.csv").query("style == 'split@swap'")
    assert sorted(items["original_index"]) == list(range(ROWS))
    assert (items[items["original_index"].isin(IDENTICAL)]["next_token_kl"] == 0).all()
    p = curves[curves["style"] == "split@swap"]
    assert p["p_adjusted"].isna().all()


def test_units_are_scored_against_the_matched_control(results):
    summary = pd.read_csv(results / "neuron_sensitivity_summary.csv").set_index(["style", "unit"])
    assert set(summary.index.get_level_values("style")) == {"main", "swap"}
    for unit in ("neuron", "head"):
        line = summary.loc[("swap", unit)]
        assert line["control"] == "split@swap"
        assert line["n_find"] + line["n"] == len(MATCHED)
        assert summary.loc[("main", unit), "control"] == "split"


def test_probes_of_typos_against_their_matched_control_have_no_token_counts_to_read(results):
    table = pd.read_csv(results / "probe_layers.csv").set_index(["target", "region"])
    line = table.loc[("typo_vs_control", "edited")]
    assert line[["n", "n_positive"]].tolist() == [2 * len(MATCHED), len(MATCHED)]
    assert line["token_count_auc"] == pytest.approx(0.5, abs=0.1)
    last = table.loc[("typo_vs_control", "last")]
    assert last["n_positive"] > len(MATCHED)  # with `main`, against the `split` that edits its words
    assert table.loc[("style", "edited"), "n_classes"] == 3  # main, split, swap; a matched control is no style


def test_a_tone_is_compared_with_neutral_words_of_as_many_tokens(tmp_path):
    rows = prompt_rows(ROWS, ["swap"], templates=16)
    for row in rows:  # both add six tokens
        row["polite"], row["neutral@polite"] = (
            f"{words} {row['normal']}" for words in ("Kindly help me.", "Plates stood by.")
        )
    run_dir = write_run(
        tmp_path / "run", rows, layers=3, heads=2, neurons=6, raw_layers=(1,), few_shot="Add: 1 + 1 = 2. "
    )
    run = open_run(run_dir)
    assert list(run.styles) == ["normal", "swap", "polite", "neutral@polite"]
    assert control_of(run, "polite") == "neutral@polite"
    assert twin_region("edited", "neutral@polite") == "edited:polite"
    flags = ["--run_dir", str(run_dir), "--results_dir", str(tmp_path)]
    assert head_sensitivity.main(flags) == 0
    assert activation_diffs.main(flags) == 0
    assert neuron_sensitivity.main([*flags, "--neuron_share", "0.2", "--head_share", "0.2"]) == 0
    probes = ["--typo_styles", "polite", "--targets", "typo_vs_control", "style", "--layers", "1"]
    assert probe_layers.main([*flags, *probes]) == 0
    own, control = rows_of(run_dir, "polite"), rows_of(run_dir, "neutral@polite")
    names = run.load(next((run_dir / "polite").glob("*.pt")))["regions"]
    # 1. Heads: the words added have no clean twin, and the neutral ones are theirs.
    heads = pd.read_csv(tmp_path / "head_sensitivity.csv").query("style == 'polite'").set_index("measure")
    for measure, region in (("task_fraction_last", "task"), ("edited_mass_last", "edited")):
        change = [own[i]["span_mass"].float() - control[i]["span_mass"].float() for i in range(ROWS)]
        mean = np.mean([one[..., names.index("last"), names.index(region)].numpy() for one in change], axis=0)
        if region == "edited":
            assert measure not in heads.index or heads.loc[[measure], "n"].max() == 0
            continue
        for row in heads.loc[[measure]].itertuples():
            assert (row.control, row.n_vs_control) == ("neutral@polite", ROWS)
            assert row.difference_vs_control == pytest.approx(mean[row.layer, row.head], abs=1e-6)
    # 2. States: how much further the tone moves the last token than neutral words of as many tokens do.
    curves = pd.read_csv(tmp_path / "activation_diffs.csv").query("region == 'last' and measure == 'relative_l2'")
    lines = curves.query("style == 'polite'").sort_values("layer")
    assert set(lines["n_with_control"]) == {ROWS}
    place = run.load(next((run_dir / "polite").glob("*.pt")))["pooled_regions"].index("last")
    clean = rows_of(run_dir, "normal")
    before = np.array([clean[i]["hidden_pooled"][:, place].numpy() for i in range(ROWS)])
    far = [
        np.linalg.norm(np.array([form[i]["hidden_pooled"][:, place].numpy() for i in range(ROWS)]) - before, axis=2)
        / np.linalg.norm(before, axis=2)
        for form in (own, control)
    ]
    np.testing.assert_allclose(lines["difference_to_control"], (far[0] - far[1]).mean(axis=0), atol=1e-5)
    assert curves.query("style == 'neutral@polite'")["p_adjusted"].isna().all()
    # 3. Probes: a tone against its control; the control is none of the styles.
    table = pd.read_csv(tmp_path / "probe_layers.csv").set_index(["target", "region"])
    assert table.loc[("typo_vs_control", "last"), "n"].tolist() == 2 * ROWS
    assert table.loc[("typo_vs_control", "last"), "token_count_auc"].tolist() == pytest.approx(0.5, abs=0.1)
    assert table.loc[("style", "last"), "n_classes"].tolist() == 2
    assert "neutral@polite" not in set(pd.read_csv(tmp_path / "neuron_sensitivity_summary.csv")["style"])


def test_a_style_none_of_whose_rows_is_matched_has_empty_columns(tmp_path):
    rows = [row | {"split@swap": row["normal"].replace("carefully", "c\u00ada\u00ad\u00adrefully")} for row in
            control_rows(8, 4)]  # fmt: skip
    run = write_run(tmp_path / "run", rows, styles=["normal", "swap", "split@swap"], raw_layers=())
    assert head_sensitivity.main(["--run_dir", str(run), "--results_dir", str(tmp_path)]) == 0
    table = pd.read_csv(tmp_path / "head_sensitivity.csv")
    assert table["difference_vs_control"].isna().all()
    assert set(table[table["style"] == "swap"]["control"]) == {"split@swap"}


def test_blocks_without_a_cut_row_are_no_obstacle(tmp_path):
    rows = prompt_rows(70, ["swap"], templates=10)
    rows = with_controls(rows, "swap", lambda index, word, typo: word)  # typos of as many tokens as their words
    run = write_run(tmp_path / "run", rows, layers=2, heads=2, neurons=4, raw_layers=())
    arguments = ["--run_dir", str(run), "--results_dir", str(tmp_path)]
    assert activation_diffs.main(arguments) == 0
    assert head_sensitivity.main(arguments) == 0
    assert neuron_sensitivity.main([*arguments, "--neuron_share", "0.2", "--head_share", "0.3"]) == 0
    table = pd.read_csv(tmp_path / "activation_diffs.csv").query("style == 'swap' and measure == 'cosine'")
    assert set(table["n_with_control"]) == {70}
    assert set(pd.read_csv(tmp_path / "neuron_sensitivity.csv")["score"]) == {"delta"}
