"""Score responses with a reward model: raw logits, the same alone as in a batch, in a notebook or for a whole run.

Reads   outputs/<run>/<style>/activations_*.pt
Writes  results/<run>/<style>_scores.csv                  one line per response, raw scores
        results/<run>/<style>_aggregates.json and .txt    n, min, quartiles, max, mean, standard deviation
        results/<run>/rewards_summary.csv                 per style: mean, paired difference to normal, interval, p
        results/<run>/rewards.png

    python 4_semantics_eval/run_scripts/score_scripts.py --run_dir outputs/demo/instructions --device 0

In a notebook, after a line that puts this folder on sys.path:

    from score_scripts import load_reward_model, score_predictions_and_save
    rm_pipeline = load_reward_model("OpenAssistant/reward-model-deberta-v3-large-v2", device=0)  # or "cuda:0"
    scored_list = score_predictions_and_save(pt_dir, rm_pipeline, raw_csv_path, agg_base_path)
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / place) for place in ("", "../1_utils/run_scripts")]

from command_line import add_run_flags, make_parser, run_main
from run_store import open_run, warn_unfinished

if __name__ != "__main__":  # for notebooks; as a script, --help must not wait for torch
    from semantics.reward_models import load_reward_model
    from semantics.rewards import score_predictions_and_save

__all__ = ["load_reward_model", "score_predictions_and_save"]
DEFAULT_REWARD_MODEL = "OpenAssistant/reward-model-deberta-v3-large-v2"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__)
    data = add_run_flags(parser, "run folder, style folder or .pt file of stage 2")
    data.add_argument("--score_against", choices=("clean", "style"), default="clean", help="the question it is given")
    model = parser.add_argument_group("reward model")
    model.add_argument("--rm_name", default=DEFAULT_REWARD_MODEL, help="hub name or folder of the reward model")
    model.add_argument("--device", default="0", help="GPU number, cuda:0, mps or cpu (-1)")
    model.add_argument("--batch_size", type=int, default=8, help="texts at once")
    model.add_argument("--max_length", type=int, help="tokens; default: what the model reads, at most 512 or 16384")
    model.add_argument("--dtype", help="default: float32; a chat model on a GPU keeps its own")
    model.add_argument("--revision", help="commit or branch on the hub")
    model.add_argument("--trust_remote_code", action="store_true", help="run code from the model's repository")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Score all styles of a run; 1 if a response could not be scored."""
    args = parse_args(argv)
    from semantics.rewards import score_run

    run = open_run(args.run_dir)
    run.chosen(args.styles)
    warn_unfinished(run, args.styles, args.max_samples)
    return score_run(run, args)


if __name__ == "__main__":
    run_main(main)
