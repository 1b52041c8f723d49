"""The documentation: commands and Python blocks run, links lead somewhere, tables are those of their JSON files."""

import csv
import importlib.util
import json
import re
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import activation_diffs
import attn_act_logi
import bench_capture
import dirs_eval
import evaluate_predictions
import head_sensitivity
import neuron_sensitivity
import probe_layers
import pytest
import render_tables
import tiny_models
from matplotlib import pyplot
from score_scripts import DEFAULT_REWARD_MODEL
from test_house import check_command, commands_in
from test_semantics_scores import deberta  # noqa: F401 (a fixture)

ROOT = Path(__file__).resolve().parents[1]
PAGES = render_tables.pages()
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def anchors_of(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_page
def test_commands_work(page):
    for words in commands_in(page.read_text(encoding="utf-8")):
        check_command(words)


@every_page
def test_links_lead_to_a_file_and_a_heading(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        name, _, anchor = target.partition("#")
        if not target.startswith("http"):
            other = (page.parent / name).resolve() if name else page
            assert other.exists(), f"{target}: no such file"
            assert not anchor or anchor in anchors_of(other), f"{target}: no such heading"


@every_page
def test_tables_and_lists_of_files_are_up_to_date(page):
    assert render_tables.filled(page) == page.read_text(encoding="utf-8"), "run: python docs/render_tables.py"


def test_what_bench_capture_writes_fills_a_table(tmp_path):
    model = tiny_models.save(tmp_path / "model")
    flags = ["--lengths", "4", "--repeats", "1", "--max_new_tokens", "2", "--ways", "generate", "ours"]
    bench_capture.main(["--model_name", model, *flags, "--json", str(tmp_path / "bench.json")])
    content = json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))
    layout = render_tables.LAYOUTS["capture_batches"]
    assert [layout.column(record) for record in content["rows"]] == ["8 × 4 tokens"] * 2
    assert layout.cell(content["rows"][0]) == "1.00"
    assert layout.row(content["rows"][1]).startswith("error_interp: all layers")
    assert content["commands"][0].startswith("python 2_inference/run_scripts/bench_capture.py --model_name")


def test_every_measured_file_is_in_a_page():
    shown = {name for page in PAGES for _, name, _ in render_tables.PLACE.findall(page.read_text(encoding="utf-8"))}
    measured = {path.stem for path in (ROOT / "docs/measured").glob("*.json")}
    assert shown == measured
    assert measured | {"gpu"} == set(render_tables.LAYOUTS)  # that one is measured where there is a GPU
    for name in measured:
        content = json.loads((ROOT / f"docs/measured/{name}.json").read_text(encoding="utf-8"))
        assert content["commands"], f"{name}: how was it measured?"


# --- a small real run, as the README's reader has it after `make run`


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A folder with outputs/demo/maths and results/demo/maths of a tiny model."""
    place = tmp_path_factory.mktemp("demo")
    run, results = (place / name / "demo" / "maths" for name in ("outputs", "results"))
    attn_act_logi.main([
        "--model_name", tiny_models.save(place / "model"), "--prompt_file", str(ROOT / "0_data/maths.json"),
        "--prompt_keys", "normal", "swap", "split@swap", "--max_samples", "24", "--max_new_tokens", "2",
        "--raw_layers", "1", "--neurons", "--entropy", "--output_dir", str(run),
    ])  # fmt: skip
    for script in (evaluate_predictions, dirs_eval, head_sensitivity, activation_diffs, neuron_sensitivity):
        assert script.main(["--run_dir", str(run), "--results_dir", str(results)]) == 0
    probe_layers.main(["--run_dir", str(run), "--results_dir", str(results), "--layers", "1"])
    return place


def documented_columns() -> tuple[set[str], dict[str, set[str]]]:
    """(columns that mean the same everywhere, {file: patterns of its own}) of the tables of DATA_FORMAT.md."""
    text = (ROOT / "docs/DATA_FORMAT.md").read_text(encoding="utf-8").partition("## CSV files")[2]
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    ticked = [[re.findall(r"`([^`]+)`", cell) for cell in row] for row in rows]
    common = {name for first, *_ in ticked for name in first if not name.endswith(".csv")}
    own = {name: set(cells[-1]) for cells in ticked for name in cells[0] if name.endswith(".csv")}
    return common, own


def test_documented_columns_are_those_that_are_written(demo):
    common, own = documented_columns()
    written = sorted((demo / "results").rglob("*.csv"))
    assert len(written) >= 15
    undocumented, promised = {}, {}
    for path in written:
        with path.open(encoding="utf-8") as handle:
            header = next(csv.reader(handle))
        patterns = own[path.name]
        lacking = [name for name in header if not any(fnmatchcase(name, one) for one in common | patterns)]
        absent = [one for one in patterns if not any(fnmatchcase(name, one) for name in header)]
        undocumented |= {path.name: lacking} if lacking else {}
        promised |= {path.name: absent} if absent else {}
    assert (undocumented, promised) == ({}, {}), "columns that DATA_FORMAT.md lacks, and that it promises in vain"


def test_every_documented_csv_is_written_by_some_script(demo):
    """The demo's by its files; the others by their name, or its parts, in the code."""
    code = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("[0-9]_*/*/*.py"))
    written = {path.name for path in (demo / "results").rglob("*.csv")}
    for name in documented_columns()[1].keys() - written:
        parts = re.fullmatch(r"(?:<\w+>)?(\w*?)(_items|_summary|_answer_flips|)(\.csv)", name).groups()
        assert "".join(parts) in code or (f'"{parts[0]}"' in code and f"{parts[1]}{parts[2]}" in code), name


OTHER_TOOLS = ("transformer_lens", "nnsight")


@every_page
def test_python_blocks_run(page, request, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    if not blocks:
        return
    place = request.getfixturevalue("demo")
    monkeypatch.chdir(place)
    monkeypatch.setattr("sys.path", [*sys.path])
    names = {"pt_dir": "outputs/demo/maths/swap", "raw_csv_path": "raw.csv", "agg_base_path": "aggregates"}
    for block in blocks:
        if any(f"from {name}" in block for name in OTHER_TOOLS):
            continue
        model = DEFAULT_REWARD_MODEL
        if model in block:
            block = block.replace(model, request.getfixturevalue("deberta"))
        exec(compile(block, str(page), "exec"), names)
    pyplot.close("all")


@pytest.mark.parametrize("tool", OTHER_TOOLS)
def test_another_tool_has_the_states_of_a_run(tool, demo):
    """The guide's block as a script, behind those that open the run; its last line prints the largest difference."""
    if importlib.util.find_spec(tool) is None:
        pytest.skip(f"{tool} is not installed")
    section = (
        (ROOT / "docs/GUIDE.md").read_text(encoding="utf-8").partition("## In other tools")[2].partition("\n## ")[0]
    )
    blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    code = "".join([*blocks[:2], next(block for block in blocks if f"from {tool}" in block)])
    code = code.replace("1_utils", str(ROOT / "1_utils")).replace("models/SmolLM2-135M-Instruct", str(demo / "model"))
    (demo / "block.py").write_text(code)  # nnsight reads the source of its `with`
    done = subprocess.run([sys.executable, "block.py"], capture_output=True, text=True, cwd=demo)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) < 1e-5
