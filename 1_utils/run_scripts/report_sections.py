"""What the report shows of the files of stages 3 to 5: headings, plots with a sentence each, tables with their columns.

Captions say what a plot shows; the plot itself says how many prompts it holds. A file that a run lacks is left
out, a plot that is not listed here is shown at the end of the report.
"""

from __future__ import annotations

from dataclasses import dataclass

from style_names import MADE_IN_STAGE_2


@dataclass(frozen=True)
class Plots:
    """Plots of one kind: those that match `pattern`. `left_out`: they stay in the results folder and are only named."""

    pattern: str
    caption: str
    left_out: bool = False


@dataclass(frozen=True)
class TableOf:
    """Rows of a CSV: those where `only` holds, the first `per_style` of each style; `columns` empty: all.

    by: the column that tells which are the first; a row without it is left out. prefer: (column, beginnings): only rows
    with such a value, if there are any.
    """

    source: str
    caption: str
    columns: tuple[str, ...] = ()
    only: tuple[tuple[str, str], ...] = ()
    per_style: int | None = None
    by: str | None = None
    prefer: tuple[str, tuple[str, ...]] | None = None


@dataclass(frozen=True)
class Section:
    """Plots and tables under one heading."""

    title: str
    plots: tuple[Plots, ...] = ()
    tables: tuple[TableOf, ...] = ()


SUMMARY = (
    "style", "n", "n_paired", "n_identical", "n_clusters", "estimate", "difference", "minimum_detectable_difference",
    "p", "p_mcnemar", "p_adjusted",
)  # fmt: skip

ANSWERS = ("style", "n", "estimate", "difference", "p", "p_adjusted")  # no difference if there is only one sample

SECTIONS = (
    Section(
        "Are the answers right?",
        (
            Plots("maths_accuracy.png", "Share of right answers by style, with 95 % intervals."),
            Plots("maths_flips.png", "Answers that turned from right to wrong, and from wrong to right, by style."),
            Plots("answers_accuracy.png", "Share of right answers in words by style, with 95 % intervals."),
            Plots("answers_flips.png", "Answers in words that turned from right to wrong, and back, by style."),
            Plots("maths_*.png", "Accuracy, seen another way.", left_out=True),
            Plots("answers_*.png", "Accuracy of answers in words, seen another way.", left_out=True),
        ),
        (
            TableOf(
                "maths_summary.csv",
                "Accuracy by style, its difference to the clean form, and the smallest difference that this n could "
                "detect (80 % power)",
                SUMMARY,
            ),
            TableOf("answers_summary.csv", "The same for answers in words", SUMMARY),
            TableOf(
                "decomposition.csv",
                "How much of the change is fragmentation (control − clean form) and how much is spelling (style − "
                "control); of a tone (control neutral@…): how much is length, and how much is tone",
                (
                    "style", "measure", "control", "n", "n_clusters", "total", "fragmentation", "spelling",
                    "spelling_p_adjusted", "fragmentation_share",
                ),
            ),
            TableOf(
                "robustness_summary.csv",
                "How robust the answers are to the form of the prompt: spread (FormatSpread), pss (ProSA), consistency "
                "rate (SCORE), pdr (PromptBench), posix, shares of the variance, change per edit",
                ("style", "measure", "n", "n_clusters", "estimate", "p", "minimum_detectable_difference"),
            ),
            TableOf(
                "repair_summary.csv",
                "Does correcting the prompt first give the accuracy back? Regained: repaired − style; remaining: "
                "repaired − clean form",
                ("style", "n", "n_clusters", "harm", "regained", "regained_p_adjusted", "remaining", "regained_share"),
            ),
        ),
    ),
    Section(
        "Do the answers mean the same?",
        (
            Plots("similarity.png", "Cosine similarity of each answer to the clean answer of its row, by style."),
            Plots("rewards.png", "Reward scores (raw logits) of the answers, by style."),
            Plots("judge*.png", "A judge's verdict on the answers, by style."),
        ),
        (
            TableOf("similarity_summary.csv", "Similarity to the clean answer", ANSWERS, (("measure", "similarity"),)),
            TableOf(
                "similarity_summary.csv",
                "Share of answers that are word for word the clean answer",
                ANSWERS,
                (("measure", "exact_match"),),
            ),
            TableOf("rewards_summary.csv", "Reward scores by style", SUMMARY),
            TableOf("judge_summary.csv", "A judge's verdict by style"),
            TableOf(
                "scorers_compared.csv",
                "Two scorers side by side: the share of responses that each could score, the change from the clean "
                "form by each, and the interaction (difference of the two changes)",
                (
                    "style", "scorer", "other_scorer", "parse_rate_clean", "parse_rate", "parse_rate_difference",
                    "other_parse_rate_clean", "other_parse_rate", "other_parse_rate_difference", "scale", "n",
                    "n_clusters", "change", "other_change", "interaction", "p", "p_adjusted",
                ),
            ),
        ),
    ),
    Section(
        "Where does attention go?",
        (
            Plots(
                "boxplot_frac_task.png",
                "Share of the attention that lies on the task, mean over layers and heads, one box of prompts a style; "
                "the diamond is the share of the tokens that lie there, so a box above it is more than even attention.",
            ),
            Plots("boxplot_frac_prompt.png", "The same for the instruction, the words around the task."),
            Plots("boxplot_perlayer_*.png", "Attention on the instruction by layer, for one style.", left_out=True),
        ),
        (
            TableOf(
                "prompt_task_fraction_aggregate.csv",
                "Attention on the task; uniform share: what even attention would give; density 1 is even attention",
                (
                    "style", "n", "frac_task", "frac_task_uniform_share", "frac_task_density", "frac_task_difference",
                    "frac_task_p", "frac_task_p_adjusted",
                ),
            ),
            TableOf(
                "prompt_task_fraction_aggregate.csv",
                "Attention on the instruction",
                (
                    "style", "n", "frac_instruction", "frac_instruction_uniform_share", "frac_instruction_density",
                    "frac_instruction_difference", "frac_instruction_p", "frac_instruction_p_adjusted",
                ),
            ),
        ),
    ),
    Section(
        "Which heads react?",
        (
            Plots(
                "head_sensitivity.png",
                "Change in each head's attention to the edited words, from the clean form to the style; a dot marks an "
                "adjusted p below 0.05, grey a style without edited words to compare.",
            ),
            Plots(
                "head_sensitivity_vs_control.png",
                "The same from the control to the style. A control split@… has the clean words in as many tokens, and "
                "neutral@… as many neutral words, so that what is left is the typo, or the tone; `split` has the clean "
                "words cut by an invisible character.",
            ),
            Plots(
                "head_overlap.png",
                "Whether styles share their heads: rank correlation of the heads' changes between two halves of the "
                "data; the diagonal is the reliability of one style with itself.",
            ),
            Plots("head_overlap_vs_control.png", "The same for the changes from the controls."),
            Plots("head_answer_flips.png", "Heads whose change goes with an answer that turns from right to wrong."),
            Plots("head_answer_flips_vs_control.png", "The same for the changes from the controls."),
            Plots("head_sensitivity_*.png", "Further measures by layer and head, for one style.", left_out=True),
        ),
        (
            TableOf(
                "head_sensitivity.csv",
                "The three heads of each style whose attention to the edited words changes most surely, in log2: 1 is "
                "twice as much (picked from the same data, so their effects look larger than they are)",
                (
                    "style", "layer", "head", "n", "difference", "effect_size", "p", "p_adjusted", "control",
                    "n_vs_control", "difference_vs_control", "p_adjusted_vs_control",
                ),
                (("measure", "edited_log2_mass_last"),),
                3,
            ),
            TableOf(
                "head_sensitivity.csv",
                "The same, picked by the change from the control: what a typo does beyond costing tokens",
                (
                    "style", "control", "layer", "head", "n_vs_control", "difference_vs_control",
                    "effect_size_vs_control", "p_vs_control", "p_adjusted_vs_control", "difference",
                ),
                (("measure", "edited_log2_mass_last"),),
                3,
                "rank_vs_control",
                ("control", MADE_IN_STAGE_2),
            ),
            TableOf(
                "head_sensitivity.csv",
                "The same for the entropy of attention, by the change from the clean form",
                ("style", "layer", "head", "n", "clean", "estimate", "difference", "effect_size", "p", "p_adjusted"),
                (("measure", "entropy_last"),),
                3,
            ),
        ),
    ),
    Section(
        "Which layers react?",
        (
            Plots("activation_diffs.png", "Distance of the residual stream from its clean twin, by layer and place."),
            Plots("logit_lens.png", "What each layer would say next (logit lens), against the clean prompt."),
            Plots(
                "typo_recovery.png",
                "From which layer on a mistyped word's state is nearer to its own clean twin than to other words.",
            ),
            Plots(
                "probe_layers.png",
                "How well a linear probe tells typos apart, by layer; with shuffled labels it should lie at 0.5.",
            ),
        ),
        (
            TableOf(
                "probe_layers.csv",
                "Is there a typo? AUC of a probe of the last token, all typo styles together; beside it the AUC with "
                "shuffled labels, and of token counts alone",
                ("style", "layer", "n", "n_clusters", "auc", "p_adjusted", "shuffled_auc", "token_count_auc"),
                (("style", "all_typos"), ("target", "typo"), ("region", "last")),
            ),
            TableOf(
                "activation_diffs_summary.csv",
                "Recovery depth and next-token change by style, beside the control: the word in other tokens",
                (
                    "style", "measure", "n", "n_censored", "median", "estimate", "control", "control_estimate",
                    "n_with_control", "difference_to_control", "p", "p_adjusted",
                ),
            ),
        ),
    ),
    Section(
        "Which neurons react?",
        (Plots("neuron_*.png", "Typo neurons and heads found on one half of the rows and confirmed on the other."),),
        (
            TableOf(
                "neuron_sensitivity_summary.csv",
                "Found and confirmed units by style; chance: random sets of the same size",
                (
                    "style", "unit", "control", "score", "n", "n_units", "n_found", "n_confirmed", "delta",
                    "random_low", "random_high", "excess_over_clean", "excess_over_control", "p", "p_adjusted",
                ),
            ),
        ),
    ),
)  # fmt: skip
