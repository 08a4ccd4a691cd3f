"""Measure a first stage by what it keeps of pictures: numbers and the card beside them."""

import hashlib
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from mezzotint.checkpoints.first_stages import load_first_stage
from mezzotint.checkpoints.folder import CONFIG, WEIGHTS
from mezzotint.checkpoints.registry import INDEX
from mezzotint.device import select_device, select_precision, threads
from mezzotint.evaluation.card import (
    Cost,
    EvaluationCard,
    NetworkRecord,
    Number,
    PictureRecord,
    versions,
)
from mezzotint.evaluation.grids import reconstruction_grid
from mezzotint.evaluation.pictures import PictureSource, evenly, write_sheet
from mezzotint.evaluation.plan import check_comparable, check_counts
from mezzotint.evaluation.protocol import EvaluationProtocol
from mezzotint.evaluation.reconstruction import (
    ReconstructionScores,
    measure_reconstruction,
    restore,
)
from mezzotint.evaluation.reference import RealPictures
from mezzotint.latent_diffusion import fingerprint
from mezzotint.models.features import load_features, metric_name

__all__ = ["evaluate_first_stage", "find_first_stage"]

_ON_GRID = 8


def find_first_stage(model: str | Path) -> Path | None:
    """Return the component folder of a first stage that stands alone.

    Args:
        model: A finished autoencoder run, the folder ``model`` of one, or a component folder.

    Returns:
        None if it is something else; a whole model, for example, whose first stage draws with it.
    """
    path = Path(model).expanduser()
    if any((path / name).is_file() for name in (INDEX, f"model/{INDEX}")):
        return None
    for place in (path / "model" / "vae", path / "vae", path):
        if (place / CONFIG).is_file() and (place / WEIGHTS).is_file():
            return place
    return None


def evaluate_first_stage(
    folder: Path,
    called: str,
    real: RealPictures,
    protocol: EvaluationProtocol,
    *,
    device: str = "auto",
    grid: Path | None = None,
    compare_with: EvaluationCard | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> EvaluationCard:
    """Encode and decode real pictures in float32, and compare them with what they were.

    Args:
        folder: What `find_first_stage` found.
        called: What the user called it.
        real: The pictures.
        protocol: Whose metrics are of first stages.
        device: ``auto``, ``cpu``, ``cuda``, …
        grid: A PNG to write some pictures into, and below them what became of them.
        compare_with: A card that the new one is to be comparable with.
        on_progress: Called with what is done in words, pictures done, and pictures in all.

    Raises:
        CheckpointError: If the first stage is damaged or another kind of component.
        DataError: If pictures are missing, too few, broken or of several sizes, or the cards could
            not be compared.
        RequestError: If f does not divide their size.
    """
    first_stage, _ = load_first_stage(folder)
    execution = select_precision("float32", select_device(device))
    first_stage = first_stage.to(execution.device).eval()
    reference = real.open(None)
    record = reference.pictures.record
    check_counts(protocol, reference.pictures, reference, None)
    weights = fingerprint(first_stage.state_dict().items())
    card = EvaluationCard(
        protocol=protocol,
        numbers={},
        networks=(
            NetworkRecord(
                name=protocol.network, weights_sha256=load_features(protocol.network).weights_sha256
            ),
        ),
        evaluated=PictureRecord(
            description=called,
            fingerprint=hashlib.sha256(f"{weights} {record.fingerprint}".encode()).hexdigest(),
            count=record.count,
            available=record.available,
            height=record.height,
            width=record.width,
        ),
        reference=record,
        versions=versions(),
    )
    if compare_with is not None:
        check_comparable(compare_with, card)
    report = on_progress or (lambda *_: None)
    what = f"restoring {reference.called}"
    report(what, 0, record.count)
    images = _read(reference.pictures, protocol.batch_size)
    begun = time.perf_counter()
    scores = measure_reconstruction(
        first_stage, images, batch_size=protocol.batch_size, execution=execution
    )
    seconds = (time.perf_counter() - begun) / record.count
    report(what, record.count, record.count)
    if grid is not None:
        shown = images[evenly(_ON_GRID, len(images))]
        restored = restore(first_stage, shown, execution=execution)
        write_sheet(reconstruction_grid(shown, {"restored": restored}), grid)
    numbers, left_out = _numbers(protocol, scores)
    cost = Cost(pictures_seconds=seconds, threads=threads())
    return card.model_copy(update={"numbers": numbers, "left_out": left_out, "cost": cost})


def _read(pictures: PictureSource, batch_size: int) -> Tensor:
    count = len(pictures)
    starts = range(0, count, batch_size)
    return torch.cat([pictures.read(k, min(count, k + batch_size)) for k in starts])


def _numbers(
    protocol: EvaluationProtocol, scores: ReconstructionScores
) -> tuple[dict[str, Number], dict[str, str]]:
    kernel = scores.rkid_mobilenet_v2
    values = {
        "rate": (scores.rate, None),
        "psnr": (scores.psnr, None),
        "ssim": (scores.ssim, None),
        "lpips": (scores.lpips_mobilenet_v2, None),
        "rkid": (kernel.value, kernel.standard_error),
        "rfid": (scores.rfid_mobilenet_v2, None),
    }
    numbers: dict[str, Number] = {}
    left_out: dict[str, str] = {}
    for metric in protocol.metrics:
        value, error = values[metric]
        if math.isinf(value):
            left_out[metric] = "infinite, for a picture was restored exactly"
            continue
        plain = metric in ("rate", "psnr", "ssim")
        name = metric if plain else metric_name(metric, protocol.network)
        numbers[name] = Number(value=value, standard_error=error)
    return numbers, left_out
