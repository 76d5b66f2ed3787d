"""How the labels of a text combine: exactly one (softmax), or any number of them (one sigmoid each). NumPy, SciPy.

Both classes answer the same questions, so metrics, calibration and linear models need not know which one they serve.

Legend of shapes: N texts, C labels, U units that are resampled, B bootstrap replicates, K claims of a text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
from scipy.special import expit, log_expit, log_softmax, softmax

from loracle.evaluation.calibration import UNCALIBRATED, Calibration, fit_temperature, fit_threshold
from loracle.evaluation.intervals import Array, Statistics, ratio, sum_by_unit
from loracle.evaluation.linear_models import Features, class_logits
from loracle.examples import LabeledText

Mask = npt.NDArray[np.bool_]


class Labels(Protocol):
    """What both schemes offer. ``targets`` are int ``[N]`` (one label) or bool ``[N, C]`` (any number)."""

    def targets(self, examples: Sequence[LabeledText], count: int) -> np.ndarray:
        """The labels of examples; ``count`` is C."""

    def indicator(self, targets: np.ndarray, count: int) -> Mask:
        """Whether each text has each label, ``[N, C]``."""

    def probabilities(self, logits: np.ndarray, calibration: Calibration = UNCALIBRATED) -> Array:
        """Probability of each label, ``float64 [N, C]``, at the calibration's temperature."""

    def assigned(self, proba: np.ndarray, calibration: Calibration = UNCALIBRATED) -> Mask:
        """Which labels rows of probabilities assign, ``[N, C]``."""

    def confidence(self, proba: Array, assigned: Mask) -> Array:
        """How sure the model is of the labels that it assigns to each text, ``[N]``."""

    def claims(self, proba: Array, targets: np.ndarray) -> tuple[Array, Array]:
        """Probabilities and whether they came true, both ``[N, K]``, for the calibration error."""

    def credit(self, logits: Array, targets: np.ndarray, calibration: Calibration = UNCALIBRATED) -> Array:
        """How right each text is, from 0 to 1, as ``accuracy`` counts it, ``[N]``."""

    def statistics(
        self, logits: Array, targets: np.ndarray, units: tuple[npt.NDArray[np.intp], int], calibration: Calibration
    ) -> Statistics:
        """Metrics as functions of resampling weights ``[B, U]``; ``units``: the unit of each row, and their number."""

    def log_likelihood(self, logits: Array, targets: np.ndarray) -> Array:
        """Log-probability of the true labels of each text, ``[N]``."""

    def fit_calibration(self, logits: Array, targets: np.ndarray, precision: float | None = None) -> Calibration:
        """Temperature and thresholds from validation logits."""

    def prior(self, targets: np.ndarray, count: int) -> Array:
        """Score of each label ``[C]`` from its frequency alone, with one added to every count (Laplace)."""

    def fit_logistic(self, train: Features, targets: np.ndarray, test: Features, count: int, c: float) -> Array:
        """Test logits ``[N_test, C]`` of logistic regression. Labels that never or always occur get their prior."""


class OneLabel:
    """Exactly one label a text. The likeliest label is assigned."""

    def targets(self, examples: Sequence[LabeledText], count: int) -> np.ndarray:
        return np.array([example.labels[0] for example in examples], dtype=np.int64)

    def indicator(self, targets: np.ndarray, count: int) -> Mask:
        return np.arange(count) == targets[:, None]

    def probabilities(self, logits: np.ndarray, calibration: Calibration = UNCALIBRATED) -> Array:
        return softmax(np.asarray(logits, dtype=np.float64) / calibration.temperature, axis=1)

    def assigned(self, proba: np.ndarray, calibration: Calibration = UNCALIBRATED) -> Mask:
        return np.arange(proba.shape[1]) == proba.argmax(1)[:, None]

    def confidence(self, proba: Array, assigned: Mask) -> Array:
        return proba.max(axis=1)

    def claims(self, proba: Array, targets: np.ndarray) -> tuple[Array, Array]:
        """One claim a text: its likeliest label is right (K = 1)."""
        return proba.max(axis=1, keepdims=True), (proba.argmax(axis=1) == targets)[:, None].astype(np.float64)

    def credit(self, logits: Array, targets: np.ndarray, calibration: Calibration = UNCALIBRATED) -> Array:
        """A tie of k highest logits counts 1/k for each."""
        highest = logits == logits.max(axis=1, keepdims=True)
        return highest[np.arange(len(targets)), targets] / highest.sum(axis=1)

    def statistics(
        self, logits: Array, targets: np.ndarray, units: tuple[npt.NDArray[np.intp], int], calibration: Calibration
    ) -> Statistics:
        chosen = (logits == logits.max(axis=1, keepdims=True)).astype(np.float64)
        chosen /= chosen.sum(axis=1, keepdims=True)  # a tie of k labels counts 1/k for each
        true = np.eye(logits.shape[1])[targets]
        tempered = log_softmax(logits / calibration.temperature, axis=1)
        losses = [-p[np.arange(len(targets)), targets] for p in (tempered, log_softmax(logits, axis=1))]
        sums = [sum_by_unit(part, *units) for part in (chosen * true, chosen, true)]
        loss_sum, raw_loss_sum = (sum_by_unit(loss, *units) for loss in losses)
        auc = _auc(tempered, true.astype(bool), units)

        def statistics(weights: Array) -> dict[str, Array]:
            hits, predicted, support = (weights @ part for part in sums)
            f1 = ratio(2 * hits, predicted + support)
            rows = support.sum(axis=1)
            return {
                "accuracy": hits.sum(axis=1) / rows,
                "macro_f1": _mean_of_finite(f1),
                "weighted_f1": (support * np.nan_to_num(f1)).sum(axis=1) / rows,
                "log_loss": weights @ loss_sum / rows,
                "log_loss_uncalibrated": weights @ raw_loss_sum / rows,
                "auc": auc(weights),
            }

        return statistics

    def log_likelihood(self, logits: Array, targets: np.ndarray) -> Array:
        return log_softmax(logits, axis=1)[np.arange(len(targets)), targets]

    def fit_calibration(self, logits: Array, targets: np.ndarray, precision: float | None = None) -> Calibration:
        temperature = fit_temperature(lambda scale: self.log_likelihood(logits * scale, targets))
        return Calibration(temperature=temperature, examples=len(targets))

    def prior(self, targets: np.ndarray, count: int) -> Array:
        counts = np.bincount(targets, minlength=count) + 1.0
        return np.log(counts / counts.sum())

    def fit_logistic(self, train: Features, targets: np.ndarray, test: Features, count: int, c: float) -> Array:
        scores = np.tile(self.prior(targets, count), (test.shape[0], 1))
        present = np.unique(targets)
        if len(present) > 1:
            scores[:, present] = log_softmax(class_logits(train, targets, test, c), axis=1)
        return scores


class AnyLabels:
    """Any number of labels a text. A label is assigned when its probability is above its threshold."""

    def targets(self, examples: Sequence[LabeledText], count: int) -> np.ndarray:
        targets = np.zeros((len(examples), count), dtype=bool)
        for row, example in zip(targets, examples, strict=True):
            row[list(example.labels)] = True
        return targets

    def indicator(self, targets: np.ndarray, count: int) -> Mask:
        return targets

    def probabilities(self, logits: np.ndarray, calibration: Calibration = UNCALIBRATED) -> Array:
        return expit(np.asarray(logits, dtype=np.float64) / calibration.temperature)

    def assigned(self, proba: np.ndarray, calibration: Calibration = UNCALIBRATED) -> Mask:
        return proba > np.array(calibration.thresholds or 0.5)

    def confidence(self, proba: Array, assigned: Mask) -> Array:
        """The confidence in the label that the model doubts most."""
        return np.where(assigned, proba, 1 - proba).min(axis=1)

    def claims(self, proba: Array, targets: np.ndarray) -> tuple[Array, Array]:
        """A claim for each label: the text has it (K = C)."""
        return proba, targets.astype(np.float64)

    def credit(self, logits: Array, targets: np.ndarray, calibration: Calibration = UNCALIBRATED) -> Array:
        """1 where the whole label set is right."""
        assigned = self.assigned(self.probabilities(logits, calibration), calibration)
        return (assigned == targets).all(axis=1).astype(np.float64)

    def statistics(
        self, logits: Array, targets: np.ndarray, units: tuple[npt.NDArray[np.intp], int], calibration: Calibration
    ) -> Statistics:
        true = targets.astype(bool)
        chosen = self.assigned(expit(logits / calibration.temperature), calibration)
        signed = np.where(true, logits, -logits)
        losses = [-log_expit(z).mean(axis=1) for z in (signed / calibration.temperature, signed)]
        loss_sum, raw_loss_sum = (sum_by_unit(loss, *units) for loss in losses)
        auc = _auc(logits, true, units)
        sums = [sum_by_unit(part, *units) for part in (chosen & true, chosen, true)]
        exact = sum_by_unit((chosen == true).all(axis=1), *units)
        rows_of_unit = np.bincount(units[0], minlength=units[1]).astype(np.float64)
        ranked = [_ranked(logits[:, c], true[:, c]) for c in np.flatnonzero(true.any(axis=0))]

        def statistics(weights: Array) -> dict[str, Array]:
            hits, predicted, support = (weights @ part for part in sums)
            rows = weights @ rows_of_unit
            subset = weights @ exact / rows
            precision = [_average_precision(weights[:, units[0][order]], *rest) for order, *rest in ranked]
            return {
                "accuracy": subset,
                "subset_accuracy": subset,
                "micro_f1": ratio(2 * hits.sum(axis=1), (predicted + support).sum(axis=1)),
                "macro_f1": _mean_of_finite(ratio(2 * hits, predicted + support)),
                "log_loss": weights @ loss_sum / rows,
                "log_loss_uncalibrated": weights @ raw_loss_sum / rows,
                "auc": auc(weights),
                "map": _mean_of_finite(np.stack(precision, axis=1) if precision else np.empty((len(weights), 0))),
            }

        return statistics

    def log_likelihood(self, logits: Array, targets: np.ndarray) -> Array:
        return log_expit(np.where(targets, logits, -logits)).sum(axis=1)

    def fit_calibration(self, logits: Array, targets: np.ndarray, precision: float | None = None) -> Calibration:
        """``precision``: the precision that each label is to reach on these texts. None: thresholds maximise F1."""
        temperature = fit_temperature(lambda scale: self.log_likelihood(logits * scale, targets))
        proba = expit(logits / temperature)
        thresholds = [fit_threshold(p, true, precision=precision) for p, true in zip(proba.T, targets.T, strict=True)]
        return Calibration(temperature=temperature, thresholds=tuple(thresholds), examples=len(targets))

    def prior(self, targets: np.ndarray, count: int) -> Array:
        positive = targets.sum(axis=0) + 1.0
        return np.log(positive / (len(targets) + 2 - positive))

    def fit_logistic(self, train: Features, targets: np.ndarray, test: Features, count: int, c: float) -> Array:
        scores = np.tile(self.prior(targets, count), (test.shape[0], 1))
        for label in np.flatnonzero(targets.any(axis=0) & ~targets.all(axis=0)):
            scores[:, label] = np.diff(class_logits(train, targets[:, label], test, c))[:, 0]
        return scores


def _auc(scores: Array, true: np.ndarray, units: tuple[npt.NDArray[np.intp], int]) -> Callable[[Array], Array]:
    """Map weights ``[B, U]`` to the mean area under the labels' ROC curves, ``[B]``. Equal scores count one half.

    A text with the label contributes the share of texts without it that score lower, and the other way round. The area is
    the mean contribution of either side, so to first order it moves by the sum of what both means do (DeLong et al. 1988).
    """
    from scipy.stats import rankdata  # imported here, as predicting can do without its half second

    defined = true.any(axis=0) & ~true.all(axis=0)
    scores, true = scores[:, defined], true[:, defined]
    above = rankdata(scores, axis=0)
    for side in (true, ~true):
        for c in range(scores.shape[1]):  # less the rank within its own side: the rest counts the other side below it
            above[side[:, c], c] -= rankdata(scores[side[:, c], c])
    share = np.where(true, above / (~true).sum(axis=0), 1 - above / true.sum(axis=0))
    sums = [sum_by_unit(part, *units) for part in (share * true, share * ~true, true, ~true)]
    area = ratio((share * true).sum(axis=0), true.sum(axis=0).astype(np.float64))

    def statistic(weights: Array) -> Array:
        with_label, without, count_with, count_without = (weights @ part for part in sums)
        return _mean_of_finite(ratio(with_label, count_with) + ratio(without, count_without) - area)

    return statistic


def _ranked(logits: Array, true: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows from the highest logit down, whether each is true, and where each run of equal logits ends."""
    order = np.argsort(-logits, kind="stable")
    falls = np.diff(logits[order]) != 0
    return order, true[order].astype(np.float64), np.append(np.flatnonzero(falls), len(order) - 1)


def _average_precision(weights: Array, true: Array, ends: np.ndarray) -> Array:
    """Average precision ``[B]`` of ranked rows with weights ``[B, N]``.

    Recall and precision are read only where a run of equal scores ends. The order within a tie cannot matter, and a
    constant scorer gets the share of positives.
    """
    hits = (weights * true).cumsum(axis=1)[:, ends]
    rows = weights.cumsum(axis=1)[:, ends]
    gained = np.diff(hits, axis=1, prepend=0.0)
    return ratio((gained * np.nan_to_num(ratio(hits, rows))).sum(axis=1), hits[:, -1])


def _mean_of_finite(values: Array) -> Array:
    """Mean of each row over its numbers that are not NaN. NaN where there are none."""
    defined = ~np.isnan(values)
    return ratio(np.where(defined, values, 0.0).sum(axis=1), defined.sum(axis=1).astype(np.float64))
