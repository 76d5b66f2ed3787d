"""How many tests and impressions a question about titles needs: simulated click logs, no model.

The process: a title's true log-odds of a click are ``logit(rate) + spread · z``, z standard normal; it is shown ``shown``
times and clicked binomially. From it follow what no ranker can beat (the order that noise leaves right), how often a test
names its best title, and which lift of a picker would stand out. With a log of one's own, each test is one of its groups
again: as many titles, shown as often, with log-odds from their posterior. A learning curve says whether more would help.

Shapes: G tests, n titles each; D groups of a log, drawn from again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import expit, logit
from scipy.stats import norm

from loracle.config import PlanConfig
from loracle.data.splits import split_groups
from loracle.errors import UserError
from loracle.evaluation.intervals import Array, as_json
from loracle.evaluation.pairs import SIGNIFICANT_Z
from loracle.examples import RankGroup
from loracle.reporting import plots
from loracle.tasks import Task

DRAWN = 20_000  # tests drawn for each point of a curve, so that its own noise is below half a percentage point,
PAIRS, FEWEST = 10_000_000, 100  # or, of many titles each, as many as make so many pairs, but not fewer than that
TIMES = (0.25, 0.5, 1.0, 2.0, 4.0)  # of the planned size
MOST = 10**12 - 1  # tests, and impressions a title, that PlanConfig takes
SHARES = (0.25, 0.5, 1.0)  # of the user's own log, for the learning curve
POWER, LEVEL = 0.8, 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """What a log of this size can tell. Shares between 0 and 1; lifts relative to a test's mean title, 0.1 is +10 %.

    None where nothing can be estimated: no two titles' observed rates differ, or no accuracy up to 100 % would stand out.
    """

    tests: int
    arms: int
    shown: float
    ceiling: float | None  # of pairs whose observed rates differ, those in true order: no ranker can score higher
    significant: float | None  # of the same pairs, those that differ at p < .05
    best_named: float  # tests whose highest observed rate is the truly best title's; of equals, by chance
    highest_lift: float | None  # what always picking the truly best title would gain
    detectable_lift: float | None  # smallest lift of a picker that stands out with 80 % power
    detectable_accuracy: float | None  # smallest pair accuracy that does


@dataclass(frozen=True, slots=True)
class Own:
    """Groups of a log of one's own: impressions and true log-odds of each one's titles, ``[n]`` each."""

    shown: list[Array]
    truth: list[Array]


def plan(config: PlanConfig, own: Own | None = None) -> dict[str, list[Point]]:
    """Curves over impressions a title and over tests, at ``TIMES`` the planned numbers."""
    return {
        "impressions": [simulate(config, own, times=t) for t in TIMES],
        "tests": [simulate(replace(config, tests=min(max(2, round(config.tests * t)), MOST)), own) for t in TIMES],
    }


def _scaled(shown: Any, times: float) -> Any:
    return np.clip(np.rint(np.asarray(shown, dtype=np.float64) * times), 1, MOST)


def draw(
    config: PlanConfig, tests: int, seed: int, own: Own | None = None, *, times: float = 1.0
) -> Iterator[tuple[Array, Array, Array]]:
    """True log-odds, clicks and impressions of ``tests`` tests, ``[G, n]`` each, for each number of titles n.

    Impressions are ``times`` those of ``config``, or of the groups of ``own``, which are drawn with replacement.
    """
    of_size = defaultdict(list)
    for d, titles in enumerate(own.truth if own else ()):
        of_size[len(titles)].append(d)
    share = np.array([len(of_n) for of_n in of_size.values()] or [1])
    counts = np.random.Generator(np.random.PCG64(seed)).multinomial(tests, share / share.sum())
    for n, of_n, count in zip(of_size or [config.arms], of_size.values() or [[]], counts, strict=True):
        rng = np.random.Generator(np.random.PCG64([seed, n]))
        if own:
            which = rng.choice(of_n, count)
            truth, shown = (np.array([values[d] for d in which]).reshape(count, n) for values in (own.truth, own.shown))
        else:
            truth = logit(config.rate) + config.spread * rng.standard_normal((count, n))
            shown = np.full_like(truth, config.impressions_per_title)
        shown = _scaled(shown, times)
        yield truth, rng.binomial(shown.astype(np.int64), expit(truth)).astype(np.float64), shown


def simulate(config: PlanConfig, own: Own | None = None, *, times: float = 1.0) -> Point:
    """One point: drawn tests for what a single test tells, scaled to ``config.tests`` for what all of them do."""
    arms = np.array([len(titles) for titles in own.truth] if own else [config.arms], dtype=np.float64)
    tests = min(DRAWN, max(FEWEST, int(PAIRS / (arms * (arms - 1) / 2).mean())))
    random = np.random.Generator(np.random.PCG64([config.seed, 0, 1]))
    counts = [
        _count_pairs(*drawn, random.random(drawn[0].shape))
        for drawn in draw(config, tests, config.seed, own, times=times)
    ]
    differing, right, significant, wins, named, best, gain, mean, true_mean = np.concatenate(counts, axis=1)
    detectable = norm.ppf(1 - LEVEL / 2) + norm.ppf(POWER)
    lift = _standard_error(gain, mean, config.tests) if differing.any() else None
    accuracy = _standard_error(wins - differing / 2, differing, config.tests) if differing.any() else None
    return Point(
        tests=config.tests,
        arms=config.arms,
        shown=int(_scaled(config.impressions_per_title, times)),
        ceiling=_ratio(right, differing),
        significant=_ratio(significant, differing),
        best_named=float(named.mean()),
        highest_lift=_ratio(best, true_mean),
        detectable_lift=None if lift is None else detectable * lift,
        detectable_accuracy=None if accuracy is None or detectable * accuracy > 0.5 else 0.5 + detectable * accuracy,
    )


def _count_pairs(truth: Array, clicks: Array, shown: Array, random: Array) -> Array:
    """``[9, G]``, of each test: its pairs whose observed rates differ; those in true order, that differ at p < .05, and
    that ``random`` scores have in order; the chance that its best title is named; what the best title gains; what the
    random pick gains, and the mean rate; the true mean.

    A picker that knows nothing has a lift and an accuracy that only chance moves away from 0 and 1/2.
    """
    rates, true_rates = clicks / shown, expit(truth)
    differing, right, significant, wins = np.zeros((4, len(truth)))
    for lag in range(1, truth.shape[1]):  # title i against title i + lag, so that memory grows with titles, not pairs
        gap, true_gap, random_gap = (x[:, lag:] - x[:, :-lag] for x in (rates, truth, random))
        pooled = (clicks[:, lag:] + clicks[:, :-lag]) / (shown[:, lag:] + shown[:, :-lag])
        noise = np.sqrt(pooled * (1 - pooled) * (1 / shown[:, lag:] + 1 / shown[:, :-lag]))
        sign = np.sign(gap)
        differing += (gap != 0).sum(1)
        right += (np.abs(sign) + sign * np.sign(true_gap)).sum(1) / 2  # true ties count half
        significant += (np.abs(gap) > SIGNIFICANT_Z * noise).sum(1)
        wins += (sign * random_gap > 0).sum(1)
    best, named = truth == truth.max(1, keepdims=True), rates == rates.max(1, keepdims=True)
    chance = (best & named).sum(1) / (best.sum(1) * named.sum(1))  # one of the best, and one of the named, are drawn
    pick = random == random.max(1, keepdims=True)
    gain, mean, true_mean = (rates * pick).sum(1) - rates.mean(1), rates.mean(1), true_rates.mean(1)
    highest = np.maximum(true_rates.max(1) - true_mean, 0)
    return np.stack([differing, right, significant, wins, chance, highest, gain, mean, true_mean])


def _ratio(above: Array, below: Array) -> float | None:
    return float(above.sum() / below.sum()) if below.any() else None


def _standard_error(residual: Array, weight: Array, tests: int) -> float:
    """Of a ratio ``Σ residual / Σ weight`` over ``tests`` tests, from many more that were drawn."""
    return float(residual.std() / weight.mean() / np.sqrt(tests))


# --- a log of one's own -----------------------------------------------------------------------------------------------


def of_log(groups: Sequence[RankGroup], config: PlanConfig) -> tuple[PlanConfig, Own]:
    """The process behind a click log, in medians, and its groups, with true log-odds as clicks tell.

    Those are drawn from the posterior that the report's noise ceiling rests on, as often as makes ``DRAWN`` groups.

    Raises:
        UserError: the groups hold no clicks.
    """
    from loracle.evaluation.click_model import fit_click_model, posterior_log_odds

    if not groups or any(g.clicks is None or g.impressions is None for g in groups):
        raise UserError("The data has no clicks and impressions.", "Give a click log to simulate --data.")
    found = fit_click_model(groups)
    if not found.groups:
        raise UserError(
            "In every group of the log, either no impression was clicked or all were.", "Give a larger log."
        )
    rng = np.random.Generator(np.random.PCG64(config.seed))
    some = [groups[i] for i in rng.permutation(len(groups))[:DRAWN]]
    draws = -(-DRAWN // len(some))
    truths = posterior_log_odds(some, found, draws=draws, seed=config.seed)
    shown = [np.maximum(np.array(g.impressions, dtype=np.float64), 1) for g in some]
    truth = [drawn for of_group in truths for drawn in of_group]
    medians = replace(
        config,
        tests=len({g.group for g in groups}),
        arms=int(np.median([len(n) for n in shown])),
        impressions_per_title=int(np.median(np.concatenate(shown))),
        rate=float(np.median([expit(t.mean()) for t in truth])),
        spread=found.spread,
    )
    return medians, Own([n for n in shown for _ in range(draws)], truth)


def plan_from_log(
    groups: Sequence[RankGroup], settings: dict[str, Any]
) -> tuple[PlanConfig, Own | None, list[dict[str, Any]]]:
    """The process behind a click log where ``settings`` say nothing else, its groups, and its learning curve.

    The groups are None where settings ask for other titles than the log's, which its medians then describe.

    Raises:
        UserError: the groups hold no clicks.
    """
    plan, own = of_log(groups, PlanConfig(**settings))
    plan = replace(plan, **settings)
    return plan, None if settings.keys() - {"tests", "seed"} else own, learning_curve(groups, plan.seed)


def learning_curve(groups: Sequence[RankGroup], seed: int) -> list[dict[str, Any]]:
    """Held-out pair accuracy of a TF-IDF ranker that learnt from 25, 50 and 100 % of the log's other groups.

    A fifth is held out, by group and without common titles; the same one for all three, so that they can be compared.
    """
    from loracle.evaluation.linear_models import tfidf_ranker
    from loracle.evaluation.ranking import rank_metrics
    from loracle.training.losses import LOSSES, LossSettings, numpy_objective

    split = split_groups(groups, 0.2, seed)
    loss = LOSSES[Task(name="click_ranking").learning.default_loss(groups)].make(LossSettings())
    objective = numpy_objective(loss)
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(split.train))
    found = []
    for share in SHARES:
        part = [split.train[i] for i in order[: max(1, round(share * len(order)))]]
        metrics = as_json(rank_metrics(tfidf_ranker(part, split.held_out, objective, seed=seed), split.held_out))
        found.append({"share": share, "groups": len(part), "pair_accuracy": metrics["pair_accuracy"]})
    return found


# --- how it looks -----------------------------------------------------------------------------------------------------


def lines(
    config: PlanConfig, curves: dict[str, list[Point]], learnt: Sequence[dict[str, Any]] = (), *, own: bool = False
) -> list[str]:
    """What ``loracle simulate`` prints; ``own``: the numbers of ``config`` are medians of a log."""
    median = "median " if own else ""
    from loracle.reporting.terminal import figure, plain_table

    rows = [
        ["impressions a title", *(f"{p.shown:,.0f}" for p in curves["impressions"])],
        ["noise ceiling, all pairs", *(_percent(p.ceiling) for p in curves["impressions"])],
        ["pairs that differ at p < .05", *(_percent(p.significant) for p in curves["impressions"])],
        ["tests that name their best title", *(_percent(p.best_named) for p in curves["impressions"])],
        ["lift detectable with all tests", *(_percent(p.detectable_lift, "+.1%") for p in curves["impressions"])],
    ]
    more = [
        ["tests", *(f"{p.tests:,}" for p in curves["tests"])],
        ["detectable lift", *(_percent(p.detectable_lift, "+.1%") for p in curves["tests"])],
        ["detectable pair accuracy", *(_percent(p.detectable_accuracy) for p in curves["tests"])],
    ]
    said = [
        f"{config.tests:,} tests of {median}{config.arms} titles, "
        f"{median}{config.impressions_per_title:,} impressions each, {median}click rate {config.rate:.2%}, "
        f"spread of the true log-odds {config.spread:.2f}",
        f"always picking the best title would lift clicks by {_percent(curves['tests'][0].highest_lift, '+.1%')}",
        "",
        plain_table(rows),
        "",
        plain_table(more),
        "",
        "detectable: stands out from 0 (from 50 %) with 80 % power at p < .05; a drawn process, no model",
    ]
    if learnt:
        curve = [[f"{r['share']:.0%} of the log", f"{r['groups']:,} groups", figure(r["pair_accuracy"], "pair_accuracy")]
                 for r in learnt]  # fmt: skip
        said += ["", "learning curve of a TF-IDF ranker, held-out pairs:", plain_table(curve)]
    return said


def _percent(share: float | None, form: str = ".1%") -> str:
    return "–" if share is None else format(share, form)


def _drawn(share: float | None) -> float:
    """In per cent; None leaves a gap."""
    return np.nan if share is None else 100 * share


def plot(curves: dict[str, list[Point]], learnt: Sequence[dict[str, Any]], path: Path) -> None:
    """The curves as a picture (PNG, SVG or PDF by the suffix).

    Raises:
        UserError: matplotlib cannot write such a file.
    """
    figure = plots.new_figure(12 if learnt else 8.5, 3.6)
    axes = figure.subplots(1, 3 if learnt else 2)
    by_shown, by_tests = curves["impressions"], curves["tests"]
    shown = [p.shown for p in by_shown]
    axes[0].plot(shown, [_drawn(p.ceiling) for p in by_shown], "o-", label="noise ceiling, all pairs")
    axes[0].plot(shown, [_drawn(p.best_named) for p in by_shown], "s-", label="best title named")
    axes[0].plot(shown, [_drawn(p.significant) for p in by_shown], "^-", label="pairs with p < .05")
    axes[0].set(xlabel="impressions a title", ylabel="%", xscale="log")
    axes[1].plot(
        [p.tests for p in by_tests], [_drawn(p.detectable_lift) for p in by_tests], "o-", label="detectable lift"
    )
    axes[1].axhline(_drawn(by_tests[0].highest_lift), ls="--", color="grey", label="lift of the best title")
    axes[1].set(xlabel="tests", ylabel="% over the mean title", xscale="log")
    if learnt:
        value, low, high = ([_drawn(r["pair_accuracy"][k]) for r in learnt] for k in ("value", "low", "high"))
        axes[2].fill_between([r["groups"] for r in learnt], low, high, alpha=0.2)
        axes[2].plot([r["groups"] for r in learnt], value, "o-", label="TF-IDF ranker on held-out pairs")
        axes[2].set(xlabel="groups learnt from", ylabel="pair accuracy, %")
    plots.save(figure, path)
