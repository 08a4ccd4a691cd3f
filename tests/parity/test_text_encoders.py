"""The original text encoder against diffusers' from the same parameters, name for name."""

import pytest
import torch
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import (
    LDMBertConfig,
    LDMBertModel,
)
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from torch import nn

from mezzotint.conditioning.bert import BertTextConditioner, BertTextConditionerConfig
from mezzotint.conditioning.layout import LayoutConditioner, LayoutConditionerConfig

# float32 has 24 bits; three layers leave about 1e-6 of outputs around 1
TOLERANCE = 1e-5

SHAPES = {
    # name: (vocabulary, width, layers, heads, width of a head, inner width, length)
    "heads narrower than the width": (60, 48, 3, 2, 8, 96, 20),
    "heads wider than the width": (60, 24, 3, 4, 16, 40, 12),
    "as wide": (60, 32, 2, 4, 8, 128, 77),
}
FIELDS = "vocab_size", "width", "layers", "heads", "head_dim", "ffn_dim", "max_length"


def conditioner(shape: tuple[int, ...]) -> BertTextConditioner:
    vocabulary = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3}
    config = BertTextConditionerConfig(**dict(zip(FIELDS, shape, strict=True)))
    return BertTextConditioner(config, Tokenizer(WordPiece(vocabulary, unk_token="[UNK]")))


def reference(shape: tuple[int, ...]) -> LDMBertModel:
    vocab_size, width, layers, heads, head_dim, ffn_dim, max_length = shape
    config = LDMBertConfig(
        vocab_size=vocab_size,
        d_model=width,
        encoder_layers=layers,
        encoder_attention_heads=heads,
        head_dim=head_dim,
        encoder_ffn_dim=ffn_dim,
        max_position_embeddings=max_length,
        return_dict=False,  # its own default asks transformers 5 for a name that is deprecated
    )
    return LDMBertModel(config)


def randomize(module: nn.Module) -> None:
    """Give every parameter a random value at which signals neither vanish nor explode."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            scale = 1.0 if "embed_" in name else parameter.shape[1] ** -0.5
            parameter.data = noise * scale
        else:
            parameter.data = 0.1 * noise + ("norm" in name and name.endswith("weight"))


@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_transformer(name: str):
    """All positions are compared, those of the padding too."""
    shape = SHAPES[name]
    ours, theirs = conditioner(shape).eval(), reference(shape).eval()
    randomize(ours)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ids = torch.randint(shape[0], (3, shape[-1]), generator=torch.Generator().manual_seed(1))
    ids[0, 2:] = 0  # [PAD]
    found, expected = ours.model(ids), theirs(ids)[0]
    assert expected.std() > 0.5  # equal zeros would prove nothing
    assert (found - expected).abs().max() <= TOLERANCE
    # a part of the positions is what the published model also takes
    assert (ours.model(ids[:, :7]) - theirs(ids[:, :7])[0]).abs().max() <= TOLERANCE


def test_names_and_shapes_of_the_published_models():
    """At full size, and without the 2 GB that the parameters would take."""
    with torch.device("meta"):
        bert = conditioner((30522, 1280, 32, 8, 64, 5120, 77))
        layout = LayoutConditioner(LayoutConditionerConfig())
        theirs = {
            "bert": reference((30522, 1280, 32, 8, 64, 5120, 77)),
            "layout": reference((8192, 512, 16, 8, 64, 2048, 92)),
        }
    for ours, other in ((bert, theirs["bert"]), (layout, theirs["layout"])):
        shapes = {name: value.shape for name, value in ours.state_dict().items()}
        assert shapes == {name: value.shape for name, value in other.state_dict().items()}
