"""The fields of a .pt file, one table: it drives writing, reading, checking, the size estimate and docs/DATA_FORMAT.md.

A new field needs one line in `FIELDS`. Fields that share a letter must agree in its size.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from command_line import UserError

if TYPE_CHECKING:
    import torch

SCHEMA_VERSION = 3
LAYER_NAME = re.compile(r"layer_\d+")
MODEL = "the model's dtype"
ITEM_BYTES = {"int64": 8, "bool": 1, "float16": 2, "float32": 4}
# Letter of an axis: (what one place on it is, what all of them are). `+` is L+1.
AXES = {
    "B": ("row", "rows"),
    "S": ("token", "tokens"),
    "R": ("region", "regions"),
    "L": ("layer", "layers"),
    "+": ("layer", "layers"),
    "H": ("head", "heads"),
    "P": ("region", "pooled regions"),
    "D": ("unit", "hidden size"),
    "F": ("neuron", "neurons"),
    "T": ("position", "token positions"),
    "k": ("rank", "logits"),
    "G": ("generated token", "generated tokens"),
    "A": ("accepted answer", "accepted answers"),
}
PADDED_RIGHT = "GA"
RUN_AXES = "LHDFk"  # these must also agree between the files of a run


@dataclass(frozen=True)
class Field:
    """One key of a .pt file.

    axes: its letters; with a B it has a value for each row, without one it belongs to the file; "": no size. `dtype` is
    that of a tensor, or says what a list holds. S and T are padded on the left with `pad`, G and A on the right.
    row_name: what `pack_rows` calls the value of one row, if not by the key. by_layer: a dict {layer_5: tensor}.
    """

    axes: str
    dtype: str
    about: str
    row_name: str = ""
    pad: float = 0
    by_layer: bool = False

    @property
    def is_tensor(self) -> bool:
        """Whether the field is a tensor, or a tensor by layer, and not a list."""
        return self.dtype in ITEM_BYTES or self.dtype == MODEL


FIELDS = {
    "original_indices": Field("B", "int", "position of the row in the prompt file, from 0", "original_index"),
    "element_index": Field("B", "int or str", "the row's own id"),
    "prompts": Field("B", "str", "the prompt's text", "prompt"),
    "responses": Field("B", "str", "the generated text alone", "response"),
    "final_predictions": Field("B", "str", "prompt and response decoded together", "final_prediction"),
    "finish_reasons": Field("B", "str", "`eos`, `stop` or `length`; `given`: the response was made elsewhere, and "
                            "nothing is known of its end", "finish_reason"),
    "response_token_counts": Field("B", "int", "tokens generated", "response_token_count"),
    "input_ids": Field("BS", "int64", "the prompt as the model saw it; pads are the tokenizer's pad token"),
    "attention_mask": Field("BS", "bool", "False at a pad"),
    "regions": Field("R", "str", "`all` `last` `context` `instruction` `task` `first`, then `edited` (in the clean run "
                     "`edited:<style>` for each style)"),
    "region_mask": Field("BSR", "bool", "which tokens lie in which region; regions may overlap, pads lie in none"),
    "span_mass": Field("LBHRR", "float16", "attention from the mean query of one region to all keys of another"),
    "attention_windows": Field("L", "int", "keys a query may see, itself among them; 0: all before it, -1: unknown"),
    "attention_entropy": Field("LBHR", "float16", "with `--entropy`: entropy of attention over log(visible keys), mean "
                               "over a region's queries"),
    "pooled_regions": Field("P", "str", "the regions of the two fields below"),
    "hidden_pooled": Field("+BPD", MODEL, "residual stream, mean over a region's tokens; layer 0 is the embeddings; "
                           "in 16 bits with `--pooled_dtype`"),
    "mlp_pooled": Field("LBPF", "float16", "with `--neurons`: MLP activations (input of `down_proj`), mean over a "
                        "region's tokens"),
    "gate_pooled": Field("LBPF", "float16", "with `--gates`: output of the MLP's activation function (`act_fn`), the "
                         "same mean"),
    "topk_vals": Field("BTk", "float32", "largest next-token logits at the last prompt token (T = 1), or with "
                       "`--topk_positions all` at every token (T = S)"),
    "topk_indices": Field("BTk", "int64", "token ids of these logits"),
    "logsumexp": Field("BT", "float32", "log of the sum of the exponentials of all logits"),
    "hidden_states": Field("BSD", MODEL, "residual stream of every token, for `--raw_layers`", by_layer=True),
    "attentions": Field("BHSS", MODEL, "attention of every head, query by key, for `--raw_layers`", by_layer=True),
    "response_samples": Field("B", "list of str", "with `--num_samples`: every response, `responses` the first"),
    "response_ids": Field("BG", "int64", "with `--response_logprobs`: the generated tokens; -1 after the last", pad=-1),
    "response_logprobs": Field("BG", "float32", "log probability of each; NaN after the last", pad=math.nan),
    "normal_response_logprob": Field("B", "float", "with `--response_logprobs`: log probability of the clean form's "
                                     "response after this prompt; NaN if there is none"),
    "normal_response_token_count": Field("B", "int", "tokens of that response"),
    "response_logprob_under_normal": Field("B", "float", "with `--cross_logprobs`: log probability of this response "
                                           "after the clean form's prompt; NaN if there is none"),
    "answer_logprobs": Field("BA", "float32", "with `--answer_logprobs`: log probability of each accepted answer of "
                             "the row after this prompt; NaN after the last", pad=math.nan),
    "answer_token_counts": Field("BA", "int64", "tokens of each accepted answer; 0 after the last"),
    "style": Field("", "str", "the style"),
    "topk_positions": Field("", "str", "`last` or `all`: see `topk_vals`"),
}  # fmt: skip
ROW_NAMES = {field.row_name or key: key for key, field in FIELDS.items()}
REFERENCE_FIELDS = ("input_ids", "attention_mask", "attentions")  # tensors that are read of the reference format


def fields_table() -> str:
    """The table of docs/DATA_FORMAT.md, one line per field."""
    lines = ["| key | shape, dtype | what |", "| --- | --- | --- |"]
    for key, field in FIELDS.items():
        shape = f"[{','.join(field.axes.replace('+', '1'))}]".replace("[1,", "[L+1,")
        kind = f"list of {field.axes}: {field.dtype}" if field.axes else field.dtype
        if field.is_tensor:
            kind = f"{f'{{`layer_i`: {shape}}}' if field.by_layer else shape} {field.dtype}"
        lines.append(f"| `{key}` | {kind} | {field.about} |")
    return "\n".join(lines) + "\n"


# --- sizes


def row_bytes(sizes: dict[str, int], model_itemsize: int, count: dict[str, float]) -> int:
    """Bytes of one row's tensors. `sizes`: length of each axis; fields with an axis that is not there do not count.

    count: how many of a field there are, if not one: 0 if it is not captured, the raw layers of a field by layer, one
    half if it is stored in half as many bytes.
    """
    known = sizes | {"B": 1, "+": sizes["L"] + 1}
    total = 0.0
    for key, field in FIELDS.items():
        if field.is_tensor and known.keys() >= {*field.axes}:
            item = ITEM_BYTES.get(field.dtype, model_itemsize)
            total += count.get(key, 1) * item * math.prod(known[axis] for axis in field.axes)
    return int(total)


def axis_sizes(content: dict[str, Any], path: Path) -> dict[str, tuple[int, str]]:
    """{letter of an axis: (size, the field it was read from)}. Raises UserError if two fields of a file disagree."""
    _check_fields(content, path)
    found: dict[str, tuple[int, str]] = {}
    for key, axes, shape in _shapes(content, path):
        if len(shape) != len(axes):
            raise UserError(f"{path}: {key} has {len(shape)} axes, not {len(axes)}; delete it and run stage 2 again")
        for axis, length in zip(axes, shape, strict=True):
            name, size = ("L", length - 1) if axis == "+" else (axis, length)
            known, other = found.setdefault(name, (size, key))
            if size != known:
                raise UserError(
                    f"{path}: {key} is of {size} {AXES[name][1]}, {other} of {known}; "
                    "the file is damaged: delete it and run stage 2 again"
                )
    if "region_mask" in content and not bool(content["attention_mask"].any(1).all()):
        raise UserError(f"{path}: holds a prompt without a token; delete it and run stage 2 again")
    return found


def _check_fields(content: dict[str, Any], path: Path) -> None:
    of_regions = ("input_ids", "attention_mask", "regions", "region_mask")
    needed = [("hidden_pooled", "pooled_regions"), ("mlp_pooled", "pooled_regions"), ("gate_pooled", "pooled_regions")]
    needed += [(key, other) for key in ("region_mask", "span_mass") for other in of_regions]
    if missing := [(key, other) for key, other in needed if key in content and content.get(other) is None]:
        raise UserError(f"{path}: has {missing[0][0]} but no {missing[0][1]}; delete it and run stage 2 again")
    if "span_mass" in content and (lost := {"all", "last"} - {*content["regions"]}):
        raise UserError(f"{path}: its regions lack {min(lost)!r}; delete it and run stage 2 again")
    for key in ("original_indices", "attention_windows"):
        numbers = content.get(key, [])
        if not isinstance(numbers, list) or not all(type(number) is int for number in numbers):
            raise UserError(f"{path}: its {key} are not a list of whole numbers; delete it and run stage 2 again")


def _shapes(content: dict[str, Any], path: Path) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(field, its letters, its shape) of everything in a file that has a size."""
    is_reference = "region_mask" not in content  # its other tensors have shapes of their own
    for key, field in FIELDS.items():
        if key not in content or not field.axes or (is_reference and field.axes != "B" and key not in REFERENCE_FIELDS):
            continue
        value = content[key]
        if isinstance(value, dict) and (odd := [name for name in value if not LAYER_NAME.fullmatch(str(name))]):
            raise UserError(f"{path}: {key} holds {odd[0]!r}, not layer_0, layer_1 …; run stage 2 again")
        parts = {f"{key}[{name!r}]": one for name, one in value.items()} if isinstance(value, dict) else {key: value}
        for name, part in parts.items():
            if isinstance(part, list):
                yield name, field.axes, (len(part),)
            elif (shape := getattr(part, "shape", None)) is not None:
                yield name, field.axes, tuple(shape)
            else:
                raise UserError(f"{path}: {name} is no tensor or list; delete the file and run stage 2 again")


# --- rows of a file, files of rows


def pack_rows(rows: list[dict[str, Any]], shared: dict[str, Any], pad_token_id: int) -> dict[str, Any]:
    """Content of a .pt file from per-row results, left-padded to the longest prompt.

    A row holds the fields of the file without their B axis: `input_ids` [S], `span_mass` [L,H,R,R], `hidden_states`
    {`layer_i`: [S,D]} … `shared` holds the keys that belong to the file.
    """
    if unequal := [row["original_index"] for row in rows if row.keys() != rows[0].keys()]:
        raise ValueError(f"rows {unequal} have other fields than the first one")
    content: dict[str, Any] = dict(shared)
    for name, first in rows[0].items():
        key = ROW_NAMES.get(name, name)
        field = FIELDS.get(key, Field("B", "", ""))
        pad = pad_token_id if key == "input_ids" else field.pad
        values = [row[name] for row in rows]
        if isinstance(first, dict):
            content[key] = {layer: _stack([value[layer] for value in values], field.axes, pad) for layer in first}
        else:
            content[key] = _stack(values, field.axes, pad) if hasattr(first, "shape") else values
    return content


def unpack_rows(content: dict[str, Any], part: slice = slice(None)) -> list[dict[str, Any]]:
    """The per-row results (or a `part` of them) that `pack_rows` packed: its inverse, to complete a file later."""
    rows: list[dict[str, Any]] = []
    for position in range(len(content["attention_mask"]))[part]:
        real = content["attention_mask"][position]
        row: dict[str, Any] = {}
        for key, value in content.items():
            field = FIELDS.get(key, Field("B", "", ""))
            if "B" not in field.axes:
                continue
            if isinstance(value, dict):
                row[key] = {layer: _unpad(tensor[position], field, real) for layer, tensor in value.items()}
            elif isinstance(value, list):
                row[field.row_name or key] = value[position]
            else:
                row[key] = _unpad(value.select(field.axes.index("B"), position), field, real)
        rows.append(row)
    return rows


def _stack(values: list[torch.Tensor], axes: str, pad: float) -> torch.Tensor:
    """One tensor of the rows on the B axis; what differs in size is padded with `pad`, on its side."""
    batch = axes.index("B")
    shape = [max(sizes) for sizes in zip(*(value.shape for value in values), strict=True)]
    whole = values[0].new_full([*shape[:batch], len(values), *shape[batch:]], pad)
    own_axes = axes.replace("B", "")
    for place, value in enumerate(values):
        at = [
            slice(0, size) if letter in PADDED_RIGHT else slice(longest - size, None)
            for letter, size, longest in zip(own_axes.ljust(value.ndim), value.shape, shape, strict=True)
        ]
        whole.select(batch, place)[tuple(at)] = value
    return whole


def _unpad(value: torch.Tensor, field: Field, real: torch.Tensor) -> torch.Tensor:
    """The value of one row without its pads; `real` [S] marks its tokens."""
    for axis, letter in enumerate(field.axes.replace("B", "")):
        if letter == "S" or (letter == "T" and value.shape[axis] == len(real)):
            value = value.index_select(axis, real.nonzero()[:, 0])
        elif letter in PADDED_RIGHT:
            is_pad = value.isnan() if math.isnan(field.pad) else value == field.pad
            value = value[: int((~is_pad).sum())]
    return value
