import pytest
import torch
from torch import nn

from mezzotint.errors import ConfigError
from mezzotint.models.discriminator import (
    PatchDiscriminator,
    PatchDiscriminatorConfig,
    adaptive_weight,
    generator_loss,
    hinge_discriminator_loss,
)


@pytest.mark.parametrize(("layers", "patch"), [(1, 16), (2, 34), (3, 70)])
def test_a_logit_sees_its_patch_and_no_more(layers: int, patch: int) -> None:
    """The receptive fields of PatchGAN: 16, 34 and 70 pixels, read off the input's gradient."""
    config = PatchDiscriminatorConfig(channels=8, layers=layers)
    discriminator = PatchDiscriminator(config)
    for i, module in enumerate(discriminator.main):
        if isinstance(module, nn.GroupNorm):
            discriminator.main[i] = nn.Identity()  # it sees the whole image by its statistics
    x = torch.randn(1, 3, 160, 160, requires_grad=True)
    logits = discriminator(x)
    side = logits.shape[-1] // 2
    logits[0, 0, side, side].backward()
    rows = (x.grad != 0).any(dim=1)[0].any(dim=1).nonzero().flatten()
    assert int(rows[-1] - rows[0]) + 1 == patch


def test_images_are_judged_apart() -> None:
    discriminator = PatchDiscriminator(PatchDiscriminatorConfig(channels=16))
    x = torch.randn(3, 3, 48, 48)
    torch.testing.assert_close(discriminator(x)[1:2], discriminator(x[1:2]))


def test_the_hinge_by_hand() -> None:
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.0])
    # ((0 + 0.5) / 2 + (0 + 1) / 2) / 2
    assert float(hinge_discriminator_loss(real, fake)) == pytest.approx(0.375)
    assert float(generator_loss(fake)) == pytest.approx(1.5)


def test_it_learns_to_tell_noise_from_flat_images() -> None:
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(PatchDiscriminatorConfig(channels=8, layers=1))
    optimizer = torch.optim.Adam(discriminator.parameters(), 2e-3)
    for _ in range(60):
        real = torch.rand(4, 3, 1, 1).expand(4, 3, 16, 16) * 2 - 1
        fake = torch.rand(4, 3, 16, 16) * 2 - 1
        loss = hinge_discriminator_loss(discriminator(real), discriminator(fake))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.2  # it starts at 1


def test_the_adaptive_weight_is_the_ratio_of_gradients() -> None:
    layer = nn.Parameter(torch.tensor([3.0, 4.0]))
    first, second = (layer**2).sum(), 0.5 * layer.sum()
    # |2 (3, 4)| = 10 over |(0.5, 0.5)| = 0.7071
    weight = adaptive_weight(first, second, layer)
    assert float(weight) == pytest.approx(10 / (0.5**0.5 + 1e-4), rel=1e-5)
    assert not weight.requires_grad
    (first + weight * second).backward()  # the graphs are still there
    assert float(adaptive_weight((layer**2).sum(), 0.0 * layer.sum(), layer)) == 1e4


def test_channels_must_fit_the_groups() -> None:
    with pytest.raises(ConfigError, match="channels must be a multiple of 8, got 12"):
        PatchDiscriminatorConfig.from_dict({"channels": 12})
