"""What is stored of the classifier."""

import torch

from tools import build_features


def test_rounding_to_eight_bits_loses_half_a_step_at_most() -> None:
    weight = (
        torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
        * torch.tensor([1e-3, 1.0, 7.0, 0.1, 20.0])[:, None]
    )
    rows, scale = build_features.quantized(weight)
    assert rows.dtype == torch.int8 and int(rows.abs().amax()) == 127
    error = (rows * scale[:, None] - weight).abs()
    assert (error <= 0.501 * scale[:, None]).all()
