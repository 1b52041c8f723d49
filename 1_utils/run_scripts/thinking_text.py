"""What a reasoning model says, without what it thinks aloud before it says it."""

from __future__ import annotations

import re
from collections.abc import Sequence

_NAMES = r"[\w:]{0,16}(?:think|thought|reason|reflection|scratchpad|analysis|monologue|cot)\w{0,12}"
_TAG = re.compile(
    rf"(?P<close></{_NAMES}>|\[/think(?:ing)?\]|<\|end_(?:of_)?(?:think(?:ing)?|thought)\|>|<\|?/think\|>|◁/think▷"
    r"|<channel\|>|<unused95>|<\|channel\|>\s?final\b[^<>]{0,40}<\|message\|>"
    r"|(?:\A|(?<=[^\w\s]))(?-i:assistantfinal)(?=\S))"
    rf"|<{_NAMES}(?: [^<>]{{0,40}})?>|\[think(?:ing)?\]|<\|(?:start|begin)_(?:of_)?(?:think(?:ing)?|thought)\|>"
    r"|<\|?think\|>|◁think▷|<\|channel>|<unused94>|<\|channel\|>\s?(?:analysis|commentary)\b"
    r"|\A\s*(?:assistant)?(?-i:analysis(?=[A-Z]))",
    re.IGNORECASE,
)


def without_thinking(text: str, prompt: str = "", literal: Sequence[tuple[int, int]] = ()) -> str:
    """`text` without its thinking (`<think>…</think>`, `[THINK]`, channels …); "" if the thinking never ends.

    prompt: what the text continues; a mark at its very end opens the text's thinking. A closing mark without an opening
    one ends a thinking that began with the text. A mark that starts within one of the character spans `literal` is
    quoted and marks nothing.
    """
    last = [tag for tag in _TAG.finditer(prompt[-200:]) if not prompt[-200:][tag.end() :].strip()]
    thinking = bool(last) and not last[-1]["close"]
    kept: list[str] = []
    start = 0
    for tag in _TAG.finditer(text):
        if any(a <= tag.start() < b for a, b in literal):
            continue
        if tag["close"]:
            kept = kept if thinking else []
        elif not thinking:
            kept.append(text[start : tag.start()])
        start, thinking = tag.end(), not tag["close"]
    return "" if thinking else " ".join([*kept, text[start:]])
