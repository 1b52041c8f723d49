"""Read a style and the clean run side by side, pairing rows by original_index, a few files in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from command_line import UserError
from run_store import PT_NAME, Run, row_count

Batch = dict[str, np.ndarray]  # every array has the rows of one file on its first axis
Extract = Callable[[dict[str, Any], Path], Batch]


@dataclass(frozen=True)
class PairedBatch:
    """Rows of one file of a style, and those of them that have a clean twin with another text.

    rows: all B rows. paired: the positions [P] in `rows` of the pairs. clean: the clean twins of those, P rows.
    identical: how many rows have exactly the clean text (they are in no pair). unpaired: rows without a clean twin.
    """

    rows: Batch
    paired: np.ndarray
    clean: Batch
    identical: int
    unpaired: int

    @property
    def variant(self) -> Batch:
        """The paired rows of the style, P rows."""
        return take_rows(self.rows, self.paired)


def read_rows(run: Run, style: str, extract: Extract, max_samples: int | None = None) -> Iterator[Batch]:
    """What `extract(content, path)` makes of each file of a style, with `original_index` and `prompt` added.

    max_samples counts rows of the prompt file, so that every style keeps the same rows. Raises UserError for an
    unknown style.
    """
    run.chosen([style])
    for path, content in run.batches(style):
        indices = original_indices(content, path)
        if max_samples is not None and indices.min(initial=max_samples) >= max_samples:
            continue
        batch = {"original_index": indices, "prompt": _texts(content, indices, style, run), **extract(content, path)}
        keep = np.arange(len(indices)) if max_samples is None else np.flatnonzero(indices < max_samples)
        yield batch if len(keep) == len(indices) else take_rows(batch, keep)


def paired_batches(variants: Iterator[Batch], cleans: Iterator[Batch]) -> Iterator[PairedBatch]:
    """Pair each batch of a style with the clean rows of the same original_index; rows must rise from file to file."""
    window = RowWindow(cleans)
    for rows in variants:
        found, clean = window.take(rows["original_index"])
        if not len(found):
            yield PairedBatch(rows, found, {}, 0, len(rows["original_index"]))
            continue
        # None = None is no identical text: a file of the reference format may not know its prompts.
        texts = rows["prompt"][found]
        same = np.array([a is not None and a == b for a, b in zip(texts, clean["prompt"], strict=True)], dtype=bool)
        missing = len(rows["original_index"]) - len(found)
        yield PairedBatch(rows, found[~same], take_rows(clean, ~same), int(same.sum()), missing)


def take_rows(batch: Batch, rows: np.ndarray) -> Batch:
    """The chosen rows (positions, or a mask) of every array."""
    return {key: values[rows] for key, values in batch.items()}


def original_indices(content: dict[str, Any], path: Path) -> np.ndarray:
    """Row numbers in the prompt file [B]; an old file without them is numbered from its name."""
    if "original_indices" in content:
        return np.asarray([int(index) for index in content["original_indices"]], dtype=np.int64)
    match = PT_NAME.fullmatch(path.name)
    start = int(match.group(1)) if match else 0
    return start + np.arange(row_count(content))


class RowWindow:
    """The rows of a run by original index, asked for in rising order; files that lie behind are let go."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        self._batches = batches
        self._held: list[Batch] = []
        self._ended = False
        self._passed = -1  # highest index let go

    def take(self, wanted: np.ndarray) -> tuple[np.ndarray, Batch]:
        """(positions in `wanted` [P] of the rows that are there, those rows)."""
        if not len(wanted):
            return np.zeros(0, dtype=np.int64), {}
        low, high = int(wanted.min()), int(wanted.max())
        if low <= self._passed:
            raise UserError(
                f"row {low} stands in a later file than row {self._passed}; the .pt files of a style must "
                "follow the prompt file's order: run stage 2 again into a new folder"
            )
        self._advance(low, high)
        places = {
            int(index): (number, position)
            for number, batch in enumerate(self._held)
            for position, index in enumerate(batch["original_index"])
        }
        found = np.flatnonzero([int(index) in places for index in wanted])
        if not len(found):
            return found, {}
        return found, self._gather([places[int(wanted[position])] for position in found])

    def _advance(self, low: int, high: int) -> None:
        while not self._ended and (not self._held or self._held[-1]["original_index"].max() < high):
            batch = next(self._batches, None)
            if batch is None:
                self._ended = True
            elif len(batch["original_index"]):
                self._held.append(batch)
        while self._held and self._held[0]["original_index"].max() < low:
            self._passed = max(self._passed, int(self._held.pop(0)["original_index"].max()))

    def _gather(self, places: list[tuple[int, int]]) -> Batch:
        numbers, positions = np.array(places).T
        if len(set(numbers)) == 1:
            return take_rows(self._held[numbers[0]], positions)
        order = np.argsort(numbers, kind="stable")  # file by file, then back into the wanted order
        parts = [take_rows(self._held[n], positions[numbers == n]) for n in np.unique(numbers)]
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        keys = [key for key in parts[0] if all(key in part for part in parts)]  # some files may lack the raw maps
        return {key: np.concatenate([part[key] for part in parts])[back] for key in keys}


def _texts(content: dict[str, Any], indices: np.ndarray, style: str, run: Run) -> np.ndarray:
    texts = np.empty(len(indices), dtype=object)
    own = content.get("prompts")
    for position, index in enumerate(indices):
        texts[position] = own[position] if own is not None else run.row(int(index)).get(style)
    return texts
