"""Tables from text files by the line: plain texts, CSV and TSV."""

from __future__ import annotations

import csv
import itertools
import re
from collections import Counter
from collections.abc import Iterator

from loracle.data.table import File, Row, Table, checked, empty, header_only, lines_of
from loracle.errors import UserError

LARGEST_CELL = 1 << 26  # characters; a quote that is never closed would otherwise swallow the file into memory


def open_lines(file: File) -> Table:
    """One text a line; blank lines stay, so that row numbers are line numbers."""

    def read() -> Iterator[Row]:
        return ((number, {"text": line.rstrip("\r\n")}) for number, line in enumerate(lines_of(file), 1))

    return checked(Table(file.name, ("text",), {}, read), empty(file))


def open_delimited(file: File) -> Table:
    """CSV or TSV, with column names in the first line that is not blank."""
    delimiter = delimiter_of(file)
    _, header = next(_records(file, delimiter))
    columns = tuple(name.strip() for name in header)
    if twice := [name for name, count in Counter(columns).items() if count > 1]:
        raise UserError("distinct column names", f"'{twice[0]}' twice in {file.name}", "rename one of them")

    def read() -> Iterator[Row]:
        for row, cells in itertools.islice(_records(file, delimiter), 1, None):
            if len(cells) != len(columns):
                raise UserError(
                    f"{len(columns)} fields, as in the header", f"{len(cells)} in row {row} of {file.name}",
                    "quote fields that hold the delimiter or a line break",
                )  # fmt: skip
            yield row, dict(zip(columns, cells, strict=True))

    return checked(Table(file.name, columns, {}, read), header_only(file))


def delimiter_of(file: File) -> str:
    """Comma, semicolon or tab, whichever cuts the header into most fields; of the texts below nothing can be told."""
    header = next((line for line in lines_of(file) if line.strip()), None)
    if header is None:
        raise empty(file)
    if file.format == "tsv":
        return "\t"
    return max(",;\t", key=lambda delimiter: len(next(csv.reader([header], delimiter=delimiter))))


def _records(file: File, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    lines = lines_of(file)
    return _tsv_records(file, lines) if delimiter == "\t" else _csv_records(file, lines, delimiter)


def _csv_records(file: File, lines: Iterator[str], delimiter: str, start: int = 1) -> Iterator[tuple[int, list[str]]]:
    """Cells of each record that is not blank, with the line on which it starts."""
    csv.field_size_limit(LARGEST_CELL)  # the csv module's own limit is 128 KiB
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        line = start + reader.line_num
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise UserError(
                "fields quoted as CSV wants it", f"none in row {line} of {file.name} ({error})",
                'close every quote, and write " inside a quoted field as ""',
            ) from None  # fmt: skip
        if cells is None:
            return
        if cells:
            yield line, cells


def _tsv_records(file: File, lines: Iterator[str]) -> Iterator[tuple[int, list[str]]]:
    """Like ``_csv_records``, for two customs: quotes that quote (pandas, Excel) and quotes that are text (GLUE).

    A line with as many fields as the header is a record, and a wholly quoted field of it is unquoted; any other line
    is read as CSV would read it, for it may hold a quoted tab or line break.
    """
    width, read = 0, 0

    def counted() -> Iterator[str]:
        nonlocal read
        for line in lines:
            read += 1
            yield line

    source = counted()
    for line in source:
        number, cells = read, line.rstrip("\r\n").split("\t")
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
