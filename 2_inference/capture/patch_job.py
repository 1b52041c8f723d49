"""One command of patching: pair the prompts of a run, load its model, prove, patch, and write patches_*.pt.

The run's own settings say how prompts are rendered. Rows are paired token by token: a row is left out, and counted, if
its style has no control of its length. A file holds the rows of ROWS_PER_FILE lines of the prompt file, so files do not
depend on how often a run was stopped.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Event
from typing import Any

import torch
from command_line import UserError, one_line
from file_output import gigabytes, remove_leftovers, write_json
from load_json import read_prompt_file
from load_model import load_config, load_model, load_tokenizer, model_fingerprint
from logger import get_logger
from paired_stats import deal
from run_store import (
    Run,
    differences,
    load_pt,
    locked,
    open_run,
    read_json_file,
    record_failures,
    save_pt,
    warn_unfinished,
)
from stamps import note_written
from style_names import MATCHED, is_control
from tqdm import tqdm

from capture.batching import FREE_SHARE, attention_layers, free_memory
from capture.decode import OutOfMemory, Prompt, memory_errors
from capture.job import EXIT_STOPPED, end_tokens, stopped_by_signals
from capture.patch_measures import HEAD_SITES, MEASURES, WHOLE_SITES, Cell, all_cells, in_order, measures, prove
from capture.patch_screen import (
    SIZES,
    Unit,
    UnitSet,
    attribution,
    best_sets,
    check_units,
    csv_sets,
    is_choosing,
    ranked,
)
from capture.patching import LIVE, SITES, Pair, Patch, Patcher, States
from capture.prompts import PromptReader, Rendering, StylePrompts, longest_prompt
from capture.recorder import cannot_capture, chosen_layers

ROWS_PER_FILE = 16
RESPONSE_TOKENS = 16
CPU_ROWS, GPU_ROWS = 32, 128  # patched rows in a batch; on a CPU more are slower
FAILURES = "patches_failures.csv"
WHOSE = ("", "recipient_", "donor_")  # a measure of the patched row, of the unpatched one, of the donor
ALWAYS_0_OR_1 = ("donor_nats", "donor_nats_first", "donor_restored")
ROW_ID = ("original_index", "element_index", "attribution")
ROWS_FOR_MEANS = 32
MOST_TOKENS = 32  # that --positions tokens patches one by one
CONTENT_FLAGS = (
    *("source", "directions", "sites", "positions", "layers", "response_tokens", "controls", "seed", "dtype"),
    *("screen", "ig_steps", "top_k", "ablate"),
)
ONE_TOKEN = ("edited_last", "readout")  # what a donor of another length has a counterpart for
log = get_logger("patch_activations")


@dataclass
class StylePlan:
    """The rows of a style that can be patched: {original index: (position in `clean`, position in `typo`)}."""

    style: str
    folder: Path
    clean: StylePrompts
    typo: StylePrompts
    rows: dict[int, tuple[int, int]]
    settings: dict[str, Any]
    dropped: int
    choosing: dict[int, bool]  # by row: whether it is of the half that chooses units
    sets: list[UnitSet]  # of --units_csv
    files: list[tuple[Path, list[int]]] = field(default_factory=list)

    @property
    def record(self) -> Path:
        """patches.json."""
        return self.folder / f"patches_{tag_of(self.settings['source'])}.json".replace("_.", ".")


def run_command(args: argparse.Namespace) -> int:
    """Patch what is missing; returns the exit code."""
    # 1. Plan, from the run, config and tokenizer alone.
    run = open_run(args.run_dir)
    warn_unfinished(run, args.styles, args.max_samples)
    config, reader = open_reader(args, run)
    args.layers = chosen_layers(args.layers, attention_layers(config) - 1, "--layers")
    plans = [plan_style(args, run, reader, style) for style in args.styles]
    for plan in plans:
        check_units(plan.sets, units_of(config), args.units_csv)
    for plan in plans:
        begin_patches(args, plan)
    todo = [plan for plan in plans if plan.files]
    if not todo:
        log.info(f"{run.path}: nothing to do, all rows are patched")
        return 0

    # 2. The model, and the work.
    model, tokenizer = load_model(args.model_name, args.dtype, args.device_map, args.revision, args.trust_remote_code)
    stop, whole = Event(), True
    with closing(Patcher(model, args.seed)) as patcher, stopped_by_signals(stop):
        patcher.shared_text = reader.shared_prefix()
        study = Study(args, patcher, reader, end_tokens(model, tokenizer))
        rows = sum(len(indices) for plan in todo for _, indices in plan.files)
        with tqdm(total=rows, desc=todo[0].style, unit="prompt", smoothing=0, dynamic_ncols=True) as bar:
            for plan in todo:
                bar.set_description(plan.style)
                for path, indices in plan.files:
                    whole &= study.run_file(plan, path, indices, bar, stop)
                    if stop.is_set():
                        return EXIT_STOPPED
    return int(not whole)


# --- plan


def open_reader(args: argparse.Namespace, run: Run) -> tuple[Any, PromptReader]:
    """(config, reader of the run's prompts as the run rendered them). Sets what `args` leaves to the run."""
    run.chosen(args.styles)  # raises for one that it does not have
    settings = run.settings(args.styles[0]).get("settings")
    if not settings:
        raise UserError(f"{run.path}: has no run.json, so its prompts cannot be made again; run stage 2 again")
    name = settings["model_name"]
    args.model_name = args.model_name or (f"models/{name}" if Path(f"models/{name}").is_dir() else name)
    args.revision, args.dtype = settings["revision"], args.dtype or settings["dtype"]
    args.stop_strings = settings["generation"]["stop_strings"]
    # A run of responses that were made elsewhere does not know how long they might have become.
    args.response_tokens = args.response_tokens or settings["generation"]["max_new_tokens"] or RESPONSE_TOKENS
    if args.source != "split" and (args.screen != "none" or args.units_csv):
        raise UserError(
            f"--source {args.source}: units are patched for all tokens, which have no counterpart; use split"
        )
    wrong = [*({*args.positions} - {*ONE_TOKEN}), *({*args.sites} & {*HEAD_SITES, "mlp_post"})]  # these take all tokens
    if args.source != "split" and wrong:
        raise UserError(
            f"--source {args.source}: prompts of unequal length have no counterpart for {wrong[0]}; leave it out"
        )
    config = load_config(args.model_name, args.revision, args.trust_remote_code)
    own, theirs = model_fingerprint(args.model_name, config), settings["model_fingerprint"]
    if own != theirs:
        raise UserError(
            f"--model_name {args.model_name}: is not the model of {run.path} ({own}, not {theirs}); name it"
        )
    tokenizer = load_tokenizer(args.model_name, args.revision, args.trust_remote_code)
    names = ("few_shot_text", "apply_chat_template", "system_prompt", "task_regex")
    place = run.path if (run.path / "prompts.json").is_file() else run.path.parent
    prompts = read_prompt_file(place / "prompts.json")
    longest = longest_prompt(config, args.response_tokens)
    rendering = Rendering(*(settings[name] for name in names))
    return config, PromptReader(prompts, tokenizer, rendering, longest, None, answer_room=args.response_tokens)


def plan_style(args: argparse.Namespace, run: Run, reader: PromptReader, style: str) -> StylePlan:
    """The pairs of a style, and which files are not there yet. Raises UserError if its folder holds other patches."""
    # 1. Its rows, those of them that have a counterpart, and a check that the tokens are those of the run.
    clean_key = reader.file.clean_key
    if is_control(style):
        raise UserError(f"--styles {style}: is a control, not a typo; name the style that it belongs to")
    if clean_key is None or style == clean_key:
        raise UserError(f"--styles {style}: patching compares a style with the clean form; name another style")
    known = run.settings(style)["settings"]
    limit = min(args.max_samples or known["max_samples"], known["max_samples"])
    clean = reader.style(f"{MATCHED}{style}" if args.source == "split" else clean_key, limit)
    typo = reader.style(style, limit)
    place_of = {index: place for place, (index, _) in enumerate(clean.texts)}
    pairs = {index: (place_of[index], place) for place, (index, _) in enumerate(typo.texts) if index in place_of}
    rows = {index: pair for index, pair in pairs.items() if _has_counterparts(reader, clean, typo, style, pair)}
    if not rows:
        hint = "try --source normal" if args.source == "split" else "name another style"
        raise UserError(f"{run.path}: no row of {style} has a counterpart to take states from; {hint}")
    content = run.load(run.files(style)[0])
    first, real = content["original_indices"][0], content["attention_mask"][0]
    if first in rows and content["input_ids"][0][real].tolist() != reader.prompt(typo, rows[first][1]).input_ids:
        raise UserError(f"{run.path}: this tokenizer reads row {first + 1} of {style} as other tokens than the run did")

    # 2. What decides the content of its files. A screen and mean states depend on all of its rows.
    settings = {name: getattr(args, name) for name in CONTENT_FLAGS}
    settings["rows_used"] = len(rows) if args.screen != "none" or args.ablate == "mean" else None
    sets = csv_sets(args.units_csv, style) if args.units_csv else []
    settings["sets"] = {one.name: one.units for one in sets}
    settings |= {"model_fingerprint": known["model_fingerprint"], "prompt_sha256": known["prompt_sha256"]}
    # Without a screen these halves are only compared; more rows may be patched later, and a template's half stays.
    choosing = {index: is_choosing(run.template(index), args.seed) for index in rows}
    if args.screen != "none":
        halves = deal((run.template(index) for index in rows), 2, args.seed)
        choosing = {index: halves[run.template(index)] == 0 for index in rows}
        if len(halves) < 2:
            raise UserError(
                f"--screen {args.screen}: all rows of {style} have one template, so none is left to estimate on; "
                "leave --screen out"
            )
    dropped = len(typo.texts) - len(rows)
    plan = StylePlan(style, run.styles[style], clean, typo, rows, settings, dropped, choosing, sets)
    log.info(f"{style}: {len(rows)} rows are one to one with {clean.style}; {plan.dropped} are not and are left out")
    return plan


def begin_patches(args: argparse.Namespace, plan: StylePlan) -> None:
    """Write patches.json beside the files, or find it the same, and plan what is missing. UserError: what differs."""
    # 1. The record. One without files binds nobody.
    tag = tag_of(args.source)
    with locked(plan.folder):
        if args.overwrite:
            for old in [plan.record, *plan.folder.glob(f"patches_{tag}[0-9]*.pt")]:
                old.unlink(missing_ok=True)
        known = read_json_file(plan.record) if plan.record.is_file() else {}
        settings = json.loads(json.dumps(plan.settings))  # as they will be read back
        found = differences(known.get("settings", {}), settings) if known else []
        if found and not any(plan.folder.glob(f"patches_{tag}[0-9]*.pt")):
            known = {}
        elif found:
            raise UserError(
                f"{plan.folder}: holds patches of other settings ({'; '.join(found)}); use these, or --overwrite"
            )
        new = known | {"settings": settings, "rows": len(plan.rows), "left_out": plan.dropped}
        if new != known:
            write_json(plan.record, new)

    # 2. The files.
    limit = max(plan.rows) + 1
    for start in range(0, limit, ROWS_PER_FILE):
        indices = [index for index in plan.rows if start <= index < start + ROWS_PER_FILE]
        path = plan.folder / f"patches_{tag}{start:05d}_{start + ROWS_PER_FILE:05d}.pt"
        if _is_whole(path, indices):
            note_written(path)
        elif indices and start // ROWS_PER_FILE % args.shard[1] == args.shard[0]:
            plan.files.append((path, indices))


def units_of(config: Any) -> dict[str, list[int]]:
    """{site: units of each layer} as far as the config tells, before the model is there to be asked."""
    text = config.get_text_config(decoder=True)
    counts = {"z": getattr(text, "num_attention_heads", None), "mlp_post": getattr(text, "intermediate_size", None)}
    return {site: [many] * attention_layers(config) for site, many in counts.items() if isinstance(many, int)}


def tag_of(source: str) -> str:
    """What the names of a source's files hold: `normal_`, nothing for `split`."""
    return "" if source == "split" else f"{source}_"


def _has_counterparts(
    reader: PromptReader, clean: StylePrompts, typo: StylePrompts, style: str, pair: tuple[int, int]
) -> bool:
    """Whether both prompts of a pair have edited tokens, in as many runs."""
    prompts = [(reader.prompt(one, place), one.names) for one, place in zip((clean, typo), pair, strict=True)]
    edited = [edited_tokens(prompt, names, style) for prompt, names in prompts]
    if not all(map(any, edited)):
        return False
    groups = [groups_of(one) for one in edited]
    return all(len(groups[0][name]) == len(groups[1][name]) for name in ONE_TOKEN)


def edited_tokens(prompt: Prompt, names: list[str], style: str) -> list[bool]:
    """Which tokens of a prompt lie in the edited words, or in the words that the style edits."""
    column = names.index("edited" if "edited" in names else f"edited:{style}")
    return [bool(inside) for inside in prompt.region_mask[:, column].tolist()]


def _is_whole(path: Path, indices: list[int]) -> bool:
    try:
        return {*indices} <= {*load_pt(path)["original_indices"]} if path.is_file() else False
    except UserError as error:
        log.warning(f"{error}; it is run again")
        return False


def groups_of(edited: list[bool]) -> dict[str, list[int]]:
    """Groups of a prompt's tokens, by position.

    edited, and edited_last: the last of each run of them; after: the others behind the first edited one; readout: the
    last token of the prompt (with the forced tokens after it), if it is not edited; all: from the first edited one on;
    before: the two before it; token_0, token_1 …: each of `all` alone, MOST_TOKENS of them.
    """
    places, last = [place for place, inside in enumerate(edited) if inside], len(edited) - 1
    singly = range(places[0], last + 1)[:MOST_TOKENS]
    return {
        "edited": places,
        "edited_last": [place for place in places if place == last or not edited[place + 1]],
        "after": [place for place in range(places[0], last) if not edited[place]],
        "readout": [] if edited[last] else [last],
        "all": [*range(places[0], last + 1)],
        "before": [*range(max(0, places[0] - 2), places[0])],
        **{f"token_{number}": [place] for number, place in enumerate(singly)},
    }


def likeliest(answers: torch.Tensor) -> torch.Tensor:
    """The largest of log-probabilities [B, A], on the CPU; NaN without answers."""
    return (answers.amax(1) if answers.shape[1] else torch.full((len(answers),), torch.nan)).cpu()


# --- run


class Study:
    """The rows of a run on one model."""

    def __init__(self, args: argparse.Namespace, patcher: Patcher, reader: PromptReader, ends: frozenset[int]):
        self.args, self.patcher, self.reader, self.ends = args, patcher, reader, ends
        self.batch_size = args.batch_size
        self.style = ""
        self.cells: list[Cell] = []
        self.pairs: dict[tuple[str, int, str], tuple[Pair, Pair]] = {}  # the last ones, whose responses were generated
        self.screened: list[str] = []
        self.scores: dict[tuple[str, int], dict[str, torch.Tensor]] = {}  # by style and row: the last attributions
        self.at_once = ROWS_PER_FILE  # rows in these

    def run_file(self, plan: StylePlan, path: Path, indices: list[int], bar: Any, stop: Event) -> bool:
        """Patch the rows of one file and write it, whole or not at all; returns whether every row could be run."""
        rows: list[dict[str, Any]] = []
        failed: dict[int, tuple[int | str, str]] = {}
        proof: dict[str, float] = {}
        for place, index in enumerate(indices):
            if stop.is_set():
                return True
            try:
                if not proof:
                    proof = self.prove(plan, path, index)
                    bar.unpause()  # the screen does not count for the rate
                with memory_errors():
                    row = self.run_row(plan, index, indices[(place + 1) % len(indices)])
                    rows.append(row | self.attributed(plan, index, indices))
            except OutOfMemory as error:
                failed[index] = self.reader.file.element_index(index), str(error)
            bar.update()
        record_failures(plan.folder, plan.style, indices, failed, FAILURES)
        remove_leftovers(path)
        if rows:
            save_pt(path, self.content(plan, rows, proof))
        return not failed

    def prove(self, plan: StylePlan, path: Path, index: int) -> dict[str, float]:
        """The proof of a file, on one row; and, the first time, the cells of the run."""
        try:
            with memory_errors():
                pair, alone = self.pair(plan, index, self.args.directions[0])
                self.patcher.stored = {}
                if plan.clean.style == self.reader.file.clean_key:
                    self.patcher.stored["own"] = self.patcher.record(alone, self.args.sites)[0]
                size, twins = self.rows_at_once(pair), self.args.source == "split"
                proof = prove(self.patcher, pair, self.args.sites, size, twins)
                if self.style != plan.style:
                    self.cells, self.style = self.choose_cells(plan, alone), plan.style
                    self.check_disk(plan)
                used = {patch.site for cell in self.cells for patch in cell.row}
                if further := [site for site in SITES if site in used - {*self.args.sites}]:  # of sets; all are twins
                    proof = prove(self.patcher, pair, [*self.args.sites, *further], size)
        except (UserError, OutOfMemory):
            raise
        except Exception as error:  # whatever the code of a model of an unknown kind may raise
            why = f"its code fails when it is patched ({type(error).__name__}: {one_line(str(error), 200)})"
            raise cannot_capture(why) from error
        shown = ", ".join(f"{name} {value:.1g}" for name, value in proof.items())
        log.info(f"{plan.style}, {path.name}: the proof holds, in standard deviations of the logits: {shown}")
        return proof

    def choose_cells(self, plan: StylePlan, alone: Pair) -> list[Cell]:
        """The cells of a style: all of them, or with a screen the units that are best on the choosing half."""
        # 1. How many units each layer has.
        args, layers = self.args, range(len(self.patcher.layers))
        wanted = {*args.sites, *(one.site for one in plan.sets)}
        seen_at = {site: "z" if site == "pattern" else site for site in wanted - {*WHOLE_SITES}}
        states = self.patcher.record(alone, sorted({*seen_at.values()}))[0]
        units = {site: [states.values[0, at, i].shape[1] for i in layers] for site, at in seen_at.items()}
        check_units(plan.sets, units, args.units_csv)
        positions = [name for name in args.positions if name != "tokens"]
        if "tokens" in args.positions:
            positions += [f"token_{i}" for i in range(max(len(self.tokens(plan, index)) for index in plan.rows))]
        what = args.sites, positions, args.layers, args.controls
        cells = [cell for way in args.directions for cell in all_cells(way, *what, units)]

        # 2. The best units by attribution, each alone and in sets of growing size; and the sets of a table.
        sets = plan.sets
        if args.screen == "attribution":
            order = self.screen(plan)
            best = {site: {*order[site][: args.top_k]} for site in order}
            queries = ("z", "pattern")  # `v` counts other heads, which are not screened: only all of them at once
            cells = [c for c in cells if c.head < 0 or (c.site in queries and (c.layer, c.head) in best["z"])]
            singles = [(site, *unit) for site in ("mlp_post",) if site in args.sites for unit in sorted(best[site])]
            whole = [("mlp_out", layer, -1) for layer in args.layers if "mlp_out" in args.sites]
            cells += [Cell(way, site, "all", i, unit) for way in args.directions for site, i, unit in singles + whole]
            sets = sets + [
                one for site in ("z", "mlp_post") if site in args.sites for one in best_sets(site, order[site])
            ]
        twins = [twin for one in sets for twin in one.random_twins(units[one.site], args.seed)]
        for some in [*sets, *twins]:
            cells += [some.cell(way, args.ablate or "own") for way in args.directions]
        if args.ablate == "mean":
            self.means = self.mean_states(plan, sorted({one.site for one in sets}))
        return in_order(cells)

    def check_disk(self, plan: StylePlan) -> None:
        """Log how much a style will write. Raises UserError if the disk has less."""
        per_row = 4 * len(self.cells) * (len(MEASURES) * len(WHOSE) - len(ALWAYS_0_OR_1))
        if "mlp_post" in self.screened:
            text = self.patcher.model.config.get_text_config(decoder=True)
            per_row += 2 * len(self.patcher.layers) * (getattr(text, "intermediate_size", None) or 4 * text.hidden_size)
        size = per_row * sum(len(indices) for _, indices in plan.files)
        free = shutil.disk_usage(plan.folder).free
        log.info(f"about {gigabytes(size)} will be written to {plan.folder} ({gigabytes(free)} free)")
        if size > free:
            raise UserError(
                f"{plan.folder}: needs about {gigabytes(size)}, the disk has {gigabytes(free)}; free some space"
            )

    def screen(self, plan: StylePlan) -> dict[str, list[Unit]]:
        """Units by attribution over the choosing half of the rows, best first; kept in the style's patches.json."""
        self.screened = ["z", "mlp_out"]
        with suppress(UserError):  # a mixture of experts has no neurons
            self.patcher.hook(["mlp_post"])
            self.screened.append("mlp_post")
        known = read_json_file(plan.record)
        if "chosen" not in known:
            total: dict[str, torch.Tensor] = {}
            rows = [index for index in plan.rows if plan.choosing[index]]
            label = f"{plan.style}, attribution"
            for index in tqdm(rows, desc=label, unit="prompt", smoothing=0, dynamic_ncols=True):
                try:
                    for site, scores in self.attribution(plan, index, rows).items():
                        total[site] = total.get(site, 0.0) + scores
                except OutOfMemory as error:
                    log.warning(f"{plan.style}, row {index + 1}: left out of the screen, {error}")
            if not total:
                raise OutOfMemory("out of memory even alone: no row of the screen could be run")
            flat = {site: scores if scores.dim() == 2 else scores[:, None] for site, scores in total.items()}
            known["chosen"] = {site: ranked(scores, self.args.layers)[: SIZES[-1]] for site, scores in flat.items()}
            with locked(plan.folder):
                write_json(plan.record, known, indent=None)
        return {site: [(layer, unit) for layer, unit in order] for site, order in known["chosen"].items()}

    def attribution(self, plan: StylePlan, index: int, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """`attribution` of a row for what is screened, computed with its neighbours in `indices` if memory allows."""
        while (plan.style, index) not in self.scores:
            place = indices.index(index)
            start = place - place % self.at_once
            try:
                self.scores = self.attributions(plan, indices[start : start + self.at_once])
            except OutOfMemory:
                if self.at_once == 1:
                    raise
                self.at_once = 1
        return self.scores[plan.style, index]

    def attributions(self, plan: StylePlan, indices: Sequence[int]) -> dict[tuple[str, int], dict[str, torch.Tensor]]:
        """`attribution` by style and row."""
        pairs = [self.pair(plan, index, self.args.directions[0])[0] for index in indices]
        with memory_errors():
            found = attribution(self.patcher, pairs, self.screened, self.args.ig_steps)
        return {(plan.style, index): scores for index, scores in zip(indices, found, strict=True)}

    def attributed(self, plan: StylePlan, index: int, indices: Sequence[int]) -> dict[str, Any]:
        """What a file keeps of `attribution`."""
        if not self.screened:
            return {}
        scores = self.attribution(plan, index, indices).items()
        return {"attribution": {site: value.half() if site == "mlp_post" else value for site, value in scores}}

    def mean_states(self, plan: StylePlan, sites: Sequence[str]) -> States:
        """For --ablate mean: every unit's mean over the tokens from the first edited one on, of the first typo runs."""
        means = States({}, 0)
        rows = [*plan.rows][:ROWS_FOR_MEANS]
        for index in rows:
            pair = self.pair(plan, index, "denoising")[0]
            for key, value in self.patcher.record(replace(pair, answers=[]), sites)[0].values.items():
                means.values[key] = means.values.get(key, 0.0) + value[pair.shared :].float().mean(0) / len(rows)
        return means

    def pair(self, plan: StylePlan, index: int, direction: str) -> tuple[Pair, Pair]:
        """A row's pair; and its donor alone, as donor and recipient in one."""
        key = plan.style, index, direction
        if key not in self.pairs:
            self.pairs = dict([*self.pairs.items()][-2 * ROWS_PER_FILE :]) | {key: self._pair(plan, index, direction)}
        return self.pairs[key]

    def _pair(self, plan: StylePlan, index: int, direction: str) -> tuple[Pair, Pair]:
        styles = (plan.clean, plan.typo)
        prompts = [self.reader.prompt(style, place) for style, place in zip(styles, plan.rows[index], strict=True)]
        edited = [edited_tokens(one, style.names, plan.style) for one, style in zip(prompts, styles, strict=True)]
        groups, order = [groups_of(one) for one in edited], (0, 1) if direction == "denoising" else (1, 0)
        donor, recipient = (prompts[i].input_ids for i in order)
        response = self.patcher.respond(donor, self.args.response_tokens, self.ends, self.is_stopped)
        answers = prompts[1].forced.get("answers", [])
        pair = Pair(index, donor, recipient, response, groups[order[1]], answers)
        return pair, replace(pair, recipient=donor, groups=groups[order[0]])

    def is_stopped(self, response: list[int]) -> bool:
        """Whether a response holds a stop string of the run."""
        text = self.reader.tokenizer.decode(response, skip_special_tokens=True)
        return any(stop in text for stop in self.args.stop_strings)

    def run_row(self, plan: StylePlan, index: int, other: int) -> dict[str, Any]:
        """All cells of a row: {field: [K]}; NaN where a cell has no state to take."""
        names = [f"{whose}{name}" for name in MEASURES for whose in WHOSE]
        found = {name: torch.full((len(self.cells),), torch.nan) for name in names if name not in ALWAYS_0_OR_1}
        for direction in self.args.directions:
            # 1. The donors that are no row of the batch.
            pair, alone = self.pair(plan, index, direction)
            self.patcher.stored, donor_logits, donor_answers = {}, None, None
            if plan.clean.style == self.reader.file.clean_key:
                own, donor_logits, donor_answers = self.patcher.record(alone, self.args.sites)
                self.patcher.stored["own"] = own
            if self.args.ablate == "mean":
                self.patcher.stored["mean"] = self.means
            if other != index and any(cell.donor == "other" for cell in self.cells):
                self.patcher.stored["other"] = self.other_item(plan, other, direction, pair)
            # 2. The cells that can be run.
            places = [
                k
                for k, cell in enumerate(self.cells)
                if cell.direction == direction
                and cell.positions in pair.groups  # a short prompt has no token_20
                and (cell.donor in LIVE or cell.donor in self.patcher.stored)
            ]
            rows = [self.cells[k].row for k in places]
            for where, logits, answers in self.batches(pair, rows):
                if donor_logits is not None and donor_answers is not None:
                    logits, answers = torch.cat([donor_logits, logits[1:]]), torch.cat([donor_answers, answers[1:]])
                told = measures(logits, logits[0], logits[1], pair.response)
                told["answer_logprob"] = likeliest(answers)
                for name, values in told.items():
                    for whose, value in zip(WHOSE, (values[2:], values[1], values[0]), strict=True):
                        if f"{whose}{name}" in found:
                            found[f"{whose}{name}"][[places[k] for k in where]] = value.float()
        return {"original_index": index, "element_index": self.reader.file.element_index(index), **found}

    def batches(self, pair: Pair, rows: Sequence[tuple[Patch, ...]]) -> Iterator[Any]:
        """`Patcher.run`; if memory runs out, what is left in smaller batches."""
        left = [*range(len(rows))]
        while left:
            size, some = self.rows_at_once(pair), left
            try:
                with memory_errors():
                    for where, logits, answers in self.patcher.run(pair, [rows[k] for k in some], size):
                        done = [some[k] for k in where]
                        yield done, logits, answers
                        left = [k for k in left if k not in done]
            except OutOfMemory:
                if size == 1:
                    raise
                self.batch_size = size // 2

    def other_item(self, plan: StylePlan, index: int, direction: str, pair: Pair) -> States:
        """States of another row's donor. Its group is laid over this row's from the end; its first token fills up."""
        _, alone = self.pair(plan, index, direction)
        aligned = {}
        for name, own in pair.groups.items():
            theirs = alone.groups.get(name, [])
            aligned[name] = [theirs[max(0, len(theirs) - len(own) + i)] for i in range(len(own))] if theirs else []
        return self.patcher.record(replace(alone, groups=aligned, answers=[]), self.args.sites)[0]

    def tokens(self, plan: StylePlan, index: int) -> list[tuple[str, bool]]:
        """The tokens of a typo prompt that --positions tokens patches: text, and whether it lies in an edited word."""
        prompt = self.reader.prompt(plan.typo, plan.rows[index][1])
        edited = edited_tokens(prompt, plan.typo.names, plan.style)
        first = edited.index(True)
        shown = slice(first, first + MOST_TOKENS)
        texts = [self.reader.tokenizer.decode([token]) for token in prompt.input_ids[shown]]
        return list(zip(texts, edited[shown], strict=True))

    def rows_at_once(self, pair: Pair) -> int:
        """Patched rows in a batch: the number given, or what memory takes."""
        if self.batch_size:
            return int(self.batch_size)
        config, device = self.patcher.model.config.get_text_config(decoder=True), self.patcher.device
        tokens = len(pair.recipient) - pair.shared + len(pair.response)
        inner = 8 * config.hidden_size + 4 * (getattr(config, "intermediate_size", None) or 4 * config.hidden_size)
        cache = 4 * len(self.patcher.layers) * config.hidden_size * self.patcher.model.dtype.itemsize
        per_row = tokens * 4 * inner + (tokens + pair.shared) * cache + len(pair.response) * config.vocab_size * 8
        most = CPU_ROWS if device.type == "cpu" else GPU_ROWS
        return max(1, min(most, int(FREE_SHARE * free_memory(device) / per_row)))

    def content(self, plan: StylePlan, rows: list[dict[str, Any]], proof: dict[str, float]) -> dict[str, Any]:
        """A file: see docs/DATA_FORMAT.md."""
        cells = self.cells
        return {
            "original_indices": [row["original_index"] for row in rows],
            "element_index": [row["element_index"] for row in rows],
            "style": plan.style,
            "source": self.args.source,
            "directions": [*self.args.directions],
            "cell_directions": [cell.direction for cell in cells],
            "sites": [cell.site for cell in cells],
            "positions": [cell.positions for cell in cells],
            "donors": [cell.donor for cell in cells],
            "sets": [cell.set_name for cell in cells],
            "layers": torch.tensor([cell.layer for cell in cells]),
            "heads": torch.tensor([cell.head for cell in cells]),
            "choosing": [plan.choosing[row["original_index"]] for row in rows],
            "tokens": [self.tokens(plan, row["original_index"]) for row in rows if "tokens" in self.args.positions],
            **{name: torch.stack([row[name] for row in rows]) for name in rows[0] if name not in ROW_ID},
            "attribution": {
                site: torch.stack([row["attribution"][site] for row in rows]) for site in rows[0].get("attribution", ())
            },
            "proof": proof,
        }
