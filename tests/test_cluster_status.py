"""run_status.py on run folders in every state, and which steps cluster_plan.py takes for done."""

import csv
import json
import os
import re
import sys
import time

import cluster_plan
import pytest
import run_status
import stamps
import torch
from command_line import UserError
from run_pipeline import Step
from run_store import FAILURE_COLUMNS, begin_run, read_json_file, save_pt

STAGE_2_WORDS = ("--run_name", "r", "--model_name", "m")


def write_run(folder, style, rows, files, failed=(), started=1000.0, **settings):
    """A style's folder: `files` lists (rows, time of writing); returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder.parent / "prompts.json").write_text(json.dumps(rows))
    begin_run(folder, {"style": style, "max_samples": None} | settings, None)
    os.utime(folder / "run.json", (started, started))
    for number, (indices, moment) in enumerate(files):
        path = folder / f"activations_{number:05d}_{number + 1:05d}.pt"
        save_pt(path, {"original_indices": list(indices), "hidden": torch.zeros(len(indices), 10)})
        os.utime(path, (moment, moment))
    if failed:
        with open(folder / "failures.csv", "w", newline="") as handle:
            csv.writer(handle).writerows(
                [FAILURE_COLUMNS, *((style, index, index + 1, "too long") for index in failed)]
            )
    return folder


def rows(count, **more):
    return [{"normal": f"a {i}", "swap": f"b {i}"} | more for i in range(count)]


def test_prompts_are_done_failed_or_missing_and_nothing_else(tmp_path):
    prompts = rows(10)
    del prompts[9]["swap"]  # never asked for
    prompts[8]["swap"] = 7  # asked for, and no prompt
    prompts[7]["swap"] = " "
    folder = write_run(tmp_path / "swap", "swap", prompts, [((0, 1, 2), 1060.0), ((3,), 1090.0)], failed=(7, 8, 3))
    status = run_status.read_style(folder)
    # Row 3 failed once and was run later: it is done. Rows 4, 5, 6 are left.
    assert (status.done, status.failed, status.missing) == (4, 2, 3)
    assert status.bytes == sum(path.stat().st_size for path in folder.glob("*.pt"))


def test_max_samples_counts_rows(tmp_path):
    folder = write_run(tmp_path / "swap", "swap", rows(10), [((0, 1), 1060.0)], max_samples=4)
    assert run_status.read_style(folder).missing == 2


def test_a_damaged_file_is_counted_and_its_prompts_are_missing(tmp_path):
    folder = write_run(tmp_path / "swap", "swap", rows(4), [((0, 1), 1060.0), ((2, 3), 1060.0)])
    path = next(folder.glob("activations_00001*"))
    path.write_bytes(path.read_bytes()[:100])
    status = run_status.read_style(folder)
    assert (status.done, status.missing, status.damaged) == (2, 2, 1)


def test_rate_and_time_left_by_hand(tmp_path):
    first = write_run(tmp_path / "normal", "normal", rows(100), [(range(60), 1060.0), (range(60, 100), 1100.0)])
    second = write_run(tmp_path / "swap", "swap", rows(100), [(range(20), 1200.0)])
    styles = [run_status.read_style(folder) for folder in (first, second)]
    progress = run_status.progress_of(styles, tmp_path)
    assert (progress["done"], progress["missing"], progress["last_written"]) == (120, 80, 1200.0)
    assert progress["rate"] == pytest.approx(120 / 200)  # 120 prompts in the 200 s since run.json
    assert progress["seconds_left"] == pytest.approx(80 / 0.6)
    assert progress["bytes_left"] == pytest.approx(progress["bytes"] / 120 * 80, abs=1)


@pytest.mark.parametrize(
    ("written", "starts", "expected"),
    [
        ([], [0.0], None),
        ([(50.0, 10), (100.0, 10)], [0.0], 20 / 100),
        ([(50.0, 10), (100.0, 10)], [0.0, 60.0], 10 / 40),  # started anew: the first file is of the earlier start
        ([(50.0, 10), (100.0, 10)], [0.0, 500.0], 20 / 100),  # started anew, nothing written since
        ([(0.5, 1), (9000.0, 10), (10000.0, 10)], [0.0], 20 / 3600),  # its last hour
        ([(100.0, 10)], [200.0], None),
    ],
)
def test_the_rate_counts_from_the_last_start(written, starts, expected):
    assert run_status.rate_of(written, starts) == (expected if expected is None else pytest.approx(expected))


def test_the_table_names_styles_clean_form_first_and_where_to_look(tmp_path, capsys):
    write_run(
        tmp_path / "a" / "swap", "swap", rows(3), [((0,), time.time() - 60)], failed=(1,), started=time.time() - 90
    )
    write_run(tmp_path / "a" / "normal", "normal", rows(3), [((0, 1, 2), time.time() - 70)], started=time.time() - 90)
    log = tmp_path / "logs" / "attn_act_logi_5_0.out"
    note = f"task=5_0\nstate=exit code 1\ntime=1000\nlog={log}\n"
    (tmp_path / "a" / ".job.attn_act_logi.0").write_text(note)
    (tmp_path / "a" / ".job.attn_act_logi.1").write_text(note.replace("exit code 1", "done"))
    assert run_status.main([str(tmp_path / "a")]) == 1
    out = capsys.readouterr().out
    lines = [line.split() for line in out.splitlines()]
    assert lines[0][:4] == ["style", "done", "failed", "missing"]
    assert [line[:4] for line in lines[1:4]] == [
        ["normal", "3", "0", "0"],
        ["swap", "1", "1", "1"],
        ["all", "4", "1", "1"],
    ]
    assert "job 5_0 (attn_act_logi): exit code 1 since 19" in out
    assert out.count(f"log {log}") == 1
    assert str(tmp_path / "a" / "swap" / "failures.csv") in out
    assert "time left at this rate" in out
    assert " free" in out


def test_several_runs_and_json(tmp_path, capsys):
    for name in ("maths", "instructions"):
        write_run(tmp_path / name / "normal", "normal", rows(2), [((0, 1), 1060.0)])
    assert run_status.main([str(tmp_path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["done"], told["missing"], told["failed"]) == (4, 0, 0)
    assert [style["done"] for style in told["styles"]] == [2, 2]
    assert run_status.main([str(tmp_path)]) == 0
    assert "maths/normal" in capsys.readouterr().out


def test_a_single_style_in_one_folder(tmp_path):
    folder = write_run(tmp_path / "run", "normal", rows(2), [((0, 1), 1060.0)])
    (tmp_path / "prompts.json").rename(folder / "prompts.json")
    [status] = run_status.read_styles(folder)
    assert (status.style, status.done, status.missing) == ("normal", 2, 0)


def test_the_flag_and_the_bare_folder_are_the_same(tmp_path, capsys):
    write_run(tmp_path / "outputs" / "r" / "normal", "normal", rows(2), [((0, 1), 1060.0)])
    shown = []
    for words in (["--run_dir", str(tmp_path / "outputs" / "r")], [str(tmp_path / "outputs" / "r")]):
        assert run_status.main(words) == 0
        shown.append(capsys.readouterr().out.splitlines()[:3])
    assert shown[0] == shown[1]
    with pytest.raises(UserError, match="--run_dir: give the run folder"):
        run_status.main([])
    with pytest.raises(UserError, match=r"no such folder; did you mean .*outputs/r"):
        run_status.main(["--run_dir", str(tmp_path / "outputs" / "R_")])


def stamp(step, *names, monkeypatch):
    """Write files and the stamp that a script leaves when it has written them."""
    monkeypatch.setattr(sys, "argv", [step.script])
    stamps.begin(step.arguments)
    for name in names:
        step.place.mkdir(parents=True, exist_ok=True)
        (step.place / name).write_text("x")
        stamps.note_written(step.place / name)
    if step.name == "report":
        stamps.note_read(step.place / "p")
    stamps.finish(step.arguments, 0)


def test_analyses_whose_inputs_have_changed_are_told(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "outputs" / "r" / "p"
    write_run(run / "normal", "normal", rows(2), [((0, 1), time.time())])
    words = ("--run_dir", "outputs/r/p", "--results_dir", "results/r/p")
    for script in ("evaluate_predictions", "dirs_eval"):
        stamp(Step(script, str(tmp_path / f"{script}.py"), words), f"{script}.csv", monkeypatch=monkeypatch)
    run_status.main(["--run_dir", "outputs/r"])
    assert "analyses: 2 of 2 up to date" in capsys.readouterr().out
    (tmp_path / "results" / "r" / "p" / "dirs_eval.csv").unlink()
    run_status.main(["--run_dir", "outputs/r", "--json"])
    analyses = json.loads(capsys.readouterr().out)["analyses"]
    assert {name.rpartition(" ")[2]: current for name, current in analyses.items()} == {
        "dirs_eval": False, "evaluate_predictions": True,
    }  # fmt: skip
    next((run / "normal").glob("*.pt")).touch()
    run_status.main(["--run_dir", "outputs/r"])
    out = capsys.readouterr().out
    assert "analyses: 0 of 2 up to date" in out
    assert re.search(r"^run again, its inputs, .* have changed: .*results/r/p: evaluate_predictions$", out, re.M)


@pytest.mark.parametrize(("make", "told"), [(False, "no such folder"), (True, "no run has begun there")])
def test_where_there_is_no_run_it_says_so(tmp_path, make, told):
    if make:
        (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match=told):
        run_status.main([str(tmp_path / "run")])


def test_a_job_that_failed_before_the_run_began_is_told_with_its_log(tmp_path):
    (tmp_path / ".job.attn_act_logi.0").write_text("task=5_0\nstate=exit code 2\ntime=1000\nlog=/logs/x.out\n")
    with pytest.raises(UserError, match=r"no run has begun.*job 5_0 \(attn_act_logi\): exit code 2 .*log /logs/x\.out"):
        run_status.main([str(tmp_path)])


@pytest.mark.parametrize(
    ("answer", "state"),
    [("echo RUNNING", "running"), ("echo PENDING", "pending"), ("true", run_status.ENDED), ("exit 1", "running"),
     ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", run_status.ENDED)],
)  # fmt: skip
def test_a_job_that_could_not_note_its_end_is_asked_for_at_slurm(tmp_path, monkeypatch, answer, state):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "squeue").write_text(f"#!/bin/sh\n{answer}\n")
    (tmp_path / "bin" / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    (tmp_path / ".job.attn_act_logi.0").write_text("task=5_0\nstate=running\ntime=1000\nlog=x\n")
    assert [note["state"] for note in run_status.read_notes(tmp_path)] == [state]


# --- which steps are done


@pytest.fixture
def chain(tmp_path, monkeypatch):
    """A run of stages 2, 3 and 5 on disk, each step stamped as done; returns the function that plans it anew."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.json").write_text(json.dumps(rows(2, answer=1)))

    def plan(*more, stages=("2", "3", "5", "report")):
        args = cluster_plan.parse_pipeline_args(["--prompt_file", "p.json", *STAGE_2_WORDS, *more])
        return cluster_plan.plan(args, stages)

    past = time.time() - 500
    for style in ("normal", "swap"):
        write_run(tmp_path / "outputs" / "r" / "p" / style, style, rows(2), [((0, 1), past)], started=past)
    os.utime(tmp_path / "outputs" / "r" / "p" / "prompts.json", (past, past))
    for item in plan(stages=cluster_plan.STAGES):
        if item.step.name in ("capture", "accuracy", "attention fractions", "heads", "layers", "probes", "report"):
            name = "report.html" if item.step.name == "report" else f"{item.step.stem}.csv"
            stamp(item.step, *([name] if item.step.name != "capture" else []), monkeypatch=monkeypatch)
    return plan


def missing(planned):
    return [item.step.stem for item in planned if item.state == "missing"]


def test_a_chain_that_is_done_needs_nothing(chain):
    assert missing(chain()) == []


def test_other_arguments_are_another_step(chain):
    assert missing(chain("--max_samples", "2"))[0] == "attn_act_logi"


def test_a_file_that_is_gone_or_new_brings_its_steps_back(chain, tmp_path, monkeypatch):
    results = tmp_path / "results" / "r" / "p"
    (results / "dirs_eval.csv").unlink()
    assert missing(chain()) == ["dirs_eval", "build_report"]
    (step,) = [item.step for item in chain() if item.step.stem == "dirs_eval"]
    stamp(step, "dirs_eval.csv", monkeypatch=monkeypatch)  # run again by hand
    assert missing(chain()) == ["build_report"]
    next((tmp_path / "outputs" / "r" / "p" / "swap").glob("*.pt")).touch()
    assert set(missing(chain())) >= {"evaluate_predictions", "dirs_eval", "head_sensitivity", "build_report"}


def test_a_missing_prompt_brings_stage_2_and_all_after_it_back(chain, tmp_path):
    next((tmp_path / "outputs" / "r" / "p" / "swap").glob("*.pt")).unlink()
    assert missing(chain()) == [item.step.stem for item in chain() if item.state != "left out"]
    assert "attn_act_logi" not in missing(chain(stages=("3", "5", "report")))


def test_patches_are_done_if_every_task_has_done_its_share(chain, tmp_path, monkeypatch, capsys):
    run = tmp_path / "outputs" / "r" / "p"
    assert missing(chain("--patch", "swap")) == ["patch_activations", "causal_effects", "build_report"]
    step = next(item.step for item in chain("--patch", "swap") if item.step.name == "patches")
    (run / "swap" / "patches.json").write_text(json.dumps({"settings": {}, "rows": 2}))
    save_pt(run / "swap" / "patches_00000_00001.pt", {"original_indices": [0]})
    stamp(step, monkeypatch=monkeypatch)
    assert missing(chain("--patch", "swap"))[0] == "patch_activations"
    assert run_status.main(["--run_dir", str(run)]) == 1
    assert "patches of swap: 1 of 2 rows\n" in capsys.readouterr().out
    (run / "swap" / "patches_failures.csv").write_text("style,original_index,element_index,reason\nswap,1,2,memory\n")
    assert missing(chain("--patch", "swap"))[0] == "patch_activations"
    assert missing(chain("--patch", "swap", "--keep_going"))[0] == "causal_effects"
    assert run_status.main(["--run_dir", str(run)]) == 1
    assert "patches of swap: 1 of 2 rows, 1 failed\n" in capsys.readouterr().out
    save_pt(run / "swap" / "patches_00001_00002.pt", {"original_indices": [1]})
    assert missing(chain("--patch", "swap"))[0] == "causal_effects"
    assert run_status.main(["--run_dir", str(run)]) == 0
    assert missing(chain()) == []  # the other steps have not read them


def test_a_stage_that_is_left_out_is_named_so_that_it_can_be_waited_for(chain):
    planned = chain(stages=("5",))
    states = {item.step.stem: item.state for item in planned}
    assert states["attn_act_logi"] == states["evaluate_predictions"] == states["build_report"] == "left out"
    heads = next(item for item in planned if item.step.stem == "head_sensitivity")
    assert {planned[number].step.stem for number in (*heads.after, *heads.after_any)} == {
        "attn_act_logi", "evaluate_predictions",
    }  # fmt: skip


def test_failed_prompts_are_tried_again_unless_told_to_keep_going(chain, tmp_path):
    folder = tmp_path / "outputs" / "r" / "p" / "swap"
    past = time.time() - 400
    path = next(folder.glob("*.pt"))
    save_pt(path, {"original_indices": [0]})
    os.utime(path, (past, past))
    (folder / "failures.csv").write_text("style,original_index,element_index,reason\nswap,1,2,too long\n")
    os.utime(folder / "failures.csv", (past, past))
    assert missing(chain())[0] == "attn_act_logi"
    assert "attn_act_logi" not in missing(chain("--keep_going"))


def test_a_check_that_found_nothing_is_done_and_keeps_its_findings(chain, monkeypatch):
    (check,) = [item for item in chain(stages=("0",)) if item.state != "left out"]
    assert check.state == "missing"
    assert "results/r/p/prompt_findings.csv" in check.step.arguments
    stamp(check.step, "prompt_findings.csv", monkeypatch=monkeypatch)
    assert missing(chain(stages=("0",))) == []


@pytest.mark.parametrize(("answer", "planned"), [("5", True), ("three", True), ("Paris", False), ("", False)])
def test_stage_3_is_planned_if_an_answer_can_be_scored(tmp_path, answer, planned):
    (tmp_path / "p.json").write_text(json.dumps(rows(2, answer=answer) + rows(1)))
    words = ["--prompt_file", str(tmp_path / "p.json"), *STAGE_2_WORDS]
    items = cluster_plan.plan(cluster_plan.parse_pipeline_args(words), ("2", "3", "5"))
    assert ("evaluate_predictions" in [item.step.stem for item in items]) == planned
    (tmp_path / "scores.csv").write_text("style,original_index,correct\n")
    own = cluster_plan.parse_pipeline_args([*words, "--maths_items", str(tmp_path / "scores.csv")])
    (accuracy,) = [i.step for i in cluster_plan.plan(own, ("3",)) if i.step.stem == "evaluate_predictions"]
    assert accuracy.arguments[-2:] == ("--maths_items", str(tmp_path / "scores.csv"))


def test_the_models_that_are_fetched_are_those_that_will_be_loaded(chain):
    args = cluster_plan.parse_pipeline_args(
        ["--prompt_file", "p.json", "--run_name", "new", "--model_name", "a/b", "--reward_model", "c/d",
         "--embedding_model", "e/f", "--", "--revision", "v1"]
    )  # fmt: skip
    planned = cluster_plan.plan(args, ("2", "4"))
    assert set(cluster_plan.models_of(planned, args)) == {("a/b", "v1"), ("c/d", ""), ("e/f", "")}
    assert cluster_plan.models_of(cluster_plan.plan(args, ("3",)), args) == []


def test_a_control_is_counted_by_what_was_planned(tmp_path):
    """The prompt file has no `split@swap`: how many rows it has is in run.json."""
    folder = write_run(tmp_path / "split@swap", "split@swap", rows(10), [((0, 1), 1060.0)], failed=(3,))
    assert run_status.read_style(folder).missing == 0
    begin_run(folder, read_json_file(folder / "run.json")["settings"], {}, planned=8)
    status = run_status.read_style(folder)
    assert (status.done, status.failed, status.missing) == (2, 1, 5)
