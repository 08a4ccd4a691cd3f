"""Embeddings are found in every form of file, and their words stand for them while they act."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import CONTEXT, build
from torch import Tensor, nn

from mezzotint.checkpoints.adapters import AdapterSet, adapters
from mezzotint.checkpoints.embeddings import check_width, is_embedding, load_embedding
from mezzotint.conditioning.base import ConditionInputs
from mezzotint.conditioning.spatial import main_conditioner
from mezzotint.errors import CheckpointError, RequestError
from mezzotint.latent_diffusion import LatentDiffusion


@dataclass
class Use:
    name: str
    weight: float = 1.0


def vectors(count: int = 3, width: int = CONTEXT) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(0))


def web_ui(values: Any) -> dict[str, Any]:
    return {
        "string_to_token": {"*": 265},
        "string_to_param": values,
        "name": "inside",
        "step": 5000,
        "sd_checkpoint": "abc",
        "sd_checkpoint_name": None,
    }


FORMS: dict[str, tuple[str, Any, str]] = {
    "web-ui": ("ink.v2.pt", web_ui({"*": vectors()}), "ink.v2"),
    "parameter": ("ink.pt", web_ui({"*": nn.Parameter(vectors())}), "ink"),
    "parameter-dict": ("ink.pt", web_ui(nn.ParameterDict({"*": nn.Parameter(vectors())})), "ink"),
    "web-ui-safetensors": ("ink.safetensors", {"emb_params": vectors()}, "ink"),
    "diffusers": ("learned_embeds.safetensors", {"<ink>": vectors()}, "<ink>"),
    "diffusers-bin": ("learned_embeds.bin", {"<ink>": nn.Parameter(vectors())}, "<ink>"),
    "one-vector": ("learned_embeds.bin", {"<ink>": vectors(1)[0]}, "<ink>"),
}


def written(folder: Path, name: str, content: Any) -> Path:
    path = folder / name
    if path.suffix == ".safetensors":
        save_file(content, path)
    else:
        torch.save(content, path)
    return path


@pytest.mark.parametrize("form", FORMS)
def test_forms(tmp_path: Path, form: str) -> None:
    name, content, word = FORMS[form]
    path = written(tmp_path, name, content)
    assert is_embedding(path)
    embedding = load_embedding(path)
    assert (embedding.word, embedding.path, len(embedding.sha256)) == (word, path, 64)
    expected = vectors(1) if form == "one-vector" else vectors()
    assert torch.equal(embedding.vectors, expected)


def test_half_precision(tmp_path: Path) -> None:
    path = written(tmp_path, "ink.safetensors", {"emb_params": vectors().half()})
    assert torch.equal(load_embedding(path).vectors, vectors().half().float())


REFUSED: dict[str, tuple[str, Any]] = {
    "is for Stable Diffusion XL": ("a.safetensors", {"clip_l": vectors(), "clip_g": vectors()}),
    "expected the vectors of one word, got 2 tensors: '\\*', 'b'": (
        "a.pt",
        web_ui({"*": vectors(), "b": vectors()}),
    ),
    "'\\*': expected a tensor": ("a.pt", web_ui({"*": 3})),
    "expected vectors by name": ("a.pt", web_ui([vectors()])),
    r"expected fractions of shape \(n, d\), got torch.int64": (
        "a.bin",
        {"<a>": torch.ones(2, 3, dtype=torch.int64)},
    ),
    r"got torch.float32 of shape \(1, 2, 3\)": ("a.bin", {"<a>": torch.ones(1, 2, 3)}),
    r"of shape \(0, 4\)": ("a.bin", {"<a>": torch.ones(0, 4)}),
    "holds values that are infinite": ("a.safetensors", {"emb_params": vectors() / 0}),
    "holds no named tensors": ("a.pt", [1, 2]),
    "got 0 tensors": ("a.pt", web_ui({})),
}


@pytest.mark.parametrize("told", REFUSED)
def test_refused(tmp_path: Path, told: str) -> None:
    path = written(tmp_path, *REFUSED[told])
    with pytest.raises(CheckpointError, match=told) as refusal:
        load_embedding(path)
    assert str(refusal.value).startswith(str(path))


def test_other_files_are_none(tmp_path: Path) -> None:
    lora = {"lora_unet_a.lora_down.weight": vectors(), "lora_unet_a.lora_up.weight": vectors()}
    assert not is_embedding(written(tmp_path, "lora.safetensors", lora))
    lora.popitem()
    assert not is_embedding(written(tmp_path, "half.safetensors", lora))


def test_width(tmp_path: Path) -> None:
    path = written(tmp_path, "a.pt", web_ui({"*": vectors(1, 768)}))
    with pytest.raises(
        CheckpointError,
        match="width 768, as Stable Diffusion 1 has; this model's text encoder takes 1024, as"
        " Stable Diffusion 2 has",
    ):
        check_width(load_embedding(path), 1024)


def tokens(model: LatentDiffusion, prompt: str) -> Tensor:
    with torch.no_grad():
        found = main_conditioner(model.conditioner)(
            ConditionInputs(count=1, captions=[prompt])
        ).crossattn
    assert found is not None
    return found


@pytest.mark.parametrize("family", ["sd1", "sd1-inpainting"])
def test_words_act_for_a_while(tmp_path: Path, family: str) -> None:
    model = build(family)
    ink = written(tmp_path, "ink.pt", web_ui({"*": vectors()}))
    plain, settings = tokens(model, "a cat in ink"), model.conditioner.settings()
    with adapters(model, [Use("ink"), Use("ink")], [tmp_path]) as sums:
        assert sums == {"ink": load_embedding(ink).sha256}
        assert not torch.equal(tokens(model, "a cat in ink"), plain)
        with pytest.raises(RequestError, match="already stands for an embedding"):
            AdapterSet(model).add_embedding(load_embedding(ink))
    assert torch.equal(tokens(model, "a cat in ink"), plain)
    assert model.conditioner.settings() == settings
    with (
        pytest.raises(RequestError, match=r"weight its word in the prompt, as in \(ink:0.5\)"),
        adapters(model, [Use("ink", 0.5)], [tmp_path]),
    ):
        pytest.fail("it began")
    assert model.conditioner.settings() == settings


def test_models_that_read_no_words(tmp_path: Path) -> None:
    model = build("ldm-class")
    path = written(tmp_path, "ink.pt", web_ui({"*": vectors()}))
    with (
        pytest.raises(RequestError, match="read by a CLIP text encoder, but the model wants"),
        adapters(model, [Use(str(path))]),
    ):
        pytest.fail("it began")
