"""Counting operations in closed form, the peak, and the clock."""

import time

import pytest
import torch
from torch import nn

from mezzotint.models.unet import UNet, UNetConfig
from mezzotint.studies.speed import count_flops, peak_flops, seconds_of

CPU = torch.device("cpu")


def test_operations_of_a_convolution_in_closed_form() -> None:
    x = torch.zeros(2, 3, 10, 12)
    counted = count_flops(lambda: nn.Conv2d(3, 5, 3, padding=1), x)
    assert counted == 2 * 2 * 5 * 3 * 9 * 10 * 12


def test_gradients_take_twice_as_much_as_the_call() -> None:
    layers = lambda: nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))  # noqa: E731
    x = torch.zeros(6, 8)
    once = 2 * 6 * (8 * 16 + 16 * 4)
    assert count_flops(layers, x) == once
    # of the first layer's input no gradient is asked
    assert count_flops(layers, x, backward=True) == 3 * once - 2 * 6 * 8 * 16


def test_attention_counts_and_precision_does_not() -> None:
    config = UNetConfig(
        block_out_channels=(32, 64),
        layers_per_block=1,
        attention_levels=(True, False),
        cross_attention_dim=16,
    )
    t, context = torch.zeros(1), torch.zeros(1, 5, 16)
    small, large = (
        count_flops(lambda: UNet(config), torch.zeros(1, 4, side, side), t, context)
        for side in (8, 16)
    )
    assert large > 4 * small  # convolutions grow with the positions, attention with their square
    half = [torch.zeros(1, 4, 8, 8, dtype=torch.bfloat16), t, context.bfloat16()]
    assert count_flops(lambda: UNet(config), *half) == small


@torch.inference_mode()
def test_counting_is_possible_while_drawing() -> None:
    assert count_flops(lambda: nn.Linear(4, 4), torch.zeros(1, 4), backward=True) > 0


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_peak_is_a_speed(precision: torch.dtype) -> None:
    found = peak_flops(CPU, precision, channels=32, side=16, calls=3)
    assert 1e6 < found < 1e16


def test_seconds_are_those_of_the_call() -> None:
    assert 0.02 <= seconds_of(lambda: time.sleep(0.02), CPU) < 2.0
