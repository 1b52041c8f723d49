"""The progress bar of a run: its length is time, estimated from the tokens that are left to read and to generate."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from tqdm import tqdm

BAR = "{desc}: {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}]"
REFRESH = 1.0  # seconds


class Progress:
    """Counts what is read, decoded and done of `prompts`, and shows how long the rest takes.

    `tokens` are to be read for all prompts; each has `samples` responses of at most `longest` tokens.
    """

    def __init__(self, prompts: int, tokens: int, samples: int, longest: int) -> None:
        self.prompts, self.tokens, self.samples, self.longest = prompts, tokens, samples, longest
        self.done = self.read_tokens = self.new_tokens = self.step_tokens = self.steps = self.early = 0
        self.read_seconds = self.step_seconds = self.recent = 0.0
        self.running: list[int] = []  # tokens that each response under way has so far
        self.style = ""
        self.bar = tqdm(total=1.0, bar_format=BAR, dynamic_ncols=True, mininterval=0)
        self._shown = 0.0

    def read(self, tokens: int, responses: int, seconds: float) -> None:
        """Prompts were read: so many tokens, and each of the responses has its first one."""
        self.read_tokens += tokens
        self.new_tokens += responses
        self.read_seconds += seconds
        self._show()

    def stepped(self, tokens: int, running: Sequence[int], seconds: float) -> None:
        """That many responses got a token each; those that go on have `running` tokens now."""
        self.steps += 1
        self.step_tokens += tokens
        self.new_tokens += tokens
        self.step_seconds += seconds
        self.recent += (seconds - self.recent) * (0.2 if self.steps > 1 else 1)  # a step of fewer rows is quicker
        self.running = list(running)
        self._show()

    def finished(self, reasons: Sequence[str]) -> None:
        """A prompt is done; its responses ended for these reasons (none if it failed)."""
        self.done += 1
        self.early += sum(reason != "length" for reason in reasons)
        self._show()

    def seconds_left(self) -> float | None:
        """Estimate for what is left; None until something of each kind was measured."""
        if not self.read_tokens or (self.longest > 1 and not self.steps):
            return None
        left = max(0, self.tokens - self.read_tokens) * self.read_seconds / self.read_tokens
        if not self.steps:
            return left
        chance = self.early / max(1, self.new_tokens)  # that a token ends its response, from those so far

        def expected(room: int) -> float:
            """Length of a response of at most `room` tokens."""
            return (1 - (1 - chance) ** room) / chance if chance else room

        waiting = max(0, (self.prompts - self.done) * self.samples - len(self.running))
        running = [expected(self.longest - length) for length in self.running if length < self.longest]
        tokens = waiting * max(0.0, expected(self.longest) - 1) + sum(running)
        # The last of several responses ends later than the mean one: the maximum of exponential times.
        last = max(running, default=0.0) * (1 + math.log(len(running))) if running else 0.0
        last = min(last, self.longest - min(self.running, default=0))
        return left + max(tokens * self.step_seconds / self.step_tokens, last * self.recent)

    def close(self) -> None:
        """Show the last state, also if a signal ends the run early."""
        self._shown = 0.0
        self._show()
        self.bar.close()

    def _show(self) -> None:
        if (now := time.monotonic()) - self._shown < REFRESH and self.done < self.prompts:
            return
        self._shown = now
        left = self.seconds_left()
        if left is not None:
            self.bar.n = self.read_seconds + self.step_seconds
            self.bar.total = self.bar.n + (left if self.done < self.prompts else 0)
        self.bar.set_description_str(f"{self.style}, {self.done} of {self.prompts} prompts")
