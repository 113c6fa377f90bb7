"""The text encoder, and its own first lesson: to say what a caption asks for, before any picture is drawn.

Learning to read from pictures alone is slow here: after 32,000 of them the encoder's states told backgrounds (99 %) but
not yet shapes (55 %) and places (37 %). Naming them directly takes minutes. Every token behind the prompt, padding
included, is to be the sum of the codes of the right answers and nothing else: all of them see the whole prompt, the
transformer, which has no mask, finds what it asks for wherever it looks, and a count and a shape that never came
together in training come to it as two vectors that it knows. 4-bit from the first step.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.linalg import hadamard
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3Model

from engine.prompt import template
from engine.seedling import parallel, quantize
from engine.seedling.backdrops import COLORS, SEASONS, TIMES, WEATHERS
from engine.seedling.captions import caption
from engine.seedling.checkpoint import Run
from engine.seedling.scenes import KINDS, Scene, order, training_scene
from engine.seedling.tokenizer import VOCABULARY_SIZE

TEXT_LENGTH, HIDDEN_STATES = 48, (4, 5, 6)
ENCODER = dict(
    vocab_size=VOCABULARY_SIZE, hidden_size=128, intermediate_size=384, num_hidden_layers=6, num_attention_heads=4,
    num_key_value_heads=2, head_dim=32, max_position_embeddings=512, rope_theta=1_000_000.0, tie_word_embeddings=True,
)  # fmt: skip
LAYOUTS = ("", "and", "beside", "stacked")
SKIES, GROUNDS, AIRS = (*COLORS, *TIMES), ("", *SEASONS), ("", *WEATHERS)
# What is asked of every caption, and the number of possible answers. First and second are the left and the right thing,
# or the upper and the lower one; without a place, and in a group, they are in the order of KINDS and COLORS.
ANSWERS = {
    "sky": len(SKIES), "ground": len(GROUNDS), "air": len(AIRS), "count": 4, "layout": len(LAYOUTS),
    "first kind": len(KINDS), "first color": len(COLORS), "second kind": len(KINDS), "second color": len(COLORS),
}  # fmt: skip
UNSAID = -100  # cross_entropy's own "ignore"
SHARPNESS = 8.0  # of the choice between answers, whose likeness becomes 1 for the right one and 0 for the others


def build_encoder() -> Qwen3Model:
    """Six layers whose last state is taken before the final norm, which therefore does nothing here."""
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
    """The right answer to each question of ANSWERS: UNSAID about the second thing of a group, and about ground and air
    where the backdrop is plain paper."""
    things = [order((t.kind, t.color)) for t in scene.things]
    layout = {"": "", "and": "and", "left of": "beside", "right of": "beside"}.get(scene.relation, "stacked")
    if scene.relation in ("right of", "below"):
        things.reverse()
    elif scene.relation in ("", "and"):
        things.sort()
    (kind, color), (other, another) = things[0], things[1] if scene.relation else (UNSAID, UNSAID)
    behind = scene.backdrop
    sky = SKIES.index(behind.color or behind.time)
    ground, air = (GROUNDS.index(behind.season), AIRS.index(behind.weather)) if behind.time else (UNSAID, UNSAID)
    return [sky, ground, air, len(scene.things) - 1, LAYOUTS.index(layout), kind, color, other, another]


def codes() -> Tensor:
    """float32 [answers to all questions, hidden]: a direction for each, at right angles to all others."""
    rows = hadamard(int(ENCODER["hidden_size"]))[1 : 1 + sum(ANSWERS.values())]
    return torch.from_numpy(rows).float() / len(ANSWERS) ** 0.5


def _starts() -> Tensor:
    """Each question's first row of the table of codes."""
    return torch.tensor(np.cumsum([0, *list(ANSWERS.values())[:-1]]))


def spoken(wanted: Tensor) -> Tensor:
    """What every token behind the prompt is to be, float32 [N, hidden]: the sum of the codes of the right answers,
    wanted [N, questions]."""
    known = wanted != UNSAID
    return (codes()[torch.where(known, wanted, 0) + _starts()] * known[..., None]).sum(1)


def reading_loss(states: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """How far states [N, 3 * hidden] are from the codes of `wanted` [N, questions], and which answers [N, questions]
    the last of them give."""
    table = codes()
    layers = states.unflatten(1, (len(HIDDEN_STATES), -1))
    likeness = (layers @ table.T / table[0].square().sum()).split(list(ANSWERS.values()), dim=2)
    named = [
        F.cross_entropy(SHARPNESS * given.flatten(0, 1), right.repeat_interleave(len(HIDDEN_STATES)))
        for given, right in zip(likeness, wanted.T, strict=True)
    ]
    loss = (layers - spoken(wanted)[:, None]).square().mean() + torch.stack(named).nansum() / len(ANSWERS)
    return loss, torch.stack([given[:, -1].argmax(1) for given in likeness], dim=1)


@dataclass(frozen=True)
class ReaderTraining:
    """`batch` is per process."""

    steps: int = 3000
    batch: int = 32
    learning_rate: float = 2e-3
    seed: int = 0


def train(run: Run, settings: ReaderTraining, tokenizer: Tokenizer) -> Iterator[tuple[int, float]]:
    """Yields (step, share of wrong answers); the encoder lies in `run` afterwards."""
    torch.manual_seed(settings.seed)
    encoder = build_encoder()
    parameters = list(encoder.parameters())
    optimizer = torch.optim.AdamW(
        parameters, settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=settings.steps, pct_start=0.1, final_div_factor=100
    )
    text, end = TextBatch(tokenizer), tokenizer.get_vocab()["<|im_end|>"]
    start = run.resume(model=encoder, optimizer=optimizer, schedule=schedule)
    for step in range(start, settings.steps):
        rng = np.random.default_rng((settings.seed, step, parallel.rank(), 7))
        scenes = [training_scene(rng) for _ in range(settings.batch)]
        wanted = torch.tensor([answers(scene) for scene in scenes])
        ids, mask = text([caption(rng, scene) for scene in scenes])
        with parallel.half_precision():
            states = encode(encoder, ids, mask).float()
        row, place = behind_the_prompt(ids, end).nonzero(as_tuple=True)
        wanted = wanted[row]
        loss, given = reading_loss(states[row, place], wanted)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        parallel.average_gradients(parameters)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if parallel.rank() == 0:
            run.maybe_save(step + 1, model=encoder, optimizer=optimizer, schedule=schedule)
        yield step + 1, (given != wanted)[wanted != UNSAID].float().mean().item()
    if parallel.rank() == 0:
        run.finish(quantize.plain_state(encoder))
