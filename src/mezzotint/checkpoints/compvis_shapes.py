"""What the shapes of the original tensors tell of the UNet and of the first stage they belong to.

Any width, depth and number of levels is read off; nothing is looked up. Heads leave no trace in
shapes, nor do the groups of normalisations.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from mezzotint.config import Config
from mezzotint.errors import CheckpointError, short
from mezzotint.models.unet import UNetConfig

__all__ = ["contradictions", "guess_first_stage", "guess_unet"]

Shapes = Mapping[str, tuple[int, ...]]

# what a network is as large as; all else is seen where its tensors are compared by name
_SIZES = (
    *("in_channels", "out_channels", "block_out_channels", "layers_per_block"),
    *("cross_attention_dim", "transformer_layers_per_block", "vector_dim", "num_class_embeds"),
    *("latent_channels", "codebook_size", "embedding_dim"),
)


def guess_unet(shapes: Shapes) -> dict[str, Any]:
    """Return the fields of a `UNetConfig`, all but the heads, that a UNet's tensors tell.

    Args:
        shapes: By name without ``model.diffusion_model.``.

    Raises:
        CheckpointError: If they are no UNet of the original code; it does not name the file.
    """
    shape = _Shapes(shapes, "the UNet")
    inputs = shape.count("input_blocks.")
    # the layer that doubles the size stands last in an output block, once for all levels but one
    ups = {block for block, _ in _upsamplers(shapes)}
    levels = 1 + len(ups)
    blocks = shape.count("output_blocks.")
    if inputs != blocks or blocks % levels or blocks <= levels:
        raise CheckpointError(
            f"the UNet has {inputs} input and {blocks} output blocks for {levels} levels, which is"
            " no UNet of the original code"
        )
    layers = blocks // levels - 1
    firsts = [1 + level * (layers + 1) for level in range(levels)]
    widths = [shape[f"input_blocks.{first}.0.out_layers.3.weight"][0] for first in firsts]
    attention = [f"input_blocks.{first}.1.norm.weight" in shapes for first in firsts]
    time = shape["input_blocks.1.0.emb_layers.1.weight"][0]
    fields: dict[str, Any] = {
        "in_channels": shape["input_blocks.0.0.weight"][1],
        "out_channels": shape["out.2.weight"][0],
        "block_out_channels": widths,
        "layers_per_block": layers,
        "attention_levels": attention,
        "resnet_time_scale_shift": "scale_shift" if time == 2 * widths[0] else "default",
        "resblock_updown": any(kind == "resnet" for _, kind in _upsamplers(shapes)),
        "cross_attention_dim": None,
    }
    # the middle has attention whatever the levels have
    middle = "middle_block.1."
    context = shapes.get(f"{middle}transformer_blocks.0.attn2.to_k.weight")
    if context is not None:
        fields |= {
            "cross_attention_dim": context[1],
            "transformer_layers_per_block": shape.count(f"{middle}transformer_blocks."),
            "use_linear_projection": len(shape[f"{middle}proj_in.weight"]) == 2,
        }
    if labels := shapes.get("label_emb.weight"):
        fields["num_class_embeds"] = labels[0]
    if vector := shapes.get("label_emb.0.0.weight"):
        fields["vector_dim"] = vector[1]
    return fields


def guess_first_stage(shapes: Shapes) -> dict[str, Any]:
    """Return the fields of a first stage's configuration, ``kind`` among them.

    Args:
        shapes: By name without ``first_stage_model.``.

    Raises:
        CheckpointError: If they are no first stage of the original code; it does not name the file.
    """
    shape = _Shapes(shapes, "the first stage")
    levels = shape.count("encoder.down.")
    attention = [f"encoder.down.{i}.attn.0.q.weight" in shapes for i in range(levels)]
    fields: dict[str, Any] = {
        "kind": "kl",
        "in_channels": shape["encoder.conv_in.weight"][1],
        "out_channels": shape["decoder.conv_out.weight"][0],
        "latent_channels": shape["decoder.conv_in.weight"][1],
        "block_out_channels": [
            shape[f"encoder.down.{i}.block.0.conv1.weight"][0] for i in range(levels)
        ],
        "layers_per_block": shape.count("encoder.down.0.block."),
        "attention_levels": attention if any(attention) else None,
        "mid_attention": "encoder.mid.attn_1.q.weight" in shapes,
    }
    if codes := shapes.get("quantize.embedding.weight"):
        latents = fields["latent_channels"]
        # a code as long as the latents are deep need not be said
        length = None if codes[1] == latents else codes[1]
        fields |= {"kind": "vq", "codebook_size": codes[0], "embedding_dim": length}
    return fields


def contradictions(section: str, config: Config, shapes: Shapes) -> list[str]:
    """Return sentences on sizes that a YAML file claims and the tensors do not have.

    They are found before anything is built, which may be far larger than the file.

    Args:
        section: What messages call the part.
        config: Of the UNet or of a first stage.
        shapes: See `guess_unet` and `guess_first_stage`; of tensors that are no such part of the
            original code nothing is said.
    """
    guess = guess_unet if isinstance(config, UNetConfig) else guess_first_stage
    try:
        told = guess(shapes)
    except CheckpointError:
        return []
    claimed = config.to_dict()
    return [
        f"{section}.{name} is {short(claimed[name])}, but its tensors have {short(told[name])}"
        for name in _SIZES
        if name in told and name in claimed and claimed[name] != told[name]
    ]


class _Shapes:
    """Shapes of which those that are asked for must be there."""

    def __init__(self, shapes: Shapes, what: str) -> None:
        self._shapes, self._what = shapes, what

    def __getitem__(self, name: str) -> tuple[int, ...]:
        # every one that is asked for is a weight of two sides or four
        shape = self._shapes.get(name, ())
        if len(shape) < 2:
            raise CheckpointError(f"{self._what} has no weight {name}")
        return shape

    def count(self, prefix: str) -> int:
        """How many blocks there are, numbered right after a prefix."""
        numbers = {
            n.removeprefix(prefix).split(".")[0] for n in self._shapes if n.startswith(prefix)
        }
        return sum(number.isdecimal() for number in numbers)


def _upsamplers(shapes: Shapes) -> Iterator[tuple[str, str]]:
    """The output blocks that double the size, and by what."""
    for name in shapes:
        parts = name.split(".")
        # the first layer of a block is its ResBlock, others are attention, and then the doubling
        if parts[0] != "output_blocks" or len(parts) < 5 or parts[2] == "0":
            continue
        if parts[3:] == ["conv", "weight"]:
            yield parts[1], "conv"
        elif parts[3:] == ["in_layers", "2", "weight"]:
            yield parts[1], "resnet"
