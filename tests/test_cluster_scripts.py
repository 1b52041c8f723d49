"""The shell side of cluster runs, without a Slurm: job files, site.env, submit.sh's plan, and stage.sh's life of a job.

Commands of Slurm that are needed are small stand-ins on PATH that write down how they were called.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import tiny_models

ROOT = Path(__file__).resolve().parents[1]
SLURM_FILES = sorted(ROOT.glob("*/hpc/*.slurm"))
SHELL_FILES = sorted([*ROOT.glob("*/hpc/*.sh"), *ROOT.glob("tests/*.sh"), *SLURM_FILES])
WITH_GPU = {"attn_act_logi", "serve_responses", "patch_activations", "score_scripts", "compare_responses"}


def name_of(path):
    return str(path.relative_to(ROOT))


@pytest.fixture
def checkout(tmp_path):
    """A copy of the scripts on a path with spaces, its site.env filled in for this machine."""
    copy = tmp_path / "my clones" / "error interp"
    for folder in ROOT.glob("[0-9]_*"):
        shutil.copytree(folder, copy / folder.name, ignore=shutil.ignore_patterns("__pycache__", "*.json"))
    fill_in(copy, ACCOUNT='""', VENV=f'"{sys.prefix}"')
    return copy


def fill_in(copy, **values):
    """Set variables in a checkout's site.env."""
    site = copy / "1_utils" / "hpc" / "site.env"
    text = site.read_text()
    for name, value in values.items():
        text, count = re.subn(rf"^{name}=\S*(?: [^#\n]*)?", lambda _, n=name, v=value: f"{n}={v} ", text, flags=re.M)
        assert count == 1, name
    site.write_text(text)


@pytest.fixture
def stand_ins(tmp_path):
    """PATH with commands that append their arguments to `calls`, one JSON list a call; `scontrol show` answers."""
    folder = tmp_path / "stand ins"
    folder.mkdir()
    for name in ("sbatch", "squeue", "scontrol", "scancel"):
        (folder / name).write_text(
            f"#!{sys.executable}\nimport json, os, sys\n"
            f"with open({str(tmp_path / 'calls')!r}, 'a') as f:\n"
            f"    f.write(json.dumps([{name!r}, *sys.argv[1:]]) + '\\n')\n"
            f"if sys.argv[1:2] == ['show']:\n"
            f"    print('   JobState=' + os.environ.get('JOB_STATE', 'RUNNING'), 'Reason=None')\n"
            f"    print('   StartTime=x EndTime=' + os.environ.get('END_TIME', 'Unknown'), 'Deadline=N/A')\n"
            f"if {name!r} == 'squeue': print(os.environ.get('QUEUE', ''))\n"
        )
        (folder / name).chmod(0o755)
    (tmp_path / "calls").touch()
    return folder


def calls(tmp_path, name):
    return [call for line in (tmp_path / "calls").read_text().splitlines() if (call := json.loads(line))[0] == name]


def run(command, cwd, stand_ins=None, **environment):
    keep = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "SBATCH"))}
    if stand_ins:
        keep["PATH"] = f"{stand_ins}:{keep['PATH']}"
    done = subprocess.run(command, cwd=cwd, env=keep | environment, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout, done.stderr


# --- files


@pytest.mark.parametrize("path", SHELL_FILES, ids=name_of)
def test_shellcheck_finds_nothing(path):
    if shutil.which("shellcheck") is None:
        assert os.environ.get("ERROR_INTERP_REQUIRE_SLURM") != "1", "shellcheck is not installed"
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(["shellcheck", "-x", str(path)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", SLURM_FILES, ids=name_of)
def test_a_job_file_runs_its_neighbour_and_survives_limits(path):
    text = path.read_text()
    settings = dict(
        line.removeprefix("#SBATCH --").partition("=")[::2] for line in re.findall("^#SBATCH .*", text, re.M)
    )
    assert settings.keys() >= {"time", "mem", "requeue", "cpus-per-task"}
    assert settings["job-name"] == path.stem
    assert settings["output"] == f"logs/{path.stem}_%A_%a.out"
    assert settings["open-mode"] == "append"
    assert re.fullmatch(r"B:USR1@\d+", settings["signal"])
    assert settings.get("gres") == ("gpu:1" if path.stem in WITH_GPU else None)
    script = f"{path.parents[1].name}/run_scripts/{path.stem}.py"
    assert re.search(rf" {re.escape(script)} \"\$@\"$", text, re.M)
    folder = re.escape(path.parents[1].name)
    assert re.search(rf"#   sbatch (--\S+ )*{folder}/hpc/{path.name} --", text), "no command that shows its use"


def test_every_stage_has_a_job_file():
    assert {path.parents[1].name[0] for path in SLURM_FILES} >= set("012345")


@pytest.mark.parametrize("path", SLURM_FILES, ids=name_of)
def test_a_job_file_finds_its_checkout_and_passes_every_word_on(path, tmp_path, stand_ins):
    copy = tmp_path / "a b" / "check out"
    for name in ("1_utils/hpc", f"{path.parents[1].name}/hpc"):
        (copy / name).mkdir(parents=True, exist_ok=True)
    job = copy / path.parents[1].name / "hpc" / path.name
    shutil.copy(path, job)
    (copy / "1_utils" / "hpc" / "stage.sh").write_text('printf "<%s>" "$@"\n')
    # An array's last task bears the array's own number, for which Slurm shows all of its tasks.
    told = "".join(f"JobId={n} JobName=x\n   Command={job} --x a b\n   WorkDir=/\n" for n in (7, 8))
    (stand_ins / "scontrol").write_text(f"#!/bin/sh\ncat <<'END'\n{told}END\n")
    spool = tmp_path / "slurm_script"
    shutil.copy(path, spool)
    code, out, err = run(
        ["bash", spool, "--prompt_file", "my file.json", ""], "/", stand_ins, SLURM_JOB_ID="7", SLURM_SUBMIT_DIR="/"
    )
    assert (code, err) == (0, "")
    assert out.endswith(f"<{path.parents[1].name}/run_scripts/{path.stem}.py><--prompt_file><my file.json><>")


# --- submit.sh


def write_prompts(path, **extra):
    path.write_text(json.dumps([{"normal": f"Add: {i} + 1 =", "main": f"Ad: {i} + 1 =", **extra} for i in range(3)]))


def submit(checkout, cwd, stand_ins, *words, **environment):
    cwd.mkdir(exist_ok=True)
    return run([checkout / "1_utils" / "hpc" / "submit.sh", *words], cwd, stand_ins, **environment)


def planned(out):
    """Commands of a verbose dry run as lists of words, by job name; the first word is the name that others wait for."""
    lines = re.findall(r"^    (JOB\d+): sbatch (.*)", out, re.M)
    words = [[number, *shlex.split(line)] for number, line in lines]
    return {next(word.partition("=")[2] for word in line if word.startswith("--job-name=")): line for line in words}


def test_site_env_as_it_is_shipped_is_refused_in_one_line(checkout, tmp_path, stand_ins):
    shutil.copy(ROOT / "1_utils" / "hpc" / "site.env", checkout / "1_utils" / "hpc" / "site.env")
    code, out, err = submit(checkout, tmp_path / "w", stand_ins, "--", "--run_name", "r")
    assert (code, out) == (2, "")
    assert re.fullmatch(r"error: .*site\.env: ACCOUNT still holds the placeholder <.*>; .*\n", err)


@pytest.mark.parametrize(("name", "value"), [("GPU_OPTIONS", '("--reservation=<name>")'), ("HF_CACHE", '"/x/<user>"')])
def test_a_placeholder_anywhere_is_refused(checkout, tmp_path, stand_ins, name, value):
    fill_in(checkout, **{name: value})
    code, _, err = submit(checkout, tmp_path / "w", stand_ins, "--dry-run", "--", "--run_name", "r")
    assert code == 2
    assert err.count("\n") == 1
    assert f"{name} still holds" in err


def test_a_dry_run_prints_the_chain_and_does_nothing(checkout, tmp_path, stand_ins):
    fill_in(checkout, GPU_PARTITION="big", PARTITION="small", CAPTURE_GRES="gpu:a100:2", GPU_OPTIONS="(--time=2:00:00)")
    prompts = tmp_path / "my prompts.json"
    write_prompts(prompts, answer=1)
    words = [
        "--dry-run",
        "--verbose",
        "--shards",
        "3",
        "--stages",
        "0,2,3,5,report",
        "--",
        "--prompt_file",
        str(prompts),
    ]
    words += ["--model_name", "some/model", "--run_name", "run 1", "--patch", "main"]
    words += ["--", "--neurons", "--stop_strings", "a b"]
    code, out, err = submit(checkout, tmp_path / "w d", stand_ins, *words)
    assert (code, err) == (0, "")
    jobs = planned(out)
    capture = jobs["attn_act_logi"]
    assert {"--array=0-2", "--gres=gpu:a100:2", "--partition=big", "--time=2:00:00", "--parsable"} <= set(capture)
    assert f"--comment={tmp_path / 'w d' / 'outputs' / 'run 1' / 'my prompts'}" in capture
    assert f"--output={tmp_path / 'w d' / 'logs' / 'attn_act_logi_%A_%a.out'}" in capture
    assert capture[-2:] == ["--stop_strings", "a b"]
    assert "--partition=small" in jobs["dirs_eval"]
    assert not [word for word in jobs["dirs_eval"] if word.startswith(("--gres", "--array", "--time"))]
    assert {"--array=0-2", "--gres=gpu:a100:2", "--styles", "main"} <= set(jobs["patch_activations"])
    order = {name: words[0] for name, words in jobs.items()}
    waits = {name: set(re.findall(r"JOB\d+", " ".join(words[1:]))) for name, words in jobs.items()}
    assert waits["check_prompts"] == set()
    assert waits["attn_act_logi"] == {order["check_prompts"]}
    assert waits["dirs_eval"] == {order["attn_act_logi"]}
    assert waits["patch_activations"] == {order["attn_act_logi"]}
    assert waits["causal_effects"] >= {order["attn_act_logi"], order["patch_activations"], order["head_sensitivity"]}
    assert waits["head_sensitivity"] == {order["attn_act_logi"], order["evaluate_predictions"]}
    # What stage 0 and 3 would add, the others can do without: a stage that fails there cancels nothing.
    capture, accuracy = order["attn_act_logi"], order["evaluate_predictions"]
    assert f"--dependency=afterany:{order['check_prompts']}" in jobs["attn_act_logi"]
    assert f"--dependency=afterok:{capture},afterany:{accuracy}" in jobs["head_sensitivity"]
    assert any(word.startswith(f"--dependency=afterok:{capture},afterany:") for word in jobs["build_report"])
    findings = jobs["check_prompts"][jobs["check_prompts"].index("--output_csv") + 1]
    assert findings == "results/run 1/my prompts/prompt_findings.csv"
    assert waits["build_report"] == set(order.values()) - {order["build_report"]}
    assert "neuron_sensitivity" in jobs
    assert all("--kill-on-invalid-dep=yes" in words for words in jobs.values())
    assert list((tmp_path / "w d").iterdir()) == []
    assert calls(tmp_path, "sbatch") == []


def test_a_server_writes_the_text_before_the_capture_array(checkout, tmp_path, stand_ins):
    fill_in(checkout, CAPTURE_GRES="gpu:a100:2")
    write_prompts(tmp_path / "p.json", answer=1)
    words = ("--prompt_file", str(tmp_path / "p.json"), "--run_name", "r", "--model_name", "m")
    words = ("--dry-run", "--verbose", "--shards", "3", "--text_engine", "vllm", "--stages", "2,3", "--", *words)
    code, out, err = submit(checkout, tmp_path / "w", stand_ins, *words, "--", "--max_new_tokens", "8")
    assert (code, err) == (0, "")
    jobs = planned(out)
    assert list(jobs) == ["serve_responses", "attn_act_logi", "evaluate_predictions"]
    text, capture = jobs["serve_responses"], jobs["attn_act_logi"]
    assert "--gres=gpu:a100:2" in text
    assert not [word for word in text if word.startswith(("--array", "--dependency"))]
    assert f"--dependency=afterok:{text[0]}" in capture
    assert {"--array=0-2", "--gres=gpu:a100:2"} <= set(capture)
    cut = text.index("--")
    assert [*text[cut + 1 :], "--stored_text"] == capture[-len(text) + cut :]
    assert f"--dependency=afterok:{capture[0]}" in jobs["evaluate_predictions"]
    assert table_of(out)["serve_responses"][2:6] == ["1", "08:00:00", "64G", "16.0"]
    for flags in (("--max_new_tokens", "0"), ("--responses_file", "r.jsonl")):
        code, _, err = submit(checkout, tmp_path / "w", stand_ins, *words, "--", *flags)
        assert (code, err.count("\n")) == (2, 1)
        assert "--stored_text: goes with neither --responses_file nor" in err


def table_of(out):
    """Rows of a dry run's table by script, as the words of each line."""
    lines = [line.split() for line in out.splitlines() if line.startswith("JOB")]
    return {words[1]: words for words in lines}


def test_a_dry_run_is_a_table_that_one_can_read(checkout, tmp_path, stand_ins):
    fill_in(checkout, STAGE_TIME='([2]="1-12:00:00" [5]="90")', STAGE_MEM='([2]="96G")', CAPTURE_GRES="gpu:a100:2")
    write_prompts(tmp_path / "p.json", answer=1)
    words = ("--prompt_file", str(tmp_path / "p.json"), "--run_name", "r", "--model_name", "nobody/nothing")
    code, out, err = submit(checkout, tmp_path / "w", stand_ins, "--dry-run", "--shards", "3", "--", *words)
    assert (code, err) == (0, "")
    table = table_of(out)
    assert table["attn_act_logi"][2:6] == ["3", "1-12:00:00", "96G", "216.0"]  # 3 tasks of 2 GPUs for 36 hours
    assert table["dirs_eval"][2:6] == ["1", "90", "16G", "-"]
    assert "at most 218 GPU-hours" in out
    assert "sbatch" not in out


def test_a_dry_run_names_the_disk_that_stage_2_needs_if_its_model_is_here(checkout, tmp_path, stand_ins):
    tiny_models.save(tmp_path / "tiny")
    write_prompts(tmp_path / "p.json")
    words = ("--prompt_file", str(tmp_path / "p.json"), "--run_name", "r", "--model_name", str(tmp_path / "tiny"))
    code, out, err = submit(checkout, tmp_path / "w", stand_ins, "--dry-run", "--stages", "2", "--", *words)
    assert (code, err) == (0, "")
    assert re.search(r"^JOB1 +attn_act_logi .* [\d.]+ MB  -$", out, re.M), out


@pytest.mark.parametrize("setting", [{"MODULES": '"python/3.11 cuda"'}, {"CONTAINER": '"/no/image.sif"'}])
def test_a_dry_run_works_where_the_modules_and_the_image_are_not(checkout, tmp_path, stand_ins, setting):
    fill_in(checkout, **setting)
    write_prompts(tmp_path / "p.json")
    words = ("--stages", "3,5", "--", "--prompt_file", str(tmp_path / "p.json"), "--run_name", "r", "--model_name", "m")
    code, out, err = submit(checkout, tmp_path / "w", stand_ins, "--dry-run", *words)
    assert (code, err) == (0, "")
    assert set(table_of(out)) == {"dirs_eval", "head_sensitivity", "activation_diffs", "probe_layers"}  # no `answer`
    assert submit(checkout, tmp_path / "w", stand_ins, *words)[0] == 2


def test_a_site_may_ask_for_gpus_by_an_option_of_its_own(checkout, tmp_path, stand_ins):
    fill_in(checkout, GPU_GRES='"--gpus-per-node=a100:2"')
    write_prompts(tmp_path / "p.json")
    words = ("--", "--prompt_file", str(tmp_path / "p.json"), "--run_name", "r", "--model_name", "nobody/nothing")
    code, out, _ = submit(checkout, tmp_path / "w", stand_ins, "--dry-run", "--verbose", *words)
    assert code == 0
    for name in ("attn_act_logi", "compare_responses"):
        assert {"--gres=none", "--gpus-per-node=a100:2"} <= set(planned(out)[name])
    assert "--gres=none" not in planned(out)["dirs_eval"]
    assert table_of(out)["attn_act_logi"][5] == "16.0"


def test_a_chain_that_keeps_going_waits_for_ends_and_not_for_success(checkout, tmp_path, stand_ins):
    write_prompts(tmp_path / "p.json", answer=1)
    words = ("--prompt_file", str(tmp_path / "p.json"), "--run_name", "r", "--model_name", "m", "--keep_going")
    code, out, _ = submit(
        checkout, tmp_path / "w", stand_ins, "--dry-run", "--verbose", "--stages", "2,3,5,report", "--", *words
    )
    assert code == 0
    assert "afterany:" in out
    assert "afterok" not in out


def test_what_is_in_the_queue_is_waited_for_and_not_submitted_again(checkout, tmp_path, stand_ins):
    write_prompts(tmp_path / "p.json")
    folder = tmp_path / "w d" / "outputs" / "r" / "p"
    queue = f"40|attn_act_logi|{folder} \n41|dirs_eval|{folder}\n42|attn_act_logi|{folder}2\n"
    words = ("--", "--prompt_file", str(tmp_path / "p.json"), "--run_name", "r", "--model_name", "m")
    for stages in ("2,5", "5"):
        code, out, _ = submit(
            checkout, tmp_path / "w d", stand_ins, "--dry-run", "--verbose", "--stages", stages, *words, QUEUE=queue
        )
        jobs = planned(out)
        assert (code, set(jobs)) == (0, {"dirs_eval", "head_sensitivity", "activation_diffs", "probe_layers"})
        assert all("--dependency=afterok:40" in words for words in jobs.values())


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--shards", "0", "--", "--x"), "--shards 0"),
        (("--stages", "2,7", "--", "--prompt_file", "p.json", "--run_name", "r"), "there is no stage 7"),
        (("--stages",), "--stages: expected one argument"),
        (("--prompt_file", "p.json"), "no such flag before --; the pipeline's arguments come after it"),
        ((), "no arguments for the pipeline"),
        (("--", "--prompt_file", "nowhere.json", "--run_name", "r"), "nowhere.json: no such file"),
        (("--", "--prompt_file", "p.json", "--run_name", "r", "--", "--max_new_tokens", "-1"), "--max_new_tokens -1"),
    ],
)
def test_a_mistake_is_told_before_anything_is_submitted(checkout, tmp_path, stand_ins, words, told):
    (tmp_path / "w").mkdir()
    write_prompts(tmp_path / "w" / "p.json")
    code, _, err = submit(checkout, tmp_path / "w", stand_ins, *words)
    assert code == 2
    assert told in err
    assert err.count("\n") == 1
    assert calls(tmp_path, "sbatch") == []


def test_a_misspelled_flag_of_stage_2_is_told_before_anything_is_submitted(checkout, tmp_path, stand_ins):
    (tmp_path / "w").mkdir()
    write_prompts(tmp_path / "w" / "p.json")
    words = ("--", "--prompt_file", "p.json", "--run_name", "r", "--", "--max_new_tokns", "8")
    code, _, err = submit(checkout, tmp_path / "w", stand_ins, *words)
    assert code == 2
    assert err.startswith("error: after --: --max_new_tokns: there is no such flag; did you mean --max_new_tokens?")
    assert err.count("\n") == 1
    assert calls(tmp_path, "sbatch") == []


# --- stage.sh

SLEEPER = """
import os, signal, sys, time
from pathlib import Path
folder = Path(sys.argv[sys.argv.index("--output_dir") + 1])
def stop(number, frame):
    (folder / "signal").write_text(signal.Signals(number).name)
    if "stubborn" not in sys.argv:
        time.sleep(0.5)  # what is under way is finished
        sys.exit(75)
signal.signal(signal.SIGUSR1, stop)
signal.signal(signal.SIGTERM, stop)
(folder / "pid").write_text(str(os.getpid()))
time.sleep(30)
"""
IN_SLURM = {"SLURM_JOB_ID": "12", "SLURM_ARRAY_JOB_ID": "10", "SLURM_ARRAY_TASK_ID": "2"}


def start_stage(checkout, cwd, stand_ins, *words, **environment):
    keep = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "SBATCH"))}
    keep["PATH"] = f"{stand_ins}:{keep['PATH']}"
    return subprocess.Popen(
        ["bash", checkout / "1_utils" / "hpc" / "stage.sh", *words],
        cwd=cwd,
        env=keep | IN_SLURM | environment,
        stdout=open(cwd / "log.txt", "w"),
        stderr=subprocess.STDOUT,
    )


def wait_for(path, seconds=20):
    for _ in range(seconds * 20):
        if path.is_file() and path.read_text():
            return path.read_text()
        time.sleep(0.05)
    raise AssertionError(f"{path} did not come")


@pytest.fixture
def sleeper(checkout, tmp_path):
    """A script that runs until it is told to stop, its folder, and what the job has noted there."""
    (checkout / "2_inference" / "run_scripts" / "sleeper.py").write_text(SLEEPER)
    (tmp_path / "out dir").mkdir()
    return ("2_inference/run_scripts/sleeper.py", "--output_dir", "out dir")


def test_near_its_time_limit_a_task_finishes_and_it_alone_goes_back(checkout, tmp_path, stand_ins, sleeper):
    job = start_stage(checkout, tmp_path, stand_ins, "--resumes", *sleeper)
    wait_for(tmp_path / "out dir" / "pid")
    job.send_signal(signal.SIGUSR1)
    assert job.wait(20) == 75
    assert (tmp_path / "out dir" / "signal").read_text() == "SIGUSR1"
    assert calls(tmp_path, "scontrol")[-1] == ["scontrol", "requeue", "10_2"]
    note = (tmp_path / "out dir" / ".job.sleeper.2").read_text()
    assert "state=put back at the time limit\n" in note
    assert f"log={tmp_path / 'log.txt'}\n" in note


def test_one_that_does_not_finish_in_time_goes_back_before_the_limit(checkout, tmp_path, stand_ins, sleeper):
    end = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + 22))  # 20 s before: in about 2 s
    job = start_stage(checkout, tmp_path, stand_ins, "--resumes", *sleeper, "stubborn", END_TIME=end)
    pid = int(wait_for(tmp_path / "out dir" / "pid"))
    job.send_signal(signal.SIGUSR1)
    deadline = time.time() + 15
    while ["scontrol", "requeue", "10_2"] not in calls(tmp_path, "scontrol"):
        assert time.time() < deadline
        time.sleep(0.1)
    assert job.poll() is None
    os.kill(pid, signal.SIGKILL)
    job.wait(20)


def test_a_job_that_was_cancelled_or_preempted_does_not_put_itself_back(checkout, tmp_path, stand_ins, sleeper):
    job = start_stage(checkout, tmp_path, stand_ins, "--resumes", *sleeper)
    wait_for(tmp_path / "out dir" / "pid")
    job.send_signal(signal.SIGTERM)
    assert job.wait(20) == 75
    assert (tmp_path / "out dir" / "signal").read_text() == "SIGTERM"
    assert calls(tmp_path, "scontrol") == []


def test_a_stage_that_cannot_resume_is_left_in_peace_and_the_log_says_why(checkout, tmp_path, stand_ins, sleeper):
    job = start_stage(checkout, tmp_path, stand_ins, *sleeper)
    pid = int(wait_for(tmp_path / "out dir" / "pid"))
    job.send_signal(signal.SIGUSR1)
    time.sleep(1)
    assert job.poll() is None
    os.kill(pid, signal.SIGTERM)
    job.wait(20)
    assert "give it more (sbatch --time=" in (tmp_path / "log.txt").read_text()
    assert calls(tmp_path, "scontrol") == []


@pytest.mark.parametrize(("restarts", "again"), [("0", True), ("2", True), ("3", False)])
def test_a_killed_process_goes_back_three_times_at_most(checkout, tmp_path, stand_ins, sleeper, restarts, again):
    job = start_stage(checkout, tmp_path, stand_ins, "--resumes", *sleeper, SLURM_RESTART_COUNT=restarts)
    os.kill(int(wait_for(tmp_path / "out dir" / "pid")), signal.SIGKILL)
    assert job.wait(20) == 137
    assert (["scontrol", "requeue", "10_2"] in calls(tmp_path, "scontrol")) == again


def test_a_task_that_slurm_has_cancelled_is_not_brought_back(checkout, tmp_path, stand_ins, sleeper):
    job = start_stage(checkout, tmp_path, stand_ins, "--resumes", *sleeper, JOB_STATE="CANCELLED")
    os.kill(int(wait_for(tmp_path / "out dir" / "pid")), signal.SIGKILL)
    assert job.wait(20) == 137
    assert ["scontrol", "requeue", "10_2"] not in calls(tmp_path, "scontrol")


def test_a_task_does_not_go_back_for_ever(checkout, tmp_path, stand_ins, sleeper):
    fill_in(checkout, MAX_RESTARTS="4")
    job = start_stage(checkout, tmp_path, stand_ins, "--resumes", *sleeper, SLURM_RESTART_COUNT="4")
    wait_for(tmp_path / "out dir" / "pid")
    job.send_signal(signal.SIGUSR1)
    assert job.wait(20) == 75
    assert ["scontrol", "requeue", "10_2"] not in calls(tmp_path, "scontrol")


TALKER = """
import json, os, sys
words = sys.argv[1:]
names = ("HF_HOME", "HF_HUB_OFFLINE", "XDG_CACHE_HOME", "MPLCONFIGDIR")
print(json.dumps([words, {name: os.environ.get(name) for name in names}]))
sys.exit(int(words[0]))
"""


def talk(checkout, cwd, stand_ins, *words, **environment):
    (checkout / "3_maths_eval" / "run_scripts" / "talker.py").write_text(TALKER)
    cwd.mkdir(exist_ok=True)
    stage = checkout / "1_utils" / "hpc" / "stage.sh"
    code, out, err = run(["bash", stage, "3_maths_eval/run_scripts/talker.py", *words], cwd, stand_ins, **environment)
    said = [json.loads(line) for line in out.splitlines() if line.startswith("[[")]
    return code, said[0] if said else None, err


@pytest.mark.parametrize("code", [0, 1, 2, 5])
def test_exit_codes_and_words_pass_through(checkout, tmp_path, stand_ins, code):
    words = [str(code), "--results_dir", "my results", "it's", 'a "b" $HOME *', ""]
    got, said, err = talk(checkout, tmp_path / "w d", stand_ins, *words)
    assert (got, err, said[0]) == (code, "", words)
    assert said[1]["HF_HUB_OFFLINE"] == "1"
    state = (tmp_path / "w d" / "my results" / ".job.talker.0").read_text()
    assert ("state=done\n" if code == 0 else f"state=exit code {code}\n") in state


@pytest.mark.parametrize("home", ["/nonexistent", ""])
def test_without_a_home_to_write_in_caches_go_into_the_checkout(checkout, tmp_path, stand_ins, home):
    code, said, err = talk(checkout, tmp_path / "w", stand_ins, "0", HOME=home)
    assert (code, err) == (0, "")
    assert said[1]["XDG_CACHE_HOME"] == str(checkout / "models" / ".cache")
    assert Path(said[1]["MPLCONFIGDIR"]).is_dir()


def test_a_home_without_a_cache_folder_is_enough(checkout, tmp_path, stand_ins):
    (tmp_path / "home").mkdir()
    code, said, err = talk(checkout, tmp_path / "w", stand_ins, "0", HOME=str(tmp_path / "home"))
    assert (code, err) == (0, "")
    assert said[1]["XDG_CACHE_HOME"] is None


def test_the_model_cache_of_site_env_is_made_and_used(checkout, tmp_path, stand_ins):
    fill_in(checkout, HF_CACHE=f'"{tmp_path}/scratch/hf cache"', OFFLINE="0")
    code, said, _ = talk(checkout, tmp_path / "w", stand_ins, "0")
    assert (code, said[1]["HF_HOME"], said[1]["HF_HUB_OFFLINE"]) == (0, f"{tmp_path}/scratch/hf cache", None)
    assert (tmp_path / "scratch" / "hf cache").is_dir()


@pytest.mark.parametrize("runtime", ["apptainer", "singularity"])
def test_a_container_runs_the_script_with_the_gpu_flag_and_the_folders_it_needs(checkout, tmp_path, stand_ins, runtime):
    image = tmp_path / "my image.sif"
    image.touch()
    (stand_ins / runtime).write_text(
        f"#!/bin/bash\nprintf '%s\\n' \"$@\" >{shlex.quote(str(tmp_path / 'apptainer words'))}\n"
        'while [[ "$1" != *.sif ]]; do shift; done\nshift\nexec "$@"\n'
    )
    (stand_ins / runtime).chmod(0o755)
    fill_in(checkout, CONTAINER=f'"{image}"', CONTAINER_OPTIONS="(--bind /data)")
    code, said, err = talk(checkout, tmp_path / "w d", stand_ins, "5", "a b")
    assert (code, err, said[0]) == (5, "", ["5", "a b"])
    words = (tmp_path / "apptainer words").read_text().splitlines()
    assert words[:2] == ["exec", "--nv"]
    binds = [after for word, after in pairwise(words) if word == "--bind"]
    assert {str(checkout), str(tmp_path / "w d"), "/data"} <= set(binds)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"VENV": '"/no/such/venv"'}, "/no/such/venv: holds no bin/python"),
        ({"CONTAINER": '"/no/image.sif"'}, "no such image"),
        ({"MODULES": '"python/3.11"'}, "no `module` command"),
        ({"VENV": '"<your environment>"'}, "VENV still holds the placeholder"),
    ],
)
def test_a_wrong_site_is_told_in_one_line(checkout, tmp_path, stand_ins, settings, told):
    fill_in(checkout, **settings)
    code, said, err = talk(checkout, tmp_path / "w", stand_ins, "0")
    assert (code, said) == (2, None)
    assert told in err
    assert err.count("\n") == 1


def test_the_account_on_trial_does_not_stop_a_job_that_slurm_has_accepted(checkout, tmp_path, stand_ins):
    fill_in(checkout, ACCOUNT='"<your-account>"')
    assert talk(checkout, tmp_path / "w", stand_ins, "0")[0] == 0


def test_sourcing_site_env_gives_a_plain_sbatch_the_same_facts(checkout, tmp_path):
    fill_in(checkout, ACCOUNT='"my project"', PARTITION="short")
    shown = 'source "$1" && env | grep ^SBATCH_ | sort'
    code, out, _ = run(["bash", "-c", shown, "x", checkout / "1_utils" / "hpc" / "site.env"], tmp_path)
    assert (code, out) == (0, "SBATCH_ACCOUNT=my project\nSBATCH_PARTITION=short\n")
