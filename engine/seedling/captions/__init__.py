"""Captions of a scene in English, Hindi, Marathi and Tamil, with the variation people type. No pixels here.

A caption may leave out white paper, the colour of things that have the natural one, and daylight where a season or a
weather is said; all else is told. Core puts sentences together, a file for each language holds its words.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from engine.prompt import unknown_words
from engine.seedling.captions.core import Language, Speaker, Told
from engine.seedling.captions.english import ENGLISH
from engine.seedling.captions.hindi import HINDI
from engine.seedling.captions.marathi import MARATHI
from engine.seedling.captions.tamil import TAMIL
from engine.seedling.scenes import MIRROR, Scene, natural_color

T = TypeVar("T")
TABLES: dict[str, Language] = {"en": ENGLISH, "hi": HINDI, "mr": MARATHI, "ta": TAMIL}
LANGUAGES = tuple(TABLES)
SHARES = (0.4, 0.2, 0.2, 0.2)
MIXED = 0.1  # of the captions in other languages, with a word of English in them


@dataclass(frozen=True, slots=True)
class Random:
    """Picks any of the options."""

    rng: np.random.Generator

    def __call__(self, options: Sequence[T]) -> T:
        return options[int(self.rng.integers(len(options)))]


def telling(rng: np.random.Generator, scene: Scene) -> Told:
    """What a caption of the scene says, from either side of its relation."""
    backdrop, relation, silent = scene.backdrop, scene.relation, rng.random() < 0.8
    things = [
        (thing.kind, "" if silent and thing.color == natural_color(thing.kind, backdrop) else thing.color)
        for thing in scene.things
    ]
    if not relation:
        things = things[:1]
    elif rng.random() < 0.5:
        things, relation = things[::-1], MIRROR[relation]
    color, time = backdrop.color, backdrop.time
    if color == "white" and rng.random() < 0.75:
        color = ""
    if time == "day" and (backdrop.season or backdrop.weather) and rng.random() < 0.6:
        time = ""
    count = 1 if relation else len(scene.things)
    return Told(tuple(things), count, relation, color, time, backdrop.season, backdrop.weather)


def caption(rng: np.random.Generator, scene: Scene, language: str | None = None) -> str:
    """One way to ask for `scene`; None draws the language too."""
    code = language or LANGUAGES[rng.choice(len(LANGUAGES), p=SHARES)]
    told, pick, table, borrowed = telling(rng, scene), Random(rng), TABLES[code], ""
    if table is not ENGLISH and rng.random() < MIXED:
        borrowed = pick(("thing", "thing", "color"))
    return Speaker(table, pick, borrowed, ENGLISH).say(told, pick(table.frames))


def vocabulary() -> frozenset[str]:
    """Every word that captions can hold, in lower case, as `prompt.unknown_words` cuts and compares them."""
    texts = " ".join(text for table in TABLES.values() for text in table.texts())
    bare = texts.translate({ord(mark): " " for mark in "{}"})
    fields = {"a", "b", "c", "x", "p", "bound", "joined"}
    return frozenset(unknown_words(bare, fields)) | {"a"}
