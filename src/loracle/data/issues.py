"""Rows that were not used as they stood: counted by kind, and the first ones named."""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Issue:
    """Rows (or titles, or groups) that were not used as they stood: why, how many, and where the first ones are."""

    kind: str
    message: str  # with the count: "rows without a label, skipped: 12"
    count: int
    rows: tuple[int, ...]

    ROWS_NAMED = 5  # in a message; a million row numbers help nobody

    def __str__(self) -> str:
        return f"{self.message} ({rows_named(self.rows, self.count)})"


class IssueLog:
    """Counts by kind what was skipped or changed while a table is read."""

    def __init__(self, messages: dict[str, str]):
        self._messages = messages
        self._counts: Counter[str] = Counter()
        self._rows: dict[str, list[int]] = {}

    def add(self, kind: str, row: int) -> None:
        """One more of a kind, at this row."""
        self._counts[kind] += 1
        rows = self._rows.setdefault(kind, [])
        bisect.insort(rows, row)  # groups are closed in another order than that of the file
        del rows[Issue.ROWS_NAMED :]

    def count(self, kind: str, count: int, rows: Iterable[int]) -> None:
        """``count`` more of a kind, the first ones at these rows."""
        for row in rows:
            self.add(kind, row)
            count -= 1
        self._counts[kind] += count

    def issues(self) -> tuple[Issue, ...]:
        """What was counted, in the order in which it was first met."""
        return tuple(
            Issue(kind, f"{self._messages[kind]}: {count:,}", count, tuple(self._rows[kind]))
            for kind, count in self._counts.items()
        )


def all_rows_named(rows: Sequence[int]) -> str:
    """As ``rows_named``, of rows that are all there; for an error, which has no count beside it."""
    named = rows_named(rows[: Issue.ROWS_NAMED], len(rows))
    return f"{named} ({len(rows):,} in all)" if len(rows) > Issue.ROWS_NAMED else named


def rows_named(rows: Iterable[int], count: int) -> str:
    """'row 3', 'rows 3, 5' or 'rows 3, 5, 8, 9, 11, ...' of ``count`` in all."""
    named = ", ".join(map(str, rows))
    return f"row {named}" if count == 1 else f"rows {named}{', ...' if count > Issue.ROWS_NAMED else ''}"
