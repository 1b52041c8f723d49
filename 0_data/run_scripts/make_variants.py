"""Make every style of a prompt file's clean prompts: typos, other slips, tones, and the controls that go with them.

Reads   a prompt file (JSON list or JSON Lines; clean prompts under `normal` or `instruction`)
Writes  a prompt file with the same rows and the styles added
        <name>_edits.csv beside it, one line an edit

A prompt without a word that qualifies lacks the style; the summary says why. Every variant is checked before it is
kept: digits, operators, quoted text, `task` and `answer` stay byte for byte the same. docs/METHODS.md describes the
styles. Exit code 1: done, but a row had no usable clean prompt.

    python 0_data/run_scripts/make_variants.py --prompt_file prompts.json --output_file outputs/prompts_all.json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / place) for place in ("", "../1_utils/run_scripts")]

from command_line import UserError, make_parser, run_main
from file_output import write_csv, write_json
from load_json import STYLES, read_prompt_file
from logger import get_logger

ROWS_SHOWN = 20


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__)
    files = parser.add_argument_group("files")
    files.add_argument("--prompt_file", type=Path, required=True, help="prompt file with the clean prompts")
    files.add_argument("--output_file", type=Path, required=True, help="prompt file to write")
    edits = parser.add_argument_group("edits")
    edits.add_argument("--styles", nargs="+", default=["all"], metavar="STYLE", help=f"all, or of: {' '.join(STYLES)}")
    edits.add_argument(
        "--dose", nargs="+", type=int, default=[], metavar="K", help="also typo@K: exactly K one-letter edits, nested"
    )
    edits.add_argument(
        "--where",
        choices=("subject", "content", "any"),
        default="any",
        help="subject: typos in the row's task alone; content: doses in content words alone",
    )
    edits.add_argument("--seed", type=int, default=0, help="another seed gives other variants")
    edits.add_argument("--intensity", type=int, default=1, metavar="K", help="edits a variant")
    edits.add_argument("--language", default="en", metavar="CODE", help="of rows without `_language`: de, el, fr …")
    keyboards = (*("qwerty", "qwertz", "azerty", "dvorak"), *("spanish", "portuguese", "italian", "jcuken", "greek"))
    edits.add_argument("--keyboard", choices=keyboards, help="whose neighbours typos take (default: the language's)")
    edits.add_argument("--tokenizer", metavar="MODEL", help="folder or name of a model whose tokens the log counts")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Make the variants, write both files, log the summary. Returns 1 if a row had no usable clean prompt."""
    args = parse_args(argv)
    from typos.variants import edit_log_path, log_table, make_variants

    prompts = read_prompt_file(args.prompt_file)
    if args.output_file.resolve() == args.prompt_file.resolve():
        raise UserError(f"{args.output_file}: is the prompt file itself; choose another --output_file")
    if any(not 1 <= dose <= 99 for dose in args.dose):
        raise UserError(f"--dose {' '.join(map(str, args.dose))}: give whole numbers from 1 to 99")
    styles = [*(STYLES if args.styles == ["all"] else args.styles), *(f"typo@{dose}" for dose in args.dose)]
    tokenizer = None
    if args.tokenizer:
        from load_model import load_tokenizer  # two seconds to import

        tokenizer = load_tokenizer(args.tokenizer)
    rows, log, summary = make_variants(
        prompts.rows, styles, args.seed, args.intensity, args.keyboard, tokenizer, args.where, args.language
    )
    log_file = edit_log_path(args.output_file)
    try:
        write_json(args.output_file, rows)
    except RecursionError:
        raise UserError(f"{args.prompt_file}: a value is nested too deeply; flatten or remove it") from None
    write_csv(log_file, log_table(log, tokenizer is not None))
    logger = get_logger("make_variants")
    for style, counts in summary["styles"].items():
        lacking = "; ".join(f"{number} lack it: {reason}" for reason, number in counts["lacking"].most_common())
        logger.info(f"{style:12s} {counts['made']:6d} made" + (f"; {lacking}" if lacking else ""))
    for index, reason in summary["bad_rows"][:ROWS_SHOWN]:
        logger.warning(f"row {index + 1} {reason}; it was copied as it is")
    if len(summary["bad_rows"]) > ROWS_SHOWN:
        logger.warning(f"… and {len(summary['bad_rows']) - ROWS_SHOWN} more such rows")
    logger.info(f"wrote {args.output_file} ({len(rows)} rows) and {log_file}")
    return 1 if summary["bad_rows"] else 0


if __name__ == "__main__":
    run_main(main)
