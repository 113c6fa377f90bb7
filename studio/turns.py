"""Whose job comes next: the order of the queue, as rows say it.

Everybody's own jobs keep their places; among several owners the one who was served longest ago is next, so that nobody
waits for a stranger's forty pictures. Knows rows, not the engine and not the thread that drains.
"""

import sqlalchemy as sa

from engine.types import BadRequest
from studio import tables as t
from studio.rows import RUNNING, WAITING, Job


def whose(db: sa.Connection) -> str | None:
    """The owner whose job comes next. None when nothing waits."""
    first = sa.select(t.job.c.owner, sa.func.min(t.job.c.place)).where(t.job.c.state == WAITING).group_by(t.job.c.owner)
    places = {owner: place for owner, place in db.execute(first)}
    if len(places) < 2:
        return next(iter(places), None)
    served = sa.select(t.job.c.owner, sa.func.max(t.job.c.started_at)).where(t.job.c.owner.in_(places))
    last = {owner: started for owner, started in db.execute(served.group_by(t.job.c.owner))}
    return min(places, key=lambda owner: (last.get(owner) or 0.0, places[owner]))


def ahead(db: sa.Connection, job: Job) -> int:
    """How many jobs, of whomever, come before this waiting one at most."""
    mine = sa.and_(t.job.c.owner == job.owner, t.job.c.place < job.place)
    counts = sa.select(t.job.c.owner, sa.func.count()).group_by(t.job.c.owner)
    waiting = counts.where(t.job.c.state == WAITING, sa.or_(t.job.c.owner != job.owner, mine))
    running = sa.select(sa.func.count()).select_from(t.job).where(t.job.c.state == RUNNING)
    before = {owner: count for owner, count in db.execute(waiting)}
    own = before.pop(job.owner, 0)
    return int(db.execute(running).scalar_one()) + own + sum(min(count, own + 1) for count in before.values())


def move(db: sa.Connection, owner: str, id: int, before: int | None) -> None:
    """Put a waiting job before another of the same owner, None: last. Others' jobs keep their places."""
    mine = (t.job.c.owner == owner, t.job.c.state == WAITING)
    waiting = sa.select(t.job.c.id, t.job.c.place).where(*mine).order_by(t.job.c.place, t.job.c.id)
    rows = db.execute(waiting).all()
    order = [row.id for row in rows if row.id != id]
    if len(order) == len(rows):
        raise BadRequest(f"job {id} does not wait any more: only waiting jobs can be moved")
    order.insert(order.index(before) if before in order else len(order), id)
    for moved, row in zip(order, rows, strict=True):
        db.execute(t.job.update().where(t.job.c.id == moved).values(place=row.place))


def strangers_wait(db: sa.Connection, owner: str) -> bool:
    """Whether jobs of anybody else wait than of this owner."""
    query = sa.select(sa.exists().where(t.job.c.state == WAITING, t.job.c.owner != owner))
    return bool(db.execute(query).scalar())
