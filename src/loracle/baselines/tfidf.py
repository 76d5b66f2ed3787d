"""A linear model on TF-IDF."""

from __future__ import annotations

from loracle.baselines.base import Baseline, BaselineInputs, calibrated
from loracle.tasks.base import LinearFit
from loracle.tasks.dataset import Data


def fit_tfidf(inputs: BaselineInputs) -> Baseline:
    """A linear model on words and pairs of words, calibrated on the validation examples."""
    return tfidf_of(inputs.data, inputs.fit)


def tfidf_of(data: Data, fit: LinearFit) -> Baseline:
    """``fit_tfidf`` without a model at hand."""
    other = [*data.validation, *data.test]
    return calibrated(data.task.learning.fit_words(data.train, other, data.task, fit), data.validation, data)
