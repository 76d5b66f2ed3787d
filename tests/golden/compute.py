"""Reports, metrics and predictions from recorded scores: what a refactoring must not change.

Each folder under ``cases/`` has a training file, a test file, and the scores of no model on validation and test examples.
``compute`` gives them to the product. All calls to the product are here.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from safetensors.numpy import load_file

from loracle.config import RunConfig
from loracle.evaluation.calibration import Calibration
from loracle.reporting.report import build_report
from loracle.reporting.results import Results
from loracle.runs.save import write_predictions
from loracle.tasks.base import by_example
from loracle.tasks.dataset import prepare_data
from loracle.training.scoring import measure

CASES = Path(__file__).parent / "cases"
FILES = ("metrics.json", "report.json", "predictions.csv")
COLUMNS = {
    "single_label": {"context": "context"},
    "multi_label": {"label_delimiter": "|"},
    "grades": {"grade": "grade", "group": "query", "text": "title"},
}


def compute(case: Path, out: Path) -> None:
    """Write metrics.json, report.json and predictions.csv of a case into ``out``."""
    train, test = (next(case.glob(f"{name}.*")) for name in ("train", "test"))
    flat = {"data": str(train), "test": str(test), **COLUMNS.get(case.name, {})}
    data = prepare_data(RunConfig.from_flat(flat), lambda line: None)
    task, flat_scores = data.task, load_file(case / "scores.safetensors")
    validation = by_example(flat_scores.pop("validation"), data.validation)
    scores = {name: by_example(values, data.test) for name, values in flat_scores.items()}
    calibration = task.evaluation.fit_calibration(validation, data.validation, task)
    baselines = {"majority" if task.label_names else "length": scores["poor"], "tfidf": scores["good"]}
    uncalibrated = Calibration() if task.label_names else None
    metrics = {
        "task": task.name,
        "calibration": dataclasses.asdict(calibration) if calibration else None,
        "test": measure(scores["test"], data.test, task, calibration),
        "baselines": {name: measure(s, data.test, task, uncalibrated) for name, s in baselines.items()},
        "issues": {issue.kind: issue.count for issue in data.issues},
    }
    results = Results(
        validation_scores=validation,
        test_scores=scores["test"],
        baseline_scores=baselines,
        calibration=calibration,
        metrics=metrics,
        training_report=task.output.training_report(data.train, task, seed=0),
    )
    for name, value in (("metrics.json", metrics), ("report.json", build_report(results, data))):
        (out / name).write_text(json.dumps(value, indent=1, ensure_ascii=False), encoding="utf-8")
    write_predictions(out, results, data, texts=True)
