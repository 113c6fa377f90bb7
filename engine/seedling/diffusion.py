"""Training of the transformer: rectified flow on cached latents, then low-bit branches of it.

One base run trains at a constant learning rate, and goes on with ternary block linears. Three branches of equal length
leave from there: dense computes with the weights behind the ternary ones, binary with two values; all three cool down
to zero. The layers are diffusers' own.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import Flux2Transformer2DModel
from scipy.special import ndtri
from torch import Tensor, nn
from transformers import Qwen3Model

from engine.schedule import sigmas
from engine.seedling import parallel, quantize
from engine.seedling.backdrops import COLORS
from engine.seedling.captions import caption
from engine.seedling.checkpoint import Run
from engine.seedling.dataset import PIXELS_A_TOKEN, SIZES, Latents, SizeShare, scene_of
from engine.seedling.quantize import load_plain
from engine.seedling.reader import HIDDEN_STATES, TEXT_LENGTH, TextBatch, answers, encode, spoken
from engine.seedling.scenes import FREEDOM, KINDS, Scene

STEPS = 4
TRANSFORMER = dict(
    patch_size=1, in_channels=64, num_layers=2, num_single_layers=4, attention_head_dim=64, num_attention_heads=4,
    joint_attention_dim=128 * len(HIDDEN_STATES), timestep_guidance_channels=256, mlp_ratio=3.0,
    axes_dims_rope=(16, 16, 16, 16), rope_theta=2000, eps=1e-6, guidance_embeds=False,
)  # fmt: skip
RULES = {"quantized": quantize.ternary, "ternary": quantize.ternary, "binary": quantize.binary}
CONSTANT = ("base", "quantized")  # learning rate; all others cool down
ORDER = {"base": 0, "quantized": 1}  # of examples; the branches see the same ones


@dataclass(frozen=True)
class DiffusionTraining:
    """`variant` is base, quantized, dense, ternary or binary. `batch` is per process."""

    variant: str
    steps: int
    batch: int = 16
    learning_rate: float = 1e-3
    warmup: int = 100
    seed: int = 0
    brief: int = 0  # so many steps at the beginning see BRIEF_TEXT tokens that say just the right answers


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


# All tokens behind the prompt say the same (reader.py), and fewer cost less: 0.65 -> 0.47 s a step of 16 pictures.
# What they say is known without captions and encoder, so these wait for the last part of the training.
BRIEF_TEXT = 16
VISITED_SHARE = 0.7
VISITS = (0.45, 0.3, 0.15, 0.1)  # how often each of the four levels is practised
# Of a batch learns at the last visited level from its own first guess instead of the truth. Without, the last step left
# every blot of the first where it was: over four steps the error against the truth grew from .256 to .349.
DRAFTED = 0.25
# Below, the noise tells nothing: the picture shows where things are, and a draft is refined with noise of its own.
TELLING = 0.6


def draw_sigmas(rng: np.random.Generator, count: int, image_tokens: int) -> np.ndarray:
    """Most examples at the levels that four steps visit, the rest spread over all, for other numbers of steps.

    Above 0.87 only the text can tell what to draw, so that is where words are bound to things; at 0.7 the things are
    already visible.
    """
    visited = sigmas(image_tokens, STEPS)[:STEPS]
    at = rng.choice(visited, count, p=VISITS)
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
    """What a step learns from: `there` is what lies at each image token, float32 [B, tokens, LYING]; `wanted` are the
    encoder's right answers [B, questions]. `shown` are the latents with noise on them: the truth, or a draft."""

    latents: Tensor
    shown: Tensor
    noise: Tensor
    sigma: Tensor
    there: Tensor
    wanted: Tensor
    captions: list[str]
    size: SizeShare


LYING = 2 + 1 + len(KINDS) + 3  # numbers that say what lies at a token: way, size, kind, colour


def lying(scene: Scene, size: SizeShare) -> np.ndarray:
    """float32 [tokens, LYING]: of the thing nearest to each token's middle the way there (in units of two tokens),
    its size (from -2 to 2), its kind (4 for one of KINDS) and its colour in [-1, 1]: numbers with a variance near 1."""
    wide, high = size.width // PIXELS_A_TOKEN, size.height // PIXELS_A_TOKEN
    y, x = np.mgrid[:high, :wide].reshape(2, -1, 1) * PIXELS_A_TOKEN + PIXELS_A_TOKEN / 2
    dx = np.array([thing.x for thing in scene.things]) * size.width - x
    dy = np.array([thing.y for thing in scene.things]) * size.height - y
    nearest = np.hypot(dx, dy).argmin(1)
    each = np.arange(len(nearest))
    way = np.stack([dx[each, nearest], dy[each, nearest]], axis=1) / (2 * PIXELS_A_TOKEN)
    kinds = [
        (4 * scene.freedom[FREEDOM.index("size")] - 2, *(4.0 * (thing.kind == kind) for kind in KINDS),
         *(np.array(COLORS[thing.color]) / 127.5 - 1))
        for thing in scene.things
    ]  # fmt: skip
    return np.concatenate([way, np.array(kinds)[nearest]], axis=1).astype(np.float32)


SEVERAL = 2.0  # how often a scene of several things is shown for each time that one of a single thing is


def _shares(scenes: Sequence[Scene]) -> np.ndarray:
    """How likely each scene is to be shown, float [scenes]."""
    often = np.array([SEVERAL if len(scene.things) > 1 else 1.0 for scene in scenes])
    return often / often.sum()


class Examples:
    """Batches as a function of (seed, step, process)."""

    def __init__(self, folder: Path, seed: int):
        self.latents = {size: Latents(folder, size) for size in SIZES}
        self.scenes = {size: [scene_of(seed, size, i) for i in range(len(self.latents[size]))] for size in SIZES}
        self._shares = {size: _shares(scenes) for size, scenes in self.scenes.items()}

    def batch(self, seed: tuple[int, ...], step: int, count: int) -> Batch:
        size = SIZES[np.random.default_rng((*seed, step)).choice(len(SIZES), p=[s.share for s in SIZES])]
        rng = np.random.default_rng((*seed, step, parallel.rank()))
        indices = rng.choice(len(self.scenes[size]), count, p=self._shares[size])
        latents = torch.from_numpy(self.latents[size].rows(indices))
        scenes = [self.scenes[size][i] for i in indices]
        levels = draw_sigmas(rng, count, latents.shape[1])
        levels[: drafted(count)] = sigmas(latents.shape[1], STEPS)[STEPS - 1]
        freedom = np.array([scene.freedom for scene in scenes])
        freedom[levels < TELLING] = rng.random((int((levels < TELLING).sum()), len(FREEDOM)))
        noise = torch.from_numpy(telling_noise(rng, latents.shape[1], latents.shape[2], freedom))
        there = torch.from_numpy(np.stack([lying(scene, size) for scene in scenes]))
        wanted = torch.tensor([answers(scene) for scene in scenes])
        told = [caption(rng, scene) for scene in scenes]
        return Batch(latents, latents, noise, torch.from_numpy(levels), there, wanted, told, size)


class Lesson(nn.Module):
    """The transformer, and two linear heads (thrown away afterwards) that question every image token on the way: behind
    the first block what the noise tells, behind the first single block what is to lie there.

    Each token shows only an eighth of what the noise tells: without being asked, the transformer had found nothing
    after 1,250 steps. And what lies at a token is the same question for every number, place and shape, so counts and
    shapes that training never put together meet in a model that has learned to answer for each alone.
    """

    def __init__(self, transformer: Flux2Transformer2DModel):
        super().__init__()
        self.transformer = transformer
        width = transformer.inner_dim
        questions = (len(FREEDOM), LYING)
        self.heads = nn.ModuleList(nn.Sequential(nn.LayerNorm(width), nn.Linear(width, n)) for n in questions)
        transformer.transformer_blocks[0].register_forward_hook(self._listen)
        transformer.single_transformer_blocks[0].register_forward_hook(self._look)

    def _listen(self, block: nn.Module, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
        self.heard = output[1]

    def _look(self, block: nn.Module, inputs: Any, output: Tensor) -> None:
        self.seen = output

    def forward(self, hidden_states: Tensor, **inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        velocity = self.transformer(hidden_states, **inputs, return_dict=False)[0]
        seen = self.seen[:, -hidden_states.shape[1] :]  # the text comes first
        return velocity, self.heads[0](self.heard), self.heads[1](seen)


HEAD_SHARES = (0.1, 0.3)  # of each head's error in what is trained on: they are to be heard, not to lead


def ask(model: Callable[..., Any], x: Tensor, sigma: Tensor, states: Tensor, size: SizeShare) -> Any:
    """What `model` makes of noisy latents x [B, tokens, C] at `sigma` [B]; `states` may be the last L of all text."""
    image_ids, text_ids = positions(size.height // PIXELS_A_TOKEN, size.width // PIXELS_A_TOKEN)
    return model(
        hidden_states=x, encoder_hidden_states=states, timestep=sigma, img_ids=image_ids,
        txt_ids=text_ids[-states.shape[1] :],
    )  # fmt: skip


def drafted(count: int) -> int:
    """How many of a batch, its first ones, learn from drafts."""
    return round(DRAFTED * count)


@torch.no_grad()
def with_drafts(lesson: Callable[..., Any], states: Tensor, batch: Batch) -> Batch:
    """The batch whose first ones are shown what a first step makes of their noise."""
    count = drafted(len(batch.latents))
    if not count:  # too small a batch; diffusers refuses an empty one
        return batch
    velocity, _, _ = ask(lesson, batch.noise[:count], torch.ones(count), states[:count], batch.size)
    return replace(batch, shown=torch.cat([batch.noise[:count] - velocity, batch.shown[count:]]))


def flow_loss(lesson: Callable[..., Any], states: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Mean squared error of the velocity that leads from x = (1 - sigma) shown + sigma noise straight to the latents,
    which is noise - latents where those are shown; the heads' share."""
    sigma = batch.sigma.view(-1, 1, 1)
    velocity, heard, seen = ask(
        lesson, (1 - sigma) * batch.shown + sigma * batch.noise, batch.sigma, states, batch.size
    )
    target = batch.noise - batch.latents + (1 - sigma) / sigma * (batch.shown - batch.latents)
    told = batch.noise.mean(dim=1, keepdim=True)[:, :, : len(FREEDOM)] * math.sqrt(batch.noise.shape[1])
    missed = HEAD_SHARES[0] * (heard - told).square().mean() + HEAD_SHARES[1] * (seen - batch.there).square().mean()
    return (velocity - target).square().mean(), missed


def brief_states(wanted: Tensor) -> Tensor:
    """What the encoder says of `wanted` [B, questions] where it makes no mistake, [B, BRIEF_TEXT, 3 * hidden]."""
    return spoken(wanted).repeat(1, len(HIDDEN_STATES))[:, None].expand(-1, BRIEF_TEXT, -1)


def train(
    run: Run, settings: DiffusionTraining, examples: Examples, text: TextBatch, encoder: Qwen3Model,
    base: Run | None = None,
) -> Iterator[tuple[int, float]]:  # fmt: skip
    """Yields (step, loss). The encoder is left alone."""
    torch.manual_seed(settings.seed)
    transformer = build_transformer(settings.variant)
    if base is not None:
        load_plain(transformer, base.weights())
    lesson = Lesson(transformer)
    parameters = list(lesson.parameters())

    def rate(step: int) -> float:
        warm = min(1.0, (step + 1) / settings.warmup)
        return warm if settings.variant in CONSTANT else warm * 0.5 * (1 + math.cos(math.pi * step / settings.steps))

    optimizer = torch.optim.AdamW(
        parameters, lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.1, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    start = run.resume(model=lesson, optimizer=optimizer, schedule=schedule)
    for step in range(start, settings.steps):
        batch = examples.batch((settings.seed, ORDER.get(settings.variant, 2)), step, settings.batch)
        if step < settings.brief:
            states = brief_states(batch.wanted)
        else:
            with torch.no_grad():
                states = encode(encoder, *text(batch.captions))
        with parallel.half_precision():
            batch = with_drafts(lesson, states, batch)
        with parallel.half_precision():
            loss, missed = flow_loss(lesson, states, batch)
        optimizer.zero_grad(set_to_none=True)
        (loss + missed).backward()
        parallel.average_gradients(parameters)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if parallel.rank() == 0:
            run.maybe_save(step + 1, model=lesson, optimizer=optimizer, schedule=schedule)
        yield step + 1, loss.item()
    if parallel.rank() == 0:
        run.finish(quantize.plain_state(transformer))
