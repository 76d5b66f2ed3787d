"""Metrics of a classifier's logits, each with a 95 % bootstrap interval. Pure NumPy.

Legend of shapes: N texts, C labels, K claims of a text.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
import numpy.typing as npt

from loracle.evaluation.calibration import UNCALIBRATED, Calibration
from loracle.evaluation.intervals import REPLICATES, Array, Interval, bootstrap, interval_of, units_of
from loracle.evaluation.labels import Labels

BINS = 15  # of the expected calibration error, as in Guo et al. 2017
DRAWS = 200_000_000  # truths simulated for a band, a few seconds; above that a tenth of the replicates must do


def classification_metrics(
    scores: np.ndarray,
    targets: np.ndarray,
    labels: Labels,
    *,
    groups: Sequence[Hashable] | None = None,
    seed: int = 0,
    replicates: int = REPLICATES,
    calibration: Calibration | None = None,
) -> dict[str, Interval | float]:
    """Metrics of logits ``[N, C]`` against targets, each with a bootstrap interval.

    One label: accuracy, macro_f1, weighted_f1, log_loss (nats), auc, ece. Any number of labels: micro_f1, macro_f1,
    subset_accuracy (also called accuracy), map, log_loss, auc, ece; log_loss and ece are over all pairs of text and label.

    ``auc`` is the mean over labels of one against the rest; its interval resamples each text's contribution (DeLong et al.
    1988). ``ece`` (``calibration_error``) has no interval, as it is no mean over texts. ``ece_if_calibrated`` is the ece
    that perfect calibration would show. With a calibration, ``log_loss_uncalibrated`` and ``ece_uncalibrated`` are the
    figures before it.

    A text whose highest logit is shared by k labels counts 1/k for each, so a constant scorer gets accuracy 1/C. Macro
    averages run over labels that occur among targets or predictions, map over those among targets. A metric with nothing
    to average is NaN.

    Args:
        targets: as ``labels.targets`` gives them.
        groups: N hashables, usually the texts. Equal ones are resampled together, as copies are no further evidence.
            Values stay means over rows.
        seed: of the resampling. replicates: number of resamples.

    Raises:
        UserError: there is no text to measure on.
        ValueError: shapes disagree, or a score is not finite.
    """
    logits, targets = _checked(scores, targets, labels)
    units = units_of(groups, len(logits))
    used = calibration or UNCALIBRATED
    metrics = bootstrap(labels.statistics(logits, targets, units, used), units[1], seed=seed, replicates=replicates)
    after, before = (labels.claims(labels.probabilities(logits, c), targets) for c in (used, UNCALIBRATED))
    error, error_before = (calibration_error(p.ravel(), right.ravel()) for p, right in (after, before))
    metrics |= {
        "ece": Interval(error, np.nan, np.nan),
        "ece_if_calibrated": calibration_band(after[0], groups=groups, seed=seed, replicates=replicates),
    }
    if calibration is None:
        del metrics["log_loss_uncalibrated"]
        return {**metrics}
    return {**metrics, "ece_uncalibrated": Interval(error_before, np.nan, np.nan)}


def classification_differences(
    scores: tuple[np.ndarray, np.ndarray],
    targets: np.ndarray,
    labels: Labels,
    *,
    groups: Sequence[Hashable] | None = None,
    calibrations: tuple[Calibration, Calibration] = (UNCALIBRATED, UNCALIBRATED),
    seed: int = 0,
    replicates: int = REPLICATES,
) -> dict[str, Interval]:
    """By how much each metric of the first logits is above that of the second, on the same bootstrap draws.

    Names and arguments as in ``classification_metrics``, without the calibration errors, which are no means over texts.
    """
    units = units_of(groups, len(targets))
    a, b = (
        labels.statistics(_checked(one, targets, labels)[0], targets, units, calibration)
        for one, calibration in zip(scores, calibrations, strict=True)
    )

    def statistics(weights: Array) -> dict[str, Array]:
        of_a, of_b = a(weights), b(weights)
        return {name: of_a[name] - of_b[name] for name in of_a}

    return bootstrap(statistics, units[1], seed=seed, replicates=replicates)


def calibration_bins(confidence: Array) -> npt.NDArray[np.intp]:
    """Bin ``[N]`` of each text: up to ``BINS`` bins of equal size. Equal confidences share a bin.

    Bins of equal mass, as bins of equal width are mostly empty and leave the error to a few (Nixon et al. 2019,
    arXiv:1904.01685).
    """
    edges = np.quantile(confidence, np.arange(1, BINS) / BINS)
    return np.searchsorted(edges, confidence, side="left")


def calibration_error(confidence: Array, right: Array) -> float:
    """Expected calibration error (Naeini et al. 2015) of claims ``[N]`` over bins of equal mass.

    The mean over claims of the gap, in their bin, between mean confidence and the share that is right.
    """
    return _error_of(calibration_bins(confidence), confidence - right)


def calibration_band(
    confidence: Array, *, groups: Sequence[Hashable] | None = None, seed: int = 0, replicates: int = REPLICATES
) -> Interval:
    """The error that claims ``[N, K]`` show when every probability is true: mean and 95 % band over simulated truths.

    It is above 0, as the share that is right scatters around its mean (Vaicenavicius et al. 2019, arXiv:1902.06977). Rows
    of equal ``groups`` are copies and are right or wrong together. Labels of a text are drawn independently.
    """
    unit, units = units_of(groups, len(confidence))
    rng, bins = np.random.default_rng(seed), calibration_bins(confidence.ravel())
    errors = []
    for _ in range(min(replicates, max(DRAWS // confidence.size, replicates // 10))):
        right = rng.random((units, confidence.shape[1]))[unit] < confidence
        errors.append(_error_of(bins, (confidence - right).ravel()))
    return interval_of(float(np.mean(errors)), np.array(errors))


def _error_of(bins: npt.NDArray[np.intp], gaps: Array) -> float:
    return float(np.abs(np.bincount(bins, weights=gaps)).sum() / len(gaps))


def _checked(scores: np.ndarray, targets: np.ndarray, labels: Labels) -> tuple[Array, np.ndarray]:
    logits, targets = np.asarray(scores, dtype=np.float64), np.asarray(targets)
    if (
        logits.ndim != 2
        or len(logits) != len(targets)
        or labels.indicator(targets, logits.shape[1]).shape != logits.shape
    ):
        raise ValueError(f"scores {logits.shape} do not fit targets {targets.shape}")
    if not np.isfinite(logits).all():
        rows = np.flatnonzero(~np.isfinite(logits).all(axis=1))
        raise ValueError(f"{len(rows)} rows have scores that are not finite; the first is row {rows[0]}")
    return logits, targets
