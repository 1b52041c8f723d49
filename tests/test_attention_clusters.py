"""Templates are clusters: their true number is in every table of a run, and halves are the same in all of them."""

import activation_diffs
import dirs_eval
import evaluate_predictions
import head_sensitivity
import neuron_sensitivity
import pytest
from attention import neurons
from file_output import read_csv
from logger import set_verbose
from paired_stats import deal
from run_store import open_run
from style_rows import templates_of
from synthetic_run import prompt_rows, with_controls, write_run

ROWS, TEMPLATES = 300, 257


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """Every table of a run of 300 rows in 257 templates with the names of maths.json."""
    folder = tmp_path_factory.mktemp("clusters")
    rows = prompt_rows(ROWS, ["swap"])
    for index, row in enumerate(rows):
        row["_template"] = f"{('addition', 'division')[index % TEMPLATES % 2]}_{index % TEMPLATES // 2}"
    assert len({row["_template"] for row in rows}) == TEMPLATES
    run = write_run(folder / "run", rows, rows_per_file=64, layers=1, heads=2, hidden=4, neurons=4, raw_layers=())
    command = ["--run_dir", str(run), "--results_dir", str(folder / "out")]
    for script in (evaluate_predictions, dirs_eval, head_sensitivity, activation_diffs):
        assert script.main(command) == 0
    assert neuron_sensitivity.main([*command, "--neuron_regions", "last"]) == 0
    return {path.name: read_csv(path) for path in (folder / "out").glob("*.csv")}, run


def test_every_table_has_the_true_number_of_clusters(tables):
    found = {}
    for name, table in tables[0].items():
        if "n_clusters" in table.columns and not name.startswith(("neuron", "typo_heads", "maths_by")):
            whole = table[(table["n"] == ROWS) & (table["style"] == "swap")]
            if len(whole):
                found[name] = set(whole["n_clusters"])
    assert len(found) >= 7
    assert found == {name: {TEMPLATES} for name in found}


def test_the_halves_of_a_run_are_exact(tables):
    halves = deal(templates_of(open_run(tables[1])), 2, 0)
    assert sorted([*halves.values()].count(half) for half in (0, 1)) == [TEMPLATES // 2, TEMPLATES // 2 + 1]
    summary = tables[0]["neuron_sensitivity_summary.csv"].iloc[0]
    assert summary["n_find"] + summary["n"] == ROWS
    assert summary["n_clusters"] == [*halves.values()].count(1)


def test_halves_do_not_depend_on_the_rows_that_an_analysis_reads(tables):
    run = open_run(tables[1])
    few, _ = neurons.open_studies(run, _args(run, "--max_samples", "10"))
    assert few.halves == deal(templates_of(run), 2, 0)


def _args(run, *more):
    return neuron_sensitivity.parse_args(["--run_dir", str(run.path), *more])


def test_a_null_template_is_none(tmp_path):
    rows = prompt_rows(4)
    rows[0]["_template"], rows[1]["_template"], rows[2]["_template"] = None, None, 7
    run = open_run(write_run(tmp_path / "run", rows))
    assert [run.template(index) for index in range(4)] == ["row 0", "row 1", "7", "row 3"]


# --- what a user sees


@pytest.fixture(scope="module")
def controlled(tmp_path_factory):
    """A run in which head 1.1 looks at the words that `swap` mistypes, more than at those of its control."""

    def look(scores, style, index, regions):
        if style == "swap":
            scores[1, 1][:, regions["edited"]] += 2

    folder = tmp_path_factory.mktemp("controlled")
    cut = lambda index, word, typo: f"{word[:3]}\u00ad{word[3:]}"  # noqa: E731
    rows = with_controls(prompt_rows(40, ["swap", "main"]), "swap", cut)
    return write_run(folder / "run", rows, layers=3, heads=3, scores=look)


@pytest.mark.parametrize("verbose", [False, True])
def test_the_closing_lines_of_head_sensitivity_are_its_result(controlled, tmp_path, capsys, verbose):
    flags = ["--run_dir", str(controlled), "--results_dir", str(tmp_path), *["--verbose"][: int(verbose)]]
    try:
        assert head_sensitivity.main(flags) == 0
    finally:
        set_verbose(False)
    told = capsys.readouterr()
    lines = (told.out + told.err).splitlines()
    table = read_csv(tmp_path / "head_sensitivity.csv")
    rows = table[(table["measure"] == "edited_log2_mass_last") & (table["style"] == "swap")]
    first = rows.set_index("rank_vs_control").loc[1]
    assert (first["layer"], first["head"]) == (1, 1)
    [line] = [line for line in lines if line.startswith("swap minus split@swap")]
    ends = f"[{first['difference_ci_low_vs_control']:.2g}, {first['difference_ci_high_vs_control']:.2g}]"
    assert f"(n = {first['n_vs_control']:.0f}): 1.1 {first['difference_vs_control']:+.2g} {ends}*, " in line
    assert line.count("[") == 5
    assert not any(line.startswith("main") for line in lines)  # its control is none of as many tokens
    assert any(line.endswith("head_overlap.csv") for line in lines) == verbose
    assert len(lines) < 6 or verbose


def test_the_closing_lines_of_activation_diffs_are_its_result(controlled, tmp_path, capsys):
    assert activation_diffs.main(["--run_dir", str(controlled), "--results_dir", str(tmp_path)]) == 0
    lines = capsys.readouterr().err.splitlines()
    summary = read_csv(tmp_path / "activation_diffs_summary.csv").set_index(["style", "measure"])
    row = summary.loc[("swap", "recovery_depth")]
    [line] = [line for line in lines if line.startswith("swap: ")]
    assert (
        f"from layer {row['estimate']:.1f} on [{row['ci_low']:.1f}, {row['ci_high']:.1f}], n = {row['n']:.0f}" in line
    )
    assert f"{row['difference_to_control']:+.1f} layers to split@swap [{row['difference_ci_low']:+.1f}, " in line
    assert [line for line in lines if line.startswith("warning")] == [
        "warning: without a control: main; their differences may come from the number of tokens alone. "
        "Stage 2 makes controls with --prompt_keys split@<style> (typos) and neutral@<style> (tones)"
    ]
    assert len(lines) == 3
