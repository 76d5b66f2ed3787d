"""The same training several times: on each fold of the data, or with several seeds on one split.

Over folds every example is held out once, and the scores of all are measured together. Over seeds only the order, the
dropout and the head differ, so the spread is the effect of chance. A folder holds one run for each repeat and
``validation.json``.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loracle import pipeline
from loracle.config import RunConfig, ValidateConfig
from loracle.data.sources import fingerprint, open_splits
from loracle.errors import Log, UserError
from loracle.evaluation.intervals import as_json
from loracle.experiments.runner import place, root_of, train_once
from loracle.formatting import plain_table
from loracle.reporting.terminal import figure, shown_metrics
from loracle.runs import folder as run_folder
from loracle.tasks import Task
from loracle.tasks.dataset import Data, prepare_data, read_examples
from loracle.training import scoring

JSON = "validation.json"


@dataclass(frozen=True, slots=True)
class Repeat:
    """One training: its name, its configuration and its data."""

    name: str
    config: RunConfig
    data: Data


def run(config: RunConfig, settings: ValidateConfig, *, log: Log = print, quiet: bool = False) -> Path:
    """Train each repeat that is not there yet, then write and print the results. Returns the folder.

    Raises:
        UserError: data that cannot be used, or too few for so many folds.
        Interrupted: Ctrl-C; the same call continues.
    """
    config = pipeline.with_absolute_paths(dataclasses.replace(config, baselines=False))
    root = root_of(config, "folds" if settings.folds else "seeds")
    repeats = fold_repeats(config, settings.folds, log) if settings.folds else seed_repeats(config, settings, log)
    folders = []
    for number, repeat in enumerate(repeats, 1):
        log(f"\n{repeat.name}, {number} of {len(repeats)}")
        folder = place(root, repeat.name, repeat.config, repeat.data)
        folders.append(train_once(repeat.config, repeat.data, folder, log=log, quiet=quiet))
    results = summarize(repeats, folders, pooled=settings.folds is not None)
    run_folder.write_text(root / JSON, json.dumps(results, indent=1))
    log("\n" + "\n".join(lines(results)) + f"\n\nfolder: {root}")
    return root


def seed_repeats(config: RunConfig, settings: ValidateConfig, log: Log) -> list[Repeat]:
    """Runs on one split that differ by their seed."""
    data, first = prepare_data(config, log), config.train.seed
    # The first seed draws the split, which a run's own settings do not name.
    data = dataclasses.replace(data, checksums=data.checksums | {"split": f"seed {first}"})
    return [
        Repeat(f"seed-{s}", dataclasses.replace(config, train=dataclasses.replace(config.train, seed=s)), data)
        for s in range(first, first + (settings.seeds or 0))
    ]


def fold_repeats(config: RunConfig, folds: int, log: Log) -> list[Repeat]:
    """The rotations, each with validation examples of its own. No text is in two parts of one rotation.

    Only the training split of a data set is rotated.

    Raises:
        UserError: a test file or dates, or too few examples.
    """
    if config.data.test or config.data.date:
        flag = "--test" if config.data.test else "--date"
        raise UserError(f"--folds rotates one data set and cannot use {flag}.", f"Leave out {flag}, or pass --seeds.")
    examples = read_examples(open_splits(config.data.data)["train"], config.data)
    for line in (*examples.columns.lines, *(f"note: {issue}" for issue in examples.issues)):
        log(line)
    task, seed, items = examples.task, config.train.seed, list(examples.items)
    task.reading.check_trainable(items, task)
    splits = task.reading.folds(items, folds, seed, task)
    for note in dict.fromkeys(str(note) for split in splits for note in split.notes):
        log(f"note: {note}")
    checksum = fingerprint(config.data.data)
    columns = {role: ",".join(names) for role, names in examples.columns.named().items()}
    repeats = []
    for number, split in enumerate(splits, 1):
        inner = task.reading.split(split.train, config.data.validation_share, seed + 1, task)
        data = Data(
            task=task,
            train=inner.train,
            validation=inner.held_out,
            test=split.held_out,
            issues=(*split.notes, *inner.notes),
            checksums={"train": checksum, "fold": f"{number} of {folds}"},
            columns=columns,
        )
        repeats.append(Repeat(f"fold-{number}", config, data))
    return repeats


def summarize(repeats: list[Repeat], folders: list[Path], *, pooled: bool) -> dict[str, Any]:
    """Metrics of each run, mean and spread of the headline metric, and of folds all held-out examples together."""
    task = repeats[0].data.task
    metric = task.evaluation.headline
    tests = [json.loads((folder / run_folder.METRICS).read_text(encoding="utf-8"))["test"] for folder in folders]
    values = [test[metric]["value"] for test in tests if test[metric]["value"] is not None]
    runs = zip(repeats, folders, tests, strict=True)
    results: dict[str, Any] = {
        "task": task.name,
        "metric": metric,
        "runs": {repeat.name: {"folder": folder.name, "test": test} for repeat, folder, test in runs},
        "mean": float(np.mean(values)) if values else None,
        "standard_deviation": float(np.std(values, ddof=1)) if len(values) > 1 else None,
        "minimum": min(values, default=None),
        "maximum": max(values, default=None),
    }
    if pooled:
        folds = [
            (scoring.read_scores(folder, r.data.test), r.data.test, run_folder.read_calibration(folder, task))
            for r, folder in zip(repeats, folders, strict=True)
        ]
        metrics = as_json(task.evaluation.pooled(folds, task))
        # Each fold has a calibration of its own, so figures before calibration mean nothing here.
        results["pooled"] = {k: v for k, v in metrics.items() if not k.endswith("_uncalibrated")}
    return results


def lines(results: dict[str, Any]) -> list[str]:
    """A row for each run, the pooled metrics, and the spread in words."""
    first = next(iter(results["runs"].values()))["test"]
    names = shown_metrics(Task(name=results["task"]), first)
    rows = [["", *names], *([run, *(figure(r["test"][n], n) for n in names)] for run, r in results["runs"].items())]
    if "pooled" in results:
        rows.append(["all, held out once", *(figure(results["pooled"][n], n) for n in names)])
    text = [plain_table(rows)]
    if results["standard_deviation"] is not None:
        keys = ("mean", "standard_deviation", "minimum", "maximum")
        mean, deviation, low, high = (figure(results[k], results["metric"]) for k in keys)
        text.append(f"{results['metric']}: mean {mean}, standard deviation {deviation}, from {low} to {high}")
    return text
