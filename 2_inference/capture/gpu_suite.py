"""All about a GPU in one call: is capture right there, what does it cost, how near to its bound is decoding?

Every figure is a record {part, what, measure, value}, which docs/render_tables.py makes a table of. A CPU runs the same
at toy size.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from capture.decode import OutOfMemory, memory_errors
from capture.recorder import CaptureOptions, down_projection, find_layers
from capture.timing import (
    POOLED,
    REGION_NAMES,
    bench_batches,
    example_prompts,
    plain_generate,
    recording_generator,
    timed,
)

SIZES = {"cuda": {"lengths": [512, 8192], "batch_size": 64, "max_tokens": 32768}}  # 64 × 512 and 4 × 8,192 tokens
TOY = {"lengths": [12, 24], "batch_size": 2, "max_tokens": 48}
PARITY_TOKENS = 96
DECODED = (8, 40)  # tokens; the difference is free of reading the prompt
Record = dict[str, Any]


def bench_gpu(args: argparse.Namespace, model: Any) -> tuple[list[Record], bool]:
    """The records, and whether a signal stopped the run; those of the parts that were finished are kept."""
    args = argparse.Namespace(**vars(args) | SIZES.get(model.device.type, TOY))
    args.ways, args.raw_layers = ["generate", "ours", "two_pass"], ["0", "-1"]
    records: list[Record] = []
    parts: tuple[Callable[[argparse.Namespace, Any], Iterator[Record]], ...] = (parity, decoding, costs)
    try:
        for part in parts:
            for record in part(args, model):
                records.append(record)
    except KeyboardInterrupt:
        return records, True
    return records, False


def parity(args: argparse.Namespace, model: Any) -> Iterator[Record]:
    """The largest difference of each captured field from an eager pass, over the largest number of that pass.

    Both are in the model's dtype: in bfloat16 two right ways differ by some hundredths, which is what `eager_again`
    shows, the logits of the same eager pass beside another row.
    """
    chance = torch.Generator().manual_seed(0)
    ids = torch.randint(10, model.config.get_text_config().vocab_size - 10, (2, PARITY_TOKENS), generator=chance)
    last = len(find_layers(model)[1]) - 1
    options = CaptureOptions(raw_layers=(0, last), neurons=True, entropy=True)
    generator = recording_generator(model, options, max_new_tokens=1)
    prompts = example_prompts(ids)
    fields = {result.prompt.key: result.fields for result in generator.run([prompts])}[0]
    generator.recorder.close()

    wanted, mask = eager_fields(model, ids[:1]), prompts[0].region_mask.float()
    pooled = [REGION_NAMES.index(name) for name in POOLED]
    mean = mask / mask.sum(0)  # [S, R]
    maps, states = wanted["maps"], wanted["states"]
    visible = (maps > 0).sum(-1).clamp(min=2)
    own_entropy = -(maps * maps.clamp(min=1e-30).log()).sum(-1) / visible.log()
    seen_more = mask * (torch.arange(len(mask)) > 0)[:, None]
    expected = {
        "span_mass": torch.einsum("lhqk,qr,kt->lhrt", maps, mean, mask),
        "attention_entropy": torch.einsum("lhq,qr->lhr", own_entropy, seen_more / seen_more.sum(0)),
        "hidden_pooled": torch.einsum("lsd,sp->lpd", states, mean[:, pooled]),
        "mlp_pooled": torch.einsum("lsf,sp->lpf", wanted["neurons"], mean[:, pooled]),
        "topk_vals": wanted["logits"][:1].topk(10).values,
    }
    found = {name: fields[name].float() for name in expected}
    for layer in (0, last):
        name = f"layer_{layer}"
        found |= {f"hidden_states {layer}": fields["hidden_states"][name].float()}
        found |= {f"attentions {layer}": fields["attentions"][name].float()}
        expected |= {f"hidden_states {layer}": states[layer], f"attentions {layer}": maps[layer]}
    expected["eager_again"], found["eager_again"] = wanted["logits"][:1], eager_fields(model, ids)["logits"][:1]
    for name, values in expected.items():
        known = values.isfinite()
        error = (found[name] - values)[known].abs().max() / values[known].abs().max()
        yield {"part": "parity", "what": name, "measure": "largest error ÷ largest value", "value": float(error)}


def eager_fields(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """float32 on the CPU, of the first row of an eager pass: maps [L,H,S,S], states [L+1,S,D], neurons [L,S,F]; and
    logits [B,V] at the last token of all."""
    neurons: list[torch.Tensor] = []
    before = model.config._attn_implementation
    hooks = [
        down_projection(layer).register_forward_pre_hook(lambda _module, given: neurons.append(given[0][:1].float()))
        for layer in find_layers(model)[1]
    ]
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        out = model(ids.to(model.device), output_hidden_states=True, output_attentions=True)
    model.set_attn_implementation(before)
    for hook in hooks:
        hook.remove()
    return {
        "maps": torch.stack([one[0].float().cpu() for one in out.attentions]),
        "states": torch.stack([one[0].float().cpu() for one in out.hidden_states]),
        "neurons": torch.cat([one.reshape(1, ids.shape[1], -1).cpu() for one in neurons]),
        "logits": out.logits[:, -1].float().cpu(),
    }


def decoding(args: argparse.Namespace, model: Any) -> Iterator[Record]:
    """Milliseconds of a decoding step, beside those that reading all weights from memory once takes."""
    length = args.lengths[0]
    rows = min(args.batch_size, args.max_tokens // length)
    ids = torch.randint(10, model.config.get_text_config().vocab_size - 10, (rows, length)).to(model.device)
    bound = 1000 * sum(weight.nbytes for weight in model.parameters()) / bandwidth(model.device)
    part = f"decoding, {rows} × {length:,} tokens"
    yield {"part": part, "what": "all weights read once", "measure": "ms a step", "value": bound}
    options = CaptureOptions(raw_layers=())
    for name in ("generate", "ours"):
        spent = []
        for tokens in DECODED:
            if name == "generate":
                own = argparse.Namespace(**vars(args) | {"max_new_tokens": tokens})
                call: Callable[[], Any] = partial(plain_generate(model, own), ids)
                call()  # a warm-up; the other way's kernels are the same
                spent.append(timed(call, model.device.type)[0])
            else:
                generator = recording_generator(model, options, tokens)
                call = partial(list, generator.run([example_prompts(ids.cpu())]))
                spent.append(timed(call, model.device.type)[0])
                generator.recorder.close()
        step = 1000 * (spent[1] - spent[0]) / (DECODED[1] - DECODED[0])
        yield {"part": part, "what": name, "measure": "ms a step", "value": step}
        yield {"part": part, "what": name, "measure": "÷ bound", "value": step / bound}


def bandwidth(device: torch.device) -> float:
    """Bytes a second that a copy within the device's memory reads and writes, the best of five."""
    source = torch.empty(1 << (30 if device.type == "cuda" else 24), dtype=torch.uint8, device=device)
    target, best = torch.empty_like(source), 0.0
    for _ in range(6):
        start = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2 * source.nbytes / (time.perf_counter() - start))
    return best


def costs(args: argparse.Namespace, model: Any) -> Iterator[Record]:
    """Seconds and peak memory of each way beside `generate()`; NaN for a way that has no room."""
    attention = model.config._attn_implementation
    for length in args.lengths:
        part = f"{max(1, min(args.batch_size, args.max_tokens // length))} × {length:,} tokens"
        for way in args.ways[1:]:
            own = argparse.Namespace(**vars(args) | {"lengths": [length], "ways": [args.ways[0], way]})
            try:
                with memory_errors():
                    rows, stopped = bench_batches(own, model)
            except OutOfMemory:
                yield {"part": part, "what": way, "measure": "÷ generate()", "value": float("nan")}
                continue
            finally:
                model.set_attn_implementation(attention)  # ours has put its own in place
            for row in rows:
                if row["way"] == way:
                    yield {"part": part, "what": way, "measure": "÷ generate()", "value": row["ratio_to_generate"]}
                if row["way"] == way or way == args.ways[1]:
                    yield {"part": part, "what": row["way"], "measure": "seconds", "value": row["seconds"]}
                    yield {"part": part, "what": row["way"], "measure": "peak MB", "value": row["peak_MB"]}
            if stopped:
                raise KeyboardInterrupt
