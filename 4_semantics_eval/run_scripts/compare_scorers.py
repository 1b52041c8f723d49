"""Compare two scorers of the same answers: how many each could score, and whether they see the same effect of a style.

Reads   outputs/<run> and the scorers' tables in results/<run>: maths_items.csv, answers_items.csv (rule),
        judge_items.csv, judge_rubric_items.csv, <style>_scores.csv (reward), similarity_items.csv
Writes  results/<run>/scorers_compared.csv     one line per pair of scorers and style; parse rates first

    python 4_semantics_eval/run_scripts/compare_scorers.py --run_dir outputs/demo/facts --results_dir results/demo/facts

Run it again after judge_responses.py or score_scripts.py. docs/METHODS.md says how different scales are compared.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / place) for place in ("", "../1_utils/run_scripts")]

from command_line import UserError, make_parser, run_main
from file_output import write_csv
from logger import get_logger
from report_section import write_section
from run_store import open_run, warn_unfinished


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__)
    data = parser.add_argument_group("data")
    data.add_argument("--run_dir", type=Path, required=True, help="run folder of stage 2")
    data.add_argument("--results_dir", type=Path, help="where the scorers' tables are; default: results/<run name>")
    what = "similarity from which an answer counts as the clean one's"
    data.add_argument("--similarity_threshold", type=float, default=0.9, help=what)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the table for all pairs of scorers that are in the results folder."""
    args = parse_args(argv)
    from semantics import answer_sections, scorers

    run = open_run(args.run_dir)
    if run.clean_style is None:
        raise UserError(f"{run.path}: has no clean form to compare with; give the run folder that holds normal too")
    warn_unfinished(run)
    folder = args.results_dir or Path("results") / run.name
    path = folder / "scorers_compared.csv"
    scores = scorers.scores_of(folder, run.styles, run.clean_style, args.similarity_threshold)
    rows = {index for table in scores.values() for index in table["original_index"]}
    table = scorers.compare_scorers(scores, run.clean_style, {row: run.template(row) for row in rows})
    if table.empty:
        path.unlink(missing_ok=True)
        get_logger().warning(f"{folder}: nothing to compare: it has the scores of {', '.join(scores) or 'no scorer'}")
        return 0
    write_csv(path, table)
    write_section(folder, answer_sections.SCORERS)
    scorers.report_comparison(table)
    get_logger().info(f"wrote {path}")
    return 0


if __name__ == "__main__":
    run_main(main)
