"""Differences between two golden files, by key."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TOLERANCE = 1e-9


def differences(old: Path, new: Path) -> Iterator[str]:
    """A line for each value that differs: its path, the old value and the new one."""
    yield from _walk(_read(old), _read(new), "")


def _read(path: Path) -> Any:
    if path.suffix == ".json":
        return json.loads(path.read_text(encoding="utf-8"))
    with path.open(encoding="utf-8", newline="") as f:
        return list(csv.reader(f))


def _walk(old: Any, new: Any, path: str) -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from _walk(old.get(key, "(none)"), new.get(key, "(none)"), f"{path}/{key}")
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for i, (a, b) in enumerate(zip(old, new, strict=True)):
            yield from _walk(a, b, f"{path}/{i}")
    elif isinstance(old, float) and isinstance(new, float):
        if abs(old - new) > TOLERANCE * max(1.0, abs(old)):
            yield f"{path}: {old!r} -> {new!r}"
    elif old != new:
        yield f"{path}: {str(old)[:100]} -> {str(new)[:100]}"
