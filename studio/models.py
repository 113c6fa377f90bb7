"""Which models the page offers, what each declares and where it would run; and which could be installed.

Knows the catalogue, the packs and the plan, not the page. Reads only the packs' small files, so it is quick.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

from engine import catalog
from engine.hardware import detect
from engine.packs import Notes, open_pack
from engine.plan import plan
from engine.types import EngineError, Request
from studio.settings import Settings

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Offer:
    """One model to choose: `model` is what a Request carries, `why` where it runs and for what reason.

    `sizes` are (width, height) in pixels, the default first; `words` how many words it knows, None: any.
    """

    model: str
    label: str
    demo: bool
    why: str
    sizes: tuple[tuple[int, int], ...]
    steps: int
    words: int | None = None


def offers(settings: Settings) -> tuple[Offer, ...]:
    """The models that can run now, the one to start with first.

    A damaged pack is left out and logged, except the one to start with: that raises BadRequest.
    """
    first = settings.model or catalog.default_id(settings.data_dir)
    found = [_offer(first, settings)]
    for model in catalog.installed(settings.data_dir):
        if model != first:
            try:
                found.append(_offer(model, settings))
            except EngineError as error:
                log.warning("%s is not offered: %s", model, error)
    return tuple(found)


def installable(data_dir: Path) -> tuple[catalog.Model, ...]:
    """Published models that are not here yet."""
    there = catalog.installed(data_dir)
    return tuple(model for model in catalog.MODELS.values() if model.repository and model.id not in there)


def _offer(model: str, settings: Settings) -> Offer:
    known = catalog.MODELS.get(model)
    if settings.backend == "fake" and known and model not in catalog.installed(settings.data_dir):
        notes, why = Notes(known.label, demo=known.demo), "fake: a gradient, because no model was asked for or is here"
    else:
        pack = open_pack(catalog.find(model, settings.data_dir))
        notes, why = pack.notes, plan(detect(), pack, Request(prompt="", model=model), settings.backend).why
    words = None if notes.vocabulary is None else len(notes.vocabulary)
    return Offer(model, known.label if known else notes.label, notes.demo, why, notes.sizes, notes.steps, words)
