"""What is typed, as the fields of a request."""

from pathlib import Path

import pytest
from PIL import Image

from mezzotint.cli.asked import check, of_picture
from mezzotint.errors import RequestError
from mezzotint.generation.inputs import InputPictures
from mezzotint.generation.metadata import write_image
from mezzotint.generation.request import GenerationRequest


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
