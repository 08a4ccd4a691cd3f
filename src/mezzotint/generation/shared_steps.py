"""What the steps of one sampling share, as its request allows.

Exact, and always: keys and values of the context. Approximate, and only as asked: deep features of
an earlier step, and tokens that are merged.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from mezzotint.conditioning.base import Conditioning
from mezzotint.diffusion.denoiser import Network
from mezzotint.diffusion.samplers import Callback
from mezzotint.errors import RequestError
from mezzotint.generation.request import GenerationRequest
from mezzotint.latent_diffusion import LatentDiffusion
from mezzotint.models.sampling_memory import DeepFeatures, SamplingMemory
from mezzotint.models.unet import UNet
from mezzotint.nn.token_merging import Merges, TokenMerging, merged_tokens

__all__ = ["SharedSteps", "check_approximations"]


class SharedSteps:
    """Made for one sampling of one batch, and dropped with it.

    Deep features are computed in every N-th step, by every call that the sampler makes in it, and
    the calls of the steps between take those of the call before. So a sampler of two calls a step
    takes both of its slopes with features of their own, or neither. A call computes its own as well
    where it is the first under its condition, with guidance or without it: features never go from
    one batch or condition to another.

    Args:
        model: What is sampled from.
        requests: One a sample.
    """

    def __init__(self, model: LatentDiffusion, requests: Sequence[GenerationRequest]) -> None:
        first = requests[0]
        reuse, ratio = first.feature_reuse, first.token_merging
        self._model = model
        self._interval = 1 if reuse is None else reuse.interval
        self._deep = None if reuse is None or reuse.interval == 1 else DeepFeatures(reuse.blocks)
        self._memory = SamplingMemory(self._deep)
        self._merging = TokenMerging(ratio, [r.seed for r in requests]) if ratio else None
        self._step = 0
        self._last: tuple[Conditioning, torch.Size] | None = None

    def network(self, guidance: Tensor | None = None) -> Network[Conditioning]:
        """Return the model's network, whose calls share.

        Args:
            guidance: See `LatentDiffusion.predict`.
        """

        def predict(x: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
            if self._deep is not None and not self._follows(x, cond):
                self._deep.forget()
            return self._model.predict(x, timestep, cond, guidance=guidance, memory=self._memory)

        return predict

    def counting(self, callback: Callback | None) -> Callback:
        """Return a callback for the sampler, by which steps are counted."""

        def counted(step: int, steps: int, x: Tensor, denoised: Tensor) -> None:
            self._step = step + 1
            if self._merging is not None:
                self._merging.step = self._step
            if callback is not None:
                callback(step, steps, x, denoised)

        return counted

    def acting(self) -> AbstractContextManager[None]:
        """Let the network merge tokens for a while, if that is asked."""
        layers = _merging_layers(self._model.unet) if self._merging is not None else ()
        return merged_tokens(layers, self._merging)

    def _follows(self, x: Tensor, cond: Conditioning) -> bool:
        """Whether a call may take the features of the one before it."""
        last, self._last = self._last, (cond, x.shape)
        same = last is not None and last[0] is cond and last[1] == x.shape
        return same and self._step % self._interval != 0


def check_approximations(request: GenerationRequest, unet: UNet, name: str) -> None:
    """Refuse approximations that a network has no place for.

    Args:
        request: What is asked.
        unet: The network.
        name: What messages call the model.

    Raises:
        RequestError: Saying what it has.
    """
    reuse, most = request.feature_reuse, unet.config.outputs_down
    if reuse is not None and reuse.blocks > most:
        raise RequestError(
            f"{name}: feature_reuse.blocks is {reuse.blocks}, but the way down has {most} outputs;"
            f" expected 1 to {most}"
        )
    if request.token_merging and not _merging_layers(unet):
        raise RequestError(
            f"{name}: token_merging is for attention at the levels of a network, and this one has"
            " none but in the middle"
        )


def _merging_layers(unet: UNet) -> Sequence[Merges]:
    """Attention at the finest level that has any: there are the most tokens, and most alike."""
    levels = range(len(unet.config.block_out_channels))
    return next((found for level in levels if (found := unet.attentions(level))), [])
