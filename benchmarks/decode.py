"""Decoding a latent of Stable Diffusion 1.5 to 512 x 512 pixels, beside diffusers and OpenVINO.

    python -m benchmarks.decode --precision float32
    python -m benchmarks.decode --precision bfloat16
    python -m benchmarks.decode --precision bfloat16 --peer openvino

The weights are random, and the same for both; see `benchmarks.unet_step`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from benchmarks.peers import NETWORK_PEERS, first_of, peer_network
from benchmarks.random_models import stable_diffusion
from benchmarks.side_by_side import (
    compare_networks,
    execution_of,
    finish,
    options_parser,
    work_folder,
)
from mezzotint.generation.pipeline import load
from mezzotint.models.autoencoder import AutoencoderKL, AutoencoderKLConfig
from mezzotint.studies.speed import count_flops

WANTED = {
    ("diffusers", "float32"): 0.40,
    ("diffusers", "bfloat16"): 0.40,
    ("openvino", "bfloat16"): 1.0,
}


class _Decoding(nn.Module):
    """An autoencoder of ours or of diffusers', called to decode."""

    def __init__(self, autoencoder: nn.Module) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, z: Tensor) -> Tensor:
        return first_of(self.autoencoder.decode(z))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write the result."""
    parser = options_parser(__doc__, NETWORK_PEERS)
    parser.add_argument("--batch", type=int, default=1, help="pictures")
    options = parser.parse_args(arguments)
    execution = execution_of(options)
    with work_folder(options) as work:
        import diffusers

        folder = stable_diffusion(work, tiny=options.tiny)
        pipeline = load(folder, device=options.device, precision=options.precision)
        model = pipeline.model
        shape = (options.batch, *model.latent_shape(*model.image_size))
        z = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        vae = diffusers.AutoencoderKL.from_pretrained(folder, subfolder="vae").float().eval()
        scaled = z / vae.config.scaling_factor
        theirs = peer_network(_Decoding(vae).eval(), (scaled,), options.peer, execution)
        del vae
        there = z.to(execution.device)

        @torch.inference_mode()
        def ours() -> Tensor:
            with pipeline.running():
                return model.decode(there).float()

        config = model.first_stage.config
        assert isinstance(config, AutoencoderKLConfig)
        height, width = model.image_size
        what = f"decoding {options.batch} x {height} x {width}"
        flops = count_flops(lambda: _Decoding(AutoencoderKL(config)), z)
        compared = compare_networks(
            ours, theirs, options, execution, WANTED, what=what, flops=flops
        )
    finish("decode", [compared], options, execution)


if __name__ == "__main__":
    main()
