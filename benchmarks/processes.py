"""Measuring memory in processes of their own. Linux only."""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["answer", "child", "forget_peak", "status"]


def status(key: str) -> float:
    """Return a number of MiB that Linux says of this process, ``VmRSS`` or ``VmHWM`` for example.

    ``VmRSS`` is what is resident: memory of its own (``RssAnon``) and pages of files that it has
    mapped (``RssFile``), libraries' included. ``VmHWM`` is the peak of that, as ``ru_maxrss`` is,
    which though a process inherits from the one that has started it.
    """
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{key}:"))


def forget_peak() -> float:
    """Let the peak of memory begin anew, and return what is in use, in MiB."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return status("VmRSS")


def child(module: str, function: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
    """Run a function of a benchmark in a process of its own.

    Args:
        module: That is run with ``--child``, and calls `answer` then.
        function: One of those that it hands to `answer`.
        *arguments: What JSON can hold.

    Returns:
        What the function returned.
    """
    told = json.dumps([function.__name__, *arguments])
    done = subprocess.run(
        [sys.executable, "-m", module, "--child", told],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def answer(told: str, functions: Mapping[str, Callable[..., Any]]) -> None:
    """Run what `child` asks of this process, and print what it returns."""
    name, *arguments = json.loads(told)
    print(json.dumps(functions[name](*arguments) or {}))
