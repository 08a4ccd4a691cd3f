"""Decoding in stripes of rows: the picture of the whole decoder in a fraction of its memory.

Between two normalisations a decoder is local. So each of its layers is run stripe by stripe over
the whole map, every stripe with the rows beside it that its convolution looks at, and each group
normalisation takes the statistics of the whole. What comes out differs from the decoder's own
pictures by the order of sums alone, until a picture is so large that even two maps of its size do
not fit: then what is held is rounded to bfloat16.
"""

import math
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mezzotint.device import widened
from mezzotint.models.encoder_decoder import Decoder, make_room
from mezzotint.nn.resnet import ResnetBlock, Upsample

__all__ = ["decode_in_stripes"]

STRIPE = 12 << 20  # bytes of the map that a stripe is cut from
HELD = 5 << 28  # bytes of maps at a time, beyond which doubled ones are made anew when needed
NARROW = 9 << 28  # bytes of two maps, beyond which they are held in bfloat16


@torch.no_grad()
def decode_in_stripes(
    decoder: Decoder,
    z: Tensor,
    *,
    stripe: int = STRIPE,
    held: int = HELD,
    narrow: int = NARROW,
) -> Tensor:
    """Decode one picture after the other, each layer stripe by stripe.

    With Stable Diffusion's decoder 1024 x 1024 pixels take about 1.1 GB beside the weights, and
    2048 x 2048 about 2.4 GB. Where ``held`` does not suffice, upsampled maps are computed several
    times over rather than held. There are no gradients.

    Args:
        decoder: Of any first stage.
        z: ``(B, latent_channels, h, w)``.
        stripe: Bytes of a stripe, at most; of one row, if that has more.
        held: Bytes of an upsampled map and of what is made from it, at most.
        narrow: Bytes of two maps of one size, beyond which wider ones are held in bfloat16.

    Returns:
        Images ``(B, out_channels, f h, f w)``.
    """
    convolutions = (layer for layer in decoder.modules() if isinstance(layer, nn.Conv2d))
    assert all(layer.padding_mode == "zeros" for layer in convolutions), "stripes are padded so"
    return torch.cat([_Striped(stripe, held, narrow).decode(decoder, one) for one in z.split(1)])


class _Map:
    """Features ``(1, C, H, W)`` that are held, and what is computed with them in."""

    def __init__(self, held: Tensor, dtype: torch.dtype) -> None:
        self.held, self.dtype = held, dtype
        self.shape = held.shape

    @property
    def size(self) -> int:
        """In bytes, if it is held as it is computed."""
        return self.shape.numel() * self.dtype.itemsize

    def rows(self, top: int = 0, bottom: int | None = None) -> Tensor:
        """Some rows of it, ``(1, C, bottom - top, W)``, or all."""
        return self.held[:, :, top:bottom].to(self.dtype)


class _Doubled(_Map):
    """A map at twice the size, whose rows are computed whenever they are asked for."""

    def __init__(self, small: _Map, upsample: Upsample) -> None:
        super().__init__(small.held, small.dtype)
        self.small, self.upsample = small, upsample
        one, channels, height, width = small.shape
        self.shape = torch.Size((one, channels, 2 * height, 2 * width))

    def rows(self, top: int = 0, bottom: int | None = None) -> Tensor:
        bottom = self.shape[2] if bottom is None else bottom
        first = max(0, (top - 1) // 2)  # the convolution sees a row more above and below
        made = self.upsample(self.small.rows(first, bottom // 2 + 1))
        return made[:, :, top - 2 * first : bottom - 2 * first]


class _Striped:
    """Runs the parts of a decoder; its arguments are those of `decode_in_stripes`."""

    def __init__(self, stripe: int, held: int, narrow: int) -> None:
        self.stripe, self.held, self.narrow = stripe, held, narrow

    def decode(self, decoder: Decoder, z: Tensor) -> Tensor:
        h = _whole(decoder.conv_in(z))
        for part in _parts(decoder):
            if isinstance(part, ResnetBlock):
                h = self._resnet(part, h)
            elif isinstance(part, Upsample):
                h = _Doubled(h, part)
            else:
                h = _whole(part(h.rows()))
        normalised = self._normalisation(decoder.conv_norm_out, h)
        made = self._made(h, lambda a, b: _convolved(decoder.conv_out, normalised, h.rows, h, a, b))
        return made.rows()

    def _resnet(self, block: ResnetBlock, x: _Map) -> _Map:
        """As `ResnetBlock.forward`: the output takes the place of the features inside."""
        assert block.time_emb_proj is None and block.resample is None, "it is a decoder's"
        if isinstance(x, _Doubled) and self._fits(x, block):
            x = self._made(x, x.rows)
        norm1 = self._normalisation(block.norm1, x)
        h = self._made(x, lambda a, b: _convolved(block.conv1, norm1, x.rows, x, a, b))
        norm2 = self._normalisation(block.norm2, h)
        above = h.rows(0, 0)
        for top, bottom in self._stripes(max(x, h, key=lambda it: it.size)):

            def rows(first: int, end: int, top: int = top, above: Tensor = above) -> Tensor:
                if first == top:
                    return h.rows(first, end)
                # the row above the stripe is overwritten by now
                return torch.cat([above, h.rows(top, end)], dim=2)

            made = _convolved(block.conv2, norm2, rows, h, top, bottom)
            above = h.rows(bottom - 1, bottom).clone()
            beside = x.rows(top, bottom)
            if block.conv_shortcut is not None:
                beside = block.conv_shortcut(beside)
            h.held[:, :, top:bottom] = made + beside
        return h

    def _fits(self, x: _Doubled, block: ResnetBlock) -> bool:
        """Whether a doubled map can be held, beside the small one and what is made of it."""
        out = x.size // x.shape[1] * block.conv1.out_channels
        return x.size + x.size // 4 + out <= self.held

    def _made(self, like: _Map, make: Callable[[int, int], Tensor]) -> _Map:
        """Put the stripes of a map together, which is as high and as wide as another one."""
        made: _Map | None = None
        for top, bottom in self._stripes(like):
            rows = make(top, bottom)
            if made is None:
                shape = (1, rows.shape[1], *like.shape[2:])
                too_large = rows.itemsize > 2 and 2 * math.prod(shape) * rows.itemsize > self.narrow
                make_room(like.held)
                # rows of a map whose channels lie last are neighbours in memory
                held = torch.empty(
                    shape,
                    dtype=torch.bfloat16 if too_large else rows.dtype,
                    device=rows.device,
                    memory_format=torch.channels_last,
                )
                made = _Map(held, rows.dtype)
            made.held[:, :, top:bottom] = rows
        assert made is not None, "a map has rows"
        return made

    def _stripes(self, h: _Map) -> Iterator[tuple[int, int]]:
        """First rows of stripes, and the rows after their last."""
        height = h.shape[2]
        rows = max(1, self.stripe * height // h.size)
        return ((top, min(height, top + rows)) for top in range(0, height, rows))

    def _normalisation(self, norm: nn.GroupNorm, h: _Map) -> Callable[[Tensor], Tensor]:
        """A group normalisation by the statistics of a whole map.

        They are put together from those of its stripes (Chan, Golub and LeVeque 1983, equation
        2.1), for each channel, in float64.
        """
        count = 0
        mean = torch.zeros(h.shape[1], dtype=torch.float64)
        squares = torch.zeros(h.shape[1], dtype=torch.float64)
        for top, bottom in self._stripes(h):
            rows = h.rows(top, bottom)
            wide = widened(rows)
            centre = wide.mean((0, 2, 3), keepdim=True)
            # what was widened is a copy already
            centred = wide - centre if wide is rows else wide.sub_(centre)
            spread = centred.square_().sum((0, 2, 3)).cpu().double()
            more = rows.shape[2] * rows.shape[3]
            away = centre.flatten().cpu().double() - mean
            squares += spread + away.square() * (count * more / (count + more))
            mean += away * (more / (count + more))
            count += more
        means = mean.unflatten(0, (norm.num_groups, -1))
        variances = (squares / count).unflatten(0, (norm.num_groups, -1))
        variance = variances.mean(1) + means.var(1, correction=0)
        each = h.shape[1] // norm.num_groups
        device, dtype = h.held.device, torch.promote_types(h.dtype, torch.float32)
        centre, spread, weight, bias = (
            value.to(device, dtype)
            for value in (
                means.mean(1).repeat_interleave(each),
                variance.repeat_interleave(each),
                norm.weight,
                norm.bias,
            )
        )
        return lambda rows: F.batch_norm(rows, centre, spread, weight, bias, eps=norm.eps)


def _parts(decoder: Decoder) -> Iterator[nn.Module]:
    """What a decoder runs between its first and its last convolution, in order."""
    mid = cast(Any, decoder.mid_block)
    yield from (mid.resnets[0], *mid.attentions, mid.resnets[1])
    for block in cast(Any, decoder.up_blocks):
        attentions = iter(block.attentions)
        for resnet in block.resnets:
            yield resnet
            yield from islice(attentions, 1)
        yield from block.upsamplers


def _whole(features: Tensor) -> _Map:
    return _Map(features, features.dtype)


def _convolved(
    convolution: nn.Module,
    normalised: Callable[[Tensor], Tensor],
    rows: Callable[[int, int], Tensor],
    whole: _Map,
    top: int,
    bottom: int,
) -> Tensor:
    """Rows of a map, normalised and convolved; it is padded at its own edges alone."""
    first, end = max(0, top - 1), min(whole.shape[2], bottom + 1)
    made = convolution(F.silu(normalised(rows(first, end)), inplace=True))
    return made[:, :, top - first : bottom - first]
