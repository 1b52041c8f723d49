"""Which positions, layers, heads and units cause the typo's effect: what patching them restores, with intervals.

Reads   outputs/<run>/<style>/patches_*.pt (stage 2's patch_activations.py); results/<run>/head_sensitivity.csv if there
Writes  results/<run>/patching_layers.csv        whole sites by position and layer, with controls; the hand-over layer
        results/<run>/patching_heads.csv         one head at a time, and the same in each half of the prompts
        results/<run>/patching_neurons.csv       the same of neurons
        results/<run>/patching_sets.csv          sets of units beside random sets; patching_faithfulness.csv by size
        results/<run>/patching_agreement.csv     screen with patching, one half of the prompts with the other
        results/<run>/patching_reactions.csv     do the units that react also cause?
        results/<run>/patching_items.csv         per prompt: what there is to restore; and patching_*.png

    python 5_attention_fractions/run_scripts/causal_effects.py --run_dir outputs/demo/facts
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / place) for place in ("", "../1_utils/run_scripts")]

from command_line import make_parser, run_main
from logger import get_logger
from report_section import write_section
from run_store import open_run, warn_unfinished
from stamps import note_read


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--run_dir", type=Path, required=True, help="run folder of stage 2")
    parser.add_argument("--results_dir", type=Path, help="where to write; default: results/<run name>")
    parser.add_argument("--styles", nargs="+", help="styles to study; default: all that were patched")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the tables and pictures; log what restores most."""
    args = parse_args(argv)
    from attention import causes, reaction_sections

    run = open_run(args.run_dir)
    warn_unfinished(run, args.styles)
    folder = args.results_dir or Path("results") / run.name
    note_read(args.run_dir / "patches_*")
    written = causes.write_causes(run, args.styles, folder)
    write_section(folder, reaction_sections.CAUSES, run.styles)
    get_logger().info(f"wrote {', '.join(written)} in {folder}")
    return 0


if __name__ == "__main__":
    run_main(main)
