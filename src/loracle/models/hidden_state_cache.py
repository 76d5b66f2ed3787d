"""Hidden states of frozen lower layers, computed once and read ever after.

When only the top layers carry adapters, what the layers below make of a text never changes. It is kept on disk: the first
epoch fills the cache, later epochs, seeds and trials read it. The model stays transformers' own: its list of layers is cut
in two, the lower part runs without a gradient, the upper one is given its output as ``inputs_embeds``.

On disk, a folder for each base model, depth and dtype: ``states.bin`` holds rows ``[R, H]``; ``index.bin`` the folder's random
name and then a record for each segment. Both only grow, under a lock, the rows before the record that names them; so whoever
reads sees whole segments, and a process that is killed leaves at most rows that nobody names. A folder that was cleared and
made anew has another name, by which readers notice. A segment is known by its own token ids and those before it.

Legend of shapes: T rows of a batch, N segments, H hidden size.
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
from loracle.text.packing import PackedBatch, ancestors

RECORD = struct.Struct("<16sqq")  # digest, first row, rows
NAME = 16  # random bytes at the head of an index
STATES, INDEX, ABOUT = "states.bin", "index.bin", "about.json"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Entry:
    """One folder of the cache, as ``loracle cache`` shows it."""

    folder: Path
    about: dict[str, Any]
    size: int  # bytes
    used: float  # when it was last opened, seconds since 1970


def entries() -> list[Entry]:
    """All folders of the cache, the one that was used last first; one that is being removed is passed over."""
    found = []
    for about in cache_root().glob(f"*/{ABOUT}"):
        with contextlib.suppress(OSError, ValueError):
            size = sum(p.stat().st_size for p in about.parent.iterdir())
            known = json.loads(about.read_text(encoding="utf-8"))
            found.append(Entry(about.parent, known, size, about.stat().st_mtime))
    return sorted(found, key=lambda e: -e.used)


def cache_root() -> Path:
    """Where the folders are."""
    return cache_dir() / "depth"


def clear() -> int:
    """Remove the whole cache; returns the bytes that were freed. A process that reads it keeps what it has mapped."""
    found = entries()
    for e in found:
        shutil.rmtree(e.folder, ignore_errors=True)
    return sum(e.size for e in found)


class StateCache:
    """States of segments on disk, memory-mapped, safe to share between processes.

    Args:
        about: what the states depend on beside token ids: base model, revision or checksum, depth, dtype, hidden size.
        limit: bytes that all folders together may take. Folders that were not used since this one was opened go first, the
            oldest before others; then nothing more is stored.
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
            self._introduce()
            self._make_room(0)
            self.refresh()

    def get(self, digest: bytes) -> np.ndarray | None:
        """Rows of a segment, ``uint8 [rows, width]``, or None."""
        if (place := self._known.get(digest)) is None:
            return None
        first, count = place
        if first + count > len(self._rows):
            self._map()
            if self._known.get(digest) != place or first + count > len(self._rows):
                return None
        return self._rows[first : first + count]

    def refresh(self) -> None:
        """Take note of what other processes have added, or of a folder that was cleared and made anew."""
        try:
            with (self.folder / INDEX).open("rb") as index:
                if (name := index.read(NAME)) != self._name:
                    self._forget(name)
                index.seek(NAME + self._read)
                added = index.read()
        except FileNotFoundError:  # cleared: what is mapped is as good as ever
            return
        whole = len(added) // RECORD.size * RECORD.size
        for digest, first, count in RECORD.iter_unpack(added[:whole]):
            self._known[digest] = first, count
        self._read += whole

    def put(self, segments: dict[bytes, np.ndarray]) -> None:
        """Add segments ``{digest: uint8 [rows, width]}`` that are not there yet, as long as there is room."""
        if self.limit <= 0:
            return
        try:
            with self._lock:
                self._introduce()
                self.refresh()
                new = {digest: rows for digest, rows in segments.items() if digest not in self._known}
                size = sum(rows.nbytes + RECORD.size for rows in new.values())
                if new and self._make_room(size):
                    self._append(new)
                    self.refresh()
                elif new and not self.full:
                    self.full = True
                    logger.warning("the cache of states is full (--cache-gb); others are computed each time")
        except OSError as e:
            self.limit = 0
            logger.warning("states of lower layers are not kept any more: %s", e)

    def _append(self, new: dict[bytes, np.ndarray]) -> None:
        with (self.folder / STATES).open("ab") as states:
            first = states.seek(0, 2) // self.width
            states.truncate(first * self.width)  # of what a killed process left, keep whole rows: they may be mapped
            for rows in new.values():
                states.write(rows.tobytes())
        with (self.folder / INDEX).open("ab") as index:
            index.truncate(NAME + (index.seek(0, 2) - NAME) // RECORD.size * RECORD.size)
            for digest, rows in new.items():
                index.write(RECORD.pack(digest, first, len(rows)))
                first += len(rows)

    def _introduce(self) -> None:
        """Make the folder what it should be: with an index that bears a name, and a note of what it is about."""
        self.folder.mkdir(parents=True, exist_ok=True)
        index, about = self.folder / INDEX, self.folder / ABOUT
        if not index.exists() or index.stat().st_size < NAME:
            index.write_bytes(os.urandom(NAME))
        if about.exists():
            about.touch()  # its time says when the folder was used
        else:
            temporary = self.folder / f".{ABOUT}"
            temporary.write_text(json.dumps(self.about, indent=1), encoding="utf-8")
            temporary.replace(about)

    def _forget(self, name: bytes) -> None:
        self._name, self._read = name, 0  # of the index that is known, and how far
        self._known: dict[bytes, tuple[int, int]] = {}
        self._rows: np.ndarray = np.zeros((0, self.width), dtype=np.uint8)

    def _map(self) -> None:
        """Map the whole rows that are there by now, if the folder is still the one that is known."""
        with self._lock:
            self.refresh()
            path = self.folder / STATES
            if path.exists() and (count := path.stat().st_size // self.width):
                self._rows = np.memmap(path, dtype=np.uint8, mode="r", shape=(count, self.width))
            else:
                self._forget(b"")

    def _make_room(self, size: int) -> bool:
        """Whether so many bytes find room, once folders that nobody has used since this one was opened are gone as needed."""
        found = entries()
        held = sum(e.size for e in found)
        others = [e for e in found if e.folder != self.folder and e.used < self.opened]
        if size and held - sum(e.size for e in others) + size > self.limit:
            return False
        while others and held + size > self.limit:
            oldest = others.pop()
            shutil.rmtree(oldest.folder, ignore_errors=True)
            held -= oldest.size
        return held + size <= self.limit


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
        if not (missing := [n for n, rows in enumerate(found) if rows is None]):
            return self._tensor(np.concatenate([rows for rows in found if rows is not None]))
        self.computed += 1
        with self._layers(0, self.depth), torch.no_grad():
            norm, self.base.norm = self.base.norm, nn.Identity()
            try:
                states = run().last_hidden_state[0, : batch.tokens]
            finally:
                self.base.norm = norm
        held = states.cpu().contiguous().view(torch.uint8).numpy()
        at = [slice(s, s + n) for s, n in zip(batch.start, batch.length, strict=True)]
        self.cache.put({digests[n]: held[at[n]] for n in missing})
        for n, rows in enumerate(found):
            if rows is not None:  # a text is what it was first computed as, or a resumed run would differ by rounding
                held[at[n]] = rows
        return self._tensor(held)

    def _tensor(self, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(rows).view(self.cache.dtype).to(next(self.base.parameters()).device)

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
    known |= {"device": next(base.parameters()).device.type, "torch": torch.__version__}  # each rounds in its own way
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
