"""AdamW under a gradient scaler, as in float16."""

import pytest
import torch
from torch import nn

from mezzotint.training.optimizer import apply_gradients, build_optimizer
from mezzotint.training.recipe import OptimizerConfig


def one_step(value: float, scaler: torch.amp.GradScaler) -> tuple[dict, torch.Tensor]:
    """Step on one weight of 1 whose gradient is a value."""
    weight = nn.Parameter(torch.ones(()))
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.0)
    optimizer = build_optimizer([{"params": [weight], "lr": 0.1}], config)
    scaler.scale(value * weight).backward()
    told = apply_gradients(optimizer, config, 1.0, scaler)
    scaler.update()
    return told, weight.detach()


def test_a_step_whose_gradients_overflow_is_skipped_and_counted():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100)
    told, weight = one_step(2.0**60, scaler)  # beyond float32, once scaled
    assert told == {"skipped_steps": 1.0} and float(weight) == 1.0
    assert scaler.get_scale() == 2.0**99
    told, weight = one_step(3.0, scaler)
    assert told["skipped_steps"] == 0.0
    assert float(told["gradient_norm"]) == pytest.approx(3.0)
    assert float(weight) == pytest.approx(0.9)


def test_without_a_scaler_nothing_is_skipped():
    told, _ = one_step(3.0, torch.amp.GradScaler("cpu", enabled=False))
    assert told.keys() == {"gradient_norm"} and float(told["gradient_norm"]) == pytest.approx(3.0)
