"""Adapters that act on a model for a while, and leave no trace.

A LoRA acts live, as a branch beside each layer that it changes; or merged, in the weights, which
costs their memory once more and no time. Either way the model's parameters keep their names.
"""

import math
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mezzotint.checkpoints.adapter_files import find_adapter, load_adapter
from mezzotint.checkpoints.embeddings import Embedding, check_width
from mezzotint.checkpoints.lora import LoraAdapter
from mezzotint.checkpoints.lora_fit import Changeable, FittedLayer, fit
from mezzotint.conditioning.clip import ClipConditioner
from mezzotint.conditioning.spatial import main_conditioner
from mezzotint.errors import RequestError, nearest
from mezzotint.latent_diffusion import LatentDiffusion
from mezzotint.nn.packed import PackedConv2d, PackedLinear

__all__ = ["AdapterSet", "AdapterUse", "adapters"]


class AdapterUse(Protocol):
    """An adapter that is asked for."""

    @property
    def name(self) -> str:
        """Its path, or its name in the folders of adapters."""
        ...

    @property
    def weight(self) -> float:
        """How strongly it acts; 1 is as it was trained."""
        ...


class AdapterSet:
    """The adapters that act on a model. One set a model: what one does, it alone can undo.

    Args:
        model: May be moved and cast while adapters act.

    Example:
        >>> from mezzotint.checkpoints.lora import read_lora
        >>> def draw_with(model: LatentDiffusion, path: str) -> None:
        ...     acting = AdapterSet(model)
        ...     acting.apply(read_lora(path), 0.8)
        ...     acting.remove_all()  # the model is what it was, bit for bit
    """

    def __init__(self, model: LatentDiffusion) -> None:
        self._model = model
        self._loras: dict[str, list[_Branch]] = {}
        self._words: list[str] = []
        self._merged: dict[Changeable, _Merged] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """The LoRA adapters that act, in the order in which they were applied."""
        return tuple(self._loras)

    def apply(
        self,
        adapter: LoraAdapter,
        weight: float = 1.0,
        *,
        text_weight: float | None = None,
        merge: bool = False,
    ) -> None:
        """Let a LoRA act, beside those that already do.

        Args:
            adapter: What was read.
            weight: How strongly; 1 is as it was trained, 0 not at all.
            text_weight: How strongly on the text encoder, if not the same.
            merge: Change the weights, in their own precision; packed layers become plain by it, and
                stay so. Otherwise they are not touched.

        Raises:
            RequestError: If one of this name acts, or a weight is no number.
            CheckpointError: If it does not fit the model, of which nothing is changed then.
        """
        if adapter.name in self._loras:
            raise RequestError(f"adapter {adapter.name!r} already acts on the model")
        strengths = _strengths(weight, text_weight)
        branches = [_Branch(layer, strengths[layer.part]) for layer in fit(adapter, self._model)]
        self._loras[adapter.name] = branches
        for branch in branches:
            if merge:
                merged = self._merged.setdefault(branch.module, _Merged(branch.module))
                merged.add(branch)
            else:
                branch.attach()

    def set_weight(self, name: str, weight: float, *, text_weight: float | None = None) -> None:
        """Let a LoRA act more or less strongly; see `apply`.

        Raises:
            RequestError: If no adapter of this name acts, or a weight is no number.
        """
        strengths = _strengths(weight, text_weight)
        for branch in self._branches(name):
            branch.strength = strengths[branch.layer.part]
            if not branch.is_live:
                self._merged[branch.module].recompute()

    def add_embedding(self, embedding: Embedding) -> None:
        """Let a word stand for an embedding's vectors.

        Raises:
            RequestError: If the model has no CLIP text encoder, or the word already stands for one.
            CheckpointError: If the vectors were made for another text encoder.
        """
        conditioner = main_conditioner(self._model.conditioner)
        if not isinstance(conditioner, ClipConditioner):
            raise RequestError(
                f"{embedding.path}: an embedding is read by a CLIP text encoder, but the model"
                f" wants {conditioner.description}"
            )
        check_width(embedding, conditioner.config.hidden_size)
        conditioner.add_word(embedding.word, embedding.vectors)
        self._words.append(embedding.word)

    def remove(self, name: str) -> None:
        """Undo a LoRA. Where none is merged any more, the weights are the ones of before.

        Raises:
            RequestError: If no adapter of this name acts.
        """
        for branch in self._branches(name):
            if branch.is_live:
                branch.detach()
            elif self._merged[branch.module].take(branch):
                del self._merged[branch.module]
        del self._loras[name]

    def remove_all(self) -> None:
        """Undo every LoRA and every embedding of this set."""
        for name in self.names:
            self.remove(name)
        conditioner = main_conditioner(self._model.conditioner)
        for word in self._words:
            assert isinstance(conditioner, ClipConditioner), "it took the word"
            conditioner.remove_word(word)
        self._words.clear()

    def _branches(self, name: str) -> "list[_Branch]":
        if name not in self._loras:
            told = nearest(name, self._loras) if self._loras else "none does"
            raise RequestError(f"no adapter {name!r} acts on the model; {told}")
        return self._loras[name]


@contextmanager
def adapters(
    model: LatentDiffusion,
    uses: Iterable[AdapterUse],
    folders: Sequence[Path] | None = None,
    *,
    merge: bool = False,
) -> Generator[dict[str, str]]:
    """Let LoRA adapters and embeddings act while the block runs, however it ends.

    Args:
        model: The model; afterwards it is what it was, bit for bit.
        uses: Which, and how strongly. A LoRA that is named twice acts with both weights added.
        folders: Where they are found by name; see `find_adapter`.
        merge: See `AdapterSet.apply`.

    Yields:
        The sha256 of each by its name in ``uses``.

    Raises:
        RequestError: If one is not found, or has no use for its weight.
        CheckpointError: If one is damaged or does not fit the model.
    """
    weights: dict[str, list[float]] = {}
    for use in uses:
        weights.setdefault(use.name, []).append(use.weight)
    loaded = {name: load_adapter(find_adapter(name, folders)) for name in weights}
    acting = AdapterSet(model)
    try:
        for name, adapter in loaded.items():
            if isinstance(adapter, LoraAdapter):
                acting.apply(replace(adapter, name=name), sum(weights[name]), merge=merge)
                continue
            if any(weight != 1.0 for weight in weights[name]):
                raise RequestError(
                    f"adapter {name!r}: an embedding has no weight of its own; weight its word in"
                    f" the prompt, as in ({adapter.word}:{weights[name][0]:g})"
                )
            acting.add_embedding(adapter)
        yield {name: adapter.sha256 for name, adapter in loaded.items()}
    finally:
        acting.remove_all()


def _strengths(weight: float, text_weight: float | None) -> dict[str, float]:
    strengths = {"unet": weight, "text": weight if text_weight is None else text_weight}
    for value in strengths.values():
        if not math.isfinite(value):
            raise RequestError(f"the weight of an adapter: expected a number, got {value}")
    return strengths


class _Branch:
    """What a LoRA adds to one layer; while it acts live, it is a hook of the layer."""

    def __init__(self, layer: FittedLayer, strength: float) -> None:
        self.layer = layer
        self.strength = strength
        self._factors = layer.down, layer.up
        self._handle: torch.utils.hooks.RemovableHandle | None = None

    @property
    def module(self) -> Changeable:
        return self.layer.module

    @property
    def is_live(self) -> bool:
        return self._handle is not None

    def attach(self) -> None:
        self._handle = self.module.register_forward_hook(self._add)

    def detach(self) -> None:
        assert self._handle is not None, "it is attached"
        self._handle.remove()

    def _add(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        if self.strength == 0:
            return output
        down, up = self._on(output)
        if isinstance(self.module, nn.Conv2d):
            added = F.conv2d(_convolved(self.module, inputs[0], down), up)
        else:
            added = F.linear(F.linear(inputs[0], down), up)
        return output + (self.layer.scale * self.strength) * added

    def _on(self, output: Tensor) -> tuple[Tensor, Tensor]:
        """The factors where the layer computes, and in its precision."""
        down = self._factors[0]
        if (down.device, down.dtype) != (output.device, output.dtype):
            # tensors of inference mode could take no part in a later gradient
            with torch.inference_mode(False):
                dtype, device = output.dtype, output.device
                self._factors = self.layer.down.to(device, dtype), self.layer.up.to(device, dtype)
        return self._factors


def _convolved(layer: nn.Conv2d, x: Tensor, kernel: Tensor) -> Tensor:
    """Convolve as a layer does, at its stride and beyond its edges, with another kernel."""
    padding = layer.padding
    assert not isinstance(padding, str), "no network here has a padding by name"
    if layer.padding_mode != "zeros":
        (top, left), mode = padding, layer.padding_mode
        x, padding = F.pad(x, (left, left, top, top), mode=mode), (0, 0)
    return F.conv2d(x, kernel, None, layer.stride, padding, layer.dilation)


@dataclass(eq=False)
class _Merged:
    """A layer whose weight is that of before and what branches add to it."""

    module: Changeable

    def __post_init__(self) -> None:
        self._branches: list[_Branch] = []
        if isinstance(self.module, PackedConv2d | PackedLinear):
            self.module.unpack()  # what is put back later has to be the parameter
        self._original = self.module.weight

    def add(self, branch: _Branch) -> None:
        self._branches.append(branch)
        self.recompute()

    def take(self, branch: _Branch) -> bool:
        """Undo a branch; returns whether it was the last."""
        self._branches.remove(branch)
        self.recompute()
        return not self._branches

    def recompute(self) -> None:
        """Begin from the weight of before, so that nothing is left of what was undone."""
        now, original = self.module.weight, self._original
        if (original.device, original.dtype) != (now.device, now.dtype):
            original.data = original.data.to(now)  # as the rest of the model was moved
        if not self._branches:
            self.module.weight = original
            return
        wide = torch.promote_types(original.dtype, torch.float32)
        changed = original.detach().to(wide, copy=True)
        for branch in self._branches:
            difference = branch.layer.difference(changed.device, wide)
            changed.add_(difference, alpha=branch.strength)
        self.module.weight = nn.Parameter(changed.to(original.dtype), original.requires_grad)
