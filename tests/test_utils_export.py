"""A run in other formats: read back it is the .pt files, and the formats' own readers open it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import export_formats
import export_run
import numpy as np
import pytest
import tiny_models
import torch
from capture import batching
from command_line import UserError
from export_formats import fingerprint, read_file
from run_store import load_pt, open_run, save_pt
from safetensors import safe_open
from test_inference_runs import run, write_prompts

HAS_ARROW = importlib.util.find_spec("pyarrow") is not None
needs_arrow = pytest.mark.skipif(not HAS_ARROW, reason="pyarrow is not installed")
HAS_DATASETS = importlib.util.find_spec("datasets") is not None
needs_datasets = pytest.mark.skipif(not HAS_DATASETS, reason="datasets is not installed")
FORMS = ["safetensors", pytest.param("parquet", marks=needs_arrow), pytest.param("datasets", marks=needs_datasets)]
OPTIONAL = Path(sys.prefix) / "optional"
FLAGS = ["--neurons", "--entropy", "--cross_logprobs", "--answer_logprobs", "--topk_positions", "all"]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("run")
    prompts = write_prompts(place / "prompts.json", 11)
    rows = json.loads(prompts.read_text())
    rows[3] |= {"element_index": "a text", "answer": ["one", "two words"]}
    prompts.write_text(json.dumps(rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batching, "ROWS_PER_FILE", 6)
        assert run(tiny_models.save(place / "model"), prompts, place / "run", *FLAGS, "--dtype", "bfloat16") == 0
    return place / "run"


def export(run_folder: Path, output: Path, form: str) -> dict:
    assert export_run.main(["--run_dir", str(run_folder), "--output_dir", str(output), "--format", form]) == 0
    return json.loads((output / "manifest.json").read_text())


def assert_equal(one, other, where=()) -> None:
    """Value by value, another way than by the hashes."""
    assert type(one) is type(other), where
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype, where
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key], (*where, key))
    else:
        assert one == other or str(one) == str(other) == "nan" or "nan" in str(one), where
        assert str(one) == str(other), where


@pytest.mark.parametrize("form", FORMS)
def test_what_is_read_back_equals_the_pt_files(run_folder, tmp_path, form):
    manifest = export(run_folder, tmp_path, form)
    opened = open_run(run_folder)
    assert list(manifest["styles"]) == list(opened.styles) == ["normal", "swap"]
    for style, record in manifest["styles"].items():
        assert record["run.json"] == opened.settings(style)
        assert [one["source"] for one in record["files"]] == [path.name for path in opened.files(style)]
        for file, path in zip(record["files"], opened.files(style), strict=True):
            assert_equal(read_file(tmp_path / style / file["name"], form), load_pt(path))
            assert file["bytes"] == (tmp_path / style / file["name"]).stat().st_size
            assert file["rows"] == len(load_pt(path)["original_indices"])
    assert json.loads((tmp_path / "prompts.json").read_text()) == opened.prompt_rows


def test_safetensors_own_reader_opens_it(run_folder, tmp_path):
    name = export(run_folder, tmp_path, "safetensors")["styles"]["swap"]["files"][0]["name"]
    content = load_pt(open_run(run_folder).files("swap")[0])
    with safe_open(tmp_path / "swap" / name, framework="np") as file:
        assert file.get_tensor("span_mass").shape == tuple(content["span_mass"].shape)
        assert json.loads(file.metadata()["responses"]) == content["responses"]
        assert "hidden_states.layer_0" in file.keys()  # noqa: SIM118 (no mapping)


@needs_arrow
def test_pandas_opens_parquet(run_folder, tmp_path):
    import pandas as pd

    export(run_folder, tmp_path, "parquet")
    table = pd.read_parquet(tmp_path / "swap")
    content, other = (load_pt(path) for path in open_run(run_folder).files("swap"))
    assert table["response"].tolist() == content["responses"] + other["responses"]
    first = torch.tensor(table["logsumexp"][0])
    assert torch.equal(first, content["logsumexp"][0][content["attention_mask"][0]])


@pytest.mark.skipif(not OPTIONAL.is_dir(), reason=f"pyarrow is not in {OPTIONAL}, where `make test` puts it")
def test_parquet_in_a_python_that_has_pyarrow(run_folder, tmp_path):
    """The script reads back what it writes; pandas opens a style's folder."""
    words = [export_run.__file__, "--run_dir", str(run_folder), "--output_dir", str(tmp_path), "--format", "parquet"]
    code = f"import pandas; print(*pandas.read_parquet({str(tmp_path / 'swap')!r})['original_index'])"
    for command, told in ((words, ""), (["-c", code], "1 2 3 4 6 7 8 9\n")):
        environment = os.environ | {"PYTHONPATH": str(OPTIONAL)}
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment)
        assert (done.returncode, done.stdout) == (0, told), done.stderr


@needs_datasets
def test_datasets_opens_all_styles(run_folder, tmp_path):
    import datasets

    export(run_folder, tmp_path, "datasets")
    styles = datasets.load_from_disk(str(tmp_path))
    assert list(styles) == ["normal", "swap"]
    several = [load_pt(path) for path in open_run(run_folder).files("normal")]
    assert styles["normal"]["response"] == [text for content in several for text in content["responses"]]
    row = styles["normal"].with_format("numpy")[0]
    first = several[0]["span_mass"][:, 0]
    np.testing.assert_array_equal(row["span_mass"].reshape(row["span_mass_shape"]), first.float().numpy())
    assert styles["normal"]["element_index"][3] == '"a text"'  # one column has one type, in all files
    assert len(several) == 2


def test_a_value_that_is_not_the_same_is_an_error(run_folder, tmp_path, monkeypatch):
    content = load_pt(open_run(run_folder).files("swap")[0])
    marks = fingerprint(content)
    changed = content["topk_vals"].clone()
    changed.view(-1)[-1] += 1
    assert {key for key, mark in fingerprint(content | {"topk_vals": changed}).items() if mark != marks[key]} == {
        "topk_vals"
    }
    read = export_formats.read_file
    monkeypatch.setattr(export_formats, "read_file", lambda *args: read(*args) | {"topk_vals": changed})
    with pytest.raises(UserError, match="reads back as other values than"):
        export(run_folder, tmp_path, "safetensors")
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_file_of_the_reference_format(tmp_path):
    content = {
        "final_predictions": ["1 + 1 = 2"],
        "original_indices": [0],
        "attentions": {"layer_0": torch.ones(1, 2, 3, 3)},
    }
    save_pt(tmp_path / "run" / "activations_00000_00001.pt", content)
    export(tmp_path / "run", tmp_path / "out", "safetensors")
    (path,) = (tmp_path / "out").rglob("*.safetensors")
    assert_equal(read_file(path, "safetensors"), content)
    missing = "no rows to write as parquet; use --format safetensors" if HAS_ARROW else "pip install pyarrow"
    with pytest.raises(UserError, match=missing):
        export(tmp_path / "run", tmp_path / "other", "parquet")
