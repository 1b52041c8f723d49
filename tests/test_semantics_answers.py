"""match_answers on runs on disk: which answers are right, who scores what, and what reads the tables."""

from __future__ import annotations

import json
from pathlib import Path

import evaluate_predictions
import head_sensitivity
import match_answers
import numpy as np
import pandas as pd
import pytest
import run_pipeline
import torch
from build_report import verdicts_in
from command_line import UserError
from decomposition import share_interval
from file_output import read_csv
from gold_words import BIG_WORDS, ONE_WORDS, TEN_WORDS, accepted_texts, has_words
from maths import numerals
from maths.gold import read_gold
from paired_stats import clustered_mean, paired_difference
from report_section import read_sections
from report_tables import overview
from semantics.answers import answer_text, match_letter, match_words, normalised, options_of
from synthetic_run import prompt_rows, with_controls, write_run

CITIES = ["Paris", "Rome", "Bern", "Oslo", "Lima", "Baku"]


def facts(count: int, styles: tuple[str, ...] = ("swap",), templates: int = 0) -> list[dict]:
    """Rows whose answer is a city, or a list of its names."""
    rows = prompt_rows(count, styles, templates=templates)
    for index, row in enumerate(rows):
        city = CITIES[index % len(CITIES)]
        row["answer"] = [city, f"the city of {city}"] if index % 2 else city
    return rows


def answered(folder: Path, rows: list[dict], response) -> Path:
    """A run whose responses are `response(index, style)`."""

    def change(row, style, index):
        row["response"] = response(index, style)

    return write_run(folder, rows, change=change)


# --- normalisation and matching


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  The  Eiffel-Tower! ", "eiffeltower"),
        ("an Apple a day", "apple day"),
        ("U.S.A.", "usa"),
        ("l'Été", "lete"),
        ("Sa\u0303o Paulo", "sao paulo"),
        ("São Paulo", "sao paulo"),
        ("Straße", "strasse"),
        ("Paris/France", "paris france"),
        ("Paris—the capital", "paris capital"),
        ("**Paris**", "paris"),
        ("The", "the"),
        ("zero\u200bwidth", "zerowidth"),
        ("हिन्दी", "हिन्दी"),
        ("1,000", "1000"),
        ("?!", ""),
    ],
)
def test_normalisation(text, expected):
    assert normalised(text) == expected


@pytest.mark.parametrize(
    ("answer", "accepted", "measures"),
    [
        ("Paris", ["Paris"], (True, True, True)),
        ("paris.", ["Paris"], (True, True, True)),
        ("The Paris", ["Paris"], (True, True, True)),
        ("Paris, the capital of France", ["Paris"], (False, True, True)),
        ("Parisian style", ["Paris"], (False, False, False)),
        ("It is Paris", ["Paris"], (False, False, True)),
        ("Washington, D.C. is it", ["Washington DC", "Washington"], (False, True, True)),
        ("New York City", ["New York"], (False, True, True)),
        ("York", ["New York"], (False, False, False)),
        ("New", ["New York"], (False, False, False)),
        ("Big Apple", ["New York", "the Big Apple"], (True, True, True)),
        ("巴黎是首都", ["巴黎"], (False, True, True)),
        ("首都是巴黎", ["巴黎"], (False, False, True)),
        ("", ["Paris"], (False, False, False)),
        ("Paris", ["?!", "Paris"], (True, True, True)),
        ("Rome", ["?!"], (False, False, False)),
    ],
)
def test_three_measures(answer, accepted, measures):
    found = match_words(answer, accepted)
    assert found[:3] == measures
    assert found.value == (accepted[0] if measures[1] else normalised(answer) or None)


@pytest.mark.parametrize(
    ("response", "first_line", "expected"),
    [
        (" Paris\nThe capital of Italy is Rome", True, "Paris"),
        ("\n\n Paris\nRome", True, "Paris"),
        ("Sure!\nIt is Paris", False, "Sure!\nIt is Paris"),
        ("Paris\nQ: What is the capital of Italy?\nA: Rome", False, "Paris"),
        ("<think>Rome? No.</think>Paris", True, "Paris"),
        ("<think>Rome?", True, ""),
        ("The capital of France is the city of Paris.", True, "Paris."),
        ("The capital of Frnace is the city of Paris.", True, "Paris."),
        ("The answer is: Paris", True, "Paris"),
        ("Answer: Paris", True, "Paris"),
        ("Paris<|im_end|>\nRome", False, "Paris"),
        ("", True, ""),
    ],
)
def test_what_is_the_answer(response, first_line, expected):
    prompts = ["The capital of Frnace is the city of", "The capital of France is the city of"]
    assert answer_text(response, prompts, first_line) == expected


OPTIONS = "Which city is the capital of France? A) Rome B) Paris C) A big town D) Oslo"


def test_options_of_a_prompt():
    assert options_of(OPTIONS) == {"A": "Rome", "B": "Paris", "C": "A big town", "D": "Oslo"}
    assert options_of("Which?\n(A) Rome, Italy\n(B) Paris\nAnswer:") == {"A": "Rome, Italy", "B": "Paris"}
    assert options_of("Vitamin A. Vitamin C. What else?") == {}
    assert options_of("B) Paris C) Rome") == {}


@pytest.mark.parametrize(
    ("answer", "letter", "measures"),
    [
        ("B", "B", (True, True, True)),
        ("(b)", "B", (True, True, True)),
        ("**B.**", "B", (True, True, True)),
        ("B) Paris", "B", (False, True, True)),
        ("B Paris, of course", "B", (False, True, True)),
        ("Paris", "B", (False, True, True)),
        ("A", "A", (False, False, False)),
        ("A big town", "C", (False, False, False)),
        ("Rome or Paris", "A", (False, False, True)),
        ("I think it is B", None, (False, False, True)),
        ("Bern", None, (False, False, False)),
        ("E", None, (False, False, False)),
    ],
)
def test_letters(answer, letter, measures):
    found = match_letter(answer, "B", options_of(OPTIONS))
    assert (found.value, found[:3]) == (letter, measures)


# --- who scores what


def test_a_gold_is_scored_by_one_stage():
    """Words are never a number or expression of stage 3; what stage 3 can read is never words."""
    assert {*numerals._ONES, *numerals._TENS, *numerals._BIG, "half", "quarter"} <= {
        *f"{ONE_WORDS} {TEN_WORDS} {BIG_WORDS}".split()
    }
    texts = [
        "Paris",
        "three",
        "12",
        "8 apples",
        "twenty-one",
        "2\\sqrt{3}",
        "May 5",
        "三十五",
        "pi",
        "x",
        "E",
        "\\text{(E)}",
    ]
    texts += [
        "half past nine",
        "the answer is unknown",
        "yes",
        "B",
        "1/2",
        "(3, \\pi)",
        "France and Spain",
        "A dozen",
        "New York",
    ]
    texts += [
        "infinity",
        "north",
        "e",
        "Half",
        "Second World War",
        "XIV",
        "a = b",
        "red, white",
        "don't",
        "Три",
        "drei",
        "五月",
    ]
    for text in texts:
        assert not (accepted_texts(text) and read_gold(text).readable), text
    assert accepted_texts("Paris") == ["Paris"]
    assert accepted_texts(["three", " 3 ", ""]) == ["three", "3"]
    assert not read_gold(["three", "3"]).readable
    assert accepted_texts(3) == accepted_texts(None) == accepted_texts("three") == accepted_texts(True) == []
    assert has_words([{"answer": "3"}, {"answer": ["3"]}])
    assert not has_words([{"answer": "3"}, {}, "text"])


def test_the_columns_are_those_of_stage_3(tmp_path):
    words, numbers = facts(12), prompt_rows(12, ["swap"])
    run = answered(tmp_path / "words", words, lambda index, style: f" {CITIES[index % 6]}.\nRome")
    other = answered(tmp_path / "numbers", numbers, lambda index, style: numbers[index]["answer"])
    assert match_answers.main(["--run_dir", str(run), "--results_dir", str(tmp_path)]) == 0
    assert evaluate_predictions.main(["--run_dir", str(other), "--results_dir", str(tmp_path / "o")]) == 0
    for name in ("items", "summary", "flips", "breakdown"):
        own, theirs = (
            list(read_csv(path).columns)
            for path in (tmp_path / f"answers_{name}.csv", tmp_path / "o" / f"maths_{name}.csv")
        )
        assert [column for column in own if column not in ("exact_match", "starts_with", "contains")] == theirs
    assert (tmp_path / "answers_accuracy.png").is_file()
    assert not (tmp_path / "accuracy_summary.csv").exists()


def test_accuracy_against_a_count(tmp_path):
    """48 rows in 12 templates, planted: the summary's difference is that of the planted answers."""
    rng = np.random.default_rng(0)
    right = {style: rng.random(48) < share for style, share in (("normal", 0.8), ("swap", 0.4))}
    rows = facts(48, templates=12)
    text = {True: " {}", False: " Cairo, not {}"}
    run = answered(
        tmp_path / "run", rows, lambda index, style: text[bool(right[style][index])].format(CITIES[index % 6])
    )
    assert match_answers.main(["--run_dir", str(run), "--results_dir", str(tmp_path)]) == 0
    items = read_csv(tmp_path / "answers_items.csv")
    assert items["gold"].tolist() == [CITIES[index % 6] for index in range(48)] * 2
    assert items["correct"].tolist() == [*right["normal"], *right["swap"]]
    assert items["contains"].all()
    swap = read_csv(tmp_path / "answers_summary.csv").set_index("style").loc["swap"]
    expected = paired_difference(right["swap"], right["normal"], np.arange(48) % 12)
    assert (swap["difference"], swap["p"]) == pytest.approx((expected.mean, expected.p))
    command = ["--run_dir", str(run), "--results_dir", str(tmp_path / "c"), "--measure", "contains"]
    assert match_answers.main(command) == 0
    assert read_csv(tmp_path / "c" / "answers_summary.csv")["estimate"].tolist() == [1.0, 1.0]


def test_only_the_first_line_counts_without_a_chat_template(tmp_path):
    rows = facts(6)
    run = answered(tmp_path / "run", rows, lambda index, style: f"Cairo\n{CITIES[index % 6]}")
    settings = {"apply_chat_template": True, "few_shot_text": ""}
    for chat, expected in ((False, 0.0), (True, 1.0)):
        if chat:
            for style in ("normal", "swap"):
                path = run / style / "run.json"
                content = json.loads(path.read_text())
                path.write_text(json.dumps(content | {"settings": content["settings"] | settings}))
        assert match_answers.main(["--run_dir", str(run), "--results_dir", str(tmp_path), "--measure", "contains"]) == 0
        assert read_csv(tmp_path / "answers_summary.csv")["estimate"].tolist() == [expected] * 2


def test_a_run_without_words_is_an_error_in_one_line(tmp_path):
    run = write_run(tmp_path / "run", prompt_rows(4, ["swap"]))
    with pytest.raises(UserError, match=r"no row has an `answer` in words; .* evaluate_predictions\.py"):
        match_answers.main(["--run_dir", str(run), "--results_dir", str(tmp_path)])


# --- a file that mixes words and numbers, and what reads the tables


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> tuple[Path, Path]:
    """(run, results): 40 rows, the even ones with a number for an answer, the odd ones with words; swap is wrong in
    every fourth row."""
    folder = tmp_path_factory.mktemp("mixed")
    rows = prompt_rows(40, ["swap"])
    golds = [row["answer"] for row in rows]
    for index in range(1, 40, 2):
        rows[index]["answer"] = golds[index] = CITIES[index % 6]
    wrong = ["7777", "Cairo"]
    run = answered(
        folder / "run",
        rows,
        lambda index, style: wrong[index % 2] if style == "swap" and index % 8 in (2, 5) else golds[index],
    )
    results = folder / "results"
    for script in (evaluate_predictions, match_answers):
        assert script.main(["--run_dir", str(run), "--results_dir", str(results)]) == 0
    return run, results


def test_a_mixed_file_is_scored_by_both_stages_and_each_row_by_one(mixed):
    _, results = mixed
    numbers, words = (read_csv(results / f"{name}_items.csv") for name in ("maths", "answers"))
    assert sorted(numbers.loc[numbers["correct"].notna(), "original_index"].unique()) == list(range(0, 40, 2))
    assert sorted(words["original_index"].unique()) == list(range(1, 40, 2))
    summary = read_csv(results / "accuracy_summary.csv").set_index("style")
    assert summary["n"].tolist() == [40, 40]
    assert summary.loc["swap", "estimate"] == 0.75
    assert summary.loc["swap", "difference"] == -0.25


def shown_accuracy(results, style):
    """The accuracy of a style in the report's table over all styles."""
    headlines = [one for section in read_sections(results) for one in section["headlines"]]
    table = overview({style: 1}, headlines, results)
    return table.lines[0][table.columns.index("accuracy, %")]


def test_the_report_and_the_heads_read_both_tables(mixed, tmp_path):
    run, results = mixed
    verdicts = verdicts_in(results)
    assert len(verdicts) == 80
    assert [verdicts["swap", index] for index in range(8)] == [
        "wrong" if index in (2, 5) else "right" for index in range(8)
    ]
    assert shown_accuracy(results, "swap").startswith("75")
    assert head_sensitivity.main(["--run_dir", str(run), "--results_dir", str(results)]) == 0
    flips = read_csv(results / "head_answer_flips.csv")
    assert flips["n_flipped"].max() == 10


def test_words_alone_are_read_too(tmp_path):
    run = answered(
        tmp_path / "run",
        facts(24),
        lambda index, style: "Cairo" if style == "swap" and index % 3 else CITIES[index % 6],
    )
    assert match_answers.main(["--run_dir", str(run), "--results_dir", str(tmp_path / "r")]) == 0
    assert shown_accuracy(tmp_path / "r", "swap").startswith("33")
    assert sum(mark == "wrong" for mark in verdicts_in(tmp_path / "r").values()) == 16
    assert head_sensitivity.main(["--run_dir", str(run), "--results_dir", str(tmp_path / "r")]) == 0
    assert (tmp_path / "r" / "head_answer_flips.csv").is_file()


def test_each_stage_says_what_is_left_to_the_other(mixed, tmp_path, capsys):
    run, _ = mixed
    match_answers.main(["--run_dir", str(run), "--results_dir", str(tmp_path)])
    said = (
        "20 of 40 rows are scored: the answers of 20 are numbers or expressions, which evaluate_predictions.py scores"
    )
    assert said in capsys.readouterr().err
    evaluate_predictions.main(["--run_dir", str(run), "--results_dir", str(tmp_path)])
    assert (
        "20 of 40 rows are scored: 20 have an answer in words, which match_answers.py scores" in capsys.readouterr().err
    )


def test_stage_3_scored_anew_leaves_no_old_summary_of_both(mixed, tmp_path):
    run, _ = mixed
    for script in (evaluate_predictions, match_answers):
        script.main(["--run_dir", str(run), "--results_dir", str(tmp_path)])
    assert (tmp_path / "accuracy_summary.csv").is_file()
    evaluate_predictions.main(["--run_dir", str(run), "--results_dir", str(tmp_path)])
    assert not (tmp_path / "accuracy_summary.csv").exists()


@pytest.mark.parametrize(
    ("answers", "steps"),
    [
        (["5", "6"], {"accuracy"}),
        (["Paris", ["6"]], {"answers"}),
        (["Paris", "6"], {"accuracy", "answers"}),
        (["", ""], set()),
    ],
)
def test_the_pipeline_plans_the_stage_that_is_needed(answers, steps, tmp_path):
    rows = [{"normal": f"Say it: word {i}", "swap": f"Sya it: word {i}", "answer": a} for i, a in enumerate(answers)]
    (tmp_path / "p.json").write_text(json.dumps(rows))
    args = run_pipeline.parse_args(["--prompt_file", str(tmp_path / "p.json"), "--run_name", "x"])
    planned = {step.name: step for step in run_pipeline.steps_of(run_pipeline.jobs_of(args)[0], args)}
    assert planned.keys() & {"accuracy", "answers"} == steps
    assert {"accuracy", "answers"} <= {*planned["heads"].after}
    args.maths_items = tmp_path / "own.csv"
    own = {
        step.name
        for step in run_pipeline.steps_of(
            run_pipeline.jobs_of(
                run_pipeline.parse_args(["--prompt_file", str(tmp_path / "p.json"), "--run_name", "x"])
            )[0],
            args,
        )
    }
    assert own & {"accuracy", "answers"} == {"accuracy"}


# --- fragmentation and spelling


def cut(index: int, word: str, _: str) -> str:
    """The clean word with one cut, as a control has it."""
    return f"{word[:2]}\u00ad{word[2:]}"


def decomposed(folder: Path, wrong: dict[str, np.ndarray], kl_of_control: str) -> pd.DataFrame:
    """decomposition.csv of a run of 60 rows in 20 templates whose answers are wrong where `wrong[style]` says.

    kl_of_control: the form whose logits the control has.
    """
    rows = with_controls(facts(60, templates=20), "swap", cut)

    def change(row, style, index):
        row["response"] = "Cairo" if wrong[style][index] else CITIES[index % 6]
        form = kl_of_control if style == "split@swap" else style
        logits = np.random.default_rng(index).normal(size=5) + (form == "swap") * np.array([0, 1, 2, 0, index % 4])
        row["topk_indices"] = torch.arange(5).expand_as(row["topk_indices"]).clone()
        row["topk_vals"] = torch.tensor(logits).float().expand_as(row["topk_vals"]).clone()
        row["logsumexp"] = torch.logsumexp(row["topk_vals"], -1).reshape(row["logsumexp"].shape)

    run = write_run(folder / "run", rows, change=change)
    assert match_answers.main(["--run_dir", str(run), "--results_dir", str(folder)]) == 0
    return read_csv(folder / "decomposition.csv").set_index("measure")


def planted_harm(of_control: str) -> dict[str, np.ndarray]:
    """The clean form is wrong in every tenth row, the style in half of the rows; the control as one of them."""
    clean = np.arange(60) % 10 == 0
    style = clean | (np.random.default_rng(1).random(60) < 0.5)
    return {"normal": clean, "swap": style, "split@swap": style if of_control == "swap" else clean}


@pytest.mark.parametrize(("control_as", "share"), [("swap", 1.0), ("normal", 0.0)])
def test_planted_fragmentation_is_found_and_planted_spelling_too(tmp_path, control_as, share):
    """A model that reads the number of tokens and no letters gives a share of 1; one that reads letters alone, 0."""
    table = decomposed(tmp_path, planted_harm(control_as), control_as)
    assert table["fragmentation_share"].tolist() == pytest.approx([share, share])
    # In every row the same share: there is nothing to estimate an interval from.
    assert table[["fragmentation_share_ci_low", "fragmentation_share_ci_high"]].isna().all(axis=None)
    accuracy, kl = table.loc["accuracy"], table.loc["next_token_kl"]
    wrong = planted_harm(control_as)
    expected = paired_difference(~wrong["swap"], ~wrong["normal"], np.arange(60) % 20)
    found = accuracy[["total", "total_ci_low", "total_ci_high", "total_p"]].tolist()
    assert found == pytest.approx([expected.mean, expected.ci_low, expected.ci_high, expected.p])
    assert accuracy["total"] < -0.2
    assert kl["total"] > 0.1
    assert np.isnan(kl["total_p"])
    for line in (accuracy, kl):
        assert line["fragmentation"] + line["spelling"] == pytest.approx(line["total"])
        assert (line["n"], line["n_clusters"], line["n_without_control"]) == (60, 20, 0)


def test_no_share_of_a_total_that_is_not_clear_of_0(tmp_path):
    rng = np.random.default_rng(3)
    wrong = {style: rng.random(60) < 0.5 for style in ("normal", "swap", "split@swap")}
    line = decomposed(tmp_path, wrong, "normal").loc["accuracy"]
    assert line["total_ci_low"] < 0 < line["total_ci_high"]
    assert line[["fragmentation_share", "fragmentation_share_ci_low", "fragmentation_share_ci_high"]].isna().all()


def test_rows_without_a_control_or_with_the_clean_prompt_are_left_out(tmp_path):
    rows = with_controls(facts(30), "swap", cut)
    del rows[4]["split@swap"], rows[9]["split@swap"]
    rows[7]["swap"] = rows[7]["normal"]
    run = answered(
        tmp_path / "run", rows, lambda index, style: "Cairo" if style == "swap" and index % 2 else CITIES[index % 6]
    )
    assert match_answers.main(["--run_dir", str(run), "--results_dir", str(tmp_path)]) == 0
    table = read_csv(tmp_path / "decomposition.csv").set_index("measure")
    assert table["n"].tolist() == [27, 27]
    assert table["n_without_control"].tolist() == [2, 2]
    assert table.loc["accuracy", "total"] == pytest.approx(-13 / 27)


def test_a_tone_has_two_parts_too_length_and_tone(tmp_path, caplog):
    rows = with_controls(facts(30), "swap", cut)
    for row in rows:
        row["polite"], row["neutral@polite"] = (f"{words} {row['normal']}" for words in ("Please help.", "It rained."))
    wrong = {"polite": 2, "neutral@polite": 6, "swap": 3, "split@swap": 5}
    run = answered(
        tmp_path / "run", rows, lambda i, style: "Cairo" if style in wrong and i % wrong[style] == 0 else CITIES[i % 6]
    )
    with caplog.at_level("INFO"):
        assert match_answers.main(["--run_dir", str(run), "--results_dir", str(tmp_path)]) == 0
    table = read_csv(tmp_path / "decomposition.csv").query("measure == 'accuracy'").set_index("style")
    assert table["control"].to_dict() == {"swap": "split@swap", "polite": "neutral@polite"}
    found = table.loc["polite", ["n", "total", "fragmentation", "spelling"]].tolist()
    assert found == pytest.approx([30, -15 / 30, -5 / 30, -10 / 30])
    said = {line.partition(",")[0]: line for line in caplog.messages if "accuracy: total " in line}
    assert "length -0.167" in said["polite"]
    assert "tone -0.333" in said["polite"]
    assert "fragmentation -0.200" in said["swap"]


def test_a_mixed_file_is_decomposed_over_both_stages(tmp_path):
    rows = with_controls(prompt_rows(40, ["swap"]), "swap", cut)
    golds = [CITIES[index % 6] if index % 2 else row["answer"] for index, row in enumerate(rows)]
    for row, gold in zip(rows, golds, strict=True):
        row["answer"] = gold
    run = answered(tmp_path / "run", rows, lambda i, style: "7777" if style == "swap" and i % 5 < 2 else golds[i])
    flags = ["--run_dir", str(run), "--results_dir", str(tmp_path)]
    assert evaluate_predictions.main(flags) == 0
    assert not (tmp_path / "decomposition.csv").exists()
    assert match_answers.main(flags) == 0
    line = read_csv(tmp_path / "decomposition.csv").set_index("measure").loc["accuracy"]
    assert (line["n"], line["total"], line["fragmentation"]) == (40, -0.4, 0)


def test_stage_3_decomposes_a_file_of_numbers(tmp_path):
    rows = with_controls(prompt_rows(30, ["swap"]), "swap", cut)
    wrong = {"normal": (), "swap": range(0, 30, 2), "split@swap": range(0, 30, 6)}
    run = answered(tmp_path / "run", rows, lambda i, style: "7777" if i in wrong[style] else rows[i]["answer"])
    assert evaluate_predictions.main(["--run_dir", str(run), "--results_dir", str(tmp_path)]) == 0
    line = read_csv(tmp_path / "decomposition.csv").set_index("measure").loc["accuracy"]
    assert line["fragmentation_share"] == pytest.approx(1 / 3)
    assert line["fragmentation_share_ci_low"] < 1 / 3 < line["fragmentation_share_ci_high"]


def test_the_share_has_its_interval_in_19_of_20_runs():
    """1,000 draws of 60 clusters of two rows that are alike; the true share is 0.6."""
    rng = np.random.default_rng(5)
    inside = 0
    for _ in range(1000):
        whole = np.repeat(rng.random(60) < 0.5, 2) & (rng.random(120) < 0.9)
        part = whole & (rng.random(120) < 0.6)
        low, high = share_interval(part * 1.0, whole * 1.0, np.repeat(np.arange(60), 2))
        inside += low <= 0.6 <= high
    assert 0.93 < inside / 1000 < 0.97


def test_the_interval_of_the_share_is_where_the_test_finds_nothing():
    rng = np.random.default_rng(6)
    whole, clusters = rng.normal(1, 1, 80), np.arange(80) % 23
    part = 0.4 * whole + rng.normal(0, 1, 80)
    for end in share_interval(part, whole, clusters):
        assert clustered_mean(part - end * whole, clusters).p == pytest.approx(0.05)
    assert np.isnan(share_interval(part, whole - whole.mean(), clusters)).all()
    assert np.isnan(share_interval(0.5 * whole, whole, clusters)).all()


def test_the_log_probability_of_the_likeliest_answer_reaches_every_table(tmp_path):
    """Planted: the control takes 1 nat of it, the letters 3 more; row 5 has no accepted answer in its files."""
    rows = with_controls(facts(24, templates=8), "swap", cut)
    taken = {"normal": 0.0, "swap": 4.0, "split@swap": 1.0}

    def change(row, style, index):
        sums = torch.tensor([-9.0, -3.0 - index / 8, -4.0]) - taken[style] * (1 + index / 100)
        row["answer_logprobs"], row["answer_token_counts"] = sums, torch.tensor([1, 2, 4])
        if index == 5:
            row["answer_logprobs"], row["answer_token_counts"] = sums[:0], torch.zeros(0, dtype=torch.long)

    run = write_run(tmp_path / "run", rows, change=change)
    assert match_answers.main(["--run_dir", str(run), "--results_dir", str(tmp_path)]) == 0
    items = read_csv(tmp_path / "answers_items.csv").set_index(["style", "original_index"])
    for style, index in (("normal", 0), ("swap", 3), ("swap", 20)):
        taken_here = taken[style] * (1 + index / 100)
        line = items.loc[(style, index)]
        assert line["answer_logprob"] == pytest.approx(max(-3.0 - index / 8, -4.0) - taken_here, abs=1e-5)
        per_token = max((-3.0 - index / 8 - taken_here) / 2, (-4.0 - taken_here) / 4)
        assert line["answer_logprob_per_token"] == pytest.approx(per_token, abs=1e-5)
    assert items.loc[("swap", 5), ["answer_logprob", "answer_logprob_per_token"]].isna().all()

    kept = [index for index in range(24) if index != 5]
    shift = np.array([1 + index / 100 for index in kept])
    line = read_csv(tmp_path / "decomposition.csv").set_index("measure").loc["answer_logprob"]
    assert line["n"] == 23
    assert line[["total", "fragmentation", "spelling"]].tolist() == pytest.approx(
        [-f * shift.mean() for f in (4, 1, 3)]
    )
    assert line["fragmentation_share"] == pytest.approx(0.25)
    summary = read_csv(tmp_path / "answers_summary.csv").set_index("style").loc["swap"]
    expected = paired_difference(-4 * shift, np.zeros(23), np.array(kept) % 8)
    names = ["difference", "difference_ci_low", "difference_ci_high", "p"]
    found = summary[[f"answer_logprob_{name}" for name in names]].tolist()
    assert found == pytest.approx([expected.mean, expected.ci_low, expected.ci_high, expected.p])
    assert summary["answer_logprob_p_adjusted"] >= summary["answer_logprob_p"]
    assert summary["answer_logprob_mean"] == pytest.approx(items.loc["swap"]["answer_logprob"].mean())
