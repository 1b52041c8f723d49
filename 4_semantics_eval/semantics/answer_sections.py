"""What the report shows of similarity, reward scores, judges, and of two scorers side by side."""

from __future__ import annotations

from report_section import Headline, Plots, Section, TableOf

TITLE = "Do the answers mean the same?"
ANSWERS = ("style", "n", "estimate", "difference", "p", "p_adjusted")  # no difference if there is only one sample
SUMMARY = ("style", "n", "n_paired", "n_identical", "n_clusters", "estimate", "difference", "p", "p_adjusted")
PREFERENCES = ("wins", "ties", "losses", "same_text", "order_agreement", "first_preferred")
ONLY_SIMILARITY = (("measure", "similarity"),)

SIMILARITY = Section(
    name="similarity",
    title=TITLE,
    order=20,
    plots=(Plots("similarity.png", "Cosine similarity of each answer to the clean answer of its row, by style."),),
    tables=(
        TableOf("similarity_summary.csv", "Similarity to the clean answer", ANSWERS, ONLY_SIMILARITY),
        TableOf(
            "similarity_summary.csv",
            "Share of answers that are word for word the clean answer",
            ANSWERS,
            (("measure", "exact_match"),),
        ),
    ),
    headlines=(
        Headline(
            "similarity",
            "similarity: cosine between the embeddings of the answer and of the clean answer",
            ("similarity_summary.csv",),
            *("estimate", "ci_low", "ci_high"),
            only=ONLY_SIMILARITY,
        ),
    ),
)
REWARDS = Section(
    name="rewards",
    title=TITLE,
    order=21,
    plots=(Plots("rewards.png", "Reward scores (raw logits) of the answers, by style."),),
    tables=(TableOf("rewards_summary.csv", "Reward scores by style", SUMMARY),),
)
SCORERS = Section(
    name="scorers",
    title=TITLE,
    order=24,
    tables=(
        TableOf(
            "scorers_compared.csv",
            "Two scorers side by side: the share of responses that each could score, the change from the clean form by "
            "each, and the interaction (difference of the two changes)",
            (
                *("style", "scorer", "other_scorer", "parse_rate_clean", "parse_rate", "parse_rate_difference"),
                *("other_parse_rate_clean", "other_parse_rate", "other_parse_rate_difference", "scale", "n"),
                *("n_clusters", "change", "other_change", "interaction", "p", "p_adjusted"),
            ),
        ),
    ),
)


def judge_section(name: str) -> Section:
    """The section of <name>_summary.csv and <name>.png, of one mode of the judge."""
    return Section(
        name=name,
        title=TITLE,
        order=22,
        plots=(Plots(f"{name}.png", "A judge's verdict on the answers, by style."),),
        tables=(TableOf(f"{name}_summary.csv", "A judge's verdict by style", (*SUMMARY, *PREFERENCES)),),
    )
