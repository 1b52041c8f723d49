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
