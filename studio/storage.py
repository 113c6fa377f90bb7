"""Where the data lies and how big it is, a project's name, and what leaves for good.

Knows the data folder and Looks, not gradio. What can't be taken back asks for a second press. Functions never raise.
"""

from collections.abc import Callable

from studio import disk, library, space, views
from studio.page import Look, Page, Tab
from studio.shop import size_words
from studio.template import Filling, filling


class Storage:
    """The data folder's part of a page."""

    def __init__(self, page: Page) -> None:
        self.page = page

    def look(self, tab: Tab) -> Look:
        """The folder with its sizes, and the project's name to be changed."""
        tab.sure = ()
        return self._try(lambda: self._look(tab) | {"storage_said": ""})

    def rename(self, tab: Tab, name: str) -> Look:
        """Another name for the tab's project."""

        def change() -> Look:
            self.page.history.rename_project(tab.owner, tab.project, name)
            return self.page.projects(tab) | self._look(tab) | {"storage_said": "Renamed."}

        return self._try(change)

    def empty_bin(self, tab: Tab) -> Look:
        """Everything in the bin, for good."""

        def change() -> Look:
            many = self._count(tab, library.Filter(deleted=True))
            if not many:
                return {"storage_said": "The bin is empty."}
            if not self.certain(tab, "bin"):
                return {"storage_said": f"Press again to delete {views.counted(many)} for good."}
            gone = disk.empty_bin(self.page.history, tab.owner, days=0)
            tab.undo = ()
            said = {"storage_said": f"{views.counted(gone)} deleted for good.", "undo": False}
            return self._look(tab) | self.page.paint(tab) | said

        return self._try(change)

    def delete_project(self, tab: Tab) -> Look:
        """The tab's project with everything in it, for good; the one used before it is opened."""

        def change() -> Look:
            project = self.page.history.project(tab.owner, tab.project)
            many = self._count(tab, library.Filter(project=project.id))
            kept = self._count(tab, library.Filter(project=project.id, kept=True))
            if not self.certain(tab, "project", project.id):
                what = f"“{project.name}” with {views.counted(many)}, {kept} of them kept"
                return {"storage_said": f"Press again to delete {what}, and what it has in the bin, for good."}
            for job in self.page.jobs.queue(tab.owner):
                if job.project == project.id:
                    self.page.jobs.cancel(tab.owner, job.id)
                    list(self.page.jobs.watch(tab.owner, job.id))  # one that runs still writes its picture
            disk.delete_project(self.page.history, tab.owner, project.id)
            tab.undo = ()
            look = self.page.whole(tab, None)
            return look | self._look(tab) | {"storage_said": f"“{project.name}” was deleted for good."}

        return self._try(change)

    @staticmethod
    def certain(tab: Tab, *what: object) -> bool:
        """Whether this was asked for just before: what can't be taken back takes two presses."""
        if tab.sure == what:
            tab.sure = ()
            return True
        tab.sure = what
        return False

    def _look(self, tab: Tab) -> Look:
        named: Look = {"name": self.page.history.project(tab.owner, tab.project).name}
        if space.on_a_space():
            return named  # the data folder is nobody's to see there
        usage = disk.usage(self.page.settings.data_dir)
        parts = [
            {"name": part.name, "files": views.counted(part.files, "file"), "size": size_words(part.bytes)}
            for part in usage.parts if part.files
        ]  # fmt: skip
        sizes: Filling = filling(
            folder=str(usage.folder), parts=parts, total=size_words(usage.bytes), free=size_words(usage.free),
            bin=views.counted(self._count(tab, library.Filter(deleted=True))), days=disk.BIN_DAYS,
        )  # fmt: skip
        return {"storage": sizes} | named

    def _count(self, tab: Tab, wanted: library.Filter) -> int:
        return library.count(self.page.history, tab.owner, wanted)

    def _try(self, change: Callable[[], Look]) -> Look:
        try:
            return change()
        except Exception as error:
            return {"storage_said": self.page.refused(error)["progress"]["text"]}
