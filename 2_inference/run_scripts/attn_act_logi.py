"""Generate a causal language model's answers to a prompt file, and capture what happens inside while it reads.

Reads   a prompt file (JSON list of objects, one style a key)
Writes  <output_dir>/activations_*.pt and run.json (several styles: <output_dir>/<style>/…), prompts.json, and
        failures.csv with the prompts that could not be run. The same command continues where it stopped. With
        --base_url a server generates the text, with --responses_file it is there already; inside is captured here.

    python 2_inference/run_scripts/attn_act_logi.py --model_name google/gemma-2-9b-it \\
        --prompt_file 0_data/polite_prompts.json --output_dir outputs/polite_run

Exit code: 0 all done, 1 some prompts failed (see failures.csv), 2 wrong usage or disk full, 75 stopped by a signal.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / place) for place in ("", "../1_utils/run_scripts")]

from chat_client import add_server_flags
from command_line import UserError, make_parser, run_main
from stamps import by_flag

# What says how text is made; given responses are there already.
TEXT_FLAGS = ("max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "num_samples", "seed")
TOPK_LOGITS = {"last": 1000, "all": 10}  # by --topk_positions
AT_LEAST = {"max_new_tokens": 0, "top_k": 0, "num_samples": 1, "topk_logits": 1, "temperature": 0.0, "max_samples": 1}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__)
    flag = parser.add_argument_group("model").add_argument
    flag("--model_name", required=True, help="hub id or local folder of a causal language model")
    flag("--revision", help="branch, tag or commit on the hub")
    flag("--dtype", default="auto", help="auto, float32, bfloat16, float16 (auto on a CPU: float32)")
    flag("--device_map", help="auto: spread over all GPUs; cpu, cuda:1 …: that device")
    kernels = "sdpa, flash_attention_2 (or 3, 4), flex_attention, eager; default: transformers' choice for the model"
    flag("--attn_implementation", help=kernels)
    flag("--trust_remote_code", action="store_true", help="run code from the model's repository")

    flag = parser.add_argument_group("prompts").add_argument
    flag("--prompt_file", type=Path, required=True, help="JSON list of objects")
    styles = "styles to run, or all; default: the file's only one. split@<style> is a control: the clean form, its "
    styles += "words cut into as many tokens as that style's typos, which separates the typo from the token count. "
    styles += "neutral@<style> is the control of a tone: neutral sentences of as many tokens. normal@again is the "
    styles += "clean form once more in other batches: numerical noise"
    flag("--prompt_keys", nargs="+", help=styles)
    flag("--max_samples", type=int, help="run the first rows of the file only")
    flag("--few_shot_file", type=Path, help="text put before every prompt, as it is")
    flag("--apply_chat_template", action="store_true", help="as a user's turn in the model's template")
    flag("--system_prompt", help="system turn, with --apply_chat_template")
    flag("--task_regex", help="where the task is in a prompt (its group 1); default: after the colon")

    flag = parser.add_argument_group("generation").add_argument
    flag("--max_new_tokens", type=int, default=64, help="longest response")
    flag("--temperature", type=float, default=0.0, help="0 is greedy")
    flag("--top_p", type=float, default=1.0, help="nucleus, when sampling")
    flag("--top_k", type=int, default=0, help="0: all tokens, when sampling")
    flag("--repetition_penalty", type=float, default=1.0, help="1 is none")
    flag("--num_samples", type=int, default=1, help="responses of each prompt, when sampling")
    files = "use these responses and generate none: JSON Lines, CSV, or samples of lm-evaluation-harness "
    flag("--responses_file", nargs="+", help=files + "(docs/DATA_FORMAT.md); STYLE=FILE if its rows name no style")
    flag("--seed", type=int, default=0, help="random numbers depend on it, the row, the sample, the step")
    flag("--stop_strings", nargs="+", default=[], help=r"a response ends before these (\n: line end)")
    flag("--response_logprobs", action="store_true", help="log-probabilities of the responses' tokens")
    flag("--answer_logprobs", action="store_true", help="log-probabilities of the row's accepted answers")
    crossed = "as --response_logprobs, and of each style's response after the clean form's prompt"
    flag("--cross_logprobs", action="store_true", help=crossed)

    flag = add_server_flags(
        parser, "text from this server, as the flags above say; default: from the model here"
    ).add_argument
    flag("--server_model", help="the model's name at the server; default: --model_name")
    flag("--stored_text", action="store_true", help="the text that serve_responses.py has stored; no server is asked")
    flag("--send_token_ids", action="store_true", help="send prompts as token ids (vLLM, SGLang, llama.cpp)")

    flag = parser.add_argument_group("capture").add_argument
    raw = "layers kept raw, counted as in hidden_states (0: embeddings): numbers, ranges (0-5), -1 (the last), all, or "
    flag("--raw_layers", nargs="+", help=raw + "none; default: 0 5 10 15, as far as the model has them")
    flag("--topk_logits", type=int, help="next-token logits kept; default 1000, with --topk_positions all 10")
    flag("--topk_positions", choices=("last", "all"), default="last", help="of the prompt")
    flag("--neurons", action="store_true", help="MLP activations (down_proj input) averaged over regions")
    gates = "outputs of the MLP's activation function (act_fn), averaged over regions: the neurons of Tsuji et al."
    flag("--gates", action="store_true", default=None, help=gates)
    flag("--entropy", action="store_true", help="attention entropy of every head (needs full maps)")
    pooled = "regions whose states are averaged (edited:swap: for that style); default: last instruction task edited"
    flag("--pool_regions", nargs="+", help=pooled)
    half = ("float16", "bfloat16")
    flag("--pooled_dtype", choices=half, help="of the averaged states; default: the model's")

    flag = parser.add_argument_group("run").add_argument
    flag("--output_dir", type=Path, required=True, help="run folder")
    flag("--batch_size", default="auto", help="rows in a batch, or auto: what memory takes")
    flag("--shard", help="i/n: this process's share, i from 0; default: SLURM array, accelerate")
    kept = "remove what an earlier run wrote there. A server's responses stay: they are used again if the settings of "
    kept += "the text are the same (to ask anew, delete responses.jsonl), else the file is renamed"
    flag("--overwrite", action="store_true", help=kept)
    flag("--force", action="store_true", help="run although the disk seems too small")
    flag("--no_prefix_reuse", action="store_true", help="read the shared prefix with every prompt again")
    args = parser.parse_args(argv)
    if args.responses_file:
        given = by_flag(sys.argv[1:] if argv is None else argv)
        if made := [f"--{name}" for name in (*TEXT_FLAGS, "stop_strings") if f"--{name}" in given]:
            raise UserError(f"{' '.join(made)}: says how text is generated, but --responses_file brings it; drop one")
        args.max_new_tokens = 0
    return _checked(args)


def _checked(args: argparse.Namespace) -> argparse.Namespace:
    for name, least in AT_LEAST.items():
        value = getattr(args, name)
        if value is not None and not value >= least:  # nan, too
            raise UserError(f"--{name} {value}: must be at least {least}")
    if (args.base_url or args.stored_text) and (args.responses_file or not args.max_new_tokens):
        flag = "--base_url" if args.base_url else "--stored_text"
        raise UserError(f"{flag}: goes with neither --responses_file nor --max_new_tokens 0")
    if args.num_samples > 1 and args.temperature == 0:
        raise UserError("--num_samples: greedy samples are all the same; add --temperature 0.7, say")
    if args.system_prompt and not args.apply_chat_template:
        raise UserError("--system_prompt: goes with --apply_chat_template")
    if args.batch_size != "auto" and not (args.batch_size.isdigit() and int(args.batch_size) > 0):
        raise UserError(f"--batch_size {args.batch_size}: give a number or auto")
    if not 0 < args.top_p <= 1 or args.repetition_penalty <= 0:
        raise UserError("--top_p must lie in (0, 1], --repetition_penalty above 0")
    args.topk_logits = args.topk_logits or TOPK_LOGITS[args.topk_positions]
    args.response_logprobs = args.response_logprobs or args.cross_logprobs
    args.stop_strings = [text.replace("\\n", "\n").replace("\\t", "\t") for text in args.stop_strings]
    if "" in args.stop_strings:
        raise UserError("--stop_strings: an empty string would end every response at once; leave it out")
    args.shard = shard_of(args.shard, os.environ)
    if args.overwrite and args.shard[1] > 1:
        raise UserError("--overwrite: one shard would remove another's files; clear the folder before the shards start")
    return args


def shard_of(text: str | None, environment: Mapping[str, str]) -> tuple[int, int]:
    """(i, n) of this process: from `--shard`, else from a SLURM array times the processes of `accelerate launch`."""
    if text is not None:
        parts = text.split("/")
        if len(parts) != 2 or not all(part.isdigit() for part in parts) or not int(parts[0]) < int(parts[1]):
            raise UserError(f"--shard {text}: write i/n with i from 0 to n-1, for example 0/4")
        return int(parts[0]), int(parts[1])

    def number(name: str, default: int) -> int:
        return int(environment.get(name, default))

    tasks, ranks = number("SLURM_ARRAY_TASK_COUNT", 1), number("WORLD_SIZE", 1)
    place = number("SLURM_ARRAY_TASK_ID", 0) - number("SLURM_ARRAY_TASK_MIN", 0)
    task = place // number("SLURM_ARRAY_TASK_STEP", 1) if tasks > 1 else 0
    if task >= tasks:
        raise UserError("this SLURM array has gaps, so its task numbers do not give the shards; give each --shard i/n")
    return task * ranks + number("RANK", 0), tasks * ranks


def job_module() -> Any:
    """`capture.job`, imported when it is needed: --help does without torch."""
    from capture import job

    return job


def bytes_to_write(args: argparse.Namespace) -> int:
    """Bytes that this command would still write, for a plan of jobs. Raises UserError as `main` would."""
    job = job_module()
    return int(job.bytes_left(job.plan_jobs(args)[0]))


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing of the run; returns the exit code."""
    args = parse_args(argv)
    return int(job_module().run_command(args))


if __name__ == "__main__":
    run_main(main)
