"""Build the facts prompt file: sentences that end right before their answer, with typos in the subject alone.

Reads   0_data/fact_tables.toml     hand-written facts and a sentence for each relation
Writes  0_data/facts.json           element_index, normal, one key per style, answer, task (the subject), and
                                    _template (the subject), _relation, _where
        0_data/facts_edits.csv      what was edited where, one line per edit

The rows are in random order, so `--max_samples 150` is a sample of all relations. A fact whose subject cannot take
every style but typo@3 is left out. Same code, same seed: same bytes.

    python 0_data/run_scripts/make_facts.py
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / place) for place in ("", "../1_utils/run_scripts")]

from command_line import make_parser, run_main
from file_output import write_csv, write_json
from logger import get_logger

DATA = Path(__file__).resolve().parents[1]


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__)
    files = parser.add_argument_group("files")
    files.add_argument("--tables_file", type=Path, default=DATA / "fact_tables.toml", help="tables of facts")
    files.add_argument("--output_file", type=Path, default=DATA / "facts.json", help="prompt file to write")
    choices = parser.add_argument_group("choices")
    choices.add_argument("--seed", type=int, default=0, help="another seed gives another order and other typos")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the prompt file and its edit log."""
    args = parse_args(argv)
    from typos import facts, variants

    rows, log, left_out = facts.make_rows(*facts.read_facts(args.tables_file), args.seed)
    log_file = variants.edit_log_path(args.output_file)
    write_json(args.output_file, rows, indent=1)
    write_csv(log_file, variants.log_table(log))
    logger = get_logger("make_facts")
    if left_out:
        logger.info(f"{len(left_out)} facts left out: their subject cannot take every style ({left_out[0][1]}, …)")
    logger.info(f"wrote {args.output_file} ({len(rows)} rows) and {log_file}")
    return 0


if __name__ == "__main__":
    run_main(main)
