"""repair_summary.csv: how much of a style's harm its repair gives back, planted in runs on disk."""

from __future__ import annotations

from pathlib import Path

import evaluate_predictions
import match_answers
import numpy as np
import pandas as pd
import pytest
from decomposition import share_interval
from file_output import read_csv
from paired_stats import holm, paired_difference
from synthetic_run import prompt_rows, write_run

WRONG = np.random.default_rng(2).random((60, 3)) < 0.6


def effect(folder: Path, wrong: dict[str, np.ndarray], words: bool = True) -> pd.DataFrame:
    """The table of a run of 60 rows in 20 templates whose answers are wrong where `wrong[style]` says."""
    rows = prompt_rows(60, ["swap", "main"], templates=20)
    for row in rows:
        row |= {"answer": "Paris"} if words else {}
        row |= {f"repaired@{style}": row[style] for style in ("swap", "main")}

    def change(row, style, index):
        row["response"] = "7777" if wrong.get(style, WRONG[:, 2] & False)[index] else rows[index]["answer"]

    run = write_run(folder / "run", rows, change=change)
    script = match_answers if words else evaluate_predictions
    assert script.main(["--run_dir", str(run), "--results_dir", str(folder)]) == 0
    return read_csv(folder / "repair_summary.csv").set_index("style")


@pytest.mark.parametrize("words", [True, False])
def test_harm_regained_and_remaining_are_paired_differences(tmp_path, words):
    swap, main = WRONG[:, 0], WRONG[:, 1]
    repaired = swap & WRONG[:, 2]
    table = effect(tmp_path, {"swap": swap, "main": main, "repaired@swap": repaired}, words)
    clusters = np.arange(60) % 20
    clean, own, fixed = np.ones(60), ~swap * 1.0, ~repaired * 1.0
    line = table.loc["swap"]
    for part, left, right in (("harm", own, clean), ("regained", fixed, own), ("remaining", fixed, clean)):
        expected = paired_difference(left, right, clusters)
        found = line[[part, f"{part}_ci_low", f"{part}_ci_high", f"{part}_p"]].tolist()
        assert found == pytest.approx([expected.mean, expected.ci_low, expected.ci_high, expected.p])
        assert table[f"{part}_p_adjusted"].tolist() == pytest.approx(holm(table[f"{part}_p"]), nan_ok=True)
    assert line["harm"] + line["regained"] == pytest.approx(line["remaining"])
    assert line["regained_share"] == pytest.approx(-line["regained"] / line["harm"])
    interval = line[["regained_share_ci_low", "regained_share_ci_high"]].tolist()
    assert interval == pytest.approx(share_interval(fixed - own, clean - own, clusters))
    assert interval[0] < line["regained_share"] < interval[1]
    assert (line["n"], line["n_without_repair"], line["n_clusters"]) == (60, 0, 20)
    # All that `main` lost comes back, in every row: a share of 1, and nothing to estimate an interval from.
    line = table.loc["main"]
    assert (line["regained_share"], line["remaining"]) == (1, 0)
    assert line[["regained_share_ci_low", "remaining_p"]].isna().all()


def test_no_share_of_a_harm_that_is_not_clear_of_0(tmp_path):
    harmless = {style: WRONG[:, place] for place, style in enumerate(("normal", "swap", "repaired@swap"))}
    line = effect(tmp_path, harmless).loc["swap"]
    assert line["harm_ci_low"] < 0 < line["harm_ci_high"]
    assert line[["regained_share", "regained_share_ci_low", "regained_share_ci_high"]].isna().all()


def test_a_run_without_repairs_has_no_table(tmp_path):
    (tmp_path / "repair_summary.csv").write_text("of a run with repairs")
    run = write_run(tmp_path / "run", prompt_rows(8, ["swap"]))
    assert evaluate_predictions.main(["--run_dir", str(run), "--results_dir", str(tmp_path)]) == 0
    assert not (tmp_path / "repair_summary.csv").exists()
