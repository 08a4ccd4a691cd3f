"""What is drawn into a mask meets the picture around it."""

import pytest
import torch

from mezzotint.generation.blending import blend_in, membrane


@pytest.fixture
def plane() -> torch.Tensor:
    y, x = torch.meshgrid(torch.linspace(-1, 1, 48), torch.linspace(-1, 1, 40), indexing="ij")
    return torch.stack([0.5 * x + 0.2 * y, 0.3 * y, 0.1 - 0.4 * x])[None]


@pytest.fixture
def mask() -> torch.Tensor:
    mask = torch.zeros(1, 1, 48, 40)
    mask[..., 12:34, 9:31] = 1.0
    return mask


def test_a_plane_is_continued(plane, mask) -> None:
    known = mask <= 0
    found = membrane(plane.masked_fill(~known, 0.0), known)
    assert torch.equal(found.masked_select(known), plane.masked_select(known))
    torch.testing.assert_close(found, plane, atol=0.02, rtol=0)


def test_a_tint_is_taken_away_and_what_was_drawn_stays(plane, mask) -> None:
    detail = torch.zeros_like(plane)
    detail[..., 20:26, 18:22] = 0.7  # far from the border
    drawn = plane + detail + torch.tensor([0.2, -0.1, 0.3])[:, None, None]
    blended = blend_in(drawn, plane, mask)
    torch.testing.assert_close(blended, plane + detail, atol=0.02, rtol=0)
    kept = (mask <= 0).expand_as(plane)
    assert torch.equal(blended[kept], plane[kept])


def test_each_sample_has_its_own_mask(plane, mask) -> None:
    both = torch.cat([mask, torch.ones_like(mask)])
    drawn = torch.cat([plane + 0.2, plane + 0.3])
    blended = blend_in(drawn, torch.cat([plane, plane]), both)
    torch.testing.assert_close(blended[:1], blend_in(plane + 0.2, plane, mask))
    assert torch.equal(blended[1], drawn[1])  # nothing is kept, so there is nothing to meet


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (7, 64), (2, 9)])
def test_any_size(size) -> None:
    values = torch.rand(2, 3, *size)
    known = torch.zeros(2, 1, *size, dtype=torch.bool)
    known[..., 0, 0] = True
    found = membrane(values * known, known)
    torch.testing.assert_close(found, values[..., :1, :1].expand_as(values), atol=0.05, rtol=0)
