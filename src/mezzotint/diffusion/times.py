"""Which times a model is trained at."""

import math
from statistics import NormalDist
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator

from mezzotint.config import Config
from mezzotint.diffusion.flow import Schedule

__all__ = ["LogitNormalTimesConfig", "TimesConfig", "UniformTimesConfig", "draw_time"]

_BEGINNING = 0.9  # from here to the last time is the first of ten even steps of sampling
_LEAST = 1e-3  # share of the training


class UniformTimesConfig(Config):
    """Every time as often as any other; those of a flow are then shifted."""

    kind: Literal["uniform"] = "uniform"


class LogitNormalTimesConfig(Config):
    """Times in the middle more often (Esser et al., arXiv 2403.03206, section 3.1).

    The time is the quantile u of the uniform times, with ``log(u / (1 - u))`` normal. Its density
    vanishes at both ends, so that a network answers at the very last time as at those before it.

    Attributes:
        mean: Above 0 it is nearer to the noise, below 0 nearer to the image.
        std: The smaller, the more often times near the mean's.
    """

    kind: Literal["logit_normal"] = "logit_normal"
    mean: float = Field(default=0.0, ge=-10, le=10)
    std: float = Field(default=1.0, gt=0, le=10)

    @model_validator(mode="after")
    def _reaches_the_noise(self) -> Self:
        beginning = math.log(_BEGINNING / (1 - _BEGINNING))
        share = 1 - NormalDist(self.mean, self.std).cdf(beginning)
        if share < _LEAST:
            raise ValueError(
                f"with mean {self.mean} and std {self.std} only {share:.2g} of the training is at"
                f" the last tenth of the times, where sampling begins; raise one of them, so that"
                f" {_LEAST:g} or more is"
            )
        return self


TimesConfig = Annotated[UniformTimesConfig | LogitNormalTimesConfig, Field(discriminator="kind")]


def draw_time(
    config: UniformTimesConfig | LogitNormalTimesConfig,
    schedule: Schedule,
    generator: torch.Generator,
) -> float:
    """Draw one training time: a whole one, but for a flow."""
    if isinstance(config, UniformTimesConfig):
        return schedule.draw_time(generator)
    normal = float(torch.randn((), generator=generator, dtype=torch.float64))
    return schedule.quantile(1 / (1 + math.exp(-(config.mean + config.std * normal))))
