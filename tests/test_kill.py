"""SIGKILL at every point of a picture's way to the disk: what was kept is there, and the rest can be made again."""

import random
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
from PIL import Image as Pixels

from studio import library
from studio.history import History
from studio.jobs import Jobs
from studio.library import Filter
from studio.rows import DONE, INTERRUPTED, LOCAL, RUNNING, Image, Job
from studio.tables import FILE
from tests.kill_target import POINTS, InProcess, request

ROOT = Path(__file__).parent.parent
QUICK = ("taken", "png-half", "renamed", "commit")  # the others in make test-all


def kill(folder: Path, point: str, *how: str, delay: float | None = None) -> None:
    command = [sys.executable, "-m", "tests.kill_target", str(folder), point, *how]
    with open(folder.with_suffix(".log"), "w+b") as log:  # files, not pipes: a child may outlive its parent
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        if delay is not None:
            while process.poll() is None and b"ready" not in Path(log.name).read_bytes():
                time.sleep(0.02)
            time.sleep(delay)
            process.kill()
        process.wait(timeout=120)
        assert process.returncode == -signal.SIGKILL, Path(log.name).read_text()


def check_files(history: History) -> tuple[Image, ...]:
    """Every row has its files, every file opens and has its row, nothing half lies about; returns the pictures."""
    images = library.page(history, LOCAL).images
    for image in images:
        with Pixels.open(image.path) as picture:
            picture.load()
            assert picture.size == (64, 64)
        assert image.thumb is not None
        with Pixels.open(image.thumb) as thumb:
            thumb.load()
    there = {path for path in (history.data_dir / "pictures").rglob("*") if path.is_file()}
    assert there == {image.path for image in images}
    assert not list((history.data_dir / "thumbs").rglob("*.part"))
    return images


def ended(jobs: Jobs, id: int) -> Job:
    """The job once it is over; fails rather than waits for ever."""
    limit = time.monotonic() + 60
    for job in jobs.watch(LOCAL, id):
        assert time.monotonic() < limit, job
    return job


def survives(folder: Path, point: str) -> None:
    """What the next start finds and does after a kill at this point."""
    with closing(sqlite3.connect(folder / FILE)) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    history = History(folder)
    jobs = Jobs(history, InProcess())
    try:
        rows = history.jobs(LOCAL)
        assert len(rows) == (2 if point in ("insert", "checkpoint") else 4)
        for job in rows[3:]:  # what waited is made by itself
            last = ended(jobs, job.id)
            assert last.state == DONE
        for job in rows[2:3]:
            last = ended(jobs, job.id)
            if last.state == INTERRUPTED:
                assert "Retry" in last.error
                jobs.retry(LOCAL, job.id)
                last = ended(jobs, job.id)
            assert last.state == DONE and last.image
        while jobs._lost or not jobs._recovered:
            time.sleep(0.01)
        images = check_files(history)
        assert sorted(image.request.seed for image in images) == [1, 2, 3, 4][: len(rows)]
        kept = library.page(history, LOCAL, Filter(kept=True)).images
        assert sorted(image.request.seed for image in kept) == [1, 2]
        assert {job.state for job in history.jobs(LOCAL)} == {DONE}
        assert all(history.find(LOCAL, request(seed)) for seed in (1, 2))
    finally:
        jobs.close()
        history.close()
    with closing(sqlite3.connect(folder / FILE)) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert db.execute("SELECT count(*) FROM job WHERE state = ?", [RUNNING]).fetchone() == (0,)


@pytest.mark.parametrize("point", QUICK)
def test_a_kill_loses_nothing(point: str, tmp_path: Path) -> None:
    kill(tmp_path / "data", point)
    survives(tmp_path / "data", point)


@pytest.mark.slow
@pytest.mark.parametrize("point", [point for point in POINTS if point not in QUICK])
def test_a_kill_at_every_other_point_loses_nothing(point: str, tmp_path: Path) -> None:
    kill(tmp_path / "data", point, "worker")
    survives(tmp_path / "data", point)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(4))
def test_a_kill_during_checkpoints_loses_nothing(number: int, tmp_path: Path) -> None:
    delay = random.Random(number).uniform(0, 0.5)
    kill(tmp_path / "data", "checkpoint", delay=delay)
    survives(tmp_path / "data", "checkpoint")
