"""JSON: one object a line, or an array of objects that streams from disk."""

from __future__ import annotations

import codecs
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loracle.data.table import (
    HEAD,
    ROW_NUMBER,
    File,
    Format,
    Row,
    Table,
    empty_file_error,
    encoding_error,
    open_bytes,
    read_lines,
    require_rows,
)
from loracle.errors import UserError

if TYPE_CHECKING:
    import polars as pl

CHUNK = 1 << 16  # bytes of a JSON array read at once


def open_json(file: File) -> Table:
    """A table of objects, one a line or in an array. The first character decides which, not the file name."""
    first = _first_character(file)
    if not first:
        raise empty_file_error(file)
    if first not in "[{":
        raise UserError(
            f"{file.name} starts with '{first}', not with a JSON object or an array of them.", "Convert it."
        )
    numbered = _array_items if first == "[" else _line_items

    def read() -> Iterator[Row]:
        for row, item in numbered(file):
            if not isinstance(item, dict):
                raise UserError(
                    f"Found {_json_type(item)} in row {row} of {file.name} instead of a JSON object.",
                    'Write rows as {"column": value}.',
                )
            yield row, item

    columns = tuple(dict.fromkeys(key for _, row in itertools.islice(read(), HEAD) for key in row))
    return require_rows(Table(file.name, columns, {}, read), empty_file_error(file))


def scan_json(table: Table, paths: list[Path], columns: list[str]) -> pl.LazyFrame | None:
    """The files as Polars reads them, with row numbers from 1; None for arrays and nested values.

    Polars would read a nested value as its JSON text.
    """
    import polars as pl

    nested = any(isinstance(row.get(column), list | dict) for _, row in table.head() for column in columns)
    if nested or {_first_character(file) for file in table.files} != {"{"}:
        return None
    schema = dict.fromkeys(columns, pl.String)
    return pl.scan_ndjson(paths, schema=schema, row_index_name=ROW_NUMBER, row_index_offset=1)


JSON = Format(suffixes=(".json", ".jsonl", ".ndjson"), open=open_json, scan=scan_json, optional_columns=True)


def _json_type(value: Any) -> str:
    names = {list: "an array", str: "a string", bool: "a truth value", int: "a number", float: "a number"}
    return names.get(type(value), "null")


def _first_character(file: File) -> str:
    """The first character that is not blank; empty for an empty file."""
    for text in _chunks(file):
        if text := text.lstrip():
            return text[0]
    return ""


def _line_items(file: File) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(read_lines(file), 1):
        if line.strip():
            try:
                item = json.loads(line)
                item = _encodable(item) if "\\u" in line else item
            except (ValueError, RecursionError) as error:
                raise _broken_json(file, number, error) from None
            yield number, item


def _broken_json(file: File, line: int, error: Exception) -> UserError:
    reason = "nested too deeply" if isinstance(error, RecursionError) else getattr(error, "msg", str(error))
    return UserError(f"Broken JSON at line {line} of {file.name}: {reason}.", "Correct or remove that line.")


_SURROGATES = re.compile("[\ud800-\udfff]")


def _encodable(value: Any) -> Any:
    r"""The value with U+FFFD for half surrogate pairs. JSON can spell them (\ud800), and no tokenizer takes them."""
    if isinstance(value, str):
        return _SURROGATES.sub("\ufffd", value)
    if isinstance(value, list):
        return [_encodable(item) for item in value]
    if isinstance(value, dict):
        return {_encodable(key): _encodable(item) for key, item in value.items()}
    return value


# --- arrays -----------------------------------------------------------------------------------------------------------


def _chunks(file: File) -> Iterator[str]:
    """Decoded text in pieces of at most ``CHUNK`` bytes, without a byte order mark."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    line = 1
    with open_bytes(file) as stream:
        raw = None
        while raw != b"":
            raw = stream.read(CHUNK)
            try:
                text = decoder.decode(raw, final=not raw)
            except UnicodeDecodeError as error:
                line += error.object.count(b"\n", 0, error.start)
                raise encoding_error(error.object[error.start], line, file) from None
            line += text.count("\n")
            yield text


def _array_items(file: File) -> Iterator[tuple[int, Any]]:
    """Items of a JSON array and their numbers, from 1."""
    window = _Window(file)
    window.skip("[")
    if window.peek() == "]":
        return
    for number in itertools.count(1):
        yield number, window.value()
        if window.peek() == "]":
            break
        window.skip(",")
    window.skip("]")
    if rest := window.peek():
        raise window.broken(ValueError(f"'{rest}' after the array"))


class _Window:
    """A stretch of JSON text that slides along a file. It holds at most twice the text that one value needs."""

    MAX_TOKEN = 16  # characters at the end that may be a token cut in two: -Infinity, \\ud83d, 1e-300

    def __init__(self, file: File):
        self._file, self._chunks = file, _chunks(file)
        self._decoder = json.JSONDecoder()
        self._text, self._at, self._line = "", 0, 1

    def peek(self) -> str:
        """The next character that is not blank, without consuming it; empty at the end of the file."""
        while True:
            while self._at < len(self._text):
                if not self._text[self._at].isspace():
                    return self._text[self._at]
                self._at += 1
            if not self._grow():
                return ""

    def skip(self, character: str) -> None:
        """Consume the next character, which must be this one."""
        if (actual := self.peek()) != character:
            reason = f"'{actual}' instead of '{character}'" if actual else f"it ends without '{character}'"
            raise self.broken(ValueError(reason))
        self._at += 1

    def value(self) -> Any:
        """Consume the next value and return it."""
        self.peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
                value = _encodable(value) if self._text.find("\\u", self._at, end) >= 0 else value
            except (ValueError, RecursionError) as error:
                if not (self._may_be_cut(error) and self._grow()):
                    raise self.broken(error) from None
            else:
                self._at = end
                return value

    def broken(self, error: Exception) -> UserError:
        """The UserError for a JSON error, with its line."""
        at = error.pos if isinstance(error, json.JSONDecodeError) else self._at
        return _broken_json(self._file, self._line + self._text.count("\n", 0, at), error)

    def _may_be_cut(self, error: Exception) -> bool:
        """Whether more text could resolve the error. If not, the rest of a broken file is not read."""
        return isinstance(error, json.JSONDecodeError) and (
            error.msg.startswith("Unterminated string") or error.pos >= len(self._text) - self.MAX_TOKEN
        )

    def _grow(self) -> bool:
        """Drop the consumed text and double the rest, so that a long value is not parsed again for each chunk."""
        self._line += self._text.count("\n", 0, self._at)
        parts, missing = [self._text[self._at :]], len(self._text) - self._at
        for chunk in self._chunks:
            parts.append(chunk)
            missing -= len(chunk)
            if chunk and missing <= 0:
                break
        grown = any(parts[1:])
        self._text, self._at = "".join(parts), 0
        return grown
