"""Patch activations of the clean form into the typo run: which positions, layers and heads make the typo hurt.

Reads   outputs/<run>/<style>/run.json and activations_*.pt (the run's own settings and prompts), and its model
Writes  outputs/<run>/<style>/patches_*.pt, patches.json, and patches_failures.csv with rows that could not be run.
        The same command continues where it stopped.

    python 2_inference/run_scripts/patch_activations.py --run_dir outputs/demo/facts --styles swap

The donor is split@<style>, the clean prompt in the typo's tokens, so that every token has its counterpart. Each file
has its proof: patches that must do nothing, or everything, do so; a run whose proof fails stops.
Exit code: 0 all done, 1 some rows failed, 2 wrong usage or disk full, 75 stopped by a signal.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / place) for place in ("", "../1_utils/run_scripts")]

from attn_act_logi import shard_of
from command_line import UserError, make_parser, run_main

SITES = ("resid_pre", "attn_out", "mlp_out", "z", "pattern", "v", "mlp_post")
POSITIONS = ("edited", "edited_last", "after", "readout", "all", "tokens")
DEFAULT_POSITIONS = {"split": ["edited", "after", "readout"], "normal": ["edited_last", "readout"]}  # by source


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__)
    flag = parser.add_argument_group("run").add_argument
    flag("--run_dir", type=Path, required=True, help="run folder of stage 2")
    flag("--styles", nargs="+", required=True, help="typo styles to patch")
    flag("--max_samples", type=int, help="first rows of the prompt file only; default: those of the run")
    flag("--batch_size", type=int, help="patched rows in a batch; default: what memory takes")
    flag("--seed", type=int, default=0, help="of random directions")
    flag("--shard", help="i/n: this process's share, i from 0; default: SLURM array, accelerate")
    flag("--overwrite", action="store_true", help="remove earlier patches of these styles")

    flag = parser.add_argument_group("model").add_argument
    flag("--model_name", help="the run's model; default: as in its run.json, or models/<that name>")
    flag("--dtype", help="auto, float32, bfloat16, float16; default: the run's")
    flag("--device_map", help="auto: spread over all GPUs; cpu, cuda:1 …: that device")
    flag("--trust_remote_code", action="store_true", help="run code from the model's repository")

    flag = parser.add_argument_group("patches").add_argument
    source = "whose states: split (split@<style>, token by token) or normal (the clean prompt; single tokens only)"
    flag("--source", choices=("split", "normal"), default="split", help=source)
    ways = "denoising: clean states into the typo run; noising: the reverse"
    flag("--directions", nargs="+", choices=("denoising", "noising"), default=["denoising"], help=ways)
    sites = "what is patched; z, pattern and v by head, for all tokens; the others for --positions"
    flag("--sites", nargs="+", choices=SITES, help=f"{sites}; default: resid_pre, with split also z")
    where = "edited tokens, the last of them, the others after the first edit, the last prompt token and the response; "
    where += "tokens: each token from the first edited one on alone; "
    where += "default: edited after readout, with normal edited_last readout"
    flag("--positions", nargs="+", choices=POSITIONS, help=where)
    flag("--layers", nargs="+", default=["all"], help="layers: numbers, ranges (0-5), -1 (the last), all")
    flag("--response_tokens", type=int, help="longest donor response that is compared; default: as in the run")
    controls = "donors of the edited tokens that should not repair: another item's, a random direction; or none"
    flag("--controls", nargs="+", choices=("other", "random", "none"), default=["other", "random"], help=controls)

    flag = parser.add_argument_group("units").add_argument
    screen = "attribution: estimate all heads, MLPs and neurons by one backward pass, patch the best exactly"
    flag("--screen", choices=("attribution", "none"), default="none", help=screen)
    flag("--ig_steps", type=int, default=1, help="steps of integrated gradients, with --screen; 1: the gradient alone")
    flag("--top_k", type=int, default=20, help="heads (neurons) that are patched one by one, with --screen")
    flag("--units_csv", type=Path, help="sets of units: layer, head or neuron, and perhaps style and set")
    flag("--ablate", choices=("zero", "mean"), help="put this into the sets instead of the donor's states")
    args = parser.parse_args(argv)
    for name in ("max_samples", "batch_size", "response_tokens", "ig_steps", "top_k"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: must be at least 1")
    if args.ablate and not args.units_csv and args.screen == "none":
        raise UserError(f"--ablate {args.ablate}: there are no sets; give --units_csv or --screen attribution")
    args.sites = args.sites or (["resid_pre", "z"] if args.source == "split" else ["resid_pre"])
    args.positions = args.positions or DEFAULT_POSITIONS[args.source]
    if args.source == "split" and args.screen != "none" and not {*args.sites} & {"z", "mlp_out", "mlp_post"}:
        raise UserError("--screen attribution: finds units of z, mlp_out and mlp_post; name one of them in --sites")
    for name in ("directions", "sites", "positions", "styles"):
        setattr(args, name, list(dict.fromkeys(getattr(args, name))))
    args.controls = [] if "none" in args.controls else sorted({*args.controls})
    args.shard = shard_of(args.shard, os.environ)
    if args.overwrite and args.shard[1] > 1:
        raise UserError(
            "--overwrite: one shard would remove another's files; remove the old patches before the shards start"
        )
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Patch what is missing; returns the exit code."""
    args = parse_args(argv)
    from capture.patch_job import run_command

    return run_command(args)


if __name__ == "__main__":
    run_main(main)
