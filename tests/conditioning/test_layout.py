"""Layouts as tokens of coordinates."""

import pytest
import torch

from mezzotint.conditioning.base import Box, ConditionInputs
from mezzotint.conditioning.layout import LayoutConditioner, LayoutConditionerConfig, read_layout
from mezzotint.errors import ConfigError, RequestError

SMALL = {"width": 24, "layers": 2, "heads": 2, "head_dim": 8, "ffn_dim": 32}
NAMES = ("cat", "dog", "tree")


def conditioner(**fields: object) -> LayoutConditioner:
    torch.manual_seed(0)
    return LayoutConditioner(LayoutConditionerConfig(**(SMALL | fields))).eval()


def test_the_defaults_are_the_published_model():
    config = LayoutConditionerConfig()
    assert config.to_dict() == {
        "kind": "layout",
        "vocab_size": 8192,
        "width": 512,
        "layers": 16,
        "heads": 8,
        "head_dim": 64,
        "ffn_dim": 2048,
        "max_length": 92,
        "class_names": [],
    }


def test_ninety_two_tokens_counted_by_hand():
    """Of 8192 tokens, 90 x 90 are coordinates: bin = round(89 v), token = 90 y + x."""
    boxes = [Box(17, 0.0, 0.0, 1.0, 1.0), Box(3, 0.25, 0.5, 0.75, 0.9)]
    row = conditioner().tokenize([boxes])[0].tolist()
    # 89 * (0.25, 0.5, 0.75, 0.9) = 22.25, 44.5, 66.75, 80.1; a half goes to the even number
    assert row[:6] == [17, 0, 8099, 3, 44 * 90 + 22, 80 * 90 + 67]
    assert row[6:90] == [8191] * 84
    assert row[90:] == [0, 8099]


@pytest.mark.parametrize(
    ("box", "corners"),
    [
        ((0.0, 0.0, 1.0, 1.0), [0, 15]),
        ((2 / 3, 1 / 3, 1.0, 2 / 3), [6, 11]),
        ((0.16, 0.17, 0.84, 0.49), [4, 7]),
    ],
)
def test_corners_on_a_grid_of_four_by_four(box: tuple[float, ...], corners: list[int]):
    """Cells are counted row by row; between two the nearer one is taken."""
    model = conditioner(vocab_size=17, max_length=5)
    assert model.tokenize([[Box(1, *box)]]).tolist() == [[1, *corners, 0, 15]]


def test_objects_keep_their_order_and_no_object_fills_the_rest():
    model = conditioner(vocab_size=26, max_length=11)
    first, second = Box(4, 0.0, 0.0, 0.5, 0.5), Box(2, 0.5, 0.5, 1.0, 1.0)
    one = model.tokenize([[first, second], [second, first]]).tolist()
    assert one[0] == [4, 0, 12, 2, 12, 24, 25, 25, 25, 0, 24]
    assert one[1] == [2, 12, 24, 4, 0, 12, 25, 25, 25, 0, 24]
    assert model.tokenize([[]])[0].tolist() == [25] * 9 + [0, 24]


def test_as_many_boxes_as_there_is_room_for_and_no_more():
    model = conditioner()
    box = Box(1, 0.1, 0.1, 0.2, 0.2)
    assert model.max_objects == 30
    assert 8191 not in model.tokenize([[box] * 30]).tolist()[0]
    with pytest.raises(RequestError, match="has 31 boxes; the model takes 30 at most"):
        model.tokenize([[box] * 31])


@pytest.mark.parametrize(
    ("box", "message"),
    [
        (Box(0, -0.1, 0.0, 1.0, 1.0), r"layout\[0\].box: left is -0.1; expected a share"),
        (Box(0, 0.0, 0.0, 1.0, 1.5), r"layout\[0\].box: bottom is 1.5"),
        (Box(0, float("nan"), 0.0, 1.0, 1.0), "left is nan"),
        (Box(0, 0.5, 0.0, 0.5, 1.0), "left is 0.5; expected less than right, which is 0.5"),
        (Box(0, 0.0, 0.9, 0.5, 0.2), "top is 0.9; expected less than bottom, which is 0.2"),
        (Box(3, 0.0, 0.0, 1.0, 1.0), r"layout\[0\].label: expected a class from 0 to 2, got 3"),
    ],
)
def test_what_is_no_box_is_refused(box: Box, message: str):
    with pytest.raises(RequestError, match=message):
        conditioner(class_names=NAMES).tokenize([[box]])


def test_the_condition_of_each_sample_is_its_own_and_dropping_gives_the_null():
    model = conditioner()
    layouts = [[Box(1, 0.0, 0.0, 0.5, 0.5)], [Box(2, 0.0, 0.0, 0.5, 0.5)]]
    cond = model(ConditionInputs(count=2, layouts=layouts))
    assert cond.crossattn.shape == (2, 92, 24)
    assert cond.crossattn_mask is None
    dropped = model(ConditionInputs(count=2, layouts=layouts), torch.tensor([False, True]))
    null = model.null(2)
    torch.testing.assert_close(dropped.crossattn[0], cond.crossattn[0])
    torch.testing.assert_close(dropped.crossattn[1], null.crossattn[1])
    assert not torch.allclose(cond.crossattn[1], null.crossattn[1])
    assert cond.cat(null).crossattn.shape == (4, 92, 24)


def test_without_a_layout_it_says_what_it_wants():
    with pytest.raises(RequestError, match=r"wants a layout \(--layout.*given a prompt"):
        conditioner()(ConditionInputs(count=1, captions=["a cat"]))


def test_classes_by_name_or_index():
    named, numbered = conditioner(class_names=NAMES), conditioner()
    assert [named.index_of(label) for label in ("dog", 1, "1")] == [1, 1, 1]
    assert numbered.index_of("600") == 600
    with pytest.raises(RequestError, match="unknown class 'dgo'; did you mean 'dog'"):
        named.index_of("dgo")
    with pytest.raises(RequestError, match="unknown class 'cat'; expected a number from 0 to 8190"):
        numbered.index_of("cat")


def test_a_layout_from_plain_values():
    data = [{"label": "tree", "box": [0, 0.25, 1, 0.5]}, {"label": 0, "box": (0.1, 0.2, 0.3, 0.4)}]
    assert read_layout(conditioner(class_names=NAMES), data) == [
        Box(2, 0.0, 0.25, 1.0, 0.5),
        Box(0, 0.1, 0.2, 0.3, 0.4),
    ]


def test_all_mistakes_of_a_layout_are_told_at_once():
    data = [
        {"label": "tre", "box": [0, 0, 1, 1]},
        {"label": "cat", "box": [0.7, 0, 0.3, 1]},
        {"label": "cat", "box": [0, 0, 1, 1]},
        {"label": "cat", "box": [0, 0, 1]},
        {"label": None, "box": [0, 0, 1, 1]},
        {"name": "cat"},
        "cat",
    ]
    with pytest.raises(RequestError) as caught:
        read_layout(conditioner(class_names=NAMES), data, "scene.json")
    assert str(caught.value).split("\n") == [
        "scene.json[0].label: unknown class 'tre';"
        " did you mean 'tree'? Choose from: cat, dog, tree",
        "scene.json[1].box: left is 0.7; expected less than right, which is 0.3",
        "scene.json[3].box: expected [left, top, right, bottom], four numbers from 0 to 1,"
        " got [0, 0, 1]",
        "scene.json[4].label: expected a name or an index, got None",
        "scene.json[5]: expected label and box, got {'name': 'cat'}",
        "scene.json[6]: expected label and box, got 'cat'",
    ]
    with pytest.raises(RequestError, match="layout: expected a list of {label, box}, got 'cat'"):
        read_layout(conditioner(), "cat")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_length": 91}, "max_length: expected 3 for each object and 2 more, got 91"),
        ({"class_names": ["a", "a"]}, "class_names: a name stands there twice"),
        ({"vocab_size": 4, "class_names": list("abcd")}, "4 classes are too many"),
    ],
)
def test_shapes_that_cannot_be_are_refused(fields: dict[str, object], message: str):
    with pytest.raises(ConfigError, match=message):
        LayoutConditionerConfig.from_dict(fields)


@pytest.mark.parametrize("vocab_size", [17, 256, 8192])
def test_neighbouring_corners_begin_alike(vocab_size: int) -> None:
    """The nearer two corners are, the more alike; and no two are the same."""
    weight = conditioner(vocab_size=vocab_size).model.embed_tokens.weight.detach()
    assert weight.std() == pytest.approx(0.02, rel=0.1)
    side = int(vocab_size**0.5)
    corners = weight[: side * side]
    alike = torch.nn.functional.cosine_similarity(corners[:1], corners, dim=1)
    assert alike[1] > alike[side - 1] and alike[side] > alike[side * (side - 1)]
    assert torch.cdist(corners, corners).fill_diagonal_(1.0).min() > 1e-4


def test_tokens_begin_by_looking_at_their_own_object():
    torch.manual_seed(0)
    config = LayoutConditionerConfig(
        vocab_size=256, width=64, layers=2, heads=2, head_dim=32, ffn_dim=64, max_length=11
    )
    conditioner = LayoutConditioner(config)
    boxes = [Box(5, 0.1, 0.2, 0.5, 0.7), Box(9, 0.5, 0.3, 0.9, 0.8), Box(3, 0.2, 0.6, 0.4, 0.9)]
    ids, model = conditioner.tokenize([boxes]), conditioner.model
    layer = model.layers[0]
    x = layer.self_attn_layer_norm(model.embed_tokens(ids) + model.embed_positions.weight)[0]
    q, k = (
        part(x).unflatten(-1, (2, -1)).transpose(0, 1)
        for part in (layer.self_attn.q_proj, layer.self_attn.k_proj)
    )
    looks = (q @ k.mT * 32**-0.5).softmax(-1).mean(0)
    place = (torch.arange(11) + (torch.arange(11) >= 9)) // 3
    own = (place[:, None] == place) & ~torch.eye(11, dtype=torch.bool)
    other = place[:, None] != place
    assert looks[own].mean() > 3 * looks[other].mean()


def test_classes_do_not_begin_alike():
    """Their numbers are also those of corners, of which neighbours are alike."""
    torch.manual_seed(0)
    names = tuple("abcdefgh")
    config = LayoutConditionerConfig(
        vocab_size=256, width=64, layers=0, max_length=5, class_names=names
    )
    weight = LayoutConditioner(config).model.embed_tokens.weight
    alike = torch.cosine_similarity(weight[:-1], weight[1:])
    assert alike[:7].abs().max() < 0.5 and alike[20:30].min() > 0.7
