"""The same training several times: on each fold of the data, or with several seeds on one split.

Folds say what the whole data set has to tell: every example is held out once, and the scores of all of them are measured
together. Seeds say how much of a figure is luck of order, dropout and head. A folder holds a run a repeat and
``validation.json``.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import logit

from loracle import pipeline
from loracle.config import RunConfig, ValidateConfig
from loracle.data.checks import check_trainable
from loracle.data.reader import Examples, read_examples
from loracle.data.sources import fingerprint, open_splits
from loracle.data.splits import Data, group_folds, split, text_folds
from loracle.errors import UserError
from loracle.evaluation.classification import headline_metric
from loracle.examples import Task
from loracle.experiments.runner import learn_once, place, root_of
from loracle.pipeline import Log
from loracle.reporting.terminal import SHOWN, figure, plain_table
from loracle.runs import folder as run_folder
from loracle.training import scoring

JSON = "validation.json"
AT_THRESHOLDS = ("accuracy", "subset_accuracy", "micro_f1", "macro_f1")  # what thresholds decide of several labels
MOST = 1e3  # of the logit of a threshold: one of 0 or 1 has none that could be reckoned with


def run(config: RunConfig, settings: ValidateConfig, *, log: Log = print, quiet: bool = False) -> Path:
    """Train each repeat that is not there yet, write and show what they gave; returns the folder.

    Raises:
        UserError: data that cannot be used, or too few for so many folds.
        Interrupted: Ctrl-C; the same call goes on.
    """
    config = pipeline.absolute(dataclasses.replace(config, baselines=False))
    root = root_of(config, "folds" if settings.folds else "seeds")
    if settings.folds:
        repeats = [(f"fold-{k}", config, side) for k, side in enumerate(fold_sides(config, settings.folds, log), 1)]
    else:
        data, first = pipeline.read_data(config, log), config.train.seed
        # The first seed draws the split, of which a run's own settings tell nothing.
        data = dataclasses.replace(data, checksums=data.checksums | {"split": f"seed {first}"})
        seeds = range(first, first + (settings.seeds or 0))
        repeats = [(f"seed-{s}", _with_seed(config, s), data) for s in seeds]
    runs: list[tuple[str, Path, Data]] = []
    for name, own, side in repeats:
        log(f"\n{name}, {len(runs) + 1} of {len(repeats)}")
        runs.append((name, learn_once(own, side, place(root, name, own, side), log=log, quiet=quiet), side))
    found = summary(runs)
    run_folder.write_text(root / JSON, json.dumps(found, indent=1))
    log("\n" + "\n".join(lines(found)) + f"\n\nfolder: {root}")
    return root


def fold_sides(config: RunConfig, folds: int, log: Log) -> list[Data]:
    """The rotations, each with validation examples of its own; no text stands on two sides of one.

    Only the training split of a data set is rotated, a test file is not: it is for the end.
    """
    if config.data.test or config.data.date:
        named = "--test" if config.data.test else "--date"
        raise UserError("folds of one data set, in no order", named, f"leave out {named}, or pass --seeds instead")
    found: Examples = read_examples(open_splits(config.data.data)["train"], config.data)
    for line in (*found.columns.said, *(f"note: {issue}" for issue in found.issues)):
        log(line)
    check_trainable(found)
    items: list[Any] = list(found.items)
    task, seed = found.task, config.train.seed
    sides = group_folds(items, folds, seed) if task.kind == "rank" else text_folds(items, folds, seed, task)
    for note in sides[0].notes if task.kind != "rank" else [n for side in sides for n in side.notes]:
        log(f"note: {note}")
    checksums = {"train": fingerprint(config.data.data)}
    columns = {role: ",".join(names) for role, names in found.columns.named().items()}
    rotations = []
    for number, side in enumerate(sides, 1):
        inner = split(side.train, config.data.validation_share, seed + 1, task)
        issues = (*side.notes, *inner.notes)
        known = checksums | {"fold": f"{number} of {folds}"}
        rotations.append(
            Data(task=task, train=inner.train, validation=inner.held, test=side.held, issues=issues, checksums=known,
                 columns=columns)
        )  # fmt: skip
    return rotations


def summary(runs: list[tuple[str, Path, Data]]) -> dict[str, Any]:
    """Metrics of each run, mean and spread of the headline one, and of folds all held-out examples measured together."""
    task = runs[0][2].task
    metric = headline_metric(task)
    tests = {
        name: json.loads((folder / run_folder.METRICS).read_text(encoding="utf-8"))["test"] for name, folder, _ in runs
    }
    values = [test[metric]["value"] for test in tests.values()]
    known = [v for v in values if v is not None]
    found: dict[str, Any] = {
        "task": task.kind,
        "metric": metric,
        "runs": {name: {"folder": folder.name, "test": tests[name]} for name, folder, _ in runs},
        "mean": float(np.mean(known)) if known else None,
        "spread": float(np.std(known, ddof=1)) if len(known) > 1 else None,
        "least": min(known, default=None),
        "most": max(known, default=None),
    }
    if runs[0][0].startswith("fold"):
        found["pooled"] = _pooled(runs, task)
    return found


def _pooled(runs: list[tuple[str, Path, Data]], task: Task) -> dict[str, Any]:
    """Metrics of all held-out examples together, each at the calibration of its own fold."""
    examples = [e for _, _, side in runs for e in side.test]
    scores: list[np.ndarray] = []
    above: list[np.ndarray] = []  # the same, moved so that each label's threshold stands at one half
    for _, folder, side in runs:
        known = run_folder.calibration_of(folder)
        own = [s / known.temperature for s in scoring.read_scores(folder, side.test)]
        scores += own
        above += [s - np.clip(logit(known.thresholds), -MOST, MOST) for s in own] if known.thresholds else own
    found = scoring.measure(scores, examples, task)
    found = {name: value for name, value in found.items() if not name.endswith("_uncalibrated")}  # folds have one each
    if task.kind == "multi":
        moved = scoring.measure(above, examples, task)
        found |= {name: moved[name] for name in AT_THRESHOLDS}
    return found


def lines(found: dict[str, Any]) -> list[str]:
    """A row a run, the pooled figures, and the spread in words."""
    names = [n for n in SHOWN[found["task"]] if n in next(iter(found["runs"].values()))["test"]]
    rows = [["", *names], *([who, *(figure(r["test"][n], n) for n in names)] for who, r in found["runs"].items())]
    if "pooled" in found:
        rows.append(["all, held out once", *(figure(found["pooled"][n], n) for n in names)])
    said = [plain_table(rows)]
    if found["spread"] is not None:
        mean, spread, least, most = (figure(found[k], found["metric"]) for k in ("mean", "spread", "least", "most"))
        said.append(f"{found['metric']}: {mean} on average, standard deviation {spread}, from {least} to {most}")
    return said


def _with_seed(config: RunConfig, seed: int) -> RunConfig:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, seed=seed))
