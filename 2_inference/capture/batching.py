"""Which prompts share a file, which share a batch, and how many bytes will be written.

The files of a run depend on the prompts alone (never on batches, shards or restarts); batches depend on memory.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
GROW_AFTER = 64  # steps without a shortage after which a shrunk batch may grow again


# --- files


@dataclass(frozen=True)
class RowCost:
    """Bytes that a prompt takes in a .pt file, from the model's shape and what is captured."""

    layers: int
    heads: int
    hidden: int
    intermediate: int
    regions: int
    pooled: int
    itemsize: int
    raw_states: int
    raw_maps: int
    options: CaptureOptions

    def bytes(self, length: int) -> int:
        """Bytes of a prompt of (or padded to) `length` tokens, its texts left out."""
        sizes = {"S": length, "R": self.regions, "L": self.layers, "H": self.heads, "P": self.pooled, "D": self.hidden}
        sizes |= {"F": self.intermediate, "k": self.options.topk_logits}
        sizes["T"] = length if self.options.topk_positions == "all" else 1
        captured = {"mlp_pooled": self.options.neurons, "attention_entropy": self.options.entropy}
        raw = {"hidden_states": self.raw_states, "attentions": self.raw_maps}
        return row_bytes(sizes, self.itemsize, raw | captured)


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


def row_cost(config: Any, options: CaptureOptions, regions: int, pooled: int, itemsize: int) -> RowCost:
    """Cost of a row from a model's config alone, before its weights are loaded."""
    layers = attention_layers(config)
    config = config.get_text_config(decoder=True)
    inner = _largest(config, "intermediate_size", "n_inner", "ffn_dim") or 4 * config.hidden_size
    hidden = config.hidden_size
    states = len(set(options.raw_layers))
    maps = sum(layer < layers for layer in set(options.raw_layers))
    heads = _largest(config, "num_attention_heads")
    return RowCost(layers, heads, hidden, inner, regions, pooled, itemsize, states, maps, options)


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


@dataclass(frozen=True)
class MemoryModel:
    """Bytes that a batch needs: rows × (positions × `per_position` + longest prompt² × `per_pair`)."""

    free: int
    per_position: int
    per_pair: int

    def fits(self, rows: int, longest: int, new_tokens: int) -> bool:
        """Whether a batch fits into 60 % of what is free."""
        return rows * ((longest + new_tokens) * self.per_position + longest**2 * self.per_pair) <= 0.6 * self.free


@dataclass
class BatchLimit:
    """How many rows may run together: the number given, or what memory takes (`memory`), learning from shortage.

    `equal_lengths`: prompts of one length only, so that no row is padded.
    """

    rows: int
    memory: MemoryModel | None = None
    samples: int = 1
    new_tokens: int = 0
    equal_lengths: bool = False

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
            longest = max(longest, len(waiting[0].input_ids))
            rows = running + (len(group) + 1) * self.samples
            fits = self.memory is None or self.memory.fits(rows, longest, self.new_tokens)
            other = self.equal_lengths and group and len(waiting[0].input_ids) != len(group[0].input_ids)
            if group and (rows > self.rows or not fits or other):
                break
            group.append(waiting.popleft())
        return group

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
    rows = CPU_ROWS if model.device.type == "cpu" else GPU_ROWS
    return BatchLimit(rows, memory_model(model, cost), **options)


def memory_model(model: Any, cost: RowCost) -> MemoryModel:
    """What a batch of this model takes of the memory that is free now."""
    config = model.config.get_text_config(decoder=True)
    head_size = _largest(config, "head_dim") or cost.hidden // cost.heads
    kv_heads = _largest(config, "num_key_value_heads") or cost.heads
    # Joining two batches holds their cache twice. Reading a prompt holds a few states and the MLP's inner ones at
    # once, in float32 where they are averaged, and the raw states and maps of every raw layer.
    cache = 2 * 2 * cost.layers * kv_heads * head_size * cost.itemsize
    states = 4 * (8 * cost.hidden + 4 * cost.intermediate) + cost.raw_states * cost.hidden * cost.itemsize
    maps = cost.heads * (cost.raw_maps * cost.itemsize + (12 if cost.raw_maps else 0))
    return MemoryModel(free_memory(model.device), cache + states, maps + 4)


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
