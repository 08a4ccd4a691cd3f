"""The judges of the study, trained once on real scenes and kept."""

from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from mezzotint.data.scenes import ScenesData, ScenesDataConfig
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

__all__ = ["MANY", "SINGLE", "open_judges", "scenes"]

# as the recipes have them: one large object, or up to three smaller ones
SINGLE = {"max_objects": 1, "min_size": 0.5, "max_size": 0.85}
MANY = {"max_objects": 3, "min_size": 0.3, "max_size": 0.55}
_SINGLES, _SCENES = 2048, 4096  # pictures that the judges are trained on


def scenes(kind: dict[str, float], split: str, count: int, seed: int = 0) -> ScenesData:
    """Open scenes of one of the two kinds."""
    config = {"split": split, "count": count, "seed": seed, **kind}
    return ScenesData(ScenesDataConfig.from_dict(config, "scenes"))


def open_judges(path: Path, on_progress: Callable[[int, int], None] | None = None) -> Judges:
    """Train the judges, or read those that were trained before.

    They see training scenes of another seed than the models do.

    Args:
        path: Where they are kept, as safetensors.
        on_progress: Called with (steps done, steps in all) of the longest training.
    """
    classes = len(scenes(SINGLE, "train", 1).class_names)
    width = load_features("mobilenet-v2").dim
    if path.is_file():
        tensors = safetensors.torch.load_file(path)
        whole, part = Classifier(width, classes), Classifier(width, classes)
        segmenter = Segmenter(1 + classes)
        for name, network in (("whole", whole), ("part", part), ("segmenter", segmenter)):
            head = f"{name}."
            network.load_state_dict(
                {k.removeprefix(head): v for k, v in tensors.items() if k.startswith(head)}
            )
            network.eval()
        return Judges(whole, part, segmenter, tensors["prototypes"])
    judges = _train(classes, on_progress)
    tensors = {"prototypes": judges.prototypes}
    for name in ("whole", "part", "segmenter"):
        state = getattr(judges, name).state_dict()
        tensors |= {f"{name}.{key}": value.contiguous() for key, value in state.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    safetensors.torch.save_file(tensors, temporary)
    temporary.replace(path)
    return judges


def _train(classes: int, on_progress: Callable[[int, int], None] | None) -> Judges:
    data = scenes(SINGLE, "train", _SINGLES, seed=1)
    single = [data.load(k) for k in range(_SINGLES)]
    images = torch.stack([e.image for e in single]).float() / 127.5 - 1.0
    labels = torch.tensor([e.label for e in single])
    whole = train_classifier(images, labels, classes)
    features = image_features(load_features("mobilenet-v2"), images)
    prototypes = torch.stack([features[labels == k].mean(0) for k in range(classes)])
    data = scenes(MANY, "train", _SCENES, seed=1)
    many = [data.load(k) for k in range(_SCENES)]
    cut: list[Tensor] = []
    cut_labels: list[int] = []
    for example in many[:_SINGLES]:
        image = example.image.float() / 127.5 - 1.0
        for box in example.boxes or ():
            cut.append(crop_to_box(image, box, image.shape[-1]))
            cut_labels.append(box.label)
    part = train_classifier(torch.stack(cut), torch.tensor(cut_labels), classes)
    maps = torch.stack([e.map for e in many if e.map is not None])
    pictures = torch.stack([e.image for e in many])
    segmenter = train_segmenter(pictures, maps, 1 + classes, on_progress=on_progress)
    return Judges(whole, part, segmenter, prototypes)
