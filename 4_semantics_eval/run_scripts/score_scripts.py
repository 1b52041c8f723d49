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

from command_line import make_parser, run_main
from file_output import write_csv
from logger import get_logger
from run_store import open_run, warn_unfinished

if __name__ != "__main__":  # for notebooks; as a script, --help must not wait for torch
    from semantics.reward_models import load_reward_model
    from semantics.rewards import score_predictions_and_save

__all__ = ["load_reward_model", "score_predictions_and_save"]
DEFAULT_REWARD_MODEL = "OpenAssistant/reward-model-deberta-v3-large-v2"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__)
    data = parser.add_argument_group("data")
    data.add_argument("--run_dir", type=Path, required=True, help="run folder, style folder or .pt file of stage 2")
    data.add_argument("--results_dir", type=Path, help="default: results/<run name>")
    data.add_argument("--styles", nargs="+", help="styles to score; default: all of the run")
    data.add_argument("--max_samples", type=int, help="only the first rows of the prompt file")
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
    import pandas as pd
    from semantics.response_plots import plot_rewards
    from semantics.responses import by_style
    from semantics.reward_models import load_reward_model
    from semantics.rewards import known_question, score_style, summarise, write_scores

    run = open_run(args.run_dir)
    run.chosen(args.styles)
    warn_unfinished(run, args.styles, args.max_samples)
    folder = args.results_dir or Path("results") / run.name
    rm = load_reward_model(
        args.rm_name, args.device, args.max_length, args.batch_size, args.dtype, args.revision, args.trust_remote_code
    )
    against = known_question(run, args.score_against)
    kept = []
    for style in args.styles or run.styles:
        lines = score_style(run, style, rm, against, args.batch_size, args.max_samples)
        write_scores(lines, folder / f"{style}_scores.csv", folder / f"{style}_aggregates", rm, against)
        names = ("style", "original_index", "reward_score", "truncated", "identical")
        kept.append(pd.DataFrame(lines, columns=list(names)))
    items = pd.concat(kept, ignore_index=True)
    table = summarise(items, run)
    table["reward_model"], table["score_against"] = rm.name, against
    write_csv(folder / "rewards_summary.csv", table)
    plot_rewards(items, table, folder / "rewards.png", rm.name)

    columns = ["style", "n", "estimate", "ci_low", "ci_high", "difference", "p_adjusted", "n_truncated"]
    get_logger().debug(table[columns].to_string(index=False, float_format=lambda x: f"{x:.3f}"))
    if unscored := int(items["reward_score"].isna().sum()):
        get_logger().warning("%d responses are unscored; the column note says why", unscored)
    print(f"reward (raw logit): {by_style(table)}; wrote {folder / 'rewards_summary.csv'}")
    return 1 if unscored else 0


if __name__ == "__main__":
    run_main(main)
