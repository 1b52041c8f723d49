"""The linter finds what was broken on purpose, nothing in a sound file, and mends only what is safe to mend."""

from __future__ import annotations

import csv
import json
import random
import re
from pathlib import Path

import check_prompts
import pytest
from check_prompts import main
from command_line import UserError
from load_json import STYLES
from typos.checks import WARNINGS, check_rows, fix_rows, read_rows
from typos.style_rules import verify_variant
from typos.variants import make_variants

PROMPTS = [
    "Work out the sum of 12 and 7, then write the answer down: 12 + 7 =",
    "Explain in simple words how plants turn sunlight into sugar, and why they need water for this process.",
    "Compare some ways to heat a small house in winter. Which one is the cheapest, and which is the cleanest?",
    "You are a patient teacher. Describe the water cycle to children who have never heard of it before.",
]


def sound_rows() -> list[dict]:
    rows = [{"element_index": i, "normal": prompt, "answer": "x"} for i, prompt in enumerate(PROMPTS, 1)]
    rows[0]["task"] = "12 + 7"
    made, _, summary = make_variants(rows)
    assert all(counts["made"] == len(rows) for counts in summary["styles"].values())
    return made


def kinds(rows: list, **options) -> set[tuple[str, str]]:
    return {(finding.kind, finding.style) for finding in check_rows(rows, **options)}


def test_a_sound_file_has_no_finding():
    assert check_rows(sound_rows()) == []


@pytest.mark.parametrize("intensity", [2, 3])
def test_intensity_has_to_be_told(intensity):
    long = [{"normal": " ".join(PROMPTS[1:])}]
    rows, _, _ = make_variants(long, ["main", "swap", "punctuation", "grammar", "split"], intensity=intensity)
    assert check_rows(rows, intensity) == []
    assert {kind for kind, _ in kinds(rows)} == {"edit_count"}


def replaced(style: str, old: str, new: str):
    """A fault: the variant is the clean prompt with `old` replaced once by `new`."""

    def change(rows):
        assert old in rows[1]["normal"]
        rows[1][style] = rows[1]["normal"].replace(old, new, 1)

    return change


def set_key(index, key, value):
    return lambda rows: rows[index].__setitem__(key, value)


FAULTS = [
    (replaced("main", "x", "x"), "no_op", "main", True),
    (replaced("main", "sunlight", "sunligth"), "wrong_edit", "main", True),
    (replaced("swap", "sunlight", "sunlihgt why"), "edit_count", "swap", True),
    (replaced("missing", "plants", "pants"), "accidental_real_word", "missing", True),
    (replaced("two", "sunlight", "sunligth"), "edit_count", "two", True),
    (replaced("three", "plants turn", "plnats trun"), "edit_count", "three", True),
    (replaced("main", "sunlight", "sxnlixht"), "wrong_edit", "main", True),
    (replaced("real_word", "sugar", "sugat"), "wrong_edit", "real_word", True),
    (replaced("noise_words", "sunlight", "sunligth"), "wrong_edit", "noise_words", True),
    (replaced("homonym", "water", "waiter"), "false_homophone", "homonym", True),
    (replaced("grammar", "plants turn", "plants turns turned into"), "edit_count", "grammar", True),
    (replaced("punctuation", "sugar,", "sugr"), "wrong_edit", "punctuation", True),
    (replaced("punctuation", "in simple", "insimple?!"), "edit_count", "punctuation", True),
    (replaced("split", "sunlight", "sun light"), "wrong_edit", "split", True),
    (replaced("split", "sunlight", "s\u00adun\u00adlight"), "edit_count", "split", True),
    (replaced("polite", "simple", "easy"), "request_changed", "polite", False),
    (replaced("urgent", "Explain", "Now: Explain"), "task_split", "urgent", False),
    (set_key(0, "main", PROMPTS[0].replace("12 + 7", "12 - 7")), "changed_numbers", "main", True),
    (set_key(0, "main", PROMPTS[0].replace("12 + 7", "13 + 7")), "changed_numbers", "main", True),
    (set_key(0, "mine", PROMPTS[0].replace("7", "9") + "!"), "changed_numbers", "mine", True),
    (set_key(0, "mine", PROMPTS[0].replace("of 12 and 7", "of 12 x 7")), "changed_numbers", "mine", True),
    (set_key(0, "grammar", PROMPTS[0].replace("sum", "difference")), "changed_protected", "grammar", True),
    (set_key(0, "task", "12 + 8"), "task_not_in_prompt", "normal", False),
    (set_key(2, "main", None), "missing_style", "main", False),
    (set_key(2, "main", ["a"]), "wrong_type", "main", True),
    (set_key(2, "main", "  "), "empty_prompt", "main", True),
    (set_key(2, "main", "a\ud800"), "surrogate", "main", True),
    (set_key(2, "answer", float("nan")), "wrong_type", "answer", False),
    (set_key(2, "answer", {"a": 1}), "wrong_type", "answer", False),
    (set_key(2, "answer", ["Paris", 3]), "wrong_type", "answer", False),
    (set_key(2, "answer", ["Paris", " "]), "wrong_type", "answer", False),
    (set_key(2, "answer", []), "wrong_type", "answer", False),
    (set_key(2, "task", 3), "wrong_type", "task", False),
    (set_key(2, "element_index", 2.5), "wrong_type", "element_index", False),
    (set_key(2, "element_index", " "), "wrong_type", "element_index", False),
    (set_key(2, "element_index", "two"), "mixed_ids", "element_index", False),
    (set_key(2, "element_index", "2"), "duplicate_id", "element_index", False),
    (lambda rows: [row.update(element_index="q") for row in rows], "duplicate_id", "element_index", False),
    (lambda rows: [row.update({"typo/1": row["main"] + "!"}) for row in rows], "bad_key", "typo/1", False),
    (
        lambda rows: [row.update({"t1": row["main"] + "!", "T1": row["main"] + "?"}) for row in rows],
        "bad_key",
        "T1",
        False,
    ),
    (set_key(2, "element_index", 1), "duplicate_id", "element_index", False),
    (set_key(2, "normal", 7), "wrong_type", "normal", True),
    (lambda rows: rows[2].pop("normal"), "no_clean_prompt", "", True),
    (lambda rows: rows.append("text"), "wrong_type", "", True),
    (lambda rows: rows.append({**rows[0], "element_index": 77}), "duplicate_prompt", "normal", True),
    (lambda rows: rows.append({"normal": PROMPTS[0]}), "duplicate_prompt", "normal", False),
    (lambda rows: rows[3].update(mine=rows[3]["main"]), "duplicate_variant", "mine", True),
    (lambda rows: rows[3].update({"homo,nym": rows[3].pop("homonym")}), "misspelled_key", "homo,nym", True),
    (lambda rows: rows[3].update({"homynom": rows[3].pop("homonym")}), "misspelled_key", "homynom", True),
    (lambda rows: rows[3].update({"tow": rows[3].pop("two")}), "misspelled_key", "tow", True),
    (lambda rows: rows[3].update({"Main": rows[3].pop("main")}), "misspelled_key", "Main", True),
    (lambda rows: rows[3].update({"punctutation": rows[3]["normal"] + "!!"}), "misspelled_key", "punctutation", False),
    (lambda rows: rows[3].update({"Answer": rows[3].pop("answer")}), "misspelled_key", "Answer", True),
]


@pytest.mark.parametrize(("break_it", "kind", "key", "mendable"), FAULTS)
def test_a_fault_put_in_is_found_and_mended_where_that_is_safe(break_it, kind, key, mendable):
    rows = sound_rows()
    break_it(rows)
    assert (kind, key) in kinds(rows)
    fixed, _ = fix_rows(rows)
    assert ((kind, key) not in kinds(fixed)) == mendable
    errors = {f.kind for f in check_rows(fixed) if f.severity == "error"}
    kind = "" if kind in WARNINGS else kind
    assert errors <= ({kind} if not mendable else set())


def test_what_is_dropped_is_the_faulty_variant_alone():
    rows = sound_rows()
    rows[1]["missing"] = rows[1]["normal"].replace("plants", "pants")
    fixed, done = fix_rows(rows)
    expected = sound_rows()
    del expected[1]["missing"]
    assert fixed == expected
    assert {what: number for what, number in done.items() if number} == {"variants dropped": 1}


def test_a_renamed_key_is_checked_under_its_new_name():
    rows = sound_rows()
    rows[0]["homo,nym"] = rows[0]["normal"]
    del rows[0]["homonym"]
    fixed, done = fix_rows(rows)
    assert done["keys renamed"] == 1
    assert "homonym" not in fixed[0]
    assert "homo,nym" not in fixed[0]


def test_dropping_a_row_renumbers_nobody():
    rows = [{key: value for key, value in row.items() if key != "element_index"} for row in sound_rows()]
    fixed, _ = fix_rows([rows[0], 5, *rows[1:]])
    assert [row["element_index"] for row in fixed] == [1, 3, 4, 5]


def test_own_styles_and_free_rewordings_are_held_to_less():
    rows = sound_rows()
    rows[1]["pirate"] = "Arr, tell me how plants be makin' sugar!"
    rows[1]["other"] = "How do 2 plants make sugar?"
    rows[1]["main_2"] = "Another draw, by a name with a number"
    assert {f.kind for f in check_rows(rows)} == {"missing_style"}


@pytest.mark.parametrize(
    ("polite", "errors"),
    [
        ("Kindly tell me in one sentence what seven plus five makes.", set()),
        ("Kindly tell me what seven plus six makes.", {"changed_numbers"}),
        ("Kindly tell me what seven minus five makes.", {"changed_numbers"}),
    ],
)
def test_a_reworded_framing_keeps_number_words(polite, errors):
    found = check_rows([{"normal": "What does seven plus five make?", "polite": polite}])
    assert {f.kind for f in found if f.severity == "error"} == errors
    assert "request_changed" in {f.kind for f in found}


def test_a_key_that_differs_from_a_frequent_one_is_a_slip():
    rows = [{"normal": f"prompt number {i}", "pirate": f"Arr {i}"} for i in range(40)]
    rows[7]["pirrate"] = rows[7].pop("pirate")
    assert ("misspelled_key", "pirrate") in kinds(rows)
    assert ("misspelled_key", "pirate") not in kinds(rows)


def test_missing_styles_are_told_with_their_number():
    rows = sound_rows()
    del rows[0]["main"], rows[1]["main"]
    (finding,) = check_rows(rows)
    assert (finding.kind, finding.style, finding.severity) == ("missing_style", "main", "warning")
    assert finding.detail == "2 of 4 rows lack it"
    assert ("missing_style", "other") in kinds(rows, styles=["other"])


@pytest.mark.parametrize("key", ["mine", "main"])
def test_a_variant_that_differs_in_normalisation_alone_is_a_warning(key):
    (finding,) = check_rows([{"normal": "Café menus please", key: "Cafe\u0301 menus please"}])
    assert (finding.kind, finding.style, finding.severity) == ("no_op_unicode", key, "warning")
    assert check_rows([{"normal": "Café menus please", "mine": "Cafe menus please"}]) == []


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (["3", "17", "2.5%"], "numbers"),
        ([5, 6, 7.5], "numbers"),
        (["2024-03-09", "2024-03-10", "1/2/2020"], "numbers"),
        (["https://a.org/x?y=1", "http://b.com", "www.c.de"], "addresses"),
        (["gsm8k-17", "gsm8k-18", "q_3"], "ids"),
        (["550e8400-e29b-41d4-a716-446655440000", "a1b2c3", "ff00aa11"], "ids"),
        (["positive", "negative"] * 10, "a few labels"),
        (["very good"] * 9, "a few labels"),
    ],
)
def test_a_column_of_data_is_told_and_not_checked_as_prompts(values, kind):
    rows = [{"normal": f"Please explain thing number {i}", "mine": value} for i, value in enumerate(values)]
    (finding,) = check_rows(rows)
    assert (finding.kind, finding.style, finding.severity) == ("looks_like_data", "mine", "warning")
    assert finding.detail.startswith(f"holds {kind}, not prompts")


@pytest.mark.parametrize(
    "values",
    [
        ["Say it now", "Tell it now", "Show it now"] * 5,
        ["12 + 7 =", "3 * 4", "5 - 2 ="],
        ["Explain https://a.org", "See http://b.com now"],
        ["Is it 5?", "Is it 6?"],
        ["yes", "no", "perhaps"],
    ],
)
def test_short_prompts_are_no_data(values):
    rows = [{"normal": f"Please say it: {text}", "mine": f"{text} {i}"} for i, text in enumerate(values)]
    assert "looks_like_data" not in {f.kind for f in check_rows(rows)}


def test_styles_that_are_not_run_are_not_checked(tmp_path, capsys):
    rows = sound_rows()
    rows[0]["main"] = rows[0]["normal"]
    rows[1]["typo/1"] = rows[1]["main"]
    rows[2]["url"] = "https://a.org"
    rows[3]["homynom"] = rows[3].pop("homonym")
    source = write(tmp_path / "p.json", json.dumps(rows))
    for styles, found in (
        (["normal", "swap", "split@swap"], set()),
        (["swap", "main"], {("no_op", "main")}),
        (["homonym"], {("misspelled_key", "homynom"), ("missing_style", "homonym")}),
        (
            ["all"],
            {("no_op", "main"), ("bad_key", "typo/1"), ("looks_like_data", "url"), ("misspelled_key", "homynom")},
        ),
    ):
        expected = {kind for kind, _ in found if kind not in WARNINGS}
        assert main(["--prompt_file", source, "--styles", *styles]) == bool(expected)
        assert found <= kinds(rows, styles=styles)
        told = capsys.readouterr().out
        assert ("no finding" in told) == (not found)
        assert all(kind in told for kind, _ in found)


def test_json_lines_are_checked_too(tmp_path, capsys):
    rows = sound_rows()
    rows[1]["main"] = None
    source = write(tmp_path / "p.jsonl", "\n".join([*map(json.dumps, rows), '{"normal": ']))
    assert main(["--prompt_file", source]) == 1
    told = capsys.readouterr().out
    assert "not_json" in told
    assert "1 of 4 rows lack it" in told
    assert main(["--prompt_file", source, "--fix", str(tmp_path / "new.json")]) == 0
    assert len(json.loads((tmp_path / "new.json").read_text())) == 4


def test_random_damage_to_digits_never_passes():
    rng = random.Random(5)
    rows = sound_rows()
    for _ in range(300):
        style = rng.choice([s for s in STYLES if s not in ("polite", "urgent", "rude")])
        text = rows[0][style]
        at = rng.choice([m.start() for m in re.finditer(r"[\d+=]", text)])
        damaged = rng.choice([text[:at] + text[at + 1 :], text[:at] + rng.choice("0123456789*-") + text[at:]])
        assert verify_variant(PROMPTS[0], damaged, style, rows[0]), (style, damaged)


def test_a_list_of_accepted_answers_is_no_fault():
    rows = sound_rows()
    rows[2]["answer"] = ["Paris", "Paname"]
    assert check_rows(rows) == []


def test_protected_text_that_is_lost_at_the_end_is_found_whatever_it_says():
    row = {"normal": "Please explain why they said nothing", "answer": "nothing"}
    assert ("changed_protected", "main") in kinds([{**row, "main": "Please explain why they said nothinh"}])


# --- as a command


def write(path, text) -> str:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def test_command_on_a_sound_file(tmp_path, capsys):
    assert main(["--prompt_file", write(tmp_path / "p.json", json.dumps(sound_rows()))]) == 0
    assert capsys.readouterr().out == "4 rows: no finding\n"


def test_command_with_table_csv_and_fix(tmp_path, capsys):
    rows = sound_rows()
    rows[0]["main"] = rows[0]["normal"]
    rows[2]["homo,nym"] = rows[2].pop("homonym")
    source = write(tmp_path / "p.json", json.dumps(rows))
    found, mended = tmp_path / "found.csv", tmp_path / "new.json"
    assert main(["--prompt_file", source, "--output_csv", str(found)]) == 1
    told = capsys.readouterr().out
    assert "no_op" in told
    assert "4 rows: 2 errors, 1 warnings" in told
    with open(found, encoding="utf-8", newline="") as table:
        lines = list(csv.DictReader(table))
    assert [(e["style"], e["original_index"], e["element_index"], e["kind"]) for e in lines][:2] == [
        ("main", "0", "1", "no_op"),
        ("homo,nym", "2", "3", "misspelled_key"),
    ]
    assert main(["--prompt_file", source, "--fix", str(mended)]) == 0
    assert "1 variants dropped, 1 keys renamed" in capsys.readouterr().err
    assert main(["--prompt_file", str(mended)]) == 0
    assert json.loads((tmp_path / "p.json").read_text()) == rows  # the given file stays as it was


def test_a_key_given_twice_is_found_and_the_ambiguous_one_goes(tmp_path):
    text = '[{"normal": "CLEAN", "main": "a", "main": "b", "answer": 1, "answer": 1}]'.replace("CLEAN", PROMPTS[1])
    rows = read_rows(write(tmp_path / "p.json", text))
    assert {("duplicate_key", "main"), ("duplicate_key", "answer")} <= kinds(rows)
    fixed, _ = fix_rows(rows)
    assert fixed == [{"normal": PROMPTS[1], "answer": 1}]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "the file is empty"),
        ("[{]", "not JSON"),
        ("5", "expected a list of objects"),
        ("[]", "the list is empty"),
        (b"\xff\xfe[", "not UTF-8 (byte 0)"),
        ("[" * 100_000, "nested"),
        ("[" * 60 + "]" * 60, "nested deeper than 50"),
        ("[" + "9" * 5000 + "]", "not usable JSON"),
    ],
)
def test_a_file_that_is_no_prompt_file_is_told_in_one_line(tmp_path, content, told):
    with pytest.raises(UserError, match=re.escape(told)) as raised:
        main(["--prompt_file", write(tmp_path / "p.json", content)])
    assert "\n" not in str(raised.value)


def test_the_given_file_is_not_overwritten_and_options_are_checked(tmp_path):
    source = write(tmp_path / "p.json", json.dumps(sound_rows()))
    with pytest.raises(UserError, match="give --fix a new file"):
        main(["--prompt_file", source, "--fix", source])
    with pytest.raises(UserError, match="give --output_csv a new file"):
        main(["--prompt_file", source, "--output_csv", source])
    with pytest.raises(UserError, match="--intensity"):
        main(["--prompt_file", source, "--intensity", "0"])
    with pytest.raises(UserError, match="no such file"):
        main(["--prompt_file", str(tmp_path / "none.json")])


def test_the_documentation_lists_every_kind():
    root = Path(check_prompts.__file__).parents[2]
    text = (root / "docs" / "DATA_FORMAT.md").read_text(encoding="utf-8")
    errors, warnings = text.split("| error | what |")[1].split("| warning | what |")
    rows = [re.findall(r"^\| ([a-z_, ]+) \|", part, re.MULTILINE) for part in (errors, warnings.split("\n\n")[0])]
    listed = [set(re.findall(r"\w+", " ".join(row))) for row in rows]
    modules = [root / "0_data" / "typos" / name for name in ("checks.py", "style_rules.py")]
    source = "".join(path.read_text(encoding="utf-8") for path in modules)
    found = set(re.findall(r'(?:Finding\(|yield |append\(\(|\[\()\s*"([a-z_]+)"', source))
    assert listed[1] == WARNINGS
    assert listed[0] == found - WARNINGS
