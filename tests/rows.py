"""Rows for tests: pictures in a history, made without an engine."""

from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np

from engine.fake import FakeBackend
from engine.plan import complete
from engine.types import Picture, Request, Seconds, Step
from studio import tables as t
from studio.history import History, _inserted, revise
from studio.jobs import Engine, Jobs
from studio.rows import DONE, LOCAL, Image, columns
from studio.saving import Saved, insert_image, save


class InlineEngine:
    """A Worker without a process: the fake backend in the caller's thread. Counts what it draws."""

    def __init__(self) -> None:
        self.drawn: list[Request] = []

    def complete(self, request: Request) -> Request:
        return complete(request, None)

    def foresee(self, request: Request) -> int:
        return 0

    def run(self, request: Request) -> Generator[Step | Picture, None, None]:
        request = complete(request, None)
        yield from FakeBackend().generate(request, lambda: False)
        self.drawn.append(request)

    def stop(self) -> None:
        """Nothing it draws takes long enough."""

    def close(self, patience: float = 0) -> None:
        """There is no process to end."""


@contextmanager
def queue(folder: Path, engine: Engine) -> Iterator[Jobs]:
    """A new history and its queue, closed in this order: queue, history."""
    with closing(History(folder)) as history, closing(Jobs(history, engine)) as jobs:
        yield jobs


def add_image(
    history: History, prompt: str = "a red circle", seed: int = 0, *, owner: str = LOCAL, project: int | None = None,
    request: Request | None = None, parent: int | None = None, op: str = "make", pixels: np.ndarray | None = None,
) -> Image:  # fmt: skip
    """A finished job and its picture, file and all, in the owner's project (None: the one used last)."""
    made = request or Request(prompt, "seedling-ternary", seed, 64, 32, 4)
    assert made.width and made.height
    if pixels is None:
        pixels = np.full((made.height, made.width, 3), seed % 256, np.uint8)
    project = history.last_project(owner).id if project is None else project
    values = {
        "owner": owner, "project": project, "batch": "b", "op": op, "parent": parent, "state": DONE, "place": 1,
        "created_at": 1.0,
    }  # fmt: skip

    def insert(db):  # type: ignore[no-untyped-def]
        revision = revise(db, project, made.prompt)
        return _inserted(db, t.job, values | columns(made) | {"revision": revision})[0]

    job = history.job(owner, history.store.write(insert))
    picture = Picture(pixels, made, "fake", "fake: a test", Seconds(total=0.5), 1, dtype="float32")
    saved = save(Saved(picture), job, history)
    id = history.store.write(lambda db: insert_image(db, job, saved, history.data_dir))
    return history.image(owner, id)
