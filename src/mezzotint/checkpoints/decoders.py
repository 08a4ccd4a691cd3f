"""Small decoders on the disk: Mezzotint's own, and those of diffusers' ``AutoencoderTiny``."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from mezzotint.checkpoints.folder import (
    CONFIG,
    STEM,
    WEIGHTS,
    load_weights,
    read_component_config,
    save_weights,
    weight_files,
    write_json,
)
from mezzotint.checkpoints.keys import Keys
from mezzotint.checkpoints.loaded import content_hash
from mezzotint.errors import CheckpointError, ConfigError, nearest, short
from mezzotint.latent_diffusion import FirstStage, LatentNormalization
from mezzotint.models.small_decoder import SmallDecoder, SmallDecoderConfig
from mezzotint.storage.tensors import find_weights

__all__ = ["LoadedDecoder", "check_decoder", "load_decoder", "probe_colours", "save_decoder"]

CLASS, PUBLIC = "SmallDecoder", "AutoencoderTiny"
_PROBES = "colours_of_probes"
_APART = 0.05  # of a range of 2; half precision moves the mean of an image by a tenth of that
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "act_fn": ("relu",),
    "upsample_fn": ("nearest",),
    "upsampling_scaling_factor": (2,),
    "latent_magnitude": (3, 3.0),
    "latent_shift": (0.5,),
    "shift_factor": (0, 0.0),
    "force_upcast": (False,),
}
# of the encoder, which is not read
_UNREAD = ("in_channels", "encoder_block_out_channels", "num_encoder_blocks", "block_out_channels")


@dataclass(frozen=True, eq=False)
class LoadedDecoder:
    """A small decoder as it was found.

    Attributes:
        decoder: In evaluation mode, on the CPU.
        path: By which it was found.
        sha256: Of its files.
        colours: What the first stage that it stands in for makes of the probes; None if its files
            do not say.
    """

    decoder: SmallDecoder
    path: Path
    sha256: str
    colours: tuple[tuple[float, ...], ...] | None = None


@torch.no_grad()
def probe_colours(first_stage: FirstStage, normalization: LatentNormalization) -> Tensor:
    """Return the mean colours that a first stage decodes some latents to: what tells it apart.

    Args:
        first_stage: On any device and of any precision.
        normalization: Of its latents.

    Returns:
        ``(C + 1, 3)``, of a latent of zeros and of those where one channel is 2.
    """
    like = next(first_stage.parameters(), None)
    channels = first_stage.latent_channels
    probes = torch.cat([torch.zeros(1, channels), 2.0 * torch.eye(channels)])
    latents = probes[:, :, None, None].expand(-1, -1, 4, 4)
    if like is not None:
        latents = latents.to(like.device, like.dtype)
    raw = normalization.denormalize(latents).to(latents.dtype)
    return first_stage.decode(raw).float().mean((2, 3)).cpu()


def save_decoder(decoder: SmallDecoder, colours: Tensor, folder: Path) -> None:
    """Write a small decoder.

    Args:
        decoder: What to write.
        colours: Of `probe_colours`, of the first stage that it stands in for.
        folder: Made if need be.
    """
    save_weights(decoder.state_dict(), folder / WEIGHTS)
    told = [[round(value, 4) for value in row] for row in colours.tolist()]
    write_json(folder / CONFIG, {"_class_name": CLASS, **decoder.config.to_dict(), _PROBES: told})


def load_decoder(path: str | Path) -> LoadedDecoder:
    """Read a small decoder.

    Args:
        path: A finished run of kind ``decoder``, a folder that holds one, or a folder of diffusers'
            ``AutoencoderTiny``.

    Raises:
        CheckpointError: If there is none, or it is damaged.
    """
    path = Path(path).expanduser()
    places = (path, path / "decoder", path / "model" / "decoder")
    folder = next((place for place in places if (place / CONFIG).is_file()), None)
    if folder is None:
        raise CheckpointError(
            f"{path}: no decoder here; expected a finished run of kind decoder, or a folder with"
            f" {CONFIG} of a {CLASS} or an {PUBLIC}"
        )
    data = read_component_config(folder)
    name = str(data.get("_class_name"))
    if name not in (CLASS, PUBLIC):
        raise CheckpointError(
            f"{folder / CONFIG}: holds a {short(name)}, which is no small decoder;"
            f" {nearest(name, (CLASS, PUBLIC))}"
        )
    if name == PUBLIC:
        fields = _read_public(data, folder)
    else:
        fields = {key: value for key, value in data.items() if key not in ("_class_name", _PROBES)}
    try:
        config = SmallDecoderConfig.from_dict(fields, str(folder / CONFIG))
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    colours = None if name == PUBLIC else _read_colours(data.get(_PROBES), config, folder)
    with torch.device("meta"):
        decoder = SmallDecoder(config)
    rename = _of_decoder if name == PUBLIC else str
    load_weights(decoder, find_weights(folder, STEM), rename=rename)
    files = (folder / CONFIG, *weight_files(folder, STEM))
    sha256 = content_hash(files)
    return LoadedDecoder(decoder.eval().requires_grad_(False), path, sha256, colours)


def check_decoder(
    found: LoadedDecoder, first_stage: FirstStage, normalization: LatentNormalization
) -> None:
    """Refuse a small decoder of another autoencoder.

    Raises:
        ConfigError: Saying in what they differ.
    """
    config = found.decoder.config
    for what, mine, wanted in (
        ("latents of {} channels", config.latent_channels, first_stage.latent_channels),
        ("images {} times as large as their latents", config.factor, first_stage.factor),
        ("images of {} channels", config.out_channels, 3),
    ):
        if mine != wanted:
            raise ConfigError(
                f"decoder: {found.path} is for {what.format(mine)}, but the model has"
                f" {what.format(wanted)}; train one for it by a recipe of kind decoder"
            )
    if found.colours is None:
        return
    off = (torch.tensor(found.colours) - probe_colours(first_stage, normalization)).abs().max()
    if not off <= _APART:
        raise ConfigError(
            f"decoder: {found.path} was trained for another autoencoder, or for latents normalised"
            " otherwise, than the model's; train one for it by a recipe of kind decoder"
        )


def _of_decoder(name: str) -> str | None:
    mine = name.removeprefix("decoder.")
    return None if mine == name else mine


def _read_public(data: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    keys = Keys(data)
    widths = keys.counts("decoder_block_out_channels", [64] * 4)
    blocks = keys.counts("num_decoder_blocks", [3, 3, 3, 1])
    fields = {
        "latent_channels": keys.take("latent_channels", 4),
        "out_channels": keys.take("out_channels", 3),
        "width": widths[0] if widths else 64,
        "blocks": blocks,
    }
    for name in _UNREAD:
        keys.take(name, None)
    if (scale := keys.take("scaling_factor", 1.0)) != 1:
        keys.problem("scaling_factor", scale, "1: latents as a diffusion model has them")
    if len(set(widths)) > 1 or len(widths) != len(blocks):
        keys.problem("decoder_block_out_channels", widths, "one width for every level")
    keys.check_rest(_NEUTRAL)
    keys.require(folder / CONFIG)
    return fields


def _read_colours(
    told: Any, config: SmallDecoderConfig, folder: Path
) -> tuple[tuple[float, ...], ...]:
    rows = cast("Sequence[Any]", told if isinstance(told, list) else [])
    numbers = [
        tuple(float(v) for v in row)
        for row in rows
        if isinstance(row, list) and all(isinstance(v, int | float) for v in cast("list[Any]", row))
    ]
    if [len(row) for row in numbers] != [config.out_channels] * (config.latent_channels + 1):
        raise CheckpointError(
            f"{folder / CONFIG}: {_PROBES} is {short(told)}, expected {config.latent_channels + 1}"
            f" colours of {config.out_channels} channels"
        )
    return tuple(numbers)
