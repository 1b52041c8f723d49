"""Slips of grammar: agreement, tense, article, and a doubled word, only where the slip is wrong for sure."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from typos.languages import WORD_LISTS, is_real_word, word_set
from typos.words import (
    FUNCTION_WORDS,
    INSTRUCTION_VERBS,
    NUMBER_WORDS,
    UNITS,
    Edit,
    Word,
    ends_sentence,
    in_case_of,
)

_LISTS = {name: word_set(words) for name, words in WORD_LISTS["grammar"].items()}
_AGREEMENT, _PAST = (dict(pair.split("/") for pair in _LISTS[name]) for name in ("agreement", "past"))
_BEFORE_BASE_FORM = _LISTS["auxiliaries"] | word_set("to please and then let's not")
_MANDATIVE = tuple(_LISTS["mandative"])
_SILENT_H = ("hour", "honest", "honour", "honor", "heir")
_CAN_SLIP = {*_AGREEMENT, *_PAST, *_LISTS["doubled"]}
_REQUESTS = {*_PAST, *INSTRUCTION_VERBS, "please"}
LONGEST_SENTENCE = 40  # words on each side that are looked at


def grammar_slips(text: str, words: list[Word]) -> Iterator[Edit]:
    """Every slip that is possible in the given words of `text`; their operation says which kind they are."""
    pieces = text.split()
    has_b = any(piece.strip("().,:;?!") in ("b", "B") for piece in pieces)  # then `a` is an option or a variable
    ends = [ends_sentence(piece) for piece in pieces]
    for word in words:
        if word.lower not in _CAN_SLIP or (has_b and word.lower == "a"):
            continue
        unmarked = pieces[word.index].endswith(word.text) and word.index + 1 < len(pieces)
        after = pieces[word.index + 1] if unmarked else ""
        sentence = _sentence_around(pieces, ends, word.index)
        for operation, changed in _slips_of(word, *sentence, after):
            yield Edit(word.start, word.end, in_case_of(word.text, changed), operation, word)


def _sentence_around(pieces: list[str], ends: list[bool], index: int) -> tuple[list[str], list[str]]:
    """The words before and after a word in its sentence, in lower case and without the marks around them."""
    start = end = index
    while start > max(0, index - LONGEST_SENTENCE) and not ends[start - 1] and pieces[start - 1][-1] != ":":
        start -= 1
    while end < min(len(pieces) - 1, index + LONGEST_SENTENCE) and not ends[end]:
        end += 1
    bare = [piece.strip("()[]\"'“”‘’«».,;:?!*").lower() for piece in pieces[start : end + 1]]
    return bare[: index - start], bare[index - start + 1 :]


def _slips_of(word: Word, earlier: list[str], later: list[str], after: str) -> list[tuple[str, str]]:
    """Slips of one word that are wrong for sure, between `earlier` and `later` of its sentence.

    `after` is the piece that follows, empty if a mark stands between.
    """
    lower, slips = word.lower, []
    before = earlier[-1] if earlier else ""
    if lower in _AGREEMENT and _is_agreement(word, earlier, later, after):
        slips.append(("agreement", _AGREEMENT[lower]))
    if lower in _PAST:
        base_form = before in _BEFORE_BASE_FORM
        if word.starts_sentence:  # a request: "Work out …", not "Work is …"
            base_form = lower not in _LISTS["also_nouns"] or after.lower() in FUNCTION_WORDS - {"is", "of", "was"}
        elif before in ("and", "then"):  # "they cut and gave", "she helps him and writes" would be right
            base_form = earlier[0] in _REQUESTS
        past = base_form and (not word.starts_sentence or after.lower() in FUNCTION_WORDS)  # "Proposed names"
        # "that you found" is right
        if past or (before == "you" and _LISTS["auxiliaries"].intersection(earlier[-2:-1])):
            slips.append(("tense", _PAST[lower]))
        if base_form or before == "you":
            slips.append(("agreement", _third_person(lower)))
    following = after.strip("()[]\"'“”.,;:?!")
    if lower == "a" and following[:1] in tuple("bcdfgjklmnpqrstvwxyz") and is_real_word(following):
        slips.append(("article", "an"))
    if lower == "an" and after and (after[:1] in "aeio" or after.startswith(_SILENT_H)):
        slips.append(("article", "a"))
    if lower in _LISTS["doubled"] and after:
        slips.append(("doubled_word", f"{lower} {lower}"))
    return slips


def _is_agreement(word: Word, earlier: list[str], later: list[str], after: str) -> bool:
    """True if the other number of a word in _AGREEMENT is wrong for sure."""
    lower, before, noun = word.lower, "".join(earlier[-1:]), "".join(later[:1])
    sentence = (*earlier, lower, *later)
    quantity = any(one in _LISTS["quantities"] and other == "of" for one, other in pairwise(sentence))
    if quantity or _LISTS["either_number"].intersection(sentence):
        return False
    if lower in ("this", "these", "those"):  # before a noun; alone, the other may be as right
        if lower == "those" and earlier and before not in _LISTS["prepositions"]:  # "I know that boys cry"
            return False
        pronoun = noun in FUNCTION_WORDS | NUMBER_WORDS | _LISTS["after_pronoun"] or noun.endswith(("ly", "ed"))
        sure = bool(after) and noun.isalpha() and noun != "people" and not pronoun
        return sure or (lower == "those" and noun in ("that", "who"))
    if before in _LISTS["either_before"] | UNITS | NUMBER_WORDS or before[-1:].isdigit():
        return False
    if "and" in earlier[-4:] or {"or", "nor"}.intersection(earlier[-4:]):
        return False
    inverted = not earlier or before in _LISTS["before_subject"]
    if inverted and {"and", "or"}.intersection(later):  # "where is the cat and the dog"
        return False
    if lower in ("was", "were"):  # "if it were", "were he here", "as it were"
        unreal = not earlier or _LISTS["unreal"].intersection(earlier) or earlier[-2:] == ["as", "it"]
        return not unreal
    if lower in ("has", "have", "do", "does"):
        return not any(one.startswith(_MANDATIVE) for one in earlier)
    return True


def _third_person(verb: str) -> str:
    if verb.endswith("y") and verb[-2] not in "aeiou":
        return verb[:-1] + "ies"
    return verb + ("es" if verb.endswith(("s", "sh", "ch", "x", "z", "o")) else "s")
