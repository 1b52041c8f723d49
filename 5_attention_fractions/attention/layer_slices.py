"""Which layers are read at once."""

from __future__ import annotations

from collections.abc import Iterator

BLOCK_NUMBERS = 4_000_000  # 16 MB an array of float32


def layer_slices(rows: int, width: int, layers: int) -> Iterator[slice]:
    """Slices of all layers such that an array [rows, layers of the slice, width] has about BLOCK_NUMBERS numbers."""
    step = max(1, BLOCK_NUMBERS // max(1, rows * width))
    for start in range(0, layers, step):
        yield slice(start, min(start + step, layers))
