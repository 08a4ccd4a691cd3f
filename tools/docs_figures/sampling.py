"""Figures of sampling and guidance, in a world of two numbers where all is known."""

from collections.abc import Callable

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from mezzotint.diffusion.energy_guidance import EnergyGuidance
from mezzotint.diffusion.guidance import ClassifierFreeGuidance
from mezzotint.diffusion.samplers import SAMPLERS
from mezzotint.diffusion.schedule import NoiseSchedule, ScheduleConfig
from mezzotint.rng import SampleNoise
from mezzotint.studies.plots import COLOURS, Line, draw_lines, new_figure, plot_style
from tools.docs_figures.mixture import Told, denoise, density

__all__ = ["guidance", "samplers"]

_SCHEDULE = NoiseSchedule(ScheduleConfig())
_COMPARED = ("ddim", "heun", "dpm2", "dpmpp_2m", "unipc")
_Denoiser = Callable[[Tensor, Tensor, Told], Tensor]


def samplers() -> Figure:
    """Show the ways of three samplers, and the error of several by calls of the network."""
    figure = new_figure(7.2, 3.5)
    with plot_style():
        left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
        _contours(left)
        start = _start(60, 1)
        for points in _ways("heun", 200, start[:14]):
            left.plot(*points, color="#AAAAAA", linewidth=0.9)
        ways = {"ddim, 8 steps": ("ddim", 8), "dpmpp_2m, 8 steps": ("dpmpp_2m", 8)}
        for colour, (label, (name, steps)) in zip(COLOURS, ways.items(), strict=False):
            for number, points in enumerate(_ways(name, steps, start[:3])):
                shown = label if number == 0 else None
                left.plot(*points, ".-", color=colour, linewidth=1.2, label=shown)
        left.set_ylim(-3.0, 2.2)
        left.legend(loc="lower left", fontsize=8.5)
        left.set_title("From noise to data")
        truth = _run("heun", 400, start)
        lines: list[Line] = []
        for name in _COMPARED:
            calls, errors = [], []
            for steps in (3, 5, 8, 12, 20, 35, 60):
                off = (_run(name, steps, start) - truth).flatten(1).norm(dim=1)
                calls.append(SAMPLERS[name].calls_per_step * steps)
                errors.append(float(off.mean()))
            lines.append(Line(label=name, x=calls, y=errors))
        right.set(xlabel="calls of the denoiser", ylabel="distance to the exact solution")
        draw_lines(right, lines, log_x=True, log_y=True, x_ticks=[3, 10, 30, 100])
        right.set_title("Order")
    return figure


def guidance() -> Figure:
    """Show points of one class by scale, within an interval, and led by an energy alone."""
    figure = new_figure(7.2, 5.0)
    count = 400
    one = Told(torch.zeros(count, dtype=torch.long))
    null = Told(torch.full((count,), -1))
    free = ClassifierFreeGuidance[Told]

    def by_height(points: Tensor) -> Tensor:
        return (points[:, 1, 0, 0] + 0.5) ** 2 / (2 * 0.1**2)

    cases: dict[str, tuple[_Denoiser, Told]] = {
        "scale 1: no guidance": (denoise, one),
        "scale 3": (free(denoise, null, 3.0), one),
        "scale 8": (free(denoise, null, 8.0), one),
        "scale 8, interval 0.2 to 1": (free(denoise, null, 8.0, interval=(0.2, 1.0)), one),
        "told nothing": (denoise, null),
        "led: second number near −0.5": (EnergyGuidance(denoise, by_height, data_std=0.22), null),
    }
    with plot_style():
        panels = figure.subplots(2, 3, sharex=True, sharey=True).flatten()
        for panel, (title, (denoiser, told)) in zip(panels, cases.items(), strict=True):
            _contours(panel)
            points = _run("ddim", 60, _start(count, 2), denoiser, told).flatten(1).T
            panel.plot(*points, ".", color=COLOURS[0], markersize=2.5, alpha=0.6)
            panel.set_title(title, fontsize=9)
    return figure


def _start(count: int, seed: int) -> Tensor:
    sigma = _SCHEDULE.sigmas[-1].item()
    noise = SampleNoise(range(1000 * seed, 1000 * seed + count)).normal((2, 1, 1)).double()
    return noise * _SCHEDULE.start_scale(sigma)


def _run(
    name: str,
    steps: int,
    start: Tensor,
    denoiser: _Denoiser = denoise,
    told: Told | None = None,
    callback: Callable[[int, int, Tensor, Tensor], object] | None = None,
) -> Tensor:
    told = told or Told(torch.full((len(start),), -1))
    info = SAMPLERS[name]
    sigmas = info.sigmas(_SCHEDULE, steps, "karras")
    noise = SampleNoise(range(len(start)))
    return info.function(
        lambda x, sigma: denoiser(x, sigma, told), start, sigmas, noise, callback=callback
    )


def _ways(name: str, steps: int, start: Tensor) -> list[Tensor]:
    """Return the way of each point ``(2, steps + 1)``, brought to the data's scale."""
    sigmas = SAMPLERS[name].sigmas(_SCHEDULE, steps, "karras")
    states = [start]
    _run(name, steps, start, callback=lambda step, steps, x, denoised: states.append(x))
    scaled = [x / (1 + s**2) ** 0.5 for x, s in zip(states, sigmas.tolist(), strict=True)]
    return list(torch.stack(scaled, dim=-1).flatten(1, 3).unbind(0))


def _contours(panel: Axes) -> None:
    side = torch.linspace(-2.4, 2.4, 160).double()
    points = torch.stack(torch.meshgrid(side, side, indexing="xy"), dim=-1)
    for label, colour in ((0, COLOURS[1]), (1, COLOURS[2])):
        levels = [0.04, 0.25]
        values = density(points, label)
        panel.contour(side, side, values, levels=levels, colors=colour, linewidths=0.9)
    panel.set(xlim=(-2.4, 2.4), ylim=(-2.2, 2.2), aspect="equal")
    panel.grid(visible=False)
