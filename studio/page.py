"""What one page is: its tabs, what each of them shows of the history, and how it follows the queue.

Knows rows and the queue, not gradio. Everything is handed out as a Look: the name of a part of the page -> what it
shows. `runs` starts pictures, `desk` acts on them, `shelf` is the library; each takes a Page.
"""

import logging
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from engine.catalog import Model
from engine.chain import values
from engine.types import BadRequest, EngineError
from studio import library, privacy, space, views
from studio import tables as t
from studio.diff import diff
from studio.history import History
from studio.jobs import Jobs
from studio.models import Offer, sibling
from studio.rows import DONE, FAILED, INTERRUPTED, LOCAL, STOPPED, Image, Job, Project
from studio.settings import Settings
from studio.template import Filling, filling

log = logging.getLogger(__name__)

Look = dict[str, Any]

# Parts of the page that change together, for the events' outputs (see board.on)
SCENE = ("stage", "caption", "strip", "tree", "revisions", "queue", "progress")  # with a picture that comes
MODEL = ("model", "switch", "bar", "facts")  # with the choice of a model
REUSED = ("prompt", "seed", "steps", "quality", "size", "base", "lock", *MODEL, "past", "unmix")  # as a picture had it

STRIP = 200  # pictures in strip and tree; older ones are in the library
ENDED = 8  # rows of the queue that ended without a picture
ASLEEP = 4.0  # seconds; a follower moves once a second, so one that was silent for longer was left by its connection
LINGER = 30.0  # seconds that an idle tab's follower stays; gradio may lose what is asked while its stream is closing
BEAT = 5.0  # seconds after which a follower says something, since only then a closed tab is noticed
GLANCE = 0.25  # seconds; what follows more quickly nobody could read, and telling it costs as much as a picture does
BREATH = 0.08  # seconds that a browser has to fetch and paint a picture before it must draw the lists
TABS = 500  # of which something is remembered

EXAMPLES = (  # the first of each language that the model reads, then English ones up to four
    ("en", "two red lanterns at dusk"),
    ("hi", "सर्दियों की रात में एक सफ़ेद सारस"),
    ("mr", "पावसात तीन निळ्या छत्र्या"),
    ("ta", "இரவில் ஒரு மஞ்சள் நிலா"),
    ("en", "four orange koi on a blue background"),
    ("en", "a red maple leaf in autumn"),
    ("en", "a moon above a pagoda at night"),
)


@dataclass(slots=True)
class Tab:
    """One open tab. `waiting` are the jobs whose pictures go on its stage: job -> the picture to compare with."""

    session: str
    owner: str = LOCAL
    project: int = 0
    revision: int = 0  # the one worked on: run or restored last
    waiting: dict[int, int | None] = field(default_factory=dict)
    batch: list[int] = field(default_factory=list)  # the jobs that 1 to 4 pick from
    begun: float = -math.inf  # when it asked for a new project last
    undo: tuple[int, ...] = ()  # what the last deletion took
    models: int = 0  # how many its lists of models hold
    sure: tuple[object, ...] = ()  # what was asked for once and takes a second press
    shown: dict[str, Any] = field(default_factory=dict)  # what was last sent, so that the same isn't sent again


class Page:
    """What the page shows. One for all tabs; a tab is told apart by its session."""

    def __init__(
        self, history: History, jobs: Jobs, settings: Settings, offers: Sequence[Offer], others: Sequence[Model] = (),
        patient: bool = False,
    ) -> None:  # fmt: skip
        """`patient`: for a browser, whose followers linger and whose pictures are painted before the lists come."""
        self.history, self.jobs, self.settings = history, jobs, settings
        self.linger, self.breath = (LINGER, BREATH) if patient else (0.0, 0.0)
        self.offers = {offer.model: offer for offer in offers}
        self.others = others
        self.first = offers[0]
        # What a picture's Vary, Refine and menu do: name -> (label, function(tab, image) -> Looks). Others add theirs.
        self.operations: dict[str, tuple[str, Callable[[Tab, Image], Iterator[Look]]]] = {}
        self.applies: dict[str, Callable[[Image], bool]] = {}  # to which pictures, where not to all
        self._tabs: OrderedDict[str, Tab] = OrderedDict()
        self._followed: dict[str, tuple[object, float]] = {}  # session -> (its follower, when it moved last)
        self._lock = threading.Lock()

    # Tabs

    def tab(self, session: str, project: object = None) -> Tab:
        """The tab of this session, on its project (or the one used last)."""
        with self._lock:
            tab = self._tabs.setdefault(session, Tab(session, space.owner(session)))
            self._tabs.move_to_end(session)
            while len(self._tabs) > TABS:
                self._tabs.popitem(last=False)
        if project is not None or not tab.project:
            tab.project = self.project(tab.owner, project).id
        return tab

    def close(self, session: str) -> None:
        """Forget a tab that was closed."""
        with self._lock:
            self._tabs.pop(session, None)

    def owners(self) -> set[str]:
        """Who has a page open."""
        with self._lock:
            return {tab.owner for tab in self._tabs.values()}

    def project(self, owner: str, wanted: object) -> Project:
        """The project of that id; where it is none of this owner's, the one used last."""
        try:
            return self.history.project(owner, int(wanted))  # type: ignore[call-overload]
        except (BadRequest, TypeError, ValueError):
            return self.history.last_project(owner)

    def image(self, tab: Tab, id: object) -> Image:
        """A picture of this tab's owner. Raises BadRequest for anything else."""
        try:
            number = int(id)  # type: ignore[call-overload]
        except (TypeError, ValueError):
            raise BadRequest(f"{id!r} is no picture: choose one from the strip") from None
        return self.history.image(tab.owner, number)

    # Looks

    def paint(self, tab: Tab) -> Look:
        """Strip, tree and revisions of the tab's project, and the queue."""
        images = self.images(tab)
        labels = self.labels(tab)
        done = {image.job: image.id for image in images}
        batch = [done[job] for job in tab.batch if job in done]
        kept = library.count(self.history, tab.owner, library.Filter(project=tab.project, kept=True))
        return {
            "strip": views.strip(images, labels, batch, kept, tab.project),
            "tree": views.tree(images, self.history.revisions(tab.owner, tab.project)),
            "revisions": self.revisions(tab, images),
            "queue": self.queue(tab),
        }

    def images(self, tab: Tab) -> tuple[Image, ...]:
        """The newest pictures of the tab's project, oldest first."""
        newest = library.page(self.history, tab.owner, library.Filter(project=tab.project), limit=STRIP)
        return newest.images[::-1]

    def labels(self, tab: Tab) -> dict[int, str]:
        return {revision.id: revision.label for revision in self.history.revisions(tab.owner, tab.project)}

    def revisions(self, tab: Tab, images: Sequence[Image]) -> Filling:
        rows = self.history.revisions(tab.owner, tab.project)
        texts = {row.id: row.prompt for row in rows}
        diffs = {row.id: diff(texts[row.parent], row.prompt) for row in rows if row.parent in texts}
        counts: dict[int, int] = {}
        for image in images:
            counts[image.revision] = counts.get(image.revision, 0) + 1
        return views.revisions(rows, diffs, counts, tab.revision)

    def queue(self, tab: Tab, active: Sequence[Job] | None = None) -> Filling:
        active = self.jobs.queue(tab.owner) if active is None else active
        over = t.job.c.state.in_((STOPPED, FAILED, INTERRUPTED))
        ended = self.history.jobs(tab.owner, over, t.job.c.project == tab.project, limit=ENDED)
        return views.queue([*active, *(job for job in ended if job.over)], self.labels(tab), self.jobs.ahead)

    def stage(self, tab: Tab, image: Image | None, other: Image | None = None) -> Look:
        """The stage with this picture, the other one under it, and their caption; the empty stage without one."""
        if image is None:
            return {"stage": views.empty(self.examples(), self.installed()), "caption": views.no_caption()}
        offer = self.offers.get(image.request.model)
        brother = sibling(offer, self.offers.values()) if offer else None
        menu = {
            name: label
            for name, (label, _) in self.operations.items()
            if name not in ("vary", "refine") and self.applies.get(name, lambda _: True)(image)
        }
        shown = views.stage(
            image, other, self.labels(tab), brother.short if brother else "", frozenset(self.operations), menu
        )  # fmt: skip
        return {"stage": shown} | self.caption(image, other)

    def caption(self, image: Image, other: Image | None) -> Look:
        before = other.request.prompt if other else image.request.prompt
        return {"caption": views.caption(image, other, diff(before, image.request.prompt), self.offers)}

    def examples(self) -> list[tuple[str, str]]:
        """(language, prompt): four that the first model can draw."""
        reads = self.first.languages or (("en",) if self.first.words else ("en", "hi", "mr", "ta"))
        return [example for example in EXAMPLES if example[0] in reads][:4]

    def installed(self) -> str:
        """What is installed and what could be, in a line."""
        here = ", ".join(offer.label for offer in self.offers.values())
        could = ", ".join(model.label for model in self.others)
        return f"Installed: {here}." + (f" Could be: {could} (see Models)." if could else "")

    def bar(self, model: str) -> Filling:
        """What stands at the top: whether the model is a demo, and who can reach this page."""
        reach, is_open = privacy.reach(self.settings.host)
        return filling(demo=self.offers[model].demo, reach=reach if is_open else "", open=is_open)

    def projects(self, tab: Tab) -> Look:
        """The project list: (name, id) of every project, and which is open."""
        names = [(project.name, project.id) for project in self.history.projects(tab.owner)]
        return {"project": (names, tab.project)}

    def model_choices(self) -> list[tuple[str, str]]:
        """(label, id) of every installed model; one that arrives while the page is open is among them at once."""
        return [(offer.label, offer.model) for offer in self.offers.values()]

    def model(self, model: str) -> Look:
        """What changes with the choice of a model; nothing where it isn't installed."""
        if model not in self.offers:
            return {}
        return {"model": model, "switch": model, "bar": self.bar(model), "facts": self.facts(model)}

    def facts(self, model: str) -> Filling:
        """What the panel says about the chosen model: where it runs and why."""
        offer = self.offers[model]
        known = f" It knows {offer.words} words and nothing else." if offer.words else ""
        said = f"A demo model: small, made to show what the studio does.{known}" if offer.demo else ""
        return filling(label=offer.label, demo=said, why=views.sentence(f"runs on {offer.why}"))

    # Following the queue

    def follow(self, tab: Tab) -> Iterator[Look]:
        """What changes until the owner's queue stays empty. A tab is followed once: a second call ends at once."""
        me = object()
        if not self._moves(tab, me):
            return
        try:
            with closing(self.jobs.watch_queue(tab.owner, GLANCE)) as queue:  # type: ignore[type-var]
                yield from self._watch(tab, me, queue)
        finally:
            self._leave(tab, me)

    def _watch(self, tab: Tab, me: object, queue: Iterator[tuple[Job, ...]]) -> Iterator[Look]:
        before: dict[int, str] = {}
        told, busy = -math.inf, time.monotonic()
        for jobs in queue:
            now, states = time.monotonic(), {job.id: job.state for job in jobs}
            if states or before or tab.waiting:
                busy = now
                if states.keys() != before.keys() or now - told > GLANCE:
                    for look in self._news(tab, jobs, before.keys() - states.keys()):
                        yield self.fresh(tab, look)
                        if "stage" in look:
                            time.sleep(self.breath)
                    told = now
            elif now - told > BEAT:  # what other tabs did
                yield self.fresh(tab, self.paint(tab))
                told = now
            before = states
            if not self._moves(tab, me) or (not jobs and now - busy >= self.linger and self._ended(tab, me)):
                return

    def tick(self, tab: Tab) -> Look:
        """What a tab that isn't followed has missed: another tab's pictures, or its own after a lost connection."""
        if not self._moves(tab, tick := object()):
            return {}
        self._leave(tab, tick)
        look, jobs = self.paint(tab), self.jobs.queue(tab.owner)
        for news in self._news(tab, jobs):
            look |= news
        return self.fresh(tab, look) | self._arrived(tab)

    def _arrived(self, tab: Tab) -> Look:
        """Both lists of models anew, with what is chosen in them, where another tab brought one."""
        if tab.models == len(self.offers):
            return {}
        tab.models = len(self.offers)
        return {"model": None, "grid_models": None}

    def fresh(self, tab: Tab, look: Look) -> Look:
        """What of a Look this tab doesn't show yet."""
        return {name: value for name, value in look.items() if tab.shown.get(name) != value}

    def adopt(self, tab: Tab) -> None:
        """Wait for what already runs in the tab's project: a page that was reloaded shows it like its own."""
        newest = self.images(tab)[-1:]
        firsts = {job.batch: job.id for job in reversed(self.jobs.queue(tab.owner)) if job.project == tab.project}
        tab.waiting = dict.fromkeys(firsts.values(), newest[0].id if newest else None)

    def followed(self, tab: Tab) -> bool:
        """Whether somebody tells this tab what happens in the queue."""
        with self._lock:
            return time.monotonic() - self._followed.get(tab.session, (None, -math.inf))[1] < ASLEEP

    def _moves(self, tab: Tab, follower: object) -> bool:
        """Whether this follower may go on: it is the tab's only one, or the other one has fallen asleep."""
        now = time.monotonic()
        with self._lock:
            who, moved = self._followed.get(tab.session, (follower, now))
            if who is not follower and now - moved < ASLEEP:
                return False
            self._followed[tab.session] = (follower, now)
            return True

    def _leave(self, tab: Tab, follower: object) -> None:
        with self._lock:
            if self._followed.get(tab.session, (None, 0.0))[0] is follower:
                del self._followed[tab.session]

    def _ended(self, tab: Tab, follower: object) -> bool:
        """Whether to leave: a job may have come between the look at the queue and the leaving."""
        self._leave(tab, follower)
        return not self.jobs.queue(tab.owner) or not self._moves(tab, follower)

    def whole(self, tab: Tab, wanted: object) -> Look:
        """Everything, as the tab shows a project that it opens: as it was left."""
        project = self.project(tab.owner, wanted)
        tab.project, tab.shown, tab.models = project.id, {}, len(self.offers)
        self.adopt(tab)
        controls = self.controls(project.controls)
        tab.revision = controls["base"]
        newest = self.images(tab)[-1:]
        look = self.paint(tab) | self.projects(tab) | self.stage(tab, newest[0] if newest else None)
        look |= {"progress": views.idle(), "diff": self.diff(tab, project.prompt, controls["base"])}
        look |= {"bar": self.bar(controls["model"]), "facts": self.facts(controls["model"])}
        return look | controls | {"prompt": project.prompt, "undo": bool(tab.undo), "grid_models": None}

    def controls(self, saved: Mapping[str, Any]) -> Look:
        """A project's saved controls, with what is missing or no longer possible put right."""
        model = str(saved.get("model")) if saved.get("model") in self.offers else self.first.model
        offer = self.offers[model]
        return {
            "model": model, "size": (model, saved.get("size") or f"{offer.sizes[0][0]}x{offer.sizes[0][1]}"),
            "quality": "draft" if saved.get("quality") == "draft" else "full", "seed": saved.get("seed") or 0,
            "lock": saved.get("lock") is not False, "steps": saved.get("steps") or offer.steps,
            "base": saved.get("base") or 0, "switch": model,
        } | self.past(saved.get("past"))  # fmt: skip

    def reused(self, image: Image) -> Look:
        """All settings of a picture into the controls, as far as this machine has its model."""
        request = image.request
        model = request.model if request.model in self.offers else self.first.model
        return {
            "prompt": request.prompt, "seed": request.seed, "steps": request.steps, "quality": "full",
            "size": (model, f"{request.width}x{request.height}"), "base": image.revision, "lock": True,
        } | self.model(model) | self.past(values(request) if request.variations or request.draft else None)  # fmt: skip

    @staticmethod
    def past(past: Any) -> Look:
        """The picture whose noise or draft the controls go on using, as chain.values has it; None: none."""
        return {"past": past, "unmix": views.past_words(past) if isinstance(past, Mapping) else ""}

    def diff(self, tab: Tab, prompt: str, base: object) -> Filling:
        """Under the prompt while typing: what changed since the last run."""
        rows = self.history.revisions(tab.owner, tab.project)
        last = next((row for row in rows if row.id == base), None)
        parts = diff(last.prompt, prompt.strip()) if last else ()
        if last is None or not views.changed(parts):
            return filling(label="", words=[])
        return filling(label=f"Changes since {last.label}", words=views.words(parts, around=3))

    def _news(self, tab: Tab, jobs: Sequence[Job], gone: Collection[int] = ()) -> Iterator[Look]:
        """First the picture that came, so that nothing holds it up; then queue and progress, and what lists it."""
        mine = [job for job in jobs if job.project == tab.project]
        progress = views.progress(mine, self.jobs.ahead)
        over = self._over(tab)
        for job, other in over:
            if job.state == DONE and job.image:
                pair = self.history.images(tab.owner, filter(None, [job.image, other]))
                yield self.stage(tab, *pair[:2])
            elif not mine:
                progress = views.idle("error" if job.state == FAILED else "stopped", views.job_text(job))
        look: Look = {"queue": self.queue(tab, jobs)}
        if mine or over or tab.shown.get("progress", {}).get("state") == "busy":
            look["progress"] = progress  # else the last word stays
        yield look | (self.paint(tab) if gone or over else {})

    def _over(self, tab: Tab) -> list[tuple[Job, int | None]]:
        """What the tab waited for and needn't any more: jobs with the pictures to compare theirs with."""
        waiting = list(tab.waiting)  # another event may add to it meanwhile
        jobs = {job.id: job for job in self.history.jobs(tab.owner, t.job.c.id.in_(waiting))}
        for id in waiting:
            if id not in jobs:  # deleted for good
                tab.waiting.pop(id, None)
        return [(job, tab.waiting.pop(job.id, None)) for job in jobs.values() if job.over]

    def refused(self, error: Exception) -> Look:
        """An error as the page says it: a sentence; what is a bug of ours is logged."""
        if isinstance(error, EngineError):
            return {"progress": views.idle("error", views.sentence(str(error)))}
        log.error("a handler failed", exc_info=error)
        broken = f"Something in Niwaki broke; the details are in {self.settings.log_file}."
        return {"progress": views.idle("error", broken)}
