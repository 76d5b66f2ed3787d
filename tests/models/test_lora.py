"""Adapters and heads: ours computes what PEFT's computes, and plain PEFT opens what we save (rule 5)."""

from __future__ import annotations

import itertools

import pytest
import small
import torch
from peft import AutoPeftModelForSequenceClassification
from peft.tuners.lora.layer import Linear as PeftLinear
from transformers import AutoTokenizer

from loracle.errors import UserError
from loracle.models import lora, scoring
from loracle.models.loading import load_tokenizer
from loracle.models.lora import LeanLinear, save_adapter
from loracle.tasks import Task
from loracle.text.template import install_template
from loracle.text.tokenize import Encoder

CPU = torch.device("cpu")
LORA = {"r": 4, "alpha": 8.0, "dropout": 0.0}
TEXTS = ["banks fall", "", "the quick brown fox " * 8, "你好 🙂", "<s></s> <|im_end|>"]


def task(labels: int) -> Task:
    return Task(name="single_label", label_names=tuple(f"label {i}" for i in range(labels)))


def trained(folder, tokenizer, labels: int = 3, lora=LORA, **options):
    """A scorer whose every trained weight has moved."""
    made = small.new_scorer(
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


@pytest.mark.slow
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("labels", [3, 24])
@pytest.mark.parametrize("kind", ["qwen2", "llama", "mistral", "gemma3_text"])
def test_plain_peft_gives_the_same_scores(tiny_model, tmp_path, kind, labels, side):
    """Llama's and Mistral's tokenizers name no pad token here."""
    from loracle.training.prepare import save_tokenizer

    tokenizer = install_template(load_tokenizer(tiny_model(kind)), None, 24)
    made = trained(tiny_model(kind), tokenizer, labels)
    wanted = scoring.score(made, Encoder(tokenizer)(TEXTS))
    save_adapter(made.model, tmp_path, base=str(tiny_model(kind)), revision=None)
    save_tokenizer(tokenizer, tmp_path)
    load_kwargs = {"num_labels": labels, "pad_token_id": tokenizer.pad_token_id, "dtype": "float32"}
    model = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path, **load_kwargs).eval()
    theirs = AutoTokenizer.from_pretrained(tmp_path, padding_side=side)
    inputs = theirs(TEXTS, truncation=True, padding=True, return_tensors="pt")
    with torch.inference_mode():
        close(model(**inputs).logits, wanted)


@pytest.mark.parametrize("kind", ["qwen2", "gemma3_text", "bert", "roberta"])
def test_reloaded_and_merged_scores_equal_trained(tiny_model, tmp_path, kind):
    encoder = kind in ("bert", "roberta")
    tokenizer = install_template(load_tokenizer(tiny_model(kind)), None, 24, encoder=encoder)
    made, texts = trained(tiny_model(kind), tokenizer), Encoder(tokenizer, encoder=encoder)(TEXTS)
    wanted = scoring.score(made, texts)
    save_adapter(made.model, tmp_path, base=str(tiny_model(kind)), revision=None)
    again = small.load_scorer(
        tiny_model(kind), tmp_path, task(3), pad_token_id=tokenizer.pad_token_id, dtype=torch.float32, device=CPU,
        pooling="last", head="linear",
    )  # fmt: skip
    kept = dict(again.named_parameters())
    moved = {n: p for n, p in made.named_parameters() if p.requires_grad}
    assert any("modules_to_save" in n for n in moved)
    assert all(torch.equal(p, kept[n]) for n, p in moved.items())
    close(scoring.score(again, texts), wanted, 0)
    again.model = again.model.merge_and_unload()
    assert not any("lora" in n for n, _ in again.named_parameters())
    close(scoring.score(again, texts), wanted)


def test_mlp_head_and_mean_pooling_reload(tiny_model, tmp_path):
    folder = tiny_model("qwen2")
    tokenizer = install_template(load_tokenizer(folder), None, 24)
    options = {"pooling": "mean", "head": "mlp"}
    made, texts = trained(folder, tokenizer, **options), Encoder(tokenizer)(TEXTS)
    save_adapter(made.model, tmp_path, base=str(folder), revision=None)
    again = small.load_scorer(
        folder, tmp_path, task(3), pad_token_id=tokenizer.pad_token_id, dtype=torch.float32, device=CPU, **options
    )
    close(scoring.score(again, texts), scoring.score(made, texts), 0)


@pytest.mark.parametrize("kind", ["qwen2", "bert", "roberta"])
def test_the_head_is_trained_and_never_a_target(tiny_model, kind):
    made = trained(tiny_model(kind), load_tokenizer(tiny_model(kind)))
    for part in ("score", "classifier", "pooler"):
        inside = [n for n, _ in made.named_parameters() if f".{part}." in n]
        assert not any("lora" in n for n in inside)
        trainable = [n for n, p in made.named_parameters() if f".{part}." in n and p.requires_grad]
        assert bool(trainable) == bool(inside)
        assert all("modules_to_save" in n for n in trainable)


def test_unknown_target_raises(tiny_model):
    folder = tiny_model("qwen2")
    with pytest.raises(UserError, match=r"wq.*q_proj"):
        trained(folder, load_tokenizer(folder), lora=LORA | {"targets": "q_proj,wq"})


@pytest.mark.parametrize(("rslora", "scaling"), [(False, 2.0), (True, 4.0)])
def test_scaling(tiny_model, rslora, scaling):
    folder = tiny_model("qwen2")
    made = trained(folder, load_tokenizer(folder), lora=LORA | {"rslora": rslora})
    layers = [m for m in made.modules() if isinstance(m, LeanLinear)]
    assert len(layers) == 3 * 7
    assert {m.scaling["default"] for m in layers} == {scaling}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lean_layer_equals_peft(tiny_model, monkeypatch, dtype):
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_keeps_rate_and_mean(dtype):
    x = torch.ones(401, 501, dtype=dtype)
    torch.manual_seed(0)
    keep, scale = lora._dropout(x, 0.05)
    assert keep.shape == x.shape
    assert keep.dtype == dtype
    assert set(keep.unique().tolist()) == {0, 1}
    assert (keep == 0).float().mean().item() == pytest.approx(0.05, abs=2e-3)
    assert keep.float().mean().item() * scale == pytest.approx(1, abs=2e-3)
    torch.manual_seed(0)
    assert torch.equal(keep, lora._dropout(x, 0.05)[0])
    assert not torch.equal(keep, lora._dropout(x, 0.05)[0])


def test_grouped_layers_share_dropout_and_gradients(tiny_model):
    folder = tiny_model("qwen2")
    made = trained(folder, load_tokenizer(folder), lora=LORA | {"dropout": 0.4}).double().train()
    attention = next(m for m in made.modules() if hasattr(m, "q_proj"))
    layers = [attention.q_proj, attention.k_proj, attention.v_proj]
    with torch.no_grad():
        for layer in layers:
            layer.lora_B["default"].weight.normal_()
    x = torch.randn(7, 32, dtype=torch.float64, requires_grad=True)
    learnt = [x, *(p for layer in layers for p in layer.parameters() if p.requires_grad)]
    torch.manual_seed(3)
    keep, scale = lora._dropout(x, 0.4)

    def plain(layer):
        inside = (x * keep * scale) @ layer.lora_A["default"].weight.t()
        return layer.base_layer(x) + inside @ layer.lora_B["default"].weight.t() * layer.scaling["default"]

    torch.manual_seed(3)
    found = torch.cat([layer(x) for layer in layers], dim=1)
    wanted = torch.cat([plain(layer) for layer in layers], dim=1)
    close(found, wanted, 1e-12)
    for f, w in zip(*(torch.autograd.grad(y.pow(3).sum(), learnt) for y in (found, wanted)), strict=True):
        close(f, w, 1e-9)
    assert not torch.equal(layers[0](x), layers[0](x))  # drawn anew once each layer has had its part


def test_single_layers_of_a_group(tiny_model):
    folder = tiny_model("qwen2")
    made = trained(folder, load_tokenizer(folder))
    attention = next(m for m in made.modules() if hasattr(m, "q_proj"))
    x, y = torch.randn(5, 32), torch.randn(6, 32)
    for seen in (x, y, x, x):
        close(attention.q_proj(seen), PeftLinear.forward(attention.q_proj, seen), 1e-5)
    close(attention.v_proj(x), PeftLinear.forward(attention.v_proj, x), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cached_adapters_follow_weight_changes(tiny_model, dtype):
    """However they are written to: a cast that is kept too long would score with the weights of an earlier step."""
    tokenizer = install_template(load_tokenizer(tiny_model("qwen2")), None, 24)
    made = trained(tiny_model("qwen2"), tokenizer)
    made.inner.base_model.to(dtype)
    batch = made.pack(Encoder(tokenizer)(TEXTS))
    weights = [p for name, p in made.named_parameters() if "lora_" in name]

    def scored():
        with torch.no_grad():
            found = made(batch)
        assert torch.equal(found, made(batch).detach()), "with gradients nothing is kept"
        return found

    def write(how):
        with torch.no_grad():
            for weight in weights:
                how(weight)
        made.eval()

    seen = [scored()]
    write(lambda w: w.mul_(1.5))
    seen.append(scored())
    write(lambda w: w.data.mul_(1.5))
    seen.append(scored())
    write(lambda w: setattr(w, "data", 1.5 * w.data))
    seen.append(scored())
    with torch.no_grad():
        torch._foreach_mul_(weights, 1.5)  # as an optimizer does, without a word to the modules
    seen.append(scored())
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(seen))
