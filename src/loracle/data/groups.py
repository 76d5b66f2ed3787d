"""Titles that compete become ``RankGroup``s, from clicks, grades or pairs; what prefers nothing is counted."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from loracle.config import DataConfig
from loracle.data.cells import (
    CellError,
    as_context,
    as_number,
    as_side,
    as_weight,
    count_lost,
    group_id,
    parsed_rows,
    text_and_context,
)
from loracle.data.click_logs.counts import Shown, check_counts, click_group
from loracle.data.columns import Columns, cell_of
from loracle.data.dates import as_date, form_of, latest, mixed_forms
from loracle.data.issues import IssueLog, all_rows_named
from loracle.data.table import Table
from loracle.errors import UserError
from loracle.examples import Arms, Preference, RankGroup

Read = tuple[list[RankGroup], tuple[Arms, ...]]
"""What a reader gives: the groups and, of a click log, all that it showed."""


@dataclass(frozen=True, slots=True)
class Traits:
    """What one row says of its whole group. ``stratum`` is None where nothing, or not this row, says what compares."""

    group: str | None
    stratum: str | None
    context: str | None
    weight: float
    date: str | None

    @classmethod
    def of(cls, row: dict[str, Any], columns: Columns, context: str | None) -> Traits:
        return cls(
            group=group_id(row, columns.group) if columns.group else None,
            stratum=group_id(row, columns.compare_within) if columns.compare_within else None,
            context=context,
            weight=as_weight(cell_of(row, columns.weight)),
            date=as_date(cell_of(row, columns.date)) if columns.date else None,
        )


@dataclass(slots=True)
class Titles:
    """What is met of one group, or of one stratum of it: (row, text, evidence) of each title, and the dates."""

    group: str
    traits: Traits  # of its first row
    met: list[tuple[int, str, Any]] = field(default_factory=list)
    dates: dict[str, None] = field(default_factory=dict)  # in the order of the file

    @property
    def date(self) -> str | None:
        return latest(self.dates) if self.dates else None

    def marked(self, **known: Any) -> RankGroup:
        """A group with what all of its rows have in common."""
        traits = self.traits
        return RankGroup(
            group=self.group,
            context=traits.context,
            stratum=traits.stratum,
            weight=traits.weight,
            date=self.date,
            **known,
        )


class Gathering:
    """The groups of a table while they grow, in the order of the file, and whether their rows agree."""

    def __init__(self, table: Table):
        self._table = table
        self._groups: dict[tuple[str, str | None], Titles] = {}
        self._other_weight: list[int] = []
        self._first_date: tuple[int, str] | None = None  # its row and form, which all others must have

    def add(self, group: str, traits: Traits, row: int) -> Titles:
        """The group of a row, which must share its context.

        Raises:
            UserError: it does not, or its date is of another form than the first one.
        """
        titles = self._groups.setdefault((group, traits.stratum), Titles(group, traits))
        if traits.context != titles.traits.context:
            raise UserError(
                f"Row {row} of {self._table.name} has another context than the first row of its group.",
                "Add the column of the context to --group.",
            )
        if traits.weight != titles.traits.weight:
            self._other_weight.append(row)
        if traits.date is not None:
            form = form_of(traits.date)
            self._first_date = self._first_date or (row, form)
            if form != self._first_date[1]:
                raise mixed_forms(self._first_date, (row, form), self._table.name)
            titles.dates[traits.date] = None
        return titles

    def groups(self) -> list[Titles]:
        """All of them.

        Raises:
            UserError: rows of one group differ in weight.
        """
        if rows := self._other_weight:
            raise UserError(
                f"{self._table.name} has groups with several weights: the weight differs from that of the "
                f"group's first row in {all_rows_named(rows)}.",
                "Give all rows of a group the same weight.",
            )
        return list(self._groups.values())


def gather(
    table: Table, columns: Columns, issues: IssueLog, evidence: Callable[[dict[str, Any]], Any], missing: str
) -> list[Titles]:
    """Titles, stripped, by group and stratum. Rows whose ``evidence`` is None are counted as ``missing``."""

    def parse(row: dict[str, Any]) -> tuple[str | None, Traits, Any]:
        text, context = text_and_context(row, columns)
        return text and text.strip(), Traits.of(row, columns, context), evidence(row)

    gathering = Gathering(table)
    for number, (text, traits, known) in parsed_rows(table, parse):
        group = traits.group if columns.group else ""
        if text is None:
            issues.add("blank-text", number)
        elif group is None:
            issues.add("no-group", number)
        elif columns.compare_within and traits.stratum is None:
            issues.add("no-compare", number)
        elif known is None:
            issues.add(missing, number)
        else:
            count_lost(text, number, issues)
            gathering.add(group, traits, number).met.append((number, text, known))
    return gathering.groups()


# ---------------------------------------------------------------------------------------------------------------------
# Clicks, grades


def _read_clicks(table: Table, columns: Columns, data: DataConfig, issues: IssueLog) -> Read:
    def counts(row: dict[str, Any]) -> tuple[float, float] | None:
        clicks = as_number(cell_of(row, columns.clicks), "clicks")
        impressions = as_number(cell_of(row, columns.impressions), "impressions")
        return None if clicks is None or impressions is None else (clicks, impressions)

    gathered = gather(table, columns, issues, counts, "no-count")
    shown = [[Shown(row, text, *known) for row, text, known in titles.met] for titles in gathered]
    check_counts(sorted((s for group in shown for s in group), key=lambda s: s.row), table.name)
    both = list(zip(gathered, shown, strict=True))
    groups = (
        click_group(met, titles.marked, min_impressions=data.min_impressions, issues=issues) for titles, met in both
    )
    kept = [group for group in groups if group is not None]
    return kept, tuple(_arms(titles, met) for titles, met in both)


def _arms(titles: Titles, shown: list[Shown]) -> Arms:
    index: dict[str, int] = {}
    return Arms(
        group=titles.group,
        row=shown[0].row,
        clicks=tuple(int(s.clicks) for s in shown),
        impressions=tuple(int(s.impressions) for s in shown),
        date=titles.date,
        titles=tuple(index.setdefault(s.text, len(index)) for s in shown),
    )


def _read_grades(table: Table, columns: Columns, data: DataConfig, issues: IssueLog) -> Read:
    gathered = gather(table, columns, issues, lambda row: as_number(cell_of(row, columns.grade), "grade"), "no-grade")
    groups = (_grade_group(titles, issues) for titles in gathered)
    return [group for group in groups if group is not None], ()


def _grade_group(titles: Titles, issues: IssueLog) -> RankGroup | None:
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
    return titles.marked(texts=tuple(rows), rows=tuple(rows.values()), grades=means)


# ---------------------------------------------------------------------------------------------------------------------
# Pairs


@dataclass(slots=True)
class _Pairs:
    """A group of pairs while it grows: its distinct texts, the first row of each, and who beat whom."""

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


def _read_pairs(table: Table, columns: Columns, data: DataConfig, issues: IssueLog) -> Read:
    """Pairs of one prompt (or, by flag, of one group) compete together, so that no text of theirs is scored twice."""
    gathering, pairs = Gathering(table), defaultdict[str, _Pairs](_Pairs)
    for number, pair in parsed_rows(table, lambda row: _pair(row, columns)):
        key = pair.traits.group if columns.group else pair.traits.context or f"row {number}"
        if pair.chosen is None or pair.rejected is None:
            issues.add("null-pair", number)
        elif pair.chosen == pair.rejected:
            issues.add("same-pair", number)
        elif key is None:
            issues.add("no-group", number)
        else:
            gathering.add(key, pair.traits, number)
            count_lost(pair.chosen + pair.rejected, number, issues)
            if pairs[key].add(pair.chosen, pair.rejected, pair.margin, number):
                issues.add("contradiction", number)
    groups = [(titles, pairs[titles.group]) for titles in gathering.groups()]
    return [
        titles.marked(texts=tuple(known.index), rows=tuple(known.rows), preferences=tuple(known.preferences))
        for titles, known in groups
    ], ()


@dataclass(frozen=True, slots=True)
class _Pair:
    chosen: str | None
    rejected: str | None
    traits: Traits
    margin: float | None


def _pair(row: dict[str, Any], columns: Columns) -> _Pair:
    chosen, prompt = as_side(cell_of(row, columns.chosen))
    rejected, other_prompt = as_side(cell_of(row, columns.rejected))
    if prompt != other_prompt and chosen and rejected:
        raise CellError("one prompt before chosen and rejected", "two different ones")
    margin = as_number(cell_of(row, columns.margin), "margin")
    if margin is not None and margin < 0:
        raise CellError("a margin of 0 or more", str(margin), "Swap chosen and rejected there.")
    context = as_context(cell_of(row, columns.context)) if columns.context else None
    if context and prompt:
        context = f"{context}\n{prompt}"
    traits = Traits.of(row, columns, context or prompt)
    return _Pair(chosen and chosen.strip(), rejected and rejected.strip(), traits, margin)


READERS = {"pairs": _read_pairs, "grades": _read_grades, "clicks": _read_clicks}
