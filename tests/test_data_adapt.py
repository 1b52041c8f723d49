"""Datasets to prompt files: what is read is what stands there, bad lines are named, memory stays flat."""

from __future__ import annotations

import csv
import json
import tracemalloc
from contextlib import suppress
from pathlib import Path

import adapt_dataset
import load_json
import pandas as pd
import pytest
from command_line import UserError
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from typos import dataset_formats
from typos.dataset_formats import _NO_ANSWER, bad_lines_path

FORMATS = ("gsm8k", "quora", "paws", "csv", "tsv", "jsonl")
QUORA_HEADER = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate"


def adapt(tmp_path: Path, name: str, content: str | bytes, *flags: str) -> tuple[int, list[dict], list[list[str]]]:
    """(exit code, rows, bad lines) of one conversion, as a user would run it."""
    source, output = tmp_path / "source.txt", tmp_path / "out.json"
    source.write_bytes(content.encode() if isinstance(content, str) else content)
    code = adapt_dataset.main(["--format", name, "--input_file", str(source), "--output_file", str(output), *flags])
    bad = bad_lines_path(output)
    bad_lines = list(csv.reader(bad.open(encoding="utf-8")))[1:] if bad.exists() else []
    rows = json.loads(output.read_text(encoding="utf-8"))
    assert load_json.read_prompt_file(output).problems == []
    return code, rows, bad_lines


# --- GSM8K


def gsm8k_line(question: str, answer: str) -> str:
    return json.dumps({"question": question, "answer": answer})


def test_gsm8k_takes_the_gold_after_the_last_mark(tmp_path: Path) -> None:
    lines = [
        gsm8k_line("How many pens?", "3 + 4 = <<3+4=7>>7\n#### 7"),
        gsm8k_line("What is the price?", "So it is dear.\n#### $1,234"),
        gsm8k_line("How cold was it?", "#### 5 is not it\n#### -2.50"),
    ]
    code, rows, bad = adapt(tmp_path, "gsm8k", "\n".join(lines))
    assert (code, bad) == (0, [])
    assert [(row["element_index"], row["normal"], row["answer"]) for row in rows] == [
        (1, "How many pens?", "7"),
        (2, "What is the price?", "1234"),
        (3, "How cold was it?", "-2.50"),
    ]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"question": "Why?", "answer": "seven"}', "no #### in the answer"),
        ('{"question": "Why?", "answer": "#### seven"}', "what follows #### is not a number"),
        ('{"question": "Why?", "answer": "#### "}', "what follows #### is not a number"),
        ('{"question": "Why?", "answer": 7}', "answer is not a text"),
        ('{"question": null, "answer": "#### 7"}', "question is not a text"),
        ('{"question": "  ", "answer": "#### 7"}', "question is empty"),
        ('{"answer": "#### 7"}', "no question"),
        ('{"question": "\\ud800", "answer": "#### 7"}', "question holds half of a surrogate pair"),
        ("[1, 2]", "not a JSON object"),
        ("[" * 200_000, "not JSON"),
        ('{"question": "Why?", "answer": "#### 7", "x": NaN}', "not JSON"),
        ('{"question": "Why?", "answer": "#### 7", "x": ' + "9" * 5000 + "}", "not JSON"),
        ('{"question": "Why?"', "not JSON"),
    ],
)
def test_a_bad_line_is_named_and_the_rest_goes_on(tmp_path: Path, line: str, reason: str) -> None:
    good = gsm8k_line("Good?", "#### 1")
    code, rows, bad = adapt(tmp_path, "gsm8k", f"{good}\n{line}\n\n{good}\n")
    assert code == 1
    assert [row["element_index"] for row in rows] == [1, 3], "an id is the place in the dataset, bad records included"
    assert len(bad) == 1
    assert bad[0][0] == "2"
    assert bad[0][1].startswith(reason)


@pytest.mark.parametrize(
    ("gold", "kept"),
    [
        ("+7", "+7"),
        (".5", ".5"),
        ("25%", "25%"),
        ("€5", "€5"),
        ("5 apples", "5 apples"),
        ("12.", "12."),
        ("3/4", "3/4"),
        ("$1,234", "1234"),
        ("-2.50", "-2.50"),
        ("$ 12,000.5", "12000.5"),
        ("3 1/2 cups", "3 1/2 cups"),
        ("\\frac{3}{4}", "\\frac{3}{4}"),
        ("2π", "2π"),
    ],
)
def test_a_gold_that_a_reader_of_numbers_may_know_is_kept(tmp_path: Path, gold: str, kept: str) -> None:
    code, rows, _ = adapt(tmp_path, "gsm8k", gsm8k_line("How many?", f"So it is.\n#### {gold}"))
    assert (code, rows[0]["answer"]) == (0, kept)


NO_ANSWERS = ["None", "none", "N/A", "n/a.", "NA", "null", "NaN", "nil", "-", "no answer", "Not available"]


@pytest.mark.parametrize("answer", NO_ANSWERS)
@pytest.mark.parametrize("name", ["csv", "jsonl", "gsm8k"])
def test_an_answer_that_says_there_is_none_is_named(tmp_path: Path, name: str, answer: str) -> None:
    if name == "csv":
        content = f"prompt,answer\nWhich?,{answer}\nWho?,None of them\n"
    elif name == "jsonl":
        content = "\n".join(json.dumps({"prompt": p, "answer": a}) for p, a in (("Which?", answer), ("Who?", "Nancy")))
    else:
        content = gsm8k_line("Which?", f"#### {answer}") + "\n" + gsm8k_line("Who?", "#### 7")
    flags = ("--answer_column", "answer") if name != "gsm8k" else ()
    code, rows, bad = adapt(tmp_path, name, content, *flags)
    assert (code, [row["normal"] for row in rows]) == (1, ["Who?"])
    assert bad == [["2" if name == "csv" else "1", f"the answer is {answer!r}: there is no gold"]]


@pytest.mark.parametrize("indent", [None, 0, 2])
def test_a_json_list_is_read_as_json_lines_are(tmp_path: Path, indent: int | None) -> None:
    records = [{"question": "How many?", "answer": "#### 7"}, 5, {"question": "[Which?]", "answer": "#### 0.50"}]
    text = "\n" + json.dumps(records, indent=indent)
    code, rows, bad = adapt(tmp_path, "gsm8k", text)
    assert code == 1
    assert [(row["element_index"], row["normal"], row["answer"]) for row in rows] == [
        (1, "How many?", "7"), (3, "[Which?]", "0.50")
    ]  # fmt: skip
    assert bad == [["2", "not a JSON object"]]


def test_a_broken_json_list_is_told_as_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"begins as a JSON list and is not JSON: .* one object a line"):
        adapt(tmp_path, "gsm8k", '[\n  {"question": "How many?",\n')
    good = gsm8k_line("How many?", "#### 7")
    assert adapt(tmp_path, "gsm8k", f"[1, 2]\n{good}")[2] == [["1", "not a JSON object"]]


def test_bytes_that_are_no_utf8_spoil_their_line_alone(tmp_path: Path) -> None:
    good = gsm8k_line("Good?", "#### 1").encode()
    _, rows, bad = adapt(tmp_path, "gsm8k", b"\xef\xbb\xbf" + good + b"\n\xff\xfe\n" + good)
    assert len(rows) == 2
    assert bad == [["2", "not UTF-8"]]


def test_a_line_without_end_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_formats, "LONGEST_LINE", 200)
    good = gsm8k_line("Good?", "#### 1")
    _, rows, bad = adapt(tmp_path, "gsm8k", "\n".join([good, "x" * 1000, good]))
    assert len(rows) == 2
    assert bad == [["2", "longer than 200 characters"]]


def test_the_list_of_an_earlier_run_goes(tmp_path: Path) -> None:
    good = gsm8k_line("Good?", "#### 1")
    assert adapt(tmp_path, "gsm8k", f"{good}\nbad")[0] == 1
    assert adapt(tmp_path, "gsm8k", good) == (0, [{"element_index": 1, "normal": "Good?", "answer": "1"}], [])


# --- pairs


def test_quora_pairs_labels_and_quotes(tmp_path: Path) -> None:
    lines = [
        QUORA_HEADER,
        "10\t1\t2\tHow do I cook rice?\tWhat is the way to cook rice?\t1",
        "11\t3\t4\tIs tea good?\tIs coffee good?\t0",
        '12\t5\t6\t"What does ""jump"" mean?"\t"Is it\na verb?"\t1',
        '13\t7\t8\t"Hello" he said, why?\tWhy "hello"?\t1',  # not quoted by the rules: taken as it stands
        '14\t9\t10\t"An open quote\tAnother text\t0',
        "15\t11\t12\tLast one?\tThe last?\t1",
    ]
    code, rows, bad = adapt(tmp_path, "quora", "\r\n".join(lines))
    assert (code, bad) == (0, [])
    texts = [(row["_id"], row["normal"], row.get("other"), row.get("negative"), row["_label"]) for row in rows]
    assert texts == [
        ("10", "How do I cook rice?", "What is the way to cook rice?", None, 1),
        ("11", "Is tea good?", None, "Is coffee good?", 0),
        ("12", 'What does "jump" mean?', "Is it\na verb?", None, 1),
        ("13", '"Hello" he said, why?', 'Why "hello"?', None, 1),
        ("14", '"An open quote', None, "Another text", 0),
        ("15", "Last one?", "The last?", None, 1),
    ]


def test_quora_bad_pairs(tmp_path: Path) -> None:
    lines = [
        QUORA_HEADER,
        "1\t1\t2\ta?\tb?\t1",
        "2\t1\t2\ta?\tb?\tyes",
        "3\t1\t2\tsame\tsame \t1",
        "4\t1\t2\ta?\t\t1",
        "5\t1\t2\ta?",
        "6\t\t2\ta?\tb?\t1",
    ]
    code, rows, bad = adapt(tmp_path, "quora", "\n".join(lines))
    assert code == 1
    assert [row["_id"] for row in rows] == ["1"]
    assert bad == [
        ["3", "is_duplicate is neither 0 nor 1"],
        ["4", "both texts are the same"],
        ["5", "question2 is empty"],
        ["6", "4 fields where the header has 6"],
        ["7", "qid1 is empty"],
    ]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 25), st.integers(0, 25)), min_size=1, max_size=30))
def test_quora_clusters_are_the_connected_components(tmp_path: Path, pairs: list[tuple[int, int]]) -> None:
    lines = [f"{i}\t{a}\t{b}\tfirst {i}?\tsecond {i}?\t{i % 2}" for i, (a, b) in enumerate(pairs)]
    _, rows, _ = adapt(tmp_path, "quora", "\n".join([QUORA_HEADER, *lines]))
    for (a, _), row in zip(pairs, rows, strict=True):
        component = grow({a}, pairs)
        for (c, _), other in zip(pairs, rows, strict=True):
            assert (row["_template"] == other["_template"]) == (c in component)


def grow(questions: set[int], pairs: list[tuple[int, int]]) -> set[int]:
    """All questions that can be reached from `questions`, by repeated passes."""
    grown = questions | {q for pair in pairs if questions & set(pair) for q in pair}
    return questions if grown == questions else grow(grown, pairs)


def test_paws_sentences_become_the_task_of_an_instruction(tmp_path: Path) -> None:
    table = 'id\tsentence1\tsentence2\tlabel\n1\t"Red" is it .\tIt is " red " .\t1\n2\tA before B .\tB before A .\t0\n'
    code, rows, _ = adapt(tmp_path, "paws", table, "--instruction", "Say it otherwise:")
    assert code == 0
    assert rows == [
        {
            "element_index": 1,
            "normal": 'Say it otherwise: "Red" is it .',
            "other": 'Say it otherwise: It is " red " .',
            "_id": "1",
            "_label": 1,
        },
        {
            "element_index": 2,
            "normal": "Say it otherwise: A before B .",
            "negative": "Say it otherwise: B before A .",
            "_id": "2",
            "_label": 0,
        },
    ]


def test_paws_byte_literals_are_read(tmp_path: Path) -> None:
    lines = ["id\tsentence1\tsentence2\tlabel", "1\tb'It is caf\\xc3\\xa9 .'\tb\"It 's a caf\\xc3\\xa9 .\"\t1"]
    lines += ["2\tb'open\tb'\\xff'\t0"]  # no literal, and one that is no UTF-8: taken as they stand
    code, rows, _ = adapt(tmp_path, "paws", "\n".join(lines), "--instruction", "Say:")
    assert code == 0
    assert [(row["normal"], row.get("other", row.get("negative"))) for row in rows] == [
        ("Say: It is café .", "Say: It 's a café ."),
        ("Say: b'open", "Say: b'\\xff'"),
    ]


def test_placeholders_of_paws_are_bad_lines(tmp_path: Path) -> None:
    lines = ["id\tsentence1\tsentence2\tlabel", "1\tA road .\tNS\t1", "2\tNS\tNS\t0", "3\tNS is it .\tIt is NS .\t1"]
    _, rows, bad = adapt(tmp_path, "paws", "\n".join(lines))
    assert [row["_id"] for row in rows] == ["3"]
    assert bad == [["2", "a text is the placeholder NS"], ["3", "a text is the placeholder NS"]]


# --- tables of the user's own

FIELD = st.text(st.characters(exclude_categories=["Cs", "Cc"]) | st.sampled_from('",\n\t '), min_size=1, max_size=20)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(FIELD, FIELD).filter(lambda pair: all(f.strip() for f in pair)), min_size=1, max_size=8),
    st.sampled_from(["csv", "tsv"]),
)
@example([("\t0\n", "0")], "tsv")  # a tab and a line's end in a quoted field
@example([("0\t\n", "0\n")], "tsv")
@example([("0\t\n", "0")], "tsv")
def test_whatever_pandas_writes_is_read_back(tmp_path: Path, pairs: list[tuple[str, str]], name: str) -> None:
    table = pd.DataFrame(pairs, columns=["question", "gold"])
    text = table.to_csv(sep="\t" if name == "tsv" else ",", index=False, lineterminator="\n")
    flags = ("--prompt_column", "question", "--answer_column", "gold", "--template_column", "gold")
    assume(not any(_NO_ANSWER.fullmatch(gold.strip().rstrip(".")) for _, gold in pairs))
    code, rows, bad = adapt(tmp_path, name, text, *flags)
    assert (code, bad) == (0, [])
    assert [(row["normal"], row["answer"], row["_template"]) for row in rows] == [
        (question.strip(), gold.strip(), gold.strip()) for question, gold in pairs
    ]


@pytest.mark.parametrize(
    "table",
    [
        "prompt,answer\nWhat is 2+2?,4,\nWhat is 1+1?,2,",
        "prompt,answer,,\nWhat is 2+2?,4,,\n,,,\nWhat is 1+1?,2,,",
        'prompt,answer\n"What is\n2+2?",4,,\nWhat is 1+1?,2',
        'prompt,answer,\n"What is 2+2?",4\nWhat is 1+1?,2, ',
    ],
)
def test_surplus_commas_of_a_spreadsheet_cost_nothing(tmp_path: Path, table: str) -> None:
    code, rows, bad = adapt(tmp_path, "csv", table, "--answer_column", "answer")
    assert (code, bad) == (0, [])
    assert [" ".join(row["normal"].split()) for row in rows] == ["What is 2+2?", "What is 1+1?"]
    assert [row["answer"] for row in rows] == ["4", "2"]


def test_a_surplus_field_with_text_is_a_bad_line(tmp_path: Path) -> None:
    _, rows, bad = adapt(tmp_path, "csv", "prompt,answer\na,1,x\nb,2\nc\n", "--answer_column", "answer")
    assert [row["normal"] for row in rows] == ["b"]
    assert bad == [["2", "3 fields where the header has 2"], ["4", "1 fields where the header has 2"]]


def test_a_needed_column_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the column 'prompt' .* rename"):
        adapt(tmp_path, "csv", "prompt,answer,prompt\na,1,b\n")
    assert adapt(tmp_path, "csv", "prompt,note,note\na,1,b\n")[0] == 0


def test_a_quote_without_end_costs_its_own_line_alone(tmp_path: Path) -> None:
    lines = ["prompt,answer", "one,1", '"two,2', "three,3", 'say "four",4', "five,5"]
    _, rows, bad = adapt(tmp_path, "csv", "\n".join(lines), "--answer_column", "answer")
    assert [row["answer"] for row in rows] == ["1", "3", "4", "5"]
    assert bad == [["3", "quotation marks that do not match"]]


def test_a_file_full_of_open_quotes_is_read_to_its_end(tmp_path: Path) -> None:
    lines = [f'"text {i},x' if i % 5000 else f"good {i},x" for i in range(20_000)]
    _, rows, bad = adapt(tmp_path, "csv", "\n".join(["prompt,answer", *lines]))
    assert [row["normal"] for row in rows] == ["good 0", "good 5000", "good 10000", "good 15000"]
    assert len(bad) == 20_000 - 4


def test_jsonl_numbers_keep_their_digits(tmp_path: Path) -> None:
    lines = [
        '{"q": "half of it?", "a": 0.50}',
        '{"q": "all of it?", "a": 12345678901234567890}',
        '{"q": "x", "a": true}',
    ]
    _, rows, bad = adapt(tmp_path, "jsonl", "\n".join(lines), "--prompt_column", "q", "--answer_column", "a")
    assert [row["answer"] for row in rows] == ["0.50", "12345678901234567890"]
    assert bad == [["3", "a is not a text"]]


# --- as a whole


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("csv", "prompt,answer\n", "no usable record"),
        ("csv", "text,answer\nx,1\n", "no column 'prompt' in the header (text, answer)"),
        ("csv", "", "no column 'prompt' in the header (none)"),
        ("quora", "id,qid1\n", "no column 'id' in the header (id,qid1)"),
        ("gsm8k", "\n\n", "no usable record in the dataset (it has no records)"),
        ("gsm8k", "junk\n", "line 1: not JSON"),
    ],
)
def test_an_unusable_dataset_is_told_in_one_line(tmp_path: Path, name: str, content: str, told: str) -> None:
    with pytest.raises(UserError) as error:
        adapt(tmp_path, name, content)
    assert told in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source.txt"]


def test_user_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        adapt_dataset.main(["--format", "csv", "--input_file", f"{tmp_path}/no", "--output_file", f"{tmp_path}/o"])
    with pytest.raises(UserError, match="would overwrite the dataset itself"):
        adapt_dataset.main(["--format", "csv", "--input_file", f"{tmp_path}/a", "--output_file", f"{tmp_path}/a"])
    files = ["--input_file", f"{tmp_path}/a_bad_lines.csv", "--output_file", f"{tmp_path}/a.json"]
    with pytest.raises(UserError, match="would overwrite the dataset"):
        adapt_dataset.main(["--format", "csv", *files])
    with pytest.raises(UserError, match="must be 1 or more"):
        adapt(tmp_path, "csv", "prompt\nx\n", "--max_samples", "0")


@pytest.mark.parametrize("name", ["gsm8k", "paws", "csv"])
def test_memory_does_not_grow_with_the_dataset(tmp_path: Path, name: str) -> None:
    peaks = []
    for count in (300, 6000):
        source = tmp_path / f"{count}.txt"
        source.write_text("\n".join(many_lines(name, count)), encoding="utf-8")
        arguments = ["--format", name, "--input_file", str(source), "--output_file", str(tmp_path / "out.json")]
        tracemalloc.start()
        adapt_dataset.main(arguments)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))) == count
    assert peaks[1] < peaks[0] + 100_000, "a text of 1,000 characters a row: 6 MB in all"


def many_lines(name: str, count: int) -> list[str]:
    text = "word " * 200
    if name == "gsm8k":
        return [gsm8k_line(text, f"#### {i}") for i in range(count)]
    if name == "paws":
        return ["id\tsentence1\tsentence2\tlabel", *(f"{i}\t{text}\tno {i}\t{i % 2}" for i in range(count))]
    return ["prompt,n", *(f'"{text}",{i}' for i in range(count))]


def test_max_samples_counts_good_records(tmp_path: Path) -> None:
    lines = ["bad", *(gsm8k_line(f"{i}?", f"#### {i}") for i in range(9))]
    _, rows, bad = adapt(tmp_path, "gsm8k", "\n".join(lines), "--max_samples", "3")
    assert [row["answer"] for row in rows] == ["0", "1", "2"]
    assert len(bad) == 1


HEADERS = {"quora": QUORA_HEADER, "paws": "id\tsentence1\tsentence2\tlabel", "csv": "prompt,answer", "tsv": "prompt\tx"}
BYTES = st.lists(
    st.sampled_from([b"\t", b",", b'"', b"\n", b"\r", b"0", b"1", b"{", b"}", b'{"question":', b'"answer":"#### 1"}'])
    | st.binary(max_size=6)
    | st.text(max_size=6).map(lambda text: text.encode("utf-8", "surrogatepass")),
    max_size=60,
).map(b"".join)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(FORMATS), BYTES)
def test_no_bytes_end_in_a_traceback(tmp_path: Path, name: str, content: bytes) -> None:
    header = HEADERS.get(name, "").encode()
    with suppress(UserError):
        assert adapt(tmp_path, name, header + b"\n" + content)[1]
