"""The control `neutral@<style>`: the clean prompt, around it as many neutral tokens as the tone style adds.

A tone style (polite, urgent, rude) adds sentences before or after the clean prompt, so it changes the tone, the length
and the positions at once. The control has plain sentences of our own in their place, in as many tokens for the model's
tokenizer: the clean prompt's tokens have the same ids at the same positions as in the tone style. Only the ids of the
added tokens differ.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

# No tone, no request, no number, and nothing that a task asks for.
SHORT = ("Here.", "Today.", "It rained.", "It is noon.", "A door closed.", "A bird sat there.")
PLACES = (
    *("The room has", "The shelf holds", "The box holds", "On the table there is", "By the wall there is"),
    *("In the hall there is", "Behind the house there is", "Near the path there is", "Outside there is"),
    *("Under the stairs there is", "Beside the door there is", "At the window there is"),
)
KINDS = ("plain", "wooden", "round", "flat", "narrow", "painted", "folded", "cotton")
THINGS = (
    *("chair", "table", "lamp", "box", "shelf", "bench", "mirror", "basket", "curtain", "blanket", "bottle", "clock"),
    *("drawer", "ladder", "rope", "carpet", "brush", "cushion", "bucket", "frame", "tray", "hook", "cup", "jar"),
)
MOST_THINGS = len(THINGS)  # in a sentence
TRIES = 32  # sentences of each number of tokens that are tried in a prompt


def neutral_sentences() -> list[str]:
    """The sentences of the controls, the same in every run: `The lamp is round.`, `The box holds a lamp and a cup.`"""
    chance = random.Random(0)
    found = [*SHORT, *(f"The {thing} is {kind}." for thing in THINGS for kind in KINDS)]
    for count in range(1, MOST_THINGS + 1):
        for _ in range(max(20, 240 // count)):
            kinds = [f"{kind} " if chance.random() < 0.7 else "" for kind in chance.choices(KINDS, k=count)]
            things = chance.sample(THINGS, count)
            *first, last = (f"a {kind}{thing}" for kind, thing in zip(kinds, things, strict=True))
            found.append(f"{chance.choice(PLACES)} {', '.join(first)}{' and ' if first else ''}{last}.")
    return list(dict.fromkeys(found))


@dataclass
class NeutralSentences:
    """Neutral sentences by their number of tokens, for one tokenizer."""

    tokenizer: Any

    @cached_property
    def _by_count(self) -> dict[int, list[str]]:
        found: dict[int, list[str]] = {}
        sentences = neutral_sentences()
        for sentence, ids in zip(sentences, self._ids(sentences), strict=True):
            found.setdefault(len(ids), []).append(sentence)
        return found

    def in_place_of(self, added: str, seed: str) -> Iterator[str]:
        """Texts to try in the place of what a style adds, with the white space at its ends; the likeliest come first.

        Beside a prompt a sentence may have a token more or less than alone.
        """
        words = added.strip()
        start = added.index(words)
        count = len(self._ids([words])[0])
        for number in (count, count - 1, count + 1):
            sentences = self._by_count.get(number, [])
            for sentence in random.Random(seed).sample(sentences, min(TRIES, len(sentences))):
                yield added[:start] + sentence + added[start + len(words) :]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return list(self.tokenizer(texts, add_special_tokens=False)["input_ids"])
