"""Hidden states of frozen lower layers, computed once and read ever after.

When only the top layers carry adapters, what the layers below make of a text never changes. It is kept on disk: the first
epoch fills the cache, later epochs, seeds and trials read it. The model stays transformers' own: its list of layers is cut
in two, the lower part runs without a gradient, the upper one is given its output as ``inputs_embeds``.

On disk, a folder for each base model, depth and dtype: ``states.bin`` holds rows ``[R, H]``, ``index.bin`` a record for each
segment. Both only grow, under a lock, the rows before the record that names them; so whoever reads sees whole segments, and
a process that is killed leaves at most rows that nobody names. A segment is known by its own token ids and those before it.

Legend of shapes: T rows of a batch, N segments, H hidden size.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor, nn

from loracle.hub import cache_dir
from loracle.text.packing import PackedBatch, ancestors

RECORD = struct.Struct("<16sqq")  # digest, first row, rows
STATES, INDEX, ABOUT, LOCK = "states.bin", "index.bin", "about.json", "lock"


@dataclass(frozen=True, slots=True)
class Entry:
    """One folder of the cache, as ``loracle cache`` shows it."""

    folder: Path
    about: dict[str, Any]
    size: int  # bytes
    used: float  # when it was last opened, seconds since 1970


def entries() -> list[Entry]:
    """All folders of the cache, the one that was used last first."""
    found = [
        Entry(
            about.parent,
            json.loads(about.read_text(encoding="utf-8")),
            sum(p.stat().st_size for p in about.parent.iterdir()),
            about.stat().st_mtime,
        )
        for about in cache_root().glob(f"*/{ABOUT}")
    ]
    return sorted(found, key=lambda e: -e.used)


def cache_root() -> Path:
    """Where the folders are."""
    return cache_dir() / "depth"


def clear() -> int:
    """Remove the whole cache; returns the bytes that were freed. A process that reads it keeps what it has mapped."""
    freed = sum(e.size for e in entries())
    shutil.rmtree(cache_root(), ignore_errors=True)
    return freed


class StateCache:
    """States of segments on disk, memory-mapped, safe to share between processes.

    Args:
        about: what the states depend on beside token ids: base model, revision or checksum, depth, dtype, hidden size.
        limit: bytes that all folders together may take. Older folders go first; then nothing more is stored.
    """

    def __init__(self, about: dict[str, Any], *, hidden: int, dtype: torch.dtype, limit: int):
        name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
        self.folder, self.limit = cache_root() / name, limit
        self.dtype, self.width = dtype, hidden * dtype.itemsize
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / ABOUT).write_text(
            json.dumps(about, indent=1), encoding="utf-8"
        )  # its time says when it was used
        self._lock = FileLock(self.folder / LOCK)
        self._known: dict[bytes, tuple[int, int]] = {}
        self._read = 0  # bytes of the index that are known
        self._rows: np.ndarray = np.zeros((0, self.width), dtype=np.uint8)
        self._make_room()
        self._refresh()

    def get(self, digest: bytes) -> np.ndarray | None:
        """Rows of a segment, ``uint8 [rows, width]``, or None."""
        if (place := self._known.get(digest)) is None:
            return None
        first, count = place
        if first + count > len(self._rows) and not self._map():
            return None
        return self._rows[first : first + count]

    def refresh(self) -> None:
        """Take note of what other processes have added."""
        if (self.folder / INDEX).exists() and (self.folder / INDEX).stat().st_size > self._read:
            self._refresh()

    def put(self, segments: dict[bytes, np.ndarray]) -> None:
        """Add segments ``{digest: uint8 [rows, width]}`` that are not there yet, as long as there is room."""
        self.folder.mkdir(parents=True, exist_ok=True)  # somebody may have cleared the cache
        with self._lock:
            self._refresh()
            new = {digest: rows for digest, rows in segments.items() if digest not in self._known}
            size = sum(rows.nbytes + RECORD.size for rows in new.values())
            if not new or self._size() + size > self.limit:
                return
            with (self.folder / STATES).open("ab") as states:
                first = states.seek(0, 2) // self.width
                states.truncate(first * self.width)  # of what a killed process left, keep whole rows
                for rows in new.values():
                    states.write(rows.tobytes())
            with (self.folder / INDEX).open("ab") as index:
                index.truncate(index.seek(0, 2) // RECORD.size * RECORD.size)
                for digest, rows in new.items():
                    index.write(RECORD.pack(digest, first, len(rows)))
                    first += len(rows)
            self._refresh()

    def _refresh(self) -> None:
        path = self.folder / INDEX
        if not path.exists() or path.stat().st_size < self._read:  # cleared meanwhile: what is mapped stays good
            self._read = 0
        if path.exists():
            with path.open("rb") as index:
                index.seek(self._read)
                added = index.read()
            whole = len(added) // RECORD.size * RECORD.size
            if self._read == 0:
                self._known = {}
                self._rows = self._rows[:0]
            for digest, first, count in RECORD.iter_unpack(added[:whole]):
                self._known[digest] = first, count
            self._read += whole

    def _map(self) -> bool:
        """Map what has been written by now; False where somebody has cleared the cache."""
        try:
            self._rows = np.memmap(self.folder / STATES, dtype=np.uint8, mode="r").reshape(-1, self.width)
        except FileNotFoundError:
            self._known, self._read = {}, 0
            return False
        return True

    def _size(self) -> int:
        return sum(e.size for e in entries())

    def _make_room(self) -> None:
        """Remove the folders that were not used for longest, until the others are within the limit."""
        others = [e for e in entries() if e.folder != self.folder]
        while others and self._size() > self.limit:
            shutil.rmtree(others.pop().folder, ignore_errors=True)


class LowerLayers:
    """The lowest ``depth`` layers of a frozen decoder, behind a cache.

    Args:
        base: transformers' decoder (``…Model``), whose list of layers is exchanged while either part runs.
    """

    def __init__(self, base: Any, depth: int, cache: StateCache):
        self.base, self.depth, self.cache = base, depth, cache
        self.computed = 0  # batches whose states were not all there

    def states(self, batch: PackedBatch, run: Any) -> Tensor:
        """States ``[T, H]`` after the lower layers; ``run(**inputs)`` runs the model on this batch.

        Where a segment is missing the whole batch is computed: the others hold what it attends to.
        """
        digests = segment_digests(batch)
        found = [self.cache.get(d) for d in digests]
        if any(rows is None for rows in found):
            self.cache.refresh()
            found = [self.cache.get(d) for d in digests]
        known = [rows for rows in found if rows is not None]
        if len(known) == len(found):
            rows = torch.from_numpy(np.concatenate(known))  # a copy: what is mapped cannot be written
            return rows.view(self.cache.dtype).to(next(self.base.parameters()).device)
        self.computed += 1
        with self._layers(0, self.depth), torch.no_grad():
            norm, self.base.norm = self.base.norm, nn.Identity()
            try:
                states = run().last_hidden_state[0]
            finally:
                self.base.norm = norm
        held = states.cpu().contiguous().view(torch.uint8).numpy()
        self.cache.put(
            {
                d: held[start : start + length]
                for d, start, length, rows in zip(digests, batch.start, batch.length, found, strict=True)
                if rows is None
            }
        )
        return states

    @contextmanager
    def upper(self) -> Iterator[None]:
        """While it is open the model consists of its upper layers."""
        with self._layers(self.depth, len(self.base.layers)):
            yield

    @contextmanager
    def _layers(self, first: int, last: int) -> Iterator[None]:
        layers, config = self.base.layers, self.base.config
        types = getattr(config, "layer_types", None)
        self.base.layers = layers[first:last]
        if types:  # looked up by a layer's place in the list
            config.layer_types = types[first:last]
        try:
            yield
        finally:
            self.base.layers = layers
            if types:
                config.layer_types = types


def keep_lower(base: Any, depth: int, about: dict[str, Any], limit: int) -> LowerLayers:
    """A decoder's lowest ``depth`` layers behind a cache of at most ``limit`` bytes; ``about`` names base and revision."""
    dtype = next(base.parameters()).dtype
    known = about | {"depth": depth, "dtype": str(dtype).removeprefix("torch."), "hidden": base.config.hidden_size}
    return LowerLayers(base, depth, StateCache(known, hidden=base.config.hidden_size, dtype=dtype, limit=limit))


def segment_digests(batch: PackedBatch) -> list[bytes]:
    """What each segment is known by: its token ids, behind those of its ancestors, and where its own begin."""
    ids = [batch.input_ids[s : s + n].astype("<i4").tobytes() for s, n in zip(batch.start, batch.length, strict=True)]
    found = []
    for n, own in enumerate(ids):
        before = b"".join(ids[a] for a in ancestors(batch.parent, n))
        key = struct.pack("<q", len(before)) + before + own
        found.append(hashlib.blake2b(key, digest_size=16).digest())
    return found
