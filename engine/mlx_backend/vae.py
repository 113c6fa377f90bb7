"""Latents to pixels and back: FLUX.2's autoencoder in MLX, with diffusers' names; only the half in use is loaded.

A big picture is decoded in tiles, as the torch twin does it: what looks at the whole picture (the attention of the
lowest level, and the statistics of the group norms) is taken from the whole before.

It knows nothing of prompts or noise. Inside, pictures are [B, height, width, channels], MLX's order for convolutions,
where the files have channels first.
"""

import math
from collections.abc import Callable, Mapping
from itertools import product
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from mlx import nn

from engine.fitting import sensible
from engine.memory import TILE_HALO
from engine.mlx_backend import linear
from engine.mlx_backend.fused import affine, silu
from engine.packs import Component
from engine.tiles import mosaic, spans

PATCH = 2  # latent pixels a token side
NORM_EPS = 1e-6

Check = Callable[[], None]


class Statistics(NamedTuple):
    """Of every channel, float32 [C]."""

    mean: mx.array
    variance: mx.array


class GroupNorm(nn.GroupNorm):
    """A group norm that can take its statistics from an earlier call: `recording`, it keeps those of what passes."""

    def __init__(self, groups: int, channels: int) -> None:
        super().__init__(groups, channels, eps=NORM_EPS, pytorch_compatible=True)
        self.recording = False
        self.statistics: Statistics | None = None

    def __call__(self, x: mx.array) -> mx.array:
        if self.recording:
            grouped = mx.unflatten(x.astype(mx.float32), -1, (self.num_groups, -1))
            each = self.dims // self.num_groups
            mean, variance = (
                mx.repeat(of(grouped, axis=(0, 1, 2, 4)), each) for of in (mx.mean, mx.var)
            )
            mx.eval(mean, variance)
            self.statistics = Statistics(mean, variance)
        if self.statistics is None:
            return super().__call__(x)
        mean, variance = self.statistics
        scale = self.weight.astype(mx.float32) * mx.rsqrt(variance + self.eps)
        return affine(x, scale, self.bias.astype(mx.float32) - mean * scale)


class ResnetBlock2D(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = GroupNorm(groups, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = GroupNorm(groups, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def __call__(self, x: mx.array) -> mx.array:
        out = self.conv1(silu(self.norm1(x)))
        out = self.conv2(silu(self.norm2(out)))
        return (self.conv_shortcut(x) if "conv_shortcut" in self else x) + out


class Attention(nn.Module):
    """One head over all pixels of the middle of the autoencoder."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = GroupNorm(groups, channels)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = [nn.Linear(channels, channels)]

    def __call__(self, x: mx.array) -> mx.array:
        pixels = self.group_norm(x).flatten(1, 2)[:, None]
        query, key, value = self.to_q(pixels), self.to_k(pixels), self.to_v(pixels)
        out = mx.fast.scaled_dot_product_attention(query, key, value, scale=x.shape[-1] ** -0.5)
        return x + self.to_out[0](out[:, 0]).reshape(x.shape)


class UNetMidBlock2D(nn.Module):
    def __init__(self, channels: int, groups: int, add_attention: bool) -> None:
        super().__init__()
        self.attentions = [Attention(channels, groups)] if add_attention else []
        self.resnets = [ResnetBlock2D(channels, channels, groups) for _ in range(2)]

    def __call__(self, x: mx.array) -> mx.array:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class Downsample2D(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def __call__(self, x: mx.array) -> mx.array:
        return self.conv(mx.pad(x, [(0, 0), (0, 1), (0, 1), (0, 0)]))  # one row below, one column to the right


class Upsample2D(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def __call__(self, x: mx.array) -> mx.array:
        batch, rows, columns, channels = x.shape
        doubled = mx.broadcast_to(x[:, :, None, :, None], (batch, rows, 2, columns, 2, channels))
        return self.conv(doubled.reshape(batch, 2 * rows, 2 * columns, channels))


class DownEncoderBlock2D(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, layers: int, groups: int, last: bool) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * (layers - 1)
        self.resnets = [ResnetBlock2D(width, out_channels, groups) for width in widths]
        self.downsamplers = [] if last else [Downsample2D(out_channels)]

    def __call__(self, x: mx.array) -> mx.array:
        for layer in (*self.resnets, *self.downsamplers):
            x = layer(x)
        return x


class UpDecoderBlock2D(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, layers: int, groups: int, last: bool) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * (layers - 1)
        self.resnets = [ResnetBlock2D(width, out_channels, groups) for width in widths]
        self.upsamplers = [] if last else [Upsample2D(out_channels)]

    def __call__(self, x: mx.array) -> mx.array:
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x)
        return x


class Encoder(nn.Module):
    """Picture [B, H, W, 3] -> mean and log-variance of its latents [B, h, w, 2 c]."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        widths, layers, groups = config["block_out_channels"], config["layers_per_block"], config["norm_num_groups"]
        pairs = zip([widths[0], *widths], widths, strict=False)
        self.conv_in = nn.Conv2d(config["in_channels"], widths[0], 3, padding=1)
        self.down_blocks = [
            DownEncoderBlock2D(*pair, layers, groups, last=level == len(widths) - 1) for level, pair in enumerate(pairs)
        ]
        self.mid_block = UNetMidBlock2D(widths[-1], groups, config.get("mid_block_add_attention", True))
        self.conv_norm_out = GroupNorm(groups, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * config["latent_channels"], 3, padding=1)

    def __call__(self, x: mx.array, check: Check) -> mx.array:
        x = self.conv_in(x)
        for block in (*self.down_blocks, self.mid_block):
            check()
            x = block(x)
            mx.eval(x)
        return self.conv_out(silu(self.conv_norm_out(x)))


class Decoder(nn.Module):
    """Latents [B, h, w, c] -> picture [B, H, W, 3]."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        widths = list(reversed(config.get("decoder_block_out_channels") or config["block_out_channels"]))
        layers, groups = config["layers_per_block"] + 1, config["norm_num_groups"]
        pairs = zip([widths[0], *widths], widths, strict=False)
        self.conv_in = nn.Conv2d(config["latent_channels"], widths[0], 3, padding=1)
        self.mid_block = UNetMidBlock2D(widths[0], groups, config.get("mid_block_add_attention", True))
        self.up_blocks = [
            UpDecoderBlock2D(*pair, layers, groups, last=level == len(widths) - 1) for level, pair in enumerate(pairs)
        ]
        self.conv_norm_out = GroupNorm(groups, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config["out_channels"], 3, padding=1)

    def __call__(self, x: mx.array, check: Check) -> mx.array:
        return self.high_levels(self.low_levels(x, check), check)

    def low_levels(self, x: mx.array, check: Check) -> mx.array:
        """Latents -> features [B, h, w, C]: where the attention is, so always the whole picture."""
        check()
        return self.mid_block(self.conv_in(x))

    def high_levels(self, x: mx.array, check: Check) -> mx.array:
        """Features of the whole picture or of a part of it -> its pixels."""
        for block in self.up_blocks:
            mx.eval(x)  # a block at a time: a cancel needn't wait for all, and two blocks' pictures never coexist
            check()
            x = block(x)
        return self.conv_out(silu(self.conv_norm_out(x)))


class BatchNorm2d(nn.Module):
    """The statistics with which tokens were normalised in training; one per channel of a token."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.running_mean = mx.zeros(channels)
        self.running_var = mx.ones(channels)


class AutoencoderKLFlux2(nn.Module):
    """Made from the released config.json; `half` is 'encoder' or 'decoder', the other one stays on disk."""

    def __init__(self, config: Mapping[str, Any], half: str) -> None:
        super().__init__()
        latent = config["latent_channels"]
        if half == "encoder":
            self.encoder = Encoder(config)
            if config.get("use_quant_conv", True):
                self.quant_conv = nn.Conv2d(2 * latent, 2 * latent, 1)
        else:
            self.decoder = Decoder(config)
            if config.get("use_post_quant_conv", True):
                self.post_quant_conv = nn.Conv2d(latent, latent, 1)
        self.bn = BatchNorm2d(math.prod(config["patch_size"]) * latent)


class PictureDecoder:
    def __init__(self, component: Component, dtype: mx.Dtype) -> None:
        """Raises EngineError when the tensors don't fit the configuration."""
        self.vae = loaded(component, dtype, "decoder")
        self.dtype = dtype
        self.eps = component.config["batch_norm_eps"]
        decoder = self.vae.decoder
        inside = [module for block in decoder.up_blocks for module in block.modules()]
        self._norms = [each for each in (*inside, decoder.conv_norm_out) if isinstance(each, GroupNorm)]
        self._pixels_per_cell = 2 ** (len(decoder.up_blocks) - 1)

    def decode(self, latents: mx.array, grid: tuple[int, int], check: Check, tile: int = 0) -> np.ndarray:
        """Denoised tokens [1, rows * columns, C] -> pixels uint8 [height, width, 3]. `grid` is (rows, columns).

        `tile` pixels a side are decoded at a time, 0: all at once. `check` is called before every block of the decoder,
        and so within every tile; what it raises ends the work.
        """
        image = self.image(latents, grid, check, tile)
        return np.rint((image.clip(-1, 1) + 1) * np.float32(127.5)).astype(np.uint8)

    def image(self, latents: mx.array, grid: tuple[int, int], check: Check, tile: int = 0) -> np.ndarray:
        """The same tokens -> float32 [height, width, 3], -1 black and 1 white, not yet clamped."""
        z = unpatchify(denormalize(self.vae.bn, latents, self.eps), grid).astype(self.dtype)
        if "post_quant_conv" in self.vae:
            z = self.vae.post_quant_conv(z)
        features = self.vae.decoder.low_levels(z, check)
        cells = tile // self._pixels_per_cell
        if not tile or max(features.shape[1:3]) <= cells:
            return as_numpy(self.vae.decoder.high_levels(features, check))
        return self._tiled(features, cells, check)

    def _tiled(self, features: mx.array, cells: int, check: Check) -> np.ndarray:
        """Pixels float32 [height, width, 3] of features [1, h, w, C], `cells` a side at a time."""
        _, rows, columns, _ = features.shape
        scale, halo = self._pixels_per_cell, TILE_HALO * PATCH
        image = np.empty((rows * scale, columns * scale, 3), np.float32)
        try:
            self._record_statistics(features, cells + 2 * halo, check)
            for (top, bottom), (left, right) in product(spans(rows, cells), spans(columns, cells)):
                above, before = max(0, top - halo), max(0, left - halo)
                part = features[:, above : bottom + halo, before : right + halo]
                pixels = as_numpy(self.vae.decoder.high_levels(part, check))[(top - above) * scale :]
                pixels = pixels[: (bottom - top) * scale, (left - before) * scale :][:, : (right - left) * scale]
                image[top * scale : bottom * scale, left * scale : right * scale] = pixels
        finally:
            for norm in self._norms:
                norm.statistics = None
        return image

    def _record_statistics(self, features: mx.array, cells: int, check: Check) -> None:
        """Run the high levels over a mosaic of small patches from everywhere, together as big as a tile of `cells`, for
        the statistics of all group norms."""
        _, height, width, _ = features.shape
        step = math.ceil(math.sqrt(height * width) / cells)
        rows, columns = (mx.array(mosaic(size, step)) for size in (height, width))
        for norm in self._norms:
            norm.recording = True
        try:
            mx.eval(self.vae.decoder.high_levels(features[:, rows][:, :, columns], check))
        finally:
            for norm in self._norms:
                norm.recording = False


class PictureEncoder:
    """The other direction, for a picture that is to be worked on."""

    def __init__(self, component: Component, dtype: mx.Dtype) -> None:
        """Raises EngineError when the tensors don't fit the configuration."""
        self.vae = loaded(component, dtype, "encoder")
        self.dtype = dtype
        self.eps = component.config["batch_norm_eps"]

    def encode(self, pixels: np.ndarray, check: Check) -> mx.array:
        """Pixels uint8 [height, width, 3] -> tokens float32 [1, rows * columns, C], the most likely ones."""
        picture = mx.array(pixels[None]).astype(mx.float32) / 127.5 - 1
        moments = self.vae.encoder(picture.astype(self.dtype), check)
        if "quant_conv" in self.vae:
            moments = self.vae.quant_conv(moments)
        mean, _ = mx.split(moments.astype(mx.float32), 2, axis=-1)
        scale, shift = statistics(self.vae.bn, self.eps)
        return (patchify(mean) - shift) / scale


def loaded(component: Component, dtype: mx.Dtype, half: str) -> AutoencoderKLFlux2:
    """One half of the autoencoder with its tensors; they are read when they are first used."""
    with sensible(component.folder):
        vae = AutoencoderKLFlux2(component.config, half)
    other = ("encoder.", "quant_conv.") if half == "decoder" else ("decoder.", "post_quant_conv.")
    unused = (*other, "bn.num_batches_tracked")
    linear.build(vae, component, dtype, unused=unused, layout=channels_last)
    return vae


def as_numpy(picture: mx.array) -> np.ndarray:
    """[1, height, width, 3] -> float32 [height, width, 3]."""
    return np.array(picture[0].astype(mx.float32))


def channels_last(tensor: mx.array) -> mx.array:
    """A convolution's weight [out, in, rows, columns] in MLX's order [out, rows, columns, in]; others as they are."""
    return tensor.transpose(0, 2, 3, 1) if tensor.ndim == 4 else tensor


def statistics(bn: BatchNorm2d, eps: float) -> tuple[mx.array, mx.array]:
    """(scale, shift) of a token's channels, float32 [C]."""
    return mx.sqrt(bn.running_var.astype(mx.float32) + eps), bn.running_mean.astype(mx.float32)


def denormalize(bn: BatchNorm2d, tokens: mx.array, eps: float) -> mx.array:
    scale, shift = statistics(bn, eps)
    return tokens.astype(mx.float32) * scale + shift


def unpatchify(tokens: mx.array, grid: tuple[int, int]) -> mx.array:
    """[1, rows * columns, 4 c] -> [1, 2 rows, 2 columns, c]: each token is a 2 x 2 patch, its channels slowest."""
    rows, columns = grid
    patches = tokens.reshape(1, rows, columns, -1, PATCH, PATCH)
    return patches.transpose(0, 1, 4, 2, 5, 3).reshape(1, rows * PATCH, columns * PATCH, -1)


def patchify(latents: mx.array) -> mx.array:
    """The inverse: [1, 2 rows, 2 columns, c] -> [1, rows * columns, 4 c]."""
    _, height, width, channels = latents.shape
    patches = latents.reshape(1, height // PATCH, PATCH, width // PATCH, PATCH, channels)
    return patches.transpose(0, 1, 3, 5, 2, 4).reshape(1, -1, channels * PATCH * PATCH)
