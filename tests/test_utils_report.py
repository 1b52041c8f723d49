"""The report on runs on disk: self-contained, escaped, numbers with their intervals, differences marked."""

import base64
import html
import io
import json
import os
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from accuracy_sections import accuracy_section
from attention.head_plots import save_layer_head_grid
from build_report import (
    ANY,
    CHANGED,
    build_report,
    forms_of_one_prompt,
    headings_of,
    main,
    pick_examples,
    with_cuts,
    word_difference,
)
from command_line import UserError
from paired_stats import paired_summary
from PIL import Image
from report_section import Headline, Plots, Section, TableOf, read_sections, write_section
from report_tables import (
    MAX_ROWS,
    Interval,
    format_cell,
    merge_intervals,
    overview,
    rows_of,
    to_table,
    visible,
    whiskers,
)
from run_store import open_run
from synthetic_run import prompt_rows, write_run

EVIL = '<script>alert("x")</script><img src=x onerror=alert(1)>'
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


class Page(HTMLParser):
    """Tags, their attributes and the text of a page, as a browser would find them."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text.append(data)


def score_items(run):
    """maths_items.csv as stage 3 writes it, from the run's own answers."""
    lines = []
    for style in run.styles:
        for _, content in run.batches(style):
            for index, prompt, answer in zip(
                content["original_indices"], content["prompts"], content["responses"], strict=True
            ):
                right = answer.strip() == run.row(index)["answer"]
                lines.append({"style": style, "original_index": index, "prompt": prompt, "correct": right})
    return pd.DataFrame(lines)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(run, results folder): 24 rows in two styles, with an evil prompt, answer, style, cell and file name."""
    folder = tmp_path_factory.mktemp("report")
    rows = prompt_rows(24, ["swap", "polite"])
    for row in rows:
        row["polite"] = f"{EVIL} {row['polite']}"
        row["<b>odd"] = row.pop("swap")

    def change(row, style, index):
        if index % 2:
            row["response"] = f" {EVIL} {index} {style}"

    run = open_run(write_run(folder / "run", rows, change=change))
    results = folder / "results"
    results.mkdir()
    items = score_items(run)
    items.to_csv(results / "maths_items.csv", index=False)
    summary = paired_summary(items, "correct", interval="wilson")
    summary["minimum_detectable_difference_adjusted"] = summary["minimum_detectable_difference"]
    summary.to_csv(results / "maths_summary.csv", index=False)
    pd.DataFrame({"style": ["polite"], "layer": [EVIL]}).to_csv(results / "activation_diffs.csv", index=False)
    (results / "maths_accuracy.png").write_bytes(PNG)
    write_section(results, accuracy_section("maths", whole=True))
    write_section(results, Section("x", EVIL, 5, (), (TableOf("activation_diffs.csv", EVIL),)))
    (results / 'odd_"onerror=alert(1) x=".png').write_bytes(PNG)
    return run, results


@pytest.fixture(scope="module")
def page_text(made):
    run, results = made
    return build_report([(run, results)], results / "report.html").read_text(encoding="utf-8")


# --- the page


def test_nothing_a_model_or_file_wrote_becomes_a_tag(page_text):
    page = Page(page_text)
    assert page.tags.count("script") == 2  # the viewer's data and the report's own script
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert "b" not in page.tags
    assert page.tags.count("img") == 2  # the two plots, none of the prompts' own
    shown = "".join(page.text)
    assert EVIL in shown
    assert "<b>odd" in shown
    assert page_text.count(html.escape(EVIL, quote=False)[:20]) > 3


def test_the_page_is_self_contained(page_text):
    page = Page(page_text)
    links = [value for name, value in page.attributes if name in ("src", "href", "xlink:href", "srcset")]
    assert links
    assert all(value.startswith(("data:image/png;base64,", "#")) for value in links)
    assert "@import" not in page_text
    assert "link" not in page.tags
    plots = [value.partition(",")[2] for name, value in page.attributes if name == "src"]
    assert [pixels(base64.b64decode(plot)).tolist() for plot in plots] == [pixels(PNG).tolist()] * 2


def pixels(png):
    """[height, width, 3] of a PNG on white."""
    picture = Image.open(io.BytesIO(png)).convert("RGBA")
    return np.asarray(Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB"), int)


def test_a_picture_is_smaller_in_the_page_and_keeps_its_rare_colours(tmp_path):
    values = np.abs(np.random.default_rng(0).standard_normal((30, 9)))  # none is blue but in the colour bar
    save_layer_head_grid(tmp_path / "heads.png", [("swap", values, values > 2)] * 3, "change", "title")
    (tmp_path / "head_sensitivity_swap.png").write_bytes(PNG)
    (tmp_path / "heads.png").rename(tmp_path / "head_sensitivity.png")
    plots = (Plots("head_sensitivity.png", "Heads."), Plots("head_*.png", "More heads.", left_out=True))
    write_section(tmp_path, Section("heads", "Which heads?", 1, plots))
    (heading,) = headings_of(read_sections(tmp_path), tmp_path, [])
    assert [one.name for pictures in heading.pictures for one in pictures.several] == ["head_sensitivity.png"]
    assert heading.more == ["head_sensitivity_swap.png"]
    whole = (tmp_path / "head_sensitivity.png").read_bytes()
    reduced = base64.b64decode(heading.pictures[0].several[0].data)
    assert len(reduced) < len(whole) / 2
    assert np.abs(pixels(whole) - pixels(reduced)).max() < 24
    (tmp_path / "head_sensitivity.png").write_bytes(whole[:100])
    with pytest.raises(UserError, match=r"head_sensitivity\.png: cannot be read"):
        headings_of(read_sections(tmp_path), tmp_path, [])


def test_ten_pairs_are_shown_with_their_difference(made, page_text):
    run, _ = made
    assert page_text.count('<article class="pair">') == 10
    for side in re.findall(r'<div class="label">clean prompt</div><div class="text">(.*?)</div>', page_text, re.DOTALL):
        whole = html.unescape(re.sub(r"</?mark[^>]*>", "", side))
        assert any(row["normal"] == whole for row in run.prompt_rows)
    assert '<mark class="is">' in page_text
    assert '<mark class="was">' in page_text


def test_settings_and_counts_are_told(made, page_text):
    shown = " ".join("".join(Page(page_text).text).split())
    assert "72 prompts: 24 rows in 3 styles" in shown
    assert "Model: synthetic" in shown
    assert "schema_version" in shown


def test_the_table_holds_the_numbers_of_the_summary(made, page_text):
    _, results = made
    summary = pd.read_csv(results / "maths_summary.csv").set_index("style").loc["polite"]
    numbers = [f"{100 * summary[name]:.1f}" for name in ("estimate", "ci_low", "ci_high")]
    assert f"<td>{numbers[0]} [{numbers[1]}, {numbers[2]}]</td>" in page_text


def test_a_run_without_results_still_gives_a_report(made, tmp_path, capsys):
    run, _ = made
    (tmp_path / "empty").mkdir()
    assert main(["--run_dir", str(run.path), "--results_dir", str(tmp_path / "empty"), "--examples", "3"]) == 0
    path = capsys.readouterr().out.strip()
    text = (tmp_path / "empty" / "report.html").read_text(encoding="utf-8")
    assert path.endswith("report.html")
    assert text.count('<article class="pair">') == 3


def test_a_results_folder_that_is_not_there_is_an_error(made, tmp_path):
    run, _ = made
    (tmp_path / "results").mkdir()
    with pytest.raises(UserError, match=r"reslts: no such results folder; did you mean .*/results\?"):
        main(["--run_dir", str(run.path), "--results_dir", str(tmp_path / "reslts")])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results"]


def test_results_are_found_where_the_pipeline_writes_them(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "outputs" / "demo" / "maths", prompt_rows(4))
    (tmp_path / "results" / "demo" / "maths").mkdir(parents=True)
    assert main(["--run_dir", "outputs/demo/maths"]) == 0
    assert (tmp_path / "results" / "demo" / "maths" / "report.html").is_file()


def test_a_run_without_files_is_left_out_of_a_report_on_several(made, tmp_path, capsys):
    run, results = made
    (tmp_path / "empty").mkdir()
    words = ["--run_dir", str(run.path), str(tmp_path / "empty"), "--results_dir", str(results), str(tmp_path / "none")]
    assert main([*words, "--report", str(tmp_path / "r.html"), "--examples", "0"]) == 0
    assert "empty: holds no activations_*.pt" in capsys.readouterr().err
    assert (tmp_path / "r.html").read_text(encoding="utf-8").count('<section id="run-') == 1
    with pytest.raises(UserError, match="empty: holds no activations"):
        main(["--run_dir", str(tmp_path / "empty"), "--results_dir", str(tmp_path)])


def test_analyses_that_are_older_than_the_run_are_told(tmp_path, capsys):
    run = open_run(write_run(tmp_path / "run", prompt_rows(4)))
    results = tmp_path / "results"
    results.mkdir()
    for name in ("similarity_items.csv", "rewards_summary.csv", "prompt_findings.csv"):
        (results / name).write_text("style,n\nnormal,4\n")
    words = ["--run_dir", str(run.path), "--results_dir", str(results)]
    assert main(words) == 0
    assert "older than" not in capsys.readouterr().err + (results / "report.html").read_text(encoding="utf-8")
    os.utime(results / "similarity_items.csv", (1000, 1000))
    os.utime(results / "prompt_findings.csv", (1000, 1000))  # of the prompt file, not of the run
    assert main(words) == 0
    told = "1 of 2 tables (similarity_items.csv)"
    assert f"{told} are older than the run" in capsys.readouterr().err
    assert f"{told} were written before its newest .pt file" in (results / "report.html").read_text(encoding="utf-8")


def test_a_damaged_table_is_one_line(made, tmp_path):
    run, _ = made
    (tmp_path / "maths_summary.csv").write_bytes(b'style,n\n"broken,1\n2,3,4,5\n')
    with pytest.raises(UserError, match=r"maths_summary\.csv: cannot be read"):
        build_report([(run, tmp_path)], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_as_many_results_folders_as_runs(made):
    run, results = made
    with pytest.raises(UserError, match="1 run folders but 2 results folders"):
        main(["--run_dir", str(run.path), "--results_dir", str(results), str(results)])


# --- numbers


def test_intervals_as_text():
    assert Interval(0.5834, 0.457, 0.699).text(percent=True) == "58.3 [45.7, 69.9]"
    assert Interval(-0.05, -0.12, 0.02).text(percent=True, signed=True) == "−5.0 [−12.0, +2.0]"
    assert Interval(0.24, 0.2333, 0.2489).text() == "0.240 [0.233, 0.249]"
    assert Interval(0.001, 0.0002, 0.0018).text(signed=True) == "+0.0010 [+0.0002, +0.0018]"
    assert Interval(float("nan")).text() == "–"
    assert Interval(0.0).text(percent=True, signed=True) == "+0.0 [–]"
    assert Interval(-0.0001, -0.01, 0.01).text(percent=True, signed=True).startswith("+0.0 ")


def test_cells_as_text():
    assert format_cell("p", 0.0004) == "< 0.001"
    assert format_cell("p_adjusted", 1.0) == "1.000"
    assert format_cell("n", 1234) == "1,234"
    assert format_cell("layer", -3.0) == "−3"
    assert format_cell("cosine", 0.123456) == "0.123"
    assert format_cell("x", float("nan")) == "–"
    assert format_cell("word", "wa\u00adter") == "wa‧ter"


def test_every_estimate_stands_with_its_interval():
    frame = pd.DataFrame(
        {"style": ["a"], "estimate": [0.5], "ci_low": [0.4], "ci_high": [0.6], "frac_task": [0.2]}
        | {"frac_task_ci_low": [0.1], "frac_task_ci_high": [0.3], "difference": [0.1]}
        | {"difference_ci_low": [-0.1], "difference_ci_high": [0.3]}
    )
    merged = merge_intervals(frame)
    assert list(merged.columns) == ["style", "estimate", "frac_task", "difference"]
    assert merged.iloc[0].tolist() == ["a", "0.500 [0.400, 0.600]", "0.200 [0.100, 0.300]", "+0.100 [−0.100, +0.300]"]


def test_intervals_of_other_names_are_merged_too():
    line = {
        "auc": 0.9,
        "ci_low": 0.8,
        "ci_high": 1.0,
        "shuffled_auc": 0.5,
        "shuffled_ci_low": 0.4,
        "shuffled_ci_high": 0.6,
    }
    names = (("auc", "ci_low", "ci_high"), ("shuffled_auc", "shuffled_ci_low", "shuffled_ci_high"))
    merged = merge_intervals(pd.DataFrame([line]), names)
    assert merged.iloc[0].to_dict() == {"auc": "0.900 [0.800, 1.000]", "shuffled_auc": "0.500 [0.400, 0.600]"}


def test_long_tables_say_how_long_they_are():
    table = to_table(pd.DataFrame({"layer": range(1000)}), TableOf("x.csv", ""))
    assert (len(table.rows), table.total) == (MAX_ROWS, 1000)


def test_a_section_takes_the_first_rows_of_each_style(tmp_path):
    lines = [(style, measure, rank) for measure in ("jsd", "mass") for style in ("a", "b") for rank in range(5)]
    pd.DataFrame(lines, columns=["style", "measure", "rank"]).to_csv(tmp_path / "x.csv", index=False)
    table = rows_of(tmp_path, TableOf("x.csv", "", ("style", "rank"), (("measure", "mass"),), 2))
    assert table.rows == [["a", "0"], ["a", "1"], ["b", "0"], ["b", "1"]]
    assert table.total == 20
    assert rows_of(tmp_path, TableOf("x.csv", "", only=(("measure", "none"),))) is None


ON_TASK = Headline("on task", "a share", ("fractions.csv",), "frac_task", "frac_task_ci_low", "frac_task_ci_high")


def test_the_table_of_all_styles_leaves_out_what_is_unknown(tmp_path):
    attention = {"style": ["normal"], "frac_task": [0.25], "frac_task_ci_low": [0.2], "frac_task_ci_high": [0.3]}
    pd.DataFrame(attention).to_csv(tmp_path / "fractions.csv", index=False)
    table = overview({"normal": 60, "swap": 59}, [ON_TASK, replace(ON_TASK, sources=("none.csv",))], tmp_path)
    assert table.columns == ["style", "n", "on task"]
    assert table.lines == [["normal", "60", "0.250 [0.200, 0.300]"], ["swap", "59", "–"]]
    assert table.notes == ["n: prompts run", "a share"]


def test_whiskers_lie_where_the_numbers_are():
    numbers = [(-0.1, -0.2, 0.0), (0.1, 0.05, 0.15), (0.0,), (float("nan"),)]
    drawn, reach = whiskers([Interval(*one) for one in numbers])
    assert reach == pytest.approx(0.2)
    assert drawn[2] is drawn[3] is None
    assert (drawn[0].low, drawn[0].middle, drawn[0].high) == pytest.approx((2, 26, 50))
    assert drawn[1].middle - 50 == pytest.approx(24)


def test_a_picture_of_each_style_is_picked_by_its_name_the_worst_first(made, tmp_path):
    run, _ = made
    for style in ("typo_1", "typo_2", "other"):
        (tmp_path / f"heads_{style}.png").write_bytes(PNG)
    write_section(tmp_path, Section("heads", "Heads?", 1, (Plots("heads_*.png", "Heads."),)), ["typo@1", "typo@2"])
    (heading,) = headings_of(read_sections(tmp_path), tmp_path, ["typo@2", "typo@1"])
    assert [one.label for one in heading.pictures[0].several] == ["typo@2", "typo@1", "other"]
    text = build_report([(run, tmp_path)], tmp_path / "r.html").read_text(encoding="utf-8")
    assert Page(text).tags.count("input") == 3
    assert text.count(" checked>") == 1


def test_a_sentence_leads_to_its_section(made, tmp_path):
    run, results = made
    text = build_report([(run, results)], tmp_path / "r.html").read_text(encoding="utf-8")
    lines = re.findall(r'<p class="(claim|open)">(.*?)<a href="#(.*?)">', text)
    assert lines
    assert text.count("<h4>Do the answers get worse?</h4>") == 1
    assert lines[0][2] == "run-1-are-the-answers-right"
    assert 'id="run-1-are-the-answers-right"' in text


# --- differences and choice


@pytest.mark.parametrize(
    ("clean", "other"),
    [
        ("What is 2 + 2?", "Waht is 2 + 2?"),
        ("", "all new"),
        ("same", "same"),
        ("a  b", "a b"),
        ("naïve 🙂 x", "naive 🙂 x"),
    ],
)
def test_pieces_joined_are_the_texts(clean, other):
    left, right = word_difference(clean, other)
    assert "".join(text for text, _ in left) == clean
    assert "".join(text for text, _ in right) == other
    assert "".join(t for t, changed in left if not changed) == "".join(t for t, changed in right if not changed)


def test_only_the_changed_words_are_marked():
    left, right = word_difference("Count the apples: 2 + 3 =", "Count the appels: 2 + 3 =")
    assert [text for text, changed in left if changed] == ["apples"]
    assert [text for text, changed in right if changed] == ["appels"]
    assert [t for t, changed in word_difference("water", "wa\u00adter")[1] if changed] == ["wa‧ter"]


def test_examples_are_drawn_evenly_and_again_the_same():
    indices = {"normal": list(range(50)), "swap": list(range(50)), "two": list(range(10))}
    verdicts = {(style, row): "right" for style in indices for row in indices[style]} | {("swap", 7): "wrong"}
    chosen = pick_examples(indices, "normal", verdicts, 10, seed=3)
    assert chosen == pick_examples(indices, "normal", verdicts, 10, seed=3)
    assert chosen[0] == ("swap", 7, CHANGED)
    assert len({pair[:2] for pair in chosen}) == 10
    assert sum(why == ANY for *_, why in chosen) == 9
    assert sum(style == "two" for style, *_ in chosen) in (4, 5)


def test_settings_that_differ_between_styles_are_told_apart(tmp_path):
    run = open_run(write_run(tmp_path / "run", prompt_rows(4, ["swap"])))
    path = run.styles["swap"] / "run.json"
    stored = json.loads(path.read_text())
    stored["settings"]["seed"] = 99
    path.write_text(json.dumps(stored))
    (tmp_path / "results").mkdir()
    text = build_report([(run, tmp_path / "results")], tmp_path / "r.html", examples=0).read_text(encoding="utf-8")
    assert "<dt>seed</dt><dd>0; for swap: 99</dd>" in text


def test_the_first_rows_of_each_style_by_a_column_and_of_the_preferred_kind(tmp_path):
    pd.DataFrame(
        [("b", "split@b", 1, 2.0), ("b", "split@b", 2, 1.0), ("b", "split@b", 3, np.nan), ("a", "split@a", 4, 3.0),
         ("a", "split@a", 5, 1.0), ("c", "split", 6, 1.0), ("d", None, 7, np.nan)],
        columns=["style", "control", "head", "rank_vs_control"],
    ).to_csv(tmp_path / "heads.csv", index=False)  # fmt: skip
    wanted = TableOf("heads.csv", "", ("style", "head"), (), 1, "rank_vs_control", ("control", ("split@",)))
    assert [row[:2] for row in rows_of(tmp_path, wanted).rows] == [["b", "2"], ["a", "5"]]
    pd.DataFrame({"style": ["c"], "control": ["split"], "rank_vs_control": [1.0]}).to_csv(tmp_path / "heads.csv")
    assert len(rows_of(tmp_path, wanted).rows) == 1
    pd.DataFrame({"style": ["c"]}).to_csv(tmp_path / "heads.csv")
    assert rows_of(tmp_path, wanted) is None


def test_a_control_is_shown_with_bars_where_it_is_cut_and_an_invisible_character_as_a_dot():
    assert with_cuts("La\u00adho", "split@swap") == "La|ho"
    assert visible(with_cuts("La\u00adho", "split")) == "La\u2027ho"


def test_columns_and_measures_have_plain_names_and_keep_that_of_the_file():
    frame = pd.DataFrame({"measure": ["pss"], "n_clusters": [3]})
    table = to_table(frame, TableOf("x.csv", ""))
    assert table.names == ["measure", "n_clusters"]
    assert (table.columns, table.rows) == (["measure", "groups"], [["sensitivity, pss (ProSA)", "3"]])


def test_one_prompt_in_its_forms_is_at_the_top(tmp_path):
    rows = prompt_rows(12, ["swap", "polite"])

    def change(row, style, index):
        if style == "swap" and index == 7:
            row["response"] = " wrong"

    run = open_run(write_run(tmp_path / "run", rows, change=change))
    indices = {style: list(range(12)) for style in run.styles}
    verdicts = {(style, row): "right" for style in run.styles for row in range(12)} | {("swap", 7): "wrong"}
    (one,) = forms_of_one_prompt(run, indices, ["swap", "polite"], verdicts)
    assert (one.style, one.style_verdict) == ("swap", "wrong")
    assert "".join(text for text, _ in one.style_prompt) == rows[7]["swap"]
    assert any(differs for _, differs in one.style_prompt)
    assert forms_of_one_prompt(run, {"normal": indices["normal"]}, [], {}) == []
    (tmp_path / "results").mkdir()
    text = build_report([(run, tmp_path / "results")], tmp_path / "r.html").read_text(encoding="utf-8")
    assert "<dt>swap</dt><dd>two adjacent letters exchanged</dd>" in text
    assert "<dt>missing</dt>" not in text
    assert text.count('<table class="forms">') == 1
