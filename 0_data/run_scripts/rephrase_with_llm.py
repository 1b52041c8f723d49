"""Let a strong language model write typo, tone or reworded variants of a prompt file; keep only what passes the checks.

Reads   a prompt file (clean prompts under `normal` or `instruction`)
Writes  the prompt file with the accepted variants under <style><--suffix> (`polite_llm`, …)
        <name>_rephrasings.csv   every answer, whether it was accepted, and why not
        <name>_replies.jsonl     the answers as they came; a second run asks only for what is missing there

A rejected answer goes back to the model with the reason, up to --attempts times; after that the row lacks the style.
Any OpenAI-compatible server will do (--base_url http://localhost:8000/v1). --dry_run says what a run would ask.
Exit code 1: done, but requests failed; the same command asks for those again.

    OPENAI_API_KEY=… python 0_data/run_scripts/rephrase_with_llm.py --model gpt-4o --styles polite other \\
        --prompt_file 0_data/maths.json --output_file outputs/maths_llm.json --max_samples 100
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / place) for place in ("", "../1_utils/run_scripts")]

from chat_client import add_server_flags, client_of
from command_line import UserError, make_parser, run_main
from file_output import beside, write_csv, write_json
from load_json import TYPO_STYLES, read_prompt_file
from logger import get_logger


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__)
    files = parser.add_argument_group("files")
    files.add_argument("--prompt_file", type=Path, required=True, help="prompt file with the clean prompts")
    files.add_argument("--output_file", type=Path, required=True, help="prompt file to write")
    wanted = parser.add_argument_group("variants")
    styles = (*TYPO_STYLES, "polite", "urgent", "other")
    wanted.add_argument("--model", required=True, help="name of the model on the server")
    wanted.add_argument("--styles", nargs="+", default=["polite", "urgent"], choices=styles, metavar="STYLE")
    wanted.add_argument("--suffix", default="_llm", help='added to the style\'s name; "" replaces what is there')
    wanted.add_argument("--attempts", type=int, default=3, help="answers asked for, at most, for one variant")
    wanted.add_argument("--max_tokens", type=int, default=512, help="tokens of one answer, at most")
    wanted.add_argument("--max_samples", type=int, help="rephrase only the first so many rows")
    wanted.add_argument("--dry_run", action="store_true", help="say what would be asked, send nothing")
    add_server_flags(parser)
    args = parser.parse_args(argv)
    for flag in ("attempts", "max_tokens", "max_samples"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            raise UserError(f"--{flag} {getattr(args, flag)}: must be 1 or more")
    if args.output_file.resolve() == args.prompt_file.resolve():
        raise UserError(f"{args.output_file}: is the prompt file itself; choose another --output_file")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Ask, check, write. Returns 1 if requests failed."""
    args = parse_args(argv)
    from typos import rephrasing, variants

    logger = get_logger("rephrase")
    styles = list(dict.fromkeys(args.styles))
    rows = read_prompt_file(args.prompt_file).rows
    chosen = rows[: args.max_samples]
    client = client_of(args, args.model, beside(args.output_file, "_replies.jsonl"))
    if args.dry_run:
        logger.info(str(client.estimate(job.request(args.max_tokens) for job in rephrasing.make_jobs(chosen, styles))))
        return 0
    done, log = rephrasing.rephrase(chosen, styles, client, args.attempts, args.max_tokens, args.suffix)
    write_csv(beside(args.output_file, "_rephrasings.csv"), rephrasing.log_table(log))
    write_json(args.output_file, [*done, *rows[len(chosen) :]])
    for index, row in enumerate(chosen):
        if reason := variants.bad_row(row):
            logger.warning(f"row {index + 1} {reason}; it was copied as it is")
    logger.info(f"prompts with an accepted variant: {_counts(log, styles)}; wrote {args.output_file}")
    return 1 if any(line["reason"].startswith("request failed") for line in log) else 0


def _counts(log: list[dict[str, Any]], styles: Sequence[str]) -> str:
    """How many prompts of each style have a variant; with --verbose, why answers were rejected is logged."""
    counts = []
    for style in styles:
        lines = [line for line in log if line["style"] == style]
        accepted = sum(line["accepted"] for line in lines)
        counts.append(f"{style} {accepted} of {len({line['original_index'] for line in lines})}")
        kinds = Counter(line["reason"].partition(":")[0] for line in lines if not line["accepted"])
        for kind, count in kinds.most_common():
            get_logger("rephrase").debug(f"{style}: {count} answers rejected: {kind}")
    return ", ".join(counts)


if __name__ == "__main__":
    run_main(main)
