"""Click logs: counts are checked, repeated titles merged before the filter, and everything left out is counted."""

from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small import has_facts

from loracle.data.click_logs.counts import CLICK_ISSUES, Shown, check_counts, click_group
from loracle.data.issues import IssueLog
from loracle.errors import UserError
from loracle.examples import RankGroup


def group_of(shown, min_impressions=100):
    log = IssueLog(CLICK_ISSUES)
    made = click_group(shown, partial(RankGroup, group="g"), min_impressions=min_impressions, issues=log)
    return made, {issue.kind: (issue.count, issue.rows) for issue in log.issues()}


def test_a_group_keeps_the_order_of_the_log():
    made, issues = group_of([Shown(2, "a", 3, 100), Shown(3, "b", 0, 250)])
    assert made == RankGroup(group="g", texts=("a", "b"), rows=(2, 3), clicks=(3, 0), impressions=(100, 250))
    assert issues == {}


def test_counts_of_a_repeated_title_are_added_before_rare_titles_are_left_out():
    shown = [Shown(2, "a", 3, 60), Shown(3, "b", 1, 200), Shown(4, "a", 2, 60), Shown(5, "rare", 9, 99)]
    made, issues = group_of(shown)
    assert (made.texts, made.rows, made.clicks, made.impressions) == (("a", "b"), (2, 3), (5, 1), (120, 200))
    assert issues == {"repeated-title": (1, (4,)), "few-impressions": (1, (5,))}


@pytest.mark.parametrize(
    ("shown", "counted"),
    [
        ([Shown(2, "a", 3, 100)], {"single-title": (1, (2,))}),
        ([Shown(2, "a", 3, 100), Shown(3, "b", 3, 99)], {"few-impressions": (1, (3,)), "single-title": (1, (2,))}),
        ([Shown(2, "a", 3, 9), Shown(3, "b", 3, 9)], {"few-impressions": (2, (2, 3))}),
        ([Shown(2, "a", 0, 100), Shown(3, "b", 0, 100)], {"zero-clicks": (1, (2,))}),
    ],
)
def test_a_group_that_tells_nothing_is_skipped_and_counted(shown, counted):
    assert group_of(shown) == (None, counted)


@pytest.mark.parametrize(
    ("wrong", "found"),
    [
        (Shown(7, "a", 5, 4), "more clicks than impressions"),
        (Shown(7, "a", -1, 4), "counts below 0"),
        (Shown(7, "a", 0.5, 4), "fractions"),
        (Shown(7, "a", 1, 4.5), "fractions"),
    ],
)
def test_impossible_counts_are_refused_by_row(wrong, found):
    with pytest.raises(UserError) as error:
        check_counts([Shown(6, "a", 4, 4), wrong], "x.csv")
    assert has_facts(str(error.value), "0")
    with pytest.raises(UserError, match=rf"x\.csv: .*{found}: 6 \(rows 7, 7, 7, 7, 7, \.\.\.\)"):
        check_counts([wrong] * 6, "x.csv")


def test_all_kinds_of_impossible_counts_are_named_at_once():
    shown = [Shown(2, "a", 5, 4), Shown(3, "b", 1.5, 1), Shown(4, "c", -1, 9), Shown(5, "d", 9, 4), Shown(6, "e", 1, 9)]
    with pytest.raises(UserError) as error:
        check_counts(shown, "x.csv")
    message = str(error.value)
    for fact in (
        "x.csv", "fractions: 1 (row 3)", "counts below 0: 1 (row 4)", "more clicks than impressions: 3 (rows 2, 3, 5)"
    ):  # fmt: skip
        assert fact in message


COUNTS = st.tuples(st.sampled_from("abc"), st.integers(0, 50), st.integers(50, 200))


@given(st.lists(COUNTS, min_size=1, max_size=8))
def test_nothing_is_lost_without_a_filter(log):
    shown = [Shown(row, *line) for row, line in enumerate(log)]
    check_counts(shown, "x.csv")
    made, issues = group_of(shown, min_impressions=0)
    distinct = len({s.text for s in shown})
    assert issues.get("repeated-title", (0,))[0] == len(shown) - distinct
    if made is None:
        assert distinct == 1 or not any(s.clicks for s in shown)
    else:
        assert sum(made.clicks) == sum(s.clicks for s in shown)
        assert sum(made.impressions) == sum(s.impressions for s in shown)
        assert len(made.texts) == distinct == len(set(made.rows))
