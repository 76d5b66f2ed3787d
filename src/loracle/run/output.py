"""Rows out, one at a time, to a file or the terminal; a file appears whole or not at all."""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from loracle.errors import UserError

Write = Callable[[dict[str, Any]], None]


@contextmanager
def open_output(path: Path | None) -> Iterator[Write]:
    """A function that writes one row; the format follows the suffix, CSV goes to the terminal without a path.

    Raises:
        UserError: a suffix that means no format, or a folder that is not there.
    """
    if path is None:
        yield _writer(".csv", sys.stdout)
        return
    if path.suffix not in (".csv", ".tsv", ".jsonl", ".ndjson"):
        raise UserError("a .csv, .tsv or .jsonl file to write", str(path), "give --out such a name")
    if path.is_dir():
        raise UserError("a file to write", f"{path}, a folder", "pick another --out")
    if not path.parent.is_dir():
        raise UserError(f"the folder {path.parent} to write to", "no such folder", "make it, or pick another --out")
    temporary = path.with_name(f".{path.name}.writing-{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8", newline="") as stream:
            yield _writer(path.suffix, stream)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _writer(suffix: str, stream: IO[str]) -> Write:
    if suffix in (".jsonl", ".ndjson"):
        return lambda row: print(json.dumps(row, ensure_ascii=False), file=stream)
    out: list[csv.DictWriter] = []

    def write(row: dict[str, Any]) -> None:
        if not out:
            out.append(
                csv.DictWriter(stream, list(row), delimiter="\t" if suffix == ".tsv" else ",", lineterminator="\n")
            )
            out[0].writeheader()
        if beyond := row.keys() - set(out[0].fieldnames):
            fix = "write a .jsonl file, whose rows may differ"
            raise UserError(f"the columns {', '.join(out[0].fieldnames)} in every row", f"also {min(beyond)}", fix)
        out[0].writerow({k: _cell(v) for k, v in row.items()})

    return write


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (list, dict)) else value
