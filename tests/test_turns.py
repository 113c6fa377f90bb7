"""One picture at a time; Stop and a closed tab reach only their own."""

import threading
import time
from collections.abc import Generator

import numpy as np
import pytest

from engine.types import Cancelled, Picture, Request, Seconds, Step
from studio import turns
from studio.turns import Turns, Waiting


class Engine:
    """Two steps, each as long as the test wants: `go` lets one step pass."""

    def __init__(self) -> None:
        self.go = threading.Semaphore(0)
        self.stops = 0
        self.open = 0
        self._stop = threading.Event()

    def run(self, request: Request) -> Generator[Step | Picture, None, None]:
        self._stop.clear()
        self.open += 1
        try:
            yield Step(0, 2)
            for index in (1, 2):
                while not self.go.acquire(timeout=0.01):
                    if self._stop.is_set():
                        raise Cancelled("stopped on request")
                yield Step(index, 2)
            yield Picture(np.zeros((8, 8, 3), np.uint8), request, "fake", "", Seconds(), 0)
        finally:
            self.open -= 1

    def stop(self) -> None:
        self.stops += 1
        self._stop.set()

    def close(self) -> None: ...


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "PATIENCE", 0.02)


REQUEST = Request("a", "m")


def test_a_second_owner_waits_for_the_first() -> None:
    engine = Engine()
    both = Turns(engine)
    first = both.run("one", REQUEST)
    assert next(first) == Step(0, 2)
    second = both.run("two", REQUEST)
    assert next(second) == Waiting()
    engine.go.release(4)
    assert isinstance(list(first)[-1], Picture)
    assert isinstance(list(second)[-1], Picture)
    assert engine.open == 0


def test_stop_of_one_who_waits_does_not_touch_the_one_who_runs() -> None:
    engine = Engine()
    both = Turns(engine)
    first, second = both.run("one", REQUEST), both.run("two", REQUEST)
    assert next(first) == Step(0, 2)
    assert next(second) == Waiting()
    both.stop("two")
    with pytest.raises(Cancelled):
        next(second)
    assert engine.stops == 0
    engine.go.release(2)
    assert isinstance(list(first)[-1], Picture)


def test_stop_reaches_a_step_that_is_being_made() -> None:
    engine = Engine()
    both = Turns(engine)
    run = both.run("one", REQUEST)
    next(run)
    threading.Timer(0.05, both.stop, ["one"]).start()
    started = time.monotonic()
    with pytest.raises(Cancelled):
        next(run)
    assert time.monotonic() - started < 5
    engine.go.release(2)
    assert isinstance(list(both.run("one", REQUEST))[-1], Picture)  # and the next run is not stopped by the old Stop


def test_closing_gives_the_turn_back_and_ends_the_work() -> None:
    engine = Engine()
    both = Turns(engine)
    run = both.run("one", REQUEST)
    next(run)
    run.close()
    assert engine.open == 0
    engine.go.release(2)
    assert isinstance(list(both.run("two", REQUEST))[-1], Picture)


def test_closing_while_waiting_leaves_the_turn_alone() -> None:
    engine = Engine()
    both = Turns(engine)
    first, second = both.run("one", REQUEST), both.run("two", REQUEST)
    next(first), next(second)
    second.close()
    third = both.run("three", REQUEST)
    assert next(third) == Waiting()
    engine.go.release(4)
    list(first)
    assert isinstance(list(third)[-1], Picture)
