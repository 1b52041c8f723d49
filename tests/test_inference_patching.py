"""Activation patching: each patched logit against plain hooks on one whole forward pass, and what must hold exactly."""

from __future__ import annotations

import itertools
import json
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial

import attn_act_logi
import patch_activations
import pytest
import tiny_models
import torch
from capture import patch_job, patching
from capture.batching import attention_layers
from capture.patch_job import groups_of
from capture.patch_measures import MEASURES, measures, prove
from capture.patch_screen import attribution, ranked
from capture.patching import SITES, Pair, Patch, Patcher, States
from command_line import UserError
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

FAMILIES = ("llama", "gemma2", "gemma3_text", "qwen3", "gpt2", "gpt_neox", "mistral", "phi3", "mixtral")
RECIPIENT = [9, 30, 41, 52, 63, 74, 85, 96, 107, 118, 129, 140]
DONOR = [9, 30, 41, 52, 163, 174, 85, 96, 207, 118, 129, 140]
RESPONSE = [55, 66, 77]
GROUPS = {
    "edited": [4, 5, 8],
    "edited_last": [8],  # of the last word alone
    "after": [6, 7, 9, 10],
    "readout": [11],
    "before": [2, 3],
    "all": list(range(12)),
}
PAIR = Pair(7, DONOR, RECIPIENT, RESPONSE, GROUPS, answers=[[55, 66], [55, 99, 12], [31, 32]])


def tiny(family, dtype=torch.float32):
    changes = {"sliding_window": 8} if family == "gemma3_text" else {}
    return tiny_models.model(family, **changes).to(dtype)


def sites_of(family):
    return [site for site in SITES if (family, site) != ("mixtral", "mlp_post")]


# --- the plain, slow way: one prompt at a time, no cache, transformers' own eager attention


class Plain:
    """Hooks on a full forward of a single prompt; `patches` are (site, layer, positions, units, states of a donor)."""

    O_PROJECTIONS = ("o_proj", "c_proj", "dense")

    def __init__(self, model):
        self.model = model
        backbone = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
        self.layers = next(one for one in backbone.children() if isinstance(one, torch.nn.ModuleList))

    def attention(self, module, query, key, value, mask, **kwargs):
        kwargs.pop("output_attentions", None)
        eager = sys.modules[type(module).__module__].eager_attention_forward
        value = self.see("v", module.layer_idx, value.transpose(1, 2)).transpose(1, 2)
        _, probs = eager(module, query, key, value, mask, **kwargs)
        probs = self.see("pattern", module.layer_idx, probs.transpose(1, 2)).transpose(1, 2)
        wide = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
        return self.see("z", module.layer_idx, (probs @ wide).transpose(1, 2)).contiguous(), None

    def see(self, site, layer, state):
        self.states[site, layer] = state[0].clone()
        for patch_site, patch_layer, positions, units, donor in self.patches:
            if (patch_site, patch_layer) == (site, layer):
                state = state.clone()
                for position, unit in itertools.product(positions, units if units is not None else [slice(None)]):
                    state[0, position, unit] = donor[site, layer][position, unit]
        return state

    @torch.no_grad()
    def __call__(self, ids, patches=()):
        self.states, self.patches, handles = {}, patches, []
        AttentionInterface.register("plain_reference", self.attention)
        AttentionMaskInterface.register("plain_reference", ALL_MASK_ATTENTION_FUNCTIONS["eager"])
        before = self.model.config._attn_implementation
        self.model.set_attn_implementation("plain_reference")

        def first(output):
            return output[0] if isinstance(output, tuple) else output

        for i, layer in enumerate(self.layers):
            attn = next(one for name, one in layer.named_children() if name in ("self_attn", "attn", "attention"))
            down = {"mlp.down_proj", "mlp.c_proj", "mlp.dense_4h_to_h"}
            neurons = [one for name, one in layer.named_modules() if name in down]

            def on_input(module, args, kwargs, i=i):
                if args:
                    return (self.see("resid_pre", i, args[0]), *args[1:]), kwargs
                return args, kwargs | {"hidden_states": self.see("resid_pre", i, kwargs["hidden_states"])}

            def on_output(module, args, output, i=i, site=""):
                state = self.see(site, i, first(output))
                return (state, *output[1:]) if isinstance(output, tuple) else state

            handles.append(layer.register_forward_pre_hook(on_input, with_kwargs=True))
            handles.append(attn.register_forward_hook(lambda *a, i=i, f=on_output: f(*a, i=i, site="attn_out")))
            handles.append(layer.mlp.register_forward_hook(lambda *a, i=i, f=on_output: f(*a, i=i, site="mlp_out")))
            handles += [
                one.register_forward_pre_hook(lambda m, a, i=i: self.see("mlp_post", i, a[0])) for one in neurons
            ]
        try:
            return self.model(torch.tensor([ids]), use_cache=False).logits[0].float()
        finally:
            for handle in handles:
                handle.remove()
            self.model.set_attn_implementation(before)


def plain_logits(model, pair, row, tail):
    """Logits [tokens, V] of the patched recipient at what it is forced to write."""
    plain = Plain(model)
    plain(pair.donor + tail[:-1])
    donor, patches = plain.states, []
    for patch in row:
        positions = list(pair.groups[patch.positions])
        if patch.positions in ("readout", "all"):
            positions += range(len(pair.recipient), len(pair.recipient) + len(tail) - 1)
        patches.append((patch.site, patch.layer, positions, patch.units, donor))
    return plain(pair.recipient + tail[:-1], patches)[len(pair.recipient) - 1 :]


def patched(patcher, pair, rows, batch_size=32, start=None):
    """(logits [2 + rows, T, V], answers [2 + rows, A]); the pair is that of the first batch."""
    parts = list(patcher.run(pair, rows, batch_size, start))
    order = torch.tensor([k for where, _, _ in parts for k in where]).argsort()
    return tuple(torch.cat([parts[0][i][:2], torch.cat([part[i][2:] for part in parts])[order]]) for i in (1, 2))


def rows_for(family):
    groups = itertools.cycle(("edited", "readout", "all", "after"))
    rows = [(Patch(site, layer, next(groups)),) for layer in (0, 1, 2) for site in sites_of(family)]
    rows += [(Patch(site, 1, "all", (1,)),) for site in sites_of(family) if site in ("z", "pattern", "v", "mlp_post")]
    rows.append((Patch("resid_pre", 1, "edited"), Patch("z", 2, "after", (0, 1)), Patch("v", 2, "before")))
    return sorted(rows, key=lambda row: row[0].layer)


@pytest.fixture
def patchers():
    made = []

    def make(model, **options):
        made.append(Patcher(model, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_each_patched_logit_is_that_of_plain_hooks_on_one_whole_forward(family, patchers):
    """In batches of seven, behind a prefix read once, with layers passed over; answers by branches of their own."""
    model, rows = tiny(family), rows_for(family)
    expected = torch.stack([plain_logits(model, PAIR, row, RESPONSE) for row in rows])
    told = torch.tensor([[float(logprob(model, rows[-1], answer)) for answer in PAIR.answers]])
    logits, answers = patched(patchers(model), PAIR, rows, batch_size=7)
    torch.testing.assert_close(logits[2:], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(answers[-1:], told, rtol=1e-4, atol=1e-4)
    assert ((logits[2:] - logits[1]).abs().amax((1, 2)) > 1e-3).float().mean() > 0.8


def logprob(model, row, answer):
    return plain_logits(model, PAIR, row, answer).log_softmax(-1)[range(len(answer)), answer].sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_must_hold_holds_bit_by_bit(family, dtype, patchers):
    sites, groups = sites_of(family), ("edited", "after", "readout")
    same = [(Patch(site, layer, "all", donor="recipient"),) for site in sites for layer in (0, 1, 2)]
    same += [(Patch("resid_pre", 0, name),) for name in ("after", "readout")]
    same += [(Patch(site, 1, "before"),) for site in sites]  # tokens that both prompts begin with
    donor = [(Patch("resid_pre", layer, "all"),) for layer in (0, 1, 2)] + [(Patch("resid_pre", 0, "edited"),)]
    donor.append(tuple(Patch("resid_pre", 2, name) for name in groups))
    donor.append(tuple(Patch(site, layer, "all") for site in ("pattern", "v") for layer in (0, 1, 2)))
    moved = [(Patch(site, layer, "all", donor="random"),) for site in sites for layer in (0, 1, 2)]
    logits, _ = patched(patchers(tiny(family, dtype)), PAIR, same + donor + moved, 64, start=2)
    rows = logits[2:].split([len(same), len(donor), len(moved)])
    assert torch.equal(rows[0], logits[1].expand_as(rows[0]))
    assert torch.equal(rows[1], logits[0].expand_as(rows[1]))
    assert bool(((rows[2] - logits[1]).abs().amax((1, 2)) > 0).all()), "a patch that does nothing"
    assert not torch.equal(logits[0], logits[1])


def test_order_batch_size_prefix_and_skipped_layers_change_nothing_but_rounding(patchers):
    patcher, rows = patchers(tiny("llama")), rows_for("llama")
    one, _ = patched(patcher, PAIR, rows, 50, start=0)
    two, _ = patched(patcher, PAIR, rows[::-1], 3)
    torch.testing.assert_close(one[2:], two[2:].flip(0), rtol=1e-4, atol=1e-4)


def test_a_head_that_alone_carries_the_edit_to_the_answer_is_found(patchers):
    """Only head 2 of layer 1 writes into the residual stream: before it the edited tokens decide, then the readout."""
    model = tiny("llama", torch.float64)
    with torch.no_grad():
        for i, layer in enumerate(model.model.layers):
            kept = torch.zeros(32, dtype=torch.bool)
            kept[16:24] = i == 1
            layer.self_attn.o_proj.weight[:, ~kept] = 0
            layer.self_attn.o_proj.weight *= 4
    patcher = patchers(model)
    cells = {(name, layer): Patch("resid_pre", layer, name) for name in ("edited", "readout") for layer in (0, 1, 2)}
    cells |= {("z", layer, head): Patch("z", layer, "all", (head,)) for layer in (0, 1, 2) for head in range(4)}
    logits, _ = patched(patcher, PAIR, [(patch,) for patch in cells.values()])
    nats = measures(logits, logits[0], logits[1], RESPONSE)["nats"]
    assert nats[1] > 0.01
    for steps in (1, 4):
        assert ranked(attribution(patcher, [PAIR], ["z"], steps)[0]["z"], (0, 1, 2))[0] == (1, 2)
    restored = dict(zip(cells, (1 - nats[2:] / nats[1]).tolist(), strict=True))
    ones = {("edited", 0), ("edited", 1), ("readout", 2), ("z", 1, 2)}
    assert {cell for cell, share in restored.items() if share > 0.999} == ones
    assert all(abs(share) < 1e-6 for cell, share in restored.items() if cell not in ones)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
def test_attribution_is_the_slope_of_what_a_small_step_towards_the_donor_restores(family, patchers):
    patcher, sites = patchers(tiny(family, torch.float64)), ["z", "mlp_out", "mlp_post"]
    found = attribution(patcher, [PAIR], sites)[0]
    alone = replace(PAIR, recipient=DONOR)
    donor, recipient = (patcher.record(pair, sites)[0] for pair in (alone, PAIR))
    for name, step in (("forth", 1e-3), ("back", -1e-3)):
        mixed = {key: torch.lerp(value, donor.values[key], step) for key, value in recipient.values.items()}
        patcher.stored[name] = States(GROUPS, 12, mixed)
    units = [(2,), (17,), None]
    for site, layer, unit in itertools.product(sites, (0, 1, 2), units):
        if (unit is None) == (site != "mlp_out") or (site == "z" and unit == (17,)):
            continue
        logits, _ = patched(patcher, PAIR, [(Patch(site, layer, "all", unit, name),) for name in ("forth", "back")])
        nats = measures(logits.double(), logits[0], logits[1], RESPONSE, torch.float64)["nats"]
        told = found[site][layer] if unit is None else found[site][layer, unit[0]]
        assert float(nats[3] - nats[2]) / 2e-3 == pytest.approx(float(told), rel=1e-2, abs=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text", "mixtral"])
@pytest.mark.parametrize("steps", [1, 3])
def test_attribution_of_pairs_together_is_that_of_each_alone(family, steps, patchers):
    """Pairs of other lengths, of which some begin with more tokens of the shared text than others."""
    chance = torch.Generator().manual_seed(3)
    pairs = []
    for length, first, response in ((12, 4, 3), (15, 9, 1), (9, 3, 4), (12, 7, 2)):
        ids, new, forced = torch.randint(9, 140, (3, length), generator=chance).tolist()
        recipient = RECIPIENT[:3] + ids[3:]
        donor = recipient[:first] + new[first : first + 2] + recipient[first + 2 :]
        pairs.append(Pair(0, donor, recipient, forced[:response], {}, [[1, 2]]))
    sites = [site for site in ("z", "mlp_out", "mlp_post") if site in sites_of(family)]
    patcher = patchers(tiny(family, torch.float32 if family == "mixtral" else torch.float64))
    alone = [attribution(patcher, [pair], sites, steps)[0] for pair in pairs]
    for text in ([], RECIPIENT[:2], RECIPIENT[:3]):
        patcher.shared_text = text
        for one, together in zip(alone, attribution(patcher, pairs, sites, steps), strict=True):
            assert one.keys() == together.keys() == {*sites}
            for site, scores in one.items():
                assert scores.abs().max() > 0
                torch.testing.assert_close(together[site], scores, rtol=1e-4, atol=1e-6)


def test_rows_that_start_later_begin_a_batch_where_that_saves_work():
    batches = partial(patching._batches, end=20, size=4)
    assert [*batches([0, 1, 2, 3], [2, 2, 3, 3])] == [[0, 1, 2, 3]]  # one token more for two rows is less than a batch
    assert [*batches([0, 1, 2, 3], [2, 2, 17, 17])] == [[0, 1], [2, 3]]
    assert [*batches([3, 2, 1, 0, 4], [2, 2, 2, 2, 2])] == [[3, 2, 1, 0], [4]]
    assert [*batches([], [])] == []


def test_measures_are_their_formulas():
    logits = torch.randn(4, 3, 11, generator=torch.Generator().manual_seed(1))
    donor, recipient = logits[0], logits[1]
    response = donor.argmax(-1).tolist()
    found = measures(logits, donor, recipient, response)
    d, r = donor.softmax(-1), recipient.softmax(-1)
    for row, nats, first, sld, restored in zip(logits, *(found[name] for name in MEASURES[:4]), strict=True):
        kl = torch.nn.functional.kl_div(row.log_softmax(-1), d, reduction="none").sum(-1)
        a, b = (d * (d / r).log()).argmax(-1), (r * (r / d).log()).argmax(-1)
        torch.testing.assert_close(torch.stack([nats, first]), torch.stack([kl.sum(), kl[0]]))
        torch.testing.assert_close(sld, sum(row[t, a[t]] - row[t, b[t]] for t in range(3)))
        assert bool(restored) == (row.argmax(-1).tolist() == response)
    assert bool(found["restored"][0])
    assert found["nats"][0] == 0
    assert found["sld"][0] > found["sld"][1]


def test_restored_says_what_patched_greedy_decoding_writes(patchers):
    model = tiny("llama")
    patcher = patchers(model)
    response = patcher.respond(DONOR, 3, frozenset(), lambda _: False)
    pair = Pair(0, DONOR, RECIPIENT, response, GROUPS)
    rows = [
        (Patch("resid_pre", layer, name),) for layer in (0, 1, 2) for name in ("edited", "after", "all", "edited_last")
    ]
    logits, _ = patched(patcher, pair, rows)
    restored = measures(logits, logits[0], logits[1], response)["restored"][2:].tolist()
    assert {True, False} <= {*restored}
    for row, told in zip(rows, restored, strict=True):
        written: list[int] = []
        for _ in response:
            written.append(int(plain_logits(model, pair, row, [*written, 0])[-1].argmax()))
        assert (written == response) == told


def test_a_donor_of_another_length_gives_the_states_of_single_tokens(patchers):
    model = tiny("gpt_neox")
    patcher = patchers(model)
    longer = [9, 30, 41, 52, 163, 163, 174, 85, 96, 207, 118, 129, 140]
    pair = replace(PAIR, donor=longer)
    alone = replace(pair, recipient=longer, groups=GROUPS | {"edited_last": [9], "readout": [12]})
    rows = [(Patch(site, 1, name),) for site in ("resid_pre", "z", "v") for name in ("edited_last", "readout")]
    patcher.stored["own"], donor, told = patcher.record(alone, ["resid_pre", "z", "v"])
    logits, answers = patched(patcher, pair, rows)
    torch.testing.assert_close(donor[0], plain_logits(model, alone, (), RESPONSE), rtol=1e-4, atol=1e-4)
    plain = Plain(model)
    for tail, found in ((RESPONSE, logits[2:]), (PAIR.answers[2], None)):
        plain(longer + tail[:-1])
        states = plain.states
        for (patch,), row, answer in zip(rows, logits[2:], answers[2:], strict=True):
            places = {8: 9} if patch.positions == "edited_last" else {11: 12, 12: 13, 13: 14}
            shifted = {key: value.clone() for key, value in states.items()}
            for own, theirs in places.items():
                if theirs < len(states["v", 0]):
                    shifted[patch.site, 1][own] = states[patch.site, 1][theirs]
            own = [place for place in places if place < 12 + len(tail) - 1]
            out = plain(RECIPIENT + tail[:-1], [(patch.site, 1, own, None, shifted)])[11:]
            if found is not None:
                torch.testing.assert_close(row, out, rtol=1e-4, atol=1e-4)
            else:
                assert float(answer[2]) == pytest.approx(float(out.log_softmax(-1)[range(2), tail].sum()), abs=1e-3)
    assert float(told[0, 0]) == pytest.approx(float(donor[0].log_softmax(-1)[range(2), [55, 66]].sum()), abs=1e-4)


def test_groups_share_out_the_tokens_from_the_first_edited_one_on():
    groups = groups_of([False, False, True, True, False, True, False, False])
    assert groups["edited"] == [2, 3, 5]
    assert groups["edited_last"] == [3, 5]
    assert groups["after"] == [4, 6]
    assert groups["readout"] == [7]
    assert groups["all"] == [2, 3, 4, 5, 6, 7]
    assert groups["before"] == [0, 1]
    assert [groups[f"token_{i}"] for i in range(6)] == [[i] for i in range(2, 8)]
    assert "token_6" not in groups
    assert [name for name in groups_of([True] * 40) if name.startswith("token_")][-1] == "token_31"
    assert groups_of([True, False, True])["readout"] == groups_of([True, False, True])["before"] == []


SHARE_KEYS = {"gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text"}  # layers that read others' keys


@pytest.mark.stress
@pytest.mark.parametrize("family", sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES} - {*tiny_models.NOT_ALONE}))
def test_every_family_that_can_be_captured_is_patched_with_its_proof(family, patchers):
    config = tiny_models.any_config(family)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    try:
        attention_layers(config)
        prove(patchers(model), PAIR, ["resid_pre", "z", "pattern", "v"], 8)
    except Exception:
        if family not in tiny_models.REFUSED | SHARE_KEYS:
            raise


# --- the command

TYPOS = itertools.product(("sum", "total"), ("caclulate", "claculate", "calcualte"))
ROWS = [
    {
        "normal": f"Please calculate the {word}: {i} + 5 =",
        "swap": f"Please {typo} the {word}: {i} + 5 =",
        "answer": ["twelve apples", f"{i + 5}"],
    }
    for i, (word, typo) in enumerate(TYPOS)
]
ROWS.append({"normal": "Please calculate the sum: 9 + 5 =", "swap": "Please the sum: 9 + 5 ="})  # no counterpart


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(run folder of stage 2, its model) of ROWS."""
    folder = tmp_path_factory.mktemp("patching")
    model = tiny_models.save(folder / "model")
    (folder / "p.json").write_text(json.dumps(ROWS), encoding="utf-8")
    words = ["--model_name", model, "--prompt_file", str(folder / "p.json"), "--output_dir", str(folder / "run")]
    words += ["--prompt_keys", "all", "--max_new_tokens", "3", "--raw_layers", "none", "--answer_logprobs"]
    assert attn_act_logi.main(words) == 0
    return folder / "run", model


@pytest.fixture(autouse=True)
def _small_files(monkeypatch):
    monkeypatch.setattr(patch_job, "ROWS_PER_FILE", 4)


def command(whole, folder, *flags):
    shutil.copytree(whole[0], folder, dirs_exist_ok=True)
    return ["--run_dir", str(folder), "--styles", "swap", "--model_name", whole[1], *flags]


def files_of(folder):
    return {path.name: torch.load(path, weights_only=True) for path in sorted(folder.glob("swap/patches_*.pt"))}


def test_a_run_writes_every_cell_beside_its_baseline_and_its_proof(whole, tmp_path, caplog, capsys):
    flags = ["--sites", *SITES, "--directions", "denoising", "noising", "--positions", "edited", "after", "readout"]
    assert patch_activations.main(command(whole, tmp_path, *flags)) == 0
    assert "6 rows are one to one with split@swap; 1 are not and are left out" in capsys.readouterr().err
    files = files_of(tmp_path)
    assert list(files) == ["patches_00000_00004.pt", "patches_00004_00008.pt"]
    content = files["patches_00000_00004.pt"]
    assert content["original_indices"] == [0, 1, 2, 3]
    assert {content["style"], content["source"]} == {"swap", "split"}
    cells = list(zip(content["cell_directions"], content["sites"], content["positions"], content["donors"],
                     content["sets"], content["layers"].tolist(), content["heads"].tolist(), strict=True))  # fmt: skip
    assert len({*cells}) == len(cells) == 2 * (3 * 3 * 3 + 3 * 3 * 2 + 3 + 3 * (4 + 4 + 2) + 4)
    of = {cell: k for k, cell in enumerate(cells)}
    nats, before = content["nats"], content["recipient_nats"]
    assert not nats.isnan().any()
    for way in ("denoising", "noising"):
        assert (nats[:, of[way, "resid_pre", "edited", "own", "", 0, -1]] == 0).all()
        assert torch.equal(*(one[:, of[way, "resid_pre", "after", "own", "", 0, -1]] for one in (nats, before)))
        assert (nats[:, of[way, "pattern", "all", "own", "all pattern + v", -1, -1]] < 1e-6).all()  # products round
        assert (nats[:, of[way, "resid_pre", "edited", "other", "", 1, -1]] > 0).all()
    assert content["proof"].keys() >= {"plain", "self", "all", "edited_0", "after_0", "readout_0", "before"}
    assert all(content["proof"][f"random:{site}"] > 1e-3 for site in SITES)
    (path,) = (tmp_path / "swap").glob("activations_*.pt")
    expected = torch.load(path, weights_only=True)["answer_logprobs"].nan_to_num(-torch.inf).amax(1)[:4]
    denoising = [way == "denoising" for way in content["cell_directions"]]
    found = content["recipient_answer_logprob"][:, denoising]
    torch.testing.assert_close(found, expected[:, None].expand_as(found), rtol=1e-4, atol=1e-4)
    assert (content["sld"] <= content["donor_sld"] + 1e-3).float().mean() > 0.5


def assert_equal_files(found, expected):
    assert found.keys() == expected.keys()
    for name, content in expected.items():
        assert content.keys() == found[name].keys()
        for key, value in content.items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(found[name][key], value, rtol=0, atol=0, equal_nan=True)
            else:
                assert found[name][key] == value, key


def test_every_token_from_the_first_edited_one_on_is_patched_alone(whole, tmp_path):
    """Unedited tokens do nothing at layer 0, and a prompt with fewer tokens than another has no patch of the others."""
    flags = ["--positions", "edited", "tokens", "--sites", "resid_pre", "--layers", "0"]
    assert patch_activations.main(command(whole, tmp_path, *flags)) == 0
    (path,) = (tmp_path / "swap").glob("activations_*.pt")
    run, seen = torch.load(path, weights_only=True), set()
    for content in files_of(tmp_path).values():
        places = [k for k, name in enumerate(content["positions"]) if name.startswith("token_")]
        assert [content["positions"][k] for k in places] == [f"token_{i}" for i in range(len(places))]
        moved = (content["nats"] - content["recipient_nats"]).abs() > 1e-6
        for place, (row, tokens) in enumerate(zip(content["original_indices"], content["tokens"], strict=True)):
            inside = run["region_mask"][row, :, run["regions"].index("edited")]
            ids = run["input_ids"][row, int(inside.int().argmax()) :]
            assert "".join(text for text, _ in tokens) == tiny_models.tokenizer().decode(ids)
            edited = torch.tensor([inside for _, inside in tokens])
            assert int(edited.sum()) == int(inside.sum())
            assert content["nats"][place, places].isnan().tolist() == [i >= len(tokens) for i in range(len(places))]
            known = moved[place, places[: len(tokens)]]
            assert bool(known[edited].any())
            assert not bool(known[~edited].any())
            seen.add(len(tokens))
    assert len(seen) > 1, "all prompts are of one length: the test misses the missing tokens"


def test_a_stopped_run_goes_on_and_shards_share_the_files(whole, tmp_path):
    flags = ["--positions", "edited", "--sites", "resid_pre"]
    words = command(whole, tmp_path / "a", *flags)
    assert patch_activations.main(words) == 0
    files = files_of(tmp_path / "a")
    (tmp_path / "a/swap/patches_00004_00008.pt").write_bytes(b"cut off")
    assert patch_activations.main(words) == 0
    for shard in ("0/2", "1/2"):
        assert patch_activations.main([*command(whole, tmp_path / "b", *flags), "--shard", shard]) == 0
    for folder in ("a", "b"):
        assert_equal_files(files_of(tmp_path / folder), files)
    with pytest.raises(UserError, match=r"holds patches of other settings \(seed: 0 there, 1 now\)"):
        patch_activations.main([*words, "--seed", "1"])


def test_a_run_that_is_killed_goes_on_to_equal_files(whole, tmp_path, monkeypatch):
    """SIGKILL right after the first file; the second is left half written, as a real kill may leave it."""
    flags = ["--positions", "edited", "--sites", "resid_pre", "--layers", "0", "1"]
    monkeypatch.setattr(patch_job, "ROWS_PER_FILE", 4)
    assert patch_activations.main(command(whole, tmp_path / "a", *flags)) == 0
    words = command(whole, tmp_path / "b", *flags)
    code = (
        f"import sys, os, signal; sys.path[:0] = {sys.path!r}\n"
        "import patch_activations\nfrom capture import patch_job\n"
        "patch_job.ROWS_PER_FILE, save = 4, patch_job.save_pt\n"
        "patch_job.save_pt = lambda *args: (save(*args), os.kill(os.getpid(), signal.SIGKILL))\n"
        f"patch_activations.main({words!r})"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == -signal.SIGKILL
    assert [*files_of(tmp_path / "b")] == ["patches_00000_00004.pt"]
    (tmp_path / "b/swap/.patches_00004_00008.pt.1.part").write_bytes(b"half")
    assert patch_activations.main(words) == 0
    assert_equal_files(files_of(tmp_path / "b"), files_of(tmp_path / "a"))
    assert len(files_of(tmp_path / "a")) == 2


def test_the_clean_prompt_itself_as_donor(whole, tmp_path):
    flags = ["--source", "normal", "--positions", "edited_last", "readout", "--sites", "resid_pre", "z"]
    with pytest.raises(UserError, match="no counterpart for z"):
        patch_activations.main(command(whole, tmp_path, *flags))
    assert patch_activations.main(command(whole, tmp_path, *flags[:-1])) == 0
    content = torch.load(tmp_path / "swap/patches_normal_00000_00004.pt", weights_only=True)
    assert content["source"] == "normal"
    assert not content["nats"].isnan().any()
    assert "random:resid_pre" in content["proof"]
    assert patch_activations.main(command(whole, tmp_path / "default", "--source", "normal")) == 0


def test_prompts_of_equal_length_that_differ_elsewhere_are_no_twins(patchers):
    pair = replace(PAIR, donor=[*DONOR[:10], 7, DONOR[11]])  # a token after the edit, too
    with pytest.raises(UserError, match="the proof 'edited_0' is"):
        prove(patchers(tiny("llama")), pair, ["resid_pre"], 8)
    assert "edited_0" not in prove(patchers(tiny("llama")), pair, ["resid_pre"], 8, twins=False)


def test_a_mistake_leaves_the_patches_that_are_there(whole, tmp_path):
    table = tmp_path / "units.csv"
    table.write_text("layer,head\n1,9\n", encoding="utf-8")
    words = command(whole, tmp_path / "run", "--sites", "resid_pre", "--layers", "0")
    with pytest.raises(UserError, match="float7"):
        patch_activations.main([*words, "--dtype", "float7"])
    assert patch_activations.main(words) == 0, "settings without patches bind nobody"
    files = files_of(tmp_path / "run")
    for wrong in (["--units_csv", str(table)], ["--styles", "swap", "normal"]):
        with pytest.raises(UserError):
            patch_activations.main([*words, *wrong, "--overwrite"])
        assert_equal_files(files_of(tmp_path / "run"), files)


def test_a_proof_that_fails_stops_the_run(whole, tmp_path, monkeypatch):
    edited = Patcher._edited
    monkeypatch.setattr(
        Patcher, "_edited", lambda self, site, *rest: rest[1] if site == "z" else edited(self, site, *rest)
    )
    with pytest.raises(UserError, match="the proof 'random:z' does not move the logits"):
        patch_activations.main(command(whole, tmp_path))
    assert not files_of(tmp_path)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--layers", "3"], "--layers 3: the model has layers 0 to 2"),
        (["--styles", "normal"], "patching compares a style with the clean form"),
        (["--styles", "nope"], "has no style 'nope'"),
        (["--source", "normal", "--positions", "after"], "no counterpart for after"),
        (["--batch_size", "0"], "must be at least 1"),
        (["--max_samples", "-1"], "must be at least 1"),
        (["--response_tokens", "0"], "must be at least 1"),
        (["--ig_steps", "0"], "--ig_steps 0: must be at least 1"),
        (["--top_k", "0"], "--top_k 0: must be at least 1"),
        (["--layers", "all", "many"], "--layers many: give layer numbers"),
        (["--layers", "-4"], "the model has layers 0 to 2"),
        (["--styles", "split@swap"], "has no style 'split@swap'"),
        (["--run_dir", "nowhere"], "no such run folder"),
        (["--model_name", "nowhere"], "nowhere"),
        (["--dtype", "float7"], "float7"),
        (["--shard", "2/2"], "write i/n"),
        (["--shard", "0/2", "--overwrite"], "one shard would remove another's files"),
        (["--source", "normal", "--screen", "attribution"], "use split"),
        (["--ablate", "zero"], "give --units_csv or --screen attribution"),
        (["--screen", "attribution", "--sites", "resid_pre"], "name one of them in --sites"),
        (["--units_csv", "nowhere.csv"], "nowhere.csv: no such file"),
    ],
)
def test_what_cannot_be_patched_is_told_in_one_line(whole, tmp_path, flags, message):
    with pytest.raises(UserError, match=message) as caught:
        patch_activations.main([*command(whole, tmp_path), *flags])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("layer,unit\n0,1\n", "needs the columns layer and head or neuron"),
        ("head\n1\n", "needs the columns layer and head or neuron"),
        ("layer,head,neuron\n1,1,1\n", "needs the columns layer and head or neuron"),
        ("layer,head\n", "names no head for swap"),
        ("style,layer,head\ntwo,0,1\n", "names no head for swap"),
        ("layer,head\n0,first\n", "its column head must hold a whole number"),
        ("layer,head\n,1\n1,1\n", "its column layer must hold a whole number"),
        ("layer,head\n3,1\n", "layer 3: the model has layers 0 to 2"),
        ("layer,head\n-1,1\n", "layer -1: the model has layers 0 to 2"),
        ("layer,head\n1,4\n", "head 4: layer 1 has heads 0 to 3"),
        ("layer,head,set\n1,1,all z\n", "the set 'all z' has a name that this script gives"),
        ("layer,head,set\n1,1,a_random_1\n", "the set 'a_random_1' has a name"),
        ("layer,head,set\n1,1,attribution_top_1\n", "the set 'attribution_top_1' has a name"),
        ("layer,neuron\n1,-1\n", "neuron -1: layer 1 has neurons 0 to 47"),
    ],
)
def test_what_a_table_of_units_may_not_hold_is_told_in_one_line(whole, tmp_path, table, message):
    path = tmp_path / "units.csv"
    path.write_text(table, encoding="utf-8")
    with pytest.raises(UserError, match=message) as caught:
        patch_activations.main([*command(whole, tmp_path / "run"), "--units_csv", str(path)])
    assert "\n" not in str(caught.value)


def test_another_model_than_the_run_is_refused(whole, tmp_path):
    other = tiny_models.save(tmp_path / "other", "gpt2")
    with pytest.raises(UserError, match="is not the model of"):
        patch_activations.main([*command(whole, tmp_path / "run"), "--model_name", other])


def test_a_mixture_of_experts_has_no_neurons(patchers):
    with pytest.raises(UserError, match="no single MLP"):
        patchers(tiny("mixtral")).hook(["mlp_post"])


def test_a_screen_patches_the_best_units_alone_and_in_sets_beside_random_ones(whole, tmp_path):
    table = tmp_path / "units.csv"
    table.write_text("style,layer,neuron,set\nswap,0,3,mine\nswap,2,7,mine\ntwo,1,1,mine\n", encoding="utf-8")
    sites = ["z", "pattern", "v", "mlp_out", "mlp_post"]
    flags = ["--screen", "attribution", "--top_k", "2", "--sites", *sites, "--positions", "edited"]
    words = command(whole, tmp_path / "run", *flags, "--units_csv", str(table))
    assert patch_activations.main(words) == 0
    content = files_of(tmp_path / "run")["patches_00000_00004.pt"]
    shapes = {site: tuple(scores.shape) for site, scores in content["attribution"].items()}
    assert shapes == {"z": (4, 3, 4), "mlp_out": (4, 3), "mlp_post": (4, 3, 48)}
    cells = list(
        zip(content["sites"], content["sets"], content["layers"].tolist(), content["heads"].tolist(), strict=True)
    )
    for query_heads in ("z", "pattern"):
        assert sum(site == query_heads and head >= 0 for site, _, _, head in cells) == 2
    assert [name for site, name, _, _ in cells if site == "v"] == ["all v"]
    assert sum(site == "mlp_post" and head >= 0 for site, _, _, head in cells) == 2
    names = {(site, name) for site, name, _, _ in cells}
    assert names >= {("z", f"attribution_top_{k}") for k in (1, 2, 5, 10, 12)} | {("mlp_post", "mine")}
    assert names >= {("mlp_post", f"mine_random_{n}") for n in (1, 2, 3)}
    chosen = json.loads((tmp_path / "run/swap/patches.json").read_text())["chosen"]
    best = chosen["z"][0]
    single, top = (next(k for k, cell in enumerate(cells) if cell in wanted) for wanted in (
        [("z", "", *best)], [("z", "attribution_top_1", best[0], -1)]))  # fmt: skip
    torch.testing.assert_close(content["nats"][:, single], content["nats"][:, top], rtol=1e-4, atol=1e-5)
    whole_set = cells.index(("z", "attribution_top_12", -1, -1))
    assert torch.equal(content["nats"][:, whole_set], content["nats"][:, cells.index(("z", "all z", -1, -1))])
    assert {True, False} >= {*content["choosing"]}


def test_what_depends_on_all_rows_is_not_mixed_with_that_of_fewer(whole, tmp_path):
    words = command(whole, tmp_path / "run", "--screen", "attribution", "--sites", "z", "--top_k", "1")
    assert patch_activations.main([*words, "--max_samples", "4"]) == 0
    with pytest.raises(UserError, match=r"holds patches of other settings \(rows_used: 4 there, 6 now\)"):
        patch_activations.main(words)


def test_a_screen_leaves_rows_to_estimate_on(whole, tmp_path, monkeypatch):
    for seed in ("0", "1", "2"):
        flags = ["--screen", "attribution", "--sites", "z", "--top_k", "1", "--seed", seed]
        assert patch_activations.main(command(whole, tmp_path / seed, *flags)) == 0
        chose = [one for content in files_of(tmp_path / seed).values() for one in content["choosing"]]
        assert sorted(chose) == [False] * 3 + [True] * 3
    monkeypatch.setattr(patch_job.Run, "template", lambda *_: "one")
    with pytest.raises(UserError, match="all rows of swap have one template, so none is left"):
        patch_activations.main(command(whole, tmp_path / "one", "--screen", "attribution"))


def test_a_row_without_memory_does_not_stop_a_screen(whole, tmp_path, monkeypatch):
    tried, compute = [], patch_job.attribution

    def short_of_memory(patcher, pairs, *rest):
        tried.append([pair.key for pair in pairs])
        if any(pair.key == 2 for pair in pairs):
            raise torch.OutOfMemoryError("out of memory")
        return compute(patcher, pairs, *rest)

    monkeypatch.setattr(patch_job, "attribution", short_of_memory)
    words = command(whole, tmp_path, "--screen", "attribution", "--sites", "z", "--top_k", "1")
    assert patch_activations.main(words) == 1
    done = [row for content in files_of(tmp_path).values() for row in content["original_indices"]]
    assert 2 not in done
    assert len(done) == 5
    assert (tmp_path / "swap/patches_failures.csv").read_text().count("swap,2,3,") == 1
    assert len(tried) <= 12, "after the first failure rows go one by one"


def test_a_disk_without_room_is_told_before_the_first_row(whole, tmp_path, monkeypatch, capsys):
    words = command(whole, tmp_path / "run", "--screen", "attribution", "--sites", "z", "mlp_post", "--top_k", "1")
    assert patch_activations.main(words) == 0
    assert "about 0.0 MB will be written to" in capsys.readouterr().err
    usage = patch_job.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(patch_job.shutil, "disk_usage", lambda _: usage._replace(free=10))
    with pytest.raises(UserError, match=r"needs about 0\.0 MB, the disk has 0\.0 MB; free some space"):
        patch_activations.main([*words, "--overwrite"])
    assert not files_of(tmp_path / "run")


def test_the_proof_covers_the_sites_of_sets(whole, tmp_path):
    table = tmp_path / "units.csv"
    table.write_text("layer,head\n1,2\n", encoding="utf-8")
    words = command(whole, tmp_path / "run", "--sites", "resid_pre", "--units_csv", str(table))
    assert patch_activations.main(words) == 0
    for content in files_of(tmp_path / "run").values():
        assert content["proof"].keys() >= {"random:resid_pre", "random:z"}


@pytest.mark.parametrize("ablate", ["zero", "mean"])
def test_a_set_may_be_ablated_instead_of_patched(whole, tmp_path, ablate):
    table = tmp_path / "units.csv"
    table.write_text("layer,head\n1,2\n", encoding="utf-8")
    words = command(whole, tmp_path / "run", "--sites", "resid_pre", "--units_csv", str(table), "--ablate", ablate)
    assert patch_activations.main(words) == 0
    content = files_of(tmp_path / "run")["patches_00000_00004.pt"]
    place = content["sets"].index("csv")
    assert content["donors"][place] == ablate
    assert (content["nats"][:, place] != content["recipient_nats"][:, place]).all()
