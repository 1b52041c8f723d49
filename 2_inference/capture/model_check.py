"""A check before a run: does what is captured from this model equal an eager pass, and may its prompts share a batch?

It reads two short pieces of the run's own prompts. The shorter one is captured alone and compared with transformers'
eager attentions and hidden states. Then both are captured together, as the run would do it: padded, else prompts of
equal length, else one by one. So a model of an unknown kind is refused in one line, or run as it can be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from typing import Any

import torch
from command_line import UserError, one_line

from capture.batching import BatchLimit
from capture.decode import GenerationOptions, Generator, Prompt, Result
from capture.recorder import PREFIX_REGIONS, CaptureOptions, Recorder, cannot_capture

LONG, SHORT, SHARED = 24, 12, 4  # tokens of the two pieces, and those that both begin with
STEPS = 3  # tokens of a response
MODES = ("padded", "equal", "alone")


@dataclass(frozen=True)
class Batching:
    """Prompts share a pass `padded`, of `equal` length only, or are `alone`; and whether a prefix is read once."""

    rows: str = "padded"
    prefix: bool = True


def check_model(
    model: Any, tokenizer: Any, options: CaptureOptions, ids: Sequence[list[int]], wanted: Batching, new_tokens: int
) -> Batching:
    """The quickest way, from `wanted` on, in which a batch gives what a prompt alone gives.

    `ids` are the tokens of one or two prompts. Raises UserError if the capture of one prompt alone is not what an eager
    pass gives, or fails.
    """
    long, same, short = (list(islice(cycle(one), n)) for one, n in ((ids[0], LONG), (ids[0], SHORT), (ids[-1], SHORT)))
    short[:SHARED] = long[:SHARED]
    trial = _Trial(model, tokenizer, options, min(STEPS, new_tokens))
    try:
        alone = trial.capture([short], Batching("alone", prefix=False))
        if problem := trial.against_eager(short, alone):
            raise cannot_capture(problem)
        for rows in MODES[MODES.index(wanted.rows) :]:
            for prefix in (True, False) if wanted.prefix else (False,):
                if rows == "alone" and not prefix:
                    break  # the very capture that was compared
                together = {"padded": [long, short], "equal": [same, short], "alone": [short]}[rows]
                if not trial.differs(trial.capture(together, Batching(rows, prefix)), alone):
                    return Batching(rows, prefix)
    except UserError:
        raise
    except Exception as error:  # whatever the code of a model of an unknown kind may raise
        raise cannot_capture(f"its code fails here ({type(error).__name__}: {one_line(str(error), 200)})") from error
    return Batching("alone", prefix=False)


def positions_follow_the_longest_row(config: Any, longest: int) -> bool:
    """Whether the longest row of a batch decides its rotary embeddings (longrope, dynamic NTK): only beyond the model's
    original context. A padded row and a prefix read alone would then be rotated by other frequencies."""
    config = config.get_text_config(decoder=True)
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    own = getattr(config, "original_max_position_embeddings", None)
    return any(
        one.get("rope_type", one.get("type")) in ("longrope", "dynamic")
        and longest > (one.get("original_max_position_embeddings") or own or config.max_position_embeddings)
        for one in [rope, *(value for value in rope.values() if isinstance(value, dict))]
    )


class _Trial:
    """Captures of the pieces, every token a region of its own, and what they are compared with."""

    def __init__(self, model: Any, tokenizer: Any, options: CaptureOptions, steps: int):
        self.model, self.tokenizer, self.steps = model, tokenizer, steps
        self.options = replace(options, topk_positions="last")
        self.names = [*PREFIX_REGIONS, *(f"token {i}" for i in range(LONG))]
        self.exact = model.dtype in (torch.float32, torch.float64)
        self.tolerance = 5e-3 if self.exact else 0.1  # bfloat16 itself: 0.01 on SmolLM2

    def capture(self, pieces: list[list[int]], how: Batching) -> Result:
        """What is captured of the last piece."""
        recorder = Recorder(self.model, self.options)
        try:
            options = GenerationOptions(max_new_tokens=self.steps)
            limit = BatchLimit(len(pieces), equal_lengths=how.rows == "equal")
            generator = Generator(self.model, self.tokenizer, recorder, options, limit)
            generator.set_regions(self.names, self.names)
            generator.set_prefix(pieces[0][:SHARED] if how.prefix else [])
            prompts = []
            for key, ids in enumerate(pieces):
                mask = torch.zeros(len(ids), len(self.names), dtype=torch.bool)
                mask[:, PREFIX_REGIONS.index("all")] = True
                mask[:SHARED, PREFIX_REGIONS.index("context")] = True
                mask[0, PREFIX_REGIONS.index("first")] = True
                mask[:, len(PREFIX_REGIONS) :].fill_diagonal_(True)
                prompts.append(Prompt(key, ids, mask))
            result = max(generator.run([prompts]), key=lambda result: result.prompt.key)
        finally:
            recorder.close()
        if result.error:
            raise UserError(result.error)
        return result

    @torch.inference_mode()
    def against_eager(self, ids: list[int], found: Result) -> str:
        """What differs from transformers' eager pass over the piece and its response; "" if nothing does."""
        base = self.model.config.get_text_config(decoder=True)._attn_implementation
        answer = found.responses[0].ids
        try:
            self.model.set_attn_implementation("eager")
            text = torch.tensor([ids + answer[:-1]], device=self.model.get_input_embeddings().weight.device)
            expected = self.model(text, output_hidden_states=True, output_attentions=True, use_cache=False)
        finally:
            self.model.set_attn_implementation(base)
        tokens = slice(len(PREFIX_REGIONS), len(PREFIX_REGIONS) + len(ids))
        states, maps = expected.hidden_states, expected.attentions
        hidden, mass = found.fields["hidden_pooled"][:, tokens], found.fields["span_mass"][:, :, tokens, tokens]
        if states and len(states) == len(hidden):
            whole = torch.stack([state[0, : len(ids)].cpu() for state in states])
            if (gap := _state_gap(hidden, whole)) > self.tolerance:
                return f"its hidden states differ by {gap:.0%} from those of a plain pass with eager attention"
        if maps and len(maps) == len(mass) and all(one is not None and one.dim() == 4 for one in maps):
            whole = torch.stack([one[0, :, : len(ids), : len(ids)].float().cpu() for one in maps])
            if (gap := _mass_gap(_normalised(mass), _normalised(whole))) > self.tolerance:
                return f"its attention differs from transformers' own eager maps by {gap:.0%}"
        for layer, kept in found.fields.get("attentions", {}).items():
            if (gap := _mass_gap(kept, mass[int(layer.removeprefix("layer_"))])) > self.tolerance:
                return f"the raw map of {layer} and the mass on regions differ by {gap:.0%}"
        logits = expected.logits[0, len(ids) - 1 :].float()
        behind = [float((row.max() - row[token]) / row.std()) for row, token in zip(logits, answer, strict=False)]
        return "its text is another than without capture" if any(one > self.tolerance for one in behind) else ""

    def differs(self, found: Result, alone: Result) -> bool:
        """Whether what was captured in a batch differs from what was captured alone."""
        # Single tokens of a prefix are no regions of it.
        rows = [*range(len(PREFIX_REGIONS)), *range(len(PREFIX_REGIONS) + SHARED, len(PREFIX_REGIONS) + SHORT)]
        one, two = found.fields, alone.fields
        mass = _mass_gap(one["span_mass"][:, :, rows][..., rows], two["span_mass"][:, :, rows][..., rows])
        hidden = _state_gap(one["hidden_pooled"][:, rows], two["hidden_pooled"][:, rows])
        text = self.exact and found.responses[0].ids != alone.responses[0].ids
        return max(mass, hidden) > self.tolerance or text


def _state_gap(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest relative error of a layer [L+1, S, D], the mean over its tokens; of the embeddings, which are not
    rounded yet, five times as much, so that a wrong position is seen in half precision, too."""
    found, expected = found.float(), expected.float()
    errors = ((found - expected).norm(dim=-1) / expected.norm(dim=-1).clamp(min=1e-6)).mean(-1)
    errors[0] *= 5
    return float(errors.max())


def _normalised(maps: torch.Tensor) -> torch.Tensor:
    return maps.float() / maps.float().sum(-1, keepdim=True).clamp(min=1e-6)


def _mass_gap(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Share of the attention that lies elsewhere, the mean over heads and queries of the worst layer."""
    return float((found.float() - expected.float()).abs().sum(-1).div(2).flatten(-2).mean(-1).max())
