"""A cell becomes a text, a context, a number or labels; one that cannot is named with its row."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from loracle.data.columns import Columns, cell_of
from loracle.data.issues import IssueLog
from loracle.data.table import Table
from loracle.errors import UserError, near

T = TypeVar("T")


class CellError(Exception):
    """A cell that cannot be read; ``parsed_rows`` adds the row and makes it a UserError."""

    def __init__(self, expected: str, found: str, hint: str = "Correct or remove the row."):
        super().__init__(expected, found, hint)
        self.expected, self.found, self.hint = expected, found, hint

    def at(self, row: int, table: Table) -> UserError:
        return UserError(f"Row {row} of {table.name} has {self.found}; expected {self.expected}.", self.hint)


def parsed_rows(table: Table, parse: Callable[[dict[str, Any]], T]) -> Iterator[tuple[int, T]]:
    """What ``parse`` makes of each row, with its number."""
    for number, row in table.rows():
        try:
            parsed = parse(row)
        except CellError as bad:
            raise bad.at(number, table) from None
        yield number, parsed


def text_and_context(row: dict[str, Any], columns: Columns) -> tuple[str | None, str | None]:
    """What a row says: its text, or its user's messages, and what stands before it."""
    if columns.messages:
        text, context = _message_text(cell_of(row, columns.messages))
    else:
        text, context = as_text(cell_of(row, columns.text)), None
    return text, as_context(cell_of(row, columns.context)) if columns.context else context


def group_id(row: dict[str, Any], names: tuple[str, ...]) -> str | None:
    r"""Values joined by '|'; one in a value becomes '\|', so that other values make another id. None at a null."""
    values = [as_context(row.get(name)) for name in names]
    if any(value is None for value in values):
        return None
    if len(values) == 1:
        return values[0]
    return "|".join(str(value).replace("\\", "\\\\").replace("|", "\\|") for value in values)


def count_lost(text: str, row: int, issues: IssueLog) -> None:
    """Notes a text with U+FFFD in it."""
    if "\ufffd" in text:
        issues.add("lost-character", row)


# ---------------------------------------------------------------------------------------------------------------------
# Cells


def _is_null(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _kind_of(value: Any) -> str:
    kinds = {
        list: "a list",
        dict: "an object",
        bytes: "binary data",
        bool: "a truth value",
        str: f"'{str(value)[:40]}'",
    }
    return kinds.get(type(value), str(value)[:40])


def as_text(value: Any) -> str | None:
    """A cell as text; None where it is null or blank."""
    if _is_null(value):
        return None
    if isinstance(value, str):
        return value if value.strip() else None
    if isinstance(value, (int, float)):
        return str(value)
    raise CellError("a text", _kind_of(value))


def as_number(value: Any, what: str) -> float | None:
    """A cell as a finite number; None where it is null or blank."""
    if _is_null(value) or (isinstance(value, str) and not value.strip()):
        return None
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if math.isfinite(number):
        return number
    if isinstance(value, str) and value.strip().lower() == "nan":
        return None
    raise CellError(f"a number as {what}", _kind_of(value))


def as_value(value: Any) -> str:
    """A cell of any kind as a name that a table can show; ``none`` where it is null or blank."""
    return ("" if _is_null(value) else " ".join(str(value).split())) or "none"


def as_weight(value: Any) -> float:
    """A weight cell; 1 where it is null or blank."""
    weight = as_number(value, "weight")
    if weight is not None and weight < 0:
        raise CellError("a weight of 0 or more", str(weight))
    return 1.0 if weight is None else weight


def as_context(value: Any) -> str | None:
    """A context cell: text, or chat messages joined."""
    return as_text("\n".join(content for _, content in _contents(value)) if isinstance(value, list) else value)


def as_side(value: Any) -> tuple[str | None, str | None]:
    """One side of a pair, and the prompt before it where the side is a whole conversation."""
    if isinstance(value, list) and value:
        *prompt, (_, last) = _contents(value)
        return as_text(last), as_text("\n".join(content for _, content in prompt))
    text = as_text(value)
    tagged = re.fullmatch(r"\s*<title>(.*)</title>\s*", text or "", re.DOTALL)
    return (as_text(tagged[1].strip()) if tagged else text), None


def _message_text(value: Any) -> tuple[str | None, str | None]:
    """The user's content and, as its context, the system's; what an assistant said has no place in front of a label."""
    if _is_null(value):
        return None, None
    parts: dict[str, list[str]] = {"user": [], "system": []}
    for role, content in _contents(value):
        if role not in parts:
            raise CellError("messages of role user or system", f"one of role '{role}'")
        parts[role].append(content)
    return as_text("\n".join(parts["user"])), as_text("\n".join(parts["system"]))


def _contents(value: Any) -> list[tuple[str, str]]:
    """(role, content) of chat messages; parts of a content that are texts are joined."""
    messages = []
    for message in value if isinstance(value, list) else [value]:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise CellError("messages as a list of {role, content}", _kind_of(message))
        content = message["content"]
        if isinstance(content, list):
            if not all(isinstance(part, dict) and part.get("type") == "text" for part in content):
                raise CellError("messages of text", "a part that is none")
            content = "".join(str(part.get("text", "")) for part in content)
        messages.append((str(message["role"]), as_text(content) or ""))
    return messages


# ---------------------------------------------------------------------------------------------------------------------
# Labels

_INTEGER = re.compile(r"(-?(?:0|[1-9]\d*))(?:\.0+)?")
_DECIMAL = re.compile(r"[-+]?\d*\.?\d+(?:[eE][-+]?\d+)?")


def as_labels(value: Any, several: bool, delimiter: str | None, names: tuple[str, ...]) -> tuple[str, ...] | None:
    """Names of all labels of a cell; None where it is null. An empty list says: none of the labels."""
    if isinstance(value, list):
        if not several:
            raise CellError("one label a text", "a list")
        found = [_label(item, names) for item in value]
        if None in found:
            raise CellError("a list of labels", "a null or empty one")
        return tuple(str(name) for name in found)
    if delimiter and isinstance(value, str):
        return tuple(part.strip() for part in value.split(delimiter) if part.strip()) or None
    name = _label(value, names)
    return None if name is None else (name,)


def _label(value: Any, names: tuple[str, ...]) -> str | None:
    """The name of a label as it stands in a cell; None where there is none (null, empty, NaN, -1 of a ClassLabel)."""
    if _is_null(value):
        return None
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return None if value.strip().lower() in ("", "nan") else value.strip()
    if not isinstance(value, (int, float)) or math.isinf(value):
        raise CellError("a label that is a text or an integer", _kind_of(value))
    if not names or value % 1:
        return str(int(value)) if value % 1 == 0 else str(value)
    if value >= len(names) or value < -1:
        raise CellError(f"a label from 0 to {len(names) - 1}, as the data set names them", str(value))
    return None if value == -1 else names[int(value)]


def order_labels(first_rows: dict[str, int], table: Table) -> dict[str, str]:
    """``{as found: name}`` in the order of the names: numerically where all are integers, else by letter.

    Raises:
        UserError: all are numbers and not all of them whole, which is regression and not classification.
    """
    integers = {found: match[1] for found in first_rows if (match := _INTEGER.fullmatch(found))}
    if len(integers) == len(first_rows):  # CSV and pandas write 3 as 3.0 where a column holds nulls
        return dict(sorted(integers.items(), key=lambda item: int(item[1])))
    fractions = [found for found in first_rows if _DECIMAL.fullmatch(found) and float(found) % 1]
    if fractions and all(_DECIMAL.fullmatch(found) for found in first_rows):
        found = fractions[0]
        raise UserError(
            f"Row {first_rows[found]} of {table.name} has the label {found}, which is neither a text nor a whole number.",
            "Round the labels or give classes names. Regression is not supported.",
        )
    return {name: name for name in sorted(first_rows)}


def known_label(found: str, row: int, table: Table, names: dict[str, int]) -> str:
    """The trained label that this one is.

    Raises:
        UserError: it is none of them.
    """
    if found in names:
        return found
    if (integer := _INTEGER.fullmatch(found)) and integer[1] in names:
        return integer[1]
    some = ", ".join(list(names)[:10]) + (", ..." if len(names) > 10 else "")
    raise UserError(
        f"Row {row} of {table.name} has the label '{found}', which the training data do not have{near(found, names)}.",
        f"Correct it, or train on data that have it. The {len(names)} labels are: {some}.",
    )
