"""What evaluation asks: the six GenEval tasks in the words of the garden, in four languages, all held out of training.

Deterministic: the same prompts and the same seeds for every pack. Knows no model and no pixels.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from engine.seedling.backdrops import COLORS, OUTDOORS, PLAIN, WHITE, Backdrop
from engine.seedling.captions import LANGUAGES, TABLES
from engine.seedling.captions.core import Speaker, Told
from engine.seedling.checker import Wanted
from engine.seedling.scenes import (
    HELD_OUT_COLORS,
    HELD_OUT_COUNTS,
    HELD_OUT_TRIPLES,
    KINDS,
    MIRROR,
    SHAPES,
    natural_color,
    triple_held_out,
)

T = TypeVar("T")
TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
ANY = "any"  # a colour that the question states, whichever it is
SHAPES_FIRST = (0, 3, 6)  # of every ten questions of a task and language, those about plain shapes alone


@dataclass(frozen=True, slots=True)
class Question:
    task: str
    language: str
    prompt: str
    seed: int
    wanted: Wanted

    @property
    def shapes(self) -> bool:
        """Whether it is about plain shapes alone."""
        return all(kind in SHAPES for kind, _ in self.wanted.things)


@dataclass(frozen=True, slots=True)
class Card:
    """What a question is about: one kind, `count` times, or two in a relation; "" is the colour that is not stated."""

    things: tuple[tuple[str, str], ...]
    count: int = 1
    relation: str = ""


def _cards(task: str) -> list[Card]:
    """All that a task can be about, always in the same order."""
    if task == "single_object":
        return [Card(((kind, ""),)) for kind in KINDS]
    if task == "counting":
        return [Card(((kind, color),), n) for kind, n in sorted(HELD_OUT_COUNTS) for color in ("", ANY)]
    if task == "colors":
        return [Card((pair,)) for pair in sorted(HELD_OUT_COLORS)]
    if task == "color_attr":
        pairs = [((kind, color), other) for kind, color in sorted(HELD_OUT_COLORS) for other in KINDS if other != kind]
        return [Card((a, (b, ANY)), 1, "and") for a, b in pairs if not triple_held_out(a[0], "and", b)]
    triples = [t for t in sorted(HELD_OUT_TRIPLES) if (t[1] == "and") == (task == "two_object")]
    triples += [(b, MIRROR[relation], a) for a, relation, b in triples]
    return [Card(((a, ""), (b, "")), 1, relation) for a, relation, b in triples]


def _deck(rng: np.random.Generator, cards: Sequence[T]) -> Iterator[T]:
    """The cards without end, each as often as any other."""
    while True:
        yield from (cards[int(i)] for i in rng.permutation(len(cards)))


def _any(rng: np.random.Generator, options: Sequence[T]) -> T:
    return options[int(rng.integers(len(options)))]


def _backdrop(rng: np.random.Generator, card: Card) -> Backdrop:
    """Plain in half of the questions; one on which every stated colour shows."""
    while True:
        draw = rng.random()
        backdrop = WHITE if draw < 0.2 else _any(rng, PLAIN if draw < 0.5 else OUTDOORS)
        if all(color in ("", ANY) or backdrop.shows(color) for _, color in card.things):
            return backdrop


def _stated(rng: np.random.Generator, card: Card, backdrop: Backdrop) -> tuple[tuple[str, str], ...]:
    """The things of a card, a colour in the place of ANY: one that shows and that training has for that kind."""
    taken = {color for _, color in card.things}
    return tuple(
        (kind, color if color != ANY else _any(rng, [
            c for c in COLORS if backdrop.shows(c) and c not in taken and (kind, c) not in HELD_OUT_COLORS
        ]))
        for kind, color in card.things
    )  # fmt: skip


def _ask(task: str, language: str, card: Card, rng: np.random.Generator, seed: int) -> Question:
    backdrop, table = _backdrop(rng, card), TABLES[language]
    things = _stated(rng, card, backdrop)
    color = "" if backdrop == WHITE and rng.random() < 0.8 else backdrop.color
    told = Told(things, card.count, card.relation, color, backdrop.time, backdrop.season, backdrop.weather)
    frame = _any(rng, table.held_out_frames if task == "single_object" else table.frames)
    wanted = tuple((kind, color or natural_color(kind, backdrop)) for kind, color in things) * card.count
    return Question(task, language, Speaker(table).say(told, frame), seed, Wanted(backdrop, wanted, card.relation))


def _asked(number: int, task: str, per_language: int) -> Iterator[Question]:
    rng, seen = np.random.default_rng((2026, number)), set[str]()
    cards = _cards(task)
    plain = [card for card in cards if all(kind in SHAPES for kind, _ in card.things)]
    of_shapes, of_others = _deck(rng, plain), _deck(rng, [card for card in cards if card not in plain])
    for i in range(per_language * len(LANGUAGES)):
        turn, language = divmod(i, len(LANGUAGES))
        card = next(of_shapes if turn % 10 in SHAPES_FIRST else of_others)
        while (question := _ask(task, LANGUAGES[language], card, rng, 10_000 * number + i)).prompt in seen:
            pass
        seen.add(question.prompt)
        yield question


def questions(per_task: int = 60) -> list[Question]:
    """`per_task` different prompts for each of the six tasks in each language, task by task, the languages in turn; of
    every task, a smaller set is the beginning of a larger one.

    There are no more than a few hundred prompts to a task: asking for more than exist would never end.
    """
    return [question for number, task in enumerate(TASKS) for question in _asked(number, task, per_task)]
