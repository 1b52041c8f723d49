"""What every run script shares on its command line: one-line errors, exit codes and the help format."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from itertools import takewhile
from pathlib import Path
from typing import Any, NoReturn

import stamps
from logger import set_verbose

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


class UserError(Exception):
    """An error that the user can fix. Its text is one line: what is wrong, where, what to do."""


class UnknownFlag(UserError):
    """A flag that the script does not have."""

    def __init__(self, flag: str, text: str) -> None:
        super().__init__(text)
        self.flag = flag


def make_parser(docstring: str | None) -> argparse.ArgumentParser:
    """Parser whose `--help` shows the script's docstring as it is written; a wrong flag is a UserError.

    Flags must be spelled out. Every script has `--verbose`, which shows `log.debug` messages too.
    """
    parser = _Parser(description=docstring, formatter_class=_HelpFormatter, allow_abbrev=False)
    parser.add_argument("--verbose", action=_Verbose, nargs=0, default=False, help="print details, too")
    return parser


def add_run_flags(
    parser: argparse.ArgumentParser, run_dir: str = "run folder of stage 2", required: bool = True
) -> argparse._ArgumentGroup:
    """The flags of every analysis of a run; returns their group. run_dir: what may be given."""
    data = parser.add_argument_group("data")
    data.add_argument("--run_dir", type=Path, required=required, help=run_dir)
    data.add_argument("--results_dir", type=Path, help="folder for tables and pictures; default: results/<run name>")
    data.add_argument("--styles", nargs="+", help="styles to read beside the clean form; default: all")
    data.add_argument("--max_samples", type=int, help="first rows of the prompt file only")
    return data


def did_you_mean(wrong: str, known: Iterable[str]) -> str:
    """`; did you mean <the closest of known>?`, or nothing where none is close."""
    close = get_close_matches(wrong.lower(), found := {name.lower(): name for name in known}, 1)
    return f"; did you mean {found[close[0]]}?" if close else ""


def run_main(main: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None = None) -> None:
    """Run a script's `main`, stamp what it did, and exit: 0 done, 1 done with failures, 2 a user's error."""
    words = sys.argv[1:] if argv is None else argv
    try:
        stamps.begin(words)
        code = main(argv)
        stamps.finish(words, code)
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


def aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table of texts: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in table]


class _Verbose(argparse.Action):
    def __call__(self, parser: Any, namespace: argparse.Namespace, *_: Any) -> None:
        namespace.verbose = True
        set_verbose(True)


class _Parser(argparse.ArgumentParser):
    words: Sequence[str] = ()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self.words = sys.argv[1:] if args is None else args
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        own = takewhile(lambda word: word != "--", self.words)  # what follows goes to another script
        flags = (word.partition("=")[0] for word in own if word.startswith("--") and " " not in word)
        # argparse reports a misspelt required flag as one that is missing.
        if wrong := next((flag for flag in flags if flag not in self._option_string_actions), None):
            message = f"{wrong}: there is no such flag{did_you_mean(wrong, self._option_string_actions)}"
            raise UnknownFlag(wrong, f"{message}; {self.prog} --help lists the flags")
        raise UserError(f"{message}; {self.prog} --help lists the flags")


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False, argparse.SUPPRESS):  # a default without information
            return action.help
        return super()._get_help_string(action)
