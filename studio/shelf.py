"""The library: every picture of every project, searched, filtered, stacked and paged.

Knows rows, not gradio. A page is named by the id its first picture comes before, so that the thousandth page is as
quick as the first; how we came here is a list of such ids.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from studio import disk, library, views
from studio.page import Look, Page, Tab
from studio.rows import Image
from studio.storage import Storage
from studio.template import Filling, filling

SHOW = (
    ("Everything", "all"), ("Kept", "kept"), ("Undecided", "undecided"), ("Rejected", "rejected"), ("Bin", "bin"),
)  # fmt: skip


class Shelf:
    """What the library shows and does."""

    def __init__(self, page: Page) -> None:
        self.page = page

    def look(self, tab: Tab, wanted: Mapping[str, Any], trail: Sequence[int] = ()) -> Look:
        """The page at the end of the trail; `trail` and `next` are what Back and Next go by."""
        try:
            return self._look(tab, wanted, list(trail))
        except Exception as error:
            return self.page.refused(error) | {"grid": filling(pictures=[], nothing=views.sentence(str(error)))}

    def pick(self, tab: Tab, id: object, what: str, wanted: Mapping[str, Any], trail: Sequence[int]) -> Look:
        """Open a picture on the stage, keep, reject, bin, or put it back."""
        try:
            image = self.page.image(tab, id)
            if what == "open":
                other = image.project != tab.project  # its prompt and controls come too, or they would be overwritten
                look = self.page.whole(tab, image.project) if other else self.page.paint(tab)
                return look | self.page.stage(tab, image)
            changes: dict[str, Callable[[], None]] = {
                "keep": lambda: self._keep(tab, image, True),
                "reject": lambda: self._keep(tab, image, False),
                "bin": lambda: self.page.history.delete(tab.owner, [image.id]),
                "restore": lambda: self.page.history.restore(tab.owner, [image.id]),
            }
            if what == "purge":
                if not Storage.certain(tab, "purge", image.id):
                    return self.look(tab, wanted, trail)
                changes["purge"] = lambda: disk.purge(self.page.history, tab.owner, [image.id])
            if what in changes:
                changes[what]()
            if what == "bin":
                tab.undo = (image.id,)
        except Exception as error:
            return self.page.refused(error)
        return self.page.paint(tab) | self.look(tab, wanted, trail) | ({"undo": True} if what == "bin" else {})

    def tags(self, tab: Tab) -> list[tuple[str, str]]:
        """The tags to filter by, as (label, value)."""
        there = library.tags(self.page.history, tab.owner)
        return [("Any tag", "")] + [(f"{name} ({count})", name) for name, count in there]

    def _look(self, tab: Tab, wanted: Mapping[str, Any], trail: list[int]) -> Look:
        chosen = library.Filter(
            project=tab.project if wanted.get("here") else None,
            kept={"kept": True, "rejected": False}.get(str(wanted.get("show"))),
            decided=False if wanted.get("show") == "undecided" else None,
            tag=wanted.get("tag") or None,
            text=wanted.get("text") or None,
            deleted=wanted.get("show") == "bin",
        )
        if wanted.get("stacked"):
            return self._stacked(tab, library.stacks(self.page.history, tab.owner, chosen), trail)
        found = library.page(self.page.history, tab.owner, chosen, before=trail[-1] if trail else None)
        total = library.count(self.page.history, tab.owner, chosen)
        first = len(trail) * library.PAGE + 1
        said = f"{first} to {first + len(found.images) - 1} of {total}" if found.images else "Nothing found"
        return self._shown(tab, found.images, {}, said, trail, found.next)

    def _stacked(self, tab: Tab, stacks: Sequence[library.Stack], trail: list[int]) -> Look:
        """A page of stacks. They are all counted anyway, so that here a trail's length says which page it is."""
        first = len(trail) * library.PAGE
        covers = [stack.cover for stack in stacks[first : first + library.PAGE]]
        said = f"{first + 1} to {first + len(covers)} of {views.counted(len(stacks), 'revision')}"
        after = covers[-1].id if first + len(covers) < len(stacks) else None
        sizes = {stack.cover.id: stack.count for stack in stacks}
        return self._shown(tab, covers, sizes, said if covers else "Nothing found", trail, after)

    def _shown(
        self, tab: Tab, images: Sequence[Image], stacks: Mapping[int, int], said: str, trail: list[int],
        after: int | None,
    ) -> Look:  # fmt: skip
        labels = self._labels(images)
        pictures = [
            views.record(image, labels)
            | {
                "stack": views.counted(stacks[image.id]) if image.id in stacks else "",
                "purge": "Really delete?" if tab.sure == ("purge", image.id) else "Delete for good",
            }
            for image in images
        ]
        grid: Filling = filling(pictures=pictures, nothing="No picture fits. Change the search or the filter.")
        turns = {"back": bool(trail), "older": after is not None}
        return {"grid": grid, "found": said, "trail": trail, "next": after} | turns

    def _keep(self, tab: Tab, image: Image, kept: bool) -> None:
        self.page.history.keep(tab.owner, [image.id], None if image.kept is kept else kept)

    def _labels(self, images: Sequence[Image]) -> dict[int, str]:
        owners = {(image.owner, image.project) for image in images}
        revisions = [revision for who in owners for revision in self.page.history.revisions(*who)]
        return {revision.id: revision.label for revision in revisions}
