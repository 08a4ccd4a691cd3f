"""Files of weights: what is damaged is told as such, whatever the unpickler makes of it."""

from pathlib import Path

import pytest

from mezzotint.errors import CheckpointError
from mezzotint.models.weights import read_state_dict


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"weights",
        b"\x80\x02.",  # ends with nothing on the stack
        b"\x80\x02h\x05.",  # recalls what was never stored
        b"\x80\x02K\x01a.",  # appends to nothing
        b"\x80\x02X\xff\xff\xff\xffab",  # a text longer than the file
        b"PK\x03\x04" + bytes(60),
    ],
)
@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_a_damaged_file_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_state_dict(path)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(
        f"{path}: damaged, or not a file of weights: "
    )
    assert not message.endswith(": ")


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none\.pth: damaged, or not a file of weights"):
        read_state_dict(tmp_path / "none.pth")
