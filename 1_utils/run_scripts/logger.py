"""One logger for every script: it writes to standard error, without breaking a tqdm bar.

`info` is for what a user must know (a line per step, what was written), `warning` for a result that is missing or
doubtful, `debug` for everything else: it shows with `--verbose`, which every script has.
"""

from __future__ import annotations

import logging
import sys


class _ConsoleHandler(logging.Handler):
    """Writes above a running tqdm bar instead of through it; warnings and errors with their level."""

    def emit(self, record: logging.LogRecord) -> None:
        level = "" if record.levelno in (logging.DEBUG, logging.INFO) else f"{record.levelname.lower()}: "
        message = level + self.format(record)
        if tqdm := sys.modules.get("tqdm"):  # no bar runs before a script has imported it
            tqdm.tqdm.write(message, file=sys.stderr)
        else:
            print(message, file=sys.stderr)


_ALL = logging.getLogger("error_interp")  # parent of every script's logger
_ALL.addHandler(_ConsoleHandler())
_ALL.propagate = False
_ALL.setLevel(logging.INFO)


def get_logger(name: str | None = None) -> logging.Logger:
    """The logger that all scripts share; with a name, its child of that name."""
    return _ALL.getChild(name) if name else _ALL


def set_verbose(verbose: bool) -> None:
    """Show `debug` messages of all loggers, or not."""
    _ALL.setLevel(logging.DEBUG if verbose else logging.INFO)
