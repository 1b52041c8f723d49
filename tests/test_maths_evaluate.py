"""evaluate_predictions on runs on disk: what is scored, what is compared, and what the tables say."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import evaluate_predictions as script
import numpy as np
import pandas as pd
import pytest
import torch
from accuracy_tables import accuracy_by_edits, break_down
from command_line import UserError
from maths.accuracy import evaluate_run
from maths.gold import number_text
from paired_stats import clustered_mean, holm, paired_difference
from parse_predictions import parse_prediction_text
from scipy.stats import binomtest
from scored_answers import write_evaluation
from statsmodels.stats.proportion import proportion_confint
from synthetic_run import prompt_rows, write_run

STYLES = ("normal", "swap", "polite")
SCRIPT = Path(__file__).parents[1] / "3_maths_eval" / "run_scripts" / "evaluate_predictions.py"


def _planted(rows: int = 48) -> dict[tuple[str, int], bool]:
    """Which answers are right: normal mostly, swap less often."""
    rng = np.random.default_rng(0)
    share = {"normal": 0.8, "swap": 0.5, "polite": 0.75}
    return {(style, index): bool(rng.random() < share[style]) for style in STYLES for index in range(rows)}


def _frames(index: int) -> str:
    return [" {}.", " {}\n\nThe answer is 4000.", "The answer is {}.", "So we add both.\n#### {}", "No idea."][
        index % 5
    ]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """48 rows in 12 templates; a fifth of the wrong answers cannot be read; 4 polite prompts equal the clean ones."""
    rows = prompt_rows(48, ["swap", "polite"], templates=12)
    for index in (3, 13, 23, 33):
        rows[index]["polite"] = rows[index]["normal"]
    for index, row in enumerate(rows):
        row |= {"_operation": "addition" if index % 2 else "subtraction", "_digits": 1 + index % 3}
    right = _planted()

    def change(row, style, index):
        answer = int(rows[index]["answer"])
        frame = _frames(index)
        if right[style, index]:
            frame = " {}." if "{}" not in frame else frame
        row["response"] = frame.format(answer if right[style, index] else answer + 1)

    return write_run(tmp_path_factory.mktemp("maths") / "maths_run", rows, change=change)


@pytest.fixture(scope="module")
def evaluation(run):
    return evaluate_run(run)


def test_items_say_which_answers_are_right(evaluation):
    items, right = evaluation.items, _planted()
    assert len(items) == 3 * 48
    assert list(items.columns[:3]) == ["style", "original_index", "element_index"]
    for line in items.itertuples():
        assert line.correct is right[line.style, line.original_index], line
        assert (line.status == "none") == pd.isna(line.value)
    unread = items[items["value"].isna()]
    assert len(unread) > 0
    assert not unread["correct"].any()
    assert set(items.loc[items["identical"], "original_index"]) == {3, 13, 23, 33}
    assert (items["element_index"] == items["original_index"] + 1).all()


def test_summary_against_formulas(evaluation):
    right = _planted()
    summary = evaluation.summary.set_index("style")
    assert summary.index.tolist() == list(STYLES)
    clean = np.array([right["normal", i] for i in range(48)])
    for style in STYLES:
        own = np.array([right[style, i] for i in range(48)])
        line = summary.loc[style]
        assert line["n"] == 48
        assert line["estimate"] == pytest.approx(own.mean())
        assert (line["ci_low"], line["ci_high"]) == pytest.approx(proportion_confint(own.sum(), 48, method="wilson"))
        assert line["ci_low_clustered"] <= line["ci_low"] + 1e-12
        if style == "normal":
            assert line[["difference", "p", "p_mcnemar", "right_to_wrong"]].isna().all()
            continue
        kept = np.array([i not in (3, 13, 23, 33) or style != "polite" for i in range(48)])
        expected = paired_difference(own[kept], clean[kept], np.arange(48)[kept] % 12)
        assert line["n_paired"] == kept.sum()
        assert line["n_identical"] == (~kept).sum()
        assert line["n_clusters"] == 12
        columns = ["difference", "difference_ci_low", "difference_ci_high", "p"]
        assert line[columns].tolist() == pytest.approx([expected.mean, expected.ci_low, expected.ci_high, expected.p])
        lost, won = (clean & ~own & kept).sum(), (~clean & own & kept).sum()
        assert (line["right_to_wrong"], line["wrong_to_right"]) == (lost, won)
        assert line["p_mcnemar"] == pytest.approx(binomtest(lost, lost + won).pvalue)
        assert line["minimum_detectable_difference_adjusted"] > line["minimum_detectable_difference"] > 0
    np.testing.assert_allclose(summary["p_adjusted"], holm(summary["p"]))
    np.testing.assert_allclose(summary["p_mcnemar_adjusted"], holm(summary["p_mcnemar"]))
    unread = evaluation.items.groupby("style")["value"].apply(lambda values: values.notna().mean())
    np.testing.assert_allclose(summary["parse_rate"], unread.loc[summary.index])


def test_flips_list_both_texts(evaluation):
    right, flips = _planted(), evaluation.flips
    identical = {("polite", i) for i in (3, 13, 23, 33)}
    expected = {
        (s, i): "right_to_wrong" if right["normal", i] else "wrong_to_right"
        for s in STYLES[1:]
        for i in range(48)
        if right[s, i] != right["normal", i] and (s, i) not in identical
    }
    assert {(f.style, f.original_index): f.flip for f in flips.itertuples()} == expected
    items = evaluation.items.set_index(["style", "original_index"])
    for flip in flips.itertuples():
        assert flip.response == items.loc[(flip.style, flip.original_index), "response"]
        assert flip.clean_response == items.loc[("normal", flip.original_index), "response"]
        assert flip.prompt == items.loc[(flip.style, flip.original_index), "prompt"]
        assert flip.clean_prompt != flip.prompt


def test_breakdown_is_the_summary_of_each_part(evaluation):
    table, items = evaluation.breakdown, evaluation.items
    assert {"operation", "digits"} <= set(table["factor"])
    right = _planted()
    line = table[(table["factor"] == "operation") & (table["level"] == "addition") & (table["style"] == "swap")].iloc[0]
    odd = [i for i in range(48) if i % 2]
    expected = paired_difference(
        [right["swap", i] for i in odd], [right["normal", i] for i in odd], [i % 12 for i in odd]
    )
    assert line["difference"] == pytest.approx(expected.mean)
    assert line["p"] == pytest.approx(expected.p)
    for _, part in table.groupby("factor"):
        np.testing.assert_allclose(part["p_adjusted"], holm(part["p"]))
    counts = table[table["factor"] == "digits"].groupby("style")["n"].sum()
    assert (counts == items.groupby("style").size().loc[counts.index]).all()


def test_token_change_and_edits(run, tmp_path, evaluation):
    log = pd.DataFrame([{"style": "swap", "original_index": i} for i in range(48) for _ in range(1 + i % 5)])
    log.to_csv(tmp_path / "edits.csv", index=False)
    items = evaluate_run(run, edits_csv=tmp_path / "edits.csv").items
    swap = items[items["style"] == "swap"]
    assert swap["edits"].tolist() == [["1", "2", "3", "4 or more", "4 or more"][i % 5] for i in range(48)]
    assert items.loc[items["style"] != "swap", "edits"].isna().all()
    assert swap["token_change"].notna().all()
    table = break_down(items, "normal")
    assert table.loc[table["factor"] == "edits", "level"].tolist() == ["1", "2", "3", "4 or more"]
    assert set(table.loc[table["factor"] == "edits", "style"]) == {"swap"}
    by_edits = accuracy_by_edits(items, "normal").set_index("edits")
    assert by_edits["n"].tolist() == [48, 10, 10, 10, 18]
    right = _planted()
    expected = clustered_mean(
        [right["swap", i] for i in range(48) if i % 5 == 1], [i % 12 for i in range(48) if i % 5 == 1]
    )
    assert expected.ci_high > 1  # which no share can be
    assert by_edits.loc["2", ["estimate", "ci_low", "ci_high"]].tolist() == pytest.approx(
        [expected.mean, expected.ci_low, 1]
    )
    for line in swap.itertuples():
        tokens = {s: _tokens(run, s, line.original_index) for s in ("swap", "normal")}
        change = tokens["swap"] - tokens["normal"]
        assert line.token_change == ("fewer" if change < 0 else {0: "0", 1: "+1", 2: "+2"}.get(change, "+3 or more"))


def _tokens(run, style, index):
    start = index // 4 * 4
    content = torch.load(run / style / f"activations_{start:05d}_{start + 4:05d}.pt", weights_only=True)
    return int(content["attention_mask"][index - start].sum())


def test_files_are_written_and_read_back(run, tmp_path, evaluation):
    write_evaluation(evaluation, tmp_path, "maths")
    names = {"maths_items.csv", "maths_summary.csv", "maths_flips.csv", "maths_breakdown.csv", "maths_accuracy.png"}
    assert names | {"maths_flips.png"} == {path.name for path in tmp_path.iterdir()}
    items = pd.read_csv(tmp_path / "maths_items.csv")
    assert items["correct"].tolist() == evaluation.items["correct"].tolist()
    assert items.loc[0, "response"] == evaluation.items.loc[0, "response"]


# --- what is scored


def test_one_style_folder_and_one_file(run, evaluation):
    swap = evaluation.items[evaluation.items["style"] == "swap"]
    folder = evaluate_run(run / "swap").items
    assert folder["correct"].tolist() == swap["correct"].tolist()
    one = evaluate_run(run / "swap" / "activations_00004_00008.pt")
    assert one.items["original_index"].tolist() == [4, 5, 6, 7]
    assert one.items["correct"].tolist() == swap["correct"].tolist()[4:8]
    assert one.summary[["difference", "p"]].isna().all().all()
    assert len(one.flips) == 0


def test_chosen_styles_keep_the_clean_one(run, evaluation):
    chosen = evaluate_run(run, styles=["polite"])
    assert chosen.summary["style"].tolist() == ["normal", "polite"]
    polite = evaluation.summary.set_index("style").loc["polite"]
    assert chosen.summary.iloc[1]["p"] == pytest.approx(polite["p"])
    assert chosen.summary.iloc[1]["p_adjusted"] == pytest.approx(polite["p"])


def test_gold_comes_from_the_clean_sum_where_no_answer_is_given(tmp_path):
    rows = [
        {"normal": "Work it out: 12 * 7 =", "swap": "Wokr it out: 12 * 7 ="},
        {"normal": "Say hello", "swap": "Sya"},
    ]

    def change(row, style, index):
        row["response"] = " 84."

    items = evaluate_run(write_run(tmp_path / "run", rows, change=change)).items.set_index(["style", "original_index"])
    assert items.loc[("swap", 0), ["gold", "correct"]].tolist() == ["84", True]
    assert items.loc[("swap", 1), ["gold", "correct"]].isna().all()


def _reference_file(folder: Path, prompts: list[str], responses: list[str], **extra) -> None:
    folder.mkdir(parents=True)
    content = {
        "final_predictions": [f"Few shot: 1 + 1 = 2\n{p}{r}" for p, r in zip(prompts, responses, strict=True)],
        "original_indices": list(range(len(prompts))),
        "input_ids": torch.zeros(len(prompts), 5, dtype=torch.long),
        "hidden_states": {},
        "attentions": {},
    }
    torch.save(content | extra, folder / "activations_00000_00004.pt")


def test_reference_format(tmp_path, caplog):
    rows = prompt_rows(4, ["swap"])
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps(rows))
    answers = [f" {row['answer']}." for row in rows]
    decoded = [row["swap"] for row in rows]
    decoded[2] = "something else entirely: 3 + 4 ="
    _reference_file(tmp_path / "old" / "normal", [row["normal"] for row in rows], answers)
    _reference_file(tmp_path / "old" / "swap", decoded, answers)
    evaluation = evaluate_run(tmp_path / "old", prompt_file=prompts)
    items = evaluation.items.set_index(["style", "original_index"])
    assert items.loc["normal", "correct"].tolist() == [True] * 4
    assert items.loc[("swap", 2), "status"] == "prompt_not_found"
    assert items.loc[("swap", 2), "correct"] is None
    assert items.loc["swap", "correct"].tolist()[:2] == [True, True]
    swap = evaluation.summary.set_index("style").loc["swap"]
    assert (swap["n"], swap["n_missing"], swap["n_paired"]) == (3, 1, 3)


def test_reference_format_with_an_unnamed_style(tmp_path):
    rows = prompt_rows(4, ["swap"])
    prompts = tmp_path / "my_prompts.json"
    prompts.write_text(json.dumps(rows))
    _reference_file(tmp_path / "my_run", [row["swap"] for row in rows], [f" {row['answer']}" for row in rows])
    named = evaluate_run(tmp_path / "my_run", prompt_file=prompts, style="swap").items
    assert named["correct"].tolist() == [True] * 4
    unnamed = evaluate_run(tmp_path / "my_run", prompt_file=prompts).items
    assert (unnamed["status"] == "prompt_not_found").all()
    arguments = ["--run_dir", str(tmp_path / "my_run"), "--prompt_file", str(prompts), "--results_dir", str(tmp_path)]
    assert script.main(arguments) == 1  # nothing could be scored
    assert script.main([*arguments, "--style", "swap"]) == 0
    with pytest.raises(UserError, match="no row has a gold answer"):
        evaluate_run(tmp_path / "my_run")


def test_an_echo_alone_is_never_right(tmp_path):
    rows = [
        {"normal": f"Work it out: {n} * 1 =", "swap": f"Wokr it out: {n} * 1 =", "answer": str(n)} for n in range(8)
    ]

    def change(row, style, index):
        row["response"] = rows[index]["normal"] if index % 2 else f" {index} * 1 ="

    items = evaluate_run(write_run(tmp_path / "run", rows, change=change)).items
    assert not items["correct"].any()
    assert (items["status"] == "none").all()


def test_samples_are_averaged_within_a_row(tmp_path):
    rows = prompt_rows(12, ["swap"])

    def change(row, style, index):
        answer = rows[index]["answer"]
        right = (index + (style == "swap")) % 3  # 0, 1 or 2 of two samples
        row["response_samples"] = [f" {answer}" if sample < right else " no" for sample in range(2)]
        row["response"] = row["response_samples"][0]

    evaluation = evaluate_run(write_run(tmp_path / "run", rows, change=change))
    assert evaluation.items["sample"].tolist() == [0, 1] * 24
    share = {s: np.array([(i + (s == "swap")) % 3 / 2 for i in range(12)]) for s in ("normal", "swap")}
    line = evaluation.summary.set_index("style").loc["swap"]
    expected = paired_difference(share["swap"], share["normal"])
    assert line["n"] == 12
    assert (line["estimate"], line["difference"], line["p"]) == pytest.approx(
        (share["swap"].mean(), expected.mean, expected.p)
    )
    assert np.isnan(line["p_mcnemar"])


def test_a_run_that_differs_nowhere_has_no_p_value(tmp_path):
    rows = prompt_rows(10, ["swap"])

    def change(row, style, index):
        row["response"] = f" {rows[index]['answer']}."

    evaluation = evaluate_run(write_run(tmp_path / "run", rows, change=change))
    line = evaluation.summary.set_index("style").loc["swap"]
    assert line["difference"] == 0
    assert line[["difference_ci_low", "p", "p_adjusted", "p_permutation", "minimum_detectable_difference"]].isna().all()
    assert line["p_mcnemar"] == 1
    write_evaluation(evaluation, tmp_path / "out", "maths")
    assert (tmp_path / "out" / "maths_accuracy.png").stat().st_size > 1000


# --- gold answers that are no numbers


def _answered(folder: Path, golds: list[str], responses: list[str]) -> Path:
    rows = prompt_rows(len(golds), ["swap"])
    for row, gold in zip(rows, golds, strict=True):
        row["answer"] = gold
        row["normal"], row["swap"] = (row[key].replace("=", "is what?") for key in ("normal", "swap"))

    def change(row, style, index):
        row["response"] = responses[index]

    return write_run(folder, rows, change=change)


def test_a_run_with_gold_answers_in_words_is_skipped_in_one_line(tmp_path, capsys):
    run = _answered(tmp_path / "run", ["Paris", "Rome", "May 5", "\\text{(E)}"], ["Paris", "12", "5", "(E)"])
    assert script.main(["--run_dir", str(run), "--results_dir", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().err.strip()
    assert told.count("\n") == 0
    assert "stage 3 is skipped: no gold answer is a number or an expression (row 1: 'Paris')" in told
    assert not (tmp_path / "out").exists()
    assert not script.has_gold([{"answer": "Paris"}, {}])
    assert script.has_gold([{"answer": "Paris"}, {"answer": "2\\pi"}])


def test_rows_without_a_readable_gold_are_left_out(tmp_path, capsys):
    golds = ["Paris"] * 39 + ["12"]
    run = _answered(tmp_path / "run", golds, ["The answer is 12."] * 40)
    assert script.main(["--run_dir", str(run), "--results_dir", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().err
    assert told.count("1 of 40 rows are scored: 39 have an answer in words, which match_answers.py scores") == 1
    summary = pd.read_csv(tmp_path / "out" / "maths_summary.csv")
    assert summary["n"].tolist() == [1, 1]
    assert summary["estimate"].tolist() == [1.0, 1.0]
    items = pd.read_csv(tmp_path / "out" / "maths_items.csv")
    assert items["correct"].notna().sum() == 2


def test_a_gold_that_is_neither_number_nor_words_is_told(tmp_path, capsys):
    run = _answered(tmp_path / "run", ["12", "May 5", ["three", "3"]], ["12", "May 5", "three"])
    assert script.main(["--run_dir", str(run), "--results_dir", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().err
    assert (
        "1 of 3 rows are scored: 1 have an answer in words, which match_answers.py scores, the gold answer of 1" in told
    )
    assert "(row 2: 'May 5'): write it as a list if it is words" in told


def test_expressions_are_scored_by_the_rule_symbolic(tmp_path):
    golds = ["11\\sqrt{2}", "[-2, 7]", "120", "9\\pi", "3x+2", "12", "28%"]
    responses = [
        "So \\boxed{11\\sqrt2}.", "The answer is (-2, 7).", "\\boxed{5!}", "I do not know.", "The answer is $2+3x$.",
        "\\boxed{7 + \\sqrt{25}}", "The answer is 28.",
    ]  # fmt: skip
    items = evaluate_run(_answered(tmp_path / "run", golds, responses)).items
    items = items[items["style"] == "normal"]
    assert items["correct"].tolist() == [True, False, True, False, True, True, True]
    assert items["rule"].tolist() == ["symbolic"] * 3 + ["none"] + ["symbolic"] * 2 + ["answer_is"]
    assert items["gold"].tolist() == ["11\\sqrt{2}", "[-2, 7]", "120", "9\\pi", "3x+2", "12", "0.28"]
    assert items["value"].tolist()[:3] == ["11\\sqrt2", "(-2, 7)", "5!"]


def test_numbers_alone_never_start_the_process_of_math_verify(tmp_path):
    run = _answered(tmp_path / "run", ["12"] * 4, ["12", "The answer is 12.", "7 + 5 = 12", "none"])
    called = (
        f"import evaluate_predictions as e; e.main(['--run_dir', {str(run)!r}, '--results_dir', {str(tmp_path)!r}])"
    )
    code = f"{called}; import multiprocessing; print(multiprocessing.active_children())"
    folders = [str(SCRIPT.parent), str(SCRIPT.parents[2] / "1_utils" / "run_scripts")]
    command = [sys.executable, "-c", f"import sys; sys.path[:0] = {folders!r}; {code}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- the command


def test_power_is_told_before_any_p_value(run, tmp_path, capsys):
    assert script.main(["--run_dir", str(run), "--results_dir", str(tmp_path)]) == 0
    told = capsys.readouterr().err
    assert told.count("could be detected (80 % power") == 1
    assert told.rindex("could be detected") < told.index("p = ")
    assert "nan" not in told
    assert (tmp_path / "maths_summary.csv").is_file()


def own_scores(path, lines, columns="style,original_index,correct"):
    path.write_text("\n".join([columns, *lines]) + "\n")
    return path


def test_own_scores_stand_for_those_of_stage_3(run, tmp_path):
    """What the table lacks is not scored; what the run knows of a row (template, edits …) stays."""
    lines = [f"normal,{index},{int(index != 2)}" for index in range(4)] + ["swap,0,0", "swap,1,True", "swap,2,"]
    scores = own_scores(tmp_path / "own.csv", lines)
    words = ["--run_dir", str(run), "--results_dir", str(tmp_path / "out"), "--maths_items", str(scores)]
    assert script.main(words) == 0
    summary = pd.read_csv(tmp_path / "out" / "maths_summary.csv").set_index("style")
    assert summary.loc["normal", ["n", "estimate"]].tolist() == [4, 0.75]
    assert summary.loc["swap", ["n", "estimate", "difference"]].tolist() == [2, 0.5, -0.5]
    items = pd.read_csv(tmp_path / "out" / "maths_items.csv")
    assert items["correct"].notna().sum() == 6
    assert items[["gold", "value"]].isna().all(axis=None)


@pytest.mark.parametrize(
    ("lines", "columns", "told"),
    [
        (["swap,0,1"], "style,row,correct", "has no column original_index; give a CSV"),
        (["swap,0,maybe"], "style,original_index,correct", "line 2: correct is 'maybe'"),
        (["swap,0,0.5"], "style,original_index,correct", "line 2: correct is 0.5"),
        (["swap,0,1", "swap,0,0"], "style,original_index,correct", "line 3: scores an answer that an earlier"),
        (["urgent,0,1"], "style,original_index,correct", "line 2: the run has no answer to row 0 of style 'urgent'"),
        (["swap,900,1"], "style,original_index,correct", "line 2: the run has no answer to row 900"),
        (["swap,0,1,other words"], "style,original_index,correct,response", "line 2: its response is not this run's"),
        (["swap,0,"], "style,original_index,correct", "no line has a score"),
    ],
)
def test_scores_of_something_else_are_refused(run, tmp_path, lines, columns, told):
    scores = own_scores(tmp_path / "own.csv", lines, columns)
    with pytest.raises(UserError, match=told) as caught:
        script.main(["--run_dir", str(run), "--results_dir", str(tmp_path / "out"), "--maths_items", str(scores)])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--styles", "urgent"], "has no style 'urgent'"),
        (["--edits_csv", "nowhere.csv"], "nowhere.csv: no such file; give the .*_edits.csv"),
        (["--prompt_file", "nowhere.json"], "no such file"),
        (["--style", "swap"], "--style names a single style"),
    ],
)
def test_mistakes_are_told_in_one_line(run, tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        script.main(["--run_dir", str(run), "--results_dir", str(tmp_path), *arguments])


def test_script_runs_from_anywhere(run, tmp_path):
    command = [sys.executable, str(SCRIPT), "--run_dir", str(run)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "results" / "maths_run" / "maths_items.csv").is_file()
    lost = subprocess.run([*command[:-1], "nowhere"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert lost.returncode == 2
    assert lost.stderr.startswith("error: nowhere: no such run folder")


@pytest.mark.stress
def test_10_000_responses_parse_within_their_share_of_20_seconds():
    responses = [_frames(index).format(index) for index in range(10_000)]
    start = time.process_time()
    for index, response in enumerate(responses):
        parse_prediction_text(response, f"Work out the sum of these two numbers: {index} + 0 =")
    assert time.process_time() - start < 2.0


def test_numbers_are_written_as_people_do():
    cases = {
        "12": 12,
        "-3": -3,
        "0.75": Fraction(3, 4),
        "-0.05": Fraction(-1, 20),
        "1/3": Fraction(1, 3),
        "348.5": Fraction(697, 2),
    }
    assert {text: number_text(Fraction(value)) for text, value in cases.items()} == {text: text for text in cases}
    assert number_text(None) is None


@pytest.mark.parametrize("style", ["None", "NA", "nan"])
def test_the_edits_of_a_style_of_any_name_are_counted(tmp_path, style):
    run = write_run(tmp_path / "run", prompt_rows(6, [style]), raw_layers=())
    pd.DataFrame({"style": style, "original_index": [0, 0, 3]}).to_csv(tmp_path / "edits.csv", index=False)
    items = evaluate_run(run, edits_csv=tmp_path / "edits.csv").items
    edits = items[items["style"] == style].set_index("original_index")["edits"]
    assert edits[[0, 3]].tolist() == ["2", "1"]
