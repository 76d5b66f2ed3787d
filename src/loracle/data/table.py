"""What every format shares: the table that it gives, and the file whose bytes or lines it reads."""

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
from typing import Any, BinaryIO

from loracle.errors import UserError

Row = tuple[int, dict[str, Any]]
"""A row and where it stood: the line on which it starts in a text file, the item in a JSON array or Parquet file, the
running number where a split is made of several files."""

HEAD = 200  # rows looked at to learn the columns of JSON, and by columns.py to infer what columns mean

FORMATS = {
    ".csv": "csv", ".tsv": "tsv", ".tab": "tsv", ".json": "json", ".jsonl": "json", ".ndjson": "json",
    ".parquet": "parquet", ".pq": "parquet", ".txt": "txt",
}  # fmt: skip
SUFFIXES = ".csv, .tsv, .json, .jsonl, .parquet or .txt (each perhaps with .gz)"


@dataclass(frozen=True, slots=True)
class Table:
    """Rows with named columns, read from disk anew, and streaming, each time ``rows()`` is called.

    ``label_names`` holds the columns whose integers stand for names (ClassLabel of Hugging Face): ``{column: names}``.
    """

    name: str  # as the user wrote it
    columns: tuple[str, ...]
    label_names: dict[str, tuple[str, ...]]
    read: Callable[[], Iterator[Row]] = field(repr=False)
    files: tuple[File, ...] = field(default=(), repr=False)  # what is read, for who can do so faster than row by row

    def rows(self) -> Iterator[Row]:
        """Every row from the first; a damaged one raises UserError when it is reached."""
        return self.read()

    def head(self, count: int = HEAD) -> list[Row]:
        """The first rows."""
        return list(itertools.islice(self.rows(), count))


@dataclass(frozen=True, slots=True)
class File:
    """A file and the format that its name tells."""

    path: Path
    name: str  # what the user calls it

    @property
    def unzipped(self) -> Path:
        return self.path.with_suffix("") if self.path.suffix.lower() == ".gz" else self.path

    @property
    def format(self) -> str | None:
        return FORMATS.get(self.unzipped.suffix.lower())


# ---------------------------------------------------------------------------------------------------------------------
# Bytes, lines


@contextmanager
def seekable(file: File) -> Iterator[Path]:
    """A file that can be sought in, which a gzipped one cannot: that is unpacked beside, and removed in the end."""
    if file.path.suffix.lower() != ".gz":
        yield file.path
        return
    with tempfile.NamedTemporaryFile(suffix=file.unzipped.suffix) as copy:
        with bytes_of(file) as stream:
            shutil.copyfileobj(stream, copy)
        copy.flush()
        yield Path(copy.name)


@contextmanager
def bytes_of(file: File) -> Iterator[BinaryIO]:
    """The bytes of a file, unzipped; damage met while they are read is a UserError."""
    try:
        with gzip.open(file.path) if file.path.suffix.lower() == ".gz" else open(file.path, "rb") as stream:
            yield stream  # type: ignore[misc]  # GzipFile reads like any binary file
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        found = f"{file.name}, which is cut off or damaged ({error})"
        raise UserError("a whole gzip file", found, "fetch it again") from None
    except OSError as error:
        raise UserError("a readable file", f"{file.name}: {error.strerror}", "check its permissions") from None


def lines_of(file: File) -> Iterator[str]:
    """Decoded lines, with their ends, without a byte order mark."""
    with bytes_of(file) as stream:
        for number, raw in enumerate(stream, 1):
            yield _decoded(raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw, file, number)


def _decoded(raw: bytes, file: File, line: int) -> str:
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise not_utf8(raw[error.start], line, file) from None
    if "\0" in text:
        raise not_utf8(0, line, file)
    return text


def not_utf8(byte: int, line: int, file: File) -> UserError:
    """For a byte that no text holds."""
    return UserError("text in UTF-8", f"byte 0x{byte:02x} in line {line} of {file.name}", "save the file as UTF-8")


def checked(table: Table, without_rows: UserError) -> Table:
    """The table, if its first row can be read."""
    if not table.head(1):
        raise without_rows
    return table


def empty(file: File) -> UserError:
    """For a file without anything in it."""
    return UserError("rows", f"nothing in {file.name}", "check that it was written to the end")


def header_only(file: File) -> UserError:
    """For a file whose columns hold nothing."""
    return UserError("rows", f"column names and no row in {file.name}", "check that it was written to the end")
