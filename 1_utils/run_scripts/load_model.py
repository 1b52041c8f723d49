"""Load any causal language model of the Hugging Face hub or of a local folder, with one-line errors."""

from __future__ import annotations

import os
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from command_line import UserError, one_line
from huggingface_hub import try_to_load_from_cache
from run_store import fingerprint
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

DTYPES = ("auto", "float32", "bfloat16", "float16")


def load_tokenizer(model_name: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """Tokenizer of a model: left padding, and a pad token of its own (see `ensure_pad_token`).

    Raises UserError (missing, gated, no network, a tokenizer that knows no character offsets).
    """
    _check_folder(model_name)
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_name, padding_side="left", **options)
    except Exception as error:
        raise _load_error(error, model_name, "tokenizer") from error
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"{model_name}: its tokenizer knows no character offsets; use a model with a fast tokenizer")
    ensure_pad_token(tokenizer)
    return tokenizer


def ensure_pad_token(tokenizer: Any) -> None:
    """Give the tokenizer a pad token where it has none: its unknown token, else its end-of-text token.

    Every place that counts tokens goes by the attention mask, so that a pad that equals eos hides no real eos.
    """
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        tokenizer.add_special_tokens({"pad_token": tokenizer.convert_ids_to_tokens(0)})


def load_config(model_name: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """Config of a model, without its weights. Raises UserError as `load_model` does."""
    _check_folder(model_name)
    try:
        return AutoConfig.from_pretrained(model_name, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise _load_error(error, model_name, "config") from error


def resolve_dtype(dtype: str, config: Any, device_map: str | None = None) -> str:
    """`auto` is the checkpoint's own dtype on an accelerator, and float32 on a CPU.

    bfloat16 is quicker on a CPU that multiplies it, but greedy text then depends on the batch: ask for it by name.
    """
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: choose one of {', '.join(DTYPES)}")
    if dtype != "auto":
        return dtype
    if default_device(device_map) == "cpu":
        return "float32"
    own = getattr(config.get_text_config(decoder=True), "dtype", None) or getattr(config, "dtype", None)
    return str(own or "float32").removeprefix("torch.")


def default_device(device_map: str | None = None) -> str:
    """`cuda:<LOCAL_RANK>`, `mps` or `cpu`; with a `device_map` of one device's name, that one."""
    if device_map not in (None, "auto", "balanced", "balanced_low_0", "sequential"):
        return str(device_map)
    if torch.cuda.is_available():
        return f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def load_model(
    model_name: str,
    dtype: str = "auto",
    device_map: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
) -> tuple[Any, Any]:
    """Model in evaluation mode, and its tokenizer.

    `device_map` None: one device, the process's GPU where there is one (LOCAL_RANK under `accelerate launch`), else
    the CPU. `"auto"`: spread over all GPUs by accelerate. A device's name: there.
    Raises UserError: gated or missing model, no network, no memory, unknown dtype.
    """
    tokenizer = load_tokenizer(model_name, revision, trust_remote_code)
    config = load_config(model_name, revision, trust_remote_code)
    resolved = getattr(torch, resolve_dtype(dtype, config, device_map))
    spread = device_map in ("auto", "balanced", "balanced_low_0", "sequential")
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code, "dtype": resolved}
    target = device_map if spread else default_device(device_map)
    if attn_implementation:
        options["attn_implementation"] = attn_implementation
        if attn_implementation == "flex_attention" and target == "cpu":
            raise UserError("--attn_implementation flex_attention: PyTorch has it for GPUs only; use sdpa on a CPU")
    # Straight onto the device where it is no CPU, so that the weights never lie in memory twice.
    if target != "cpu":
        options["device_map"] = target
    try:
        model = AutoModelForCausalLM.from_pretrained(model_name, **options)
    except Exception as error:
        raise _load_error(error, model_name, "model") from error
    return model.eval(), tokenizer


def scaled_logits(config: Any, logits: Any) -> Any:
    """What a model makes of its head's logits, by its text config: scale and soft cap."""
    logits = logits * (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    return (logits / softcap).tanh() * softcap if softcap else logits


def model_fingerprint(model_name: str, config: Any) -> str:
    """What differs between two models of one name: the hub's commit, or a hash over a local folder's files."""
    folder = Path(model_name)
    if folder.is_dir():
        wanted = [p for p in folder.iterdir() if p.suffix in (".json", ".safetensors", ".bin", ".jinja", ".model")]
        return fingerprint(wanted)
    return str(getattr(config, "_commit_hash", None) or "unknown")


def _check_folder(model_name: str) -> None:
    """Raise UserError at once where a name means a local folder that is not there, rather than ask the hub for it."""
    folder = Path(model_name).expanduser()
    local = model_name.startswith((".", "/", "~")) or model_name.count("/") > 1
    if folder.exists() or not (local or ("/" in model_name and folder.parent.is_dir())):
        return
    if not local and isinstance(try_to_load_from_cache(model_name, "config.json"), str):
        return  # a hub id whose organisation is called like a folder here
    there = [path.parent.name for path in folder.parent.glob("*/config.json")]
    close = [name for name in there if folder.name.lower() in name.lower()] or get_close_matches(folder.name, there, 1)
    near = f"{folder.parent} holds {', '.join(sorted(there)[:5])}" if there else "check --model_name"
    near = f"did you mean {folder.parent / close[0]}?" if close else near
    raise UserError(f"{model_name}: no such folder; {near}")


def _load_error(error: Exception, model_name: str, part: str) -> UserError:
    """The one line for whatever the hub, the disk or the device said."""
    text = f"{type(error).__name__}: {error} {error.__cause__ or ''}"
    low = text.lower()
    if isinstance(error, MemoryError) or "out of memory" in low or "allocate memory" in low:
        return UserError(f"{model_name}: no memory for the {part}; use a smaller --dtype, --device_map auto, or more")
    if not Path(model_name).exists() and ("gated" in low or "401" in low or "403" in low):
        return UserError(f"{model_name}: access is restricted; accept its licence on the hub and run `hf auth login`")
    if "trust_remote_code" in low:
        return UserError(f"{model_name}: needs code of its own; if you trust its author, add --trust_remote_code")
    offline = ("offline", "couldn't connect", "connection", "max retries", "name resolution", "proxy", "timed out")
    if not Path(model_name).exists() and any(word in low for word in offline):
        return UserError(
            f"{model_name}: not in the local cache, and the hub cannot be reached; "
            "go online once, or give the path of a local folder"
        )
    if "not a local folder" in low or "404" in low or "repository not found" in low or "repo id must be" in low:
        return UserError(f"{model_name}: no such model on the hub and no such folder; check --model_name")
    return UserError(f"{model_name}: the {part} cannot be loaded ({one_line(text, 300)})")
