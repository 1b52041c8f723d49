"""The documentation: commands and Python blocks run, links lead somewhere, tables are those of their JSON files."""

import json
import re
from pathlib import Path

import bench_capture
import pytest
import render_tables
import tiny_models
from test_house import check_command, commands_in

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
    assert shown == measured == set(render_tables.LAYOUTS)
    for name in measured:
        content = json.loads((ROOT / f"docs/measured/{name}.json").read_text(encoding="utf-8"))
        assert content["commands"], f"{name}: how was it measured?"
