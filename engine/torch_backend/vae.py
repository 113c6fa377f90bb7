"""Latents to pixels: diffusers' FLUX.2 autoencoder, of which only the decoder is loaded.

It knows nothing of prompts or noise. diffusers is imported when a decoder is made.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from engine.packs import Component
from engine.torch_backend import linear

PATCH = 2  # latent pixels a token side


class PictureDecoder:
    def __init__(self, component: Component, dtype: torch.dtype, device: torch.device) -> None:
        """Raises EngineError when the tensors don't fit the configuration."""
        from diffusers import AutoencoderKLFlux2

        with torch.device("meta"):
            self.vae = AutoencoderKLFlux2.from_config(component.config)
        self.vae.encoder = self.vae.quant_conv = None
        linear.build(self.vae, component, dtype, device, unused=("encoder.", "quant_conv."))
        self.dtype = dtype
        self._check: Callable[[], None] = lambda: None
        decoder = self.vae.decoder
        for block in (decoder.mid_block, *decoder.up_blocks):
            block.register_forward_pre_hook(lambda *_: self._check())

    def decode(self, latents: Tensor, grid: tuple[int, int], check: Callable[[], None]) -> np.ndarray:
        """Denoised tokens [1, rows * columns, C] -> pixels uint8 [height, width, 3]. `grid` is (rows, columns).

        `check` is called before every block of the decoder; what it raises ends the work.
        """
        self._check = check
        image = self.image(latents, grid)
        return image.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()

    @torch.inference_mode()
    def image(self, latents: Tensor, grid: tuple[int, int]) -> Tensor:
        """The same tokens -> float32 [3, height, width], -1 black and 1 white, not yet clamped.

        Tokens were normalised per channel in training, with the statistics that the autoencoder carries as `bn`.
        """
        bn = self.vae.bn
        scale = (bn.running_var.float() + self.vae.config.batch_norm_eps).sqrt()
        tokens = latents.float() * scale + bn.running_mean.float()
        return self.vae.decode(unpatchify(tokens, grid).to(self.dtype), return_dict=False)[0][0].float()


def unpatchify(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """[1, rows * columns, 4 c] -> [1, c, 2 rows, 2 columns]: each token is a 2 x 2 patch, its channels slowest."""
    rows, columns = grid
    patches = tokens.view(1, rows, columns, -1, PATCH, PATCH)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(1, -1, rows * PATCH, columns * PATCH)
