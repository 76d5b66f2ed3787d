"""Rows become ``LabeledText`` or ``RankGroup``, as the columns say, and what cannot is counted."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from loracle.config import DataConfig
from loracle.data.cells import (
    CellError,
    as_labels,
    as_value,
    as_weight,
    count_lost,
    known_label,
    order_labels,
    parsed_rows,
    text_and_context,
)
from loracle.data.click_logs.aggregation import sum_events
from loracle.data.click_logs.counts import CLICK_ISSUES
from loracle.data.columns import Columns, cell_of, infer_columns, task_of
from loracle.data.groups import READERS, gather
from loracle.data.issues import Issue, IssueLog
from loracle.data.table import Table
from loracle.errors import UserError
from loracle.examples import Arms, LabeledText, RankGroup, Task

Slices = tuple[tuple[str, str], ...]

ISSUES = {
    "blank-text": "rows without a text (null or blank), skipped",
    "no-label": "rows without a label (empty, null or NaN), skipped",
    "no-group": "rows without a group, skipped",
    "no-compare": "rows without what they are compared by, skipped",
    "null-pair": "pairs with a null or blank side, skipped",
    "same-pair": "pairs of one and the same text, skipped",
    "contradiction": "pairs that contradict an earlier pair of their group, both kept",
    "no-grade": "rows without a grade, skipped",
    "mixed-grades": "rows that grade a title of their group anew, its grades averaged",
    "equal-grades": "groups whose titles all have the same grade, skipped since they prefer nothing",
    "no-count": "rows without clicks or impressions, skipped",
    "lost-character": "texts with U+FFFD in place of a character that could not be read, kept",
    **CLICK_ISSUES,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Examples:
    """A table, read: what is learnt, the examples, what was not used as it stood, and all that a click log showed."""

    task: Task
    items: list[LabeledText] | list[RankGroup]
    columns: Columns
    issues: tuple[Issue, ...] = ()
    arms: tuple[Arms, ...] = ()


def read_examples(
    table: Table, data: DataConfig, *, task: Task | None = None, columns: Columns | None = None
) -> Examples:
    """Every example of a table.

    Args:
        task: of the training data, for a table to be tested on; its labels are then the only ones, in its order.
        columns: if they are known, else inferred.

    Raises:
        UserError: a column is missing, a cell cannot be read, a label is unknown, or no example is left.
    """
    if columns is None:
        found, columns = infer_columns(table, data, task)
    else:
        found = task_of(table, columns, data)
    issues = IssueLog(ISSUES)
    items: list[LabeledText] | list[RankGroup]
    arms: tuple[Arms, ...] = ()
    if found.kind == "rank":
        task = found
        summed = sum_events(table, columns, issues) if columns.clicked else (table, columns)
        items, arms = READERS[columns.evidence or "pairs"](*summed, data, issues)
    else:
        task, items = _read_texts(table, columns, data, task or found, issues)
    if not items:
        reasons = "; ".join(map(str, issues.issues()))
        raise UserError("examples to learn from", f"none left of {table.name}: {reasons}", "mend or add rows")
    return Examples(task=task, items=items, columns=columns, issues=issues.issues(), arms=arms)


def _read_texts(
    table: Table, columns: Columns, data: DataConfig, task: Task, issues: IssueLog
) -> tuple[Task, list[LabeledText]]:
    class_names = table.label_names.get(columns.label or "", ())

    def parse(row: dict[str, Any]) -> tuple[str | None, str | None, tuple[str, ...] | None, float, Slices]:
        labels = as_labels(cell_of(row, columns.label), task.kind, data.label_delimiter, class_names)
        slices = tuple((name, as_value(cell_of(row, name))) for name in columns.slice)
        return *text_and_context(row, columns), labels, as_weight(cell_of(row, columns.weight)), slices

    kept: list[tuple[int, str, str | None, tuple[str, ...], float, Slices]] = []
    first_rows: dict[str, int] = {}
    for number, (text, context, labels, weight, slices) in parsed_rows(table, parse):
        if text is None:
            issues.add("blank-text", number)
        elif labels is None:
            issues.add("no-label", number)
        else:
            count_lost(text, number, issues)
            kept.append((number, text, context, labels, weight, slices))
            for name in labels:
                first_rows.setdefault(name, number)

    names = {name: name for name in class_names} or order_labels(first_rows, table)
    task = task if task.label_names else dataclasses.replace(task, label_names=tuple(dict.fromkeys(names.values())))
    index = {name: i for i, name in enumerate(task.label_names)}
    ids = {name: index[known_label(names.get(name, name), row, table, index)] for name, row in first_rows.items()}
    return task, [
        LabeledText(
            text=text,
            context=context,
            labels=tuple(sorted({ids[n] for n in labels})),
            row=number,
            weight=weight,
            slices=slices,
        )
        for number, text, context, labels, weight, slices in kept
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Tables without labels


def iter_texts(table: Table, columns: Columns) -> Iterator[tuple[int, dict[str, Any], str | None, str | None]]:
    """(row number, row, text, context) of each row, streaming; the text is None where it is missing, blank or none."""
    for number, row in table.rows():
        try:
            text, context = text_and_context(row, columns)
        except CellError:
            text, context = None, None
        yield number, row, text, context


def read_unlabelled_groups(table: Table, columns: Columns) -> tuple[list[RankGroup], tuple[Issue, ...]]:
    """Titles to be ranked, by group, or all in one group where no column tells groups apart; a title may stand alone.

    Raises:
        UserError: a cell cannot be read, or no title is left.
    """
    issues = IssueLog(ISSUES)
    if not columns.group and columns.context:
        columns = dataclasses.replace(columns, group=(columns.context,))
    gathered = gather(table, columns, issues, lambda row: True, missing="no-group")
    groups = []
    for titles in gathered:
        rows: dict[str, int] = {}
        for number, text, _ in titles.met:
            if text in rows:
                issues.add("repeated-title", number)
            rows.setdefault(text, number)
        groups.append(titles.marked(texts=tuple(rows), rows=tuple(rows.values())))
    if not groups:
        reasons = "; ".join(map(str, issues.issues()))
        raise UserError("titles to rank", f"none in {table.name}: {reasons}", "mend or add rows")
    return groups, issues.issues()
