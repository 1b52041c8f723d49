"""match_answers on runs on disk: which answers are right, who scores what, and what reads the tables."""

from __future__ import annotations

import json
from pathlib import Path

import evaluate_predictions
import head_sensitivity
import match_answers
import numpy as np
import pytest
import run_pipeline
from build_report import headline_rows, verdicts_in
from command_line import UserError
from file_output import read_csv
from gold_words import BIG_WORDS, ONE_WORDS, TEN_WORDS, accepted_texts, has_words
from maths import numerals
from maths.gold import read_gold
from paired_stats import paired_difference
from semantics.answers import answer_text, match_letter, match_words, normalised, options_of
from synthetic_run import prompt_rows, write_run

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
    assert {*numerals._COUNTING_WORDS} <= {*f"{ONE_WORDS} {TEN_WORDS} {BIG_WORDS}".split()}
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


def test_the_report_and_the_heads_read_both_tables(mixed, tmp_path):
    run, results = mixed
    verdicts = verdicts_in(results)
    assert len(verdicts) == 80
    assert [verdicts["swap", index] for index in range(8)] == [
        "wrong" if index in (2, 5) else "right" for index in range(8)
    ]
    row = {row.style: row for row in headline_rows({"normal": 40, "swap": 40}, results)}["swap"]
    assert row.accuracy.estimate == 0.75
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
    assert headline_rows({"swap": 24}, tmp_path / "r")[0].accuracy.estimate == pytest.approx(1 / 3)
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
