"""The contract of run folders and .pt files: packing, refusing, recording."""

from __future__ import annotations

import multiprocessing
import pickle
import zipfile

import pandas as pd
import pytest
import torch
from command_line import UserError
from file_output import FLOAT_FORMAT, atomic_path, read_csv, write_csv
from load_model import load_model
from pt_fields import pack_rows, unpack_rows
from read_predictions import iter_predictions
from run_store import (
    begin_run,
    load_pt,
    open_run,
    read_failures,
    record_failures,
    save_pt,
)
from synthetic_run import prompt_rows, write_run

SHARED = {"style": "normal", "regions": ["all", "last"], "pooled_regions": ["last"], "topk_positions": "all"}


def row(length: int, index: int) -> dict:
    return {
        "original_index": index, "element_index": index + 1, "prompt": "p", "response": "r", "final_prediction": "pr",
        "input_ids": torch.arange(length) + 5, "attention_mask": torch.ones(length, dtype=torch.bool),
        "region_mask": torch.rand(length, 2) > 0.5, "span_mass": torch.rand(3, 4, 2, 2),
        "hidden_pooled": torch.rand(4, 1, 8), "topk_vals": torch.rand(length, 5), "logsumexp": torch.rand(length),
        "hidden_states": {"layer_0": torch.rand(length, 8)}, "attentions": {"layer_0": torch.rand(4, length, length)},
        "response_ids": torch.arange(index + 1), "response_logprobs": torch.rand(index + 1),
    }  # fmt: skip


def test_rows_come_back_as_they_were_packed():
    rows = [row(3, 0), row(7, 1), row(1, 2)]
    content = pack_rows(rows, SHARED, pad_token_id=99)
    assert content["input_ids"].shape == (3, 7)
    assert content["input_ids"][0, :4].tolist() == [99] * 4
    assert content["span_mass"].shape == (3, 3, 4, 2, 2)
    assert content["attentions"]["layer_0"].shape == (3, 4, 7, 7)
    for before, after in zip(rows, unpack_rows(content), strict=True):
        assert before.keys() == after.keys()
        for key, value in before.items():
            pairs = [(value[k], after[key][k]) for k in value] if isinstance(value, dict) else [(value, after[key])]
            for left, right in pairs:
                assert torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right, key


class Payload:
    def __reduce__(self):
        return print, ("this code must never run",)


def test_a_file_with_code_in_it_is_refused_and_nothing_runs(tmp_path, capsys):
    path = tmp_path / "activations_00000_00001.pt"
    torch.save({"original_indices": [0], "x": Payload()}, path)
    with pytest.raises(UserError, match="refused, for it holds more than tensors and text"):
        load_pt(path)
    path.write_bytes(pickle.dumps({"original_indices": [0], "x": Payload()}))
    with pytest.raises(UserError):
        load_pt(path)
    assert "must never run" not in capsys.readouterr().out


@pytest.mark.parametrize("cut", [0, 1, 10, 200, 1000])
def test_a_truncated_file_is_one_line(tmp_path, cut):
    path = tmp_path / "activations_00000_00001.pt"
    save_pt(path, pack_rows([row(5, 0)], SHARED, 0))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) - cut] if cut else b"")
    with pytest.raises(UserError, match=r"truncated or damaged|not a readable .pt file") as caught:
        load_pt(path)
    assert "\n" not in str(caught.value)


def test_a_file_of_something_else_is_told(tmp_path):
    torch.save({"weights": torch.zeros(3)}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="not a file of stage 2"):
        load_pt(tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "y.pt", "w") as archive:
        archive.writestr("hello", "world")
    with pytest.raises(UserError):
        load_pt(tmp_path / "y.pt")


@pytest.mark.parametrize(
    ("key", "edit", "told"),
    [
        ("span_mass", lambda v: v[:2], "hidden_pooled is of 3 layers, span_mass of 2"),
        ("span_mass", lambda v: v[..., :1], "span_mass is of 1 regions, regions of 2"),
        ("hidden_pooled", lambda v: v[:, :1], "hidden_pooled is of 1 rows, original_indices of 2"),
        ("hidden_pooled", lambda v: v[:, :, 0], "hidden_pooled has 3 axes, not 4"),
        ("attentions", lambda v: {"layer_0": v["layer_0"][:, :3]}, r"attentions\['layer_0'\] is of 3 heads"),
        ("pooled_regions", lambda v: [*v, "task"], "hidden_pooled is of 1 pooled regions, pooled_regions of 2"),
        ("region_mask", lambda v: v[:, 1:], "region_mask is of 6 tokens, input_ids of 7"),
        ("attention_mask", lambda v: v & False, "holds a prompt without a token"),
        ("span_mass", lambda _: "much", "span_mass is no tensor or list"),
    ],
)
def test_fields_of_a_file_that_disagree_are_one_line(tmp_path, key, edit, told):
    content = pack_rows([row(3, 0), row(7, 1)], SHARED, pad_token_id=99)
    path = tmp_path / "activations_00000_00002.pt"
    save_pt(path, {**content, key: edit(content[key])})
    with pytest.raises(UserError, match=told) as caught:
        load_pt(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_of_two_models_in_one_run_are_told(tmp_path):
    for style, heads in (("normal", 4), ("swap", 5)):
        content = pack_rows([row(3, 0)], SHARED, pad_token_id=99)
        content["span_mass"] = torch.rand(3, 1, heads, 2, 2)
        del content["attentions"]
        (tmp_path / style).mkdir()
        save_pt(tmp_path / style / "activations_00000_00001.pt", content)
    run = open_run(tmp_path)
    list(run.batches("normal"))
    with pytest.raises(UserError, match=r"5 heads, but 4 in normal/activations_00000_00001.pt; all files of a run"):
        list(run.batches("swap"))


def test_folders_without_a_run_are_told(tmp_path):
    with pytest.raises(UserError, match="no such run folder"):
        open_run(tmp_path / "none")
    with pytest.raises(UserError, match=r"holds no activations_\*.pt"):
        open_run(tmp_path)


def test_reference_files_are_read_without_responses(tmp_path):
    torch.save(
        {"original_indices": [0, 1], "final_predictions": ["2 + 2 = 4", "odd"], "prompts": ["2 + 2 =", "3 + 3 ="]},
        tmp_path / "activations_00000_00002.pt",
    )
    found = list(iter_predictions(tmp_path))
    assert [one.response for one in found] == [" 4", None]
    assert [one.element_index for one in found] == [1, 2]


def test_settings_must_agree_and_environments_are_collected(tmp_path):
    begin_run(tmp_path, {"seed": 1, "raw_layers": (0, 1)}, {"torch": "1"})
    begin_run(tmp_path, {"seed": 1, "raw_layers": (0, 1)}, {"torch": "2"})
    with pytest.raises(UserError, match="seed: 1 there, 2 now"):
        begin_run(tmp_path, {"seed": 2, "raw_layers": (0, 1)}, {"torch": "1"})
    text = (tmp_path / "run.json").read_text()
    assert '"torch": "1"' in text
    assert '"torch": "2"' in text


def test_unlike_settings_are_told_one_by_one(tmp_path):
    begin_run(tmp_path, {"layers": (0, 1), "deep": {"a": 1, "b": {"c": [1, 2]}}, "text": "x" * 500 + " one"}, None)
    with pytest.raises(UserError) as caught:
        begin_run(tmp_path, {"layers": (0,), "deep": {"a": 1, "b": {}}, "text": "x" * 500 + "two"}, None)
    told = f"(deep.b.c: [1, 2] there, None now; layers: [0, 1] there, [0] now; text: …{'x' * 20} one there, …"
    assert f"{told}{'x' * 20}two now)" in str(caught.value)


def fail_one(folder, index):
    record_failures(folder, "normal", [index], {index: (index, "no memory")})


def test_failures_of_several_processes_all_stay(tmp_path):
    processes = [multiprocessing.get_context("fork").Process(target=fail_one, args=(tmp_path, i)) for i in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert sorted(read_failures(tmp_path)) == list(range(8))
    assert record_failures(tmp_path, "normal", range(8), {}) == 0
    assert not (tmp_path / "failures.csv").exists()


def half_written(path):
    with atomic_path(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError):
        half_written(path)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["table.csv"]


def test_a_table_that_cannot_be_written_is_one_line(tmp_path):
    import pandas as pd

    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file: is a file, but a folder is to be made there"):
        write_csv(tmp_path / "file" / "table.csv", pd.DataFrame({"a": [1]}))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("/no/such/folder", {}, "/no/such/folder: no such folder"),
        ("tests", {}, "cannot be loaded|no such model"),
    ],
)
def test_a_model_that_cannot_be_loaded_is_one_line(name, options, message):
    with pytest.raises(UserError, match=message) as caught:
        load_model(name, **options)
    assert "\n" not in str(caught.value)


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="not in the local cache, and the hub cannot be reached") as caught:
        load_model("nobody/no-such-model-here")
    assert "\n" not in str(caught.value)


def test_a_wrong_run_folder_is_told_with_the_right_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "outputs" / "demo" / "maths", prompt_rows(2))
    for wrong, told in (
        ("outputs/demo", "outputs/demo: is no run but a folder of runs; give outputs/demo/maths"),
        ("outputs", "outputs: is no run but a folder of runs; give outputs/demo/maths"),
        ("outputs/demo/math", "no such run folder; did you mean outputs/demo/maths"),
        ("nowhere/at/all", "nowhere/at/all: no such run folder; give"),
    ):
        with pytest.raises(UserError) as caught:
            open_run(wrong)
        assert told in str(caught.value)
    with pytest.raises(UserError, match="did you mean swap"):
        open_run("outputs/demo/maths").chosen(["swpa"])


NAMES = ["None", "NA", "null", "nan", "NaN", "N/A", "#N/A", "-nan", "007", "True", "1e3"]


def test_only_an_empty_cell_of_a_table_is_missing(tmp_path):
    path = tmp_path / "t.csv"
    write_csv(path, pd.DataFrame({"style": NAMES, "original_index": range(len(NAMES)), "value": 0.5}))
    assert read_csv(path)["style"].tolist() == NAMES
    path.write_text("style,element_index,original_index,value,correct\nNA,01,3,,True\n,a,4,2.5,\n")
    table = read_csv(path)
    assert table["element_index"].tolist() == ["01", "a"]
    assert table["style"].isna().tolist() == [False, True]
    assert table["value"].isna().tolist() == table["correct"].isna().tolist()[::-1] == [True, False]
    assert read_csv(path, ["style", "value"]).columns.tolist() == ["style", "value"]


def test_numbers_of_a_table_have_six_digits(tmp_path, monkeypatch):
    monkeypatch.setattr("file_output.FLOAT_FORMAT", FLOAT_FORMAT)
    write_csv(tmp_path / "t.csv", pd.DataFrame({"p": [1 / 3e9, 2 / 3, 150.0], "n": [12345678, 1, 2]}))
    assert (tmp_path / "t.csv").read_text() == "p,n\n3.33333e-10,12345678\n0.666667,1\n150,2\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file; do this"),
        ("", "needs the columns style, original_index .*; do this"),
        ("a,b\n1,2\n", "needs the columns style, original_index"),
        ("style,original_index\nswap,one\n", "original_index must be a whole number in every line; do this"),
        ("style,original_index\nswap,\n", "original_index must be a whole number"),
        ("style,original_index\nswap,1.5\n", "original_index must be a whole number"),
    ],
)
def test_a_table_that_cannot_be_used_is_one_line(tmp_path, text, message):
    if text is not None:
        (tmp_path / "t.csv").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        read_csv(tmp_path / "t.csv", ["style", "original_index"], "do this")
    assert "\n" not in str(caught.value)
