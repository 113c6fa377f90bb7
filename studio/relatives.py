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


def renewed(request: Request, past: Request) -> Request:
    """What the controls ask for after a picture's settings were reused: with its mixed noise while the seed is the
    same, and drawn from its draft while everything but the words is."""
    if request.seed != past.seed:
        return request
    if past.draft is None:
        return replace(request, variations=past.variations)
    if any(getattr(request, name) != getattr(past, name) for name in ("model", "width", "height", "steps")):
        return request
    draft = _reworded(past.draft, request.prompt)
    return replace(request, variations=past.variations, draft=draft, start=past.start)


def _reworded(request: Request, prompt: str) -> Request:
    draft = None if request.draft is None else _reworded(request.draft, prompt)
    return replace(request, prompt=prompt, draft=draft)


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
