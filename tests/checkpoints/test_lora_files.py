"""LoRA files: what they say, which are refused, and how they are found by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_adapters import CONV, QUERY, kohya, saved
from torch import Tensor

from mezzotint.checkpoints import adapter_files
from mezzotint.checkpoints.adapter_files import VARIABLE, find_adapter, load_adapter
from mezzotint.checkpoints.lora import LoraAdapter, read_lora
from mezzotint.errors import CheckpointError, RequestError


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
