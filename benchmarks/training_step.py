"""A step of training either stage, beside a plain loop around a peer's networks.

    python -m benchmarks.training_step diffusion
    python -m benchmarks.training_step diffusion --peer diffusers-autocast
    python -m benchmarks.training_step autoencoder --peer original
    python -m benchmarks.training_step diffusion --device cuda --batch 64

``diffusion`` is the LDM-4 of 274 M parameters (recipe paper-celebahq-ldm-4) on latents that are
kept; the peer is diffusers' UNet2DModel with torch's AdamW and no average of its weights, which
Mezzotint's step has. ``autoencoder`` is recipe paper-kl-f8 at 256 x 256, from when its
discriminator takes part; the peer is the original network (stable-diffusion-sdkit) or diffusers',
in a plain loop with the same loss, discriminator and optimizers. Weights are random and shared. It
needs the extra "dev", and for the diffusion model 16 GB of memory.
"""

import itertools
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.plain_training import (
    PlainAutoencoder,
    PlainDiffusion,
    original_autoencoder,
    peer_of,
)
from benchmarks.random_models import liven
from benchmarks.side_by_side import (
    Comparison,
    difference,
    execution_of,
    finish,
    must_agree,
    options_parser,
    side_by_side,
)
from mezzotint.conditioning.base import Unconditional
from mezzotint.config import apply_overrides
from mezzotint.data.emoji import EmojiData, EmojiDataConfig
from mezzotint.data.latents import build_latent_cache
from mezzotint.device import Execution, autocast, keep_freed_memory, precision_name
from mezzotint.latent_diffusion import LatentDiffusion, LatentNormalization
from mezzotint.models.autoencoder import AutoencoderKL, AutoencoderKLConfig
from mezzotint.models.unet import UNet
from mezzotint.studies.speed import count_flops
from mezzotint.training.autoencoder import AutoencoderTask
from mezzotint.training.diffusion import DiffusionTask
from mezzotint.training.pixel_task import to_pixels
from mezzotint.training.recipe import AutoencoderRecipe, DiffusionRecipe
from mezzotint.training.run import load_recipe

PEERS = {
    "diffusers": "diffusers, float32, in a plain loop",
    "diffusers-autocast": "diffusers, bfloat16 autocast, in a plain loop",
    "original": "the original networks, float32, in a plain loop",
}
# a small first stage, f = 4: the latents are kept, so it takes no part in a step
STAGE = AutoencoderKLConfig(block_out_channels=(32, 32, 32), layers_per_block=1, latent_channels=3)
STAGES = {
    "diffusion": ("diffusers", "diffusers-autocast"),
    "autoencoder": ("diffusers", "diffusers-autocast", "original"),
}
# keys of the recipe that say how Mezzotint works, or what the peer's networks and data follow
SHARED = ("channels_last", "run.", "optimizer.", "unet.", "model.", "data.")
WANTED = {
    ("diffusion", "diffusers"): 0.47,
    ("diffusion", "diffusers-autocast"): 0.9,
    ("autoencoder", "original"): 0.6,
}


def recipe_of(options: Namespace) -> AutoencoderRecipe | DiffusionRecipe:
    """Return the recipe of the paper's model, on emoji, which are at hand; or a tiny one."""
    diffusion = options.stage == "diffusion"
    recipe = load_recipe("paper-celebahq-ldm-4" if diffusion else "paper-kl-f8")
    told = recipe.to_dict()
    told["data"] = {"kind": "emoji", "subset": "demo-candidates-16", "resolution": 256}
    told["batch_size"], told["precision"] = options.batch, options.precision
    if options.tiny:
        told["data"]["resolution"] = 32
        told["unet" if diffusion else "model"] |= {
            "block_out_channels": [32, 32, 64, 64],
            "layers_per_block": 1,
        }
    if not diffusion:
        told["patch"] = None
        told["loss"]["adversarial"]["start_step"] = 0
        if options.tiny:
            told["loss"]["adversarial"]["discriminator"] |= {"channels": 16, "layers": 2}
    return type(recipe).from_dict(apply_overrides(told, options.set or []))


def diffusion_sides(
    recipe: DiffusionRecipe, options: Namespace, execution: Execution, folder: Path
) -> tuple[DiffusionTask, PlainDiffusion, dict[str, Any]]:
    """Return Mezzotint's task, the peer's loop, and what of a `Comparison` is known already."""
    assert isinstance(recipe.data, EmojiDataConfig)
    data, stage = EmojiData(recipe.data), AutoencoderKL(STAGE).eval()
    normalization = LatentNormalization.from_scale_factor(1.0)
    cache = build_latent_cache(
        data,
        stage,
        variants=recipe.latent_variants,
        seed=0,
        folder=folder,
        device=torch.device("cpu"),
        normalization=normalization,
    )
    side = recipe.data.resolution
    model = LatentDiffusion(
        stage, UNet(recipe.unet), Unconditional(), recipe.schedule, normalization, (side, side)
    )
    liven(model.unet, 0)
    unet = peer_of(model.unet).to(execution.device)
    generator = torch.Generator().manual_seed(0)
    shape = (options.batch, *model.latent_shape(side, side))
    x = torch.randn(shape, generator=generator)
    there, t = x.to(execution.device), torch.full((options.batch,), 500, device=execution.device)
    task = DiffusionTask(recipe, model, data, cache, execution)
    with torch.no_grad():
        with autocast(execution):
            ours = model.unet(there, t)
        apart = difference(ours, unet(there, t).sample)
    half = options.peer == "diffusers-autocast"
    plain = PlainDiffusion(unet, there, recipe.optimizer, half=half)
    config = recipe.unet
    count = sum(p.numel() for p in model.unet.parameters()) / 1e6
    known = {
        "what": f"training step, UNet of {count:.0f} M parameters, batch {options.batch}",
        "flops": count_flops(lambda: UNet(config), x, t.float().cpu(), backward=True),
        "difference": apart,
    }
    return task, plain, known


def autoencoder_sides(
    recipe: AutoencoderRecipe, options: Namespace, execution: Execution
) -> tuple[AutoencoderTask, PlainAutoencoder, dict[str, Any]]:
    """Return Mezzotint's task, the peer's loop, and what of a `Comparison` is known already."""
    assert isinstance(recipe.data, EmojiDataConfig)
    data = EmojiData(recipe.data)
    task = AutoencoderTask(recipe, data, execution)
    model = task.model
    assert isinstance(model, AutoencoderKL)
    liven(model, 0)
    network = original_autoencoder(model) if options.peer == "original" else peer_of(model)
    images = to_pixels(
        torch.stack([data.load(k).image for k in range(options.batch)]), execution.device
    )
    half = options.peer == "diffusers-autocast"
    plain = PlainAutoencoder(network.to(execution.device), images, recipe, half=half)
    apart = _apart(model, plain, images, execution)
    count = sum(p.numel() for p in model.parameters()) / 1e6
    side = recipe.data.resolution
    what = f"training step, autoencoder of {count:.0f} M parameters with its discriminator"
    known = {"what": f"{what}, {options.batch} x {side} x {side}", "difference": apart}
    return task, plain, known


@torch.no_grad()
def _apart(
    model: AutoencoderKL, plain: PlainAutoencoder, images: Tensor, execution: Execution
) -> float:
    """By how much the reconstructions of both differ."""
    with autocast(execution):
        ours = model.decode(model.encode(images).mode())
    posterior, decode = plain.autoencode(images)
    return difference(ours, decode(posterior.mode()))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write the result."""
    parser = options_parser(__doc__, tuple(PEERS))
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--set", action="append", help="a dotted key of the recipe, KEY=VALUE")
    options = parser.parse_args(arguments)
    if options.peer not in STAGES[options.stage]:
        parser.error(f"--peer: of the stage {options.stage}, one of {STAGES[options.stage]}")
    for told in options.set or ():
        if not told.startswith(SHARED):
            parser.error(
                f"--set {told}: the peer's loop would not follow; only keys that begin with"
                f" {', '.join(SHARED)} leave both the same work"
            )
    execution = execution_of(options)
    if execution.device.type == "cpu":
        keep_freed_memory()  # as training does; the peer gains by it too
    recipe = recipe_of(options)
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(recipe, DiffusionRecipe):
            task, plain, known = diffusion_sides(recipe, options, execution, Path(folder))
        else:
            task, plain, known = autoencoder_sides(recipe, options, execution)
        must_agree(known["difference"], execution, PEERS[options.peer])
        steps = itertools.count(1)
        times = side_by_side(
            lambda: task.train_step(next(steps), 0.0), plain.step, options, execution
        )
        task.batches.close()
    name = precision_name(execution.precision)
    compared = Comparison(
        mezzotint=", ".join([name, "float32 weights", *(options.set or ())]),
        peer=PEERS[options.peer],
        wanted=WANTED.get((options.stage, options.peer)),
        images=options.batch,
        **known,
        **times,
    )
    finish("training_step", [compared], options, execution)


if __name__ == "__main__":
    main()
