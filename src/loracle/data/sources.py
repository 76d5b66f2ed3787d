"""A file, pattern, folder or hub id becomes tables whose rows stream from disk.

Memory does not grow with the files. Every row can be encoded as UTF-8. Errors name the file and the line. What a column
means is decided in ``columns.py``.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from loracle import hubs
from loracle.data.folders import find_splits
from loracle.data.formats import format_of, suffix_list
from loracle.data.table import File, Row, Table
from loracle.errors import UserError, near


def open_table(spec: str, revision: str | None = None) -> Table:
    """The table of a file or pattern; the 'train' split, or the only one, of a folder or hub id.

    Raises:
        UserError: as ``open_splits``, and where none of several splits is called train.
    """
    splits = open_splits(spec, revision)
    if len(splits) == 1:
        return next(iter(splits.values()))
    if "train" in splits:
        return splits["train"]
    raise UserError(f"{spec} has several splits and none is called train: {', '.join(splits)}.", "Name one file.")


def open_splits(spec: str, revision: str | None = None) -> dict[str, Table]:
    """``{split: table}``: train for a file or pattern; train, validation and test, if present, for a folder or hub id.

    The files of a pattern (``logs/*.csv``, ``**`` for any depth) follow each other by name. A hub id is ``hf:owner/name``
    or ``modelscope:owner/name``, plus ``#config`` where a data set has several. Splits are found as Hugging Face finds
    them: from ``configs`` in the README, else from file and folder names.

    Raises:
        UserError: the file is missing, empty, damaged or of an unknown format; a folder has no data file.
    """
    if hubs.remote_source(spec) is not None:
        source, _, config = spec.partition("#")
        return _open_folder(hubs.download(source, repo_type="dataset", revision=revision), spec, config)
    path = Path(spec)
    if path.is_dir():
        return _open_folder(path, spec, "")
    if paths := _matching(spec):
        return {"train": _concatenated(spec, [File(path, str(path)) for path in paths], {})}
    if not path.is_file():
        raise _missing(path, spec)
    return {"train": _open_file(File(path, spec))}


def fingerprint(spec: str) -> str:
    """SHA-256 of a file, or of the names and contents of all files of a pattern, folder or hub id."""
    from_hub = hubs.remote_source(spec) is not None
    root = hubs.download(spec.partition("#")[0], repo_type="dataset") if from_hub else Path(spec)
    if root.is_file():
        return hubs.checksum(root)
    if paths := _matching(spec):
        root, names = Path(), [path.as_posix() for path in paths]
    else:
        files = (p for p in root.rglob("*") if p.is_file() and not p.name.startswith("."))
        names = sorted(p.relative_to(root).as_posix() for p in files)
    return hashlib.sha256("".join(f"{name} {hubs.checksum(root / name)}\n" for name in names).encode()).hexdigest()


def _matching(spec: str) -> list[Path]:
    """Files that match a pattern, by name. Empty where the spec is no pattern, or is the name of an existing file."""
    if not glob.has_magic(spec) or Path(spec).exists():
        return []
    return sorted(path for path in map(Path, glob.glob(spec, recursive=True)) if path.is_file())


def _missing(path: Path, spec: str) -> UserError:
    if not path.parent.is_dir():
        return UserError(f"Cannot open {spec}: there is no folder '{path.parent}'.", "Check the path.")
    hint = "Check the path."
    if re.fullmatch(r"[\w.-]+/[\w.-]+", spec) and not path.suffix:
        hint = f"Write {hubs.remote_forms(spec)} for a dataset of a hub."
    return UserError(f"There is no file {spec}{near(path.name, (p.name for p in path.parent.iterdir()))}.", hint)


def _open_file(file: File) -> Table:
    format = format_of(file.path)
    if format is None:
        raise UserError(f"Unknown format: {file.name} does not end in {suffix_list()}.", "Rename or convert it.")
    return replace(format.open(file), files=(file,))


def _open_folder(folder: Path, spec: str, config: str) -> dict[str, Table]:
    splits, names = find_splits(folder, spec, config)
    tables = {}
    for split, paths in splits.items():
        name = f"{spec} ({split})"
        files = [File(path, f"{name}: {path.relative_to(folder)}") for path in paths]
        tables[split] = _concatenated(name, files, names)
    return tables


def _concatenated(name: str, files: list[File], names: dict[str, tuple[str, ...]]) -> Table:
    """One table from several files, with running row numbers."""
    shards = [_open_file(file) for file in files]
    first, format = shards[0], format_of(files[0].path)
    for shard in shards[1:]:
        if shard.columns != first.columns and not (format and format.optional_columns):
            raise UserError(
                f"The files of {name} have different columns: {', '.join(first.columns)} in {first.name}, but "
                f"{', '.join(shard.columns)} in {shard.name}.",
                "Name one file, or move the others elsewhere.",
            )
    columns = tuple(dict.fromkeys(column for shard in shards for column in shard.columns))
    labels = {**{c: n for c, n in names.items() if c in columns}, **first.label_names}

    def read() -> Iterator[Row]:
        rows = itertools.chain.from_iterable(shard.rows() for shard in shards)
        return ((number, row) for number, (_, row) in enumerate(rows, 1))

    return Table(name, columns, labels, first.read if len(shards) == 1 else read, tuple(files))
