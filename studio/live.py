"""Pictures that follow the typing: made without a row, the newest of an owner displacing the one before.

Knows the engine and its turn in the queue's thread, not the history. A live picture that turns out to be wanted is
handed to the job that asks for the same recipe, so that it is not made twice.
"""

import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from typing import Protocol

from engine.types import Cancelled, EngineError, Picture, Request, Step

REMEMBERED = 8  # finished pictures, one per owner: enough for the tabs that type at this moment


class Engine(Protocol):
    """What is needed of engine.worker.Worker."""

    def complete(self, request: Request) -> Request: ...

    def foresee(self, request: Request) -> int: ...

    def run(self, request: Request) -> Generator[Step | Picture]: ...

    def stop(self) -> None: ...

    def close(self, patience: float = ...) -> None: ...


class Shot:
    """One live picture on its way; guarded by the lock of its Live."""

    def __init__(self, owner: str, request: Request) -> None:
        self.owner, self.request = owner, request
        self.news: list[Step | Picture] = []
        self.error: EngineError | None = None
        self.over = False


class Live:
    """The live pictures of all owners, at most one each. Made by whoever calls `make`, one at a time."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._changed = threading.Condition()
        self._shots: dict[str, Shot] = {}  # by owner, the longest waiting first
        self._current: Shot | None = None
        self._painted: dict[str, Picture] = {}

    def show(self, owner: str, request: Request, wake: Callable[[], None]) -> Iterator[Step | Picture]:
        """Steps and at last the Picture; ends without one when a newer request displaces this one.

        Closing the generator stops the work. Raises EngineError when the picture can't be made.
        """
        shot = Shot(owner, request)
        with self._changed:
            self._drop(self._shots.get(owner))
            self._shots[owner] = shot
        wake()
        seen = 0
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda seen=seen: shot.over or len(shot.news) > seen)  # type: ignore[misc]
                    news, over, error = shot.news[seen:], shot.over, shot.error
                yield from news
                seen += len(news)
                if error is not None:
                    raise error
                if over and not news:
                    return
        finally:
            with self._changed:
                self._drop(shot)

    def stop(self, owner: str) -> None:
        """End an owner's live picture, if there is one."""
        with self._changed:
            self._drop(self._shots.get(owner))

    def next(self) -> Shot | None:
        """The one that has waited longest, now the current one."""
        with self._changed:
            self._current = next(iter(self._shots.values()), None)
            return self._current

    def make(self, shot: Shot) -> None:
        """Make it; nothing is raised, the watcher is told."""
        try:
            with closing(self._engine.run(shot.request)) as run:
                for item in run:
                    with self._changed:
                        if shot.over:
                            break
                        shot.news.append(item)
                        if isinstance(item, Picture):
                            self._painted.pop(shot.owner, None)
                            self._painted[shot.owner] = item
                            while len(self._painted) > REMEMBERED:
                                self._painted.pop(next(iter(self._painted)))
                        self._changed.notify_all()
        except Cancelled:
            pass
        except EngineError as error:
            shot.error = error
        finally:
            with self._changed:
                self._current = None
                self._drop(shot)

    def take(self, owner: str, request: Request) -> Picture | None:
        """The owner's last live picture if it is of exactly this recipe; it is handed out once."""
        with self._changed:
            painted = self._painted.get(owner)
            return self._painted.pop(owner) if painted is not None and painted.request == request else None

    def close(self) -> None:
        """End them all."""
        with self._changed:
            for shot in list(self._shots.values()):
                self._drop(shot)

    def _drop(self, shot: Shot | None) -> None:
        if shot is None:
            return
        shot.over = True
        if self._shots.get(shot.owner) is shot:
            del self._shots[shot.owner]
        if self._current is shot:
            self._engine.stop()  # under our lock, or it could hit what runs next
        self._changed.notify_all()
