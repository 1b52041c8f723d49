"""One logger for every script: the console (without breaking a tqdm bar) and, where asked for, a file."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

CONSOLE_FORMAT = "%(levelname_lower)s%(message)s"
FILE_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class _ConsoleHandler(logging.Handler):
    """Writes above a running tqdm bar instead of through it; information plain, the rest with its level."""

    def emit(self, record: logging.LogRecord) -> None:
        record.levelname_lower = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        message = self.format(record)
        if "tqdm" in sys.modules:
            from tqdm import tqdm

            tqdm.write(message, file=sys.stderr)
        else:
            print(message, file=sys.stderr)


def get_logger(name: str = "error_interp", log_file: str | Path | None = None, verbose: bool = False) -> logging.Logger:
    """Logger that writes to standard error and, with `log_file`, appends to that file too (made where missing).

    Calling it again with the same name adds nothing twice.
    """
    logger = logging.getLogger(name)
    logger.setLevel(logging.DEBUG if verbose else logging.INFO)
    logger.propagate = False
    if not any(isinstance(handler, _ConsoleHandler) for handler in logger.handlers):
        console = _ConsoleHandler()
        console.setFormatter(logging.Formatter(CONSOLE_FORMAT))
        logger.addHandler(console)
    if log_file is not None:
        path = Path(log_file).resolve()
        known = {getattr(handler, "baseFilename", None) for handler in logger.handlers}
        if str(path) not in known:
            path.parent.mkdir(parents=True, exist_ok=True)
            to_file = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
            to_file.setFormatter(logging.Formatter(FILE_FORMAT))
            logger.addHandler(to_file)
    return logger
