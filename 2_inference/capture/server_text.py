"""Text from a server: ask an OpenAI-compatible server for the responses of a run, and keep each as it comes.

Every style's folder has responses.jsonl, to which a response is appended when it arrives. So a killed run asks again
only for what it had not received, and the file is one that --responses_file takes.
"""

from __future__ import annotations

import argparse
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from chat_client import ChatReply, ChatRequest, ReplyCache, append_line, client_of, stored_lines
from command_line import UserError
from given_responses import REASONS, GivenResponse, GivenResponses, RowProblem
from logger import get_logger
from style_names import matched_style
from tqdm import tqdm

from capture.decode import noise_seed
from capture.prompts import PromptReader

RESPONSES = "responses.jsonl"
Asked = tuple[str, int, int]  # style, original index, sample
log = get_logger("attn_act_logi")


class ResponseStore(ReplyCache):
    """The responses in a run's folders: {style: folder}, by (style, original index, sample).

    The tokens that the server counts in a prompt are compared with `lengths`, those that stage 2 reads. A difference in
    the first prompt is a UserError before anything is kept; later ones are in `unlike`. `missing`: what a run needs and
    no folder has; `refused`: why the server gave no response, by (style, original index).
    """

    def __init__(self, folders: dict[str, Path], lengths: dict[tuple[str, int], int], ids: list[Any]) -> None:
        super().__init__(None)
        self.folders, self.lengths, self.element_ids = folders, lengths, ids
        self.unlike: dict[tuple[str, int], int] = {}
        self.uncounted = 0
        self.missing: list[Asked] = []
        self.refused: dict[tuple[str, int], str] = {}
        for style, folder in folders.items():
            for line in stored_lines(folder / RESPONSES):
                try:
                    self._keep(style, json.loads(line))
                except (ValueError, KeyError, TypeError):
                    self.unreadable += bool(line.strip())
        self._same = bool(self._replies)  # a prompt was compared before

    def _keep(self, style: str, row: dict[str, Any]) -> None:
        text, index, sample = row["response"], row["original_index"], row["sample"]
        if row["style"] != style or not isinstance(text, str) or type(index) is not int or type(sample) is not int:
            raise TypeError("not a stored response")
        self._replies[key_of((style, index, sample))] = ChatReply(text, row["finish_reason"], cached=True)

    def put(self, key: str, model: str, reply: ChatReply) -> None:
        """Append a response to the file of its style; it is there when this returns."""
        style, index, sample = json.loads(key)
        with self._lock:
            self._compare(style, index, reply.usage[0])
            row = {"style": style, "original_index": index, "element_index": self.element_ids[index], "sample": sample}
            row |= {"response": reply.content, "finish_reason": reply.finish_reason, "prompt_tokens": reply.usage[0]}
            row |= {"completion_tokens": reply.usage[1], "served_model": reply.served_model, "changed": reply.changed}
            append_line(self.folders[style] / RESPONSES, row)
            self._keep(style, row)

    def _compare(self, style: str, index: int, there: int) -> None:
        here = self.lengths[style, index]
        if not there:
            self.uncounted += 1
        elif there == here:
            self._same = True
        elif self._same:
            self.unlike[style, index] = there
        else:
            raise UserError(
                f"the server counts {there} tokens in the prompt of row {index + 1} of {style}, stage 2 has {here}: "
                "their BOS token or chat template differs, so it would answer another prompt than is captured; give "
                "--send_token_ids (vLLM, SGLang, llama.cpp), or serve the model with the tokenizer of --model_name"
            )

    def given(self, source: str) -> GivenResponses:
        """All that is stored; what the server refused is in it as the reason."""
        found = GivenResponses(source, "")
        for key, reply in self._replies.items():
            reason = REASONS.get(reply.finish_reason or "", "given")
            style, index, sample = json.loads(key)
            found.add(style, index, sample, GivenResponse(str(reply.content), reason))
        for style, index, _ in self.missing:  # a response counts if all of its samples are there
            found.texts.get(style, {}).pop(index, None)
        for (style, index), why in self.refused.items():
            found.refuse(RowProblem("unanswered", f"row {index + 1} of {style}", why), (style, index))
        return found


def key_of(asked: Asked) -> str:
    """The name under which a response is kept."""
    return json.dumps(asked)


def stored_responses(args: argparse.Namespace, jobs: list[Any], reader: PromptReader) -> ResponseStore:
    """The responses in the folders of a run, and which are missing for the rest of it. jobs: `StyleJob`s."""
    # 1. What is needed: the prompts that are left, and the clean form's where it is scored after them.
    clean = next((job for job in jobs if job.style.style == reader.file.clean_key), None)
    rows_of_clean = {index for index, _ in clean.style.texts} if clean and args.response_logprobs else set()
    needed: dict[Asked, None] = {}
    for job in jobs:
        for index in (job.style.texts[p][0] for positions in job.files for p in job.left(positions)):
            names = [job.style.style, *([reader.file.clean_key] if index in rows_of_clean else [])]
            needed |= {(str(name), index, sample): None for name in names for sample in range(args.num_samples)}

    # 2. What of it is not stored.
    lengths = {
        (job.style.style, index): length
        for job in jobs
        for (index, _), length in zip(job.style.texts, job.style.lengths, strict=True)
    }
    ids = [reader.element(index) for index in range(len(reader.file.rows))]
    store = ResponseStore({job.style.style: job.folder for job in jobs}, lengths, ids)
    store.missing = [asked for asked in needed if store.get(key_of(asked)) is None]
    log.info(f"{args.output_dir}: {len(needed) - len(store.missing)} of {len(needed)} responses are stored")
    return store


def ask_server(args: argparse.Namespace, reader: PromptReader, store: ResponseStore, stop: threading.Event) -> None:
    """Ask for every response that is missing; `stop`: ask no more.

    Raises UserError for what would fail every request, and if the server reads the first prompt as other tokens.
    """
    client = client_of(args, args.server_model or args.model_name, store)

    def requests() -> Iterator[ChatRequest]:
        for asked in store.missing:
            if stop.is_set():
                return
            yield request_of(args, reader, asked)

    with tqdm(total=len(store.missing), desc="responses", unit="prompt", smoothing=0, dynamic_ncols=True) as bar:
        for (style, index, _), reply in zip(store.missing, client.map(requests()), strict=False):
            bar.update()
            if reply.error is not None:
                store.refused[style, index] = reply.error
    store.missing = [asked for asked in store.missing if store.get(key_of(asked)) is None]
    _report(store, client.base_url)


def request_of(args: argparse.Namespace, reader: PromptReader, asked: Asked) -> ChatRequest:
    """The request for a response: a text that is continued, the turns of a chat, or the prompt's own token ids.

    A control `split@<style>` is token ids always, because it is no text's tokens.
    """
    style, index, sample = asked
    sampled, how = args.temperature > 0, reader.rendering
    extra = [("repetition_penalty", args.repetition_penalty)] if args.repetition_penalty != 1.0 else []
    extra += [("top_k", args.top_k)] if sampled and args.top_k else []
    options: dict[str, Any] = {
        "max_tokens": args.max_new_tokens,
        "temperature": args.temperature,
        "top_p": args.top_p if sampled else 1.0,
        "seed": noise_seed(args.seed, index, sample, 0) & 0x7FFFFFFF if sampled else None,
        "stop": tuple(args.stop_strings),
        "extra": tuple(extra),
        "name": key_of(asked),
    }
    rendered, ids, text = reader.as_read(style, index)
    if args.send_token_ids or matched_style(style):
        return ChatRequest((), prompt=tuple(ids), **options)
    if not how.apply_chat_template:
        return ChatRequest((), prompt=rendered.text, **options)
    return ChatRequest.of(how.few_shot + text, how.system_prompt, **options)


def _report(store: ResponseStore, url: str) -> None:
    if store.uncounted:
        log.warning(f"{url}: reports no number of prompt tokens, so its BOS token and template are not checked")
    if store.unlike:
        (style, index), there = next(iter(store.unlike.items()))
        log.warning(
            f"{url}: counts other tokens in {len(store.unlike)} prompts (row {index + 1} of {style}: {there}, not "
            f"{store.lengths[style, index]}); are control tokens in their text? --send_token_ids sends exactly ours"
        )
