"""What a ranker's scores are worth, by the evidence there is: preferences, grades, or clicks. Pure NumPy.

Two rules hold throughout. Ties are averaged, never broken: a constant scorer gets exactly chance. And a group counts
only where its evidence tells titles apart: equal click rates or grades are no evidence for either side.

Legend of shapes: G groups, n titles of a group, K metrics, U distinct group ids, B bootstrap replicates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from loracle.evaluation.intervals import Array, Interval, bootstrap, ratio
from loracle.evaluation.ranking_metrics import SCORELESS, metric_table, read_evidence
from loracle.examples import RankGroup


def rank_metrics(
    scores: Sequence[np.ndarray], groups: Sequence[RankGroup], *, seed: int = 0
) -> dict[str, Interval | float]:
    """Metrics of one score array a group, each with a bootstrap interval over group ids; and what they rest on.

    - ``pair_accuracy``: share of pairs, over all groups, in which the winner scores higher; an equal score counts 0.5.
      Pairs are the preferences, or all titles whose grades or click rates differ.
    - ``kendall_tau`` (clicks, grades): mean over groups of the pairs in order less those out of order, over all pairs of
      the group; 0 is chance. A tied score counts for neither, which is the mean over all ways to break it. (Tau-b would
      divide by fewer pairs, and so favour ties. Without ties they agree.)
    - ``ndcg`` (clicks, grades): mean normalised discounted cumulative gain, ties averaged (McSherry and Najork 2008).
      The gain is 2^grade − 1, or the observed click rate.

    From clicks alone:

    - ``significant_pair_accuracy``: over pairs whose rates differ at two-sided p < .05, unadjusted.
    - ``pair_accuracy_gap_under_10``, ``…_10_to_25``, ``…_25_to_50``, ``…_over_50``: over pairs whose winner's observed
      rate is so many per cent above its loser's.
    - ``top1``: share of groups whose highest score is on the best observed arm.
    - ``ctr_lift``: click rate of the picks over that of their groups' mean arms, minus 1: the raw gain if every group
      had equally many readers. (A mean of the groups' own ratios would be ruled by the rarest clicks.)
    - ``regret``: share of clicks lost by the picks: (E[highest true rate] − E[true rate of the pick]) /
      E[highest true rate], each expectation summed over groups. Above 0 even for the best pick by the clicks
      themselves, as they leave in doubt which title is best.
    - ``ceiling``, ``significant_ceiling``: noise ceiling, the pair accuracies that the true order would reach on the
      same pairs, whose observed order is partly chance.
    - ``way``: (pair_accuracy − 0.5) / (ceiling − 0.5), the share of the way from chance to the ceiling.
    - ``significant_pairs``, beside ``groups`` and ``pairs``: counts.

    True rates are known by their posterior under a normal spread of log-odds within a group, fitted to these groups
    without scores (``spread.fit_spread``); intervals take that spread as given. A metric that nothing speaks for is NaN.
    Groups with one id (a test with several images) are resampled together; an empty id is nobody's but its own.
    ``RankGroup.weight`` is for training and not used here.

    Args:
        scores: floats ``[n_i]`` for each group, in the order of ``groups[i].texts``.

    Raises:
        UserError: there is no group.
        ValueError: scores and groups do not fit, or a score is not finite.
    """
    _check(scores, groups)
    evidence = read_evidence(groups)
    table = _by_id(metric_table(scores, evidence), groups)
    metrics = bootstrap(lambda weights: _ratios(table, weights), _units(table), seed=seed)
    counts = {"groups": len(groups), "pairs": sum(len(e.pairs) for e in evidence)}
    if any(len(e.rates) for e in evidence):
        counts["significant_pairs"] = int(sum(e.significant.sum() for e in evidence))
    return {**metrics, **counts}


def ranking_differences(
    scores_a: Sequence[np.ndarray], scores_b: Sequence[np.ndarray], groups: Sequence[RankGroup], *, seed: int = 0
) -> dict[str, Interval]:
    """By how much each metric of scorer a is above that of scorer b, on the same groups and the same bootstrap draws.

    A 95 % interval that leaves out 0 is a difference that another sample of groups would hardly undo. Names as in
    ``rank_metrics``, without the ceilings, which no scorer changes; mind that for ``regret`` less is better.

    Raises:
        UserError, ValueError: as ``rank_metrics``.
    """
    _check(scores_a, groups)
    _check(scores_b, groups)
    evidence = read_evidence(groups)
    a, b = (_by_id(metric_table(scores, evidence), groups) for scores in (scores_a, scores_b))

    def statistics(weights: Array) -> dict[str, Array]:
        of_a, of_b = _ratios(a, weights), _ratios(b, weights)
        return {name: of_a[name] - of_b[name] for name in of_a if name not in SCORELESS}

    return bootstrap(statistics, _units(a), seed=seed)


def _check(scores: Sequence[np.ndarray], groups: Sequence[RankGroup]) -> None:
    if len(scores) != len(groups):
        raise ValueError(f"scores of {len(scores)} groups for {len(groups)} groups")
    for score, group in zip(scores, groups, strict=True):
        if np.shape(score) != (len(group.texts),):
            raise ValueError(f"scores {np.shape(score)} for the {len(group.texts)} titles of group {group.group!r}")
        if not np.isfinite(score).all():
            raise ValueError(f"a score of group {group.group!r} is not finite")


def _by_id(table: Mapping[str, Array], groups: Sequence[RankGroup]) -> dict[str, Array]:
    """Tallies ``[U, 2]`` of what is resampled: the group ids, by first appearance."""
    numbers: dict[str | int, int] = {}
    unit = [numbers.setdefault(group.group or i, len(numbers)) for i, group in enumerate(groups)]
    summed = {name: np.zeros((len(numbers), 2)) for name in table}
    for name, sums in table.items():
        np.add.at(summed[name], unit, sums)
    return summed


def _units(table: Mapping[str, Array]) -> int:
    return len(table["pair_accuracy"])


def _ratios(table: Mapping[str, Array], weights: Array) -> dict[str, Array]:
    """Each metric ``[B]`` of groups weighted ``[B, U]``."""
    sums = weights @ np.concatenate(list(table.values()), axis=1)  # [B, 2K]
    return {name: ratio(sums[:, 2 * k], sums[:, 2 * k + 1]) for k, name in enumerate(table)}
