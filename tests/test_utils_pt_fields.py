"""The one table of fields: what stage 2 writes is in it, and the size estimate is that of the tensors it describes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from capture.batching import RowCost
from pt_fields import FIELDS, ITEM_BYTES, fields_table, pack_rows
from run_store import open_run
from synthetic_run import prompt_rows, write_run


@pytest.fixture(scope="module")
def contents(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = write_run(tmp_path_factory.mktemp("fields") / "run", prompt_rows(4), layers=3, heads=2, neurons=6)
    run = open_run(folder)
    return [content for style in run.styles for _, content in run.batches(style)]


def test_every_field_of_a_file_is_in_the_table_with_its_dtype(contents):
    for content in contents:
        assert content.keys() <= FIELDS.keys()
        for key, value in content.items():
            one = next(iter(value.values())) if isinstance(value, dict) else value
            assert isinstance(one, torch.Tensor) == FIELDS[key].is_tensor, key
            if FIELDS[key].dtype in ITEM_BYTES:
                assert str(one.dtype) == f"torch.{FIELDS[key].dtype}", key


def test_the_size_of_a_row_is_that_of_its_tensors(contents):
    for content in contents:
        tensors = [value for value in content.values() if isinstance(value, torch.Tensor)]
        tensors += [tensor for value in content.values() if isinstance(value, dict) for tensor in value.values()]
        rows, length = content["input_ids"].shape
        layers, _, heads, regions, _ = content["span_mass"].shape
        sizes = {"L": layers, "H": heads, "R": regions, "F": 6, "k": content["topk_vals"].shape[-1]}
        sizes |= {"P": len(content["pooled_regions"]), "D": content["hidden_pooled"].shape[-1]}
        raw = {key: len(content[key]) for key in ("hidden_states", "attentions")}
        cost = RowCost(sizes, content["hidden_pooled"].element_size(), raw | {"gate_pooled": 0})
        assert rows * cost.bytes(length) == sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def test_the_data_format_page_has_the_table_of_fields():
    page = (Path(__file__).resolve().parents[1] / "docs" / "DATA_FORMAT.md").read_text(encoding="utf-8")
    assert f"<!-- fields -->\n{fields_table()}<!-- /fields -->" in page, "python docs/render_tables.py"


def test_topk_logits_of_the_last_token_are_not_padded():
    rows = [
        {"original_index": n, "input_ids": torch.ones(n + 1, dtype=torch.long), "topk_vals": torch.rand(1, 2)}
        for n in range(3)
    ]
    content = pack_rows(rows, {"topk_positions": "last"}, 7)
    assert content["topk_vals"].shape == (3, 1, 2)
    assert content["input_ids"].tolist() == [[7, 7, 1], [7, 1, 1], [1, 1, 1]]
