"""Write rows one at a time to a file or the terminal. A file appears complete or not at all."""

from __future__ import annotations

import csv
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from loracle.errors import UserError

Write = Callable[[dict[str, Any]], None]
SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
BATCH = 8192  # rows of a Parquet file in memory at once


def check_output(path: Path) -> None:
    """Check that a file of this name can be written.

    Raises:
        UserError: the suffix names no format, the path is a folder, or its parent folder does not exist.
    """
    if path.suffix not in SUFFIXES:
        raise UserError(f"Cannot write {path}: its suffix names no format.", "Use .csv, .tsv, .jsonl or .parquet.")
    if path.is_dir():
        raise UserError(f"Cannot write {path}: it is a folder.", "Pick another --out.")
    if not path.parent.is_dir():
        raise UserError(f"Cannot write {path}: there is no folder {path.parent}.", "Create it, or pick another --out.")


@contextmanager
def open_output(path: Path | None, scratch: Path | None = None) -> Iterator[Write]:
    """Open ``path`` and yield a function that writes one row. The suffix gives the format; without a path, CSV to stdout.

    The incomplete file is in ``scratch``, a folder on the same disk, or else a hidden file beside ``path``.

    Raises:
        UserError: as ``check_output``; or the rows have columns or types that do not fit one table.
    """
    if path is None:
        yield _writer(".csv", sys.stdout)
        return
    check_output(path)
    temporary = (scratch or path.parent) / f".{path.name}.writing-{os.getpid()}"
    try:
        if path.suffix == ".parquet":
            with _parquet_writer(temporary) as write:
                yield write
        else:
            with temporary.open("w", encoding="utf-8", newline="") as stream:
                yield _writer(path.suffix, stream)
        with temporary.open("rb") as complete:
            os.fsync(complete.fileno())  # after a power cut the new name must not point to missing bytes
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _writer(suffix: str, stream: IO[str]) -> Write:
    if suffix in (".jsonl", ".ndjson"):
        # default=str: JSON has no dates and decimals, which Parquet input has
        return lambda row: print(json.dumps(row, ensure_ascii=False, default=str), file=stream)
    out: list[csv.DictWriter] = []

    def write(row: dict[str, Any]) -> None:
        if not out:
            out.append(
                csv.DictWriter(stream, list(row), delimiter="\t" if suffix == ".tsv" else ",", lineterminator="\n")
            )
            out[0].writeheader()
        if extra := row.keys() - set(out[0].fieldnames):
            raise UserError(
                f"A row has the column {min(extra)}, which the first row has not (columns: {', '.join(out[0].fieldnames)}).",
                "Write a .jsonl file, whose rows may differ.",
            )
        out[0].writerow({k: _cell(v) for k, v in row.items()})

    return write


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, (list, dict)) else value


@contextmanager
def _parquet_writer(path: Path) -> Iterator[Write]:
    """Write rows to part files and join them, since a later row may widen a column's type (whole numbers, then fractions)."""
    import polars as pl

    parts, rows = path.with_name(f"{path.name}.rows"), list[dict[str, Any]]()
    written: list[Path] = []

    def flush() -> None:
        written.append(parts / f"{len(written):07d}.parquet")
        with _one_type_a_column():
            pl.DataFrame(rows, infer_schema_length=None).write_parquet(written[-1])
        rows.clear()

    def write(row: dict[str, Any]) -> None:
        rows.append(row)
        if len(rows) == BATCH:
            flush()

    parts.mkdir()
    try:
        yield write
        if rows or not written:
            flush()
        frames = [pl.scan_parquet(part, glob=False) for part in written]
        with _one_type_a_column():
            joined = pl.concat(frames, how="diagonal_relaxed")
            types = joined.collect_schema()
            for name, dtype in (column for frame in frames for column in frame.collect_schema().items()):
                if dtype.is_nested() and not types[name].is_nested():  # Polars would turn it into text without its keys
                    raise TypeError(f"column {name} holds {dtype} and {types[name]}")
            joined.sink_parquet(path, row_group_size=BATCH * 16)
    finally:
        shutil.rmtree(parts, ignore_errors=True)


@contextmanager
def _one_type_a_column() -> Iterator[None]:
    import polars as pl

    try:
        yield
    except (pl.exceptions.PolarsError, TypeError, OverflowError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"Some values do not fit one column: {reason}.", "Write a .jsonl file, whose rows may differ."
        ) from None
