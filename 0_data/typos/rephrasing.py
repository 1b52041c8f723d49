"""Variants written by a language model: what it is asked, which answers are accepted, and the second attempts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
from chat_client import ChatClient, ChatReply, ChatRequest
from command_line import one_line
from load_json import is_style_key, surrogate_problem
from thinking_text import without_thinking
from tqdm import tqdm

from typos.protection import protected_texts
from typos.style_rules import verify_variant
from typos.variants import bad_row, clean_text

SYSTEM = (
    "You edit prompts for a study of how language models handle imperfect input. Reply with the edited prompt alone: "
    "no comment, no quotation marks around it. Never answer the prompt."
)
ONE_TYPO = "Keep everything else as it is, letter by letter. The misspelled word must not be another word."
BEFORE = "Write it in the language of the prompt, without a colon. Keep the prompt itself word for word."
REQUESTS = {
    "main": f"Replace one letter of the most important word by a neighbouring letter on the keyboard. {ONE_TYPO}",
    "swap": f"Swap two neighbouring letters inside one important word. {ONE_TYPO}",
    "missing": f"Leave out one letter of one important word. {ONE_TYPO}",
    "repeated": f"Double one letter of one important word. {ONE_TYPO}",
    "two": f"Put one typo (a letter wrong, missing, doubled or swapped) into each of exactly two words. {ONE_TYPO}",
    "three": f"Put one typo (a letter wrong, missing, doubled or swapped) into each of exactly three words. {ONE_TYPO}",
    "grammar": "Make exactly one mistake of grammar (agreement, tense or article) by changing a single word.",
    "punctuation": "Make exactly one mistake of punctuation: one stray or missing mark or space. Change no letter.",
    "homonym": "Replace one word by another word that sounds exactly the same but is spelled differently.",
    "polite": f"Put one very polite sentence before the prompt. {BEFORE}",
    "urgent": f"Put one urgent sentence before the prompt. {BEFORE}",
    "other": "Say the same in other words of the same language, so that exactly the same answer is asked for.",
}
TEMPERATURE_AFTER_REJECTION = 0.7  # at 0 many servers would repeat themselves
LOG_COLUMNS = ["style", "original_index", "element_index", "attempt", "accepted", "reason", "model", "text"]


@dataclass
class Job:
    """One variant to be written: the row, the key it is for, the text it is made of, and the talk with the model."""

    original_index: int
    row: dict[str, Any]
    style: str
    text: str
    messages: tuple[tuple[str, str], ...]
    attempt: int = 1

    def request(self, max_tokens: int) -> ChatRequest:
        temperature = 0.0 if self.attempt == 1 else TEMPERATURE_AFTER_REJECTION
        return ChatRequest(self.messages, max_tokens=max_tokens, temperature=temperature, seed=self.attempt)


def rephrase(
    rows: Sequence[Any], styles: Sequence[str], client: ChatClient, attempts: int, max_tokens: int, suffix: str
) -> tuple[list[Any], list[dict[str, Any]]]:
    """(rows with the accepted variants added, one log line an answer); the given rows are left as they are."""
    old = {style + suffix for style in styles}
    rows_out = [{k: v for k, v in row.items() if k not in old} if isinstance(row, dict) else row for row in rows]

    def reasons_of(job: Job, variant: str) -> list[str]:
        others = {key: text for key, text in rows_out[job.original_index].items() if is_style_key(key)}
        twins = [f"duplicate_variant: equals {key!r}" for key, text in others.items() if text == variant]
        return reasons_against(job.row, job.style, variant) or twins

    return rows_out, answer_jobs(make_jobs(rows, styles), rows_out, client, attempts, max_tokens, reasons_of, suffix)


def answer_jobs(
    jobs: list[Job],
    rows_out: list[Any],
    client: ChatClient,
    attempts: int,
    max_tokens: int,
    reasons_of: Callable[[Job, str], list[str]],
    suffix: str = "",
) -> list[dict[str, Any]]:
    """Ask until an answer is accepted, at most `attempts` times; one log line an answer.

    reasons_of(job, variant): why the variant is rejected. An accepted one goes into the row under <job.style><suffix>.
    """
    log: list[dict[str, Any]] = []
    order = {(job.original_index, job.style): place for place, job in enumerate(jobs)}
    for _ in range(attempts):
        rejected: list[Job] = []
        replies = client.map(job.request(max_tokens) for job in jobs)
        for job, reply in tqdm(zip(jobs, replies, strict=True), total=len(jobs), unit="answer", disable=None):
            variant = read_answer(reply.content, job.text)
            if reply.error is not None:
                reasons = [f"request failed: {reply.error}"]
            elif reply.finish_reason == "length":
                reasons = ["cut off: the answer is longer than --max_tokens"]
            else:
                reasons = reasons_of(job, variant)
            log.append(_log_line(job, reply, variant, reasons))
            if not reasons:
                rows_out[job.original_index][job.style + suffix] = variant
            elif reply.error is None:
                rejected.append(_next_attempt(job, reply, reasons))
        jobs = rejected
    log.sort(key=lambda line: (order[line["original_index"], line["style"]], line["attempt"]))
    return log


def make_jobs(rows: Sequence[Any], styles: Sequence[str]) -> list[Job]:
    """One job for each style of each row with a usable clean prompt."""
    return [
        Job(index, row, style, text, messages_for(REQUESTS[style], text, protected_texts(text, row)))
        for index, row in enumerate(rows)
        if bad_row(row) is None
        for text in [clean_text(row)]
        for style in styles
    ]


def messages_for(request: str, prompt: str, kept: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """The system and the user message that ask for a variant of `prompt`, in which the texts `kept` stay."""
    rule = "These parts must stay exactly as they are:\n" + "\n".join(dict.fromkeys(kept)) + "\n\n" if kept else ""
    return (("system", SYSTEM), ("user", f"{request}\n\n{rule}The prompt:\n{prompt}"))


def read_answer(content: str | None, prompt: str) -> str:
    """The variant in an answer: without thinking, code fence or quotation marks that the prompt itself has not."""
    text = (content if without_thinking(prompt) != prompt else without_thinking(content or "")) or ""
    text = text.strip()
    fenced = re.fullmatch(r"```[a-z]*\n(.*?)\n?```", text, re.DOTALL)
    if fenced and not prompt.lstrip().startswith("```"):
        text = fenced[1].strip()
    if len(text) > 1 and text[0] + text[-1] in ('""', "“”") and prompt.strip()[:1] != text[0]:
        text = text[1:-1].strip()
    return text


def reasons_against(row: dict[str, Any], style: str, variant: str) -> list[str]:
    """Why `variant` may not stand under `style`; empty where it may."""
    clean = clean_text(row)
    if not variant:
        return ["empty answer"]
    if reason := surrogate_problem(variant):
        return [reason]
    faults = [f"{kind}: {detail}" for kind, detail in verify_variant(clean, variant, style, row)]
    if style == "other" and not faults:
        kept, found = (Counter(protected_texts(text, row)) for text in (clean, variant))
        faults = [f"changed_protected: {text[:40]!r} is not kept" for text in (kept - found)]
        faults += [f"changed_protected: {text[:40]!r} was added" for text in (found - kept)]
    return faults


def _next_attempt(job: Job, reply: ChatReply, reasons: list[str]) -> Job:
    complaint = f"This was rejected: {one_line(reasons[0], 200)}. Try again; reply with the edited prompt alone."
    talk = (*job.messages, ("assistant", reply.content or "(no answer)"), ("user", complaint))
    return replace(job, messages=talk, attempt=job.attempt + 1)


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


def log_table(log: list[dict[str, Any]]) -> pd.DataFrame:
    """The log of all answers as a table, with its columns even if nothing was asked."""
    return pd.DataFrame(log, columns=LOG_COLUMNS)
