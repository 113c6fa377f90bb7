"""On a Hugging Face Space every visitor is somebody: their pictures are theirs alone, and go when they go.

Knows owners, not the page. Elsewhere one person owns the machine, and the owner is always `LOCAL`.
"""

import logging
import os
import secrets
import time
from collections.abc import Collection

import sqlalchemy as sa

from engine.types import EngineError
from studio import disk
from studio import tables as t
from studio.history import History
from studio.jobs import Jobs
from studio.rows import LOCAL

log = logging.getLogger(__name__)

VISITOR = "visitor-"
IDLE = 1800.0  # seconds after which a visitor without a page has left


def on_a_space() -> bool:
    """Whether a Space runs us: it sets SPACE_ID."""
    return bool(os.environ.get("SPACE_ID"))


def owner(session: str) -> str:
    """Whose rows a session sees. Gradio's session names are random, and a visitor gets a new one with every visit.

    A caller of the API who names none is a new visitor with every call, else all of those would be one.
    """
    return f"{VISITOR}{session or secrets.token_hex(8)}" if on_a_space() else LOCAL


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


def forget_idle(history: History, jobs: Jobs, present: Collection[str]) -> None:
    """Forget visitors without a page who made nothing for a while: callers of the API, whose leaving nobody sees."""
    c = t.project.c
    used = sa.select(c.owner, sa.func.max(c.used_at)).group_by(c.owner)
    made = sa.select(t.job.c.owner, sa.func.max(t.job.c.created_at)).group_by(t.job.c.owner)
    rows = history.store.read(lambda db: [*db.execute(used), *db.execute(made)])
    busy = {owner for owner, when in rows if when > time.time() - IDLE}
    for owner in {owner for owner, _ in rows} - busy - set(present):
        farewell(history, jobs, owner)


def sweep(history: History) -> None:
    """Forget visitors of an earlier run, whose leaving nobody saw. To be called before anybody is served."""
    query = sa.select(t.project.c.owner).where(t.project.c.owner.startswith(VISITOR, autoescape=True)).distinct()
    for owner in history.store.read(lambda db: list(db.execute(query).scalars())):
        disk.forget(history, owner)
