"""Forwards of a decoder recorded as CUDA graphs, for a server whose rounds are short.

A GPU is through a layer of a few hundred tokens before Python has launched the next one. A recording launches all of them at
once, always on the same memory, so it has a fixed number of rows, segments and keys: a round goes through the smallest one
that it fits, what it leaves over is one more segment that nobody reads, and what fits none is computed as ever.

Shapes: R rows, N segments at most, K keys, C labels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loracle.models.attention.tree import KEYS_A_TOKEN, Sequences, flash_takes, has_flash
from loracle.text.packing import PackedBatch, pack
from loracle.text.tokenize import Encoded

ROWS = (64, 128, 256, 512, 1024)
ROWS_A_SEGMENT = 8
CPU = torch.device("cpu")

# Of ids [R], positions [R], sequences and the rows to read [N]: scores [N, C].
Forward = Callable[[Tensor, Tensor, Sequences, Tensor], Tensor]


class Recordings:
    """What ``forward`` computes, recorded for every number of rows in ``ROWS``. Its weights may no longer change.

    Args:
        forward: scores of rows that are laid out, ``float32 [N, C]``.
    """

    def __init__(self, forward: Forward, device: torch.device):
        pool = torch.cuda.graph_pool_handle()  # one runs at a time, so they share their memory; the largest comes first
        self._all = [_Recording(forward, rows, device, pool) for rows in sorted(ROWS, reverse=True)]

    def scores(self, batch: PackedBatch) -> Tensor | None:
        """Scores of a batch's scored segments, ``float32 [S, C]``; None where it fits no recording."""
        for one in reversed(self._all):
            if (laid := lay_out(batch, one.rows)) is not None:
                return one.replay(laid)[: len(batch.scored)].clone()
        return None


class _Recording:
    def __init__(self, forward: Forward, rows: int, device: torch.device, pool: Any):
        self.rows = rows
        any_text = lay_out(pack([Encoded(chunks=((0,),), starts=(0,))], share_from=None), rows)
        assert any_text is not None
        with torch.cuda.device(device), torch.inference_mode():
            self._given = torch.from_numpy(any_text).to(device)
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(2):  # whatever is compiled, chosen or kept on first use
                    forward(*_read(self._given, rows))
            torch.cuda.current_stream().wait_stream(aside)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, pool=pool):
                self._scores = forward(*_read(self._given, rows))

    def replay(self, laid: np.ndarray) -> Tensor:
        """Scores ``[N, C]``, until the next replay of any."""
        with torch.inference_mode():
            self._given.copy_(torch.from_numpy(laid).pin_memory(), non_blocking=True)
            self._graph.replay()
        return self._scores


def lay_out(batch: PackedBatch, rows: int) -> np.ndarray | None:
    """A batch as the numbers that a recording of so many rows reads, int64; None where they do not fit.

    One after the other: ids ``[R]``, positions ``[R]``, token row of each key ``[K]``, ends of the segments' queries
    ``[N + 2]`` and of their keys ``[N + 2]``, and the rows that are read ``[N]``.
    """
    tokens, segments = batch.tokens, len(batch.start)
    sequences = Sequences.of(batch, CPU) if tokens <= rows and segments <= rows // ROWS_A_SEGMENT else None
    if sequences is None:
        return None
    laid = np.zeros(sum(_parts(rows)), dtype=np.int64)
    ids, positions, keys, query_ends, key_ends, read = np.split(laid, np.cumsum(_parts(rows))[:-1])
    own = np.arange(tokens) if sequences.key_rows is None else sequences.key_rows.numpy()
    ids[:tokens], positions[:tokens] = batch.input_ids, batch.position_ids
    keys[: len(own)] = own
    keys[len(own) : len(own) + rows - tokens] = np.arange(tokens, rows)  # the rows left over read each other
    query_ends[:], key_ends[:] = rows, len(own) + rows - tokens
    query_ends[: segments + 1], key_ends[: segments + 1] = sequences.query_ends.numpy(), sequences.key_ends.numpy()
    read[: len(batch.scored)] = batch.read_at
    return laid


def _parts(rows: int) -> list[int]:
    most = rows // ROWS_A_SEGMENT
    return [rows, rows, KEYS_A_TOKEN * rows, most + 2, most + 2, most]


def _read(laid: Tensor, rows: int) -> tuple[Tensor, Tensor, Sequences, Tensor]:
    """What ``forward`` takes, of ``lay_out``'s numbers."""
    ids, positions, keys, query_ends, key_ends, read = laid.split(_parts(rows))
    return (
        ids,
        positions,
        Sequences(query_ends=query_ends.int(), key_ends=key_ends.int(), longest=(rows, rows), key_rows=keys),
        read,
    )


def recordable(config, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether all that such a decoder's forward does can be recorded: flash attention in 16 bits, and positions that are
    turned by the same angles whatever the length.
    """
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    known = getattr(config, "rope_parameters", None) or {}
    turned = {
        of.get("rope_type") for of in (known, *known.values()) if isinstance(of, dict)
    }  # one, or one a kind of layer
    fixed = not turned & {"dynamic", "longrope"}
    return device.type == "cuda" and fixed and flash_takes(dtype, head) and has_flash(device)
