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


def draw_sigmas(rng: np.random.Generator, count: int, image_tokens: int) -> Tensor:
    """Most examples at the levels that four steps visit, the rest spread over all, for other numbers of steps.

    Above 0.87 only the text can tell what to draw, so that is where words are bound to things; at 0.7 the things are
    already visible.
    """
    visited = sigmas(image_tokens, STEPS)[:STEPS]
    at = rng.choice(visited, count, p=[0.25, 0.3, 0.25, 0.2])
    spread = 1 / (1 + np.exp(-(1.2 * rng.standard_normal(count) + 0.4)))
    return torch.from_numpy(np.where(rng.random(count) < VISITED_SHARE, at, spread).astype(np.float32))


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
        captions = [caption(rng, scene_of(self.seed, size, int(i))) for i in indices]
        noise = torch.from_numpy(rng.standard_normal(latents.shape, dtype=np.float32))
        levels = draw_sigmas(rng, count, latents.shape[1])
        return Batch(latents, noise, levels, *self.text(captions), size)


def flow_loss(transformer: Callable[..., Any], states: Tensor, batch: Batch) -> Tensor:
    """Mean squared error of the velocity noise - latents at x = (1 - sigma) latents + sigma noise."""
    sigma = batch.sigma.view(-1, 1, 1)
    image_ids, text_ids = positions(batch.size.height // PIXELS_A_TOKEN, batch.size.width // PIXELS_A_TOKEN)
    velocity = transformer(
        hidden_states=(1 - sigma) * batch.latents + sigma * batch.noise, encoder_hidden_states=states,
        timestep=batch.sigma, img_ids=image_ids, txt_ids=text_ids, return_dict=False,
    )[0]  # fmt: skip
    return (velocity - (batch.noise - batch.latents)).square().mean()


def train(
    run: Run, settings: DiffusionTraining, examples: Examples, encoder: Qwen3Model, base: Run | None = None
) -> Iterator[tuple[int, float]]:
    """Yields (step, loss). The encoder is left alone; a branch starts from `base` and cools down."""
    torch.manual_seed(settings.seed)
    is_base = settings.variant == "base"
    transformer = build_transformer(settings.variant)
    if base is not None:
        load_plain(transformer, base.weights())
    parameters = list(transformer.parameters())
    # One compilation is for one shape, so only the size that most batches have is worth it.
    fast = torch.compile(transformer, dynamic=False) if settings.compiled else transformer

    def rate(step: int) -> float:
        warm = min(1.0, (step + 1) / settings.warmup)
        return warm if is_base else warm * 0.5 * (1 + math.cos(math.pi * step / settings.steps))

    optimizer = torch.optim.AdamW(
        parameters, lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    start = run.resume(model=transformer, optimizer=optimizer, schedule=schedule)
    for step in range(start, settings.steps):
        batch = examples.batch(settings.seed + (0 if is_base else 1), step, settings.batch)
        with torch.no_grad():
            states = encode(encoder, batch.ids, batch.mask)
        loss = flow_loss(fast if batch.size == SIZES[0] else transformer, states, batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        parallel.average_gradients(parameters)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if parallel.rank() == 0:
            run.maybe_save(step + 1, model=transformer, optimizer=optimizer, schedule=schedule)
        yield step + 1, loss.item()
    if parallel.rank() == 0:
        run.finish(quantize.plain_state(transformer))
