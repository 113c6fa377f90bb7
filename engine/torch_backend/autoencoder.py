"""FLUX.2's autoencoder in torch, the half that makes pictures: latents in, pixels out.

It knows nothing of packs, tokens or tiles (vae.py does). Class, attribute and parameter names are diffusers', so
released tensors load by name, and the MLX twin lines up with this file class by class. The layers are written out here
because importing the package diffusers takes seconds, for which a person would wait at the first picture.

Shapes: [B, channels, height, width] everywhere.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.torch_backend import decoder_card

NORM_EPS = 1e-6

Check = Callable[[], None]
Config = Mapping[str, Any]


class GroupNorm(nn.GroupNorm):
    """A group norm that can take its statistics from an earlier call: `recording`, it keeps those of what passes."""

    def __init__(self, groups: int, channels: int) -> None:
        super().__init__(groups, channels, eps=NORM_EPS)
        self.recording = False
        self.statistics: tuple[Tensor, Tensor] | None = None  # mean and variance of every channel, float32 [C]

    def forward(self, x: Tensor) -> Tensor:
        if self.statistics is not None:
            return F.batch_norm(x, *self.statistics, self.weight.float(), self.bias.float(), eps=self.eps)
        if not self.recording:
            return super().forward(x)
        out, mean, inverse = torch.native_group_norm(
            x, self.weight, self.bias, 1, self.num_channels, x[0, 0].numel(), self.num_groups, self.eps
        )
        each = self.num_channels // self.num_groups
        variance = inverse.float() ** -2 - self.eps
        self.statistics = mean.float()[0].repeat_interleave(each), variance[0].repeat_interleave(each)
        return out


def silu(x: Tensor) -> Tensor:
    """In place: it always follows a norm, whose result nobody else wants."""
    return F.silu(x, inplace=True)


class ResnetBlock2D(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = GroupNorm(groups, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = GroupNorm(groups, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        if decoder_card.on_card(x):
            return decoder_card.resnet(self, x)
        out = self.conv1(silu(self.norm1(x)))
        out = self.conv2(silu(self.norm2(out)))
        return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + out


class Attention(nn.Module):
    """One head over all pixels of the middle of the autoencoder."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = GroupNorm(groups, channels)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])  # a list of one: released as `to_out.0`

    def forward(self, x: Tensor) -> Tensor:
        if decoder_card.on_card(x):
            return decoder_card.attention(self, x)
        pixels = self.group_norm(x).flatten(2).transpose(1, 2)[:, None]  # [B, 1, pixels, channels]
        out = F.scaled_dot_product_attention(self.to_q(pixels), self.to_k(pixels), self.to_v(pixels))
        return x + self.to_out[0](out[:, 0]).transpose(1, 2).view(x.shape)


class UNetMidBlock2D(nn.Module):
    def __init__(self, channels: int, groups: int, add_attention: bool) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([Attention(channels, groups)] if add_attention else [])
        self.resnets = nn.ModuleList(ResnetBlock2D(channels, channels, groups) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.resnets[0], *self.attentions, self.resnets[1]):
            x = layer(x)
        return x


class Upsample2D(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if decoder_card.on_card(x):
            return decoder_card.upsampled(self, x)
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class UpDecoderBlock2D(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, layers: int, groups: int, last: bool) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * (layers - 1)
        self.resnets = nn.ModuleList(ResnetBlock2D(width, out_channels, groups) for width in widths)
        self.upsamplers = nn.ModuleList([] if last else [Upsample2D(out_channels)])


class Decoder(nn.Module):
    """Latents [B, c, h, w] -> picture [B, 3, H, W]."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        widths = list(reversed(config.get("decoder_block_out_channels") or config["block_out_channels"]))
        layers, groups = config["layers_per_block"] + 1, config["norm_num_groups"]
        pairs = zip([widths[0], *widths], widths, strict=False)
        self.conv_in = nn.Conv2d(config["latent_channels"], widths[0], 3, padding=1)
        self.mid_block = UNetMidBlock2D(widths[0], groups, config.get("mid_block_add_attention", True))
        self.up_blocks = nn.ModuleList(
            UpDecoderBlock2D(*pair, layers, groups, last=level == len(widths) - 1) for level, pair in enumerate(pairs)
        )
        self.conv_norm_out = GroupNorm(groups, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config["out_channels"], 3, padding=1)

    def low_levels(self, x: Tensor, check: Check) -> Tensor:
        """Latents -> features [B, C, h, w]: where the attention is, so always the whole picture."""
        check()
        return self.mid_block(self.conv_in(channels_last(x)))

    def high_levels(self, x: Tensor, check: Check) -> Tensor:
        """Features of the whole picture or of a part of it -> its pixels."""
        x = channels_last(x)
        for block in self.up_blocks:
            check()
            assert isinstance(block, UpDecoderBlock2D)
            for layer in (*block.resnets, *block.upsamplers):  # not block(x), which would hold its x until its end
                x = layer(x)
        if decoder_card.on_card(x):
            return decoder_card.convolved(self.conv_out, x, decoder_card.normalising(self.conv_norm_out, x), spent=True)
        return self.conv_out(silu(self.conv_norm_out(x)))


class AutoencoderKLFlux2(nn.Module):
    """Made from the released config.json, without its encoder. `bn` has the statistics with which tokens were
    normalised in training, one per channel of a token."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        latent = config["latent_channels"]
        self.decoder = Decoder(config)
        self.post_quant_conv = nn.Conv2d(latent, latent, 1) if config.get("use_post_quant_conv", True) else None
        self.bn = nn.BatchNorm2d(math.prod(config["patch_size"]) * latent, config["batch_norm_eps"], affine=False)


def channels_last(x: Tensor) -> Tensor:
    """The same values in the order that convolutions compute in: on a CPU 160 MB less at 512 x 512, and 8 %
    faster; on an H100 510 MB less at 1024 x 1024, in two thirds of the time."""
    return x.contiguous(memory_format=torch.channels_last)
