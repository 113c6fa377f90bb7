"""The queue: jobs run though nobody watches, cancel reaches the right one, and errors are kept as sentences."""

import threading
import time
from collections.abc import Generator, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engine.plan import complete
from engine.types import BadRequest, Cancelled, Crashed, EngineError, Picture, Request, Seconds, Step
from studio import disk
from studio import jobs as module
from studio import tables as t
from studio.history import History
from studio.jobs import Jobs
from studio.pace import Pace, left
from studio.rows import DONE, FAILED, INTERRUPTED, LOCAL, RUNNING, STOPPED, WAITING, Job
from tests.rows import queue


class Engine:
    """Two steps, each as long as the test wants: `go` lets one step, or a load, pass. A prompt says what goes wrong."""

    def __init__(self) -> None:
        self.go = threading.Semaphore(0)
        self.deaths = 0
        self._stop = threading.Event()

    def complete(self, request: Request) -> Request:
        return complete(request, None)

    def foresee(self, request: Request) -> int:
        return 0

    def run(self, request: Request) -> Generator[Step | Picture, None, None]:
        self._stop.clear()
        if "loads" in request.prompt:
            self._wait()
        yield Step(0, 2)
        for index in (1, 2):
            self._wait()
            yield Step(index, 2)
        if "fails" in request.prompt:
            raise EngineError("the model is upset: ask nicely")
        if "dies" in request.prompt:
            self.deaths += 1
            raise Crashed("the engine process was ended by SIGKILL")
        yield Picture(np.zeros((16, 16, 3), np.uint8), request, "fake", "", Seconds(), 0)

    def _wait(self) -> None:
        while not self.go.acquire(timeout=0.01):
            if self._stop.is_set():
                raise Cancelled("stopped on request")

    def stop(self) -> None:
        self._stop.set()

    def close(self, patience: float = 0) -> None:
        self._stop.set()


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def jobs(engine: Engine, tmp_path: Path) -> Iterator[Jobs]:
    with queue(tmp_path / "data", engine) as made:
        yield made


def submit(jobs: Jobs, *prompts: str, owner: str = LOCAL) -> tuple[Job, ...]:
    project = jobs._history.last_project(owner).id
    return jobs.submit(owner, project, *(Request(prompt, "seedling-ternary") for prompt in prompts))


def until(jobs: Jobs, id: int, state: str, owner: str = LOCAL) -> Job:
    """The job when it comes to that state; a test that would wait for ever fails after a minute instead."""
    patience = time.monotonic() + 60
    for job in jobs.watch(owner, id):
        if job.state == state:
            return job
        assert time.monotonic() < patience, f"still {job}"
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


def test_a_glance_at_the_queue_lasts_longer_than_a_step(
    jobs: Jobs, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "HEARTBEAT", 60.0)
    (job,) = submit(jobs, "a circle")
    until(jobs, job.id, RUNNING)
    queue = jobs.watch_queue(LOCAL, glance=60)
    assert [(now.state, now.step) for now in next(queue)] == [(RUNNING, 0)]
    seen: list[object] = []
    watcher = threading.Thread(target=lambda: seen.append(next(queue)))
    watcher.start()
    engine.go.release()
    assert next(now for now in jobs.watch(LOCAL, job.id) if now.step == 1)
    watcher.join(0.3)
    assert watcher.is_alive() and not seen
    engine.go.release()
    watcher.join(30)
    assert seen == [()]  # it has ended: that is told at once


def test_waiting_for_the_engines_word_ends_with_it_or_with_patience(jobs: Jobs, engine: Engine) -> None:
    loads, other = submit(jobs, "it loads", "a ring")
    jobs.handed_over(loads.id, 0.05)
    assert until(jobs, loads.id, RUNNING).total == 0
    engine.go.release()
    jobs.handed_over(loads.id, 10_000)  # pytest-timeout has less patience
    assert jobs.job(LOCAL, loads.id).total == 2
    jobs.handed_over(other.id, 10_000)  # its turn comes later


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
    assert jobs.ahead(jobs.job("visitor", other.id)) == 2 and jobs.ahead(jobs.job(LOCAL, third.id)) == 4
    with pytest.raises(BadRequest, match="does not wait"):
        jobs.move(LOCAL, first.id)
    with pytest.raises(BadRequest, match="not here"):
        jobs.cancel(LOCAL, other.id)
    assert jobs.job("visitor", other.id).state == WAITING


def test_until_the_engine_has_read_the_prompt_there_is_no_step(jobs: Jobs, engine: Engine) -> None:
    (job,) = submit(jobs, "it loads")
    assert until(jobs, job.id, RUNNING).total == 0
    engine.go.release()
    assert next(now for now in jobs.watch(LOCAL, job.id) if now.total).step == 0
    engine.go.release(2)
    done = until(jobs, job.id, DONE)
    assert jobs._now(replace(done, state=RUNNING)).total == 0  # a row that is read an instant before there is progress


def test_owners_take_turns(jobs: Jobs, engine: Engine) -> None:
    mine = submit(jobs, "a", "b", "c", owner="ann")
    until(jobs, mine[0].id, RUNNING, owner="ann")
    theirs = submit(jobs, "x", "y", owner="bob")
    late = submit(jobs, "z", owner="cid")
    engine.go.release(100)
    for owner, asked in (("ann", mine), ("bob", theirs), ("cid", late)):
        for job in asked:
            until(jobs, job.id, DONE, owner=owner)
    every = [job for owner in ("ann", "bob", "cid") for job in jobs._history.jobs(owner)]
    order = [job.request.prompt for job in sorted(every, key=lambda job: job.started_at or 0)]
    assert order == ["a", "x", "z", "b", "y", "c"]


def test_many_prompts_at_once_are_siblings_and_all_are_watched(jobs: Jobs) -> None:
    submit(jobs, "a circle")
    batch = submit(jobs, *(f"a ring {n}" for n in range(250)))
    assert len(batch) == 250 and len(jobs.queue(LOCAL)) == 251
    assert len(next(jobs.watch_batch(LOCAL, batch[0].batch))) == 250
    rows = jobs._history.revisions(LOCAL, batch[0].project)
    assert {row.parent for row in rows[1:]} == {rows[0].id}
    assert [row.label for row in rows[:4]] == ["r1", "r2", "r1a", "r1b"]


def test_a_visitor_leaves_and_nothing_of_theirs_stays(jobs: Jobs, engine: Engine) -> None:
    one, _ = submit(jobs, "a circle", "a ring", owner="visitor")
    (mine,) = submit(jobs, "a square")
    until(jobs, one.id, RUNNING, owner="visitor")
    jobs.forget("visitor")
    engine.go.release(4)  # the stopped run may take two before it looks at its stop
    until(jobs, mine.id, DONE)
    assert jobs.queue("visitor") == () and jobs._history.projects("visitor") == ()
    assert len(list((jobs._history.data_dir / "pictures").rglob("*.png"))) == 1


def test_an_impossible_request_queues_nothing(jobs: Jobs) -> None:
    with pytest.raises(BadRequest, match="empty"):
        submit(jobs, "a circle", "  ")
    assert jobs.queue(LOCAL) == ()


def test_a_live_picture_comes_first_and_leaves_no_row(jobs: Jobs, engine: Engine) -> None:
    (first,) = submit(jobs, "a circle")
    until(jobs, first.id, RUNNING)
    shown: list[object] = []
    watcher = threading.Thread(target=lambda: shown.extend(jobs.live(LOCAL, Request("a ring", "seedling-ternary"))))
    watcher.start()
    while not jobs._live._shots:
        watcher.join(0.01)
    (second,) = submit(jobs, "a square")
    engine.go.release(4)
    watcher.join(30)
    assert [type(item) for item in shown] == [Step, Step, Step, Picture]
    assert jobs.job(LOCAL, second.id).state in (WAITING, RUNNING)
    assert len(jobs._history.jobs(LOCAL)) == 2
    engine.go.release(2)
    until(jobs, second.id, DONE)
    (settled,) = submit(jobs, "a ring")  # needs no step of the engine: nobody lets one pass
    done = until(jobs, settled.id, DONE)
    assert done.image and jobs._history.image(LOCAL, done.image).request == shown[-1].request


def test_a_newer_live_picture_displaces_the_one_before(jobs: Jobs, engine: Engine) -> None:
    old = jobs.live(LOCAL, Request("a", "seedling-ternary"))
    assert next(old) == Step(0, 2)
    new = jobs.live(LOCAL, Request("ab", "seedling-ternary"))
    steps = [next(new)]  # only now the first one is displaced
    assert list(old) == []
    engine.go.release(2)
    steps += list(new)
    assert isinstance(steps[-1], Picture) and steps[-1].request.prompt == "ab"
    assert jobs._history.jobs(LOCAL) == ()


def test_what_a_kill_interrupted_says_so_and_can_be_made_again(tmp_path: Path, engine: Engine) -> None:
    history = History(tmp_path / "data")
    dead = Jobs(history, engine)
    one, two = submit(dead, "a", "b")
    until(dead, one.id, RUNNING)
    dead.close()
    assert history.job(LOCAL, one.id).state == INTERRUPTED and history.job(LOCAL, two.id).state == WAITING
    history.store.write(lambda db: db.execute(t.job.update().where(t.job.c.id == one.id).values(state=RUNNING)))
    engine.go.release(2)
    again = Jobs(history, engine)
    try:
        assert until(again, two.id, DONE)
        assert "Retry" in again.job(LOCAL, one.id).error
        again.retry(LOCAL, one.id)
        engine.go.release(2)
        until(again, one.id, DONE)
    finally:
        again.close()
        history.close()


def test_seconds_left_come_from_past_runs_and_then_from_this_one(jobs: Jobs, engine: Engine) -> None:
    (job,) = submit(jobs, "a circle")
    assert jobs.estimate(job.request) is None
    assert until(jobs, job.id, RUNNING).seconds_left is None
    engine.go.release(2)
    until(jobs, job.id, DONE)
    details = '{"seconds":{"denoise":8.0,"decode":1.0,"encode":0.5}}'
    jobs._history.store.write(lambda db: db.execute(t.image.update().values(details=details)))
    assert jobs.estimate(job.request, job.request) == 2 * 9.5
    assert jobs.estimate(replace(job.request, width=1024, height=512)) == 2 * 9.5
    assert jobs.estimate(replace(job.request, model="bonsai-binary")) is None
    (slow,) = submit(jobs, "a ring")
    assert next(job for job in jobs.watch(LOCAL, slow.id) if job.seconds_left).seconds_left > 2
    assert left(Pace(2.0, 1.0), step=2, total=4, stepping=10.0, since=1.0) == 10.0
    assert left(None, step=1, total=4, stepping=2.0, since=0.0) == 6.0
    assert left(None, step=0, total=4, stepping=0.0, since=0.0) is None
    assert left(Pace(2.0, 1.0), step=4, total=4, stepping=8.0, since=9.0) == 0.0


def test_an_engine_that_does_not_obey_is_ended(jobs: Jobs, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "stop", lambda: None)  # deep in a load
    (job,) = submit(jobs, "a circle")
    until(jobs, job.id, RUNNING)
    jobs.cancel(LOCAL, job.id)
    assert until(jobs, job.id, STOPPED).error == ""


def test_a_project_deleted_under_a_running_job_leaves_no_file(jobs: Jobs, engine: Engine) -> None:
    (job,) = submit(jobs, "a circle", owner="visitor")
    until(jobs, job.id, RUNNING, owner="visitor")
    disk.forget(jobs._history, "visitor")  # not stopped first
    engine.go.release(2)
    (next_one,) = submit(jobs, "a ring")
    engine.go.release(2)
    until(jobs, next_one.id, DONE)
    assert len(list((jobs._history.data_dir / "pictures").rglob("*.png"))) == 1
