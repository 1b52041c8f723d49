"""Files are packed and written by a thread of its own, while the model works on the next batch."""

from __future__ import annotations

import queue
import threading
from pathlib import Path
from typing import Any

from run_store import pack_rows, save_pt

FILES_WAITING = 2
CAPTURED = "captured"  # a row's key for the result whose fields may still be on their way from a GPU


class BackgroundWriter:
    """Bounded queue of files to write. An error in the thread is raised at the next `write` or at the end."""

    def __init__(self) -> None:
        self._jobs: queue.Queue[Any] = queue.Queue(maxsize=FILES_WAITING)
        self._error: BaseException | None = None
        self.bytes_written = 0
        self._thread = threading.Thread(target=self._work, name="writer", daemon=True)
        self._thread.start()

    def write(self, path: Path, rows: list[dict[str, Any]], shared: dict[str, Any], pad_token_id: int) -> None:
        """Queue one file; waits while the queue is full."""
        self._raise_error()
        self._jobs.put((path, rows, shared, pad_token_id))

    def close(self) -> None:
        """Wait until all is written. Raises what went wrong, if anything did."""
        self._jobs.put(None)
        self._thread.join()
        self._raise_error()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            if self._error is not None:
                continue  # keep taking jobs, or `write` would wait for ever
            try:
                path, rows, shared, pad_token_id = job
                save_pt(path, pack_rows([_whole(row) for row in rows], shared, pad_token_id))
                self.bytes_written += path.stat().st_size
            except BaseException as error:
                self._error = error

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error


def _whole(row: dict[str, Any]) -> dict[str, Any]:
    """The row with its captured fields; a row that was read from a file has them already."""
    captured = row.pop(CAPTURED, None)
    return row if captured is None else row | captured.fields
