"""Variants of prompts: what must never change, exactly k edits, never a no-op, and the same whatever else is made."""

from __future__ import annotations

import csv
import json
import os
import re
import string
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import token_spans
from command_line import UserError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from load_json import STYLES
from make_variants import main
from rapidfuzz.distance import Levenshtein
from typos.homophone_tables import homophone_tables, read_pronunciations
from typos.languages import KEYBOARDS, is_real_word, key_neighbours, word_set, zipf
from typos.protection import protected_spans, protected_texts
from typos.variants import FRAMINGS, edit_log_path, make_variants
from typos.words import (
    FUNCTION_WORDS,
    NUMBER_WORDS,
    OFFENSIVE_WORDS,
    PROTECTED_WORDS,
    homophones,
    operation_of,
    osa_distance,
    real_word_options,
    words_in,
)

SCRIPT = Path(main.__code__.co_filename)
LATIN_KEYBOARDS = sorted(keyboard for keyboard in KEYBOARDS if key_neighbours(keyboard))
ONE_TYPO = ("main", "swap", "missing", "repeated", "noise_words", "real_word")
NON_WORD = ("main", "swap", "missing", "repeated", "two", "three", "noise_words")
PROMPTS = [
    "Please calculate the following: 12 + 7 - 3.5 =",
    "What is the sum of 12 and seven? Work it out and write the answer as a number.",
    "Explain in simple words how plants turn sunlight into sugar, and why they need water for this process.",
    "A train covers 60 kilometres in two hours. Which speed does it have on average?",
    'Translate "the quick brown fox" into French, then list each {word_type} that you find in it.',
    "Summarise the article at https://example.org/a_b?c=1 and mention `main()` as well as the code:\n    x = form(1)\n",
    "Sarah buys 5 apples and her brother brings another 3 from the market. How many apples are in the basket now?",
    "Rewrite the following sentence in a formal tone: we can't come, sorry!",
    "Compare three ways to heat a small house in winter. Which one is the cheapest, and which is the cleanest?",
    "You are a patient teacher. Describe the water cycle to children who have never heard of it before.",
]


def osa(a: str, b: str) -> int:
    """Optimal string alignment distance by its textbook recurrence."""
    d = [[i + j if i * j == 0 else 0 for j in range(len(b) + 1)] for i in range(len(a) + 1)]
    for i in range(1, len(a) + 1):
        for j in range(1, len(b) + 1):
            cost = a[i - 1] != b[j - 1]
            d[i][j] = min(d[i - 1][j] + 1, d[i][j - 1] + 1, d[i - 1][j - 1] + cost)
            if i > 1 and j > 1 and a[i - 1] == b[j - 2] and a[i - 2] == b[j - 1]:
                d[i][j] = min(d[i][j], d[i - 2][j - 2] + 1)
    return d[-1][-1]


def rows_of(prompts: list[str]) -> list[dict]:
    return [{"element_index": number, "normal": prompt} for number, prompt in enumerate(prompts, 10)]


def variants_of(row: dict) -> dict[str, str]:
    return {style: row[style] for style in STYLES if style in row}


def differing(clean: str, variant: str) -> list[tuple[str, str]]:
    """Pairs of pieces that differ, where all white space is the same."""
    assert re.sub(r"\S+", "w", clean) == re.sub(r"\S+", "w", variant)
    return [(a, b) for a, b in zip(clean.split(), variant.split(), strict=True) if a != b]


def letters(piece: str) -> str:
    return piece.strip(string.punctuation + "…“”‘’«»")


def assert_sound(clean: str, variants: dict[str, str], intensity: int = 1) -> None:
    """Everything that must hold for a row, checked without the generator's own checks."""
    from wordfreq import zipf_frequency

    for style, variant in variants.items():
        assert variant != clean, style
        assert re.findall(r"\d", clean) == re.findall(r"\d", variant), style
        count = {"two": 2, "three": 3}.get(style, intensity)
        if style in (*ONE_TYPO, "two", "three", "homonym"):
            pairs = differing(clean, variant)
            assert len(pairs) == count, (style, pairs)
            for before, after in pairs:
                if style != "homonym":
                    assert osa(before, after) == 1, (style, before, after)
                if style in NON_WORD:
                    assert zipf_frequency(letters(after), "en") < 3, (style, after)
                if style == "real_word":
                    assert zipf_frequency(letters(after), "en") >= 3, after
        if style in FRAMINGS:
            assert variant.endswith(clean)
            assert variant[: -len(clean)].strip()
        if style == "split":
            assert variant.replace("\u00ad", "") == clean.replace("\u00ad", "")
            assert variant.count("\u00ad") - clean.count("\u00ad") == count
        if style == "punctuation":
            assert re.sub(r"[\W_]", "", variant) == re.sub(r"[\W_]", "", clean)
            assert Levenshtein.distance(clean, variant) == count
        if style == "grammar":
            assert Levenshtein.distance(clean.split(), variant.split()) == count


# --- properties over arbitrary prompts

WORDS = sorted(
    word_set("calculate the following apples please explain write number which plant water often is are house")
)
PROTECTED = ["42", "3.5", "-7", "12 + 5", "seven", "twenty-one", "5 km", "`form()`", '"form of words"', "{name}", "50%",
             "https://a.org/from", "x_1", "$5", "×", "<b>", "10:30", "the form", "ANSWER"]  # fmt: skip
PIECES = st.one_of(
    st.sampled_from(WORDS),
    st.sampled_from(PROTECTED),
    st.sampled_from(
        [",", ".", "?", ":", "\n", "\t", "  ", "-", "'", '"', "\u00ad", "don't", "Well-known", "NASA", "é"]
    ),
    st.text(max_size=6),
)
ANY_PROMPT = st.lists(PIECES, min_size=1, max_size=25).map(" ".join)
QUICK = settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))


@QUICK
@given(ANY_PROMPT, st.integers(1, 3), st.integers(0, 5), st.sampled_from(LATIN_KEYBOARDS))
def test_any_prompt_keeps_protected_text_and_has_exactly_k_edits(prompt, intensity, seed, keyboard):
    row = {"normal": prompt, "task": "the form", "answer": "answer"}
    (out,), _, summary = make_variants([row], STYLES, seed, intensity, keyboard)
    variants = variants_of(out)
    if summary["bad_rows"]:
        assert not variants
        return
    assert_sound(prompt, variants, intensity)
    expected = Counter({text: prompt.count(text) for text in PROTECTED if text in prompt})
    for style, variant in variants.items():
        kept = variant.removesuffix(prompt) if style in FRAMINGS else ""
        for text, count in expected.items():
            assert variant.count(text) - kept.count(text) == count, (style, text)
        if style not in FRAMINGS:
            assert [variant[a:b] for a, b in protected_spans(variant, row)] == [
                prompt[a:b] for a, b in protected_spans(prompt, row)
            ]
            assert variant.count(":") == prompt.count(":")


@QUICK
@given(st.text(max_size=300))
def test_any_text_at_all_gives_sound_variants_or_none(prompt):
    (out,), _, _ = make_variants([{"normal": prompt}])
    assert_sound(prompt, variants_of(out))


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(ANY_PROMPT, min_size=1, max_size=6, unique=True), st.randoms(), st.booleans(), st.integers(0, 3))
def test_order_and_absence_of_other_rows_and_styles_change_nothing(prompts, rnd, with_ids, seed):
    rows = rows_of(prompts) if with_ids else [{"normal": prompt} for prompt in prompts]
    whole, _, _ = make_variants(rows, seed=seed)
    kept = rnd.sample(rows, rnd.randint(1, len(rows)))
    styles = rnd.sample(STYLES, rnd.randint(1, len(STYLES)))
    part, _, _ = make_variants(kept, styles, seed=seed)
    for row, out in zip(kept, part, strict=True):
        twin = whole[rows.index(row)]
        assert {style: twin.get(style) for style in styles} == {style: out.get(style) for style in styles}


@QUICK
@given(ANY_PROMPT)
def test_the_edit_log_replays_to_the_variant(prompt):
    (out,), log, _ = make_variants([{"normal": prompt}], intensity=2)
    for style, variant in variants_of(out).items():
        text = prompt
        for line in sorted((e for e in log if e["style"] == style), key=lambda e: -e["char_position"]):
            pairs = zip(line["before"], line["after"], strict=False)
            shared = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(line["before"]), len(line["after"])))
            start = line["char_position"] - shared
            assert text[start : start + len(line["before"])] == line["before"]
            text = text[:start] + line["after"] + text[start + len(line["before"]) :]
        assert text == variant


# --- what each style does


@pytest.fixture(scope="module")
def made():
    return make_variants(rows_of(PROMPTS))


def test_every_prompt_of_the_set_is_sound_and_every_style_is_made(made):
    rows, _, summary = made
    for row in rows:
        assert_sound(row["normal"], variants_of(row))
    for style, counts in summary["styles"].items():
        assert counts["made"] + sum(counts["lacking"].values()) == len(PROMPTS)
        assert counts["made"] >= 5, (style, counts)


def test_single_typo_styles_do_what_their_name_says(made):
    for row in made[0]:
        clean = row["normal"]
        for style, variant in variants_of(row).items():
            if style not in ("main", "swap", "missing", "repeated"):
                continue
            ((before, after),) = differing(clean, variant)
            longer = len(after) - len(before)
            assert longer == {"main": 0, "swap": 0, "missing": -1, "repeated": 1}[style]
            assert (sorted(before) == sorted(after)) == (style == "swap")
            if style == "repeated":
                assert re.search(r"(.)\1", after)


@pytest.mark.parametrize(
    ("keyboard", "near"), [("qwerty", "wsz"), ("qwertz", "wsyq"), ("azerty", "zq"), ("dvorak", "o")]
)
def test_main_takes_a_neighbour_on_the_chosen_keyboard(keyboard, near):
    assert set(near) & set(key_neighbours(keyboard)["a"])
    _, log, _ = make_variants(rows_of(PROMPTS), ["main"], keyboard=keyboard)
    assert len(log) == len(PROMPTS)
    for line in log:
        ((old, new),) = [(a, b) for a, b in zip(line["before"], line["after"], strict=True) if a != b]
        assert new in key_neighbours(keyboard)[old]


@pytest.mark.parametrize("keyboard", LATIN_KEYBOARDS)
def test_neighbourhood_of_keys_is_mutual_and_whole(keyboard):
    near = key_neighbours(keyboard)
    assert sorted(near) == list(string.ascii_lowercase)
    assert all(key in near[other] and key != other for key in near for other in near[key])


def test_known_neighbours_of_each_layout():
    assert set(key_neighbours("qwerty")["g"]) == set("ftyhbv")
    assert "z" in key_neighbours("qwertz")["t"]
    assert "q" in key_neighbours("azerty")["a"]
    assert set("ou") <= set(key_neighbours("dvorak")["e"])


def test_two_and_three_mix_kinds_of_typo(made):
    for style, count in (("two", 2), ("three", 3)):
        by_row: dict[int, list[dict]] = {}
        for line in made[1]:
            if line["style"] == style:
                by_row.setdefault(line["original_index"], []).append(line)
        assert by_row
        for lines in by_row.values():
            assert [line["edit"] for line in lines] == list(range(1, count + 1))
            assert len({line["operation"] for line in lines}) >= 2
            assert len({line["word"].lower() for line in lines}) == count


def test_split_sits_at_the_letter_that_main_replaces(made):
    place = {(e["style"], e["original_index"]): (e["word"], e["char_position"]) for e in made[1]}
    mains = [index for style, index in place if style == "main"]
    assert mains
    for index in mains:
        assert place["split", index] == place["main", index]


def test_noise_words_leaves_content_words_alone(made):
    noise = [line for line in made[1] if line["style"] == "noise_words"]
    assert noise
    assert all(line["word"].lower() in FUNCTION_WORDS for line in noise)


def test_homonyms_sound_the_same_and_are_written_differently(made):
    changed = [(e["before"].lower(), e["after"].lower()) for e in made[1] if e["style"] == "homonym"]
    assert len(changed) >= 5
    assert all(after in homophones(before) and before != after for before, after in changed)


def test_framings_leave_the_task_as_it_is(made):
    for row in made[0]:
        start, end = token_spans.task_span(row["normal"])
        for style in FRAMINGS:
            a, b = token_spans.task_span(row[style], clean=row["normal"])
            assert row[style][a:b] == row["normal"][start:end]
            assert start == 0 or token_spans.task_span(row[style]) == (a, b)  # where a colon says so, too


def test_framings_hold_nothing_that_a_task_could_be_confused_with():
    for sentences in FRAMINGS.values():
        assert len(set(sentences)) == len(sentences) >= 12
        for sentence in sentences:
            assert protected_texts(sentence, {"answer": "5"}) == []
            assert not re.search(r"[:\d\"“”{}\n]", sentence)


def test_framings_vary_over_rows():
    rows, _, _ = make_variants([{"element_index": i, "normal": "12 + 3 ="} for i in range(200)])
    assert len({row["polite"] for row in rows}) == len(FRAMINGS["polite"])


def test_every_variant_has_something_to_mark_as_edited(made):
    for row in made[0]:
        for style, variant in variants_of(row).items():
            in_clean, in_variant = token_spans.edited_spans(row["normal"], variant)
            assert in_variant, style
            if style not in (*FRAMINGS, "grammar", "punctuation"):
                assert in_clean, style


@pytest.mark.parametrize(
    ("prompt", "row"),
    [
        ("12 + 7 =", {}),
        ("{question}", {}),
        ("«Formule de politesse»", {}),
        ("work out the form", {"task": "work out the form"}),
        ("NASA ISO-9001 foo_bar", {}),
    ],
)
def test_a_prompt_without_a_free_word_gets_framings_alone(prompt, row):
    (out,), _, summary = make_variants([{"normal": prompt, **row}])
    assert set(variants_of(out)) == set(FRAMINGS)
    assert sum(sum(c["lacking"].values()) for c in summary["styles"].values()) == len(STYLES) - 3


def test_a_prompt_of_unknown_language_and_script_has_no_style():
    (out,), _, summary = make_variants([{"normal": "计算以下内容"}])
    assert not variants_of(out)
    assert all("_language" in reason for counts in summary["styles"].values() for reason in counts["lacking"])


def test_operator_words_units_and_labels_stay_in_arithmetic():
    prompt = "Question: take seven from twenty, plus half of the remaining kilometres. Answer:"
    protected = protected_texts(prompt)
    for text in ("Question:", "take", "seven", "from", "twenty", "plus", "half", "remaining", "kilometres", "Answer:"):
        assert any(text in piece for piece in protected), text


@pytest.mark.parametrize(
    ("text", "protected"),
    [
        ("It costs $12.50, or 10% less.", ["$12.50", "10%"]),
        ("Mind the -7 and the ½ litre", ["-7", "½"]),
        ("see https://a.org/x?y=1, www.b.com or me@c.de!", ["https://a.org/x?y=1", "www.b.com", "me@c.de"]),
        ("call foo() or a.b, x_1 and C:\\dir", ["foo()", "a.b", "x_1", "C:\\dir"]),
        ("fill in {the name} and [date] and <b>", ["{the name}", "[date]", "<b>"]),
        ("say \"good morning\" and 'my dear' now", ['"good morning"', "'my dear'"]),
        ("run `let it be` or\n```\nsome code\n```\nthen stop", ["`let it be`", "```\nsome code\n```"]),
        ("Take twenty-one of them", ["twenty-one"]),
        ("It is 5 km or three miles long", ["5", "km", "three miles"]),
        ("nothing here, it's all free", []),
    ],
)
def test_what_is_protected(text, protected):
    found = protected_texts(text)
    for piece in protected:
        assert any(piece in one for one in found), (piece, found)
    assert bool(found) == bool(protected)
    free = re.sub("|".join(re.escape(piece) for piece in found) or "$^", "", text)
    assert not re.search(r"\d|[{}<>@]", free)


def test_words_that_only_decide_arithmetic_are_free_elsewhere():
    assert protected_texts("Explain the difference between power and a product from France.") == []


def test_task_and_answer_of_the_row_are_protected_wherever_they_stand():
    text = "Is Paris the capital? Think of paris, then solve: apples and pears"
    protected = protected_texts(text, {"task": "apples and pears", "answer": "Paris"})
    assert protected == ["Paris", "paris", "apples and pears"]
    assert protected_texts(text, {"answer": ["capital", "pears"]}) == ["capital", "pears"]


@pytest.mark.parametrize("intensity", [1, 2, 3])
def test_intensity_is_the_number_of_edits(intensity):
    prompt = PROMPTS[2] + " " + PROMPTS[6] + " " + PROMPTS[8]
    (row,), log, summary = make_variants([{"normal": prompt}], intensity=intensity)
    assert all(counts["made"] for counts in summary["styles"].values())
    per_style = Counter(line["style"] for line in log)
    fixed = {"two": 2, "three": 3, "polite": 1, "urgent": 1, "rude": 1}
    assert per_style == {style: fixed.get(style, intensity) for style in STYLES}
    assert_sound(prompt, variants_of(row), intensity)


def test_another_seed_gives_other_variants_and_the_same_targets():
    first, log_a, _ = make_variants(rows_of(PROMPTS), seed=1)
    second, log_b, _ = make_variants(rows_of(PROMPTS), seed=2)
    assert first != second
    assert [e["word"] for e in log_a if e["style"] == "main"] == [e["word"] for e in log_b if e["style"] == "main"]


def all_variants_of(prompt: str, style: str, seeds: int = 60) -> set[str]:
    """What any of many seeds makes of a prompt."""
    made = [make_variants([{"normal": prompt}], [style], seed)[0][0] for seed in range(seeds)]
    return {row[style] for row in made if style in row}


@pytest.mark.parametrize(
    ("prompt", "sound"),
    [
        ("Solve the problem that you find here now.", "you found"),
        ("Read this aloud, then do this quickly.", "these"),
        ("Keep those with care.", "that"),
        ("Say what happens if the price was higher.", "were"),
        ("Our team is late today.", "are"),
        ("Which is the best road?", "Which are"),
        ("None of them has time.", "have"),
        ("Describe an historic day.", "a historic"),
        ("Choose a, b or c now.", "an,"),
        ("Choose one: a) bread or b) tea.", "an)"),
        ("Explain how a becomes b here.", "an becomes"),
    ],
)
def test_a_slip_of_grammar_is_none_where_both_forms_are_right(prompt, sound):
    made = all_variants_of(prompt, "grammar")
    assert made, "another slip is possible"
    assert not [text for text in made if sound in text]


def slips_of_form(prompt: str) -> set[str]:
    """What any of many seeds makes of a prompt, without doubled words and articles."""
    changed = {text for text in all_variants_of(prompt, "grammar", 30) if len(text.split()) == len(prompt.split())}
    return {text for text in changed if re.sub(r"\b(a|an|An)\b", "A", text) != re.sub(r"\b(a|an|A)\b", "A", prompt)}


@pytest.mark.parametrize(
    "prompt",
    [
        "These fish swim fast.",
        "Those sheep eat grass.",
        "These species live here.",
        "These big white sheep belong to him.",
        "These Japanese live in the north.",
        "The fish are swimming.",
        "The deer was here.",
        "Two moose were on the road.",
        "The aircraft that they bought is new.",
        "This series is on the shelf.",
        "The crossroads is dangerous.",
        "My headquarters is here.",
        "These means have failed.",
        "The jury has voted and the staff is happy.",
        "A number of people are waiting.",
        "Five dollars is enough.",
        "There is a dog and a cat here.",
        "I suggest that she have a rest.",
        "We recommended that Dr. Watson do it.",
        "They demand he have it by noon.",
        "He thought it vital that she have a rest.",
        "The doctor insists that he does it daily.",
        "The teacher asked that everybody have it.",
        "If he was rich, all cheered.",
        "I wish it were so.",
        "Were he here, all cheered.",
        "Long live the king!",
        "I know those boys cry.",
        "They cut the bread and give it away.",
        "List prices rise.",
        "This caused trouble.",
    ],
)
def test_what_another_form_leaves_right_takes_no_slip_of_form(prompt):
    assert slips_of_form(prompt) == set()


@pytest.mark.parametrize(
    ("prompt", "slip"),
    [
        ("These apples are red.", "This apples are red."),
        ("These apples are red.", "These apples is red."),
        ("The dogs were here.", "The dogs was here."),
        ("My brother is here.", "My brother are here."),
        ("I think that she has a dog.", "I think that she have a dog."),
        ("He says that she does it.", "He says that she do it."),
        ("Those of you who know this book are lucky.", "Those of you who know these book are lucky."),
        ("Add the parts and write the sum here.", "Add the parts and wrote the sum here."),
        ("List the names.", "Lists the names."),
    ],
)
def test_a_slip_of_form_that_is_wrong_for_sure_is_made(prompt, slip):
    assert slip in all_variants_of(prompt, "grammar")


def edited_first(prompt: str) -> str:
    """The word that takes the first typo."""
    (line,) = make_variants([{"normal": prompt}], ["main"])[1]
    return line["word"]


@pytest.mark.parametrize(
    ("prompt", "names"),
    [
        ("Ask Dr. Watson about the weather today.", {"Watson"}),
        ("Mrs. Adams sold apples (e.g. Granny Smith) at the market.", {"Granny", "Smith", "Adams", "Mrs"}),
        ("We met J. R. Rowland near the garden.", {"Rowland"}),
        ("They live in St. Albans near the market.", {"Albans"}),
        ("Prof. Winslow teaches chemistry here.", {"Prof", "Winslow"}),
        ("the winner: Watson from the garden", {"Watson"}),
        ('he said "hello" Watson in the garden', {"Watson"}),
        ("we watched football vs. Arsenal in the rain", {"Arsenal"}),
    ],
)
def test_names_come_after_all_other_words(prompt, names):
    assert edited_first(prompt) not in names


@pytest.mark.parametrize(
    ("prompt", "first"),
    [
        ("It rained. Umbrellas were sold.", "Umbrellas"),
        ("Is it so? Umbrellas were sold.", "Umbrellas"),
        ("So said I. Umbrellas were sold.", "Umbrellas"),
        ('She said "no." Umbrellas were sold.', "Umbrellas"),
    ],
)
def test_a_capital_after_the_end_of_a_sentence_makes_no_name(prompt, first):
    assert edited_first(prompt) == first


def free_text(prompt: str, row: dict | None = None) -> str:
    """What an edit may touch."""
    parts, done = [], 0
    for start, end in [*protected_spans(prompt, row), (len(prompt), len(prompt))]:
        parts, done = [*parts, prompt[done:start]], end
    return " | ".join(parts)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("Halve the 12 apples and give 3 to Tom.", "Halve"),
        ("The 12 apples were halved and 3 were sold.", "halved"),
        ("The price of 12 dollars doubled and 3 coins were lost.", "doubled"),
        ("What is the mean of 12 and 30?", "mean"),
        ("Find the means, medians and modes of 3, 4 and 5.", "means medians modes"),
        ("What is the median of 12, 14 and 30?", "median"),
        ("A gross of pens and 3 more cost 12.", "gross"),
        ("What is 5 factorial divided by 3?", "factorial divided"),
        ("What is the factorial of seven?", "factorial"),
        ("What is 9 squared?", "squared"),
        ("Tripling 4 and cubing 3 gives what?", "Tripling cubing"),
        ("One twelfth of the 36 pupils, two fifteenths of the rest", "twelfth"),
        ("The quotient and the remainder of 17 and 5", "quotient remainder"),
        ("A score of men and a couple of boys ate 30 per cent of 12 pies", "score couple per cent"),
        ("He has twice as many pairs as she has: 4 and 3 apiece", "twice pairs apiece"),
    ],
)
def test_words_that_decide_a_calculation_are_protected_in_maths(prompt, words):
    free = set(words_in(free_text(prompt)))
    assert free.isdisjoint(words.split())
    assert free.isdisjoint(word for word in words_in(prompt) if word in NUMBER_WORDS)


@pytest.mark.parametrize(
    "prompt",
    [
        "Explain what the idiom could mean in a product review.",
        "Describe the power of a gross mistake in a couple of sentences.",
        "Which double standards does the median voter score highest?",
        "What does the sentence mean to a reader who is odd and even round?",
        "Write 3 lines about what 2 idioms could mean.",
    ],
)
def test_the_same_words_are_free_in_an_instruction(prompt):
    for word in ("mean", "product", "gross", "couple", "median", "score", "odd", "round", "power"):
        if word in prompt.split():
            assert word in free_text(prompt)


QUOTES = ["„{}“", "„{}”", "»{}«", "«{}»", "« {} »", "``{}''", "<q>{}</q>", "‚{}‘", "‘{}’", "「{}」", "『{}』", "‹{}›",
          "›{}‹", '"{}"', "“{}”", "'{}'", "”{}”", "《{}》", "<code>{}</code>", "<pre>\n{}\n</pre>", "`{}`", "``{}``",
          "${}$", "$${}$$", "\\({}\\)", "\\[{}\\]", "\n```\n{}\n```\n", "\n~~~\n{}\n~~~\n",
          "\\begin{{align}}{}\\end{{align}}"]  # fmt: skip


@pytest.mark.parametrize("marks", QUOTES)
@pytest.mark.parametrize("inner", ["good morning, brave garden", "speed = distance / time", "don't edit it"])
def test_whatever_stands_in_quotation_marks_code_or_a_formula_is_protected_and_no_more(marks, inner):
    if inner.startswith("don't") and marks in ("'{}'",):
        inner = inner.replace("'", "’")
    prompt = f"Please translate {marks.format(inner)} into French, and then {marks.format(inner)} into Welsh."
    free = " ".join(re.findall(r"[a-zA-Z]+", free_text(prompt)))
    assert free == "Please translate into French and then into Welsh"
    for style in ("main", "three", "punctuation", "homonym"):
        for text in all_variants_of(prompt, style, 5):
            assert text.count(marks.format(inner)) == 2


@pytest.mark.parametrize(
    "prompt",
    [
        "It costs $5 today and $6 tomorrow for members",
        "Prices in US$ and in A$ differ widely",
        "The dogs' bowl isn't near the cats' garden",
        "Don't forget that it's the pupils’ garden and she’s late",
        "We paid $5, then they paid $7, so apples were dear",
        "It is ~ five miles ~ from the garden",
        "He is 5 < 6 years and > 3 years old here",
    ],
)
def test_marks_that_quote_nothing_protect_no_words(prompt):
    words = [word for word in words_in(prompt) if word not in PROTECTED_WORDS and word not in ("US", "A")]
    assert [word for word in words if word in free_text(prompt)] == words


@pytest.mark.parametrize(
    ("prompt", "labels"),
    [
        ("User: Please describe the garden.\nAssistant:", ["User:", "Assistant:"]),
        ("user: Please describe the garden.\nassistant:", ["user:", "assistant:"]),
        ("Premise: gardens are green.\nHypothesis: Green gardens exist.", ["Premise:", "Hypothesis:"]),
        ("Premise: A man sleeps. Hypothesis: He is awake. Label:", ["Premise:", "Hypothesis:", "Label:"]),
        ("Sentence 1: gardens are green.\nSentence 2: green gardens exist.", ["Sentence 1:", "Sentence 2:"]),
        ("English: good morning friends\nFrench:", ["English:", "French:"]),
        ("Review: lovely garden.\nSentiment:", ["Review:", "Sentiment:"]),
        ("Source text: good garden\n  Final Translation :", ["Source text:", "Final Translation :"]),
        ("Question: which garden?\nAnswer:", ["Question:", "Answer:"]),
        ("English： good morning friends", ["English："]),
    ],
)
def test_labels_are_protected(prompt, labels):
    assert protected_texts(prompt) == labels
    for style in ("main", "three", "punctuation"):
        for text in all_variants_of(prompt, style, 10):
            assert all(label in text for label in labels)


@pytest.mark.parametrize(
    ("prompt", "word"),
    [
        ("Calculate: lovely numbers", "Calculate"),
        ("Translate this: lovely garden", "Translate"),
        ("Please work out the following: lovely garden", "following"),
        ("Kindly translate: garden", "Kindly"),
        ("The meeting begins at Nine:thirty sharp", "sharp"),
        ("Rewrite the sentence in the garden: lovely", "garden"),
        ("Consider that: the garden looks lovely", "Consider"),
    ],
)
def test_an_instruction_before_a_colon_is_no_label_and_can_be_edited(prompt, word):
    assert word in free_text(prompt)
    made = all_variants_of(prompt, "main", 10) | all_variants_of(prompt, "three", 10)
    assert not made or any(text.split(":")[0] != prompt.split(":")[0] for text in made)


def test_slips_of_grammar_that_stay():
    made = all_variants_of("Can you find this road? A red car has an engine.", "grammar")
    for slip in ("you found", "you finds", "these road", "An red", "car have", "a engine"):
        assert any(slip in text for text in made), slip


def test_a_stray_comma_stands_where_none_can_be_right():
    made = all_variants_of("In the morning we walk along the river and talk because it helps", "punctuation")
    commas = {text.split(",")[0].split()[-1] for text in made if "," in text}
    assert commas == {"the"}


@pytest.mark.parametrize(("word", "other"), [("practise", "practice"), ("forget", "forgot"), ("defence", "defense")])
def test_real_word_makes_no_other_form_or_spelling_of_the_word(word, other):
    assert is_real_word(other)
    assert osa_distance(word, other) == 1
    assert other not in real_word_options(word)
    assert word not in real_word_options(other)


def test_no_edit_makes_an_insult():
    prompts = [f"Please count every {word} on the list" for word in ("sheet", "duck", "beach", "count", "cook", "fact")]
    for seed in range(30):
        rows, _, _ = make_variants(rows_of(prompts), seed=seed)
        words = {w for row in rows for v in variants_of(row).values() for w in words_in(v.lower())}
        assert not words & OFFENSIVE_WORDS


# --- the log


def test_the_log_tells_distance_and_frequency(made):
    from wordfreq import zipf_frequency

    for line in made[1]:
        if line["style"] in (*ONE_TYPO, "two", "three"):
            assert line["osa_distance"] == osa(line["before"], line["after"]) == 1
            assert line["zipf_before"] == pytest.approx(zipf_frequency(line["before"], "en"), abs=0.011)
            assert line["zipf_after"] == pytest.approx(zipf_frequency(line["after"], "en"), abs=0.011)
            assert line["real_word"] == (line["style"] == "real_word")
        if line["word"]:
            piece = PROMPTS[line["original_index"]].split()[line["word_position"]]
            assert line["word"] in piece


def test_token_counts_are_those_of_the_words_in_their_places(made):
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")  # every character is a token
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[UNK]")
    _, log, _ = make_variants(rows_of(PROMPTS[:4]), intensity=2, tokenizer=tokenizer)
    assert log
    for line in log:
        assert line["tokens_before"] == len(line["before"])
        assert line["tokens_after"] == len(line["after"].rstrip())


# --- words and homophones


def test_zipf_is_that_of_wordfreq():
    from wordfreq import zipf_frequency

    for word in ("the", "From", "calculate", "photosynthesis", "teh", "it's", "qzxv"):
        assert zipf(word) == pytest.approx(zipf_frequency(word, "en"), abs=0.011)


def test_homophones_are_mutual_and_no_spelling_variants():
    tables = json.loads((SCRIPT.parents[1] / "homophones.json").read_text(encoding="utf-8"))
    assert "Carnegie Mellon University" in " ".join(tables["licence"])
    table = {word: others.split() for word, others in tables["homophones"].items()}
    assert len(table) > 1000
    for word, others in table.items():
        assert word not in others
        assert all(word in table[other] for other in others)
    for a, b in (("would", "wood"), ("find", "fined"), ("write", "right"), ("their", "there"), ("its", "it's")):
        assert b in table[a]
    for a, b in (("would", "wallet"), ("color", "colour"), ("gray", "grey"), ("john", "jon"), ("read", "red")):
        assert b not in table.get(a, [])


def test_homophone_tables_follow_the_pronunciations(tmp_path):
    source = tmp_path / "cmudict.dict"
    source.write_text("wood W UH1 D\nwould W UH1 D\nred R EH1 D\nread R EH1 D\nread(2) R IY1 D\nreed R IY1 D # plant\n")
    pronunciations = read_pronunciations(source)
    sure, sometimes = homophone_tables(pronunciations, pronunciations)
    assert sure == {"wood": ["would"], "would": ["wood"]}
    assert sometimes == {"read": ["red", "reed"], "red": ["read"], "reed": ["read"]}


def test_operations_are_named_rightly():
    for before, after, operation in (
        ("hotel", "hoyel", "substitution"),
        ("hotel", "htoel", "transposition"),
        ("hotel", "hotl", "deletion"),
        ("hotel", "hottel", "doubling"),
        ("hotel", "hotels", "insertion"),
        ("hotel", "Hotel", None),
        ("hotel", "hoetls", None),
    ):
        assert operation_of(before, after) == operation


# --- as a command


@pytest.fixture
def prompt_file(tmp_path):
    path = tmp_path / "prompts.json"
    rows = [*rows_of(PROMPTS), {"element_index": 99}, "no row", {"normal": 5}]
    rows[0] |= {"task": "12 + 7 - 3.5", "answer": 15.5, "_template": "t1", "main": "an old variant"}
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def test_command_writes_rows_and_log_and_tells_of_bad_rows(prompt_file, tmp_path, capsys):
    output = tmp_path / "out" / "all.json"
    assert main(["--prompt_file", str(prompt_file), "--output_file", str(output)]) == 1
    rows = json.loads(output.read_text(encoding="utf-8"))
    assert rows[-3:] == [{"element_index": 99}, "no row", {"normal": 5}]
    assert {key: rows[0][key] for key in ("task", "answer", "_template")} == {
        "task": "12 + 7 - 3.5", "answer": 15.5, "_template": "t1"
    }  # fmt: skip
    assert rows[0]["main"] != "an old variant"
    with open(edit_log_path(output), encoding="utf-8", newline="") as log_file:
        log = list(csv.DictReader(log_file))
    assert list(log[0])[:3] == ["style", "original_index", "element_index"]
    assert {(e["style"], int(e["original_index"])) for e in log} == {
        (style, index) for index, row in enumerate(rows[:-3]) for style in variants_of(row)
    }
    told = capsys.readouterr().err
    assert "row 11 has no clean prompt" in told
    assert "row 12 is not an object" in told
    assert "lack it" in told


def test_two_processes_write_the_same_bytes(prompt_file, tmp_path):
    written = []
    for hash_seed in ("0", "12345"):
        output = tmp_path / f"{hash_seed}.json"
        command = [sys.executable, str(SCRIPT), "--prompt_file", str(prompt_file), "--output_file", str(output)]
        done = subprocess.run(command, env={**os.environ, "PYTHONHASHSEED": hash_seed}, capture_output=True, text=True)
        assert done.returncode == 1, done.stderr
        written.append((output.read_bytes(), edit_log_path(output).read_bytes()))
    assert written[0] == written[1]


def test_clean_prompts_under_instruction_stay_there(tmp_path):
    rows, _, _ = make_variants([{"instruction": PROMPTS[2]}])
    assert rows[0]["instruction"] == PROMPTS[2]
    assert "normal" not in rows[0]
    assert "main" in rows[0]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--styles", "mian"], "no such style: mian"),
        (["--styles", "main", "main"], "named twice"),
        (["--intensity", "0"], "--intensity 0"),
        (["--tokenizer", "/no/such/folder"], "/no/such/folder"),
    ],
)
def test_wrong_options_are_told_in_one_line(prompt_file, tmp_path, options, told):
    with pytest.raises(UserError, match=re.escape(told)):
        main(["--prompt_file", str(prompt_file), "--output_file", str(tmp_path / "o.json"), *options])


def test_the_prompt_file_is_not_overwritten(prompt_file):
    with pytest.raises(UserError, match="choose another"):
        main(["--prompt_file", str(prompt_file), "--output_file", str(prompt_file)])


@pytest.mark.stress
def test_a_thousand_prompts_in_every_style_take_under_ten_seconds():
    zipf("warm")
    texts = [f"{PROMPTS[i % len(PROMPTS)]} Case {i}." for i in range(1000)]
    started = time.process_time()
    rows, _, _ = make_variants(rows_of(texts))
    assert time.process_time() - started < 10
    assert sum(len(variants_of(row)) for row in rows) > 12000
