"""Which models the page offers, what each declares and where it would run; and which could be installed.

Knows the catalogue, the packs and the plan, not the page. Reads only the packs' small files, so it is quick.
"""

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from engine import catalog, products
from engine.hardware import detect
from engine.packs import Notes, open_pack
from engine.plan import plan, token_side
from engine.types import EngineError, Request
from studio.settings import Settings

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Offer:
    """One model to choose: `model` is what a Request carries, `why` where it runs and for what reason.

    `sizes` are (width, height) in pixels, the default first; `words` how many words it knows, None: any. `variant` is
    ternary, binary or dense; `grid` what both sides of a picture are multiples of; `languages` it was trained on.
    """

    model: str
    label: str
    demo: bool
    why: str
    sizes: tuple[tuple[int, int], ...]
    steps: int
    words: int | None = None
    variant: str = ""
    grid: int = 32
    languages: tuple[str, ...] = ()

    @property
    def short(self) -> str:
        """One word where the family is clear, as under a picture."""
        return self.variant or self.label

    def draft(self, width: int, height: int) -> tuple[int, int]:
        """About half a size in exactly its shape, so that it can be refined to it; the size itself where none is."""
        across, down = width // self.grid, height // self.grid
        whole = math.gcd(across, down)
        part = max(1, whole // 2)
        return across // whole * part * self.grid, down // whole * part * self.grid

    def refined(self, width: int, height: int) -> tuple[int, int]:
        """What a picture of this size is refined to: the next larger declared size of its shape, else twice as wide."""
        larger = [size for size in self.sizes if size[0] > width and size[0] * height == size[1] * width]
        return min(larger, default=(2 * width, 2 * height))


def sibling(offer: Offer, all_offers: Iterable[Offer]) -> Offer | None:
    """The same model in the other low-bit weights: binary for ternary, ternary for binary (and for the reference)."""
    wanted = "binary" if offer.variant == "ternary" else "ternary"
    family = offer.model.rpartition("-")[0]
    return next((other for other in all_offers if family and other.model == f"{family}-{wanted}"), None)


def offers(settings: Settings) -> tuple[Offer, ...]:
    """The models that can run now, the one to start with first.

    A damaged pack is left out and logged, except the one to start with: that raises BadRequest.
    """
    first = settings.model or catalog.default_id(settings.data_dir)
    found = [_offer(first, settings)]
    for model in (*catalog.installed(settings.data_dir), *catalog.imported(settings.data_dir)):
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
        variant, grid = known.variant, 2 * token_side(None)
    else:
        pack = open_pack(catalog.find(model, settings.data_dir))
        hardware, request = detect(), Request(prompt="", model=model)
        rates = products.rates(settings.data_dir, hardware)
        notes, why = pack.notes, plan(hardware, pack, request, settings.backend, rates=rates).why
        variant, grid = pack.variant, 2 * token_side(pack)
    words = None if notes.vocabulary is None else len(notes.vocabulary)
    label = known.label if known else notes.label
    return Offer(
        model, label, notes.demo, why, notes.sizes, notes.steps, words, variant, grid, notes.languages
    )  # fmt: skip
