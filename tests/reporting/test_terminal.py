"""Tables and lines as people read them."""

import pytest

from loracle.reporting.terminal import FIGURES, ceiling_line, figure, result_rows
from loracle.tasks import Task


def interval(value, low=None, high=None):
    return {"value": value, "low": low, "high": high}


def test_ceiling_line():
    test = {
        "ceiling": interval(0.812, 0.8, 0.82),
        "significant_ceiling": interval(0.9821, 0.97, 0.99),
        "way": interval(0.391, 0.35, 0.432),
    }
    assert ceiling_line(test) == (
        "noise ceiling: 81.2 % of all pairs, 98.2 % of significant ones; "
        "the model is 39 % [35, 43] of the way from chance to it"
    )
    test |= {"significant_ceiling": interval(None), "way": interval(0.391)}
    assert ceiling_line(test, "loracle") == (
        "noise ceiling: 81.2 % of all pairs; loracle is 39 % of the way from chance to it"
    )
    assert ceiling_line(test | {"way": interval(None)}) == "noise ceiling: 81.2 % of all pairs"


@pytest.mark.parametrize("test", [{}, {"ceiling": interval(None)}])
def test_no_ceiling_no_line(test):
    assert ceiling_line(test) is None


def test_columns_of_a_ranker():
    names = (
        "pair_accuracy",
        "significant_pair_accuracy",
        "top1",
        "ctr_lift",
        "regret",
        "ndcg",
        "kendall_tau",
        "ceiling",
    )
    header, row = result_rows({"test": {name: interval(0.25, 0.2, 0.3) for name in names}}, Task(name="click_ranking"))
    assert header == ["", "pair_accuracy", "significant_pair_accuracy", "ctr_lift", "top1", "regret"]
    assert len(header) == FIGURES + 1
    assert row == ["loracle", *["25.0 [20.0, 30.0]"] * 2, "+25.0 % [+20.0 %, +30.0 %]", *["25.0 [20.0, 30.0]"] * 2]
    graded, _ = result_rows(
        {"test": {name: interval(0.5) for name in ("pair_accuracy", "kendall_tau", "ndcg")}}, Task(name="ranking")
    )
    assert graded == ["", "pair_accuracy", "ndcg", "kendall_tau"]


def test_figures():
    assert figure(interval(None), "top1") == "–"
    assert figure(interval(0.5), "kendall_tau") == "0.500"
    assert figure(interval(0.5), "pair_accuracy_gap_under_10") == "50.0"
    assert figure(0.5, "accuracy") == "50.0"
