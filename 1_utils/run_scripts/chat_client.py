"""Ask an OpenAI-compatible chat server many questions: retries, bounded concurrency, an append-only cache, dry runs.

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
    """An answer, or `error` in one line and no content. `changed` names what the server refused and was left out."""

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
    the key; a server other than OpenAI's may do without. max_retries: of requests answered with 408, 409, 429, 5xx (as
    the status, or in the body of a 200), with a broken body, or not at all; Retry-After is obeyed up to two minutes,
    otherwise the pause doubles from 0.5 s to 8 s. The first request goes out alone, to learn what the server refuses.
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
        self.refused: tuple[str, ...] = ()  # what this server was found to refuse
        self.changed: tuple[str, ...] = ()  # what was left out for any answer handed out, cached ones included
        self._api_key_env = api_key_env
        self._concurrency = max(1, max_concurrency)
        self._max_retries = max_retries
        self._timeout = timeout
        self._secret = ""
        self._client: Any = None
        self._lock, self._first = threading.Lock(), threading.Lock()
        self._settled = False  # a first request has been answered
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
        reply = self.cache.get(key)
        if reply is None:
            reply = self._ask_in_turn(request)
            if reply.error is None:
                self.cache.put(key, self.model, reply)
        with self._lock:
            self.changed = _union(self.changed, reply.changed)
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

    def _ask_in_turn(self, request: ChatRequest) -> ChatReply:
        if self._settled:
            return self._ask(request)
        with self._first:
            if not self._settled:
                try:
                    return self._ask(request)
                finally:
                    self._settled = True
        return self._ask(request)

    def _ask(self, request: ChatRequest) -> ChatReply:
        import openai

        leaving, failures = _Leaving(request, self.refused), 0
        while True:
            try:
                reply = self._post(request, leaving.out)
                self._remember(leaving.out)
                return reply
            except _ServerError as error:
                if leaving.another_way(error):
                    continue
                failures += 1
                if not (error.is_transient and failures <= self._max_retries):
                    self._stop_where_hopeless(error)
                    return ChatReply(None, error=self._safe(str(error)))
            except openai.APITimeoutError:
                return ChatReply(None, error=f"no answer within {self._timeout:g} s")
            except openai.APIConnectionError as error:
                why = self._safe(str(error.__cause__ or error))
                raise UserError(f"{self.base_url}: no connection ({why}); check --base_url and the network") from None
            except (ValueError, openai.APIResponseValidationError):  # a body that is no JSON, or no completion
                failures += 1
                if failures > self._max_retries:
                    return ChatReply(None, error=f"the server sent {failures} broken answers")
            except openai.OpenAIError as error:
                return ChatReply(None, error=self._safe(f"{type(error).__name__}: {error}"))
            time.sleep(min(8.0, 0.5 * 2 ** (failures - 1)))

    def _post(self, request: ChatRequest, left_out: tuple[str, ...]) -> ChatReply:
        import openai

        try:
            answer = self._connected().chat.completions.create(
                model=self.model, **_without(request.parameters(), left_out)
            )
        except openai.APIStatusError as error:  # after the library's own retries
            raise _ServerError(error.body or error.message, error.status_code, error.response.headers) from None
        if not hasattr(answer, "to_dict"):
            raise ValueError("no JSON")
        return _reply_of(answer.to_dict(warnings=False), left_out, self._secret)

    def _remember(self, left_out: tuple[str, ...]) -> None:
        with self._lock:
            new = [name for name in left_out if name not in self.refused]
            self.refused = _union(self.refused, left_out)
        for name in new:
            level = logging.WARNING if name == "temperature" else logging.INFO
            self._logger.log(level, "%s: refuses %s; %s", self.base_url, *_INSTEAD[name])

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

    def _stop_where_hopeless(self, error: _ServerError) -> None:
        if error.status in (401, 403):  # the server's own words may hold a part of the key
            raise UserError(
                f"{self.base_url}: the key in {self._api_key_env} is refused (HTTP {error.status})"
            ) from None
        if error.status == 404:
            why = self._safe(error.told)
            raise UserError(f"{self.base_url}: model {self.model!r} or the address is unknown there ({why})") from None
        if error.status == 429:
            why = _pause_asked(error.headers.get("retry-after")) or f"refuses more: {self._safe(error.told)}"
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
    """An error that the server told: as a status, or in the body of a 200 (`headers` is empty then)."""

    def __init__(self, body: Any, status: int | None, headers: Mapping[str, str] | None = None) -> None:
        self.status, self.headers = status, headers or {}
        self.told = one_line(_texts(body), 2000)
        self.fields = _texts(body, keys=("param", "loc"))
        # The library has tried again what came with a status of its own.
        again = status in (408, 409, 429) or (status or 0) >= 500 or (status is None and _TRANSIENT.search(self.told))
        self.is_transient = headers is None and bool(again)
        super().__init__(f"HTTP {status}: {self.told}" if status else f"the server's error: {self.told}")


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


class _Leaving:
    """What is left out of one request (`out`): what the server is known to refuse, and what its refusals name.

    A refusal that names several fields may mean any of them: each is left out alone, then all.
    """

    def __init__(self, request: ChatRequest, known: tuple[str, ...]) -> None:
        self._fields = [name for name in request.parameters() if name != "messages"]
        self._fields += ["system"] if any(role == "system" for role, _ in request.messages) else []
        self.out = self._sure = known
        self._named: list[str] = []
        self._ways: Iterator[tuple[str, ...]] = iter(())

    def another_way(self, error: _ServerError) -> bool:
        """True where `error` names what can be left out, and that has not been tried: ask again."""
        if error.status not in _ADAPTABLE:
            return False
        fits = {name for name in self._fields if name != "max_tokens" or not _PROMPT_TOO_LONG.search(error.told)}
        named = next((found for told in (error.fields, error.told) if (found := _named_in(told, fits))), [])
        if named != self._named:  # something new is refused, so what was left out last has helped
            self._named, self._sure = named, self.out
            ways = [[way for way in _WAYS.get(name, ((name,),)) if not set(way) <= set(self._sure)] for name in named]
            together = [sum((way[0] for way in ways if way), ()), sum((way[-1] for way in ways if way), ())]
            self._ways = iter(dict.fromkeys([*chain(*ways), *(together if len(named) > 1 else [])]))
        way = next(self._ways, None)
        if way is None:
            return False
        self.out = _union(self._sure, way)
        return True


def _named_in(told: str, fields: Iterable[str]) -> list[str]:
    found = {name: match.start() for name in fields if (match := _NAMED[name].search(told))}
    return sorted(found, key=lambda name: found[name])


_WAYS = {"max_tokens": (("max_tokens",), ("max_tokens", "max_completion_tokens"))}


def _union(one: tuple[str, ...], other: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(one + other))


def _sendable(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")  # half a surrogate pair cannot be sent


def _without(parameters: dict[str, Any], left_out: tuple[str, ...]) -> dict[str, Any]:
    sent = {name: value for name, value in parameters.items() if name not in left_out}
    if "max_tokens" in left_out and "max_completion_tokens" not in left_out:
        sent["max_completion_tokens"] = parameters["max_tokens"]
    first, *rest = parameters["messages"]
    if "system" in left_out and first["role"] == "system" and rest:
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


def _reply_of(body: dict[str, Any], left_out: tuple[str, ...], secret: str) -> ChatReply:
    """The reply in the body of a 200. Raises _ServerError for an error in it, ValueError for what is no completion."""
    choices = body.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
    error = body.get("error") or choice.get("error")
    if not choice and not error and any(name in body for name in ("message", "detail")):
        error = body
    if error:
        code = error.get("code", error.get("status")) if isinstance(error, dict) else None
        raise _ServerError(error, int(str(code)) if re.fullmatch(r"[45]\d\d", str(code)) else None)
    message = choice.get("message")
    if not isinstance(message, dict):
        raise ValueError("no choices")
    reason = choice.get("finish_reason")
    content = _text_of(message.get("content"))
    if content is None:
        more = "; raise the limit of tokens" if reason == "length" else ""
        raise _ServerError(message.get("refusal") or f"an answer without text (it ended by {reason}{more})", None)
    usage = body["usage"] if isinstance(body.get("usage"), dict) else {}
    counts = (usage.get("prompt_tokens") or 0, usage.get("completion_tokens") or 0)
    if secret:  # a server that echoes its headers must not put the key into the cache
        content = content.replace(secret, "[key]")
    return ChatReply(content, reason, counts, body.get("model"), left_out)


_TEXT = ("text", "output_text")


def _text_of(content: Any) -> str | None:
    """The text of a message, whole or in parts; what a model thinks aloud in parts of other types is left out."""
    if isinstance(content, list):
        shown = [
            part["text"] for part in content if isinstance(part, dict) and part.get("type") in _TEXT and "text" in part
        ]
        content = "".join(map(str, shown)) if shown else None
    if content is not None and not isinstance(content, str):
        raise ValueError("content is no text")
    return content


def _checked_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError("--base_url is no address; give one such as http://localhost:8000/v1")
    if parts.username or parts.password or parts.query:
        raise UserError("--base_url holds a user name, password or query; give the key by environment variable")
    return url.rstrip("/")
