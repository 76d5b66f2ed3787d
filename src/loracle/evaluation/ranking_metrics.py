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

from loracle.evaluation.click_model import fit_click_model, posterior_log_odds
from loracle.evaluation.intervals import Array
from loracle.evaluation.pairs import (
    Pairs,
    counts,
    grade_gains,
    group_pairs,
    higher_rate,
    rate_gap,
    significant,
)
from loracle.examples import RankGroup

TRUTH_SEED = 0  # of the posterior draws, whatever the bootstrap's: the ceiling is a property of the log, not of a run
CELLS = 1 << 20  # comparisons of draws in memory at once
GAPS = ("under_10", "10_to_25", "25_to_50", "over_50")  # per cent by which the winner's rate is above the loser's
GAP_EDGES = (0.1, 0.25, 0.5)


@dataclass(frozen=True, slots=True)
class Truth:
    """Posterior means of the true click rates of a group's titles, under the fitted spread."""

    above: Array  # [n, n]: chance that title i's true rate is above title j's
    rate: Array  # [n]
    best: float  # of the highest true rate in the group


@dataclass(frozen=True, slots=True)
class GroupEvidence:
    """A group and what its evidence says, worked out once for all metrics."""

    pairs: Pairs
    significant: npt.NDArray[np.bool_]  # [P], all False without clicks
    gap: Array  # [P], NaN without clicks
    rates: Array  # [n], observed click rates; empty without clicks
    best: npt.NDArray[np.bool_]  # [n], no title was clicked at a higher rate and some at a lower; empty without clicks
    gains: Array  # [n], of NDCG; empty for preferences
    truth: Truth | None  # None where no click tells


def read_evidence(groups: Sequence[RankGroup]) -> list[GroupEvidence]:
    """All that metrics need to know of the groups."""
    return [_evidence(group, truth) for group, truth in zip(groups, true_rates(tuple(groups)), strict=True)]


@lru_cache(maxsize=4)  # validation groups are looked at again and again, and test groups by every baseline
def true_rates(groups: tuple[RankGroup, ...]) -> tuple[Truth | None, ...]:
    """What clicks tell of true rates: spread τ fitted to these groups, without scores, and posterior draws given it.

    None for a group without clicks, and for all where τ cannot be fitted.
    """
    clicked = [i for i, group in enumerate(groups) if any(group.clicks or ())]
    model = fit_click_model([groups[i] for i in clicked])
    truths: list[Truth | None] = [None] * len(groups)
    if model.groups:
        drawn = posterior_log_odds([groups[i] for i in clicked], model, seed=TRUTH_SEED)
        for i, log_odds in zip(clicked, drawn, strict=True):
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


def _evidence(group: RankGroup, truth: Truth | None) -> GroupEvidence:
    pairs, none = group_pairs(group), np.empty(0)
    if group.clicks is None:
        gains = grade_gains(group.grades) if group.grades is not None else none
        no, unknown = np.zeros(len(pairs), dtype=bool), np.full(len(pairs), np.nan)
        return GroupEvidence(pairs, no, unknown, none, none.astype(bool), gains, None)
    clicks, impressions = counts(group)
    rates, higher = clicks / impressions, higher_rate(group)
    best = np.logical_and(higher.any(axis=1), np.logical_not(higher.any(axis=0)))
    return GroupEvidence(pairs, significant(group, pairs), rate_gap(group, pairs), rates, best, rates, truth)


# --- metrics ----------------------------------------------------------------------------------------------------------

Sums = Callable[[Array, GroupEvidence], tuple[float, float]]


def _pick(scores: Array) -> Array:
    """The model's pick as weights over the titles: 1 on the highest score, shared where it is tied."""
    highest = scores == scores.max()
    return highest / highest.sum()


def _wins(scores: Array, pairs: Pairs) -> tuple[float, float]:
    winner, loser = scores[pairs].T
    return float((winner > loser).sum() + 0.5 * (winner == loser).sum()), float(len(pairs))


def _pair_sums(scores: Array, evidence: GroupEvidence) -> tuple[float, float]:
    return _wins(scores, evidence.pairs)


def _significant_sums(scores: Array, evidence: GroupEvidence) -> tuple[float, float]:
    return _wins(scores, evidence.pairs[evidence.significant])


def _gap_sums(which: int) -> Sums:
    return lambda scores, evidence: _wins(scores, evidence.pairs[np.digitize(evidence.gap, GAP_EDGES) == which])


def _kendall_sums(scores: Array, evidence: GroupEvidence) -> tuple[float, float]:
    right, pairs = _wins(scores, evidence.pairs)
    return (2 * right / pairs - 1, 1.0) if pairs else (0.0, 0.0)


def _top1_sums(scores: Array, evidence: GroupEvidence) -> tuple[float, float]:
    return (float(_pick(scores) @ evidence.best), 1.0) if evidence.best.any() else (0.0, 0.0)


def _lift_sums(scores: Array, evidence: GroupEvidence) -> tuple[float, float]:
    mean = evidence.rates.mean()
    return float(_pick(scores) @ (evidence.rates - mean)), float(mean)


def _regret_sums(scores: Array, evidence: GroupEvidence) -> tuple[float, float]:
    if evidence.truth is None:
        return 0.0, 0.0
    return evidence.truth.best - float(_pick(scores) @ evidence.truth.rate), evidence.truth.best


def _ndcg_sums(scores: Array, evidence: GroupEvidence) -> tuple[float, float]:
    gains = evidence.gains
    if not len(evidence.pairs):
        return 0.0, 0.0
    discounts = 1 / np.log2(np.arange(len(gains)) + 2)
    _, block, size = np.unique(-scores, return_inverse=True, return_counts=True)
    shared = np.add.reduceat(discounts, np.cumsum(size) - size) / size  # mean discount of the places that a tie fills
    return float(gains @ shared[block] / (np.sort(gains)[::-1] @ discounts)), 1.0


def _ceiling_of(pairs: Pairs, truth: Truth | None) -> tuple[float, float]:
    """How many of the pairs the true order would get right, on average over what it may be."""
    return (float(truth.above[tuple(pairs.T)].sum()), float(len(pairs))) if truth else (0.0, 0.0)


def _ceiling_sums(scores: Array, evidence: GroupEvidence) -> tuple[float, float]:
    return _ceiling_of(evidence.pairs, evidence.truth)


def _significant_ceiling_sums(scores: Array, evidence: GroupEvidence) -> tuple[float, float]:
    return _ceiling_of(evidence.pairs[evidence.significant], evidence.truth)


def _way_sums(scores: Array, evidence: GroupEvidence) -> tuple[float, float]:
    known, pairs = _ceiling_of(evidence.pairs, evidence.truth)
    return (_wins(scores, evidence.pairs)[0] - pairs / 2, known - pairs / 2) if pairs else (0.0, 0.0)


# Name: the sums of a group, and the evidence (a field of GroupEvidence) that a group must have for it.
RANKING_METRICS: dict[str, tuple[Sums, str]] = {
    "pair_accuracy": (_pair_sums, "pairs"),
    "significant_pair_accuracy": (_significant_sums, "rates"),
    "ctr_lift": (_lift_sums, "rates"),
    "top1": (_top1_sums, "rates"),
    "regret": (_regret_sums, "rates"),
    "ndcg": (_ndcg_sums, "gains"),
    "kendall_tau": (_kendall_sums, "gains"),
    **{f"pair_accuracy_gap_{name}": (_gap_sums(i), "rates") for i, name in enumerate(GAPS)},
    "ceiling": (_ceiling_sums, "rates"),
    "significant_ceiling": (_significant_ceiling_sums, "rates"),
    "way": (_way_sums, "rates"),
}
SCORELESS = frozenset({"ceiling", "significant_ceiling"})  # independent of the scorer


def metric_table(scores: Sequence[np.ndarray], evidence: Sequence[GroupEvidence]) -> dict[str, Array]:
    """``[G, 2]``, numerator and denominator of each group, for each metric that some group has evidence for.

    The pair accuracy is always there.
    """
    return {
        name: np.array(
            [
                sums(np.asarray(score, np.float64), group) if len(getattr(group, needs)) else (0.0, 0.0)
                for score, group in zip(scores, evidence, strict=True)
            ]
        ).reshape(-1, 2)
        for name, (sums, needs) in RANKING_METRICS.items()
        if name == "pair_accuracy" or any(len(getattr(group, needs)) for group in evidence)
    }
