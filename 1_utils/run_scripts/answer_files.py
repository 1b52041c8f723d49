"""The tables of scored answers in a results folder: of stage 3, of stage 4, or of both for a mixed prompt file."""

from __future__ import annotations

from pathlib import Path

from stamps import note_read

ITEM_FILES = ("maths_items.csv", "answers_items.csv")
# Over both stages' answers, else those of the one stage.
SUMMARY_FILES = ("accuracy_summary.csv", "maths_summary.csv", "answers_summary.csv")


def item_files(folder: Path) -> list[Path]:
    """The item tables that are in a results folder; notes that the script reads them, or would if they were there."""
    for name in ITEM_FILES:
        note_read(folder / name)
    return [folder / name for name in ITEM_FILES if (folder / name).is_file()]


def first_there(folder: Path, names: tuple[str, ...]) -> Path:
    """The first of the files that is in the folder, else the last of them."""
    return next((folder / name for name in names if (folder / name).is_file()), folder / names[-1])
