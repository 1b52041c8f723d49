"""Read the number that a model answered out of its response, and compare it with the gold answer.

Reads   a response (the newly generated text alone), and the prompt where it is known
Writes  nothing; as a script it prints what it read as one line of JSON

    python 3_maths_eval/run_scripts/parse_predictions.py "The answer is 97, the total of 4 and 93." --gold 97

The rules and their order are in maths/answer_rules.py and docs/METHODS.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / place) for place in ("", "../1_utils/run_scripts")]

from command_line import make_parser, run_main
from maths.answer_rules import parse_prediction_text
from maths.gold import arithmetic_value, gold_value, judge, matches_gold, read_gold

__all__ = ["arithmetic_value", "gold_value", "judge", "matches_gold", "parse_prediction_text", "read_gold"]


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__)
    parser.add_argument("response", help="the response's text; - reads it from standard input")
    parser.add_argument("--prompt", help="the prompt that it answers, so that an echo is known as one")
    parser.add_argument("--gold", help="the right answer, to compare with")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Print what a response answers."""
    args = parse_args(argv)
    response = sys.stdin.read() if args.response == "-" else args.response
    gold = read_gold(args.gold, args.prompt)
    parsed, right = judge(response, args.prompt, gold)
    line: dict[str, Any] = {"value": None if parsed.value is None else str(parsed.value)}
    line |= {"rule": parsed.rule, "status": parsed.status, "text": parsed.text}
    if right is not None:
        line |= {"gold": gold.expression or str(gold.number), "right": right}
    print(json.dumps(line, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    run_main(main)
