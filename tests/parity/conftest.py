"""What the reference packages of the metrics compute, once for all tests."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mezzotint.models.features import Vgg16Fc2
from mezzotint.models.inception import FidInception

collect_ignore = ["reference_metrics.py"]  # a script, which the search for doctests would import
PACKAGES = Path(sys.prefix) / "reference"  # where `make test` installs them


@dataclass(frozen=True)
class MetricReference:
    """Inputs, the folder with the weights, and what the reference packages made of them."""

    folder: Path
    given: dict[str, Any]
    found: dict[str, Any]


@torch.no_grad()
def randomized(module: nn.Module, seed: int) -> dict[str, Tensor]:
    """Weights and statistics at which signals neither vanish nor explode."""
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}
    for name, value in module.state_dict().items():
        noise = torch.randn(value.shape[:1], generator=generator) * 0.1
        if "num_batches" in name:
            continue
        if value.numel() > 1 << 24:
            # row i is the same numbers from the i-th on, which are soon drawn, and no two are equal
            rows, columns = value.shape
            numbers = torch.randn(rows + columns, generator=generator) * (2.0 / columns) ** 0.5
            state[name] = numbers.as_strided((rows, columns), (1, 1)).contiguous()
        elif value.ndim > 1:
            scale = (2.0 / value[0].numel()) ** 0.5
            state[name] = torch.randn(value.shape, generator=generator) * scale
        else:
            one = name.endswith(("bn.weight", "running_var"))
            state[name] = noise + 1.0 if one else noise
    return state


def features(count: int, shift: float, seed: int) -> Tensor:
    """Rectified, correlated features ``(count, 32)`` float64."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(8, 32, generator=torch.Generator().manual_seed(99))
    x = torch.randn(count, 8, generator=generator) + shift * torch.eye(8)[0]
    return (x @ mixing + 0.3 * torch.randn(count, 32, generator=generator)).relu().double()


@pytest.fixture(scope="session")
def metric_reference(tmp_path_factory: pytest.TempPathFactory) -> MetricReference:
    """Run torch-fidelity and lpips on shared random weights, images and features."""
    if not (PACKAGES / "torch_fidelity").is_dir():
        pytest.fail(f"{PACKAGES}: no reference packages here; make test installs them")
    folder = tmp_path_factory.mktemp("metric-reference")
    generator = torch.Generator().manual_seed(0)
    torch.save(randomized(FidInception(), 1), folder / "inception.pth")
    head = {"classifier.6.weight": torch.zeros(1000, 4096), "classifier.6.bias": torch.zeros(1000)}
    torch.save({**randomized(Vgg16Fc2(), 2), **head}, folder / "vgg16.pth")
    pairs = torch.rand(2, 2, 3, 64, 48, generator=generator) * 2 - 1
    pairs[1, 1].lerp_(pairs[0, 1], 0.8)  # near to one another
    given = {
        "images": [
            torch.randint(256, shape, generator=generator, dtype=torch.uint8)
            for shape in ((2, 3, 40, 56), (1, 3, 320, 301))  # to enlarge and to shrink
        ],
        "pairs": pairs,
        "generated": features(150, 0.8, 1),
        "real": features(190, 0.0, 2),
        "logits": torch.randn(133, 12, generator=generator).double() * 2,
    }
    torch.save(given, folder / "given.pt")
    script = Path(__file__).with_name("reference_metrics.py")
    done = subprocess.run(
        [sys.executable, str(script), str(PACKAGES), str(folder)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.fail(f"the reference packages failed:\n{done.stderr}")
    return MetricReference(folder, given, torch.load(folder / "found.pt"))
