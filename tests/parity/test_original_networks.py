"""Our networks against those of the original packages, through the derived tensor map.

The weights are random and shared. 1e-4 is the relative error that float32 leaves after some forty
layers when products are summed in another order.
"""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from mezzotint.checkpoints.compvis import TensorMap, first_stage_map, unet_map
from mezzotint.errors import CheckpointError
from mezzotint.models.autoencoder import (
    AutoencoderKL,
    AutoencoderKLConfig,
    VQModel,
    VQModelConfig,
)
from mezzotint.models.perceptual import lpips_vgg16
from mezzotint.models.unet import UNet, UNetConfig

TOLERANCE = 1e-4
# the original checkpoints every plain attention block through a function that is old now
pytestmark = pytest.mark.filterwarnings("ignore:torch.get_autocast_gpu_dtype:DeprecationWarning")


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@torch.no_grad()
def randomize(module: nn.Module, seed: int = 0) -> None:
    """Fill every parameter: the originals start many of theirs at zero, which would hide them."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
        if parameter.ndim == 1 and name.endswith("weight"):
            parameter.add_(1.0)  # the gain of a normalisation


def share(theirs: nn.Module, ours: nn.Module, mapping: TensorMap) -> None:
    """Copy their weights into ours, and prove that the way back gives the same tensors."""
    originals = theirs.state_dict()
    translated = mapping.from_compvis(originals)
    ours.load_state_dict(translated)
    back = mapping.to_compvis(ours.state_dict())
    assert back.keys() == originals.keys()
    assert all(torch.equal(back[name], originals[name]) for name in originals)
    assert not mapping.unmapped


UNETS: dict[str, tuple[dict[str, object], dict[str, object], str]] = {
    "cross-attention": (
        {"num_heads": 4, "use_spatial_transformer": True, "context_dim": 24},
        {"cross_attention_dim": 24, "num_attention_heads": 4},
        "legacy",
    ),
    "cross-attention-linear": (
        {
            "num_head_channels": 16,
            "use_spatial_transformer": True,
            "context_dim": 24,
            "use_linear_in_transformer": True,
            "legacy": False,
        },
        {
            "cross_attention_dim": 24,
            "num_attention_heads": None,
            "attention_head_dim": 16,
            "use_linear_projection": True,
        },
        "legacy",
    ),
    "unconditional-legacy": (
        {"num_head_channels": 16},
        {"cross_attention_dim": None, "num_attention_heads": None, "attention_head_dim": 16},
        "legacy",
    ),
    "unconditional-new": (
        {"num_heads": 4, "use_new_attention_order": True},
        {"cross_attention_dim": None, "num_attention_heads": 4},
        "new",
    ),
    "class": (
        {"num_heads": 2, "num_classes": 7},
        {"cross_attention_dim": None, "num_attention_heads": 2, "num_class_embeds": 7},
        "legacy",
    ),
    "scale-shift": (
        {"num_heads": 1, "use_scale_shift_norm": True},
        {
            "cross_attention_dim": None,
            "num_attention_heads": 1,
            "resnet_time_scale_shift": "scale_shift",
        },
        "legacy",
    ),
    "up-down-resblocks": (
        {"num_heads": 2, "resblock_updown": True, "use_scale_shift_norm": True},
        {
            "cross_attention_dim": None,
            "num_attention_heads": 2,
            "resblock_updown": True,
            "resnet_time_scale_shift": "scale_shift",
        },
        "legacy",
    ),
    "cross-attention-up-down-class": (
        {
            "num_heads": 2,
            "use_spatial_transformer": True,
            "context_dim": 24,
            "resblock_updown": True,
            "num_classes": 7,
        },
        {
            "cross_attention_dim": 24,
            "num_attention_heads": 2,
            "resblock_updown": True,
            "num_class_embeds": 7,
        },
        "legacy",
    ),
}


def build_unets(name: str) -> tuple[nn.Module, UNet, TensorMap]:
    from ldm.modules.diffusionmodules.openaimodel import UNetModel

    their_options, our_options, order = UNETS[name]
    theirs = UNetModel(
        image_size=16,
        in_channels=4,
        out_channels=3,
        model_channels=32,
        num_res_blocks=2,
        attention_resolutions=(2, 4),
        channel_mult=(1, 2, 3),
        **their_options,
    ).eval()
    randomize(theirs)
    ours = UNet(
        UNetConfig.from_dict(
            {
                "in_channels": 4,
                "out_channels": 3,
                "block_out_channels": (32, 64, 96),
                "layers_per_block": 2,
                "attention_levels": (False, True, True),
                **our_options,
            }
        )
    ).eval()
    return theirs, ours, unet_map(ours, order)


@torch.no_grad()
@pytest.mark.parametrize("name", UNETS)
def test_unet_equals_the_original(name: str) -> None:
    theirs, ours, mapping = build_unets(name)
    share(theirs, ours, mapping)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, 16, 16, generator=generator)
    timestep = torch.tensor([3, 871])
    context = labels = None
    if ours.config.cross_attention_dim is not None:
        context = torch.randn(2, 5, 24, generator=generator)
    if ours.config.num_class_embeds is not None:
        labels = torch.tensor([0, 6])
    expected = theirs(x, timestep, context=context, y=labels)
    found = ours(x, timestep, context=context, vector=labels)
    assert relative_error(found, expected) <= TOLERANCE


@torch.no_grad()
def test_the_head_order_matters() -> None:
    """With the wrong order the network is another one: the parity above tells them apart."""
    theirs, ours, _ = build_unets("unconditional-new")
    ours.load_state_dict(unet_map(ours, "legacy").from_compvis(theirs.state_dict()))
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    timestep = torch.tensor([100])
    assert relative_error(ours(x, timestep), theirs(x, timestep)) > 1e-2


class OriginalFirstStage(nn.Module):
    """The original encoder and decoder put together as its `AutoencoderKL` does it.

    That class itself derives from a Lightning module, which is no part of the maths.
    """

    def __init__(self, *, double_z: bool, embed_dim: int, attention: tuple[int, ...]) -> None:
        super().__init__()
        from ldm.modules.diffusionmodules.model import Decoder, Encoder

        options: dict[str, object] = {
            "ch": 32,
            "out_ch": 3,
            "ch_mult": (1, 2, 2),
            "num_res_blocks": 2,
            "attn_resolutions": attention,
            "in_channels": 3,
            "resolution": 32,
            "z_channels": 4,
            "double_z": double_z,
        }
        self.encoder, self.decoder = Encoder(**options), Decoder(**options)
        factor = 2 if double_z else 1
        self.quant_conv = nn.Conv2d(factor * 4, factor * embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, 4, 1)


@torch.no_grad()
@pytest.mark.parametrize("attention", [(), (16,), (8, 32)], ids=str)
def test_autoencoder_kl_equals_the_original(attention: tuple[int, ...]) -> None:
    theirs = OriginalFirstStage(double_z=True, embed_dim=4, attention=attention).eval()
    randomize(theirs)
    config = AutoencoderKLConfig(
        block_out_channels=(32, 64, 64),
        attention_levels=tuple(size in attention for size in (32, 16, 8)),
    )
    ours = AutoencoderKL(config).eval()
    share(theirs, ours, first_stage_map(ours))
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    moments = theirs.quant_conv(theirs.encoder(x))
    posterior = ours.encode(x)
    assert relative_error(posterior.mean, moments[:, :4]) <= TOLERANCE
    assert relative_error(posterior.logvar, moments[:, 4:].clamp(-30, 20)) <= TOLERANCE
    z = moments[:, :4]
    expected = theirs.decoder(theirs.post_quant_conv(z))
    assert relative_error(ours.decode(z), expected) <= TOLERANCE


def test_vq_model_equals_the_original() -> None:
    from taming.modules.vqvae.quantize import VectorQuantizer2

    beta = 0.3
    theirs = OriginalFirstStage(double_z=False, embed_dim=3, attention=(16,)).eval()
    # legacy has beta on the codebook's term; ours is as the paper writes it
    theirs.quantize = VectorQuantizer2(64, 3, beta, legacy=False, sane_index_shape=True)
    randomize(theirs)
    ours = VQModel(
        VQModelConfig(
            latent_channels=4,
            block_out_channels=(32, 64, 64),
            attention_levels=(False, True, False),
            codebook_size=64,
            embedding_dim=3,
            commitment_weight=beta,
        )
    ).eval()
    share(theirs, ours, first_stage_map(ours))
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        z = theirs.quant_conv(theirs.encoder(x))
        assert relative_error(ours.encode(x), z) <= TOLERANCE
    mine, original = z.clone().requires_grad_(), z.clone().requires_grad_()
    z_q, loss, (_, _, indices) = theirs.quantize(original)
    quantization = ours.quantize(mine)
    assert torch.equal(quantization.indices, indices)
    assert len(indices.unique()) > 8  # not all of them the same code
    torch.testing.assert_close(quantization.z_q, z_q)
    torch.testing.assert_close(quantization.loss, loss)
    (loss + z_q.sin().sum()).backward()
    (quantization.loss + quantization.z_q.sin().sum()).backward()
    torch.testing.assert_close(mine.grad, original.grad)
    with torch.no_grad():
        expected = theirs.decoder(theirs.post_quant_conv(z_q))
        assert relative_error(ours.decode(z), expected) <= TOLERANCE


@pytest.mark.filterwarnings("ignore::SyntaxWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:taming")
def test_lpips_equals_the_original(monkeypatch: pytest.MonkeyPatch) -> None:
    """The original takes nothing from torchvision but the layers of VGG16, which stand here."""
    layers: list[nn.Module] = []
    channels = 3
    for width in (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", *(512, 512, 512, "M") * 2):
        if isinstance(width, str):
            layers.append(nn.MaxPool2d(2, 2))
        else:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
            channels = width
    vgg = nn.Sequential(*layers)
    stub = ModuleType("torchvision")
    stub.models = SimpleNamespace(vgg16=lambda pretrained: SimpleNamespace(features=vgg))
    monkeypatch.setitem(sys.modules, "torchvision", stub)
    for name in [n for n in sys.modules if n.startswith("taming.modules.losses")]:
        monkeypatch.delitem(sys.modules, name)
    from taming.modules.losses.lpips import LPIPS

    monkeypatch.setattr(LPIPS, "load_from_pretrained", lambda self: None)
    theirs = LPIPS().eval()
    randomize(theirs)
    with torch.no_grad():
        for head in (theirs.lin0, theirs.lin1, theirs.lin2, theirs.lin3, theirs.lin4):
            head.model[1].weight.abs_()
    ours = lpips_vgg16(theirs.state_dict(), "shared weights")
    x, y = torch.rand(2, 2, 3, 48, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        assert relative_error(ours(x, y), theirs(x, y).flatten()) <= TOLERANCE


def test_foreign_tensors_are_refused() -> None:
    unet = UNet(UNetConfig(block_out_channels=(32,), attention_levels=(False,)))
    mapping = unet_map(unet)
    tensors = mapping.to_compvis(unet.state_dict())
    tensors["extra"] = tensors.pop("out.2.bias")
    tensors["out.0.bias"] = torch.zeros(3)
    with pytest.raises(CheckpointError) as error:
        mapping.from_compvis(tensors)
    message = str(error.value)
    assert "missing out.2.bias" in message
    assert "unexpected extra" in message
    assert "out.0.bias has shape (3,), expected (32,)" in message


def test_what_the_original_layout_cannot_hold_is_listed() -> None:
    config = UNetConfig(
        block_out_channels=(32,), attention_levels=(False,), guidance_embed_dim=8, vector_dim=5
    )
    mapping = unet_map(UNet(config))
    assert mapping.unmapped == ("time_embedding.cond_proj.weight",)
