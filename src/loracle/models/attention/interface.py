"""Attention over a token tree, as a function that ``transformers`` calls in place of its own.

The models stay unforked. All of them hand their queries, keys and values to one function of a registry. It is the function
``ALL_ATTENTION_FUNCTIONS[config._attn_implementation]``, and gets every keyword of ``model.forward``. The scorer passes
``plan=AttentionPlan(...)``, which arrives here in every layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from loracle.errors import UserError
from loracle.models.attention import flash
from loracle.models.attention.blocks import AttentionSettings, block_attention
from loracle.models.attention.plan import AttentionPlan, Sequences
from loracle.text.packing import PackedBatch

NAME = "loracle_tree"


def plan_attention(batch: PackedBatch, device: torch.device) -> AttentionPlan:
    """The plan of a batch: for flash attention where the device has it, else for blocks."""
    return AttentionPlan(batch, device, Sequences.of(batch, device) if flash.has_flash(device) else None)


def tree_attention(
    module: torch.nn.Module,
    query: Tensor,  # [1, H, T, D]
    key: Tensor,  # [1, G, T, D]
    value: Tensor,  # [1, G, T, D]
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention of a packed batch, ``[1, T, H, D]``. The signature is that of transformers' attention interface.

    Of the ``options`` it reads ``plan``, ``scaling``, ``sliding_window`` and ``softcap``.

    Raises:
        UserError: the model caps its attention logits, as Gemma 2 does and no supported model. Ignoring the cap would give
            wrong scores.
    """
    if (cap := options.get("softcap")) is not None:
        raise UserError(
            f"The model caps its attention logits at {cap:g}, which is not supported.", "Use another --model."
        )
    plan: AttentionPlan = options["plan"]
    scale = options.get("scaling")
    settings = AttentionSettings(
        causal=getattr(module, "is_causal", True),
        window=options.get("sliding_window"),
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
        dropout=dropout,
    )
    if plan.sequences is not None and not dropout and flash.flash_supports(query.dtype, query.shape[-1]):
        return flash.flash_attention(query, key, value, plan.sequences, settings), None
    return block_attention(query, key, value, plan.blocks(), settings), None


# No mask function is registered with it. transformers then builds no mask, and does not ask the GPU whether texts are packed.
AttentionInterface.register(NAME, tree_attention)
