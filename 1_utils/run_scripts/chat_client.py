"""Ask an OpenAI-compatible chat server many questions: retries, bounded concurrency, an append-only cache, dry runs.

    client = ChatClient("gpt-4o", cache_path="results/demo/judge_cache.jsonl", base_url=None)
    for reply in client.map(ChatRequest.of("Say A or B.", max_tokens=5) for _ in range(3)):
        print(reply.content, reply.error)

The key comes from an environment variable (default OPENAI_API_KEY) and from nowhere else; it goes into the
Authorization header alone, never into the cache, a log or an error. Every answer is appended to the cache before it is
handed out, so a killed run asks again only for what it had not received. One cache line:
{"key": sha256 of the request, "model": …, "served_model": …, "content": …, "finish_reason": …, "usage": [in, out],
"changed": what the server made us change}. The request's hash covers server, model, messages, sampling and schema.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
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
    """One question. `json_schema` ({"name": …, "schema": …}) asks for an answer of that form; `seed` also tells
    several samples of one question apart."""

    messages: tuple[tuple[str, str], ...]  # (role, content)
    max_tokens: int = 512
    temperature: float = 0.0
    seed: int | None = None
    json_schema: dict[str, Any] | None = field(default=None, hash=False)

    @classmethod
    def of(cls, user: str, system: str | None = None, **options: Any) -> ChatRequest:
        """A request of one user message, after a system message where one is given."""
        start = (("system", system),) if system else ()
        return cls((*start, ("user", user)), **options)

    def parameters(self) -> dict[str, Any]:
        """Keyword arguments of `chat.completions.create`, without the model."""
        wanted: dict[str, Any] = {
            "messages": [{"role": role, "content": _sendable(content)} for role, content in self.messages],
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
        }
        if self.seed is not None:
            wanted["seed"] = self.seed
        if self.json_schema is not None:
            wanted["response_format"] = {"type": "json_schema", "json_schema": {"strict": True, **self.json_schema}}
        return wanted


@dataclass(frozen=True)
class ChatReply:
    """An answer, or `error` in one line and no content. `changed` names what was sent otherwise than asked for."""

    content: str | None
    finish_reason: str | None = None
    usage: tuple[int, int] = (0, 0)  # prompt tokens, completion tokens, as the server counts them
    served_model: str | None = None
    changed: tuple[str, ...] = ()
    cached: bool = False
    error: str | None = None


@dataclass(frozen=True)
class CallEstimate:
    """What a run would cost: calls still to make, answers already in the cache, tokens of the calls to make."""

    calls: int
    cached: int
    prompt_tokens: int
    max_completion_tokens: int

    def __str__(self) -> str:
        return (
            f"{self.calls:,} calls to make ({self.cached:,} answers are in the cache): about {self.prompt_tokens:,} "
            f"prompt tokens (at {BYTES_PER_TOKEN} bytes a token) and at most {self.max_completion_tokens:,} "
            "completion tokens"
        )


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
        if self.path is not None and self.path.exists():
            self._read(self.path)

    def get(self, key: str) -> ChatReply | None:
        """The reply kept under `key`, or None."""
        return self._replies.get(key)

    def put(self, key: str, model: str, reply: ChatReply) -> None:
        """Append a reply; it is in the file when this returns. UserError where the disk refuses."""
        kept = {name: getattr(reply, name) for name in _KEPT}
        with self._lock:
            self._replies[key] = _as_cached(kept)
            if self.path is not None:
                self._append(self.path, json.dumps({"key": key, "model": model, **kept}).encode() + b"\n")

    def _read(self, path: Path) -> None:
        try:
            with open(path, "rb") as handle:
                for line in handle:
                    try:
                        record = json.loads(line)
                        self._replies[record["key"]] = _as_cached(record)
                    except (ValueError, KeyError, TypeError, IndexError):
                        self.unreadable += bool(line.strip())
        except OSError as error:
            raise UserError(f"{path}: the cache cannot be read: {error.strerror}") from None

    @staticmethod
    def _append(path: Path, line: bytes) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "ab+") as handle:
                fcntl.flock(handle, fcntl.LOCK_EX)
                size = handle.seek(0, os.SEEK_END)
                if size:
                    handle.seek(size - 1)
                    if handle.read(1) != b"\n":  # a torn line must not swallow this one
                        line = b"\n" + line
                handle.write(line)
        except OSError as error:
            raise UserError(f"cannot write the cache {path}: {error.strerror}; free space or move it") from None


_KEPT = ("content", "finish_reason", "usage", "served_model", "changed")


def _as_cached(record: dict[str, Any]) -> ChatReply:
    content = record["content"]
    if content is not None and not isinstance(content, str):
        raise TypeError("content is no text")
    usage = record.get("usage") or (0, 0)
    changed = tuple(record.get("changed") or ())
    return ChatReply(
        content, record.get("finish_reason"), (int(usage[0]), int(usage[1])), record.get("served_model"), changed, True
    )


# --- client


class ChatClient:
    """A server, a model and a cache.

    base_url: default OPENAI_BASE_URL from the environment, else OpenAI. api_key_env: name of the variable that holds
    the key; a server other than OpenAI's may do without. max_retries: of requests answered with 408, 409, 429, 5xx,
    with a broken body, or not at all; Retry-After is obeyed, otherwise the pause doubles from 0.5 s to 8 s.
    Raises UserError for a missing or malformed key or address.
    """

    def __init__(
        self,
        model: str,
        cache_path: str | Path | None = None,
        base_url: str | None = None,
        api_key_env: str = "OPENAI_API_KEY",
        max_concurrency: int = 8,
        max_retries: int = 6,
        timeout: float = 120.0,
    ) -> None:
        self.model = model
        self.base_url = _checked_url(base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI_BASE_URL)
        self.cache = ReplyCache(cache_path)
        self.changed: tuple[str, ...] = ()  # what this server made us change so far
        self._api_key_env = api_key_env
        self._concurrency = max(1, max_concurrency)
        self._max_retries = max_retries
        self._timeout = timeout
        self._secret = ""
        self._client: Any = None
        self._lock = threading.Lock()
        self._logger = get_logger()
        if self.cache.unreadable:
            self._logger.warning("%s: %d unreadable lines; asking again", cache_path, self.cache.unreadable)

    def key(self, request: ChatRequest) -> str:
        """Hash under which the answer to `request` is kept."""
        asked = [self.base_url, self.model, request.parameters()]
        return hashlib.sha256(json.dumps(asked, sort_keys=True, ensure_ascii=True).encode()).hexdigest()

    def complete(self, request: ChatRequest) -> ChatReply:
        """Answer to one request, from the cache or the server. A request that fails alone comes back with `error`.

        Raises UserError for what would fail every request: wrong key, unknown model, no server, no quota, or a
        server that asks for a pause of more than two minutes.
        """
        key = self.key(request)
        if (known := self.cache.get(key)) is not None:
            return known
        reply = self._ask(request)
        if reply.error is None:
            self.cache.put(key, self.model, reply)
        return reply

    def map(self, requests: Iterable[ChatRequest]) -> Iterator[ChatReply]:
        """Replies in the order of the requests, `max_concurrency` at a time; requests are read as they are needed.

        Raises UserError as `complete` does, and after 10 failures in a row.
        """
        failed = 0
        pool = ThreadPoolExecutor(self._concurrency, thread_name_prefix="chat")
        waiting: deque[Future[ChatReply]] = deque()
        try:
            for request in requests:
                waiting.append(pool.submit(self.complete, request))
                if len(waiting) >= 2 * self._concurrency:
                    reply = waiting.popleft().result()
                    failed = self._count_failures(failed, reply)
                    yield reply
            while waiting:
                reply = waiting.popleft().result()
                failed = self._count_failures(failed, reply)
                yield reply
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def estimate(self, requests: Iterable[ChatRequest]) -> CallEstimate:
        """What `map` would cost, without a call: nothing is sent, no key is needed."""
        calls = cached = prompt = completion = 0
        seen: set[str] = set()
        for request in requests:
            key = self.key(request)
            if key in seen or self.cache.get(key) is not None:
                cached += 1
                continue
            seen.add(key)
            calls += 1
            prompt += estimate_tokens(request)
            completion += request.max_tokens
        return CallEstimate(calls, cached, prompt, completion)

    # --- one call

    def _ask(self, request: ChatRequest) -> ChatReply:
        import openai

        broken = 0
        while True:
            changed = self.changed
            try:
                answer = self._connected().chat.completions.create(
                    model=self.model, **_adapted(request.parameters(), changed)
                )
                return _reply_of(answer, changed, self._secret)
            except openai.APIStatusError as error:
                if self._adapt(error, request, changed):
                    continue
                self._stop_where_hopeless(error)
                return ChatReply(None, error=self._safe(f"HTTP {error.status_code}: {error.message}"))
            except openai.APITimeoutError:
                return ChatReply(None, error=f"no answer within {self._timeout:g} s")
            except openai.APIConnectionError as error:
                why = self._safe(str(error.__cause__ or error))
                raise UserError(f"{self.base_url}: no connection ({why}); check --base_url and the network") from None
            except (ValueError, openai.APIResponseValidationError):  # a body that is no JSON, or no completion
                broken += 1
                if broken > self._max_retries:
                    return ChatReply(None, error=f"the server sent {broken} broken answers")
                time.sleep(min(8.0, 0.5 * 2 ** (broken - 1)))
            except openai.OpenAIError as error:
                return ChatReply(None, error=self._safe(f"{type(error).__name__}: {error}"))

    def _connected(self) -> Any:
        with self._lock:
            if self._client is None:
                import openai

                self._secret = self._read_key()
                self._client = openai.OpenAI(
                    api_key=self._secret or "none",
                    base_url=self.base_url,
                    max_retries=self._max_retries,
                    timeout=self._timeout,
                )
            return self._client

    def _read_key(self) -> str:
        key = os.environ.get(self._api_key_env, "").strip()
        if not key and self.base_url.startswith(OPENAI_BASE_URL):
            raise UserError(f"no API key: set the environment variable {self._api_key_env}, or give --base_url")
        if any(not "!" <= character <= "~" for character in key):  # an HTTP library would quote the key in its error
            raise UserError(f"the environment variable {self._api_key_env} holds no valid key: it has spaces in it")
        return key

    def _adapt(self, error: Any, request: ChatRequest, changed: tuple[str, ...]) -> bool:
        """True where the server refused a parameter that can be sent otherwise: ask again."""
        if error.status_code not in (400, 404, 422, 501):
            return False
        sent = _adapted(request.parameters(), changed).keys()
        told = f"'{getattr(error, 'param', None)}' {error.message}".lower()
        for name, signs in _REFUSALS.items():
            if name in sent and any(sign in told for sign in signs):
                with self._lock:
                    if name not in self.changed:
                        self.changed = (*self.changed, name)
                        self._logger.warning("%s: refuses %s; %s", self.base_url, name, _INSTEAD[name])
                return True
        return False

    def _stop_where_hopeless(self, error: Any) -> None:
        if error.status_code in (401, 403):  # the server's own words may hold a part of the key
            raise UserError(
                f"{self.base_url}: the key in {self._api_key_env} is refused (HTTP {error.status_code})"
            ) from None
        if error.status_code == 404:
            why = self._safe(error.message)
            raise UserError(f"{self.base_url}: model {self.model!r} or the address is unknown there ({why})") from None
        if error.status_code == 429:
            wait = error.response.headers.get("retry-after")
            why = f"asks to wait {wait} s" if wait else f"refuses more: {self._safe(error.message)}"
            raise UserError(
                f"{self.base_url}: {why}; run the same command again later, what was answered is kept"
            ) from None

    def _count_failures(self, failed: int, reply: ChatReply) -> int:
        if reply.error is None:
            return 0
        if failed + 1 >= FAILURES_IN_A_ROW:
            raise UserError(f"{self.base_url}: {failed + 1} requests in a row failed, the last with: {reply.error}")
        return failed + 1

    def _safe(self, text: str) -> str:
        return one_line(text.replace(self._secret, "[key]") if self._secret else text, 200)


def estimate_tokens(request: ChatRequest) -> int:
    """Prompt tokens of a request, estimated from its UTF-8 bytes; the schema counts too."""
    size = sum(len(content.encode("utf-8", "replace")) for _, content in request.messages)
    size += len(json.dumps(request.json_schema)) if request.json_schema else 0
    return size // BYTES_PER_TOKEN + TOKENS_PER_MESSAGE * len(request.messages)


def add_server_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that every script with a chat server has."""
    group = parser.add_argument_group("server (OpenAI or any compatible one)")
    group.add_argument("--base_url", help="address up to /v1; default: OPENAI_BASE_URL from the environment, or OpenAI")
    group.add_argument("--api_key_env", default="OPENAI_API_KEY", help="environment variable that holds the key")
    group.add_argument("--max_concurrency", type=int, default=8, help="requests at the same time")
    group.add_argument("--max_retries", type=int, default=6, help="retries of a request")
    group.add_argument("--timeout", type=float, default=120.0, help="seconds to wait for one answer")


# --- requests as servers take them

# Newer OpenAI models take max_completion_tokens only and no temperature; smaller servers know no schema or no seed.
_REFUSALS = {
    "response_format": ("response_format", "json_schema", "structured output"),
    "max_tokens": ("'max_tokens'", "max_completion_tokens"),
    "temperature": ("'temperature'",),
    "seed": ("'seed'",),
}
_INSTEAD = {
    "response_format": "answers are asked for in plain text and read strictly",
    "max_tokens": "max_completion_tokens is sent instead",
    "temperature": "the server's own is used: ANSWERS ARE SAMPLED, a repeated run would differ",
    "seed": "none is sent",
}


def _sendable(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")  # half a surrogate pair cannot be sent


def _adapted(parameters: dict[str, Any], changed: tuple[str, ...]) -> dict[str, Any]:
    sent = {name: value for name, value in parameters.items() if name not in changed}
    if "max_tokens" in changed:
        sent["max_completion_tokens"] = parameters["max_tokens"]
    return sent


def _reply_of(answer: Any, changed: tuple[str, ...], secret: str) -> ChatReply:
    """Raises ValueError where the body is no chat completion."""
    choices: list[Any] = getattr(answer, "choices", None) or []
    message = getattr(choices[0], "message", None) if choices else None
    if message is None:
        raise ValueError("no choices")
    content = message.content
    if content is not None and not isinstance(content, str):
        raise ValueError("content is no text")
    usage = getattr(answer, "usage", None)
    counts = (getattr(usage, "prompt_tokens", 0) or 0, getattr(usage, "completion_tokens", 0) or 0)
    if secret and content:  # a server that echoes its headers must not put the key into the cache
        content = content.replace(secret, "[key]")
    return ChatReply(content, choices[0].finish_reason, counts, getattr(answer, "model", None), changed)


def _checked_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError("--base_url is no address; give one such as http://localhost:8000/v1")
    if parts.username or parts.password or parts.query:
        raise UserError("--base_url holds a user name, password or query; give the key by environment variable")
    return url.rstrip("/")
