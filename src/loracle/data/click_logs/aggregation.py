"""A log with a row an impression becomes a table with a row a title, in memory that grows with the titles alone.

Polars scans the files, batch by batch. What it cannot scan (a JSON array, a TSV with its two ways to quote, texts in chat
messages, a file that it takes for broken) is first written out row by row by our own readers, which name the damage if
there is any.
"""

from __future__ import annotations

import datetime
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from loracle.data.cells import CellError, as_context, parsed_rows
from loracle.data.columns import Columns, cell_of
from loracle.data.dates import EXPECTED, NUMBER, as_date, form_of, mixed_forms
from loracle.data.formats import format_of
from loracle.data.issues import Issue, IssueLog, all_rows_named, rows_named
from loracle.data.table import ROW_NUMBER, Table, seekable
from loracle.errors import UserError

if TYPE_CHECKING:
    import polars as pl

DATE = "\0date"  # no user column has this name
SKIPPED = ("blank-text", "no-group", "no-compare", "no-clicked")
REFUSED = {
    "bad-clicked": ("0 or 1, or true or false, as clicked", "Name another column with --clicked, or correct the rows."),
    "bad-weight": ("a number of 0 or more as weight", "Correct or remove the rows."),
    "bad-date": (EXPECTED, "Correct or remove the rows, or leave out --date."),
}


class CannotScan(Exception):
    """Polars would not read this table as our readers do."""


def sum_events(table: Table, columns: Columns, issues: IssueLog) -> tuple[Table, Columns]:
    """The clicks and impressions of each title (stripped) of a group and of what it is compared by, and their columns.

    Titles stand in the order of their first rows and bear their numbers: running ones, which in CSV start with 2 and are
    the lines as long as no line break in a cell and no blank line in front of the header comes before.

    Args:
        issues: counts impressions without a text, a group, or a word on whether they were clicked.

    Raises:
        UserError: cells that are no click, no weight or no date; dates of several forms; impressions of one title that
            differ in weight.
    """
    import polars as pl

    columns = replace(columns, text=columns.text or columns.messages, messages=None)
    try:
        with _scanned(table, columns) as frame:
            titles, odd = _summed(frame, columns)
        if any("\0" in cell for title in titles for cell in title.values() if isinstance(cell, str)):
            raise CannotScan  # no text; and what Polars makes of half a surrogate pair in JSON
    except (CannotScan, pl.exceptions.PolarsError, pl.exceptions.PanicException):  # the last one is a BaseException
        with _written(table, columns) as frame:
            titles, odd = _summed(frame, columns)
    _refuse(titles, odd, table)
    for problem in filter(odd.__contains__, SKIPPED):
        issues.count(problem, *odd[problem])
    summed = replace(columns, clicked=None, clicks=_free("clicks", columns), impressions=_free("impressions", columns))
    rows = [(title[ROW_NUMBER], _cells(title, summed)) for title in titles]
    return Table(table.name, tuple(rows[0][1]) if rows else (), {}, lambda: iter(rows)), summed


def _free(name: str, columns: Columns) -> str:
    """The name, or a longer one where a column of the user's is called so."""
    while name in _needed(columns):
        name += " "
    return name


def _needed(columns: Columns) -> list[str]:
    return list(dict.fromkeys(column for names in columns.named().values() for column in names))


def _apart(columns: Columns) -> list[str]:
    """Columns that tell titles apart."""
    roles = columns.named()
    return list(
        dict.fromkeys(c for role in ("text", "group", "compare_within", "context") for c in roles.get(role, ()))
    )


def _cells(title: dict[str, Any], columns: Columns) -> dict[str, Any]:
    """A row of the summed table."""
    cells = {column: title[f"key {i}"] for i, column in enumerate(_apart(columns))}
    date = title["date"] if title["number"] is None else title["number"]
    known = {
        columns.weight: title["weight"],
        columns.date: str(int(date)) if isinstance(date, float) and date.is_integer() else date,
        columns.clicks: title["clicks"],
        columns.impressions: title["impressions"],
    }
    return cells | {column: cell for column, cell in known.items() if column is not None}


# ---------------------------------------------------------------------------------------------------------------------
# Scanning


@contextmanager
def _scanned(table: Table, columns: Columns) -> Iterator[pl.LazyFrame]:
    """The files as Polars reads them, with row numbers. Gzipped files are unpacked into temporary ones."""
    formats = {format_of(file.path) for file in table.files}
    if len(formats) != 1 or (format := formats.pop()) is None:
        raise CannotScan
    needed = _needed(columns)
    with ExitStack() as stack:
        paths = [stack.enter_context(seekable(file)) for file in table.files]
        frame = format.scan(table, paths, needed)
        if frame is None or any(dtype.is_nested() for dtype in frame.collect_schema().values()):
            raise CannotScan
        yield frame


@contextmanager
def _written(table: Table, columns: Columns) -> Iterator[pl.LazyFrame]:
    """What is needed of a table as our readers read it, as texts, through a file that is removed in the end."""
    import polars as pl

    def plain(row: dict[str, Any]) -> dict[str, str | None]:
        cells = {column: cell_of(row, column) for column in _needed(columns)}
        return {c: v.isoformat() if isinstance(v, datetime.date) else as_context(v) for c, v in cells.items()}

    with tempfile.NamedTemporaryFile("w", suffix=".jsonl", encoding="utf-8") as copy:
        for number, cells in parsed_rows(table, plain):
            copy.write(json.dumps({ROW_NUMBER: number, **cells}) + "\n")
        copy.flush()
        yield pl.scan_ndjson(copy.name, schema={ROW_NUMBER: pl.Int64, **dict.fromkeys(_needed(columns), pl.String)})


# ---------------------------------------------------------------------------------------------------------------------
# Summing


Odd = dict[str, tuple[int, list[int]]]
"""Rows that cannot be used: how many of a problem, and the first ones."""


def _summed(frame: pl.LazyFrame, columns: Columns) -> tuple[list[dict[str, Any]], Odd]:
    """Each title: its cells (``key 0``, …), clicks, impressions, first row, weights, latest date, its form; and odd rows."""
    import polars as pl

    marked = _marked(frame, columns)
    keys = ["form", *(f"key {i}" for i in range(len(_apart(columns))))]  # of forms there is one, or an error
    # Rows that are not used make one group a problem, whatever their cells, so that they cost no memory.
    found = (
        marked.with_columns(pl.when(pl.col("problem").is_null()).then(pl.col(key)).alias(key) for key in keys)
        .group_by("problem", *keys)
        .agg(
            pl.col("clicked").sum().cast(pl.Int64).alias("clicks"),
            pl.len().cast(pl.Int64).alias("impressions"),
            pl.col(ROW_NUMBER).min(),
            pl.col("weight").min(),
            pl.col("weight").max().alias("heaviest"),
            pl.col("date").max(),
            pl.col("number").max(),
        )
        .collect(engine="streaming")
        .sort(ROW_NUMBER)
    )
    odd = found.filter(pl.col("problem").is_not_null()).select("problem", "impressions").iter_rows()
    titles = found.filter(pl.col("problem").is_null()).drop("problem")
    return titles.to_dicts(), {problem: (count, _first_rows(marked, problem)) for problem, count in odd}


def _refuse(titles: list[dict[str, Any]], odd: Odd, table: Table) -> None:
    for problem, (expected, hint) in REFUSED.items():
        if problem in odd:
            count, rows = odd[problem]
            raise UserError(f"{table.name} has {count:,} rows without {expected}: {rows_named(rows, count)}.", hint)
    if rows := [title[ROW_NUMBER] for title in titles if title["weight"] != title["heaviest"]]:
        raise UserError(
            f"{table.name} has groups with several weights: titles that begin in {all_rows_named(rows)}.",
            "Give all rows of a group the same weight.",
        )
    forms: dict[str, int] = {}
    for title in titles:
        forms.setdefault(title["form"], title[ROW_NUMBER])  # its first row, for they are in that order
    if len(forms) > 1:
        first, other, *_ = ((row, form) for form, row in forms.items())
        raise mixed_forms(first, other, table.name)


def _first_rows(marked: pl.LazyFrame, problem: str) -> list[int]:
    import polars as pl

    odd = marked.filter(pl.col("problem") == problem).select(ROW_NUMBER)
    return sorted(odd.bottom_k(Issue.ROWS_NAMED, by=ROW_NUMBER).collect(engine="streaming")[ROW_NUMBER].to_list())


def _marked(frame: pl.LazyFrame, columns: Columns) -> pl.LazyFrame:
    """Row number, cells that tell titles apart, clicked, weight, date (also as a number), its form, and as ``problem`` what is
    odd about the row.
    """
    import polars as pl

    types = frame.collect_schema()
    text, apart = columns.text or "", _apart(columns)
    cells = {column: _present(column, types[column]) for column in _needed(columns)}
    said = cells[columns.clicked or ""].cast(pl.String).str.strip_chars().str.to_lowercase()
    clicked = pl.when(said.is_in(["1", "1.0", "true"])).then(1).when(said.is_in(["0", "0.0", "false"])).then(0)
    weight, bad_weight = _weight(cells.get(columns.weight or ""))
    date = _mapped(cells[columns.date], as_date) if columns.date else pl.lit(None, pl.String)
    problems = {
        "bad-clicked": clicked.is_null() & said.is_not_null() & (said != "nan"),
        "bad-weight": bad_weight,
        "bad-date": pl.col(DATE).is_null() if columns.date else pl.lit(False),
        "blank-text": cells[text].is_null(),
        "no-group": pl.any_horizontal(pl.lit(False), *(cells[c].is_null() for c in columns.group)),
        "no-compare": pl.any_horizontal(pl.lit(False), *(cells[c].is_null() for c in columns.compare_within)),
        "no-clicked": clicked.is_null(),
    }
    problem = pl.coalesce(pl.when(is_odd).then(pl.lit(name)) for name, is_odd in problems.items())
    if types[text] == pl.String:
        cells[text] = cells[text].str.strip_chars()
    return frame.with_columns(date.alias(DATE)).select(
        pl.col(ROW_NUMBER),
        *(cells[column].alias(f"key {i}") for i, column in enumerate(apart)),
        clicked.alias("clicked"),
        weight.alias("weight"),
        pl.col(DATE).alias("date"),
        pl.when(pl.col(DATE).str.contains(NUMBER)).then(pl.col(DATE)).cast(pl.Float64).alias("number"),
        (_mapped(pl.col(DATE), form_of) if columns.date else pl.lit(None, pl.String)).alias("form"),
        problem.alias("problem"),
    )


def _present(column: str, dtype: pl.DataType) -> pl.Expr:
    """A cell, null where it is blank or NaN."""
    import polars as pl

    cell = pl.col(column)
    if dtype == pl.String:
        return pl.when(cell.str.strip_chars() != "").then(cell)
    return cell.fill_nan(None) if dtype.is_float() else cell


def _weight(cell: pl.Expr | None) -> tuple[pl.Expr, pl.Expr]:
    """The weight, 1 where there is none, and whether it is a wrong one."""
    import polars as pl

    if cell is None:
        return pl.lit(1.0), pl.lit(False)
    said = cell.cast(pl.String).str.strip_chars().str.to_lowercase()
    number = said.cast(pl.Float64, strict=False)
    missing = said.is_null() | (said == "nan")
    fine = number.is_finite() & (number >= 0)
    return pl.when(missing).then(1.0).otherwise(number), ~missing & ~fine.fill_null(False)


def _mapped(cell: pl.Expr, read: Callable[[Any], str]) -> pl.Expr:
    """What our own reader makes of cells, once for each distinct one of a batch; null where it refuses."""
    import polars as pl

    def read_or_null(value: Any) -> str | None:
        try:
            return None if value is None else read(value)
        except CellError:
            return None

    def read_all(values: pl.Series) -> pl.Series:
        known = {value: read_or_null(value) for value in values.unique().to_list()}
        return pl.Series(values.name, [known[value] for value in values.to_list()], dtype=pl.String)

    return cell.map_batches(read_all, return_dtype=pl.String, is_elementwise=True)
