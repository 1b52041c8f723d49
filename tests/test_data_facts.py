"""facts.json and the doses: what the file promises, rebuilt bit for bit, and typos that stay where they may be."""

from __future__ import annotations

import json
import random
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import check_prompts
import make_facts
import make_variants
import pytest
from command_line import UserError
from rapidfuzz.distance import OSA
from token_spans import task_span
from typos.facts import DOSES, FACT_STYLES, read_facts
from typos.style_rules import FRAMING_STYLES, verify_variant
from typos.variants import make_variants as variants_of

DATA = Path(__file__).resolve().parents[1] / "0_data"
Row = dict[str, Any]


@pytest.fixture(scope="module")
def facts() -> list[Row]:
    rows: list[Row] = json.loads((DATA / "facts.json").read_text(encoding="utf-8"))
    return rows


def test_facts_are_many_of_many_relations(facts: list[Row]) -> None:
    assert len(facts) >= 400
    assert len({row["_relation"] for row in facts}) >= 12
    assert len({row["normal"] for row in facts}) == len(facts)
    for row in facts:
        answers = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
        assert all(1 <= len(answer.split()) <= 3 for answer in answers)
        assert row["task"] == row["_template"]
        assert len(row["task"].split()) == 1
        assert row["normal"].count(row["task"]) == 1
        assert not any(answer.lower() in row["normal"].lower().split() for answer in answers)


@pytest.mark.usefixtures("tables_as_written")
def test_make_facts_rebuilds_the_file_bit_for_bit(tmp_path: Path) -> None:
    assert make_facts.main(["--output_file", str(tmp_path / "facts.json")]) == 0
    for name in ("facts.json", "facts_edits.csv"):
        assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes(), f"{name}: run make_facts.py again"


def test_the_checks_find_nothing_but_facts_without_three_edits(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:  # type: ignore[type-arg]
    arguments = ["--prompt_file", str(DATA / "facts.json"), "--output_csv", str(tmp_path / "findings.csv")]
    assert check_prompts.main(arguments) == 0
    assert "0 errors, 1 warnings" in capsys.readouterr().out


def test_typos_lie_in_the_subject_alone_and_doses_are_nested(facts: list[Row]) -> None:
    for row in facts:
        clean, subject = row["normal"], row["task"]
        before, after = clean.split(subject)
        found = {}
        for style in FACT_STYLES:
            if style in row and style not in FRAMING_STYLES:
                assert row[style].startswith(before)
                assert row[style].endswith(after)
                found[style] = row[style][len(before) : len(row[style]) - len(after)]
                start, end = task_span(row[style], subject, clean=clean)
                assert row[style][start:end] == found[style]
        for dose, style in enumerate(DOSES, start=1):
            if style in found:
                assert OSA.distance(subject, found[style]) == dose
        for lower, higher in pairwise(DOSES):
            if higher in found:
                assert OSA.distance(found[lower], found[higher]) == 1


def test_few_shot_examples_are_no_facts_of_the_file(facts: list[Row]) -> None:
    shots = (DATA / "few_shot_facts.txt").read_text(encoding="utf-8").split("\n\n")
    assert shots[-1] == ""
    assert not {row["normal"] for row in facts} & {shot.rpartition(" ")[0] for shot in shots}


@pytest.mark.parametrize(
    "tables", ["[sentences", "[sentences]\n[countries]\ncolumns = 'a b'\ntable = 'X: 1'\n[facts]", "[facts]"]
)
def test_a_wrong_table_is_one_line(tmp_path: Path, tables: str) -> None:
    path = tmp_path / "tables.toml"
    path.write_text(tables, encoding="utf-8")
    with pytest.raises(UserError, match="not a table of facts"):
        read_facts(path)


# --- doses

PROMPTS = [
    "Please explain to your younger sister why the moon shines at night and what the tides have to do with it.",
    "A farmer sold 48 melons on Monday and half as many on Tuesday. How many melons did the farmer sell altogether?",
    "Write a short poem about the harbour of a small town in winter, and mention the fishing boats.",
]


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("seed", range(5))
def test_a_dose_is_exactly_k_edits_and_holds_every_lower_one(prompt: str, seed: int) -> None:
    doses = [f"typo@{k}" for k in (1, 2, 3, 4, 6, 8)]
    (row,), log, _ = variants_of([{"normal": prompt}], doses, seed=seed)
    made = [style for style in doses if style in row]
    assert len(made) >= 5
    for style in made:
        pairs = list(zip(prompt.split(), row[style].split(), strict=True))
        assert sum(OSA.distance(a, b) for a, b in pairs) == int(style.removeprefix("typo@"))
        assert sum(line["osa_distance"] for line in log if line["style"] == style) == int(style.removeprefix("typo@"))
        assert [c for c in prompt if c.isdigit()] == [c for c in row[style] if c.isdigit()]
        assert verify_variant(prompt, row[style], style, row) == []
    for lower, higher in pairwise(made):
        for clean, low, high in zip(prompt.split(), row[lower].split(), row[higher].split(), strict=True):
            assert OSA.distance(clean, low) + OSA.distance(low, high) >= OSA.distance(clean, high)
            assert low == clean or high != clean
            if OSA.distance(clean, low) == OSA.distance(clean, high):
                assert low == high


def test_function_words_wait_until_all_content_words_have_a_typo() -> None:
    _, log, _ = variants_of([{"normal": PROMPTS[0]}], ["typo@2", "typo@8"], where="any")
    operations = Counter(line["style"] for line in log)
    assert operations["typo@2"] == 2
    assert not {line["word"] for line in log if line["style"] == "typo@2"} & {"the", "and", "what", "your"}
    _, log, _ = variants_of([{"normal": PROMPTS[0]}], ["typo@8"], where="content")
    assert not {line["word"] for line in log} & {"the", "and", "what", "your", "why", "with", "have"}


def test_a_dose_that_is_not_what_its_name_says_is_found() -> None:
    clean = PROMPTS[0]
    one = clean.replace("sister", "sisetr")
    assert verify_variant(clean, one, "typo@1") == []
    assert [kind for kind, _ in verify_variant(clean, one, "typo@2")] == ["edit_count"]
    word = clean.replace("moon", "moo")
    assert [kind for kind, _ in verify_variant(clean, word, "typo@1")] == ["accidental_real_word"]
    assert [kind for kind, _ in verify_variant(clean, clean + " now", "typo@1")] == ["edit_count"]


def test_dose_and_where_on_the_command_line(tmp_path: Path) -> None:
    source, output = tmp_path / "clean.json", tmp_path / "out.json"
    rows = [{"normal": f"Tell me about the {word} of old.", "task": word} for word in ("harbour", "elephant")]
    source.write_text(json.dumps(rows))
    flags = ["--prompt_file", str(source), "--output_file", str(output), "--styles", "swap", "--where", "subject"]
    assert make_variants.main([*flags, "--dose", "1", "2"]) == 0
    for row in json.loads(output.read_text()):
        assert row["_where"] == "subject"
        for style in ("swap", "typo@1", "typo@2"):
            assert row[style].startswith("Tell me about the ")
            assert row[style].endswith(" of old.")
    with pytest.raises(UserError, match="--dose 0"):
        make_variants.main([*flags, "--dose", "0"])


def test_rows_without_a_task_lack_edits_of_the_subject() -> None:
    (row,), _, summary = variants_of([{"normal": PROMPTS[2]}], ["swap", "typo@1"], where="subject")
    assert not {"swap", "typo@1"} & row.keys()
    assert all(sum(counts["lacking"].values()) == 1 for counts in summary["styles"].values())


def test_doses_of_random_prompts_pass_their_own_checks() -> None:
    rng = random.Random(3)
    words = [
        "harbour",
        "winter",
        "the",
        "of",
        "mountain",
        "question",
        "12",
        "seven",
        "answer",
        "because",
        "little",
        "tomato",
        "3.5",
        "what",
        "river",
    ]
    for _ in range(60):
        prompt = " ".join(rng.choice(words) for _ in range(rng.randint(3, 14)))
        (row,), _, _ = variants_of([{"normal": prompt}], ["typo@1", "typo@3"], seed=rng.randint(0, 99))
        for style in {"typo@1", "typo@3"} & row.keys():
            assert verify_variant(prompt, row[style], style, row) == []
