"""The rows of a style by original index, whatever file they lie in, and the clean rows and controls they go with.

    clean, own = StyleRows(run, "normal"), StyleRows(run, "swap")
    pairs = paired_rows(own, clean)
    change = own.field("span_mass", pairs.changed) - clean.field("span_mass", pairs.changed)  # [n, L, H, Q, R]

Arrays have their rows first, in the order asked for. Files are memory-mapped, so only what is asked for is read.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from command_line import UserError
from load_json import CLEAN_KEYS
from logger import get_logger
from pt_fields import AXES, FIELDS
from read_predictions import Prediction, predictions_of
from run_store import Run, row_indices
from style_names import MATCHED, NEUTRAL, SPLIT_STYLE, controlled_style, is_again, is_control
from token_spans import edited_spans

Extract = Callable[[dict[str, Any], Path], dict[str, np.ndarray]]


class StyleRows:
    """The rows of one style. `indices`: their original indices, ascending.

    max_samples: only rows below this one of the prompt file, so that every style keeps the same rows. At most
    `max_open` files stay open. Raises UserError if the run lacks the style or has a row twice.
    """

    def __init__(self, run: Run, style: str, max_samples: int | None = None, max_open: int = 256) -> None:
        run.chosen([style])
        self.run, self.style = run, style
        self._max_open = max_open
        self._open: OrderedDict[Path, dict[str, Any]] = OrderedDict()
        self._places: dict[int, tuple[Path, int]] = {}
        self._files = run.files(style)
        for path in self._files:
            for position, index in enumerate(self._content(path)["original_indices"]):
                if max_samples is not None and index >= max_samples:
                    continue
                if index in self._places:
                    other = self._places[index][0].name
                    raise UserError(f"{path}: row {index} is in {other} too; run stage 2 again into a new folder")
                self._places[index] = (path, position)
        self.indices = sorted(self._places)

    def __contains__(self, index: object) -> bool:
        return index in self._places

    def __len__(self) -> int:
        return len(self.indices)

    def _content(self, path: Path) -> dict[str, Any]:
        if path not in self._open:
            self._open[path] = self.run.load(path)
            while len(self._open) > self._max_open:
                self._open.popitem(last=False)
        self._open.move_to_end(path)
        return self._open[path]

    # --- which fields there are

    def first_content(self) -> dict[str, Any]:
        """Content of the style's first file."""
        return self._content(self._files[0])

    def has(self, key: str) -> bool:
        """Whether the style's files hold the field `key`."""
        return key in self.first_content()

    def regions(self, key: str = "hidden_pooled") -> list[str]:
        """Names on the region axis of a field: `pooled_regions` for pooled ones, else `regions`."""
        return list(self.first_content().get(_region_list(key), []))

    def state_regions(self) -> list[str]:
        """Regions that `states` knows: the pooled ones, and with raw layers every region of the files."""
        content = self.first_content()
        pooled = self.regions() if "hidden_pooled" in content else []
        others = content.get("regions", []) if content.get("hidden_states") else []
        return pooled + [name for name in others if name not in pooled]

    def state_layers(self, region: str) -> list[int]:
        """Layers in which `states` knows a region: all of a pooled one, the raw layers of another."""
        content = self.first_content()
        if "hidden_pooled" in content and region in self.regions():
            return list(range(self.layer_count()))
        return sorted(_raw_layers(content))

    def layer_count(self) -> int:
        """L + 1; without pooled states and attention, the last raw layer + 1."""
        content = self.first_content()
        if "hidden_pooled" in content:
            return int(content["hidden_pooled"].shape[0])
        raw = max(_raw_layers(content), default=-1) + 1
        return max(raw, content["span_mass"].shape[0] + 1) if "span_mass" in content else raw

    # --- arrays

    def extract(self, function: Extract, indices: Sequence[int] | None = None) -> dict[str, np.ndarray]:
        """The arrays [n, ...] that `function(content, path)` makes of each file, for `indices` (default: all rows).

        `function` returns arrays whose first axis has all rows of the file. Raises UserError if the files differ in
        their arrays or the sizes of these.
        """

        def read(content: dict[str, Any], path: Path, positions: list[int]) -> dict[str, np.ndarray]:
            return {key: values[positions] for key, values in function(content, path).items()}

        return self._gather(read, self.indices if indices is None else indices)

    def field(
        self,
        key: str,
        indices: Sequence[int] | None = None,
        region: str | None = None,
        layers: slice | int = slice(None),
    ) -> np.ndarray:
        """A tensor field as one array [n, ...], floats as float32, for `indices` (default: all rows).

        span_mass: [n, L, H, Q, R]; hidden_pooled: [n, L+1, P, D], with a region [n, L+1, D], with an integer `layers`
        [n, P, D]; attention_entropy with a region [n, L, H]; topk_vals [n, T, k]. hidden_states and attentions need an
        integer `layers`: [n, S, D], [n, H, S, S]. Tokens are padded on the left to the longest prompt, those
        generated on the right. Raises UserError if a file lacks the field, the region or the layer.
        """
        chosen = self.indices if indices is None else indices
        if key not in FIELDS or not FIELDS[key].is_tensor:
            raise UserError(f"{key!r} is not a tensor field; `texts` and run.rows(style) have the lists of a run")
        per_row = FIELDS[key].axes.replace("B", "")
        longest = [0] * len(per_row)
        if any(letter in "STG" for letter in per_row):  # sizes that differ between files
            parts = [_pick(self._content(path), path, key, [], region, layers) for path, *_ in self._by_file(chosen)]
            longest = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]

        def read(content: dict[str, Any], path: Path, positions: list[int]) -> dict[str, np.ndarray]:
            part = _pick(content, path, key, positions, region, layers)
            more = [(0, 0)]
            for letter, size, most in zip(per_row, part.shape[1:], longest, strict=False):
                add = most - size if letter in "STG" else 0
                more.append((0, add) if letter == "G" else (add, 0))
            return {key: np.pad(part, more, constant_values=FIELDS[key].pad) if np.any(more) else part}

        return self._gather(read, chosen)[key]

    def axes(self, key: str) -> dict[str, list[Any]]:
        """{name of an axis: what its places are} of `field(key)`, in the order of its axes.

        Rows are their original indices, regions their names, all else is numbered from 0.
        """
        if not self.has(key) or key not in FIELDS or not FIELDS[key].is_tensor:
            raise UserError(f"{self._files[0]}: has no tensor field {key!r}")
        values = [self._content(path)[key] for path in self._files]
        shapes = [(next(iter(one.values())) if isinstance(one, dict) else one).shape for one in values]
        letters = FIELDS[key].axes
        found: dict[str, list[Any]] = {"row": self.indices}
        for letter, size in zip(letters, map(max, zip(*shapes, strict=True)), strict=True):
            names = {"R": "regions", "P": "pooled_regions"}.get(letter)
            places = list(self.first_content()[names]) if names else list(range(size))
            label = AXES[letter][0]
            if letters.count(letter) == 2:
                label = f"{'key' if f'query {label}' in found else 'query'} {label}"
            if letter != "B":
                found[label] = places
        return found

    def states(self, indices: Sequence[int], region: str, layers: slice | int = slice(None)) -> np.ndarray:
        """Mean residual stream [n, L+1, D] of a region, or [n, D] of one of `state_layers`; float32.

        Read from hidden_pooled, or else the mean over the region's tokens in the raw layers. NaN in a layer without a
        raw map and in an empty region. Raises UserError if the files have neither.
        """
        if region not in self.state_regions():
            raise UserError(f"{self.run.path}: no states of {region!r}; it has {', '.join(self.state_regions())}")
        if self.has("hidden_pooled") and region in self.regions():
            return self.field("hidden_pooled", indices, region, layers)

        def read(content: dict[str, Any], path: Path, positions: list[int]) -> dict[str, np.ndarray]:
            raw, column = _raw_layers(content), content["regions"].index(region)
            size = next(iter(raw.values())).shape[-1]
            whole = np.full((len(positions), self.layer_count(), size), np.nan, dtype=np.float32)
            for place, position in enumerate(positions):
                inside = content["region_mask"][position, :, column]
                for layer in raw if isinstance(layers, slice) else [layers]:
                    whole[place, layer] = raw[layer][position][inside].float().mean(0).numpy()
            return {"states": whole[:, layers]}

        return self._gather(read, indices)["states"]

    def _gather(
        self, read: Callable[[dict[str, Any], Path, list[int]], dict[str, np.ndarray]], indices: Sequence[int]
    ) -> dict[str, np.ndarray]:
        """What `read(content, path, positions)` makes of the rows of each file, put together in the order asked for."""
        arrays: dict[str, np.ndarray] = {}
        first: Path | None = None
        for path, positions, places in self._by_file(indices):
            parts = read(self._content(path), path, positions)
            if first is None:
                first = path
                arrays = {key: np.empty((len(indices), *part.shape[1:]), part.dtype) for key, part in parts.items()}
            if parts.keys() != arrays.keys():
                odd = ", ".join(sorted(parts.keys() ^ arrays.keys()))
                raise UserError(f"{path}: differs from {first.name} in {odd}; run stage 2 again with the same flags")
            for key, part in parts.items():
                if part.shape[1:] != arrays[key].shape[1:]:
                    here, there = part.shape[1:], arrays[key].shape[1:]
                    raise UserError(
                        f"{path}: {key} has the shape {here} a row, but {there} in {first.name}; run stage 2 again "
                        "with the same flags"
                    )
                arrays[key][places] = part
        if first is None and self._files:  # no rows: the right shapes, of length 0
            return read(self.first_content(), self._files[0], [])
        return arrays

    def _by_file(self, indices: Sequence[int]) -> Iterator[tuple[Path, list[int], list[int]]]:
        """(file, positions in it, places in `indices`) file by file."""
        groups: dict[Path, tuple[list[int], list[int]]] = {}
        for place, index in enumerate(indices):
            path, position = self._places[index]
            positions, places = groups.setdefault(path, ([], []))
            positions.append(position)
            places.append(place)
        for path, (positions, places) in groups.items():
            yield path, positions, places

    # --- texts, tokens, single rows

    def place(self, index: int) -> tuple[dict[str, Any], Path, int]:
        """(content of the file, its path, position of the row in it): for what is not the same size in every row."""
        path, position = self._places[index]
        return self._content(path), path, position

    def texts(self, indices: Sequence[int] | None = None, key: str = "prompts") -> list[Any]:
        """A list field (prompts, element_index, responses …) of some rows (default: all).

        None if the files lack it; prompts are then those of the prompt file.
        """
        found = []
        for index in self.indices if indices is None else indices:
            content, _, position = self.place(index)
            values = content.get(key)
            default = self.run.row(index).get(self.style) if key == "prompts" else None
            found.append(default if values is None else values[position])
        return found

    def predictions(self) -> dict[int, list[Prediction]]:
        """The predictions of every row, one for each sample: {original_index: [Prediction, …]}."""
        found: dict[int, list[Prediction]] = {index: [] for index in self.indices}
        for path in self._files:
            for one in predictions_of(self._content(path), self.style, self.run):
                if one.original_index in found:
                    found[one.original_index].append(one)
        return found

    def table(self, clean: StyleRows | None) -> pd.DataFrame:
        """One line per row beside its clean form: the columns of `Run.rows`."""
        predictions = self.predictions()
        clean_predictions = {} if clean is None else clean.predictions()
        lines = []
        for index in self.indices:
            first, twins = predictions[index][0], clean_predictions.get(index, [])
            clean_text = clean_prompt(self.run, index)
            if clean_text is None and twins:
                clean_text = twins[0].prompt
            may_be_same = self.style != self.run.clean_style and not is_again(self.style)
            lines.append(
                {
                    "original_index": index,
                    "element_index": first.element_index,
                    "prompt": first.prompt,
                    "clean_prompt": clean_text,
                    "response": first.response,
                    "clean_response": twins[0].response if twins else None,
                    "identical": may_be_same and clean_text is not None and first.prompt == clean_text,
                    "cluster": self.run.template(index),
                }
            )
        return pd.DataFrame(lines)

    def clusters(self, indices: Sequence[int]) -> list[str]:
        """Cluster of each row for clustered standard errors: its template, or else the row itself."""
        return [self.run.template(int(index)) for index in indices]

    def region_tokens(self, index: int, region: str) -> tuple[int, ...]:
        """Token ids of a region of one row; empty if the region is empty or the style has no such region."""
        content, _, position = self.place(index)
        if region not in content["regions"]:
            return ()
        inside = content["region_mask"][position, :, content["regions"].index(region)]
        return tuple(content["input_ids"][position][inside].tolist())

    def token_counts(self, indices: Sequence[int], region: str) -> np.ndarray:
        """[n, 3] of each row: tokens of a region, tokens of the prompt, position of the region's first token."""

        def read(content: dict[str, Any], path: Path, positions: list[int]) -> dict[str, np.ndarray]:
            real, inside = _region_and_tokens(content, positions, region)
            start = np.where(inside.any(1), inside.argmax(1) - real.argmax(1), 0)
            return {"counts": np.stack([inside.sum(1), real.sum(1), start], axis=1)}

        return self._gather(read, indices)["counts"]

    def holds_first(self, indices: Sequence[int], region: str) -> np.ndarray:
        """Mask [n]: does the region of each row hold the first token of the sequence, an attention sink in most models.

        False if the style has no such region.
        """

        def read(content: dict[str, Any], path: Path, positions: list[int]) -> dict[str, np.ndarray]:
            real, inside = _region_and_tokens(content, positions, region)
            return {"first": inside[np.arange(len(positions)), real.argmax(1)]}

        return self._gather(read, indices)["first"]


def _region_and_tokens(content: dict[str, Any], positions: list[int], region: str) -> tuple[np.ndarray, np.ndarray]:
    """(real tokens [n,S], tokens of a region [n,S]); all False if the file has no such region."""
    real = content["attention_mask"][positions].bool().numpy()
    if region not in content["regions"]:
        return real, np.zeros_like(real)
    return real, real & content["region_mask"][positions][..., content["regions"].index(region)].numpy()


def _region_list(key: str) -> str:
    return "pooled_regions" if key.endswith("_pooled") else "regions"


def _raw_layers(content: dict[str, Any]) -> dict[int, Any]:
    """{5: [B,S,D]} of the raw `hidden_states`."""
    return {int(name.rpartition("_")[2]): tensor for name, tensor in content.get("hidden_states", {}).items()}


def _pick(
    content: dict[str, Any], path: Path, key: str, positions: list[int], region: str | None, layers: slice | int
) -> np.ndarray:
    """Rows of a field [n, ...], of one region and some layers."""
    if key not in content:
        raise UserError(f"{path}: has no field {key!r}; run stage 2 again with the capture flag that writes it")
    tensor, axes = content[key], FIELDS[key].axes
    if isinstance(tensor, dict):
        if f"layer_{layers}" not in tensor:
            have = ", ".join(str(layer) for layer in sorted(int(name.removeprefix("layer_")) for name in tensor))
            raise UserError(f"{path}: {key} needs layers= with one of its raw layers: {have}")
        tensor, layers = tensor[f"layer_{layers}"], slice(None)
    if region is not None:
        names = content[_region_list(key)]
        if region not in names:
            raise UserError(f"{path}: has no region {region!r} in {key}; it has {', '.join(names)}")
        if not {"R", "P"} & {*axes}:
            raise UserError(f"{key} has no regions to choose from")
        tensor = tensor.select(axes.index("P" if "P" in axes else "R"), names.index(region))
    if axes[0] == "B":
        rows = tensor[positions]
    elif isinstance(layers, int):
        rows = tensor[layers][positions]
    else:
        rows = tensor[layers][:, positions].movedim(1, 0)
    return (rows.float() if rows.is_floating_point() else rows).numpy()


# --- which rows go together


@dataclass(frozen=True)
class PairedRows:
    """Original indices of a style's rows beside another form of the same rows.

    rows: those that both have. changed: those of them whose texts differ. identical: the others. unpaired: rows of the
    style that the other form lacks.
    """

    rows: list[int]
    changed: list[int]
    identical: list[int]
    unpaired: list[int]


def paired_rows(own: StyleRows, other: StyleRows, indices: Iterable[int] | None = None) -> PairedRows:
    """Pair the rows of a style (default: all) with those of its clean form or control, by original index."""
    wanted = [index for index in (own.indices if indices is None else indices) if index in own]
    both = [index for index in wanted if index in other]
    texts = zip(both, own.texts(both), other.texts(both), strict=True)
    # Two unknown texts are not identical: a file of the reference format may not know its prompts.
    same = {index for index, text, other_text in texts if text is not None and text == other_text}
    return PairedRows(
        both,
        [index for index in both if index not in same],
        [index for index in both if index in same],
        [index for index in wanted if index not in other],
    )


def clean_prompt(run: Run, original_index: int) -> str | None:
    """The clean form of a row (`normal`, else `instruction`) in the prompt file; None if it has none."""
    row = run.row(original_index)
    return next((row[key] for key in CLEAN_KEYS if isinstance(row.get(key), str)), None)


def clean_and_styles(run: Run, styles: Sequence[str] | None, with_controls: bool = True) -> tuple[str, list[str]]:
    """(clean style, the styles to compare with it); their controls come along.

    Raises UserError if the run has no clean form or no other style, or lacks one that was asked for.
    """
    clean = run.clean_style
    if clean is None:
        have = ", ".join(run.styles)
        raise UserError(f"{run.path}: no clean form (`normal` or `instruction`) among its styles {have}; run it too")
    run.chosen(styles)
    chosen = [style for style in (styles or run.styles) if style != clean]
    for style in list(chosen) if with_controls else ():
        if (control := control_of(run, style)) and control not in chosen:
            chosen.append(control)
    if not chosen:
        raise UserError(f"{run.path}: only the clean form is there; run stage 2 with more --prompt_keys")
    return clean, chosen


def twin_region(region: str, style: str) -> str:
    """The clean run's region that `region` of a style is compared with."""
    return f"edited:{controlled_style(style) or style}" if region == "edited" else region


def templates_of(run: Run) -> set[str]:
    """Clusters of all rows of the run's clean form: halves and groups of the data are made of these.

    Of the whole run, so that the halves do not depend on the style, the script or --max_samples.
    """
    return {run.template(index) for index in row_indices(run, run.clean_style or next(iter(run.styles)))}


# --- controls


def control_of(run: Run, style: str) -> str | None:
    """The control that a style is compared with, if the run has one: `split@<style>`, `neutral@<style>` or `split`."""
    names = () if is_control(style) or is_again(style) else (f"{MATCHED}{style}", f"{NEUTRAL}{style}", SPLIT_STYLE)
    return next((name for name in names if name in run.styles), None)


def warn_missing_controls(run: Run, styles: Sequence[str]) -> None:
    """Log which styles have no control with their own number of tokens."""
    controls = {style: control_of(run, style) for style in styles if not (is_control(style) or is_again(style))}
    if alone := [style for style, control in controls.items() if control is None]:
        get_logger().warning(
            f"without a control: {' '.join(alone)}; their differences may come from the number of tokens alone. "
            f"Stage 2 makes controls with --prompt_keys {MATCHED}<style> (typos) and {NEUTRAL}<style> (tones)"
        )
    if by_split := [style for style, control in controls.items() if control == SPLIT_STYLE]:
        get_logger().debug(
            f"compared with `split`, cut by an invisible character that is a token, too: {' '.join(by_split)}; "
            f"{MATCHED}<style> among stage 2's --prompt_keys is the better control"
        )


def same_words(run: Run, style: str, control: str, indices: Iterable[int]) -> np.ndarray:
    """Mask [n] of the rows in which both styles edit the same words of the clean text, by the prompt file.

    A control that stage 2 made for the style does so in all its rows.
    """
    if controlled_style(control) == style:
        return np.ones(len(list(indices)), dtype=bool)

    def words(row: dict[str, Any], name: str) -> list[tuple[int, int]]:
        clean, text = row.get(str(run.clean_style)), row.get(name)
        return edited_spans(clean, text)[0] if isinstance(clean, str) and isinstance(text, str) else []

    rows = [run.row(int(index)) for index in indices]
    return np.array([bool(own := words(row, style)) and own == words(row, control) for row in rows], dtype=bool)


def token_limit(control: str, split_tokens: int | None) -> int | None:
    """Most tokens by which a style's edited words may differ from its control's: none if stage 2 made it for it."""
    return 0 if controlled_style(control) else split_tokens


def like_control(own: StyleRows, control: StyleRows, rows: Sequence[int], split_tokens: int | None) -> list[int]:
    """Those of `rows` in which a control cuts the words that the style edits into nearly as many tokens.

    split_tokens: most tokens between the two (`token_limit`); None: any.
    """
    rows = [row for row in rows if row in control]
    alike = same_words(own.run, own.style, control.style, rows)
    rows = [row for row, same in zip(rows, alike, strict=True) if same]
    if (most := token_limit(control.style, split_tokens)) is None or not rows:
        return rows
    counts = [table.token_counts(rows, "edited")[:, 0] for table in (own, control)]
    return [row for row, apart in zip(rows, np.abs(counts[0] - counts[1]), strict=True) if apart <= most]
