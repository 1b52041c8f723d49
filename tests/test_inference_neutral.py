"""The control `neutral@<style>`: neutral sentences of as many tokens in the place of those that a tone style adds."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import attn_act_logi
import pytest
import run_status
import tiny_models
import torch
from capture.neutral_text import NeutralSentences, neutral_sentences
from capture.prompts import PromptReader, Rendering
from command_line import UserError
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from load_json import PromptFile
from pt_fields import unpack_rows
from run_store import open_run
from token_spans import framing, render_prompt

FEW_SHOT = "Write down the answer: 3 + 4 = 7\n"
HOWS = [{}, {"few_shot": FEW_SHOT}, {"few_shot": FEW_SHOT, "apply_chat_template": True}]
ROWS = [
    {
        "normal": "Calculate the sum: 7 + 5 =",
        "polite": "Could you please help me with this? Calculate the sum: 7 + 5 =",
    },
    {"normal": "Why is the sky blue", "polite": "Why is the sky blue Thank you so much!"},
    {
        "normal": "The quick fox",
        "polite": "Many thanks for your patience.\n\nThe quick fox\nMany thanks!",
    },
    {"normal": "The sum of 3 and 4", "polite": "The sum, please, of 3 and 4"},  # within the clean form
    {"normal": "The sum of 3 and 4", "polite": "The smu of 3 and 4"},
    {"normal": "The sum of 3 and 4", "polite": "The sum of 3 and 4"},
    {"normal": "The sum of 3 and 4"},
    {"normal": "The sum of 3 and 4", "polite": "Please, The sum of 3 and 4"},  # fewer tokens than any sentence
]
MATCHED, LEFT_OUT = [0, 1, 2], 4
SENTENCES = {*neutral_sentences()}


@cache
def sentences_of(kind):
    return NeutralSentences(tiny_models.tokenizer(kind))


def reader_of(rows, kind, **how):
    counts = {key: sum(key in row for row in rows) for key in ("normal", "polite")}
    prompts = PromptFile(Path("prompts.json"), "", b"", rows, counts)
    reader = PromptReader(prompts, tiny_models.tokenizer(kind), Rendering(**how), 1000, None)
    reader._sentences = sentences_of(kind)  # counted once for all examples
    return reader


def clean_tokens(reader, prompt, clean, how):
    """(number of tokens, {place: id} of those that hold characters of the clean text) of a prompt."""
    rendered = render_prompt(reader.tokenizer, prompt, **how)
    options = {"add_special_tokens": not rendered.has_special_tokens, "return_offsets_mapping": True}
    encoded = reader.tokenizer(rendered.text, **options)
    start = rendered.own[0] + prompt.rindex(clean)
    places = {}
    for place, (number, (a, b)) in enumerate(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)):
        if rendered.text[max(a, start) : min(b, start + len(clean))].strip():
            places[place] = number
    return len(encoded["input_ids"]), places


def check_control(reader, rows, how):
    """All that a control promises, of every prompt in it; returns the rows that it has."""
    control, tone = reader.style("neutral@polite"), reader.style("polite")
    assert control.names == tone.names
    assert len(control.texts) + control.unmatched == len(tone.texts)
    for place, (index, shown) in enumerate(control.texts):
        clean, polite = rows[index]["normal"], rows[index]["polite"]
        length, places = clean_tokens(reader, shown, clean, how)
        assert (length, places) == clean_tokens(reader, polite, clean, how)
        assert control.lengths[place] == length
        own, other = (reader.prompt(style, [i for i, _ in style.texts].index(index)) for style in (control, tone))
        assert torch.equal(own.region_mask, other.region_mask)
        added = own.region_mask[:, control.names.index("edited")]
        assert added.any()
        assert not added[[*places]].any()
        for mine, theirs in zip(framing(shown, clean), framing(polite, clean), strict=True):
            assert bool(mine) == bool(theirs)
            assert not mine or mine.strip() in SENTENCES
            assert mine.replace(mine.strip(), "|") == theirs.replace(theirs.strip(), "|")  # white space at the ends
    return [index for index, _ in control.texts]


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("kind", ["bytes", "metaspace", "wordpiece"])
def test_the_clean_prompt_stands_at_the_same_places_in_as_many_tokens(kind, how):
    reader = reader_of(ROWS, kind, **how)
    assert check_control(reader, ROWS, how) == MATCHED
    assert reader.style("neutral@polite").unmatched == LEFT_OUT
    again = reader_of(ROWS, kind, **how).style("neutral@polite", 2)
    assert again.texts == reader.style("neutral@polite").texts[:2]


WORDS = st.lists(
    st.sampled_from(["the", "sum", "apples", "7", "+", "naïve", "café,", "why?", "The", "This", "There:"]), min_size=1
)
TONES = st.sampled_from(
    ["Could you please help me with this?", "Hurry, I am running out of time!", "This is urgent! There is no time.",
     "You are useless, but answer this anyway.", "I would be very grateful — thank you 😀."]
)  # fmt: skip


@pytest.mark.parametrize("kind", ["bytes", "metaspace", "wordpiece"])
@settings(max_examples=25, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(
    WORDS,
    TONES,
    st.sampled_from(["before", "after", "both"]),
    st.sampled_from([" ", "\n", "\n\n"]),
    st.sampled_from(HOWS),
)
def test_any_framing_is_matched_exactly(kind, words, tone, side, gap, how):
    clean = " ".join(words)
    polite = {"before": f"{tone}{gap}{clean}", "after": f"{clean}{gap}{tone}", "both": f"{tone} {clean}{gap}{tone}"}[
        side
    ]
    rows = [{"normal": clean, "polite": polite, "task": words[-1]}]
    assert check_control(reader_of(rows, kind, **how), rows, how) == [0]


def arguments(model_dir, path, output, *keys, batch="3"):
    own = ["--model_name", model_dir, "--prompt_file", str(path), "--output_dir", str(output)]
    return [*own, "--max_new_tokens", "4", "--batch_size", batch, "--prompt_keys", *keys]


def rows_of(folder, style):
    run = open_run(folder)
    return {row["original_index"]: row for _, content in run.batches(style) for row in unpack_rows(content)}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return tiny_models.save(tmp_path_factory.mktemp("model"))


def prompt_file(folder, rows):
    path = folder / "prompts.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def test_a_run_has_the_control_beside_its_style(model_dir, tmp_path, capsys):
    path, run = prompt_file(tmp_path, ROWS[:4]), tmp_path / "run"
    assert attn_act_logi.main(arguments(model_dir, path, run, "all", "neutral@polite", batch="1")) == 0
    assert list(open_run(run).styles) == ["normal", "polite", "neutral@polite"]
    tone, own = (rows_of(run, style) for style in ("polite", "neutral@polite"))
    assert list(own) == MATCHED
    for index, row in own.items():
        assert ROWS[index]["normal"] in row["prompt"]
        assert row["final_prediction"].startswith(row["prompt"])
        assert torch.equal(row["region_mask"], tone[index]["region_mask"])
    assert run_status.main(["--run_dir", str(run)]) == 0
    assert f"neutral@polite     {len(MATCHED)}       0        0" in capsys.readouterr().out
    # Alone, in other batches: the same numbers.
    assert attn_act_logi.main(arguments(model_dir, path, tmp_path / "more", "neutral@polite")) == 0
    for index, row in rows_of(tmp_path / "more", "neutral@polite").items():
        assert (row["prompt"], row["response"]) == (own[index]["prompt"], own[index]["response"])
        torch.testing.assert_close(
            row["hidden_pooled"], own[index]["hidden_pooled"], rtol=2e-4, atol=2e-4, equal_nan=True
        )


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["neutral@normal"], "a control needs a clean form and another style"),
        (["neutral@nope"], "no row has the key 'nope'"),
        (["neutral@split@polite"], "no row has the key 'split@polite'"),
    ],
)
def test_controls_that_there_cannot_be_are_told_in_one_line(model_dir, tmp_path, keys, message):
    with pytest.raises(UserError, match=message):
        attn_act_logi.main(arguments(model_dir, prompt_file(tmp_path, ROWS[:1]), tmp_path / "run", *keys))


@pytest.mark.parametrize("name", ["neutral@polite", "normal@again", "swap@again"])
def test_a_file_cannot_name_its_own_style_like_one_of_stage_2(model_dir, tmp_path, name):
    path = prompt_file(tmp_path, [{"normal": "one two", name: "one tow"}])
    with pytest.raises(UserError, match=f"the key '{name}' cannot name a folder; rename it"):
        attn_act_logi.main(arguments(model_dir, path, tmp_path / "run", "all"))
