"""The original latent diffusion models draw what diffusers' pipelines of them draw.

The model is read from its folder and from single files. What diffusers has no pipeline for is in
`test_original_pictures.py`.
"""

from pathlib import Path

import diffusers
import pytest
from diffusers.pipelines.deprecated.latent_diffusion_uncond import (
    pipeline_latent_diffusion_uncond as unconditional_module,
)
from diffusers.pipelines.latent_diffusion import (
    pipeline_latent_diffusion_superresolution as super_resolution_module,
)
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import (
    LDMBertConfig,
    LDMBertModel,
)
from reference_pipelines import MOST, SEED, STEPS, bytes_of, differ, liven, noise, photograph
from transformers import BertTokenizer

from mezzotint.checkpoints.load import load_any
from mezzotint.checkpoints.single_file import save_single_file
from mezzotint.checkpoints.tokenizer_files import write_bert_tokenizer
from mezzotint.conditioning.vocabularies import bert_tokenizer
from mezzotint.generation.pipeline import Pipeline, load

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
    # the original checkpoints every plain attention block through a function that is old now
    pytest.mark.filterwarnings("ignore:torch.get_autocast_gpu_dtype:DeprecationWarning"),
]


def layouts(folder: Path) -> list[Pipeline]:
    """The model of a folder, and the same from both kinds of single files."""
    found = [load(folder, precision="float32", device="cpu")]
    model = load_any(folder, dtype=None).model
    for suffix in (".safetensors", ".ckpt"):
        path = folder.with_name(f"{folder.name}{suffix}")
        save_single_file(model, path)
        found.append(load(path, precision="float32", device="cpu"))
    return found


def vq_model() -> diffusers.VQModel:
    vq = diffusers.VQModel(
        block_out_channels=(32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=3,
        num_vq_embeddings=64,
        scaling_factor=1.0,
    )
    liven(vq, 1)
    return vq.eval()


def plain_unet(in_channels: int) -> diffusers.UNet2DModel:
    unet = diffusers.UNet2DModel(
        sample_size=16,
        in_channels=in_channels,
        out_channels=3,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=16,
    )
    liven(unet, 2)
    return unet.eval()


def ddim(end: float) -> diffusers.DDIMScheduler:
    return diffusers.DDIMScheduler(
        beta_start=0.0015,
        beta_end=end,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def test_text_to_image_with_bert(tmp_path: Path) -> None:
    bert = LDMBertModel(
        LDMBertConfig(
            d_model=32,
            encoder_layers=2,
            encoder_ffn_dim=128,
            encoder_attention_heads=4,
            head_dim=8,
        )
    )
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=8,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(32, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        scaling_factor=0.18215,
    )
    for seed, part in enumerate((bert, unet, vae)):
        liven(part, seed)
        part.eval()
    write_bert_tokenizer(bert_tokenizer(), tmp_path / "words")
    pipeline = diffusers.LDMTextToImagePipeline(
        vqvae=vae,
        bert=bert,
        tokenizer=BertTokenizer.from_pretrained(tmp_path / "words"),
        unet=unet,
        scheduler=ddim(0.012),
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(tmp_path / "ldm")
    prompt = "A virus monster, playing the guitar!"
    found = pipeline(
        prompt,
        num_inference_steps=STEPS,
        guidance_scale=5.0,
        latents=noise(8, 4),
        output_type="np",
    )
    reference = bytes_of(found.images[0])
    for ours in layouts(tmp_path / "ldm"):
        drawn = ours.generate(
            prompt, seed=SEED, steps=STEPS, guidance_scale=5.0, sampler="ddim", spacing="leading"
        )
        assert differ(drawn[0].image, reference) <= MOST


def test_unconditional(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = diffusers.LDMPipeline(vqvae=vq_model(), unet=plain_unet(3), scheduler=ddim(0.0195))
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(tmp_path / "ldm")
    monkeypatch.setattr(unconditional_module, "randn_tensor", lambda *_, **__: noise(16))
    reference = bytes_of(pipeline(num_inference_steps=STEPS, output_type="np").images[0])
    for ours in layouts(tmp_path / "ldm"):
        drawn = ours.generate(seed=SEED, steps=STEPS, sampler="ddim", spacing="leading")
        assert differ(drawn[0].image, reference) <= MOST


def test_super_resolution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = diffusers.LDMSuperResolutionPipeline(
        vqvae=vq_model(), unet=plain_unet(6), scheduler=ddim(0.0155)
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(tmp_path / "ldm")
    small = photograph(32)
    monkeypatch.setattr(super_resolution_module, "randn_tensor", lambda *_, **__: noise(32))
    found = pipeline(small, num_inference_steps=STEPS, output_type="np")
    reference = bytes_of(found.images[0])
    for ours in layouts(tmp_path / "ldm"):
        drawn = ours.generate(
            image=small, seed=SEED, steps=STEPS, sampler="ddim", spacing="leading"
        )
        assert drawn[0].image.size == (128, 128)
        assert differ(drawn[0].image, reference) <= MOST
