"""Stages 2 and 5 on one tiny model: the head that carries the edited word is found, one that only reacts is not."""

from __future__ import annotations

import itertools
import json

import attn_act_logi
import causal_effects
import head_sensitivity
import patch_activations
import pytest
import tiny_models
import torch
from file_output import read_csv

CARRIER = (1, 2)  # layer and head
SILENT = 2  # a layer whose heads see the edit, but write nothing
TYPOS = {"calculate": "claculate", "total": "toatl", "market": "makret", "numbers": "nubmers"}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Results of a run whose model moves information between tokens by one head alone."""
    folder = tmp_path_factory.mktemp("planted")
    model = tiny_models.model("llama")
    with torch.no_grad():
        for i, layer in enumerate(model.model.layers):
            kept = torch.zeros(32, dtype=torch.bool)
            kept[8 * CARRIER[1] : 8 * CARRIER[1] + 8] = i == CARRIER[0]
            layer.self_attn.o_proj.weight[:, ~kept] = 0
            layer.self_attn.o_proj.weight *= 2
    model.save_pretrained(folder / "model")
    tiny_models.tokenizer().save_pretrained(folder / "model")
    rows = [
        {"normal": f"Please look at the {word} now: {i} + 5 =", "swap": f"Please look at the {typo} now: {i} + 5 ="}
        for i, (word, typo) in itertools.product(range(4, 10), TYPOS.items())
    ]
    (folder / "p.json").write_text(json.dumps(rows), encoding="utf-8")
    run, words = str(folder / "run"), ["--model_name", str(folder / "model")]
    command = ["--prompt_file", str(folder / "p.json"), "--output_dir", run, "--raw_layers", "none", "--entropy"]
    command += ["--prompt_keys", "normal", "swap", "split@swap", "--max_new_tokens", "2"]
    assert attn_act_logi.main([*words, *command]) == 0
    of_run = ["--run_dir", run, "--results_dir", str(folder)]
    assert head_sensitivity.main(of_run) == 0
    flags = ["--run_dir", run, "--styles", "swap", *words, "--sites", "resid_pre", "z", "--controls", "none"]
    for part in (["--max_samples", "24"], ["--screen", "attribution", "--top_k", "12", "--overwrite"]):
        assert patch_activations.main([*flags, *part]) == 0
        assert causal_effects.main(of_run) == 0
        for table in ("heads", "layers"):
            (folder / f"patching_{table}.csv").rename(folder / f"{part[0]}_{table}.csv")
    return folder


@pytest.mark.parametrize("how", ["--max_samples", "--screen"])
def test_the_head_that_carries_the_edit_is_first_exactly_and_by_attribution(results, how):
    heads = read_csv(results / f"{how}_heads.csv").set_index(["layer", "head"])
    assert len(heads) == 12
    assert heads.loc[CARRIER, "R"] == pytest.approx(1, abs=0.01)
    assert (heads.drop(index=CARRIER)["R"].abs() < 0.01).all()
    if how == "--screen":
        assert heads["nats_attributed"].abs().idxmax() == CARRIER
        assert (heads.drop(index=CARRIER)["nats_attributed"].abs() < 1e-4).all()
    layers = read_csv(results / f"{how}_layers.csv").set_index(["positions", "layer"])["R"]
    assert layers["edited", CARRIER[0]] == pytest.approx(1, abs=0.01)
    assert layers["readout", CARRIER[0]] == pytest.approx(0, abs=0.01)
    assert layers["edited", CARRIER[0] + 1] == pytest.approx(0, abs=0.01)
    assert layers["readout", CARRIER[0] + 1] == pytest.approx(1, abs=0.01)


def test_heads_that_react_but_are_not_read_are_found_by_sensitivity_alone(results):
    reactions = read_csv(results / "head_sensitivity.csv").query("style == 'swap'")
    clear = reactions[reactions["p_adjusted_vs_control"] < 0.05].groupby(["layer", "head"])["t_vs_control"].size()
    silent = [head for layer, head in clear.index if layer == SILENT]
    assert silent, "no head of the silent layer reacts: the test plants nothing"
    heads = read_csv(results / "--max_samples_heads.csv").set_index(["layer", "head"])
    for head in silent:
        assert heads.loc[(SILENT, head), "R"] == pytest.approx(0, abs=1e-3)
        assert not heads.loc[(SILENT, head), "p_adjusted"] < 0.05
    named = heads.index[heads["p_adjusted"] < 0.05].tolist()
    assert named == [CARRIER]
