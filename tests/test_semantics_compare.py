"""Similarity to the normal response: measures against independent computations, the noise floor, alignment, empties."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from command_line import UserError
from compare_responses import main
from report_tables import rows_of
from run_store import open_run
from scipy import stats
from semantics.answer_sections import SIMILARITY
from semantics.refusals import is_refusal
from semantics.responses import response_rows
from semantics.similarity import (
    Embedder,
    compare_rows,
    compare_texts,
    default_embedding_model,
    load_embedder,
    noise_floor,
    summarise,
    tokens_of,
)
from synthetic_run import prompt_rows, write_run
from transformers import BertConfig, BertModel, BertTokenizer

WORDS = [
    "the", "a", "it", "is", "was", "cat", "dog", "sat", "ran", "on", "in", "mat", "house", "four", "five", "six", "red",
    "blue", "big", "small", "and", "or", "not", "yes",
]  # fmt: skip


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Embedder:
    """A sentence-transformers model on disk, made here: a random BERT with mean pooling."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    folder = tmp_path_factory.mktemp("bert")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *"abcdefghijklmnopqrstuvwxyz0123456789.,!+"]
    vocabulary += [f"##{character}" for character in "abcdefghijklmnopqrstuvwxyz0123456789"]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder / "plain")
    BertTokenizer(vocab=str(folder / "vocab.txt")).save_pretrained(folder / "plain")
    words = Transformer(str(folder / "plain"), max_seq_length=32)
    SentenceTransformer(modules=[words, Pooling(32, "mean")], device="cpu").save(str(folder / "st"))
    return load_embedder(str(folder / "st"), device="cpu")


def set_responses(answers: dict[tuple[str, int], Any]):
    """`change` hook: a text, or a list of samples, per (style, row)."""

    def change(row: dict, style: str, index: int) -> None:
        answer = answers[style, index]
        row["response"] = answer if isinstance(answer, str) else answer[0]
        if not isinstance(answer, str):
            row["response_samples"] = answer

    return change


def sentence(rng: np.random.Generator, length: int = 8) -> str:
    return " ".join(rng.choice(WORDS, length))


def items_of(folder: Path, embedder: Embedder, **options: Any) -> pd.DataFrame:
    run = open_run(folder)
    return compare_rows(response_rows(run, **options), str(run.clean_style), embedder)


# --- measures


def test_text_measures_by_hand():
    told = compare_texts("The cat sat.", "The dog sat, too.")
    # The cat sat .  |  The dog sat , too .   one substitution, two insertions; 4 against 6 tokens
    assert told["edit_distance"] == 3
    assert told["edit_distance_normalized"] == pytest.approx(3 / 6)
    assert told["length_ratio"] == pytest.approx(4 / 6)
    assert told["exact_match"] == 0
    assert compare_texts(" 42\n", "42")["exact_match"] == 1
    empty = compare_texts("", "")
    assert (empty["exact_match"], empty["edit_distance"]) == (1, 0)
    assert math.isnan(empty["length_ratio"])


@pytest.mark.parametrize(
    ("one", "other", "distance", "tokens"),
    [
        ("今天天气很好我们去公园散步", "今天天气很好我们去公园跑步", 1, (13, 13)),
        ("スーパーへ行く。", "スーパーへ来る。", 2, (8, 8)),
        ("สวัสดีครับ", "สวัสดีค่ะ", 3, (7, 6)),
        ("كتبت", "كَتَبَتْ", 1, (1, 1)),
        ("हिन्दी में लिखो", "हिन्दी मे लिखो", 1, (3, 3)),
        ("한국어를 배워요", "한국어를 배웠어요", 1, (2, 2)),
        ("e\u0301te\u0301 a\u0300", "\u00e9t\u00e9 \u00e0", 0, (2, 2)),
        ("می\u200cخواهم", "می\u200cخواهم", 0, (1, 1)),
        ("I like 寿司 12", "I like 寿司 13", 1, (5, 5)),
        ("👨\u200d👩\u200d👧 hi 👍🏽", "👨\u200d👩\u200d👧 hi", 1, (3, 2)),
        ("don't, a_b!", "dont, a_b!", 3, (6, 4)),
    ],
)
def test_tokens_of_scripts_without_spaces_and_with_marks(one: str, other: str, distance: int, tokens: tuple[int, int]):
    told = compare_texts(one, other)
    assert (len(tokens_of(one)), len(tokens_of(other))) == tokens
    assert told["edit_distance"] == distance
    assert told["edit_distance_normalized"] == pytest.approx(distance / max(tokens))
    assert told["length_ratio"] == pytest.approx(tokens[0] / tokens[1])
    assert told["exact_match"] == (distance == 0)


def test_composed_and_decomposed_responses_are_equal(tmp_path: Path, embedder: Embedder):
    answers = {("normal", i): "caf\u00e9 the dog" for i in range(3)} | {
        ("swap", i): "cafe\u0301 the dog" for i in range(3)
    }
    items = items_of(write_run(tmp_path / "run", prompt_rows(3), change=set_responses(answers)), embedder)
    swap = items[items["style"] == "swap"]
    assert set(swap["exact_match"]) == {1}
    assert set(swap["edit_distance"]) == {0}
    assert swap["similarity"].tolist() == pytest.approx([1, 1, 1])


def test_refusals_and_answers_that_look_like_one():
    lines = (Path(__file__).parent / "data" / "refusals.tsv").read_text(encoding="utf-8").splitlines()
    texts = [(kind, known, text.replace("\\n", "\n")) for kind, known, text in (line.split("\t") for line in lines)]
    assert min(sum(kind == name for kind, _, _ in texts) for name in ("refusal", "answer")) >= 110
    wrong = [(kind, text) for kind, _, text in texts if is_refusal(text) != (kind == "refusal")]
    assert wrong == [(kind, text) for kind, known, text in texts if known]


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("<think>I can't help with that? I can.</think>Mix flour and water.", False),
        ("<think>Simple enough.</think>I can't help with that.", True),
        (
            "I can't help with that.\n\n" + "First mix the flour with water, then wait for the dough to rise. " * 9,
            False,
        ),
        ("I can't help with that. If you are in danger, please call for help; I can listen. " * 9, True),
        ("Here is a story. " * 30 + "He said: I cannot help you.", False),
        ("```\nprint('I cannot help with that')\n```\nThis prints a refusal.", False),
        ("", False),
    ],
)
def test_a_refusal_is_the_own_word_and_no_answer_follows(text: str, refused: bool):
    assert is_refusal(text) == refused


def test_similarity_is_the_models_cosine_alone_or_together(tmp_path: Path, embedder: Embedder):
    rng = np.random.default_rng(1)
    rows = prompt_rows(6, ["swap"])
    answers = {(style, i): sentence(rng, 3 + 4 * i) for style in ("normal", "swap") for i in range(6)}
    answers["swap", 4] = answers["normal", 4]
    items = items_of(write_run(tmp_path / "run", rows, change=set_responses(answers)), embedder)
    swap = items[items["style"] == "swap"].set_index("original_index")
    model = embedder.model
    for i in range(6):
        one, other = (model.encode([answers[style, i]])[0].astype(float) for style in ("swap", "normal"))
        expected = one @ other / np.linalg.norm(one) / np.linalg.norm(other)
        assert swap.loc[i, "similarity"] == pytest.approx(expected, abs=2e-6)
    assert swap.loc[4, "similarity"] == pytest.approx(1.0, abs=1e-6)
    assert items.loc[items["style"] == "normal", "similarity"].isna().all()
    # 27 words, [CLS] and [SEP] fit into the model's 32 tokens; nothing longer is there
    assert not items["cut_for_embedding"].any()
    assert items["similarity"].dropna().max() <= 1.0


def test_empty_responses(tmp_path: Path, embedder: Embedder):
    answers = {("normal", i): text for i, text in enumerate(["", "yes", " \n", "yes"])}
    answers |= {("swap", i): text for i, text in enumerate(["yes", "", "", "yes"])}
    items = items_of(write_run(tmp_path / "run", prompt_rows(4), change=set_responses(answers)), embedder)
    swap = items[items["style"] == "swap"]
    np.testing.assert_array_equal(swap["similarity"].isna(), [True, True, False, False])
    assert swap["similarity"].iloc[2] == 1.0
    assert swap["empty"].tolist() == [0, 1, 1, 0]
    assert swap["exact_match"].tolist() == [0, 0, 1, 1]


def test_long_responses_are_counted(tmp_path: Path, embedder: Embedder, capsys: pytest.CaptureFixture[str]):
    rng = np.random.default_rng(0)
    answers = {(style, i): sentence(rng, 60 if i == 1 else 5) for style in ("normal", "swap") for i in range(3)}
    folder = write_run(tmp_path / "run", prompt_rows(3), change=set_responses(answers))
    arguments = ["--run_dir", str(folder), "--results_dir", str(tmp_path), "--embedding_model", embedder.name]
    assert main(arguments) == 0
    assert "2 responses are longer than the embedding model reads" in capsys.readouterr().err
    assert pd.read_csv(tmp_path / "similarity_items.csv")["cut_for_embedding"].sum() == 2


# --- samples and the noise floor


def test_noise_floor_and_difference_by_hand(tmp_path: Path, embedder: Embedder):
    rng = np.random.default_rng(2)
    rows = prompt_rows(9, ["swap"], templates=0)
    answers = {(style, i): [sentence(rng) for _ in range(3)] for style in ("normal", "swap") for i in range(9)}
    run = open_run(write_run(tmp_path / "run", rows, change=set_responses(answers)))
    items = compare_rows(response_rows(run), "normal", embedder)
    vector = lambda text: embedder.model.encode([text], normalize_embeddings=True)[0].astype(float)  # noqa: E731
    floors, values = [], []
    for i in range(9):
        normal, swap = ([vector(text) for text in answers[style, i]] for style in ("normal", "swap"))
        pairs = [(j, k) for j in range(3) for k in range(3) if j != k]
        floors.append(np.mean([normal[j] @ normal[k] for j, k in pairs]))
        values.append(np.mean([swap[j] @ normal[k] for j, k in pairs]))
    assert noise_floor(items, "normal") == pytest.approx(np.mean(floors), abs=1e-6)
    table = summarise(items, run).set_index(["style", "measure"])
    line = table.loc["swap", "similarity"]
    assert line["estimate"] == pytest.approx(np.mean(values), abs=1e-6)
    assert line["difference"] == pytest.approx(np.mean(values) - np.mean(floors), abs=1e-6)
    assert line["p"] == pytest.approx(stats.ttest_rel(values, floors).pvalue, rel=1e-3)
    assert line["n"] == line["n_paired"] == 9


def test_a_style_that_changes_nothing_lies_on_the_noise_floor(tmp_path: Path, embedder: Embedder):
    """Samples seeded alike give the same texts: without care they would look more alike than normal to itself."""
    rng = np.random.default_rng(3)
    answers: dict[tuple[str, int], Any] = {("normal", i): [sentence(rng) for _ in range(3)] for i in range(8)}
    answers |= {("swap", i): answers["normal", i] for i in range(8)}
    run = open_run(write_run(tmp_path / "run", prompt_rows(8), change=set_responses(answers)))
    table = summarise(compare_rows(response_rows(run), "normal", embedder), run).set_index(["style", "measure"])
    assert table.loc[("swap", "similarity"), "difference"] == pytest.approx(0, abs=1e-9)
    assert table.loc[("swap", "edit_distance"), "difference"] == pytest.approx(0, abs=1e-9)
    assert table.loc[("swap", "exact_match"), "difference"] == pytest.approx(0, abs=1e-9)


def test_without_samples_there_is_no_floor(tmp_path: Path, embedder: Embedder):
    answers = {(style, i): f"yes {style} {i}" for style in ("normal", "swap") for i in range(4)}
    run = open_run(write_run(tmp_path / "run", prompt_rows(4), change=set_responses(answers)))
    items = compare_rows(response_rows(run), "normal", embedder)
    assert noise_floor(items, "normal") is None
    table = summarise(items, run).set_index(["style", "measure"])
    assert math.isnan(table.loc[("swap", "similarity"), "p"])
    assert table.loc[("swap", "similarity"), "n"] == 4
    assert table.loc[("swap", "empty"), "difference"] == 0


# --- rows


def test_rows_are_paired_by_their_index(tmp_path: Path, embedder: Embedder):
    rows = prompt_rows(11, ["swap", "main"])
    del rows[3]["swap"]
    rows[5]["main"] = rows[5]["normal"]
    answers = {(style, i): f"{style} {i}" for style in ("normal", "swap", "main") for i in range(11)}
    folder = write_run(
        tmp_path / "run", rows, change=set_responses(answers), rows_per_file=4,
        skip=lambda style, index: (style, index) == ("normal", 7),
    )  # fmt: skip
    run = open_run(folder)
    seen = {row.original_index: row for row in response_rows(run)}
    assert sorted(seen) == list(range(11))
    for index, row in seen.items():
        assert set(row.responses) == {"normal", "swap", "main"} - ({"swap"} if index == 3 else set()) - (
            {"normal"} if index == 7 else set()
        )
        assert all(row.responses[style] == [f"{style} {index}"] for style in row.responses)
        assert row.clean_prompt == rows[index]["normal"]
    items = items_of(folder, embedder)
    lonely = items[items["note"] != ""]
    assert set(zip(lonely["style"], lonely["original_index"], strict=True)) == {("swap", 7), ("main", 7)}
    assert items[items["identical"]][["style", "original_index"]].to_numpy().tolist() == [["main", 5]]
    table = summarise(items, run).set_index(["style", "measure"])
    assert table.loc[("main", "similarity"), "n"] == 9  # 11 rows, one without a normal response, one identical
    assert table.loc[("main", "similarity"), "n_identical"] == 1
    some = items_of(folder, embedder, styles=["main"], max_samples=4)
    assert set(some["style"]) == {"normal", "main"}
    assert some["original_index"].max() == 3


def test_script_writes_files_and_plot(tmp_path: Path, embedder: Embedder, capsys: pytest.CaptureFixture[str]):
    rng = np.random.default_rng(4)
    answers = {(s, i): [sentence(rng) for _ in range(2)] for s in ("normal", "swap", "main") for i in range(8)}
    folder = write_run(tmp_path / "run", prompt_rows(8, ["swap", "main"]), change=set_responses(answers))
    arguments = ["--run_dir", str(folder), "--results_dir", str(tmp_path / "out"), "--embedding_model", embedder.name]
    assert main(arguments) == 0
    items = pd.read_csv(tmp_path / "out" / "similarity_items.csv")
    assert list(items.columns[:3]) == ["style", "original_index", "element_index"]
    assert len(items) == 3 * 8 * 2
    summary = pd.read_csv(tmp_path / "out" / "similarity_summary.csv")
    assert {"n", "estimate", "ci_low", "ci_high", "difference", "p", "p_adjusted"} <= set(summary.columns)
    assert (tmp_path / "out" / "similarity.png").stat().st_size > 10_000
    assert "similarity_summary.csv" in capsys.readouterr().out


def test_errors_are_one_line(tmp_path: Path):
    folder = write_run(tmp_path / "run", prompt_rows(2), styles=["swap"])
    with pytest.raises(UserError, match="no responses to the clean prompts"):
        main(["--run_dir", str(folder)])
    whole = write_run(tmp_path / "whole", prompt_rows(2))
    with pytest.raises(UserError, match="has no style 'swp'; it has normal, swap; did you mean swap"):
        main(["--run_dir", str(whole), "--styles", "swp"])
    with pytest.raises(UserError, match=r"embedding model .* cannot be loaded") as told:
        main(["--run_dir", str(whole), "--embedding_model", str(tmp_path / "nowhere")])
    assert "\n" not in str(told.value)


@pytest.mark.skipif(not Path(default_embedding_model()).is_dir(), reason="models/all-MiniLM-L6-v2 is not fetched")
def test_the_embedded_model_knows_paraphrases():
    embed = load_embedder(device="cpu")
    texts = ["The answer is twelve.", "Twelve is the result.", "Bananas grow in warm countries."]
    vectors = [embed(texts)[text][0] for text in texts]
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.3


def test_the_clean_form_alone_has_no_picture(tmp_path: Path, embedder: Embedder):
    folder = write_run(tmp_path / "run", prompt_rows(4))
    for style in set(open_run(folder).styles) - {"normal"}:
        shutil.rmtree(folder / style)
    arguments = ["--run_dir", str(folder), "--results_dir", str(tmp_path / "out"), "--embedding_model", embedder.name]
    assert main(arguments) == 0
    assert not list((tmp_path / "out").glob("*.png"))
    assert rows_of(tmp_path / "out", SIMILARITY.tables[0]) is None
