"""Dates that sort: numbers such as 201446 or seconds since 1970, or ISO 8601, and one form of them a table."""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterable
from typing import Any

from loracle.data.cells import CellError, as_text
from loracle.errors import UserError

EXPECTED = "a date that sorts, a number such as 201446 or ISO such as 2014-11-03"
NUMBER = r"^-?[0-9]+(?:\.[0-9]+)?$"
PERIODS = {  # how each is written, and its first day, which must exist
    "a date": (r"([0-9]{4}-[0-9]{2}-[0-9]{2})", r"\1"),
    "a week": (r"([0-9]{4}-W[0-9]{2})", r"\1-1"),
    "a day of a week": (r"([0-9]{4}-W[0-9]{2}-[0-9])", r"\1"),
    "a month": (r"([0-9]{4}-[0-9]{2})", r"\1-01"),
    "a quarter": (r"([0-9]{4})-Q[1-4]", r"\1-01-01"),
}
TIME = r"[0-9]{4}-[0-9]{2}-[0-9]{2}[T ].+"


def as_date(value: Any) -> str:
    """A date cell, so that it sorts as a text among others of its form, or as a number.

    Numbers and periods (2014-11-03, 2014-W45, 2014-11) stay as they stand, date-times are written in one way, and those
    with an offset in UTC. Blanks, other text and ambiguous dates such as 3/11/2014 are errors.

    Raises:
        CellError: it is none.
    """
    text = "" if isinstance(value, datetime.date) else (as_text(value) or "").strip()
    try:
        if isinstance(value, datetime.datetime):
            return _written(value)
        return value.isoformat() if isinstance(value, datetime.date) else _sortable(text)
    except (ValueError, OverflowError):  # the latter where UTC is before the year 1 or after 9999
        found = f"'{text[:40]}'" if text else "none"
        raise CellError(EXPECTED, found, "Correct or remove the row, or leave out --date.") from None


def _sortable(text: str) -> str:
    """Raises ValueError where it is no date."""
    if re.fullmatch(TIME, text):
        return _written(datetime.datetime.fromisoformat(re.sub(r" ?UTC$", "Z", text)))  # BigQuery's way
    if not is_number(text):
        spelling, first_day = PERIODS[form_of(text)]
        datetime.date.fromisoformat(re.sub(spelling, first_day, text))
    return text


def _written(time: datetime.datetime) -> str:
    """In one way; without a fraction where there is none, which sorts before all fractions, with or without an offset."""
    return (time if time.utcoffset() is None else time.astimezone(datetime.UTC)).isoformat()


def form_of(date: str) -> str:
    """What a date that ``as_date`` gave is. Dates of different forms do not sort by time.

    Raises:
        ValueError: it is none.
    """
    if is_number(date):
        return "a number"
    if re.fullmatch(TIME, date):
        return "a date-time with an offset" if date.endswith("+00:00") else "a date-time without an offset"
    for form, (spelling, _) in PERIODS.items():
        if re.fullmatch(spelling, date):
            return form
    raise ValueError(date)


def mixed_forms(first: tuple[int, str], other: tuple[int, str], source: str) -> UserError:
    """The error of a table with dates of two forms, each given as (first row, form)."""
    return UserError(
        f"{source} mixes forms of dates: {first[1]} in row {first[0]}, {other[1]} in row {other[0]}.",
        "Write all dates in one form.",
    )


def is_number(date: str) -> bool:
    """Whether a date that ``as_date`` gave sorts as a number."""
    return re.search(NUMBER, date) is not None


def order_of(dates: Iterable[str]) -> dict[str, int]:
    """``{date: rank}`` of dates of one form, from 0 for the earliest; numbers that are equal (7, 7.0) have one rank."""
    distinct = list(dict.fromkeys(dates))
    keys: dict[str, Any] = {date: float(date) for date in distinct} if all(map(is_number, distinct)) else {}
    keys = keys or {date: date for date in distinct}
    ranks = {key: rank for rank, key in enumerate(sorted(set(keys.values())))}
    return {date: ranks[keys[date]] for date in distinct}


def latest(dates: Iterable[str]) -> str:
    """Of one date or more, of one form."""
    ranks = order_of(dates)
    return max(ranks, key=ranks.__getitem__)
