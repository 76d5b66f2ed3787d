"""Simulated logs against what is known of them, their trends, and the command that shows them."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from click.testing import CliRunner
from scipy.special import expit
from small import write

from loracle import planning
from loracle.cli import main
from loracle.config import PlanConfig
from loracle.data.examples import RankGroup
from loracle.errors import UserError


def groups_of(config, seed=0):
    _, clicks, shown = planning.draw(config, config.tests, seed)
    return [
        RankGroup(
            group=str(i), texts=tuple(f"title {i} {j}" for j in range(config.arms)), rows=(i,) * config.arms,
            clicks=tuple(map(int, c)), impressions=tuple(map(int, n)),
        )
        for i, (c, n) in enumerate(zip(clicks, shown, strict=True), 1)
    ]  # fmt: skip


def test_without_noise_the_ceiling_is_reached_and_the_best_is_named():
    point = planning.simulate(PlanConfig(shown=10**9, spread=0.5))
    assert point.ceiling > 0.999
    assert point.best_named > 0.999
    assert point.significant > 0.99


def test_without_spread_there_is_nothing_to_find():
    point = planning.simulate(PlanConfig(spread=0.0, shown=20_000))
    assert point.highest_lift == pytest.approx(0)
    assert point.significant == pytest.approx(0.05, abs=0.005)  # the test's own level


def test_the_highest_lift_is_that_of_the_largest_of_normal_draws():
    draws = np.exp(0.3 * np.random.default_rng(5).standard_normal((200_000, 4)))
    expected = draws.max(1).mean() / draws.mean() - 1
    assert planning.simulate(PlanConfig(rate=1e-4, spread=0.3)).highest_lift == pytest.approx(expected, abs=0.01)


def test_more_impressions_and_more_tests_tell_more():
    curves = planning.plan(PlanConfig())
    for name in ("ceiling", "significant", "best_named"):
        values = [getattr(p, name) for p in curves["impressions"]]
        assert values == sorted(values)
    for name in ("detectable_lift", "detectable_accuracy"):
        values = [getattr(p, name) for p in curves["tests"]]
        assert values == sorted(values, reverse=True)
    assert curves["tests"][0].detectable_lift == pytest.approx(2 * curves["tests"][2].detectable_lift, rel=0.01)


def test_a_detectable_lift_is_found_four_times_in_five():
    """Logs in which a picker has just that lift, and how often its lift stands out."""
    config = PlanConfig(tests=200, rate=0.05, shown=400, spread=0.4)
    wanted, found = planning.simulate(config).detectable_lift, []
    for seed in range(300):
        truth, clicks, shown = planning.draw(config, config.tests, seed)
        rng = np.random.default_rng(seed)
        rates = expit(truth)
        best = rates.max(1) / rates.mean(1) - 1
        share = wanted / best.mean()  # the truly best title in that share of the tests, else any
        pick = np.where(rng.random(len(rates)) < share, rates.argmax(1), rng.integers(config.arms, size=len(rates)))
        seen = clicks / shown
        gain, mean = seen[np.arange(len(seen)), pick] - seen.mean(1), seen.mean(1)
        found.append(gain.sum() / gain.std() / np.sqrt(len(gain)) > 1.96)
        assert mean.sum() > 0
    assert np.mean(found) == pytest.approx(0.8, abs=0.08)


def test_a_log_gives_its_own_process_back():
    true = PlanConfig(tests=300, arms=5, shown=4000, rate=0.03, spread=0.25)
    found = planning.of_log(groups_of(true), PlanConfig())
    assert (found.tests, found.arms, found.shown) == (300, 5, 4000)
    assert found.rate == pytest.approx(true.rate, rel=0.1)
    assert found.spread == pytest.approx(true.spread, rel=0.15)


def test_groups_without_clicks_are_refused():
    graded = RankGroup(group="g", texts=("a", "b"), rows=(1, 2), grades=(0.0, 1.0))
    with pytest.raises(UserError, match="expected a click log"):
        planning.of_log([graded], PlanConfig())


# --- the command ------------------------------------------------------------------------------------------------------


def simulate(*args, code=0):
    done = CliRunner().invoke(main, ["simulate", *map(str, args)])
    assert done.exit_code == code, (done.output, done.exception)
    return done


def test_the_table_names_its_process():
    said = simulate("--tests", 100, "--shown", 1000).stdout
    assert "100 tests of 4 titles, 1,000 impressions each, click rate 1.50%" in said
    assert "noise ceiling" in said


def test_a_log_brings_its_numbers_and_a_learning_curve(tmp_path):
    rows = [
        {"test_id": g.group, "headline": t, "clicks": c, "impressions": n}
        for g in groups_of(PlanConfig(tests=60, arms=3, rate=0.05, shown=2000))
        for t, c, n in zip(g.texts, g.clicks, g.impressions, strict=True)
    ]
    log = write(tmp_path / "log.csv", rows)
    found = json.loads(simulate("--data", log, "--tests", 500, "--json", "--plot", tmp_path / "plan.png").stdout)
    assert (found["process"]["tests"], found["process"]["arms"], found["process"]["shown"]) == (500, 3, 2000)
    assert [point["share"] for point in found["learning_curve"]] == [0.25, 0.5, 1.0]
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--rate", "1.5"], "expected rate below 1; found 1.5"),
        (["--arms", "1"], "expected arms of 2 or more; found 1"),
        (["--clicks", "c"], "expected --data beside columns; found --clicks alone"),
        (["--plot", "plan.xyz"], "expected a .png, .svg or .pdf file to draw to"),
        (["--plot", "no/such/folder/plan.png"], "expected a .png, .svg or .pdf file to draw to"),
    ],
)
def test_what_cannot_be_simulated_is_said_in_a_line(flags, words):
    done = simulate(*flags, code=2)
    assert words in done.stderr
    assert "Traceback" not in done.output


def test_a_point_is_the_same_every_time():
    one, other = (dataclasses.asdict(planning.simulate(PlanConfig(seed=s))) for s in (0, 0))
    assert one == other
