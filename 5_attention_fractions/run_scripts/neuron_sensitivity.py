"""Typo neurons and typo heads: units that work harder on a typo than on the clean word, however it is cut into tokens.

Score (Tsuji et al. 2025, arXiv 2502.19669): mean(style) - max(mean(clean), mean(control)). Units are found on one half
of the templates and confirmed on the other. docs/METHODS.md defines the rest.

Reads   outputs/<run>/<style>/activations_*.pt (stage 2 with --neurons, --gates, --entropy: what is there)
Writes  results/<run>/neuron_sensitivity.csv   style, layer, neuron: the found neurons (down_proj input), best first
        results/<run>/gate_sensitivity.csv     the same by act_fn output, the quantity of the paper
        results/<run>/typo_heads.csv           style, layer, head: the found heads
        results/<run>/neuron_sensitivity_summary.csv   style, unit: the sets
        results/<run>/neuron_sensitivity.png   confirmed units by style and layer

    python 5_attention_fractions/run_scripts/neuron_sensitivity.py --run_dir outputs/demo/maths
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / place) for place in ("", "../1_utils/run_scripts")]

from attention.flags import add_shared
from command_line import add_run_flags, make_parser, run_main
from file_output import write_csv
from logger import get_logger
from report_section import write_section
from run_store import open_run, warn_unfinished


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__)
    add_run_flags(parser)
    score = parser.add_argument_group("score")
    score.add_argument(
        "--score",
        choices=("delta", "effect_size"),
        default="delta",
        help="difference of means, or that over the spread between rows",
    )
    score.add_argument("--neuron_regions", nargs="+", default=["edited", "last"], help="pooled regions of the score")
    score.add_argument("--head_region", default="all", help="query region of the heads' score")
    add_shared(score, "--first_token")
    score.add_argument("--neuron_share", type=float, default=0.005, help="share of the neurons that is taken")
    score.add_argument("--head_share", type=float, default=0.015, help="share of the heads that is taken")
    score.add_argument("--random_sets", type=int, default=1000, help="random sets to compare with")
    score.add_argument("--seed", type=int, default=0, help="of the halves and the random sets")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Find and confirm typo neurons and typo heads; write the tables and the picture."""
    args = parse_args(argv)
    from attention import neurons, reaction_sections

    run = open_run(args.run_dir)
    folder = args.results_dir or Path("results") / run.name
    studies = neurons.open_studies(run, args)
    warn_unfinished(run, args.styles, args.max_samples)
    tables, summary = neurons.find_units(run, studies)
    for unit, name in neurons.FILES.items():
        if unit in tables:
            write_csv(folder / name, tables[unit])
    write_csv(folder / "neuron_sensitivity_summary.csv", summary)
    layers = studies[0].clean.first_content()[neurons.FIELDS[studies[0].unit]].shape[0]
    neurons.plot_units(tables, summary, layers, folder / "neuron_sensitivity.png")
    write_section(folder, reaction_sections.UNITS)
    get_logger().info(f"wrote {folder}/neuron_sensitivity_summary.csv and .png, {' and '.join(tables)} tables")
    return 0


if __name__ == "__main__":
    run_main(main)
