"""On a Hugging Face Space every visitor is somebody: their pictures are theirs alone, and go when they go.

Knows owners, not the page. Elsewhere one person owns the machine, and the owner is always `LOCAL`.
"""

import logging
import os

import sqlalchemy as sa

from engine.types import EngineError
from studio import disk
from studio import tables as t
from studio.history import History
from studio.jobs import Jobs
from studio.rows import LOCAL

log = logging.getLogger(__name__)

VISITOR = "visitor-"


def on_a_space() -> bool:
    """Whether a Space runs us: it sets SPACE_ID."""
    return bool(os.environ.get("SPACE_ID"))


def owner(session: str) -> str:
    """Whose rows a session sees. Gradio's session names are random, and a visitor gets a new one with every visit."""
    return f"{VISITOR}{session}" if on_a_space() else LOCAL


def farewell(history: History, jobs: Jobs, owner: str) -> None:
    """Delete everything of a visitor who left, jobs included. Never the local owner's."""
    if not owner.startswith(VISITOR):
        return
    try:
        jobs.stop_live(owner)
        for job in jobs.queue(owner):
            jobs.cancel(owner, job.id)
            list(jobs.watch(owner, job.id))  # one that runs still writes its picture
        disk.forget(history, owner)
    except EngineError as error:
        log.error("what a visitor left behind could not be deleted: %s", error)


def sweep(history: History) -> None:
    """Forget visitors of an earlier run, whose leaving nobody saw. To be called before anybody is served."""
    query = sa.select(t.project.c.owner).where(t.project.c.owner.startswith(VISITOR, autoescape=True)).distinct()
    for owner in history.store.read(lambda db: list(db.execute(query).scalars())):
        disk.forget(history, owner)
