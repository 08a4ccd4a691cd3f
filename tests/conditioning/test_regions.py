"""Words for parts of the picture."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mezzotint
from mezzotint.conditioning.base import Conditioning, ConditionInputs, Region
from mezzotint.conditioning.regions import RegionsConditioner, RegionsConditionerConfig
from mezzotint.conditioning.spatial import HybridConditioner
from mezzotint.conditioning.text import TextConditioner, TextConditionerConfig, train_tokenizer
from mezzotint.errors import ConfigError, DataError, RequestError
from mezzotint.models.unet import UNet, UNetConfig
from mezzotint.nn.attention import TransformerBlock
from mezzotint.nn.regions import Regions

APPLE, BUS = Region("a red apple", 0.0, 0.0, 0.5, 0.5), Region("a bus", 0.5, 0.25, 1.0, 1.0)
TEXT = {"kind": "text", "width": 32, "layers": 1, "heads": 2, "max_length": 12}
HYBRID = {"kind": "hybrid", "main": TEXT, "spatial": {"kind": "regions", "max_objects": 2}}
SCENES = {"kind": "scenes", "concepts": ["red-apple", "bus", "key"], "max_objects": 2, "count": 8}


@pytest.fixture
def conditioner() -> HybridConditioner:
    torch.manual_seed(0)
    config = TextConditionerConfig(width=16, layers=1, heads=2, max_length=10, vocab_size=64)
    words = train_tokenizer(["a red apple", "a bus", "on a blue background"], 64)
    spatial = RegionsConditioner(RegionsConditionerConfig(max_objects=3, phrase_length=5))
    return HybridConditioner(TextConditioner(config, words), spatial)


def inputs(*samples: tuple[Region, ...], **more: Any) -> ConditionInputs:
    captions = ["on a blue background"] * len(samples)
    told = {"captions": captions, "regions": samples, "latent_size": (4, 4)}
    return ConditionInputs(count=len(samples), **{**told, **more})


def test_cells_see_what_they_overlap() -> None:
    boxes = torch.tensor([[[0.0, 0.0, 1 / 3, 1.0], [0.4, 0.5, 1.0, 1.0]]])
    seen = Regions(boxes).at(2, 3)[0, 0].view(2, 3, 2)
    assert seen[..., 0].tolist() == [[True, False, False]] * 2
    assert seen[..., 1].tolist() == [[False, False, False], [False, True, True]]
    masked = Regions(boxes, torch.tensor([[True, False]])).at(2, 3)
    assert masked[..., 1].sum() == 0 and masked[..., 0].sum() == 2


def test_boxes_are_concatenated_by_what_they_cover(conditioner: HybridConditioner) -> None:
    told = conditioner(inputs((APPLE, Region("a bus", 0.125, 0.0, 0.25, 1.0)), ()))
    assert told.concat is not None and told.concat.shape == (2, 3, 4, 4)
    assert told.concat[0, 0].tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0] * 4, [0] * 4]
    assert told.concat[0, 1].tolist() == [[0.5, 0, 0, 0]] * 4
    assert not told.concat[0, 2].any() and not told.concat[1].any()


def test_words_are_read_as_captions_and_only_boxes_attend_to_them(
    conditioner: HybridConditioner,
) -> None:
    """A sample's tokens do not depend on its neighbours; the null keeps places, not words."""
    told = conditioner(inputs((APPLE, BUS), (BUS,)))
    alone = conditioner(inputs((BUS,)))
    assert told.crossattn is not None and told.crossattn_boxes is not None
    assert told.crossattn.shape == (2, 10 + 3 * 5, 16)
    torch.testing.assert_close(told.crossattn[1:], alone.crossattn)
    said = conditioner.main(ConditionInputs(count=1, captions=["a red apple"])).crossattn
    torch.testing.assert_close(told.crossattn[0, 10:15], said[0, :5])
    assert told.crossattn_boxes[0, 9].tolist() == [0.0, 0.0, 1.0, 1.0]
    assert told.crossattn_boxes[0, 15].tolist() == [0.5, 0.25, 1.0, 1.0]
    assert told.crossattn_mask is not None and not told.crossattn_mask[1, 15:].any()
    unnamed = conditioner(replace(inputs((APPLE, BUS)), unnamed=True))
    assert not unnamed.crossattn_mask[0, 10:].any()
    assert torch.equal(unnamed.concat, told.concat[:1])
    dropped = conditioner(inputs((APPLE, BUS)), torch.tensor([True]), torch.tensor([False]))
    assert not dropped.crossattn_mask[0, 10:].any() and dropped.concat.any()
    unplaced = conditioner(inputs((APPLE, BUS)), torch.tensor([False]), torch.tensor([True]))
    assert not unplaced.crossattn_mask[0, 10:].any() and not unplaced.concat.any()
    assert unplaced.crossattn_mask[0, :10].any()
    words = replace(told, concat=None)
    joined = words.cat(conditioner.null(1).pad(25), Conditioning(crossattn=torch.zeros(1, 3, 16)))
    assert joined.crossattn_boxes is not None and joined.crossattn_boxes.shape == (4, 25, 4)


def test_what_stands_elsewhere_is_not_seen(conditioner: HybridConditioner) -> None:
    """Where the network attends, other words of a box change what lies in it alone."""
    config = UNetConfig(
        in_channels=7,
        block_out_channels=(8,),
        attention_levels=(True,),
        layers_per_block=1,
        cross_attention_dim=16,
        num_attention_heads=2,
        norm_num_groups=8,
    )
    attention = UNet(config).mid_block.attentions[0].transformer_blocks[0].attn2
    other = replace(APPLE, words="a bus")
    x, seen = torch.randn(1, 16, 8), []
    for regions in ((APPLE,), (other,)):
        told = conditioner(inputs(regions))
        mask = Regions(told.crossattn_boxes, told.crossattn_mask).at(4, 4)
        seen.append(attention(x, told.crossattn, mask).view(4, 4, 8))
    differs = (seen[0] - seen[1]).abs().amax(-1) > 1e-6
    assert differs.tolist() == [[True, True, False, False]] * 2 + [[False] * 4] * 2


def test_what_is_no_layout_is_refused(conditioner: HybridConditioner) -> None:
    with pytest.raises(RequestError, match="has 4 boxes; the model takes 3 at most"):
        conditioner(inputs((APPLE,) * 4))
    with pytest.raises(
        RequestError, match=r"layout\[0\]\.box: left is 0\.5; expected less than right"
    ):
        conditioner(inputs((replace(APPLE, left=0.5),)))
    with pytest.raises(RequestError, match=r"box: top is 0\.3; .* by 0\.001 at least"):
        conditioner(inputs((replace(APPLE, top=0.3, bottom=0.3005),)))
    with pytest.raises(RequestError, match="the model wants boxes with words"):
        conditioner(ConditionInputs(count=1, captions=["a bus"]))


def recipe(tiny: Any, **changes: Any) -> Any:
    common = {
        "data": SCENES,
        "conditioning": HYBRID,
        "unet__in_channels": 6,
        "budget": {"max_steps": 3},
        "data__resolution": 64,
    }
    return tiny.diffusion(**common | changes)


@pytest.fixture(scope="module")
def regions_run(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.train(recipe(tiny), tmp_path_factory.mktemp("regions") / "run")


def test_it_is_trained_stored_and_drawn_from(regions_run: Path) -> None:
    run = regions_run
    assert list((run / "samples").glob("*.png"))
    pipeline = mezzotint.load(run, device="cpu")
    assert pipeline.task == "layout-to-image" and pipeline.tasks == ("layout-to-image",)
    layout = [{"label": "a red apple", "box": [0.0, 0.0, 0.5, 0.5]}]
    told = {"steps": 2, "guidance_scale": 3.0}
    here = pipeline.generate("on blue", layout=layout, **told)[0].image
    moved = [{**layout[0], "box": [0.5, 0.5, 1.0, 1.0]}]
    named = [{**layout[0], "label": "a key"}]
    for other in (moved, named, []):
        assert (
            pipeline.generate("on blue", layout=other, **told)[0].image.tobytes() != here.tobytes()
        )
    with pytest.raises(RequestError, match="expected words for what the box shows, got 3"):
        pipeline.generate("on blue", layout=[{**layout[0], "label": 3}])
    with pytest.raises(RequestError, match="the model wants a prompt, and boxes with words"):
        pipeline.generate("on blue")
    with pytest.raises(RequestError, match="is no valid Unicode text"):
        pipeline.generate("on blue", layout=[{**layout[0], "label": "\ud800"}])


@pytest.mark.parametrize(
    "told", [{}, {"high_res": {"scale": 2.0}}, {"feature_reuse": {"interval": 2}}]
)
def test_boxes_reach_all_that_attends(
    regions_run: Path, told: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline, seen = mezzotint.load(regions_run, device="cpu"), list[tuple[int, int, Tensor]]()
    at = Regions.at

    def recorded(self: Regions, height: int, width: int) -> Tensor:
        seen.append((height, width, at(self, height, width)))
        return seen[-1][-1]

    monkeypatch.setattr(Regions, "at", recorded)
    layout = [{"label": "a red apple", "box": [0.0, 0.0, 0.5, 1.0]}]
    pipeline.generate("on blue", layout=layout, steps=2, guidance_scale=3.0, **told)
    attending = sum(isinstance(m, TransformerBlock) for m in pipeline.model.unet.modules())
    assert len(seen) >= attending
    assert len({height for height, _, _ in seen}) == (2 if "high_res" in told else 1)
    for height, width, mask in seen:
        words = mask.view(2, height, width, -1)[:, :, :, TEXT["max_length"] :].any(-1)
        wanted = torch.zeros(height, width, dtype=torch.bool)
        wanted[:, : -(-width // 2)] = True
        # one half of a guided batch is told the words, the other is not
        assert sorted(half.any().item() for half in words) == [False, True]
        assert torch.equal(words.any(0), wanted)


def test_recipes_that_cannot_be_told_boxes_are_refused(tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="kind 'regions' needs what reads the words of boxes"):
        recipe(
            tiny,
            conditioning={"kind": "regions", "max_objects": 2},
            unet__cross_attention_dim=None,
        )
    fewer = {**HYBRID, "spatial": {"kind": "regions", "max_objects": 1}}
    with pytest.raises(ConfigError, match="data.max_objects is 2, but the conditioning has room"):
        tiny.train(recipe(tiny, conditioning=fewer, unet__in_channels=5), tmp_path / "a")
    with pytest.raises(DataError, match="the images have no boxes or no names of classes"):
        portraits = {"kind": "portraits", "concepts": ["fox", "key"], "count": 8}
        tiny.train(recipe(tiny, data=portraits), tmp_path / "b")
