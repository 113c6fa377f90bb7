"""The decoder's layers on an NVIDIA card, for one picture [1, C, h, w] in the order of `channels_last`.

At the highest levels a tensor has half a GB, and moving it takes as long as convolving it. So what is between two
convolutions is few passes (triton_norms.py, or torch where that can't be), nothing is kept that nobody reads again, and
what is convolved is made in strips of rows. A strip has a row more on either side, which its neighbours' convolution
looks at, and statistics come from the whole picture: strips are exact.
"""

from collections.abc import Callable
from functools import cache, partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.memory import SCORES, STRIP
from engine.tiles import spans
from engine.torch_backend.triton_card import held, launch, refusal

if TYPE_CHECKING:
    from engine.torch_backend.autoencoder import Attention, GroupNorm, ResnetBlock2D, Upsample2D

PARTS = 1024  # programs that sum, about eight for each multiprocessor
SUMMED, MAPPED = 4096, 8192  # values that a program sums or changes at a time
Statistics = tuple[Tensor, Tensor]  # mean and variance of each channel's group, float32 [C]
Prepare = Callable[[Tensor, bool], Tensor]  # a strip, and whether the result may take its place -> what is convolved


def on_card(x: Tensor) -> bool:
    return x.is_cuda


def resnet(block: "ResnetBlock2D", x: Tensor) -> Tensor:
    """Alive are x, the first convolution's result, which the second's replaces, and strips."""

    def beside(rows: slice) -> Tensor:
        return x[:, :, rows] if block.conv_shortcut is None else block.conv_shortcut(x[:, :, rows])

    out = convolved(block.conv1, x, normalising(block.norm1, x))
    return convolved(block.conv2, out, normalising(block.norm2, out), beside, spent=True)


def upsampled(layer: "Upsample2D", x: Tensor) -> Tensor:
    return convolved(layer.conv, x, lambda part, _: passes().doubled(part), scale=2)


def convolved(
    conv: nn.Conv2d,
    x: Tensor,
    prepare: Prepare,
    beside: Callable[[slice], Tensor] | None = None,
    *,
    scale: int = 1,
    spent: bool = False,
) -> Tensor:
    """The 3 x 3 convolution of what `prepare` makes of x, `scale` times its size; `beside` gives rows to add to it.

    Where x is `spent`, the result may be written over it.
    """
    assert conv.bias is not None
    convolve = partial(F.conv2d, weight=conv.weight, padding=1)
    height, width = x.shape[2:]
    strips = spans(height, max(1, STRIP // (scale**2 * x[:, :, 0].nbytes)))
    if len(strips) == 1:
        product = in_order(convolve(prepare(x, spent)))
        return passes().add(product, conv.bias, beside and beside(slice(None)), product)
    shape = 1, conv.out_channels, scale * height, scale * width
    fits = spent and x.shape == shape
    out = x if fits else torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    ready = (prepare(x[:, :, max(0, start - 1) : stop + 1], False) for start, stop in strips)
    waiting = [next(ready)]
    for start, stop in strips:
        product = in_order(convolve(waiting.pop()))
        waiting.extend(islice(ready, 1))  # made now, because its upper row may be written over
        first = scale * min(1, start)
        inside = product[:, :, first : first + scale * (stop - start)]
        rows, target = slice(start, stop), slice(scale * start, scale * stop)
        passes().add(inside, conv.bias, beside and beside(rows), out[:, :, target])
        del product, inside  # else the next would be made beside them
    return out


def normalising(norm: "GroupNorm", x: Tensor, silu: bool = True) -> Prepare:
    """A function that norms any rows of x by the statistics of all of it, or by those that were recorded."""
    if norm.statistics is None:
        found = passes().statistics(x, norm.num_groups)
        if norm.recording:
            norm.statistics = found
    else:
        found = norm.statistics
    return lambda part, spent: passes().normed(part, norm, found, silu, spent)


def attention(layer: "Attention", x: Tensor) -> Tensor:
    pixels = normalising(layer.group_norm, x, silu=False)(x, False).permute(0, 2, 3, 1).flatten(0, 2)
    out = layer.to_out[0](attended(layer.to_q(pixels), layer.to_k(pixels), layer.to_v(pixels)))
    return out.view(x.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2).add_(x)


def attended(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """One head's attention [pixels, C], some queries at a time. Flash attention and cuDNN's end at 256 features;
    torch's plain way makes all scores at once, in float32: 2 GB with their softmax for 1024 x 1024 pixels."""
    query = query * query.shape[1] ** -0.5
    out = torch.empty_like(query)
    for start, stop in spans(len(query), max(1, SCORES // (4 * len(key)))):
        weights = scores(query[start:stop], key).softmax(1).to(value.dtype)
        torch.mm(weights, value, out=out[start:stop])
    return out


def scores(query: Tensor, key: Tensor) -> Tensor:
    """query key^T, float32; only for a card torch has the product of bfloat16 that isn't rounded to it."""
    if query.is_cuda and query.dtype == torch.bfloat16:
        return torch.mm(query, key.t(), out_dtype=torch.float32)
    return query.float() @ key.float().t()


def in_order(x: Tensor) -> Tensor:
    """What the kernels rely on. cuDNN gives it; another way to convolve may not."""
    return x.contiguous(memory_format=torch.channels_last)


class Plain:
    """What is between two convolutions, by torch alone."""

    def statistics(self, x: Tensor, groups: int) -> Statistics:
        """Of all pixels of x. torch's own group norm on a card would copy x into another order."""
        rows = x.permute(0, 2, 3, 1).flatten(0, 2)
        sums = rows.sum(0, dtype=torch.float32), torch.linalg.vector_norm(rows, 2, 0, dtype=torch.float32).square()
        mean, square = (each.view(groups, -1).mean(1) / len(rows) for each in sums)
        each = x.shape[1] // groups
        return mean.repeat_interleave(each), (square - mean.square()).clamp_min(0).repeat_interleave(each)

    def normed(self, x: Tensor, norm: "GroupNorm", found: Statistics, silu: bool, spent: bool) -> Tensor:
        """x by the statistics `found`, then SiLU where wanted; where x is `spent`, in its place."""
        out = F.batch_norm(x, *found, norm.weight.float(), norm.bias.float(), eps=norm.eps)
        return F.silu(out, inplace=True) if silu else out

    def doubled(self, x: Tensor) -> Tensor:
        """Every pixel four times: twice as high, twice as wide."""
        return F.interpolate(x, scale_factor=2.0, mode="nearest")

    def add(self, x: Tensor, bias: Tensor, beside: Tensor | None, out: Tensor) -> Tensor:
        """x + bias (+ `beside`) in `out`, which may be x."""
        torch.add(x, bias[:, None, None], out=out)
        return out if beside is None else out.add_(beside)


class Fused(Plain):
    """The same in Triton: two passes for statistics, of which one is over x, and one for everything else."""

    def __init__(self) -> None:
        from engine.torch_backend import triton_norms

        self.kernels: Any = triton_norms

    def statistics(self, x: Tensor, groups: int) -> Statistics:
        pixels, width = x[:, 0].numel(), x.shape[1]
        tile, across = _tile(SUMMED, width)
        share = tile["ROWS"] * -(-pixels // (tile["ROWS"] * max(1, PARTS // across)))
        parts = -(-pixels // share)
        sums = torch.empty(parts, 2, width, device=x.device)
        launch(self.kernels.channel_sums, (parts * across,), x, sums, pixels, width, share, **tile)
        mean, variance = torch.empty(2, width, device=x.device)
        size = width // groups
        block = 1 << (size - 1).bit_length()
        launch(
            self.kernels.group_statistics, (groups,),
            sums, x, mean, variance, pixels, width, parts, size, PARTS=max(1, 512 // block), SIZE=block, num_warps=4
        )
        return mean, variance

    def normed(self, x: Tensor, norm: "GroupNorm", found: Statistics, silu: bool, spent: bool) -> Tensor:
        out = x if spent else torch.empty_like(x)
        self._map("normed", x, *found, norm.weight, norm.bias, out, eps=norm.eps, SILU=silu)
        return out

    def doubled(self, x: Tensor) -> Tensor:
        _, width, lines, columns = x.shape
        shape = 1, width, 2 * lines, 2 * columns
        out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        self._map("doubled", x, out, columns=columns)
        return out

    def add(self, x: Tensor, bias: Tensor, beside: Tensor | None, out: Tensor) -> Tensor:
        self._map("summed", x, bias, x if beside is None else beside, out, BESIDE=beside is not None)
        return out

    def _map(self, name: str, x: Tensor, *others: Tensor, **options: float) -> None:
        pixels, width = x[:, 0].numel(), x.shape[1]
        tile, across = _tile(MAPPED, width)
        grid = (-(-pixels // tile["ROWS"]) * across,)
        launch(getattr(self.kernels, name), grid, x, *others, pixels=pixels, width=width, **options, **tile)


def _tile(values: int, width: int) -> tuple[dict[str, int], int]:
    """What a program takes, and how many of those are side by side."""
    channels = min(128, 1 << (width - 1).bit_length())
    return {"ROWS": values // channels, "CHANNELS": channels, "num_warps": 4}, -(-width // channels)


@cache
def passes() -> Plain:
    return Plain() if refusal("the decoder's norms", check) else Fused()


@torch.inference_mode()
def check(device: torch.device) -> None:
    """Every kernel on a small random picture against torch, with a rest in every size. Raises Wrong."""
    from engine.torch_backend.autoencoder import GroupNorm

    random = torch.Generator().manual_seed(0)
    ours, plain = Fused(), Plain()

    def normal(*shape: int) -> Tensor:
        return in_order(torch.randn(shape, generator=random).bfloat16().to(device))

    def check_statistics(x: Tensor) -> Statistics:
        found = ours.statistics(x, 32)
        for what, each, exact in zip(("a mean", "a variance"), found, plain.statistics(x.float(), 32), strict=True):
            held(what, each, exact)
        return found

    def check_sum(x: Tensor, bias: Tensor, beside: Tensor | None) -> None:
        exact = x.float() + bias.float()[:, None, None] + (0 if beside is None else beside.float())
        held("a sum", ours.add(x, bias, beside, torch.empty_like(x)), exact)

    x, other = 4 + normal(1, 160, 9, 31), normal(1, 160, 9, 31)
    norm = GroupNorm(32, 160).to(device, torch.bfloat16).requires_grad_(False)
    norm.weight.copy_(normal(1, 160, 1, 1).view(-1))
    norm.bias.copy_(normal(1, 160, 1, 1).view(-1))
    found = check_statistics(x)
    held("a doubling", ours.doubled(x), plain.doubled(x))
    for silu in (False, True):
        exact = F.group_norm(x.float(), 32, norm.weight.float(), norm.bias.float(), norm.eps)
        held("a norm", ours.normed(x, norm, found, silu, False), F.silu(exact) if silu else exact)
    check_sum(x, norm.bias, None)
    check_sum(x, norm.bias, other)
    # the decoder's own widths: a kernel for each size of a group, and one for three colours
    for channels in (128, 256, 512):
        check_statistics(4 + normal(1, channels, 9, 31))
    check_sum(normal(1, 3, 9, 31), normal(1, 3, 1, 1).view(-1), None)
