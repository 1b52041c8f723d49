"""Score responses with a reward model: raw logits, the same alone as in a batch, in a notebook or for a whole run.

Reads   outputs/<run>/<style>/activations_*.pt
Writes  results/<run>/<style>_scores.csv                  one line per response, raw scores
        results/<run>/<style>_aggregates.json and .txt    n, min, quartiles, max, mean, standard deviation
        results/<run>/rewards_summary.csv                 per style: mean, paired difference to normal, interval, p
        results/<run>/rewards.png

    python 4_semantics_eval/run_scripts/score_scripts.py --run_dir outputs/demo/instructions --device 0

In a notebook, after a line that puts this folder on sys.path:

    from score_scripts import load_reward_model, score_predictions_and_save
    rm_pipeline = load_reward_model("OpenAssistant/reward-model-deberta-v3-large-v2", device=0)  # or "cuda:0"
    scored_list = score_predictions_and_save(pt_dir=pt_dir, rm_pipeline=rm_pipeline, raw_csv_path=raw_csv_path,
                                             agg_base_path=agg_base_path)

Two kinds of reward model: `pair` (an encoder such as DeBERTa that reads question and answer as two texts) and `chat`
(a decoder such as Skywork-Reward-V2 that reads a conversation in its chat template). The question is the clean prompt
of the row, so that the answer is judged by what was meant; with `--score_against style` it is the prompt as asked.
A score is the model's logit, never its sigmoid; only scores of one model can be compared.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / place) for place in ("", "../1_utils/run_scripts")]

from command_line import UserError, make_parser, one_line, run_main
from file_output import atomic_path, write_csv, write_json, write_text
from logger import get_logger
from read_predictions import Prediction, iter_predictions
from run_store import Run, open_run, warn_unfinished
from semantics.aligned_responses import by_style, clean_prompt
from token_spans import render_chat

if TYPE_CHECKING:
    import pandas as pd
    import torch

DEFAULT_REWARD_MODEL = "OpenAssistant/reward-model-deberta-v3-large-v2"
SCORE_AGAINST = ("clean", "style")
PAIR_MAX_LENGTH, CHAT_MAX_LENGTH = 512, 16384  # tokens, where neither model nor tokenizer says less
Encoded = tuple[dict[str, list[int]], bool, str]  # the model's inputs (empty: not scored), whether cut, why not scored
BATCHES_AT_ONCE = 32  # batches that are sorted by length together
COLUMNS = (
    "style", "original_index", "element_index", "sample", "question", "response", "reward_score", "truncated",
    "score_against", "identical", "reward_model", "note",
)  # fmt: skip


# --- reward models


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
        import torch

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
        import torch

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
    config, tokenizer = _load_config_and_tokenizer(rm_name, revision, trust_remote_code)
    kind = _kind(rm_name, config, tokenizer)
    RewardModel(rm_name, None, tokenizer, kind, 0).check_reads_both()  # before the weights, which may be large
    chosen = dtype or ("auto" if kind == "chat" and place.type != "cpu" else "float32")
    model = _load_weights(rm_name, chosen, revision, trust_remote_code).to(place).eval()
    return _wrap(rm_name, model, tokenizer, kind, max_length, batch_size, revision)


def _wrap(
    name: str,
    model: Any,
    tokenizer: Any,
    kind: str,
    max_length: int | None = None,
    batch_size: int = 8,
    revision: str | None = None,
) -> RewardModel:
    length = max_length or _longest(model.config, tokenizer, kind)
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
    import torch

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


def _load_config_and_tokenizer(name: str, revision: str | None, trust_remote_code: bool) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
        return config, AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise _cannot_load(name, error) from None


def _load_weights(name: str, dtype: str, revision: str | None, trust_remote_code: bool) -> Any:
    from transformers import AutoModelForSequenceClassification

    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            name, dtype=dtype, revision=revision, trust_remote_code=trust_remote_code, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        raise _cannot_load(name, error) from None
    if model.config.num_labels != 1:
        raise UserError(f"{name}: gives {model.config.num_labels} labels, not one score: it is no reward model")
    if missing := sorted(info["missing_keys"]):
        # transformers fills a missing head with random numbers, and any language model would pass for a judge
        raise UserError(f"{name}: has no weights for {missing[0]}: it is no trained reward model; choose another")
    return model


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
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    if getattr(tokenizer, "chat_template", None):
        return "chat"
    if config.model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        raise UserError(f"{name}: is a decoder without a chat template, so how it reads a conversation is unknown")
    return "pair"


def _longest(config: Any, tokenizer: Any, kind: str) -> int:
    """The number of tokens that the model reads: the least of what tokenizer and model say and this script's limit."""
    told = getattr(config.get_text_config(), "max_position_embeddings", None) or CHAT_MAX_LENGTH
    return min(int(tokenizer.model_max_length), int(told), PAIR_MAX_LENGTH if kind == "pair" else CHAT_MAX_LENGTH)


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
    if model.config.num_labels != 1:
        raise UserError(f"{name}: gives {model.config.num_labels} labels, not one score: it is no reward model")
    rm = _wrap(name, model.eval(), tokenizer, _kind(name, model.config, tokenizer))
    rm.check_reads_both()
    return rm


# --- scoring


def score_predictions_and_save(
    pt_dir: str | Path,
    rm_pipeline: Any,
    raw_csv_path: str | Path,
    agg_base_path: str | Path,
    score_against: str = "clean",
    batch_size: int | None = None,
    max_samples: int | None = None,
) -> list[dict[str, Any]]:
    """Score every response under `pt_dir` (a style's folder, a run folder, or one .pt file).

    Writes raw scores to `raw_csv_path` and aggregates to `agg_base_path` + ".json" and ".txt". Returns the lines of
    the CSV as dicts, each with "reward_score" (NaN where a response could not be scored; `note` says why); an empty
    folder gives []. score_against: "clean" or "style"; where no clean form is known it is the style's own prompt,
    which is said, and stands in the column. Raises UserError for a missing folder or a damaged file.
    """
    rm = as_reward_model(rm_pipeline)
    items: list[dict[str, Any]] = []
    for item in _write_scores(_scored(pt_dir, rm, score_against, None, batch_size, max_samples), raw_csv_path):
        items.append(item)
    if not items:
        get_logger().warning("%s: nothing to score", pt_dir)
    _write_aggregates(agg_base_path, _Tally.of(items), rm, score_against)
    return items


def _scored(
    pt_dir: str | Path,
    rm: RewardModel,
    score_against: str,
    styles: Sequence[str] | None,
    batch_size: int | None,
    max_samples: int | None,
) -> Iterator[dict[str, Any]]:
    """The items of a run in order; only some batches are in memory."""
    if score_against not in SCORE_AGAINST:
        raise UserError(f"score_against is {score_against!r}; choose clean or style")
    run = _open(Path(pt_dir))
    if run is None:
        return
    predictions = (
        one for one in iter_predictions(run, styles) if max_samples is None or one.original_index < max_samples
    )
    lines = (_item(run, one, rm.name, against) for one, against in _with_question(run, predictions, score_against))
    size = batch_size or rm.batch_size
    while chunk := list(islice(lines, size * BATCHES_AT_ONCE)):
        ready = [line for line in chunk if not line["note"]]
        scores = rm([(line["question"], line["response"]) for line in ready], size)
        for line, score in zip(ready, scores, strict=True):
            line |= score._asdict()
        yield from chunk


def _open(path: Path) -> Run | None:
    """The run at `path`; None for a folder in which there is nothing to score."""
    if path.is_dir() and not any(path.glob("activations_*.pt")) and not any(path.glob("*/activations_*.pt")):
        return None
    return open_run(path)


def _with_question(run: Run, predictions: Iterable[Prediction], score_against: str) -> Iterator[tuple[Prediction, str]]:
    """Each prediction with what it is scored against; a run that knows no clean forms is scored against its prompts."""
    known = run.clean_style is not None or any(clean_prompt(run, index) is not None for index in range(len(run.rows)))
    if score_against == "clean" and not known:
        get_logger().warning("%s: no clean prompts are known; scoring against each style's own prompt", run.path)
        score_against = "style"
    for one in predictions:
        yield one, score_against


def _item(run: Run, one: Prediction, reward_model: str, score_against: str) -> dict[str, Any]:
    clean = clean_prompt(run, one.original_index)
    if clean is None and one.style == run.clean_style:
        clean = one.prompt
    question = clean if score_against == "clean" else one.prompt
    note = ""
    if question is None:
        note = f"the {score_against} prompt of this row is not known"
    elif one.response is None:
        note = "the response cannot be told from the prompt"
    return {
        "style": one.style,
        "original_index": one.original_index,
        "element_index": one.element_index,
        "sample": one.sample,
        "question": question,
        "response": one.response,
        "reward_score": math.nan,
        "truncated": False,
        "score_against": score_against,
        "identical": one.style != run.clean_style and one.prompt is not None and one.prompt == clean,
        "reward_model": reward_model,
        "note": note,
    }


# --- files


def _write_scores(items: Iterable[dict[str, Any]], path: str | Path) -> Iterator[dict[str, Any]]:
    """Hand the items through while they are written; the CSV appears when all have been."""
    with (
        atomic_path(path) as temporary,
        open(temporary, "w", newline="", encoding="utf-8", errors="backslashreplace") as handle,
    ):
        writer = csv.DictWriter(handle, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for item in items:
            writer.writerow(item | {"reward_score": _number(item["reward_score"])})
            yield item


def _number(score: float) -> float | str:
    return "" if math.isnan(score) else score


@dataclass
class _Tally:
    """What the aggregates need of the items, without their texts."""

    scores: list[float] = field(default_factory=list)
    unscored: int = 0
    truncated: int = 0
    empty: int = 0
    against: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, items: Iterable[dict[str, Any]]) -> _Tally:
        tally = cls()
        for item in items:
            tally.add(item)
        return tally

    def add(self, item: dict[str, Any]) -> None:
        self.against.add(item["score_against"])
        self.truncated += item["truncated"]
        self.empty += item["response"] is not None and not item["response"].strip()
        if math.isnan(item["reward_score"]):
            self.unscored += 1
        else:
            self.scores.append(item["reward_score"])


def aggregate(scores: Sequence[float]) -> dict[str, float | int | None]:
    """n, min, q1, median, q3, max, mean, standard_deviation (of the sample, n - 1); None where undefined."""
    import numpy as np

    names = ("min", "q1", "median", "q3", "max")
    if not len(scores):
        return {"n": 0, **dict.fromkeys((*names, "mean", "standard_deviation"))}
    values = np.asarray(scores, dtype=np.float64)
    quartiles = np.quantile(values, [0, 0.25, 0.5, 0.75, 1]).tolist()
    spread = float(values.std(ddof=1)) if len(values) > 1 else None
    return {
        "n": len(values),
        **dict(zip(names, quartiles, strict=True)),
        "mean": float(values.mean()),
        "standard_deviation": spread,
    }


def _write_aggregates(base: str | Path, tally: _Tally, rm: RewardModel, score_against: str) -> None:
    counts = {"n_unscored": tally.unscored, "n_truncated": tally.truncated, "n_empty_responses": tally.empty}
    against = ", ".join(sorted(tally.against)) or score_against
    content = {**aggregate(tally.scores), **counts, "score_against": against, **rm.settings}
    write_json(f"{base}.json", content)
    lines = [f"{name:20} {value:.6g}" if isinstance(value, float) else f"{name:20} {value}" for name, value in
             content.items()]  # fmt: skip
    write_text(f"{base}.txt", "\n".join(lines) + "\n")


def summarise(items: pd.DataFrame, run: Run) -> pd.DataFrame:
    """rewards_summary.csv: per style the mean score and the paired, clustered difference to the clean style.

    items: style, original_index, reward_score, truncated, identical. Samples are averaged within a row first.
    """
    from paired_stats import paired_summary

    clusters = {index: run.template(index) for index in items["original_index"].unique()}
    table = paired_summary(items, "reward_score", cluster=clusters, baseline=run.clean_style or "normal")
    cut = items.groupby("style")["truncated"].sum()
    table["n_truncated"] = table["style"].map(cut)
    return table


# --- script


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__)
    data = parser.add_argument_group("data")
    data.add_argument("--run_dir", type=Path, required=True, help="run folder, style folder or .pt file of stage 2")
    data.add_argument("--results_dir", type=Path, help="default: results/<run name>")
    data.add_argument("--styles", nargs="+", help="styles to score; default: all of the run")
    data.add_argument("--max_samples", type=int, help="only the first rows of the prompt file")
    data.add_argument("--score_against", choices=SCORE_AGAINST, default="clean", help="the question the model is given")
    model = parser.add_argument_group("reward model")
    model.add_argument("--rm_name", default=DEFAULT_REWARD_MODEL, help="hub name or folder of the reward model")
    model.add_argument("--device", default="0", help="GPU number, cuda:0, mps or cpu (-1)")
    model.add_argument("--batch_size", type=int, default=8, help="texts at once")
    model.add_argument("--max_length", type=int, help="tokens; default: what the model reads, at most 512 or 16384")
    model.add_argument("--dtype", help="default: float32; a chat model on a GPU keeps its own")
    model.add_argument("--revision", help="commit or branch on the hub")
    model.add_argument("--trust_remote_code", action="store_true", help="run code from the model's repository")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Score all styles of a run; 1 where a response could not be scored."""
    args = parse_args(argv)
    import pandas as pd
    from semantics.response_plots import plot_rewards

    run = open_run(args.run_dir)
    warn_unfinished(run, args.styles, args.max_samples)
    folder = args.results_dir or Path("results") / run.name
    styles = args.styles or list(run.styles)
    rm = load_reward_model(
        args.rm_name, args.device, args.max_length, args.batch_size, args.dtype, args.revision, args.trust_remote_code
    )
    kept = pd.concat([_score_style(args, style, rm, folder) for style in styles], ignore_index=True)
    table = summarise(kept, run)
    table["reward_model"], table["score_against"] = rm.name, ", ".join(sorted(kept["score_against"].unique()))
    write_csv(folder / "rewards_summary.csv", table)
    plot_rewards(kept, table, folder / "rewards.png", rm.name)
    unscored = int(kept["reward_score"].isna().sum())
    _tell(table, unscored, folder)
    return 1 if unscored else 0


def _score_style(args: argparse.Namespace, style: str, rm: RewardModel, folder: Path) -> pd.DataFrame:
    """Score one style, write its files, and keep of each item what the summary needs."""
    import pandas as pd
    from tqdm import tqdm

    names = ("style", "original_index", "reward_score", "truncated", "identical", "score_against")
    tally, kept = _Tally(), []
    items = _scored(args.run_dir, rm, args.score_against, [style], args.batch_size, args.max_samples)
    for item in tqdm(_write_scores(items, folder / f"{style}_scores.csv"), desc=style, unit="response", disable=None):
        tally.add(item)
        kept.append(tuple(item[name] for name in names))
    _write_aggregates(folder / f"{style}_aggregates", tally, rm, args.score_against)
    return pd.DataFrame(kept, columns=list(names))


def _tell(table: pd.DataFrame, unscored: int, folder: Path) -> None:
    columns = ["style", "n", "estimate", "ci_low", "ci_high", "difference", "p_adjusted", "n_truncated"]
    get_logger().debug(table[columns].to_string(index=False, float_format=lambda x: f"{x:.3f}"))
    if unscored:
        get_logger().warning("%d responses are unscored; the column note says why", unscored)
    print(f"reward (raw logit): {by_style(table)}; wrote {folder / 'rewards_summary.csv'}")


if __name__ == "__main__":
    run_main(main)
