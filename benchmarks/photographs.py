"""Both stages on real photographs, against bicubic resampling and against chance.

    python -m benchmarks.photographs FOLDER [--output runs/photographs] [--minutes 20]

FOLDER has ``train`` and ``test``, each with a sub-folder per class. Trains the recipe
``folder-autoencoder`` and compares its reconstructions of the test photographs with bicubic
down-and-up by 4; trains ``folder-class`` and asks a classifier, itself trained on the real training
photographs, what the drawn pictures show.
"""

import argparse
import json
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F

from mezzotint.checkpoints.first_stages import load_first_stage
from mezzotint.data.images import FolderData, FolderDataConfig
from mezzotint.evaluation.grids import image_grid
from mezzotint.evaluation.judges import Classifier, train_classifier
from mezzotint.evaluation.metrics import psnr
from mezzotint.generation.generate import to_images
from mezzotint.generation.pipeline import load
from mezzotint.latent_diffusion import FirstStage
from mezzotint.models.regularizers import DiagonalGaussian
from mezzotint.training.run import train

PER_CLASS = 20
GUIDANCE = 3.0
Result = dict[str, float | int]


def pixels(data: FolderData) -> tuple[Tensor, Tensor]:
    """Return all images ``(N, 3, 64, 64)`` in [-1, 1] and their labels ``(N,)``."""
    examples = [data.load(k) for k in range(len(data))]
    images = torch.stack([e.image for e in examples]).float() / 127.5 - 1.0
    return images, torch.tensor([e.label for e in examples])


@torch.inference_mode()
def reconstruct(first_stage: FirstStage, images: Tensor) -> Tensor:
    """Encode to the posterior's mean and decode."""
    restored: list[Tensor] = []
    for part in images.split(32):
        encoded = first_stage.encode(part)
        z = encoded.mode() if isinstance(encoded, DiagonalGaussian) else encoded
        restored.append(first_stage.decode(z).clamp(-1, 1))
    return torch.cat(restored)


def bicubic(images: Tensor, factor: int) -> Tensor:
    """Down and up again, both bicubic, the first with an antialiasing filter."""
    height, width = images.shape[-2:]
    small = F.interpolate(
        images, (height // factor, width // factor), mode="bicubic", antialias=True
    )
    return F.interpolate(small, (height, width), mode="bicubic").clamp(-1, 1)


def accuracy(classifier: Classifier, images: Tensor, labels: Tensor) -> float:
    """Share of images that the classifier puts into their class."""
    return float((classifier(images) == labels).float().mean())


def measure_autoencoder(console: Console, common: list[str], folder: str, out: Path) -> Result:
    """Train the first stage; compare its reconstructions with bicubic down-and-up by 4."""
    stage = out / "autoencoder"
    if not (stage / "model" / "vae" / "config.json").is_file():
        resume = (stage / "recipe.yaml").is_file()
        train("folder-autoencoder", common, stage, resume=resume, console=console)
    test = FolderData(FolderDataConfig(path=folder, split="test", resolution=64, crop="center"))
    real, _ = pixels(test)
    first_stage, _ = load_first_stage(stage / "model" / "vae")
    restored, resampled = reconstruct(first_stage, real), bicubic(real, 4)
    ours, theirs = float(psnr(restored, real).mean()), float(psnr(resampled, real).mean())
    places = range(0, len(real), len(real) // 12)
    shown = [images[list(places)[:12]] for images in (real, restored, resampled)]
    rows = [image for images in shown for image in to_images(images)]
    image_grid(rows, columns=12).save(out / "reconstructions.png")
    console.print(
        f"autoencoder {ours:.2f} dB, bicubic {theirs:.2f} dB: {ours - theirs:+.2f} dB"
        " (at least +3 is expected)"
    )
    return {"test_images": len(real), "autoencoder_psnr": ours, "bicubic_psnr": theirs}


def measure_classes(console: Console, common: list[str], folder: str, out: Path) -> Result:
    """Train the class-conditional model; ask a classifier what its pictures show."""
    run = out / "diffusion"
    if not (run / "model" / "model_index.json").is_file():
        overrides = [*common, f"first_stage.path={out / 'autoencoder'}"]
        resume = (run / "recipe.yaml").is_file()
        train("folder-class", overrides, run, resume=resume, console=console)
    training, test = (
        FolderData(FolderDataConfig(path=folder, split=split, resolution=64, crop="center"))
        for split in ("train", "test")
    )
    names = training.class_names or ()
    head = train_classifier(*pixels(training), len(names))
    pipeline = load(run)
    drawn = [
        picture
        for k, name in enumerate(names)
        for picture in pipeline.generate(
            class_label=name,
            num_images=PER_CLASS,
            seed=1000 * k,
            steps=25,
            spacing="trailing",
            guidance_scale=GUIDANCE,
        )
    ]
    labels = torch.arange(len(names)).repeat_interleave(PER_CLASS)
    raw = [torch.frombuffer(bytearray(d.image.tobytes()), dtype=torch.uint8) for d in drawn]
    fakes = torch.stack([r.view(64, 64, 3).permute(2, 0, 1) for r in raw]).float() / 127.5 - 1.0
    sheet = [drawn[k * PER_CLASS + i] for k in range(len(names)) for i in range(8)]
    texts = [name for name in names for _ in range(8)]
    image_grid([d.image for d in sheet], columns=8, labels=texts).save(out / "drawn.png")
    on_drawn = accuracy(head, fakes, labels)
    console.print(
        f"classifier: {on_drawn:.1%} on drawn pictures, {on_drawn * len(names):.1f} times chance"
        " (at least 3 is expected)"
    )
    return {
        "classifier_on_real_test": accuracy(head, *pixels(test)),
        "classifier_on_drawn": on_drawn,
        "chance": 1 / len(names),
        "drawn": len(drawn),
    }


def main() -> None:
    """Train, measure, print, and write grids and ``result.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--output", type=Path, default=Path("runs/photographs"))
    parser.add_argument("--minutes", type=float, default=20.0, help="of training, for each stage")
    options = parser.parse_args()
    console = Console()
    common = [f"data.path={options.folder}", f"budget.max_minutes={options.minutes}"]
    result = measure_autoencoder(console, common, options.folder, options.output)
    result |= measure_classes(console, common, options.folder, options.output)
    (options.output / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    console.print(result)


if __name__ == "__main__":
    main()
