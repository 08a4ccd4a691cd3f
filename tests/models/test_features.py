"""The registry of feature networks, where their weights come from, and what they return."""

import hashlib
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mezzotint.data import EmojiDataConfig, open_data
from mezzotint.errors import CheckpointError, ConfigError
from mezzotint.evaluation.distributions import inception_score
from mezzotint.models import features
from mezzotint.models.features import (
    FEATURE_NETWORKS,
    FeatureNetwork,
    ShippedWeights,
    load_features,
    metric_name,
)
from mezzotint.models.inception import FidInception
from mezzotint.models.mobilenet import MobileNetV2


@pytest.fixture(scope="module")
def network() -> FeatureNetwork:
    return load_features("mobilenet-v2")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def bytes_of(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, shape, generator=generator, dtype=torch.uint8)


def test_the_trunk_has_torchvisions_names_and_sizes() -> None:
    """Frozen from the published file: 2,223,872 weights, and where its blocks stand."""
    trunk = MobileNetV2()
    state = trunk.features.state_dict(prefix="features.")
    assert sum(p.numel() for p in trunk.features.parameters()) == 2_223_872
    for name, shape in (
        ("features.0.0.weight", (32, 3, 3, 3)),
        ("features.1.conv.0.0.weight", (32, 1, 3, 3)),
        ("features.1.conv.1.weight", (16, 32, 1, 1)),
        ("features.7.conv.1.0.weight", (192, 1, 3, 3)),
        ("features.17.conv.2.weight", (320, 960, 1, 1)),
        ("features.18.1.running_var", (1280,)),
    ):
        assert tuple(state[name].shape) == shape


def test_features_are_those_of_the_network_at_its_own_size(network: FeatureNetwork) -> None:
    x = draw(2, 3, 224, 224)
    found = network(x)
    assert found.shape == (2, network.dim) == (2, 1280)
    assert found.dtype == torch.float32
    assert (found >= 0).all() and float(found.amax()) <= 6.0  # means of a ReLU6
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    unit = ((x + 1) / 2 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    expected = F.adaptive_avg_pool2d(network.trunk.features(unit), 1).flatten(1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_folding_the_normalisations_changes_nothing() -> None:
    torch.manual_seed(0)
    trunk = MobileNetV2()
    for name, tensor in trunk.state_dict().items():
        if "running" in name:
            tensor.uniform_(0.5, 1.5)
    x = torch.randn(2, 3, 64, 64)
    expected = trunk.eval()(x)[0]
    info = FEATURE_NETWORKS["mobilenet-v2"]
    folded = FeatureNetwork("mobilenet-v2", trunk, info, "").trunk
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    torch.testing.assert_close(folded(x)[0], expected, rtol=1e-4, atol=1e-5)


def test_a_picture_keeps_its_features_through_a_resize(network: FeatureNetwork) -> None:
    """A smooth picture at 64 px is nearer to itself at 224 px than to other pictures."""
    coarse = draw(6, 3, 8, 8)
    large = F.interpolate(coarse, (224, 224), mode="bicubic", align_corners=False).clamp(-1, 1)
    small = F.interpolate(coarse, (64, 64), mode="bicubic", align_corners=False).clamp(-1, 1)
    similarity = F.normalize(network(small)) @ F.normalize(network(large)).T
    assert torch.equal(similarity.argmax(dim=1), torch.arange(6))
    assert float(similarity.diagonal().min()) > 0.95


def test_bytes_and_floats_give_the_same_features(network: FeatureNetwork) -> None:
    images = bytes_of(3, 3, 40, 56)
    found, _ = network.extract(images)
    torch.testing.assert_close(found, network(images / 127.5 - 1), rtol=1e-4, atol=1e-5)
    other, _ = network.extract(images, "tf1-bilinear")
    assert float((other - found).norm() / found.norm()) > 0.02


@pytest.mark.parametrize("name", ["mobilenet-v2", "random"])
def test_features_do_not_depend_on_the_neighbours(name: str) -> None:
    network = load_features(name)
    images = bytes_of(5, 3, 48, 48)
    whole, logits = network.extract(images)
    for split in (1, 2):
        parts = [network.extract(part) for part in images.split(split)]
        torch.testing.assert_close(torch.cat([p[0] for p in parts]), whole, rtol=1e-5, atol=1e-5)
        if logits is not None:
            again = torch.cat([p[1] for p in parts if p[1] is not None])
            torch.testing.assert_close(again, logits, rtol=1e-4, atol=1e-5)


def test_autocast_and_training_mode_do_not_reach_it(network: FeatureNetwork) -> None:
    x = draw(1, 3, 64, 64)
    expected = network(x)
    network.train()
    with torch.autocast("cpu", torch.bfloat16):
        found = network(x)
    assert torch.equal(found, expected)
    assert not any(module.training for module in network.modules())
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_the_resolution_can_be_chosen(network: FeatureNetwork) -> None:
    x = draw(1, 3, 96, 96)
    seen: list[Tensor] = []

    def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0])

    hook = network.trunk.register_forward_pre_hook(note)
    network(x, size=96)
    network(x)
    hook.remove()
    assert [s.shape[-1] for s in seen] == [96, 224]


def test_random_is_the_same_everywhere_and_classifies() -> None:
    network = load_features("random")
    images = bytes_of(2, 3, 32, 32)
    found, logits = network.extract(images)
    assert found.shape == (2, network.dim)
    assert logits is not None and logits.shape == (2, 10)
    torch.manual_seed(7)
    again = load_features("random")
    assert again.weights_sha256 == network.weights_sha256
    assert torch.equal(again.extract(images)[0], found)
    # frozen: a number measured on it today is the same tomorrow
    ramp = torch.arange(3 * 32 * 32).remainder(251).to(torch.uint8).view(1, 3, 32, 32)
    assert float(network.extract(ramp)[0].mean()) == pytest.approx(0.641263, rel=1e-4)


def test_metrics_are_named_after_their_network() -> None:
    assert metric_name("fid", "inception-v3-fid") == "fid"
    assert metric_name("fid", "mobilenet-v2") == "fid_mobilenet_v2"
    assert metric_name("precision", "vgg16") == "precision_vgg16"
    assert metric_name("fid", "inception-v3-fid", "6726825d" + "0" * 56) == "fid"
    assert metric_name("fid", "inception-v3-fid", "0" * 64) == "fid_custom_inception"
    assert metric_name("recall", "vgg16", "0" * 64) == "recall_custom_vgg16"
    suffixes = [info.suffix for info in FEATURE_NETWORKS.values()]
    assert len(set(suffixes)) == len(suffixes)
    assert load_features("random").suffix == "random"
    with pytest.raises(ConfigError, match="unknown feature network"):
        metric_name("fid", "inception")


def test_an_unknown_name_lists_the_networks() -> None:
    with pytest.raises(ConfigError, match="did you mean 'mobilenet-v2'"):
        load_features("mobilenet")


def test_what_ships_takes_no_weights() -> None:
    for name, why in (("mobilenet-v2", "are shipped"), ("random", "are drawn")):
        with pytest.raises(ConfigError, match=f"{why}.*; leave out 'a.pth'"):
            load_features(name, weights="a.pth")


def test_a_damaged_file_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    info = FEATURE_NETWORKS["mobilenet-v2"]
    assert isinstance(info.weights, ShippedWeights)
    trunk, classifier = info.weights.files.items()
    for files, message in (
        (
            (trunk, (classifier[0], "0" * 64)),
            "classifier.safetensors: damaged, its sha256 is wrong",
        ),
        ((trunk, ("none", classifier[1])), "none: cannot be read"),
    ):
        changed = replace(info, weights=ShippedWeights(dict(files)))
        monkeypatch.setattr(features, "FEATURE_NETWORKS", MappingProxyType({"x": changed}))
        with pytest.raises(CheckpointError, match=message):
            load_features("x")


def test_the_resolution_is_kept_at_strides() -> None:
    with torch.no_grad():
        assert MobileNetV2().eval().features(torch.zeros(1, 3, 64, 64)).shape == (1, 1280, 2, 2)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which published weights are looked for; it is not there yet."""
    monkeypatch.setenv("MEZZOTINT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "weights"


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("inception-v3-fid", "weights-inception-2015-12-05-6726825d.pth"),
        ("vgg16", "vgg16-397923af.pth"),
    ],
)
def test_weights_that_are_not_there_are_told_how_to_get(cache: Path, name: str, file: str) -> None:
    with pytest.raises(CheckpointError) as error:
        load_features(name)
    message = str(error.value)
    for part in (name, file, str(cache), "--weights", "weights="):
        assert part in message
    with pytest.raises(CheckpointError, match="no such file"):
        load_features(name, weights=str(cache / file))


def test_a_file_under_its_published_name_is_held_to_the_checksum_in_it(cache: Path) -> None:
    cache.mkdir(parents=True)
    for file in ("weights-inception-2015-12-05-6726825d.pth", "vgg16-397923af.pth"):
        (cache / file).write_bytes(b"not these weights")
    digest = hashlib.sha256(b"not these weights").hexdigest()
    for name, prefix in (("inception-v3-fid", "6726825d"), ("vgg16", "397923af")):
        with pytest.raises(CheckpointError, match=f"sha256 is {digest}, expected {prefix}…"):
            load_features(name)


def test_foreign_and_missing_tensors_are_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.pth"
    state = FidInception().state_dict()
    torch.save({**state, "AuxLogits.fc.weight": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match="1 tensors are unexpected.*'AuxLogits.fc.weight'"):
        load_features("inception-v3-fid", weights=str(path))
    state["fc.weight"] = state["fc.weight"][:1000]  # ImageNet's classes of another Inception
    torch.save(state, path)
    with pytest.raises(CheckpointError, match=r"fc.weight has shape \(1000, 2048\), expected"):
        load_features("inception-v3-fid", weights=str(path))
    del state["Mixed_7c.branch_pool.bn.running_var"]
    torch.save(state, path)
    with pytest.raises(CheckpointError, match="first is 'Mixed_7c.branch_pool.bn.running_var'"):
        load_features("inception-v3-fid", weights=str(path))


def emoji_called(captions: list[str]) -> Tensor:
    data = open_data(EmojiDataConfig(resolution=128, split="all", background="white"))
    places = {concept.caption: k for k, concept in enumerate(data.concepts)}
    return torch.stack([data.load(places[caption]).image for caption in captions])


def test_the_classifier_knows_imagenets_classes(network: FeatureNetwork) -> None:
    """Among 1,000, those of the emoji that look most like photographs, in ImageNet's order."""
    classes = {"umbrella": 879, "volleyball": 890, "basketball": 430, "soccer ball": 805}
    _, logits = network.extract(emoji_called(list(classes)))
    assert logits is not None and network.has_logits
    assert logits.shape == (4, 1000)
    assert logits.argmax(1).tolist() == list(classes.values())


def test_eight_bits_of_the_classifier_cost_nothing_that_counts(network: FeatureNetwork) -> None:
    """The weights before lay anywhere within half a step of those that are shipped.

    Drawn anew there, they give the Inception Score to 0.5 % and logits to 1 %. (From the original
    file it was 0.04 % and 0.4 %, on 200 emoji.)
    """
    classifier = network.trunk.classifier[1]
    steps = classifier.weight.abs().amax(1, keepdim=True) / 127.0
    torch.testing.assert_close(classifier.weight / steps, (classifier.weight / steps).round())
    data = open_data(EmojiDataConfig(resolution=64, split="all"))
    images = torch.stack([data.load(k).image for k in range(0, 1600, 40)])
    features, logits = (
        torch.cat(p) for p in zip(*map(network.extract, images.split(4)), strict=True)
    )
    for seed in range(3):
        noise = draw(1000, 1280, seed=seed) / 2.0
        before = features @ (classifier.weight + noise * steps).T + classifier.bias
        assert float((logits - before).norm() / before.norm()) < 0.01
        found, expected = (inception_score(x, splits=2).value for x in (logits, before))
        assert found == pytest.approx(expected, rel=0.005)
