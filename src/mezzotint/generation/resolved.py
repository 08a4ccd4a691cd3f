"""What a picture was drawn with, which its request says beside what was asked."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from mezzotint.config import Config

__all__ = ["DecoderUse", "ReadAs", "Resolved", "Sha256"]

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class DecoderUse(Config):
    """A small decoder that decoded in place of the model's own.

    Attributes:
        path: Where it was.
        sha256: Of its files.
    """

    path: str
    sha256: Sha256


class ReadAs(Config):
    """What was said of a single file in place of a guess; see `mezzotint.load`."""

    family: str | None = None
    prediction: str | None = None
    weights: Literal["ema", "raw"] | None = None
    config: str | None = None


class Resolved(Config):
    """What a picture was drawn with, beyond what was asked: enough to draw it again bit for bit.

    Attributes:
        model_hash: Of every weight of the model, as hexadecimal digits.
        precision: What autocast computed in, ``"float32"`` or ``"bfloat16"`` for example.
        engine: What ran the networks, ``"torch"`` for example.
        device: torch's name of the device.
        threads: How many threads of the processor computed.
        batch_size: How many images were drawn at once.
        batch_row: Which of these this is, from 0.
        image_index: Which image of the request this is, from 0; its seed is ``seed + image_index``.
        mezzotint_version: The Mezzotint that drew it.
        torch_version: The torch that it ran on.
        engine_version: The engine that it ran on, if that is another.
        quantization: What large weights of the UNet were rounded to, if they were.
        decoder: What decoded in place of the model's own decoder, if anything did.
        adapters: The sha256 of each adapter and embedding that acted, by name.
        read_as: What was said of the model's file when it was read.
    """

    model_hash: str
    precision: str
    engine: str
    device: str
    # bounded, because a picture from a stranger says these too
    threads: Annotated[int, Field(ge=1, le=1024)]
    batch_size: Annotated[int, Field(ge=1, le=4096)]
    batch_row: Annotated[int, Field(ge=0)]
    image_index: Annotated[int, Field(ge=0)]
    mezzotint_version: str
    torch_version: str
    engine_version: str | None = None
    quantization: Literal["int8"] | None = None
    decoder: DecoderUse | None = None
    adapters: dict[str, Sha256] = {}
    read_as: ReadAs = ReadAs()

    @model_validator(mode="after")
    def _row_of_batch(self) -> Self:
        if self.batch_row >= self.batch_size:
            raise ValueError(
                f"batch_row {self.batch_row} is not a row of a batch of {self.batch_size}"
            )
        return self
