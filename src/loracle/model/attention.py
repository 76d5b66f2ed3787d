"""Attention over a packed token tree, as a function that ``transformers`` calls in place of its own.

The models stay theirs, unforked: Qwen2, Qwen3, Llama, Mistral, Gemma, BERT, RoBERTa all hand their queries, keys and values
to ``ALL_ATTENTION_FUNCTIONS[config._attn_implementation]`` together with any keyword given to ``model.forward``. We give them
``tree=AttentionPlan(...)`` and get it back in every layer.

A plan is made once a batch. It lays the segments out as a few blocks of similar length; in a block every segment is padded
to the longest one, which costs little because only attention sees it, and attention over short texts is about one per cent
of the arithmetic. What all segments of a block have above them (the instruction) is not copied: their queries meet its keys
in one matrix product, and one softmax runs over both parts, which is exact.

Shapes: T tokens, B segments of a block, L its longest segment, A tokens above all of the block, K = context + own keys,
H query heads, G key heads (R = H / G queries a key head), D head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from loracle.errors import UserError
from loracle.text.packing import ROOT, PackedBatch, ancestors

NAME = "loracle_tree"
FUSED_FROM = 192  # tokens: longer blocks go to the fused kernel, which never holds the L × K scores
LENGTH_STEP = 1.6  # a block holds segments whose lengths differ by at most this factor


@dataclass(slots=True, kw_only=True)
class Block:
    """Some segments at one depth of the tree, padded to a rectangle."""

    queries: slice  # rows of the rearranged queries: B × L of them
    keys: slice  # rows of the rearranged keys: B × K of them
    size: tuple[int, int, int]  # B, L, K
    common: Tensor | None  # int64 [A], tokens above every segment of the block
    query_at: Tensor  # int64 [B, L], positions; padding holds -1
    key_at: Tensor  # int64 [B, K], positions; padding holds -1
    common_at: Tensor | None  # int64 [A], positions
    masks: dict[tuple, tuple[Tensor, Tensor | None]] = field(default_factory=dict)

    def mask(self, causal: bool, window: int | None) -> tuple[Tensor, Tensor | None]:
        """Who sees whom, ``bool [B, 1, 1, L, K]`` and, with a window, ``[B, 1, 1, L, A]`` for the common part."""
        if (causal, window) not in self.masks:
            q, k = self.query_at[:, :, None], self.key_at[:, None, :]
            seen = (k >= 0) & (q >= 0)
            if causal:
                seen = seen & (k <= q)
            shared = None
            if window is not None:
                seen = seen & (q - k < window)
                if self.common_at is not None:
                    shared = (q - self.common_at[None, None, :] < window)[:, None, None]
            # A padding query sees the first key, so that its softmax stays finite; nobody reads the result.
            seen[:, :, 0] |= self.query_at < 0
            self.masks[causal, window] = (seen[:, None, None], shared)
        return self.masks[causal, window]


@dataclass(slots=True, kw_only=True)
class AttentionPlan:
    """How the rows of a packed batch meet; made once a batch, used by every layer."""

    blocks: list[Block]
    query_rows: Tensor  # int64, token row of each padded query row
    query_back: Tensor  # int64 [T], where each token stands among the padded query rows
    key_rows: Tensor  # int64, token row of each padded key row
    key_back: Tensor | None  # int64 [T], the same for keys, if every token is key in one place only

    @classmethod
    def of(cls, batch: PackedBatch, device: torch.device) -> AttentionPlan:
        """Plan a batch."""
        query_rows: list[np.ndarray] = []
        key_rows: list[np.ndarray] = []
        blocks: list[Block] = []
        queries = keys = 0
        for members in _alike(batch):
            block, q, k = _block(batch, members, queries, keys, device)
            queries, keys = queries + q.size, keys + k.size
            blocks.append(block)
            query_rows.append(q.ravel())
            key_rows.append(k.ravel())
        q_all, k_all = np.concatenate(query_rows), np.concatenate(key_rows)
        once = np.count_nonzero(k_all >= 0) == batch.tokens
        return cls(
            blocks=blocks,
            query_rows=_to(np.maximum(q_all, 0), device),
            query_back=_to(_inverse(q_all, batch.tokens), device),
            key_rows=_to(np.maximum(k_all, 0), device),
            key_back=_to(_inverse(k_all, batch.tokens), device) if once else None,
        )


def _inverse(rows: np.ndarray, tokens: int) -> np.ndarray:
    back = np.empty(tokens, dtype=np.int64)
    real = rows >= 0
    back[rows[real]] = np.flatnonzero(real)
    return back


def _alike(batch: PackedBatch) -> Iterator[list[int]]:
    """Segments in groups of the same depth (root or not) and similar length, longest last."""
    inner = batch.parent != ROOT
    order = np.lexsort((batch.length, inner))
    group: list[int] = []
    for n in order.tolist():
        if group and (inner[n] != inner[group[0]] or batch.length[n] > max(16, LENGTH_STEP * batch.length[group[0]])):
            yield group
            group = []
        group.append(n)
    yield group


def _block(batch: PackedBatch, members: list[int], queries: int, keys: int, device):
    """One block and the token rows, -1 for padding, of its queries ``[B, L]`` and keys ``[B, K]``."""
    rows = [_rows(batch, [n]) for n in members]
    paths = [ancestors(batch.parent, n) for n in members]
    length = max(map(len, rows))
    shared = 0
    if length < FUSED_FROM:
        while all(len(p) > shared for p in paths) and len({p[shared] for p in paths}) == 1:
            shared += 1
    above = [_rows(batch, p[shared:]) for p in paths]
    common = _rows(batch, paths[0][:shared])
    q = _rectangle(rows, length)
    k = np.concatenate([_rectangle(above, max(map(len, above))), q], axis=1)
    at = batch.position_ids
    block = Block(
        queries=slice(queries, queries + q.size),
        keys=slice(keys, keys + k.size),
        size=(*q.shape, k.shape[1]),
        common=_to(common, device) if len(common) else None,
        query_at=_to(np.where(q >= 0, at[q], -1), device),
        key_at=_to(np.where(k >= 0, at[k], -1), device),
        common_at=_to(at[common], device) if len(common) else None,
    )
    return block, q, k


def _rows(batch: PackedBatch, segments: list[int]) -> np.ndarray:
    """Token rows of some segments, one after the other."""
    spans = [np.arange(batch.start[n], batch.start[n] + batch.length[n]) for n in segments]
    return np.concatenate(spans) if spans else np.empty(0, dtype=np.int64)


def _to(array: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device, non_blocking=True)


def _rectangle(rows: list[np.ndarray], width: int) -> np.ndarray:
    out = np.full((len(rows), width), -1, dtype=np.int64)
    for line, r in zip(out, rows, strict=True):
        line[: len(r)] = r
    return out


class _Pad(torch.autograd.Function):
    """Token rows to padded rows, each token in one place: the backward is then a gather too, not a slow scatter-add.

    Padding repeats token 0; nothing reads it, so no gradient comes back from there.
    """

    @staticmethod
    def forward(ctx, x: Tensor, rows: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (back,) = ctx.saved_tensors
        return grad.index_select(0, back), None, None


class _Unpad(torch.autograd.Function):
    """Padded rows to token rows; padding gets a gradient of zero."""

    @staticmethod
    def forward(ctx, x: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        ctx.padded = x.shape[0]
        return x.index_select(0, back)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (back,) = ctx.saved_tensors
        return grad.new_zeros(ctx.padded, *grad.shape[1:]).index_copy_(0, back, grad), None


def tree_attention(
    module: torch.nn.Module,
    query: Tensor,  # [1, H, T, D]
    key: Tensor,  # [1, G, T, D]
    value: Tensor,  # [1, G, T, D]
    attention_mask: Tensor | None,
    *,
    tree: AttentionPlan,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_,
) -> tuple[Tensor, None]:
    """Attention of a packed batch, ``[1, T, H, D]``; the signature is transformers' attention interface.

    Raises:
        UserError: the model caps its attention logits, as Gemma 2 does and no supported model. Without this word the cap
            would end in ``**_`` and the scores would be wrong in silence.
    """
    if softcap is not None:
        raise UserError(
            "a model that does not cap its attention logits", f"a soft cap of {softcap:g}", "use another --model"
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    causal = getattr(module, "is_causal", True)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, heads, D]
    rows_q = _Pad.apply(q, tree.query_rows, tree.query_back)
    if tree.key_back is None:
        rows_k, rows_v = k.index_select(0, tree.key_rows), v.index_select(0, tree.key_rows)
    else:
        rows_k, rows_v = (_Pad.apply(x, tree.key_rows, tree.key_back) for x in (k, v))
    out = []
    for block in tree.blocks:
        B, L, K = block.size
        bq = rows_q[block.queries].view(B, L, *q.shape[1:])
        bk, bv = (x[block.keys].view(B, K, *k.shape[1:]) for x in (rows_k, rows_v))
        mask, shared_mask = block.mask(causal, sliding_window)
        if L >= FUSED_FROM:
            o = F.scaled_dot_product_attention(
                bq.transpose(1, 2),
                bk.transpose(1, 2),
                bv.transpose(1, 2),
                attn_mask=mask[:, 0],
                dropout_p=dropout,
                scale=scaling,
                enable_gqa=q.shape[1] != k.shape[1],
            ).transpose(1, 2)
        else:
            common = None if block.common is None else (k[block.common], v[block.common])
            o = _products(bq, bk, bv, common, mask, shared_mask, scaling, dropout)
        out.append(o.reshape(B * L, *q.shape[1:]))
    return _Unpad.apply(torch.cat(out), tree.query_back)[None], None


def _products(q, k, v, common, mask, shared_mask, scaling: float, dropout: float) -> Tensor:
    """Softmax attention of a block by plain batched products, ``[B, L, H, D]``."""
    B, L, H, D = q.shape
    K, G = k.shape[1:3]
    R = H // G
    q = (q * scaling).view(B, L, G, R, D).permute(0, 2, 3, 1, 4).reshape(B * G, R * L, D)
    k = k.permute(0, 2, 3, 1).reshape(B * G, D, K)
    v = v.permute(0, 2, 1, 3).reshape(B * G, K, D)
    scores = torch.bmm(q, k).view(B, G, R, L, K).masked_fill(~mask, float("-inf"))
    if common is not None:
        ck, cv = (x.transpose(0, 1) for x in common)  # [G, A, D]
        A = ck.shape[1]
        across = q.view(B, G, R * L, D).transpose(0, 1).reshape(G, B * R * L, D)
        above = torch.bmm(across, ck.transpose(1, 2)).view(G, B, R, L, A).transpose(0, 1)
        if shared_mask is not None:
            above = above.masked_fill(~shared_mask, float("-inf"))
        scores = torch.cat((above, scores), dim=-1)
    wide = scores.dtype if scores.dtype in (torch.float32, torch.float64) else torch.float32
    weights = torch.softmax(scores, dim=-1, dtype=wide).to(v.dtype)
    if dropout:
        weights = F.dropout(weights, dropout)
    out = torch.bmm(weights[..., -K:].reshape(B * G, R * L, K), v).view(B, G, R, L, D)
    if common is not None:
        across = weights[..., :A].transpose(0, 1).reshape(G, B * R * L, A)
        out = out + torch.bmm(across, cv).view(G, B, R, L, D).transpose(0, 1)
    return out.permute(0, 3, 1, 2, 4).reshape(B, L, H, D)


def _no_mask(*_, **__) -> None:
    """The plan says who sees whom; transformers need not draw a mask."""
    return None


AttentionInterface.register(NAME, tree_attention)
AttentionMaskInterface.register(NAME, _no_mask)
