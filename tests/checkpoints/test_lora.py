"""LoRA adapters act as their formula says, and leave no trace when they go."""

import copy
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tiny_adapters import ALPHA, CONV, QUERY, kohya, saved
from tiny_models import build
from torch import Tensor, nn

from mezzotint.checkpoints.adapters import AdapterSet, adapters
from mezzotint.checkpoints.lora import read_lora
from mezzotint.checkpoints.lora_fit import fit
from mezzotint.conditioning.base import ConditionInputs
from mezzotint.conditioning.clip import ClipConditioner
from mezzotint.errors import CheckpointError, RequestError
from mezzotint.latent_diffusion import LatentDiffusion
from mezzotint.nn.packed import pack


@dataclass
class Use:
    name: str
    weight: float = 1.0


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    model = build("sd1")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.1)
    tokens(model)  # with the first call, transformers adds hooks of its own
    return model


@torch.no_grad()
def drawn(model: LatentDiffusion) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, 8, 8, generator=generator)
    dtype = model.unet.conv_in.weight.dtype
    context = torch.randn(2, 5, 64, generator=generator)
    return model.unet(x.to(dtype), torch.tensor([1.0, 500.0]), context.to(dtype))


@torch.no_grad()
def tokens(model: LatentDiffusion) -> Tensor:
    found = model.conditioner(ConditionInputs(count=1, captions=["a cat"])).crossattn
    assert found is not None
    return found


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_untouched(model: LatentDiffusion, before: dict[str, Tensor]) -> None:
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(module._forward_hooks for module in model.unet.modules())


def test_values(model: LatentDiffusion, tmp_path: Path) -> None:
    tensors = kohya()
    adapter = read_lora(saved(tmp_path, tensors))
    assert (adapter.name, len(adapter.sha256), len(adapter.layers)) == ("ink", 64, 4)
    assert [layer.scale for layer in adapter.layers] == [ALPHA / 2] * 4
    found = {layer.module: layer for layer in fit(adapter, model)}
    query = model.unet.get_submodule("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q")
    assert torch.equal(found[query].down, tensors[f"{QUERY}.lora_down.weight"])
    main = model.conditioner
    assert isinstance(main, ClipConditioner)
    assert found[main.get_submodule("text_model.encoder.layers.1.mlp.fc1")].part == "text"


@pytest.mark.parametrize("merge", [False, True])
def test_merged_weights_are_the_formula(
    model: LatentDiffusion, tmp_path: Path, merge: bool
) -> None:
    tensors, before = kohya(), state(model)
    own = model.unet.get_parameter("down_blocks.0.resnets.0.conv1.weight")
    acting = AdapterSet(model)
    acting.apply(read_lora(saved(tmp_path, tensors)), 0.5, merge=merge)
    assert list(model.state_dict()) == list(before)
    name = "unet.down_blocks.0.resnets.0.conv1.weight"
    down, up = (tensors[f"{CONV}.lora_{role}.weight"].flatten(1) for role in ("down", "up"))
    change = 0.5 * ALPHA / 2 * (up @ down).reshape(32, 32, 3, 3)
    expected = before[name] + change if merge else before[name]
    # one rounding of each sum
    torch.testing.assert_close(model.state_dict()[name], expected, rtol=1e-6, atol=1e-6)
    acting.remove("ink")
    assert_untouched(model, before)
    assert model.unet.get_parameter("down_blocks.0.resnets.0.conv1.weight") is own


def test_live_and_merged_agree(model: LatentDiffusion, tmp_path: Path) -> None:
    path, plain, plain_tokens, before = saved(tmp_path, kohya()), *both(model), state(model)
    found = []
    for merge in (False, True):
        with adapters(model, [Use(str(path), 0.8)], merge=merge) as sums:
            found.append(both(model))
        assert sums == {str(path): read_lora(path).sha256}
        assert_untouched(model, before)
    for live, merged, without in zip(*found, (plain, plain_tokens), strict=True):
        assert (live - without).abs().max() > 0.01 * without.abs().max()
        assert (live - merged).abs().max() <= 1e-5 * merged.abs().max()
    assert torch.equal(drawn(model), plain) and torch.equal(tokens(model), plain_tokens)


def both(model: LatentDiffusion) -> tuple[Tensor, Tensor]:
    return drawn(model), tokens(model)


def test_merged_into_packed_layers_and_out_again(model: LatentDiffusion, tmp_path: Path) -> None:
    model = copy.deepcopy(model).eval()
    path, before = saved(tmp_path, kohya()), state(model)
    names = [name for name, _ in model.named_parameters()]
    with adapters(model, [Use(str(path))], merge=True):
        expected = drawn(model)
    pack(model.unet, torch.float32)
    with adapters(model, [Use(str(path))], merge=True):
        assert torch.allclose(drawn(model), expected, atol=1e-4)
    assert_untouched(model, before)
    model.unet.train()
    assert [name for name, _ in model.named_parameters()] == names
    assert all(parameter.requires_grad for parameter in model.unet.parameters())


def test_gradients_after_drawing_without(model: LatentDiffusion, tmp_path: Path) -> None:
    half = copy.deepcopy(model).to(torch.bfloat16)
    AdapterSet(half).apply(read_lora(saved(tmp_path, kohya())))
    with torch.inference_mode():
        drawn(half)
    x = torch.zeros(1, 4, 8, 8, dtype=torch.bfloat16, requires_grad=True)
    context = torch.ones(1, 5, 64, dtype=torch.bfloat16)
    half.unet(x, torch.tensor([1.0]), context).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


def test_seamless_convolutions(model: LatentDiffusion, tmp_path: Path) -> None:
    """A live branch looks beyond the edges as its layer does."""
    found = []
    for merge in (False, True):
        with adapters(model, [Use(str(saved(tmp_path, kohya())))], merge=merge):
            convolutions = [m for m in model.unet.modules() if isinstance(m, nn.Conv2d)]
            for layer in convolutions:
                layer.padding_mode = "circular"
            found.append(drawn(model))
            for layer in convolutions:
                layer.padding_mode = "zeros"
    assert (found[0] - found[1]).abs().max() <= 1e-5 * found[1].abs().max()


@pytest.mark.parametrize("kind", ["weights", "autocast"])
def test_half_precision(tmp_path: Path, kind: str) -> None:
    model = build("sd1")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.1)
    path = saved(tmp_path, kohya())
    with adapters(model, [Use(str(path))]):
        exact = drawn(model)
    plain = drawn(model)
    if kind == "weights":
        model.to(torch.bfloat16)
    before = state(model)
    for merge in (False, True):
        with (
            adapters(model, [Use(str(path))], merge=merge),
            torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"),
        ):
            found = drawn(model)
        assert_untouched(model, before)
        # bfloat16 has 8 bits, of which the network's depth costs some
        error = (found.float() - exact).abs().max() / exact.abs().max()
        done = (exact - plain).abs().max() / exact.abs().max()
        assert error <= 0.02 < 0.5 < done


def test_a_model_that_is_cast_while_adapters_act(tmp_path: Path) -> None:
    model, path = build("sd1"), saved(tmp_path, kohya())
    expected = state(build("sd1").to(torch.bfloat16))
    for merge in (False, True):
        acting = AdapterSet(model)
        acting.apply(read_lora(path), merge=merge)
        model.to(torch.bfloat16)
        drawn(model)
        acting.remove_all()
        assert_untouched(model, expected)


@pytest.mark.parametrize("merge", [False, True])
def test_several_stack_and_go_in_any_order(
    model: LatentDiffusion, tmp_path: Path, merge: bool
) -> None:
    paths = [saved(tmp_path, kohya(seed=seed), name) for seed, name in enumerate(("a", "b"))]
    before, acting = state(model), AdapterSet(model)
    acting.apply(read_lora(paths[1]), 0.3, merge=merge)
    alone = both(model)
    acting.remove_all()
    for path in paths:
        acting.apply(read_lora(path), 0.3, merge=merge)
    assert acting.names == ("a", "b")
    with pytest.raises(RequestError, match="'a' already acts"):
        acting.apply(read_lora(paths[0]))
    acting.set_weight("b", 0.0, text_weight=2.0)
    assert not torch.equal(drawn(model), alone[0])
    acting.set_weight("b", 0.3)
    acting.remove("a")
    assert all(map(torch.equal, both(model), alone))
    with pytest.raises(RequestError, match="no adapter 'a' acts on the model; Choose from: b"):
        acting.remove("a")
    acting.remove_all()
    assert_untouched(model, before)


def test_weights_of_both_networks(model: LatentDiffusion, tmp_path: Path) -> None:
    adapter, plain, acting = read_lora(saved(tmp_path, kohya())), both(model), AdapterSet(model)
    acting.apply(adapter, 0.0)
    assert all(map(torch.equal, both(model), plain))
    acting.set_weight("ink", 0.0, text_weight=1.0)
    assert torch.equal(drawn(model), plain[0]) and not torch.equal(tokens(model), plain[1])
    acting.remove_all()
    with pytest.raises(RequestError, match="expected a number, got nan"):
        acting.apply(adapter, float("nan"))
    assert acting.names == ()


def test_removed_after_an_error(model: LatentDiffusion, tmp_path: Path) -> None:
    path, before = saved(tmp_path, kohya()), state(model)
    for merge in (False, True):
        with pytest.raises(ZeroDivisionError), adapters(model, [Use(str(path))], merge=merge):
            raise ZeroDivisionError
        assert_untouched(model, before)
    wrong = saved(tmp_path, {f"{QUERY[:-1]}x.alpha": torch.ones(()), **kohya()}, "wrong")
    uses = [Use(str(path)), Use(str(wrong))]
    with pytest.raises(CheckpointError, match="has no 'down'"), adapters(model, uses):
        pytest.fail("it began")
    assert_untouched(model, before)


def test_named_twice(model: LatentDiffusion, tmp_path: Path) -> None:
    path = str(saved(tmp_path, kohya()))
    with adapters(model, [Use(path, 0.25), Use(path, 0.5)]):
        twice = both(model)
    with adapters(model, [Use(path, 0.75)]):
        assert all(map(torch.equal, both(model), twice))


def test_linear_factors_of_a_convolution_of_size_1(model: LatentDiffusion, tmp_path: Path) -> None:
    key = "lora_unet_down_blocks_0_attentions_0_proj_in"
    down, up = torch.randn(2, 32), torch.randn(32, 2)
    flat = {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
    found = []
    for form in (flat, {name: tensor[..., None, None] for name, tensor in flat.items()}):
        with adapters(model, [Use(str(saved(tmp_path, form)))]):
            found.append(drawn(model))
    assert torch.equal(*found)


def test_what_does_not_fit_is_refused(model: LatentDiffusion, tmp_path: Path) -> None:
    acting, before = AdapterSet(model), state(model)

    def refused(tensors: dict[str, Tensor], told: str, into: LatentDiffusion = model) -> None:
        with pytest.raises(CheckpointError, match=told):
            AdapterSet(into).apply(read_lora(saved(tmp_path, tensors)), merge=True)

    renamed = {name.replace("attn1_to_q", "attn1_to_w"): t for name, t in kohya().items()}
    refused(
        renamed,
        "1 of the 4 layers that it changes are none of the model's UNet, lora_unet_.*to_w for one;"
        r" the nearest is down_blocks\.0\.attentions\.0\.transformer_blocks\.0\.attn1\.to_\w$",
    )
    key = f"{QUERY}.lora_down.weight"
    refused(
        {**kohya(), key: torch.ones(2, 48)},
        r"1 of 4 layers have another shape in this model: .*to_q changes \(32, 48\), but there it"
        r" is \(32, 32\)",
    )
    original = {
        "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q" + name[len(QUERY) :]: t
        for name, t in kohya().items()
        if name.startswith(QUERY)
    }
    refused({**kohya(), **original}, "to_q are the same layer")
    text = {name: tensor for name, tensor in kohya().items() if name.startswith("lora_te")}
    refused(text, "the model has no text encoder to change", build("ldm-unconditional"))
    assert acting.names == ()
    assert_untouched(model, before)
