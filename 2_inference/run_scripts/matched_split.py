"""The control `split@<style>`: the clean prompt, each edited word cut into as many tokens as its typo has.

A typo is cut into more tokens than the word that was meant, and that alone moves most heads and neurons. In this
control no character differs from the clean prompt: only the token ids of the edited words do. So what remains between
the typo and it is the typo (the split of Tsuji et al. 2025, arXiv 2502.19669). Each word is cut into entries of the
vocabulary, at the places nearest to where the typo is cut.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

Span = tuple[int, int]
CUT = "\u00ad"  # shows in the stored prompt where a word is cut; the model does not see it
SPACE_MARKS = "\u0120\u2581\u010a"  # how byte-level and SentencePiece vocabularies write a space, and a line's end


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
    def _vocabulary(self) -> dict[str, int]:
        return dict(self._tokenizer.get_vocab())

    def cut(self, clean: TokenisedText, typo: TokenisedText) -> tuple[list[int], list[Span]]:
        """(ids, offsets) of the clean text with as many tokens in the edited words as the typo has.

        A word whose typo has no more tokens stays as it is, and so does one that the vocabulary cannot cut; one that
        it can cut into fewer pieces only is cut into these.
        """
        runs = _runs(clean.edited)
        ids, offsets = list(clean.ids), list(clean.offsets)
        for run, wanted in reversed(list(zip(runs, _wanted(clean, runs, typo), strict=True))):
            if found := self._cut_run(clean, run, wanted):
                ids[run[0] : run[1]], offsets[run[0] : run[1]] = found
        if self._tokenizer.decode(ids) != self._tokenizer.decode(clean.ids):
            return clean.ids, clean.offsets
        return ids, offsets

    def _cut_run(self, clean: TokenisedText, run: Span, wanted: list[float]) -> tuple[list[int], list[Span]] | None:
        """(ids, offsets) of a run of tokens cut at about `wanted`, shares of its length; None: it stays as it is."""
        own = run[1] - run[0]
        if len(wanted) < own:
            return None
        start, end = _span(clean, run)
        written = "".join(self._tokenizer.convert_ids_to_tokens(clean.ids[slice(*run)]))
        body = written.lstrip(SPACE_MARKS)
        signs = _characters(clean.text[start:end], body)
        pieces = self._pieces(clean.text[start:end], written, signs)
        cuts = best_cuts(pieces, len(signs), [share * len(signs) for share in wanted], at_least=own)
        if cuts is None:
            return None
        edges = list(zip([0, *cuts], [*cuts, len(signs)], strict=True))
        spans = [_visible(clean.text, start + signs[a], start + signs[b - 1] + 1) for a, b in edges]
        return [pieces[edge] for edge in edges], spans

    def _pieces(self, text: str, written: str, signs: list[int]) -> dict[Span, int]:
        """{(start, end) in `signs`: id} of every piece of a text that the vocabulary has."""
        lead = written[: len(written) - len(signs)]
        found = {}
        for a in range(len(signs)):
            for b in range(a + 1, len(signs) + 1):
                piece = written[len(lead) + a : len(lead) + b] if a else written[: len(lead) + b]
                if piece in self._vocabulary and not text[signs[b - 1]].isspace():
                    found[a, b] = self._vocabulary[piece]
        return found


def _characters(text: str, written: str) -> list[int]:
    """For each sign of a vocabulary's way to write a text: the character it stands for; [] where that is not known."""
    if len(written) == len(text):
        return list(range(len(text)))
    signs = [place for place, character in enumerate(text) for _ in character.encode()]  # byte-level: a sign a byte
    return signs if len(written) == len(signs) else []


def new_cuts(clean: TokenisedText, offsets: list[Span]) -> list[int]:
    """Characters at which `offsets` cut the clean text and the tokenizer would not."""
    known, cut = ({_visible(clean.text, *span)[0] for span in spans} for spans in (clean.offsets, offsets))
    return sorted(cut - known)


def best_cuts(pieces: dict[Span, int], length: int, wanted: list[float], at_least: int = 0) -> list[int] | None:
    """Where to cut a text of `length` characters into `pieces`: a cut for each of `wanted`, as near to them as can be.

    Minimises the sum of |cut - wanted cut|. Where so many pieces are not possible, the most that are, evenly; None
    where these are no more than `at_least`.
    """
    # best[n][b]: (cost, cuts) of text[:b] in n pieces. The cost of the last edge, at the text's end, is none.
    for count in range(len(wanted), 0, -1):
        aims = wanted if count == len(wanted) else [length * (i + 1) / (count + 1) for i in range(count)]
        best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
        for number in range(count + 1):
            last = number == count
            after: dict[int, tuple[float, list[int]]] = {}
            for a, b in pieces:
                if a not in best or (b == length) != last:
                    continue
                cost = best[a][0] + (0.0 if last else abs(b - aims[number]))
                if b not in after or cost < after[b][0]:
                    after[b] = (cost, best[a][1] + ([] if last else [b]))
            best = after
        if length in best:
            return best[length][1] if count + 1 > at_least else None
    return None


def _runs(edited: list[bool]) -> list[Span]:
    """(start, stop) of each run of edited tokens."""
    edges = [i for i in range(len(edited) + 1) if (i > 0 and edited[i - 1]) != (i < len(edited) and edited[i])]
    return list(zip(edges[::2], edges[1::2], strict=True))


def _wanted(clean: TokenisedText, runs: list[Span], typo: TokenisedText) -> list[list[float]]:
    """For each run of the clean text: where to cut it, in shares of its length.

    Run by run as the typo is cut, where both have as many runs; else the tokens that the typo has more go, evenly cut,
    to the runs with the longest pieces.
    """
    theirs = _runs(typo.edited)
    if len(theirs) == len(runs):
        spans = [_span(typo, run) for run in theirs]
        return [
            [(start - first) / (end - first) for start, _ in typo.offsets[run[0] + 1 : run[1]]]
            for run, (first, end) in zip(theirs, spans, strict=True)
        ]
    lengths = [end - start for start, end in (_span(clean, run) for run in runs)]
    counts = [stop - start for start, stop in runs]
    for _ in range(sum(typo.edited) - sum(clean.edited) if runs else 0):
        longest = max(range(len(runs)), key=lambda run: lengths[run] / counts[run])
        counts[longest] += 1
    return [[i / count for i in range(1, count)] for count in counts]


def _span(one: TokenisedText, run: Span) -> Span:
    """Characters of a run of tokens, from its first that is no white space."""
    return _visible(one.text, one.offsets[run[0]][0], one.offsets[run[1] - 1][1])


def _visible(text: str, start: int, end: int) -> Span:
    return start + len(text[start:end]) - len(text[start:end].lstrip()), end
