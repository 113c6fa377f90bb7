"""Training of the seedling's autoencoder: a FLUX.2 VAE of 1.5 million parameters on pictures of the garden.

Sixteen latent channels at a sixteenth of the size (five levels, where the big one has four and 32 channels), folded
2 x 2 into 64 channels a token: a picture of 256 x 256 is 64 tokens.
Knows the scenes but no captions and no transformer.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLFlux2
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from engine.seedling import parallel
from engine.seedling.checkpoint import Run
from engine.seedling.drawing import render
from engine.seedling.scenes import random_scene

LEVELS = 5
SIZE, CROP = 256, 128
CONFIG = dict(
    down_block_types=("DownEncoderBlock2D",) * LEVELS,  # by default it quietly builds four
    up_block_types=("UpDecoderBlock2D",) * LEVELS,
    block_out_channels=(16, 16, 32, 64, 64),
    decoder_block_out_channels=(16, 16, 32, 64, 96),
    layers_per_block=1,
    latent_channels=16,
    # Few large groups: with 2 channels a group, normalising a flat picture leaves only signs and the colour is lost.
    norm_num_groups=2,
    sample_size=SIZE,
)
# Makes neighbouring latents decode alike, so that a slightly wrong denoised latent is still a clean shape.
LATENT_NOISE = 0.1


@dataclass(frozen=True)
class VaeTraining:
    steps: int = 8000
    batch: int = 4  # per process
    learning_rate: float = 1e-3
    full_size_from: float = 0.85  # the part of the run after which whole pictures replace crops
    seed: int = 0


def pictures(rng: np.random.Generator, count: int, crop: int = SIZE) -> torch.Tensor:
    """float32 [count, 3, crop, crop] in [-1, 1], cut from whole pictures."""
    out = []
    for _ in range(count):
        x, y = rng.integers(0, SIZE - crop + 1, 2)
        out.append(render(random_scene(rng), SIZE, SIZE)[y : y + crop, x : x + crop])
    return torch.from_numpy(np.stack(out)).permute(0, 3, 1, 2).float() / 127.5 - 1


def start_as_identity(vae: AutoencoderKLFlux2) -> None:
    """Every residual block starts as its shortcut and every resampling as a copy, so colours pass from the first step.

    Random convolutions spend the first thousand steps on passing anything at all: after 350 steps of a small run the
    loss was 0.83 with them and 0.37 like this.
    """
    for name, module in vae.named_modules():
        if isinstance(module, ResnetBlock2D):
            nn.init.zeros_(module.conv2.weight)
            if module.conv_shortcut is not None:
                nn.init.dirac_(module.conv_shortcut.weight)
        elif isinstance(module, Attention):
            nn.init.zeros_(module.to_out[0].weight)
        elif name.endswith(("downsamplers.0.conv", "upsamplers.0.conv")):
            nn.init.dirac_(module.weight)


def loss_of(vae: AutoencoderKLFlux2, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    z = vae.encode(x).latent_dist.mean
    y = vae.decode(z + LATENT_NOISE * torch.randn(z.shape, generator=generator)).sample.float()
    edges = sum(F.l1_loss(y.diff(dim=d), x.diff(dim=d)) for d in (2, 3))
    # the last term keeps latents near unit size; nothing samples from this VAE, so there is no KL to pay
    return F.l1_loss(y, x) + 2 * F.mse_loss(y, x) + 0.7 * edges + 1e-3 * z.square().mean()


def train(run: Run, settings: VaeTraining) -> Iterator[tuple[int, float]]:
    """Yields (step, loss); the state lies in `run` afterwards."""
    torch.manual_seed(settings.seed)
    vae = AutoencoderKLFlux2(**CONFIG).to(memory_format=torch.channels_last).train()
    start_as_identity(vae)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=settings.steps, pct_start=0.05, final_div_factor=100
    )
    start = run.resume(model=vae, optimizer=optimizer, schedule=schedule)
    for step in range(start, settings.steps):
        rng = np.random.default_rng((settings.seed, step, parallel.rank()))
        generator = torch.Generator().manual_seed(step)
        late = step >= settings.full_size_from * settings.steps
        batch = pictures(rng, max(1, settings.batch // 4)) if late else pictures(rng, settings.batch, CROP)
        with parallel.half_precision():
            loss = loss_of(vae, batch.contiguous(memory_format=torch.channels_last), generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        parallel.average_gradients(list(vae.parameters()))
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if parallel.rank() == 0:
            run.maybe_save(step + 1, model=vae, optimizer=optimizer, schedule=schedule)
        yield step + 1, loss.item()
    if parallel.rank() == 0:
        measure_latents(vae, settings.seed)
        run.finish(vae.state_dict())


@torch.no_grad()
def measure_latents(vae: AutoencoderKLFlux2, seed: int, count: int = 256) -> None:
    """Writes mean and variance of the folded latents into the VAE's batch norm, the only thing that layer is for."""
    rng = np.random.default_rng((seed, 1))
    folded = torch.cat([fold(vae.encode(pictures(rng, 8)).latent_dist.mean) for _ in range(count // 8)])
    vae.bn.running_mean.copy_(folded.mean((0, 2, 3)))
    vae.bn.running_var.copy_(folded.var((0, 2, 3)))


def fold(z: torch.Tensor) -> torch.Tensor:
    """[B, C, H, W] -> [B, 4C, H/2, W/2], a channel's 2 x 2 block side by side, as diffusers' Klein pipeline does."""
    return F.pixel_unshuffle(z, 2)


@torch.no_grad()
def psnr(vae: AutoencoderKLFlux2, seed: int = 7, count: int = 32) -> float:
    """Decibels of reconstruction over fresh pictures."""
    x = pictures(np.random.default_rng(seed), count)
    y = vae.decode(vae.encode(x).latent_dist.mean).sample.clamp(-1, 1)
    return float(-10 * torch.log10(F.mse_loss(y, x) / 4))
