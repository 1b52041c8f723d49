"""Regions of a prompt by character offsets, and the tokens that lie in them.

A prompt as the model sees it is context (few-shot text, system prompt, chat template) around the prompt's own text.
The own text splits into `instruction` and `task`; `edited` marks the words that differ from the clean form. Every
token belongs to exactly one of `context`, `instruction`, `task`: that of its first character that is no white space.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import regex
from command_line import UserError
from rapidfuzz.distance import Levenshtein

if TYPE_CHECKING:
    import torch

Span = tuple[int, int]  # characters, end exclusive
MARKER = "\u2402content\u2403"  # in the place of a prompt; no template holds it
ANSWER_MARKER = "\u2402answer\u2403"
# A template that prints today's date would change the prompts from day to day: it prints this one.
DATE = "26 Jul 2024"
FIXED_DATE = "{% macro strftime_now(format) %}" + DATE + "{% endmacro %}"
UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}"  # no space between words
_UNSPACED_LETTER = regex.compile(rf"(?V1)[[{UNSPACED}]&&\p{{L}}]")
BASE_REGIONS = ("all", "last", "context", "instruction", "task", "first")
# White space and more text follow a colon that splits (after `**Task:**` too); a full-width one, or one after Chinese
# or Japanese, needs no space. `12 : 4` is a ratio, `(:` a smiley, `std:: x` a name.
LABEL_COLON = re.compile(r"(?!(?<=\d\s):\s+\d)(?<![:(\[]):(?:(?<!\s:)[*_]+)?(?=\s+\S)|(?:：|(?<=[぀-鿿]):)(?=\s*\S)")


@dataclass(frozen=True)
class RenderedPrompt:
    """`text` as it is tokenised; `text[own[0]:own[1]]` is the prompt's own text, from its character `own_offset` on."""

    text: str
    own: Span
    own_offset: int = 0
    has_special_tokens: bool = False


# --- rendering


def render_prompt(
    tokenizer: Any,
    prompt: str,
    few_shot: str = "",
    apply_chat_template: bool = False,
    system_prompt: str | None = None,
) -> RenderedPrompt:
    """The text that is tokenised for `prompt`, and where the prompt's own text lies in it.

    Raises UserError where the tokenizer has no chat template, or the template changes the prompt's text.
    """
    if not apply_chat_template:
        start = len(few_shot)
        return RenderedPrompt(few_shot + prompt, (start, start + len(prompt)))
    text = _apply_template(tokenizer, few_shot + prompt, system_prompt)
    content = (few_shot + prompt).strip()  # many templates trim the content
    for content_start, trimmed in (
        (0, few_shot + prompt),
        (len(few_shot + prompt) - len((few_shot + prompt).lstrip()), content),
    ):
        start = _content_start(tokenizer, system_prompt)
        if text.startswith(trimmed, start):
            own_offset = max(0, content_start - len(few_shot))
            own_start = start + max(0, len(few_shot) - content_start)
            return RenderedPrompt(text, (own_start, start + len(trimmed)), own_offset, has_special_tokens=True)
    raise UserError("the tokenizer's chat template changes the prompt's text; run without --apply_chat_template")


def _content_start(tokenizer: Any, system_prompt: str | None) -> int:
    # A text that is in no template shows where the content begins; searching for the prompt itself would
    # find "user" or "a" in the template's own words.
    start = template_text(tokenizer, system_prompt).find(MARKER)
    if start < 0:
        raise UserError("the tokenizer's chat template takes no plain text; run without --apply_chat_template")
    return start


def template_text(tokenizer: Any, system_prompt: str | None) -> str:
    """What the chat template puts around a prompt (`MARKER` is in its place): part of a run's settings."""
    return _apply_template(tokenizer, MARKER, system_prompt)


def space_before_answer(tokenizer: Any, system_prompt: str | None) -> str:
    """White space that the chat template puts between a prompt and its answer: " " for Mistral, else mostly "".

    "" too if the template does not continue a prompt with an answer (it leaves something out).
    """
    before = template_text(tokenizer, system_prompt)
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    turns = [{"role": "user", "content": MARKER}, {"role": "assistant", "content": ANSWER_MARKER}]
    try:
        whole = render_chat(tokenizer, [*system, *turns])
    except Exception:  # as above
        return ""
    gap = whole[len(before) :].partition(ANSWER_MARKER)[0] if whole.startswith(before) else ""
    return gap if gap.isspace() else ""


def _apply_template(tokenizer: Any, content: str, system_prompt: str | None) -> str:
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    messages = [*system, {"role": "user", "content": content}]
    if not getattr(tokenizer, "chat_template", None):
        raise UserError("the tokenizer has no chat template; run without --apply_chat_template")
    try:
        return render_chat(tokenizer, messages, add_generation_prompt=True)
    except Exception as error:  # a template may raise what it likes (Gemma 2: "System role not supported")
        raise UserError(f"the tokenizer's chat template refuses these messages: {error}") from error


def render_chat(tokenizer: Any, messages: list[dict[str, str]], add_generation_prompt: bool = False) -> str:
    """The messages in the tokenizer's chat template, with `DATE` as the day; raises what the template raises."""
    template = tokenizer.get_chat_template()
    template = FIXED_DATE + template if "strftime_now" in template else template
    return str(
        tokenizer.apply_chat_template(
            messages,
            chat_template=template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            date_string=DATE,
        )
    )


def control_tokens(tokenizer: Any) -> dict[int, str]:
    """Id and text of the tokens that are no text (begin, end, turns of a chat …)."""
    return {number: token.content for number, token in tokenizer.added_tokens_decoder.items() if token.special}


# --- task and edits


def task_span(prompt: str, task: str | None = None, task_regex: str | None = None, clean: str | None = None) -> Span:
    """Characters of the task in the prompt's own text.

    The first rule that finds it decides:
    1. `task_regex`, if given: its group 1, else the whole match; everything if it does not match.
    2. The row's own `task`, in a framing around the clean form the one within it; if it was edited and all around it
       is as in the clean form, what is in its place.
    3. The task of its clean form `clean`, if the prompt holds the clean form or this task unchanged between white
       space. What a framing adds around a request is then not part of the task.
    4. Everything, if the clean form is all task.
    5. What follows the first colon before white space and more text, or a full-width colon; without one, everything.
    """
    if task_regex is not None:
        if match := re.search(task_regex, prompt, re.DOTALL):
            return match.span(1) if match.re.groups and match.group(1) is not None else match.span()
        return 0, len(prompt)
    if task and clean is not None and (around := around_task(clean, task)):
        before, after = around
        if frame := framing(prompt, clean):
            start = len(frame[0] + before)
            return start, start + len(task)
        longer = (before + after).strip() and len(prompt) > len(before) + len(after)
        if longer and prompt.startswith(before) and prompt.endswith(after):  # the task of `Jamaicaa` is not `Jamaica`
            return len(before), len(prompt) - len(after)
    if task and (start := prompt.rfind(task)) >= 0:
        return start, start + len(task)
    if clean is not None and (span := _clean_task(prompt, clean, task)):
        return span
    colon = LABEL_COLON.search(prompt)
    return colon.end() if colon else 0, len(prompt)


def around_task(clean: str, task: str) -> tuple[str, str] | None:
    """(text before, text after) the last place of the task in a clean prompt; None if it has no task there."""
    start = clean.rfind(task) if task else -1
    return None if start < 0 else (clean[:start], clean[start + len(task) :])


def framing(prompt: str, clean: str) -> tuple[str, str] | None:
    """(text before, text after) the clean form in a prompt that only adds words around it; None for another prompt.

    White space parts these words from the clean form. One of the two texts may be empty.
    """
    before, after = around_task(prompt, clean) or ("", "")
    edges = ((before[::-1], clean[:1]), (after, clean[-1:]))
    apart = all(not side or (side.strip() and (side[0].isspace() or edge.isspace())) for side, edge in edges)
    return (before, after) if before + after and apart else None


def _clean_task(prompt: str, clean: str, task: str | None) -> Span | None:
    """The clean form's task in the prompt; None if only the prompt's own colon can decide."""
    start, end = task_span(clean, task)
    for text, before in ((clean, start), (clean[start:end], 0)):
        left = "" if text[:1].isspace() else r"(?<!\S)"
        right = "" if text[-1:].isspace() else r"(?!\S)"
        if text.strip() and (places := [m.start() for m in re.finditer(left + re.escape(text) + right, prompt)]):
            return places[-1] + before, places[-1] + before + end - start
    return (0, len(prompt)) if (start, end) == (0, len(clean)) else None


def words_of(text: str) -> list[Span]:
    """Spans of the words (letters, marks, digits, soft hyphens) and of each single punctuation mark or symbol.

    In scripts without spaces between words (Chinese, Japanese, Thai …) each letter with its marks is a word.
    """
    spans: list[Span] = []
    start = None
    alone = {found.start() for found in _UNSPACED_LETTER.finditer(text)}
    for position, character in enumerate(text):
        if character.isspace():
            kind = " "
        else:
            kind = unicodedata.category(character)[0]
        is_word = kind in "LMNC"
        begins = position in alone or (position - 1 in alone and kind != "M")
        if start is not None and (begins or not is_word):
            spans.append((start, position))
            start = None
        if is_word and start is None:
            start = position
        elif kind in "PS":
            spans.append((position, position + 1))
    if start is not None:
        spans.append((start, len(text)))
    return spans


def edited_spans(clean: str, variant: str) -> tuple[list[Span], list[Span]]:
    """(spans in `clean`, spans in `variant`) of the words that differ, by a minimal word-by-word alignment.

    A word inserted has no clean twin, a word left out none in the variant. Where two words agree and only the white
    space before them differs, both are marked, so that a re-spaced word has its twin too. Of a framing its own words
    are marked, though another alignment may be as short: `This is urgent! This one`.
    """
    edited = [(own, twin) for own, twin, differs in aligned_words(clean, variant) if differs]
    return [own for own, _ in edited if own is not None], [twin for _, twin in edited if twin is not None]


def aligned_words(clean: str, variant: str) -> list[tuple[Span | None, Span | None, bool]]:
    """(clean word, its twin in `variant`, is it edited?) of all words in order; `edited_spans` says when it is."""
    if around := framing(variant, clean):
        start, end = len(around[0]), len(variant) - len(around[1])
        twins = [(a, b, start <= a < end) for a, b in words_of(variant)]
        return [((a - start, b - start) if kept else None, (a, b), not kept) for a, b, kept in twins]
    clean_words, variant_words = words_of(clean), words_of(variant)
    left, right = [clean[a:b] for a, b in clean_words], [variant[a:b] for a, b in variant_words]
    aligned: list[tuple[Span | None, Span | None, bool]] = []
    for step in Levenshtein.opcodes(left, right):
        # `equal` and `replace` have as many words on both sides, `delete` and `insert` none on one side.
        for i, j in zip_longest(range(step.src_start, step.src_end), range(step.dest_start, step.dest_end)):
            edited = step.tag != "equal"
            if not edited and (
                i > step.src_start or i == j == 0
            ):  # at the edge of an edit the space belongs to the edit
                edited = _space_before(clean, clean_words, i) != _space_before(variant, variant_words, j)
            own, twin = None if i is None else clean_words[i], None if j is None else variant_words[j]
            aligned.append((own, twin, edited))
    return aligned


def _space_before(text: str, words: list[Span], position: int) -> str:
    return text[words[position - 1][1] if position else 0 : words[position][0]]


# --- regions


def region_names(style: str, clean_style: str | None, styles: list[str]) -> list[str]:
    """Regions of a style: the base ones, then `edited` (a variant) or `edited:<style>` of each (the clean form)."""
    if clean_style is None:
        return list(BASE_REGIONS)
    if style == clean_style:
        return [*BASE_REGIONS, *(f"edited:{other}" for other in styles if other != clean_style)]
    return [*BASE_REGIONS, "edited"]


def character_regions(
    prompt: str,
    names: list[str],
    variants: dict[str, str] | None = None,
    clean: str | None = None,
    task: str | None = None,
    task_regex: str | None = None,
) -> dict[str, list[Span]]:
    """Spans, in the prompt's own text, of each region that has any; `all`, `last` and `context` follow from the tokens.

    `variants` maps style → text of the same row (for `edited:<style>`), `clean` is the clean text (for `edited` and
    where the task is).
    """
    start, end = task_span(prompt, task, task_regex, clean)
    regions = {"task": [(start, end)], "instruction": [(0, start), (end, len(prompt))]}
    for name in names:
        if name == "edited" and clean is not None:
            regions[name] = edited_spans(clean, prompt)[1]
        elif name.startswith("edited:") and (variant := (variants or {}).get(name.removeprefix("edited:"))):
            regions[name] = edited_spans(prompt, variant)[0]
    return regions


def region_mask(
    rendered: RenderedPrompt, offsets: list[Span], names: list[str], regions: dict[str, list[Span]]
) -> torch.Tensor:
    """Which tokens lie in which region, [S, R] bool.

    `offsets` are the tokenizer's character offsets in `rendered.text`. Base regions take a token by its first
    character that is no white space (so they are disjoint and together all tokens), edited ones by any overlap. A token
    of spaces alone belongs to the word that follows it at once: some tokenizers cut ` 12` into ` ` and `12`.
    """
    import torch

    shift = rendered.own[0] - rendered.own_offset
    placed = {name: [(a + shift, b + shift) for a, b in spans if b > a] for name, spans in regions.items()}
    mask = torch.zeros(len(offsets), len(names), dtype=torch.bool)
    column = {name: position for position, name in enumerate(names)}
    mask[:, column["all"]] = True
    mask[-1:, column["last"]] = True
    mask[:1, column["first"]] = True
    for token, (start, end) in enumerate(offsets):
        first, last = _visible(rendered.text, start, end)
        home = "context"
        if first < last and rendered.own[0] <= first < rendered.own[1]:
            home = "task" if _touches(placed["task"], first, first + 1) else "instruction"
        mask[token, column[home]] = True
        reach = last if rendered.text[start:end].strip(" ") else last + 1
        for name in names[len(BASE_REGIONS) :]:
            if first < last and _touches(placed.get(name, []), first, reach):
                mask[token, column[name]] = True
    return mask


def _visible(text: str, start: int, end: int) -> Span:
    """The token's span without white space at its ends; a token of white space alone keeps its span."""
    piece = text[start:end]
    if not piece.strip():
        return start, end
    return start + len(piece) - len(piece.lstrip()), end - len(piece) + len(piece.rstrip())


def _touches(spans: list[Span], start: int, end: int) -> bool:
    return any(a < end and start < b for a, b in spans)
