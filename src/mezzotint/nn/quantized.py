"""Layers in int8, for drawing on a processor: half of bfloat16's memory, and less time.

A weight w is s q with whole q in -127..127 and s of its output channel; what it is multiplied with
is rounded so at every call, with one s for the batch (Jacob et al. 2018, arXiv 1712.05877, equation
1, without zero points). Products are added exactly, as integers, by oneDNN. The result is near the
plain layer's, and not the same.
"""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mezzotint.nn.embeddings import TimestepEmbedding
from mezzotint.nn.packed import Packed, PackedConv2d, PackedLinear
from mezzotint.nn.resnet import ResnetBlock

__all__ = ["Quantized", "QuantizedConv2d", "QuantizedLinear", "quantize"]

_ops: Any = torch.ops.onednn  # made for torch's compiler; they take tensors outside of it as well
_FEWEST_SUMMED, _FEWEST_USES = 512, 1024  # with fewer, rounding takes longer than is saved
_WIDE = 1024  # channels of a convolution that runs as a product of matrices
_SIDE = 32  # of a typical input; with others a packed weight is right too
_MOST = 127
_LEAST = 1e-30  # the largest of an input that is all zeros
_CHUNK = 2**17  # numbers that a thread rounds at once: what they become then stays in the cache
_WHOLE = 1.5 * 2.0**23  # float32 has no fractions here, and ends in the byte of what was added


def quantize(
    network: nn.Module,
    precision: torch.dtype,
    *,
    keep: Collection[nn.Module] = (),
    multiplies: bool = True,
) -> None:
    """Round the weights of a network's large layers to int8, in place.

    Large are linear layers, and convolutions beyond size 1, that add 512 products or more for an
    output and use an input 1024 times or more. Layers of time embeddings stay as they are: few rows
    go through them, on which all channels depend. So do convolutions of size 1, which as shortcuts
    are given features that nothing has normalised.

    The weights of before are not kept. `state_dict`, copies, and what makes a layer plain again, as
    `mezzotint.nn.packed.pack` has it, give the rounded ones, in the precision of before; gradients
    flow to a layer's input as through a plain one of these.

    Args:
        network: On the processor, in evaluation mode, with nothing packed.
        precision: ``torch.float32`` or ``torch.bfloat16``, of what the layers return.
        keep: Layers that stay as they are.
        multiplies: Whether to multiply in int8. Otherwise a weight is widened at every call, which
            takes time: for processors that have no instructions for int8.

    Example:
        >>> layer = nn.Sequential(nn.Linear(512, 1024)).eval()
        >>> x = torch.linspace(-1, 1, 1024).view(2, 512)
        >>> before = layer(x)
        >>> quantize(layer, torch.float32)
        >>> layer, torch.allclose(layer(x), before, atol=0.02)
        (Sequential(
          (0): QuantizedLinear(in_features=512, out_features=1024, bias=True)
        ), True)
    """
    assert not network.training, "layers in int8 are for inference"
    kept = {*keep, *(layer for module in network.modules() for layer in _of_time(module))}
    for layer in list(network.modules()):
        if layer in kept or not _is_large(layer):
            continue
        kind = QuantizedConv2d if isinstance(layer, nn.Conv2d) else QuantizedLinear
        kind.adopt(layer, precision)
        if not multiplies:
            assert isinstance(layer, Quantized)
            layer.widen_at_calls()


def _of_time(module: nn.Module) -> list[nn.Module]:
    if isinstance(module, TimestepEmbedding):
        return list(module.children())
    if isinstance(module, ResnetBlock) and module.time_emb_proj is not None:
        return [module.time_emb_proj]
    return []


def _is_large(layer: nn.Module) -> bool:
    if type(layer) is nn.Linear:
        summed, uses = layer.in_features, layer.out_features
    elif type(layer) is nn.Conv2d and layer.kernel_size != (1, 1):
        (down, across), (high, wide) = layer.stride, layer.kernel_size
        summed = layer.in_channels // layer.groups * high * wide
        uses = layer.out_channels // layer.groups * high * wide // (down * across)
    else:
        return False  # sub-classes compute something of their own
    return summed >= _FEWEST_SUMMED and uses >= _FEWEST_USES


class Quantized(Packed):
    """What layers in int8 share; its other base is the packed layer of their kind."""

    _scales: Tensor  # (out,) float32
    _precision: torch.dtype
    _of_before: torch.dtype
    _multiplies: bool = True

    def _in_order(self, weight: Tensor) -> Tensor:
        self._precision = weight.dtype
        if self._wide is not None:  # which is rounded once, and not twice
            weight, self._wide = self._wide, None
        self._of_before = weight.dtype
        rows = weight.float().flatten(1)
        self._scales = (rows.abs().amax(1) / _MOST).clamp_(min=_LEAST)
        return self._lay_out((rows / self._scales[:, None]).round_().to(torch.int8).view_as(weight))

    def _lay_out(self, whole: Tensor) -> Tensor:
        """Pack a weight in int8."""
        raise NotImplementedError

    def _whole(self) -> Tensor:
        """Return the weight in int8, unpacked."""
        raise NotImplementedError

    def _as_plain(self) -> Tensor:
        whole = self._whole()
        scales = self._scales.view(-1, *[1] * (whole.dim() - 1))
        return (whole * scales).to(self._of_before).contiguous()

    def widen_at_calls(self) -> None:
        """Multiply no more in int8."""
        self._multiplies = False

    @property
    def small_bias(self) -> Tensor | None:
        """The bias as it is now, in float32, which is what sums of int8 are scaled to."""
        bias = self._parameters["bias"]
        return None if bias is None else bias.detach().float()

    @property
    def precisions(self) -> tuple[torch.dtype, torch.dtype]:
        """What the plain layer's weight is in, and what this one computes in."""
        return self._of_before, self._precision

    def runs_plainly(self, input: Tensor) -> bool:
        """Whether an input is for the plain layer, with its rounded weight."""
        return not self._multiplies or super().runs_plainly(input)

    def _matrix_product(self, rows: Tensor, scale: Tensor) -> Tensor:
        """Multiply ``(N, in)`` int8 by a weight that is packed as a matrix; ``(N, out)``."""
        zero, none = torch.zeros(1, dtype=torch.int32), torch.zeros_like(self._scales).char()
        return _ops.qlinear_pointwise.tensor(
            rows,
            scale,
            zero,
            self._weight,
            self._scales,
            none,
            self.small_bias,
            1.0,
            0,
            self._precision,
            "none",
            [],
            "",
        )


class QuantizedConv2d(Quantized, PackedConv2d):
    """A convolution in int8; what it returns lies with the channels last.

    The order in which oneDNN wants the weight of a convolution depends on the input's size and on
    the number of threads; otherwise it is brought into it at every call, which for a wide layer, of
    coarse features, takes as long as all the rest. There a convolution runs as a product of
    matrices, which has one order for all.
    """

    @property
    def _as_matrix(self) -> bool:
        simple = self.groups == 1 and self.dilation == (1, 1)
        return simple and self.out_channels >= _WIDE

    def _lay_out(self, whole: Tensor) -> Tensor:
        if self._as_matrix:
            return _ops.qlinear_prepack(whole.permute(0, 2, 3, 1).flatten(1), None)
        size = [2, self.in_channels, _SIDE, _SIDE]
        scale, zero = 1.0, 128  # which is 0 in uint8, all that this operator takes
        return _ops.qconv_prepack(
            whole.contiguous(),
            self._scales,
            scale,
            zero,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            size,
        )

    def _whole(self) -> Tensor:
        whole = self._weight.to_dense()
        if not self._as_matrix:
            return whole
        kernel = (self.out_channels, *self.kernel_size, self.in_channels)
        return whole.t().reshape(kernel).permute(0, 3, 1, 2)

    def forward(self, input: Tensor) -> Tensor:
        """Convolve ``(B, C, H, W)``."""
        if self.runs_plainly(input):
            return self._conv_forward(input, self.weight, self.bias)
        x, padding = input.to(self._precision), self.padding
        if self.padding_mode != "zeros":
            x = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = (0, 0)
        rows = x.permute(0, 2, 3, 1).contiguous()  # (B, H, W, C)
        if not self._as_matrix:
            whole, scale = _round(rows, torch.uint8)
            return self._convolution(whole.permute(0, 3, 1, 2), scale, padding)
        whole, scale = _round(rows, torch.int8)
        down, across = (int(side) for side in padding)
        whole = F.pad(whole, (0, 0, across, across, down, down))
        for dim in (1, 2):
            whole = whole.unfold(dim, self.kernel_size[dim - 1], self.stride[dim - 1])
        taps = whole.permute(0, 1, 2, 4, 5, 3)  # (B, H, W, kernel, kernel, C)
        product = self._matrix_product(taps.reshape(-1, taps[0, 0, 0].numel()), scale)
        return product.view(*taps.shape[:3], -1).permute(0, 3, 1, 2)

    def _convolution(self, x: Tensor, scale: Tensor, padding: Any) -> Tensor:
        zero = torch.full((1,), 128, dtype=torch.int32)
        return _ops.qconv2d_pointwise.tensor(
            x,
            scale,
            zero,
            self._weight,
            self._scales,
            torch.zeros_like(self._scales).char(),
            self.small_bias,
            self.stride,
            padding,
            self.dilation,
            self.groups,
            1.0,
            0,
            self._precision,
            "none",
            [],
            "",
        )


class QuantizedLinear(Quantized, PackedLinear):
    """A linear layer in int8."""

    def _lay_out(self, whole: Tensor) -> Tensor:
        return _ops.qlinear_prepack(whole, None)

    def _whole(self) -> Tensor:
        return self._weight.to_dense().t()

    def forward(self, input: Tensor) -> Tensor:
        """Map ``(…, in_features)`` to ``(…, out_features)``."""
        if self.runs_plainly(input):
            return F.linear(input, self.weight, self.bias)
        rows = input.to(self._precision).reshape(-1, self.in_features)
        return self._matrix_product(*_round(rows, torch.int8)).view(*input.shape[:-1], -1)


def _round(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return whole numbers q and a scale s with x about s q; in uint8 these are q + 128.

    Args:
        x: Contiguous, float32 or bfloat16.
        dtype: int8 or uint8.

    Returns:
        q of x's shape, and s, ``(1,)`` float32.
    """
    flat, size = x.view(-1), _CHUNK * torch.get_num_threads()
    # without the sign, bits of floating-point numbers are in the order of these
    bits, signless = torch.int32, 0x7FFFFFFF
    if x.dtype is torch.bfloat16:
        bits, signless = torch.int16, 0x7FFF
    magnitudes = torch.empty(min(size, flat.numel()), dtype=bits)
    largest = [
        torch.bitwise_and(part, signless, out=magnitudes[: part.numel()]).amax()
        for part in flat.view(bits).split(size)
    ]
    scale = torch.stack(largest).amax().view(x.dtype).float().clamp(min=_LEAST) / _MOST
    inverse = 1 / scale.item()
    zero = torch.full((1,), _WHOLE + (128 if dtype is torch.uint8 else 0))
    rounded, numbers = flat.new_empty(flat.shape, dtype=dtype), torch.empty(magnitudes.shape)
    for part, into in zip(flat.split(size), rounded.split(size), strict=True):
        some = numbers[: part.numel()]
        wide = part if part.dtype is torch.float32 else some.copy_(part)
        torch.add(zero, wide, alpha=inverse, out=some)
        into.copy_(some.view(torch.int32))
    return rounded.view(x.shape), scale.view(1)
