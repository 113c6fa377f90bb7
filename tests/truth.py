"""A picture that is just what a question asks for: what the checker must accept and a perfect model would draw."""

import numpy as np

from engine.seedling.checker import Wanted
from engine.seedling.scenes import draw_group, draw_pair, other_color, render


def truth(rng: np.random.Generator, wanted: Wanted, side: int) -> np.ndarray:
    """uint8 [side, side, 3]; colours that are left open are drawn from `rng`, and so are the places."""
    kinds = [(shape, color or other_color(rng, wanted.background)) for shape, color in wanted.things]
    if wanted.relation:
        scene = draw_pair(rng, kinds[0], wanted.relation, kinds[1], wanted.background)
    else:
        scene = draw_group(rng, *kinds[0], len(kinds), wanted.background)
    return render(scene, side, side)
