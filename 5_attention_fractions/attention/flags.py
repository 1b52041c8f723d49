"""Command-line flags that mean the same in every script of this stage."""

from __future__ import annotations

import argparse


def add_first_token(group: argparse._ArgumentGroup) -> None:
    """The flag `--first_token`."""
    group.add_argument(
        "--first_token",
        choices=("excluded", "included"),
        default="excluded",
        help="rows whose region (mostly the edited words) holds the first token of the sequence, the attention sink of "
        "most models: left out of what is measured at that region, or kept",
    )
