"""What the kernels of a GPU are given: the drawing of the token tree, and the scores and gradients of the CPU's way.

The kernels themselves need a GPU (test_cuda.py). Here torch's own uncompiled one stands in for flex attention, and, as that
knows no backward on a CPU, SDPA with the same mask cut down to the tiles that the kernel would visit; for flash attention one
product after another.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from test_exact import CPU, LORA, SHAPES, assert_same, scorer
from torch.nn.attention.flex_attention import create_mask, flex_attention

from loracle.models.attention import cuda_graphs, tree
from loracle.models.attention.tree import AttentionPlan, FlexPlan, padded_length
from loracle.models.scorer import by_text
from loracle.text.packing import pack
from loracle.text.tokenize import Encoded

KINDS = ("qwen2", "mistral", "gemma3_text", "bert")  # grouped queries, a window, both kinds of layers, both ways
LONG = Encoded(chunks=((*range(10, 30), *range(40, 60)), (*range(10, 30), *range(70, 77))), starts=(20, 20))
BATCHES = SHAPES | {"chunks": [LONG, *SHAPES["flat"]]}


def dense(mask) -> torch.Tensor:
    """Who sees whom by a BlockMask, ``bool [1, 1, P, P]``: what its tiles leave of its rule."""
    tiles = mask.to_dense().bool().repeat_interleave(mask.BLOCK_SIZE[0], 2).repeat_interleave(mask.BLOCK_SIZE[1], 3)
    return tiles & create_mask(mask.mask_mod, 1, 1, *mask.seq_lengths, device="cpu")


def sdpa(query, key, value, *, block_mask, scale, enable_gqa):
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=dense(block_mask), scale=scale, enable_gqa=enable_gqa
    )


@pytest.fixture
def by_flex(monkeypatch):
    """From here on a batch is attended over as on a GPU, by the kernel that is given."""
    monkeypatch.setattr(tree, "SMALLEST_HEAD", 1)  # the tiny models' heads are smaller than Triton's products
    monkeypatch.setattr(tree, "TILE", 16)  # and their batches would fit one tile

    def switch(kernel) -> list:
        used = []
        monkeypatch.setattr(tree, "plan", FlexPlan.of)
        monkeypatch.setattr(tree, "_kernel", lambda: used.append(None) or kernel)
        return used

    return switch


@pytest.mark.parametrize("shape", BATCHES)
def test_the_mask_is_the_drawing(monkeypatch, shape):
    monkeypatch.setattr(tree, "TILE", 16)
    batch = pack(BATCHES[shape])
    plan = FlexPlan.of(batch, CPU)
    seen = dense(plan.mask(True, None))[0, 0]
    T = batch.tokens
    assert (seen[:T, :T].numpy() == batch.visible()).all()
    assert not seen[:T, T:].any()
    assert seen.any(1).all()  # a row that sees nothing would be a division by nothing
    near = seen[:T, :T].numpy() & (batch.position_ids[:, None] - batch.position_ids[None] < 6)
    assert (dense(plan.mask(True, 6))[0, 0, :T, :T].numpy() == near).all()
    assert near.sum() < seen.sum()
    tiles = plan.mask(True, None).to_dense()
    if shape == "long":
        assert 0 < tiles.sum() < tiles.numel() // 2  # most of the work is left out


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@torch.inference_mode()
@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_the_other_way(tiny_model, by_flex, kind):
    made = scorer(tiny_model(kind))
    some = ("flat",) if kind == "bert" else ("instruction and contexts", "long behind an instruction", "chunks")
    shapes = {name: made.pack(BATCHES[name]) for name in some}
    wanted = {name: made(batch) for name, batch in shapes.items()}
    used = by_flex(flex_attention)
    for name, batch in shapes.items():
        assert_same(made(batch), wanted[name], 1e-5)
    assert len(used) == len(shapes) * made.inner.config.num_hidden_layers


@pytest.mark.parametrize("kind", KINDS[:3])
def test_gradients_are_those_of_the_other_way(tiny_model, by_flex, kind):
    made = scorer(tiny_model(kind), lora=LORA)
    batch = made.pack(BATCHES["instruction and contexts"])
    weights = torch.from_numpy(np.random.default_rng(0).normal(size=(batch.texts, 3)).astype(np.float32))

    def gradients() -> dict[str, torch.Tensor]:
        made.zero_grad()
        (made(batch) * weights).sum().backward()
        return {name: p.grad.clone() for name, p in made.named_parameters() if p.grad is not None}

    wanted = gradients()
    used = by_flex(sdpa)
    for name, found in gradients().items():
        torch.testing.assert_close(found, wanted[name], rtol=1e-5, atol=1e-5 * wanted[name].abs().max().item())
    assert used
    assert max(g.abs().max() for g in wanted.values()) > 0.01


def flash(q, k, v, query_ends, key_ends, most_queries, most_keys, dropout, causal, debug, **more):
    """Flash attention as its authors describe it: of each sequence the last query sees the last key."""
    left, out = more.get("window_size_left", -1), []
    ends = [e.tolist() for e in (query_ends, key_ends)]
    for (a, b), (c, d) in zip(*(itertools.pairwise(e) for e in ends), strict=True):
        assert b - a <= most_queries
        assert d - c <= most_keys
        at, keys = torch.arange(d - c - (b - a), d - c)[:, None], torch.arange(d - c)[None]
        seen = (keys <= at if causal else keys >= 0) & (at - keys <= left if left >= 0 else True)
        one, *two = (
            x[span].transpose(0, 1)[None] for x, span in ((q, slice(a, b)), (k, slice(c, d)), (v, slice(c, d)))
        )
        o = F.scaled_dot_product_attention(one, *two, attn_mask=seen, scale=more["scale"], enable_gqa=True)
        out.append(o[0].transpose(0, 1))
    assert dropout == 0
    assert not debug
    return F.pad(torch.cat(out), (0, 0, 0, 0, 0, len(q) - ends[0][-1])), None  # rows that only a CPU has


@pytest.fixture
def by_flash(monkeypatch, by_flex):
    used = by_flex(None)
    monkeypatch.setattr(tree, "has_flash", lambda device: True)
    monkeypatch.setattr(tree, "flash_takes", lambda dtype, head: True)
    monkeypatch.setattr(tree, "_flash_kernel", lambda *a, **b: used.append(None) or flash(*a, **b))
    return used


@pytest.mark.parametrize(
    ("kind", "shape"), [*itertools.product(KINDS[:3], BATCHES), ("bert", "flat"), ("bert", "long")]
)
def test_sequences_give_the_scores_and_gradients_of_blocks(tiny_model, request, kind, shape):
    made = scorer(tiny_model(kind), lora=LORA)
    batch = made.pack(BATCHES[shape])
    weights = torch.from_numpy(np.random.default_rng(0).normal(size=(batch.texts, 3)).astype(np.float32))

    def results() -> dict[str, torch.Tensor]:
        made.zero_grad()
        scores = made(batch)
        (scores * weights).sum().backward()
        return {"scores": scores.detach()} | {
            n: p.grad.clone() for n, p in made.named_parameters() if p.grad is not None
        }

    wanted = results()
    used = request.getfixturevalue("by_flash")
    for name, found in results().items():
        torch.testing.assert_close(found, wanted[name], rtol=1e-4, atol=1e-4 * wanted[name].abs().max().item())
    assert len(used) == made.inner.config.num_hidden_layers


def test_one_long_instruction_is_not_copied_for_every_text(monkeypatch):
    short, long = ([Encoded(chunks=((*range(n), 500 + i),), starts=(n,)) for i in range(20)] for n in (16, 300))
    monkeypatch.setattr(tree, "KEYS_A_TOKEN", 10)
    assert tree.Sequences.of(pack(short), CPU) is not None
    assert tree.Sequences.of(pack(long), CPU) is None


def shifted(q, k, v, *ends, **more):
    """Causal from the first key on, as torch's own scaled_dot_product_attention is."""
    return flash(q, k.roll(1, 0), v.roll(1, 0), *ends, **more)


def blind(*given, **more):
    return flash(*given, **{name: x for name, x in more.items() if "window" not in name})


def empty(*given, **more):
    return flash(*given, **more)[0] * torch.nan, None


def changed(*given, **more):
    raise TypeError("_flash_attention_forward() got an unexpected keyword argument")


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize(
    ("kernel", "says"),
    [(flash, None), (shifted, "errors are"), (blind, "errors are"), (empty, "'nan'"), (changed, "unexpected keyword")],
)
def test_flash_attention_is_used_only_where_it_is_right(monkeypatch, caplog, kernel, says, inference):
    monkeypatch.setattr(tree, "_flash_kernel", kernel)
    with torch.inference_mode(inference):
        assert tree._flash_is_right(CPU) == (says is None)
    assert [says in line for line in caplog.messages] == [True] * (says is not None)


def test_what_the_kernel_cannot_do_goes_the_other_way(tiny_model, by_flex):
    made = scorer(tiny_model("qwen2"))
    batch = made.pack(BATCHES["contexts"])
    wanted = made(batch)
    used = by_flex(sdpa)
    tree.SMALLEST_HEAD = 16
    assert torch.equal(made(batch), wanted)
    assert not used


def test_a_gpu_gets_the_mask_and_a_cpu_the_blocks():
    batch = pack(BATCHES["flat"])
    assert isinstance(tree.plan(batch, CPU), AttentionPlan)


def test_padded_lengths_are_few():
    found = sorted({padded_length(n) for n in range(1, 16_385)})
    assert all(n % 128 == 0 for n in found)
    assert len(found) < 25
    assert all(padded_length(n) >= n for n in range(1, 16_385, 7))
    assert all(padded_length(n) <= 1.25 * n + 128 for n in range(1, 16_385, 7))


@pytest.mark.parametrize("shape", BATCHES)
@pytest.mark.parametrize("kind", KINDS[:3])
def test_what_a_recording_reads_gives_the_scores_of_the_batch(tiny_model, by_flash, kind, shape):
    """The layout of fixed size that a GPU's graphs replay (test_cuda.py), by the same stand-in."""
    made = scorer(tiny_model(kind))
    batch = made.pack(BATCHES[shape])
    wanted = made(batch)
    sizes = [rows for rows in cuda_graphs.ROWS if cuda_graphs.lay_out(batch, rows) is not None]
    assert sizes
    for rows in sizes[:2]:
        given = torch.from_numpy(cuda_graphs.lay_out(batch, rows))
        scores = made._laid_out(*cuda_graphs._read(given, rows))[: len(batch.scored)]
        assert_same(by_text(scores, batch), wanted, 1e-5)


def test_what_fits_no_recording():
    short, long = ([Encoded(chunks=(tuple(range(i, i + n)),), starts=(0,)) for i in range(9)] for n in (2, 8))
    assert cuda_graphs.lay_out(pack(short), 64) is None  # nine segments, of eight
    assert cuda_graphs.lay_out(pack(long), 64) is None  # 72 rows
    assert cuda_graphs.lay_out(pack(long), 128) is not None
    behind = [Encoded(chunks=((*range(40), 50 + i),), starts=(40,)) for i in range(7)]
    assert cuda_graphs.lay_out(pack(behind), 64) is None  # keys of one start, copied for each


@pytest.mark.parametrize(
    ("kind", "rope", "fixed"),
    [
        ("Qwen2", {"rope_type": "default", "rope_theta": 1e4}, True),
        ("Llama", {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, False),
        ("Gemma3Text", {f"{of}_attention": {"rope_type": "default", "rope_theta": 1e4} for of in ("sliding", "full")}, True),
    ],
)  # fmt: skip
def test_what_looks_at_lengths_is_not_recorded(monkeypatch, kind, rope, fixed):
    monkeypatch.setattr(cuda_graphs, "has_flash", lambda device: True)
    config = getattr(transformers, f"{kind}Config")(rope_parameters=rope)
    assert cuda_graphs.recordable(config, torch.device("cuda"), torch.bfloat16) == fixed
    assert not cuda_graphs.recordable(config, torch.device("cuda"), torch.float32)


def test_on_a_cpu_nothing_is_recorded(tiny_model):
    made = scorer(tiny_model("qwen2"))
    assert not made.record()
    made.recordings = object()
    assert made.eval().recordings is None
