"""How run_pipeline.py runs scripts: each in a new Python, or in forks of one that has imported what analyses need.

An analysis of a small run takes less time than its imports. A fork has them. Forks are used on Linux alone: elsewhere
the fork of a process that has loaded system libraries may hang.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

IMPORTED = (
    "torch",
    "pandas",
    "matplotlib.pyplot",
    "scipy.stats",
    "statsmodels.stats.multitest",
    "sklearn.linear_model",
)
STARTED = "import runpy, sys; runpy.run_path(sys.argv[1])['serve']()"


class FreshPython:
    """Runs each script in a Python of its own; `code` is the exit code of the last one."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment, self.code = environment, 0

    def run(self, words: Sequence[str]) -> Iterator[str]:
        """The lines that a script prints; words: its path and its arguments."""
        with _open(words, self.environment) as process:
            yield from process.stdout or ()
        self.code = process.returncode


class WarmPython(FreshPython):
    """Runs each script in a fork of one Python, until it is closed."""

    def __init__(self, environment: dict[str, str]) -> None:
        super().__init__(environment)
        self.process = _open(["-c", STARTED, __file__], environment, stdin=subprocess.PIPE)

    def run(self, words: Sequence[str]) -> Iterator[str]:
        """As above."""
        assert self.process.stdin
        assert self.process.stdout
        print(json.dumps(list(words)), file=self.process.stdin, flush=True)
        for line in self.process.stdout:
            if line.startswith("\0"):
                self.code = int(line[1:])
                return
            yield line
        self.code = self.process.wait() or 1  # the process has died with the script

    def close(self) -> None:
        """End the process."""
        self.process.communicate()


def _open(words: Sequence[str], environment: dict[str, str], **options: Any) -> subprocess.Popen[str]:
    """A Python whose two outputs come as one text, whose lines may end with \\r: each state of a bar is a line."""
    options |= {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "encoding": "utf-8", "errors": "replace"}
    return subprocess.Popen([sys.executable, *words], env=environment, **options)


def serve() -> None:
    """Run the scripts that standard input names, one after the other, each line a JSON list of its words."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the script that runs
    for name in IMPORTED:
        importlib.import_module(name)
    for line in sys.stdin:
        if (child := os.fork()) == 0:
            _become(json.loads(line))
        _, status = os.waitpid(child, 0)
        print(f"\n\0{os.waitstatus_to_exitcode(status)}", flush=True)


def _become(words: list[str]) -> NoReturn:
    """Run a script as the program of this process, which ends with it. It must find its own modules."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")
    sys.exit()
