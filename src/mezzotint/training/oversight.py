"""How a run is watched: its health, and what the model is worth while it is trained."""

from pathlib import Path

from pydantic import Field, field_validator, model_validator

from mezzotint.config import Config
from mezzotint.errors import ConfigError, nearest
from mezzotint.evaluation.protocol import METRICS, EvaluationProtocol, Metric, get_protocol

__all__ = ["EvaluationConfig", "HealthConfig"]


class HealthConfig(Config):
    """What is done about a run that goes wrong; a run that goes well is never touched.

    Attributes:
        warnings: Say in words what the gauges show to be wrong, each fault once.
        rollback: At a loss that is no number, or that diverges, go back once to the last good
            state: without the samples that cause it, or with a lower learning rate. The second
            time the run stops with a report. Until a checkpoint is known to be as good, the state
            at the start is kept in memory.
        learning_rate_factor: What the learning rate is multiplied by then.
        arithmetic: Tell what share of the processor's peak arithmetic a step reaches: one step is
            counted and one matrix product is timed.
    """

    warnings: bool = True
    rollback: bool = True
    learning_rate_factor: float = Field(default=0.1, gt=0, lt=1)
    arithmetic: bool = True


class EvaluationConfig(Config):
    """Measure the averaged weights while they are trained, and keep the best model.

    Cards are written to ``evaluations/``, the numbers to the log, the best model to ``best/``.
    The clock stands still meanwhile.

    Attributes:
        every_steps: Steps between evaluations; one of this and the next.
        every_minutes: Minutes of training between them.
        protocol: A name, or a YAML file; by default ``small``, and ``reconstruction`` for a first
            stage.
        against: A folder of real pictures, or ``emoji:SPLIT``; by default the recipe's own data,
            where they are emoji or a folder.
        split: Part of the real data; by default the protocol's.
        samples: Pictures to measure, in place of the protocol's number.
        metric: Says which model is the best; by default the protocol's ``kid``, ``fid`` or
            ``lpips``, or its first metric.
        steps: Of the sampler; the recipe's ``sample_steps`` by default.
        guidance_scale: The recipe's by default.
    """

    every_steps: int | None = Field(default=None, ge=1)
    every_minutes: float | None = Field(default=None, gt=0)
    protocol: str | None = None
    against: str | None = None
    split: str | None = None
    samples: int | None = Field(default=None, ge=1)
    metric: Metric | None = None
    steps: int | None = Field(default=None, ge=1)
    guidance_scale: float | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _one_interval(self) -> "EvaluationConfig":
        if (self.every_steps is None) == (self.every_minutes is None):
            raise ValueError("exactly one of every_steps and every_minutes is required")
        return self

    @field_validator("metric", mode="before")
    @classmethod
    def _known(cls, metric: object) -> object:
        if metric is not None and metric not in METRICS:
            raise ValueError(f"unknown metric {metric!r}; {nearest(str(metric), METRICS)}")
        return metric

    def protocol_for(self, *, first_stage: bool) -> EvaluationProtocol:
        """Return the protocol for one of the two stages.

        Raises:
            ConfigError: If there is none of the name, it is of the other stage, or it lacks the
                metric.
        """
        name: str | Path = self.protocol or ("reconstruction" if first_stage else "small")
        protocol = get_protocol(name)
        if protocol.of_first_stages != first_stage:
            kind = "a first stage" if first_stage else "a diffusion model"
            raise ConfigError(f"run.evaluation.protocol: {name} does not measure {kind}")
        if self.metric is not None and self.metric not in protocol.metrics:
            raise ConfigError(
                f"run.evaluation.metric: protocol {name} does not measure {self.metric};"
                f" {nearest(self.metric, protocol.metrics)}"
            )
        return protocol
