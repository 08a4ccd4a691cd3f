"""A whole picture from a prompt by Stable Diffusion 1.5, beside diffusers.

    python -m benchmarks.text_to_image --precision float32
    python -m benchmarks.text_to_image --precision bfloat16
    python -m benchmarks.text_to_image --feature-reuse 3 --guidance-interval 0.5 5
    python -m benchmarks.text_to_image --peer diffusers-best

Both are loaded and warm; 512 x 512 pixels, 20 steps of DDIM, guidance 7.5, from the same noise and
random weights. In float32, without approximations, the pictures must be the same to within 2 of
255. Feature reuse and the interval of noise levels that are guided are Mezzotint's alone; where
they are asked for, pictures with and without them are measured in the same turns.
"""

import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.peers import PIPELINE_PEERS, diffusers_pipeline, peer_words, running
from benchmarks.random_models import stable_diffusion
from benchmarks.side_by_side import (
    Comparison,
    difference,
    each_beside,
    execution_of,
    finish,
    options_parser,
    work_folder,
)
from mezzotint.device import Execution, precision_name
from mezzotint.generation.pipeline import load
from mezzotint.generation.request import FeatureReuse
from mezzotint.rng import SampleNoise

PROMPT, SEED, SCALE = "a red apple on a table", 7, 7.5
AGREEMENT = 2 / 255
WANTED = {(False, "bfloat16"): 0.35, (True, "bfloat16"): 0.18}  # with approximations or without

Draw = Callable[..., Tensor]
"""From the pictures at once, the side in pixels and the steps to ``(B, H, W, 3)``, 0 to 255."""


def drawing_ours(folder: Path, options: Namespace) -> Draw:
    """Return how Mezzotint draws; what else it is told goes into the request."""
    pipeline = load(folder, device=options.device, precision=options.precision)

    def draw(batch: int, side: int, steps: int, **more: Any) -> Tensor:
        images = pipeline.generate(
            PROMPT,
            num_images=batch,
            batch_size=batch,
            seed=SEED,
            steps=steps,
            sampler="ddim",
            spacing="leading",
            guidance_scale=SCALE,
            width=side,
            height=side,
            **more,
        )
        return torch.from_numpy(np.stack([np.asarray(item.image) for item in images]))

    return draw


def drawing_theirs(folder: Path, options: Namespace, execution: Execution) -> Draw:
    """Return how diffusers draws."""
    pipeline = diffusers_pipeline(folder, options.peer, execution)
    factor = pipeline.vae_scale_factor
    channels = pipeline.unet.config.in_channels

    def draw(batch: int, side: int, steps: int) -> Tensor:
        noise = SampleNoise([SEED + k for k in range(batch)])
        latents = noise.normal((channels, side // factor, side // factor))
        with running(options.peer):
            images = pipeline(
                prompt=[PROMPT] * batch,
                num_inference_steps=steps,
                guidance_scale=SCALE,
                latents=latents.to(execution.device, pipeline.unet.dtype),
                width=side,
                height=side,
            ).images
        return torch.from_numpy(np.stack([np.asarray(image) for image in images]))

    return draw


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write the result."""
    parser = options_parser(__doc__, PIPELINE_PEERS)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=1, help="pictures at once")
    parser.add_argument("--feature-reuse", type=int, help="deep features in every N-th step")
    parser.add_argument("--guidance-interval", type=float, nargs=2, help="noise levels")
    options = parser.parse_args(arguments)
    execution = execution_of(options)
    more: dict[str, Any] = {}
    words: list[str] = []
    if options.feature_reuse:
        more["feature_reuse"] = FeatureReuse(interval=options.feature_reuse)
        words.append(f"feature reuse {options.feature_reuse}")
    if options.guidance_interval:
        low, high = more["guidance_interval"] = tuple(options.guidance_interval)
        words.append(f"guided from {low:g} to {high:g}")
    name = precision_name(execution.precision)
    peer = peer_words(options.peer, execution.precision)
    ways = {name: {}, **({", ".join([name, *words]): more} if more else {})}
    with work_folder(options) as work:
        folder = stable_diffusion(work, tiny=options.tiny)
        draw_ours = drawing_ours(folder, options)
        draw_theirs = drawing_theirs(folder, options, execution)
        size = options.batch, 64 if options.tiny else 512, options.steps
        calls = [partial(draw_ours, *size, **way) for way in ways.values()]
        theirs = draw_theirs(*size)
        apart = [difference(call(), theirs) for call in calls]
        if execution.precision is torch.float32 and "float32" in peer and not apart[0] <= AGREEMENT:
            sys.exit(
                f"the pictures differ by {apart[0]:.1e} of the largest value; expected at most"
                f" {AGREEMENT:.1e}: they are not the same"
            )
        # the pictures that were compared warmed both up
        times = each_beside(calls, partial(draw_theirs, *size), options, execution, warm_up=False)
    compared = [
        Comparison(
            what=f"drawing {size[0]} x {size[1]} x {size[1]}, {size[2]} steps",
            mezzotint=words,
            peer=peer,
            difference=far,
            wanted=WANTED.get((bool(way), name)) if options.peer == "diffusers" else None,
            images=options.batch,
            **measured,
        )
        for (words, way), far, measured in zip(ways.items(), apart, times, strict=True)
    ]
    finish("text_to_image", compared, options, execution)


if __name__ == "__main__":
    main()
