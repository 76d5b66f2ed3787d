"""LoRA adapters: add, save, load and merge. Only this module imports PEFT; a run folder has PEFT's own format.

The head is in PEFT's ``modules_to_save``: saved with the adapter, never a target, always trained (peft#310, trl#1379).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn

from loracle.errors import UserError
from loracle.models.architectures import architecture_of
from loracle.models.loading import head_names


def add_lora(
    model: Any,
    *,
    r: int,
    alpha: float,
    dropout: float,
    targets: str = "all-linear",
    rslora: bool = False,
    adapt_top: int | None = None,
) -> nn.Module:
    """Wrap a sequence classifier with LoRA on its backbone's linear layers. PEFT makes the adapters float32.

    Args:
        targets: ``all-linear``, or names of linear layers joined by commas.
        adapt_top: the number of top layers with adapters; None for all. Autograd stops below them.

    Raises:
        UserError: no layer has the name of a target.
    """
    config = LoraConfig(
        task_type="SEQ_CLS",
        r=r,
        lora_alpha=alpha,  # type: ignore[arg-type]  # PEFT takes fractions too
        lora_dropout=dropout,
        target_modules=_target_pattern(model, targets, adapt_top),
        modules_to_save=list(head_names(model)),
        use_rslora=rslora,
    )
    return _group_layers(get_peft_model(model, _with_lean_layers(config, model)))


def load_adapter(model: nn.Module, folder: Path, *, trainable: bool = False) -> nn.Module:
    """Put a saved adapter and head on a base model.

    Raises:
        UserError: the adapter is missing, or does not fit the base model.
    """
    # Without these PEFT would look for a pickle, and then for a repository with the folder's name.
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise UserError(f"There is no {name} in {folder}.", "Restore it, or train again.")
    try:
        config = _with_lean_layers(LoraConfig.from_pretrained(str(folder)), model)
        return _group_layers(PeftModel.from_pretrained(model, str(folder), config=config, is_trainable=trainable))
    except (RuntimeError, ValueError) as e:
        reason = str(e).splitlines()[0]
        raise UserError(
            f"The adapter in {folder} does not fit this base model: {reason}.", "Name the base that it was trained on."
        ) from e


def _with_lean_layers(config: Any, model: Any) -> Any:
    """Use our layers in place of PEFT's, except for 4-bit weights, which only PEFT's own layers can read."""
    if not getattr(model, "is_loaded_in_4bit", False):
        config._register_custom_module({nn.Linear: LeanLinear})
    return config


def save_adapter(model: Any, folder: Path, *, base: str, revision: str | None) -> None:
    """Write adapter and head in PEFT's format. ``base`` is the hub id or the folder of the base model."""
    config = model.peft_config["default"]
    config.base_model_name_or_path, config.revision, config.inference_mode = base, revision, True
    model.save_pretrained(str(folder), save_embedding_layers=False)  # "auto" would ask the hub about the vocabulary


def merge(model: Any) -> Any:
    """The plain transformers model: adapters added to its weights, and the trained head in place."""
    return model.merge_and_unload() if isinstance(model, PeftModel) else model


class LeanLinear(PeftLinear):
    """PEFT's LoRA linear layer without casting the activations to float32. Parameters, names and merging are PEFT's.

    PEFT casts ``x [T, in]`` to float32, multiplies, adds and casts back. Here the small matrices are cast instead, and the
    matrix products accumulate into one result. Layers with the same input x, as q, k and v, are computed at once: one product
    with A, the same dropout of x, and one sum of their gradients for x.
    """

    group: _LayerGroup

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.cached_up = _CachedWeights()

    def train(self, mode: bool = True):
        """As any module. Cached adapter weights are dropped, because the weights may have changed."""
        self.cached_up = _CachedWeights()
        if hasattr(self, "group"):
            self.group.cached_down = _CachedWeights()
        return super().train(mode)

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        return super().forward(x, *args, **kwargs) if self.adapter is None else self.group.output(self, x)

    @property
    def adapter(self) -> str | None:
        """The name of the adapter; None unless there is one plain adapter, enabled and not merged."""
        name = str(self.active_adapters[0]) if len(self.active_adapters) == 1 else ""
        plain = name in self.lora_A and name not in self.lora_variant
        return name if plain and not self.disable_adapters and not self.merged else None


class _CachedWeights:
    """``_joined`` weights, kept until one changes. So scoring does not cast and join adapters at every forward."""

    def __init__(self) -> None:
        self.key: tuple = ()
        self.joined: Tensor | None = None

    def of(self, weights: Sequence[Any], scale: float, dtype: torch.dtype) -> Tensor:
        """The joined weights. They are made again if a weight was replaced or written to."""
        if any(w.is_inference() for w in weights):  # such weights do not count their versions
            return _joined(weights, scale, dtype)
        key = (scale, dtype, *((id(w), w.data_ptr(), w._version) for w in weights))
        if self.joined is None or self.key != key:
            self.key, self.joined = key, _joined(weights, scale, dtype)
        return self.joined


def _joined(weights: Sequence[Tensor], scale: float, dtype: torch.dtype) -> Tensor:
    """Several A ``[r, in]``, or one B ``[out, r]``, as one matrix in ``dtype``."""
    whole = weights[0] if len(weights) == 1 else torch.cat([*weights])
    return (whole * scale).to(dtype)


class _LayerGroup:
    """The adapted layers of one module with the same input, and their outputs until each layer has taken its own."""

    def __init__(self, layers: list[LeanLinear]):
        self.layers = layers
        self.cached_down = _CachedWeights()
        self.forget()

    def forget(self) -> None:
        """Drop the outputs of a failed forward, which would keep its whole graph in memory."""
        self.x: Tensor | None = None
        self.outputs: dict[LeanLinear, Tensor] = {}

    def output(self, layer: LeanLinear, x: Tensor) -> Tensor:
        """The output of one layer for ``x [..., in]``."""
        if self.x is not x or layer not in self.outputs:
            adapters = {other: name for other in self.layers if (name := other.adapter)}
            p = getattr(layer.lora_dropout[adapters[layer]], "p", 0.0) if layer.training else 0.0
            self.x, self.outputs = x, dict(zip(adapters, self._outputs(x, p, adapters), strict=True))
        out = self.outputs.pop(layer)
        if not self.outputs:
            self.x = None
        return out

    def _outputs(self, x: Tensor, p: float, layers: dict[LeanLinear, str]) -> Sequence[Tensor]:
        bases: list[Any] = [layer.get_base_layer() for layer in layers]
        a, b = ([getattr(layer, part)[name].weight for layer, name in layers.items()] for part in ("lora_A", "lora_B"))
        scales = [layer.scaling[name] for layer, name in layers.items()]
        if torch.is_grad_enabled() or p:
            each = zip((base.weight for base in bases), (base.bias for base in bases), a, b, strict=True)
            return _LoraProducts.apply(x, p, scales, *itertools.chain.from_iterable(each))
        down = self.cached_down.of(a, 1.0, x.dtype)
        up = [layer.cached_up.of([one], s, x.dtype) for layer, one, s in zip(layers, b, scales, strict=True)]
        flat = x.reshape(-1, x.shape[-1])
        inside = (flat @ down.t()).split([len(one) for one in a], dim=1)
        return [
            _product(flat, base.weight, base.bias, *parts).view(*x.shape[:-1], -1)
            for base, *parts in zip(bases, inside, up, strict=True)
        ]


def _group_layers(model: Any) -> nn.Module:
    """Put the adapted layers of each module that have the same input into one group."""
    same_input = architecture_of(model.get_base_model().config).same_input
    for module in model.modules():
        lean = {name: child for name, child in module.named_children() if isinstance(child, LeanLinear)}
        while lean:
            first = next(iter(lean))
            names = next((names for names in same_input if first in names), (first,))
            group = _LayerGroup([lean.pop(name) for name in names if name in lean])
            for layer in group.layers:
                layer.group = group
    return model


def forget(model: nn.Module) -> None:
    """Drop what a failed forward has left in adapted layers."""
    for layer in model.modules():
        if isinstance(layer, LeanLinear):
            layer.group.forget()


def _dropout(x: Tensor, p: float) -> tuple[Tensor, float]:
    """A mask of ones and zeros for ``x``, and the scale of the numbers that are kept.

    On a CPU a Bernoulli draw for each number costs as much as the layer's matrix product. Sixteen random bits for each cost a
    tenth. Then p is a multiple of 2⁻¹⁶, and the scale follows from that p.
    """
    if x.device.type != "cpu":
        return torch.empty_like(x).bernoulli_(1 - p), 1 / (1 - p)
    dropped = min(2**16 - 1, max(1, round(p * 2**16)))
    seed = int(torch.empty((), dtype=torch.int64).random_())  # torch's generator is three times slower
    words = np.random.Generator(np.random.SFC64(seed)).integers(2**64, size=(x.numel() + 3) // 4, dtype=np.uint64)
    bits = torch.from_numpy(words.view(np.int16)[: x.numel()])
    last = dropped - 1 - 2**15  # the largest value that is dropped
    bits.clamp_(last, last + 1).sub_(last).mul_(0x3F80)  # the bits of 0.0 and of 1.0
    return bits.view(torch.bfloat16).view(x.shape).to(x.dtype), 2**16 / (2**16 - dropped)


class _LoraProducts(torch.autograd.Function):
    """``x Wᵀ + bias + s (x ⊙ keep) Aᵀ Bᵀ / (1 - p)`` of several layers, with gradients for x and each A and B.

    W and the bias are frozen. Inputs: x ``[..., in]``. Then of each layer: W ``[out, in]``, bias ``[out]`` or None,
    A ``[r, in]``, B ``[out, r]``. Sizes out and r differ between layers. Output: ``[..., out]`` for each layer.
    """

    @staticmethod
    def forward(ctx, x: Tensor, p: float, scales: list[float], *each: Any):
        weights, biases, a, b = (each[part::4] for part in range(4))
        flat = x.reshape(-1, x.shape[-1])
        keep, ctx.rest = _dropout(flat, p) if p else (None, 1.0)
        dropped = flat if keep is None else flat * keep
        down = _joined(a, ctx.rest, x.dtype)
        up = [_joined([one], scale, x.dtype) for one, scale in zip(b, scales, strict=True)]
        ctx.ranks = [len(one) for one in a]
        inside = dropped @ down.t()
        ctx.save_for_backward(dropped, keep, down, inside, *weights, *up)
        ctx.shape, ctx.dtype, ctx.scales = x.shape, a[0].dtype, scales
        parts = zip(weights, biases, inside.split(ctx.ranks, dim=1), up, strict=True)
        return tuple(_product(flat, *part).view(*x.shape[:-1], -1) for part in parts)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        dropped, keep, down, inside, *saved = ctx.saved_tensors
        n = len(grads)
        weights, up = saved[:n], saved[n:]
        flat = [g.reshape(-1, g.shape[-1]) for g in grads]
        within = torch.cat([g @ u for g, u in zip(flat, up, strict=True)], dim=1)  # gradient of inside
        g_x = None
        if ctx.needs_input_grad[0]:
            g_x = within @ down
            g_x = g_x if keep is None else g_x.mul_(keep)
            for g, weight in zip(flat, weights, strict=True):
                g_x.addmm_(g, weight)
            g_x = g_x.view(ctx.shape)
        g_a = (within.t() @ dropped).to(ctx.dtype).mul_(ctx.rest).split(ctx.ranks)
        g_b = [
            (i.t() @ g).t().to(ctx.dtype, memory_format=torch.contiguous_format).mul_(scale)
            for i, g, scale in zip(inside.split(ctx.ranks, dim=1), flat, ctx.scales, strict=True)
        ]
        each = itertools.chain.from_iterable((None, None, *one) for one in zip(g_a, g_b, strict=True))
        return g_x, None, None, *each


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, inside: Tensor, up: Tensor) -> Tensor:
    """``x Wᵀ + bias + inside upᵀ``, ``[T, out]``; x ``[T, in]``, up ``[out, r]``. The large product adds to the small one."""
    small = inside @ up.t() if bias is None else torch.addmm(bias, inside, up.t())
    return small.addmm_(x, weight.t())


def _target_pattern(model: Any, targets: str, adapt_top: int | None = None) -> str:
    """A regular expression over module names. PEFT's ``layers_to_transform`` fails on models without a prefix."""
    layer_list = architecture_of(model.config).layer_list
    inside = re.compile(rf"(?:.*\.)?(?:{layer_list})\.\d+\..*?([^.]+)")
    linear = {m[1] for n, mod in model.named_modules() if isinstance(mod, nn.Linear) and (m := inside.fullmatch(n))}
    wanted = linear if targets == "all-linear" else {t.strip() for t in targets.split(",") if t.strip()}
    if not wanted or wanted - linear:
        unknown = ", ".join(sorted(wanted - linear)) or "an empty list"
        raise UserError(
            f"--targets names no linear layers of this model: {unknown}.", f"Pick from {', '.join(sorted(linear))}."
        )
    number = r"\d+"
    if adapt_top is not None:
        layers = model.config.num_hidden_layers
        number = f"(?:{'|'.join(map(str, range(max(0, layers - adapt_top), layers)))})"
    return rf".*\.(?:{layer_list})\.{number}\.(?:.*\.)?(?:{'|'.join(sorted(map(re.escape, wanted)))})"
