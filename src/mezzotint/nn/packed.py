"""Layers whose weights lie as oneDNN's kernels read them, for drawing on a processor.

A plain layer hands its weight to oneDNN row by row, and at every call it is first brought into the
kernel's own order; at coarse resolutions, where weights are larger than features, that takes as
long as the layer's work. Packed layers hold it in that order. Results are those of plain layers:
equal in bfloat16 but for near ties, in float32 to the order of sums; where two layers become one,
less is rounded in between.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mezzotint.nn.attention import GEGLU
from mezzotint.nn.resnet import Upsample
from mezzotint.nn.winograd import convolve, transform_weight

__all__ = ["Packed", "PackedConv2d", "PackedGEGLU", "PackedHalves", "PackedLinear"]
__all__ += ["PackedUpsample", "WINOGRAD_PIXELS", "WinogradConv2d", "is_packed", "pack"]
__all__ += ["weight_shape"]

_HELD = {
    *("_weight", "_wide", "_learns", "_transformed", "_second", "_doubling", "_made_of"),
    *("_scales", "_precision", "_of_before", "_multiplies"),  # of those in int8
}
_ops: Any = torch.ops.mkldnn  # made for torch's compiler; they take tensors outside of it as well
_LEAST = 4096  # weights of a layer: below, a call costs more than order can save
_LEAST_CHANNELS = 256  # for Winograd's algorithm: with fewer, what is around products takes longer
WINOGRAD_PIXELS = 1024  # for it too: with fewer, reading four times the weights takes longer
_ROWS, _SIDE = 2048, 32  # of a typical input; with others a packed weight is right too


def pack(network: nn.Module, precision: torch.dtype, *, winograd: bool = False) -> None:
    """Pack the weights of all plain convolutions and linear layers of a network, in place.

    Weights that are in ``precision`` are exchanged, so that there is one copy of each; of wider
    ones a rounded copy is packed, and they are kept. Parameters keep their names in the network's
    state, but `parameters` lists no weight that is packed. What trains, moves, converts, copies or
    overwrites a layer makes it plain again, and so does ``train()``; gradients flow to a layer's
    input, and not to its weight. What `parameters` does not list, ``requires_grad_()`` and changes
    in place do not reach: make layers plain before.

    Args:
        network: On the processor, in evaluation mode.
        precision: ``torch.float32`` or ``torch.bfloat16``, in which it will be run.
        winograd: In float32, let wide convolutions of size 3 run by Winograd's algorithm where
            their features are large, in 0.4 to 0.6 of the time, for four times their weights'
            memory beside them.

    Example:
        >>> layer = nn.Sequential(nn.Linear(64, 64)).eval()
        >>> x = torch.ones(2, 64)
        >>> before = layer(x)
        >>> pack(layer, torch.float32)
        >>> layer, torch.allclose(layer(x), before, atol=1e-5)
        (Sequential(
          (0): PackedLinear(in_features=64, out_features=64, bias=True)
        ), True)
    """
    assert not network.training, "packed layers are for inference"
    for layer in list(network.modules()):
        if isinstance(layer, Upsample) and _is_plain(layer.conv):
            PackedUpsample.adopt(layer, precision)
        elif isinstance(layer, GEGLU) and _is_plain_gate(layer):
            PackedGEGLU.adopt(layer, precision)
        elif _is_plain(layer):
            kind = PackedLinear
            if isinstance(layer, nn.Conv2d):
                fast = winograd and precision is torch.float32 and _suits_winograd(layer)
                kind = WinogradConv2d if fast else PackedConv2d
            kind.adopt(layer, precision)


def is_packed(network: nn.Module) -> bool:
    """Say whether any layer of a network is packed."""
    return any(isinstance(layer, Packed) for layer in network.modules())


def weight_shape(layer: nn.Conv2d | nn.Linear) -> tuple[int, ...]:
    """Return the shape of a layer's weight, without unpacking it."""
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    return layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size


def _is_plain(layer: nn.Module) -> bool:
    if type(layer) is not nn.Conv2d and type(layer) is not nn.Linear:
        return False  # sub-classes compute something of their own
    return layer.weight.numel() >= _LEAST


def _is_plain_gate(layer: GEGLU) -> bool:
    return type(layer) in (GEGLU, PackedGEGLU) and _is_plain(layer.proj)


def _suits_winograd(layer: nn.Conv2d) -> bool:
    shape = (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups)
    wide = min(layer.in_channels, layer.out_channels) >= _LEAST_CHANNELS
    return wide and shape == ((3, 3), (1, 1), (1, 1), (1, 1), 1)


class Packed(nn.Module):
    """What packed layers share: being made of a plain layer, and becoming one again."""

    _plain: ClassVar[type[nn.Module]]
    _weight: Tensor  # packed, opaque to all but oneDNN
    _wide: Tensor | None  # the weight itself, where it is wider than what is computed in
    _learns: bool

    @classmethod
    def adopt(cls, layer: nn.Module, precision: torch.dtype) -> None:
        """Turn a plain layer into a packed one."""
        weight = layer._parameters.pop("weight")  # pyright: ignore[reportPrivateUsage]
        assert weight is not None, "a plain layer has a weight"
        layer.__class__ = cls
        assert isinstance(layer, cls)
        layer._learns, weight = weight.requires_grad, weight.detach()
        layer._wide = None if weight.dtype is precision else weight
        layer._weight = layer._in_order(weight.to(precision))

    def _in_order(self, weight: Tensor) -> Tensor:
        raise NotImplementedError

    def _as_plain(self) -> Tensor:
        """Return the weight as a plain layer has it."""
        return self._weight.to_dense() if self._wide is None else self._wide

    @property
    def packed(self) -> Tensor:
        """The packed weight, or its first half, which oneDNN alone can read."""
        return self._weight

    @property
    def small_bias(self) -> Tensor | None:
        """The bias as it is now, in the precision of the packed weight."""
        bias = self._parameters["bias"]  # as ever: it may have been changed in place
        return None if bias is None else bias.detach().to(self._weight.dtype)

    @property
    def precisions(self) -> tuple[torch.dtype, torch.dtype]:
        """What the plain layer's weight is in, and what this one computes in."""
        return (self._weight if self._wide is None else self._wide).dtype, self._weight.dtype

    @property
    def hooked(self) -> bool:
        """Whether something acts on what the layer is given or returns, or takes its place."""
        mine = vars(self)
        return bool(mine["_forward_hooks"] or mine["_forward_pre_hooks"] or "forward" in mine)

    def runs_plainly(self, input: Tensor) -> bool:
        """Whether an input is for the plain layer: a gradient is to flow, or no autocast narrows.

        Without autocast a layer that is not packed answers such an input in its own precision.
        """
        if torch.is_grad_enabled() and input.requires_grad:
            return True
        own, narrow = self.precisions
        return own is not narrow and input.dtype is own and not torch.is_autocast_enabled("cpu")

    def unpack(self) -> None:
        """Become a plain layer again."""
        weight = nn.Parameter(self.weight, self._learns)
        for name in _HELD & vars(self).keys():
            delattr(self, name)
        self.__class__ = self._plain  # pyright: ignore[reportAttributeAccessIssue]
        self._parameters = {"weight": weight, **self._parameters}

    def __getattr__(self, name: str) -> Any:
        if name != "weight":
            return super().__getattr__(name)
        return self._as_plain()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            self.unpack()
        nn.Module.__setattr__(self, name, value)  # whose method it is may be another by now

    def train(self, mode: bool = True) -> Self:
        """Set the mode; a layer that trains is plain."""
        if mode:
            self.unpack()
        nn.Module.train(self, mode)
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self.unpack()
        return self._apply(fn, recurse)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.weight
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.unpack()
        self._load_from_state_dict(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles are of the plain layer."""
        state = {k: v for k, v in vars(self).items() if k not in _HELD}
        weight = nn.Parameter(self.weight, self._learns)
        state["_parameters"] = {"weight": weight, **self._parameters}
        return object.__new__, (self._plain,), state


class PackedConv2d(Packed, nn.Conv2d):
    """A convolution with a packed weight; what it returns lies with the channels last."""

    _plain = nn.Conv2d

    def _in_order(self, weight: Tensor) -> Tensor:
        size = [2, self.in_channels, _SIDE, _SIDE]
        return _ops._reorder_convolution_weight(
            weight, self.padding, self.stride, self.dilation, self.groups, size
        )

    def forward(self, input: Tensor) -> Tensor:
        """Convolve ``(B, C, H, W)``."""
        if self.runs_plainly(input):
            return self._conv_forward(input, self.weight, self.bias)
        x, padding = input.to(self._weight.dtype), self.padding
        if self.padding_mode != "zeros":
            x = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = (0, 0)
        return _ops._convolution_pointwise(
            x.contiguous(memory_format=torch.channels_last),
            self._weight,
            self.small_bias,
            padding,
            self.stride,
            self.dilation,
            self.groups,
            "none",
            [],
            "",
        )


class WinogradConv2d(PackedConv2d):
    """A packed convolution of size 3 that also holds what Winograd's algorithm takes."""

    _transformed: list[Tensor]

    def _in_order(self, weight: Tensor) -> Tensor:
        self._transformed = transform_weight(weight)
        return super()._in_order(weight)

    def forward(self, input: Tensor) -> Tensor:
        """Convolve ``(B, C, H, W)``; small or odd sizes and paddings of a kind as others do."""
        height, width = input.shape[2:]
        suits = height % 4 == width % 4 == 0 and height * width >= WINOGRAD_PIXELS
        if self.runs_plainly(input) or not suits or self.padding_mode != "zeros":
            return super().forward(input)
        return convolve(input.float(), self._transformed, self.small_bias)


class PackedLinear(Packed, nn.Linear):
    """A linear layer with a packed weight."""

    _plain = nn.Linear

    def _in_order(self, weight: Tensor) -> Tensor:
        return _ops._reorder_linear_weight(weight, _ROWS)

    def forward(self, input: Tensor) -> Tensor:
        """Map ``(…, in_features)`` to ``(…, out_features)``."""
        if self.runs_plainly(input):
            return F.linear(input, self.weight, self.bias)
        x = input.to(self._weight.dtype)
        return _ops._linear_pointwise(x, self._weight, self.small_bias, "none", [], "")


class PackedHalves(PackedLinear):
    """A linear layer whose outputs are packed in two halves, one of which is to gate the other."""

    _second: Tensor

    def _in_order(self, weight: Tensor) -> Tensor:
        first, second = weight.chunk(2)
        self._second = super()._in_order(second.contiguous())
        return super()._in_order(first.contiguous())

    def _as_plain(self) -> Tensor:
        if self._wide is not None:
            return self._wide
        return torch.cat([self._weight.to_dense(), self._second.to_dense()])

    def forward(self, input: Tensor) -> Tensor:
        """Map ``(…, in_features)`` to ``(…, out_features)``."""
        if self.runs_plainly(input):
            return F.linear(input, self.weight, self.bias)
        x, biases = input.to(self._weight.dtype), self._biases()
        weights = self._weight, self._second
        return torch.cat(
            [
                _ops._linear_pointwise(x, weight, bias, "none", [], "")
                for weight, bias in zip(weights, biases, strict=True)
            ],
            dim=-1,
        )

    def gated(self, input: Tensor) -> Tensor:
        """Map ``(…, in_features)`` to the first half times the GELU of the second.

        Both happen before a product's sum is rounded and written.
        """
        x, (first, second) = input.to(self._weight.dtype), self._biases()
        gate = _ops._linear_pointwise(x, self._second, second, "gelu", [], "none")
        return _ops._linear_pointwise.binary(x, gate, self._weight, first, "mul")

    def _biases(self) -> Sequence[Tensor | None]:
        bias = self.small_bias
        return (None, None) if bias is None else bias.chunk(2)


class PackedGEGLU(GEGLU):
    """A gated layer whose gate is applied where the products are added.

    In bfloat16 neither what is gated nor the sum before the GELU is rounded, so that the result is
    nearer to the exact one than the plain layer's.
    """

    @classmethod
    def adopt(cls, layer: GEGLU, precision: torch.dtype) -> None:
        """Turn a plain layer into this one, and its linear layer into a packed one."""
        PackedHalves.adopt(layer.proj, precision)
        layer.__class__ = cls

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(…, dim)`` to ``(…, out_dim)``."""
        halves: nn.Module = self.proj
        if not isinstance(halves, PackedHalves):
            self.__class__ = GEGLU  # pyright: ignore[reportAttributeAccessIssue]
            return GEGLU.forward(self, x)
        if halves.hooked or halves.runs_plainly(x):
            return super().forward(x)
        return halves.gated(x)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles are of the plain layer."""
        return object.__new__, (GEGLU,), dict(vars(self))


class PackedUpsample(Upsample):
    """Doubling and a convolution of size 3 as one transposed convolution of size 4.

    After nearest neighbours, two of any three neighbours along an axis are the same value, so that
    their weights can be added beforehand: an output pixel is of 2 x 2 inputs and not of 3 x 3, in
    the same sum otherwise ordered. In bfloat16 the sums of weights are rounded once more.
    """

    _doubling: Tensor  # packed
    _made_of: Tensor

    @classmethod
    def adopt(cls, layer: Upsample, precision: torch.dtype) -> None:
        """Turn a plain layer into this one, and its convolution into a packed one."""
        weight = layer.conv.weight.detach().float()
        # rows are taps of the transposed kernel, columns of the convolution's
        taps = weight.new_tensor([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]])
        doubling = torch.einsum("ik,jl,ockl->coij", taps, taps, weight).to(precision)
        PackedConv2d.adopt(layer.conv, precision)
        layer.__class__ = cls
        assert isinstance(layer, cls) and isinstance(layer.conv, PackedConv2d)
        layer._made_of = layer.conv.packed
        size = [2, doubling.shape[0], _SIDE, _SIDE]
        layer._doubling = _ops._reorder_convolution_transpose_weight(
            doubling.contiguous(), [1, 1], [0, 0], [2, 2], [1, 1], 1, size
        )

    def forward(
        self, x: Tensor, time: Tensor | None = None, size: Sequence[int] | None = None
    ) -> Tensor:
        """Map ``(B, C, H, W)`` to twice the size or to ``size``; the embedding is not used."""
        conv = self.conv
        if not isinstance(conv, PackedConv2d) or conv.packed is not self._made_of:
            self.unpack()
            return Upsample.forward(self, x, time, size)
        double = [2 * side for side in x.shape[2:]]
        if (size is not None and list(size) != double) or not self._may_double(conv, x):
            return super().forward(x, time, size)
        x = x.to(self._doubling.dtype).contiguous(memory_format=torch.channels_last)
        return _ops._convolution_transpose_pointwise(
            x, self._doubling, conv.small_bias, [1, 1], [0, 0], [2, 2], [1, 1], 1, "none", [], ""
        )

    def unpack(self) -> None:
        """Become a plain layer again, at the first call after the convolution is another."""
        del self._doubling, self._made_of
        self.__class__ = Upsample  # pyright: ignore[reportAttributeAccessIssue]

    def _may_double(self, conv: PackedConv2d, x: Tensor) -> bool:
        """Whether nothing acts on the convolution."""
        return conv.padding_mode == "zeros" and not (conv.hooked or conv.runs_plainly(x))

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles are of the plain layer."""
        state = {k: v for k, v in vars(self).items() if k not in _HELD}
        return object.__new__, (Upsample,), state
