"""Linear probes on the layers of an untrained model: how deep must it be for a task?

Alain and Bengio 2016 (arXiv:1610.01644) for the probes. The rule of one standard error is Breiman's (CART, 1984): of all
depths within it of the best one, the lowest is taken, as the layers above cost time and gain nothing measurable.

Shapes: N training texts, M validation texts, L layers, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from loracle.errors import UserError
from loracle.examples import texts_of
from loracle.formatting import plain_table
from loracle.models import scoring
from loracle.models.scorer import Scorer
from loracle.tasks.base import LinearFit, by_example
from loracle.tasks.dataset import Data
from loracle.text.tokenize import Encoder
from loracle.training.losses import Loss, numpy_objective
from loracle.training.scoring import encode_texts, measure

SAMPLE_TEXTS = 2048  # texts that probes and linear baselines learn from, at most


@dataclass(frozen=True, slots=True)
class Depth:
    """What a linear probe reaches on the states after ``layers`` layers, with its 95 % interval on validation examples."""

    layers: int
    value: float
    low: float
    high: float

    @property
    def error(self) -> float:
        """One standard error."""
        return (self.high - self.low) / (2 * 1.96)


def subsample(examples: list[Any], seed: int, texts: int = SAMPLE_TEXTS) -> list[Any]:
    """A seeded sample of the examples that holds about ``texts`` texts."""
    order = np.random.default_rng(seed).permutation(len(examples))
    sizes = np.cumsum([len(texts_of(examples[i])) for i in order])
    return [examples[i] for i in order[: max(1, int(np.searchsorted(sizes, texts, "right")))]]


def probe_depths(scorer: Scorer, encoder: Encoder, data: Data, loss: Loss, seed: int) -> list[Depth]:
    """Probe every layer, fitted on training texts and measured on validation texts.

    Raises:
        UserError: the model is no decoder, or too few validation examples.
    """
    train, validation = subsample(data.train, seed), subsample(data.validation, seed)
    states = [scoring.layer_features(scorer, encode_texts(encoder, items)) for items in (train, validation)]
    return probe_layers((states[0], states[1]), train, validation, data, LinearFit(numpy_objective(loss), seed))


def probe_layers(
    states: tuple[np.ndarray, np.ndarray], train: list[Any], validation: list[Any], data: Data, fit: LinearFit
) -> list[Depth]:
    """Probe each layer of states ``[N, L, H]`` of training and ``[M, L, H]`` of validation examples.

    Raises:
        UserError: too few validation examples to tell depths apart.
    """
    task, depths = data.task, []
    for layer in range(states[0].shape[1]):
        features = by_example(states[0][:, layer], train), by_example(states[1][:, layer], validation)
        scores = task.learning.probe(features, train, task, fit)
        metric = measure(scores, validation, task)[task.evaluation.headline]
        if None in (metric["value"], metric["low"], metric["high"]):
            raise UserError(
                f"{len(validation):,} validation {task.unit} are too few to tell depths apart.", "Give more data."
            )
        depths.append(Depth(layer + 1, metric["value"], metric["low"], metric["high"]))
    return depths


def best_of(depths: Sequence[Depth]) -> Depth:
    """The depth with the highest metric."""
    return max(depths, key=lambda d: d.value)


def choose(depths: Sequence[Depth]) -> Depth:
    """The lowest depth within one standard error of the best."""
    best = best_of(depths)
    return next(d for d in depths if d.value >= best.value - best.error)


def lowest_good_depth(depths: Sequence[Depth]) -> tuple[int, str]:
    """The number of layers that ``--depth auto`` keeps, and a line about what that costs and saves."""
    chosen, best = choose(depths), best_of(depths)
    saved = 100 * (1 - chosen.layers / len(depths))
    line = (
        f"depth {chosen.layers} of {len(depths)}: a linear probe reaches {100 * chosen.value:.1f} % there and "
        f"{100 * best.value:.1f} % at its best, after {best.layers} layers (one standard error is {100 * best.error:.1f}); "
        f"this saves {saved:.0f} % of the layers' work"
    )
    return chosen.layers, line


def probe_table(depths: Sequence[Depth], metric: str) -> list[str]:
    """The metric by depth for the terminal, and the line of ``lowest_good_depth``."""
    chosen, best = choose(depths), best_of(depths)
    rows = [["layers", metric, ""]]
    for d in depths:
        mark = " best" * (d is best) + " auto" * (d is chosen)
        rows.append([f"{d.layers:>6}", f"{100 * d.value:.1f} [{100 * d.low:.1f}, {100 * d.high:.1f}]", mark.strip()])
    return [plain_table(rows), lowest_good_depth(depths)[1]]
