import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mezzotint.data.masks import MaskConfig, MaskKind, draw_mask
from mezzotint.errors import ConfigError

KINDS: tuple[MaskKind, ...] = ("box", "strokes", "wide", "border")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(seed: int, height: int = 64, width: int = 64, **choices: object) -> torch.Tensor:
    return draw_mask(MaskConfig.from_dict(choices), height, width, generator(seed))


def is_rectangle(mask: torch.Tensor) -> bool:
    """Whether the ones fill a rectangle."""
    rows, columns = mask[0].amax(1), mask[0].amax(0)
    full = rows[:, None] * columns
    pieces = [
        int(line.diff(prepend=line.new_zeros(1)).clamp(min=0).sum()) for line in (rows, columns)
    ]
    return torch.equal(full, mask[0]) and pieces == [1, 1]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32),
    height=st.integers(16, 90),
    width=st.integers(16, 90),
    kind=st.sampled_from(KINDS),
    least=st.floats(0.0, 0.6),
    more=st.floats(0.15, 0.4),
)
def test_masks_are_ones_and_zeros_of_the_asked_area(
    seed: int, height: int, width: int, kind: str, least: float, more: float
) -> None:
    mask = drawn(seed, height, width, kinds=[kind], min_area=least, max_area=least + more)
    assert mask.shape == (1, height, width) and mask.dtype == torch.float32
    assert set(mask.unique().tolist()) <= {0.0, 1.0}
    assert least <= float(mask.double().mean()) <= least + more


@pytest.mark.parametrize("kind", KINDS)
def test_the_generator_alone_decides(kind: str) -> None:
    first = drawn(5, kinds=[kind])
    torch.manual_seed(1), np.random.seed(1)
    assert torch.equal(first, drawn(5, kinds=[kind]))
    assert sum(torch.equal(first, drawn(seed, kinds=[kind])) for seed in range(6, 16)) == 0


def test_a_box_is_one_rectangle_anywhere() -> None:
    masks = [drawn(seed, 48, 80, kinds=["box"]) for seed in range(100)]
    assert all(map(is_rectangle, masks))
    covered = torch.stack(masks).mean(0)[0]
    assert covered[24, 40] > 0.3
    assert all(edge.max() > 0 for edge in (covered[0], covered[-1], covered[:, 0], covered[:, -1]))
    areas = [float(mask.mean()) for mask in masks]
    assert min(areas) < 0.15 and max(areas) > 0.5


def test_a_border_keeps_one_rectangle_and_touches_the_edge() -> None:
    masks = [drawn(seed, 48, 80, kinds=["border"]) for seed in range(100)]
    assert all(is_rectangle(1.0 - mask) for mask in masks)
    sides = [is_rectangle(mask) for mask in masks]  # one side is cut off
    assert 25 <= sum(sides) <= 75
    for edge in (masks_at_edge(masks, sides, name) for name in ("left", "right", "top", "bottom")):
        assert edge >= 3  # each of four is expected in an eighth of a hundred


def masks_at_edge(masks: list[torch.Tensor], sides: list[bool], name: str) -> int:
    edges = {"left": np.s_[:, 0], "right": np.s_[:, -1], "top": np.s_[0, :], "bottom": np.s_[-1, :]}
    opposite = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}[name]
    return sum(
        side and bool(mask[0][edges[name]].all()) and not bool(mask[0][edges[opposite]].any())
        for mask, side in zip(masks, sides, strict=True)
    )


def thickness(mask: torch.Tensor) -> float:
    """How much is left once three pixels are taken off all round."""
    eroded = -torch.nn.functional.max_pool2d(-mask, 7, 1, 3)
    return float(eroded.sum() / mask.sum())


def test_wide_masks_are_thick_and_strokes_are_thin() -> None:
    wide = [thickness(drawn(seed, 128, 128, kinds=["wide"])) for seed in range(40)]
    thin = [thickness(drawn(seed, 128, 128, kinds=["strokes"])) for seed in range(40)]
    assert np.mean(wide) > 0.5 and np.mean(thin) < 0.1


def test_kinds_come_as_often_as_they_should() -> None:
    both = {"kinds": ["box", "border"], "probabilities": [3, 1], "max_area": 0.3}
    boxes = sum(
        float(1 - drawn(seed, **both)[0, [0, 0, -1, -1], [0, -1, 0, -1]].max())
        for seed in range(300)
    )
    assert boxes / 300 == pytest.approx(0.75, abs=0.15)  # a few boxes reach a corner too
    never = {"kinds": ["box", "border"], "probabilities": [1, 0]}
    assert all(is_rectangle(drawn(seed, **never)) for seed in range(50))


def test_a_mask_that_never_fits_becomes_a_rectangle_that_does() -> None:
    """Thin strokes cannot cover 9/10 of a picture."""
    narrow = {"kinds": ["strokes"], "min_area": 0.9, "max_area": 0.92, "tries": 2}
    for seed in range(5):
        mask = drawn(seed, **narrow)
        assert is_rectangle(mask) and 0.9 <= float(mask.double().mean()) <= 0.92
    tiny = drawn(0, 2, 2, kinds=["box"], min_area=0.3, max_area=0.31)  # quarters alone are there
    assert float(tiny.mean()) in (0.25, 0.5)


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (3, 7)])
def test_small_pictures_have_masks(size: tuple[int, int]) -> None:
    for kind in KINDS:
        assert drawn(0, *size, kinds=[kind]).shape == (1, *size)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"kinds": []}, "kinds: Tuple should have at least 1 item"),
        ({"kinds": ["circle"]}, "kinds.0: Input should be 'box', 'strokes', 'wide' or 'border'"),
        ({"kinds": ["box", "box"]}, "kinds: one stands there twice"),
        ({"min_area": 0.5, "max_area": 0.4}, "min_area: expected less than max_area"),
        ({"probabilities": [1]}, "probabilities: expected one for each of the 4 kinds, got 1"),
        ({"kinds": ["box"], "probabilities": [0]}, "at least 0 and one above it"),
        ({"kinds": ["box"], "probabilities": [float("nan")]}, "at least 0 and one above it"),
    ],
)  # fmt: skip
def test_wrong_settings_are_told(choices: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MaskConfig.from_dict(choices)
