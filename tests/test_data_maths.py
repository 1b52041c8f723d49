"""The prompt files that ship, counted with code of this file's own: nothing in them biases a comparison."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import make_maths
import make_variants
import pytest
from command_line import UserError
from typos.checks import check_rows
from typos.maths_problems import draw_problems, read_wordings
from wordfreq import zipf_frequency

DATA = Path(__file__).resolve().parents[1] / "0_data"
NON_WORD = {"main": 1, "swap": 1, "missing": 1, "repeated": 1, "two": 2, "three": 3, "noise_words": 1}
TYPOS = {**NON_WORD, "real_word": 1}
ALL_STYLES = {*TYPOS, "grammar", "punctuation", "homonym", "polite", "urgent", "rude", "split"}

Row = dict[str, Any]


@pytest.fixture(scope="module")
def maths() -> list[Row]:
    return json.loads((DATA / "maths.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def instructions() -> list[Row]:
    return json.loads((DATA / "instructions.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def variants(maths: list[Row], instructions: list[Row]) -> list[tuple[Row, str, str]]:
    """(row, style, text) of every variant that ships."""
    return [(row, style, row[style]) for row in maths + instructions for style in sorted(ALL_STYLES)]


# --- what the variants are


def test_every_row_has_every_style_and_no_variant_is_a_no_op(variants: list[tuple[Row, str, str]]) -> None:
    assert len(variants) == (1000 + 210) * 15
    assert [text for row, _, text in variants if text == row["normal"]] == []
    for row in {id(row): row for row, _, _ in variants}.values():
        assert len({row[style] for style in ALL_STYLES}) == 15


def test_no_digit_and_no_operator_changes(variants: list[tuple[Row, str, str]]) -> None:
    def marks(text: str) -> list[str]:
        return re.findall(r"[0-9]+|[-+×÷*/=<>%]", text)

    assert [text for row, _, text in variants if marks(text) != marks(row["normal"])] == []


def test_task_stands_in_every_variant_as_it_is(variants: list[tuple[Row, str, str]]) -> None:
    assert [text for row, _, text in variants if "task" in row and text.count(row["task"]) < 1] == []


def words_of(text: str) -> Counter[str]:
    return Counter(re.findall(r"[^\W\d_]+", text))


@pytest.mark.parametrize("style", [*NON_WORD, "punctuation"])
def test_no_accidental_real_word(variants: list[tuple[Row, str, str]], style: str) -> None:
    new = {word for row, key, text in variants if key == style for word in words_of(text) - words_of(row["normal"])}
    assert len(new) > 100
    assert {word: zipf_frequency(word, "en") for word in new if zipf_frequency(word, "en") >= 3} == {}


def test_real_word_makes_real_words(variants: list[tuple[Row, str, str]]) -> None:
    new = {w for row, key, text in variants if key == "real_word" for w in words_of(text) - words_of(row["normal"])}
    assert min(zipf_frequency(word, "en") for word in new) >= 3


def one_edit_apart(a: str, b: str) -> bool:
    """One letter replaced, left out, added, or two neighbours transposed: by trying every such edit of `a`."""
    cuts = [(a[:i], a[i:]) for i in range(len(a) + 1)]
    made = {left + right[1:] for left, right in cuts if right}
    made |= {left + c + right for left, right in cuts for c in set(b)}
    made |= {left + c + right[1:] for left, right in cuts if right for c in set(b)}
    made |= {left + right[1] + right[0] + right[2:] for left, right in cuts if len(right) > 1}
    return a != b and b in made


@pytest.mark.parametrize(("style", "count"), TYPOS.items())
def test_exactly_so_many_words_have_one_edit(variants: list[tuple[Row, str, str]], style: str, count: int) -> None:
    for row, key, text in variants:
        if key == style:
            pairs = list(zip(row["normal"].split(" "), text.split(" "), strict=True))
            changed = [(a, b) for a, b in pairs if a != b]
            assert len(changed) == count, text
            assert all(one_edit_apart(a, b) for a, b in changed), text


def test_two_and_three_mix_their_kinds(variants: list[tuple[Row, str, str]]) -> None:
    for row, style, text in variants:
        if style in ("two", "three"):
            pairs = zip(row["normal"].split(" "), text.split(" "), strict=True)
            kinds = {
                (len(b) - len(a), sorted(a) == sorted(b)) for a, b in pairs if a != b
            }  # length and letters tell the four kinds apart
            assert len(kinds) > 1, text


def test_tones_keep_the_request_word_for_word(variants: list[tuple[Row, str, str]]) -> None:
    framed = [(row["normal"], text) for row, style, text in variants if style in ("polite", "urgent", "rude")]
    assert all(text.endswith(" " + clean) and ":" not in text.removesuffix(clean) for clean, text in framed)


def test_split_adds_one_soft_hyphen_where_main_has_its_typo(variants: list[tuple[Row, str, str]]) -> None:
    for row, style, text in variants:
        if style == "split":
            assert text.count("\u00ad") == row["normal"].count("\u00ad") + 1
            assert text.replace("\u00ad", "") == row["normal"]
            assert word_changed(row["normal"], text) == word_changed(row["normal"], row["main"])


def word_changed(clean: str, variant: str) -> int:
    (index,) = [i for i, (a, b) in enumerate(zip(clean.split(), variant.split(), strict=True)) if a != b]
    return index


def homonym_pair(clean: str, variant: str) -> tuple[str, str]:
    index = word_changed(clean, variant)
    return tuple(re.sub(r"[^\w'’]", "", text.split()[index]).lower() for text in (clean, variant))  # type: ignore[return-value]


def test_homonyms_are_homophones_by_ear(variants: list[tuple[Row, str, str]]) -> None:
    used = {homonym_pair(row["normal"], text) for row, style, text in variants if style == "homonym"}
    assert sorted(used - HEARD) == [], "a new pair: say both words aloud, then add it"


def test_the_linter_agrees(maths: list[Row], instructions: list[Row]) -> None:
    assert check_rows(maths) == []
    assert check_rows(instructions) == []


# --- the maths problems


def test_wordings_operations_and_results(maths: list[Row]) -> None:
    assert len(maths) == len({row["normal"] for row in maths}) == 1000
    assert [row["element_index"] for row in maths] == list(range(1, 1001))
    wordings = {re.sub(r"\d+|[-+×÷*/]", "#", row["normal"]) for row in maths}
    assert len(wordings) >= 250
    assert len({row["_template"] for row in maths}) == len(wordings) == 292
    assert max(Counter(row["_template"] for row in maths).values()) <= 10
    results = Counter((row["_operation"], row["_result"]) for row in maths)
    assert results["subtraction", "negative"] == sum(row["answer"].startswith("-") for row in maths) >= 50
    assert results["division", "fraction"] == sum("." in row["answer"] for row in maths) >= 50
    assert set(Counter(row["_operation"] for row in maths)) == {
        "addition",
        "subtraction",
        "multiplication",
        "division",
    }


def numbers_in(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def test_answers_are_right(maths: list[Row]) -> None:
    for row in maths:
        a, b = numbers_in(row["task"])
        if re.search(r"subtracted from|goes into", row["task"]):
            a, b = b, a
        right = {"addition": a + b, "subtraction": a - b, "multiplication": a * b, "division": Fraction(a, b)}
        assert Fraction(row["answer"]) == right[row["_operation"]], row["normal"]
        assert re.fullmatch(r"-?\d+(\.\d{1,3})?", row["answer"])
        kind = "negative" if right[row["_operation"]] < 0 else "fraction" if "." in row["answer"] else "whole"
        assert row["_result"] == kind
        if sign := re.search(r"\d ([-+×÷*/]) \d", row["task"]):
            assert (
                sign[1]
                in {"addition": "+", "subtraction": "-", "multiplication": "×*", "division": "÷/"}[row["_operation"]]
            )


def test_rows_are_ordered_by_the_digits_of_the_larger_number(maths: list[Row]) -> None:
    digits = [max(len(str(number)) for number in numbers_in(row["normal"])) for row in maths]
    assert digits == [row["_digits"] for row in maths] == [1] * 300 + [2] * 350 + [3] * 350
    assert len({row["_template"] for row in maths[:60]}) == 60


def test_a_first_colon_splits_where_the_task_begins(maths: list[Row]) -> None:
    with_colon = [row for row in maths if ":" in row["normal"]]
    assert len(with_colon) > 800
    assert all(row["normal"].partition(": ")[2] == row["task"] for row in with_colon)


def test_the_few_shot_text_gives_nothing_away(maths: list[Row]) -> None:
    text = (DATA / "few_shot_maths.txt").read_text(encoding="utf-8")
    examples = text.split("\n\n")
    assert examples.pop() == "", "the prompt follows on a line of its own"
    assert len(examples) == 3
    for example in examples:
        a, b, result = re.findall(r"(?<!\d )-?\d+", example)
        assert int(result) in {int(a) + int(b), int(a) - int(b), int(a) * int(b)}
        asked = {(row["_operation"], *numbers_in(row["task"])) for row in maths}
        operation = {"+": "addition", "-": "subtraction", "times": "multiplication"}[example_sign(example)]
        assert (operation, int(a), int(b)) not in asked
        assert re.split(r"[:\d]", example)[0] not in {re.split(r"[:\d]", row["normal"])[0] for row in maths}


def example_sign(example: str) -> str:
    return re.search(r"\d (\S+) \d", example)[1]  # type: ignore[index]


@pytest.mark.usefixtures("tables_as_written")
def test_make_maths_rebuilds_the_file_bit_for_bit(tmp_path: Path) -> None:
    assert make_maths.main(["--output_file", str(tmp_path / "maths.json")]) == 0
    for name in ("maths.json", "maths_edits.csv"):
        assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes(), f"{name}: run make_maths.py again"


def test_another_seed_gives_other_problems() -> None:
    wordings = read_wordings(DATA / "maths_wordings.csv")
    problems = [[next(draw_problems("addition", "whole", 3, random.Random(seed))) for _ in range(3)] for seed in (1, 2)]
    assert problems[0] != problems[1]
    assert len(wordings) == 292


@pytest.mark.parametrize(
    "line",
    [
        "t_01,addition,whole",
        "t_01,sum,whole,Add: {x}",
        "t_01,addition,odd,Add: {x}",
        "t_01,addition,any,Add nothing",
        "t_01,addition,any,Add {x} and {x}",
        "t_01,addition,any,Add {y}: {x}",
        "t_01,addition,any,Add [{a} and {b}] and {x}",
        "t_01,addition,any,Add [{a",
        "t,addition,any,Add: {x}",
    ],
)
def test_a_wrong_wording_is_named_by_its_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "wordings.csv"
    path.write_text(f"template,operation,results,wording\n{line}\n", encoding="utf-8")
    with pytest.raises(UserError, match=re.escape(str(path))):
        read_wordings(path)


# --- the instructions


def test_instructions_are_many_of_many_kinds(instructions: list[Row]) -> None:
    kinds = Counter(row["_kind"] for row in instructions)
    assert len(instructions) == len({row["normal"] for row in instructions}) >= 200
    assert len(kinds) >= 12
    assert min(kinds.values()) >= 15
    lengths = [len(row["normal"].split()) for row in instructions]
    assert min(lengths) >= 10
    assert max(lengths) <= 200
    assert max(lengths) > 150


@pytest.mark.usefixtures("tables_as_written")
def test_instructions_are_rebuilt_bit_for_bit(tmp_path: Path) -> None:
    source, output = DATA / "instructions_clean.json", tmp_path / "instructions.json"
    assert make_variants.main(["--prompt_file", str(source), "--output_file", str(output)]) == 0
    for name in ("instructions.json", "instructions_edits.csv"):
        assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes(), f"{name}: run make_variants.py again"


# Every pair that the data uses, heard by ear: the same sound in at least one standard accent of English.
HEARD_PAIRS = """
    add/ad aloud/allowed band/banned be/bee beach/beech bee/be bell/belle bells/belles bin/been birth/berth
    board/bored bored/board brakes/breaks bread/bred break/brake breaks/brakes buy/bye cell/sell cellar/seller
    choose/chews coat/cote cream/creme done/dun dough/doe fair/fare few/phew find/fined flour/flower for/fore
    freeze/frees gate/gait great/grate guest/guessed hall/haul have/halve hear/here heard/herd heart/hart
    here/hear high/hi its/it's know/no knows/nose lay/lei lesson/lessen lie/lye made/maid main/mane mark/marque
    meat/meet might/mite mind/mined morning/mourning need/knead new/knew night/knight no/know not/knot or/ore
    packed/pact past/passed pears/pairs pick/pic piece/peace plain/plane please/pleas pour/pore praise/prays
    profit/prophet queue/cue rain/reign rained/reigned reads/reeds rest/wrest rhyme/rime right/write road/rode role/roll
    rolls/roles rough/ruff row/roe rows/rose sales/sails sea/see see/sea seems/seams seller/cellar sells/cells
    side/sighed sign/sine size/sighs so/sew stayed/staid steel/steal step/steppe steps/steppes straight/strait
    sun/son sweets/suites tea/tee their/there there/their through/threw to/too tray/trey very/vary wait/weight
    waiting/weighting waits/weights waste/waist way/weigh ways/weighs we/wee weather/whether weekly/weakly
    weigh/way where/wear whether/weather which/witch while/wile white/wight whole/hole whose/who's would/wood
    write/right wrote/rote you/yew
"""
HEARD = {tuple(pair.split("/")) for pair in HEARD_PAIRS.split()}
