"""One table of several models and simpler methods, all trained on the same split, each tested in pairs against the first.

A folder holds a run a model, scores and costs of the others, ``comparison.json`` and ``comparison.md``.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from loracle import pipeline
from loracle.baselines.base import Baseline, BaselineInputs, calibrated
from loracle.baselines.linear_probe import VALIDATION_TEXTS, choose_layer, mean_states
from loracle.baselines.tfidf import tfidf_of
from loracle.config import CompareConfig, RunConfig
from loracle.errors import Log, UserError
from loracle.evaluation.significance import Paired, holm
from loracle.experiments.runner import place, root_of, train_once
from loracle.formatting import markdown_table, plain_table
from loracle.models.architectures import is_encoder
from loracle.models.loading import load_config, resolve_base
from loracle.reporting.terminal import difference, figure
from loracle.runs import folder as run_folder
from loracle.tasks import Task
from loracle.tasks.base import LinearFit
from loracle.tasks.dataset import Data, prepare_data
from loracle.training import scoring
from loracle.training.losses import choose_loss, numpy_objective
from loracle.training.prepare import PreparedModel, count_tokens, new_model, open_base
from loracle.training.probe import subsample

JSON, TABLE, COSTS = "comparison.json", "comparison.md", "costs.json"
DEPTH = "@depth="
SAMPLED_EVERY = 0.05  # seconds between looks at the memory in use


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One row: a base model that is trained, or a simpler method (``tfidf``, ``linear-probe``) on the same split."""

    name: str
    method: str  # a key of ``METHODS``
    config: RunConfig


def run(config: RunConfig, settings: CompareConfig, *, log: Log = print, quiet: bool = False) -> Path:
    """Train what is missing, test in pairs, write the table; returns the folder.

    Raises:
        UserError: a name that is no model, before anything is trained; data that cannot be used.
        Interrupted: Ctrl-C; the same call goes on.
    """
    config = pipeline.with_absolute_paths(dataclasses.replace(config, baselines=False))
    data, root = prepare_data(config, log), root_of(config, "compare")
    candidates = line_up(config, settings, log)
    rows = []
    for number, one in enumerate(candidates, 1):
        log(f"\n{number} of {len(candidates)}: {one.name}")
        folder = place(root, _file_name(one), one.config, data)
        result = METHODS[one.method](one, data, folder, log, quiet)
        rows.append({"name": one.name, "method": one.method, "folder": folder.name, **result})
        gc.collect()  # the next one's memory is its own
    pair_up(rows, root, data)
    table = table_of(rows, data.task, settings.price_per_hour)
    lead = f"{len(data.train):,} to learn from, {len(data.test):,} to test on; Δ: less {rows[0]['name']}, p by Holm"
    notes = sorted({row["note"] for row in rows if row.get("note")})
    lead += "".join(f"\n(figures of {note})" for note in notes)
    run_folder.write_text(root / JSON, json.dumps({"task": data.task.name, "rows": rows}, indent=1))
    run_folder.write_text(root / TABLE, f"{markdown_table(table)}\n\n{lead}\n")
    log(f"\n{plain_table(table)}\n{lead}\n\nfolder: {root}")
    return root


def line_up(config: RunConfig, settings: CompareConfig, log: Log) -> list[Candidate]:
    """``--model`` first, then those it is compared with; every name is looked up before anything is trained.

    Raises:
        UserError: a model that cannot be found or loaded, or the same name twice.
    """
    names = [config.model.model, *(n.strip() for n in settings.against.split(",") if n.strip())]
    if twice := [n for i, n in enumerate(names) if n in names[:i]]:
        raise UserError(f"{twice[0]} is named twice, counting --model.", "Leave it out of --against.")
    return [_candidate(name, config, settings, log) for name in names]


def _candidate(name: str, config: RunConfig, settings: CompareConfig, log: Log) -> Candidate:
    """A row from its name: ``tfidf``, ``linear-probe``, ``linear-probe:NAME``, or the name of a base model.

    Raises:
        UserError: there is no such model, or a depth for a method without one.
    """
    given, depth = _depth_of(name)
    prefix, _, other = given.partition(":")
    method, base = (prefix, other) if prefix in METHODS else (TRAIN, given)
    base = base or config.model.model
    own = config if base == config.model.model else _with_model(config, base)
    if depth is not None:
        if method != TRAIN:
            raise UserError(f"{name}: only a model that is trained has a depth.", f"Name {method} without it.")
        layers = None if depth == "full" else int(depth) if depth.isdecimal() else depth
        own = dataclasses.replace(own, model=dataclasses.replace(own.model, depth=layers))
    if method == TRAIN:
        own = _fitted(own, settings, log)
    if method != "tfidf":
        resolve_base(own.model.model, own.model.revision)
    return Candidate(name=_short(name), method=method, config=own)


def _depth_of(name: str) -> tuple[str, str | None]:
    """``NAME@depth=…`` taken apart."""
    base, marked, depth = name.partition(DEPTH)
    return base, depth if marked else None


def _with_model(config: RunConfig, name: str) -> RunConfig:
    """Another base model; a revision is the first one's alone."""
    return pipeline.with_absolute_paths(
        dataclasses.replace(config, model=dataclasses.replace(config.model, model=name, revision=None))
    )


def _fitted(config: RunConfig, settings: CompareConfig, log: Log) -> RunConfig:
    """Encoders train every weight, at a rate of their own, and take no setting that only decoders know."""
    base = resolve_base(config.model.model, config.model.revision)
    if not is_encoder(load_config(base.folder)):
        return config
    model = config.model
    plain = dataclasses.replace(
        model,
        depth=None,
        head="linear",
        head_init="random",
        quantize=None,
        template=None if model.template == "chat" else model.template,
    )
    left = [f.name for f in dataclasses.fields(model) if getattr(model, f.name) != getattr(plain, f.name)]
    if left:
        flags = ", ".join("--" + name.replace("_", "-") for name in left)
        log(f"note: {_short(model.model)} is an encoder, which takes no {flags}")
    config = dataclasses.replace(config, model=plain)
    if settings.encoder_full:
        config = dataclasses.replace(
            config,
            lora=dataclasses.replace(config.lora, full=True, adapt_top=None),
            train=dataclasses.replace(config.train, lr=settings.encoder_lr),
        )
    return config


# --- one row ----------------------------------------------------------------------------------------------------------


def _train(one: Candidate, data: Data, folder: Path, log: Log, quiet: bool) -> dict[str, Any]:
    """Train a model, or read what an earlier call trained."""
    costs = folder.with_name(f"{folder.name}.json")  # beside the run folder, whose manifest is closed
    finished = (folder / run_folder.MANIFEST).exists()
    with peak_memory() as peak:
        train_once(one.config, data, folder, log=log, quiet=quiet)
    if not finished:
        run_folder.write_text(costs, json.dumps({"memory": peak[0]}))
    metrics = json.loads((folder / run_folder.METRICS).read_text(encoding="utf-8"))
    info = run_folder.read_info(folder)
    examples = _examples_taken(metrics["train"]["steps"], info.config, len(data.train))
    return {
        "test": metrics["test"],
        "calibration": _fields(run_folder.read_calibration(folder, data.task)),
        "seconds": examples / metrics["train"]["examples_per_s"],  # an interrupted run only timed its last part
        "memory": json.loads(costs.read_text(encoding="utf-8"))["memory"] if costs.exists() else None,
        "parameters": metrics["scoring"]["parameters"],
        "texts_per_s": metrics["scoring"]["texts_per_s"],
        "note": info.base.get("note"),
        "depth": info.config.model.depth,  # auto is settled by now
    }


def _examples_taken(steps: int, config: RunConfig, examples: int) -> int:
    epochs, rest = divmod(steps, -(-examples // config.train.batch))
    return epochs * examples + rest * config.train.batch


def _tfidf(one: Candidate, data: Data, folder: Path, log: Log, quiet: bool) -> dict[str, Any]:
    """A linear model on TF-IDF."""

    def fit() -> tuple[Baseline, dict[str, Any]]:
        loss, _ = choose_loss(data, one.config.train)
        return tfidf_of(data, LinearFit(numpy_objective(loss), one.config.train.seed)), {}

    return _measured(fit, data, folder)


def _linear_probe(one: Candidate, data: Data, folder: Path, log: Log, quiet: bool) -> dict[str, Any]:
    """As the baseline of a run, but from every training text."""
    return _measured(lambda: _probe_all(one, data, log), data, folder)


def _measured(fit: Callable[[], tuple[Baseline, dict[str, Any]]], data: Data, folder: Path) -> dict[str, Any]:
    """Metrics, seconds and memory of a baseline, or what an earlier call measured of it."""
    if not (folder / COSTS).exists():
        folder.mkdir(parents=True, exist_ok=True)
        started = time.perf_counter()
        with peak_memory() as peak:
            baseline, more = fit()
        seconds = time.perf_counter() - started - more.pop("test_seconds", 0.0)
        scoring.write_scores(folder, baseline.scores)
        result = {
            "test": scoring.measure(baseline.scores, data.test, data.task, baseline.calibration),
            "calibration": _fields(baseline.calibration),
            "seconds": seconds,
            "memory": peak[0],
            **more,
        }
        run_folder.write_text(folder / COSTS, json.dumps(result))
    return json.loads((folder / COSTS).read_text(encoding="utf-8"))


def _fields(calibration: Any) -> dict[str, Any] | None:
    return None if calibration is None else dataclasses.asdict(calibration)


def _probe_all(one: Candidate, data: Data, log: Log) -> tuple[Baseline, dict[str, Any]]:
    plain = dataclasses.replace(one.config.model, head="linear", depth=None, quantize=None)
    full = dataclasses.replace(one.config.lora, full=True, adapt_top=None)
    config = dataclasses.replace(one.config, model=plain, lora=full)
    base = open_base(config, data, log)
    scorer, encoder = new_model(config, data.task, base, None)
    loss, settings = choose_loss(data, config.train)
    model = PreparedModel(
        base=base, depth=None, scorer=scorer, encoder=encoder, loss=loss, loss_settings=settings, lr=0.0,
        tokens=count_tokens(encoder, data),
    )  # fmt: skip
    seed = config.train.seed
    inputs = BaselineInputs(data=data, model=model, seed=seed)
    sample = subsample(data.train, seed), subsample(data.validation, seed, VALIDATION_TEXTS)
    layer = choose_layer(model, data, *sample, inputs).layer
    train, validation = (mean_states(model, items, layer) for items in (data.train, data.validation))
    started = time.perf_counter()
    test = mean_states(model, data.test, layer)
    seconds = time.perf_counter() - started
    scores = data.task.learning.fit_features((train, [*validation, *test]), data.train, data.task, inputs.fit)
    return calibrated(scores, data.validation, data), {
        "test_seconds": seconds,
        "parameters": sum(p.numel() for p in scorer.inner.base_model.parameters()),
        "texts_per_s": sum(map(len, test)) / seconds,
        "note": base.source.note,
    }


TRAIN = "train"
METHODS: dict[str, Callable[[Candidate, Data, Path, Log, bool], dict[str, Any]]] = {
    TRAIN: _train,
    "tfidf": _tfidf,
    "linear-probe": _linear_probe,
}


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """Fills a list with the most bytes in use inside: of the GPU by torch, else resident in this process, sampled.

    The process holds its libraries and the data too, alike for all.
    """
    peak: list[int] = []
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        yield peak
        peak.append(torch.cuda.max_memory_allocated())
        return
    process, done, peak_bytes = psutil.Process(), threading.Event(), 0

    def watch() -> None:
        nonlocal peak_bytes
        while not done.wait(SAMPLED_EVERY):
            peak_bytes = max(peak_bytes, process.memory_info().rss)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()
    peak.append(max(peak_bytes, process.memory_info().rss))


# --- the table --------------------------------------------------------------------------------------------------------


def pair_up(rows: list[dict[str, Any]], root: Path, data: Data) -> None:
    """Each row against the first, on the same test examples; p values adjusted for their number (Holm)."""
    evaluation = data.task.evaluation
    scores = [scoring.read_scores(root / row["folder"], data.test) for row in rows]
    calibrations = [row["calibration"] and evaluation.read_calibration(row["calibration"]) for row in rows]
    tests: list[Paired] = [
        evaluation.compare(own, scores[0], data.test, data.task, (calibration, calibrations[0]))
        for own, calibration in zip(scores[1:], calibrations[1:], strict=True)
    ]
    for row, pair, p in zip(rows[1:], tests, holm([pair.p for pair in tests]), strict=True):
        row["paired"] = {"metric": pair.metric, **pair.difference.to_json(), "p": pair.p, "p_holm": p}


def table_of(rows: list[dict[str, Any]], task: Task, price: float | None) -> list[list[str]]:
    """Header and a row each."""
    metric = task.evaluation.paired_metric
    shown = list(dict.fromkeys([task.evaluation.headline, metric]))
    cost = "hours / M texts" if price is None else "cost / M texts"
    table = [["", *shown, f"Δ {metric}", "p", "training", "memory", "weights", cost]]
    for row in rows:
        pair, speed = row.get("paired"), row.get("texts_per_s")
        table.append([
            row["name"] + (f" ({row['depth']} layers)" if row.get("depth") else ""),
            *(figure(row["test"][name], name) for name in shown),
            "" if pair is None else difference(pair, pair["metric"]),
            "" if pair is None else f"{pair['p_holm']:.2g}",
            f"{row['seconds']:,.0f} s" if row["seconds"] >= 10 else f"{row['seconds']:.1f} s",
            "–" if row["memory"] is None else f"{row['memory'] / 1e9:.1f} GB",
            "–" if not row.get("parameters") else f"{row['parameters'] / 1e6:,.1f} M",
            "–" if not speed else f"{1e6 / speed / 3600 * (price or 1.0):,.2f}",
        ])  # fmt: skip
    return table


def _short(name: str) -> str:
    """A folder by its last part; other names as they are."""
    whole, depth = _depth_of(name)
    method, _, path = whole.rpartition(":")
    short = whole if not Path(path).exists() else f"{method}:{Path(path).name}".lstrip(":")
    return short if depth is None else f"{short}{DEPTH}{depth}"


def _file_name(one: Candidate) -> str:
    return "".join(c if c.isalnum() or c in "-._" else "-" for c in one.name)
