"""Start a server of the model (vLLM), let it answer a run's prompts, store the responses, and stop it.

Reads   a prompt file
Writes  <output_dir>/<style>/responses.jsonl, run.json and failures.csv, <output_dir>/server.log

    python 2_inference/run_scripts/serve_responses.py -- --model_name google/gemma-2-9b-it \\
        --prompt_file 0_data/maths.json --prompt_keys all --output_dir outputs/maths

What follows -- are the flags of attn_act_logi.py. The same with --stored_text then captures: the GPU is free again. The
same command again asks only for what is missing. With --base_url an existing server is asked, and none is started.

Exit code: 0 all is stored, 1 some prompts have no response, 2 wrong usage or no server, 75 stopped by a signal.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / place) for place in ("", "../1_utils/run_scripts")]

import attn_act_logi
from command_line import UnknownFlag, UserError, make_parser, run_main

# --generation-config vllm: no sampling settings of the model's repository, as in stage 2.
VLLM = (
    "vllm serve {model} --revision {revision} --dtype {dtype} --tensor-parallel-size {gpus} --generation-config vllm "
    "--host 127.0.0.1 --port {port}"
)
OUR_SERVER = ("--stored_text", "--max_concurrency", "64", "--timeout", "600")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. `stage2`: what stage 2's own parser makes of the flags after `--`."""
    words = list(sys.argv[1:] if argv is None else argv)
    cut = words.index("--") if "--" in words else len(words)
    parser = make_parser(__doc__)
    own = "starts an OpenAI-compatible server of {model} at 127.0.0.1:{port}; {revision}, {dtype} and {gpus} may be in "
    own += "it. The environment's SERVE_COMMAND is the default if it is set"
    parser.add_argument("--serve_command", default=os.environ.get("SERVE_COMMAND") or VLLM, help=own)
    parser.add_argument("--start_limit", type=float, default=1800.0, help="seconds until it must answer")
    try:
        args = parser.parse_args(words[:cut])
    except UnknownFlag as error:
        raise UserError(f"{error.flag}: no such flag before --; those of attn_act_logi.py come after it") from None
    if cut >= len(words) - 1:
        raise UserError("give the flags of attn_act_logi.py after --: … -- --model_name … --output_dir …")
    args.stage2 = attn_act_logi.parse_args([*OUR_SERVER, *words[cut + 1 :]])
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Store what is missing of a run's text; returns the exit code."""
    args = parse_args(argv)
    return int(attn_act_logi.job_module().store_text(args.stage2, args.serve_command, args.start_limit))


if __name__ == "__main__":
    run_main(main)
