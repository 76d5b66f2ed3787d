"""Flash attention's layout gives the scores and gradients of blocks, and a wrong kernel is not used.

The kernel itself needs a GPU (test_cuda.py). Here one product after another stands in for it.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_attention_plan import BATCHES
from test_exact import CPU, LORA, scorer

from loracle.models.attention import flash
from loracle.models.attention.interface import plan_attention
from loracle.text.packing import pack

DECODERS = ("qwen2", "mistral", "gemma3_text")  # grouped queries, a window, both kinds of layers


def kernel(q, k, v, query_ends, key_ends, most_queries, most_keys, dropout, causal, debug, **more):
    """Flash attention as its authors describe it: the last query of a sequence attends to its last key."""
    left, out = more.get("window_size_left", -1), []
    ends = [e.tolist() for e in (query_ends, key_ends)]
    for (a, b), (c, d) in zip(*(itertools.pairwise(e) for e in ends), strict=True):
        assert b - a <= most_queries
        assert d - c <= most_keys
        at, keys = torch.arange(d - c - (b - a), d - c)[:, None], torch.arange(d - c)[None]
        visible = (keys <= at if causal else keys >= 0) & (at - keys <= left if left >= 0 else True)
        one, *two = (
            x[span].transpose(0, 1)[None] for x, span in ((q, slice(a, b)), (k, slice(c, d)), (v, slice(c, d)))
        )
        o = F.scaled_dot_product_attention(one, *two, attn_mask=visible, scale=more["scale"], enable_gqa=True)
        out.append(o[0].transpose(0, 1))
    assert dropout == 0
    assert not debug
    return F.pad(torch.cat(out), (0, 0, 0, 0, 0, len(q) - ends[0][-1])), None  # rows that only a CPU has


@pytest.fixture
def by_flash(monkeypatch):
    """From here on attention is computed as on a GPU; the list gets an item for each call."""
    calls = []
    monkeypatch.setattr(flash, "has_flash", lambda device: True)
    monkeypatch.setattr(flash, "flash_supports", lambda dtype, head: True)
    monkeypatch.setattr(flash, "_flash_kernel", lambda *a, **b: calls.append(None) or kernel(*a, **b))
    return calls


@pytest.mark.parametrize(
    ("model", "shape"), [*itertools.product(DECODERS, BATCHES), ("bert", "flat"), ("bert", "long")]
)
def test_flash_gives_scores_and_gradients_of_blocks(tiny_model, request, model, shape):
    made = scorer(tiny_model(model), lora=LORA)
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
    calls = request.getfixturevalue("by_flash")
    for name, result in results().items():
        torch.testing.assert_close(result, wanted[name], rtol=1e-4, atol=1e-4 * wanted[name].abs().max().item())
    assert len(calls) == made.inner.config.num_hidden_layers


def shifted(q, k, v, *ends, **more):
    """Causal from the first key on, as torch's own scaled_dot_product_attention is."""
    return kernel(q, k.roll(1, 0), v.roll(1, 0), *ends, **more)


def without_window(*args, **more):
    return kernel(*args, **{name: x for name, x in more.items() if "window" not in name})


def not_a_number(*args, **more):
    return kernel(*args, **more)[0] * torch.nan, None


def changed(*args, **more):
    raise TypeError("_flash_attention_forward() got an unexpected keyword argument")


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize(
    ("used", "warning"),
    [
        (kernel, None), (shifted, "errors are"), (without_window, "errors are"), (not_a_number, "'nan'"),
        (changed, "unexpected keyword"),
    ],
)  # fmt: skip
def test_wrong_flash_kernel_is_not_used(monkeypatch, caplog, used, warning, inference):
    monkeypatch.setattr(flash, "_flash_kernel", used)
    with torch.inference_mode(inference):
        assert flash._flash_is_right(CPU) == (warning is None)
    assert [warning in line for line in caplog.messages] == [True] * (warning is not None)


def test_float32_and_dropout_use_blocks(tiny_model, by_flash, monkeypatch):
    made = scorer(tiny_model("qwen2"))
    batch = made.pack(BATCHES["contexts"])
    made(batch)
    assert by_flash
    by_flash.clear()
    for layer in made.inner.base_model.layers:
        layer.self_attn.attention_dropout = 0.5
    made.train()(batch)
    assert not by_flash
    monkeypatch.setattr(flash, "flash_supports", lambda dtype, head: dtype.itemsize == 2)
    made.eval()(batch)
    assert not by_flash


def test_a_cpu_has_no_flash_sequences():
    assert plan_attention(pack(BATCHES["flat"]), CPU).sequences is None
