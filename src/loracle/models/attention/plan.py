"""The token tree of a packed batch: which token attends to which, laid out once a batch for every layer.

A batch is a forest of segments (``text.packing``). A token attends to all tokens of its segment's ancestors and, in a decoder,
causally to its own segment. For example a prefix ``P`` of 2 tokens with the titles ``a`` (2) and ``b`` (1)::

            P0 P1 a0 a1 b0
       P0    1
       P1    1  1
       a0    1  1  1
       a1    1  1  1  1
       b0    1  1        1

Two ways compute the same attention. ``BlockPlan`` pads segments of similar length to a few rectangles and works on any device
and in any dtype (``blocks.py``). ``Sequences`` lists each segment's keys for flash attention (``flash.py``).

Shapes: T tokens, N segments; in a block: B segments, L tokens of the longest, A shared tokens above them, K keys of a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from loracle.text.packing import ROOT, PackedBatch, ancestors

MIN_KEYS = 16  # of a row of scores: a CPU's softmax takes 6 ns a number of a shorter row, and 0.5 ns of a longer one
FUSED_FROM = 320  # tokens: longer blocks go to the fused kernel, which never stores the L × K scores
MAX_KEYS_PER_TOKEN = 4  # of flash attention: more would be copies of one long instruction
ROWS_BITS = 5  # significant bits of a batch's number of rows on a CPU
LENGTH_STEP = 1.6  # the longest segment of a block over its shortest


@dataclass(slots=True, kw_only=True)
class Block:
    """Segments at one depth of the tree, padded to a rectangle."""

    queries: slice  # rows of the rearranged queries: B × L
    keys: slice  # rows of the rearranged keys: B × K
    size: tuple[int, int, int]  # B, L, K
    common: Tensor | None  # int64 [A], tokens of the ancestors that all segments share
    query_positions: Tensor  # int64 [B, L]; padding is -1
    key_positions: Tensor  # int64 [B, K]; padding is -1
    common_positions: Tensor | None  # int64 [A]
    masks: dict[tuple[bool, int | None], tuple[Tensor, Tensor | None]] = field(default_factory=dict)

    def mask(self, causal: bool, window: int | None) -> tuple[Tensor, Tensor | None]:
        """Which query attends to which key, ``bool [B, 1, 1, L, K]``.

        With a window there is a second mask for the common part, ``[B, 1, 1, L, A]``.
        """
        if (causal, window) not in self.masks:
            q, k = self.query_positions[:, :, None], self.key_positions[:, None, :]
            visible = (k >= 0) & (q >= 0)
            if causal:
                visible = visible & (k <= q)
            common = None
            if window is not None:
                visible = visible & (q - k < window)
                if self.common_positions is not None:
                    common = (q - self.common_positions[None, None, :] < window)[:, None, None]
            # A padding query attends to the first key, so that its softmax stays finite. Its result is not read.
            visible[:, :, 0] |= self.query_positions < 0
            self.masks[causal, window] = (visible[:, None, None], common)
        return self.masks[causal, window]


@dataclass(slots=True, kw_only=True)
class BlockPlan:
    """A batch as blocks, and the rows that go into them."""

    blocks: list[Block]
    query_rows: Tensor  # int64, token row of each padded query row
    query_places: Tensor  # int64 [T], padded query row of each token
    key_rows: Tensor  # int64, token row of each padded key row
    key_places: Tensor | None  # int64 [T], padded key row of each token; None where a token is a key in several places

    @classmethod
    def of(cls, batch: PackedBatch, device: torch.device) -> BlockPlan:
        """Lay out a batch."""
        query_rows: list[np.ndarray] = []
        key_rows: list[np.ndarray] = []
        blocks: list[Block] = []
        queries = keys = 0
        for segments in _similar_segments(batch):
            block, q, k = _block(batch, segments, (queries, keys), device)
            queries, keys = queries + q.size, keys + k.size
            blocks.append(block)
            query_rows.append(q.ravel())
            key_rows.append(k.ravel())
        q_all, k_all = np.concatenate(query_rows), np.concatenate(key_rows)
        once = np.count_nonzero(k_all >= 0) == batch.tokens
        return cls(
            blocks=blocks,
            query_rows=to_device(np.maximum(q_all, 0), device),
            query_places=to_device(_inverse(q_all, batch.tokens), device),
            key_rows=to_device(np.maximum(k_all, 0), device),
            key_places=to_device(_inverse(k_all, batch.tokens), device) if once else None,
        )


@dataclass(slots=True, kw_only=True)
class Sequences:
    """A batch as sequences of flash attention, one a segment, whose queries are the last of its keys."""

    query_ends: Tensor  # int32 [N + 1], 0 and then the end of each segment's queries
    key_ends: Tensor  # int32 [N + 1], the same of its keys
    longest: tuple[int, int]  # queries, keys
    key_rows: Tensor | None  # int64, token row of each key; None where the keys are the tokens themselves

    @classmethod
    def of(cls, batch: PackedBatch, device: torch.device) -> Sequences | None:
        """Lay out a batch; None where it takes more than ``MAX_KEYS_PER_TOKEN``."""
        above = np.where(batch.parent == ROOT, 0, batch.position_ids[batch.start])
        keys = batch.length + above
        if keys.sum() > MAX_KEYS_PER_TOKEN * batch.tokens:
            return None
        rows = [_rows(batch, [*ancestors(batch.parent, n), n]) for n in range(len(keys))] if above.any() else None
        ends = (np.concatenate(([0], np.cumsum(x))).astype(np.int32) for x in (batch.length, keys))
        query_ends, key_ends = (to_device(x, device) for x in ends)
        return cls(
            query_ends=query_ends,
            key_ends=key_ends,
            longest=(int(batch.length.max()), int(keys.max())),
            key_rows=None if rows is None else to_device(np.concatenate(rows), device),
        )


class AttentionPlan:
    """The plan that a forward hands to every layer. Blocks are laid out when a layer first needs them.

    Args:
        sequences: for layers that flash attention can compute; None where it is missing.
    """

    def __init__(self, batch: PackedBatch | None, device: torch.device, sequences: Sequences | None = None):
        self.batch, self.device, self.sequences = batch, device, sequences
        self._blocks: BlockPlan | None = None

    def blocks(self) -> BlockPlan:
        """The batch as blocks."""
        if self._blocks is None:
            assert self.batch is not None, "a plan of sequences alone has no blocks"
            self._blocks = BlockPlan.of(self.batch, self.device)
        return self._blocks


def rows_for(tokens: int, device: torch.device) -> int:
    """The number of rows that a batch goes through the model as. On a CPU it is rounded up, by a sixteenth at most.

    A CPU compiles a matrix product for each number of rows, which with AMX takes as long as a product or two.
    """
    step = 1 << max(0, tokens.bit_length() - ROWS_BITS)
    return tokens if device.type == "cuda" else -(-tokens // step) * step


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """An array as a tensor on a device. A GPU copies it from pinned memory while the program continues."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _similar_segments(batch: PackedBatch) -> Iterator[list[int]]:
    """Segments in groups of the same depth (root or not) and similar length, the longest last."""
    inner = batch.parent != ROOT
    order = np.lexsort((batch.length, inner))
    group: list[int] = []
    for n in order.tolist():
        if group and (inner[n] != inner[group[0]] or batch.length[n] > max(16, LENGTH_STEP * batch.length[group[0]])):
            yield group
            group = []
        group.append(n)
    yield group


def _block(
    batch: PackedBatch, segments: list[int], first: tuple[int, int], device: torch.device
) -> tuple[Block, np.ndarray, np.ndarray]:
    """A block whose query and key rows start at ``first``; and the token rows of its queries ``[B, L]`` and keys ``[B, K]``.

    Padding is -1.
    """
    rows = [_rows(batch, [n]) for n in segments]
    paths = [ancestors(batch.parent, n) for n in segments]
    length = max(map(len, rows))
    shared = 0
    if length < FUSED_FROM:
        while all(len(p) > shared for p in paths) and len({p[shared] for p in paths}) == 1:
            shared += 1
    above = [_rows(batch, p[shared:]) for p in paths]
    common = _rows(batch, paths[0][:shared])
    q = _rectangle(rows, length)
    padding = max(0, MIN_KEYS - len(common) - max(map(len, above)) - length)
    k = np.concatenate([_rectangle(above, max(map(len, above))), q, np.full((len(q), padding), -1)], axis=1)
    positions = batch.position_ids
    block = Block(
        queries=slice(first[0], first[0] + q.size),
        keys=slice(first[1], first[1] + k.size),
        size=(*q.shape, k.shape[1]),
        common=to_device(common, device) if len(common) else None,
        query_positions=to_device(np.where(q >= 0, positions[q], -1), device),
        key_positions=to_device(np.where(k >= 0, positions[k], -1), device),
        common_positions=to_device(positions[common], device) if len(common) else None,
    )
    return block, q, k


def _rows(batch: PackedBatch, segments: list[int]) -> np.ndarray:
    """Token rows of several segments, one after the other."""
    spans = [np.arange(batch.start[n], batch.start[n] + batch.length[n]) for n in segments]
    return np.concatenate(spans) if spans else np.empty(0, dtype=np.int64)


def _rectangle(rows: list[np.ndarray], width: int) -> np.ndarray:
    out = np.full((len(rows), width), -1, dtype=np.int64)
    for line, r in zip(out, rows, strict=True):
        line[: len(r)] = r
    return out


def _inverse(rows: np.ndarray, tokens: int) -> np.ndarray:
    """The place of each token among padded rows."""
    places = np.empty(tokens, dtype=np.int64)
    real = rows >= 0
    places[rows[real]] = np.flatnonzero(real)
    return places
