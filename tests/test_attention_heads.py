"""Head sensitivity: divergence of aligned maps, the split control, tables and pictures."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from attention import head_plots, heads
from attention.aligned_maps import aligned_divergence, row_maps
from attention.head_plots import draw_layer_head, save_layer_head_grid, symmetric_limit
from attention.heads import DIVERGENCES, MEASURES, head_values
from command_line import UserError
from file_output import file_word
from head_sensitivity import main
from run_store import open_run
from scipy.spatial.distance import jensenshannon
from synthetic_run import prompt_rows, with_first_word_typo, write_run

# --- divergence of aligned maps


def content_with(ids: list[int], edited: list[bool], attention: torch.Tensor) -> dict:
    """A one-row file with the given ids, edited tokens and one layer's map [H,S,S], two pads on the left."""
    pads, length = 2, len(ids) + 2
    padded = torch.zeros(1, attention.shape[0], length, length)
    padded[0, :, pads:, pads:] = attention
    real = torch.tensor([[False] * pads + [True] * len(ids)])
    mask = torch.tensor([[[False]] * pads + [[flag] for flag in edited]])
    return {
        "input_ids": torch.tensor([[0] * pads + ids]), "attention_mask": real, "regions": ["edited"],
        "region_mask": mask, "attentions": {"layer_5": padded},
    }  # fmt: skip


def causal(length: int, seed: int) -> torch.Tensor:
    scores = torch.randn(2, length, length, generator=torch.Generator().manual_seed(seed))
    return scores.masked_fill(~torch.ones(length, length, dtype=torch.bool).tril(), -torch.inf).softmax(-1)


def divergence(variant: dict, clean: dict) -> np.ndarray:
    rows = [row_maps(content, Path("a.pt"), "edited") for content in (variant, clean)]
    return aligned_divergence(*rows, [4, 5], 2)


def test_divergence_equals_scipy_on_keys_merged_by_hand() -> None:
    # clean: a [b] c d; typo: a [x y] c d. Keys in common: a, the word, c, d.
    clean_map, typo_map = causal(4, 0), causal(5, 1)
    found = divergence(
        content_with([1, 8, 9, 3, 4], [False, True, True, False, False], typo_map),
        content_with([1, 2, 3, 4], [False, True, False, False], clean_map),
    )
    merged = torch.stack([typo_map[..., 0], typo_map[..., 1] + typo_map[..., 2], *typo_map[..., 3:].unbind(-1)], -1)
    for head in range(2):
        expected = [
            jensenshannon(merged[head, q].numpy(), clean_map[head, p].numpy(), base=2) ** 2
            for q, p in ((3, 2), (4, 3))  # the unedited queries after the edit
        ]
        assert found[0, 1, head, 0] == pytest.approx(expected[-1], abs=1e-6)
        assert found[0, 1, head, 1] == pytest.approx(np.mean(expected), abs=1e-6)
    assert np.isnan(found[0, 0]).all()  # layer 4 has no raw map


def test_queries_after_the_first_of_two_edits_count_and_none_where_the_edit_ends_the_prompt() -> None:
    # clean: a [b] c [d]; typo: a [x] c [y]. Of a and c only c stands after an edit.
    maps, edited = (causal(4, 0), causal(4, 1)), [False, True, False, True]
    found = divergence(content_with([1, 8, 3, 9], edited, maps[0]), content_with([1, 2, 3, 4], edited, maps[1]))
    for head in range(2):
        expected = jensenshannon(maps[0][head, 2].numpy(), maps[1][head, 2].numpy(), base=2) ** 2
        assert found[0, 1, head, 1] == pytest.approx(expected, abs=1e-6)
    assert np.isnan(found[0, 1, :, 0]).all()  # the last token is an edited one
    at_end = [False, False, False, True]
    found = divergence(content_with([1, 2, 3, 9], at_end, maps[0]), content_with([1, 2, 3, 4], at_end, maps[1]))
    assert np.isnan(found).all()


def test_a_word_cut_into_more_tokens_is_no_divergence_by_itself() -> None:
    clean_map = causal(4, 0)
    cut = torch.zeros(2, 5, 5)
    old = [0, 1, 1, 2, 3]
    for q in range(5):
        for k in range(5):
            cut[:, q, k] = clean_map[:, old[q], old[k]] / (2 if old[k] == 1 else 1)
    found = divergence(
        content_with([1, 8, 9, 3, 4], [False, True, True, False, False], cut),
        content_with([1, 2, 3, 4], [False, True, False, False], clean_map),
    )
    np.testing.assert_allclose(found[0, 1], 0, atol=1e-6)


def test_rows_that_cannot_be_aligned_have_no_divergence() -> None:
    found = divergence(
        content_with([1, 8, 7, 4], [False, True, False, False], causal(4, 0)),  # 7 where the clean row has 3
        content_with([1, 2, 3, 4], [False, True, False, False], causal(4, 1)),
    )
    assert np.isnan(found).all()


# --- the script


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of a run with the split control, one variant equal to its clean text, and one failed row."""
    folder = tmp_path_factory.mktemp("heads")
    rows = prompt_rows(24, ["swap", "missing"], templates=12)
    for row in rows:
        words = zip(row["normal"].split(" "), row["swap"].split(" "), strict=True)
        row["split"] = " ".join(a if a == b else f"{a[:2]}\u00ad{a[2:]}" for a, b in words)
    rows[3]["swap"] = rows[3]["normal"]
    write_run(
        folder / "run", rows, rows_per_file=5, layers=3, heads=4, raw_layers=(0, 2),
        skip=lambda style, index: (style, index) == ("normal", 6),
    )  # fmt: skip
    assert main(["--run_dir", str(folder / "run"), "--results_dir", str(folder / "out"), "--all_measures"]) == 0
    return folder


def table(out: Path, name: str = "head_sensitivity") -> pd.DataFrame:
    return pd.read_csv(out / "out" / f"{name}.csv")


def by_hand(out: Path, style: str, reference: str, value: str = "edited", log: bool = False) -> dict[int, np.ndarray]:
    """Mass of the last token on the edited word, style minus reference form [L,H] by row, straight from the files."""
    run = open_run(out / "run")
    found: dict[str, dict[int, tuple[str, np.ndarray]]] = {style: {}, reference: {}}
    for name, rows in found.items():
        region = f"{value}:{style}" if name == "normal" else value
        for _, content in run.batches(name):
            q, r = content["regions"].index("last"), content["regions"].index(region)
            for b, index in enumerate(content["original_indices"]):
                if content["region_mask"][b, :, r].any():
                    mass = content["span_mass"][:, b, :, q, r].double().numpy()
                    rows[index] = content["prompts"][b], np.log2(np.maximum(mass, 1e-5)) if log else mass
    own, other = found[style], found[reference]
    return {i: own[i][1] - other[i][1] for i in own if i in other and own[i][0] != other[i][0]}


def edited_tokens(out: Path, style: str) -> dict[int, int]:
    counts = {}
    for _, content in open_run(out / "run").batches(style):
        inside = content["region_mask"][:, :, content["regions"].index("edited")].sum(1).tolist()
        counts |= dict(zip(content["original_indices"], inside, strict=True))
    return counts


def test_the_table_is_the_paired_mean_with_its_counts(out: Path) -> None:
    change = by_hand(out, "swap", "normal")
    assert set(change) == set(range(24)) - {3, 6}
    expected = np.mean(list(change.values()), axis=0)
    rows = table(out)
    rows = rows[(rows["style"] == "swap") & (rows["measure"] == "edited_mass_last")]
    assert set(zip(rows["n"], rows["n_identical"], rows["n_unpaired"], strict=True)) == {(22, 1, 1)}
    for row in rows.itertuples():
        assert row.difference == pytest.approx(expected[row.layer, row.head], abs=1e-7)
        assert row.clean + row.difference == pytest.approx(row.estimate, abs=1e-9)
    assert rows["t"].abs().is_monotonic_decreasing
    layers = table(out, "layer_sensitivity")
    layers = layers[(layers["style"] == "swap") & (layers["measure"] == "edited_mass_last")]
    for row in layers.itertuples():
        assert row.difference == pytest.approx(expected[row.layer].mean(), abs=1e-7)


def test_the_logarithm_of_the_mass_is_taken_row_by_row(out: Path) -> None:
    expected = np.mean(list(by_hand(out, "swap", "normal", log=True).values()), axis=0)
    rows = table(out)
    rows = rows[(rows["style"] == "swap") & (rows["measure"] == "edited_log2_mass_last")]
    for row in rows.itertuples():
        assert row.difference == pytest.approx(expected[row.layer, row.head], abs=1e-5)


def test_no_mass_is_counted_as_the_least_that_is_known() -> None:
    fields = {
        "mass": np.zeros((2, 1, 1, 2, 5), dtype=np.float32), "uniform": np.full((2, 1, 2, 5), 0.2),
        "entropy": np.zeros((2, 1, 1, 3)),
    }  # fmt: skip
    fields["mass"][1, ..., 3] = 0.25
    values = head_values(fields)[..., [*MEASURES].index("edited_log2_mass_last")].ravel()
    np.testing.assert_allclose(values, [np.log2(1e-5), -2], rtol=1e-6)


@pytest.mark.parametrize("most", [-1, 1])
def test_the_split_control_pairs_the_same_words_in_as_many_tokens(out: Path, tmp_path: Path, most: int) -> None:
    command = ["--run_dir", str(out / "run"), "--results_dir", str(tmp_path), "--split_tokens", str(most)]
    assert main(command) == 0
    change = by_hand(out, "swap", "split")
    counts = {style: edited_tokens(out, style) for style in ("swap", "split")}
    used = [i for i in change if i != 3 and (most < 0 or abs(counts["swap"][i] - counts["split"][i]) <= most)]
    expected = np.mean([change[i] for i in used], axis=0)
    rows = pd.read_csv(tmp_path / "head_sensitivity.csv")
    swap = rows[(rows["style"] == "swap") & (rows["measure"] == "edited_mass_last")]
    assert set(swap["n_vs_control"]) == {len(used)}
    assert len(used) == 23 if most < 0 else 1 < len(used) < 23  # row 6: no clean run, but both forms; row 3: no typo
    for row in swap.itertuples():
        assert row.difference_vs_control == pytest.approx(expected[row.layer, row.head], abs=1e-7)
    # `missing` edits another word in most rows: those are no fair pairs, and are not used.
    other = rows[(rows["style"] == "missing") & (rows["measure"] == "edited_mass_last")]
    assert other["n_vs_control"].max() < 23
    assert rows[rows["style"] == "split"]["difference_vs_control"].isna().all()


def test_rows_whose_typo_is_on_the_first_token_are_in_no_edited_measure(tmp_path: Path) -> None:
    rows = with_first_word_typo(prompt_rows(18, ["swap"]), [0, 4, 9])
    run = write_run(tmp_path / "run", rows, layers=2, heads=2, raw_layers=())
    for first_token, at_edited in (("excluded", 15), ("included", 18)):
        command = ["--run_dir", str(run), "--results_dir", str(tmp_path), "--first_token", first_token]
        assert main([*command, "--all_measures"]) == 0
        counts = pd.read_csv(tmp_path / "head_sensitivity.csv").groupby("measure")["n"].unique()
        for measure in ("edited_mass_last", "edited_density_mean", "entropy_edited"):
            assert counts[measure].tolist() == [at_edited]
        for measure in ("task_fraction_last", "entropy_last", "first_mass_last"):
            assert counts[measure].tolist() == [18]


def test_distances_are_given_without_a_test(out: Path) -> None:
    rows = table(out)
    far = rows[rows["measure"].isin(["jsd_last", "jsd_mean"])]
    assert set(far["layer"]) == {0, 2}
    assert (far["difference"] >= 0).all()
    assert far[["t", "p", "p_adjusted", "effect_size"]].isna().all().all()
    assert set(rows["measure"]) == {*MEASURES}


def test_a_measure_may_be_added_anywhere(out: Path, tmp_path: Path) -> None:
    """Before, between and after the divergences, a measure and they themselves have the values they had."""
    last, mean = (MEASURES.pop(name) for name in ("jsd_last", "jsd_mean"))
    try:
        for name, measure in (("jsd_last", last), ("between", MEASURES["first_mass_last"]), ("jsd_mean", mean)):
            MEASURES[name] = measure
        MEASURES["at_the_end"] = MEASURES["first_mass_last"]
        assert main(["--run_dir", str(out / "run"), "--results_dir", str(tmp_path), "--all_measures"]) == 0
    finally:
        for name in ("jsd_last", "between", "jsd_mean", "at_the_end"):
            MEASURES.pop(name, None)
        MEASURES.update({"jsd_last": last, "jsd_mean": mean})
    before, after = table(out), pd.read_csv(tmp_path / "head_sensitivity.csv")
    keys, values = ["style", "layer", "head"], ["difference", "difference_vs_control", "n"]
    for new, old in (
        ("between", "first_mass_last"),
        ("at_the_end", "first_mass_last"),
        ("jsd_last",) * 2,
        ("jsd_mean",) * 2,
    ):
        found, expected = (
            rows[rows["measure"] == name].set_index(keys)[values].sort_index()
            for rows, name in ((after, new), (before, old))
        )
        pd.testing.assert_frame_equal(found, expected)


def test_pictures_and_overlap_are_written(out: Path) -> None:
    names = {path.name for path in (out / "out").glob("*.png")}
    styles = {f"head_sensitivity_{style}.png" for style in ("swap", "missing")}  # `split` is their control
    assert names == {"head_overlap.png", "head_overlap_vs_control.png"} | styles
    overlap, tested = table(out, "head_overlap"), [name for name in MEASURES if name not in DIVERGENCES]
    assert overlap["reference_form"].value_counts().to_dict() == {
        "clean form": len(tested) * 6,
        "control": len(tested) * 3,
    }
    assert overlap["n_template_groups"].between(6, 12).all()


def test_a_run_without_clean_form_is_refused(tmp_path: Path) -> None:
    rows = [{"element_index": 1, "swap": "Coutn: 1 + 1 ="}, {"element_index": 2, "missing": "Cont: 1 + 1 ="}]
    write_run(tmp_path / "run", rows)
    with pytest.raises(UserError, match="no clean form"):
        main(["--run_dir", str(tmp_path / "run"), "--results_dir", str(tmp_path)])


def test_styles_that_only_add_words_have_pictures_of_what_they_have(tmp_path: Path) -> None:
    rows = [row | {"polite": f"Please help me. {row['normal']}"} for row in prompt_rows(12, [])]
    run = write_run(tmp_path / "run", rows)
    assert main(["--run_dir", str(run), "--results_dir", str(tmp_path / "out")]) == 0
    found = pd.read_csv(tmp_path / "out" / "head_sensitivity.csv")
    assert "edited_mass_last" not in set(found["measure"])  # added words have no clean twin
    assert (tmp_path / "out" / "head_sensitivity_polite.png").stat().st_size > 10_000


def test_an_answer_table_of_another_kind_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", prompt_rows(2, ["swap"]))
    (tmp_path / "items.csv").write_text("style,original_index\nnormal,0\n")
    with pytest.raises(UserError, match="needs the columns style, original_index, correct"):
        main(["--run_dir", str(run), "--results_dir", str(tmp_path), "--maths_items", str(tmp_path / "items.csv")])


def test_a_wrong_measure_is_told_with_the_right_ones(out: Path, tmp_path: Path) -> None:
    command = ["--run_dir", str(out / "run"), "--results_dir", str(tmp_path), "--measure"]
    with pytest.raises(UserError, match=r"entropy_lst: there is no such measure; .* did you mean entropy_last"):
        main([*command, "entropy_lst"])
    assert main([*command, "entropy_last"]) == 0


# --- pictures


@pytest.mark.parametrize(("layers", "heads"), [(30, 9), (42, 16), (64, 64)])
def test_maps_are_centred_at_zero_and_legible(layers: int, heads: int, tmp_path: Path, monkeypatch: Any) -> None:
    values = np.random.default_rng(0).standard_normal((layers, heads))
    values[2, 3] = np.nan
    figure, axes = plt.subplots()
    image = draw_layer_head(axes, values, symmetric_limit(values), values > 2, title="swap (n = 5 pairs)")
    assert image.norm.vmin == -image.norm.vmax
    red, _, blue, _ = image.cmap(image.norm(image.norm.vmax / 2))
    assert red > blue  # more attention is red, less is blue, none is white
    np.testing.assert_allclose(image.cmap(image.norm(0.0))[:3], 0.97, atol=0.01)
    np.testing.assert_array_equal(image.get_array().filled(np.nan), values.T)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("layer", "head")
    plt.close(figure)
    panels = [(f"style {i}", values, values > 2) for i in range(3)]
    drawn = {}
    monkeypatch.setattr(head_plots, "save_figure", lambda path, figure: drawn.update({path.name: figure}))
    save_layer_head_grid(tmp_path / "grid.png", panels, "change in attention mass", "title", named=[(1, 2)])
    figure = drawn["grid.png"]
    figure.draw_without_rendering()
    maps = [axes for axes in figure.axes if axes.get_images()]
    assert len(maps) == 3
    for axes in maps:
        box = axes.get_window_extent()  # at 100 dots an inch, of a page 1,000 wide
        assert box.width > 700
        assert min(box.width / layers, box.height / heads) > 8
        labels = [label.get_window_extent() for label in axes.get_xticklabels() if label.get_text()]
        assert all(left.x1 < right.x0 for left, right in itertools.pairwise(labels))
        assert "1.2" in [text.get_text() for text in axes.texts]
    plt.close(figure)


def test_one_wild_cell_does_not_set_the_scale() -> None:
    values = np.full((30, 9), 0.01)
    values[0, 0] = 5.0
    assert symmetric_limit(values) < 0.1
    assert symmetric_limit(np.zeros((3, 3))) > 0
    assert symmetric_limit(np.full((3, 3), np.nan)) > 0


def test_style_names_are_safe_in_file_names() -> None:
    assert file_word("a/b c") == "a_b_c"


def test_tests_have_four_digits_and_all_else_stays():
    numbers = [1.23456789e-300, 0.0, np.nan, 24.64881, -1.975082]
    names = ["p", "p_adjusted_vs_control", "t", "effect_size_vs_control", "difference", "rank_vs_control"]
    short = heads.with_short_tests(pd.DataFrame(dict.fromkeys(names, numbers)))
    for name in names[:4]:
        np.testing.assert_array_equal(short[name], [1.235e-300, 0.0, np.nan, 24.65, -1.975])
    for name in names[4:]:
        np.testing.assert_array_equal(short[name], numbers)
