"""What an NVIDIA card does to the decoder's pictures between two convolutions, in Triton; decoder_card.py calls it.

A picture [1, C, h, w] in the order of `channels_last` is a table [pixels, C]. A program takes some pixels of CHANNELS
channels, so that layers of all widths share the same kernels; sizes that change with the picture are not specialised.
Importing this needs triton.
"""

import triton
import triton.language as tl


@triton.jit
def division(width, CHANNELS: tl.constexpr):
    """Which share of the pixels is this program's, which channels, and which of those exist. Neighbouring programs have
    the same pixels."""
    across = tl.cdiv(width, CHANNELS)
    channel = tl.program_id(0) % across * CHANNELS + tl.arange(0, CHANNELS)
    return tl.program_id(0) // across, channel, channel < width


@triton.jit
def tile(first, channel, pixels, width, ROWS: tl.constexpr):
    """Where ROWS pixels from `first` on lie, and which of their values exist."""
    row = first + tl.arange(0, ROWS)[:, None]
    place = row.to(tl.int64) * width + channel[None]  # a picture may have more than 2^31 bytes
    return place, (row < pixels) & (channel < width)[None]


@triton.jit(do_not_specialize=["pixels", "share"])
def channel_sums(x, sums, pixels, width, share, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """x [pixels, width] -> sums float32 [parts, 2, width] of each part's differences from the very first pixel, and of
    their squares: a mean far from zero then costs the variance no digits. A part has `share` pixels, whole tiles."""
    part, channel, known = division(width, CHANNELS)
    origin = tl.load(x + channel, mask=known, other=0).to(tl.float32)[None]
    total = tl.zeros((ROWS, CHANNELS), tl.float32)
    squares = tl.zeros((ROWS, CHANNELS), tl.float32)
    for first in range(part * share, (part + 1) * share, ROWS):
        place, mask = tile(first, channel, pixels, width, ROWS)
        apart = tl.where(mask, tl.load(x + place, mask=mask).to(tl.float32) - origin, 0.0)
        total += apart
        squares += apart * apart
    there = sums + part * 2 * width + channel
    tl.store(there, tl.sum(total, 0), mask=known)
    tl.store(there + width, tl.sum(squares, 0), mask=known)


@triton.jit(do_not_specialize=["pixels", "parts"])
def group_statistics(
    sums, x, mean, variance, pixels, width, parts, size, PARTS: tl.constexpr, SIZE: tl.constexpr
):  # fmt: skip
    """These sums -> mean and variance of every channel's group, float32 [width]; a program a group of `size`."""
    place = tl.arange(0, SIZE)
    known = place < size
    channel = tl.program_id(0) * size + place
    total = tl.zeros((PARTS, SIZE), tl.float32)
    squares = tl.zeros((PARTS, SIZE), tl.float32)
    for first in range(0, parts, PARTS):
        part = first + tl.arange(0, PARTS)
        mask = (part < parts)[:, None] & known[None]
        there = sums + part[:, None] * 2 * width + channel[None]
        total += tl.load(there, mask=mask, other=0)
        squares += tl.load(there + width, mask=mask, other=0)
    apart = tl.sum(total, 0) / pixels
    means = tl.load(x + channel, mask=known, other=0).to(tl.float32) + apart
    middle = tl.sum(tl.where(known, means, 0.0), 0) / size
    spread = tl.sum(squares, 0) / pixels - apart * apart + (means - middle) * (means - middle)
    whole = tl.sum(tl.where(known, spread, 0.0), 0) / size
    tl.store(mean + channel, tl.zeros((SIZE,), tl.float32) + middle, mask=known)
    tl.store(variance + channel, tl.zeros((SIZE,), tl.float32) + tl.maximum(whole, 0.0), mask=known)


@triton.jit(do_not_specialize=["pixels"])
def normed(
    x, mean, variance, weight, bias, out, pixels, width, eps, SILU: tl.constexpr, ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """The norm of x [pixels, width] by every channel's mean and variance, then SiLU where wanted; `out` may be x."""
    number, channel, known = division(width, CHANNELS)
    scale = tl.load(weight + channel, mask=known, other=0).to(tl.float32)
    scale *= tl.rsqrt(tl.load(variance + channel, mask=known, other=1) + eps)
    shift = tl.load(bias + channel, mask=known, other=0).to(tl.float32)
    shift -= tl.load(mean + channel, mask=known, other=0) * scale
    place, mask = tile(number * ROWS, channel, pixels, width, ROWS)
    value = tl.load(x + place, mask=mask).to(tl.float32) * scale[None] + shift[None]
    if SILU:
        value *= tl.sigmoid(value)
    tl.store(out + place, value, mask=mask)


@triton.jit(do_not_specialize=["pixels"])
def summed(x, bias, beside, out, pixels, width, BESIDE: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """x [pixels, width] + bias [width] (+ `beside`, as large as x) -> out, which may be either of them."""
    number, channel, known = division(width, CHANNELS)
    place, mask = tile(number * ROWS, channel, pixels, width, ROWS)
    value = tl.load(x + place, mask=mask).to(tl.float32)
    value += tl.load(bias + channel, mask=known, other=0).to(tl.float32)[None]
    if BESIDE:
        value += tl.load(beside + place, mask=mask).to(tl.float32)
    tl.store(out + place, value, mask=mask)


@triton.jit(do_not_specialize=["pixels", "columns"])
def doubled(x, out, pixels, columns, width, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """x [pixels, width], `columns` of them in a line -> out, where each pixel is four: two in each of two lines."""
    number, channel, known = division(width, CHANNELS)
    place, mask = tile(number * ROWS, channel, pixels, width, ROWS)
    value = tl.load(x + place, mask=mask)
    pixel = number * ROWS + tl.arange(0, ROWS)
    first = 4 * (pixel // columns) * columns + 2 * (pixel % columns)
    there = out + first.to(tl.int64)[:, None] * width + channel[None]
    for below in tl.static_range(2):
        for right in tl.static_range(2):
            tl.store(there + (2 * below * columns + right) * width, value, mask=mask)
