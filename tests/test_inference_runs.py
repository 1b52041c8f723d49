"""Whole runs of the script on tiny models: what is written, resuming, shards, shortage of memory and of disk."""

from __future__ import annotations

import csv
import ctypes
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import attn_act_logi
import evaluate_predictions
import numpy as np
import pytest
import run_status
import tiny_models
import torch
from capture import batching, job, progress, recorder, timing
from capture import decode as decoding
from capture.recorder import chosen_raw_layers
from command_line import UserError
from pt_fields import FIELDS, pack_rows, unpack_rows
from read_predictions import iter_predictions
from run_store import load_pt, open_run, pt_files, read_failures
from transformers import AutoModelForCausalLM

SCRIPT = Path(attn_act_logi.__file__)
TEXT = "please calculate the sum of these numbers and then stop quick brown fox total apples market answer"
WORDS = TEXT.split()
FEW_SHOT = "Write down the answer: 3 + 4 = 7\n\n"


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    return tiny_models.save(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def prompt_file(tmp_path_factory):
    return write_prompts(tmp_path_factory.mktemp("prompts") / "prompts.json", 23)


def write_prompts(path: Path, count: int) -> Path:
    chance = random.Random(5)
    rows = []
    for number in range(count):
        words = chance.choices(WORDS, k=chance.randint(2, 14))
        clean = " ".join(words) + f": {number} + {chance.randint(1, 99)} ="
        row = {"element_index": 100 + number, "normal": clean, "answer": "1"}
        if number % 5:
            row["swap"] = clean.replace(words[0], words[0][1] + words[0][0] + words[0][2:], 1)
        rows.append(row)
    path.write_text(json.dumps(rows), encoding="utf-8")
    path.with_suffix(".txt").write_text(FEW_SHOT, encoding="utf-8")
    return path


def arguments(model_dir, prompt_file, output, *more):
    own = ["--model_name", model_dir, "--prompt_file", str(prompt_file), "--output_dir", str(output)]
    own += ["--few_shot_file", str(prompt_file.with_suffix(".txt")), "--prompt_keys", "all", "--max_new_tokens", "6"]
    return [*own, *more]


def run(*args):
    return attn_act_logi.main(arguments(*args))


def rows_by_key(folder: Path) -> dict[tuple[str, int], dict]:
    found = {}
    run_ = open_run(folder)
    for style in run_.styles:
        for _, content in run_.batches(style):
            for row in unpack_rows(content):
                found[style, row["original_index"]] = row
    return found


def assert_same_run(folder: Path, expected: Path, exact: bool = False) -> None:
    """The same files with the same rows; numbers to float32 rounding (float16 fields to theirs), texts equal."""
    names = [sorted(p.relative_to(f) for p in f.rglob("*.pt")) for f in (folder, expected)]
    assert names[0] == names[1]
    left, right = rows_by_key(folder), rows_by_key(expected)
    assert left.keys() == right.keys()
    for key, row in left.items():
        assert_same_value(row, right[key], key, exact)


def assert_same_value(left, right, where, exact):
    if isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for key in left:
            assert_same_value(left[key], right[key], (*where, key), exact)
    elif isinstance(left, torch.Tensor) and left.is_floating_point():
        loose = 0 if exact else 2e-3 if left.dtype == torch.float16 else 2e-4
        torch.testing.assert_close(left, right, rtol=loose, atol=loose, equal_nan=True, msg=lambda m: f"{where}: {m}")
    elif isinstance(left, torch.Tensor):
        assert where[-1] == "topk_indices" or torch.equal(left, right), where
    elif isinstance(left, float):
        assert left == pytest.approx(right, rel=1e-4, abs=1e-4), where
    else:
        assert left == right, where


@pytest.fixture(scope="session")
def undisturbed(model_dir, prompt_file, tmp_path_factory):
    """A whole run in one go, batch 1, no shared prefix: what every other way must equal."""
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    assert run(model_dir, prompt_file, output, "--batch_size", "1", "--no_prefix_reuse") == 0
    return output


def test_a_file_holds_the_fields_of_the_contract(undisturbed, prompt_file):
    opened = open_run(undisturbed)
    assert list(opened.styles) == ["normal", "swap"]
    assert json.loads((undisturbed / "prompts.json").read_text()) == json.loads(prompt_file.read_text())
    (path,) = pt_files(undisturbed / "swap")
    content = load_pt(path)
    rows, tokens = len(content["original_indices"]), content["input_ids"].shape[1]
    layers, heads, width, regions, pooled = 3, 4, 32, 7, 4
    shapes = dict.fromkeys(("input_ids", "attention_mask"), (rows, tokens))
    shapes |= dict.fromkeys(("topk_vals", "topk_indices"), (rows, 1, 400))  # of the whole vocabulary
    shapes |= {"region_mask": (rows, tokens, regions), "logsumexp": (rows, 1)}
    shapes |= {"span_mass": (layers, rows, heads, regions, regions), "hidden_pooled": (layers + 1, rows, pooled, width)}
    assert {key: tuple(content[key].shape) for key in shapes} == shapes
    assert content["regions"] == ["all", "last", "context", "instruction", "task", "first", "edited"]
    assert content["pooled_regions"] == ["last", "instruction", "task", "edited"]
    assert content["hidden_states"]["layer_0"].shape == (rows, tokens, width)
    assert content["attentions"]["layer_0"].shape == (rows, heads, tokens, tokens)
    assert content["span_mass"].dtype == torch.float16
    assert content["input_ids"].dtype == torch.int64
    assert content["attention_mask"].dtype == content["region_mask"].dtype == torch.bool
    assert not content["region_mask"][~content["attention_mask"]].any()
    assert content["element_index"] == [100 + index for index in content["original_indices"]]
    for prompt, response, whole in zip(
        content["prompts"], content["responses"], content["final_predictions"], strict=True
    ):
        assert whole == FEW_SHOT + prompt + response


def test_pooled_states_of_chosen_regions_in_sixteen_bits(model_dir, prompt_file, undisturbed, tmp_path):
    rows = json.loads(prompt_file.read_text())
    rows = [row | {"polite": f"Please help me. {row['normal']}"} for row in rows]
    (tmp_path / "p.json").write_text(json.dumps(rows))
    (tmp_path / "p.txt").write_text(FEW_SHOT)
    flags = ["--pool_regions", "last", "edited:swap", "--pooled_dtype", "float16", "--raw_layers", "none"]
    assert run(model_dir, tmp_path / "p.json", tmp_path / "run", *flags) == 0
    opened, whole = open_run(tmp_path / "run"), open_run(undisturbed)
    pooled = {style: opened.load(opened.files(style)[0])["pooled_regions"] for style in opened.styles}
    assert pooled == {"normal": ["last", "edited:swap"], "swap": ["last", "edited"], "polite": ["last"]}
    for style, region in (("normal", "edited:swap"), ("swap", "edited"), ("swap", "last")):
        content = opened.load(opened.files(style)[0])
        assert content["hidden_pooled"].dtype == torch.float16
        found, expected = (one.field("hidden_pooled", style, region) for one in (opened, whole))
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)
    with pytest.raises(UserError, match=r"--pool_regions edited:swpa: choose among .*edited:swap"):
        run(model_dir, prompt_file, tmp_path / "other", "--pool_regions", "edited:swpa")


def test_a_state_that_float16_cannot_hold_is_an_error():
    capture = recorder.Capture(1, {"mass": torch.zeros(1, 1, 1, 1, 1), "hidden": torch.full((2, 1, 1, 4), 7e4)}, {}, {},
                               recorder.HostCopies())  # fmt: skip
    rows = partial(recorder.rows_of, capture, [torch.ones(1, 1, dtype=torch.bool)], ["last"], ["last"])
    assert rows(torch.bfloat16)[0]["hidden_pooled"].isfinite().all()
    with pytest.raises(UserError, match=r"above 65504.*--pooled_dtype bfloat16"):
        rows(torch.float16)


@pytest.mark.parametrize("more", [["--batch_size", "7"], ["--batch_size", "16", "--no_prefix_reuse"], []])
def test_batches_and_prefix_reuse_change_nothing(model_dir, prompt_file, undisturbed, tmp_path, more):
    assert run(model_dir, prompt_file, tmp_path / "run", *more) == 0
    assert_same_run(tmp_path / "run", undisturbed)


@pytest.mark.parametrize("more", [["--neurons", "--entropy", "--topk_positions", "all", "--response_logprobs"]])
def test_all_fields_are_the_same_for_any_batch(model_dir, prompt_file, tmp_path, more):
    assert run(model_dir, prompt_file, tmp_path / "a", *more, "--batch_size", "1", "--no_prefix_reuse") == 0
    assert run(model_dir, prompt_file, tmp_path / "b", *more, "--batch_size", "9") == 0
    assert_same_run(tmp_path / "b", tmp_path / "a")


def test_shards_in_any_order_make_the_same_files(model_dir, prompt_file, tmp_path, monkeypatch):
    monkeypatch.setattr(batching, "ROWS_PER_FILE", 4)
    more = ["--response_logprobs"]
    assert run(model_dir, prompt_file, tmp_path / "one", *more) == 0
    for shard in (3, 0, 4, 1, 2):
        before = len(list(tmp_path.glob("five/*/*.pt")))
        assert run(model_dir, prompt_file, tmp_path / "five", "--shard", f"{shard}/5", *more) == 0
        assert 1 <= len(list(tmp_path.glob("five/*/*.pt"))) - before <= 3  # 11 files in all: a fair share each
    assert len(pt_files(tmp_path / "five" / "normal")) == 6
    assert_same_run(tmp_path / "five", tmp_path / "one")


def test_second_call_finds_all_done(model_dir, prompt_file, undisturbed, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*.pt")}
    monkeypatch.setattr(job, "load_model", None)  # the weights must not even be loaded
    assert run(model_dir, prompt_file, undisturbed) == 0
    assert {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*.pt")} == before


def test_another_runs_folder_is_refused_by_the_difference(model_dir, prompt_file, undisturbed):
    with pytest.raises(UserError, match=r"other settings \(generation.max_new_tokens: 6 there, 7 now\)"):
        run(model_dir, prompt_file, undisturbed, "--max_new_tokens", "7")


def stamps(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*.pt")}


def test_a_run_grows_and_a_file_that_is_there_stays(model_dir, prompt_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(batching, "ROWS_PER_FILE", 4)
    more = ["--response_logprobs"]
    assert run(model_dir, prompt_file, tmp_path / "whole", *more) == 0
    before: dict[Path, int] = {}
    for rows in ("3", "10", "14"):
        assert run(model_dir, prompt_file, tmp_path / "run", "--max_samples", rows, *more) == 0
        now = stamps(tmp_path / "run")
        assert before.items() < now.items()
        before = now
    capsys.readouterr()
    assert run(model_dir, prompt_file, tmp_path / "run", "--max_samples", "5", *more) == 0  # fewer: nothing to do
    assert "this run has 14 samples and goes on with these, not with 5" in capsys.readouterr().err
    assert stamps(tmp_path / "run") == before
    for shard in ("1/2", "0/2"):  # and now all of the file
        assert run(model_dir, prompt_file, tmp_path / "run", "--shard", shard, *more) == 0
    assert before.items() < stamps(tmp_path / "run").items()
    files = [path.name for path in pt_files(tmp_path / "run" / "normal")]
    assert files[:5] == [f"activations_{a:05d}_{b:05d}.pt" for a, b in ((0, 3), (3, 7), (7, 10), (10, 14), (14, 18))]
    grown, whole = rows_by_key(tmp_path / "run"), rows_by_key(tmp_path / "whole")
    assert len(grown) == sum(len(load_pt(path)["original_indices"]) for path in stamps(tmp_path / "run"))  # none twice
    assert grown.keys() == whole.keys()
    for key, row in grown.items():
        assert_same_value(row, whole[key], key, False)
    assert json.loads((tmp_path / "run" / "swap" / "run.json").read_text())["row_ends"] == [3, 10, 14, 23]


def test_a_run_that_was_killed_grows_too(model_dir, prompt_file, tmp_path, monkeypatch):
    monkeypatch.setattr(batching, "ROWS_PER_FILE", 4)
    assert run(model_dir, prompt_file, tmp_path / "run", "--max_samples", "10", "--shard", "0/2") == 0
    assert run(model_dir, prompt_file, tmp_path / "run", "--max_samples", "17") == 0
    assert run(model_dir, prompt_file, tmp_path / "whole", "--max_samples", "17") == 0
    grown, whole = rows_by_key(tmp_path / "run"), rows_by_key(tmp_path / "whole")
    assert grown.keys() == whole.keys()
    assert {key: row["response"] for key, row in grown.items()} == {k: row["response"] for k, row in whole.items()}


def test_a_prompt_file_may_get_rows_at_its_end_alone(model_dir, tmp_path, capsys):
    path = write_prompts(tmp_path / "prompts.json", 9)
    rows = json.loads(path.read_text())
    path.write_text(json.dumps(rows[:6]))
    for style in ("normal", "swap"):
        assert run(model_dir, path, tmp_path / "run", "--prompt_keys", style) == 0
    path.write_text(json.dumps(rows, indent=1))
    assert run(model_dir, path, tmp_path / "run", "--prompt_keys", "normal") == 0
    assert "swap has 6 samples, not 9: styles are compared on the rows that both have" in capsys.readouterr().err
    assert run(model_dir, path, tmp_path / "run") == 0
    assert [len(load_pt(one)["original_indices"]) for one in pt_files(tmp_path / "run" / "normal")] == [6, 3]
    assert json.loads((tmp_path / "run" / "prompts.json").read_text()) == rows
    for changed in (rows[:5] + rows[6:], rows[:8], [{**rows[0], "normal": "else"}, *rows[1:]]):
        path.write_text(json.dumps(changed))
        with pytest.raises(UserError, match=r"holds a run of other prompts \(its 9 rows are not the first of"):
            run(model_dir, path, tmp_path / "run")


def test_a_run_under_the_old_task_rule_is_refused(model_dir, prompt_file, undisturbed, tmp_path):
    import shutil

    shutil.copytree(undisturbed, tmp_path / "run")
    for path in tmp_path.glob("run/*/run.json"):
        path.write_text(path.read_text().replace('"schema_version": 3', '"schema_version": 2'))
    with pytest.raises(UserError, match="schema_version: 2 there, 3 now"):
        run(model_dir, prompt_file, tmp_path / "run")


def test_a_style_of_another_run_in_the_folder_is_refused(model_dir, prompt_file, tmp_path):
    clean = ["--prompt_keys", "normal", "--max_samples", "3"]
    assert run(model_dir, prompt_file, tmp_path / "run", *clean) == 0
    other = ["--prompt_keys", "swap", "--max_samples", "3", "--few_shot_file", str(prompt_file)]
    with pytest.raises(UserError, match=r"a style of another run .*few_shot_text"):
        run(model_dir, prompt_file, tmp_path / "run", *other)
    with pytest.raises(UserError, match="a style of another run"):
        run(model_dir, prompt_file, tmp_path / "run", *other, "--overwrite")
    assert run(model_dir, prompt_file, tmp_path / "run", "--prompt_keys", "swap", "--max_samples", "3") == 0


def test_a_run_does_not_depend_on_the_working_directory(model_dir, prompt_file, tmp_path, monkeypatch):
    clean = ["--prompt_keys", "normal", "--max_samples", "3"]
    assert run(model_dir, prompt_file, tmp_path / "run", *clean) == 0
    monkeypatch.chdir(prompt_file.parent)
    assert run(model_dir, Path(prompt_file.name), tmp_path / "run", *clean) == 0


@pytest.mark.parametrize("damage", ["truncate", "garbage", "rows missing"])
def test_damaged_files_are_run_again(model_dir, prompt_file, undisturbed, tmp_path, damage):
    import shutil

    shutil.copytree(undisturbed, tmp_path / "run")
    (path,) = pt_files(tmp_path / "run" / "normal")
    if damage == "truncate":
        path.write_bytes(path.read_bytes()[:-2000])
    elif damage == "garbage":
        path.write_bytes(b"not a file of torch")
    else:
        content = load_pt(path, mmap=False)
        rows = unpack_rows(content)[3:11]
        torch.save(
            pack_rows(
                rows,
                {key: content[key] for key, field in FIELDS.items() if key in content and "B" not in field.axes},
                3,
            ),
            path,
        )
    assert run(model_dir, prompt_file, tmp_path / "run") == 0
    assert_same_run(tmp_path / "run", undisturbed)


def one_process(args: list[str]) -> None:
    """The script's work in a process of its own, a file every three rows, written slowly."""
    import run_store

    torch.set_num_threads(1)
    batching.ROWS_PER_FILE = 3
    job.save_pt = lambda *a: (time.sleep(0.1), run_store.save_pt(*a))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    sys.exit(attn_act_logi.main(args))


def kill_and_resume(model_dir, prompt_file, folder: Path, seed: int) -> int:
    """Kill -9 the script at a random moment, again and again, until it ends by itself; returns the kills."""
    chance = random.Random(seed)
    processes = multiprocessing.get_context("forkserver")  # imports torch once, not for every process
    # What takes long to import; the project's own folders are not on the server's path.
    processes.set_forkserver_preload(
        ["accelerate", "transformers.masking_utils", "transformers.models.llama.modeling_llama"]
    )
    kills = 0
    while True:
        process = processes.Process(target=one_process, args=(arguments(model_dir, prompt_file, folder),))
        process.start()
        wait_for_output(process, folder)
        process.join(timeout=chance.uniform(0.0, 0.35))
        if process.exitcode is not None:
            assert process.exitcode == 0
            return kills
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        kills += 1


def wait_for_output(process, folder: Path) -> None:
    """Until this process has begun to write, so that kills fall into the work and not into the imports."""
    known = {path: path.stat().st_mtime_ns for path in folder.rglob("*")} if folder.exists() else {}
    for _ in range(1200):
        if process.exitcode is not None:
            return
        now = {path: path.stat().st_mtime_ns for path in folder.rglob("*")} if folder.exists() else {}
        if any("activations" in path.name for path in now.keys() - known.keys()):
            return
        time.sleep(0.05)


@pytest.fixture(scope="session")
def small_files(model_dir, prompt_file, tmp_path_factory):
    output = tmp_path_factory.mktemp("small") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batching, "ROWS_PER_FILE", 3)
        assert run(model_dir, prompt_file, output) == 0
    return output


def check_kills(model_dir, prompt_file, tmp_path, small_files, runs, first_seed=0):
    kills = 0
    for seed in range(first_seed, first_seed + runs):
        folder = tmp_path / f"killed_{seed}"
        kills += kill_and_resume(model_dir, prompt_file, folder, seed)
        assert_same_run(folder, small_files)
        kept = {p.name.split("_")[0] for p in folder.rglob("*") if p.is_file()}
        assert kept == {"run.json", "activations", "prompts.json", ".lock"}
    return kills


def test_kill_9_and_resume(model_dir, prompt_file, tmp_path, small_files):
    assert check_kills(model_dir, prompt_file, tmp_path, small_files, runs=3) >= 10


@pytest.mark.stress
def test_kill_9_and_resume_a_hundred_times(model_dir, prompt_file, tmp_path, small_files):
    assert check_kills(model_dir, prompt_file, tmp_path, small_files, runs=40, first_seed=100) >= 100


def test_a_signal_keeps_what_was_under_way(model_dir, prompt_file, small_files, tmp_path, monkeypatch):
    monkeypatch.setattr(batching, "ROWS_PER_FILE", 3)
    calls = {"count": 0}
    forward = decoding.Generator._forward

    def interrupting(self, *args, **kwargs):
        calls["count"] += signal.getsignal(signal.SIGUSR1) is not signal.SIG_DFL  # not while the model is checked
        if calls["count"] == 9:
            os.kill(os.getpid(), signal.SIGUSR1)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(decoding.Generator, "_forward", interrupting)
    assert run(model_dir, prompt_file, tmp_path / "run", "--batch_size", "4") == job.EXIT_STOPPED
    kept = len(rows_by_key(tmp_path / "run"))
    assert 0 < kept < len(rows_by_key(small_files))
    assert run(model_dir, prompt_file, tmp_path / "run", "--batch_size", "4") == 0
    assert_same_run(tmp_path / "run", small_files)


def test_memory_does_not_grow_with_the_number_of_prompts(model_dir, tmp_path, monkeypatch):
    resident = []
    write = job.FileWriter.write
    monkeypatch.setattr(
        job.FileWriter, "write", lambda *args: (resident.append(timing.status_kb("VmRSS")), write(*args))[1]
    )
    prompts = write_prompts(tmp_path / "prompts.json", 5000)
    more = ["--prompt_keys", "normal", "--max_new_tokens", "2", "--raw_layers", "0"]
    assert run(model_dir, prompts, tmp_path / "run", *more) == 0
    assert len(resident) == 79  # files of 64 rows
    assert resident[-1] <= 1.05 * resident[8]  # from when two windows of prompts have been held at once


# --- shortage


def test_batches_are_halved_when_memory_is_short(model_dir, prompt_file, undisturbed, tmp_path, monkeypatch):
    forward = decoding.Generator._forward
    shortages = []

    def short_of_memory(self, ids, mask, cache, keep=1):
        if ids.shape[0] > 2:
            shortages.append(ids.shape)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return forward(self, ids, mask, cache, keep)

    monkeypatch.setattr(decoding.Generator, "_forward", short_of_memory)
    assert run(model_dir, prompt_file, tmp_path / "run") == 0
    assert shortages
    assert_same_run(tmp_path / "run", undisturbed)


def test_memory_running_out_while_decoding_loses_nothing(model_dir, prompt_file, undisturbed, tmp_path, monkeypatch):
    forward = decoding.Generator._forward
    shortages = []

    def short_of_memory(self, ids, mask, cache, keep=1):
        if ids.shape[1] == 1 and ids.shape[0] > 3 and len(shortages) < 6:
            shortages.append(ids.shape)
            raise RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
            )
        return forward(self, ids, mask, cache, keep)

    monkeypatch.setattr(decoding.Generator, "_forward", short_of_memory)
    assert run(model_dir, prompt_file, tmp_path / "run") == 0
    assert shortages
    assert_same_run(tmp_path / "run", undisturbed)


def test_a_prompt_that_cannot_run_alone_is_told_and_tried_again(
    model_dir, prompt_file, undisturbed, tmp_path, monkeypatch
):
    forward = decoding.Generator._forward
    longest = max(row["input_ids"].shape[0] for row in rows_by_key(undisturbed).values())

    def short_of_memory(self, ids, mask, cache, keep=1):
        if mask.shape[1] >= longest and ids.shape[1] > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, ids, mask, cache, keep)

    with monkeypatch.context() as patch:
        patch.setattr(decoding.Generator, "_forward", short_of_memory)
        assert run(model_dir, prompt_file, tmp_path / "run") == 1
    failed = {(s, i): line for s in ("normal", "swap") for i, line in read_failures(tmp_path / "run" / s).items()}
    assert failed
    assert all("out of memory even alone" in line[3] for line in failed.values())
    assert failed.keys() | rows_by_key(tmp_path / "run").keys() == rows_by_key(undisturbed).keys()
    assert not failed.keys() & rows_by_key(tmp_path / "run").keys()
    assert run(model_dir, prompt_file, tmp_path / "run") == 0
    assert not list((tmp_path / "run").rglob("failures.csv"))
    assert_same_run(tmp_path / "run", undisturbed)


def test_a_prompt_that_fits_alone_waits_for_room(model_dir, prompt_file, undisturbed, tmp_path, monkeypatch):
    forward = decoding.Generator._forward
    rows = {"running": 0}

    def short_of_memory(self, ids, mask, cache, keep=1):
        reading = ids.shape[1] > 1
        if ids.shape[0] + (rows["running"] if reading else 0) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, ids, mask, cache, keep)

    advance = decoding.Generator._advance

    def counting(self, active, logits):
        result = advance(self, active, logits)
        rows["running"] = len(result.responses) if result else 0
        return result

    monkeypatch.setattr(decoding.Generator, "_forward", short_of_memory)
    monkeypatch.setattr(decoding.Generator, "_advance", counting)
    assert run(model_dir, prompt_file, tmp_path / "run", "--batch_size", "8") == 0
    assert_same_run(tmp_path / "run", undisturbed)


def test_a_stopped_run_says_so_though_prompts_failed(model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(batching, "ROWS_PER_FILE", 3)
    path = write_prompts(tmp_path / "prompts.json", 20)
    rows = json.loads(path.read_text())
    rows[2]["normal"] = 7
    path.write_text(json.dumps(rows))
    forward = decoding.Generator._forward

    def interrupting(self, *args, **kwargs):
        if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:  # not while the model is checked
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(decoding.Generator, "_forward", interrupting)
        assert run(model_dir, path, tmp_path / "run", "--batch_size", "2") == job.EXIT_STOPPED
    assert run(model_dir, path, tmp_path / "run") == 1


def test_too_long_and_bad_rows_are_counted_and_told(model_dir, tmp_path, capsys):
    rows = [
        {"normal": "a fine prompt: 1 + 1 ="},
        7,
        {"normal": 3},
        {"normal": "word " * 400},
        {"normal": "half \ud800"},
    ]
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(rows))
    args = ["--model_name", model_dir, "--prompt_file", str(path), "--output_dir", str(tmp_path / "run")]
    assert attn_act_logi.main(args) == 1
    reasons = {index: line[3] for index, line in read_failures(tmp_path / "run").items()}
    assert reasons.keys() == {1, 2, 3, 4}
    assert "row 2: is a JSON number, not an object" in reasons[1]
    assert "row 3, key 'normal': is a JSON number, not a string" in reasons[2]
    assert "leave room for" in reasons[3]
    assert "surrogate" in reasons[4]
    assert "bad.json: row 2" in capsys.readouterr().err
    assert len(rows_by_key(tmp_path / "run")) == 1


def test_a_full_disk_is_one_line_and_no_partial_file(model_dir, prompt_file, undisturbed, tmp_path):
    command = [sys.executable, str(SCRIPT), *arguments(model_dir, prompt_file, tmp_path / "run")]
    signal_ignored = "import resource, signal, os, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    limited = signal_ignored + "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)); "
    limited += "os.execv(sys.argv[1], sys.argv[1:])"
    done = subprocess.run([sys.executable, "-c", limited, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "cannot write" in done.stderr.splitlines()[-1]
    assert not list((tmp_path / "run").rglob("*.pt"))
    assert not list((tmp_path / "run").rglob("*.part*"))
    assert run(model_dir, prompt_file, tmp_path / "run") == 0
    assert_same_run(tmp_path / "run", undisturbed)


def test_an_error_of_the_writer_comes_with_the_next_file_or_at_the_end(tmp_path):
    (tmp_path / "taken").write_text("")
    rows = [({"original_index": 0, "input_ids": torch.ones(2, dtype=torch.int64)}, None)]

    def write(writer, *names):
        for name in names:
            writer.write(tmp_path / name, rows, {}, 0)

    writer = job.FileWriter()
    write(writer, "a.pt", "taken/b.pt")
    with pytest.raises(UserError, match="taken: is a file"):
        writer.close()
    assert torch.load(tmp_path / "a.pt", weights_only=True)["input_ids"].tolist() == [[1, 1]]
    writer = job.FileWriter()
    with pytest.raises(UserError, match="taken: is a file"):
        write(writer, "taken/b.pt", "c.pt", "d.pt", "e.pt")
    writer.close()  # the error was raised once
    assert not (tmp_path / "e.pt").exists()


def test_preflight_refuses_what_the_disk_cannot_hold(model_dir, prompt_file, tmp_path, monkeypatch):
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(UserError, match="needs about"):
        run(model_dir, prompt_file, tmp_path / "run")
    assert not list(tmp_path.rglob("*.pt"))
    assert run(model_dir, prompt_file, tmp_path / "run", "--force") == 0


@pytest.mark.parametrize(
    "more",
    [[], ["--raw_layers", "none", "--pooled_dtype", "float16"], ["--neurons", "--topk_positions", "all", "--entropy"]],
)
def test_the_estimate_is_within_a_tenth_of_what_is_written(model_dir, tmp_path, more):
    prompts = write_prompts(tmp_path / "prompts.json", 200)
    flags = arguments(model_dir, prompts, tmp_path / "run", *more)
    estimate = attn_act_logi.bytes_to_write(attn_act_logi.parse_args(flags))
    assert run(model_dir, prompts, tmp_path / "run", *more) == 0
    written = sum(path.stat().st_size for path in (tmp_path / "run").rglob("*.pt"))
    assert abs(estimate - written) <= 0.1 * written
    assert attn_act_logi.bytes_to_write(attn_act_logi.parse_args(flags)) == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--prompt_keys", "nosuch"], r"no row has the key 'nosuch'; prompt keys there: normal \(23\), swap \(18\)"),
        (["--shard", "5/5"], "write i/n"),
        (["--stop_strings", ""], "would end every response at once"),
        (["--attn_implementation", "flex_attention"], "for GPUs only; use sdpa on a CPU"),
        (["--attn_implementation", "flash_attention_3"], "FlashAttention3 .* installed"),
        (["--max_new_tokens", "300"], "the model's context is 256 tokens"),
        (["--raw_layers", "99"], "the model has layers 0 to 3"),
        (["--num_samples", "3"], "greedy samples are all the same"),
        (["--task_regex", "("], "not a regular expression"),
        (["--output_dir", "/proc/nowhere"], "cannot write|choose another --output_dir"),
        (["--model_name", "/no/such/model"], "/no/such/model: no such folder"),
        (["--prompt_keys", "normal", "swpa"], r"no row has the key 'swpa'; did you mean swap\?; prompt keys there"),
        (["--prompt_keys", "split@swp"], r"no row has the key 'swp'; did you mean swap\?"),
        (["--neuron"], r"--neuron: there is no such flag; did you mean --neurons\?"),
        (["--raw_layers", "0-5"], "--raw_layers 0-5: the model has layers 0 to 3"),
        (["--raw_layers", "-5"], "--raw_layers -5: the model has layers 0 to 3"),
        (["--raw_layers", "0", "last"], "--raw_layers last: give layer numbers, ranges"),
        (["--raw_layers", "2-1"], "--raw_layers 2-1: the model has"),
        (["--prompt_file", "/no/such/file.json"], "no such file"),
        (["--batch_size", "0"], "give a number or auto"),
    ],
)
def test_mistakes_are_told_in_one_line(model_dir, prompt_file, tmp_path, more, message):
    with pytest.raises(UserError, match=message) as caught:
        run(model_dir, prompt_file, tmp_path / "run", *more)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ("all", (0, 1, 2, 3, 4)),
        ("0-2", (0, 1, 2)),
        ("-1", (4,)),
        ("-2 0 1-2 2", (0, 1, 2, 3)),
        ("none", ()),
        ("0 5 10 15", (0,)),
        ("", (0,)),
        ("3", (3,)),
        ("4 all", (0, 1, 2, 3, 4)),
    ],
)
def test_raw_layers_may_be_ranges_and_count_from_the_end(wanted, found):
    needed = ["--model_name", "m", "--prompt_file", "p", "--output_dir", "o"]
    flags = ["--raw_layers", *wanted.split()] if wanted else []
    args = attn_act_logi.parse_args([*needed, *flags])
    assert chosen_raw_layers(args.raw_layers, 4) == found


def test_a_model_folder_that_is_not_there_is_told_at_once_with_the_nearest(
    model_dir, prompt_file, tmp_path, monkeypatch
):
    from transformers import AutoConfig

    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda *a, **k: pytest.fail("asked the hub"))
    (tmp_path / "models" / "SmolLM2-135M-Instruct").mkdir(parents=True)
    (tmp_path / "models" / "SmolLM2-135M-Instruct" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    for name, near in [
        ("models/SmolLM", "; did you mean models/SmolLM2-135M-Instruct?"),
        ("models/smol", "did you mean models/Smol"),
        ("models/SmolLM2-135M-Instrcut", "; did you mean models/SmolLM2-135M-Instruct?"),
        ("models/gpt2", "models/gpt2: no such folder; models holds SmolLM2-135M-Instruct"),
        ("./gpt2", "./gpt2: no such folder; check --model_name"),
    ]:
        with pytest.raises(UserError) as caught:
            run(name, prompt_file, tmp_path / "run")
        assert near in str(caught.value)


def test_a_file_where_a_folder_must_be_is_named(model_dir, prompt_file, tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match=r"taken: is a file, but a folder is to be made there"):
        run(model_dir, prompt_file, tmp_path / "taken" / "run")


def test_what_can_never_run_is_told_apart_from_what_is_tried_again(model_dir, tmp_path, monkeypatch, capsys):
    path = tmp_path / "p.json"
    path.write_text(json.dumps([{"normal": "2 + 2 ="}, {"normal": "long " * 300}, {"normal": "3 + 3 ="}]))
    path.with_suffix(".txt").write_text("")
    whole = decoding.Generator._prefill
    monkeypatch.setattr(decoding.Generator, "_prefill", no_memory_for({2}, whole))
    assert run(model_dir, path, tmp_path / "run") == 1
    told = capsys.readouterr().err
    assert "warning: normal: 1 prompts cannot be run with these settings (the first: " in told
    assert "warning: normal: 1 prompts were not run; the same command tries them again" in told
    monkeypatch.setattr(decoding.Generator, "_prefill", whole)
    for _ in range(2):
        assert run(model_dir, path, tmp_path / "run") == 1
    told = capsys.readouterr().err
    assert "nothing to do, all prompts that can be run are done" in told
    assert "again" not in told


def no_memory_for(rows: set[int], whole):
    """Reads prompts as `whole` does, but for these rows, for which no memory is left."""

    def prefill(generator, group):
        if rows & {prompt.key for prompt in group}:
            raise MemoryError
        return whole(generator, group)

    return prefill


def test_several_styles_need_a_choice(model_dir, prompt_file, tmp_path):
    with pytest.raises(
        UserError, match="holds several styles: normal \\(23\\), swap \\(18\\); choose with --prompt_keys"
    ):
        attn_act_logi.main(
            ["--model_name", model_dir, "--prompt_file", str(prompt_file), "--output_dir", str(tmp_path / "run")]
        )


# --- sampling and log-probabilities


def samples_of(folder: Path, style: str) -> dict[int, list[str]]:
    return {index: row["response_samples"] for (s, index), row in rows_by_key(folder).items() if s == style}


def test_samples_do_not_depend_on_the_batch_and_are_shared_across_styles(model_dir, tmp_path):
    rows = [{"normal": f"sum: {n} + {n} =", "same": f"sum: {n} + {n} =", "swap": f"smu: {n} + {n} ="} for n in range(9)]
    path = tmp_path / "p.json"
    path.write_text(json.dumps(rows))
    path.with_suffix(".txt").write_text(FEW_SHOT)
    more = ["--num_samples", "3", "--temperature", "0.9", "--top_p", "0.95", "--seed", "4"]
    assert run(model_dir, path, tmp_path / "a", *more, "--batch_size", "1") == 0
    assert run(model_dir, path, tmp_path / "b", *more, "--batch_size", "16") == 0
    assert run(model_dir, path, tmp_path / "c", *more[:-1], "5") == 0
    assert samples_of(tmp_path / "a", "normal") == samples_of(tmp_path / "b", "normal")
    assert samples_of(tmp_path / "a", "normal") == samples_of(tmp_path / "a", "same")
    assert samples_of(tmp_path / "a", "normal") != samples_of(tmp_path / "c", "normal")
    assert any(len(set(texts)) == 3 for texts in samples_of(tmp_path / "a", "normal").values())


def test_sampled_tokens_follow_the_models_distribution():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, 0.5]]).expand(4000, -1)
    options = decoding.GenerationOptions(temperature=0.7, seed=3)
    mask = torch.zeros(1, 1, dtype=torch.bool)
    responses = [decoding.Response(decoding.Prompt(key, [1], mask), 0) for key in range(4000)]
    tokens, _ = decoding.choose_tokens(options, logits, responses)
    shares = torch.bincount(torch.tensor(tokens), minlength=5) / 4000
    torch.testing.assert_close(shares, torch.softmax(logits[0] / 0.7, -1), atol=0.025, rtol=0)


def test_noise_is_uniform():
    from scipy import stats

    noise = decoding.uniform_noise(torch.arange(40), 5000)
    assert 0 < float(noise.min()) <= float(noise.max()) < 1
    assert stats.kstest(noise.flatten().numpy(), "uniform").pvalue > 0.01
    assert abs(float(torch.corrcoef(noise).fill_diagonal_(0).abs().max())) < 0.07


def test_response_logprobs_are_the_models(model_dir, prompt_file, tmp_path):
    from transformers import AutoModelForCausalLM

    assert run(model_dir, prompt_file, tmp_path / "run", "--response_logprobs") == 0
    rows = rows_by_key(tmp_path / "run")
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()

    def logprobs(prompt_ids, response_ids):
        ids = torch.cat([prompt_ids, response_ids])[None]
        with torch.inference_mode():
            scores = model(ids).logits[0].log_softmax(-1)
        return scores[len(prompt_ids) - 1 : -1].gather(1, response_ids[:, None])[:, 0]

    for (style, index), row in rows.items():
        own = logprobs(row["input_ids"], row["response_ids"])
        torch.testing.assert_close(row["response_logprobs"], own, rtol=1e-3, atol=1e-3)
        if style == "swap":
            normal = rows["normal", index]["response_ids"]
            expected = float(logprobs(row["input_ids"], normal).sum())
            assert row["normal_response_logprob"] == pytest.approx(expected, abs=1e-3)
            assert row["normal_response_token_count"] == len(normal)


def test_log_probabilities_of_short_and_of_missing_normal_responses(model_dir, tmp_path):
    rows = [{"swap": "smu: 1 + 1 ="}, {"normal": "sum: 2 + 2 =", "swap": "smu: 2 + 2 ="}, {"normal": "sum: 3 + 3 ="}]
    path = tmp_path / "p.json"
    path.write_text(json.dumps(rows))
    path.with_suffix(".txt").write_text("")
    for tokens in ("0", "1", "2"):
        folder = tmp_path / tokens
        assert run(model_dir, path, folder, "--response_logprobs", "--max_new_tokens", tokens) == 0
        found = rows_by_key(folder)
        assert np.isnan(found["swap", 0]["normal_response_logprob"])
        assert found["swap", 0]["normal_response_token_count"] == 0
        assert (found["swap", 1]["normal_response_logprob"] < 0) == (tokens != "0")


def test_shards_of_an_array():
    shard_of = attn_act_logi.shard_of
    array = {"SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_MIN": "4", "SLURM_ARRAY_TASK_ID": "6"}
    assert shard_of(None, {}) == (0, 1)
    assert shard_of("1/4", array) == (1, 4)
    assert shard_of(None, array) == (2, 3)
    assert shard_of(None, array | {"WORLD_SIZE": "2", "RANK": "1"}) == (5, 6)
    assert shard_of(None, {"SLURM_ARRAY_TASK_COUNT": "1", "SLURM_ARRAY_TASK_ID": "5"}) == (0, 1)
    with pytest.raises(UserError, match="has gaps"):
        shard_of(None, {"SLURM_ARRAY_TASK_COUNT": "2", "SLURM_ARRAY_TASK_MIN": "2", "SLURM_ARRAY_TASK_ID": "5"})


def test_json_lines_with_texts_as_ids_run_through_every_reader(model_dir, tmp_path):
    path = tmp_path / "p.jsonl"
    rows = [
        {"element_index": f"gsm8k-{i:03d}", "normal": f"add: {i} + 1 =", "swap": f"dad: {i} + 1 =", "answer": i + 1}
        for i in range(5)
    ]
    rows[1]["swap"] = None
    rows[2]["swap"] = "  "
    path.write_text("\n".join([*map(json.dumps, rows), '{"normal": ']), encoding="utf-8")
    path.with_suffix(".txt").write_text("")
    for _ in range(2):  # the second goes on and finds all done but the failures
        assert run(model_dir, path, tmp_path / "run") == 1
    opened = open_run(tmp_path / "run")
    assert list(opened.styles) == ["normal", "swap"]
    assert opened.row(0)["element_index"] == "gsm8k-000"
    content = load_pt(pt_files(tmp_path / "run" / "swap")[0])
    assert content["element_index"] == ["gsm8k-000", "gsm8k-003", "gsm8k-004"]
    assert [line[2] for line in read_failures(tmp_path / "run" / "swap").values()] == ["gsm8k-002", "6"]
    ids = {(one.style, one.original_index): one.element_index for one in iter_predictions(opened)}
    assert ids["normal", 4] == ids["swap", 4] == "gsm8k-004"
    assert evaluate_predictions.main(["--run_dir", str(tmp_path / "run"), "--results_dir", str(tmp_path / "res")]) == 0
    with open(tmp_path / "res" / "maths_items.csv", encoding="utf-8", newline="") as table:
        assert {line["element_index"] for line in csv.DictReader(table)} == {row["element_index"] for row in rows}
    assert run_status.main([str(tmp_path / "run")]) in (0, 1)


@pytest.mark.parametrize("key", ["../out", ".hidden", "a/b", "nul\0"])
def test_a_key_that_cannot_name_a_folder_is_refused(model_dir, tmp_path, key):
    path = tmp_path / "p.json"
    path.write_text(json.dumps([{"normal": "a", key: "b"}]))
    path.with_suffix(".txt").write_text("")
    with pytest.raises(UserError, match="cannot name a folder"):
        run(model_dir, path, tmp_path / "run")


def test_prompts_run_alone_where_positions_depend_on_the_longest_row(tmp_path, prompt_file):
    half = 4  # of the rotary dimensions of a head
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 48, "factor": 4.0}
    rope |= {"short_factor": [1.0] * half, "long_factor": [4.0] * half}
    changes = {"rope_parameters": rope, "original_max_position_embeddings": 48}
    phi = tiny_models.save(tmp_path / "model", "phi3", **changes)
    assert run(phi, prompt_file, tmp_path / "a", "--batch_size", "1", "--no_prefix_reuse") == 0
    assert run(phi, prompt_file, tmp_path / "b", "--batch_size", "9") == 0
    assert_same_run(tmp_path / "b", tmp_path / "a")
    kept = json.loads((tmp_path / "b" / "normal" / "run.json").read_text())["environments"][0]
    assert kept["batches"] == "equal"


def test_stop_strings_end_a_response(model_dir, prompt_file, undisturbed, tmp_path):
    texts = [row["response"] for row in rows_by_key(undisturbed).values()]
    stop = max("abcdefghijklmnopqrstuvwxyz", key=lambda letter: sum(letter in text[1:] for text in texts))
    assert run(model_dir, prompt_file, tmp_path / "run", "--stop_strings", stop) == 0
    stopped = 0
    for key, row in rows_by_key(tmp_path / "run").items():
        whole = rows_by_key(undisturbed)[key]["response"]
        assert row["response"] == whole.split(stop)[0]
        assert row["final_prediction"].endswith(row["response"])
        stopped += row["finish_reason"] == "stop"
    assert stopped


@pytest.mark.parametrize("how", ["plain", "template", "few shots"])
@pytest.mark.parametrize("kind", ["bytes", "metaspace"])
def test_a_control_token_in_a_prompt_is_text(tmp_path, kind, how, capsys):
    tokenizer, text = tiny_models.tokenizer(kind), "Why <s> is it</s> so: tell</s>"
    path = tmp_path / "p.json"
    path.write_text(json.dumps([{"normal": "Sum: 2"}, {"normal": text, "swap": text.replace("is", "si")}]))
    path.with_suffix(".txt").write_text("a</s> b\n" if how == "few shots" else "")  # stays what it is
    more = ["--apply_chat_template"] if how == "template" else []
    model = tiny_models.save(tmp_path / "model", kind=kind, vocab_size=len(tokenizer))
    assert run(model, path, tmp_path / "run", *more) == 0
    rows = rows_by_key(tmp_path / "run")
    ids, bare = rows["normal", 1]["input_ids"].tolist(), rows["normal", 0]["input_ids"].tolist()
    controls = [number for number in ids if number in (1, 2)]
    assert (
        controls == [number for number in bare if number in (1, 2)] == {"few shots": [2], "template": [1]}.get(how, [])
    )
    assert text in tokenizer.decode(ids)
    own = rows["normal", 1]["region_mask"][:, 3:5].any(1)
    assert tokenizer.decode(rows["normal", 1]["input_ids"][own]).strip() == text
    assert rows["normal", 1]["prompt"] == text
    told = [line for line in capsys.readouterr().err.splitlines() if "control tokens" in line]
    assert (
        told[0] == "warning: normal: 1 prompts (the first in row 2) hold the control tokens </s> <s>; "
        "they are read as plain text"
    )
    assert len(told) == 2  # and swap's


@pytest.mark.parametrize("kind", ["bytes", "metaspace"])
@pytest.mark.parametrize(
    ("stop", "kept"),
    [("<s>", "the sky"), ("<s> fox", "the sky"), ("sky<s>", "the"), ("s> f", "the sky"), (" fox", "the sky")],
)
def test_a_stop_string_may_be_or_hold_a_control_token(tmp_path, kind, stop, kept):
    scripted = tiny_models.save_scripted(tmp_path / "model", "Say:", " the sky<s> fox jumps over", kind)
    path = tmp_path / "p.json"
    path.write_text(json.dumps([{"normal": "Say:"}]))
    flags = ["--model_name", scripted, "--prompt_file", str(path), "--max_new_tokens", "8", "--stop_strings", stop]
    assert attn_act_logi.main([*flags, "--output_dir", str(tmp_path / "run"), "--response_logprobs"]) == 0
    (row,) = rows_by_key(tmp_path / "run").values()
    assert (row["finish_reason"], row["response"].strip(" ")) == ("stop", kept)
    assert row["final_prediction"].removeprefix("Say:").lstrip(" ") == row["response"].lstrip(" ")
    model = AutoModelForCausalLM.from_pretrained(scripted)
    words = tiny_models.tokenizer(kind)
    prompt = words("Say:", return_tensors="pt", add_special_tokens=False)["input_ids"]
    ids = model.generate(prompt, stop_strings=stop, tokenizer=words, max_new_tokens=8)
    assert row["response_ids"].tolist() == ids[0, prompt.shape[1] :].tolist()


# --- the progress bar


@pytest.mark.parametrize("more", [[], ["--stop_strings", "e", "a"], ["--num_samples", "2", "--temperature", "1"]])
def test_the_time_left_is_right_within_a_factor_of_two(model_dir, prompt_file, tmp_path, monkeypatch, more, capsys):
    forward, told, clock = decoding.Generator._forward, [], [0.0]
    monkeypatch.setattr(progress, "REFRESH", 0.0)
    monkeypatch.setattr(decoding, "time", SimpleNamespace(perf_counter=lambda: clock[0]))  # one that load cannot touch

    def slow(generator, ids, mask, cache, keep=1):
        clock[0] += 0.02 + 0.0005 * ids.numel()
        return forward(generator, ids, mask, cache, keep)

    def estimate(self):
        told.append((clock[0], left := whole(self), self.done))
        return left

    whole = progress.Progress.seconds_left
    monkeypatch.setattr(progress.Progress, "seconds_left", estimate)
    monkeypatch.setattr(decoding.Generator, "_forward", slow)
    flags = ["--batch_size", "4", "--max_new_tokens", "30", "--raw_layers", "none", *more]
    assert run(model_dir, prompt_file, tmp_path / "run", *flags) == 0
    begin, end = told[0][0], told[-1][0]
    late = [(at, left) for at, left, done in told if begin + 0.2 * (end - begin) < at < end - 0.1 * (end - begin)]
    right = [(end - at) / 2 <= left <= (end - at) * 2 for at, left in late]
    assert len(late) > 20
    assert sum(right) >= 0.9 * len(right)
    assert "41 of 41 prompts: 100%" in capsys.readouterr().err


# --- what is copied while the model goes on


def test_the_writer_makes_the_rows_while_copies_are_under_way(
    model_dir, prompt_file, undisturbed, tmp_path, monkeypatch
):
    waited, made = [], []
    monkeypatch.setattr(recorder.HostCopies, "pending", True)  # as with results on a GPU
    monkeypatch.setattr(recorder.HostCopies, "wait", lambda copies: waited.append(threading.current_thread().name))
    rows_of = decoding.rows_of
    monkeypatch.setattr(
        decoding, "rows_of", lambda *args: (made.append(threading.current_thread().name), rows_of(*args))[1]
    )
    checked = job.checked_batching
    monkeypatch.setattr(  # the check of the model is over by then
        job, "checked_batching", lambda *args: (checked(*args), waited.clear(), made.clear())[0]
    )
    assert run(model_dir, prompt_file, tmp_path / "run", "--batch_size", "7") == 0
    assert set(waited) == set(made) == {"writer_0"}
    assert len(waited) == 2 * len(made) > 4  # of the prompts and of their shared prefix
    assert_same_run(tmp_path / "run", undisturbed)


# --- memory that is kept

FREED_TWICE = """
import resource, sys, torch
sys.path[:0] = {paths!r}
from capture import cpu_speed
kept = {keep} and cpu_speed.keep_heap(torch.device("cpu"))
faults = []
for _ in range(40):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16 << 20)  # 64 MB, freed at once
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(kept, faults[0], sum(faults[-8:]))
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc")
@pytest.mark.parametrize("keep", [True, False])
def test_a_kept_heap_is_not_given_back_page_by_page(keep):
    script = FREED_TWICE.format(paths=[str(SCRIPT.parents[1])], keep=keep)
    options = {"THP_MEM_ALLOC_ENABLE": "0"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=os.environ | options)
    kept, first, last = done.stdout.split()
    assert kept == str(keep)
    assert int(first) > 10_000  # pages of 4 kB
    assert int(last) < int(first) / 10 if keep else int(last) > 7 * int(first)


def test_the_heap_is_kept_for_raw_maps_alone(model_dir, prompt_file, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(job, "keep_heap", lambda device: calls.append(device.type) or True)
    for name, layers in (("raw", "0"), ("none", "none")):
        assert run(model_dir, prompt_file, tmp_path / name, "--raw_layers", layers, "--max_samples", "2") == 0
    assert calls == ["cpu"]
    told = [json.loads((tmp_path / name / "swap" / "run.json").read_text())["environments"] for name in ("raw", "none")]
    assert [one[0]["heap_kept"] for one in told] == [True, False]
