"""Stages 3 and 4 on a file of responses: the same tables as on the run that it came from, without model or .pt file."""

from __future__ import annotations

import json
from pathlib import Path

import compare_responses
import evaluate_predictions
import match_answers
import pandas as pd
import pytest
import read_predictions
from command_line import UserError
from file_output import read_csv
from given_responses import open_responses
from synthetic_run import prompt_rows, write_run
from test_semantics_answers import CITIES, answered, facts
from test_semantics_compare import embedder  # noqa: F401 (a fixture)

FROM_TENSORS = {"token_change", "cut_off", "cut_off_rate"}  # what only a run of stage 2 knows


def scored_both_ways(script, run: Path, tmp_path: Path, kind: str, *more: str) -> Path:
    """Score a run, and the CSV of its predictions; the tables must be equal. Returns the second results folder."""
    assert read_predictions.main(["--run_dir", str(run), "--csv", str(tmp_path / "given.csv")]) == 0
    assert script.main(["--run_dir", str(run), "--results_dir", str(tmp_path / "own"), *more]) == 0
    place = ["--responses_file", str(tmp_path / "given.csv"), "--prompt_file", str(run / "prompts.json")]
    assert script.main([*place, "--results_dir", str(tmp_path / "given"), *more]) == 0
    for name in ("items", "summary"):
        own, given = (read_csv(tmp_path / folder / f"{kind}_{name}.csv") for folder in ("own", "given"))
        shared = [column for column in own if column not in FROM_TENSORS]
        pd.testing.assert_frame_equal(own[shared], given[shared])
    return tmp_path / "given"


def test_numbers(tmp_path):
    rows = prompt_rows(24, ["swap", "main"], templates=6)
    rows[3].pop("main")
    answers = {"normal": 0, "swap": 1, "main": 2}
    run = answered(tmp_path / "run", rows, lambda i, style: f" {int(rows[i]['answer']) + i % (answers[style] + 1)}")
    results = scored_both_ways(evaluate_predictions, run, tmp_path, "maths")
    assert (results / "robustness_summary.csv").is_file()
    assert (results / "maths_accuracy.png").is_file()


def test_words_and_the_lines_of_a_chat(tmp_path):
    rows = facts(24, templates=6)
    run = answered(tmp_path / "run", rows, lambda i, style: f" {CITIES[(i + (style == 'swap') * (i % 3)) % 6]}.\nRome")
    scored_both_ways(match_answers, run, tmp_path, "answers")

    lines = [{"style": "normal", "original_index": i, "response": f"Sure!\n{CITIES[i % 6]}"} for i in range(24)]
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, lines)))
    place = ["--responses_file", str(tmp_path / "chat.jsonl"), "--prompt_file", str(run / "prompts.json")]
    for more, right in (([], 0.0), (["--chat"], 1.0)):
        own = ["--measure", "contains", "--results_dir", str(tmp_path / "chat"), *more]
        assert match_answers.main([*place, *own]) == 0
        assert read_csv(tmp_path / "chat" / "answers_items.csv")["correct"].mean() == right


def test_similarity_with_samples(embedder, tmp_path):  # noqa: F811
    def change(row: dict, style: str, index: int) -> None:
        row["response_samples"] = [f"the cat {style} sat {index} {sample}" for sample in range(2)]
        row["response"] = row["response_samples"][0]

    run = write_run(tmp_path / "run", prompt_rows(8, ["swap"]), change=change)
    model = ["--embedding_model", embedder.name, "--device", "cpu"]
    scored_both_ways(compare_responses, run, tmp_path, "similarity", *model)


def test_missing_rows_are_told_and_the_rest_is_scored(tmp_path, capsys, monkeypatch):
    rows = prompt_rows(12, ["swap"])
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps(rows))
    lines = [{"original_index": i, "response": rows[i]["answer"]} for i in range(12) if i not in (2, 7)]
    (tmp_path / "clean.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "typo.jsonl").write_text("\n".join([*map(json.dumps, lines), "{"]))
    files = [f"normal={tmp_path}/clean.jsonl", f"swap={tmp_path}/typo.jsonl"]
    monkeypatch.chdir(tmp_path)
    assert evaluate_predictions.main(["--responses_file", *files, "--prompt_file", str(prompts)]) == 0
    told = capsys.readouterr().err
    assert "clean.jsonl typo.jsonl: 1 of 21 rows are not used: 1 malformed (typo.jsonl row 11: cannot be read" in told
    assert "no response for 2 prompts of normal (rows 3, 8), 2 prompts of swap (rows 3, 8); the results are of" in told
    summary = read_csv(tmp_path / "results" / "clean" / "maths_summary.csv")
    assert summary["n"].tolist() == [10, 10]
    assert summary["estimate"].tolist() == [1.0, 1.0]


def test_controls_have_no_prompt_text_and_the_clean_form_again_has(tmp_path):
    rows = prompt_rows(4, ["swap"])
    (tmp_path / "p.json").write_text(json.dumps(rows))
    styles = ("swap", "split@swap", "normal@again", "normal")
    lines = [{"style": style, "original_index": 1, "response": "7"} for style in styles]
    (tmp_path / "r.json").write_text(json.dumps(lines))
    run = open_responses([str(tmp_path / "r.json")], tmp_path / "p.json")
    assert list(run.styles) == ["normal", "normal@again", "swap", "split@swap"]
    texts = {style: run.style_rows(style).texts() for style in run.styles}
    assert texts == {"normal": [rows[1]["normal"]], "normal@again": [rows[1]["normal"]], "swap": [rows[1]["swap"]],
                     "split@swap": [None]}  # fmt: skip


@pytest.mark.parametrize("script", [evaluate_predictions, match_answers, compare_responses])
def test_one_of_the_two_ways_is_to_be_given(script, tmp_path):
    both = ["--run_dir", "a", "--responses_file", "b"]
    for flags, message in (
        ([], "give --run_dir, or --responses_file with --prompt_file"),
        (both, "give --run_dir, or --responses_file with --prompt_file"),
        (both[2:], "--responses_file: needs --prompt_file"),
        ([*both[2:], "--prompt_file", "no.json"], "no.json: no such file"),
    ):
        with pytest.raises(UserError, match=message):
            script.main(flags)
