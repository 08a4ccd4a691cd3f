"""LoRA files that reference packages write act here as they do there, live and merged."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.utils.state_dict_utils import (
    convert_state_dict_to_diffusers,
    convert_state_dict_to_kohya,
)
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from reference_pipelines import stable_diffusion, unet
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mezzotint.checkpoints.adapters import AdapterSet
from mezzotint.checkpoints.compvis import unet_map
from mezzotint.checkpoints.load import load_any
from mezzotint.checkpoints.lora import read_lora
from mezzotint.conditioning.base import ConditionInputs
from mezzotint.latent_diffusion import LatentDiffusion

# a share of the largest value; float32 through 60 layers, in another order of operations
NEAR = 1e-4
MERGED = 1e-5
CAPTION = "a red apple on a table"
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
CONVOLUTIONS = ["conv1", "conv2", "conv", "conv_shortcut", "proj_in", "proj_out", "conv_in"]
OTHERS = ["ff.net.0.proj", "ff.net.2", "time_emb_proj", "linear_1"]
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters") / "sd1"


@pytest.fixture(scope="module")
def whole(folder: Path) -> Any:
    return stable_diffusion("sd1", folder)


@pytest.fixture
def reference(whole: Any) -> Iterator[Any]:
    """The pipeline of diffusers, without adapters before and after."""
    yield whole
    whole.unload_lora_weights()


@pytest.fixture(scope="module")
def model(whole: Any, folder: Path) -> LatentDiffusion:
    model = load_any(folder).model
    our_tokens(model)  # with the first call, transformers adds hooks of its own
    return model


def config(**changes: Any) -> LoraConfig:
    """Random factors of rank 4 at alpha 10, of other ranks and alphas in places."""
    settings: dict[str, Any] = {
        "r": 4,
        "lora_alpha": 10,
        "target_modules": ATTENTION + CONVOLUTIONS + OTHERS,
        "rank_pattern": {"attn2.to_k": 2, "conv1": 8},
        "alpha_pattern": {"attn2.to_v": 3, "conv2": 1},
        "init_lora_weights": False,
    }
    return LoraConfig(**{**settings, **changes})


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2, 4, 8, 8, generator=generator)
    context = torch.randn(2, 77, 32, generator=generator)
    return x, torch.tensor([3.0, 801.0]), context


@torch.no_grad()
def theirs(network: nn.Module) -> Tensor:
    x, time, context = inputs()
    return network(x, time, encoder_hidden_states=context).sample


@torch.no_grad()
def ours(model: LatentDiffusion) -> Tensor:
    return model.unet(*inputs())


@torch.no_grad()
def their_tokens(pipeline: Any) -> Tensor:
    ids = pipeline.tokenizer(CAPTION, padding="max_length", return_tensors="pt").input_ids
    return pipeline.text_encoder(ids)[0]


@torch.no_grad()
def our_tokens(model: LatentDiffusion) -> Tensor:
    tokens = model.conditioner(ConditionInputs(count=1, captions=[CAPTION])).crossattn
    assert tokens is not None
    return tokens


def assert_near(found: Tensor, expected: Tensor, share: float = NEAR) -> None:
    difference = (found - expected).abs().max() / expected.abs().max()
    assert difference <= share, f"{difference:.2e}"


def assert_same(model: LatentDiffusion, path: Path, pipeline: Any, plain: Tensor) -> None:
    """Live and merged, it draws what the reference does, and afterwards what it did before."""
    before, tokens = theirs(pipeline.unet), their_tokens(pipeline)
    assert (before - plain).abs().max() > 0.05 * plain.abs().max(), "the adapter does something"
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    hooks = [dict(module._forward_hooks) for module in model.modules()]
    acting, found = AdapterSet(model), []
    for merge in (False, True):
        acting.apply(read_lora(path), merge=merge)
        assert list(model.state_dict()) == list(weights)
        found.append(ours(model))
        assert_near(found[-1], before)
        assert_near(our_tokens(model), tokens)
        acting.remove_all()
    assert_near(found[0], found[1], MERGED)
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert hooks == [dict(module._forward_hooks) for module in model.modules()]
    assert torch.equal(ours(model), plain)


def add(reference: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Give both networks of the reference random factors, as peft does; returns them."""
    torch.manual_seed(1)
    reference.unet.add_adapter(config())
    text = config(target_modules=TEXT, rank_pattern={"fc1": 2}, alpha_pattern={"q_proj": 1})
    reference.text_encoder.add_adapter(text)
    return tuple(
        get_peft_model_state_dict(network, adapter_name="default")
        for network in (reference.unet, reference.text_encoder)
    )


def test_diffusers_file_with_its_metadata(
    reference: Any, model: LatentDiffusion, tmp_path: Path
) -> None:
    plain = ours(model)
    networks = add(reference)
    configs = [n.peft_config["default"].to_dict() for n in (reference.unet, reference.text_encoder)]
    for settings in configs:
        settings["target_modules"] = sorted(settings["target_modules"])
    diffusers.StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=convert_state_dict_to_diffusers(networks[0]),
        text_encoder_lora_layers=convert_state_dict_to_diffusers(networks[1]),
        unet_lora_adapter_metadata=configs[0],
        text_encoder_lora_adapter_metadata=configs[1],
    )
    assert_same(model, tmp_path, reference, plain)
    assert_same(model, tmp_path / "pytorch_lora_weights.safetensors", reference, plain)


@pytest.mark.parametrize("by_root", [False, True])
def test_peft_folder(whole: Any, model: LatentDiffusion, tmp_path: Path, by_root: bool) -> None:
    torch.manual_seed(2)
    network = unet("sd1")
    network.load_state_dict(whole.unet.state_dict())
    changed = get_peft_model(network.eval(), config(use_rslora=by_root))
    changed.save_pretrained(tmp_path)
    expected = theirs(changed)
    acting = AdapterSet(model)
    acting.apply(read_lora(tmp_path))
    assert_near(ours(model), expected)
    acting.remove_all()


def kohya(whole: Any, *, alpha: float | None = 3.0, seed: int = 3) -> dict[str, Tensor]:
    """A file by the published rule: names with underscores, alpha beside; half precision."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    networks = {"lora_unet": whole.unet, "lora_te": whole.text_encoder}
    for prefix, network in networks.items():
        chosen = ATTENTION + CONVOLUTIONS + OTHERS if prefix == "lora_unet" else TEXT
        chosen = [name for name in chosen if name not in ("conv_in", "linear_1")]
        for name, layer in network.named_modules():
            if not isinstance(layer, nn.Linear | nn.Conv2d) or not name.endswith(tuple(chosen)):
                continue
            if prefix == "lora_te" and not name.startswith("text_model."):
                name = f"text_model.{name}"
            rank, (out, into, *kernel) = 2 + len(tensors) % 3, layer.weight.shape
            key = f"{prefix}_{name.replace('.', '_')}"
            down = (
                torch.randn(rank, into, *kernel, generator=generator)
                * layer.weight[0].numel() ** -0.5
            )
            up = torch.randn(out, rank, *[1 for _ in kernel], generator=generator)
            tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up * 0.3}
            if alpha is not None:
                tensors[f"{key}.alpha"] = torch.tensor(alpha)
    return {name: tensor.half() for name, tensor in tensors.items()}


@pytest.mark.parametrize("alpha", [3.0, None])
def test_kohya_file(
    reference: Any, model: LatentDiffusion, tmp_path: Path, alpha: float | None
) -> None:
    plain = ours(model)
    tensors = kohya(reference, alpha=alpha)
    save_file(tensors, path := tmp_path / "ink.safetensors", {"ss_network_dim": "4"})
    assert any(t.ndim == 4 and t.shape[-1] == 3 for t in tensors.values())
    reference.load_lora_weights(load_file(path))
    assert_same(model, path, reference, plain)


def test_kohya_file_that_diffusers_converted(
    reference: Any, model: LatentDiffusion, tmp_path: Path
) -> None:
    plain = ours(model)
    torch.manual_seed(4)
    # its converter writes the rank as alpha
    for network, names in ((reference.unet, ATTENTION), (reference.text_encoder, TEXT)):
        network.add_adapter(
            LoraConfig(r=4, lora_alpha=4, target_modules=names, init_lora_weights=False)
        )
    tensors: dict[str, Tensor] = {}
    for prefix, network in (("unet", reference.unet), ("text_encoder", reference.text_encoder)):
        state = get_peft_model_state_dict(network, adapter_name="default")
        tensors |= {f"{prefix}.{name}": tensor for name, tensor in state.items()}
    converted = convert_state_dict_to_kohya(tensors)
    assert all(name.startswith(("lora_unet_", "lora_te1_")) for name in converted)
    path = tmp_path / "converted.safetensors"
    save_file({n: t.contiguous() for n, t in converted.items()}, path)
    assert_same(model, path, reference, plain)


OLD = {
    "processor": ("unet.{}.processor.{}_lora.{}.weight", "text_encoder.{}.{}_lora.{}.weight"),
    "lora": ("unet.{}.{}.lora.{}.weight", "text_encoder.{}.{}.lora_linear_layer.{}.weight"),
    "unprefixed": ("{}.processor.{}_lora.{}.weight", None),
}


@pytest.mark.parametrize("form", OLD)
def test_older_files_of_diffusers(
    reference: Any, model: LatentDiffusion, tmp_path: Path, form: str
) -> None:
    plain = ours(model)
    new = kohya(reference, alpha=None)
    pattern, text_pattern = OLD[form]
    old, modern = dict[str, Tensor](), dict[str, Tensor]()
    named = dict(reference.unet.named_modules())
    for name in named:
        layer, _, last = name.removesuffix(".0").rpartition(".")
        if (
            last in ("to_q", "to_k", "to_v", "to_out")
            and ".attn" in layer
            and name != f"{layer}.to_out"
        ):
            shown = (
                "to_out" if form != "lora" and last == "to_out" else name.removeprefix(f"{layer}.")
            )
            for role, letter in (("down", "A"), ("up", "B")):
                tensor = new[f"lora_unet_{name.replace('.', '_')}.lora_{role}.weight"].float()
                old[pattern.format(layer, shown, role)] = tensor
                modern[f"unet.{name}.lora_{letter}.weight"] = tensor
    if text_pattern:
        back = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            layer = "text_model.encoder.layers.1.self_attn"
            shown = name if form == "lora" else back[name]
            for role in ("down", "up"):
                key = f"lora_te_{layer.replace('.', '_')}_{name}.lora_{role}.weight"
                old[text_pattern.format(layer, shown, role)] = new[key].float()
                modern[key] = new[key].float()
    save_file(old, path := tmp_path / "old.safetensors")
    acting = AdapterSet(model)
    acting.apply(read_lora(path))
    found = ours(model), our_tokens(model)
    acting.remove_all()
    kohya_like = {name: t for name, t in modern.items() if name.startswith("lora_te_")}
    reference.load_lora_weights({n: t for n, t in modern.items() if n not in kohya_like})
    assert_near(found[0], theirs(reference.unet))
    assert (found[0] - plain).abs().max() > 0.01 * plain.abs().max()
    if kohya_like:
        reference.load_lora_weights(kohya_like, adapter_name="text")
        assert_near(found[1], their_tokens(reference))


def test_alphas_that_differ(reference: Any, model: LatentDiffusion, tmp_path: Path) -> None:
    """By the published rule: diffusers overlooks them where most others have another."""
    tensors = kohya(reference)
    for number, name in enumerate(name for name in tensors if name.endswith(".alpha")):
        tensors[name] = torch.tensor(float(number % 4))  # 0 means the rank
    save_file(tensors, path := tmp_path / "ink.safetensors")
    weights = {name: value.clone() for name, value in reference.unet.state_dict().items()}
    changed = dict(weights)
    for name, weight in weights.items():
        key = f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}"
        if f"{key}.alpha" in tensors and name.endswith(".weight"):
            down, up = (tensors[f"{key}.lora_{role}.weight"].float() for role in ("down", "up"))
            scale = (float(tensors[f"{key}.alpha"]) or len(down)) / len(down)
            changed[name] = weight + scale * (up.flatten(1) @ down.flatten(1)).view_as(weight)
    assert sum(changed[name] is not weights[name] for name in weights) > 40
    reference.unet.load_state_dict(changed)
    expected = theirs(reference.unet)
    reference.unet.load_state_dict(weights)
    acting = AdapterSet(model)
    acting.apply(read_lora(path))
    assert_near(ours(model), expected)
    acting.remove_all()


def test_names_of_the_original_layout(
    reference: Any, model: LatentDiffusion, tmp_path: Path
) -> None:
    tensors = {name: t for name, t in kohya(reference).items() if name.startswith("lora_unet_")}
    save_file(tensors, ours_path := tmp_path / "ours.safetensors")
    originals = {
        rule.ours[0].removesuffix(".weight").replace(".", "_"): rule.theirs.removesuffix(".weight")
        for rule in unet_map(model.unet).rules
        if rule.ours[0].endswith(".weight")
    }
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        layer, _, rest = name.removeprefix("lora_unet_").partition(".")
        renamed[f"lora_unet_{originals[layer].replace('.', '_')}.{rest}"] = tensor
    assert "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q.alpha" in renamed
    save_file(renamed, theirs_path := tmp_path / "original.safetensors")
    found = []
    for path in (ours_path, theirs_path):
        acting = AdapterSet(model)
        acting.apply(read_lora(path))
        found.append(ours(model))
        acting.remove_all()
    assert torch.equal(*found)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
@pytest.mark.parametrize("merge", [False, True])
def test_several_with_weights(
    reference: Any, model: LatentDiffusion, tmp_path: Path, merge: bool
) -> None:
    weights = {"ink": 0.7, "oil": -0.4, "chalk": 1.5}
    acting = AdapterSet(model)
    plain = ours(model)
    files = {name: kohya(reference, seed=seed) for seed, name in enumerate(weights)}
    for name, tensors in files.items():
        save_file(tensors, path := tmp_path / f"{name}.safetensors")
        reference.load_lora_weights(load_file(path), adapter_name=name)
        # the second live in both cases
        acting.apply(read_lora(path), merge=merge and name != "oil")
    for name, weight in weights.items():
        acting.set_weight(name, weight)
    reference.set_adapters(list(weights), list(weights.values()))
    assert_near(ours(model), theirs(reference.unet))
    assert_near(our_tokens(model), their_tokens(reference))
    acting.remove("ink")
    reference.set_adapters(["oil", "chalk"], [-0.4, 1.5])
    assert_near(ours(model), theirs(reference.unet))
    acting.remove_all()
    assert torch.equal(ours(model), plain)
