"""Read the predictions of a run, one at a time, whatever its size; as a script, print them or write them to a CSV.

Reads   outputs/<run>/<style>/activations_*.pt (or one style's folder, or one .pt file; the reference format too)
Writes  with --csv: style, original_index, element_index, sample, prompt, response, final_prediction

    python 1_utils/run_scripts/read_predictions.py --run_dir outputs/demo_maths --styles normal swap --max_samples 5
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from command_line import make_parser, run_main
from file_output import atomic_path
from run_store import Run, open_run


@dataclass(frozen=True)
class Prediction:
    """One response. `sample` counts the samples of a prompt from 0. `response` is None if a file of the reference
    format does not show where the prompt ends."""

    style: str
    original_index: int
    element_index: int | str
    sample: int
    prompt: str | None
    response: str | None
    final_prediction: str


def iter_predictions(run: Run | str | Path, styles: Sequence[str] | None = None) -> Iterator[Prediction]:
    """Every prediction of a run, style by style, in the prompt file's order; one .pt file in memory at a time.

    Raises UserError for a style the run does not have, and for a damaged file.
    """
    run = run if isinstance(run, Run) else open_run(run)
    run.chosen(styles)  # raises for one that it does not have
    for style in styles or run.styles:
        for _, content in run.batches(style):
            yield from predictions_of(content, style, run)


def predictions_of(content: dict[str, Any], style: str, run: Run | None = None) -> Iterator[Prediction]:
    """The predictions in the content of one .pt file. `run` supplies prompts and ids that old files lack."""
    for position, index in enumerate(content["original_indices"]):
        row = run.row(index) if run else {}
        prompt = _item(content, "prompts", position, row.get(style))
        final = str(_item(content, "final_predictions", position, ""))
        element = _item(content, "element_index", position, row.get("element_index", index + 1))
        responses = _item(content, "response_samples", position, None)
        if responses is None:
            responses = [_item(content, "responses", position, _response_within(final, prompt))]
        for sample, response in enumerate(responses):
            whole = final if sample == 0 else final.removesuffix(responses[0]) + response
            yield Prediction(style, index, element, sample, prompt, response, whole)


def _item(content: dict[str, Any], key: str, position: int, default: Any) -> Any:
    values = content.get(key)
    return default if values is None else values[position]


def _response_within(final: str, prompt: str | None) -> str | None:
    """The text after the prompt, where the prompt can be found in the decoded whole; else None (never a guess)."""
    if not prompt:
        return None
    start = final.find(prompt.strip())
    return final[start + len(prompt.strip()) :] if start >= 0 else None


# --- script


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--run_dir", type=Path, required=True, help="run folder, style folder or .pt file")
    parser.add_argument("--styles", nargs="+", help="styles to read; default: all")
    parser.add_argument("--max_samples", type=int, help="predictions of each style")
    parser.add_argument("--csv", type=Path, help="write all to this CSV instead of printing")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Print or write predictions."""
    args = parse_args(argv)
    chosen = _first_of_each(iter_predictions(args.run_dir, args.styles), args.max_samples)
    if args.csv is None:
        for one in chosen:
            print(f"--- {one.style} #{one.element_index}\n{one.prompt}\n>>> {one.response}")
        return 0
    with (
        atomic_path(args.csv) as temporary,
        open(temporary, "w", newline="", encoding="utf-8", errors="backslashreplace") as handle,
    ):
        writer = csv.DictWriter(handle, [column.name for column in fields(Prediction)])
        writer.writeheader()
        writer.writerows(asdict(one) for one in chosen)
    print(args.csv)
    return 0


def _first_of_each(predictions: Iterator[Prediction], limit: int | None) -> Iterator[Prediction]:
    seen: dict[str, int] = {}
    for one in predictions:
        seen[one.style] = seen.get(one.style, 0) + 1
        if limit is None or seen[one.style] <= limit:
            yield one


if __name__ == "__main__":
    run_main(main)
