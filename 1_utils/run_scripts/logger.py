"""One logger for every script: the console (without breaking a tqdm bar) and, where asked for, a file.

`info` is for what a user must know (a line per step, what was written), `warning` for a result that is missing or
doubtful, `debug` for everything else: it shows with `--verbose`, which every script has.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

CONSOLE_FORMAT = "%(levelname_lower)s%(message)s"
FILE_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_ALL = logging.getLogger("error_interp")  # parent of every script's logger


class _ConsoleHandler(logging.Handler):
    """Writes above a running tqdm bar instead of through it; warnings and errors with their level."""

    def emit(self, record: logging.LogRecord) -> None:
        plain = record.levelno in (logging.DEBUG, logging.INFO)
        record.levelname_lower = "" if plain else f"{record.levelname.lower()}: "
        message = self.format(record)
        if "tqdm" in sys.modules:
            from tqdm import tqdm

            tqdm.write(message, file=sys.stderr)
        else:
            print(message, file=sys.stderr)


def get_logger(name: str = "error_interp", log_file: str | Path | None = None) -> logging.Logger:
    """Logger that writes to standard error and, with `log_file`, appends to that file too (made where missing).

    Calling it again with the same name adds nothing twice.
    """
    if not _ALL.handlers:
        console = _ConsoleHandler()
        console.setFormatter(logging.Formatter(CONSOLE_FORMAT))
        _ALL.addHandler(console)
        _ALL.propagate = False
        _ALL.setLevel(logging.INFO)
    logger = _ALL if name == _ALL.name else _ALL.getChild(name)
    if log_file is not None:
        path = Path(log_file).resolve()
        known = {getattr(handler, "baseFilename", None) for handler in logger.handlers}
        if str(path) not in known:
            path.parent.mkdir(parents=True, exist_ok=True)
            to_file = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
            to_file.setFormatter(logging.Formatter(FILE_FORMAT))
            logger.addHandler(to_file)
    return logger


def set_verbose(verbose: bool) -> None:
    """Show `debug` messages of all loggers, or not."""
    get_logger().setLevel(logging.DEBUG if verbose else logging.INFO)
