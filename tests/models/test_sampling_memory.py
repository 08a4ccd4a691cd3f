"""What calls of a UNet share: what each would compute, or kept deep features and no more."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mezzotint.models.sampling_memory import DeepFeatures, SamplingMemory
from mezzotint.models.unet import UNet, UNetConfig

PLAIN: dict[str, Any] = {
    "block_out_channels": (16, 32),
    "attention_levels": (True, True),
    "layers_per_block": 1,
    "cross_attention_dim": 12,
    "num_attention_heads": 2,
    "norm_num_groups": 8,
}
SHAPES: dict[str, dict[str, Any]] = {
    "two levels": {},
    "three": {
        "block_out_channels": (16, 16, 32),
        "attention_levels": (False, True, False),
        "layers_per_block": 2,
    },
    "resblocks": {"resblock_updown": True, "layers_per_block": 2},
}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def build(**fields: Any) -> UNet:
    unet = UNet(UNetConfig.from_dict(PLAIN | fields))
    generator = torch.Generator().manual_seed(0)
    for parameter in unet.parameters():  # the last convolution too, which begins at zero
        if parameter.ndim > 1:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data = noise * parameter[0].numel() ** -0.5
    return unet.eval()


X, TIME, CONTEXT = draw(2, 4, 8, 8), torch.tensor([10, 900]), draw(2, 5, 12, seed=1)


def computed(unet: UNet) -> list[str]:
    """Names of the ResBlocks that run, in order, from now on."""
    names: list[str] = []
    for name, module in unet.named_modules():
        if name.rpartition(".")[0].endswith("resnets"):
            module.register_forward_hook(lambda *_, name=name: names.append(name))
    return names


@pytest.mark.parametrize("size", [(8, 8), (7, 10)])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_computing_and_keeping_changes_no_bit(shape: str, size: tuple[int, int]) -> None:
    unet, x = build(**SHAPES[shape]), draw(2, 4, *size)
    expected = unet(x, TIME, CONTEXT)
    assert torch.equal(unet(x, TIME, CONTEXT, memory=SamplingMemory()), expected)
    for blocks in range(1, unet.config.outputs_down + 1):
        deep = DeepFeatures(blocks)
        memory = SamplingMemory(deep)
        assert torch.equal(unet(x, TIME, CONTEXT, memory=memory), expected)
        assert deep.kept is not None
        # of the same input, what is kept is what would be computed
        assert torch.equal(unet(x, TIME, CONTEXT, memory=memory), expected)


@torch.no_grad()
def test_a_kept_call_computes_the_shallow_blocks_alone() -> None:
    unet = build(**SHAPES["three"])
    names = computed(unet)
    memory = SamplingMemory(DeepFeatures(1))
    unet(X, TIME, CONTEXT, memory=memory)
    assert len(names) == 3 * (2 + 3) + 2
    names.clear()
    unet(X, TIME, CONTEXT, memory=memory)
    assert names == ["down_blocks.0.resnets.0", "up_blocks.2.resnets.1", "up_blocks.2.resnets.2"]
    names.clear()
    # with more than a level, the way up begins where the last upsampling has still to be done
    memory = SamplingMemory(DeepFeatures(3))
    for _ in range(2):
        names.clear()
        unet(X, TIME, CONTEXT, memory=memory)
    assert names == [
        *("down_blocks.0.resnets.0", "down_blocks.0.resnets.1", "up_blocks.1.resnets.2"),
        *("up_blocks.2.resnets.0", "up_blocks.2.resnets.1", "up_blocks.2.resnets.2"),
    ]


@torch.no_grad()
def test_kept_features_are_of_the_call_that_made_them() -> None:
    unet, deep = build(), DeepFeatures(1)
    memory, other = SamplingMemory(deep), draw(2, 4, 8, 8, seed=5)
    unet(other, TIME, CONTEXT, memory=memory)
    mixed = unet(X, TIME, CONTEXT, memory=memory)
    expected = unet(X, TIME, CONTEXT)
    assert not torch.equal(mixed, expected)
    # the shallow way sees the new input: it is nearer to that than what the old one gave
    assert (mixed - expected).norm() < (unet(other, TIME, CONTEXT) - expected).norm()
    deep.forget()
    assert torch.equal(unet(X, TIME, CONTEXT, memory=memory), expected)
    with pytest.raises(AssertionError, match="of this batch"):
        unet(X[:1], TIME[:1], CONTEXT[:1], memory=memory)


@torch.no_grad()
def test_another_context_is_projected_anew_and_the_old_one_is_dropped() -> None:
    unet, memory = build(), SamplingMemory()
    calls: list[nn.Module] = []
    for name, module in unet.named_modules():
        if name.endswith("attn2.to_k"):
            module.register_forward_hook(lambda module, *_: calls.append(module))
    layers = len([name for name, _ in unet.named_modules() if name.endswith("attn2.to_k")])
    other = draw(2, 5, 12, seed=9)
    for context in (CONTEXT, CONTEXT, other, other, CONTEXT):
        out = unet(X, TIME, context, memory=memory)
        called = len(calls)
        assert torch.equal(out, unet(X, TIME, context))
        del calls[called:]  # those of the comparison
    assert len(calls) == 3 * layers
    assert len(set(calls)) == layers


def test_where_gradients_are_wanted_nothing_is_shared() -> None:
    unet, deep = build(), DeepFeatures(1)
    memory = SamplingMemory(deep)
    gradients = []
    for used in (None, memory, memory):
        unet.zero_grad()
        unet(X, TIME, CONTEXT, memory=used).square().mean().backward()
        gradients.append([p.grad.clone() for p in unet.parameters() if p.grad is not None])
    assert deep.kept is None
    assert len(gradients[0]) == len(list(unet.parameters()))
    for mine in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients[0], mine, strict=True))
    with torch.no_grad():  # and nothing of that lingers
        before = unet(X, TIME, CONTEXT, memory=memory)
        assert torch.equal(before, unet(X, TIME, CONTEXT))


def test_attentions_are_those_of_both_ways() -> None:
    unet = build(**SHAPES["three"])
    assert unet.attentions(0) == unet.attentions(2) == []
    assert len(unet.attentions(1)) == 2 + 3
