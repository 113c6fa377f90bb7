"""The studio's own queue: rows in the history, drained into the engine by one thread whether anybody watches or not.

    jobs = Jobs(history, engine)          # takes up what waits, marks what a kill interrupted; close() when done
    (job,) = jobs.submit(LOCAL, project.id, request, op="make", base=revision.id)  # four requests: a batch of four
    for job in jobs.watch(LOCAL, job.id):  # a Job at every change and once a second, the last one is over
        ...job.state, job.step, job.total, job.seconds_left, job.error
    history.image(LOCAL, job.image)       # when job.state == DONE
    for queue in jobs.watch_queue(LOCAL): # all of an owner's jobs that wait or run, at every change; never ends
    jobs.cancel(LOCAL, id)                # this one and no other, also while it runs
    jobs.retry(LOCAL, id); jobs.move(LOCAL, id, before=other_id or None); jobs.estimate(request)
    jobs.live(LOCAL, request)             # Steps and a Picture without a row; jobs.forget(owner): the end of a visit

Leaving `watch` stops nothing. A picture is written aside and renamed, then its row is committed together with the
job's: a row never points at a missing file. A job whose engine process dies is tried once more; what ran when the
server itself died is `interrupted` and waits for `retry`. Knows neither gradio nor models.
"""

import logging
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from engine.types import BadRequest, Cancelled, Crashed, EngineError, Picture, Request, Step
from studio import pace, turns
from studio import tables as t
from studio.adopt import lost, take_in
from studio.disk import empty_bin, forget, sweep_gone
from studio.history import JOBS, History, job_of, last_revision, revise
from studio.live import Engine as Engine  # who builds a queue needs both names
from studio.live import Live
from studio.pace import Pace
from studio.rows import DONE, FAILED, INTERRUPTED, LOCAL, RUNNING, STOPPED, WAITING, Job, columns
from studio.saving import Saved, insert_image, remove, save

log = logging.getLogger(__name__)

HEARTBEAT = 1.0  # seconds after which a watcher looks again though nothing happened: a closed tab is noticed then
PATIENCE = 1.5  # seconds the engine has to obey a cancel before its process is ended
AGAIN = 2.0  # seconds until a full disk is tried again
DAY = 86_400.0
MAX_LISTED = 10_000  # jobs of one batch or queue
SOON = 8  # lost pictures that are taken in before the first job: those of the kill are the newest
MAX_TRIES = 2  # starts of one job before a dying engine process is taken for its fault
LOST = "Niwaki was ended while this picture was being made: Retry makes it again"


class Jobs:
    """The queue of one data folder. Everything may be called from any thread."""

    def __init__(self, history: History, engine: Engine) -> None:
        self._history, self._engine, self._store = history, engine, history.store
        self._changed = threading.Condition()  # guards everything below; notified at every change
        self._changes = 0
        self._turns = 0  # those of them that are more than a step
        self._running: int | None = None  # the job in the engine
        self._progress: Job | None = None  # the same job with its steps, which are not worth a commit each
        self._paced: tuple[int, Pace | None] = 0, None  # the pace of this machine with the model and size of that job
        self._steps: list[float] = []  # when each of its steps was done
        self._stopping: set[int] = set()  # jobs whose cancel is on its way
        self._owed: dict[int, dict[str, Any]] = {}  # ends of jobs that a full disk kept from being written
        self._closing = False
        self._saved: dict[int, Saved] = {}  # pictures that a full disk kept from being saved, by job
        self._live = Live(engine)
        self._tidied = 0.0
        self._recovered = False
        self._lost: list[Path] = []  # pictures without a row, taken in while nothing else is to be done
        with suppress(EngineError):  # a full disk: the thread tries again, the page opens all the same
            self._interrupt()
        self._thread = threading.Thread(target=self._drain, name="niwaki-jobs", daemon=True)
        self._thread.start()

    # What a page calls

    def submit(
        self, owner: str, project: int, *requests: Request, op: str = "make", parent: int | None = None,
        base: int | None = None,
    ) -> tuple[Job, ...]:  # fmt: skip
        """Queue one job per request, as one batch; `base` is the revision that was edited, `parent` the image used.

        Raises BadRequest for an impossible request and for one that memory can't hold (then none of them is queued).
        """
        complete = [self._engine.complete(request) for request in requests]
        for kind in {(request.model, request.width, request.height): request for request in complete}.values():
            self._engine.foresee(kind)
        batch = secrets.token_hex(8)
        self._history.project(owner, project)
        if parent is not None:
            self._history.image(owner, parent)

        def insert(db: sa.Connection) -> list[int]:
            last = db.execute(sa.select(sa.func.coalesce(sa.func.max(t.job.c.place), 0.0))).scalar_one()
            ids = []
            since = base or last_revision(db, project)  # several wordings at once are siblings, not a line
            for number, request in enumerate(complete, start=1):
                values = columns(request) | {
                    "owner": owner, "project": project, "revision": revise(db, project, request.prompt, since),
                    "batch": batch, "op": op, "parent": parent, "state": WAITING, "total": request.steps,
                    "place": last + number, "created_at": time.time(),
                }  # fmt: skip
                ids.append(int(db.execute(t.job.insert().values(**values)).inserted_primary_key[0]))  # type: ignore[index]
            return ids

        ids = self._store.write(insert)
        self._tell()
        return self._jobs(owner, t.job.c.id.in_(ids))

    def complete(self, request: Request) -> Request:
        """The request with every field set, as its model declares. Raises BadRequest for an impossible one."""
        return self._engine.complete(request)

    def foresee(self, request: Request) -> int:
        """Bytes of memory that the request would take, 0 where nobody can say. Raises BadRequest as `submit`."""
        return self._engine.foresee(self._engine.complete(request))

    def watch(self, owner: str, id: int) -> Iterator[Job]:
        """The job now, at every change and at least once a second, until it is over. Leaving stops nothing."""
        for (job,) in self._watch(lambda: (self.job(owner, id),)):
            yield job
            if job.over:
                return

    def watch_batch(self, owner: str, batch: str) -> Iterator[tuple[Job, ...]]:
        """The same for all jobs submitted together, until all are over."""
        for jobs in self._watch(lambda: self._jobs(owner, t.job.c.batch == batch)):
            yield jobs
            if all(job.over for job in jobs):
                return

    def watch_queue(self, owner: str, glance: float = 0.0) -> Iterator[tuple[Job, ...]]:
        """What waits and runs, at every change; goes on until it is closed. For `glance` seconds after a look a step
        alone is no reason to look again."""
        yield from self._watch(lambda: self.queue(owner), glance)

    def queue(self, owner: str) -> tuple[Job, ...]:
        """The owner's jobs that run or wait, in their order."""
        return self._jobs(owner, t.job.c.state.in_((RUNNING, WAITING)))

    def handed_over(self, id: int, patience: float) -> None:
        """Wait until the engine has spoken of this job, as long as nothing else holds it up: for a caller whose own
        work would keep Python from the threads that bring it there."""
        with self._changed:
            self._changed.wait_for(lambda: self._running and (self._running != id or self._steps), patience)

    def ahead(self, job: Job) -> int:
        """How many jobs, of whomever, come before this waiting one at most."""
        return self._store.read(lambda db: turns.ahead(db, job))

    def job(self, owner: str, id: int) -> Job:
        """One job, with its steps so far. Raises BadRequest for one that isn't there."""
        return self._now(self._history.job(owner, id))

    def live(self, owner: str, request: Request) -> Iterator[Step | Picture]:
        """A picture that follows the typing, without a row: its steps, then itself, or nothing when a newer one came.

        It comes before all waiting jobs. `submit` of the same request then takes this picture instead of a new one.
        """
        yield from self._live.show(owner, self._engine.complete(request), wake=self._tell)

    def stop_live(self, owner: str) -> None:
        """End the owner's live picture, if there is one."""
        self._live.stop(owner)

    def estimate(self, *requests: Request) -> float | None:
        """Seconds that these complete requests will take here, None while nothing like them was made."""
        kinds = Counter(replace(request, prompt="", seed=0, draft=None, variations=()) for request in requests)
        total = 0.0
        for kind, number in kinds.items():
            known = pace.pace(self._history, kind)
            if known is None:
                return None
            total += number * known.total((kind.steps or 0) - kind.start)
        return total

    def cancel(self, owner: str, id: int) -> None:
        """Stop this job, waiting or running, within two seconds. Does nothing to one that is over."""
        self._history.job(owner, id)

        def change(db: sa.Connection) -> bool:
            where = (t.job.c.id == id, t.job.c.state == WAITING)
            stopped = db.execute(t.job.update().where(*where).values(state=STOPPED, error="", ended_at=time.time()))
            return bool(stopped.rowcount)

        if self._store.write(change):
            self._tell()
            return
        with self._changed:
            if self._running != id or id in self._stopping:
                return
            self._stopping.add(id)
            self._engine.stop()  # under the lock, or it could hit the next job
        timer = threading.Timer(PATIENCE, self._force, [id])
        timer.daemon = True
        timer.start()

    def retry(self, owner: str, id: int) -> Job:
        """Queue a job again that was stopped, failed or interrupted; the same row, at the end of the queue."""

        def change(db: sa.Connection) -> None:
            last = db.execute(sa.select(sa.func.max(t.job.c.place))).scalar_one()
            values = dict(state=WAITING, step=0, error="", tries=0, place=last + 1, started_at=None, ended_at=None)
            again = t.job.c.state.in_((STOPPED, FAILED, INTERRUPTED))
            if not db.execute(t.job.update().where(t.job.c.id == id, again).values(**values)).rowcount:
                raise BadRequest(f"job {id} is not over or is done: there is nothing to retry")

        if not self._history.job(owner, id).over:
            with self._changed:
                owed = self._owed.pop(id, None)
            if owed is not None:
                self._set(id, owed)
        self._store.write(change)
        self._tell()
        return self.job(owner, id)

    def move(self, owner: str, id: int, before: int | None = None) -> None:
        """Put a waiting job before another of the same owner, None: last. Others' jobs keep their places."""
        self._store.write(lambda db: turns.move(db, owner, id, before))
        self._tell()

    def close(self) -> None:
        """Stop taking jobs. The running one becomes `interrupted`, the waiting ones wait for the next start."""
        with self._changed:
            self._closing = True
            if self._running is not None:
                self._engine.stop()
            self._changed.notify_all()
        self._live.close()
        self._thread.join(PATIENCE)
        if self._thread.is_alive():
            self._engine.close(patience=0)
            self._thread.join()

    def forget(self, owner: str) -> None:
        """Stop everything of an owner and delete all they have, for good: the end of a visit."""
        self.stop_live(owner)
        for job in self.queue(owner):
            self.cancel(owner, job.id)
        forget(self._history, owner)  # a picture that is ready only now finds its row gone, and leaves no file
        self._tell()

    # Watching

    def _watch(self, look: Callable[[], tuple[Job, ...]], glance: float = 0.0) -> Iterator[tuple[Job, ...]]:
        while True:
            with self._changed:
                seen, turns = self._changes, self._turns
            yield look()
            self._sleep(turns, min(glance, HEARTBEAT), through_steps=True)
            self._sleep(seen, HEARTBEAT)
            if self._closing and self._changes == seen:
                return

    def _jobs(self, owner: str, *where: Any) -> tuple[Job, ...]:
        return tuple(map(self._now, self._history.jobs(owner, *where, limit=MAX_LISTED)))

    def _now(self, job: Job) -> Job:
        """The job as it is this instant: what the file says, with the steps and the ends that are not in it yet."""
        with self._changed:
            owed = self._owed.get(job.id)
            progress, steps = self._progress, list(self._steps)
        if owed is not None:
            return replace(job, **owed)
        if job.state != RUNNING:
            return job
        if progress is None or progress.id != job.id:  # its row is an instant ahead of its progress, or behind its end
            return replace(job, total=0)
        now = dict(step=progress.step, total=progress.total, preview=progress.preview)
        return replace(job, **now, seconds_left=self._left(progress, steps))  # type: ignore[arg-type]

    def _left(self, job: Job, steps: list[float]) -> float | None:
        known = self._known(job)
        if not steps:
            return None if known is None else known.total((job.request.steps or 0) - job.request.start)
        return pace.left(known, job.step, job.total, steps[-1] - steps[0], time.monotonic() - steps[-1])

    def _known(self, job: Job) -> Pace | None:
        """The pace of past runs like this one, read when somebody first asks: the engine needn't wait for it."""
        with self._changed:
            id, known = self._paced
        if id != job.id:
            known = pace.pace(self._history, job.request)
            with self._changed:
                self._paced = job.id, known
        return known

    def _tell(self, step: bool = False) -> None:
        with self._changed:
            self._changes += 1
            self._turns += not step
            self._changed.notify_all()

    # The thread that drains

    def _recover(self) -> None:
        """After a kill: what ran is interrupted, unless its picture is there; files without a row get one."""
        self._interrupt()
        sweep_gone(self._history)
        self._lost = lost(self._history)
        for _ in range(min(len(self._lost), SOON)):
            take_in(self._history, self._lost.pop())
        self._recovered = True
        self._tell()

    def _interrupt(self) -> None:
        values = {"state": INTERRUPTED, "error": LOST, "ended_at": time.time()}
        self._store.write(lambda db: db.execute(t.job.update().where(t.job.c.state == RUNNING).values(**values)))

    def _tidy(self) -> None:
        """Once a day: the bin's old pictures."""
        if time.monotonic() - self._tidied > DAY or not self._tidied:
            self._tidied = time.monotonic()
            empty_bin(self._history)

    def _drain(self) -> None:
        after_live = False
        while not self._closing:
            with self._changed:
                seen = self._changes
            # Live pictures come first, but strangers' pictures don't wait for the end of somebody's typing.
            turn = after_live and self._strangers_wait()
            if not turn and (shot := self._live.next()) is not None:
                self._live.make(shot)
                after_live = True
                continue
            after_live = False
            try:
                if not self._recovered:
                    self._recover()
                self._pay()
                self._tidy()
                job = self._take()
                if job is None and self._lost:
                    take_in(self._history, self._lost.pop())
                    continue
            except Exception as error:  # most often a full disk: nothing is lost by waiting
                log.error("the queue waits: %s", error, exc_info=not isinstance(error, EngineError))
                self._sleep(seen, AGAIN)
                continue
            if job is None:
                self._sleep(seen, 3600)
            else:
                self._work(job)

    def _strangers_wait(self) -> bool:
        """Whether somebody else's jobs wait than the one person's who owns the machine: on a Space."""
        try:
            return self._store.read(lambda db: turns.strangers_wait(db, LOCAL))
        except EngineError:
            return False

    def _sleep(self, seen: int, seconds: float, through_steps: bool = False) -> None:
        """Until something has changed since `seen` (`_changes`, or `_turns` when steps wake nobody)."""

        def changed() -> bool:
            return (self._turns if through_steps else self._changes) != seen or self._closing

        with self._changed:
            self._changed.wait_for(changed, seconds)

    def _take(self) -> Job | None:
        """The next waiting job, marked as running."""

        def change(db: sa.Connection) -> Job | None:
            waiting = JOBS.where(t.job.c.state == WAITING).order_by(t.job.c.place, t.job.c.id).limit(1)
            owner = turns.whose(db)
            row = db.execute(waiting.where(t.job.c.owner == owner)).mappings().first()
            if row is None:
                return None
            values: Mapping[str, Any] = {"state": RUNNING, "started_at": time.time(), "tries": row["tries"] + 1}
            db.execute(t.job.update().where(t.job.c.id == row["id"]).values(**values))
            return replace(job_of(row), **values)

        job = self._store.write(change)
        with self._changed:
            self._running = None if job is None else job.id
            # until the engine's first word, model loaded and prompt read, it has no steps yet
            self._progress, self._steps = job and replace(job, total=0), []
        if job is not None:
            self._tell()
        return job

    def _work(self, job: Job) -> None:
        try:
            saved = self._saved.pop(job.id, None)
            if saved is None:
                saved = Saved(self._live.take(job.owner, job.request) or self._made(job))
            self._keep(job, saved)
            end: dict[str, Any] | None = None
        except EngineError as error:
            end = self._end(job, error)
        except Exception:
            log.exception("job %d failed", job.id)
            end = _failed(f"something in Niwaki broke; the details are in {self._history.data_dir / 'logs'}")
        with self._changed:
            self._running = self._progress = None
            self._stopping.discard(job.id)
            if end is not None:
                self._owed[job.id] = end if end["state"] == WAITING else end | {"ended_at": time.time()}
        with suppress(EngineError):  # a full disk again: the page is told from `_owed`, the file later
            self._pay()
        self._tell()

    def _end(self, job: Job, error: EngineError) -> dict[str, Any]:
        """What a job becomes that ended without a picture."""
        if job.id in self._stopping:
            return {"state": STOPPED, "error": ""}
        if self._closing or isinstance(error, Cancelled):
            return {"state": INTERRUPTED, "error": LOST}
        if isinstance(error, Crashed) and job.tries < MAX_TRIES:
            return {"state": WAITING, "error": f"{error} (trying once more)"}
        return _failed(error)

    def _made(self, job: Job) -> Picture:
        picture = None
        with closing(self._engine.run(job.request)) as run:
            for item in run:
                with self._changed:
                    if job.id in self._stopping or self._closing:
                        raise Cancelled("stopped on request")
                    if isinstance(item, Step):
                        before = self._progress.preview if self._progress else None
                        seen = before if item.preview is None else item.preview  # the last one stays until the next
                        self._progress = replace(job, step=item.index, total=item.total, preview=seen)
                        self._steps.append(time.monotonic())
                if isinstance(item, Picture):
                    picture = item
                self._tell(step=True)
        if picture is None:
            raise EngineError("the engine ended without a picture: try again")
        return picture

    def _keep(self, job: Job, saved: Saved) -> None:
        """The files, then the rows of picture and job in one transaction."""
        try:
            saved = save(saved, job, self._history)

            done = {"state": DONE, "step": job.total, "ended_at": time.time()}

            def commit(db: sa.Connection) -> bool:
                still = db.execute(t.job.update().where(t.job.c.id == job.id).values(**done)).rowcount
                if still:
                    insert_image(db, job, saved, self._history.data_dir)
                return bool(still)

            if not self._store.write(commit):  # its project was deleted for good meanwhile
                remove(saved)
        except EngineError:
            self._saved[job.id] = saved  # `retry` needs no engine then
            while len(self._saved) > 4:
                self._saved.pop(next(iter(self._saved)))
            raise

    def _pay(self) -> None:
        """Write the ends of jobs that a full disk kept back. Raises EngineError while it is full."""
        with self._changed:
            owed = dict(self._owed)
        for id, values in owed.items():
            self._set(id, values)
            with self._changed:
                self._owed.pop(id, None)

    def _set(self, id: int, values: Mapping[str, Any]) -> None:
        self._store.write(lambda db: db.execute(t.job.update().where(t.job.c.id == id).values(**values)))

    def _force(self, id: int) -> None:
        """End the engine's process if it hasn't obeyed: it is deep in a load or a long block."""
        with self._changed:  # held, so that nothing else is running when it ends
            if self._running == id and id in self._stopping:
                self._engine.close(patience=0)


def _failed(error: object) -> dict[str, Any]:
    return {"state": FAILED, "error": str(error)}
