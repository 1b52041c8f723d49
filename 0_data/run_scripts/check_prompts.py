"""Find what would bias a comparison of styles in a prompt file, from wherever it comes.

Reads   a prompt file (a JSON list or JSON Lines)
Prints  a table of findings, one line a kind; docs/DATA_FORMAT.md lists the kinds
Writes  with --output_csv all findings: style, original_index, element_index, severity, kind, detail, fix
        with --fix a new prompt file without what can be dropped or renamed safely

Exit code 1: an error was found (with --fix: is left).

    python 0_data/run_scripts/check_prompts.py --prompt_file 0_data/maths.json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / place) for place in ("", "../1_utils/run_scripts")]

from command_line import UserError, make_parser, run_main
from file_output import write_csv, write_json
from logger import get_logger


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__)
    files = parser.add_argument_group("files")
    files.add_argument("--prompt_file", required=True, help="prompt file to check")
    files.add_argument("--output_csv", help="CSV file for all findings")
    files.add_argument("--fix", metavar="NEW_FILE", help="prompt file to write, with what is safe dropped or renamed")
    checks = parser.add_argument_group("what to expect")
    checks.add_argument(
        "--styles", nargs="+", default=[], help="styles that will be run; the others are not checked (default: all)"
    )
    checks.add_argument("--intensity", type=int, default=1, metavar="K", help="edits a variant, as it was made")
    checks.add_argument("--language", metavar="CODE", help="of rows without `_language` (default: English)")
    args = parser.parse_args(argv)
    if args.intensity < 1:
        raise UserError(f"--intensity {args.intensity}: the number of edits must be 1 or more")
    for flag, path in (("--fix", args.fix), ("--output_csv", args.output_csv)):
        if path and Path(path).resolve() == Path(args.prompt_file).resolve():
            raise UserError(f"{path}: is the prompt file itself; give {flag} a new file")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Check, report, and with --fix fix. Returns 1 if an error was found or, with --fix, is left."""
    args = parse_args(argv)
    from typos.checks import check_rows, findings_table, fix_rows, read_rows, summary_text, with_language

    rows = with_language(read_rows(args.prompt_file), args.language)
    findings = check_rows(rows, args.intensity, args.styles)
    if args.output_csv:
        write_csv(args.output_csv, findings_table(findings))
    print(summary_text(rows, findings))
    if args.fix:
        fixed, done = fix_rows(rows, args.intensity)
        write_json(args.fix, fixed)
        findings = check_rows(fixed, args.intensity, args.styles)
        changes = ", ".join(f"{number} {what}" for what, number in done.items() if number) or "nothing to fix"
        left = f"{sum(finding.severity == 'error' for finding in findings)} errors left"
        get_logger("check_prompts").info(f"wrote {args.fix} ({len(fixed)} rows): {changes}; {left}")
    return 1 if any(finding.severity == "error" for finding in findings) else 0


if __name__ == "__main__":
    run_main(main)
