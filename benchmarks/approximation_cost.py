"""What feature reuse and guidance in an interval cost of a shipped model's quality.

    python -m benchmarks.approximation_cost [--model emoji] [--pictures 5000] [--output FILE.json]

The model draws captions that training held out, from the same noise with the options and without.
Prints the KID of both to the validation pictures of these captions, on MobileNetV2's features. Goes
on where it was stopped.
"""

import argparse
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

from mezzotint.checkpoints.registry import resolve_model
from mezzotint.data.portraits import PortraitsData
from mezzotint.evaluation.distributions import kid
from mezzotint.evaluation.metrics import image_features
from mezzotint.generation.generate import generate_each
from mezzotint.generation.inputs import to_pixels
from mezzotint.generation.pipeline import Pipeline, load
from mezzotint.generation.request import FeatureReuse
from mezzotint.models.features import load_features
from mezzotint.studies.demo import trained_portraits
from mezzotint.studies.machine import this_machine

PIECE = 100  # pictures whose features are kept at once
BATCH = 20


def draw(pipeline: Pipeline, captions: Sequence[str], first: int, how: dict[str, Any]) -> Tensor:
    """Draw captions, and return the features of the pictures, ``(N, d)``."""
    requests = [
        pipeline.request(prompt=caption, seed=first + k, **how)
        for k, caption in enumerate(captions)
    ]
    drawn = generate_each(pipeline, requests, batch_size=BATCH)
    images = torch.stack([to_pixels(item.image) for item in drawn])
    return image_features(load_features("mobilenet-v2"), images)


def piecewise(
    pipeline: Pipeline, captions: Sequence[str], how: dict[str, Any], work: Path, console: Console
) -> Tensor:
    """Draw all captions in pieces, of which those that lie in a folder are not drawn again."""
    work.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(captions), PIECE):
        path = work / f"{start:06d}.safetensors"
        if not path.is_file():
            part = captions[start : start + PIECE]
            temporary = path.with_suffix(".tmp")
            save_file({"features": draw(pipeline, part, start, how)}, temporary)
            temporary.replace(path)
            console.print(f"{work.name}: {start + len(part):,} of {len(captions):,}")
    return torch.cat([load_file(path)["features"] for path in sorted(work.glob("*.safetensors"))])


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw, compare, print, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--pictures", type=int, default=5000)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--feature-reuse", type=int, default=3)
    parser.add_argument("--guidance-interval", type=float, nargs=2, default=(0.5, 5.0))
    parser.add_argument("--work", type=Path, default=Path("runs/approximation-cost"))
    parser.add_argument("--output", type=Path, default=Path("docs/results/approximation-cost.json"))
    options = parser.parse_args(arguments)
    console = Console(soft_wrap=True)
    pipeline = load(options.model)
    config = trained_portraits(resolve_model(options.model)).config
    more = {"split": "validation", "count": options.pictures}
    data = PortraitsData(config.model_copy(update=more))
    examples = [data.load(k) for k in range(len(data))]
    captions = [example.caption or "" for example in examples]
    low, high = options.guidance_interval
    ways: dict[str, dict[str, Any]] = {
        "plain": {"steps": options.steps},
        "approximated": {
            "steps": options.steps,
            "feature_reuse": FeatureReuse(interval=options.feature_reuse),
            "guidance_interval": (low, high),
        },
    }
    drawn: dict[str, Tensor] = {}
    for name, how in ways.items():
        told = json.dumps([pipeline.model_hash, captions, repr(how)])
        folder = options.work / f"{name}-{hashlib.sha256(told.encode()).hexdigest()[:12]}"
        drawn[name] = piecewise(pipeline, captions, how, folder, console)
    images = torch.stack([example.image for example in examples]).float() / 127.5 - 1.0
    network = load_features("mobilenet-v2")
    real = torch.cat([image_features(network, part) for part in images.split(PIECE)])
    found = {name: kid(features, real) for name, features in drawn.items()}
    plain, other = found["plain"], found["approximated"]
    error = (plain.standard_error**2 + other.standard_error**2) ** 0.5
    result = {
        "model": pipeline.model_hash,
        "pictures": len(captions),
        "steps": options.steps,
        "feature_reuse": options.feature_reuse,
        "guidance_interval": [low, high],
        "kid": {name: [e.value, e.standard_error] for name, e in found.items()},
        "kid_of_both": kid(drawn["plain"], drawn["approximated"]).value,
        "costs": other.value / plain.value - 1,
        "standard_errors": (other.value - plain.value) / error,
        "machine": this_machine(pipeline.execution).to_dict(),
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    rows = [f"{name}: {e.value:.4f} ± {e.standard_error:.4f}" for name, e in found.items()]
    console.print(f"KID to {len(captions):,} validation pictures: {'; '.join(rows)}")
    console.print(
        f"the options cost {result['costs']:+.1%}, {result['standard_errors']:+.1f} standard errors"
    )


if __name__ == "__main__":
    main()
