"""The canonical FID network: its published tensors, and the oddities that set it apart."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mezzotint.models.features import load_features
from mezzotint.models.inception import FidInception


@pytest.fixture(scope="module")
def network() -> FidInception:
    network = FidInception().eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        scale = (2.0 / parameter[0].numel()) ** 0.5 if parameter.ndim > 1 else 0.1
        parameter.data = noise * scale + (name.endswith("bn.weight"))
    return network.requires_grad_(False)


def test_tensors_are_named_as_in_the_published_file(network: FidInception) -> None:
    """94 convolutions of 5 tensors each and the classifier; sizes of a few that tell it apart."""
    state = {k: v for k, v in network.state_dict().items() if "num_batches" not in k}
    assert len(state) == 94 * 5 + 2
    assert sum(p.numel() for p in network.parameters()) == 23_850_960
    for name, shape in (
        ("Conv2d_1a_3x3.conv.weight", (32, 3, 3, 3)),
        ("Conv2d_4a_3x3.bn.running_mean", (192,)),
        ("Mixed_5b.branch5x5_2.conv.weight", (64, 48, 5, 5)),
        ("Mixed_5b.branch_pool.conv.weight", (32, 192, 1, 1)),
        ("Mixed_6a.branch3x3dbl_3.conv.weight", (96, 96, 3, 3)),
        ("Mixed_6b.branch7x7_2.conv.weight", (128, 128, 1, 7)),
        ("Mixed_6e.branch7x7dbl_5.conv.weight", (192, 192, 1, 7)),
        ("Mixed_7a.branch7x7x3_3.conv.weight", (192, 192, 7, 1)),
        ("Mixed_7b.branch3x3dbl_1.conv.weight", (448, 1280, 1, 1)),
        ("Mixed_7c.branch3x3_2b.conv.weight", (384, 384, 3, 1)),
        ("Mixed_7c.branch_pool.bn.bias", (192,)),
        ("fc.weight", (1008, 2048)),
        ("fc.bias", (1008,)),
    ):
        assert tuple(state[name].shape) == shape
    assert network.Mixed_5b.branch1x1.bn.eps == 0.001


def test_average_pools_do_not_count_the_padding(network: FidInception) -> None:
    """Of ones the pool gives ones at the edge too; only then is the branch flat there."""
    seen: list[Tensor] = []
    hooks = [
        block.branch_pool.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        for block in (network.Mixed_5b, network.Mixed_6b, network.Mixed_7b)
    ]
    for block, channels in ((network.Mixed_5b, 192), (network.Mixed_6b, 768)):
        block(torch.ones(1, channels, 9, 9))
    network.Mixed_7b(torch.ones(1, 1280, 8, 8))
    for hook in hooks:
        hook.remove()
    assert len(seen) == 3
    for pooled in seen:
        torch.testing.assert_close(pooled, torch.ones_like(pooled))


def test_the_last_block_pools_the_maximum(network: FidInception) -> None:
    seen: list[Tensor] = []
    hook = network.Mixed_7c.branch_pool.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0])
    )
    x = torch.zeros(1, 2048, 8, 8)
    x[..., 3, 4] = 9.0
    network.Mixed_7c(x)
    hook.remove()
    assert seen[0][0, 0, 2:5, 3:6].tolist() == [[9.0] * 3] * 3
    assert float(seen[0][0, 0].sum()) == 81.0


def test_a_file_loads_and_gives_pool3_and_unbiased_logits(
    network: FidInception, tmp_path: Path
) -> None:
    state = copy.deepcopy(network.state_dict())
    # the published file has been made before torch counted batches
    state = {name: value for name, value in state.items() if "num_batches" not in name}
    path = tmp_path / "mine.pth"
    torch.save(state, path)
    loaded = load_features("inception-v3-fid", weights=str(path))
    # of other weights than the published ones, a metric must not be called just "fid"
    assert (loaded.suffix, loaded.dim, loaded.size) == ("custom_inception", 2048, 299)
    assert loaded.has_logits
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (1, 3, 299, 299), generator=generator, dtype=torch.uint8)
    features, logits = loaded.extract(images)
    seen: list[Tensor] = []
    hook = network.Mixed_7c.register_forward_hook(lambda _m, _i, output: seen.append(output))
    network((images.float() - 128.0) / 128.0)
    hook.remove()
    assert seen[0].shape == (1, 2048, 8, 8)
    torch.testing.assert_close(features, seen[0].mean((2, 3)), rtol=1e-4, atol=1e-4)
    assert logits is not None
    torch.testing.assert_close(logits, features @ state["fc.weight"].T, rtol=1e-4, atol=1e-4)
    biased = F.linear(features, state["fc.weight"], state["fc.bias"])
    assert float((logits - biased).abs().max()) > 0.05


def test_images_are_resized_by_tensorflows_filter(network: FidInception) -> None:
    from mezzotint.models.features import FEATURE_NETWORKS, FeatureNetwork

    info = FEATURE_NETWORKS["inception-v3-fid"]

    class Probe(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, None]:
            return x.flatten(1), None

    probe = FeatureNetwork("inception-v3-fid", Probe(), info, "")
    images = torch.zeros(1, 3, 13, 13, dtype=torch.uint8)
    images[..., 0, 1] = 128
    seen = probe.extract(images)[0].view(3, 299, 299)
    # 299 / 13 = 23: pixel 23 is the source's pixel 1 exactly, and 128 becomes 0
    assert float(seen[0, 0, 23]) == pytest.approx(0.0, abs=1e-5)
    assert float(seen[0, 0, 0]) == -1.0
    assert float(seen[2, 0, 13]) == pytest.approx(13 / 23 - 1.0, abs=1e-5)
