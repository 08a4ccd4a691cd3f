import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from mezzotint.checkpoints.folder import save_component
from mezzotint.checkpoints.load import load_any
from mezzotint.checkpoints.loaded import SamplingDefaults
from mezzotint.checkpoints.model import read_model
from mezzotint.checkpoints.pipelines import load_pipeline, save_pipeline
from mezzotint.conditioning.base import Conditioner, ConditionInputs, Unconditional
from mezzotint.conditioning.bert import BertTextConditioner, BertTextConditionerConfig
from mezzotint.conditioning.classes import ClassConditioner, ClassConditionerConfig
from mezzotint.conditioning.clip import ClipConditioner, ClipConditionerConfig
from mezzotint.conditioning.layout import LayoutConditioner, LayoutConditionerConfig
from mezzotint.conditioning.spatial import (
    HybridConditioner,
    InpaintingConditioner,
    InpaintingConditionerConfig,
    LowResConditioner,
    LowResConditionerConfig,
    SemanticMapConditioner,
    SemanticMapConditionerConfig,
)
from mezzotint.conditioning.vocabularies import bert_tokenizer, read_clip_tokenizer
from mezzotint.diffusion.schedule import ScheduleConfig
from mezzotint.errors import CheckpointError
from mezzotint.latent_diffusion import LatentDiffusion, LatentNormalization
from mezzotint.models.autoencoder import (
    AutoencoderKL,
    AutoencoderKLConfig,
    IdentityFirstStage,
    IdentityFirstStageConfig,
    VQModel,
    VQModelConfig,
)
from mezzotint.models.unet import UNet, UNetConfig

WIDTH = 16
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "apple"]
SCHEDULE = ScheduleConfig(steps_offset=1, set_alpha_to_one=False)


@cache
def small_vocabulary() -> Tokenizer:
    """CLIP's way with words, and as many as these tests need."""
    letters = "!abcdefghijklmnopqrstuvwxyz,"
    tokens = [
        *letters,
        *(f"{letter}</w>" for letter in letters),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    with TemporaryDirectory() as folder:
        numbers = {token: number for number, token in enumerate(tokens)}
        (Path(folder) / "vocab.json").write_text(json.dumps(numbers))
        (Path(folder) / "merges.txt").write_text("#version: 0.2\n")
        return read_clip_tokenizer(Path(folder))[0]


def clip(**more: Any) -> ClipConditioner:
    tokenizer = small_vocabulary()
    size = tokenizer.get_vocab_size()
    shape = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 2, "vocab_size": size}
    tokens = {"bos_token_id": size - 2, "eos_token_id": size - 1, "pad_token_id": size - 1}
    config = ClipConditionerConfig(**{**shape, **tokens, **more})
    return ClipConditioner(config, tokenizer).eval()


def bert(**more: Any) -> BertTextConditioner:
    shape = {"vocab_size": 8, "width": WIDTH, "layers": 1, "heads": 2, "head_dim": 8, "ffn_dim": 32}
    config = BertTextConditionerConfig(**{**shape, **more})
    return BertTextConditioner(config, bert_tokenizer(WORDS))


def layout() -> LayoutConditioner:
    shape = {"vocab_size": 64, "width": WIDTH, "layers": 1, "heads": 2, "head_dim": 8}
    return LayoutConditioner(LayoutConditionerConfig(**shape, ffn_dim=32, max_length=8))


def inpainting(**more: Any) -> InpaintingConditioner:
    return InpaintingConditioner(InpaintingConditionerConfig(latent_channels=3, **more))


CONDITIONERS: dict[str, Callable[[], Conditioner]] = {
    "clip": clip,
    "bert": bert,
    "classes": lambda: ClassConditioner(ClassConditionerConfig(width=WIDTH, class_names=("a",))),
    "layout": layout,
    "map": lambda: SemanticMapConditioner(SemanticMapConditionerConfig(classes=5)),
    "low-res": lambda: LowResConditioner(LowResConditionerConfig()),
    "inpainting": lambda: inpainting(order="mask_last", signed_mask=True, masked_value=-1.0),
    "clip-inpainting": lambda: HybridConditioner(clip(), inpainting()),
    "class-map": lambda: HybridConditioner(
        CONDITIONERS["classes"](), CONDITIONERS["map"]()
    ),
    "nothing": Unconditional,
}  # fmt: skip


def kl(levels: int = 2) -> AutoencoderKL:
    config = AutoencoderKLConfig(
        block_out_channels=(8,) * levels, layers_per_block=1, latent_channels=3, norm_num_groups=4
    )
    return AutoencoderKL(config)


def unet(conditioner: Conditioner, **more: Any) -> UNet:
    told = conditioner.wants is not None
    config: dict[str, Any] = {
        "in_channels": 3 + conditioner.concat_channels,
        "out_channels": 3,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "attention_levels": (False, True),
        "cross_attention_dim": WIDTH if told else None,
        "num_attention_heads": 1,
        "norm_num_groups": 4,
    }
    return UNet(UNetConfig(**{**config, **more}))


def model(
    conditioner: Conditioner,
    first_stage: AutoencoderKL | VQModel | IdentityFirstStage | None = None,
    *,
    scale: float = 1.0,
    size: tuple[int, int] = (16, 16),
    schedule: ScheduleConfig = SCHEDULE,
    **of_unet: Any,
) -> LatentDiffusion:
    first_stage = first_stage or kl()
    latents = size[0] // first_stage.factor if size[0] == size[1] else None
    return LatentDiffusion(
        first_stage,
        unet(conditioner, sample_size=latents, **of_unet),
        conditioner,
        schedule,
        LatentNormalization.from_scale_factor(scale),
        size,
    )


def edit(path: Path, **keys: Any) -> None:
    """Set keys of a JSON file, or with None take them away."""
    data = json.loads(path.read_text()) | keys
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders by condition, each written once."""
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("saved") / kind
            levels = 4 if kind == "bert" else 2
            save_pipeline(model(CONDITIONERS[kind](), kl(levels)), made[kind])
        return made[kind]

    return folder


@pytest.fixture
def copied(saved: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy that a test may damage."""
    return lambda kind: Path(shutil.copytree(saved(kind), tmp_path / kind))


@pytest.mark.parametrize("kind", CONDITIONERS)
def test_every_condition_is_kept(tmp_path: Path, kind: str) -> None:
    ours = model(CONDITIONERS[kind](), kl(4 if kind == "bert" else 2), scale=1.0)
    lost = save_pipeline(ours, tmp_path)
    public = {"clip", "bert", "low-res", "clip-inpainting", "nothing"}
    assert ("_diffusers_version" in (tmp_path / "model_index.json").read_text()) == (kind in public)
    assert len(lost) == (kind not in public)
    again = load_any(tmp_path).model
    assert again.weights_hash() == ours.weights_hash()
    assert again.conditioner.settings() == ours.conditioner.settings()
    assert type(again.conditioner) is type(ours.conditioner)
    for (name, before), after in zip(
        ours.state_dict().items(), again.state_dict().values(), strict=True
    ):
        assert torch.equal(before, after), name


@pytest.mark.parametrize(
    ("conditioner", "options", "reason"),
    [
        (clip, {"first_stage": "vq"}, "StableDiffusionPipeline has no place for an VQModel"),
        (clip, {"resblock_updown": True}, "wants a UNet that UNet2DConditionModel can be"),
        (clip, {"vector_dim": 4}, "tells the UNet no class and no vector"),
        (lambda: bert(max_length=20), {"first_stage": "f8"}, "reads 77 tokens, not 20"),
        (bert, {}, "draws latents of f = 8, not 2"),
        (Unconditional, {"size": (16, 32)}, "LDMPipeline draws squares, not 32x16"),
        (Unconditional, {"first_stage": "pixels"}, "no place for an IdentityFirstStage"),
        (Unconditional, {"cross_attention_dim": 8}, "wants a UNet that UNet2DModel can be"),
        (CONDITIONERS["low-res"], {"scale": 0.5}, "does not scale latents, by 0.5"),
        (
            lambda: LowResConditioner(LowResConditionerConfig(channels=1)),
            {},
            "wants as many channels of the small picture",
        ),
        (CONDITIONERS["inpainting"], {}, "there is no pipeline for its condition"),
        (
            lambda: HybridConditioner(clip(), inpainting(signed_mask=True)),
            {},
            "there is no pipeline for its condition",
        ),
    ],
)
def test_what_diffusers_cannot_draw_becomes_our_own_folder(
    tmp_path: Path, conditioner: Callable[[], Conditioner], options: dict[str, Any], reason: str
) -> None:
    vq = VQModelConfig(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4)
    stages: dict[str, Any] = {
        "vq": lambda: VQModel(vq),
        "f8": lambda: kl(4),
        "pixels": lambda: IdentityFirstStage(IdentityFirstStageConfig()),
    }
    given = {**options}
    if "first_stage" in given:
        given["first_stage"] = stages[given["first_stage"]]()
    ours = model(conditioner(), **given)
    defaults = SamplingDefaults(sampler="euler", spacing="karras", guidance_scale=4.0)
    [sentence] = save_pipeline(ours, tmp_path, defaults=defaults)
    assert sentence.startswith("written as Mezzotint's own folder, which diffusers cannot draw")
    assert reason in sentence
    again = read_model(tmp_path)
    assert again.model.weights_hash() == ours.weights_hash()
    assert again.model.image_size == ours.image_size
    assert again.defaults == defaults


def test_our_own_folder_in_half_precision(tmp_path: Path) -> None:
    ours = model(CONDITIONERS["class-map"]())
    save_pipeline(ours, tmp_path, dtype=torch.float16)
    kept = load_any(tmp_path, dtype=None).model
    assert {t.dtype for t in kept.parameters()} == {torch.float16}
    # a picture is drawn again from the same weights whatever it is drawn in
    for dtype in (torch.float32, torch.bfloat16):
        whole = load_any(tmp_path, dtype=dtype).model
        assert {t.dtype for t in whole.parameters()} == {torch.float32}


def test_layers_that_no_picture_depends_on_are_left_out(tmp_path: Path) -> None:
    ours = model(clip(num_hidden_layers=4, output_layer=2, pad_token_id=0, hidden_act="gelu"))
    left_out, filled_up = save_pipeline(ours, tmp_path)
    assert "the last 1 of its 4 layers are left out" in left_out
    assert "texts are filled up with '!', which is a token of its own" in filled_up
    again = load_pipeline(tmp_path).model.conditioner
    assert isinstance(again, ClipConditioner)
    assert (again.config.num_hidden_layers, again.config.output_layer) == (3, 1)
    inputs = ConditionInputs(count=2, captions=["a red apple", ""])
    before, after = ours.conditioner(inputs).crossattn, again(inputs).crossattn
    assert before is not None and after is not None
    assert torch.allclose(before, after, atol=1e-5)  # float32: tensors lie at other addresses


def test_a_consistency_model(tmp_path: Path) -> None:
    ours = model(clip(), guidance_embed_dim=8)
    save_pipeline(ours, tmp_path, defaults=SamplingDefaults(sampler="lcm"))
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "LatentConsistencyModelPipeline"
    assert index["scheduler"] == ["diffusers", "LCMScheduler"]
    again = load_pipeline(tmp_path)
    assert again.defaults == SamplingDefaults(sampler="lcm", guidance_scale=8.5)
    assert again.model.unet.config.guidance_embed_dim == 8
    # whatever its scheduler: the network was distilled for this one
    edit(tmp_path / "scheduler" / "scheduler_config.json", skip_prk_steps=False)
    edit(tmp_path / "model_index.json", scheduler=["diffusers", "PNDMScheduler"])
    assert load_pipeline(tmp_path).defaults.sampler == "lcm"


def test_statistics_per_channel_are_folded(tmp_path: Path) -> None:
    ours = model(Unconditional())
    mean, std = torch.tensor([0.5, -1.0, 0.0]), torch.tensor([2.0, 0.5, 1.5])
    ours.normalization = LatentNormalization(mean, std)
    save_pipeline(ours, tmp_path)
    again = load_pipeline(tmp_path).model
    assert again.normalization.scale_factor == 1.0
    pictures = torch.rand(1, 3, 16, 16) * 2 - 1
    # float32, a few hundred products a value
    assert torch.allclose(again.encode(pictures), ours.encode(pictures), atol=1e-5)


@pytest.mark.parametrize("scale", [0.18215, 0.13025, 1.0, 1 / 3, 0.22765929])
def test_the_scale_is_written_as_it_was_said(tmp_path: Path, scale: float) -> None:
    save_pipeline(model(Unconditional(), scale=scale), tmp_path)
    written = json.loads((tmp_path / "vqvae" / "config.json").read_text())["scaling_factor"]
    assert len(str(written)) <= max(len(str(scale)), 11)
    assert written == pytest.approx(scale, rel=1e-7)


def test_what_is_not_used_is_noted(copied: Callable[[str], Path]) -> None:
    folder = copied("clip")
    checker = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    edit(folder / "model_index.json", safety_checker=checker)
    [note] = load_pipeline(folder).notes
    assert note == "safety_checker: in the folder, but not used by Mezzotint"


def test_an_inpainting_pipeline_may_have_an_ordinary_network(copied: Callable[[str], Path]) -> None:
    folder = copied("clip")
    edit(folder / "model_index.json", _class_name="StableDiffusionInpaintPipelineLegacy")
    assert isinstance(load_pipeline(folder).model.conditioner, ClipConditioner)


def test_scales_that_are_not_said(copied: Callable[[str], Path]) -> None:
    folder = copied("nothing")
    edit(folder / "vqvae" / "config.json", scaling_factor=None)
    loaded = load_pipeline(folder)
    assert loaded.model.normalization.scale_factor == pytest.approx(0.18215, rel=1e-6)
    assert loaded.notes == ()
    vq = VQModelConfig(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4)
    save_pipeline(model(Unconditional(), VQModel(vq)), folder)
    edit(folder / "vqvae" / "config.json", scaling_factor=None)
    loaded = load_pipeline(folder)
    assert loaded.model.normalization.scale_factor == 1.0
    assert "says no scaling_factor; taken for 1" in loaded.notes[0]


def test_sizes(copied: Callable[[str], Path]) -> None:
    folder = copied("clip")
    config = folder / "unet" / "config.json"
    edit(config, sample_size=[8, 12])
    assert load_pipeline(folder).model.image_size == (16, 24)
    edit(config, sample_size=32, _diffusers_version="0.6.0")
    assert load_pipeline(folder).model.image_size == (128, 128)
    edit(config, _diffusers_version="0.9.0.dev0")
    assert load_pipeline(folder).model.image_size == (64, 64)
    edit(config, sample_size=None)
    with pytest.raises(CheckpointError, match="sample_size is None; expected the side"):
        load_pipeline(folder)


Damage = Callable[[Path], None]


def index(**keys: Any) -> Damage:
    return lambda folder: edit(folder / "model_index.json", **keys)


def config(part: str, **keys: Any) -> Damage:
    return lambda folder: edit(folder / part / "config.json", **keys)


REFUSED: dict[str, tuple[str, Damage, str]] = {
    "pipeline": (
        "clip",
        index(_class_name="StableDiffusionXLPipeline"),
        "model_index.json: unknown pipeline 'StableDiffusionXLPipeline'; did you mean 'Stable",
    ),
    "component": ("clip", index(unet=[None, None]), r"unet is \[None, None\]; expected \[lib"),
    "encoder": (
        "clip",
        index(text_encoder=["transformers", "T5EncoderModel"]),
        "text_encoder is 'T5EncoderModel'; expected CLIPTextModel or CLIPTextModelWithProj",
    ),
    "no-encoder": ("clip", index(text_encoder=None), "text_encoder is None; expected"),
    "scheduler": (
        "clip",
        index(scheduler=["diffusers", "DDIMInverseScheduler"]),
        "scheduler_config.json: unknown scheduler 'DDIMInverseScheduler'; did you mean 'DDIMSch",
    ),
    "activation": ("clip", config("text_encoder", hidden_act="relu"), "hidden_act: .*'relu'"),
    "shape": (
        "clip",
        config("text_encoder", intermediate_size=48),
        "does not fit its ClipConditioner: wrong shape",
    ),
    "layers": (
        "clip",
        config("text_encoder", num_hidden_layers=3),
        r"does not fit its ClipConditioner: missing \(16\)",
    ),
    "vocabulary": (
        "clip",
        config("text_encoder", vocab_size=50),
        r"bos_token_id: expected less than vocab_size, 50, got 56",
    ),
    "bert": ("bert", config("bert", activation_function="relu"), "activation_function is 'relu'"),
    "words": ("bert", config("bert", vocab_size=7), "tokenizer: vocab_size is 7, but the tokeniz"),
    "part": ("nothing", lambda folder: shutil.rmtree(folder / "vqvae"), "config.json: no such"),
    "weights": (
        "nothing",
        lambda folder: (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink(),
        "no such file; there is no file of weights",
    ),
    "truncated": (
        "clip",
        lambda folder: (folder / "text_encoder" / "model.safetensors").write_bytes(b"\0" * 64),
        "model.safetensors: damaged",
    ),
    "tokenizer": (
        "clip",
        lambda folder: (folder / "tokenizer" / "merges.txt").unlink(),
        "merges.txt: no such file; a tokenizer needs it",
    ),
    "index": (
        "nothing",
        lambda folder: (folder / "model_index.json").write_text("[]"),
        "model_index.json: expected a JSON object, got list",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(copied: Callable[[str], Path], name: str) -> None:
    kind, damage, message = REFUSED[name]
    folder = copied(kind)
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as failed:
        load_pipeline(folder)
    assert str(failed.value).startswith(str(folder))


@pytest.mark.parametrize(
    ("kind", "channels", "message"),
    [
        ("clip", 8, "in_channels is 8; expected 3 or 7, as latents have 3"),
        ("nothing", 6, "in_channels is 6; expected 3, as latents have 3"),
        ("low-res", 4, "in_channels is 4; expected 6, as latents have 3"),
    ],
)
def test_channels_that_nothing_is_known_for(
    copied: Callable[[str], Path], kind: str, channels: int, message: str
) -> None:
    folder = copied(kind)
    other = model(CONDITIONERS[kind](), in_channels=channels)
    other.conditioner = Unconditional()
    save_component(other.unet, folder / "unet", {"sample_size": 8})
    with pytest.raises(CheckpointError, match=message):
        load_pipeline(folder)


def test_a_text_encoder_of_another_width_is_refused(copied: Callable[[str], Path]) -> None:
    folder = copied("clip")
    save_component(unet(clip(), cross_attention_dim=24), folder / "unet", {"sample_size": 8})
    message = "cross_attention_dim is 24, but the text encoder is 16 wide"
    with pytest.raises(CheckpointError, match=message):
        load_pipeline(folder)


def test_the_hash_is_that_of_everything_that_was_read(copied: Callable[[str], Path]) -> None:
    folder = copied("clip")
    loaded = load_pipeline(folder)
    names = {str(path.relative_to(folder)) for path in loaded.files}
    there = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert names == there
    before = loaded.content_hash()
    edit(folder / "scheduler" / "scheduler_config.json", steps_offset=2)
    assert load_pipeline(folder).content_hash() != before
