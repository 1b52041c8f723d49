"""parse_predictions: hand-written answers, the comparison with gold, echoes, and texts made to be slow."""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import pytest
from maths_numbers import find_numbers, plain_text, words_value
from parse_predictions import arithmetic_value, gold_value, main, matches_gold, parse_prediction_text

CASES_FILE = Path(__file__).parent / "data" / "maths_answers.tsv"
SCRIPT = Path(__file__).parents[1] / "3_maths_eval" / "run_scripts" / "parse_predictions.py"


def _cases() -> list[tuple[str, str | None, Fraction | None]]:
    cases = []
    for line in CASES_FILE.read_text(encoding="utf-8").split("\n"):
        if line and not line.startswith("# "):
            response, prompt, answer = line.split("\t")
            text = response.replace("\\\\", "\0").replace("\\n", "\n").replace("\0", "\\")
            cases.append((text, prompt or None, None if answer == "none" else Fraction(answer)))
    return cases


def test_there_are_at_least_300_hand_written_answers():
    assert len(set(_cases())) >= 300


@pytest.mark.parametrize(("response", "prompt", "answer"), _cases())
def test_hand_written_answer(response, prompt, answer):
    parsed = parse_prediction_text(response, prompt)
    assert parsed.value == answer, parsed
    assert (parsed.value is None) == (parsed.status == "none" or (parsed.status == "ambiguous" and answer is None))


def test_a_prompt_that_says_nothing_about_the_answer_changes_nothing():
    for response, prompt, answer in _cases():
        if prompt is None:
            assert parse_prediction_text(response, "Please tell me the value.").value == answer, response


def test_status_and_rule():
    expected = {
        "\\boxed{12}": ("boxed", "parsed"),
        "So.\n#### 12": ("marker", "parsed"),
        " 12.": ("completion", "parsed"),
        "I think the answer is 12.": ("answer_is", "parsed"),
        "3 * 60 = 180. Therefore it takes 3 hours.": ("conclusion", "parsed"),
        "We have 7 + 5 = 12.": ("equals", "parsed"),
        "There are 12.": ("sole", "parsed"),
        "There were 7, then 12.": ("last", "ambiguous"),
        "8 or 9": ("completion", "ambiguous"),
        "No idea.": ("none", "none"),
    }
    for text, (rule, status) in expected.items():
        parsed = parse_prediction_text(text)
        assert (parsed.rule, parsed.status) == (rule, status), text
    assert parse_prediction_text(None).status == "none"


# --- echoes


def _sums(count: int = 400):
    rng = random.Random(0)
    frames = [
        "Work out the result: {a} {s} {b} =",
        "Someone left this problem unfinished on the kitchen table: {a} {s} {b} =",
        "Say the table aloud and complete it: {a} {w} {b} is",
        "A boy with {a} shells finds {b} more shells on the beach. Counting carefully, he now has",
        "What is {a} {w} {b}?",
    ]
    words = {"+": "plus", "-": "minus", "*": "times", "×": "times", "/": "divided by", "÷": "divided by"}
    for _ in range(count):
        sign = rng.choice(list(words))
        a, b = rng.randint(0, 999), rng.choice([0, 1, rng.randint(2, 99)])
        yield rng.choice(frames).format(a=a, b=b, s=sign, w=words[sign]), a, b


def test_an_echo_never_has_a_value():
    for prompt, _, _ in _sums():
        mistyped = prompt.replace("the", "teh", 1) if "the" in prompt else prompt.replace("o", "oo", 1)
        for given in (prompt, mistyped):
            for echo in (prompt, f" {prompt}", prompt.rstrip("= "), f"{prompt}\n{prompt}", prompt.upper()):
                assert parse_prediction_text(echo, given).value is None, (given, echo)
        task = prompt.rpartition(": ")[2]
        assert parse_prediction_text(task, prompt).value is None, task


def test_the_answer_behind_an_echo_is_read():
    for prompt, a, b in _sums():
        value = a * 7 + b + 1000
        assert parse_prediction_text(f"{prompt} {value}.", prompt).value == value, prompt
        assert parse_prediction_text(f" {value}\n\n{prompt} {a}", prompt).value == value, prompt


# --- numbers written and read back


def test_integers_survive_every_frame():
    rng = random.Random(1)
    frames = [
        "{}",
        " {}.",
        "The answer is {}.",
        "7 + 5 = {}",
        "\\boxed{{{}}}",
        "#### {}",
        "A: {}",
        "**{}**",
        "There are {}.",
    ]
    for _ in range(300):
        value = rng.randint(-(10 ** rng.randint(1, 9)), 10 ** rng.randint(1, 9))
        for frame in frames:
            for written in (str(value), f"{value:,}", str(value).replace("-", "−")):
                assert parse_prediction_text(frame.format(written)).value == value, frame.format(written)


def test_number_words_up_to_a_million():
    teens = "ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
    ones = f"zero one two three four five six seven eight nine {teens}".split()
    tens = ["", "", *["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]]

    def spell(n: int) -> str:
        if n < 20:
            return ones[n]
        if n < 100:
            return tens[n // 10] + (f"-{ones[n % 10]}" if n % 10 else "")
        if n < 1000:
            return f"{ones[n // 100]} hundred" + (f" and {spell(n % 100)}" if n % 100 else "")
        if n < 10**6:
            return f"{spell(n // 1000)} thousand" + (f" {spell(n % 1000)}" if n % 1000 else "")
        return "one million"

    rng = random.Random(2)
    for n in [*range(1100), *(rng.randrange(10**6) for _ in range(500)), 10**6]:
        assert words_value(spell(n)) == n, spell(n)
        if n > 1:
            assert parse_prediction_text(f"The answer is {spell(n)}.").value == n, spell(n)
    assert words_value("two three") is None


# --- comparison with gold


@pytest.mark.parametrize(
    ("response", "gold", "right"),
    [
        ("12", "12", True),
        ("12.0", "12", True),
        ("12.00", "12", True),
        ("13", "12", False),
        ("0.5", "1/2", True),
        ("1/2", "0.5", True),
        ("0.33", "1/3", True),
        ("0.333", "1/3", True),
        ("0.3", "1/3", False),
        ("0.34", "1/3", False),
        ("0.67", "2/3", True),
        ("0.66", "2/3", False),
        ("0.66...", "2/3", True),
        ("0", "1/3", False),
        ("13.33", "40/3", True),
        ("13", "40/3", False),
        ("13.3", "40/3", False),
        ("-0.33", "-1/3", True),
        ("0.33", "-1/3", False),
        ("0.13", "0.125", True),
        ("0.12", "0.125", True),
        ("0.00", "0.004", False),
        ("0.02", "0.0156", False),
        ("0.016", "0.0156", True),
        ("348", "348.5", False),
        ("349", "348.5", False),
        ("10%", "0.1", True),
        ("10%", "10", True),
        ("10%", "1", False),
        ("$18", "18", True),
        ("1,234", "1234", True),
        ("1.5e3", "1500", True),
        ("none", "0", False),
        ("", "0", False),
    ],
)
def test_match_with_gold(response, gold, right):
    assert matches_gold(parse_prediction_text(response), Fraction(gold)) is right


def test_gold_values():
    assert gold_value("12") == 12
    assert gold_value(12) == 12
    assert gold_value(0.1) == Fraction(1, 10)
    assert gold_value("She makes 9 * 2 = $<<9*2=18>>18.\n#### 18") == 18
    assert gold_value(None, "Work out: 12 * 7 =") == 84
    assert gold_value("", "Work out: 12 * 7 =") == 84
    assert gold_value("Paris") is None
    assert gold_value(None) is None
    assert gold_value(True) is None
    assert gold_value(float("inf")) is None


@pytest.mark.parametrize(
    ("prompt", "value"),
    [
        ("Solve the problem at the top of the page: 7 + 5 =", 12),
        ("6 - 9 =", -3),
        ("7 * 0 =", 0),
        ("419 × 7 =", 2933),
        ("697 ÷ 2 =", Fraction(697, 2)),
        ("697/2 =", Fraction(697, 2)),
        ("14 / 25 =", Fraction(14, 25)),
        ("2 + 3 * 4 =", 14),
        ("2 * 3 + 4 * 5 =", 26),
        ("10 - 2 - 3 =", 5),
        ("1.5 + 2.5 =", 4),
        ("−4 + 9 =", 5),
        ("how much is 9 times 400? It is", 3600),
        ("the sum of 702 and 11 is", 713),
        ("9 increased by 3 is", 12),
        ("60 divided by 2 is", 30),
        ("Question 3: 60 divided by 2 is", 30),
        ("7 / 0 =", None),
        ("(2 + 3) * 4 =", None),
        ("2 ^ 3 =", None),
        ("A boy has 8 shells and finds 3 more.", None),
        ("No numbers", None),
        ("", None),
    ],
)
def test_arithmetic_of_a_clean_prompt(prompt, value):
    assert arithmetic_value(prompt) == value


# --- safety


def _nasty() -> dict[str, str]:
    size = 30_000
    return {
        "digits": "9" * size,
        "decimals": "0." + "9" * size,
        "equals": "=" * size,
        "equations": "1=" * (size // 2),
        "thousands": "111," * (size // 4),
        "thousands that fail": "111," * (size // 4) + "1111",
        "fractions": "1/" * (size // 2),
        "nested fractions": "\\frac{" * (size // 6),
        "closed fractions": "\\frac{1}{" * (size // 9) + "}" * (size // 9),
        "braces": "\\boxed{" + "{" * size,
        "boxes": "\\boxed{" * (size // 7),
        "brackets": "(" * size + "1" + ")" * size,
        "spaces": "1" + " " * size + "2",
        "sums": "1 + " * (size // 4),
        "minus": "-" * size + "5",
        "stars": "*" * size,
        "star pairs": "*a " * (size // 3),
        "newlines": "\n" * size + "12",
        "answers": "the answer is " * (size // 14),
        "answer numbers": "the answer is 5 " * (size // 16),
        "answer colons": "answer " + ":" * size,
        "so": "So, " * (size // 4) + "12.",
        "questions": "\nQ: 5 " * (size // 6),
        "list": "".join(f"\n{i % 60 + 1}. item" for i in range(size // 9)),
        "words": "twenty " * (size // 7),
        "hundreds": "hundred and " * (size // 12),
        "letters": "x" * size,
        "exponents": "10^" * (size // 3),
        "e": "1e9" * (size // 3),
        "huge exponent": "1e999999999 2 × 10^999999999",
        "units": "5 aaaaaaaaaaaaaaa bbbbbbbbbbbbbbb " * (size // 34),
        "percent": "5 per " * (size // 6),
        "calculators": "<<" * (size // 2),
        "unicode": "−½²٣" * (size // 4),
        "angles": "<|" * (size // 2),
        "hashes": "#### " * (size // 5),
        "one sum": "1+" * (size // 2) + "1 = 5",
    }


@pytest.mark.parametrize("name", list(_nasty()))
def test_time_is_linear(name):
    text = _nasty()[name]
    for prompt in (None, text[:5000]):
        times = []
        for _ in range(3):
            start = time.process_time()
            parse_prediction_text(text, prompt)
            times.append(time.process_time() - start)
        assert min(times) / (len(text) / 1024 + 1) < 0.010


def test_random_texts_never_raise_and_are_read_twice_alike():
    rng = random.Random(3)
    pieces = [
        *"0123456789.,/%$=+-*×÷^(){}[]<>#:;!?'\"\\_ \n\t½²−…",
        "\\boxed{",
        "\\frac{",
        "####",
        "the answer is ",
        "So, ",
    ]
    pieces += [
        "twelve ",
        "half ",
        "and ",
        "times ",
        "10^",
        "e5",
        "Q: ",
        "is ",
        "million",
        "per cent",
        "\ud800",
        "\0",
        "٣",
        "1,234",
    ]
    for _ in range(3000):
        text = "".join(rng.choices(pieces, k=rng.randint(1, 40)))
        prompt = "".join(rng.choices(pieces, k=rng.randint(0, 30)))
        first = parse_prediction_text(text, prompt)
        assert parse_prediction_text(text, prompt) == first
        assert first.status in ("parsed", "ambiguous", "none")
        assert (first.value is not None) or first.status != "parsed"


def test_spans_of_numbers_are_ordered_and_lie_in_the_text():
    for response, _, _ in _cases():
        text = plain_text(response)
        numbers = find_numbers(text)
        assert all(0 <= number.start < number.end <= len(text) for number in numbers)
        assert all(a.end <= b.start for a, b in itertools.pairwise(numbers))


# --- the command


def test_command_line(capsys):
    assert main(["The answer is 97, the total of 4 and 93.", "--gold", "97"]) == 0
    line = json.loads(capsys.readouterr().out)
    assert line == {"value": "97", "rule": "answer_is", "status": "parsed", "text": "97", "gold": "97", "right": True}


def test_help_is_quick():
    subprocess.run([sys.executable, SCRIPT, "--help"], check=True, capture_output=True)
    start = time.perf_counter()
    subprocess.run([sys.executable, SCRIPT, "--help"], check=True, capture_output=True)
    assert time.perf_counter() - start < 1.0
