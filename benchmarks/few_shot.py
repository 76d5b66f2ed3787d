"""Banking77 with 1, 5 and 10 examples per intent: a random head beside one that starts from the intents' names.

    python benchmarks/few_shot.py

The embedded model. In a seeded order, two texts of each intent are for validation and the next ones for training. 500 seeded
texts of the official test file are scored. The numbers of epochs are fixed beforehand.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
from results import SHARED, write_table

from loracle import pipeline
from loracle.config import RunConfig
from loracle.data.sources import open_table
from loracle.evaluation.intervals import as_json
from loracle.evaluation.significance import compare_classifiers
from loracle.examples import LabeledText
from loracle.reporting.terminal import figure
from loracle.tasks.dataset import Data, read_examples
from loracle.tasks.single_label import LABELS
from loracle.training import scoring

EPOCHS = {1: 8, 5: 4, 10: 3}  # by examples a class
TEST, VALIDATION, SEED = 500, 2, 0
PUBLISHED = "Published with 5 examples per intent: RoBERTa 74.0; ICDA, which adds generated texts, 84.0."
SETTINGS = {"template": "Customer: {text}\nIntent:", "max_length": 128, "batch": 16, "patience": 0, "baselines": False}


def splits(shots: int) -> Data:
    """The training texts of a size, with the same validation and test texts for all."""
    where = RunConfig.from_flat({"text": "text", "label": "category"}).data
    folder = SHARED / "data" / "banking77"
    train_file = read_examples(open_table(str(folder / "train.csv")), where)
    test_file = read_examples(open_table(str(folder / "test.csv")), where, task=train_file.task)
    rng = np.random.default_rng(SEED)
    of_class: dict[int, list[LabeledText]] = {}
    for i in rng.permutation(len(train_file.items)):
        of_class.setdefault(train_file.items[i].labels[0], []).append(train_file.items[i])
    train = [e for items in of_class.values() for e in items[VALIDATION : VALIDATION + shots]]
    validation = [e for items in of_class.values() for e in items[:VALIDATION]]
    test = [test_file.items[i] for i in rng.permutation(len(test_file.items))[:TEST]]
    return Data(task=train_file.task, train=train, validation=validation, test=test)


def main() -> None:
    """Train each size both ways. The table is rewritten after each, so a stopped benchmark keeps its results."""
    rows = [
        ["examples a class", "random", "names", "names minus random", "p", "validation, random", "validation, names"]
    ]
    for shots, epochs in EPOCHS.items():
        data, scores, validation, tests = splits(shots), [], [], []
        for how in ("random", "names"):
            with tempfile.TemporaryDirectory() as scratch:
                config = RunConfig.from_flat({**SETTINGS, "epochs": float(epochs), "head_init": how, "seed": SEED})
                run = pipeline.train_on(config, data, Path(scratch) / "run", keep_scores=True)
                metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
                scores.append(scoring.read_scores(run, data.test))
            validation.append(f"{100 * metrics['validation']['accuracy']:.1f}")
            tests.append(figure(metrics["test"]["accuracy"], "accuracy"))
        names, random = (np.concatenate(part) for part in reversed(scores))
        pair = compare_classifiers((names, random), data.test, LABELS)
        gap = figure(as_json({"accuracy": pair.difference})["accuracy"], "accuracy")
        rows.append([str(shots), *tests, gap, f"{pair.p:.2g}", *validation])
        notes = [
            f"77 intents, {TEST} seeded texts of the official test file, {VALIDATION} validation texts per intent, "
            f"seed {SEED}. Epochs by size: {EPOCHS}, {SETTINGS}, default learning rate. "
            f"Model: {metrics['base']}. p is from the exact McNemar test, unadjusted.",
            PUBLISHED,
        ]
        write_table("few_shot", rows, notes)


if __name__ == "__main__":
    main()
