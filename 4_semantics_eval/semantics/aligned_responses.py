"""The responses of a run, row by row: what each style answered to one row of the prompt file, side by side.

The styles' files are read in step, so memory holds one file per style whatever the size of the run.
"""

from __future__ import annotations

import heapq
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from command_line import UserError
from load_json import CLEAN_KEYS
from read_predictions import Prediction, iter_predictions
from run_store import Run

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class AlignedRow:
    """One row of the prompt file: per style its prompt and its responses (one a sample; in Unicode's form NFC)."""

    original_index: int
    element_index: int | str
    clean_prompt: str | None
    prompts: dict[str, str | None]
    responses: dict[str, list[str | None]]

    def is_identical(self, style: str) -> bool:
        """True where the style's prompt is the clean prompt, so that it can show no effect of the style."""
        return self.clean_prompt is not None and self.prompts[style] == self.clean_prompt


def clean_prompt(run: Run, original_index: int) -> str | None:
    """The clean form of a row (`normal`, else `instruction`) as the prompt file has it; None where it has none."""
    row = run.row(original_index)
    return next((row[key] for key in CLEAN_KEYS if isinstance(row.get(key), str)), None)


def chosen_styles(run: Run, styles: Sequence[str] | None) -> list[str]:
    """The styles to read, the clean one first. Raises UserError for an unknown style, or a run without a clean one."""
    if run.clean_style is None:
        raise UserError(
            f"{run.path}: has no responses to the clean prompts to compare with (it has {', '.join(run.styles)}); "
            "give the run folder that holds normal too"
        )
    return run.chosen(styles)


def aligned_rows(run: Run, styles: Sequence[str], max_samples: int | None = None) -> Iterator[AlignedRow]:
    """Every row that at least one of `styles` answered, in the prompt file's order.

    max_samples: rows of the prompt file, so that all styles keep the same ones. Raises UserError where a style's
    files are not in the prompt file's order.
    """
    streams = [_grouped(run, style) for style in styles]
    for index, group in groupby(heapq.merge(*streams, key=lambda item: item[0]), key=lambda item: item[0]):
        if max_samples is not None and index >= max_samples:
            return
        found = {style: predictions for _, style, predictions in group}
        first = next(iter(found.values()))[0]
        clean = clean_prompt(run, index)
        if clean is None and run.clean_style in found:
            clean = found[run.clean_style][0].prompt
        yield AlignedRow(
            index,
            first.element_index,
            clean,
            {style: predictions[0].prompt for style, predictions in found.items()},
            {style: [_composed(one.response) for one in predictions] for style, predictions in found.items()},
        )


def by_style(table: pd.DataFrame, form: str = ".3f") -> str:
    """`swap 0.912 (n = 40), main …`: the estimates of a summary in one line, in its order."""
    return ", ".join(f"{row.style} {row.estimate:{form}} (n = {row.n})" for row in table.itertuples())


def _composed(text: str | None) -> str | None:
    return None if text is None else unicodedata.normalize("NFC", text)


def _grouped(run: Run, style: str) -> Iterator[tuple[int, str, list[Prediction]]]:
    last = -1
    for index, group in groupby(iter_predictions(run, [style]), key=lambda one: one.original_index):
        if index <= last:
            raise UserError(f"{run.styles[style]}: row {index + 1} comes after row {last + 1}; run stage 2 again")
        last = index
        yield index, style, list(group)
