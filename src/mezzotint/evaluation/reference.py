"""The real pictures that generated ones are compared with, and their features, kept by content."""

import contextlib
import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mezzotint.checkpoints.folder import write_atomically
from mezzotint.data import EmojiDataConfig, FolderData, FolderDataConfig, ImageData
from mezzotint.data.emoji import EmojiData
from mezzotint.errors import CheckpointError, DataError, nearest
from mezzotint.evaluation.pictures import (
    EmojiPictures,
    PictureFolder,
    PictureSource,
    find_split,
    near,
    square,
)
from mezzotint.evaluation.shards import FeaturePass, Progress, run_pass
from mezzotint.models.weights import cache_directory

__all__ = ["EMOJI", "Against", "RealPictures", "Reference", "features_of", "is_emoji"]

Against = str | Path | EmojiDataConfig | FolderDataConfig
EMOJI = "emoji"
_EMOJI_SPLITS = ("train", "validation", "all")


@dataclass(frozen=True)
class Reference:
    """A part of a data set, as pictures to compare with and as conditions to draw from.

    Attributes:
        pictures: What is compared with.
        config: The same as a data set, whose captions and classes a model can draw from.
        called: What messages call it.
    """

    pictures: PictureSource
    config: EmojiDataConfig | FolderDataConfig
    called: str

    def conditions(self, wants: str, caption_column: str | None, labels: str) -> ImageData:
        """Open it as a data set for its captions or classes.

        Args:
            wants: ``caption`` or ``label``.
            caption_column: Of a folder's metadata file; by default ``text``.
            labels: Which labels emoji bear.

        Raises:
            DataError: If it has no captions, though they are wanted.
        """
        if isinstance(self.config, EmojiDataConfig):
            return EmojiData(self.config.model_copy(update={"labels": labels}))
        column = caption_column or self.config.caption_column or "text"
        update = {"caption_column": column if wants == "caption" else None, "cache_limit_mib": 0}
        try:
            return FolderData(self.config.model_copy(update=update))
        except DataError as error:
            if wants == "caption":
                raise DataError(
                    f"{self.called}: the model draws from captions, and they cannot be read here:"
                    f" {error}"
                ) from None
            raise


@dataclass(frozen=True)
class RealPictures:
    """What was asked for as pictures to compare with.

    Attributes:
        against: A folder of pictures, or of the splits of a data set; ``emoji`` or
            ``emoji:SPLIT``; or a data configuration.
        split: The part that the user asked for.
        default_split: The protocol's.
        resolution: Side that they are brought to; by default they get the size of those that are
            measured.
        limit: At most this many, evenly spread.
    """

    against: Against
    split: str | None = None
    default_split: str = "train"
    resolution: int | None = None
    limit: int | None = None

    def open(self, size: tuple[int, int]) -> Reference:
        """Open them, for measured pictures of a height and width.

        Raises:
            DataError: If there is nothing of the kind, or they cannot be brought to the size.
        """
        against = self.against
        if isinstance(against, EmojiDataConfig):
            return Reference(EmojiPictures(against, self.limit), against, EMOJI)
        if isinstance(against, FolderDataConfig):
            return self._folder(against, against.resolution, size)
        if is_emoji(against):
            return self._emoji(str(against), size)
        return self._folder(FolderDataConfig(path=str(against)), None, size)

    def open_training(self, reference: Reference, size: tuple[int, int]) -> Reference:
        """Open the training pictures of the same data; the reference itself if there are none."""
        against, split = self.against, reference.pictures.record.split
        if split in (None, "train", "training", "all"):
            return reference
        if isinstance(against, EmojiDataConfig | FolderDataConfig):
            against = against.model_copy(update={"split": "train"})
        elif is_emoji(against):
            against = EMOJI
        if isinstance(reference.config, FolderDataConfig):
            root = against.path if isinstance(against, FolderDataConfig) else str(against)
            try:
                find_split(Path(root).expanduser(), "train", "train")
            except DataError:
                return reference
        return replace(self, against=against, split="train").open(size)

    def _emoji(self, text: str, size: tuple[int, int]) -> Reference:
        default = self.default_split if self.default_split in _EMOJI_SPLITS else "all"
        split = text.partition(":")[2] or self.split or default
        if split not in _EMOJI_SPLITS:
            raise DataError(
                f"{text}: the emoji have no split {split!r}; {nearest(split, _EMOJI_SPLITS)}"
            )
        config = EmojiDataConfig.from_dict(
            {"resolution": self.resolution or square(size, text), "split": split}
        )
        return Reference(EmojiPictures(config, self.limit), config, f"{EMOJI}:{split}")

    def _folder(
        self, config: FolderDataConfig, resolution: int | None, size: tuple[int, int]
    ) -> Reference:
        path, called = Path(config.path).expanduser(), config.path
        if path.is_file():
            raise DataError(f"{called}: is a file; compare with a folder or with {EMOJI!r}")
        if not path.is_dir():
            raise DataError(f"{called}: neither a folder nor {EMOJI!r}{near(path)}")
        folder, name = find_split(path, config.split or self.split, self.default_split)
        pictures = PictureFolder(
            folder,
            resolution=self.resolution or resolution,
            like=size,
            limit=self.limit,
            description=called,
            split=name,
        )
        side = min(pictures.record.height, pictures.record.width)
        found = config.model_copy(update={"path": str(folder), "split": None, "resolution": side})
        return Reference(pictures, found, called)


def is_emoji(name: str | Path) -> bool:
    """Whether a name means the embedded emoji; a path that exists comes first."""
    return str(name).partition(":")[0] == EMOJI and not Path(name).exists()


def features_of(
    job: FeaturePass,
    checksums: Mapping[str, str],
    *,
    processes: int = 1,
    on_progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Return the features of real pictures, from the cache where they are there and whole.

    A cache entry is found by the content of the pictures, the weights of the network and the
    resize; what is damaged is made anew.

    Args:
        job: The pictures and the networks.
        checksums: SHA-256 of the weights by network.
        processes: See `run_pass`.
        on_progress: See there.

    Returns:
        ``(N, d)`` float32 by network; under torchrun in rank 0 alone.
    """
    fingerprint = job.source.record.fingerprint
    paths = {n.name: cache_path(fingerprint, checksums[n.name], job.resize) for n in job.networks}
    found: dict[str, Tensor] = {}
    for name, path in paths.items():
        features = _read_entry(path, len(job.source))
        if features is not None:
            found[name] = features
    missing = tuple(n for n in job.networks if n.name not in found)
    if missing:
        computed = run_pass(
            replace(job, networks=missing), processes=processes, on_progress=on_progress
        )
        if computed is None:  # another rank goes on with them
            return {}
        for name, features in computed.features.items():
            found[name] = features
            _write_entry(paths[name], features)
        shutil.rmtree(job.folder, ignore_errors=True)
    return found


def cache_path(fingerprint: str, weights_sha256: str, resize: str) -> Path:
    """Return where the features of certain pictures under a certain network are kept."""
    key = hashlib.sha256(repr((fingerprint, weights_sha256, resize, "uint8")).encode())
    return cache_directory() / "references" / f"{key.hexdigest()[:32]}.safetensors"


def _digest(features: Tensor) -> str:
    return hashlib.sha256(features.contiguous().numpy().tobytes()).hexdigest()


def _read_entry(path: Path, count: int) -> Tensor | None:
    """Read features that were kept; None if they are not there or are damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            features = file.get_tensor("features")
            told = (file.metadata() or {}).get("sha256")
    except (OSError, SafetensorError):
        return None
    whole = features.dtype is torch.float32 and len(features) == count
    return features if whole and _digest(features) == told else None


def _write_entry(path: Path, features: Tensor) -> None:
    content = safetensors.torch.save(
        {"features": features.contiguous()}, metadata={"sha256": _digest(features)}
    )
    with contextlib.suppress(CheckpointError):  # a cache that cannot be written only costs time
        write_atomically(path, content)
