"""Training of the transformer: rectified flow on cached latents, told by a frozen encoder, then low-bit branches of it.

One base run trains at a constant learning rate. Three branches of equal length leave from it: dense goes on as it is,
ternary and binary compute with quantised block linears; all three cool down to zero. The layers are diffusers' own.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import Flux2Transformer2DModel
from scipy.special import ndtri
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import Qwen3Model

from engine.schedule import sigmas
from engine.seedling import parallel, quantize
from engine.seedling.captions import caption
from engine.seedling.checkpoint import Run
from engine.seedling.dataset import PIXELS_A_TOKEN, SIZES, Latents, SizeShare, scene_of
from engine.seedling.quantize import load_plain
from engine.seedling.reader import HIDDEN_STATES, TEXT_LENGTH, TextBatch, encode
from engine.seedling.scenes import FREEDOM

STEPS = 4
TRANSFORMER = dict(
    patch_size=1, in_channels=64, num_layers=2, num_single_layers=4, attention_head_dim=64, num_attention_heads=4,
    joint_attention_dim=128 * len(HIDDEN_STATES), timestep_guidance_channels=256, mlp_ratio=3.0,
    axes_dims_rope=(16, 16, 16, 16), rope_theta=2000, eps=1e-6, guidance_embeds=False,
)  # fmt: skip
RULES = {"ternary": quantize.ternary, "binary": quantize.binary}


@dataclass(frozen=True)
class DiffusionTraining:
    """`variant` is base, dense, ternary or binary. `batch` is per process."""

    variant: str
    steps: int
    batch: int = 16
    learning_rate: float = 1e-3
    warmup: int = 100
    seed: int = 0
    compiled: bool = False  # 0.70 -> 0.59 s a step of 16 pictures on one core, after a minute and a half


def build_transformer(variant: str) -> Flux2Transformer2DModel:
    transformer = Flux2Transformer2DModel(**TRANSFORMER)
    if variant in RULES:
        quantize.quantize_transformer(transformer, RULES[variant])
    return transformer


def positions(tokens_high: int, tokens_wide: int) -> tuple[Tensor, Tensor]:
    """(image ids [HW, 4], text ids [L, 4]) on the axes (time, row, column, word)."""
    zero = torch.zeros(1, dtype=torch.long)
    image = torch.cartesian_prod(zero, torch.arange(tokens_high), torch.arange(tokens_wide), zero)
    return image, torch.cartesian_prod(zero, zero, zero, torch.arange(TEXT_LENGTH))


VISITED_SHARE = 0.7
# Below, the noise tells nothing: the picture shows where things are, and a draft is refined with noise of its own.
TELLING = 0.6


def draw_sigmas(rng: np.random.Generator, count: int, image_tokens: int) -> np.ndarray:
    """Most examples at the levels that four steps visit, the rest spread over all, for other numbers of steps.

    Above 0.87 only the text can tell what to draw, so that is where words are bound to things; at 0.7 the things are
    already visible.
    """
    visited = sigmas(image_tokens, STEPS)[:STEPS]
    at = rng.choice(visited, count, p=[0.35, 0.25, 0.2, 0.2])
    spread = 1 / (1 + np.exp(-(1.2 * rng.standard_normal(count) + 0.4)))
    return np.where(rng.random(count) < VISITED_SHARE, at, spread).astype(np.float32)


def telling_noise(rng: np.random.Generator, tokens: int, channels: int, freedom: np.ndarray) -> np.ndarray:
    """Normal noise float32 [B, tokens, channels] that says what a scene's caption leaves open, freedom [B, 4].

    The mean of channel i over the picture, itself normal with variance 1 / tokens, is the quantile freedom[:, i]. So
    noise and caption together determine the picture, and each path from one to the other is a straight line of its own.
    Where noise and scene are independent, four steps are too few to agree on a place: every patch settles for another
    one, and outlines come out blurred or crooked. Over all scenes the noise is distributed as ever, so a seed is just a
    seed. (Couplings of this kind: Albergo et al. 2023, arXiv:2310.03725.)
    """
    noise = rng.standard_normal((len(freedom), tokens, channels), dtype=np.float32)
    told = noise[:, :, : freedom.shape[1]]
    mean = ndtri(freedom.clip(1e-6, 1 - 1e-6)) / math.sqrt(tokens)
    told += mean[:, None, :].astype(np.float32) - told.mean(axis=1, keepdims=True)
    return noise


@dataclass(frozen=True)
class Batch:
    latents: Tensor
    noise: Tensor
    sigma: Tensor
    ids: Tensor
    mask: Tensor
    size: SizeShare


class Examples:
    """Batches as a function of (seed, step, process)."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, seed: int):
        self.latents = {size: Latents(folder, size) for size in SIZES}
        self.text, self.seed = TextBatch(tokenizer), seed

    def batch(self, seed: int, step: int, count: int) -> Batch:
        size = SIZES[np.random.default_rng((seed, step)).choice(len(SIZES), p=[s.share for s in SIZES])]
        rng = np.random.default_rng((seed, step, parallel.rank()))
        indices = rng.integers(0, len(self.latents[size]), count)
        latents = torch.from_numpy(self.latents[size].rows(indices))
        scenes = [scene_of(self.seed, size, int(i)) for i in indices]
        levels = draw_sigmas(rng, count, latents.shape[1])
        freedom = np.array([scene.freedom for scene in scenes])
        freedom[levels < TELLING] = rng.random((int((levels < TELLING).sum()), len(FREEDOM)))
        noise = torch.from_numpy(telling_noise(rng, latents.shape[1], latents.shape[2], freedom))
        return Batch(latents, noise, torch.from_numpy(levels), *self.text([caption(rng, s) for s in scenes]), size)


class Lesson(nn.Module):
    """The transformer, and a linear head (thrown away afterwards) that reads what the noise tells off every image token
    behind the first block.

    Each token shows only an eighth of it: without being asked, the transformer had found nothing after 1,250 steps.
    """

    def __init__(self, transformer: Flux2Transformer2DModel):
        super().__init__()
        self.transformer = transformer
        width = transformer.inner_dim
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, len(FREEDOM)))
        transformer.transformer_blocks[0].register_forward_hook(self._listen)

    def _listen(self, block: nn.Module, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
        self.heard = output[1]

    def forward(self, **inputs: Any) -> tuple[Tensor, Tensor]:
        velocity = self.transformer(**inputs, return_dict=False)[0]
        return velocity, self.head(self.heard)


HEAD_SHARE = 0.1  # of the head's error in what is trained on: it is to be heard, not to lead


def flow_loss(lesson: Callable[..., Any], states: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Mean squared errors of the velocity noise - latents at x = (1 - sigma) latents + sigma noise, and of the head."""
    sigma = batch.sigma.view(-1, 1, 1)
    image_ids, text_ids = positions(batch.size.height // PIXELS_A_TOKEN, batch.size.width // PIXELS_A_TOKEN)
    velocity, heard = lesson(
        hidden_states=(1 - sigma) * batch.latents + sigma * batch.noise, encoder_hidden_states=states,
        timestep=batch.sigma, img_ids=image_ids, txt_ids=text_ids,
    )  # fmt: skip
    told = batch.noise.mean(dim=1, keepdim=True)[:, :, : len(FREEDOM)] * math.sqrt(batch.noise.shape[1])
    return (velocity - (batch.noise - batch.latents)).square().mean(), (heard - told).square().mean()


def train(
    run: Run, settings: DiffusionTraining, examples: Examples, encoder: Qwen3Model, base: Run | None = None
) -> Iterator[tuple[int, float]]:
    """Yields (step, loss). The encoder is left alone; a branch starts from `base` and cools down."""
    torch.manual_seed(settings.seed)
    is_base = settings.variant == "base"
    transformer = build_transformer(settings.variant)
    if base is not None:
        load_plain(transformer, base.weights())
    lesson = Lesson(transformer)
    parameters = list(lesson.parameters())
    # One compilation is for one shape, so only the size that most batches have is worth it.
    fast = torch.compile(lesson, dynamic=False) if settings.compiled else lesson

    def rate(step: int) -> float:
        warm = min(1.0, (step + 1) / settings.warmup)
        return warm if is_base else warm * 0.5 * (1 + math.cos(math.pi * step / settings.steps))

    optimizer = torch.optim.AdamW(
        parameters, lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    start = run.resume(model=lesson, optimizer=optimizer, schedule=schedule)
    for step in range(start, settings.steps):
        batch = examples.batch(settings.seed + (0 if is_base else 1), step, settings.batch)
        with torch.no_grad():
            states = encode(encoder, batch.ids, batch.mask)
        loss, unheard = flow_loss(fast if batch.size == SIZES[0] else lesson, states, batch)
        optimizer.zero_grad(set_to_none=True)
        (loss + HEAD_SHARE * unheard).backward()
        parallel.average_gradients(parameters)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if parallel.rank() == 0:
            run.maybe_save(step + 1, model=lesson, optimizer=optimizer, schedule=schedule)
        yield step + 1, loss.item()
    if parallel.rank() == 0:
        run.finish(quantize.plain_state(transformer))
