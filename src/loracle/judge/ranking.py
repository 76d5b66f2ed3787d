"""What a ranker's scores are worth, by the evidence there is: preferences, grades, or clicks. Pure NumPy.

Two rules hold throughout. Ties are averaged, never broken: a constant scorer gets exactly chance. And a group counts
only where its evidence tells titles apart: equal click rates or grades are no evidence for either side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from loracle.data.examples import RankGroup
from loracle.judge.metrics import Array, Interval, bootstrap, ratio

Pairs = npt.NDArray[np.intp]  # [P, 2]: winner, loser
Evidence = Literal["pairs", "grades", "clicks"]

SIGNIFICANT_Z = 1.959963984540054  # two-sided p = .05


def rank_metrics(
    scores: Sequence[np.ndarray], groups: Sequence[RankGroup], *, seed: int = 0
) -> dict[str, Interval | float]:
    """Metrics of one score array a group, each with a bootstrap interval over groups; and what they rest on.

    - ``pair_accuracy``: share of pairs, over all groups, in which the winner scores higher; an equal score counts 0.5.
      Pairs are the preferences, or all titles whose grades or click rates differ.
    - ``significant_pair_accuracy`` (clicks): the same over pairs whose rates differ at two-sided p < .05, unadjusted.
    - ``top1`` (clicks): share of groups whose highest score is on the best observed arm.
    - ``ctr_lift`` (clicks): click rate of the picks over that of their groups' mean arms, minus 1: the raw gain if
      every group had equally many readers. (A mean of the groups' own ratios would be ruled by the rarest clicks.)
    - ``ndcg`` (grades): mean normalised discounted cumulative gain, gain 2^grade − 1, ties averaged (McSherry and
      Najork 2008).
    - ``groups``, ``pairs``, ``significant_pairs``: counts.

    A metric that nothing speaks for is NaN. ``RankGroup.weight`` is for training and not used here.

    Args:
        scores: floats ``[n_i]`` for each group, in the order of ``groups[i].texts``.

    Raises:
        UserError: there is no group.
        ValueError: scores and groups do not fit, or a score is not finite.
    """
    _check(scores, groups)
    kinds = [evidence_of(group) for group in groups]
    table = {
        name: np.array(
            [
                tally(np.asarray(score, np.float64), group) if kind in speaks else (0.0, 0.0)
                for score, group, kind in zip(scores, groups, kinds, strict=True)
            ]
        ).reshape(-1, 2)
        for name, (tally, speaks) in _TALLIES.items()
        if name == "pair_accuracy" or speaks & set(kinds)
    }

    def statistics(weights: Array) -> dict[str, Array]:
        return {name: ratio(weights @ part[:, 0], weights @ part[:, 1]) for name, part in table.items()}

    counts = {"groups": len(groups), "pairs": int(table["pair_accuracy"][:, 1].sum())}
    if "clicks" in kinds:
        counts["significant_pairs"] = int(table["significant_pair_accuracy"][:, 1].sum())
    return {**bootstrap(statistics, len(groups), seed=seed), **counts}


def evidence_of(group: RankGroup) -> Evidence | None:
    """Which kind of evidence a group carries; None when it is only to be ranked."""
    if group.clicks is not None:
        return "clicks"
    if group.grades is not None:
        return "grades"
    return "pairs" if group.preferences else None


def group_pairs(group: RankGroup) -> Pairs:
    """Pairs ``[P, 2]`` (winner, loser) of a group: preferences, or all titles whose grades or rates differ."""
    if group.clicks is not None:
        return np.argwhere(_higher_rate(group))
    if group.grades is not None:
        grades = np.asarray(group.grades, dtype=np.float64)
        return np.argwhere(grades[:, None] > grades)
    pairs = [(preference.winner, preference.loser) for preference in group.preferences]
    return np.array(pairs, dtype=np.intp).reshape(-1, 2)


def significant(group: RankGroup, pairs: Pairs) -> npt.NDArray[np.bool_]:
    """Which pairs of a click group differ at two-sided p < .05 in the pooled two-proportion z test, unadjusted."""
    clicks, impressions = _counts(group)
    winner, loser = pairs.T
    pooled = (clicks[winner] + clicks[loser]) / (impressions[winner] + impressions[loser])
    spread = np.sqrt(pooled * (1 - pooled) * (1 / impressions[winner] + 1 / impressions[loser]))
    rates = clicks / impressions
    return rates[winner] - rates[loser] > SIGNIFICANT_Z * spread


def grade_gains(grades: Sequence[float]) -> Array:
    """Gains proportional to 2^grade − 1, the highest grade near 1; grades are shifted up where the lowest is negative.

    Only proportions matter to whoever uses gains, so they are scaled before the power can overflow.
    """
    shifted = np.asarray(grades, dtype=np.float64)
    shifted = shifted - min(shifted.min(), 0.0)
    return np.exp2(shifted - shifted.max()) - np.exp2(-shifted.max())


def _check(scores: Sequence[np.ndarray], groups: Sequence[RankGroup]) -> None:
    if len(scores) != len(groups):
        raise ValueError(f"scores of {len(scores)} groups for {len(groups)} groups")
    for score, group in zip(scores, groups, strict=True):
        if np.shape(score) != (len(group.texts),):
            raise ValueError(f"scores {np.shape(score)} for the {len(group.texts)} titles of group {group.group!r}")
        if not np.isfinite(score).all():
            raise ValueError(f"a score of group {group.group!r} is not finite")


def _counts(group: RankGroup) -> tuple[Array, Array]:
    """Clicks and impressions; an arm never shown counts one impression, so that its rate is 0 and no division fails."""
    return np.array(group.clicks, dtype=np.float64), np.maximum(np.array(group.impressions, dtype=np.float64), 1)


def _higher_rate(group: RankGroup) -> npt.NDArray[np.bool_]:
    """``[n, n]``: arm i was clicked at a higher rate than arm j.

    By cross multiplication in Python's integers: exact, where quotients may tell equal rates apart. An arm never shown
    is above and below nobody.
    """
    clicks, impressions = np.array(group.clicks, dtype=object), np.array(group.impressions, dtype=object)
    crossed = np.multiply.outer(clicks, impressions)
    return (crossed > crossed.T).astype(bool)


def _pick(scores: Array) -> Array:
    """The model's pick as weights over the titles: 1 on the highest score, shared where it is tied."""
    highest = scores == scores.max()
    return highest / highest.sum()


def _wins(scores: Array, pairs: Pairs) -> tuple[float, float]:
    winner, loser = scores[pairs].T
    return float((winner > loser).sum() + 0.5 * (winner == loser).sum()), float(len(pairs))


def _pair_tally(scores: Array, group: RankGroup) -> tuple[float, float]:
    return _wins(scores, group_pairs(group))


def _significant_tally(scores: Array, group: RankGroup) -> tuple[float, float]:
    pairs = group_pairs(group)
    return _wins(scores, pairs[significant(group, pairs)])


def _lift_tally(scores: Array, group: RankGroup) -> tuple[float, float]:
    clicks, impressions = _counts(group)
    rates = clicks / impressions
    mean = rates.mean()
    return float(_pick(scores) @ (rates - mean)), float(mean)


def _top1_tally(scores: Array, group: RankGroup) -> tuple[float, float]:
    higher = _higher_rate(group)
    if not higher.any():
        return 0.0, 0.0
    best = ~higher.any(axis=0) & higher.any(axis=1)
    return float(_pick(scores) @ best), 1.0


def _ndcg_tally(scores: Array, group: RankGroup) -> tuple[float, float]:
    gains = grade_gains(group.grades or ())
    if gains.min() == gains.max():
        return 0.0, 0.0
    discounts = 1 / np.log2(np.arange(len(gains)) + 2)
    _, block, size = np.unique(-scores, return_inverse=True, return_counts=True)
    shared = np.add.reduceat(discounts, np.cumsum(size) - size) / size  # mean discount of the places that a tie fills
    return float(gains @ shared[block] / (np.sort(gains)[::-1] @ discounts)), 1.0


Tally = Callable[[Array, RankGroup], tuple[float, float]]

# A metric is a ratio of sums over groups: each group gives a numerator and a denominator, (0, 0) where it says nothing.
_TALLIES: dict[str, tuple[Tally, frozenset[Evidence]]] = {
    "pair_accuracy": (_pair_tally, frozenset({"pairs", "grades", "clicks"})),
    "significant_pair_accuracy": (_significant_tally, frozenset({"clicks"})),
    "top1": (_top1_tally, frozenset({"clicks"})),
    "ctr_lift": (_lift_tally, frozenset({"clicks"})),
    "ndcg": (_ndcg_tally, frozenset({"grades"})),
}
