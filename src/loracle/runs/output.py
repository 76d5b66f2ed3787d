"""Rows out, one at a time, to a file or the terminal; a file appears whole or not at all."""

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
BATCH = 8192  # rows of a Parquet file held at once


def check_output(path: Path) -> None:
    """That a file of this name can be written.

    Raises:
        UserError: a suffix that means no format, or a folder that is not there.
    """
    if path.suffix not in SUFFIXES:
        raise UserError("a .csv, .tsv, .jsonl or .parquet file to write", str(path), "give --out such a name")
    if path.is_dir():
        raise UserError("a file to write", f"{path}, a folder", "pick another --out")
    if not path.parent.is_dir():
        raise UserError(f"the folder {path.parent} to write to", "no such folder", "make it, or pick another --out")


@contextmanager
def open_output(path: Path | None, scratch: Path | None = None) -> Iterator[Write]:
    """A function that writes one row; the format follows the suffix, CSV goes to the terminal without a path.

    Until it is whole the file stands in ``scratch``, a folder on the same disk, or else hidden beside its place.

    Raises:
        UserError: what ``check_output`` raises it for, or rows whose columns or types do not go into one table.
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
        with temporary.open("rb") as whole:
            os.fsync(whole.fileno())  # a name that outlives a power cut should not do so without its bytes
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _writer(suffix: str, stream: IO[str]) -> Write:
    if suffix in (".jsonl", ".ndjson"):
        # Parquet has dates and decimals, JSON has none
        return lambda row: print(json.dumps(row, ensure_ascii=False, default=str), file=stream)
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
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, (list, dict)) else value


@contextmanager
def _parquet_writer(path: Path) -> Iterator[Write]:
    """Rows go to small files first, since only the last row tells the type of a column (a whole number, then a fraction)."""
    import polars as pl

    parts, held = path.with_name(f"{path.name}.rows"), list[dict[str, Any]]()
    written: list[Path] = []

    def flush() -> None:
        written.append(parts / f"{len(written):07d}.parquet")
        with _one_type_a_column():
            pl.DataFrame(held, infer_schema_length=None).write_parquet(written[-1])
        held.clear()

    def write(row: dict[str, Any]) -> None:
        held.append(row)
        if len(held) == BATCH:
            flush()

    parts.mkdir()
    try:
        yield write
        if held or not written:
            flush()
        frames = [pl.scan_parquet(part, glob=False) for part in written]
        with _one_type_a_column():
            joined = pl.concat(frames, how="diagonal_relaxed")
            types = joined.collect_schema()
            for name, kind in (column for frame in frames for column in frame.collect_schema().items()):
                if kind.is_nested() and not types[name].is_nested():  # Polars would make words of it, without the keys
                    raise TypeError(f"column {name} holds {kind} and {types[name]}")
            joined.sink_parquet(path, row_group_size=BATCH * 16)
    finally:
        shutil.rmtree(parts, ignore_errors=True)


@contextmanager
def _one_type_a_column() -> Iterator[None]:
    import polars as pl

    try:
        yield
    except (pl.exceptions.PolarsError, TypeError, OverflowError) as error:
        found = f"some that do not ({str(error).splitlines()[0]})"
        raise UserError("values that go into one column", found, "write a .jsonl file, whose rows may differ") from None
