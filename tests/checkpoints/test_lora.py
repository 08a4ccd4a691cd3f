"""LoRA files are read whole or refused by name, and act without leaving a trace."""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import build
from torch import Tensor, nn

from mezzotint.checkpoints import adapter_files
from mezzotint.checkpoints.adapter_files import VARIABLE, find_adapter, load_adapter
from mezzotint.checkpoints.adapters import AdapterSet, adapters
from mezzotint.checkpoints.lora import LoraAdapter, read_lora
from mezzotint.checkpoints.lora_fit import fit
from mezzotint.conditioning.base import ConditionInputs
from mezzotint.conditioning.clip import ClipConditioner
from mezzotint.errors import CheckpointError, RequestError
from mezzotint.latent_diffusion import LatentDiffusion
from mezzotint.nn.packed import pack

QUERY = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
CONV = "lora_unet_down_blocks_0_resnets_0_conv1"
DOWN = "lora_unet_down_blocks_0_downsamplers_0_conv"
TEXT = "lora_te_text_model_encoder_layers_1_mlp_fc1"
SHAPES = {QUERY: (32, 32), CONV: (32, 32, 3, 3), DOWN: (32, 32, 3, 3), TEXT: (96, 64)}
ALPHA = 3.0


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


def kohya(rank: int = 2, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, Tensor] = {}
    for key, (out, into, *kernel) in SHAPES.items():
        found[f"{key}.lora_down.weight"] = torch.randn(rank, into, *kernel, generator=generator)
        shape = (out, rank, *[1 for _ in kernel])
        found[f"{key}.lora_up.weight"] = torch.randn(shape, generator=generator)
        found[f"{key}.alpha"] = torch.tensor(ALPHA)
    return found


def saved(folder: Path, tensors: dict[str, Tensor], name: str = "ink", **metadata: str) -> Path:
    save_file(tensors, path := folder / f"{name}.safetensors", metadata)
    return path


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


def test_scales(tmp_path: Path) -> None:
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    factors = {"A": torch.ones(4, 32), "B": torch.ones(32, 4)}

    def scale(
        prefix: str, name: str = "a", beside: dict[str, Any] | None = None, **said: Any
    ) -> float:
        tensors = {f"{prefix}{layer}.lora_{k}.weight": v for k, v in factors.items()}
        metadata = {"lora_adapter_metadata": json.dumps(said)} if said else {}
        (tmp_path / "adapter_config.json").unlink(missing_ok=True)
        if beside is not None:
            (tmp_path / "adapter_config.json").write_text(json.dumps(beside))
        (adapted,) = read_lora(saved(tmp_path, tensors, name, **metadata)).layers
        return adapted.scale

    peft = {"peft_type": "LORA", "r": 4, "lora_alpha": 6}
    assert scale("unet.") == 1.0
    assert scale("", lora_alpha=2) == 0.5
    assert scale("unet.", **{"unet.lora_alpha": 2, "text_encoder.lora_alpha": 8}) == 0.5
    assert scale("base_model.model.", "adapter_model", peft) == 1.5
    assert scale("base_model.model.", "adapter_model", {**peft, "use_rslora": True}) == 3.0
    for pattern, expected in {
        "to_q": 2.0,
        "attn2.to_q": 1.5,
        "^to_q": 1.5,
        f"^{layer}$": 2.0,
    }.items():
        beside = {**peft, "alpha_pattern": {pattern: 8}}
        assert scale("base_model.model.", "adapter_model", beside) == expected
    with pytest.raises(CheckpointError, match=r"'to_\(q\|k\)' is an expression"):
        scale("", "adapter_model", {**peft, "alpha_pattern": {"to_(q|k)": 8}})
    with pytest.raises(CheckpointError, match="peft_type is 'LOHA', expected 'LORA'"):
        scale("", "adapter_model", {"peft_type": "LOHA"})
    with pytest.raises(CheckpointError, match="use_dora is on"):
        scale("", "adapter_model", {**peft, "use_dora": True})
    with pytest.raises(CheckpointError, match="lora_alpha is None, expected a number"):
        scale("", "adapter_model", {"r": 4})
    with pytest.raises(CheckpointError, match=r"is of PEFT's form, whose alpha stands in adapter_"):
        scale("base_model.model.")


def change(**changes: Tensor | None) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    def apply(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        given = {name: tensor for name, tensor in changes.items() if tensor is not None}
        kept = {name: tensor for name, tensor in tensors.items() if name not in changes}
        return kept | given

    return apply


ONE = torch.ones(1)
MALFORMED = {
    "is a DoRA; expected a plain LoRA": change(**{f"{QUERY}.dora_scale": ONE}),
    "is a LoHa; expected a plain LoRA": change(**{f"{QUERY}.hada_w1_a": ONE}),
    "is a LoKr; expected a plain LoRA": change(**{f"{QUERY}.lokr_w1": ONE}),
    "is an OFT or a BOFT": change(**{f"{QUERY}.oft_blocks": ONE}),
    "is a LoRA with a third factor": change(**{f"{CONV}.lora_mid.weight": ONE}),
    "is a file of whole differences": change(**{f"{QUERY}.diff": ONE}),
    "is a LoRA with biases": change(**{f"{QUERY}.lora_up.bias": ONE}),
    "is for Stable Diffusion XL": change(**{"lora_te2_text_model_x.alpha": ONE}),
    "1 of 13 tensors are no part of a LoRA, 'unet.x.weight'": change(**{"unet.x.weight": ONE}),
    "to_q: has no 'up'": change(**{f"{QUERY}.lora_up.weight": None}),
    "to_q: has no 'down'": change(**{f"{QUERY}.lora_down.weight": None}),
    "do not fit: expected": change(**{f"{QUERY}.lora_up.weight": torch.ones(32, 3)}),
    "in 2 or 4 dimensions": change(**{f"{QUERY}.lora_up.weight": torch.ones(32)}),
    "fractions in 2 or 4": change(**{f"{QUERY}.lora_up.weight": torch.ones(32, 2).int()}),
    r"alpha: expected one number, got 2": change(**{f"{QUERY}.alpha": torch.ones(2)}),
    r"alpha: holds values that are infinite": change(**{f"{QUERY}.alpha": ONE / 0}),
    r"lora_down.weight: holds values": change(
        **{f"{QUERY}.lora_down.weight": torch.full((2, 32), torch.nan)}
    ),
    "are the same of one layer": change(
        **{f"{QUERY.replace('lora_unet_', 'unet.')}.lora_down.weight": torch.ones(2, 32)}
    ),
}


@pytest.mark.parametrize("told", MALFORMED)
def test_malformed_files_are_refused(tmp_path: Path, told: str) -> None:
    with pytest.raises(CheckpointError, match=told) as refusal:
        read_lora(saved(tmp_path, MALFORMED[told](kohya())))
    assert str(refusal.value).startswith(str(tmp_path / "ink.safetensors"))


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


def test_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first / "style", second / "style", second / "peft"):
        folder.mkdir(parents=True)
    ink = saved(first / "style", kohya(), "ink.v2")
    oil = saved(second, kohya(), "oil")
    other = saved(second / "style", kohya(), "ink.v2")
    saved(second / "peft", kohya(), "pytorch_lora_weights")
    monkeypatch.setenv(VARIABLE, f"{first}:{second}")
    for name in ("ink.v2", "style/ink.v2", "ink.v2.safetensors", str(ink)):
        assert find_adapter(name) == ink
    assert find_adapter("style/ink.v2", [second]) == other
    assert find_adapter("oil") == oil
    assert find_adapter("peft") == second / "peft"
    saved(second, kohya(), "ink.v2")
    assert find_adapter("ink.v2", [second]) == second / "ink.v2.safetensors"
    (second / "more").mkdir()
    saved(second / "more", kohya(), "chalk"), saved(second / "style", kohya(), "chalk")
    with pytest.raises(RequestError, match=r"several: more/chalk\.safetensors, style/chalk"):
        find_adapter("chalk")
    with pytest.raises(RequestError, match="adapter 'oli': not in .*; did you mean 'oil'"):
        find_adapter("oli")
    monkeypatch.setenv(VARIABLE, str(first))
    for name in ("../second/oil", "style/../../second/oil", "/etc/passwd", "C:\\oil", "..\\oil"):
        with pytest.raises(RequestError, match="no such file; expected a path that exists"):
            find_adapter(name)
    monkeypatch.delenv(VARIABLE)
    monkeypatch.chdir(tmp_path)
    for name in ("oil", "x" * 5000, "a\0b", ""):
        with pytest.raises(RequestError, match="not in adapters; there is none"):
            find_adapter(name)


def test_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []

    def reading(path: Path) -> LoraAdapter:
        read.append(path)
        return read_lora(path)

    monkeypatch.setattr(adapter_files, "read_lora", reading)
    path = saved(tmp_path, kohya())
    assert load_adapter(path) is load_adapter(path)
    assert len(read) == 1
    saved(tmp_path, kohya(rank=3))
    adapter = load_adapter(path)
    assert isinstance(adapter, LoraAdapter) and len(adapter.layers[0].down) == 3
    assert len(read) == 2
