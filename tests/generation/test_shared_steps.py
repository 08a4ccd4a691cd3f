"""What steps share changes nothing, or little and as asked; nothing goes to another picture."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from mezzotint.conditioning.base import Conditioning
from mezzotint.diffusion.samplers import SAMPLERS
from mezzotint.errors import RequestError
from mezzotint.generation.generate import generate_each
from mezzotint.generation.guides import Guide
from mezzotint.generation.metadata import read_request, write_image
from mezzotint.generation.pipeline import Pipeline, load
from mezzotint.generation.replay import replay
from mezzotint.generation.request import AdapterUse, FeatureReuse, HighRes
from mezzotint.generation.sampling import sample_latents
from mezzotint.models.sampling_memory import DeepFeatures, SamplingMemory
from mezzotint.models.unet import UNet, UNetConfig

COMMON: dict[str, Any] = {"prompt": "a red apple", "steps": 4, "seed": 3}
EVERY_SECOND = FeatureReuse(interval=2)


@pytest.fixture(scope="module")
def pipeline(text_run: Path) -> Pipeline:
    return load(text_run, precision="float32")


@pytest.fixture
def batches(pipeline: Pipeline):
    """How many samples each call of the network has, and each that computes deep features."""
    calls: list[int] = []
    deep: list[int] = []
    unet = pipeline.model.unet
    handles = [
        unet.conv_in.register_forward_hook(lambda _, inputs, __: calls.append(len(inputs[0]))),
        unet.mid_block.register_forward_hook(lambda _, inputs, __: deep.append(len(inputs[0]))),
    ]
    yield calls, deep
    for handle in handles:
        handle.remove()


def latents(pipeline: Pipeline, **fields: Any) -> Tensor:
    request = pipeline.request(**{**COMMON, **fields})
    seeds = [request.seed + k for k in range(request.num_images)]
    rows = [request.model_copy(update={"seed": seed, "num_images": 1}) for seed in seeds]
    return sample_latents(pipeline, rows)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def picture() -> Image.Image:
    return Image.effect_noise((32, 32), 60).convert("RGB")


def mask() -> Image.Image:
    mask = Image.new("L", (32, 32))
    mask.paste(255, (8, 8, 24, 24))
    return mask


def forgetting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every call compute its keys and values."""
    monkeypatch.setattr(SamplingMemory, "context", lambda _, tokens: tokens)


# what is exact


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"guidance_scale": 1.0},
        {"sampler": "heun", "num_images": 3},
        {"sampler": "plms", "negative_prompt": "a very long caption about a blue car"},
        {"guidance_interval": (0.5, 5.0), "guidance_rescale": 0.5},
        {"width": 160, "height": 96, "tiled_sampling": True},
        {"guides": [{"kind": "colour", "colour": "#ff8800"}]},
    ],
)
def test_keys_and_values_are_the_same_once_as_at_every_step(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any]
) -> None:
    kept = latents(pipeline, **fields)
    forgetting(monkeypatch)
    assert torch.equal(latents(pipeline, **fields), kept)


def test_they_and_the_condition_are_computed_once_for_all_steps(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    unet, conditioner = pipeline.model.unet, pipeline.model.conditioner
    layers = [m for name, m in unet.named_modules() if name.endswith(("attn2.to_k", "attn2.to_v"))]
    projected: list[int] = []
    asked: list[int] = []
    handles = [
        m.register_forward_hook(lambda _, inputs, __: projected.append(len(inputs[0])))
        for m in layers
    ]
    handles.append(conditioner.register_forward_hook(lambda *_: asked.append(1)))
    joined: list[int] = []
    cat = Conditioning.cat

    def counted(self: Conditioning, *others: Conditioning) -> Conditioning:
        joined.append(1)
        return cat(self, *others)

    monkeypatch.setattr(Conditioning, "cat", counted)
    latents(pipeline, steps=6, num_images=2)
    for handle in handles:
        handle.remove()
    assert projected == [4] * len(layers)  # both halves at once
    assert len(asked) == 2  # the prompt, and the null
    assert len(joined) <= 3  # the halves; captions of one batch


def test_guidance_is_skipped_outside_its_interval(
    pipeline: Pipeline, batches: tuple[list[int], list[int]]
) -> None:
    calls, _ = batches
    levels = SAMPLERS["euler"].sigmas(pipeline.model.schedule, 6).tolist()
    interval = levels[4], levels[2]  # the lower end is outside, the upper inside
    latents(pipeline, steps=6, sampler="euler", num_images=3, guidance_interval=interval)
    assert calls == [3, 3, 6, 6, 3, 3]


def lora(pipeline: Pipeline, path: Path) -> AdapterUse:
    """A LoRA file that changes keys and values of every cross-attention."""
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for name, module in pipeline.model.unet.named_modules():
        if name.endswith(("attn2.to_k", "attn2.to_v")):
            layer = "lora_unet_" + name.replace(".", "_")
            width, context = module.weight.shape
            tensors[f"{layer}.lora_down.weight"] = torch.randn(2, context, generator=generator)
            tensors[f"{layer}.lora_up.weight"] = torch.randn(width, 2, generator=generator)
            tensors[f"{layer}.alpha"] = torch.tensor(2.0)
    save_file(tensors, path)
    return AdapterUse(name=str(path))


def test_adapters_act_and_leave_no_keys_behind(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use = lora(pipeline, tmp_path / "ink.safetensors")

    def run() -> list[Tensor]:
        plain = latents(pipeline)
        with pipeline.adapted([use]):
            adapted = latents(pipeline)
        with pipeline.adapted([use.model_copy(update={"weight": 0.5})]):
            half = latents(pipeline)
        return [plain, adapted, half, latents(pipeline)]

    kept = run()
    assert torch.equal(kept[0], kept[3])
    assert not torch.equal(kept[0], kept[1]) and not torch.equal(kept[1], kept[2])
    forgetting(monkeypatch)
    assert all(torch.equal(a, b) for a, b in zip(kept, run(), strict=True))


# what is approximate


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_interval_one_and_ratio_zero_are_the_plain_picture(
    pipeline: Pipeline, sampler: str
) -> None:
    plain = pipeline.generate(**COMMON, sampler=sampler, num_images=2)
    same = pipeline.generate(
        **COMMON,
        sampler=sampler,
        num_images=2,
        feature_reuse=FeatureReuse(interval=1),
        token_merging=0.0,
    )
    assert [a.image.tobytes() for a in plain] == [b.image.tobytes() for b in same]


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_deep_features_are_computed_in_every_second_step(
    pipeline: Pipeline, batches: tuple[list[int], list[int]], sampler: str
) -> None:
    """By every call that the sampler makes in that step, and by none in between."""
    calls, deep = batches
    made: list[int] = []  # calls up to the end of each step
    rows = [pipeline.request(**COMMON, sampler=sampler, feature_reuse=EVERY_SECOND)] * 2
    sample_latents(pipeline, rows, callback=lambda *_: made.append(len(calls)))
    in_step = np.diff([0, *made])
    assert in_step[0] == {"plms": 2}.get(sampler, SAMPLERS[sampler].calls_per_step)
    assert calls == [4] * made[-1]
    assert deep == [4] * sum(in_step[::2])


def test_features_are_not_taken_across_the_ends_of_guidance(
    pipeline: Pipeline, batches: tuple[list[int], list[int]]
) -> None:
    calls, deep = batches
    levels = SAMPLERS["euler"].sigmas(pipeline.model.schedule, 8).tolist()
    interval = levels[5], levels[2]
    latents(
        pipeline,
        steps=8,
        sampler="euler",
        guidance_interval=interval,
        feature_reuse=FeatureReuse(interval=4),
    )
    assert calls == [1, 1, 2, 2, 2, 1, 1, 1]
    # at 0 and 4 because of the interval, at 2 and 5 because the batch is another
    assert deep == [1, 2, 2, 1]


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m", "euler_ancestral", "heun", "dpm2"])
def test_features_of_the_step_before_are_nearer_than_those_of_the_first(
    pipeline: Pipeline, sampler: str
) -> None:
    fields: dict[str, Any] = {"sampler": sampler, "steps": 10, "num_images": 4}
    plain = latents(pipeline, **fields)

    def error(interval: int) -> float:
        reuse = FeatureReuse(interval=interval)
        return float((latents(pipeline, **fields, feature_reuse=reuse) - plain).norm())

    assert 0 < error(2) < 0.7 * error(10)
    # a network of four training steps says little; what it says changes by less than 1 %
    assert error(2) < 0.01 * float(plain.norm())


def test_pictures_stay_near(pipeline: Pipeline) -> None:
    plain = pipeline.generate(**COMMON, num_images=4)
    other = pipeline.generate(**{**COMMON, "seed": 50}, num_images=4)
    for fields in ({"feature_reuse": EVERY_SECOND}, {"token_merging": 0.5}):
        near = pipeline.generate(**COMMON, num_images=4, **fields)
        for a, b, c in zip(plain, near, other, strict=True):
            error = abs(pixels(a.image) - pixels(b.image)).mean()
            assert error < 0.01 * abs(pixels(a.image) - pixels(c.image)).mean()
            assert error < 0.5  # of 255


APPROXIMATIONS: list[dict[str, Any]] = [
    {"feature_reuse": EVERY_SECOND},
    {"token_merging": 0.5},
    {"feature_reuse": FeatureReuse(interval=3, blocks=2), "token_merging": 0.25},
]


@pytest.mark.parametrize("fields", APPROXIMATIONS)
def test_a_picture_does_not_depend_on_its_neighbours(
    pipeline: Pipeline, fields: dict[str, Any]
) -> None:
    batch = pipeline.generate(**COMMON, **fields, num_images=5, batch_size=5)
    halves = pipeline.generate(**COMMON, **fields, num_images=5, batch_size=2)
    for k in (0, 2, 4):
        alone = pipeline.generate(**{**COMMON, "seed": 3 + k}, **fields)[0]
        for other in (batch[k], halves[k]):
            assert abs(pixels(other.image) - pixels(alone.image)).max() <= 1


@pytest.mark.parametrize("fields", APPROXIMATIONS)
def test_nothing_goes_from_one_request_to_the_next(
    pipeline: Pipeline, fields: dict[str, Any]
) -> None:
    plain = latents(pipeline)
    first = latents(pipeline, **fields)
    latents(pipeline, prompt="a rocket", seed=9, **fields)
    latents(pipeline, prompt="a rocket", num_images=3, width=64, **fields)
    assert torch.equal(latents(pipeline, **fields), first)
    assert torch.equal(latents(pipeline), plain)
    prompts = ["a red apple", "a very long caption about a blue car", ""]
    requests = [pipeline.request(**{**COMMON, "prompt": p}, **fields) for p in prompts]
    drawn = generate_each(pipeline, requests)
    assert abs(pixels(drawn[0].image) - pixels(drawn[1].image)).max() > 0
    alone = generate_each(pipeline, requests[:1])[0]
    assert abs(pixels(drawn[0].image) - pixels(alone.image)).max() <= 1


@pytest.mark.parametrize("stops", [False, True])
def test_nothing_is_left_behind(pipeline: Pipeline, stops: bool) -> None:
    plain = latents(pipeline)

    def stop(*_: int) -> None:
        if stops:
            raise KeyboardInterrupt

    def run() -> None:
        fields = APPROXIMATIONS[2]
        pipeline.generate(**COMMON, **fields, num_images=2, on_progress=stop)

    if stops:
        with pytest.raises(KeyboardInterrupt):
            run()
    else:
        run()
    gc.collect()
    left = [o for o in gc.get_objects() if type(o) in (DeepFeatures, SamplingMemory)]
    assert left == []
    merging = [getattr(m, "merging", None) for m in pipeline.model.unet.modules()]
    assert set(merging) == {None}
    assert torch.equal(latents(pipeline), plain)


@pytest.mark.parametrize(
    "task",
    [
        lambda: {"image": picture(), "strength": 0.75},
        lambda: {"image": picture(), "mask": mask()},
        lambda: {"image": picture(), "padding": (8, 0, 4, 0)},
        lambda: {"high_res": HighRes(scale=1.5, strength=0.5)},
        lambda: {"variation_seed": 5, "variation_strength": 0.3},
        lambda: {"tiling": True},
    ],
)
def test_every_task_draws_so(pipeline: Pipeline, task: Callable[[], dict[str, Any]]) -> None:
    given = task()
    plain = pipeline.generate(**COMMON, **given, num_images=2)
    for fields in APPROXIMATIONS:
        near = pipeline.generate(**COMMON, **given, **fields, num_images=2)
        again = pipeline.generate(**COMMON, **given, **fields, num_images=2)
        for a, b, c in zip(plain, near, again, strict=True):
            assert b.image.tobytes() == c.image.tobytes()
            assert a.image.size == b.image.size
            assert abs(pixels(a.image) - pixels(b.image)).mean() < 0.5


def test_tiles_and_guides_go_with_merged_tokens(pipeline: Pipeline) -> None:
    fields: dict[str, Any] = {"width": 160, "tiled_sampling": True, "token_merging": 0.5}
    assert torch.equal(latents(pipeline, **fields), latents(pipeline, **fields))
    guide = Guide(kind="colour", colour="#ff8800")
    drawn = pipeline.generate(**COMMON, guide=guide, token_merging=0.5)[0]
    plain = pipeline.generate(**COMMON, guide=guide)[0]
    assert abs(pixels(drawn.image) - pixels(plain.image)).mean() < 1


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_it_is_recorded_and_drawn_again_bit_for_bit(
    text_run: Path, tmp_path: Path, precision: str
) -> None:
    pipeline = load(text_run, precision=precision)
    fields = APPROXIMATIONS[2]
    drawn = pipeline.generate(**COMMON, **fields, num_images=3, batch_size=2, sampler="ddpm")
    for item in drawn:
        path = tmp_path / "picture.png"
        write_image(item.image, item.request, path)
        request = read_request(path)
        assert request.feature_reuse == FeatureReuse(interval=3, blocks=2)
        assert request.token_merging == 0.25
        assert replay(path).image.tobytes() == item.image.tobytes()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"feature_reuse": {"interval": 0}}, r"feature_reuse\.interval: Input should be greater"),
        ({"feature_reuse": {"interval": 2, "blocks": 0}}, r"feature_reuse\.blocks: Input should"),
        (
            {"feature_reuse": {"interval": 2, "blocks": 4}},
            "blocks is 4, but the way down has 3 outputs",
        ),
        ({"feature_reuse": {"blocks": 2}}, r"feature_reuse\.interval: required"),
        ({"token_merging": 0.8}, "token_merging: Input should be less than or equal to 0.75"),
        ({"token_merging": -0.1}, "token_merging: Input should be greater"),
        ({"feature_reuse": EVERY_SECOND, "tiled_sampling": True}, "features are of one tile"),
        (
            {"feature_reuse": EVERY_SECOND, "guides": [{"kind": "colour", "colour": "#ff8800"}]},
            "guides are taken back through the whole network",
        ),
    ],
)
def test_what_cannot_be_is_told(pipeline: Pipeline, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        pipeline.request(**COMMON, **fields)


def test_a_model_without_attention_at_any_level_has_nothing_to_merge(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = pipeline.model.unet.config.to_dict() | {"attention_levels": [False, False]}
    modules = pipeline.model._modules
    monkeypatch.setitem(modules, "unet", UNet(UNetConfig.from_dict(config)))
    with pytest.raises(RequestError, match="none but in the middle"):
        pipeline.request(**COMMON, token_merging=0.5)
    pipeline.request(**COMMON, token_merging=0.0)


def test_what_goes_with_neither_is_drawn_at_interval_one(pipeline: Pipeline) -> None:
    fields = {"tiled_sampling": True, "width": 160}
    same = latents(pipeline, feature_reuse={"interval": 1}, **fields)
    assert torch.equal(same, latents(pipeline, **fields))
