"""Data sets: the embedded emoji and a user's own folder, one example by its index."""

from typing import Annotated

from pydantic import Field

from mezzotint.data.base import Example, Fault, ImageData
from mezzotint.data.emoji import EmojiData, EmojiDataConfig
from mezzotint.data.images import FolderData, FolderDataConfig

__all__ = [
    "DataConfig",
    "EmojiData",
    "EmojiDataConfig",
    "Example",
    "Fault",
    "FolderData",
    "FolderDataConfig",
    "ImageData",
    "open_data",
]

DataConfig = Annotated[EmojiDataConfig | FolderDataConfig, Field(discriminator="kind")]


def open_data(config: EmojiDataConfig | FolderDataConfig) -> ImageData:
    """Open the data set that a configuration describes.

    Raises:
        ConfigError: If the configuration chooses nothing, or what isn't there.
        DataError: If the data are missing or too many files are broken.
        MissingExtraError: If a folder is asked for without the extra ``train``.
    """
    return EmojiData(config) if isinstance(config, EmojiDataConfig) else FolderData(config)
