"""Regions of tokens, on byte-level BPE, SentencePiece-like and WordPiece tokenizers, with accents and emoji."""

from __future__ import annotations

import pytest
import tiny_models
from command_line import UserError
from hypothesis import given, settings
from hypothesis import strategies as st
from token_spans import (
    BASE_REGIONS,
    character_regions,
    edited_spans,
    region_mask,
    render_prompt,
    task_span,
    words_of,
)

KINDS = ["bytes", "metaspace", "wordpiece"]
PROMPTS = [
    ("Please calculate the sum: 7 + 5 =", "Please calcualte the sum: 7 + 5 ="),
    ("Résumé, café 😀 naïve words: ½ × 3 − 1 =", "Résumé, cafe 😀 naïve words: ½ × 3 − 1 ="),
    ("🎉🎉 Sum:  7 + 5\n=", "🎉🎉 Smu:  7 + 5\n="),
    ("no colon here at all", "no colno here at all"),
]


def tokens_in(kind: str, prompt: str, clean: str, **how):
    """(text of each region by its tokens' offsets, the mask, names) of a prompt."""
    tokenizer = tiny_models.tokenizer(kind)
    rendered = render_prompt(tokenizer, prompt, **how)
    encoded = tokenizer(rendered.text, add_special_tokens=False, return_offsets_mapping=True)
    names = [*BASE_REGIONS, "edited"]
    mask = region_mask(rendered, encoded["offset_mapping"], names, character_regions(prompt, names, clean=clean))
    pieces = {}
    for column, name in enumerate(names):
        spans = [span for span, on in zip(encoded["offset_mapping"], mask[:, column].tolist(), strict=True) if on]
        covered = sorted({character for a, b in spans for character in range(a, b)})
        pieces[name] = "".join(rendered.text[c] for c in covered)
    return pieces, mask, names


@pytest.mark.parametrize("how", [{}, {"few_shot": "3 + 4 = 7\n\n"}, {"apply_chat_template": True}])
@pytest.mark.parametrize(("clean", "variant"), PROMPTS)
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_of_a_region_are_the_characters_it_stands_for(kind, clean, variant, how):
    pieces, _, _ = tokens_in(kind, variant, clean, **how)
    start, end = task_span(variant)
    squeeze = "".join
    assert squeeze(pieces["task"].split()) == squeeze(variant[start:end].split())
    assert squeeze(pieces["instruction"].split()) == squeeze((variant[:start] + variant[end:]).split())
    _, edited = edited_spans(clean, variant)
    for a, b in edited:
        assert variant[a:b] in pieces["edited"]
    assert len(squeeze(pieces["edited"].split())) <= sum(b - a for a, b in edited) + 2  # a mark that shares its token


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(prompt=st.text(min_size=1, max_size=60).filter(str.strip), shot=st.sampled_from(["", "1 + 1 = 2\n"]))
def test_context_instruction_and_task_share_out_all_tokens(kind, prompt, shot):
    _, mask, names = tokens_in(kind, prompt.encode("utf-8", "ignore").decode() or "x", "clean", few_shot=shot)
    home = mask[:, [names.index(name) for name in ("context", "instruction", "task")]]
    assert home.sum(1).eq(1).all()


def test_chat_template_words_are_context_though_the_prompt_says_the_same():
    pieces, _, _ = tokens_in("bytes", "user", "user", apply_chat_template=True)
    assert pieces["task"].strip() == "user"
    assert "assistant" in pieces["context"]


def test_a_template_that_prints_the_date_prints_a_fixed_one():
    tokenizer = tiny_models.tokenizer("bytes")
    template = tokenizer.chat_template
    tokenizer.chat_template = "Today {{ strftime_now('%d %b %Y') }} {{ messages[-1]['content'] }}"
    try:
        assert render_prompt(tokenizer, "hello", apply_chat_template=True).text == "Today 26 Jul 2024 hello"
        tokenizer.chat_template = "{% for part in messages[-1]['content'] %}{% if part.type %}x{% endif %}{% endfor %}"
        with pytest.raises(UserError, match="takes no plain text"):
            render_prompt(tokenizer, "hello", apply_chat_template=True)
    finally:
        tokenizer.chat_template = template


def test_a_tokenizer_without_template_is_told_in_one_line():
    tokenizer = tiny_models.tokenizer("bytes")
    template, tokenizer.chat_template = tokenizer.chat_template, None
    try:
        with pytest.raises(UserError, match="no chat template"):
            render_prompt(tokenizer, "hello", apply_chat_template=True)
    finally:
        tokenizer.chat_template = template


@pytest.mark.parametrize(
    ("prompt", "task", "regex", "expected"),
    [
        ("Add up: 7 + 5", None, None, " 7 + 5"),
        ("Add 7 + 5 now", "7 + 5", None, "7 + 5"),
        ("At 10:30 add 7 + 5", "7 + 5", None, "7 + 5"),
        ("Add 7 + 5 now", None, r"(\d.*\d)", "7 + 5"),
        ("Add 7 + 5 now", "Add", r"\d.*\d", "7 + 5"),
        ("nothing to split", None, None, "nothing to split"),
        ("trailing colon:", None, None, "trailing colon:"),
        ("no match", None, r"\d+", "no match"),
    ],
)
def test_task_rule(prompt, task, regex, expected):
    start, end = task_span(prompt, task, regex)
    assert prompt[start:end] == expected


@pytest.mark.parametrize(
    ("prompt", "task"),
    [
        ("把下面的句子翻译成英文：今天天气很好。", "今天天气很好。"),
        ("翻译：At 9:30", "At 9:30"),
        ("请翻译:今天", "今天"),
        ("At 10:15 do this: add 3", " add 3"),
        ("Add up:\n3 + 4", "\n3 + 4"),
        ("Traduisez : bonjour", " bonjour"),
        ("Question 3: 4 + 5 =", " 4 + 5 ="),
        ("**Task:** add 3", " add 3"),
        ("Question: why? Answer:", " why? Answer:"),
        ("See https://example.org: what is it?", " what is it?"),
    ],
)
def test_the_colon_that_splits_stands_before_white_space_or_is_full_width(prompt, task):
    start, end = task_span(prompt)
    assert prompt[start:end] == task
    assert start > 0
    assert task_span("Please! " + prompt, clean=prompt) == (start + 8, end + 8)


@pytest.mark.parametrize(
    "prompt",
    [
        "At 9:30 Tom leaves home. When does he arrive after a walk of 45 minutes?",
        "It is 12:45:10 now, what is it in a minute?",
        "Open https://example.org/a and tell me what the page says.",
        "What does :) mean?",
        "What does (: mean, and what :* and :-( ?",
        "Is C:\\Users a folder?",
        "What does std::move do, and std:: alone?",
        "Read a:b aloud",
        "Simplify 12 : 8.",
        "Add up:",
        "Add up: \n",
        "标题：",
    ],
)
def test_any_other_colon_leaves_the_whole_prompt_as_the_task(prompt):
    assert task_span(prompt) == (0, len(prompt))


@pytest.mark.parametrize(
    ("clean", "style", "expected"),
    [
        ("Why is it dark?", "Be quick! Why is it dark?", "Why is it dark?"),  # no colon: the framing is no task
        ("Why is it dark?", "A request: Why is it dark? Thanks!", "Why is it dark?"),
        ("Why is it dark?", "Be quick! Why is it drak?", "Be quick! Why is it drak?"),  # cannot be told: all of it
        ("Why is it dark?", "Why is it drak?", "Why is it drak?"),
        ("Add up: 7 + 5", "Please: Add up: 7 + 5 Thanks!", " 7 + 5"),
        ("Add up: 7 + 5", "Add pu: 7 + 5", " 7 + 5"),
        ("Add up: 7 + 5", "Add up; 7 + 5", " 7 + 5"),
        ("Add up: two and two", "Add up: tow and two", " tow and two"),
        ("Which gives way?", "Which gives way??", "Which gives way??"),  # a mark stuck to it is an edit, no framing
        ("Add: 2", "Add: 2 - by 20:00 please", " 2"),  # not the 2 of 20
        ("Add: 2", "Hurry, I have 2 minutes! Add: 2 - there are 2 of us", " 2"),
        ("Say a", "Say a Say anything.", "Say a"),
        ("What is pi", "What is: pi", "What is: pi"),  # all of the clean form is task
        ("Sort it, now: b a", "Sort it now b a", " b a"),
    ],
)
def test_a_style_has_the_task_of_its_clean_form(clean, style, expected):
    start, end = task_span(style, clean=clean)
    assert style[start:end] == expected
    assert "Hurry" not in style or style[:start].endswith("Add:")
    assert task_span(clean, clean=clean) == task_span(clean)
    spans = character_regions(style, ["instruction", "task"], clean=clean)
    assert spans["task"] == [(start, end)]
    assert "".join(style[a:b] for a, b in spans["instruction"]) == style[:start] + style[end:]


def test_the_task_of_a_framing_is_that_within_the_clean_form():
    for clean in ("Peru lies in", "Tell of Peru"):
        for prompt in (f"Peru! {clean} Say Peru.", f"Please help. {clean}", f"{clean}\nThanks to Peru"):
            start, end = task_span(prompt, "Peru", clean=clean)
            assert prompt[start:end] == "Peru"
            assert start == prompt.index(clean, prompt.startswith("Peru!")) + clean.index("Peru")


def test_the_task_of_the_row_and_the_regex_come_before_the_clean_form():
    assert task_span("Hello! Add 7 + 5 now", "7 + 5", clean="Add 7 + 5 now") == (11, 16)
    assert task_span("Hello! Add 7 + 6 now", "7 + 5", clean="Add 7 + 5 now") == (0, 20)
    assert task_span("Hello! Add 7 + 5 now", None, r"Add", clean="Add 7 + 5 now") == (7, 10)


@pytest.mark.parametrize(
    ("clean", "variant", "in_clean", "in_variant"),
    [
        ("the cat sat", "the cta sat", ["cat"], ["cta"]),
        ("the cat sat", "the  cat sat", ["cat"], ["cat"]),
        ("the cat sat", "the ca\u00adt sat", ["cat"], ["ca\u00adt"]),
        ("the cat sat", "the the cat sat", [], ["the"]),
        ("the cat sat", "cat sat", ["the"], []),
        ("the cat, sat", "the cat sat", [","], []),
        ("a b c", "x a b c", [], ["x"]),
        ("same text", "same text", [], []),
        ("This one is", "This is all! This one is", [], ["This", "is", "all", "!"]),
        ("This one is", "Hi, you!\n\nThis one is this one", [], ["Hi", ",", "you", "!", "this", "one"]),
        ("the cat sat", "thecat sat", ["the", "cat"], ["thecat"]),
    ],
)
def test_edited_words_have_their_clean_twins(clean, variant, in_clean, in_variant):
    left, right = edited_spans(clean, variant)
    assert [clean[a:b] for a, b in left] == in_clean
    assert [variant[a:b] for a, b in right] == in_variant


def test_words_keep_accents_and_soft_hyphens_together():
    text = "naïve cafe\u0301 ca\u00adt 3.5 😀"
    assert [text[a:b] for a, b in words_of(text)] == ["naïve", "cafe\u0301", "ca\u00adt", "3", ".", "5", "😀"]


@pytest.mark.parametrize(
    ("clean", "variant", "words"),
    [
        ("请回答：中国的首都是哪座城市？", "请回答：中国的手都是哪座城市？", ["首"]),
        ("東京はどこですか", "東京はどこてすか", ["で"]),
        ("กินข้าว ที่ไหน", "กินข่าว ที่ไหน", ["ข้"]),
        ("请用 Python 写程序", "请用 Pyhton 写程序", ["Python"]),
    ],
)
def test_without_spaces_between_words_a_letter_is_a_word(clean, variant, words):
    assert [clean[slice(*span)] for span in edited_spans(clean, variant)[0]] == words
