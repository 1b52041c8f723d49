"""Responses that were made elsewhere: captured in one prefill, stored as they came, counted row by row."""

from __future__ import annotations

import csv
import json
import math
import random
from pathlib import Path

import attn_act_logi
import pytest
import read_predictions
import tiny_models
import torch
from capture import batching, decode, job
from capture.prompts import PromptReader, Rendering
from command_line import UserError
from given_responses import GivenResponse, GivenResponses, read_responses
from load_json import read_prompt_file
from read_predictions import iter_predictions
from run_store import pt_files, read_failures
from test_inference_logprobs import plain_logprob
from test_inference_runs import arguments, assert_same_value, rows_by_key, run, write_prompts
from transformers import AutoModelForCausalLM

MAKING = ("response", "final_prediction", "finish_reason", "response_token_count")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> str:
    return tiny_models.save(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def prompt_file(tmp_path_factory) -> Path:
    return write_prompts(tmp_path_factory.mktemp("prompts") / "prompts.json", 23)


@pytest.fixture(scope="module")
def generated(model_dir, prompt_file, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("generated") / "run"
    assert run(model_dir, prompt_file, output) == 0
    return output


def write_rows(path: Path, rows: list) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


def rows_of(folder: Path) -> list[dict]:
    names = ("style", "original_index", "response")
    return [{name: getattr(one, name) for name in names} for one in iter_predictions(folder)]


def capture(model_dir, prompt_file: Path, responses: Path | str, output: Path, *more: str) -> int:
    flags = arguments(model_dir, prompt_file, output, "--responses_file", str(responses), *more)
    place = flags.index("--max_new_tokens")
    return attn_act_logi.main(flags[:place] + flags[place + 2 :])


def assert_same_captures(found: dict, expected: dict, but: tuple[str, ...] = MAKING) -> None:
    assert found.keys() == expected.keys()
    for key, row in found.items():
        names = row.keys() - set(but)
        assert names >= {"span_mass", "hidden_pooled", "topk_vals", "region_mask", "hidden_states"}
        for name in names:
            assert_same_value(row[name], expected[key][name], (*key, name), False)


# --- what is captured and stored


def test_captures_equal_those_of_generating_and_nothing_is_decoded(
    model_dir, prompt_file, generated, tmp_path, monkeypatch
):
    monkeypatch.setattr(decode.Generator, "_step", None)
    monkeypatch.setattr(decode.Generator, "_advance", None)
    responses = write_rows(tmp_path / "r.jsonl", rows_of(generated))
    assert capture(model_dir, prompt_file, responses, tmp_path / "run") == 0
    found, expected = rows_by_key(tmp_path / "run"), rows_by_key(generated)
    assert_same_captures(found, expected)
    for key, row in found.items():
        assert row["response"] == expected[key]["response"]
        assert row["finish_reason"] == "given"
        assert row["final_prediction"].endswith(row["prompt"] + row["response"])
    settings = json.loads((tmp_path / "run/swap/run.json").read_text())["settings"]
    assert settings["generation"]["text"] == "responses_file"
    assert settings["generation"]["max_new_tokens"] is None
    assert len(settings["responses_sha256"]) == 64
    assert job.plan_jobs(attn_act_logi.parse_args(given_arguments(model_dir, prompt_file, responses, tmp_path)))


def given_arguments(model_dir, prompt_file, responses, tmp_path) -> list[str]:
    flags = arguments(model_dir, prompt_file, tmp_path / "run", "--responses_file", str(responses))
    place = flags.index("--max_new_tokens")
    return flags[:place] + flags[place + 2 :]


def test_a_csv_of_predictions_goes_in_with_its_samples_and_reasons(model_dir, prompt_file, tmp_path):
    sampled = ["--temperature", "1", "--num_samples", "2"]
    assert run(model_dir, prompt_file, tmp_path / "own", *sampled) == 0
    assert read_predictions.main(["--run_dir", str(tmp_path / "own"), "--csv", str(tmp_path / "all.csv")]) == 0
    with (tmp_path / "all.csv").open(newline="") as handle:
        lines = list(csv.DictReader(handle))
    lines = [line | {"finish_reason": "length" if line["original_index"] == "3" else ""} for line in lines]
    with (tmp_path / "all.csv").open("w", newline="") as handle:
        writer = csv.DictWriter(handle, lines[0])
        writer.writeheader()
        writer.writerows(lines)
    assert capture(model_dir, prompt_file, tmp_path / "all.csv", tmp_path / "run") == 0
    found, expected = rows_by_key(tmp_path / "run"), rows_by_key(tmp_path / "own")
    assert_same_captures(found, expected)
    for key, row in found.items():
        assert row["response_samples"] == expected[key]["response_samples"]
        assert row["finish_reason"] == ("length" if key[1] == 3 else "given")
    again = [one.response for one in iter_predictions(tmp_path / "run")]
    assert again == [one.response for one in iter_predictions(tmp_path / "own")]


def test_log_probabilities_are_those_of_a_plain_pass(model_dir, prompt_file, tmp_path):
    rows = json.loads(prompt_file.read_text())
    texts = [" 12", " the sum is 7 + 5 = 12\n", "", "market", " naïve café 😀"]
    responses = [
        {"style": style, "element_index": row["element_index"], "response": texts[(place + len(style)) % len(texts)]}
        for place, row in enumerate(rows)
        for style in ("normal", "swap")
        if style in row
    ]
    path = write_rows(tmp_path / "r.jsonl", responses)
    assert capture(model_dir, prompt_file, path, tmp_path / "run", "--cross_logprobs", "--batch_size", "5") == 0
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    found = rows_by_key(tmp_path / "run")
    assert len(found) == len(responses)
    for (style, index), row in found.items():
        whole = tiny_models.tokenizer()(row["final_prediction"], return_tensors="pt")["input_ids"][0]
        ids = row["response_ids"]
        assert torch.equal(torch.cat([row["input_ids"], ids]), whole)
        assert row["response_token_count"] == len(ids) == len(row["response_logprobs"])
        for count in range(1, len(ids) + 1):
            part = plain_logprob(model, row["input_ids"], ids[:count])
            assert float(row["response_logprobs"][:count].sum()) == pytest.approx(part, abs=1e-4)
        if style == "swap":
            normal = found["normal", index]
            there = plain_logprob(model, row["input_ids"], normal["response_ids"]) if len(normal["response_ids"]) else 0
            back = plain_logprob(model, normal["input_ids"], ids) if len(ids) else 0
            assert row["normal_response_logprob"] == pytest.approx(there, abs=1e-4)
            assert row["response_logprob_under_normal"] == pytest.approx(back, abs=1e-4)


def test_a_response_that_leaves_no_room_fails_where_it_is_scored(model_dir, prompt_file, generated, tmp_path):
    rows = rows_of(generated)
    rows[0]["response"] = " market" * 300
    path = write_rows(tmp_path / "r.jsonl", rows)
    assert capture(model_dir, prompt_file, path, tmp_path / "plain") == 0
    assert capture(model_dir, prompt_file, path, tmp_path / "scored", "--response_logprobs") == 1
    failed = read_failures(tmp_path / "scored" / "normal")
    assert [*failed] == [0]
    assert "a response of the row 600; with --response_logprobs" in failed[0][-1]
    assert len(rows_by_key(tmp_path / "scored")) == len(rows) - 1


@pytest.mark.parametrize(
    ("kind", "prompt", "text", "ids"),
    [
        ("metaspace", "The sum of 7 and 5 is", "12", " 12"),  # its decoder drops the first space
        ("bytes", "The sum of 7 and 5 is", "12", "12"),
        ("bytes", "The sum of 7 and 5 is", " 12", " 12"),
        ("bytes", "The sum of 7 and 5 is", "", ""),
    ],
)
def test_tokens_of_a_response(tmp_path, kind, prompt, text, ids):
    path = tmp_path / "p.json"
    path.write_text(json.dumps([{"normal": prompt}]))
    tokenizer = tiny_models.tokenizer(kind)
    reader = PromptReader(read_prompt_file(path), tokenizer, Rendering(), 100, None)
    reader.given = GivenResponses("r", "")
    reader.given.add("normal", 0, 0, GivenResponse(text))
    before, whole = (tokenizer(one)["input_ids"] for one in (prompt, prompt + ids))
    found = reader.response_ids("normal", 0)
    assert whole == before + found
    assert tokenizer.decode(found) == text


# --- rows that cannot be used


def test_missing_double_and_unknown_rows_are_counted_and_a_better_file_goes_on(
    model_dir, prompt_file, generated, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(batching, "ROWS_PER_FILE", 4)
    rows = rows_of(generated)
    bad = [
        "{",
        "7",
        {**rows[5], "response": None},
        {**rows[6], "response": ["a"]},
        {**rows[7], "style": "swpa"},
        {**rows[7], "original_index": 400},
        {**rows[8], "response": "another one"},
        {**rows[8], "original_index": 0, "element_index": 101},
        {**rows[9], "prompt": "a prompt of another file"},
        {"response": "of no row"},
    ]
    path = write_rows(tmp_path / "r.jsonl", [*rows[:3], *bad[:4], *rows[7:9], *bad[4:], *rows[10:]])
    assert capture(model_dir, prompt_file, path, tmp_path / "run") == 1
    told = capsys.readouterr().err.splitlines()
    (line,) = [one for one in told if "rows are not used" in one]
    assert "r.jsonl: 10 of 46 rows are not used: 5 malformed (row 4: cannot be read: " in line
    assert "4 of unknown rows (row 10: the prompt file has no style 'swpa'; did you mean swap?)" in line
    assert "1 double (row 12: row 9 of normal has a response already; the first is used)" in line
    assert "r.jsonl: no response for 5 prompts of normal (rows 4, 5, 6, 7, 10)" in " ".join(told)
    reasons = {index: one[-1] for index, one in read_failures(tmp_path / "run" / "normal").items()}
    assert reasons == {
        3: "no response in r.jsonl",
        4: "no response in r.jsonl",
        5: "r.jsonl row 6: has no response",
        6: "r.jsonl row 7: its response is a JSON list, no string",
        9: "r.jsonl row 14: was made for another prompt than row 10 of normal",
    }
    assert len(rows_by_key(tmp_path / "run")) == len(rows) - 5

    # The same again loads no model; a file that has them runs the rest.
    with monkeypatch.context() as patch:
        patch.setattr(job, "load_model", None)
        assert capture(model_dir, prompt_file, path, tmp_path / "run") == 1
    names = {one: one.stat().st_mtime_ns for one in pt_files(tmp_path / "run" / "swap")}
    write_rows(path, rows)
    assert capture(model_dir, prompt_file, path, tmp_path / "run") == 0
    assert names == {one: one.stat().st_mtime_ns for one in pt_files(tmp_path / "run" / "swap")}
    assert not list((tmp_path / "run").rglob("failures.csv"))
    assert_same_captures(rows_by_key(tmp_path / "run"), rows_by_key(generated))

    # Another answer to a row that is there is refused.
    rows[0]["response"] += "!"
    with pytest.raises(UserError, match=r"holds a run of other responses \(row 1: .*! now|!' now"):
        capture(model_dir, prompt_file, write_rows(path, rows), tmp_path / "run")
    with pytest.raises(UserError, match=r"generation.max_new_tokens: None there, 6 now"):
        run(model_dir, prompt_file, tmp_path / "run")
    assert capture(model_dir, prompt_file, path, tmp_path / "run", "--overwrite") == 0
    assert rows_by_key(tmp_path / "run")["normal", 0]["response"] == rows[0]["response"]


def test_what_says_how_text_is_made_does_not_go_with_a_file(model_dir, prompt_file, tmp_path):
    for flag, value in (("--max_new_tokens", "64"), ("--temperature", "0"), ("--stop_strings", "x"), ("--seed", "0")):
        flags = given_arguments(model_dir, prompt_file, "r.jsonl", tmp_path)
        with pytest.raises(UserError, match=f"{flag}: says how text is generated, but --responses_file brings it"):
            attn_act_logi.parse_args([*flags, flag, value])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no rows"),
        ("style,answer\nnormal,12\n", "holds no rows; give JSON Lines, a JSON list or a CSV with a column `response`"),
        ("response\n12\n", "none of its 1 rows has a response to a prompt here .row 1: names no style"),
        ('[{"response": "1", "original_index": 0}', "holds no rows"),
        ('{"response": "1", "original_index": 0}', "row 1: names no style; add a key `style`, or give the file as"),
    ],
)
def test_a_file_without_a_usable_row_is_one_line(prompt_file, tmp_path, text, message):
    path = tmp_path / "r.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        read_responses([str(path)], read_prompt_file(prompt_file))
    assert "\n" not in str(caught.value)


# --- lm-evaluation-harness


def harness_row(index: int, prompt: str, texts: list[str], **more) -> dict:
    """A line of samples_<task>_<date>.jsonl as lm_eval/loggers/evaluation_tracker.py writes it."""
    arguments = {"gen_args_0": {"arg_0": f"Q: 1 + 1\nA: 2\n\nQ: {prompt}\nA:", "arg_1": {"until": ["\n"]}}}
    row = {"doc_id": index, "doc": {"question": prompt}, "target": "1", "arguments": arguments, "resps": [texts]}
    row |= {"filtered_resps": [texts[0].strip()], "filter": "none", "exact_match": 0.0, "doc_hash": "a" * 64}
    return row | more


def test_samples_of_lm_evaluation_harness(model_dir, prompt_file, tmp_path):
    prompts = json.loads(prompt_file.read_text())
    for style in ("normal", "swap"):
        rows = [
            harness_row(index, row[style], [f" {style} {index}", " again"])
            for index, row in enumerate(prompts)
            if style in row
        ]
        chat = json.dumps([{"role": "user", "content": rows[2]["arguments"]["gen_args_0"]["arg_0"]}])
        rows[2]["arguments"]["gen_args_0"]["arg_0"] = chat
        rows += [row | {"filter": "flexible-extract"} for row in rows]
        rows += [
            harness_row(4, prompts[5]["normal"], [" x"]),
            harness_row(3, prompts[3][style], [""], resps=[[["-1.2", "True"]]]),
        ]
        write_rows(tmp_path / f"samples_{style}.jsonl", rows)
    files = [f"{style}={tmp_path}/samples_{style}.jsonl" for style in ("normal", "swap")]
    prompt_rows = read_prompt_file(prompt_file)
    given = read_responses(files, prompt_rows)
    assert given.repeated == len(given.texts["normal"]) + len(given.texts["swap"]) == 23 + 18
    assert [one.kind for one in given.problems] == ["of unknown rows", "malformed"] * 2
    assert "was made for another prompt than row 5 of normal" in given.problems[0].reason
    assert "has no generated text (a log-likelihood task?)" in given.problems[1].reason
    assert [one.text for one in given.of("swap", 7)] == [" swap 7", " again"]
    flags = given_arguments(model_dir, prompt_file, files[0], tmp_path)
    place = flags.index("--responses_file") + 2
    assert attn_act_logi.main([*flags[:place], files[1], *flags[place:]]) == 0
    assert rows_by_key(tmp_path / "run")["swap", 7]["response_samples"] == [" swap 7", " again"]


# --- fuzz


ODD = [
    None, True, -1, 0, 3, 3.0, 3.5, 1e400, 10**30, "", "3", "3.0", " 7 ", "x" * 500, "\ud800", "\0", [], {}, [[]],
    [["text"]], [["a", "b"]], [[["-1", "True"]]], {"element_index": 104}, "normal", "swap", "split@swap", "length",
    "normal@again", float("nan"), [None], {"gen_args_0": {"arg_0": "[" * 200}}, "100", 100,
]  # fmt: skip
KEYS = "style original_index element_index sample response finish_reason prompt arguments doc doc_id resps filter"


def odd_line(chance: random.Random) -> str:
    row = {key: chance.choice(ODD) for key in KEYS.split() if chance.random() < 0.5}
    if chance.random() < 0.5:
        row |= {"style": "normal", "original_index": chance.randrange(23), "response": "text"}
        row |= {chance.choice(KEYS.split()): chance.choice(ODD)}
    line = json.dumps(row)
    if chance.random() < 0.3:
        place = chance.randrange(len(line) + 1)
        line = line[:place] + chance.choice(["", "{", "[" * 3000, "\x00", '"', "9" * 5000, ","]) + line[place + 1 :]
    return line.replace("\n", " ")


def fuzz(prompt_file: Path, tmp_path: Path, count: int, seed: int) -> None:
    chance = random.Random(seed)
    prompts = read_prompt_file(prompt_file)
    lines = ['{"style": "normal", "original_index": 22, "response": "fine"}', *(odd_line(chance) for _ in range(count))]
    data = [line.encode() if chance.random() < 0.99 else line.encode() + b"\xff" for line in lines]
    (tmp_path / "r.jsonl").write_bytes(b"\n".join(data))
    filled = sum(bool(line.strip()) for line in lines)
    given = read_responses([str(tmp_path / "r.jsonl")], prompts)
    used = sum(len(rows) for rows in given.texts.values())
    assert given.rows == filled
    assert 0 < used <= given.rows - given.repeated - len(given.problems)
    assert len(given.problems) > 0.5 * count
    for style, rows in given.texts.items():
        for index, samples in rows.items():
            assert 0 <= index < 23
            assert all(isinstance(one.text, str) and one.text.encode() is not None for one in samples.values()), style
    given.report()

    with (tmp_path / "r.csv").open("w", newline="", encoding="utf-8", errors="surrogatepass") as handle:
        handle.write("style,original_index,element_index,sample,response\nnormal,22,,,fine\n")
        for _ in range(count):
            cells = [str(chance.choice(ODD)) for _ in range(chance.choice([3, 5, 5, 5, 6]))]
            text = ",".join(cells)
            handle.write((text if chance.random() < 0.9 else text.replace(",", '"', 1)) + "\n")
    given = read_responses([str(tmp_path / "r.csv")], prompts)
    assert given.of("normal", 22)[0].text == "fine"
    used = sum(len(samples) for rows in given.texts.values() for samples in rows.values())
    assert used + len(given.problems) == given.rows > 0


def test_thousands_of_odd_rows_are_all_counted(prompt_file, tmp_path):
    fuzz(prompt_file, tmp_path, 4_000, 1)


@pytest.mark.stress
def test_a_hundred_thousand_odd_rows_are_all_counted(prompt_file, tmp_path):
    fuzz(prompt_file, tmp_path, 100_000, 2)


def test_the_clean_forms_response_may_be_missing(model_dir, prompt_file, generated, tmp_path):
    rows = [row for row in rows_of(generated) if (row["style"], row["original_index"]) != ("normal", 3)]
    path = write_rows(tmp_path / "r.jsonl", rows)
    assert capture(model_dir, prompt_file, path, tmp_path / "run", "--cross_logprobs") == 1
    found = rows_by_key(tmp_path / "run")
    assert math.isnan(found["swap", 3]["normal_response_logprob"])
    assert not math.isnan(found["swap", 3]["response_logprob_under_normal"])  # its prompt is there
    assert not math.isnan(found["swap", 4]["normal_response_logprob"])
