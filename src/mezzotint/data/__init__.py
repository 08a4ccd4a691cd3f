"""Data sets: emoji, scenes composed of them and a user's own, one example by its index."""

from typing import Annotated

from pydantic import Field

from mezzotint.data.base import Description, Example, Fault, ImageData, StreamData
from mezzotint.data.coco import CocoData, CocoDataConfig
from mezzotint.data.emoji import EmojiData, EmojiDataConfig
from mezzotint.data.images import FolderData, FolderDataConfig
from mezzotint.data.maps import MapFolderData, MapFolderDataConfig
from mezzotint.data.portraits import PortraitsData, PortraitsDataConfig
from mezzotint.data.scenes import ScenesData, ScenesDataConfig
from mezzotint.data.stream import ShardStream
from mezzotint.data.tables import HubDataConfig, ParquetDataConfig, TableData
from mezzotint.data.webdataset import ShardData, WebDatasetConfig

__all__ = [
    "CocoData",
    "CocoDataConfig",
    "DataConfig",
    "Description",
    "EmojiData",
    "EmojiDataConfig",
    "Example",
    "Fault",
    "FolderData",
    "FolderDataConfig",
    "HubDataConfig",
    "ImageData",
    "MapFolderData",
    "MapFolderDataConfig",
    "ParquetDataConfig",
    "PortraitsData",
    "PortraitsDataConfig",
    "ScenesData",
    "ScenesDataConfig",
    "ShardData",
    "ShardStream",
    "StreamData",
    "TableData",
    "WebDatasetConfig",
    "open_data",
]

AnyDataConfig = (
    EmojiDataConfig
    | FolderDataConfig
    | ParquetDataConfig
    | HubDataConfig
    | WebDatasetConfig
    | ScenesDataConfig
    | PortraitsDataConfig
    | CocoDataConfig
    | MapFolderDataConfig
)
DataConfig = Annotated[AnyDataConfig, Field(discriminator="kind")]


def open_data(config: AnyDataConfig) -> ImageData:
    """Open the data set that a configuration describes.

    Shards are given an index, whether or not training would stream them; for that, see
    `ShardStream`.

    Raises:
        ConfigError: If the configuration chooses nothing, or what isn't there.
        DataError: If the data are missing or too many files are broken.
        MissingExtraError: If a folder or a table is asked for without the extra ``train``.
    """
    match config:
        case EmojiDataConfig():
            return EmojiData(config)
        case ScenesDataConfig():
            return ScenesData(config)
        case PortraitsDataConfig():
            return PortraitsData(config)
        case CocoDataConfig():
            return CocoData(config)
        case MapFolderDataConfig():
            return MapFolderData(config)
        case ParquetDataConfig() | HubDataConfig():
            return TableData(config)
        case WebDatasetConfig():
            return ShardData(config)
        case FolderDataConfig():
            return FolderData(config)
