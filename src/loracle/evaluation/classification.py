"""What a classifier's scores are worth, each figure with a 95 % interval. Pure NumPy.

Legend of shapes: N texts, C labels, U units that are resampled (distinct texts), B bootstrap replicates, K bins.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import expit, log_expit, log_softmax, softmax

from loracle.errors import UserError
from loracle.evaluation.calibration import Calibration
from loracle.examples import LabeledText, Task

Array = npt.NDArray[np.float64]
Statistics = Callable[[Array], Mapping[str, Array]]

REPLICATES = 1000
LEVEL = 0.95
UNCALIBRATED = Calibration()
BINS = 15  # of the expected calibration error, as in Guo et al. 2017
DRAWS = 200_000_000  # truths simulated for a band, a few seconds; of more than that a tenth of the replicates must do
CHUNK = 1 << 20  # resampling weights held at once: 8 MB, which a processor's cache still likes


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure and its 95 % bootstrap interval. All three are NaN (``null`` in JSON) where the figure is undefined."""

    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, float | None]:
        """``{"value", "low", "high"}``; NaN, which JSON does not know, becomes None."""
        bounds = {"value": self.value, "low": self.low, "high": self.high}
        return {name: bound if np.isfinite(bound) else None for name, bound in bounds.items()}


def as_json(metrics: Mapping[str, Interval | float]) -> dict[str, Any]:
    """Metrics as JSON has them: intervals as ``{"value", "low", "high"}``, counts as they are."""
    return {name: m.to_json() if isinstance(m, Interval) else m for name, m in metrics.items()}


def headline_metric(task: Task) -> str:
    """Name of the metric that early stopping watches; higher is better.

    For multi-label the mean average precision, as it needs no threshold: F1 stays at 0 until the first logits cross it.
    """
    return {"single": "accuracy", "multi": "map", "rank": "pair_accuracy"}[task.kind]


def target_array(examples: Sequence[LabeledText], task: Task) -> np.ndarray:
    """Labels as the metrics want them: int64 ``[N]`` for ``single``, bool ``[N, C]`` for ``multi``."""
    if task.kind == "single":
        return np.array([example.labels[0] for example in examples], dtype=np.int64)
    targets = np.zeros((len(examples), len(task.label_names)), dtype=bool)
    for row, example in zip(targets, examples, strict=True):
        row[list(example.labels)] = True
    return targets


def probabilities(scores: np.ndarray, task: Task, calibration: Calibration = UNCALIBRATED) -> Array:
    """Float64 probabilities ``[N, C]`` from logits at the temperature: softmax, or a sigmoid each for ``multi``."""
    logits = np.asarray(scores, dtype=np.float64) / calibration.temperature
    return softmax(logits, axis=1) if task.kind == "single" else expit(logits)


def given_labels(proba: np.ndarray, task: Task, calibration: Calibration = UNCALIBRATED) -> npt.NDArray[np.bool_]:
    """Which labels rows of probabilities give, ``[N, C]``: the likeliest, or for ``multi`` all above their thresholds."""
    if task.kind == "multi":
        return proba > _thresholds(calibration)
    return np.arange(proba.shape[1]) == proba.argmax(1)[:, None]


def confidence_of(proba: Array, given: npt.NDArray[np.bool_], task: Task) -> Array:
    """How sure a model is of what it gives for each text, ``[N]``; of ``multi`` that is the label that it doubts most."""
    return np.where(given, proba, 1 - proba).min(axis=1) if task.kind == "multi" else proba.max(axis=1)


def calibration_bins(confidence: Array) -> npt.NDArray[np.intp]:
    """Bin ``[N]`` of each text: up to ``BINS`` bins that hold equally many, equal confidences always together.

    Equal mass, as bins of equal width are mostly empty and leave the error to a few (Nixon et al. 2019, arXiv:1904.01685).
    """
    edges = np.quantile(confidence, np.arange(1, BINS) / BINS)
    return np.searchsorted(edges, confidence, side="left")


def calibration_error(confidence: Array, right: Array) -> float:
    """Expected calibration error (Naeini et al. 2015) over equal-mass bins: mean over claims ``[N]`` of the gap of their bin
    between the mean confidence and the share that is right.
    """
    return _error_of(calibration_bins(confidence), confidence - right)


def claims(proba: Array, targets: np.ndarray, task: Task) -> tuple[Array, Array]:
    """What probabilities say and whether it is so, both ``[N, K]``: of ``single`` that the likeliest label is right (K = 1), of
    ``multi`` that each label stands there (K = C).
    """
    if task.kind == "multi":
        return proba, targets.astype(np.float64)
    return proba.max(axis=1, keepdims=True), (proba.argmax(axis=1) == targets)[:, None].astype(np.float64)


def calibration_band(
    confidence: Array, *, groups: Sequence[Hashable] | None = None, seed: int = 0, replicates: int = REPLICATES
) -> Interval:
    """The error that so many claims ``[N, K]`` show though every probability is true: mean and 95 % band over simulated truths.

    Above 0, as the share that is right scatters around its mean (Vaicenavicius et al. 2019, arXiv:1902.06977). Rows of equal
    ``groups`` are copies, which are right or wrong together; the labels of a text are drawn independently of each other.
    """
    unit, units = units_of(groups, len(confidence))
    rng, bins = np.random.default_rng(seed), calibration_bins(confidence.ravel())
    drawn = []
    for _ in range(min(replicates, max(DRAWS // confidence.size, replicates // 10))):
        right = rng.random((units, confidence.shape[1]))[unit] < confidence
        drawn.append(_error_of(bins, (confidence - right).ravel()))
    return _interval(float(np.mean(drawn)), np.array(drawn))


def _error_of(bins: npt.NDArray[np.intp], gaps: Array) -> float:
    return float(np.abs(np.bincount(bins, weights=gaps)).sum() / len(gaps))


def classification_metrics(
    scores: np.ndarray,
    targets: np.ndarray,
    task: Task,
    *,
    groups: Sequence[Hashable] | None = None,
    seed: int = 0,
    replicates: int = REPLICATES,
    calibration: Calibration | None = None,
) -> dict[str, Interval | float]:
    """Metrics of logits ``[N, C]`` against targets, each with a bootstrap interval.

    ``single``: accuracy, macro_f1, weighted_f1, log_loss (nats), auc, ece. ``multi``, where a label is given when its
    probability is above its threshold: micro_f1, macro_f1, subset_accuracy, map, log_loss, auc, ece; accuracy is the subset
    accuracy once more; log_loss and ece are over all pairs of a text and a label.

    ``auc`` is the mean over labels of one against the rest; its interval resamples what each text adds to it (DeLong et al.
    1988). ``ece`` (``calibration_error``) has no interval, as it is no mean over texts; ``ece_if_calibrated`` is what
    perfect calibration would show. With a calibration, ``log_loss_uncalibrated`` and ``ece_uncalibrated`` say what it was
    before.

    A text whose highest logit is shared by k labels counts 1/k for each, so a constant scorer gets accuracy 1/C and not
    the share of the label that happens to come first. Macro averages are over the labels that occur among targets or
    predictions, map over those among targets; a metric with nothing to average is NaN.

    Args:
        scores: float ``[N, C]``, C = ``len(task.label_names)``.
        targets: int ``[N]`` for ``single``, bool ``[N, C]`` for ``multi``: see ``target_array``.
        groups: N hashables, usually the texts. Equal ones are resampled together, as copies are no further evidence;
            values stay means over rows.
        seed: of the resampling; ``replicates``: how often.

    Raises:
        UserError: there is no text to measure on.
        ValueError: shapes disagree, or a score is not finite.
    """
    logits, targets = _checked(scores, targets, task)
    unit, units = units_of(groups, len(logits))
    meaning = calibration or UNCALIBRATED
    of = _single if task.kind == "single" else _multi
    found: dict[str, Interval] = bootstrap(
        of(logits, targets, unit, units, meaning), units, seed=seed, replicates=replicates
    )
    after, before = (claims(probabilities(logits, task, c), targets, task) for c in (meaning, UNCALIBRATED))
    error, error_before = (calibration_error(sure.ravel(), right.ravel()) for sure, right in (after, before))
    found |= {
        "ece": Interval(error, np.nan, np.nan),
        "ece_if_calibrated": calibration_band(after[0], groups=groups, seed=seed, replicates=replicates),
    }
    if calibration is None:
        del found["log_loss_uncalibrated"]
        return {**found}
    return {**found, "ece_uncalibrated": Interval(error_before, np.nan, np.nan)}


def lead(
    scores_a: np.ndarray,
    scores_b: np.ndarray,
    targets: np.ndarray,
    task: Task,
    *,
    metric: str | None = None,
    groups: Sequence[Hashable] | None = None,
    seed: int = 0,
    replicates: int = REPLICATES,
) -> Interval:
    """By how much a metric (by default the headline) of logits a is above that of logits b, resampled in pairs."""
    found = differences(scores_a, scores_b, targets, task, groups=groups, seed=seed, replicates=replicates)
    return found[metric or headline_metric(task)]


def differences(
    scores_a: np.ndarray,
    scores_b: np.ndarray,
    targets: np.ndarray,
    task: Task,
    *,
    groups: Sequence[Hashable] | None = None,
    seed: int = 0,
    replicates: int = REPLICATES,
    calibrations: tuple[Calibration, Calibration] = (UNCALIBRATED, UNCALIBRATED),
) -> dict[str, Interval]:
    """By how much each metric of logits a, at its calibration, is above that of logits b: the same draws for both.

    Names and arguments as in ``classification_metrics``, without the calibration errors, which are no means over texts.
    """
    unit, units = units_of(groups, len(targets))
    of = _single if task.kind == "single" else _multi
    a, b = (
        of(_checked(scores, targets, task)[0], targets, unit, units, calibration)
        for scores, calibration in zip((scores_a, scores_b), calibrations, strict=True)
    )

    def statistics(weights: Array) -> dict[str, Array]:
        of_a, of_b = a(weights), b(weights)
        return {name: of_a[name] - of_b[name] for name in of_a}

    return bootstrap(statistics, units, seed=seed, replicates=replicates)


def bootstrap(
    statistics: Statistics, units: int, *, seed: int = 0, replicates: int = REPLICATES
) -> dict[str, Interval]:
    """Values and 95 % percentile intervals of statistics over resampled units (Efron 1979).

    ``statistics`` maps weights ``[B, U]``, how often each replicate drew each unit, to ``{name: [B]}``. All statistics
    see the same draws, so a difference of two is resampled in pairs. Replicates where a statistic is NaN do not enter
    its interval.

    Raises:
        UserError: there is no unit.
    """
    if units < 1:
        raise UserError("at least one test example", "none", "give a larger test file or --test-share")
    values = {name: float(value[0]) for name, value in statistics(np.ones((1, units))).items()}
    rng = np.random.default_rng(seed)
    chunk = max(1, CHUNK // units)
    parts = [statistics(_resample(rng, min(chunk, replicates - start), units)) for start in range(0, replicates, chunk)]
    return {name: _interval(value, np.concatenate([part[name] for part in parts])) for name, value in values.items()}


def ratio(numerator: Array, denominator: Array) -> Array:
    """``numerator / denominator``, NaN where the denominator is 0."""
    return np.divide(numerator, denominator, out=np.full(np.shape(numerator), np.nan), where=denominator != 0)


def _resample(rng: np.random.Generator, replicates: int, units: int) -> Array:
    """How often each of the units was drawn, ``[B, U]``: U draws with replacement a replicate."""
    drawn = rng.integers(units, size=(replicates, units)) + units * np.arange(replicates)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=replicates * units)
    return counts.reshape(replicates, units).astype(np.float64)


def _interval(value: float, replicates: Array) -> Interval:
    known = replicates[np.isfinite(replicates)]
    if not len(known):
        return Interval(value, np.nan, np.nan)
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high))


def _checked(scores: np.ndarray, targets: np.ndarray, task: Task) -> tuple[Array, np.ndarray]:
    logits, targets = np.asarray(scores, dtype=np.float64), np.asarray(targets)
    shape = (len(targets), len(task.label_names))
    if logits.shape != shape or targets.shape != (shape[:1] if task.kind == "single" else shape):
        raise ValueError(f"scores {logits.shape} and targets {targets.shape} do not fit a {task.kind} task {shape}")
    if not np.isfinite(logits).all():
        rows = np.flatnonzero(~np.isfinite(logits).all(axis=1))
        raise ValueError(f"{len(rows)} rows with scores that are not finite, the first is {rows[0]}")
    return logits, targets


def units_of(groups: Sequence[Hashable] | None, rows: int) -> tuple[npt.NDArray[np.intp], int]:
    """The unit of each row, numbered by first appearance, and how many there are."""
    if groups is None:
        return np.arange(rows), rows
    if len(groups) != rows:
        raise ValueError(f"{len(groups)} groups for {rows} rows")
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(group, len(numbers)) for group in groups], dtype=np.intp), len(numbers)


def _thresholds(calibration: Calibration) -> Array:
    return np.array(calibration.thresholds or 0.5)


def sum_by_unit(values: np.ndarray, unit: npt.NDArray[np.intp], units: int) -> Array:
    """Sums ``[U, …]`` of rows ``[N, …]`` over each unit."""
    sums = np.zeros((units, *values.shape[1:]))
    np.add.at(sums, unit, values)
    return sums


def _single(
    logits: Array, targets: np.ndarray, unit: npt.NDArray[np.intp], units: int, calibration: Calibration
) -> Statistics:
    chosen = (logits == logits.max(axis=1, keepdims=True)).astype(np.float64)
    chosen /= chosen.sum(axis=1, keepdims=True)
    true = np.eye(logits.shape[1])[targets]
    tempered = log_softmax(logits / calibration.temperature, axis=1)
    losses = [-known[np.arange(len(targets)), targets] for known in (tempered, log_softmax(logits, axis=1))]
    sums = [sum_by_unit(part, unit, units) for part in (chosen * true, chosen, true)]
    loss_sum, untempered_sum = (sum_by_unit(loss, unit, units) for loss in losses)
    auc = _auc(tempered, true.astype(bool), unit, units)

    def statistics(weights: Array) -> dict[str, Array]:
        hits, predicted, support = (weights @ part for part in sums)
        f1 = ratio(2 * hits, predicted + support)
        rows = support.sum(axis=1)
        return {
            "accuracy": hits.sum(axis=1) / rows,
            "macro_f1": _mean_of_known(f1),
            "weighted_f1": (support * np.nan_to_num(f1)).sum(axis=1) / rows,
            "log_loss": weights @ loss_sum / rows,
            "log_loss_uncalibrated": weights @ untempered_sum / rows,
            "auc": auc(weights),
        }

    return statistics


def _multi(
    logits: Array, targets: np.ndarray, unit: npt.NDArray[np.intp], units: int, calibration: Calibration
) -> Statistics:
    true = targets.astype(bool)
    chosen = expit(logits / calibration.temperature) > _thresholds(calibration)
    signed = np.where(true, logits, -logits)
    losses = [-log_expit(z).mean(axis=1) for z in (signed / calibration.temperature, signed)]
    loss_sum, untempered_sum = (sum_by_unit(loss, unit, units) for loss in losses)
    auc = _auc(logits, true, unit, units)
    sums = [sum_by_unit(part, unit, units) for part in (chosen & true, chosen, true)]
    exact = sum_by_unit((chosen == true).all(axis=1), unit, units)
    rows_of_unit = np.bincount(unit, minlength=units).astype(np.float64)
    ranked = [_ranked(logits[:, c], true[:, c]) for c in np.flatnonzero(true.any(axis=0))]

    def statistics(weights: Array) -> dict[str, Array]:
        hits, predicted, support = (weights @ part for part in sums)
        rows = weights @ rows_of_unit
        subset = weights @ exact / rows
        precision = [_average_precision(weights[:, unit[order]], *rest) for order, *rest in ranked]
        return {
            "accuracy": subset,
            "subset_accuracy": subset,
            "micro_f1": ratio(2 * hits.sum(axis=1), (predicted + support).sum(axis=1)),
            "macro_f1": _mean_of_known(ratio(2 * hits, predicted + support)),
            "log_loss": weights @ loss_sum / rows,
            "log_loss_uncalibrated": weights @ untempered_sum / rows,
            "auc": auc(weights),
            "map": _mean_of_known(np.stack(precision, axis=1) if precision else np.empty((len(weights), 0))),
        }

    return statistics


def _auc(scores: Array, true: np.ndarray, unit: npt.NDArray[np.intp], units: int) -> Callable[[Array], Array]:
    """Weights ``[B, U]`` to the mean area under the labels' ROC curves, ``[B]``; equal scores count one half.

    A text's part in a label's area is the share of the other side that it stands right of: below it, for one that has the
    label. The area is the mean part of either side, so to first order it moves by the sum of what both sides' means do.
    """
    from scipy.stats import rankdata  # here, since who only predicts can do without its half second

    told = true.any(axis=0) & ~true.all(axis=0)
    scores, true = scores[:, told], true[:, told]
    above = rankdata(scores, axis=0)
    for side in (true, ~true):
        for c in range(scores.shape[1]):  # less the rank among its own side: what is left counts the other side below
            above[side[:, c], c] -= rankdata(scores[side[:, c], c])
    share = np.where(true, above / (~true).sum(axis=0), 1 - above / true.sum(axis=0))
    sums = [sum_by_unit(part, unit, units) for part in (share * true, share * ~true, true, ~true)]
    area = ratio((share * true).sum(axis=0), true.sum(axis=0).astype(np.float64))

    def statistic(weights: Array) -> Array:
        with_label, without, count_with, count_without = (weights @ part for part in sums)
        return _mean_of_known(ratio(with_label, count_with) + ratio(without, count_without) - area)

    return statistic


def _ranked(logits: Array, true: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows from the highest logit down, whether each is true, and where each run of equal logits ends."""
    order = np.argsort(-logits, kind="stable")
    falls = np.diff(logits[order]) != 0
    return order, true[order].astype(np.float64), np.append(np.flatnonzero(falls), len(order) - 1)


def _average_precision(weights: Array, true: Array, ends: np.ndarray) -> Array:
    """Average precision ``[B]`` of ranked rows with weights ``[B, N]``.

    Recall and precision are read only where a run of equal scores ends, so the order within a tie cannot matter and a
    constant scorer gets the share of positives.
    """
    found = (weights * true).cumsum(axis=1)[:, ends]
    seen = weights.cumsum(axis=1)[:, ends]
    gained = np.diff(found, axis=1, prepend=0.0)
    return ratio((gained * np.nan_to_num(ratio(found, seen))).sum(axis=1), found[:, -1])


def _mean_of_known(values: Array) -> Array:
    """Mean of each row over its numbers that are not NaN; NaN where there is none."""
    known = ~np.isnan(values)
    return ratio(np.where(known, values, 0.0).sum(axis=1), known.sum(axis=1).astype(np.float64))
