"""Dates that sort: numbers such as 201446 or seconds since 1970, or ISO 8601, and never both in one table."""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterable
from typing import Any

from loracle.data.cells import CellError, as_text

ISO = r"^\d{4}-(?:\d\d(?:-\d\d(?:[T ].+)?)?|W\d\d(?:-\d)?|Q\d)$"
NUMBER = r"^-?\d+(?:\.\d+)?$"
EXPECTED = "a date that sorts, a number such as 201446 or ISO such as 2014-11-03"


def as_date(value: Any) -> str:
    """A date cell as it stands; what would not sort by time, such as 3/11/2014, is refused, and so is a blank."""
    if isinstance(value, datetime.date):  # a datetime is one
        return value.isoformat()
    text = (as_text(value) or "").strip()
    if not (re.search(NUMBER, text) or re.search(ISO, text)):
        raise CellError(EXPECTED, f"'{text[:40]}'" if text else "none", "correct or remove that row, or drop --date")
    return text


def is_number(date: str) -> bool:
    """Whether a date that ``as_date`` gave sorts as a number."""
    return re.search(NUMBER, date) is not None


def order_of(dates: Iterable[str]) -> dict[str, int]:
    """``{date: rank}``, from 0 for the earliest; numbers that are equal (7, 7.0) have one rank."""
    distinct = list(dict.fromkeys(dates))
    keys: dict[str, Any] = {date: float(date) for date in distinct} if all(map(is_number, distinct)) else {}
    keys = keys or {date: date for date in distinct}
    ranks = {key: rank for rank, key in enumerate(sorted(set(keys.values())))}
    return {date: ranks[keys[date]] for date in distinct}


def latest(dates: Iterable[str]) -> str:
    """Of one date or more."""
    ranks = order_of(dates)
    return max(ranks, key=ranks.__getitem__)
