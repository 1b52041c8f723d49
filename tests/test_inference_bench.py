"""bench_capture: every round is reported, and a stopped run ends with the rounds that it has."""

import json
import os
import re
import signal

import bench_capture
import numpy as np
import pandas as pd
import pytest
import render_tables
import tiny_models
from capture import gpu_suite, timing


def bench(tmp_path, *flags):
    folder = tiny_models.save(tmp_path / "tiny")
    csv = tmp_path / "bench.csv"
    own = ["--model_name", str(folder), "--max_new_tokens", "2", "--batch_size", "2", "--csv", str(csv)]
    return bench_capture.main([*own, *flags]), csv


def test_every_way_has_a_row_and_every_round_a_line(tmp_path, capfd):
    code, csv = bench(tmp_path, "--lengths", "4", "9", "--repeats", "2", "--ways", "generate", "ours", "two_pass")
    table, errors = pd.read_csv(csv), capfd.readouterr().err
    assert code == 0
    assert list(zip(table.prompt_tokens, table.way, strict=True)) == [
        (length, way) for length in (4, 9) for way in ("generate", "ours", "two_pass")
    ]
    assert (table.loc[table.way == "generate", "ratio_to_generate"] == 1).all()
    assert (table.rounds == 2).all()
    assert all(
        f"2 x {length} tokens, round {number} of 2: generate" in errors for length in (4, 9) for number in (1, 2)
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGALRM])
def test_a_stopped_run_gives_the_finished_rounds(tmp_path, monkeypatch, capfd, number):
    calls = []

    def stopping(model, args):
        plain = timing.plain_generate(model, args)

        def run(ids):
            calls.append(ids.shape)
            if len(calls) == 2 + 2 + 1:  # untimed calls, two rounds, and then in the midst of the third
                os.kill(os.getpid(), number)
            return plain(ids)

        return run

    monkeypatch.setitem(timing.WAYS, "stopping", stopping)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a test runner in the background ignores it
    code, csv = bench(tmp_path, "--lengths", "4", "9", "--repeats", "5", "--ways", "generate", "stopping")
    signal.signal(signal.SIGINT, before)
    table = pd.read_csv(csv)
    assert code == 130
    assert set(table.prompt_tokens) == {4}
    assert list(table.rounds) == [2, 2]
    assert "stopped: these are the finished rounds" in capfd.readouterr().err


def test_a_whole_job_compares_its_texts_with_a_generate_loop(tmp_path):
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps([{"normal": f"Please add: {n} + {n} =" + " 1" * n} for n in range(5)]))
    code, csv = bench(tmp_path, "--prompt_file", str(prompts), "--repeats", "1", "--stop_strings", "nothing")
    table = pd.read_csv(csv)
    assert code == 0
    assert list(table.prompts) == list(table.texts_equal) == [5, 5]


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_suite_for_a_gpu_runs_at_toy_size(tmp_path, capfd, monkeypatch, family):
    """A way that has no room is told so, and the others go on."""
    folder = tiny_models.save(tmp_path / "tiny", family)

    def too_large(model, args):
        def run(ids):
            if ids.shape[1] == gpu_suite.TOY["lengths"][1]:
                raise MemoryError("out of memory")
            return 0

        return run

    monkeypatch.setitem(timing.WAYS, "two_pass", too_large)
    out = tmp_path / "gpu.json"
    flags = ["--suite", "gpu", "--random_weights", str(folder), "--dtype", "float32", "--repeats", "1", "--json"]
    assert bench_capture.main([*flags, str(out), "--max_new_tokens", "2"]) == 0
    records = json.loads(out.read_text())["rows"]
    page = render_tables.rendered(render_tables.LAYOUTS["gpu"], records)
    assert re.search(r"^\| 2 × 24 tokens: two_pass [| ]+ no room \|$", page, re.M)
    table = pd.DataFrame(records).set_index(["part", "what", "measure"])["value"]
    parity = table.loc["parity"]
    assert {"span_mass", "attention_entropy", "hidden_pooled", "mlp_pooled", "topk_vals", "attentions 0"} <= {
        name for name, _ in parity.index
    }
    assert parity.max() < 2e-3  # fractions and entropies are kept in 16 bits
    assert table["decoding, 2 × 12 tokens", "ours", "÷ bound"] > 0
    assert table["2 × 12 tokens", "two_pass", "÷ generate()"] > 0
    assert table["2 × 24 tokens", "ours", "÷ generate()"] > 0
    assert np.isnan(float(table["2 × 24 tokens", "two_pass", "÷ generate()"]))
