"""A tiny model of every published family, with random weights."""

import torch
from torch import nn

from mezzotint.conditioning.base import Conditioner, Unconditional
from mezzotint.conditioning.bert import BertTextConditioner, BertTextConditionerConfig
from mezzotint.conditioning.classes import ClassConditioner, ClassConditionerConfig
from mezzotint.conditioning.clip import ClipConditioner, ClipConditionerConfig
from mezzotint.conditioning.layout import LayoutConditioner, LayoutConditionerConfig
from mezzotint.conditioning.spatial import (
    HybridConditioner,
    InpaintingConditioner,
    InpaintingConditionerConfig,
    LowResConditioner,
    LowResConditionerConfig,
    SemanticMapConditioner,
    SemanticMapConditionerConfig,
)
from mezzotint.conditioning.vocabularies import bert_tokenizer, clip_tokenizer
from mezzotint.diffusion.schedule import ScheduleConfig
from mezzotint.latent_diffusion import FirstStage, LatentDiffusion, LatentNormalization
from mezzotint.models.autoencoder import AutoencoderKL, AutoencoderKLConfig, VQModel, VQModelConfig
from mezzotint.models.unet import UNet, UNetConfig

CONTEXT = 64  # width of every text encoder; one head of CLIP


def kl() -> AutoencoderKL:
    widths = (32, 32, 64, 64)
    return AutoencoderKL(AutoencoderKLConfig(block_out_channels=widths, layers_per_block=1))


def vq(**changes: object) -> VQModel:
    fields = {"block_out_channels": (32, 64, 64), "layers_per_block": 1, "codebook_size": 24}
    return VQModel(VQModelConfig.from_dict({**fields, **changes}))


def clip(**changes: object) -> ClipConditioner:
    fields = {
        "hidden_size": CONTEXT,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 1,
    }
    return ClipConditioner(ClipConditionerConfig.from_dict({**fields, **changes}), clip_tokenizer())


def open_clip(layers: int = 3, output_layer: int = 2) -> ClipConditioner:
    return clip(
        hidden_act="gelu",
        pad_token_id=0,
        num_hidden_layers=layers,
        output_layer=output_layer,
    )


def text() -> BertTextConditioner:
    config = BertTextConditionerConfig(width=CONTEXT, layers=2, head_dim=4, ffn_dim=96)
    return BertTextConditioner(config, bert_tokenizer())


def layout() -> LayoutConditioner:
    config = LayoutConditionerConfig(
        vocab_size=50, width=CONTEXT, layers=2, head_dim=4, ffn_dim=96, max_length=11
    )
    return LayoutConditioner(config)


def classes() -> ClassConditioner:
    names = tuple(str(number) for number in range(9))
    return ClassConditioner(ClassConditionerConfig(width=CONTEXT, class_names=names))


def unet(**changes: object) -> UNet:
    fields = {
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "attention_levels": (True, False),
        "cross_attention_dim": None,
        "num_attention_heads": 8,
    }
    if "attention_head_dim" in changes:
        fields["num_attention_heads"] = None
    return UNet(UNetConfig.from_dict({**fields, **changes}))


def attending(**changes: object) -> UNet:
    return unet(cross_attention_dim=CONTEXT, **changes)


def three(inputs: int = 3, **changes: object) -> UNet:
    return unet(in_channels=inputs, out_channels=3, **changes)


def parts(name: str) -> tuple[FirstStage, UNet, Conditioner]:
    """First stage, UNet and conditioner of a family; its heads are those of the published one."""
    spatial = InpaintingConditioner(InpaintingConditionerConfig())
    black = InpaintingConditionerConfig(
        latent_channels=3, order="mask_last", signed_mask=True, masked_value=-1.0
    )
    wide = {"block_out_channels": (64, 128), "attention_head_dim": 64}
    linear = {**wide, "use_linear_projection": True}
    match name:
        case "sd1":
            return kl(), attending(), clip()
        case "sd1-inpainting":
            return kl(), attending(in_channels=9), HybridConditioner(clip(), spatial)
        case "sd2":
            return kl(), attending(**linear), open_clip()
        case "sd2-inpainting":
            both = HybridConditioner(open_clip(), spatial)
            return kl(), attending(in_channels=9, **linear), both
        case "ldm-unconditional":
            return vq(), three(attention_head_dim=32), Unconditional()
        case "ldm-unconditional-kl":
            options = {"resblock_updown": True, "resnet_time_scale_shift": "scale_shift"}
            return kl(), unet(attention_levels=(True, True), **options), Unconditional()
        case "ldm-class":
            return vq(), three(cross_attention_dim=CONTEXT, num_attention_heads=1), classes()
        case "ldm-text":
            return kl(), attending(), text()
        case "ldm-layout":
            depth = {"transformer_layers_per_block": 3, "attention_head_dim": 32}
            return vq(), three(cross_attention_dim=CONTEXT, **depth), layout()
        case "ldm-super-resolution":
            return (
                vq(),
                three(6, attention_head_dim=32),
                LowResConditioner(LowResConditionerConfig()),
            )
        case "ldm-inpainting":
            stage = vq(mid_attention=False)
            return stage, three(7, resblock_updown=True), InpaintingConditioner(black)
        case "ldm-semantic":
            config = SemanticMapConditionerConfig(classes=12)
            levels = {"attention_levels": (False, False)}
            return vq(), three(6, **levels), SemanticMapConditioner(config)
        case _:
            raise AssertionError(name)


ENDS = {"ldm-layout": 0.0205, "ldm-inpainting": 0.0205, "ldm-semantic": 0.0205}
ENDS |= {"ldm-super-resolution": 0.0155, "ldm-unconditional-kl": 0.0155}
NAMES = (
    *("sd1", "sd1-inpainting", "sd2", "sd2-inpainting", "ldm-unconditional"),
    *("ldm-unconditional-kl", "ldm-class", "ldm-text", "ldm-layout", "ldm-super-resolution"),
    *("ldm-inpainting", "ldm-semantic"),
)


def build(name: str) -> LatentDiffusion:
    """A model whose file alone tells all that is particular to it."""
    torch.manual_seed(0)
    first_stage, network, conditioner = parts(name)
    size = 768 if name == "sd2" else 512 if name.startswith("sd") else 256
    noted = {"sample_size": size // first_stage.factor}
    network = UNet(network.config.model_copy(update=noted))
    stable = name.startswith("sd") or name == "ldm-text"
    prediction = "v_prediction" if name == "sd2" else "epsilon"
    schedule = ScheduleConfig(
        beta_start=0.00085 if stable else 0.0015,
        beta_end=0.012 if stable else ENDS.get(name, 0.0195),
        prediction_type=prediction,
        steps_offset=1,
        set_alpha_to_one=False,
    )
    scale = 0.18215 if stable else 0.5 if name == "ldm-unconditional-kl" else 1.0
    model = LatentDiffusion(
        first_stage,
        network,
        conditioner,
        schedule,
        LatentNormalization.from_scale_factor(scale),
        (size, size),
    )
    liven(model)
    return model.eval()


@torch.no_grad()
def liven(module: nn.Module) -> None:
    """Give every tensor random numbers, so that no two can be mistaken for one another."""
    for parameter in module.parameters():
        parameter.normal_()
