"""Single units compared: screen with patching, one half of the templates with the other, reaction with cause."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from file_output import read_csv
from paired_stats import clustered_mean, holm
from run_store import Run
from scipy import stats
from style_rows import StyleRows, control_of, like_control

if TYPE_CHECKING:
    from attention.causes import Patches

OWN = "own"  # a patch puts in the state of the row's own donor
NEURON_SITE = "mlp_post"
# Reactions of a neuron, by the field that has them: the input of the MLP's last linear map, and the gate alone.
NEURON_MEASURES = {"mlp_pooled": "mlp_post edited", "gate_pooled": "act_fn edited"}
HEAD_SITES = ("z", "pattern")  # whose units are the heads of head_sensitivity.csv; `v` counts key-value heads
TOP = 20
FAMILY = ["style", "source", "site", "direction"]
REACTION = ["style", "measure", "layer", "head", "t_vs_control"]


def rank_correlation(one: Any, other: Any) -> dict[str, float]:
    """Spearman's rank correlation over units, its 95 % interval (Bonett & Wright 2000) and p; NaN below 5 units."""
    one, other = np.asarray(one, dtype=float), np.asarray(other, dtype=float)
    known = ~np.isnan(one + other)
    count = int(known.sum())
    if count < 5:
        return {"units": count} | dict.fromkeys(("spearman", "spearman_ci_low", "spearman_ci_high", "p"), math.nan)
    rho, p = stats.spearmanr(one[known], other[known])
    half = 1.96 * math.sqrt((1 + rho**2 / 2) / (count - 3))
    with np.errstate(divide="ignore"):
        low, high = np.tanh(np.arctanh(rho) + np.array([-half, half]))
    return {"units": count, "spearman": rho, "spearman_ci_low": low, "spearman_ci_high": high, "p": p}


def agreement(units: pd.DataFrame) -> pd.DataFrame:
    """Do two estimates of the single units agree? A line for each `compared`:

    halves: R of the two halves of the templates. screen: the nats that attribution estimates and those that patching
    restores; if the screen chose units, both over the rows that chose none. `top_share`: share of the TOP strongest of
    the second estimate that are among the 2 TOP strongest of the first, if there are more units than that.
    """
    lines = []
    pairs = {"halves": ("R_first_half", "R_second_half"), "screen": ("nats_attributed", "nats_restored")}
    for keys, part in units[units["donor"] == OWN].groupby(FAMILY, sort=False) if len(units) else ():
        for name, (first, second) in pairs.items():
            known = part[[first, second]].dropna()
            if len(known) < 5:
                continue
            line = dict(zip(FAMILY, keys, strict=True)) | {"compared": name} | rank_correlation(*known.to_numpy().T)
            line["pearson"] = np.corrcoef(known.to_numpy().T)[0, 1]
            ranked, best = (known[column].abs().nlargest(n).index for column, n in ((first, 2 * TOP), (second, TOP)))
            line["top_share"] = best.isin(ranked).mean() if len(known) > 2 * TOP else math.nan
            lines.append(line)
    return pd.DataFrame(lines)


# --- reaction and cause


def reactions_of(run: Run, patched: Sequence[Patches], heads: Path) -> pd.DataFrame:
    """The columns REACTION and `site`: how clearly each unit tells the typo from its control.

    Heads as head_sensitivity.csv has them, if it is there; neurons from the run's mlp_pooled and gate_pooled, if stage
    2 kept the edited words' and patched or screened neurons.
    """
    tables = [pd.DataFrame(columns=[*REACTION, "site"])]
    if heads.is_file():
        table = read_csv(heads, REACTION)
        tables += [table.assign(site=site) for site in HEAD_SITES]
    for one in {one.style: one for one in patched}.values():
        if NEURON_SITE in one.attributed or (one.cells["site"] == NEURON_SITE).any():
            tables += [*neuron_reactions(run, one)]
    return pd.concat([table for table in tables if len(table)] or tables, ignore_index=True)


def neuron_reactions(run: Run, patches: Patches) -> Iterator[pd.DataFrame]:
    """t of typo minus control for every neuron of each layer, mean over the edited tokens, in each quantity kept."""
    name = control_of(run, patches.style)
    if name is None:
        return
    own, control = StyleRows(run, patches.style), StyleRows(run, name)
    kept = [field for field in NEURON_MEASURES if all(one.has(field) for one in (own, control))]
    kept = [field for field in kept if all("edited" in one.regions(field) for one in (own, control))]
    rows = like_control(own, control, patches.rows, 0) if kept else []
    for field in kept:
        for layer in range(own.layer_count() - 1):
            typo, clean = (one.field(field, rows, "edited", layer) for one in (own, control))
            t = clustered_mean(typo - clean, own.clusters(rows)).t
            keys = {"style": patches.style, "measure": NEURON_MEASURES[field], "site": NEURON_SITE}
            yield pd.DataFrame(keys | {"layer": layer, "head": np.arange(len(t)), "t_vs_control": t})


def reaction_and_cause(units: pd.DataFrame, patched: Sequence[Patches], reactions: pd.DataFrame) -> pd.DataFrame:
    """Rank correlation over units of |t| against the control with what patching them does, by style and measure.

    cause: `patched`, |R| of the units that were patched one by one; `attributed`, the screen's |nats| of all units.
    """
    lines = []
    for keys, cause, effects in causes_of(units, patched):
        own = reactions[(reactions["style"] == keys["style"]) & (reactions["site"] == keys["site"])]
        for measure, reaction in own.groupby("measure", sort=False):
            pairs = effects.to_frame("effect").join(reaction.set_index(["layer", "head"])["t_vs_control"], how="inner")
            found = rank_correlation(pairs["effect"].abs(), pairs["t_vs_control"].abs())
            if found["units"] >= 5:
                lines.append(keys | {"cause": cause, "measure": measure} | found)
    table = pd.DataFrame(lines)
    if len(table):
        table["p_adjusted"] = table.groupby(["style", "source"])["p"].transform(holm)
    return table


def causes_of(units: pd.DataFrame, patched: Sequence[Patches]) -> Iterator[tuple[dict[str, Any], str, pd.Series]]:
    """(columns FAMILY, `patched` or `attributed`, effect of each (layer, unit)) of every family of units."""
    for keys, part in units[units["donor"] == OWN].groupby(FAMILY, sort=False) if len(units) else ():
        yield dict(zip(FAMILY, keys, strict=True)), "patched", part.set_index(["layer", "head"])["R"]
    for one in patched:
        for site, values in one.attributed.items():
            if values.ndim == 2:
                index = pd.MultiIndex.from_product([range(size) for size in values.shape], names=["layer", "head"])
                keys = dict(zip(FAMILY, (one.style, one.source, site, one.screened), strict=True))
                yield keys, "attributed", pd.Series(values.ravel(), index=index)
