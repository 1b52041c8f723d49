"""Write the content of a .pt file as safetensors, Parquet or Arrow, and read it back: lossless, one file for one file.

safetensors: the tensors, padded as they are, a raw layer as `hidden_states.layer_5`; everything that is no tensor is
JSON in the file's metadata. Parquet and Arrow (of the package datasets): one line a prompt without padding; a tensor is
a flat list beside `<field>_shape`, bfloat16 as float32 (exact); a field whose values have several types is JSON; what
belongs to the whole file is JSON in the schema's metadata under `error_interp`.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from command_line import UserError
from file_output import write_json
from pt_fields import FIELDS, LAYER_NAME, pack_rows, unpack_rows
from safetensors import safe_open
from safetensors.torch import save_file

ROWS_AT_ONCE = 8  # of a Parquet row group, or an Arrow batch
NEEDS = {"parquet": "pyarrow", "datasets": "datasets"}
SUFFIXES = {"safetensors": "safetensors", "parquet": "parquet", "datasets": "arrow"}
META = b"error_interp"
Content = dict[str, Any]


def write_file(content: Content, path: Path, form: str, mixed: Sequence[str] = ()) -> None:
    """Write the content of a .pt file to `path` in a format. Raises UserError for what the format cannot hold.

    mixed: see `mixed_fields`.
    """
    if form == "safetensors":
        write_safetensors(content, path)
    else:
        write_rows(content, path, form, mixed)


def read_file(path: Path, form: str) -> Content:
    """The content of the .pt file that was written to `path`."""
    return read_safetensors(path) if form == "safetensors" else read_rows(path, form)


def fingerprint(content: Content) -> dict[str, str]:
    """Of each field, by name: type, shape and a hash of every value, so that two contents can be compared in turn."""
    marks = {}
    for key, value in content.items():
        for name, one in (_layers(key, value)).items():
            if isinstance(one, torch.Tensor):
                data = one.contiguous().flatten().view(torch.uint8).numpy()
                marks[name] = f"{one.dtype} {tuple(one.shape)} {hashlib.sha256(data.data).hexdigest()}"
            else:
                marks[name] = f"{type(one).__name__} {hashlib.sha256(_json(name, one).encode()).hexdigest()}"
    return marks


def _layers(key: str, value: Any) -> dict[str, Any]:
    """A raw field by layer, as `hidden_states.layer_5`; any other field as it is."""
    is_raw = isinstance(value, dict) and all(isinstance(one, torch.Tensor) for one in value.values())
    return {f"{key}.{name}": one for name, one in value.items()} if is_raw else {key: value}


# --- safetensors


def write_safetensors(content: Content, path: Path) -> None:
    """Tensors under their names, everything else as JSON in the metadata."""
    tensors: dict[str, torch.Tensor] = {}
    others: dict[str, str] = {}
    for key, value in content.items():
        for name, one in _layers(key, value).items():
            if isinstance(one, torch.Tensor):
                tensors[name] = one.contiguous()
            else:
                others[name] = _json(name, one)
    save_file(tensors, path, metadata=others)


def read_safetensors(path: Path) -> Content:
    """As `write_safetensors` wrote it."""
    content: Content = {}
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (no mapping)
            key, _, layer = name.partition(".")
            if LAYER_NAME.fullmatch(layer):
                content.setdefault(key, {})[layer] = file.get_tensor(name)
            else:
                content[name] = file.get_tensor(name)
        content |= {key: json.loads(text) for key, text in (file.metadata() or {}).items()}
    return content


def _json(key: str, value: Any) -> str:
    try:
        return json.dumps(value)
    except TypeError:
        raise UserError(f"{key} holds what is neither tensor nor text nor number; it cannot be exported") from None


# --- Parquet and Arrow: a line a prompt


def mixed_fields(contents: Iterable[Content]) -> list[str]:
    """Names, in a row, of the fields whose values are of several types in a style's files: one column has one type."""
    kinds: dict[str, set[type]] = {}
    for content in contents:
        for key, value in content.items():
            if isinstance(value, list) and key in FIELDS:
                kinds.setdefault(FIELDS[key].row_name or key, set()).update(map(type, value))
    return [name for name, found in kinds.items() if len(found) > 1]


def write_rows(content: Content, path: Path, form: str, mixed: Sequence[str]) -> None:
    """One line a prompt."""
    arrow, parquet = _packages(form)
    if "attention_mask" not in content:
        raise UserError(f"a file of the reference format has no rows to write as {form}; use --format safetensors")
    real, ids = content["attention_mask"], content["input_ids"]
    shared = {key: value for key, value in content.items() if "B" not in FIELDS[key].axes} if _known(content) else {}
    meta: dict[str, Any] = {"shared": shared, "pad_token_id": int(ids[~real][0]) if not bool(real.all()) else 0}
    count, first = len(real), unpack_rows(content, slice(1))[0]
    meta["dtypes"] = {name: str(one.dtype).removeprefix("torch.") for name, one in _tensors(first).items()}
    meta["json"] = [name for name in mixed if name in first]
    writer = None
    for start in range(0, count, ROWS_AT_ONCE):
        columns = _columns(arrow, unpack_rows(content, slice(start, start + ROWS_AT_ONCE)), meta)
        table = arrow.table(columns).replace_schema_metadata({META: json.dumps(meta).encode()})
        if writer is None and form == "parquet":
            writer = parquet.ParquetWriter(path, table.schema, compression="zstd", use_dictionary=False)
        writer = writer or arrow.ipc.new_stream(str(path), table.schema)
        writer.write_table(table)
    if writer:
        writer.close()


def read_rows(path: Path, form: str) -> Content:
    """The content of the .pt file, padded again. Read column by column, so that no number is in memory twice."""
    arrow, parquet = _packages(form)
    with parquet.ParquetFile(path) if form == "parquet" else arrow.memory_map(str(path)) as file:
        table = file if form == "parquet" else arrow.ipc.open_stream(file).read_all()  # is mapped, not copied
        schema = file.schema_arrow if form == "parquet" else table.schema
        meta = json.loads(schema.metadata[META])
        content: Content = dict(meta["shared"])
        shapes = {f"{name}_shape": name for name in meta["dtypes"]}
        for name in (name for name in schema.names if name not in shapes):
            wanted = [name, f"{name}_shape"] if name in meta["dtypes"] else [name]
            column = table.read(columns=wanted) if form == "parquet" else table.select(wanted)
            key, _, layer = name.partition(".")
            rows = [{key: {layer: value} if layer else value} for value in _values(column, name, meta)]
            for packed, value in pack_rows(rows, {}, meta["pad_token_id"]).items():
                content[packed] = content.get(packed, {}) | value if layer else value
            del column
            arrow.default_memory_pool().release_unused()
    return content


def write_dataset(folder: Path, names: Sequence[str]) -> None:
    """What `datasets.load_from_disk` wants beside the Arrow files `names`: the columns' types and the files' order."""
    datasets = importlib.import_module("datasets")
    features = datasets.Dataset.from_file(str(folder / names[0])).features
    datasets.DatasetInfo(features=features).write_to_directory(str(folder))
    size = [[name, (folder / name).stat().st_size] for name in names]
    state: dict[str, Any] = {"_data_files": [{"filename": name} for name in names], "_format_kwargs": {}}
    state |= dict.fromkeys(("_format_type", "_format_columns", "_split")) | {"_output_all_columns": False}
    state["_fingerprint"] = hashlib.sha256(json.dumps(size).encode()).hexdigest()[:16]
    write_json(folder / "state.json", state)


def _values(table: Any, name: str, meta: dict[str, Any]) -> Iterator[Any]:
    """The values of a column, a row each, as `unpack_rows` has them."""
    for batch in table.to_batches():
        for place, value in enumerate(batch[name]):
            if name in meta["dtypes"]:
                shape = batch[f"{name}_shape"][place].as_py()
                array = value.values.to_numpy(zero_copy_only=False).copy().reshape(shape)
                yield torch.from_numpy(array).to(getattr(torch, meta["dtypes"][name]))
            else:
                yield json.loads(value.as_py()) if name in meta["json"] else value.as_py()


def _known(content: Content) -> bool:
    if odd := [key for key in content if key not in FIELDS]:
        raise UserError(f"field {odd[0]!r} is not known, so its rows are not; use --format safetensors")
    return True


def _tensors(row: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of a row, a raw layer as `hidden_states.layer_5`."""
    parts = [_layers(key, value) for key, value in row.items()]
    return {name: one for part in parts for name, one in part.items() if isinstance(one, torch.Tensor)}


def _columns(arrow: Any, rows: list[dict[str, Any]], meta: dict[str, Any]) -> dict[str, Any]:
    columns: dict[str, Any] = {}
    for name, value in rows[0].items():
        if not isinstance(value, torch.Tensor | dict):
            values = [row[name] for row in rows]
            columns[name] = arrow.array([json.dumps(one) for one in values] if name in meta["json"] else values)
    several = [_tensors(row) for row in rows]
    for name in meta["dtypes"]:
        parts = [one[name] for one in several]
        if parts[0].dtype == torch.bfloat16:
            parts = [part.float() for part in parts]
        ends = np.cumsum([0, *(part.numel() for part in parts)])
        flat = np.concatenate([part.numpy().ravel() for part in parts])
        columns[name] = arrow.LargeListArray.from_arrays(arrow.array(ends), arrow.array(flat))
        columns[f"{name}_shape"] = arrow.array([list(part.shape) for part in parts], arrow.list_(arrow.int32()))
    return columns


def _packages(form: str) -> tuple[Any, Any]:
    """pyarrow, and its part for Parquet."""
    try:
        importlib.import_module(NEEDS[form])
        return importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise UserError(f"--format {form} needs the package {NEEDS[form]}: pip install {NEEDS[form]}") from None
