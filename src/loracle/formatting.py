"""Texts shortened and tables aligned, for terminals and pages."""

from __future__ import annotations


def shortened(text: str, letters: int) -> str:
    """The text, or its start with an ellipsis, in at most ``letters`` characters."""
    return text if len(text) <= letters else text[: letters - 1] + "…"


def plain_table(rows: list[list[str]]) -> str:
    """Columns aligned for a terminal."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def markdown_table(rows: list[list[str]]) -> str:
    """The same in Markdown."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])
