"""The pipeline as a user calls it: what is done is not done again, failures stop it, the real model from end to end."""

import argparse
import csv
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import tiny_models
from command_line import UserError
from fetch_models import MODELS_DIR
from run_pipeline import Step, jobs_of, main, parse_args, report_step, run_step, runs_in, steps_of
from stamps import files_in, stamp_path
from warm_python import FreshPython, WarmPython

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
        "check_prompts", "attn_act_logi", "activation_diffs", "evaluate_predictions", "compare_responses",
        "score_scripts", "compare_scorers", "dirs_eval", "head_sensitivity", "neuron_sensitivity", "probe_layers",
    ]  # fmt: skip
    assert steps[1].arguments[-3:] == ("--neurons", "--seed", "1")
    assert all((ROOT / step.script).is_file() for step in [*steps, report_step([job], args)])
    heads = next(step for step in steps if step.script.endswith("head_sensitivity.py"))
    assert heads.after == ("capture", "accuracy", "answers")
    assert steps[0].arguments[-2:] == ("--output_csv", str(job.results / "prompt_findings.csv"))


def test_patches_follow_the_capture_and_their_causes_come_last(tmp_path, prompt_file):
    extra = ["--max_samples", "9", "--patch", "swap", "--patch_flags", "--layers 0 2 --sites resid_pre"]
    args = parse_args(arguments(tmp_path, prompt_file, extra=[*extra, "--", "--device_map", "cpu"]))
    (job,) = jobs_of(args)
    steps = {step.name: step for step in steps_of(job, args)}
    assert [*steps][1:3] == ["capture", "patches"]
    assert [*steps][-1] == "causes"
    assert steps["patches"].arguments == (
        "--run_dir", str(job.output), "--model_name", "m", "--styles", "swap", "--max_samples", "9",
        "--device_map", "cpu", "--layers", "0", "2", "--sites", "resid_pre",
    )  # fmt: skip
    assert steps["patches"].place == job.output
    assert steps["causes"].arguments == ("--run_dir", str(job.output), "--results_dir", str(job.results))
    assert {"patches", "heads"} <= {*steps["causes"].after}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--", "--neuron"], "after --: --neuron: there is no such flag; did you mean --neurons"),
        (["--", "--max_new_tokens", "-1"], "after --: --max_new_tokens -1"),
        (["--batch_size", "4"], "--batch_size: is a flag of stage 2; these come last, after --: … -- --batch_size …"),
        (["--neurons"], "--neurons: is a flag of stage 2"),
        (["--keep_goin"], "--keep_goin: there is no such flag; did you mean --keep_going"),
        (["--", "--output_dir", "x"], "--output_dir after --: give --output_dir before it"),
        (["--", "--prompt_keys=all"], "--prompt_keys after --: give --styles before it"),
        (["--styles", "normal", "swp"], "no row has the key 'swp'; .*did you mean swap"),
        (["--maths_items", "nowhere.csv"], "--maths_items nowhere.csv: no such file"),
        (["--patch", "normal"], "--patch normal: .*sums.json is not run in such a style; choose among swap"),
        (["--styles", "normal", "--patch", "swap"], "--patch swap: .* is not run in such a style"),
        (["--patch_flags", "--layers 0"], "--patch_flags: nothing is patched; name styles"),
        (["--patch", "swap", "--patch_flags", "--layer 0"], "--patch_flags: --layer: there is no such flag; did you"),
        (["--patch", "swap", "--patch_flags", "--styles two"], "--patch_flags: --styles: the pipeline gives it"),
        (["--patch", "swap", "--patch_flags", "--layers '0"], "--patch_flags: No closing quotation"),
    ],
)
def test_a_wrong_flag_is_told_before_anything_is_run(tmp_path, prompt_file, capsys, words, told):
    with pytest.raises(UserError, match=told.replace("(", r"\(")) as caught:
        main(arguments(tmp_path, prompt_file, extra=words))
    assert "\n" not in str(caught.value)
    assert capsys.readouterr().out == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sums.json"]


def test_stage_2_itself_says_what_its_flags_mean(tmp_path, prompt_file):
    few = tmp_path / "few.txt"
    extra = ["--few_shot_file", str(few), "--", "--stop_strings=END", "--neurons"]
    args = parse_args(arguments(tmp_path, prompt_file, extra=extra))
    steps = steps_of(jobs_of(args)[0], args)
    assert "\\n" not in steps[1].arguments
    assert "neurons" in [step.name for step in steps]


def test_a_file_without_answers_has_no_accuracy(tmp_path):
    path = tmp_path / "talk.json"
    path.write_text('[{"normal": "Say hello.", "swap": "Say hlelo."}]')
    args = parse_args(arguments(tmp_path, path))
    names = [step.name for job in jobs_of(args) for step in steps_of(job, args)]
    assert "accuracy" not in names
    assert "neurons" not in names
    assert "similarity" in names


def test_the_clean_form_alone_is_compared_with_nothing(tmp_path, prompt_file):
    args = parse_args(arguments(tmp_path, prompt_file, extra=["--styles", "normal", "--", "--neurons"]))
    names = [step.name for job in jobs_of(args) for step in steps_of(job, args)]
    assert names == ["prompts", "capture", "accuracy", "attention fractions"]


def test_every_flag_that_is_passed_is_known_to_its_script(tmp_path, prompt_file):
    extra = ["--max_samples", "3", "--few_shot_file", "f.txt", "--reward_model", "rm", "--embedding_model", "e"]
    extra += ["--patch", "swap"]
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
    command = str(report_step(jobs_of(args), args))
    assert f"--run_dir {older} {tmp_path}/outputs/r/sums " in command
    assert runs_in(tmp_path / "outputs" / "r") == [older]


# --- done is done


COPY_IT = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(SCRIPT.parent)!r})
from command_line import make_parser, run_main
from file_output import read_csv, write_text
from stamps import note_read
def main(argv):
    parser = make_parser(None)
    parser.add_argument("--run_dir", type=Path)
    parser.add_argument("--results_dir", type=Path)
    parser.add_argument("--more", nargs="*")
    args = parser.parse_args(argv)
    note_read(args.results_dir / "optional.csv")
    count = args.results_dir.with_name("count")
    count.write_text(count.read_text() + "." if count.exists() else ".")
    write_text(args.results_dir / "b.txt", (args.run_dir / "a.txt").read_text())
    return len(args.more or [])
run_main(main)
"""


@pytest.fixture
def step(tmp_path):
    """A step that copies a file it reads, and counts its runs."""
    (tmp_path / "copy_it.py").write_text(COPY_IT)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("one")
    words = ("--run_dir", str(tmp_path / "in"), "--results_dir", str(tmp_path / "results"))
    return Step("copy", str(tmp_path / "copy_it.py"), words)


def run(step):
    quiet = argparse.Namespace(verbose=False, shards=1)
    return run_step(step, "1/1", quiet, set(), lambda *_: FreshPython(dict(os.environ)))


def runs_of(tmp_path):
    return len((tmp_path / "count").read_text())


def test_a_step_runs_once_until_something_changes(tmp_path, step):
    assert run(step) == 0
    assert run(step) == 0
    assert runs_of(tmp_path) == 1
    (tmp_path / "in" / "a.txt").write_text("another")  # input
    run(step)
    assert (runs_of(tmp_path), (tmp_path / "results" / "b.txt").read_text()) == (2, "another")
    (tmp_path / "results" / "b.txt").unlink()  # output
    run(step)
    assert runs_of(tmp_path) == 3
    (tmp_path / "results" / "b.txt").write_text("tampered")
    run(step)
    assert (runs_of(tmp_path), (tmp_path / "results" / "b.txt").read_text()) == (4, "another")
    Path(step.script).write_text(Path(step.script).read_text() + "# newer\n")  # code
    run(step)
    assert runs_of(tmp_path) == 5
    (tmp_path / "results" / "optional.csv").write_text("x")  # an input that was not there
    run(step)
    assert runs_of(tmp_path) == 6
    (tmp_path / "results" / "of_another_step.csv").write_text("x")  # none of its own
    run(step)
    assert runs_of(tmp_path) == 6
    longer = Step(step.name, step.script, (*step.arguments, "--more"))  # arguments
    run(longer)
    assert runs_of(tmp_path) == 7
    stamp_path(tmp_path / "results", step.script).write_text("{broken")
    run(longer)
    run(longer)
    assert runs_of(tmp_path) == 8


def test_patches_are_read_by_those_that_ask_for_them_alone(tmp_path):
    (tmp_path / "swap").mkdir()
    (tmp_path / "swap" / "activations_0.pt").write_text("x")
    before, none = files_in(tmp_path), files_in(tmp_path / "patches_*")
    (tmp_path / "swap" / "patches_0.pt").write_text("x")
    assert (files_in(tmp_path), none) == (before, {})
    assert [*files_in(tmp_path / "patches_*")] == ["swap/patches_0.pt"]


def test_a_step_called_by_hand_is_done_for_the_pipeline_too(tmp_path, step, monkeypatch):
    elsewhere = ["--results_dir=results", "--run_dir=in", "--verbose"]
    subprocess.run([sys.executable, step.script, *elsewhere], cwd=tmp_path, check=True)
    assert runs_of(tmp_path) == 1
    same = Step(step.name, step.script, ("--run_dir", "in", "--results_dir", "results"))
    monkeypatch.chdir(tmp_path)
    assert run(same) == 0
    assert runs_of(tmp_path) == 1


def test_a_failed_step_is_not_done(tmp_path, step):
    source = tmp_path / "in" / "a.txt"
    source.unlink()
    assert run(step) == 1
    source.write_text("back")
    assert run(step) == 0
    assert (tmp_path / "results" / "b.txt").read_text() == "back"
    failing = Step(step.name, step.script, (*step.arguments, "--more", "1"))  # done, with failures
    assert [run(failing), run(failing)] == [1, 1]
    assert runs_of(tmp_path) == 4


WARM = """
import os, sys
print(sys.argv[1:], __name__, repr(sys.stdin.read()), end="")
print("to the other output", file=sys.stderr)
if sys.argv[1] == "end":
    os.kill(os.getpid(), 9)
sys.exit(int(sys.argv[1]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="forks are used on Linux alone")
def test_a_warm_python_runs_a_script_like_a_new_one(tmp_path):
    (tmp_path / "script.py").write_text(WARM)
    (tmp_path / "wrong.py").write_text("raise ValueError('why')")
    warm, found = WarmPython(dict(os.environ)), []
    for python in (FreshPython(dict(os.environ)), warm):
        for words in (["script.py", "0"], ["script.py", "3", "ä b"], ["script.py", "end"], ["wrong.py"]):
            lines = [*filter(None, map(str.rstrip, python.run([str(tmp_path / words[0]), *words[1:]])))]
            found.append((sorted("".join(lines[-2:])), python.code))
    assert found[:4] == found[4:]
    assert [code for _, code in found[:4]] == [0, 3, -9, 1]
    warm.close()
    assert warm.process.returncode == 0


def test_a_failing_stage_stops_the_run_with_its_message(tmp_path, prompt_file):
    command = [sys.executable, str(SCRIPT), *arguments(tmp_path, prompt_file)]
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=offline)
    assert (done.returncode, done.stderr) == (2, "")
    assert re.search(
        r"^\[2/10\] capture: failed with exit code 2 \(\d+ s\)\n    error: m: .*\nstopped: ", done.stdout, re.M
    )
    assert "goes on" not in done.stdout  # the same command would fail again
    assert "accuracy" not in done.stdout


def test_with_keep_going_a_failed_file_does_not_stop_the_next_one(tmp_path):
    """The first file's prompts are too long for the model; the second one's answers are words, for stage 4."""
    tiny_models.save(tmp_path / "tiny")
    (tmp_path / "long.json").write_text(json.dumps([{"normal": "too long " * 400}, {"normal": "far too long " * 400}]))
    capitals = [{"normal": f"Please name the capital of land {i}", "answer": "Paris"} for i in range(4)]
    (tmp_path / "capitals.json").write_text(
        json.dumps([row | {"swap": f"Plesae {row['normal'][7:]}"} for row in capitals])
    )
    words = arguments(tmp_path, tmp_path / "long.json", tmp_path / "capitals.json", extra=["--keep_going"])
    words[words.index("m")] = str(tmp_path / "tiny")
    command = [sys.executable, str(SCRIPT), *words, "--lens_rows", "0", "--", "--max_new_tokens", "4"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert (done.returncode, done.stderr) == (1, ""), done.stdout + done.stderr
    assert re.search(r"^\[2/\d+\] capture: failed with exit code 1 ", done.stdout, re.M)
    assert "long.json was captured: its other steps are left out" in done.stdout
    assert re.search(r"^\[\d+/\d+\] answers: answers_breakdown.csv, answers_flips.csv and \d more", done.stdout, re.M)
    results = tmp_path / "results" / "r"
    assert {path.name for path in (results / "capitals").iterdir()} >= {"similarity_summary.csv", "probe_layers.csv"}
    assert not (results / "capitals" / "maths_items.csv").exists()
    assert "capitals" in (results / "report.html").read_text(encoding="utf-8")
    assert re.search(r"^failed: python 2_inference/run_scripts/attn_act_logi.py .*long.json", done.stdout, re.M)


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
        "--patch", "swap", "--patch_flags", "--max_samples 3 --layers 0 15 --sites resid_pre", "--shards", "2",
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
        "probe_layers.csv", "patching_layers.csv", "patching_layers.png",
    }  # fmt: skip
    assert (folder / "results" / "demo" / "report.html").stat().st_size > 100_000


def test_the_processes_that_share_stage_2_write_all_of_it(demo):
    folder, printed, _ = demo
    assert re.search(r"capture: 4 \.pt files \(\d+ s\)$", printed, re.M)
    assert re.search(r"patches: 1 \.pt files \(\d+ s\)$", printed, re.M)
    stamp = json.loads((folder / "outputs" / "demo" / "maths" / ".done.attn_act_logi.json").read_text())
    assert "--shard" not in stamp["arguments"]


def test_the_edits_of_each_prompt_are_read_from_the_log_beside_its_file(demo):
    folder, _, _ = demo
    with open(folder / "results" / "demo" / "maths" / "maths_items.csv", newline="", encoding="utf-8") as handle:
        edits = {(line["style"], line["original_index"]): line["edits"] for line in csv.DictReader(handle)}
    with open(ROOT / "0_data" / "maths_edits.csv", newline="", encoding="utf-8") as handle:
        logged = Counter((line["style"], line["original_index"]) for line in csv.DictReader(handle))
    swaps = [key for key in edits if key[0] == "swap"]
    assert len(swaps) == 6
    assert [float(edits[key]) for key in swaps] == [logged[key] for key in swaps]


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
    assert [step for step in steps if not step.endswith("done before")] == [
        next(step for step in steps if step.startswith("[2/12] capture: nothing new"))
    ]
    assert {path: path.stat().st_mtime_ns for path in written} == written
    table = first[first.index("\nmaths\n") : first.index("\nreport:")]
    assert table in done.stdout


def test_a_user_sees_one_line_per_step_and_details_if_asked(demo):
    folder, output, command = demo
    steps = output[: output.index("\nmaths\n")].splitlines()
    assert steps[0].startswith(f"{ROOT}/0_data/maths.json: captured into outputs/demo/maths, results in ")
    # A slow step is shown with its bar, a line a minute: its title comes twice then.
    for number, (line, name) in enumerate(
        zip(
            [line for line in steps[1:] if line[:1] == "[" and ":" in line],
            [
                "prompts",
                "capture",
                "patches",
                "layers",
                "accuracy",
                "similarity",
                "scorers",
                "attention fractions",
                "heads",
                "probes",
                "causes",
                "report",
            ],
            strict=True,
        ),
        start=1,
    ):
        assert re.fullmatch(rf"\[{number}/12\] {name}: .+ \(\d+ s\)", line), line
    assert "[2/12] capture: 4 .pt files (" in output
    assert "[3/12] patches: 1 .pt files (" in output
    assert "maths_breakdown.csv, maths_flips.csv and " in output
    cut = command.index("--")
    more = [*command[:cut], "--verbose", "--no_report", *command[cut:]]
    printed = subprocess.run(more, capture_output=True, text=True, cwd=folder).stdout
    assert "    $ python 2_inference/run_scripts/attn_act_logi.py --model_name" in printed
    assert "[11/11] causes: done before" in printed
    assert "report" not in printed


def test_own_scores_take_the_place_of_stage_3(demo):
    folder, _, command = demo
    reader = ROOT / "1_utils" / "run_scripts" / "read_predictions.py"
    subprocess.run(
        [sys.executable, reader, "--run_dir", "outputs/demo/maths", "--csv", "s.csv"], cwd=folder, check=True
    )
    with open(folder / "s.csv", newline="", encoding="utf-8") as handle:
        lines = list(csv.DictReader(handle))
    right = {"normal": 5, "swap": 2}
    with open(folder / "s.csv", "w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, [*lines[0], "correct"])
        writer.writeheader()
        kept = [line for line in lines if line["style"] in right]
        writer.writerows(line | {"correct": int(int(line["original_index"]) < right[line["style"]])} for line in kept)
    cut = command.index("--")
    own = [*command[:cut], "--maths_items", "s.csv", *command[cut:]]
    done = subprocess.run(own, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    again = {
        line.partition(":")[0].partition("] ")[2] for line in done.stdout.splitlines() if "done before" not in line
    }
    assert {"accuracy", "heads", "probes", "report"} <= again
    assert not {"similarity", "attention fractions", "layers"} & again
    table = done.stdout[done.stdout.index("\nmaths\n") :]
    assert re.search(r"^normal +6 +83\.3 ", table, re.M)
    assert re.search(r"^swap +6 +33\.3 .* −50\.0 ", table, re.M)
    assert re.search(r"^polite +6 +– ", table, re.M)
    report = (folder / "results" / "demo" / "report.html").read_text(encoding="utf-8")
    assert "<td>33.3 [" in report
