"""The judges of the study, each trained on real scenes when it is first asked, and kept."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import safetensors.torch
import torch
from torch import Tensor

from mezzotint.data.base import Example
from mezzotint.data.scenes import ScenesData, ScenesDataConfig
from mezzotint.errors import ConfigError
from mezzotint.evaluation.judges import (
    Classifier,
    Segmenter,
    crop_to_box,
    train_classifier,
    train_segmenter,
)
from mezzotint.evaluation.metrics import image_features
from mezzotint.models.features import load_features
from mezzotint.training.run import load_recipe

__all__ = ["MANY", "SINGLE", "Judges", "judge_singles", "judged_classes", "scenes_of"]

# recipes whose scenes the judges are trained for: one large object, or some smaller ones
SINGLE, MANY = "emoji-class", "emoji-layout"
_SINGLES, _SCENES = 2048, 4096  # pictures that the judges are trained on


def scenes_of(
    recipe: str, split: Literal["train", "validation"], count: int, seed: int = 0
) -> ScenesData:
    """Open scenes such as a recipe trains on.

    Args:
        recipe: Its name.
        split: Of the compositions.
        count: How many.
        seed: Of the scenes.

    Raises:
        ConfigError: If it trains on something else.
    """
    config = load_recipe(recipe).data
    if not isinstance(config, ScenesDataConfig):
        raise ConfigError(f"{recipe}: data.kind is {config.kind!r}, expected 'scenes'")
    asked = {"split": split, "count": count, "seed": seed}
    return ScenesData(ScenesDataConfig.from_dict({**config.to_dict(), **asked}, recipe))


def judged_classes(recipe: str) -> list[int]:
    """Return what the judges of whole pictures call each class of a recipe's scenes.

    Args:
        recipe: Its name.

    Raises:
        ConfigError: If it trains on something else, or on concepts that no judge knows.
    """
    known = scenes_of(SINGLE, "train", 1).class_names
    names = scenes_of(recipe, "train", 1).class_names
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise ConfigError(f"{recipe}: the judges, trained on {SINGLE}, do not know {unknown}")
    return [known.index(name) for name in names]


class Judges:
    """What says what a picture shows.

    Each judge is trained at first use, or read where it was kept. They see training scenes of
    another seed than the models do.

    Args:
        folder: Where they are kept, as safetensors.
        say: Told in words which judge is trained now.
    """

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self._folder, self._say = folder, say

    @property
    def whole(self) -> Classifier:
        """Of single objects, large in the picture."""
        return self._singles[0]

    @property
    def prototypes(self) -> Tensor:
        """``(classes, d)`` mean features of real pictures of each class."""
        return self._singles[1]

    @functools.cached_property
    def part(self) -> Classifier:
        """Of objects that were cut out of scenes."""
        classes = _classes(MANY)
        judge = Classifier(load_features("mobilenet-v2").dim, classes)
        if (kept := self._kept("part")) is not None:
            judge.load_state_dict(kept)
            return judge.eval()
        self._say("training the judge of objects in scenes")
        judge = _train_part(classes)
        self._keep("part", judge.state_dict())
        return judge

    @functools.cached_property
    def segmenter(self) -> Segmenter:
        """Of scenes; class 0 is the background."""
        judge = Segmenter(1 + _classes(MANY))
        if (kept := self._kept("segmenter")) is not None:
            judge.load_state_dict(kept)
            return judge.eval()
        self._say("training the segmenter, which takes some minutes")
        examples = _scenes(_SCENES)
        maps = torch.stack([e.map for e in examples if e.map is not None])
        pictures = torch.stack([e.image for e in examples])
        judge = train_segmenter(pictures, maps, judge.out.out_channels)
        self._keep("segmenter", judge.state_dict())
        return judge

    @functools.cached_property
    def _singles(self) -> tuple[Classifier, Tensor]:
        judge = Classifier(load_features("mobilenet-v2").dim, _classes(SINGLE))
        if (kept := self._kept("whole")) is not None:
            prototypes = kept.pop("prototypes")
            judge.load_state_dict(kept)
            return judge.eval(), prototypes
        self._say("training the judge of single objects")
        judge, prototypes = judge_singles()
        self._keep("whole", {**judge.state_dict(), "prototypes": prototypes})
        return judge, prototypes

    def _kept(self, name: str) -> dict[str, Tensor] | None:
        path = self._folder / f"{name}.safetensors"
        return safetensors.torch.load_file(path) if path.is_file() else None

    def _keep(self, name: str, state: Mapping[str, Tensor]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        temporary = self._folder / f".{name}.tmp"
        tensors = {key: value.contiguous() for key, value in state.items()}
        safetensors.torch.save_file(tensors, temporary)
        temporary.replace(self._folder / f"{name}.safetensors")


def judge_singles() -> tuple[Classifier, Tensor]:
    """Train the judge of single objects; with it the prototypes of their classes."""
    data = scenes_of(SINGLE, "train", _SINGLES, seed=1)
    examples = [data.load(k) for k in range(_SINGLES)]
    images = torch.stack([e.image for e in examples]).float() / 127.5 - 1.0
    labels, classes = torch.tensor([e.label for e in examples]), len(data.class_names)
    whole = train_classifier(images, labels, classes)
    features = image_features(load_features("mobilenet-v2"), images)
    return whole, torch.stack([features[labels == k].mean(0) for k in range(classes)])


def _classes(recipe: str) -> int:
    return len(scenes_of(recipe, "train", 1).class_names)


def _scenes(count: int) -> list[Example]:
    """The first of the scenes that the judges of many objects see."""
    data = scenes_of(MANY, "train", _SCENES, seed=1)
    return [data.load(k) for k in range(count)]


def _train_part(classes: int) -> Classifier:
    cut: list[Tensor] = []
    labels: list[int] = []
    for example in _scenes(_SINGLES):
        image = example.image.float() / 127.5 - 1.0
        for box in example.boxes or ():
            cut.append(crop_to_box(image, box, image.shape[-1]))
            labels.append(box.label)
    return train_classifier(torch.stack(cut), torch.tensor(labels), classes)
