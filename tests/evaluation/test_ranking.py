"""Ranking metrics: hand-computed values, chance for constant scorers, invariance, and the exactness of ties."""

import dataclasses
import math

import numpy as np
import pytest
from scipy.special import expit
from scipy.stats import kendalltau
from sklearn.metrics import ndcg_score

from loracle.errors import UserError
from loracle.evaluation.click_model import fit_click_model, posterior_log_odds
from loracle.evaluation.intervals import Interval
from loracle.evaluation.pairs import grade_gains, group_pairs, rate_gap, significant
from loracle.evaluation.ranking import rank_metrics, ranking_differences
from loracle.evaluation.ranking_metrics import GAPS, true_rates
from loracle.examples import Preference, RankGroup


def group(name="g", n=3, **evidence):
    return RankGroup(group=name, texts=tuple(f"{name}{i}" for i in range(n)), rows=tuple(range(1, n + 1)), **evidence)


def clicked(clicks, impressions, name="g"):
    return group(name, len(clicks), clicks=tuple(clicks), impressions=tuple(impressions))


def value(metrics, name):
    return metrics[name].value


def random_clicks(seed=0, groups=40):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(2, 6, size=groups)
    made = [clicked(rng.binomial(1000, 0.02, n).tolist(), [1000] * n, f"g{i}") for i, n in enumerate(sizes)]
    return made, [rng.integers(4, size=n).astype(np.float32) for n in sizes]  # few values: with tied scores


def simulated_clicks(seed, groups, *, shown, level=-4.0, spread=0.3):
    """Groups of four with a normal spread of true log-odds, and these log-odds."""
    rng = np.random.default_rng(seed)
    made, truth = [], []
    for g in range(groups):
        log_odds = level + 0.7 * rng.normal() + spread * rng.normal(size=4)
        made.append(clicked(rng.binomial(shown, expit(log_odds)).tolist(), [shown] * 4, f"g{g}"))
        truth.append(log_odds)
    return made, truth


def random_grades(seed=0, groups=20):
    rng = np.random.default_rng(seed)
    made = [group(f"g{i}", 4, grades=tuple(rng.integers(0, 4, 4).astype(float))) for i in range(groups)]
    return made, [rng.integers(3, size=4).astype(float) for _ in made]


def test_pairs_of_each_kind_of_evidence():
    preferences = (Preference(winner=2, loser=0), Preference(winner=1, loser=0))
    assert group_pairs(group(preferences=preferences)).tolist() == [[2, 0], [1, 0]]
    assert group_pairs(group(grades=(1.0, 2.0, 1.0))).tolist() == [[1, 0], [1, 2]]
    assert group_pairs(clicked([1, 3, 2], [100, 100, 200])).tolist() == [[1, 0], [1, 2]]
    assert group_pairs(group()).shape == (0, 2)


def test_equal_click_rates_are_no_pair_even_where_quotients_round_apart():
    big = 10**17 + 3  # beyond float64's integers, and its products beyond int64's
    assert group_pairs(clicked([big, 3 * big], [3 * big, 9 * big])).tolist() == []
    assert group_pairs(clicked([big + 1, 3 * big], [3 * big, 9 * big])).tolist() == [[0, 1]]


def test_an_arm_never_shown_is_in_no_pair():
    assert group_pairs(clicked([5, 0, 6], [100, 0, 100])).tolist() == [[2, 0]]


def test_significance_by_hand():
    # pooled 0.03, spread sqrt(0.03·0.97·2/1000) = 0.00763: rates must differ by 0.01495
    table = clicked([38, 22], [1000, 1000]), clicked([37, 23], [1000, 1000])
    assert [significant(g, group_pairs(g)).tolist() for g in table] == [[True], [False]]


def test_clicks_by_hand():
    groups = [clicked([40, 20, 10], [1000, 1000, 1000], "g"), clicked([10, 12], [1000, 1000], "h")]
    found = rank_metrics([np.array([2.0, 2.0, 1.0]), np.array([1.0, 0.0])], groups)
    # g: (0,1) tied, (0,2) and (1,2) right; h: (1,0) wrong. Significant: (0,1) and (0,2), and (1,2) is not (z 1.84).
    assert value(found, "pair_accuracy") == pytest.approx(2.5 / 4)
    assert value(found, "significant_pair_accuracy") == pytest.approx(1.5 / 2)
    assert value(found, "top1") == pytest.approx((0.5 + 0) / 2)
    assert value(found, "ctr_lift") == pytest.approx((0.030 + 0.010) / (0.070 / 3 + 0.011) - 1)
    assert (found["groups"], found["pairs"], found["significant_pairs"]) == (2, 4, 2)


def test_preferences_by_hand():
    groups = [group(preferences=(Preference(winner=0, loser=1), Preference(winner=2, loser=1)))]
    found = rank_metrics([np.array([1.0, 0.5, 0.5])], groups)
    assert value(found, "pair_accuracy") == 0.75
    assert set(found) == {"pair_accuracy", "groups", "pairs"}


def test_ndcg_by_hand_and_by_scikit_learn():
    graded = group(n=3, grades=(2.0, 0.0, 1.0))
    found = rank_metrics([np.array([1.0, 3.0, 2.0])], [graded])  # order 1, 2, 0: gains 0, 1, 3
    assert value(found, "ndcg") == pytest.approx((1 / math.log2(3) + 3 / 2) / (3 + 1 / math.log2(3)))
    groups, scores = random_grades()
    expected = [
        ndcg_score([np.exp2(g.grades) - 1], [s]) for g, s in zip(groups, scores, strict=True) if len(set(g.grades)) > 1
    ]
    assert value(rank_metrics(scores, groups), "ndcg") == pytest.approx(np.mean(expected))


def test_gaps_by_hand():
    made = clicked([0, 20, 21, 24, 26, 60], [1000] * 6)
    gaps = {(2, 1): 0.05, (3, 1): 0.2, (4, 3): 1 / 12, (4, 1): 0.3, (5, 4): 60 / 26 - 1, (1, 0): math.inf}
    assert rate_gap(made, np.array(list(gaps))) == pytest.approx(list(gaps.values()))
    # The order 5 4 3 2 1 0 is right, but for 2 above 3 (a gap of 1/7) and 1 tied with 2 (a gap of 1/20).
    found = rank_metrics([np.array([0.0, 3.0, 3.0, 2.0, 4.0, 5.0])], [made])
    under_10, from_10, from_25, from_50 = (value(found, f"pair_accuracy_gap_{name}") for name in GAPS)
    assert under_10 == pytest.approx(1.5 / 2)  # (2, 1), (4, 3)
    assert from_10 == pytest.approx(1 / 3)  # (3, 1), (3, 2), (4, 2): 2 and 1 stand above 3
    assert (from_25, from_50) == (1, 1)  # (4, 1); five over 0 and four under 5


@pytest.mark.parametrize(
    ("clicks", "name"),
    [
        ((1000, 1099), "under_10"),
        ((1000, 1101), "10_to_25"),
        ((1000, 1249), "10_to_25"),
        ((1000, 1250), "25_to_50"),
        ((1000, 1499), "25_to_50"),
        ((1000, 1500), "over_50"),
        ((0, 1), "over_50"),
    ],
)
def test_a_pair_is_in_one_bin(clicks, name):
    found = rank_metrics([np.arange(2.0)], [clicked(clicks, [2**16] * 2)])
    binned = {gap: value(found, f"pair_accuracy_gap_{gap}") for gap in GAPS}
    assert binned.pop(name) == 1
    assert np.isnan(list(binned.values())).all()


def test_kendall_tau_by_scipy_and_ties_by_mean_over_their_breaking():
    groups, _ = random_clicks(1)
    groups = [g for g in groups if len(set(g.clicks)) == len(g.clicks)]
    rng = np.random.default_rng(0)
    scores = [rng.permutation(len(g.clicks)).astype(float) for g in groups]
    expected = np.mean([kendalltau(s, g.clicks).statistic for s, g in zip(scores, groups, strict=True)])
    assert value(rank_metrics(scores, groups), "kendall_tau") == pytest.approx(expected)
    graded = group(n=3, grades=(2.0, 0.0, 1.0))
    tied, *broken = (
        value(rank_metrics([np.array(s)], [graded]), "kendall_tau") for s in ([1, 1, 0], [2, 1, 0], [1, 2, 0])
    )
    assert tied == pytest.approx(np.mean(broken)) == 0


def test_ndcg_of_clicks_by_scikit_learn():
    groups, scores = random_clicks(2)
    expected = [ndcg_score([g.clicks], [s]) for g, s in zip(groups, scores, strict=True) if len(set(g.clicks)) > 1]
    assert value(rank_metrics(scores, groups), "ndcg") == pytest.approx(np.mean(expected))


def test_regret_from_the_posterior():
    groups, _ = simulated_clicks(0, 30, shown=800)
    drawn = [expit(x) for x in posterior_log_odds(groups, fit_click_model(groups))]
    best = sum(rates.max(axis=1).mean() for rates in drawn)
    for pick in (0, 3):
        found = rank_metrics([np.eye(4)[pick]] * 30, groups)
        assert value(found, "regret") == pytest.approx(1 - sum(r[:, pick].mean() for r in drawn) / best, abs=2e-3)
    by_clicks = rank_metrics([np.array(g.clicks, dtype=float) for g in groups], groups)
    assert 0 < value(by_clicks, "regret") < value(found, "regret")


@pytest.mark.slow
@pytest.mark.parametrize(("shown", "between"), [(400, (0.70, 0.75)), (3000, (0.85, 0.89)), (300_000, (0.97, 1.0))])
def test_ceiling_by_simulation(shown, between):
    """It is what the true log-odds score, which the metric never saw; so the truth has gone all of the way."""
    runs = []
    for seed in range(4):
        groups, truth = simulated_clicks(seed, 300, shown=shown)
        found = rank_metrics(truth, groups)
        runs.append([value(found, n) for n in ("pair_accuracy", "ceiling", "significant_pair_accuracy", "way")])
        assert found["ceiling"].low < value(found, "ceiling") < found["ceiling"].high
        assert value(found, "significant_ceiling") >= value(found, "ceiling")
        assert value(found, "significant_ceiling") == pytest.approx(runs[-1][2], abs=0.05)
    accuracy, ceiling, _, way = np.mean(runs, axis=0)
    assert between[0] < accuracy < between[1]
    assert ceiling == pytest.approx(accuracy, abs=0.015)  # the difference has a standard deviation of 0.005 at most
    assert way == pytest.approx(1, abs=0.06)


def test_the_way_is_a_share_of_the_ceiling():
    groups, scores = random_clicks()
    found = rank_metrics(scores, groups)
    way = (value(found, "pair_accuracy") - 0.5) / (value(found, "ceiling") - 0.5)
    assert value(found, "way") == pytest.approx(way)


def test_true_rates_of_equal_counts_are_equal():
    groups, _ = simulated_clicks(0, 20, shown=800)
    twins = clicked([12, 9, 12, 9], [800] * 4)
    truth = true_rates((*groups, twins))[-1]
    assert (truth.rate[0], truth.rate[1]) == (truth.rate[2], truth.rate[3])
    assert truth.rate[0] > truth.rate[1]
    np.testing.assert_allclose(truth.above + truth.above.T + np.eye(4), 1)
    assert true_rates((*groups, group("bare", 2)))[-1] is None


@pytest.mark.slow
def test_constant_scorer_gets_chance():
    groups, scores = random_clicks()
    found = rank_metrics([np.zeros_like(s) for s in scores], groups)
    for name in ("pair_accuracy", "significant_pair_accuracy", *(f"pair_accuracy_gap_{name}" for name in GAPS)):
        assert found[name] == Interval(0.5, 0.5, 0.5)
    for name in ("kendall_tau", "way"):
        assert found[name] == Interval(0, 0, 0)
    at_random = [rank_metrics([np.eye(len(s))[i % len(s)] for s in scores], groups) for i in range(60)]  # 60 = 3·4·5
    assert value(found, "regret") == pytest.approx(np.mean([value(m, "regret") for m in at_random]))
    assert value(found, "ctr_lift") == pytest.approx(0, abs=1e-12)
    bests = [
        np.mean(np.array(g.clicks) == max(g.clicks)) for g in groups if len(set(g.clicks)) > 1
    ]  # equal impressions throughout
    assert value(found, "top1") == pytest.approx(np.mean(bests))


def test_constant_scorer_gets_the_mean_ndcg_of_all_orders():
    graded = group(n=3, grades=(2.0, 0.0, 1.0))
    orders = [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]
    each = [value(rank_metrics([np.array(order, dtype=float)], [graded]), "ndcg") for order in orders]
    assert value(rank_metrics([np.zeros(3)], [graded]), "ndcg") == pytest.approx(np.mean(each))


@pytest.mark.parametrize("made", [random_clicks, random_grades])
def test_order_of_arms_and_monotone_scores_do_not_matter(made):
    groups, scores = made()
    rng = np.random.default_rng(5)
    shuffled, moved = [], []
    for g, s in zip(groups, scores, strict=True):
        order = rng.permutation(len(s))
        fields = {f: getattr(g, f) for f in ("texts", "grades", "clicks", "impressions")}
        shuffled.append(dataclasses.replace(g, **{f: v and tuple(v[i] for i in order) for f, v in fields.items()}))
        moved.append(7 + np.exp(s[order]))
    expected, found = rank_metrics(scores, groups), rank_metrics(moved, shuffled)
    assert expected.keys() == found.keys()
    for name, metric in expected.items():
        if isinstance(metric, Interval):
            assert dataclasses.astuple(found[name]) == pytest.approx(dataclasses.astuple(metric))
        else:
            assert found[name] == metric


def test_reversed_scores_mirror_the_accuracy():
    groups, scores = random_clicks()
    there, back = (value(rank_metrics(s, groups), "pair_accuracy") for s in (scores, [-s for s in scores]))
    assert there + back == pytest.approx(1)
    assert there != 0.5


def test_knowing_the_answer_is_perfect():
    groups, _ = random_clicks()
    found = rank_metrics([np.array(g.clicks, dtype=float) for g in groups], groups)
    assert all(
        value(found, name) == 1 for name in ("pair_accuracy", "significant_pair_accuracy", "top1", "kendall_tau")
    )
    assert value(found, "ndcg") == pytest.approx(1)


def test_groups_without_evidence_change_nothing_but_their_count():
    groups, scores = random_clicks()
    silent = [clicked([3, 3], [100, 100], "tied"), clicked([0, 0], [100, 100], "none"), group("bare", 2)]
    found, expected = rank_metrics([*scores, *[np.arange(2.0)] * 3], [*groups, *silent]), rank_metrics(scores, groups)
    assert found["groups"] == expected["groups"] + 3
    assert found["pairs"] == expected["pairs"]
    for name in ("pair_accuracy", "significant_pair_accuracy", "top1", "kendall_tau", "ndcg"):
        assert value(found, name) == pytest.approx(value(expected, name))


def test_without_any_pair_the_accuracy_is_nan():
    found = rank_metrics([np.arange(2.0)], [clicked([0, 0], [100, 100])])
    assert all(np.isnan(metric.value) for metric in found.values() if isinstance(metric, Interval))
    assert (found["pairs"], found["significant_pairs"]) == (0, 0)


def test_interval_is_over_groups_not_pairs():
    """All pairs of a group are right or wrong together: a bootstrap over pairs would be far too sure."""
    rng = np.random.default_rng(0)
    groups = [group(f"g{i}", 10, grades=tuple(range(10))) for i in range(100)]
    scores = [np.arange(10.0) * rng.choice([-1, 1]) for _ in groups]
    interval = rank_metrics(scores, groups)["pair_accuracy"]
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * 0.5 / math.sqrt(100), rel=0.15)


@pytest.mark.slow
def test_interval_covers_the_truth_at_its_nominal_rate():
    """Groups of random size whose rankers are right on a share of pairs drawn for each group; the truth is 0.6."""
    rng, runs, covered = np.random.default_rng(1), 120, 0
    for run in range(runs):
        groups, scores = [], []
        for i in range(60):
            n = int(rng.integers(2, 6))
            groups.append(group(f"g{i}", n, grades=tuple(float(k) for k in range(n))))
            scores.append(np.arange(n) * (1.0 if rng.random() < 0.6 else -1.0))
        interval = rank_metrics(scores, groups, seed=run)["pair_accuracy"]
        covered += interval.low <= 0.6 <= interval.high
    assert 0.88 <= covered / runs <= 0.99


@pytest.mark.parametrize("clicks", [[1, 0], [0, 7, 0], [100, 99], [100, 100]])
def test_one_group_does_not_crash(clicks):
    found = rank_metrics([np.arange(len(clicks), dtype=float)], [clicked(clicks, [100] * len(clicks))])
    assert found["groups"] == 1
    assert np.isnan(value(found, "ceiling")) == (len(set(clicks)) == 1)


def test_groups_of_one_id_are_one_unit():
    """Copies under one id are no more evidence than one of them; under ids of their own, or none, they would be."""
    groups, scores = random_clicks()
    one, same = (rank_metrics(scores * k, groups * k) for k in (1, 4))
    nameless = rank_metrics(scores * 4, [dataclasses.replace(g, group="") for g in groups * 4])
    for name in ("pair_accuracy", "top1", "ctr_lift"):
        assert dataclasses.astuple(same[name]) == pytest.approx(dataclasses.astuple(one[name]))
        width, narrow = (m[name].high - m[name].low for m in (one, nameless))
        assert narrow == pytest.approx(width / 2, rel=0.2)
    assert same["groups"] == 4 * one["groups"]


def test_paired_difference():
    groups, a = random_clicks(3, 150)
    rng = np.random.default_rng(0)
    b = [np.where(rng.random(len(s)) < 0.15, rng.integers(4, size=len(s)), s) for s in a]
    found, back = ranking_differences(a, b, groups), ranking_differences(b, a, groups)
    of_a, of_b = rank_metrics(a, groups), rank_metrics(b, groups)
    assert found.keys() == {n for n, m in of_a.items() if isinstance(m, Interval)} - {"ceiling", "significant_ceiling"}
    for name, difference in found.items():
        assert difference.value == pytest.approx(value(of_a, name) - value(of_b, name))
        assert (back[name].low, back[name].high) == pytest.approx((-difference.high, -difference.low))
    # Nearly the same scores: what one draw of groups does to both of them cancels.
    assert found["pair_accuracy"].high - found["pair_accuracy"].low < 0.7 * (
        of_a["pair_accuracy"].high - of_a["pair_accuracy"].low
    )
    assert all(dataclasses.astuple(d) == (0, 0, 0) for d in ranking_differences(a, a, groups).values())
    with pytest.raises(ValueError, match="scores of 149 groups for 150 groups"):
        ranking_differences(a, b[1:], groups)


def test_gains_are_proportional_to_two_to_the_grade_and_never_overflow():
    gains = grade_gains((0.0, 1.0, 3.0))
    np.testing.assert_allclose(gains / gains[1], [0, 1, 7])
    np.testing.assert_allclose(grade_gains((-2.0, 1.0)), grade_gains((0.0, 3.0)))
    assert grade_gains((0.0, 5000.0)).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([], "scores of 0 groups for 1 groups"),
        ([np.zeros(2)], r"scores \(2,\) for the 3 titles of group 'g'"),
        ([np.array([0, np.nan, 1])], "a score of group 'g' is not finite"),
    ],
)
def test_scores_must_fit(scores, message):
    with pytest.raises(ValueError, match=message):
        rank_metrics(scores, [group()])


def test_no_group_is_explained():
    with pytest.raises(UserError, match="no test examples"):
        rank_metrics([], [])
