"""The scheduler of flows, as diffusers writes it."""

import inspect
import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
from tiny_models import build
from tiny_pipelines import CONDITIONERS, model

from mezzotint.checkpoints.flow_scheduler import FLOW_CLASS, FLOW_DEFAULTS, FLOW_INERT
from mezzotint.checkpoints.load import load_any
from mezzotint.checkpoints.loaded import SamplingDefaults
from mezzotint.checkpoints.pipelines import save_pipeline
from mezzotint.checkpoints.schedulers import FILE, read_scheduler, write_scheduler
from mezzotint.checkpoints.single_file import save_single_file
from mezzotint.diffusion.flow import FlowScheduleConfig
from mezzotint.errors import CheckpointError
from mezzotint.latent_diffusion import LatentDiffusion

EULER = SamplingDefaults(sampler="euler", spacing="linspace")


def write(folder: Path, **keys: Any) -> Path:
    path = folder / FILE
    path.write_text(json.dumps({"_class_name": FLOW_CLASS, **keys}))
    return path


def as_flow(source: LatentDiffusion) -> LatentDiffusion:
    return LatentDiffusion(
        source.first_stage,
        source.unet,
        source.conditioner,
        FlowScheduleConfig(shift=3.0),
        source.normalization,
        source.image_size,
    )


def test_the_table_is_that_of_diffusers() -> None:
    signature = inspect.signature(getattr(diffusers, FLOW_CLASS).__init__).parameters
    theirs = {name: p.default for name, p in signature.items() if name != "self"}
    assert {key: theirs[key] for key in FLOW_DEFAULTS} == FLOW_DEFAULTS
    assert set(theirs) - FLOW_INERT == set(FLOW_DEFAULTS)


def test_what_diffusers_writes_is_read(tmp_path: Path) -> None:
    getattr(diffusers, FLOW_CLASS)(shift=3.0).save_pretrained(tmp_path)
    found = read_scheduler(tmp_path / FILE)
    assert (found.schedule, found.defaults, found.notes) == (
        FlowScheduleConfig(shift=3.0),
        EULER,
        (),
    )
    assert read_scheduler(write(tmp_path)).schedule == FlowScheduleConfig()


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    schedule = FlowScheduleConfig(shift=2.5, num_train_timesteps=500)
    keys, lost = write_scheduler(schedule, EULER)
    (tmp_path / FILE).write_text(json.dumps(keys))
    assert (read_scheduler(tmp_path / FILE).schedule, lost) == (schedule, [])
    assert getattr(diffusers, FLOW_CLASS).from_pretrained(tmp_path).config.shift == 2.5


def test_what_it_cannot_hold_is_told() -> None:
    wanted = SamplingDefaults(sampler="dpmpp_2m", spacing="trailing")
    _, lost = write_scheduler(FlowScheduleConfig(), wanted)
    assert [sentence.partition(" has no ")[2] for sentence in lost] == [
        "sampler 'dpmpp_2m'; 'euler' stands",
        "spacing 'trailing'; 'linspace' stands",
    ]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"use_dynamic_shifting": True}, "use_dynamic_shifting is True, expected False"),
        ({"invert_sigmas": True}, "invert_sigmas is True, expected False"),
        ({"shift": "3"}, "shift is '3', expected a number"),
        ({"shift": 0}, "shift: .*greater than or equal to 0.01"),
        ({"shft": 3.0}, "unknown key 'shft'; did you mean 'shift'"),
    ],
)
def test_what_is_another_model_is_refused(
    tmp_path: Path, keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=f"{FLOW_CLASS} cannot be read: .*{message}"):
        read_scheduler(write(tmp_path, **keys))


@pytest.mark.parametrize("key", ["use_karras_sigmas", "use_beta_sigmas", "stochastic_sampling"])
def test_other_samplers_are_noted(tmp_path: Path, key: str) -> None:
    found = read_scheduler(write(tmp_path, **{key: True}))
    assert found.defaults == SamplingDefaults()
    [note] = found.notes
    assert note.startswith(f"its {FLOW_CLASS} has {key} True, which Mezzotint cannot do")


def test_the_original_layout_has_no_place_for_a_flow(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no place for this model's rectified flow"):
        save_single_file(as_flow(build("sd1")), tmp_path / "flow.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_flow_becomes_our_own_folder(tmp_path: Path) -> None:
    """The pipelines of diffusers call a method of the scheduler that this one has not."""
    assert not hasattr(getattr(diffusers, FLOW_CLASS), "scale_model_input")
    flow = as_flow(model(CONDITIONERS["clip"]()))
    [sentence] = save_pipeline(flow, tmp_path / "flow")
    assert "scales the network's input by its scheduler, which that of a flow cannot" in sentence
    read = load_any(tmp_path / "flow").model
    assert read.schedule_config == flow.schedule_config
    assert read.weights_hash() == flow.weights_hash()
