"""How many tests and impressions a question about titles needs: simulated click logs, no model.

The process: a title's true log-odds of a click are ``logit(rate) + spread · z``, z standard normal; it is shown ``shown``
times and clicked binomially. From it follow what no ranker can beat (the order that noise leaves right), how often a test
names its best title, and which lift of a picker would stand out. With a log of one's own, rate, spread, arms and impressions
are its own, and a learning curve says whether more tests would help.

Shapes: G tests, n titles each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import expit, logit
from scipy.stats import norm

from loracle.config import PlanConfig
from loracle.data.examples import RankGroup, Task
from loracle.data.splits import split_groups
from loracle.errors import UserError
from loracle.judge.metrics import Array
from loracle.judge.ranking import SIGNIFICANT_Z

DRAWN = 20_000  # tests drawn for each point of a curve, so that its own noise is below half a percentage point
TIMES = (0.25, 0.5, 1.0, 2.0, 4.0)  # of the planned size
SHARES = (0.25, 0.5, 1.0)  # of the user's own log, for the learning curve
POWER, LEVEL = 0.8, 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """What a log of this size can tell. Shares between 0 and 1; lifts relative to a test's mean title, 0.1 is +10 %."""

    tests: int
    arms: int
    shown: float
    ceiling: float  # pairs whose observed order is the true one: the best that any ranker can score
    significant: float  # pairs that differ at p < .05
    best_named: float  # tests whose highest observed rate is the truly best title's
    highest_lift: float  # what always picking the truly best title would gain
    detectable_lift: float  # smallest lift of a picker that stands out with 80 % power
    detectable_accuracy: float  # smallest pair accuracy that does


def plan(config: PlanConfig) -> dict[str, list[Point]]:
    """Curves over impressions a title and over tests, at ``TIMES`` the planned numbers."""
    return {
        "impressions": [simulate(replace(config, shown=max(1, round(config.shown * t)))) for t in TIMES],
        "tests": [simulate(replace(config, tests=max(2, round(config.tests * t)))) for t in TIMES],
    }


def draw(config: PlanConfig, tests: int, seed: int) -> tuple[Array, Array, Array]:
    """True log-odds, clicks and impressions of ``tests`` tests, ``[G, n]`` each."""
    rng = np.random.Generator(np.random.PCG64(seed))
    truth = logit(config.rate) + config.spread * rng.standard_normal((tests, config.arms))
    shown = np.full_like(truth, config.shown)
    return truth, rng.binomial(config.shown, expit(truth)).astype(np.float64), shown


def simulate(config: PlanConfig) -> Point:
    """One point: drawn tests for what a single test tells, scaled to ``config.tests`` for what all of them do."""
    truth, clicks, shown = draw(config, DRAWN, config.seed)
    rates, true_rates = clicks / shown, expit(truth)
    i, j = np.triu_indices(config.arms, 1)
    gap, true_gap = rates[:, i] - rates[:, j], true_rates[:, i] - true_rates[:, j]
    told = gap != 0
    right = (np.sign(gap) == np.sign(true_gap)) & told
    pooled = (clicks[:, i] + clicks[:, j]) / (shown[:, i] + shown[:, j])
    spread = np.sqrt(pooled * (1 - pooled) * (1 / shown[:, i] + 1 / shown[:, j]))
    best = true_rates == true_rates.max(1, keepdims=True)
    named = rates == rates.max(1, keepdims=True)
    # A picker that knows nothing has a lift and an accuracy that only chance moves away from 0 and 1/2.
    random = np.random.Generator(np.random.PCG64([config.seed, 1])).random(rates.shape)
    pick = random == random.max(1, keepdims=True)
    wins = (np.sign(random[:, i] - random[:, j]) == np.sign(gap)) & told
    detectable = norm.ppf(1 - LEVEL / 2) + norm.ppf(POWER)
    return Point(
        tests=config.tests,
        arms=config.arms,
        shown=config.shown,
        ceiling=float(right.sum() / max(told.sum(), 1)),
        significant=float((np.abs(gap) > SIGNIFICANT_Z * spread).mean()),
        best_named=float(((best & named).sum(1) / named.sum(1)).mean()),
        highest_lift=float(true_rates.max(1).mean() / true_rates.mean() - 1),
        detectable_lift=detectable
        * _standard_error((rates * pick).sum(1) - rates.mean(1), rates.mean(1), config.tests),
        detectable_accuracy=0.5
        + detectable * _standard_error(wins.sum(1) - told.sum(1) / 2, told.sum(1), config.tests),
    )


def _standard_error(residual: Array, weight: Array, tests: int) -> float:
    """Of a ratio ``Σ residual / Σ weight`` over ``tests`` tests, from many more that were drawn."""
    return float(residual.std() / weight.mean() / np.sqrt(tests))


# --- a log of one's own -----------------------------------------------------------------------------------------------


def of_log(groups: Sequence[RankGroup], config: PlanConfig) -> PlanConfig:
    """The process behind a click log: its tests, median arms and impressions, click rate, and fitted spread.

    Raises:
        UserError: the groups hold no clicks.
    """
    from loracle.judge.spread import fit_spread

    if not groups or any(g.clicks is None or g.impressions is None for g in groups):
        raise UserError("a click log for simulate --data", "no clicks and impressions in it", "give such a file")
    clicks, shown = (np.concatenate([getattr(g, name) for g in groups]) for name in ("clicks", "impressions"))
    found = fit_spread(groups)
    if not found.groups:
        raise UserError("groups in which some but not all impressions were clicked", "none", "give a larger log")
    return replace(
        config,
        tests=len({g.group for g in groups}),
        arms=int(np.median([len(g.texts) for g in groups])),
        shown=int(np.median(shown)),
        rate=float(clicks.sum() / shown.sum()),
        spread=found.spread,
    )


def learning_curve(groups: Sequence[RankGroup], seed: int) -> list[dict[str, Any]]:
    """Held-out pair accuracy of a TF-IDF ranker that learnt from 25, 50 and 100 % of the log's other groups.

    A fifth is held out, by group and without common titles; the same one for all three, so that they can be compared.
    """
    from loracle.judge.baselines import tfidf_ranker
    from loracle.judge.ranking import rank_metrics
    from loracle.train.losses import click_rate, make_loss, numpy_objective, resolve_loss

    task = Task(kind="rank", evidence="clicks")
    sides = split_groups(groups, 0.2, seed)
    objective = numpy_objective(make_loss(task, name=resolve_loss(task, rate=click_rate(groups))))
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(sides.train))
    found = []
    for share in SHARES:
        part = [sides.train[i] for i in order[: max(1, round(share * len(order)))]]
        metrics = rank_metrics(tfidf_ranker(part, sides.held, objective, seed=seed), sides.held)
        found.append({"share": share, "groups": len(part), "pair_accuracy": metrics["pair_accuracy"].to_json()})  # type: ignore[union-attr]
    return found


# --- how it looks -----------------------------------------------------------------------------------------------------


def lines(config: PlanConfig, curves: dict[str, list[Point]], learnt: Sequence[dict[str, Any]] = ()) -> list[str]:
    """What ``loracle simulate`` prints."""
    from loracle.judge.report import figure, plain_table

    rows = [
        ["impressions a title", *(f"{p.shown:,.0f}" for p in curves["impressions"])],
        ["noise ceiling, all pairs", *(f"{p.ceiling:.1%}" for p in curves["impressions"])],
        ["pairs that differ at p < .05", *(f"{p.significant:.1%}" for p in curves["impressions"])],
        ["tests that name their best title", *(f"{p.best_named:.1%}" for p in curves["impressions"])],
        ["lift detectable with all tests", *(f"{p.detectable_lift:+.1%}" for p in curves["impressions"])],
    ]
    more = [
        ["tests", *(f"{p.tests:,}" for p in curves["tests"])],
        ["detectable lift", *(f"{p.detectable_lift:+.1%}" for p in curves["tests"])],
        ["detectable pair accuracy", *(f"{p.detectable_accuracy:.1%}" for p in curves["tests"])],
    ]
    said = [
        f"{config.tests:,} tests of {config.arms} titles, {config.shown:,} impressions each, click rate {config.rate:.2%}, "
        f"spread of the true log-odds {config.spread:.2f}",
        f"always picking the best title would lift clicks by {curves['tests'][0].highest_lift:+.1%}",
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


def plot(curves: dict[str, list[Point]], learnt: Sequence[dict[str, Any]], path: Path) -> None:
    """The curves as a picture (PNG, SVG or PDF by the suffix).

    Raises:
        UserError: matplotlib is not installed, or it cannot write such a file.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("matplotlib for --plot", "none installed", "run: pip install 'loracle[plot]'") from None
    figure = Figure(figsize=(12 if learnt else 8.5, 3.6), layout="constrained")
    axes = figure.subplots(1, 3 if learnt else 2)
    by_shown, by_tests = curves["impressions"], curves["tests"]
    shown = [p.shown for p in by_shown]
    axes[0].plot(shown, [100 * p.ceiling for p in by_shown], "o-", label="noise ceiling, all pairs")
    axes[0].plot(shown, [100 * p.best_named for p in by_shown], "s-", label="best title named")
    axes[0].plot(shown, [100 * p.significant for p in by_shown], "^-", label="pairs with p < .05")
    axes[0].set(xlabel="impressions a title", ylabel="%", xscale="log")
    axes[1].plot(
        [p.tests for p in by_tests], [100 * p.detectable_lift for p in by_tests], "o-", label="detectable lift"
    )
    axes[1].axhline(100 * by_tests[0].highest_lift, ls="--", color="grey", label="lift of the best title")
    axes[1].set(xlabel="tests", ylabel="% over the mean title", xscale="log")
    if learnt:
        value, low, high = ([100 * (r["pair_accuracy"][k] or np.nan) for r in learnt] for k in ("value", "low", "high"))
        axes[2].fill_between([r["groups"] for r in learnt], low, high, alpha=0.2)
        axes[2].plot([r["groups"] for r in learnt], value, "o-", label="TF-IDF ranker on held-out pairs")
        axes[2].set(xlabel="groups learnt from", ylabel="pair accuracy, %")
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as e:
        raise UserError("a .png, .svg or .pdf file to draw to", f"{path} ({e})", "give --plot another name") from None
