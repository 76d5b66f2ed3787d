"""What every baseline is given, and what it returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from loracle.evaluation.linear_models import Objective
from loracle.tasks.base import LinearFit
from loracle.tasks.dataset import Data
from loracle.training.losses import numpy_objective
from loracle.training.prepare import PreparedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class BaselineInputs:
    """The split, the model before training, and the seed."""

    data: Data
    model: PreparedModel
    seed: int

    @property
    def fit(self) -> LinearFit:
        """How linear models are fitted: by the model's own loss."""
        return LinearFit(self.objective, self.seed)

    @property
    def objective(self) -> Objective:
        """The loss, for optimizers that want NumPy."""
        return numpy_objective(self.model.loss)


@dataclass(frozen=True, slots=True)
class Baseline:
    """Test scores ``[n, C]`` of each example, their calibration on validation examples, and notes for the report."""

    scores: list[np.ndarray]
    calibration: Any = None
    notes: tuple[str, ...] = ()


class NotApplicableError(Exception):
    """The baseline cannot be computed here. The message says why, as a note for the report."""


@dataclass(frozen=True, slots=True)
class BaselineType:
    """An entry of ``BASELINES``: the function, and the evidence it needs, any of these; empty: any evidence will do."""

    fit: Callable[[BaselineInputs], Baseline]
    needs: frozenset[str] = frozenset()


def calibrated(scores: list[np.ndarray], validation: Sequence[Any], data: Data) -> Baseline:
    """A baseline from scores of validation examples followed by test examples: calibrated on the first."""
    of_validation, of_test = scores[: len(validation)], scores[len(validation) :]
    evaluation = data.task.evaluation
    calibration = evaluation.fit_calibration(of_validation, validation, data.task) if of_validation else None
    return Baseline(of_test, calibration)
