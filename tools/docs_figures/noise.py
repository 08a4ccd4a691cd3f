"""Figures of diffusion itself: schedules, noising, what is predicted, and the scale of latents."""

import torch
from matplotlib.figure import Figure
from torch import Tensor

from mezzotint.diffusion.flow import FlowScheduleConfig, Schedule, build_schedule
from mezzotint.diffusion.schedule import ScheduleConfig
from mezzotint.rng import SampleNoise
from mezzotint.studies.plots import COLOURS, new_figure, plot_style
from tools.docs_figures.drawing import emoji, pixels, show

__all__ = ["normalization", "noising", "schedules"]

_TIMES = (0, 200, 400, 600, 800, 999)
_V = "v_prediction"


def schedules() -> Figure:
    """Show the signal-to-noise ratio of every schedule, and the levels that samplers visit."""
    configs = {
        "linear (DDPM)": ScheduleConfig(beta_schedule="linear", beta_start=1e-4, beta_end=0.02),
        "scaled_linear (the paper)": ScheduleConfig(),
        "the same, zero terminal SNR": ScheduleConfig(zero_terminal_snr=True, prediction_type=_V),
        "cosine": ScheduleConfig(beta_schedule="cosine"),
        "flow": FlowScheduleConfig(),
        "flow, shift 3": FlowScheduleConfig(shift=3.0),
    }
    figure = new_figure(7.2, 3.6)
    with plot_style():
        left, right = figure.subplots(1, 2)
        quantiles = torch.linspace(0.001, 0.9995, 500).double().tolist()
        for colour, (name, config) in zip(COLOURS, configs.items(), strict=False):
            schedule = build_schedule(config)
            times = torch.tensor([schedule.quantile(u) for u in quantiles], dtype=torch.float64)
            dashed = "--" if "flow" in name or "zero" in name else "-"
            snr = schedule.snr(times)
            left.semilogy(quantiles, snr, color=colour, linestyle=dashed, label=name)
        left.set(xlabel="share of training times below t", ylabel="SNR = 1 / σ²")
        left.set(ylim=(1e-7, 1e6), yticks=[1e-6, 1e-4, 1e-2, 1, 1e2, 1e4, 1e6])
        left.legend(fontsize=8, loc="lower left")
        schedule = build_schedule(ScheduleConfig())
        spacings = ("leading", "linspace", "trailing", "sgm_uniform", "karras", "exponential")
        for row, spacing in enumerate(spacings):
            levels = schedule.sampling_sigmas(10, spacing)[:-1]
            right.semilogx(levels, [row] * len(levels), "o", color=COLOURS[row])
        right.set(yticks=range(len(spacings)), yticklabels=spacings)
        right.set(xlabel="σ of 10 steps (0 follows)", ylim=(-0.6, len(spacings) - 0.4))
        right.set(xticks=[0.03, 0.1, 0.3, 1, 3, 10], xticklabels=["0.03", "0.1", "0.3", 1, 3, 10])
        right.minorticks_off()
    return figure


def noising() -> Figure:
    """Show an emoji under the noise of two schedules, and what its network is to predict."""
    image = emoji("red-apple", 64)
    noise = SampleNoise([0]).normal(image.shape)
    paper = build_schedule(ScheduleConfig())
    velocity = build_schedule(ScheduleConfig(prediction_type=_V))
    flow = build_schedule(FlowScheduleConfig())
    rows = {
        "input": lambda t: paper.add_noise(image[None], noise, t),
        "target ε": lambda t: paper.target(image[None], noise, t),
        "target v": lambda t: velocity.target(image[None], noise, t),
        "flow: input": lambda t: flow.add_noise(image[None], noise, t),
        "target ε − x₀": lambda t: flow.target(image[None], noise, t),
    }
    figure = new_figure(6.0, 5.1)
    with plot_style():
        panels = figure.subplots(len(rows), len(_TIMES))
        for line, (name, make) in zip(panels, rows.items(), strict=True):
            line[0].set_ylabel(name, fontsize=9)
            for panel, time in zip(line, _TIMES, strict=True):
                picture: Tensor = make(torch.tensor([time]))[0]
                # half the contrast, so that little of the noise is cut
                show(panel, pixels(picture / 2))
        for panel, time in zip(panels[0], _TIMES, strict=True):
            panel.set_title(f"t = {time}", fontsize=9, loc="center", fontweight="normal")
    return figure


def normalization() -> Figure:
    """Show how much of latents is left under the same schedule, by their scale."""
    schedule = build_schedule(ScheduleConfig())
    scales = (0.2, 1.0, 5.0)
    figure = new_figure(7.2, 3.4)
    with plot_style():
        grid = figure.add_gridspec(3, 5, width_ratios=(2.7, 1, 1, 1, 1))
        left = figure.add_subplot(grid[:, 0])
        times = torch.arange(1000)
        for colour, std in zip(COLOURS, scales, strict=False):
            snr = std**2 * schedule.snr(times)
            left.plot(times, snr / (1 + snr), color=colour, label=f"std {std:g}")
        left.set(xlabel="t", ylabel="share of the variance that is signal", ylim=(0, 1.02))
        left.legend(loc="lower left")
        image = emoji("red-apple", 64)
        image = (image - image.mean()) / image.std()
        noise = SampleNoise([0]).normal(image.shape)
        for row, std in enumerate(scales):
            for column, time in enumerate((200, 400, 600, 900), start=1):
                panel = figure.add_subplot(grid[row, column])
                noisy = schedule.add_noise(std * image[None], noise, torch.tensor([time]))[0]
                show(panel, pixels(noisy / (2 * _deviation(schedule, time, std))))
                if row == 0:
                    title = f"t = {time}"
                    panel.set_title(title, fontsize=9, loc="center", fontweight="normal")
                if column == 1:
                    panel.set_ylabel(f"std {std:g}", fontsize=9)
    return figure


def _deviation(schedule: Schedule, time: int, std: float) -> float:
    """The deviation of what the network sees, so that pictures are shown with one contrast."""
    sigma = float(schedule.t_to_sigma(torch.tensor(time)))
    return ((std**2 + sigma**2) / (1 + sigma**2)) ** 0.5
