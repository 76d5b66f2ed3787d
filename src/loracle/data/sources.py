"""Files, a folder or a hub id become tables: rows that stream from disk, in memory that does not grow with the files.

Nothing here knows what a column means (that is ``columns.py``). Whatever is wrong with a file ends in a ``UserError``
that names the file and the line; a row that leaves a table can always be encoded as UTF-8.
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
from loracle.data.formats.delimited import open_delimited, open_lines
from loracle.data.formats.json import open_json
from loracle.data.formats.parquet import open_parquet
from loracle.data.table import SUFFIXES, File, Row, Table
from loracle.errors import UserError, near


def open_table(spec: str, revision: str | None = None) -> Table:
    """The one table that a spec stands for: a file, a pattern's, or the 'train' split (or the only one) of a folder or hub id.

    Raises:
        UserError: for whatever ``open_splits`` raises it, and where there are several splits and none is called train.
    """
    splits = open_splits(spec, revision)
    if len(splits) == 1:
        return next(iter(splits.values()))
    if "train" in splits:
        return splits["train"]
    raise UserError("one table, or a split called train", f"splits {', '.join(splits)} in {spec}", "name one file")


def open_splits(spec: str, revision: str | None = None) -> dict[str, Table]:
    """``{"train": table}`` for a file or a pattern (``logs/*.csv``, ``**`` for any depth), whose files follow by name;
    train, validation and test, as far as they are there, for a folder or hub id.

    A hub id is ``hf:owner/name`` or ``modelscope:owner/name``, with ``#config`` behind it where a data set has several.
    Splits are found as Hugging Face finds them: as ``configs`` in the README says, else by file and folder names.

    Raises:
        UserError: the file is missing, empty, damaged or of no known format; a folder holds no such file.
    """
    if spec.startswith(("hf:", "modelscope:")):
        source, _, config = spec.partition("#")
        return _open_folder(hubs.download(source, repo_type="dataset", revision=revision), spec, config)
    path = Path(spec)
    if path.is_dir():
        return _open_folder(path, spec, "")
    if paths := _matching(spec):
        return {"train": _chained(spec, [File(path, str(path)) for path in paths], {})}
    if not path.is_file():
        raise _missing(path, spec)
    return {"train": _open_file(File(path, spec))}


def fingerprint(spec: str) -> str:
    """SHA-256 of what a spec stands for: of the file, or of names and contents of all files of a pattern, folder or hub id."""
    from_hub = spec.startswith(("hf:", "modelscope:"))
    root = hubs.download(spec.partition("#")[0], repo_type="dataset") if from_hub else Path(spec)
    if root.is_file():
        return hubs.checksum(root)
    if paths := _matching(spec):
        root, names = Path(), [path.as_posix() for path in paths]
    else:
        found = (p for p in root.rglob("*") if p.is_file() and not p.name.startswith("."))
        names = sorted(p.relative_to(root).as_posix() for p in found)
    return hashlib.sha256("".join(f"{name} {hubs.checksum(root / name)}\n" for name in names).encode()).hexdigest()


def _matching(spec: str) -> list[Path]:
    """Files of a pattern, by name; none where the spec is no pattern or a file is called so."""
    if not glob.has_magic(spec) or Path(spec).exists():
        return []
    return sorted(path for path in map(Path, glob.glob(spec, recursive=True)) if path.is_file())


def _missing(path: Path, spec: str) -> UserError:
    if not path.parent.is_dir():
        return UserError("a file with data", f"no folder '{path.parent}' for {spec}", "check the path")
    fix = "check the path"
    if re.fullmatch(r"[\w.-]+/[\w.-]+", spec) and not path.suffix:
        fix = f"write hf:{spec} or modelscope:{spec} for a dataset of a hub"
    beside = (p.name for p in path.parent.iterdir())
    return UserError("a file with data", f"no file {spec}{near(path.name, beside)}", fix)


OPENERS = {
    "csv": open_delimited, "tsv": open_delimited, "json": open_json, "parquet": open_parquet, "txt": open_lines,
}  # fmt: skip


def _open_file(file: File) -> Table:
    if opener := OPENERS.get(file.format or ""):
        return replace(opener(file), files=(file,))
    raise UserError(f"a file that ends in {SUFFIXES}", file.name, "rename or convert it")


def _open_folder(folder: Path, spec: str, config: str) -> dict[str, Table]:
    splits, names = find_splits(folder, spec, config)
    tables = {}
    for split, paths in splits.items():
        name = f"{spec} ({split})"
        files = [File(path, f"{name}: {path.relative_to(folder)}") for path in paths]
        tables[split] = _chained(name, files, names)
    return tables


def _chained(name: str, files: list[File], names: dict[str, tuple[str, ...]]) -> Table:
    """One table from the shards of a split, or from the files of a pattern; rows are numbered through."""
    shards = [_open_file(file) for file in files]
    first = shards[0]
    for shard in shards[1:]:
        if shard.columns != first.columns and files[0].format != "json":  # JSON objects may leave out keys
            raise UserError(
                f"the columns {', '.join(first.columns)} in every file of {name}",
                f"{', '.join(shard.columns)} in {shard.name}", "name one file, or put the others elsewhere",
            )  # fmt: skip
    columns = tuple(dict.fromkeys(column for shard in shards for column in shard.columns))
    labels = {**{c: n for c, n in names.items() if c in columns}, **first.label_names}

    def read() -> Iterator[Row]:
        rows = itertools.chain.from_iterable(shard.rows() for shard in shards)
        return ((number, row) for number, (_, row) in enumerate(rows, 1))

    return Table(name, columns, labels, first.read if len(shards) == 1 else read, tuple(files))
