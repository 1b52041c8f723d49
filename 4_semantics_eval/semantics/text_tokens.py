"""Split a text into words and single signs, in any script."""

from __future__ import annotations

import unicodedata

import regex
from token_spans import UNSPACED

TOKEN = regex.compile(rf"(?V1)[\w--[{UNSPACED}]][[\w\p{{M}}\p{{Cf}}]--[{UNSPACED}]]*|(?![\s\p{{Cf}}\p{{Cc}}])\X")


def tokens_of(text: str) -> list[str]:
    """Words with their combining marks, and single signs (graphemes) that are neither word nor white space.

    In scripts without spaces between words (Chinese, Japanese, Thai …) each grapheme is a token.
    """
    return TOKEN.findall(unicodedata.normalize("NFC", text))
