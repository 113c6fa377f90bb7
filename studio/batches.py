"""Many pictures at once: labelled grids, and templates whose slots a table fills. Said beforehand what it will take.

Knows requests, jobs and Looks, not gradio. Functions never raise: an error is a sentence.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from engine.types import BadRequest, Request
from studio import files, grids, slots, views
from studio.page import Look, Page, Tab
from studio.runs import Runs
from studio.template import Filling, filling

SEEDS, MODELS = "prompts x seeds", "models x prompts"
SEEDS_AT_ONCE = 4  # how many seeds a grid takes from the page's one where none are given


class Batches:
    """Grids and templates of a page."""

    def __init__(self, page: Page, runs: Runs) -> None:
        self.page, self.runs = page, runs

    def grid(
        self, tab: Tab, kind: str, prompts: str, seeds: str, models: Sequence[str], controls: Mapping[str, Any]
    ) -> Iterator[Look]:
        """Queue the cells that are missing and show the grid as they come."""
        try:
            grid = self.plan(kind, prompts, seeds, models, controls)
            cells = grids.start(self.page.jobs, self.page.history, tab.owner, tab.project, grid)
            cost = {"cost": self._reused(cells)}
            queued = next((cell.job for cell in cells if cell.job), None)
            if queued is not None:
                yield {"cells": self._drawn(grid, cells), "queue": self.page.queue(tab)} | cost
                batch = self.page.jobs.job(tab.owner, queued).batch
                for _ in self.page.jobs.watch_batch(tab.owner, batch):
                    cells = grids.look(self.page.jobs, self.page.history, tab.owner, cells)
                    yield {"cells": self._drawn(grid, cells), "queue": self.page.queue(tab)}
        except Exception as error:
            yield self._refused(error)
            return
        # Once more and together: of two messages that follow each other at once, a browser may draw the second only.
        yield self.page.paint(tab) | {"cells": self._drawn(grid, cells)} | cost

    def plan(
        self, kind: str, prompts: str, seeds: str, models: Sequence[str], controls: Mapping[str, Any]
    ) -> grids.Grid:
        """The grid that is asked for; `prompts` one a line, `seeds` whole numbers."""
        lines = [line.strip() for line in prompts.splitlines() if line.strip()]
        if not lines:
            raise BadRequest("the grid has no prompts: write one per line")
        base = self.runs.request(lines[0], {**controls, "past": None})
        if kind == MODELS:
            if not models:
                raise BadRequest("the grid has no models: choose at least one")
            open_size = replace(base, width=None, height=None, steps=None)
            return grids.models_by_prompts(open_size, models, lines, self.page.jobs)
        return grids.prompts_by_seeds(base, lines, numbers(seeds, base.seed), self.page.jobs)

    def estimate_grid(
        self, tab: Tab, kind: str, prompts: str, seeds: str, models: Sequence[str], controls: Mapping[str, Any]
    ) -> Look:
        """What the grid would take, before it starts."""
        try:
            grid = self.plan(kind, prompts, seeds, models, controls)
            there = [grids.made(self.page.history, tab.owner, cell, self.page.history.data_dir) for cell in grid.cells]
            missing = [cell for cell, image in zip(grid.cells, there, strict=True) if image is None]
            return {"cost": self._cost(missing, len(grid.cells))}
        except Exception as error:
            return self._refused(error)

    def fill(self, tab: Tab, template: str, table: str, controls: Mapping[str, Any]) -> Iterator[Look]:
        """Queue one picture per row of the table."""
        try:
            requests = self.rows(template, table, controls)[0]
            jobs = self.page.jobs.submit(tab.owner, tab.project, *requests, op="template")
            tab.batch = [job.id for job in jobs]
            are = "is" if len(jobs) == 1 else "are"
            yield {"queue": self.page.queue(tab), "bill": f"{views.counted(len(jobs))} {are} queued."}
        except Exception as error:
            yield self._refused(error, "bill")
            return
        yield from self.page.follow(tab)

    def estimate(self, tab: Tab, template: str, table: str, controls: Mapping[str, Any]) -> Look:
        """What filling the template would take, before it starts."""
        if not template.strip() or not table.strip():
            return {"bill": ""}
        try:
            requests, unused = self.rows(template, table, controls)
            spare = f" No slot asks for {', '.join(unused)}." if unused else ""
            return {"bill": self._cost(requests, len(requests)) + spare}
        except Exception as error:
            return self._refused(error, "bill")

    def rows(self, template: str, table: str, controls: Mapping[str, Any]) -> tuple[list[Request], tuple[str, ...]]:
        """One complete request per row of the table, and the columns that no slot asks for."""
        filled = slots.fill(template, table)
        base = self.runs.request(template, {**controls, "past": None})
        return [self.page.jobs.complete(replace(base, prompt=prompt)) for prompt in filled.prompts], filled.unused

    def read(self, file: str) -> Look:
        """An uploaded table into the box, where it can be looked at and changed."""
        try:
            return {"table": slots.decode(Path(file).read_bytes(), Path(file).name)}
        except Exception as error:
            return self._refused(error, "bill")

    def _cost(self, missing: Sequence[Request], total: int) -> str:
        known = self.page.jobs.estimate(*missing) if missing else 0.0
        there = f" {total - len(missing)} of {total} are there already." if len(missing) < total else ""
        if not missing:
            return "The picture is there already." if total == 1 else f"All {total} pictures are there already."
        many = views.counted(len(missing))
        if known is None:
            return f"{many}; nothing like them was made here yet, so nobody knows how long they take.{there}"
        return f"{many}, about {duration(known)}.{there}"

    def _reused(self, cells: Sequence[grids.Cell]) -> str:
        there = sum(cell.image is not None for cell in cells)
        if there:
            return f"{there} of {views.counted(len(cells), 'cell')} {'was' if there == 1 else 'were'} there already."
        return f"{views.counted(len(cells), 'cell')}."

    def _drawn(self, grid: grids.Grid, cells: Sequence[grids.Cell]) -> Filling:
        """The grid as its template shows it."""
        width = len(grid.columns)
        rows = []
        for number, label in enumerate(grid.rows):
            of_row = cells[number * width : (number + 1) * width]
            rows.append({"label": self._short(label), "cells": [_cell(cell) for cell in of_row]})
        return filling(columns=[{"text": self._short(column)} for column in grid.columns], rows=rows)

    def _short(self, label: str) -> str:
        offer = self.page.offers.get(label)
        return offer.label if offer else label

    def _refused(self, error: Exception, part: str = "cost") -> Look:
        said = self.page.refused(error)
        return {part: said["progress"]["text"]}


def numbers(text: str, first: int) -> list[int]:
    """Whole numbers parted by anything; none given: a few from `first` on. Raises BadRequest for anything else."""
    words = [word for word in re.split(r"[\s,;]+", text.strip()) if word]
    if strange := [word for word in words if not re.fullmatch(r"[0-9]{1,19}", word)]:
        raise BadRequest(f"{strange[0]!r} is no seed: give whole numbers, for example 1 2 3")
    return [int(word) for word in words] or list(range(first, first + SEEDS_AT_ONCE))


def duration(seconds: float) -> str:
    """A time as a person says it."""
    if seconds < 90:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return views.counted(round(seconds / 60), "minute") if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def _cell(cell: grids.Cell) -> dict[str, Any]:
    if cell.image is None:
        return {"url": "", "alt": "", "thumb": "", "name": "waiting"}
    image = cell.image
    alt = f"{image.request.prompt}, seed {image.request.seed}, {image.request.model}"
    return {"url": files.picture(image), "thumb": files.thumb(image), "alt": alt, "name": views.rating(image)}
