"""Training of the text encoder and the transformer: rectified flow on cached latents, then low-bit branches of it.

One base run trains encoder (4-bit from its first step) and transformer at a constant learning rate. Three branches of
equal length leave from it with the encoder frozen, so that all packs share it: dense goes on as it is, ternary and
binary compute with quantised block linears; all three cool down to zero. The layers are diffusers' and transformers'.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import Flux2Transformer2DModel
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3Model

from engine.prompt import template
from engine.schedule import sigmas
from engine.seedling import parallel, quantize
from engine.seedling.captions import caption
from engine.seedling.checkpoint import Run
from engine.seedling.dataset import PIXELS_A_TOKEN, SIZES, Latents, SizeShare, scene_of
from engine.seedling.tokenizer import VOCABULARY_SIZE

TEXT_LENGTH, HIDDEN_STATES, STEPS = 48, (1, 2, 3), 4
ENCODER = dict(
    vocab_size=VOCABULARY_SIZE, hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=32, max_position_embeddings=512, rope_theta=1_000_000.0, tie_word_embeddings=True,
)  # fmt: skip
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


def build_encoder() -> Qwen3Model:
    """Three layers whose last state is taken before the final norm, which therefore does nothing here."""
    encoder = Qwen3Model(Qwen3Config(**ENCODER))
    encoder.norm = nn.Identity()
    quantize.quantize_encoder(encoder)
    return encoder


def build_transformer(variant: str) -> Flux2Transformer2DModel:
    transformer = Flux2Transformer2DModel(**TRANSFORMER)
    if variant in RULES:
        quantize.quantize_transformer(transformer, RULES[variant])
    return transformer


def load_plain(module: nn.Module, state: dict[str, Tensor]) -> None:
    """The inverse of `quantize.plain_state`, strict."""
    names = {quantize.plain_name(name): name for name in module.state_dict()}
    module.load_state_dict({names[name]: value for name, value in state.items()})


class TextBatch:
    """Captions -> ids and mask, right-padded to the text length."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.pad = tokenizer.get_vocab()["<|endoftext|>"]

    def __call__(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        ids = torch.full((len(captions), TEXT_LENGTH), self.pad, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, text in enumerate(captions):
            tokens = self.tokenizer.encode(template(text)).ids[:TEXT_LENGTH]
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
        return ids, mask


def encode(encoder: Qwen3Model, ids: Tensor, mask: Tensor) -> Tensor:
    """[B, L] -> [B, L, 3 * 128]: the chosen hidden states side by side."""
    states = encoder(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False).hidden_states
    return torch.cat([states[i] for i in HIDDEN_STATES], dim=-1)


def positions(tokens_high: int, tokens_wide: int) -> tuple[Tensor, Tensor]:
    """(image ids [HW, 4], text ids [L, 4]) on the axes (time, row, column, word)."""
    zero = torch.zeros(1, dtype=torch.long)
    image = torch.cartesian_prod(zero, torch.arange(tokens_high), torch.arange(tokens_wide), zero)
    return image, torch.cartesian_prod(zero, zero, zero, torch.arange(TEXT_LENGTH))


def draw_sigmas(rng: np.random.Generator, count: int, image_tokens: int, visited_share: float) -> Tensor:
    """A share at the levels that four steps visit, later ones oftener since they decide more; the rest spread over all.

    Shapes are learned at low noise, so the base run sees more of the spread ones: with half of its examples at visited
    levels, most of them nearly pure noise, it knew backgrounds and nothing else after 12,000 pictures.
    """
    visited = sigmas(image_tokens, STEPS)[:STEPS]
    at = rng.choice(visited, count, p=[0.15, 0.2, 0.3, 0.35])
    spread = 1 / (1 + np.exp(-(1.2 * rng.standard_normal(count) + 0.4)))
    return torch.from_numpy(np.where(rng.random(count) < visited_share, at, spread).astype(np.float32))


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

    def batch(self, seed: int, step: int, count: int, visited_share: float) -> Batch:
        size = SIZES[np.random.default_rng((seed, step)).choice(len(SIZES), p=[s.share for s in SIZES])]
        rng = np.random.default_rng((seed, step, parallel.rank()))
        indices = rng.integers(0, len(self.latents[size]), count)
        latents = torch.from_numpy(self.latents[size].rows(indices))
        captions = [caption(rng, scene_of(self.seed, size, int(i))) for i in indices]
        noise = torch.from_numpy(rng.standard_normal(latents.shape, dtype=np.float32))
        return Batch(latents, noise, draw_sigmas(rng, count, latents.shape[1], visited_share), *self.text(captions), size)


def flow_loss(transformer: nn.Module, states: Tensor, batch: Batch) -> Tensor:
    """Mean squared error of the velocity noise - latents at x = (1 - sigma) latents + sigma noise."""
    sigma = batch.sigma.view(-1, 1, 1)
    image_ids, text_ids = positions(batch.size.height // PIXELS_A_TOKEN, batch.size.width // PIXELS_A_TOKEN)
    velocity = transformer(
        hidden_states=(1 - sigma) * batch.latents + sigma * batch.noise, encoder_hidden_states=states,
        timestep=batch.sigma, img_ids=image_ids, txt_ids=text_ids, return_dict=False,
    )[0]  # fmt: skip
    return (velocity - (batch.noise - batch.latents)).square().mean()


def train(
    run: Run, settings: DiffusionTraining, examples: Examples, base: Run | None = None
) -> Iterator[tuple[int, float]]:
    """Yields (step, loss). A branch starts from `base` and leaves its encoder alone."""
    torch.manual_seed(settings.seed)
    is_base = settings.variant == "base"
    model = nn.ModuleDict({"encoder": build_encoder(), "transformer": build_transformer(settings.variant)})
    if base is not None:
        load_plain(model, base.weights())
    model["encoder"].requires_grad_(is_base)
    parameters = [p for p in model.parameters() if p.requires_grad]

    def ramp(step: int) -> float:
        return min(1.0, (step + 1) / settings.warmup)

    def cool(step: int) -> float:
        return ramp(step) * 0.5 * (1 + math.cos(math.pi * step / settings.steps))

    groups = [{"params": model["transformer"].parameters()}]
    rates: list[Callable[[int], float]] = [ramp if is_base else cool]
    if is_base:  # the encoder must be still when the branches freeze it
        groups.append({"params": model["encoder"].parameters()})
        rates.append(cool)
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rates)
    start = run.resume(model=model, optimizer=optimizer, schedule=schedule)
    for step in range(start, settings.steps):
        batch = examples.batch(settings.seed + (0 if is_base else 1), step, settings.batch, 0.25 if is_base else 0.5)
        with torch.set_grad_enabled(is_base):
            states = encode(model["encoder"], batch.ids, batch.mask)
        loss = flow_loss(model["transformer"], states, batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        parallel.average_gradients(parameters)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if parallel.rank() == 0:
            run.maybe_save(step + 1, model=model, optimizer=optimizer, schedule=schedule)
        yield step + 1, loss.item()
    if parallel.rank() == 0:
        run.finish(quantize.plain_state(model))
