"""A real HTTP server on 127.0.0.1 in OpenAI's formats (chat and plain completions), before a transformers causal model.

    with LocalOpenAIServer("models/SmolLM2-135M-Instruct") as server: ...   # a model on disk
    with LocalOpenAIServer() as server: ...                                 # a tiny random Llama, made here
    with LocalOpenAIServer(reply=lambda messages: "text") as server: ...    # answers computed by a function

    python tests/local_openai_server.py --model_path models/SmolLM2-135M-Instruct --port 8000

`server.base_url` goes to --base_url. `server.requests` lists what came in (path, headers, body); as a script it prints
each body. With a json_schema
response format the model's own likelihoods choose among the values of an enum, so its answer always has the form.
`faults` are used up one a request: "429" (Retry-After of 1 s), "429:0.2", "500", "malformed" (broken JSON),
"not_completion" (JSON of another form), "html", "drop" (connection closed), "slow:2" (a late answer), "503:5".
`always` is one such fault for every request. `refuses` lists parameters answered with 400 ("system": the role).
`answers` is called with each request's body: None, or what is sent instead of an answer: (status, body[, headers]).
`before` is put before every prompt, as a server does whose BOS token or template is another. A `reply` for a plain
completion is called with the prompt, and the prompt's tokens are then its words.
"""

from __future__ import annotations

import argparse
import copy
import json
import threading
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Messages = list[dict[str, str]]


class LocalOpenAIServer:
    """Context manager: serves in a thread from `__enter__` (or `start`) to `__exit__` (or `stop`)."""

    def __init__(
        self,
        model_path: str | None = None,
        reply: Callable[[Any], str] | None = None,
        api_key: str | None = None,
        faults: Sequence[str] = (),
        always: str | None = None,
        refuses: Sequence[str] = (),
        answers: Callable[[dict[str, Any]], tuple[Any, ...] | None] = lambda body: None,
        port: int = 0,
        before: str = "",
        prints: bool = False,
    ) -> None:
        self.model_path = model_path
        self.before = before
        self.prints = prints
        self.reply = reply
        self.api_key = api_key
        self.faults = list(faults)
        self.always = always
        self.refuses, self.answers = tuple(refuses), answers
        self.requests: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.in_flight = self.most_in_flight = 0
        self.lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"owner": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", port), handler)
        self._server.daemon_threads = True

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    @cached_property
    def model(self) -> ServedModel:
        return ServedModel(self.model_path, self.before)

    def start(self) -> LocalOpenAIServer:
        if self.reply is None:
            _ = self.model  # loaded before the first request, so that no request waits for it
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def __enter__(self) -> LocalOpenAIServer:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def completion(self, body: dict[str, Any]) -> dict[str, Any]:
        """The plain completion for one request body: its prompt is a text or token ids."""
        if self.reply is not None:
            text, counts, reason = self.reply(body["prompt"]), (len(body["prompt"].split()), 1), "stop"
        else:
            with self.lock:
                text, counts, reason = self.model.complete(body["prompt"], body["max_tokens"], body.get("stop") or [])
        usage = {"prompt_tokens": counts[0], "completion_tokens": counts[1], "total_tokens": sum(counts)}
        choice = {"index": 0, "text": text, "finish_reason": reason, "logprobs": None}
        head = {"id": "cmpl-1", "object": "text_completion", "created": int(time.time())}
        return head | {"model": self.model_path or "tiny-random-llama", "choices": [choice], "usage": usage}

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        """The chat completion for one request body."""
        limit = body.get("max_completion_tokens") or body.get("max_tokens") or 16
        schema = (body.get("response_format") or {}).get("json_schema", {}).get("schema")
        if self.reply is not None:
            text, counts, reason = self.reply(body["messages"]), (0, 0), "stop"
        else:
            with self.lock:  # one generation at a time
                text, counts, reason = self.model.chat(body["messages"], limit, schema)
        return {
            "id": f"chatcmpl-{len(self.requests)}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": self.model_path or "tiny-random-llama",
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": text},
                    "finish_reason": reason,
                    "logprobs": None,
                }
            ],
            "usage": {
                "prompt_tokens": counts[0],
                "completion_tokens": counts[1],
                "total_tokens": sum(counts),
            },
        }


class _Handler(BaseHTTPRequestHandler):
    owner: LocalOpenAIServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/health" else 404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_POST(self) -> None:
        owner = self.owner
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        headers = {name.title(): value for name, value in self.headers.items()}
        with owner.lock:
            if owner.prints:
                print(json.dumps(body), flush=True)
            owner.requests.append({"path": self.path, "headers": headers, "body": body})
            owner.times.append(time.monotonic())
            owner.in_flight += 1
            owner.most_in_flight = max(owner.most_in_flight, owner.in_flight)
            fault = owner.faults.pop(0) if owner.faults else owner.always
        self._respond(body, fault)

    def _respond(self, body: dict[str, Any], fault: str | None) -> None:
        sent_key = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if self.owner.api_key is not None and sent_key != self.owner.api_key:
            self._error(401, f"Incorrect API key provided: {sent_key}", None)  # some servers do quote it
        elif self.path not in ("/v1/chat/completions", "/v1/completions"):
            self._error(404, f"no such path {self.path}", None)
        elif (told := self.owner.answers(body)) is not None:
            self._send(told[0], json.dumps(told[1]), *told[2:])
        elif refused := next((name for name in self.owner.refuses if name in sent_in(body)), None):
            self._error(400, f"Unsupported parameter: '{refused}' is not supported with this model.", refused)
        elif fault is None or fault.startswith("slow"):
            time.sleep(float(fault.partition(":")[2] or 2) if fault else 0)
            made = self.owner.answer(body) if "messages" in body else self.owner.completion(body)
            self._send(200, json.dumps(made))
        else:
            self._misbehave(fault, sent_key)

    def _misbehave(self, fault: str, sent_key: str) -> None:
        kind, _, detail = fault.partition(":")
        if kind in ("429", "503"):
            self._error(int(kind), "slow down", None, {"Retry-After": detail or "1"})
        elif kind == "malformed":
            self._send(200, '{"id": "chatcmpl-1", "choices": [{"mess')
        elif kind == "not_completion":
            self._send(200, '{"status": "ok"}')
        elif kind == "html":
            self._send(200, "<html>gateway</html>", {"Content-Type": "text/html"})
        elif kind == "drop":
            self._count_out()
            self.close_connection = True
            self.connection.close()
        else:
            self._error(int(kind), f"failed while serving the key {sent_key}", None)

    def _error(self, status: int, message: str, param: str | None, headers: dict[str, str] | None = None) -> None:
        error = {"message": message, "type": "invalid_request_error", "param": param, "code": None}
        self._send(status, json.dumps({"error": error}), headers)

    def _send(self, status: int, text: str, headers: dict[str, str] | None = None) -> None:
        self._count_out()
        data = text.encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _count_out(self) -> None:
        with self.owner.lock:  # before the answer leaves: the client's next request may come at once
            self.owner.in_flight -= 1

    def log_message(self, *_: object) -> None:
        """Requests are kept in `server.requests`; nothing is printed."""


def sent_in(body: dict[str, Any]) -> set[str]:
    """What a server may refuse in a request: the names of its parameters, and "system" for the role."""
    return {*body, *(message["role"] for message in body.get("messages", []))}


class ServedModel:
    """A causal model behind the server: greedy chat, and answers of a JSON schema's form."""

    def __init__(self, path: str | None, before: str = "") -> None:
        self.before = before
        from transformers import AutoModelForCausalLM, AutoTokenizer

        if path is None:
            self.model, self.tokenizer = tiny_random_llama()
        else:
            self.model = AutoModelForCausalLM.from_pretrained(path, dtype="float32").eval()
            self.tokenizer = AutoTokenizer.from_pretrained(path)

    def chat(self, messages: Messages, limit: int, schema: dict[str, Any] | None) -> tuple[str, tuple[int, int], str]:
        """(text, (prompt tokens, completion tokens), finish reason)."""
        if self.tokenizer.chat_template:
            prompt = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        else:
            prompt = "".join(f"{message['role']}: {message['content']}\n" for message in messages) + "assistant: "
        ids = self._ids(self.before + prompt)
        if schema is None:
            new, ended = self._continue(ids, limit)
            text = self.tokenizer.decode(new, skip_special_tokens=True)
            return text, (ids.shape[1], len(new)), "stop" if ended else "length"
        text = self._fill_schema(prompt, schema, limit)
        return text, (ids.shape[1], self._ids(text).shape[1]), "stop"

    def complete(self, prompt: str | list[int], limit: int, stops: list[str]) -> tuple[str, tuple[int, int], str]:
        """(text, (prompt tokens, completion tokens), finish reason) of a prompt that is continued as it is."""
        import torch

        ids = self._ids(self.before + prompt, True) if isinstance(prompt, str) else torch.tensor([prompt])
        new, ended = self._continue(ids, limit)
        text = self.tokenizer.decode(new, skip_special_tokens=True)
        places = [text.find(stop) for stop in stops if stop in text]
        text = text[: min(places)] if places else text
        return text, (ids.shape[1], len(new)), "stop" if ended or places else "length"

    def _continue(self, ids: Any, limit: int) -> tuple[list[int], bool]:
        end = self.tokenizer.eos_token_id
        out = self.model.generate(
            ids, attention_mask=ids.new_ones(ids.shape), max_new_tokens=limit, do_sample=False, pad_token_id=end
        )
        new = out[0, ids.shape[1] :].tolist()
        return new, bool(new) and new[-1] == end

    def _fill_schema(self, prompt: str, schema: dict[str, Any], limit: int) -> str:
        text = "{"
        for position, (name, kind) in enumerate(schema["properties"].items()):
            text += (", " if position else "") + json.dumps(name) + ": "
            if "enum" in kind:
                text += self._most_likely(prompt + text, [json.dumps(value) for value in kind["enum"]])
            else:
                new, _ = self._continue(self._ids(prompt + text + '"'), min(limit, 24))
                words = self.tokenizer.decode(new, skip_special_tokens=True)
                text += json.dumps(words.partition('"')[0].partition("\n")[0])
        return text + "}"

    def _most_likely(self, prefix: str, values: list[str]) -> str:
        """The value whose tokens are the most likely ones after `prefix`, by their mean log-probability."""
        import torch

        with torch.no_grad():
            start = self.model(self._ids(prefix), use_cache=True)
            scores = []
            for value in values:
                ids = self._ids(value)
                rest = self.model(ids, past_key_values=copy.deepcopy(start.past_key_values), use_cache=True).logits
                logits = torch.cat([start.logits[:, -1:], rest[:, :-1]], dim=1).log_softmax(-1)
                scores.append(float(logits[0].gather(1, ids[0, :, None]).mean()))
        return values[scores.index(max(scores))]

    def _ids(self, text: str, special: bool = False) -> Any:
        return self.tokenizer(text, return_tensors="pt", add_special_tokens=special).input_ids


def tiny_random_llama(seed: int = 0) -> tuple[Any, Any]:
    """(model, tokenizer): a random Llama over bytes; fast, offline, and knows nothing."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {"<s>": 0, "</s>": 1}
    for character in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[character] = len(vocabulary)
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16384, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval(), tokenizer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_path", help="folder of a causal model; default: a tiny random one")
    parser.add_argument("--port", type=int, default=0, help="default: a free one")
    parser.add_argument("--always", help="a fault for every request, such as slow:0.1")
    options = parser.parse_args()
    with LocalOpenAIServer(options.model_path, port=options.port, always=options.always, prints=True) as running:
        print(running.base_url, flush=True)
        threading.Event().wait()
