"""Labelled grids: prompts x seeds of one model, and models x prompts of one seed. Cells that exist aren't made again.

Knows requests and rows, not how a grid is drawn. A cell is found by its content address: the complete recipe, drawn by
the model files that are there now.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, TypeVar

from engine.types import BadRequest, Request
from studio import modelfiles
from studio.history import History
from studio.jobs import Jobs
from studio.rows import DONE, Image, fingerprint

Value = TypeVar("Value", str, int)

MAX_CELLS = 64  # more than anybody looks at together


class Completes(Protocol):
    """What is needed of the queue, or of the engine."""

    def complete(self, request: Request) -> Request: ...


@dataclass(frozen=True, slots=True)
class Grid:
    """What is asked for: `cells` row by row, each a complete request."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: tuple[Request, ...]


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell on its way: the picture, once there is one, else the job that makes it."""

    request: Request
    image: Image | None
    job: int | None


def prompts_by_seeds(base: Request, prompts: Sequence[str], seeds: Sequence[int], engine: Completes) -> Grid:
    """One row per prompt, one column per seed; everything else as in `base`."""
    prompts, seeds = _distinct(prompts), _distinct(seeds)
    _check(len(prompts) * len(seeds))
    cells = (replace(base, prompt=prompt, seed=seed) for prompt in prompts for seed in seeds)
    return Grid(tuple(prompts), tuple(f"seed {seed}" for seed in seeds), tuple(map(engine.complete, cells)))


def models_by_prompts(base: Request, models: Sequence[str], prompts: Sequence[str], engine: Completes) -> Grid:
    """One row per model, one column per prompt; size and steps as each model declares, unless `base` names them."""
    models, prompts = _distinct(models), _distinct(prompts)
    _check(len(models) * len(prompts))
    cells = (replace(base, model=model, prompt=prompt) for model in models for prompt in prompts)
    return Grid(tuple(models), tuple(prompts), tuple(map(engine.complete, cells)))


def made(history: History, owner: str, request: Request, data_dir: Path) -> Image | None:
    """The picture of this complete recipe, if the model's files are still those that drew it."""
    image = history.find(owner, request)
    if image is None or image.model_hash != modelfiles.combined(modelfiles.hashes(request.model, data_dir)):
        return None
    return image


def start(jobs: Jobs, history: History, owner: str, project: int, grid: Grid) -> tuple[Cell, ...]:
    """Queue what is missing, as one batch; equal cells are made once."""
    there = {fingerprint(cell): made(history, owner, cell, history.data_dir) for cell in grid.cells}
    missing = {fingerprint(cell): cell for cell in grid.cells if there[fingerprint(cell)] is None}
    queued = jobs.submit(owner, project, *missing.values(), op="grid") if missing else ()
    ids = {fingerprint(job.request): job.id for job in queued}
    return tuple(Cell(cell, there[fingerprint(cell)], ids.get(fingerprint(cell))) for cell in grid.cells)


def look(jobs: Jobs, history: History, owner: str, cells: Sequence[Cell]) -> tuple[Cell, ...]:
    """The same cells with the pictures that have come since."""
    found = []
    for cell in cells:
        if cell.image is None and cell.job is not None:
            job = jobs.job(owner, cell.job)
            if job.state == DONE and job.image is not None:
                cell = replace(cell, image=history.image(owner, job.image))
        found.append(cell)
    return tuple(found)


def _check(cells: int) -> None:
    if not cells:
        raise BadRequest("the grid is empty: give at least one prompt, and a seed or a model")
    if cells > MAX_CELLS:
        raise BadRequest(f"a grid of {cells} pictures is too large to look at: at most {MAX_CELLS}")


def _distinct(values: Sequence[Value]) -> Sequence[Value]:
    """Each once, in order, without blank ones."""
    return [value for value in dict.fromkeys(values) if str(value).strip()]
