"""What is around an answer but not part of it: a copy of the prompt before it, another turn or problem after it."""

from __future__ import annotations

import re
from functools import lru_cache

from rapidfuzz import fuzz

_LETTERS = re.compile(r"[a-z]+")


def word_set(words: str) -> frozenset[str]:
    """The words of a list that is written as a text."""
    return frozenset(words.split())


@lru_cache(maxsize=8)
def words_of(text: str) -> frozenset[str]:
    """The words of a text in small letters: a cheap test before a slow pattern."""
    return frozenset(_LETTERS.findall(text.lower()))


def without_echo(text: str, prompt: str) -> str:
    """`text` without copies of the prompt at its start, also where the copy mends or makes a few typos."""
    for _ in range(3):
        head = text.lstrip(" \n\"'>*:")
        if len(prompt) < 4 or not head:
            return text
        if head[: len(prompt)].lower() == prompt.lower():
            text = head[len(prompt) :]
            continue
        cut = _similar_head(head, prompt)
        if not cut:
            return text
        text = head[cut:]
    return text


def _similar_head(text: str, prompt: str, least: float = 90.0) -> int:
    """Where a near copy of `prompt` at the start of `text` ends; 0 where there is none."""
    if len(prompt) > 4000 or len(prompt) < 16 or fuzz.ratio(text[:16].lower(), prompt[:16].lower()) < 60:
        return 0
    # An answer that stands before a copy of the prompt is no part of the copy.
    if text[0].isdigit() != prompt[0].isdigit():
        return 0
    wanted, low = prompt.lower(), max(1, len(prompt) - 12)
    ends = [m.end() for m in re.finditer(r"\S+", text[: len(prompt) + 12]) if m.end() >= low]
    if not ends or fuzz.ratio(text[: ends[0]].lower(), wanted) < least - 10:
        return 0
    score, end = max((fuzz.ratio(text[:end].lower(), wanted), end) for end in ends)
    return end if score >= least else 0


_TURN = re.compile(
    r"(?P<turn><\|[\w ]{1,30}\|>|</?s>|<eos>|<pad>|<(?:start|end)_of_turn>|\[/?INST\]"
    r"|(?:\A|\n)[ ]{0,4}(?:#{1,4} ?|\*\*)?(?:Q|Question|User|Human)(?: ?#?\d{1,4})?(?:\*\*)? ?[:.)]"
    r"|\n\s{0,9}\n[ ]{0,4}(?:#{1,4} ?|\*\*)?(?:Problem|Exercise|Example) ?#?\d{1,4}(?:\*\*)? ?[:.)])"
    r"|(?:\A|\n)[ ]{0,4}(?:#{1,4} ?|\*\*)?(?:Problem|Exercise|Example|Student|Instruction|Input|Prompt|Task)"
    r"(?: ?#?\d{1,4})?(?:\*\*)? ?[:.)]"
    r"|\n[ ]{0,4}(?:What(?: is|'s)|How (?:many|much)|Calculate|Solve|Compute)\b[^\n\d]{0,80}\d"
    r"|\b(?:\d{1,3}|one|some|a few) more (?:examples?|problems?|questions?|exercises?)\b"
    r"|\b(?:another|next) (?:example|problem|question|exercise)\b",
    re.IGNORECASE,
)
_TURN_WORDS = word_set(
    "q question questions problem problems exercise exercises example examples user human student instruction input "
    "prompt task inst s eos pad turn what how calculate solve compute"
)


def run_on_places(text: str, prompt: str) -> list[tuple[int, bool]]:
    """Where another turn or problem may begin, from left to right, at most five. True: surely another turn; False:
    words that a solution may use too, so that only a marked answer before them is final."""
    places: list[tuple[int, bool]] = []
    if "<|" in text or not _TURN_WORDS.isdisjoint(words_of(text)):
        for match in _TURN.finditer(text):
            if match.start() > 0:
                places.append((match.start(), match["turn"] is not None))
            if len(places) == 4:
                break
    if len(prompt) >= 12:
        # The prompt again, perhaps with other numbers; its first words alone also begin the sentences of a solution.
        start = re.escape(re.sub(r"\d+", "0", prompt[:60])).replace("0", r"\d{1,20}")
        again = re.search(rf"\n\s{{0,9}}{start}", text)
        places += [(again.start(), False)] if again and again.start() > 0 else []
    return sorted(places)
