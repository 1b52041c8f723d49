"""Null data for causes: if donor and control are both another item's, every p value is as likely as another."""

from __future__ import annotations

import itertools
import json
from contextlib import closing
from pathlib import Path

import attn_act_logi
import numpy as np
import patch_activations
import pytest
import tiny_models
from attention import causes
from capture.job import end_tokens
from capture.patch_job import Study, open_reader, plan_style
from capture.patch_measures import measures
from capture.patching import Patch, Patcher
from load_model import load_model, load_tokenizer
from run_store import open_run

ROOT = Path(__file__).parents[1]
DRAWS = 2000
TYPOS = {"calculate": "claculate", "total": "toatl", "market": "makret", "numbers": "nubmers"}


def nats_of_others(run_dir: Path, model_name: str, rows: int, layers: list[int]) -> tuple[np.ndarray, np.ndarray, list]:
    """(nats [n, n, K] of row i with states of row j's control, for K cells; the recipients' [n]; templates)."""
    words = ["--run_dir", str(run_dir), "--styles", "swap", "--model_name", model_name, "--max_samples", str(rows)]
    args = patch_activations.parse_args([*words, "--sites", "resid_pre", "z", "--response_tokens", "4"])
    run = open_run(run_dir)
    _, reader = open_reader(args, run)
    args.layers = layers
    plan = plan_style(args, run, reader, "swap")
    model, _ = load_model(model_name, "float32", None, None, False)
    with closing(Patcher(model)) as patcher:
        study = Study(args, patcher, reader, end_tokens(model, load_tokenizer(model_name)))
        cells = [("resid_pre", layer, "edited", None) for layer in layers]
        cells += [("z", layer, "edited", (head,)) for layer, head in itertools.product(layers, (0, 1, 2))]
        indices = [*plan.rows]
        found = np.full((len(indices), len(indices), len(cells)), np.nan)
        before = np.zeros(len(indices))
        for i, index in enumerate(indices):
            pair, _ = study.pair(plan, index, "denoising")
            others = [j for j in range(len(indices)) if j != i]
            patcher.stored = {f"item{j}": study.other_item(plan, indices[j], "denoising", pair) for j in others}
            places = [*itertools.product(others, range(len(cells)))]
            patches = [(Patch(*cells[k], donor=f"item{j}"),) for j, k in places]
            for where, logits, _ in patcher.run(pair, patches, 32):
                nats = measures(logits, logits[0], logits[1], pair.response)["nats"]
                before[i] = nats[1]
                for place, value in zip(where, nats[2:].tolist(), strict=True):
                    found[i, places[place][0], places[place][1]] = value
    return found, before, [run.template(index) for index in indices]


def null_p_values(nats: np.ndarray, before: np.ndarray, templates: list[str], draws: int) -> np.ndarray:
    """[draws, K] p_vs_control of runs whose donor and control are two other rows drawn for each row."""
    rng, rows, count = np.random.default_rng(0), np.arange(len(nats)), nats.shape[2]
    cells = causes.pd.DataFrame({"site": "z", "positions": "all", "direction": "denoising", "layer": 0, "set": ""},
                                index=range(2 * count)).assign(head=[*range(count)] * 2)  # fmt: skip
    cells["donor"] = ["own"] * count + ["other"] * count
    recipient = np.repeat(before[:, None], 2 * count, axis=1)
    sides = dict.fromkeys(causes.MEASURES, recipient)
    found = []
    for _ in range(draws):
        two = np.array([rng.choice(rows[rows != i], 2, replace=False) for i in rows])
        patched = np.concatenate([nats[rows, two[:, 0]], nats[rows, two[:, 1]]], axis=1)
        table = causes.pd.DataFrame(index=range(2 * count), columns=["R"], dtype=float)
        patches = causes.Patches(
            "swap", "split", rows.tolist(), np.array(templates), rows < 0, cells[causes.CELL],
            sides | {"nats": patched}, sides, sides, np.ones(patched.shape, dtype=bool), {}, "denoising")  # fmt: skip
        causes._add_control(table, patches, "other", "control")
        found.append(table["p_vs_control"].to_numpy()[:count])
    return np.array(found)


def is_uniform(p: np.ndarray) -> bool:
    """Whether p [draws, cells] is below .05, .2, .5 and .8 about as often as it should be."""
    shares = {limit: float((p < limit).mean()) for limit in (0.05, 0.2, 0.5, 0.8)}
    print({limit: round(share, 3) for limit, share in shares.items()})
    return all(abs(share - limit) < (0.02 if limit == 0.05 else 0.05) for limit, share in shares.items())


def test_p_against_the_control_is_uniform_if_the_donor_is_another_items(tmp_path):
    model = tiny_models.save(tmp_path / "model")
    rows = [
        {"normal": f"Please look at the {word} now: {i} + 5 =", "swap": f"Please look at the {typo} now: {i} + 5 ="}
        for i, (word, typo) in itertools.product(range(4, 9), TYPOS.items())
    ]
    (tmp_path / "p.json").write_text(json.dumps(rows), encoding="utf-8")
    words = ["--model_name", model, "--prompt_file", str(tmp_path / "p.json"), "--output_dir", str(tmp_path / "run")]
    assert attn_act_logi.main([*words, "--prompt_keys", "all", "--max_new_tokens", "2", "--raw_layers", "none"]) == 0
    nats, before, _ = nats_of_others(tmp_path / "run", model, len(rows), [0, 1])
    assert len(before) == len(rows)
    p = null_p_values(nats, before, [str(i) for i in range(len(rows))], DRAWS // 4)
    assert np.isfinite(p).all()
    assert is_uniform(p)


@pytest.mark.stress
def test_p_against_the_control_is_uniform_on_real_facts(tmp_path):
    model = str(ROOT / "models" / "SmolLM2-135M-Instruct")
    words = ["--model_name", model, "--prompt_file", str(ROOT / "0_data" / "facts.json"), "--raw_layers", "none"]
    words += ["--few_shot_file", str(ROOT / "0_data" / "few_shot_facts.txt"), "--output_dir", str(tmp_path / "run")]
    assert attn_act_logi.main([*words, "--prompt_keys", "normal", "swap", "--max_samples", "40"]) == 0
    nats, before, templates = nats_of_others(tmp_path / "run", model, 40, [6, 18, 24])
    p = null_p_values(nats, before, templates, DRAWS)
    for cell in range(p.shape[1]):
        print(cell, np.round([(p[:, cell] < limit).mean() for limit in (0.05, 0.2, 0.5, 0.8)], 3))
    assert is_uniform(p)
