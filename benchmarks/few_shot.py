"""Banking77 with 1, 5 and 10 examples an intent: a head drawn at random beside one that starts from the intents' names.

    python benchmarks/few_shot.py

The embedded model. Training texts are the first of each intent in a seeded order, the next two of each are the validation
texts by which the best look is kept, and 500 seeded texts of the official test file are scored. Epochs are set beforehand.
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
from loracle.evaluation.significance import compare
from loracle.examples import LabeledText
from loracle.reporting.terminal import figure
from loracle.tasks.dataset import read_examples
from loracle.training import scoring

EPOCHS = {1: 8, 5: 4, 10: 3}  # by examples a class
TEST, WATCHED, SEED = 500, 2, 0
PUBLISHED = "Published with 5 examples an intent: RoBERTa 74.0, ICDA, which adds generated texts, 84.0."
SETTINGS = {"template": "Customer: {text}\nIntent:", "max_length": 128, "batch": 16, "patience": 0, "baselines": False}


def sides(shots: int) -> pipeline.Data:
    """The training texts of a size, with the same validation and test texts for all."""
    where = RunConfig.from_flat({"text": "text", "label": "category"}).data
    folder = SHARED / "data" / "banking77"
    seen = read_examples(open_table(str(folder / "train.csv")), where)
    unseen = read_examples(open_table(str(folder / "test.csv")), where, task=seen.task)
    rng = np.random.default_rng(SEED)
    of_class: dict[int, list[LabeledText]] = {}
    for i in rng.permutation(len(seen.items)):
        of_class.setdefault(seen.items[i].labels[0], []).append(seen.items[i])
    train = [e for items in of_class.values() for e in items[WATCHED : WATCHED + shots]]
    validation = [e for items in of_class.values() for e in items[:WATCHED]]
    test = [unseen.items[i] for i in rng.permutation(len(unseen.items))[:TEST]]
    return pipeline.Data(task=seen.task, train=train, validation=validation, test=test)


def main() -> None:
    """Train each size both ways; the table is written anew after each, so that a stopped benchmark leaves what it has."""
    rows = [
        ["examples a class", "random", "names", "names less random", "p", "validation, random", "validation, names"]
    ]
    for shots, epochs in EPOCHS.items():
        data, scores, looks, tests = sides(shots), [], [], []
        for how in ("random", "names"):
            with tempfile.TemporaryDirectory() as scratch:
                config = RunConfig.from_flat({**SETTINGS, "epochs": float(epochs), "head_init": how, "seed": SEED})
                run = pipeline.train_on(config, data, Path(scratch) / "run", keep_scores=True)
                metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
                scores.append(scoring.read_scores(run, data.test))
            looks.append(f"{100 * metrics['validation']['accuracy']:.1f}")
            tests.append(figure(metrics["test"]["accuracy"], "accuracy"))
        pair = compare(scores[1], scores[0], data.test, data.task)
        gap = figure(as_json({"accuracy": pair.difference})["accuracy"], "accuracy")
        rows.append([str(shots), *tests, gap, f"{pair.p:.2g}", *looks])
        notes = [
            f"77 intents, {TEST} seeded texts of the official test file, {WATCHED} validation texts an intent beside the "
            f"training ones, seed {SEED}; epochs by size {EPOCHS}, {SETTINGS}, learning rate by default. "
            f"Model: {metrics['base']}. p: exact McNemar, unadjusted.",
            PUBLISHED,
        ]
        write_table("few_shot", rows, notes)


if __name__ == "__main__":
    main()
