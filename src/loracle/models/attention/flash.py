"""Attention of a token tree by torch's flash attention, on CUDA and in 16 bits.

Each segment is a sequence whose keys are all tokens above it and its own. Keys of a shared ancestor are copied for each.

Shapes: T tokens, K keys, H query heads, G key heads, D head size.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import torch
from torch import Tensor

from loracle.models.attention.blocks import AttentionSettings, block_attention
from loracle.models.attention.kernels import apply_function
from loracle.models.attention.plan import BlockPlan, Sequences
from loracle.text.packing import pack
from loracle.text.tokenize import Encoded

logger = logging.getLogger(__name__)

MAX_ERROR = 0.02  # of results in bfloat16, which rounds to 0.004; a key too many or too few makes ten times that

# What torch.nn.attention.varlen calls; its own arguments change with every release.
_flash_kernel = torch.ops.aten._flash_attention_forward


@functools.cache
def has_flash(device: torch.device) -> bool:
    """Whether torch's flash attention exists and is right on a device: it was built, and the GPU is Ampere or newer."""
    if device.type != "cuda" or not torch.backends.cuda.is_flash_attention_available():
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0) and _flash_is_right(device)


def flash_supports(dtype: torch.dtype, head: int) -> bool:
    """Whether flash attention computes heads of that size in that dtype."""
    return dtype.itemsize == 2 and head % 8 == 0 and head <= 256


def flash_attention(query: Tensor, key: Tensor, value: Tensor, plan: Sequences, settings: AttentionSettings) -> Tensor:
    """Flash attention of ``query [1, H, T, D]``, ``key`` and ``value [1, G, T, D]``, ``[1, T, H, D]``; without dropout."""
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if plan.key_rows is not None:
        k, v = (apply_function(_CopyRows, x, plan.key_rows) for x in (k, v))
    causal, window = settings.causal, {}
    if settings.window is not None:
        window = {"window_size_left": settings.window - 1, "window_size_right": 0 if causal else -1}
    out, *_ = _flash_kernel(
        q, k, v, plan.query_ends, plan.key_ends, *plan.longest, 0.0, causal, False, scale=settings.scale, **window
    )
    return out[None]


class _CopyRows(torch.autograd.Function):
    """Rows ``[K, G, D]`` of ``x [T, G, D]``, some of them many times. Their gradients are added in float32."""

    @staticmethod
    def forward(ctx, x: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.shape = x.shape
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (rows,) = ctx.saved_tensors
        total = grad.new_zeros(ctx.shape, dtype=torch.float32)
        return total.index_add_(0, rows, grad.float()).to(grad.dtype), None


@torch.inference_mode(False)
@torch.enable_grad()
def _flash_is_right(device: torch.device, window: int = 16) -> bool:
    """Whether its values and gradients are those of plain products, for texts behind a shared prefix.

    Checked once a process. The operation is not public, and one with another mask would change scores without an error.
    """
    texts = [Encoded(chunks=((*range(40), 50 + i, *range(60, 60 + 9 * i)),), starts=(40,)) for i in range(4)]
    batch = pack(texts)
    sequences, blocks = Sequences.of(batch, device), BlockPlan.of(batch, device)
    assert sequences is not None
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 4, batch.tokens, 64), *2 * ((1, 2, batch.tokens, 64),), (1, batch.tokens, 4, 64))
    *inputs, grad = (torch.randn(shape, generator=generator).to(device, torch.bfloat16) for shape in shapes)

    def results(attend: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        x = [t.to(dtype, copy=True).requires_grad_() for t in inputs]
        out = attend(*x)
        return [out.detach(), *torch.autograd.grad(out, x, grad.to(dtype))]

    errors: list[float] = []
    try:
        for near in (None, window):
            settings = AttentionSettings(causal=True, window=near, scale=64**-0.5)
            plain = functools.partial(block_attention, plan=blocks, settings=settings)
            flash = functools.partial(flash_attention, plan=sequences, settings=settings)
            pairs = zip(results(flash, torch.bfloat16), results(plain, torch.float32), strict=True)
            errors += [((f - p).norm() / p.norm()).item() for f, p in pairs]
    except torch.OutOfMemoryError:  # says nothing about the operation
        raise
    except (RuntimeError, TypeError, AttributeError) as e:
        logger.warning("flash attention is not used on %s: %s", device, str(e).splitlines()[0])
        return False
    right = all(error < MAX_ERROR for error in errors)  # a NaN is not
    if not right:
        logger.warning("flash attention is not used on %s: its errors are %s", device, [f"{e:.1e}" for e in errors])
    return right
