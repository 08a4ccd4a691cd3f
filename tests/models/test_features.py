import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mezzotint.errors import CheckpointError, ConfigError
from mezzotint.models import features
from mezzotint.models.features import FEATURE_NETWORKS, FeatureNetwork, MobileNetV2, load_features


@pytest.fixture(scope="module")
def network() -> FeatureNetwork:
    return load_features("mobilenet-v2")


def test_the_trunk_has_torchvisions_names_and_sizes(network: FeatureNetwork) -> None:
    """Frozen from the published file: 2,223,872 weights, and where its blocks stand."""
    state = network.trunk.state_dict()
    assert sum(p.numel() for p in network.trunk.parameters()) == 2_223_872
    for name, shape in (
        ("features.0.0.weight", (32, 3, 3, 3)),
        ("features.1.conv.0.0.weight", (32, 1, 3, 3)),
        ("features.1.conv.1.weight", (16, 32, 1, 1)),
        ("features.7.conv.1.0.weight", (192, 1, 3, 3)),
        ("features.17.conv.2.weight", (320, 960, 1, 1)),
        ("features.18.1.running_var", (1280,)),
    ):
        assert tuple(state[name].shape) == shape
    assert all(v.dtype == torch.float32 for v in state.values() if v.is_floating_point())


def test_features_are_those_of_the_network_at_its_own_size(network: FeatureNetwork) -> None:
    x = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = network(x)
    assert found.shape == (2, 1280)
    assert (found >= 0).all() and float(found.amax()) <= 6.0  # means of a ReLU6
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    unit = ((x + 1) / 2 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    expected = F.adaptive_avg_pool2d(network.trunk.features(unit), 1).flatten(1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_picture_keeps_its_features_through_a_resize(network: FeatureNetwork) -> None:
    """A smooth picture at 64 px is nearer to itself at 224 px than to other pictures."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(6, 3, 8, 8, generator=generator) * 2 - 1
    large = F.interpolate(coarse, (224, 224), mode="bicubic", align_corners=False).clamp(-1, 1)
    small = F.interpolate(coarse, (64, 64), mode="bicubic", align_corners=False).clamp(-1, 1)
    similarity = F.normalize(network(small)) @ F.normalize(network(large)).T
    assert torch.equal(similarity.argmax(dim=1), torch.arange(6))
    assert float(similarity.diagonal().min()) > 0.95


def test_autocast_and_training_mode_do_not_reach_it(network: FeatureNetwork) -> None:
    x = torch.rand(1, 3, 64, 64) * 2 - 1
    expected = network(x)
    network.train()
    with torch.autocast("cpu", torch.bfloat16):
        found = network(x)
    assert torch.equal(found, expected)
    assert not any(module.training for module in network.modules())


def test_the_resolution_can_be_chosen(network: FeatureNetwork) -> None:
    x = torch.rand(1, 3, 96, 96) * 2 - 1
    seen: list[Tensor] = []

    def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0])

    hook = network.trunk.register_forward_pre_hook(note)
    network(x, size=96)
    network(x)
    hook.remove()
    assert [s.shape[-1] for s in seen] == [96, 224]


def test_an_unknown_name_lists_the_networks() -> None:
    with pytest.raises(ConfigError, match="did you mean 'mobilenet-v2'"):
        load_features("mobilenet")


def test_a_damaged_file_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    info = FEATURE_NETWORKS["mobilenet-v2"]
    monkeypatch.setattr(features, "FEATURE_NETWORKS", {"x": replace(info, sha256="0" * 64)})
    with pytest.raises(CheckpointError, match="its sha256 is wrong"):
        load_features("x")
    monkeypatch.setattr(features, "FEATURE_NETWORKS", {"x": replace(info, asset="none")})
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_features("x")


def test_the_resolution_is_kept_at_strides() -> None:
    with torch.no_grad():
        assert MobileNetV2().eval().features(torch.zeros(1, 3, 64, 64)).shape == (1, 1280, 2, 2)
