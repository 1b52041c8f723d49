"""causal_effects.py: R, hand-over, controls, halves and sets from files of planted patches; nothing from a null."""

from __future__ import annotations

from pathlib import Path

import causal_effects
import numpy as np
import pandas as pd
import pytest
import torch
from attention import causes
from command_line import UserError
from file_output import read_csv
from paired_stats import benjamini_hochberg, deal
from run_store import load_pt, open_run, save_pt
from scipy import stats
from style_rows import templates_of
from synthetic_run import prompt_rows, write_run

LAYERS, HEADS, ROWS = 6, 3, 40
RESIDUAL = {  # planted R by layer
    "edited": [1.0, 0.9, 0.8, 0.5, 0.2, 0.1],
    "after": [0.0, 0.1, 0.2, 0.3, 0.2, 0.1],
    "readout": [0.0, 0.0, 0.0, 0.1, 0.6, 0.9],
}
CAUSE = (3, 1)  # the head that carries the effect


def planted_cells(with_sets: bool) -> list[tuple[str, str, str, int, int, str, float]]:
    """(site, positions, donor, layer, head, set, R) of each patch."""
    cells = [
        ("resid_pre", positions, donor, layer, -1, "", r if donor == "own" else -0.5 * r)
        for positions, curve in RESIDUAL.items()
        for layer, r in enumerate(curve)
        for donor in ("own", "other")
    ]
    cells += [
        ("z", "all", "own", layer, head, "", 0.6 if (layer, head) == CAUSE else 0.0)
        for layer in range(LAYERS)
        for head in range(HEADS)
    ]
    if with_sets:
        cells += [("z", "all", "own", -1, -1, f"attribution_top_{k}", r) for k, r in ((1, 0.5), (2, 0.8), (4, 0.9))]
        cells += [("z", "all", "own", -1, -1, f"attribution_top_2_random_{i}", 0.02 * i) for i in range(9)]
    return cells


def write_patches(
    folder: Path, noise: float = 0.05, seed: int = 0, files: int = 2, scale: float = 1.0, screened: bool = False
) -> Path:
    """A run of ROWS facts in pairs with patches_*.pt of `swap`; each R is `scale` times the planted one."""
    run_dir = write_run(folder, prompt_rows(ROWS, ["swap"], templates=ROWS // 2))
    run = open_run(run_dir)
    rng, cells = np.random.default_rng(seed), planted_cells(with_sets=True)
    before = rng.gamma(2.0, 0.3, ROWS) + 0.1
    r = scale * np.array([cell[-1] for cell in cells]) + rng.normal(0, noise, (ROWS, len(cells)))
    nats = torch.tensor(before[:, None] * (1 - r)).float()
    halves = deal(templates_of(run), 2)
    chosen_on = torch.tensor([halves[run.template(row)] == 0 for row in range(ROWS)])
    recipient = torch.tensor(before)[:, None].float().expand(nats.shape).contiguous()
    for part in np.array_split(np.arange(ROWS), files):
        content = {
            "original_indices": part.tolist(),
            "element_index": [int(row) + 1 for row in part],
            "style": "swap",
            "source": "split",
            "directions": ["denoising"],
            "sites": [cell[0] for cell in cells],
            "positions": [cell[1] for cell in cells],
            "cell_directions": ["denoising"] * len(cells),
            "donors": [cell[2] for cell in cells],
            "layers": torch.tensor([cell[3] for cell in cells]),
            "heads": torch.tensor([cell[4] for cell in cells]),
            "sets": [cell[5] for cell in cells],
            "choosing": chosen_on[part].tolist(),
            "attribution": {"z": torch.zeros(len(part), LAYERS, HEADS)} if screened else {},
        }
        worst = -4 - recipient[part]  # log probability of the answer without a patch
        answer = worst + (-1 - worst) * (1 - nats[part] / recipient[part])
        content |= {
            "nats": nats[part],
            "nats_first": nats[part],
            "sld": -nats[part],
            "restored": (nats[part] < 0.05).float(),
        }
        content |= {"answer_logprob": answer, "donor_answer_logprob": torch.full_like(answer, -1.0)}
        content |= {"recipient_nats": recipient[part], "recipient_nats_first": recipient[part]}
        content |= {"recipient_sld": -recipient[part], "donor_sld": torch.zeros_like(answer)}
        content |= {"recipient_restored": torch.zeros_like(answer)}
        content |= {"recipient_answer_logprob": worst}
        save_pt(run_dir / "swap" / f"patches_{part[0]:05d}_{part[-1] + 1:05d}.pt", content)
    return run_dir


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("causes")
    run = write_patches(folder / "run")
    reactions = pd.DataFrame(
        [
            ("swap", "m", layer, head, 9.0 * (layer + head == 4) + layer)
            for layer in range(LAYERS)
            for head in range(HEADS)
        ],
        columns=["style", "measure", "layer", "head", "t_vs_control"],
    )
    reactions.to_csv(folder / "head_sensitivity.csv", index=False)
    assert causal_effects.main(["--run_dir", str(run), "--results_dir", str(folder)]) == 0
    return folder


def test_planted_curves_come_back_with_their_controls(results: Path):
    table = read_csv(results / "patching_layers.csv")
    own = table[table["donor"] == "own"].set_index(["positions", "layer"])
    for positions, curve in RESIDUAL.items():
        for layer, r in enumerate(curve):
            line = own.loc[(positions, layer)]
            assert line["R"] == pytest.approx(r, abs=0.05)
            assert line["R_ci_low"] < line["R"] < line["R_ci_high"]
            assert line["R_sld"] == line["R_first_token"] == pytest.approx(line["R"], abs=1e-5)
            assert line["R_control"] == pytest.approx(-0.5 * r, abs=0.05)
            assert line["answer_share"] == pytest.approx(r, abs=0.05)
    assert own.loc[("edited", 2), "p_adjusted_vs_control"] < 1e-6
    assert (own["n"] == ROWS).all()
    assert (own["n_clusters"] == ROWS // 2).all()


def test_the_ratio_is_that_of_sums_not_a_mean_of_ratios(results: Path):
    items = read_csv(results / "patching_items.csv")
    table = read_csv(results / "patching_layers.csv")
    line = table[(table["donor"] == "own") & (table["positions"] == "edited") & (table["layer"] == 3)].iloc[0]
    assert line["R"] == pytest.approx(line["nats_restored"] / items["recipient_nats"].mean())


def test_the_hand_over_lies_where_the_curves_cross(results: Path):
    layer = read_csv(results / "patching_layers.csv")
    # The gap is 0.1 at layer 3 and -0.6 at layer 4.
    expected = 3 + 0.1 / 0.7
    line = layer[["hand_over_layer", "hand_over_ci_low", "hand_over_ci_high"]].iloc[0]
    assert line["hand_over_layer"] == pytest.approx(expected, abs=0.1)
    assert line["hand_over_ci_low"] < expected < line["hand_over_ci_high"]
    assert line["hand_over_ci_high"] - line["hand_over_ci_low"] < 0.5


def test_the_head_that_carries_the_effect_is_first_in_both_halves(results: Path):
    heads = read_csv(results / "patching_heads.csv").sort_values("R", ascending=False)
    first = heads.iloc[0]
    assert (first["layer"], first["head"]) == CAUSE
    assert first[["R", "R_first_half", "R_second_half"]].to_numpy(dtype=float) == pytest.approx([0.6] * 3, abs=0.05)
    assert first["p_adjusted"] < 1e-6
    assert (heads["p_adjusted"].iloc[1:] < 0.05).sum() <= 1


def test_screened_units_are_estimated_on_the_half_that_did_not_choose_them(tmp_path: Path):
    run = write_patches(tmp_path / "run", screened=True)
    assert causal_effects.main(["--run_dir", str(run), "--results_dir", str(tmp_path)]) == 0
    heads, layers = (read_csv(tmp_path / f"patching_{name}.csv") for name in ("heads", "layers"))
    assert (set(heads["n"]), set(layers["n"])) == ({ROWS / 2}, {ROWS})
    assert heads["R_first_half"].isna().all()
    assert (read_csv(tmp_path / "patching_items.csv")["recipient_nats"].notna()).all()
    assert heads["R"].tolist() == pytest.approx(heads["R_second_half"].tolist())
    sets = read_csv(tmp_path / "patching_sets.csv").set_index("set")
    line = sets.loc["attribution_top_2"]
    assert line["n"] == ROWS / 2
    assert line["R"] == pytest.approx(0.8, abs=0.05)
    assert (line["random_sets"], line["units"]) == (9, 2)
    assert line["R_random"] == pytest.approx(0.08, abs=0.03)
    assert line["R_random_max"] == pytest.approx(0.16, abs=0.04)
    assert line["p_vs_random"] < 1e-3
    curve = read_csv(tmp_path / "patching_faithfulness.csv").iloc[0]
    shares, r = (
        np.array([0, 0.25, 0.5, 1]),
        np.array([0.0, *sets.loc[[f"attribution_top_{k}" for k in (1, 2, 4)], "R"]]),
    )
    assert curve["CPR"] == pytest.approx(np.trapezoid(r, shares))
    assert curve["monotone"]


def test_reaction_and_cause_are_correlated_over_heads(results: Path):
    line = read_csv(results / "patching_reactions.csv").iloc[0]
    heads = read_csv(results / "patching_heads.csv")
    reaction = 9.0 * (heads["layer"] + heads["head"] == 4) + heads["layer"]
    assert line["spearman"] == pytest.approx(stats.spearmanr(heads["R"].abs(), reaction)[0])


def test_neurons_and_sources_are_kept_apart_from_heads(tmp_path: Path):
    """Neuron (1, 0) is no head (1, 0), and p of the heads does not depend on what else was patched."""
    run = write_patches(tmp_path / "run")
    alone = causes.cell_table(causes.open_patches(open_run(run))[0]).query("head >= 0")
    for path in sorted((run / "swap").glob("patches_*.pt")):
        content = load_pt(path, mmap=False)
        sites = ["mlp_post" if site == "z" else site for site in content["sites"]]
        save_pt(path.with_name(f"patches_neurons_{path.name[8:]}"), content | {"sites": sites})
        save_pt(path.with_name(f"patches_normal_{path.name[8:]}"), content | {"source": "normal"})
    both = causes.open_patches(open_run(run))
    assert [one.source for one in both] == ["split", "normal"]
    cells = pd.concat(map(causes.cell_table, both)).query("head >= 0")
    assert cells[(cells["source"] == "split") & (cells["site"] == "z")]["p_adjusted"].tolist() == pytest.approx(
        alone["p_adjusted"].tolist()
    )
    reactions = alone[["layer", "head"]].assign(style="swap", measure="m", t_vs_control=np.arange(len(alone)))
    table = causes.reaction_and_cause(cells, reactions)
    assert table[["source", "site", "heads"]].to_numpy().tolist() == [[s, "z", 18] for s in ("split", "normal")]


def test_p_of_single_heads_is_adjusted_over_the_heads_alone(results: Path):
    heads = read_csv(results / "patching_heads.csv")
    assert heads["p_adjusted"].tolist() == pytest.approx(benjamini_hochberg(heads["p"]).tolist(), rel=1e-4)


def test_a_null_names_no_head(tmp_path: Path):
    named = 0
    for seed in range(8):
        folder = tmp_path / str(seed)
        run = write_patches(folder / "run", noise=0.3, seed=seed, scale=0.0)
        assert causal_effects.main(["--run_dir", str(run), "--results_dir", str(folder)]) == 0
        named += bool((read_csv(folder / "patching_heads.csv")["p_adjusted"] < 0.05).any())
    assert named <= 2  # binomial(8, 0.05) is above 2 in 0.6 % of cases


def test_a_run_without_patches_is_told_what_to_do(tmp_path: Path):
    run = write_run(tmp_path / "run", prompt_rows(6, ["swap"]))
    with pytest.raises(UserError, match=r"has no patches_\*\.pt; run stage 2's patch_activations\.py"):
        causal_effects.main(["--run_dir", str(run)])
