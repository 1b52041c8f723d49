"""Prompts as the model will see them: rendered, tokenised, with the regions of every token."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from command_line import UserError
from load_json import Problem, PromptFile, read_text
from token_spans import (
    BASE_REGIONS,
    RenderedPrompt,
    Span,
    character_regions,
    control_tokens,
    edited_spans,
    matched_style,
    region_mask,
    region_names,
    render_prompt,
)

from capture.decode import Prompt
from capture.matched_split import CUT, TokenisedText, WordCutter, new_cuts

DEFAULT_POOLED = ("last", "instruction", "task")
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
    failures: dict[int, tuple[int | str, str]] = field(default_factory=dict)
    unmatched: int = 0  # of a control: prompts that are not in it, for their words cannot be cut like the typo
    controls: dict[int, dict[str, bool]] = field(default_factory=dict)  # by row: see `_ReadPrompt`


@dataclass(frozen=True)
class _ReadPrompt:
    """A prompt as the model will see it; `shown` is its own text as it is stored."""

    rendered: RenderedPrompt
    ids: list[int]
    offsets: list[Span]
    shown: str
    controls: dict[str, bool] = field(default_factory=dict)  # control tokens typed in it: whether they are read as text

    def own_start(self) -> int:
        """The first token that touches the prompt's own text."""
        start = self.rendered.own[0]
        return next((t for t, (a, b) in enumerate(self.offsets) if b > max(a, start)), len(self.ids))


class PromptReader:
    """Reads the prompts of a file's styles for one tokenizer; holds lengths, makes tokens and regions when asked."""

    def __init__(
        self, prompts: PromptFile, tokenizer: Any, rendering: Rendering, max_length: int, pool: list[str] | None
    ):
        self.file, self.tokenizer, self.rendering = prompts, tokenizer, rendering
        self.max_length, self.pool = max_length, pool
        self._cutter = WordCutter(tokenizer)
        self._control = control_tokens(tokenizer)
        self._common: list[int] | None = None
        try:
            re.compile(rendering.task_regex or "")
        except re.error as error:
            raise UserError(f"--task_regex: not a regular expression: {error}") from None

    def style(self, style: str, max_samples: int | None = None) -> StylePrompts:
        """Lengths of all prompts of a style; those that cannot be run are in `failures`."""
        names = region_names(style, self.file.clean_key, list(self.file.style_counts))
        found = StylePrompts(style, names, self._pooled(names))
        for problem in self._problems(style, max_samples):
            found.failures[problem.original_index] = (self._element(problem.original_index), str(problem))
        for index in self._indices(style, max_samples):
            try:
                read = self._read(style, index)
            except UserError as error:
                found.failures[index] = (self._element(index), str(error))
                continue
            if read is None:
                found.unmatched += 1
                continue
            if not 0 < len(read.ids) <= self.max_length:
                why = f"has {len(read.ids)} tokens; this model and --max_new_tokens leave room for {self.max_length}"
                found.failures[index] = (self._element(index), why)
                continue
            if read.controls:
                found.controls[index] = read.controls
            found.texts.append((index, read.shown))
            found.lengths.append(len(read.ids))
            self._common = _common_prefix(self._common, read.ids[: min(read.own_start(), len(read.ids) - 1)])
        return found

    def shared_prefix(self) -> list[int]:
        """Tokens that all prompts read so far begin with, before any prompt's own text; [] if too few."""
        common = self._common or []
        return common if len(common) >= SHORTEST_PREFIX else []

    def prompt(self, style: StylePrompts, position: int, forced_ids: list[int] | None = None) -> Prompt:
        """The prompt at a position of a style's list, with its tokens and regions."""
        index, _ = style.texts[position]
        read = self._read(style.style, index)
        assert read is not None  # it is in the list
        mask = region_mask(read.rendered, read.offsets, style.names, self._regions(style.style, index, style.names))
        return Prompt(index, read.ids, mask, forced_ids)

    def _read(self, style: str, index: int) -> _ReadPrompt | None:
        """A row's prompt in a style, rendered and tokenised; None if a control does not have it."""
        typo = matched_style(style)
        own = self._encode(self._text(style, index))
        return own if typo is None else self._matched(own, style, index)

    def _matched(self, clean: _ReadPrompt, style: str, index: int) -> _ReadPrompt | None:
        """The clean prompt of a row with as many tokens in each edited word as its typo has; None if that fails."""
        typo = str(matched_style(style))
        other = self._encode(self._text(typo, index))
        own = TokenisedText(clean.rendered.text, clean.ids, clean.offsets, self._edited(clean, style, index))
        goal = self._edited(other, typo, index)
        found = self._cutter.cut(own, TokenisedText(other.rendered.text, other.ids, other.offsets, goal))
        if found is None:
            return None
        shown, shift = clean.shown, clean.rendered.own[0] - clean.rendered.own_offset
        for place in reversed(new_cuts(own, found[1])):
            shown = shown[: place - shift] + CUT + shown[place - shift :]
        made = _ReadPrompt(clean.rendered, *found, shown)
        # A token may hold a word and the sign after it; cut off, the sign is in no edited word.
        return made if sum(self._edited(made, style, index)) == sum(goal) else None

    def _edited(self, read: _ReadPrompt, style: str, index: int) -> list[bool]:
        names = [*BASE_REGIONS, "edited"]
        mask = region_mask(read.rendered, read.offsets, names, self._regions(style, index, names))
        return list(mask[:, -1].tolist())

    def _text(self, style: str, index: int) -> str:
        return str(self.file.rows[index][self.file.clean_key if matched_style(style) else style])

    def _regions(self, style: str, index: int, names: list[str]) -> dict[str, list[Span]]:
        row, text, typo = self.file.rows[index], self._text(style, index), matched_style(style)
        clean = row.get(self.file.clean_key) if self.file.clean_key else None
        task = row.get("task")
        regions = character_regions(
            text,
            names,
            variants={key: value for key, value in row.items() if isinstance(value, str)},
            clean=clean if isinstance(clean, str) else None,
            task=task if isinstance(task, str) else None,
            task_regex=self.rendering.task_regex,
        )
        return regions | {"edited": edited_spans(text, row[typo])[0]} if typo else regions

    def _indices(self, style: str, max_samples: int | None) -> list[int]:
        """Rows that have the style; those of a control have its typo and the clean form."""
        sources = [[index for index, _ in self.file.prompts(key, max_samples)] for key in self._keys(style)]
        return sorted(set(sources[0]).intersection(*sources[1:]))

    def _problems(self, style: str, max_samples: int | None) -> list[Problem]:
        return [problem for key in self._keys(style) for problem in self.file.problems_of(key, max_samples)]

    def _keys(self, style: str) -> list[str]:
        typo = matched_style(style)
        return [style] if typo is None else [str(self.file.clean_key), typo]

    def _pooled(self, names: list[str]) -> list[str]:
        if self.pool is None:
            return [name for name in names if name in DEFAULT_POOLED or name.startswith("edited")]
        wrong = [name for name in self.pool if name not in BASE_REGIONS and not name.startswith("edited")]
        if wrong:
            raise UserError(f"--pool_regions {wrong[0]}: choose among {', '.join([*BASE_REGIONS, 'edited'])}")
        return [name for name in names if name in self.pool or name.split(":")[0] in self.pool]

    def _render(self, text: str) -> Any:
        how = self.rendering
        return render_prompt(self.tokenizer, text, how.few_shot, how.apply_chat_template, how.system_prompt)

    def _encode(self, text: str) -> _ReadPrompt:
        rendered = self._render(text)
        # A chat template writes its special tokens itself; adding them again would begin with two BOS.
        encoded = self.tokenizer(
            rendered.text,
            add_special_tokens=not rendered.has_special_tokens,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
            truncation=False,
        )
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        # An end-of-text token that the tokenizer puts after a prompt would end it before the answer.
        ends = (self.tokenizer.eos_token_id, self.tokenizer.sep_token_id)
        while len(ids) > 1 and encoded["special_tokens_mask"][len(ids) - 1] and ids[-1] in ends:
            ids, offsets = ids[:-1], offsets[:-1]
        return self._without_control_tokens(_ReadPrompt(rendered, ids, offsets, text))

    def _without_control_tokens(self, read: _ReadPrompt) -> _ReadPrompt:
        """The prompt with each control token of its own text as the tokens of plain text, if the vocabulary can."""
        (start, end), text = read.rendered.own, read.rendered.text
        for at in range(len(read.ids) - 1, -1, -1):
            number, (a, b) = read.ids[at], read.offsets[at]
            if number not in self._control or not start <= a < b <= end:
                continue
            # After a line's end, so that no tokenizer puts its mark of a first word there.
            as_plain_text = {"add_special_tokens": False, "split_special_tokens": True, "return_offsets_mapping": True}
            plain = self.tokenizer("\n" + text[a:b], **as_plain_text)
            pairs = zip(plain["input_ids"], plain["offset_mapping"], strict=True)
            pieces = [(one, (a + c - 1, a + d - 1)) for one, (c, d) in pairs if c > 0]
            read.controls[self._control[number]] = as_text = bool(pieces) and number not in dict(pieces)
            if as_text:
                read.ids[at : at + 1], read.offsets[at : at + 1] = map(list, zip(*pieces, strict=True))
        return read

    def _element(self, index: int) -> int | str:
        try:
            return self.file.element_index(index)
        except (AttributeError, TypeError, ValueError):
            return index + 1


def _common_prefix(known: list[int] | None, ids: list[int]) -> list[int]:
    if known is None:
        return ids
    same = next((i for i, (a, b) in enumerate(zip(known, ids, strict=False)) if a != b), min(len(known), len(ids)))
    return known[:same]


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
