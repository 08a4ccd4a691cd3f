"""CLIP's text encoder: chunks, emphasis, added words, and what it is made of."""

import copy
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CLIPTextConfig

from mezzotint.conditioning.base import ConditionInputs, Emphasis, TextOptions
from mezzotint.conditioning.clip import ClipConditioner, ClipConditionerConfig
from mezzotint.conditioning.vocabularies import clip_tokenizer
from mezzotint.errors import CheckpointError, ConfigError, MissingExtraError, RequestError

WIDTH = 16
SHAPE = {"hidden_size": WIDTH, "intermediate_size": 32, "num_attention_heads": 2}
CONFIG = ClipConditionerConfig(**SHAPE, num_hidden_layers=3)
RED, APPLE = 736, 3055


@pytest.fixture(scope="module")
def shared() -> ClipConditioner:
    torch.manual_seed(0)
    made = ClipConditioner(CONFIG, clip_tokenizer()).eval().requires_grad_(False)
    # a trained model's values have a mean; it is what emphasis keeps
    made.text_model.final_layer_norm.bias += 0.1 * torch.randn(WIDTH) + 0.2
    return made


@pytest.fixture
def clip(shared: ClipConditioner) -> ClipConditioner:
    memo = {id(shared.tokenizer): shared.tokenizer}  # which nothing here changes
    return copy.deepcopy(shared, memo)


def read(clip: ClipConditioner, *captions: str, **options: Any) -> Tensor:
    text = TextOptions(**options)
    found = clip(ConditionInputs(count=len(captions), captions=captions, text=text)).crossattn
    assert found is not None
    return found


def tokens(clip: ClipConditioner, caption: str) -> list[tuple[int, ...]]:
    return [chunk.tokens for chunk in clip.chunks(caption)]


def test_the_defaults_are_those_of_stable_diffusion_1() -> None:
    assert ClipConditionerConfig().to_dict() == {
        "kind": "clip",
        "vocab_size": 49408,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 77,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "projection_dim": 768,
        "bos_token_id": 49406,
        "eos_token_id": 49407,
        "pad_token_id": 49407,
        "output_layer": 1,
    }


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_attention_heads": 3}, "hidden_size 16 is not divisible by num_attention_heads 3"),
        ({"output_layer": 13}, "output_layer: expected 1 to num_hidden_layers, 12, got 13"),
        ({"pad_token_id": 49408}, "pad_token_id: expected less than vocab_size, 49408, got 49408"),
    ],
)
def test_shapes_that_cannot_be(wrong: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ClipConditionerConfig.from_dict({**SHAPE, **wrong})


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="vocab_size is 49000, but the tokenizer has .* 49407"):
        config = CONFIG.model_copy(update={"vocab_size": 49000})
        ClipConditioner(config, clip_tokenizer())


def test_chunks_of_one_batch_are_masked_and_do_not_change_one_another(
    clip: ClipConditioner,
) -> None:
    long, short = "word " * 160, "a red apple"
    both = clip(ConditionInputs(count=2, captions=[short, long]))
    assert both.crossattn.shape == (2, 3 * 77, WIDTH)
    assert both.crossattn_mask.sum(dim=1).tolist() == [77, 231]
    assert not both.crossattn[0, 77:].any()
    # another size of batch adds in another order: a few of float32's last bits
    assert (both.crossattn[:1, :77] - read(clip, short)).abs().max() < 1e-5
    assert (both.crossattn[1:] - read(clip, long)).abs().max() < 1e-5
    same = clip(ConditionInputs(count=2, captions=[long, "other " * 151]))
    assert same.crossattn.shape == (2, 231, WIDTH) and same.crossattn_mask is None


def test_padding_begins_with_the_end_token() -> None:
    """With 0 as padding the end is no padding: what stands after it is another."""
    torch.manual_seed(0)
    clips = [
        ClipConditioner(CONFIG.model_copy(update={"pad_token_id": pad}), clip_tokenizer()).eval()
        for pad in (49407, 0)
    ]
    clips[1].load_state_dict(clips[0].state_dict())
    ours, other = (read(clip, "a red apple") for clip in clips)
    # start, three words and the end are what they were; a causal model sees no padding before it
    assert (ours[:, :5] - other[:, :5]).abs().max() < 1e-5
    assert (ours[:, 5:] - other[:, 5:]).abs().amax(dim=(0, 2)).min() > 1e-3


@pytest.mark.parametrize("emphasis", ["original", "no_norm"])
def test_weights_multiply_their_tokens(clip: ClipConditioner, emphasis: Emphasis) -> None:
    plain = read(clip, "a red apple")
    found = read(clip, "a (red:1.5) [apple]", emphasis=emphasis)
    weights = torch.ones(77)
    weights[2], weights[3] = 1.5, 1 / 1.1
    expected = plain * weights[:, None]
    if emphasis == "original":
        expected = expected * (plain.mean() / expected.mean())
        assert abs(found.mean() - plain.mean()) < 1e-6  # 24 bits of values around 1
    # the product and the mean are rounded once each
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert (found - plain).abs().max() > 0.1


def test_a_mean_that_is_rounding_is_not_kept(clip: ClipConditioner) -> None:
    clip.text_model.final_layer_norm.bias.zero_()
    assert read(clip, "a red apple").mean().abs() < 1e-6
    found = read(clip, "a (red:1.5) apple")
    assert torch.equal(found, read(clip, "a (red:1.5) apple", emphasis="no_norm"))


def test_each_chunk_keeps_its_own_mean(clip: ClipConditioner) -> None:
    prompts = "a (red:1.5) apple BREAK blue BREAK [green] pear", "yellow BREAK (x:0.3) BREAK y"
    plain, found = (
        read(clip, *prompts, emphasis=emphasis).unflatten(1, (3, 77))
        for emphasis in ("ignore", "original")
    )
    assert (found.mean(dim=(2, 3)) - plain.mean(dim=(2, 3))).abs().max() < 1e-6
    weighted = torch.tensor([[True, False, True], [False, True, False]])
    assert ((found != plain).any(dim=3).any(dim=2) == weighted).all()
    # a chunk without weights is the same to the bit, beside others that have some
    assert torch.equal(found[~weighted], plain[~weighted])


@pytest.mark.parametrize("prompt", ["(a red:1) apple", "[(a red)] apple", "a red apple", "(a:1.0)"])
def test_weights_of_one_change_no_bit(clip: ClipConditioner, prompt: str) -> None:
    assert torch.equal(read(clip, prompt), read(clip, prompt, emphasis="ignore"))


def test_brackets_may_have_no_effect_or_be_plain(clip: ClipConditioner) -> None:
    prompt = "a (red:1.5) apple BREAK b"
    assert torch.equal(read(clip, prompt, emphasis="ignore"), read(clip, "a (red:1) apple BREAK b"))
    plain = clip.chunks(prompt, "none")
    assert len(plain) == 1 and set(plain[0].weights) == {1.0}
    assert list(plain[0].tokens) == clip.tokenizer.encode(prompt).ids
    assert torch.equal(
        read(clip, prompt, emphasis="none"), read(clip, r"a \(red:1.5\) apple break b")
    )
    assert clip.chunks("", "none") == clip.chunks("")


@pytest.mark.parametrize("prompt", ["(a:1001)", "(a:-2e3)(a:-2000)", "(((a:900):900)", "(" * 2000])
def test_weights_beyond_any_use_are_refused(clip: ClipConditioner, prompt: str) -> None:
    prompt += " a"
    with pytest.raises(RequestError, match="has the weight .*; expected at most 1000"):
        read(clip, prompt)
    assert read(clip, prompt, emphasis="ignore").isfinite().all()


@pytest.mark.parametrize("clip_skip", [0, -1, 4])
def test_layers_that_are_not_there(clip: ClipConditioner, clip_skip: int) -> None:
    with pytest.raises(RequestError, match=f"clip_skip: expected 1 to 3 .*, got {clip_skip}"):
        read(clip, "a", clip_skip=clip_skip)


def test_the_range_of_layers_begins_at_the_models_own() -> None:
    clip = ClipConditioner(CONFIG.model_copy(update={"output_layer": 2}), clip_tokenizer())
    with pytest.raises(RequestError, match="expected 1 to 2"):
        read(clip, "a", clip_skip=3)


def test_dropped_captions_are_empty_ones(clip: ClipConditioner) -> None:
    inputs = ConditionInputs(count=2, captions=["a red apple", "a pear"])
    dropped = clip(inputs, torch.tensor([True, False])).crossattn
    assert (dropped[0] - clip.null(1).crossattn[0]).abs().max() < 1e-5
    assert (dropped[1] - read(clip, "a pear")[0]).abs().max() < 1e-5
    assert clip.null(4).crossattn.shape == (4, 77, WIDTH)


def test_a_model_of_captions_says_what_it_wants(clip: ClipConditioner) -> None:
    with pytest.raises(RequestError, match="wants a prompt, but was given a class"):
        clip(ConditionInputs(count=1, labels=[0]))


def test_a_word_stands_for_vectors(clip: ClipConditioner) -> None:
    """Vectors that are those of the vocabulary change nothing but the name."""
    before, state = read(clip, "a zebra", "a <Toy>, here"), clip.state_dict()
    own = clip.text_model.embeddings.token_embedding.weight[[RED, APPLE]]
    clip.add_word("<toy>", own)
    assert clip.words == ("<toy>",)
    assert tokens(clip, "a <Toy>, here") == [(320, 49408, 49409, 267, 763)]
    assert torch.equal(read(clip, "a <Toy>, here"), read(clip, "a red apple, here"))
    weighted = clip.chunks("(<toy>:1.2)")[0]
    assert weighted.tokens == (49408, 49409) and weighted.weights == (1.2, 1.2)
    assert clip.state_dict().keys() == state.keys()
    clip.remove_word("<toy>")
    assert clip.words == () and torch.equal(read(clip, "a zebra", "a <Toy>, here"), before)
    assert clip.text_model.embeddings.token_embedding.added is None


@pytest.mark.parametrize(
    ("word", "text", "found"),
    [
        ("zog", "a ZOG, Zogs zog's", 2),
        ("zog", "zogzog", 0),
        ("zog", "zog-zog zog1", 3),
        ("zog 1", "zog \n 1", 1),
        ("bad-hands-5", "(bad-hands-5:1.2), Bad-Hands-5", 2),
        ("<s>", "a<s>b <s>,<s>.", 3),
        ("caf\u00e9", "cafe\u0301", 1),
        ("cafe\u0301", "a caf\u00e9.", 1),
        ("猫", "猫 一只猫", 1),
        (".*", "anything .* else", 1),
    ],
)
def test_where_a_word_is_found(clip: ClipConditioner, word: str, text: str, found: int) -> None:
    clip.add_word(word, torch.zeros(1, WIDTH))
    assert sum(chunk.count(49408) for chunk in tokens(clip, text)) == found


def test_of_several_words_the_longest_is_found(clip: ClipConditioner) -> None:
    for number, word in enumerate(("red", "red apple", "apple"), start=1):
        clip.add_word(word, torch.full((number, WIDTH), float(number)))
    added = clip.text_model.embeddings.token_embedding.added
    for text, number, count in (("red apple", 2, 2), ("red", 1, 1), ("an apple", 3, 3)):
        ids = torch.tensor([n - 49408 for n in tokens(clip, text)[0] if n >= 49408])
        assert torch.equal(added[ids], torch.full((count, WIDTH), float(number)))
    clip.remove_word("red apple")
    assert len(tokens(clip, "red apple")[0]) == 1 + 3
    assert clip.words == ("apple", "red")


def test_the_vectors_of_a_word_stay_in_one_chunk(clip: ClipConditioner) -> None:
    clip.add_word("zog", torch.randn(20, WIDTH))
    assert [len(chunk) for chunk in tokens(clip, "a " * 60 + "zog b")] == [60, 21]
    assert read(clip, "a " * 60 + "zog b").shape == (1, 154, WIDTH)
    clip.add_word("whale", torch.randn(100, WIDTH))  # one that no chunk can hold
    assert [len(chunk) for chunk in tokens(clip, "a whale")] == [75, 26]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_precisions(clip: ClipConditioner, dtype: torch.dtype) -> None:
    exact = read(clip, "a (red:1.2) zog")
    clip.to(dtype)
    found = read(clip, "a (red:1.2) zog")
    assert found.dtype == dtype
    # bfloat16 keeps 8 bits, through three layers and outputs up to 4
    assert (found.float() - exact).abs().max() < {2: 0.15, 4: 1e-6}[dtype.itemsize]
    clip.add_word("zog", torch.randn(2, WIDTH))
    assert read(clip, "a (red:1.2) zog").dtype == dtype


def test_autocast_and_inference_mode(clip: ClipConditioner) -> None:
    exact = read(clip, "a (red:1.2) apple")
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        found = read(clip, "a (red:1.2) apple")
    # its products have 8 bits; norms and sums are float32
    assert (found - exact).abs().max() < 0.15


def test_it_can_be_trained() -> None:
    clip = ClipConditioner(CONFIG, clip_tokenizer())
    read(clip, "a (red:1.2) apple", clip_skip=2).square().sum().backward()
    for name, value in clip.named_parameters():
        used = not name.startswith("text_model.encoder.layers.2.")  # skipped
        assert (value.grad is not None and bool(value.grad.any())) == used or "k_proj" in name


def test_it_loads_onto_the_meta_device(clip: ClipConditioner) -> None:
    """Also from files that hold the positions; nothing is left without memory."""
    with torch.device("meta"):
        empty = ClipConditioner(CONFIG, clip_tokenizer())
    assert all(value.is_meta for value in empty.state_dict().values())
    stored = dict(clip.state_dict())
    stored["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    empty.load_state_dict(stored, strict=True, assign=True)
    assert not list(empty.buffers())
    assert "text_model.embeddings.position_ids" in stored
    assert torch.equal(read(empty.eval().to("cpu"), "a cat"), read(clip, "a cat"))


def test_settings_tell_models_apart(clip: ClipConditioner) -> None:
    before = clip.settings()
    assert before["hidden_act"] == "quick_gelu" and len(before["tokenizer"]) == 64
    assert "words" not in before
    clip.add_word("zog", torch.zeros(1, WIDTH))
    zeros = clip.settings()
    clip.remove_word("zog")
    clip.add_word("zog", torch.ones(1, WIDTH))
    assert zeros["words"].keys() == {"zog"} and zeros != clip.settings() != before
    clip.remove_word("zog")
    assert clip.settings() == before


def test_words_that_cannot_be(clip: ClipConditioner) -> None:
    clip.add_word("zog", torch.zeros(1, WIDTH))
    with pytest.raises(RequestError, match="'ZOG' already stands for an embedding, 'zog'"):
        clip.add_word("ZOG", torch.zeros(1, WIDTH))
    with pytest.raises(RequestError, match="is blank"):
        clip.add_word(" \n", torch.zeros(1, WIDTH))
    for shape in ((1, 24), (0, WIDTH), (WIDTH,)):
        with pytest.raises(CheckpointError, match=r"'x': its shape is .* vectors of width 16"):
            clip.add_word("x", torch.zeros(shape))
    with pytest.raises(RequestError, match="no embedding is called 'zug'; did you mean 'zog'"):
        clip.remove_word("zug")
    assert clip.words == ("zog",)


def test_a_word_does_not_follow_its_callers_tensor(clip: ClipConditioner) -> None:
    vectors = torch.zeros(1, WIDTH)
    clip.add_word("zog", vectors)
    vectors += 1
    assert not clip.text_model.embeddings.token_embedding.added.any()


def test_without_transformers_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'mezzotint\[clip\]'"):
        ClipConditioner(CONFIG, clip_tokenizer())


def test_nothing_is_printed() -> None:
    """In a process of its own, where no test has silenced anything."""
    script = f"""
import torch
from mezzotint.conditioning.base import ConditionInputs
from mezzotint.conditioning.clip import ClipConditioner, ClipConditionerConfig
from mezzotint.conditioning.vocabularies import clip_tokenizer
config = ClipConditionerConfig(**{SHAPE}, num_hidden_layers=2, pad_token_id=0)
clip = ClipConditioner(config, clip_tokenizer())
clip(ConditionInputs(count=1, captions=["word " * 90]))
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_transformers_reads_the_same_configuration(clip: ClipConditioner) -> None:
    theirs: CLIPTextConfig = clip.text_model.config
    for name in ("hidden_size", "hidden_act", "layer_norm_eps", "eos_token_id", "pad_token_id"):
        assert getattr(theirs, name) == getattr(CONFIG, name)
    assert theirs._attn_implementation == "sdpa"
