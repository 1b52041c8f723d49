"""Word recovery by readout: does the model, at the last token of a mistyped word, read the word that was meant?

The logit lens at the last token of a word that was cut into pieces names the whole word in the middle layers (Kaplan et
al. 2024, arXiv 2410.05864). Here the token asked for is the first of the clean word, as the clean prompt has it (with
its space), at the last token of the typo, of its control and of the clean word itself. docs/METHODS.md has the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
from paired_stats import benjamini_hochberg, clustered_mean
from style_names import is_again, is_control
from style_rows import StyleRows, clean_prompt, control_of, like_control, twin_region
from token_spans import edited_spans

from attention.activations import Comparison
from attention.logit_lens import LogitLens

TYPO, CONTROL, CLEAN = "", "control_", "clean_"  # forms of a row, as they begin the names of columns
COLUMNS = ["style", "layer", "control", "n", "n_clusters", "n_left_out"]


@dataclass(frozen=True)
class Word:
    """The last edited word of a prompt: the prompt up to its end, and where it begins in it."""

    prompt: list[int]
    start: int
    edited: set[int]  # tokens of all edited words

    @property
    def tokens(self) -> list[int]:
        """Its tokens."""
        return self.prompt[self.start :]


def recovery_table(study: Comparison) -> pd.DataFrame:
    """One line per style and layer: the columns of word_recovery.csv; none without a lens."""
    tables = [] if study.lens is None else [*_style_tables(study, study.lens)]
    if not tables:
        return pd.DataFrame(columns=COLUMNS)
    table = pd.concat(tables, ignore_index=True)
    for name in ("p", "edited_attention_p"):
        place = int(table.columns.get_indexer([name])[0]) + 1
        table.insert(place, f"{name}_adjusted", benjamini_hochberg(table[name]))
    return table


def _style_tables(study: Comparison, lens: LogitLens) -> Iterator[pd.DataFrame]:
    for style, own in study.styles.items():
        if is_control(style) or is_again(style):
            continue
        # 1. The rows, and their word in each form.
        forms, wanted = {TYPO: own, CLEAN: study.clean}, {*study.clean.indices[: study.args.lens_rows]}
        rows = [row for row in own.indices if row in study.clean and row in wanted]
        if control := control_of(study.run, style):
            forms[CONTROL] = study.styles[control]
            most = study.args.split_tokens if study.args.split_tokens >= 0 else None
            rows = like_control(own, forms[CONTROL], rows, most)
        words = {row: found for row in rows if (found := edited_words(forms, style, row, study.without_first))}
        asked = {row: meant_token(lens, found[CLEAN]) for row, found in words.items()}
        kept = [row for row in words if not any(asked[row] in words[row][form].edited for form in {*forms} - {CLEAN})]
        if not kept:
            continue

        # 2. What the lens reads there, and how much the edited tokens attend to each other.
        prompts = [words[row][form].prompt for form in forms for row in kept]
        read = lens.readouts(prompts, [asked[row] for row in kept] * len(forms))
        ranks, logprobs = (dict(zip(forms, np.split(values, len(forms)), strict=True)) for values in read)
        attention = {
            form: edited_attention(table, kept, region_of(form, style))
            for form, table in forms.items()
            if table.has("span_mass")
        }

        # 3. The line of each layer.
        clusters, layers = own.clusters(kept), np.arange(lens.layer_count + 1)
        none = np.full((len(kept), len(layers)), np.nan)
        columns = dict(zip(COLUMNS, (style, layers, control, len(kept), 0, len(rows) - len(kept)), strict=True))
        columns |= {f"{form}rank_median": np.median(ranks.get(form, none), axis=0) for form in (TYPO, CONTROL, CLEAN)}
        for form in (TYPO, CONTROL, CLEAN):
            estimate = clustered_mean(logprobs.get(form, none), clusters)
            columns |= estimate.columns(f"{form}logprob", f"{form}logprob_ci")
        change = clustered_mean(logprobs[TYPO] - logprobs.get(CONTROL, none), clusters)
        columns["n_clusters"] = clustered_mean(logprobs[TYPO], clusters).n_clusters
        columns |= change.columns("difference_to_control", "difference_ci") | {"p": change.p}
        mine, theirs = (attention.get(form, none[:, 1:]) for form in (TYPO, CONTROL))
        change = clustered_mean(_to_layers(mine - theirs, len(layers)), clusters)
        columns |= {
            f"{form}edited_attention": clustered_mean(_to_layers(values, len(layers)), clusters).mean
            for form, values in ((TYPO, mine), (CONTROL, theirs))
        }
        columns |= change.columns("edited_attention_difference", "edited_attention_ci")
        yield pd.DataFrame(columns | {"edited_attention_p": change.p})


def _to_layers(values: np.ndarray, count: int) -> np.ndarray:
    """[n, count]: attention of layer i beside the state that layer i reads; no layer reads the last state."""
    return np.pad(values, ((0, 0), (0, count - values.shape[1])), constant_values=np.nan)


def region_of(form: str, style: str) -> str:
    """Name of the region of a style's edited words in a form of the row."""
    return twin_region("edited", style) if form == CLEAN else "edited"


def edited_words(
    forms: dict[str, StyleRows], style: str, row: int, without_first: bool = True
) -> dict[str, Word] | None:
    """The last edited word of a row in each form.

    None if it cannot be told which clean word it stands for, because words were added, left out, joined or touch each
    other; with `without_first` also if an edited word holds the first token.
    """
    clean, typo = clean_prompt(forms[CLEAN].run, row), forms[TYPO].texts([row])[0]
    if clean is None or typo is None:
        return None
    counts, found = {*map(len, edited_spans(clean, typo))}, {}
    for form, table in forms.items():
        content, _, position = table.place(row)
        real = content["attention_mask"][position].bool()
        ids, names = content["input_ids"][position][real], content["regions"]
        if (region := region_of(form, style)) not in names:
            return None
        inside = content["region_mask"][position][real][:, names.index(region)].numpy()
        runs = np.flatnonzero(np.diff(np.pad(inside.astype(int), 1))).reshape(-1, 2)  # first token, end
        counts.add(len(runs))
        if not len(runs) or (without_first and runs[0, 0] == 0):
            return None
        start, end = runs[-1].tolist()
        found[form] = Word(ids[:end].tolist(), start, {*ids[inside].tolist()})
    return found if len(counts) == 1 else None


def meant_token(lens: LogitLens, clean: Word) -> int:
    """First token of the clean word that is no white space alone."""
    named = [token for token in clean.tokens if lens.tokenizer is None or lens.tokenizer.decode([token]).strip()]
    return (named or clean.tokens)[0]


def edited_attention(table: StyleRows, rows: list[int], region: str) -> np.ndarray:
    """[n, L] attention from the edited tokens to the edited tokens, mean over heads and query tokens."""
    mass = table.field("span_mass", rows)
    place = table.regions("span_mass").index(region)
    return mass[:, :, :, place, place].astype(np.float64).mean(axis=2)
