"""Which prompts share a file, which share a batch, and how many bytes will be written.

The files of a run depend on the prompts alone (never on batches, shards or restarts); batches depend on memory.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from command_line import UserError
from pt_fields import row_bytes

from capture.decode import Prompt
from capture.recorder import CaptureOptions

CGROUP = Path("/sys/fs/cgroup")  # of the container
ROWS_PER_FILE = 64
BYTES_PER_FILE = 256 << 20
WINDOW_ROWS = 256  # prompts sorted by length together
WINDOW_BYTES = 1 << 30
CPU_ROWS = 32  # more rows gain nothing: the step is bound by arithmetic then
GPU_ROWS = 256
FREE_SHARE = 0.6  # of the free memory that a batch may take
GROW_AFTER = 64  # steps without a shortage after which a shrunk batch may grow again


# --- files


@dataclass(frozen=True)
class RowCost:
    """Bytes that a prompt takes in a .pt file, from the model's shape and what is captured (see `row_bytes`)."""

    sizes: dict[str, int]  # of the axes, but for a prompt's own length
    itemsize: int
    count: dict[str, float]
    all_positions: bool = False

    def bytes(self, length: int) -> int:
        """Bytes of a prompt of (or padded to) `length` tokens, its texts left out."""
        own = {"S": length, "T": length if self.all_positions else 1}
        return row_bytes(self.sizes | own, self.itemsize, self.count)


def row_cost(config: Any, options: CaptureOptions, regions: int, pooled: int, itemsize: int) -> RowCost:
    """Cost of a row from a model's config alone, before its weights are loaded."""
    layers = attention_layers(config)
    config = config.get_text_config(decoder=True)
    sizes = {"R": regions, "L": layers, "H": _largest(config, "num_attention_heads"), "P": pooled}
    sizes |= {"D": config.hidden_size, "k": min(options.topk_logits, config.vocab_size)}
    sizes["F"] = _largest(config, "intermediate_size", "n_inner", "ffn_dim") or 4 * config.hidden_size
    maps = sum(layer < layers for layer in options.raw_layers)
    count: dict[str, float] = {"hidden_states": len(options.raw_layers), "attentions": maps}
    count |= {"mlp_pooled": options.neurons, "gate_pooled": bool(options.gates), "attention_entropy": options.entropy}
    if options.pooled_dtype:
        count["hidden_pooled"] = 2 / itemsize
    return RowCost(sizes, itemsize, count, options.topk_positions == "all")


def attention_layers(config: Any) -> int:
    """Number of layers. Raises UserError if they are not known, or not all of them have attention."""
    config = config.get_text_config(decoder=True)
    kinds = set(getattr(config, "layer_types", None) or ())
    layers = getattr(config, "num_hidden_layers", 0)
    without = any("attention" not in kind or "linear" in kind for kind in kinds)
    if not layers or not _largest(config, "num_attention_heads") or without:
        raise UserError(
            f"{config.model_type}: not all its layers have attention, so it cannot be captured; choose another model"
        )
    return int(layers)


def _largest(config: Any, *names: str) -> int:
    """The first of these settings that a config has, the largest of its layers if they differ; 0: none."""
    for one in (config, *(getattr(config, "per_layer_config", None) or ())):
        for name in names:
            try:
                value = getattr(one, name, None)
            except RuntimeError:  # transformers refuses to read a setting of single layers here
                continue
            if value:
                return int(max(value) if isinstance(value, list | tuple) else value)
    return 0


def plan_files(lengths: Sequence[int], cost: RowCost) -> list[range]:
    """The positions of the prompts of each file: at most ROWS_PER_FILE, and BYTES_PER_FILE if rows are large."""
    files, start, longest = [], 0, 0
    for position, length in enumerate(lengths):
        wide = max(longest, length)
        rows = position - start + 1
        if rows > 1 and (rows > ROWS_PER_FILE or rows * cost.bytes(wide) > BYTES_PER_FILE):
            files.append(range(start, position))
            start, wide = position, length
        longest = wide
    if lengths:
        files.append(range(start, len(lengths)))
    return files


def file_bytes(positions: range, lengths: Sequence[int], cost: RowCost) -> int:
    """Estimated size of one file; every row is padded to its longest."""
    return len(positions) * cost.bytes(max(lengths[position] for position in positions))


def windows_of(files: Sequence[range], lengths: Sequence[int], cost: RowCost) -> Iterator[list[range]]:
    """Files that are run together, so that prompts of similar length meet; bounded, since their rows wait in memory."""
    window: list[range] = []
    rows = size = 0
    for positions in files:
        more = file_bytes(positions, lengths, cost)
        if window and (rows + len(positions) > WINDOW_ROWS or size + more > WINDOW_BYTES):
            yield window
            window, rows, size = [], 0, 0
        window.append(positions)
        rows, size = rows + len(positions), size + more
    if window:
        yield window


# --- batches


@dataclass
class BatchLimit:
    """How many rows may run together: the number given, or what memory takes, learning from shortage.

    A batch needs rows × (positions × `per_position` + longest prompt² × `per_pair`) bytes; `free` None: not counted.
    `equal_lengths`: prompts of one length only, so that no row is padded.
    """

    rows: int
    samples: int = 1
    new_tokens: int = 0
    equal_lengths: bool = False
    free: int | None = None
    per_position: int = 0
    per_pair: int = 0

    def __post_init__(self) -> None:
        self.most, self.calm_steps = self.rows, 0

    def may_join(self, running: int, waiting: int) -> bool:
        """Whether it is time to read more prompts: half the batch is free (joining copies the cache once)."""
        return waiting > 0 and (running == 0 or (2 * running <= self.rows and not self.equal_lengths))

    def next_group(self, waiting: deque[Prompt], running: int) -> list[Prompt]:
        """Take from `waiting` what may run together now; at least one."""
        group: list[Prompt] = []
        longest = 0
        while waiting:
            length = len(waiting[0].input_ids)
            longest = max(longest, length)
            rows = running + (len(group) + 1) * self.samples
            size = rows * ((longest + self.new_tokens) * self.per_position + longest**2 * self.per_pair)
            full = rows > self.rows or (self.free is not None and size > FREE_SHARE * self.free)
            if group and (full or (self.equal_lengths and length != len(group[0].input_ids))):
                break
            group.append(waiting.popleft())
        return group

    def half(self) -> BatchLimit:
        """A limit of half as many rows, and of half the memory."""
        return replace(self, rows=max(1, self.rows // 2), free=None if self.free is None else self.free // 2)

    def shrink(self, rows: int) -> None:
        """Memory ran out with `rows` prompts: at most half of them next time."""
        self.rows = max(1, min(self.rows, rows * self.samples) // 2)
        self.calm_steps = 0

    def grow(self) -> None:
        """A step went well; after many, a batch that was shrunk may grow again."""
        self.calm_steps += 1
        if self.calm_steps >= GROW_AFTER and self.rows < self.most:
            self.rows = min(self.most, self.rows * 2)
            self.calm_steps = 0


def batch_limit(batch_size: str, model: Any, cost: RowCost, **options: Any) -> BatchLimit:
    """The limit for `--batch_size` (a number or `auto`), from the memory that is free now; `options` of BatchLimit."""
    if batch_size != "auto":
        return BatchLimit(int(batch_size), **options)
    config, sizes = model.config.get_text_config(decoder=True), cost.sizes
    head_size = _largest(config, "head_dim") or sizes["D"] // sizes["H"]
    kv_heads = _largest(config, "num_key_value_heads") or sizes["H"]
    # Joining two batches holds their cache twice. Reading a prompt holds a few states and the MLP's inner ones at
    # once, in float32 where they are averaged, and the raw states and maps of every raw layer.
    raw_states, raw_maps = (int(cost.count[name]) for name in ("hidden_states", "attentions"))
    cache = 2 * 2 * sizes["L"] * kv_heads * head_size * cost.itemsize
    states = 4 * (8 * sizes["D"] + 4 * sizes["F"]) + raw_states * sizes["D"] * cost.itemsize
    maps = sizes["H"] * (raw_maps * cost.itemsize + (12 if raw_maps else 0))
    rows = CPU_ROWS if model.device.type == "cpu" else GPU_ROWS
    return BatchLimit(rows, **options, free=free_memory(model.device), per_position=cache + states, per_pair=maps + 4)


def free_memory(device: torch.device) -> int:
    """Bytes free on a device; for the CPU, what the system and a container's limit leave."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    available = int(psutil.virtual_memory().available)
    try:
        limit, used = (int((CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        cached = re.findall(r"^inactive_file (\d+)", (CGROUP / "memory.stat").read_text(), re.MULTILINE)
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        return available
    return min(available, limit - used + sum(map(int, cached)))  # the cache is given back when memory is asked for
