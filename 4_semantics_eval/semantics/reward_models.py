"""Reward models: load one, and score pairs of a question and an answer with it. A score is the raw logit."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from command_line import UserError, one_line
from logger import get_logger
from token_spans import render_chat
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

PAIR_MAX_LENGTH, CHAT_MAX_LENGTH = 512, 16384  # tokens, if neither model nor tokenizer says less
Encoded = tuple[dict[str, list[int]], bool, str]  # the model's inputs (empty: not scored), whether cut, why not scored


class RewardScore(NamedTuple):
    """A raw logit; NaN if the text cannot be scored, and `note` says why."""

    reward_score: float
    truncated: bool = False
    note: str = ""


@dataclass
class RewardModel:
    """A reward model ready to score. `rm(pairs)` with (question, answer) pairs gives one RewardScore each."""

    name: str
    model: Any
    tokenizer: Any
    kind: str  # "pair" or "chat"
    max_length: int
    batch_size: int = 8
    settings: dict[str, Any] = field(default_factory=dict)

    def __call__(self, pairs: Iterable[tuple[str, str]], batch_size: int | None = None) -> list[RewardScore]:
        """Scores in the order of `pairs`, whatever the batches they were computed in."""
        encode = self._encode_pair if self.kind == "pair" else self._encode_chat
        encoded = [encode(question, answer) for question, answer in pairs]
        order = sorted(
            (i for i, (inputs, _, _) in enumerate(encoded) if inputs), key=lambda i: len(encoded[i][0]["input_ids"])
        )
        scores = [math.nan] * len(encoded)
        size = batch_size or self.batch_size
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            for i, score in zip(chosen, self._logits([encoded[i][0] for i in chosen]), strict=True):
                scores[i] = score
        return [RewardScore(score, cut, note) for score, (_, cut, note) in zip(scores, encoded, strict=True)]

    def check_reads_both(self) -> None:
        """Raise UserError if the chat template or the tokenizer drops the question or the answer, or refuses them."""
        reader = "chat template" if self.kind == "chat" else "tokenizer"
        try:
            whole, other_answer, other_question = (
                self._chat_ids(*pair) if self.kind == "chat" else self.tokenizer(*pair, verbose=False)["input_ids"]
                for pair in (("Which one?", "It is four."), ("Which one?", "No idea"), ("Why so?", "It is four."))
            )
        except Exception as error:  # a template may raise what it likes
            why = one_line(str(error), 160)
            raise UserError(
                f"{self.name}: its {reader} refuses a question with an answer ({why}); choose another reward model"
            ) from None
        for name, other in (("answer", other_answer), ("question", other_question)):
            if other == whole:
                raise UserError(
                    f"{self.name}: its {reader} does not show the {name} to the model, so different {name}s would get "
                    "the same score; choose another reward model, or correct its chat template"
                )

    def _encode_pair(self, question: str, answer: str) -> Encoded:
        inputs = self.tokenizer(question, answer, verbose=False)
        if len(inputs["input_ids"]) <= self.max_length:
            return dict(inputs), False, ""
        # The longer of the two texts is cut first, as the transformers pipeline does.
        return dict(self.tokenizer(question, answer, truncation=True, max_length=self.max_length)), True, ""

    def _encode_chat(self, question: str, answer: str) -> Encoded:
        """The conversation; one too long loses the end of the answer, never the template's end, where the score is."""
        try:
            ids = self._chat_ids(question, answer)
            if len(ids) <= self.max_length:
                return {"input_ids": ids}, False, ""
            ends = [end for _, end in self._offsets(answer)]
            keep = len(ends)
            while keep > 0 and len(ids) > self.max_length:
                keep -= len(ids) - self.max_length
                ids = self._chat_ids(question, answer[: ends[keep - 1] if keep > 0 else 0])
        except Exception as error:  # a template may refuse one conversation and take the others
            return {}, False, f"the chat template refuses this conversation: {one_line(str(error), 160)}"
        if keep > 0:
            return {"input_ids": ids}, True, ""
        part = "question alone exceeds" if len(ids) > self.max_length else "question leaves no room for the answer in"
        return {}, True, f"the {part} {self.max_length} tokens"

    def _offsets(self, text: str) -> list[tuple[int, int]]:
        return self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)[
            "offset_mapping"
        ]

    def _chat_ids(self, question: str, answer: str) -> list[int]:
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        text = render_chat(self.tokenizer, messages)
        begin = self.tokenizer.bos_token
        if not begin or not text.startswith(begin):
            return self.tokenizer(text, verbose=False)["input_ids"]
        # The template writes a BOS and most tokenizers add theirs: exactly one may stay.
        ids = self.tokenizer(text.removeprefix(begin), verbose=False)["input_ids"]
        first = self.tokenizer.bos_token_id
        return ids if ids[:1] == [first] else [first, *ids]

    def _logits(self, batch: list[dict[str, list[int]]]) -> list[float]:
        """Raw logit of each encoded text. A batch that does not fit in memory is halved."""
        try:
            with torch.inference_mode():
                logits = self.model(**self._padded(batch)).logits
            return logits[:, 0].float().tolist()
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise UserError(
                    f"{self.name}: no memory for one text of {len(batch[0]['input_ids'])} tokens; lower --max_length"
                ) from None
        torch.cuda.empty_cache()
        half = len(batch) // 2
        return self._logits(batch[:half]) + self._logits(batch[half:])

    def _padded(self, batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        """Tensors [B, S], padded on the right: positions then count from 0 in every row, with or without padding."""
        fill = {"input_ids": self._pad_id(batch), "token_type_ids": self.tokenizer.pad_token_type_id}
        width = max(len(inputs["input_ids"]) for inputs in batch)
        batch = [{"attention_mask": [1] * len(inputs["input_ids"]), **inputs} for inputs in batch]
        return {
            name: torch.tensor(
                [inputs[name] + [fill.get(name, 0)] * (width - len(inputs[name])) for inputs in batch],
                device=self.model.device,
            )
            for name in batch[0]
        }

    def _pad_id(self, batch: list[dict[str, list[int]]]) -> int:
        """A decoder's score is read at the last token that is not the pad token: no text may end in that one.

        With eos as the pad token (a common setting) a text's own last eos would be passed over. Pads are masked, so
        any other token serves.
        """
        own = self.tokenizer.pad_token_id
        if self.kind == "pair":
            return own or 0
        last = {inputs["input_ids"][-1] for inputs in batch} | {self.tokenizer.eos_token_id}
        candidates = [own] if own is not None else []
        pad = next(token for token in (*candidates, *range(len(last) + 1)) if token not in last)
        self.model.config.get_text_config().pad_token_id = pad
        return pad


def load_reward_model(
    rm_name: str,
    device: int | str | torch.device = 0,
    max_length: int | None = None,
    batch_size: int = 8,
    dtype: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> RewardModel:
    """Load a reward model (hub name or folder) on `device`: an int (GPU number; -1: CPU), "cuda:0", "cpu" or a device.

    Where the device does not exist, says so once and uses the CPU. A tokenizer with a chat template makes a `chat`
    model, otherwise it is a `pair` model. dtype: default float32, for a chat model on a GPU the checkpoint's own.
    Raises UserError where the model cannot be had, has more than one label, or has no trained reward head.
    """
    place = _device(device)
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(rm_name, **options)
        tokenizer = AutoTokenizer.from_pretrained(rm_name, **options)
        kind = _kind(rm_name, config, tokenizer)
        RewardModel(rm_name, None, tokenizer, kind, 0).check_reads_both()  # before the weights, which may be large
        chosen = dtype or ("auto" if kind == "chat" and place.type != "cpu" else "float32")
        model, info = AutoModelForSequenceClassification.from_pretrained(
            rm_name, dtype=chosen, output_loading_info=True, **options
        )
    except (OSError, ValueError) as error:
        raise _cannot_load(rm_name, error) from None
    _check_one_label(rm_name, model)
    if missing := sorted(info["missing_keys"]):
        # transformers fills a missing head with random numbers, and any language model would pass for a judge
        raise UserError(f"{rm_name}: has no weights for {missing[0]}: it is no trained reward model; choose another")
    return _wrap(rm_name, model.to(place).eval(), tokenizer, kind, max_length, batch_size, revision)


def _check_one_label(name: str, model: Any) -> None:
    if model.config.num_labels != 1:
        raise UserError(f"{name}: gives {model.config.num_labels} labels, not one score: it is no reward model")


def _wrap(
    name: str,
    model: Any,
    tokenizer: Any,
    kind: str,
    max_length: int | None = None,
    batch_size: int = 8,
    revision: str | None = None,
) -> RewardModel:
    stated = getattr(model.config.get_text_config(), "max_position_embeddings", None) or CHAT_MAX_LENGTH
    most = PAIR_MAX_LENGTH if kind == "pair" else CHAT_MAX_LENGTH
    length = max_length or min(int(tokenizer.model_max_length), int(stated), most)
    settings = {
        "reward_model": name,
        "revision": revision,
        "kind": kind,
        "max_length": length,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
    }
    return RewardModel(name, model, tokenizer, kind, length, batch_size, settings)


def _device(device: int | str | torch.device) -> torch.device:
    try:
        if isinstance(device, int) or (isinstance(device, str) and device.lstrip("-").isdigit()):
            number = int(device)
            wanted = torch.device("cpu") if number < 0 else torch.device("cuda", number)
        else:
            wanted = torch.device(device)
    except RuntimeError:
        raise UserError(f"{device!r} is no device; give a GPU number, cuda:0, mps or cpu") from None
    backends = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if (wanted.index or 0) < backends.get(wanted.type, 0):
        return wanted
    get_logger().info("no device %s here: the reward model runs on the CPU", wanted)
    return torch.device("cpu")


def _cannot_load(name: str, error: Exception) -> UserError:
    if "gated" in str(error).lower():
        return UserError(f"{name}: is gated; accept its licence on the hub and log in with `hf auth login`")
    if "connect" in str(error) and not Path(name).exists():
        return UserError(
            f"{name}: not in the local cache, and the hub cannot be reached; go online once, or give a local folder"
        )
    why = one_line(str(error), 160)
    return UserError(f"{name}: cannot be loaded as a reward model ({why}); give a folder, or a name on the hub")


def _kind(name: str, config: Any, tokenizer: Any) -> str:
    if getattr(tokenizer, "chat_template", None):
        return "chat"
    if config.model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        raise UserError(f"{name}: is a decoder without a chat template, so how it reads a conversation is unknown")
    return "pair"


def as_reward_model(rm_pipeline: Any) -> RewardModel:
    """`rm_pipeline` itself, or a transformers text-classification pipeline turned into one (raw logits, no sigmoid).

    Raises TypeError for anything else and UserError for a pipeline with several labels.
    """
    if isinstance(rm_pipeline, RewardModel):
        return rm_pipeline
    model, tokenizer = getattr(rm_pipeline, "model", None), getattr(rm_pipeline, "tokenizer", None)
    if model is None or tokenizer is None:
        raise TypeError("rm_pipeline must come from load_reward_model or transformers.pipeline('text-classification')")
    name = str(model.config.name_or_path)
    _check_one_label(name, model)
    rm = _wrap(name, model.eval(), tokenizer, _kind(name, model.config, tokenizer))
    rm.check_reads_both()
    return rm
