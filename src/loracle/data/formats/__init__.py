"""The file formats that loracle reads, one module each.

To add one, write a ``Format`` in a module of its own and register it in ``FORMATS``.
"""

from __future__ import annotations

from pathlib import Path

from loracle.data.formats import delimited, json, parquet
from loracle.data.table import File, Format

FORMATS: dict[str, Format] = {
    "csv": delimited.CSV,
    "tsv": delimited.TSV,
    "json": json.JSON,
    "parquet": parquet.PARQUET,
    "txt": delimited.TXT,
}


def format_of(path: Path) -> Format | None:
    """The format that reads a file of this name, gzipped or not; None for an unknown suffix."""
    suffix = File(path, path.name).suffix
    return next((format for format in FORMATS.values() if suffix in format.suffixes), None)


def suffix_list() -> str:
    """The suffixes of all formats, for messages."""
    *others, last = (suffix for format in FORMATS.values() for suffix in format.suffixes)
    return f"{', '.join(others)} or {last}, each also with .gz"
