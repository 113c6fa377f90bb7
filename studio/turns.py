"""One picture at a time, and a Stop that reaches only one's own.

Knows neither gradio nor models: an owner is any name (the page takes the tab's). A queue that survives the tab is a
later issue; until then a waiting run exists as long as somebody iterates over it.
"""

import threading
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from typing import Protocol

from engine.types import Cancelled, Picture, Request, Step

PATIENCE = 0.25  # seconds between two looks at the door; also how soon a closed tab stops waiting


class Engine(Protocol):
    """What is needed of engine.worker.Worker."""

    def run(self, request: Request) -> Generator[Step | Picture]: ...

    def stop(self) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Waiting:
    """Somebody else's picture is being made; ours comes after it."""


class Turns:
    """Hands the one engine to one owner after another."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._turn = threading.Lock()
        self._state = threading.Lock()  # guards the two fields below
        self._running: str | None = None
        self._stopped: set[str] = set()

    def run(self, owner: str, request: Request) -> Generator[Waiting | Step | Picture]:
        """Wait for the turn, then make the picture. Closing the generator gives the turn back and stops the work."""
        with self._state:
            self._stopped.discard(owner)
        while not self._turn.acquire(timeout=PATIENCE):
            self._raise_if_stopped(owner)
            yield Waiting()
        try:
            with self._state:
                self._running = owner
            self._raise_if_stopped(owner)
            with closing(self._engine.run(request)) as work:
                for item in work:
                    self._raise_if_stopped(owner)  # a Stop that came before the engine had anything to stop
                    yield item
        finally:
            with self._state:
                self._running = None
            self._turn.release()

    def stop(self, owner: str) -> None:
        """Stop what this owner runs or waits for, and nobody else's."""
        with self._state:
            self._stopped.add(owner)
            if self._running == owner:  # asked and acted on under one lock, or the next owner's run could be hit
                self._engine.stop()

    def _raise_if_stopped(self, owner: str) -> None:
        with self._state:
            if owner in self._stopped:
                raise Cancelled("stopped on request")
