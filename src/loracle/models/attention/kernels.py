"""RMS norm, rotary positions and SwiGLU of a decoder in few passes over memory, forward and backward.

``transformers`` writes them as chains of small operations. Autograd keeps the inputs of each and adds two more operations for
its backward. Here each chain is one step with a handwritten backward: the same formulas and roundings, a third of the passes.
On CUDA a step is one kernel, compiled on first use for all lengths, since there memory costs more time than arithmetic.
"""

from __future__ import annotations

import functools
import inspect
import os
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._triton import has_triton


def fuse(model: Any) -> None:
    """Replace a transformers decoder's norms, rotations and gated units with those below, where the formula matches."""
    gated = getattr(model.config, "hidden_act", None) == "silu"
    for module in model.modules():
        # Gemma's norm multiplies by 1 + weight in float32 and names epsilon differently: it stays.
        if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
            module.forward = MethodType(_norm, module)
        if gated and all(hasattr(module, f"{name}_proj") for name in ("gate", "up", "down")):
            module.forward = MethodType(_gated, module)
        forward = inspect.unwrap(type(module).forward)
        if "apply_rotary_pos_emb" in forward.__code__.co_names:
            # The layer's own code with one name rebound, so that other models in this process do not change.
            scope = {**forward.__globals__, "apply_rotary_pos_emb": rotate}
            bound = FunctionType(forward.__code__, scope, forward.__name__, forward.__defaults__, forward.__closure__)
            bound.__kwdefaults__ = forward.__kwdefaults__
            module.forward = MethodType(bound, module)


class _NoContext:
    """Stands in for autograd's context where there is no backward."""

    def save_for_backward(self, *tensors: Any) -> None:
        pass


def apply_function(function: type[torch.autograd.Function], *inputs: Any) -> Any:
    """``function.apply``, without autograd's bookkeeping where gradients are off: for one short text it is half the time."""
    return function.apply(*inputs) if torch.is_grad_enabled() else function.forward(_NoContext(), *inputs)


def _norm(module: Any, x: Tensor) -> Tensor:
    return apply_function(RmsNorm, x, module.weight, module.variance_epsilon)


def _gated(module: Any, x: Tensor) -> Tensor:
    if x.device.type != "cuda":  # a CPU is faster if it keeps silu's product (dev/LOG.md)
        return type(module).forward(module, x)
    return module.down_proj(apply_function(SwiGlu, module.gate_proj(x), module.up_proj(x)))


@functools.cache
def can_compile() -> bool:
    """Whether kernels can be compiled for a GPU: Triton compiles them, and a C compiler the program that launches each."""
    compiler = any(shutil.which(name) for name in (os.environ.get("CC"), "gcc", "clang") if name)
    return has_triton() and compiler and Path(sysconfig.get_paths()["include"], "Python.h").exists()


def _step(function: Callable[..., Any], x: Tensor) -> Callable[..., Any]:
    """The function for tensors like ``x``: on CUDA as one kernel."""
    return _compiled(function) if x.device.type == "cuda" and can_compile() else function


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True)


class RmsNorm(torch.autograd.Function):
    """``w ⊙ x / sqrt(mean(x²) + ε)`` for ``x [..., H]``, rounded to x's dtype before w, as transformers does."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        out, normed, scale = _step(_normed, x)(x, weight, epsilon)
        ctx.save_for_backward(normed, weight, scale)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        normed, weight, scale = ctx.saved_tensors
        g_x = _step(_norm_gradient, grad)(grad, normed, weight, scale)
        return g_x, (grad * normed).flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None, None


def _normed(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
    # Widening made a copy, so write over it: half the time of a norm goes into new memory.
    normed = (wide * scale if wide is x else wide.mul_(scale)).to(x.dtype)
    return normed * weight, normed, scale


def _norm_gradient(grad: Tensor, normed: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    wide, g = normed.to(scale.dtype), (grad * weight).to(scale.dtype)
    along = torch.linalg.vecdot(g, wide)[..., None].div_(g.shape[-1])
    return g.addcmul_(wide, along, value=-1).mul_(scale).to(normed.dtype)


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """Rotary positions of ``q, k [1, heads, T, D]`` with ``cos, sin [1, T, D]``; the signature is transformers'."""
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return apply_function(_Rotation, q, cos, sin), apply_function(_Rotation, k, cos, sin)


class _Rotation(torch.autograd.Function):
    """``x cos + rotate_half(x) sin``; the gradient is rotated back by the same angles."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, 1)

    @staticmethod
    def backward(ctx, grad: Tensor):
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, sin, -1), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    if x.device.type == "cuda":
        return _step(_rotated_in_one, x)(x, cos, sin, sign)
    out, half = x * cos, x.shape[-1] // 2
    out[..., :half].addcmul_(x[..., half:], sin[..., half:], value=-sign)
    out[..., half:].addcmul_(x[..., :half], sin[..., :half], value=sign)
    return out


def _rotated_in_one(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    """The same without writing in place, which compiles to fewer passes."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * (sign * sin)


class SwiGlu(torch.autograd.Function):
    """``silu(gate) ⊙ up``. The backward computes silu again, so that only the inputs are kept."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _step(_gate, gate)(gate, up)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _step(_gate_gradients, grad)(grad, *ctx.saved_tensors)


def _gate(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def _gate_gradients(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.aten.silu_backward(grad * up, gate), grad * F.silu(gate)
