"""How far each style's response is from the normal response of the same row: meaning, words, refusals, empties.

Reads   outputs/<run>/<style>/activations_*.pt, of all styles and of normal
Writes  results/<run>/similarity_items.csv     one line per style, row and sample
        results/<run>/similarity_summary.csv   per style and measure: mean with interval, difference, p
        results/<run>/similarity.png           with the noise floor, if there are several normal samples

    python 4_semantics_eval/run_scripts/compare_responses.py --run_dir outputs/demo/instructions

Measures: similarity (cosine of sentence embeddings), exact_match, edit_distance (tokens), edit_distance_normalized,
length_ratio, refusal, empty. docs/METHODS.md defines them and the noise floor.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / place) for place in ("", "../1_utils/run_scripts")]

from command_line import make_parser, run_main
from file_output import write_csv
from logger import get_logger
from run_store import open_run, warn_unfinished


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
    """Compare all styles of a run with normal; 1 if a response could not be compared."""
    args = parse_args(argv)
    from semantics.response_plots import plot_similarity
    from semantics.responses import by_style, response_rows
    from semantics.similarity import MEASURES, compare_rows, load_embedder, noise_floor, summarise

    run = open_run(args.run_dir)
    warn_unfinished(run, args.styles, args.max_samples)
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
    plot_similarity(
        items[~items["identical"]], others, folder / "similarity.png", embed.name, noise_floor(items, clean)
    )

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


if __name__ == "__main__":
    run_main(main)
