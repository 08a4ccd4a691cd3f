"""Averages of weights over training: of constant decay, warmed up, or power functions of time."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from mezzotint.config import Config
from mezzotint.training.power_function import (
    LEAST_SIGMA_REL,
    MOST_SIGMA_REL,
    decay_at,
    gamma_of,
)

__all__ = [
    "ConstantEMAConfig",
    "EMAConfig",
    "ExponentialMovingAverage",
    "InverseGammaEMAConfig",
    "PowerEMAConfig",
    "WarmupEMAConfig",
    "whole",
]

_Decay = Annotated[float, Field(ge=0, lt=1)]
_SigmaRel = Annotated[float, Field(ge=LEAST_SIGMA_REL, le=MOST_SIGMA_REL)]


class ConstantEMAConfig(Config):
    """One decay throughout; the random start fades like everything else.

    Attributes:
        decay: d in ``ema <- d ema + (1 - d) theta``.
    """

    kind: Literal["constant"] = "constant"
    decay: _Decay = 0.9999

    def decays(self, n: int) -> tuple[float, ...]:
        """Return the decay of the n-th update, from 1."""
        return (self.decay,)


class WarmupEMAConfig(Config):
    """The n-th update has the decay ``min(decay, (1 + n) / (10 + n))``: the start is soon gone.

    ``ema_decay: 0.999`` in a recipe is short for ``ema: {kind: warmup, decay: 0.999}``.

    Attributes:
        decay: The decay that it rises to.
    """

    kind: Literal["warmup"] = "warmup"
    decay: _Decay = 0.9999

    def decays(self, n: int) -> tuple[float, ...]:
        """Return the decay of the n-th update, from 1."""
        return (min(self.decay, (1 + n) / (10 + n)),)


class InverseGammaEMAConfig(Config):
    """The decay of the n-th update is ``min(decay, 1 - (1 + (n - 1) / inverse_gamma)^-power)``.

    It is the warm-up of k-diffusion, and of diffusers with ``use_ema_warmup``.

    Attributes:
        decay: The decay that it rises to.
        inverse_gamma: Updates until it begins to rise in earnest.
        power: How fast it rises: 2/3 for a million steps or more, 3/4 for fewer.
    """

    kind: Literal["inverse_gamma"] = "inverse_gamma"
    decay: _Decay = 0.9999
    inverse_gamma: float = Field(default=1.0, gt=0)
    power: float = Field(default=2 / 3, gt=0)

    def decays(self, n: int) -> tuple[float, ...]:
        """Return the decay of the n-th update, from 1."""
        return (min(self.decay, 1 - (1 + (n - 1) / self.inverse_gamma) ** -self.power),)


class PowerEMAConfig(Config):
    """The power functions of EDM2 (arXiv 2312.02696, section 3), several at once.

    The first is drawn from and exported. All of them are stored every so many steps in the run's
    ``ema/``, and every snapshot is kept: from them `mezzotint average` makes an average of any
    other length afterwards. A snapshot takes 2 bytes per weight and profile, or 4 in float32.

    Attributes:
        sigma_rel: The lengths as shares of the training so far; 0.289 weighs every step alike.
        snapshot_steps: Steps between snapshots. A run had best have 20 or more.
        snapshot_precision: ``float16``, as in EDM2: an average made from it is rounded no more
            than a model that runs in float16. ``float32`` is for lengths of less than half the
            shortest one tracked, which magnify the rounding.
    """

    kind: Literal["power"] = "power"
    sigma_rel: tuple[_SigmaRel, ...] = Field(default=(0.05, 0.10), min_length=1, max_length=8)
    snapshot_steps: int = Field(default=1000, ge=1)
    snapshot_precision: Literal["float16", "float32"] = "float16"

    @model_validator(mode="after")
    def _distinct(self) -> "PowerEMAConfig":
        if len(set(self.sigma_rel)) < len(self.sigma_rel):
            raise ValueError("sigma_rel: the same length stands there twice")
        return self

    def decays(self, n: int) -> tuple[float, ...]:
        """Return the decays of the n-th update, from 1."""
        return tuple(decay_at(n, gamma_of(length)) for length in self.sigma_rel)


EMAConfig = ConstantEMAConfig | WarmupEMAConfig | InverseGammaEMAConfig | PowerEMAConfig


class ExponentialMovingAverage:
    """Averages a module's parameters: ``ema <- d ema + (1 - d) theta``.

    The averages are float32, or wider where a parameter is. Sharded parameters have sharded
    averages: nothing is gathered until a state is taken or a distance measured.

    Args:
        module: Its trainable parameters are averaged; it must hold these very parameters as long
            as the average is used, so shard it before.
        config: The decays, and so how many averages there are.

    Attributes:
        updates: How often it was updated.
        averages: The averages by the names of the parameters, one for each profile.
        overwritten: By the names of the parameters that `overwrite` changed, the last update
            before it did.
    """

    def __init__(self, module: nn.Module, config: EMAConfig) -> None:
        self.config, self.updates = config, 0
        self.overwritten: dict[str, int] = {}
        self._module = module
        self._live = _trainable(module)
        count = len(config.decays(1))
        self.averages = [{n: _wide(p) for n, p in self._live.items()} for _ in range(count)]

    @property
    def average(self) -> dict[str, Tensor]:
        """The first average, which is drawn from and exported."""
        return self.averages[0]

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages towards the parameters as they stand now."""
        self.updates += 1
        for average, decay in zip(self.averages, self.config.decays(self.updates), strict=True):
            for name, parameter in self._live.items():
                average[name].lerp_(parameter.to(average[name].dtype), 1.0 - decay)

    @torch.no_grad()
    def reset(self) -> None:
        """Let every average be the parameters as they stand now."""
        for average in self.averages:
            for name, parameter in self._live.items():
                average[name].copy_(parameter)

    @torch.no_grad()
    def overwrite(self, name: str, rows: Tensor) -> None:
        """Let rows of an average be the parameter's, whose past says nothing of it any more.

        Args:
            name: Of the parameter.
            rows: ``(N,)`` bool, along its first dimension.
        """
        for average in self.averages:
            average[name][rows] = self._live[name].detach()[rows].to(average[name].dtype)
        self.overwritten[name] = self.updates

    @torch.no_grad()
    def distance(self) -> float:
        """Return ``|ema - theta| / |theta|`` of the first average, over all parameters.

        It is 0 only where the parameters stand still, or the decay is 0. Where they are sharded,
        every rank must ask.
        """
        self._check()
        apart, size = 0.0, 0.0
        for name, parameter in self._live.items():
            average = self.average[name]
            live = parameter.to(average.dtype)
            apart += float(whole((average - live).square().sum(dtype=torch.float64)))
            size += float(whole(live.square().sum(dtype=torch.float64)))
        return (apart / size) ** 0.5 if size else apart**0.5

    @contextmanager
    def applied(self) -> Generator[None]:
        """Put the first average into the module for the length of a ``with`` block."""
        self._check()
        with torch.no_grad():
            kept = {name: p.detach().clone() for name, p in self._live.items()}
            for name, parameter in self._live.items():
                parameter.copy_(self.average[name])
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in self._live.items():
                    parameter.copy_(kept[name])

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averages and the number of updates, as tensors.

        The first average has the names of the parameters; the k-th from 1 has ``k/`` before them.
        """
        self._check()
        state = {**self.average, "updates": torch.tensor(self.updates)}
        for k, average in enumerate(self.averages[1:], start=1):
            state |= {f"{k}/{name}": tensor for name, tensor in average.items()}
        for name, updates in self.overwritten.items():
            state[f"overwritten/{name}"] = torch.tensor(updates)
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state_dict` gave."""
        self.updates = int(state["updates"])
        for k, average in enumerate(self.averages):
            for name, tensor in average.items():
                tensor.copy_(state[f"{k}/{name}" if k else name])
        mark = "overwritten/"
        self.overwritten = {
            name.removeprefix(mark): int(updates)
            for name, updates in state.items()
            if name.startswith(mark)
        }

    def _check(self) -> None:
        """An average of parameters that the module no longer has would stand still for ever."""
        now = _trainable(self._module)
        same = now.keys() == self._live.keys() and all(now[n] is p for n, p in self._live.items())
        assert same, "the module's parameters were replaced after its average was made"


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor gathered from all ranks if it is sharded; then every rank must ask."""
    gather = getattr(tensor, "full_tensor", None)  # a DTensor's; its import would take a second
    return tensor if gather is None else gather()


def _trainable(module: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def _wide(parameter: Tensor) -> Tensor:
    # a copy even where the type is the same already
    return parameter.detach().clone().to(torch.promote_types(parameter.dtype, torch.float32))
