"""Whatever a prompt file holds, generator and linter end with an exit code or one line of error, never a traceback.

Each case is a file made from its number alone, so a failure names the case that shows it again.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import check_prompts
import file_output
import make_variants
import pytest
from command_line import UserError
from load_json import STYLES

KEYS = ["normal", "instruction", "element_index", "answer", "task", "_template", "_", "", "homo,nym", "Main", "mainn",
        "elementindex", "other", "mine", "\x00", "\ud800", "ключ", "a" * 5000, *STYLES]  # fmt: skip
TEXTS = ["What is 12 + 7?", "Explain how plants make sugar.", "", " ", "\x00", "\ud83d", "\udc00 form", "a\u0301" * 50,
         "\u202egnp", "```", '"', "'" * 300, "{" * 500, "[" * 500, "<" * 500, "`" * 501, "12 + " * 200, "5 " * 500,
         "١٢ + ٣", "⅚²₂", "\u00ad" * 20, "\r\n\t\x0b\x0c", "= =", "=1+1", "é" * 40, "the the the", "word " * 300,
         "from form " * 50, "1e99999999999", "१", "\u2028", "İstanbul ıI", "ﬁne", "\ufeffa", ": :", "a:b"]  # fmt: skip
RAW = ["NaN", "Infinity", "1e999", "-0", "9" * 4000, "9" * 25, "true", "null", "0.1", "2", "{}", "[]"]  # fmt: skip
UNREADABLE = ["9" * 4301, "[" * 3000, '{"a":' * 900, "[" * 60 + "]" * 60, "[" * 2000 + "]" * 2000, "-", "01", "'a'"]


def any_text(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.5:
        return rng.choice(TEXTS) + rng.choice(["", rng.choice(TEXTS)])
    if kind < 0.9:
        return "".join(chr(rng.choice([rng.randrange(128), rng.randrange(0x3000), rng.randrange(0x110000)]))
                       for _ in range(rng.randrange(40)))  # fmt: skip
    if kind < 0.995:
        return " ".join(rng.choice(TEXTS) for _ in range(rng.randrange(20)))
    return rng.choice(["a", "1", "'", '"', "{", "word ", "5 ", "1+", " ", "\u0301", "A", "x1 "]) * 60_000


def any_json(rng: random.Random, depth: int = 0) -> str:
    kind = rng.random()
    if kind < 0.45 or depth > 3:
        return json.dumps(any_text(rng), ensure_ascii=rng.random() < 0.9)
    if kind < 0.7:
        return rng.choice(RAW)
    if kind < 0.702:
        return rng.choice(UNREADABLE)
    if kind < 0.72:
        levels = rng.randrange(1, 45)
        return "[" * levels + "1" + "]" * levels
    if kind < 0.85:
        return "[" + ",".join(any_json(rng, depth + 1) for _ in range(rng.randrange(4))) + "]"
    return any_object(rng, depth + 1)


def any_object(rng: random.Random, depth: int = 0) -> str:
    """An object whose keys may come twice; mostly with a usable clean prompt, so that the deeper code is reached."""
    pairs = [(rng.choice(KEYS), any_json(rng, depth)) for _ in range(rng.randrange(8))]
    if rng.random() < 0.7:
        pairs.append(("normal", json.dumps(any_text(rng))))
    if rng.random() < 0.5:
        pairs.append((rng.choice(STYLES), json.dumps(any_text(rng))))
    return "{" + ",".join(f"{json.dumps(key)}:{value}" for key, value in pairs) + "}"


def damaged(rng: random.Random, content: bytes) -> bytes:
    for _ in range(rng.randrange(1, 6)):
        at = rng.randrange(len(content) + 1)
        piece = rng.choice([b"", b'"', b"\\", b"\x00", b"\xff", b"[", b"}", b",", b"\\ud800", content[at : at + 9]])
        content = content[:at] + piece + content[at + rng.randrange(4) :]
    return content


def any_file(number: int) -> bytes:
    rng = random.Random(number)
    rows = [any_object(rng) if rng.random() < 0.9 else any_json(rng) for _ in range(rng.randrange(6))]
    content = ("[" + ",".join(rows) + "]").encode("utf-8", "surrogatepass")
    kind = rng.random()
    if kind < 0.15:
        return damaged(rng, content)
    if kind < 0.20:
        return any_json(rng).encode("utf-8", "surrogatepass")
    if kind < 0.23:
        return bytes(rng.randrange(256) for _ in range(rng.randrange(60)))
    if kind < 0.26:
        return content.decode("utf-8", "replace").encode(rng.choice(["utf-16", "utf-8-sig", "utf-32"]))
    return content


def run(main: Callable, arguments: list[str]) -> int | None:
    """The exit code, None where a user error was told; anything else that is raised is a fault."""
    strict_out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="strict")  # as a real terminal or pipe
    with contextlib.redirect_stdout(strict_out), contextlib.redirect_stderr(io.StringIO()):
        try:
            code = main(arguments)
            strict_out.flush()
            return code
        except UserError as error:
            told = str(error)
    assert told.strip()
    return None


def try_file(number: int, folder: Path) -> tuple[int | None, int | None]:
    source, made, mended = folder / "in.json", folder / "out.json", folder / "mended.json"
    source.write_bytes(any_file(number))
    for path in (made, mended):
        path.unlink(missing_ok=True)
    options = [[], ["--intensity", "2"], ["--styles", "three", "homonym", "split"]][number % 3]
    made_code = run(make_variants.main, ["--prompt_file", str(source), "--output_file", str(made), *options])
    found = ["--output_csv", str(folder / "found.csv"), "--fix", str(mended)]
    checked_code = run(check_prompts.main, ["--prompt_file", str(source), *found])
    assert made_code in (0, 1, None)
    assert checked_code in (0, 1, None)
    assert made.exists() == (made_code is not None)
    assert mended.exists() == (checked_code is not None)
    if made_code is not None:
        json.loads(made.read_text(encoding="utf-8"))
    return made_code, checked_code


def try_files(numbers: range, folder: Path) -> list[tuple[int | None, int | None]]:
    codes = []
    for number in numbers:
        try:
            codes.append(try_file(number, folder))
        except Exception as error:
            raise AssertionError(f"case {number}: {type(error).__name__}: {error}") from error
    return codes


@pytest.fixture(autouse=True)
def _without_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(file_output.os, "fsync", lambda handle: None)


def test_two_thousand_fuzzed_files(tmp_path):
    codes = try_files(range(2_000), tmp_path)
    # The cases must reach the inside: many files are read, many are refused, many have rows that are bad or good.
    for outcome in (0, 1, None):
        assert sum(made == outcome for made, _ in codes) > 50, outcome
    assert sum(checked is not None for _, checked in codes) > 1_000


@pytest.mark.stress
def test_a_hundred_thousand_fuzzed_files(tmp_path):
    try_files(range(1_000_000, 1_100_000), tmp_path)


@pytest.mark.parametrize("script", [make_variants, check_prompts])
def test_as_a_process_there_is_no_traceback(script, tmp_path):
    output = [] if script is check_prompts else ["--output_file", str(tmp_path / "out.json")]
    for number in range(3):
        source = tmp_path / f"{number}.json"
        source.write_bytes([b"[[[[", b'[{"normal": "\\ud800 form", "main": 3}]', b"[" * 200_000][number])
        command = [sys.executable, script.__file__, "--prompt_file", str(source), *output]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONUTF8": "1"})
        assert done.returncode in (1, 2), done.stderr
        assert "Traceback" not in done.stderr
        if done.returncode == 2:
            assert done.stderr.startswith("error: ")
            assert done.stderr.count("\n") == 1
