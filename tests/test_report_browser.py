"""The report in a real browser (Chromium): numbers read back, hostile texts, keyboard, notebook, sizes."""

import html
import json
import os
import re
import shutil
import subprocess
import urllib.request
from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest
from build_report import build_report
from report_section import Finding
from run_store import open_run
from synthetic_run import VOCABULARY, prompt_rows, with_controls, write_run
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

if not shutil.which("chromedriver"):
    reason = "chromedriver is not installed (Debian: apt-get install chromium-driver)"
    assert os.environ.get("ERROR_INTERP_REQUIRE_BROWSER") != "1", reason
    pytest.skip(reason, allow_module_level=True)

EVIL = '</script><script>window.pwned=1</script><img src=x onerror="window.pwned=1">'
RIGHT_TO_LEFT = "\u202e\u200fשלום\u202d"
LONG = "a" * 100_000
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the name that the WebDriver standard gives to a reference
ENTER, RIGHT, UP, END = "\ue007", "\ue014", "\ue013", "\ue010"


class Browser:
    """Headless Chromium, driven by the WebDriver protocol."""

    def __init__(self):
        self.process = subprocess.Popen(
            ["chromedriver", "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        port = next(
            found[1] for line in self.process.stdout if (found := re.search(r"successfully on port (\d+)", line))
        )
        self.base = f"http://127.0.0.1:{port}/session"
        options = {"args": ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        self.base += "/" + self.call("", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]

    def call(self, path, body=None, method="POST"):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.base + path, data, {"Content-Type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def close(self):
        self.call("", method="DELETE")
        self.process.terminate()
        self.process.wait(10)

    def open(self, path):
        self.call("/url", {"url": path.as_uri()})

    def run(self, script, *arguments):
        return self.call("/execute/sync", {"script": script, "args": list(arguments)})

    def find(self, selector):
        return self.call("/element", {"using": "css selector", "value": selector})[ELEMENT]

    def click(self, selector):
        self.call(f"/element/{self.find(selector)}/click", {})

    def type(self, selector, keys):
        self.call(f"/element/{self.find(selector)}/value", {"text": keys})

    def text(self, selector):
        return self.call(f"/element/{self.find(selector)}/text", method="GET")

    def choose(self, select, value):
        self.click(f'#viewer-{select} option[value="{value}"]')

    def resize(self, width, height=900):
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("/goog/cdp/execute", {"cmd": "Emulation.setDeviceMetricsOverride", "params": metrics})

    def errors(self):
        """What the console has said since the last call."""
        return [line["message"] for line in self.call("/se/log", {"type": "browser"})]


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium."""
    one = Browser()
    yield one
    one.close()


def hostile_tokenizer(folder):
    """A tokenizer whose 97 words are the texts that a page must stand."""
    texts = [
        EVIL,
        RIGHT_TO_LEFT,
        "😀👩\u200d👩\u200d👧",
        LONG,
        "\n",
        " <b>bold</b>",
        "&amp;",
        '" onclick="window.pwned=1',
    ]
    vocabulary = {f"{texts[i % len(texts)]}{i}": i for i in range(VOCABULARY)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token=next(iter(vocabulary))))
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token=next(iter(vocabulary))).save_pretrained(folder)
    return str(folder)


def make_report(folder, hostile):
    """(run, report) of 10 rows in two styles, one with a control, and raw maps of layer 1."""
    rows = prompt_rows(10, ["swap", "polite"])
    rows = with_controls(rows, "swap", lambda _, word, __: word[:2] + "\u00ad" + word[2:])

    def change(row, style, index):
        row["response"] = [EVIL, RIGHT_TO_LEFT, LONG, "\ud800\x00\x07"][index % 4]
        row["element_index"] = f"{EVIL} {index}"

    for row in rows if hostile else ():
        row["answer"] = [EVIL + LONG, "x"]
        row["<b>odd & \u202e"] = row.pop("polite")
    run = write_run(folder / "run", rows, layers=4, heads=3, raw_layers=(1,), change=change if hostile else None)
    if hostile:
        settings = json.loads((run / "normal/run.json").read_text(encoding="utf-8"))
        settings["settings"]["model_name"] = hostile_tokenizer(folder / "tokenizer")
        (run / "normal/run.json").write_text(json.dumps(settings), encoding="utf-8")
    results = folder / "results"
    results.mkdir()
    marks = [(style, row, int((row + len(style)) % 3 > 0)) for style in ("normal", "swap") for row in range(10)]
    pd.DataFrame(marks, columns=["style", "original_index", "correct"]).to_csv(results / "maths_items.csv", index=False)
    finding = Finding("heads", "Head 2.1 reacts.", "heads.csv", 10, True, "polite", 0.01, "Which head?", "2.1")
    section = {"title": "Heads", "order": 50, "plots": [], "tables": [], "headlines": [], "findings": [asdict(finding)]}
    (results / "heads.section.json").write_text(json.dumps(section), encoding="utf-8")
    run = open_run(run)
    return run, build_report([(run, results)], results / "report.html")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return make_report(tmp_path_factory.mktemp("plain"), hostile=False)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    return make_report(tmp_path_factory.mktemp("hostile"), hostile=True)


def mass(run, style, row, clean_region, layer, head):
    """Attention of the last token to the edited words in the .pt file."""
    names = run.axes("span_mass", style)["key region"]
    column = names.index(clean_region if style == "normal" else "edited")
    return run.field("span_mass", style)[row, layer, head, names.index("last"), column]


def said(browser):
    return [float(number) for number in re.findall(r" (\d\.\d+)", browser.text("#viewer-said"))]


# --- a reader


def test_numbers_of_a_style_row_and_head_are_those_of_the_pt_file(browser, plain):
    run, report = plain
    browser.open(report)
    assert browser.errors() == []
    for style, row, layer, head in [(0, 3, 2, 1), (0, 9, 0, 2), (1, 5, 3, 0)]:
        browser.choose("style", style)
        browser.choose("row", row)
        browser.click(f'#viewer-grid td[data-layer="{layer}"][data-head="{head}"]')
        names = [["normal", "swap", "split@swap"], ["normal", "polite"]][style]
        stored = [mass(run, name, row, f"edited:{names[1]}", layer, head) for name in names]
        assert browser.text("#viewer-said").startswith(f"Layer {layer}, head {head}: normal ")
        np.testing.assert_allclose(said(browser), stored, atol=0.0045)
        assert browser.run("return document.querySelectorAll('#viewer-strips table:first-child tr').length") == len(
            names
        )
        last = {key: run.field(key, names[1])[row, 0] for key in ("topk_vals", "topk_indices", "logsumexp")}
        chances = np.exp(last["topk_vals"] - last["logsumexp"])
        rows = "[...document.querySelectorAll('#viewer-answers > div:nth-child(2) tr')]"
        shown = browser.run(f"return {rows}.map((row) => [...row.cells].map((cell) => cell.textContent))")
        assert [line[0].strip() for line in shown] == [f"⟨{token}⟩" for token in last["topk_indices"]]
        np.testing.assert_allclose([float(line[-1]) for line in shown], chances, atol=0.0006)
        answer = run.rows(names[1])["response"][row].strip()
        assert answer in browser.text("#viewer-answers > div:nth-child(2)")
    assert browser.errors() == []


def test_the_map_shows_a_difference_and_each_token_its_own_attention(browser, plain):
    run, report = plain
    browser.open(report)
    browser.choose("row", 4)
    browser.choose("map", "1,2")
    cell = '#viewer-grid td[data-layer="1"][data-head="2"]'
    label = browser.run("return document.querySelector(arguments[0]).ariaLabel", cell)
    difference = mass(run, "swap", 4, "", 1, 2) - mass(run, "split@swap", 4, "", 1, 2)
    assert abs(float(label.partition(": ")[2].replace("\u2212", "-")) - difference) < 0.009
    assert not browser.run("return document.getElementById('viewer-every').checkVisibility()")
    browser.click(cell)
    assert browser.run("return document.getElementById('viewer-every').checkVisibility()")
    stored = run.field("attentions", "swap", layers=1)[4, 2, -1]
    row = "[...document.querySelectorAll('#viewer-strips tr:nth-child(2) .token')]"
    shown = browser.run(f"return {row}.map((token) => Number(token.title))")
    np.testing.assert_allclose(shown, stored[-len(shown) :], atol=0.0045)
    assert len(shown) > 10


def test_a_head_that_the_findings_name_opens_in_the_viewer(browser, plain):
    _, report = plain
    browser.open(report)
    browser.click(".findings a[data-head]")
    assert browser.text("#viewer-said").startswith("Layer 2, head 1: normal ")
    assert browser.run("return document.querySelector('#viewer-style').selectedOptions[0].text") == "polite"
    assert browser.run("return location.hash") == "#viewer"


def test_filters_show_the_rows_that_turned(browser, plain):
    _, report = plain
    browser.open(report)
    marks = pd.read_csv(report.with_name("maths_items.csv")).pivot(
        index="original_index", columns="style", values="correct"
    )
    for name, before, after in [("wrong", 1, 0), ("right", 0, 1)]:
        expected = marks.index[(marks["normal"] == before) & (marks["swap"] == after)].tolist()
        browser.choose("filter", name)
        titles = browser.run("return [...document.querySelectorAll('#viewer-row option')].map((one) => one.text)")
        assert [int(title.partition(":")[0]) - 1 for title in titles] == expected
        assert browser.text(f'#viewer-filter option[value="{name}"]') == f"turned {name} ({len(expected)})"
    browser.choose("filter", "kl")
    titles = browser.run("return [...document.querySelectorAll('#viewer-row option')].map((one) => one.text)")
    sizes = [float(title.rpartition("KL ")[2]) for title in titles]
    assert sizes == sorted(sizes, reverse=True)
    assert browser.run("return document.querySelector('#viewer-row').selectedIndex") == 0
    browser.click("#viewer-on")
    assert browser.run("return document.querySelector('#viewer-row').selectedIndex") == 1


def test_the_map_works_by_keyboard_and_has_names_for_a_screen_reader(browser, plain):
    _, report = plain
    browser.open(report)
    browser.click('#viewer-grid td[data-layer="1"][data-head="0"]')
    for keys, place in [(RIGHT, (2, 0)), (UP, (2, 1)), (END, (3, 1)), (RIGHT, (3, 1))]:
        browser.type("#viewer-grid [aria-selected=true]", keys)
        assert browser.text("#viewer-said").startswith("Layer {}, head {}:".format(*place))
        assert browser.run("return document.activeElement.ariaLabel").startswith("layer {}, head {}:".format(*place))
    tree = browser.call("/goog/cdp/execute", {"cmd": "Accessibility.getFullAXTree", "params": {}})["nodes"]
    named = [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in tree if not node["ignored"]]
    roles = {role for role, _ in named}
    assert {"grid", "gridcell", "status", "combobox", "rowheader"} <= roles
    assert not [
        role for role, name in named if role in ("combobox", "button", "grid", "gridcell", "image") and not name
    ]
    assert sum(role == "gridcell" for role, _ in named) == 4 * 3


def test_a_table_sorts_by_a_click_and_by_keyboard(browser, plain, tmp_path):
    _, report = plain
    cells = ["0.5 [0.1, 0.9]", "\u22122.5", "–", "1,200", "< 0.001", "word"]
    rows = "".join(f"<tr><td>{number}</td><td>{cell}</td></tr>" for number, cell in enumerate(cells))
    table = f'<table id="own"><thead><tr><th>n</th><th>estimate</th></tr></thead><tbody>{rows}</tbody></table>'
    page = tmp_path / "table.html"
    page.write_text(report.read_text(encoding="utf-8").replace("</main>", f"{table}</main>"), encoding="utf-8")
    browser.open(page)
    order = "return [...document.querySelectorAll('#own tbody tr')].map((row) => Number(row.cells[0].textContent))"
    browser.click("#own th:nth-child(2) button")
    assert browser.run(order) == [1, 4, 0, 3, 5, 2]
    assert browser.run("return document.querySelector('#own th:nth-child(2)').ariaSort") == "ascending"
    browser.type("#own th:nth-child(2) button", ENTER)
    assert browser.run(order) == [3, 0, 4, 1, 5, 2]
    browser.click("#own th:nth-child(1) button")
    assert browser.run(order) == [0, 1, 2, 3, 4, 5]
    assert browser.run("return document.querySelectorAll('#own [aria-sort]').length") == 1


@pytest.mark.parametrize("width", [400, 1280])
def test_the_page_is_no_wider_than_the_window(browser, plain, hostile, width):
    browser.resize(width)
    for _, report in (plain, hostile):
        browser.open(report)
        wide = """return [...document.querySelectorAll('body *:not(.wide *, .strips *)')].filter((one) =>
            one.getBoundingClientRect().right > arguments[0]).map((one) => one.outerHTML.slice(0, 120))"""
        assert browser.run(wide, width) == []
        assert browser.run("return document.documentElement.scrollWidth") <= width, report
        edges = (
            "return [...document.querySelectorAll('#viewer-grid td')].map((cell) => cell.getBoundingClientRect().width)"
        )
        assert min(browser.run(edges)) >= 8
    browser.call("/goog/cdp/execute", {"cmd": "Emulation.clearDeviceMetricsOverride", "params": {}})


# --- hostile texts, other places


def test_hostile_texts_run_nothing_and_break_nothing(browser, hostile):
    run, report = hostile
    browser.open(report)
    made = "return ['img', 'b', 'script:not([type])'].map((tag) => document.querySelectorAll(`#viewer ${tag}`).length)"
    for style in range(2):
        browser.choose("style", style)
        for row in range(10):
            browser.choose("row", row)
            assert browser.run(made) == [0, 0, 0]
            assert browser.run("return document.querySelectorAll('#viewer-strips tr').length") >= 2
    assert browser.run("return typeof window.pwned") == "undefined"
    assert browser.errors() == []
    browser.choose("row", 0)
    assert EVIL in browser.run("return document.getElementById('viewer-answers').textContent")
    assert EVIL in browser.run("return document.getElementById('viewer-gold').textContent")
    hidden = browser.run("return /[\\u202a-\\u202e\\u200f\\u00ad]/.test(document.getElementById('viewer').innerText)")
    assert not hidden
    longest = browser.run(
        "return Math.max(...[...document.querySelectorAll('#viewer bdi')].map((one) => one.textContent.length))"
    )
    assert longest < 300
    assert report.stat().st_size < 1_500_000
    np.testing.assert_allclose(
        said(browser)[-1], mass(run, "<b>odd & \u202e", 0, "", *chosen_head(browser)), atol=0.0045
    )


def chosen_head(browser):
    return [int(number) for number in re.findall(r"\d+", browser.text("#viewer-said"))[:2]]


def test_it_works_in_a_notebook_cell(browser, hostile, tmp_path):
    """As a frame (IPython.display.IFrame, srcdoc), and as HTML whose scripts the notebook runs itself."""
    _, report = hostile
    text = report.read_text(encoding="utf-8")
    page = tmp_path / "notebook.html"
    page.write_text(
        f'<!DOCTYPE html><meta charset="utf-8"><iframe srcdoc="{html.escape(text)}"></iframe>', encoding="utf-8"
    )
    browser.open(page)
    browser.call("/frame", {"id": 0})
    assert browser.run("return document.querySelectorAll('#viewer-strips tr').length") >= 2
    browser.call("/frame", {"id": None})
    assert browser.errors() == []

    page.write_text('<!DOCTYPE html><meta charset="utf-8"><div id="cell"></div>', encoding="utf-8")
    browser.open(page)
    browser.run(
        """const cell = document.getElementById('cell');
        cell.innerHTML = arguments[0];
        for (const script of cell.querySelectorAll('script')) {
            const again = document.createElement('script');
            for (const {name, value} of script.attributes) again.setAttribute(name, value);
            again.textContent = script.textContent;
            script.replaceWith(again);
        }""",
        text,
    )
    assert browser.run("return document.querySelectorAll('#viewer-strips tr').length") >= 2
    assert browser.run("return typeof window.pwned") == "undefined"


def test_the_policy_stops_every_other_script_and_nothing_is_loaded(browser, plain, tmp_path):
    _, report = plain
    page = tmp_path / "injected.html"
    text = report.read_text(encoding="utf-8")
    page.write_text(text.replace("</main>", f"{EVIL}<img src='https://example.org/x.png'></main>"), encoding="utf-8")
    browser.open(page)
    assert browser.run("return typeof window.pwned") == "undefined"
    told = browser.errors()
    assert len(told) >= 3
    assert all("Content Security Policy" in message for message in told)
    assert browser.run("return document.querySelectorAll('#viewer-strips tr').length") >= 2
    browser.open(report)
    assert browser.run("return performance.getEntriesByType('resource').map((one) => one.name)") == []


def test_without_javascript_only_the_viewer_is_missing(browser, plain):
    _, report = plain
    browser.call("/goog/cdp/execute", {"cmd": "Emulation.setScriptExecutionDisabled", "params": {"value": True}})
    browser.open(report)
    shown = browser.text("body")
    browser.call("/goog/cdp/execute", {"cmd": "Emulation.setScriptExecutionDisabled", "params": {"value": False}})
    assert "This part needs JavaScript" in shown
    assert "Choose a style and a row" not in shown
    assert "Settings of the run" in shown
