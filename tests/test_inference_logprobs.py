"""Log-probabilities of accepted answers and of responses under other prompts, against one plain pass for each."""

from __future__ import annotations

import json
import math
from pathlib import Path

import attn_act_logi
import pytest
import tiny_models
import torch
from capture.prompts import PromptReader, Rendering
from command_line import UserError
from load_json import read_prompt_file
from pt_fields import unpack_rows
from run_store import load_pt, open_run, pt_files
from transformers import AutoModelForCausalLM

FEW_SHOT = "The sum of 3 and 4 is 7\nThe total of red apples is 12\n"
ROWS = [
    {"normal": "The colour of it is", "swap": "The cloour of it is", "answer": ["blue", "light blue now", "a"]},
    {"normal": "The quick brown fox jumps over a", "swap": "The quikc brown fox jumps over a", "answer": "dog"},
    {"normal": "The sum of 7 and 5 is", "swap": "The smu of 7 and 5 is", "answer": 12},
    {"normal": "Calculate the total cost of three red apples: 4 * 31 =", "answer": "124"},
    {"normal": "Please stop the quick", "swap": "Please sotp the quick"},
    {"swap": "At teh market is a", "answer": ["market", "red apple"]},
    {"normal": "What is the answer ", "swap": "What is teh answer", "answer": ["42.5", "naïve café"]},
]  # fmt: skip


@pytest.fixture(scope="module")
def prompt_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.json"
    path.write_text(json.dumps(ROWS), encoding="utf-8")
    path.with_suffix(".txt").write_text(FEW_SHOT, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    return {family: tiny_models.save(tmp_path_factory.mktemp(family), family) for family in ("llama", "gemma2", "gpt2")}


def run(model_dir: str, prompt_file: Path, folder: Path, *more: str) -> dict[tuple[str, int], dict]:
    """The rows of a run by style and row."""
    flags = ["--model_name", model_dir, "--prompt_file", str(prompt_file), "--output_dir", str(folder)]
    flags += ["--prompt_keys", "all", "--max_new_tokens", "5", "--few_shot_file", str(prompt_file.with_suffix(".txt"))]
    assert attn_act_logi.main([*flags, "--raw_layers", "none", *more]) == 0
    return rows_of(folder)


def rows_of(folder: Path) -> dict[tuple[str, int], dict]:
    run_ = open_run(folder)
    batches = [(style, content) for style in run_.styles for _, content in run_.batches(style)]
    return {(style, row["original_index"]): row for style, content in batches for row in unpack_rows(content)}


def plain_logprob(model, prompt_ids: torch.Tensor, ids: torch.Tensor) -> float:
    """One prompt and one continuation, one pass over both, no cache."""
    with torch.inference_mode():
        scores = model(torch.cat([prompt_ids, ids])[None], use_cache=False).logits[0].double().log_softmax(-1)
    return float(scores[len(prompt_ids) - 1 : -1].gather(1, ids[:, None]).sum())


def expected_texts(answer) -> list[str]:
    return [str(one) for one in answer] if isinstance(answer, list) else [str(answer)] if answer is not None else []


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("llama", ["--batch_size", "1", "--no_prefix_reuse"]),
        ("llama", []),
        ("llama", ["--batch_size", "3", "--temperature", "1", "--num_samples", "3"]),
        ("gemma2", []),  # a sliding window of 8, shorter than the prompts
        ("gpt2", ["--batch_size", "2"]),
    ],
)
def test_answers_and_crossed_responses_equal_a_plain_pass(models, prompt_file, tmp_path, family, more):
    found = run(models[family], prompt_file, tmp_path / "run", "--answer_logprobs", "--cross_logprobs", *more)
    model = AutoModelForCausalLM.from_pretrained(models[family], dtype=torch.float32).eval()
    tokenizer = tiny_models.tokenizer()
    for (style, index), row in found.items():
        clean = FEW_SHOT + ROWS[index].get("normal", ROWS[index].get("swap"))
        open_end = clean.endswith(" ") and style == "normal"
        texts = [text if open_end else f" {text}" for text in expected_texts(ROWS[index].get("answer"))]
        assert len(row["answer_logprobs"]) == len(texts)
        for text, logprob, count in zip(texts, row["answer_logprobs"], row["answer_token_counts"], strict=True):
            ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
            assert int(count) == len(ids)
            assert float(logprob) == pytest.approx(plain_logprob(model, row["input_ids"], ids), abs=1e-4)

        own = plain_logprob(model, row["input_ids"], row["response_ids"])
        assert float(row["response_logprobs"].sum()) == pytest.approx(own, abs=1e-4)
        if style != "normal" and ("normal", index) in found:
            normal = found["normal", index]
            there = plain_logprob(model, row["input_ids"], normal["response_ids"])
            back = plain_logprob(model, normal["input_ids"], row["response_ids"])
            assert row["normal_response_logprob"] == pytest.approx(there, abs=1e-4)
            assert row["normal_response_token_count"] == len(normal["response_ids"])
            assert row["response_logprob_under_normal"] == pytest.approx(back, abs=1e-4)
        elif style != "normal":
            assert math.isnan(row["response_logprob_under_normal"])
            assert math.isnan(row["normal_response_logprob"])


def test_restarts_batches_and_pieces_of_logits_change_nothing(models, prompt_file, tmp_path, monkeypatch):
    flags = ["--answer_logprobs", "--cross_logprobs"]
    whole = run(models["llama"], prompt_file, tmp_path / "whole", *flags)
    monkeypatch.setattr("capture.decode.LOGITS_AT_ONCE", 1)  # one position at a time
    monkeypatch.setattr("capture.batching.ROWS_PER_FILE", 2)
    run(models["llama"], prompt_file, tmp_path / "parts", *flags, "--batch_size", "2")
    swap = pt_files(tmp_path / "parts" / "swap")
    swap[1].unlink()
    swap[2].write_bytes(b"damaged")
    pt_files(tmp_path / "parts" / "normal")[0].unlink()
    parts = run(models["llama"], prompt_file, tmp_path / "parts", *flags)
    assert parts.keys() == whole.keys()
    names = ("answer_logprobs", "response_logprob_under_normal", "normal_response_logprob")
    for key, row in whole.items():
        assert torch.equal(row["answer_token_counts"], parts[key]["answer_token_counts"])
        for name in names:
            one, two = (torch.as_tensor(rows[key].get(name, math.nan)) for rows in (whole, parts))
            torch.testing.assert_close(one, two, atol=1e-4, rtol=0, equal_nan=True)


def test_what_is_not_asked_for_is_not_there(models, prompt_file, tmp_path):
    for flag, there in (("--answer_logprobs", "answer_logprobs"), ("--response_logprobs", "normal_response_logprob")):
        row = run(models["llama"], prompt_file, tmp_path / there, flag)["swap", 0]
        names = {"answer_logprobs", "response_ids", "normal_response_logprob", "response_logprob_under_normal"}
        asked = {there} | ({"response_ids"} if flag == "--response_logprobs" else set())
        assert names & row.keys() == asked
    with pytest.raises(UserError, match="--cross_logprobs: needs the clean form; name normal in --prompt_keys"):
        run(models["llama"], prompt_file, tmp_path / "swap", "--cross_logprobs", "--prompt_keys", "swap")


def test_a_file_of_rows_with_and_without_answers_is_read_back_as_it_was_packed(models, prompt_file, tmp_path):
    run(models["llama"], prompt_file, tmp_path / "run", "--answer_logprobs")
    content = load_pt(pt_files(tmp_path / "run" / "normal")[0])
    assert content["answer_logprobs"].shape == content["answer_token_counts"].shape == (6, 3)
    without = content["original_indices"].index(4)
    assert content["answer_logprobs"][without].isnan().all()
    assert not content["answer_token_counts"][without].any()
    assert (content["answer_logprobs"].isnan() == (content["answer_token_counts"] == 0)).all()


# --- tokens of an answer


def reader(tmp_path: Path, rows: list[dict], kind: str = "bytes", answer_room: int = 5, **how) -> PromptReader:
    path = tmp_path / "tokens.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return PromptReader(read_prompt_file(path), tiny_models.tokenizer(kind), Rendering(**how), 60, None, answer_room)


def answers_of(found: PromptReader, style: str) -> list[list[list[int]]]:
    prompts = found.style(style)
    return [found.prompt(prompts, position).forced["answers"] for position in range(len(prompts.texts))]


@pytest.mark.parametrize("kind", ["bytes", "metaspace", "wordpiece"])
@pytest.mark.parametrize("chat", [False, True])
def test_all_styles_of_a_row_have_the_tokens_that_continue_the_clean_form(tmp_path, kind, chat):
    rows = [{"normal": "Then please calculate", "swap": "Then please caluclate", "answer": ["Paris", "the sky"]}]
    found = reader(tmp_path, rows, kind, apply_chat_template=chat)
    clean = answers_of(found, "normal")
    assert clean == answers_of(found, "swap") == (answers_of(found, "split@swap") or clean)
    assert kind != "bytes" or answers_of(found, "split@swap")
    tokenizer = tiny_models.tokenizer(kind)
    for ids, text in zip(clean[0], ["Paris", "the sky"], strict=True):
        written = tokenizer.decode(ids)
        assert written.strip().lower() == text.lower()
        if kind == "bytes":
            assert written == (text if chat else f" {text}")


def test_an_answer_after_white_space_has_no_second_space(tmp_path):
    rows = [{"normal": "The sum is ", "swap": "The smu is ", "missing": "The sm is", "answer": "red"}]
    found = reader(tmp_path, rows)
    ids = [answers_of(found, style)[0][0] for style in ("normal", "swap", "missing")]
    assert [tiny_models.tokenizer().decode(one) for one in ids] == ["red", "red", " red"]


def test_the_space_that_a_chat_template_puts_before_an_answer(tmp_path, monkeypatch):
    template = (
        "{% for m in messages %}{{ '[I]' + m.content + '[/I]' if m.role == 'user' else ' ' + m.content }}{% endfor %}"
    )
    found = reader(tmp_path, [{"normal": "The sum is", "answer": "red"}], apply_chat_template=True)
    monkeypatch.setattr(found.tokenizer, "chat_template", template)
    assert found.tokenizer.decode(answers_of(found, "normal")[0][0]) == " red"


def test_a_prompt_must_leave_room_for_its_longest_answer(tmp_path):
    rows = [{"normal": f"{'sum ' * n}is", "answer": answer} for n, answer in ((9, "red"), (10, "red apples " * 9))]
    lengths = reader(tmp_path, rows).style("normal").lengths
    for room, left in ((5, [0]), (100, [0, 1])):
        found = reader(tmp_path, rows, answer_room=room)
        found.max_length = max(lengths)
        prompts = found.style("normal")
        assert [index for index, _ in prompts.texts] == left
        assert (prompts.longest_answer > 5) == (left == [0, 1])
        assert left == [0, 1] or "the answer leave room for" in prompts.failures[1][1]


def test_control_tokens_that_were_typed_do_not_change_the_answers_tokens(tmp_path):
    rows = [{"normal": "The </s> sum is", "swap": "The </s> smu is", "answer": "red"}]
    found = reader(tmp_path, rows)
    assert [tiny_models.tokenizer().decode(answers_of(found, style)[0][0]) for style in ("normal", "swap")] == [
        " red"
    ] * 2
