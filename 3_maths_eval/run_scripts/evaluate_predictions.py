"""Score a run's answers to maths prompts, and say what each prompt style changed and how sure that is.

Reads   outputs/<run>/<style>/activations_*.pt (or one style's folder, or one .pt file; the reference format too),
        the prompt file (the run's own copy, or --prompt_file) for the gold answers, and its edit log if there is one
Writes  results/<run>/maths_items.csv        one line per answer: gold, value, rule, status, correct
        results/<run>/maths_summary.csv      per style: accuracy, paired difference to normal, intervals, p values
        results/<run>/maths_flips.csv        answers that turned from right to wrong or back, with both texts
        results/<run>/maths_breakdown.csv    the same by operation, digits, number of edits, token change
        results/<run>/robustness_summary.csv spread, consistency and others over all styles (docs/METHODS.md)
        results/<run>/decomposition.csv, repair_summary.csv    with a control, with repaired@<style> in the run
        results/<run>/maths_accuracy.png, maths_flips.png, maths_by_edits.png

    python 3_maths_eval/run_scripts/evaluate_predictions.py --run_dir outputs/demo/maths

An answer that cannot be read counts as wrong. Rows without a readable gold answer are left out of n, and counted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / place) for place in ("", "../1_utils/run_scripts")]

from command_line import make_parser, run_main
from given_responses import add_responses_flags, run_of
from logger import get_logger
from maths.gold import has_gold
from run_store import warn_unfinished

__all__ = ["has_gold"]  # what run_pipeline.py asks before it plans this stage


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__)
    data = parser.add_argument_group("data")
    data.add_argument("--run_dir", type=Path, help="run folder, style folder or .pt file")
    add_responses_flags(data)
    data.add_argument("--results_dir", type=Path, help="default: results/<run name>")
    data.add_argument("--styles", nargs="+", help="styles to score; default: all (the clean one always)")
    data.add_argument("--style", help="name of the only style in --run_dir, if nothing there says it")
    gold = parser.add_argument_group("gold answers")
    gold.add_argument("--prompt_file", type=Path, help="prompt file; default: the copy in the run folder")
    own = "your own scores instead: a CSV with style, original_index, correct (1 or 0), and if known sample, response"
    gold.add_argument("--maths_items", type=Path, help=own)
    gold.add_argument("--edits_csv", type=Path, help="edit log; default: <prompt file>_edits.csv if it is still there")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Score a run and write its tables and figures."""
    args = parse_args(argv)
    from maths.accuracy import NoReadableGold, evaluate_run, write_maths

    run = run_of(args, args.style)
    try:
        evaluation = evaluate_run(run, args.prompt_file, args.edits_csv, args.styles, args.style, args.maths_items)
    except NoReadableGold as skipped:
        get_logger().warning(str(skipped))
        return 0
    warn_unfinished(run, args.styles)
    folder = args.results_dir or Path("results") / evaluation.name
    write_maths(run, evaluation, folder, args.maths_items is not None)
    get_logger().info(f"wrote {folder}/maths_*.csv and .png")
    return 0 if evaluation.items["correct"].notna().any() else 1


if __name__ == "__main__":
    run_main(main)
