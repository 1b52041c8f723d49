"""Regions for .pt files that store none (the reference pipeline's format): found from the token ids by a tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from command_line import UserError, one_line
from run_store import Run
from style_rows import twin_region
from token_spans import BASE_REGIONS, RenderedPrompt, character_regions, region_mask


class TokenRegions:
    """Finds the base regions, and `edited` if the run has a prompts.json, from a file's input_ids.

    The same character rules as in stage 2. The prompt's own text is the row's text in prompts.json if it is found
    among the tokens, else everything after the leading special tokens.
    """

    def __init__(self, tokenizer_name: str, run: Run, style: str, compared: str | None = None) -> None:
        self._tokenizer = load_tokenizer(tokenizer_name)
        self._run, self._style = run, style
        edited = [] if run.clean_style is None else ["edited"]
        if style == run.clean_style:
            edited = [twin_region("edited", compared)] if compared else []
        self._names = [*BASE_REGIONS, *edited]

    def find(self, content: dict[str, Any], path: Path) -> tuple[list[str], np.ndarray, np.ndarray]:
        """(region names, region mask [B,S,R] bool, real tokens [B,S] bool); UserError if there are no ids."""
        ids = content.get("input_ids")
        if ids is None:
            raise UserError(f"{path}: has no input_ids, so its regions cannot be found; run stage 2 again")
        real = self._real_tokens(content, ids.numpy())
        mask = np.zeros((*ids.shape, len(self._names)), dtype=bool)
        for position, index in enumerate(content["original_indices"]):
            mask[position, real[position]] = self._row_mask(ids[position].numpy()[real[position]], int(index))
        return self._names, mask, real

    def _real_tokens(self, content: dict[str, Any], ids: np.ndarray) -> np.ndarray:
        if "attention_mask" in content:
            return content["attention_mask"].bool().numpy()
        pad = self._tokenizer.pad_token_id
        if pad is None:  # as the reference pipeline does
            pad = self._tokenizer.eos_token_id
        # Only runs of pads at the ends: the pad token may also stand inside a prompt.
        inside = ids != pad
        return inside.cumsum(axis=1).astype(bool) & inside[:, ::-1].cumsum(axis=1)[:, ::-1].astype(bool)

    def _row_mask(self, ids: np.ndarray, index: int) -> np.ndarray:
        text, offsets = decoded_offsets(self._tokenizer, ids.tolist())
        row = self._run.row(index)
        own = str(row.get(self._style, ""))
        start = text.rfind(own) if own else -1
        if start < 0:
            special = set(self._tokenizer.all_special_ids)
            first = next((i for i, token in enumerate(ids.tolist()) if token not in special), 0)
            start, own = offsets[first][0], text[offsets[first][0] :]
        clean = row.get(str(self._run.clean_style))
        spans = character_regions(own, self._names, row, clean, row.get("task"))
        rendered = RenderedPrompt(text, (start, start + len(own)))
        return region_mask(rendered, offsets, self._names, spans).numpy()


def decoded_offsets(tokenizer: Any, ids: list[int]) -> tuple[str, list[tuple[int, int]]]:
    """(text of the tokens, character offsets of each), from what each token adds to the decoded text."""
    offsets: list[tuple[int, int]] = []
    end = 0
    for count in range(1, len(ids) + 1):
        start, end = end, max(end, len(_decode(tokenizer, ids[:count])))
        # The second half of a character cut in two adds nothing: it stands where its first half does.
        offsets.append((start, end) if start < end or not offsets else offsets[-1])
    return _decode(tokenizer, ids), offsets


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model name or folder. UserError if it cannot be loaded."""
    from transformers import AutoTokenizer  # a second to import, needed for this format only

    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:  # the hub, the file system and the format each have their own errors
        raise UserError(f"--tokenizer {name}: cannot be loaded: {one_line(str(error), 200)}") from None
