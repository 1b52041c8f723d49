"""Which layers and heads react to a typo, how strongly, how surely, and whether that goes with wrong answers.

Reads   outputs/<run>/<style>/activations_*.pt; maths_items.csv or answers_items.csv, if there is one
Writes  head_sensitivity.csv, layer_sensitivity.csv    every style x head (x layer) x measure, ranked by |t|
        head_overlap.csv                               do styles share their heads, and do halves of the data
        head_answer_flips.csv, layer_answer_flips.csv  with scored answers: does the change go with a flip
        head_sensitivity_<style>.png, head_answer_flips_<style>.png (against the control if there is one)
        head_overlap.png; with controls head_overlap_vs_control.png

    python 5_attention_fractions/run_scripts/head_sensitivity.py --run_dir outputs/demo/maths \\
        --results_dir results/demo/maths

A typo is cut into more tokens, and that alone moves most heads: quote the difference to the control (`*_vs_control`).
What the measures and columns mean: docs/METHODS.md, "head_sensitivity.py".
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / place) for place in ("", "../1_utils/run_scripts")]

from attention.flags import add_shared
from command_line import UserError, add_run_flags, make_parser, run_main
from file_output import write_csv
from logger import get_logger
from report_section import write_section
from run_store import open_run, warn_unfinished


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__)
    data = add_run_flags(parser)
    add_shared(data, "--maths_items", "--tokenizer", "--first_token", "--split_tokens")
    shown = parser.add_argument_group("pictures and splits")
    shown.add_argument("--measure", help="measure shown for all styles, as in the tables; default: the log2 mass")
    shown.add_argument("--all_measures", action="store_true", help="tables of every measure; default: those drawn")
    shown.add_argument("--seed", type=int, default=0, help="of the random halves")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the tables and the pictures; log the heads that react most."""
    args = parse_args(argv)
    from attention import answer_flips, head_plots, heads, reaction_sections

    heads.check_measure(args.measure)
    run = open_run(args.run_dir)
    warn_unfinished(run, args.styles, args.max_samples)
    folder = args.results_dir or Path("results") / run.name
    answers = answer_flips.open_answers(args.maths_items, folder)
    to_clean, to_control, controls = heads.compare_styles(run, args, answers)
    if not to_clean:
        raise UserError(f"{run.path}: no style has a row of the clean form with another text; nothing to compare")
    heads.log_missing_divergence(run, to_clean)
    tables = heads.all_tables(to_clean, to_control, controls, args.seed)
    measure = args.measure or heads.first_shown(tables["head_sensitivity"])
    for name, table in tables.items():
        kept = table if args.all_measures else heads.drawn_rows(table, name, measure)
        write_csv(folder / f"{name}.csv", heads.with_short_tests(kept))
    pictures = head_plots.save_pictures(to_clean, tables, folder, measure)
    write_section(folder, reaction_sections.HEADS, run.styles)
    for line in heads.top_lines(tables["head_sensitivity"], measure):
        get_logger().info(line)
    more = f"{len(tables) - 1} more tables and {len(pictures)} pictures"
    get_logger().info(f"wrote {folder}/head_sensitivity.csv, {more}")
    for path in [*(folder / f"{name}.csv" for name in tables), *pictures]:
        get_logger().debug(str(path))
    return 0


if __name__ == "__main__":
    run_main(main)
