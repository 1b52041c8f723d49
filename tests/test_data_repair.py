"""Repairs of prompts: which words a spell checker or a model may change, what they put right, what the linter holds."""

from __future__ import annotations

import json
import random
import re
import unicodedata
from pathlib import Path
from typing import Any

import make_variants
import pytest
import repair_prompts
import test_data_fuzz
from command_line import UserError
from file_output import read_csv
from load_json import parse_rows, read_prompt_file, style_problem
from local_openai_server import LocalOpenAIServer, Messages
from spellchecker import SpellChecker
from typos.checks import check_rows
from typos.repairs import correct_words, corrector, count_repairs, repair_by_spelling, summary_lines, to_repair
from typos.style_rules import spans_to_keep, verify_repair

DATA = Path(__file__).parents[1] / "0_data"
FACT = {
    "element_index": 3, "normal": "The capital of Jordan is the city of", "answer": "Amman", "task": "Jordan",
    "_where": "subject", "swap": "The capital of Jodran is the city of",
    "typo@2": "The capital of Jodrann is the city of",
    "polite": "Please be so kind. The capital of Jordan is the city of",
}  # fmt: skip
SUM = {
    "element_index": "b", "normal": "Find the price of the apples: 12 + 30 =", "answer": "42",
    "swap": "Find the prcie of the apples: 12 + 30 =",
}  # fmt: skip


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("Gremany", "Germany"),
        ("gremany", "germany"),
        ("gasoolnie", "gasoline"),  # two edits away
        ("price", "price"),
        ("doesn't", "doesn't"),
        ("doens’t", "doesn’t"),
        ("Gremany's", "Germany's"),
        ("xqzvkwjx", "xqzvkwjx"),  # no word is near
        ("Москва", "Москва"),  # no letter of the list
    ],
)
def test_a_word_becomes_the_most_frequent_word_that_is_near(word, expected):
    assert corrector("en")(word) == expected


@pytest.mark.parametrize(
    ("code", "text", "expected"),
    [
        ("de", "Das Haus ist gorß.", "Das Haus ist groß."),
        ("fr", "L’écoel de l'Espangne s'appelle", "L’école de l'Espagne s'appelle"),  # elisions are in no list
        ("it", "La capitale dell'Itlaia", "La capitale dell'Italia"),
    ],
)
@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_another_language_has_its_own_words(code, text, expected, form):
    text, expected = (unicodedata.normalize(form, one) for one in (text, expected))
    assert correct_words(text, [], corrector(code)) == expected


def test_each_row_is_corrected_in_its_own_language(tmp_path, caplog):
    texts = {"de": ("gorß", "groß"), "fr": ("maisno", "maison"), None: ("hosue", "house"), "el": ("σπίτιι", None)}
    rows = [
        {"normal": "x", "swap": f"{typo}!", **({"_language": code} if code else {})}
        for code, (typo, _) in texts.items()
    ]
    code, made = run_script(tmp_path, rows, "--styles", "swap")
    assert code == 0
    expected = [word and f"{word}!" for _, word in texts.values()]
    assert [row.get("repaired@swap") for row in made] == expected
    assert "1 prompts are not corrected: no word list of Greek" in caplog.text
    _, made = run_script(tmp_path, [{"normal": "x", "swap": "gorß!"}], "--language", "de")
    assert made == [{"normal": "x", "swap": "gorß!", "_language": "de", "repaired@swap": "groß!"}]


@pytest.mark.parametrize("word", ["perty", "tehns"])
def test_words_at_distance_two_are_those_of_the_library(word):
    library = SpellChecker(distance=2)
    found = library.candidates(word)
    assert found is not None
    assert library[corrector("en")(word)] == max(library[other] for other in found)


# --- what stays


def test_what_is_no_plain_word_stays():
    text = 'See https://exmaple.org/prcie and `prcie`, NASAA, iPohne, x1prcie, "prcie", pri\u00adcee, {prcie} A b.'
    row = {"normal": text}
    assert correct_words(text, spans_to_keep(text, row), corrector("en")) == text


def changed_words(text: str, row: dict[str, Any]) -> str:
    """`text` after a corrector that spoils every word it is given."""
    return correct_words(text, spans_to_keep(text, row), lambda word: "zz")


@pytest.mark.parametrize("name", ["maths", "instructions", "facts"])
def test_no_corrector_touches_protected_text(name):
    """Whatever is put in the place of the words, all else is there, in order, and nothing between it is protected."""
    rows = random.Random(1).sample(read_prompt_file(DATA / f"{name}.json").rows, 25)
    styles = ["swap", "three", "grammar", "punctuation", "typo@2"]
    seen = 0
    for _, row, style in to_repair(rows, styles):
        text, kept = row[style], [row[style][a:b] for a, b in spans_to_keep(row[style], row)]
        changed = changed_words(text, row)
        assert re.fullmatch("(?s).*?" + ".*?".join(map(re.escape, [*kept, ""])), changed)
        assert re.findall(r"\d+", text) == re.findall(r"\d+", changed)
        own_words = "zz" if name == "facts" else row.get("task", "")  # typos lie in the task of a fact
        assert own_words in changed
        repaired = correct_words(text, spans_to_keep(text, row), corrector("en"))
        assert verify_repair(text, repaired, row) == []
        seen += bool(kept) and changed != text
    assert seen > 20 or name == "facts"


def test_a_repair_does_not_see_the_clean_text():
    other = {**FACT, "normal": "What is 1 + 1?", "task": "Peru", "_template": "x", "polite": "Hello"}
    first, second = repair_by_spelling([FACT, other], ["swap", "typo@2"])
    for style in ("repaired@swap", "repaired@typo@2"):
        assert first[style] == second[style]


def test_a_task_that_is_part_of_a_typo_protects_nothing():
    row = {"normal": "Describe Germany now", "task": "Germany", "missing": "Describe Germanyy now"}
    assert repair_by_spelling([row], ["missing"])[0]["repaired@missing"] == "Describe Germany now"
    row = {"normal": "Count: the prcie", "task": "the prcie", "swap": "Cuont: the prcie"}
    assert repair_by_spelling([row], ["swap"])[0]["repaired@swap"].endswith(": the prcie")


# --- the count


def counted(clean: str, style: str, repaired: str) -> list[tuple[str, str, str, str]]:
    table = count_repairs([{"normal": clean, "swap": style, "repaired@swap": repaired}], ["swap"])
    return list(table[["clean_word", "typo", "repaired", "outcome"]].itertuples(index=False, name=None))


def test_words_are_counted_against_the_clean_text():
    clean, style = "The colour of silver and of lemons is dull", "The colour of silve and of lemnos is dul"
    assert counted(clean, style, "The color of solve and of lemnos is dull") == [
        ("colour", "colour", "color", "spoilt"),
        ("silver", "silve", "solve", "changed"),
        ("lemons", "lemnos", "lemnos", "left"),
        ("dull", "dul", "dull", "put_right"),
    ]


def test_words_added_or_left_out_are_counted_too():
    assert counted("See the cat", "See the the cat", "See the cat") == [("", "the", "", "put_right")]
    assert counted("See the cat", "See the cat", "See the cat now") == [("", "", "now", "spoilt")]
    assert counted("See the cat", "See cat", "See a cat") == [("the", "", "a", "changed")]
    assert counted("See the cat", "See the cat", "See the cat") == []
    assert [line[-1] for line in counted("Yes, we do", "Yes , we do", "Yes, we do")] == ["put_right"]


def test_many_added_words_are_counted_quickly():
    assert counted("See", "See" + " x" * 30_000, "See") == [("", " ".join("x" * 30_000), "", "put_right")]


# --- the script


def run_script(folder: Path, rows: list[Any], *flags: str) -> tuple[int, list[Any]]:
    source, output = folder / "prompts.json", folder / "out.json"
    source.write_text(json.dumps(rows), encoding="utf-8")
    code = repair_prompts.main(["--prompt_file", str(source), "--output_file", str(output), *flags])
    return code, json.loads(output.read_text(encoding="utf-8"))


def test_the_script_repairs_typo_styles_and_doses_alone(tmp_path):
    bad = [7, {"normal": "See this", "swap": 3}, {"swap": "See tihs"}]
    code, rows = run_script(tmp_path, [FACT, SUM, *bad])
    assert code == 0
    assert rows[0] == FACT | {"repaired@swap": FACT["normal"], "repaired@typo@2": FACT["normal"]}
    assert rows[1] == SUM | {"repaired@swap": SUM["normal"]}
    assert rows[2:] == bad
    table = read_csv(tmp_path / "out_repairs.csv")
    assert table["style"].tolist() == ["swap", "typo@2", "swap"]
    assert table["element_index"].tolist() == ["3", "3", "b"]
    assert set(table["outcome"]) == {"put_right"}
    findings = check_rows(rows[:2])
    assert {finding.kind for finding in findings} == {"missing_style", "mixed_ids"}


def test_a_prompt_without_a_mistake_has_its_repair_too(tmp_path):
    _, rows = run_script(tmp_path, [SUM | {"repaired@normal": "old"}], "--styles", "normal")
    assert rows == [SUM | {"repaired@normal": SUM["normal"]}]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--styles", "swp"], "did you mean swap"),
        (["--styles", "repaired@swap"], "repaired already"),
        (["--method", "model"], "--model_name"),
        (["--model_name", "m"], "--method model"),
        (["--language", "klingon"], "choose from"),
    ],
)
def test_errors_are_told(tmp_path, flags, told):
    with pytest.raises(UserError, match=told):
        run_script(tmp_path, [SUM | {"repaired@swap": "x"}], *flags)


def test_a_file_without_typos_is_told(tmp_path):
    with pytest.raises(UserError, match="no row has a typo style"):
        run_script(tmp_path, [{"normal": "See this", "polite": "Please see this"}])


def test_most_one_letter_typos_of_the_generator_are_put_right(tmp_path):
    _, rows = run_script(tmp_path, read_prompt_file(DATA / "facts.json").rows[:200:5], "--styles", "swap")
    table = read_csv(tmp_path / "out_repairs.csv")
    right = (table["outcome"] == "put_right").sum()
    assert 34 < right <= 40
    assert f"swap: {right} of 40 wrong words" in summary_lines(rows, ["swap"], table)[0]


# --- a model


def test_a_model_corrects_and_unsound_answers_are_rejected(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    answers = {
        FACT["swap"]: "The capital of Jordan is the city of",
        SUM["swap"]: "Find the price of the apples: 12 + 30 = 42",
        FACT["typo@2"]: "The capital of Jordan is the city of Amman in Asia",
    }
    flags = ["--method", "model", "--model_name", "m", "--attempts", "2"]
    with LocalOpenAIServer(reply=lambda messages: answers[prompt_in(messages)]) as server:
        code, rows = run_script(tmp_path, [FACT, SUM], *flags, "--base_url", server.base_url)
        asked = len(server.requests)
        assert run_script(tmp_path, [FACT, SUM], *flags, "--base_url", server.base_url) == (code, rows)
        assert len(server.requests) == asked == 5
        assert FACT["normal"] not in json.dumps(server.requests[0]["body"])
    assert code == 0
    assert rows == [FACT | {"repaired@swap": FACT["normal"]}, SUM]
    log = read_csv(tmp_path / "out_rephrasings.csv")
    assert log["accepted"].sum() == 1
    assert set(log["reason"].dropna().str.partition(":")[0]) == {"wrong_edit", "changed_numbers"}


def prompt_in(messages: Messages) -> str:
    return messages[1]["content"].rpartition("The prompt:\n")[2]


# --- what the linter and the loader hold


@pytest.mark.parametrize(
    ("key", "text", "kind"),
    [
        ("repaired@swap", "Find the price of the apples: 12 + 31 =", "changed_numbers"),
        ("repaired@swap", "Find the price of the apples: 30 + 12 =", "changed_numbers"),
        ("repaired@swap", "Tell me quickly what they cost: 12 + 30 =", "wrong_edit"),
        ("repaired@main", "Find the price of the apples: 12 + 30 =", "no_base_style"),
    ],
)
def test_the_linter_finds_unsound_repairs(key, text, kind):
    found = check_rows([SUM | {key: text}])
    assert [(finding.kind, finding.style, finding.fix) for finding in found] == [(kind, key, "drop variant")]
    assert check_rows([SUM | {"repaired@swap": SUM["normal"]}], styles=["repaired@swap"]) == []


def test_the_linter_holds_a_repair_to_the_protected_text_of_its_style():
    row = {"normal": "Translate 'good prcie' for me", "swap": "Trasnlate 'good prcie' for me"}
    assert check_rows([row | {"repaired@swap": "Translate 'good prcie' for me"}]) == []
    found = check_rows([row | {"repaired@swap": "Translate 'good price' for me"}])
    assert [finding.kind for finding in found] == ["changed_protected"]


def test_a_repair_names_its_style():
    assert style_problem("repaired@swap") is None
    assert style_problem("repaired@") is not None


def test_fuzzed_rows_are_repaired_without_a_traceback():
    rng, made = random.Random(0), 0
    styles = ["main", "swap", "three", "homonym", "normal"]
    for _ in range(100):
        try:
            rows = parse_rows(test_data_fuzz.any_object(rng), Path("rows"))
        except UserError:
            continue
        repaired = repair_by_spelling(rows, styles)
        summary_lines(repaired, styles, count_repairs(repaired, styles))
        check_rows(repaired)
        for _, row, style in to_repair(repaired, styles):
            assert verify_repair(row[style], row[f"repaired@{style}"], row) == []
            made += 1
    assert made > 20


def test_variants_may_be_made_anew_after_a_repair(tmp_path):
    _, rows = run_script(tmp_path, [SUM])
    flags = ["--prompt_file", str(tmp_path / "out.json"), "--output_file", str(tmp_path / "new.json")]
    assert make_variants.main([*flags, "--styles", "missing"]) == 0
    assert json.loads((tmp_path / "new.json").read_text())[0]["repaired@swap"] == rows[0]["repaired@swap"]


@pytest.mark.parametrize(
    ("text", "repaired", "fault"),
    [
        ("Frnace lies on the continent of", "France lies on the continent of Asia", "'Asia'"),
        ("Frnace lies on the continent of", "France lies on the continent of: Asia.", "': Asia.'"),
        ("Frnace lies on the continent of", "France lies on the continent of.", None),
        ("Draw a dog and thecat", "Draw a dog and the cat", None),
        ("法国的手都是", "法国的首都是巴黎", "'巴黎'"),
    ],
)
def test_a_repair_does_not_complete_the_prompt(text, repaired, fault):
    found = verify_repair(text, repaired, {})
    assert found == ([("wrong_edit", f"words follow the end of the prompt: {fault}")] if fault else [])


def test_prompts_without_a_repair_are_counted():
    rows = [FACT, FACT | {"repaired@swap": FACT["normal"]}]
    (line,) = summary_lines(rows, ["swap"], count_repairs(rows, ["swap"]))
    assert line.endswith("1 of 1 prompts are as the clean form; 1 more have no repair")
