"""RMS norm, rotary positions and SwiGLU of a decoder in few passes over memory, forward and backward.

``transformers`` writes them as chains of small operations; autograd keeps what each of them read and answers each with two
more. Here each is one step whose backward is written by hand: the same formulas and roundings, a third of the passes. On CUDA
a step is one kernel, compiled on first use for all lengths: there a pass over memory costs more than what is computed in it.
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
    """Let norms, rotations and gated units of a transformers decoder run through this module, where their formula is known."""
    gated = getattr(model.config, "hidden_act", None) == "silu"
    for module in model.modules():
        # Gemma's norm multiplies by 1 + weight in float32 and calls epsilon otherwise: it stays as it is.
        if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
            module.forward = MethodType(_norm, module)
        if gated and all(hasattr(module, f"{name}_proj") for name in ("gate", "up", "down")):
            module.forward = MethodType(_gated, module)
        forward = inspect.unwrap(type(module).forward)
        if "apply_rotary_pos_emb" in forward.__code__.co_names:
            # The layer's own code with one name bound anew, so that no other model in this process is touched.
            scope = {**forward.__globals__, "apply_rotary_pos_emb": rotate}
            bound = FunctionType(forward.__code__, scope, forward.__name__, forward.__defaults__, forward.__closure__)
            bound.__kwdefaults__ = forward.__kwdefaults__
            module.forward = MethodType(bound, module)


class _Unrecorded:
    """In place of a context, where there will be no backward."""

    def save_for_backward(self, *tensors: Any) -> None:
        pass


def applied(step: type[torch.autograd.Function], *given: Any) -> Any:
    """``step.apply``, without autograd's bookkeeping where nothing is recorded: for one short text it takes half the step."""
    return step.apply(*given) if torch.is_grad_enabled() else step.forward(_Unrecorded(), *given)


def _norm(module: Any, x: Tensor) -> Tensor:
    return applied(RmsNorm, x, module.weight, module.variance_epsilon)


def _gated(module: Any, x: Tensor) -> Tensor:
    if x.device.type != "cuda":  # a CPU is quicker with silu's product kept than with silu computed again (dev/LOG.md)
        return type(module).forward(module, x)
    return module.down_proj(applied(SwiGlu, module.gate_proj(x), module.up_proj(x)))


@functools.cache
def can_compile() -> bool:
    """Whether kernels can be compiled for a GPU: Triton writes them, and a C compiler the program that launches each."""
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
    # Widening made a copy, which may be written over: half the time of a norm goes into fresh memory.
    normed = (wide * scale if wide is x else wide.mul_(scale)).to(x.dtype)
    return normed * weight, normed, scale


def _norm_gradient(grad: Tensor, normed: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    wide, g = normed.to(scale.dtype), (grad * weight).to(scale.dtype)
    along = torch.linalg.vecdot(g, wide)[..., None].div_(g.shape[-1])
    return g.addcmul_(wide, along, value=-1).mul_(scale).to(normed.dtype)


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """Rotary positions of ``q, k [1, heads, T, D]`` with ``cos, sin [1, T, D]``; the signature is transformers'."""
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return applied(_Rotation, q, cos, sin), applied(_Rotation, k, cos, sin)


class _Rotation(torch.autograd.Function):
    """``x cos + rotate_half(x) sin``; the gradient is turned back by the same angles."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, 1)

    @staticmethod
    def backward(ctx, grad: Tensor):
        cos, sin = ctx.saved_tensors
        return _turned(grad, cos, sin, -1), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    if x.device.type == "cuda":
        return _step(_turned_at_once, x)(x, cos, sin, sign)
    out, half = x * cos, x.shape[-1] // 2
    out[..., :half].addcmul_(x[..., half:], sin[..., half:], value=-sign)
    out[..., half:].addcmul_(x[..., :half], sin[..., :half], value=sign)
    return out


def _turned_at_once(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    """The same without writing in place, which a compiler makes more of than it is."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * (sign * sin)


class SwiGlu(torch.autograd.Function):
    """``silu(gate) ⊙ up``; silu is computed again for the backward, so that only what came in is kept."""

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
