"""Correct the prompts of a style before they are asked: by a spell checker, or by a strong language model.

Reads   a prompt file with typo styles
Writes  the prompt file with `repaired@<style>` added: the style's prompt after correction, made without the clean text
        <name>_repairs.csv     one line per word that was wrong or is: put right, left, changed or spoilt
        --method model: <name>_rephrasings.csv, every answer; <name>_replies.jsonl, the answers as they came

Numbers, code, URLs and all other protected text stay. Exit code 1: done, but requests to the model failed; the same
command asks for those again.

    python 0_data/run_scripts/repair_prompts.py --prompt_file 0_data/facts.json --styles swap typo@1 \\
        --output_file outputs/facts_repaired.json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / place) for place in ("", "../1_utils/run_scripts")]

from chat_client import add_server_flags, client_of
from command_line import UserError, make_parser, run_main
from file_output import beside, write_csv, write_json
from load_json import read_prompt_file
from logger import get_logger


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__)
    files = parser.add_argument_group("files")
    files.add_argument("--prompt_file", type=Path, required=True, help="prompt file with typo styles")
    files.add_argument("--output_file", type=Path, required=True, help="prompt file to write")
    files.add_argument("--max_samples", type=int, help="correct only the first so many rows")
    wanted = parser.add_argument_group("repair")
    wanted.add_argument("--styles", nargs="+", metavar="STYLE", help="default: all typo styles and doses of the file")
    wanted.add_argument("--method", choices=("spell", "model"), default="spell", help="who corrects")
    wanted.add_argument("--language", metavar="CODE", help="of rows without `_language` (default: English)")
    model = parser.add_argument_group("--method model")
    model.add_argument("--model_name", help="name of the model on the server")
    model.add_argument("--attempts", type=int, default=3, help="answers asked for, at most, for one prompt")
    model.add_argument("--max_tokens", type=int, default=512, help="tokens of one answer, at most")
    model.add_argument("--dry_run", action="store_true", help="say what would be asked, send nothing")
    add_server_flags(parser)
    args = parser.parse_args(argv)
    for flag in ("attempts", "max_tokens", "max_samples"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            raise UserError(f"--{flag} {getattr(args, flag)}: must be 1 or more")
    if (args.method == "model") != (args.model_name is not None):
        raise UserError("--method model needs --model_name, and --model_name needs --method model")
    if args.output_file.resolve() == args.prompt_file.resolve():
        raise UserError(f"{args.output_file}: is the prompt file itself; choose another --output_file")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Correct, count, write. Returns 1 if requests failed."""
    args = parse_args(argv)
    from typos import checks, repairs, rephrasing

    logger = get_logger("repair_prompts")
    prompts = read_prompt_file(args.prompt_file)
    styles = repairs.styles_to_repair(prompts, args.styles)
    rows = checks.with_language(prompts.rows, args.language)
    chosen, answers = rows[: args.max_samples], list[dict[str, Any]]()
    if args.method == "model":
        client = client_of(args, args.model_name, beside(args.output_file, "_replies.jsonl"))
        if args.dry_run:
            jobs = repairs.repair_jobs(chosen, styles)
            logger.info(str(client.estimate(job.request(args.max_tokens) for job in jobs)))
            return 0
        chosen, answers = repairs.repair_by_model(chosen, styles, client, args.attempts, args.max_tokens)
        write_csv(beside(args.output_file, "_rephrasings.csv"), rephrasing.log_table(answers))
    else:
        chosen = repairs.repair_by_spelling(chosen, styles)
        for name, count in repairs.without_word_list(chosen, styles).items():
            logger.warning(f"{count} prompts are not corrected: no word list of {name}; --method model can do it")
    log, log_file = repairs.count_repairs(chosen, styles), beside(args.output_file, "_repairs.csv")
    write_csv(log_file, log)
    write_json(args.output_file, [*chosen, *rows[len(chosen) :]])
    for line in repairs.summary_lines(chosen, styles, log):
        logger.info(line)
    logger.info(f"wrote {args.output_file} and {log_file}")
    return 1 if any(line["reason"].startswith("request failed") for line in answers) else 0


if __name__ == "__main__":
    run_main(main)
