"""A picture back to itself, bit for bit."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch

from mezzotint.checkpoints.decoders import LoadedDecoder
from mezzotint.device import select_device
from mezzotint.engines.offload import OffloadKind
from mezzotint.engines.select import QuantizationKind
from mezzotint.errors import ConfigError, RequestError
from mezzotint.generation.adapters import adapters_of
from mezzotint.generation.generate import GeneratedImage, generate_each, nth
from mezzotint.generation.guides import refuse_unknown
from mezzotint.generation.inputs import InputPictures
from mezzotint.generation.metadata import read_request
from mezzotint.generation.pipeline import load
from mezzotint.generation.resolved import DecoderUse

__all__ = ["replay"]


@contextmanager
def _thread_count(count: int) -> Generator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _present(device: str) -> bool:
    try:
        select_device(device)
    except ConfigError:
        return False
    return True


def _check_decoder(path: Path, recorded: DecoderUse, found: LoadedDecoder) -> None:
    if found.sha256 != recorded.sha256:
        raise RequestError(
            f"{path}: decoded by a decoder with the hash {recorded.sha256}, but {found.path} has"
            f" {found.sha256}; name the right one with --decoder"
        )


def replay(
    path: Path,
    model: str | None = None,
    device: str = "auto",
    inputs: Sequence[Path] = (),
    *,
    engine: str = "auto",
    decoder: str | Path | None = None,
    offload: OffloadKind = "none",
    quantization: Literal["auto"] | QuantizationKind = "auto",
) -> GeneratedImage:
    """Draw a picture again from the request that it carries, bit for bit.

    The picture is drawn at the batch size, precision and thread count that it was drawn with, and
    by the engine.

    Args:
        path: A picture drawn by Mezzotint.
        model: Where the model is now, if it has moved.
        device: Where to draw; ``auto`` is where it was drawn, if that device is here. Another kind
            of device may differ in the last bit.
        inputs: The pictures that it began from, where they are no longer where they were.
        engine: ``auto`` is what drew it. Another may differ by a rounding.
        decoder: Where the small decoder is now that decoded it, if it has moved.
        offload: Where weights stand; see `mezzotint.generation.pipeline.load`.
        quantization: ``auto`` is what drew it; see there. Another is not quite the same picture.

    Returns:
        The picture, and its request with the engine and quantization that have drawn it now.

    Raises:
        RequestError: If the picture holds no request, or the model, a decoder, an adapter or an
            input is not the one that drew it, or a Python function guided it.
        MissingExtraError: If its engine is not installed.
    """
    request = read_request(path)
    resolved = request.resolved
    if resolved is None or (request.model is None and model is None):
        raise RequestError(f"{path}: its request does not say which model drew it")
    if device == "auto":
        device = resolved.device if _present(resolved.device) else "cpu"
    refuse_unknown(request)
    read_as = {name: told for name, told in resolved.read_as.to_dict().items() if told is not None}
    engine = resolved.engine if engine == "auto" else engine
    if quantization == "auto":
        quantization = resolved.quantization or "none"
    small = resolved.decoder
    if decoder is not None and small is None:
        raise RequestError(f"{path}: the model's own decoder decoded it; leave --decoder out")
    pipeline = load(
        model or str(request.model),
        device,
        resolved.precision,
        engine=engine,
        decoder=decoder or (small.path if small is not None else None),
        offload=offload,
        quantization=quantization,
        **read_as,
    )
    if small is not None and pipeline.decoder is not None:
        _check_decoder(path, small, pipeline.decoder)
    if pipeline.model_hash != resolved.model_hash:
        raise RequestError(
            f"{path}: drawn by a model with the hash {resolved.model_hash}, but {pipeline.name} has"
            f" {pipeline.model_hash}; name the right one with --model"
        )
    pictures = InputPictures()
    named = [request.image, request.mask, request.semantic_map]
    for guide in request.guides:
        named += [guide.image, guide.mask]
    wanted = [i for i in named if i is not None]
    for supplied in inputs:
        pictures.supply(supplied, wanted)
    first = resolved.image_index - resolved.batch_row
    rows = [nth(request, first + row) for row in range(resolved.batch_size)]
    with pipeline.adapted(adapters_of(pipeline, request)) as sums:
        if sums != resolved.adapters:
            changed = sorted({n for n, _ in sums.items() ^ resolved.adapters.items()})
            raise RequestError(f"{path}: other adapters drew it: {', '.join(changed)}")
    with _thread_count(resolved.threads):
        drawn = generate_each(pipeline, rows, pictures=pictures, batch_size=len(rows))
    ran_by: dict[str, str | None] = {}
    if engine != resolved.engine:
        ran_by |= {"engine": engine, "engine_version": pipeline.engine.version}
    if quantization != (resolved.quantization or "none"):
        ran_by["quantization"] = None if quantization == "none" else quantization
    if ran_by:
        request = request.model_copy(update={"resolved": resolved.model_copy(update=ran_by)})
    return GeneratedImage(drawn[resolved.batch_row].image, request)
