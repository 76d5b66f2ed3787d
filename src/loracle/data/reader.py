"""Rows to examples. Rows that cannot be used are counted, with their numbers. Plain functions, from which each task chooses."""

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
from loracle.data.click_logs.counts import CLICK_ISSUES
from loracle.data.columns import Columns, cell_of
from loracle.data.groups import gather
from loracle.data.issues import IssueLog
from loracle.data.table import Table
from loracle.errors import UserError
from loracle.examples import LabeledText, RankGroup

Slices = tuple[tuple[str, str], ...]

ISSUES = {
    "blank-text": "rows without a text (null or blank), skipped",
    "no-label": "rows without a label (empty, null or NaN), skipped",
    "no-group": "rows without a group, skipped",
    "no-compare": "rows with an empty cell in a --compare-within column, skipped",
    "null-pair": "pairs with a null or blank side, skipped",
    "same-pair": "pairs of one and the same text, skipped",
    "contradiction": "pairs that contradict an earlier pair of their group, both kept",
    "no-grade": "rows without a grade, skipped",
    "mixed-grades": "rows that grade a title of their group again; grades averaged",
    "equal-grades": "groups whose titles all have the same grade, skipped",
    "no-count": "rows without clicks or impressions, skipped",
    "lost-character": "texts with U+FFFD in place of an unreadable character, kept",
    **CLICK_ISSUES,
}


@dataclass(frozen=True, slots=True)
class _Row:
    number: int
    text: str
    context: str | None
    labels: tuple[str, ...]
    weight: float
    slices: Slices


def read_labeled_texts(
    table: Table, columns: Columns, data: DataConfig, issues: IssueLog, *, several: bool, label_names: tuple[str, ...]
) -> tuple[tuple[str, ...], list[LabeledText]]:
    """Label names and labelled texts of a table.

    Args:
        several: whether a text may have several labels.
        label_names: of the training data, for a table to be tested on; empty to learn the names from this table.

    Raises:
        UserError: a cell cannot be read, or a label is not among ``label_names``.
    """
    class_names = table.label_names.get(columns.label or "", ())

    def parse(row: dict[str, Any]) -> tuple[str | None, str | None, tuple[str, ...] | None, float, Slices]:
        labels = as_labels(cell_of(row, columns.label), several, data.label_delimiter, class_names)
        slices = tuple((name, as_value(cell_of(row, name))) for name in columns.slice)
        return *text_and_context(row, columns), labels, as_weight(cell_of(row, columns.weight)), slices

    rows: list[_Row] = []
    first_rows: dict[str, int] = {}
    for number, (text, context, labels, weight, slices) in parsed_rows(table, parse):
        if text is None:
            issues.add("blank-text", number)
        elif labels is None:
            issues.add("no-label", number)
        else:
            count_lost(text, number, issues)
            rows.append(_Row(number, text, context, labels, weight, slices))
            for name in labels:
                first_rows.setdefault(name, number)

    names = {name: name for name in class_names} or order_labels(first_rows, table)
    label_names = label_names or tuple(dict.fromkeys(names.values()))
    index = {name: i for i, name in enumerate(label_names)}
    ids = {name: index[known_label(names.get(name, name), row, table, index)] for name, row in first_rows.items()}
    return label_names, [
        LabeledText(
            text=row.text,
            context=row.context,
            labels=tuple(sorted({ids[name] for name in row.labels})),
            row=row.number,
            weight=row.weight,
            slices=row.slices,
        )
        for row in rows
    ]


# --- tables without labels --------------------------------------------------------------------------------------------


def iter_texts(table: Table, columns: Columns) -> Iterator[tuple[int, dict[str, Any], str | None, str | None]]:
    """Row number, row, text and context of each row, streaming. The text is None where it is missing or blank."""
    for number, row in table.rows():
        try:
            text, context = text_and_context(row, columns)
        except CellError:
            text, context = None, None
        yield number, row, text, context


def read_unlabeled_texts(table: Table, columns: Columns) -> tuple[list[LabeledText], tuple[str, ...]]:
    """Texts without labels, and notes about skipped rows.

    Raises:
        UserError: no row has a text.
    """
    rows = list(iter_texts(table, columns))
    items = [LabeledText(text=t, labels=(), row=n, context=c) for n, _, t, c in rows if t is not None]
    if not items:
        raise UserError(f"No row of {table.name} has a text.", "Name the text column with --text.")
    skipped = len(rows) - len(items)
    return items, (f"{skipped:,} rows without a text, skipped",) if skipped else ()


def read_unlabeled_groups(table: Table, columns: Columns) -> tuple[list[RankGroup], tuple[str, ...]]:
    """Titles to rank, by group, and notes about skipped rows. Without a group column all titles are one group.

    Raises:
        UserError: a cell cannot be read, or no title is left.
    """
    issues = IssueLog(ISSUES)
    if not columns.group and columns.context:
        columns = dataclasses.replace(columns, group=(columns.context,))
    groups = []
    for titles in gather(table, columns, issues, lambda row: True, missing="no-group"):
        rows: dict[str, int] = {}
        for number, text, _ in titles.met:
            if text in rows:
                issues.add("repeated-title", number)
            rows.setdefault(text, number)
        groups.append(titles.marked(texts=tuple(rows), rows=tuple(rows.values())))
    notes = tuple(map(str, issues.issues()))
    if not groups:
        raise UserError(f"No title to rank in {table.name}: {'; '.join(notes)}.", "Correct or add rows.")
    return groups, notes
