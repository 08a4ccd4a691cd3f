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

import torch
from torch import Tensor

from benchmarks.peers import NETWORK_PEERS, peer_network
from benchmarks.random_models import stable_diffusion
from benchmarks.side_by_side import (
    compare_networks,
    execution_of,
    finish,
    options_parser,
    work_folder,
)
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

        shape = f"{x.shape[0]} x {x.shape[1]} x {x.shape[2]} x {x.shape[3]}"
        config = pipeline.model.unet.config
        what = f"UNet step, latents {shape}"
        flops = count_flops(lambda: UNet(config), *(e.float() for e in example))
        compared = compare_networks(
            ours,
            theirs,
            options,
            execution,
            WANTED,
            what=what,
            flops=flops,
            near=options.quantization,
        )
    finish("unet_step", [compared], options, execution)


if __name__ == "__main__":
    main()
