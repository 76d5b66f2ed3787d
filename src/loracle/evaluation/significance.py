"""Whether one classifier or ranker is better than another on the same test examples.

Classifiers: McNemar's exact test (McNemar 1947; binomial). Rankers: the paired bootstrap over groups. Several comparisons at
once: Holm 1979. Copies of a text are no further evidence, so they count as one.

Legend of shapes: N texts, U distinct texts, C labels, n_i titles of group i.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest, norm

from loracle.evaluation.calibration import UNCALIBRATED, Calibration
from loracle.evaluation.classification import classification_differences
from loracle.evaluation.intervals import Array, Interval, sum_by_unit, units_of
from loracle.evaluation.labels import Labels
from loracle.evaluation.ranking import ranking_differences
from loracle.examples import LabeledText, RankGroup


@dataclass(frozen=True, slots=True)
class Paired:
    """By how much a is above b in ``metric``, with a 95 % interval and the two-sided p of no difference."""

    metric: str
    difference: Interval
    p: float
    test: str  # its name


def compare_classifiers(
    scores: tuple[np.ndarray, np.ndarray],
    examples: Sequence[LabeledText],
    labels: Labels,
    calibrations: tuple[Calibration, Calibration] = (UNCALIBRATED, UNCALIBRATED),
) -> Paired:
    """Compare two classifiers by their logits ``[N, C]``: accuracy, of whole label sets where a text can have several."""
    texts = [e.identity for e in examples]
    targets = labels.targets(examples, scores[0].shape[1])
    gap = classification_differences(scores, targets, labels, groups=texts, calibrations=calibrations)["accuracy"]
    a, b = (labels.credit(s, targets, c) for s, c in zip(scores, calibrations, strict=True))
    return Paired("accuracy", gap, mcnemar(a, b, texts), "McNemar, exact")


def compare_rankers(
    scores_a: Sequence[np.ndarray], scores_b: Sequence[np.ndarray], groups: Sequence[RankGroup]
) -> Paired:
    """Compare two rankers by pair accuracy, with a paired bootstrap over group ids.

    p comes from the interval (Altman and Bland 2011, BMJ 343:d2304). It is at least 2^(1−U), the p of a sign test in which
    all U groups favour one scorer.
    """
    metric, test = "pair_accuracy", "bootstrap over groups"
    gap = ranking_differences(scores_a, scores_b, groups)[metric]
    units = len({g.group or i for i, g in enumerate(groups)})
    if not np.isfinite(gap.value) or gap.value == 0:
        return Paired(metric, gap, 1.0, test)
    error = (gap.high - gap.low) / (2 * norm.ppf(0.975))
    p = 2 * norm.sf(abs(gap.value) / error) if error > 0 else 0.0
    return Paired(metric, gap, float(min(1.0, max(p, 2.0 ** (1 - units)))), test)


def mcnemar(a: np.ndarray, b: np.ndarray, groups: Sequence[Hashable] | None = None) -> float:
    """Exact two-sided p of McNemar's test: both scorers are equally often right where the other is wrong.

    Args:
        a, b: credit of each scorer on the same N texts. groups: N hashables; rows of equal ones are one text. The scorer
            with more credit on it is ahead.
    """
    gap = _by_unit(np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64), groups)
    ahead, behind = int((gap > 0).sum()), int((gap < 0).sum())
    return float(binomtest(ahead, ahead + behind).pvalue) if ahead + behind else 1.0


def holm(p: Sequence[float]) -> list[float]:
    """p values adjusted for their number (Holm 1979), for a familywise error of 5 % at .05."""
    adjusted, running = [0.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        running = max(running, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = running
    return adjusted


def _by_unit(values: Array, groups: Sequence[Hashable] | None) -> Array:
    """Sums ``[U]`` over the rows of each distinct text, by first appearance."""
    return sum_by_unit(values, *units_of(groups, len(values)))
