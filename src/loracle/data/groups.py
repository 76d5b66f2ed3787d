"""Titles that compete become ``RankGroup``s, from clicks, grades or pairs; what prefers nothing is counted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from loracle.config import DataConfig
from loracle.data.cells import (
    CellError,
    as_context,
    as_number,
    as_side,
    count_lost,
    group_id,
    parsed_rows,
    text_and_context,
)
from loracle.data.clicks import Shown, check_counts, click_group
from loracle.data.columns import Columns, cell_of
from loracle.data.examples import Preference, RankGroup
from loracle.data.issues import IssueLog
from loracle.data.table import Table
from loracle.errors import UserError


@dataclass(slots=True)
class Titles:
    """Titles of one group as they are met: (row, text, evidence)."""

    context: str | None
    met: list[tuple[int, str, Any]] = field(default_factory=list)


def gather(
    table: Table, columns: Columns, issues: IssueLog, evidence: Callable[[dict[str, Any]], Any], missing: str
) -> dict[str, Titles]:
    """Titles by group, in the order of the file. Rows whose ``evidence`` is None are counted as ``missing``."""

    def parse(row: dict[str, Any]) -> tuple[str | None, str | None, str | None, Any]:
        return *text_and_context(row, columns), group_id(row, columns.group), evidence(row)

    groups: dict[str, Titles] = {}
    for number, (text, context, group, known) in parsed_rows(table, parse):
        if text is None:
            issues.add("blank-text", number)
        elif group is None:
            issues.add("no-group", number)
        elif known is None:
            issues.add(missing, number)
        else:
            count_lost(text, number, issues)
            titles = groups.setdefault(group, Titles(context))
            _check_context(titles.context, context, number, table)
            titles.met.append((number, text, known))
    return groups


def _check_context(of_group: str | None, context: str | None, row: int, table: Table) -> None:
    if context != of_group:
        raise UserError(
            "one context a group", f"another one in row {row} of {table.name}", "add the context's column to --group"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Clicks, grades


def _read_clicks(table: Table, columns: Columns, data: DataConfig, issues: IssueLog) -> list[RankGroup]:
    def counts(row: dict[str, Any]) -> tuple[float, float] | None:
        clicks = as_number(cell_of(row, columns.clicks), "clicks")
        impressions = as_number(cell_of(row, columns.impressions), "impressions")
        return None if clicks is None or impressions is None else (clicks, impressions)

    gathered = gather(table, columns, issues, counts, "no-count")
    shown = {group: [Shown(row, text, *known) for row, text, known in g.met] for group, g in gathered.items()}
    check_counts(sorted((s for group in shown.values() for s in group), key=lambda s: s.row), table.name)
    groups = (
        click_group(name, gathered[name].context, met, min_impressions=data.min_impressions, issues=issues)
        for name, met in shown.items()
    )
    return [group for group in groups if group is not None]


def _read_grades(table: Table, columns: Columns, data: DataConfig, issues: IssueLog) -> list[RankGroup]:
    gathered = gather(table, columns, issues, lambda row: as_number(cell_of(row, columns.grade), "grade"), "no-grade")
    groups = (_grade_group(name, titles, issues) for name, titles in gathered.items())
    return [group for group in groups if group is not None]


def _grade_group(name: str, titles: Titles, issues: IssueLog) -> RankGroup | None:
    """The titles of a group, each once, with the mean of its grades; None where no title is better than another."""
    rows: dict[str, int] = {}
    grades: dict[str, list[float]] = {}
    for row, text, grade in titles.met:
        rows.setdefault(text, row)
        if earlier := grades.setdefault(text, []):
            issues.add("repeated-title" if grade in earlier else "mixed-grades", row)
        grades[text].append(grade)
    means = tuple(sum(of_text) / len(of_text) for of_text in grades.values())
    if len(means) == 1 or len(set(means)) == 1:
        issues.add("single-title" if len(means) == 1 else "equal-grades", titles.met[0][0])
        return None
    return RankGroup(group=name, context=titles.context, texts=tuple(rows), rows=tuple(rows.values()), grades=means)


# ---------------------------------------------------------------------------------------------------------------------
# Pairs


@dataclass(slots=True)
class _Pairs:
    """A group of pairs while it grows: its distinct texts, the first row of each, and who beat whom."""

    context: str | None
    index: dict[str, int] = field(default_factory=dict)
    rows: list[int] = field(default_factory=list)
    preferences: list[Preference] = field(default_factory=list)
    seen: set[tuple[int, int]] = field(default_factory=set)

    def add(self, chosen: str, rejected: str, margin: float | None, row: int) -> bool:
        """Whether the pair contradicts an earlier one; it is added all the same."""
        winner, loser = self._at(chosen, row), self._at(rejected, row)
        self.preferences.append(Preference(winner=winner, loser=loser, margin=margin))
        self.seen.add((winner, loser))
        return (loser, winner) in self.seen

    def _at(self, text: str, row: int) -> int:
        if text not in self.index:
            self.index[text] = len(self.rows)
            self.rows.append(row)
        return self.index[text]

    def group(self, name: str) -> RankGroup:
        return RankGroup(
            group=name,
            context=self.context,
            texts=tuple(self.index),
            rows=tuple(self.rows),
            preferences=tuple(self.preferences),
        )


def _read_pairs(table: Table, columns: Columns, data: DataConfig, issues: IssueLog) -> list[RankGroup]:
    """Pairs of one prompt (or, by flag, of one group) compete together, so that no text of theirs is scored twice."""
    groups: dict[str, _Pairs] = {}
    for number, pair in parsed_rows(table, lambda row: _pair(row, columns)):
        key = pair.group if columns.group else pair.context or f"row {number}"
        if pair.chosen is None or pair.rejected is None:
            issues.add("null-pair", number)
        elif pair.chosen == pair.rejected:
            issues.add("same-pair", number)
        elif key is None:
            issues.add("no-group", number)
        else:
            group = groups.setdefault(key, _Pairs(pair.context))
            _check_context(group.context, pair.context, number, table)
            count_lost(pair.chosen + pair.rejected, number, issues)
            if group.add(pair.chosen, pair.rejected, pair.margin, number):
                issues.add("contradiction", number)
    return [pairs.group(name) for name, pairs in groups.items()]


@dataclass(frozen=True, slots=True)
class _Pair:
    chosen: str | None
    rejected: str | None
    context: str | None
    group: str | None
    margin: float | None


def _pair(row: dict[str, Any], columns: Columns) -> _Pair:
    chosen, prompt = as_side(cell_of(row, columns.chosen))
    rejected, other_prompt = as_side(cell_of(row, columns.rejected))
    if prompt != other_prompt and chosen and rejected:
        raise CellError("one prompt before chosen and rejected", "two different ones")
    margin = as_number(cell_of(row, columns.margin), "margin")
    if margin is not None and margin < 0:
        raise CellError("a margin of 0 or more", str(margin), "swap chosen and rejected there")
    context = as_context(cell_of(row, columns.context)) if columns.context else None
    if context and prompt:
        context = f"{context}\n{prompt}"
    return _Pair(chosen, rejected, context or prompt, group_id(row, columns.group) if columns.group else None, margin)


READERS = {"pairs": _read_pairs, "grades": _read_grades, "clicks": _read_clicks}
