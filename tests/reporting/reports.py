"""Results of scores that no model made, as reports are built from them."""

from __future__ import annotations

from loracle.reporting.results import Results
from loracle.tasks.dataset import Data
from loracle.training.scoring import measure


def results_of(task, examples, scores, baselines, calibration=None, training_report=None):
    """Results and data of test scores and of the baselines' test scores, all at one calibration."""
    metrics = {
        "test": measure(scores, examples, task, calibration),
        "baselines": {name: measure(s, examples, task, calibration) for name, s in baselines.items()},
        "validation": {"best_step": 2},
        "notes": [],
    }
    results = Results(
        validation_scores=[],
        test_scores=scores,
        baseline_scores=baselines,
        calibration=calibration,
        metrics=metrics,
        training_report=training_report or {},
    )
    return results, Data(task=task, train=[], validation=[], test=examples)
