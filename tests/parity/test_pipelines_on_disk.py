"""Folders that diffusers writes are read tensor for tensor, and diffusers reads what we write."""

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import (
    LDMBertConfig,
    LDMBertModel,
)
from reference_pipelines import KINDS, autoencoder, liven, stable_diffusion
from torch import Tensor, nn
from transformers import BertTokenizer

from mezzotint.checkpoints.folder import save_weights
from mezzotint.checkpoints.loaded import LoadedModel, SamplingDefaults
from mezzotint.checkpoints.pipelines import load_pipeline, save_pipeline
from mezzotint.checkpoints.tokenizer_files import write_bert_tokenizer
from mezzotint.conditioning.base import Unconditional
from mezzotint.conditioning.bert import BertTextConditioner
from mezzotint.conditioning.clip import ClipConditioner
from mezzotint.conditioning.spatial import HybridConditioner, LowResConditioner
from mezzotint.conditioning.vocabularies import bert_tokenizer

STABLE_KINDS = ("sd1", "sd2-v", "sd1-inpainting")
LDM_KINDS = ("text", "unconditional-vq", "unconditional-kl", "super-resolution")
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "apple", "##s", "、", "苹"]
PROMPT = "A red ápple, apples 苹 \u2028 xyz"

# what is said of these pipelines themselves, whoever wrote the folder
pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated.*:FutureWarning")


def ddim(**more: Any) -> diffusers.DDIMScheduler:
    """As the public folders of the original models have it."""
    betas = {"beta_start": 0.0015, "beta_end": 0.0195, "beta_schedule": "scaled_linear"}
    return diffusers.DDIMScheduler(**betas, clip_sample=False, **more)


def bert_words(folder: Path) -> BertTokenizer:
    write_bert_tokenizer(bert_tokenizer(WORDS), folder)
    return BertTokenizer.from_pretrained(folder)


def bert() -> LDMBertModel:
    shape = {"d_model": 32, "encoder_layers": 2, "encoder_ffn_dim": 64}
    heads = {"encoder_attention_heads": 2, "head_dim": 24}
    return LDMBertModel(LDMBertConfig(vocab_size=len(WORDS), **shape, **heads))


def plain_unet(channels: int) -> diffusers.UNet2DModel:
    return diffusers.UNet2DModel(
        sample_size=8,
        in_channels=channels,
        out_channels=3,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=16,
        norm_num_groups=8,
    )


def text_unet() -> diffusers.UNet2DConditionModel:
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
    )


def first_stage(kind: str, scale: float) -> nn.Module:
    shape = {
        "block_out_channels": (16, 32),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "latent_channels": 3,
        "norm_num_groups": 8,
        "scaling_factor": scale,
    }
    if kind == "kl":
        return diffusers.AutoencoderKL(**shape)
    return diffusers.VQModel(**shape, num_vq_embeddings=24)


def original(kind: str, folder: Path) -> Any:
    """A pipeline of the original latent diffusion models."""
    if kind == "text":
        parts: dict[str, Any] = {"vqvae": autoencoder(), "bert": bert(), "unet": text_unet()}
        parts["tokenizer"] = bert_words(folder.with_name(f"{folder.name}-words"))
        made = diffusers.LDMTextToImagePipeline
    elif kind == "super-resolution":
        parts = {"vqvae": first_stage("vq", 1.0), "unet": plain_unet(6)}
        made = diffusers.LDMSuperResolutionPipeline
    else:
        scale = 1.0 if kind.endswith("vq") else 0.22765929
        parts = {"vqvae": first_stage(kind[-2:], scale), "unet": plain_unet(3)}
        made = diffusers.LDMPipeline
    for seed, part in enumerate(parts.values()):
        if isinstance(part, nn.Module):
            liven(part, seed)
            part.eval()
    return made(**parts, scheduler=ddim())


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Path]]:
    """Pipelines by kind, each made once, and the folders that they were saved in."""
    made: dict[str, tuple[Any, Path]] = {}

    def make(kind: str) -> tuple[Any, Path]:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind) / kind
            if kind in KINDS:
                made[kind] = stable_diffusion(kind, folder), folder
            else:
                pipeline = original(kind, folder)
                pipeline.save_pretrained(folder)
                made[kind] = pipeline, folder
        return made[kind]

    return make


@contextmanager
def nothing_is_said(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """No warning, and nothing in the logs of the libraries, which do not reach the root's."""
    caplog.clear()
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    for logger in loggers:
        logger.addHandler(caplog.handler)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(caplog.handler)
    said = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    # of an installation without torchvision, and of any LDMPipeline whose first stage is KL
    passed = ("torchvision", "Expected types for vqvae")
    assert [m for m in said if not any(part in m for part in passed)] == []


def networks(pipeline: Any) -> dict[str, dict[str, Tensor]]:
    """The weights of every component that has any, by its name in the folder."""
    parts = pipeline.components.items()
    return {name: part.state_dict() for name, part in parts if isinstance(part, nn.Module)}


def ours_as_theirs(loaded: LoadedModel, theirs: dict[str, Any]) -> dict[str, dict[str, Tensor]]:
    """Our weights as the reference names its components."""
    model = loaded.model
    conditioner = model.conditioner
    if isinstance(conditioner, HybridConditioner):
        conditioner = conditioner.main
    found = {"unet": model.unet.state_dict()}
    found["vae" if "vae" in theirs else "vqvae"] = model.first_stage.state_dict()
    if isinstance(conditioner, BertTextConditioner):
        found["bert"] = conditioner.state_dict()
    if isinstance(conditioner, ClipConditioner):
        # some versions of transformers have the prefix
        prefix = "" if "embeddings.token_embedding.weight" in theirs["text_encoder"] else None
        found["text_encoder"] = {
            name.removeprefix("text_model.") if prefix == "" else name: value
            for name, value in conditioner.state_dict().items()
        }
    return found


def assert_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for part, tensors in expected.items():
        assert found[part].keys() == tensors.keys(), part
        for name, tensor in tensors.items():
            assert found[part][name].dtype == tensor.dtype, (part, name)
            assert torch.equal(found[part][name], tensor), (part, name)


@pytest.mark.parametrize("kind", [*STABLE_KINDS, *LDM_KINDS])
def test_every_tensor_is_read_and_written(
    reference: Callable[[str], tuple[Any, Path]],
    kind: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    pipeline, folder = reference(kind)
    theirs = networks(pipeline)
    loaded = load_pipeline(folder, dtype=None)
    assert_equal(ours_as_theirs(loaded, theirs), theirs)
    assert save_pipeline(loaded.model, tmp_path, defaults=loaded.defaults) == []
    with nothing_is_said(caplog):
        again = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    assert type(again) is type(pipeline)
    assert_equal(networks(again), theirs)
    for name in ("scheduler", "unet", "vae", "vqvae"):
        if name in pipeline.components:
            assert_said(again.components[name].config, pipeline.components[name].config)
    if "tokenizer" in pipeline.components:
        ids = [p.tokenizer(PROMPT, padding="max_length").input_ids for p in (pipeline, again)]
        assert ids[0] == ids[1]
        assert len(ids[0]) == 77
    # and once more, from our own folder
    third = load_pipeline(tmp_path, dtype=None)
    assert third.model.weights_hash() == loaded.model.weights_hash()
    assert third.defaults == loaded.defaults
    assert third.model.image_size == loaded.model.image_size


def assert_said(found: Any, expected: Any) -> None:
    """Both mean the same, whether it is written or a default."""
    for key, value in expected.items():
        if key.startswith("_"):
            continue
        written = found[key]
        if isinstance(value, list | tuple):
            assert list(written) == list(value), key
        elif isinstance(value, float):
            assert written == pytest.approx(value, rel=1e-7), key  # the scale is float32 with us
        else:
            assert written == value, key


def test_what_the_folders_say(reference: Callable[[str], tuple[Any, Path]]) -> None:
    stable = load_pipeline(reference("sd2-v")[1]).model
    assert stable.schedule_config.prediction_type == "v_prediction"
    assert stable.schedule_config.steps_offset == 1
    assert not stable.schedule_config.set_alpha_to_one
    assert stable.image_size == (64, 64)
    assert stable.normalization.scale_factor == pytest.approx(0.18215, rel=1e-6)
    assert isinstance(stable.conditioner, ClipConditioner)
    assert stable.conditioner.config.pad_token_id == 0
    assert stable.conditioner.config.hidden_act == "gelu"
    assert stable.unet.config.use_linear_projection
    assert stable.unet.config.attention_head_dim == 8
    inpainting = load_pipeline(reference("sd1-inpainting")[1]).model.conditioner
    assert isinstance(inpainting, HybridConditioner)
    assert inpainting.concat_channels == 5
    kl = load_pipeline(reference("unconditional-kl")[1])
    assert isinstance(kl.model.conditioner, Unconditional)
    assert kl.model.normalization.scale_factor == pytest.approx(0.22765929, rel=1e-6)
    assert kl.model.image_size == (16, 16)
    assert kl.defaults == SamplingDefaults(sampler="ddim", spacing="leading")
    upscaler = load_pipeline(reference("super-resolution")[1]).model.conditioner
    assert isinstance(upscaler, LowResConditioner)
    assert upscaler.config.channels == 3


def test_tokens_are_those_of_transformers(reference: Callable[[str], tuple[Any, Path]]) -> None:
    pipeline, folder = reference("text")
    conditioner = load_pipeline(folder).model.conditioner
    assert isinstance(conditioner, BertTextConditioner)
    theirs = pipeline.tokenizer([PROMPT, ""], padding="max_length", max_length=77)
    assert conditioner.tokenize([PROMPT, ""]).tolist() == theirs.input_ids


@pytest.mark.parametrize("kind", ["sd1", "text", "super-resolution"])
@pytest.mark.parametrize("layout", ["fp16", "sharded", "pickled", "pickled-fp16"])
def test_every_layout_of_weights(
    reference: Callable[[str], tuple[Any, Path]], kind: str, layout: str, tmp_path: Path
) -> None:
    pipeline, _ = reference(kind)
    copy = type(pipeline).from_pretrained(reference(kind)[1])
    half = layout.endswith("fp16")
    options: dict[str, Any] = {"variant": "fp16"} if half else {}
    if layout == "sharded":
        options["max_shard_size"] = "100KB"
    if half:
        copy.to(torch.float16)
    theirs = networks(copy)
    copy.save_pretrained(tmp_path, **options)
    if layout.startswith("pickled"):
        pickle_weights(tmp_path)
    loaded = load_pipeline(tmp_path, dtype=None)
    assert_equal(ours_as_theirs(loaded, theirs), theirs)
    weights = {p for p in tmp_path.rglob("*") if p.suffix in (".bin", ".safetensors")}
    assert weights <= set(loaded.files)
    assert len(weights) > 6 if layout == "sharded" else len(weights) <= 3
    assert all(path.is_file() for path in loaded.files)


def pickle_weights(folder: Path) -> None:
    """As folders had them before safetensors."""
    from safetensors.torch import load_file

    for path in folder.rglob("*.safetensors"):
        stem = f"pytorch_{path.stem}" if path.stem.startswith("model") else path.stem
        torch.save(load_file(path), path.with_name(f"{stem}.bin"))
        path.unlink()


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("sd1", torch.float16), ("text", torch.bfloat16), ("super-resolution", torch.float32)],
)
def test_weights_are_read_and_written_in_a_precision(
    reference: Callable[[str], tuple[Any, Path]], kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    pipeline, folder = reference(kind)
    theirs = {
        part: {name: tensor.to(dtype) for name, tensor in tensors.items()}
        for part, tensors in networks(pipeline).items()
    }
    assert_equal(ours_as_theirs(load_pipeline(folder, dtype=dtype), theirs), theirs)
    save_pipeline(load_pipeline(folder).model, tmp_path, dtype=dtype)
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path, torch_dtype=dtype)
    assert_equal(networks(again), theirs)
    assert_equal(ours_as_theirs(load_pipeline(tmp_path, dtype=None), theirs), theirs)


def test_a_mixture_of_precisions_stays_one(
    reference: Callable[[str], tuple[Any, Path]], tmp_path: Path
) -> None:
    model = load_pipeline(reference("unconditional-vq")[1]).model
    model.unet.conv_in.half()
    model.first_stage.bfloat16()
    save_pipeline(model, tmp_path)
    again = load_pipeline(tmp_path, dtype=None).model
    assert again.unet.conv_in.weight.dtype == torch.float16
    assert again.unet.conv_out.weight.dtype == torch.float32
    assert {t.dtype for t in again.first_stage.parameters()} == {torch.bfloat16}
    whole = load_pipeline(tmp_path).model
    assert {t.dtype for t in whole.parameters()} == {torch.float32}


def test_text_encoders_of_every_age(
    reference: Callable[[str], tuple[Any, Path]], tmp_path: Path
) -> None:
    """With the prefix of older versions, and with what they stored beside the weights."""
    pipeline, _ = reference("sd1")
    pipeline.save_pretrained(tmp_path)
    theirs = networks(pipeline)
    state = {f"text_model.{name}": value for name, value in theirs["text_encoder"].items()}
    state["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    state["text_projection.weight"] = torch.ones(32, 32)
    save_weights(state, tmp_path / "text_encoder" / "model.safetensors")
    config = json.loads((tmp_path / "text_encoder" / "config.json").read_text())
    # as in the public folders of Stable Diffusion 1: wrong, and without effect
    config |= {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    whole = {"architectures": ["CLIPTextModelWithProjection"], "text_config": config}
    (tmp_path / "text_encoder" / "config.json").write_text(json.dumps(whole))
    index = json.loads((tmp_path / "model_index.json").read_text())
    index["text_encoder"][1] = "CLIPTextModelWithProjection"
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    loaded = load_pipeline(tmp_path, dtype=None)
    assert_equal(ours_as_theirs(loaded, theirs), theirs)
    assert isinstance(loaded.model.conditioner, ClipConditioner)
    assert loaded.model.conditioner.config.eos_token_id == 49407
