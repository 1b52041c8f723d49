"""How robust a model is to the prompt's form, by the measures of the literature (formulas: docs/METHODS.md).

The forms are the clean form and every style that is a way to write the prompt (no controls, no repairs). All measures
but the slopes are over the same rows: those that have an answer in each form.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from accuracy_tables import row_scores
from file_output import write_or_remove
from logger import get_logger
from paired_stats import BLOCK_NUMBERS, CONFIDENCE, cluster_codes, clustered_mean, minimum_detectable_effect
from run_store import Run
from scipy import sparse
from statsmodels.genmod.bayes_mixed_glm import BinomialBayesMixedGLM
from style_names import dose_of, is_variant

ALL = "all"  # in the column style: over all forms
DRAWS = 2000
TAIL = (1 - CONFIDENCE) / 2
CROSSED = (
    "response_logprobs",
    "normal_response_logprob",
    "normal_response_token_count",
    "response_logprob_under_normal",
)
GLMM_ROWS = 500  # its time grows faster than the rows
COLUMNS = (
    *("style", "measure", "forms", "n", "n_clusters", "estimate", "ci_low", "ci_high", "p"),
    "minimum_detectable_difference",
)


def write_robustness(run: Run, items: pd.DataFrame, clean_style: str, folder: Path) -> None:
    """Write robustness_summary.csv if the run has the clean form and another one; log its main measures."""
    table = robustness_summary(items, clean_style, run)
    if not write_or_remove(folder / "robustness_summary.csv", table):
        return
    lines = table[table["style"] == ALL].set_index("measure")
    names = [name for name in ("worst_accuracy", "spread", "pss", "consistency_rate") if name in lines.index]
    texts = [
        f"{name.replace('_', ' ')} {line.estimate:.3f} [{line.ci_low:.3f}, {line.ci_high:.3f}]"
        for name, line in lines.loc[names].iterrows()
    ]
    if texts:
        first = lines.loc["spread"]
        get_logger().info(f"{first['forms']}: {', '.join(texts)}, n = {first['n']}")


def robustness_summary(items: pd.DataFrame, clean_style: str, run: Run | None = None) -> pd.DataFrame:
    """One line per measure, and per style if it is of one style; empty without the clean form or another form.

    items: scored answers with style, original_index, sample, template, identical, correct, value, response;
    answer_logprob for its slope. run: of these items, for POSIX.
    """
    scores = row_scores(items)
    styles = list(pd.unique(scores["style"]))
    forms = [clean_style, *(style for style in styles if is_variant(style, clean_style))]
    if clean_style not in styles or len(forms) < 2:
        return pd.DataFrame(columns=list(COLUMNS))
    matrix = _matrix(scores, forms)
    if len(matrix) < scores["original_index"].nunique() / 2:
        counts = scores[~scores["identical"].astype(bool)]["style"].value_counts()
        rarest = min(forms, key=lambda form: counts.get(form, 0))
        get_logger().warning(
            f"robustness_summary.csv: only {len(matrix)} rows have all {len(forms)} forms ({rarest} has "
            f"{counts.get(rarest, 0)}); leave a rare style out with --styles"
        )
    lines = []
    if len(matrix):
        clusters = matrix.pop("cluster")
        lines += _bootstrapped_lines(matrix.to_numpy(), agreement(items, forms, matrix.index), clusters, forms)
        lines += _posix_lines(run, clusters, forms) if run else []
        lines += _glmm_lines(matrix.to_numpy(), clusters, forms)
    lines += _slope_lines("accuracy_slope", scores, clean_style)
    if "answer_logprob" in items:
        logprobs = row_scores(items.assign(correct=items["answer_logprob"]))
        lines += _slope_lines("answer_logprob_slope", logprobs, clean_style)
    return pd.DataFrame(lines, columns=list(COLUMNS))


def _matrix(scores: pd.DataFrame, forms: Sequence[str]) -> pd.DataFrame:
    """[rows, forms] of the scores, and `cluster`: rows with all forms, none of which is the clean prompt again."""
    own = scores[scores["style"].isin(forms) & ~scores["identical"].astype(bool)]
    wide = own.pivot(index="original_index", columns="style", values="correct").reindex(columns=list(forms)).dropna()
    clusters = own.groupby("original_index")["template"].first()
    return wide.assign(cluster=clusters.reindex(wide.index))  # an empty table would take the rows of the column


# --- measures of the matrix rows x forms, with bootstrap intervals


def agreement(items: pd.DataFrame, forms: Sequence[str], rows: pd.Index) -> np.ndarray:
    """[rows] share of the pairs of forms whose answers agree (SCORE's consistency rate; mean over samples).

    Two answers agree if they are the same, or both right. An answer that could not be read is the response's text.
    """
    own = items[items["style"].isin(forms) & items["original_index"].isin(rows) & items["correct"].notna()]
    answers = own["value"].where(own["value"].notna(), own["response"].fillna("").str.strip())
    keys = [own["original_index"], own["sample"], own["style"]]
    tables = [
        pd.Series(values, index=pd.MultiIndex.from_arrays(keys)).unstack()[list(forms)]
        for values in (pd.factorize(answers.astype(str))[0].astype(float), own["correct"].to_numpy(float))
    ]
    known = tables[0].notna().all(axis=1)
    codes, right = (table[known].to_numpy() for table in tables)
    pairs = [(codes[:, a] == codes[:, b]) | (right[:, a] * right[:, b] == 1) for a, b in _pairs(len(forms))]
    share = pd.Series(np.mean(pairs, axis=0), index=tables[0].index[known])
    return share.groupby(level=0).mean().reindex(rows).to_numpy()


def _pairs(count: int) -> list[tuple[int, int]]:
    return list(combinations(range(count), 2))


def _bootstrapped_lines(
    matrix: np.ndarray, agree: np.ndarray, clusters: pd.Series, forms: Sequence[str]
) -> list[dict[str, Any]]:
    """The lines of everything that is a function of sums over rows; matrix [n, k]: scores from 0 to 1."""
    n, k = matrix.shape
    differences = [np.abs(matrix[:, a] - matrix[:, b]) for a, b in _pairs(k)]
    columns = [np.ones(n), np.mean(differences, axis=0), agree, (matrix**2).sum(axis=1), matrix.sum(axis=1) ** 2]
    sums = _cluster_sums([*columns, matrix], clusters)
    whole, drawn = _measures(sums.sum(axis=0), k), _measures(bootstrap_sums(sums), k)
    shared = {"forms": ", ".join(forms), "n": n, "n_clusters": len(sums)}
    means, drawn_means = whole.pop("means"), drawn.pop("means")
    best, worst = int(means.argmax()), int(means.argmin())
    low, high, _ = maximum_interval(-means, -drawn_means)
    lines = [_line("worst_accuracy", means[worst], (-high, -low), shared | {"forms": forms[worst]})]
    low, high, _ = maximum_interval(means, drawn_means)
    lines.append(_line("best_accuracy", means[best], (low, high), shared | {"forms": forms[best]}))
    one, other = np.array([(a, b) for a in range(k) for b in range(k) if a != b]).T
    low, high, p = maximum_interval(means[one] - means[other], drawn_means[:, one] - drawn_means[:, other])
    lines.append(_line("spread", means[best] - means[worst], (low, high), shared) | {"p": p})
    drops, drawn_drops = whole.pop("pdr"), drawn.pop("pdr")
    for name, value in whole.items():
        # The draws of a variance are too large or too small by what drawing the rows adds.
        bias = drawn[name].mean() - value if name.startswith("variance_share") else 0.0
        lines.append(_line(name, value, percentiles(drawn[name] - bias), shared))
    lines.append(_line("pdr", drops.mean(), percentiles(drawn_drops.mean(axis=1)), shared, limits=(-math.inf, 1)))
    for place, style in enumerate(forms[1:]):
        own = shared | {"style": style, "forms": f"{forms[0]}, {style}"}
        lines.append(_line("pdr", drops[place], percentiles(drawn_drops[:, place]), own, limits=(-math.inf, 1)))
    return lines


def _line(
    measure: str,
    estimate: Any,
    interval: tuple[float, float],
    shared: dict[str, Any],
    limits: tuple[float, float] = (0, 1),
) -> dict[str, Any]:
    """A line of the table; `limits` are those of the measure, which its interval does not cross."""
    low, high = np.clip(interval, *limits) + 0.0 if shared["n_clusters"] > 1 else (math.nan, math.nan)
    return {"style": ALL, "measure": measure, "estimate": estimate, "ci_low": low, "ci_high": high} | shared


def _measures(sums: np.ndarray, k: int) -> dict[str, np.ndarray]:
    """The measures as functions of sums [..., 5 + k]; means [..., k], pdr [..., k - 1], all others [...]."""
    n, pss, agree, squares, row_squares = (sums[..., place] for place in range(5))
    by_form = sums[..., 5:]
    means = by_form / n[..., None]
    drops = 1 - by_form[..., 1:] / np.where(by_form[..., :1] > 0, by_form[..., :1], math.nan)
    shares = variance_shares(n, by_form, squares, row_squares)
    names = ("variance_share_row", "variance_share_style", "variance_share_residual")
    return {
        "means": means,
        "pss": pss / n,
        "consistency_rate": agree / n,
        **dict(zip(names, shares, strict=True)),
        "pdr": drops,
    }


def variance_shares(
    n: np.ndarray, by_form: np.ndarray, squares: np.ndarray, row_squares: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Shares of row, style and residual in the variance of a matrix rows x forms (two-way analysis of variance).

    n: rows; by_form [..., k]: sum of each form; squares: sum of squared cells; row_squares: sum over rows of the
    squared row sum. Components are those of the random-effects model, a negative one counts as 0; NaN if all are 0.
    """
    k = by_form.shape[-1]
    correction = by_form.sum(axis=-1) ** 2 / (n * k)
    of_rows = row_squares / k - correction
    of_styles = (by_form**2).sum(axis=-1) / n - correction
    with np.errstate(divide="ignore", invalid="ignore"):
        residual = (squares - correction - of_rows - of_styles) / ((n - 1) * (k - 1))
        row = np.maximum(0, (of_rows / (n - 1) - residual) / k)
        style = np.maximum(0, (of_styles / (k - 1) - residual) / n)
        residual = np.maximum(0, residual)
        total = row + style + residual
        return row / total, style / total, residual / total


def _cluster_sums(columns: Sequence[np.ndarray], clusters: pd.Series) -> np.ndarray:
    """[clusters, m] sums over the rows of each cluster of columns [n] or [n, j]."""
    values, codes = np.column_stack(columns), cluster_codes(len(clusters), clusters)
    sums = np.zeros((codes.max(initial=-1) + 1, values.shape[1]))
    np.add.at(sums, codes, values)
    return sums


def bootstrap_sums(sums: np.ndarray, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """[draws, m] sums over as many clusters as there are, drawn with replacement; sums: [clusters, m]."""
    rng, count = np.random.default_rng(seed), len(sums)
    step = max(1, BLOCK_NUMBERS // count)
    even = np.full(count, 1 / count)
    blocks = [rng.multinomial(count, even, size=min(step, draws - start)) for start in range(0, draws, step)]
    return np.concatenate([block @ sums for block in blocks])


def percentiles(draws: np.ndarray) -> tuple[float, float]:
    """95 % percentile interval of draws [B]; NaN if one of them is not defined."""
    if not np.isfinite(draws).all():
        return math.nan, math.nan
    low, high = np.quantile(draws, [TAIL, 1 - TAIL])
    return float(low), float(high)


def maximum_interval(estimates: np.ndarray, draws: np.ndarray) -> tuple[float, float, float]:
    """(low, high, p) of the largest of m true values, from estimates [m] and bootstrap draws [B, m] of each.

    The largest estimate is too large on average, and percentiles of the draws' maxima even more. low is the largest
    lower limit that holds for all m at once (with the 97.5 % quantile of the largest standardised error), high the
    largest of the m upper percentiles. p: of the null that no value is above 0, by the same largest error.
    """
    errors = draws.std(axis=0)
    varies = errors > 0
    fixed = estimates[~varies]
    if not varies.any():
        return float(fixed.max()), float(fixed.max()), math.nan
    largest = ((draws - estimates)[:, varies] / errors[varies]).max(axis=1)
    low = (estimates[varies] - np.quantile(largest, 1 - TAIL) * errors[varies]).max()
    high = np.quantile(draws, 1 - TAIL, axis=0).max()
    found = (estimates[varies] / errors[varies]).max()
    p = (1 + (largest >= found).sum()) / (1 + len(draws))
    return float(max([low, *fixed])), float(high), float(p)


# --- log probabilities of the responses


def _posix_lines(run: Run, clusters: pd.Series, forms: Sequence[str]) -> list[dict[str, Any]]:
    """The lines of POSIX over the pairs (clean form, style), if the run has --cross_logprobs; clusters: by row."""
    pairs = posix_pairs(run, forms, list(clusters.index))
    if pairs is None:
        return []
    known = np.isfinite(pairs).all(axis=1)
    values = np.column_stack([pairs.mean(axis=1), pairs])[known]
    sums = _cluster_sums([np.ones(len(values)), values], clusters[known])
    if not len(values):
        return []
    draws = bootstrap_sums(sums)
    drawn, shared = draws[:, 1:] / draws[:, :1], {"n": len(values), "n_clusters": len(sums)}
    lines = []
    for place, style in enumerate((ALL, *forms[1:])):
        own = shared | {"style": style, "forms": ", ".join(forms if style == ALL else (forms[0], style))}
        ends = percentiles(drawn[:, place])
        lines.append(_line("posix", values[:, place].mean(), ends, own, limits=(0, math.inf)))
    return lines


def posix_pairs(run: Run, forms: Sequence[str], rows: Sequence[int]) -> np.ndarray | None:
    """[n, k - 1] POSIX of the two prompts of each row, the clean form (the first of `forms`) and a style, in nats.

    psi = 1/2 (|log P(y|x') - log P(y|x)| / |y| + |log P(y'|x) - log P(y'|x')| / |y'|) with the clean prompt x and its
    response y of |y| tokens, the style's x' and y' (Chatterjee et al. 2024, with N = 2). NaN if a response
    has no token or was not scored; None if the run has no such fields.
    """
    tables = [run.style_rows(form) for form in forms]
    if not all(table.has(name) for table in tables[1:] for name in CROSSED) or not tables[0].has(CROSSED[0]):
        return None
    clean = tables[0].extract(_own_logprobs, rows)["own"]
    pairs = []
    for table in tables[1:]:
        found = table.extract(lambda content, path: _own_logprobs(content, path) | _crossed_logprobs(content), rows)
        with np.errstate(divide="ignore", invalid="ignore"):
            of_clean = np.abs(found["clean_here"] - clean) / found["clean_tokens"]
            of_style = np.abs(found["under_clean"] - found["own"]) / found["own_tokens"]
        pairs.append((of_clean + of_style) / 2)
    return np.column_stack(pairs)


def _own_logprobs(content: dict[str, Any], _: Path) -> dict[str, np.ndarray]:
    return {
        "own": content["response_logprobs"].double().nansum(dim=1).numpy(),
        "own_tokens": np.array(content["response_token_counts"], dtype=float),
    }


def _crossed_logprobs(content: dict[str, Any]) -> dict[str, np.ndarray]:
    names = {"clean_here": CROSSED[1], "clean_tokens": CROSSED[2], "under_clean": CROSSED[3]}
    return {name: np.array(content[key], dtype=float) for name, key in names.items()}


# --- a model of the answers, slopes


def _glmm_lines(matrix: np.ndarray, clusters: pd.Series, forms: Sequence[str]) -> list[dict[str, Any]]:
    """Shares of row and style in the latent variance of yes-or-no answers; none if they do not vary or fit."""
    if len(matrix) > GLMM_ROWS:
        chosen = np.linspace(0, len(matrix) - 1, GLMM_ROWS).round().astype(int)
        matrix, clusters = matrix[chosen], clusters.iloc[chosen]
    shares = glmm_shares(matrix)
    n_clusters = int(cluster_codes(len(matrix), clusters).max()) + 1
    shared = {"forms": ", ".join(forms), "n": len(matrix), "n_clusters": n_clusters}
    none = (math.nan, math.nan)
    return [_line(f"glmm_share_{name}", share, none, shared) for name, share in shares.items()]


def glmm_shares(matrix: np.ndarray) -> dict[str, float]:
    """{row, style, residual: share} of a logistic model with random rows and forms, fitted by variational Bayes.

    matrix: [n, k]. The residual variance is that of the logistic distribution, pi² / 3. Empty if the matrix is not of 0
    and 1, does not vary, or the fit does not converge.
    """
    n, k = matrix.shape
    if not np.isin(matrix, (0, 1)).all() or matrix.min() == matrix.max():
        return {}
    row, form = sparse.identity(n, format="csr"), sparse.identity(k, format="csr")
    effects = sparse.hstack([sparse.kron(row, np.ones((k, 1))), sparse.kron(np.ones((n, 1)), form)], format="csr")
    kinds = np.repeat([0, 1], [n, k])
    model = BinomialBayesMixedGLM(matrix.ravel(), np.ones((n * k, 1)), effects, kinds, vcp_p=1, fe_p=2)
    start = np.zeros(3 + n + k)
    limits = {"maxiter": 2000, "maxfun": 5000}
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):  # steps too far of the line search
        fit = model.fit_vb(mean=start, sd=np.full(len(start), 0.3), fit_method="L-BFGS-B", minim_opts=limits)
    if not fit.optim_retvals.success:
        return {}
    variances = [*np.exp(2 * fit.vcp_mean), math.pi**2 / 3]
    return dict(zip(("row", "style", "residual"), np.array(variances) / sum(variances), strict=True))


def _slope_lines(measure: str, scores: pd.DataFrame, clean_style: str) -> list[dict[str, Any]]:
    """The line of the change of `correct` per edit, over the rows that have the clean form and each dose."""
    doses = {clean_style: 0} | {style: dose for style in scores["style"] if (dose := dose_of(style))}
    forms = sorted(doses, key=doses.__getitem__)
    matrix = _matrix(scores, forms)
    if len(forms) < 2 or matrix.empty:
        return []
    clusters = matrix.pop("cluster")
    edits = np.array([doses[form] for form in forms]) - np.mean([doses[form] for form in forms])
    found = clustered_mean(matrix.to_numpy() @ edits / (edits**2).sum(), clusters)
    detectable = minimum_detectable_effect(found.standard_error, found.df)
    shared = {"forms": ", ".join(forms), "n": found.n, "n_clusters": found.n_clusters}
    line = _line(measure, found.mean, (found.ci_low, found.ci_high), shared, limits=(-math.inf, math.inf))
    return [line | {"p": found.p, "minimum_detectable_difference": detectable}]
