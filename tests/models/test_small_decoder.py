"""The small decoder's shape, and that it looks at normalised latents within bounds alone."""

import pytest
import torch

from mezzotint.errors import ConfigError
from mezzotint.models.small_decoder import SmallDecoder, SmallDecoderConfig


@pytest.mark.parametrize("blocks", [(1,), (2, 1), (0, 1, 1, 1)])
def test_each_level_doubles_the_size(blocks: tuple[int, ...]) -> None:
    config = SmallDecoderConfig(latent_channels=3, width=8, blocks=blocks)
    pictures = SmallDecoder(config)(torch.randn(2, 3, 4, 6))
    assert pictures.shape == (2, 3, 4 * config.factor, 6 * config.factor)


def test_what_lies_far_out_is_squashed() -> None:
    torch.manual_seed(0)
    decoder = SmallDecoder(SmallDecoderConfig(latent_channels=3, width=8, blocks=(1, 1)))
    far = torch.full((1, 3, 4, 4), 50.0)
    torch.testing.assert_close(decoder(far), decoder(2 * far))
    assert (decoder(far / 50) - decoder(far)).abs().max() > 1e-3


def test_a_decoder_without_blocks_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least one level must have one"):
        SmallDecoderConfig.from_dict({"blocks": [0, 0]})
