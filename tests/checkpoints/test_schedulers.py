import ast
import importlib.util
import json
import logging
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from mezzotint.checkpoints.loaded import SamplingDefaults
from mezzotint.checkpoints.schedulers import (
    CLASSES,
    FILE,
    INERT,
    read_scheduler,
    write_scheduler,
)
from mezzotint.diffusion.names import DIFFUSERS
from mezzotint.diffusion.samplers import SAMPLERS
from mezzotint.diffusion.schedule import NoiseSchedule, ScheduleConfig, Spacing
from mezzotint.errors import CheckpointError

# numpy says so of a torch tensor that diffusers gives to np.array
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
]

# as the public folders have them
STABLE = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
UNCONDITIONAL = {
    "_class_name": "DDIMScheduler",
    "_diffusers_version": "0.0.4",
    "beta_end": 0.0195,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.0015,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "timestep_values": None,
    "tensor_format": "pt",
    "trained_betas": None,
}
SDE = {"algorithm_type": "sde-dpmsolver++"}


def write(folder: Path, keys: dict[str, Any]) -> Path:
    path = folder / FILE
    path.write_text(json.dumps(keys))
    return path


def keys_of(name: str, **more: Any) -> dict[str, Any]:
    """What diffusers writes for a class, with no latents clipped and Runge-Kutta steps skipped."""
    keys = {"_class_name": name, **CLASSES[name]}
    keys |= {"clip_sample": False} if "clip_sample" in keys else {}
    keys |= {"skip_prk_steps": True} if "skip_prk_steps" in keys else {}
    return keys | more


def signature(name: str) -> dict[str, Any]:
    """The arguments of a scheduler and their defaults, from its source.

    One cannot be imported without another package, so that none is.
    """
    modules = {"DPMSolverSDE": "dpmsolver_sde", "KDPM2Discrete": "k_dpm_2_discrete"}
    modules["KDPM2AncestralDiscrete"] = "k_dpm_2_ancestral_discrete"
    stem = name.removesuffix("Scheduler")
    if stem in modules:
        module = f"diffusers.schedulers.scheduling_{modules[stem]}"
    else:
        module = getattr(diffusers, name).__module__
    found = importlib.util.find_spec(module)
    assert found is not None and found.origin is not None
    tree = ast.parse(Path(found.origin).read_text())
    [kind] = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name]
    [init] = [n for n in kind.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
    names = [argument.arg for argument in init.args.args[1:]]
    values = [
        float("-inf") if "inf" in ast.unparse(value) else ast.literal_eval(value)
        for value in init.args.defaults
    ]
    return dict(zip(names, values, strict=True))


@pytest.mark.parametrize("name", CLASSES)
def test_the_table_is_that_of_diffusers(name: str) -> None:
    theirs = signature(name)
    assert {key: theirs[key] for key in CLASSES[name]} == CLASSES[name]
    assert set(theirs) - INERT == set(CLASSES[name])


def test_the_table_has_every_class_that_has_a_name() -> None:
    assert set(CLASSES) == set(DIFFUSERS)


@pytest.mark.parametrize("name", CLASSES)
def test_what_is_absent_is_the_default_of_the_class(tmp_path: Path, name: str) -> None:
    neutral = {"clip_sample": False, "skip_prk_steps": True}
    short = read_scheduler(write(tmp_path, {"_class_name": name, **neutral}))
    whole = read_scheduler(write(tmp_path, keys_of(name)))
    assert short == whole
    assert whole.defaults.sampler == DIFFUSERS[name]
    assert whole.notes == ()


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("zero", [False, True])
def test_the_noise_is_that_of_diffusers(tmp_path: Path, schedule: str, zero: bool) -> None:
    keys = {"beta_schedule": schedule, "rescale_betas_zero_snr": zero, "clip_sample": False}
    theirs = diffusers.DDIMScheduler(
        **keys, beta_start=0.0015, beta_end=0.0195, prediction_type="v_prediction"
    )
    theirs.save_pretrained(tmp_path)
    found = read_scheduler(tmp_path / FILE)
    ours = NoiseSchedule(found.schedule).alphas_cumprod
    # theirs is summed in float32; the last times of a zero-SNR schedule are ours alone
    assert torch.allclose(ours[:-3], theirs.alphas_cumprod[:-3].double(), rtol=1e-3, atol=1e-7)
    assert found.schedule.prediction_type == "v_prediction"
    assert found.schedule.zero_terminal_snr == zero


def test_public_folders(tmp_path: Path) -> None:
    stable = read_scheduler(write(tmp_path, STABLE), standard=True)
    assert stable.defaults == SamplingDefaults(sampler="plms", spacing="leading")
    assert stable.schedule == ScheduleConfig(steps_offset=1, set_alpha_to_one=False)
    unconditional = read_scheduler(write(tmp_path, UNCONDITIONAL))
    assert unconditional.defaults == SamplingDefaults(sampler="ddim", spacing="leading")
    assert unconditional.schedule == ScheduleConfig(beta_start=0.0015, beta_end=0.0195)
    assert stable.notes == unconditional.notes == ()


@pytest.mark.parametrize(
    ("name", "more", "sampler", "spacing"),
    [
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True}, "euler", "karras"),
        ("LMSDiscreteScheduler", {"use_exponential_sigmas": True}, "lms", "exponential"),
        ("DPMSolverMultistepScheduler", SDE, "dpmpp_2m_sde", "linspace"),
        ("UniPCMultistepScheduler", {"timestep_spacing": "trailing"}, "unipc", "trailing"),
        ("EulerAncestralDiscreteScheduler", {}, "euler_ancestral", "linspace"),
        ("LCMScheduler", {}, "lcm", None),
    ],
)
def test_how_it_is_sampled(
    tmp_path: Path, name: str, more: dict[str, Any], sampler: str, spacing: Spacing | None
) -> None:
    found = read_scheduler(write(tmp_path, keys_of(name, **more)))
    assert found.defaults == SamplingDefaults(sampler=sampler, spacing=spacing)
    assert found.notes == ()


def test_a_class_that_the_pipeline_names_comes_before_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, STABLE)
    assert read_scheduler(path, "DDIMScheduler").defaults.sampler == "ddim"
    # the keys of another class are not its own; but where sampling ends, others may ask
    found = read_scheduler(path, "EulerDiscreteScheduler")
    assert found.defaults == SamplingDefaults(sampler="euler", spacing="linspace")
    assert not found.schedule.set_alpha_to_one


def test_values_that_stand_for_defaults_are_those_of_the_class(tmp_path: Path) -> None:
    keys = STABLE | {"timestep_spacing": "linspace", "_use_default_values": ["timestep_spacing"]}
    assert read_scheduler(write(tmp_path, keys)).defaults.spacing == "leading"


def test_stable_diffusion_pipelines_repair_their_scheduler(tmp_path: Path) -> None:
    path = write(tmp_path, {"_class_name": "DDIMScheduler", "steps_offset": 0})
    assert read_scheduler(path, standard=True).schedule.steps_offset == 1
    message = "clip_sample is True, the default of DDIMScheduler, expected False"
    with pytest.raises(CheckpointError, match=message):
        read_scheduler(path)


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("DPMSolverMultistepScheduler", {"solver_order": 3}),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "deis"}),
        ("DPMSolverMultistepScheduler", {"lambda_min_clipped": -5.1}),
        ("EulerDiscreteScheduler", {"use_beta_sigmas": True}),
        ("UniPCMultistepScheduler", {"final_sigmas_type": "sigma_min"}),
        ("PNDMScheduler", {"skip_prk_steps": False}),
        ("DDPMScheduler", {"variance_type": "fixed_large"}),
        ("LCMScheduler", {"original_inference_steps": 100}),
    ],
)
def test_other_samplers_are_noted(tmp_path: Path, name: str, more: dict[str, Any]) -> None:
    found = read_scheduler(write(tmp_path, keys_of(name, **more)))
    assert found.defaults == SamplingDefaults()
    [note] = found.notes
    [(key, value)] = more.items()
    assert note.startswith(f"its {name} has {key} {value!r}, which Mezzotint cannot do")


def test_curves_over_part_of_the_schedule_are_noted(tmp_path: Path) -> None:
    keys = keys_of("EulerDiscreteScheduler", use_karras_sigmas=True, timestep_spacing="leading")
    found = read_scheduler(write(tmp_path, keys))
    assert found.defaults.spacing == "karras"
    assert found.notes == ("its karras noise levels are laid over the whole schedule, not leading",)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"_class_name": "DDIMSchedular"}, "unknown scheduler 'DDIMSchedular'; did you mean"),
        ({"beta_schedule": "sigmoid"}, "unknown beta_schedule 'sigmoid'; Choose from: linear"),
        ({"trained_betas": [0.1]}, r"trained_betas is \[0.1\], expected None"),
        ({"thresholding": True}, "thresholding is True, expected False"),
        ({"prediction_typ": "sample"}, "'prediction_typ'; did you mean 'prediction_type'"),
        ({"prediction_type": "flow_prediction"}, "prediction_type: .*got 'flow_prediction'"),
        ({"rescale_betas_zero_snr": True}, "zero_terminal_snr cannot go with .* 'epsilon'"),
        ({"num_train_timesteps": 1}, "num_train_timesteps: .* greater than or equal to 2"),
    ],
)
def test_other_noise_is_refused(tmp_path: Path, more: dict[str, Any], message: str) -> None:
    path = write(tmp_path, keys_of("DDIMScheduler") | more)
    with pytest.raises(CheckpointError, match=message) as failed:
        read_scheduler(path)
    assert str(failed.value).startswith(str(path))


@pytest.mark.parametrize("content", ["", "[]", "{", '"text"', "[" * 100_000])
def test_a_damaged_file_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / FILE).write_text(content)
    with pytest.raises(CheckpointError, match=FILE):
        read_scheduler(tmp_path / FILE)


SPACED = [
    SamplingDefaults(sampler=sampler, spacing=spacing)
    for sampler in SAMPLERS
    for spacing in ("leading", "trailing", "linspace", "karras", "exponential")
]


def holds(defaults: SamplingDefaults) -> bool:
    sampler = (defaults.sampler or "ddim").replace("dpmpp_2m_sde", "dpmpp_2m")
    [name] = [theirs for theirs, ours in DIFFUSERS.items() if ours == sampler]
    curve = defaults.spacing in ("karras", "exponential")
    return not curve or f"use_{defaults.spacing}_sigmas" in CLASSES[name]


@pytest.mark.parametrize("defaults", SPACED, ids=lambda d: f"{d.sampler}-{d.spacing}")
def test_what_is_written_is_read_back(tmp_path: Path, defaults: SamplingDefaults) -> None:
    schedule = ScheduleConfig(
        beta_schedule="linear",
        beta_end=0.02,
        num_train_timesteps=500,
        prediction_type="v_prediction",
        steps_offset=1,
        set_alpha_to_one=False,
    )
    keys, lost = write_scheduler(schedule, defaults)
    found = read_scheduler(write(tmp_path, keys))
    assert found.schedule == schedule
    assert found.notes == ()
    if not holds(defaults):
        [sentence] = lost
        assert f"has no spacing {defaults.spacing!r}; 'trailing' stands" in sentence
    elif defaults.sampler == "lcm":
        assert (found.defaults.sampler, lost) == ("lcm", [])
    else:
        assert (found.defaults, lost) == (defaults, [])


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("sampler", sorted(set(SAMPLERS) - {"dpmpp_sde"}))  # needs torchsde
def test_diffusers_reads_what_is_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, sampler: str, zero: bool
) -> None:
    schedule = ScheduleConfig(prediction_type="v_prediction", zero_terminal_snr=zero)
    keys, _ = write_scheduler(schedule, SamplingDefaults(sampler=sampler))
    write(tmp_path, keys)
    logger = logging.getLogger("diffusers")
    logger.addHandler(caplog.handler)
    try:
        theirs = getattr(diffusers, keys["_class_name"]).from_pretrained(tmp_path)
    finally:
        logger.removeHandler(caplog.handler)
    assert not caplog.records, caplog.text
    assert theirs.config.prediction_type == "v_prediction"
    assert theirs.config.timestep_spacing == "trailing"
    levels = ((1 - theirs.alphas_cumprod) / theirs.alphas_cumprod).sqrt()
    ours = NoiseSchedule(schedule).sigmas
    assert torch.allclose(levels[1:-1].double(), ours[1:-1], rtol=1e-3)
    assert (levels[-1] > 1000) == zero == (ours[-1] > 1000)


def test_what_is_said_of_nothing_is_our_own_default(tmp_path: Path) -> None:
    keys, lost = write_scheduler(ScheduleConfig())
    found = read_scheduler(write(tmp_path, keys))
    assert found.defaults == SamplingDefaults(sampler="ddim", spacing="trailing")
    assert lost == []


def test_what_cannot_be_written_is_told() -> None:
    zero = ScheduleConfig(prediction_type="v_prediction", zero_terminal_snr=True)
    keys, [sentence] = write_scheduler(zero, SamplingDefaults(sampler="plms"))
    assert keys["_class_name"] == "DDIMScheduler"
    assert "PNDMScheduler cannot end in noise alone; a DDIMScheduler" in sentence
    keys, [sentence] = write_scheduler(
        ScheduleConfig(), SamplingDefaults(sampler="euler"), scaled=False
    )
    assert keys["_class_name"] == "DDIMScheduler"
    assert "EulerDiscreteScheduler cannot be used by this pipeline" in sentence
    keys, [sentence] = write_scheduler(ScheduleConfig(), standard=True)
    assert keys["steps_offset"] == 1
    assert "steps_offset is written as 1, not 0" in sentence
    _, [sentence] = write_scheduler(
        ScheduleConfig(), SamplingDefaults(sampler="euler", spacing="sgm_uniform")
    )
    assert "no spacing 'sgm_uniform'" in sentence
