"""The text columns of predictions.csv."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def text_columns(examples: Sequence[Any], texts: bool) -> list[str]:
    """Columns that hold texts: none, the text, or text and context where any example has one."""
    has_context = any(e.context is not None for e in examples)
    return [*(["text"] if texts else []), *(["context"] if texts and has_context else [])]
