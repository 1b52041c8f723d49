"""How far each style's response is from the normal response of the same row: meaning, words, refusals, empties.

Reads   outputs/<run>/<style>/activations_*.pt, of all styles and of normal
Writes  results/<run>/similarity_items.csv     one line per style, row and sample
        results/<run>/similarity_summary.csv   per style and measure: mean with interval, difference, p
        results/<run>/similarity.png           with the noise floor, where there are several normal samples

    python 4_semantics_eval/run_scripts/compare_responses.py --run_dir outputs/demo/instructions

Measures of a response against the normal response of its row:
    similarity         cosine of the two sentence embeddings. Two empty responses: 1. One empty: undefined.
    exact_match        1 where both are the same text, white space at the ends aside
    edit_distance      Levenshtein distance over tokens: words, single signs such as "." or "+", and each character of
                       scripts that put no space between words (Chinese, Japanese, Thai …)
    edit_distance_normalized   the same over the longer response's number of tokens, 0 to 1
    length_ratio       tokens of the response over tokens of the normal one; undefined where that one is empty
    refusal, empty     1 where the response declines in its own words (refusals.py), or has no visible character

With several samples (stage 2's --num_samples) sample i, of a style or of normal, is compared with the normal samples
j != i of its row, and the defined values are averaged. Among normal samples that is the noise floor: what sampling
alone changes. A style's paired difference is the difference to it, and 0 is expected where the style changes nothing
(i = i is left out for the styles too, as such pairs share their random numbers). With one sample there is no floor.
Rows whose prompt equals the clean prompt stay in the items (`identical`) and are left out of the summary.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import regex

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / place) for place in ("", "../1_utils/run_scripts")]

from command_line import UserError, make_parser, one_line, run_main
from file_output import atomic_path, write_csv
from logger import get_logger
from run_store import Run, open_run, warn_unfinished
from semantics.aligned_responses import AlignedRow, aligned_rows, by_style, chosen_styles
from semantics.refusals import is_refusal

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

ROOT = Path(__file__).resolve().parents[2]
EMBEDDING_MODEL = "all-MiniLM-L6-v2"
ROWS_AT_ONCE = 256
MEASURES = (
    "similarity", "exact_match", "edit_distance", "edit_distance_normalized", "length_ratio", "refusal", "empty",
)  # fmt: skip
COLUMNS = ("style", "original_index", "element_index", "sample", *MEASURES, "identical", "cut_for_embedding", "note")
UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}"  # no space between words
TOKEN = regex.compile(rf"(?V1)[\w--[{UNSPACED}]][[\w\p{{M}}\p{{Cf}}]--[{UNSPACED}]]*|(?![\s\p{{Cf}}\p{{Cc}}])\X")


# --- one pair of texts


def tokens_of(text: str) -> list[str]:
    """Words with their combining marks, and single signs (graphemes) that are neither word nor white space.

    In scripts without spaces between words (Chinese, Japanese, Thai …) each grapheme is a token.
    """
    return TOKEN.findall(unicodedata.normalize("NFC", text))


def compare_texts(response: str, normal: str) -> dict[str, float]:
    """exact_match, edit_distance, edit_distance_normalized and length_ratio of two responses (module docstring)."""
    from rapidfuzz.distance import Levenshtein

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
        vectors = self.model.encode(
            distinct, batch_size=self.batch_size, normalize_embeddings=True, convert_to_numpy=True,
            show_progress_bar=False,
        )  # fmt: skip
        lengths = [len(ids) for ids in self.model.tokenizer(distinct, truncation=False, verbose=False)["input_ids"]]
        limit = self.model.max_seq_length or math.inf
        return {text: (vector, length > limit) for text, vector, length in zip(distinct, vectors, lengths, strict=True)}


def default_embedding_model() -> str:
    """models/all-MiniLM-L6-v2 of this checkout where fetch_models.py has put it, else the same model on the hub."""
    local = ROOT / "models" / EMBEDDING_MODEL
    return str(local) if local.is_dir() else f"sentence-transformers/{EMBEDDING_MODEL}"


def load_embedder(name: str | None = None, device: str | None = None, batch_size: int = 32) -> Embedder:
    """Load a sentence-transformers model (folder or hub name). Raises UserError where it cannot be had."""
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging

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


def compare_run(
    run: Run, embed: Embedder, styles: Sequence[str] | None = None, max_samples: int | None = None
) -> Iterator[dict[str, Any]]:
    """The lines of similarity_items.csv, row by row; memory holds 256 rows. NaN where a measure is undefined.

    Raises UserError where the run holds no normal responses.
    """
    chosen = chosen_styles(run, styles)
    rows = aligned_rows(run, chosen, max_samples)
    while chunk := list(islice(rows, ROWS_AT_ONCE)):
        vectors = embed(text for row in chunk for texts in row.responses.values() for text in texts if text is not None)
        for row in chunk:
            for style in row.responses:
                yield from _compare_row(row, style, chosen[0], vectors)


def _compare_row(
    row: AlignedRow, style: str, clean_style: str, vectors: dict[str, tuple[np.ndarray, bool]]
) -> Iterator[dict[str, Any]]:
    normals = row.responses.get(clean_style, [])
    for sample, response in enumerate(row.responses[style]):
        item: dict[str, Any] = {
            "style": style,
            "original_index": row.original_index,
            "element_index": row.element_index,
            "sample": sample,
            **dict.fromkeys(MEASURES, math.nan),
            "identical": style != clean_style and row.is_identical(style),
            "cut_for_embedding": False,
            "note": "",
        }
        alone = style != clean_style and len(normals) == 1
        others = [text for i, text in enumerate(normals) if text is not None and (alone or i != sample)]
        if response is None:
            item["note"] = "the response cannot be told from the prompt"
        else:
            item |= {"refusal": float(is_refusal(response)), "empty": float(not response.strip())}
            item["cut_for_embedding"] = vectors.get(response, (None, False))[1]
            if others:
                item |= _mean_over_normals(response, others, vectors)
            elif style != clean_style:
                item["note"] = "this row has no normal response"
        yield item


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
    return {name: _mean([one[name] for one in measured]) for name in measured[0]}


def _mean(values: list[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def noise_floor(items: pd.DataFrame, clean_style: str) -> float | None:
    """Mean similarity of two normal samples of one row (rows count alike); None with one sample a row."""
    rows = items[items["style"] == clean_style].groupby("original_index")["similarity"].mean()
    return float(rows.mean()) if rows.notna().any() else None


def summarise(items: pd.DataFrame, run: Run) -> pd.DataFrame:
    """similarity_summary.csv: per style and measure the mean, and the paired difference to the normal samples.

    Rows whose prompt equals the clean one are counted in n_identical and left out. For similarity, edit distance,
    exact match and length ratio the difference is that to the noise floor, NaN with one sample a row.
    """
    from paired_stats import paired_summary

    clean = run.clean_style or "normal"
    same = items[items["identical"]].groupby("style")["original_index"].nunique()
    kept = items[~items["identical"]]
    clusters = {index: run.template(index) for index in kept["original_index"].unique()}
    table = paired_summary(kept, list(MEASURES), cluster=clusters, baseline=clean)
    table["n_identical"] = table["style"].map(same).fillna(0).astype(int)
    return table


# --- script


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__)
    data = parser.add_argument_group("data")
    data.add_argument("--run_dir", type=Path, required=True, help="run folder of stage 2, with normal and other styles")
    data.add_argument("--results_dir", type=Path, help="default: results/<run name>")
    data.add_argument("--styles", nargs="+", help="styles to compare with normal; default: all of the run")
    data.add_argument("--max_samples", type=int, help="only the first rows of the prompt file")
    model = parser.add_argument_group("embeddings")
    model.add_argument("--embedding_model", help="folder or hub name; default: models/all-MiniLM-L6-v2, or the hub's")
    model.add_argument("--device", help="cuda:0, mps or cpu; default: the fastest there is")
    model.add_argument("--batch_size", type=int, default=32, help="texts at once")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Compare all styles of a run with normal; 1 where a response could not be compared."""
    args = parse_args(argv)
    run = open_run(args.run_dir)
    warn_unfinished(run, args.styles, args.max_samples)
    chosen_styles(run, args.styles)  # a wrong name is told before the model is loaded
    folder = args.results_dir or Path("results") / run.name
    embed = load_embedder(args.embedding_model, args.device, args.batch_size)
    items = _write_items(compare_run(run, embed, args.styles, args.max_samples), folder / "similarity_items.csv")
    table = summarise(items, run)
    write_csv(folder / "similarity_summary.csv", table)
    _plot(items, table, run, folder, embed.name)
    return _tell(items, table, folder)


def _write_items(items: Iterator[dict[str, Any]], path: Path) -> pd.DataFrame:
    """Write the items as they come, and keep their numbers."""
    import pandas as pd
    from tqdm import tqdm

    kept: dict[str, list[Any]] = {name: [] for name in COLUMNS}
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for item in tqdm(items, desc="compare", unit="response", disable=None):
            writer.writerow({name: _cell(value) for name, value in item.items()})
            for name, values in kept.items():
                values.append(item[name])
    return pd.DataFrame(kept).astype({"identical": bool})


def _cell(value: Any) -> Any:
    return "" if isinstance(value, float) and math.isnan(value) else value


def _plot(items: pd.DataFrame, table: pd.DataFrame, run: Run, folder: Path, embedding_model: str) -> None:
    from semantics.response_plots import plot_similarity

    drawn = table[(table["measure"] == "similarity") & (table["style"] != run.clean_style)]
    floor = noise_floor(items, run.clean_style or "normal")
    plot_similarity(items[~items["identical"]], drawn, folder / "similarity.png", embedding_model, floor)


def _tell(items: pd.DataFrame, table: pd.DataFrame, folder: Path) -> int:
    wide = table.pivot(index="style", columns="measure", values="estimate").reindex(table["style"].unique())
    wide.insert(0, "n", table[table["measure"] == "empty"].set_index("style")["n"])
    get_logger().debug(wide[["n", *MEASURES]].to_string(float_format=lambda x: f"{x:.3f}"))
    lost, cut = items[items["note"] != ""], int(items["cut_for_embedding"].sum())
    undefined = items["similarity"].isna() & items["edit_distance"].notna()
    if undefined.any():
        get_logger().warning("%d similarities are missing: one of the two responses is empty", undefined.sum())
    for reason, count in lost["note"].value_counts().items():
        get_logger().warning("%d responses are not compared: %s", count, reason)
    if cut:
        get_logger().warning("%d responses are longer than the embedding model reads; it saw only their start", cut)
    similar = table[(table["measure"] == "similarity") & table["estimate"].notna()]
    print(f"similarity to the normal answers: {by_style(similar) or 'none'}; wrote {folder / 'similarity_summary.csv'}")
    return 1 if len(lost) else 0


if __name__ == "__main__":
    run_main(main)
