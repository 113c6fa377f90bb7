"""The seedling's world: an ink garden of sixteen things and four plain shapes in ten colours, on paper or outdoors.

A scene is exact: the checker compares pictures against it, captions are derived from it. What is held out of training
is decided here too, so that training and evaluation cannot disagree. Knows no drawing, captions, models or torch.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from engine.seedling.backdrops import COLORS, OUTDOORS, PLAIN, WHITE, Backdrop

SHAPES = ("circle", "square", "triangle", "ring")
# The colour of a thing that was asked for without one, and the one it has where the first would not be seen. With any
# colour at all instead, a model had to choose one, and in four steps it mixed them.
NATURAL = {
    "circle": ("gray", "white"), "square": ("gray", "white"), "triangle": ("gray", "white"), "ring": ("gray", "white"),
    "pine": ("green", "yellow"), "maple": ("red", "yellow"), "cherry": ("pink", "red"), "bamboo": ("green", "yellow"),
    "moon": ("yellow", "gray"), "sun": ("orange", "red"), "mountain": ("blue", "white"), "lantern": ("red", "yellow"),
    "boat": ("blue", "orange"), "crane": ("white", "gray"), "koi": ("orange", "white"), "bridge": ("red", "yellow"),
    "rock": ("gray", "white"), "gate": ("red", "yellow"), "pagoda": ("purple", "yellow"),
    "umbrella": ("purple", "yellow"),
}  # fmt: skip
KINDS = tuple(NATURAL)
OBJECTS = KINDS[len(SHAPES) :]
# What a caption leaves open, each uniform in [0, 1): how far to the right, how far down, how large, how far turned. In
# training the noise says it (diffusion.telling_noise); beyond these, a caption and its picture are one to one.
FREEDOM = ("across", "down", "size", "turn")
RELATIONS = ("and", "left of", "right of", "above", "below")
MIRROR = {"and": "and", "left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def _held_out_colors() -> set[tuple[str, str]]:
    """Two of the ten colours of each object, none of them natural to it."""
    pairs = set()
    for i, kind in enumerate(OBJECTS):
        free = [c for c in COLORS if c not in NATURAL[kind]]
        pairs |= {(kind, free[3 * i % 8]), (kind, free[(3 * i + 4) % 8])}
    return pairs


def _held_out_triples() -> set[tuple[str, str, str]]:
    """Two partners of each kind in each relation, two shapes excepted."""
    steps = {"and": (1, 7), "left of": (2, 5), "above": (3, 9)}
    triples = {(a, r, KINDS[(i + n) % len(KINDS)]) for i, a in enumerate(KINDS) for r, ns in steps.items() for n in ns}
    return {(a, r, b) for a, r, b in triples if a in OBJECTS or b in OBJECTS}


# Never drawn in training. A relation is held out together with its mirror image, since both name the same scene. Those
# of plain shapes are as in the world of shapes that the seedling grew up in.
HELD_OUT_COLORS = frozenset(_held_out_colors()) | {
    ("circle", "green"), ("circle", "pink"), ("square", "red"), ("square", "purple"),
    ("triangle", "orange"), ("triangle", "black"), ("ring", "blue"), ("ring", "yellow"),
}  # fmt: skip
HELD_OUT_COUNTS = frozenset((kind, 2 + i % 3) for i, kind in enumerate(OBJECTS)) | {
    ("circle", 3), ("square", 4), ("triangle", 2), ("ring", 3)
}  # fmt: skip
HELD_OUT_TRIPLES = frozenset(_held_out_triples()) | {
    ("circle", "and", "triangle"), ("square", "and", "ring"),
    ("circle", "left of", "square"), ("triangle", "left of", "ring"), ("square", "left of", "triangle"),
    ("ring", "above", "circle"), ("square", "above", "circle"), ("triangle", "above", "square"),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Thing:
    """One thing. `x`, `y` are its centre as fractions of width and height, `radius` a fraction of the shorter side."""

    kind: str
    color: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True, slots=True)
class Scene:
    """What a picture must show. `relation` holds between the first and the second thing; "" for one kind of thing.
    `freedom` is how it took what nobody asked for."""

    backdrop: Backdrop
    things: tuple[Thing, ...]
    relation: str = ""
    freedom: tuple[float, ...] = (0.5,) * len(FREEDOM)

    @property
    def held_out(self) -> bool:
        first = self.things[0]
        if any((t.kind, t.color) in HELD_OUT_COLORS for t in self.things):
            return True
        if not self.relation:
            return (first.kind, len(self.things)) in HELD_OUT_COUNTS
        second = self.things[1]
        return triple_held_out(first.kind, self.relation, second.kind)


def triple_held_out(first: str, relation: str, second: str) -> bool:
    return (first, relation, second) in HELD_OUT_TRIPLES or (second, MIRROR[relation], first) in HELD_OUT_TRIPLES


# Where the centres of n things of a kind stand, as fractions of width and height.
GROUPS = {
    1: ((0.5, 0.5),),
    2: ((0.28, 0.5), (0.72, 0.5)),
    3: ((0.5, 0.28), (0.27, 0.7), (0.73, 0.7)),
    4: ((0.28, 0.28), (0.72, 0.28), (0.28, 0.72), (0.72, 0.72)),
}
RADIUS = {1: (0.25, 0.31), 2: (0.165, 0.19), 3: (0.16, 0.185), 4: (0.155, 0.18)}  # neighbours never touch
REACH = {1: 0.045, 2: 0.025, 3: 0.025, 4: 0.025}  # how far everything may be moved, in fractions
TILT = 0.25  # radians either way, around the middle of the picture
PLACES = {
    "left of": ((0.26, 0.5), (0.74, 0.5)),
    "right of": ((0.74, 0.5), (0.26, 0.5)),
    "above": ((0.5, 0.26), (0.5, 0.74)),
    "below": ((0.5, 0.74), (0.5, 0.26)),
}


def _place(
    kinds: list[tuple[str, str]], centres: Iterable[tuple[float, float]], freedom: tuple[float, ...]
) -> tuple[Thing, ...]:
    """All of one size, moved and turned together: "small" and "a little higher" are not in this world's vocabulary."""
    low, high = RADIUS[len(kinds)]
    across, down, size, turn = freedom
    reach, angle = REACH[len(kinds)], (2 * turn - 1) * TILT
    things = []
    for (kind, color), (x, y) in zip(kinds, centres, strict=True):
        dx, dy = x - 0.5, y - 0.5
        x = 0.5 + dx * math.cos(angle) - dy * math.sin(angle) + (2 * across - 1) * reach
        y = 0.5 + dx * math.sin(angle) + dy * math.cos(angle) + (2 * down - 1) * reach
        things.append(Thing(kind, color, x, y, low + (high - low) * size))
    return tuple(things)


def _free(rng: np.random.Generator) -> tuple[float, ...]:
    return tuple(float(value) for value in rng.random(len(FREEDOM)))


def draw_group(rng: np.random.Generator, kind: str, color: str, count: int, backdrop: Backdrop) -> Scene:
    """`count` (1..4) equal things."""
    freedom = _free(rng)
    return Scene(backdrop, _place([(kind, color)] * count, GROUPS[count], freedom), "", freedom)


def draw_pair(
    rng: np.random.Generator, first: tuple[str, str], relation: str, second: tuple[str, str], backdrop: Backdrop
) -> Scene:
    """Two things (kind, colour) in a relation; "and" puts them side by side, in the order of KINDS and COLORS."""
    freedom, place = _free(rng), relation
    if relation == "and":
        place = "left of" if order(first) <= order(second) else "right of"
    return Scene(backdrop, _place([first, second], PLACES[place], freedom), relation, freedom)


def order(kind: tuple[str, str]) -> tuple[int, int]:
    return KINDS.index(kind[0]), list(COLORS).index(kind[1])


def other_color(rng: np.random.Generator, backdrop: Backdrop, *taken: str) -> str:
    """Any colour that stands out from the backdrop, but those."""
    free = [c for c in COLORS if c not in taken and backdrop.shows(c)]
    return free[rng.integers(len(free))]


def natural_color(kind: str, backdrop: Backdrop) -> str:
    first, second = NATURAL[kind]
    return first if backdrop.shows(first) else second


def random_backdrop(rng: np.random.Generator) -> Backdrop:
    draw = rng.random()
    if draw < 0.25:
        return WHITE
    among = PLAIN if draw < 0.6 else OUTDOORS
    return among[rng.integers(len(among))]


def random_scene(rng: np.random.Generator) -> Scene:
    """One scene of the world, held-out ones included. A third can be told without any colour of things."""
    backdrop, plain = random_backdrop(rng), rng.random() < 0.33

    def thing() -> tuple[str, str]:
        among = SHAPES if rng.random() < 0.25 else OBJECTS
        kind = among[rng.integers(len(among))]
        return kind, natural_color(kind, backdrop) if plain else other_color(rng, backdrop)

    first = thing()
    if rng.random() < 0.55:
        return draw_group(rng, *first, int(rng.choice([1, 2, 3, 4], p=[0.4, 0.2, 0.2, 0.2])), backdrop)
    while (second := thing()) == first:  # "a red circle and a red circle" is "two red circles"
        pass
    relation = RELATIONS[rng.choice(5, p=[0.24, 0.19, 0.19, 0.19, 0.19])]
    return draw_pair(rng, first, relation, second, backdrop)


def training_scene(rng: np.random.Generator) -> Scene:
    """One scene that training may see."""
    while (scene := random_scene(rng)).held_out:
        pass
    return scene
