"""A whole run on one page: read it downward and you know what happens, in this order."""

from __future__ import annotations

import csv
import dataclasses
import glob
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from loracle.baselines.budget import Plan, Work
from loracle.baselines.fit import (
    Baseline,
    ask_untuned,
    label_words,
    plan_baselines,
    probe_depths,
    score_baselines,
    subsample,
)
from loracle.baselines.linear_probe import Depth, choose, verdict
from loracle.config import SATURATING, DataConfig, RunConfig, TrainConfig
from loracle.data.checks import audit, check_trainable, without_leaks
from loracle.data.reader import Examples, read_examples
from loracle.data.sources import fingerprint, open_splits, open_table
from loracle.data.splits import Data, split
from loracle.data.table import Table
from loracle.errors import UserError
from loracle.evaluation import linear_models
from loracle.evaluation.calibration import Calibration, fit_calibration
from loracle.evaluation.classification import (
    UNCALIBRATED,
    given_labels,
    headline_metric,
    probabilities,
    target_array,
)
from loracle.evaluation.click_model import Spread, fit_spread
from loracle.evaluation.drift import reference
from loracle.examples import Example, LabeledText, RankGroup, Task, texts_of
from loracle.models import build
from loracle.models.hidden_state_cache import LowerLayers, keep_lower
from loracle.models.loading import (
    BaseModel,
    load_config,
    load_tokenizer,
    pick_device,
    pick_dtype,
    positions,
    resolve_base,
)
from loracle.models.lora import save_adapter
from loracle.models.memory import (
    free_memory,
    out_of_memory,
    release,
    training_need,
    training_rate,
    weight_bytes,
)
from loracle.models.scorer import Scorer, is_encoder
from loracle.reporting.html import render
from loracle.reporting.report import build_report, curves, training_suspects, without_texts
from loracle.reporting.terminal import summary
from loracle.runs import folder as run_folder
from loracle.runs.model_card import model_card
from loracle.runs.predictor import Predictor
from loracle.text import packing
from loracle.text.template import check_contexts, install_template
from loracle.text.tokenize import Encoded, Encoder
from loracle.training import distributed, tracking
from loracle.training.loop import FEWEST_TOKENS, Fit, Schedule, fit
from loracle.training.losses import (
    SATURATION,
    Loss,
    class_weights,
    click_rate,
    fit_saturation,
    make_loss,
    numpy_objective,
    resolve_loss,
)
from loracle.training.optimizer import default_lr
from loracle.training.scoring import (
    encode_examples,
    encode_texts,
    look,
    measure,
    score_examples,
    write_scores,
)

Log = Callable[[str], None]
HEAD_TEXTS = 512  # training texts by whose states a head from the labels' names is scaled
REPRODUCED = 64  # test texts whose scores the reloaded run must give again
TOLERANCE = 1e-6
OTHER_DEVICE = 0.1  # the same, where a bfloat16 model is asked on another device than it was trained on
PREFLIGHT_BATCHES = 16  # from which the tokens of an epoch are estimated
TIMED_TOKENS = 512  # that a CPU is timed with
USABLE = 0.9  # of the free memory


def train(config: RunConfig, *, log: Log = print, quiet: bool = False) -> Path:
    """Train, measure and save what ``config`` describes; returns the run folder.

    Raises:
        UserError: data, model or settings that cannot be used. Interrupted: Ctrl-C; ``resume`` goes on.
    """
    log = distributed.main_says(log, pick_device(config.model.device))
    config, folder = absolute(config), distributed.on_main(lambda: new_folder(config))
    return learn(config, distributed.on_main(lambda: read_data(config, log)), folder, log=log, quiet=quiet)


def resume(folder: Path, *, log: Log = print, quiet: bool = False) -> Path:
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
    log = distributed.main_says(log, pick_device(config.model.device))
    data = distributed.on_main(lambda: read_data(config, log))
    if data.checksums != info.provenance["data"]:
        raise UserError(f"the data that {folder} began with", "other bytes", "restore the file or start a new run")
    base = resolve_base(config.model.model, config.model.revision)
    if base.checksum() != info.base["sha256"]:
        raise UserError(f"the base model that {folder} began with", "other weights", "restore them or start a new run")
    return learn(config, data, folder, log=log, quiet=quiet)


def read_data(config: RunConfig, log: Log) -> Data:
    """File or hub id to train, validation and test."""
    where = config.data
    tables = open_splits(where.data)
    found = read_examples(tables["train"], where)
    for line in found.columns.said:
        log(line)
    test: Examples | None
    if where.test:
        test = read_examples(open_table(where.test), where, task=found.task)
    else:
        test = _labelled_split(tables.get("test"), where, found.task, log)
    validation = _labelled_split(tables.get("validation"), where, found.task, log)
    data = divide(config, found, test, validation)
    for issue in data.issues:
        log(f"note: {issue}")
    return dataclasses.replace(
        data,
        checksums={name: fingerprint(p) for name, p in (("train", where.data), ("test", where.test)) if p},
        columns={role: ",".join(names) for role, names in found.columns.named().items()},
    )


def _labelled_split(table: Table | None, where: DataConfig, task: Task, log: Log) -> Examples | None:
    """A split that a data set brings along, unless it has no labels, as the test splits of some benchmarks."""
    if table is None:
        return None
    try:
        return read_examples(table, where, task=task)
    except UserError as e:
        log(f"note: {table.name} is not used, a part of the training side is held out instead ({e.found})")
        return None


def divide(
    config: RunConfig, found: Examples, test: Examples | None = None, validation: Examples | None = None
) -> Data:
    """Three sides without a common text; only what the user gave no file for is split off, seeded."""
    check_trainable(found)
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
    check_trainable(dataclasses.replace(found, items=items))
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
    config: RunConfig, data: Data, folder: Path, *, log: Log = print, quiet: bool = False, keep_scores: bool = False
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
        log(f"{world.num_processes} processes share each batch of {config.train.batch}")
    log(f"{len(data.train):,} training, {len(data.validation):,} validation, {len(data.test):,} test {task.unit}")
    log("loss: " + ", ".join(f"{v}" if k == "name" else f"{k} {v:,.4g}" for k, v in chosen.items()))

    # Model, tokenizer with the template baked in, and the first look at lengths.
    with world.local_main_process_first():  # the others then find what it has downloaded
        base, base_config, tokenizer, room = open_base(config, data, log)
    if model.depth == "auto":
        log("a linear probe on every layer …")
        depths = distributed.on_main(lambda: probe_depths(config, data, loss, base, tokenizer))
        log(verdict(depths))
        config = dataclasses.replace(config, model=dataclasses.replace(model, depth=choose(depths).layers))
        model = config.model
    scorer, encoder = new_model(config, task, base, tokenizer)
    if model.shard:
        distributed.shard(scorer, device)
    distributed.on_main(lambda: start_head(config, scorer, encoder, data), along=scorer)
    kept = keep_lower_states(config, scorer, base)
    lr = learning_rate(config, base_config)
    lengths, tokens = _lengths(encoder, data)
    log(
        f"model: {base.note or base.source}; {_trained(scorer)}; {_dtypes(scorer)} on {scorer.device}; learning rate {lr:g}"
    )
    log(
        f"tokens a text: {lengths['mean']:.0f} on average, {lengths['max']} at most; "
        f"{lengths['over_length']:,} texts over {room} ({'cut' if model.long == 'cut' else 'chunked'})"
    )
    if kept:
        size, limit = lengths["tokens"] * kept.cache.width, kept.cache.limit
        log(
            f"states of the lower {kept.depth} layers, {size / 1e9:.2g} GB at most, are read from {kept.cache.folder}, or "
            "computed once"
        )
        if size > limit:
            log(
                f"note: --cache-gb {limit / 1e9:g} may not hold them; a batch of which some are missing is computed each time"
            )
    if not scorer.packed:
        log(f"{base_config.model_type} is not proven packable here: batches are padded, sorted by length")
    schedule, work = preflight(config, scorer, encoder, data, log)
    config = dataclasses.replace(config, train=schedule)
    if world.is_main_process:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise UserError(f"a place for the run folder {folder}", e.strerror or str(e), "pick another --out") from e
        run_folder.write_info(folder, _info(config, data, base, tokenizer, lr, chosen))
        save_tokenizer(tokenizer, folder)

    # Baselines see the model untuned, so they come first; the test side is only scored, never chosen by.
    rivals: dict[str, Baseline] = {}
    notes: list[str] = []
    planned: Plan | None = None

    def ask_rivals() -> tuple[dict[str, Baseline], list[str], Plan]:
        untuned = ask_untuned(config, data, scorer, encoder, base)
        planned = plan_baselines(data, scorer, work, untuned)
        return *score_baselines(data, scorer, encoder, loss, planned, untuned, seed=seed), planned

    if config.baselines:
        log("baselines …")
        rivals, notes, planned = distributed.on_main(ask_rivals, along=scorer)
        for line in notes:
            log(f"note: {line}")

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

    def finish() -> None:
        # What the scores mean is settled on the validation examples too.
        watched = score_examples(scorer, encoder, data.validation)
        meaning = fit_meaning(watched, data, config.train.target_precision)
        calibration = meaning if isinstance(meaning, Calibration) else None
        if calibration:
            log(f"calibration on {len(data.validation):,} validation texts: {_calibrated(calibration, task)}")

        # The test examples, once.
        asked = time.perf_counter()
        scores = score_examples(scorer, encoder, data.test)
        texts_per_s = sum(map(len, scores)) / (time.perf_counter() - asked)
        metrics: dict[str, Any] = {
            "task": task.kind,
            "base": base.note or base.source,
            "train": _speed(outcome, time.perf_counter() - started),
            "validation": {
                "best_step": outcome.progress.best_step,
                headline_metric(task): outcome.progress.best_metric,
            },
            "calibration": _meaning(meaning),
            "test": measure(scores, data.test, task, calibration),
            "scoring": {"texts_per_s": texts_per_s, "parameters": sum(p.numel() for p in scorer.inner.parameters())},
            "baselines": {who: measure(r.scores, data.test, task, r.calibration) for who, r in rivals.items()},
            "notes": notes,
            "texts": lengths,
            "noticed": {issue.kind: issue.count for issue in data.issues},
        }
        if meaning:
            run_folder.write_calibration(folder, meaning)
        run_folder.write_reference(folder, reference(tokens, np.concatenate(watched), task, calibration))
        if keep_scores:
            write_scores(folder, scores)
        of_rivals = {who: rival.scores for who, rival in rivals.items()}
        told = write_report(folder, data, scores, of_rivals, metrics, calibration, planned.searched if planned else 0)
        save(folder, config, scorer, base, data, scores, metrics, calibration)
        verify_reload(folder, base, data.test, scorer, encoder)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        log(f"\n{told}\n")
        log(summary(metrics, task.kind, base.note))
        log(f"\nrun folder: {folder}; a page to read: {folder / run_folder.PAGE}")

    distributed.on_main(finish, along=scorer)
    return folder


# --- the steps --------------------------------------------------------------------------------------------------------


def new_model(config: RunConfig, task: Task, base: BaseModel, tokenizer: Any) -> tuple[Scorer, Encoder]:
    """The base with a fresh head and fresh adapters, and what encodes texts for it."""
    model, device = config.model, pick_device(config.model.device)
    dtype = pick_dtype(model.dtype, config.lora.full, device)
    scorer = build.new_scorer(
        base.folder,
        task,
        pad_token_id=tokenizer.pad_token_id,
        dtype=dtype,
        device=torch.device("cpu") if model.shard else device,  # from where each process takes its parts
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
    build.head_from_names(
        scorer, encoder(words), encode_texts(encoder, subsample(data.train, config.train.seed)[:HEAD_TEXTS])
    )


def learning_rate(config: RunConfig, base_config: Any) -> float:
    """What the user gave, or what the model's width calls for."""
    given = config.train.lr
    return default_lr(base_config.hidden_size, full=config.lora.full) if given is None else given


def open_base(config: RunConfig, data: Data, log: Log) -> tuple[BaseModel, Any, Any, int]:
    """The base model, its config, its tokenizer with the template baked in, and how many tokens a text may have."""
    model = config.model
    base = resolve_base(model.model, model.revision)
    base_config = load_config(base.folder)
    _check_weights_fit(base, config)
    room = min(model.max_length, positions(base_config))
    if room < model.max_length:
        log(f"note: the model reads {room} tokens at most, so --max-length {model.max_length} becomes {room}")
    check_contexts(model.template, (e.context for side in (data.train, data.validation, data.test) for e in side))
    tokenizer = install_template(load_tokenizer(base.folder), model.template, room, encoder=is_encoder(base_config))
    return base, base_config, tokenizer, room


def probe(config: RunConfig, *, log: Log = print) -> tuple[list[Depth], str]:
    """What a linear probe reaches on the states of each layer of the untuned model, on validation examples; and in what.

    Raises:
        UserError: as ``train``.
    """
    config = absolute(config)
    data = read_data(config, log)
    loss, _ = choose_loss(config, data)
    base, _, tokenizer, _ = open_base(config, data, log)
    return probe_depths(config, data, loss, base, tokenizer), headline_metric(data.task)


def preflight(config: RunConfig, scorer: Scorer, encoder: Encoder, data: Data, log: Log) -> tuple[TrainConfig, Work]:
    """Say what the training will take before it begins, and return it; rounds that would not fit the memory are made smaller.

    Tokens come from a few seeded batches, memory and operations from the model's shapes, the speed from some of these tokens
    that go through the model now.
    """
    schedule, device = config.train, scorer.device
    steps = schedule_of(config, 0.0).total_steps(len(data.train))
    order = np.random.default_rng(schedule.seed).permutation(len(data.train))[: PREFLIGHT_BATCHES * schedule.batch]
    batches = [order[i : i + schedule.batch] for i in range(0, len(order), schedule.batch)]
    useful, computed, padded, count, largest = 0, [], 0, 0, 0
    timed: list[Encoded] = []  # a round of the first batch: on a GPU a whole one, on a CPU what takes a second or a few
    for batch in batches:
        units = encode_examples(encoder, [data.train[i] for i in batch])
        texts = [e for unit in units for e in unit]
        packed = scorer.pack(texts)
        useful, padded = useful + packed.useful_tokens, padded + len(texts) * max(e.tokens for e in texts)
        computed.append(packed.tokens)
        count += len(texts)
        largest = max(largest, *(packing.rows(unit, share_from=scorer.share_from) for unit in units))
        if not timed:
            enough = schedule.tokens_per_micro_batch if device.type == "cuda" else TIMED_TOKENS
            timed = [
                e for i in next(packing.micro_batches(units, enough, share_from=scorer.share_from)) for e in units[i]
            ]
    scale = len(data.train) / len(order)
    log(
        f"an epoch: {useful * scale:,.0f} tokens of text, {sum(computed) * scale:,.0f} to compute; padding every text to the "
        f"longest of its batch would be {padded * scale:,.0f}"
    )

    need, free = training_need(scorer, config.lora.adapt_top), int(USABLE * free_memory(device))
    rounds = max(largest, min(schedule.tokens_per_micro_batch, max(computed)))
    log(f"memory: {need.bytes(rounds) / 1e9:.1f} GB for rounds of {rounds:,} tokens, of {free / 1e9:.1f} GB to be had")
    if need.bytes(rounds) > free:
        four_bit = device.type == "cuda" and not (config.model.quantize or config.lora.full or scorer.encoder)
        less = "--quantize nf4 or a smaller --model takes" if four_bit else "A smaller --model takes"
        fits = max(FEWEST_TOKENS, need.tokens(free))
        if need.bytes(least := max(FEWEST_TOKENS, largest)) > free:
            log(
                f"note: there may be too little even for rounds of {least:,} tokens, which one text or group makes up. "
                f"{less} less, and so does a smaller --max-length."
            )
        else:
            log(f"note: rounds of {fits:,} tokens instead; steps and results stay the same. {less} less.")
        schedule = dataclasses.replace(schedule, tokens_per_micro_batch=fits)

    passes = max(1.0, steps * schedule.batch / len(data.train))
    spared = need.lower_flops * (1 - 1 / passes) if scorer.lower is not None else 0.0  # read from the cache
    operations = (need.flops_per_token - spared) * float(np.mean(computed)) * steps
    try:
        rate = training_rate(scorer, scorer.pack(timed))
    except (RuntimeError, MemoryError) as e:  # training makes its rounds smaller until they fit
        if not out_of_memory(e) or scorer.sharded:
            raise
        release(scorer)
        log(f"how long {steps:,} steps take is not known: there is too little memory for {len(timed):,} texts at once")
    else:
        seconds = operations / (need.flops_per_token * rate * distributed.start(device).num_processes)
        log(f"about {_duration(seconds)} for {steps:,} steps, at the {rate:,.0f} tokens/s that it learns now")
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
        if model.shard and place.type != "cpu":
            wanted //= distributed.start(device).num_processes
        elif model.shard:  # each process of this machine reads all of them
            wanted *= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if wanted > (free := free_memory(place)):
            four_bit = place.type == "cuda" and not model.quantize and small < free
            raise UserError(
                f"{wanted / 1e9:.1f} GB for the weights of {base.source} on {place}",
                f"{free / 1e9:.1f} GB free",
                (f"pass --quantize nf4 ({small / 1e9:.1f} GB)" if four_bit else "close what else runs")
                + ", or pass a smaller --model",
            )


def keep_lower_states(config: RunConfig, scorer: Scorer, base: BaseModel) -> LowerLayers | None:
    """Put the layers below the adapters behind a cache, where there are such layers."""
    decoder = scorer.inner.base_model
    top, cache_gb = config.lora.adapt_top, config.train.cache_gb
    if top is None or config.lora.full or not cache_gb or scorer.encoder or not scorer.packed or scorer.sharded:
        return None
    if (below := decoder.config.num_hidden_layers - top) < 1:
        return None
    if getattr(decoder.config, "attention_dropout", 0.0):  # then states differ each time
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
    if schedule.target_precision is not None and task.kind != "multi":
        raise UserError("several labels a text for --target-precision", "another task", "leave it out")
    name = resolve_loss(task, schedule.loss, click_rate(data.train) if task.evidence == "clicks" else 0.0)
    if task.kind != "rank":
        weights = class_weights(data.train, task, schedule.class_weights)
        return make_loss(task, name=name, weights=weights), {"name": name}
    if name not in SATURATING or task.evidence != "clicks":
        return make_loss(task, name=name, margin=schedule.margin), {"name": name}
    m0 = schedule.saturation
    if m0 is None:
        objective = numpy_objective(make_loss(task, name="list"))
        scores = linear_models.tfidf_ranker(data.train, data.validation, objective, seed=schedule.seed)
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
    report = build_report(scores, data.test, task, metrics, rivals, calibration)
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


def verify_reload(folder: Path, base: BaseModel, test: Sequence[Example], scorer: Scorer, encoder: Encoder) -> None:
    """Load the folder afresh and compare: a run that does not give its own scores again must not pass for one.

    A base that was too large for a GPU is loaded into the CPU's memory, which rounds otherwise.
    """
    sample = [(t, e.context) for e in test for t in texts_of(e)][:REPRODUCED]
    texts, contexts = [t for t, _ in sample], [c for _, c in sample]
    own = build.score(scorer, encoder(texts, contexts))
    device = "cpu" if scorer.sharded else str(scorer.device)
    again = Predictor(folder, base=str(base.folder), device=device).scores(texts, contexts)
    worst = float(np.max(np.abs(own - again) / np.maximum(1, np.abs(own))))
    if not worst <= (TOLERANCE if device == str(scorer.device) else OTHER_DEVICE):
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
    return found | {"over_length": over}, tokens[: sum(len(texts_of(e)) for e in data.train)]


def write_predictions(
    folder: Path, data: Data, scores: Sequence[np.ndarray], calibration: Calibration | None, *, texts: bool
) -> None:
    """Every test text, with its context if any has one, and what the model makes of it.

    Without ``texts`` rows of the data alone, and groups by number.
    """
    behind = any(e.context is not None for e in data.test)
    shown_texts = [*(["text"] if texts else []), *(["context"] if texts and behind else [])]

    def told(text: str, context: str | None) -> list[str | None]:
        return [text, context][: len(shown_texts)]

    with (folder / run_folder.PREDICTIONS).open("w", newline="", encoding="utf-8") as f:
        out = csv.writer(f)
        if data.task.kind == "rank":
            out.writerow(["row", "group", *shown_texts, "score"])
            for number, (e, s) in enumerate(zip(data.test, scores, strict=True), 1):
                assert isinstance(e, RankGroup)
                group = e.group if texts else number
                for row, text, score in zip(e.rows, e.texts, s[:, 0], strict=True):
                    out.writerow([row, group, *told(text, e.context), f"{score:.6g}"])
            return
        names, calibration = data.task.label_names, calibration or UNCALIBRATED
        proba = probabilities(np.concatenate(scores), data.task, calibration)
        out.writerow(["row", *shown_texts, "label", "predicted", "probability"])
        for e, p, given in zip(data.test, proba, given_labels(proba, data.task, calibration), strict=True):
            assert isinstance(e, LabeledText)
            shown = ["|".join(names[i] for i in some) for some in (e.labels, np.flatnonzero(given))]
            out.writerow([e.row, *told(e.text, e.context), *shown, f"{p.max():.6g}"])


def absolute(config: RunConfig) -> RunConfig:
    """Files by their absolute path, so that ``--resume`` finds them from anywhere."""

    def whole(path: str | None) -> str | None:
        here = path and path != "demo" and (Path(path).exists() or glob.has_magic(path))
        return str(Path(path).resolve()) if path and here else path

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


def _dtypes(scorer: Scorer) -> str:
    return str(next(scorer.inner.base_model.parameters()).dtype).removeprefix("torch.")


def _trained(scorer: Scorer) -> str:
    trained = sum(p.numel() for p in scorer.parameters() if p.requires_grad)
    return f"{trained / 1e6:.2f} M of {sum(p.numel() for p in scorer.parameters()) / 1e6:.1f} M weights trained"
