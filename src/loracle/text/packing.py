"""Encoded texts become one packed batch without padding: a forest of segments. Pure NumPy.

A segment's tokens attend to all tokens of its ancestors and, causally, to their own segment; positions go on where the
parent ended. So what several texts have in common before them (an instruction, an ad brief) stands in the batch once. With a
prefix ``P`` of 2 tokens and the titles ``a`` (2) and ``b`` (1)::

            P0 P1 a0 a1 b0
       P0    1
       P1    1  1
       a0    1  1  1
       a1    1  1  1  1
       b0    1  1        1

``position_ids = 0 1 2 3 2``. Texts without anything in common are the same thing with no parents. Equal texts of a batch are
one segment: a title that stands in ten pairs is computed once.

Shapes: T tokens, N segments, S scored segments, E encoded texts, K chunks of them (K = E unless long texts are chunked).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from loracle.text.tokenize import Encoded

SHARE_FROM = 16  # tokens: a shorter common start costs less repeated than shared
ROOT = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedBatch:
    """A forest of segments, laid end to end. Parents come before their children."""

    input_ids: np.ndarray  # int64 [T]
    position_ids: np.ndarray  # int64 [T]
    token_types: np.ndarray | None  # int64 [T], encoders only
    start: np.ndarray  # int64 [N], first row of each segment
    length: np.ndarray  # int64 [N]
    parent: np.ndarray  # int64 [N], index of the parent segment or ROOT
    scored: np.ndarray  # int64 [S], the segments whose text is scored
    read_at: np.ndarray  # int64 [S], row of each scored segment's last token
    pool_from: np.ndarray  # int64 [S], first row of the text itself, where mean pooling starts
    chunk_segment: np.ndarray  # int64 [K], which scored segment (index into 0..S-1) each chunk is
    chunk_text: np.ndarray  # int64 [K], which of the E texts each chunk belongs to
    useful_tokens: int  # what the texts hold, as if each were computed alone

    @property
    def tokens(self) -> int:
        """Rows that go through the model."""
        return len(self.input_ids)

    @property
    def texts(self) -> int:
        """Encoded texts in the batch, equal ones counted each."""
        return int(self.chunk_text[-1]) + 1 if len(self.chunk_text) else 0

    def visible(self) -> np.ndarray:
        """Who attends to whom, ``bool [T, T]``: the drawing above. For tests; no engine builds this matrix."""
        seen = np.zeros((self.tokens, self.tokens), dtype=bool)
        for n in range(len(self.start)):
            rows = slice(self.start[n], self.start[n] + self.length[n])
            seen[rows, rows] = np.tri(self.length[n], dtype=bool)
            for a in ancestors(self.parent, n):
                seen[rows, self.start[a] : self.start[a] + self.length[a]] = True
        return seen


def ancestors(parent: np.ndarray | Sequence[int], segment: int) -> list[int]:
    """The segments above one, root first."""
    path: list[int] = []
    while (segment := int(parent[segment])) != ROOT:
        path.append(segment)
    return path[::-1]


def pack(texts: Sequence[Encoded], *, share_from: int | None = SHARE_FROM, first_position: int = 0) -> PackedBatch:
    """Lay encoded texts out as one batch.

    A common start of ``share_from`` tokens and more is laid out once; None repeats it always, which encoders need, since
    their prefix sees the text. ``first_position`` is the position id of a first token (RoBERTa: ``padding_idx + 1``).

    Raises:
        ValueError: there is nothing to pack.
    """
    chunks = _chunks(texts)
    if not chunks:
        raise ValueError("nothing to pack")
    forest, chunk_node = _grown(chunks, share_from)
    scored, chunk_segment = np.unique(np.array(chunk_node), return_inverse=True)
    length = np.array([len(ids) for ids in forest.ids])
    start = np.concatenate(([0], np.cumsum(length)[:-1]))
    depth = np.array(forest.depth)  # tokens above each segment
    text_start = np.zeros(len(length), dtype=np.int64)
    text_start[chunk_node] = [start for _, start, _ in chunks]
    return PackedBatch(
        input_ids=np.concatenate([np.asarray(ids, dtype=np.int64) for ids in forest.ids]),
        position_ids=np.concatenate([np.arange(d, d + n) for d, n in zip(depth, length, strict=True)]) + first_position,
        token_types=np.concatenate([np.asarray(t, dtype=np.int64) for t in forest.types]) if chunks[0][2] else None,
        start=start,
        length=length,
        parent=np.array(forest.parent),
        scored=scored,
        read_at=(start + length - 1)[scored],
        pool_from=(start + text_start - depth)[scored],
        chunk_segment=chunk_segment,
        chunk_text=np.repeat(np.arange(len(texts)), [len(e.chunks) for e in texts]),
        useful_tokens=sum(e.tokens for e in texts),
    )


def rows(texts: Sequence[Encoded], *, share_from: int | None = SHARE_FROM) -> int:
    """How many rows ``pack`` would make of them."""
    if len(texts) == 1 and len(texts[0].chunks) == 1:  # most of what a server is asked
        return texts[0].tokens
    forest, _ = _grown(_chunks(texts), share_from)
    return sum(map(len, forest.ids))


def micro_batches(
    units: Sequence[Sequence[Encoded]], budget: int, *, share_from: int | None = SHARE_FROM
) -> Iterator[list[int]]:
    """Cut a batch into rounds of at most ``budget`` rows, in order; a unit larger than that goes alone.

    A unit is a text, or all titles of a group, whose loss needs them together. What is shared counts once a round.
    """
    forest, nodes = _grown(_chunks([e for unit in units for e in unit]), share_from)
    each = iter(nodes)
    ends = [[next(each) for e in unit for _ in e.chunks] for unit in units]
    paths = [{n for end in of_unit for n in (end, *ancestors(forest.parent, end))} for of_unit in ends]
    chosen: list[int] = []
    packed: set[int] = set()
    total = 0
    for i, path in enumerate(paths):
        more = forest.tokens(path - packed)
        if chosen and total + more > budget:
            yield chosen
            chosen, packed, total = [], set(), 0
            more = forest.tokens(path)
        chosen.append(i)
        packed |= path
        total += more
    if chosen:
        yield chosen


def rectangles(texts: Sequence[Encoded], budget: int) -> Iterator[list[int]]:
    """The same for models that pad: rounds of at most ``budget`` places, padding included, in order."""
    chosen: list[int] = []
    height = width = 0
    for i, text in enumerate(texts):
        longest = max(map(len, text.chunks))
        if chosen and (height + len(text.chunks)) * max(width, longest) > budget:
            yield chosen
            chosen, height, width = [], 0, 0
        chosen.append(i)
        height, width = height + len(text.chunks), max(width, longest)
    if chosen:
        yield chosen


Chunk = tuple[tuple[int, ...], int, tuple[int, ...] | None]  # ids, where the text starts, token types


def _chunks(texts: Sequence[Encoded]) -> list[Chunk]:
    return [(e.chunks[i], e.starts[i], e.types[i] if e.types else None) for e in texts for i in range(len(e.chunks))]


def _grown(chunks: Sequence[Chunk], share_from: int | None) -> tuple[_Forest, list[int]]:
    """A forest of all chunks, and the last segment of each."""
    forest = _Forest()
    splits = _shared_starts([(ids, start) for ids, start, _ in chunks], share_from)
    return forest, [
        forest.add(ids, start, (*split, len(ids)), types)
        for (ids, start, types), split in zip(chunks, splits, strict=True)
    ]


class _Forest:
    """Segments in the order of their making; the same tokens under the same parent are one segment."""

    def __init__(self) -> None:
        self.ids: list[tuple[int, ...]] = []
        self.types: list[tuple[int, ...] | None] = []
        self.parent: list[int] = []
        self.depth: list[int] = []
        self._known: dict[tuple, int] = {}

    def add(self, ids: tuple[int, ...], start: int, ends: tuple[int, ...], types: tuple[int, ...] | None) -> int:
        """Add one text, cut into segments that end at ``ends``; return its last segment.

        Equal ids whose text starts elsewhere are not the same text: mean pooling reads other rows of them.
        """
        node, begin = ROOT, 0
        for end in ends:
            key = (node, ids[begin:end], types, start if end == len(ids) else None)
            if key not in self._known:
                self._known[key] = len(self.ids)
                self.ids.append(ids[begin:end])
                self.types.append(types)
                self.parent.append(node)
                self.depth.append(begin)
            node, begin = self._known[key], end
        return node

    def tokens(self, nodes: set[int]) -> int:
        """Of some segments."""
        return sum(len(self.ids[n]) for n in nodes)


def _shared_starts(chunks: Sequence[tuple[tuple[int, ...], int]], share_from: int | None) -> list[tuple[int, ...]]:
    """Where each chunk is cut: after what all chunks share (the instruction), then after what some share (their context)."""
    if share_from is None:
        return [()] * len(chunks)
    heads = [ids[:start] for ids, start in dict.fromkeys(chunks)]  # equal texts count once: they are one segment anyway
    common = _common_start(heads) if len(heads) > 1 else 0
    common = common if common >= share_from else 0
    users = Counter(heads)

    def cuts(head: tuple[int, ...]) -> tuple[int, ...]:
        own = len(head) - common >= share_from and users[head] > 1
        return (*((common,) if common else ()), *((len(head),) if own else ()))

    return [cuts(ids[:start]) for ids, start in chunks]


def _common_start(heads: Sequence[tuple[int, ...]]) -> int:
    first, last = min(heads), max(heads)  # in dictionary order, what these two share all share
    return next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
