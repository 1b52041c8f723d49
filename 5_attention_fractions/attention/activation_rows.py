"""Rows of a run by original index, so that the styles of one prompt can be compared without holding a run in memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from command_line import UserError
from logger import get_logger
from pt_fields import FIELDS
from run_store import Run, row_indices
from token_spans import MATCHED, matched_style

from attention.flags import add_first_token as add_first_token
from attention.paired_rows import original_indices

if TYPE_CHECKING:
    import torch

SPLIT_STYLE = "split"  # a control for fragmentation: the clean word, cut by an invisible character
CLEAN_BLOCK = 64


class StyleRows:
    """The rows of one style wherever they lie in its files; files are memory-mapped, `max_open` at a time.

    `indices` are the original indices at hand, ascending (`max_samples`: below this row of the prompt file only).
    """

    def __init__(self, run: Run, style: str, max_samples: int | None = None, max_open: int = 16) -> None:
        self.run, self.style = run, style
        self._max_open = max_open
        self._open: OrderedDict[Path, dict[str, Any]] = OrderedDict()
        self._places: dict[int, tuple[Path, int]] = {}
        files = run.files(style)
        self._first = files[0]
        for path in files:
            for position, index in enumerate(original_indices(self._content(path), path).tolist()):
                if max_samples is None or index < max_samples:
                    self._places[index] = (path, position)
        self.indices = sorted(self._places)

    def __contains__(self, index: object) -> bool:
        return index in self._places

    def _content(self, path: Path) -> dict[str, Any]:
        if path not in self._open:
            self._open[path] = self.run.load(path)
            while len(self._open) > self._max_open:
                self._open.popitem(last=False)
        self._open.move_to_end(path)
        return self._open[path]

    def first_content(self) -> dict[str, Any]:
        """Content of the style's first file: which fields, regions and sizes there are."""
        return self._content(self._first)

    def has(self, key: str) -> bool:
        """Whether the style's files hold the field `key`."""
        return key in self.first_content()

    def regions(self, key: str = "hidden_pooled") -> list[str]:
        """Names on the region axis of a field: `pooled_regions` for pooled ones, else `regions`."""
        return list(self.first_content().get(_region_list(key), []))

    def state_regions(self) -> list[str]:
        """Regions that `states` knows: the pooled ones, and where there are raw layers every region of the files."""
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
        """L + 1, or where the files pool nothing and hold no attention, the last raw layer + 1."""
        content = self.first_content()
        if "hidden_pooled" in content:
            return int(content["hidden_pooled"].shape[0])
        raw = max(_raw_layers(content), default=-1) + 1
        return max(raw, content["span_mass"].shape[0] + 1) if "span_mass" in content else raw

    def states(self, indices: Sequence[int], region: str) -> torch.Tensor:
        """Mean residual stream [L+1, b, D] of a region in float32: pooled, or else the mean over its raw tokens.

        A layer that is not at hand is NaN, and so is an empty region. Raises UserError where neither is there.
        """
        import torch

        if region not in self.state_regions():
            raise UserError(f"{self.run.path}: no states of {region!r}; it has {', '.join(self.state_regions())}")
        if "hidden_pooled" in self.first_content() and region in self.regions():
            return self.gather("hidden_pooled", indices, region)
        size = next(iter(self.first_content()["hidden_states"].values())).shape[-1]
        whole = torch.full((self.layer_count(), len(indices), size), torch.nan)
        for layer in self.state_layers(region):
            whole[layer] = self.layer_states(indices, region, layer)
        return whole

    def layer_states(self, indices: Sequence[int], region: str, layer: int) -> torch.Tensor:
        """[b, D] of `states` at one of `state_layers`, without reading the others."""
        import torch

        if "hidden_pooled" in self.first_content() and region in self.regions():
            return self.gather("hidden_pooled", indices, region, layer)
        found: list[Any] = [None] * len(indices)
        for path, positions, places in self._grouped(indices):
            content = self._content(path)
            column, raw = content["regions"].index(region), _raw_layers(content)[layer]
            for position, place in zip(positions, places, strict=True):
                found[place] = raw[position][content["region_mask"][position, :, column]].float().mean(0)
        return torch.stack(found)

    def gather(
        self, key: str, indices: Sequence[int], region: str | None = None, layers: slice | int = slice(None)
    ) -> torch.Tensor:
        """A tensor field of some rows in float32, the batch axis where the file has it.

        hidden_pooled with a region: [L+1, b, D]; with an integer `layers`: [b, D]. topk_vals: [b, T, k].
        Raises UserError where a file lacks the field or the region.
        """
        import torch

        axis = FIELDS[key].axes.index("B") - (1 if isinstance(layers, int) else 0)
        order, parts = [], []
        for path, positions, places in self._grouped(indices):
            parts.append(_pick(self._content(path), path, key, torch.tensor(positions), region, layers))
            order += places
        joined = parts[0] if len(parts) == 1 else torch.cat(parts, dim=axis)
        if order == sorted(order):
            return joined
        return joined.index_select(axis, torch.tensor(order).argsort())

    def texts(self, indices: Sequence[int], key: str = "prompts") -> list[Any]:
        """A list field (prompts, element_index …) of some rows; None where the files lack it."""
        found = [self._places[index] for index in indices]
        return [self._content(path).get(key, {position: None})[position] for path, position in found]

    def region_tokens(self, index: int, region: str) -> tuple[int, ...]:
        """Token ids of a region of one row; empty where the region is, or where the style knows no such region."""
        path, position = self._places[index]
        content = self._content(path)
        if region not in content["regions"]:
            return ()
        inside = content["region_mask"][position, :, content["regions"].index(region)]
        return tuple(content["input_ids"][position][inside].tolist())

    def token_counts(self, indices: Sequence[int], region: str) -> np.ndarray:
        """[n, 3] of each row: tokens of a region, tokens of the prompt, position of the region's first token."""
        found = []
        for index in indices:
            path, position = self._places[index]
            content = self._content(path)
            real = content["attention_mask"][position].bool()
            inside = content["region_mask"][position, real, content["regions"].index(region)].int()
            found.append([int(inside.sum()), int(real.sum()), int(inside.argmax())])
        return np.array(found, dtype=np.int64).reshape(-1, 3)

    def holds_first(self, indices: Sequence[int], region: str) -> list[bool]:
        """Whether a region of each row holds the first token of the sequence, in most models an attention sink."""
        found = []
        for index in indices:
            path, position = self._places[index]
            content = self._content(path)
            first = int(content["attention_mask"][position].int().argmax())
            column = content["regions"].index(region) if region in content["regions"] else None
            found.append(column is not None and bool(content["region_mask"][position, first, column]))
        return found

    def _grouped(self, indices: Sequence[int]) -> Iterator[tuple[Path, list[int], list[int]]]:
        """(file, positions in it, places in `indices`) file by file."""
        groups: dict[Path, tuple[list[int], list[int]]] = {}
        for place, index in enumerate(indices):
            path, position = self._places[index]
            positions, places = groups.setdefault(path, ([], []))
            positions.append(position)
            places.append(place)
        for path, (positions, places) in groups.items():
            yield path, positions, places


def _region_list(key: str) -> str:
    return "pooled_regions" if key.endswith("_pooled") else "regions"


def _raw_layers(content: dict[str, Any]) -> dict[int, torch.Tensor]:
    """{5: [B,S,D]} of the raw `hidden_states`."""
    return {int(name.rpartition("_")[2]): tensor for name, tensor in content.get("hidden_states", {}).items()}


def _pick(
    content: dict[str, Any], path: Path, key: str, rows: torch.Tensor, region: str | None, layers: slice | int
) -> torch.Tensor:
    if key not in content:
        raise UserError(f"{path}: has no field {key!r}; run stage 2 again with the capture flag that writes it")
    tensor = content[key]
    if region is not None:
        names = content[_region_list(key)]
        if region not in names:
            raise UserError(f"{path}: does not pool the region {region!r}; it has {', '.join(names)}")
        column = names.index(region)
        # The region axis follows the batch axis, or the heads: [L,B,P,D] and [L,B,H,Q].
        tensor = tensor[:, :, column] if key.endswith("_pooled") else tensor[:, :, :, column]
    if FIELDS[key].axes.index("B") == 0:
        return tensor[rows].float() if tensor.is_floating_point() else tensor[rows]
    chosen = tensor[layers]
    return (chosen[rows] if isinstance(layers, int) else chosen[:, rows]).float()


# --- which rows


def is_control(style: str) -> bool:
    """Whether a style is the clean word in other tokens: `split`, or `split@<style>` (matched_split.py of stage 2)."""
    return style == SPLIT_STYLE or matched_style(style) is not None


def control_of(run: Run, style: str) -> str | None:
    """The control that a style is compared with: `split@<style>`, else `split`, of those that the run has."""
    names = () if is_control(style) else (f"{MATCHED}{style}", SPLIT_STYLE)
    return next((name for name in names if name in run.styles), None)


def clean_and_styles(run: Run, styles: Sequence[str] | None, with_controls: bool = True) -> tuple[str, list[str]]:
    """(clean style, the styles to compare with it); their controls come along.

    Raises UserError where the run has no clean form, no other style, or lacks an asked-for one.
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
    return f"edited:{matched_style(style) or style}" if region == "edited" else region


def changed_rows(clean: StyleRows, other: StyleRows, indices: Sequence[int]) -> list[int]:
    """Those of `indices` that both styles have and whose text differs: a variant equal to the clean text is none."""
    both = [index for index in indices if index in clean and index in other]
    texts = zip(both, clean.texts(both), other.texts(both), strict=True)
    return [index for index, clean_text, text in texts if text is None or text != clean_text]


def same_words(run: Run, style: str, control: str, indices: Iterable[int]) -> np.ndarray:
    """Mask [n] of the rows in which both styles edit the same words of the clean text, by the prompt file."""
    from token_spans import edited_spans

    if matched_style(control) == style:
        return np.ones(len(list(indices)), dtype=bool)

    def words(row: dict[str, Any], name: str) -> list[tuple[int, int]]:
        clean, text = row.get(str(run.clean_style)), row.get(name)
        return edited_spans(clean, text)[0] if isinstance(clean, str) and isinstance(text, str) else []

    rows = [run.row(int(index)) for index in indices]
    return np.array([bool(own := words(row, style)) and own == words(row, control) for row in rows], dtype=bool)


def tell_controls(run: Run, styles: Sequence[str]) -> None:
    """Say in the log which styles have no control with their own number of tokens."""
    controls = {style: control_of(run, style) for style in styles if not is_control(style)}
    if alone := [style for style, control in controls.items() if control is None]:
        get_logger().warning(
            f"without a control: {' '.join(alone)}; their differences may come from the number of tokens alone. "
            f"Stage 2 makes controls with --prompt_keys {MATCHED}<style>"
        )
    if by_split := [style for style, control in controls.items() if control == SPLIT_STYLE]:
        get_logger().debug(
            f"compared with `split`, cut by an invisible character that is a token, too: {' '.join(by_split)}; "
            f"{MATCHED}<style> among stage 2's --prompt_keys is the better control"
        )


def token_limit(control: str, split_tokens: int | None) -> int | None:
    """Most tokens by which a style's edited words may differ from its control's: none for `split@<style>`."""
    return 0 if matched_style(control) else split_tokens


def like_control(own: StyleRows, control: StyleRows, rows: Sequence[int], split_tokens: int | None) -> list[int]:
    """Those of `rows` in which a control cuts the same words that the style edits, into nearly as many tokens.

    split_tokens: most tokens between the two (`token_limit`); None: any.
    """
    rows = [row for row in rows if row in control]
    alike = same_words(own.run, own.style, control.style, rows)
    rows = [row for row, same in zip(rows, alike, strict=True) if same]
    if (most := token_limit(control.style, split_tokens)) is None:
        return rows
    counts = [[len(table.region_tokens(row, "edited")) for table in (own, control)] for row in rows]
    return [row for row, (mine, theirs) in zip(rows, counts, strict=True) if abs(mine - theirs) <= most]


def blocks(indices: Sequence[int], size: int = CLEAN_BLOCK) -> Iterator[list[int]]:
    """`indices` in runs of at most `size`."""
    for start in range(0, len(indices), size):
        yield list(indices[start : start + size])


def templates_of(run: Run) -> set[str]:
    """Clusters of all rows that the run has in its clean form: what `deal` cuts into halves or groups.

    Of the whole run, so that the halves do not depend on the style, the script or --max_samples.
    """
    return {run.template(index) for index in row_indices(run, run.clean_style or next(iter(run.styles)))}
