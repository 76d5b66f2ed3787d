"""Which title beat which, by the evidence there is: preferences, grades, or clicks. Pure NumPy.

Equal click rates or grades are no evidence for either side. Legend of shapes: n titles of a group, P pairs of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from loracle.evaluation.intervals import Array
from loracle.examples import RankGroup

Pairs = npt.NDArray[np.intp]  # [P, 2]: winner, loser

SIGNIFICANT_Z = 1.959963984540054  # two-sided p = .05


def group_pairs(group: RankGroup) -> Pairs:
    """Pairs ``[P, 2]`` (winner, loser) of a group: preferences, or all titles whose grades or rates differ."""
    if group.clicks is not None:
        return np.argwhere(higher_rate(group))
    if group.grades is not None:
        grades = np.asarray(group.grades, dtype=np.float64)
        return np.argwhere(grades[:, None] > grades)
    pairs = [(preference.winner, preference.loser) for preference in group.preferences]
    return np.array(pairs, dtype=np.intp).reshape(-1, 2)


def significant(group: RankGroup, pairs: Pairs) -> npt.NDArray[np.bool_]:
    """Which pairs of a click group differ at two-sided p < .05 in the pooled two-proportion z test, unadjusted."""
    clicks, impressions = counts(group)
    winner, loser = pairs.T
    pooled = (clicks[winner] + clicks[loser]) / (impressions[winner] + impressions[loser])
    spread = np.sqrt(pooled * (1 - pooled) * (1 / impressions[winner] + 1 / impressions[loser]))
    rates = clicks / impressions
    return rates[winner] - rates[loser] > SIGNIFICANT_Z * spread


def rate_gap(group: RankGroup, pairs: Pairs) -> Array:
    """By what share the winner's observed rate is above the loser's, ``[P]``: 0.25 is 25 % more clicks an impression.

    Infinite where the loser has no click.
    """
    clicks, impressions = counts(group)
    winner, loser = (clicks / impressions)[pairs.T]
    return np.divide(winner, loser, out=np.full(len(pairs), np.inf), where=loser > 0) - 1


def grade_gains(grades: Sequence[float]) -> Array:
    """Gains proportional to 2^grade − 1, the highest grade near 1; grades are shifted up where the lowest is negative.

    Callers use the proportions of gains only, so gains are scaled before the power can overflow.
    """
    shifted = np.asarray(grades, dtype=np.float64)
    shifted = shifted - min(shifted.min(), 0.0)
    return np.exp2(shifted - shifted.max()) - np.exp2(-shifted.max())


def counts(group: RankGroup) -> tuple[Array, Array]:
    """Clicks and impressions; an arm never shown counts one impression, so that its rate is 0 and no division fails."""
    return np.array(group.clicks, dtype=np.float64), np.maximum(np.array(group.impressions, dtype=np.float64), 1)


def higher_rate(group: RankGroup) -> npt.NDArray[np.bool_]:
    """``[n, n]``: arm i was clicked at a higher rate than arm j.

    By cross multiplication in Python's integers: exact, where quotients may tell equal rates apart. An arm never shown
    is above and below nobody.
    """
    clicks, impressions = np.array(group.clicks, dtype=object), np.array(group.impressions, dtype=object)
    crossed = np.multiply.outer(clicks, impressions)
    return (crossed > crossed.T).astype(bool)
