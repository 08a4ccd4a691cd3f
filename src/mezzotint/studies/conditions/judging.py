"""The judges of the study, trained once on real scenes and kept."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import safetensors.torch
import torch
from torch import Tensor

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
from mezzotint.studies.conditions.measures import Judges
from mezzotint.training.run import load_recipe

__all__ = ["MANY", "SINGLE", "judge_singles", "open_judges", "scenes_of"]

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


def open_judges(path: Path, on_progress: Callable[[int, int], None] | None = None) -> Judges:
    """Train the judges, or read those that were trained before.

    They see training scenes of another seed than the models do.

    Args:
        path: Where they are kept, as safetensors.
        on_progress: Called with (steps done, steps in all) of the longest training.
    """
    single, many = (len(scenes_of(r, "train", 1).class_names) for r in (SINGLE, MANY))
    width = load_features("mobilenet-v2").dim
    if path.is_file():
        tensors = safetensors.torch.load_file(path)
        whole, part = Classifier(width, single), Classifier(width, many)
        segmenter = Segmenter(1 + many)
        for name, network in (("whole", whole), ("part", part), ("segmenter", segmenter)):
            head = f"{name}."
            network.load_state_dict(
                {k.removeprefix(head): v for k, v in tensors.items() if k.startswith(head)}
            )
            network.eval()
        return Judges(whole, part, segmenter, tensors["prototypes"])
    judges = _train(many, on_progress)
    tensors = {"prototypes": judges.prototypes}
    for name in ("whole", "part", "segmenter"):
        state = getattr(judges, name).state_dict()
        tensors |= {f"{name}.{key}": value.contiguous() for key, value in state.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    safetensors.torch.save_file(tensors, temporary)
    temporary.replace(path)
    return judges


def judge_singles() -> tuple[Classifier, Tensor]:
    """Train the judge of single objects; with it the prototypes of their classes."""
    data = scenes_of(SINGLE, "train", _SINGLES, seed=1)
    examples = [data.load(k) for k in range(_SINGLES)]
    images = torch.stack([e.image for e in examples]).float() / 127.5 - 1.0
    labels, classes = torch.tensor([e.label for e in examples]), len(data.class_names)
    whole = train_classifier(images, labels, classes)
    features = image_features(load_features("mobilenet-v2"), images)
    return whole, torch.stack([features[labels == k].mean(0) for k in range(classes)])


def _train(many: int, on_progress: Callable[[int, int], None] | None) -> Judges:
    whole, prototypes = judge_singles()
    data = scenes_of(MANY, "train", _SCENES, seed=1)
    examples = [data.load(k) for k in range(_SCENES)]
    cut: list[Tensor] = []
    cut_labels: list[int] = []
    for example in examples[:_SINGLES]:
        image = example.image.float() / 127.5 - 1.0
        for box in example.boxes or ():
            cut.append(crop_to_box(image, box, image.shape[-1]))
            cut_labels.append(box.label)
    part = train_classifier(torch.stack(cut), torch.tensor(cut_labels), many)
    maps = torch.stack([e.map for e in examples if e.map is not None])
    pictures = torch.stack([e.image for e in examples])
    segmenter = train_segmenter(pictures, maps, 1 + many, on_progress=on_progress)
    return Judges(whole, part, segmenter, prototypes)
