"""What every format shares: the table, the file, and how its bytes and lines are read."""

from __future__ import annotations

import codecs
import gzip
import itertools
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from loracle.errors import UserError

if TYPE_CHECKING:
    import polars as pl

Row = tuple[int, dict[str, Any]]
"""A row and its number: the line where it starts in a text file, the item in a JSON array or Parquet file, a running
number where a table has several files."""

HEAD = 200  # rows that are read to learn the columns of JSON, and to infer what columns mean
ROW_NUMBER = "\0row"  # the column of row numbers in a scanned table; no user column has this name


@dataclass(frozen=True, slots=True)
class Table:
    """Rows with named columns. ``rows()`` streams them from disk anew each time.

    ``label_names`` is ``{column: names}`` of columns whose integers stand for names (ClassLabel of Hugging Face).
    """

    name: str  # as the user wrote it
    columns: tuple[str, ...]
    label_names: dict[str, tuple[str, ...]]
    read: Callable[[], Iterator[Row]] = field(repr=False)
    files: tuple[File, ...] = field(default=(), repr=False)  # for readers that are faster than row by row

    def rows(self) -> Iterator[Row]:
        """Every row from the first. A damaged row raises UserError when it is reached."""
        return self.read()

    def head(self, count: int = HEAD) -> list[Row]:
        """The first rows."""
        return list(itertools.islice(self.rows(), count))


@dataclass(frozen=True, slots=True)
class File:
    """A data file, perhaps gzipped."""

    path: Path
    name: str  # what messages call it

    @property
    def gzipped(self) -> bool:
        """Whether the name ends in .gz."""
        return self.path.suffix.lower() == ".gz"

    @property
    def suffix(self) -> str:
        """The suffix in lower case, without .gz: ``.csv`` of ``Log.CSV.gz``."""
        return (self.path.with_suffix("") if self.gzipped else self.path).suffix.lower()


def _no_scan(table: Table, paths: list[Path], columns: list[str]) -> pl.LazyFrame | None:
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """How to read one file format. Register it in ``data/formats/__init__.py``.

    ``open`` returns the table of one file, with its columns and at least one row, and raises UserError otherwise.

    ``scan`` returns ``columns`` of a table as Polars reads its files, with row numbers in ``ROW_NUMBER``. It returns None
    where Polars would read other rows than ``open``. ``paths`` are the table's files, unzipped. Optional: it is faster.
    """

    suffixes: tuple[str, ...]
    open: Callable[[File], Table]
    scan: Callable[[Table, list[Path], list[str]], pl.LazyFrame | None] = _no_scan
    optional_columns: bool = False  # rows and files may leave columns out, as JSON objects do


# --- bytes and lines --------------------------------------------------------------------------------------------------


@contextmanager
def seekable(file: File) -> Iterator[Path]:
    """Path of an unzipped file. A gzipped file is unpacked into a temporary one, which is removed afterwards."""
    if not file.gzipped:
        yield file.path
        return
    with tempfile.NamedTemporaryFile(suffix=file.suffix) as copy:
        with open_bytes(file) as stream:
            shutil.copyfileobj(stream, copy)
        copy.flush()
        yield Path(copy.name)


@contextmanager
def open_bytes(file: File) -> Iterator[BinaryIO]:
    """The unzipped bytes of a file.

    Raises:
        UserError: the gzip file is damaged, or the file cannot be read. It is raised while the bytes are read.
    """
    try:
        with gzip.open(file.path) if file.gzipped else open(file.path, "rb") as stream:
            yield stream  # type: ignore[misc]  # GzipFile reads like any binary file
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(
            f"{file.name} is cut off or damaged, not a whole gzip file: {error}.", "Fetch it again."
        ) from None
    except OSError as error:
        raise UserError(f"Cannot read {file.name}: {error.strerror}.", "Check its permissions.") from None


def read_lines(file: File) -> Iterator[str]:
    """Decoded lines with their line ends, without a byte order mark.

    Raises:
        UserError: a line is not UTF-8, or holds a null byte.
    """
    with open_bytes(file) as stream:
        for number, raw in enumerate(stream, 1):
            yield _decoded(raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw, file, number)


def _decoded(raw: bytes, file: File, line: int) -> str:
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise encoding_error(raw[error.start], line, file) from None
    if "\0" in text:
        raise encoding_error(0, line, file)
    return text


def encoding_error(byte: int, line: int, file: File) -> UserError:
    """The error for a byte that UTF-8 text cannot hold."""
    return UserError(f"Byte 0x{byte:02x} in line {line} of {file.name} is not UTF-8 text.", "Save the file as UTF-8.")


def require_rows(table: Table, error: UserError) -> Table:
    """Return the table if it has a first row, else raise ``error``."""
    if not table.head(1):
        raise error
    return table


def empty_file_error(file: File) -> UserError:
    """The error for a file without content."""
    return UserError(f"{file.name} is empty: there is nothing in it.", "Check that it was written to the end.")


def no_rows_error(file: File) -> UserError:
    """The error for a file with column names and no rows."""
    return UserError(f"{file.name} has column names and no rows.", "Check that it was written to the end.")
