"""Measure what capture costs: ours, `generate()` alone, and other ways, batch by batch in turn, as ratios in one run.

Writes  a table to standard output and, with --csv or --json, one row per way and prompt length

    python 2_inference/run_scripts/bench_capture.py --model_name models/SmolLM2-135M-Instruct --lengths 12 400
    python 2_inference/run_scripts/bench_capture.py --random_weights google/gemma-2-9b-it --batch_size 64
    python 2_inference/run_scripts/bench_capture.py --model_name models/SmolLM2-135M-Instruct \\
        --prompt_file 0_data/maths.json --few_shot_file 0_data/few_shot_maths.txt

The first form times single batches of random tokens. With --prompt_file it times a whole job: a plain `generate()`
loop in file order at batch 16 without capture, against this stage with its defaults, at equal text. Ctrl-C, SIGTERM
or --time_limit end the run with a table of the finished rounds (exit code 130).
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / place) for place in ("", "../1_utils/run_scripts")]

from command_line import UserError, make_parser, run_main


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__)
    flag = parser.add_argument_group("model").add_argument
    flag("--model_name", help="hub id or local folder")
    flag(
        "--random_weights",
        help="shape of google/gemma-2-9b-it, meta-llama/Llama-3.1-8B-Instruct, Qwen/Qwen3-8B or a folder",
    )
    flag("--dtype", default="auto", help="auto, float32, bfloat16, float16")
    flag("--device_map", help="auto, cpu, cuda:0 …")

    flag = parser.add_argument_group("work").add_argument
    flag("--lengths", type=int, nargs="+", default=[12, 400, 2000], help="prompt lengths in tokens")
    flag("--batch_size", type=int, default=8, help="rows (fewer if a prompt is long: see --max_tokens)")
    flag("--max_tokens", type=int, default=4000, help="rows × prompt length of a batch at most")
    flag("--max_new_tokens", type=int, default=16, help="tokens generated for each row")
    flag("--repeats", type=int, default=7, help="rounds; the table has the median ratio")
    flag("--raw_layers", nargs="+", help="raw layers of ours, or none; default: as in attn_act_logi.py")
    ways = "what is timed: generate ours two_pass nnsight transformer_lens; default: those installed"
    flag("--ways", nargs="+", help=ways)

    suite = "patching: patched batches against plain forward passes; gpu: parity with eager, decoding, two sizes"
    flag("--suite", choices=("capture", "patching", "gpu"), default="capture", help=suite)

    flag = parser.add_argument_group("a whole job").add_argument
    flag("--prompt_file", type=Path, help="time the job of this file instead of single batches")
    flag("--prompt_key", default="normal", help="its style")
    flag("--max_samples", type=int, default=96, help="prompts of it")
    flag("--few_shot_file", type=Path, help="text before every prompt")
    flag("--stop_strings", nargs="+", default=[], help="given to both sides")
    flag("--output_dir", type=Path, help="where ours writes; default: a temporary folder")

    parser.add_argument("--csv", type=Path, help="write the table here too")
    parser.add_argument("--json", type=Path, help="write it in the form of docs/measured/*.json")
    parser.add_argument("--time_limit", type=int, help="seconds until the run ends with what it has")
    args = parser.parse_args(argv)
    if (args.model_name is None) == (args.random_weights is None):
        raise UserError("give one of --model_name and --random_weights")
    args.stop_strings = [text.replace("\\n", "\n") for text in args.stop_strings]
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Load or make the model, time, print."""
    args = parse_args(argv)
    for number in (signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, signal.default_int_handler)
    signal.alarm(args.time_limit or 0)
    from capture.benchmark import run

    return run(args, list(argv or sys.argv[1:]))


if __name__ == "__main__":
    run_main(main)
