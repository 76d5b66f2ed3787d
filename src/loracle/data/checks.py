"""What is in the data and what is wrong with it: counted, with row numbers."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from loracle.data.click_logs.allocation import Allocation, allocation
from loracle.data.issues import Issue
from loracle.data.reader import Examples
from loracle.data.splits import issue_of, without_titles
from loracle.errors import UserError
from loracle.examples import Arms, Example, LabeledText, RankGroup, Task

VERY_LONG = 100_000  # characters: far above any window, mostly a column or an encoding gone wrong
LARGEST, SMALLEST = 9, 3  # classes that ``Audit.lines`` shows; ``to_json`` has all


@dataclass(frozen=True, slots=True)
class Spread:
    """How a number is spread over the data."""

    low: float
    median: float
    p95: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        low, median, p95, high = np.quantile(values, (0, 0.5, 0.95, 1), method="higher")
        return cls(float(low), float(median), float(p95), float(high))

    def __str__(self) -> str:
        return f"min {self.low:,g} · median {self.median:,g} · p95 {self.p95:,g} · max {self.high:,g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """Counts of one table, and of its overlap with a second one. Characters, not tokens: no model is asked."""

    task: Task
    examples: int  # labelled texts, or groups
    texts: int  # of them all, repeated ones included
    characters: Spread
    classes: Mapping[str, int]  # label name -> texts that have it; empty when ranking
    titles: Spread | None  # per group; None when classifying
    preferences: int
    clicks: int
    impressions: int
    test_examples: int | None  # None without a test table
    issues: tuple[Issue, ...]
    allocation: Allocation | None = None  # of a click log

    def lines(self) -> list[str]:
        """What ``loracle check`` prints: a name and a fact a line, then each class, then each issue with its rows."""
        facts = self._ranking_facts() if self.task.kind == "rank" else self._class_facts()
        facts += [("characters", str(self.characters))]
        if self.test_examples is not None:
            facts.append(("test examples", f"{self.test_examples:,}"))
        dealt = ["", "allocation", *(f"  {line}" for line in self.allocation.lines())] if self.allocation else []
        return [*_aligned(facts), *self._class_lines(), *dealt, *self._issue_lines()]

    def to_json(self) -> dict[str, Any]:
        """Plain values, in the order of the fields."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}

    def _class_facts(self) -> list[tuple[str, str]]:
        task = {"single": "one label a text", "multi": "any number of labels a text"}[self.task.kind]
        counts = self.classes.values()
        spread = f"{len(counts):,}" + (f", of {min(counts):,} to {max(counts):,} texts" if counts else "")
        return [("task", task), ("texts", f"{self.texts:,}"), ("classes", spread)]

    def _ranking_facts(self) -> list[tuple[str, str]]:
        facts = [("task", f"ranking from {self.task.evidence}"), ("groups", f"{self.examples:,}")]
        facts += [("titles", f"{self.texts:,}"), ("titles per group", str(self.titles))]
        if self.preferences:
            facts.append(("preferences", f"{self.preferences:,}"))
        if self.impressions:
            rate = self.clicks / self.impressions
            facts += [("impressions", f"{self.impressions:,}"), ("clicks", f"{self.clicks:,} ({rate:.2%})")]
        return facts

    def _class_lines(self) -> list[str]:
        if not self.classes:
            return []
        by_size = sorted(self.classes.items(), key=lambda item: -item[1])
        shown = _aligned([(_short(name), f"{count:>9,}") for name, count in by_size], indent="  ")
        if (between := len(shown) - LARGEST - SMALLEST) > 0:
            shown[LARGEST:-SMALLEST] = [f"  ... {between:,} classes between"]
        return ["", "texts per class", *shown]

    def _issue_lines(self) -> list[str]:
        return (
            ["", "noticed", *(f"  {issue}" for issue in self.issues)]
            if self.issues
            else ["", "nothing unusual noticed"]
        )


def audit(examples: Examples, test: Examples | None = None) -> Audit:
    """Count what is in ``examples``, what the schema already noticed, and what stands in ``test`` as well."""
    items, task = examples.items, examples.task
    groups = [item for item in items if isinstance(item, RankGroup)]
    labelled = [item for item in items if isinstance(item, LabeledText)]
    texts = list(_texts(items))
    found = _group_issues(groups) if task.kind == "rank" else _label_issues(labelled, task)
    dealt = allocation(examples.arms or _arms(groups)) if task.evidence == "clicks" else None
    return Audit(
        task=task,
        examples=len(items),
        texts=len(texts),
        characters=Spread.of([len(text) for text, _ in texts] or [0]),
        classes=_class_counts(labelled, task),
        titles=Spread.of([len(group.texts) for group in groups] or [0]) if task.kind == "rank" else None,
        preferences=sum(len(group.preferences) for group in groups),
        clicks=sum(sum(group.clicks or ()) for group in groups),
        impressions=sum(sum(group.impressions or ()) for group in groups),
        test_examples=None if test is None else len(test.items),
        issues=(
            *examples.issues, *_odd_texts(texts), *found, *_uneven(dealt), *(_leaks(items, test.items) if test else ()),
        ),
        allocation=dealt,
    )  # fmt: skip


def check_trainable(examples: Examples) -> None:
    """Say no to data from which nothing can be learnt.

    Raises:
        UserError: fewer than two distinct texts, the same labels on all of them, no group, or no group in which one
            title did better than another.
    """
    if examples.task.kind == "rank":
        _refuse_groups([item for item in examples.items if isinstance(item, RankGroup)])
    else:
        _refuse_texts([item for item in examples.items if isinstance(item, LabeledText)], examples.task)


def without_leaks(train_items: Sequence[Example], test_items: Sequence[Example]) -> tuple[list[Any], tuple[Issue, ...]]:
    """The training examples less what the test file has too, and what was left out; the test file stays whole.

    A labelled text recurs if text and context do (stripped), a title wherever it is shown. Groups keep other titles.
    """
    groups = [item for item in train_items if isinstance(item, RankGroup)]
    if groups:
        tested_titles = {text.strip() for text, _ in _texts(test_items)}
        return without_titles(groups, tested_titles, "leak", "titles that the test file has too")
    tested = {item.identity for item in test_items if isinstance(item, LabeledText)}
    labelled = [item for item in train_items if isinstance(item, LabeledText)]
    leaked = [item.row for item in labelled if item.identity in tested]
    kept = [item for item in labelled if item.identity not in tested]
    return kept, issue_of("leak", "texts that the test file has too, left out", leaked)


# --- labelled texts ---------------------------------------------------------------------------------------------------


def _class_counts(items: Sequence[LabeledText], task: Task) -> dict[str, int]:
    counts = Counter(label for item in items for label in item.labels)
    return {name: counts[i] for i, name in enumerate(task.label_names)}


def _label_issues(items: Sequence[LabeledText], task: Task) -> Iterator[Issue]:
    by_text: dict[Hashable, list[LabeledText]] = {}
    for item in items:
        by_text.setdefault(item.identity, []).append(item)
    several = [same for same in by_text.values() if len(same) > 1]
    conflicts = [same for same in several if len({item.labels for item in same}) > 1]
    yield from issue_of("duplicate", "rows that repeat an earlier text", (i.row for same in several for i in same[1:]))
    yield from issue_of("conflict", "rows of equal texts with different labels", (i.row for c in conflicts for i in c))
    counts = Counter(label for item in items for label in item.labels)
    rare = [item.row for item in items for label in item.labels if counts[label] == 1]
    yield from issue_of("rare-class", "classes with a single text", rare)
    if task.kind == "multi":
        yield from issue_of("no-class", "texts without any label", (item.row for item in items if not item.labels))


def _refuse_texts(items: Sequence[LabeledText], task: Task) -> None:
    texts = {item.identity for item in items}
    if len(texts) < 2:
        raise UserError("at least 2 distinct texts", f"{len(texts)} in {len(items)} rows", "add examples")
    if len({item.labels for item in items}) > 1:
        return
    names = ", ".join(repr(task.label_names[label]) for label in items[0].labels) or "no label"
    raise UserError(
        "at least 2 classes", f"{names} on each of {len(items):,} texts (rows {items[0].row} to {items[-1].row})",
        "add texts of another class, or name another column with --label",
    )  # fmt: skip


# --- groups -----------------------------------------------------------------------------------------------------------


def _group_issues(groups: Sequence[RankGroup]) -> Iterator[Issue]:
    groups_of = Counter(text for text, _ in {(text.strip(), group.group) for group in groups for text in group.texts})
    several = {text: row for group in groups for text, row in _titles(group) if groups_of[text] > 1}
    yield from issue_of("several-groups", "titles that stand in more than one group", several.values())
    alike = [group.rows[0] for group in groups if not _tells_apart(group)]
    yield from issue_of("no-difference", "groups in which no title did better than another", alike)
    yield from issue_of("contradiction-across", "pairs that another group orders the other way", _contradicted(groups))


def _arms(groups: Sequence[RankGroup]) -> list[Arms]:
    """What groups show that came from no log."""
    return [
        Arms(group=group.group, row=group.rows[0], clicks=group.clicks, impressions=group.impressions, date=group.date)
        for group in groups
        if group.clicks is not None and group.impressions is not None
    ]


def _uneven(dealt: Allocation | None) -> Iterator[Issue]:
    if dealt is not None and dealt.uneven:
        message = f"groups not shown in equal shares, so that chance may not have dealt them out: {dealt.failing:,}"
        yield Issue("uneven-allocation", message, dealt.failing, dealt.rows)


def _contradicted(groups: Sequence[RankGroup]) -> list[int]:
    """Row of the winner of each preference that another group, with the same context, has the other way round.

    Within a group the schema has counted them already.
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


def _tells_apart(group: RankGroup) -> bool:
    """Whether its evidence says of any two titles which is the better one."""
    if group.clicks is not None and group.impressions is not None:
        clicks, shown = sum(group.clicks), sum(group.impressions)
        return any(c * shown != clicks * n for c, n in zip(group.clicks, group.impressions, strict=True))
    if group.grades is not None:
        return len(set(group.grades)) > 1
    balance = Counter((p.winner, p.loser) for p in group.preferences)
    return any(count > balance[loser, winner] for (winner, loser), count in balance.items())


def _refuse_groups(groups: Sequence[RankGroup]) -> None:
    if len(groups) == 0:
        raise UserError("groups of at least 2 titles", "none", "name the column that tells groups apart with --group")
    if not any(_tells_apart(group) for group in groups):
        raise UserError(
            "a group in which one title did better than another",
            f"none among {len(groups):,} (rows {groups[0].rows[0]} to {groups[-1].rows[-1]})",
            "check the clicks, the grades or the preferences",
        )  # fmt: skip


# --- both -------------------------------------------------------------------------------------------------------------


def _titles(group: RankGroup) -> Iterator[tuple[str, int]]:
    for text, row in zip(group.texts, group.rows, strict=True):
        yield text.strip(), row


def _texts(items: Iterable[Example]) -> Iterator[tuple[str, int]]:
    """Every text, as it stands, with its row."""
    for item in items:
        if isinstance(item, LabeledText):
            yield item.text, item.row
        else:
            yield from zip(item.texts, item.rows, strict=True)


def _odd_texts(texts: Sequence[tuple[str, int]]) -> Iterator[Issue]:
    yield from issue_of("empty", "texts that are empty", (row for text, row in texts if not text.strip()))
    very_long = (row for text, row in texts if len(text) > VERY_LONG)
    yield from issue_of("very-long", f"texts of more than {VERY_LONG:,} characters", very_long)


def _leaks(items: Iterable[Example], test_items: Iterable[Example]) -> tuple[Issue, ...]:
    """What ``without_leaks`` would leave out."""
    tested = {known for item in test_items for known, _ in _known_by(item)}
    rows = [row for item in items for known, row in _known_by(item) if known in tested]
    return issue_of("leak", "texts that the test file has too", rows)


def _known_by(item: Example) -> Iterator[tuple[Hashable, int]]:
    """By what a text is the same in another table, with its row: a title by itself, else with its context."""
    if isinstance(item, LabeledText):
        yield item.identity, item.row
    else:
        yield from _titles(item)


# --- how it looks -----------------------------------------------------------------------------------------------------


def _aligned(facts: Sequence[tuple[str, str]], indent: str = "") -> list[str]:
    width = max(len(name) for name, _ in facts)
    return [f"{indent}{name:<{width}}  {fact}" for name, fact in facts]


def _short(name: str) -> str:
    """A label name on one line, whatever stands in it."""
    line = " ".join(name.split())
    return line if len(line) <= 40 else f"{line[:39]}…"


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    return dict(value) if isinstance(value, Mapping) else value
