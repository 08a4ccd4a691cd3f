"""The figure of conditions: one scene, and all that a model can be told of it."""

import textwrap

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from mezzotint.data.degradation import DegradationConfig, degrade
from mezzotint.data.masks import MaskConfig, draw_mask
from mezzotint.data.scenes import ScenesData, ScenesDataConfig
from mezzotint.studies.plots import COLOURS, new_figure, plot_style
from tools.docs_figures.drawing import show

__all__ = ["conditions"]

_SCENE = 4


def conditions() -> Figure:
    """Show a scene with its caption, boxes, map, small picture and masked picture."""
    data = ScenesData(ScenesDataConfig(resolution=128, backgrounds=("plain", "gradient")))
    example = data.load(_SCENE)
    picture = example.image.permute(1, 2, 0).numpy()
    assert example.boxes is not None and example.map is not None and example.caption is not None
    generator = torch.Generator().manual_seed(5)
    mask = draw_mask(MaskConfig(kinds=("wide",), min_area=0.2), 128, 128, generator)
    small = degrade(example.image, DegradationConfig(factor=4), generator)
    figure = new_figure(7.2, 5.2)
    with plot_style():
        panels = figure.subplots(2, 3).flatten()
        names = [
            "the picture",
            "layout",
            "caption",
            "semantic map",
            "small picture",
            "masked picture",
        ]
        for panel, name in zip(panels, names, strict=True):
            panel.set_title(name, fontsize=10)
        show(panels[0], picture)
        show(panels[1], np.full_like(picture, 255))
        for box, colour in zip(example.boxes, COLOURS, strict=False):
            corner, name = (128 * box.left, 128 * box.top), data.class_names[box.label]
            size = 128 * (box.right - box.left), 128 * (box.bottom - box.top)
            panels[1].add_patch(Rectangle(corner, *size, fill=False, color=colour, linewidth=2))
            panels[1].text(corner[0] + 3, corner[1] + 11, name, color=colour, fontsize=10)
        show(panels[2], np.full_like(picture, 255))
        words = "\n".join(textwrap.wrap(example.caption, 18))
        panels[2].text(64, 64, words, ha="center", va="center", fontsize=12)
        show(panels[3], example.map.numpy(), cmap="tab20", vmin=0, vmax=33)
        show(panels[4], small.permute(1, 2, 0).numpy())
        kept = (mask[0] == 0).numpy()[..., None]
        show(panels[5], np.where(kept, picture, 160))
    return figure
