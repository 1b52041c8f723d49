"""Variants by a language model: only sound ones are accepted, a broken-off run goes on, the key stays secret."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import rephrase_with_llm
from command_line import UserError
from local_openai_server import LocalOpenAIServer, Messages
from typos.checks import check_rows

SMOLLM = Path(__file__).parents[1] / "models" / "SmolLM2-135M-Instruct"
KEY = "sk-test-4f1c9e"
ROWS: list[dict[str, Any]] = [
    {
        "element_index": 7,
        "normal": "Find the price of the apples: 12 + 30 =",
        "answer": "42",
        "task": "12 + 30 =",
        "polite": "Please be so kind. Find the price of the apples: 12 + 30 =",
    },
    {"element_index": 9, "normal": "Tell me whether the bridge was built before the harbour."},
]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, list[dict], list[dict]]]:
    """Run the script against a server: (exit code, rows, log)."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    source, output = tmp_path / "prompts.json", tmp_path / "out.json"
    source.write_text(json.dumps(ROWS), encoding="utf-8")

    def run_script(server: LocalOpenAIServer, *flags: str) -> tuple[int, list[dict], list[dict]]:
        files = ["--prompt_file", str(source), "--output_file", str(output)]
        code = rephrase_with_llm.main([*files, "--model", "m", "--base_url", server.base_url, *flags])
        with open(tmp_path / "out_rephrasings.csv", encoding="utf-8", newline="") as file:
            log = list(csv.DictReader(file))
        return code, json.loads(output.read_text(encoding="utf-8")), log

    return run_script


def prompt_in(messages: Messages) -> str:
    return messages[1]["content"].rpartition("The prompt:\n")[2]


def test_good_answers_are_accepted_and_pass_the_linter(run: Any) -> None:
    def reply(messages: Messages) -> str:
        if "urgent" in messages[1]["content"]:
            return "Quick, I am in a hurry! " + prompt_in(messages)
        return prompt_in(messages).replace("price", "pirce").replace("bridge", "brigde")

    with LocalOpenAIServer(reply=reply, api_key=KEY) as server:
        code, rows, log = run(server, "--styles", "urgent", "swap")
    assert code == 0
    assert rows[0]["swap_llm"] == "Find the pirce of the apples: 12 + 30 ="
    assert rows[1]["urgent_llm"] == "Quick, I am in a hurry! " + ROWS[1]["normal"]
    assert rows[0]["polite"] == ROWS[0]["polite"]
    assert [(line["original_index"], line["style"], line["accepted"]) for line in log] == [
        ("0", "urgent", "True"),
        ("0", "swap", "True"),
        ("1", "urgent", "True"),
        ("1", "swap", "True"),
    ]
    plain = [{key.removesuffix("_llm"): value for key, value in row.items()} for row in rows]
    assert [f for f in check_rows(plain) if f.kind != "missing_style"] == []


BAD = {
    "changed a digit": ("other", "What do the apples cost? 12 + 31 =", "changed_protected"),
    "answered it": ("other", "42", "changed_protected"),
    "dropped the task": ("other", "What do the apples cost?", "changed_protected"),
    "gave the answer away": ("other", "The price of the apples is 42: 12 + 30 =", "changed_protected"),
    "left it as it is": ("main", "Find the price of the apples: 12 + 30 =", "no_op"),
    "two typos for one": ("main", "Fimd the prixe of the apples: 12 + 30 =", "edit_count"),
    "another real word": ("main", "Fond the price of the apples: 12 + 30 =", "accidental_real_word"),
    "a typo of another kind": ("swap", "Find the prce of the apples: 12 + 30 =", "wrong_edit"),
    "a false homophone": ("homonym", "Find the price of the apple's: 12 + 30 =", "false_homophone"),
    "reworded the request": ("polite", "Could you kindly add the apples: 12 + 30 =", "request_changed"),
    "moved the colon": ("urgent", "Now: Find the price of the apples: 12 + 30 =", "task_split"),
    "a comment": ("swap", "Sure! Here it is:\nFind the pirce of the apples: 12 + 30 =", "changed_protected"),
    "nothing": ("swap", "  ", "empty answer"),
    "the same as another style": ("polite", ROWS[0]["polite"], "duplicate_variant"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_answer_is_rejected_with_its_reason(run: Any, name: str) -> None:
    style, answer, reason = BAD[name]
    with LocalOpenAIServer(reply=lambda _: answer) as server:
        code, rows, log = run(server, "--styles", style, "--attempts", "2", "--max_samples", "1")
        asked = [request["body"]["messages"] for request in server.requests]
    assert code == 0
    assert rows == ROWS
    assert [line["accepted"] for line in log] == ["False", "False"]
    assert all(line["reason"].startswith(reason) for line in log), log[0]["reason"]
    assert len(asked[1]) == 4, "the second request carries the first answer and why it was rejected"
    assert reason.replace("_", " ") in asked[1][3]["content"].replace("_", " ")


def test_a_second_attempt_can_succeed(run: Any) -> None:
    def reply(messages: Messages) -> str:
        return '"' + prompt_in(messages).replace("price", "pirce") + '"' if len(messages) > 2 else "No."

    with LocalOpenAIServer(reply=reply) as server:
        _, rows, log = run(server, "--styles", "swap", "--max_samples", "1")
    assert rows[0]["swap_llm"] == "Find the pirce of the apples: 12 + 30 ="
    assert rows[1] == ROWS[1]
    assert [(line["attempt"], line["accepted"]) for line in log] == [("1", "False"), ("2", "True")]


def test_thinking_before_the_variant_is_left_out(run: Any) -> None:
    def reply(messages: Messages) -> str:
        text = messages[-1]["content"].rpartition("The prompt:\n")[2]
        return f"<think>Not {text}, but maybe</think>\n\n" + text.replace("price", "pirce")

    with LocalOpenAIServer(reply=reply, refuses=["temperature", "seed", "system", "max_tokens"]) as server:
        _, rows, log = run(server, "--styles", "swap", "--max_samples", "1")
    assert rows[0]["swap_llm"] == "Find the pirce of the apples: 12 + 30 ="
    assert len(log) == 1


def test_a_free_rewording_keeps_every_protected_text(run: Any) -> None:
    with LocalOpenAIServer(reply=lambda _: "What the apples cost: 12 + 30 =") as server:
        _, rows, _ = run(server, "--styles", "other", "--max_samples", "1", "--suffix", "")
    assert rows[0]["other"] == "What the apples cost: 12 + 30 ="


def test_without_a_suffix_a_rejected_style_does_not_keep_its_old_text(run: Any) -> None:
    with LocalOpenAIServer(reply=lambda _: "no") as server:
        _, rows, _ = run(server, "--styles", "polite", "--suffix", "", "--attempts", "1")
    assert "polite" not in rows[0]


def test_a_broken_off_run_goes_on_where_it_stopped(run: Any, tmp_path: Path) -> None:
    def reply(messages: Messages) -> str:
        return "Dear assistant, thank you for your help. " + prompt_in(messages)

    with LocalOpenAIServer(reply=reply, always="500:x") as server:
        code, rows, log = run(server, "--max_retries", "0", "--max_concurrency", "1")
        assert code == 1
        assert rows == ROWS
        assert all(line["reason"].startswith("request failed: HTTP 500") for line in log)
        server.always = None
        code, first, _ = run(server)
        assert code == 0
        count = len(server.requests)
        code, second, _ = run(server)
        assert (code, second) == (0, first)
        assert len(server.requests) == count, "everything came from the cache"
    for path in tmp_path.iterdir():
        assert KEY not in path.read_text(encoding="utf-8")


def test_rate_limits_are_waited_out(run: Any) -> None:
    def reply(messages: Messages) -> str:
        return "Thank you so much for helping me. " + prompt_in(messages)

    with LocalOpenAIServer(reply=reply, faults=["429:0.2", "429:0.2"]) as server:
        code, rows, _ = run(server, "--styles", "polite", "--max_concurrency", "1")
    assert code == 0
    assert all("polite_llm" in row for row in rows)
    assert len(server.requests) == 4


def test_the_key_is_in_no_output(run: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with LocalOpenAIServer(reply=lambda _: "x", api_key="another") as server, pytest.raises(UserError) as error:
        run(server)
    assert server.requests[0]["headers"]["Authorization"] == f"Bearer {KEY}"
    shown = str(error.value) + "".join(capfd.readouterr())
    assert KEY not in shown + "".join(path.read_text(encoding="utf-8") for path in tmp_path.iterdir())


def test_a_dry_run_sends_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "prompts.json"
    source.write_text(json.dumps(ROWS), encoding="utf-8")
    files = ["--prompt_file", str(source), "--output_file", str(tmp_path / "out.json")]
    with LocalOpenAIServer(reply=lambda _: "x") as server:
        assert rephrase_with_llm.main([*files, "--model", "m", "--base_url", server.base_url, "--dry_run"]) == 0
        assert server.requests == []
    assert "4 calls to make" in capfd.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.json"]


def test_a_real_model_behind_a_real_server(run: Any) -> None:
    """SmolLM2 where it is fetched, else a tiny random Llama: weak editors. What they spoil is never accepted."""
    with LocalOpenAIServer(str(SMOLLM) if SMOLLM.is_dir() else None) as server:
        flags = ("--max_samples", "1", "--attempts", "2", "--max_tokens", "20", "--timeout", "600")
        code, rows, log = run(server, "--styles", "polite", "swap", *flags)
    assert code == 0
    assert {line["style"] for line in log} == {"polite", "swap"}
    assert sum(line["accepted"] == "True" for line in log) == sum(key.endswith("_llm") for row in rows for key in row)
    assert all(bool(line["reason"]) == (line["accepted"] == "False") for line in log)
    plain = [{key.removesuffix("_llm"): value for key, value in row.items()} for row in rows]
    assert [f for f in check_rows(plain) if f.severity == "error"] == []


def test_user_errors(tmp_path: Path) -> None:
    files = ["--prompt_file", f"{tmp_path}/a", "--output_file", f"{tmp_path}/b", "--model", "m"]
    with pytest.raises(UserError, match="no such file"):
        rephrase_with_llm.main(files)
    with pytest.raises(UserError, match="must be 1 or more"):
        rephrase_with_llm.main([*files, "--attempts", "0"])
    with pytest.raises(UserError, match="is the prompt file itself"):
        rephrase_with_llm.main([*files, "--output_file", f"{tmp_path}/a"])
