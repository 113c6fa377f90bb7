"""The disk fills up, the engine's process dies: a sentence each time, nothing lost, and the next job runs."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from engine.types import EngineError, Request
from engine.worker import Worker
from studio import library
from studio.history import History
from studio.jobs import Jobs
from studio.rows import DONE, FAILED, LOCAL, RUNNING, Job
from tests.kill_target import MODEL, InProcess

resource = pytest.importorskip("resource", reason="signals and limits of POSIX")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[tuple[Path, Callable[[bool], None]]]:
    """A folder, and a switch that makes its disk full or not: a real one of 8 MB, or a limit on every file's size."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(folder)]
    mounted = sys.platform == "linux" and subprocess.run(mount, capture_output=True, check=False).returncode == 0
    filler, hard = folder / "filler", resource.getrlimit(resource.RLIMIT_FSIZE)[1]

    def fill(full: bool) -> None:
        if not mounted:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100 if full else hard, hard))
        elif full:
            with suppress(OSError), open(filler, "wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
        else:
            filler.unlink(missing_ok=True)

    yield folder, fill
    fill(False)
    if mounted:
        subprocess.run(["umount", str(folder)], check=True)


@contextmanager
def studio(folder: Path, engine: InProcess | Worker) -> Iterator[tuple[History, Jobs]]:
    history = History(folder)
    jobs = Jobs(history, engine)
    try:
        yield history, jobs
    finally:
        jobs.close()
        engine.close()
        history.close()


def submit(history: History, jobs: Jobs, seed: int, steps: int = 4) -> Job:
    request = Request("two red circles", MODEL, seed, 64, 64, steps)
    return jobs.submit(LOCAL, history.last_project(LOCAL).id, request)[0]


def ended(jobs: Jobs, job: Job) -> Job:
    *_, last = jobs.watch(LOCAL, job.id)
    return last


def test_a_full_disk_is_a_sentence_and_loses_nothing(small_disk: tuple[Path, Callable[[bool], None]]) -> None:
    folder, fill = small_disk
    engine = InProcess()
    with studio(folder / "data", engine) as (history, jobs):
        kept = ended(jobs, submit(history, jobs, 1)).image
        assert kept
        history.keep(LOCAL, [kept], True)
        job = submit(history, jobs, 2, steps=20)
        next(now for now in jobs.watch(LOCAL, job.id) if now.state == RUNNING and now.step)
        fill(True)
        failed = ended(jobs, job)
        assert (failed.state, failed.image) == (FAILED, None) and "free some space" in failed.error
        with pytest.raises(EngineError, match="free some space"):
            for _ in range(1000):  # the log's last page may still hold a row or two
                submit(history, jobs, 3)
        assert history.image(LOCAL, kept).kept and history.image(LOCAL, kept).path.is_file()
        fill(False)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine, "run", None)  # the picture was made: only its file is missing
            for waiting in jobs.queue(LOCAL):
                jobs.cancel(LOCAL, waiting.id)
            jobs.retry(LOCAL, job.id)
            assert ended(jobs, job).state == DONE
        assert ended(jobs, submit(history, jobs, 4)).state == DONE
        images = library.page(history, LOCAL).images
        assert {1, 2, 4} <= {image.request.seed for image in images} and all(image.path.is_file() for image in images)
        check = history.store.read(lambda db: db.exec_driver_sql("PRAGMA integrity_check").scalar())
        assert check == "ok"


def kill_engine(jobs: Jobs, worker: Worker, job: Job, tries: int) -> None:
    """Once the job's n-th start has made a step."""
    for now in jobs.watch(LOCAL, job.id):
        if now.state == RUNNING and now.tries == tries and now.step:
            assert worker.pid
            os.kill(worker.pid, signal.SIGKILL)
            return
    raise AssertionError("it ended before it could be killed")


def test_an_engine_process_killed_alone_is_said_and_the_job_is_tried_once_more(tmp_path: Path) -> None:
    worker = Worker("fake", data_dir=tmp_path)
    with studio(tmp_path, worker) as (history, jobs):
        once, twice, after = (submit(history, jobs, seed, steps=50) for seed in (1, 2, 3))
        kill_engine(jobs, worker, once, 1)
        done = ended(jobs, once)
        assert (done.state, done.tries) == (DONE, 2) and "SIGKILL" in done.error
        kill_engine(jobs, worker, twice, 1)
        kill_engine(jobs, worker, twice, 2)
        failed = ended(jobs, twice)
        assert (failed.state, failed.tries) == (FAILED, 2) and "SIGKILL" in failed.error
        assert ended(jobs, after).state == DONE
