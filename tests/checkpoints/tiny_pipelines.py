"""Tiny models of every condition, half of which diffusers has a pipeline for."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tokenizers import Tokenizer

from mezzotint.conditioning.base import Conditioner, Unconditional
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
from mezzotint.latent_diffusion import LatentDiffusion, LatentNormalization
from mezzotint.models.autoencoder import (
    AutoencoderKL,
    AutoencoderKLConfig,
    IdentityFirstStage,
    VQModel,
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
