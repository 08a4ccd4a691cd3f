"""Figures of the first stage: what compression costs and gains, and the two regularisers."""

import csv
import math
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

from mezzotint.models.regularizers import DiagonalGaussian, VectorQuantizer
from mezzotint.studies.plots import COLOURS, Line, draw_lines, new_figure, plot_style
from tools.docs_figures.drawing import show

__all__ = ["autoencoders", "compression"]

STUDY = Path(__file__).parents[2] / "docs/results/compression"
_STAGES = {"identity": 1, "kl-f2": 2, "kl-f4": 4, "kl-f8": 8, "kl-f16": 16, "kl-f32": 32}
_SIDE = 128
_SHOWN = (0, 3)  # of the nine pictures of the study


def compression() -> Figure:
    """Show held-out emoji after each first stage of the study, and what each one saves."""
    figure = new_figure(7.2, 5.2)
    with plot_style():
        grid = figure.add_gridspec(3, len(_STAGES), height_ratios=(1, 1, 1.9))
        for column, (stage, factor) in enumerate(_STAGES.items()):
            name = "originals" if stage == "identity" else f"{stage}-restored"
            sheet = Image.open(STUDY / "pictures" / f"{name}.webp").convert("RGB")
            for row, number in enumerate(_SHOWN):
                panel = figure.add_subplot(grid[row, column])
                left = number * _SIDE
                show(panel, np.asarray(sheet.crop((left, 0, left + _SIDE, _SIDE))))
                if row == 0:
                    panel.set_title(f"f = {factor}", fontsize=10, loc="center")
        stages, unets = _table("first-stages.csv"), _table("diffusion.csv")
        names = [name for name in _STAGES if name != "identity"]
        factors = [_STAGES[name] for name in names]
        left = figure.add_subplot(grid[2, :3])
        restored = [float(stages[name]["PSNR [dB]"]) for name in names]
        left.set(xlabel="f", ylabel="PSNR of reconstructions [dB]")
        line = Line(label="", x=factors, y=restored)
        draw_lines(left, [line], log_x=True, x_ticks=factors)
        right = figure.add_subplot(grid[2, 3:])
        cost = [float(unets[name]["GFLOP per call"]) for name in _STAGES]
        right.set(xlabel="f", ylabel="GFLOP of a call of the UNet")
        line = Line(label="", x=list(_STAGES.values()), y=cost, colour=COLOURS[1])
        draw_lines(right, [line], log_x=True, x_ticks=list(_STAGES.values()))
    return figure


def autoencoders() -> Figure:
    """Show what the KL term costs a posterior, and what a quantiser does to latents."""
    figure = new_figure(7.2, 3.4)
    with plot_style():
        left, right = figure.subplots(1, 2)
        z = torch.linspace(-4, 4, 400)
        left.plot(z, _normal(z, 0, 1), color="#7F7F7F", linestyle="--", label="N(0, 1): 0 nats")
        for colour, mean, std in zip(COLOURS, (1.5, 1.5, -2.0), (0.7, 0.15, 0.4), strict=False):
            moments = torch.tensor([mean, 2 * math.log(std)]).view(1, 2, 1, 1)
            nats = float(DiagonalGaussian(moments).kl())
            label = f"N({mean:g}, {std:g}²): {nats:.2f} nats"
            left.plot(z, _normal(z, mean, std), color=colour, label=label)
        left.set(xlabel="z", ylabel="q(z | x)", ylim=(0, 4.6))
        left.set_title("KL: distance to N(0, 1)")
        left.legend(loc="upper left")
        quantizer = VectorQuantizer(12, 2)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            quantizer.embedding.weight.copy_(torch.randn(12, 2, generator=generator))
        latents = 1.2 * torch.randn(1, 2, 1, 70, generator=generator)
        side = torch.linspace(-3, 3, 300)
        plane = torch.stack(torch.meshgrid(side, side, indexing="xy"))[None]
        cells = quantizer.nearest(plane)[0].numpy()
        right.contour(side, side, cells, levels=np.arange(12) + 0.5, colors="#BBBBBB", linewidths=1)
        with torch.no_grad():
            z_q = quantizer(latents).z_q
        for before, after in zip(latents[0, :, 0].T, z_q[0, :, 0].T, strict=True):
            right.plot(*torch.stack([before, after]).T, color=COLOURS[5], linewidth=0.8)
        right.plot(*latents[0, :, 0], ".", color=COLOURS[0], label="latents")
        codes = quantizer.embedding.weight.detach().T
        right.plot(*codes, "X", color=COLOURS[1], markersize=8, label="codes")
        right.set(xlim=(-3, 3), ylim=(-3, 3), xlabel="z, first channel", ylabel="second channel")
        right.set_title("VQ: to the nearest code")
        right.grid(visible=False)
        right.legend(loc="upper right", frameon=True, framealpha=0.9)
    return figure


def _table(name: str) -> dict[str, dict[str, str]]:
    with (STUDY / name).open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {next(iter(row.values())): row for row in rows}


def _normal(z: torch.Tensor, mean: float, std: float) -> torch.Tensor:
    return torch.exp(-((z - mean) ** 2) / (2 * std**2)) / (std * math.sqrt(2 * math.pi))
