"""The text encoder, and its own first lesson: to say what a caption asks for, before any picture is drawn.

Learning to read from pictures alone is slow here: after 32,000 of them the encoder's states told backgrounds (99 %) but
not yet shapes (55 %) and places (37 %). Naming them directly takes minutes. The answers are read by linear heads, which
are thrown away afterwards, off every token behind the prompt, padding included: all of them see the whole prompt, and
the transformer, which has no mask, finds what it asks for wherever it looks. 4-bit from the first step.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3Model

from engine.prompt import template
from engine.seedling import parallel, quantize
from engine.seedling.captions import caption
from engine.seedling.checkpoint import Run
from engine.seedling.scenes import COLORS, SHAPES, Scene, training_scene
from engine.seedling.tokenizer import VOCABULARY_SIZE

TEXT_LENGTH, HIDDEN_STATES = 48, (1, 2, 3)
ENCODER = dict(
    vocab_size=VOCABULARY_SIZE, hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=32, max_position_embeddings=512, rope_theta=1_000_000.0, tie_word_embeddings=True,
)  # fmt: skip
LAYOUTS = ("", "and", "beside", "stacked")
# What is asked of every caption, and the number of possible answers. First and second are the left and the right thing,
# or the upper and the lower one; without a place, and in a group, they are in the order of SHAPES and COLORS.
ANSWERS = {
    "background": len(COLORS), "count": 4, "layout": len(LAYOUTS), "first shape": len(SHAPES),
    "first color": len(COLORS), "second shape": len(SHAPES), "second color": len(COLORS),
}  # fmt: skip
UNSAID = -100  # cross_entropy's own "ignore"


def build_encoder() -> Qwen3Model:
    """Three layers whose last state is taken before the final norm, which therefore does nothing here."""
    encoder = Qwen3Model(Qwen3Config(**ENCODER))
    encoder.norm = nn.Identity()
    quantize.quantize_encoder(encoder)
    return encoder


class TextBatch:
    """Captions -> ids and mask, right-padded to the text length."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.pad = tokenizer.get_vocab()["<|endoftext|>"]

    def __call__(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        ids = torch.full((len(captions), TEXT_LENGTH), self.pad)
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


def behind_the_prompt(ids: Tensor, end: int) -> Tensor:
    """bool [B, L]: the tokens from the prompt's end token on."""
    return (ids == end).cumsum(1) > 0


def answers(scene: Scene) -> list[int]:
    """The right answer to each question of ANSWERS, UNSAID about the second thing of a group."""
    things = [(SHAPES.index(t.shape), list(COLORS).index(t.color)) for t in scene.things]
    layout = {"": "", "and": "and", "left of": "beside", "right of": "beside"}.get(scene.relation, "stacked")
    if scene.relation in ("right of", "below"):
        things.reverse()
    elif scene.relation in ("", "and"):
        things.sort()
    (shape, color), (other, another) = things[0], things[1] if scene.relation else (UNSAID, UNSAID)
    background = list(COLORS).index(scene.background)
    return [background, len(scene.things) - 1, LAYOUTS.index(layout), shape, color, other, another]


@dataclass(frozen=True)
class ReaderTraining:
    """`batch` is per process."""

    steps: int = 1000
    batch: int = 32
    learning_rate: float = 2e-3
    seed: int = 0


def train(run: Run, settings: ReaderTraining, tokenizer: Tokenizer) -> Iterator[tuple[int, float]]:
    """Yields (step, share of wrong answers); the encoder lies in `run` afterwards."""
    torch.manual_seed(settings.seed)
    model = nn.ModuleDict({"encoder": build_encoder()})
    model["head"] = nn.Linear(len(HIDDEN_STATES) * int(ENCODER["hidden_size"]), sum(ANSWERS.values()))
    optimizer = torch.optim.AdamW(model.parameters(), settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=settings.steps, pct_start=0.1, final_div_factor=100
    )
    text, end = TextBatch(tokenizer), tokenizer.get_vocab()["<|im_end|>"]
    start = run.resume(model=model, optimizer=optimizer, schedule=schedule)
    for step in range(start, settings.steps):
        rng = np.random.default_rng((settings.seed, step, parallel.rank(), 7))
        scenes = [training_scene(rng) for _ in range(settings.batch)]
        wanted = torch.tensor([answers(scene) for scene in scenes])
        ids, mask = text([caption(rng, scene) for scene in scenes])
        states = encode(model["encoder"], ids, mask)
        row, place = behind_the_prompt(ids, end).nonzero(as_tuple=True)
        given, wanted = model["head"](states[row, place]).split(list(ANSWERS.values()), dim=1), wanted[row]
        loss = torch.stack([F.cross_entropy(g, w) for g, w in zip(given, wanted.T, strict=True)]).nansum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        parallel.average_gradients(list(model.parameters()))
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if parallel.rank() == 0:
            run.maybe_save(step + 1, model=model, optimizer=optimizer, schedule=schedule)
        right = torch.stack([g.argmax(1) for g in given], dim=1) == wanted
        yield step + 1, 1 - right[wanted != UNSAID].float().mean().item()
    if parallel.rank() == 0:
        run.finish(quantize.plain_state(model["encoder"]))
