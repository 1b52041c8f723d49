"""Every captured field against a plain eager forward pass of the same prompt alone."""

from __future__ import annotations

import copy
import json
from collections import deque

import pytest
import tiny_models
import torch
from capture.batching import BatchLimit
from capture.decode import GenerationOptions, Generator, Prompt
from capture.prompts import PromptReader, Rendering
from capture.recorder import CaptureOptions, Recorder, attention_windows
from command_line import UserError
from load_json import read_prompt_file

FEW_SHOT = "Write down the answer: 3 + 4 = 7\nWrite down the answer: 9 - 5 = 4\n"
ROWS = [
    {"normal": "Please calculate the sum: 7 + 5 =", "main": "Please calcukate the sum: 7 + 5 ="},
    {"normal": "What is the total of these three numbers, naïve café 😀: 3 × 4 − 1 =", "main": "What is teh total"},
    {"normal": "Sum: 1 + 1", "main": "Sun: 1 + 1"},
    {"normal": "Explain why the sky is blue", "main": "Explain why the sky is bule"},
]
REGIONS = ["all", "last", "context", "instruction", "task", "first", "edited:main"]


def prompt_reader(tmp_path, few_shot=FEW_SHOT):
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps(ROWS), encoding="utf-8")
    pool = ["all", "last", "context", "instruction", "task", "edited"]
    return PromptReader(read_prompt_file(path), tiny_models.tokenizer(), Rendering(few_shot), 200, pool)


def captured(model, reader, options, batch_size, reuse_prefix, generation=None):
    style = reader.style("normal")
    prompts = [reader.prompt(style, position) for position in range(len(style.texts))]
    recorder = Recorder(model, options)
    generation = generation or GenerationOptions(max_new_tokens=12, eos_token_ids=frozenset([2]))
    generator = Generator(model, reader.tokenizer, recorder, generation, BatchLimit(batch_size))
    generator.set_regions(style.names, style.pooled)
    generator.set_prefix(reader.shared_prefix() if reuse_prefix else [])
    results = {result.prompt.key: result for result in generator.run([prompts])}
    recorder.close()
    return style, prompts, [results[prompt.key] for prompt in prompts]


def reference(model, prompt: Prompt):
    ids = torch.tensor([prompt.input_ids])
    with torch.inference_mode():
        return model(ids, output_hidden_states=True, output_attentions=True)


def region_means(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over the tokens (last but one axis) of each region, by a plain loop."""
    return torch.stack([values[..., mask[:, r], :].mean(-2) for r in range(mask.shape[1])], dim=-2)


@pytest.mark.parametrize("reuse_prefix", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_fields_equal_an_eager_pass_of_the_prompt_alone(tmp_path, family, batch_size, reuse_prefix):
    wide = {"sliding_window": 300} if reuse_prefix and family in ("mistral", "gemma2") else {}
    model = tiny_models.model(family, **wide)
    eager = tiny_models.model(family, attn_implementation="eager", **wide)
    options = CaptureOptions(raw_layers=(0, 2, 3), topk_logits=5, topk_positions="all", neurons=True, entropy=False)
    style, prompts, results = captured(model, prompt_reader(tmp_path), options, batch_size, reuse_prefix)
    assert style.names == REGIONS
    for prompt, result in zip(prompts, results, strict=True):
        expected, fields, mask = reference(eager, prompt), result.fields, prompt.region_mask
        states = torch.stack(expected.hidden_states)[:, 0]
        maps = torch.stack(expected.attentions)[:, 0]  # [L,H,S,S]
        keys = maps @ mask.float()
        torch.testing.assert_close(
            fields["span_mass"].float(), region_means(keys, mask), rtol=2e-3, atol=2e-3, equal_nan=True
        )
        pooled = [style.names.index(name) for name in style.pooled]
        torch.testing.assert_close(
            fields["hidden_pooled"], region_means(states, mask[:, pooled]), rtol=1e-4, atol=1e-4, equal_nan=True
        )
        for layer in (0, 2, 3):
            torch.testing.assert_close(fields["hidden_states"][f"layer_{layer}"], states[layer], rtol=1e-4, atol=1e-4)
        for layer in (0, 2):
            torch.testing.assert_close(fields["attentions"][f"layer_{layer}"], maps[layer], rtol=1e-4, atol=1e-5)
        logits = expected.logits[0].float()
        torch.testing.assert_close(fields["topk_vals"], logits.topk(5).values, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(fields["logsumexp"], logits.logsumexp(-1), rtol=1e-4, atol=1e-4)
        own = logits.gather(1, fields["topk_indices"])  # indices may swap at ties, their logits may not
        torch.testing.assert_close(own, fields["topk_vals"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reuse_prefix", [False, True])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
@pytest.mark.parametrize("kernels", ["flash_attention_2", "flex_attention"])
def test_flash_and_flex_give_the_fields_and_the_text_of_eager(tmp_path, monkeypatch, kernels, family, reuse_prefix):
    calls = flash_without_a_gpu(monkeypatch)
    wide = {"sliding_window": 300} if reuse_prefix and family != "llama" else {}
    options = CaptureOptions(raw_layers=(1,), topk_logits=5, entropy=False)
    reader = prompt_reader(tmp_path)
    with torch.compiler.set_stance("force_eager"):  # the same formulas, and no C++ compiler
        fast = tiny_models.model(family, **wide)
        fast.config._attn_implementation = kernels
        _, prompts, found = captured(fast, reader, options, 3, reuse_prefix)
    assert bool(calls) == (kernels == "flash_attention_2")
    eager = tiny_models.model(family, attn_implementation="eager", **wide)
    _, _, expected = captured(eager, reader, options, 3, reuse_prefix)
    for prompt, ours, theirs in zip(prompts, found, expected, strict=True):
        assert ours.responses[0].ids == theirs.responses[0].ids
        torch.testing.assert_close(
            ours.fields["attentions"]["layer_1"], theirs.fields["attentions"]["layer_1"], rtol=1e-4, atol=1e-5
        )
        for name in ("span_mass", "hidden_pooled", "topk_vals"):
            torch.testing.assert_close(
                ours.fields[name].float(), theirs.fields[name].float(), rtol=2e-3, atol=1e-3, equal_nan=True
            )
        assert ours.fields["span_mass"].shape[-1] == prompt.region_mask.shape[1]


def test_an_attention_of_another_kind_is_refused():
    model = tiny_models.model("llama")
    model.config._attn_implementation = "paged_attention"
    with pytest.raises(UserError, match="attention 'paged_attention' cannot be captured; use --attn_implementation"):
        Recorder(model, CaptureOptions(raw_layers=()))


def flash_without_a_gpu(monkeypatch) -> list[str]:
    """The flash_attn package's two functions by their documentation, in plain PyTorch; returns the calls made."""
    from transformers import modeling_flash_attention_utils as flash

    calls: list[str] = []

    def one(q, k, v, softmax_scale, causal, window_size, softcap):  # [S,H,D] and [Sk,Hkv,D]
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * softmax_scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        ahead = torch.arange(len(q))[:, None] + len(k) - len(q) - torch.arange(len(k))
        hidden = (ahead < 0) if causal else torch.zeros_like(ahead, dtype=torch.bool)
        if window_size[0] >= 0:
            hidden = hidden | (ahead > window_size[0])
        return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)

    def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0):
        calls.append("whole")
        rows = zip(q, k, v, strict=True)
        return torch.stack([one(*row, softmax_scale, causal, window_size, softcap) for row in rows])

    # transformers reads from the names which options there are.
    def flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
    ):
        calls.append("ragged")
        parts = [x.tensor_split(cu[1:-1].long()) for x, cu in ((q, cu_seqlens_q), (k, cu_seqlens_k), (v, cu_seqlens_k))]
        return torch.cat([one(*row, softmax_scale, causal, window_size, softcap) for row in zip(*parts, strict=True)])

    functions = (flash_attn_func, flash_attn_varlen_func, None, flash._pad_input, flash._unpad_input)
    monkeypatch.setattr(flash, "_lazy_imports", lambda *_args, **_kwargs: functions)
    monkeypatch.setattr(flash, "_loaded_implementation", None)
    return calls


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_neurons_are_the_inputs_of_the_down_projection_and_gates_what_the_activation_function_gives(tmp_path, family):
    model = tiny_models.model(family)
    options = CaptureOptions(raw_layers=(), neurons=True, gates=True)
    style, prompts, results = captured(model, prompt_reader(tmp_path), options, 4, False)
    seen: dict[str, list[torch.Tensor]] = {"mlp_pooled": [], "gate_pooled": []}
    names = {"gpt2": "mlp.c_proj", "gpt_neox": "mlp.dense_4h_to_h"}
    wanted = names.get(family, "mlp.down_proj")
    for name, module in model.named_modules():
        if name.endswith(wanted):
            module.register_forward_pre_hook(lambda _m, args: seen["mlp_pooled"].append(args[0].clone()))
        if name.endswith(("mlp.act_fn", "mlp.act", "mlp.activation_fn")):
            module.register_forward_hook(lambda _m, _args, output: seen["gate_pooled"].append(output.clone()))
    for prompt, result in zip(prompts, results, strict=True):
        for states in seen.values():
            states.clear()
        reference(model, prompt)
        mask = prompt.region_mask[:, [style.names.index(name) for name in style.pooled]]
        for field, states in seen.items():
            means = region_means(torch.stack([tensor.reshape(len(mask), -1) for tensor in states]), mask)
            torch.testing.assert_close(result.fields[field].float(), means, rtol=2e-3, atol=2e-3, equal_nan=True)
    same = torch.equal(results[0].fields["mlp_pooled"].nan_to_num(), results[0].fields["gate_pooled"].nan_to_num())
    assert same == (family in names), "without a gate's partner the two are one quantity"


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        *((family, {}) for family in tiny_models.FAMILIES),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 5}),
        ("mistral", {"sliding_window": None}),
    ],
)
def test_attention_windows_are_what_the_queries_see(tmp_path, family, changes):
    model = tiny_models.model(family, attn_implementation="eager", **changes)
    windows = attention_windows(model.config)
    prompt = prompt_reader(tmp_path).prompt(prompt_reader(tmp_path).style("normal"), 1)
    maps = torch.stack(reference(model, prompt).attentions)[:, 0]  # [L,H,S,S]
    length = maps.shape[-1]
    back = torch.arange(length)[:, None] - torch.arange(length)  # from the query back to the key
    for layer, window in enumerate(windows):
        expected = (back >= 0) & (back < (window or length))
        assert not maps[layer, :, ~expected].any()
        assert (maps[layer, :, expected] > 0).float().mean() > 0.9  # some are too small for float32
        edge = back == (window or length) - 1
        assert maps[layer, :, edge].max() > 0
    assert len(windows) == 3
    slides = changes.get("sliding_window", 8) is not None and changes.get("use_sliding_window", family != "qwen2")
    assert any(windows) == (family in ("mistral", "gemma2", "qwen2") and slides)


def test_a_layer_of_an_unknown_kind_has_an_unknown_window():
    config = tiny_models.config("qwen3", layer_types=["full_attention", "chunked_attention", "full_attention"])
    assert attention_windows(config) == [0, -1, 0]


@pytest.mark.parametrize("reuse_prefix", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral"])
def test_entropy_is_relative_to_what_the_query_may_see(tmp_path, family, reuse_prefix):
    wide = {"sliding_window": 300} if reuse_prefix and family in ("mistral", "gemma2") else {}
    model = tiny_models.model(family, **wide)
    eager = tiny_models.model(family, attn_implementation="eager", **wide)
    options = CaptureOptions(raw_layers=(1,), entropy=True)
    style, prompts, results = captured(model, prompt_reader(tmp_path), options, 4, reuse_prefix)
    window = getattr(model.config, "sliding_window", None)
    for prompt, result in zip(prompts, results, strict=True):
        maps = torch.stack(reference(eager, prompt).attentions)[:, 0].double()
        length = len(prompt.input_ids)
        entropy = -(maps * maps.clamp(min=1e-300).log()).sum(-1)  # [L,H,S]
        for layer in range(3):
            slides = family == "mistral" or (
                family == "gemma2" and model.config.layer_types[layer] == "sliding_attention"
            )
            seen = torch.arange(1, length + 1).clamp(max=window if slides else length).double()
            relative = (entropy[layer] / seen.log())[:, 1:]  # the first token sees one key
            for r in range(len(style.names)):
                chosen = prompt.region_mask[1:, r]
                got = result.fields["attention_entropy"][layer, :, r].double()
                torch.testing.assert_close(got, relative[:, chosen].mean(-1), rtol=2e-3, atol=2e-3, equal_nan=True)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_text_equals_generate_without_capture(tmp_path, family):
    reader = prompt_reader(tmp_path)
    _, prompts, results = captured(tiny_models.model(family), reader, CaptureOptions(raw_layers=(0,)), 2, False)
    plain = tiny_models.model(family)
    for prompt, result in zip(prompts, results, strict=True):
        ids = torch.tensor([prompt.input_ids])
        out = plain.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        assert result.responses[0].ids == out[0, ids.shape[1] :].tolist()


def test_repetition_penalty_equals_generate(tmp_path):
    reader = prompt_reader(tmp_path)
    generation = GenerationOptions(max_new_tokens=12, repetition_penalty=1.3, eos_token_ids=frozenset([2]))
    _, prompts, results = captured(
        tiny_models.model("llama"), reader, CaptureOptions(raw_layers=(0,)), 4, True, generation
    )
    plain = tiny_models.model("llama")
    for prompt, result in zip(prompts, results, strict=True):
        ids = torch.tensor([prompt.input_ids])
        out = plain.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, repetition_penalty=1.3
        )
        assert result.responses[0].ids == out[0, ids.shape[1] :].tolist()


def test_mass_over_disjoint_regions_is_one(tmp_path):
    style, _, results = captured(
        tiny_models.model("llama"), prompt_reader(tmp_path), CaptureOptions(raw_layers=(0,)), 4, True
    )
    disjoint = [style.names.index(name) for name in ("context", "instruction", "task")]
    for result in results:
        whole = result.fields["span_mass"].float()[:, :, 0, disjoint].sum(-1)
        torch.testing.assert_close(whole, torch.ones_like(whole), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("typed", ["", "</s>"])
def test_an_end_of_text_that_the_tokenizer_puts_after_a_prompt_is_dropped(tmp_path, typed):
    from tokenizers.processors import TemplateProcessing

    adding = copy.deepcopy(tiny_models.tokenizer())
    adding.backend_tokenizer.post_processor = TemplateProcessing("<s> $A </s> </s>", None, [("<s>", 1), ("</s>", 2)])
    assert adding("Sum: 1")["input_ids"][-2:] == [2, 2]
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps([{"normal": f"Sum: 1 + 1{typed}"}]), encoding="utf-8")
    reader = PromptReader(read_prompt_file(path), adding, Rendering(), 200, None)
    style = reader.style("normal")
    prompt = reader.prompt(style, 0)
    usual = PromptReader(read_prompt_file(path), tiny_models.tokenizer(), Rendering(), 200, None)
    plain = usual.prompt(usual.style("normal"), 0).input_ids  # what the user typed stays
    assert plain[-1] != 2
    assert prompt.input_ids == [1, *plain]
    assert style.lengths == [len(plain) + 1]
    last = prompt.region_mask[:, style.names.index("last")]
    assert last.nonzero().tolist() == [[len(plain)]]
    assert prompt.region_mask[-1, style.names.index("task")]


def test_prompts_of_equal_length_share_a_batch_and_no_others_join():
    lengths = [9, 9, 9, 7, 5, 5]
    waiting = deque(Prompt(key, [4] * length, torch.ones(length, 1)) for key, length in enumerate(lengths))
    limit, groups = BatchLimit(2, equal_lengths=True), []
    while waiting:
        groups.append([prompt.key for prompt in limit.next_group(waiting, 0)])
        assert not limit.may_join(1, len(waiting))
    assert groups == [[0, 1], [2], [3], [4, 5]]
