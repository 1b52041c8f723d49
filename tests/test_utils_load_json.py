"""Prompt files from many hands: good rows are read, bad ones are told by their number, whole faults in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import UserError
from load_json import load_json_prompts, read_prompt_file, style_problem


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
    assert list(read_prompt_file(path).style_counts) == ["normal", "swap"]
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
        ({"answer": "a"}, "no row holds a prompt"),
        ("text", "holds a JSON string; expected a list"),
        (b'{"normal": "a",\n', r"not JSON: .* at line 2, column 1"),
        (b"normal\nswap\n", "not JSON"),
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


def refuse(path):
    raise PermissionError(13, "Permission denied")


def test_what_cannot_be_read_is_told_by_its_reason(tmp_path, monkeypatch):
    (tmp_path / "utf16.json").write_text("[]", encoding="utf-16")
    for name, reason in (
        ("none.json", "no such file; give the path of a prompt file"),
        ("utf16.json/p.json", "cannot be read: Not a directory"),
        (".", "is a folder; give the path of a prompt file"),
        ("utf16.json", r"not UTF-8 \(byte 0\); save the file as UTF-8"),
    ):
        with pytest.raises(UserError, match=reason) as caught:
            read_prompt_file(tmp_path / name)
        assert "Errno" not in str(caught.value)
    monkeypatch.setattr(
        Path, "read_bytes", lambda path: (_ for _ in ()).throw(PermissionError(13, "Permission denied"))
    )
    with pytest.raises(UserError, match="no permission to read it; change its rights"):
        read_prompt_file(tmp_path / "utf16.json")


ROWS = [
    {"element_index": "gsm8k-17", "normal": "a\u2028b", "swap": None},
    {"element_index": 5, "normal": "c", "swap": "d"},
]


@pytest.mark.parametrize(
    "content",
    [
        json.dumps(ROWS),
        json.dumps(ROWS, indent=2),
        "\n".join(json.dumps(row) for row in ROWS),
        "\ufeff\r\n" + "\r\n\r\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\r\n",
    ],
)
@pytest.mark.parametrize("name", ["p.json", "p.jsonl"])
def test_a_list_and_json_lines_are_read_alike_under_any_name(tmp_path, content, name):
    path = tmp_path / name
    path.write_bytes(content.encode())
    found = read_prompt_file(path)
    assert found.problems == []
    assert found.prompts("normal") == [(0, "a\u2028b"), (1, "c")]
    assert found.prompts("swap") == [(1, "d")], "null: the row lacks the style"
    assert [found.element_index(0), found.element_index(1)] == ["gsm8k-17", 5]
    assert found.style_counts == {"normal": 2, "swap": 1}


def test_one_object_alone_is_one_row(tmp_path):
    assert load_json_prompts(write(tmp_path, {"normal": "a"}), "normal") == [(0, "a")]


def test_a_line_that_is_no_json_is_a_bad_row(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('junk\n{"normal": "a"}\n\n[1]\n{"normal": "b"\n{"normal": "c"}', encoding="utf-8")
    found = read_prompt_file(path)
    assert found.prompts("normal") == [(1, "a"), (4, "c")]
    told = [str(problem) for problem in found.problems]
    assert [line.split(":")[0] for line in told] == ["row 1", "row 3", "row 4"]
    assert told[0].startswith("row 1: is not JSON: Expecting value")
    assert told[1].startswith("row 3: is a JSON list")


def test_null_is_a_key_that_is_not_there(tmp_path):
    rows = [{"element_index": None, "normal": None, "instruction": "a", "answer": None, "swap": None, "task": None}]
    found = read_prompt_file(write(tmp_path, rows))
    assert found.rows == [{"instruction": "a"}]
    assert (found.problems, found.element_index(0), found.clean_key) == ([], 1, "instruction")


@pytest.mark.parametrize("key", ["typo/1", "a\\b", ".hidden", "..", "", "  ", "nul\0", "line\nend", "split@swap", "all",
                                 "prompts.json", "Run.json", "half \ud800", "x" * 300, " edge"])  # fmt: skip
def test_a_key_that_cannot_name_a_folder_is_no_style(key):
    assert style_problem(key)


@pytest.mark.parametrize("key", ["normal", "typo_1", "typo 1", "None", "wörter", "t1", "a.b", "homo,nym", "x" * 200])
def test_any_other_key_can_be_a_style(tmp_path, key):
    assert style_problem(key) is None
    (tmp_path / key).mkdir()


def test_a_key_nobody_has_names_those_there_with_counts(tmp_path):
    path = write(tmp_path, [{"normal": "a", "swap": "b"}, {"normal": "c"}])
    with pytest.raises(UserError, match=r"'spwa'; did you mean swap\?; prompt keys there: normal \(2\), swap \(1\)"):
        load_json_prompts(path, "spwa")


def test_bad_rows_are_told_by_number_and_the_rest_is_read(tmp_path):
    rows = [
        {"normal": "good"},
        "no object",
        {"normal": 7, "swap": "fine"},
        {"element_index": " ", "normal": "bad id"},
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
