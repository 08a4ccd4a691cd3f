"""A whole model on disk: ``model_index.json`` and a sub-folder per component."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mezzotint.checkpoints.changes import (
    BASE,
    Base,
    Shared,
    base_entry,
    find_base,
    load_changes,
    save_changes,
)
from mezzotint.checkpoints.conditioners import (
    load_conditioner,
    read_token_width,
    save_conditioner,
)
from mezzotint.checkpoints.first_stages import load_first_stage, save_first_stage
from mezzotint.checkpoints.folder import (
    CONFIG,
    load_component,
    read_component_config,
    read_json,
    save_component,
    write_json,
)
from mezzotint.checkpoints.layouts import config_to_layout
from mezzotint.checkpoints.loaded import LoadedModel, SamplingDefaults
from mezzotint.checkpoints.registry import INDEX
from mezzotint.checkpoints.schedulers import FILE, read_scheduler, write_scheduler
from mezzotint.conditioning.base import Conditioner
from mezzotint.conditioning.spatial import HybridConditioner, main_conditioner
from mezzotint.errors import CheckpointError, ConfigError, short
from mezzotint.latent_diffusion import (
    LatentDiffusion,
    fingerprint,
)
from mezzotint.models.unet import UNet, UNetConfig
from mezzotint.storage.safetensors_file import narrowed

__all__ = [
    "check_channels",
    "CLASS",
    "as_unet",
    "check_kind",
    "check_width",
    "conditioner_of",
    "load_model",
    "load_unet",
    "read_defaults",
    "read_index",
    "read_model",
    "require_range",
    "sample_size",
    "save_as_changes",
    "save_model",
    "vae_of",
]

CLASS = "LatentDiffusion"
FORMAT_VERSION = 1


def save_model(
    model: LatentDiffusion,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    defaults: SamplingDefaults | None = None,
) -> None:
    """Write a model as a folder of components.

    Args:
        model: What to write.
        folder: Made if need be.
        dtype: Of the floating-point weights on the disk; None keeps each as it is.
        defaults: How it is sampled where a request does not say.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_first_stage(model.first_stage, model.normalization, folder / "vae", dtype)
    save_component(model.unet, folder / "unet", _size_of(model), dtype)
    save_conditioner(model.conditioner, folder / "conditioner", dtype)
    vae = read_component_config(folder / "vae")["_class_name"]
    own = "mezzotint" if vae == "IdentityFirstStage" else "diffusers"
    _write_index(model, folder, defaults, {"vae": [own, vae]})


def save_as_changes(
    model: LatentDiffusion,
    base: Path,
    folder: Path,
    *,
    rank: int,
    dtype: torch.dtype | None = None,
    defaults: SamplingDefaults | None = None,
) -> None:
    """Write a model as what it changes of another; see `mezzotint.checkpoints.changes`.

    Args:
        model: Has the first stage of the other. Its conditioner, or the main part of it, is shared
            if it is the other's.
        base: The folder of the other, which is found from this one by a relative path.
        folder: Made if need be.
        rank: Of the changes of the UNet's layers; a layer that changed by more is kept whole.
        dtype: Of the floating-point weights on the disk; None keeps each as it is.
        defaults: How it is sampled where a request does not say.

    Raises:
        CheckpointError: If the first stage is another than the base's, or the base cannot be read,
            or is kept as changes itself.
        ConfigError: If the rank is below 1.
    """
    other = load_model(base)
    pairs = {
        "first stage": (model.first_stage, other.first_stage),
        "normalisation": (model.normalization, other.normalization),
    }
    for what, (mine, theirs) in pairs.items():
        if not _equal(mine, theirs):
            raise CheckpointError(f"{base}: has another {what}, so that nothing can be shared")
    shares = _shared(model.conditioner, main_conditioner(other.conditioner))
    folder.mkdir(parents=True, exist_ok=True)
    save_changes(model.unet, other.unet, folder, rank, dtype)
    entry = base_entry(Base(base, shares), folder)
    config = config_to_layout(model.unet.config) | _size_of(model)
    write_json(folder / "unet" / CONFIG, config)
    if shares != "conditioner":
        whole = shares is None
        save_conditioner(model.conditioner, folder / "conditioner", dtype, with_main=whole)
    _write_index(model, folder, defaults, {BASE: entry})


def _equal(mine: nn.Module, theirs: nn.Module) -> bool:
    """Whether two modules of one kind have the same weights."""
    sums = [fingerprint(module.state_dict().items()) for module in (mine, theirs)]
    return type(mine) is type(theirs) and sums[0] == sums[1]


def _shared(conditioner: Conditioner, main: Conditioner) -> Shared | None:
    """Which part of a conditioner is the main one of another model."""

    def same(part: Conditioner) -> bool:
        return _equal(part, main) and part.settings() == main.settings()

    if same(conditioner):
        return "conditioner"
    hybrid = isinstance(conditioner, HybridConditioner)
    return "conditioner/main" if hybrid and same(conditioner.main) else None


def _size_of(model: LatentDiffusion) -> dict[str, list[int]]:
    return {"sample_size": list(sample_size(model))}


def _write_index(
    model: LatentDiffusion, folder: Path, defaults: SamplingDefaults | None, more: dict[str, Any]
) -> None:
    scheduler, _ = write_scheduler(model.schedule_config, defaults)
    write_json(folder / "scheduler" / FILE, scheduler)
    unet = read_component_config(folder / "unet")["_class_name"]
    told = {f.name: getattr(defaults, f.name) for f in fields(SamplingDefaults)} if defaults else {}
    sampling = {name: value for name, value in told.items() if value is not None}
    index = {
        "_class_name": CLASS,
        "format_version": FORMAT_VERSION,
        "image_size": list(model.image_size),
        **({"sampling": sampling} if sampling else {}),
        **more,
        "unet": ["mezzotint" if unet == "UNet" else "diffusers", unet],
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "conditioner": ["mezzotint", type(model.conditioner).__name__],
    }
    write_json(folder / INDEX, index)


def require_range(model: LatentDiffusion, dtype: torch.dtype | None) -> None:
    """Raise a CheckpointError that names a weight if one is beyond a type; None holds them all."""
    if dtype is None:
        return
    for name, tensor in model.state_dict().items():
        # the statistics of latents are written as text
        if tensor.is_floating_point() and not name.startswith("normalization."):
            narrowed(name, tensor.detach().cpu(), dtype)


def sample_size(model: LatentDiffusion) -> tuple[int, int]:
    """Return height and width of the latents that a model was trained at."""
    height, width = model.image_size
    factor = model.first_stage.factor
    return height // factor, width // factor


def load_model(folder: Path, dtype: torch.dtype | None = torch.float32) -> LatentDiffusion:
    """Read a model that `save_model` wrote; see `read_model`."""
    return read_model(folder, dtype).model


def read_model(folder: Path, dtype: torch.dtype | None = torch.float32) -> LoadedModel:
    """Read a model that `save_model` wrote, and how it is sampled where a request does not say.

    Args:
        folder: Of the model.
        dtype: Of the floating-point weights in memory; None keeps each as it is on the disk.

    Raises:
        CheckpointError: If a part is missing, damaged, or written by a newer Mezzotint.
    """
    index, size = read_index(folder)
    base = find_base(index, folder)
    told, main = conditioner_of(folder, base)
    first_stage, normalization = load_first_stage(vae_of(folder, base), dtype)
    unet = load_unet(folder / "unet", dtype, base)
    schedule = read_scheduler(folder / "scheduler" / FILE).schedule
    conditioner = load_conditioner(told, dtype, main=main)
    check_width(folder, unet.config, read_token_width(told, main=main))
    check_kind(folder, index, type(conditioner).__name__)
    check_channels(folder, unet.config, conditioner.concat_channels)
    try:
        model = LatentDiffusion(first_stage, unet, conditioner, schedule, normalization, size)
    except ConfigError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    return LoadedModel(model=model, defaults=read_defaults(index, folder / INDEX))


def read_index(folder: Path) -> tuple[dict[str, Any], tuple[int, int]]:
    """Read the index of a model's folder, and from it the height and width of its images.

    Raises:
        CheckpointError: If it is missing, of another kind, or written by a newer Mezzotint.
    """
    index = read_json(folder / INDEX)
    if (name := index.get("_class_name")) != CLASS:
        raise CheckpointError(f"{folder / INDEX}: _class_name is {short(name)}, expected {CLASS!r}")
    if (version := index.get("format_version")) != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder / INDEX}: format_version is {short(version)}; this Mezzotint reads"
            f" {FORMAT_VERSION}"
        )
    match index.get("image_size"):
        case [int(height), int(width)] if min(height, width) > 0 and max(height, width) <= 1 << 16:
            return index, (height, width)
        case other:
            raise CheckpointError(
                f"{folder / INDEX}: image_size is {short(other)}; expected [height, width]"
            )


def read_defaults(index: Mapping[str, Any], path: Path, key: str = "sampling") -> SamplingDefaults:
    """Read from the index of a model's folder how it is sampled where a request does not say.

    Args:
        index: Its content.
        path: What messages call it.
        key: Where in the index it stands.

    Raises:
        CheckpointError: If it says what is not known.
    """
    try:
        return SamplingDefaults(**index.get(key, {}))
    except TypeError as error:
        raise CheckpointError(f"{path}: {key}: {error}") from None


def check_width(folder: Path, unet: UNetConfig, width: int | None) -> None:
    """Raise a CheckpointError if a UNet attends to tokens of another width than there are."""
    if width is not None and width != unet.cross_attention_dim:
        raise CheckpointError(
            f"{folder / 'unet' / CONFIG}: cross_attention_dim is"
            f" {unet.cross_attention_dim}, but the conditioner's tokens are {width} wide"
        )


def vae_of(folder: Path, base: Base | None) -> Path:
    """Return where the first stage of a model lies."""
    return folder / "vae" if base is None else base.vae


def conditioner_of(folder: Path, base: Base | None) -> tuple[Path, Path | None]:
    """Return where the conditioner of a model lies, and its main part if that lies elsewhere."""
    own = folder / "conditioner"
    match base:
        case Base(shares="conditioner"):
            return base.conditioner, None
        case Base(shares="conditioner/main"):
            return own, base.conditioner
        case _:
            return own, None


def check_kind(folder: Path, index: Mapping[str, Any], kind: str) -> None:
    """Refuse a conditioner that is none of what the index names.

    Args:
        folder: Of the model.
        index: Its index.
        kind: The conditioner's class.

    Raises:
        CheckpointError: If it is another; of an old index, which names none, any is right.
    """
    match index.get("conditioner"):
        case [_, str(name)] if name != kind:
            where = folder / "conditioner"
            raise CheckpointError(f"{where}: is a {kind}, but {INDEX} names a {short(name)}")
        case _:
            pass


def check_channels(folder: Path, unet: UNetConfig, concatenated: int) -> None:
    """Raise a CheckpointError if a UNet takes other channels than it is given."""
    told = unet.out_channels + concatenated
    if unet.in_channels != told:
        raise CheckpointError(
            f"{folder / 'unet' / CONFIG}: in_channels is {unet.in_channels}, but latents with what"
            f" is concatenated to them have {told} channels"
        )


def load_unet(
    folder: Path, dtype: torch.dtype | None = torch.float32, base: Base | None = None
) -> UNet:
    """Read a component folder that must hold a UNet.

    Args:
        folder: Of the component.
        dtype: Of the floating-point weights in memory; None keeps each as it is on the disk.
        base: The model that it is a change of, if it is.

    Raises:
        CheckpointError: If it is missing or damaged, or is another kind of component.
    """
    if base is not None:
        return as_unet(load_changes(folder.parent, base, dtype), folder)
    return as_unet(load_component(folder, dtype), folder)


def as_unet(module: nn.Module, folder: Path) -> UNet:
    """Return a component that must be a UNet.

    Raises:
        CheckpointError: If it is another kind of component.
    """
    if not isinstance(module, UNet):
        raise CheckpointError(f"{folder}: holds a {type(module).__name__}, not a UNet")
    return module
