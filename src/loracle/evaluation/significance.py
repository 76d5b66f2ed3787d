"""Is one classifier or ranker better than another on the same test examples, or would another sample say otherwise?

Classifiers: McNemar's test in its exact form (McNemar 1947; binomial). Rankers: the bootstrap over groups, in pairs. Several
comparisons at once: Holm 1979. Copies of a text are no further evidence, so they count as one.

Legend of shapes: N texts, U distinct texts, C labels, n_i titles of group i.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import binomtest, norm

from loracle.evaluation.calibration import Calibration
from loracle.evaluation.classification import (
    UNCALIBRATED,
    Array,
    Interval,
    differences,
    given_labels,
    headline_metric,
    probabilities,
    sum_by_unit,
    target_array,
    units_of,
)
from loracle.evaluation.ranking import paired_difference
from loracle.examples import LabeledText, RankGroup, Task


@dataclass(frozen=True, slots=True)
class Paired:
    """By how much a is above b in ``metric``, with a 95 % interval, and the two-sided p of no difference."""

    metric: str
    difference: Interval
    p: float


def compare(
    scores_a: Sequence[np.ndarray],
    scores_b: Sequence[np.ndarray],
    examples: Sequence[Any],
    task: Task,
    calibrations: tuple[Calibration, Calibration] = (UNCALIBRATED, UNCALIBRATED),
) -> Paired:
    """Compare two scorers by their scores ``[n_i, C]`` of each example: accuracy (of whole label sets for ``multi``, as each
    one's calibration gives them), or pair accuracy when ranking.
    """
    if task.kind == "rank":
        return compare_rankers([s[:, 0] for s in scores_a], [s[:, 0] for s in scores_b], examples)
    a, b = (np.concatenate(scores) for scores in (scores_a, scores_b))
    same = [e.identity for e in examples]
    gap = differences(a, b, target_array(examples, task), task, groups=same, calibrations=calibrations)["accuracy"]
    right_a, right_b = (credit(s, examples, task, c) for s, c in zip((a, b), calibrations, strict=True))
    return Paired("accuracy", gap, mcnemar(right_a, right_b, same))


def compare_rankers(
    scores_a: Sequence[np.ndarray], scores_b: Sequence[np.ndarray], groups: Sequence[RankGroup]
) -> Paired:
    """Pair accuracies, resampled over group ids in pairs; p from the interval (Altman and Bland 2011, BMJ 343:d2304).

    Never less than 2^(1−U): what U groups that all favour one scorer would show if signs were drawn.
    """
    metric = headline_metric(Task(kind="rank"))
    found = paired_difference(scores_a, scores_b, groups)[metric]
    units = len({g.group or i for i, g in enumerate(groups)})
    if not np.isfinite(found.value) or found.value == 0:
        return Paired(metric, found, 1.0)
    error = (found.high - found.low) / (2 * norm.ppf(0.975))
    p = 2 * norm.sf(abs(found.value) / error) if error > 0 else 0.0
    return Paired(metric, found, float(min(1.0, max(p, 2.0 ** (1 - units)))))


def credit(
    scores: np.ndarray, examples: Sequence[LabeledText], task: Task, calibration: Calibration = UNCALIBRATED
) -> Array:
    """How right each of N texts is, from 0 to 1, as ``accuracy`` counts it: ties are shared, label sets are whole."""
    targets = target_array(examples, task)
    if task.kind == "multi":
        given = given_labels(probabilities(scores, task, calibration), task, calibration)
        return (given == targets).all(axis=1).astype(np.float64)
    highest = scores == scores.max(axis=1, keepdims=True)
    return highest[np.arange(len(targets)), targets] / highest.sum(axis=1)


def mcnemar(a: np.ndarray, b: np.ndarray, groups: Sequence[Hashable] | None = None) -> float:
    """Exact two-sided p that both are equally often the one that is right where the other is wrong.

    Args:
        a, b: credit of each scorer on the same N texts. groups: N hashables; rows of equal ones are one text, on which the
            scorer with more credit is ahead.
    """
    gap = _by_unit(np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64), groups)
    ahead, behind = int((gap > 0).sum()), int((gap < 0).sum())
    return float(binomtest(ahead, ahead + behind).pvalue) if ahead + behind else 1.0


def holm(p: Sequence[float]) -> list[float]:
    """The p values adjusted for their number: below .05 those that stand with a familywise error of 5 %."""
    adjusted, running = [0.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        running = max(running, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = running
    return adjusted


def _by_unit(values: Array, groups: Sequence[Hashable] | None) -> Array:
    """Sums ``[U]`` over the rows of each distinct text, by first appearance."""
    return sum_by_unit(values, *units_of(groups, len(values)))
