"""The pipeline as a user calls it: what is done is not done again, failures stop it, the real model from end to end."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import UserError
from fetch_models import MODELS_DIR
from run_pipeline import (
    STAMP,
    Step,
    jobs_of,
    main,
    parse_args,
    printable,
    report_step,
    run_step,
    runs_in,
    steps_of,
)

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "1_utils" / "run_scripts" / "run_pipeline.py"
MODEL = MODELS_DIR / "SmolLM2-135M-Instruct"


@pytest.fixture
def prompt_file(tmp_path):
    rows = [{"normal": "Add them: 2 + 3 =", "swap": "Add tehm: 2 + 3 =", "answer": "5"}]
    path = tmp_path / "sums.json"
    path.write_text(json.dumps(rows))
    return path


def arguments(tmp_path, *prompt_files, extra=()):
    places = ["--output_dir", str(tmp_path / "outputs"), "--results_dir", str(tmp_path / "results")]
    return ["--run_name", "r", "--model_name", "m", *places, "--prompt_file", *map(str, prompt_files), *extra]


# --- what is planned


def test_the_steps_of_a_maths_file(tmp_path, prompt_file):
    args = parse_args(
        arguments(tmp_path, prompt_file, extra=["--reward_model", "rm", "--", "--neurons", "--seed", "1"])
    )
    (job,) = jobs_of(args)
    steps = steps_of(job, args)
    assert [Path(step.script).stem for step in steps] == [
        "attn_act_logi", "evaluate_predictions", "compare_responses", "score_scripts", "dirs_eval", "head_sensitivity",
        "activation_diffs", "neuron_sensitivity", "probe_layers",
    ]  # fmt: skip
    assert steps[0].arguments[-3:] == ("--neurons", "--seed", "1")
    assert all((ROOT / step.script).is_file() for step in [*steps, report_step([job], args)])
    heads = next(step for step in steps if step.script.endswith("head_sensitivity.py"))
    assert heads.reads == (job.output, job.results / "maths_items.csv")


def test_a_file_without_answers_has_no_accuracy(tmp_path):
    path = tmp_path / "talk.json"
    path.write_text('[{"normal": "Say hello."}]')
    args = parse_args(arguments(tmp_path, path))
    names = [step.name for job in jobs_of(args) for step in steps_of(job, args)]
    assert "accuracy" not in names
    assert "neurons" not in names
    assert "similarity" in names


def test_every_flag_that_is_passed_is_known_to_its_script(tmp_path, prompt_file):
    extra = ["--max_samples", "3", "--few_shot_file", "f.txt", "--reward_model", "rm", "--embedding_model", "e"]
    args = parse_args(arguments(tmp_path, prompt_file, extra=[*extra, "--", "--neurons"]))
    jobs = jobs_of(args)
    for step in [*steps_of(jobs[0], args), report_step(jobs, args)]:
        shown = subprocess.run([sys.executable, ROOT / step.script, "--help"], capture_output=True, text=True).stdout
        for flag in (word for word in step.arguments if word.startswith("--")):
            assert re.search(rf"{flag}\b", shown), f"{step.script} has no {flag}"


def test_two_files_of_one_name_are_refused(tmp_path, prompt_file):
    (tmp_path / "other").mkdir()
    twin = tmp_path / "other" / prompt_file.name
    twin.write_bytes(prompt_file.read_bytes())
    with pytest.raises(UserError, match="have one name"):
        jobs_of(parse_args(arguments(tmp_path, prompt_file, twin)))


def test_the_report_covers_earlier_calls_too(tmp_path, prompt_file):
    older = tmp_path / "outputs" / "r" / "older"
    older.mkdir(parents=True)
    (older / "prompts.json").write_text("[]")
    args = parse_args(arguments(tmp_path, prompt_file))
    command = printable(report_step(jobs_of(args), args))
    assert f"--run_dir {older} {tmp_path}/outputs/r/sums " in command
    assert runs_in(tmp_path / "outputs" / "r") == [older]


# --- done is done


@pytest.fixture
def step(tmp_path):
    """A step that copies a file it reads, and counts its runs."""
    (tmp_path / "code").mkdir()
    script = tmp_path / "code" / "copy_it.py"
    script.write_text(
        "import sys, pathlib\n"
        "source, target, count = map(pathlib.Path, sys.argv[1:4])\n"
        "target.parent.mkdir(exist_ok=True)\n"
        "count.write_text(count.read_text() + '.' if count.exists() else '.')\n"
        "target.write_text(source.read_text())\n"
    )
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("one")
    words = (str(tmp_path / "in" / "a.txt"), str(tmp_path / "results" / "b.txt"), str(tmp_path / "count"))
    return Step("copy", str(script), words, (tmp_path / "in",), tmp_path / "results")


def runs_of(tmp_path):
    return len((tmp_path / "count").read_text())


def test_a_step_runs_once_until_something_changes(tmp_path, step):
    assert run_step(step, "1/1") == 0
    assert run_step(step, "1/1") == 0
    assert runs_of(tmp_path) == 1
    (tmp_path / "in" / "a.txt").write_text("another")  # input
    run_step(step, "1/1")
    assert (runs_of(tmp_path), (tmp_path / "results" / "b.txt").read_text()) == (2, "another")
    (tmp_path / "results" / "b.txt").unlink()  # output
    run_step(step, "1/1")
    assert runs_of(tmp_path) == 3
    (tmp_path / "results" / "b.txt").write_text("tampered")
    run_step(step, "1/1")
    assert (runs_of(tmp_path), (tmp_path / "results" / "b.txt").read_text()) == (4, "another")
    Path(step.script).write_text(Path(step.script).read_text() + "# newer\n")  # code
    run_step(step, "1/1")
    assert runs_of(tmp_path) == 5
    longer = Step(step.name, step.script, (*step.arguments, "more"), step.reads, step.results)  # arguments
    run_step(longer, "1/1")
    assert runs_of(tmp_path) == 6
    (tmp_path / "results" / STAMP).write_text("{broken")
    run_step(longer, "1/1")
    run_step(longer, "1/1")
    assert runs_of(tmp_path) == 7


def test_a_failed_step_is_not_done(tmp_path, step):
    source = tmp_path / "in" / "a.txt"
    source.unlink()
    assert run_step(step, "1/1") == 1
    source.write_text("back")
    assert run_step(step, "1/1") == 0
    assert (tmp_path / "results" / "b.txt").read_text() == "back"


def test_a_failing_stage_stops_the_run_with_its_message(tmp_path, prompt_file):
    command = [sys.executable, str(SCRIPT), *arguments(tmp_path, prompt_file)]
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=offline)
    assert done.returncode == 2
    assert re.fullmatch(r"error: m: .*\n", done.stderr)
    assert "stopped: 2_inference/run_scripts/attn_act_logi.py ended with exit code 2" in done.stdout
    assert "evaluate_predictions" not in done.stdout


def test_a_bad_prompt_file_is_one_line(tmp_path, capsys):
    with pytest.raises(UserError, match="no such file"):
        main(arguments(tmp_path, tmp_path / "missing.json"))
    assert capsys.readouterr().out == ""


# --- the real thing


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Six maths problems in four styles through every stage with SmolLM2: (folder, output of the call, command)."""
    if not MODEL.is_dir():
        pytest.skip("run 1_utils/run_scripts/fetch_models.py first")
    folder = tmp_path_factory.mktemp("demo")
    command = [
        sys.executable, str(SCRIPT), "--run_name", "demo", "--model_name", str(MODEL), "--prompt_file",
        str(ROOT / "0_data" / "maths.json"), "--styles", "normal", "swap", "polite", "split", "--max_samples", "6",
        "--few_shot_file", str(ROOT / "0_data" / "few_shot_maths.txt"),
        "--", "--max_new_tokens", "8", "--raw_layers", "0",
    ]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return folder, done.stdout, command


def test_every_stage_leaves_its_files(demo):
    folder, _, _ = demo
    results = folder / "results" / "demo" / "maths"
    names = {path.name for path in results.iterdir()}
    assert names >= {
        "maths_items.csv", "maths_summary.csv", "maths_accuracy.png", "similarity_summary.csv", "similarity.png",
        "prompt_task_fraction_aggregate.csv", "boxplot_frac_task.png", "head_sensitivity.csv", "activation_diffs.csv",
        "probe_layers.csv",
    }  # fmt: skip
    assert (folder / "results" / "demo" / "report.html").stat().st_size > 100_000


def test_the_closing_table_says_what_the_files_say(demo):
    folder, output, _ = demo
    with open(folder / "results" / "demo" / "maths" / "maths_items.csv", newline="", encoding="utf-8") as handle:
        items = list(csv.DictReader(handle))
    table = output[output.index("\nmaths\n") :].splitlines()
    for style in ("normal", "swap", "polite", "split"):
        marks = [
            float(item["correct"].replace("True", "1").replace("False", "0"))
            for item in items
            if item["style"] == style
        ]
        line = next(line for line in table if re.match(rf"{style}\s", line))
        assert line.split()[1] == str(len(marks))
        assert line.split()[2] == f"{100 * sum(marks) / len(marks):.1f}"
    assert "reward scoring was skipped: add --reward_model" in output
    assert "report: results/demo/report.html" in output


def test_the_report_shows_the_answers(demo):
    folder, _, _ = demo
    text = (folder / "results" / "demo" / "report.html").read_text(encoding="utf-8")
    assert text.count('<article class="pair">') == 10
    assert text.count("data:image/png;base64,") >= 8
    assert "24 prompts: 6 rows in 4 styles" in text


def test_a_second_call_finds_all_done(demo):
    folder, first, command = demo
    written = {path: path.stat().st_mtime_ns for path in folder.rglob("*.*") if path.is_file() and path.name[0] != "."}
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0
    steps = re.findall(r"^\[\d+/\d+\] .*", done.stdout, re.MULTILINE)
    assert [step for step in steps if not step.endswith("done before")] == ["[2/9] capture"]
    assert {path: path.stat().st_mtime_ns for path in written} == written
    table = first[first.index("\nmaths\n") : first.index("\nreport:")]
    assert table in done.stdout
