"""Two scorers of the same answers side by side: what each could score, and whether a style's effect depends on it.

A scorer is one of the tables in a results folder: the rule (maths_items.csv, answers_items.csv), the judge (pairs, or
ratings), a reward model, or the similarity to the clean answer. docs/METHODS.md says how their scores are compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from accuracy_tables import read_items
from answer_files import item_files
from file_output import read_csv
from logger import get_logger
from paired_stats import clustered_mean, holm_over_styles, minimum_detectable_effect
from stamps import note_read

ROW = ["style", "original_index"]
RULE, SIMILARITY = "rule", "similarity"
HINT = "run the scorer again"
AS_IS, STANDARDISED = "as it is", "clean standard deviations"
FIRST_SCORER, OTHER_SCORER = "", "other_"  # how the columns of the two scorers begin


def scores_of(folder: Path, styles: Iterable[str], clean_style: str, threshold: float) -> dict[str, pd.DataFrame]:
    """{scorer: its scores} of the tables in a results folder, the first sample of each prompt.

    A table has style, original_index, identical, score (NaN: not scored) and parsed (1 or 0: could be scored; NaN: not
    asked), the clean form's lines among them. threshold: the similarity from which two answers count as the same.
    """
    makers: dict[str, Callable[[], pd.DataFrame | None]] = {
        RULE: partial(_rule, folder),
        "judge": partial(_judge, folder, clean_style),
        "judge_rating": partial(_scored, [folder / "judge_rubric_items.csv"], "rating"),
        "reward": partial(_scored, [folder / f"{style}_scores.csv" for style in styles], "reward_score"),
        SIMILARITY: partial(_similarity, folder, clean_style, threshold),
    }
    found = {name: maker() for name, maker in makers.items()}
    return {name: table for name, table in found.items() if table is not None and len(table)}


def _rule(folder: Path) -> pd.DataFrame | None:
    """Right or wrong. An answer without a value could not be read, and counts as wrong; own scores have no values."""
    files = item_files(folder)
    if not files:
        return None
    items = read_items(files)
    items = items[(items["sample"] == 0) & items["correct"].notna()]
    parsed = items["value"].notna() | (not items["value"].notna().any())
    return items[[*ROW, "identical"]].assign(score=items["correct"].astype(float), parsed=parsed.astype(float))


def _scored(files: Sequence[Path], column: str) -> pd.DataFrame | None:
    for path in files:
        note_read(path)
    tables = [read_csv(path, hint=HINT) for path in files if path.is_file()]
    if not tables:
        return None
    items = pd.concat(tables, ignore_index=True)
    items = items[items["sample"] == 0] if "sample" in items else items
    return items[[*ROW, "identical"]].assign(score=items[column].astype(float), parsed=items[column].notna() * 1.0)


def _judge(folder: Path, clean_style: str) -> pd.DataFrame | None:
    """1 if the style's answer is preferred, -1 if the clean one is, 0: a tie. The clean answer scores 0 everywhere."""
    items = _scored([folder / "judge_items.csv"], "preference")
    return None if items is None else _with_clean(items.assign(score=2 * items["score"] - 1), clean_style, 0.0)


def _similarity(folder: Path, clean_style: str, threshold: float) -> pd.DataFrame | None:
    """1 if the answer is as similar to the clean one as `threshold`, else 0; the clean answer scores 1.

    With several samples the clean form has a score of its own: is its first sample as similar to the others?
    """
    items = _scored([folder / "similarity_items.csv"], "similarity")
    if items is None:
        return None
    items["score"] = (items["score"] >= threshold).astype(float).where(items["score"].notna())
    clean = items["style"] == clean_style
    return items if items.loc[clean, "score"].notna().any() else _with_clean(items[~clean], clean_style, 1.0)


def _with_clean(items: pd.DataFrame, clean_style: str, score: float) -> pd.DataFrame:
    """The items of a scorer that compares with the clean answer, and lines of that answer with the `score` it has."""
    clean = items.drop_duplicates("original_index").assign(
        style=clean_style, identical=False, score=score, parsed=math.nan
    )
    return pd.concat([items, clean], ignore_index=True)


def compare_scorers(
    scores: Mapping[str, pd.DataFrame], clean_style: str, clusters: Mapping[int, Hashable]
) -> pd.DataFrame:
    """scorers_compared.csv: one line per pair of scorers and style; p adjusted over the styles of a pair (Holm).

    scores: {scorer: table} as `scores_of` gives them; clusters: {original index: cluster}.
    """
    tables = {name: _beside_clean(table, clean_style) for name, table in scores.items()}
    parts = []
    for one, other in combinations(tables, 2):
        if other == SIMILARITY and one != RULE:
            continue  # to be like the clean answer is no merit where that is wrong
        by_style = [dict(list(tables[name].groupby("style", sort=False))) for name in (one, other)]
        lines = [
            {"style": style, "scorer": one, "other_scorer": other}
            | _line(by_style[0][style], by_style[1][style], clusters, other == SIMILARITY)
            for style in by_style[0]
            if style in by_style[1]
        ]
        part = pd.DataFrame([line for line in lines if line["n_responses"]])
        if len(part):
            part.insert(list(part.columns).index("p") + 1, "p_adjusted", holm_over_styles(part))
            parts.append(part)
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def _beside_clean(table: pd.DataFrame, clean_style: str) -> pd.DataFrame:
    """The styles' lines with `clean_score` and `clean_parsed` of their row, indexed by row; without clean prompts."""
    clean = table[table["style"] == clean_style].set_index("original_index")[["score", "parsed"]]
    own = table[(table["style"] != clean_style) & ~table["identical"].astype(bool)].set_index("original_index")
    return own.join(clean.add_prefix("clean_"), how="inner")


def _line(one: pd.DataFrame, other: pd.DataFrame, clusters: Mapping[int, Hashable], right_only: bool) -> dict[str, Any]:
    """The columns of one style; right_only: changes on the rows whose clean answer is right by the first scorer."""
    rows = one.index.intersection(other.index)
    one, other = one.loc[rows], other.loc[rows]
    line: dict[str, Any] = {"n_responses": len(rows)}
    labels = [clusters.get(row) for row in rows]
    for begin, table in ((FIRST_SCORER, one), (OTHER_SCORER, other)):
        change = clustered_mean(table["parsed"] - table["clean_parsed"], labels)
        line |= {
            f"{begin}parse_rate_clean": table["clean_parsed"].mean(),
            f"{begin}parse_rate": table["parsed"].mean(),
            f"{begin}parse_rate_difference": change.mean,
            f"{begin}parse_rate_difference_ci_low": change.ci_low,
            f"{begin}parse_rate_difference_ci_high": change.ci_high,
        }
    known = np.array([table[["score", "clean_score"]].notna().all(axis=1) for table in (one, other)]).all(axis=0)
    known &= (one["clean_score"] == 1).to_numpy() | (not right_only)
    scale, changes = _changes(one[known], other[known])
    found = clustered_mean(
        np.column_stack([*changes, changes[0] - changes[1]]),
        [label for label, both in zip(labels, known, strict=True) if both],
    )
    line |= {"scale": scale, "n": int(found.n[2]), "n_clusters": int(found.n_clusters[2])}
    for place, name in enumerate(("change", "other_change", "interaction")):
        ends = {"": found.mean, "_ci_low": found.ci_low, "_ci_high": found.ci_high}
        line |= {f"{name}{end}": values[place] for end, values in ends.items()}
    detectable = minimum_detectable_effect(found.standard_error[2], found.df[2])
    return line | {"p": found.p[2], "minimum_detectable_difference": detectable}


def _changes(one: pd.DataFrame, other: pd.DataFrame) -> tuple[str, list[np.ndarray]]:
    """(scale, style - clean of both scorers [n]): as they are if all scores are -1, 0 or 1, else over the standard
    deviation of the clean form's scores (NaN if these do not vary)."""
    tables = [table[["score", "clean_score"]].to_numpy(float) for table in (one, other)]
    changes = [table[:, 0] - table[:, 1] for table in tables]
    if all(np.isin(table, (-1, 0, 1)).all() for table in tables):
        return AS_IS, changes
    spreads = [table[:, 1].std(ddof=1) if len(table) > 1 else math.nan for table in tables]
    return STANDARDISED, [change / (spread or math.nan) for change, spread in zip(changes, spreads, strict=True)]


def report_comparison(table: pd.DataFrame) -> None:
    """Log the parse rates of each scorer, then one line per pair and style with the changes that they see."""
    rates: dict[str, dict[str, str]] = {}
    for line in table.itertuples():
        for name, begin in ((line.scorer, FIRST_SCORER), (line.other_scorer, OTHER_SCORER)):
            rate, change = (getattr(line, f"{begin}parse_rate{end}") for end in ("", "_difference"))
            against = "" if math.isnan(change) else f" ({change:+.3f} to the clean form)"
            rates.setdefault(name, {})[line.style] = f"{rate:.3f} of {line.style}{against}"
    for name, texts in rates.items():
        get_logger().info(f"{name} could score {', '.join(texts.values())}")
    for line in table.itertuples():
        ends = f"[{line.interaction_ci_low:+.3f}, {line.interaction_ci_high:+.3f}], adjusted p = {line.p_adjusted:.3g}"
        get_logger().info(
            f"{line.style}: {line.scorer} {line.change:+.3f}, {line.other_scorer} {line.other_change:+.3f}, difference "
            f"{line.interaction:+.3f} {ends if line.p == line.p else '(no interval)'}, n = {line.n}"
        )
