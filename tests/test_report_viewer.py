"""The pair viewer's data: tokens aligned, numbers in bytes, rows within the budget, texts that can do no harm."""

import base64
import hashlib
import json
import re

import numpy as np
import pandas as pd
import pytest
import report_viewer
import torch
from report_viewer import (
    SCRIPT,
    Forms,
    Words,
    align,
    columns_of,
    cosine_bytes,
    safe_json,
    share_bytes,
    shorten,
    viewer_of,
)
from run_store import open_run
from synthetic_run import prompt_rows, with_controls, write_run

FEW_SHOT = "Add 1 and 2: 3 "


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """12 rows in two styles, `swap` with a control that lacks row 3, after a few-shot text."""
    rows = with_controls(
        prompt_rows(12, ["swap", "polite"]), "swap", lambda _, word, __: word[:2] + "\u00ad" + word[2:]
    )
    folder = tmp_path_factory.mktemp("viewer") / "run"
    skip = lambda style, index: style == "split@swap" and index == 3  # noqa: E731
    return open_run(write_run(folder, rows, few_shot=FEW_SHOT, skip=skip, raw_layers=(1,)))


def data_of(run, folder, verdicts=None):
    return json.loads(viewer_of([(run, folder, verdicts or {})]).data)


def bytes_in(text, *shape):
    return np.frombuffer(base64.b64decode(text), dtype=np.uint8).reshape(shape).astype(float)


# --- texts and numbers


def test_json_in_the_page_cannot_end_its_element():
    evil = {"</script><img src=x onerror=alert(1)>": ["<!--", "\u2028", "\ud800", "&lt;", "😀"]}
    text = safe_json(evil)
    assert not set("<>&") & set(text)
    assert text.isascii()
    assert json.loads(text) == evil


def test_characters_that_nobody_sees_are_shown_and_long_texts_cut():
    assert shorten("a\u202eb\u00adc\nd\ud800", 40) == "a‧b‧c↵d‧"
    assert shorten("a" * 100_000, 40) == "a" * 40 + " […]"
    assert shorten("שלום 😀", 40) == "שלום 😀"


@pytest.mark.parametrize(("coder", "low", "back"), [
    (share_bytes, 0, lambda byte: (byte / 254) ** 2), (cosine_bytes, -1, lambda byte: byte / 127 - 1),
])  # fmt: skip
def test_bytes_are_as_exact_as_the_page_says(coder, low, back):
    values = np.linspace(low, 1, 1001)
    found = bytes_in(coder(np.append(values, np.nan)), 1002)
    assert np.abs(back(found[:-1]) - values).max() <= 0.004
    assert found[-1] == 255
    small = np.array([1e-4, 1e-3])
    if coder is share_bytes:
        np.testing.assert_allclose(back(bytes_in(coder(small), 2)), small, rtol=0.5)


# --- tokens above each other


def test_tokens_are_aligned_around_what_differs():
    clean, typo, control = [1, 2, 3, 4], [1, 8, 9, 3, 4], [1, 5, 3, 4]
    assert align([clean, typo, control]) == [
        (True, [(0, 1), (0, 1), (0, 1)]),
        (False, [(1, 2), (1, 3), (1, 2)]),
        (True, [(2, 3), (3, 4), (2, 3)]),
        (True, [(3, 4), (4, 5), (3, 4)]),
    ]


def test_a_form_that_is_not_there_takes_no_part():
    assert align([[1, 2], [1, 3], []]) == [(True, [(0, 1), (0, 1), (0, 0)]), (False, [(1, 2), (1, 2), (0, 0)])]
    assert align([[1], [2]]) == [(False, [(0, 1), (0, 1)])]
    assert align([[1, 2], [7, 1, 2, 7]])[0] == (False, [(0, 0), (0, 1)])


def test_columns_hold_every_token_of_every_form_and_fold_the_few_shot_text(run):
    words, forms = Words(None), Forms.of(run, "swap")
    for row in range(12):
        columns, shown = columns_of(forms, row, words)
        gaps = sum(column["gap"] for column in columns if isinstance(column, dict))
        assert gaps == len(re.findall(r"\w+|:", FEW_SHOT))
        assert isinstance(columns[0], dict)
        for form, table in enumerate(forms.tables):
            if row not in table:
                assert (form, row, shown[form]) == (2, 3, [])
                continue
            content, _, position = table.place(row)
            ids = content["input_ids"][position][content["attention_mask"][position]].tolist()
            flat = [token for column in columns if not isinstance(column, dict)
                    for token in (column[form] if isinstance(column, list) else [column])]  # fmt: skip
            assert [words.texts[token] for token in flat] == [f"⟨{token}⟩" for token in ids[gaps:]]
            assert shown[form] == list(range(gaps, len(ids)))
            edited = [token for column in columns if isinstance(column, list) for token in column[form]]
            names = content["regions"]
            inside = content["region_mask"][position, :, names.index(forms.edited[form])]
            assert [words.texts[token] for token in edited] == [
                f"⟨{token}⟩" for token in content["input_ids"][position][inside]
            ]


def test_a_long_prompt_is_shown_around_its_edits(run, monkeypatch):
    monkeypatch.setattr(report_viewer, "NEAR", 1)
    columns, _ = columns_of(Forms.of(run, "swap"), 0, Words(None))
    kinds = "".join("g" if isinstance(column, dict) else "e" if isinstance(column, list) else "." for column in columns)
    assert re.fullmatch(r"g?\.?e\.g\.\.", kinds), kinds


# --- the numbers of a run


def test_masses_are_those_of_the_files_and_missing_rows_have_none(run, tmp_path):
    swap = data_of(run, tmp_path)[0]["styles"][0]
    assert (swap["name"], swap["control"]) == ("swap", "split@swap")
    found = (bytes_in(swap["mass"], 12, 3, 2, 3) / 254) ** 2
    forms = Forms.of(run, "swap")
    for form, (table, region) in enumerate(forms.parts()):
        names = table.first_content()["regions"]
        stored = table.field("span_mass")[:, :, :, names.index("last"), names.index(region)]
        places = [row["row"] in table for row in swap["rows"]]
        np.testing.assert_allclose(found[places, form], stored, atol=0.004)
    assert bytes_in(swap["mass"], 12, 3, 6)[3, 2].tolist() == [255] * 6


def test_raw_maps_colour_every_token(run, tmp_path):
    one = data_of(run, tmp_path)[0]
    assert one["rawLayers"] == [1]
    row = one["styles"][0]["rows"][0]
    content, _, position = run.style_rows("swap").place(0)
    gap = row["columns"][0]["gap"]
    length = int(content["attention_mask"][position].sum()) - gap
    stored = content["attentions"]["layer_1"][position, :, -1, -length:].numpy()
    np.testing.assert_allclose((bytes_in(row["attention"][1][0], 3, length) / 254) ** 2, stored, atol=0.004)
    assert one["styles"][0]["rows"][3]["attention"][2] is None


def test_likeness_is_the_cosine_with_the_clean_state(run, tmp_path):
    swap = data_of(run, tmp_path)[0]["styles"][0]
    found = bytes_in(swap["curves"]["edited"], 12, 3, 3) / 127 - 1
    clean = run.style_rows("normal").states(range(12), "edited:swap")
    own = run.style_rows("swap").states(range(12), "edited")
    centre = np.median(clean, axis=0)
    a, b = clean - centre, own - centre
    cosine = (a * b).sum(-1) / np.sqrt((a**2).sum(-1) * (b**2).sum(-1))
    np.testing.assert_allclose(found[:, 1], cosine, atol=0.005)
    assert (bytes_in(swap["curves"]["edited"], 12, 3, 3)[:, 0] == 255).all()


def test_the_logit_lens_is_read_where_it_was_written(run, tmp_path):
    assert "lens" not in data_of(run, tmp_path)[0]["styles"][0]["curves"]
    lines = [("normal", 0, 0, 0.25, 7), ("normal", 0, 2, 0.5, 8), ("swap", 0, 0, 0.0, 9), ("swap", 0, 2, 1.0, 9)]
    columns = ["style", "original_index", "layer", "clean_top1_probability", "token"]
    pd.DataFrame(lines, columns=columns).to_csv(tmp_path / "logit_lens_items.csv", index=False)
    one = data_of(run, tmp_path)[0]
    swap = one["styles"][0]
    assert bytes_in(swap["curves"]["lens"], 12, 3, 3)[0].tolist() == [[127, 255, 180], [0, 255, 254], [255] * 3]
    texts = [
        [None if token is None else one["tokens"][token] for token in form] for form in swap["rows"][0]["lens"][:2]
    ]
    assert texts == [["⟨7⟩", None, "⟨8⟩"], ["⟨9⟩", None, "⟨9⟩"]]
    assert "lens" not in swap["rows"][1]


def test_what_patching_restores_is_read_row_by_row(tmp_path):
    run = open_run(write_run(tmp_path / "run", prompt_rows(4), layers=3))
    cells = [
        ("resid_pre", "edited", 0, -1),
        ("resid_pre", "edited", 2, -1),
        ("resid_pre", "all", 1, -1),
        ("z", "edited", 1, 0),
    ]
    sites, positions, layers, heads = (list(part) for part in zip(*cells, strict=True))
    nats = torch.tensor([[0.5, 2.0, 9, 9], [0.0, 4.0, 9, 9], [0.0, 0.0, 9, 9]])
    content = {
        "original_indices": [0, 1, 3], "sites": sites, "positions": positions, "layers": torch.tensor(layers),
        "heads": torch.tensor(heads), "cell_directions": ["denoising"] * 4, "donors": ["own"] * 4, "sets": [""] * 4,
        "nats": nats, "recipient_nats": torch.tensor([[2.0] * 4, [1.0] * 4, [1e-6] * 4]),
    }  # fmt: skip
    torch.save(content, run.styles["swap"] / "patches_00000_00016.pt")
    swap = data_of(run, tmp_path)[0]["styles"][0]
    found = bytes_in(swap["curves"]["patched"], 4, 2, 4)
    assert found[:, 0].tolist() == [[255] * 4] * 4  # the clean form is not patched
    assert found[:, 1].tolist() == [[222, 255, 127, 255], [254, 255, 0, 255], [255] * 4, [255] * 4]


def test_turned_answers_and_large_changes_are_kept_within_the_budget(run, tmp_path, monkeypatch):
    verdicts = {(style, row): "right" for style in ("normal", "swap", "polite") for row in range(12)}
    verdicts["swap", 7] = verdicts["normal", 9] = "wrong"
    whole = viewer_of([(run, tmp_path, verdicts)]).data
    monkeypatch.setattr(report_viewer, "BUDGET", len(whole) // 2)
    less = viewer_of([(run, tmp_path, verdicts)]).data
    assert 0.2 * len(whole) < len(less) <= len(whole) // 2
    before, after = (json.loads(text)[0]["styles"][0]["rows"] for text in (whole, less))
    change = {row["row"]: row["kl"] for row in before}
    kept = [row["row"] for row in after]
    assert {7, 9} <= set(kept) < set(range(12))
    others = set(kept) - {7, 9}
    assert min(change[row] for row in others) >= max(change[row] for row in set(range(12)) - set(kept))
    assert f"swap {len(kept)} of 12" in json.loads(less)[0]["note"]


def test_a_run_without_regions_or_styles_has_no_viewer(run, tmp_path):
    alone = open_run(write_run(tmp_path / "alone", prompt_rows(4, []), styles=["normal"]))
    assert viewer_of([(alone, tmp_path, {})]).data is None
    bare = open_run(write_run(tmp_path / "bare", prompt_rows(4), change=lambda row, *_: row.pop("span_mass")))
    assert viewer_of([(bare, tmp_path, {})]).data is None


def test_a_run_without_logits_has_no_next_tokens(tmp_path):
    def change(row, *_):
        for key in ("topk_vals", "topk_indices", "logsumexp"):
            del row[key]

    one = data_of(open_run(write_run(tmp_path / "run", prompt_rows(4), change=change)), tmp_path)[0]
    assert [row["kl"] for row in one["styles"][0]["rows"]] == [None] * 4
    assert "next" not in one["answers"]["swap"]["0"]


# --- the script


def test_the_script_is_short_makes_no_html_and_is_the_one_allowed(run, tmp_path):
    viewer, text = viewer_of([(run, tmp_path, {})]), SCRIPT.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400
    assert max(map(len, text.splitlines())) <= 120
    for word in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval(", "Function(", "import", "fetch"):
        assert word not in text
    assert re.findall(r"https?://\S+", text) == ['http://www.w3.org/2000/svg",']
    assert viewer.script == text
    assert viewer.source == f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
    assert "</script" not in text.lower()


def test_a_model_that_is_not_here_is_said_once(run, tmp_path, capsys):
    data_of(run, tmp_path)
    told = capsys.readouterr().err
    assert told.count("token ids") == 1
    assert "synthetic is not on this machine" in told
