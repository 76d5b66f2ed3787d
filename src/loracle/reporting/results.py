"""Results of a trained model: validation and test scores, calibration, metrics."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from loracle.baselines import BaselineResults
from loracle.config import RunConfig
from loracle.errors import Log
from loracle.tasks.dataset import Data
from loracle.training import distributed
from loracle.training.loop import Fit
from loracle.training.prepare import PreparedModel
from loracle.training.scoring import measure, score_examples


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """Everything that a report and a run folder say of a trained model."""

    validation_scores: list[np.ndarray]
    test_scores: list[np.ndarray]
    baseline_scores: dict[str, list[np.ndarray]]
    calibration: Any  # as the task fits it, or None
    metrics: dict[str, Any]  # metrics.json
    training_report: dict[str, Any]  # sections of the report from training examples


def evaluate(
    config: RunConfig, model: PreparedModel, fitted: Fit, data: Data, baselines: BaselineResults, log: Log
) -> Results | None:
    """Calibrate on validation examples, then score the test examples once. None in all but the main process."""
    return distributed.on_main(lambda: _evaluate(config, model, fitted, data, baselines, log), along=model.scorer)


def _evaluate(
    config: RunConfig, model: PreparedModel, fitted: Fit, data: Data, baselines: BaselineResults, log: Log
) -> Results:
    task, evaluation = data.task, data.task.evaluation
    validation = score_examples(model.scorer, model.encoder, data.validation)
    calibration = evaluation.fit_calibration(validation, data.validation, task, config.train.target_precision)
    if calibration is not None and (line := evaluation.describe_calibration(calibration, task)):
        log(line)
    started = time.perf_counter()
    test = score_examples(model.scorer, model.encoder, data.test)
    texts_per_s = sum(map(len, test)) / (time.perf_counter() - started)
    source = model.base.source
    metrics: dict[str, Any] = {
        "task": task.name,
        "base": source.note or source.source,
        "train": _speed(fitted),
        "validation": {
            "best_step": fitted.progress.best_step,
            evaluation.headline: fitted.progress.best_metric,
        },
        "calibration": dataclasses.asdict(calibration) if calibration is not None else None,
        "test": measure(test, data.test, task, calibration),
        "scoring": {
            "texts_per_s": texts_per_s,
            "parameters": sum(p.numel() for p in model.scorer.inner.parameters()),
        },
        "baselines": {name: measure(b.scores, data.test, task, b.calibration) for name, b in baselines.by_name.items()},
        "notes": list(baselines.notes),
        "texts": model.tokens.texts,
        "issues": {issue.kind: issue.count for issue in data.issues},
    }
    more = task.output.training_report(data.train, task, seed=config.train.seed) if config.baselines else {}
    return Results(
        validation_scores=validation,
        test_scores=test,
        baseline_scores={name: b.scores for name, b in baselines.by_name.items()},
        calibration=calibration,
        metrics=metrics,
        training_report=more,
    )


def _speed(fitted: Fit) -> dict[str, Any]:
    seconds = max(fitted.seconds, 1e-9)
    return {
        "steps": fitted.progress.step,
        "examples_per_s": fitted.examples / seconds,
        "tokens_per_s": fitted.tokens / seconds,
        "computed_tokens_per_s": fitted.computed / seconds,
        "seconds": fitted.seconds,
    }
