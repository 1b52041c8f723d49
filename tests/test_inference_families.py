"""Every causal language model family of transformers: captured as an eager pass has it, or refused in one line."""

from __future__ import annotations

import functools
import json
import re

import pytest
import tiny_models
import torch
from attn_act_logi import main
from capture import recorder as capture
from capture.model_check import Batching, check_model
from capture.recorder import CaptureOptions
from command_line import UserError
from run_store import load_pt
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Model
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

PROMPTS = [
    {"normal": "Please calculate the sum: 7 + 5 ="},
    {"normal": "What is the total of these three numbers, naïve café: 3 × 4 − 1 ="},
    {"normal": "Sum: 1 + 1"},
    {"normal": "Explain, in two short sentences, why the sky is blue"},
    {"normal": "Why: 1 + 1"},
]
STEPS = 4


def command(model: str, prompts, output, *flags: str) -> list[str]:
    own = ["--model_name", model, "--prompt_file", str(prompts), "--output_dir", str(output), "--device_map", "cpu"]
    return [*own, "--max_new_tokens", str(STEPS), "--raw_layers", "0", "1", *flags]


def outcome(folder, family: str, config=None, *flags: str) -> str:
    """`captured`, or the one line of the refusal; AssertionError and all else: neither."""
    model = tiny_models.save_any(folder / "model", family, config)
    plain = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager").eval()
    plain(torch.tensor([[5, 6, 7, 8]]), use_cache=False)  # else the model itself is at fault
    prompts, output = folder / "p.json", folder / "out"
    prompts.write_text(json.dumps(PROMPTS), encoding="utf-8")
    try:
        code = main(command(model, prompts, output, *flags))
    except UserError as error:
        refusal = str(error)
    else:
        refusal = ""
    if refusal:
        assert "\n" not in refusal
        assert not list(output.rglob("run.json")), "another model may be tried in the same folder"
        return f"refused: {refusal}"
    assert code == 0
    (path,) = output.glob("activations_*.pt")
    compare(load_pt(path), plain)
    return "captured"


@torch.inference_mode()
def compare(content, eager) -> None:
    """Every row of a file against transformers' own pass of the prompt alone."""
    for b in range(len(content["prompts"])):
        real = content["attention_mask"][b]
        ids, mask = content["input_ids"][b][real], content["region_mask"][b][real].float()
        length = len(ids)
        text = ids
        for _ in range(content["response_token_counts"][b]):
            text = torch.cat([text, eager(text[None], use_cache=False).logits[0, -1:].argmax(-1)])
        response = eager_text(content, text[length:])
        assert content["responses"][b] == response
        out = eager(ids[None], output_hidden_states=True, output_attentions=True, use_cache=False)
        means = (mask / mask.sum(0)).T  # [R, S]
        pooled = [content["regions"].index(name) for name in content["pooled_regions"]]
        assert len(out.hidden_states) == len(content["hidden_pooled"])
        for layer, state in enumerate(out.hidden_states):
            close(content["hidden_pooled"][layer, b], means[pooled] @ state[0], 1e-3)
        assert len(out.attentions) == len(content["span_mass"])
        for layer, maps in enumerate(out.attentions):
            own = maps[0]
            if f"layer_{layer}" in content["attentions"]:
                kept = content["attentions"][f"layer_{layer}"][b][:, real][:, :, real]
                close(kept / kept.sum(-1, keepdim=True), own / own.sum(-1, keepdim=True), 1e-4)
                own = kept  # what a sink takes is no attention, which some eager maps leave out
                close(content["span_mass"][layer, b], means @ own @ mask, 2e-3)


def eager_text(content, ids) -> str:
    return str(tiny_models.tokenizer().decode(ids, skip_special_tokens=True))


def close(found, expected, tolerance) -> None:
    scale = max(1.0, float(expected.abs().nan_to_num().max()))
    torch.testing.assert_close(found.float(), expected.float(), rtol=tolerance, atol=tolerance * scale, equal_nan=True)


@pytest.mark.stress
@pytest.mark.parametrize("family", sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES} - {*tiny_models.NOT_ALONE}))
def test_a_family_is_captured_as_eager_has_it_or_refused_in_one_line(tmp_path, family):
    assert outcome(tmp_path, family).startswith("refused: " if family in tiny_models.REFUSED else "captured")


# --- quick: one family of each kind

COMMON = {"vocab_size": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3, "hidden_size": 32, "head_dim": 8}
COMMON |= {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
OPT = COMMON | {"ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False}
COMMON |= {"intermediate_size": 48}
KINDS = [
    ("afmoe", COMMON, "captured"),  # its mask comes by keyword
    ("gemma4_text", COMMON | {"sliding_window": 8}, "captured"),  # heads of two sizes
    ("gemma4_text", None, "captured"),  # the last layers read the keys of earlier ones
    ("gemma3n_text", None, r"the states of layer 0 are \[2, 1, 12, 32\] for 12 tokens"),
    ("opt", None, "captured"),
    ("opt", OPT, "the hidden size differs between layers: 16, 32"),
    ("axk1", None, "captured"),
    ("deepseek_v32", None, r"its code fails here \(ValueError: Cannot call `update_indexer`"),
    ("deepseek_v4", None, r"the states of layer 0 are \[1, 12, 4, 32\] for 12 tokens"),
    ("prophetnet", None, r"the states of layer 0 are \[1, 36, 32\] for 12 tokens"),
    ("xlnet", None, r"the states of layer 0 are \[12, 1, 32\] for 12 tokens"),
    ("bloom", None, "layer 0 does not use transformers' attention interface"),
    ("roberta", None, "its hidden states differ by"),
]


@pytest.mark.parametrize(("family", "sizes", "expected"), KINDS)
def test_a_model_of_an_unusual_kind_is_captured_or_refused_before_anything_is_run(tmp_path, family, sizes, expected):
    found = outcome(tmp_path, family, sizes and AutoConfig.for_model(family, **sizes))
    assert found == "captured" or found.startswith("refused: this model's attention cannot be captured: ")
    assert re.search(expected, found)


@pytest.mark.parametrize("family", ["blt", "mamba", "qwen3_next", "zamba"])
def test_a_model_without_attention_in_every_layer_is_refused_by_its_config(tmp_path, family):
    AutoConfig.for_model(family).save_pretrained(tmp_path / "model")  # no weights
    tiny_models.tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "p.json").write_text(json.dumps(PROMPTS), encoding="utf-8")
    with pytest.raises(UserError, match="not all its layers have attention, so it cannot be captured"):
        main(command(str(tmp_path / "model"), tmp_path / "p.json", tmp_path / "out"))


def batches(folder) -> str:
    return json.loads((folder / "out" / "run.json").read_text())["environments"][0]["batches"]


@pytest.mark.parametrize("family", ["bart", "marian", "pegasus", "blenderbot", "biogpt"])
def test_a_decoder_that_numbers_padding_reads_prompts_of_equal_length_together(tmp_path, family, capsys):
    assert outcome(tmp_path, family) == "captured"
    assert batches(tmp_path) == ("padded" if family == "biogpt" else "equal")
    told = "in a padded batch this model's numbers would be others: only prompts of equal length share a batch"
    assert (told in capsys.readouterr().err) == (family != "biogpt")


@pytest.mark.parametrize("rows", ["equal", "alone"])
def test_a_model_that_nobody_has_thought_of_is_run_as_it_can_be(tmp_path, monkeypatch, rows):
    forward = GPT2Model.forward

    @functools.wraps(forward)
    def strange(self, ids, *args, **kwargs):
        if rows == "equal":  # positions count the padding
            kwargs.pop("position_ids", None)
        elif ids.shape[1] > 1:  # a row looks at its neighbours
            ids = torch.cat([ids[:1], ids[:-1]])
        return forward(self, ids, *args, **kwargs)

    plain = tiny_models.save_any(tmp_path / "plain", "gpt2")
    monkeypatch.setattr(GPT2Model, "forward", strange)
    prompts = tmp_path / "p.json"
    prompts.write_text(json.dumps(PROMPTS), encoding="utf-8")
    assert main(command(plain, prompts, tmp_path / "out")) == 0
    monkeypatch.undo()
    assert batches(tmp_path) == rows
    (path,) = (tmp_path / "out").glob("activations_*.pt")
    compare(load_pt(path), AutoModelForCausalLM.from_pretrained(plain, attn_implementation="eager").eval())


def test_a_capture_that_is_not_what_the_model_attends_to_is_refused(tmp_path, monkeypatch):
    attend = capture._Pass.attend

    def late(self, call):
        found = attend(self, call)
        mass = self.sums["mass"]
        mass[call.module.layer_idx] = mass[call.module.layer_idx].roll(1, -1)
        return found

    monkeypatch.setattr(capture._Pass, "attend", late)
    assert re.fullmatch(
        "refused: this model's attention cannot be captured: its attention differs from transformers' own eager maps "
        r"by \d+%; choose another model",
        outcome(tmp_path, "llama"),
    )


@pytest.mark.parametrize("family", ["gpt_oss", "granite_swa"])
def test_raw_maps_and_mass_leave_out_what_a_sink_takes(tmp_path, family):
    assert outcome(tmp_path, family, None, "--entropy") == "captured"
    (path,) = (tmp_path / "out").glob("activations_*.pt")
    content = load_pt(path)
    whole = content["regions"].index("all")
    for layer in (0, 1):
        for b, real in enumerate(content["attention_mask"]):
            reached = content["attentions"][f"layer_{layer}"][b][:, real][:, :, real].sum(-1)
            assert reached.max() < 0.99
            close(content["span_mass"][layer, b, :, whole, whole], reached.mean(-1), 2e-3)
    entropy = content["attention_entropy"][:, :, :, whole]
    assert 0.3 < entropy.min() <= entropy.max() <= 1.001  # of the shares of the keys: a sink does not lower it


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
@pytest.mark.parametrize("options", [CaptureOptions((0, 3), entropy=True, neurons=True), CaptureOptions(())])
def test_the_usual_models_are_padded_and_read_a_shared_prefix_once(family, options):
    model = tiny_models.model(family)
    ids = [tiny_models.tokenizer()(row["normal"])["input_ids"] for row in PROMPTS[:2]]
    wide = family not in ("mistral", "gemma2")  # a window of 8 tokens
    assert check_model(model, tiny_models.tokenizer(), options, ids, Batching("padded", wide), 8) == Batching(
        "padded", wide
    )
