"""Simulated logs against what is known of them, their trends, and the command that shows them."""

from __future__ import annotations

import dataclasses
import json
import re
import tracemalloc

import numpy as np
import pytest
from click.testing import CliRunner
from scipy.special import expit
from small import facts, has_facts, write

from loracle.cli import main
from loracle.config import PlanConfig
from loracle.errors import UserError
from loracle.evaluation.ranking import rank_metrics
from loracle.examples import RankGroup
from loracle.experiments import power


def groups_of(config, seed=0):
    [(_, clicks, shown)] = power.draw(config, config.tests, seed)
    return [
        RankGroup(
            group=f"{config.arms} {i}", texts=tuple(f"title {i} {j}" for j in range(config.arms)), rows=(i,) * config.arms,
            clicks=tuple(map(int, c)), impressions=tuple(map(int, n)),
        )
        for i, (c, n) in enumerate(zip(clicks, shown, strict=True), 1)
    ]  # fmt: skip


def mixed():
    """Few titles shown often, and many shown rarely: most pairs are of the latter."""
    small = PlanConfig(tests=300, arms=2, impressions_per_title=20_000, rate=0.02, spread=0.3)
    return groups_of(small) + groups_of(PlanConfig(tests=100, arms=8, impressions_per_title=500, rate=0.01, spread=0.3))


def test_without_noise_the_ceiling_is_reached_and_the_best_is_named():
    point = power.simulate(PlanConfig(impressions_per_title=10**9, spread=0.5))
    assert point.ceiling > 0.999
    assert point.best_named > 0.999
    assert point.significant > 0.99


def test_without_spread_there_is_nothing_to_find():
    point = power.simulate(PlanConfig(spread=0.0, impressions_per_title=20_000))
    assert point.highest_lift == pytest.approx(0)
    assert point.significant == pytest.approx(0.05, abs=0.005)  # the test's own level
    assert point.ceiling == pytest.approx(0.5)  # of equals, either order is as right as the other
    assert point.best_named == pytest.approx(0.25)


def test_the_highest_lift_is_that_of_the_largest_of_normal_draws():
    draws = np.exp(0.3 * np.random.default_rng(5).standard_normal((200_000, 4)))
    expected = draws.max(1).mean() / draws.mean() - 1
    assert power.simulate(PlanConfig(rate=1e-4, spread=0.3)).highest_lift == pytest.approx(expected, abs=0.01)


def test_more_impressions_and_more_tests_tell_more():
    curves = power.plan(PlanConfig())
    for name in ("ceiling", "significant", "best_named"):
        values = [getattr(p, name) for p in curves["impressions"]]
        assert values == sorted(values)
    for name in ("detectable_lift", "detectable_accuracy"):
        values = [getattr(p, name) for p in curves["tests"]]
        assert values == sorted(values, reverse=True)
    assert curves["tests"][0].detectable_lift == pytest.approx(2 * curves["tests"][2].detectable_lift, rel=0.01)


def test_a_detectable_lift_is_found_four_times_in_five():
    """Logs in which a picker has just that lift, and how often its lift stands out."""
    config = PlanConfig(tests=200, rate=0.05, impressions_per_title=400, spread=0.4)
    wanted, found = power.simulate(config).detectable_lift, []
    for seed in range(300):
        [(truth, clicks, shown)] = power.draw(config, config.tests, seed)
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
    true = PlanConfig(tests=300, arms=5, impressions_per_title=4000, rate=0.03, spread=0.25)
    found, _ = power.of_log(groups_of(true), PlanConfig())
    assert (found.tests, found.arms, found.impressions_per_title) == (300, 5, 4000)
    assert found.rate == pytest.approx(true.rate, rel=0.1)
    assert found.spread == pytest.approx(true.spread, rel=0.15)


@pytest.mark.slow
def test_the_simulated_log_tells_what_the_report_says_of_the_log():
    groups = mixed()
    found = power.simulate(*power.of_log(groups, PlanConfig()))
    told = rank_metrics([np.zeros(len(g.texts)) for g in groups], groups)
    assert found.ceiling == pytest.approx(told["ceiling"].value, abs=0.015)
    assert found.significant == pytest.approx(told["significant_pairs"] / told["pairs"], abs=0.015)


def test_a_log_is_drawn_again_as_it_is():
    log, own = power.of_log(mixed(), PlanConfig())
    drawn = {truth.shape[1]: (truth, shown) for truth, _, shown in power.draw(log, 20_000, 0, own)}
    assert sorted(drawn) == [2, 8]
    assert len(drawn[8][0]) == pytest.approx(5000, rel=0.05)  # a quarter of the groups
    assert (drawn[2][1] == 20_000).all()
    assert (drawn[8][1] == 500).all()
    for n, rate in ((2, 0.02), (8, 0.01)):
        assert expit(drawn[n][0]).mean() == pytest.approx(rate * np.exp(0.3**2 / 2), rel=0.1)


@pytest.mark.slow
def test_more_impressions_are_more_of_each_design():
    curve = power.plan(*power.of_log(mixed(), PlanConfig()))["impressions"]
    assert [p.shown for p in curve] == [125, 250, 500, 1000, 2000]  # the median title is one of 8
    assert [p.ceiling for p in curve] == sorted(p.ceiling for p in curve)


def test_the_largest_numbers_are_planned_with():
    curves = power.plan(PlanConfig(impressions_per_title=10**12 - 1, tests=10**12 - 1))
    assert curves["impressions"][-1].shown == curves["tests"][-1].tests == 10**12 - 1


def test_memory_does_not_grow_with_pairs():
    tracemalloc.start()
    power.simulate(PlanConfig(arms=200))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100 * 2**20


def test_a_learning_curve_at_0_is_drawn_there(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: drawn.append(figure))
    told = {"groups": 9, "pair_accuracy": {"value": 0.0, "low": None, "high": None}}
    power.plot(power.plan(PlanConfig(rate=1e-9, impressions_per_title=10)), [told], tmp_path / "plan.png")
    assert drawn[0].axes[2].lines[0].get_ydata() == [0.0]


def test_groups_without_clicks_are_refused():
    graded = RankGroup(group="g", texts=("a", "b"), rows=(1, 2), grades=(0.0, 1.0))
    with pytest.raises(UserError, match=facts("click")):
        power.of_log([graded], PlanConfig())


# --- the command ------------------------------------------------------------------------------------------------------


def simulate(*args, code=0):
    done = CliRunner().invoke(main, ["simulate", *map(str, args)])
    assert done.exit_code == code, (done.output, done.exception)
    return done


def test_the_table_names_its_process():
    said = simulate("--tests", 100, "--impressions-per-title", 1000).stdout
    assert "100 tests of 4 titles, 1,000 impressions each, click rate 1.50%" in said
    assert "noise ceiling" in said


def test_what_nothing_tells_is_left_open():
    flags = ["--rate", "1e-9", "--impressions-per-title", "10"]
    said = simulate(*flags).stdout
    assert "nan" not in said
    assert re.search(r"^noise ceiling, all pairs( +–){5}$", said, re.MULTILINE)
    assert re.search(r"^detectable lift( +–){5}$", said, re.MULTILINE)

    def check_trainable(constant):
        raise AssertionError(f"{constant} is not JSON")

    found = json.loads(simulate(*flags, "--json").stdout, parse_constant=check_trainable)
    for name in ("ceiling", "significant", "detectable_lift", "detectable_accuracy"):
        assert found["tests"][0][name] is None


def test_a_log_is_said_to_be_one_of_medians():
    (log, _), curves = power.of_log(mixed(), PlanConfig()), power.plan(PlanConfig())
    said = power.lines(log, curves, own=True)[0]
    assert said.startswith("400 tests of median 2 titles, median 500 impressions each, median click rate ")


@pytest.mark.slow
def test_a_log_brings_its_numbers_and_a_learning_curve(tmp_path):
    rows = [
        {"test_id": g.group, "headline": t, "clicks": c, "impressions": n}
        for g in groups_of(PlanConfig(tests=60, arms=3, rate=0.05, impressions_per_title=2000))
        for t, c, n in zip(g.texts, g.clicks, g.impressions, strict=True)
    ]
    log = write(tmp_path / "log.csv", rows)
    found = json.loads(simulate("--data", log, "--tests", 500, "--json", "--plot", tmp_path / "plan.png").stdout)
    assert (found["process"]["tests"], found["process"]["arms"], found["process"]["impressions_per_title"]) == (
        500,
        3,
        2000,
    )
    assert [point["share"] for point in found["learning_curve"]] == [0.25, 0.5, 1.0]
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    other = simulate("--data", log, "--arms", 2).stdout  # a flag wins, and then it is another log
    assert "60 tests of 2 titles, 2,000 impressions each" in other


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--rate", "1.5"], "1.5"),
        (["--arms", "1"], "2 | 1"),
        (["--impressions-per-title", "99999999999999999999"], "12 | 99999999999999999999"),
        (["--tests", "9" * 400], "12 | 9999"),
        (["--arms", "1001"], "1001"),
        (["--clicks", "c"], "--data | --clicks"),
        (["--plot", "plan.xyz"], "plan.xyz"),
        (["--plot", "no/such/folder/plan.png"], "file"),
    ],
)
def test_what_cannot_be_simulated_is_said_in_a_line(flags, words):
    done = simulate(*flags, code=2)
    assert has_facts(done.stderr, *words.split(" | "))
    assert "Traceback" not in done.output


def test_a_point_is_the_same_every_time():
    one, other = (dataclasses.asdict(power.simulate(PlanConfig(seed=s))) for s in (0, 0))
    assert one == other
