"""Figures of stage 4: reward scores per style, and similarity to the normal response with its noise floor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
from command_line import one_line
from file_output import save_figure
from matplotlib.figure import Figure
from plot_style import BLACK, CLEAN_COLOUR, OTHER_COLOUR, PALE, STYLE_COLOUR, WIDTH


def plot_rewards(items: pd.DataFrame, summary: pd.DataFrame, path: Path, reward_model: str) -> None:
    """Violin of the raw scores of each style, mean with its 95 % interval on top."""
    figure, axes = _violins(items.dropna(subset=["reward_score"]), "reward_score", summary)
    axes.set_ylabel("reward score (raw logit)")
    axes.set_title(f"Reward of the responses, by prompt style\n{_short(reward_model)}")
    save_figure(path, figure)


def plot_similarity(
    items: pd.DataFrame, summary: pd.DataFrame, path: Path, embedding_model: str, noise_floor: float | None
) -> None:
    """Violin of the similarities of each style; a line where two answers to the same normal prompt lie on average."""
    figure, axes = _violins(items.dropna(subset=["similarity"]), "similarity", summary)
    if noise_floor is not None:
        axes.axhline(noise_floor, color=OTHER_COLOUR, linestyle="--", linewidth=1.2, zorder=1)
        text, place = f"noise floor {noise_floor:.2f}:\ntwo normal samples", ("axes fraction", "data")
        axes.annotate(text, (1.01, noise_floor), xycoords=place, color=OTHER_COLOUR, fontsize=8, va="center")
    axes.set_ylabel("cosine similarity to the normal response")
    axes.set_title(f"Response similarity, by prompt style\n{_short(embedding_model)}")
    save_figure(path, figure)


def plot_preferences(summary: pd.DataFrame, path: Path, judge: str) -> None:
    """Stacked shares of rows in which the judge preferred the normal answer, neither, or the style's answer."""
    figure = Figure(figsize=(WIDTH, 1.6 + 0.4 * len(summary)), layout="constrained")
    axes = figure.subplots()
    names = {"losses": "normal answer better", "ties": "tie", "wins": "style's answer better"}
    left = 0 * summary["n"].astype(float)
    for (column, label), colour in zip(names.items(), (OTHER_COLOUR, PALE, STYLE_COLOUR), strict=True):
        share = summary[column] / summary["n"].where(summary["n"] > 0)
        axes.barh(range(len(summary)), share.fillna(0), left=left, color=colour, label=label)
        left = left + share.fillna(0)
    labels = [f"{line.style} (n = {line.n})" for line in summary.itertuples()]
    axes.set_yticks(range(len(summary)), labels)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of judged rows (both orders agree, else tie)")
    axes.set_title(f"Judge's preference, by prompt style\n{_short(judge)}")
    figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    save_figure(path, figure)


def plot_ratings(items: pd.DataFrame, summary: pd.DataFrame, path: Path, judge: str) -> None:
    """Violin of the judge's ratings of each style, mean with its 95 % interval on top."""
    figure, axes = _violins(items.dropna(subset=["rating"]), "rating", summary)
    axes.set_ylim(0.5, 10.5)
    axes.set_ylabel("judge's rating (1 to 10)")
    axes.set_title(f"Judge's rating of the responses, by prompt style\n{_short(judge)}")
    save_figure(path, figure)


def _violins(items: pd.DataFrame, column: str, summary: pd.DataFrame) -> tuple[Any, Any]:
    """One violin a style, in the order of `summary`, whose estimates and intervals are drawn over it."""
    figure = Figure(figsize=(min(WIDTH, max(5.0, 1.6 + 0.95 * len(summary))), 4.2), layout="constrained")
    axes = figure.subplots()
    for position, line in enumerate(summary.itertuples()):
        values = items.loc[items["style"] == line.style, column].to_numpy()
        colour = CLEAN_COLOUR if line.style in ("normal", "instruction") else STYLE_COLOUR
        if len(values) > 1 and values.min() < values.max():
            violin: Any = axes.violinplot(values, [position], widths=0.8, showextrema=False)
            violin["bodies"][0].set(facecolor=colour, alpha=0.35, edgecolor="none")
            lines: dict[str, Any] = {name: {"color": colour} for name in ("medianprops", "boxprops", "whiskerprops")}
            lines |= {"capprops": {"visible": False}, "manage_ticks": False, "showfliers": False}
            axes.boxplot(values, positions=[position], widths=0.12, **lines)
        elif len(values):
            axes.plot([position], values[:1], "_", color=colour, markersize=18)
        if line.n:
            errors = [[line.estimate - line.ci_low], [line.ci_high - line.estimate]]
            axes.errorbar([position], [line.estimate], errors, fmt="o", markersize=4, color=BLACK, capsize=3)
    rotation = 30 if len(summary) > 6 else 0
    labels = [f"{line.style}\nn = {line.n}" for line in summary.itertuples()]
    axes.set_xticks(range(len(summary)), labels, rotation=rotation, fontsize=8)
    axes.set_xlim(-0.6, len(summary) - 0.4)
    axes.grid(axis="y")
    axes.set_xlabel("prompt style (point and bar: mean with 95 % interval; box: quartiles)")
    return figure, axes


def _short(name: str) -> str:
    return one_line("/".join(Path(name).parts[-2:]), 80).replace("$", r"\$")
