"""What is done with pictures that are there: look at two, keep, reject, tag, reuse, delete and undo.

Knows rows, not gradio. Functions hand out one Look and never raise: an error is a sentence.
"""

import time
from collections.abc import Callable

from engine.types import BadRequest
from studio import views
from studio.page import Look, Page, Tab


class Desk:
    """Acts on the pictures of a page."""

    def __init__(self, page: Page) -> None:
        self.page = page

    def pair(self, tab: Tab, a: object, b: object) -> Look:
        """The caption of what the stage shows now."""
        return self._try(lambda: self.page.caption(self.page.image(tab, a), self.page.image(tab, b) if b else None))

    def open(self, tab: Tab, id: object) -> Look:
        """Put a picture on the stage that the strip doesn't hold."""
        return self._try(lambda: self.page.stage(tab, self.page.image(tab, id)))

    def rate(self, tab: Tab, id: object, rating: object) -> Look:
        """Keep, reject or neither; the page has painted it already, the count is ours. A refusal takes it back."""
        kept = {"kept": True, "rejected": False}.get(str(rating))
        try:
            self.page.history.keep(tab.owner, [self.page.image(tab, id).id], kept)
        except Exception as error:
            return self._taken_back(tab, id) | self.page.refused(error)
        look = self.page.paint(tab)
        return {"strip": look["strip"], "tree": look["tree"]}

    def _taken_back(self, tab: Tab, id: object) -> Look:
        """What the page showed before it marked something itself; the number makes it draw that again."""
        look = self.page.paint(tab)
        there = self.page.images(tab)
        image = next((image for image in there if image.id == id), there[-1] if there else None)
        look |= self.page.stage(tab, image)
        again = {"again": time.monotonic_ns()}
        return {name: look[name] | again for name in ("strip", "tree", "stage")} | {"caption": look["caption"]}

    def tag(self, tab: Tab, id: object, text: object) -> Look:
        """Replace a picture's tags by these, separated by commas."""

        def change() -> Look:
            image = self.page.image(tab, id)
            wanted = {" ".join(word.split()) for word in str(text).split(",")} - {""}
            for name in wanted - set(image.tags):
                self.page.history.tag(tab.owner, [image.id], name)
            for name in set(image.tags) - wanted:
                self.page.history.untag(tab.owner, [image.id], name)
            said = ", ".join(sorted(wanted))
            return self._say(f"Tagged {said}" if said else "No tags") | {"strip": self.page.paint(tab)["strip"]}

        return self._try(change)

    def reuse(self, tab: Tab, id: object) -> Look:
        """All settings of a picture back into the controls."""

        def look() -> Look:
            image = self.page.image(tab, id)
            tab.revision = image.revision
            return self.page.reused(image)

        return self._try(look)

    def restore(self, tab: Tab, id: object) -> Look:
        """A revision's prompt back into the prompt box, and its newest picture on the stage."""

        def look() -> Look:
            try:
                revision = self.page.history.revision(tab.owner, int(id))  # type: ignore[call-overload]
            except (TypeError, ValueError):
                raise BadRequest(f"{id!r} is no revision: choose one from the list") from None
            images = self.page.images(tab)
            there = [image for image in images if image.revision == revision.id]
            shown = self.page.stage(tab, there[-1]) if there else {}
            tab.revision = revision.id
            current = {"revisions": self.page.revisions(tab, images)}
            return {"prompt": revision.prompt, "base": revision.id} | shown | current

        return self._try(look)

    def bin(self, tab: Tab, id: object) -> Look:
        """Into the bin; the neighbour takes its place on the stage, and Undo brings it back."""

        def change() -> Look:
            image = self.page.image(tab, id)
            before = [each.id for each in self.page.images(tab)]
            self.page.history.delete(tab.owner, [image.id])
            tab.undo = (image.id,)
            place = before.index(image.id) if image.id in before else len(before)
            neighbours = before[place + 1 : place + 2] or before[max(0, place - 1) : place]
            shown = self.page.history.images(tab.owner, neighbours)
            look = self.page.paint(tab) | self.page.stage(tab, shown[0] if shown else None)
            return look | self._say("Moved to the bin, where it stays for 30 days") | {"undo": True}

        return self._try(change)

    def undo(self, tab: Tab) -> Look:
        """What was deleted last comes back."""

        def change() -> Look:
            ids, tab.undo = tab.undo, ()
            if not ids:
                return self._say("There is nothing to undo") | {"undo": False}
            self.page.history.restore(tab.owner, ids)
            look = self.page.paint(tab) | self.page.stage(tab, self.page.image(tab, ids[0]))
            return look | self._say("Put back") | {"undo": False}

        return self._try(change)

    def copied(self, ok: object) -> Look:
        """What the browser said about copying a picture."""
        if ok:
            return self._say("Copied: paste it anywhere")
        return {"progress": views.idle("error", "The browser did not allow copying: use Download instead.")}

    @staticmethod
    def _say(text: str) -> Look:
        return {"progress": views.idle("done", views.sentence(text))}

    def _try(self, change: Callable[[], Look]) -> Look:
        try:
            return change()
        except Exception as error:
            return self.page.refused(error)
