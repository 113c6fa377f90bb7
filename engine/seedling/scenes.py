"""The seedling's world: plain shapes in ten colours on ten plain backgrounds, and how one scene becomes pixels.

A scene is exact: the checker compares pictures against it, captions are derived from it. What is held out of training
is decided here too, so that training and evaluation cannot disagree. Knows nothing of captions, models or torch.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

SHAPES = ("circle", "square", "triangle", "ring")
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 48, 44),
    "orange": (242, 132, 24),
    "yellow": (250, 214, 54),
    "green": (46, 154, 70),
    "blue": (44, 98, 216),
    "purple": (126, 58, 176),
    "pink": (248, 152, 194),
    "black": (24, 24, 28),
    "white": (250, 250, 248),
    "gray": (134, 138, 142),
}
# What a caption leaves open, each uniform in [0, 1): how far to the right, how far down, how large, how far turned. In
# training the noise says it (diffusion.telling_noise); beyond these, a caption and its picture are one to one.
FREEDOM = ("across", "down", "size", "turn")
UNSAID_COLOR = "gray"  # what things are where nobody says a colour, as the background then is white; see `unsaid_color`
RELATIONS = ("and", "left of", "right of", "above", "below")
MIRROR = {"and": "and", "left of": "right of", "right of": "left of", "above": "below", "below": "above"}

# Never drawn in training. A relation is held out together with its mirror image, since both name the same scene.
HELD_OUT_COLORS = frozenset({
    ("circle", "green"), ("circle", "pink"), ("square", "red"), ("square", "purple"),
    ("triangle", "orange"), ("triangle", "black"), ("ring", "blue"), ("ring", "yellow"),
})  # fmt: skip
HELD_OUT_COUNTS = frozenset({("circle", 3), ("square", 4), ("triangle", 2), ("ring", 3)})
HELD_OUT_TRIPLES = frozenset({
    ("circle", "and", "triangle"), ("square", "and", "ring"),
    ("circle", "left of", "square"), ("triangle", "left of", "ring"), ("square", "left of", "triangle"),
    ("ring", "above", "circle"), ("square", "above", "circle"), ("triangle", "above", "square"),
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class Thing:
    """One shape. `x`, `y` are its centre as fractions of width and height, `radius` a fraction of the shorter side."""

    shape: str
    color: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True, slots=True)
class Scene:
    """What a picture must show. `relation` holds between the first and the second thing; "" for one kind of thing.
    `freedom` is how it took what nobody asked for."""

    background: str
    things: tuple[Thing, ...]
    relation: str = ""
    freedom: tuple[float, ...] = (0.5,) * len(FREEDOM)

    @property
    def held_out(self) -> bool:
        first = self.things[0]
        if any((t.shape, t.color) in HELD_OUT_COLORS for t in self.things):
            return True
        if not self.relation:
            return (first.shape, len(self.things)) in HELD_OUT_COUNTS
        second = self.things[1]
        return triple_held_out(first.shape, self.relation, second.shape)


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
    for (shape, color), (x, y) in zip(kinds, centres, strict=True):
        dx, dy = x - 0.5, y - 0.5
        x = 0.5 + dx * math.cos(angle) - dy * math.sin(angle) + (2 * across - 1) * reach
        y = 0.5 + dx * math.sin(angle) + dy * math.cos(angle) + (2 * down - 1) * reach
        things.append(Thing(shape, color, x, y, low + (high - low) * size))
    return tuple(things)


def _free(rng: np.random.Generator) -> tuple[float, ...]:
    return tuple(float(value) for value in rng.random(len(FREEDOM)))


def draw_group(rng: np.random.Generator, shape: str, color: str, count: int, background: str) -> Scene:
    """`count` (1..4) equal things."""
    freedom = _free(rng)
    return Scene(background, _place([(shape, color)] * count, GROUPS[count], freedom), "", freedom)


def draw_pair(
    rng: np.random.Generator, first: tuple[str, str], relation: str, second: tuple[str, str], background: str
) -> Scene:
    """Two things (shape, colour) in a relation; "and" puts them side by side, in the order of SHAPES and COLORS."""
    freedom, place = _free(rng), relation
    if relation == "and":
        place = "left of" if _order(first) <= _order(second) else "right of"
    return Scene(background, _place([first, second], PLACES[place], freedom), relation, freedom)


def _order(kind: tuple[str, str]) -> tuple[int, int]:
    return SHAPES.index(kind[0]), list(COLORS).index(kind[1])


def other_color(rng: np.random.Generator, *taken: str) -> str:
    free = [c for c in COLORS if c not in taken]
    return free[rng.integers(len(free))]


def unsaid_color(background: str) -> str:
    """The colour of a thing that was asked for without one: gray, or white where the background is gray.

    No held-out pair has either colour. With any colour at all instead, a model had to choose one, and in four steps it
    mixed them.
    """
    return "white" if background == UNSAID_COLOR else UNSAID_COLOR


def random_scene(rng: np.random.Generator) -> Scene:
    """One scene of the world, held-out ones included. A quarter can be told without any colour of things."""
    background = "white" if rng.random() < 0.3 else list(COLORS)[rng.integers(10)]
    plain = rng.random() < 0.25

    def thing() -> tuple[str, str]:
        return SHAPES[rng.integers(4)], unsaid_color(background) if plain else other_color(rng, background)

    first = thing()
    if rng.random() < 0.55:
        return draw_group(rng, *first, int(rng.choice([1, 2, 3, 4], p=[0.4, 0.2, 0.2, 0.2])), background)
    while (second := thing()) == first:  # "a red circle and a red circle" is "two red circles"
        pass
    relation = RELATIONS[rng.choice(5, p=[0.24, 0.19, 0.19, 0.19, 0.19])]
    return draw_pair(rng, first, relation, second, background)


def training_scene(rng: np.random.Generator) -> Scene:
    """One scene that training may see."""
    while (scene := random_scene(rng)).held_out:
        pass
    return scene


def _triangle(x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    """Upright, equilateral, moved down a little so that it looks centred. Distance to the nearest edge's line."""
    circumradius = 1.2 * r
    y = y - 0.2 * circumradius
    return np.maximum(0.8660254 * np.abs(x) - 0.5 * y, y) - 0.5 * circumradius


# Signed distance in pixels from the outline, negative inside, of a shape of "radius" r around the origin (y downwards).
DISTANCE: dict[str, Callable[[np.ndarray, np.ndarray, float], np.ndarray]] = {
    "circle": lambda x, y, r: np.hypot(x, y) - r,
    "square": lambda x, y, r: np.maximum(np.abs(x), np.abs(y)) - 0.88 * r,
    "triangle": _triangle,
    "ring": lambda x, y, r: np.abs(np.hypot(x, y) - 0.76 * r) - 0.24 * r,
}


def render(scene: Scene, width: int, height: int) -> np.ndarray:
    """uint8 [height, width, 3], outlines smoothed over one pixel."""
    canvas = np.empty((height, width, 3), np.float32)
    canvas[:] = COLORS[scene.background]
    for thing in scene.things:
        r = thing.radius * min(width, height)
        cx, cy = thing.x * width, thing.y * height
        reach = int(1.5 * r) + 2
        x0, x1 = max(0, int(cx) - reach), min(width, int(cx) + reach + 1)
        y0, y1 = max(0, int(cy) - reach), min(height, int(cy) + reach + 1)
        x = np.arange(x0, x1, dtype=np.float32)[None, :] + 0.5 - cx
        y = np.arange(y0, y1, dtype=np.float32)[:, None] + 0.5 - cy
        cover = np.clip(0.5 - DISTANCE[thing.shape](x, y, r), 0, 1)[..., None]
        box = canvas[y0:y1, x0:x1]
        box += cover * (np.array(COLORS[thing.color], np.float32) - box)
    return np.rint(canvas).astype(np.uint8)
