"""A cache on disk of the hidden states after the frozen lower layers, which are computed once.

When only the top layers have adapters, the states below them never change. The first epoch fills the cache. Later epochs, seeds
and trials read it. The model stays transformers' own: its list of layers is cut in two. The lower part runs without gradients,
and the upper part gets its output as ``inputs_embeds``.

Each base model, depth and dtype has a folder. ``states.bin`` holds rows ``[R, H]``. ``index.bin`` holds a random name of the
folder and a record for each segment. Both only grow, under a lock, and rows are written before their record. So readers see
whole segments, and a killed process leaves at most rows without a record. A folder that was cleared and made again has another
name, by which readers notice. The key of a segment is its token ids and those before it.

Shapes: T rows of a batch, N segments, H hidden size.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor, nn

from loracle.hubs import cache_dir
from loracle.models.architectures import architecture_of, layers_of, set_layers
from loracle.text.packing import PackedBatch, ancestors

RECORD = struct.Struct("<16sqq")  # digest, first row, rows
NAME = 16  # random bytes at the start of an index
STATES, INDEX, ABOUT = "states.bin", "index.bin", "about.json"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Entry:
    """One folder of the cache, as ``loracle cache`` lists it."""

    folder: Path
    about: dict[str, Any]
    size: int  # bytes
    used: float  # time it was last opened, seconds since 1970


def entries() -> list[Entry]:
    """All folders of the cache, the last used first. Folders that are being removed are skipped."""
    listed = []
    for about in cache_root().glob(f"*/{ABOUT}"):
        with contextlib.suppress(OSError, ValueError):
            size = sum(p.stat().st_size for p in about.parent.iterdir())
            facts = json.loads(about.read_text(encoding="utf-8"))
            listed.append(Entry(about.parent, facts, size, about.stat().st_mtime))
    return sorted(listed, key=lambda e: -e.used)


def cache_root() -> Path:
    """The folder of all these folders."""
    return cache_dir() / "depth"


def clear() -> int:
    """Remove the whole cache and return the freed bytes. A process that reads it keeps the rows that it has mapped."""
    removed = entries()
    for e in removed:
        shutil.rmtree(e.folder, ignore_errors=True)
    return sum(e.size for e in removed)


class StateCache:
    """States of segments on disk, memory-mapped, safe to share between processes.

    Args:
        about: all that the states depend on beside token ids: base model, revision or checksum, depth, dtype, hidden size.
        limit: bytes of all folders together. Folders not used since this one was opened are removed first, the oldest before
            others. After that nothing more is stored.
    """

    def __init__(self, about: dict[str, Any], *, hidden: int, dtype: torch.dtype, limit: int):
        name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
        self.folder, self.about, self.limit = cache_root() / name, about, limit
        self.dtype, self.width = dtype, hidden * dtype.itemsize
        cache_root().mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(cache_root() / f"{name}.lock")  # beside the folder, which may be removed meanwhile
        self.opened, self.full = time.time(), False
        self._forget(b"")
        with self._lock:
            self._prepare_folder()
            self._make_room(0)
            self.refresh()

    def get(self, digest: bytes) -> np.ndarray | None:
        """Rows of a segment, ``uint8 [rows, width]``, or None."""
        if (place := self._places.get(digest)) is None:
            return None
        first, count = place
        if first + count > len(self._rows):
            self._map()
            if self._places.get(digest) != place or first + count > len(self._rows):
                return None
        return self._rows[first : first + count]

    def refresh(self) -> None:
        """Read the records that other processes have added, and notice a folder that was cleared and made again."""
        try:
            with (self.folder / INDEX).open("rb") as index:
                if (name := index.read(NAME)) != self._name:
                    self._forget(name)
                index.seek(NAME + self._read)
                added = index.read()
        except FileNotFoundError:  # cleared; mapped rows stay valid
            return
        whole = len(added) // RECORD.size * RECORD.size
        for digest, first, count in RECORD.iter_unpack(added[:whole]):
            self._places[digest] = first, count
        self._read += whole

    def put(self, segments: dict[bytes, np.ndarray]) -> None:
        """Add new segments ``{digest: uint8 [rows, width]}``, as long as there is room."""
        if self.limit <= 0:
            return
        try:
            with self._lock:
                self._prepare_folder()
                self.refresh()
                new = {digest: rows for digest, rows in segments.items() if digest not in self._places}
                size = sum(rows.nbytes + RECORD.size for rows in new.values())
                if new and self._make_room(size):
                    self._append(new)
                    self.refresh()
                elif new and not self.full:
                    self.full = True
                    logger.warning("the cache of states is full (--cache-gb); other states are computed each time")
        except OSError as e:
            self.limit = 0
            logger.warning("states of lower layers are no longer cached: %s", e)

    def _append(self, new: dict[bytes, np.ndarray]) -> None:
        with (self.folder / STATES).open("ab") as states:
            first = states.seek(0, 2) // self.width
            states.truncate(first * self.width)  # keep whole rows of a killed process, which may be mapped
            for rows in new.values():
                states.write(rows.tobytes())
        with (self.folder / INDEX).open("ab") as index:
            index.truncate(NAME + (index.seek(0, 2) - NAME) // RECORD.size * RECORD.size)
            for digest, rows in new.items():
                index.write(RECORD.pack(digest, first, len(rows)))
                first += len(rows)

    def _prepare_folder(self) -> None:
        """Make sure that the folder has an index with a name, and a note of its contents."""
        self.folder.mkdir(parents=True, exist_ok=True)
        index, about = self.folder / INDEX, self.folder / ABOUT
        if not index.exists() or index.stat().st_size < NAME:
            index.write_bytes(os.urandom(NAME))
        if about.exists():
            about.touch()  # its time is when the folder was last used
        else:
            temporary = self.folder / f".{ABOUT}"
            temporary.write_text(json.dumps(self.about, indent=1), encoding="utf-8")
            temporary.replace(about)

    def _forget(self, name: bytes) -> None:
        self._name, self._read = name, 0  # of the index, and the bytes of it that are read
        self._places: dict[bytes, tuple[int, int]] = {}
        self._rows: np.ndarray = np.zeros((0, self.width), dtype=np.uint8)

    def _map(self) -> None:
        """Map all whole rows, if the folder is still the same."""
        with self._lock:
            self.refresh()
            path = self.folder / STATES
            if path.exists() and (count := path.stat().st_size // self.width):
                self._rows = np.memmap(path, dtype=np.uint8, mode="r", shape=(count, self.width))
            else:
                self._forget(b"")

    def _make_room(self, size: int) -> bool:
        """Remove folders not used since this one was opened, as far as needed; returns whether ``size`` more bytes fit."""
        folders = entries()
        total = sum(e.size for e in folders)
        unused = [e for e in folders if e.folder != self.folder and e.used < self.opened]
        if size and total - sum(e.size for e in unused) + size > self.limit:
            return False
        while unused and total + size > self.limit:
            oldest = unused.pop()
            shutil.rmtree(oldest.folder, ignore_errors=True)
            total -= oldest.size
        return total + size <= self.limit


class LowerLayers:
    """The lowest ``depth`` layers of a frozen decoder, with a cache of their output.

    Args:
        base: transformers' decoder (``…Model``). Its list of layers is replaced while either part runs.
    """

    def __init__(self, base: Any, depth: int, cache: StateCache):
        self.base, self.depth, self.cache = base, depth, cache
        self.computed = 0  # batches that were not all in the cache

    def states(self, batch: PackedBatch, run: Any) -> Tensor:
        """States ``[T, H]`` after the lower layers; ``run(**inputs)`` runs the model on this batch.

        If a segment is missing, the whole batch is computed, because the segment attends to others.
        """
        digests = segment_digests(batch)
        cached = [self.cache.get(d) for d in digests]
        if any(rows is None for rows in cached):
            self.cache.refresh()
            cached = [self.cache.get(d) for d in digests]
        if not (missing := [n for n, rows in enumerate(cached) if rows is None]):
            return self._tensor(np.concatenate([rows for rows in cached if rows is not None]))
        self.computed += 1
        name = architecture_of(self.base.config).norm
        with self._layers(0, self.depth), torch.no_grad():
            norm = getattr(self.base, name)
            setattr(self.base, name, nn.Identity())
            try:
                states = run().last_hidden_state[0, : batch.tokens]
            finally:
                setattr(self.base, name, norm)
        computed = states.cpu().contiguous().view(torch.uint8).numpy()
        at = [slice(s, s + n) for s, n in zip(batch.start, batch.length, strict=True)]
        self.cache.put({digests[n]: computed[at[n]] for n in missing})
        for n, rows in enumerate(cached):
            if rows is not None:  # keep the first result, or a resumed run would differ by rounding
                computed[at[n]] = rows
        return self._tensor(computed)

    def _tensor(self, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(rows).view(self.cache.dtype).to(next(self.base.parameters()).device)

    @contextmanager
    def upper(self) -> Iterator[None]:
        """Run only the upper layers inside this context."""
        with self._layers(self.depth, len(layers_of(self.base))):
            yield

    @contextmanager
    def _layers(self, first: int, last: int) -> Iterator[None]:
        layers, config = layers_of(self.base), self.base.config
        types = getattr(config, "layer_types", None)
        set_layers(self.base, layers[first:last])
        if types:  # one for each layer, by its index in the list
            config.layer_types = types[first:last]
        try:
            yield
        finally:
            set_layers(self.base, layers)
            if types:
                config.layer_types = types


def keep_lower(base: Any, depth: int, about: dict[str, Any], limit: int) -> LowerLayers:
    """A decoder's lowest ``depth`` layers with a cache of at most ``limit`` bytes; ``about`` names base and revision."""
    dtype = next(base.parameters()).dtype
    about = about | {"depth": depth, "dtype": str(dtype).removeprefix("torch."), "hidden": base.config.hidden_size}
    about |= {"device": next(base.parameters()).device.type, "torch": torch.__version__}  # each rounds differently
    return LowerLayers(base, depth, StateCache(about, hidden=base.config.hidden_size, dtype=dtype, limit=limit))


def segment_digests(batch: PackedBatch) -> list[bytes]:
    """The key of each segment: a hash of its token ids, those of its ancestors, and the place where its own start."""
    ids = [batch.input_ids[s : s + n].astype("<i4").tobytes() for s, n in zip(batch.start, batch.length, strict=True)]
    digests = []
    for n, own_ids in enumerate(ids):
        before = b"".join(ids[a] for a in ancestors(batch.parent, n))
        key = struct.pack("<q", len(before)) + before + own_ids
        digests.append(hashlib.blake2b(key, digest_size=16).digest())
    return digests
