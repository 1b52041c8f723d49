"""Files that appear whole or not at all: text, JSON, CSV and figures are written beside and then renamed.

`read_csv` is the project's one reader of CSV tables.
"""

from __future__ import annotations

import glob
import json
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from command_line import UserError, one_line
from stamps import note_written

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

FLOAT_FORMAT = "%.6g"  # of CSV tables: more digits than any of these numbers is known to
TEXT_COLUMNS = ("style", "element_index", "template")  # names: a style may be called `None`, `NA`, `nan` or `007`


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Give a temporary path in the folder of `path`; on success it becomes `path`, on failure it is removed.

    The folder is made where it is missing. Raises UserError where the disk refuses (full, read-only, no right).
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        make_folder(path.parent)
        # The suffix stays last, since savefig and others choose the format by it.
        handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=f".part{path.suffix}", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        os.chmod(temporary, 0o666 & ~_umask())
        with open(temporary, "rb+") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
        note_written(path)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; free space or choose another folder"
        ) from error
    finally:
        if temporary is not None:
            with suppress(OSError):
                temporary.unlink()


def make_folder(folder: Path) -> None:
    """Make a folder and those above it. Raises UserError if a file is in its place or above it, else OSError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        file = next((path for path in (folder, *folder.parents) if path.is_file()), folder)
        raise UserError(f"{file}: is a file, but a folder is to be made there; remove it or choose another") from None


def file_word(style: str) -> str:
    """A style's name as a part of a file name."""
    return re.sub(r"[^\w.-]", "_", style)


def gigabytes(size: int) -> str:
    """A size in GB, or MB where it is small."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def beside(path: Path, ending: str) -> Path:
    """Where a further file of `path` lies: <name><ending> in its folder."""
    return path.with_name(path.stem + ending)


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
    """Write a table as UTF-8 CSV with one header row and no index column; floats with FLOAT_FORMAT's digits."""
    options: dict[str, Any] = {"encoding": "utf-8", "errors": "backslashreplace", "lineterminator": "\n"}
    with atomic_path(path) as temporary:
        table.to_csv(temporary, index=False, float_format=FLOAT_FORMAT, **options)


def write_or_remove(path: Path, table: pd.DataFrame) -> bool:
    """Write a table, or remove what an earlier run wrote if it has no rows. Returns whether it has some."""
    if table.empty:
        path.unlink(missing_ok=True)
        return False
    write_csv(path, table)
    return True


def read_csv(path: str | Path, columns: Sequence[str] | None = None, hint: str = "run its stage again") -> pd.DataFrame:
    """Read a CSV table, with `columns` only those. Only an empty cell is missing; TEXT_COLUMNS stay text.

    Raises UserError, which ends in `hint`, if the file is missing or damaged, lacks one of `columns`, or has a row
    without a whole `original_index` although it has that column.
    """
    import pandas as pd

    try:
        table = pd.read_csv(
            path,
            usecols=columns,
            dtype=dict.fromkeys(TEXT_COLUMNS, str),
            low_memory=False,
            keep_default_na=False,
            na_values=[""],
        )
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {hint}") from None
    except (ValueError, OSError) as error:
        needs = f"needs the columns {', '.join(columns)}" if columns else "cannot be read"
        raise UserError(f"{path}: {needs} ({one_line(str(error), 100)}); {hint}") from None
    if len(table) and "original_index" in table and table["original_index"].dtype.kind not in "iu":
        raise UserError(f"{path}: its original_index must be a whole number in every line; {hint}")
    return table


def save_figure(path: str | Path, figure: Figure, dpi: int = 110) -> None:
    """Save a matplotlib figure, without cut labels, and close it."""
    import matplotlib.pyplot as plt

    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=dpi, bbox_inches="tight")
    plt.close(figure)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
