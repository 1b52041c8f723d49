"""Let a strong language model write typo, tone or reworded variants of a prompt file, and accept only what is sound.

Reads   a prompt file (clean prompts under `normal` or `instruction`)
Writes  the prompt file with the accepted variants under <style><--suffix> (`polite_llm`, …)
        <name>_rephrasings.csv      every answer: style, original_index, element_index, attempt, accepted, reason,
                                    model, text
        <name>_replies.jsonl        the answers as they came; a second run asks only for what is missing there

An answer passes the same checks as the variants of make_variants.py: digits, operators, `task`, `answer` and all other
protected text byte for byte the same, and exactly the edits that the style's name says. `other` (a free rewording)
must hold every protected text as often as the clean prompt does. A rejected answer goes back to the model with the
reason, up to --attempts times; after that the row lacks the style. Exit code 1: done, but requests failed; the same
command asks for those again.

    OPENAI_API_KEY=… python 0_data/run_scripts/rephrase_with_llm.py --model gpt-4o --styles polite other \\
        --prompt_file 0_data/maths.json --output_file outputs/maths_llm.json --max_samples 100

Any OpenAI-compatible server will do (--base_url http://localhost:8000/v1). --dry_run tells what a run would ask.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / place) for place in ("", "../1_utils/run_scripts")]

from chat_client import ChatClient, ChatReply, ChatRequest, add_server_flags
from command_line import UserError, make_parser, one_line, run_main
from file_output import write_csv, write_json
from load_json import is_style_key, read_prompt_file
from logger import get_logger
from make_variants import bad_row, clean_text
from thinking_text import without_thinking
from typos import rules

SYSTEM = (
    "You edit prompts for a study of how language models handle imperfect input. Reply with the edited prompt alone: "
    "no comment, no quotation marks around it. Never answer the prompt."
)
ONE_TYPO = "Keep everything else as it is, letter by letter. The misspelled word must not be another English word."
REQUESTS = {
    "main": f"Replace one letter of the most important word by a neighbouring letter on the keyboard. {ONE_TYPO}",
    "swap": f"Swap two neighbouring letters inside one important word. {ONE_TYPO}",
    "missing": f"Leave out one letter of one important word. {ONE_TYPO}",
    "repeated": f"Double one letter of one important word. {ONE_TYPO}",
    "two": f"Put one typo (a letter wrong, missing, doubled or swapped) into each of exactly two words. {ONE_TYPO}",
    "three": f"Put one typo (a letter wrong, missing, doubled or swapped) into each of exactly three words. {ONE_TYPO}",
    "grammar": "Make exactly one mistake of grammar (agreement, tense or article) by changing a single word.",
    "punctuation": "Make exactly one mistake of punctuation: one stray or missing mark or space. Change no letter.",
    "homonym": "Replace one word by another English word that sounds exactly the same but is spelled differently.",
    "polite": "Put one very polite sentence before the prompt, without a colon. Keep the prompt itself word for word.",
    "urgent": "Put one urgent sentence before the prompt, without a colon. Keep the prompt itself word for word.",
    "other": "Say the same in other words, so that exactly the same answer is asked for.",
}
TEMPERATURE_AFTER_REJECTION = 0.7  # at 0 many servers would repeat themselves
LOG_COLUMNS = ["style", "original_index", "element_index", "attempt", "accepted", "reason", "model", "text"]


@dataclass
class Job:
    """One variant to be written: the row, the style, and the talk with the model so far."""

    original_index: int
    row: dict[str, Any]
    style: str
    messages: tuple[tuple[str, str], ...]
    attempt: int = 1

    def request(self, max_tokens: int) -> ChatRequest:
        temperature = 0.0 if self.attempt == 1 else TEMPERATURE_AFTER_REJECTION
        return ChatRequest(self.messages, max_tokens=max_tokens, temperature=temperature, seed=self.attempt)


# --- what is asked, and what is accepted


def first_messages(row: dict[str, Any], style: str) -> tuple[tuple[str, str], ...]:
    """The system and the user message that ask for `style`; protected text is listed for the model."""
    clean = clean_text(row)
    kept = dict.fromkeys(rules.protected_texts(clean, row))
    rule = "These parts must stay exactly as they are:\n" + "\n".join(kept) + "\n\n" if kept else ""
    return (("system", SYSTEM), ("user", f"{REQUESTS[style]}\n\n{rule}The prompt:\n{clean}"))


def read_answer(content: str | None, clean: str) -> str:
    """The variant in an answer: without thinking, code fence or quotation marks that the clean prompt has not."""
    text = (content if without_thinking(clean) != clean else without_thinking(content or "")) or ""
    text = text.strip()
    fenced = re.fullmatch(r"```[a-z]*\n(.*?)\n?```", text, re.DOTALL)
    if fenced and not clean.lstrip().startswith("```"):
        text = fenced[1].strip()
    if len(text) > 1 and text[0] + text[-1] in ('""', "“”") and clean.strip()[:1] != text[0]:
        text = text[1:-1].strip()
    return text


def reasons_against(row: dict[str, Any], style: str, variant: str) -> list[str]:
    """Why `variant` may not stand under `style`; empty where it may."""
    clean = clean_text(row)
    if not variant:
        return ["empty answer"]
    if re.search("[\ud800-\udfff]", variant):
        return ["half of a surrogate pair"]
    faults = [f"{fault.kind}: {fault.detail}" for fault in rules.verify_variant(clean, variant, style, row)]
    if style == "other" and not faults:
        kept, found = (Counter(rules.protected_texts(text, row)) for text in (clean, variant))
        faults = [f"changed_protected: {text[:40]!r} is not kept" for text in (kept - found)]
        faults += [f"changed_protected: {text[:40]!r} was added" for text in (found - kept)]
    return faults


# --- the talk with the model


def rephrase(
    rows: Sequence[Any], styles: Sequence[str], client: ChatClient, attempts: int, max_tokens: int, suffix: str
) -> tuple[list[Any], list[dict[str, Any]]]:
    """(rows with the accepted variants added, one log line an answer); the given rows are left as they are."""
    old = {style + suffix for style in styles}
    rows_out = [{k: v for k, v in row.items() if k not in old} if isinstance(row, dict) else row for row in rows]
    log: list[dict[str, Any]] = []
    jobs = make_jobs(rows, styles)
    for _ in range(attempts):
        rejected: list[Job] = []
        replies = client.map(job.request(max_tokens) for job in jobs)
        for job, reply in _progress(zip(jobs, replies, strict=True), len(jobs)):
            variant = read_answer(reply.content, clean_text(job.row))
            reasons = _reasons(job, reply, variant) or _twins(rows_out[job.original_index], variant)
            log.append(_log_line(job, reply, variant, reasons))
            if not reasons:
                rows_out[job.original_index][job.style + suffix] = variant
            elif reply.error is None:
                rejected.append(_next_attempt(job, reply, reasons))
        jobs = rejected
    log.sort(key=lambda line: (line["original_index"], styles.index(line["style"]), line["attempt"]))
    return rows_out, log


def make_jobs(rows: Sequence[Any], styles: Sequence[str]) -> list[Job]:
    """One job for each style of each row with a usable clean prompt."""
    return [
        Job(index, row, style, first_messages(row, style))
        for index, row in enumerate(rows)
        if bad_row(row) is None
        for style in styles
    ]


def _progress(pairs: Iterator[Any], total: int) -> Iterator[Any]:
    from tqdm import tqdm

    return iter(tqdm(pairs, total=total, unit="answer", disable=None))


def _reasons(job: Job, reply: ChatReply, variant: str) -> list[str]:
    if reply.error is not None:
        return [f"request failed: {reply.error}"]
    if reply.finish_reason == "length":
        return ["cut off: the answer is longer than --max_tokens"]
    return reasons_against(job.row, job.style, variant)


def _twins(row: dict[str, Any], variant: str) -> list[str]:
    return [f"duplicate_variant: equals {key!r}" for key, text in row.items() if is_style_key(key) and text == variant]


def _next_attempt(job: Job, reply: ChatReply, reasons: list[str]) -> Job:
    complaint = f"This was rejected: {one_line(reasons[0], 200)}. Try again; reply with the edited prompt alone."
    talk = (*job.messages, ("assistant", reply.content or "(no answer)"), ("user", complaint))
    return Job(job.original_index, job.row, job.style, talk, job.attempt + 1)


def _log_line(job: Job, reply: ChatReply, variant: str, reasons: list[str]) -> dict[str, Any]:
    return {
        "style": job.style,
        "original_index": job.original_index,
        "element_index": job.row.get("element_index", job.original_index + 1),
        "attempt": job.attempt,
        "accepted": not reasons,
        "reason": "; ".join(reasons),
        "model": reply.served_model or "",
        "text": variant,
    }


# --- command line


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__)
    files = parser.add_argument_group("files")
    files.add_argument("--prompt_file", type=Path, required=True, help="prompt file with the clean prompts")
    files.add_argument("--output_file", type=Path, required=True, help="prompt file to write")
    wanted = parser.add_argument_group("variants")
    wanted.add_argument("--model", required=True, help="name of the model on the server")
    wanted.add_argument("--styles", nargs="+", default=["polite", "urgent"], choices=tuple(REQUESTS), metavar="STYLE")
    wanted.add_argument("--suffix", default="_llm", help='added to the style\'s name; "" replaces what stands there')
    wanted.add_argument("--attempts", type=int, default=3, help="answers asked for, at most, for one variant")
    wanted.add_argument("--max_tokens", type=int, default=512, help="tokens of one answer, at most")
    wanted.add_argument("--max_samples", type=int, help="rephrase the first so many rows alone")
    wanted.add_argument("--dry_run", action="store_true", help="tell what would be asked, send nothing")
    add_server_flags(parser)
    args = parser.parse_args(argv)
    for flag in ("attempts", "max_tokens", "max_samples"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            raise UserError(f"--{flag} {getattr(args, flag)}: must be 1 or more")
    if args.output_file.resolve() == args.prompt_file.resolve():
        raise UserError(f"{args.output_file}: is the prompt file itself; choose another --output_file")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Ask, check, write. Returns 1 where requests failed."""
    import pandas as pd

    args = parse_args(argv)
    styles = list(dict.fromkeys(args.styles))
    rows = read_prompt_file(args.prompt_file).rows
    chosen = rows[: args.max_samples]
    client = ChatClient(
        args.model,
        cache_path=_beside(args.output_file, "_replies.jsonl"),
        base_url=args.base_url,
        api_key_env=args.api_key_env,
        max_concurrency=args.max_concurrency,
        max_retries=args.max_retries,
        timeout=args.timeout,
    )
    if args.dry_run:
        get_logger("rephrase").info(str(client.estimate(j.request(args.max_tokens) for j in make_jobs(chosen, styles))))
        return 0
    done, log = rephrase(chosen, styles, client, args.attempts, args.max_tokens, args.suffix)
    write_csv(_beside(args.output_file, "_rephrasings.csv"), pd.DataFrame(log, columns=LOG_COLUMNS))
    write_json(args.output_file, [*done, *rows[len(chosen) :]])
    failed = _tell(log, chosen, styles, args.output_file)
    return 1 if failed else 0


def _beside(output_file: Path, ending: str) -> Path:
    return output_file.with_name(output_file.stem + ending)


def _tell(log: list[dict[str, Any]], rows: Sequence[Any], styles: Sequence[str], output: Path) -> int:
    """Say per style how many were accepted (--verbose: why the rest was not); the number of failed requests."""
    logger, counts = get_logger("rephrase"), []
    for style in styles:
        lines = [line for line in log if line["style"] == style]
        accepted = sum(line["accepted"] for line in lines)
        counts.append(f"{style} {accepted} of {len({line['original_index'] for line in lines})}")
        kinds = Counter(line["reason"].partition(":")[0] for line in lines if not line["accepted"])
        for kind, count in kinds.most_common():
            logger.debug(f"{style}: {count} answers rejected: {kind}")
    for index, row in enumerate(rows):
        if reason := bad_row(row):
            logger.warning(f"row {index + 1} {reason}; it was copied as it is")
    logger.info(f"prompts with an accepted variant: {', '.join(counts)}; wrote {output}")
    return sum(line["reason"].startswith("request failed") for line in log)


if __name__ == "__main__":
    run_main(main)
