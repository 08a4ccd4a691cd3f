"""Conditioning values and the conditioners that make them."""

import json
import subprocess
import sys

import pytest
import torch

from mezzotint.conditioning.base import Conditioning, ConditionInputs, Unconditional
from mezzotint.conditioning.classes import ClassConditioner, ClassConditionerConfig
from mezzotint.conditioning.text import TextConditioner, TextConditionerConfig, train_tokenizer
from mezzotint.errors import RequestError

CAPTIONS = ["a red apple", "a blue car", "an octopus under the sea", "grinning face"]


def text_conditioner(seed: int = 0) -> TextConditioner:
    torch.manual_seed(seed)
    config = TextConditionerConfig(width=32, layers=2, heads=4, max_length=12, vocab_size=128)
    return TextConditioner(config, train_tokenizer(CAPTIONS, 128)).eval()


def test_cat_pads_shorter_sequences_with_masked_tokens():
    short = Conditioning(crossattn=torch.ones(1, 2, 4))
    long = Conditioning(crossattn=torch.ones(2, 5, 4))
    joined = short.cat(long)
    assert joined.crossattn.shape == (3, 5, 4)
    assert joined.crossattn_mask.tolist() == [
        [True, True, False, False, False],
        [True] * 5,
        [True] * 5,
    ]
    assert joined.crossattn[0, 2:].abs().sum() == 0


def test_a_dropped_caption_is_the_null():
    conditioner = text_conditioner()
    inputs = ConditionInputs(count=2, captions=CAPTIONS[:2])
    cond = conditioner(inputs, torch.tensor([False, True]))
    null = conditioner.null(1)
    torch.testing.assert_close(cond.crossattn[1], null.crossattn[0])
    assert not torch.allclose(cond.crossattn[0], null.crossattn[0])


def test_padding_is_seen_by_no_token():
    """A caption's tokens are the same whatever stands in the padded positions."""
    conditioner = text_conditioner()
    inputs = ConditionInputs(count=1, captions=["a red apple"])
    real = conditioner(inputs)
    count = int(real.crossattn_mask.sum())
    with torch.no_grad():
        conditioner.token_embedding.weight[conditioner._pad] = 100.0
    changed = conditioner(inputs)
    torch.testing.assert_close(real.crossattn[:, :count], changed.crossattn[:, :count])


def test_every_token_sees_every_token():
    """tau_theta is unmasked: the first token depends on the last word."""
    conditioner = text_conditioner()
    one = conditioner(ConditionInputs(count=1, captions=["a red apple"])).crossattn[0, 0]
    other = conditioner(ConditionInputs(count=1, captions=["a red car"])).crossattn[0, 0]
    assert not torch.allclose(one, other)


def test_captions_longer_than_the_limit_are_cut_with_their_end_token():
    conditioner = text_conditioner()
    ids, mask = conditioner.tokenize(["apple " * 50])
    assert ids.shape == (1, 12) and mask.all()
    assert ids[0, -1] == conditioner.tokenizer.token_to_id("[SEP]")


def test_the_same_captions_give_the_same_vocabulary():
    """In another process, where hashes are seeded otherwise."""
    script = (
        "from mezzotint.conditioning.text import train_tokenizer;"
        "from mezzotint.data.emoji import emoji_concepts;"
        "print(train_tokenizer([c.caption for c in emoji_concepts()], 1024).to_str())"
    )
    runs = {subprocess.check_output([sys.executable, "-c", script]) for _ in range(3)}
    assert len(runs) == 1
    assert len(json.loads(runs.pop())["model"]["vocab"]) == 1024


def test_unknown_characters_become_the_unknown_token_and_not_an_error():
    conditioner = text_conditioner()
    ids, _ = conditioner.tokenize(["红苹果", ""])
    assert conditioner.tokenizer.token_to_id("[UNK]") in ids[0].tolist()


def test_class_conditioner_drops_to_its_own_null():
    conditioner = ClassConditioner(ClassConditionerConfig(width=8, class_names=("hat", "shoe")))
    cond = conditioner(ConditionInputs(count=2, labels=[1, 1]), torch.tensor([False, True]))
    torch.testing.assert_close(cond.crossattn[1], conditioner.null(1).crossattn[0])
    torch.testing.assert_close(cond.crossattn[0, 0], conditioner.embedding.weight[1])


@pytest.mark.parametrize(("label", "index"), [("shoe", 1), (0, 0), ("1", 1)])
def test_class_by_name_or_index(label: str | int, index: int):
    conditioner = ClassConditioner(ClassConditionerConfig(width=8, class_names=("hat", "shoe")))
    assert conditioner.index_of(label) == index


def test_unknown_class_names_the_nearest():
    conditioner = ClassConditioner(ClassConditionerConfig(width=8, class_names=("hat", "shoe")))
    with pytest.raises(RequestError, match="did you mean 'shoe'"):
        conditioner.index_of("shoes")
    with pytest.raises(RequestError, match="unknown class 2"):
        conditioner.index_of(2)


def test_a_thousand_classes_have_a_thousand_and_one_rows_the_last_of_which_is_the_null():
    names = tuple(str(number) for number in range(1000))
    conditioner = ClassConditioner(ClassConditionerConfig(width=8, class_names=names))
    assert conditioner.embedding.weight.shape == (1001, 8)
    assert torch.equal(conditioner.null(1).crossattn[0, 0], conditioner.embedding.weight[1000])
    assert [conditioner.index_of(label) for label in (0, "999", 207)] == [0, 999, 207]
    with pytest.raises(
        RequestError, match=r"did you mean '100'\? .*, … \(1000 classes in all\)"
    ) as e:
        conditioner.index_of(1000)
    assert len(str(e.value)) < 160


def test_a_digit_that_is_no_number_is_an_unknown_class():
    conditioner = ClassConditioner(ClassConditionerConfig(width=8, class_names=("hat", "shoe")))
    with pytest.raises(RequestError, match="unknown class '²'"):
        conditioner.index_of("²")


def test_a_prompt_to_a_class_only_model_says_what_it_wants():
    conditioner = ClassConditioner(ClassConditionerConfig(width=8, class_names=("hat", "shoe")))
    with pytest.raises(RequestError, match="wants a class .*was given a prompt"):
        conditioner(ConditionInputs(count=1, captions=["a hat"]))


def test_unconditional_refuses_conditions():
    assert Unconditional()(ConditionInputs(count=2)).crossattn is None
    with pytest.raises(RequestError, match="unconditional"):
        Unconditional()(ConditionInputs(count=1, captions=["x"]))
