"""How long a picture will take, from what pictures took on this machine before.

Knows seconds of past runs, of whomever; not what runs now. Loading a model is not part of it: it happens once.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

import sqlalchemy as sa

from engine.types import Request
from studio import tables as t
from studio.history import History

PAST = 15  # pictures looked at: enough for a steady median, few enough to follow a faster machine


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds of one step, and of everything around the steps (reading the prompt, decoding)."""

    step: float
    rest: float

    def total(self, steps: int) -> float:
        return self.rest + self.step * steps


def pace(history: History, request: Request) -> Pace | None:
    """The median of the last pictures of this model and size, else of other sizes by their pixels; None without any.

    By pixels is too low for a much larger picture, whose attention grows faster than its area.
    """
    pixels = (request.width or 0) * (request.height or 0)
    c = t.image.c
    of_model = sa.select(c.width, c.height, c.steps, c.rest, c.details).where(c.model == request.model)
    newest = of_model.order_by(c.id.desc()).limit(PAST)
    same = newest.where(c.width == request.width, c.height == request.height)
    rows = history.store.read(lambda db: db.execute(same).all() or db.execute(newest).all())
    found = list(_paces(rows, pixels))
    return Pace(median(p.step for p in found), median(p.rest for p in found)) if found else None


def left(pace: Pace | None, step: int, total: int, stepping: float, since: float) -> float | None:
    """Seconds until a running picture is there: `step` of `total` steps took `stepping` seconds, the last `since` ago.

    What this run has shown counts more than what earlier ones did, since a machine may be busy with something else.
    """
    if step and total:
        each = stepping / step if pace is None or step > 1 else (stepping + pace.step) / (step + 1)
    elif pace is not None:
        each = pace.step
    else:
        return None
    return max(0.0, each * (total - step) + (pace.rest if pace else 0.0) - since)


def _paces(rows: Iterable[sa.Row], pixels: int) -> Iterable[Pace]:
    for row in rows:
        seconds = json.loads(row.details).get("seconds") or {}
        steps = row.steps - json.loads(row.rest).get("start", 0)
        if seconds.get("denoise") and steps > 0:
            scale = pixels / (row.width * row.height)
            around = seconds.get("encode", 0.0) + seconds.get("decode", 0.0)
            yield Pace(seconds["denoise"] / steps * scale, around * scale)
