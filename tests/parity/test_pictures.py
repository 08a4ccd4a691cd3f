"""Public layouts draw what diffusers draws from the same noise, however they lie on the disk."""

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from reference_pipelines import (
    KINDS,
    MOST,
    SCHEDULERS,
    SEED,
    STEPS,
    bytes_of,
    mask,
    noise_is,
    photograph,
    scheduler,
    stable_diffusion,
)
from torch import Tensor

from mezzotint.checkpoints.load import load_any
from mezzotint.checkpoints.single_file import save_single_file
from mezzotint.diffusion.names import DIFFUSERS
from mezzotint.generation.pipeline import Pipeline, load
from mezzotint.rng import SampleNoise

# diffusers turns lists of tensors into arrays in a way that numpy deprecates
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

PROMPT, NEGATIVE = "a red apple on a table, sharp", "blurry"
SCALE = 7.5
LAYOUTS = ("folder", ".safetensors", ".ckpt")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: tmp_path_factory.mktemp(kind) / kind for kind in KINDS}


@pytest.fixture(scope="module")
def references(folders: dict[str, Path]) -> dict[str, Any]:
    return {kind: stable_diffusion(kind, folder) for kind, folder in folders.items()}


@pytest.fixture(scope="module")
def pipelines(
    references: dict[str, Any], folders: dict[str, Path]
) -> dict[tuple[str, str], Pipeline]:
    """Each kind in each of the three layouts."""
    found: dict[tuple[str, str], Pipeline] = {}
    for kind, folder in folders.items():
        found[kind, "folder"] = load(folder, precision="float32", device="cpu")
        model = load_any(folder, dtype=None).model
        for suffix in LAYOUTS[1:]:
            path = folder.with_name(f"{kind}{suffix}")
            save_single_file(model, path)
            found[kind, suffix] = load(path, precision="float32", device="cpu")
    return found


def noise() -> Tensor:
    return SampleNoise([SEED]).normal((4, 8, 8))


def common(name: str) -> dict[str, Any]:
    return {
        "prompt": PROMPT,
        "negative_prompt": NEGATIVE,
        "seed": SEED,
        "steps": STEPS,
        "guidance_scale": SCALE,
        "sampler": DIFFUSERS[name],
        "spacing": "leading",
    }


def theirs(pipeline: Any, name: str, kind: str, **extra: Any) -> np.ndarray:
    pipeline.scheduler = scheduler(name, "v_prediction" if kind == "sd2-v" else "epsilon")
    with noise_is(noise()), torch.no_grad():
        found = pipeline(
            prompt=PROMPT,
            negative_prompt=NEGATIVE,
            num_inference_steps=STEPS,
            guidance_scale=SCALE,
            output_type="np",
            **extra,
        )
    return bytes_of(found.images[0])


def differ(image: Any, reference: np.ndarray) -> int:
    # the smallest part of what random networks draw would tell nothing
    assert reference.std() > 10
    return int(abs(np.asarray(image, dtype=int) - reference).max())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("kind", ["sd1", "sd2", "sd2-v"])
def test_text_to_image(references, pipelines, kind: str, name: str, layout: str) -> None:
    reference = theirs(references[kind], name, kind, latents=noise())
    drawn = pipelines[kind, layout].generate(**common(name))[0]
    assert differ(drawn.image, reference) <= MOST


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("kind", ["sd1", "sd2", "sd2-v"])
def test_image_to_image(references, pipelines, kind: str, name: str, layout: str) -> None:
    # diffusers cuts the first of PNDM's steps, which is made twice, in two where it begins later,
    # and from then on asks its network at one noise level about a state at another
    strength = 1.0 if name == "PNDMScheduler" else 0.6
    pipeline = diffusers.StableDiffusionImg2ImgPipeline(**references[kind].components)
    pipeline.set_progress_bar_config(disable=True)
    reference = theirs(pipeline, name, kind, image=photograph(), strength=strength)
    drawn = pipelines[kind, layout].generate(**common(name), image=photograph(), strength=strength)[
        0
    ]
    assert differ(drawn.image, reference) <= MOST


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("kind", ["sd1-inpainting", "sd2-inpainting", "sd1"])
def test_inpainting(references, pipelines, kind: str, name: str, layout: str) -> None:
    """With networks that are told the mask, and with one that is not."""
    pipeline = references[kind]
    if kind == "sd1":
        pipeline = diffusers.StableDiffusionInpaintPipeline(**pipeline.components)
        pipeline.set_progress_bar_config(disable=True)
    size = {"height": 64, "width": 64}
    reference = theirs(
        pipeline, name, kind, image=photograph(), mask_image=mask(), strength=1.0, **size
    )
    drawn = pipelines[kind, layout].generate(**common(name), image=photograph(), mask=mask())[0]
    kept = np.asarray(mask()) == 0
    picture = np.asarray(photograph(), dtype=int)
    assert (np.asarray(drawn.image, dtype=int)[kept] == picture[kept]).all()
    reference[kept] = picture[kept]  # which diffusers' own networks do not keep
    assert differ(drawn.image, reference) <= MOST
