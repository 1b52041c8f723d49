"""Reward scores: raw logits of real classifiers made here, one by one; files; the notebook interface."""

from __future__ import annotations

import json
import logging
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from command_line import UserError
from score_scripts import load_reward_model, main, score_predictions_and_save
from semantics.reward_models import as_reward_model
from semantics.rewards import aggregate
from synthetic_run import prompt_rows, write_run
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForSequenceClassification,
    pipeline,
)

# Ends with the end-of-turn token, which is eos.
CHATML = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' }}{% endfor %}"
CHATML_BOS = "{{ '<|bos|>' }}" + CHATML
PAIRS = [
    ("What is 2 + 2?", "4"),
    ("What is 2 + 2?", "It is four, since two and two make four, and that is that. " * 2),
    ("Name a colour", ""),
    ("Why?", "Because <|im_end|> is a token.<|im_end|>"),
    ("Ünïcode 🎉?", "naïve façade — yes"),
]


def byte_tokenizer(specials: list[str], **settings: Any) -> PreTrainedTokenizerFast:
    vocabulary = {token: i for i, token in enumerate(specials)}
    for character in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[character] = len(vocabulary)
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(specials)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **settings)


def pair_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer(
        ["[PAD]", "[CLS]", "[SEP]", "[UNK]"],
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return tokenizer


def chat_tokenizer(pad: str, template: str = CHATML, adds_bos: bool = False) -> PreTrainedTokenizerFast:
    specials = ["<|pad|>", "<|im_start|>", "<|im_end|>", "<|bos|>"]
    tokenizer = byte_tokenizer(specials, pad_token=pad, eos_token="<|im_end|>", bos_token="<|bos|>")
    tokenizer.chat_template = template
    if adds_bos:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<|bos|> $A", special_tokens=[("<|bos|>", 3)]
        )
    return tokenizer


def save(folder: Path, model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast) -> str:
    # Weights of a usual size: logits far from 0, where a sigmoid would show.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def deberta(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    config = DebertaV2Config(
        vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, num_labels=1,
        relative_attention=True, position_buckets=16, pos_att_type=["p2c", "c2p"], max_position_embeddings=128,
        pooler_hidden_size=32, type_vocab_size=2, norm_rel_ebd="layer_norm", share_att_key=True, pad_token_id=0,
    )  # fmt: skip
    return save(tmp_path_factory.mktemp("deberta"), DebertaV2ForSequenceClassification(config).eval(), pair_tokenizer())


def qwen_like(folder: Path, pad: str, template: str = CHATML, adds_bos: bool = False, **extra: int) -> str:
    torch.manual_seed(1)
    tokenizer = chat_tokenizer(pad, template, adds_bos)
    config = Qwen2Config(
        vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, num_labels=1, max_position_embeddings=512, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=2, bos_token_id=3, **extra,
    )  # fmt: skip
    return save(folder, Qwen2ForSequenceClassification(config).eval(), tokenizer)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> str:
    return qwen_like(tmp_path_factory.mktemp("qwen"), "<|pad|>")


@pytest.fixture(scope="module")
def qwen_pad_is_eos(tmp_path_factory: pytest.TempPathFactory) -> str:
    return qwen_like(tmp_path_factory.mktemp("qwen_eos"), "<|im_end|>")


def scores_of(rm, pairs=PAIRS, **options) -> np.ndarray:
    return np.array([score.reward_score for score in rm(pairs, **options)])


# --- scores equal the model's own logits


def test_pair_model_gives_its_own_logits(deberta: str):
    rm = load_reward_model(deberta, device=-1)
    model = DebertaV2ForSequenceClassification.from_pretrained(deberta).eval()
    tokenizer = pair_tokenizer()
    with torch.no_grad():
        own = [
            model(**tokenizer(q, a, return_tensors="pt", truncation=True, max_length=128)).logits[0, 0].item()
            for q, a in PAIRS
        ]
    assert rm.kind == "pair"
    np.testing.assert_allclose(scores_of(rm, batch_size=5), own, rtol=0, atol=2e-5)
    np.testing.assert_allclose(scores_of(rm, batch_size=1), own, rtol=0, atol=2e-5)
    # A sigmoid, or any other squashing into [0, 1], would be far from this.
    assert np.abs(np.array(own) - 1 / (1 + np.exp(-np.array(own)))).max() > 0.1
    assert np.ptp(own) > 0.05


@pytest.mark.parametrize("which", ["qwen", "qwen_pad_is_eos"])
def test_chat_model_reads_its_score_at_the_last_real_token(which: str, request: pytest.FixtureRequest):
    folder = request.getfixturevalue(which)
    rm = load_reward_model(folder, device="cpu")
    model = Qwen2ForSequenceClassification.from_pretrained(folder).eval()
    own = []
    for question, answer in PAIRS:
        text = f"<|im_start|>user\n{question}<|im_end|><|im_start|>assistant\n{answer}<|im_end|>"
        ids = torch.tensor([rm.tokenizer(text, add_special_tokens=False).input_ids])
        with torch.no_grad():
            hidden = model.model(ids).last_hidden_state
            own.append(model.score(hidden)[0, -1, 0].item())  # the last token, whatever it is
    assert rm.kind == "chat"
    for batch_size in (1, 2, 5):
        np.testing.assert_allclose(scores_of(rm, batch_size=batch_size), own, rtol=0, atol=2e-5)
    assert rm.model.config.pad_token_id != rm.tokenizer.eos_token_id


def test_naive_scoring_with_eos_as_pad_would_be_wrong(qwen_pad_is_eos: str):
    """The trap is real: the plain forward passes over the text's own last token."""
    rm = load_reward_model(qwen_pad_is_eos, device=-1)
    model = Qwen2ForSequenceClassification.from_pretrained(qwen_pad_is_eos).eval()
    text = "<|im_start|>user\nWhy?<|im_end|><|im_start|>assistant\nSo.<|im_end|>"
    with torch.no_grad():
        naive = model(**rm.tokenizer(text, return_tensors="pt")).logits[0, 0].item()
    assert abs(rm([("Why?", "So.")])[0].reward_score - naive) > 1e-3


def test_absolute_positions_and_right_padding(tmp_path: Path):
    """GPT-2 counts positions from the first slot: padding on the left would move every text."""
    torch.manual_seed(2)
    config = GPT2Config(
        vocab_size=300, n_embd=32, n_layer=2, n_head=2, n_positions=256, num_labels=1, pad_token_id=2, eos_token_id=2
    )
    folder = save(tmp_path, GPT2ForSequenceClassification(config).eval(), chat_tokenizer("<|im_end|>"))
    rm = load_reward_model(folder, device=-1)
    rm.tokenizer.padding_side = "left"  # as a tokenizer made for generation comes
    np.testing.assert_allclose(scores_of(rm, batch_size=5), scores_of(rm, batch_size=1), rtol=0, atol=2e-5)


@pytest.mark.parametrize("adds_bos", [True, False])
def test_exactly_one_bos(tmp_path: Path, adds_bos: bool):
    rm = load_reward_model(qwen_like(tmp_path, "<|pad|>", CHATML_BOS, adds_bos), device=-1)
    ids = rm._chat_ids("question", "answer")
    assert ids[0] == 3
    assert ids.count(3) == 1


USER_ONLY = "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}<|im_end|>"
LAST_ONLY = "{{ messages[-1]['content'] }}<|im_end|>"
PARTS = "{% for m in messages %}{{ m['content'][0]['text'] }}{% endfor %}<|im_end|>"
DATES = {
    "called": "Today Date: {{ strftime_now('%d %b %Y') }} ",
    "called if there": "{% if strftime_now is defined %}Today: {{ strftime_now('%Y-%m-%d') }} {% endif %}",
    "set": "{% if strftime_now is defined %}{% set date_string = strftime_now('%d') %}{% endif %}{{ date_string }} ",
    "given": "{% if date_string is undefined %}{% set date_string = strftime_now('%Y') %}{% endif %}{{ date_string }} ",
}


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('assistant turns are not supported') }}", "refuses .*assistant turns are not supported"),
        ("{% for m in messages %}{{ m['content'] + m['name'] }}{% endfor %}", "refuses a question with an answer"),
        ("{% for m in messages %}{{ m['content'] }", "refuses a question with an answer"),
        (USER_ONLY, "does not show the answer"),
        (PARTS, "does not show the answer"),
        ("{{ messages[0]['content'] }}", "does not show the answer"),
        ("{% for m in messages %}{{ m['role'] }}{% endfor %}", "does not show the answer"),
        (LAST_ONLY, "does not show the question"),
    ],
)
def test_a_template_that_hides_a_text_or_refuses_is_one_line(
    tmp_path: Path, run_folder: Path, template: str, message: str
):
    folder = qwen_like(tmp_path / "rm", "<|pad|>", template)
    with pytest.raises(UserError, match=message) as told:
        main(["--run_dir", str(run_folder), "--results_dir", str(tmp_path / "out"), "--rm_name", folder])
    assert "\n" not in str(told.value)
    assert not (tmp_path / "out" / "normal_scores.csv").exists()


def test_a_tokenizer_that_reads_all_answers_alike_is_one_line(tmp_path: Path):
    tokenizer = pair_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(Regex(".+"), "?")  # as unknown characters would be
    config = BertConfig(vocab_size=300, hidden_size=32, num_hidden_layers=1, intermediate_size=32, num_labels=1,
                        num_attention_heads=2)  # fmt: skip
    folder = save(tmp_path, BertForSequenceClassification(config), tokenizer)
    with pytest.raises(UserError, match="tokenizer does not show the answer"):
        load_reward_model(folder, device=-1)


@pytest.mark.parametrize("how", DATES)
def test_a_template_prints_the_date_of_stage_2(tmp_path: Path, how: str):
    rm = load_reward_model(qwen_like(tmp_path, "<|pad|>", DATES[how] + CHATML), device=-1)
    assert "26 Jul 2024 " in rm.tokenizer.decode(rm._chat_ids("q", "a"))


def test_one_conversation_that_the_template_refuses_is_a_note(tmp_path: Path, run_folder: Path):
    picky = "{% if not messages[1]['content'] %}{{ raise_exception('empty turn') }}{% endif %}" + CHATML
    folder = qwen_like(tmp_path / "rm", "<|pad|>", picky)
    arguments = ["--run_dir", str(run_folder), "--results_dir", str(tmp_path), "--rm_name", folder, "--device", "-1"]
    assert main(arguments) == 1
    scores = pd.read_csv(tmp_path / "main_scores.csv").set_index("original_index")
    assert scores.index[scores["reward_score"].isna()].tolist() == [3]
    assert "empty turn" in scores.loc[3, "note"]


# --- truncation


def test_pair_truncation_is_counted_and_matches_the_tokenizer(deberta: str):
    rm = load_reward_model(deberta, device=-1)
    assert rm.max_length == 128
    long = ("a question", "word " * 100)
    short, cut = rm([("a question", "word"), long])
    assert (short.truncated, cut.truncated) == (False, True)
    model = DebertaV2ForSequenceClassification.from_pretrained(deberta).eval()
    with torch.no_grad():
        inputs = pair_tokenizer()(*long, truncation=True, max_length=128, return_tensors="pt")
        assert inputs["input_ids"].shape[1] == 128
        assert math.isclose(cut.reward_score, model(**inputs).logits.item(), abs_tol=2e-5)


def test_chat_truncation_keeps_the_end_of_the_template(qwen: str):
    rm = load_reward_model(qwen, device=-1, max_length=60)
    inputs, cut, _ = rm._encode_chat("why?", "because " * 50)
    text = rm.tokenizer.decode(inputs["input_ids"])
    assert cut
    assert len(inputs["input_ids"]) == 60
    assert text.startswith("<|im_start|>user\nwhy?<|im_end|><|im_start|>assistant\nbecause because")
    assert text.endswith("<|im_end|>")
    around = len(rm._chat_ids("", ""))
    alone, no_room, room = rm([("why?" * 40, "so"), ("y" * (60 - around), "so"), ("y" * (59 - around), "so")])
    assert math.isnan(alone.reward_score)
    assert "question alone exceeds 60 tokens" in alone.note
    assert math.isnan(no_room.reward_score)  # else every answer to this question would have one score
    assert "no room for the answer in 60 tokens" in no_room.note
    assert room.truncated
    assert not math.isnan(room.reward_score)


# --- loading


def test_device_that_is_not_there_is_told_once(deberta: str, capsys: pytest.CaptureFixture[str]):
    missing = torch.cuda.device_count() + 7
    for device in (missing, f"cuda:{missing}", torch.device("cuda", missing)):
        rm = load_reward_model(deberta, device=device)
        assert rm.model.device.type == "cpu"
        assert capsys.readouterr().err.count("runs on the CPU") == 1
    load_reward_model(deberta, device="cpu")
    load_reward_model(deberta, device=-1)
    load_reward_model(deberta, device=torch.device("cpu"))
    assert "CPU" not in capsys.readouterr().err
    with pytest.raises(UserError, match="is no device"):
        load_reward_model(deberta, device="gpu zero")


def test_models_that_are_no_reward_models_are_refused(tmp_path: Path):
    torch.manual_seed(0)
    small = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 32}
    language_model = save(
        tmp_path / "lm",
        LlamaForCausalLM(LlamaConfig(**small, num_attention_heads=2, num_labels=1)),
        chat_tokenizer("<|pad|>"),
    )
    with pytest.raises(UserError, match=r"no weights for score\.weight"):
        load_reward_model(language_model, device=-1)
    bert = BertConfig(**small, num_attention_heads=2, num_labels=2)
    two_labels = save(tmp_path / "two", BertForSequenceClassification(bert), pair_tokenizer())
    with pytest.raises(UserError, match="gives 2 labels"):
        load_reward_model(two_labels, device=-1)
    tokenizer = chat_tokenizer("<|pad|>")
    tokenizer.chat_template = None
    config = LlamaConfig(**small, num_attention_heads=2, num_labels=1)
    untold = save(tmp_path / "untold", LlamaForSequenceClassification(config), tokenizer)
    with pytest.raises(UserError, match="without a chat template"):
        load_reward_model(untold, device=-1)
    with pytest.raises(UserError, match="cannot be loaded as a reward model") as told:
        load_reward_model(str(tmp_path / "nowhere"), device=-1)
    assert "\n" not in str(told.value)


# --- the notebook's two functions


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = prompt_rows(7, ["swap", "main"], templates=3)
    rows[2]["swap"] = rows[2]["normal"]  # a variant that changes nothing

    def answer(row: dict, style: str, index: int) -> None:
        row["response"] = "" if (style, index) == ("main", 3) else f"{style} says {index * 7}, more or less\nYes."

    return write_run(tmp_path_factory.mktemp("runs") / "run", rows, change=answer, rows_per_file=3)


def test_notebook_interface(run_folder: Path, deberta: str, tmp_path: Path):
    rm_pipeline = load_reward_model(deberta, device=0)
    raw_csv_path, agg_base_path = tmp_path / "swap_scores.csv", tmp_path / "swap_aggregates"
    pt_dir = run_folder / "swap"
    scored_list = score_predictions_and_save(
        pt_dir=pt_dir, rm_pipeline=rm_pipeline, raw_csv_path=raw_csv_path, agg_base_path=agg_base_path
    )
    prompts = json.loads((run_folder / "prompts.json").read_text())
    assert [item["original_index"] for item in scored_list] == list(range(7))
    alone = [
        rm_pipeline([(row["normal"], f"swap says {i * 7}, more or less\nYes.")])[0].reward_score
        for i, row in enumerate(prompts)
    ]
    np.testing.assert_allclose([item["reward_score"] for item in scored_list], alone, atol=2e-5)
    table = pd.read_csv(raw_csv_path)
    assert list(table.columns[:3]) == ["style", "original_index", "element_index"]
    assert {"reward_score", "truncated", "score_against", "reward_model"} <= set(table.columns)
    assert set(table["score_against"]) == {"clean"}
    np.testing.assert_allclose(table["reward_score"], alone, atol=2e-5)
    told = json.loads(Path(f"{agg_base_path}.json").read_text())
    assert told["n"] == 7
    assert told["mean"] == pytest.approx(np.mean(alone), abs=2e-5)
    assert told["standard_deviation"] == pytest.approx(np.std(alone, ddof=1), abs=2e-5)
    assert told["reward_model"] == deberta
    assert "median" in Path(f"{agg_base_path}.txt").read_text()


def test_scored_against_the_style_itself(run_folder: Path, deberta: str, tmp_path: Path):
    rm = load_reward_model(deberta, device=-1)
    both = {
        against: score_predictions_and_save(
            run_folder / "swap", rm, tmp_path / "a.csv", tmp_path / "a", score_against=against
        )
        for against in ("clean", "style")
    }
    prompts = json.loads((run_folder / "prompts.json").read_text())
    for i, (clean, style) in enumerate(zip(both["clean"], both["style"], strict=True)):
        assert (clean["question"], style["question"]) == (prompts[i]["normal"], prompts[i]["swap"])
        assert style["score_against"] == "style"
        assert (clean["reward_score"] == style["reward_score"]) == (i == 2)
    with pytest.raises(UserError, match="choose clean or style"):
        score_predictions_and_save(run_folder, rm, tmp_path / "a.csv", tmp_path / "a", score_against="normal")


def test_a_run_without_clean_prompts_is_scored_against_its_own(
    deberta: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = write_run(tmp_path / "run", [{"polite": "Please add the numbers: 1 + 2 ="}] * 2)
    items = score_predictions_and_save(
        folder, load_reward_model(deberta, device=-1), tmp_path / "a.csv", tmp_path / "a"
    )
    assert {item["score_against"] for item in items} == {"style"}
    assert not any(math.isnan(item["reward_score"]) for item in items)
    assert capsys.readouterr().err.count("no clean prompts are known") == 1


def test_empty_directory_gives_an_empty_list(deberta: str, tmp_path: Path):
    rm = load_reward_model(deberta, device=-1)
    (tmp_path / "empty").mkdir()
    assert score_predictions_and_save(tmp_path / "empty", rm, tmp_path / "a.csv", tmp_path / "a") == []
    assert len(pd.read_csv(tmp_path / "a.csv")) == 0
    assert json.loads((tmp_path / "a.json").read_text())["n"] == 0
    with pytest.raises(UserError, match="no such run folder"):
        score_predictions_and_save(tmp_path / "absent", rm, tmp_path / "a.csv", tmp_path / "a")


def test_a_users_own_pipeline_gives_raw_logits(deberta: str, run_folder: Path, tmp_path: Path):
    logging.getLogger("transformers").setLevel(logging.ERROR)
    users = pipeline("text-classification", model=deberta, tokenizer=pair_tokenizer(), device="cpu")
    squashed = [
        one["score"] for one in users([{"text": q, "text_pair": a} for q, a in PAIRS], truncation=True, max_length=128)
    ]
    ours = load_reward_model(deberta, device=-1)
    np.testing.assert_allclose(scores_of(as_reward_model(users)), scores_of(ours), atol=2e-5)
    assert np.abs(scores_of(as_reward_model(users)) - squashed).max() > 0.1  # what the pipeline itself would say
    items = score_predictions_and_save(run_folder / "main", users, tmp_path / "a.csv", tmp_path / "a")
    theirs = score_predictions_and_save(run_folder / "main", ours, tmp_path / "b.csv", tmp_path / "b")
    np.testing.assert_allclose([i["reward_score"] for i in items], [i["reward_score"] for i in theirs], atol=2e-5)
    with pytest.raises(TypeError, match="load_reward_model"):
        score_predictions_and_save(run_folder, "deberta", tmp_path / "a.csv", tmp_path / "a")


# --- the script


def test_script_scores_all_styles_and_compares_them(run_folder: Path, deberta: str, tmp_path: Path):
    arguments = ["--run_dir", str(run_folder), "--results_dir", str(tmp_path), "--rm_name", deberta, "--device", "cpu"]
    assert main(arguments) == 0
    summary = pd.read_csv(tmp_path / "rewards_summary.csv").set_index("style")
    scores = {style: pd.read_csv(tmp_path / f"{style}_scores.csv") for style in ("normal", "swap", "main")}
    for style, table in scores.items():
        assert summary.loc[style, "n"] == 7
        assert summary.loc[style, "estimate"] == pytest.approx(table["reward_score"].mean(), abs=1e-6)
    paired = scores["swap"]["reward_score"] - scores["normal"]["reward_score"]
    kept = paired[scores["swap"]["original_index"] != 2]  # the unchanged variant is counted, not averaged
    assert summary.loc["swap", "n_identical"] == 1
    assert summary.loc["swap", "difference"] == pytest.approx(kept.mean(), abs=1e-6)
    assert summary.loc["main", "n_identical"] == 0
    assert set(summary["score_against"]) == {"clean"}
    assert json.loads((tmp_path / "main_aggregates.json").read_text())["n_empty_responses"] == 1
    assert (tmp_path / "rewards.png").stat().st_size > 10_000


def test_unscored_is_counted_and_tells_why(run_folder: Path, qwen: str, tmp_path: Path):
    arguments = ["--run_dir", str(run_folder), "--results_dir", str(tmp_path), "--rm_name", qwen, "--device", "-1"]
    assert main([*arguments, "--max_length", "20", "--styles", "swap", "normal"]) == 1
    table = pd.read_csv(tmp_path / "swap_scores.csv")
    assert table["reward_score"].isna().all()
    assert table["note"].str.contains("exceeds 20 tokens").all()
    assert json.loads((tmp_path / "swap_aggregates.json").read_text())["n_unscored"] == 7


def test_aggregates_equal_numpys():
    values = np.random.default_rng(0).normal(size=101).tolist()
    told = aggregate(values)
    assert told["q1"] == pytest.approx(np.percentile(values, 25))
    assert told["median"] == pytest.approx(np.median(values))
    assert (told["min"], told["max"], told["n"]) == (min(values), max(values), 101)
    assert aggregate([2.0])["standard_deviation"] is None
    assert aggregate([])["mean"] is None


def test_help_answers_without_heavy_imports():
    script = Path(__file__).parents[1] / "4_semantics_eval" / "run_scripts" / "score_scripts.py"
    done = subprocess.run(
        [sys.executable, "-X", "importtime", script, "--help"], capture_output=True, text=True, cwd="/"
    )
    assert done.returncode == 0, done.stderr
    assert "--score_against" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "argparse" in imported
    assert not {"torch", "transformers", "pandas", "matplotlib", "scipy"} & imported
