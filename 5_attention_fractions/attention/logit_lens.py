"""Logit lens (nostalgebraist 2020): the model's own final norm and head, applied to the residual stream of a layer."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from command_line import UserError
from load_model import load_model, scaled_logits

AGREEMENT = 0.02  # relative error allowed between the lens at the last layer and the logits of the run (16-bit states)
ROWS_AT_ONCE = 64  # a row's logits are as large as the vocabulary


@dataclass
class LogitLens:
    """Final norm and head of a model. `hidden_states[L]` is after the norm already: there the head alone is used."""

    norm: Any
    model: Any
    tokenizer: Any = None  # to tell a token of white space alone from a word's first

    @property
    def layer_count(self) -> int:
        """L, the index of the last entry of `hidden_states`."""
        return int(self.model.config.get_text_config(decoder=True).num_hidden_layers)

    def logits(self, states: torch.Tensor, normed: bool) -> torch.Tensor:
        """Logits [..., V] float32 of states [..., D]; `normed`: they are after the final norm."""
        head = self.model.get_output_embeddings()
        with torch.no_grad():
            states = states.to(head.weight.device, head.weight.dtype)
            logits = head(states if normed else self.norm(states))
            return scaled_logits(self.model.config.get_text_config(decoder=True), logits).float().cpu()

    def change(self, clean: np.ndarray, style: np.ndarray, clean_top1: np.ndarray) -> dict[str, np.ndarray]:
        """What each layer's lens says; clean, style [n,L+1,D], clean_top1 [n] the clean run's first token. All [n,L+1]:

        `lens_kl`: KL(clean || style) in nats; `lens_top1_probability`: of the clean run's first token under the style;
        `lens_top1_probability_change`: that minus its probability in the clean prompt; `lens_token`,
        `lens_token_clean`: id of the likeliest token. A layer whose states are all NaN, because the run does not hold
        it, stays NaN.
        """
        names = ("lens_kl", "lens_top1_probability", "lens_top1_probability_change", "lens_token", "lens_token_clean")
        found = np.full((len(names), *clean.shape[:2]), np.nan)
        for layer in range(clean.shape[1]):
            if np.isnan(clean[:, layer]).all():
                continue
            for start in range(0, len(clean), ROWS_AT_ONCE):
                rows = slice(start, start + ROWS_AT_ONCE)
                pair = torch.from_numpy(np.stack([clean[rows, layer], style[rows, layer]]))
                log_p, log_q = self.logits(pair, normed=layer == self.layer_count).log_softmax(-1)
                first = torch.from_numpy(clean_top1[rows, None])
                before, after = (side.gather(-1, first)[:, 0].exp() for side in (log_p, log_q))
                kl = (log_p.exp() * (log_p - log_q)).sum(-1)
                tokens = log_q.argmax(-1), log_p.argmax(-1)
                found[:, rows, layer] = torch.stack([kl, after, after - before, *tokens]).numpy()
        return dict(zip(names, found, strict=True))

    def readouts(self, prompts: Sequence[list[int]], tokens: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """(ranks, log probabilities) [n, L+1] of a token at the end of each prompt, by the lens of each layer; rank 1
        is the likeliest.

        The prompts are read here, what all of them begin with only once.
        """
        shortest = min(map(len, prompts)) - 1
        shared = next((i for i, ids in enumerate(zip(*prompts, strict=False)) if len({*ids}) > 1), shortest)
        shared = min(shared, shortest)
        ranks, logprobs = (np.empty((len(prompts), self.layer_count + 1)) for _ in "rl")
        with torch.no_grad():
            prefix = self._read([prompts[0][:shared]], None).past_key_values if shared else None
            last: list[Any] = [None] * len(prompts)  # [L+1, D] each
            for places in _equally_long(prompts):
                past = copy.deepcopy(prefix)
                if past is not None:
                    past.batch_repeat_interleave(len(places))
                read = self._read([prompts[place][shared:] for place in places], past).hidden_states
                for row, place in enumerate(places):
                    last[place] = torch.stack([state[row, -1].cpu() for state in read])
            states, asked = torch.stack(last), torch.tensor(tokens)[:, None]
            for layer in range(self.layer_count + 1):
                for start in range(0, len(prompts), ROWS_AT_ONCE):
                    rows = slice(start, start + ROWS_AT_ONCE)
                    logits = self.logits(states[rows, layer], normed=layer == self.layer_count)
                    of_token = logits.gather(-1, asked[rows])
                    ranks[rows, layer] = (logits > of_token).sum(-1) + 1
                    logprobs[rows, layer] = (of_token - logits.logsumexp(-1, keepdim=True))[:, 0]
        return ranks, logprobs

    def _read(self, prompts: list[list[int]], past: Any) -> Any:
        """Output of the base model, which has no head, on tokens that follow those of a cache."""
        ids = torch.tensor(prompts, device=self.model.get_input_embeddings().weight.device)
        return self.model.base_model(ids, past_key_values=past, output_hidden_states=True, use_cache=True)

    def check(self, last_states: np.ndarray, values: np.ndarray, indices: np.ndarray) -> None:
        """Raise UserError if the head does not give the logits that the run holds (another model, another head).

        last_states [n,D] of hidden_states[L]; topk_vals, topk_indices [n,k] at the last token.
        """
        own = self.logits(torch.from_numpy(last_states), normed=True).gather(-1, torch.from_numpy(indices)).numpy()
        if not np.abs(own - values).max() <= AGREEMENT * np.abs(values).max():
            raise UserError("--model_name: its head does not give this run's logits; name the model that made the run")

    def check_size(self, layers: int, hidden_size: int) -> None:
        """Raise UserError if the model has another number of layers or hidden size than the run."""
        own = (self.layer_count, int(self.model.get_output_embeddings().weight.shape[-1]))
        if own != (layers, hidden_size):
            raise UserError(
                f"--model_name: it has {own[0]} layers of hidden size {own[1]}, the run {layers} of {hidden_size}; "
                "name the model that made the run"
            )


def _equally_long(prompts: Sequence[list[int]]) -> Iterator[list[int]]:
    """Places of prompts that are equally long, at most ROWS_AT_ONCE together: they are read without padding."""
    places: dict[int, list[int]] = {}
    for place, ids in enumerate(prompts):
        places.setdefault(len(ids), []).append(place)
    for several in places.values():
        for start in range(0, len(several), ROWS_AT_ONCE):
            yield several[start : start + ROWS_AT_ONCE]


def open_lens(model_name: str, dtype: str = "auto", device_map: str | None = None) -> LogitLens:
    """Load a model for its norm and head. Raises UserError if it cannot be loaded or keeps no final norm."""
    model, tokenizer = load_model(model_name, dtype=dtype, device_map=device_map)
    return LogitLens(find_final_norm(model), model, tokenizer)


def find_final_norm(model: Any) -> Any:
    """The norm that follows the decoder's layers: the last norm among the modules beside the list of layers."""
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    for module in model.modules():
        children = list(module.children())
        lists = [i for i, m in enumerate(children) if isinstance(m, torch.nn.ModuleList) and len(m) == count]
        if lists and (norms := [m for m in children[lists[0] :] if "norm" in type(m).__name__.lower()]):
            return norms[-1]
    raise UserError(f"{type(model).__name__}: its final norm cannot be found; run without --model_name")
