"""The control `split@<style>`: the clean prompt with as many tokens in its edited words as the typo has."""

from __future__ import annotations

import itertools
import json
import random

import attn_act_logi
import pytest
import tiny_models
import torch
from capture.matched_split import CUT, best_cuts
from capture.prompts import PromptReader, Rendering
from command_line import UserError
from load_json import read_prompt_file
from pt_fields import unpack_rows
from run_store import open_run

FEW_SHOT = "Write down the answer: 3 + 4 = 7\n"
ROWS = [
    {"normal": "Please calculate the sum: 7 + 5 =", "swap": "Please caclulate the sum: 7 + 5 ="},
    {
        "normal": "What is the total of three naïve numbers: 3 × 4 =",
        "swap": "What is teh ttoal of three navïe numbers: 3 × 4 =",
    },
    {"normal": "Explain why the answer is blue", "swap": "xEplain why the asnwer is lbue"},
    {"normal": "Write down, please, the market", "swap": "Wr ite down, plaese, the amrket"},
    {"normal": "The quick brown fox", "swap": "The quick brown fxo xof xxxx oooo"},
    {"normal": "Only the clean form is here"},
    {"normal": "Sum: 1 + 1", "swap": ""},
    {"normal": "See the answer market", "swap": "See teh asnwer amrket"},
    {"normal": "Write the answer", "swap": "Write down the answer"},
]  # row 4: the typo has more tokens than the word has characters; row 8: no clean word


def reader_of(tmp_path, kind, **how):
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps(ROWS), encoding="utf-8")
    return PromptReader(read_prompt_file(path), tiny_models.tokenizer(kind), Rendering(**how), 200, None)


@pytest.mark.parametrize("how", [{}, {"few_shot": FEW_SHOT}, {"few_shot": FEW_SHOT, "apply_chat_template": True}])
@pytest.mark.parametrize("kind", ["bytes", "metaspace"])
def test_only_the_ids_of_the_edited_words_change_and_are_as_many_as_the_typos(tmp_path, kind, how):
    reader = reader_of(tmp_path, kind, **how)
    control, typo, clean = (reader.style(style) for style in ("split@swap", "swap", "normal"))
    assert [index for index, _ in control.texts] == [0, 1, 2, 3, 7]
    assert control.unmatched == 2  # rows 4 and 8
    assert "empty prompt" in control.failures[6][1]
    assert control.names == typo.names
    tokenizer, edited = reader.tokenizer, control.names.index("edited")
    for place, (index, shown) in enumerate(control.texts):
        own = reader.prompt(control, place)
        other, plain = (reader.prompt(style, [i for i, _ in style.texts].index(index)) for style in (typo, clean))
        assert tokenizer.decode(own.input_ids) == tokenizer.decode(plain.input_ids)
        assert shown.replace(CUT, "") == ROWS[index]["normal"]
        mine, before = own.region_mask[:, edited], plain.region_mask[:, clean.names.index("edited:swap")]
        assert torch.equal(mine, other.region_mask[:, edited])
        outside = [torch.tensor(one.input_ids)[~mine] for one in (own, other)]
        assert torch.equal(*outside)
        rest = [torch.tensor(one.input_ids)[~mask] for one, mask in ((own, mine), (plain, before))]
        assert torch.equal(*rest)
        words = [tokenizer.decode(torch.tensor(one.input_ids)[mask]) for one, mask in ((own, mine), (plain, before))]
        assert words[0] == words[1]
        assert (shown == ROWS[index]["normal"]) == (own.input_ids == plain.input_ids)
        assert shown.count(CUT) >= int(mine.sum() - before.sum())


def test_the_cuts_lie_where_the_typo_is_cut(tmp_path):
    """Every one-letter piece is in a byte-level vocabulary, so a word can be cut wherever its typo is."""
    reader = reader_of(tmp_path, "bytes")
    tokens = reader.tokenizer.tokenize(" caclulate")
    control = reader.style("split@swap")
    own = reader.tokenizer.convert_ids_to_tokens(reader.prompt(control, 0).input_ids)
    pieces = own[own.index("Ġca") :][: len(tokens)]
    assert "".join(pieces) == "Ġcalculate"
    assert [len(piece) for piece in pieces] == [len(token) for token in tokens]


@pytest.mark.parametrize("kind", ["bytes", "metaspace"])
def test_a_space_that_is_a_token_of_its_own_belongs_to_the_word_after_it(tmp_path, monkeypatch, kind):
    row = {"normal": "Please calculate the sum: 7 + 5 =", "swap": "Please zcalculate teh sum: 7 + 5 ="}
    monkeypatch.setattr("test_inference_split.ROWS", [row])
    reader = reader_of(tmp_path, kind)
    control, typo = (reader.style(style) for style in ("split@swap", "swap"))
    own, other = (reader.prompt(style, 0) for style in (control, typo))
    words = [reader.tokenizer.convert_ids_to_tokens(one.input_ids) for one in (own, other)]
    space = words[1].index("z") - 1
    assert words[0][space] == words[1][space] in ("Ġ", "▁")
    assert all(one.region_mask[space, control.names.index("edited")] for one in (own, other))
    assert len(own.input_ids) == len(other.input_ids)


def test_words_side_by_side_are_matched_one_by_one(tmp_path):
    """The total could be had by cutting one word only."""
    reader = reader_of(tmp_path, "bytes")
    clean, typo = "See the answer market", "See teh asnwer amrket"
    assert ROWS[7] == {"normal": clean, "swap": typo}
    control, style = reader.style("split@swap"), reader.style("swap")
    counts = []
    for one in (control, style):
        prompt = reader.prompt(one, [i for i, _ in one.texts].index(7))
        tokens = reader.tokenizer.convert_ids_to_tokens(prompt.input_ids)
        starts = [0, *(i for i, token in enumerate(tokens) if token.startswith("Ġ"))]
        counts.append([b - a for a, b in itertools.pairwise([*starts, len(tokens)])])
    assert counts[0] == counts[1]


def test_a_cut_inside_a_character_shows(tmp_path):
    reader = reader_of(tmp_path, "bytes")
    control = dict(reader.style("split@swap").texts)[1]
    pieces = control[control.index("three ") + 6 : control.index(" numbers")]
    assert CUT in pieces
    assert pieces.replace(CUT, "") == "naïve"


def test_a_tokenizer_that_words_cannot_be_cut_for_has_no_controls(tmp_path):
    """WordPiece writes a piece inside a word in another way."""
    control = reader_of(tmp_path, "wordpiece").style("split@swap")
    reader = reader_of(tmp_path, "wordpiece")
    for place, (index, shown) in enumerate(control.texts):  # only where the typo has as many tokens as the word
        clean = reader.style("normal")
        assert reader.prompt(control, place).input_ids == reader.prompt(clean, index).input_ids
        assert shown == ROWS[index]["normal"]
    assert control.unmatched >= 4


def test_best_cuts_are_the_nearest_of_all_that_the_vocabulary_allows():
    chance = random.Random(3)
    compared = 0
    for _ in range(400):
        length = chance.randint(1, 8)
        pieces = {span: 0 for span in itertools.combinations(range(length + 1), 2) if chance.random() < 0.6}
        wanted = sorted(chance.uniform(0, length) for _ in range(chance.randint(0, 4)))
        possible = [
            cuts
            for cuts in itertools.combinations(range(1, length), len(wanted))
            if all(edge in pieces for edge in zip((0, *cuts), (*cuts, length), strict=True))
        ]
        found = best_cuts(pieces, length, wanted)
        assert (found is None) == (not possible)
        if found is not None:
            assert tuple(found) in possible
            cost = [sum(abs(a - b) for a, b in zip(cuts, wanted, strict=True)) for cuts in (found, *possible)]
            assert cost[0] == pytest.approx(min(cost))
            compared += len(possible) > 1
    assert compared > 50


def test_long_prompts_with_a_typo_in_every_word_are_cut_in_time_that_grows_with_their_length(tmp_path, monkeypatch):
    """Every word has its own search: how many pieces are looked at grows with the number of words, not its square."""
    from capture import matched_split

    looked = []
    monkeypatch.setattr(
        matched_split, "best_cuts", lambda pieces, *rest: looked.append(len(pieces)) or best_cuts(pieces, *rest)
    )
    totals = []
    for count in (20, 80):
        path = tmp_path / f"{count}.json"
        row = {"normal": " ".join(["calculate"] * count), "swap": " ".join(["caclulate"] * count)}
        path.write_text(json.dumps([row]), encoding="utf-8")
        reader = PromptReader(read_prompt_file(path), tiny_models.tokenizer("bytes"), Rendering(), 2000, None)
        looked.clear()
        assert len(reader.style("split@swap").texts) == 1
        totals.append(sum(looked))
    assert totals[1] == pytest.approx(4 * totals[0], rel=0.1)


def arguments(model_dir, path, output, *keys, batch="1"):
    own = ["--model_name", model_dir, "--prompt_file", str(path), "--output_dir", str(output)]
    return [*own, "--max_new_tokens", "4", "--batch_size", batch, "--prompt_keys", *keys]


def rows_of(folder, style):
    run = open_run(folder)
    return {row["original_index"]: row for _, content in run.batches(style) for row in unpack_rows(content)}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return tiny_models.save(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.json"
    path.write_text(json.dumps(ROWS[:6]), encoding="utf-8")
    return path


def test_a_run_has_the_control_beside_its_style(model_dir, path, tmp_path, capsys):
    assert attn_act_logi.main(arguments(model_dir, path, tmp_path / "run", "all", "split@swap")) == 0
    assert list(open_run(tmp_path / "run").styles) == ["normal", "swap", "split@swap"]
    clean, typo, own = (rows_of(tmp_path / "run", style) for style in ("normal", "swap", "split@swap"))
    assert own.keys() == typo.keys() - {4} == clean.keys() - {4, 5}
    for index, row in own.items():
        assert row["final_prediction"].startswith(ROWS[index]["normal"])
        assert row["prompt"].replace(CUT, "") == ROWS[index]["normal"]
        counts = [int(one["region_mask"][:, -1].sum()) for one in (row, typo[index])]
        assert counts[0] == counts[1]
    settings = open_run(tmp_path / "run").settings("split@swap")["settings"]
    assert settings["style"] == "split@swap"
    # Other batches, and a second call that adds the control to a run that is there: the same numbers.
    assert attn_act_logi.main(arguments(model_dir, path, tmp_path / "more", "all", batch="3")) == 0
    assert attn_act_logi.main(arguments(model_dir, path, tmp_path / "more", "split@swap", batch="3")) == 0
    for index, row in rows_of(tmp_path / "more", "split@swap").items():
        assert torch.equal(row["input_ids"], own[index]["input_ids"])
        assert row["response"] == own[index]["response"]
        torch.testing.assert_close(
            row["hidden_pooled"], own[index]["hidden_pooled"], rtol=2e-4, atol=2e-4, equal_nan=True
        )


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["split@normal"], "a control needs a clean form and another style"),
        (["split@nope"], "no row has the key 'nope'"),
        (["split@"], "no row has the key 'split@'"),
        (["normal", "split@split@swap"], "no row has the key 'split@swap'"),
    ],
)
def test_controls_that_there_cannot_be_are_told_in_one_line(model_dir, path, tmp_path, keys, message):
    with pytest.raises(UserError, match=message) as caught:
        attn_act_logi.main(arguments(model_dir, path, tmp_path / "run", *keys))
    assert "\n" not in str(caught.value)


def test_a_file_cannot_name_its_own_style_like_a_control(model_dir, tmp_path):
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps([{"normal": "one two", "split@swap": "one tow"}]), encoding="utf-8")
    with pytest.raises(UserError, match="the key 'split@swap' cannot name a folder; rename it"):
        attn_act_logi.main(arguments(model_dir, path, tmp_path / "run", "all"))
