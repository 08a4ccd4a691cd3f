"""What is typed, as the fields of a request."""

from pathlib import Path

import pytest
from PIL import Image

from mezzotint.cli.asked import check, of_picture, reuse_of
from mezzotint.errors import RequestError
from mezzotint.generation.inputs import InputPictures
from mezzotint.generation.metadata import write_image
from mezzotint.generation.request import FeatureReuse, GenerationRequest


def test_what_was_drawn_from_a_picture_is_drawn_so_again(tmp_path: Path) -> None:
    """A request that is read back says of every option what it is by default."""
    Image.new("RGB", (16, 16)).save(tmp_path / "in.png")
    image = InputPictures().add(tmp_path / "in.png")
    request = GenerationRequest(task="image-to-image", prompt="moss", image=image, strength=0.5)
    write_image(Image.new("RGB", (16, 16)), request, tmp_path / "out.png")
    fields = of_picture(tmp_path / "out.png", {})
    assert fields["strength"] == 0.5
    check(fields)
    with pytest.raises(RequestError, match="not for the task 'super-resolution'"):
        check({**fields, "back_projection": 8})


def test_approximations_are_read_back_and_may_be_taken_back(tmp_path: Path) -> None:
    reuse = FeatureReuse(interval=3, blocks=2)
    request = GenerationRequest(
        task="text-to-image", prompt="moss", feature_reuse=reuse, token_merging=0.5
    )
    write_image(Image.new("RGB", (16, 16)), request, tmp_path / "out.png")
    fields = of_picture(tmp_path / "out.png", {})
    assert FeatureReuse.from_dict(fields["feature_reuse"]) == reuse
    assert fields["token_merging"] == 0.5
    with pytest.raises(RequestError, match="feature_reuse and tiled_sampling exclude each other"):
        check({**fields, "tiled_sampling": True})
    check({**fields, "tiled_sampling": True, "feature_reuse": reuse_of("1")})


@pytest.mark.parametrize(
    ("text", "fields"),
    [("3", {"interval": 3}), ("3:2", {"interval": 3, "blocks": 2}), (None, None)],
)
def test_reuse_is_an_interval_and_blocks(text: str | None, fields: dict[str, int] | None) -> None:
    assert reuse_of(text) == fields


@pytest.mark.parametrize("text", ["", "two", "3:", "3:2:1", ":2", "2.5"])
def test_what_is_no_reuse_is_told(text: str) -> None:
    with pytest.raises(RequestError, match=f"--feature-reuse {text!r}: expected"):
        reuse_of(text)
