"""Write a run of stage 2 in a format that other tools open: every .pt file as one safetensors, Parquet or Arrow file.

Reads   outputs/<run>/<style>/activations_*.pt, run.json, prompts.json
Writes  <output_dir>/<style>/activations_*.safetensors (.parquet, .arrow), <output_dir>/manifest.json: the files, what
        is in them, and the run's settings. Each file is read back and compared with the .pt file, one at a time. With
        --format datasets, `datasets.load_from_disk` opens <output_dir> as a DatasetDict of the styles.

    python 1_utils/run_scripts/export_run.py --run_dir outputs/demo/facts --format safetensors \\
        --output_dir outputs/export
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from command_line import UserError, make_parser, run_main
from file_output import atomic_path, gigabytes, write_json
from logger import get_logger
from pt_fields import FIELDS, SCHEMA_VERSION
from run_store import open_run

FORMATS = ("safetensors", "parquet", "datasets")  # as in export_formats.py, which imports torch


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--run_dir", type=Path, required=True, help="run folder, style folder or .pt file")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for the files")
    needs = "parquet needs the package pyarrow, datasets that of its name"
    parser.add_argument("--format", choices=FORMATS, default=FORMATS[0], help=needs)
    parser.add_argument("--styles", nargs="+", help="styles to export beside the clean form; default: all")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the files one by one, each read back, and the manifest."""
    args = parse_args(argv)
    from export_formats import SUFFIXES, fingerprint, mixed_fields, read_file, write_dataset, write_file

    run = open_run(args.run_dir)
    log = get_logger()
    manifest: dict[str, Any] = {"format": args.format, "run": run.name, "schema_version": SCHEMA_VERSION, "styles": {}}
    manifest["fields"] = {key: {"axes": field.axes, "about": field.about} for key, field in FIELDS.items()}
    size = 0
    for style in run.chosen(args.styles):
        files = []
        mixed = mixed_fields(run.load(source) for source in run.files(style))
        for source in run.files(style):
            content = run.load(source)
            path = args.output_dir / style / f"{source.stem}.{SUFFIXES[args.format]}"
            with atomic_path(path) as temporary:
                rows, marks = len(content["original_indices"]), fingerprint(content)
                write_file(content, temporary, args.format, mixed)
                del content  # one of the two is in memory
                if fingerprint(read_file(temporary, args.format)) != marks:
                    raise UserError(f"{path}: reads back as other values than {source}; please report this")
            size += path.stat().st_size
            files.append({"name": path.name, "source": source.name, "rows": rows, "bytes": path.stat().st_size})
        if args.format == "datasets":
            write_dataset(args.output_dir / style, [file["name"] for file in files])
        record = {"rows": sum(file["rows"] for file in files), "files": files, "run.json": run.settings(style)}
        manifest["styles"][style] = record
    write_json(args.output_dir / "manifest.json", manifest)
    if args.format == "datasets":
        write_json(args.output_dir / "dataset_dict.json", {"splits": [*manifest["styles"]]})
    if run.prompt_rows:
        write_json(args.output_dir / "prompts.json", run.prompt_rows)
    log.info(f"{args.output_dir}: {gigabytes(size)} in {args.format}, read back and equal to the .pt files")
    return 0


if __name__ == "__main__":
    run_main(main)
