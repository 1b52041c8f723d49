"""Word recovery by readout: which word and token are asked for, and a meant word that comes back at a planted layer."""

from __future__ import annotations

import activation_diffs
import numpy as np
import pandas as pd
import pytest
import tiny_models
import torch
from attention import activations, layer_curves
from attention.logit_lens import LogitLens, find_final_norm
from attention.word_recovery import CLEAN, CONTROL, TYPO, edited_words, meant_token
from file_output import read_csv
from paired_stats import clustered_mean
from run_store import open_run
from scipy.special import log_softmax
from style_rows import StyleRows
from synthetic_run import VOCABULARY, prompt_rows, with_controls, write_run

LAYERS, HIDDEN, RECOVERED = 4, 128, 3  # layers, hidden size, first state in which the typo is read as the word


def cut(_index, word, _typo):
    """Cut into as many pieces of up to three letters as before; a word of six letters can only be cut as it is."""
    place = next(i for i in (1, 2, 3) if -(-i // 3) + -(-(len(word) - i) // 3) == -(-len(word) // 3))
    return word[:place] + "\u00ad" + word[place:]


def last_word(run, style, index, region):
    """(ids up to the end of the last run of a region, ids of that run), read without the code under test."""
    for path in sorted((run / style).glob("*.pt")):
        content = torch.load(path, weights_only=True)
        if index in content["original_indices"]:
            place = content["original_indices"].index(index)
            inside = content["region_mask"][place, :, content["regions"].index(region)].tolist()
            ids, real = content["input_ids"][place].tolist(), content["attention_mask"][place].tolist()
            end = max(i for i, one in enumerate(inside) if one) + 1
            start = max(i for i in range(end) if not inside[i]) + 1
            return ids[real.index(True) : end], ids[start:end]
    raise LookupError(style, index)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    rows = prompt_rows(48, ["swap"], templates=24)
    rows[3]["swap"] = rows[3]["normal"]  # nothing is edited
    folder = tmp_path_factory.mktemp("words") / "run"
    return write_run(folder, with_controls(rows, "swap", cut), layers=LAYERS, hidden=HIDDEN, raw_layers=())


class PlantedLens(LogitLens):
    """Its model reads the typo as the word from layer RECOVERED on, the control from layer 1, the word itself always.

    A state is the embedding of one token, of another one before; the head is its transpose.
    """

    layer_count = LAYERS
    tokenizer = None

    def __init__(self, words):
        self.table, self.words = torch.eye(VOCABULARY, HIDDEN) * 8, words

    def check(self, *_):
        pass

    def check_size(self, *_):
        pass

    def change(self, clean, *_):
        names = *activations.LENS_MEASURES, "lens_token", "lens_token_clean"
        return dict.fromkeys(names, np.zeros(clean.shape[:2]))

    def readouts(self, prompts, tokens):
        found = []
        for ids, token in zip(prompts, tokens, strict=True):
            form, meant = self.words[tuple(ids)]
            first = {TYPO: RECOVERED, CONTROL: 1, CLEAN: 0}[form]
            logits = self.table[[meant if layer >= first else ids[-1] for layer in range(LAYERS + 1)]] @ self.table.T
            found.append(((logits > logits[:, token, None]).sum(-1) + 1, logits.log_softmax(-1)[:, token]))
        return tuple(torch.stack(part).double().numpy() for part in zip(*found, strict=True))


def test_a_planted_recovery_comes_back_at_its_layer(run, tmp_path, monkeypatch):
    # 1. The words, read from the files by other code.
    words, kept = {}, []
    for row in [*range(3), *range(4, 48)]:
        of = {
            TYPO: last_word(run, "swap", row, "edited"),
            CONTROL: last_word(run, "split@swap", row, "edited"),
            CLEAN: last_word(run, "normal", row, "edited:swap"),
        }
        meant = of[CLEAN][1][0]
        words |= {tuple(ids): (form, meant) for form, (ids, _) in of.items()}
        if meant not in of[TYPO][1] + of[CONTROL][1]:
            kept.append(row)
    assert 5 < len(kept) < 40  # some words begin alike in both forms
    monkeypatch.setattr(activations, "open_lens", lambda *_: PlantedLens(words))
    drawn = []
    monkeypatch.setattr(layer_curves, "plot_words", lambda table, path: drawn.append((len(table), path.name)))
    monkeypatch.setattr(layer_curves, "save_diffs", lambda *_: None)
    command = ["--run_dir", str(run), "--results_dir", str(tmp_path), "--model_name", "planted"]
    assert activation_diffs.main(command) == 0

    # 2. The curves.
    table = read_csv(tmp_path / "word_recovery.csv").set_index("layer")
    assert drawn == [(LAYERS + 1, "word_recovery.png")]
    assert set(table["style"]) == {"swap"}
    assert set(table["control"]) == {"split@swap"}
    assert set(table["n"]) == {len(kept)}
    assert set(table["n_left_out"]) == {48 - len(kept)}
    assert (table["rank_median"] == 1).tolist() == [False] * RECOVERED + [True] * (LAYERS + 1 - RECOVERED)
    assert (table["control_rank_median"] == 1).tolist() == [False] + [True] * LAYERS
    assert (table["clean_rank_median"] == 1).all()
    said, other = log_softmax(np.r_[64.0, np.zeros(VOCABULARY - 1)])[:2]
    expected = np.where(np.arange(LAYERS + 1) >= RECOVERED, said, other)
    assert table["logprob"].tolist() == pytest.approx(expected.tolist(), abs=1e-4)
    assert table["difference_to_control"].tolist() == pytest.approx([0, -64, -64, 0, 0], abs=1e-4)

    # 3. Attention from the edited to the edited tokens, from the files.
    mass = {}
    for style in ("swap", "split@swap"):
        for path in sorted((run / style).glob("*.pt")):
            content = torch.load(path, weights_only=True)
            place = content["regions"].index("edited")
            values = content["span_mass"][:, :, :, place, place].double().mean(2)
            mass |= {(style, row): values[:, i].numpy() for i, row in enumerate(content["original_indices"])}
    change = np.stack([mass["swap", row] - mass["split@swap", row] for row in kept])
    expected = clustered_mean(change, [row % 24 for row in kept])
    assert table["edited_attention_difference"].tolist()[:-1] == pytest.approx(expected.mean.tolist(), rel=1e-4)
    assert table["edited_attention_p"].tolist()[:-1] == pytest.approx(expected.p.tolist(), rel=1e-4)
    assert np.isnan(table["edited_attention_difference"].iloc[-1])


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "gpt_neox", "mistral"])
def test_the_readout_is_that_of_a_whole_pass_at_every_layer(family):
    model = tiny_models.model(family)
    lens, prompts = LogitLens(find_final_norm(model), model), [[5, 9, 20, 31, 17], [5, 9, 20, 8], [5, 9, 20, 31, 6, 40]]
    tokens = [30, 4, 17]
    ranks, logprobs = lens.readouts(prompts, tokens)
    for ids, token, rank, logprob in zip(prompts, tokens, ranks, logprobs, strict=True):
        with torch.no_grad():
            out = model(torch.tensor([ids]), output_hidden_states=True)
        logits = torch.cat([lens.logits(state[0, -1:], normed=False) for state in out.hidden_states[:-1]])
        logits = torch.cat([logits, out.logits[0, -1:]]).double()
        assert rank.tolist() == [row.argsort(descending=True).tolist().index(token) + 1 for row in logits]
        assert logprob == pytest.approx(logits.log_softmax(-1)[:, token].numpy(), abs=1e-4)


def test_words_that_touch_or_have_no_twin_are_not_asked_for(tmp_path):
    clean = "Count the apples and the candles carefully number 1: 2 + 3 ="
    rows = [
        {"normal": clean, "swap": clean.replace("apples", "appels").replace("candles", "canldes")},  # the last counts
        {"normal": clean, "swap": clean.replace("apples and", "appels adn")},  # they touch
        {"normal": clean, "swap": clean.replace("apples", "red apples")},  # a word more
        {"normal": clean, "swap": clean.replace("Count", "Conut")},  # the first token
    ]
    run = open_run(write_run(tmp_path / "run", rows, raw_layers=()))
    forms = {TYPO: StyleRows(run, "swap"), CLEAN: StyleRows(run, "normal")}
    found = [edited_words(forms, "swap", row) for row in range(4)]
    assert [one is not None for one in found] == [True, False, False, False]
    assert edited_words(forms, "swap", 3, without_first=False) is not None
    expected = last_word(run.path, "normal", 0, "edited:swap")
    assert (found[0][CLEAN].prompt, found[0][CLEAN].tokens) == expected
    assert len(found[0][TYPO].edited) > len(found[0][TYPO].tokens)


def test_a_token_of_white_space_alone_is_not_the_meant_one():
    from attention.word_recovery import Word

    class Lens:
        class tokenizer:
            @staticmethod
            def decode(ids):
                return {7: " ", 8: " appl", 9: "es"}[ids[0]]

    assert meant_token(Lens(), Word([1, 7, 8, 9], 1, {7, 8, 9})) == 8


@pytest.mark.parametrize("with_control", [True, False])
def test_the_picture_has_at_most_three_lines(tmp_path, monkeypatch, with_control):
    import matplotlib.pyplot as plt

    counted = []
    monkeypatch.setattr(layer_curves, "save_figure", lambda path, figure: counted.append(figure))
    layers, curve = np.arange(5), np.linspace(-9, -1, 5)
    table = pd.DataFrame({"style": "swap", "layer": layers, "n": 12})
    for form in layer_curves.WORD_LINES:
        for end, shift in (("", 0), ("_ci_low", -1), ("_ci_high", 1)):
            table[f"{form}logprob{end}"] = curve + shift if with_control or form != "control_" else np.nan
    layer_curves.plot_words(table, tmp_path / "words.png")
    assert len(counted[0].axes[0].lines) == 2 + with_control
    plt.close(counted[0])
