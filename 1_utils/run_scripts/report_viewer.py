"""The pair viewer of the report: one row's clean, typo and control prompt above each other, with what each head did.

`viewer_of` puts the numbers of the runs into the page: 8 bits each, base64, as many rows as fit into BUDGET.
report_viewer.js shows them; report_viewer.html holds the form and its style.
"""

from __future__ import annotations

import base64
import hashlib
import json
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from file_output import read_csv
from gold_words import answer_texts
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from load_model import load_tokenizer
from logger import get_logger
from next_token_change import last_logits, next_token_change
from rapidfuzz.distance import Levenshtein
from run_store import Run, load_pt
from stamps import ROOT, note_read
from style_names import is_again, is_control
from style_rows import StyleRows, control_of, paired_rows, twin_region

SCRIPT, FORM = (Path(__file__).with_suffix(ending) for ending in (".js", ".html"))
MOST_ROWS = 200  # of a style
BUDGET = 1_100_000  # characters of the page for all runs together
MISSING = 255  # a byte that stands for no number
NEAR = 30  # unchanged tokens shown around an edit; few-shot text and the rest of a long prompt are folded
LONGEST_TOKEN, LONGEST_ANSWER = 40, 240  # characters
NEXT_TOKENS = 5
HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # Unicode categories: controls, zero width, marks of direction, line ends
LEAST_NATS = 0.01
CELL = ("sites", "positions", "cell_directions", "donors", "sets", "heads")  # of a patches file
PATCH = ("resid_pre", "edited", "denoising", "own", "", -1)
LENS_FILE = "logit_lens_items.csv"

Column = int | list[list[int]] | dict[str, int]  # a token that all forms share, the tokens of each form, or a gap
Verdicts = dict[tuple[str, int], str]  # (style, row) → right or wrong


@dataclass(frozen=True)
class Viewer:
    """What the page needs: the script, the source that its Content-Security-Policy allows, and the data as JSON.

    `data` is None if no run has a style to show. The script sorts the page's tables, too.
    """

    script: str
    source: str
    data: str | None


def viewer_of(runs: Sequence[tuple[Run, Path, Verdicts]]) -> Viewer:
    """The viewer of (run, its results folder, its verdicts), with as many rows of each style as fit into BUDGET."""
    for part in (SCRIPT, FORM):
        note_read(part)
    script = SCRIPT.read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    known = [(*one, tokenizer_of(one[0])) for one in runs if can_show(one[0])]
    rows, text = MOST_ROWS, ""
    while True:
        every = [run_data(run, results, verdicts, Words(words), rows) for run, results, verdicts, words in known]
        shown = [found for found in every if found]
        text = safe_json(shown)
        if len(text) <= BUDGET or rows == 1:
            break
        rows = max(1, min(rows - 1, int(rows * BUDGET / len(text))))
    return Viewer(script, f"'sha256-{digest}'", text if shown else None)


def safe_json(value: Any) -> str:
    """JSON that may lie inside a <script> element: ASCII, and without the letters that could end or open a tag."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


# --- one run


def can_show(run: Run) -> bool:
    """Whether a run has a clean form and the attention between regions."""
    return run.clean_style is not None and run.style_rows(run.clean_style).has("span_mass")


def run_data(run: Run, results: Path, verdicts: Verdicts, words: Words, most_rows: int) -> dict[str, Any] | None:
    """All that the viewer shows of a run; None if no style of it differs from its clean form."""
    clean = str(run.clean_style)
    lens = lens_of(results, words, run.style_rows(clean).layer_count())
    answers: dict[str, dict[int, Any]] = {}
    styles, counts = [], []
    for name in run.styles:
        if name == clean or is_control(name) or is_again(name):
            continue
        forms = Forms.of(run, name)
        rows = paired_rows(forms.tables[1], forms.tables[0]).changed
        if not rows:
            continue
        kept, change = choose_rows(forms, rows, verdicts, most_rows)
        counts.append(f"{title(name)} {len(kept)} of {len(rows)}")
        styles.append(style_data(forms, kept, rows, change, lens, words))
        for form, table in zip(forms.names, forms.tables, strict=True):
            there = [row for row in kept if row in table and row not in answers.get(title(form), {})]
            answers.setdefault(title(form), {}).update(answers_of(table, there, form, verdicts, words))
    if not styles:
        return None
    first = run.style_rows(clean).first_content()
    layers, _, heads = first["span_mass"].shape[:3]
    note = "Rows stored in this page: " + ", ".join(counts) + "."
    return {
        "name": title(run.name),
        "clean": title(clean),
        "layers": layers,
        "heads": heads,
        "note": note + (" The turned answers come first, then the largest change of the next token (KL, nats)."),
        "rawLayers": raw_layers(first),
        "answers": answers,
        "styles": styles,
        "tokens": words.texts,
    }


@dataclass(frozen=True)
class Forms:
    """The clean form, a style and its control if it has one: their names, their rows and their edited region."""

    names: list[str]
    tables: list[StyleRows]
    edited: list[str]

    @staticmethod
    def of(run: Run, style: str) -> Forms:
        """The forms of a style of the run."""
        control = control_of(run, style)
        names = [str(run.clean_style), style, *([control] if control else [])]
        return Forms(
            names, [run.style_rows(name) for name in names], [twin_region("edited", style), "edited", "edited"]
        )

    def parts(self) -> list[tuple[StyleRows, str]]:
        """(rows, edited region) of each form."""
        return list(zip(self.tables, self.edited, strict=False))


def choose_rows(forms: Forms, rows: list[int], verdicts: Verdicts, most: int) -> tuple[list[int], dict[int, float]]:
    """(at most `most` of the rows, in order; next-token KL of each): turned answers first, then the largest KL."""
    clean, own = forms.tables[:2]
    kl = np.zeros(len(rows))
    known = clean.has("topk_vals") and own.has("topk_vals")
    if known:
        kl = next_token_change(*(table.extract(last_logits, rows) for table in (clean, own)))["next_token_kl"]
    change = dict(zip(rows, kl.tolist(), strict=True))
    judged = {row: [verdicts.get((name, row)) for name in forms.names[:2]] for row in rows}
    turned = {row for row, (before, after) in judged.items() if before and after and before != after}
    kept = sorted(rows, key=lambda row: (row not in turned, -change[row]))[:most]
    return sorted(kept), change if known else {}


def style_data(
    forms: Forms, kept: list[int], rows: list[int], change: dict[int, float], lens: Lens, words: Words
) -> dict[str, Any]:
    """The kept rows of one style; `rows` are all its rows, over which states are centred."""
    listed = []
    for row in kept:
        columns, shown = columns_of(forms, row, words)
        one: dict[str, Any] = {
            "row": row,
            "element": title(str(forms.tables[1].texts([row], "element_index")[0])),
            "gold": shorten((answer_texts(forms.tables[0].run.row(row).get("answer")) or [""])[0], LONGEST_ANSWER),
            "kl": round(change[row], 4) if row in change else None,
            "columns": columns,
        }
        attention = [raw_attention(table, row, at) for table, at in zip(forms.tables, shown, strict=True)]
        if any(attention):
            one["attention"] = attention
        tokens = [lens.tokens.get((name, row)) for name in forms.names]
        if any(tokens):
            one["lens"] = tokens
        listed.append(one)
    return {
        "name": title(forms.names[1]),
        "control": title(forms.names[2]) if len(forms.names) > 2 else None,
        "rows": listed,
        "mass": share_bytes(stacked(mass_to_edited, forms, kept)),
        "curves": curves_of(forms, kept, rows, lens),
    }


# --- numbers of heads and layers, as bytes


def share_bytes(values: np.ndarray) -> str:
    """Shares between 0 and 1 as base64 of the bytes 254 · √share: exact to 0.004, and finer near 0. NaN is MISSING."""
    return _packed(254 * np.sqrt(np.clip(values, 0, 1)))


def cosine_bytes(values: np.ndarray) -> str:
    """Cosines as base64 of the bytes 127 · (cosine + 1): exact to 0.004. NaN is MISSING."""
    return _packed(127 * (np.clip(values, -1, 1) + 1))


def _packed(values: np.ndarray) -> str:
    return base64.b64encode(np.where(np.isfinite(values), np.rint(values), MISSING).astype(np.uint8).tobytes()).decode()


def stacked(read: Callable[[StyleRows, str, list[int]], np.ndarray], forms: Forms, rows: list[int]) -> np.ndarray:
    """`read(table, edited region, rows)` of each form: [n, forms, ...]; NaN in the rows that a form lacks."""
    parts = []
    for table, region in forms.parts():
        there = [place for place, row in enumerate(rows) if row in table]
        part = read(table, region, [rows[place] for place in there])
        whole = np.full((len(rows), *part.shape[1:]), np.nan, dtype=np.float32)
        whole[there] = part
        parts.append(whole)
    return np.stack(parts, axis=1)


def mass_to_edited(table: StyleRows, region: str, rows: list[int]) -> np.ndarray:
    """[n, L, H] attention from the last token to the edited words (float16 in the .pt file); NaN if there are none."""

    def read(content: dict[str, Any], path: Path) -> dict[str, np.ndarray]:
        names, mass = content["regions"], content["span_mass"]
        if region not in names:
            return {"mass": np.full((mass.shape[1], mass.shape[0], mass.shape[2]), np.nan, dtype=np.float32)}
        found = mass[:, :, :, names.index("last"), names.index(region)].float().movedim(1, 0).numpy()
        empty = ~content["region_mask"][:, :, names.index(region)].any(1).numpy()
        return {"mass": np.where(empty[:, None, None], np.nan, found)}

    return table.extract(read, rows)["mass"]


def curves_of(forms: Forms, kept: list[int], rows: list[int], lens: Lens) -> dict[str, str]:
    """Curves by layer [kept, forms, L + 1]: likeness of the edited words and the last token, the logit lens."""
    found = {}
    for name, regions in (("edited", forms.edited), ("last", ["last"] * 3)):
        parts = list(zip(forms.tables, regions, strict=False))
        if all(region in table.state_regions() for table, region in parts[:2]):
            found[name] = cosine_bytes(likeness(parts, kept, rows))
    patched = {(forms.names[1], row): shares for row, shares in restored(forms.tables[1]).items()}
    for name, known, coded in (("patched", patched, cosine_bytes), ("lens", lens.probabilities, share_bytes)):
        missing = [np.nan] * forms.tables[0].layer_count()
        curve = np.array([[known.get((form, row), missing) for form in forms.names] for row in kept])
        if np.isfinite(curve).any():
            found[name] = coded(curve)
    return found


def likeness(parts: list[tuple[StyleRows, str]], kept: list[int], rows: list[int]) -> np.ndarray:
    """[kept, forms, L + 1] cosine of each form's states with the clean form's, the clean form's median taken off.

    NaN of the clean form itself, of a form without the row or the region, and with fewer than two `rows`.
    """
    clean = parts[0][0].states(kept, parts[0][1])
    centre = np.median(parts[0][0].states(rows[:MOST_ROWS], parts[0][1]), axis=0) if len(rows) > 1 else np.nan
    whole = np.full((len(kept), len(parts), clean.shape[1]), np.nan, dtype=np.float32)
    for form, (table, region) in enumerate(parts[1:], start=1):
        there = [place for place, row in enumerate(kept) if row in table and region in table.state_regions()]
        if not there:
            continue
        a, b = clean[there] - centre, table.states([kept[place] for place in there], region) - centre
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            whole[there, form] = (a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))
    return whole


def restored(table: StyleRows) -> dict[int, list[float]]:
    """{row: [L + 1] share of its nats restored, if the control's states at the edited words are put into one layer}.

    From the patches of patch_activations.py (METHODS.md); NaN of a layer without one. Rows with next to no nats are
    left out.
    """
    found: dict[int, np.ndarray] = {}
    for path in sorted(table.run.styles[table.style].glob("patches_[0-9]*.pt")):
        content = load_pt(path)
        cells = zip(*(content[key] for key in CELL), strict=True)
        places = [place for place, cell in enumerate(cells) if cell == PATCH]
        before, after = (content[key][:, places].float().numpy() for key in ("recipient_nats", "nats"))
        for row, nats, left in zip(content["original_indices"], before, after, strict=True):
            if len(nats) and nats.max() > LEAST_NATS:
                shares = found.setdefault(row, np.full(table.layer_count(), np.nan))
                shares[content["layers"][places].numpy()] = 1 - left / nats
    return {row: shares.tolist() for row, shares in found.items()}


def raw_layers(content: dict[str, Any]) -> list[int]:
    """Layers whose attention maps the files hold."""
    return sorted(int(name.removeprefix("layer_")) for name in content.get("attentions", {}))


def raw_attention(table: StyleRows, row: int, places: list[int]) -> list[str] | None:
    """For each raw layer: attention [H, places] of the last token to the tokens at `places`. None without a map."""
    if row not in table:
        return None
    content, _, position = table.place(row)
    layers = raw_layers(content)
    if not layers or not places:
        return None
    first = int(content["attention_mask"][position].int().argmax())
    at = [first + place for place in places]
    maps = [content["attentions"][f"layer_{layer}"][position, :, -1, at].float().numpy() for layer in layers]
    return [share_bytes(one) for one in maps]


# --- the prompts as columns of tokens


def columns_of(forms: Forms, row: int, words: Words) -> tuple[list[Column], list[list[int]]]:
    """(columns of tokens of one row; the places of each form's shown tokens in its own prompt).

    Unchanged tokens that are far from every edit, or are context, are folded into gaps.
    """
    ids, edited, context = zip(*(tokens_of(table, row, region) for table, region in forms.parts()), strict=True)
    # An edited token equals no other, so that an edited word is one column even if some of its tokens are kept.
    keys = [
        [-10 - form - 3 * place if edit else token for place, (token, edit) in enumerate(zip(own, marks, strict=True))]
        for form, (own, marks) in enumerate(zip(ids, edited, strict=True))
    ]
    aligned = align(keys)
    edits = np.array([place for place, (shared, _) in enumerate(aligned) if not shared] or [len(aligned)])
    columns: list[Column] = []
    shown: list[list[int]] = [[] for _ in ids]
    for place, (shared, spans) in enumerate(aligned):
        far = shared and (np.abs(edits - place).min() > NEAR or context[0][spans[0][0]])
        if far and place < len(aligned) - 2:
            before = columns[-1]["gap"] if columns and isinstance(columns[-1], dict) else 0
            columns[len(columns) - (before > 0) :] = [{"gap": before + 1}]
            continue
        pieces = [own[start:end] for own, (start, end) in zip(ids, spans, strict=True)]
        columns.append(words.number(pieces[0][0]) if shared else [[*map(words.number, piece)] for piece in pieces])
        for places, span in zip(shown, spans, strict=True):
            places += range(*span)
    return columns, shown


def tokens_of(table: StyleRows, row: int, region: str) -> tuple[list[int], list[bool], list[bool]]:
    """(ids of a row's tokens, which lie in `region`, which are context); empty if the form lacks the row."""
    if row not in table:
        return [], [], []
    content, _, position = table.place(row)
    real = content["attention_mask"][position].bool()
    names, inside = content["regions"], content["region_mask"][position][real]
    none = [False] * len(inside)
    masks = (inside[:, names.index(name)].tolist() if name in names else none for name in (region, "context"))
    return (content["input_ids"][position][real].tolist(), *masks)


def align(forms: list[list[int]]) -> list[tuple[bool, list[tuple[int, int]]]]:
    """Columns (is it one token that all forms share?, its (start, end) in each form); the others are what lies between.

    A form without tokens is not there, and takes no part.
    """
    clean, matches = forms[0], []
    for form in forms:
        blocks = Levenshtein.editops(clean, form).as_matching_blocks()
        matches.append({block.a + k: block.b + k for block in blocks for k in range(block.size)})
    present = [found for found, form in zip(matches, forms, strict=True) if form]
    shared = [place for place in range(len(clean)) if all(place in found for found in present)]
    columns, starts = [], [0] * len(forms)
    for place in [*shared, len(clean)]:
        ends = [found.get(place, len(form)) for found, form in zip(matches, forms, strict=True)]
        if starts != ends:
            columns.append((False, list(zip(starts, ends, strict=True))))
        if place < len(clean):
            starts = [end + bool(form) for end, form in zip(ends, forms, strict=True)]
            columns.append((True, list(zip(ends, starts, strict=True))))
    return columns


class Words:
    """Token ids as texts (`⟨5⟩` without a tokenizer): a number for each text, so that the page holds it once."""

    def __init__(self, tokenizer: Any) -> None:
        self.texts: list[str] = []
        self._numbers: dict[int, int] = {}
        self._tokenizer = tokenizer

    def number(self, token: int) -> int:
        """Place of the token's text in `texts`."""
        if token not in self._numbers:
            self._numbers[token] = len(self.texts)
            self.texts.append(shorten(self._text(token), LONGEST_TOKEN))
        return self._numbers[token]

    def _text(self, token: int) -> str:
        if self._tokenizer is None:
            return f"⟨{token}⟩"
        text = str(self._tokenizer.decode([token]))
        piece = str(self._tokenizer.convert_ids_to_tokens(token))
        return f" {text}" if piece.startswith("▁") and not text.startswith(" ") else text


def tokenizer_of(run: Run) -> Any:
    """The tokenizer of the model that made a run; None, with a warning, if it is not on this machine."""
    settings = run.settings(str(run.clean_style)).get("settings", {})
    name, revision = str(settings.get("model_name") or "unknown"), settings.get("revision")
    here = next(
        (folder for folder in (Path(name), ROOT / "models" / name) if (folder / "tokenizer.json").is_file()), None
    )
    try:  # a report is written without a network
        cached = isinstance(try_to_load_from_cache(name, "tokenizer.json", revision=revision), str)
    except HFValidationError:  # the name of a local folder, which no model on the hub can have
        cached = False
    if here is None and not cached:
        get_logger().warning(
            f"{run.path}: its model {name} is not on this machine, so the pair viewer shows token ids; put it into "
            f"{ROOT / 'models' / name}"
        )
        return None
    return load_tokenizer(str(here or name), None if here else revision)


def shorten(text: str, most: int) -> str:
    """The text on one line, cut after `most` characters; controls and marks of direction are shown as a dot."""
    cut = text[:most] + " […]" if len(text) > most else text
    cut = cut.replace("\n", "↵")
    return "".join("‧" if unicodedata.category(letter) in HIDDEN else letter for letter in cut)


def title(name: str) -> str:
    """A name of a run, a style or a row as the page shows it."""
    return shorten(name, LONGEST_TOKEN)


# --- answers, next tokens and the logit lens


def answers_of(table: StyleRows, rows: list[int], form: str, verdicts: Verdicts, words: Words) -> dict[int, Any]:
    """{row: its answer, its verdict, its likeliest next tokens with their probabilities} of one form."""
    found: dict[int, Any] = {}
    for row, response in zip(rows, table.texts(rows, "responses"), strict=True):
        found[row] = {
            "answer": shorten(str(response or "").strip(), LONGEST_ANSWER),
            "verdict": verdicts.get((form, row), ""),
        }
    if rows and table.has("topk_vals"):
        last = table.extract(last_logits, rows)
        chances = np.exp(last["topk_vals"].astype(np.float64) - last["logsumexp"][:, None])
        for place, row in enumerate(rows):
            best = zip(last["topk_indices"][place, :NEXT_TOKENS], chances[place, :NEXT_TOKENS], strict=True)
            found[row]["next"] = [[words.number(int(token)), round(float(chance), 4)] for token, chance in best]
    return found


@dataclass(frozen=True)
class Lens:
    """The logit lens by (form, row), per layer: probability of the clean run's first token, and likeliest token."""

    probabilities: dict[tuple[str, int], list[float]]
    tokens: dict[tuple[str, int], list[int | None]]


def lens_of(results: Path, words: Words, layers: int) -> Lens:
    """What activation_diffs.py wrote into LENS_FILE, of `layers` layers; empty if it is not there."""
    path = results / LENS_FILE
    note_read(path)
    lens = Lens({}, {})
    if path.is_file():
        columns = ["style", "original_index", "layer", "clean_top1_probability", "token"]
        for (style, row), part in read_csv(path, columns).groupby(["style", "original_index"], sort=False):
            part = part.set_index("layer").reindex(range(layers))
            tokens = [None if np.isnan(token) else words.number(int(token)) for token in part["token"]]
            lens.tokens[str(style), int(row)] = tokens
            lens.probabilities[str(style), int(row)] = part["clean_top1_probability"].tolist()
    return lens
