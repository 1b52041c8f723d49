"""How far a style moves the residual stream, layer by layer, and where a mistyped word is recovered.

Every row is compared with its own clean twin at the edited words, the task and the last token, and with its control.
docs/METHODS.md defines the measures.

Reads   outputs/<run>/<style>/activations_*.pt (hidden_pooled, hidden_states, topk_vals), the clean form among them
Writes  results/<run>/activation_diffs.csv        style, layer, region, measure
        results/<run>/activation_diffs_summary.csv   style, measure
        results/<run>/activation_diffs_items.csv  one line per row and style
        results/<run>/activation_diffs_*.png      three styles each; typo_recovery_*.png, recovery_depth.png
        with --model_name: logit_lens_items.csv, logit_lens_*.png, word_recovery.csv (style, layer) and .png

    python 5_attention_fractions/run_scripts/activation_diffs.py --run_dir outputs/demo/maths
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / place) for place in ("", "../1_utils/run_scripts")]

from attention.flags import add_shared
from command_line import add_run_flags, make_parser, run_main
from file_output import write_csv, write_or_remove
from logger import get_logger
from report_section import write_section
from run_store import warn_unfinished


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__)
    add_run_flags(parser)
    measures = parser.add_argument_group("measures")
    measures.add_argument("--regions", nargs="+", help="default: of edited task last those there")
    measures.add_argument(
        "--reference_words", type=int, default=128, help="other words for the recovery depth, at most"
    )
    add_shared(measures, "--first_token", "--split_tokens")
    measures.add_argument("--cka_items", type=int, default=256, help="rows that CKA is taken over, at most")
    measures.add_argument("--stay_layers", type=int, default=3, help="layers in a row that make a recovery")
    measures.add_argument("--seed", type=int, default=0, help="which rows the reference words and CKA come from")
    lens = parser.add_argument_group("logit lens")
    lens.add_argument("--model_name", help="model of the run, for its final norm and head; default: no logit lens")
    lens.add_argument("--lens_rows", type=int, default=100, help="first rows that the lens is applied to")
    lens.add_argument("--dtype", default="auto", help="of the model")
    lens.add_argument("--device_map", help="of the model; default: the GPU where there is one")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Compare the states of a run and write tables and pictures."""
    args = parse_args(argv)
    from attention import activations, layer_curves, reaction_sections, word_recovery

    log = get_logger()
    study = activations.open_comparison(args)
    warn_unfinished(study.run, args.styles, args.max_samples)
    folder = args.results_dir or Path("results") / study.run.name
    tables = activations.all_tables(study, activations.measure_styles(study))
    write_or_remove(folder / "logit_lens_items.csv", tables.pop("logit_lens_items"))
    for name, table in tables.items():
        write_csv(folder / f"{name}.csv", table)
    curves, summary = tables["activation_diffs"], tables["activation_diffs_summary"]
    layer_curves.save_diffs(curves, summary, folder)
    words = word_recovery.recovery_table(study)
    if write_or_remove(folder / "word_recovery.csv", words):
        layer_curves.plot_words(words, folder / "word_recovery.png")
    write_section(folder, reaction_sections.LAYERS, study.run.styles)
    for line in activations.recovery_lines(summary):
        log.info(line)
    log.info(f"wrote {folder}/activation_diffs.csv, _summary.csv, _items.csv and pictures")
    return 0


if __name__ == "__main__":
    run_main(main)
