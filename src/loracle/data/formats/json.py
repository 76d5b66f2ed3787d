"""Tables from JSON: an object a line, or an array of objects that is never held as a whole."""

from __future__ import annotations

import codecs
import itertools
import json
import re
from collections.abc import Iterator
from typing import Any

from loracle.data.table import HEAD, File, Row, Table, bytes_of, checked, empty, lines_of, not_utf8
from loracle.errors import UserError

CHUNK = 1 << 16  # bytes of a JSON array read at once


def open_json(file: File) -> Table:
    """Objects, one a line or in an array; what stands first tells which, not how the file is named."""
    first = first_character(file)
    if not first:
        raise empty(file)
    if first not in "[{":
        raise UserError("an array of JSON objects, or one a line", f"'{first}' first in {file.name}", "convert it")
    numbered = _array_items if first == "[" else _line_items

    def read() -> Iterator[Row]:
        for row, item in numbered(file):
            if not isinstance(item, dict):
                found = f"{_json_kind(item)} in row {row} of {file.name}"
                raise UserError('rows as JSON objects, {"column": value}', found, "convert it")
            yield row, item

    columns = tuple(dict.fromkeys(key for _, row in itertools.islice(read(), HEAD) for key in row))
    return checked(Table(file.name, columns, {}, read), empty(file))


def _json_kind(value: Any) -> str:
    kinds = {list: "an array", str: "a string", bool: "a truth value", int: "a number", float: "a number"}
    return kinds.get(type(value), "null")


def first_character(file: File) -> str:
    """The first that is not blank; nothing in an empty file."""
    for text in _chunks(file):
        if text := text.lstrip():
            return text[0]
    return ""


def _line_items(file: File) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(lines_of(file), 1):
        if line.strip():
            try:
                item = json.loads(line)
                item = _encodable(item) if "\\u" in line else item
            except (ValueError, RecursionError) as error:
                raise _broken_json(file, number, error) from None
            yield number, item


def _broken_json(file: File, line: int, error: Exception) -> UserError:
    reason = "nested too deeply" if isinstance(error, RecursionError) else getattr(error, "msg", str(error))
    return UserError(
        "one JSON object a line, or a JSON array of them", f"broken JSON at line {line} of {file.name} ({reason})",
        "mend or remove that line",
    )  # fmt: skip


_SURROGATES = re.compile("[\ud800-\udfff]")


def _encodable(value: Any) -> Any:
    r"""The value with U+FFFD for half surrogate pairs, which JSON can spell (\ud800) and no tokenizer can take."""
    if isinstance(value, str):
        return _SURROGATES.sub("\ufffd", value)
    if isinstance(value, list):
        return [_encodable(item) for item in value]
    if isinstance(value, dict):
        return {_encodable(key): _encodable(item) for key, item in value.items()}
    return value


# ---------------------------------------------------------------------------------------------------------------------
# Arrays


def _chunks(file: File) -> Iterator[str]:
    """Decoded text in pieces of bounded length, whatever the length of its lines, without a byte order mark."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    line = 1
    with bytes_of(file) as stream:
        raw = None
        while raw != b"":
            raw = stream.read(CHUNK)
            try:
                text = decoder.decode(raw, final=not raw)
            except UnicodeDecodeError as error:
                line += error.object.count(b"\n", 0, error.start)
                raise not_utf8(error.object[error.start], line, file) from None
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
    """A stretch of JSON text that slides along a file: what one value needs, and not more than twice that, is held."""

    LONGEST_SCRAP = 16  # characters at the end that may be a token cut in two: -Infinity, \\ud83d, 1e-300

    def __init__(self, file: File):
        self._file, self._chunks = file, _chunks(file)
        self._decoder = json.JSONDecoder()
        self._text, self._at, self._line = "", 0, 1

    def peek(self) -> str:
        """The next character that is not blank, or nothing at the end; stays in front of it."""
        while True:
            while self._at < len(self._text):
                if not self._text[self._at].isspace():
                    return self._text[self._at]
                self._at += 1
            if not self._grow():
                return ""

    def skip(self, character: str) -> None:
        """Past the next character, which must be this one."""
        if (found := self.peek()) != character:
            reason = f"'{found}' instead of '{character}'" if found else f"it ends without '{character}'"
            raise self.broken(ValueError(reason))
        self._at += 1

    def value(self) -> Any:
        """The next value."""
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
        at = error.pos if isinstance(error, json.JSONDecodeError) else self._at
        return _broken_json(self._file, self._line + self._text.count("\n", 0, at), error)

    def _may_be_cut(self, error: Exception) -> bool:
        """Whether more text could mend the error, so that a broken file is not read to its end in vain."""
        return isinstance(error, json.JSONDecodeError) and (
            error.msg.startswith("Unterminated string") or error.pos >= len(self._text) - self.LONGEST_SCRAP
        )

    def _grow(self) -> bool:
        """Lets go of what was read and doubles what is held, so that a long value is not tried once a chunk."""
        self._line += self._text.count("\n", 0, self._at)
        parts, wanted = [self._text[self._at :]], len(self._text) - self._at
        for chunk in self._chunks:
            parts.append(chunk)
            wanted -= len(chunk)
            if chunk and wanted <= 0:
                break
        grown = any(parts[1:])
        self._text, self._at = "".join(parts), 0
        return grown
