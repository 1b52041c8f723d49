"""Scores of a run's answers that the user made: a table with style, original_index, correct (1 or 0), and where it has
them sample and response. `read_predictions.py --csv` writes such a table without `correct`."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from command_line import UserError, one_line
from file_output import read_csv

HINT = "give a CSV with style, original_index, correct (1 or 0)"
NEEDED = ("style", "original_index", "correct")
VERDICTS = {"1": True, "1.0": True, "true": True, "0": False, "0.0": False, "false": False}


def with_own_scores(items: pd.DataFrame, path: Path) -> pd.DataFrame:
    """The items of a run (maths_items.csv) with `correct` from the table at `path`; what it lacks is not scored.

    Raises UserError for a table that cannot be read, that scores an answer twice, or that is of another run.
    """
    table = read_csv(path, hint=HINT)
    if lacking := [name for name in NEEDED if name not in table.columns]:
        raise UserError(f"{path}: has no column {', '.join(lacking)}; {HINT}")
    if "sample" not in table.columns:
        table["sample"] = 0
    keys = list(zip(items["style"], items["original_index"], items["sample"], strict=True))
    responses = dict(zip(keys, items["response"], strict=True))
    verdicts: dict[tuple[str, int, int], bool] = {}
    for number, line in enumerate(table.to_dict("records"), start=2):
        where = f"{path}, line {number}"
        key = (line["style"], line["original_index"], line["sample"])
        if key not in responses:
            raise UserError(f"{where}: the run has no answer to row {key[1]} of style {key[0]!r}, sample {key[2]}")
        if key in verdicts:
            raise UserError(f"{where}: scores an answer that an earlier line scores; remove one")
        known, given = responses[key], line.get("response")
        if isinstance(given, str) and isinstance(known, str) and given.split() != known.split():
            raise UserError(
                f"{where}: its response is not this run's ({one_line(known, 60)!r}); score this run's answers"
            )
        if str(line["correct"]) == "nan":
            continue
        if (verdict := VERDICTS.get(str(line["correct"]).lower())) is None:
            raise UserError(f"{where}: correct is {line['correct']!r}; {HINT}")
        verdicts[key] = verdict
    if not verdicts:
        raise UserError(f"{path}: no line has a score; {HINT}")
    nothing = dict.fromkeys(("gold", "value", "rule", "status"))
    return items.assign(**nothing, correct=[verdicts.get(key) for key in keys])
