"""A linear model on hidden states of the untrained base, after the layer that serves the task best."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from loracle.baselines.base import Baseline, BaselineInputs, NotApplicableError, calibrated
from loracle.errors import UserError
from loracle.examples import texts_of
from loracle.models import scoring
from loracle.tasks.base import by_example
from loracle.tasks.dataset import Data
from loracle.training.prepare import PreparedModel
from loracle.training.probe import best_of, probe_layers, subsample
from loracle.training.scoring import encode_texts

LAYERS = 12  # among which the layer is chosen, evenly spaced
VALIDATION_TEXTS = 512  # on which the layer is chosen, at most
TEST_TEXTS = 20_000  # above so many the probe is left out


@dataclass(frozen=True, slots=True)
class ChosenLayer:
    """The layer, counted from 0, and mean states ``[n, H]`` there of training and validation examples. None: the last."""

    layer: int | None
    train: list[np.ndarray]
    validation: list[np.ndarray]


def fit_linear_probe(inputs: BaselineInputs) -> Baseline:
    """A linear model on mean hidden states of at most ``SAMPLE_TEXTS`` training texts."""
    data, model = inputs.data, inputs.model
    texts = sum(len(texts_of(e)) for e in data.test)
    if texts > TEST_TEXTS:
        raise NotApplicableError(f"no linear probe: {texts:,} test texts are more than {TEST_TEXTS:,}")
    train = subsample(data.train, inputs.seed)
    validation = subsample(data.validation, inputs.seed, VALIDATION_TEXTS)
    chosen = choose_layer(model, data, train, validation, inputs)
    test = mean_states(model, data.test, chosen.layer)
    scores = data.task.learning.fit_features((chosen.train, [*chosen.validation, *test]), train, data.task, inputs.fit)
    baseline = calibrated(scores, validation, data)
    notes = []
    if chosen.layer is not None:
        notes.append(f"the linear probe reads layer {chosen.layer + 1}, chosen on validation {data.task.unit}")
    if len(train) < len(data.train):
        notes.append(f"the linear probe learns from {len(train):,} of {len(data.train):,} training {data.task.unit}")
    return Baseline(baseline.scores, baseline.calibration, tuple(notes))


def choose_layer(
    model: PreparedModel, data: Data, train: list[Any], validation: list[Any], inputs: BaselineInputs
) -> ChosenLayer:
    """The layer after which a probe does best on validation examples.

    Encoders are read after their last layer. A decoder is too, when validation examples are too few to choose a layer.
    """
    scorer = model.scorer
    if scorer.encoder or not scorer.packed:
        return ChosenLayer(None, mean_states(model, train), mean_states(model, validation))
    count = scorer.inner.config.num_hidden_layers
    layers = np.unique(np.linspace(count - 1, 0, min(count, LAYERS)).astype(int)).tolist()
    states = [
        scoring.layer_features(scorer, encode_texts(model.encoder, items), layers) for items in (train, validation)
    ]
    chosen: int | None = None
    at = -1
    try:
        at = best_of(probe_layers((states[0], states[1]), train, validation, data, inputs.fit)).layers - 1
        chosen = layers[at]
    except UserError:
        pass  # too few validation examples to tell layers apart
    return ChosenLayer(chosen, by_example(states[0][:, at], train), by_example(states[1][:, at], validation))


def mean_states(model: PreparedModel, examples: list[Any], layer: int | None = None) -> list[np.ndarray]:
    """Mean hidden states of each example's texts after a layer, by default the last: ``float32 [n, H]``."""
    texts = encode_texts(model.encoder, examples)
    if layer is None:
        return by_example(scoring.features(model.scorer, texts), examples)
    return by_example(scoring.layer_features(model.scorer, texts, [layer])[:, 0], examples)
