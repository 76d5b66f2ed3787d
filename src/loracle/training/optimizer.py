"""The optimizer, its parameter groups, and the learning-rate schedule as a function of the step."""

from __future__ import annotations

import math

import torch
from torch import nn

# The rate at width 576 is tuned on N24News validation data (benchmarks/n24news.py). Two factors are rules of thumb of the
# field, not measured here: the square root of the width, and a twentieth for full training (BERT: 4e-5).
BASE_LR, BASE_WIDTH, FULL_FACTOR = 1e-3, 576, 0.05


def default_lr(hidden_size: int, *, full: bool) -> float:
    """Peak learning rate for a model of width ``hidden_size``; adapters take higher rates than full training."""
    rate = BASE_LR * math.sqrt(BASE_WIDTH / hidden_size) * (FULL_FACTOR if full else 1.0)
    return float(f"{rate:.2g}")


def make_optimizer(model: nn.Module, *, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; weight decay applies to matrices only."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, fused=True)


def lr_factor(step: int, total: int, warmup: float) -> float:
    """Fraction of the peak rate at ``step`` (0-based): linear warmup over a share ``warmup`` of ``total``, then cosine to 0."""
    rise = max(1, round(total * warmup))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, total - rise)))
