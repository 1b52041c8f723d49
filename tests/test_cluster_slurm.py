"""Cluster runs on a real Slurm (tests/setup_slurm.sh): disturbed in every way, and the same numbers as without."""

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_models
import torch
from run_store import load_pt, pt_files

ROOT = Path(__file__).resolve().parents[1]
SLURM_CONF = Path(os.environ.get("ERROR_INTERP_SLURM", "/tmp/error_interp_slurm")) / "slurm.conf"
STYLES = ("normal", "main")
ROWS = 130  # three files a style, so that each of three shards has work
SETTINGS = ("--prompt_keys", "all", "--raw_layers", "1", "--max_new_tokens", "24")

pytestmark = pytest.mark.slurm


def slurm(*command, check=True):
    """Output of a Slurm command."""
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=60)
    assert not check or done.returncode == 0, done.stderr
    return done.stdout


def environment():
    keep = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_"))}
    # A bar that is written often shows a test when a job is in the middle of its work.
    return keep | {"SLURM_CONF": str(SLURM_CONF), "TQDM_MININTERVAL": "0.1", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module", autouse=True)
def controller():
    """Skip, or fail where ERROR_INTERP_REQUIRE_SLURM=1, without the Slurm of tests/setup_slurm.sh."""
    there = shutil.which("sinfo") is not None and SLURM_CONF.is_file()
    nodes = slurm("sinfo", "--Node", "--noheader", "--format=%N %T", check=False).split() if there else []
    if nodes[::2] != ["test1", "test2", "test3"]:
        reason = "no Slurm for tests here; tests/setup_slurm.sh starts one"
        if os.environ.get("ERROR_INTERP_REQUIRE_SLURM") == "1":
            pytest.fail(reason)
        pytest.skip(reason)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with spaces in its name: a checkout made ready for this cluster, a tiny model, prompts, a reference."""
    folder = tmp_path_factory.mktemp("on a cluster")
    copy = folder / "error interp"
    for stage in ROOT.glob("[0-9]_*"):
        shutil.copytree(stage, copy / stage.name, ignore=shutil.ignore_patterns("__pycache__"))
    site = copy / "1_utils" / "hpc" / "site.env"
    text = re.sub('^ACCOUNT="[^"]*"', 'ACCOUNT=""', site.read_text(), flags=re.M)
    site.write_text(re.sub('^VENV=""', f'VENV="{sys.prefix}"', text, flags=re.M))
    tiny_models.save(folder / "tiny model")
    rows = [{"normal": f"Please add: {i} + {i % 7} =", "main": f"Plesae add: {i} + {i % 7} ="} for i in range(ROWS)]
    (folder / "prompts.json").write_text(json.dumps([row | {"answer": i + i % 7} for i, row in enumerate(rows)]))
    script = copy / "2_inference" / "run_scripts" / "attn_act_logi.py"
    local = [sys.executable, script, *capture_words(folder, folder / "undisturbed"), "--batch_size", "32"]
    subprocess.run(local, check=True, env=environment() | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True)
    return folder


@pytest.fixture(autouse=True)
def alone(tmp_path):
    """One test at a time has the nodes, whoever else runs tests; what a failed one leaves in the queue goes."""
    with open(SLURM_CONF.with_name("tests.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
        cancel_leftovers(tmp_path)


def cancel_leftovers(tmp_path):
    """Cancel the jobs that were submitted from this folder and still are in the queue."""
    for line in slurm("scontrol", "show", "jobs", "--oneliner", check=False).splitlines():
        if f"WorkDir={tmp_path}" in line and (job := re.match(r"JobId=(\d+)", line)):
            slurm("scancel", job[1], check=False)


def capture_words(place, output, prompts="prompts.json"):
    """Arguments of stage 2."""
    return ["--model_name", str(place / "tiny model"), "--prompt_file", str(place / prompts), "--output_dir",
            str(output), *SETTINGS]  # fmt: skip


def assert_same_numbers(found, expected, but=()):
    """Two run folders hold the same rows and, to rounding, the same numbers."""
    for style in STYLES:
        files = pt_files(expected / style)
        assert [path.name for path in pt_files(found / style)] == [path.name for path in files]
        assert len(files) == 3
        for path in files:
            a, b = load_pt(found / style / path.name), load_pt(path)
            assert a.keys() == b.keys()
            for key, value in ((key, value) for key, value in b.items() if key not in but):
                same(a[key], value, f"{style}/{path.name} {key}")


def same(a, b, what):
    if isinstance(b, torch.Tensor):
        close = 2e-3 if b.dtype == torch.float16 else 1e-4
        torch.testing.assert_close(a, b, rtol=close, atol=close, equal_nan=True, msg=lambda text: f"{what}: {text}")
    elif isinstance(b, dict):
        assert a.keys() == b.keys()
        for key in b:
            same(a[key], b[key], f"{what} {key}")
    else:
        assert a == b, what


# --- jobs


def submit(place, cwd, *words):
    """submit.sh of the checkout, called from `cwd`."""
    cwd.mkdir(exist_ok=True)
    command = [place / "error interp" / "1_utils" / "hpc" / "submit.sh", *words]
    return subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=120)


def sbatch_capture(place, cwd, *options, words=("--batch_size", "1")):
    """A stage 2 job by itself, as its file says; returns the array's number."""
    (cwd / "logs").mkdir(parents=True, exist_ok=True)
    job = place / "error interp" / "2_inference" / "hpc" / "attn_act_logi.slurm"
    command = ["sbatch", "--parsable", *options, job, *capture_words(place, "outputs/run"), *words]
    done = subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def known_jobs():
    return set(re.findall(r"^JobId=(\d+)", slurm("scontrol", "show", "jobs", "--oneliner"), re.M))


def tell(job):
    """What Slurm knows of a job or array task, as a dict."""
    text = slurm("scontrol", "show", "job", job, "--oneliner", check=False).splitlines()[0]
    return dict(re.findall(r"(\w+)=(\S*)", text))


def wait_until(condition, what, seconds=240):
    """Poll until `condition()` is true; returns what it gave."""
    for _ in range(seconds * 5):
        if found := condition():
            return found
        time.sleep(0.2)
    raise AssertionError(f"waited {seconds} s for: {what}\n{slurm('scontrol', 'show', 'jobs')}")


def ended(*jobs):
    """All of these jobs are gone from the queue."""
    queue = slurm("squeue", "--noheader", "--format=%F").split()
    return not set(jobs) & set(queue)


def in_its_work(log, start=1):
    """A prompt has been run in the `start`th start of the job, and not all of them."""
    if not log.is_file() or f"start {start}\n" not in (text := log.read_text()):
        return False
    counts = re.findall(r"(\d+) of (\d+) prompts:", text.partition(f"start {start}\n")[2])
    return any(0 < int(done) < int(total) // 2 for done, total in counts[-1:])


def processes_of(run, shard=0, script=b"attn_act_logi.py"):
    """{rank: process number} of the Python processes that work for this folder in this array task."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
            variables = dict(
                line.partition("=")[::2] for line in (entry / "environ").read_text(errors="replace").split("\0")
            )
            here = (entry / "cwd").resolve() == run and variables.get("SLURM_ARRAY_TASK_ID") == str(shard)
        except OSError:  # it has ended
            continue
        # The launcher has the script's name, too, but not as its second word.
        if here and len(words) > 1 and b"python" in words[0] and words[1].endswith(script):
            found[int(variables.get("RANK", 0))] = int(entry.name)
    return found


def hold_in_their_work(cwd, logs):
    """Stop (SIGSTOP) the processes of these shards, each in the middle of its work; {shard: process number}."""
    held = {}

    def look():
        for shard in logs.keys() - held.keys():
            if in_its_work(logs[shard]):
                held[shard] = processes_of(cwd, shard)[0]
                os.kill(held[shard], signal.SIGSTOP)
        return held if len(held) == len(logs) else None

    return wait_until(look, f"shards {list(logs)} at work")


# --- tests


def test_a_chain_whose_tasks_are_killed_and_whose_node_fails_ends_as_if_undisturbed(place, tmp_path):
    """Three shards, each with all CPUs of a node: one is killed, one loses its node; the stages after them wait."""
    cwd = tmp_path / "work dir"
    site = place / "error interp" / "1_utils" / "hpc" / "site.env"
    text = site.read_text()
    site.write_text(text.replace("GPU_OPTIONS=()", "GPU_OPTIONS=(--cpus-per-task=8)"))
    words = ["--shards", "3", "--stages", "2,3,report", "--", "--run_name", "run", "--model_name",
             str(place / "tiny model"), "--prompt_file", str(place / "prompts.json"), "--", *SETTINGS[2:],
             "--batch_size", "1"]  # fmt: skip
    try:
        first = submit(place, cwd, *words)
    finally:
        site.write_text(text)
    assert first.returncode == 0, first.stderr
    jobs = {name: number for number, name in re.findall(r"^submitted: (\d+)  (\w+)", first.stdout, re.M)}
    assert list(jobs) == ["attn_act_logi", "evaluate_predictions", "build_report"]
    capture = jobs["attn_act_logi"]
    log = [cwd / "logs" / f"attn_act_logi_{capture}_{shard}.out" for shard in range(3)]

    held = hold_in_their_work(cwd, {0: log[0], 1: log[1]})
    os.kill(held[0], signal.SIGKILL)
    node = tell(f"{capture}_1")["NodeList"]
    slurm("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")
    try:
        wait_until(lambda: tell(f"{capture}_1")["Restarts"] == "1", "shard 1 put back")
        again = submit(place, cwd, *words)  # while all of it is in the queue
    finally:
        slurm("scontrol", "update", f"NodeName={node}", "State=RESUME", check=False)  # refused where it is back already
    assert re.findall(r"^in the queue: (\d+)", again.stdout, re.M) == list(jobs.values()), again.stdout + again.stderr

    wait_until(lambda: ended(*jobs.values()), "the chain's end")
    logs = "".join(path.read_text() for path in sorted((cwd / "logs").iterdir()))
    assert {name: tell(number)["JobState"] for name, number in jobs.items()} == dict.fromkeys(jobs, "COMPLETED"), logs
    assert [tell(f"{capture}_{shard}")["Restarts"] for shard in range(3)] == ["1", "1", "0"]
    assert "was killed" in log[0].read_text()
    assert "DUE TO NODE FAILURE" in log[1].read_text()
    assert_same_numbers(cwd / "outputs" / "run" / "prompts", place / "undisturbed")
    assert (cwd / "results" / "run" / "report.html").is_file()

    before = known_jobs()
    last = submit(place, cwd, *words)
    assert (last.returncode, last.stdout.splitlines()[-1]) == (0, "everything is done"), last.stdout + last.stderr
    (cwd / "results" / "run" / "prompts" / "maths_summary.csv").unlink()
    dry = submit(place, cwd, "--dry-run", "--verbose", *words)
    assert re.findall(r"--job-name=(\w+)", dry.stdout) == ["evaluate_predictions", "build_report"]
    assert known_jobs() == before


def test_a_task_at_its_time_limit_finishes_its_batch_and_goes_on_in_a_second_start(place, tmp_path):
    """The limit comes in the middle of a batch: the process is held there, as a long batch would hold it.

    The signal leaves more than stage.sh's MARGIN to finish: after that the task is put back as it is.
    """
    job = sbatch_capture(place, tmp_path, "--time=60", "--signal=B:USR1@45")
    log = tmp_path / "logs" / f"attn_act_logi_{job}_0.out"
    process = hold_in_their_work(tmp_path, {0: log})[0]
    try:
        # Limits are whole minutes: the next one that is at least 50 s away.
        hours, minutes, seconds = map(int, tell(job)["RunTime"].split(":"))
        limit = (hours * 3600 + minutes * 60 + seconds + 50) // 60 + 1
        slurm("scontrol", "update", f"JobId={job}", f"TimeLimit={limit}")
        wait_until(lambda: "the time limit is near" in log.read_text(), "the signal")
    finally:
        os.kill(process, signal.SIGCONT)
    wait_until(lambda: tell(job)["JobState"] == "PENDING", "the job back in the queue")
    slurm("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    wait_until(lambda: ended(job), "the end")
    assert (tell(job)["JobState"], tell(job)["Restarts"]) == ("COMPLETED", "1"), log.read_text()
    first, second = log.read_text().split("start 2\n")
    kept, left = re.findall(r"(\d+) of (\d+) prompts:", first)[-1]
    assert 0 < int(kept) < int(left), "the first start did all of it"
    again = re.findall(r" of (\d+) prompts:", second)[-1]
    assert int(again) == int(left) - int(kept), "what the first start had done was done again"
    assert_same_numbers(tmp_path / "outputs" / "run", place / "undisturbed")


def test_two_gpus_are_two_processes_that_stop_and_go_on_together(place, tmp_path):
    job = sbatch_capture(place, tmp_path, "--gres=gpu:2")
    log = tmp_path / "logs" / f"attn_act_logi_{job}_0.out"
    begun = r"normal, 0 of 130 prompts: +0%\|"  # the first bar of a process
    wait_until(lambda: log.is_file() and len(re.findall(begun, log.read_text())) == 2, "both at work")
    assert processes_of(tmp_path).keys() == {0, 1}
    slurm("scancel", "--batch", "--signal=USR1", f"{job}_0")
    wait_until(lambda: "start 2\n" in log.read_text(), "the second start")
    wait_until(lambda: ended(job), "the end")
    assert (tell(job)["JobState"], tell(job)["Restarts"]) == ("COMPLETED", "1"), log.read_text()
    assert "Traceback" not in log.read_text()
    # Two as a rule; one where a busy machine let the first process end before the second had begun.
    assert log.read_text().count("stopping: prompts under way are finished") in (1, 2)
    assert_same_numbers(tmp_path / "outputs" / "run", place / "undisturbed")


def test_a_server_job_that_is_killed_goes_on_and_the_array_captures_its_text(place, tmp_path):
    """The tests' local server in place of vLLM; its log counts the requests."""
    site = place / "error interp" / "1_utils" / "hpc" / "site.env"
    text = site.read_text()
    server = f'"{sys.executable}" "{ROOT}/tests/local_openai_server.py" --always slow:0.1'
    command = f"SERVE_COMMAND='{server} --model_path {{model}} --port {{port}}'"
    site.write_text(re.sub("^SERVE_COMMAND=.*", lambda _: command, text, flags=re.M))
    words = ["--text_engine", "vllm", "--shards", "2", "--stages", "2", "--", "--run_name", "run", "--model_name",
             str(place / "tiny model"), "--prompt_file", str(place / "prompts.json"), "--", *SETTINGS[2:]]  # fmt: skip
    run = tmp_path / "outputs" / "run" / "prompts"

    def stored():
        return [json.loads(line) for path in run.rglob("responses.jsonl") for line in path.read_text().splitlines()]

    try:
        first = submit(place, tmp_path, *words)
        assert first.returncode == 0, first.stderr
        jobs = {name: number for number, name in re.findall(r"^submitted: (\d+)  (\w+)", first.stdout, re.M)}
        assert list(jobs) == ["serve_responses", "attn_act_logi"]
        wait_until(lambda: len(stored()) > 20, "responses")
        os.kill(processes_of(tmp_path, script=b"serve_responses.py")[0], signal.SIGKILL)
        wait_until(lambda: not processes_of(tmp_path, script=b"serve_responses.py"), "its end")
        kept = stored()
        wait_until(lambda: ended(*jobs.values()), "the chain's end")
    finally:
        site.write_text(text)
    log = (tmp_path / "logs" / f"serve_responses_{jobs['serve_responses']}_0.out").read_text()
    told = {name: tell(number) for name, number in jobs.items()}
    assert {name: one["JobState"] for name, one in told.items()} == dict.fromkeys(jobs, "COMPLETED"), log
    assert told["serve_responses"]["Restarts"] == "1"
    assert len(kept) < len(stored()) == 2 * ROWS
    # Each of the two servers first printed its address, then a line a request.
    _, before, after = (run / "server.log").read_text().split("http://")
    assert after.count('\n{"') == 2 * ROWS - len(kept), "what was stored was asked again"
    assert before.count('\n{"') >= len(kept)
    assert_same_numbers(run, place / "undisturbed", but=("finish_reasons", "response_token_counts"))
    assert processes_of(tmp_path, script=b"local_openai_server.py") == {}
    last = submit(place, tmp_path, *words)
    assert (last.returncode, last.stdout.splitlines()[-1]) == (0, "everything is done"), last.stdout + last.stderr


def test_a_failing_stage_stops_those_that_wait_for_it_and_says_why(place, tmp_path):
    rows = [{"normal": "Add: 1 + 1 =", "main": "Ad: 1 + 1 =", "answer": 2}, {"normal": "far too long " * 400}]
    (tmp_path / "long.json").write_text(json.dumps(rows))
    words = ["--stages", "2,3,report", "--", "--run_name", "run", "--model_name", str(place / "tiny model"),
             "--prompt_file", str(tmp_path / "long.json")]  # fmt: skip
    first = submit(place, tmp_path, *words)
    assert first.returncode == 0, first.stderr
    capture, *waiting = re.findall(r"^submitted: (\d+)", first.stdout, re.M)
    wait_until(lambda: ended(capture, *waiting), "the end")
    assert (tell(capture)["JobState"], tell(capture)["ExitCode"]) == ("FAILED", "1:0")
    assert len(waiting) == 2
    for job in waiting:
        told = tell(job)
        assert (told["JobState"], told["Reason"]) == ("CANCELLED", "DependencyNeverSatisfied")
    log = tmp_path / "logs" / f"attn_act_logi_{capture}_0.out"
    assert "ended with exit code 1, the reason is above" in log.read_text()
    status = [sys.executable, ROOT / "1_utils" / "run_scripts" / "run_status.py", tmp_path / "outputs" / "run"]
    shown = subprocess.run(status, capture_output=True, text=True, env=environment())
    assert shown.returncode == 1
    assert f"job {capture}_0 (attn_act_logi): exit code 1" in shown.stdout
    assert f"log {log}" in shown.stdout
    assert "failures.csv" in shown.stdout

    # The same command tries the failed prompt again; --keep_going goes on without it.
    again = submit(place, tmp_path, "--dry-run", "--verbose", *words)
    assert "--job-name=attn_act_logi" in again.stdout
    without = submit(place, tmp_path, "--dry-run", "--verbose", *words, "--keep_going")
    assert re.findall(r"--job-name=(\w+)", without.stdout) == ["evaluate_predictions", "build_report"]


@pytest.mark.parametrize("mode", ["--dry-run", "--test-only"])
def test_asking_submits_nothing_and_writes_nothing(place, tmp_path, mode):
    before = known_jobs()
    words = ["--shards", "3", "--", "--run_name", "run", "--model_name", str(place / "tiny model"), "--prompt_file",
             str(place / "prompts.json")]  # fmt: skip
    asked = submit(place, tmp_path, mode, *words)
    assert asked.returncode == 0, asked.stderr
    assert "nothing was submitted" in asked.stdout
    assert known_jobs() - before == set()
    assert list(tmp_path.iterdir()) == []


def test_what_slurm_would_refuse_is_told_by_test_only(place, tmp_path):
    site = place / "error interp" / "1_utils" / "hpc" / "site.env"
    text = site.read_text()
    site.write_text(text.replace('GPU_PARTITION=""', 'GPU_PARTITION="nowhere"'))
    try:
        words = ["--", "--run_name", "r", "--model_name", "x", "--prompt_file", str(place / "prompts.json")]
        asked = submit(place, tmp_path, "--test-only", *words)
    finally:
        site.write_text(text)
    assert asked.returncode == 1
    assert "error: Slurm would not take: attn_act_logi compare_responses" in asked.stderr
