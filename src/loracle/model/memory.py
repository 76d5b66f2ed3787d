"""What a training will take, in memory and in time, before it begins; and what running out of memory looks like.

Legend of shapes: T tokens, H hidden size, I width of the MLP, L layers.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

EFFICIENCY = 0.5  # share of the machine's matrix rate that a whole step reaches (dev/LOG.md)


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """Bytes beside the weights that are there already, and floating-point operations."""

    fixed: int  # gradients and AdamW's two moments of what is trained
    per_token: int  # activations that wait for their backward, a token of a round
    flops_per_token: float  # forward and backward of a token

    def bytes(self, tokens: int) -> int:
        """For rounds of that many tokens."""
        return self.fixed + self.per_token * tokens

    def tokens(self, free: int) -> int:
        """The largest round that fits."""
        return max(0, (free - self.fixed) // self.per_token)


def training_need(scorer: Any, adapt_top: int | None = None) -> Need:
    """What training ``scorer`` takes, from its shapes.

    Matrix products: 2 operations a weight forward, 2 for the gradient of what came in, 2 more where the weight itself is
    trained. Layers below the adapters are not gone back through.
    """
    config, inner = scorer.inner.config, scorer.inner
    trained = [p for p in scorer.parameters() if p.requires_grad]
    ids = {id(p) for p in trained}
    matrices = [p for n, p in inner.base_model.named_parameters() if p.dim() == 2 and "embed" not in n]
    learnt = sum(p.numel() for p in matrices if id(p) in ids)
    layers = config.num_hidden_layers
    share = min(layers, adapt_top or layers) / layers
    everything = sum(p.numel() for p in matrices)
    size = next(inner.base_model.parameters()).element_size()
    return Need(
        fixed=sum(3 * p.numel() * p.element_size() for p in trained),
        per_token=int(_saved_numbers(config) * size * layers * share),
        flops_per_token=2 * everything + 2 * everything * share + 2 * learnt,
    )


def _saved_numbers(config: Any) -> int:
    """Numbers that a layer keeps for its backward, a token: what norms, products, attention and the MLP read."""
    hidden, inner = config.hidden_size, config.intermediate_size
    heads = config.num_attention_heads
    head = getattr(config, "head_dim", None) or hidden // heads
    keys = getattr(config, "num_key_value_heads", None) or heads
    queries, pairs = heads * head, 2 * keys * head
    return 4 * hidden + 4 * queries + 3 * pairs + 4 * inner


def weight_bytes(folder: Path, dtype: torch.dtype) -> int:
    """What the weights of a model folder take in memory as ``dtype``."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118  (safetensors' handle is no mapping)
                count = 1
                for n in weights.get_slice(name).get_shape():
                    count *= n
                total += count * dtype.itemsize
    return total


def free_memory(device: torch.device) -> int:
    """Bytes that can still be had on a device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    import psutil  # accelerate needs it too

    return psutil.virtual_memory().available


def matrix_rate(device: torch.device, dtype: torch.dtype, config: Any, seconds: float = 0.2) -> float:
    """Floating-point operations a second of the machine's own product, at the shape of this model's MLP."""
    x = torch.randn(1024, config.hidden_size, device=device).to(dtype)
    w = torch.randn(config.intermediate_size, config.hidden_size, device=device).to(dtype)

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


def release(device: torch.device) -> None:
    """Give cached blocks back, so that a smaller round finds room."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
