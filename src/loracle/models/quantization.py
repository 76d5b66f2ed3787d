"""A frozen base in 4-bit NormalFloat (QLoRA, Dettmers et al. 2023, arXiv:2305.14314), by bitsandbytes.

Every linear layer of the backbone is exchanged; embeddings, norms and the head stay as they are (unsloth#5027: a quantised
head does not train). Adapters on top are PEFT's own for such layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from loracle.errors import UserError
from loracle.models.loading import head_names

BITS = 4.13  # a weight, with its share of the scales, themselves quantised


def quantise(model: Any, device: torch.device) -> None:
    """Exchange the linear layers of a decoder for 4-bit ones, on ``device``, one after the other.

    Raises:
        UserError: bitsandbytes is not installed.
    """
    try:
        from bitsandbytes.nn import Linear4bit
    except ImportError as e:
        raise UserError(
            "the package bitsandbytes for --quantize nf4", "none installed", "run pip install 'loracle[nf4]'"
        ) from e

    def four_bit(layer: nn.Linear) -> nn.Module:
        small = Linear4bit(
            layer.in_features, layer.out_features, bias=layer.bias is not None, compute_dtype=layer.weight.dtype,
            quant_type="nf4",
        )  # fmt: skip
        # Rounded to bfloat16 first, as most are published: the 4 bits are then the same whatever the run computes in.
        small.load_state_dict({name: weight.bfloat16() for name, weight in layer.state_dict().items()})
        small.support_avx512bf16_for_cpu = False  # it would pack weights anew at the first look, for inference alone
        return small.requires_grad_(False).to(device)

    _exchange(model, nn.Linear, four_bit)
    model.is_loaded_in_4bit = True  # by this PEFT knows which of its layers to put around them


def dequantise(model: Any) -> None:
    """Put plain layers back, with the weights that 4 bits have left: what an adapter that was trained on them stands on."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    def plain(layer: Any) -> nn.Module:
        weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(layer.compute_dtype)
        whole = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, dtype=weight.dtype)
        whole.weight = nn.Parameter(weight, requires_grad=False)
        whole.bias = layer.bias
        return whole

    _exchange(model, Linear4bit, plain)
    model.is_loaded_in_4bit = False


def _exchange(model: Any, kind: type, make: Callable[[Any], nn.Module]) -> None:
    heads = head_names(model)
    for name, module in list(model.named_modules()):
        for child_name, child in list(module.named_children()):
            path = f"{name}.{child_name}".lstrip(".")
            if type(child) is kind and not path.startswith(heads):
                setattr(module, child_name, make(child))
