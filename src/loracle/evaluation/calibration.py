"""Calibration of a classifier, fitted on validation examples and never on test. SciPy.

Scores stay as they are. All logits are divided by one temperature (Guo et al. 2017, arXiv:1706.04599), which changes no
label, only its probability. With several labels a text, each label also has a threshold (Lipton et al. 2014,
arXiv:1402.1892).

Legend of shapes: N texts, C labels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

PRIOR = 0.5  # standard deviation of the temperature's logarithm before any text is seen
BOUND = 3.0  # of that logarithm


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """How a classifier's logits become probabilities and labels. Without arguments nothing is calibrated."""

    temperature: float = 1.0  # the logits are divided by it
    thresholds: tuple[float, ...] = ()  # [C], with several labels a text; empty: one half for each
    examples: int = 0  # validation texts that it was fitted on


UNCALIBRATED = Calibration()


def temperature_of(calibration: object) -> float:
    """The temperature of a classifier's calibration; 1 for any other."""
    return calibration.temperature if isinstance(calibration, Calibration) else 1.0


def fit_temperature(log_likelihood: Callable[[float], Array]) -> float:
    """The likeliest temperature under a normal prior on its logarithm: mean 0, standard deviation ``PRIOR``.

    The prior weighs less than a dozen texts do. Without it, a few validation texts without a mistake would give every later
    mistake full confidence.

    Args:
        log_likelihood: maps a scale of the logits (1 / temperature) to the log-likelihood of each validation text.
    """
    from scipy.optimize import minimize_scalar  # imported here, as predicting can do without its half second

    def loss(log_temperature: float) -> float:
        return float((log_temperature / PRIOR) ** 2 / 2 - log_likelihood(np.exp(-log_temperature)).sum())

    return float(np.exp(minimize_scalar(loss, bounds=(-BOUND, BOUND), method="bounded", options={"xatol": 1e-6}).x))


def fit_threshold(proba: Array, true: np.ndarray, *, precision: float | None = None) -> float:
    """Probability above which one label is assigned: best F1, or most texts found at a target precision.

    Thresholds lie half-way between neighbouring probabilities. Of equally good ones the nearest to one half is taken. A
    label that no validation text has keeps one half. Where no threshold reaches the precision, it is 1: the label is never
    assigned.
    """
    if not true.any():
        return 0.5
    order = np.argsort(-proba, kind="stable")
    hits = np.cumsum(true[order]).astype(np.float64)
    assigned = np.arange(1.0, len(proba) + 1)
    lower = np.append(proba[order][1:], 0.0)
    cuts = (proba[order] + lower) / 2
    distinct = proba[order] > lower  # equal probabilities are assigned together or not at all
    f1, precise = 2 * hits / (assigned + true.sum()), hits / assigned
    worth = f1 if precision is None else np.where(precise >= precision, hits, -1.0)
    best = worth[distinct].max()
    if best <= 0:
        return 1.0
    equal = cuts[distinct & (worth == best)]
    return float(equal[np.abs(equal - 0.5).argmin()])
