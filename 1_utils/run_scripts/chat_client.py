"""Ask an OpenAI-compatible server many questions: retries, bounded concurrency, an append-only cache, dry runs.

    client = ChatClient("gpt-4o", cache_path="results/demo/judge_cache.jsonl", base_url=None)
    for reply in client.map(ChatRequest.of("Say A or B.", max_tokens=5) for _ in range(3)):
        print(reply.content, reply.error)

The key comes from an environment variable (default OPENAI_API_KEY) and from nowhere else; it goes into the
Authorization header alone, never into the cache, a log or an error. Every answer is appended to the cache before it is
handed out, so a killed run asks again only for what it had not received. One cache line:
{"key": sha256 of the request, "model": …, "served_model": …, "content": …, "finish_reason": …, "usage": [in, out],
"changed": what was left out because the server refuses it}. The request's hash covers server, model, messages,
sampling and schema.

Servers differ in what they take. If a refusal (400, 422 …) names temperature, seed, the limit of tokens, the schema or
the system role, the request is sent again without it. What helped is left out of all later requests of the run.
"""

from __future__ import annotations

import argparse
import email.utils
import fcntl
import hashlib
import json
import logging
import os
import re
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from command_line import UserError, one_line
from logger import get_logger

OPENAI_BASE_URL = "https://api.openai.com/v1"
BYTES_PER_TOKEN = 4  # English text; an estimate for dry runs, not a tokenizer
TOKENS_PER_MESSAGE = 4
FAILURES_IN_A_ROW = 10


@dataclass(frozen=True)
class ChatRequest:
    """One question. `json_schema` ({"name": …, "schema": …}) asks for an answer of that form; `seed` also
    distinguishes several samples of one question. `prompt`, a text or token ids, is continued as it is, in place of
    messages. `extra`: parameters that OpenAI does not have. `name`: what the answer is kept under, if not the hash."""

    messages: tuple[tuple[str, str], ...]  # (role, content)
    max_tokens: int = 512
    temperature: float = 0.0
    seed: int | None = None
    json_schema: dict[str, Any] | None = field(default=None, hash=False)
    prompt: str | tuple[int, ...] | None = None
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    extra: tuple[tuple[str, float], ...] = ()
    name: str | None = None

    @classmethod
    def of(cls, user: str, system: str | None = None, **options: Any) -> ChatRequest:
        """A request of one user message, after a system message where one is given."""
        start = (("system", system),) if system else ()
        return cls((*start, ("user", user)), **options)

    def parameters(self) -> dict[str, Any]:
        """Keyword arguments of `chat.completions.create` or `completions.create`, without the model."""
        wanted: dict[str, Any] = {"max_tokens": self.max_tokens, "temperature": self.temperature}
        if self.prompt is None:
            # Half a surrogate pair cannot be sent.
            wanted["messages"] = [
                {"role": role, "content": text.encode("utf-8", "replace").decode()} for role, text in self.messages
            ]
        else:
            wanted["prompt"] = self.prompt if isinstance(self.prompt, str) else [*self.prompt]
        wanted |= {"top_p": self.top_p} if self.top_p != 1.0 else {}
        wanted |= {"stop": [*self.stop]} if self.stop else {}
        wanted |= {"extra_body": dict(self.extra)} if self.extra else {}
        if self.seed is not None:
            wanted["seed"] = self.seed
        if self.json_schema is not None:
            wanted["response_format"] = {"type": "json_schema", "json_schema": {"strict": True, **self.json_schema}}
        return wanted


@dataclass(frozen=True)
class ChatReply:
    """An answer, or `error` in one line and no content. `changed` names what the server refused and was left out."""

    content: str | None
    finish_reason: str | None = None
    usage: tuple[int, int] = (0, 0)  # prompt tokens, completion tokens, as the server counts them
    served_model: str | None = None
    changed: tuple[str, ...] = ()
    cached: bool = False
    error: str | None = None


# --- cache


class ReplyCache:
    """Replies by request hash in a JSONL file that is only ever appended to. Safe for several threads and processes.

    A line that cannot be read (the torn last line of a killed run) is left where it is, counted in `unreadable`, and
    its question is asked again. Without a path nothing is kept on disk.
    """

    def __init__(self, path: str | Path | None) -> None:
        self.path = Path(path) if path is not None else None
        self.unreadable = 0
        self._lock = threading.Lock()
        self._replies: dict[str, ChatReply] = {}
        for line in stored_lines(self.path) if self.path is not None else []:
            try:
                record = json.loads(line)
                self._replies[record["key"]] = _cached_reply(record)
            except (ValueError, KeyError, TypeError, IndexError):
                self.unreadable += bool(line.strip())

    def get(self, key: str) -> ChatReply | None:
        """The reply kept under `key`, or None."""
        return self._replies.get(key)

    def put(self, key: str, model: str, reply: ChatReply) -> None:
        """Append a reply; it is in the file when this returns. UserError if the disk refuses."""
        kept = {name: getattr(reply, name) for name in ("content", "finish_reason", "usage", "served_model", "changed")}
        with self._lock:
            self._replies[key] = _cached_reply(kept)
            if self.path is None:
                return
            append_line(self.path, {"key": key, "model": model, **kept})


def stored_lines(path: Path) -> list[bytes]:
    """The lines of a cache; none if it is not there. Raises UserError if it cannot be read."""
    try:
        return path.read_bytes().split(b"\n") if path.exists() else []
    except OSError as error:
        raise UserError(f"{path}: the cache cannot be read: {error.strerror}") from None


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Append a record to a JSONL file; it is in the file when this returns. Raises UserError if the disk refuses."""
    line = json.dumps(record).encode() + b"\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab+") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            if handle.seek(0, os.SEEK_END):
                handle.seek(-1, os.SEEK_END)
                if handle.read(1) != b"\n":  # a torn line must not swallow this one
                    line = b"\n" + line
            handle.write(line)
    except OSError as error:
        raise UserError(f"cannot write the cache {path}: {error.strerror}; free space or move it") from None


def _cached_reply(record: dict[str, Any]) -> ChatReply:
    if not isinstance(record["content"], str | None):
        raise TypeError("content is not text")
    tokens_in, tokens_out = map(int, record.get("usage") or (0, 0))
    return ChatReply(
        record["content"],
        record.get("finish_reason"),
        (tokens_in, tokens_out),
        record.get("served_model"),
        tuple(record.get("changed") or ()),
        cached=True,
    )


# --- client


class ChatClient:
    """A server, a model and a cache (its path, or the cache itself).

    base_url: default OPENAI_BASE_URL from the environment, else OpenAI. api_key_env: name of the variable that holds
    the key; a server other than OpenAI's may do without. max_retries: of requests answered with 408, 409, 429, 5xx (as
    the status, or in the body of a 200), with a broken body, or not at all; Retry-After is obeyed up to two minutes,
    otherwise the pause doubles from 0.5 s to 8 s. The first request goes out alone, to learn what the server refuses.
    Raises UserError for a missing or malformed key or address.
    """

    def __init__(
        self,
        model: str,
        cache_path: str | Path | ReplyCache | None = None,
        base_url: str | None = None,
        api_key_env: str = "OPENAI_API_KEY",
        max_concurrency: int = 8,
        max_retries: int = 6,
        timeout: float = 120.0,
    ) -> None:
        self.model = model
        self.base_url = _checked_url(base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI_BASE_URL)
        self.cache = cache_path if isinstance(cache_path, ReplyCache) else ReplyCache(cache_path)
        self.refused: tuple[str, ...] = ()  # what this server was found to refuse
        self.changed: tuple[str, ...] = ()  # what was left out for any answer handed out, cached ones included
        self._api_key_env = api_key_env
        self._concurrency = max(1, max_concurrency)
        self._max_retries = max_retries
        self._timeout = timeout
        self._secret = ""
        self._client: Any = None
        self._lock = threading.Lock()
        self._has_asked = False
        self._logger = get_logger()
        if self.cache.unreadable:
            where = self.cache.path or "stored responses"
            self._logger.warning("%s: %d unreadable lines; asking again", where, self.cache.unreadable)

    def key(self, request: ChatRequest) -> str:
        """Name or hash under which the answer to `request` is kept."""
        if request.name is not None:
            return request.name
        asked = [self.base_url, self.model, request.parameters()]
        return hashlib.sha256(json.dumps(asked, sort_keys=True, ensure_ascii=True).encode()).hexdigest()

    def complete(self, request: ChatRequest) -> ChatReply:
        """Answer to one request, from the cache or the server. A request that fails alone comes back with `error`.

        Raises UserError for what would fail every request: wrong key, unknown model, no server, no quota, or a
        server that asks for a pause of more than two minutes.
        """
        key = self.key(request)
        reply = self.cache.get(key)
        if reply is None:
            reply = self._ask(request)
            self._has_asked = True
            if reply.error is None:
                self.cache.put(key, self.model, reply)
        with self._lock:
            self.changed = _union(self.changed, reply.changed)
        return reply

    def map(self, requests: Iterable[ChatRequest]) -> Iterator[ChatReply]:
        """Replies in the order of the requests, `max_concurrency` at a time; requests are read as they are needed.

        Raises UserError as `complete` does, and after 10 failures in a row.
        """
        failures = 0
        pool = ThreadPoolExecutor(self._concurrency, thread_name_prefix="chat")
        waiting: deque[Future[ChatReply]] = deque()
        try:
            for request in chain(requests, [None]):  # None: no more requests
                if request is not None:
                    waiting.append(pool.submit(self.complete, request))
                while waiting and (request is None or not self._has_asked or len(waiting) >= 2 * self._concurrency):
                    reply = waiting.popleft().result()
                    failures = 0 if reply.error is None else failures + 1
                    if failures >= FAILURES_IN_A_ROW:
                        raise UserError(
                            f"{self.base_url}: {failures} requests in a row failed, the last with: {reply.error}"
                        )
                    yield reply
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def estimate(self, requests: Iterable[ChatRequest]) -> str:
        """What `map` would cost, in words: calls, answers in the cache, tokens. Nothing is sent, no key is needed."""
        cached = prompt_tokens = completion_tokens = 0
        calls: set[str] = set()
        for request in requests:
            key = self.key(request)
            if key in calls or self.cache.get(key) is not None:
                cached += 1
                continue
            calls.add(key)
            size = sum(len(text.encode("utf-8", "replace")) for _, text in request.messages)
            size += len(json.dumps(request.json_schema)) if request.json_schema else 0
            prompt_tokens += size // BYTES_PER_TOKEN + TOKENS_PER_MESSAGE * len(request.messages)
            completion_tokens += request.max_tokens
        return (
            f"{len(calls):,} calls to make ({cached:,} answers are in the cache): about {prompt_tokens:,} prompt "
            f"tokens (at {BYTES_PER_TOKEN} bytes a token) and at most {completion_tokens:,} completion tokens"
        )

    # --- one call

    def _ask(self, request: ChatRequest) -> ChatReply:
        """The server's reply. What it refuses is left out, and a broken answer is asked for again.

        The openai library itself tries again after errors with a status of their own and broken connections.
        """
        import openai  # half a second, which --help and --dry_run do without

        if self._client is None:
            self._secret = self._read_key()
            self._client = openai.OpenAI(
                api_key=self._secret or "none",
                base_url=self.base_url,
                max_retries=self._max_retries,
                timeout=self._timeout,
            )
        left_out = certain = self.refused
        named: list[str] = []
        ways: Iterator[tuple[str, ...]] = iter(())
        failures = 0
        while True:
            try:
                sent = _without(request.parameters(), left_out)
                completions = self._client.chat.completions if request.prompt is None else self._client.completions
                answer = completions.create(model=self.model, **sent)
                reply = _reply_of(answer, left_out, self._secret)
                self._remember(left_out)
                return reply
            except (openai.APIStatusError, _ServerError) as caught:
                error = (
                    caught
                    if isinstance(caught, _ServerError)
                    else _ServerError(caught.body or caught.message, caught.status_code, caught.response.headers)
                )
                names = error.refused_of(request)
                if names != named:  # something new is refused, so what was left out last has helped
                    named, certain, ways = names, left_out, _ways_without(names, left_out)
                if names and (way := next(ways, None)) is not None:
                    left_out = _union(certain, way)
                    continue
                failures += 1
                if not error.is_transient or failures > self._max_retries:
                    self._stop_if_all_would_fail(error)
                    return ChatReply(None, error=self._safe(str(error)))
            except openai.APITimeoutError:
                return ChatReply(None, error=f"no answer within {self._timeout:g} s")
            except openai.APIConnectionError as error:
                why = self._safe(str(error.__cause__ or error))
                raise UserError(f"{self.base_url}: no connection ({why}); check --base_url and the network") from None
            except (ValueError, openai.APIResponseValidationError):  # the body is not JSON, or not a completion
                failures += 1
                if failures > self._max_retries:
                    return ChatReply(None, error=f"the server sent {failures} broken answers")
            except openai.OpenAIError as error:
                return ChatReply(None, error=self._safe(f"{type(error).__name__}: {error}"))
            time.sleep(min(8.0, 0.5 * 2 ** (failures - 1)))

    def _remember(self, left_out: tuple[str, ...]) -> None:
        with self._lock:
            new = [name for name in left_out if name not in self.refused]
            self.refused = _union(self.refused, left_out)
        for name in new:
            level = logging.WARNING if name == "temperature" else logging.INFO
            self._logger.log(level, "%s: refuses %s; %s", self.base_url, *_INSTEAD[name])

    def _read_key(self) -> str:
        key = os.environ.get(self._api_key_env, "").strip()
        if not key and self.base_url.startswith(OPENAI_BASE_URL):
            raise UserError(f"no API key: set the environment variable {self._api_key_env}, or give --base_url")
        if any(not "!" <= character <= "~" for character in key):  # an HTTP library would quote the key in its error
            raise UserError(f"the environment variable {self._api_key_env} holds no valid key: it has spaces in it")
        return key

    def _stop_if_all_would_fail(self, error: _ServerError) -> None:
        why = self._safe(error.text)
        if error.status in (401, 403):  # the server's own words may hold a part of the key
            why = f"the key in {self._api_key_env} is refused (HTTP {error.status})"
        elif error.status == 404:
            why = f"model {self.model!r} or the address is unknown there ({why})"
        elif error.status == 429:
            why = _pause_asked(error.headers.get("retry-after")) or f"refuses more: {why}"
            why += "; run the same command again later, what was answered is kept"
        else:
            return
        raise UserError(f"{self.base_url}: {why}") from None

    def _safe(self, text: str) -> str:
        return one_line(text.replace(self._secret, "[key]") if self._secret else text, 200)


def add_server_flags(
    parser: argparse.ArgumentParser, default: str = "default: OPENAI_BASE_URL from the environment, or OpenAI"
) -> argparse._ArgumentGroup:
    """The flags that every script with a server has; returns their group. default: what is done without --base_url."""
    group = parser.add_argument_group("server (OpenAI or any compatible one)")
    group.add_argument("--base_url", help=f"address up to /v1; {default}")
    group.add_argument("--api_key_env", default="OPENAI_API_KEY", help="environment variable that holds the key")
    group.add_argument("--max_concurrency", type=int, default=8, help="requests at the same time")
    group.add_argument("--max_retries", type=int, default=6, help="retries of a request")
    group.add_argument("--timeout", type=float, default=120.0, help="seconds to wait for one answer")
    return group


def client_of(args: argparse.Namespace, model: str, cache_path: Path | ReplyCache) -> ChatClient:
    """The client that the flags of `add_server_flags` describe."""
    server = (args.base_url, args.api_key_env, args.max_concurrency, args.max_retries, args.timeout)
    return ChatClient(model, cache_path, *server)


# --- requests as servers take them

# How a refusal names what it refuses. A limit of tokens that does not fit this one prompt is no refusal of the limit.
_NAMED = {
    "response_format": re.compile(
        r"response.?format|\bjson|\bschemas?\b|\bstrict\b|structured|grammar|guided|additional.?properties",
        re.I,
    ),
    "max_tokens": re.compile(r"max\w*[ .-]?tokens|maxtokens|num_predict|max_length", re.I),
    "temperature": re.compile(r"temperature|\bsampling\b", re.I),
    "seed": re.compile(r"(\b|_)seed\b", re.I),
    "system": re.compile(
        r"\broles?\b|\bsystem\b(?! (error|failure|fault|is (busy|over)))|developer.(role|message|prompt|instruction)"
        r"|(start|begin|first).{0,30}\buser\b",
        re.I,
    ),
}
_PROMPT_TOO_LONG = re.compile(
    r"input tokens|prompt tokens|in the messages|your (prompt|messages|input)|requested \d+ tokens|reduce the length",
    re.I,
)
_INSTEAD = {
    "response_format": ("a schema (response_format)", "answers are asked for in plain text and read strictly"),
    "max_tokens": ("max_tokens", "max_completion_tokens is sent instead"),
    "max_completion_tokens": ("any limit of tokens", "none is sent"),
    "temperature": ("temperature", "the server's own is used: ANSWERS ARE SAMPLED, a repeated run would differ"),
    "seed": ("seed", "none is sent"),
    "system": ("the system role", "its text is put before the user's"),
}
_ADAPTABLE = (None, 400, 404, 422, 500, 501)
_TRANSIENT = re.compile(r"overload|time.?out|timed out|rate.?limit|temporar|unavailable|try again|busy|capacity", re.I)


class _ServerError(Exception):
    """An error that the server reports: as a status, or in the body of a 200 (without headers)."""

    def __init__(self, body: Any, status: int | None, headers: Mapping[str, str] | None = None) -> None:
        self.status, self.headers = status, headers or {}
        self.text = one_line(_texts(body), 2000)
        self.fields = _texts(body, keys=("param", "loc"))
        # The library has tried again what came with a status of its own.
        again = status in (408, 409, 429) or (status or 0) >= 500 or (status is None and _TRANSIENT.search(self.text))
        self.is_transient = headers is None and bool(again)
        super().__init__(f"HTTP {status}: {self.text}" if status else f"the server's error: {self.text}")

    def refused_of(self, request: ChatRequest) -> list[str]:
        """What the error names of a request's fields and its system role, in the order in which it names them."""
        if self.status not in _ADAPTABLE:
            return []
        fields = {*request.parameters()} | {role for role, _ in request.messages}
        patterns = {name: pattern for name, pattern in _NAMED.items() if name in fields}
        if _PROMPT_TOO_LONG.search(self.text):
            patterns.pop("max_tokens")
        for text in (self.fields, self.text):
            if found := {name: match.start() for name, pattern in patterns.items() if (match := pattern.search(text))}:
                return sorted(found, key=lambda name: found[name])
        return []


def _texts(body: Any, keys: tuple[str, ...] = ()) -> str:
    """All texts of an error body, or those under `keys`, without what it repeats of the request."""
    if isinstance(body, str):
        return "" if keys else body
    if isinstance(body, Mapping):
        parts = [_texts(value, () if name in keys else keys) for name, value in body.items() if name not in _REPEATED]
    else:
        parts = [_texts(value, keys) for value in body] if isinstance(body, list | tuple) else []
    return " ".join(part for part in parts if part)


_REPEATED = ("input", "ctx", "url", "type", "object", "id", "request_id", "trace_id")


def _ways_without(names: list[str], left_out: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """What to leave out next. A refusal that names several fields may mean any of them: each alone, then all."""
    more = {"max_tokens": [("max_tokens",), ("max_tokens", "max_completion_tokens")]}
    ways = [[way for way in more.get(name, [(name,)]) if not {*way} <= {*left_out}] for name in names]
    ways = [way for way in ways if way]
    together = [sum((way[0] for way in ways), ()), sum((way[-1] for way in ways), ())] if len(names) > 1 else []
    return iter(dict.fromkeys([*chain(*ways), *together]))


def _union(one: tuple[str, ...], other: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(one + other))


def _without(parameters: dict[str, Any], left_out: tuple[str, ...]) -> dict[str, Any]:
    sent = {name: value for name, value in parameters.items() if name not in left_out}
    if "max_tokens" in left_out and "max_completion_tokens" not in left_out:
        sent["max_completion_tokens"] = parameters["max_tokens"]
    first, *rest = parameters.get("messages", [None])
    if "system" in left_out and first and first["role"] == "system" and rest:
        text = f"{first['content']}\n\n{rest[0]['content']}"
        sent["messages"] = [{**rest[0], "content": text}, *rest[1:]]
    return sent


def _pause_asked(retry_after: str | None) -> str:
    """What a Retry-After header asks for, in words; "" for none, one in the past or one that cannot be read."""
    try:
        seconds = float(retry_after or 0)
        return f"asks to wait {seconds:.0f} s" if 0 < seconds < 1e9 else ""
    except ValueError:
        try:
            date = email.utils.parsedate_to_datetime(str(retry_after))
            return f"asks to wait until {retry_after}" if date.timestamp() > time.time() else ""
        except (ValueError, TypeError, OverflowError):
            return ""


def _reply_of(answer: Any, left_out: tuple[str, ...], secret: str) -> ChatReply:
    """The reply in a 200. Raises _ServerError for an error in its body, ValueError if it is not a completion."""
    if not hasattr(answer, "to_dict"):
        raise ValueError("not JSON")
    body = answer.to_dict(warnings=False)
    choices = body.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
    error = body.get("error") or choice.get("error")
    if not choice and not error and any(name in body for name in ("message", "detail")):
        error = body
    if error:
        code = error.get("code", error.get("status")) if isinstance(error, dict) else None
        raise _ServerError(error, int(str(code)) if re.fullmatch(r"[45]\d\d", str(code)) else None)
    message = choice.get("message", {"content": choice["text"]} if "text" in choice else None)
    if not isinstance(message, dict):
        raise ValueError("no choices")
    content = message.get("content")
    if isinstance(content, list):  # what a model thinks aloud is in parts of other types
        parts = [part for part in content if isinstance(part, dict) and part.get("type") in ("text", "output_text")]
        content = "".join(str(part["text"]) for part in parts if "text" in part) if parts else None
    reason = choice.get("finish_reason")
    if content is None:
        more = "; raise the limit of tokens" if reason == "length" else ""
        raise _ServerError(message.get("refusal") or f"an answer without text (it ended by {reason}{more})", None)
    if not isinstance(content, str):
        raise ValueError("content is not text")
    usage = body["usage"] if isinstance(body.get("usage"), dict) else {}
    counts = (usage.get("prompt_tokens") or 0, usage.get("completion_tokens") or 0)
    if secret:  # a server that echoes its headers must not put the key into the cache
        content = content.replace(secret, "[key]")
    return ChatReply(content, reason, counts, body.get("model"), left_out)


def _checked_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError("--base_url is not an address; give one such as http://localhost:8000/v1")
    if parts.username or parts.password or parts.query:
        raise UserError("--base_url holds a user name, password or query; give the key by environment variable")
    return url.rstrip("/")
