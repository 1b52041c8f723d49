"""A server of the studied model as a child process: started, waited for, and stopped whatever happens."""

from __future__ import annotations

import ctypes
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from http.client import HTTPException
from pathlib import Path
from threading import Event
from urllib.error import HTTPError
from urllib.request import ProxyHandler, build_opener

from command_line import UserError, one_line
from logger import get_logger

SECONDS_TO_END = 30
SECONDS_TO_BE_GONE = 2
log = get_logger("serve_responses")


@contextmanager
def running_server(
    command: str, values: Mapping[str, str], log_file: Path, seconds: float, stop: Event
) -> Iterator[str]:
    """The address of the server that `command` starts, as soon as it answers. The server ends with the context.

    command: as in a shell, with {port} and the names of `values` for what is put there. The server writes to
    `log_file`. Raises UserError if it ends, or has not answered within `seconds`. After `stop` nothing is waited for.
    """
    port = free_port()
    words = shlex.split(command)
    for name, value in {**values, "port": str(port)}.items():
        words = [word.replace(f"{{{name}}}", value) for word in words]
    log.info(f"starting {shlex.join(words)}; its log is {log_file}")
    for name in ("no_proxy", "NO_PROXY"):  # a proxy of the site cannot reach a server of this machine
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), "127.0.0.1"]))
    with open(log_file, "ab") as output:
        try:
            process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=output, stderr=output, process_group=0, preexec_fn=_end_with_us
            )
        except OSError as error:
            raise UserError(f"{words[0]}: {error.strerror}; install it, or give another --serve_command") from None
    try:
        started = time.monotonic()
        while not stop.wait(0.2) and not answers(port):
            _check_alive(process, words, log_file)
            if time.monotonic() - started > seconds:
                raise UserError(f"{words[0]}: no answer within {seconds:g} s (--start_limit); see {log_file}")
        log.info(f"the server answers after {time.monotonic() - started:.0f} s")
        yield f"http://127.0.0.1:{port}/v1"
    except UserError:
        with suppress(subprocess.TimeoutExpired):  # its last connections break a moment before it is gone
            process.wait(SECONDS_TO_BE_GONE)
        _check_alive(process, words, log_file)  # the true reason, if a request found no server any more
        raise
    finally:
        end(process)


def free_port() -> int:
    """A port that nobody uses just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(port: int) -> bool:
    """Whether a server is ready to be asked: at /health, or a path of that name is unknown to it."""
    try:
        with build_opener(ProxyHandler({})).open(f"http://127.0.0.1:{port}/health", timeout=5):
            return True
    except HTTPError as error:
        return error.code < 500
    except (OSError, HTTPException):
        return False


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process and its children: first asked, then killed."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(SECONDS_TO_END)


def _check_alive(process: subprocess.Popen[bytes], words: list[str], log_file: Path) -> None:
    if process.poll() is not None:
        lines = log_file.read_text(encoding="utf-8", errors="replace").split("\n")
        last = one_line(next((line for line in reversed(lines) if line.strip()), "nothing"), 200)
        raise UserError(f"{words[0]} ended with exit code {process.returncode}; {log_file} ends with: {last}") from None


def _end_with_us() -> None:
    """The server gets SIGTERM when this process ends, even if it is killed: it holds the GPU's memory."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
