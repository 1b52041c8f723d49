"""What a reasoning model says, without what it thinks aloud before it says it."""

from __future__ import annotations

import re
from collections.abc import Sequence

_NAMES = r"(?:think(?:ing)?|thoughts?|reason(?:ing)?|analysis|reflection|scratchpad|seed:think)"
_TAG = re.compile(
    rf"(?P<close></{_NAMES}>|\[/think(?:ing)?\]|<\|end_of_thought\|>|<\|?/think\|>|◁/think▷|<channel\|>"
    r"|<\|channel\|>\s?final\b[^<>]*<\|message\|>|(?<=[^\w\s])assistantfinal(?=\S))"
    rf"|<{_NAMES}>|\[think(?:ing)?\]|<\|begin_of_thought\|>|<\|?think\|>|◁think▷|<\|channel>"
    r"|<\|channel\|>\s?(?:analysis|commentary)\b[^<>]*<\|message\|>|\A\s*analysis(?=[A-Z])",
    re.IGNORECASE,
)


def without_thinking(text: str, literal: Sequence[tuple[int, int]] = ()) -> str:
    """`text` without its thinking (`<think>…</think>`, `[THINK]`, channels …); "" if the thinking never ends.

    A closing mark without an opening one ends a thinking that began with the text. A mark that starts within one of
    the character spans `literal` is quoted and marks nothing.
    """
    kept: list[str] = []
    start, thinking = 0, False
    for tag in _TAG.finditer(text):
        if any(a <= tag.start() < b for a, b in literal):
            continue
        if tag["close"]:
            kept = kept if thinking else []
        elif not thinking:
            kept.append(text[start : tag.start()])
        start, thinking = tag.end(), not tag["close"]
    return "" if thinking else " ".join([*kept, text[start:]])
