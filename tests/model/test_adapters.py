"""Adapters and heads: ours computes what PEFT's computes, and plain PEFT opens what we save (rule 5)."""

from __future__ import annotations

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification
from peft.tuners.lora.layer import Linear as PeftLinear
from transformers import AutoTokenizer

from loracle.data.examples import Task
from loracle.errors import UserError
from loracle.model import adapters, assemble
from loracle.model.adapters import LeanLinear, save_adapter
from loracle.model.backbone import load_tokenizer
from loracle.text.encode import Encoder
from loracle.text.template import bake

CPU = torch.device("cpu")
LORA = {"r": 4, "alpha": 8.0, "dropout": 0.0}
TEXTS = ["banks fall", "", "the quick brown fox " * 8, "你好 🙂", "<s></s> <|im_end|>"]


def task(labels: int) -> Task:
    return Task(kind="single", label_names=tuple(f"label {i}" for i in range(labels)))


def trained(folder, tokenizer, labels: int = 3, lora=LORA, **options):
    """A scorer whose every trained weight has moved."""
    made = assemble.new_scorer(
        folder, task(labels), pad_token_id=tokenizer.pad_token_id, dtype=torch.float32, device=CPU, lora=lora, **options
    )
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in made.parameters():
            if weight.requires_grad:
                weight += 0.1 * torch.randn(weight.shape, generator=generator)
    return made.eval()


def close(found, wanted, tolerance=1e-5):
    torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(wanted), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("labels", [3, 24])
@pytest.mark.parametrize("kind", ["qwen2", "llama", "mistral", "gemma3_text"])
def test_plain_peft_gives_the_same_scores(tiny_model, tmp_path, kind, labels, side):
    """Llama's and Mistral's tokenizers name no pad token here."""
    from loracle.recipe import save_tokenizer

    tokenizer = bake(load_tokenizer(tiny_model(kind)), None, 24)
    made = trained(tiny_model(kind), tokenizer, labels)
    wanted = assemble.score(made, Encoder(tokenizer)(TEXTS))
    save_adapter(made.model, tmp_path, base=str(tiny_model(kind)), revision=None)
    save_tokenizer(tokenizer, tmp_path)
    load_kwargs = {"num_labels": labels, "pad_token_id": tokenizer.pad_token_id, "dtype": "float32"}
    model = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path, **load_kwargs).eval()
    theirs = AutoTokenizer.from_pretrained(tmp_path, padding_side=side)
    inputs = theirs(TEXTS, truncation=True, padding=True, return_tensors="pt")
    with torch.inference_mode():
        close(model(**inputs).logits, wanted)


@pytest.mark.parametrize("kind", ["qwen2", "gemma3_text", "bert", "roberta"])
def test_reloaded_is_trained_and_merged_is_unmerged(tiny_model, tmp_path, kind):
    encoder = kind in ("bert", "roberta")
    tokenizer = bake(load_tokenizer(tiny_model(kind)), None, 24, encoder=encoder)
    made, texts = trained(tiny_model(kind), tokenizer), Encoder(tokenizer, encoder=encoder)(TEXTS)
    wanted = assemble.score(made, texts)
    save_adapter(made.model, tmp_path, base=str(tiny_model(kind)), revision=None)
    again = assemble.load_scorer(
        tiny_model(kind), tmp_path, task(3), pad_token_id=tokenizer.pad_token_id, dtype=torch.float32, device=CPU,
        pooling="last", head="linear",
    )  # fmt: skip
    kept = dict(again.named_parameters())
    moved = {n: p for n, p in made.named_parameters() if p.requires_grad}
    assert any("modules_to_save" in n for n in moved)
    assert all(torch.equal(p, kept[n]) for n, p in moved.items())
    close(assemble.score(again, texts), wanted, 0)
    again.model = again.model.merge_and_unload()
    assert not any("lora" in n for n, _ in again.named_parameters())
    close(assemble.score(again, texts), wanted)


def test_mlp_head_and_mean_pooling_come_back(tiny_model, tmp_path):
    folder = tiny_model("qwen2")
    tokenizer = bake(load_tokenizer(folder), None, 24)
    options = {"pooling": "mean", "head": "mlp"}
    made, texts = trained(folder, tokenizer, **options), Encoder(tokenizer)(TEXTS)
    save_adapter(made.model, tmp_path, base=str(folder), revision=None)
    again = assemble.load_scorer(
        folder, tmp_path, task(3), pad_token_id=tokenizer.pad_token_id, dtype=torch.float32, device=CPU, **options
    )
    close(assemble.score(again, texts), assemble.score(made, texts), 0)


@pytest.mark.parametrize("kind", ["qwen2", "bert", "roberta"])
def test_the_head_is_trained_and_never_a_target(tiny_model, kind):
    made = trained(tiny_model(kind), load_tokenizer(tiny_model(kind)))
    for part in ("score", "classifier", "pooler"):
        inside = [n for n, _ in made.named_parameters() if f".{part}." in n]
        assert not any("lora" in n for n in inside)
        trainable = [n for n, p in made.named_parameters() if f".{part}." in n and p.requires_grad]
        assert bool(trainable) == bool(inside)
        assert all("modules_to_save" in n for n in trainable)


def test_an_unknown_target_is_refused(tiny_model):
    folder = tiny_model("qwen2")
    with pytest.raises(UserError, match=r"names of linear layers to adapt; found wq.*q_proj"):
        trained(folder, load_tokenizer(folder), lora=LORA | {"targets": "q_proj,wq"})


@pytest.mark.parametrize(("rslora", "scaling"), [(False, 2.0), (True, 4.0)])
def test_scaling(tiny_model, rslora, scaling):
    folder = tiny_model("qwen2")
    made = trained(folder, load_tokenizer(folder), lora=LORA | {"rslora": rslora})
    layers = [m for m in made.modules() if isinstance(m, LeanLinear)]
    assert len(layers) == 3 * 7
    assert {m.scaling["default"] for m in layers} == {scaling}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lean_is_pefts_own(tiny_model, monkeypatch, dtype):
    folder = tiny_model("qwen2")
    made = trained(folder, load_tokenizer(folder)).to(dtype)
    layer = next(m for m in made.modules() if isinstance(m, LeanLinear))
    x = torch.randn(2, 5, 32, dtype=dtype, generator=torch.Generator().manual_seed(0), requires_grad=True)
    wanted, found = (
        (y, *torch.autograd.grad(y.square().sum(), [x, *(p for p in layer.parameters() if p.requires_grad)]))
        for y in (PeftLinear.forward(layer, x), layer(x))
    )
    assert len(found) == 4
    for f, w in zip(found, wanted, strict=True):
        close(f, w, 1e-5 if dtype == torch.float32 else 1e-12)


def test_dropout_drops_its_share_and_keeps_the_mean():
    x = torch.ones(400, 500)
    torch.manual_seed(0)
    keep = adapters._dropout_mask(x, 0.05)
    assert (keep == 0).float().mean().item() == pytest.approx(13 / 256, abs=2e-3)
    assert keep.mean().item() == pytest.approx(1, abs=2e-3)
    torch.manual_seed(0)
    assert torch.equal(keep, adapters._dropout_mask(x, 0.05))
    assert not torch.equal(keep, adapters._dropout_mask(x, 0.05))
