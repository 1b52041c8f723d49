"""Make every style of a prompt file's clean prompts: typos, other slips, tones, and the controls that go with them.

Reads a prompt file (JSON list; clean prompts under `normal` or `instruction`). Writes a prompt file with the same rows
and the styles added, and beside it `<name>_edits.csv`, one line an edit. Nothing is forced: where a prompt has no
word that qualifies, the row lacks the style and the summary says why. Every variant is checked before it is kept:
digits, operators, quoted text, `task`, `answer` … (typos/rules.py) are byte for byte the same.

    python 0_data/run_scripts/make_variants.py --prompt_file prompts.json --output_file outputs/prompts_all.json

Styles (k = --intensity; the most important content word is the rarest known word that is no function word):
  main         a letter replaced by a neighbour on the keyboard, in the k most important content words
  swap         two adjacent letters transposed     missing     a letter left out     repeated  a letter doubled
  two, three   exactly two, three words with one typo each, of mixed kinds
  grammar      agreement, tense, article or a doubled word: k words
  punctuation  k stray marks or stray or missing spaces (a missing mark only where nothing else is possible)
  homonym      k words replaced by true homophones
  polite, urgent  a sentence put before the request, which is kept word for word (k does not apply)
  noise_words  control: k typos of mixed kinds, in function words instead of content words
  split        control: a soft hyphen (U+00AD) where `main` has its typo; no letter changes
  real_word    control: one letter edit a word that makes another real word

Columns of the edit log: style, original_index (row position from 0), element_index, edit (1 … k), word (the clean
word), word_position (of the white-space separated pieces of the clean prompt, from 0), char_position (first changed
character in the clean prompt, from 0), operation, before, after (the changed piece of text), osa_distance,
zipf_before, zipf_after (0: unknown; empty where no single word), real_word (`after` holds words of Zipf >= 3 alone)
and, with --tokenizer, tokens_before, tokens_after: the tokens that overlap `before` in the clean and `after` in the
variant prompt, each tokenised as a whole without special tokens. A framing has no distance, Zipf or real_word.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / place) for place in ("", "../1_utils/run_scripts")]

from command_line import UserError, make_parser, run_main
from file_output import write_csv, write_json
from load_json import CLEAN_KEYS, UnreadLine, id_problem, read_prompt_file
from logger import get_logger
from typos import rules
from typos.rules import STYLES, Span, Word

if TYPE_CHECKING:
    import pandas as pd


LOG_COLUMNS = (
    "style", "original_index", "element_index", "edit", "word", "word_position", "char_position", "operation",
    "before", "after", "osa_distance", "zipf_before", "zipf_after", "real_word",
)  # fmt: skip
TOKEN_COLUMNS = ("tokens_before", "tokens_after")
ROWS_SHOWN = 20


class Lacks(Exception):
    """The prompt has nothing that the style could change; the text says what is missing, for the summary."""


@dataclass(frozen=True)
class Edit:
    """Replace `text[start:end]` of the clean prompt by `after`; `word` is the clean word that it hits, if any."""

    start: int
    end: int
    after: str
    operation: str
    word: Word | None = None


@dataclass(frozen=True)
class Settings:
    """What the user chooses once for all rows."""

    seed: int = 0
    intensity: int = 1
    keyboard: str = "qwerty"


@dataclass
class Prompt:
    """One clean prompt with what its styles share; `row_id` seeds every choice made for it."""

    text: str
    row: dict[str, Any]
    row_id: str
    settings: Settings
    offsets: list[Span] | None = None  # of the clean prompt's tokens, read when a log line asks for them

    @cached_property
    def spans(self) -> list[Span]:
        return rules.protected_spans(self.text, self.row)

    @cached_property
    def words(self) -> list[Word]:
        """Plain words outside protected text."""
        return [w for w in rules.plain_words(self.text) if not rules.touches(self.spans, w.start, w.end)]

    @cached_property
    def content(self) -> list[Word]:
        """Content words, the most important first."""
        return rules.by_importance(self.words)

    @cached_property
    def function_words(self) -> list[Word]:
        """Function words long enough for a typo, each once."""
        first: dict[str, Word] = {}
        for word in self.words:
            if word.lower in rules.FUNCTION_WORDS and len(word.text) >= rules.SHORTEST_FUNCTION_WORD:
                first.setdefault(word.lower, word)
        return list(first.values())

    def rng(self, style: str) -> Random:
        return rules.seeded(self.settings.seed, self.row_id, style)


Summary = dict[str, Any]


def make_variants(
    rows: list[Any],
    styles: Sequence[str] = STYLES,
    seed: int = 0,
    intensity: int = 1,
    keyboard: str = "qwerty",
    tokenizer: Any = None,
) -> tuple[list[Any], list[dict[str, Any]], Summary]:
    """(rows with the styles added, edit log, summary) of prompt-file rows; the given rows are left as they are.

    Each choice is seeded by (seed, row id, style), the row id being `element_index` or, without one, the clean text.
    A style that a row already has is made anew. A row without a usable clean prompt stays as it is and is named in
    summary["bad_rows"] [(original index, reason)]; summary["styles"][style] holds `made` and `lacking`
    {reason: rows}. `tokenizer` is a fast Hugging Face tokenizer. Raises UserError for an unknown style or keyboard.
    """
    _check_settings(styles, intensity, keyboard)
    settings = Settings(seed, intensity, keyboard)
    summary: Summary = {
        "rows": len(rows),
        "bad_rows": [],
        "styles": {style: {"made": 0, "lacking": Counter()} for style in styles},
    }
    rows_out: list[Any] = []
    log: list[dict[str, Any]] = []
    for index, row in enumerate(rows):
        reason = bad_row(row)
        if reason:
            summary["bad_rows"].append((index, reason))
            rows_out.append(row)
            continue
        prompt = Prompt(clean_text(row), row, _row_id(row), settings)
        new_row = {key: value for key, value in row.items() if key not in styles}
        for style in styles:
            variant, edits, reason = make_variant(prompt, style)
            if variant is None:
                summary["styles"][style]["lacking"][reason] += 1
                continue
            new_row[style] = variant
            summary["styles"][style]["made"] += 1
            log += _log_lines(prompt, style, edits, index)
            if tokenizer is not None:
                _count_tokens(log[-len(edits) :], prompt, variant, edits, tokenizer)
        rows_out.append(new_row)
    return rows_out, log, summary


def _check_settings(styles: Sequence[str], intensity: int, keyboard: str) -> None:
    unknown = [style for style in styles if style not in STYLES]
    if unknown:
        raise UserError(f"no such style: {', '.join(unknown)}; choose from {', '.join(STYLES)}")
    if len(set(styles)) < len(styles):
        raise UserError("a style is named twice; name each once")
    if intensity < 1:
        raise UserError(f"--intensity {intensity}: the number of edits must be 1 or more")
    if keyboard not in rules.KEYBOARDS:
        raise UserError(f"no such keyboard: {keyboard}; choose from {', '.join(rules.KEYBOARDS)}")


def clean_text(row: dict[str, Any]) -> Any:
    """The row's clean prompt: under `normal`, else under `instruction`, else None."""
    return next((row[key] for key in CLEAN_KEYS if row.get(key) is not None), None)


def bad_row(row: Any) -> str | None:
    """Why no variant can be made of a row; None for a good one."""
    if isinstance(row, UnreadLine):
        return f"is not JSON: {row.reason}"
    if not isinstance(row, dict):
        return "is not an object"
    text = clean_text(row)
    if not isinstance(text, str):
        return "has no clean prompt (a text under `normal` or `instruction`)"
    if not text.strip():
        return "has an empty clean prompt"
    if any("\ud800" <= character <= "\udfff" for character in text):
        return "has half of a surrogate pair in its clean prompt"
    reason = id_problem(row["element_index"]) if row.get("element_index") is not None else None
    return f"has an element_index that {reason}" if reason else None


def _row_id(row: dict[str, Any]) -> str:
    if row.get("element_index") is not None:
        return str(row["element_index"])
    return hashlib.sha256(clean_text(row).encode()).hexdigest()


def make_variant(prompt: Prompt, style: str) -> tuple[str | None, list[Edit], str]:
    """(variant, its edits, "") or (None, [], why the row lacks the style). Never gives a variant that fails a check."""
    try:
        edits = sorted(_MAKERS[style](prompt, style), key=lambda edit: edit.start)
    except Lacks as reason:
        return None, [], str(reason)
    variant = apply_edits(prompt.text, edits)
    faults = rules.verify_variant(prompt.text, variant, style, prompt.row, prompt.settings.intensity)
    if faults:
        return None, [], f"no variant that passes the checks ({faults[0].kind})"
    return variant, edits, ""


def apply_edits(text: str, edits: list[Edit]) -> str:
    """`text` with non-overlapping edits, in order of `start`, carried out."""
    parts, done = [], 0
    for edit in edits:
        parts += [text[done : edit.start], edit.after]
        done = edit.end
    return "".join([*parts, text[done:]])


# --- typos


def _typos(prompt: Prompt, words: list[Word], operations: list[str], count: int, rng: Random, where: str) -> list[Edit]:
    """One typo in each of the first `count` words that can take one; the operation that was used least comes first."""
    edits: list[Edit] = []
    for word in words:
        used = Counter(edit.operation for edit in edits)
        edit = _typo(prompt, word, sorted(operations, key=lambda operation: used[operation]), rng)
        if edit:
            edits.append(edit)
        if len(edits) == count:
            return edits
    raise Lacks(f"fewer than {count} {where}s that can take the edit" if count > 1 else f"no {where} that can take it")


def _typo(prompt: Prompt, word: Word, operations: list[str], rng: Random) -> Edit | None:
    for operation in operations:
        options = rules.typo_options(word.text, operation, prompt.settings.keyboard)
        for _, after in rules.shuffled(rng, options):
            if rules.is_clear_typo(word.lower, after.lower()):
                return Edit(word.start, word.end, after, operation, word)
    return None


def _one_kind(prompt: Prompt, style: str) -> list[Edit]:
    operations = list(rules.OPERATIONS[style])
    return _typos(prompt, prompt.content, operations, prompt.settings.intensity, prompt.rng(style), "content word")


def _mixed_kinds(prompt: Prompt, style: str) -> list[Edit]:
    rng = prompt.rng(style)
    operations = rules.shuffled(rng, list(rules.TYPO_OPERATIONS))
    edits = _typos(prompt, prompt.content, operations, rules.FIXED_COUNTS[style], rng, "content word")
    if len({edit.operation for edit in edits}) == 1:
        raise Lacks("no mixture of kinds of typo is possible")
    return edits


def _noise_words(prompt: Prompt, style: str) -> list[Edit]:
    rng = prompt.rng(style)
    words = rules.shuffled(rng, prompt.function_words)
    operations = rules.shuffled(rng, list(rules.TYPO_OPERATIONS))
    return _typos(prompt, words, operations, prompt.settings.intensity, rng, "function word")


def _split(prompt: Prompt, style: str) -> list[Edit]:
    """A soft hyphen before the letter that `main` of the same row and seed replaces."""
    return [
        Edit(edit.start, edit.end, old[:at] + rules.SOFT_HYPHEN + old[at:], "soft_hyphen", edit.word)
        for edit in _one_kind(prompt, "main")
        for old in [prompt.text[edit.start : edit.end]]
        for at in [_first_difference(old, edit.after)]
    ]


def _first_difference(before: str, after: str) -> int:
    pairs = zip(before, after, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(before), len(after)))


def _real_word(prompt: Prompt, style: str) -> list[Edit]:
    rng, edits = prompt.rng(style), []
    for word in prompt.content:
        options = rules.shuffled(rng, rules.real_word_options(word.lower))
        if options:
            after = _in_case_of(word.text, options[0])
            edits.append(Edit(word.start, word.end, after, rules.operation_of(word.text, after) or "", word))
        if len(edits) == prompt.settings.intensity:
            return edits
    raise Lacks("too few content words one letter away from another word")


def _in_case_of(word: str, lower: str) -> str:
    return lower[0].upper() + lower[1:] if word[0].isupper() else lower


# --- homonyms


def _homonym(prompt: Prompt, _: str) -> list[Edit]:
    """Content words first, by importance, then the others; of several homophones the most frequent."""
    others = {word.lower: word for word in reversed(prompt.words)}
    for word in prompt.content:
        others.pop(word.lower, None)
    edits = []
    for word in [*prompt.content, *sorted(others.values(), key=lambda w: (rules.zipf(w.text), w.start))]:
        choices = [other for other in rules.homophones(word.text) if other not in rules.PROTECTED_WORDS]
        if choices:
            after = _in_case_of(word.text, max(choices, key=lambda h: (rules.zipf(h), h)))
            edits.append(Edit(word.start, word.end, after, "homophone", word))
        if len(edits) == prompt.settings.intensity:
            return edits
    raise Lacks("too few words that have a homophone")


# --- grammar

_AGREEMENT = {
    "is": "are", "are": "is", "was": "were", "were": "was", "has": "have", "have": "has", "does": "do", "do": "does",
    "this": "these", "these": "this", "those": "that",
}  # fmt: skip
_DOUBLED = rules.word_set("the a an of to is are in on at with for and or it you your this what how which")
_AUXILIARIES = rules.word_set("will would can could should must may might shall do does did")
_BEFORE_SUBJECT = rules.word_set("there here where what who how when why")
_BEFORE_BASE_FORM = _AUXILIARIES | rules.word_set("to please and then let's not")
# What may be no slip: "the data is" or "are", "if it was" or "were", "do this quickly" or "these", "an historic".
# Nouns of one form for both numbers, groups (plural in British English), plural forms taken as singular, and
# measures. Where a sentence has one, neither number of a verb or a demonstrative is surely wrong.
_EITHER_NUMBER = rules.word_set(
    """
    sheep fish deer moose elk bison buffalo swine boar trout salmon cod carp tuna shrimp prawn squid octopus bass pike
    perch herring mackerel halibut haddock plaice sole sardine eel crab lobster catfish goldfish jellyfish starfish
    shellfish crayfish swordfish cuttlefish whitefish blowfish dogfish monkfish codfish cattle grouse quail pheasant
    partridge woodcock duck teal fowl waterfowl game antelope reindeer caribou wildebeest gazelle giraffe plankton krill
    species subspecies series miniseries means crossroads headquarters barracks gallows works waterworks steelworks
    ironworks gasworks fireworks aircraft spacecraft hovercraft watercraft rotorcraft craft offspring corps chassis
    rendezvous precis chamois bourgeois patois faux innings sweepstakes shambles kudos biceps triceps quadriceps forceps
    gross brace cannon shot sail counsel kin folk fruit food poultry vermin livestock clothes goods
    scissors pliers tongs tweezers shears bellows binoculars goggles glasses spectacles trousers pants jeans shorts
    tights pyjamas pajamas thanks remains surroundings premises outskirts savings earnings odds lodgings whereabouts
    proceeds riches alms amends stairs woods steps links grounds kennels mews digs
    mathematics maths physics economics politics statistics ethics athletics acoustics gymnastics linguistics tactics
    dynamics mechanics electronics logistics genetics aerobics optics classics analytics diabetes measles mumps rickets
    shingles billiards darts dominoes draughts checkers bowls skittles marbles cards
    data media agenda bacteria criteria phenomena graffiti spaghetti paparazzi algae insignia dice stadia strata errata
    memoranda candelabra opera trivia memorabilia paraphernalia regalia
    swiss chinese japanese portuguese vietnamese taiwanese burmese maltese lebanese sudanese nepalese senegalese inuit
    sioux maori roma pokemon emoji samurai ninja haiku manga sushi
    team staff family group class company firm government police committee crew audience public couple band choir
    council army navy majority minority rest half faculty jury board cabinet parliament senate congress administration
    ministry department school college university corporation bank business club orchestra ensemble cast crowd mob gang
    herd flock pack swarm party union association society community population press opposition management enemy
    generation aristocracy proletariat electorate panel squad tribe household youth personnel clergy gentry nobility
    military infantry cavalry duo trio quartet hertz yen baht won rand quid
    """
)
_QUANTITIES = rules.word_set(  # before "of"
    """
    pair host variety range handful number lot lots plenty bunch total percent percentage proportion fraction portion
    part bulk remainder average collection set list selection bit
    """
)
_EITHER_BEFORE = rules.word_set("none some any all most more half them those us which who that than as neither either")
_UNREAL = rules.word_set("if though unless wish wishes wished suppose supposing imagine lest rather")
# "I suggest that she have a rest", "it is vital he do it": these words can ask for the bare form of the verb.
_MANDATIVE = tuple(
    rules.word_set(
        """
        suggest recommend insist demand ask request requir propos urg advis order prefer move beg desir command
        stipulat mandat decree plead pray instruct petition important essential vital necessary crucial imperative
        critical appropriate better best condition lest wish
        """
    )
)
_AFTER_PRONOUN = rules.word_set(
    """
    aloud step well soon today tomorrow right fast mean means work works sound sounds look looks feel feels made took
    gave came went got saw said told found left kept meant led brought began became cost put set let cut hit hurt read
    held lost won ran fell grew broke spread
    """
)
_PREPOSITIONS = rules.word_set("of in on at with for to from about by into over under near")
_SILENT_H = ("hour", "honest", "honour", "honor", "heir")
# At the beginning of a sentence these may be nouns: "Work is hard" and "List prices" are no requests.
_ALSO_NOUNS = rules.word_set("work answer list name state report plan design help use return outline")
_PAST = {
    "find": "found", "give": "gave", "write": "wrote", "show": "showed", "tell": "told", "make": "made", "get": "got",
    "take": "took", "keep": "kept", "think": "thought", "say": "said", "choose": "chose", "know": "knew", "see": "saw",
    "explain": "explained", "describe": "described", "compare": "compared", "calculate": "calculated",
    "compute": "computed", "determine": "determined", "evaluate": "evaluated", "solve": "solved", "work": "worked",
    "answer": "answered", "list": "listed", "name": "named", "identify": "identified", "summarise": "summarised",
    "summarize": "summarized", "rewrite": "rewrote", "translate": "translated", "suggest": "suggested",
    "provide": "provided", "create": "created", "design": "designed", "plan": "planned", "outline": "outlined",
    "classify": "classified", "extract": "extracted", "discuss": "discussed", "help": "helped", "use": "used",
    "state": "stated", "report": "reported", "return": "returned", "imagine": "imagined", "propose": "proposed",
    "recommend": "recommended", "complete": "completed", "convert": "converted", "simplify": "simplified",
    "brainstorm": "brainstormed", "pick": "picked", "select": "selected", "mention": "mentioned", "decide": "decided",
}  # fmt: skip
_CAN_SLIP = {*_AGREEMENT, *_PAST, *_DOUBLED}
_REQUESTS = {*_PAST, *rules.INSTRUCTION_VERBS, "please"}


def _grammar(prompt: Prompt, style: str) -> list[Edit]:
    """One slip a word; the kind is drawn first, so that frequent small words do not crowd out the rest."""
    return _pick_by_kind(prompt, style, _grammar_slips(prompt), "too few places for a slip of grammar")


def _grammar_slips(prompt: Prompt) -> dict[str, list[Edit]]:
    slips: dict[str, list[Edit]] = {}
    pieces = prompt.text.split()
    has_b = any(piece.strip("().,:;?!") in ("b", "B") for piece in pieces)  # then `a` is an option or a variable
    ends = [rules.ends_sentence(piece) for piece in pieces]
    for word in prompt.words:
        if word.lower not in _CAN_SLIP or (has_b and word.lower == "a"):
            continue
        unmarked = pieces[word.index].endswith(word.text) and word.index + 1 < len(pieces)
        after = pieces[word.index + 1] if unmarked else ""
        sentence = _sentence_around(pieces, ends, word.index)
        for operation, changed in _slips_of(word, *sentence, after):
            slip = Edit(word.start, word.end, _in_case_of(word.text, changed), operation, word)
            slips.setdefault(operation, []).append(slip)
    return slips


LONGEST_SENTENCE = 40  # words on each side that are looked at


def _sentence_around(pieces: list[str], ends: list[bool], index: int) -> tuple[list[str], list[str]]:
    """The words before and after a word in its sentence, in lower case and without the marks around them."""
    start = end = index
    while start > max(0, index - LONGEST_SENTENCE) and not ends[start - 1] and pieces[start - 1][-1] != ":":
        start -= 1
    while end < min(len(pieces) - 1, index + LONGEST_SENTENCE) and not ends[end]:
        end += 1
    return _bare(pieces[start:index]), _bare(pieces[index + 1 : end + 1])


def _bare(pieces: list[str]) -> list[str]:
    return [piece.strip("()[]\"'“”‘’«».,;:?!*").lower() for piece in pieces]


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
            base_form = lower not in _ALSO_NOUNS or after.lower() in rules.FUNCTION_WORDS - {"is", "of", "was"}
        elif before in ("and", "then"):  # "they cut and gave", "she helps him and writes" would be right
            base_form = earlier[0] in _REQUESTS
        past = base_form and (not word.starts_sentence or after.lower() in rules.FUNCTION_WORDS)  # "Proposed names"
        if past or (before == "you" and _AUXILIARIES.intersection(earlier[-2:-1])):  # "that you found" is right
            slips.append(("tense", _PAST[lower]))
        if base_form or before == "you":
            slips.append(("agreement", _third_person(lower)))
    following = after.strip("()[]\"'“”.,;:?!")
    if lower == "a" and following[:1] in tuple("bcdfgjklmnpqrstvwxyz") and rules.is_real_word(following):
        slips.append(("article", "an"))
    if lower == "an" and after and (after[:1] in "aeio" or after.startswith(_SILENT_H)):
        slips.append(("article", "a"))
    if lower in _DOUBLED and after:
        slips.append(("doubled_word", f"{lower} {lower}"))
    return slips


def _is_agreement(word: Word, earlier: list[str], later: list[str], after: str) -> bool:
    """True if the other number of a word in _AGREEMENT is wrong for sure."""
    lower, before, noun = word.lower, "".join(earlier[-1:]), "".join(later[:1])
    sentence = (*earlier, lower, *later)
    quantity = any(one in _QUANTITIES and other == "of" for one, other in pairwise(sentence))
    if quantity or _EITHER_NUMBER.intersection(sentence):
        return False
    if lower in ("this", "these", "those"):  # before a noun; alone, the other may be as right
        if lower == "those" and earlier and before not in _PREPOSITIONS:  # "I know that boys cry"
            return False
        pronoun = noun in rules.FUNCTION_WORDS | rules.NUMBER_WORDS | _AFTER_PRONOUN or noun.endswith(("ly", "ed"))
        sure = bool(after) and noun.isalpha() and noun != "people" and not pronoun
        return sure or (lower == "those" and noun in ("that", "who"))
    if before in _EITHER_BEFORE | rules.UNITS | rules.NUMBER_WORDS or before[-1:].isdigit():
        return False
    if "and" in earlier[-4:] or {"or", "nor"}.intersection(earlier[-4:]):
        return False
    inverted = not earlier or before in _BEFORE_SUBJECT
    if inverted and {"and", "or"}.intersection(later):  # "where is the cat and the dog"
        return False
    if lower in ("was", "were"):  # "if it were", "were he here", "as it were"
        return not (inverted and not before) and not _UNREAL.intersection(earlier) and earlier[-2:] != ["as", "it"]
    if lower in ("has", "have", "do", "does"):
        return not any(one.startswith(_MANDATIVE) for one in earlier)
    return True


def _third_person(verb: str) -> str:
    if verb.endswith("y") and verb[-2] not in "aeiou":
        return verb[:-1] + "ies"
    return verb + ("es" if verb.endswith(("s", "sh", "ch", "x", "z", "o")) else "s")


def _pick_by_kind(prompt: Prompt, style: str, by_kind: dict[str, list[Edit]], lacking: str) -> list[Edit]:
    """As many edits as --intensity asks for, at most one a place, each kind as likely as the others."""
    rng = prompt.rng(style)
    chosen: list[Edit] = []
    for kind in _turns(rng, by_kind, prompt.settings.intensity):
        free = [e for e in by_kind[kind] if all(e.end <= c.start or c.end <= e.start for c in chosen)]
        if free:
            chosen.append(free[int(rng.random() * len(free))])
        if len(chosen) == prompt.settings.intensity:
            return chosen
    raise Lacks(lacking)


def _turns(rng: Random, by_kind: dict[str, list[Edit]], count: int) -> list[str]:
    """Kinds in random order, over and over, often enough for `count` edits even if one kind alone can give them."""
    kinds = rules.shuffled(rng, sorted(by_kind))
    return kinds * min(count, sum(len(edits) for edits in by_kind.values()))


# --- punctuation

_MARKS = ",.;!?"
_NO_COMMA_AFTER = rules.word_set("the a an of to with from at my your our their its every")  # elsewhere it may be right


def _punctuation(prompt: Prompt, style: str) -> list[Edit]:
    slips = _punctuation_slips(prompt)
    # A mark that is merely gone leaves no token that could be marked as edited: the last resort.
    visible = {kind: edits for kind, edits in slips.items() if kind != "missing_mark"}
    enough = sum(len(edits) for edits in visible.values()) >= prompt.settings.intensity
    return _pick_by_kind(prompt, style, visible if enough else slips, "too few places for a slip of punctuation")


def _punctuation_slips(prompt: Prompt) -> dict[str, list[Edit]]:
    """Every place for each kind of slip; marks and spaces that touch protected text stay as they are."""
    slips: dict[str, list[Edit]] = {}
    text = prompt.text
    for position, word in enumerate(prompt.words):
        end = word.end
        rest = text[end : end + 2]
        if rest[:1] in _MARKS and rest[:1] and (len(rest) == 1 or rest[1].isspace()):
            for operation, changed in _mark_slips(rest[0]):
                slip = Edit(word.start, end + 1, word.text + changed, operation, word)
                slips.setdefault(operation, []).append(slip)
        following = prompt.words[position + 1] if position + 1 < len(prompt.words) else None
        if following and text[end : following.start] == " ":
            if word.lower in _NO_COMMA_AFTER:
                stray = Edit(word.start, end, word.text + ",", "stray_mark", word)
                slips.setdefault("stray_mark", []).append(stray)
            joined = word.text + following.text
            if rules.zipf(joined) < rules.KNOWN_WORD_ZIPF:
                gone = Edit(word.start, following.end, joined, "missing_space", word)
                slips.setdefault("missing_space", []).append(gone)
    return slips


def _mark_slips(mark: str) -> list[tuple[str, str]]:
    return [("stray_mark", mark + mark), ("stray_space", " " + mark), ("missing_mark", "")]


# --- framings

# No digit, number word, operator, quotation mark or colon: the task stays what the first colon says it is.
FRAMINGS = {
    "polite": (
        "Could you please help me with this?",
        "Please help me with the following, if you would be so kind.",
        "I would be very grateful for your help with this.",
        "Hello! I hope you are well, and thank you in advance for your help.",
        "Good morning! I would really appreciate your help here.",
        "Thank you so much for taking the time to look at this.",
        "If you don't mind, I would love your help with this.",
        "Excuse me, could I kindly ask for your assistance?",
        "I am sorry to bother you, and I would be thankful for an answer.",
        "Would you be so kind as to help me with this, please?",
        "Many thanks for your patience and your kind help.",
        "Hi there! Whenever it suits you, I would be glad of your help.",
        "Your help has always been wonderful, so may I please ask again?",
        "Dear assistant, I would be most obliged for your help.",
        "Please do not hurry, and thank you kindly for helping me.",
        "It would mean a lot to me to have your help with this, thank you.",
    ),
    "urgent": (
        "This is urgent, I need the answer right now!",
        "Hurry, I am running out of time!",
        "I need this immediately, so do not waste any time!",
        "Quick! My deadline is almost here.",
        "Emergency! Please respond without delay.",
        "There is no time to lose, answer immediately!",
        "I am in a terrible rush and need this as soon as possible!",
        "Drop everything else, this cannot wait!",
        "My boss is waiting at the door for this, so be quick!",
        "Answer fast, the meeting is about to start!",
        "This is extremely time critical, respond now!",
        "I am about to miss my deadline, so please be fast!",
        "ASAP! Everything depends on this.",
        "We are late already, so I need this instantly!",
        "Right now, please! I cannot wait any longer.",
        "Time is running out and I must have this without delay!",
    ),
}


def _framing(prompt: Prompt, style: str) -> list[Edit]:
    choices = FRAMINGS[style]
    sentence = choices[int(prompt.rng(style).random() * len(choices))]
    return [Edit(0, 0, sentence + " ", "prefix")]


_MAKERS: dict[str, Callable[[Prompt, str], list[Edit]]] = {
    **dict.fromkeys(rules.OPERATIONS, _one_kind),
    **dict.fromkeys(rules.FIXED_COUNTS, _mixed_kinds),
    **dict.fromkeys(rules.FRAMING_STYLES, _framing),
    "grammar": _grammar,
    "punctuation": _punctuation,
    "homonym": _homonym,
    "noise_words": _noise_words,
    "split": _split,
    "real_word": _real_word,
}


# --- edit log


def _log_lines(prompt: Prompt, style: str, edits: list[Edit], index: int) -> list[dict[str, Any]]:
    lines = []
    for number, edit in enumerate(edits, 1):
        before = prompt.text[edit.start : edit.end]
        place = {
            "style": style,
            "original_index": index,
            "element_index": prompt.row.get("element_index", index + 1),
            "edit": number,
            "word": edit.word.text if edit.word else "",
            "word_position": edit.word.index if edit.word else 0,
            "char_position": edit.start + _first_difference(before, edit.after),
        }
        lines.append({**place, **_change(edit.operation, before, edit.after)})
    return lines


def _change(operation: str, before: str, after: str) -> dict[str, Any]:
    """The columns that follow from the changed piece of text alone; a soft hyphen is no letter, so it is left out."""
    if not before:
        return {"operation": operation, "before": before, "after": after}
    old, new = (rules.words_in(text.replace(rules.SOFT_HYPHEN, "")) for text in (before, after))
    return {
        "operation": operation,
        "before": before,
        "after": after,
        "osa_distance": rules.osa_distance(before, after, limit=len(after)),
        "zipf_before": rules.zipf(old[0]) if len(old) == 1 else None,
        "zipf_after": rules.zipf(new[0]) if len(new) == 1 else None,
        "real_word": all(rules.is_real_word(word) for word in new),
    }


def _count_tokens(lines: list[dict[str, Any]], prompt: Prompt, variant: str, edits: list[Edit], tokenizer: Any) -> None:
    """Add the token counts to the log lines of one variant; the space after a framing is not part of it."""
    if prompt.offsets is None:
        prompt.offsets = _offsets(tokenizer, prompt.text)
    offsets = _offsets(tokenizer, variant)
    shift = 0
    for line, edit in zip(lines, edits, strict=True):
        start = edit.start + shift
        line["tokens_before"] = _overlapping(prompt.offsets, edit.start, edit.end)
        line["tokens_after"] = _overlapping(offsets, start, start + len(edit.after.rstrip()))
        shift += len(edit.after) - (edit.end - edit.start)


def _offsets(tokenizer: Any, text: str) -> list[Span]:
    return list(tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"])


def _overlapping(offsets: list[Span], start: int, end: int) -> int:
    return sum(1 for a, b in offsets if a < end and start < b)


# --- command line


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__)
    files = parser.add_argument_group("files")
    files.add_argument("--prompt_file", required=True, help="prompt file with the clean prompts")
    files.add_argument("--output_file", required=True, help="prompt file to write; the edit log goes beside it")
    edits = parser.add_argument_group("edits")
    edits.add_argument("--styles", nargs="+", default=["all"], metavar="STYLE", help=f"all, or of: {' '.join(STYLES)}")
    edits.add_argument("--seed", type=int, default=0, help="another seed gives other variants")
    edits.add_argument("--intensity", type=int, default=1, metavar="K", help="edits a variant")
    edits.add_argument("--keyboard", default="qwerty", choices=rules.KEYBOARDS, help="whose neighbours `main` takes")
    edits.add_argument("--tokenizer", metavar="MODEL", help="folder or name of a model whose tokens the log counts")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Make the variants, write both files, print the summary. Returns 1 where a row had no usable clean prompt."""
    args = parse_args(argv)
    prompts = read_prompt_file(args.prompt_file)
    output = Path(args.output_file)
    if output.resolve() == Path(args.prompt_file).resolve():
        raise UserError(f"{output}: is the prompt file itself; choose another --output_file")
    styles = STYLES if args.styles == ["all"] else args.styles
    tokenizer = _load_tokenizer(args.tokenizer) if args.tokenizer else None
    rows, log, summary = make_variants(prompts.rows, styles, args.seed, args.intensity, args.keyboard, tokenizer)
    log_file = edit_log_path(output)
    try:
        write_json(output, rows)
    except RecursionError:
        raise UserError(f"{args.prompt_file}: a value is nested too deeply; flatten or remove it") from None
    write_csv(log_file, log_table(log, tokenizer is not None))
    _tell(summary, output, log_file)
    return 1 if summary["bad_rows"] else 0


def edit_log_path(output_file: str | Path) -> Path:
    """Where the edit log of a prompt file lies: `<name>_edits.csv` beside it."""
    output_file = Path(output_file)
    return output_file.with_name(f"{output_file.stem}_edits.csv")


def log_table(log: list[dict[str, Any]], with_tokens: bool = False) -> pd.DataFrame:
    """The edit log as a table, with all its columns even where no edit was made."""
    import pandas as pd

    return pd.DataFrame(log, columns=[*LOG_COLUMNS, *(TOKEN_COLUMNS if with_tokens else ())])


def _load_tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"--tokenizer {name}: cannot be loaded: {error}") from None
    if not tokenizer.is_fast:
        raise UserError(f"--tokenizer {name}: has no fast form, which alone gives character offsets; choose another")
    return tokenizer


def _tell(summary: Summary, output: Path, log_file: Path) -> None:
    logger = get_logger("make_variants")
    for style, counts in summary["styles"].items():
        lacking = "; ".join(f"{number} lack it: {reason}" for reason, number in counts["lacking"].most_common())
        logger.info(f"{style:12s} {counts['made']:6d} made" + (f"; {lacking}" if lacking else ""))
    for index, reason in summary["bad_rows"][:ROWS_SHOWN]:
        logger.warning(f"row {index + 1} {reason}; it was copied as it is")
    if len(summary["bad_rows"]) > ROWS_SHOWN:
        logger.warning(f"… and {len(summary['bad_rows']) - ROWS_SHOWN} more such rows")
    logger.info(f"wrote {output} ({summary['rows']} rows) and {log_file}")


if __name__ == "__main__":
    run_main(main)
