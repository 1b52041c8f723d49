"""How far a style moves the residual stream, layer by layer, and where a mistyped word is recovered.

Every row is compared with its own clean twin: the edited word (`edited` against `edited:<style>` of the clean run),
the task, the last token. A region that was not pooled is averaged over its tokens in the raw layers, where there are
any. Measures by layer (0 = embeddings; the last layer is after the final norm):

    cosine, cosine_centred   of the two states; centred: after subtracting the median clean state of the layer, since
                             all states of a layer share a large part next to which everything looks alike (the
                             median: one state with a massive activation would be the whole mean)
    relative_l2              |style - clean| / |clean|
    cka                      debiased linear CKA over --cka_items items (linear_cka.py), those with a massive activation
                             left out (longer than 4 median norms in some layer): one of them is the whole CKA
    own_nearest              share of edited words that are nearer to their clean twin than to any other word's clean
                             state; own_nearer_share: share of those other words that are less near. Read it against
                             the style `real_word`, which is its floor (typo_recovery.py)
    lens_*                   logit lens at the last token, with --model_name, on the first --lens_rows rows

and by style: recovery depth (the first layer from which the word is nearest to its own twin for --stay_layers layers in
a row), half recovery depth (from which half of the greatest loss of centred cosine is regained, likewise), next-token
KL (a lower bound, next_token_change.py) and the rank of the clean run's first token. Few rows carry the mean KL: of
samples of 60 rows of a real run 80 to 89 % had its true value in their 95 % interval, 94 to 97 % for its log10; so
compare styles by log10_next_token_kl (0.3 more is twice the KL). A depth that is never reached counts as one beyond the
last layer, and in n_censored; a rank beyond the top-k as k + 1. Medians of KL are known to 2 %.

Beside each style stands its `control`, the clean word only cut into other tokens: difference_to_split and its p value
tell a typo from more tokens (BH over styles x layers; Holm over styles; n_with_split rows). That is `split@<style>`, as
many tokens as in the style, where the run has it, else `split`, cut by an invisible character, on the rows in which
both edit the same words and these differ by at most --split_tokens tokens. A word that needs no cut is its own control:
such rows (n_identical) are in the lines of `split@<style>`, at distance 0 and depth 0, but for log10_next_token_kl and
half_recovery_depth, which are not defined there. `split` is cut into more tokens than most typos, and these then look
recovered early: SmolLM2, 200 prompts, `swap` against `split` at any number of tokens 5.1 layers earlier [3.0, 7.3]
(n = 177), at most one apart 1.4 later [-2.4, 5.1] (n = 54), against `split@swap` 4.5 later [2.8, 6.2] (n = 185).

A row whose region holds the first token is left out of that region (`--first_token excluded`): that token is the
attention sink of most models, its state far longer than any other (massive activations: Sun et al. 2024, arXiv
2402.17762) and alike in every prompt, so that such a word always looks recovered.

Reads   outputs/<run>/<style>/activations_*.pt (hidden_pooled, hidden_states, topk_vals), the clean form among them
Writes  results/<run>/activation_diffs.csv        style, layer, region, measure
        results/<run>/activation_diffs_summary.csv   style, measure
        results/<run>/activation_diffs_items.csv  one line per row and style
        results/<run>/activation_diffs.png        typo_recovery.png, with --model_name logit_lens.png

    python 5_attention_fractions/run_scripts/activation_diffs.py --run_dir outputs/demo/maths
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / place) for place in ("", "../1_utils/run_scripts")]

import numpy as np
from attention.activation_rows import (
    StyleRows,
    add_first_token,
    blocks,
    changed_rows,
    clean_and_styles,
    control_of,
    is_control,
    like_control,
    tell_controls,
    twin_region,
)
from command_line import UserError, make_parser, run_main
from file_output import atomic_path, write_csv
from logger import get_logger
from run_store import Run, open_run, warn_unfinished
from token_spans import matched_style

if TYPE_CHECKING:
    import pandas as pd
    import torch
    from attention.logit_lens import LogitLens
    from attention.typo_recovery import ReferenceWords

ITEM_COLUMNS = [
    "style", "original_index", "element_index", "edited_tokens_clean", "edited_tokens", "recovery_depth", "recovered",
    "half_recovery_depth", "half_recovered", "next_token_kl", "kl_mass_clean", "kl_mass_style", "clean_top1_rank",
    "clean_top1_in_topk", "top1_kept",
]  # fmt: skip
MASSIVE = 4  # longer than so many median norms: a massive activation; nothing else came near it on real text
AT_CENTRE = 1e-4  # distance to the centre, as a share of the norm, that is nothing but rounding
REGIONS = ("edited", "task", "last")
SHARES = {"own_nearest", "own_nearer_share", "top1_kept", "kl_mass_clean", "kl_mass_style"}  # between 0 and 1
DISTANCES = {"relative_l2", "lens_kl", "next_token_kl"}  # never below 0
DEPTHS = {"recovery_depth": "recovered", "half_recovery_depth": "half_recovered"}

Key = tuple[str, str]  # (region, measure); region "" for a number per row


@dataclass
class Sources:
    """What a pass over the run needs."""

    run: Run
    clean: StyleRows
    styles: dict[str, StyleRows]
    regions: list[str]
    references: dict[str, ReferenceWords | None]
    centres: dict[str, tuple[torch.Tensor, torch.Tensor]]  # median clean state [L+1,D] and norm [L+1] of a region
    stay_layers: int = 3
    without_first: bool = True  # rows whose region holds the first token count in nothing of that region
    cka_items: set[int] = field(default_factory=set)  # rows that CKA is taken over
    split_tokens: int | None = None  # most tokens by which a typo and the style `split` may differ; None: any
    lens: LogitLens | None = None
    lens_rows: set[int] = field(default_factory=set)


@dataclass
class Sums:
    """Everything that is kept of a run: the measures of every row, by layer, and no states."""

    own: dict[tuple[str, Key], Any] = field(default_factory=dict)
    against_split: dict[tuple[str, Key], Any] = field(default_factory=dict)
    split: dict[tuple[str, Key], Any] = field(default_factory=dict)
    cka_rows: dict[tuple[str, str], list[int]] = field(default_factory=dict)
    on_first: Counter[tuple[str, str]] = field(default_factory=Counter)
    counts: dict[tuple[str, str], Counter[float]] = field(default_factory=dict)
    censored: Counter[tuple[str, str]] = field(default_factory=Counter)
    identical: Counter[str] = field(default_factory=Counter)


# --- one block of rows


def state_distances(clean: torch.Tensor, style: torch.Tensor, centre: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """cosine, cosine_centred (with a centre [L+1,D]) and relative_l2, each [L+1,b], of states [L+1,b,D].

    relative_l2 is |style - clean| / |clean|; NaN where a state is, cosine_centred also where a state is the centre.
    """
    import torch
    from torch.nn.functional import cosine_similarity

    found = {"cosine": cosine_similarity(clean, style, dim=-1)}
    if centre is not None:
        one, other = clean - centre[:, None], style - centre[:, None]
        found["cosine_centred"] = cosine_similarity(one, other, dim=-1)
        # Where all prompts end on one token its embedding is the centre: what is left has no direction.
        at_centre = [
            part.norm(dim=-1) < AT_CENTRE * whole.norm(dim=-1) for part, whole in ((one, clean), (other, style))
        ]
        found["cosine_centred"][at_centre[0] | at_centre[1]] = torch.nan
    found["relative_l2"] = (style - clean).norm(dim=-1) / clean.norm(dim=-1)
    return found


def block_values(sources: Sources, style: str, rows: list[int], changed: set[int], sums: Sums) -> dict[Key, np.ndarray]:
    """Every measure of some rows of a style: by layer [b, L+1], or a number per row [b].

    NaN in layers that are not at hand: a region that is not pooled is known in the raw layers alone. CKA's rows go into
    `sums`. changed: the rows whose text is not the clean one; only a control's rows may have others.
    """
    import torch

    table = sources.styles[style]
    values: dict[Key, np.ndarray] = {}
    templates = [sources.run.template(row) for row in rows]
    for region in sources.regions:
        twin = twin_region(region, style)
        if region not in table.state_regions() or twin not in sources.clean.state_regions():
            continue
        clean, other = sources.clean.states(rows, twin), table.states(rows, region)
        on_first: list[int] = []
        if sources.without_first:
            pairs = zip(sources.clean.holds_first(rows, twin), table.holds_first(rows, region), strict=True)
            on_first = [place for place, pair in enumerate(pairs) if any(pair)]
            clean[:, on_first] = other[:, on_first] = torch.nan
            sums.on_first[style, region] += len(on_first)
        references = sources.references.get(style) if region == "edited" else None
        centre, norms = (
            (references.centre, references.norms) if references else sources.centres.get(region, (None, None))
        )
        far = massive(clean, other, norms)
        sums.cka_rows.setdefault((style, region), []).extend(
            row
            for place, row in enumerate(rows)
            if not far[place] and place not in on_first and row in sources.cka_items
        )
        found = state_distances(clean, other, centre)
        if references:
            found |= _nearness(sources, references, rows, templates, twin, clean, other)
        values |= {(region, name): tensor.T.double().numpy() for name, tensor in found.items()}
    values |= _lens_values(sources, style, rows)
    values |= _row_values(sources, style, rows, changed, values)
    # A state that overflowed its 16-bit dtype has no distance: missing, not infinite.
    return {key: np.where(np.isinf(numbers), np.nan, numbers) for key, numbers in values.items()}


def massive(clean: torch.Tensor, style: torch.Tensor, norms: torch.Tensor | None) -> list[bool]:
    """Whether each item's state [L+1,b,D] is, in a layer and form, longer than MASSIVE times the median norm [L+1]."""
    if norms is None:
        return [False] * clean.shape[1]
    limit = MASSIVE * norms[:, None]
    return ((clean.norm(dim=-1) > limit) | (style.norm(dim=-1) > limit)).any(0).tolist()


def _nearness(
    sources: Sources,
    references: ReferenceWords,
    rows: list[int],
    templates: list[str],
    twin: str,
    clean: torch.Tensor,
    other: torch.Tensor,
) -> dict[str, torch.Tensor]:
    from attention.typo_recovery import nearness

    words = [sources.clean.region_tokens(row, twin) for row in rows]
    return nearness(clean, other, references, references.others(rows, templates, words))


def _lens_values(sources: Sources, style: str, rows: list[int]) -> dict[Key, np.ndarray]:
    """Lens measures [b, L+1] at the last token; NaN for the rows beyond --lens_rows."""
    places = [place for place, row in enumerate(rows) if row in sources.lens_rows]
    if sources.lens is None or not places:
        return {}
    chosen = [rows[place] for place in places]
    clean, other = sources.clean.states(chosen, "last"), sources.styles[style].states(chosen, "last")
    top1 = sources.clean.gather("topk_indices", chosen)[:, -1, 0]
    values: dict[Key, np.ndarray] = {}
    for name, tensor in sources.lens.change(clean, other, top1).items():
        values["last", name] = np.full((len(rows), len(tensor)), np.nan)
        values["last", name][places] = tensor.T.double().numpy()
    return values


def _row_values(
    sources: Sources, style: str, rows: list[int], changed: set[int], by_layer: dict[Key, np.ndarray]
) -> dict[Key, np.ndarray]:
    """The numbers per row [b]: depths, and the change of the next token where the run holds its logits."""
    from attention.next_token_change import next_token_change
    from attention.typo_recovery import half_recovery_depth, recovery_depth

    values: dict[Key, np.ndarray] = {}
    if ("edited", "own_nearest") in by_layer:
        values["", "recovery_depth"] = recovery_depth(by_layer["edited", "own_nearest"], sources.stay_layers)
        values["", "half_recovery_depth"] = half_recovery_depth(
            by_layer["edited", "cosine_centred"], sources.stay_layers
        )
    if sources.clean.has("topk_vals") and sources.styles[style].has("topk_vals"):
        pair = [_last_logits(table, rows) for table in (sources.clean, sources.styles[style])]
        values |= {("", name): numbers for name, numbers in next_token_change(*pair).items()}
        # Where a control is the clean prompt itself there is no change to take the logarithm of.
        values["", "log10_next_token_kl"][[row not in changed for row in rows]] = np.nan
    return values


def _last_logits(table: StyleRows, rows: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    values, indices, sums = (table.gather(key, rows)[:, -1] for key in ("topk_vals", "topk_indices", "logsumexp"))
    return values, indices, sums


# --- the pass over the run


def collect(sources: Sources, items: Any) -> Sums:
    """One pass over the run, block by block; writes a line per row and style to `items` (a csv.DictWriter)."""
    sums = Sums()
    order = sorted(sources.styles, key=lambda style: not is_control(style))  # the controls first
    for block in blocks(sources.clean.indices):
        controls: dict[str, tuple[list[int], dict[Key, np.ndarray]]] = {}
        for style in order:
            both = [row for row in block if row in sources.styles[style]]
            changed = changed_rows(sources.clean, sources.styles[style], both)
            sums.identical[style] += len(both) - len(changed)
            # Where a typo has as many tokens as the word, the clean word is its own control.
            rows = both if matched_style(style) else changed
            if not rows:
                continue
            values = block_values(sources, style, rows, set(changed), sums)
            if is_control(style):
                controls[style] = rows, values
            _add_own(sources, sums, style, rows, values)
            if (control := control_of(sources.run, style)) in controls:
                _add_against(sources, sums, style, rows, values, *controls[str(control)])
            _write_items(sources, items, style, rows, values)
    return sums


def _add_own(sources: Sources, sums: Sums, style: str, rows: list[int], values: dict[Key, np.ndarray]) -> None:
    templates = [sources.run.template(row) for row in rows]
    for key, numbers in values.items():
        _add_rows(sums.own, style, key, numbers, templates)
        if key[0] == "":
            _count(sums, style, key[1], numbers, sources)


def _add_against(
    sources: Sources,
    sums: Sums,
    style: str,
    rows: list[int],
    values: dict[Key, np.ndarray],
    control_rows: list[int],
    control_values: dict[Key, np.ndarray],
) -> None:
    """The style less its control, on the rows in which both edit the same words, in (nearly) as many tokens."""
    control = sources.styles[str(control_of(sources.run, style))]
    known = set(control_rows)
    alike = like_control(sources.styles[style], control, [row for row in rows if row in known], sources.split_tokens)
    mine, theirs = [rows.index(row) for row in alike], [control_rows.index(row) for row in alike]
    templates = [sources.run.template(row) for row in alike]
    for key, numbers in values.items() if alike else ():
        if key in control_values:
            other = control_values[key][theirs]
            both = np.where(np.isnan(numbers[mine]), np.nan, other)
            _add_rows(sums.split, style, key, both, templates)
            _add_rows(sums.against_split, style, key, numbers[mine] - other, templates)


def _add_rows(
    where: dict[tuple[str, Key], Any], style: str, key: Key, numbers: np.ndarray, templates: list[str]
) -> None:
    from paired_stats import RowValues

    kept = numbers.astype(np.float32) if key[0] else numbers  # by layer they are most of the memory
    where.setdefault((style, key), RowValues(numbers.shape[1:])).add(kept, templates)


def _beyond(sources: Sources, style: str, measure: str) -> float:
    """The value that stands for `never` (a depth beyond the last layer) or `below the top-k` (a rank)."""
    table = sources.styles[style]
    if measure in DEPTHS:
        return float(table.layer_count())
    return float(table.first_content()["topk_vals"].shape[-1] + 1) if measure == "clean_top1_rank" else math.inf


def _count(sums: Sums, style: str, measure: str, numbers: np.ndarray, sources: Sources) -> None:
    known = numbers[~np.isnan(numbers)]
    if measure == "next_token_kl":  # on a grid of 2 %, so that memory is flat
        grid = np.round(np.log10(np.maximum(known, 1e-12)), 2)
        sums.counts.setdefault((style, measure), Counter()).update((10**grid).tolist())
    if measure in DEPTHS or measure == "clean_top1_rank":
        sums.counts.setdefault((style, measure), Counter()).update(known.tolist())
        sums.censored[style, measure] += int((known >= _beyond(sources, style, measure)).sum())


def _write_items(sources: Sources, items: Any, style: str, rows: list[int], values: dict[Key, np.ndarray]) -> None:
    numbers = {name: column for (region, name), column in values.items() if region == "" and name in ITEM_COLUMNS}
    ids = sources.styles[style].texts(rows, "element_index")
    for position, row in enumerate(rows):
        line: dict[str, Any] = {"style": style, "original_index": row, "element_index": ids[position]}
        line["edited_tokens_clean"] = len(sources.clean.region_tokens(row, twin_region("edited", style)))
        line["edited_tokens"] = len(sources.styles[style].region_tokens(row, "edited"))
        for name, column in numbers.items():
            value, flag = float(column[position]), DEPTHS.get(name)
            reached = value < _beyond(sources, style, name)
            if flag:
                line[flag] = "" if math.isnan(value) else int(reached)
            if name == "clean_top1_rank":
                line["clean_top1_in_topk"] = int(reached)
            line[name] = "" if math.isnan(value) or (flag and not reached) else f"{value:.6g}"
        items.writerow(line)


# --- tables


def curve_table(sources: Sources, sums: Sums) -> pd.DataFrame:
    """One line per style, layer, region and measure; see the script's docstring."""
    import pandas as pd
    from paired_stats import benjamini_hochberg

    tables = [
        _estimate_frame(sums, style, key, {"region": key[0], "measure": key[1]}) for style, key in sums.own if key[0]
    ]
    tables += [_cka_frame(sources, *place, rows) for place, rows in sums.cka_rows.items()]
    tables = [table[table["n"] > 0] for table in tables if not table.empty and (table["n"] > 0).any()]
    if not tables:
        return pd.DataFrame(columns=["style", "layer", "region", "measure"])
    table = pd.concat(tables, ignore_index=True)
    table["p_adjusted"] = np.nan
    for _, part in table[~table["style"].map(is_control)].groupby(["region", "measure"]):
        table.loc[part.index, "p_adjusted"] = benjamini_hochberg(part["p"])
    front = ["style", "layer", "region", "measure"]
    return table[front + [column for column in table.columns if column not in front]]


def summary_table(sums: Sums) -> pd.DataFrame:
    """One line per style and number per row (depths, KL, rank): mean, median, what is censored, against split."""
    import pandas as pd
    from paired_stats import holm

    frames = [_estimate_frame(sums, style, key, {"measure": key[1]}) for style, key in sums.own if not key[0]]
    if not frames:
        return pd.DataFrame(columns=["style", "measure"])
    table = pd.concat(frames, ignore_index=True)
    keys = list(zip(table["style"], table["measure"], strict=True))
    table["median"] = [_median(sums.counts.get(key, Counter())) for key in keys]
    table["n_censored"] = [sums.censored.get(key, 0) for key in keys]
    table["n_identical"] = [sums.identical[style] for style, _ in keys]
    table["p_adjusted"] = np.nan
    for _, part in table[~table["style"].map(is_control)].groupby("measure"):
        table.loc[part.index, "p_adjusted"] = holm(part["p"])
    front = ["style", "measure", "n", "n_censored", "n_identical", "n_clusters", "median"]
    return table[front + [column for column in table.columns if column not in (*front, "layer")]]


def recovery_lines(summary: pd.DataFrame) -> list[str]:
    """The result in words: from which layer on a mistyped word is recovered, against its control if it has one.

    Where some styles have a control of as many tokens (`split@<style>`), only these.
    """
    rows = summary[summary["measure"] == "recovery_depth"] if len(summary) else summary
    rows = rows[~rows["style"].map(is_control)] if len(rows) else rows
    if not len(rows):
        return ["recovery depth: not known for any style"]
    matched = rows[rows["control"].map(matched_style, na_action="ignore").notna() & (rows["n_with_split"] > 0)]
    lines = []
    for row in (matched if len(matched) else rows).itertuples():
        line = f"{row.style}: words recovered from layer {row.estimate:.1f} on [{row.ci_low:.1f}, {row.ci_high:.1f}]"
        line += f", n = {row.n}"
        if row.n_with_split:
            line += f"; {row.difference_to_split:+.1f} layers to {row.control} "
            line += f"[{row.difference_ci_low:+.1f}, {row.difference_ci_high:+.1f}], n = {row.n_with_split}"
        lines.append(line)
    return lines


def in_run_order(table: pd.DataFrame, sources: Sources) -> pd.DataFrame:
    """The table with its styles in the order of the run (the controls were read first), and their controls named."""
    place = {style: number for number, style in enumerate(sources.styles)}
    if "n_with_split" in table:
        controls = [control_of(sources.run, style) for style in table["style"]]
        table.insert(table.columns.get_loc("n_with_split"), "control", controls)
    return table.sort_values("style", key=lambda column: column.map(place), kind="stable").reset_index(drop=True)


def _estimate_frame(sums: Sums, style: str, key: Key, names: dict[str, str]) -> pd.DataFrame:
    import pandas as pd

    own = sums.own[style, key].finish()
    line: dict[str, Any] = {"style": style, **names}
    least, most = 0 if key[1] in SHARES | DISTANCES else -np.inf, 1 if key[1] in SHARES else np.inf
    low, high = (np.clip(end, least, most) for end in (own.ci_low, own.ci_high))
    line |= {"n": own.n, "n_clusters": own.n_clusters, "estimate": own.mean, "ci_low": low, "ci_high": high}
    line["n_with_split"] = 0
    empty = ("split_estimate", "difference_to_split", "difference_ci_low", "difference_ci_high", "p")
    line |= dict.fromkeys(empty, np.nan)
    if (style, key) in sums.against_split:
        change = sums.against_split[style, key].finish()
        line |= {"n_with_split": change.n, "split_estimate": sums.split[style, key].finish().mean, "p": change.p}
        line |= {"difference_to_split": change.mean}
        line |= {"difference_ci_low": change.ci_low, "difference_ci_high": change.ci_high}
    count = np.size(own.mean)
    return pd.DataFrame(line | {"layer": np.arange(count)}, index=range(count))


def _cka_frame(sources: Sources, style: str, region: str, rows: list[int]) -> pd.DataFrame:
    """CKA of all these rows at once, layer by layer."""
    import pandas as pd
    from attention.linear_cka import CkaSums

    twin, table = twin_region(region, style), sources.styles[style]
    templates = [sources.run.template(row) for row in rows]
    lines = []
    for layer in sorted({*sources.clean.state_layers(twin)} & {*table.state_layers(region)}):
        cka, clean = CkaSums(), sources.clean.layer_states(rows, twin, layer) if rows else None
        if clean is not None:
            cka.add(clean[None], table.layer_states(rows, region, layer)[None], templates)
        if (found := cka.finish()) is None:
            continue
        (value,), (low,), (high,), n, clusters = found
        line = {"style": style, "region": region, "measure": "cka", "layer": layer, "p": np.nan, "n": n}
        lines.append(line | {"n_clusters": clusters, "estimate": value, "ci_low": low, "ci_high": min(high, 1)})
    return pd.DataFrame(lines)


def _median(counts: Counter[float]) -> float:
    """Median of counted values (the lower one of two); NaN without any."""
    half = counts.total() / 2
    seen = 0
    for value in sorted(counts):
        seen += counts[value]
        if seen >= half:
            return value
    return math.nan


# --- script


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__)
    data = parser.add_argument_group("data")
    data.add_argument("--run_dir", type=Path, required=True, help="run folder of stage 2")
    data.add_argument("--results_dir", type=Path, help="where to write; default: results/<run name>")
    data.add_argument("--styles", nargs="+", help="styles to compare with the clean form; default: all")
    data.add_argument("--max_samples", type=int, help="first rows of the prompt file only")
    measures = parser.add_argument_group("measures")
    measures.add_argument("--regions", nargs="+", help="default: of edited task last those there")
    measures.add_argument(
        "--reference_words", type=int, default=128, help="other words for the recovery depth, at most"
    )
    add_first_token(measures)
    measures.add_argument(
        "--split_tokens", type=int, default=1, help="most tokens by which a typo and `split` may differ; -1: any"
    )
    measures.add_argument("--cka_items", type=int, default=256, help="rows that CKA is taken over, at most")
    measures.add_argument("--stay_layers", type=int, default=3, help="layers in a row that make a recovery")
    measures.add_argument("--seed", type=int, default=0, help="which rows the reference words and CKA come from")
    lens = parser.add_argument_group("logit lens")
    lens.add_argument("--model_name", help="model of the run, for its final norm and head; default: no logit lens")
    lens.add_argument("--lens_rows", type=int, default=100, help="first rows that the lens is applied to")
    lens.add_argument("--dtype", default="auto", help="of the model")
    lens.add_argument("--device_map", help="of the model; default: the GPU where there is one")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Compare the states of a run and write tables and pictures."""
    args = parse_args(argv)
    log = get_logger()
    sources = open_sources(args)
    folder = args.results_dir or Path("results") / sources.run.name
    with _items_writer(folder / "activation_diffs_items.csv") as items:
        sums = collect(sources, items)
    curves, summary = (in_run_order(table, sources) for table in (curve_table(sources, sums), summary_table(sums)))
    write_csv(folder / "activation_diffs.csv", curves)
    write_csv(folder / "activation_diffs_summary.csv", summary)
    if told := [f"{style} {count}" for style, count in sums.identical.items() if count and not is_control(style)]:
        log.debug(f"left out, equal to the clean text: {', '.join(told)}")
    if told := [f"{' '.join(place)} {count}" for place, count in sums.on_first.items() if count]:
        log.debug(f"left out, on the first token (else --first_token included): {', '.join(told)}")
    _plot(curves, summary, folder)
    for line in recovery_lines(summary):
        log.info(line)
    log.info(f"wrote {folder}/activation_diffs.csv, _summary.csv, _items.csv and .png, and typo_recovery.png")
    return 0


def open_sources(args: argparse.Namespace) -> Sources:
    """The run, opened and checked; raises UserError where it holds nothing to compare."""
    from attention.typo_recovery import reference_rows, reference_words

    run = open_run(args.run_dir)
    clean_style, styles = clean_and_styles(run, args.styles)
    warn_unfinished(run, args.styles, args.max_samples)
    clean = StyleRows(run, clean_style, args.max_samples)
    if not clean.indices:
        raise UserError(f"{run.path}: no rows to read; raise --max_samples or run stage 2")
    regions = _regions(clean, args.regions)
    if args.reference_words < 2:
        raise UserError(f"--reference_words {args.reference_words}: at least 2 are needed")
    if args.stay_layers < 1:
        raise UserError(f"--stay_layers {args.stay_layers}: at least 1")
    tables = {style: StyleRows(run, style, args.max_samples) for style in styles}
    rows = reference_rows(clean, args.reference_words, args.seed)
    without_first = args.first_token == "excluded"
    references = {
        style: reference_words(run, clean, style, rows, args.reference_words, without_first) for style in styles
    }
    centres = {
        region: _centre(clean, rows, region, args.reference_words, without_first)
        for region in regions
        if region in clean.state_regions()
    }
    sources = Sources(run, clean, tables, regions, references, centres, args.stay_layers, without_first)
    sources.split_tokens = args.split_tokens if args.split_tokens >= 0 else None
    order = np.random.default_rng(args.seed).permutation(len(clean.indices))[: args.cka_items]
    sources.cka_items = {clean.indices[place] for place in order}
    _tell_missing(sources)
    if args.model_name:
        _open_lens(sources, args)
    else:
        get_logger().debug("no --model_name: without logit lens")
    return sources


def _regions(clean: StyleRows, wanted: Sequence[str] | None) -> list[str]:
    """The regions asked for, or those of REGIONS that the run has. UserError for one whose states it does not hold."""
    have = clean.state_regions()
    known = {*have, "edited"} if any(name.startswith("edited") for name in have) else {*have}
    if missing := [region for region in wanted or [] if region not in known]:
        raise UserError(f"--regions {missing[0]}: neither pooled nor raw in this run; it has {', '.join(have)}")
    regions = list(wanted) if wanted else [region for region in REGIONS if region in known]
    if not regions:
        raise UserError(
            f"{clean.run.path}: no states of {', '.join(REGIONS)}; it has {', '.join(have) or 'none'}: "
            "name some with --regions, or run stage 2 with others in --pool_regions"
        )
    for region in regions:
        if region in have and len(layers := clean.state_layers(region)) < clean.layer_count():
            told = " ".join(map(str, layers))
            get_logger().debug(f"{region}: not pooled, so that its states are known in the raw layers {told} alone")
    return regions


def _centre(
    clean: StyleRows, rows: list[int], region: str, count: int, without_first: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Median clean state [L+1,D] of a region, and the median of the norms [L+1], over up to `count` of the rows."""
    if without_first:
        # Where all are on the first token, none counts, and it is no matter what their centre is.
        rows = [row for row, on in zip(rows, clean.holds_first(rows, region), strict=True) if not on] or rows
    states = clean.states(rows[:count], region)
    return states.nanmedian(1).values, states.norm(dim=-1).nanmedian(1).values


def _tell_missing(sources: Sources) -> None:
    log = get_logger()
    tell_controls(sources.run, list(sources.styles))
    without = [style for style, found in sources.references.items() if found is None]
    if without and "edited" in sources.regions:
        log.warning(f"no recovery depth of {', '.join(without)}: they edit fewer than two words of the clean prompts")
    counts = [f"{style} {len(found.rows)}" for style, found in sources.references.items() if found]
    log.debug(f"other words to compare with: {', '.join(counts) or 'none'}")


def _open_lens(sources: Sources, args: argparse.Namespace) -> None:
    from attention.logit_lens import open_lens

    clean = sources.clean
    if "last" not in clean.state_regions() or not clean.has("topk_vals"):
        raise UserError(
            "--model_name: the logit lens needs the states of the last token and the run's topk_vals; run stage 2 "
            "with `last` among --pool_regions or with --raw_layers, and with --topk_logits"
        )
    sources.lens_rows = set(clean.indices[: args.lens_rows])
    sources.lens = open_lens(args.model_name, args.dtype, args.device_map)
    rows = clean.indices[: min(8, args.lens_rows)]
    values, indices, _ = _last_logits(clean, rows)
    states = clean.states(rows, "last")
    sources.lens.check_size(len(states) - 1, states.shape[-1])
    if clean.state_layers("last")[-1] == sources.lens.layer_count:
        sources.lens.check(states[-1], values, indices)
        return
    made_by = sources.run.settings(clean.style).get("settings", {}).get("model_name", "an unknown model")
    get_logger().warning(
        f"the last layer is not at hand, so that --model_name {args.model_name} cannot be checked against the run's "
        f"logits; the run was made by {made_by}"
    )


@contextmanager
def _items_writer(path: Path) -> Iterator[Any]:
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, ITEM_COLUMNS, restval="")
        writer.writeheader()
        yield writer


def _plot(curves: pd.DataFrame, summary: pd.DataFrame, folder: Path) -> None:
    from attention.layer_curves import plot_distances, plot_lens, plot_recovery

    plot_distances(curves, folder / "activation_diffs.png")
    plot_recovery(curves, summary, folder / "typo_recovery.png")
    plot_lens(curves, folder / "logit_lens.png")


if __name__ == "__main__":
    run_main(main)
