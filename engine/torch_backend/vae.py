"""Latents to pixels: diffusers' FLUX.2 autoencoder, of which only the decoder is loaded.

A big picture is decoded in tiles. Two things look beyond a tile: the attention of the lowest level, which therefore
sees the whole picture (at an eighth of its size that is cheap), and the group norms, whose statistics every tile takes
from one coarse pass over the whole. So tiles have no seams to blend: with the halo around each, which its convolutions
look at, they fit to less than rounding.

It knows nothing of prompts or noise. diffusers is imported when a decoder is made.
"""

import math
from collections.abc import Callable
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.fitting import sensible
from engine.memory import TILE_HALO
from engine.packs import Component
from engine.tiles import mosaic, spans
from engine.torch_backend import linear

PATCH = 2  # latent pixels a token side


class SharedGroupNorm(nn.Module):
    """A group norm that can take its statistics from an earlier call: `recording`, it keeps those of what passes."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.norm = norm
        self.recording = False
        self.statistics: tuple[Tensor, Tensor] | None = None  # mean and variance of every channel, float32 [C]

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        if self.statistics is not None:
            mean, variance = self.statistics
            return F.batch_norm(x, mean, variance, norm.weight.float(), norm.bias.float(), eps=norm.eps)
        if x.is_cuda:
            mean, variance = by_channel(x, norm.num_groups)
            if self.recording:
                self.statistics = mean, variance
            return F.batch_norm(x, mean, variance, norm.weight.float(), norm.bias.float(), eps=norm.eps)
        if not self.recording:
            return norm(x)
        groups, channels = norm.num_groups, norm.num_channels
        out, mean, inverse = torch.native_group_norm(
            x, norm.weight, norm.bias, 1, channels, x[0, 0].numel(), groups, norm.eps
        )
        each = channels // groups
        variance = inverse.float() ** -2 - norm.eps
        self.statistics = mean.float()[0].repeat_interleave(each), variance[0].repeat_interleave(each)
        return out


def by_channel(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Mean and variance of a channel's group, float32 [C] each, of x [1, C, h, w] in the order of `channels_last`,
    which torch's own group norm on a card would copy into another order."""
    rows = x.permute(0, 2, 3, 1).flatten(0, 2)
    sums = rows.sum(0, dtype=torch.float32), torch.linalg.vector_norm(rows, 2, 0, dtype=torch.float32).square()
    mean, square = (each.view(groups, -1).mean(1) / len(rows) for each in sums)
    each = x.shape[1] // groups
    return mean.repeat_interleave(each), (square - mean.square()).clamp_min(0).repeat_interleave(each)


class PictureDecoder:
    def __init__(self, component: Component, dtype: torch.dtype, device: torch.device) -> None:
        """Raises EngineError when the tensors don't fit the configuration."""
        from diffusers import AutoencoderKLFlux2

        with torch.device("meta"), sensible(component.folder):
            self.vae = AutoencoderKLFlux2.from_config(component.config)
        self.vae.encoder = self.vae.quant_conv = None
        self.files = linear.build(self.vae, component, dtype, device, unused=("encoder.", "quant_conv."))
        self.dtype = dtype
        self._check: Callable[[], None] = lambda: None
        decoder = self.vae.decoder
        for block in (decoder.mid_block, *decoder.up_blocks):
            block.register_forward_pre_hook(lambda *_: self._check())
        for module in decoder.modules():
            if isinstance(module, nn.SiLU):
                module.inplace = True  # it always follows a norm, whose result nobody else wants
        if device.type == "cuda":
            decoder.to(memory_format=torch.channels_last)  # else every convolution would copy its weights first
        decoder.conv_norm_out = SharedGroupNorm(decoder.conv_norm_out)
        self._norms = [decoder.conv_norm_out, *shared_norms(decoder.up_blocks)]
        self._pixels_per_cell = 2 ** (len(decoder.up_blocks) - 1)

    @torch.inference_mode()
    def decode(
        self, latents: Tensor, grid: tuple[int, int], check: Callable[[], None], tile: int = 0
    ) -> np.ndarray:
        """Denoised tokens [1, rows * columns, C] -> pixels uint8 [height, width, 3]. `grid` is (rows, columns).

        `tile` pixels a side are decoded at a time, 0: all at once. `check` is called before every tile and every block
        of the decoder; what it raises ends the work.
        """
        self._check = check
        image = self.image(latents, grid, tile)
        return image.clamp_(-1, 1).add_(1).mul_(127.5).round_().to(torch.uint8).permute(1, 2, 0).cpu().numpy()

    @torch.inference_mode()
    def image(self, latents: Tensor, grid: tuple[int, int], tile: int = 0) -> Tensor:
        """The same tokens -> float32 [3, height, width], -1 black and 1 white, not yet clamped.

        Tokens were normalised per channel in training, with the statistics that the autoencoder carries as `bn`.
        """
        bn = self.vae.bn
        scale = (bn.running_var.float() + self.vae.config.batch_norm_eps).sqrt()
        tokens = latents.float() * scale + bn.running_mean.float()
        features = self._low_levels(unpatchify(tokens, grid).to(self.dtype))
        cells = tile // self._pixels_per_cell
        if not tile or max(features.shape[-2:]) <= cells:
            return self._high_levels(features)[0].float()
        return self._tiled(features, cells)

    def _low_levels(self, z: Tensor) -> Tensor:
        """Latents [1, c, h, w] -> features [1, C, h, w]: where the attention is, so always the whole picture."""
        if self.vae.post_quant_conv is not None:
            z = self.vae.post_quant_conv(z)
        return self.vae.decoder.mid_block(self.vae.decoder.conv_in(channels_last(z)))

    def _high_levels(self, x: Tensor) -> Tensor:
        """Features of the whole picture or of a part of it -> its pixels [1, 3, height, width]."""
        decoder = self.vae.decoder
        x = channels_last(x)
        for block in decoder.up_blocks:
            x = block(x)
        return decoder.conv_out(decoder.conv_act(decoder.conv_norm_out(x)))

    def _tiled(self, features: Tensor, cells: int) -> Tensor:
        """Pixels float32 [3, height, width] of features [1, C, h, w], `cells` a side at a time."""
        rows, columns = features.shape[-2:]
        scale, halo = self._pixels_per_cell, TILE_HALO * PATCH
        image = torch.empty(3, rows * scale, columns * scale, device=features.device)
        try:
            self._record_statistics(features, cells + 2 * halo)
            for (top, bottom), (left, right) in product(spans(rows, cells), spans(columns, cells)):
                self._check()
                above, before = max(0, top - halo), max(0, left - halo)
                part = self._high_levels(features[..., above : bottom + halo, before : right + halo])
                part = part[0, :, (top - above) * scale :, (left - before) * scale :]
                height, width = (bottom - top) * scale, (right - left) * scale
                target = image[:, top * scale : bottom * scale, left * scale : right * scale]
                target.copy_(part[:, :height, :width])
        finally:
            for norm in self._norms:
                norm.statistics = None
        return image

    def _record_statistics(self, features: Tensor, cells: int) -> None:
        """Run the high levels over a mosaic of small patches from everywhere, together as big as a tile of `cells`, for
        the statistics of all group norms. Every n-th feature instead would be another texture, with other statistics.
        """
        step = math.ceil(math.sqrt(features.shape[-2] * features.shape[-1]) / cells)
        rows, columns = (torch.from_numpy(mosaic(size, step)).to(features.device) for size in features.shape[-2:])
        for norm in self._norms:
            norm.recording = True
        try:
            self._high_levels(features.index_select(2, rows).index_select(3, columns))
        finally:
            for norm in self._norms:
                norm.recording = False


def channels_last(x: Tensor) -> Tensor:
    """The same values in the order that convolutions compute in: on a CPU 160 MB less at 512 x 512, and 8 %
    faster; on an H100 510 MB less at 1024 x 1024, in two thirds of the time."""
    return x.contiguous(memory_format=torch.channels_last)


def shared_norms(module: nn.Module) -> list[SharedGroupNorm]:
    """Replace every group norm inside `module`; returns the new ones."""
    made = []
    for name, child in list(module.named_modules()):
        if isinstance(child, nn.GroupNorm):
            parent, _, own = name.rpartition(".")
            made.append(SharedGroupNorm(child))
            setattr(module.get_submodule(parent), own, made[-1])
    return made


def unpatchify(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """[1, rows * columns, 4 c] -> [1, c, 2 rows, 2 columns]: each token is a 2 x 2 patch, its channels slowest."""
    rows, columns = grid
    patches = tokens.view(1, rows, columns, -1, PATCH, PATCH)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(1, -1, rows * PATCH, columns * PATCH)
