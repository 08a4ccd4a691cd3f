"""The YAML files of the original code, read through a closed table of targets.

A ``target:`` names a class to import there; here it is looked up, and nothing is imported. What a
file says becomes fields of our configurations, which `mezzotint.checkpoints.recognition` completes
by what the shapes of the tensors tell.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mezzotint.checkpoints.compvis import HeadOrder
from mezzotint.checkpoints.compvis_text import ConditionerKind
from mezzotint.checkpoints.yaml_section import Section, load_yaml
from mezzotint.errors import CheckpointError, ConfigError, short

__all__ = [
    "BETA_SCHEDULES",
    "OWN",
    "PARAMETERIZATIONS",
    "CompvisConfig",
    "parse_compvis_config",
    "read_compvis_config",
]

OWN = "mezzotint"  # the key under which we write what the original code has no key for

# by the names of the original code, whose "linear" is linear in the square root
BETA_SCHEDULES = {"linear": "scaled_linear", "sqrt_linear": "linear", "cosine": "cosine"}
PARAMETERIZATIONS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}

_DDPM = "ldm.models.diffusion.ddpm"
_ENCODERS = "ldm.modules.encoders.modules"
_AUTOENCODERS = "ldm.models.autoencoder"
_MODELS = {f"{_DDPM}.LatentDiffusion": False, f"{_DDPM}.LatentInpaintDiffusion": True}
_UNETS = {"ldm.modules.diffusionmodules.openaimodel.UNetModel": None}
_FIRST_STAGES = {
    f"{_AUTOENCODERS}.AutoencoderKL": "kl",
    f"{_AUTOENCODERS}.VQModel": "vq",
    f"{_AUTOENCODERS}.VQModelInterface": "vq",
    f"{_AUTOENCODERS}.IdentityFirstStage": "identity",
}
_CONDITIONERS: Mapping[str, ConditionerKind | None] = {
    f"{_ENCODERS}.FrozenCLIPEmbedder": "clip",
    f"{_ENCODERS}.FrozenOpenCLIPEmbedder": "open_clip",
    f"{_ENCODERS}.BERTEmbedder": "bert",
    f"{_ENCODERS}.ClassEmbedder": "class",
    f"{_ENCODERS}.SpatialRescaler": "semantic_map",
    "torch.nn.Identity": "low_res",
    "__is_first_stage__": "inpainting",
    "__is_unconditional__": None,
}
_SPATIAL = ("semantic_map", "low_res", "inpainting")
# what says how it was trained, or is said again elsewhere
_TRAINING = (
    "num_timesteps_cond log_every_t first_stage_key cond_stage_key cond_stage_trainable monitor"
    " use_ema loss_type scheduler_config ckpt_path ignore_keys load_only_unet cond_stage_forward"
    " l_simple_weight original_elbo_weight v_posterior learn_logvar logvar_init clip_denoised"
    " finetune_keys masked_image_key unfreeze_model model_lr ucg_training reset_ema"
    " reset_num_ema_updates make_it_fit conditioning_key_drop channels embedding_reg_weight"
    " reg_weight"
)


@dataclass(frozen=True, kw_only=True)
class CompvisConfig:
    """What a YAML file says of a model.

    Attributes:
        path: The file.
        unet: Fields of its `UNetConfig`.
        head_order: Of fused projections.
        first_stage: Fields of its configuration, ``kind`` among them.
        main: What is attended to.
        main_fields: Fields of its configuration.
        spatial: What is concatenated.
        spatial_fields: Fields of its configuration.
        schedule: Fields of its `ScheduleConfig`.
        tells_prediction: Whether it says what the UNet predicts; where it does not, the original
            code takes it for the noise.
        scale_factor: Of the latents; None if it must lie among the tensors.
        latent_size: Height and width of the latents.
        own: What Mezzotint wrote beside it, as `mezzotint.checkpoints.recognition.Sketch` has it.
        notes: Sentences on what was left out of it.
    """

    path: Path
    unet: dict[str, Any]
    head_order: HeadOrder
    first_stage: dict[str, Any]
    main: ConditionerKind | None
    main_fields: dict[str, Any]
    spatial: ConditionerKind | None
    spatial_fields: dict[str, Any]
    schedule: dict[str, Any]
    tells_prediction: bool
    scale_factor: float | None
    latent_size: int
    own: dict[str, Any]
    notes: tuple[str, ...] = ()


def read_compvis_config(path: Path) -> CompvisConfig:
    """Read a YAML file of the original code.

    Args:
        path: The file.

    Raises:
        CheckpointError: If it cannot be read, or says what is not known here or cannot be built; it
            names every such key.
    """
    try:
        return parse_compvis_config(load_yaml(path), path)
    except ConfigError as error:
        raise CheckpointError(str(error)) from None


def parse_compvis_config(data: Mapping[str, Any], path: Path) -> CompvisConfig:
    """Read the content of such a file.

    Args:
        data: Plain values.
        path: What messages call their file.

    Raises:
        CheckpointError: See `read_compvis_config`.
    """
    problems: list[str] = []
    whole = Section(data, "", problems)
    model = whole.section("model")
    if not model.data:
        problems = problems or ["model: required, but missing; a file of the original code has it"]
        raise CheckpointError(f"{path}: {problems[0]}")
    # what else a file holds is of the training: data, lightning
    own = whole.section(OWN)
    for name in own.data:
        if not isinstance(name, str):
            own.problem(short(name), "expected the name of a part")
    inpaints = model.choice("target", f"{_DDPM}.LatentDiffusion", _MODELS)
    model.ignore("base_learning_rate")
    params = model.section("params")
    model.finish()
    unet, head_order = _read_unet(_built(params, "unet_config", _UNETS)[1])
    first_stage = _read_first_stage(params)
    main, spatial, fields = _read_conditions(params, inpaints)
    by_std = params.take("scale_by_std", False, bool)
    scale = params.number("scale_factor", 1.0)
    told = "scale_factor" in params.data or not by_std
    schedule, size = _read_schedule(params), params.count("image_size", 256)
    params.ignore(_TRAINING)
    # what forks add to train on, such as personalization_config, has no tensor of the model
    params.leave_out(
        lambda name, value: (
            (isinstance(value, dict) and "target" in value)
            or (not isinstance(value, dict | list) and not params.is_near(name))
        )
    )
    params.finish()
    found = CompvisConfig(
        path=path,
        unet=unet,
        head_order=head_order,
        first_stage=first_stage,
        main=main,
        main_fields=fields if main else {},
        spatial=spatial,
        spatial_fields={} if main else fields,
        schedule=schedule,
        tells_prediction="parameterization" in params.data,
        scale_factor=scale if told else None,
        latent_size=size,
        own=dict(own.data),
        notes=_notes(whole.left_out, path),
    )
    if problems:
        told = problems[0] if len(problems) == 1 else "\n  " + "\n  ".join(problems)
        raise CheckpointError(f"{path}: {told}")
    return found


def _notes(left_out: list[str], path: Path, shown: int = 8) -> tuple[str, ...]:
    if not left_out:
        return ()
    rest = f" and {len(left_out) - shown} more" if len(left_out) > shown else ""
    named = ", ".join(left_out[:shown])
    return (f"{path.name} says what Mezzotint does not know and left out: {named}{rest}",)


def _built(params: Section, name: str, targets: Mapping[str, Any]) -> tuple[Any, Section]:
    """What a target stands for, and the arguments beside it."""
    here = params.section(name)
    kind = here.choice("target", None, targets)
    arguments = here.section("params")
    here.finish()
    return kind, arguments


def _read_schedule(params: Section) -> dict[str, Any]:
    params.fixed("given_betas", None)
    params.fixed("cosine_s", 8e-3)
    return {
        "beta_schedule": params.choice("beta_schedule", "linear", BETA_SCHEDULES),
        "beta_start": params.number("linear_start", 1e-4),
        "beta_end": params.number("linear_end", 2e-2),
        "num_train_timesteps": params.count("timesteps", 1000),
        "prediction_type": params.choice("parameterization", "eps", PARAMETERIZATIONS),
    }


def _read_conditions(
    params: Section, inpaints: bool
) -> tuple[ConditionerKind | None, ConditionerKind | None, dict[str, Any]]:
    """The condition to attend to, the one to concatenate, and the fields of either."""
    name = "cond_stage_config"
    default: Literal["concat", "crossattn"]
    default = "concat" if params.take("concat_mode", True, bool) else "crossattn"
    told = params.data.get(name)
    if isinstance(told, str):
        kind, fields = params.choice(name, None, _CONDITIONERS), dict[str, Any]()
    else:
        kind, arguments = _built(params, name, _CONDITIONERS)
        kind, fields = _read_conditioner(kind, arguments)
    default_key = None if kind is None else "hybrid" if inpaints else default
    key = params.take("conditioning_key", default_key, (str, type(None))) or default_key
    expected = None if kind is None else "concat" if kind in _SPATIAL else "crossattn"
    if inpaints:
        params.fixed("concat_keys", None, ["mask", "masked_image"])
        expected = "hybrid"
    if kind is not None and key != expected and not params.problems:
        params.problem("conditioning_key", f"expected {expected!r} with {name}, got {short(key)}")
    if inpaints:
        if kind is None or kind in _SPATIAL:
            params.problem(name, "an inpainting model also has a condition to attend to")
        return kind, "inpainting", fields
    return (None, kind, fields) if kind in _SPATIAL else (kind, None, fields)


def _read_conditioner(
    kind: ConditionerKind | None, arguments: Section
) -> tuple[ConditionerKind | None, dict[str, Any]]:
    fields: dict[str, Any] = {}
    match kind:
        case "clip":
            arguments.fixed("layer", "last")
            arguments.fixed("layer_idx", None)
            arguments.ignore("version device max_length freeze")
        case "open_clip":
            # which layer is the last but one depends on how many the file has
            if arguments.choice("layer", "last", {"last": 1, "penultimate": None}) == 1:
                fields["output_layer"] = 1
            arguments.fixed("arch", "ViT-H-14")
            arguments.ignore("version device max_length freeze")
        case "bert":
            fields = {
                "width": arguments.count("n_embed"),
                "layers": arguments.count("n_layer"),
                "vocab_size": arguments.count("vocab_size", 30522),
                "max_length": arguments.count("max_seq_len", 77),
            }
            kind = "bert" if arguments.take("use_tokenizer", True, bool) else "layout"
            arguments.ignore("device embedding_dropout")
        case "class":
            fields["width"] = arguments.count("embed_dim")
            arguments.ignore("n_classes key")
        case "semantic_map":
            arguments.fixed("method", "bilinear")
            arguments.fixed("multiplier", 0.5)
            arguments.fixed("bias", False)
            fields = {
                "stages": arguments.count("n_stages", 1),
                "classes": arguments.count("in_channels", 3),
                "out_channels": arguments.count("out_channels"),
            }
        case _:
            pass
    arguments.finish()
    return kind, fields


def _read_unet(arguments: Section) -> tuple[dict[str, Any], HeadOrder]:
    width = arguments.count("model_channels")
    multiples = arguments.multiples("channel_mult")
    if multiples and multiples[0] != 1:
        arguments.problem("channel_mult", f"expected 1 as the first, got {multiples[0]}")
    at = arguments.numbers("attention_resolutions")
    transformer = arguments.take("use_spatial_transformer", False, bool)
    fields: dict[str, Any] = {
        "in_channels": arguments.count("in_channels"),
        "out_channels": arguments.count("out_channels"),
        "block_out_channels": [round(width * multiple) for multiple in multiples],
        "layers_per_block": arguments.same_count("num_res_blocks"),
        # theirs counts how many times smaller a level is than the latents
        "attention_levels": [2**level in at for level in range(len(multiples))],
        "cross_attention_dim": arguments.same_count("context_dim") if transformer else None,
        "use_linear_projection": arguments.take("use_linear_in_transformer", False, bool),
        "resblock_updown": arguments.take("resblock_updown", False, bool),
        "dropout": arguments.number("dropout", 0.0),
        **_read_heads(arguments),
    }
    depth = arguments.count("transformer_depth", 1)
    if transformer:
        fields["transformer_layers_per_block"] = depth
    else:
        arguments.fixed("context_dim", None)
    if arguments.take("use_scale_shift_norm", False, bool):
        fields["resnet_time_scale_shift"] = "scale_shift"
    match arguments.take("num_classes", None, (int, str)):
        case None:
            arguments.fixed("adm_in_channels", None)
        case "sequential":
            fields["vector_dim"] = arguments.count("adm_in_channels")
        case int(classes):
            fields["num_class_embeds"] = classes
        case other:
            told = f"expected a number or 'sequential', got {short(other)}"
            arguments.problem("num_classes", told)
    new_order = arguments.take("use_new_attention_order", False, bool)
    for name, *values in (
        ("conv_resample", True),
        ("dims", 2),
        ("n_embed", None),
        ("num_heads_upsample", -1),
        ("disable_self_attentions", None),
        ("num_attention_blocks", None),
        ("disable_middle_self_attn", False),
    ):
        arguments.fixed(name, *values)
    arguments.ignore("image_size use_checkpoint use_fp16 use_bf16 legacy")
    # forks name ways to compute the same; what makes another network of it shows in the tensors
    arguments.leave_out(lambda name, _: not arguments.is_near(name))
    arguments.finish()
    return fields, "new" if new_order else "legacy"


def _read_heads(arguments: Section) -> dict[str, Any]:
    heads = arguments.take("num_heads", -1, int)
    width = arguments.take("num_head_channels", -1, int)
    if (heads == -1) == (width == -1):
        arguments.problem("num_heads", "expected either this or num_head_channels")
    return {
        "num_attention_heads": None if heads == -1 else heads,
        "attention_head_dim": None if width == -1 else width,
    }


def _read_first_stage(params: Section) -> dict[str, Any]:
    kind, arguments = _built(params, "first_stage_config", _FIRST_STAGES)
    if kind == "identity":
        arguments.ignore("vq_interface")
        arguments.finish()
        return {"kind": "identity", "in_channels": params.count("channels", 3)}
    shape = arguments.section("ddconfig")
    width, levels = shape.count("ch"), shape.multiples("ch_mult")
    at, side = shape.numbers("attn_resolutions", ()), shape.count("resolution", 256)
    kinds = {"vanilla": True, "vanilla-xformers": True, "none": False}
    attends = shape.choice("attn_type", "vanilla", kinds)
    attention = [attends and side // 2**level in at for level in range(len(levels))]
    shape.fixed("double_z", kind == "kl")
    fields: dict[str, Any] = {
        "kind": kind,
        "in_channels": shape.count("in_channels", 3),
        "out_channels": shape.count("out_ch", 3),
        "latent_channels": shape.count("z_channels"),
        "block_out_channels": [round(width * multiple) for multiple in levels],
        "layers_per_block": shape.count("num_res_blocks"),
        "attention_levels": attention if any(attention) else None,
        "mid_attention": attends,
        "dropout": shape.number("dropout", 0.0),
    }
    for name, value in (("tanh_out", False), ("give_pre_end", False), ("resamp_with_conv", True)):
        shape.fixed(name, value)
    shape.fixed("use_linear_attn", False)
    shape.finish()
    length = arguments.count("embed_dim")
    if kind == "vq":
        fields["codebook_size"] = arguments.count("n_embed")
        fields["embedding_dim"] = None if length == fields["latent_channels"] else length
        arguments.fixed("remap", None)
        arguments.ignore("sane_index_shape use_ema batch_resize_range lr_g_factor scheduler_config")
    elif length != fields["latent_channels"]:
        told = f"expected z_channels, {fields['latent_channels']}, got {length}"
        arguments.problem("embed_dim", told)
    arguments.ignore("monitor lossconfig ckpt_path ignore_keys image_key colorize_nlabels")
    arguments.ignore("ema_decay learn_logvar")
    arguments.finish()
    return fields
