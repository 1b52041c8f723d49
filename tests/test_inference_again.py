"""The clean form again (`normal@again`): other batches, the same prompts; what differs is no effect of a style."""

from __future__ import annotations

import json

import activation_diffs
import attn_act_logi
import match_answers
import numpy as np
import pandas as pd
import pytest
import tiny_models
import torch
from capture.decode import Generator
from command_line import UserError
from file_output import read_csv
from pt_fields import unpack_rows
from run_store import open_run
from synthetic_run import prompt_rows, write_run


def test_the_clean_prompts_run_in_other_batches_and_give_the_same_rows(tmp_path, monkeypatch):
    model = tiny_models.save(tmp_path / "model")
    path = tmp_path / "prompts.json"
    rows = [{"instruction": "Explain the sum" + " of red apples" * count} for count in (2, 0, 3, 1)]
    path.write_text(json.dumps(rows), encoding="utf-8")
    groups, prefill = [], Generator._prefill

    def noted(self, group):
        groups.append([prompt.key for prompt in group])
        return prefill(self, group)

    monkeypatch.setattr(Generator, "_prefill", noted)
    flags = ["--model_name", model, "--prompt_file", str(path), "--output_dir", str(tmp_path / "run")]
    flags += ["--max_new_tokens", "3", "--temperature", "1", "--batch_size", "4", "--no_prefix_reuse"]
    assert attn_act_logi.main([*flags, "--prompt_keys", "instruction", "instruction@again"]) == 0
    assert groups[-3:] == [[2, 0, 3, 1], [1, 3], [0, 2]]  # after those of the check of the model
    run = open_run(tmp_path / "run")
    assert list(run.styles) == ["instruction", "instruction@again"]
    first, again = ([row for _, content in run.batches(style) for row in unpack_rows(content)] for style in run.styles)
    for index, (one, other) in enumerate(zip(first, again, strict=True)):
        assert one["original_index"] == other["original_index"] == index
        assert one["prompt"] == other["prompt"] == rows[index]["instruction"]
        assert one["response"] == other["response"]  # sampled, by the row's own random numbers
        torch.testing.assert_close(one["logsumexp"], other["logsumexp"], rtol=1e-4, atol=1e-4)
    path.write_text(json.dumps([{"normal": "one two", "swap": "one tow"}]), encoding="utf-8")
    with pytest.raises(UserError, match="only the clean form"):
        attn_act_logi.main([*flags, "--prompt_keys", "normal", "swap@again"])


def test_noise_is_a_line_of_the_tables_and_in_no_correction(tmp_path):
    rows = [row | {"answer": "Paris", "normal@again": row["normal"]} for row in prompt_rows(40, ["swap", "main"])]
    wrong = {"swap": 2, "main": 5, "normal@again": 20}  # every so many rows

    def change(row, style, index):
        row["response"] = "Rome" if style in wrong and index % wrong[style] == 0 else "Paris"
        if style == "normal@again":
            row["logsumexp"] = row["logsumexp"] + 1e-3

    tables = {}
    for name, styles in (("with", ["normal", "normal@again", "swap", "main"]), ("without", ["normal", "swap", "main"])):
        run = write_run(tmp_path / name, rows, styles, change=change)
        flags = ["--run_dir", str(run), "--results_dir", str(tmp_path / f"{name}_results")]
        assert match_answers.main(flags) == 0
        tables[name] = read_csv(tmp_path / f"{name}_results" / "answers_summary.csv").set_index("style")
    noise = tables["with"].loc["normal@again"]
    assert noise[["n_paired", "n_identical", "right_to_wrong", "wrong_to_right"]].tolist() == [40, 0, 2, 0]
    assert noise["difference"] == pytest.approx(-0.05)
    assert noise[["p_adjusted", "p_mcnemar_adjusted"]].isna().all()
    pd.testing.assert_frame_equal(tables["with"].drop("normal@again"), tables["without"])
    flags = ["--run_dir", str(tmp_path / "with"), "--results_dir", str(tmp_path / "with_results")]
    assert activation_diffs.main(flags) == 0
    summary = read_csv(tmp_path / "with_results" / "activation_diffs_summary.csv").set_index(["style", "measure"])
    kl = summary.loc[("normal@again", "next_token_kl")]
    assert kl["n"] == 40
    assert 0 < kl["estimate"] < 0.01
    curves = read_csv(tmp_path / "with_results" / "activation_diffs.csv")
    assert np.allclose(curves.query("style == 'normal@again' and measure == 'relative_l2'")["estimate"], 0)
