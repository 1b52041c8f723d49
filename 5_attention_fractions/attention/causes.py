"""What patching restores, by layer, head and set of units: tables of patches_*.pt (docs/METHODS.md).

A patch puts one run's state (the donor's) into another (the recipient) at one place. Denoising: the control gives, the
typo receives. Per row, with d the donor's next-token distributions along its own response, r the recipient's and x the
patched run's: nats = sum over tokens of KL(d || .), and

    R = 1 - sum over rows KL(d || x) / sum over rows KL(d || r)

is 1 if the patch restores the donor's behaviour and 0 if it changes nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from command_line import UserError
from file_output import write_or_remove
from logger import get_logger
from paired_stats import benjamini_hochberg, clustered_mean, clustered_ratio, holm, jackknife_df
from plot_style import remove_pictures
from run_store import Run, load_pt
from scipy import stats

from attention.causes_compared import NEURON_SITE, OWN, agreement, reaction_and_cause, reactions_of
from attention.causes_plots import save_pictures, save_units

ALPHA = 0.05
HALF = 0.5  # of the effect
OTHER, RANDOM = "other", "random"  # donors that are controls: another item's, or a random direction as long
DENOISING = "denoising"
CELL = ["site", "positions", "direction", "donor", "layer", "head", "set"]
CELL_KEYS = ["sites", "positions", "cell_directions", "donors", "layers", "heads", "sets"]  # their names in a file
FAMILY = ["site", "positions", "direction", "donor"]
ADJUSTED = ("p_adjusted", "p_adjusted_vs_control", "p_adjusted_vs_random")
STRUCTURAL = ("resid_pre", "mlp_out", "mlp_post")  # at layer 0 these are the token's embedding, and what extends it
MEASURES = ("nats", "nats_first", "sld", "restored", "answer_logprob")
LATER = ("after", "readout")  # positions after the edited tokens
SCREENED_SET = "attribution_top_"  # begins the name of a set that the screen chose, and of its random twins
RANDOM_SET = r"_random_\d+$"  # ends the name of a set of random units


@dataclass(frozen=True)
class Patches:
    """All patches of one style and source; NaN: not run for this row.

    cells: one line per patch (CELL). patched: {measure: [n, K]}; recipient, donor: {measure: [n, K]} of the unpatched
    runs in the cell's direction. counts: [n, K] what is estimated on which rows; if a screen chose units, theirs do not
    count in the rows that chose them. attributed: {site: [L, units]} mean of the screen's estimate over the other rows.
    tokens: {row: (text, edited?) of token_0, token_1 …}, if tokens were patched one by one.
    """

    style: str
    source: str
    rows: list[int]
    clusters: np.ndarray
    choosing: np.ndarray  # [n] half of the templates on which a screen chose units
    cells: pd.DataFrame
    patched: dict[str, np.ndarray]
    recipient: dict[str, np.ndarray]
    donor: dict[str, np.ndarray]
    counts: np.ndarray
    attributed: dict[str, np.ndarray]
    screened: str  # the direction of the screen
    tokens: dict[int, list[tuple[str, bool]]] = field(default_factory=dict)

    def gain(self, measure: str, place: Any = slice(None)) -> np.ndarray:
        """[n, K] what each patch wins back: recipient - patched for nats, else patched - recipient. NaN: counts not."""
        change = self.patched[measure][:, place] - self.recipient[measure][:, place]
        change = -change if measure.startswith("nats") else change
        return np.where(self.counts[:, place], change, math.nan)

    def whole(self, measure: str, place: Any = slice(None)) -> np.ndarray:
        """[n, K] what there is to win back: the recipient's nats, else donor - recipient. NaN: counts not."""
        before = self.recipient[measure][:, place]
        before = before if measure.startswith("nats") else self.donor[measure][:, place] - before
        return np.where(self.counts[:, place], before, math.nan)

    def where(self, **values: Any) -> np.ndarray:
        """Places of the cells that have these values, by layer and head."""
        chosen = self.cells
        for name, value in values.items():
            chosen = chosen[chosen[name] == value]
        return chosen.sort_values(["layer", "head"], kind="stable").index.to_numpy()


def write_causes(run: Run, styles: Sequence[str] | None, folder: Path) -> list[str]:
    """Write all tables and pictures of the patched styles into `folder`, log the main findings; return the names."""
    patched = open_patches(run, styles)
    cells = [cell_table(one) for one in patched]
    whole = pd.concat(cells, ignore_index=True)
    for name in ADJUSTED if whole["style"].nunique() > 1 else ():
        whole[name] = whole.groupby(["source", *CELL])[name].transform(holm)  # over the styles
    is_set = whole["set"] != ""
    layers, units = whole[~is_set & (whole["head"] < 0)], whole[~is_set & (whole["head"] >= 0)].drop(columns="set")
    neurons = units[units["site"] == NEURON_SITE].rename(columns={"head": "neuron"})
    heads = units[units["site"] != NEURON_SITE]
    handed = pd.DataFrame(_hand_over_lines(patched))
    layers = layers.merge(handed, how="left", on=["style", "source", "direction"])
    sets = pd.concat([set_table(one, table) for one, table in zip(patched, cells, strict=True)], ignore_index=True)
    if len(sets):
        family = ["source", *FAMILY]
        sets["p_vs_random_adjusted"] = sets.groupby([*family, "set"])["p_vs_random"].transform(holm)  # over the styles
        sets = sets.sort_values(["style", *family, "units"], ignore_index=True)
    tables = {
        "patching_layers": layers.drop(columns=["head", "set"]),
        "patching_heads": heads,
        "patching_neurons": neurons,
        "patching_sets": sets,
        "patching_faithfulness": faithfulness(sets) if len(sets) else sets,
        "patching_items": pd.concat([item_table(run, one) for one in patched], ignore_index=True),
    }
    reactions = reactions_of(run, patched, folder / "head_sensitivity.csv")
    tables["patching_agreement"] = agreement(units)
    tables["patching_reactions"] = reaction_and_cause(units, patched, reactions)
    written = [name for name, table in tables.items() if write_or_remove(folder / f"{name}.csv", table)]
    remove_pictures(folder, "patching_*.png")
    pictures = save_pictures(patched, layers, heads, folder)
    pictures += save_units(units, patched, sets, reactions, folder)
    _report(layers, heads, handed)
    return [*(f"{name}.csv" for name in written), *pictures]


def _hand_over_lines(patched: Sequence[Patches]) -> Iterator[dict[str, Any]]:
    for one in patched:
        for direction in dict.fromkeys(one.cells["direction"]):
            found = {f"hand_over_{name}": value for name, value in hand_over(one, direction).items()}
            yield {"style": one.style, "source": one.source, "direction": direction} | found


def _report(layers: pd.DataFrame, heads: pd.DataFrame, handed: pd.DataFrame) -> None:
    """Log how far the edited word's state carries the effect, where it hands over, how many heads restore it."""
    own = layers[(layers["site"] == "resid_pre") & (layers["positions"] == "edited") & (layers["donor"] == OWN)]
    for keys, part in own.groupby(["style", "source", "direction"], sort=False):
        for line in part[part["R_ci_low"] > HALF].sort_values("layer").tail(1).itertuples():
            text = f"layer {line.layer} (R {line.R:.2f} [{line.R_ci_low:.2f}, {line.R_ci_high:.2f}], n = {line.n})"
            get_logger().info(f"{' '.join(map(str, keys))}: the edited tokens carry more than half up to {text}")
    for line in handed.dropna(subset=["hand_over_layer"]).itertuples():
        interval = f"[{line.hand_over_ci_low:.1f}, {line.hand_over_ci_high:.1f}]"
        get_logger().info(
            f"{line.style} {line.source} {line.direction}: the edited tokens hand over to later ones at layer "
            f"{line.hand_over_layer:.1f} {interval}"
        )
    for keys, part in heads[heads["donor"] == OWN].groupby(["style", "source", "site", "direction"], sort=False):
        clear = int((part["p_adjusted"] < ALPHA).sum())
        get_logger().info(f"{' '.join(map(str, keys))}: {clear} of {len(part)} heads restore or harm (p < .05)")


# --- reading


def open_patches(run: Run, styles: Sequence[str] | None = None) -> list[Patches]:
    """The patches of the run's styles (default: all that have some). Raises UserError if there are none."""
    found = []
    for style in [style for style in run.chosen(styles) if style in (styles or run.styles)]:
        contents = [load_pt(path) for path in sorted(run.styles[style].glob("patches_*.pt"))]
        if styles and not contents:
            raise UserError(f"--styles {style}: has no patches_*.pt; run stage 2's patch_activations.py on it first")
        for source in dict.fromkeys(content["source"] for content in contents):
            found.append(_joined(run, style, source, [one for one in contents if one["source"] == source]))
    if not found:
        raise UserError(f"{run.path}: has no patches_*.pt; run stage 2's patch_activations.py on it first")
    return found


def _joined(run: Run, style: str, source: str, contents: list[dict[str, Any]]) -> Patches:
    """One table of several files, which may differ in rows and cells."""
    choosing = {row: own for one in contents for row, own in zip(one["original_indices"], one["choosing"], strict=True)}
    rows = sorted(choosing)
    tables = [list(zip(*(list(map(_plain, content[key])) for key in CELL_KEYS), strict=True)) for content in contents]
    cells = list(dict.fromkeys(cell for table in tables for cell in table))
    row_place, cell_place = ({key: place for place, key in enumerate(keys)} for keys in (rows, cells))
    patched, recipient, donor = ({name: np.full((len(rows), len(cells)), math.nan) for name in MEASURES} for _ in "prd")
    for content, table in zip(contents, tables, strict=True):
        at = np.ix_([row_place[row] for row in content["original_indices"]], [cell_place[cell] for cell in table])
        for name in MEASURES:
            for side, before in ((patched, ""), (recipient, "recipient_"), (donor, "donor_")):
                if f"{before}{name}" in content:  # the donor has no nats from itself
                    side[name][at] = np.asarray(content[f"{before}{name}"].float())
    chose = np.array([choosing[row] for row in rows], dtype=bool)
    frame = pd.DataFrame(cells, columns=CELL)
    counts = np.ones((len(rows), len(cells)), dtype=bool)
    if screened := [content for content in contents if content["attribution"]]:
        chosen = (frame["head"] >= 0) | frame["set"].str.startswith(SCREENED_SET)
        counts[np.ix_(chose, chosen.to_numpy())] = False
    clusters = np.array([run.template(row) for row in rows])
    attributed = _mean_attribution(screened)
    way = contents[0]["directions"][0]  # of the screen
    told = [zip(one["original_indices"], one["tokens"], strict=True) for one in contents if one.get("tokens")]
    tokens = {row: own for rows_of_file in told for row, own in rows_of_file}
    return Patches(
        style, source, rows, clusters, chose, frame, patched, recipient, donor, counts, attributed, way, tokens
    )


def _mean_attribution(contents: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
    """{site: [L, units]} attributed nats, mean over the rows that chose nothing; file by file, as neurons are many."""
    total: dict[str, Any] = {}
    count = 0
    for content in contents:
        others = [place for place, chose in enumerate(content["choosing"]) if not chose]
        count += len(others)
        for site, values in content["attribution"].items():
            total[site] = total.get(site, 0.0) + values[others].double().sum(0).numpy()
    return {site: values / count for site, values in total.items()} if count else {}


def _plain(value: Any) -> Any:
    return value if isinstance(value, str) else int(value)


# --- tables


def cell_table(patches: Patches) -> pd.DataFrame:
    """One line per patch: R and its interval, nats restored and their test, and the same by other measures.

    p: of the nats restored against 0; p_vs_control: against the same patch with another item's donor. Both adjusted
    (Benjamini-Hochberg) over the layers of one site, positions (all single tokens together) and direction, over its
    single units, and over its sets.
    """
    gain, whole, clusters = patches.gain("nats"), patches.whole("nats"), patches.clusters
    nats = clustered_mean(gain, clusters)
    table = patches.cells.assign(n=nats.n, n_clusters=nats.n_clusters)
    table.insert(0, "style", patches.style)
    table.insert(1, "source", patches.source)
    left = clustered_ratio(whole - gain, whole, clusters, log=True)  # of the recipient's nats, never below 0
    restored = {"R": 1 - left.mean, "R_ci_low": 1 - left.ci_high, "R_ci_high": 1 - left.ci_low}
    table = table.assign(**restored, **nats.columns("nats_restored", "nats_restored_ci"), p=nats.p)
    before, after = patches.recipient["nats"], patches.patched["nats"]  # of all rows, those that chose units too
    for own, name in ((patches.choosing, "R_first_half"), (~patches.choosing, "R_second_half")):
        table[name] = clustered_ratio((before - after)[own], before[own], clusters[own]).mean
    table["nats_attributed"] = [
        _attributed(patches, *cell)
        for cell in patches.cells[["site", "positions", "direction", "layer", "head", "set"]].to_numpy()
    ]
    table["structural"] = (table["layer"] == 0) & table["site"].isin(STRUCTURAL)
    table["structural"] = table["structural"].astype(int)
    for donor, name in ((OTHER, "control"), (RANDOM, RANDOM)):
        _add_control(table, patches, donor, name)
    kind = np.where(table["set"] != "", "set", np.where(table["head"] >= 0, "unit", "site"))
    family = [table[key].str.replace(r"^token_\d+$", "tokens", regex=True) for key in FAMILY]
    for name in ("p", "p_vs_control", "p_vs_random"):
        families = table.groupby([*family, kind])
        table[name.replace("p", "p_adjusted", 1)] = families[name].transform(benjamini_hochberg)
    for measure, name in (("nats_first", "R_first_token"), ("sld", "R_sld")):
        table[name] = clustered_ratio(patches.gain(measure), patches.whole(measure), clusters).mean
    for side, name in ((patches.patched, "restored"), (patches.recipient, "restored_before")):
        table[name] = clustered_mean(np.where(patches.counts, side["restored"], math.nan), clusters).mean
    return table.assign(**answer_share(patches))


def _attributed(
    patches: Patches, site: str, positions: str, direction: str, layer: int, head: int, set_name: str
) -> float:
    """The screen's estimate, which is for all tokens, of one unit (or MLP) in the direction of the screen, else NaN."""
    known = patches.attributed.get(site)
    one = not set_name and (head >= 0 or site == "mlp_out")
    if known is None or not one or positions != "all" or direction != patches.screened:
        return math.nan
    return float(known[layer] if head < 0 else known[layer, head])


def _add_control(table: pd.DataFrame, patches: Patches, donor: str, name: str) -> None:
    """The difference from the same patch with another donor, for those cells that have such a control."""
    cells = patches.cells.assign(cell=patches.cells.index)
    same = [name for name in CELL if name != "donor"]
    pairs = cells[cells["donor"] == OWN].merge(cells[cells["donor"] == donor], on=same, suffixes=("", "_other"))
    own, other = pairs["cell"].to_numpy(), pairs["cell_other"].to_numpy()
    difference = clustered_mean(patches.gain("nats", own) - patches.gain("nats", other), patches.clusters)
    found = {
        f"R_{name}": table["R"].to_numpy()[other],
        f"nats_vs_{name}": difference.mean,
        f"p_vs_{name}": difference.p,
    }
    for column, values in found.items():
        table[column] = pd.Series(values, index=own, dtype=float).reindex(table.index)


def answer_share(patches: Patches) -> dict[str, np.ndarray]:
    """Share of the lost log probability of the right answer that comes back, and its interval: columns [K].

    NaN without answers, and if the mean loss is not clear of 0: a share of nothing has no meaning.
    """
    gain, whole = patches.gain("answer_logprob"), patches.whole("answer_logprob")
    lost = clustered_mean(whole, patches.clusters)
    clear = (lost.ci_low > 0) | (lost.ci_high < 0)
    columns = clustered_ratio(gain, whole, patches.clusters).columns("answer_share", "answer_share_ci")
    return {name: np.where(clear, values, math.nan) for name, values in columns.items()}


def hand_over(patches: Patches, direction: str = DENOISING) -> dict[str, float]:
    """Layer at which the edited tokens hand the effect over: R(edited) falls below R(after) + R(readout).

    Linear between the patched layers; the interval is the cluster jackknife's. NaN if they do not cross.
    """
    places = [
        patches.where(site="resid_pre", positions=name, direction=direction, donor=OWN) for name in ("edited", *LATER)
    ]
    layers = [patches.cells["layer"].to_numpy()[place] for place in places]
    if len(layers[0]) < 2 or any(not np.array_equal(other, layers[0]) for other in layers):
        return dict.fromkeys(("layer", "ci_low", "ci_high"), math.nan)
    gains = [patches.gain("nats", place) for place in places]
    wholes = [patches.whole("nats", place) for place in places]

    def crossing(keep: np.ndarray) -> float:
        edited, *later = (np.nansum(g[keep], 0) / np.nansum(w[keep], 0) for g, w in zip(gains, wholes, strict=True))
        gap = edited - sum(later)
        below = np.flatnonzero((gap[:-1] > 0) & (gap[1:] <= 0))
        if not len(below):
            return math.nan
        at = below[0]
        return float(layers[0][at] + np.diff(layers[0])[at] * gap[at] / (gap[at] - gap[at + 1]))

    names = np.unique(patches.clusters)
    layer, half = crossing(np.full(len(patches.rows), True)), math.nan
    if len(names) < 2:
        return {"layer": layer, "ci_low": half, "ci_high": half}
    shifts = np.array([crossing(patches.clusters != name) for name in names]) - layer
    if not np.isnan(shifts).any():
        half = stats.t.ppf(0.975, jackknife_df(shifts)) * math.sqrt((len(names) - 1) / len(names) * (shifts**2).sum())
    return {"layer": layer, "ci_low": layer - half, "ci_high": layer + half}


def set_table(patches: Patches, cells: pd.DataFrame) -> pd.DataFrame:
    """One line per set of units: its R beside that of random sets of the same layers.

    p_vs_random: clustered t test of the nats that it restores minus the mean of the random sets'.
    """
    lines = []
    gain = patches.gain("nats")
    for line in cells[(cells["set"] != "") & ~cells["set"].str.contains(RANDOM_SET)].itertuples():
        same = np.logical_and.reduce([cells[name] == getattr(line, name) for name in FAMILY])
        others = cells[same & cells["set"].str.fullmatch(re.escape(line.set) + RANDOM_SET)]
        random = gain[:, others.index].mean(axis=1) if len(others) else np.full(len(gain), math.nan)
        beyond = clustered_mean(gain[:, line.Index] - random, patches.clusters)
        size = re.search(r"_top_(\d+)$", line.set)
        names = ("style", "source", *FAMILY, "set", "n", "n_clusters", "R", "R_ci_low", "R_ci_high", "nats_restored")
        found = {"random_sets": len(others), "R_random": others["R"].mean(), "R_random_max": others["R"].max()}
        found |= {"nats_vs_random": beyond.mean, "p_vs_random": beyond.p}
        lines.append({name: getattr(line, name) for name in names} | {"units": size and int(size[1])} | found)
    return pd.DataFrame(lines)


def faithfulness(sets: pd.DataFrame) -> pd.DataFrame:
    """CPR and CMD of each family of sets of growing size (MIB, Mueller et al. 2025), over the sizes that were run.

    f(k) = R of the k strongest units, k as a share of the largest set: CPR is the area under f, CMD that between f and
    1, both by trapezoids from f(0) = 0. `monotone`: more units never restore less.
    """
    lines = []
    grown = sets[sets["set"].str.fullmatch(r".*_top_\d+")]
    grown = grown.assign(method=grown["set"].str.replace(r"_top_\d+$", "", regex=True))
    family = ["style", "source", *FAMILY, "method"]
    for keys, part in grown.groupby(family, sort=False):
        part = part.sort_values("units")
        share, curve = (np.array([0.0, *values]) for values in (part["units"] / part["units"].max(), part["R"]))
        found = {"CPR": np.trapezoid(curve, share), "CMD": np.trapezoid(np.abs(1 - curve), share)}
        sizes = {"n": part["n"].min(), "sizes": " ".join(map(str, part["units"].astype(int)))}
        lines.append(dict(zip(family, keys, strict=True)) | sizes | found | {"monotone": (np.diff(curve) >= 0).all()})
    return pd.DataFrame(lines)


def item_table(run: Run, patches: Patches) -> pd.DataFrame:
    """One line per row and direction: what the unpatched recipient and donor do, in the row's first batch."""
    tables = []
    for direction, cells in patches.cells.groupby("direction", sort=False):
        ids = [run.row(row).get("element_index", row + 1) for row in patches.rows]
        table = pd.DataFrame({"original_index": patches.rows, "element_index": ids})
        table.insert(0, "style", patches.style)
        table = table.assign(source=patches.source, direction=direction, cluster=patches.clusters)
        for side, values in (("recipient", patches.recipient), ("donor", patches.donor)):
            for name in MEASURES if side == "recipient" else ("sld", "answer_logprob"):
                table[f"{side}_{name}"] = pd.DataFrame(values[name][:, cells.index]).bfill(axis=1)[0]
        tables.append(table)
    return pd.concat(tables, ignore_index=True)
