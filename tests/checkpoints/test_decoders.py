"""Small decoders on the disk: public ones decode as diffusers does, others' are refused."""

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny
from tiny_pipelines import edit, kl

from mezzotint.checkpoints.decoders import (
    check_decoder,
    load_decoder,
    probe_colours,
    save_decoder,
)
from mezzotint.errors import CheckpointError, ConfigError
from mezzotint.latent_diffusion import LatentNormalization
from mezzotint.models.small_decoder import SmallDecoder, SmallDecoderConfig

ONE = LatentNormalization.from_scale_factor(1.0)


def small(**shape: object) -> SmallDecoder:
    torch.manual_seed(1)
    return SmallDecoder(SmallDecoderConfig(**{"width": 8, "blocks": (1, 1), **shape}))


@pytest.mark.parametrize(
    "shape", [{}, {"num_decoder_blocks": (1, 2, 1), "decoder_block_out_channels": (8, 8, 8)}]
)
def test_a_public_one_decodes_as_in_diffusers(shape: dict[str, object], tmp_path: Path) -> None:
    theirs = AutoencoderTiny(**shape).eval()
    theirs.save_pretrained(tmp_path)
    found = load_decoder(tmp_path)
    assert found.colours is None
    latents = 2 * torch.randn(2, 4, 5, 6)
    with torch.no_grad():
        expected = theirs.decode(latents).sample
        torch.testing.assert_close(found.decoder(latents), expected, rtol=1e-5, atol=1e-5)


def test_what_a_public_one_says_otherwise_is_named(tmp_path: Path) -> None:
    theirs = AutoencoderTiny(
        num_decoder_blocks=(1, 1),
        decoder_block_out_channels=(8, 8),
        act_fn="gelu",
        scaling_factor=0.5,
    )
    theirs.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"scaling_factor is 0.5, .*act_fn is 'gelu'"):
        load_decoder(tmp_path)


def test_it_is_read_as_it_was_written(tmp_path: Path) -> None:
    decoder, colours = small(), torch.rand(5, 3)
    save_decoder(decoder, colours, tmp_path / "run" / "model" / "decoder")
    found = load_decoder(tmp_path / "run")
    assert found.decoder.config == decoder.config
    latents = torch.randn(1, 4, 4, 4)
    assert torch.equal(found.decoder(latents), decoder(latents))
    torch.testing.assert_close(torch.tensor(found.colours), colours, atol=1e-4, rtol=0)
    moved = shutil.copytree(tmp_path / "run" / "model" / "decoder", tmp_path / "fast")
    assert load_decoder(moved).sha256 == found.sha256
    (folder,) = (tmp_path / "run").rglob("decoder")
    edit(folder / "config.json", width=9)
    with pytest.raises(CheckpointError, match="does not fit its SmallDecoder: wrong shape"):
        load_decoder(folder)
    edit(folder / "config.json", width=8)
    for told in ("red", [[0.1, 0.2, 0.3]], [[0.1]] * 5, [[0.1, 0.2, "red"]] * 5):
        edit(folder / "config.json", colours_of_probes=told)
        with pytest.raises(
            CheckpointError, match="colours_of_probes is .*, expected 5 colours of 3"
        ):
            load_decoder(folder)
    edit(folder / "config.json", colours_of_probes=colours.tolist())
    edit(folder / "config.json", _class_name="AutoencoderKL")
    with pytest.raises(CheckpointError, match="holds a 'AutoencoderKL', which is no small decoder"):
        load_decoder(folder)
    with pytest.raises(CheckpointError, match="nowhere: no decoder here"):
        load_decoder(tmp_path / "nowhere")


def test_one_of_another_autoencoder_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    mine, other = kl(), kl()
    save_decoder(small(latent_channels=3), probe_colours(mine, ONE), tmp_path)
    found = load_decoder(tmp_path)
    check_decoder(found, mine, ONE)
    check_decoder(found, mine.bfloat16(), ONE)  # whose weights are rounded
    for first_stage, normalization in (
        (other, ONE),
        (mine.float(), LatentNormalization.from_scale_factor(0.5)),
    ):
        with pytest.raises(ConfigError, match="another autoencoder, or for latents normalised"):
            check_decoder(found, first_stage, normalization)
    with pytest.raises(ConfigError, match="images 2 times as large .* has images 4 times"):
        check_decoder(found, kl(3), ONE)
    save_decoder(small(latent_channels=3, out_channels=1), torch.rand(4, 1), tmp_path / "grey")
    with pytest.raises(ConfigError, match="images of 1 channels, but the model has images of 3"):
        check_decoder(load_decoder(tmp_path / "grey"), mine, ONE)
    save_decoder(small(), torch.rand(5, 3), tmp_path / "four")
    with pytest.raises(ConfigError, match="latents of 4 channels, but the model has latents of 3"):
        check_decoder(load_decoder(tmp_path / "four"), mine, ONE)
