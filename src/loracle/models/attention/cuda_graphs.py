"""Forwards of a decoder as CUDA graphs, for a server whose micro-batches are short.

A GPU finishes a layer of a few hundred tokens before Python has launched the next one. A graph launches all layers at once and
always reads the same memory. So it has a fixed number of rows, segments and keys. A micro-batch goes through the smallest graph
that it fits. The rows left over are one more segment that is not read. What fits no graph is computed without one.

Shapes: R rows, N segments at most, K keys, S scored segments, C labels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loracle.models.attention.flash import flash_supports, has_flash
from loracle.models.attention.plan import MAX_KEYS_PER_TOKEN, AttentionPlan, Sequences
from loracle.text.packing import PackedBatch, pack
from loracle.text.tokenize import Encoded

ROWS = (64, 128, 256, 512, 1024)
ROWS_PER_SEGMENT = 8
CPU = torch.device("cpu")

# From ids [R], positions [R], plan and rows to read [N] to scores [N, C].
Forward = Callable[[Tensor, Tensor, AttentionPlan, Tensor], Tensor]


class CudaGraphs:
    """Graphs of ``forward``, one for each number of rows in ``ROWS``. Its weights may no longer change.

    Args:
        forward: scores of a layout, ``float32 [N, C]``.
    """

    def __init__(self, forward: Forward, device: torch.device):
        pool = torch.cuda.graph_pool_handle()  # one runs at a time, so they share memory; the largest comes first
        self._graphs = [_Graph(forward, rows, device, pool) for rows in sorted(ROWS, reverse=True)]

    def scores(self, batch: PackedBatch) -> Tensor | None:
        """Scores of a batch's scored segments, ``float32 [S, C]``; None where it fits no graph."""
        for graph in reversed(self._graphs):
            if (layout := lay_out(batch, graph.rows)) is not None:
                return graph.replay(layout)[: len(batch.scored)].clone()
        return None


class _Graph:
    def __init__(self, forward: Forward, rows: int, device: torch.device, pool: Any):
        self.rows = rows
        any_text = lay_out(pack([Encoded(chunks=((0,),), starts=(0,))], share_from=None), rows)
        assert any_text is not None
        with torch.cuda.device(device), torch.inference_mode():
            self._inputs = torch.from_numpy(any_text).to(device)
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(2):  # kernels are compiled and chosen on first use
                    forward(*read_layout(self._inputs, rows))
            torch.cuda.current_stream().wait_stream(aside)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, pool=pool):
                self._scores = forward(*read_layout(self._inputs, rows))

    def replay(self, layout: np.ndarray) -> Tensor:
        """Scores ``[N, C]``, valid until the next replay of any graph."""
        with torch.inference_mode():
            self._inputs.copy_(torch.from_numpy(layout).pin_memory(), non_blocking=True)
            self._graph.replay()
        return self._scores


def lay_out(batch: PackedBatch, rows: int) -> np.ndarray | None:
    """A batch as the int64 numbers that a graph of that many rows reads; None where they do not fit.

    It has six parts: ids ``[R]``; positions ``[R]``; token row of each key ``[K]``; ends of the segments' queries ``[N + 2]``;
    ends of their keys ``[N + 2]``; rows that are read ``[N]``.
    """
    tokens, segments = batch.tokens, len(batch.start)
    sequences = Sequences.of(batch, CPU) if tokens <= rows and segments <= rows // ROWS_PER_SEGMENT else None
    if sequences is None:
        return None
    layout = np.zeros(sum(_sizes(rows)), dtype=np.int64)
    ids, positions, keys, query_ends, key_ends, read = np.split(layout, np.cumsum(_sizes(rows))[:-1])
    key_rows = np.arange(tokens) if sequences.key_rows is None else sequences.key_rows.numpy()
    ids[:tokens], positions[:tokens] = batch.input_ids, batch.position_ids
    keys[: len(key_rows)] = key_rows
    keys[len(key_rows) : len(key_rows) + rows - tokens] = np.arange(tokens, rows)  # the rows left over
    query_ends[:], key_ends[:] = rows, len(key_rows) + rows - tokens
    query_ends[: segments + 1], key_ends[: segments + 1] = sequences.query_ends.numpy(), sequences.key_ends.numpy()
    read[: len(batch.scored)] = batch.read_at
    return layout


def _sizes(rows: int) -> list[int]:
    """How many numbers each part of a layout has."""
    segments = rows // ROWS_PER_SEGMENT
    return [rows, rows, MAX_KEYS_PER_TOKEN * rows, segments + 2, segments + 2, segments]


def read_layout(layout: Tensor, rows: int) -> tuple[Tensor, Tensor, AttentionPlan, Tensor]:
    """The arguments of ``forward`` from the numbers of ``lay_out``."""
    ids, positions, keys, query_ends, key_ends, read = layout.split(_sizes(rows))
    sequences = Sequences(query_ends=query_ends.int(), key_ends=key_ends.int(), longest=(rows, rows), key_rows=keys)
    return ids, positions, AttentionPlan(None, layout.device, sequences), read


def supports_graphs(config: Any, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a decoder's forward can be a graph: flash attention in 16 bits, and rotary angles that ignore the length."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = getattr(config, "rope_parameters", None) or {}
    # One set of parameters, or one for each type of layer.
    rope_types = {of.get("rope_type") for of in (rope, *rope.values()) if isinstance(of, dict)}
    fixed = not rope_types & {"dynamic", "longrope"}
    return device.type == "cuda" and fixed and flash_supports(dtype, head) and has_flash(device)
