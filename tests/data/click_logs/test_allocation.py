"""Whether chance dealt out the impressions: random logs pass, broken weeks and bandits are found, and Upworthy's are."""

from __future__ import annotations

import datetime
import json
import os
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from scipy.stats import chi2

from loracle.cli import main
from loracle.config import DataConfig
from loracle.data.click_logs.allocation import LEVEL, Allocation, Period, allocation
from loracle.data.sources import open_table
from loracle.examples import Arms
from loracle.tasks.dataset import read_examples

SHARED = Path(os.environ.get("LORACLE_SHARED", Path(__file__).parents[4] / "shared"))
UPWORTHY = SHARED / "data" / "upworthy" / "packages.csv.gz"


def dealt(
    draw: np.random.Generator, name: str, *, uneven: float = 0.0, follow: float = 0.0, date: str | None = None
) -> Arms:
    """Four arms of 3,000 impressions on average; ``uneven``: spread of their odds; ``follow``: by their own click rates."""
    rates = 0.01 * np.exp(draw.normal(0, 0.3, 4))
    odds = np.exp(draw.normal(0, uneven, 4)) * rates**follow
    shown = draw.multinomial(12_000, odds / odds.sum())
    clicks = draw.binomial(shown, rates)
    return Arms(group=name, row=1 + 4 * int(name), clicks=tuple(clicks), impressions=tuple(shown), date=date)


def of(arms: list[Arms]) -> Allocation:
    found = allocation(arms)
    assert found is not None
    return found


def test_chi_square_is_that_of_the_book() -> None:
    arms = [
        Arms(group="a", row=2, clicks=(1, 1), impressions=(100, 150)),
        Arms(group="a", row=4, clicks=(1, 1, 1), impressions=(90, 100, 110)),
        Arms(group="b", row=7, clicks=(1, 1), impressions=(100, 153)),
        Arms(group="c", row=9, clicks=(1, 1), impressions=(100, 150)),
        Arms(group="c", row=11, clicks=(1, 1), impressions=(100, 150)),
    ]
    # Sums of (n - mean)^2 / mean and degrees of freedom: a 10 + 2 at 1 + 2; b 11.1 at 1; c 10 + 10 at 1 + 1.
    assert [float(chi2.sf(*x)) < LEVEL for x in ((12, 3), (53**2 / 2 / 126.5, 1), (20, 2))] == [False, True, True]
    found = of(arms)
    assert (found.groups, found.failing, found.rows) == (3, 2, (7, 9))


def test_too_few_impressions_are_not_tested() -> None:
    assert allocation([Arms(group="a", row=2, clicks=(0, 1), impressions=(1, 18))]) is None
    assert allocation([Arms(group="a", row=2, clicks=(5,), impressions=(100,))]) is None
    assert of([Arms(group="a", row=2, clicks=(0, 0), impressions=(0, 20))]).adaptivity == 0


@pytest.mark.slow
def test_random_logs_pass() -> None:
    """A thousand groups each: one in a thousand fails, and z is standard normal."""
    found = [of([dealt(np.random.default_rng([seed, i]), str(i)) for i in range(300)]) for seed in range(20)]
    assert sum(f.failing for f in found) < 6000 * 0.001 + 3.5 * 6**0.5
    assert not any(f.uneven or f.adaptive for f in found)
    z = np.array([f.adaptivity for f in found])
    assert abs(z.mean()) < 3.5 / 20**0.5
    assert 0.5 < z.std() < 1.6


def test_uneven_but_not_adaptive() -> None:
    draw = np.random.default_rng(1)
    found = of([dealt(draw, str(i), uneven=0.3) for i in range(200)])
    assert found.uneven
    assert not found.adaptive
    assert found.rows == (1, 5, 9, 13, 17)
    assert "Unless unequal shares were meant" in found.lines()[-1]


def test_a_bandit_is_found_though_its_shares_are_nearly_even() -> None:
    draw = np.random.default_rng(2)
    found = of([dealt(draw, str(i), follow=0.05) for i in range(300)])
    assert found.failing < 0.05 * found.groups
    assert found.adaptive
    assert found.adaptivity > 4
    assert any("what was clicked more was shown more, beyond chance" in line for line in found.lines())


def test_a_broken_period_is_found_and_bridged() -> None:
    draw = np.random.default_rng(3)
    arms = [
        dealt(
            draw, str(20 * week + i), uneven=0.2 if 12 <= week < 20 and (week != 15 or i < 2) else 0.0, date=f"{week}"
        )
        for week in range(30)
        for i in range(20 if week != 15 else 3)
    ]
    found = of(arms)
    (period,) = found.periods
    assert (period.start, period.end) == ("12", "19")
    assert period.failing > 0.8 * period.groups
    assert [date.start for date in found.dates] == [str(week) for week in range(30)]
    lines = found.lines()
    assert lines[1] == f"  12 to 19: {period.failing / period.groups:.1%} ({period.failing} of {period.groups})"
    assert lines[2].startswith("  at all other times: 0.")
    assert lines[-1].startswith("Leave the groups of these times out")


def test_one_failing_group_makes_no_period() -> None:
    draw = np.random.default_rng(4)
    arms = [dealt(draw, str(i), uneven=0.5 * (i == 7), date=str(i // 5)) for i in range(50)]
    found = of(arms)
    assert (found.failing, found.periods) == (1, ())
    assert found.uneven


def test_sound_logs_are_said_to_be() -> None:
    found = Allocation(groups=100, failing=0, beyond=0, rows=(), adaptivity=0.5, dates=(Period("1", "1", 100, 0),))
    assert found.lines() == [
        "0.0% (0 of 100) of the groups of 2 titles or more were not shown in equal shares (p < 0.001)",
        "what was clicked more was not shown more than chance has it (z = +0.5)",
        "so click rates within a group can be compared",
    ]


def even(name: str, row: int, *impressions: int, titles: tuple[int, ...] = ()) -> Arms:
    """Arms of one click rate."""
    return Arms(group=name, row=row, clicks=(50,) * len(impressions), impressions=impressions, titles=titles)


def test_a_single_group_beyond_chance_is_enough() -> None:
    found = of([even("a", 2, 10_000, 2_000), even("b", 4, 5_000, 5_010), even("c", 6, 5_000, 4_990)])
    assert (found.failing, found.beyond, found.rows, found.uneven) == (1, 1, (2,), True)
    lines = found.lines()
    assert lines[1] == "  they begin in row 2; beyond chance for so many groups: 1"
    assert "so click rates within a group can be compared" not in lines


def test_what_chance_makes_fail_is_named_but_not_held_against_the_log() -> None:
    """One in 100 at p = 0.0002: it fails, but of a hundred groups one does so in two logs of a hundred."""
    found = of([even(str(i), 2 * i, 10_000, 10_000 + 532 * (i == 70)) for i in range(100)])
    assert (found.failing, found.beyond, found.rows, found.uneven) == (1, 0, (140,), False)
    assert found.lines()[1] == "  they begin in row 140; beyond chance for so many groups: 0"
    assert found.lines()[-1] == "so click rates within a group can be compared"


def test_rows_beyond_chance_are_named_first() -> None:
    arms = [even(str(i), 2 * i, 10_000, 10_000 + (532 if i < 6 else 5_000 * (i == 190))) for i in range(200)]
    found = of(arms)
    assert (found.failing, found.beyond, found.rows) == (7, 1, (0, 2, 4, 6, 380))


def test_rows_of_one_title_are_one_arm_or_several() -> None:
    """A group fails if both its rows and its titles are uneven: a split title, days that differ, but one title twice."""
    assert not of([even("a", 2, 10_000, 10_010)]).failing
    assert not of([even("a", 2, 4_000, 6_000, 10_010, titles=(0, 0, 1))]).failing  # rows alone are uneven
    assert not of([even("a", 2, 5_000, 5_010, 4_990, titles=(0, 0, 1))]).failing  # titles alone are
    assert of([even("a", 2, 5_000, 8_000, 4_990, titles=(0, 0, 1))]).failing == 1
    days = even("a", 2, 500, 505, 9_000, 9_010, 2_000, 1_990, titles=(0, 1) * 3)
    assert not of([days]).uneven
    assert allocation([even("a", 2, 500, 9_000, titles=(0, 0))]) is None


def test_adaptivity_is_that_of_titles() -> None:
    """Days with more readers have other click rates, which says nothing about titles."""
    days = [
        Arms(
            group=str(i),
            row=i,
            clicks=(10, 10, 900, 900),
            impressions=(1_000, 1_000, 9_000, 9_000),
            titles=(0, 1, 0, 1),
        )
        for i in range(50)
    ]
    assert of(days).adaptivity == 0
    assert of([replace(arms, titles=()) for arms in days]).adaptive


@pytest.mark.parametrize("spelling", ["{}", " {}"], ids=["", "with a space"])
def test_a_daily_export_is_not_uneven(tmp_path: Path, spelling: str) -> None:
    rows = [
        f"{test},{title if day != 1 else spelling.format(title)},{1000 * (day + 1)},{30 * (day + 1)}"
        for test in range(20)
        for day in range(3)
        for title in "ab"
    ]
    path = tmp_path / "daily.csv"
    path.write_text("\n".join(["test,title,impressions,clicks", *rows]) + "\n")
    data = DataConfig(group="test", text="title", clicks="clicks", impressions="impressions")
    examples = read_examples(open_table(str(path)), data)
    assert [group.impressions for group in examples.items] == [(6000, 6000)] * 20
    assert not of(list(examples.arms)).uneven


def test_check_says_it_of_single_impressions(tmp_path: Path) -> None:
    """Every column that a log may name, through the command line."""
    draw = random.Random(0)
    header = "test,image,title,clicked,w,day"
    odds = ["aab"] * 9 + ["ab"] * 19
    rows = [
        f"{test},{image},title {draw.choice(odds[test])} {test},{int(draw.random() < 0.3)},2,2014-01-{test + 1:02}"
        for test in range(28)
        for image in "xy"
        for _ in range(400)
    ]
    path = tmp_path / "log.csv"
    path.write_text("\n".join([header, *rows, "1,x,title a 1,,2,2014-01-02"]) + "\n")
    flags = ["--group", "test", "--compare-within", "image", "--clicked", "clicked", "--weight", "w", "--date", "day"]
    done = CliRunner().invoke(main, ["check", str(path), *flags])
    assert done.exit_code == 0, done.output
    for line in (
        "compare-within column: 'image'", "clicked column: 'clicked'", "weight column: 'w'", "date column: 'day'",
        "one impression a row: summed to clicks and impressions of each title", "groups            56",
        "impressions       22,400",
        "  32.1% (9 of 28) of the groups of 2 titles or more were not shown in equal shares (p < 0.001)",
        "    2014-01-01 to 2014-01-09: 100.0% (9 of 9)", "    at all other times: 0.0% (0 of 19)",
        "  impressions that do not say whether they were clicked, skipped: 1 (row 22402)",
    ):  # fmt: skip
        assert line in done.output.splitlines()
    said = json.loads(CliRunner().invoke(main, ["check", str(path), *flags, "--json"]).output)["allocation"]
    assert (said["groups"], said["failing"], said["rows"]) == (28, 9, [2, 802, 1602, 2402, 3202])
    assert said["periods"] == [{"start": "2014-01-01", "end": "2014-01-09", "groups": 9, "failing": 9}]


@pytest.mark.slow
@pytest.mark.skipif(not UPWORTHY.exists(), reason=f"no {UPWORTHY}")
def test_the_doubted_weeks_of_upworthy_are_rediscovered() -> None:
    """Its authors doubt the randomisation from June 25, 2013 to January 10, 2014 (update of June 2024).

    These are ISO weeks 201326 to 201402; the file counts weeks as strftime's %W does, from 0, where they are one less.
    """
    first, last = (day.strftime("%Y%W") for day in (datetime.date(2013, 6, 25), datetime.date(2014, 1, 10)))
    data = DataConfig(
        group="clickability_test_id", compare_within="eyecatcher_id", text="headline", clicks="clicks",
        impressions="impressions", date="test_week",
    )  # fmt: skip
    examples = read_examples(open_table(str(UPWORTHY)), data)
    found = of(list(examples.arms))
    (period,) = found.periods
    assert (period.start, period.end) == (first, last) == ("201325", "201401")
    assert (period.groups, period.failing) == (427, 283)  # two thirds
    assert (found.groups - period.groups, found.failing - period.failing) == (1572, 5)
    doubted = [date for date in found.dates if "201326" <= date.start <= "201402"]
    assert (sum(d.groups for d in doubted), sum(d.failing for d in doubted)) == (413, 267)
    assert not found.adaptive
