"""CLIP's text encoder against transformers' model, called as diffusers' pipelines call it."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from mezzotint.conditioning.base import ConditionInputs, TextOptions
from mezzotint.conditioning.clip import ClipConditioner, ClipConditionerConfig
from mezzotint.conditioning.vocabularies import clip_tokenizer

# float32 has 24 bits; four layers leave about 1e-6 of outputs around 1
TOLERANCE = 1e-5
PROMPTS = [
    "",
    "a red apple",
    "A photograph of an astronaut, riding a horse!",
    "一只猫 🐈",
    "a " * 75,
]
SHAPE = {"hidden_size": 32, "intermediate_size": 96, "num_attention_heads": 4, "projection_dim": 16}
KINDS = {
    # layers here, which of them is the last, layers there, activation, padding
    "ViT-L": (4, 1, 4, "quick_gelu", 49407),
    "OpenCLIP": (4, 1, 4, "gelu", 0),
    "OpenCLIP with the layer that is not used": (4, 2, 3, "gelu", 0),
}


def conditioner(kind: str) -> ClipConditioner:
    layers, output_layer, _, act, pad = KINDS[kind]
    config = ClipConditionerConfig(
        **SHAPE,
        num_hidden_layers=layers,
        output_layer=output_layer,
        hidden_act=act,
        pad_token_id=pad,
    )
    made = ClipConditioner(config, clip_tokenizer()).eval()
    generator = torch.Generator().manual_seed(0)
    for name, value in made.named_parameters():
        noise = torch.randn(value.shape, generator=generator)
        if value.ndim > 1:
            value.data = noise * (1.0 if "_embedding" in name else value.shape[1] ** -0.5)
        else:
            value.data = 0.1 * noise + ("norm" in name and name.endswith("weight"))
    return made


def reference(kind: str, ours: ClipConditioner, folder: Path) -> StableDiffusionPipeline:
    _, _, layers, act, pad = KINDS[kind]
    config = CLIPTextConfig(**SHAPE, num_hidden_layers=layers, hidden_act=act, pad_token_id=pad)
    model = CLIPTextModel(config).eval()
    inner = getattr(model, "text_model", model)
    # the pipelines ask for the inner model, which transformers 5 made one with the outer
    object.__setattr__(model, "text_model", inner)
    state = ours.text_model.state_dict()
    unused = [name for name in state if name.startswith(f"encoder.layers.{layers}.")]
    inner.load_state_dict({name: state[name] for name in state if name not in unused})
    pairs = json.loads(ours.tokenizer.to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(pairs["vocab"]), encoding="utf-8")
    merges = "".join(f"{first} {second}\n" for first, second in pairs["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}", encoding="utf-8")
    more = {} if pad else {"pad_token": "!"}
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=77, **more)
    absent = ("vae", "unet", "scheduler", "safety_checker", "feature_extractor")
    return StableDiffusionPipeline(
        **dict.fromkeys(absent),
        text_encoder=model,
        tokenizer=tokenizer,
        requires_safety_checker=False,
    )


def encoded(pipeline: StableDiffusionPipeline, prompts: list[str], skip: int | None) -> Tensor:
    with torch.no_grad():
        found, _ = pipeline.encode_prompt(
            prompts, torch.device("cpu"), 1, do_classifier_free_guidance=False, clip_skip=skip
        )
    return found


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_hidden_states(kind: str, tmp_path: Path) -> None:
    ours = conditioner(kind)
    pipeline = reference(kind, ours, tmp_path)
    # a ! that is typed is to their tokenizer what it pads with, to the vocabulary alone a word
    prompts = PROMPTS if KINDS[kind][-1] else [text.replace("!", "") for text in PROMPTS]
    inputs = ConditionInputs(count=len(prompts), captions=prompts)
    seen: list[Tensor] = []
    for clip_skip in range(1, KINDS[kind][2] + 1):
        # what is their 1 skips one layer, which is our second from the end
        expected = encoded(pipeline, prompts, None if clip_skip == 1 else clip_skip - 1)
        text = TextOptions(clip_skip=clip_skip)
        found = ours(ConditionInputs(count=len(prompts), captions=prompts, text=text))
        assert found.crossattn_mask is None
        assert expected.shape == (len(prompts), 77, 32) and expected.std() > 0.5
        assert (found.crossattn - expected).abs().max() <= TOLERANCE
        assert all((found.crossattn - other).abs().max() > 0.1 for other in seen)
        seen.append(found.crossattn)
    null = encoded(pipeline, [""], None)
    assert (ours.null(3).crossattn - null).abs().max() <= TOLERANCE
    assert (ours(inputs, torch.ones(5, dtype=torch.bool)).crossattn - null).abs().max() <= TOLERANCE


@torch.no_grad()
def test_long_prompts_are_chunks_of_their_own(tmp_path: Path) -> None:
    """Each 75 tokens as the reference reads them alone."""
    ours = conditioner("ViT-L")
    pipeline = reference("ViT-L", ours, tmp_path)
    words = [f"word{number % 7}" for number in range(60)]  # of two tokens: a word and its digit
    parts = ["", *(" ".join(words[k : k + 5]) for k in range(0, 60, 5))]
    prompt = " BREAK ".join(parts)
    found = ours(ConditionInputs(count=1, captions=[prompt])).crossattn
    expected = encoded(pipeline, parts, None).flatten(0, 1)
    assert found.shape == (1, 77 * 13, 32)
    assert (found[0] - expected).abs().max() <= TOLERANCE
    cut = ours(ConditionInputs(count=1, captions=["cat " * 160])).crossattn
    expected = encoded(pipeline, ["cat " * 75, "cat " * 75, "cat " * 10], None).flatten(0, 1)
    assert (cut[0] - expected).abs().max() <= TOLERANCE


def test_names_and_shapes_of_the_published_models() -> None:
    """At full size, without the memory."""
    for config in (
        ClipConditionerConfig(),
        ClipConditionerConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=23,
            num_attention_heads=16,
            hidden_act="gelu",
            pad_token_id=0,
        ),
    ):
        with torch.device("meta"):
            ours = ClipConditioner(config, clip_tokenizer())
        shapes = {name: tuple(value.shape) for name, value in ours.state_dict().items()}
        width, inner = config.hidden_size, config.intermediate_size
        expected = {
            "embeddings.token_embedding.weight": (49408, width),
            "embeddings.position_embedding.weight": (77, width),
            "final_layer_norm.weight": (width,),
            "final_layer_norm.bias": (width,),
        }
        for layer in range(config.num_hidden_layers):
            parts = {f"self_attn.{x}_proj": (width, width) for x in ("q", "k", "v", "out")}
            parts |= {"mlp.fc1": (inner, width), "mlp.fc2": (width, inner)}
            parts |= {"layer_norm1": (width,), "layer_norm2": (width,)}
            for name, shape in parts.items():
                expected[f"encoder.layers.{layer}.{name}.weight"] = shape
                expected[f"encoder.layers.{layer}.{name}.bias"] = shape[:1]
        assert shapes == {f"text_model.{name}": shape for name, shape in expected.items()}
