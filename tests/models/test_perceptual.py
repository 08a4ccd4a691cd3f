import hashlib
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mezzotint.data import EmojiDataConfig, open_data
from mezzotint.errors import CheckpointError, ConfigError, MissingExtraError
from mezzotint.models import perceptual
from mezzotint.models.perceptual import (
    EfficientNetLite0,
    FeatureDistance,
    PerceptualConfig,
    SamePadConv,
    build_perceptual,
    lpips_vgg16,
)


@pytest.fixture(scope="module")
def distance() -> FeatureDistance:
    built = build_perceptual(PerceptualConfig())
    assert isinstance(built, FeatureDistance)
    return built


@pytest.fixture(scope="module")
def images() -> Tensor:
    """Six emoji, ``(6, 3, 64, 64)`` in -1..1."""
    data = open_data(EmojiDataConfig(resolution=64, background="grey"))
    return torch.stack([data.load(i).image for i in range(0, 600, 100)]) / 127.5 - 1


def blur(x: Tensor, times: int) -> Tensor:
    for _ in range(times):
        x = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    return x


def test_zero_at_the_same_image_and_symmetric(distance: FeatureDistance, images: Tensor) -> None:
    assert torch.equal(distance(images, images), torch.zeros(6))
    other = images.flip(3).roll(7, 2)
    torch.testing.assert_close(distance(images, other), distance(other, images))
    assert (distance(images, other) > 0).all()


def test_it_grows_with_blur_and_with_noise(distance: FeatureDistance, images: Tensor) -> None:
    blurred = torch.stack([distance(images, blur(images, n)) for n in (0, 1, 3, 9)])
    assert (blurred.diff(dim=0) > 0).all()
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    noisy = torch.stack([distance(images, images + s * noise) for s in (0, 0.03, 0.1, 0.4)])
    assert (noisy.diff(dim=0) > 0).all()


def test_it_sees_what_squared_error_does_not(distance: FeatureDistance, images: Tensor) -> None:
    """A slight change of brightness is nearer than a blur of the same squared error."""
    blurred = blur(images, 3)
    error = (blurred - images).square().mean(dim=(1, 2, 3), keepdim=True)
    brighter = images + error.sqrt()
    assert (distance(images, brighter) < distance(images, blurred)).all()


@pytest.mark.parametrize("size", [32, 48, 65, 256])
def test_gradients_flow_at_every_size(distance: FeatureDistance, size: int) -> None:
    x = torch.rand(1, 3, size, size, requires_grad=True)
    y = torch.rand(1, 3, size, size)
    distance(x, y).sum().backward()
    assert torch.isfinite(x.grad).all()
    assert float((x.grad != 0).float().mean()) > 0.99


def test_descent_on_it_brings_an_image_back(distance: FeatureDistance, images: Tensor) -> None:
    target = images[:2]
    start = blur(target, 3)
    x = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([x], 0.005)
    for _ in range(25):
        loss = distance(x, target).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = x.detach()
    assert (distance(found, target) < 0.5 * distance(start, target)).all()
    # in pixels too, though it was never told so
    assert float((found - target).square().mean()) < float((start - target).square().mean())


def test_autocast_does_not_reach_it(distance: FeatureDistance, images: Tensor) -> None:
    expected = distance(images, blur(images, 1))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(distance(images, blur(images, 1)), expected)


def test_it_is_frozen_and_stays_in_evaluation(distance: FeatureDistance) -> None:
    distance.train()
    assert not any(module.training for module in distance.modules())
    assert not any(parameter.requires_grad for parameter in distance.parameters())


@torch.no_grad()
def test_folding_the_normalisations_changes_nothing() -> None:
    torch.manual_seed(0)
    trunk = EfficientNetLite0()
    for name, tensor in trunk.state_dict().items():
        if "running" in name:
            tensor.uniform_(0.5, 1.5)
    trunk.eval()
    x = torch.randn(1, 3, 64, 64)
    before = trunk(x)
    assert [tuple(f.shape[1:]) for f in before] == [
        (16, 32, 32),
        (24, 16, 16),
        (40, 8, 8),
        (112, 4, 4),
        (320, 2, 2),
    ]
    trunk.fuse()
    for folded, expected in zip(trunk(x), before, strict=True):
        torch.testing.assert_close(folded, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(
    ("size", "kernel", "pads"), [(8, 3, (0, 1)), (7, 3, (1, 1)), (8, 5, (1, 2))]
)
def test_same_padding_is_tensorflows(size: int, kernel: int, pads: tuple[int, int]) -> None:
    conv = SamePadConv(2, 3, kernel, stride=2, bias=False)
    x = torch.randn(1, 2, size, size)
    expected = F.conv2d(F.pad(x, (*pads, *pads)), conv.weight, stride=2)
    assert expected.shape[-1] == -(-size // 2)
    torch.testing.assert_close(conv(x), expected)


def vgg_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    state = {
        name: torch.randn(value.shape, generator=generator) * value[0].numel() ** -0.5
        for name, value in perceptual.Vgg16().state_dict().items()
    }
    for i, width in enumerate((64, 128, 256, 512, 512)):
        state[f"lin{i}.model.1.weight"] = torch.rand(1, width, 1, 1, generator=generator)
    return state


def test_lpips_reads_the_layouts_that_are_about(tmp_path: Path) -> None:
    tensors = vgg_tensors()
    x, y = torch.rand(2, 1, 3, 32, 32)
    expected = lpips_vgg16(tensors, "one file")(x, y)
    assert float(expected) > 0
    heads = {name: value for name, value in tensors.items() if name.startswith("lin")}
    trunk = {name: value for name, value in tensors.items() if name.startswith("features")}
    torch.save({**trunk, "classifier.6.bias": torch.zeros(9)}, tmp_path / "vgg16.pth")
    torch.save(heads, tmp_path / "heads.pth")
    digest = hashlib.sha256((tmp_path / "vgg16.pth").read_bytes()).hexdigest()
    config = PerceptualConfig(
        network="lpips-vgg16",
        weights=str(tmp_path / "vgg16.pth"),
        sha256=digest,
        heads=str(tmp_path / "heads.pth"),
    )
    assert torch.equal(build_perceptual(config)(x, y), expected)

    def sliced(name: str) -> str:
        index = int(name.split(".")[1])
        number = 1 + sum(index >= start for start in (4, 9, 16, 23))
        return f"loss.perceptual_loss.net.slice{number}.{name.removeprefix('features.')}"

    whole = {sliced(name): value for name, value in trunk.items()}
    whole |= {f"loss.perceptual_loss.{name}": value for name, value in heads.items()}
    torch.save({"state_dict": whole}, tmp_path / "first-stage.ckpt")
    config = PerceptualConfig(network="lpips-vgg16", weights=str(tmp_path / "first-stage.ckpt"))
    assert torch.equal(build_perceptual(config)(x, y), expected)


def test_missing_heads_are_named(tmp_path: Path) -> None:
    trunk = {k: v for k, v in vgg_tensors().items() if k.startswith("features")}
    with pytest.raises(CheckpointError, match=r"no linear heads .*'heads'"):
        lpips_vgg16(trunk, "vgg16.pth")
    trunk["features.0.weight"] = torch.zeros(2, 3, 3, 3)
    with pytest.raises(CheckpointError, match=r"features.0.weight has shape \(2, 3, 3, 3\)"):
        lpips_vgg16(trunk, "vgg16.pth")


def test_wrong_weights_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    config = PerceptualConfig(weights=str(path))
    with pytest.raises(CheckpointError, match="no such file"):
        build_perceptual(config)
    path.write_bytes(b"PK\x03\x04 not really")
    with pytest.raises(CheckpointError, match="the archive has no end; is it truncated"):
        build_perceptual(config)
    torch.save({"a": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match="not the weights of EfficientNetLite0"):
        build_perceptual(config)
    with pytest.raises(CheckpointError, match="its sha256 is"):
        build_perceptual(PerceptualConfig(weights=str(path), sha256="0" * 64))


def test_a_download_is_kept_once_and_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import http.server
    import threading

    from mezzotint.models.weights import locate_weights

    served: list[str] = []
    content = b"weights"

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            served.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args: object) -> None:
            pass

    cache = tmp_path / "cache"
    monkeypatch.setenv("MEZZOTINT_CACHE", str(cache))
    digest = hashlib.sha256(content).hexdigest()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/vgg.pth"
        with pytest.raises(CheckpointError, match="expected 0000"):
            locate_weights(url, "0" * 64)
        assert [p for p in cache.rglob("*") if p.is_file()] == []
        assert locate_weights(url, digest).read_bytes() == content
        assert locate_weights(url, digest).read_bytes() == content
        server.shutdown()
    assert len(served) == 2
    with pytest.raises(CheckpointError, match="cannot be downloaded"):
        locate_weights(url, "1" * 64)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"network": "lpips-vgg16"}, "needs weights"),
        ({"network": "lpips-vgg16", "weights": "https://a/b.pth"}, "sha256 is required"),
        ({"heads": "heads.pth"}, "heads belong to 'lpips-vgg16'"),
        ({"network": "alexnet"}, "network"),
    ],
)
def test_wrong_configurations(data: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PerceptualConfig.from_dict(data)


def test_a_missing_package_says_which_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"mezzotint\[train\]"):
        build_perceptual(PerceptualConfig())


def test_none_is_zero() -> None:
    x, y = torch.rand(2, 5, 3, 8, 8)
    assert torch.equal(build_perceptual(PerceptualConfig(network="none"))(x, y), torch.zeros(5))
