"""What evaluation asks: the six GenEval tasks in the words of the shape world, all of them held out of training.

Deterministic: the same prompts and the same seeds for every pack. Knows no model and no pixels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from engine.seedling import captions
from engine.seedling.checker import Wanted
from engine.seedling.scenes import (
    COLORS,
    HELD_OUT_COLORS,
    HELD_OUT_COUNTS,
    HELD_OUT_TRIPLES,
    MIRROR,
    SHAPES,
    other_color,
    triple_held_out,
)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Question:
    task: str
    prompt: str
    seed: int
    wanted: Wanted


Body = tuple[str, str, tuple[tuple[str, str | None], ...], str]
"""prefix, words, things, relation"""


def _any(rng: np.random.Generator, options: Sequence[T]) -> T:
    """One of them; sets are sorted by the callers, for their own order changes from run to run."""
    return options[int(rng.integers(len(options)))]


def _single_object(rng: np.random.Generator, background: str) -> Body:
    shape = _any(rng, SHAPES)
    return _any(rng, captions.HELD_OUT_PREFIXES), captions.article(shape), ((shape, None),), ""


def _two_object(rng: np.random.Generator, background: str) -> Body:
    first, _, second = _any(rng, sorted(t for t in HELD_OUT_TRIPLES if t[1] == "and"))
    if rng.random() < 0.5:
        first, second = second, first
    words = f"{captions.article(first)} and {captions.article(second)}"
    return _any(rng, captions.PREFIXES), words, ((first, None), (second, None)), "and"


def _counting(rng: np.random.Generator, background: str) -> Body:
    shape, count = _any(rng, sorted(HELD_OUT_COUNTS))
    colors = tuple(c for c in COLORS if c != background and (shape, c) not in HELD_OUT_COLORS)
    color = _any(rng, colors) if rng.random() < 0.5 else None
    words = f"{captions.COUNTS[count][0]} {color + ' ' if color else ''}{shape}s"
    return _any(rng, captions.PREFIXES), words, ((shape, color),) * count, ""


def _colors(rng: np.random.Generator, background: str) -> Body:
    shape, color = _any(rng, sorted(p for p in HELD_OUT_COLORS if p[1] != background))
    return _any(rng, captions.PREFIXES), captions.article(f"{color} {shape}"), ((shape, color),), ""


def _position(rng: np.random.Generator, background: str) -> Body:
    first, relation, second = _any(rng, sorted(t for t in HELD_OUT_TRIPLES if t[1] != "and"))
    if rng.random() < 0.5:
        first, relation, second = second, MIRROR[relation], first
    words = captions.article(first) + captions.BETWEEN[relation][0].format(b=captions.article(second))
    return _any(rng, captions.PREFIXES), words, ((first, None), (second, None)), relation


def _color_attr(rng: np.random.Generator, background: str) -> Body:
    shape, color = _any(rng, sorted(p for p in HELD_OUT_COLORS if p[1] != background))
    other = _any(rng, tuple(s for s in SHAPES if s != shape and not triple_held_out(shape, "and", s)))
    others = other_color(rng, background, color)
    words = f"{captions.article(f'{color} {shape}')} and {captions.article(f'{others} {other}')}"
    return _any(rng, captions.PREFIXES), words, ((shape, color), (other, others)), "and"


TASKS: dict[str, Callable[[np.random.Generator, str], Body]] = {
    "single_object": _single_object,
    "two_object": _two_object,
    "counting": _counting,
    "colors": _colors,
    "position": _position,
    "color_attr": _color_attr,
}


def _ask(task: str, rng: np.random.Generator, seed: int) -> Question:
    said = rng.random() < 0.6
    background = _any(rng, tuple(COLORS)) if said else "white"
    prefix, words, things, relation = TASKS[task](rng, background)
    ending = captions.BACKGROUNDS[0].format(a=captions.article(background)) if said else ""
    return Question(task, prefix + words + ending, seed, Wanted(background, things, relation))


def questions(per_task: int = 100) -> list[Question]:
    """`per_task` different prompts for each of the six tasks, task by task; a smaller set is part of a larger one.

    There are no more than a few hundred prompts to a task: asking for more than exist would never end.
    """
    asked: list[Question] = []
    for number, task in enumerate(TASKS):
        rng, seen = np.random.default_rng((2026, number)), set[str]()
        while len(seen) < per_task:
            question = _ask(task, rng, seed=1000 * number + len(seen))
            if question.prompt not in seen:
                seen.add(question.prompt)
                asked.append(question)
    return asked
