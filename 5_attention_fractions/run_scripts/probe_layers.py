"""Linear probes by layer and region: is there a typo, which style is it, will the answer be wrong?

A probe is a logistic regression on the mean state of a region. Folds keep a template's rows and all styles of a row
together. docs/METHODS.md defines the targets, the intervals and what to compare an AUC with.

Reads   outputs/<run>/<style>/activations_*.pt (hidden_pooled), maths_items.csv or answers_items.csv
Writes  results/<run>/probe_layers.csv   style, layer, region, target
        results/<run>/probe_layers_<target>.png

    python 5_attention_fractions/run_scripts/probe_layers.py --run_dir outputs/demo/maths
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
from load_json import TYPO_STYLES
from logger import get_logger
from report_section import write_section
from run_store import warn_unfinished

TARGETS = ["typo", "typo_vs_control", "style", "wrong", "flipped"]


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__)
    data = add_run_flags(parser)
    data.add_argument("--max_rows", type=int, default=1000, help="rows to probe, at most (a random choice)")
    add_shared(data, "--maths_items")
    probes = parser.add_argument_group("probes")
    probes.add_argument("--targets", nargs="+", choices=TARGETS, default=TARGETS, help="what to probe for")
    probes.add_argument(
        "--typo_styles",
        nargs="+",
        metavar="STYLE",
        help=f"styles that count as typos; default: {' '.join(TYPO_STYLES)} and all with a split@<style>",
    )
    probes.add_argument("--regions", nargs="+", default=["edited", "last"], help="pooled regions to probe")
    probes.add_argument("--layers", nargs="+", type=int, help="layers, 0 = embeddings; default: all")
    probes.add_argument("--folds", type=int, default=5, help="folds of the cross-validation")
    probes.add_argument("--C", type=float, default=0.01, help="inverse of the L2 penalty, on scaled features")
    probes.add_argument("--max_iter", type=int, default=300, help="iterations of the solver, at most")
    probes.add_argument("--seed", type=int, default=0, help="of the rows, the folds and the shuffled labels")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Fit the probes of a run layer by layer; write the table and the picture."""
    args = parse_args(argv)
    from attention import answer_flips, layer_curves, probes, reaction_sections

    log, states = get_logger(), probes.open_states(args)
    warn_unfinished(states.run, args.styles, args.max_samples)
    folder = args.results_dir or Path("results") / states.run.name
    wanted = {"wrong", "flipped"} & {*args.targets}
    answers = answer_flips.open_answers(args.maths_items, folder) if wanted else None
    if wanted and answers is None:
        log.info(
            f"{folder}: no scored answers, so without the targets wrong and flipped (run stage 3, or --maths_items)"
        )
    items = list(probes.all_items(states, args, answers))
    planned = [probe for one in items if (probe := probes.plan_probe(one, states, args.folds, args.seed))]
    for line in probes.not_probed(items, states):
        log.warning(line)
    if not planned:
        raise UserError(f"{states.run.path}: too few rows or templates for any probe; run stage 2 on more prompts")
    table = probes.fit_all(planned, states, args)
    write_csv(folder / "probe_layers.csv", table)
    if stopped := int((table["converged"] == 0).sum()):
        log.warning(f"{stopped} probes stopped at --max_iter {args.max_iter}; see the column converged")
    layer_curves.save_probes(table, folder)
    write_section(folder, reaction_sections.PROBES)
    log.info(f"wrote {folder}/probe_layers.csv and pictures")
    return 0


if __name__ == "__main__":
    run_main(main)
