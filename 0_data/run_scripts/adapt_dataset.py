"""Turn an existing dataset into a prompt file, line by line; a bad line is counted and named, never fatal.

--format   reads                                                    makes
  gsm8k    JSONL: question, answer with the gold after ####         normal, answer (text such as 3/4 or 25% as it is)
  quora    TSV: id qid1 qid2 question1 question2 is_duplicate       normal, other or negative, _template, _id, _label
  paws     TSV: id sentence1 sentence2 label                        normal, other or negative, _id, _label
  csv, tsv, jsonl   the columns named by the flags below            normal, answer, _template

A pair that is not a paraphrase is a negative control: its second text is under `negative` instead of `other`. PAWS
sentences follow --instruction. Quora pairs that share a question, directly or through other pairs, share a `_template`.
If lines were bad, <name>_bad_lines.csv (line, reason) is written beside the prompt file, and the exit code is 1.

    python 0_data/run_scripts/adapt_dataset.py --format gsm8k --input_file gsm8k.jsonl --output_file outputs/gsm8k.json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / place) for place in ("", "../1_utils/run_scripts")]

from command_line import UserError, make_parser, run_main
from logger import get_logger


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__)
    files = parser.add_argument_group("files")
    files.add_argument("--input_file", type=Path, required=True, help="the dataset")
    files.add_argument("--output_file", type=Path, required=True, help="prompt file to write")
    data = parser.add_argument_group("dataset")
    data.add_argument("--format", required=True, choices=("gsm8k", "quora", "paws", "csv", "tsv", "jsonl"))
    data.add_argument("--max_samples", type=int, help="stop after so many good records")
    data.add_argument("--instruction", default="Rewrite the following sentence in your own words:", help="for paws")
    columns = parser.add_argument_group("columns, for csv, tsv and jsonl")
    columns.add_argument("--prompt_column", default="prompt", help="becomes `normal`")
    columns.add_argument("--answer_column", help="becomes `answer`")
    columns.add_argument("--template_column", help="becomes `_template`: rows that share it form one cluster")
    args = parser.parse_args(argv)
    if args.max_samples is not None and args.max_samples < 1:
        raise UserError(f"--max_samples {args.max_samples}: must be 1 or more")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Convert one dataset. Returns 1 if lines were bad."""
    args = parse_args(argv)
    from typos.dataset_formats import bad_lines_path, rows_of, write_prompt_file

    bad_lines = bad_lines_path(args.output_file)
    if args.input_file.resolve() in (args.output_file.resolve(), bad_lines.resolve()):
        raise UserError(f"{args.output_file}: would overwrite the dataset itself; choose another --output_file")
    columns = (args.prompt_column, args.answer_column, args.template_column)
    rows = rows_of(args.input_file, args.format, args.max_samples, args.instruction, columns)
    made, bad = write_prompt_file(args.output_file, rows)
    logger = get_logger("adapt_dataset")
    logger.info(f"wrote {args.output_file} ({made} rows)")
    if bad:
        logger.warning(f"{bad} bad lines were left out, all listed in {bad_lines}")
    return 1 if bad else 0


if __name__ == "__main__":
    run_main(main)
