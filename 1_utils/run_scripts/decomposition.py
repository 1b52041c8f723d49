"""How much of a style's effect is fragmentation (more tokens) and how much is spelling: clean form, control, style.

    total = style - clean = (control - clean) + (style - control) = fragmentation + spelling

The control `split@<style>` has the clean words in as many tokens as the style. That of a tone, `neutral@<style>`, has
as many neutral tokens around the clean prompt, so its two parts are length and tone. All three differences are over the
same rows: those that have all three forms, without those whose style is the clean prompt.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from accuracy_tables import row_scores
from file_output import write_or_remove
from logger import get_logger
from next_token_change import last_logits, next_token_change
from paired_stats import CONFIDENCE, ZERO_VARIANCE, Estimate, cluster_codes, clustered_mean, holm
from run_store import Run
from scipy import stats
from style_names import controlled_style, neutral_style
from style_rows import StyleRows, control_of, paired_rows

PARTS = ("total", "fragmentation", "spelling")
OF_TONE = {"fragmentation": "length", "spelling": "tone"}
ANSWER_MEASURES = {"accuracy": "correct", "answer_logprob": "answer_logprob"}  # and their column of the items
LOGITS = ("topk_vals", "topk_indices", "logsumexp")


def write_decomposition(run: Run, items: pd.DataFrame, clean_style: str, folder: Path) -> None:
    """Write decomposition.csv if the run has a control; log the lines of the answers."""
    table = decompose(run, items, clean_style)
    if not write_or_remove(folder / "decomposition.csv", table):
        return
    for line in table[table["measure"].isin(ANSWER_MEASURES)].itertuples():
        texts = [with_interval(line, part, "+.3f") for part in PARTS]
        if not math.isnan(line.fragmentation_share):
            texts.append(with_interval(line, "fragmentation_share", ".2f"))
        text = ", ".join(texts)
        for part, name in OF_TONE.items() if neutral_style(line.control) else ():
            text = text.replace(part, name)
        get_logger().info(f"{line.style}, {line.measure}: {text}, n = {line.n}")


def with_interval(line: Any, name: str, digits: str) -> str:
    """`name value [low, high]` of a line with the columns <name>, <name>_ci_low and <name>_ci_high."""
    value, low, high = (getattr(line, f"{name}{end}") for end in ("", "_ci_low", "_ci_high"))
    interval = "no interval" if math.isnan(low) else f"{low:{digits}}, {high:{digits}}"
    return f"{name.replace('_', ' ')} {value:{digits}} [{interval}]"


def decompose(run: Run, items: pd.DataFrame, clean_style: str) -> pd.DataFrame:
    """decomposition.csv: one line per measure and style with a control; p values adjusted over the styles (Holm).

    items: scored answers. Measures: accuracy; answer_logprob, the log probability of the likeliest accepted answer, if
    the items have it; next_token_kl, the KL divergence from the clean form's next token, if the files have its logits.
    """
    known = {style: str(control_of(run, style)) for style in dict.fromkeys(items["style"])}
    pairs = [(style, control) for style, control in known.items() if controlled_style(control)]
    lines = []
    for measure in [measure for measure, column in ANSWER_MEASURES.items() if column in items]:
        scores = row_scores(items.assign(correct=items[ANSWER_MEASURES[measure]]))
        lines += [_answer_line(measure, scores, *pair, clean_style) for pair in pairs]
    lines += [_kl_line(run, *pair, clean_style) for pair in pairs]
    table = pd.DataFrame([line for line in lines if line is not None and line["n"]])
    if table.empty:
        return table
    return with_holm(table, PARTS)


def with_holm(table: pd.DataFrame, parts: Sequence[str]) -> pd.DataFrame:
    """The table with a column <part>_p_adjusted after each <part>_p: Holm's over the styles of a measure."""
    for part in parts:
        place = list(table.columns).index(f"{part}_p") + 1
        table.insert(place, f"{part}_p_adjusted", table.groupby("measure")[f"{part}_p"].transform(holm))
    return table


def _answer_line(
    measure: str, scores: pd.DataFrame, style: str, control: str, clean_style: str
) -> dict[str, Any] | None:
    if (found := scores_of_forms(scores, (clean_style, control, style))) is None:
        return None
    most = 1 if measure == "accuracy" else math.inf  # a difference of two shares
    return decomposition_line(measure, style, control, *found, most)


def scores_of_forms(scores: pd.DataFrame, forms: tuple[str, str, str]) -> tuple[np.ndarray, pd.Series, int] | None:
    """(scores [n, 3], clusters [n], rows of the last form) of the rows that have all three forms.

    scores: `row_scores`. Rows whose last form has the clean prompt are left out. None if a form has no row at all.
    """
    tables = {name: part.set_index("original_index") for name, part in scores.groupby("style")}
    if not tables.keys() >= {*forms}:
        return None
    own = tables[forms[-1]]
    own = own[~own["identical"].astype(bool)]
    rows = [row for row in own.index if all(row in tables[form].index for form in forms)]
    values = np.array([tables[form].loc[rows, "correct"] for form in forms], dtype=np.float64).T
    return values, own.loc[rows, "template"], len(own)


def _kl_line(run: Run, style: str, control_style: str, clean_style: str) -> dict[str, Any] | None:
    """Of KL(clean || form), which is 0 for the clean form."""
    clean, control, own = (StyleRows(run, form) for form in (clean_style, control_style, style))
    if not all(table.has(name) for table in (clean, control, own) for name in LOGITS):
        return None
    changed = paired_rows(own, clean).changed
    rows = [row for row in changed if row in control]
    sides = [table.extract(last_logits, rows) for table in (clean, control, own)]
    kl = [next_token_change(sides[0], side)["next_token_kl"] for side in sides[1:]]
    values = np.stack([np.zeros(len(rows)), *kl], axis=1)
    line = decomposition_line("next_token_kl", style, control_style, values, own.clusters(rows), len(changed))
    # A divergence is never below 0, so a test of its mean against 0 says nothing.
    return line | {"total_p": math.nan, "fragmentation_p": math.nan}


def decomposition_line(
    measure: str,
    style: str,
    control: str,
    values: np.ndarray,
    clusters: Sequence[Hashable] | pd.Series,
    n_of_style: int,
    most: float = math.inf,
) -> dict[str, Any]:
    """One line of the table from values [n, 3] of clean form, control and style. most: their largest difference."""
    differences = values[:, [2, 1, 2]] - values[:, [0, 0, 1]]  # total, fragmentation, spelling
    found = clustered_mean(differences, clusters).within(-most, most)
    means = values.mean(axis=0) if len(values) else np.full(3, math.nan)
    line: dict[str, Any] = {
        "style": style,
        "measure": measure,
        "control": control,
        "n": len(values),
        "n_without_control": n_of_style - len(values),
        "n_clusters": int(cluster_codes(len(values), clusters).max(initial=-1)) + 1,
        "clean_mean": means[0],
        "control_mean": means[1],
        "style_mean": means[2],
    }
    line |= part_columns(PARTS, found)
    share = low = high = math.nan
    if found.ci_low[0] > 0 or found.ci_high[0] < 0:  # else a share of nothing
        share = found.mean[1] / found.mean[0]
        low, high = share_interval(differences[:, 1], differences[:, 0], clusters)
    return line | {
        "fragmentation_share": share,
        "fragmentation_share_ci_low": low,
        "fragmentation_share_ci_high": high,
    }


def part_columns(parts: Sequence[str], found: Estimate) -> dict[str, float]:
    """The columns <part>, <part>_ci_low, <part>_ci_high, <part>_p of each cell of an estimate."""
    columns: dict[str, float] = {}
    for place, part in enumerate(parts):
        columns |= {
            part: found.mean[place],
            f"{part}_ci_low": found.ci_low[place],
            f"{part}_ci_high": found.ci_high[place],
            f"{part}_p": found.p[place],
        }
    return columns


def share_interval(
    part: np.ndarray, whole: np.ndarray, clusters: Sequence[Hashable] | pd.Series
) -> tuple[float, float]:
    """Fieller's 95 % interval of mean(part) / mean(whole), both [n].

    All shares r for which the clustered t test finds no difference of part - r * whole from 0. NaN if that is no
    bounded interval (the whole is not clear of 0), or if the part is the same share of the whole in every row.
    """
    found = clustered_mean(np.stack([part, whole, part + whole], axis=1), clusters)
    variance = np.nan_to_num(found.standard_error**2)  # 0 if it does not vary
    covariance = (variance[2] - variance[0] - variance[1]) / 2
    t_squared = stats.t.ppf((1 + CONFIDENCE) / 2, found.df[1]) ** 2
    top, bottom = found.mean[:2]
    square = bottom**2 - t_squared * variance[1]
    middle = top * bottom - t_squared * covariance
    root = middle**2 - square * (top**2 - t_squared * variance[0])
    if not square > 0 or not root > ZERO_VARIANCE * middle**2:
        return math.nan, math.nan
    half = math.sqrt(root)
    return (middle - half) / square, (middle + half) / square
