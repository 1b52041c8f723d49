"""Layers with a sliding window: uniform shares, densities and entropies against plain loops over what a query sees."""

from __future__ import annotations

import json
from pathlib import Path

import attn_act_logi
import dirs_eval
import numpy as np
import pandas as pd
import pytest
import tiny_models
from attention.attention_fields import QUERIES, REGIONS, attention_fields, map_entropy, uniform_mass
from attention.heads import MEASURES, head_values
from attention.region_fractions import CELLS, fraction_cells
from command_line import UserError
from run_store import load_pt, save_pt

WINDOW = 8
ALL_LEVELS = ["--levels", "model", "layer", "head"]
PROMPTS = [
    {"normal": "Calculate the sum of these numbers: 7 + 5 =", "swap": "Calculate teh sum of these numbers: 7 + 5 ="},
    {"normal": "Find how many there are in all: 3 + 4 + 8 =", "swap": "Find how many there rae in all: 3 + 4 + 8 ="},
    {"normal": "Sum: 1 + 1 =", "swap": "Smu: 1 + 1 ="},
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("windows")
    model = tiny_models.save(folder / "model", "gemma2")
    (folder / "prompts.json").write_text(json.dumps(PROMPTS))
    command = ["--model_name", model, "--prompt_file", str(folder / "prompts.json"), "--prompt_keys", "all"]
    command += [
        "--output_dir",
        str(folder / "run"),
        "--max_new_tokens",
        "2",
        "--entropy",
        "--raw_layers",
        "0",
        "1",
        "2",
    ]
    assert attn_act_logi.main(command) == 0
    return folder / "run"


def contents(run: Path) -> list[dict]:
    return [load_pt(path) for path in sorted((run / "swap").glob("*.pt"))]


def test_stage_2_stores_the_windows(run: Path) -> None:
    for content in contents(run):
        assert sorted(content["attention_windows"]) in ([0, WINDOW, WINDOW], [0, 0, WINDOW])
        assert content["attention_mask"].sum(1).max() > 2 * WINDOW


def test_uniform_shares_are_those_of_the_tokens_in_the_window(run: Path) -> None:
    for content in contents(run):
        fields = attention_fields(content, Path("a.pt"), "edited")
        for row, real in enumerate(content["attention_mask"]):
            mask = content["region_mask"][row][real].numpy()
            count = len(mask)
            for layer, window in enumerate(content["attention_windows"]):
                even = np.zeros((count, count))
                for query in range(count):
                    seen = slice(max(0, query + 1 - (window or count)), query + 1)
                    even[query, seen] = 1 / (seen.stop - seen.start)
                for column, name in enumerate(REGIONS):
                    share = even[:, mask[:, content["regions"].index(name)]].sum(1)
                    found = fields["uniform"][row, layer, :, column]
                    np.testing.assert_allclose(found, [share[-1], share.mean()], atol=1e-12)
                assert QUERIES == ("last", "mean")


def test_stored_fields_equal_those_of_the_raw_maps(run: Path) -> None:
    for content in contents(run):
        stored = attention_fields(content, Path("a.pt"), "edited")
        raw = {key: value for key, value in content.items() if key not in ("span_mass", "attention_entropy")}
        summed = attention_fields(raw, Path("a.pt"), "edited")
        for name in ("mass", "entropy", "uniform", "tokens", "holds_first"):
            np.testing.assert_allclose(stored[name], summed[name], atol=2e-3, err_msg=name)
        np.testing.assert_array_equal(np.isnan(stored["entropy"]), np.isnan(summed["entropy"]))


def test_even_attention_in_a_window_has_density_and_entropy_one(run: Path) -> None:
    for content in contents(run):
        real = content["attention_mask"]
        place = np.arange(real.shape[1])
        for layer, window in enumerate(content["attention_windows"]):
            seen = (real[:, None, :] & real[:, :, None]).numpy().copy()
            back = place[:, None] - place
            seen &= (back >= 0) & (back < (window or len(place)))
            even = content["attentions"][f"layer_{layer}"] = content["attentions"][f"layer_{layer}"].clone()
            even.numpy()[:] = (seen / np.maximum(seen.sum(-1, keepdims=True), 1))[:, None]
        del content["span_mass"]
        fields = attention_fields(content, Path("a.pt"), "edited")
        np.testing.assert_allclose(fields["entropy"], 1, atol=1e-5)
        cells = fraction_cells(fields)
        density = cells[..., [cell[3] == "density" for cell in CELLS]]
        assert np.isfinite(density).any()
        np.testing.assert_allclose(density[np.isfinite(density)], 1, atol=1e-4)
        column = [*MEASURES].index("edited_density_last")
        of_heads = head_values(fields)[..., column]
        np.testing.assert_allclose(of_heads[~np.isnan(of_heads)], 1, atol=1e-4)


def test_the_table_has_each_layer_s_own_uniform_share(run: Path, tmp_path: Path) -> None:
    assert dirs_eval.main(["--run_dir", str(run), "--results_dir", str(tmp_path)]) == 0
    per_layer = pd.read_csv(tmp_path / "prompt_task_fraction_perlayer.csv").set_index(["style", "layer"])
    fields = [attention_fields(content, Path("a.pt"), "edited") for content in contents(run)]
    expected = np.concatenate([one["uniform"] for one in fields])[:, :, QUERIES.index("last"), REGIONS.index("task")]
    np.testing.assert_allclose(per_layer.loc["swap", "frac_task_uniform_share"], expected.mean(0), atol=1e-9)
    assert expected.mean(0).max() > expected.mean(0).min() + 0.1
    per_head = pd.read_csv(tmp_path / "prompt_task_fraction_perhead.csv").set_index(["style", "layer", "head"])
    assert per_head.loc[("swap", 1, 3), "frac_task_uniform_share"] == pytest.approx(expected.mean(0)[1])
    model = pd.read_csv(tmp_path / "prompt_task_fraction_aggregate.csv").set_index("style")
    assert model.loc["swap", "frac_task_uniform_share"] == pytest.approx(expected.mean())


@pytest.mark.parametrize("windows", [[0, 8], ["0", "8", "0"], [True, False, True], 8, None, [0.0, 8.0, 0.0]])
def test_damaged_windows_are_refused_in_one_line(run: Path, tmp_path: Path, windows: object) -> None:
    content = contents(run)[0] | {"attention_windows": windows}
    save_pt(tmp_path / "activations_00000_00003.pt", content)
    with pytest.raises(UserError, match="attention_windows"):
        load_pt(tmp_path / "activations_00000_00003.pt")


def test_a_word_out_of_reach_has_no_mass_that_could_change(run: Path) -> None:
    fields = attention_fields(contents(run)[0], Path("a.pt"), "edited", without_first=True)
    values = head_values(fields)
    kept = attention_fields(contents(run)[0], Path("a.pt"), "edited")
    out_of_reach = kept["uniform"][:, :, QUERIES.index("last"), REGIONS.index("edited")] == 0
    assert out_of_reach.any()
    assert not out_of_reach.all()
    for name in ("edited_mass_last", "edited_log2_mass_last", "edited_density_last"):
        missing = np.isnan(values[..., [*MEASURES].index(name)]).all(axis=2)
        np.testing.assert_array_equal(missing, out_of_reach | (fields["holds_first"][:, None, 3] > 0))
    assert not np.isnan(values[..., [*MEASURES].index("edited_mass_mean")][0]).any()


def test_a_layer_of_unknown_windows_has_no_density_nor_has_the_model(run: Path, tmp_path: Path) -> None:
    for path in run.glob("*/*.pt"):
        target = tmp_path / "run" / path.parent.name / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        save_pt(target, load_pt(path) | {"attention_windows": [0, -1, 0]})
    assert dirs_eval.main(["--run_dir", str(tmp_path / "run"), "--results_dir", str(tmp_path), *ALL_LEVELS]) == 0
    table = pd.read_csv(tmp_path / "attention_fractions.csv").query("region == 'task'")
    assert set(table[table["measure"] == "fraction"]["level"]) == {"head", "layer", "model"}
    density = table[table["measure"] == "density"]
    assert set(density["level"]) == {"head", "layer"}
    assert set(density["layer"]) == {0, 2}
    shown = pd.read_csv(tmp_path / "prompt_task_fraction_aggregate.csv")
    assert shown["frac_task"].notna().all()
    assert shown[["frac_task_uniform_share", "frac_task_density"]].isna().all(axis=None)


def test_an_unknown_window_gives_no_uniform_share() -> None:
    keys, real = np.ones((1, 4, 5), dtype=bool), np.ones((1, 4), dtype=bool)
    assert np.isnan(uniform_mass(keys, real, -1)).all()
    assert np.isnan(map_entropy(np.full((1, 2, 4, 4), 0.25), real, real, -1)).all()
