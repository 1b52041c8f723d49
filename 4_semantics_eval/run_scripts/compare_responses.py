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

from command_line import add_run_flags, make_parser, run_main
from given_responses import add_responses_flags, run_of
from run_store import warn_unfinished


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__)
    data = add_run_flags(parser, "run folder of stage 2, with normal and other styles", required=False)
    add_responses_flags(data)
    data.add_argument("--prompt_file", type=Path, help="with --responses_file: the prompts that were answered")
    model = parser.add_argument_group("embeddings")
    model.add_argument("--embedding_model", help="folder or hub name; default: models/all-MiniLM-L6-v2, or the hub's")
    model.add_argument("--device", help="cuda:0, mps or cpu; default: the fastest there is")
    model.add_argument("--batch_size", type=int, default=32, help="texts at once")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Compare all styles of a run with normal; 1 if a response could not be compared."""
    args = parse_args(argv)
    from semantics.similarity import compare_run

    run = run_of(args)
    warn_unfinished(run, args.styles, args.max_samples)
    return compare_run(run, args)


if __name__ == "__main__":
    run_main(main)
