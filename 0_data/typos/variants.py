"""Every style of a clean prompt: typos, other slips, tones, and the controls; each checked before it is kept.

`make_variants` is the entry: it loops over rows and styles. Each style has a maker (`_MAKERS`): one function that
yields edits in the order in which they are taken, and raises `Lacks` if it has no more. The columns of the edit log
are explained in docs/DATA_FORMAT.md.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any, TypeVar

import pandas as pd
from command_line import UserError
from load_json import CLEAN_KEYS, STYLES, UnreadLine, id_problem, text_problem
from style_names import dose_of

from typos.grammar import grammar_slips
from typos.languages import (
    ENGLISH,
    LANGUAGE_KEY,
    WORD_LISTS,
    Language,
    chosen_keyboard,
    is_real_word,
    language_of,
    language_problem,
    word_set,
    zipf,
)
from typos.protection import Span, protected_spans, touches
from typos.style_rules import FIXED_COUNTS, FRAMING_STYLES, OPERATIONS, SOFT_HYPHEN, verify_variant
from typos.words import (
    KNOWN_WORD_ZIPF,
    PROTECTED_WORDS,
    SHORTEST_FUNCTION_WORD,
    TYPO_OPERATIONS,
    Edit,
    Word,
    by_importance,
    composed,
    first_difference,
    homophones,
    in_case_of,
    is_clear_typo,
    is_known,
    operation_of,
    osa_distance,
    plain_words,
    real_word_options,
    typo_options,
    words_in,
)

LOG_COLUMNS = [
    *("style", "original_index", "element_index", "edit", "word", "word_position", "char_position", "operation"),
    *("before", "after", "osa_distance", "zipf_before", "zipf_after", "real_word"),
]
TOKEN_COLUMNS = ["tokens_before", "tokens_after"]
FRAMINGS: dict[str, list[str]] = WORD_LISTS["framings"]
T = TypeVar("T")


class Lacks(Exception):
    """The prompt has too little that the style could change; the text says what is missing, for the summary."""


@dataclass
class Prompt:
    """One clean prompt with what its styles share; `row_id` seeds every choice made for it."""

    text: str
    row: dict[str, Any]
    row_id: str
    seed: int
    intensity: int
    keyboard: str
    tokenizer: Any = None
    where: str = "any"

    @cached_property
    def language(self) -> Language:
        return language_of(self.row)

    @cached_property
    def words(self) -> list[Word]:
        """Plain words outside protected text."""
        spans = protected_spans(self.text, self.row)
        return [w for w in plain_words(self.text, self.language) if not touches(spans, w.start, w.end)]

    @cached_property
    def content(self) -> list[Word]:
        """Content words, the most important first; all words of a subject that the edits go into."""
        return self.words if self.where == "subject" else by_importance(self.words)

    def rng(self, style: str) -> Random:
        """A generator of its own for each (seed, row, style), so that no variant depends on which others are made."""
        return Random(f"{self.seed}|{self.row_id}|{style}".encode("utf-8", "surrogatepass"))

    def token_offsets(self, text: str) -> list[Span]:
        """Character spans of the tokens of `text`."""
        return self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]

    @cached_property
    def own_offsets(self) -> list[Span]:
        return self.token_offsets(self.text)


def make_variants(
    rows: list[Any],
    styles: Sequence[str] = STYLES,
    seed: int = 0,
    intensity: int = 1,
    keyboard: str | None = None,
    tokenizer: Any = None,
    where: str = "any",
    language: str = "en",
) -> tuple[list[Any], list[dict[str, Any]], dict[str, Any]]:
    """(rows with the styles added, edit log, summary) of prompt-file rows; the given rows are left as they are.

    Each choice is seeded by (seed, row id, style), the row id being `element_index` or, without one, the clean text.
    A style that a row already has is made anew. A row without a usable clean prompt stays as it is and is named in
    summary["bad_rows"] [(original index, reason)]; summary["styles"][style] holds `made` and `lacking`
    {reason: rows}. `tokenizer` is a fast Hugging Face tokenizer. where: `subject` puts the typos into the row's `task`
    (and notes it in the row's `_where`, which does the same), `content` the doses into content words alone. language:
    of the rows without a `_language`, which get it, if it is not English. keyboard: the language's own without one.
    Raises UserError for an unknown style or language.
    """
    if unknown := [style for style in styles if style not in STYLES and dose_of(style) is None]:
        raise UserError(f"no such style: {', '.join(unknown)}; choose from {', '.join(STYLES)}, typo@1, typo@2 …")
    if len(set(styles)) < len(styles):
        raise UserError("a style is named twice; name each once")
    if intensity < 1:
        raise UserError(f"--intensity {intensity}: the number of edits must be 1 or more")
    if reason := language_problem(language):
        raise UserError(f"--language {reason}")
    counts: dict[str, dict[str, Any]] = {style: {"made": 0, "lacking": Counter()} for style in styles}
    bad_rows: list[tuple[int, str]] = []
    rows_out: list[Any] = []
    log: list[dict[str, Any]] = []
    for index, row in enumerate(rows):
        if reason := bad_row(row):
            bad_rows.append((index, reason))
            rows_out.append(row)
            continue
        if where == "subject":
            row = {**row, "_where": where}
        if language != "en":
            row = {**row, LANGUAGE_KEY: row.get(LANGUAGE_KEY) or language}
        text, own_id = clean_text(row), row.get("element_index")
        row_id = str(own_id) if own_id is not None else hashlib.sha256(text.encode()).hexdigest()
        keys = chosen_keyboard(keyboard, language_of(row))
        prompt = Prompt(text, row, row_id, seed, intensity, keys, tokenizer, row.get("_where", where))
        lacking = {style: reason for style in styles if (reason := prompt.language.lacks(style, text))}
        new_row = {key: value for key, value in row.items() if key not in styles or key in lacking}
        for style in styles:
            try:
                if style in new_row:  # the row's own, of a kind that is not made in its language
                    continue
                if style in lacking:
                    raise Lacks(lacking[style])
                new_row[style], edits = make_variant(prompt, style)
                counts[style]["made"] += 1
                log += _log_lines(prompt, style, new_row[style], edits, index)
            except Lacks as lacks:
                counts[style]["lacking"][str(lacks)] += 1
        rows_out.append(new_row)
    return rows_out, log, {"bad_rows": bad_rows, "styles": counts}


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
    if text is None:
        return "has no clean prompt (a text under `normal` or `instruction`)"
    if reason := text_problem(text):
        return f"has no usable clean prompt: it {reason}"
    if row.get("element_index") is not None and (reason := id_problem(row["element_index"])):
        return f"has an element_index that {reason}"
    reason = language_problem(row[LANGUAGE_KEY]) if row.get(LANGUAGE_KEY) is not None else None
    return f"has a {LANGUAGE_KEY} that cannot be used: {reason}" if reason else None


def make_variant(prompt: Prompt, style: str) -> tuple[str, list[Edit]]:
    """(variant, its edits in order); never one that fails a check. Raises Lacks if the prompt has none."""
    count, dose = FIXED_COUNTS.get(style, prompt.intensity), dose_of(style)
    made = _dose(prompt, dose) if dose else islice(_MAKERS[style](prompt, style), count)
    edits = sorted(made, key=lambda edit: edit.start)
    variant = prompt.text
    for edit in reversed(edits):
        variant = variant[: edit.start] + edit.after + variant[edit.end :]
    if faults := verify_variant(prompt.text, variant, style, prompt.row, prompt.intensity):
        raise Lacks(f"no variant that passes the checks ({faults[0][0]})")
    return variant, edits


def shuffled(rng: Random, items: Iterable[T]) -> list[T]:
    """`items` in random order. Uses random() alone, the one method whose numbers stay the same in all Pythons."""
    return [item for _, item in sorted(((rng.random(), item) for item in items), key=lambda pair: pair[0])]


def _one_of(rng: Random, items: Sequence[T]) -> T:
    return items[int(rng.random() * len(items))]


# --- typos


def _typos(prompt: Prompt, style: str) -> Iterator[Edit]:
    """One typo in each word that can take one; of several operations the one that was used least comes first."""
    rng, words, where = prompt.rng(style), prompt.content, "content word"
    count = FIXED_COUNTS.get(style, prompt.intensity)
    if style == "noise_words":
        small = [w for w in prompt.words if w.is_small and len(w.text) >= SHORTEST_FUNCTION_WORD]
        once = {word.lower: word for word in reversed(small)}.values()
        words, where = shuffled(rng, sorted(once, key=lambda word: word.start)), "function word"
    operations = [OPERATIONS[style]] if style in OPERATIONS else shuffled(rng, TYPO_OPERATIONS)
    used: Counter[str] = Counter()
    for word in words:
        for operation in sorted(operations, key=lambda operation: used[operation]):
            options = shuffled(rng, typo_options(word.text, operation, prompt.keyboard, prompt.language))
            after = next((o for o in options if is_clear_typo(word.lower, o.lower(), prompt.language)), None)
            if after is not None:
                used[operation] += 1
                if style in ("two", "three") and used[operation] == count:
                    raise Lacks("no mixture of kinds of typo is possible")
                yield Edit(word.start, word.end, word.written(after), operation, word)
                break
    raise Lacks(f"fewer than {count} {where}s that can take the edit" if count > 1 else f"no {where} that can take it")


def _dose(prompt: Prompt, dose: int) -> list[Edit]:
    """`dose` one-letter edits, the first ones of one sequence a row, so that a higher dose holds every lower one.

    One edit in each content word, then one in each function word, then a second in each word, and so on, up to half of
    a word's letters. Several edits of a word are one `Edit`; its distance in the log counts them.
    """
    rng, words = prompt.rng("typo@"), list(prompt.content)
    if prompt.where == "any":
        small = {word.lower: word for word in reversed(prompt.words) if word.is_small}
        words += shuffled(rng, sorted(small.values(), key=lambda word: word.start))
    made: dict[Word, list[tuple[str, str]]] = {word: [] for word in words}  # operation and result of each edit
    operations = shuffled(rng, TYPO_OPERATIONS)
    left = dose
    for distance in range(1, max((len(word.text) // 2 for word in words), default=0) + 1):
        for word in words:
            # A word that could not take the edit before takes no further one.
            if left == 0 or distance > len(word.text) // 2 or len(made[word]) < distance - 1:
                continue
            form = made[word][-1][1] if made[word] else word.text
            for operation in operations:
                options = shuffled(rng, typo_options(form, operation, prompt.keyboard, prompt.language))
                if typo := next((typo for typo in options if _is_next_typo(word, typo, distance)), None):
                    made[word].append((operation, typo))
                    operations = [*(other for other in operations if other != operation), operation]
                    left -= 1
                    break
    if left:
        raise Lacks(f"fewer than {dose} one-letter edits are possible")
    edited = {word: edits for word, edits in made.items() if edits}
    return [Edit(w.start, w.end, w.written(e[-1][1]), "+".join(kind for kind, _ in e), w) for w, e in edited.items()]


def _is_next_typo(word: Word, typo: str, distance: int) -> bool:
    """Whether `typo` is `distance` edits from the word and no word; the first edit also leaves it the likeliest one."""
    if distance == 1:
        return is_clear_typo(word.lower, typo.lower(), word.language)
    far = osa_distance(word.lower, typo.lower(), limit=distance) == distance
    return far and not is_known(typo, word.language)


def _split(prompt: Prompt, _: str) -> Iterator[Edit]:
    """A soft hyphen before the letter that `main` of the same row and seed replaces."""
    for edit in _typos(prompt, "main"):
        if word := edit.word:
            at = first_difference(word.text, composed(edit.after))
            after = word.written(word.text[:at]) + SOFT_HYPHEN + word.written(word.text[at:])
            yield Edit(edit.start, edit.end, after, "soft_hyphen", word)


def _real_word(prompt: Prompt, style: str) -> Iterator[Edit]:
    rng = prompt.rng(style)
    for word in prompt.content:
        if options := shuffled(rng, real_word_options(word.lower)):
            after = in_case_of(word.text, options[0])
            yield Edit(word.start, word.end, after, operation_of(word.text, after) or "", word)
    raise Lacks("too few content words one letter away from another word")


def _homonym(prompt: Prompt, _: str) -> Iterator[Edit]:
    """Content words first, by importance, then the others; of several homophones the most frequent."""
    others = {word.lower: word for word in reversed(prompt.words)}
    for word in prompt.content:
        others.pop(word.lower, None)
    for word in [*prompt.content, *sorted(others.values(), key=lambda w: (zipf(w.text), w.start))]:
        if choices := [other for other in homophones(word.text) if other not in PROTECTED_WORDS]:
            after = in_case_of(word.text, max(choices, key=lambda h: (zipf(h), h)))
            yield Edit(word.start, word.end, after, "homophone", word)
    raise Lacks("too few words that have a homophone")


# --- grammar, punctuation, tone


def _grammar(prompt: Prompt, style: str) -> Iterator[Edit]:
    return _by_kind(prompt, style, grammar_slips(prompt.text, prompt.words))


def _by_kind(prompt: Prompt, style: str, slips: Iterable[Edit]) -> Iterator[Edit]:
    """One slip a place; the kind is drawn first, so that frequent small words do not crowd out the rest."""
    rng = prompt.rng(style)
    by_kind: dict[str, list[Edit]] = {}
    for slip in slips:
        by_kind.setdefault(slip.operation, []).append(slip)
    chosen: list[Edit] = []
    kinds = shuffled(rng, sorted(by_kind))
    while kinds:
        for kind in list(kinds):
            free = [e for e in by_kind[kind] if all(e.end <= c.start or c.end <= e.start for c in chosen)]
            if free:
                chosen.append(_one_of(rng, free))
                yield chosen[-1]
            else:
                kinds.remove(kind)
    raise Lacks(f"too few places for a slip of {style}")


_NO_COMMA_AFTER = word_set("the a an of to with from at my your our their its every")  # elsewhere it may be right


def _punctuation(prompt: Prompt, style: str) -> Iterator[Edit]:
    """Stray or missing marks and spaces; those that touch protected text stay as they are."""
    text, slips, french = prompt.text, [], prompt.language.code == "fr"
    for word, following in zip(prompt.words, [*prompt.words[1:], None], strict=False):
        end = word.end
        if text[end : end + 1] in tuple(",.;!?") and not text[end + 1 : end + 2].strip():
            mark = text[end]
            for operation, changed in (("stray_mark", mark + mark), ("stray_space", " " + mark), ("missing_mark", "")):
                if not (french and operation == "stray_space" and mark in ";!?"):  # a space belongs there
                    slips.append(Edit(word.start, end + 1, word.written(word.text) + changed, operation, word))
        if following and text[end : following.start] == " ":
            if word.lower in _NO_COMMA_AFTER and prompt.language is ENGLISH:
                slips.append(Edit(word.start, end, word.text + ",", "stray_mark", word))
            both = word.text + following.text
            if zipf(both, prompt.language) < KNOWN_WORD_ZIPF:
                slips.append(Edit(word.start, following.end, word.written(both), "missing_space", word))
    # A mark that is merely gone leaves no token that could be marked as edited: the last resort.
    visible = [slip for slip in slips if slip.operation != "missing_mark"]
    return _by_kind(prompt, style, visible if len(visible) >= prompt.intensity else slips)


def _framing(prompt: Prompt, style: str) -> Iterator[Edit]:
    yield Edit(0, 0, _one_of(prompt.rng(style), FRAMINGS[style]) + " ", "prefix")


_MAKERS: dict[str, Callable[[Prompt, str], Iterator[Edit]]] = {
    **dict.fromkeys(("main", "swap", "missing", "repeated", "two", "three", "noise_words"), _typos),
    **dict.fromkeys(FRAMING_STYLES, _framing),
    "grammar": _grammar,
    "punctuation": _punctuation,
    "homonym": _homonym,
    "split": _split,
    "real_word": _real_word,
}


# --- edit log


def edit_log_path(output_file: Path) -> Path:
    """Where the edit log of a prompt file lies: `<name>_edits.csv` beside it."""
    return output_file.with_name(f"{output_file.stem}_edits.csv")


def log_table(log: list[dict[str, Any]], with_tokens: bool = False) -> pd.DataFrame:
    """The edit log as a table, with all its columns even if no edit was made."""
    return pd.DataFrame(log, columns=[*LOG_COLUMNS, *(TOKEN_COLUMNS if with_tokens else ())])


def _log_lines(
    prompt: Prompt, style: str, variant: str, edits: list[Edit], original_index: int
) -> Iterator[dict[str, Any]]:
    offsets = prompt.token_offsets(variant) if prompt.tokenizer else []
    shift = 0  # how much longer the variant is before the edit
    for number, edit in enumerate(edits, 1):
        before = prompt.text[edit.start : edit.end]
        line = {
            "style": style,
            "original_index": original_index,
            "element_index": prompt.row.get("element_index", original_index + 1),
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
            line["zipf_before"] = zipf(old[0], prompt.language) if len(old) == 1 else None
            line["zipf_after"] = zipf(new[0], prompt.language) if len(new) == 1 else None
            line["real_word"] = all(is_real_word(word, prompt.language) for word in new)
        if prompt.tokenizer:
            start = edit.start + shift
            end = start + len(edit.after.rstrip())  # the space after a tone is not part of it
            line["tokens_before"] = sum(a < edit.end and edit.start < b for a, b in prompt.own_offsets)
            line["tokens_after"] = sum(a < end and start < b for a, b in offsets)
            shift += len(edit.after) - len(before)
        yield line
