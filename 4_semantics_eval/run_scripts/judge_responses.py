"""Let a strong model judge the responses: each style's against the normal one, or each by itself on a scale.

Reads   outputs/<run>/<style>/activations_*.pt, of all styles and of normal (of several samples, the first)
Writes  results/<run>/judge_items.csv, judge_summary.csv, judge.png                        --mode pairwise
        results/<run>/judge_rubric_items.csv, judge_rubric_summary.csv, judge_rubric.png   --mode rubric
        results/<run>/judge_cache.jsonl     every answer of the judge; a second run asks only what is not there

    export OPENAI_API_KEY=…
    python 4_semantics_eval/run_scripts/judge_responses.py --run_dir outputs/demo/instructions --judge_model gpt-4o

pairwise: both answers in both orders; a verdict counts only if it holds in both. rubric: each answer alone, 1 to 10.
`--dry_run` prints how many calls and tokens a run would take, and makes none. --base_url takes any OpenAI-compatible
server (vLLM, llama.cpp, Ollama …), the key comes from the environment.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / place) for place in ("", "../1_utils/run_scripts")]

from chat_client import add_server_flags
from command_line import add_run_flags, make_parser, run_main
from run_store import open_run, warn_unfinished


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__)
    add_run_flags(parser, "run folder of stage 2, with normal and other styles")
    judge = parser.add_argument_group("judge")
    judge.add_argument("--judge_model", required=True, help="name of the judge on its server")
    judge.add_argument("--mode", choices=("pairwise", "rubric"), default="pairwise", help="compare, or rate alone")
    judge.add_argument("--score_against", choices=("clean", "style"), default="clean", help="the question it is shown")
    judge.add_argument("--max_tokens", type=int, default=512, help="length of a judgement (more for a reasoning model)")
    judge.add_argument("--no_json_schema", action="store_true", help="ask in plain text from the start")
    judge.add_argument("--cache", type=Path, help="default: judge_cache.jsonl in the results folder")
    judge.add_argument("--dry_run", action="store_true", help="count calls and tokens, and make none")
    add_server_flags(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Judge a run; 1 if requests failed, so that the same command is worth repeating."""
    args = parse_args(argv)
    from semantics.judging import judge_run

    run = open_run(args.run_dir)
    warn_unfinished(run, args.styles, args.max_samples)
    return judge_run(run, args)


if __name__ == "__main__":
    run_main(main)
