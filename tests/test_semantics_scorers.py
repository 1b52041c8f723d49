"""compare_scorers on tables on disk: parse rates, changes on the same rows, their difference, scales."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from compare_scorers import main
from file_output import read_csv
from paired_stats import clustered_mean
from synthetic_run import prompt_rows, write_run

COUNT, TEMPLATES = 24, 8
CLUSTERS = [f"template_{row % TEMPLATES}" for row in range(COUNT)]
RNG = np.random.default_rng(0)
RIGHT = {"normal": RNG.integers(0, 2, COUNT), "swap": RNG.integers(0, 2, COUNT), "main": RNG.integers(0, 2, COUNT)}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("scorers") / "run", prompt_rows(COUNT, ["swap", "main"], TEMPLATES))


def write(folder: Path, name: str, columns: dict[str, dict[str, list]]) -> None:
    """A table with a line for each style and row from {column: {style: a value a row}}."""
    styles = next(iter(columns.values()))
    lines = [
        {"style": style, "original_index": row, "sample": 0, "identical": False}
        | {column: of[style][row] for column, of in columns.items()}
        for style in styles
        for row in range(COUNT)
    ]
    pd.DataFrame(lines).to_csv(folder / name, index=False)


def write_rule(folder: Path, unread: int = 0) -> None:
    """Right and wrong; the first `unread` answers to swap could not be read."""
    values = {style: ["7"] * COUNT for style in RIGHT}
    values["swap"] = [None] * unread + ["7"] * (COUNT - unread)
    right = {style: list(cells) for style, cells in RIGHT.items()}
    right["swap"] = [0] * unread + right["swap"][unread:]
    write(folder, "maths_items.csv", {"correct": right, "value": values})


def compared(run: Path, folder: Path, *flags: str) -> pd.DataFrame:
    assert main(["--run_dir", str(run), "--results_dir", str(folder), *flags]) == 0
    return read_csv(folder / "scorers_compared.csv").set_index("style")


def test_rule_and_judge_by_hand(run, tmp_path, caplog):
    write_rule(tmp_path, unread=4)
    preference = {"swap": [1.0, 0.5, 0.0, None] * 6, "main": [0.5] * COUNT}
    write(tmp_path, "judge_items.csv", {"preference": preference})
    table = compared(run, tmp_path)
    swap = table.loc["swap"]
    assert swap[["scorer", "other_scorer", "scale"]].tolist() == ["rule", "judge", "as it is"]
    rates = ["parse_rate_clean", "parse_rate", "parse_rate_difference", "other_parse_rate"]
    assert swap[rates].tolist() == pytest.approx([1, 20 / 24, -4 / 24, 18 / 24])
    assert np.isnan(swap["other_parse_rate_clean"])
    assert swap[["n_responses", "n"]].tolist() == [24, 18]
    rows = [row for row in range(COUNT) if row % 4 < 3]  # that the judge scored
    won = np.array([0 if row < 4 else RIGHT["swap"][row] for row in rows]) - RIGHT["normal"][rows]
    preferred = np.array([(1, 0, -1)[row % 4] for row in rows])
    for name, values in (("change", won), ("other_change", preferred), ("interaction", won - preferred)):
        expected = clustered_mean(values, [CLUSTERS[row] for row in rows])
        ends = [swap[name], swap[f"{name}_ci_low"], swap[f"{name}_ci_high"]]
        assert ends == pytest.approx([expected.mean, expected.ci_low, expected.ci_high]), name
    assert swap["p"] == pytest.approx(expected.p)
    assert swap["n_clusters"] == expected.n_clusters
    lowest = table["p"].min()
    assert table.loc[table["p"].idxmin(), "p_adjusted"] == pytest.approx(min(1, 2 * lowest))
    assert "rule could score 0.833 of swap (-0.167 to the clean form)" in caplog.text


def test_scores_on_another_scale_are_standardised_by_the_clean_form(run, tmp_path):
    write_rule(tmp_path)
    rewards = {style: list(5.0 + 3 * cells) for style, cells in RIGHT.items()}  # the rule in other units
    for style, of in rewards.items():
        write(tmp_path, f"{style}_scores.csv", {"reward_score": {style: of}})
    table = compared(run, tmp_path)
    assert (table["scale"] == "clean standard deviations").all()
    assert table["interaction"].tolist() == pytest.approx([0, 0], abs=1e-12)
    gap = RIGHT["swap"].mean() - RIGHT["normal"].mean()
    assert table.loc["swap", "other_change"] == pytest.approx(gap / RIGHT["normal"].std(ddof=1))


def test_similarity_is_compared_where_the_clean_answer_is_right(run, tmp_path):
    write_rule(tmp_path)
    like = {style: list(np.where(RIGHT[style] == RIGHT["normal"], 0.95, 0.6)) for style in ("swap", "main")}
    write(tmp_path, "similarity_items.csv", {"similarity": {"normal": [None] * COUNT, **like}})
    write(tmp_path, "judge_items.csv", {"preference": {"swap": [0.5] * COUNT}})
    table = compared(run, tmp_path).query("other_scorer == 'similarity'")
    assert table["scorer"].tolist() == ["rule", "rule"]
    assert table["n"].tolist() == [RIGHT["normal"].sum()] * 2
    assert table["interaction"].tolist() == [0, 0]
    swap = table.loc["swap"]
    assert swap["other_change"] == pytest.approx(RIGHT["swap"][RIGHT["normal"] == 1].mean() - 1)
    strict = compared(run, tmp_path, "--similarity_threshold", "0.99").query("other_scorer == 'similarity'")
    assert (strict["other_change"] == -1).all()


def test_prompts_that_equal_the_clean_one_are_left_out(run, tmp_path):
    write_rule(tmp_path)
    write(tmp_path, "judge_items.csv", {"preference": {"swap": [0.0] * COUNT}})
    for name in ("maths_items.csv", "judge_items.csv"):
        table = pd.read_csv(tmp_path / name)
        table["identical"] = (table["style"] == "swap") & (table["original_index"] < 5)
        table.to_csv(tmp_path / name, index=False)
    assert compared(run, tmp_path).loc["swap", ["n_responses", "n"]].tolist() == [COUNT - 5] * 2


def test_one_scorer_alone_writes_nothing(run, tmp_path, caplog):
    write_rule(tmp_path)
    (tmp_path / "scorers_compared.csv").write_text("of an earlier run")
    assert main(["--run_dir", str(run), "--results_dir", str(tmp_path)]) == 0
    assert "it has the scores of rule" in caplog.text
    assert not (tmp_path / "scorers_compared.csv").exists()
