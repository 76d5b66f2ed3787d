"""A frozen base in 4-bit NormalFloat (QLoRA, Dettmers et al. 2023, arXiv:2305.14314), by bitsandbytes.

It replaces every linear layer of the backbone. Embeddings, norms and the head stay (unsloth#5027: a quantised head does not
train). Adapters on such layers are PEFT's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from loracle.errors import UserError
from loracle.models.loading import head_names

BITS = 4.13  # a weight, with its share of the quantised scales


def quantise(model: Any, device: torch.device) -> None:
    """Replace the linear layers of a decoder by 4-bit ones on ``device``, one after the other.

    Raises:
        UserError: bitsandbytes is not installed.
    """
    try:
        from bitsandbytes.nn import Linear4bit
    except ImportError as e:
        raise UserError(
            "--quantize nf4 needs the package bitsandbytes, which is not installed.", "Run pip install 'loracle[nf4]'."
        ) from e

    def four_bit(layer: nn.Linear) -> nn.Module:
        small = Linear4bit(
            layer.in_features, layer.out_features, bias=layer.bias is not None, compute_dtype=layer.weight.dtype,
            quant_type="nf4",
        )  # fmt: skip
        # Round to bfloat16 first, as most weights are published. So the 4 bits do not depend on the dtype of the run.
        small.load_state_dict({name: weight.bfloat16() for name, weight in layer.state_dict().items()})
        small.support_avx512bf16_for_cpu = False  # it would repack the weights on first use, for inference only
        return small.requires_grad_(False).to(device)

    _replace(model, nn.Linear, four_bit)
    model.is_loaded_in_4bit = True  # PEFT chooses its layers by this


def dequantise(model: Any) -> None:
    """Put plain layers back with the dequantised weights, on which the adapter was trained."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    def plain(layer: Any) -> nn.Module:
        weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(layer.compute_dtype)
        whole = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, dtype=weight.dtype)
        whole.weight = nn.Parameter(weight, requires_grad=False)
        whole.bias = layer.bias
        return whole

    _replace(model, Linear4bit, plain)
    model.is_loaded_in_4bit = False


def _replace(model: Any, layer_type: type, make: Callable[[Any], nn.Module]) -> None:
    heads = head_names(model)
    for name, module in list(model.named_modules()):
        for child_name, child in list(module.named_children()):
            path = f"{name}.{child_name}".lstrip(".")
            if type(child) is layer_type and not path.startswith(heads):
                setattr(module, child_name, make(child))
