"""The labels' frequencies, whatever the text says."""

from __future__ import annotations

from loracle.baselines.base import Baseline, BaselineInputs


def fit_majority(inputs: BaselineInputs) -> Baseline:
    """Scores of each label from its frequency in the training examples."""
    task = inputs.data.task
    return Baseline(task.learning.prior(inputs.data.train, inputs.data.test, task))
