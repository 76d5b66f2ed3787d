"""The length of a title alone."""

from __future__ import annotations

from loracle.baselines.base import Baseline, BaselineInputs
from loracle.evaluation.linear_models import length_ranker


def fit_length(inputs: BaselineInputs) -> Baseline:
    """Scores linear in the number of characters and words of a title."""
    data = inputs.data
    scores = length_ranker(data.train, data.test, inputs.objective, seed=inputs.seed)
    return Baseline([s[:, None] for s in scores])
