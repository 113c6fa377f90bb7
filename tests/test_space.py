"""On a Space visitors are strangers, and what they made goes with them."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.types import BadRequest, Request
from studio import library, space
from studio.history import History
from studio.jobs import Jobs
from studio.rows import LOCAL
from tests.rows import InlineEngine, add_image


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[Jobs]:
    history = History(tmp_path / "data")
    queue = Jobs(history, InlineEngine())
    yield queue
    queue.close()
    history.close()


def test_at_home_there_is_one_owner_and_nothing_is_forgotten(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPACE_ID", raising=False)
    assert space.owner("abc") == space.owner("def") == LOCAL
    mine = add_image(jobs._history)
    space.farewell(jobs._history, jobs, LOCAL)
    assert mine.path.exists() and library.count(jobs._history, LOCAL) == 1


def test_visitors_see_their_own_and_leave_nothing(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPACE_ID", "somebody/niwaki")
    history, (ann, bob) = jobs._history, (space.owner("abc"), space.owner("def"))
    assert ann != bob and space.on_a_space()
    of_ann, of_bob = add_image(history, "secret", owner=ann), add_image(history, "other", owner=bob)
    history.keep(ann, [of_ann.id], True)
    with pytest.raises(BadRequest, match="belongs to somebody else"):
        history.image(bob, of_ann.id)
    (job,) = jobs.submit(ann, of_ann.project, Request("one more", "seedling-ternary", 5, 64, 64, 2))
    space.farewell(history, jobs, ann)
    assert library.count(history, ann) == 0 and not of_ann.path.exists() and history.projects(ann) == ()
    with pytest.raises(BadRequest):
        history.job(ann, job.id)
    left = {path.name for path in (history.data_dir / "pictures").rglob("*.png")}
    assert left == {of_bob.path.name} and library.count(history, bob) == 1


def test_visitors_of_an_earlier_run_are_forgotten_at_the_start(jobs: Jobs) -> None:
    history = jobs._history
    mine, strange = add_image(history), add_image(history, owner=f"{space.VISITOR}abc")
    space.sweep(history)
    assert mine.path.exists() and not strange.path.exists()
