"""Latent consistency models, and LoRAs that make one of a model, draw what diffusers draws."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from benchmarks.random_models import liven
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from reference_pipelines import (
    MOST,
    SCHEDULE,
    SEED,
    autoencoder,
    bytes_of,
    differ,
    noise,
    stable_diffusion,
    text_model,
    tokenizer,
    unet,
)
from torch import Tensor

from mezzotint.generation.pipeline import load
from mezzotint.rng import SampleNoise

PROMPT = "a red apple on a table, sharp"
SHAPE = (4, 8, 8)


@pytest.fixture
def count_noise(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Let LCMScheduler draw our noise of its steps; calling the fixture begins at the first."""
    step = [0]

    def drawn(shape: Any, **_: Any) -> Tensor:
        step[0] += 1
        return SampleNoise([SEED]).normal(SHAPE, step[0] - 1)

    monkeypatch.setattr("diffusers.schedulers.scheduling_lcm.randn_tensor", drawn)
    return lambda: step.__setitem__(0, 0)


@pytest.fixture(scope="module")
def consistency_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("lcm") / "lcm"
    text, plain = text_model("sd1"), unet("sd1").config
    told = {key: value for key, value in plain.items() if not key.startswith("_")}
    network = diffusers.UNet2DConditionModel(**told | {"time_cond_proj_dim": 256})
    for seed, module in enumerate((text, network)):
        liven(module, seed)
    pipeline = diffusers.LatentConsistencyModelPipeline(
        vae=autoencoder().eval(),
        text_encoder=text.eval(),
        tokenizer=tokenizer(folder.with_name("tokenizer"), "sd1"),
        unet=network.eval(),
        scheduler=diffusers.LCMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=True),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder)
    return pipeline, folder


@pytest.mark.parametrize("scale", [1.0, 8.5])
@pytest.mark.parametrize("steps", [1, 3, 4])
def test_a_consistency_model(consistency_model, count_noise, steps: int, scale: float) -> None:
    theirs, folder = consistency_model
    count_noise()
    with torch.no_grad():
        reference = theirs(
            PROMPT,
            latents=noise(8, 4),
            num_inference_steps=steps,
            guidance_scale=scale,
            output_type="np",
        ).images[0]
    ours = load(folder, precision="float32", device="cpu")
    asked = {"prompt": PROMPT, "seed": SEED, "guidance_scale": scale}
    drawn = ours.generate(**asked, steps=steps)[0]
    assert drawn.request.sampler == "lcm"
    assert differ(drawn.image, bytes_of(reference)) <= MOST
    other = ours.generate(**asked, steps=steps, sampler="ddim")[0]
    assert steps == 1 or differ(other.image, bytes_of(reference)) > MOST


def test_its_software_takes_four_steps(consistency_model) -> None:
    request = load(consistency_model[1], precision="float32").request(prompt=PROMPT)
    assert (request.steps, request.sampler, request.guidance_scale) == (4, "lcm", 8.5)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("scale", [1.0, 1.8])
def test_a_lora_makes_one_of_an_ordinary_model(tmp_path, count_noise, scale: float) -> None:
    """LCM-LoRA (arXiv 2311.05556): attention, ResBlocks, feed-forward and resampling layers."""
    folder = tmp_path / "sd1"
    theirs = stable_diffusion("sd1", folder)
    layers = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj"]
    layers += ["ff.net.2", "conv1", "conv2", "conv_shortcut", "downsamplers.0.conv"]
    layers += ["upsamplers.0.conv", "time_emb_proj"]
    torch.manual_seed(1)
    lora = LoraConfig(r=4, lora_alpha=4, target_modules=layers, init_lora_weights=False)
    theirs.unet.add_adapter(lora)
    weights = get_peft_model_state_dict(theirs.unet, adapter_name="default")
    diffusers.StableDiffusionPipeline.save_lora_weights(tmp_path / "lora", weights)
    theirs.scheduler = diffusers.LCMScheduler.from_config(theirs.scheduler.config)
    count_noise()
    with torch.no_grad():
        reference = theirs(
            PROMPT,
            latents=noise(8, 4),
            num_inference_steps=4,
            guidance_scale=scale,
            output_type="np",
        ).images[0]
    uses = [{"name": str(tmp_path / "lora" / "pytorch_lora_weights.safetensors")}]
    drawn = load(folder, precision="float32", device="cpu").generate(
        PROMPT, seed=SEED, steps=4, guidance_scale=scale, sampler="lcm", adapters=uses
    )
    assert differ(drawn[0].image, bytes_of(reference)) <= MOST
