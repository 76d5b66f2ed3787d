"""Parquet, in batches of rows, with the label names that the ``datasets`` library writes into it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loracle.data.table import (
    ROW_NUMBER,
    File,
    Format,
    Row,
    Table,
    empty_file_error,
    no_rows_error,
    require_rows,
    seekable,
)
from loracle.errors import UserError

if TYPE_CHECKING:
    import polars as pl

BATCH = 8192  # rows in memory at once


def open_parquet(file: File) -> Table:
    """A table that holds one batch of rows in memory at a time."""
    import polars as pl

    def read() -> Iterator[Row]:
        with _parquet(file) as path:
            frame = pl.scan_parquet(path, glob=False, hive_partitioning=False)
            for start in range(0, frame.select(pl.len()).collect().item(), BATCH):
                batch = frame.slice(start, BATCH).collect()
                yield from enumerate(batch.iter_rows(named=True), start + 1)

    if not file.path.stat().st_size:
        raise empty_file_error(file)
    with _parquet(file) as path:
        columns = tuple(pl.scan_parquet(path, glob=False, hive_partitioning=False).collect_schema())
        features = _features(pl.read_parquet_metadata(path).get("huggingface"))
    return require_rows(Table(file.name, columns, _class_labels(features), read), no_rows_error(file))


def scan_parquet(table: Table, paths: list[Path], columns: list[str]) -> pl.LazyFrame:
    """The files as Polars reads them, with row numbers from 1."""
    import polars as pl

    return pl.scan_parquet(
        paths, glob=False, hive_partitioning=False, row_index_name=ROW_NUMBER, row_index_offset=1
    ).select(ROW_NUMBER, *columns)


PARQUET = Format(suffixes=(".parquet", ".pq"), open=open_parquet, scan=scan_parquet)


@contextmanager
def _parquet(file: File) -> Iterator[Path]:
    """Path of an unzipped Parquet file. Errors of Polars while it is read become UserErrors."""
    import polars as pl

    def damaged(reason: object) -> UserError:
        return UserError(f"{file.name} is not a Parquet file, or is damaged: {reason}.", "Write it again.")

    try:
        with seekable(file) as path:
            yield path
    except pl.exceptions.PolarsError as error:
        raise damaged(str(error).splitlines()[0].rstrip(".")) from None
    except pl.exceptions.PanicException:  # a BaseException: a damaged page can trip an assertion in Rust
        raise damaged("its pages cannot be decoded") from None


def _features(metadata: str | None) -> dict[str, Any]:
    """Features that the ``datasets`` library wrote into a Parquet file; empty where it wrote none."""
    try:
        features = json.loads(metadata or "{}").get("info", {}).get("features", {})
    except (ValueError, AttributeError):
        return {}  # another tool's use of the same key
    return features if isinstance(features, dict) else {}


def _class_labels(features: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    """``{column: names}`` of ClassLabel columns and of lists of them: [ClassLabel] or {"feature": ClassLabel}."""
    names = {}
    for column, feature in features.items():
        feature = feature[0] if isinstance(feature, list) and feature else feature
        feature = feature.get("feature", feature) if isinstance(feature, dict) else feature
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and feature.get("names"):
            names[column] = tuple(map(str, feature["names"]))
    return names
