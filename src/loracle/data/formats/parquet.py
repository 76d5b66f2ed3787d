"""Tables from Parquet files, batch by batch, with the label names that the ``datasets`` library writes into them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loracle.data.table import File, Row, Table, checked, empty, header_only, seekable
from loracle.errors import UserError

BATCH = 8192  # Parquet rows held at once


def open_parquet(file: File) -> Table:
    """Rows in batches, so that no more than one is held."""
    import polars as pl

    def read() -> Iterator[Row]:
        with _parquet(file) as path:
            frame = pl.scan_parquet(path, glob=False, hive_partitioning=False)
            for start in range(0, frame.select(pl.len()).collect().item(), BATCH):
                batch = frame.slice(start, BATCH).collect()
                yield from enumerate(batch.iter_rows(named=True), start + 1)

    if not file.path.stat().st_size:
        raise empty(file)
    with _parquet(file) as path:
        columns = tuple(pl.scan_parquet(path, glob=False, hive_partitioning=False).collect_schema())
        features = _features(pl.read_parquet_metadata(path).get("huggingface"))
    return checked(Table(file.name, columns, _class_labels(features), read), header_only(file))


@contextmanager
def _parquet(file: File) -> Iterator[Path]:
    """A file that can be sought in; damage met while it is read is a UserError."""
    import polars as pl

    def garbage(reason: object) -> UserError:
        return UserError("a Parquet file", f"{file.name}, which is none or is damaged ({reason})", "write it again")

    try:
        with seekable(file) as path:
            yield path
    except pl.exceptions.PolarsError as error:
        raise garbage(str(error).splitlines()[0]) from None
    except pl.exceptions.PanicException:  # a BaseException: a damaged page can trip an assertion in Rust
        raise garbage("its pages cannot be decoded") from None


def _features(metadata: str | None) -> dict[str, Any]:
    """Features of a data set as the ``datasets`` library writes them into Parquet; none where it did not."""
    try:
        features = json.loads(metadata or "{}").get("info", {}).get("features", {})
    except (ValueError, AttributeError):
        return {}  # another tool's use of the same key
    return features if isinstance(features, dict) else {}


def _class_labels(features: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    """``{column: names}`` for ClassLabel columns and for lists of them, [ClassLabel] or {"feature": ClassLabel}."""
    names = {}
    for column, kind in features.items():
        kind = kind[0] if isinstance(kind, list) and kind else kind
        kind = kind.get("feature", kind) if isinstance(kind, dict) else kind
        if isinstance(kind, dict) and kind.get("_type") == "ClassLabel" and kind.get("names"):
            names[column] = tuple(map(str, kind["names"]))
    return names
