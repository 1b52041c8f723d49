"""What every run script shares on its command line: one-line errors, exit codes and the help format."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


class UserError(Exception):
    """A mistake that the user can mend. Its text is one line: what is wrong, where, what to do."""


def make_parser(docstring: str | None) -> argparse.ArgumentParser:
    """Parser whose `--help` shows the script's docstring as it is written; a wrong flag is a UserError."""
    return _Parser(description=docstring, formatter_class=_HelpFormatter)


def run_main(main: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None = None) -> None:
    """Run a script's `main` and exit: 0 done, 1 done with failures, 2 a user's error told in one line."""
    try:
        code = main(argv)
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        code = EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("interrupted: what was finished is kept; the same command goes on from there", file=sys.stderr)
        code = EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of a pipe (`| head`) has left: not an error, but stdout must not be flushed again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.exit(code)


def one_line(text: str, limit: int = 600) -> str:
    """`text` on one line, at most `limit` characters, whatever it holds."""
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; {self.prog} --help lists the flags")


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False, argparse.SUPPRESS):  # a default that tells the reader nothing
            return action.help
        return super()._get_help_string(action)
