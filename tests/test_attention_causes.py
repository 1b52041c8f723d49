"""causal_effects.py: R, hand-over, controls, halves and sets from files of planted patches; nothing from a null."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import causal_effects
import numpy as np
import pandas as pd
import pytest
import torch
from attention import causes
from attention.causes_compared import agreement, neuron_reactions, rank_correlation, reaction_and_cause
from attention.causes_plots import _label
from command_line import UserError, run_main
from file_output import read_csv
from paired_stats import benjamini_hochberg, deal, holm
from run_store import load_pt, open_run, save_pt
from scipy import stats
from style_rows import templates_of
from synthetic_run import prompt_rows, with_controls, write_run

LAYERS, HEADS, ROWS = 6, 3, 40
RESIDUAL = {  # planted R by layer
    "edited": [1.0, 0.9, 0.8, 0.5, 0.2, 0.1],
    "after": [0.0, 0.1, 0.2, 0.3, 0.2, 0.1],
    "readout": [0.0, 0.0, 0.0, 0.1, 0.6, 0.9],
}
TOKENS = [("$a", True), *[("$ b", False)] * 10]  # text of token_0, token_1 …, and whether it is edited
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
        cells += [("z", "all", "own", -1, -1, f"attribution_top_{k}", r) for k, r in ((4, 0.9), (1, 0.5), (2, 0.8))]
        cells += [("z", "all", "own", -1, -1, f"attribution_top_2_random_{i}", 0.02 * i) for i in range(9)]
        cells.append(("z", "all", "own", -1, -1, "all z", 0.9))
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
    nats = torch.tensor(before[:, None] * abs(1 - r)).float()  # a divergence is never negative
    halves = deal(templates_of(run), 2)
    chosen_on = torch.tensor([halves[run.template(row)] == 0 for row in range(ROWS)])
    recipient = torch.tensor(before)[:, None].float().expand(nats.shape).contiguous()
    estimated = torch.tensor(rng.normal(0, 0.1, (ROWS, LAYERS, HEADS))).float()
    estimated[:, *CAUSE] += recipient[:, 0]
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
            "attribution": {"z": estimated[part]} if screened else {},
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
    best = heads.set_index(["layer", "head"]).loc[CAUSE]
    assert best[["R", "R_first_half", "R_second_half"]].to_numpy(dtype=float) == pytest.approx([0.6] * 3, abs=0.05)
    assert best["R"] != best["R_first_half"]  # that of the rows that chose, beside the estimate on the others
    assert (read_csv(tmp_path / "patching_items.csv")["recipient_nats"].notna()).all()
    assert heads["R"].tolist() == pytest.approx(heads["R_second_half"].tolist())
    sets = read_csv(tmp_path / "patching_sets.csv").set_index("set")
    assert sets.loc["all z", "n"] == ROWS
    assert sets["units"].dropna().is_monotonic_increasing
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
    assert curve["CMD"] == pytest.approx(np.trapezoid(np.abs(1 - r), shares))
    assert curve["monotone"]
    others = [load_pt(path) for path in sorted((run / "swap").glob("patches_*.pt"))]
    estimates = np.concatenate([one["attribution"]["z"][[not chose for chose in one["choosing"]]] for one in others])
    told = heads.set_index(["layer", "head"])["nats_attributed"].sort_index()
    assert told.tolist() == pytest.approx(estimates.mean(0).ravel().tolist(), rel=1e-4, abs=1e-6)
    screen = read_csv(tmp_path / "patching_agreement.csv").set_index("compared").loc["screen"]
    restored = heads.set_index(["layer", "head"])["nats_restored"].sort_index()
    assert screen["spearman"] == pytest.approx(stats.spearmanr(told, restored)[0], abs=1e-4)
    assert screen["pearson"] == pytest.approx(np.corrcoef(told, restored)[0, 1], abs=1e-4)
    assert screen["pearson"] > 0.8


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
    reactions = alone[["layer", "head"]].assign(style="swap", measure="m", t_vs_control=np.arange(len(alone)), site="z")
    table = reaction_and_cause(cells, both, reactions)
    assert table[["source", "site", "units"]].to_numpy().tolist() == [[s, "z", 18] for s in ("split", "normal")]


def test_single_tokens_are_mapped_with_their_text_and_adjusted_together(tmp_path: Path):
    run = write_patches(tmp_path / "run")
    names = {"edited": "token_0", "after": "token_1", "readout": "token_10"}
    for path in sorted((run / "swap").glob("patches_*.pt")):
        content = load_pt(path, mmap=False)
        singly = [names.get(name, name) for name in content["positions"]]
        told = [TOKENS for _ in content["original_indices"]]
        short = torch.tensor([[name == "token_10" for name in singly]]) & (torch.arange(len(told)) < 12)[:, None]
        nats = content["nats"].masked_fill(short, torch.nan)
        save_pt(path, content | {"positions": singly, "tokens": told, "nats": nats})
    (one,) = causes.open_patches(open_run(run))
    assert one.tokens == dict.fromkeys(range(ROWS), TOKENS)
    table = causes.cell_table(one).query("site == 'resid_pre' and donor == 'own'")
    assert table.groupby("positions")["n"].max().to_dict() == {"token_0": 40, "token_1": 40, "token_10": 16}
    assert table["p_adjusted"].tolist() == pytest.approx(benjamini_hochberg(table["p"]).tolist())
    assert _label("token_0", TOKENS) == r"'\$a'* +0"
    assert [_label(name, ()) for name in ("token_10", "after")] == ["+10", "tokens after them"]
    (tmp_path / "patching_layers.png").touch()  # of groups that were patched before
    assert causal_effects.main(["--run_dir", str(run), "--results_dir", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.glob("*_[lm]a*.png")} == {"patching_map.png"}


def test_p_of_single_heads_is_adjusted_over_the_heads_alone(results: Path):
    heads = read_csv(results / "patching_heads.csv")
    assert heads["p_adjusted"].tolist() == pytest.approx(benjamini_hochberg(heads["p"]).tolist(), rel=1e-4)


def test_rank_correlations_have_the_published_interval():
    rng = np.random.default_rng(3)
    one, other = rng.normal(size=(2, 40))
    found = rank_correlation([*one, np.nan], [*other, 1.0])
    rho = np.corrcoef(stats.rankdata(one), stats.rankdata(other))[0, 1]
    error = np.sqrt((1 + rho**2 / 2) / (40 - 3))
    ends = np.tanh(np.arctanh(rho) - 1.96 * error), np.tanh(np.arctanh(rho) + 1.96 * error)
    assert (found["units"], found["spearman"]) == (40, pytest.approx(rho))
    assert (found["spearman_ci_low"], found["spearman_ci_high"]) == pytest.approx(ends)
    assert np.isnan(rank_correlation([1, 2, 3], [1, 2, 3])["spearman"])


def test_halves_that_share_their_heads_agree():
    rng = np.random.default_rng(4)
    effect = rng.normal(size=60)
    table = pd.DataFrame({"layer": np.arange(60) // 6, "head": np.arange(60) % 6, "R_first_half": effect})
    table = table.assign(style="swap", source="split", site="z", direction="denoising", donor="own")
    table["R_second_half"] = effect + rng.normal(0, 0.1, 60)
    table[["nats_attributed", "nats_restored"]] = np.nan
    line = agreement(table).iloc[0]
    assert (line["compared"], line["units"]) == ("halves", 60)
    assert line["spearman"] > 0.95
    assert line["top_share"] == 1.0
    shuffled = table.assign(R_second_half=rng.permutation(effect))
    assert abs(agreement(shuffled).iloc[0]["spearman"]) < 0.35


@pytest.mark.parametrize("field", ["mlp_pooled", "gate_pooled"])
def test_the_reaction_of_a_neuron_is_its_paired_t_over_templates(tmp_path: Path, field: str):
    rows = with_controls(prompt_rows(12, ["swap"], templates=12), "swap", lambda i, word, typo: word)
    change = lambda row, *_: row.update(gate_pooled=row["mlp_pooled"] ** 2)  # noqa: E731
    run = open_run(write_run(tmp_path / "run", rows, layers=2, neurons=5, raw_layers=(), change=change))
    patches = planted_patches(np.random.default_rng(0), 12)
    table = pd.concat(list(neuron_reactions(run, patches)))
    table = table[table["measure"] == {"mlp_pooled": "mlp_post edited", "gate_pooled": "act_fn edited"}[field]]
    of = {}
    for style in ("swap", "split@swap"):
        contents = [load_pt(path) for path in sorted((run.path / style).glob("activations_*.pt"))]
        place = contents[0]["pooled_regions"].index("edited")
        of[style] = np.concatenate([one[field][:, :, place].float() for one in contents], axis=1)
    t = stats.ttest_1samp(of["swap"] - of["split@swap"], 0, axis=1).statistic
    found = table.pivot(index="layer", columns="head", values="t_vs_control").to_numpy()
    np.testing.assert_allclose(found, t, rtol=1e-3)


# --- what the statistics promise, from planted patches in memory


def planted_patches(
    rng: np.random.Generator, rows: int, heads: int = 30, effect: float = 0.0, population: np.ndarray | None = None
) -> causes.Patches:
    """Single heads with the same true R `effect`; two rows a template, which share a part of their noise.

    What there is to restore differs between rows as lognormal variates do, and a row's noise is in proportion to it.
    population: [clusters, 2, 1 + heads] (nats to restore, nats restored), templates of which are drawn.
    """
    clusters = rows // 2
    if population is None:
        population = planted_population(rng, clusters, heads, effect)
    drawn = population[rng.integers(len(population), size=clusters)] if len(population) > clusters else population
    before, gain = drawn.reshape(rows, -1)[:, :1], drawn.reshape(rows, -1)[:, 1:]
    cells = pd.DataFrame({"site": "z", "positions": "all", "direction": "denoising", "donor": "own", "set": ""},
                         index=range(heads)).assign(layer=0, head=range(heads))  # fmt: skip
    nats = np.broadcast_to(before, gain.shape)
    sides = dict.fromkeys(causes.MEASURES, nats)
    patched = dict.fromkeys(causes.MEASURES, nats - gain)
    labels = np.repeat(np.arange(clusters), 2)
    halves = np.isin(labels, labels[::4])
    counts = np.ones(gain.shape, dtype=bool)
    return causes.Patches("swap", "split", [*range(rows)], labels, halves, cells[causes.CELL], patched, sides, sides,
                          counts, {}, "denoising")  # fmt: skip


def planted_population(rng: np.random.Generator, clusters: int, heads: int, effect: float) -> np.ndarray:
    before = rng.lognormal(-1.5, 1.0, (clusters, 2, 1))
    shared, own = rng.normal(0, 0.15, (clusters, 1, heads)), rng.standard_t(5, (clusters, 2, heads)) * 0.15
    return np.concatenate([before, before * (effect + shared + own)], axis=2)


def named_under_a_null(runs: int, rows: int) -> int:
    """Runs of `runs` without any effect that name a head."""
    tables = (causes.cell_table(planted_patches(np.random.default_rng(seed), rows)) for seed in range(runs))
    return sum(bool((table["p_adjusted"] < 0.05).any()) for table in tables)


def covered(runs: int, rows: int) -> float:
    """Share of 95 % intervals of R, in samples of `rows` rows of a large run, that hold the large run's R."""
    large = planted_population(np.random.default_rng(99), 4000, 30, 0.3)
    truth = large[..., 1:].sum((0, 1)) / large[..., 0].sum()
    held = []
    for seed in range(runs):
        table = causes.cell_table(planted_patches(np.random.default_rng(seed), rows, population=large))
        held.append((table["R_ci_low"] <= truth) & (truth <= table["R_ci_high"]))
    return float(np.mean(held))


def test_p_is_corrected_for_the_styles_that_are_patched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = open_run(write_patches(tmp_path / "run"))
    (one,) = causes.open_patches(run)
    weaker = replace(one, style="three", patched=one.patched | {"nats": one.recipient["nats"] * 0.999})
    monkeypatch.setattr(causes, "open_patches", lambda *_: [one, weaker])
    causes.write_causes(run, None, tmp_path)
    keys = ["layer", "head", "site", "donor"]
    found = read_csv(tmp_path / "patching_heads.csv").set_index(["style", *keys])["p_adjusted"]
    tables = [causes.cell_table(patches) for patches in (one, weaker)]
    pairs = [table[table["head"] >= 0].set_index(keys)["p_adjusted"] for table in tables]
    assert len(found) > 2 * LAYERS
    for style, *place in found.index:
        expected = holm([pair[tuple(place)] for pair in pairs])[int(style == "three")]
        assert found[(style, *place)] == pytest.approx(expected, rel=1e-4)
    assert (found["swap"] >= pairs[0].reindex(found["swap"].index) * 0.999).all()


def test_sets_that_no_row_estimates_are_no_picture(tmp_path: Path):
    run = write_patches(tmp_path / "run", screened=True)
    for path in (run / "swap").glob("patches_*.pt"):
        content = torch.load(path, weights_only=True)
        save_pt(path, content | {"choosing": [True] * len(content["choosing"])})
    assert causal_effects.main(["--run_dir", str(run), "--results_dir", str(tmp_path)]) == 0
    assert not (tmp_path / "patching_sets.png").exists()
    assert read_csv(tmp_path / "patching_layers.csv")["R"].notna().any()


def test_a_null_names_no_head():
    assert named_under_a_null(40, 48) <= 6  # binomial(40, 0.05) is above 6 in 0.3 % of cases


def test_intervals_hold_the_true_share():
    assert 0.91 <= covered(60, 96) <= 0.985


@pytest.mark.stress
def test_a_null_names_a_head_in_at_most_one_run_of_twenty():
    for rows in (24, 48, 96):
        named = named_under_a_null(400, rows)
        print(f"{rows} rows: {named} of 400 runs name a head")
        assert named <= 20


@pytest.mark.stress
def test_intervals_hold_the_true_share_as_often_as_they_say():
    shares = {rows: covered(400, rows) for rows in (48, 96, 200, 400)}
    print(shares)
    assert all(0.93 <= shares[rows] <= 0.97 for rows in (200, 400)), shares


def test_a_run_without_patches_is_told_what_to_do(tmp_path: Path):
    run = write_run(tmp_path / "run", prompt_rows(6, ["swap"]))
    with pytest.raises(UserError, match=r"has no patches_\*\.pt; run stage 2's patch_activations\.py"):
        causal_effects.main(["--run_dir", str(run)])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--styles", "nope"], "has no style 'nope'"),
        (["--styles", "swap", "normal"], "--styles normal: has no patches"),
        (["--run_dir", "nowhere"], "no such run folder"),
        (["--results_dir", "a_file"], "a_file"),
    ],
)
def test_what_cannot_be_studied_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
):
    monkeypatch.chdir(tmp_path)
    Path("a_file").write_text("", encoding="utf-8")
    run = write_patches(tmp_path / "run")
    monkeypatch.setattr("sys.argv", ["causal_effects.py", "--run_dir", str(run), *flags])
    with pytest.raises(SystemExit) as stopped:
        run_main(causal_effects.main)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line


@pytest.mark.parametrize("damage", [b"", b"no file of torch"])
def test_a_damaged_file_of_patches_is_told_in_one_line(tmp_path: Path, damage: bytes):
    run = write_patches(tmp_path / "run")
    path = sorted((run / "swap").glob("patches_*.pt"))[0]
    path.write_bytes(damage)
    with pytest.raises(UserError, match=path.name) as caught:
        causal_effects.main(["--run_dir", str(run), "--results_dir", str(tmp_path / "results")])
    assert "\n" not in str(caught.value)


def test_an_estimate_of_the_screen_stands_only_where_all_tokens_are_patched(tmp_path: Path):
    one = causes.open_patches(open_run(write_patches(tmp_path / "run", screened=True)))[0]
    cells = one.cells.replace({"site": {"resid_pre": "mlp_out"}, "positions": {"after": "all"}})
    table = causes.cell_table(replace(one, cells=cells, attributed={"mlp_out": np.arange(LAYERS) + 0.5}))
    mlps = table[table["site"] == "mlp_out"]
    of_all = mlps[mlps["positions"] == "all"]
    assert of_all["nats_attributed"].tolist() == (of_all["layer"] + 0.5).tolist()
    assert mlps.loc[mlps["positions"] != "all", "nats_attributed"].isna().all()
