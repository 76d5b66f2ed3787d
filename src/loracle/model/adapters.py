"""LoRA in, out and merged: the only importer of PEFT, whose own format is what a run folder holds.

The head is PEFT's ``modules_to_save``: saved with the adapter, never a target of it, always trained (peft#310, trl#1379).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn

from loracle.errors import UserError
from loracle.model.backbone import head_names


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
    """Wrap a sequence classifier with LoRA on its backbone's linear layers; the adapters are float32 (PEFT sees to it).

    Args:
        targets: ``all-linear``, or names of linear layers joined by commas. adapt_top: how many of the top layers get
            adapters, None for all; autograd then stops below them.

    Raises:
        UserError: a target that no layer bears.
    """
    config = LoraConfig(
        task_type="SEQ_CLS",
        r=r,
        lora_alpha=alpha,  # type: ignore[arg-type]  # a fraction is as good, whatever PEFT's annotation says
        lora_dropout=dropout,
        target_modules=_target_pattern(model, targets, adapt_top),
        modules_to_save=list(head_names(model)),
        use_rslora=rslora,
    )
    config._register_custom_module({nn.Linear: LeanLinear})
    return get_peft_model(model, config)


def load_adapter(model: nn.Module, folder: Path, *, trainable: bool = False) -> nn.Module:
    """Put a saved adapter and head on a base model.

    Raises:
        UserError: the adapter does not fit the base model.
    """
    try:
        config = LoraConfig.from_pretrained(str(folder))
        config._register_custom_module({nn.Linear: LeanLinear})
        return PeftModel.from_pretrained(model, str(folder), config=config, is_trainable=trainable)
    except (RuntimeError, ValueError) as e:
        raise UserError(
            "an adapter made for this base model",
            f"{folder}: {str(e).splitlines()[0]}",
            "name the base it was trained on",
        ) from e


def save_adapter(model: Any, folder: Path, *, base: str, revision: str | None) -> None:
    """Write adapter and head in PEFT's format, naming the base model by where it can be had again."""
    config = model.peft_config["default"]
    config.base_model_name_or_path, config.revision, config.inference_mode = base, revision, True
    model.save_pretrained(str(folder), save_embedding_layers=False)  # "auto" would ask the hub about the vocabulary


class LeanLinear(PeftLinear):
    """PEFT's LoRA linear layer, computed without widening the activations to the adapters' float32.

    PEFT casts ``x [T, in]`` to float32, multiplies, adds and casts back; here the small matrices are cast instead, and the
    adapter's product is added in place by the matrix product itself. Parameters, names and merging are PEFT's.
    """

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        name = str(self.active_adapters[0]) if len(self.active_adapters) == 1 else ""
        if self.disable_adapters or self.merged or name not in self.lora_A or name in self.lora_variant:
            return super().forward(x, *args, **kwargs)
        base, p = self.get_base_layer(), getattr(self.lora_dropout[name], "p", 0.0)
        keep = _dropout_mask(x, p) if self.training and p else None
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        return _LoraProduct.apply(x, base.weight, base.bias, a, b, self.scaling[name], keep)


def _dropout_mask(x: Tensor, p: float) -> Tensor:
    """What dropout multiplies ``x`` by: 0 with probability p, else 1 / (1 - p).

    On a CPU a Bernoulli draw for each number costs as much as the layer's matrix product. A random byte for each is six
    times cheaper; p is then a multiple of 1/256 (0.05 becomes 0.0508), and the scale is that p's own.
    """
    if x.device.type != "cpu":
        return torch.empty_like(x).bernoulli_(1 - p).div_(1 - p)
    dropped = min(255, max(1, round(p * 256)))
    words = torch.empty((x.numel() + 7) // 8, dtype=torch.int64).random_(-(2**63), None)
    keep = words.view(torch.uint8)[: x.numel()].view(x.shape) >= dropped
    return keep.to(x.dtype).mul_(256 / (256 - dropped))


class _LoraProduct(torch.autograd.Function):
    """``x Wᵀ + bias + s (x ⊙ keep) Aᵀ Bᵀ`` with gradients for x, A and B; W and the bias are frozen.

    x ``[..., in]``, W ``[out, in]``, A ``[r, in]``, B ``[out, r]``.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, a, b, scaling: float, keep):
        a, b = a.to(x.dtype), (b * scaling).to(x.dtype)
        flat = x.reshape(-1, x.shape[-1])
        inside = (flat if keep is None else flat * keep.view_as(flat)) @ a.t()  # [T, r]
        out = F.linear(flat, weight, bias).addmm_(inside, b.t())
        ctx.save_for_backward(x, weight, a, b, inside, keep)
        ctx.scaling = scaling
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad):
        x, weight, a, b, inside, keep = ctx.saved_tensors
        flat, g = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        g_inside = g @ b  # [T, r]
        g_x = None
        if ctx.needs_input_grad[0]:
            g_x = g @ weight
            g_x = g_x.addmm_(g_inside, a) if keep is None else g_x.addcmul_(g_inside @ a, keep.view_as(flat))
            g_x = g_x.view_as(x)
        seen = flat if keep is None else flat * keep.view_as(flat)
        g_a = (g_inside.t() @ seen).to(torch.promote_types(x.dtype, torch.float32))
        g_b = (g.t() @ inside).to(g_a.dtype) * ctx.scaling
        return g_x, None, None, g_a, g_b, None, None


def _target_pattern(model: Any, targets: str, adapt_top: int | None = None) -> str:
    """A regular expression over module names (PEFT's ``layers_to_transform`` fails on bare roots, a pattern works)."""
    inside = re.compile(r"(?:.*\.)?(?:layers?|h|block)\.\d+\..*?([^.]+)")
    found = {m[1] for n, mod in model.named_modules() if isinstance(mod, nn.Linear) and (m := inside.fullmatch(n))}
    wanted = found if targets == "all-linear" else {t.strip() for t in targets.split(",") if t.strip()}
    if not wanted or wanted - found:
        raise UserError(
            "names of linear layers to adapt",
            ", ".join(sorted(wanted - found)) or "none",
            f"pick from {', '.join(sorted(found))} for --targets",
        )
    number = r"\d+"
    if adapt_top is not None:
        layers = model.config.num_hidden_layers
        number = f"(?:{'|'.join(map(str, range(max(0, layers - adapt_top), layers)))})"
    return rf".*\.(?:layers?|h|block)\.{number}\.(?:.*\.)?(?:{'|'.join(sorted(map(re.escape, wanted)))})"
