"""The metrics of a ranker, one function each. Pure NumPy.

A metric is a ratio of sums over groups: each group gives a numerator and a denominator, (0, 0) where it says nothing. Ties
are averaged, never broken, so that a constant scorer gets exactly chance.

Legend of shapes: n titles of a group, P pairs of them, D draws.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from scipy.special import expit

from loracle.evaluation.classification import Array
from loracle.evaluation.click_model import fit_spread, posterior_log_odds
from loracle.evaluation.pairs import (
    Evidence,
    Pairs,
    counts,
    evidence_of,
    grade_gains,
    group_pairs,
    higher_rate,
    rate_gap,
    significant,
)
from loracle.examples import RankGroup

TRUTH_SEED = 0  # of the posterior draws, whatever the bootstrap's: the ceiling is a property of the log, not of a run
CELLS = 1 << 20  # comparisons of draws held at once
GAPS = ("under_10", "10_to_25", "25_to_50", "over_50")  # per cent by which the winner's rate is above the loser's
GAP_EDGES = (0.1, 0.25, 0.5)


@dataclass(frozen=True, slots=True)
class Truth:
    """What the clicks of a group tell of its titles' true rates: posterior means under the fitted spread."""

    above: Array  # [n, n]: chance that title i's true rate is above title j's
    rate: Array  # [n]
    best: float  # of the highest true rate in the group


@dataclass(frozen=True, slots=True)
class GroupEvidence:
    """A group and what its evidence says, worked out once for all metrics."""

    kind: Evidence | None
    pairs: Pairs
    significant: npt.NDArray[np.bool_]  # [P], all False without clicks
    gap: Array  # [P], NaN without clicks
    rates: Array  # [n], observed click rates; empty without clicks
    best: npt.NDArray[np.bool_]  # [n], no title was clicked at a higher rate and some at a lower; empty without clicks
    gains: Array  # [n], of NDCG; empty for preferences
    truth: Truth | None  # None where no click tells


def read_cases(groups: Sequence[RankGroup]) -> list[GroupEvidence]:
    """All that metrics need to know of the groups."""
    return [_case(group, truth) for group, truth in zip(groups, true_rates(tuple(groups)), strict=True)]


@lru_cache(maxsize=4)  # validation groups are looked at again and again, and test groups by every baseline
def true_rates(groups: tuple[RankGroup, ...]) -> tuple[Truth | None, ...]:
    """What clicks tell of true rates: spread τ fitted to these groups, without scores, and posterior draws given it.

    None for a group without clicks, and for all where τ cannot be fitted.
    """
    told = [i for i, group in enumerate(groups) if any(group.clicks or ())]
    spread = fit_spread([groups[i] for i in told])
    truths: list[Truth | None] = [None] * len(groups)
    if spread.groups:
        drawn = posterior_log_odds([groups[i] for i in told], spread, seed=TRUTH_SEED)
        for i, log_odds in zip(told, drawn, strict=True):
            truths[i] = _truth(groups[i], expit(log_odds))
    return tuple(truths)


def _truth(group: RankGroup, rates: Array) -> Truth:
    """From draws of the true rates ``[D, n]``."""
    chunk = max(1, CELLS // rates.shape[1] ** 2)
    parts = [rates[start : start + chunk] for start in range(0, len(rates), chunk)]
    above = np.sum([(part[:, :, None] > part[:, None]).sum(axis=0) for part in parts], axis=0) / len(rates)
    # Equal counts know equally much: their mean takes the noise of the draws out of whoever picks among them.
    _, same = np.unique(np.stack(counts(group)), axis=1, return_inverse=True)
    mean = np.bincount(same.ravel(), rates.mean(axis=0)) / np.bincount(same.ravel())
    return Truth(above, mean[same.ravel()], float(rates.max(axis=1).mean()))


def _case(group: RankGroup, truth: Truth | None) -> GroupEvidence:
    kind, pairs, none = evidence_of(group), group_pairs(group), np.empty(0)
    if kind != "clicks":
        gains = grade_gains(group.grades) if group.grades is not None else none
        no, unknown = np.zeros(len(pairs), dtype=bool), np.full(len(pairs), np.nan)
        return GroupEvidence(kind, pairs, no, unknown, none, none.astype(bool), gains, None)
    clicks, impressions = counts(group)
    rates, higher = clicks / impressions, higher_rate(group)
    best = np.logical_and(higher.any(axis=1), np.logical_not(higher.any(axis=0)))
    return GroupEvidence(kind, pairs, significant(group, pairs), rate_gap(group, pairs), rates, best, rates, truth)


# --- tallies ----------------------------------------------------------------------------------------------------------

Tally = Callable[[Array, GroupEvidence], tuple[float, float]]


def _pick(scores: Array) -> Array:
    """The model's pick as weights over the titles: 1 on the highest score, shared where it is tied."""
    highest = scores == scores.max()
    return highest / highest.sum()


def _wins(scores: Array, pairs: Pairs) -> tuple[float, float]:
    winner, loser = scores[pairs].T
    return float((winner > loser).sum() + 0.5 * (winner == loser).sum()), float(len(pairs))


def _pair_tally(scores: Array, case: GroupEvidence) -> tuple[float, float]:
    return _wins(scores, case.pairs)


def _significant_tally(scores: Array, case: GroupEvidence) -> tuple[float, float]:
    return _wins(scores, case.pairs[case.significant])


def _gap_tally(which: int) -> Tally:
    return lambda scores, case: _wins(scores, case.pairs[np.digitize(case.gap, GAP_EDGES) == which])


def _kendall_tally(scores: Array, case: GroupEvidence) -> tuple[float, float]:
    right, pairs = _wins(scores, case.pairs)
    return (2 * right / pairs - 1, 1.0) if pairs else (0.0, 0.0)


def _top1_tally(scores: Array, case: GroupEvidence) -> tuple[float, float]:
    return (float(_pick(scores) @ case.best), 1.0) if case.best.any() else (0.0, 0.0)


def _lift_tally(scores: Array, case: GroupEvidence) -> tuple[float, float]:
    mean = case.rates.mean()
    return float(_pick(scores) @ (case.rates - mean)), float(mean)


def _regret_tally(scores: Array, case: GroupEvidence) -> tuple[float, float]:
    if case.truth is None:
        return 0.0, 0.0
    return case.truth.best - float(_pick(scores) @ case.truth.rate), case.truth.best


def _ndcg_tally(scores: Array, case: GroupEvidence) -> tuple[float, float]:
    gains = case.gains
    if not len(case.pairs):
        return 0.0, 0.0
    discounts = 1 / np.log2(np.arange(len(gains)) + 2)
    _, block, size = np.unique(-scores, return_inverse=True, return_counts=True)
    shared = np.add.reduceat(discounts, np.cumsum(size) - size) / size  # mean discount of the places that a tie fills
    return float(gains @ shared[block] / (np.sort(gains)[::-1] @ discounts)), 1.0


def _ceiling_of(pairs: Pairs, truth: Truth | None) -> tuple[float, float]:
    """How many of the pairs the true order would get right, on average over what it may be."""
    return (float(truth.above[tuple(pairs.T)].sum()), float(len(pairs))) if truth else (0.0, 0.0)


def _ceiling_tally(scores: Array, case: GroupEvidence) -> tuple[float, float]:
    return _ceiling_of(case.pairs, case.truth)


def _significant_ceiling_tally(scores: Array, case: GroupEvidence) -> tuple[float, float]:
    return _ceiling_of(case.pairs[case.significant], case.truth)


def _way_tally(scores: Array, case: GroupEvidence) -> tuple[float, float]:
    known, pairs = _ceiling_of(case.pairs, case.truth)
    return (_wins(scores, case.pairs)[0] - pairs / 2, known - pairs / 2) if pairs else (0.0, 0.0)


CLICKS: frozenset[Evidence] = frozenset({"clicks"})
GRADED: frozenset[Evidence] = frozenset({"clicks", "grades"})

# Name: tally, and the kinds of evidence that it speaks for.
TALLIES: dict[str, tuple[Tally, frozenset[Evidence]]] = {
    "pair_accuracy": (_pair_tally, frozenset({"pairs", "grades", "clicks"})),
    "significant_pair_accuracy": (_significant_tally, CLICKS),
    "ctr_lift": (_lift_tally, CLICKS),
    "top1": (_top1_tally, CLICKS),
    "regret": (_regret_tally, CLICKS),
    "ndcg": (_ndcg_tally, GRADED),
    "kendall_tau": (_kendall_tally, GRADED),
    **{f"pair_accuracy_gap_{name}": (_gap_tally(i), CLICKS) for i, name in enumerate(GAPS)},
    "ceiling": (_ceiling_tally, CLICKS),
    "significant_ceiling": (_significant_ceiling_tally, CLICKS),
    "way": (_way_tally, CLICKS),
}
SCORELESS = frozenset({"ceiling", "significant_ceiling"})  # say nothing of a scorer


def tally_table(scores: Sequence[np.ndarray], cases: Sequence[GroupEvidence]) -> dict[str, Array]:
    """``[G, 2]`` for each metric that some group speaks for, and for the pair accuracy."""
    kinds = {case.kind for case in cases}
    return {
        name: np.array(
            [
                tally(np.asarray(score, np.float64), case) if case.kind in speaks else (0.0, 0.0)
                for score, case in zip(scores, cases, strict=True)
            ]
        ).reshape(-1, 2)
        for name, (tally, speaks) in TALLIES.items()
        if name == "pair_accuracy" or speaks & kinds
    }
