"""A model is trained for another task by changes of a low rank."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import mezzotint
from mezzotint.checkpoints.load import load_any
from mezzotint.checkpoints.model import save_model
from mezzotint.errors import ConfigError, RequestError, TrainingError
from mezzotint.training.low_rank import LowRank

TEXT = {"kind": "text", "width": 32, "layers": 1, "heads": 2, "max_length": 12}
HYBRID = {"kind": "hybrid", "main": TEXT, "spatial": {"kind": "inpainting"}}
RANK = 3


def changed(tiny: Any, initial: Path | None, **changes: Any) -> Any:
    common: dict[str, Any] = {
        "conditioning": HYBRID,
        "unet__in_channels": 9,
        "ema_decay": 0.5,
        "lora_rank": RANK,
        "budget": {"max_steps": 4},
        "optimizer__learning_rate": 1e-2,
    }
    told = None if initial is None else str(initial)
    return tiny.diffusion(initial=told, **common | changes)


@pytest.fixture(scope="module")
def run(tiny, text_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.train(changed(tiny, text_run), tmp_path_factory.mktemp("run") / "whole")


def test_a_change_begins_as_none_and_has_the_rank() -> None:
    weight = torch.randn(6, 4, 3, 3)
    change = LowRank(weight, 2, torch.Generator().manual_seed(0))
    again = LowRank(weight.double(), 2, torch.Generator().manual_seed(0))
    assert torch.equal(again.down, change.down.double())
    torch.testing.assert_close(change(weight), weight)
    torch.nn.init.normal_(change.up)
    assert torch.linalg.matrix_rank((change(weight) - weight).flatten(1)) == 2


def test_what_changes_is_of_low_rank_but_for_the_first_layer(run: Path, text_run: Path) -> None:
    ours, base = load_any(run).model, load_any(text_run).model
    old = base.unet.state_dict()
    moved = 0
    for name, weight in ours.unet.state_dict().items():
        if name == "conv_in.weight":
            assert weight.shape[1] == 9 and weight[:, 4:].any()
            continue
        difference = (weight - old[name]).flatten(1) if weight.ndim > 1 else weight - old[name]
        if weight.ndim < 2:
            assert name.startswith("conv_in") or not difference.any(), name
        else:
            values = torch.linalg.svdvals(difference.double())
            assert values[RANK:].sum() < 1e-5 * values[0], name
            moved += int(values[0] > 0)
    assert moved > 20
    for name, weight in base.conditioner.state_dict().items():
        assert torch.equal(ours.conditioner.state_dict()[f"main.{name}"], weight), name


def test_it_goes_on_as_if_never_stopped(tiny, run: Path, text_run: Path, tmp_path: Path) -> None:
    part = tiny.train(changed(tiny, text_run), tmp_path / "part", stop_after=2)
    tiny.train(changed(tiny, text_run), part, resume=True)
    whole, other = load_any(run).model.state_dict(), load_any(part).model.state_dict()
    for name, weight in whole.items():
        assert torch.equal(weight, other[name]), name


def test_it_does_not_go_on_from_another_model(
    tiny, run: Path, text_run: Path, tmp_path: Path
) -> None:
    """The changes are of the weights that they began from, and of no others."""
    base, model = tmp_path / "base", load_any(text_run).model
    save_model(model, base)
    part = tiny.train(changed(tiny, base), tmp_path / "part", stop_after=2)
    with torch.no_grad():
        model.unet.conv_out.weight.mul_(1.01)
    save_model(model, base)
    with pytest.raises(TrainingError, match="the base model changed"):
        tiny.train(changed(tiny, base), part, resume=True)


def test_what_does_not_go_together_is_said(tiny, text_run: Path) -> None:
    with pytest.raises(ConfigError, match="lora_rank: is of changes of another model"):
        changed(tiny, None)
    with pytest.raises(ConfigError, match=r"run\.sharding is for whole models"):
        changed(tiny, text_run, run__sharding=True)
    with pytest.raises(ConfigError, match="conditioner_learning_rate: with lora_rank"):
        changed(tiny, text_run, conditioner_learning_rate=1e-3)
    with pytest.raises(ConfigError, match="power functions are for whole models"):
        changed(tiny, text_run, ema_decay=None, ema={"kind": "power"})


def test_what_enlarges_is_told_in_words_what_it_sees(tiny, text_run: Path, tmp_path: Path) -> None:
    """A small picture by concatenation, a caption by attention: both say what is drawn."""
    told = {"kind": "hybrid", "main": TEXT, "spatial": {"kind": "low_res", "fold": 2}}
    recipe = changed(
        tiny,
        text_run,
        conditioning=told,
        unet__in_channels=16,
        degradation={"kind": "bicubic", "factor": 2},
    )
    pipeline = mezzotint.load(tiny.train(recipe, tmp_path / "run"), device="cpu")
    side = pipeline.model.image_size[0] // 2
    small = Image.new("RGB", (side, side), "red")
    assert pipeline.task == "super-resolution"
    apple, bus = (
        pipeline.generate(words, image=small, steps=2, guidance_scale=3.0)[0].image
        for words in ("a red apple", "a bus")
    )
    assert apple.size == (2 * side, 2 * side) and apple.tobytes() != bus.tobytes()
    with pytest.raises(RequestError, match="the model wants"):
        pipeline.generate(image=small)


def test_what_reads_maps_is_trained_too(tiny, text_run: Path, tmp_path: Path) -> None:
    """It is new, as the first layer is; the rest of the conditioner stays."""
    spatial = {"kind": "semantic_map", "classes": 33, "out_channels": 3, "stages": 2}
    told = {"kind": "hybrid", "main": TEXT, "spatial": spatial}
    data = {"kind": "scenes", "count": 4, "resolution": 64}
    before, after = (
        load_any(
            tiny.train(
                changed(
                    tiny,
                    text_run,
                    data=data,
                    conditioning=told,
                    unet__in_channels=7,
                    budget={"max_steps": steps},
                ),
                tmp_path / str(steps),
            )
        ).model.conditioner.state_dict()
        for steps in (1, 3)
    )
    moved = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    assert moved == {"spatial.channel_mapper.weight"}
