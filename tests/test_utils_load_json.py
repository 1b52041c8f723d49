"""Prompt files from many hands: good rows are read, bad ones are told by their number, whole faults in one line."""

from __future__ import annotations

import json

import pytest
from command_line import UserError
from load_json import load_json_prompts, read_prompt_file, styles_of


def write(tmp_path, content) -> str:
    path = tmp_path / "prompts.json"
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    path.write_bytes(data)
    return str(path)


def test_prompts_of_a_style_keep_their_row_numbers(tmp_path):
    path = write(tmp_path, [{"normal": "a", "swap": "b"}, {"normal": "c"}, {"swap": "d", "normal": "e"}])
    assert load_json_prompts(path, "swap") == [(0, "b"), (2, "d")]
    assert load_json_prompts(path, "swap", 2) == [(0, "b")]
    assert load_json_prompts(path, "normal", 2) == [(0, "a"), (1, "c")]


def test_styles_are_told_clean_form_first_and_metadata_is_none(tmp_path):
    rows = [{"swap": "b", "answer": "4", "task": "2 + 2", "_kind": "x", "element_index": 9, "normal": "a", "level": 3}]
    path = write(tmp_path, rows)
    assert list(styles_of(path)) == ["normal", "swap"]
    assert read_prompt_file(path).element_index(0) == 9
    assert read_prompt_file(path).clean_key == "normal"


def test_instruction_is_a_clean_form_too(tmp_path):
    assert read_prompt_file(write(tmp_path, [{"instruction": "a", "typo": "b"}])).clean_key == "instruction"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"  \n ", "the file is empty"),
        (b"[{", r"not JSON: .* at line 1, column 3"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (b"[" * 100_000, "nested too deeply|not JSON"),
        (b"[" + b"9" * 5000 + b"]", "not usable JSON|no row holds a prompt"),
        ({"normal": "a"}, "holds a JSON object; expected a list"),
        ("text", "holds a JSON string; expected a list"),
        ([], "the list is empty"),
        ([1, 2], "no row holds a prompt"),
        ([{"answer": "4"}], "no row holds a prompt"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line(tmp_path, content, message):
    with pytest.raises(UserError, match=message) as caught:
        read_prompt_file(write(tmp_path, content))
    assert "\n" not in str(caught.value)
    assert "prompts.json" in str(caught.value)


def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(UserError, match="no such file; give the path of a prompt file"):
        read_prompt_file(tmp_path / "none.json")


def test_a_key_nobody_has_names_those_there_with_counts(tmp_path):
    path = write(tmp_path, [{"normal": "a", "swap": "b"}, {"normal": "c"}])
    with pytest.raises(UserError, match=r"no row has the key 'spwa'; prompt keys there: normal \(2\), swap \(1\)"):
        load_json_prompts(path, "spwa")


def test_bad_rows_are_told_by_number_and_the_rest_is_read(tmp_path):
    rows = [
        {"normal": "good"},
        "no object",
        {"normal": 7, "swap": "fine"},
        {"element_index": "x", "normal": "bad id"},
        {"element_index": True, "normal": "bad id"},
        {"normal": "   "},
        {"normal": "half \ud800 pair"},
        {"answer": "no prompt"},
        {"normal": None},
        {"normal": "last"},
    ]
    found = read_prompt_file(write(tmp_path, rows))
    assert found.prompts("normal") == [(0, "good"), (9, "last")]
    assert found.prompts("swap") == [(2, "fine")]
    told = [str(problem) for problem in found.problems]
    assert len(told) == 8
    assert told[0].startswith("row 2: is a JSON string, not an object")
    assert told[1].startswith("row 3, key 'normal': is a JSON number, not a string")
    assert {problem.original_index for problem in found.problems_of("normal")} == {1, 2, 3, 4, 5, 6, 7, 8}
    assert {problem.original_index for problem in found.problems_of("swap", 3)} == {1}
