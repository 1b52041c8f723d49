"""Where attention goes: the fraction on the instruction, the task, the edited words, per style, layer and head.

Reads   outputs/<run>/<style>/activations_*.pt (span_mass, or raw maps; the reference format with --tokenizer)
Writes  attention_fractions.csv                every region, query and measure (--levels layer head: by layer and head)
        prompt_task_fraction_aggregate.csv, _perlayer.csv, _perhead.csv    frac_instruction and frac_task by style
        boxplot_frac_prompt.png, boxplot_frac_task.png, boxplot_perlayer_frac_prompt_<style>.png

    python 5_attention_fractions/run_scripts/dirs_eval.py --run_dir outputs/demo/maths --results_dir results/demo/maths

Each style is compared with the clean form on the same rows; rows whose texts are equal are left out (n_identical).
What the columns mean: docs/METHODS.md, "dirs_eval.py".
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / place) for place in ("", "../1_utils/run_scripts")]

from attention.flags import add_shared
from command_line import UserError, add_run_flags, make_parser, run_main
from logger import get_logger
from report_section import write_section
from run_store import open_run, warn_unfinished


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__)
    data = add_run_flags(parser, "run folder, style folder or .pt file of stage 2")
    add_shared(data, "--tokenizer", "--first_token")
    shown = parser.add_argument_group("what the prompt_task_fraction_* files and the box plots show")
    shown.add_argument("--query", choices=("last", "mean"), default="last", help="whose attention")
    shown.add_argument(
        "--sink", choices=("included", "excluded"), default="included", help="with or without the first token's mass"
    )
    levels = ("model", "layer", "head")
    shown.add_argument(
        "--levels", nargs="+", choices=levels, default=["model"], help="rows of attention_fractions.csv; default: model"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the tables and the plots."""
    args = parse_args(argv)
    from attention import reaction_sections, region_fractions

    run = open_run(args.run_dir)
    folder = args.results_dir or Path("results") / run.name
    warn_unfinished(run, args.styles, args.max_samples)
    found = (region_fractions.style_fractions(run, style, args) for style in run.chosen(args.styles))
    results = [one for one in found if one is not None]
    if not results:
        raise UserError(f"{run.path}: no rows to read; raise --max_samples or run stage 2")
    tables = region_fractions.write_tables(results, folder, args.query, args.sink, args.levels)
    pictures = region_fractions.save_boxplots(results, folder, args.query, args.sink)
    write_section(folder, reaction_sections.fraction_section(args.query), run.styles)
    get_logger().info(f"wrote {tables[0]}, {len(tables) - 1} tables prompt_task_fraction_*, {len(pictures)} box plots")
    return 0


if __name__ == "__main__":
    run_main(main)
