"""Dates sort by time or are refused."""

import datetime
import re

import pytest

from loracle.data.cells import CellError
from loracle.data.dates import as_date, latest, order_of


@pytest.mark.parametrize(
    ("cell", "date"),
    [(201446, "201446"), (" 9.5 ", "9.5"), ("2014-11", "2014-11"), ("2014-W07", "2014-W07"), ("2014-Q1", "2014-Q1"),
     ("2014-11-03 10:00", "2014-11-03 10:00"), (datetime.date(2014, 11, 3), "2014-11-03"),
     (datetime.datetime(2014, 11, 3, 10), "2014-11-03T10:00:00")],
)  # fmt: skip
def test_what_sorts_is_kept_as_it_stands(cell, date):
    assert as_date(cell) == date


@pytest.mark.parametrize(
    "cell", [None, " ", float("nan"), "3/11/2014", "3.11.2014", "2014-3-1", "Nov 2014", True, "1e9"]
)
def test_what_does_not_sort_is_refused(cell):
    with pytest.raises(CellError, match=re.escape("a date that sorts, a number such as 201446")):
        as_date(cell)


def test_numbers_sort_as_numbers_and_the_rest_as_texts():
    assert order_of(["10", "9", "9.0", "10"]) == {"10": 1, "9": 0, "9.0": 0}
    assert order_of(["2014-11-03T10:00", "2014-02", "2014-11-03"]) == {
        "2014-11-03T10:00": 2, "2014-02": 0, "2014-11-03": 1,
    }  # fmt: skip
    assert (latest(["9", "10", "2"]), latest(["2014-09", "2014-10"])) == ("10", "2014-10")
