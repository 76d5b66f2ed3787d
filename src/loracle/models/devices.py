"""The device and the dtype of a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loracle.errors import UserError

if TYPE_CHECKING:
    import torch


def pick_device(name: str) -> torch.device:
    """The device of a name. ``auto`` takes CUDA, else Apple's GPU (MPS), else the CPU.

    Raises:
        UserError: there is no such device here.
    """
    import torch

    has = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return torch.device(next(place for place in ("cuda", "mps", "cpu") if has[place]))
    place, _, number = name.partition(":")
    count = torch.cuda.device_count() if place == "cuda" else 1
    if not has.get(place) or (number and not (number.isdecimal() and int(number) < count)):
        here = ", ".join(place for place in has if has[place])
        raise UserError(f"There is no device {name!r} here (devices: {here}).", "Pass --device auto.")
    return torch.device(name)


def pick_dtype(name: str, full: bool, device: torch.device) -> torch.dtype:
    """The dtype of the base. ``auto`` is bfloat16 under adapters where the device multiplies it, else float32.

    A CPU without bfloat16 products (x86 before AVX-512 BF16) is seven times slower with it than with float32. There a run is
    scored in float32, even if it was trained in bfloat16.

    Raises:
        UserError: float16, whose largest number (65504) the activations of Qwen2 and others exceed: inf, then NaN
            (Qwen3#670, transformers#33317, trl#2367); or an unknown name.
    """
    import torch

    if name == "float16":
        raise UserError(
            "In float16 Qwen2 and other models overflow to inf and NaN.",
            "Pass --dtype bfloat16, which takes the same memory.",
        )
    dtypes = {"bfloat16": torch.bfloat16, "float32": torch.float32}
    if name == "auto":
        return torch.bfloat16 if not full and _multiplies_bfloat16(device) else torch.float32
    if name not in dtypes:
        raise UserError(f"Unknown dtype {name!r}.", "Pass --dtype auto, bfloat16 or float32.")
    return dtypes[name]


def _multiplies_bfloat16(device: torch.device) -> bool:
    import torch

    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type != "cpu" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
