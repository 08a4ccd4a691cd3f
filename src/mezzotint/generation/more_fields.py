"""Fields of a request by keyword, for those who draw from Python."""

from collections.abc import Sequence
from typing import Literal, TypedDict

from mezzotint.generation.request import AdapterUse, FeatureReuse, GuideUse, HighRes, LayoutBox

__all__ = ["MoreFields"]


class MoreFields(TypedDict, total=False):
    """Fields of `GenerationRequest` that are seldom given."""

    layout: Sequence[LayoutBox]
    padding: tuple[int, int, int, int]
    strength: float
    high_res: HighRes
    guidance_interval: tuple[float, float]
    guides: Sequence[GuideUse]
    variation_seed: int
    variation_strength: float
    emphasis: Literal["original", "no_norm", "ignore", "none"]
    clip_skip: int
    adapters: Sequence[AdapterUse]
    tiling: bool
    tiled_sampling: bool
    tiled_decoding: bool
    feature_reuse: FeatureReuse
    token_merging: float
    back_projection: int
    poisson_blending: bool
