"""Five rotations on the Upworthy archive: the ranker beside its baselines and a linear probe on MiniLM, paired differences.

    python benchmarks/upworthy.py                 # all five, then a dated table
    python benchmarks/upworthy.py --rotation 0    # one of them; finished rotations are skipped

Headlines of one test and one image compete. Each rotation tests on another fifth of the tests, and no headline is on both
sides. A tenth of the rest is for validation: early stopping and m0. Every baseline is fitted with the same loss. Intervals
and differences come from one bootstrap over all tests. Scores are kept in ``LORACLE_SCRATCH`` (by default a temporary
folder), so an interrupted benchmark continues.

Cite Matias et al. 2021 (CC BY 4.0).
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from results import SHARED, write_table

from loracle import pipeline
from loracle.config import RunConfig
from loracle.data.sources import open_table
from loracle.data.splits import Split, group_folds, split_groups
from loracle.evaluation.intervals import as_json
from loracle.evaluation.linear_models import feature_ranker, length_ranker, tfidf_ranker
from loracle.evaluation.ranking import rank_metrics, ranking_differences
from loracle.examples import RankGroup
from loracle.reporting.terminal import figure
from loracle.tasks import Task
from loracle.tasks.dataset import Data, read_examples
from loracle.training.losses import choose_loss, numpy_objective

ROTATIONS = 5
DATA = SHARED / "data" / "upworthy" / "packages.csv.gz"
DOUBTED = ("201325", "201401")  # weeks, in the file's numbers; the archive's authors doubt their randomization
SCRATCH = Path(os.environ.get("LORACLE_SCRATCH", Path(tempfile.gettempdir()) / "loracle-upworthy"))
SETTINGS: dict[str, Any] = {
    "depth": 24, "adapt_top": 9, "pooling": "mean", "epochs": 3.0, "batch": 8, "lr": 5e-4, "evals_per_epoch": 2, "patience": 0,
}  # fmt: skip
SHOWN = ("pair_accuracy", "significant_pair_accuracy", "ctr_lift", "top1", "regret")


def config() -> RunConfig:
    """Where the log is, what its columns mean, and the settings found on validation tests (dev/LOG.md)."""
    columns = {
        "group": "clickability_test_id",
        "compare_within": "eyecatcher_id",
        "text": "headline",
        "date": "test_week",
    }
    return RunConfig.from_flat({"data": str(DATA), **columns, **SETTINGS})


def read_groups() -> list[RankGroup]:
    """Every comparable group of the archive. Dates are kept for the report and not split by."""
    where = config().data
    return list(read_examples(open_table(str(DATA)), where).items)


def rotation(number: int, groups: list[RankGroup]) -> Path:
    """Train and score one rotation. Returns the file with ``{scorer: [scores of each test group]}``."""
    path = result_file(number)
    if path.exists():
        return path
    SCRATCH.mkdir(parents=True, exist_ok=True)
    data = three_splits(folds(groups)[number])
    loss, chosen = choose_loss(data, config().train)
    objective = numpy_objective(loss)
    train, test = [*data.train, *data.validation], data.test  # the baselines choose on parts of their own
    scores = {
        "length": length_ranker(train, test, objective),
        "tfidf": tfidf_ranker(train, test, objective),
        "linear-probe MiniLM": feature_ranker(minilm(train), train, minilm(test), objective),
    }
    run = SCRATCH / f"run-{number}"
    shutil.rmtree(run, ignore_errors=True)
    pipeline.train_on(config(), data, run)
    with (run / "predictions.csv").open(encoding="utf-8", newline="") as f:
        own = np.array([float(row["score"]) for row in csv.DictReader(f)])
    scores["loracle"] = np.split(own, np.cumsum([len(g.texts) for g in test])[:-1])
    found = {name: [s.tolist() for s in of_groups] for name, of_groups in scores.items()}
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    path.write_text(json.dumps({"scores": found, "loss": chosen, "metrics": metrics}), encoding="utf-8")
    return path


def result_file(number: int) -> Path:
    """Its name holds the settings, so results of other settings are not reused."""
    settings = hashlib.sha256(json.dumps(SETTINGS, sort_keys=True).encode()).hexdigest()[:8]
    return SCRATCH / f"rotation-{number}-{settings}.json"


def folds(groups: list[RankGroup]) -> list[Split]:
    """The rotations."""
    return group_folds(groups, ROTATIONS, seed=0)


def three_splits(fold: Split) -> Data:
    """Training, validation and test groups of a rotation."""
    inner = split_groups([_undated(g) for g in fold.train], 0.1, 1)
    return Data(task=Task(name="click_ranking"), train=inner.train, validation=inner.held_out, test=fold.held_out)


def _undated(group: RankGroup) -> RankGroup:
    return dataclasses.replace(group, date=None)


def minilm(groups: list[RankGroup]) -> list[np.ndarray]:
    """Frozen all-MiniLM-L6-v2 features of each group's titles, computed once per process."""
    titles = {t for g in groups for t in g.texts}
    if new := sorted(titles - FEATURES.keys()):
        FEATURES.update(zip(new, _minilm_features(new), strict=True))
    return [np.stack([FEATURES[t] for t in g.texts]) for g in groups]


FEATURES: dict[str, np.ndarray] = {}


def _minilm_features(titles: list[str]) -> np.ndarray:
    from n24news import minilm_folder

    from loracle.models.build import ScorerSpec, new_scorer
    from loracle.models.loading import load_tokenizer
    from loracle.models.scoring import features
    from loracle.text.template import install_template
    from loracle.text.tokenize import Encoder

    folder = minilm_folder()
    tokenizer = install_template(load_tokenizer(folder), None, 128, encoder=True)
    scorer = new_scorer(ScorerSpec(base=folder, outputs=1, pad_token_id=tokenizer.pad_token_id))
    return features(scorer, Encoder(tokenizer, encoder=True)(titles))


def main(only: int | None) -> None:
    """Rotate, then pool."""
    groups = read_groups()
    numbers = range(ROTATIONS) if only is None else [only]
    results = [json.loads(rotation(n, groups).read_text(encoding="utf-8")) for n in numbers]
    if only is not None:
        return
    tested = [group for fold in folds(groups) for group in fold.held_out]
    pooled = {name: [np.array(s) for r in results for s in r["scores"][name]] for name in results[0]["scores"]}
    certain = [i for i, g in enumerate(tested) if not DOUBTED[0] <= str(g.date) <= DOUBTED[1]]
    doubtful = sorted(set(range(len(tested))) - set(certain))
    rows = [["", *SHOWN]]
    for title, chosen in (
        ("all weeks", range(len(tested))),
        ("without doubted weeks", certain),
        ("doubted weeks", doubtful),
    ):
        part = [tested[i] for i in chosen]
        for name, scores in pooled.items():
            found = rank_metrics([scores[i] for i in chosen], part)
            rows.append([f"{name}, {title}", *figures(found, SHOWN)])
        for other in ("linear-probe MiniLM", "tfidf"):
            theirs, ours = ([pooled[n][i] for i in chosen] for n in (other, "loracle"))
            lead = ranking_differences(ours, theirs, part)
            rows.append([f"loracle minus {other}, {title}", *figures(lead, SHOWN)])
        rows.append([f"noise ceiling, {title}", *figures(found, ("ceiling", "significant_ceiling")), "", "", ""])
    saturations = [f"{r['loss']['saturation']:.0f}" for r in results]
    speed = [r["metrics"]["train"]["examples_per_s"] for r in results]
    notes = [
        f"{len(tested):,} groups of {len({g.group for g in tested}):,} tests, five rotations by test, seed 0. Settings: "
        f"{SETTINGS}. Loss: {results[0]['loss']['name']}. m0 is {', '.join(saturations)}. "
        f"Model: {results[0]['metrics']['base']}.",
        f"Training ran at {np.median(speed):.2f} groups/s.",
    ]
    write_table("upworthy", rows, notes)


def figures(found: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """Metrics as table cells, with a dash for missing ones."""
    known = as_json(found)
    return [figure(known.get(n), n) for n in names]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--rotation", type=int, choices=range(ROTATIONS))
    main(parser.parse_args().rotation)
