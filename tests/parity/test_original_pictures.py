"""The original latent diffusion models draw what the original code draws.

diffusers has no pipelines of these. So a file in the original layout is made of the original
networks, with a YAML in the original's words, and drawn by the original's own DDIM sampler.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import (
    LDMBertConfig,
    LDMBertModel,
)
from PIL import Image
from reference_pipelines import MOST, SEED, STEPS, differ, liven, mask, noise, photograph
from torch import Tensor, nn
from torch.nn import functional as F

from mezzotint.conditioning.layout import LayoutConditioner
from mezzotint.generation.pipeline import Pipeline, load
from mezzotint.generation.request import LayoutBox

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
    # the original checkpoints every plain attention block through a function that is old now
    pytest.mark.filterwarnings("ignore:torch.get_autocast_gpu_dtype:DeprecationWarning"),
]


class Original(nn.Module):
    """A model of the original code: its networks under the names that its checkpoints have."""

    def __init__(self, unet: dict[str, Any], cond_stage: nn.Module | None) -> None:
        super().__init__()
        from ldm.modules.diffusionmodules.model import Decoder, Encoder
        from ldm.modules.diffusionmodules.openaimodel import UNetModel
        from taming.modules.vqvae.quantize import VectorQuantizer2

        self.model = nn.Module()
        self.model.diffusion_model = UNetModel(**unet)
        stage = self.first_stage_model = nn.Module()
        stage.encoder, stage.decoder = Encoder(**DDCONFIG), Decoder(**DDCONFIG)
        stage.quant_conv, stage.post_quant_conv = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        stage.quantize = VectorQuantizer2(64, 3, 0.25, legacy=False, sane_index_shape=True)
        if cond_stage is not None:
            self.cond_stage_model = cond_stage
        liven(self, 5)
        with torch.no_grad():
            self.first_stage_model.quantize.embedding.weight.mul_(2.0)
        self.eval()

    def encode(self, image: Tensor) -> Tensor:
        stage = self.first_stage_model
        return stage.quant_conv(stage.encoder(image))

    def decode(self, z: Tensor) -> np.ndarray:
        stage = self.first_stage_model
        pixels = stage.decoder(stage.post_quant_conv(stage.quantize(z)[0]))
        return ((pixels[0].permute(1, 2, 0) + 1) * 127.5).round().clamp(0, 255).numpy().astype(int)

    @torch.no_grad()
    def draw(
        self,
        predict: Callable[[Tensor, Tensor, Any], Tensor],
        condition: Any,
        side: int,
        *,
        scale: float = 1.0,
        null: Any = None,
    ) -> np.ndarray:
        """Sample with the original's own DDIM."""
        from ldm.models.diffusion.ddim import DDIMSampler

        betas = torch.linspace(0.0015**0.5, LINEAR_END**0.5, 1000, dtype=torch.float64) ** 2
        cumprod = (1 - betas).cumprod(0)
        model = SimpleNamespace(
            num_timesteps=1000,
            betas=betas.float(),
            alphas_cumprod=cumprod.float(),
            alphas_cumprod_prev=torch.cat([torch.ones(1), cumprod[:-1].float()]),
            device="cpu",
            parameterization="eps",
            apply_model=predict,
        )
        latents, _ = DDIMSampler(model).sample(
            STEPS,
            1,
            (3, side, side),
            conditioning=condition,
            x_T=noise(side),
            unconditional_guidance_scale=scale,
            unconditional_conditioning=null,
            eta=0.0,
            verbose=False,
        )
        return self.decode(latents)


LINEAR_END = 0.0205
DDCONFIG: dict[str, Any] = {
    "double_z": False,
    "z_channels": 3,
    "resolution": 64,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "ch_mult": [1, 2, 2],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "dropout": 0.0,
}
UNET: dict[str, Any] = {
    "image_size": 16,
    "in_channels": 3,
    "out_channels": 3,
    "model_channels": 32,
    "attention_resolutions": [2],
    "num_res_blocks": 1,
    "channel_mult": [1, 2],
}


def write(
    original: Original,
    path: Path,
    unet: dict[str, Any],
    key: str,
    kind: str,
    cond: Any,
    more: Mapping[str, Tensor] | None = None,
) -> Pipeline:
    """Write a Lightning checkpoint and the YAML in the original's words, and load both."""
    config = {
        "model": {
            "base_learning_rate": 1.0e-06,
            "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
            "params": {
                "linear_start": 0.0015,
                "linear_end": LINEAR_END,
                "log_every_t": 100,
                "timesteps": 1000,
                "loss_type": "l1",
                "first_stage_key": "image",
                "cond_stage_key": key,
                "image_size": 16,
                "channels": 3,
                "conditioning_key": kind,
                "cond_stage_trainable": True,
                "unet_config": {
                    "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
                    "params": unet,
                },
                "first_stage_config": {
                    "target": "ldm.models.autoencoder.VQModelInterface",
                    "params": {
                        "embed_dim": 3,
                        "n_embed": 64,
                        "ddconfig": DDCONFIG,
                        "lossconfig": {"target": "torch.nn.Identity"},
                    },
                },
                "cond_stage_config": cond,
            },
        }
    }
    path.with_suffix(".yaml").write_text(yaml.safe_dump(config))
    state = {**original.state_dict(), **(more or {})}
    torch.save({"epoch": 3, "global_step": 1000, "state_dict": state, "callbacks": {}}, path)
    return load(path, precision="float32", device="cpu")


SAMPLING: dict[str, Any] = {
    "seed": SEED,
    "steps": STEPS,
    "sampler": "ddim",
    "spacing": "leading",
}


def test_class_conditional(tmp_path: Path) -> None:
    embedder = nn.Module()
    embedder.embedding = nn.Embedding(11, 24)  # ten classes and the null
    unet = UNET | {"num_heads": 1, "use_spatial_transformer": True, "context_dim": 24}
    original = Original(unet, embedder)
    cond = {
        "target": "ldm.modules.encoders.modules.ClassEmbedder",
        "params": {"n_classes": 11, "embed_dim": 24, "key": "class_label"},
    }
    ours = write(original, tmp_path / "cin.ckpt", unet, "class_label", "crossattn", cond)
    network = original.model.diffusion_model
    reference = original.draw(
        lambda x, t, c: network(x, t, context=c),
        embedder.embedding(torch.tensor([4]))[:, None],
        16,
        scale=3.0,
        null=embedder.embedding(torch.tensor([10]))[:, None],
    )
    drawn = ours.generate(class_label=4, guidance_scale=3.0, **SAMPLING)
    assert differ(drawn[0].image, reference) <= MOST


def test_semantic_synthesis(tmp_path: Path) -> None:
    rescaler = nn.Module()
    rescaler.channel_mapper = nn.Conv2d(12, 3, 1, bias=False)
    unet = UNET | {"in_channels": 6, "num_heads": 4}
    original = Original(unet, rescaler)
    cond = {
        "target": "ldm.modules.encoders.modules.SpatialRescaler",
        "params": {"n_stages": 2, "in_channels": 12, "out_channels": 3},
    }
    ours = write(original, tmp_path / "semantic.ckpt", unet, "segmentation", "concat", cond)
    classes = np.add.outer(np.arange(64) // 8, np.arange(64) // 11) % 12
    one_hot = F.one_hot(torch.from_numpy(classes), 12).permute(2, 0, 1)[None].float()
    for _ in range(2):
        one_hot = F.interpolate(one_hot, scale_factor=0.5, mode="bilinear")
    network = original.model.diffusion_model
    reference = original.draw(
        lambda x, t, c: network(torch.cat([x, c], dim=1), t), rescaler.channel_mapper(one_hot), 16
    )
    drawn = ours.generate(semantic_map=Image.fromarray(classes.astype(np.uint8)), **SAMPLING)
    assert differ(drawn[0].image, reference) <= MOST


def test_inpainting_with_seven_channels(tmp_path: Path) -> None:
    unet = UNET | {"in_channels": 7, "num_heads": 4, "resblock_updown": True}
    original = Original(unet, None)
    ours = write(
        original, tmp_path / "inpaint.ckpt", unet, "masked_image", "concat", "__is_first_stage__"
    )
    # as the original's script prepares them: all three in -1..1, the masked part black
    image = torch.from_numpy(np.asarray(photograph(), dtype=np.float32) / 255).permute(2, 0, 1)
    hole = torch.from_numpy(np.asarray(mask(), dtype=np.float32) / 255)[None]
    hole[hole < 0.5], hole[hole >= 0.5] = 0, 1
    masked = (1 - hole) * image
    with torch.no_grad():
        told = original.encode(masked[None] * 2 - 1)
    small = F.interpolate(hole[None] * 2 - 1, size=told.shape[-2:])
    network = original.model.diffusion_model
    reference = original.draw(
        lambda x, t, c: network(torch.cat([x, c], dim=1), t), torch.cat([told, small], dim=1), 16
    )
    drawn = ours.generate(image=photograph(), mask=mask(), **SAMPLING)
    kept = np.asarray(mask()) == 0
    assert (np.asarray(drawn[0].image)[kept] == np.asarray(photograph())[kept]).all()
    reference[kept] = np.asarray(photograph())[kept]  # as the original's script puts them back
    assert differ(drawn[0].image, reference) <= MOST


def original_names(bert: LDMBertModel) -> dict[str, Tensor]:
    """The weights of diffusers' transformer under the names of the original's."""
    state = bert.state_dict()
    count = bert.config.encoder_layers
    names = {
        "model.embed_tokens.weight": "token_emb.weight",
        "model.embed_positions.weight": "pos_emb.emb.weight",
        "model.layer_norm.weight": "norm.weight",
        "model.layer_norm.bias": "norm.bias",
        "to_logits.weight": "to_logits.weight",
        "to_logits.bias": "to_logits.bias",
    }
    for k in range(count):
        theirs = f"model.layers.{k}."
        attend, feed = f"attn_layers.layers.{2 * k}.", f"attn_layers.layers.{2 * k + 1}."
        for leaf in ("weight", "bias"):
            names |= {
                f"{theirs}self_attn_layer_norm.{leaf}": f"{attend}0.{leaf}",
                f"{theirs}self_attn.out_proj.{leaf}": f"{attend}1.to_out.{leaf}",
                f"{theirs}final_layer_norm.{leaf}": f"{feed}0.{leaf}",
                f"{theirs}fc1.{leaf}": f"{feed}1.net.0.0.{leaf}",
                f"{theirs}fc2.{leaf}": f"{feed}1.net.2.{leaf}",
            }
        for letter in "qkv":
            names[f"{theirs}self_attn.{letter}_proj.weight"] = f"{attend}1.to_{letter}.weight"
    assert names.keys() == state.keys()
    return {names[name]: tensor for name, tensor in state.items()}


def test_layout(tmp_path: Path) -> None:
    bert = LDMBertModel(
        LDMBertConfig(
            vocab_size=8192,
            max_position_embeddings=92,
            d_model=24,
            encoder_layers=2,
            encoder_ffn_dim=96,
            encoder_attention_heads=8,
            head_dim=64,
        )
    ).eval()
    liven(bert, 9)
    unet = UNET | {
        "num_head_channels": 32,
        "use_spatial_transformer": True,
        "transformer_depth": 2,
        "context_dim": 24,
    }
    # this package's network wants one width for each of the transformers' blocks
    original = Original(unet | {"context_dim": [24, 24]}, None)
    text = {
        f"cond_stage_model.transformer.{name}": tensor
        for name, tensor in original_names(bert).items()
    }
    cond = {
        "target": "ldm.modules.encoders.modules.BERTEmbedder",
        "params": {
            "n_embed": 24,
            "n_layer": 2,
            "vocab_size": 8192,
            "max_seq_len": 92,
            "use_tokenizer": False,
        },
    }
    path = tmp_path / "layout.ckpt"
    ours = write(original, path, unet, "coordinates_bbox", "crossattn", cond, text)
    boxes = [(17, (0.1, 0.2, 0.6, 0.9)), (305, (0.5, 0.0, 1.0, 0.45))]

    def token(x: float, y: float) -> int:
        bins = math.isqrt(8192)
        return round(y * (bins - 1)) * bins + round(x * (bins - 1))

    tokens = [
        number
        for label, (left, top, right, bottom) in boxes
        for number in (label, token(left, top), token(right, bottom))
    ]
    tokens += [8191] * (90 - len(tokens)) + [token(0, 0), token(1, 1)]
    with torch.no_grad():
        told = bert(torch.tensor([tokens]), return_dict=False)[0]
    network = original.model.diffusion_model
    reference = original.draw(lambda x, t, c: network(x, t, context=[c, c]), told, 16)
    assert isinstance(ours.model.conditioner, LayoutConditioner)
    layout = [LayoutBox(label=label, box=box) for label, box in boxes]
    drawn = ours.generate(layout=layout, guidance_scale=1.0, **SAMPLING)
    assert differ(drawn[0].image, reference) <= MOST
