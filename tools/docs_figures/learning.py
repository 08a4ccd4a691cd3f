"""Figures of training and of evaluation."""

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from mezzotint.diffusion.flow import FlowScheduleConfig, build_schedule
from mezzotint.diffusion.loss import loss_weight
from mezzotint.diffusion.schedule import ScheduleConfig
from mezzotint.evaluation.distributions import FeatureStatistics, frechet_distance, kid
from mezzotint.studies.plots import COLOURS, Line, draw_lines, new_figure, plot_style
from mezzotint.training.ema import (
    ConstantEMAConfig,
    EMAConfig,
    ExponentialMovingAverage,
    PowerEMAConfig,
    WarmupEMAConfig,
)

__all__ = ["evaluation", "training"]

_STEPS = 1000
_FEATURES = 64
_COUNTS = (100, 200, 500, 1000, 2000)


def training() -> Figure:
    """Show how times are weighed, and how much of each step an average holds."""
    schedules = {
        "ε": build_schedule(ScheduleConfig()),
        "v": build_schedule(ScheduleConfig(prediction_type="v_prediction")),
        "x₀": build_schedule(ScheduleConfig(prediction_type="sample")),
        "flow": build_schedule(FlowScheduleConfig()),
    }
    averages: dict[str, EMAConfig] = {
        "constant, 0.995": ConstantEMAConfig(decay=0.995),
        "constant, 0.999": ConstantEMAConfig(decay=0.999),
        "warm-up, 0.999": WarmupEMAConfig(decay=0.999),
        "power, σ_rel 0.05": PowerEMAConfig(sigma_rel=(0.05,)),
        "power, σ_rel 0.20": PowerEMAConfig(sigma_rel=(0.20,)),
    }
    figure = new_figure(7.2, 3.5)
    with plot_style():
        left, right = figure.subplots(1, 2)
        times = torch.arange(1, 1000)
        for colour, (name, schedule) in zip(COLOURS, schedules.items(), strict=False):
            weights = loss_weight(schedule, times, "min_snr")
            left.semilogy(times, weights, color=colour, label=f"network of {name}")
        left.set(xlabel="t", ylabel="weight of the network's error", ylim=(2e-3, 10))
        left.set_title("min_snr, γ = 5")
        left.legend(loc="lower left", fontsize=8.5)
        for colour, (name, config) in zip(COLOURS, averages.items(), strict=False):
            held = _held(config)
            right.plot(range(1, _STEPS + 1), held, color=colour, label=name)
        right.set(xlabel="step of training", ylabel="share in the average", ylim=(0, 0.019))
        right.set_title("EMA after 1,000 steps")
        right.legend(loc="upper left", fontsize=8.5)
    return figure


def evaluation() -> Figure:
    """Show FID and KID between samples of one distribution, by their size."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.linspace(0.5, 1.5, _FEATURES)

    def sample(count: int) -> Tensor:
        return spread * torch.randn(count, _FEATURES, generator=generator)

    real = sample(2000)
    worse = real.mean(0) + 0.15 * spread
    distances: dict[str, list[float]] = {"the same": [], "worse": []}
    kernels: dict[str, list[float]] = {"the same": [], "worse": []}
    errors: dict[str, list[float]] = {"the same": [], "worse": []}
    for count in _COUNTS:
        for name, shift in (("the same", 0.0), ("worse", worse)):
            features = sample(count) + shift
            of_both = FeatureStatistics.of(features), FeatureStatistics.of(real)
            distances[name].append(frechet_distance(*of_both))
            estimate = kid(features, real)
            kernels[name].append(estimate.value)
            errors[name].append(estimate.standard_error)
    figure = new_figure(7.2, 3.4)
    with plot_style():
        left, right = figure.subplots(1, 2)
        lines = [Line(label=name, x=_COUNTS, y=values) for name, values in distances.items()]
        left.set_ylim(0, 14)
        draw_lines(left, lines, log_x=True, x_ticks=_COUNTS)
        lines = [
            Line(label=name, x=_COUNTS, y=values, errors=errors[name])
            for name, values in kernels.items()
        ]
        draw_lines(right, lines, log_x=True, x_ticks=_COUNTS)
        for panel, name in ((left, "FID"), (right, "KID")):
            panel.set(xlabel="pictures")
            panel.set_title(name)
            panel.tick_params(axis="x", labelsize=8.5)
    return figure


def _held(config: EMAConfig) -> Tensor:
    """Return how much of each step an average holds, by averaging steps that are all different."""
    module = nn.Linear(1, _STEPS, bias=False)
    with torch.no_grad():
        module.weight.zero_()
        average = ExponentialMovingAverage(module, config)
        for step in range(_STEPS):
            module.weight.zero_()
            module.weight[step] = 1.0
            average.update()
    return average.average["weight"][:, 0]
