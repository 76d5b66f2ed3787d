"""Dates sort by time or are refused."""

import datetime
import re

import pytest

from loracle.data.cells import CellError
from loracle.data.dates import as_date, form_of, latest, order_of


@pytest.mark.parametrize(
    ("cell", "date"),
    [(201446, "201446"), (" 9.5 ", "9.5"), ("2014-11", "2014-11"), ("2014-W07", "2014-W07"), ("2014-Q1", "2014-Q1"),
     ("2014-W07-3", "2014-W07-3"), ("2012-02-29", "2012-02-29"), (datetime.date(2014, 11, 3), "2014-11-03")],
)  # fmt: skip
def test_what_sorts_is_kept_as_it_stands(cell, date):
    assert as_date(cell) == date


@pytest.mark.parametrize(
    ("cell", "date"),
    [("2014-11-03 10:00", "2014-11-03T10:00:00"), ("2014-11-03T10:00:00.5", "2014-11-03T10:00:00.500000"),
     (datetime.datetime(2014, 11, 3, 10), "2014-11-03T10:00:00"),
     (datetime.datetime(2014, 11, 3, 10, tzinfo=datetime.timezone(datetime.timedelta(hours=9))),
      "2014-11-03T01:00:00+00:00"),
     ("2014-01-01T23:00-05:00", "2014-01-02T04:00:00+00:00"), ("2014-01-02T10:00+09:00", "2014-01-02T01:00:00+00:00"),
     ("2014-01-02T10:00Z", "2014-01-02T10:00:00+00:00"), ("2014-01-02 10:00:00 UTC", "2014-01-02T10:00:00+00:00")],
)  # fmt: skip
def test_date_times_are_written_in_one_way_and_in_utc(cell, date):
    assert as_date(cell) == date


def test_fractions_of_a_second_sort():
    for offset in ("", "Z"):
        times = [as_date(f"2014-01-01 10:00:{second}{offset}") for second in ("00", "00.000001", "00.5", "01")]
        assert times == sorted(times)


@pytest.mark.parametrize(
    ("cell", "form"),
    [("201446", "a number"), ("2014-11", "a month"), ("2014-Q4", "a quarter"), ("2014-W05", "a week"),
     ("2014-W05-1", "a day of a week"), ("2014-11-03", "a date"), ("2014-11-03 10:00", "a date-time without an offset"),
     ("2014-11-03T10:00+01:00", "a date-time with an offset")],
)  # fmt: skip
def test_forms(cell, form):
    assert form_of(as_date(cell)) == form


@pytest.mark.parametrize(
    "cell",
    [None, " ", float("nan"), "3/11/2014", "3.11.2014", "2014-3-1", "Nov 2014", True, "1e9", "2014-99-99", "2014-13",
     "2013-02-29", "2014-W54", "2014-W05-8", "2014-Q5", "0000-01-01", "2014-01-01 25:00", "2014-01-01 9:00",
     "2014-01-01 noon", "0001-01-01T00:00+09:00"],
)  # fmt: skip
def test_what_does_not_sort_is_refused(cell):
    with pytest.raises(CellError, match=re.escape("a date that sorts, a number such as 201446")):
        as_date(cell)


def test_numbers_sort_as_numbers_and_the_rest_as_texts():
    assert order_of(["10", "9", "9.0", "10"]) == {"10": 1, "9": 0, "9.0": 0}
    assert order_of(["2014-11-03", "2014-02-28", "2014-11-02"]) == {"2014-11-03": 2, "2014-02-28": 0, "2014-11-02": 1}
    assert (latest(["9", "10", "2"]), latest(["2014-09", "2014-10"])) == ("10", "2014-10")
