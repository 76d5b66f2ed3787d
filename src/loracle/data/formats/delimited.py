"""Text files read line by line: CSV, TSV, and plain text with one text a line."""

from __future__ import annotations

import csv
import itertools
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from loracle.data.table import (
    ROW_NUMBER,
    File,
    Format,
    Row,
    Table,
    empty_file_error,
    no_rows_error,
    read_lines,
    require_rows,
)
from loracle.errors import UserError

if TYPE_CHECKING:
    import polars as pl

MAX_CELL = 1 << 26  # characters; without a limit an unclosed quote reads the whole file into memory


def open_txt(file: File) -> Table:
    """One text a line. Blank lines stay, so that row numbers are line numbers."""

    def read() -> Iterator[Row]:
        return ((number, {"text": line.rstrip("\r\n")}) for number, line in enumerate(read_lines(file), 1))

    return require_rows(Table(file.name, ("text",), {}, read), empty_file_error(file))


def open_csv(file: File) -> Table:
    """A table whose delimiter is the one that cuts its header into most fields: comma, semicolon or tab."""
    return _open_delimited(file, _delimiter(file))


def open_tsv(file: File) -> Table:
    """A table with tabs between its fields."""
    _header_line(file)
    return _open_delimited(file, "\t")


def scan_csv(table: Table, paths: list[Path], columns: list[str]) -> pl.LazyFrame | None:
    """The files as Polars reads them; None where their delimiters differ.

    Row numbers of a single file start with 2. They are lines as long as no cell has a line break and no blank line
    stands before the header.
    """
    import polars as pl

    delimiters = {_delimiter(file) for file in table.files}
    if len(delimiters) > 1:
        return None
    return pl.scan_csv(
        paths,
        separator=delimiters.pop(),
        new_columns=list(table.columns),
        infer_schema=False,
        glob=False,
        row_index_name=ROW_NUMBER,
        row_index_offset=2 if len(paths) == 1 else 1,
    ).select(ROW_NUMBER, *columns)


CSV = Format(suffixes=(".csv",), open=open_csv, scan=scan_csv)
TSV = Format(suffixes=(".tsv", ".tab"), open=open_tsv)  # no scan: Polars cannot read both ways to quote
TXT = Format(suffixes=(".txt",), open=open_txt)


def _open_delimited(file: File, delimiter: str) -> Table:
    """A table with column names in the first line that is not blank."""
    _, header = next(_records(file, delimiter))
    columns = tuple(name.strip() for name in header)
    if repeated := [name for name, count in Counter(columns).items() if count > 1]:
        raise UserError(f"The column name '{repeated[0]}' occurs twice in {file.name}.", "Rename one of them.")

    def read() -> Iterator[Row]:
        for row, cells in itertools.islice(_records(file, delimiter), 1, None):
            if len(cells) != len(columns):
                raise UserError(
                    f"{file.name} has {len(cells)} fields in row {row}, but {len(columns)} in the header.",
                    "Quote fields that hold the delimiter or a line break.",
                )
            yield row, dict(zip(columns, cells, strict=True))

    return require_rows(Table(file.name, columns, {}, read), no_rows_error(file))


def _delimiter(file: File) -> str:
    """The delimiter that cuts the header into most fields. Only the header counts: texts hold commas."""
    header = _header_line(file)
    return max(",;\t", key=lambda delimiter: len(next(csv.reader([header], delimiter=delimiter))))


def _header_line(file: File) -> str:
    """The first line that is not blank."""
    line = next((line for line in read_lines(file) if line.strip()), None)
    if line is None:
        raise empty_file_error(file)
    return line


def _records(file: File, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    lines = read_lines(file)
    return _tsv_records(file, lines) if delimiter == "\t" else _csv_records(file, lines, delimiter)


def _csv_records(file: File, lines: Iterator[str], delimiter: str, start: int = 1) -> Iterator[tuple[int, list[str]]]:
    """Cells of each record that is not blank, with the line where it starts."""
    csv.field_size_limit(MAX_CELL)  # the csv module's own limit is 128 KiB
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        line = start + reader.line_num
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise UserError(
                f"Broken quotes in row {line} of {file.name}: {error}.",
                'Close every quote, and write " inside a quoted field as "".',
            ) from None
        if cells is None:
            return
        if cells:
            yield line, cells


def _tsv_records(file: File, lines: Iterator[str]) -> Iterator[tuple[int, list[str]]]:
    """Like ``_csv_records``, for files where quotes quote (pandas, Excel) and where they are text (GLUE).

    A line with as many fields as the header is a record, and its wholly quoted fields are unquoted. Any other line is
    read as CSV, since it may hold a quoted tab or line break.
    """
    width, line_number = 0, 0

    def counted() -> Iterator[str]:
        nonlocal line_number
        for line in lines:
            line_number += 1
            yield line

    source = counted()
    for line in source:
        number, cells = line_number, line.rstrip("\r\n").split("\t")
        if cells == [""]:
            continue
        if width and len(cells) != width and '"' in line:
            _, cells = next(_csv_records(file, itertools.chain([line], source), "\t", start=number))
        else:
            cells = [_unquoted(cell) for cell in cells]
        width = width or len(cells)
        yield number, cells


def _unquoted(cell: str) -> str:
    return cell[1:-1].replace('""', '"') if re.fullmatch(r'"(?:[^"]|"")*"', cell) else cell
