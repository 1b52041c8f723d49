"""Build the maths prompt file: arithmetic problems in many wordings, each in every typo and tone style.

Reads   0_data/maths_wordings.csv   hand-written wordings (template, operation, results, wording)
Writes  0_data/maths.json           1,000 rows: element_index, normal, one key per style, answer, task and
                                    _template, _operation, _digits, _result to group by
        0_data/maths_edits.csv      what was edited where, one line per edit

The rows are ordered by difficulty: 300 rows with one-digit numbers, 350 with two digits, 350 with three. So
`--max_samples 60` is an easy run over 60 wordings; take the whole file to speak for all problems. Same code, same
seed: same bytes.

    python 0_data/run_scripts/make_maths.py
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
    files.add_argument("--wordings_file", type=Path, default=DATA / "maths_wordings.csv", help="wordings to fill")
    files.add_argument("--output_file", type=Path, default=DATA / "maths.json", help="prompt file to write")
    choices = parser.add_argument_group("choices")
    choices.add_argument("--seed", type=int, default=0, help="another seed gives other numbers and other typos")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the prompt file and its edit log."""
    args = parse_args(argv)
    from typos import maths_problems, variants

    rows, log = maths_problems.make_rows(maths_problems.read_wordings(args.wordings_file), args.seed)
    log_file = variants.edit_log_path(args.output_file)
    write_json(args.output_file, rows, indent=1)
    write_csv(log_file, variants.log_table(log))
    get_logger("make_maths").info(f"wrote {args.output_file} ({len(rows)} rows in all styles) and {log_file}")
    return 0


if __name__ == "__main__":
    run_main(main)
