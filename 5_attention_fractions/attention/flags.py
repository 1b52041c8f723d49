"""Command-line flags that mean the same in every script of this stage."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

FLAGS: dict[str, dict[str, Any]] = {
    "--first_token": {
        "choices": ("excluded", "included"),
        "default": "excluded",
        "help": "rows whose region (mostly the edited words) holds the first token of the sequence, the attention sink "
        "of most models: left out of what is measured at that region, or kept",
    },
    "--maths_items": {
        "type": Path,
        "help": "scored answers, for flips and wrong answers; default: maths_ and answers_items.csv in results_dir",
    },
    "--split_tokens": {
        "type": int,
        "default": 1,
        "help": "most tokens by which a typo and `split` may differ; -1: any",
    },
    "--tokenizer": {"help": "model name or folder; only for files that hold no region_mask"},
}


def add_shared(group: argparse._ArgumentGroup, *names: str) -> None:
    """Add some of FLAGS to a group."""
    for name in names:
        group.add_argument(name, **FLAGS[name])
