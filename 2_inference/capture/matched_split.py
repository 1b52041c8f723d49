"""The control `split@<style>`: the clean prompt, each edited word cut into as many tokens as its typo has.

Only the token ids of the edited words differ from the clean prompt, no character does, so the difference between typo
and control is the typo and not the number of tokens (Tsuji et al. 2025, arXiv 2502.19669). Each word is cut into
entries of the vocabulary, at the places nearest to where the typo is cut. A word whose typo has as many tokens as
itself stays as it is. If a typo has fewer tokens, words were inserted or left out, or the vocabulary has no such
pieces, the prompt is not in the control.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Any

Span = tuple[int, int]
CUT = "\u00ad"  # shows in the stored prompt where a word is cut; the model does not see it
SPACE_MARKS = "\u0120\u2581\u010a"  # how byte-level and SentencePiece vocabularies write a space, and a line's end
LONGEST = 512  # signs of a run without white space; a longer one is left whole, for the search is quadratic


@dataclass(frozen=True)
class TokenisedText:
    """A text, its token ids, their character offsets, and which of them lie in an edited word."""

    text: str
    ids: list[int]
    offsets: list[Span]
    edited: list[bool]


class WordCutter:
    """Cuts words into entries of one tokenizer's vocabulary (BPE or Unigram, byte-level or not)."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    @cached_property
    def _vocabulary(self) -> tuple[dict[str, int], int]:
        """{piece: id}, and the length of the longest piece."""
        known = dict(self._tokenizer.get_vocab())
        return known, max(map(len, known))

    def cut(self, clean: TokenisedText, typo: TokenisedText) -> tuple[list[int], list[Span]] | None:
        """(ids, offsets) of the clean text with as many tokens in each edited word as the typo has; None: cannot be."""
        pairs = _paired_words(clean, typo)
        if not pairs:
            return None
        ids, offsets = list(clean.ids), list(clean.offsets)
        for own, other in reversed(pairs):
            first, end = _span(typo, other)
            # Where the tokens of the typo after its first begin, as shares of its visible characters.
            wanted = [(start - first) / (end - first) for start, _ in typo.offsets[other[0] + 1 : other[1]]]
            if len(wanted) + 1 == own[1] - own[0]:
                continue
            found = self._cut_word(clean, own, wanted)
            if found is None:
                return None
            ids[own[0] : own[1]], offsets[own[0] : own[1]] = found
        return (ids, offsets) if self._tokenizer.decode(ids) == self._tokenizer.decode(clean.ids) else None

    def _cut_word(self, clean: TokenisedText, run: Span, wanted: list[float]) -> tuple[list[int], list[Span]] | None:
        """(ids, offsets) of a run of tokens cut at about `wanted`, shares of its length; None: it cannot be."""
        # 1. The signs with which the vocabulary writes the run, and the character that each of them stands for.
        start, end = _span(clean, run)
        text = clean.text[start:end]
        written = "".join(self._tokenizer.convert_ids_to_tokens(clean.ids[slice(*run)]))
        shown = written.lstrip(SPACE_MARKS)
        signs = list(range(len(text)))
        if len(shown) != len(text):  # byte-level: a sign a byte
            signs = [place for place, character in enumerate(text) for _ in character.encode()]
        if len(shown) != len(signs) or not run[1] - run[0] <= len(wanted) or not len(signs) <= LONGEST:
            return None
        # 2. Every piece (start, end) of them that the vocabulary has; the space before them is a sign, too.
        vocabulary, longest = self._vocabulary
        lead = len(written) - len(signs)
        places = [*range(start - lead, start), *(start + sign for sign in signs)]
        has_space = lead > 0 and clean.text[max(0, start - lead) : start] == " " * lead
        pieces: dict[Span, int] = {}
        for a in range(len(written)):
            for b in range(max(a, lead - 1) + 1, min(len(written), a + longest) + 1):
                piece = written[a:b]
                if piece in vocabulary and (has_space if b == lead else not clean.text[places[b - 1]].isspace()):
                    pieces[a, b] = vocabulary[piece]
        # 3. The best cuts.
        cuts = best_cuts(pieces, len(written), [lead + share * len(signs) for share in wanted])
        if cuts is None:
            return None
        edges = list(zip([0, *cuts], [*cuts, len(written)], strict=True))
        spans = [(places[a], places[b - 1] + 1) for a, b in edges]
        return [pieces[edge] for edge in edges], [
            span if span[1] == start else _trimmed(clean.text, *span) for span in spans
        ]


def new_cuts(clean: TokenisedText, offsets: list[Span]) -> list[int]:
    """Characters before which `offsets` cut the clean text and the tokenizer would not."""
    known, cut = (Counter(_trimmed(clean.text, *span)[0] for span in spans) for spans in (clean.offsets, offsets))
    return sorted(cut - known)  # two pieces of one character begin at the same one


def best_cuts(pieces: dict[Span, int], length: int, wanted: list[float]) -> list[int] | None:
    """Where to cut a text of `length` signs into `pieces`: a cut for each of `wanted`, as near to them as can be.

    Minimises the sum of |cut - wanted cut|; None if the vocabulary does not allow so many pieces.
    """
    by_start: dict[int, list[int]] = {}
    for a, b in pieces:
        by_start.setdefault(a, []).append(b)
    best = [{0: (0.0, 0)}]  # for each number of pieces: {end: (cost, start of the last piece)}
    for number in range(len(wanted) + 1):
        last = number == len(wanted)
        after: dict[int, tuple[float, int]] = {}
        for a, (cost, _) in best[-1].items():
            for b in by_start.get(a, ()):
                if (b == length) == last:
                    total = cost + (0.0 if last else abs(b - wanted[number]))
                    if b not in after or total < after[b][0]:
                        after[b] = total, a
        best.append(after)
    if length not in best[-1]:
        return None
    cuts = [length]
    for ends in reversed(best[1:]):
        cuts.append(ends[cuts[-1]][1])
    return cuts[-2:0:-1]


# --- which tokens are whose


def _paired_words(clean: TokenisedText, typo: TokenisedText) -> list[tuple[Span, Span]]:
    """(tokens of the clean text, tokens of the typo) of each edited word; [] if they cannot be paired.

    Adjacent edited words are paired one by one if both texts have as many of them, else as one.
    """
    runs = _runs(clean.edited), _runs(typo.edited)
    if len(runs[0]) != len(runs[1]):
        return []
    pairs = []
    for own, other in zip(*runs, strict=True):
        words = _words(clean, own), _words(typo, other)
        pairs += list(zip(*words, strict=True)) if len(words[0]) == len(words[1]) else [(own, other)]
    return pairs


def _runs(edited: list[bool]) -> list[Span]:
    """(start, stop) of each run of edited tokens."""
    edges = [i for i in range(len(edited) + 1) if (i > 0 and edited[i - 1]) != (i < len(edited) and edited[i])]
    return list(zip(edges[::2], edges[1::2], strict=True))


def _words(one: TokenisedText, run: Span) -> list[Span]:
    """A run of tokens cut before each token that follows white space; a token of white space begins a word."""
    starts = [run[0]]
    for token in range(run[0] + 1, run[1]):
        start, before = _trimmed(one.text, *one.offsets[token])[0], one.text[slice(*one.offsets[token - 1])]
        if one.text[start - 1].isspace() and before.strip():
            starts.append(token)
    return list(zip(starts, [*starts[1:], run[1]], strict=True))


def _span(one: TokenisedText, run: Span) -> Span:
    """Characters of a run of tokens, from its first that is no white space."""
    return _trimmed(one.text, one.offsets[run[0]][0], one.offsets[run[1] - 1][1])


def _trimmed(text: str, start: int, end: int) -> Span:
    return start + len(text[start:end]) - len(text[start:end].lstrip()), end
