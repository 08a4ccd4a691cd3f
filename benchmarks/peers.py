"""The peers that Mezzotint is compared with, each in the settings that its name says."""

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mezzotint.device import Execution, precision_name, threads
from mezzotint.engines.openvino_files import import_openvino

__all__ = [
    "NETWORK_PEERS",
    "PIPELINE_PEERS",
    "diffusers_pipeline",
    "first_of",
    "peer_network",
    "peer_words",
    "running",
]

PIPELINE_PEERS = ("diffusers", "diffusers-best", "diffusers-compiled")
NETWORK_PEERS = (*PIPELINE_PEERS, "openvino")
_HINTS = {torch.float32: "f32", torch.bfloat16: "bf16"}


def peer_words(peer: str, precision: torch.dtype) -> str:
    """Say in words which peer, and how it is set."""
    name = precision_name(precision)
    return {
        "diffusers": "diffusers, float32, as it comes",
        "diffusers-best": f"diffusers, {name} weights, channels last, inference mode",
        "diffusers-compiled": f"diffusers, {name} weights, channels last, compiled",
        "openvino": f"OpenVINO, {name}, of diffusers' network",
    }[peer]


def peer_network(
    network: nn.Module, example: tuple[Tensor, ...], peer: str, execution: Execution
) -> Callable[[], Tensor]:
    """Return a call of a network of diffusers' as a peer would make it.

    Args:
        network: In float32; takes the example, and returns a tensor or a tuple that begins with it.
        example: Its inputs, in float32, on the processor.
        peer: One of `NETWORK_PEERS`.
        execution: The device, and the precision of a peer that may choose it.
    """
    if peer == "openvino":
        return _in_openvino(network, example, execution.precision)
    device = execution.device
    if peer == "diffusers":
        network, inputs = network.to(device), tuple(x.to(device) for x in example)
    else:
        dtype, last = execution.precision, torch.channels_last
        network = network.to(device, dtype, memory_format=last)
        inputs = tuple(x.to(device, dtype) for x in example)
        inputs = tuple(x.contiguous(memory_format=last) if x.ndim == 4 else x for x in inputs)
    if peer == "diffusers-compiled":
        network.compile()

    def call() -> Tensor:
        with running(peer):
            return first_of(network(*inputs)).float()

    return call


def running(peer: str) -> AbstractContextManager[object]:
    """Compute as a peer does: without gradients, as diffusers' pipelines, or with less still."""
    return torch.no_grad() if peer == "diffusers" else torch.inference_mode()


def first_of(output: Any) -> Tensor:
    """Return a network's tensor, which diffusers' may wrap."""
    return output if isinstance(output, Tensor) else output[0]


def _in_openvino(
    network: nn.Module, example: tuple[Tensor, ...], precision: torch.dtype
) -> Callable[[], Tensor]:
    """A network that OpenVINO's own converter converted, for inputs of these shapes alone."""
    # imported without its telemetry, which its converter then does without too
    openvino = import_openvino()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of tracing
        converted = openvino.convert_model(
            network, example_input=example, input=[tuple(x.shape) for x in example]
        )
    told = {
        "INFERENCE_PRECISION_HINT": _HINTS[precision],
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads(),  # as many as Mezzotint has
        "ENABLE_HYPER_THREADING": True,
    }
    compiled = openvino.Core().compile_model(converted, "CPU", told)
    inputs = [x.contiguous().numpy() for x in example]
    return lambda: torch.from_numpy(compiled(inputs, share_inputs=True)[0])


def diffusers_pipeline(folder: Path, peer: str, execution: Execution) -> Any:
    """Load a pipeline in diffusers as a peer would.

    Args:
        folder: Of the pipeline.
        peer: One of `PIPELINE_PEERS`.
        execution: The device, and the precision of a peer that may choose it.
    """
    import diffusers

    dtype = torch.float32 if peer == "diffusers" else execution.precision
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    pipeline = pipeline.to(execution.device, dtype)
    pipeline.set_progress_bar_config(disable=True)
    if peer != "diffusers":
        for network in (pipeline.unet, pipeline.vae):
            network.to(memory_format=torch.channels_last)
    if peer == "diffusers-compiled":
        pipeline.unet.compile()
        pipeline.vae.decoder.compile()
    return pipeline
