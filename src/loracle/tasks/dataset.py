"""From a table to the examples of the task that fits it, and to training, validation and test."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from loracle.config import DataConfig, RunConfig
from loracle.data.checks import DataReport, Quantiles, text_issues
from loracle.data.columns import Columns, assumptions, check_flags, check_flags_used, group_columns
from loracle.data.issues import Issue, IssueLog
from loracle.data.reader import ISSUES
from loracle.data.sources import fingerprint, open_splits, open_table
from loracle.data.table import Table
from loracle.errors import Log, UserError
from loracle.examples import Arms
from loracle.tasks import TASKS, Task

AUTO = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class Examples:
    """A table, read: the task, its examples, the columns, what was skipped, and all that a click log showed."""

    task: Task
    items: list[Any]
    columns: Columns
    issues: tuple[Issue, ...] = ()
    arms: tuple[Arms, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """Training, validation and test examples, which share no text, and notes on how they were separated."""

    task: Task
    train: list[Any]
    validation: list[Any]
    test: list[Any]
    issues: tuple[Issue, ...] = ()
    checksums: dict[str, str] = field(default_factory=dict)
    columns: dict[str, str] = field(default_factory=dict)  # role -> the columns it was read from, joined by commas

    @property
    def splits(self) -> dict[str, list[Any]]:
        """``{name: examples}`` of all three."""
        return {"train": self.train, "validation": self.validation, "test": self.test}


def infer_task(table: Table, data: DataConfig) -> tuple[Task, Columns]:
    """The task that a table is for, without label names, and which column is what.

    Flags win, then names, then the content of the columns. ``--task`` names the task.

    Raises:
        UserError: a named column does not exist, or nothing tells the text or the evidence.
    """
    check_flags(data)
    names = list(TASKS) if data.task == AUTO else [data.task]
    for name in names:
        task = Task(name=name)
        columns = task.reading.infer(table, data)
        if columns is not None and (data.task != AUTO or task.reading.fits(table, columns, data)):
            if data.group and not columns.group and group_columns(table, data):
                break
            return task, _checked(task, columns, data)
    raise UserError(
        f"With --group, {table.name} needs a column that tells which text is better "
        f"(columns: {', '.join(map(repr, table.columns))}).",
        "Name it with --clicks and --impressions, --clicked, or --grade.",
    )


def columns_for(table: Table, data: DataConfig, task: Task) -> Columns:
    """The columns of a table that is to be read for a known task.

    Raises:
        UserError: the table has nothing that this task learns from.
    """
    check_flags(data)
    if (columns := task.reading.infer(table, data)) is None:
        raise UserError(
            f"{table.name} has {task.reading.missing_evidence(table, data) or 'no such columns'} "
            f"(columns: {', '.join(map(repr, table.columns))}).",
            "Name the columns: --label, or --group with --clicks and --impressions, --clicked, or --grade.",
        )
    return _checked(task, columns, data)


def _checked(task: Task, columns: Columns, data: DataConfig) -> Columns:
    check_flags_used(columns, data)
    lines = (f"task: {task.reading.description}", *assumptions(columns))
    return dataclasses.replace(columns, lines=lines)


def read_examples(table: Table, data: DataConfig, *, task: Task | None = None) -> Examples:
    """Every example of a table.

    Args:
        task: of the training data, for a table to be tested on. Its labels are then the only ones, in its order.

    Raises:
        UserError: a column is missing, a cell cannot be read, a label is unknown, or no example is left.
    """
    if task is None:
        task, columns = infer_task(table, data)
    else:
        columns = columns_for(table, data, task)
    issues = IssueLog(ISSUES)
    result = task.reading.read(table, columns, data, issues, task.label_names)
    if not result.items:
        reasons = "; ".join(map(str, issues.issues()))
        raise UserError(f"No example is left of {table.name}: {reasons}.", "Correct or add rows.")
    if not task.label_names:
        task = dataclasses.replace(task, label_names=result.label_names)
    return Examples(task=task, items=result.items, columns=columns, issues=issues.issues(), arms=result.arms)


def check_examples(examples: Examples, test: Examples | None = None) -> DataReport:
    """Count the examples, what reading them skipped, and the texts that ``test`` has too."""
    reading, items = examples.task.reading, examples.items
    counts = reading.count(items, examples.task, examples.arms)
    texts = [text for item in items for text in item.texts]
    leaks = reading.remove_leaks(items, test.items)[1] if test else ()
    return DataReport(
        task=examples.task.name,
        examples=len(items),
        texts=len(texts),
        characters=Quantiles.of([len(text) for text in texts] or [0]),
        counts=counts,
        test_examples=None if test is None else len(test.items),
        issues=(*examples.issues, *text_issues(items), *counts.issues, *leaks),
    )


def prepare_data(config: RunConfig, log: Log) -> Data:
    """Read the data that a config names, check them, and split them.

    Raises:
        UserError: data that cannot be read or learnt from.
    """
    where = config.data
    tables = open_splits(where.data)
    examples = read_examples(tables["train"], where)
    for line in examples.columns.lines:
        log(line)
    if where.test:
        test: Examples | None = read_examples(open_table(where.test), where, task=examples.task)
    else:
        test = _labeled_split(tables.get("test"), where, examples.task, log)
    validation = _labeled_split(tables.get("validation"), where, examples.task, log)
    data = split_data(config, examples, test, validation)
    for issue in data.issues:
        log(f"note: {issue}")
    checksums = {name: fingerprint(path) for name, path in (("train", where.data), ("test", where.test)) if path}
    columns = {role: ",".join(names) for role, names in examples.columns.named().items()}
    return dataclasses.replace(data, checksums=checksums, columns=columns)


def _labeled_split(table: Table | None, where: DataConfig, task: Task, log: Log) -> Examples | None:
    """A split that a data set brings along. None if it has no labels, as the test splits of some benchmarks."""
    if table is None:
        return None
    try:
        return read_examples(table, where, task=task)
    except UserError as e:
        log(f"note: {table.name} is not used; a part of the training data is held out instead ({e.message})")
        return None


def split_data(
    config: RunConfig, examples: Examples, test: Examples | None = None, validation: Examples | None = None
) -> Data:
    """Training, validation and test without a common text. What the user gave no file for is split off, seeded.

    Raises:
        UserError: nothing can be learnt, or one of the three is empty.
    """
    task, seed = examples.task, config.train.seed
    reading, items = task.reading, list(examples.items)
    reading.check_trainable(items, task)
    issues = [*check_examples(examples).issues]
    issues += [*(test.issues if test else ()), *(validation.issues if validation else ())]
    if test:
        items, leaks = reading.remove_leaks(items, test.items)
        test_items = list(test.items)
        issues += leaks
    else:
        split = reading.split(items, config.data.test_share, seed, task)
        items, test_items, issues = split.train, split.held_out, [*issues, *split.notes]
    if validation:
        validation_items, leaks = reading.remove_leaks(validation.items, test_items)
        issues += leaks
        items, leaks = reading.remove_leaks(items, validation_items)
        issues += leaks
    else:
        split = reading.split(items, config.data.validation_share, seed + 1, task)
        items, validation_items, issues = split.train, split.held_out, [*issues, *split.notes]
    if not items or not validation_items:
        name = "validation" if items else "training"
        raise UserError(f"No {name} example is left without the texts of the test examples.", "Give more data.")
    reading.check_trainable(items, task)
    return Data(task=task, train=items, validation=validation_items, test=test_items, issues=tuple(issues))
