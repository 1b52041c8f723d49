"""Names of styles that are made from another style. All rules about such names are here.

typo@2          two one-letter edits (make_variants.py --dose)
split@swap      control: the clean prompt, its edited words in as many tokens as those of `swap` (stage 2)
neutral@polite  control: the clean prompt with a neutral sentence of as many tokens as `polite` adds (stage 2)
normal@again    the clean prompts again, in other batches: what differs is numerical noise (stage 2)
repaired@swap   `swap` after a spell checker or a model corrected it (repair_prompts.py)
"""

from __future__ import annotations

import re

MATCHED = "split@"
NEUTRAL = "neutral@"
REPAIRED = "repaired@"
AGAIN = "@again"
SPLIT_STYLE = "split"  # a control in a prompt file: the clean word, cut by an invisible character
MADE_IN_STAGE_2 = (MATCHED, NEUTRAL)  # a prompt file has no such keys


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
