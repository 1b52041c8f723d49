"""An analysis of a run that stage 2 has not finished says so, once, with the counts."""

import activation_diffs
import build_report
import dirs_eval
import evaluate_predictions
import head_sensitivity
import neuron_sensitivity
import probe_layers
import pytest
from run_store import begin_run, open_run, planned_prompts, read_json_file, record_failures, unfinished
from synthetic_run import prompt_rows, with_controls, write_run

SCRIPTS = [
    activation_diffs, build_report, dirs_eval, evaluate_predictions, head_sensitivity, neuron_sensitivity, probe_layers,
]  # fmt: skip


def make(folder, there, styles=("normal", "swap", "split@swap")):
    """A run of 40 rows in three styles of which only some are there yet; `there`: how many of each."""
    rows = with_controls(prompt_rows(40, ["swap"]), "swap", lambda i, word, typo: f"{word[:2]}\u00ad{word[2:]}")
    kept = dict(zip(styles, there, strict=True))
    return write_run(folder, rows, neurons=4, skip=lambda style, index: index >= kept[style])


def test_a_finished_run_lacks_nothing(tmp_path):
    run = open_run(make(tmp_path / "run", (40, 40, 40)))
    assert unfinished(run) == unfinished(run, ["swap"], 7) == ""


def test_the_counts_of_what_is_there(tmp_path):
    run = open_run(make(tmp_path / "run", (4, 4, 0)))
    assert unfinished(run) == "4 of 40 prompts of normal, swap; 0 of 40 prompts of split@swap"
    # Only the first four rows are wanted: of a control nobody knows which rows it would have.
    assert unfinished(run, max_samples=4) == ""
    assert unfinished(run, max_samples=5) == "4 of 5 prompts of normal, swap"


def test_only_the_styles_that_are_read_count(tmp_path):
    rows = prompt_rows(8, ["swap", "main"])
    run = open_run(write_run(tmp_path / "run", rows, skip=lambda style, index: style == "main" and index))
    assert unfinished(run) == "1 of 8 prompts of main"
    assert unfinished(run, ["swap"]) == ""


def test_rows_without_a_style_and_no_prompts_are_not_missing(tmp_path):
    rows = prompt_rows(8, ["swap"])
    del rows[3]["swap"]
    rows[5]["swap"] = " "
    folder = write_run(tmp_path / "run", rows, skip=lambda style, index: style == "swap" and index == 5)
    for style in ("normal", "swap"):  # as written before runs noted what was planned
        begin_run(folder / style, read_json_file(folder / style / "run.json")["settings"], {}, overwrite=False)
        path = folder / style / "run.json"
        path.write_text(path.read_text().replace("planned_prompts", "other"))
    assert planned_prompts(folder / "swap", "swap") == 6
    assert unfinished(open_run(folder)) == ""


def test_a_prompt_that_failed_is_not_there(tmp_path):
    folder = write_run(tmp_path / "run", prompt_rows(8), skip=lambda style, index: (style, index) == ("swap", 2))
    record_failures(folder / "swap", "swap", [2], {2: (3, "out of memory")})
    assert unfinished(open_run(folder)) == "7 of 8 prompts of swap"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_every_analysis_warns_once(tmp_path, capsys, script):
    (tmp_path / "out").mkdir()  # the report wants it to be there
    run = make(tmp_path / "run", (24, 24, 20))
    assert script.main(["--run_dir", str(run), "--results_dir", str(tmp_path / "out")]) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "24 of 40" in line]
    assert len(told) == 1
    assert told[0].startswith("warning: ")
    assert "24 of 40 prompts of normal, swap; 20 of 40 prompts of split@swap" in told[0]
    if script is build_report:
        assert "24 of 40 prompts of normal, swap" in (tmp_path / "out" / "report.html").read_text()
