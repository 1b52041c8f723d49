"""Every style of a clean prompt: typos, other slips, tones, and the controls; each checked before it is kept.

`make_variants` is the entry: it loops over rows and styles. Each style has a maker (`_MAKERS`) that gives its edits or
raises `Lacks`. The columns of the edit log are explained in docs/DATA_FORMAT.md.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any, TypeVar

import pandas as pd
from command_line import UserError
from load_json import CLEAN_KEYS, STYLES, UnreadLine, has_half_character, id_problem

from typos.edits import (
    KEYBOARDS,
    SHORTEST_FUNCTION_WORD,
    TYPO_OPERATIONS,
    Edit,
    first_difference,
    in_case_of,
    is_clear_typo,
    operation_of,
    osa_distance,
    real_word_options,
    typo_options,
)
from typos.grammar import grammar_slips
from typos.protection import Span, protected_spans, touches
from typos.style_rules import FIXED_COUNTS, FRAMING_STYLES, OPERATIONS, SOFT_HYPHEN, verify_variant
from typos.words import (
    FUNCTION_WORDS,
    KNOWN_WORD_ZIPF,
    PROTECTED_WORDS,
    WORD_LISTS,
    Word,
    by_importance,
    homophones,
    is_real_word,
    plain_words,
    word_set,
    words_in,
    zipf,
)

LOG_COLUMNS = [
    *("style", "original_index", "element_index", "edit", "word", "word_position", "char_position", "operation"),
    *("before", "after", "osa_distance", "zipf_before", "zipf_after", "real_word"),
]
TOKEN_COLUMNS = ["tokens_before", "tokens_after"]
FRAMINGS: dict[str, list[str]] = WORD_LISTS["framings"]
T = TypeVar("T")


class Lacks(Exception):
    """The prompt has nothing that the style could change; the text says what is missing, for the summary."""


@dataclass
class Prompt:
    """One clean prompt with what its styles share; `row_id` seeds every choice made for it."""

    text: str
    row: dict[str, Any]
    row_id: str
    seed: int
    intensity: int
    keyboard: str
    offsets: list[Span] | None = None  # of the clean prompt's tokens, read when a log line asks for them

    @cached_property
    def spans(self) -> list[Span]:
        return protected_spans(self.text, self.row)

    @cached_property
    def words(self) -> list[Word]:
        """Plain words outside protected text."""
        return [w for w in plain_words(self.text) if not touches(self.spans, w.start, w.end)]

    @cached_property
    def content(self) -> list[Word]:
        """Content words, the most important first."""
        return by_importance(self.words)

    @cached_property
    def function_words(self) -> list[Word]:
        """Function words long enough for a typo, each once."""
        first: dict[str, Word] = {}
        for word in self.words:
            if word.lower in FUNCTION_WORDS and len(word.text) >= SHORTEST_FUNCTION_WORD:
                first.setdefault(word.lower, word)
        return list(first.values())

    def rng(self, style: str) -> Random:
        """A generator of its own for each (seed, row, style), so that no variant depends on which others are made."""
        return Random(f"{self.seed}|{self.row_id}|{style}".encode("utf-8", "surrogatepass"))


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
    unknown = [style for style in styles if style not in STYLES]
    if unknown:
        raise UserError(f"no such style: {', '.join(unknown)}; choose from {', '.join(STYLES)}")
    if len(set(styles)) < len(styles):
        raise UserError("a style is named twice; name each once")
    if intensity < 1:
        raise UserError(f"--intensity {intensity}: the number of edits must be 1 or more")
    if keyboard not in KEYBOARDS:
        raise UserError(f"no such keyboard: {keyboard}; choose from {', '.join(KEYBOARDS)}")
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
        text, own_id = clean_text(row), row.get("element_index")
        row_id = str(own_id) if own_id is not None else hashlib.sha256(text.encode()).hexdigest()
        prompt = Prompt(text, row, row_id, seed, intensity, keyboard)
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
    if has_half_character(text):
        return "has half of a surrogate pair in its clean prompt"
    reason = id_problem(row["element_index"]) if row.get("element_index") is not None else None
    return f"has an element_index that {reason}" if reason else None


def make_variant(prompt: Prompt, style: str) -> tuple[str | None, list[Edit], str]:
    """(variant, its edits, "") or (None, [], why the row lacks the style). Never gives a variant that fails a check."""
    try:
        edits = sorted(_MAKERS[style](prompt, style), key=lambda edit: edit.start)
    except Lacks as reason:
        return None, [], str(reason)
    variant = apply_edits(prompt.text, edits)
    faults = verify_variant(prompt.text, variant, style, prompt.row, prompt.intensity)
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


def shuffled(rng: Random, items: Iterable[T]) -> list[T]:
    """`items` in random order. Uses random() alone, the one method whose numbers stay the same in all Pythons."""
    return [item for _, item in sorted(((rng.random(), item) for item in items), key=lambda pair: pair[0])]


# --- typos


def _typos(prompt: Prompt, words: list[Word], operations: list[str], count: int, rng: Random, where: str) -> list[Edit]:
    """One typo in each of the first `count` words that can take one; the operation that was used least comes first."""
    edits: list[Edit] = []
    for word in words:
        used = Counter(edit.operation for edit in edits)
        for operation in sorted(operations, key=lambda operation: used[operation]):
            options = shuffled(rng, typo_options(word.text, operation, prompt.keyboard))
            after = next((typo for _, typo in options if is_clear_typo(word.lower, typo.lower())), None)
            if after is not None:
                edits.append(Edit(word.start, word.end, after, operation, word))
                break
        if len(edits) == count:
            return edits
    raise Lacks(f"fewer than {count} {where}s that can take the edit" if count > 1 else f"no {where} that can take it")


def _one_kind(prompt: Prompt, style: str) -> list[Edit]:
    operations = [OPERATIONS[style]]
    return _typos(prompt, prompt.content, operations, prompt.intensity, prompt.rng(style), "content word")


def _mixed_kinds(prompt: Prompt, style: str) -> list[Edit]:
    rng = prompt.rng(style)
    operations = shuffled(rng, TYPO_OPERATIONS)
    edits = _typos(prompt, prompt.content, operations, FIXED_COUNTS[style], rng, "content word")
    if len({edit.operation for edit in edits}) == 1:
        raise Lacks("no mixture of kinds of typo is possible")
    return edits


def _noise_words(prompt: Prompt, style: str) -> list[Edit]:
    rng = prompt.rng(style)
    words = shuffled(rng, prompt.function_words)
    operations = shuffled(rng, TYPO_OPERATIONS)
    return _typos(prompt, words, operations, prompt.intensity, rng, "function word")


def _split(prompt: Prompt, style: str) -> list[Edit]:
    """A soft hyphen before the letter that `main` of the same row and seed replaces."""
    return [
        Edit(edit.start, edit.end, old[:at] + SOFT_HYPHEN + old[at:], "soft_hyphen", edit.word)
        for edit in _one_kind(prompt, "main")
        for old in [prompt.text[edit.start : edit.end]]
        for at in [first_difference(old, edit.after)]
    ]


def _real_word(prompt: Prompt, style: str) -> list[Edit]:
    rng, edits = prompt.rng(style), []
    for word in prompt.content:
        options = shuffled(rng, real_word_options(word.lower))
        if options:
            after = in_case_of(word.text, options[0])
            edits.append(Edit(word.start, word.end, after, operation_of(word.text, after) or "", word))
        if len(edits) == prompt.intensity:
            return edits
    raise Lacks("too few content words one letter away from another word")


def _homonym(prompt: Prompt, _: str) -> list[Edit]:
    """Content words first, by importance, then the others; of several homophones the most frequent."""
    others = {word.lower: word for word in reversed(prompt.words)}
    for word in prompt.content:
        others.pop(word.lower, None)
    edits = []
    for word in [*prompt.content, *sorted(others.values(), key=lambda w: (zipf(w.text), w.start))]:
        choices = [other for other in homophones(word.text) if other not in PROTECTED_WORDS]
        if choices:
            after = in_case_of(word.text, max(choices, key=lambda h: (zipf(h), h)))
            edits.append(Edit(word.start, word.end, after, "homophone", word))
        if len(edits) == prompt.intensity:
            return edits
    raise Lacks("too few words that have a homophone")


# --- grammar, punctuation, tone


def _grammar(prompt: Prompt, style: str) -> list[Edit]:
    """One slip a word; the kind is drawn first, so that frequent small words do not crowd out the rest."""
    return _pick_by_kind(prompt, style, grammar_slips(prompt.text, prompt.words))


def _pick_by_kind(prompt: Prompt, style: str, slips: Iterable[Edit]) -> list[Edit]:
    """As many edits as --intensity asks for, at most one a place, each kind as likely as the others."""
    rng = prompt.rng(style)
    by_kind: dict[str, list[Edit]] = {}
    for slip in slips:
        by_kind.setdefault(slip.operation, []).append(slip)
    chosen: list[Edit] = []
    # The kinds in turn, often enough for all edits even if one kind alone can give them.
    turns = min(prompt.intensity, sum(len(edits) for edits in by_kind.values()))
    for kind in shuffled(rng, sorted(by_kind)) * turns:
        free = [e for e in by_kind[kind] if all(e.end <= c.start or c.end <= e.start for c in chosen)]
        if free:
            chosen.append(free[int(rng.random() * len(free))])
        if len(chosen) == prompt.intensity:
            return chosen
    raise Lacks(f"too few places for a slip of {style}")


_MARKS = ",.;!?"
_NO_COMMA_AFTER = word_set("the a an of to with from at my your our their its every")  # elsewhere it may be right


def _punctuation(prompt: Prompt, style: str) -> list[Edit]:
    slips = list(_punctuation_slips(prompt))
    # A mark that is merely gone leaves no token that could be marked as edited: the last resort.
    visible = [slip for slip in slips if slip.operation != "missing_mark"]
    return _pick_by_kind(prompt, style, visible if len(visible) >= prompt.intensity else slips)


def _punctuation_slips(prompt: Prompt) -> Iterator[Edit]:
    """Every slip that is possible; marks and spaces that touch protected text stay as they are."""
    text = prompt.text
    for position, word in enumerate(prompt.words):
        end = word.end
        rest = text[end : end + 2]
        if rest[:1] in _MARKS and rest[:1] and (len(rest) == 1 or rest[1].isspace()):
            mark = rest[0]
            for operation, changed in (("stray_mark", mark + mark), ("stray_space", " " + mark), ("missing_mark", "")):
                yield Edit(word.start, end + 1, word.text + changed, operation, word)
        following = prompt.words[position + 1] if position + 1 < len(prompt.words) else None
        if following and text[end : following.start] == " ":
            if word.lower in _NO_COMMA_AFTER:
                yield Edit(word.start, end, word.text + ",", "stray_mark", word)
            joined = word.text + following.text
            if zipf(joined) < KNOWN_WORD_ZIPF:
                yield Edit(word.start, following.end, joined, "missing_space", word)


def _framing(prompt: Prompt, style: str) -> list[Edit]:
    choices = FRAMINGS[style]
    sentence = choices[int(prompt.rng(style).random() * len(choices))]
    return [Edit(0, 0, sentence + " ", "prefix")]


_MAKERS: dict[str, Callable[[Prompt, str], list[Edit]]] = {
    **dict.fromkeys(OPERATIONS, _one_kind),
    **dict.fromkeys(FIXED_COUNTS, _mixed_kinds),
    **dict.fromkeys(FRAMING_STYLES, _framing),
    "grammar": _grammar,
    "punctuation": _punctuation,
    "homonym": _homonym,
    "noise_words": _noise_words,
    "split": _split,
    "real_word": _real_word,
}


# --- edit log


def edit_log_path(output_file: str | Path) -> Path:
    """Where the edit log of a prompt file lies: `<name>_edits.csv` beside it."""
    output_file = Path(output_file)
    return output_file.with_name(f"{output_file.stem}_edits.csv")


def log_table(log: list[dict[str, Any]], with_tokens: bool = False) -> pd.DataFrame:
    """The edit log as a table, with all its columns even where no edit was made."""
    return pd.DataFrame(log, columns=[*LOG_COLUMNS, *(TOKEN_COLUMNS if with_tokens else ())])


def _log_lines(prompt: Prompt, style: str, edits: list[Edit], index: int) -> list[dict[str, Any]]:
    lines = []
    for number, edit in enumerate(edits, 1):
        before = prompt.text[edit.start : edit.end]
        line = {
            "style": style,
            "original_index": index,
            "element_index": prompt.row.get("element_index", index + 1),
            "edit": number,
            "word": edit.word.text if edit.word else "",
            "word_position": edit.word.index if edit.word else 0,
            "char_position": edit.start + first_difference(before, edit.after),
            "operation": edit.operation,
            "before": before,
            "after": edit.after,
        }
        if before:  # a tone has no distance or frequency; a soft hyphen is not a letter, so it is left out
            old, new = (words_in(text.replace(SOFT_HYPHEN, "")) for text in (before, edit.after))
            line["osa_distance"] = osa_distance(before, edit.after, limit=len(edit.after))
            line["zipf_before"] = zipf(old[0]) if len(old) == 1 else None
            line["zipf_after"] = zipf(new[0]) if len(new) == 1 else None
            line["real_word"] = all(is_real_word(word) for word in new)
        lines.append(line)
    return lines


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


def load_tokenizer(name: str) -> Any:
    """A fast tokenizer by folder or model name. Raises UserError if it cannot be loaded or has no fast form."""
    from transformers import AutoTokenizer  # optional: seconds to import

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"--tokenizer {name}: cannot be loaded: {error}") from None
    if not tokenizer.is_fast:
        raise UserError(f"--tokenizer {name}: has no fast form, which alone gives character offsets; choose another")
    return tokenizer
