"""Pictures from pictures: what Vary and Refine ask the engine for.

Knows requests, not pages and not rows. A relative carries its whole chain (`engine.chain`).
"""

import secrets
from collections.abc import Iterable
from dataclasses import replace

from engine.chain import STRENGTHS, fits, refinement
from engine.types import BadRequest, Request

NEW_SEEDS = 2**32  # noise repeats after that many


def vary(request: Request, strength: str, seed: int | None = None) -> Request:
    """The picture with other noise mixed in, `subtle`, `medium` or `strong`, from a new seed (or the given one).

    A refined picture is varied from its first draft on: what the draft shows is what a person wants varied.
    """
    if strength not in STRENGTHS:
        raise BadRequest(f"unknown strength {strength!r}; known: {', '.join(STRENGTHS)}")
    step = (secrets.randbelow(NEW_SEEDS) if seed is None else seed, STRENGTHS[strength])
    draft = None if request.draft is None else vary(request.draft, strength, step[0])
    return replace(request, draft=draft, variations=(*request.variations, step))


def refine(request: Request, sizes: Iterable[tuple[int, int]]) -> Request:
    """The picture taken as a draft and drawn at the next larger of the model's `sizes` in about its shape.

    Raises BadRequest where there is none.
    """
    width, height, steps = request.width, request.height, request.steps
    assert width and height and steps, "a picture's request is complete"
    larger = [size for size in sizes if size[0] * size[1] > width * height and fits((width, height), size)]
    if not larger:
        raise BadRequest(f"{width}x{height} is the largest size of this shape that the model is made for: draw a draft")
    to = min(larger, key=lambda size: size[0] * size[1])
    finer, start = refinement(steps)
    return replace(request, width=to[0], height=to[1], steps=finer, variations=(), draft=request, start=start)
