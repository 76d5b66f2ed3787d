"""One table of several models and simpler methods, all trained on the same split, each tested in pairs against the first.

A folder holds a run a model, scores and costs of the others, ``comparison.json`` and ``comparison.md``.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from loracle import pipeline
from loracle.baselines import fit
from loracle.baselines.fit import Baseline
from loracle.config import CompareConfig, RunConfig
from loracle.data.splits import Data
from loracle.errors import UserError
from loracle.evaluation.calibration import Calibration
from loracle.evaluation.classification import headline_metric
from loracle.evaluation.significance import Paired, holm
from loracle.evaluation.significance import compare as in_pairs
from loracle.examples import Task
from loracle.experiments.runner import learn_once, place, root_of
from loracle.models.loading import load_config, resolve_base
from loracle.models.scorer import is_encoder
from loracle.pipeline import Log
from loracle.reporting.terminal import difference, figure, markdown_table, plain_table
from loracle.runs import folder as run_folder
from loracle.training import scoring

JSON, TABLE, COSTS = "comparison.json", "comparison.md", "costs.json"
DEPTH = "@depth="
SAMPLED_EVERY = 0.05  # seconds between looks at the memory in use


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One row: a base model that is trained, or a simpler method (``tfidf``, ``frozen``) on the same split."""

    name: str
    method: str  # train, tfidf or frozen
    config: RunConfig


def run(config: RunConfig, settings: CompareConfig, *, log: Log = print, quiet: bool = False) -> Path:
    """Train what is missing, test in pairs, write the table; returns the folder.

    Raises:
        UserError: a name that is no model, before anything is trained; data that cannot be used.
        Interrupted: Ctrl-C; the same call goes on.
    """
    config = pipeline.absolute(dataclasses.replace(config, baselines=False))
    data, root = pipeline.read_data(config, log), root_of(config, "compare")
    contenders = line_up(config, settings, log)
    rows = []
    for number, one in enumerate(contenders, 1):
        log(f"\n{number} of {len(contenders)}: {one.name}")
        folder = place(root, _file_name(one), one.config, data)
        result = _train(one, data, folder, log, quiet) if one.method == "train" else _baseline(one, data, folder, log)
        rows.append({"name": one.name, "method": one.method, "folder": folder.name, **result})
        gc.collect()  # the next one's memory is its own
    pair_up(rows, root, data)
    table = table_of(rows, data.task, settings.price_per_hour)
    lead = f"{len(data.train):,} to learn from, {len(data.test):,} to test on; Δ: less {rows[0]['name']}, p by Holm"
    notes = sorted({row["note"] for row in rows if row.get("note")})
    lead += "".join(f"\n(figures of {note})" for note in notes)
    run_folder.write_text(root / JSON, json.dumps({"task": data.task.kind, "rows": rows}, indent=1))
    run_folder.write_text(root / TABLE, f"{markdown_table(table)}\n\n{lead}\n")
    log(f"\n{plain_table(table)}\n{lead}\n\nfolder: {root}")
    return root


def line_up(config: RunConfig, settings: CompareConfig, log: Log) -> list[Candidate]:
    """``--model`` first, then those it is compared with; every name is looked up before anything is trained.

    Raises:
        UserError: a model that cannot be had, a name twice.
    """
    names = [config.model.model, *(n.strip() for n in settings.against.split(",") if n.strip())]
    if twice := [n for i, n in enumerate(names) if n in names[:i]]:
        raise UserError("each name once, --model among them", f"{twice[0]} twice", "leave it out of --against")
    found = []
    for name in names:
        given, depth = _depth_of(name)
        kind, _, other = given.partition(":")
        method, base = (kind, other) if kind in ("tfidf", "frozen") else ("train", given)
        base = base or config.model.model
        own = config if base == config.model.model else _with_model(config, base)
        if depth is not None:
            if method != "train":
                raise UserError("a depth for a model that is trained", name, f"name {method} without it")
            kept = None if depth == "full" else int(depth) if depth.isdecimal() else depth
            own = dataclasses.replace(own, model=dataclasses.replace(own.model, depth=kept))
        if method != "tfidf":
            own = _fitted(own, settings, log) if method == "train" else own
            resolve_base(own.model.model, own.model.revision)
        found.append(Candidate(name=_short(name), method=method, config=own))
    return found


def _depth_of(name: str) -> tuple[str, str | None]:
    """``NAME@depth=…`` taken apart."""
    base, marked, depth = name.partition(DEPTH)
    return base, depth if marked else None


def _with_model(config: RunConfig, name: str) -> RunConfig:
    """Another base model; a revision is the first one's alone."""
    return pipeline.absolute(
        dataclasses.replace(config, model=dataclasses.replace(config.model, model=name, revision=None))
    )


def _fitted(config: RunConfig, settings: CompareConfig, log: Log) -> RunConfig:
    """Encoders train every weight, at a rate of their own, and take no dial that only decoders know."""
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
        learn_once(one.config, data, folder, log=log, quiet=quiet)
    if not finished:
        run_folder.write_text(costs, json.dumps({"memory": peak[0]}))
    metrics = json.loads((folder / run_folder.METRICS).read_text(encoding="utf-8"))
    info = run_folder.read_info(folder)
    examples = _examples_taken(metrics["train"]["steps"], info.config, len(data.train))
    return {
        "test": metrics["test"],
        "calibration": dataclasses.asdict(run_folder.calibration_of(folder)),
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


def _baseline(one: Candidate, data: Data, folder: Path, log: Log) -> dict[str, Any]:
    """TF-IDF, or a linear model on frozen features of all training texts, or what an earlier call measured of it."""
    if not (folder / COSTS).exists():
        folder.mkdir(parents=True, exist_ok=True)
        started = time.perf_counter()
        with peak_memory() as peak:
            rival, more = _tfidf(one, data) if one.method == "tfidf" else _frozen(one, data, log)
        seconds = time.perf_counter() - started - more.pop("asked", 0.0)
        scoring.write_scores(folder, rival.scores)
        found = {
            "test": scoring.measure(rival.scores, data.test, data.task, rival.calibration),
            "calibration": dataclasses.asdict(rival.calibration),
            "seconds": seconds,
            "memory": peak[0],
            **more,
        }
        run_folder.write_text(folder / COSTS, json.dumps(found))
    return json.loads((folder / COSTS).read_text(encoding="utf-8"))


def _tfidf(one: Candidate, data: Data) -> tuple[Baseline, dict[str, Any]]:
    return fit.tfidf(data, pipeline.choose_loss(one.config, data)[0], one.config.train.seed), {}


def _frozen(one: Candidate, data: Data, log: Log) -> tuple[Baseline, dict[str, Any]]:
    """As the baseline of a run, but from every training text."""
    plain = dataclasses.replace(one.config.model, head="linear", depth=None, quantize=None)
    whole = dataclasses.replace(one.config.lora, full=True, adapt_top=None)
    config = dataclasses.replace(one.config, model=plain, lora=whole)
    base, _, tokenizer, _ = pipeline.open_base(config, data, log)
    scorer, encoder = pipeline.new_model(config, data.task, base, tokenizer)
    loss, _ = pipeline.choose_loss(config, data)
    layer = fit.layer_of(data, scorer, encoder, loss, config.train.seed)
    seen, watched = (fit.mean_features(scorer, encoder, side, layer) for side in (data.train, data.validation))
    asked = time.perf_counter()
    unseen = fit.mean_features(scorer, encoder, data.test, layer)
    asked = time.perf_counter() - asked
    found = fit.frozen(data, data.train, seen, data.validation, watched, unseen, loss, config.train.seed)
    return found, {
        "asked": asked,
        "parameters": sum(p.numel() for p in scorer.inner.base_model.parameters()),
        "texts_per_s": sum(map(len, unseen)) / asked,
        "note": base.note,
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
    process, done, most = psutil.Process(), threading.Event(), 0

    def watch() -> None:
        nonlocal most
        while not done.wait(SAMPLED_EVERY):
            most = max(most, process.memory_info().rss)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()
    peak.append(max(most, process.memory_info().rss))


# --- the table --------------------------------------------------------------------------------------------------------


def pair_up(rows: list[dict[str, Any]], root: Path, data: Data) -> None:
    """Each row against the first, on the same test examples; p values adjusted for their number (Holm)."""
    scores = [scoring.read_scores(root / row["folder"], data.test) for row in rows]
    known = [_calibration(row) for row in rows]
    found: list[Paired] = [
        in_pairs(own, scores[0], data.test, data.task, (calibration, known[0]))
        for own, calibration in zip(scores[1:], known[1:], strict=True)
    ]
    for row, pair, p in zip(rows[1:], found, holm([pair.p for pair in found]), strict=True):
        row["paired"] = {"metric": pair.metric, **pair.difference.to_json(), "p": pair.p, "p_holm": p}


def _calibration(row: dict[str, Any]) -> Calibration:
    """What a row's figures were measured at."""
    kept = row.get("calibration", {})  # not of baselines from before they had one
    return Calibration(**{**kept, "thresholds": tuple(kept.get("thresholds", ()))})


def table_of(rows: list[dict[str, Any]], task: Task, price: float | None) -> list[list[str]]:
    """Header and a row each."""
    metric = "pair_accuracy" if task.kind == "rank" else "accuracy"
    shown = list(dict.fromkeys([headline_metric(task), metric]))
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
