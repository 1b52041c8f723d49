"""The responses of a run, row by row: what each style answered to one row of the prompt file."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
from command_line import UserError
from run_store import Run
from style_names import is_again
from style_rows import StyleRows, clean_prompt

NO_RESPONSE = "the response cannot be told from the prompt"


@dataclass(frozen=True)
class ResponseRow:
    """One row of the prompt file: per style its prompt and its responses (one a sample; in Unicode's form NFC)."""

    original_index: int
    element_index: int | str
    clean_prompt: str | None
    prompts: dict[str, str | None]
    responses: dict[str, list[str | None]]

    def is_identical(self, style: str) -> bool:
        """True if the style's prompt is the clean prompt, so that it can show no effect of the style.

        Not of the clean form again (`normal@again`), of which all prompts are.
        """
        return not is_again(style) and self.clean_prompt is not None and self.prompts[style] == self.clean_prompt


def response_rows(run: Run, styles: Sequence[str] | None = None, max_samples: int | None = None) -> list[ResponseRow]:
    """Every row that the clean style or one of `styles` (default: all) answered, in the prompt file's order.

    max_samples: rows of the prompt file, so that all styles keep the same ones. Raises UserError for an unknown style
    and for a run without a clean one.
    """
    if run.clean_style is None:
        raise UserError(
            f"{run.path}: has no responses to the clean prompts to compare with (it has {', '.join(run.styles)}); "
            "give the run folder that holds normal too"
        )
    tables = {style: StyleRows(run, style, max_samples).predictions() for style in run.chosen(styles)}
    rows = []
    for index in sorted(set().union(*tables.values())):
        found = {style: table[index] for style, table in tables.items() if index in table}
        clean = clean_prompt(run, index)
        if clean is None and run.clean_style in found:
            clean = found[run.clean_style][0].prompt
        texts = {style: [_composed(one.response) for one in samples] for style, samples in found.items()}
        prompts = {style: samples[0].prompt for style, samples in found.items()}
        rows.append(ResponseRow(index, next(iter(found.values()))[0].element_index, clean, prompts, texts))
    return rows


def _composed(text: str | None) -> str | None:
    return None if text is None else unicodedata.normalize("NFC", text)


def templates_of_rows(run: Run, items: pd.DataFrame) -> dict[int, str]:
    """{original index: cluster} of the rows of a table, for clustered errors."""
    return {index: run.template(index) for index in items["original_index"].unique()}


def by_style(table: pd.DataFrame) -> str:
    """`swap 0.912 (n = 40), main …`: the estimates of a summary in one line, in its order."""
    return ", ".join(f"{row.style} {row.estimate:.3f} (n = {row.n})" for row in table.itertuples())
