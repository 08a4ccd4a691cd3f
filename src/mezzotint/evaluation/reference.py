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
from mezzotint.errors import CheckpointError, ConfigError, DataError, nearest
from mezzotint.evaluation.card import versions
from mezzotint.evaluation.pictures import (
    SPLITS,
    EmojiPictures,
    PictureFolder,
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
_CACHE_FORMAT = 1  # raised when what features are computed from changes
_HELD_OUT = {name for split in ("validation", "test") for name in SPLITS[split]}


@dataclass(frozen=True)
class Reference:
    """A part of a data set, as pictures to compare with and as conditions to draw from.

    Attributes:
        pictures: What is compared with.
        config: The same as a data set, whose captions and classes a model can draw from.
        called: What messages call it.
    """

    pictures: EmojiPictures | PictureFolder
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
        split: The part that the user asked for; it comes before that of a data configuration.
        default_split: The protocol's.
        resolution: Side that they are brought to; by default they get the size of those that are
            measured, whatever a data configuration says.
        limit: At most this many, evenly spread.
    """

    against: Against
    split: str | None = None
    default_split: str = "train"
    resolution: int | None = None
    limit: int | None = None

    def open(self, size: tuple[int, int] | None) -> Reference:
        """Open them, for measured pictures of a height and width; None leaves them as they are.

        Raises:
            ConfigError: If two different splits are asked for.
            DataError: If there is nothing of the kind, or they cannot be brought to the size.
        """
        against = self.against
        if isinstance(against, EmojiDataConfig):
            return self._emoji_of(against, size)
        if isinstance(against, FolderDataConfig):
            return self._folder(against, size)
        if is_emoji(against):
            return self._emoji(str(against), size)
        return self._folder(FolderDataConfig(path=str(against)), size)

    def open_training(self, reference: Reference, size: tuple[int, int]) -> Reference | None:
        """Open all training pictures of the same data; None if it is not known which they are.

        They are those of the training split; where there are no splits, all pictures.
        """
        whole = replace(self, limit=None)
        config, record = reference.config, reference.pictures.record
        if isinstance(config, EmojiDataConfig):
            concepts = EmojiData(config).concepts
            trained_on = record.split == "all" or all(c.split == "train" for c in concepts)
            config = config.model_copy(update={"split": "train", "subset": None, "names": None})
        else:
            place = Path(config.path)  # with the name of the split, if it is one
            name = place.name or place.absolute().name
            flat = record.split is None and name not in _HELD_OUT
            trained_on = flat or record.split == "all" or name in SPLITS["train"]
            config = config.model_copy(update={"path": str(place.parent)})
        if trained_on:
            cut = self.limit is not None and self.limit < record.available
            return whole.open(size) if cut else reference
        if isinstance(config, EmojiDataConfig):
            return replace(whole, against=config, split=None).open(size)
        try:
            find_split(Path(config.path), "train", "train")
        except DataError:
            return None
        return replace(whole, against=config, split="train").open(size)

    def _emoji(self, text: str, size: tuple[int, int] | None) -> Reference:
        named = text.partition(":")[2]
        if named and self.split not in (None, named):
            raise ConfigError(f"{text}: and split {self.split!r} contradict each other; keep one")
        default = self.default_split if self.default_split in _EMOJI_SPLITS else "all"
        split = named or self.split or default
        if split not in _EMOJI_SPLITS:
            raise DataError(
                f"{text}: the emoji have no split {split!r}; {nearest(split, _EMOJI_SPLITS)}"
            )
        return self._emoji_of(EmojiDataConfig.from_dict({"split": split}), size)

    def _emoji_of(self, config: EmojiDataConfig, size: tuple[int, int] | None) -> Reference:
        named = config.names is not None or config.subset is not None
        if named and self.split is not None:
            raise ConfigError(
                f"split: {self.split!r}: the data configuration names its emoji, whatever their"
                " split; keep one"
            )
        side = self.resolution or (square(size, EMOJI) if size else config.resolution)
        update = {"resolution": side, "split": self.split or config.split}
        config = EmojiDataConfig.from_dict(config.to_dict() | update, EMOJI)
        called = EMOJI if named else f"{EMOJI}:{config.split}"
        return Reference(EmojiPictures(config, self.limit), config, called)

    def _folder(self, config: FolderDataConfig, size: tuple[int, int] | None) -> Reference:
        path, called = Path(config.path).expanduser(), config.path
        if path.is_file():
            raise DataError(f"{called}: is a file; compare with a folder or with {EMOJI!r}")
        if not path.is_dir():
            raise DataError(f"{called}: neither a folder nor {EMOJI!r}{near(path)}")
        folder, name = find_split(path, self.split or config.split, self.default_split)
        pictures = PictureFolder(
            folder,
            resolution=self.resolution,
            like=size,
            limit=self.limit,
            description=called,
            split=name,
            max_broken=config.max_broken,
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

    A cache entry is found by the content of the pictures, the weights of the network, the resize,
    the kind of device and the versions of what computed it; what is damaged is made anew.

    Args:
        job: The pictures and the networks.
        checksums: SHA-256 of the weights by network.
        processes: See `run_pass`.
        on_progress: See there.

    Returns:
        ``(N, d)`` float32 by network; under torchrun in rank 0 alone.
    """
    fingerprint = job.source.record.fingerprint
    paths = {
        n.name: cache_path(fingerprint, checksums[n.name], job.resize, job.device)
        for n in job.networks
    }
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


def cache_path(fingerprint: str, weights_sha256: str, resize: str, device: str) -> Path:
    """Return where the features of certain pictures under a certain network are kept."""
    told = versions()
    parts = (
        _CACHE_FORMAT,
        fingerprint,
        weights_sha256,
        resize,
        "uint8",
        torch.device(device).type,
        *(told[name] for name in ("mezzotint", "torch", "pillow")),
    )
    key = hashlib.sha256(repr(parts).encode())
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
