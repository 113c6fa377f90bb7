"""What a page does beyond one picture: take a dropped PNG in, hand the kept ones over, verify one, follow the typing.

Knows rows, recipes and Looks, not gradio. Functions never raise: an error is a sentence.
"""

import itertools
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from engine.types import BadRequest, Picture, Request, Step
from studio import adopt, export, files, modelfiles, pictures, verify, views
from studio.page import Look, Page, Tab
from studio.recipe import Recipe
from studio.rows import DONE, Image
from studio.runs import Runs
from studio.template import filling

DEBOUNCE = 0.3  # seconds without a key after which the picture follows
SETTLED = 1.5  # seconds without a key after which what is shown becomes a revision
COMPARED = ("prompt", "model", "seed", "width", "height", "steps", "variations", "draft", "start")


class Extras:
    """Extends a page; `runs` makes the pictures that stay."""

    def __init__(self, page: Page, runs: Runs) -> None:
        self.page, self.runs = page, runs
        self._keys: dict[str, int] = {}  # session -> the number of its last key
        self._count = itertools.count(1)
        self._lock = threading.Lock()
        page.operations["ancestors"] = ("Draw what it came from again", self.ancestors)
        page.applies["ancestors"] = lambda image: bool(image.details.get("ancestors"))
        page.operations["verify"] = ("Verify: make it again and compare", self.verify)

    # A picture from elsewhere

    def dropped(self, tab: Tab, file: str | None, prompt: str, controls: Mapping[str, Any]) -> Look:
        """A PNG of ours: into the project with its chain, its settings into the controls, and what they change."""
        try:
            if not file:
                return {}
            path = Path(file)
            recipe = pictures.reopen(path, path.name)
            image = adopt.adopt(self.page.history, tab.owner, tab.project, path, path.name)
            tab.project = image.project
            now = self.current(prompt, controls)
            look = self.page.paint(tab) | self.page.projects(tab) | self.page.stage(tab, image)
            look |= self.page.reused(image)
            said = f"{path.name}: {restored_words(recipe, now, self.page)}"
            return look | {"progress": views.idle("done", views.sentence(said)), "drop": None}
        except Exception as error:
            return self.page.refused(error) | {"drop": None}

    def ancestors(self, tab: Tab, image: Image) -> Iterator[Look]:
        """Draw the pictures that a picture from elsewhere came from, as its file says, and hang it under them."""
        jobs, history = self.page.jobs, self.page.history
        try:
            links = adopt.missing(history, image)
            queued = [jobs.submit(tab.owner, image.project, link.request, op=link.op)[0] for link in links]
            for job in queued:
                for now in jobs.watch(tab.owner, job.id):
                    yield {"queue": self.page.queue(tab), "progress": views.progress([now])}
            adopt.relink(history, image)
        except Exception as error:
            yield self.page.refused(error)
            return
        failed = sum(jobs.job(tab.owner, job.id).state != DONE for job in queued)
        said = f"{views.counted(len(queued), 'earlier picture')} drawn again"
        word = views.idle("error" if failed else "done", f"{said}{f', {failed} of them failed' if failed else ''}.")
        yield self.page.paint(tab) | {"progress": word}

    def current(self, prompt: str, controls: Mapping[str, Any]) -> Request | None:
        """What the controls ask for now; None while they are incomplete."""
        try:
            return self.runs.request(prompt, controls)
        except BadRequest:
            return None

    def asked(self, whole: Look) -> Request | None:
        """The same of a page that opens, whose Look holds the controls and, beside the size, its model."""
        return self.current(whole["prompt"] or "a", {**whole, "size": whole["size"][1]})

    # The kept ones

    def export(self, tab: Tab) -> Look:
        """A zip of this project's kept pictures; the strip's script takes it from the address."""
        try:
            kept = export.kept(self.page.history, tab.owner, tab.project)
            path = export.write(self.page.history, kept, self.page.settings.cache)
        except Exception as error:
            return self.page.refused(error)
        said = f"{views.counted(len(kept))}, {path.stat().st_size / 1e6:.1f} MB, with a CSV of prompts and recipes"
        return {"progress": views.idle("done", views.sentence(said)), "parcel": filling(url=files.parcel(path))}

    # Made again

    def verify(self, tab: Tab, image: Image) -> Iterator[Look]:
        """Draw the picture again without keeping it, and say whether it is the same."""
        try:
            recipe, before = pictures.reopen(image.path), verify.read_pixels(image.path)
            again = None
            yield {"progress": _busy("Making it again", 0, 0)}
            with closing(self.page.jobs.live(tab.owner, recipe.request)) as run:  # type: ignore[type-var]
                for item in run:
                    if isinstance(item, Step):
                        yield {"progress": _busy(f"Making it again: step {item.index} of {item.total}", *_steps(item))}
                    else:
                        again = item
            if again is None:
                raise BadRequest("the check was displaced by another picture: verify again")
            now = modelfiles.hashes(recipe.request.model, self.page.history.data_dir)
            verdict = verify.compare(recipe, before, again, now)
        except Exception as error:
            yield self.page.refused(error)
            return
        state = "error" if verdict.word == verify.DIFFERENT else "done"
        yield {"progress": views.idle(state, views.sentence(f"Verified: {verdict}"))}

    # Live

    def typed(self, tab: Tab, on: bool, prompt: str, controls: Mapping[str, Any], shown: object) -> Iterator[Look]:
        """Follow the typing: after a pause the picture, after a longer one its revision. A newer key takes over."""
        with self._lock:
            key = self._keys[tab.session] = next(self._count)
        if not on or not prompt.strip():
            self.page.jobs.stop_live(tab.owner)
            return
        time.sleep(DEBOUNCE)
        if not self._newest(tab, key):
            return
        try:
            painted = False
            for look in self._painted(tab, self.runs.request(prompt, controls), shown):
                painted = True
                yield look
        except Exception as error:
            yield self.page.refused(error)
            return
        until = time.monotonic() + SETTLED
        while painted and self._newest(tab, key) and time.monotonic() < until:
            time.sleep(0.05)
        if painted and self._newest(tab, key):
            yield from self.runs.run(tab, prompt, {**controls, "lock": True}, shown)

    def _painted(self, tab: Tab, request: Request, shown: object) -> Iterator[Look]:
        """The picture of this request on the stage; nothing when a newer one came before it."""
        with closing(self.page.jobs.live(tab.owner, request)) as run:  # type: ignore[type-var]
            for item in run:
                if isinstance(item, Picture):
                    stage = dict(shown) if isinstance(shown, dict) else {}
                    yield {"stage": {**stage, **live_stage(item)}, "caption": views.no_caption()}

    def _newest(self, tab: Tab, key: int) -> bool:
        with self._lock:
            return self._keys.get(tab.session) == key


def live_stage(picture: Picture) -> Look:
    """The stage's value for a picture without a row: itself as a small data address, nothing to keep or vary."""
    url, (height, width, _) = views.data_address(picture.pixels), picture.pixels.shape
    return filling(
        a={
            "id": 0, "url": url, "thumb": url, "file": "", "alt": picture.request.prompt, "name": "live",
            "ratio": round(width / height, 4), "rating": "", "is_kept": "false", "is_rejected": "false",
            "tags": "", "gone": False,
        },
        b="", mode="one", other="", can_vary=False, can_refine=False, actions=[], live=True,
    )  # fmt: skip


def restored_words(recipe: Recipe, now: Request | None, page: Page) -> str:
    """What the recipe changes against the controls as they stand, and what this machine doesn't have."""
    request = recipe.request
    missing = [] if request.model in page.offers else [f"its model {request.model} is not installed"]
    changes = []
    if now is not None:
        changes = [
            f"{name} {getattr(now, name)} → {getattr(request, name)}"
            for name in ("seed", "width", "height", "steps", "model")
            if getattr(now, name) != getattr(request, name)
        ]
        if now.prompt != request.prompt:
            changes.insert(0, "other words")
    ancestors = len(recipe.origin.ancestors)
    chain = [f"{views.counted(ancestors, 'earlier picture')} in its chain, which More draws again"]
    said = changes or ["the settings are as they were"]
    return "; ".join([", ".join(said), *(chain if ancestors else []), *missing])


def _busy(text: str, done: int, total: int) -> dict[str, Any]:
    return filling(state="busy", text=text, done=done, total=total, preview="")


def _steps(step: Step) -> tuple[int, int]:
    return step.index, step.total
