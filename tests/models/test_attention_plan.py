"""The plan of a token tree: both ways to compute attention have the mask of the drawing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_exact import CPU, SHAPES

from loracle.models.attention import plan
from loracle.models.attention.plan import BlockPlan, Sequences
from loracle.text.packing import PackedBatch, pack
from loracle.text.tokenize import Encoded

LONG = Encoded(chunks=((*range(10, 30), *range(40, 60)), (*range(10, 30), *range(70, 77))), starts=(20, 20))
BATCHES = SHAPES | {"chunks": [LONG, *SHAPES["flat"]]}
PREFIX = tuple(range(20, 40))


def block_mask(batch: PackedBatch, window: int | None = None) -> np.ndarray:
    """Which token attends to which by the blocks, ``bool [T, T]``. Every token is a query exactly once."""
    made = BlockPlan.of(batch, CPU)
    mask, times = np.zeros((batch.tokens, batch.tokens), dtype=bool), np.zeros(batch.tokens)
    query_places, query_rows, key_rows = (x.numpy() for x in (made.query_places, made.query_rows, made.key_rows))
    real = np.zeros(len(query_rows), dtype=bool)
    real[query_places] = True
    for block in made.blocks:
        B, L, K = block.size
        own, common = block.mask(True, window)
        rows, keys = query_rows[block.queries].reshape(B, L), key_rows[block.keys].reshape(B, K)
        is_token = real[block.queries].reshape(B, L)
        for b, q in np.argwhere(is_token):
            times[rows[b, q]] += 1
            mask[rows[b, q], keys[b, own[b, 0, 0, q].numpy()]] = True
            if block.common is not None:
                near = np.s_[:] if common is None else common[b, 0, 0, q].numpy()
                mask[rows[b, q], block.common.numpy()[near]] = True
    assert (times == 1).all()
    return mask


def sequence_mask(batch: PackedBatch) -> np.ndarray:
    """The same by the sequences: the last query of each attends to its last key."""
    made = Sequences.of(batch, CPU)
    mask = np.zeros((batch.tokens, batch.tokens), dtype=bool)
    keys = np.arange(batch.tokens) if made.key_rows is None else made.key_rows.numpy()
    for n in range(len(batch.start)):
        (q0, q1), (k0, k1) = (ends[n : n + 2].tolist() for ends in (made.query_ends, made.key_ends))
        for q in range(q0, q1):
            mask[q, keys[k0 : k1 - (q1 - 1 - q)]] = True
    return mask


def test_masks_are_the_docstring_drawing():
    header, *lines = plan.__doc__.split("::")[1].split("\n\n")[1].splitlines()
    names = header.split()
    drawn = np.array([["1" in line[header.index(name) :][:2] for name in names] for line in lines])
    assert [line.split()[0] for line in lines] == names
    batch = pack(
        [Encoded(chunks=((1, 2, 3, 4),), starts=(2,)), Encoded(chunks=((1, 2, 5),), starts=(2,))], share_from=2
    )
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 2]
    assert (block_mask(batch) == drawn).all()
    assert (sequence_mask(batch) == drawn).all()
    assert drawn.sum() == 13


@pytest.mark.parametrize("shape", BATCHES)
def test_masks_are_those_of_the_tree(shape):
    batch = pack(BATCHES[shape])
    wanted = batch.visible()
    assert (block_mask(batch) == wanted).all()
    near = wanted & (batch.position_ids[:, None] - batch.position_ids[None] < 6)
    assert (block_mask(batch, 6) == near).all()
    assert near.sum() < wanted.sum()
    assert (sequence_mask(batch) == wanted).all()


@pytest.mark.parametrize("fused_from", [1, 10_000])
def test_fused_blocks_have_the_same_mask(monkeypatch, fused_from):
    monkeypatch.setattr(plan, "FUSED_FROM", fused_from)
    batch = pack(BATCHES["instruction and contexts"])
    assert (block_mask(batch) == batch.visible()).all()


def test_rows_on_a_cpu_are_few_numbers():
    """A CPU compiles products for each number of rows; a GPU does not."""
    sizes = range(1, 4097)
    rows = [plan.rows_for(n, CPU) for n in sizes]
    assert all(n <= padded <= n * 17 / 16 for n, padded in zip(sizes, rows, strict=True))
    assert len(set(rows)) == 31 + 7 * 16 + 1
    assert plan.rows_for(1001, torch.device("cuda")) == 1001


def test_rows_of_scores_have_min_keys():
    """Softmax of shorter rows takes a CPU ten times as long."""
    texts = [Encoded(chunks=(tuple(range(n)),), starts=(0,)) for n in (1, 3, 9, 15, 16, 40)]
    shared = [Encoded(chunks=((*PREFIX, 50 + n),), starts=(20,)) for n in range(3)]
    sizes = [b.size for items in (texts, shared) for b in BlockPlan.of(pack(items), CPU).blocks]
    assert [keys for _, _, keys in sizes] == [16, 40, 20, 1]  # the last block also has twenty common keys


def test_long_instruction_is_not_copied_for_flash(monkeypatch):
    short, long = ([Encoded(chunks=((*range(n), 500 + i),), starts=(n,)) for i in range(20)] for n in (16, 300))
    monkeypatch.setattr(plan, "MAX_KEYS_PER_TOKEN", 10)
    assert Sequences.of(pack(short), CPU) is not None
    assert Sequences.of(pack(long), CPU) is None
