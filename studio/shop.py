"""Models on the page: what is installed, what could be, how big each is; download, import, with progress.

Knows the catalogue and the downloads, not gradio. Functions never raise: an error is a sentence. A model that arrives
is offered at once, without a restart.
"""

import threading
from collections.abc import Generator, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from engine import catalog, download, install
from engine.download import Terms
from engine.install import Installed
from engine.transfer import Progress
from engine.types import BadRequest, Request
from studio import models, space, views
from studio.jobs import Jobs
from studio.page import Look, Page, Tab
from studio.template import Filling, filling


class Shop:
    """The models' part of a page."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self._lock = threading.Lock()
        self._stopped: set[str] = set()

    def shown(self) -> Filling:
        """Every known model: what it is, whether it is here, what it needs."""
        there = catalog.installed(self.page.settings.data_dir)
        listed = []
        for model in catalog.MODELS.values():
            offer = self.page.offers.get(model.id)
            state = "installed" if model.id in there else f"not here, {size_words(model.bytes)} to download"
            about = offer.why if offer else f"{model.licence}, from {model.repository}" if model.repository else ""
            listed.append({"label": model.label, "state": state, "about": about})
        for id, offer in self.page.offers.items():
            if id not in catalog.MODELS:
                listed.append({"label": offer.label, "state": "installed", "about": offer.why})
        return filling(models=listed)

    def choices(self) -> list[tuple[str, str]]:
        """(label with size, id) of what could be downloaded."""
        could = models.installable(self.page.settings.data_dir)
        return [(f"{model.label} ({size_words(model.bytes)})", model.id) for model in could]

    def get(self, tab: Tab, model: str | None) -> Iterator[Look]:
        """Download a model, or go on where an earlier download stopped."""
        if not model:
            yield _said(self.page.refused(BadRequest("no model is chosen: choose one from the list")))
            return
        yield from self._fetched(lambda: download.get(model, self.page.settings.data_dir), model)

    def bring(self, tab: Tab, folder: str) -> Iterator[Look]:
        """Import a folder or a USB stick of this machine."""
        if not folder.strip():
            yield _said(self.page.refused(BadRequest("no folder is named: give the path of a model's folder")))
            return
        path = Path(folder.strip()).expanduser()
        yield from self._fetched(lambda: install.import_folder(path, self.page.settings.data_dir), "")

    def stop(self, tab: Tab, model: str | None) -> Look:
        """Stop a download; what came stays, and the next one goes on there."""
        with self._lock:
            self._stopped.add(model or "")
        return {"shop_said": "Stopping; what has come stays, and Download goes on there."}

    def opened(self, tab: Tab, request: Request | None) -> Look:
        """What a page shows that opens now: a model may have come since the page was built."""
        return {"shop": self.shown(), "get": self.choices()} | self.foresee(tab, request)

    def foresee(self, tab: Tab, request: Request | None) -> Look:
        """What the picture that the controls ask for would take in memory, before it is queued; or why it won't fit."""
        said = "" if request is None else memory_words(self.page.jobs, request)
        return {"foresee": views.sentence(said) if said else ""}

    def _fetched(self, begin: Any, model: str) -> Iterator[Look]:
        with self._lock:
            self._stopped.discard(model)
        try:
            if space.on_a_space():
                raise BadRequest("on a Space the models are the owner's to choose: run Niwaki on your own machine")
            run: Generator[Any, None, None] = begin()
            with closing(run):
                for item in run:
                    yield {"shop_said": _progress_words(item)}
                    if isinstance(item, Installed):
                        yield self._arrived(item)
                    with self._lock:
                        if model in self._stopped:
                            yield {"shop_said": "Stopped. Download goes on where it stopped."}
                            return
        except Exception as error:
            yield _said(self.page.refused(error))

    def _arrived(self, item: Installed) -> Look:
        """Offer the new model; the page's model list gets it at once."""
        for offer in models.offers(self.page.settings):
            self.page.offers.setdefault(offer.model, offer)
        self.page.others = models.installable(self.page.settings.data_dir)
        note = f" {views.sentence(item.note)}" if item.note else ""
        said = f"{item.model} is installed: {size_words(item.bytes)} in {item.folder}.{note}"
        there = {"model": None, "grid_models": None}  # both lists anew, what is chosen in them stays
        return {"shop_said": said, "shop": self.shown(), "get": self.choices()} | there


def memory_words(jobs: Jobs, request: Request) -> str:
    """"at most 3.1 GB of memory", or the sentence that refuses the picture; "" where nobody can know."""
    try:
        peak = jobs.foresee(request)
    except BadRequest as error:
        return str(error)
    return f"at most {peak / 1e9:.1f} GB of memory" if peak else ""


def size_words(number: int | None) -> str:
    """Bytes as a person says them."""
    return "" if number is None else f"{number / 1e9:.1f} GB" if number >= 1e8 else f"{number / 1e6:.1f} MB"


def _progress_words(item: Terms | Progress | Installed) -> str:
    if isinstance(item, Terms):
        pinned = "a commit that our catalogue names" if item.pinned else "the newest commit, which nobody pinned"
        return f"{item.repository}, licence {item.licence}: {item.files} files, {size_words(item.bytes)}, at {pinned}."
    if isinstance(item, Progress):
        part = f"{item.done / max(item.total, 1):.0%} of {size_words(item.total)}: {item.path}"
        if item.waiting:
            return f"{part}; the connection broke, trying again in {item.waiting:.0f} s"
        left = f", about {views.counted(round(item.seconds_left / 60), 'minute')} left" if item.seconds_left else ""
        return f"{part}{f', {item.rate / 1e6:.1f} MB/s' if item.rate else ''}{left}"
    return f"{item.model} is installed."


def _said(look: Look) -> Look:
    return {"shop_said": look["progress"]["text"]}
