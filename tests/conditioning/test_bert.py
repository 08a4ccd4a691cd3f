"""The text encoder of the original text-to-image model."""

import pytest
import torch
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordPiece

from mezzotint.conditioning.base import ConditionInputs, TextOptions
from mezzotint.conditioning.bert import BertTextConditioner, BertTextConditionerConfig
from mezzotint.errors import ConfigError, RequestError

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "a",
    "red",
    "app",
    "##le",
    "(",
    ":",
    "1",
    ".",
    "5",
    ")",
]
PAD, UNKNOWN, START, END = range(4)
SHAPE = {"width": 24, "layers": 2, "heads": 2, "head_dim": 8, "ffn_dim": 32, "max_length": 10}


def tokenizer(words: list[str] = WORDS) -> Tokenizer:
    vocabulary = {word: number for number, word in enumerate(words)}
    made = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return made


def conditioner(vocab_size: int = 20) -> BertTextConditioner:
    torch.manual_seed(0)
    config = BertTextConditionerConfig(vocab_size=vocab_size, **SHAPE)
    return BertTextConditioner(config, tokenizer()).eval()


def test_the_defaults_are_the_published_model():
    config = BertTextConditionerConfig()
    assert config.to_dict() == {
        "kind": "bert",
        "vocab_size": 30522,
        "width": 1280,
        "layers": 32,
        "heads": 8,
        "head_dim": 64,
        "ffn_dim": 5120,
        "max_length": 77,
    }


def test_a_caption_is_lower_cased_pieces_between_start_and_end():
    ids = conditioner().tokenize(["A red APPLE", ""])
    assert ids.tolist() == [
        [START, 4, 5, 6, 7, END, PAD, PAD, PAD, PAD],
        [START, END, *[PAD] * 8],
    ]


def test_long_captions_are_cut_before_their_end_token():
    ids = conditioner().tokenize(["red " * 30])
    assert ids.tolist() == [[START, *[5] * 8, END]]


def test_lengths_that_the_tokenizer_brings_do_not_count():
    brought = tokenizer()
    brought.enable_padding(length=33)
    brought.enable_truncation(3)
    config = BertTextConditionerConfig(vocab_size=20, **SHAPE)
    ids = BertTextConditioner(config, brought).tokenize(["a red red red"])
    assert ids.tolist() == [[START, 4, 5, 5, 5, END, PAD, PAD, PAD, PAD]]


def test_brackets_are_characters():
    model = conditioner()
    assert model.tokenize(["(red:1.5)"])[0, 1:9].tolist() == [8, 5, 9, 10, 11, 12, 13, END]
    asked = [
        model(ConditionInputs(count=1, captions=["(red:1.5)"], text=TextOptions(emphasis=emphasis)))
        for emphasis in ("original", "none")
    ]
    assert torch.equal(asked[0].crossattn, asked[1].crossattn)


def test_padding_is_attended_as_the_original_does():
    """There is no mask, neither inside nor for the UNet."""
    model = conditioner()
    inputs = ConditionInputs(count=1, captions=["a red apple"])
    cond = model(inputs)
    assert cond.crossattn.shape == (1, 10, 24)
    assert cond.crossattn_mask is None
    with torch.no_grad():
        model.model.embed_tokens.weight[PAD] += torch.randn(24)
    assert not torch.allclose(model(inputs).crossattn[:, 0], cond.crossattn[:, 0], atol=1e-3)


def test_a_dropped_caption_is_the_null():
    model = conditioner()
    inputs = ConditionInputs(count=2, captions=["a red apple", "red"])
    cond = model(inputs, torch.tensor([False, True]))
    null = model.null(2)
    assert null.crossattn.shape == (2, 10, 24)
    torch.testing.assert_close(cond.crossattn[1], null.crossattn[0])
    assert not torch.allclose(cond.crossattn[0], null.crossattn[0])
    joined = cond.cat(null)
    assert joined.crossattn.shape[0] == 4
    assert joined.crossattn_mask is None


def test_the_output_layer_is_kept_and_never_trained():
    model = conditioner()
    assert model.state_dict()["to_logits.weight"].shape == (20, 24)
    assert not any(p.requires_grad for p in model.to_logits.parameters())
    model(ConditionInputs(count=1, captions=["red"])).crossattn.sum().backward()
    assert all(p.grad is not None for p in model.model.parameters())


def test_settings_hold_all_that_builds_it_again():
    settings = conditioner().settings()
    stored = Tokenizer.from_str(settings.pop("tokenizer"))
    again = BertTextConditioner(BertTextConditionerConfig.from_dict(settings), stored)
    assert (
        again.tokenize(["a red apple"]).tolist() == conditioner().tokenize(["a red apple"]).tolist()
    )


def test_a_tokenizer_of_another_model_is_refused():
    with pytest.raises(ConfigError, match="vocab_size is 9, but the tokenizer has 14 tokens"):
        conditioner(vocab_size=9)
    config = BertTextConditionerConfig(vocab_size=20, **SHAPE)
    with pytest.raises(ConfigError, match=r"the tokenizer has no \[SEP\]"):
        BertTextConditioner(config, tokenizer(["[PAD]", "[UNK]", "[CLS]", "a"]))


def test_without_a_prompt_it_says_what_it_wants():
    with pytest.raises(RequestError, match="wants a prompt, but was given a class"):
        conditioner()(ConditionInputs(count=1, labels=[3]))
