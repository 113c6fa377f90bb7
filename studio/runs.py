"""What starts pictures: Generate, four seeds, an example, the other model; and what steers the queue.

Knows requests and jobs, not gradio. Every function hands out Looks and never raises: an error is a sentence.
"""

import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from engine import chain
from engine.types import BadRequest, Request
from studio import relatives, views
from studio.models import sibling
from studio.page import SCENE, Look, Page, Tab
from studio.rows import WAITING, Image, Job

NEW_SEEDS = 1_000_000  # the dice's: many enough, and short enough to be read out and typed
SEEDS = 4  # of one Shift+Enter
HANDOVER = 0.03  # seconds that the engine's thread has Python to itself, before this one says what has begun
STARTED = (*SCENE, "base", "diff", "seed", "past", "unmix")  # what a run may change on the page
CONTROLS = ("size", "quality", "seed", "lock", "steps", "model", "base", "past")  # saved with the prompt as it is typed


class Runs:
    """Starts pictures on a page."""

    def __init__(self, page: Page) -> None:
        self.page = page
        page.operations |= {  # how much of a new seed's change: measured on the seedling (SPEED.md)
            "vary": ("Vary, subtle: a third of a new seed", partial(self._vary, "subtle")),
            "refine": ("Refine", self._refine),
            "vary medium": ("Vary, medium: half of a new seed", partial(self._vary, "medium")),
            "vary strong": ("Vary, strong: three quarters of a new seed", partial(self._vary, "strong")),
        }

    def run(self, tab: Tab, prompt: str, controls: Mapping[str, Any], shown: object, count: int = 1) -> Iterator[Look]:
        """Queue what the controls say (with `count` new seeds each) and follow it; `shown` is the stage's value."""
        try:
            request = self.request(prompt, controls)
            if count > 1 or not controls["lock"]:
                fresh = replace(request, variations=(), draft=None, start=0)
                requests = [replace(fresh, seed=secrets.randbelow(NEW_SEEDS)) for _ in range(count)]
            else:
                requests = [request]
            jobs = self.page.jobs.submit(tab.owner, tab.project, *requests, base=_number(controls["base"]))
        except Exception as error:
            yield self.page.refused(error)
            return
        look = self.expect(tab, jobs, _shown(shown))
        tab.revision = jobs[0].revision
        look |= {"base": jobs[0].revision, "diff": self.page.diff(tab, prompt, jobs[0].revision)}
        if count == 1:
            look["seed"] = requests[0].seed
        if not controls["lock"]:
            look |= self.page.past(None)
        yield look
        self.save(tab, prompt, {**controls, **{name: look[name] for name in CONTROLS if name in look}})
        yield from self.page.follow(tab)

    def again(self, tab: Tab, image: Image, request: Request, op: str) -> Iterator[Look]:
        """Queue a relative of a picture, to be shown over it."""
        try:
            jobs = self.page.jobs.submit(tab.owner, tab.project, request, op=op, parent=image.id, base=image.revision)
        except Exception as error:
            yield self.page.refused(error)
            return
        yield self.expect(tab, jobs, image.id)
        yield from self.page.follow(tab)

    def expect(self, tab: Tab, jobs: Sequence[Job], other: int | None) -> Look:
        """The first one's picture will go on the stage, over `other`. That they are queued a follower says as well."""
        tab.waiting[jobs[0].id] = other
        tab.batch = [job.id for job in jobs]
        self.page.jobs.handed_over(jobs[0].id, HANDOVER)
        if self.page.followed(tab):
            return {}
        return {"progress": views.progress(jobs, self.page.jobs.ahead), "queue": self.page.queue(tab)}

    def example(self, tab: Tab, index: int, controls: Mapping[str, Any]) -> Iterator[Look]:
        """One of the empty stage's prompts, typed and run."""
        examples = self.page.examples()
        prompt = examples[index % len(examples)][1]
        for number, look in enumerate(self.run(tab, prompt, controls, None)):
            yield look | ({"prompt": prompt} if number == 0 else {})

    def other_model(self, tab: Tab, id: object) -> Iterator[Look]:
        """The same recipe on the model's brother: ternary | binary, side by side in one click."""
        try:
            image = self.page.image(tab, id)
            offer = self.page.offers.get(image.request.model)
            brother = sibling(offer, self.page.offers.values()) if offer else None
            if brother is None:
                raise BadRequest(f"{image.request.model} has no installed counterpart: see Models for what could be")
        except Exception as error:
            yield self.page.refused(error)
            return
        yield from self.again(tab, image, replace(image.request, model=brother.model), f"on {brother.short}")

    def operate(self, tab: Tab, name: str, id: object) -> Iterator[Look]:
        """Vary, Refine, or an action of the menu, as far as this page has it."""
        try:
            if name not in self.page.operations:
                raise BadRequest(f"{name!r} is not an action of this page")
            image = self.page.image(tab, id)
        except Exception as error:
            yield self.page.refused(error)
            return
        yield from self.page.operations[name][1](tab, image)

    def _vary(self, how: str, tab: Tab, image: Image) -> Iterator[Look]:
        """The same words and seed with a share of other noise mixed in; the chain is in the recipe."""
        yield from self.again(tab, image, relatives.vary(image.request, how), f"vary {how}")

    def _refine(self, tab: Tab, image: Image) -> Iterator[Look]:
        """The picture as a draft, enlarged and drawn on from there. Both stay."""
        offer = self.page.offers.get(image.request.model)
        try:
            if offer is None:
                raise BadRequest(f"the model {image.request.model!r} is not installed: refine another picture")
            size = offer.refined(image.request.width or 0, image.request.height or 0)
            request = relatives.refine(image.request, [size])
        except Exception as error:
            yield self.page.refused(error)
            return
        yield from self.again(tab, image, request, "refine")

    def request(self, prompt: str, controls: Mapping[str, Any]) -> Request:
        """The controls as a request. Raises BadRequest for an empty number and an unknown model."""
        for name in ("seed", "steps"):
            if controls[name] is None:
                raise BadRequest(f"the {'seed' if name == 'seed' else 'number of steps'} is empty: give a whole number")
        offer = self.page.offers.get(controls["model"])
        if offer is None:
            raise BadRequest(f"the model {controls['model']!r} is not installed: choose another one")
        width, _, height = str(controls["size"]).partition("x")
        size = (int(width), int(height)) if width.isdecimal() and height.isdecimal() else offer.sizes[0]
        if controls["quality"] == "draft":
            size = offer.draft(*size)
        request = Request(prompt.strip(), offer.model, int(controls["seed"]), *size, int(controls["steps"]))
        past = controls.get("past")
        return relatives.renewed(request, chain.request(past)) if isinstance(past, Mapping) else request

    # The prompt box

    def save(self, tab: Tab, prompt: str, controls: Mapping[str, Any]) -> None:
        """Remember what is being typed."""
        kept = {name: controls[name] for name in CONTROLS}
        self.page.history.save_draft(tab.owner, tab.project, prompt, **kept)

    # The queue

    def steer(self, tab: Tab, id: object, what: str) -> Iterator[Look]:
        """Cancel, retry, or move one job; a retried one is followed."""
        jobs, number = self.page.jobs, _number(id) or 0
        try:
            if what == "cancel":
                jobs.cancel(tab.owner, number)
            elif what == "retry":
                job = jobs.retry(tab.owner, number)
                yield self.expect(tab, [job], None)
                yield from self.page.follow(tab)
            elif what in ("sooner", "later"):
                self._move(tab, number, -1 if what == "sooner" else 1)
        except Exception as error:
            yield self.page.refused(error)
        yield {"queue": self.page.queue(tab)}

    def stop(self, tab: Tab) -> Look:
        """Stop what one click began, four seeds or a grid as a whole; what was queued after it goes on."""
        try:
            mine = [job for job in self.page.jobs.queue(tab.owner) if job.project == tab.project]
            for job in reversed([job for job in mine if job.batch == mine[0].batch]):  # or the next one would start
                self.page.jobs.cancel(tab.owner, job.id)
        except Exception as error:
            return self.page.refused(error)
        return {}

    def _move(self, tab: Tab, id: int, by: int) -> None:
        waiting = [job.id for job in self.page.jobs.queue(tab.owner) if job.state == WAITING]
        if id not in waiting:
            raise BadRequest(f"job {id} does not wait any more: only waiting jobs can be moved")
        others = [other for other in waiting if other != id]
        place = max(0, waiting.index(id) + by)
        self.page.jobs.move(tab.owner, id, before=others[place] if place < len(others) else None)


def _shown(stage: object) -> int | None:
    """The id of the picture that a stage's value shows; None for the empty stage."""
    picture = stage.get("a") if isinstance(stage, dict) else None
    return _number(picture.get("id")) if isinstance(picture, dict) else None


def _number(value: object) -> int | None:
    return int(value) if isinstance(value, int | float) and value else None
