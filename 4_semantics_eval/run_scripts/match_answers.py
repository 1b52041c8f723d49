"""Score a run's answers in words, and say what each prompt style changed and how sure that is.

Reads   outputs/<run>/<style>/activations_*.pt (or one style's folder, or one .pt file), the prompt file (the run's own
        copy, or --prompt_file) for the accepted answers, and its edit log if there is one
Writes  results/<run>/answers_items.csv        one line per answer: gold, value, rule, correct and the three measures
        results/<run>/answers_summary.csv      per style: accuracy, paired difference to normal, intervals, p values
        results/<run>/answers_flips.csv, answers_breakdown.csv, answers_accuracy.png, answers_flips.png …
        results/<run>/accuracy_summary.csv     if maths_items.csv is there: the summary of both stages' answers together
        results/<run>/robustness_summary.csv, decomposition.csv, repair_summary.csv   as stage 3 writes them

    python 4_semantics_eval/run_scripts/match_answers.py --run_dir outputs/demo/facts --results_dir results/demo/facts

A row's `answer` is a text, a list of accepted texts, or the letter of an option in the prompt. Rows whose answer is a
number or an expression are left to evaluate_predictions.py. docs/METHODS.md has the rules.
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
from run_store import warn_unfinished


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
    gold.add_argument("--edits_csv", type=Path, help="edit log; default: <prompt file>_edits.csv if it is still there")
    measures, what = ("exact_match", "starts_with", "contains"), "what makes an answer correct"
    gold.add_argument("--measure", choices=measures, default="starts_with", help=what)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Score a run and write its tables and figures."""
    args = parse_args(argv)
    from semantics.answers import evaluate_answers, write_answers

    run = run_of(args, args.style)
    evaluation = evaluate_answers(run, args.prompt_file, args.edits_csv, args.styles, args.style, args.measure)
    warn_unfinished(run, args.styles)
    folder = args.results_dir or Path("results") / evaluation.name
    write_answers(run, evaluation, folder)
    get_logger().info(f"wrote {folder}/answers_*.csv and .png")
    return 0 if evaluation.items["correct"].notna().any() else 1


if __name__ == "__main__":
    run_main(main)
