"""Tiny random models of the families that are supported, and small trained tokenizers of the usual kinds."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

FAMILIES = ("llama", "gemma2", "qwen2", "qwen3", "mistral", "gpt2", "gpt_neox")
CORPUS = [
    "Please calculate the sum of these numbers: 7 + 5 = 12",
    "What is the total cost of three red apples and 14 pears at the market?",
    "Explain, in two short sentences, why the sky is blue: it scatters light.",
    "naïve café über Straße 😀 🎉 résumé — “quoted” text… ½ × ÷ −3",
    "Write down the answer, and then stop. The quick brown fox jumps over the lazy dog.",
]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@cache
def tokenizer(kind: str = "bytes") -> Any:
    """A fast tokenizer: `bytes` (GPT-2, Llama 3), `metaspace` (SentencePiece-like), `wordpiece` (BERT-like)."""
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    if kind == "bytes":
        inner = Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer: Any = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    elif kind == "metaspace":
        inner = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
        inner.pre_tokenizer = pre_tokenizers.Metaspace()
        inner.decoder = decoders.Sequence([decoders.Metaspace(), decoders.ByteFallback()])
        bytes_ = [f"<0x{i:02X}>" for i in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special + bytes_)
    else:
        inner = Tokenizer(models.WordPiece(unk_token="<unk>"))
        inner.normalizer = normalizers.BertNormalizer(lowercase=True)
        inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        inner.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=special)
    inner.train_from_iterator(CORPUS * 3, trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    made.padding_side = "left"
    made.chat_template = CHAT_TEMPLATE
    return made


def config(family: str, **changes: Any) -> Any:
    """Config of a tiny model: 3 layers, 4 heads, 32 wide."""
    common: dict[str, Any] = {
        "vocab_size": len(tokenizer()),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 3,
    }
    if family == "gpt2":
        sizes: dict[str, Any] = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256}
    else:
        sizes = {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 256,
        }
        if family != "gpt_neox":
            sizes |= {"num_key_value_heads": 2, "head_dim": 8}
    if family in ("mistral", "gemma2"):
        sizes["sliding_window"] = 8
    return AutoConfig.for_model(family, **common | sizes | changes)


def model(family: str, seed: int = 0, attn_implementation: str | None = None, **changes: Any) -> Any:
    """A random model in float32, of weights large enough that attention is far from uniform."""
    torch.manual_seed(seed)
    options = {"attn_implementation": attn_implementation} if attn_implementation else {}
    made = AutoModelForCausalLM.from_config(config(family, **changes), dtype=torch.float32, **options).eval()
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if weight.ndim == 2 and "emb" not in name and "wte" not in name and "wpe" not in name:
                weight.mul_(6)
    made.generation_config.eos_token_id = 2
    made.generation_config.pad_token_id = 3
    return made


def save(folder: Any, family: str = "llama", kind: str = "bytes", **changes: Any) -> str:
    """A model and its tokenizer in a local folder, as `--model_name` takes it."""
    model(family, **changes).save_pretrained(folder)
    tokenizer(kind).save_pretrained(folder)
    return str(folder)


def save_scripted(folder: Any, start: str, script: str, kind: str = "bytes") -> str:
    """A model that continues a prompt that ends like `start` with the tokens of `script`, whatever stands before.

    Each token says the next one alone: attention and MLP add nothing. So no token may come twice.
    """
    words = tokenizer(kind)
    ids = words(start, add_special_tokens=False)["input_ids"][-1:]
    ids += words(script, add_special_tokens=False)["input_ids"]
    assert len(set(ids)) == len(ids), f"a token comes twice: {words.convert_ids_to_tokens(ids)}"
    made = model("llama", vocab_size=len(words), hidden_size=128)
    with torch.no_grad():
        for layer in made.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        states = torch.nn.functional.normalize(made.model.embed_tokens.weight)
        made.lm_head.weight.zero_()
        for before, after in itertools.pairwise(ids):
            made.lm_head.weight[after] = states[before]
    made.save_pretrained(folder)
    words.save_pretrained(folder)
    return str(folder)


# --- every family that transformers has

SIZES = {
    32: "hidden_size d_model n_embd emb_dim embedding_size input_embedding_size output_embedding_size "
    "word_embed_proj_dim lru_width attention_hidden_size embedding_dim router_hidden_size dim_model_base",
    48: "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim n_inner dff dim_ff d_inner "
    "feed_forward_size ffn_hidden_size intermediate_size_mlp shared_intermediate_size "
    "dense_intermediate_size",
    16: "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size index_head_dim d_rel "
    "rel_extent shared_experts_intermediate_size o_lora_rank local_attn_chunk_length "
    "lsh_attn_chunk_length",
    3: "num_hidden_layers num_layers n_layer n_layers decoder_layers encoder_layers num_decoder_layers "
    "num_encoder_layers num_blocks num_layers_per_stack",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads "
    "attention_heads num_decoder_attention_heads num_encoder_attention_heads num_experts "
    "num_local_experts n_routed_experts moe_num_experts swa_num_attention_heads index_n_heads "
    "linear_num_key_heads linear_num_value_heads rotary_dim laurel_rank qk_rope_head_dim index_topk "
    "zero_expert_num",
    2: "num_key_value_heads num_kv_heads swa_num_key_value_heads num_experts_per_tok num_experts_per_token "
    "moe_topk altup_num_inputs depth num_query_groups",
    8: "head_dim swa_head_dim sliding_window sliding_window_size attention_window_size window_size d_head "
    "dim_head attention_head_size kv_channels kv_lora_rank q_lora_rank qk_nope_head_dim v_head_dim "
    "hidden_size_per_layer_input attention_head_dim linear_key_head_dim linear_value_head_dim "
    "index_block_size local_attention gated_norm_rank attention_chunk_size hc_lowrank ple_embed_dim",
    256: "max_position_embeddings n_positions n_ctx max_target_positions max_seq_len model_max_length",
    512: "vocab_size vocab_size_per_layer_input unpadded_vocab_size",
    1: "n_group topk_group bos_token_id num_kv_shared_layers prompt_length first_k_dense_replace",
}
SMALL: dict[str, Any] = {name: size for size, names in SIZES.items() for name in names.split()}
SMALL |= {
    "qk_head_dim": 12,
    "eos_token_id": 2,
    "pad_token_id": 3,
    "decoder_start_token_id": 1,
    "cls_token_id": 1,
    "sep_token_id": 2,
}
# What of a family's own settings does not follow from these sizes.
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 8}
SHARED_KEYS = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
HYBRID = {"layers_block_type": ["linear_attention", "hybrid", "hybrid"], "mamba_headdim": 8}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
MIXED_LAYERS = ["sliding_attention", "full_attention", "full_attention"]
OWN: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"head_dim": 8, "n_group": 1, "topk_group": 1},
    "longcat_flash": {"head_dim": 4},
    "bamba": MAMBA,
    "granitemoehybrid": MAMBA,
    "mamba2": {"head_dim": 16, "chunk_size": 8, "n_groups": 1, "state_size": 8},
    "dots1": {"n_shared_experts": 1},
    "ernie4_5_moe": {"moe_k": 2},
    "gemma3n_text": {
        "num_kv_shared_layers": 1,
        "layer_types": MIXED_LAYERS,
        "activation_sparsity_pattern": [0.0] * 3,
    },
    "gemma4_text": SHARED_KEYS,
    "gemma4_unified_text": SHARED_KEYS,
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "full_attention"]},
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [16, 16]},
    "zamba": {"num_hidden_layers": 8, "attention_hidden_size": 64, "attention_head_dim": 16},
    "zamba2": HYBRID | {"attention_hidden_size": 64, "attention_head_dim": 16},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE}},
    "xmod": {"default_language": "en_XX"},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}, "ffn_config": {"ffn_hidden_size": 32}},
    "zaya": {"num_experts_per_tok": 1},
}
# Refused in one line: layers without attention, or attention and states of another kind.
REFUSED_FAMILIES = """
axk2 bailing_hybrid bamba big_bird bloom camembert codegen cpmant data2vec-text deepseek_v32 deepseek_v4
diffllama dots3_note_text falcon falcon_h1 falcon_mamba gemma3n_text git glm_moe_dsa gpt_neo gpt_neox_japanese
gptj granitemoehybrid hrm_text hy_v4 inkling2_text inkling_text jamba kimi_linear lfm2_moe lfm3 longcat_flash
mamba mamba2 megatron-bert minimax mpt mvp nemotron_h olmo_hybrid openai-gpt prophetnet qwen3_5 qwen3_5_moe
qwen3_5_moe_text qwen3_5_text qwen3_next qwen4_exp qwen4_exp_text recurrent_gemma reformer rembert roberta
roberta-prelayernorm roformer rwkv trocr xglm xlm xlm-roberta xlm-roberta-xl xlnet xlstm xmod zamba zamba2
zaya
"""
REFUSED = set(REFUSED_FAMILIES.split())
# What the tokens alone do not run, or what cannot be made from a config.
NOT_ALONE = {
    "blt": "patches of bytes by a second model",
    "dots3_note": "its layers' own settings do not fit fewer layers",
    "emu3": "a part of a larger checkpoint",
    "gemma3n": "needs timm",
    "gemma4_assistant": "reads another model's states",
    "gemma4_unified_assistant": "reads another model's states",
    "mllama": "a part of a larger checkpoint",
    "musicgen": "a part of a larger checkpoint",
    "musicgen_melody": "a part of a larger checkpoint",
}


def any_config(family: str) -> Any:
    """Config of a tiny model of any family, decoder parts and towers alike."""
    default = AutoConfig.for_model(family)
    return AutoConfig.for_model(family, **_small(default))


def _small(config: Any) -> dict[str, Any]:
    sizes = {name: size for name, size in SMALL.items() if name in config.to_dict()}
    for name in config.sub_configs:
        if getattr(config, name, None) is not None:
            sizes[name] = _small(getattr(config, name))
    if "kv_lora_rank" in config.to_dict():  # keys and values of every head come from one latent
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    if "qk_rope_head_dim" in config.to_dict():
        sizes.pop("head_dim", None)
    if hasattr(config, "is_decoder"):
        sizes["is_decoder"] = True
    return sizes | OWN.get(config.model_type, {})


def save_any(folder: Any, family: str, config: Any = None) -> str:
    """As `save`, for any family or config."""
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(any_config(family) if config is None else config, dtype=torch.float32)
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if weight.ndim == 2 and "emb" not in name:
                weight.mul_(3)
    made.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)
