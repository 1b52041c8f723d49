"""Files that appear whole or not at all: text, JSON, CSV and figures are written beside and then renamed."""

from __future__ import annotations

import glob
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from command_line import UserError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Give a temporary path in the folder of `path`; on success it becomes `path`, on failure it is removed.

    The folder is made where it is missing. Raises UserError where the disk refuses (full, read-only, no right).
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # The suffix stays last, since savefig and others choose the format by it.
        handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=f".part{path.suffix}", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        os.chmod(temporary, 0o666 & ~_umask())
        with open(temporary, "rb+") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; free space or choose another folder"
        ) from error
    finally:
        if temporary is not None:
            with suppress(OSError):
                temporary.unlink()


def remove_leftovers(path: str | Path) -> None:
    """Remove what killed writers of `path` left beside it. Only for a caller that knows nobody is writing it now."""
    path = Path(path)
    for leftover in path.parent.glob(f".{glob.escape(path.stem)}.*.part{path.suffix}"):
        leftover.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8; lone surrogates are escaped rather than fatal."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: str | Path, value: Any, indent: int | None = 2) -> None:
    """Write `value` as JSON in UTF-8 with a final newline."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=indent) + "\n")


def write_csv(path: str | Path, table: pd.DataFrame) -> None:
    """Write a table as UTF-8 CSV with one header row and no index column."""
    with atomic_path(path) as temporary:
        table.to_csv(temporary, index=False, encoding="utf-8", errors="backslashreplace", lineterminator="\n")


def save_figure(path: str | Path, figure: Figure, dpi: int = 150) -> None:
    """Save a matplotlib figure, without cut labels, and close it."""
    import matplotlib.pyplot as plt

    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=dpi, bbox_inches="tight")
    plt.close(figure)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
