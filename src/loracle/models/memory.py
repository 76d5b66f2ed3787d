"""Memory and time that a training needs, estimated before it starts; and how to recognise that memory ran out."""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from loracle.models.architectures import architecture_of, is_packable_decoder
from loracle.models.loading import load_config
from loracle.models.lora import forget
from loracle.models.quantization import BITS


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """Bytes beside the loaded weights, and floating-point operations."""

    fixed: int  # gradients of the trained weights and AdamW's two moments
    per_token: int  # activations kept for the backward, a token of a micro-batch
    flops_per_token: float  # forward and backward of a token
    forward_flops: float  # forward of a token
    lower_flops: float  # the part of forward_flops below the lowest adapter

    def bytes(self, tokens: int) -> int:
        """Bytes for micro-batches of that many tokens."""
        return self.fixed + self.per_token * tokens

    def tokens(self, free: int) -> int:
        """Tokens of the largest micro-batch that fits."""
        return max(0, (free - self.fixed) // self.per_token)


def training_need(scorer: Any, adapt_top: int | None = None) -> Need:
    """The need of training ``scorer``, from the shapes of its matrices, so for any architecture.

    Operations a weight: 2 forward, 2 for the gradient of the input, and 2 more where the weight is trained. The backward keeps
    the inputs and outputs of each product, plus a fifth for norms and attention. It stops below the lowest adapter.
    """
    trained = [p for p in scorer.parameters() if p.requires_grad]
    ids = {id(p) for p in trained}
    matrices = _matrices(scorer)
    layers = scorer.inner.config.num_hidden_layers
    share = min(layers, adapt_top or layers) / layers
    everything = sum(math.prod(_shape(p)) for p in matrices.values())
    kept = sum(sum(_shape(p)) for name, p in matrices.items() if "lora_" not in name)
    return Need(
        fixed=sum(3 * p.numel() * p.element_size() for p in trained),
        per_token=int(1.2 * kept * share * next(scorer.inner.base_model.parameters()).element_size()),
        forward_flops=2 * everything,
        lower_flops=2 * everything * (1 - share),
        flops_per_token=2 * everything * (1 + share) + 2 * sum(p.numel() for p in matrices.values() if id(p) in ids),
    )


def _matrices(scorer: Any) -> dict[str, torch.Tensor]:
    """The matrices of the backbone, without the embeddings, which are only looked up."""
    base = scorer.inner.base_model
    embeddings = {id(m.weight) for m in base.modules() if isinstance(m, torch.nn.Embedding)}
    return {name: p for name, p in base.named_parameters() if p.dim() == 2 and id(p) not in embeddings}


def _shape(matrix: torch.Tensor) -> tuple[int, int]:
    """The shape of a matrix; of a 4-bit weight the shape before quantisation."""
    rows, columns = getattr(matrix, "quant_state", matrix).shape
    return rows, columns


def weight_bytes(folder: Path, dtype: torch.dtype, *, four_bit: bool = False) -> int:
    """Bytes of a model folder's weights in memory as ``dtype``; ``four_bit``: with those of the layers in 4 bits."""
    total, config = 0.0, load_config(folder)
    quantised = f".{architecture_of(config).layers}." if four_bit and is_packable_decoder(config) else None
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118  (safetensors' handle is no mapping)
                shape = weights.get_slice(name).get_shape()
                small = quantised is not None and len(shape) == 2 and quantised in f".{name}"
                total += math.prod(shape) * (BITS / 8 if small else dtype.itemsize)
    return int(total)


def free_memory(device: torch.device) -> int:
    """Free bytes on a device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    import psutil

    return min(psutil.virtual_memory().available, left_in_container())


def left_in_container(root: Path = Path("/sys/fs/cgroup"), groups: Path = Path("/proc/self/cgroup")) -> int:
    """Bytes until the memory limit of this process's control group, at which the kernel kills it. File caches count as free.

    Without a limit it is larger than any memory.
    """
    smallest = 1 << 62
    with contextlib.suppress(OSError):
        for line in groups.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            folder, names = (root, ("memory.max", "memory.current", "inactive_file"))  # version 2
            if controllers:
                if "memory" not in controllers.split(","):
                    continue
                folder = root / "memory"
                names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            for place in {folder, folder / path.lstrip("/")}:  # in a namespace of its own, the first is the right one
                with contextlib.suppress(OSError, ValueError, KeyError):
                    limit, used = (int((place / name).read_text()) for name in names[:2])
                    stat = dict(row.split() for row in (place / "memory.stat").read_text().splitlines())
                    smallest = min(smallest, max(0, limit - used + int(stat[names[2]])))
    return smallest


def training_rate(scorer: Any, batch: Any) -> float:
    """Tokens a second, forward and backward. No gradient is left behind."""
    lower, scorer.lower = scorer.lower, None  # cached states would change the time
    try:
        for _ in range(2):  # the first pass compiles kernels
            started = time.perf_counter()
            scorer(batch).sum().backward()
            if scorer.device.type == "cuda":
                torch.cuda.synchronize(scorer.device)
        return batch.tokens / (time.perf_counter() - started)
    finally:
        scorer.lower = lower
        scorer.zero_grad()


def matrix_rate(scorer: Any, seconds: float = 0.1, rows: int = 1024) -> float:
    """Floating-point operations a second of one product with the model's largest matrix."""
    shape = max(map(_shape, _matrices(scorer).values()), key=math.prod)
    like = next(scorer.inner.base_model.parameters())
    device = like.device
    w, x = (torch.randn(n, shape[1], device=device).to(like.dtype) for n in (shape[0], rows))

    def run(times: int) -> float:
        started = time.perf_counter()
        for _ in range(times):
            x @ w.t()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    run(2)
    times = max(1, int(seconds / max(run(2) / 2, 1e-6)))
    return 2.0 * x.numel() * w.shape[0] * times / run(times)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out: CUDA's error, or the CPU allocator's RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def release(scorer: Any) -> None:
    """Free what a failed micro-batch has left, so that a smaller one fits."""
    forget(scorer)
    if scorer.device.type == "cuda":
        torch.cuda.empty_cache()
