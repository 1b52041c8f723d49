"""Names of styles: what each means, and which are made from another style. All rules about such names are here.

make_variants.py makes the styles of MEANINGS and `typo@2`, stage 2 makes `split@swap`, `neutral@polite` and
`normal@again`, repair_prompts.py makes `repaired@swap`.
"""

from __future__ import annotations

import re

MATCHED = "split@"
NEUTRAL = "neutral@"
REPAIRED = "repaired@"
AGAIN = "@again"
SPLIT_STYLE = "split"  # a control in a prompt file: the clean word, cut by an invisible character
MADE_IN_STAGE_2 = (MATCHED, NEUTRAL)  # a prompt file has no such keys
MEANINGS = {
    "main": "a letter replaced by a neighbour on the keyboard, in an important word",
    "swap": "two adjacent letters exchanged",
    "missing": "a letter left out",
    "repeated": "a letter doubled",
    "two": "a typo in each of two words",
    "three": "a typo in each of three words",
    "grammar": "a slip of grammar: agreement, tense, article, or a doubled word",
    "punctuation": "a stray mark, or a stray or missing space",
    "homonym": "a word replaced by one that sounds the same",
    "polite": "a polite sentence before the request",
    "urgent": "an urgent sentence before the request",
    "rude": "a rude sentence before the request",
    "noise_words": "control: a typo in a function word",
    SPLIT_STYLE: "control: no letter changed, but an invisible character (soft hyphen) in a word",
    "real_word": "control: a letter changed so that another real word results",
}


def meaning_of(style: str) -> str:
    """What a style does to the clean prompt, in a few words; empty if it is not known."""
    own = controlled_style(style) or repaired_style(style)
    if dose := dose_of(style):
        return f"{dose} one-letter edit{'s' if dose > 1 else ''}"
    if matched_style(style):
        return f"control: the clean prompt, the words that {own} changes cut into as many tokens as there"
    if neutral_style(style):
        return f"control: the clean prompt, with neutral sentences of as many tokens as {own} adds"
    if repaired_style(style):
        return f"{own} after a spell checker or a model has corrected it"
    if is_again(style):
        return "the clean prompt once more, in other batches: what differs is numerical noise"
    return MEANINGS.get(style, "")


def dose_of(style: str) -> int | None:
    """Number of one-letter edits of a dose style: 2 of `typo@2`; None of any other style."""
    match = re.fullmatch(r"typo@([1-9]\d?)", style)
    return int(match[1]) if match else None


def matched_style(style: str) -> str | None:
    """`swap` of the control `split@swap`, None of any other style."""
    return _after(MATCHED, style)


def neutral_style(style: str) -> str | None:
    """`polite` of the control `neutral@polite`, None of any other style."""
    return _after(NEUTRAL, style)


def controlled_style(style: str) -> str | None:
    """The style whose control this is: `swap` of `split@swap`, `polite` of `neutral@polite`; None if it is none."""
    return matched_style(style) or neutral_style(style)


def source_style(style: str) -> str:
    """The style whose rows of the prompt file it has: `swap` of `split@swap`, `normal` of `normal@again`, or itself."""
    return controlled_style(style) or (style.removesuffix(AGAIN) if is_again(style) else style)


def reserved_name(style: str) -> str | None:
    """Which part of a name is kept for what stage 2 makes: `split@`, `neutral@` or `@again`; None of any other name."""
    begins = (prefix for prefix in MADE_IN_STAGE_2 if style.startswith(prefix))
    return next(begins, AGAIN if style.endswith(AGAIN) else None)


def repaired_style(style: str) -> str | None:
    """`swap` of `repaired@swap`, None of any other style."""
    return _after(REPAIRED, style)


def is_again(style: str) -> bool:
    """Whether a style is the clean form once more: `normal@again`."""
    return style.endswith(AGAIN) and style != AGAIN


def is_control(style: str) -> bool:
    """Whether a style is the clean form with another number of tokens: `split`, `split@<style>`, `neutral@<style>`."""
    return style == SPLIT_STYLE or controlled_style(style) is not None


def is_variant(style: str, clean_style: str | None) -> bool:
    """Whether a style is a way to write the prompt: not the clean form, a control, a repair or the clean form again."""
    return style != clean_style and not (is_control(style) or repaired_style(style) or is_again(style))


def _after(prefix: str, style: str) -> str | None:
    return style.removeprefix(prefix) if style.startswith(prefix) and style != prefix else None
