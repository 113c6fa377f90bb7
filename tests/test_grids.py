"""Grids are labelled, made as one batch, and reuse what is there."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.types import BadRequest, Request
from studio import grids, modelfiles
from studio.history import History
from studio.jobs import Jobs
from studio.rows import LOCAL
from tests.rows import InlineEngine, queue

BASE = Request("", "bonsai-ternary", 0, 64, 64, 1)


@pytest.fixture
def engine() -> InlineEngine:
    return InlineEngine()


@pytest.fixture
def jobs(engine: InlineEngine, tmp_path: Path) -> Iterator[Jobs]:
    with queue(tmp_path / "data", engine) as made:
        yield made


def finished(jobs: Jobs, history: History, grid: grids.Grid) -> tuple[grids.Cell, ...]:
    cells = grids.start(jobs, history, LOCAL, history.last_project(LOCAL).id, grid)
    for cell in cells:
        if cell.job is not None:
            list(jobs.watch(LOCAL, cell.job))
    return grids.look(jobs, history, LOCAL, cells)


def test_cells_come_row_by_row_and_are_made_once(
    jobs: Jobs, engine: InlineEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    history = jobs._history
    grid = grids.prompts_by_seeds(BASE, ["a circle", "a ring", "a circle", " "], [1, 2], engine)
    assert (grid.rows, grid.columns) == (("a circle", "a ring"), ("seed 1", "seed 2"))
    cells = finished(jobs, history, grid)
    assert [(cell.image.request.prompt, cell.image.request.seed) for cell in cells if cell.image] == [
        ("a circle", 1), ("a circle", 2), ("a ring", 1), ("a ring", 2),
    ]  # fmt: skip
    assert len(engine.drawn) == 4

    wider = grids.prompts_by_seeds(BASE, ["a ring", "a square"], [2, 3], engine)
    again = finished(jobs, history, wider)
    assert len(engine.drawn) == 7 and again[0].job is None and again[0].image == cells[3].image

    monkeypatch.setattr(modelfiles, "hashes", lambda *_: {"transformer": "other weights"})
    assert finished(jobs, history, grid)[0].image != cells[0].image
    assert len(engine.drawn) == 11


def test_models_by_prompts(jobs: Jobs, engine: InlineEngine) -> None:
    grid = grids.models_by_prompts(BASE, ["bonsai-ternary", "bonsai-binary"], ["a circle"], engine)
    assert grid.rows == ("bonsai-ternary", "bonsai-binary") and grid.columns == ("a circle",)
    cells = finished(jobs, jobs._history, grid)
    assert [cell.image.request.model for cell in cells if cell.image] == ["bonsai-ternary", "bonsai-binary"]


def test_equal_cells_are_made_once_and_a_deleted_picture_again(jobs: Jobs, engine: InlineEngine) -> None:
    history = jobs._history
    first = finished(jobs, history, grids.prompts_by_seeds(BASE, ["a circle"], [1], engine))[0].image
    assert first is not None
    history.delete(LOCAL, [first.id])
    assert finished(jobs, history, grids.prompts_by_seeds(BASE, ["a circle"], [1], engine))[0].image != first


def test_what_cannot_be_a_grid_is_a_sentence(engine: InlineEngine) -> None:
    with pytest.raises(BadRequest, match="grid is empty"):
        grids.prompts_by_seeds(BASE, [" "], [1], engine)
    with pytest.raises(BadRequest, match="65 pictures is too large"):
        grids.prompts_by_seeds(BASE, ["a"], range(65), engine)
    with pytest.raises(BadRequest, match="seed -1"):
        grids.prompts_by_seeds(BASE, ["a"], [-1], engine)
