"""How far a response is from the normal response of its row: meaning, words, refusals, empty answers."""

from __future__ import annotations

import argparse
import math
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from command_line import UserError, one_line
from file_output import write_csv
from logger import get_logger
from paired_stats import paired_summary
from rapidfuzz.distance import Levenshtein
from report_section import write_section
from run_store import Run
from sentence_transformers import SentenceTransformer
from tqdm import tqdm
from transformers.utils import logging

from semantics.answer_sections import SIMILARITY
from semantics.refusals import is_refusal
from semantics.response_plots import plot_similarity
from semantics.responses import NO_RESPONSE, ResponseRow, by_style, response_rows, templates_of_rows
from semantics.text_tokens import tokens_of

ROOT = Path(__file__).resolve().parents[2]
EMBEDDING_MODEL = "all-MiniLM-L6-v2"
ROWS_AT_ONCE = 256
TEXT_MEASURES = ("exact_match", "edit_distance", "edit_distance_normalized", "length_ratio")
RANGES = {
    "similarity": (-1.0, 1.0),
    **dict.fromkeys(("exact_match", "edit_distance_normalized", "refusal", "empty"), (0.0, 1.0)),
    **dict.fromkeys(("edit_distance", "length_ratio"), (0.0, math.inf)),
}
MEASURES = ("similarity", *TEXT_MEASURES, "refusal", "empty")


def compare_run(run: Run, args: argparse.Namespace) -> int:
    """Compare all styles of a run with normal; 1 if a response could not be compared."""
    rows = response_rows(run, args.styles, args.max_samples)
    clean = str(run.clean_style)
    embed = load_embedder(args.embedding_model, args.device, args.batch_size)
    items = compare_rows(rows, clean, embed)
    table = summarise(items, run)
    folder = args.results_dir or Path("results") / run.name
    write_csv(folder / "similarity_items.csv", items)
    write_csv(folder / "similarity_summary.csv", table)
    similar = table[table["measure"] == "similarity"]
    others = similar[similar["style"] != clean]
    picture, floor = folder / "similarity.png", noise_floor(items, clean)
    if others.empty and floor is None:
        picture.unlink(missing_ok=True)
    else:
        plot_similarity(items[~items["identical"]], others, picture, embed.name, floor)
    write_section(folder, SIMILARITY)

    log = get_logger()
    wide = table.pivot(index="style", columns="measure", values="estimate").reindex(table["style"].unique())
    wide.insert(0, "n", table[table["measure"] == "empty"].set_index("style")["n"])
    log.debug(wide[["n", *MEASURES]].to_string(float_format=lambda x: f"{x:.3f}"))
    if undefined := int((items["similarity"].isna() & items["edit_distance"].notna()).sum()):
        log.warning("%d similarities are missing: one of the two responses is empty", undefined)
    for reason, count in items.loc[items["note"] != "", "note"].value_counts().items():
        log.warning("%d responses are not compared: %s", count, reason)
    if cut := int(items["cut_for_embedding"].sum()):
        log.warning("%d responses are longer than the embedding model reads; it saw only their start", cut)
    values = by_style(similar[similar["estimate"].notna()]) or "none"
    print(f"similarity to the normal answers: {values}; wrote {folder / 'similarity_summary.csv'}")
    return 1 if (items["note"] != "").any() else 0


def compare_texts(response: str, normal: str) -> dict[str, float]:
    """exact_match, edit_distance, edit_distance_normalized and length_ratio of two responses (docs/METHODS.md)."""
    own, other = tokens_of(response), tokens_of(normal)
    return {
        "exact_match": float(
            unicodedata.normalize("NFC", response.strip()) == unicodedata.normalize("NFC", normal.strip())
        ),
        "edit_distance": float(Levenshtein.distance(own, other)),
        "edit_distance_normalized": Levenshtein.normalized_distance(own, other),
        "length_ratio": len(own) / len(other) if other else math.nan,
    }


def cosine(one: np.ndarray | None, other: np.ndarray | None) -> float:
    """Cosine of two unit vectors [D]; None stands for an empty response: two of them 1, one of them undefined."""
    if one is None or other is None:
        return 1.0 if one is None and other is None else math.nan
    return float(min(1.0, max(-1.0, one @ other)))


# --- embeddings


@dataclass
class Embedder:
    """A sentence-transformers model; the same text always gets the same vector, whatever stands beside it."""

    model: Any
    name: str
    batch_size: int = 32

    def __call__(self, texts: Iterable[str]) -> dict[str, tuple[np.ndarray, bool]]:
        """Each distinct non-empty text: its unit vector [D] float32, and whether it was cut to the model's length."""
        distinct = sorted({text for text in texts if text.strip()}, key=len)
        if not distinct:
            return {}
        options = {"normalize_embeddings": True, "convert_to_numpy": True, "show_progress_bar": False}
        vectors = self.model.encode(distinct, batch_size=self.batch_size, **options)
        lengths = [len(ids) for ids in self.model.tokenizer(distinct, truncation=False, verbose=False)["input_ids"]]
        limit = self.model.max_seq_length or math.inf
        return {text: (vector, length > limit) for text, vector, length in zip(distinct, vectors, lengths, strict=True)}


def default_embedding_model() -> str:
    """models/all-MiniLM-L6-v2 of this checkout where fetch_models.py has put it, else the same model on the hub."""
    local = ROOT / "models" / EMBEDDING_MODEL
    return str(local) if local.is_dir() else f"sentence-transformers/{EMBEDDING_MODEL}"


def load_embedder(name: str | None = None, device: str | None = None, batch_size: int = 32) -> Embedder:
    """Load a sentence-transformers model (folder or hub name). Raises UserError where it cannot be had."""
    logging.disable_progress_bar()  # a small model is loaded at once
    chosen = name or default_embedding_model()
    try:
        return Embedder(SentenceTransformer(chosen, device=device), chosen, batch_size)
    except (OSError, ValueError, RuntimeError) as error:
        why = one_line(str(error), 160)
        raise UserError(
            f"embedding model {chosen} cannot be loaded ({why}); run 1_utils/run_scripts/fetch_models.py, "
            "or give --embedding_model a folder"
        ) from None


# --- a run


def compare_rows(rows: Sequence[ResponseRow], clean_style: str, embed: Embedder) -> pd.DataFrame:
    """similarity_items.csv: one line per row, style and sample. NaN if a measure is undefined."""
    lines: list[dict[str, Any]] = []
    with tqdm(total=len(rows), desc="compare", unit="row", disable=None) as progress:
        for start in range(0, len(rows), ROWS_AT_ONCE):
            chunk = rows[start : start + ROWS_AT_ONCE]
            texts = (text for row in chunk for samples in row.responses.values() for text in samples)
            vectors = embed(text for text in texts if text is not None)
            for row in chunk:
                for style in row.responses:
                    lines += _compare_row(row, style, clean_style, vectors)
            progress.update(len(chunk))
    return pd.DataFrame(lines)


def _compare_row(
    row: ResponseRow, style: str, clean_style: str, vectors: dict[str, tuple[np.ndarray, bool]]
) -> list[dict[str, Any]]:
    normals = row.responses.get(clean_style, [])
    lines = []
    for sample, response in enumerate(row.responses[style]):
        line: dict[str, Any] = {
            "style": style,
            "original_index": row.original_index,
            "element_index": row.element_index,
            "sample": sample,
            **dict.fromkeys(MEASURES, math.nan),
            "identical": style != clean_style and row.is_identical(style),
            "cut_for_embedding": response is not None and vectors.get(response, (None, False))[1],
            "note": NO_RESPONSE if response is None else "",
        }
        # Sample i is not compared with normal sample i: both were drawn with the same random numbers.
        alone = style != clean_style and len(normals) == 1
        others = [text for i, text in enumerate(normals) if text is not None and (alone or i != sample)]
        if response is not None:
            line |= {"refusal": float(is_refusal(response)), "empty": float(not response.strip())}
            if others:
                line |= _mean_over_normals(response, others, vectors)
            elif style != clean_style:
                line["note"] = "this row has no normal response"
        lines.append(line)
    return lines


def _mean_over_normals(
    response: str, normals: list[str], vectors: dict[str, tuple[np.ndarray, bool]]
) -> dict[str, float]:
    measured = [
        {
            **compare_texts(response, normal),
            "similarity": cosine(vectors.get(response, (None,))[0], vectors.get(normal, (None,))[0]),
        }
        for normal in normals
    ]
    known = {name: [one[name] for one in measured if not math.isnan(one[name])] for name in measured[0]}
    return {name: sum(values) / len(values) if values else math.nan for name, values in known.items()}


def noise_floor(items: pd.DataFrame, clean_style: str) -> float | None:
    """Mean similarity of two normal samples of one row (rows count alike); None with one sample a row."""
    rows = items[items["style"] == clean_style].groupby("original_index")["similarity"].mean()
    return float(rows.mean()) if rows.notna().any() else None


def summarise(items: pd.DataFrame, run: Run) -> pd.DataFrame:
    """similarity_summary.csv: per style and measure the mean, and the paired difference to the normal samples.

    Rows whose prompt equals the clean one are counted in n_identical and left out. For similarity, edit distance,
    exact match and length ratio the difference is that to the noise floor, NaN with one sample a row.
    """
    clean = run.clean_style or "normal"
    same = items[items["identical"]].groupby("style")["original_index"].nunique()
    kept = items[~items["identical"]]
    table = paired_summary(kept, list(MEASURES), templates_of_rows(run, kept), clean, ranges=RANGES)
    table["n_identical"] = table["style"].map(same).fillna(0).astype(int)
    return table
