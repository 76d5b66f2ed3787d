"""Pooling, chunks and order: what happens between the last hidden state and a text's score."""

from __future__ import annotations

import numpy as np
import pytest
import small
import torch

from loracle.models import scoring
from loracle.models.attention import plan
from loracle.tasks import Task
from loracle.text.tokenize import Encoded

TASK = Task(name="single_label", label_names=("a", "b", "c"))
BEFORE = tuple(range(20, 40))
TEXTS = [Encoded(chunks=((*BEFORE, *range(50, 50 + n)),), starts=(20,)) for n in (5, 2, 9, 5)]


@pytest.fixture
def scorer(tiny_model):
    def make(kind="qwen2", **options):
        options = {"pad_token_id": 1, "dtype": torch.float32, "device": torch.device("cpu")} | options
        return small.new_scorer(tiny_model(kind), TASK, **options).eval()

    return make


@torch.inference_mode()
def test_mean_pooling_excludes_the_prefix(scorer):
    made = scorer(pooling="mean")
    for score, text in zip(made(made.pack(TEXTS)), TEXTS, strict=True):
        states = made.states(made.pack([text]))
        torch.testing.assert_close(score, made.inner.score(states[20:].mean(0)), rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_chunked_text_scores_mean_of_chunks(scorer):
    made = scorer()
    whole = Encoded(chunks=tuple(t.chunks[0] for t in TEXTS[:3]), starts=(20,) * 3)
    scores = made(made.pack([TEXTS[0], whole, TEXTS[1]]))
    each = made(made.pack(TEXTS[:3]))
    torch.testing.assert_close(scores, torch.stack([each[0], each.mean(0), each[1]]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["qwen2", "bert", "gpt2"])
def test_micro_batch_size_keeps_scores(scorer, kind):
    made = scorer(kind).train()
    small, large = (scoring.score(made, TEXTS, tokens_per_micro_batch=n) for n in (1, 8192))
    assert small.dtype == np.float32
    assert made.training
    np.testing.assert_allclose(small, large, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(large[0], large[3])


@pytest.mark.parametrize("kind", ["qwen2", "bert", "gpt2"])
def test_features_have_one_row_per_text(scorer, kind):
    found = scoring.features(scorer(kind), TEXTS)
    assert found.shape == (4, 32)
    np.testing.assert_allclose(found[:1], scoring.features(scorer(kind), TEXTS[:1]), rtol=1e-5, atol=1e-5)


def test_head_is_float32_over_bfloat16(scorer):
    made = scorer(dtype=torch.bfloat16)
    assert made.inner.score.weight.dtype == torch.float32
    assert scoring.score(made, TEXTS).dtype == np.float32


def test_seed_determines_the_head(scorer):
    one, same, other = (scorer(seed=s).inner.score.weight for s in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama", "mistral", "gemma3_text"])
def test_last_layer_computes_only_read_rows(scorer, kind):
    """What the head reads stays the same; of the others neither the MLP nor the output projection hears."""
    made, seen = scorer(kind), []
    batch = made.pack(TEXTS)
    rows = torch.from_numpy(batch.read_at)
    last = made.inner.base_model.layers[-1]
    for module in (last.mlp, last.self_attn.o_proj):
        module.register_forward_pre_hook(lambda _, x: seen.append(x[0].shape[1]))
    whole, part = made.states(batch)[rows], made.states(batch, rows)[rows]
    made(batch)
    assert seen == [batch.tokens] * 2 + [3] * 4
    torch.testing.assert_close(part, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["qwen2", "gemma3_text", "bert"])
def test_padding_rows_change_nothing(scorer, kind, monkeypatch):
    """Scores and gradients of all weights are those of the batch without them."""
    made = scorer(kind, dtype=torch.float64)
    texts = [Encoded(chunks=((*BEFORE, *range(50, 50 + n)),), starts=(20,)) for n in (13, 7, 30, 9)]
    found, widths = [], []
    made.inner.get_input_embeddings().register_forward_hook(lambda _, x, out: widths.append(out.shape[1]))
    batch = made.pack(texts)
    for rows in (batch.tokens, batch.tokens + 5):
        monkeypatch.setattr(plan, "rows_for", lambda tokens, device, rows=rows: rows)
        made.zero_grad()
        scores = made(batch)
        scores.square().sum().backward()
        found.append([scores.detach(), *(p.grad.clone() for p in made.parameters() if p.grad is not None)])
    assert widths == [batch.tokens, batch.tokens + 5]
    assert len(found[0]) > 10
    for alone, filled in zip(*found, strict=True):
        torch.testing.assert_close(filled, alone, rtol=1e-4, atol=1e-6)  # norms are float32 in some models
