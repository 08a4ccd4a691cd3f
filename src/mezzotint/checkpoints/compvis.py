"""The tensor names of the original latent diffusion code, and an invertible map to ours.

The map is derived by walking the levels and blocks of a built network, so it holds for every
configuration. It covers UNets with ``SpatialTransformer`` or with the fused-qkv ``AttentionBlock``,
and first stages with ``quant_conv``.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from mezzotint.errors import CheckpointError
from mezzotint.models.autoencoder import AutoencoderKL, VQModel
from mezzotint.models.unet import UNet
from mezzotint.nn.attention import AttentionBlock
from mezzotint.nn.embeddings import TimestepEmbedding
from mezzotint.nn.resnet import Downsample, ResnetBlock

__all__ = ["HeadOrder", "Rule", "TensorMap", "first_stage_map", "unet_map"]

HeadOrder = Literal["legacy", "new"]


@dataclass(frozen=True)
class Rule:
    """One tensor of theirs, made of one of ours or, for a fused qkv, of three.

    Attributes:
        ours: One name, or those of q, k and v.
        theirs: Its name in the original layout.
        ours_shape: The shape of each of ours.
        theirs_shape: The shape of theirs; a 1x1 convolution where ours is a linear layer.
        heads: For a fused qkv in legacy order, where each head has its q, k and v together; 1 for
            q, k and v one after the other.
    """

    ours: tuple[str, ...]
    theirs: str
    ours_shape: torch.Size
    theirs_shape: torch.Size
    heads: int = 1

    def join(self, parts: list[Tensor]) -> Tensor:
        """Make theirs of ours; of one alone without a copy."""
        if len(parts) == 1:
            return parts[0].reshape(self.theirs_shape)
        # (heads, 3, d, ...): with one head that is simply one after the other
        return torch.stack([p.unflatten(0, (self.heads, -1)) for p in parts], dim=1).reshape(
            self.theirs_shape
        )

    def part(self, tensor: Tensor) -> list[Tensor]:
        """Make ours of theirs; of one alone without a copy."""
        split = tensor.unflatten(0, (self.heads, len(self.ours), -1)).unbind(dim=1)
        return [s.reshape(self.ours_shape) for s in split]


class TensorMap:
    """An invertible map between the two layouts of one network.

    Attributes:
        rules: One for each tensor of theirs.
        unmapped: Our tensors that the original layout has no place for.
    """

    def __init__(self, rules: Iterable[Rule], names: Iterable[str]) -> None:
        self.rules = tuple(rules)
        covered = {name for rule in self.rules for name in rule.ours}
        self.unmapped = tuple(name for name in names if name not in covered)

    def to_compvis(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename and reshape our tensors; those in ``unmapped`` are left out."""
        return {r.theirs: r.join([tensors[name] for name in r.ours]) for r in self.rules}

    def from_compvis(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename and reshape original tensors.

        Raises:
            CheckpointError: If one is missing, unexpected or of the wrong shape.
        """
        theirs = {rule.theirs for rule in self.rules}
        problems = [f"missing {name}" for name in sorted(theirs - set(tensors))]
        problems += [f"unexpected {name}" for name in sorted(set(tensors) - theirs)]
        problems += [
            f"{r.theirs} has shape {tuple(tensors[r.theirs].shape)},"
            f" expected {tuple(r.theirs_shape)}"
            for r in self.rules
            if r.theirs in tensors and tensors[r.theirs].shape != r.theirs_shape
        ]
        if problems:
            rest = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
            raise CheckpointError(
                f"not the original tensors of this network: {'; '.join(problems[:4])}{rest}"
            )
        return {
            name: part
            for rule in self.rules
            for name, part in zip(rule.ours, rule.part(tensors[rule.theirs]), strict=True)
        }


def unet_map(unet: UNet, head_order: HeadOrder = "legacy") -> TensorMap:
    """Derive the map of a UNet to ``openaimodel.UNetModel``.

    Args:
        unet: The network; its weights are not read, so it may be on the meta device.
        head_order: How fused qkv projections are ordered: ``new`` is the original option
            ``use_new_attention_order``, which is off by default. Transformers are not fused.
    """
    return TensorMap(_unet_rules(unet, head_order), unet.state_dict())


def first_stage_map(first_stage: AutoencoderKL | VQModel) -> TensorMap:
    """Derive the map of a first stage to the original encoder, decoder and quantiser."""
    return TensorMap(_first_stage_rules(first_stage), first_stage.state_dict())


def _unet_rules(unet: UNet, order: HeadOrder) -> Iterator[Rule]:
    def rules(ours: str, theirs: str) -> Iterator[Rule]:
        return _module_rules(unet, ours, theirs, _UNET_RESNET, order)

    yield from rules("conv_in", "input_blocks.0.0")
    yield from rules("time_embedding", "time_embed")
    if isinstance(unet.class_embedding, TimestepEmbedding):
        yield from rules("class_embedding", "label_emb.0")
    elif unet.class_embedding is not None:
        yield from rules("class_embedding", "label_emb")

    index = 1  # theirs counts the layers of all levels through
    for level, block in enumerate(unet.down_blocks):
        for layer in range(unet.config.layers_per_block):
            yield from rules(f"down_blocks.{level}.resnets.{layer}", f"input_blocks.{index}.0")
            if _length(block, "attentions"):
                ours = f"down_blocks.{level}.attentions.{layer}"
                yield from rules(ours, f"input_blocks.{index}.1")
            index += 1
        if _length(block, "downsamplers"):
            ours = f"down_blocks.{level}.downsamplers.0"
            yield from rules(ours, f"input_blocks.{index}.0")
            index += 1

    yield from rules("mid_block.resnets.0", "middle_block.0")
    yield from rules("mid_block.attentions.0", "middle_block.1")
    yield from rules("mid_block.resnets.1", "middle_block.2")

    index = 0
    for level, block in enumerate(unet.up_blocks):
        last = unet.config.layers_per_block
        for layer in range(last + 1):
            ours, theirs = f"up_blocks.{level}", f"output_blocks.{index}"
            yield from rules(f"{ours}.resnets.{layer}", f"{theirs}.0")
            place = 1
            if _length(block, "attentions"):
                yield from rules(f"{ours}.attentions.{layer}", f"{theirs}.1")
                place = 2
            if layer == last and _length(block, "upsamplers"):
                yield from rules(f"{ours}.upsamplers.0", f"{theirs}.{place}")
            index += 1

    yield from rules("conv_norm_out", "out.0")
    yield from rules("conv_out", "out.2")


def _first_stage_rules(first_stage: AutoencoderKL | VQModel) -> Iterator[Rule]:
    def rules(ours: str, theirs: str) -> Iterator[Rule]:
        return _module_rules(first_stage, ours, theirs, _FIRST_STAGE_RESNET)

    for half, blocks in (("encoder", "down_blocks"), ("decoder", "up_blocks")):
        yield from rules(f"{half}.conv_in", f"{half}.conv_in")
        levels = cast(nn.ModuleList, first_stage.get_submodule(f"{half}.{blocks}"))
        for i, level in enumerate(levels):
            # theirs counts the decoder's levels from the finest, ours from the coarsest
            theirs = f"{half}.down.{i}" if half == "encoder" else f"{half}.up.{len(levels) - 1 - i}"
            ours = f"{half}.{blocks}.{i}"
            for layer in range(_length(level, "resnets")):
                yield from rules(f"{ours}.resnets.{layer}", f"{theirs}.block.{layer}")
            for layer in range(_length(level, "attentions")):
                yield from rules(f"{ours}.attentions.{layer}", f"{theirs}.attn.{layer}")
            for name, sampler in (("downsample", "downsamplers"), ("upsample", "upsamplers")):
                if _length(level, sampler):
                    yield from rules(f"{ours}.{sampler}.0.conv", f"{theirs}.{name}.conv")
        yield from rules(f"{half}.mid_block.resnets.0", f"{half}.mid.block_1")
        if _length(first_stage.get_submodule(f"{half}.mid_block"), "attentions"):
            yield from rules(f"{half}.mid_block.attentions.0", f"{half}.mid.attn_1")
        yield from rules(f"{half}.mid_block.resnets.1", f"{half}.mid.block_2")
        yield from rules(f"{half}.conv_norm_out", f"{half}.norm_out")
        yield from rules(f"{half}.conv_out", f"{half}.conv_out")
    yield from rules("quant_conv", "quant_conv")
    yield from rules("post_quant_conv", "post_quant_conv")
    if isinstance(first_stage, VQModel):
        yield from rules("quantize", "quantize")


def _length(block: nn.Module, name: str) -> int:
    return len(cast(nn.ModuleList, block.get_submodule(name)))


_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_FIRST_STAGE_RESNET = {"conv_shortcut": "nin_shortcut"}
_RENAMED: dict[type[nn.Module], Mapping[str, str]] = {
    TimestepEmbedding: {"linear_1": "0", "linear_2": "2"},
    Downsample: {"conv": "op"},
}


def _module_rules(
    network: nn.Module,
    ours: str,
    theirs: str,
    resnet: Mapping[str, str],
    order: HeadOrder | None = None,
) -> Iterator[Rule]:
    """Rules of one block.

    Args:
        network: Holds the block.
        ours: Where, by our name.
        theirs: Its name in the original layout.
        resnet: The names inside a ResBlock, which differ between UNet and first stage.
        order: Of a plain attention's fused qkv; None where it is not fused.
    """
    module = network.get_submodule(ours)
    if isinstance(module, AttentionBlock):
        yield from _attention_rules(module, ours, theirs, order)
        return
    # a SpatialTransformer, an Upsample and a single layer are named alike
    names = {ResnetBlock: resnet, **_RENAMED}.get(type(module), {})
    for name, tensor in module.state_dict().items():
        layer, _, leaf = name.rpartition(".")
        if layer == "cond_proj":
            continue  # of distilled models, which the original code does not have
        renamed = f"{names.get(layer, layer)}.{leaf}".lstrip(".")
        yield Rule((f"{ours}.{name}",), f"{theirs}.{renamed}", tensor.shape, tensor.shape)


def _attention_rules(
    block: AttentionBlock, ours: str, theirs: str, order: HeadOrder | None
) -> Iterator[Rule]:
    # the UNet's projections are 1-d convolutions, the first stage's are 2-d
    extra = (1,) if order else (1, 1)
    for leaf in ("weight", "bias"):
        kernel = extra if leaf == "weight" else ()
        norm = cast(Tensor, getattr(block.group_norm, leaf)).shape
        yield Rule((f"{ours}.group_norm.{leaf}",), f"{theirs}.norm.{leaf}", norm, norm)
        shape = cast(Tensor, getattr(block.to_q, leaf)).shape
        if order is None:
            for mine, name in (("to_q", "q"), ("to_k", "k"), ("to_v", "v")):
                yield Rule(
                    (f"{ours}.{mine}.{leaf}",),
                    f"{theirs}.{name}.{leaf}",
                    shape,
                    torch.Size((*shape, *kernel)),
                )
        else:
            yield Rule(
                tuple(f"{ours}.{mine}.{leaf}" for mine in ("to_q", "to_k", "to_v")),
                f"{theirs}.qkv.{leaf}",
                shape,
                torch.Size((3 * shape[0], *shape[1:], *kernel)),
                heads=block.heads if order == "legacy" else 1,
            )
        yield Rule(
            (f"{ours}.to_out.0.{leaf}",),
            f"{theirs}.proj_out.{leaf}",
            shape,
            torch.Size((*shape, *kernel)),
        )
