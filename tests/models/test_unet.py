"""The UNet by what must hold whatever its weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mezzotint.checkpoints.folder import load_component, save_component
from mezzotint.errors import ConfigError, RequestError
from mezzotint.models import UNet, UNetConfig

SHAPE: dict[str, Any] = {
    "block_out_channels": (16, 32),
    "attention_levels": (True, True),
    "layers_per_block": 1,
    "cross_attention_dim": 12,
    "num_attention_heads": 2,
    "norm_num_groups": 8,
}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def build(**fields: Any) -> UNet:
    unet = UNet(UNetConfig.from_dict(SHAPE | fields))
    generator = torch.Generator().manual_seed(0)
    for parameter in unet.parameters():
        if parameter.ndim > 1:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data = noise * parameter[0].numel() ** -0.5
    return unet.eval()


X, TIME, CONTEXT = draw(2, 4, 8, 8), torch.tensor([10, 900]), draw(2, 5, 12, seed=1)


@torch.no_grad()
def test_masked_garbage_equals_no_padding() -> None:
    unet = build()
    garbage = torch.cat([CONTEXT, 1e3 * draw(2, 3, 12, seed=2)], dim=1)
    mask = torch.tensor([[True] * 5 + [False] * 3] * 2)
    assert torch.allclose(unet(X, TIME, garbage, mask), unet(X, TIME, CONTEXT), atol=1e-5)
    assert not torch.allclose(unet(X, TIME, garbage), unet(X, TIME, CONTEXT), atol=1e-2)


@torch.no_grad()
def test_a_condition_without_tokens_is_finite_and_says_nothing() -> None:
    unet, mask = build(), torch.zeros(2, 5, dtype=torch.bool)
    out = unet(X, TIME, CONTEXT, mask)
    assert out.isfinite().all()
    assert torch.equal(out, unet(X, TIME, draw(2, 5, 12, seed=3), mask))


@torch.no_grad()
def test_a_sample_does_not_depend_on_its_neighbours() -> None:
    unet = build()
    both = unet(X, TIME, CONTEXT)
    alone = unet(X[1:], TIME[1:], CONTEXT[1:])
    assert torch.allclose(both[1:], alone, atol=1e-5)


def test_an_untrained_network_predicts_zero_and_can_learn() -> None:
    unet = UNet(UNetConfig.from_dict(SHAPE))
    out = unet(X, TIME, CONTEXT)
    assert out.abs().max() == 0
    (out - X).square().mean().backward()
    gradient = unet.conv_out.weight.grad
    assert gradient is not None and gradient.abs().max() > 0


@pytest.mark.parametrize(
    ("updown", "size"), [(False, (7, 8)), (False, (1, 3)), (True, (7, 8)), (True, (5, 9))]
)
@torch.no_grad()
def test_odd_sizes_come_back(updown: bool, size: tuple[int, int]) -> None:
    unet = build(resblock_updown=updown, cross_attention_dim=None)
    assert unet(draw(1, 4, *size), TIME[:1]).shape == (1, 4, *size)


def test_gradient_checkpointing_changes_no_gradient() -> None:
    unet = build()
    gradients = []
    for _ in range(2):
        unet.zero_grad()
        unet(X, TIME, CONTEXT).square().mean().backward()
        gradients.append([p.grad.clone() for p in unet.parameters() if p.grad is not None])
        unet.enable_gradient_checkpointing()
    assert len(gradients[0]) == len(list(unet.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_bf16_autocast_stays_near_float32_with_gradients_and_without() -> None:
    unet = build()
    with torch.autocast("cpu", torch.bfloat16):
        training = unet(X, TIME, CONTEXT).detach().float()
        with torch.no_grad():
            drawing = unet(X, TIME, CONTEXT).float()
    with torch.no_grad():
        exact = unet(X, TIME, CONTEXT)
    # 8 bits a rounding (2**-9 each), through about thirty layers that partly cancel
    for out in (training, drawing):
        assert (out - exact).norm() / exact.norm() < 0.03


@torch.no_grad()
def test_with_coordinates_a_network_knows_where_it_is() -> None:
    """Far from the edges, what is the same elsewhere is told apart; sizes may be any."""
    alone: dict[str, Any] = {"attention_levels": (False, False), "cross_attention_dim": None}
    alone |= {"block_out_channels": (16,), "attention_levels": (False,)}
    x = torch.zeros(1, 4, 64, 64)
    apart: list[float] = []
    for channels in (0, 8):
        unet = build(**alone, coordinate_channels=channels)
        unet.mid_block = torch.nn.Identity()  # whose attention sees the edges
        unet.mid_block.forward = lambda h, *_: h
        out = unet(x, TIME[:1])[0, :, 24:40, 24:40]
        apart.append(float(out.std(dim=(1, 2)).max()))
    assert apart[0] < 1e-5 < 1e-2 < apart[1]
    assert unet(torch.zeros(1, 4, 8, 24), TIME[:1]).shape == (1, 4, 8, 24)


def test_coordinates_round_trip_in_a_folder(tmp_path: Path) -> None:
    for dim in (12, None):
        unet = build(coordinate_channels=4, cross_attention_dim=dim)
        save_component(unet, tmp_path / str(dim))
        again = load_component(tmp_path / str(dim))
        assert again.config == unet.config and again.conv_in.weight.shape[1] == 8
        context = None if dim is None else CONTEXT
        with torch.no_grad():
            assert torch.equal(again.eval()(X, TIME, context), unet(X, TIME, context))


@pytest.mark.parametrize(
    ("fields", "inputs", "message"),
    [
        ({}, {}, "needs a context"),
        ({"cross_attention_dim": None}, {"context": CONTEXT}, "no use for a context"),
        ({"num_class_embeds": 3}, {"context": CONTEXT}, "needs a vector"),
        ({}, {"context": CONTEXT, "vector": TIME}, "no use for a vector"),
        ({}, {"context": CONTEXT, "guidance": TIME}, "not distilled"),
    ],
)
def test_conditions_must_fit(fields: dict[str, Any], inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        build(**fields)(X, TIME, **inputs)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attention_levels": (True,)}, "attention_levels has 1 flags.*2 levels"),
        ({"attention_head_dim": 8}, "exactly one of num_attention_heads and attention_head_dim"),
        ({"num_attention_heads": None}, "exactly one of num_attention_heads"),
        ({"num_attention_heads": 3}, "num_attention_heads 3 does not divide the 16 channels"),
        (
            {"num_attention_heads": None, "attention_head_dim": 12},
            "attention_head_dim 12 does not divide the 16 channels",
        ),
        ({"norm_num_groups": 32}, "norm_num_groups 32 does not divide the 16 channels"),
        ({"num_class_embeds": 2, "vector_dim": 2}, "num_class_embeds and vector_dim exclude"),
        ({"dropout": 1.0}, "dropout"),
        ({"block_out_channel": (16,)}, "did you mean 'block_out_channels'"),
    ],
)
def test_configuration_errors_name_the_field(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        UNetConfig.from_dict(SHAPE | fields)


def test_configuration_round_trip() -> None:
    config = UNetConfig.from_dict(SHAPE | {"vector_dim": 6})
    assert UNetConfig.from_dict(config.to_dict()) == config
