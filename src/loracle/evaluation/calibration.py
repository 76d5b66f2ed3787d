"""From scores to probabilities that mean what they say, and to labels: fitted on validation examples, never on test. SciPy.

Scores stay as they are; only what is made of them changes. All logits are divided by one temperature (Guo et al. 2017,
arXiv:1706.04599), which moves no label, only how sure it is. Several labels: each also has the probability from which it is
given (Lipton et al. 2014, arXiv:1402.1892).

Legend of shapes: N texts, C labels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import expit, log_expit, log_softmax

from loracle.examples import Task

Array = npt.NDArray[np.float64]

PRIOR = 0.5  # standard deviation of the temperature's logarithm before any text is seen
BOUND = 3.0  # of that logarithm


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What a classifier's scores mean. As it stands without arguments nothing is calibrated."""

    temperature: float = 1.0  # by which the logits are divided
    thresholds: tuple[float, ...] = ()  # [C] of ``multi``: a label is given above it; none: one half for each
    examples: int = 0  # validation texts that it was fitted on


def fit_calibration(
    scores: np.ndarray, targets: np.ndarray, task: Task, *, precision: float | None = None
) -> Calibration:
    """The calibration of logits ``[N, C]`` on validation texts; targets as in ``metrics.target_array``.

    ``precision``: of ``multi``, what each label's own precision on these texts is to reach, with as many of its texts as
    that allows; without it the thresholds make each label's F1, and so macro-F1, highest.
    """
    logits, count = np.asarray(scores, dtype=np.float64), len(targets)
    temperature = fit_temperature(logits, targets)
    if task.kind == "single":
        return Calibration(temperature=temperature, examples=count)
    proba = expit(logits / temperature)
    fitted = [fit_threshold(p, true, precision=precision) for p, true in zip(proba.T, targets.T, strict=True)]
    return Calibration(temperature=temperature, thresholds=tuple(fitted), examples=count)


def fit_temperature(logits: Array, targets: np.ndarray) -> float:
    """The likeliest temperature, given that its logarithm is around 0 give or take ``PRIOR``; targets are int ``[N]``, or bool
    ``[N, C]`` of labels that can stand together.

    The prior weighs less than a dozen texts do. Without it, a few validation texts without a mistake would make every
    later mistake one of full confidence.
    """
    from scipy.optimize import minimize_scalar  # here, since who only predicts can do without its half second

    def loss(log_temperature: float) -> float:
        tempered = logits * np.exp(-log_temperature)
        if targets.ndim == 2:
            known = log_expit(np.where(targets, tempered, -tempered))
        else:
            known = log_softmax(tempered, axis=1)[np.arange(len(targets)), targets]
        return float((log_temperature / PRIOR) ** 2 / 2 - known.sum())

    return float(np.exp(minimize_scalar(loss, bounds=(-BOUND, BOUND), method="bounded", options={"xatol": 1e-6}).x))


def fit_threshold(proba: Array, true: np.ndarray, *, precision: float | None = None) -> float:
    """Probability above which one label is given: highest F1, or most texts found at a wanted precision.

    Thresholds lie half-way between neighbouring probabilities; of equally good ones the nearest to one half is taken. A
    label that no validation text has keeps one half. Where no threshold is that precise, it is 1: the label is never given.
    """
    if not true.any():
        return 0.5
    order = np.argsort(-proba, kind="stable")
    found = np.cumsum(true[order]).astype(np.float64)
    given = np.arange(1.0, len(proba) + 1)
    lower = np.append(proba[order][1:], 0.0)
    cuts = (proba[order] + lower) / 2
    apart = proba[order] > lower  # equal probabilities are given together or not at all
    f1, precise = 2 * found / (given + true.sum()), found / given
    worth = f1 if precision is None else np.where(precise >= precision, found, -1.0)
    best = worth[apart].max()
    if best <= 0:
        return 1.0
    equal = cuts[apart & (worth == best)]
    return float(equal[np.abs(equal - 0.5).argmin()])
