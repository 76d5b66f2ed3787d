"""Norms, rotations and gated units in one step are transformers' own, value and gradient, and no other model is touched."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModel
from transformers.models.llama import modeling_llama as llama

from loracle.models.attention import kernels
from loracle.models.attention.kernels import RmsNorm, SwiGlu, fuse, rotate


def drawn(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(sum(shape)))


def test_norm_value_and_gradient():
    norm = llama.LlamaRMSNorm(16, eps=1e-5).double()
    norm.weight.data = drawn(16)
    x = drawn(3, 5, 16).requires_grad_()
    # transformers widens to float32 whatever comes in, which float64 shows
    torch.testing.assert_close(RmsNorm.apply(x, norm.weight, 1e-5), norm(x), rtol=1e-6, atol=1e-6)
    assert torch.autograd.gradcheck(lambda x, w: RmsNorm.apply(x, w, 1e-5), (x, norm.weight))


def test_norm_rounds_where_transformers_does():
    norm = llama.LlamaRMSNorm(64, eps=1e-5).bfloat16()
    norm.weight.data = drawn(64).bfloat16()
    x = drawn(200, 64).bfloat16()
    differ = RmsNorm.apply(x, norm.weight, 1e-5) != norm(x)
    assert differ.float().mean() < 0.01  # another order of the sum tips the last bit now and then


def test_rotation_value_and_gradient():
    q, k = drawn(1, 4, 6, 8).requires_grad_(), drawn(1, 2, 6, 8).requires_grad_()
    angle = drawn(1, 6, 4).repeat(1, 1, 2)
    cos, sin = angle.cos(), angle.sin()
    for found, wanted in zip(rotate(q, k, cos, sin), llama.apply_rotary_pos_emb(q, k, cos, sin), strict=True):
        torch.testing.assert_close(found, wanted)
    assert torch.autograd.gradcheck(lambda q, k: rotate(q, k, cos, sin), (q, k))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral", "gemma3_text"])
def test_fuse_changes_only_its_model(tiny_model, kind):
    one, other = (AutoModel.from_pretrained(tiny_model(kind)) for _ in range(2))
    fuse(one)
    changed = {type(m).__name__ for m in one.modules() if "forward" in vars(m)}
    assert any(name.endswith("Attention") for name in changed)
    assert any(name.endswith("RMSNorm") for name in changed) == (kind != "gemma3_text")
    assert not any("forward" in vars(m) for m in other.modules())
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        torch.testing.assert_close(one(ids).last_hidden_state, other(ids).last_hidden_state, rtol=1e-5, atol=1e-5)


def test_gated_unit_value_and_gradient():
    gate, up = drawn(3, 5, 16).requires_grad_(), drawn(5, 3, 16).transpose(0, 1).requires_grad_()
    torch.testing.assert_close(SwiGlu.apply(gate, up), F.silu(gate) * up)
    assert torch.autograd.gradcheck(SwiGlu.apply, (gate, up))


def test_both_rotations_agree():
    x, angle = drawn(1, 4, 6, 8), drawn(1, 1, 6, 4).repeat(1, 1, 1, 2)
    for sign in (1, -1):
        torch.testing.assert_close(
            kernels._rotated_in_one(x, angle.cos(), angle.sin(), sign),
            kernels._rotated(x, angle.cos(), angle.sin(), sign),
        )


@pytest.mark.parametrize("lacks", [None, "Triton", "a C compiler", "Python's headers"])
def test_compiling_needs_triton_compiler_and_headers(monkeypatch, tmp_path, lacks):
    (tmp_path / "Python.h").touch()
    include = tmp_path / "elsewhere" if lacks == "Python's headers" else tmp_path
    monkeypatch.setattr(kernels, "has_triton", lambda: lacks != "Triton")
    monkeypatch.setattr(kernels.shutil, "which", lambda name: None if lacks == "a C compiler" else f"/usr/bin/{name}")
    monkeypatch.setattr(kernels.sysconfig, "get_paths", lambda: {"include": str(include)})
    assert kernels.can_compile.__wrapped__() == (lacks is None)
