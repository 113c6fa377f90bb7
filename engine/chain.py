"""Pictures made from pictures: a Request's variations and draft, what makes them possible, and both as plain values.

A request carries its whole chain, so it can be made again from itself alone. Imports engine.types only.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

from engine.types import BadRequest, Request

MAX_SEED = 2**63 - 1  # what SQLite, and a signed 64-bit generator, hold
MAX_STEPS = 50
MAX_VARIATIONS = 32  # each costs a picture's worth of random numbers; a person stops long before
MAX_STRETCH = 1.2  # of one side against the other, from draft to full size
MAX_DRAFTS = 3  # a draft of a draft of a draft: sizes double, so more would not fit the largest picture

# How far a gentle, a clear and a bold variation go: the strength of the new noise. What each changes in a picture is
# measured by `python -m studio.measure_variation` and stands in SPEED.md.
STRENGTHS = {"subtle": 0.3, "medium": 0.5, "strong": 0.75}

_TYPES = {"prompt": str, "model": str, "seed": int, "width": int, "height": int, "steps": int, "start": int}


def refinement(steps: int) -> tuple[int, int]:
    """(steps, start) that refine a draft of so many steps: a schedule twice as fine, of which the last eighth is drawn.

    Measured on the seedling (SPEED.md): taken up earlier, too little is left of what the draft shows.
    """
    finer = min(2 * steps, MAX_STEPS)
    return finer, max(1, min(finer - 1, round(finer * 7 / 8)))


def ancestry(request: Request) -> Iterator[Request]:
    """The request, its draft, the draft's draft and so on."""
    link: Request | None = request
    while link is not None:
        yield link
        link = link.draft


def fits(draft: tuple[int, int], size: tuple[int, int]) -> bool:
    """Whether a draft can grow to this size: as large or larger, and stretched by little.

    By little and not by nothing, because half of 1248 x 832 isn't on the model's grid: its draft is 640 x 416.
    """
    wider, taller = size[0] / draft[0], size[1] / draft[1]
    return min(wider, taller) >= 1 and max(wider, taller) <= MAX_STRETCH * min(wider, taller)


def check_seed(seed: int) -> None:
    """Raise BadRequest for a seed that no generator of ours takes."""
    if not 0 <= seed <= MAX_SEED:
        raise BadRequest(f"seed {seed} is out of range: give a whole number from 0 to {MAX_SEED}")


def check_length(request: Request) -> None:
    """Raise BadRequest for a chain that is too long, before anything walks it."""
    for drafts, _ in enumerate(ancestry(request)):
        if drafts > MAX_DRAFTS:
            raise BadRequest(f"more than {MAX_DRAFTS} drafts behind a picture: refine an earlier picture instead")
    if len(request.variations) > MAX_VARIATIONS:
        raise BadRequest(
            f"{len(request.variations)} variations of variations are too many: at most {MAX_VARIATIONS}, vary an "
            "earlier picture instead"
        )


def check(request: Request) -> None:
    """Raise BadRequest for variations and a draft that no backend can follow. Sizes and steps must be complete."""
    for seed, strength in request.variations:
        check_seed(seed)
        if not (math.isfinite(strength) and 0 < strength <= 1):
            raise BadRequest(f"variation strength {strength} is out of range: give more than 0 and at most 1")
    draft = request.draft
    if draft is None:
        if request.start:
            raise BadRequest(f"start step {request.start} needs a draft to start from: leave it at 0")
        return
    width, height = request.width, request.height
    assert width and height and request.steps and draft.width and draft.height, "complete the request first"
    if (draft.model, draft.prompt) != (request.model, request.prompt):
        raise BadRequest(
            "a draft is refined by the same model with the same prompt: refine it first, then change them"
        )
    if not fits((draft.width, draft.height), (width, height)):
        raise BadRequest(
            f"a draft of {draft.width}x{draft.height} can't be refined to {width}x{height}: choose a size of the same "
            "shape, as large or larger"
        )
    if not 1 <= request.start < request.steps:
        raise BadRequest(
            f"start step {request.start} is out of range: with {request.steps} steps give 1 to {request.steps - 1}"
            if request.steps > 1
            else "a draft is refined with 2 steps or more, not 1: raise the steps"
        )


def values(request: Request) -> dict[str, Any]:
    """The request as JSON holds it; what is not used (no variations, no draft) is left out."""
    plain = {name: getattr(request, name) for name in ("prompt", "model", "seed", "width", "height", "steps")}
    if request.variations:
        plain["variations"] = [list(step) for step in request.variations]
    if request.draft is not None:
        plain |= {"draft": values(request.draft), "start": request.start}
    return plain


def request(plain: Mapping[str, Any]) -> Request:
    """The request back from `values`, which may have come from a stranger's file; other keys are ignored.

    Raises BadRequest for values of the wrong kind. Whether they can be made is `plan.complete`'s to say.
    """
    return _request(plain, MAX_DRAFTS)


def _request(plain: Mapping[str, Any], drafts: int) -> Request:
    given: dict[str, Any] = {}
    for field in fields(Request):
        value = plain.get(field.name)
        if value is None:
            continue
        kind = _TYPES.get(field.name)
        if kind and (not isinstance(value, kind) or isinstance(value, bool)):
            raise BadRequest(f"{field.name} of this recipe is {str(value)[:40]!r}, which is no {_WORDS[kind]}")
        given[field.name] = value
    if missing := {"prompt", "model"} - set(given):
        raise BadRequest(f"this recipe has no {' and no '.join(sorted(missing))}")
    given["variations"] = _variations(given.get("variations", ()))
    if (draft := given.get("draft")) is not None:
        if not isinstance(draft, Mapping) or drafts == 0:
            raise BadRequest(f"the draft in this recipe is damaged, or there are more than {MAX_DRAFTS} behind it")
        given["draft"] = _request(draft, drafts - 1)
    return Request(**given)


_WORDS = {str: "text", int: "whole number"}


def _variations(given: Any) -> tuple[tuple[int, float], ...]:
    def number(value: Any, *kinds: type) -> bool:
        return isinstance(value, kinds) and not isinstance(value, bool)

    if isinstance(given, list | tuple) and len(given) <= MAX_VARIATIONS:
        pairs = [tuple(pair) for pair in given if isinstance(pair, list | tuple)]
        if len(pairs) == len(given) and all(
            len(pair) == 2 and number(pair[0], int) and number(pair[1], int, float) for pair in pairs
        ):
            return tuple((seed, float(strength)) for seed, strength in pairs)
    raise BadRequest(f"the variations of this recipe are {str(given)[:40]!r}: no pairs of numbers, or too many")
