"""What a training will take, in memory and in time, before it begins; and what running out of memory looks like."""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from loracle.models.lora import forget
from loracle.models.quantization import BITS


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """Bytes beside the weights that are there already, and floating-point operations."""

    fixed: int  # gradients and AdamW's two moments of what is trained
    per_token: int  # activations that wait for their backward, a token of a round
    flops_per_token: float  # forward and backward of a token
    forward_flops: float  # forward alone
    lower_flops: float  # of that, below the lowest adapter

    def bytes(self, tokens: int) -> int:
        """For rounds of that many tokens."""
        return self.fixed + self.per_token * tokens

    def tokens(self, free: int) -> int:
        """The largest round that fits."""
        return max(0, (free - self.fixed) // self.per_token)


def training_need(scorer: Any, adapt_top: int | None = None) -> Need:
    """What training ``scorer`` takes, from the shapes of its matrices, so that it holds for any architecture.

    Products: 2 operations a weight forward, 2 for the gradient of what came in, 2 more where the weight itself is trained.
    Kept for the backward: what goes in and out of each product and, of that, a fifth more for norms and attention. Layers
    below the adapters are not gone back through.
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
    """What a token is multiplied by: all of the backbone but the embeddings."""
    base = scorer.inner.base_model
    looked_up = {id(m.weight) for m in base.modules() if isinstance(m, torch.nn.Embedding)}
    return {name: p for name, p in base.named_parameters() if p.dim() == 2 and id(p) not in looked_up}


def _shape(matrix: torch.Tensor) -> tuple[int, int]:
    """Of a 4-bit weight the shape that it stands for."""
    rows, columns = getattr(matrix, "quant_state", matrix).shape
    return rows, columns


def weight_bytes(folder: Path, dtype: torch.dtype, *, four_bit: bool = False) -> int:
    """What the weights of a model folder take in memory as ``dtype``, or with those of the layers in 4 bits."""
    total = 0.0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118  (safetensors' handle is no mapping)
                shape = weights.get_slice(name).get_shape()
                small = four_bit and len(shape) == 2 and ".layers." in f".{name}"
                total += math.prod(shape) * (BITS / 8 if small else dtype.itemsize)
    return int(total)


def free_memory(device: torch.device) -> int:
    """Bytes that can still be had on a device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    import psutil  # accelerate needs it too

    return min(psutil.virtual_memory().available, left_in_container())


def left_in_container(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """Bytes until a limit on this process's control group, which the kernel kills for; what it can take back from files counts
    as free. Without a limit a number larger than any memory.
    """
    least = 1 << 62
    with contextlib.suppress(OSError):
        for line in own.read_text().splitlines():
            _, kinds, path = line.split(":", 2)
            folder, names = (root, ("memory.max", "memory.current", "inactive_file"))  # version 2
            if kinds:
                if "memory" not in kinds.split(","):
                    continue
                folder = root / "memory"
                names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            for place in {folder, folder / path.lstrip("/")}:  # the first one is its own where it has a namespace
                with contextlib.suppress(OSError, ValueError, KeyError):
                    most, used = (int((place / name).read_text()) for name in names[:2])
                    stat = dict(row.split() for row in (place / "memory.stat").read_text().splitlines())
                    least = min(least, max(0, most - used + int(stat[names[2]])))
    return least


def training_rate(scorer: Any, batch: Any) -> float:
    """Tokens a second that go through the model and back; no gradient is left."""
    lower, scorer.lower = scorer.lower, None  # states that are kept or read would be another matter
    try:
        for _ in range(2):  # the first time makes kernels
            started = time.perf_counter()
            scorer(batch).sum().backward()
            if scorer.device.type == "cuda":
                torch.cuda.synchronize(scorer.device)
        return batch.tokens / (time.perf_counter() - started)
    finally:
        scorer.lower = lower
        scorer.zero_grad()


def matrix_rate(scorer: Any, seconds: float = 0.1, rows: int = 1024) -> float:
    """Floating-point operations a second of the machine's own product with the largest of the model's matrices."""
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
    """Whether an error says that memory ran out: CUDA's own, or the CPU allocator's RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def release(scorer: Any) -> None:
    """Let go of what a round that failed has left, so that a smaller one finds room."""
    forget(scorer)
    if scorer.device.type == "cuda":
        torch.cuda.empty_cache()
