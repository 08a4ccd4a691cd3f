"""Does a LoRA learn another style from at most 100 pictures?

    python -m benchmarks.lora_style BASE [--output runs/lora-style] [--set KEY=VALUE …]

BASE is a run of the recipe ``emoji-text``, which is trained on Fluent emoji. The recipe
``emoji-noto-lora`` trains a LoRA of it on pictures of Noto emoji (unless ``--lora`` names a run
that did). The same captions, of compositions that neither has seen, are drawn with the same seeds
before and after. Two linear classifiers on MobileNetV2's features, trained on real pictures of both
styles, say of what style each picture is, and which of the concepts it shows; what they say of real
pictures that they have not seen stands beside it.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from mezzotint.checkpoints.load import load_any
from mezzotint.data.scenes import ScenesData, ScenesDataConfig
from mezzotint.evaluation.grids import labelled_rows
from mezzotint.evaluation.judges import Classifier, train_classifier
from mezzotint.generation.generate import generate_each
from mezzotint.generation.pipeline import Pipeline, load
from mezzotint.training.finetune_recipe import FinetuneRecipe
from mezzotint.training.lora import LORA_FILE
from mezzotint.training.run import load_recipe, train

STYLES = ("fluent", "noto")  # in the order of the classifier's classes
MOST_PICTURES = 100
SHOWN = 8


def real(recipe: FinetuneRecipe, style: str, split: str, count: int, seed: int) -> ScenesData:
    """Return scenes such as the LoRA is trained on, in a style."""
    assert isinstance(recipe.data, ScenesDataConfig), "the recipe's data are scenes"
    changes = {"style": style, "split": split, "count": count, "seed": seed}
    return ScenesData(ScenesDataConfig.from_dict(recipe.data.to_dict() | changes))


def pixels(images: list[Tensor]) -> Tensor:
    """Return ``(N, 3, H, W)`` in -1..1 of uint8 images."""
    return torch.stack(images).float() / 127.5 - 1.0


def of_pictures(pictures: list[Image.Image]) -> Tensor:
    """Return ``(N, 3, H, W)`` in -1..1 of drawn pictures."""
    rows = [torch.frombuffer(bytearray(p.tobytes()), dtype=torch.uint8) for p in pictures]
    shaped = [
        r.view(p.height, p.width, 3).permute(2, 0, 1) for r, p in zip(rows, pictures, strict=True)
    ]
    return pixels(shaped)


def judges(recipe: FinetuneRecipe, count: int) -> tuple[Classifier, Classifier, dict[str, float]]:
    """Train both classifiers, and measure them on real pictures that they have not seen."""
    sets: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    classes = 0
    for split, size, seed in (("train", count, 101), ("validation", max(count // 4, 16), 102)):
        images, styles, labels = list[Tensor](), list[int](), list[int]()
        for number, style in enumerate(STYLES):
            data = real(recipe, style, split, size, seed)
            classes = len(data.class_names)
            for k in range(len(data)):
                example = data.load(k)
                assert example.label is not None, "every scene has a first object"
                images.append(example.image)
                styles.append(number)
                labels.append(example.label)
        sets[split] = pixels(images), torch.tensor(styles), torch.tensor(labels)
    images, styles, labels = sets["train"]
    style = train_classifier(images, styles, len(STYLES))
    concept = train_classifier(images, labels, classes)
    images, styles, labels = sets["validation"]
    own = {
        "style_of_real": float((style(images) == styles).float().mean()),
        "concept_of_real": float((concept(images) == labels).float().mean()),
    }
    return style, concept, own


def drawn(
    pipeline: Pipeline, captions: list[str], adapters: tuple[dict[str, Any], ...], steps: int
) -> list[Image.Image]:
    """Draw each caption, picture k with the seed k."""
    fields: dict[str, Any] = {"steps": steps, "spacing": "trailing", "guidance_scale": 3.0}
    requests = [
        pipeline.request(**fields, prompt=caption, seed=seed, adapters=adapters)
        for seed, caption in enumerate(captions)
    ]
    return [item.image for item in generate_each(pipeline, requests)]


def loads_in_diffusers(base: str, adapter: Path) -> int:
    """Load the UNet and the file in diffusers, through PEFT; returns how many layers it changes."""
    from diffusers import UNet2DConditionModel

    unet: Any = UNet2DConditionModel.from_pretrained(Path(base) / "model" / "unet").eval()
    ours = load_any(base).model.unet.eval()
    x = torch.randn(1, ours.config.in_channels, 8, 8)
    tokens = torch.randn(1, 4, ours.config.cross_attention_dim or 1)
    with torch.no_grad():
        before = unet(x, 500, tokens).sample
        unet.load_lora_adapter(adapter.parent, prefix="unet", weight_name=adapter.name)
        assert not torch.equal(unet(x, 500, tokens).sample, before), "it acts"
    return sum(name.endswith("lora_A.default_0.weight") for name in unet.state_dict())


def main() -> None:
    """Train, draw, judge, print, and write pictures and ``result.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base")
    parser.add_argument("--lora", type=Path, help="a run that is trained already")
    parser.add_argument("--output", type=Path, default=Path("runs/lora-style"))
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--count", type=int, default=256, help="captions")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--real", type=int, default=1024, help="pictures of a style to judge by")
    options = parser.parse_args()
    console = Console()
    recipe = load_recipe("emoji-noto-lora", [f"base={options.base}", *options.overrides])
    assert isinstance(recipe, FinetuneRecipe)
    assert isinstance(recipe.data, ScenesDataConfig) and recipe.data.count <= MOST_PICTURES
    run = options.lora or train(recipe, output=options.output / "lora", console=console)
    adapter = run / "model" / LORA_FILE
    style, concept, result = judges(recipe, options.real)
    asked = real(recipe, "noto", "validation", options.count, 0)
    told = [asked.describe(k) for k in range(options.count)]
    captions = [item.caption or "" for item in told]
    labels = torch.tensor([item.label or 0 for item in told])
    pipeline = load(options.base)
    sheets: dict[str, list[Image.Image]] = {}
    for name, uses in (("before", ()), ("after", ({"name": str(adapter), "weight": 1.0},))):
        sheets[name] = drawn(pipeline, captions, uses, options.steps)
        images = of_pictures(sheets[name])
        result[f"noto_{name}"] = float(style(images).float().mean())
        result[f"concept_{name}"] = float((concept(images) == labels).float().mean())
    tensors = load_file(adapter)
    numbers: dict[str, Any] = {
        **result,
        "pictures": recipe.data.count,
        "captions": options.count,
        "rank": recipe.lora.rank if recipe.lora else 8,
        "adapter_parameters": sum(t.numel() for t in tensors.values()),
        "adapter_bytes": adapter.stat().st_size,
        "layers_in_diffusers": loads_in_diffusers(options.base, adapter),
    }
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "result.json").write_text(json.dumps(numbers, indent=1) + "\n")
    rows = {f"{name}: {numbers[f'noto_{name}']:.0%} Noto": p[:SHOWN] for name, p in sheets.items()}
    labelled_rows(rows).save(options.output / "before-after.png")
    print(json.dumps(numbers))
    print(
        "| pictures | rank | judged Noto before | after | right concept before | after"
        " | of real pictures: style, concept |\n|---|---|---|---|---|---|---|\n"
        f"| {numbers['pictures']} | {numbers['rank']} | {numbers['noto_before']:.1%}"
        f" | {numbers['noto_after']:.1%} | {numbers['concept_before']:.1%}"
        f" | {numbers['concept_after']:.1%}"
        f" | {numbers['style_of_real']:.1%}, {numbers['concept_of_real']:.1%} |"
    )


if __name__ == "__main__":
    main()
