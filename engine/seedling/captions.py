"""English captions of a scene, with the variation people type: articles, digits, synonyms, order, background or not.

A caption may leave out a white background, and the colour of things that have the one they get unasked. No pixels here.
"""

import numpy as np

from engine.seedling.scenes import COLORS, MIRROR, SHAPES, Scene, Thing, unsaid_color

PREFIXES = (
    "", "", "", "", "a picture of ", "an image of ", "a photo of ", "a drawing of ", "draw ", "show me ", "i want ",
    "please draw ", "here is ", "a picture showing ", "an image with ", "can you draw ", "make ",
    "a simple drawing of ",
)  # fmt: skip
# For evaluation alone: none of these openings occurs in training, though each of their words does.
HELD_OUT_PREFIXES = (
    "a photo showing ", "a drawing with ", "please show me ", "draw me a picture of ", "i want an image of ",
    "make me ",
)  # fmt: skip
NAMES = {"circle": ("circle", "circle", "circle", "disc"), "ring": ("ring", "ring", "ring", "hoop")}
COLOR_NAMES = {"gray": ("gray", "grey"), "purple": ("purple", "purple", "violet")}
COUNTS = {2: ("two", "two", "2", "a pair of"), 3: ("three", "three", "3"), 4: ("four", "four", "4")}
BETWEEN = {
    "and": (" and {b}", " and {b}", " with {b}", " next to {b}", ", {b}"),
    "left of": (" to the left of {b}", " left of {b}", " on the left of {b}", " on the left and {b} on the right"),
    "right of": (" to the right of {b}", " right of {b}", " on the right of {b}", " on the right and {b} on the left"),
    "above": (" above {b}", " above {b}", " over {b}", " at the top and {b} at the bottom"),
    "below": (" below {b}", " below {b}", " under {b}", " at the bottom and {b} at the top"),
}
BACKGROUNDS = (" on {a} background", " on {a} background", " on {a} background", " against {a} background",
               " with {a} background", " on {c}", ", {c} background", " in front of {a} backdrop")  # fmt: skip


def _pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[rng.integers(len(options))]


def _color(rng: np.random.Generator, color: str) -> str:
    return _pick(rng, COLOR_NAMES.get(color, (color,)))


def article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def noun(rng: np.random.Generator, thing: Thing, told: bool) -> str:
    """ "red circle"; without its colour where that is not told."""
    name = _pick(rng, NAMES.get(thing.shape, (thing.shape,)))
    return f"{_color(rng, thing.color)} {name}" if told else name


def one(rng: np.random.Generator, thing: Thing, told: bool) -> str:
    words = noun(rng, thing, told)
    return f"one {words}" if rng.random() < 0.08 else article(words)


def things_caption(rng: np.random.Generator, scene: Scene) -> str:
    """What is in the scene, without prefix and background."""
    silent = rng.random() < 0.8  # of the colours that go without saying
    told = [not silent or thing.color != unsaid_color(scene.background) for thing in scene.things]
    first = scene.things[0]
    if not scene.relation:
        if len(scene.things) == 1:
            return one(rng, first, told[0])
        return f"{_pick(rng, COUNTS[len(scene.things)])} {noun(rng, first, told[0])}s"
    second, relation = scene.things[1], scene.relation
    if rng.random() < 0.5:  # the same scene told from the other side
        first, second, relation = second, first, MIRROR[relation]
        told.reverse()
    return one(rng, first, told[0]) + _pick(rng, BETWEEN[relation]).format(b=one(rng, second, told[1]))


def caption(rng: np.random.Generator, scene: Scene) -> str:
    """One way to ask for `scene`."""
    text = _pick(rng, PREFIXES) + things_caption(rng, scene)
    if scene.background != "white" or rng.random() < 0.25:
        color = _color(rng, scene.background)
        if rng.random() < 0.07:
            return f"{color} background, {text}"
        text += _pick(rng, BACKGROUNDS).format(a=article(color), c=color)
    return text


def vocabulary() -> frozenset[str]:
    """Every word that captions can hold, in lower case; `prompt.unknown_words` compares with it."""
    templates = " ".join((*PREFIXES, *BACKGROUNDS, *(t for ts in BETWEEN.values() for t in ts)))
    names = {n for shape in SHAPES for n in NAMES.get(shape, (shape,))}
    words = {*COLORS, *names, *(n + "s" for n in names), "a", "an", "one"}
    words.update(*COLOR_NAMES.values())
    for text in (templates, *(c for counts in COUNTS.values() for c in counts)):
        words.update(text.format(a="", b="", c="").replace(",", " ").split())
    return frozenset(words)
