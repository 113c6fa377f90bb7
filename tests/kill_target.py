"""A studio that ends itself with SIGKILL at one exact point: `python -m tests.kill_target DATA POINT [worker]`.

Makes and keeps two pictures, queues two more, and dies at POINT of the first of these. With `worker` the engine is
the real child process, else the fake backend on the queue's thread.
"""

import os
import signal
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from engine.fake import FakeBackend
from engine.plan import complete
from engine.types import Picture, Request, Step
from engine.worker import Worker
from studio import pictures
from studio.history import History
from studio.jobs import Jobs
from studio.rows import LOCAL

MODEL = "bonsai-ternary"  # never installed in a test's folder, so the fake backend needs no pack
STEPS = 4
# In the order in which a picture comes to be. `insert`, `take` and `commit` die in their transaction, before COMMIT.
POINTS = (
    "insert", "inserted", "take", "taken", *(f"step{n}" for n in range(STEPS + 1)),
    "png-half", "png-whole", "renamed", "thumb-half", "thumb-renamed", "commit", "committed",
)  # fmt: skip
STATEMENTS = {"insert": "INSERT INTO job", "take": "UPDATE job SET state", "commit": "INSERT INTO image"}
AFTER = {"inserted": "insert", "taken": "take", "committed": "commit"}


class InProcess:
    """The fake backend as an engine without a process."""

    def __init__(self) -> None:
        self._stopped = False

    def complete(self, request: Request) -> Request:
        return complete(request, None)

    def foresee(self, request: Request) -> int:
        return 0

    def run(self, request: Request) -> Generator[Step | Picture, None, None]:
        self._stopped = False
        yield from FakeBackend().generate(request, lambda: self._stopped)

    def stop(self) -> None:
        self._stopped = True

    def close(self, patience: float = 0) -> None:
        self._stopped = True


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(point: str, history: History, engine: Any) -> None:
    """From now on, die at this point."""
    if point in STATEMENTS or point in AFTER:
        _arm_transaction(STATEMENTS[AFTER.get(point, point)], point in AFTER, history)
    elif point.startswith("step"):
        _arm_step(int(point[4:]), engine)
    else:
        _arm_files(point)


def _arm_transaction(statement: str, after: bool, history: History) -> None:
    seen = []

    @sa.event.listens_for(sa.Engine, "before_cursor_execute")
    def note(connection: Any, cursor: Any, sql: str, *rest: Any) -> None:
        if sql.startswith(statement):
            seen.append(sql)

    @sa.event.listens_for(sa.Engine, "commit")
    def commit(connection: Any) -> None:
        if seen and not after:
            die()

    change = history.store._change

    def and_then_die(*args: Any) -> Any:
        result = change(*args)
        if seen:
            die()
        return result

    history.store._change = and_then_die  # type: ignore[method-assign]


def _arm_step(index: int, engine: Any) -> None:
    run = engine.run

    def dying(request: Request) -> Generator[Step | Picture, None, None]:
        for item in run(request):
            if isinstance(item, Step) and item.index == index:
                die()
            yield item

    engine.run = dying


def _arm_files(point: str) -> None:
    replace, fsync, png = os.replace, os.fsync, pictures._png

    def dying_replace(source: Any, target: Any) -> None:
        suffix = Path(target).suffix
        if point == "thumb-half" and suffix == ".webp":
            os.truncate(source, 10)
            die()
        replace(source, target)
        if (point, suffix) in {("renamed", ".png"), ("thumb-renamed", ".webp")}:
            die()

    def dying_fsync(number: int) -> None:
        fsync(number)
        die()

    def half(*args: Any) -> bytes:
        whole = png(*args)
        aside = [p for p in Path(sys.argv[1]).rglob(".*.part")]
        assert len(aside) == 1, aside
        aside[0].write_bytes(whole[: len(whole) // 2])
        die()
        return whole

    os.replace = dying_replace  # type: ignore[assignment]
    if point == "png-whole":
        os.fsync = dying_fsync  # type: ignore[assignment]
    if point == "png-half":
        pictures._png = half


def request(seed: int) -> Request:
    return Request("two red circles", MODEL, seed, 64, 64, STEPS)


def main(folder: Path, point: str, engine: Any) -> None:
    history = History(folder)
    jobs = Jobs(history, engine)
    project = history.last_project(LOCAL).id
    for job in jobs.submit(LOCAL, project, request(1), request(2)):
        *_, last = jobs.watch(LOCAL, job.id)
        history.keep(LOCAL, [last.image], True)
    if point == "checkpoint":
        print("ready", flush=True)
        while True:  # until the test kills us
            history.save_draft(LOCAL, project, "x" * 20_000)
            history.store.shrink()
    arm(point, history, engine)
    for job in jobs.submit(LOCAL, project, request(3), request(4)):
        list(jobs.watch(LOCAL, job.id))
    sys.exit("it survived")


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    main(folder, sys.argv[2], Worker("fake", data_dir=folder) if "worker" in sys.argv[3:] else InProcess())
