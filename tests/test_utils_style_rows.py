"""Rows of a style by original index: arrays, texts and tokens from several files, and the rows they go with."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from command_line import UserError
from pt_fields import unpack_rows
from run_store import Run, load_pt, open_run, pt_files, save_pt
from style_names import is_control, meaning_of
from style_rows import StyleRows, clean_and_styles, clean_prompt, control_of, paired_rows, twin_region
from synthetic_run import prompt_rows, write_run

ROWS = 10


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    rows = prompt_rows(ROWS, ["swap", "main"], templates=4)
    rows[4]["swap"] = rows[4]["normal"]  # identical
    folder = tmp_path_factory.mktemp("rows") / "run"
    lost = {("normal", 7), ("swap", 2)}
    write_run(folder, rows, rows_per_file=3, layers=3, heads=2, neurons=4, raw_layers=(1,),
              skip=lambda style, index: (style, index) in lost)  # fmt: skip
    return open_run(folder)


@pytest.fixture(scope="module")
def own(run: Run) -> StyleRows:
    return StyleRows(run, "swap")


def rows_of(run: Run, style: str) -> dict[int, dict]:
    return {row["original_index"]: row for _, content in run.batches(style) for row in unpack_rows(content)}


def test_fields_come_in_the_order_asked_for_whatever_their_file(run, own):
    assert own.indices == [0, 1, 3, 4, 5, 6, 7, 8, 9]
    rows = rows_of(run, "swap")
    asked = [8, 0, 5, 1]
    mass = own.field("span_mass", asked)
    expected = np.stack([rows[index]["span_mass"].float().numpy() for index in asked])
    assert mass.dtype == np.float32
    np.testing.assert_array_equal(mass, expected)
    edited = own.regions("span_mass").index("edited")
    entropy = np.stack([rows[index]["attention_entropy"][..., edited].float().numpy() for index in asked])
    np.testing.assert_array_equal(own.field("attention_entropy", asked, "edited"), entropy)
    pooled = own.regions().index("edited")
    states = np.stack([rows[index]["hidden_pooled"][:, pooled].float().numpy() for index in own.indices])
    np.testing.assert_array_equal(own.field("hidden_pooled", region="edited"), states)
    np.testing.assert_array_equal(own.field("hidden_pooled", region="edited", layers=2), states[:, 2])
    np.testing.assert_array_equal(own.states(own.indices, "edited", 2), states[:, 2])
    assert own.field("span_mass", []).shape == (0, *mass.shape[1:])
    with pytest.raises(UserError, match="has no field 'response_ids'"):
        own.field("response_ids")
    with pytest.raises(UserError, match="'responses' is not a tensor field"):
        own.field("responses")
    with pytest.raises(UserError, match="has no region 'nowhere'"):
        own.field("span_mass", region="nowhere")


def test_one_file_open_at_a_time_gives_the_same(run, own):
    few = StyleRows(run, "swap", max_samples=6, max_open=1)
    assert few.indices == [0, 1, 3, 4, 5]
    np.testing.assert_array_equal(few.field("topk_vals", [5, 0, 4]), own.field("topk_vals", [5, 0, 4]))


def test_what_is_read_of_each_file_is_put_together_by_row(own):
    def extract(content, path):
        return {"length": content["attention_mask"].sum(1).numpy(), "index": np.array(content["original_indices"])}

    found = own.extract(extract, [9, 3, 0])
    assert found["index"].tolist() == [9, 3, 0]
    content, _, position = own.place(9)
    assert found["length"][0] == content["attention_mask"][position].sum()
    names = {True: ["a"], False: ["a", "only_later"]}
    with pytest.raises(UserError, match=r"differs from activations_00000_00003\.pt in only_later"):
        own.extract(lambda content, path: dict.fromkeys(names["_00000_" in path.name], np.zeros(3)))


def test_raw_layers_give_the_states_of_a_region_that_is_not_pooled(run, own):
    rows, names = rows_of(run, "swap"), own.regions("span_mass")
    region = next(name for name in names if name not in own.regions() and name != "context")
    states = own.states([6, 0], region)
    inside = rows[6]["region_mask"][:, names.index(region)]
    expected = rows[6]["hidden_states"]["layer_1"][inside].float().mean(0).numpy()
    np.testing.assert_allclose(states[0, 1], expected, rtol=1e-6)
    assert np.isnan(states[:, [0, 2, 3]]).all()
    assert own.state_layers(region) == [1]
    np.testing.assert_array_equal(own.states([6, 0], region, 1), states[:, 1])
    with pytest.raises(UserError, match="no states of 'nowhere'"):
        own.states([0], "nowhere")


def test_rows_are_paired_by_index_and_told_apart_by_text(run, own):
    clean = StyleRows(run, "normal")
    pairs = paired_rows(own, clean)
    assert pairs.rows == [0, 1, 3, 4, 5, 6, 8, 9]
    assert pairs.identical == [4]
    assert pairs.changed == [0, 1, 3, 5, 6, 8, 9]
    assert pairs.unpaired == [7]
    assert paired_rows(own, clean, [9, 2, 7, 4]).rows == [9, 4]
    assert own.texts([4]) == clean.texts([4]) == [clean_prompt(run, 4)]
    assert own.clusters([1, 5]) == ["template_1", "template_1"]
    assert own.predictions()[3][0].prompt == own.texts([3])[0]


def test_tokens_of_a_region(run, own):
    rows, names = rows_of(run, "swap"), own.regions("span_mass")
    for index, counts, first in zip(
        [5, 1], own.token_counts([5, 1], "edited"), own.holds_first([5, 1], "edited"), strict=True
    ):
        inside = rows[index]["region_mask"][:, names.index("edited")]
        assert counts.tolist() == [int(inside.sum()), len(inside), int(inside.int().argmax())]
        assert first == bool(inside[0])
        assert own.region_tokens(index, "edited") == tuple(rows[index]["input_ids"][inside].tolist())
    assert own.holds_first([5, 1], "first").all()
    assert not own.holds_first([5, 1], "edited:main").any()
    assert own.region_tokens(5, "edited:main") == ()


def test_a_row_that_two_files_hold_is_refused(run, tmp_path):
    folder = tmp_path / "swap"
    folder.mkdir()
    first = pt_files(run.styles["swap"])[0]
    for name in (first.name, "activations_00003_00006.pt"):
        save_pt(folder / name, load_pt(first))
    with pytest.raises(UserError, match=r"row 0 is in activations_00000_00003\.pt too"):
        StyleRows(open_run(folder), "swap")


def test_files_of_the_reference_format_are_numbered_by_their_name(tmp_path):
    for start in (0, 2):
        texts = [f"{start + row} + 1 = {start + row + 1}" for row in range(2)]
        torch.save({"final_predictions": texts}, tmp_path / f"activations_{start:05d}_{start + 2:05d}.pt")
    rows = StyleRows(open_run(tmp_path), tmp_path.name)
    assert rows.indices == [0, 1, 2, 3]
    assert rows.texts([3], "final_predictions") == ["3 + 1 = 4"]
    assert rows.predictions()[3][0].final_prediction == "3 + 1 = 4"


def test_styles_and_their_controls(run):
    assert clean_and_styles(run, None) == ("normal", ["swap", "main"])
    with pytest.raises(UserError, match=r"has no style 'swpa'.*did you mean swap"):
        StyleRows(run, "swpa")
    assert control_of(run, "swap") is None
    assert is_control("split@swap")
    assert twin_region("edited", "split@swap") == "edited:swap"
    assert twin_region("task", "swap") == "task"


# --- in a notebook


def test_a_run_is_opened_in_a_notebook(run, own):
    table = run.rows("swap")
    assert list(run.styles) == ["normal", "swap", "main"]
    assert table["original_index"].tolist() == own.indices
    assert table["element_index"].tolist() == own.texts(key="element_index")
    assert table["prompt"].tolist() == own.texts()
    assert table["clean_prompt"].tolist() == [run.row(index)["normal"] for index in own.indices]
    assert table["response"].tolist() == own.texts(key="responses")
    clean = StyleRows(run, "normal")
    known = [index for index in own.indices if index in clean]
    assert table.dropna(subset="clean_response")["original_index"].tolist() == known
    assert table["clean_response"].dropna().tolist() == clean.texts(known, "responses")
    assert table["identical"].tolist() == [index == 4 for index in own.indices]
    assert table["cluster"].tolist() == [f"template_{index % 4}" for index in own.indices]
    assert not run.rows("normal")["identical"].any()
    with pytest.raises(UserError, match=r"has no style 'swpa'.*did you mean swap"):
        run.rows("swpa")


def test_a_field_is_one_array_whose_axes_have_names(run, own):
    mass, axes = run.field("span_mass", "swap"), run.axes("span_mass", "swap")
    assert list(axes) == ["row", "layer", "head", "query region", "key region"]
    assert tuple(len(places) for places in axes.values()) == mass.shape
    last, task = axes["query region"].index("last"), axes["key region"].index("task")
    assert axes["row"] == run.rows("swap")["original_index"].tolist()
    content, _, position = own.place(5)
    at = axes["row"].index(5)
    names = content["regions"]
    expected = content["span_mass"][:, position, :, names.index("last"), names.index("task")].float().numpy()
    np.testing.assert_array_equal(mass[at, :, :, last, task], expected)
    assert run.axes("hidden_pooled", "swap")["region"] == own.regions()
    with pytest.raises(UserError, match="no tensor field 'prompts'"):
        run.axes("prompts", "swap")


def test_raw_fields_are_padded_to_the_longest_prompt_of_all_files(run, own):
    rows = rows_of(run, "swap")
    maps, axes = run.field("attentions", "swap", layers=1), run.axes("attentions", "swap")
    ids, real = run.field("input_ids", "swap"), run.field("attention_mask", "swap")
    assert list(axes) == ["row", "head", "query token", "key token"]
    assert tuple(len(places) for places in axes.values()) == maps.shape
    assert len({content["input_ids"].shape[1] for _, content in run.batches("swap")}) > 1
    for place, index in enumerate(own.indices):
        length = len(rows[index]["input_ids"])
        assert real[place].sum() == real[place, -length:].sum() == length
        np.testing.assert_array_equal(ids[place, -length:], rows[index]["input_ids"])
        np.testing.assert_array_equal(maps[place, :, -length:, -length:], rows[index]["attentions"]["layer_1"])
        assert maps[place, :, :, :-length].sum() == 0
    with pytest.raises(UserError, match="attentions needs layers= with one of its raw layers: 1"):
        run.field("attentions", "swap", layers=2)


def test_tables_of_results_are_found_beside_the_outputs(tmp_path):
    folder = write_run(tmp_path / "outputs" / "demo" / "facts", prompt_rows(3))
    results = tmp_path / "results" / "demo" / "facts"
    results.mkdir(parents=True)
    (results / "head_sensitivity.csv").write_text("style,layer,t\nNA,0,1.5\n")
    opened = open_run(folder)
    assert opened.frame("head_sensitivity")["style"].tolist() == ["NA"]
    assert opened.frame("head_sensitivity", results).shape == (1, 3)
    with pytest.raises(UserError, match=r"head_sensitvity\.csv: no such file.*did you mean head_sensitivity"):
        opened.frame("head_sensitvity")


def test_a_name_is_told_in_words():
    assert meaning_of("typo@1") == "1 one-letter edit"
    assert "as many tokens" in meaning_of("split@swap")
    assert "polite" in meaning_of("neutral@polite")
    assert meaning_of("repaired@swap").startswith("swap after")
    assert "noise" in meaning_of("normal@again")
    assert meaning_of("mine") == ""
