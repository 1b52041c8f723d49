"""Attention fractions: against the raw maps, with and without pads, against formulas, and in both file formats."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from attention.attention_fields import ENTROPY_QUERIES, QUERIES, REGIONS, attention_fields
from attention.reference_format import TokenRegions, decoded_offsets
from attention.region_fractions import CELLS, SINK, all_levels, box_of, fraction_cells, uniform_shares
from dirs_eval import main
from run_store import load_pt, open_run, save_pt
from scipy import stats
from synthetic_run import NOUNS, Size, file_content, prompt_rows, tokens_of, with_first_word_typo, write_run
from token_spans import task_span

FEW_SHOT = "Add the two numbers: 1 + 1 = 2\n"
ROWS = prompt_rows(6, ["swap"], templates=3)
# Prompts of other lengths, so that a batch has pads.
ROWS[1] |= {"normal": "Combine carefully: 3 + 4 =", "swap": "Combine craefully: 3 + 4 ="}
SIZE = Size(layers=3, heads=4, raw_layers=(0, 1, 2))
DISJOINT = [REGIONS.index(name) for name in ("context", "instruction", "task")]


def content_of(indices: list[int], style: str = "swap", few_shot: str = FEW_SHOT) -> dict:
    return file_content(ROWS, indices, style, ["normal", "swap"], SIZE, few_shot=few_shot)


def fields_of(content: dict, edited: str = "edited") -> dict[str, np.ndarray]:
    return attention_fields(content, Path("a.pt"), edited)


def without(content: dict, *keys: str) -> dict:
    return {key: value for key, value in content.items() if key not in keys}


@pytest.mark.parametrize("indices", [[0], [0, 1, 2]], ids=["one unpadded prompt", "padded batch"])
def test_fractions_equal_the_sums_of_the_raw_maps(indices: list[int]) -> None:
    content = content_of(indices)
    fields = fields_of(content)
    for row in range(len(indices)):
        real = content["attention_mask"][row]
        mask = content["region_mask"][row][real].numpy()
        for layer in range(SIZE.layers):
            attention = content["attentions"][f"layer_{layer}"][row][:, real][:, :, real].numpy()
            for column, region in enumerate(REGIONS):
                keys = mask[:, content["regions"].index(region)]
                on_region = attention[:, :, keys].sum(-1)  # [H,S]
                expected = np.stack([on_region[:, -1], on_region.mean(-1)], axis=-1)
                np.testing.assert_allclose(fields["mass"][row, layer, :, :, column], expected, atol=1e-3)


def test_span_mass_and_raw_maps_give_the_same_fields() -> None:
    content = content_of([0, 1, 2])
    stored, summed = fields_of(content), fields_of(without(content, "span_mass", "attention_entropy"))
    for name in ("mass", "entropy", "uniform", "tokens", "holds_first"):
        np.testing.assert_allclose(stored[name], summed[name], atol=1e-3, err_msg=name)


@pytest.mark.parametrize("source", ["span_mass", "raw maps"])
def test_padding_changes_nothing(source: str) -> None:
    drop = () if source == "span_mass" else ("span_mass", "attention_entropy")
    batch = fields_of(without(content_of([0, 1, 2]), *drop))
    for row in range(3):
        alone = fields_of(without(content_of([row]), *drop))
        for name, values in alone.items():
            np.testing.assert_allclose(batch[name][row], values[0], atol=1e-6, err_msg=name)


@pytest.mark.parametrize("value", [7.0, float("nan")])
def test_what_stands_in_pads_does_not_count(value: float) -> None:
    content = without(content_of([0, 1, 2]), "span_mass", "attention_entropy")
    clean = fields_of(content)
    pad = ~content["attention_mask"]
    assert pad.any()
    for attention in content["attentions"].values():
        attention.masked_fill_(pad[:, None, :, None], value)  # queries that are pads
    dirty = fields_of(content)
    np.testing.assert_allclose(dirty["mass"], clean["mass"], atol=1e-6)
    np.testing.assert_allclose(dirty["entropy"], clean["entropy"], atol=1e-6)


@pytest.mark.parametrize("sink", SINK)
@pytest.mark.parametrize("query", QUERIES)
def test_disjoint_regions_sum_to_one(query: str, sink: str) -> None:
    fields = fields_of(content_of([0, 1, 2]))
    cells = fraction_cells(fields)
    columns = [CELLS.index((query, sink, REGIONS[region], "fraction")) for region in DISJOINT]
    np.testing.assert_allclose(cells[..., columns].sum(-1), 1, atol=3e-3)
    base = uniform_shares(fields)[:, :, QUERIES.index(query), SINK.index(sink)][..., DISJOINT]
    np.testing.assert_allclose(base.sum(-1), 1, atol=1e-9)


def test_even_attention_has_density_one_everywhere_and_the_uniform_share_as_fraction() -> None:
    content = without(content_of([0, 1, 2]), "span_mass", "attention_entropy")
    real = content["attention_mask"]
    allowed = (real[:, None, :] & real[:, :, None]).tril()
    even = allowed / allowed.sum(-1, keepdim=True).clamp_min(1)
    for attention in content["attentions"].values():
        attention.copy_(even[:, None].expand_as(attention))
    fields = fields_of(content)
    cells = fraction_cells(fields)
    np.testing.assert_allclose(fields["mass"], np.broadcast_to(fields["uniform"][:, :, None], fields["mass"].shape),
                               atol=1e-6)  # fmt: skip
    density = cells[..., [cell[3] == "density" for cell in CELLS]]
    np.testing.assert_allclose(density, 1, atol=1e-4)
    np.testing.assert_allclose(fields["entropy"], 1, atol=1e-5)


def test_excluding_the_first_token_is_the_rest_renormalised() -> None:
    content = content_of([0])
    cells = fraction_cells(fields_of(content))
    attention = content["attentions"]["layer_1"][0, 2].numpy()
    keys = content["region_mask"][0, :, content["regions"].index("context")].numpy().copy()
    assert keys[0]  # the few-shot text holds the first token
    keys[0] = False
    for query, rows in (("last", attention[-1:]), ("mean", attention)):
        expected = rows[:, keys].sum() / rows[:, 1:].sum()
        found = cells[0, 1, 2, CELLS.index((query, "excluded", "context", "fraction"))]
        assert found == pytest.approx(expected, abs=2e-3)


def test_an_edited_word_on_the_first_token_is_in_no_edited_fraction(tmp_path: Path) -> None:
    rows = with_first_word_typo(prompt_rows(12, ["swap"]), [1, 5])
    run = write_run(tmp_path / "run", rows, layers=2, heads=2, raw_layers=())
    assert main(["--run_dir", str(run), "--results_dir", str(tmp_path)]) == 0
    table = pd.read_csv(tmp_path / "attention_fractions.csv").query("style == 'swap'")
    edited = table[table["region"] == "edited"]
    assert set(edited["n_paired"]) == {10}
    assert set(table[table["region"] == "task"]["n_paired"]) == {12}
    counts = []  # the uniform share is of the same rows
    for _, content in open_run(run).batches("swap"):
        inside = content["region_mask"][..., content["regions"].index("edited")].sum(1)
        counts += list(zip(inside.tolist(), content["attention_mask"].sum(1).tolist(), strict=True))
    tokens, length = np.array([count for row, count in enumerate(counts) if row not in (1, 5)]).T
    shown = edited.query("query == 'last' and sink == 'included' and measure == 'fraction'")
    np.testing.assert_allclose(shown["uniform_share"], (tokens / length).mean())
    np.testing.assert_allclose(edited["tokens"], tokens.mean())
    assert main(["--run_dir", str(run), "--results_dir", str(tmp_path), "--first_token", "included"]) == 0
    kept = pd.read_csv(tmp_path / "attention_fractions.csv").query("style == 'swap' and region == 'edited'")
    assert set(kept["n_paired"]) == {12}


@pytest.mark.parametrize("from_maps", [False, True])
def test_a_sink_in_the_softmax_takes_its_part_of_the_whole(from_maps: bool) -> None:
    """Keys of a model with such a sink get 1 minus what it takes; shares without the first token still sum to 1."""
    plain, taken = content_of([0, 1, 2]), content_of([0, 1, 2])
    taken["span_mass"] = taken["span_mass"] * 0.25
    for attention in taken["attentions"].values():
        attention *= 0.25
    if from_maps:
        plain, taken = (without(content, "span_mass", "attention_entropy") for content in (plain, taken))
    ours, theirs = fields_of(taken), fields_of(plain)
    np.testing.assert_allclose(ours["whole"], 0.25, atol=1e-3)
    cells, whole = fraction_cells(ours), fraction_cells(theirs)
    for column, cell in enumerate(CELLS):
        factor = 0.25 if cell[1] == "included" else 1
        np.testing.assert_allclose(cells[..., column], factor * whole[..., column], rtol=2e-2, atol=2e-3)
    np.testing.assert_allclose(ours["entropy"], theirs["entropy"], atol=1e-5)


def test_a_region_that_no_prompt_has_is_in_no_plot(tmp_path: Path) -> None:
    rows = [{"normal": f"Why do {word} fall?", "swap": f"Why do {word} flal?"} for word in NOUNS[:6]]
    run = write_run(tmp_path / "run", rows, layers=2, heads=2)
    (tmp_path / "boxplot_frac_prompt.png").write_bytes(b"of an earlier run")
    assert main(["--run_dir", str(run), "--results_dir", str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["boxplot_frac_task.png"]
    table = pd.read_csv(tmp_path / "prompt_task_fraction_aggregate.csv")
    assert (table["frac_prompt"] == 0).all()


def test_a_framing_is_instruction_in_prompts_with_and_without_a_colon(tmp_path: Path) -> None:
    rows = [
        {"normal": f"Why do {word} fall?" if row % 2 else f"Explain this: {word} fall"}
        for row, word in enumerate(["leaves", "stones", "prices", "empires", "curtains", "apples"])
    ]
    rows = [row | {"polite": f"Dear friend, many thanks! {row['normal']}"} for row in rows]
    run = write_run(tmp_path / "run", rows, layers=2, heads=2)
    assert main(["--run_dir", str(run), "--results_dir", str(tmp_path)]) == 0
    table = pd.read_csv(tmp_path / "prompt_task_fraction_aggregate.csv").set_index("style")
    assert table["n"].tolist() == [6, 6]
    assert table["frac_instruction_density_n"].to_dict() == {"normal": 3, "polite": 6}
    assert table["frac_task_density_n"].tolist() == [6, 6]
    table = pd.read_csv(tmp_path / "attention_fractions.csv").query("query == 'last' and sink == 'included'")
    shown = table.query("style == 'normal' and region == 'instruction' and level == 'model'").set_index("measure")
    with_colon = [tokens_of(row["normal"]) for row in rows[::2]]
    shares = [len(tokens_of(row["normal"].partition(":")[0])) + 1 for row in rows[::2]]  # and the colon
    share = np.mean([count / len(tokens) for count, tokens in zip(shares, with_colon, strict=True)])
    np.testing.assert_allclose(shown["uniform_share"]["density"], share)
    np.testing.assert_allclose(shown["uniform_share"]["fraction"], share / 2)
    whole = table.set_index(["style", "region"])["tokens"]
    assert whole["polite", "task"].iloc[0] == whole["normal", "task"].iloc[0]
    assert whole["polite", "instruction"].iloc[0] > whole["normal", "instruction"].iloc[0] + 5


def test_clean_twin_and_typo_are_read_from_their_own_regions() -> None:
    clean, typo = content_of([0], "normal"), content_of([0], "swap")
    for content, name in ((clean, "edited:swap"), (typo, "edited")):
        tokens = int(content["region_mask"][0, :, content["regions"].index(name)].sum())
        fields = fields_of(content, name)
        assert fields["tokens"][0, REGIONS.index("edited")] == tokens > 0
    nothing = fields_of(clean, "edited:other")
    assert np.isnan(nothing["mass"][..., REGIONS.index("edited")]).all()
    assert np.isnan(nothing["entropy"][..., ENTROPY_QUERIES.index("edited")]).all()


def test_levels_are_means_over_known_heads() -> None:
    values = np.random.default_rng(0).random((3, 2, 4, 5))
    values[0, 1, 2] = np.nan
    levels = all_levels(values)
    assert [level.shape for level in levels] == [(3, 2 * 4, 5), (3, 2, 5), (3, 1, 5)]
    np.testing.assert_array_equal(levels[0], values.reshape(3, 8, 5))
    np.testing.assert_allclose(levels[1], np.nanmean(values, axis=2))
    np.testing.assert_allclose(levels[2][:, 0], np.nanmean(values, axis=(1, 2)))


def test_boxes_are_quantiles_and_zero_is_zero() -> None:
    values = np.random.default_rng(0).beta(2, 5, 4000)
    box = box_of(np.append(values, np.nan))
    for name, q in (("whislo", 0.05), ("q1", 0.25), ("med", 0.5), ("q3", 0.75), ("whishi", 0.95)):
        assert box[name] == np.quantile(values, q)
    assert box_of(np.zeros(7))["whishi"] == 0
    assert box_of(np.array([0.0, 0.0, 1e-5, 1.0]))["q1"] == 0


# --- the script


ALL_LEVELS = ["--levels", "model", "layer", "head"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A run with one missing row and one variant that equals the clean text, and its tables."""
    folder = tmp_path_factory.mktemp("fractions")
    rows = prompt_rows(14, ["swap", "polite"], templates=7)
    rows[3]["swap"] = rows[3]["normal"]
    run = write_run(
        folder / "run", rows, rows_per_file=5, layers=2, heads=3, skip=lambda style, i: (style, i) == ("swap", 6)
    )
    assert main(["--run_dir", str(run), "--results_dir", str(folder / "out"), *ALL_LEVELS]) == 0
    return SimpleNamespace(run=run, out=folder / "out", table=pd.read_csv(folder / "out" / "attention_fractions.csv"))


def expected_values(run: Path, style: str) -> pd.DataFrame:
    """Fraction of the last token's attention on the task per row, layer and head, straight from span_mass."""
    lines = []
    for _, content in open_run(run).batches(style):
        last, task = content["regions"].index("last"), content["regions"].index("task")
        for row, index in enumerate(content["original_indices"]):
            for layer in range(2):
                for head in range(3):
                    value = float(content["span_mass"][layer, row, head, last, task])
                    lines.append((index, layer, head, content["prompts"][row], value))
    return pd.DataFrame(lines, columns=["row", "layer", "head", "prompt", "value"])


def test_a_head_s_row_is_the_paired_mean(results: SimpleNamespace) -> None:
    own, clean = expected_values(results.run, "swap"), expected_values(results.run, "normal")
    both = own.merge(clean, on=["row", "layer", "head"], suffixes=("", "_clean"))
    both = both[both["prompt"] != both["prompt_clean"]]
    change = both[(both["layer"] == 1) & (both["head"] == 2)]
    change = (change["value"] - change["value_clean"]).to_numpy()
    table = results.table
    chosen = table[
        (table["style"] == "swap") & (table["layer"] == 1) & (table["head"] == 2) & (table["query"] == "last")
        & (table["region"] == "task") & (table["measure"] == "fraction") & (table["sink"] == "included")
    ]  # fmt: skip
    (line,) = [row for _, row in chosen.iterrows()]
    assert (line["n"], line["n_paired"], line["n_identical"], line["n_unpaired"]) == (13, 12, 1, 0)
    assert line["difference"] == pytest.approx(change.mean(), abs=1e-9)
    assert line["estimate"] == pytest.approx(own[(own["layer"] == 1) & (own["head"] == 2)]["value"].mean(), abs=1e-9)


def test_old_names_keep_their_columns(results: SimpleNamespace) -> None:
    rows = {"aggregate": 3, "perlayer": 3 * 2, "perhead": 3 * 2 * 3}
    for word, count in rows.items():
        table = pd.read_csv(results.out / f"prompt_task_fraction_{word}.csv")
        assert len(table) == count
        assert {"style", "frac_instruction", "frac_task", "frac_task_p_adjusted"} <= set(table.columns)
        assert table["frac_prompt"].equals(table["frac_instruction"])
        np.testing.assert_allclose(table["frac_prompt"] + table["frac_task"] + table["frac_context"], 1, atol=3e-3)
        variants = table[table["style"] != "normal"]
        assert variants["frac_task_difference_ci_low"].notna().all()
        assert table[table["style"] == "normal"]["frac_task_difference"].isna().all()


def test_corrections_go_over_styles_layers_and_heads(results: SimpleNamespace) -> None:
    keys = ["query", "sink", "region", "measure"]
    for level, by in (("layer", ["style"]), ("head", ["style"])):
        for _, rows in results.table[results.table["level"] == level].groupby([*keys, *by]):
            if rows["p"].notna().all():
                np.testing.assert_allclose(rows["p_adjusted"], stats.false_discovery_control(rows["p"]))
    model = results.table[(results.table["level"] == "model") & results.table["p"].notna()]
    for _, rows in model.groupby(keys):
        smallest = rows.sort_values("p").iloc[0]
        assert smallest["p_adjusted"] == pytest.approx(min(1, smallest["p"] * len(rows)))


def test_batch_size_changes_no_number(results: SimpleNamespace, tmp_path: Path) -> None:
    rows = prompt_rows(14, ["swap", "polite"], templates=7)
    rows[3]["swap"] = rows[3]["normal"]
    run = write_run(
        tmp_path / "run", rows, rows_per_file=3, layers=2, heads=3, skip=lambda style, i: (style, i) == ("swap", 6)
    )
    assert main(["--run_dir", str(run), "--results_dir", str(tmp_path / "out"), *ALL_LEVELS]) == 0
    again = pd.read_csv(tmp_path / "out" / "attention_fractions.csv")
    pd.testing.assert_frame_equal(again, results.table, atol=1e-9)


def test_plots_are_drawn(results: SimpleNamespace) -> None:
    names = {path.name for path in results.out.glob("*.png")}
    per_layer = {f"boxplot_perlayer_frac_prompt_{style}.png" for style in ("normal", "swap", "polite")}
    assert names == {"boxplot_frac_prompt.png", "boxplot_frac_task.png"} | per_layer


# --- the reference pipeline's format


class LetterTokenizer:
    """One token per letter; 0 pads, 1 begins. Enough of a tokenizer's interface, with known offsets."""

    pad_token_id, eos_token_id = 0, None
    all_special_ids = (0, 1)

    def decode(self, ids: list[int], **_: object) -> str:
        # 2 3 are the halves of one sign, as byte-level tokenizers cut it.
        pieces = ["<bos>" if i == 1 else "÷" if i == 3 else chr(i) for i in ids]
        return "".join("�" if i == 2 and ids[at + 1 : at + 2] != [3] else "" if i == 2 else piece
                       for at, (i, piece) in enumerate(zip(ids, pieces, strict=True)))  # fmt: skip


def reference_content(texts: list[str], heads: int = 2, with_mask: bool = False) -> dict:
    """A .pt file as the reference pipeline writes it: ids, maps and texts; no regions, and usually no mask."""
    ids = [[1, *map(ord, text)] for text in texts]
    length = max(map(len, ids))
    padded = torch.tensor([[0] * (length - len(row)) + row for row in ids])
    real = padded != 0
    scores = torch.randn(len(ids), heads, length, length, generator=torch.Generator().manual_seed(0))
    allowed = (real[:, None, :] & torch.ones(length, length, dtype=torch.bool).tril())[:, None]
    attention = scores.masked_fill(~allowed, -1e9).softmax(-1)  # pads attend evenly to everything
    content = {
        "input_ids": padded, "attentions": {"layer_5": attention, "layer_0": attention.flip(1)},
        "original_indices": list(range(len(ids))), "final_predictions": texts,
    }  # fmt: skip
    return content | ({"attention_mask": real} if with_mask else {})


@pytest.fixture
def letters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attention.reference_format.load_tokenizer", lambda name: LetterTokenizer())


@pytest.mark.usefixtures("letters")
@pytest.mark.parametrize("with_mask", [True, False])
def test_reference_files_give_fractions_without_pads(tmp_path: Path, with_mask: bool) -> None:
    texts = ["Add these: 3 + 4 =", "Add: 1 + 1 =", "No colon 2 + 2"]
    content = reference_content(texts, with_mask=with_mask)
    (tmp_path / "run" / "normal").mkdir(parents=True)
    save_pt(tmp_path / "run" / "normal" / "activations_00000_00003.pt", content)
    run = open_run(tmp_path / "run")
    fields = attention_fields(content, Path("a.pt"), None, TokenRegions("letters", run, "normal"))
    for row, text in enumerate(texts):
        start, _ = task_span(text)
        keys = slice(content["input_ids"].shape[1] - len(text) + start, None)
        if text[start] == " ":  # the white space before a word belongs to no word, a token of it alone to its place
            assert content["input_ids"][row, keys][0] == ord(" ")
        expected = content["attentions"]["layer_5"][row, :, -1, keys].sum(-1).numpy()
        np.testing.assert_allclose(fields["mass"][row, 1, :, 0, REGIONS.index("task")], expected, atol=1e-6)
        assert fields["tokens"][row, REGIONS.index("task")] == len(text) - start
    np.testing.assert_allclose(fields["mass"][..., DISJOINT].sum(-1), 1, atol=1e-5)
    assert main(["--run_dir", str(tmp_path / "run"), "--results_dir", str(tmp_path / "out"), "--tokenizer", "x"]) == 0
    table = pd.read_csv(tmp_path / "out" / "prompt_task_fraction_perlayer.csv")
    assert table["layer"].tolist() == [0, 5]
    np.testing.assert_allclose(table["frac_prompt"] + table["frac_task"] + table["frac_context"], 1, atol=1e-5)


def test_a_reference_file_without_tokenizer_is_refused_in_one_line(tmp_path: Path) -> None:
    from command_line import UserError

    (tmp_path / "normal").mkdir()
    save_pt(tmp_path / "normal" / "activations_00000_00001.pt", reference_content(["Add: 1 + 1 ="]))
    with pytest.raises(UserError, match="give --tokenizer"):
        main(["--run_dir", str(tmp_path), "--results_dir", str(tmp_path / "out")])


def test_a_file_without_attention_is_refused(tmp_path: Path) -> None:
    from command_line import UserError

    run = write_run(tmp_path / "run", prompt_rows(2, []), raw_layers=())
    path = run / "normal" / "activations_00000_00002.pt"
    save_pt(path, without(load_pt(path, mmap=False), "span_mass", "attention_entropy"))
    with pytest.raises(UserError, match="neither span_mass nor attentions"):
        main(["--run_dir", str(run), "--results_dir", str(tmp_path / "out")])


def test_a_run_whose_numbers_overflowed_is_refused_in_one_line(tmp_path: Path) -> None:
    from command_line import UserError

    def overflow(row: dict, style: str, index: int) -> None:
        row["span_mass"].fill_(float("nan"))

    run = write_run(tmp_path / "run", prompt_rows(4, ["swap"]), change=overflow)
    with pytest.raises(UserError, match="no row has a finite attention"):
        main(["--run_dir", str(run), "--results_dir", str(tmp_path / "out")])


def test_offsets_follow_what_each_token_adds() -> None:
    text, offsets = decoded_offsets(LetterTokenizer(), [1, ord("4"), 2, 3, ord("5")])
    assert [text[a:b] for a, b in offsets] == ["<bos>", "4", "÷", "÷", "5"]
