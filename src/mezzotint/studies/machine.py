"""What a study ran on: times that were taken elsewhere do not stand beside these."""

import platform
from pathlib import Path

import torch

from mezzotint.config import Config
from mezzotint.device import Execution, precision_name, threads

__all__ = ["Machine", "this_machine"]

_CPUINFO = Path("/proc/cpuinfo")


class Machine(Config):
    """What a run ran on: minutes mean nothing without it.

    Attributes:
        processor: Its model, or that of the CUDA device.
        threads: Of the processor.
        device: torch's name for the kind of device.
        precision: What was computed in.
    """

    processor: str
    threads: int
    device: str
    precision: str


def this_machine(execution: Execution) -> Machine:
    """Say what computes here."""
    return Machine(
        processor=_processor(execution.device),
        threads=threads(),
        device=execution.device.type,
        precision=precision_name(execution.precision),
    )


def _processor(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        text = _CPUINFO.read_text(encoding="utf-8")
    except OSError:  # not Linux
        text = ""
    named = (line.partition(":")[2].strip() for line in text.splitlines() if "model name" in line)
    return next(named, "") or platform.processor() or platform.machine()
