"""The fixed layout that CUDA graphs replay gives the scores of the batch. The graphs themselves need a GPU (test_cuda.py)."""

from __future__ import annotations

import pytest
import torch
import transformers
from test_attention_plan import BATCHES
from test_exact import assert_same, scorer
from test_flash import DECODERS, by_flash  # noqa: F401, a fixture

from loracle.models.attention import cuda_graphs
from loracle.models.scorer import by_text
from loracle.text.packing import pack
from loracle.text.tokenize import Encoded


@pytest.mark.parametrize("shape", BATCHES)
@pytest.mark.parametrize("model", DECODERS)
def test_layout_gives_the_scores_of_the_batch(tiny_model, by_flash, model, shape):  # noqa: F811
    made = scorer(tiny_model(model))
    batch = made.pack(BATCHES[shape])
    wanted = made(batch)
    sizes = [rows for rows in cuda_graphs.ROWS if cuda_graphs.lay_out(batch, rows) is not None]
    assert sizes
    for rows in sizes[:2]:
        layout = torch.from_numpy(cuda_graphs.lay_out(batch, rows))
        scores = made._layout_scores(*cuda_graphs.read_layout(layout, rows))[: len(batch.scored)]
        assert_same(by_text(scores, batch), wanted, 1e-5)


def test_batches_that_fit_no_graph():
    short, long = ([Encoded(chunks=(tuple(range(i, i + n)),), starts=(0,)) for i in range(9)] for n in (2, 8))
    assert cuda_graphs.lay_out(pack(short), 64) is None  # nine segments, of eight
    assert cuda_graphs.lay_out(pack(long), 64) is None  # 72 rows
    assert cuda_graphs.lay_out(pack(long), 128) is not None
    behind = [Encoded(chunks=((*range(40), 50 + i),), starts=(40,)) for i in range(7)]
    assert cuda_graphs.lay_out(pack(behind), 64) is None  # keys of one prefix, copied for each


@pytest.mark.parametrize(
    ("model", "rope", "fixed"),
    [
        ("Qwen2", {"rope_type": "default", "rope_theta": 1e4}, True),
        ("Llama", {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, False),
        ("Gemma3Text", {f"{of}_attention": {"rope_type": "default", "rope_theta": 1e4} for of in ("sliding", "full")}, True),
    ],
)  # fmt: skip
def test_rope_that_depends_on_length_has_no_graph(monkeypatch, model, rope, fixed):
    monkeypatch.setattr(cuda_graphs, "has_flash", lambda device: True)
    config = getattr(transformers, f"{model}Config")(rope_parameters=rope)
    assert cuda_graphs.supports_graphs(config, torch.device("cuda"), torch.bfloat16) == fixed
    assert not cuda_graphs.supports_graphs(config, torch.device("cuda"), torch.float32)


def test_a_cpu_records_no_graphs(tiny_model):
    made = scorer(tiny_model("qwen2"))
    assert not made.record()
    made.cuda_graphs = object()
    assert made.eval().cuda_graphs is None
