"""A valid run on disk without a language model: a tiny deterministic attention stack over real prompts and regions.

Every number agrees with every other as in a run of stage 2: `span_mass` and `attention_entropy` come from the maps in
`attentions`, the pooled states from `hidden_states`, the regions from the characters. The same text always gives the
same numbers. A test plants an effect by two hooks of `write_run`:

    scores(scores, style, index, regions)   edits the attention scores [L,H,S,S] before the softmax, in place;
                                            regions: {name: [S] bool}
    change(row, style, index)               edits a finished row's fields (no B axis), in place

    folder = write_run(tmp_path / "run", prompt_rows(12, ["swap", "polite"]), layers=3, heads=4)
"""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from load_json import CLEAN_KEYS, is_style_key
from pt_fields import pack_rows
from run_store import begin_run, save_pt
from style_names import MATCHED, matched_style, source_style
from token_spans import RenderedPrompt, character_regions, edited_spans, region_mask, region_names

NOUNS = ["apples", "pencils", "marbles", "tickets", "candles", "pigeons", "buttons", "cookies", "ladders", "lemons"]
VERBS = ["Count", "Gather", "Combine", "Total", "Measure", "Collect"]
PAD = 0
VOCABULARY = 97

Regions = dict[str, torch.Tensor]
ScoresHook = Callable[[torch.Tensor, str, int, Regions], None]
ChangeHook = Callable[[dict[str, Any], str, int], None]


@dataclass(frozen=True)
class Size:
    """What is captured: L layers, H heads, hidden size D, F neurons (0: none), raw layers, k top logits."""

    layers: int = 2
    heads: int = 3
    hidden: int = 8
    neurons: int = 0
    raw_layers: tuple[int, ...] = (0,)
    topk: int = 5


# --- prompts


def prompt_rows(count: int, styles: Sequence[str] = ("swap",), templates: int = 0, seed: int = 0) -> list[dict]:
    """Rows of a prompt file: a maths prompt, each style with one mistyped word, `_template` where templates > 0.

    `split` cuts the word that the first other style mistypes.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for index in range(count):
        a, b = (int(x) for x in rng.integers(2, 99, 2))
        kinds = f"{NOUNS[index % len(NOUNS)]} and the {NOUNS[(index + 3) % len(NOUNS)]}"
        clean = f"{VERBS[index % len(VERBS)]} the {kinds} carefully number {index}: {a} + {b} ="
        row = {"element_index": index + 1, "normal": clean, "answer": str(a + b)}
        first = next((style for style in styles if style != "split"), "split")
        for style in styles:
            word_of = zlib.crc32(f"{seed} {index} {first if style == 'split' else style}".encode())
            row[style] = typo(clean, word_of, cut=style == "split")
        if templates:
            row["_template"] = f"template_{index % templates}"
        rows.append(row)
    return rows


def typo(text: str, seed: int, cut: bool = False) -> str:
    """`text` with two neighbouring letters exchanged in a word of five or more before the colon, not in the first;
    cut: a soft hyphen between them instead."""
    rng = np.random.default_rng(seed)
    words = [m.span() for m in re.finditer(r"\b[a-z]{5,}", text.partition(":")[0]) if m.start()]
    start, end = words[rng.integers(len(words))]
    places = [i for i in range(start, end - 1) if text[i] != text[i + 1]]
    place = places[rng.integers(len(places))]
    if cut:
        return text[: place + 1] + "\u00ad" + text[place + 1 :]
    return text[:place] + text[place + 1] + text[place] + text[place + 2 :]


def with_first_word_typo(rows: list[dict], indices: Sequence[int], styles: Sequence[str] = ("swap",)) -> list[dict]:
    """The rows, those of `indices` with their typo in the first word, which holds the first token of the sequence."""
    for index in indices:
        first, _, rest = rows[index]["normal"].partition(" ")
        rows[index] |= {style: f"{first[1:]}{position} {rest}" for position, style in enumerate(styles)}
    return rows


def tokens_of(text: str) -> list[tuple[int, int]]:
    """Character spans of the tokens: up to three letters or digits or one sign, with the space before them."""
    return [m.span() for m in re.finditer(r"\s?\w{1,3}|\s?[^\w\s]|\s+", text)]


def cut_tokens_of(text: str) -> list[tuple[int, int]]:
    """Spans, in `text` without its soft hyphens, of the tokens of each piece between them."""
    spans, start = [], 0
    for piece in text.split("\u00ad"):
        spans += [(start + a, start + b) for a, b in tokens_of(piece)]
        start += len(piece)
    return spans


def with_controls(rows: list[dict], style: str, cut: Callable[[int, str, str], str]) -> list[dict]:
    """The rows with the text of `split@<style>`: `cut(index, clean word, typo)` puts soft hyphens into a clean word."""
    made = []
    for index, row in enumerate(rows):
        if style in row:
            pairs = zip(row["normal"].split(" "), row[style].split(" "), strict=True)
            words = [word if word == other else cut(index, word, other) for word, other in pairs]
            row = row | {f"{MATCHED}{style}": " ".join(words)}
        made.append(row)
    return made


# --- one row


def make_row(
    rows: list[dict],
    index: int,
    style: str,
    styles: Sequence[str],
    size: Size,
    seed: int = 0,
    few_shot: str = "",
    scores_hook: ScoresHook | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(fields of one row without their B axis, fields that all rows of the style share)."""
    row, shown, typo = rows[index], rows[index][style], matched_style(style)
    clean_style = next((key for key in CLEAN_KEYS if key in row), None)
    names = region_names(style, clean_style, list(styles))
    text = shown.replace("\u00ad", "") if typo else shown
    offsets = cut_tokens_of(few_shot + shown) if typo else tokens_of(few_shot + text)
    spans = character_regions(text, names, row, row.get(clean_style) if clean_style != style else None, row.get("task"))
    if typo:
        spans["edited"] = edited_spans(text, row[typo])[0]
    rendered = RenderedPrompt(few_shot + text, (len(few_shot), len(few_shot + text)))
    mask = region_mask(rendered, offsets, names, spans)
    ids = torch.tensor([zlib.crc32((few_shot + text)[a:b].encode()) % (VOCABULARY - 1) + 1 for a, b in offsets])
    hook = None
    if scores_hook is not None:
        regions = {name: mask[:, column] for column, name in enumerate(names)}
        hook = lambda scores: scores_hook(scores, style, index, regions)  # noqa: E731
    states, maps, neurons = forward(ids, size, seed, hook)
    pooled = [n for n in names if n in ("last", "instruction", "task") or n.startswith("edited")]
    pool = [names.index(name) for name in pooled]
    answer = str(row.get("answer", "42"))
    response = f" {answer}" if zlib.crc32(f"{text} {seed}".encode()) % 3 else f" {len(text)}"
    logits = states[-1, -1] @ _weights(size, seed)["embedding"].T
    values, indices = logits.topk(size.topk)
    fields: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": torch.ones(len(ids), dtype=torch.bool),
        "original_index": index,
        "element_index": int(row.get("element_index", index + 1)),
        "prompt": shown,
        "response": response,
        "final_prediction": few_shot + text + response,
        "finish_reason": "stop",
        "response_token_counts": len(tokens_of(response)),
        "region_mask": mask,
        "span_mass": mass_between(maps, mask).half(),
        "attention_entropy": entropy_of(maps, mask).half(),
        "hidden_pooled": mean_over(states, mask[:, pool]),
        "topk_vals": values[None],
        "topk_indices": indices[None],
        "logsumexp": logits.logsumexp(-1)[None],
    }
    if size.neurons:
        fields["mlp_pooled"] = mean_over(neurons, mask[:, pool]).half()
    if size.raw_layers:
        fields["hidden_states"] = {f"layer_{i}": states[i] for i in size.raw_layers}
        fields["attentions"] = {f"layer_{i}": maps[i] for i in size.raw_layers}
    return fields, {"regions": names, "pooled_regions": pooled, "style": style, "topk_positions": "last"}


def forward(
    ids: torch.Tensor, size: Size, seed: int = 0, edit_scores: Callable[[torch.Tensor], None] | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(hidden states [L+1,S,D], attention maps [L,H,S,S], neuron activations [L,S,F]) of the tiny stack."""
    weights, length = _weights(size, seed), len(ids)
    state = weights["embedding"][ids]
    query = torch.einsum("sd,lhde->lhse", state, weights["query"])
    key = torch.einsum("sd,lhde->lhse", state, weights["key"])
    scores = query @ key.mT / math.sqrt(size.hidden)
    if edit_scores is not None:
        edit_scores(scores)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    maps = scores.masked_fill(~causal, -torch.inf).softmax(-1)
    states, neurons = [state], []
    for layer in range(size.layers):
        mixed = torch.einsum("hst,td,hde->se", maps[layer], state, weights["value"][layer])
        state = state + mixed
        activation = torch.relu(state @ weights["up"][layer])
        neurons.append(activation)
        states.append(state)
    return torch.stack(states), maps, torch.stack(neurons)


@lru_cache(maxsize=8)
def _weights(size: Size, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    square = (size.layers, size.heads, size.hidden, size.hidden)
    return {
        "embedding": normal(VOCABULARY, size.hidden),
        "query": normal(*square) / math.sqrt(size.hidden),
        "key": normal(*square) / math.sqrt(size.hidden),
        "value": normal(*square) / math.sqrt(size.hidden) / size.heads,
        "up": normal(size.layers, size.hidden, max(1, size.neurons)),
    }


def mean_over(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """[..., S, D] averaged over each column of mask [S, P]: [..., P, D]; NaN for an empty region."""
    return torch.einsum("...sd,sp->...pd", values, mask.float()) / mask.sum(0)[:, None].float()


def mass_between(maps: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """span_mass [L,H,Q,R] of maps [L,H,S,S] and region mask [S,R]."""
    return mean_over(maps @ mask.float(), mask)


def entropy_of(maps: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """attention_entropy [L,H,Q] of maps [L,H,S,S]: H / log(visible keys), the first query left out; mean over Q."""
    length = maps.shape[-1]
    entropy = -(maps * maps.clamp_min(1e-30).log()).sum(-1)[..., 1:] / torch.arange(2, length + 1).log()
    return mean_over(entropy[..., None], mask[1:])[..., 0]


# --- files


def write_run(
    folder: str | Path,
    prompts: list[dict],
    styles: Sequence[str] | None = None,
    rows_per_file: int = 4,
    seed: int = 0,
    few_shot: str = "",
    scores: ScoresHook | None = None,
    change: ChangeHook | None = None,
    skip: Callable[[str, int], bool] | None = None,
    **size: Any,
) -> Path:
    """Write a run folder as stage 2 does; returns it.

    prompts: rows of a prompt file (and what stage 2 makes, `with_controls`); a row may lack a style.
    styles: default all of them. `size`: fields of `Size`.
    skip(style, index): rows that failed and are in no file.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{key: value for key, value in row.items() if source_style(key) == key} for row in prompts]
    (folder / "prompts.json").write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    have = list(dict.fromkeys(key for row in rows for key in row if is_style_key(key)))
    made = dict.fromkeys(key for row in prompts for key in row if source_style(key) != key)
    controls = sorted(made, key=lambda key: have.index(source_style(key)))
    for style in styles or [*have, *controls]:
        target = folder / style
        begin_run(target, {"schema_version": 1, "style": style, "model_name": "synthetic", "seed": seed}, {},
                  planned=sum(style in row for row in prompts))  # fmt: skip
        for start in range(0, len(prompts), rows_per_file):
            stop = min(start + rows_per_file, len(prompts))
            chosen = [i for i in range(start, stop) if style in prompts[i] and not (skip and skip(style, i))]
            if chosen:
                content = file_content(prompts, chosen, style, have, Size(**size), seed, few_shot, scores, change)
                save_pt(target / f"activations_{start:05d}_{stop:05d}.pt", content)
    return folder


def file_content(
    prompts: list[dict],
    indices: Sequence[int],
    style: str,
    styles: Sequence[str],
    size: Size,
    seed: int = 0,
    few_shot: str = "",
    scores: ScoresHook | None = None,
    change: ChangeHook | None = None,
) -> dict[str, Any]:
    """Content of one .pt file with the rows `indices` of a style."""
    packed, shared = [], {}
    for index in indices:
        row, shared = make_row(prompts, index, style, styles, size, seed, few_shot, scores)
        if change is not None:
            change(row, style, index)
        packed.append(row)
    return pack_rows(packed, shared, PAD)
