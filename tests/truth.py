"""A picture that is just what a question asks for: what the checker must accept and a perfect model would draw."""

import numpy as np

from engine.seedling.checker import Wanted
from engine.seedling.drawing import render
from engine.seedling.scenes import draw_group, draw_pair


def truth(rng: np.random.Generator, wanted: Wanted, side: int) -> np.ndarray:
    """uint8 [side, side, 3]; the places are drawn from `rng`."""
    first = wanted.things[0]
    if wanted.relation:
        scene = draw_pair(rng, first, wanted.relation, wanted.things[1], wanted.backdrop)
    else:
        scene = draw_group(rng, *first, len(wanted.things), wanted.backdrop)
    return render(scene, side, side)
