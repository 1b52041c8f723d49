"""Prompts as the model will see them: rendered, tokenised, with the regions of every token."""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from command_line import UserError
from given_responses import GivenResponses
from gold_words import answer_texts
from load_json import PromptFile, read_text
from style_names import controlled_style, matched_style, source_style
from token_spans import (
    BASE_REGIONS,
    RenderedPrompt,
    Span,
    character_regions,
    control_tokens,
    edited_spans,
    framing,
    region_mask,
    region_names,
    render_prompt,
    space_before_answer,
)

from capture.decode import Prompt
from capture.matched_split import CUT, TokenisedText, WordCutter, new_cuts
from capture.neutral_text import NeutralSentences

DEFAULT_POOLED = ("last", "instruction", "task")
EDITED_TOO = [*BASE_REGIONS, "edited"]
SHORTEST_PREFIX = 8  # tokens; a shorter one is not worth a pass of its own


@dataclass(frozen=True)
class Rendering:
    """How a prompt becomes the text that is tokenised, and where its task is."""

    few_shot: str = ""
    apply_chat_template: bool = False
    system_prompt: str | None = None
    task_regex: str | None = None


@dataclass
class StylePrompts:
    """The prompts of one style that can be run, in the prompt file's order, and why the others cannot."""

    style: str
    names: list[str]
    pooled: list[str]
    texts: list[tuple[int, str]] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    longest_answer: int = 0  # tokens of an answer or a response from elsewhere, if these are scored
    failures: dict[int, tuple[int | str, str]] = field(default_factory=dict)
    unmatched: int = 0  # of a control: prompts that are not in it, for they cannot have as many tokens as the style's
    controls: dict[int, dict[str, bool]] = field(default_factory=dict)  # by row: see `_ReadPrompt`


@dataclass(frozen=True)
class _ReadPrompt:
    """A prompt as the model will see it: its own text, and that text as it is stored, with the cuts of a control."""

    rendered: RenderedPrompt
    ids: list[int]
    offsets: list[Span]
    text: str
    shown: str
    controls: dict[str, bool] = field(default_factory=dict)  # control tokens typed in it: whether they are read as text


class PromptReader:
    """Reads the prompts of a file's styles for one tokenizer; holds lengths, makes tokens and regions when asked.

    answer_room: tokens after `max_length` that an accepted answer may fill; None: answers are not scored.
    """

    def __init__(
        self,
        prompts: PromptFile,
        tokenizer: Any,
        rendering: Rendering,
        max_length: int,
        pool: list[str] | None,
        answer_room: int | None = None,
    ):
        self.file, self.tokenizer, self.rendering = prompts, tokenizer, rendering
        self.max_length, self.pool, self.answer_room = max_length, pool, answer_room
        self.given: GivenResponses | None = None  # responses that were made elsewhere
        self.scores_given = False  # their log-probabilities are wanted
        self._answers: dict[tuple[int, bool], list[list[int]]] = {}
        self._cutter, self._sentences = WordCutter(tokenizer), NeutralSentences(tokenizer)
        self._control = control_tokens(tokenizer)
        self._common: list[int] | None = None
        try:
            re.compile(rendering.task_regex or "")
        except re.error as error:
            raise UserError(f"--task_regex: not a regular expression: {error}") from None

    def style(self, style: str, max_samples: int | None = None) -> StylePrompts:
        """Lengths of all prompts of a style; those that cannot be run are in `failures`."""
        names = region_names(style, self.file.clean_key, list(self.file.style_counts))
        pool, mine = self.pool or [*DEFAULT_POOLED, "edited"], f"edited:{controlled_style(style) or style}"
        known = [*BASE_REGIONS, "edited", *(f"edited:{other}" for other in self.file.style_counts)]
        if wrong := [name for name in pool if name not in known]:
            raise UserError(f"--pool_regions {wrong[0]}: choose among {', '.join(known)}")
        pooled = [name for name in names if {name, name.split(":")[0]} & {*pool} or (name == "edited" and mine in pool)]
        found = StylePrompts(style, names, pooled)
        # Rows of a control have the clean form and the style that it controls.
        keys = [source_style(style), *([str(self.file.clean_key)] if controlled_style(style) else [])]
        for problem in (problem for key in keys for problem in self.file.problems_of(key, max_samples)):
            found.failures[problem.original_index] = (self.element(problem.original_index), str(problem))
        indices = [{index for index, _ in self.file.prompts(key, max_samples)} for key in keys]
        for index in sorted(set.intersection(*indices)):
            try:
                read = self._read(style, index)
                if read is None:
                    found.unmatched += 1
                    continue
                answer = max(map(len, self._answer_ids(index, read)), default=0)
                most = self.max_length - max(0, answer - (self.answer_room or 0))
                if not 0 < len(read.ids) <= most:
                    room = f"this model and {'--max_new_tokens' if most == self.max_length else 'the answer'}"
                    raise UserError(f"has {len(read.ids)} tokens; {room} leave room for {most}")
            except UserError as error:
                found.failures[index] = (self.element(index), str(error))
                continue
            if read.controls:
                found.controls[index] = read.controls
            found.texts.append((index, read.shown))
            found.lengths.append(len(read.ids))
            found.longest_answer = max(found.longest_answer, answer)
            # Tokens before the first one that touches the prompt's own text may be shared with other prompts.
            start, ids = read.rendered.own[0], read.ids
            own = next((t for t, (a, b) in enumerate(read.offsets) if b > max(a, start)), len(ids))
            shared = ids[: min(own, len(ids) - 1)]
            pairs = zip(shared if self._common is None else self._common, shared, strict=False)
            self._common = [a for a, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]
        return found

    def shared_prefix(self) -> list[int]:
        """Tokens that all prompts read so far begin with, before any prompt's own text; [] if too few."""
        common = self._common or []
        return common if len(common) >= SHORTEST_PREFIX else []

    def prompt(self, style: StylePrompts, position: int, normal_ids: list[int] | None = None) -> Prompt:
        """The prompt at a position of a style's list, with its tokens and regions.

        What is forced after it: `answers`, the row's accepted answers, `normal`, the clean form's response, and
        `response`, one that was made elsewhere.
        """
        index, _ = style.texts[position]
        read = self._read(style.style, index)
        assert read is not None  # it is in the list
        forced = {"answers": self._answer_ids(index, read), "normal": [] if normal_ids is None else [normal_ids]}
        own = self._response_ids(style.style, index, read)
        if own is not None and self.scores_given:
            forced["response"] = [own]
        return Prompt(index, read.ids, self._mask(read, style.style, index, style.names), forced, own)

    def element(self, index: int) -> int | str:
        """The id of a row, whatever is wrong with it."""
        try:
            return self.file.element_index(index)
        except AttributeError:  # the row is not an object
            return index + 1

    def as_read(self, style: str, index: int) -> tuple[RenderedPrompt, list[int], str]:
        """A row's prompt as it is rendered, its token ids, and its own text; it must be in the style's list."""
        read = self._read(style, index)
        assert read is not None
        return read.rendered, read.ids, read.text

    def response_ids(self, style: str, index: int) -> list[int] | None:
        """Token ids of a row's response that was made elsewhere; None if it has none."""
        read = self._read(style, index) if self.given and self.given.of(style, index) else None
        return None if read is None else self._response_ids(style, index, read)

    def _response_ids(self, style: str, index: int, read: _ReadPrompt) -> list[int] | None:
        """Its tokens as they continue the prompt. If the tokenizer's decoder drops a first space, that space is read
        before a text that has none."""
        several = self.given.of(style, index) if self.given else []
        if not several:
            return None
        text = several[0].text
        space = "" if not text or text[0].isspace() else self._space_before(read.rendered)
        if space:
            ids = self._continuation(read.rendered, space + text)
            if self.tokenizer.decode(ids, skip_special_tokens=True) == text:
                return ids
        return self._continuation(read.rendered, text) if text else []

    def _answer_ids(self, index: int, read: _ReadPrompt) -> list[list[int]]:
        """Token ids of a row's accepted answers as they continue its prompt; [] if answers are not scored.

        They are those that continue the clean form, so that all styles of a row have the same. Only if one of the two
        texts ends in white space and the other does not, they are those that continue this prompt.
        """
        if self.answer_room is None:
            return []
        how, row, base = self.rendering, self.file.rows[index], read.rendered
        clean, ends_open = row.get(self.file.clean_key), base.text[-1:].isspace()
        if (index, ends_open) in self._answers:
            return self._answers[index, ends_open]
        with suppress(UserError):
            if isinstance(clean, str) and clean.strip():
                other = render_prompt(self.tokenizer, clean, how.few_shot, how.apply_chat_template, how.system_prompt)
                base = other if other.text[-1:].isspace() == ends_open else base
        space = self._space_before(base)
        found = [ids for text in answer_texts(row.get("answer")) if (ids := self._continuation(base, space + text))]
        if base is not read.rendered:
            self._answers[index, ends_open] = found
        return found

    def _space_before(self, rendered: RenderedPrompt) -> str:
        """White space between a prompt and an answer to it, as the model would write it."""
        if rendered.has_special_tokens:
            return space_before_answer(self.tokenizer, self.rendering.system_prompt)
        return "" if rendered.text[-1:].isspace() else " "

    def _continuation(self, rendered: RenderedPrompt, text: str) -> list[int]:
        """Token ids of a text after a prompt: those that follow the prompt's own ids, if the ids of both together begin
        with these, else those of the text alone."""
        before = self._tokens(rendered)[0]
        whole = self._tokens(replace(rendered, text=rendered.text + text))[0]
        if whole[: len(before)] == before:
            return whole[len(before) :]
        # After a line's end, so that no tokenizer puts its mark of a first word there.
        alone = self.tokenizer("\n" + text, add_special_tokens=False, return_offsets_mapping=True)
        return [one for one, (a, _) in zip(alone["input_ids"], alone["offset_mapping"], strict=True) if a > 0]

    def _read(self, style: str, index: int) -> _ReadPrompt | None:
        """A row's prompt in a style, rendered and tokenised; None if a control does not have it."""
        own = self._encode(self.file.rows[index][source_style(style)])
        if controlled_style(style) is None:
            return own
        clean = self.file.rows[index][str(self.file.clean_key)]
        make = self._split if matched_style(style) else self._neutral
        return make(style, index, clean, own)

    def _split(self, style: str, index: int, text: str, typo: _ReadPrompt) -> _ReadPrompt | None:
        """The clean prompt with as many tokens in each edited word as its typo has; None: it cannot be."""
        own = self._encode(text)
        edited, goal = (
            self._mask(read, key, index, EDITED_TOO)[:, -1].tolist()
            for read, key in ((own, style), (typo, source_style(style)))
        )
        clean = TokenisedText(own.rendered.text, own.ids, own.offsets, edited)
        found = self._cutter.cut(clean, TokenisedText(typo.rendered.text, typo.ids, typo.offsets, goal))
        if found is None:
            return None
        shown, shift = own.text, own.rendered.own[0] - own.rendered.own_offset
        for place in reversed(new_cuts(clean, found[1])):
            shown = shown[: place - shift] + CUT + shown[place - shift :]
        made = _ReadPrompt(own.rendered, *found, own.text, shown)
        # Token by token the typo's twin, or none: a token may hold a word and the sign after it; cut off, the sign is
        # in no edited word.
        same = _differ_only_within(goal, made, typo)
        return made if same and self._mask(made, style, index, EDITED_TOO)[:, -1].tolist() == goal else None

    def _neutral(self, style: str, index: int, text: str, tone: _ReadPrompt) -> _ReadPrompt | None:
        """The clean prompt in neutral sentences of as many tokens as those of the tone style; None: it cannot be."""
        around = framing(tone.text, text)
        if around is None:
            return None
        parts, made = [around[0], text, around[1]], tone
        goal = self._mask(tone, source_style(style), index, EDITED_TOO)
        for side in (place for place in (0, 2) if parts[place]):  # one after the other: before and after
            for added in self._sentences.in_place_of(parts[side], f"{index} {side}"):
                parts[side] = added
                made = self._encode("".join(parts))
                same = _differ_only_within(goal[:, -1].tolist(), made, tone)
                if same and torch.equal(self._mask(made, style, index, EDITED_TOO), goal):
                    break
            else:
                return None
        return made

    def _mask(self, read: _ReadPrompt, style: str, index: int, names: list[str]) -> torch.Tensor:
        """Which tokens of a row's prompt lie in which region, [S, R] bool."""
        row = self.file.rows[index]
        texts = {key: value for key, value in row.items() if isinstance(value, str)}
        clean = texts.get(self.file.clean_key) if self.file.clean_key else None
        regions = character_regions(read.text, names, texts, clean, texts.get("task"), self.rendering.task_regex)
        if typo := matched_style(style):
            regions["edited"] = edited_spans(read.text, row[typo])[0]
        return region_mask(read.rendered, read.offsets, names, regions)

    def _encode(self, text: str) -> _ReadPrompt:
        """A text rendered and tokenised; control tokens in it as the tokens of plain text, if the vocabulary can."""
        # 1. As the tokenizer has it. A chat template writes its special tokens itself; adding them again would begin
        # with two BOS.
        how = self.rendering
        rendered = render_prompt(self.tokenizer, text, how.few_shot, how.apply_chat_template, how.system_prompt)
        read = _ReadPrompt(rendered, *self._tokens(rendered), text, text)
        # 2. Control tokens that the user typed.
        start, end = rendered.own
        for at in range(len(read.ids) - 1, -1, -1):
            number, (a, b) = read.ids[at], read.offsets[at]
            if number not in self._control or not start <= a < b <= end:
                continue
            # After a line's end, so that no tokenizer puts its mark of a first word there.
            as_plain_text = {"add_special_tokens": False, "split_special_tokens": True, "return_offsets_mapping": True}
            plain = self.tokenizer("\n" + rendered.text[a:b], **as_plain_text)
            pairs = zip(plain["input_ids"], plain["offset_mapping"], strict=True)
            pieces = [(one, (a + c - 1, a + d - 1)) for one, (c, d) in pairs if c > 0]
            read.controls[self._control[number]] = as_text = bool(pieces) and number not in dict(pieces)
            if as_text:
                read.ids[at : at + 1], read.offsets[at : at + 1] = map(list, zip(*pieces, strict=True))
        return read

    def _tokens(self, rendered: RenderedPrompt) -> tuple[list[int], list[Span]]:
        """Token ids and their characters. Without an end-of-text token that the tokenizer puts after a prompt: it would
        end it before the answer."""
        encoded = self.tokenizer(
            rendered.text,
            add_special_tokens=not rendered.has_special_tokens,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
            truncation=False,
        )
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        ends = (self.tokenizer.eos_token_id, self.tokenizer.sep_token_id)
        while len(ids) > 1 and encoded["special_tokens_mask"][len(ids) - 1] and ids[-1] in ends:
            del ids[-1], offsets[-1]
        return ids, offsets


def _differ_only_within(places: list[bool], one: _ReadPrompt, other: _ReadPrompt) -> bool:
    """Whether two prompts have as many tokens, and the same ones but for these places."""
    twins = zip(one.ids, other.ids, places, strict=False)
    return len(one.ids) == len(other.ids) and all(inside or a == b for a, b, inside in twins)


def read_few_shot(path: Path | None) -> str:
    """Text of a few-shot file, as it is. Raises UserError if it cannot be read."""
    return "" if path is None else read_text(path, "a text file after --few_shot_file")


def longest_prompt(config: Any, max_new_tokens: int) -> int:
    """Tokens of a prompt that still leave room for the response in the model's context."""
    text_config = config.get_text_config(decoder=True)
    limits: Iterable[Any] = (getattr(text_config, name, None) for name in ("max_position_embeddings", "n_positions"))
    context = next((limit for limit in limits if limit and limit > 0), 1 << 20)  # XLNet's is -1: no limit
    if context <= max_new_tokens:
        raise UserError(f"--max_new_tokens {max_new_tokens}: the model's context is {context} tokens; ask for fewer")
    return int(context) - max_new_tokens
