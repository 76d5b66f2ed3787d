"""Attention of a token tree over padded blocks, by plain products: exact on every device and in every dtype.

Segments of similar length are padded to a rectangle. That costs little, because only attention sees the padding, and attention
over short texts is about one per cent of the arithmetic. Ancestors that all segments of a block share (the instruction) are
not copied: their keys meet all queries in one product, and one softmax runs over both parts.

Shapes: T tokens, H query heads, G key heads, R = H / G, D head size. In a block: B segments, L tokens of the longest, A shared
tokens above them, K keys of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from loracle.models.attention import plan as planning
from loracle.models.attention.kernels import apply_function
from loracle.models.attention.plan import Block, BlockPlan


@dataclass(frozen=True, slots=True)
class AttentionSettings:
    """What a layer asks of its attention."""

    causal: bool
    window: int | None  # tokens that a query sees, itself included; None: all
    scale: float  # of query-key products
    dropout: float = 0.0


def block_attention(query: Tensor, key: Tensor, value: Tensor, plan: BlockPlan, settings: AttentionSettings) -> Tensor:
    """Attention of ``query [1, H, T, D]``, ``key`` and ``value [1, G, T, D]``, ``[1, T, H, D]``."""
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, heads, D]
    padded_q = apply_function(_Pad, q, plan.query_rows, plan.query_places)
    if plan.key_places is None:
        padded_k, padded_v = k.index_select(0, plan.key_rows), v.index_select(0, plan.key_rows)
    else:
        padded_k, padded_v = (apply_function(_Pad, x, plan.key_rows, plan.key_places) for x in (k, v))
    out = []
    for block in plan.blocks:
        B, L, K = block.size
        bq = padded_q[block.queries].view(B, L, *q.shape[1:])
        bk, bv = (x[block.keys].view(B, K, *k.shape[1:]) for x in (padded_k, padded_v))
        if L >= planning.FUSED_FROM:
            o = _fused(bq, bk, bv, block, settings)
        else:
            common = None if block.common is None else (k[block.common], v[block.common])
            o = _products(bq, bk, bv, common, block, settings)
        out.append(o.reshape(B * L, *q.shape[1:]))
    return apply_function(_Unpad, torch.cat(out), plan.query_places, query.shape[2])[None]


def _fused(q: Tensor, k: Tensor, v: Tensor, block: Block, settings: AttentionSettings) -> Tensor:
    """A block by torch's fused kernel, ``[B, L, H, D]``; ``q [B, L, H, D]``, ``k`` and ``v [B, K, G, D]``."""
    mask, _ = block.mask(settings.causal, settings.window)
    return F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask[:, 0],
        dropout_p=settings.dropout,
        scale=settings.scale,
        enable_gqa=q.shape[2] != k.shape[2],
    ).transpose(1, 2)


def _products(
    q: Tensor, k: Tensor, v: Tensor, common: tuple[Tensor, Tensor] | None, block: Block, settings: AttentionSettings
) -> Tensor:
    """A block by batched products, ``[B, L, H, D]``. ``common``: shared keys and values ``[A, G, D]``."""
    mask, common_mask = block.mask(settings.causal, settings.window)
    B, L, H, D = q.shape
    K, G = k.shape[1:3]
    R = H // G
    q = (q * settings.scale).view(B, L, G, R, D).permute(0, 2, 3, 1, 4).reshape(B * G, R * L, D)
    k = k.permute(0, 2, 3, 1).reshape(B * G, D, K)
    v = v.permute(0, 2, 1, 3).reshape(B * G, K, D)
    scores = torch.bmm(q, k).view(B, G, R, L, K).masked_fill(~mask, float("-inf"))
    if common is not None:
        ck, cv = (x.transpose(0, 1) for x in common)  # [G, A, D]
        A = ck.shape[1]
        across = q.view(B, G, R * L, D).transpose(0, 1).reshape(G, B * R * L, D)
        above = torch.bmm(across, ck.transpose(1, 2)).view(G, B, R, L, A).transpose(0, 1)
        if common_mask is not None:
            above = above.masked_fill(~common_mask, float("-inf"))
        scores = torch.cat((above, scores), dim=-1)
    wide = scores.dtype if scores.dtype in (torch.float32, torch.float64) else torch.float32
    weights = torch.softmax(scores, dim=-1, dtype=wide).to(v.dtype)
    if settings.dropout:
        weights = F.dropout(weights, settings.dropout)
    out = torch.bmm(weights[..., -K:].reshape(B * G, R * L, K), v).view(B, G, R, L, D)
    if common is not None:
        across = weights[..., :A].transpose(0, 1).reshape(G, B * R * L, A)
        out = out + torch.bmm(across, cv).view(G, B, R, L, D).transpose(0, 1)
    return out.permute(0, 3, 1, 2, 4).reshape(B, L, H, D)


class _Pad(torch.autograd.Function):
    """Token rows to padded rows, each token in one place. So the backward is a gather too, not a slow scatter-add.

    Padding repeats token 0. It is not read, so it has no gradient.
    """

    @staticmethod
    def forward(ctx, x: Tensor, rows: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.rows = x.shape[0]
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (places,) = ctx.saved_tensors
        return _gather(grad, places, ctx.rows), None, None


class _Unpad(torch.autograd.Function):
    """Padded rows to token rows; padding gets a gradient of zero."""

    @staticmethod
    def forward(ctx, x: Tensor, places: Tensor, rows: int) -> Tensor:
        ctx.save_for_backward(places)
        ctx.padded = x.shape[0]
        return _gather(x, places, rows)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (places,) = ctx.saved_tensors
        padded = grad.new_zeros(ctx.padded, *grad.shape[1:])
        return padded.index_copy_(0, places, grad[: len(places)]), None, None


def _gather(x: Tensor, places: Tensor, rows: int) -> Tensor:
    """The rows of ``x`` at these places, followed by zeros up to a number of ``rows``."""
    out = x.new_empty(rows, *x.shape[1:])
    torch.index_select(x, 0, places, out=out[: len(places)])
    out[len(places) :] = 0
    return out
