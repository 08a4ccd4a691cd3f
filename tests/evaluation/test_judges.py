"""What says what a picture shows."""

import torch

from mezzotint.conditioning.base import Box
from mezzotint.evaluation.judges import (
    box_iou,
    box_of_class,
    crop_to_box,
    mean_iou,
    train_segmenter,
)


def test_iou_of_boxes_in_closed_form() -> None:
    whole, half = Box(0, 0.0, 0.0, 1.0, 1.0), Box(0, 0.0, 0.0, 0.5, 1.0)
    assert box_iou(whole, whole) == 1.0
    assert box_iou(whole, half) == 0.5
    assert abs(box_iou(half, Box(0, 0.25, 0.0, 0.75, 1.0)) - 1 / 3) < 1e-9
    assert box_iou(half, Box(0, 0.5, 0.0, 1.0, 1.0)) == 0.0
    assert box_iou(None, half) == box_iou(half, None) == 0.0


def test_the_box_of_a_class_is_tight() -> None:
    found = torch.zeros(8, 10, dtype=torch.int64)
    found[2:5, 3:9] = 4
    assert box_of_class(found, 3) == Box(3, 0.3, 0.25, 0.9, 0.625)
    assert box_of_class(found, 2) is None


def test_mean_iou_in_closed_form() -> None:
    asked = torch.tensor([[[0, 0, 1, 1], [0, 0, 1, 1]]])
    found = torch.tensor([[[0, 0, 0, 1], [0, 0, 1, 1]]])
    # background 4 of 5, class 1 3 of 4; class 2 is in neither
    assert abs(mean_iou(found, asked, 3) - (4 / 5 + 3 / 4) / 2) < 1e-9
    assert mean_iou(asked, asked, 3) == 1.0
    assert mean_iou(1 - asked, asked, 2) == 0.0


def test_a_cut_out_box_is_what_lies_in_it() -> None:
    image = torch.zeros(3, 8, 8)
    image[:, 2:6, 4:8] = 1.0
    cut = crop_to_box(image, Box(0, 0.5, 0.25, 1.0, 0.75), 16)
    assert cut.shape == (3, 16, 16) and bool((cut == 1.0).all())
    assert crop_to_box(image, Box(0, 0.99, 0.99, 1.0, 1.0), 4).shape == (3, 4, 4)


def test_a_segmenter_learns_colours() -> None:
    generator = torch.Generator().manual_seed(0)
    maps = torch.randint(3, (32, 4, 4), generator=generator).repeat_interleave(4, 1)
    maps = maps.repeat_interleave(4, 2)
    images = (torch.nn.functional.one_hot(maps, 3) * 255).permute(0, 3, 1, 2).to(torch.uint8)
    segmenter = train_segmenter(images[:24], maps[:24], 3, steps=60, batch_size=8)
    found = segmenter.classes_of(images[24:].float() / 127.5 - 1.0)
    assert mean_iou(found, maps[24:], 3) > 0.9
