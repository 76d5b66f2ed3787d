"""Counts of the data and what looks wrong with them, with row numbers. Plain functions, from which each task chooses.

Characters are counted, not tokens: no model is needed.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from loracle.data.click_logs.allocation import Allocation
from loracle.data.issues import Issue
from loracle.data.splits import issue_of, without_titles
from loracle.errors import UserError
from loracle.examples import Arms, Example, LabeledText, RankGroup, texts_of

VERY_LONG = 100_000  # characters: far above any window, mostly a wrong column or encoding
LARGEST, SMALLEST = 9, 3  # classes that ``class_lines`` shows; ``to_json`` has all

Facts = list[tuple[str, str]]  # name and value


@dataclass(frozen=True, slots=True)
class Quantiles:
    """Minimum, median, 95th percentile and maximum of a number over the data."""

    low: float
    median: float
    p95: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Quantiles:
        """Quantiles of at least one value."""
        low, median, p95, high = np.quantile(values, (0, 0.5, 0.95, 1), method="higher")
        return cls(float(low), float(median), float(p95), float(high))

    def __str__(self) -> str:
        return f"min {self.low:,g} · median {self.median:,g} · p95 {self.p95:,g} · max {self.high:,g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """What a task counts in its examples: facts for people, plain values for JSON, further lines, and issues."""

    facts: Facts
    values: Mapping[str, Any]
    lines: list[str] = field(default_factory=list)
    issues: tuple[Issue, ...] = ()
    allocation: Allocation | None = None  # of a click log


@dataclass(frozen=True, slots=True, kw_only=True)
class DataReport:
    """What ``loracle check`` shows of one table, and of its overlap with a test table."""

    task: str
    examples: int
    texts: int  # of all examples, repeated ones included
    characters: Quantiles
    counts: Counts
    test_examples: int | None  # None without a test table
    issues: tuple[Issue, ...]

    def lines(self) -> list[str]:
        """Facts, one a line, then the task's own lines, then each issue with its rows."""
        facts = [*self.counts.facts, ("characters", str(self.characters))]
        if self.test_examples is not None:
            facts.append(("test examples", f"{self.test_examples:,}"))
        allocation = self.counts.allocation
        shares = ["", "allocation", *(f"  {line}" for line in allocation.lines())] if allocation else []
        issues = ["", "issues", *(f"  {issue}" for issue in self.issues)] if self.issues else ["", "no issues found"]
        return [*aligned(facts), *self.counts.lines, *shares, *issues]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        values = {"task": self.task, "examples": self.examples, "texts": self.texts, "characters": self.characters}
        values |= {**self.counts.values, "test_examples": self.test_examples, "issues": self.issues}
        return {name: _plain(value) for name, value in {**values, "allocation": self.counts.allocation}.items()}


# --- labelled texts ---------------------------------------------------------------------------------------------------


def class_counts(items: Sequence[LabeledText], label_names: Sequence[str]) -> dict[str, int]:
    """``{label name: texts that have it}``."""
    counts = Counter(label for item in items for label in item.labels)
    return {name: counts[i] for i, name in enumerate(label_names)}


def class_lines(counts: Mapping[str, int]) -> list[str]:
    """A line for each class, the largest first. Of many classes the ones in the middle are left out."""
    if not counts:
        return []
    by_size = sorted(counts.items(), key=lambda item: -item[1])
    lines = aligned([(_short(name), f"{count:>9,}") for name, count in by_size], indent="  ")
    if (between := len(lines) - LARGEST - SMALLEST) > 0:
        lines[LARGEST:-SMALLEST] = [f"  ... {between:,} classes between"]
    return ["", "texts per class", *lines]


def label_issues(items: Sequence[LabeledText]) -> Iterator[Issue]:
    """Duplicates, contradictions and classes with a single text."""
    by_text: dict[Hashable, list[LabeledText]] = {}
    for item in items:
        by_text.setdefault(item.identity, []).append(item)
    repeated = [copies for copies in by_text.values() if len(copies) > 1]
    conflicts = [copies for copies in repeated if len({item.labels for item in copies}) > 1]
    duplicates = (item.row for copies in repeated for item in copies[1:])
    yield from issue_of("duplicate", "rows that repeat an earlier text", duplicates)
    yield from issue_of("conflict", "rows of equal texts with different labels", (i.row for c in conflicts for i in c))
    counts = Counter(label for item in items for label in item.labels)
    rare = [item.row for item in items for label in item.labels if counts[label] == 1]
    yield from issue_of("rare-class", "classes with a single text", rare)


def check_labels(items: Sequence[LabeledText], label_names: Sequence[str]) -> None:
    """Check that labels can be learnt.

    Raises:
        UserError: fewer than two distinct texts, or the same labels on all of them.
    """
    texts = {item.identity for item in items}
    if len(texts) < 2:
        raise UserError(f"Only {len(texts)} distinct texts in {len(items)} rows; 2 are needed.", "Add examples.")
    if len({item.labels for item in items}) > 1:
        return
    names = ", ".join(repr(label_names[label]) for label in items[0].labels) or "no label"
    raise UserError(
        f"Every text has the same label: {names} on {len(items):,} texts (rows {items[0].row} to {items[-1].row}).",
        "Add texts of another class, or name another column with --label.",
    )


def remove_leaked_texts(
    train: Sequence[LabeledText], test: Sequence[LabeledText]
) -> tuple[list[LabeledText], tuple[Issue, ...]]:
    """Training texts without those of the test file (equal text and context, stripped), and the issue about them."""
    known = {item.identity for item in test}
    rows = [item.row for item in train if item.identity in known]
    kept = [item for item in train if item.identity not in known]
    return kept, issue_of("leak", "texts that the test file has too, left out", rows)


# --- groups -----------------------------------------------------------------------------------------------------------


def group_issues(groups: Sequence[RankGroup]) -> Iterator[Issue]:
    """Titles in several groups, groups without a better title, and pairs that other groups contradict."""
    groups_of = Counter(text for text, _ in {(text.strip(), group.group) for group in groups for text in group.texts})
    shared = {text: row for group in groups for text, row in titles_of(group) if groups_of[text] > 1}
    yield from issue_of("several-groups", "titles in more than one group", shared.values())
    alike = [group.rows[0] for group in groups if not has_better_title(group)]
    yield from issue_of("no-difference", "groups in which no title did better than another", alike)
    yield from issue_of("contradiction-across", "pairs that another group orders the other way", _contradicted(groups))


def arms_of(groups: Sequence[RankGroup]) -> list[Arms]:
    """The impressions of click groups that come from no log."""
    return [
        Arms(group=group.group, row=group.rows[0], clicks=group.clicks, impressions=group.impressions, date=group.date)
        for group in groups
        if group.clicks is not None and group.impressions is not None
    ]


def allocation_issues(allocation: Allocation) -> Iterator[Issue]:
    """An issue where groups were not shown in equal shares."""
    if allocation.uneven:
        message = f"groups not shown in equal shares, so allocation may not be random: {allocation.failing:,}"
        yield Issue("uneven-allocation", message, allocation.failing, allocation.rows)


def has_better_title(group: RankGroup) -> bool:
    """Whether the evidence of a group orders any two of its titles."""
    if group.clicks is not None and group.impressions is not None:
        clicks, impressions = sum(group.clicks), sum(group.impressions)
        return any(c * impressions != clicks * n for c, n in zip(group.clicks, group.impressions, strict=True))
    if group.grades is not None:
        return len(set(group.grades)) > 1
    balance = Counter((p.winner, p.loser) for p in group.preferences)
    return any(count > balance[loser, winner] for (winner, loser), count in balance.items())


def check_groups(groups: Sequence[RankGroup]) -> None:
    """Check that an order can be learnt.

    Raises:
        UserError: there is no group, or no group in which one title did better than another.
    """
    if len(groups) == 0:
        raise UserError(
            "There is no group of at least 2 titles.", "Name the column that tells groups apart with --group."
        )
    if not any(has_better_title(group) for group in groups):
        raise UserError(
            f"In none of {len(groups):,} groups did one title do better than another "
            f"(rows {groups[0].rows[0]} to {groups[-1].rows[-1]}).",
            "Check the clicks, the grades or the preferences.",
        )


def remove_leaked_titles(
    train: Sequence[RankGroup], test: Sequence[RankGroup]
) -> tuple[list[RankGroup], tuple[Issue, ...]]:
    """Training groups without the titles of the test file, and the issues about them. Groups keep their other titles."""
    titles = {text for group in test for text, _ in titles_of(group)}
    return without_titles(list(train), titles, "leak", "titles that the test file has too")


def titles_of(group: RankGroup) -> Iterator[tuple[str, int]]:
    """Each title of a group, stripped, with its row."""
    for text, row in zip(group.texts, group.rows, strict=True):
        yield text.strip(), row


def _contradicted(groups: Sequence[RankGroup]) -> list[int]:
    """Row of the winner of each preference that another group with the same context has the other way round.

    Contradictions within a group are counted when the group is read.
    """
    beats: dict[tuple[str | None, str, str], set[int]] = {}  # context, winner, loser -> groups
    rows: dict[tuple[str | None, str, str], int] = {}
    for at, group in enumerate(groups):
        for p in group.preferences:
            key = (group.context, group.texts[p.winner].strip(), group.texts[p.loser].strip())
            beats.setdefault(key, set()).add(at)
            rows.setdefault(key, group.rows[p.winner])
    return [
        rows[context, winner, loser]
        for (context, winner, loser), at in beats.items()
        if beats.get((context, loser, winner), set()) - at
    ]


# --- any examples -----------------------------------------------------------------------------------------------------


def text_issues(items: Iterable[Example]) -> Iterator[Issue]:
    """Empty and very long texts."""
    texts = [(text, row) for item in items for text, row in zip(texts_of(item), item.rows, strict=True)]
    yield from issue_of("empty", "texts that are empty", (row for text, row in texts if not text.strip()))
    very_long = (row for text, row in texts if len(text) > VERY_LONG)
    yield from issue_of("very-long", f"texts of more than {VERY_LONG:,} characters", very_long)


# --- formatting -------------------------------------------------------------------------------------------------------


def aligned(facts: Sequence[tuple[str, str]], indent: str = "") -> list[str]:
    """Names and values in two columns."""
    width = max(len(name) for name, _ in facts)
    return [f"{indent}{name:<{width}}  {fact}" for name, fact in facts]


def _short(name: str) -> str:
    """A label name on one line of at most 40 characters."""
    line = " ".join(name.split())
    return line if len(line) <= 40 else f"{line[:39]}…"


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    return dict(value) if isinstance(value, Mapping) else value
