"""Convert a GGUF model to a folder of safetensors, with its tokenizer and chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging


def convert_gguf(folder: Path, gguf: str, target: Path) -> Path:
    """Write the GGUF model `folder/gguf` to `target` as safetensors with its tokenizer and chat template.

    Weights stay float32: a dequantised Q4_1 weight is `d * q + m` with float16 `d` and `m`, which neither float16 nor
    bfloat16 holds exactly.
    """
    transformers_logging.disable_progress_bar()
    read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf, dtype=torch.float32)
    # A model read from GGUF refuses save_pretrained, a fresh one with the same weights does not.
    settings = read.config.to_dict()
    for key in ("quantization_config", "_model_name_or_path"):
        settings.pop(key, None)
    config = type(read.config).from_dict(settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    model.save_pretrained(target)
    _gguf_tokenizer(folder, gguf, config.max_position_embeddings).save_pretrained(target)
    return target


def _gguf_tokenizer(folder: Path, gguf: str, max_length: int) -> Any:
    """The tokenizer of a GGUF file, splitting numbers as the file says (transformers drops that setting)."""
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf, model_max_length=max_length)
    field = GGUFReader(folder / gguf).get_field("tokenizer.ggml.pre")
    if field is not None and field.contents() == "smollm":
        # As in the original tokenizer.json: each digit alone, cut off before the byte-level rule sees the spaces.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    return tokenizer
