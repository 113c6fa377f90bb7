"""Latents to pixels: FLUX.2's autoencoder, of which only the decoder is loaded.

A big picture is decoded in tiles. Two things look beyond a tile: the attention of the lowest level, which therefore
sees the whole picture (at an eighth of its size that is cheap), and the group norms, whose statistics every tile takes
from one coarse pass over the whole. So tiles have no seams to blend: with the halo around each, which its convolutions
look at, they fit to less than rounding.

It knows nothing of prompts or noise.
"""

import math
from itertools import product

import numpy as np
import torch
from torch import Tensor

from engine.fitting import sensible
from engine.memory import TILE_HALO
from engine.packs import Component
from engine.tiles import mosaic, spans
from engine.torch_backend import linear
from engine.torch_backend.autoencoder import AutoencoderKLFlux2, Check, GroupNorm

PATCH = 2  # latent pixels a token side


class PictureDecoder:
    def __init__(self, component: Component, dtype: torch.dtype, device: torch.device) -> None:
        """Raises EngineError when the tensors don't fit the configuration."""
        with torch.device("meta"), sensible(component.folder):
            self.vae = AutoencoderKLFlux2(component.config)
        self.files = linear.build(self.vae, component, dtype, device, unused=("encoder.", "quant_conv."))
        self.dtype = dtype
        self._check: Check = lambda: None
        decoder = self.vae.decoder
        if device.type == "cuda":
            # else every convolution would copy its weights first
            decoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        inside = [module for block in decoder.up_blocks for module in block.modules()]
        self._norms = [each for each in (*inside, decoder.conv_norm_out) if isinstance(each, GroupNorm)]
        self._pixels_per_cell = 2 ** (len(decoder.up_blocks) - 1)

    @torch.inference_mode()
    def decode(self, latents: Tensor, grid: tuple[int, int], check: Check, tile: int = 0) -> np.ndarray:
        """Denoised tokens [1, rows * columns, C] -> pixels uint8 [height, width, 3]. `grid` is (rows, columns).

        `tile` pixels a side are decoded at a time, 0: all at once. `check` is called before every block of the
        decoder, and so within every tile; what it raises ends the work.
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
        assert bn.running_mean is not None and bn.running_var is not None
        scale = (bn.running_var.float() + bn.eps).sqrt()
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
        return self.vae.decoder.low_levels(z, self._check)

    def _high_levels(self, x: Tensor) -> Tensor:
        """Features of the whole picture or of a part of it -> its pixels [1, 3, height, width]."""
        return self.vae.decoder.high_levels(x, self._check)

    def _tiled(self, features: Tensor, cells: int) -> Tensor:
        """Pixels float32 [3, height, width] of features [1, C, h, w], `cells` a side at a time."""
        rows, columns = features.shape[-2:]
        scale, halo = self._pixels_per_cell, TILE_HALO * PATCH
        image = torch.empty(3, rows * scale, columns * scale, device=features.device)
        try:
            self._record_statistics(features, cells + 2 * halo)
            for (top, bottom), (left, right) in product(spans(rows, cells), spans(columns, cells)):
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


def unpatchify(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """[1, rows * columns, 4 c] -> [1, c, 2 rows, 2 columns]: each token is a 2 x 2 patch, its channels slowest."""
    rows, columns = grid
    patches = tokens.view(1, rows, columns, -1, PATCH, PATCH)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(1, -1, rows * PATCH, columns * PATCH)
