"""Count the parameters of the paper's models, beside what the paper says of them.

    python -m tools.paper_table

writes ``docs/results/paper-models.md``. The networks are built without memory for their weights,
so this takes seconds.
"""

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from mezzotint.conditioning.base import Conditioner
from mezzotint.conditioning.build import build_conditioner, with_class_names
from mezzotint.latent_diffusion import FirstStage
from mezzotint.models.autoencoder import (
    AutoencoderKL,
    IdentityFirstStage,
    IdentityFirstStageConfig,
    VQModel,
)
from mezzotint.models.unet import UNet
from mezzotint.training.recipe import AutoencoderRecipe, DiffusionRecipe, TrainedFirstStage
from mezzotint.training.run import load_recipe, recipe_names

__all__ = ["PUBLISHED", "Published", "Row", "build", "paper_recipes", "rows", "table"]

PAGE = Path(__file__).parents[1] / "docs/results/paper-models.md"
IMAGENET_CLASSES = 1000

Part = Literal["UNet", "conditioner", "first stage"]
UNET: tuple[Part, ...] = ("UNet",)
TRAINED: tuple[Part, ...] = ("UNet", "conditioner")
WITH_STAGE: tuple[Part, ...] = ("UNet", "first stage")


@dataclass(frozen=True)
class Published:
    """What the paper says of a model's size.

    Attributes:
        millions: Parameters, in millions.
        source: The paper's table or section.
        parts: What it counts, as the number itself tells.
        note: For a reader who compares.
        reproduced: Whether the recipe's own number is within 2 % of it.
    """

    millions: float
    source: str
    parts: tuple[Part, ...] = UNET
    note: str = ""
    reproduced: bool = True


_STAGE_COUNTED = "the number counts the first stage: the released UNet has 113.6 M"
_ABLATION = "the paper trains all of table 6 with one number of parameters"

PUBLISHED: dict[str, tuple[Published, ...]] = {
    "paper-celebahq-ldm-4": (Published(274, "tables 12, 14"),),
    "paper-ffhq-ldm-4": (Published(274, "table 12"),),
    "paper-churches-ldm-8": (Published(294, "table 12", note="256 M in table 18"),),
    "paper-bedrooms-ldm-4": (Published(274, "table 12"),),
    "paper-imagenet-ldm-1": (Published(396, "table 13"),),
    "paper-imagenet-ldm-2": (Published(391, "table 13"),),
    "paper-imagenet-ldm-4-batch-40": (
        Published(391, "table 13", reproduced=False, note="table 10 says 400 M of the same shape"),
    ),
    "paper-imagenet-ldm-8": (Published(395, "tables 10, 13"),),
    "paper-imagenet-ldm-16": (Published(395, "table 13"),),
    "paper-imagenet-ldm-32": (Published(395, "table 13"),),
    "paper-celebahq-ldm-1": (Published(270, "table 14"),),
    "paper-celebahq-ldm-2": (Published(265, "table 14"),),
    "paper-celebahq-ldm-8": (Published(258, "table 14"),),
    "paper-celebahq-ldm-16": (Published(260, "table 14"),),
    "paper-celebahq-ldm-32": (Published(258, "table 14"),),
    "paper-text-ldm-8": (
        Published(1450, "tables 2, 15", TRAINED),
        Published(872, "the published weights"),
    ),
    "paper-layout-openimages-ldm-4": (Published(306, "table 15", TRAINED),),
    "paper-layout-coco-ldm-8": (
        Published(
            345,
            "table 15",
            TRAINED,
            reproduced=False,
            note="no configuration was released; with 8 layers in the encoder, where table 17 says"
            " 16, it would be 346 M",
        ),
    ),
    "paper-imagenet-ldm-4": (
        Published(400, "tables 3, 10"),
        Published(395, "table 15"),
    ),
    "paper-super-resolution-ldm-4": (Published(169, "tables 5, 15", WITH_STAGE, _STAGE_COUNTED),),
    "paper-super-resolution-ldm-4-bsr": (
        Published(169, "tables 5, 15", WITH_STAGE, _STAGE_COUNTED),
    ),
    "paper-inpainting-ldm-4": (Published(215, "table 15"),),
    "paper-inpainting-ldm-4-noattn": (Published(215, "table 15", note=_ABLATION),),
    "paper-inpainting-ldm-4-kl": (Published(215, "table 15", note=_ABLATION),),
    "paper-inpainting-big-ldm-4": (Published(387, "section 4.5"),),
    "paper-semantic-ldm-4": (Published(215, "table 15"),),
}


@dataclass(frozen=True)
class Row:
    """A line of the table: what a recipe builds, and what was published of it."""

    recipe: str
    counted: tuple[Part, ...]
    parameters: int
    published: Published | None

    @property
    def difference(self) -> float | None:
        """Our number over the published one, less 1."""
        if self.published is None:
            return None
        return self.parameters / (1e6 * self.published.millions) - 1


def paper_recipes() -> list[str]:
    """Return the names of the recipes that follow the paper."""
    return [name for name in recipe_names() if name.startswith("paper-")]


def first_stage_recipe(recipe: DiffusionRecipe) -> AutoencoderRecipe | None:
    """Return the recipe of a paper recipe's first stage; None if it works on pixels."""
    if not isinstance(recipe.first_stage, TrainedFirstStage):
        return None
    assert recipe.first_stage.path is not None
    first = load_recipe(Path(recipe.first_stage.path).name)
    assert isinstance(first, AutoencoderRecipe)
    return first


def build(recipe: AutoencoderRecipe | DiffusionRecipe) -> dict[Part, nn.Module]:
    """Build the networks of a paper recipe on the meta device: shapes and no memory.

    Args:
        recipe: Of which a class-conditional model gets ImageNet's thousand classes.
    """
    with torch.device("meta"):
        if isinstance(recipe, AutoencoderRecipe):
            return {"first stage": _first_stage(recipe)}
        return {
            "UNet": UNet(recipe.unet),
            "conditioner": _conditioner(recipe),
            "first stage": _first_stage(first_stage_recipe(recipe)),
        }


def _first_stage(recipe: AutoencoderRecipe | None) -> FirstStage:
    if recipe is None:
        return IdentityFirstStage(IdentityFirstStageConfig())
    config = recipe.model
    return AutoencoderKL(config) if config.kind == "kl" else VQModel(config)


def _conditioner(recipe: DiffusionRecipe) -> Conditioner:
    names = tuple(f"class {k}" for k in range(IMAGENET_CLASSES))
    return build_conditioner(with_class_names(recipe.conditioning, names))


def rows(names: Iterable[str] | None = None) -> list[Row]:
    """Count.

    Args:
        names: Of paper recipes; all of them by default, in the order of the paper's tables and
            then the first stages.
    """
    if names is None:
        names = [*PUBLISHED, *(name for name in paper_recipes() if name not in PUBLISHED)]
    return [row for name in names for row in _rows_of(name)]


@functools.cache
def _rows_of(name: str) -> tuple[Row, ...]:
    parts = build(load_recipe(name))
    sizes = {part: sum(p.numel() for p in m.parameters()) for part, m in parts.items()}
    found: list[Row] = []
    for published in PUBLISHED.get(name, (None,)):
        counted = published.parts if published else tuple(parts)
        found.append(Row(name, counted, sum(sizes[part] for part in counted), published))
    return tuple(found)


def table(lines: Iterable[Row]) -> str:
    """Return the page, in Markdown."""
    text = [
        "# The paper's models",
        "",
        "The recipes `paper-…` follow tables 8 and 12 to 15 of the paper (Rombach et al. 2022,",
        "arXiv 2112.10752) and the configurations that its authors released. So many parameters",
        "their networks have, as counted by `python -m tools.paper_table`, which writes this page.",
        "Nothing here is trained.",
        "",
        "| recipe | counted | parameters | published | difference | where, and notes |",
        "|---|---|---:|---:|---:|---|",
    ]
    text += [_line(row) for row in lines]
    return "\n".join(text) + "\n"


def _line(row: Row) -> str:
    published, difference = "", ""
    note = "the paper gives no size"
    if row.published is not None:
        note = "; ".join(filter(None, (row.published.source, row.published.note)))
        published = f"{row.published.millions:,.0f} M"
        difference = f"{row.difference:+.1%}"
    cells = (
        f"`{row.recipe}`",
        " + ".join(row.counted),
        f"{row.parameters / 1e6:,.1f} M",
        published,
        difference,
        note,
    )
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Write the page, and print it."""
    page = table(rows())
    PAGE.write_text(page, encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main()
