"""Attention over a packed token tree, as a function that ``transformers`` calls in place of its own.

The models stay theirs, unforked: Qwen2, Qwen3, Llama, Mistral, Gemma, BERT, RoBERTa all hand their queries, keys and values
to ``ALL_ATTENTION_FUNCTIONS[config._attn_implementation]`` together with any keyword given to ``model.forward``. We give them
``tree=AttentionPlan(...)`` and get it back in every layer.

A plan is made once a batch. It lays the segments out as a few blocks of similar length; in a block every segment is padded
to the longest one, which costs little because only attention sees it, and attention over short texts is about one per cent
of the arithmetic. What all segments of a block have above them (the instruction) is not copied: their queries meet its keys
in one matrix product, and one softmax runs over both parts, which is exact.

On CUDA, in 16 bits, each segment is a sequence of flash attention instead, whose keys are all above it and its own
(``Sequences``). In float32, and where that would copy too many keys, the relation is a mask of flex attention: who is above
whom, and where (``FlexPlan``).

Shapes: T tokens, P tokens with that padding, B segments of a block, L its longest segment, A tokens above all of the block,
K = context + own keys, H query heads, G key heads (R = H / G queries a key head), D head size.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface

from loracle.errors import UserError
from loracle.models.attention.kernels import applied, can_compile
from loracle.text.packing import ROOT, PackedBatch, ancestors, pack
from loracle.text.tokenize import Encoded

logger = logging.getLogger(__name__)

NAME = "loracle_tree"
KEYS_FROM = 16  # of a row of scores: torch's softmax takes 6 ns a number of a shorter one, and 0.5 of others
FUSED_FROM = 320  # tokens: longer blocks go to the fused kernel, which never holds the L × K scores
TILE = 128  # tokens: flex attention leaves out tiles of the mask in which nobody sees anybody
SMALLEST_HEAD = 16  # which its kernel can multiply
KEYS_A_TOKEN = 4  # that flash attention may be given: more would be copies of one long instruction
FLASH_ERROR = 0.02  # of its results in bfloat16, which rounds to 0.004; a key too many or too few is ten times that
GROWTH = 1.25  # of one padded length over the next shorter one, so that few are ever met, and compiled for
ROWS_BITS = 5  # of a batch's number of rows on a CPU; the other bits are zero
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
            query_rows=to_device(np.maximum(q_all, 0), device),
            query_back=to_device(_inverse(q_all, batch.tokens), device),
            key_rows=to_device(np.maximum(k_all, 0), device),
            key_back=to_device(_inverse(k_all, batch.tokens), device) if once else None,
        )


@dataclass(slots=True, kw_only=True)
class Sequences:
    """The same as sequences of flash attention, one a segment: its queries stand at the end of its keys."""

    query_ends: Tensor  # int32 [N + 1], where the queries of each segment begin, and the last ones end
    key_ends: Tensor  # int32 [N + 1], and its keys
    longest: tuple[int, int]  # queries, keys
    key_rows: Tensor | None  # int64, token row of each key, if they are not the tokens themselves

    @classmethod
    def of(cls, batch: PackedBatch, device: torch.device) -> Sequences | None:
        """Lay a batch out, or None where it would take more than ``KEYS_A_TOKEN``."""
        above = np.where(batch.parent == ROOT, 0, batch.position_ids[batch.start])
        keys = batch.length + above
        if keys.sum() > KEYS_A_TOKEN * batch.tokens:
            return None
        rows = [_rows(batch, [*ancestors(batch.parent, n), n]) for n in range(len(keys))] if above.any() else None
        ends = (np.concatenate(([0], np.cumsum(x))).astype(np.int32) for x in (batch.length, keys))
        query_ends, key_ends = (to_device(x, device) for x in ends)
        return cls(
            query_ends=query_ends,
            key_ends=key_ends,
            longest=(int(batch.length.max()), int(keys.max())),
            key_rows=None if rows is None else to_device(np.concatenate(rows), device),
        )


@dataclass(slots=True, kw_only=True)
class FlexPlan:
    """The same as a mask for flex attention.

    Segments are numbered as a walk through the tree enters them, children after their parent; then those below a segment
    are the ones entered after it and no later than its last one. Padding is a tree of its own.
    """

    batch: PackedBatch
    entered: Tensor  # int32 [P], when the walk enters the segment of each token
    last: Tensor  # int32 [P], and when the last one below that segment
    at: Tensor  # int32 [P], position of each token
    masks: dict[tuple, BlockMask] = field(default_factory=dict)
    blocks: AttentionPlan | None = None
    sequences: Sequences | None = None  # only where flash attention can be had

    @classmethod
    def of(cls, batch: PackedBatch, device: torch.device) -> FlexPlan:
        """Plan a batch."""
        entered, last = _walk(batch.parent)
        more = padded_length(batch.tokens) - batch.tokens
        alone = np.full(more, len(batch.start))
        rows = np.repeat(np.stack([entered, last]), batch.length, axis=1)
        columns = (
            np.concatenate([rows[0], alone]),
            np.concatenate([rows[1], alone]),
            np.concatenate([batch.position_ids, np.arange(more)]),
        )
        held = [to_device(c.astype(np.int32), device) for c in columns]
        sequences = Sequences.of(batch, device) if has_flash(device) else None
        return cls(batch=batch, entered=held[0], last=held[1], at=held[2], sequences=sequences)

    def sees(self, causal: bool, window: int | None) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """Whether the token in one row attends to that in another, as flex attention asks."""
        entered, last, at = self.entered, self.last, self.at

        def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            inside = (entered[k] <= entered[q]) & (entered[q] <= last[k])
            if causal:
                inside = inside & (at[k] <= at[q])
            return inside if window is None else inside & (at[q] - at[k] < window)

        return seen

    def mask(self, causal: bool, window: int | None) -> BlockMask:
        """``sees`` with the tiles in which there is something to see."""
        if (causal, window) not in self.masks:
            tiles, padded = _tiles(self.batch, len(self.at), causal), (len(self.at), len(self.at))
            order = np.argsort(~tiles, axis=1, kind="stable")  # those that count, and then the others
            counts, indices = (to_device(x.astype(np.int32), self.at.device)[None, None] for x in (tiles.sum(1), order))
            self.masks[causal, window] = BlockMask.from_kv_blocks(
                counts, indices, BLOCK_SIZE=TILE, mask_mod=self.sees(causal, window), seq_lengths=padded
            )
        return self.masks[causal, window]

    def as_blocks(self) -> AttentionPlan:
        """The plan for layers that flex attention cannot do."""
        self.blocks = self.blocks or AttentionPlan.of(self.batch, self.at.device)
        return self.blocks


def plan(batch: PackedBatch, device: torch.device) -> AttentionPlan | FlexPlan:
    """How attention over a batch is best done on a device."""
    return FlexPlan.of(batch, device) if device.type == "cuda" else AttentionPlan.of(batch, device)


def rows_for(tokens: int, device: torch.device) -> int:
    """How many rows a batch goes through the model as: on a CPU the next of few numbers, at most a sixteenth more.

    Its products get a kernel made for each number of rows they meet, which with AMX takes as long as a product or two.
    """
    step = 1 << max(0, tokens.bit_length() - ROWS_BITS)
    return tokens if device.type == "cuda" else -(-tokens // step) * step


def padded_length(tokens: int) -> int:
    """The next of few lengths, multiples of ``TILE``."""
    tiles = 1
    while tiles * TILE < tokens:
        tiles = max(tiles + 1, int(tiles * GROWTH))
    return tiles * TILE


def _walk(parent: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """When a walk that goes down before it goes on enters each of N segments, and the last one below each, ``[N]``."""
    size = np.ones(len(parent), dtype=np.int64)
    for n in range(len(parent) - 1, -1, -1):  # parents come before their children
        if parent[n] != ROOT:
            size[parent[n]] += size[n]
    entered, free = np.empty_like(size), size.copy()
    outside = 0
    for n, above in enumerate(parent.tolist()):
        if above == ROOT:
            entered[n], outside = outside, outside + size[n]
        else:  # the room below a segment is given to its children one after the other
            entered[n] = entered[above] + size[above] - free[above] + 1
            free[above] -= size[n]
    return entered, entered + size - 1


def _tiles(batch: PackedBatch, padded: int, causal: bool) -> np.ndarray:
    """In which tiles somebody may see somebody, ``bool [P / TILE, P / TILE]``."""
    seen = np.zeros((padded // TILE, padded // TILE), dtype=bool)
    first, last = batch.start // TILE, (batch.start + batch.length - 1) // TILE
    for n in range(len(first)):
        for a in (n, *ancestors(batch.parent, n)):
            seen[first[n] : last[n] + 1, first[a] : last[a] + 1] = True
    seen[batch.tokens // TILE :, batch.tokens // TILE :] |= padded > batch.tokens  # padding sees padding
    return np.tril(seen) if causal else seen


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
    more = max(0, KEYS_FROM - len(common) - max(map(len, above)) - length)
    k = np.concatenate([_rectangle(above, max(map(len, above))), q, np.full((len(q), more), -1)], axis=1)
    at = batch.position_ids
    block = Block(
        queries=slice(queries, queries + q.size),
        keys=slice(keys, keys + k.size),
        size=(*q.shape, k.shape[1]),
        common=to_device(common, device) if len(common) else None,
        query_at=to_device(np.where(q >= 0, at[q], -1), device),
        key_at=to_device(np.where(k >= 0, at[k], -1), device),
        common_at=to_device(at[common], device) if len(common) else None,
    )
    return block, q, k


def _rows(batch: PackedBatch, segments: list[int]) -> np.ndarray:
    """Token rows of some segments, one after the other."""
    spans = [np.arange(batch.start[n], batch.start[n] + batch.length[n]) for n in segments]
    return np.concatenate(spans) if spans else np.empty(0, dtype=np.int64)


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """An array as a tensor there; a GPU fetches it by itself, out of pinned memory, while the program goes on."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


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
        ctx.rows = x.shape[0]
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (back,) = ctx.saved_tensors
        return _taken(grad, back, ctx.rows), None, None


class _Unpad(torch.autograd.Function):
    """Padded rows to token rows; padding gets a gradient of zero."""

    @staticmethod
    def forward(ctx, x: Tensor, back: Tensor, rows: int) -> Tensor:
        ctx.save_for_backward(back)
        ctx.padded = x.shape[0]
        return _taken(x, back, rows)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (back,) = ctx.saved_tensors
        padded = grad.new_zeros(ctx.padded, *grad.shape[1:])
        return padded.index_copy_(0, back, grad[: len(back)]), None, None


def _taken(x: Tensor, at: Tensor, rows: int) -> Tensor:
    """The rows of ``x`` that stand ``at`` these places, and zeros behind them up to a number of ``rows``."""
    out = x.new_empty(rows, *x.shape[1:])
    torch.index_select(x, 0, at, out=out[: len(at)])
    out[len(at) :] = 0
    return out


def tree_attention(
    module: torch.nn.Module,
    query: Tensor,  # [1, H, T, D]
    key: Tensor,  # [1, G, T, D]
    value: Tensor,  # [1, G, T, D]
    attention_mask: Tensor | None,
    *,
    tree: AttentionPlan | FlexPlan | Sequences,
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
    if isinstance(tree, Sequences):
        return _flash(query, key, value, tree, causal, sliding_window, scaling), None
    if isinstance(tree, FlexPlan):
        if tree.sequences is not None and not dropout and flash_takes(query.dtype, query.shape[-1]):
            return _flash(query, key, value, tree.sequences, causal, sliding_window, scaling), None
        if not dropout and _flex_takes(query):
            return _flex(query, key, value, tree.mask(causal, sliding_window), scaling), None
        tree = tree.as_blocks()
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, heads, D]
    rows_q = applied(_Pad, q, tree.query_rows, tree.query_back)
    if tree.key_back is None:
        rows_k, rows_v = k.index_select(0, tree.key_rows), v.index_select(0, tree.key_rows)
    else:
        rows_k, rows_v = (applied(_Pad, x, tree.key_rows, tree.key_back) for x in (k, v))
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
    return applied(_Unpad, torch.cat(out), tree.query_back, query.shape[2])[None], None


# What torch.nn.attention.varlen calls, whose own arguments change with every release.
_flash_kernel = torch.ops.aten._flash_attention_forward


@functools.cache
def has_flash(device: torch.device) -> bool:
    """Whether torch's flash attention can be had and is right there: it was built, for an Ampere or a newer card."""
    if device.type != "cuda" or not torch.backends.cuda.is_flash_attention_available():
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0) and _flash_is_right(device)


@torch.inference_mode(False)
@torch.enable_grad()
def _flash_is_right(device: torch.device, window: int = 16) -> bool:
    """Whether its values and gradients are those of plain products, for texts behind a shared start.

    Asked once a process: the operation is not public, and one that saw other keys would give other scores without a word.
    """
    texts = [Encoded(chunks=((*range(40), 50 + i, *range(60, 60 + 9 * i)),), starts=(40,)) for i in range(4)]
    batch, module = pack(texts), SimpleNamespace(is_causal=True)
    sequences, blocks = Sequences.of(batch, device), AttentionPlan.of(batch, device)
    assert sequences is not None
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 4, batch.tokens, 64), *2 * ((1, 2, batch.tokens, 64),), (1, batch.tokens, 4, 64))
    *given, grad = (torch.randn(shape, generator=generator).to(device, torch.bfloat16) for shape in shapes)

    def results(attend: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        x = [t.to(dtype, copy=True).requires_grad_() for t in given]
        out = attend(*x)
        return [out.detach(), *torch.autograd.grad(out, x, grad.to(dtype))]

    def plain(near: int | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return tree_attention(module, q, k, v, None, tree=blocks, sliding_window=near)[0]  # type: ignore[arg-type]

    def flash(near: int | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _flash(q, k, v, sequences, True, near, 64**-0.5)

    errors: list[float] = []
    try:
        for near in (None, window):
            wanted = results(functools.partial(plain, near), torch.float32)
            found = results(functools.partial(flash, near), torch.bfloat16)
            errors += [((f - w).norm() / w.norm()).item() for f, w in zip(found, wanted, strict=True)]
    except torch.OutOfMemoryError:  # tells nothing of it
        raise
    except (RuntimeError, TypeError, AttributeError) as e:
        logger.warning("flash attention is left out on %s: %s", device, str(e).splitlines()[0])
        return False
    right = all(error < FLASH_ERROR for error in errors)  # a NaN is not
    if not right:
        logger.warning("flash attention is left out on %s: its errors are %s", device, [f"{e:.1e}" for e in errors])
    return right


def flash_takes(dtype: torch.dtype, head: int) -> bool:
    """Whether flash attention can be had for heads of that size."""
    return dtype.itemsize == 2 and head % 8 == 0 and head <= 256


def _flash(
    query: Tensor, key: Tensor, value: Tensor, given: Sequences, causal: bool, window: int | None, scaling: float
) -> Tensor:
    """Flash attention of ``query [1, H, T, D]``, ``key`` and ``value [1, G, T, D]``, ``[1, T, H, D]``."""
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if given.key_rows is not None:
        k, v = (applied(_Copied, x, given.key_rows) for x in (k, v))
    near = {} if window is None else {"window_size_left": window - 1, "window_size_right": 0 if causal else -1}
    out, *_ = _flash_kernel(
        q, k, v, given.query_ends, given.key_ends, *given.longest, 0.0, causal, False, scale=scaling, **near
    )
    return out[None]


class _Copied(torch.autograd.Function):
    """Rows ``[K, G, D]`` of ``x [T, G, D]``, some of them many times: their gradients are added in float32."""

    @staticmethod
    def forward(ctx, x: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.like = x.shape
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (rows,) = ctx.saved_tensors
        whole = grad.new_zeros(ctx.like, dtype=torch.float32)
        return whole.index_add_(0, rows, grad.float()).to(grad.dtype), None


def _flex_takes(query: Tensor) -> bool:
    return query.dtype != torch.float64 and query.shape[-1] >= SMALLEST_HEAD and (query.is_cpu or can_compile())


def _flex(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scaling: float) -> Tensor:
    """Flex attention of ``query [1, H, T, D]``, ``key`` and ``value [1, G, T, D]``, ``[1, T, H, D]``."""
    tokens, padded = query.shape[2], mask.seq_lengths[0]
    query, key, value = (F.pad(x, (0, 0, 0, padded - tokens)) for x in (query, key, value))
    grouped = query.shape[1] != key.shape[1]
    out = _kernel()(query, key, value, block_mask=mask, scale=scaling, enable_gqa=grouped)
    return out[:, :, :tokens].transpose(1, 2)


@functools.cache
def _kernel() -> Callable[..., Tensor]:
    """Flex attention, compiled on first use, for all lengths at once."""
    return torch.compile(flex_attention, dynamic=True)


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


# No mask function is registered with it: transformers then draws none, nor asks the GPU whether texts are packed.
AttentionInterface.register(NAME, tree_attention)
