"""The queue: jobs run though nobody watches, cancel reaches the right one, and errors are kept as sentences."""

import threading
from collections.abc import Generator, Iterator
from pathlib import Path

import numpy as np
import pytest

from engine.plan import complete
from engine.types import BadRequest, Cancelled, Crashed, EngineError, Picture, Request, Seconds, Step
from studio.history import History
from studio.jobs import Jobs
from studio.rows import DONE, FAILED, LOCAL, RUNNING, STOPPED, WAITING, Job


class Engine:
    """Two steps, each as long as the test wants: `go` lets one step pass. A prompt says what goes wrong."""

    def __init__(self) -> None:
        self.go = threading.Semaphore(0)
        self.deaths = 0
        self._stop = threading.Event()

    def complete(self, request: Request) -> Request:
        return complete(request, None)

    def run(self, request: Request) -> Generator[Step | Picture, None, None]:
        self._stop.clear()
        yield Step(0, 2)
        for index in (1, 2):
            while not self.go.acquire(timeout=0.01):
                if self._stop.is_set():
                    raise Cancelled("stopped on request")
            yield Step(index, 2)
        if "fails" in request.prompt:
            raise EngineError("the model is upset: ask nicely")
        if "dies" in request.prompt:
            self.deaths += 1
            raise Crashed("the engine process was ended by SIGKILL")
        yield Picture(np.zeros((16, 16, 3), np.uint8), request, "fake", "", Seconds(), 0)

    def stop(self) -> None:
        self._stop.set()

    def close(self, patience: float = 0) -> None:
        self._stop.set()


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def jobs(engine: Engine, tmp_path: Path) -> Iterator[Jobs]:
    history = History(tmp_path / "data")
    queue = Jobs(history, engine)
    yield queue
    queue.close()
    history.close()


def submit(jobs: Jobs, *prompts: str, owner: str = LOCAL) -> tuple[Job, ...]:
    project = jobs._history.last_project(owner).id
    return jobs.submit(owner, project, *(Request(prompt, "seedling-ternary") for prompt in prompts))


def until(jobs: Jobs, id: int, state: str, owner: str = LOCAL) -> Job:
    for job in jobs.watch(owner, id):
        if job.state == state:
            return job
    raise AssertionError(f"ended as {job}")


def test_a_job_is_made_though_nobody_watches(jobs: Jobs, engine: Engine) -> None:
    one, two = submit(jobs, "a circle", "a ring")
    assert one.batch == two.batch and one.revision != two.revision
    watcher = jobs.watch(LOCAL, one.id)
    next(watcher)
    watcher.close()
    engine.go.release(4)
    done = until(jobs, two.id, DONE)
    assert jobs.job(LOCAL, one.id).state == DONE and jobs.queue(LOCAL) == ()
    assert done.image and jobs._history.image(LOCAL, done.image).path.is_file()


def test_watching_sees_every_step(jobs: Jobs, engine: Engine) -> None:
    (job,) = submit(jobs, "a circle")
    seen = []
    for now in jobs.watch(LOCAL, job.id):
        if (now.state, now.step) not in seen:
            seen.append((now.state, now.step))
            engine.go.release()
    steps = [step for state, step in seen if state == RUNNING]
    assert steps == sorted(steps) and seen[-1][0] == DONE


def test_cancel_stops_the_right_one_of_three(jobs: Jobs, engine: Engine) -> None:
    one, two, three = submit(jobs, "a", "b", "c")
    until(jobs, one.id, RUNNING)
    jobs.cancel(LOCAL, two.id)
    jobs.cancel(LOCAL, one.id)
    assert until(jobs, one.id, STOPPED).image is None
    engine.go.release(2)
    assert until(jobs, three.id, DONE)
    assert jobs.job(LOCAL, two.id).state == STOPPED
    jobs.retry(LOCAL, two.id)
    engine.go.release(2)
    assert until(jobs, two.id, DONE)
    with pytest.raises(BadRequest, match="nothing to retry"):
        jobs.retry(LOCAL, two.id)


def test_a_failure_is_a_sentence_and_the_next_job_runs(jobs: Jobs, engine: Engine) -> None:
    bad, good = submit(jobs, "it fails", "a circle")
    engine.go.release(4)
    assert until(jobs, bad.id, FAILED).error == "the model is upset: ask nicely"
    until(jobs, good.id, DONE)


def test_a_dying_engine_is_tried_once_more_and_no_more(jobs: Jobs, engine: Engine) -> None:
    bad, good = submit(jobs, "it dies", "a circle")
    engine.go.release(6)
    assert "SIGKILL" in until(jobs, bad.id, FAILED).error
    until(jobs, good.id, DONE)
    assert engine.deaths == 2


def test_waiting_jobs_can_be_moved_within_their_owners_places(jobs: Jobs, engine: Engine) -> None:
    first, second, third = submit(jobs, "a", "b", "c")
    (other,) = submit(jobs, "x", owner="visitor")
    (last,) = submit(jobs, "d")
    until(jobs, first.id, RUNNING)
    jobs.move(LOCAL, last.id, before=second.id)
    assert [job.id for job in jobs.queue(LOCAL)] == [first.id, last.id, second.id, third.id]
    assert jobs.ahead(jobs.job("visitor", other.id)) == 3 and jobs.ahead(jobs.job(LOCAL, third.id)) == 4
    with pytest.raises(BadRequest, match="does not wait"):
        jobs.move(LOCAL, first.id)
    with pytest.raises(BadRequest, match="not here"):
        jobs.cancel(LOCAL, other.id)
    assert jobs.job("visitor", other.id).state == WAITING


def test_an_impossible_request_queues_nothing(jobs: Jobs) -> None:
    with pytest.raises(BadRequest, match="empty"):
        submit(jobs, "a circle", "  ")
    assert jobs.queue(LOCAL) == ()
