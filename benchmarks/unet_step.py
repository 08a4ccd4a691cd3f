"""One step of Stable Diffusion 1.5's UNet at 512 x 512 under guidance, beside diffusers, OpenVINO.

    python -m benchmarks.unet_step --precision float32
    python -m benchmarks.unet_step --precision bfloat16 --peer diffusers-best
    python -m benchmarks.unet_step --precision bfloat16 --peer openvino
    python -m benchmarks.unet_step --precision bfloat16 --quantization int8 --peer openvino
    python -m benchmarks.unet_step --device cuda --peer diffusers-compiled --batch 64

The weights are random, and the same for both: a folder of diffusers', which `mezzotint.load` opens
as it would any. Each picture is two samples, with its condition and without. In float32 both must
give the same within 1e-4 of the largest value, but in int8. It needs the extra "dev", 2 GB of disk
and 12 GB of memory.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.peers import NETWORK_PEERS, peer_network, peer_words
from benchmarks.random_models import build
from benchmarks.side_by_side import (
    Comparison,
    difference,
    execution_of,
    finish,
    must_agree,
    options_parser,
    side_by_side,
    work_folder,
)
from mezzotint.device import precision_name
from mezzotint.generation.pipeline import Pipeline, load
from mezzotint.models.unet import UNet
from mezzotint.studies.speed import count_flops

WANTED = {
    ("diffusers", "float32"): 0.55,
    ("diffusers-best", "bfloat16"): 0.65,
    ("openvino", "bfloat16"): 1.0,
}


def inputs_of(pipeline: Pipeline, pictures: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return noisy latents, times and contexts of so many pictures under guidance."""
    generator = torch.Generator().manual_seed(0)
    count, width = 2 * pictures, pipeline.model.unet.config.cross_attention_dim
    assert width is not None
    shape = pipeline.model.latent_shape(*pipeline.model.image_size)
    x = torch.randn(count, *shape, generator=generator)
    context = torch.randn(count, 77, width, generator=generator)
    return x, torch.full((count,), 500), context


def stable_diffusion(work: Path, *, tiny: bool) -> Path:
    """Return the folder of Stable Diffusion 1.5 with random weights, written if it is not there."""
    folder = work / ("sd1-tiny" if tiny else "sd1")
    if not (folder / "model_index.json").is_file():
        build("sd1", folder, tiny=tiny)
    return folder


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write the result."""
    parser = options_parser(__doc__, NETWORK_PEERS)
    parser.add_argument("--batch", type=int, default=1, help="pictures; each is two samples")
    parser.add_argument(
        "--quantization", choices=("int8",), help="Mezzotint's large weights in 8 bits"
    )
    options = parser.parse_args(arguments)
    execution = execution_of(options)
    with work_folder(options) as work:
        import diffusers

        folder = stable_diffusion(work, tiny=options.tiny)
        pipeline = load(
            folder,
            device=options.device,
            precision=options.precision,
            quantization=options.quantization or "none",
        )
        example = inputs_of(pipeline, options.batch)
        unet = (
            diffusers.UNet2DConditionModel.from_pretrained(folder, subfolder="unet").float().eval()
        )
        theirs = peer_network(unet, example, options.peer, execution)
        del unet
        x, t, context = (tensor.to(execution.device) for tensor in example)

        @torch.inference_mode()
        def ours() -> Tensor:
            with pipeline.running():
                return pipeline.model.unet(x, t, context=context).float()

        peer = peer_words(options.peer, execution.precision)
        near = options.quantization is not None
        apart = must_agree(difference(ours(), theirs()), execution, peer, near=near)
        shape = f"{x.shape[0]} x {x.shape[1]} x {x.shape[2]} x {x.shape[3]}"
        config = pipeline.model.unet.config
        name = precision_name(execution.precision)
        compared = Comparison(
            what=f"UNet step, latents {shape}",
            mezzotint=f"{name}, {options.quantization}" if near else name,
            peer=peer,
            flops=count_flops(lambda: UNet(config), *(e.float() for e in example)),
            difference=apart,
            wanted=None if near else WANTED.get((options.peer, name)),
            images=options.batch,
            **side_by_side(ours, theirs, options, execution),
        )
    finish("unet_step", [compared], options, execution)


if __name__ == "__main__":
    main()
