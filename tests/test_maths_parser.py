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
from maths import maths_symbolic
from maths.maths_symbolic import answer_expression, expression_of_gold, is_expression, same_expression
from maths.numerals import find_numbers, plain_text, words_value
from parse_predictions import (
    arithmetic_value,
    gold_value,
    judge,
    main,
    matches_gold,
    parse_prediction_text,
    read_gold,
)

CASES_FILE = Path(__file__).parent / "data" / "maths_answers.tsv"
SCRIPT = Path(__file__).parents[1] / "3_maths_eval" / "run_scripts" / "parse_predictions.py"


def _cases() -> list[tuple[str, str | None, Fraction | None]]:
    cases = []
    for line in CASES_FILE.read_text(encoding="utf-8").split("\n"):
        if line and not line.startswith("# "):
            response, prompt, answer = line.split("\t")
            text, given = (
                part.replace("\\\\", "\0").replace("\\n", "\n").replace("\0", "\\") for part in (response, prompt)
            )
            cases.append((text, given or None, None if answer == "none" else Fraction(answer)))
    return cases


def test_there_are_at_least_600_hand_written_answers():
    assert len(set(_cases())) >= 600


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


# a gold answer = its value
_NUMBERS = r"""
12=12|1,234=1234|$18=18|€5=5|+7=7|.5=1/2|-.5=-1/2|25%=1/4|12.5 %=1/8|3/4=3/4|-3/4=-3/4|\frac12=1/2
\dfrac{9}{7}=9/7|-\frac{1}{8}=-1/8|\$40=40|187.5=187.5|12 apples=12|x = 5=5|7 + 5 = 12=12|twelve=12
#### 18=18|100^\circ=100|60^\circ=60|11,\! 111,\! 111,\! 100=11111111100|1 1/2=3/2|1\frac12=3/2
2\frac58=21/8|10\%=1/10|10\text{ cm}^2=10|10 square units=10|1.5M=1500000|12 000=12000|1 in 6=1/6
2^{10}=1024|45,50 €=45.5|The answer is 12.=12|She makes 9 * 2 = $18 a day.=18|\boxed{7}=7
$-\frac{1}{2}$=-1/2|3.0=3|1e3=1000|10^{-3}=1/1000|3 \times 10^8=300000000|2\frac{1}{2}=5/2|-7=-7|−7=-7|7,=7
(7)=7|18 eggs=18|٣٥=35|$1,250.50=1250.5|k = 2=2|10,000,000=10000000|0.\overline{3}=1/3|0.333...=0.333
f(x) = 3=3|1{,}000=1000|15\mbox{ cm}^2=15|5 \text{ inches}=5|72^{\circ}=72|3\text{ hours}=3|15,000=15000
16\frac{2}{3}\%=1/6|2.5\text{ million}=2500000|\frac{1}{2}\%=1/200
"""
_EXPRESSIONS = r"""
\sqrt{5}|2 \pi|\frac{3 \pi}{4}|-\frac{\sqrt{3}}{2}|12, 10, 6|4,6,14,15|x \in [-2,7]|[0,\infty)|(1,3,3)
\left( \frac{3}{2}, -13 \right)|\begin{pmatrix} 3 & -3 \\ 4 & -2 \end{pmatrix}|2\cos 15^{\circ}|6+9i
\frac{x+2}{7}|7(x+3) (x-3)|y^4-2y^3+7y^2+y-5|20x + 23y + 26z - 69 = 0|32R^2 - 3(a^2 + b^2 + c^2)
0, \pi, 2 \pi|\frac{3}{5}, \frac{117}{125}|(-\sqrt{3}, \sqrt{3})
\left(-\infty,-\frac 12\right)\cup \left(-\frac 12,\infty\right)|4210_{7}|3:2|6 \text{ or } 7|5!
4\sqrt{13}+4\sqrt{2}|\sqrt{17}|\pm\frac{1}{2}|128\pi|\log_2 3|x^2|-2 < x < 3|x > 5|2x|(5,\infty)|5 or 6|5; 6
3+4|2 * 3|1/2, 3/4
"""
_NEITHER = "\\text{(E)}|Paris|odd|20:34|2 hours 30 minutes|5 pm|2020-05-12|May 5|no solution|None|\\text{Tuesday}"


def _listed(text: str) -> list[str]:
    return [part for line in text.strip().split("\n") for part in line.split("|")]


@pytest.mark.parametrize("gold", _listed(_NUMBERS))
def test_a_gold_answer_that_is_a_number(gold):
    text, _, value = gold.rpartition("=")
    assert gold_value(text) == Fraction(value)


@pytest.mark.parametrize("gold", [*_listed(_EXPRESSIONS), *_listed(_NEITHER)])
def test_a_gold_answer_that_is_no_number(gold):
    assert gold_value(gold) is None
    assert is_expression(gold) is (gold in _listed(_EXPRESSIONS))


def test_other_gold_values():
    assert gold_value("work 3 + 4 = 7\n#### 1,800") == 1800
    assert gold_value(12) == 12
    assert gold_value(0.1) == Fraction(1, 10)
    assert gold_value("She makes 9 * 2 = $<<9*2=18>>18.\n#### 18") == 18
    assert gold_value(None, "Work out: 12 * 7 =") == 84
    assert gold_value("", "Work out: 12 * 7 =") == 84
    assert gold_value(None) is None
    assert gold_value(True) is None
    assert gold_value(float("inf")) is None


@pytest.mark.parametrize(
    ("response", "right"), [("28", True), ("28%", True), ("0.28", True), ("2.8", False), ("28.00", True), ("29", False)]
)
def test_a_percent_gold(response, right):
    assert matches_gold(parse_prediction_text(f"The answer is {response}."), gold_value("28%")) is right


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


# --- expressions


@pytest.mark.parametrize(
    ("gold", "response", "right"),
    [
        ("11\\sqrt{2}", "So \\boxed{11\\sqrt2}.", True),
        ("11\\sqrt{2}", "The answer is $11\\sqrt{2}$.", True),
        ("9\\pi", "The answer is 9π.", True),
        ("9\\pi", "The area is $9\\pi$ square cm.", True),
        ("(3, \\frac{\\pi}{2})", "\\boxed{(3,\\pi/2)}", True),
        ("3x+2", "#### 2+3x", True),
        ("3x+2", "The answer is f(x) = 3x + 2.", True),
        ("\\pm 2", "\\boxed{2}, \\boxed{-2}", True),
        ("7,9,12,13", "The answer is 7, 9, 12 and 13.", True),
        ("7,9,12,13", "The answer is 7, 9, 12.", False),
        ("[-2,7]", "\\boxed{x \\in [-2,7]}", True),
        ("[-2,7]", "\\boxed{(-2,7)}", False),
        ("x^2+1", "The answer is x**2 + 1.", True),
        ("[0,\\infty)", "The answer is [0, ∞).", True),
        ("\\sqrt{2}", "√2", True),
        ("\\sqrt{2}", "The answer is sqrt(2), which is irrational.", True),
        (
            "\\begin{pmatrix} 3 & -3 \\\\ 4 & -2 \\end{pmatrix}",
            "\\boxed{\\begin{pmatrix}3&-3\\\\4&-2\\end{pmatrix}}",
            True,
        ),
        ("x=1 or x=2", "$x=1$ or $x=2$", True),
        ("x^{10}", "The answer is x^10.", True),
        ("\\frac{\\sqrt{3}}{2}", "\\boxed{\\frac{\\sqrt3}2}", True),
        ("20x+23y=69", "\\boxed{40x+46y=138}", True),
        ("2x", "<think>The answer is 3x</think>The answer is 2x.", True),
        ("2\\pi", "The answer is 2*pi", True),
        ("\\{1,2\\}", "\\boxed{\\{2,1\\}}", True),
        ("(1,2)", "\\boxed{(2,1)}", False),
        ("\\sqrt{2}", "I do not know.", False),
        ("6+9i", "\\boxed{9i+6}", True),
        ("x > 5", "\\boxed{(5,\\infty)}", True),
        ("y=2x+3", "\\boxed{2x+3}", True),
        ("3:2", "The answer is 3:2.", True),
        ("-\\frac{\\sqrt{3}}{2}", "The answer is $-\\frac{\\sqrt{3}}{2}$.", True),
        ("[0,1]", "\\boxed{0 \\le x \\le 1}", True),
        ("7x", "The answer is 7x dollars.", True),
        ("2\\sqrt{3}", "The answer is 3.46.", False),
        ("x+1", "The answer is $x+1$, because so.", True),
        ("11\\sqrt{2}", "<think>\\boxed{11\\sqrt{3}}</think>\n\n**Answer:** $11\\sqrt{2}$", True),
        ("2:3", "The ratio is 2 to 3. The answer is 2:3.", True),
    ],
)
def test_expressions_are_compared_symbolically(gold, response, right):
    assert expression_of_gold(gold) == gold
    answer = answer_expression(response)
    assert (answer is not None and same_expression(gold, answer)) is right


@pytest.mark.parametrize(
    ("gold", "response", "right"),
    [
        ("120", "\\boxed{5!}", True),
        ("4", "\\boxed{\\sqrt{16}}", True),
        ("5", "\\boxed{2x+3y=5}", False),
        ("5", "\\boxed{x=5}", True),
        ("3", "\\boxed{x > 3}", False),
        ("2", "\\boxed{\\pm 2}", False),
        ("8", "\\boxed{8 \\text{ or } 9}", False),
        ("1.5", "The answer is 3:2.", False),
        ("70,110", "\\boxed{70, 110}", True),
        ("3,75", "The answer is 3.75.", True),
        ("5", "The answer is at least 5.", False),
        ("12", "", False),
        ("2:30", "The answer is 2:30.", None),
    ],
)
def test_verdicts(gold, response, right):
    assert judge(response, None, read_gold(gold))[1] is right


def test_an_expression_of_the_prompt_is_no_answer():
    assert answer_expression("\\boxed{\\sqrt{50}}", "Simplify \\sqrt{50}.") is None
    assert answer_expression("\\boxed{5\\sqrt{2}}", "Simplify \\sqrt{50}.") == "5\\sqrt{2}"


def test_a_gold_that_cannot_be_parsed_is_none():
    assert expression_of_gold("\\sqrt{") is None
    assert expression_of_gold("Paris") is None


def test_a_huge_power_ends_and_nothing_is_executed(monkeypatch, tmp_path):
    monkeypatch.setattr(maths_symbolic, "SECONDS", 1.0)
    start = time.monotonic()
    assert same_expression("9^{9^{9^{9}}}", "1") is False
    assert time.monotonic() - start < 60
    assert same_expression("2x", "x + x") is True  # a new process
    assert same_expression("x", f"__import__('os').system('touch {tmp_path}/made')") is False
    assert not list(tmp_path.iterdir())


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
        "thinking": "<think>" * (size // 7),
        "closed thinking": "<think>5</think>" * (size // 16),
        "matrices": "\\begin{matrix} 1 & 2 " * (size // 21),
        "LaTeX fractions": "\\frac{1}{2}" * (size // 11),
        "struck": "~~5 " * (size // 4),
        "groups": "1 000 " * (size // 6),
        "odds": "1 in " * (size // 5),
        "tuples": "(1, 2" * (size // 5),
        "powers": "2^2^" * (size // 4),
        "Chinese": "答案是十" * (size // 4),
        "boxes in a row": "\\boxed{5}, " * (size // 11),
        "totals": "Total: 5\n" * (size // 9),
        "quests": "\nWhat is " * (size // 9),
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
        assert min(times) / (len(text) / 1024 + 1) < 0.06  # seconds a KiB; a quadratic one takes a multiple


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


def test_command_line_with_an_expression(capsys):
    assert main(["The area is \\boxed{\\pi\\cdot 9}.", "--gold", "9\\pi"]) == 0
    line = json.loads(capsys.readouterr().out)
    assert (line["rule"], line["gold"], line["right"]) == ("symbolic", "9\\pi", True)


def test_help_is_quick():
    subprocess.run([sys.executable, SCRIPT, "--help"], check=True, capture_output=True)
    start = time.perf_counter()
    subprocess.run([sys.executable, SCRIPT, "--help"], check=True, capture_output=True)
    assert time.perf_counter() - start < 1.0
