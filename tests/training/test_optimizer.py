"""The learning-rate schedule and AdamW's parameter groups, computed by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from loracle.training.optimizer import default_lr, lr_factor, make_optimizer


def test_rate_rises_linearly_and_falls_to_zero():
    factors = [lr_factor(step, 100, 0.1) for step in range(100)]
    assert factors[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert max(factors) == factors[10] == 1
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[55] == pytest.approx(0.5)
    assert 0 < factors[99] < 0.001


@pytest.mark.parametrize("total", [1, 2, 5])
@pytest.mark.parametrize("warmup", [0.0, 0.06, 0.5, 1.0])
def test_short_runs_have_positive_rates(total, warmup):
    factors = [lr_factor(step, total, warmup) for step in range(total)]
    assert all(0 < f <= 1 for f in factors)


def test_weight_decay_applies_to_matrices_only():
    model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
    decay = {
        id(p): g["weight_decay"]
        for g in make_optimizer(model, lr=1.0, weight_decay=0.1).param_groups
        for p in g["params"]
    }
    assert {name: decay[id(p)] for name, p in model.named_parameters()} == {
        "0.weight": 0.1, "0.bias": 0.0, "1.weight": 0.0, "1.bias": 0.0,
    }  # fmt: skip


def test_frozen_parameters_are_not_optimized():
    model = nn.Linear(2, 3)
    model.bias.requires_grad_(False)
    optimizer = make_optimizer(model, lr=1.0, weight_decay=0.1)
    assert [p for g in optimizer.param_groups for p in g["params"]] == [model.weight]


def test_first_step_equals_adamw_by_hand():
    """After one step the moments are the gradient and its square: the step is -lr · sign(g), after decay."""
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(2.0)
    optimizer = make_optimizer(model, lr=0.1, weight_decay=0.5)
    model(torch.ones(1, 1)).sum().backward()
    optimizer.step()
    assert model.weight.item() == pytest.approx(2.0 * (1 - 0.1 * 0.5) - 0.1, rel=1e-6)


def test_default_rate_depends_on_width_and_full_training():
    assert default_lr(4 * 576, full=False) == pytest.approx(default_lr(576, full=False) / 2)
    assert default_lr(576, full=True) == pytest.approx(default_lr(576, full=False) / 20)
    assert default_lr(576, full=False) == 1e-3
