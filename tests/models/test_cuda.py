"""On a GPU as on a CPU: scores, gradients, the losses of a training, what runs out of memory, and a whole run.

The kernels that this takes are compiled here; each test holds them to the CPU's result in float32. Without a GPU all of it
is skipped.
"""

from __future__ import annotations

import copy
import json
import threading

import numpy as np
import pytest
import torch
import transformers
from small import QUICK, labelled, make_loss, write
from test_attention_plan import LONG
from test_exact import LORA, SHAPES, assert_same, assert_same_gradients, gradients

from loracle import pipeline
from loracle.config import RunConfig, TrainConfig
from loracle.examples import LabeledText
from loracle.models.attention import flash
from loracle.models.lora import add_lora
from loracle.models.scorer import Scorer
from loracle.runs.predictor import Predictor
from loracle.serving.server import load
from loracle.text.tokenize import Encoded
from loracle.training.loop import FitJob, fit

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
SIZES = {
    "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 160,
    "max_position_embeddings": 2048, "initializer_range": 0.1, "pad_token_id": 1, "num_labels": 3,
}  # fmt: skip
DECODER = SIZES | {"num_key_value_heads": 2, "head_dim": 32}
WINDOWS = ["sliding_attention", "full_attention", "sliding_attention"]
KINDS = {
    "Qwen2": DECODER,
    "Qwen3": DECODER,
    "Llama": DECODER,
    "Mistral": DECODER | {"sliding_window": 6},
    "Gemma3Text": DECODER | {"sliding_window": 6, "layer_types": WINDOWS},
    "Bert": SIZES | {"attention_probs_dropout_prob": 0.0},
}
SHARED = "instruction and contexts"


def scorer(kind: str, *, lora: dict = LORA, **sizes) -> Scorer:
    """A small model on the CPU, with heads that the kernel can multiply and with adapters that are not zero."""
    config = getattr(transformers, f"{kind}Config")(**KINDS[kind] | sizes)
    torch.manual_seed(0)
    made = Scorer(add_lora(transformers.AutoModelForSequenceClassification.from_config(config), **lora))
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.1)
    return made.eval()


def copied(made: Scorer) -> Scorer:
    """A copy with a lock of its own, which cannot be copied."""
    return copy.deepcopy(made, {id(made.lock): threading.RLock()})


def both(made: Scorer) -> tuple[Scorer, Scorer]:
    """It, and a copy on the GPU."""
    return made, copied(made).to("cuda")


@torch.inference_mode()
@pytest.mark.parametrize("kind", KINDS)
def test_scores(kind):
    cpu, gpu = both(scorer(kind))
    for name, texts in (SHAPES | {"chunks": [LONG, *SHAPES["flat"]]}).items():
        if kind != "Bert" or "instruction" not in name:  # whose texts are as long as they may be
            assert_same(gpu(gpu.pack(texts)).cpu(), cpu(cpu.pack(texts)), 1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind):
    texts = SHAPES["flat" if kind == "Bert" else SHARED][:5]
    cpu, gpu = both(scorer(kind))
    wanted = gradients(cpu, enumerate(cpu(cpu.pack(texts))))
    found = gradients(gpu, enumerate(gpu(gpu.pack(texts)).cpu()))
    assert_same_gradients({name: g.cpu() for name, g in found.items()}, wanted, 1e-4)


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


@torch.inference_mode()
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "Bert"])
def test_flash_and_graphs_in_bfloat16_match_float32(kind, monkeypatch):
    """Their error is at most twice that of blocks with the same rounded weights. A wrong key would make ten times that."""
    half = scorer(kind).to("cuda", torch.bfloat16)
    for _, weight in half.named_parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
    half.inner.score.float()
    whole = copied(half).float().to("cpu")
    assert flash.has_flash(half.device)
    batches = {name: half.pack(texts) for name, texts in SHAPES.items()}
    wanted = {name: whole(batch) for name, batch in batches.items()}
    by_flash = {name: half(batch).cpu() for name, batch in batches.items()}
    assert half.record()
    recorded = {name: half.cuda_graphs.scores(batch) is not None for name, batch in batches.items()}
    assert sum(recorded.values()) > len(recorded) / 2
    replayed = {name: half(batch).cpu() for name, batch in batches.items()}
    again = {name: half(batch).cpu() for name, batch in batches.items()}
    assert half.eval().cuda_graphs is None
    monkeypatch.setattr(flash, "has_flash", lambda device: False)
    by_blocks = {name: half(batch).cpu() for name, batch in batches.items()}
    for name, scores in wanted.items():
        errors = [error(found[name], scores) for found in (by_blocks, by_flash, replayed)]
        print(f"{kind} {name}: blocks, flash and graphs are {errors} off; recorded: {recorded[name]}")
        assert max(errors) < 0.1
        assert max(errors) < 2 * errors[0] + 0.01
        assert torch.equal(again[name], replayed[name])


def trained(made: Scorer, folder, *, steps: int = 8, batch: int = 16, **schedule) -> list[float]:
    """The losses of a training on random texts of 5 to 60 tokens, a third of them behind an instruction."""
    draw = np.random.default_rng(0)
    ids = lambda n: tuple(draw.integers(10, 150, n).tolist())  # noqa: E731
    instruction, texts = ids(24), []
    for i in range(steps * batch):
        before = instruction if i % 3 == 0 else ()
        texts.append(Encoded(chunks=((*before, *ids(int(draw.integers(5, 60)))),), starts=(len(before),)))
    examples = [LabeledText(text=str(i), labels=(i % 3,), row=i + 1) for i in range(len(texts))]
    settings = TrainConfig(epochs=1, batch=batch, save_steps=10**9, **schedule)
    folder.mkdir()
    fit(
        FitJob(
            scorer=made, examples=examples, encode=lambda batch: [[texts[int(e.text)]] for e in batch],
            loss=make_loss("label"),
            validate=lambda: {"metric": 0.0, "loss": 0.0}, settings=settings, lr=2e-3, folder=folder, quiet=True,
        )
    )  # fmt: skip
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_training_losses_match_the_cpu(tmp_path):
    cpu, gpu = both(scorer("Qwen2"))
    wanted = trained(cpu, tmp_path / "cpu", tokens_per_micro_batch=300)
    found = trained(gpu, tmp_path / "gpu", tokens_per_micro_batch=300)
    np.testing.assert_allclose(found, wanted, rtol=1e-4)
    assert wanted[-1] != pytest.approx(wanted[0], rel=1e-2)


def test_dropout_in_bfloat16_learns_as_in_float32(tmp_path):
    """Other masks and another precision, so near is all that can be said."""
    made = scorer("Qwen2", lora=LORA | {"dropout": 0.05})
    half = copied(made)
    half.inner.base_model.to(torch.bfloat16)
    for name, p in half.named_parameters():
        if p.requires_grad:
            p.data = p.data.float()
        assert p.dtype == (torch.float32 if p.requires_grad or "score" in name else torch.bfloat16)
    wanted, found = (trained(m.to("cuda"), tmp_path / n) for n, m in (("32", made), ("16", half)))
    np.testing.assert_allclose(found, wanted, atol=0.1)


def test_out_of_memory_halves_micro_batches(tmp_path):
    made = scorer("Qwen2", hidden_size=512, intermediate_size=2048, head_dim=128)
    wanted = trained(copied(made).to("cuda"), tmp_path / "small", steps=3, batch=512, tokens_per_micro_batch=1024)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 600e6) / total)
    try:
        found = trained(made.to("cuda"), tmp_path / "large", steps=3, batch=512, tokens_per_micro_batch=2**15)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert torch.cuda.max_memory_allocated() < 1.2e9
    np.testing.assert_allclose(found, wanted, rtol=1e-4)


@pytest.mark.parametrize("more", [{}, {"adapt_top": 1}, {"pooling": "mean", "head": "mlp"}], ids=str)
def test_run_scores_the_same_on_both(tiny_model, tmp_path, more):
    config = QUICK | {"data": str(write(tmp_path / "a.csv", labelled())), "model": str(tiny_model("qwen2"))}
    config |= {"out": str(tmp_path / "run"), "device": "cuda", "dtype": "float32", "epochs": 4.0, "baselines": True}
    run = pipeline.train(RunConfig.from_flat(config | more), log=lambda line: None, quiet=True)
    texts = ["good number 3", "bad number 4", "so number 5", ""]
    gpu, cpu = (Predictor(run, device=device) for device in ("cuda", "cpu"))
    assert gpu.scorer.device.type == "cuda"
    np.testing.assert_allclose(gpu.scores(texts), cpu.scores(texts), atol=1e-4)
    assert gpu.predict(texts[:3]) == ["pos", "neg", "mid"]


def test_served_scores_match_the_run(tiny_model, tmp_path):
    config = QUICK | {"data": str(write(tmp_path / "a.csv", labelled())), "model": str(tiny_model("qwen2"))}
    config |= {"out": str(tmp_path / "run"), "device": "cuda", "epochs": 4.0}
    run = pipeline.train(RunConfig.from_flat(config), log=lambda line: None, quiet=True)
    texts = [f"{word} number {n}" for word in ("good", "bad", "so") for n in range(9)]
    served, plain = load([run])["run"], Predictor(run)
    assert served.scorer.cuda_graphs is not None
    assert plain.scorer.cuda_graphs is None
    np.testing.assert_allclose(served.scores(texts), plain.scores(texts), atol=0.05)
    assert served.predict(texts) == plain.predict(texts) == ["pos"] * 9 + ["neg"] * 9 + ["mid"] * 9
