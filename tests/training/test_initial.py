"""A model begins from the weights of another that is told less."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mezzotint.checkpoints.load import load_any
from mezzotint.conditioning.base import Conditioning
from mezzotint.errors import CheckpointError, ConfigError
from mezzotint.training.initial import begin_from

TEXT = {"kind": "text", "width": 32, "layers": 1, "heads": 2, "max_length": 12}
HYBRID = {"kind": "hybrid", "main": TEXT, "spatial": {"kind": "inpainting"}}


def hybrid(tiny: Any, initial: Path, **changes: Any) -> Any:
    common: dict[str, Any] = {"conditioning": HYBRID, "unet__in_channels": 9, "ema_decay": 0.0}
    return tiny.diffusion(initial=str(initial), **common | {"budget": {"max_steps": 1}} | changes)


def test_it_first_draws_as_the_other_does(tiny, text_run: Path, tmp_path: Path) -> None:
    """All weights are the other's; what is concatenated says nothing yet."""
    run = tiny.train(hybrid(tiny, text_run, optimizer__learning_rate=1e-12), tmp_path / "run")
    ours, other = load_any(run).model, load_any(text_run).model
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([10, 900])
    cond = other.conditioner.null(2)
    told = Conditioning(
        crossattn=cond.crossattn,
        crossattn_mask=cond.crossattn_mask,
        concat=torch.randn(2, 5, 8, 8),
    )
    with torch.inference_mode():
        torch.testing.assert_close(ours.predict(x, t, told), other.predict(x, t, cond))
    for key, value in other.conditioner.state_dict().items():
        torch.testing.assert_close(ours.conditioner.state_dict()[f"main.{key}"], value)


def test_coordinates_stay_behind_what_is_new(tiny, tmp_path: Path) -> None:
    told: dict[str, Any] = {"budget": {"max_steps": 1}, "unet__coordinate_channels": 8}
    base = tiny.train(tiny.diffusion(conditioning=TEXT, **told), tmp_path / "base")
    told["optimizer__learning_rate"] = 1e-12
    run = tiny.train(hybrid(tiny, base, **told), tmp_path / "run")
    ours, other = load_any(run).model, load_any(base).model
    x, t, cond = torch.randn(2, 4, 8, 8), torch.tensor([10, 900]), other.conditioner.null(2)
    more = replace(cond, concat=torch.randn(2, 5, 8, 8))
    with torch.inference_mode():
        torch.testing.assert_close(ours.predict(x, t, more), other.predict(x, t, cond))
    with pytest.raises(ConfigError, match=r"has 8 unet\.coordinate_channels, and the recipe 0"):
        tiny.train(hybrid(tiny, base), tmp_path / "other")


def test_it_learns_from_there_and_goes_on(tiny, text_run: Path, tmp_path: Path) -> None:
    """The new channels move, and a resumed run ends where one goes that was not stopped."""
    recipe = hybrid(tiny, text_run, budget={"max_steps": 4})
    whole = tiny.train(recipe, tmp_path / "whole")
    part = tiny.train(recipe, tmp_path / "part", stop_after=2)
    tiny.train(recipe, part, resume=True)
    a, b = (load_any(run).model.unet.state_dict() for run in (whole, part))
    assert a["conv_in.weight"][:, 4:].any()
    for key, value in a.items():
        assert torch.equal(value, b[key]), key


def test_captions_are_read_in_the_words_of_the_other(
    tiny, text_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fewer pictures have other captions, from which another vocabulary would be learned."""
    monkeypatch.setenv("HOME", str(text_run.parent))
    home = Path("~") / text_run.name
    fewer = hybrid(tiny, home, data__subset=None, data__names=["red-apple", "bus", "key"])
    run = tiny.train(fewer, tmp_path / "run")
    ours, theirs = ((r / "tokenizer.json").read_text() for r in (run, text_run))
    assert ours == theirs


def test_what_does_not_fit_is_named(tiny, text_run: Path, tmp_path: Path) -> None:
    wider = hybrid(tiny, text_run, unet__block_out_channels=[16, 48])
    with pytest.raises(ConfigError, match="the UNet of .* another shape than the recipe's: "):
        tiny.train(wider, tmp_path / "a")
    with pytest.raises(ConfigError, match="is told .*, in other words, classes or shape"):
        deeper = {**HYBRID, "main": {**TEXT, "layers": 2}}
        tiny.train(hybrid(tiny, text_run, conditioning=deeper), tmp_path / "b")
    with pytest.raises(CheckpointError, match="nowhere"):
        tiny.train(hybrid(tiny, Path("nowhere")), tmp_path / "c")
    other = load_any(text_run).model
    other.first_stage.decoder.conv_out.weight.data.add_(1.0)
    with pytest.raises(ConfigError, match="trained in another latent space"):
        begin_from(other, text_run)
