"""Write the content of a .pt file as safetensors or Parquet, and read it back: lossless, one file for one file.

safetensors: the tensors, padded as they are, a raw layer as `hidden_states.layer_5`; everything that is no tensor is
JSON in the file's metadata. Parquet: one line a prompt without padding; a tensor is a flat list beside `<field>_shape`,
bfloat16 as float32 (exact); what belongs to the whole file is JSON in the schema's metadata under `error_interp`.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from command_line import UserError
from pt_fields import FIELDS, LAYER_NAME, pack_rows, unpack_rows
from safetensors import safe_open
from safetensors.torch import save_file

ROWS_AT_ONCE = 8  # of a Parquet row group
META = b"error_interp"
Content = dict[str, Any]


def write_file(content: Content, path: Path, form: str) -> None:
    """Write the content of a .pt file to `path` in a format. Raises UserError for what the format cannot hold."""
    (write_safetensors if form == "safetensors" else write_parquet)(content, path)


def read_file(path: Path, form: str) -> Content:
    """The content of the .pt file that was written to `path`."""
    return (read_safetensors if form == "safetensors" else read_parquet)(path)


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


# --- Parquet


def write_parquet(content: Content, path: Path) -> None:
    """One line a prompt; needs pyarrow."""
    arrow, parquet = _arrow()
    if "attention_mask" not in content:
        raise UserError("a file of the reference format has no rows to write as Parquet; use --format safetensors")
    real, ids = content["attention_mask"], content["input_ids"]
    shared = {key: value for key, value in content.items() if "B" not in FIELDS[key].axes} if _known(content) else {}
    meta: dict[str, Any] = {"shared": shared, "pad_token_id": int(ids[~real][0]) if not bool(real.all()) else 0}
    rows = unpack_rows(content)
    first = rows[0]
    meta["dtypes"] = {name: str(one.dtype).removeprefix("torch.") for name, one in _tensors(first).items()}
    meta["json"] = [
        name
        for name, value in first.items()
        if not isinstance(value, torch.Tensor | dict) and len({type(row[name]) for row in rows}) > 1
    ]
    writer = None
    for start in range(0, len(rows), ROWS_AT_ONCE):
        columns = _columns(arrow, rows[start : start + ROWS_AT_ONCE], meta)
        table = arrow.table(columns).replace_schema_metadata({META: json.dumps(meta).encode()})
        writer = writer or parquet.ParquetWriter(path, table.schema, compression="zstd")
        writer.write_table(table)
    if writer:
        writer.close()


def read_parquet(path: Path) -> Content:
    """The content of the .pt file, padded again; needs pyarrow."""
    _, parquet = _arrow()
    rows: list[dict[str, Any]] = []
    with parquet.ParquetFile(path) as file:
        meta = json.loads(file.schema_arrow.metadata[META])
        for batch in file.iter_batches(ROWS_AT_ONCE):
            rows += [_row(batch, place, meta) for place in range(batch.num_rows)]
    return pack_rows(rows, meta["shared"], meta["pad_token_id"])


def _row(batch: Any, place: int, meta: dict[str, Any]) -> dict[str, Any]:
    """A row as `unpack_rows` has it."""
    row: dict[str, Any] = {}
    shapes = {f"{name}_shape" for name in meta["dtypes"]}
    for name in batch.schema.names:
        value = batch[name][place]
        if name in meta["dtypes"]:
            array = value.values.to_numpy(zero_copy_only=False).copy().reshape(batch[f"{name}_shape"][place].as_py())
            tensor = torch.from_numpy(array).to(getattr(torch, meta["dtypes"][name]))
            key, _, layer = name.partition(".")
            if layer:
                row.setdefault(key, {})[layer] = tensor
            else:
                row[name] = tensor
        elif name not in shapes:
            row[name] = json.loads(value.as_py()) if name in meta["json"] else value.as_py()
    return row


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


def _arrow() -> tuple[Any, Any]:
    try:
        return importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise UserError("--format parquet needs the package pyarrow: pip install pyarrow") from None
