"""serve_responses.py: a server is started, asked and stopped, whatever happens; its text is captured later."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import attn_act_logi
import pytest
import serve_responses
import tiny_models
from command_line import UserError
from run_store import pt_files, read_failures
from test_inference_runs import arguments, rows_by_key, write_prompts
from test_inference_server import stored

# Answers "7" to every prompt, after two /health that say "not yet"; a prompt with "never" is refused, "die" ends it.
# With a `number` its first /health sends that signal to the process that started it.
SERVER = """
import json, os, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
waits = [503, 503]
number = 0
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        if number:
            os.kill(os.getppid(), number)
        self.send(waits.pop() if waits else 200, {})
    def do_POST(self):
        prompt = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["prompt"]
        if "die" in prompt:
            print("out of memory", flush=True)
            os._exit(3)
        error = {"error": {"message": "this prompt is refused"}}
        self.send(400 if "never" in prompt else 200, error if "never" in prompt else {"choices": [{"text": "7"}]})
    def send(self, status, body):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())
    def log_message(self, *words):
        print(self.command + "\\n", end="", flush=True)  # one write, because threads print
print(sys.argv[1:], os.getpid(), flush=True)
ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> str:
    return tiny_models.save(tmp_path_factory.mktemp("model"))


@pytest.fixture
def command(tmp_path) -> str:
    path = tmp_path / "a server.py"
    path.write_text(SERVER)
    return f"{shlex.quote(sys.executable)} {shlex.quote(str(path))} {{port}} {{dtype}} {{gpus}} {{model}}"


@pytest.fixture
def prompts(tmp_path) -> Path:
    return write_prompts(tmp_path / "prompts.json", 6)


def serve(command: str, *words: str, limit: str = "30") -> int:
    return serve_responses.main(["--serve_command", command, "--start_limit", limit, "--", *words])


def server_log(output: Path) -> list[str]:
    return (output / "server.log").read_text().splitlines()


def is_running(output: Path) -> bool:
    number = server_log(output)[0].split()[-1]
    try:
        return "Z" not in Path(f"/proc/{number}/stat").read_text().split()[2]
    except FileNotFoundError:
        return False


def test_text_is_stored_with_one_server_and_captured_without(model_dir, prompts, tmp_path, command):
    words = arguments(model_dir, prompts, tmp_path / "run")
    assert serve(command, *words) == 0
    assert len(stored(tmp_path / "run")) == len(server_log(tmp_path / "run")) - 4 == 10  # its start, three GET
    first = server_log(tmp_path / "run")[0]
    assert f"'float32', '1', {model_dir!r}]" in first
    assert not is_running(tmp_path / "run")
    assert not list((tmp_path / "run").rglob("*.pt"))
    assert serve("no-such-command", *words) == 0  # nothing is missing
    assert attn_act_logi.main([*words, "--stored_text"]) == 0
    rows = rows_by_key(tmp_path / "run")
    assert {row["response"] for row in rows.values()} == {"7"}
    assert len(rows) == 10
    assert serve("no-such-command", *words) == 0
    settings = json.loads((tmp_path / "run/swap/run.json").read_text())["settings"]
    assert settings["generation"]["text"] == "server"


def test_a_refused_prompt_is_a_failure_until_it_is_answered(model_dir, prompts, tmp_path, command):
    rows = json.loads(prompts.read_text())
    rows[4]["normal"] = "never say: 1 + 1 ="
    prompts.write_text(json.dumps(rows))
    words = arguments(model_dir, prompts, tmp_path / "run")
    with pytest.raises(UserError, match=r"--stored_text: there is no responses.jsonl; serve_responses.py writes it"):
        attn_act_logi.main([*words, "--stored_text"])
    assert serve(command, *words) == 1
    assert "HTTP 400: this prompt is refused" in read_failures(tmp_path / "run/normal")[4][-1]
    assert attn_act_logi.main([*words, "--stored_text"]) == 1
    assert len(rows_by_key(tmp_path / "run")) == 9
    Path(shlex.split(command)[1]).write_text(SERVER.replace('"never" in prompt', "False"))
    assert serve(command, *words) == 0
    assert server_log(tmp_path / "run").count("POST") == 11
    assert attn_act_logi.main([*words, "--stored_text"]) == 0
    assert not list((tmp_path / "run").rglob("failures.csv"))


@pytest.mark.parametrize(
    ("change", "limit", "told"),
    [
        (("waits = ", "sys.exit('no GPU here') #"), "30", r"ended with exit code 1; \S+.log ends with: no GPU here"),
        (("[503, 503]", "[503] * 10**6"), "0.5", r"no answer within 0.5 s \(--start_limit\); see \S+server.log"),
        (('"die" in', '"3 + 4" in'), "30", r"ended with exit code 3; \S+server.log ends with: out of memory"),
    ],
)
def test_a_server_that_fails_is_one_line(model_dir, prompts, tmp_path, command, change, limit, told):
    Path(shlex.split(command)[1]).write_text(SERVER.replace(*change, 1))
    with pytest.raises(UserError, match=told):
        serve(command, *arguments(model_dir, prompts, tmp_path / "run"), "--max_retries", "0", limit=limit)
    assert not is_running(tmp_path / "run")


def test_a_server_that_is_not_there_and_flags_that_are_missing_are_one_line(model_dir, prompts, tmp_path):
    with pytest.raises(UserError, match="no-such-command: No such file or directory; install it, or give another"):
        serve("no-such-command {port}", *arguments(model_dir, prompts, tmp_path / "run"))
    for words in ([], ["--"], ["--start_limit", "3"]):
        with pytest.raises(UserError, match=r"give the flags of attn_act_logi.py after --"):
            serve_responses.parse_args(words)
    with pytest.raises(
        UserError, match=r"--model_name: no such flag before --; those of attn_act_logi.py come after it"
    ):
        serve_responses.parse_args(["--model_name", model_dir])


def sends(command: str, number: int) -> None:
    Path(shlex.split(command)[1]).write_text(SERVER.replace("number = 0", f"number = {int(number)}"))


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_stops_the_waiting_and_the_server(model_dir, prompts, tmp_path, command, number):
    sends(command, number)
    assert serve(command, *arguments(model_dir, prompts, tmp_path / "run")) == 75
    assert server_log(tmp_path / "run")[1:] == ["GET"]
    assert not is_running(tmp_path / "run")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends the children of a killed process")
def test_the_server_ends_if_its_process_is_killed(tmp_path, command):
    sends(command, signal.SIGKILL)
    code = f"import pathlib, sys, threading\nsys.path[:0] = {sys.path}\nfrom capture import text_engine\n"
    code += f"log, stop = pathlib.Path({str(tmp_path / 'server.log')!r}), threading.Event()\n"
    code += f"with text_engine.running_server({command!r}, {{}}, log, 30, stop):\n    pass"
    assert subprocess.run([sys.executable, "-c", code], stderr=subprocess.DEVNULL).returncode == -9
    for _ in range(100):
        time.sleep(0.05 * is_running(tmp_path))
    assert not is_running(tmp_path)


# --- --overwrite


def test_overwrite_uses_the_servers_responses_again_or_puts_them_aside(model_dir, prompts, tmp_path, command, capsys):
    words = arguments(model_dir, prompts, tmp_path / "run")
    assert serve(command, *words) == 0
    assert attn_act_logi.main([*words, "--stored_text"]) == 0
    own = stored(tmp_path / "run")
    before = pt_files(tmp_path / "run" / "normal")[0].read_bytes()
    assert attn_act_logi.main([*words, "--stored_text", "--overwrite", "--raw_layers", "none"]) == 0
    assert pt_files(tmp_path / "run" / "normal")[0].read_bytes() != before
    assert stored(tmp_path / "run") == own
    for number, more in enumerate((["--seed", "1"], ["--seed", "2"]), 1):
        assert serve(command, *words, "--overwrite", *more) == 0
        kept = tmp_path / "run" / "normal" / f"responses_before_{number}.jsonl"
        assert f"responses.jsonl was made with other settings; it is {kept.name} now" in capsys.readouterr().err
        assert len(kept.read_text().splitlines()) == 6
    assert attn_act_logi.main([*words, "--overwrite"]) == 0  # text from the model here
    assert stored(tmp_path / "run") == []
    assert len(list((tmp_path / "run").rglob("responses_before_*.jsonl"))) == 6
