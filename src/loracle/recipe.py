"""A whole run on one page: read it downward and you know what happens, in this order."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from loracle.config import SATURATING, DataConfig, RunConfig, TrainConfig
from loracle.data.audit import audit, refuse, without_leaks
from loracle.data.examples import Example, LabeledText, RankGroup, Task
from loracle.data.issues import Issue
from loracle.data.schema import Examples, read_examples
from loracle.data.sources import fingerprint, open_splits, open_table
from loracle.data.splits import split
from loracle.data.table import Table
from loracle.errors import UserError
from loracle.judge import baselines, budget
from loracle.judge.budget import Plan, Work
from loracle.judge.calibrate import Calibration, fit_calibration
from loracle.judge.drift import reference
from loracle.judge.findings import curves, findings, training_suspects, without_texts
from loracle.judge.metrics import (
    UNCALIBRATED,
    as_json,
    classification_metrics,
    given_labels,
    headline_metric,
    probabilities,
    target_array,
)
from loracle.judge.page import render
from loracle.judge.probe import Depth, best_of, by_depth, choose, ridge, verdict
from loracle.judge.ranking import rank_metrics
from loracle.judge.report import summary
from loracle.judge.spread import Spread, fit_spread
from loracle.model import assemble
from loracle.model.adapters import save_adapter
from loracle.model.backbone import BaseModel, load_config, load_tokenizer, pick_device, pick_dtype, resolve_base
from loracle.model.depth import LowerLayers, keep_lower
from loracle.model.int8 import Int8Scorer
from loracle.model.likelihood import NoLikelihoodError, log_likelihood, name_pairs, name_scores, names_template
from loracle.model.memory import EFFICIENCY, free_memory, matrix_rate, training_need, weight_bytes
from loracle.model.scorer import Scorer, is_encoder
from loracle.run import folder as run_folder
from loracle.run.card import model_card
from loracle.run.predictor import Predictor
from loracle.text.encode import Encoded, Encoder
from loracle.text.template import bake, check_contexts
from loracle.train import distributed, tracking
from loracle.train.loop import FEWEST_TOKENS, Fit, Schedule, fit
from loracle.train.losses import (
    SATURATION,
    Loss,
    class_weights,
    click_rate,
    fit_saturation,
    make_loss,
    numpy_objective,
    resolve_loss,
)
from loracle.train.optim import default_lr

Say = Callable[[str], None]
FROZEN_TEXTS = 2048  # training texts whose frozen features are computed for the baseline, at most
LAYERS = 12  # among which the frozen features choose
SAMPLED = 32  # test texts from which the cost of asking the untuned model for names is estimated
NAME_TOKENS = 32  # room for a label's name
HEAD_TEXTS = 512  # training texts by whose states a head from the labels' names is scaled
REPRODUCED = 64  # test texts whose scores the reloaded run must give again
TOLERANCE = 1e-6
SCORES = "scores.safetensors"
PREFLIGHT_BATCHES = 16  # from which the tokens of an epoch are estimated
USABLE = 0.9  # of the free memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """The three sides, which share no text, and what was done to get there."""

    task: Task
    train: list[Any]  # all LabeledText, or all RankGroup
    validation: list[Any]
    test: list[Any]
    issues: tuple[Issue, ...] = ()
    checksums: dict[str, str] = field(default_factory=dict)
    columns: dict[str, str] = field(default_factory=dict)  # role -> the columns it was read from, joined by commas


def train(config: RunConfig, *, say: Say = print, quiet: bool = False) -> Path:
    """Train, measure and save what ``config`` describes; returns the run folder.

    Raises:
        UserError: data, model or settings that cannot be used. Interrupted: Ctrl-C; ``resume`` goes on.
    """
    say = distributed.main_says(say, pick_device(config.model.device))
    config, folder = absolute(config), distributed.on_main(lambda: new_folder(config))
    return learn(config, distributed.on_main(lambda: read_data(config, say)), folder, say=say, quiet=quiet)


def resume(folder: Path, *, say: Say = print, quiet: bool = False) -> Path:
    """Go on with an interrupted run; on one machine's CPU the result is bit for bit that of an unbroken one.

    Raises:
        UserError: the run is finished, or its data or its base model have changed since.
    """
    info = run_folder.read_info(folder)
    if (folder / run_folder.MANIFEST).exists():
        raise UserError("an interrupted run", f"{folder}, which is finished", "start a new one, or use it as it is")
    if not info.config.data.data:
        raise UserError("a run that read its data from a file", f"{folder}, trained in memory", "train it anew")
    config = info.config
    if pinned := info.base.get("revision"):  # a branch may have moved on since; the commit can still be had
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, revision=pinned))
    say = distributed.main_says(say, pick_device(config.model.device))
    data = distributed.on_main(lambda: read_data(config, say))
    if data.checksums != info.provenance["data"]:
        raise UserError(f"the data that {folder} began with", "other bytes", "restore the file or start a new run")
    base = resolve_base(config.model.model, config.model.revision)
    if base.checksum() != info.base["sha256"]:
        raise UserError(f"the base model that {folder} began with", "other weights", "restore them or start a new run")
    return learn(config, data, folder, say=say, quiet=quiet)


def read_data(config: RunConfig, say: Say) -> Data:
    """File or hub id to train, validation and test."""
    where = config.data
    tables = open_splits(where.data)
    found = read_examples(tables["train"], where)
    for line in found.columns.said:
        say(line)
    test: Examples | None
    if where.test:
        test = read_examples(open_table(where.test), where, task=found.task)
    else:
        test = _labelled_split(tables.get("test"), where, found.task, say)
    validation = _labelled_split(tables.get("validation"), where, found.task, say)
    data = divide(config, found, test, validation)
    for issue in data.issues:
        say(f"note: {issue}")
    return dataclasses.replace(
        data,
        checksums={name: fingerprint(p) for name, p in (("train", where.data), ("test", where.test)) if p},
        columns={role: ",".join(names) for role, names in found.columns.named().items()},
    )


def _labelled_split(table: Table | None, where: DataConfig, task: Task, say: Say) -> Examples | None:
    """A split that a data set brings along, unless it has no labels, as the test splits of some benchmarks."""
    if table is None:
        return None
    try:
        return read_examples(table, where, task=task)
    except UserError as e:
        say(f"note: {table.name} is not used, a part of the training side is held out instead ({e.found})")
        return None


def divide(
    config: RunConfig, found: Examples, test: Examples | None = None, validation: Examples | None = None
) -> Data:
    """Three sides without a common text; only what the user gave no file for is split off, seeded."""
    refuse(found)
    seed, task = config.train.seed, found.task
    items: list[Any] = list(found.items)
    issues = [*audit(found).issues, *(test.issues if test else ()), *(validation.issues if validation else ())]
    if test:
        items, leaks = without_leaks(items, test.items)
        held: list[Any] = list(test.items)
        issues += leaks
    else:
        parts = split(items, config.data.test_share, seed, task)
        items, held, issues = parts.train, parts.held, [*issues, *parts.notes]
    if validation:
        watched, leaks = without_leaks(validation.items, held)
        issues += leaks
        items, leaks = without_leaks(items, watched)
        issues += leaks
    else:
        parts = split(items, config.data.validation_share, seed + 1, task)
        items, watched, issues = parts.train, parts.held, [*issues, *parts.notes]
    if not items or not watched:
        side = "validation" if items else "training"
        raise UserError(f"{side} examples", "none left once what the test side has too is out", "give more data")
    refuse(dataclasses.replace(found, items=items))
    return Data(task=task, train=items, validation=watched, test=held, issues=tuple(issues))


def new_folder(config: RunConfig) -> Path:
    """Where the run goes: ``--out``, or the next free ``runs/<name>``; made only once data and model are fine.

    Raises:
        UserError: ``--out`` holds something already.
    """
    if config.out:
        folder = run_folder.free(Path(config.out), "pick another one, or --resume it")
    else:
        name = Path(config.data.data).name.split(".")[0] or "run"
        taken = (Path("runs") / (name if i == 1 else f"{name}-{i}") for i in range(1, 10_000))
        folder = next(p for p in taken if not p.exists())
    return folder


def learn(
    config: RunConfig, data: Data, folder: Path, *, say: Say = print, quiet: bool = False, keep_scores: bool = False
) -> Path:
    """From examples to a finished run folder; with ``keep_scores`` it also holds the test scores (``read_scores``).

    Several processes train together and share the looks at the validation side; the main one does all else and writes.
    """
    started = time.perf_counter()
    task, model, seed = data.task, config.model, config.train.seed
    track, device = config.train.track, pick_device(config.model.device)
    world = distributed.start(device)
    accelerator = tracking.tracked(track, cpu=device.type == "cpu") if track else None
    loss, chosen = choose_loss(config, data)
    if world.num_processes > 1:
        say(f"{world.num_processes} processes share each batch of {config.train.batch}")
    say(f"{len(data.train):,} training, {len(data.validation):,} validation, {len(data.test):,} test {_unit(task)}")
    say("loss: " + ", ".join(f"{v}" if k == "name" else f"{k} {v:,.4g}" for k, v in chosen.items()))

    # Model, tokenizer with the template baked in, and the first look at lengths.
    with world.local_main_process_first():  # the others then find what it has downloaded
        base, base_config, tokenizer, room = open_base(config, data, say)
    if model.depth == "auto":
        say("a linear probe on every layer …")
        depths = distributed.on_main(lambda: probe_depths(config, data, loss, base, tokenizer))
        say(verdict(depths))
        config = dataclasses.replace(config, model=dataclasses.replace(model, depth=choose(depths).layers))
        model = config.model
    scorer, encoder = new_model(config, task, base, tokenizer)
    start_head(config, scorer, encoder, data)
    if kept := keep_lower_states(config, scorer, base):
        say(f"states of the lower {kept.depth} layers are read from {kept.cache.folder}, or computed once")
    lr = learning_rate(config, base_config)
    lengths, tokens = _lengths(encoder, data)
    say(
        f"model: {base.note or base.source}; {_trained(scorer)}; {_dtypes(scorer)} on {scorer.device}; learning rate {lr:g}"
    )
    say(
        f"tokens a text: {lengths['mean']:.0f} on average, {lengths['max']} at most; "
        f"{lengths['over_length']:,} texts over {room} ({'cut' if model.long == 'cut' else 'chunked'})"
    )
    if not scorer.packed:
        say(f"{base_config.model_type} is not proven packable here: batches are padded, sorted by length")
    schedule, work = preflight(config, scorer, encoder, data, say)
    config = dataclasses.replace(config, train=schedule)
    if world.is_main_process:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise UserError(f"a place for the run folder {folder}", e.strerror or str(e), "pick another --out") from e
        run_folder.write_info(folder, _info(config, data, base, tokenizer, lr, chosen))
        save_tokenizer(tokenizer, folder)

    # Baselines see the model untuned, so they come first; the test side is only scored, never chosen by.
    rivals: dict[str, list[np.ndarray]] = {}
    notes: list[str] = []
    planned: Plan | None = None
    if config.baselines and world.is_main_process:
        say("baselines …")
        untuned = ask_untuned(config, data, scorer, encoder, base)
        planned = plan_baselines(data, scorer, work, untuned)
        rivals, notes = score_baselines(data, scorer, encoder, loss, planned, untuned, seed=seed)
        for line in notes:
            say(f"note: {line}")

    # Training; the best look at the validation examples wins.
    if accelerator:
        settings = {name: dataclasses.asdict(getattr(config, name)) for name in RunConfig.SECTIONS}
        tracking.begin(accelerator, str(track), folder.name, settings)
    outcome = fit(
        scorer,
        data.train,
        lambda examples: encode_examples(encoder, examples),
        loss,
        lambda: look(scorer, encoder, data.validation, task, loss),
        schedule=schedule_of(config, lr),
        folder=folder,
        accelerator=accelerator,
        quiet=quiet,
    )

    scorer.lower = None  # what is measured and saved is the whole model's, as whoever loads it has it
    if not world.is_main_process:
        world.wait_for_everyone()  # the run folder is whole when it is given back
        return folder

    # What the scores mean is settled on the validation examples too.
    watched = score_examples(scorer, encoder, data.validation)
    meaning = fit_meaning(watched, data, config.train.wanted_precision)
    calibration = meaning if isinstance(meaning, Calibration) else None
    if calibration:
        say(f"calibration on {len(data.validation):,} validation texts: {_calibrated(calibration, task)}")

    # The test examples, once.
    asked = time.perf_counter()
    scores = score_examples(scorer, encoder, data.test)
    texts_per_s = sum(map(len, scores)) / (time.perf_counter() - asked)
    metrics: dict[str, Any] = {
        "task": task.kind,
        "base": base.note or base.source,
        "train": _speed(outcome, time.perf_counter() - started),
        "validation": {"best_step": outcome.progress.best_step, headline_metric(task): outcome.progress.best_metric},
        "calibration": _meaning(meaning),
        "test": measure(scores, data.test, task, calibration),
        "scoring": {"texts_per_s": texts_per_s, "parameters": sum(p.numel() for p in scorer.inner.parameters())},
        "baselines": {name: measure(rival, data.test, task) for name, rival in rivals.items()},
        "notes": notes,
        "texts": lengths,
        "noticed": {issue.kind: issue.count for issue in data.issues},
    }
    if meaning:
        run_folder.write_calibration(folder, meaning)
    run_folder.write_reference(folder, reference(tokens, np.concatenate(watched), task, calibration))
    if keep_scores:
        write_scores(folder, scores)
    told = write_report(folder, data, scores, rivals, metrics, calibration, planned.searched if planned else 0)
    save(folder, config, scorer, base, data, scores, metrics, calibration)
    reproduce(folder, base, data.test, scorer, encoder)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    say(f"\n{told}\n")
    say(summary(metrics, task.kind, base.note))
    say(f"\nrun folder: {folder}; a page to read: {folder / run_folder.PAGE}")
    world.wait_for_everyone()
    return folder


# --- the steps --------------------------------------------------------------------------------------------------------


def new_model(config: RunConfig, task: Task, base: BaseModel, tokenizer: Any) -> tuple[Scorer, Encoder]:
    """The base with a fresh head and fresh adapters, and what encodes texts for it."""
    model, device = config.model, pick_device(config.model.device)
    scorer = assemble.new_scorer(
        base.folder,
        task,
        pad_token_id=tokenizer.pad_token_id,
        dtype=pick_dtype(model.dtype, config.lora.full, device),
        device=device,
        pooling=model.pooling,
        head=model.head,
        depth=model.layers,
        quantize=model.quantize,
        lora=None if config.lora.full else _lora(config),
        seed=config.train.seed,
    )
    return scorer, Encoder(tokenizer, long=model.long, encoder=scorer.encoder)


def start_head(config: RunConfig, scorer: Scorer, encoder: Encoder, data: Data) -> None:
    """With ``--head-init names``, a head that starts from the labels' names.

    Raises:
        UserError: a ranker, labels that are numbers, or a model that is no decoder.
    """
    if config.model.head_init != "names":
        return
    if not (words := label_words(data.task)):
        found = "numbers" if data.task.label_names else "a ranker, which has none"
        raise UserError("labels with names for --head-init names", found, "leave out --head-init")
    assemble.head_from_names(scorer, encoder(words), _flat(encoder, _some(data.train, config.train.seed)[:HEAD_TEXTS]))


def label_words(task: Task) -> list[str]:
    """The labels' names in words; none where they are numbers, or there are no labels."""
    names = task.label_names
    if all(name.strip().lstrip("-").replace(".", "", 1).isdecimal() for name in names):
        return []
    return [name.replace("_", " ").replace("-", " ") for name in names]


def learning_rate(config: RunConfig, base_config: Any) -> float:
    """What the user gave, or what the model's width calls for."""
    given = config.train.lr
    return default_lr(base_config.hidden_size, full=config.lora.full) if given is None else given


def open_base(config: RunConfig, data: Data, say: Say) -> tuple[BaseModel, Any, Any, int]:
    """The base model, its config, its tokenizer with the template baked in, and how many tokens a text may have."""
    model = config.model
    base = resolve_base(model.model, model.revision)
    base_config = load_config(base.folder)
    _check_weights_fit(base, config)
    room = min(model.max_length, _positions(base_config))
    if room < model.max_length:
        say(f"note: the model reads {room} tokens at most, so --max-length {model.max_length} becomes {room}")
    check_contexts(model.template, (e.context for side in (data.train, data.validation, data.test) for e in side))
    tokenizer = bake(load_tokenizer(base.folder), model.template, room, encoder=is_encoder(base_config))
    return base, base_config, tokenizer, room


def probe(config: RunConfig, *, say: Say = print) -> tuple[list[Depth], str]:
    """What a linear probe reaches on the states of each layer of the untuned model, on validation examples; and in what.

    Raises:
        UserError: as ``train``.
    """
    config = absolute(config)
    data = read_data(config, say)
    loss, _ = choose_loss(config, data)
    base, _, tokenizer, _ = open_base(config, data, say)
    return probe_depths(config, data, loss, base, tokenizer), headline_metric(data.task)


def probe_depths(config: RunConfig, data: Data, loss: Loss, base: BaseModel, tokenizer: Any) -> list[Depth]:
    """Probe every layer: fitted on training texts, judged on validation texts, so the test side has no say."""
    seed, device = config.train.seed, pick_device(config.model.device)
    scorer = assemble.new_scorer(
        base.folder,
        data.task,
        pad_token_id=tokenizer.pad_token_id,
        dtype=pick_dtype(config.model.dtype, False, device),
        device=device,
        quantize=config.model.quantize,
    )
    encoder = Encoder(tokenizer, long=config.model.long, encoder=scorer.encoder)
    some, held = _some(data.train, seed), _some(data.validation, seed)
    seen, unseen = (assemble.layer_features(scorer, _flat(encoder, side)) for side in (some, held))
    return probe_layers(seen, some, unseen, held, data.task, loss, seed)


def probe_layers(
    seen: np.ndarray, some: list[Any], unseen: np.ndarray, held: list[Any], task: Task, loss: Loss, seed: int
) -> list[Depth]:
    """Probe each of the layers of ``seen [N, L, H]``, of some training texts, on ``unseen [M, L, H]``, of held-out ones."""
    if task.kind == "rank":
        objective = numpy_objective(loss)

        def fit_one(here: np.ndarray, there: np.ndarray) -> list[np.ndarray]:
            parts = _by_example(here, some), some, _by_example(there, held)
            return [scores[:, None] for scores in baselines.frozen_ranker(*parts, objective, seed=seed)]

    else:
        targets = target_array(some, task)

        def fit_one(here: np.ndarray, there: np.ndarray) -> list[np.ndarray]:
            return list(ridge(here, targets, there, task)[:, None])

    return by_depth(seen, unseen, fit_one, lambda scores: measure(scores, held, task)[headline_metric(task)])


def preflight(config: RunConfig, scorer: Scorer, encoder: Encoder, data: Data, say: Say) -> tuple[TrainConfig, Work]:
    """Say what the training will take before it begins, and return it; rounds that would not fit the memory are made smaller.

    Tokens come from a few seeded batches, memory and operations from the model's shapes, the speed from a product of such
    matrices run now.
    """
    schedule, device = config.train, scorer.device
    steps = schedule_of(config, 0.0).total_steps(len(data.train))
    order = np.random.default_rng(schedule.seed).permutation(len(data.train))[: PREFLIGHT_BATCHES * schedule.batch]
    batches = [order[i : i + schedule.batch] for i in range(0, len(order), schedule.batch)]
    useful, computed, padded, count = 0, [], 0, 0
    for batch in batches:
        texts = _flat(encoder, [data.train[i] for i in batch])
        packed = scorer.pack(texts)
        useful, padded = useful + packed.useful_tokens, padded + len(texts) * max(e.tokens for e in texts)
        computed.append(packed.tokens)
        count += len(texts)
    scale = len(data.train) / len(order)
    say(
        f"an epoch: {useful * scale:,.0f} tokens of text, {sum(computed) * scale:,.0f} to compute; padding every text to the "
        f"longest of its batch would be {padded * scale:,.0f}"
    )

    need, free = training_need(scorer, config.lora.adapt_top), int(USABLE * free_memory(device))
    rounds = min(schedule.micro_tokens, max(computed))
    say(f"memory: {need.bytes(rounds) / 1e9:.1f} GB for rounds of {rounds:,} tokens, of {free / 1e9:.1f} GB to be had")
    if need.bytes(rounds) > free:
        fits = max(FEWEST_TOKENS, need.tokens(free))
        say(f"note: rounds of {fits:,} tokens instead; steps and results stay the same. A smaller --model takes less.")
        schedule = dataclasses.replace(schedule, micro_tokens=fits)

    rate, operations = matrix_rate(scorer), need.flops_per_token * float(np.mean(computed)) * steps
    seconds = operations / (rate * distributed.start(device).num_processes * EFFICIENCY)
    say(
        f"about {_duration(seconds)} for {steps:,} steps, at half of the {rate / 1e9:,.0f} GFLOP/s that are measured here"
    )
    return schedule, Work(training=operations, forward=need.forward_flops, tokens=sum(computed) / count)


def _duration(seconds: float) -> str:
    size, unit = next(
        (n, u) for n, u in ((3600, "hours"), (60, "minutes"), (1, "seconds")) if seconds >= 2 * n or n == 1
    )
    return f"{max(1, round(seconds / size))} {unit}"


def _check_weights_fit(base: BaseModel, config: RunConfig) -> None:
    """That the weights find room: whole ones in the CPU's memory, through which they pass, and then on the device."""
    model, device = config.model, pick_device(config.model.device)
    dtype = pick_dtype(model.dtype, config.lora.full, device)
    whole, small = (weight_bytes(base.folder, dtype, four_bit=four_bit) for four_bit in (False, True))
    for place in {torch.device("cpu"), device}:
        wanted = small if model.quantize and place.type != "cpu" else whole
        if wanted > (free := free_memory(place)):
            four_bit = place.type == "cuda" and not model.quantize and small < free
            raise UserError(
                f"{wanted / 1e9:.1f} GB for the weights of {base.source} on {place}",
                f"{free / 1e9:.1f} GB free",
                (f"pass --quantize nf4 ({small / 1e9:.1f} GB)" if four_bit else "close what else runs")
                + ", or pass a smaller --model",
            )


def write_scores(folder: Path, scores: Sequence[np.ndarray]) -> None:
    """Keep the test scores in full, for tests in pairs."""
    save_file({"scores": np.ascontiguousarray(np.concatenate(scores))}, folder / SCORES)


def read_scores(folder: Path, examples: Sequence[Example]) -> list[np.ndarray]:
    """What ``write_scores`` kept, by example."""
    return _by_example(load_file(folder / SCORES)["scores"], examples)


def encode_examples(encoder: Encoder, examples: Sequence[Example]) -> list[list[Encoded]]:
    """The encoded texts of each example: one of a labelled text, all titles of a group."""
    texts = [t for e in examples for t in _texts(e)]
    contexts = [e.context for e in examples for _ in _texts(e)]
    encoded = iter(encoder(texts, contexts))
    return [[next(encoded) for _ in _texts(e)] for e in examples]


def score_examples(scorer: Scorer | Int8Scorer, encoder: Encoder, examples: Sequence[Example]) -> list[np.ndarray]:
    """Scores of each example's texts, ``float32 [n, C]`` each."""
    return _by_example(assemble.score(scorer, _flat(encoder, examples)), examples)


def _score_together(scorer: Scorer, encoder: Encoder, examples: Sequence[Example]) -> list[np.ndarray]:
    """``score_examples``, a share of them in each process, which then has them all."""
    world = distributed.start(scorer.device)
    own = distributed.share_out(examples, world.num_processes)[world.process_index]
    scores = score_examples(scorer, encoder, [examples[i] for i in own]) if own else []
    by_place = dict(distributed.gathered(list(zip(own, scores, strict=True))))
    return [by_place[i] for i in range(len(examples))]


def look(scorer: Scorer, encoder: Encoder, examples: Sequence[Example], task: Task, loss: Loss) -> dict[str, float]:
    """The validation metric that is watched, and the loss."""
    scores = _score_together(scorer, encoder, examples)
    if not all(np.isfinite(s).all() for s in scores):
        return {"metric": -np.inf, "loss": np.nan}
    summed, count = loss(examples)(torch.from_numpy(np.concatenate(scores)))
    metric = measure(scores, examples, task)[headline_metric(task)]["value"]
    # None: nothing in the validation side tells right from wrong, so the loss alone decides.
    return {"metric": 0.0 if metric is None else metric, "loss": float(summed) / max(count, 1e-12)}


def measure(
    scores: Sequence[np.ndarray], examples: Sequence[Any], task: Task, calibration: Calibration | None = None
) -> dict[str, Any]:
    """Metrics with intervals, as JSON has them; a classifier's at its calibration."""
    if task.kind == "rank":
        return as_json(rank_metrics([s[:, 0] for s in scores], examples))
    same = [e.identity for e in examples]
    targets = target_array(examples, task)
    return as_json(classification_metrics(np.concatenate(scores), targets, task, groups=same, calibration=calibration))


def keep_lower_states(config: RunConfig, scorer: Scorer, base: BaseModel) -> LowerLayers | None:
    """Put the layers below the adapters behind a cache, where there are such layers."""
    decoder = scorer.inner.base_model
    top, cache_gb = config.lora.adapt_top, config.train.cache_gb
    if top is None or config.lora.full or not cache_gb or scorer.encoder or not scorer.packed:
        return None
    if (below := decoder.config.num_hidden_layers - top) < 1:
        return None
    about = {"base": base.source, "revision": base.revision, "sha256": base.checksum()}
    about |= {"quantize": config.model.quantize} if config.model.quantize else {}
    scorer.lower = keep_lower(decoder, below, about, limit=int(cache_gb * 1e9))
    return scorer.lower


def choose_loss(config: RunConfig, data: Data) -> tuple[Loss, dict[str, Any]]:
    """The loss of a run, and what was settled about it: its name and, of clicks, the saturation m0.

    m0 is fitted on the validation groups, around the scores of a TF-IDF ranker that has not seen them: what words leave
    unexplained is not far from what a model will, and it costs a second.
    """
    task, schedule = data.task, config.train
    if schedule.wanted_precision is not None and task.kind != "multi":
        raise UserError("several labels a text for --wanted-precision", "another task", "leave it out")
    name = resolve_loss(task, schedule.loss, click_rate(data.train) if task.evidence == "clicks" else 0.0)
    if task.kind != "rank":
        weights = class_weights(data.train, task, schedule.class_weights)
        return make_loss(task, name=name, weights=weights), {"name": name}
    if name not in SATURATING or task.evidence != "clicks":
        return make_loss(task, name=name, margin=schedule.margin), {"name": name}
    m0 = schedule.saturation
    if m0 is None:
        objective = numpy_objective(make_loss(task, name="list"))
        scores = baselines.tfidf_ranker(data.train, data.validation, objective, seed=schedule.seed)
        m0 = fit_saturation(scores, data.validation) if name != "binomial" else _saturation_of_odds(scores, data)
    return make_loss(task, name=name, saturation=m0), {"name": name, "saturation": m0}


def _saturation_of_odds(scores: list[np.ndarray], data: Data) -> float:
    """m0 where clicks are not rare: n titles with c clicks at rate p know their log-odds to 1 / (c (1 - p)), against τ²."""
    spread, rate = fit_spread(data.validation, scores), click_rate(data.validation)
    if not spread.groups:
        return SATURATION[1]
    titles = float(np.mean([len(g.texts) for g in data.validation]))
    return float(np.clip(titles / (spread.spread**2 * (1 - rate)), *SATURATION))


def fit_meaning(scores: list[np.ndarray], data: Data, precision: float | None = None) -> Calibration | Spread | None:
    """What scores of the validation examples mean. A classifier's: temperature or thresholds. Of clicks: how much a point of
    score moves the log-odds of one, and how far titles differ beyond it. Of pairs and grades: nothing that could be told.
    """
    if data.task.kind == "rank" and data.task.evidence != "clicks":
        return None
    if data.task.kind != "rank":
        targets = target_array(data.validation, data.task)
        return fit_calibration(np.concatenate(scores), targets, data.task, precision=precision)
    spread = fit_spread(data.validation, [s[:, 0] for s in scores])
    return spread if spread.groups else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Untuned:
    """How the untuned model is asked, and what it takes."""

    name: str  # of the baseline
    tokens: float
    ask: Callable[[], list[np.ndarray]]  # test scores


def ask_untuned(
    config: RunConfig, data: Data, scorer: Scorer, encoder: Encoder, base: BaseModel
) -> Untuned | str | None:
    """Of titles, how likely it finds each; of labels with names, which of them it would name. Where it cannot be asked, why;
    None where there is nothing to ask for.
    """
    names = label_words(data.task)
    if data.task.kind != "rank" and not names:
        return None
    if scorer.encoder or not scorer.packed:
        return f"{scorer.inner.config.model_type} has no likelihood of a next token"
    if data.task.kind == "rank":

        def ask() -> list[np.ndarray]:
            told = log_likelihood(scorer, _flat(encoder, data.test), base.folder, after=encoder.after)
            return [s[:, None] for s in _by_example(told, data.test)]

        name, tokens = "untuned", float(sum(e.tokens for e in _flat(encoder, data.test)))
    else:
        name, texts = "zero-shot", ["\n".join(filter(None, (e.context, e.text))) for e in data.test]
        tokenizer, template, room = load_tokenizer(base.folder), names_template(names), _positions(scorer.inner.config)
        longest = min(room, config.model.max_length + len(tokenizer(template).input_ids) + NAME_TOKENS)
        try:
            plain = Encoder(bake(tokenizer, template, longest))
        except UserError:
            return f"its question would name {len(names)} labels, which leaves no room for a text"

        def ask() -> list[np.ndarray]:
            return list(name_scores(scorer, texts, names, base.folder, plain)[:, None])

        sample = name_pairs(plain, texts[:: -(-len(texts) // SAMPLED)], names)
        tokens = scorer.pack(sample).tokens * len(texts) * len(names) / len(sample)
    return Untuned(name=name, tokens=tokens, ask=ask)


def plan_baselines(data: Data, scorer: Scorer, work: Work, untuned: Untuned | str | None) -> Plan:
    """What the baselines learn from within their share of the training."""
    train, validation, test = (sum(len(_texts(e)) for e in side) for side in (data.train, data.validation, data.test))
    return budget.plan(
        work,
        train=train,
        validation=validation,
        test=test,
        characters=sum(len(t) for e in data.train for t in _texts(e)),
        labels=len(data.task.label_names) or 1,
        most=FROZEN_TEXTS,
        layers=scorer.packed and not scorer.encoder,
        asked=untuned.tokens if isinstance(untuned, Untuned) else None,
    )


def score_baselines(
    data: Data, scorer: Scorer, encoder: Encoder, loss: Loss, planned: Plan, untuned: Untuned | str | None, *, seed: int
) -> tuple[dict[str, list[np.ndarray]], list[str]]:
    """Test scores of simpler methods that learnt from the same split, by the same loss when ranking; and what to say of it."""
    task, notes = data.task, list(planned.said)
    if task.kind == "rank":
        lengths = baselines.length_ranker(data.train, data.test, numpy_objective(loss), seed=seed)
        found = {"length": [s[:, None] for s in lengths]}
    else:
        found = {"majority": list(baselines.majority(target_array(data.train, task), len(data.test), task)[:, None])}
    found["tf-idf"] = tfidf_scores(data, loss, seed)
    if planned.frozen:
        some = _some(data.train, seed, planned.frozen)
        held = _some(data.validation, seed, planned.watched) if planned.watched else []
        layer, seen = best_layer(data, some, held, scorer, encoder, loss, seed)
        found["frozen"] = frozen_scores(data, some, seen, mean_features(scorer, encoder, data.test, layer), loss, seed)
        if layer is not None:
            notes.insert(0, f"frozen features are those after layer {layer + 1}, chosen on validation {_unit(task)}")
    if isinstance(untuned, str):
        notes.append(f"the untuned model is not asked: {untuned}")
    elif untuned and planned.asked:
        try:
            found[untuned.name] = untuned.ask()
        except NoLikelihoodError as e:
            notes.append(f"the untuned model is not asked: {e}")
    return found, notes


def tfidf_scores(data: Data, loss: Loss, seed: int) -> list[np.ndarray]:
    """Test scores of a linear model on words, ``[n, C]`` each, by the same loss when ranking."""
    task = data.task
    if task.kind == "rank":
        ranked = baselines.tfidf_ranker(data.train, data.test, numpy_objective(loss), seed=seed)
        return [s[:, None] for s in ranked]
    seen, unseen = map(baselines.words_of, (data.train, data.test))
    return list(baselines.tfidf_classifier(seen, target_array(data.train, task), unseen, task)[:, None])


def best_layer(
    data: Data, some: list[Any], held: list[Any], scorer: Scorer, encoder: Encoder, loss: Loss, seed: int
) -> tuple[int | None, list[np.ndarray]]:
    """The layer after which a probe that learnt from ``some`` training examples does best on ``held`` validation examples, and
    the states of ``some`` there. None, the last one: of encoders, and where too few are held out to tell layers apart.

    Of deep models ``LAYERS`` are looked at, evenly spaced, the last one among them.
    """
    if scorer.encoder or not scorer.packed or not held:
        return None, mean_features(scorer, encoder, some)
    count = scorer.inner.config.num_hidden_layers
    layers = np.unique(np.linspace(count - 1, 0, min(count, LAYERS)).astype(int)).tolist()
    seen, unseen = (assemble.layer_features(scorer, _flat(encoder, side), layers) for side in (some, held))
    try:
        at = best_of(probe_layers(seen, some, unseen, held, data.task, loss, seed)).layers - 1
    except UserError:
        return None, _by_example(seen[:, -1], some)
    return layers[at], _by_example(seen[:, at], some)


def layer_of(data: Data, scorer: Scorer, encoder: Encoder, loss: Loss, seed: int) -> int | None:
    """``best_layer`` by as many examples as a run looks at."""
    held = _some(data.validation, seed, budget.WATCHED)
    return best_layer(data, _some(data.train, seed), held, scorer, encoder, loss, seed)[0]


def mean_features(
    scorer: Scorer, encoder: Encoder, examples: Sequence[Example], layer: int | None = None
) -> list[np.ndarray]:
    """Mean hidden states of each example's texts after a layer, counted from 0, by default the last: ``float32 [n, H]``."""
    texts = _flat(encoder, examples)
    found = assemble.features(scorer, texts) if layer is None else assemble.layer_features(scorer, texts, [layer])[:, 0]
    return _by_example(found, examples)


def frozen_scores(
    data: Data, some: Sequence[Any], seen: list[np.ndarray], unseen: list[np.ndarray], loss: Loss, seed: int
) -> list[np.ndarray]:
    """The same of one on features: ``seen`` of some training examples, ``unseen`` of the test side."""
    task = data.task
    if task.kind == "rank":
        ranked = baselines.frozen_ranker(seen, some, unseen, numpy_objective(loss), seed=seed)
        return [s[:, None] for s in ranked]
    targets = target_array(some, task)
    scores = baselines.frozen_classifier(np.concatenate(seen), targets, np.concatenate(unseen), task, seed=seed)
    return list(scores[:, None])


def write_report(
    folder: Path,
    data: Data,
    scores: list[np.ndarray],
    rivals: dict[str, list[np.ndarray]],
    metrics: dict[str, Any],
    calibration: Calibration | None,
    searched: int,
) -> str:
    """``report.json`` and the page that shows it; returns its first line, the verdict."""
    task, info = data.task, run_folder.read_info(folder)
    report = findings(scores, data.test, task, metrics, rivals, calibration)
    if "suspects" in report and searched:
        seed = info.config.train.seed
        report["suspects"]["train"] = training_suspects(data.train, task, seed=seed, searched=searched)
    if not info.config.train.texts:
        report = without_texts(report)
    report |= {"run": run_folder.facts(folder, info, data.issues), "curves": curves(folder / "log.jsonl")}
    run_folder.write_text(folder / run_folder.REPORT, json.dumps(report, indent=1, ensure_ascii=False))
    run_folder.write_text(folder / run_folder.PAGE, render(report))
    return report["verdict"]["text"]


def save(
    folder: Path,
    config: RunConfig,
    scorer: Scorer,
    base: BaseModel,
    data: Data,
    scores: list[np.ndarray],
    metrics: dict,
    calibration: Calibration | None,
) -> None:
    """Everything that a run leaves; the manifest last, which is what says that it is whole."""
    if config.lora.full:
        scorer.inner.save_pretrained(folder)
    else:
        kind, _, name = base.source.partition(":")
        save_adapter(scorer.model, folder, base=name if kind == "hf" else str(base.folder), revision=base.revision)
    run_folder.write_text(folder / run_folder.METRICS, json.dumps(metrics, indent=1))
    write_predictions(folder, data, scores, calibration, texts=config.train.texts)
    run_folder.write_text(folder / run_folder.CARD, model_card(folder.name, run_folder.read_info(folder), metrics))
    run_folder.write_manifest(folder)


def reproduce(folder: Path, base: BaseModel, test: Sequence[Example], scorer: Scorer, encoder: Encoder) -> None:
    """Load the folder afresh and compare: a run that does not give its own scores again must not pass for one."""
    sample = [(t, e.context) for e in test for t in _texts(e)][:REPRODUCED]
    texts, contexts = [t for t, _ in sample], [c for _, c in sample]
    own = assemble.score(scorer, encoder(texts, contexts))
    again = Predictor(folder, base=str(base.folder), device=str(scorer.device)).scores(texts, contexts)
    worst = float(np.max(np.abs(own - again) / np.maximum(1, np.abs(own))))
    if not worst <= TOLERANCE:
        (folder / run_folder.MANIFEST).unlink()
        raise RuntimeError(
            f"{folder} does not reproduce itself: scores differ by {worst:.2g}; this is a bug in loracle"
        )


# --- small things -----------------------------------------------------------------------------------------------------


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """The baked tokenizer under the class name that every version of transformers knows."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    run_folder.write_text(path, json.dumps(settings, indent=2, ensure_ascii=False))


def _info(
    config: RunConfig, data: Data, base: BaseModel, tokenizer: Any, lr: float, loss: dict[str, Any]
) -> run_folder.RunInfo:
    counts = {"train": len(data.train), "validation": len(data.validation), "test": len(data.test)}
    return run_folder.RunInfo(
        config=config,
        task=data.task,
        base={"source": base.source, "revision": base.revision, "sha256": base.checksum(), "note": base.note},
        load_kwargs={
            "num_labels": len(data.task.label_names) or 1,
            "pad_token_id": tokenizer.pad_token_id,
            "dtype": "float32",
        },
        provenance={
            "versions": run_folder.provenance(),
            "data": data.checksums,
            "columns": data.columns,
            "counts": counts,
            "lr": lr,
            "loss": loss,
        },
    )


def schedule_of(config: RunConfig, lr: float) -> Schedule:
    names = {f.name for f in dataclasses.fields(Schedule)} - {"lr"}
    return Schedule(lr=lr, **{name: getattr(config.train, name) for name in names})


def _lora(config: RunConfig) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(config.lora).items() if name != "full"}


def _speed(outcome: Fit, wall: float) -> dict[str, Any]:
    seconds = max(outcome.seconds, 1e-9)
    return {
        "steps": outcome.progress.step,
        "examples_per_s": outcome.examples / seconds,
        "tokens_per_s": outcome.tokens / seconds,
        "computed_tokens_per_s": outcome.computed / seconds,
        "seconds": outcome.seconds,
        "wall_seconds": wall,
    }


def _lengths(encoder: Encoder, data: Data) -> tuple[dict[str, float], list[int]]:
    """Tokens and over-long texts of all three sides, and the tokens of each training text; counted in windows, so that no more
    than their numbers is held.
    """
    tokens: list[int] = []
    over = 0
    sides = [e for side in (data.train, data.validation, data.test) for e in side]
    for i in range(0, len(sides), 1024):
        encoded = [e for unit in encode_examples(encoder, sides[i : i + 1024]) for e in unit]
        tokens += [e.tokens for e in encoded]
        over += sum(e.cut for e in encoded)
    found = {"count": len(tokens), "tokens": sum(tokens), "mean": sum(tokens) / len(tokens), "max": max(tokens)}
    return found | {"over_length": over}, tokens[: sum(len(_texts(e)) for e in data.train)]


def write_predictions(
    folder: Path, data: Data, scores: Sequence[np.ndarray], calibration: Calibration | None, *, texts: bool
) -> None:
    """Every test text with what the model makes of it; without ``texts`` rows of the data alone, and groups by number."""
    with (folder / run_folder.PREDICTIONS).open("w", newline="", encoding="utf-8") as f:
        out = csv.writer(f)
        if data.task.kind == "rank":
            out.writerow(["row", "group", *(["text"] if texts else []), "score"])
            for number, (e, s) in enumerate(zip(data.test, scores, strict=True), 1):
                assert isinstance(e, RankGroup)
                group = e.group if texts else number
                for row, text, score in zip(e.rows, e.texts, s[:, 0], strict=True):
                    out.writerow([row, group, *([text] if texts else []), f"{score:.6g}"])
            return
        names, calibration = data.task.label_names, calibration or UNCALIBRATED
        proba = probabilities(np.concatenate(scores), data.task, calibration)
        out.writerow(["row", *(["text"] if texts else []), "label", "predicted", "probability"])
        for e, p, given in zip(data.test, proba, given_labels(proba, data.task, calibration), strict=True):
            assert isinstance(e, LabeledText)
            shown = ["|".join(names[i] for i in some) for some in (e.labels, np.flatnonzero(given))]
            out.writerow([e.row, *([e.text] if texts else []), *shown, f"{p.max():.6g}"])


def _texts(example: Example) -> tuple[str, ...]:
    return example.texts if isinstance(example, RankGroup) else (example.text,)


def _flat(encoder: Encoder, examples: Sequence[Example]) -> list[Encoded]:
    return [e for unit in encode_examples(encoder, examples) for e in unit]


def _by_example(values: np.ndarray, examples: Sequence[Example]) -> list[np.ndarray]:
    return np.split(values, np.cumsum([len(_texts(e)) for e in examples])[:-1])


def _some(examples: list[Any], seed: int, most: int | None = None) -> list[Any]:
    """A seeded part of the examples that holds about ``most`` texts, by default ``FROZEN_TEXTS``."""
    order = np.random.default_rng(seed).permutation(len(examples))
    sizes = np.cumsum([len(_texts(examples[i])) for i in order])
    return [examples[i] for i in order[: max(1, int(np.searchsorted(sizes, most or FROZEN_TEXTS, "right")))]]


def absolute(config: RunConfig) -> RunConfig:
    """Files by their absolute path, so that ``--resume`` finds them from anywhere."""

    def whole(path: str | None) -> str | None:
        return str(Path(path).resolve()) if path and path != "demo" and Path(path).exists() else path

    data = dataclasses.replace(config.data, data=whole(config.data.data) or "", test=whole(config.data.test))
    return dataclasses.replace(
        config, data=data, model=dataclasses.replace(config.model, model=whole(config.model.model) or "")
    )


def _meaning(meaning: Calibration | Spread | None) -> dict[str, Any] | None:
    """What metrics.json says of it; calibration.json holds all of it."""
    if isinstance(meaning, Spread):
        return {"slope": meaning.slope, "spread": meaning.spread}
    return dataclasses.asdict(meaning) if meaning else None


def _calibrated(calibration: Calibration, task: Task) -> str:
    """What was fitted, in a line; labels that can never be given are named."""
    temperature = f"temperature {calibration.temperature:.3g}"
    if task.kind == "single":
        return temperature
    thresholds = calibration.thresholds
    never = [name for name, t in zip(task.label_names, thresholds, strict=True) if t >= 1]
    line = f"{temperature}; labels are given above {min(thresholds):.2f} to {max(thresholds):.2f}"
    return line + (f"; {', '.join(never)} never, as no threshold is precise enough" if never else "")


def _unit(task: Task) -> str:
    return "groups" if task.kind == "rank" else "texts"


def _positions(config: Any) -> int:
    """How many tokens a model has positions for; RoBERTa's first ones stand for padding."""
    known = getattr(config, "max_position_embeddings", None) or 2**31
    return known - (config.pad_token_id + 1 if "roberta" in config.model_type else 0)


def _dtypes(scorer: Scorer) -> str:
    return str(next(scorer.inner.base_model.parameters()).dtype).removeprefix("torch.")


def _trained(scorer: Scorer) -> str:
    trained = sum(p.numel() for p in scorer.parameters() if p.requires_grad)
    return f"{trained / 1e6:.2f} M of {sum(p.numel() for p in scorer.parameters()) / 1e6:.1f} M weights trained"
