"""What the data folder holds and how big it is, and how things leave it for good.

Knows files and rows. A file's row goes first and its name is noted in the same transaction: a kill in between leaves
a file that the next start removes, never a row without a file and never a picture that comes back.
"""

import contextlib
import logging
import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from engine.types import BadRequest
from studio import tables as t
from studio.history import History

log = logging.getLogger(__name__)

BIN_DAYS = 30
PARTS = ("pictures", "thumbs", "models", "cache", "backups", "logs")


@dataclass(frozen=True, slots=True)
class Part:
    """One part of the data folder: what it is called, how many files, how many bytes."""

    name: str
    files: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Usage:
    """Where the data lies, how big each part is, and how much the disk still holds."""

    folder: Path
    parts: tuple[Part, ...]
    free: int

    @property
    def bytes(self) -> int:
        return sum(part.bytes for part in self.parts)


def usage(data_dir: Path) -> Usage:
    """Reads names and sizes only."""
    database = [*data_dir.glob(f"{t.FILE}*")]
    parts = [_part(name, (data_dir / name).rglob("*")) for name in PARTS]
    return Usage(data_dir, (*parts, _part("history", database)), shutil.disk_usage(data_dir).free)


def purge(history: History, owner: str, ids: Sequence[int]) -> None:
    """Delete pictures in the bin for good: file, thumbnail, row, job and, where nothing else needs it, the wording.

    Pictures made from them stay, with the recipe of what they came from inside, and become their parents' children.
    Raises BadRequest for one that isn't in the bin.
    """
    binned = (t.image.c.id.in_(ids), t.image.c.owner == owner, t.image.c.deleted_at.is_not(None))

    def change(db: sa.Connection) -> None:
        if len(_delete(db, *binned)) != len(set(ids)):
            raise BadRequest("only pictures in the bin can be deleted for good: delete them first")

    if ids:
        history.store.write(change)
        sweep_gone(history)


def empty_bin(history: History, owner: str | None = None, days: float = BIN_DAYS) -> int:
    """Delete for good what has lain in the bin for so long (of one owner, None: of all); returns how many pictures."""
    old = [t.image.c.deleted_at <= time.time() - days * 86_400]
    if owner is not None:
        old.append(t.image.c.owner == owner)
    deleted = history.store.write(lambda db: len(_delete(db, *old)))
    sweep_gone(history)
    return deleted


def delete_project(history: History, owner: str, id: int) -> None:
    """A project with its pictures, kept ones too, its wordings and its jobs, for good. Stop its jobs first."""
    history.project(owner, id)
    _forget(history, t.project.c.id == id, t.image.c.project == id)


def forget(history: History, owner: str) -> None:
    """Everything of an owner, for good: what a visitor leaves behind. Stop their jobs first."""
    _forget(history, t.project.c.owner == owner, t.image.c.owner == owner)


def _forget(history: History, projects: Any, images: Any) -> None:
    def change(db: sa.Connection) -> None:
        _delete(db, images)
        db.execute(t.project.delete().where(projects))  # revisions and jobs go with it

    history.store.write(change)
    for backup in (history.data_dir / "backups").glob(f"*{Path(t.FILE).suffix}"):
        backup.unlink(missing_ok=True)  # they still hold what was to be forgotten
    sweep_gone(history)


def sweep_gone(history: History) -> None:
    """Unlink the files of deleted rows, their thumbnails and their copies in the page's cache; forget their names."""
    names = history.store.read(lambda db: list(db.execute(sa.select(t.gone.c.path)).scalars()))
    if not names:
        return
    done = []
    for name in names:
        path = history.data_dir / name
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            log.warning("%s can't be deleted yet: %s", path, error)
            continue
        done.append(name)
        with contextlib.suppress(OSError):
            path.parent.rmdir()  # only an empty day's folder goes
    shown = {Path(name).name for name in names}
    for copy in (history.data_dir / "cache").rglob("*"):
        if copy.name in shown:
            copy.unlink(missing_ok=True)

    def change(db: sa.Connection) -> None:
        db.execute(t.gone.delete().where(t.gone.c.path.in_(done)))
        db.exec_driver_sql("INSERT INTO search(search) VALUES('optimize')")  # else deleted words stay in its segments

    history.store.write(change)
    history.store.shrink()


def _delete(db: sa.Connection, *where: Any) -> list[int]:
    """Delete the images' rows and note their files; returns their ids."""
    rows = db.execute(
        sa.select(*(t.image.c[name] for name in ("id", "job", "revision", "path", "thumb"))).where(*where)
    ).all()
    for row in rows:
        # A grandparent that is deleted later in this loop passes its children on again.
        parent = db.execute(sa.select(t.image.c.parent).where(t.image.c.id == row.id)).scalar()
        db.execute(t.image.update().where(t.image.c.parent == row.id).values(parent=parent))
        db.execute(t.search.delete().where(t.search.c.rowid == row.id))
        db.execute(t.image.delete().where(t.image.c.id == row.id))
        db.execute(t.job.delete().where(t.job.c.id == row.job))
        db.execute(t.gone.insert().prefix_with("OR IGNORE"), [{"path": p} for p in (row.path, row.thumb) if p])
    _drop_wordings(db, {row.revision for row in rows})
    return [row.id for row in rows]


def _drop_wordings(db: sa.Connection, revisions: Iterable[int]) -> None:
    """Delete those revisions that no picture and no job has any more; what follows them follows their parent."""
    c = t.revision.c
    for id in revisions:
        used = sa.select(sa.exists().where(t.image.c.revision == id) | sa.exists().where(t.job.c.revision == id))
        if not db.execute(used).scalar():
            parent = db.execute(sa.select(c.parent).where(c.id == id)).scalar()
            db.execute(t.revision.update().where(c.parent == id).values(parent=parent))
            db.execute(t.revision.delete().where(c.id == id))


def _part(name: str, paths: Iterable[Path]) -> Part:
    sizes = []
    for path in paths:
        with contextlib.suppress(OSError):  # gone since it was listed
            if path.is_file() and not path.is_symlink():
                sizes.append(path.stat().st_size)
    return Part(name, len(sizes), sum(sizes))
