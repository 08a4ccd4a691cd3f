"""Which layers of a model a LoRA adapter changes, by whatever names its file calls them."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mezzotint.checkpoints.compvis import unet_map
from mezzotint.checkpoints.lora import LoraAdapter, LoraLayer, Part
from mezzotint.conditioning.spatial import main_conditioner
from mezzotint.errors import CheckpointError
from mezzotint.latent_diffusion import LatentDiffusion
from mezzotint.nn.packed import weight_shape

__all__ = ["Changeable", "FittedLayer", "fit"]

Changeable = nn.Linear | nn.Conv2d

_PARTS: Mapping[Part, str] = {"unet": "UNet", "text": "text encoder"}
_TEXT_PREFIX = "text_model_"  # some versions of transformers leave it out


@dataclass(frozen=True, eq=False)
class FittedLayer:
    """A layer of a model and what changes it.

    Attributes:
        module: The layer.
        part: The network that it lies in.
        down: A, ``(r, in)`` or for a convolution ``(r, in, h, w)``.
        up: B, ``(out, r)`` or for a convolution ``(out, r, 1, 1)``.
        scale: alpha / r.
    """

    module: Changeable
    part: Part
    down: Tensor
    up: Tensor
    scale: float

    def difference(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return ``scale * up @ down`` in the shape of the layer's weight."""
        down, up = (factor.to(device, dtype).flatten(1) for factor in (self.down, self.up))
        return self.scale * (up @ down).reshape(weight_shape(self.module))


def fit(adapter: LoraAdapter, model: LatentDiffusion) -> list[FittedLayer]:
    """Find the layers that an adapter changes, in a model that is not touched.

    Args:
        adapter: From `mezzotint.checkpoints.lora.read_lora`.
        model: The model.

    Raises:
        CheckpointError: If it changes anything that the model does not have, or that has another
            shape there; it says how much, and names the nearest.
    """
    layers = _layers(model)
    found: dict[Changeable, tuple[LoraLayer, Part]] = {}
    strange: list[LoraLayer] = []
    for layer in adapter.layers:
        place = _find(layer, layers)
        if place is None:
            strange.append(layer)
            continue
        part, module = place
        if module in found:
            raise CheckpointError(
                f"{adapter.path}: {layer.key} and {found[module][0].key} are the same layer"
            )
        found[module] = layer, part
    if strange:
        raise CheckpointError(_tell_strange(adapter, strange, layers))
    _check_shapes(adapter, found)
    return [
        FittedLayer(module, part, *_shaped(layer, module), layer.scale)
        for module, (layer, part) in found.items()
    ]


def _layers(model: LatentDiffusion) -> dict[Part, dict[str, tuple[str, Changeable]]]:
    """The layers of each network with their names, by all names with underscores for dots."""
    unet = dict(_changeable(model.unet))
    by_name = {_flat(name): (name, module) for name, module in unet.items()}
    for rule in unet_map(model.unet).rules:
        name, _, leaf = rule.ours[0].rpartition(".")
        # a fused projection is three of our layers, and its change none of theirs
        if leaf == "weight" and name in unet and len(rule.ours) == 1:
            by_name[_flat(rule.theirs.removesuffix(".weight"))] = name, unet[name]
    text: dict[str, tuple[str, Changeable]] = {}
    for name, module in _changeable(main_conditioner(model.conditioner)):
        text[_flat(name)] = text[_flat(name).removeprefix(_TEXT_PREFIX)] = name, module
    return {"unet": by_name, "text": text}


def _changeable(network: nn.Module) -> Iterator[tuple[str, Changeable]]:
    for name, module in network.named_modules():
        if isinstance(module, Changeable):
            yield name, module


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _find(
    layer: LoraLayer, layers: Mapping[Part, Mapping[str, tuple[str, Changeable]]]
) -> tuple[Part, Changeable] | None:
    for part, mine in layers.items():
        if layer.part in (part, None) and _flat(layer.path) in mine:
            return part, mine[_flat(layer.path)][1]
    return None


def _tell_strange(
    adapter: LoraAdapter,
    strange: Sequence[LoraLayer],
    layers: Mapping[Part, Mapping[str, tuple[str, Changeable]]],
) -> str:
    first = strange[0]
    parts: list[Part] = ["unet", "text"] if first.part is None else [first.part]
    known = {flat: name for part in parts for flat, (name, _) in layers[part].items()}
    where = " or ".join(_PARTS[part] for part in parts)
    near = difflib.get_close_matches(_flat(first.path), known, n=1, cutoff=0.0)
    hint = f"the nearest is {known[near[0]]}" if near else f"the model has no {where} to change"
    return (
        f"{adapter.path}: {len(strange)} of the {len(adapter.layers)} layers that it changes are"
        f" none of the model's {where}, {first.key} for one; {hint}"
    )


def _check_shapes(adapter: LoraAdapter, found: Mapping[Changeable, tuple[LoraLayer, Part]]) -> None:
    wrong = [
        (layer, changed, shape)
        for module, (layer, _) in found.items()
        if (changed := (layer.up.shape[0], *_bare(layer.down.shape[1:])))
        != ((shape := weight_shape(module))[0], *_bare(shape[1:]))
    ]
    if wrong:
        layer, changed, shape = wrong[0]
        raise CheckpointError(
            f"{adapter.path}: {len(wrong)} of {len(found)} layers have another shape in this model:"
            f" {layer.key} changes {changed}, but there it is {shape}; the adapter was made for a"
            " model of another family"
        )


def _bare(shape: Sequence[int]) -> tuple[int, ...]:
    """The inputs of a layer and its kernel, which is none for a convolution of size 1."""
    return tuple(shape[:1]) if all(size == 1 for size in shape[1:]) else tuple(shape)


def _shaped(layer: LoraLayer, module: Changeable) -> tuple[Tensor, Tensor]:
    """The factors as the layer's own weight would be, whichever of both the file wrote."""
    rank, (_, inputs, *kernel) = layer.down.shape[0], weight_shape(module)
    down = layer.down.reshape(rank, inputs, *kernel)
    return down, layer.up.reshape(-1, rank, *[1 for _ in kernel])
