"""The model of clicks within a group: its integrals against brute force, what it recovers, and what follows from it."""

import math

import numpy as np
import pytest
from scipy.special import expit, logsumexp, xlog1py, xlogy
from scipy.stats import kstest, norm

from loracle.evaluation.click_model import (
    LARGEST,
    SMALLEST,
    ClickModel,
    expected_lift,
    fit_click_model,
    posterior_log_odds,
    win_probability,
)
from loracle.evaluation.marginal_likelihood import DRAW_LEVELS, DRAW_Z, FIT_LEVELS, FIT_Z, blocks, grid, log_marginal
from loracle.examples import RankGroup


def clicked(clicks, impressions, name="g"):
    texts = tuple(f"{name}{i}" for i in range(len(clicks)))
    counts = {"clicks": tuple(map(int, clicks)), "impressions": tuple(map(int, impressions))}
    return RankGroup(group=name, texts=texts, rows=tuple(range(1, len(texts) + 1)), **counts)


def simulated(seed, groups, *, shown, level, slope=0.0, spread=0.3, arms=4):
    """Groups, their scores, and their true log-odds; levels differ between groups by 0.7."""
    rng = np.random.default_rng(seed)
    made, scores, truth = [], [], []
    for g in range(groups):
        s = rng.normal(size=arms)
        log_odds = level + 0.7 * rng.normal() + slope * (s - s.mean()) + spread * rng.normal(size=arms)
        impressions = rng.poisson(shown, arms)
        made.append(clicked(rng.binomial(impressions, expit(log_odds)), impressions, f"g{g}"))
        scores.append(s)
        truth.append(log_odds)
    return made, scores, truth


def fitted(slope=0.0, spread=0.3, **others):
    known = {"slope_se": 0.0, "spread_se": 0.0, "log_likelihood": 0.0} | others
    return ClickModel(slope=slope, spread=spread, **known)


# --- integrals --------------------------------------------------------------------------------------------------------

GROUPS = {
    "one click": clicked([1, 0, 0], [100, 120, 80]),
    "few": clicked([1, 3, 0, 2], [100, 150, 90, 110]),
    "usual": clicked([40, 60, 35], [3000, 3100, 2900]),
    "many": clicked([21_000, 26_000], [900_000, 1_000_000]),
    "high rates": clicked([450, 520, 610], [1000, 1000, 1000]),
    "all but two": clicked([49, 49], [50, 50]),
    "very different": clicked([0, 300], [4000, 4000]),
    "one never shown": clicked([3, 5, 0], [200, 200, 0]),
}
SCORES = [np.array([0.3, -0.2, 0.7, 1.1])]


def by_brute_force(group, slope, spread, score):
    """Log marginal likelihood over that of each arm at its own rate, on dense grids of μ and z around all the mass."""
    c, n = np.array(group.clicks, float)[:, None, None], np.array(group.impressions, float)[:, None, None]
    score = score - score.mean()
    pooled = (c.sum() + 0.5) / (n.sum() + 1)
    width = 1 / np.sqrt((n * pooled * (1 - pooled)).sum()) + spread
    mu = np.log(pooled / (1 - pooled)) + np.linspace(-15, 15, 201) * width
    z = np.linspace(-16, 16, 4001)
    theta = mu[:, None] + (slope * score)[:, None, None] + spread * z
    log_p = c * theta - n * np.logaddexp(0, theta) + norm.logpdf(z)
    arms = logsumexp(log_p, axis=2) + np.log(z[1] - z[0])
    shown = np.maximum(n, 1)
    own = (xlogy(c, c / shown) + xlog1py(n - c, -c / shown)).sum()
    return logsumexp(arms.sum(axis=0)) + np.log(mu[1] - mu[0]) - own


def integrated(group, slope, spread, score):
    (arms,) = blocks([group], [score], 1)
    return log_marginal(arms, slope, spread)


@pytest.mark.parametrize("spread", [0.05, 0.3, 1.2])
@pytest.mark.parametrize("name", GROUPS)
def test_marginal_likelihood_by_brute_force(name, spread):
    group = GROUPS[name]
    score = SCORES[0][: len(group.texts)]
    expected = by_brute_force(group, 0.4, spread, score)
    assert integrated(group, 0.4, spread, score)[0] == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize("name", GROUPS)
def test_gradient_by_finite_differences(name):
    group, slope, spread, step = GROUPS[name], 0.4, 0.35, 1e-4
    score = SCORES[0][: len(group.texts)]

    def value(b, t):
        return integrated(group, b, t, score)[0]

    by_slope = (value(slope + step, spread) - value(slope - step, spread)) / (2 * step)
    by_spread = (value(slope, spread + step) - value(slope, spread - step)) / (2 * step)
    assert integrated(group, slope, spread, score)[1:3] == pytest.approx([by_slope, by_spread], rel=2e-3, abs=2e-3)


def test_without_spread_and_with_rare_clicks_it_is_the_conditional_click_likelihood():
    group, score = clicked([7, 4, 9], [90_000, 80_000, 99_000]), np.array([0.0, 0.5, -0.3])

    def conditional(slope):
        logits = np.log(group.impressions) + slope * score
        return np.array(group.clicks) @ (logits - logsumexp(logits))

    here, there = (integrated(group, slope, SMALLEST, score)[0] for slope in (0.2, 0.9))
    assert there - here == pytest.approx(conditional(0.9) - conditional(0.2), abs=5e-3)
    assert abs(there - here) > 0.5


# --- fitting ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("groups", "shown", "level", "spread"),
    [(500, 100, -4.6, 0.4), (200, 3000, -4.2, 0.3), (100, 100_000, -1.5, 0.25)],
    ids=["a click an arm", "usual", "20,000 clicks an arm at 18 %"],
)
def test_recovers_slope_and_spread(groups, shown, level, spread):
    """Errors in units of the standard errors it states: none far out, and about 1 in size over eight fits."""
    off = []
    for seed in range(10, 18):
        made, scores, _ = simulated(seed, groups, shown=shown, level=level, slope=0.25, spread=spread)
        found = fit_click_model(made, scores)
        off.append([(found.slope - 0.25) / found.slope_se, (found.spread - spread) / found.spread_se])
    off = np.array(off)
    assert np.abs(off).max() < 3.5
    assert np.abs(off.mean(axis=0)).max() < 3 / math.sqrt(8)
    squares = (off**2).sum(axis=0)  # chi-squared with 8 degrees of freedom: between these bounds but once in 400
    assert squares.min() > 1.1
    assert squares.max() < 24


def test_with_many_clicks_it_is_least_squares():
    """Noise gone, β and τ are the slope and the residual of a regression within groups, with its standard errors."""
    made, scores, truth = simulated(0, 60, shown=10_000_000, level=-1.5, slope=0.25, spread=0.25)
    s, t = (np.concatenate([x - x.mean() for x in each]) for each in (scores, truth))
    slope, freedom = s @ t / (s @ s), 60 * 3
    spread = np.sqrt(((t - slope * s) ** 2).sum() / freedom)
    found = fit_click_model(made, scores)
    assert (found.slope, found.spread) == pytest.approx((slope, spread), rel=5e-3)
    assert found.slope_se == pytest.approx(spread / np.sqrt(s @ s), rel=5e-3)
    assert found.spread_se == pytest.approx(spread / np.sqrt(2 * freedom), rel=1e-2)


def test_without_scores_the_spread_is_all_that_titles_differ_by():
    made, scores, _ = simulated(0, 400, shown=5000, level=-3.0, slope=0.3, spread=0.2)
    alone, explained = fit_click_model(made), fit_click_model(made, scores)
    assert (alone.slope, math.isnan(alone.slope_se)) == (0.0, True)
    assert alone.spread == pytest.approx(math.hypot(0.3, 0.2), rel=0.1)
    assert explained.spread == pytest.approx(0.2, rel=0.15)
    assert explained.log_likelihood > alone.log_likelihood + 50
    assert alone.level == pytest.approx(-3.0, abs=0.15)


def test_titles_that_do_not_differ():
    made, _, _ = simulated(1, 200, shown=2000, level=-3.5, spread=0.0)
    found = fit_click_model(made)
    assert SMALLEST <= found.spread < 0.06
    assert 0 < found.spread_se < 0.1


def test_scores_that_say_nothing():
    made, scores, _ = simulated(2, 60, shown=2000, level=-3.5)
    alone, constant = fit_click_model(made), fit_click_model(made, [np.full(4, 1e6 + i / 3) for i in range(60)])
    assert repr(constant) == repr(alone)  # not ==, as the slope's standard error is NaN
    noise = fit_click_model(made, scores)
    assert abs(noise.slope) < 3.5 * noise.slope_se


def test_invariance_of_the_fit():
    made, scores, _ = simulated(3, 60, shown=2000, level=-3.5, slope=0.2)
    rng, expected = np.random.default_rng(0), fit_click_model(made, scores)
    orders = [rng.permutation(4) for _ in made]
    turned = [clicked(np.take(g.clicks, o), np.take(g.impressions, o)) for g, o in zip(made, orders, strict=True)]
    found = fit_click_model(turned, [5 + 10 * s[o] for s, o in zip(scores, orders, strict=True)])
    fields = ("spread", "spread_se", "log_likelihood", "level")
    assert [getattr(found, f) for f in fields] == pytest.approx([getattr(expected, f) for f in fields], rel=1e-4)
    assert [10 * found.slope, 10 * found.slope_se] == pytest.approx([expected.slope, expected.slope_se], rel=1e-3)


def test_blocks_change_nothing():
    made, scores, _ = simulated(4, 30, shown=2000, level=-3.5)
    whole, cut = list(blocks(made, scores, 1)), list(blocks(made, scores, 1 << 16))
    assert (len(whole), len(cut)) == (1, 30)
    assert sum(log_marginal(a, 0.1, 0.3) for a in cut) == pytest.approx(log_marginal(whole[0], 0.1, 0.3))


def test_groups_that_tell_nothing_are_left_out():
    made, scores, _ = simulated(5, 20, shown=2000, level=-3.5)
    silent = [clicked([0, 0], [50, 90]), clicked([9, 9], [9, 9]), clicked([0, 0], [0, 0])]
    assert fit_click_model([*made, *silent], [*scores, *[np.arange(2.0)] * 3]) == fit_click_model(made, scores)
    for nothing in (fit_click_model(silent), fit_click_model([])):
        assert (nothing.groups, nothing.slope) == (0, 0.0)
        assert math.isnan(nothing.spread)


@pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS)
def test_one_group_is_enough_not_to_crash(group):
    found = fit_click_model([group], [SCORES[0][: len(group.texts)]])
    assert SMALLEST <= found.spread <= LARGEST
    assert np.isfinite([found.slope, found.log_likelihood, found.level]).all()
    assert np.isfinite(posterior_log_odds([group], found)[0]).all()


# --- draws ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GROUPS)
def test_draws_by_quadrature(name):
    """Mean and standard deviation of log-odds over draws are those that the likelihood's own rule gives."""
    group = GROUPS[name]
    drawn = posterior_log_odds([group], fitted(spread=0.3), draws=4000)[0]
    (arms,) = blocks([group], None, 1)
    level, log_level, z, log_z = grid(arms, 0.0, 0.3, FIT_LEVELS, FIT_Z)
    of_clicks = logsumexp(log_z, axis=2)
    joint = log_level + of_clicks.sum(axis=0)
    mass = np.exp(joint - logsumexp(joint))[..., None] * np.exp(log_z - of_clicks[..., None])
    log_odds = level[0][:, None] + 0.3 * z
    mean = (mass * log_odds).sum(axis=(1, 2))
    deviation = np.sqrt((mass * (log_odds - mean[:, None, None]) ** 2).sum(axis=(1, 2)))
    assert drawn.shape == (4000, len(group.texts))
    assert np.abs(drawn.mean(axis=0) - mean).max() < 0.05 * deviation.min()
    assert drawn.std(axis=0) == pytest.approx(deviation, rel=0.05)


@pytest.mark.parametrize(("shown", "spread"), [(100, 0.5), (20_000, 0.3)])
def test_draws_are_calibrated(shown, spread):
    """The true difference of two titles falls anywhere among its draws with equal chance (Talts et al. 2018)."""
    made, scores, truth = simulated(6, 400, shown=shown, level=-4.0, slope=0.3, spread=spread)
    drawn = posterior_log_odds(made, fitted(slope=0.3, spread=spread), scores)
    ranks = [np.mean(d[:, 0] - d[:, 1] < t[0] - t[1]) for d, t in zip(drawn, truth, strict=True)]
    assert kstest(ranks, "uniform").pvalue > 0.005


def test_draws_in_any_order_of_arms():
    made, scores, _ = simulated(7, 5, shown=500, level=-4.0)
    orders = [np.random.default_rng(g).permutation(4) for g in range(5)]
    turned = [clicked(np.take(g.clicks, o), np.take(g.impressions, o)) for g, o in zip(made, orders, strict=True)]
    model = fitted(slope=0.3)
    here = posterior_log_odds(made, model, scores, seed=1)
    there = posterior_log_odds(turned, model, [s[o] for s, o in zip(scores, orders, strict=True)], seed=1)
    for a, b, o in zip(here, there, orders, strict=True):
        np.testing.assert_allclose(a[:, o], b, atol=1e-9)
    assert not np.array_equal(here[0], posterior_log_odds(made, model, scores, seed=2)[0])


def test_draws_where_no_click_tells_keep_the_spread():
    groups = [clicked([0, 0], [100, 100]), clicked([70, 70], [70, 70]), clicked([0, 0], [0, 0])]
    for drawn in posterior_log_odds(groups, fitted(spread=0.3), draws=2000):
        difference = drawn[:, 0] - drawn[:, 1]
        assert np.isfinite(drawn).all()
        assert abs(difference.mean()) < 0.05
        assert difference.std() == pytest.approx(0.3 * math.sqrt(2), rel=0.06)


# --- use --------------------------------------------------------------------------------------------------------------


def test_win_probability_by_hand():
    found = win_probability(np.array([1.0, 0.0, 0.0]), fitted(slope=0.5, spread=0.25))
    assert found[0, 1] == pytest.approx(0.9213504)  # Φ(0.5 / (√2 · 0.25)) = Φ(√2)
    np.testing.assert_allclose(found + found.T, 1)
    np.testing.assert_array_equal(np.diag(found), 0.5)
    assert found[1, 2] == 0.5
    assert win_probability(np.array([1.0, 0.0]), fitted(slope=0.5, spread=0.0)).tolist() == [[0.5, 1], [0, 0.5]]


def test_lift_by_hand():
    scores = np.array([2.0, 1.0, 0.0])
    rates = np.exp([0.2, 0.0, -0.2])
    for found in expected_lift(scores, fitted(slope=0.2, spread=0.0), draws=100):
        np.testing.assert_allclose(found, rates / rates.mean() - 1)
    rates = expit(0.3 + np.array([0.2, 0.0, -0.2]))  # where clicks are common, odds overstate
    found, _, _ = expected_lift(scores, fitted(slope=0.2, spread=0.0, level=0.3), draws=100)
    np.testing.assert_allclose(found, rates / rates.mean() - 1)


def test_lift_interval_holds_spread_and_standard_errors():
    scores = np.array([1.0, -1.0])
    _, low, high = expected_lift(scores, fitted(slope=0.0, spread=0.3))
    lift = np.tanh(1.959964 * 0.3 / math.sqrt(2))  # of two titles it is tanh of half their difference
    assert [low[0], high[0]] == pytest.approx([-lift, lift], abs=0.005)
    _, low, high = expected_lift(scores, fitted(slope=0.1, slope_se=0.05, spread=0.0))
    assert [low[0], high[0]] == pytest.approx(np.tanh([0.1 - 1.959964 * 0.05, 0.1 + 1.959964 * 0.05]), abs=0.005)
    sure, unsure = (expected_lift(scores, fitted(spread=0.3, spread_se=se))[2][0] for se in (0.0, 0.1))
    assert unsure > sure + 0.01


@pytest.mark.slow
def test_lift_is_stable_over_seeds():
    scores = np.random.default_rng(0).normal(size=10)
    runs = np.array([expected_lift(scores, fitted(slope=0.3, slope_se=0.05, spread=0.3), seed=s) for s in range(6)])
    assert runs.std(axis=0).max() < 0.005
    assert np.array_equal(runs[0], expected_lift(scores, fitted(slope=0.3, slope_se=0.05, spread=0.3), seed=0))


def test_one_title_has_no_lift():
    assert [x.tolist() for x in expected_lift(np.array([3.0]), fitted(slope=1.0))] == [[0.0]] * 3
    assert win_probability(np.array([3.0]), fitted()).tolist() == [[0.5]]


@pytest.mark.slow
@pytest.mark.parametrize(("shown", "level"), [(3000, -4.2), (4000, -1.0)], ids=["1.5 %", "27 %"])
def test_coverage_and_calibration(shown, level):
    """Fitted on half of the groups, the model is right about the true rates of the other half."""
    covered, claims, came = [], [], []
    for seed in range(2):
        made, scores, truth = simulated(seed, 600, shown=shown, level=level, slope=0.25, spread=0.25)
        model = fit_click_model(made[:300], scores[:300])
        for s, log_odds in zip(scores[300:], truth[300:], strict=True):
            rates = expit(log_odds)
            _, low, high = expected_lift(s, model, draws=2000)
            covered.append((low <= rates / rates.mean() - 1) & (rates / rates.mean() - 1 <= high))
            over = np.triu_indices(len(s), 1)
            claims.append(win_probability(s, model)[over])
            came.append((log_odds[:, None] > log_odds)[over])
    assert np.mean(covered) == pytest.approx(0.95, abs=0.025)
    claims, came = np.concatenate(claims), np.concatenate(came)
    bins = np.digitize(claims, [0.2, 0.35, 0.5, 0.65, 0.8])
    for b in range(6):
        assert came[bins == b].mean() == pytest.approx(claims[bins == b].mean(), abs=0.06)
    assert claims.max() > 0.9  # so that the bins are about something


def test_drawing_rules_are_those_that_fit_but_finer():
    assert DRAW_LEVELS.size > FIT_LEVELS.size
    for rule, of in ((FIT_LEVELS, 1), (DRAW_LEVELS, 1), (FIT_Z, 1), (DRAW_Z, 1)):
        assert np.exp(rule.log_weight + norm.logpdf(rule.node)).sum() == pytest.approx(of, abs=1e-6)
