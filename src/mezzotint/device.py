"""Where a network runs and in which precision, by what the machine really has; reasons in words."""

import contextlib
import ctypes
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mezzotint.errors import ConfigError, nearest

__all__ = [
    "PRECISIONS",
    "Execution",
    "autocast",
    "bf16_instructions",
    "drawing_reasons",
    "give_back_freed_memory",
    "int8_instructions",
    "keep_freed_memory",
    "memory_total",
    "packs_weights",
    "precision_name",
    "quantizes_weights",
    "select_device",
    "select_precision",
    "threads",
    "widened",
]

PRECISIONS = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

_CPUINFO = Path("/proc/cpuinfo")
_CGROUP_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


@dataclass(frozen=True, kw_only=True)
class Execution:
    """A device, a precision, and why these two.

    Attributes:
        device: Where the networks and their inputs stand.
        precision: What autocast computes in; ``float32`` and ``float64`` mean that there is no
            autocast. Weights and the sampler's state stay float32, but in ``float64``, which is for
            comparisons.
        reasons: One sentence for the device and one for the precision.
    """

    device: torch.device
    precision: torch.dtype
    reasons: tuple[str, ...]

    @property
    def weights(self) -> torch.dtype:
        """What trained weights and their optimizer are kept in."""
        return torch.float64 if self.precision is torch.float64 else torch.float32


def select_device(name: str = "auto") -> torch.device:
    """Choose where to run.

    Args:
        name: ``"auto"`` (a CUDA device if torch can use one, else the processor), or a name of
            torch's such as ``"cpu"``, ``"cuda"``, ``"cuda:1"`` or ``"mps"``.

    Raises:
        ConfigError: If torch knows no such device, or this machine does not have it.

    Example:
        >>> select_device("cpu")
        device(type='cpu')
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind = name.partition(":")[0]
    if kind not in ("cpu", "cuda", "mps"):
        raise ConfigError(f"device {name!r}: {nearest(kind, ('auto', 'cpu', 'cuda', 'mps'))}")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device {name!r}: expected a name such as cpu, cuda or cuda:1") from None
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise ConfigError(
                f"device {name!r}: torch {torch.__version__} can use {count} CUDA devices here;"
                " choose cpu or auto"
            )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError(f"device {name!r}: there is none here; choose cpu or auto")
    return device


def select_precision(name: str, device: torch.device) -> Execution:
    """Choose what to compute in on a device.

    Args:
        name: ``"auto"`` (bfloat16 where the device computes in it, else float32), ``"float32"``,
            ``"bfloat16"`` or ``"float16"``.
        device: What `select_device` returned.

    Returns:
        Device and precision, with the reasons for both.

    Raises:
        ConfigError: If there is no such precision, or the device cannot compute in it.

    Example:
        >>> select_precision("float32", select_device("cpu")).precision
        torch.float32
    """
    if name != "auto" and name not in PRECISIONS:
        raise ConfigError(f"precision {name!r}: {nearest(name, ('auto', *PRECISIONS))}")
    if name == "float16" and device.type == "cpu":
        raise ConfigError(
            "precision 'float16': a processor trains and draws in float32 or bfloat16"
        )
    native, why = _bf16(device)
    if name == "auto":
        precision = torch.bfloat16 if native else torch.float32
        reason = f"{precision_name(precision)}: {why}"
    else:
        precision = PRECISIONS[name]
        reason = f"{name}: asked for"
        if precision is torch.bfloat16 and not native:
            reason += f", though {why}, so it is emulated and slow"
    return Execution(device=device, precision=precision, reasons=(_device_reason(device), reason))


def autocast(execution: Execution) -> contextlib.AbstractContextManager[object]:
    """Return a context in which torch computes in the chosen precision where it is safe."""
    if execution.precision in (torch.float32, torch.float64):
        return contextlib.nullcontext()
    return torch.autocast(execution.device.type, dtype=execution.precision)


def packs_weights(execution: Execution) -> tuple[bool, str]:
    """Say whether weights are packed to draw, see `mezzotint.nn.packed`, and why."""
    if execution.device.type != "cpu":
        return False, f"as they are: packing is for processors, not {execution.device}"
    if not torch.backends.mkldnn.is_available() or not _has_packing():
        return False, f"as they are: torch {torch.__version__} has no oneDNN that packs them here"
    if execution.precision is torch.bfloat16 and not bf16_instructions():
        return False, "as they are: bfloat16 is emulated here"
    if execution.precision not in (torch.float32, torch.bfloat16):
        return False, f"as they are: oneDNN packs none in {precision_name(execution.precision)}"
    return True, "packed once for oneDNN's kernels, which else order them anew at every call"


def quantizes_weights(execution: Execution) -> tuple[bool, str]:
    """Say whether weights may be int8, see `mezzotint.nn.quantized`, and what that gains."""
    packed, why = packs_weights(execution)
    if not packed:
        return False, why
    if not _has_int8():
        return False, f"as they are: torch {torch.__version__} has no oneDNN for int8 here"
    names = int8_instructions()
    if names:
        return True, f"less memory and time: this processor has {' and '.join(names)}"
    return True, (
        "less memory and more time: this processor has neither AMX nor VNNI, so that weights are"
        " widened at every call"
    )


def drawing_reasons(execution: Execution) -> dict[str, str]:
    """Say what else is decided for drawing on a device, and why: sentences by their subjects."""
    quantizes, gain = quantizes_weights(execution)
    int8 = f"if asked for (--quantization int8), {gain}" if quantizes else f"not to be had: {gain}"
    if execution.device.type != "cpu":
        return {
            "weights": packs_weights(execution)[1],
            "weights in int8": int8,
            "attention": "torch's kernel",
        }
    packed, why = packs_weights(execution)
    attention = "torch's kernel"
    if execution.precision is torch.bfloat16 and "AMX" not in bf16_instructions():
        attention = (
            "tiles of queries from 256 tokens on, where they are faster; else torch's kernel"
        )
    kept = "kept by the process: clearing its pages anew takes longer than norms and activations"
    return {
        "weights": why,
        "weights in int8": int8,
        "layout": "channels last, as packed layers have it" if packed else "as torch has it",
        "attention": attention,
        "freed memory": kept if _mallopt() is not None else "left to the system's allocator",
    }


def widened(x: torch.Tensor) -> torch.Tensor:
    """Return half precision as float32, in which losses are computed; wider types stay."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def precision_name(precision: torch.dtype) -> str:
    """Name a precision as recipes and requests write it, ``"bfloat16"`` for example."""
    return str(precision).removeprefix("torch.")


def threads() -> int:
    """Count the threads that torch computes with on the processor."""
    return torch.get_num_threads()


def memory_total(device: torch.device | None = None) -> int:
    """Return how much memory a device has, in bytes; a container's limit counts.

    Args:
        device: A CUDA device for its own memory; anything else for the machine's.
    """
    if device is not None and device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [_number(path) for path in _CGROUP_LIMITS]
    return min([physical, *(limit for limit in limits if limit is not None)])


def keep_freed_memory() -> None:
    """Let the allocator keep large blocks that are freed, in this process, from now on.

    glibc gives every large block back to the kernel, which then clears its pages anew at the next
    allocation: in training on a processor, whose tensors have the same sizes step after step, that
    was an eighth of the time, and in a decoder a normalisation or an activation of 64 MB took four
    to six times as long. Elsewhere than on glibc this does nothing.
    """
    mallopt = _mallopt()
    if mallopt is not None:
        trim_threshold, mmap_max, arena_max = -1, -4, -8  # the names' numbers in malloc.h
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(arena_max, 1)


def give_back_freed_memory() -> None:
    """Let the system have the memory that was freed, whatever `keep_freed_memory` said.

    Blocks of other sizes than those that are asked for next are of no use, and count as this
    process's. Elsewhere than on glibc this does nothing.
    """
    trim = _glibc("malloc_trim")
    if trim is not None:
        trim(0)


def _mallopt() -> Any:
    return _glibc("mallopt")


def _glibc(function: str) -> Any:
    """A function of glibc's allocator, if that is the allocator."""
    return getattr(ctypes.CDLL(None), function, None) if os.name == "posix" else None


def _has_packing() -> bool:
    """Whether this build of torch has the operators of its own compiler that pack weights."""
    names = ("_reorder_convolution_weight", "_reorder_linear_weight")
    return all(hasattr(torch.ops.mkldnn, name) for name in names)


def _has_int8() -> bool:
    """Whether this build of torch has the operators of its own compiler that multiply int8."""
    names = ("qconv_prepack", "qconv2d_pointwise", "qlinear_prepack", "qlinear_pointwise")
    return all(hasattr(torch.ops.onednn, name) for name in names)


def int8_instructions() -> tuple[str, ...]:
    """Name the int8 instructions of this processor that oneDNN has use for: AMX, VNNI."""
    names: list[str] = []
    if _supports("_is_amx_tile_supported", "amx_int8"):
        names.append("AMX")
    if _supports("_is_vnni_supported", "avx512_vnni") or "avx_vnni" in _processor_flags():
        names.append("VNNI")
    return tuple(names)


def bf16_instructions() -> tuple[str, ...]:
    """Name the bfloat16 instructions of this processor: AMX, AVX512_BF16, both or none."""
    names: list[str] = []
    if _supports("_is_amx_tile_supported", "amx_bf16"):
        names.append("AMX")
    if _supports("_is_avx512_bf16_supported", "avx512_bf16"):
        names.append("AVX512_BF16")
    return tuple(names)


def _bf16(device: torch.device) -> tuple[bool, str]:
    """Whether a device computes in bfloat16 itself, and the sentence that says so."""
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return True, "this CUDA device computes in it"
        return False, "this CUDA device has no bfloat16"
    if device.type == "cpu":
        names = bf16_instructions()
        if names:
            return True, f"this processor has {' and '.join(names)}"
        return False, "this processor has neither AMX nor AVX512_BF16"
    return False, f"bfloat16 is not tried on {device.type}"


def _device_reason(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device}: {torch.cuda.get_device_name(device)}"
    if device.type == "cpu" and torch.cuda.is_available():
        return "cpu: asked for, though torch can use a CUDA device"
    if device.type == "cpu":
        return f"cpu: torch {torch.__version__} can use no CUDA device here"
    return f"{device}: asked for"


def _supports(asks: str, flag: str) -> bool:
    """Ask torch by a private name (there is no public one), or Linux where torch lacks it."""
    ask = getattr(torch.cpu, asks, None)
    return bool(ask()) if ask is not None else flag in _processor_flags()


def _processor_flags() -> frozenset[str]:
    """The instruction sets that Linux lists; nothing on other systems."""
    try:
        text = _CPUINFO.read_text(encoding="utf-8")
    except OSError:
        return frozenset()
    lines = [line for line in text.splitlines() if line.startswith("flags")]
    return frozenset(lines[0].partition(":")[2].split()) if lines else frozenset()


def _number(path: Path) -> int | None:
    """The integer that a file holds, or nothing (the file says ``max`` where there is no limit)."""
    try:
        return int(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
